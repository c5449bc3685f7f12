/* caching/kv/methods.c - the named rules: each a combination of parts with its published defaults.
 *
 * A method whose parts are not all there yet has its row, so that its name is known; rf_kv_rule_check says what is missing. Where a
 * paper and its code differ, and where a default is of a model's size, docs/policies.md says what was taken. */
#include <stdio.h>
#include <string.h>

#include "caching/kv/kv_internal.h"

typedef struct {
    rf_kv_method method;
    const char *parts; /* "key=value,..." onto the plain rule */
} row;

#define WINDOW_OF(w) "score=attention,queries=window,window=" #w

static const row rows[] = {
    {{"none", "everything is kept", ""}, "score=none"},
    {{"streaming", "the first tokens and the newest, turned by their place in the cache",
      "StreamingLLM, arXiv 2309.17453"},
     "score=position,sinks=4,schedule=step,position=cache"},
    {{"lacache", "a ladder over layers: older tokens live in fewer layers", "LaCache, arXiv 2507.14204"},
     "score=ladder,sinks=4,schedule=step,position=cache"},
    {{"random", "any tokens: the control", "kvpress"}, "score=random"},
    {{"h2o", "attention received from all queries, and half of the budget newest", "H2O, arXiv 2306.14048"},
     "score=attention,queries=all,reduce=sum,recents=-1,schedule=step"},
    {{"observed", "attention received, by the number of queries that can see a key", "kvpress"},
     "score=attention,queries=all,reduce=visible"},
    {{"a2sf", "attention received, older queries forgotten by a factor", "A2SF, arXiv 2407.20485"},
     "score=attention,queries=all,reduce=decay,alpha=0.95,group=sum,recents=16,schedule=step"},
    {{"tova", "attention of the newest query, one set a layer", "TOVA, arXiv 2401.06104"},
     "score=attention,queries=last,reduce=sum,heads=mean,schedule=step"},
    {{"treekv", "neighbours contest in turn: sparse far, dense near", "TreeKV, arXiv 2501.04987"},
     "score=tree,sinks=4,recents=-1,window=32,schedule=step,position=cache"},
    {{"lazy", "tokens idle for far longer than they ever were go, once in a while", "LazyEviction, arXiv 2506.15969"},
     "score=recurrence,activation=0.0001,window=32,schedule=every,every=32"},
    {{"kvcrush", "pages of most attention, and a spread of the others by their signature", "KVCrush, arXiv 2503.00022"},
     WINDOW_OF(16) ",reduce=sum,page=16,crush_share=0.25,sinks=4"},
    {{"snapkv", "attention of the prompt's last queries, smoothed", "SnapKV, arXiv 2404.14469"},
     WINDOW_OF(32) ",reduce=sum,pool=avg,pool_size=5"},
    {{"pyramidkv", "snapkv with more for lower layers", "PyramidKV, arXiv 2406.02069"},
     WINDOW_OF(8) ",reduce=sum,pool=max,pool_size=7,alloc=pyramid,beta=20"},
    {{"adakv", "snapkv with a layer's budget shared over its heads", "Ada-KV, arXiv 2407.11550"},
     WINDOW_OF(32) ",reduce=mean,pool=max,pool_size=7,pool_after_group=true,alloc=flat-heads,floor=0.2"},
    {{"cake", "mean and variance of attention; layers by how spread and how restless it is", "CAKE, arXiv 2503.12491"},
     WINDOW_OF(32) ",reduce=meanvar,gamma=200,pool=avg,pool_size=5,alloc=cake,tau1=1.6,tau2=0.4,schedule=step"},
    {{"obcache", "adakv by what the outputs would lose to first order", "OBCache, arXiv 2510.07651"},
     WINDOW_OF(
         32) ",reduce=mean,value=obc-joint,pool=max,pool_size=7,pool_after_group=true,alloc=flat-heads,floor=0.2"},
    {{"caote", "snapkv by the change of the output that a token's absence makes", "CAOTE, arXiv 2504.14051"},
     WINDOW_OF(32) ",reduce=sum,value=caote,pool=avg,pool_size=5"},
    {{"removal", "the exact squared change of the window's outputs", "as CAOTE, query by query"},
     WINDOW_OF(32) ",reduce=sum,value=removal"},
    {{"criticalkv", "snapkv, the second half of the budget weighed by what the out projection makes of values",
      "CriticalKV, arXiv 2502.03805"},
     WINDOW_OF(32) ",reduce=mean,pool=avg,pool_size=5,value=wo"},
    {{"knorm", "small keys stay", "L2 norm, arXiv 2406.11430"}, "score=knorm"},
    {{"keydiff", "keys unlike the mean key stay", "KeyDiff, arXiv 2504.15364"}, "score=keydiff"},
    {{"expected", "attention of Gaussian queries of the future, by the value's size",
      "Expected Attention, arXiv 2510.00636"},
     "score=expected,future=512,sinks=4,value=norm"},
    {{"dapq", "attention of tokens put behind the prompt and thrown away", "DapQ"},
     "score=attention,queries=pseudo,pseudo=32,reduce=sum"},
    {{"laq", "attention of a few tokens drafted on a compressed copy", "LAQ, arXiv 2505.20334"},
     "score=attention,queries=drafted,drafts=8,with_window=true,window=8,reduce=sum,pool=max,pool_size=7"},
    {{"merge", "snapkv, dropped values joined to the kept ones of like keys", "kvpress MergingPress"},
     WINDOW_OF(32) ",reduce=sum,pool=avg,pool_size=5,action=merge"},
    {{"ems", "attention of the window; dropped tokens merge into like ones", "EMS, arXiv 2412.08521"},
     WINDOW_OF(32) ",reduce=sum,action=merge-ems"},
    {{"elastic", "attention received over all heads; dropped tokens join their neighbours",
      "Elastic Cache, arXiv 2407.18121"},
     "score=attention,queries=all,reduce=sum,heads=mean,sinks=4,last=true,action=merge-near"},
    /* 204, 19, 32 and 17: newline, '.', ';' and ',' of the shipped models' tokenizer */
    {{"skipkv", "attention less redundancy, sentence by sentence", "SkipKV, arXiv 2512.07993"},
     WINDOW_OF(8) ",reduce=mean,pool=max,pool_size=7,group=max,redundancy=0.1,sentence_penalty=1,schedule=every,"
                  "every=128,delimiter1=204,delimiter2=19"},
    {{"compresskv", "snapkv on retrieval heads alone, calibrated", "CompressKV, arXiv 2508.02401"},
     WINDOW_OF(8) ",reduce=sum,pool=avg,pool_size=5,heads=list,alloc=table"},
    {{"razor", "retrieval heads keep all, the others ends and a mean", "RazorAttention, arXiv 2407.15891"},
     "score=position,sinks=4,alloc=class,action=compensate"},
    {{"fastkv", "snapkv; later layers see a part of the prompt alone", "FastKV, arXiv 2502.01068"},
     WINDOW_OF(8) ",reduce=sum,pool=max,pool_size=7,group=sum,tsp_share=0.2"},
    {{"epicache", "the most attention of an episode's prompt, block by block", "EpiCache, arXiv 2509.17396"},
     "score=attention,queries=external,reduce=max,group=max,sinks=4,block=2048"},
    {{"trimkv", "learned retention", "TRIM-KV, arXiv 2512.03324"}, "score=gate,schedule=high,buffer=128"},
    {{"global-retention", "learned retention, one budget for all layers and heads", "Make Each Token Count"},
     "score=gate,schedule=high,buffer=32,alloc=flat-all,floor=0"},
    {{"attention-gate", "learned flags before attention", "Attention-Gate, arXiv 2410.12876"}, "score=gate"},
    {{"kivi", "keys by channel and values by token in 2 or 4 bits", "KIVI, arXiv 2402.02750"},
     "score=position,action=demote,bits=4,low_bits=4,group_size=32,residual=32,schedule=step"},
    {{"zipcache", "salient tokens in 4 bits, the others in 2", "ZipCache, arXiv 2405.14256"},
     "score=attention,queries=probes,probe_recent=0.05,probe_random=0.05,reduce=visible,action=demote,bits=4,low_bits="
     "2,high_share=0.6,group=sum,group_size=256,"
     "schedule=every,every=100"},
    {{"mikv", "what would be dropped stays in few bits", "MiKV, arXiv 2402.18096"},
     "score=attention,queries=all,reduce=sum,recents=-1,action=demote,bits=16,low_bits=2,high_share=0.2,schedule=step"},
    {{"arkv", "full, 8 bits or gone", "ARKV"},
     WINDOW_OF(32) ",reduce=meanvar,gamma=263.81,pool=avg,pool_size=5,alloc=cake,tau1=7.774,tau2=5.407,action=demote,"
                   "bits=16,low_bits=8,fp8=true,high_share=1,schedule=step"},
    {{"minicache", "neighbouring layers share directions", "MiniCache, arXiv 2405.14366"},
     "score=position,action=share,high_share=0.05"},
    {{"tokenselect", "all stay; the few that all heads of a layer vote for are read", "TokenSelect, arXiv 2411.02886"},
     "score=attention,queries=last,action=select,schedule=step,selector=vote,init=128,local=512,select=2048"},
    {{"fasa", "all stay; the best by a head's few most telling rotary pairs are read", "FASA"},
     "score=attention,queries=last,window=8,action=select,schedule=step,selector=pairs,init=0,local=1,select=256,"
     "select_dims=32"},
    {{"sentencekv", "all stay; whole sentences are read", "SentenceKV, arXiv 2504.00970"},
     WINDOW_OF(32) ",reduce=sum,pool=max,pool_size=7,action=select,schedule=step,selector=sentences,init=32,local=32,"
                   "delimiter1=204,delimiter2=32,delimiter3=17,delimiter4=19"},
    {{"icecache", "all stay; whole pages of near keys are read, from the third layer on", "after IceCache"},
     "score=attention,queries=last,action=select,schedule=step,selector=pages,page=8,init=4,local=16,select=256,"
     "skip_layers=2"},
};

