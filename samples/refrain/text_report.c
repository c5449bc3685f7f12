/* samples/refrain/text_report.c - what is said about a decode, and --json. */
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "samples/refrain/report.h"
#include "samples/refrain/text_run.h"
#include "samples/tasks/tasks.h"

double text_agreement(const int32_t *a, int32_t num_a, const int32_t *b, int32_t num_b, int32_t *first) {
    int32_t shorter = num_a < num_b ? num_a : num_b, longer = num_a < num_b ? num_b : num_a, equal = 0;
    *first = num_a == num_b ? -1 : shorter;
    for (int32_t i = 0; i < shorter; i++) {
        equal += a[i] == b[i];
        if (a[i] != b[i] && (*first < 0 || i < *first)) *first = i;
    }
    return longer > 0 ? (double)equal / longer : 1;
}

double text_rate(const text_outcome *o) {
    double ms = o->ms - o->result.prefill_ms;
    return ms > 0 ? o->result.num_tokens * 1e3 / ms : 0;
}

static double per_forward(int64_t what, const text_outcome *o) {
    return o->result.num_forwards > 0 ? (double)what / (double)o->result.num_forwards : 0;
}

static double ms_per_forward(const text_outcome *o) {
    return o->result.num_forwards > 0 ? (o->ms - o->result.prefill_ms) / (double)o->result.num_forwards : 0;
}

/* 1 right, 0 wrong, -1 no task. */
static int is_exact(const text_run *run, const text_outcome *o) {
    if (run->task < 0) return -1;
    return task_score(run->task, run->task_prompt, run->task_answer, o->text.bytes ? o->text.bytes : "") > 0.5;
}

static const char *policy_name(const text_run *run) {
    return run->policy ? rf_policy_get_def(run->policy)->name : "none";
}

/* As rf_kv_rule_parse takes it. */
static void describe_kv(const text_run *run, char *out, size_t room) {
    rf_kv_rule_describe(&run->kv.items[0].rule, out, room);
}

static double ratio(double a, double b) {
    return b > 0 ? a / b : 0;
}

void text_say_result(const text_run *run) {
    const rf_decode_result *r = &run->own.result;
    bool causal = text_is_causal(&run->text);
    char seed[40] = "", guide[80] = "", kept[96] = "";
    if (run->options.temperature > 0) snprintf(seed, sizeof seed, "; seed %ju", (uintmax_t)run->seed);
    if (run->guide)
        snprintf(guide, sizeof guide, ", %" PRId64 " of the guide in %.0f ms", r->guide_forwards, r->guide_ms);
    int64_t external = r->external_rows_reused + r->external_rows_fresh;
    if (external > 0)
        snprintf(kept, sizeof kept, "; attention outside the block reused for %.0f %% of rows",
                 100.0 * (double)r->external_rows_reused / (double)external);
    say("%d token%s%s in %" PRId64 " forwards (%.3g a forward%s), %.1f tokens/s, %.3g ms a forward, prefill %.1f ms, "
        "%" PRId64 " row-passes%s%s",
        (int)r->num_tokens, r->num_tokens == 1 ? "" : "s", r->ended || causal ? "" : " and no end of text",
        r->num_forwards, per_forward(r->num_tokens, &run->own), guide, text_rate(&run->own), ms_per_forward(&run->own),
        r->prefill_ms, r->row_passes, kept, seed);
    if (run->policy && run->args.verbosity > 0)
        say("cache %s: %s; renewed everything %" PRId64 " times", policy_name(run), run->cache_options, r->refreshes);
    if (run->kv.num > 0) {
        char rule[512], kept_bytes[32], full_bytes[32], budget[40] = "";
        kv_numbers n = kv_numbers_of(r);
        if (run->args.verbosity > 0) {
            describe_kv(run, rule, sizeof rule);
        } else {
            snprintf(rule, sizeof rule, "%s", run->kv.items[0].name);
        }
        format_bytes(kept_bytes, sizeof kept_bytes, n.kept_bytes);
        format_bytes(full_bytes, sizeof full_bytes, n.full_bytes);
        if (n.budget > 0) snprintf(budget, sizeof budget, ", budget %d", (int)n.budget);
        say("cache %s%s: %s of %s kept (%.1f %%), %.0f evictions, scoring %.2f ms behind the prompt, %.2f ms later",
            rule, budget, kept_bytes, full_bytes, 100 * ratio(n.kept_bytes, n.full_bytes), n.evictions, n.score_ms,
            n.step_score_ms);
    }
    if (run->args.verbosity > 0) {
        char weights[32], cache[32], planes[32], arena[32];
        format_bytes(weights, sizeof weights, (double)rf_text_model_bytes(run->text.model));
        format_bytes(cache, sizeof cache, (double)r->cache_bytes);
        format_bytes(planes, sizeof planes, (double)r->plane_bytes);
        format_bytes(arena, sizeof arena, (double)r->arena_bytes);
        say("device %s: %s; weights %s, keys and values %s, planes %s, arena %s; load %.1f s",
            rf_backend_name(run->text.backend), rf_backend_description(run->text.backend), weights, cache, planes,
            arena, run->load_ms / 1e3);
    }
    if (run->args.kv_map) say("wrote %s", run->args.kv_map);
    if (is_exact(run, &run->own) >= 0) say("task %s: %s", run->args.task, is_exact(run, &run->own) ? "right" : "wrong");
    if (!run->args.compare) return;
    int32_t first;
    const rf_decode_result *ref = &run->reference.result;
    double agreement = text_agreement(run->own.tokens, r->num_tokens, run->reference.tokens, ref->num_tokens, &first);
    char where[48] = "";
    if (first >= 0) snprintf(where, sizeof where, ", first difference at token %d", (int)first);
    say("uncached, one token a pass: %d tokens in %" PRId64 " forwards, %.1f tokens/s, %" PRId64
        " row-passes; %.1f %% of "
        "tokens agree%s; %.2f times as fast, %.2f times fewer row-passes",
        (int)ref->num_tokens, ref->num_forwards, text_rate(&run->reference), ref->row_passes, 100 * agreement, where,
        ratio(run->reference.ms, run->own.ms), ratio((double)ref->row_passes, (double)r->row_passes));
    if (is_exact(run, &run->reference) >= 0)
        say("uncached, task %s: %s", run->args.task, is_exact(run, &run->reference) ? "right" : "wrong");
}