int rf_kv_num_methods(void) {
    return (int)(sizeof rows / sizeof rows[0]);
}

const rf_kv_method *rf_kv_method_at(int index) {
    return index >= 0 && index < rf_kv_num_methods() ? &rows[index].method : NULL;
}

rf_kv_rule rf_kv_rule_plain(void) {
    return (rf_kv_rule){.score = RF_KV_SCORE_ATTENTION,
                        .queries = RF_KV_QUERIES_WINDOW,
                        .reduce = RF_KV_REDUCE_MEAN,
                        .pool_size = 5,
                        .group = RF_KV_OVER_MEAN,
                        .window = 32,
                        .alpha = 0.95,
                        .gamma = 200,
                        .tau1 = 1.6,
                        .tau2 = 0.4,
                        .floor = 0.2,
                        .beta = 20,
                        .every = 32,
                        .buffer = 32,
                        .drafts = 8,
                        .pseudo = 32,
                        .tsp_layer = -1,
                        .sentence_threshold = 0.95,
                        .probe_recent = 0.05,
                        .probe_random = 0.05,
                        .activation = 1e-4,
                        .future = 512,
                        .page = 16,
                        .bits = 4,
                        .low_bits = 2,
                        .group_size = 32,
                        .residual = 32,
                        .high_share = 0.5,
                        .select = 256,
                        .init = 4,
                        .local = 32,
                        .select_dims = 32,
                        .delimiters = {-1, -1, -1, -1}};
}

bool rf_kv_method_find(rf_kv_rule *out, const char *name) {
    for (int i = 0; i < rf_kv_num_methods(); i++) {
        if (strcmp(rows[i].method.name, name) != 0) continue;
        rf_kv_rule rule = rf_kv_rule_plain();
        char text[320];
        snprintf(text, sizeof text, "%s", rows[i].parts);
        for (char *next = text, *at; (at = next) != NULL;) {
            next = strchr(at, ',');
            if (next) *next++ = 0;
            char *value = strchr(at, '=');
            if (!value) return false;
            *value++ = 0;
            if (rf_kv_rule_set(&rule, at, value, NULL) != RF_OK)
                return false; /* tests/caching/test_kv_rules.c opens every row */
        }
        snprintf(rule.method, sizeof rule.method, "%s", name);
        *out = rule;
        return true;
    }
    return false;
}