/* ---- --json ---- */

static double rounded(double ms) {
    return (double)(int64_t)(ms * 1e3 + 0.5) / 1e3;
}

static void add_outcome(cJSON *o, const text_run *run, const text_outcome *outcome) {
    const rf_decode_result *r = &outcome->result;
    cJSON_AddStringToObject(o, "text", outcome->text.bytes ? outcome->text.bytes : "");
    cJSON *tokens = cJSON_AddArrayToObject(o, "tokens");
    for (int32_t i = 0; i < r->num_tokens; i++) cJSON_AddItemToArray(tokens, cJSON_CreateNumber(outcome->tokens[i]));
    cJSON_AddNumberToObject(o, "num_tokens", r->num_tokens);
    cJSON_AddBoolToObject(o, "ended", r->ended);
    if (run->args.stops.count > 0) cJSON_AddBoolToObject(o, "stopped", outcome->stopped);
    report_add_uint(o, "forwards", (uint64_t)r->num_forwards);
    cJSON_AddNumberToObject(o, "tokens_per_forward", per_forward(r->num_tokens, outcome));
    if (run->guide && outcome == &run->own) {
        report_add_uint(o, "guide_forwards", (uint64_t)r->guide_forwards);
        cJSON_AddNumberToObject(o, "guide_ms", rounded(r->guide_ms));
    }
    report_add_uint(o, "row_passes", (uint64_t)r->row_passes);
    report_add_uint(o, "key_reads", (uint64_t)r->key_reads);
    report_add_uint(o, "head_rows", (uint64_t)r->head_rows);
    cJSON_AddNumberToObject(o, "ms", rounded(outcome->ms));
    cJSON_AddNumberToObject(o, "ms_per_forward", rounded(ms_per_forward(outcome)));
    cJSON_AddNumberToObject(o, "prefill_ms", rounded(r->prefill_ms));
    cJSON_AddNumberToObject(o, "plan_ms", rounded(r->plan_ms));
    cJSON_AddNumberToObject(o, "tok_s", rounded(text_rate(outcome)));
    report_add_uint(o, "cache_bytes", r->cache_bytes);
    report_add_uint(o, "plane_bytes", r->plane_bytes);
    report_add_uint(o, "arena_bytes", r->arena_bytes);
    report_add_uint(o, "refreshes", (uint64_t)r->refreshes);
    if (is_exact(run, outcome) >= 0) cJSON_AddBoolToObject(o, "exact_match", is_exact(run, outcome));
}

static cJSON *kv_json(const text_run *run) {
    char rule[1024];
    const kv_setting *setting = &run->kv.items[0];
    kv_numbers n = kv_numbers_of(&run->own.result);
    cJSON *o = cJSON_CreateObject();
    describe_kv(run, rule, sizeof rule);
    cJSON_AddStringToObject(o, "policy", setting->name);
    cJSON_AddStringToObject(o, "rule", rule);
    cJSON_AddItemToObject(o, "budget", n.budget > 0 ? cJSON_CreateNumber(n.budget) : cJSON_CreateNull());
    cJSON_AddItemToObject(o, "ratio", setting->ratio > 0 ? cJSON_CreateNumber(setting->ratio) : cJSON_CreateNull());
    report_add_uint(o, "kept_bytes", (uint64_t)n.kept_bytes);
    report_add_uint(o, "full_bytes", (uint64_t)n.full_bytes);
    report_add_uint(o, "evictions", (uint64_t)n.evictions);
    cJSON_AddNumberToObject(o, "score_ms", rounded(n.score_ms));
    cJSON_AddNumberToObject(o, "step_score_ms", rounded(n.step_score_ms));
    return o;
}

static cJSON *compare_json(const text_run *run) {
    cJSON *o = cJSON_CreateObject();
    int32_t first;
    const rf_decode_result *r = &run->own.result, *ref = &run->reference.result;
    double agreement = text_agreement(run->own.tokens, r->num_tokens, run->reference.tokens, ref->num_tokens, &first);
    cJSON_AddNumberToObject(o, "agreement", agreement);
    cJSON_AddItemToObject(o, "first_divergence", first < 0 ? cJSON_CreateNull() : cJSON_CreateNumber(first));
    cJSON_AddBoolToObject(o, "equal", first < 0);
    cJSON_AddNumberToObject(o, "speedup", ratio(run->reference.ms, run->own.ms));
    cJSON_AddNumberToObject(o, "row_pass_ratio", ratio((double)ref->row_passes, (double)r->row_passes));
    add_outcome(o, run, &run->reference);
    return o;
}

rf_status text_print_json(const text_run *run, rf_error *err) {
    const rf_decode_result *r = &run->own.result;
    bool causal = text_is_causal(&run->text);
    cJSON *root = cJSON_CreateObject();
    cJSON_AddStringToObject(root, "command", "text");
    cJSON_AddStringToObject(root, "model", run->text.path);
    cJSON_AddStringToObject(root, "family", run->text.model->desc.family);
    cJSON_AddStringToObject(root, "device", rf_backend_name(run->text.backend));
    cJSON_AddStringToObject(root, "dtype", rf_dtype_name(run->text.dtype));
    report_add_uint(root, "prompt_tokens", run->prompt.num);
    add_outcome(root, run, &run->own);
    report_add_uint(root, "seed", run->seed);
    if (run->task >= 0) {
        cJSON_AddStringToObject(root, "task", run->args.task);
        cJSON_AddStringToObject(root, "prompt", run->task_prompt);
        cJSON_AddStringToObject(root, "answer", run->task_answer);
    }
    if (!causal) {
        cJSON_AddStringToObject(root, "policy", policy_name(run));
        cJSON_AddStringToObject(root, "options", run->cache_options ? run->cache_options : "");
        cJSON_AddStringToObject(root, "commit", text_commit_name(run->options.commit));
        cJSON_AddNumberToObject(root, "block", text_block_of(&run->options, &run->text));
        cJSON_AddStringToObject(root, "end", text_end_name(run->options.end));
        cJSON_AddStringToObject(root, "reuse", text_reuse_name(run->options.reuse));
        report_add_uint(root, "external_rows_reused", (uint64_t)r->external_rows_reused);
        report_add_uint(root, "external_rows_fresh", (uint64_t)r->external_rows_fresh);
    }
    if (run->kv.num > 0) cJSON_AddItemToObject(root, "kv", kv_json(run));
    cJSON_AddNumberToObject(root, "load_ms", rounded(run->load_ms));
    if (run->args.compare) cJSON_AddItemToObject(root, "compare", compare_json(run));
    return report_print_json(root, err);
}
