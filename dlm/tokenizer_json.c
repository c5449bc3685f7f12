/* dlm/tokenizer_json.c - tokenizer.json and tokenizer_config.json. What is not known is refused by its name.
 *
 * Ids of added tokens: the library numbers those that the vocabulary lacks from the vocabulary's size on, in the order of
 * the file, whatever `id` the file gives. A file whose `id` says otherwise is refused, as both readings are in use. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "core/memory.h"
#include "dlm/tokenizer_internal.h"

/* GPT-2's pattern, which ByteLevel splits with. */
#define BYTE_LEVEL_PATTERN "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+"

/* What Digits splits at: numbers of Unicode 17, which Rust has and Oniguruma not yet. */
#define DIGITS_PATTERN "[\\p{N}\\x{11de0}-\\x{11de9}\\x{16ff4}-\\x{16ff6}]"

typedef struct {
    rf_tokenizer *t;
    const rf_json *doc;
    bool byte_level_seen, byte_level_decoder, template_seen;
    rf_error *err;
} reader;

static rf_status refuse_type(const reader *r, const char *part, const char *type) {
    return rf_fail(r->err, RF_ERR_UNSUPPORTED, "%s: %s '%.60s' is not supported", rf_json_name(r->doc), part, type);
}

static rf_status wrong(const reader *r, const char *what, const char *wanted) {
    return rf_fail(r->err, RF_ERR_CONFIG, "%s: %s must be %s", rf_json_name(r->doc), what, wanted);
}

/* A component: absent and null give *type = NULL. */
static rf_status component(const reader *r, const rf_json_value *v, const char *part, const char **type) {
    *type = NULL;
    if (!rf_json_is_object(v)) return wrong(r, part, "an object with a type");
    rf_status st = rf_json_get_string(r->doc, v, "type", type, r->err);
    return st == RF_OK ? RF_OK : rf_fail_prefix(r->err, st, "%s", part);
}

typedef rf_status (*component_reader)(reader *r, const rf_json_value *v);

/* The members of a Sequence, in order. Nesting is bounded by the JSON reader's limit on depth. */
static rf_status each(reader *r, const rf_json_value *v, const char *key, component_reader read) {
    const rf_json_value *list = rf_json_get(v, key);
    if (!rf_json_is_array(list)) return wrong(r, key, "an array");
    for (const rf_json_value *m = rf_json_first(list); m; m = rf_json_next(m)) RF_TRY(read(r, m));
    return RF_OK;
}

/* ---- model ---- */

static rf_status merge_parts(const reader *r, const rf_json_value *m, size_t rank, const char **left,
                             size_t *left_bytes, const char **right) {
    const char *text = rf_json_string(m);
    if (text) {
        const char *space = strchr(text, ' ');
        if (!space || strchr(space + 1, ' ')) {
            return rf_fail(r->err, RF_ERR_CONFIG, "%s: merge %zu must be two tokens with a space between: '%.60s'",
                           rf_json_name(r->doc), rank, text);
        }
        *left = text;
        *left_bytes = (size_t)(space - text);
        *right = space + 1;
        return RF_OK;
    }
    const rf_json_value *a = rf_json_first(m), *b = a ? rf_json_next(a) : NULL;
    *left = a ? rf_json_string(a) : NULL;
    *right = b ? rf_json_string(b) : NULL;
    if (!rf_json_is_array(m) || !*left || !*right || rf_json_next(b)) {
        return rf_fail(r->err, RF_ERR_CONFIG, "%s: merge %zu must be a string or two strings", rf_json_name(r->doc),
                       rank);
    }
    *left_bytes = strlen(*left);
    return RF_OK;
}

static rf_status refuse_set(const reader *r, const rf_json_value *model, const char *key) {
    if (!rf_json_has(model, key)) return RF_OK;
    const char *text = rf_json_string(rf_json_get(model, key));
    if (text && !*text) return RF_OK;
    return rf_fail(r->err, RF_ERR_UNSUPPORTED, "%s: BPE with %s is not supported", rf_json_name(r->doc), key);
}

static rf_status read_model(reader *r, const rf_json_value *model, size_t num_added) {
    const char *name = rf_json_name(r->doc), *type;
    bool byte_fallback, fuse_unk, ignore_merges;
    double dropout;
    RF_TRY(rf_json_opt_string(r->doc, model, "type", "BPE", &type, r->err));
    if (strcmp(type, "BPE") != 0) return refuse_type(r, "model", type);
    RF_TRY(rf_json_opt_bool(r->doc, model, "byte_fallback", false, &byte_fallback, r->err));
    if (byte_fallback) return rf_fail(r->err, RF_ERR_UNSUPPORTED, "%s: BPE with byte_fallback is not supported", name);
    RF_TRY(rf_json_opt_double(r->doc, model, "dropout", 0, 1, 0, &dropout, r->err));
    if (dropout > 0) return rf_fail(r->err, RF_ERR_UNSUPPORTED, "%s: BPE with dropout is not supported", name);
    RF_TRY(refuse_set(r, model, "continuing_subword_prefix"));
    RF_TRY(refuse_set(r, model, "end_of_word_suffix"));
    RF_TRY(rf_json_opt_bool(r->doc, model, "fuse_unk", false, &fuse_unk, r->err));
    RF_TRY(rf_json_opt_bool(r->doc, model, "ignore_merges", false, &ignore_merges, r->err));

    const rf_json_value *vocab = rf_json_get(model, "vocab"), *merges = rf_json_get(model, "merges");
    if (!rf_json_is_object(vocab)) return wrong(r, "model.vocab", "an object");
    if (!rf_json_is_array(merges)) return wrong(r, "model.merges", "an array");
    size_t num_vocab = rf_json_count(vocab), num_merges = rf_json_count(merges);
    size_t max_ids = 4 * num_vocab + 65536;
    if (max_ids > RF_TOKENIZER_MAX_IDS) max_ids = RF_TOKENIZER_MAX_IDS;
    int32_t num_ids = 0;
    for (const rf_json_value *v = rf_json_first(vocab); v; v = rf_json_next(v)) {
        double id = rf_json_number(v);
        if (!(id >= 0 && id < (double)max_ids) || id != floor(id)) {
            return rf_fail(r->err, RF_ERR_CONFIG, "%s: the id of token '%.60s' must be a whole number below %zu", name,
                           rf_json_key(v), max_ids);
        }
        if ((int32_t)id >= num_ids) num_ids = (int32_t)id + 1;
    }
    size_t with_added = num_vocab + num_added;
    if (with_added > RF_TOKENIZER_MAX_IDS) {
        return rf_fail(r->err, RF_ERR_CONFIG, "%s: %zu tokens, the limit is %d", name, with_added,
                       RF_TOKENIZER_MAX_IDS);
    }
    if ((int32_t)with_added > num_ids) num_ids = (int32_t)with_added;
    rf_bpe *b = &r->t->bpe;
    RF_TRY(rf_bpe_init(b, num_ids, with_added, num_merges, r->err));
    b->fuse_unk = fuse_unk;
    b->ignore_merges = ignore_merges;
    rf_status st = RF_OK;
    for (const rf_json_value *v = rf_json_first(vocab); v && st == RF_OK; v = rf_json_next(v)) {
        st = rf_bpe_add_token(b, rf_json_key(v), strlen(rf_json_key(v)), (int32_t)rf_json_number(v), true, r->err);
    }
    uint32_t rank = 0;
    for (const rf_json_value *m = rf_json_first(merges); m && st == RF_OK; m = rf_json_next(m), rank++) {
        const char *left = NULL, *right = NULL;
        size_t left_bytes = 0;
        RF_TRY(merge_parts(r, m, rank, &left, &left_bytes, &right));
        st = rf_bpe_add_merge(b, left, left_bytes, right, strlen(right), rank, r->err);
    }
    if (st != RF_OK) return rf_fail_prefix(r->err, st, "%s", name);
    rf_bpe_finish(b);
    if (rf_json_has(model, "unk_token")) {
        const char *unk;
        RF_TRY(rf_json_get_string(r->doc, model, "unk_token", &unk, r->err));
        b->unk = rf_bpe_find(b, unk, strlen(unk));
        if (b->unk < 0) {
            return rf_fail(r->err, RF_ERR_CONFIG, "%s: unk_token '%.60s' is not in the vocabulary", name, unk);
        }
    }
    return RF_OK;
}

/* ---- added tokens ---- */

static rf_status read_added(reader *r, const rf_json_value *list) {
    rf_tokenizer *t = r->t;
    const char *name = rf_json_name(r->doc);
    size_t num_model = 0;
    for (int32_t i = 0; i < t->bpe.num_tokens; i++) num_model += t->bpe.tokens[i].used;
    int64_t next_id = (int64_t)num_model;
    t->added = rf_alloc_zero(rf_json_count(list) + 1, sizeof *t->added);
    if (!t->added) return rf_fail(r->err, RF_ERR_MEMORY, "%s: no memory for the added tokens", name);
    for (const rf_json_value *v = rf_json_first(list); v; v = rf_json_next(v)) {
        rf_added_token *a = &t->added[t->num_added];
        const char *content;
        int64_t id;
        bool normalized;
        RF_TRY(rf_json_get_string(r->doc, v, "content", &content, r->err));
        RF_TRY(rf_json_get_int(r->doc, v, "id", 0, INT32_MAX, &id, r->err));
        RF_TRY(rf_json_get_bool(r->doc, v, "single_word", &a->single_word, r->err));
        RF_TRY(rf_json_get_bool(r->doc, v, "lstrip", &a->lstrip, r->err));
        RF_TRY(rf_json_get_bool(r->doc, v, "rstrip", &a->rstrip, r->err));
        RF_TRY(rf_json_get_bool(r->doc, v, "normalized", &normalized, r->err));
        RF_TRY(rf_json_get_bool(r->doc, v, "special", &a->special, r->err));
        size_t num = strlen(content);
        if (num == 0) continue; /* the library leaves these out */
        int32_t known = rf_bpe_find(&t->bpe, content, num);
        int64_t expected = known >= 0 ? known : next_id;
        if (id != expected) {
            return rf_fail(r->err, RF_ERR_CONFIG, "%s: added token '%.60s' has id %lld, expected %lld (%s)", name,
                           content, (long long)id, (long long)expected,
                           known >= 0 ? "its id in the vocabulary" : "the next after the vocabulary");
        }
        rf_status st = RF_OK;
        if (known < 0) {
            if (id >= t->bpe.num_tokens) return wrong(r, "added_tokens", "numbered after the vocabulary");
            st = rf_bpe_add_token(&t->bpe, content, num, (int32_t)id, false, r->err);
            next_id++;
        }
        a->id = (int32_t)id;
        t->bpe.tokens[id].special = a->special;
        rf_text composed = {0};
        bool changed = false;
        if (st == RF_OK && normalized && t->nfc) {
            st = rf_nfc((const uint8_t *)content, num, &composed, &changed, r->err);
        }
        if (st == RF_OK && changed) { /* decodes to its normal form */
            st = rf_bpe_set_decoded(&t->bpe, (int32_t)id, composed.bytes, composed.num, r->err);
        }
        if (st == RF_OK) {
            st = rf_trie_add(normalized ? &t->normalized : &t->plain,
                             (const uint8_t *)(changed ? composed.bytes : content), changed ? composed.num : num,
                             (int32_t)t->num_added, r->err);
        }
        rf_text_clear(&composed);
        if (st != RF_OK) return rf_fail_prefix(r->err, st, "%s", name);
        t->num_added++;
    }
    /* The library asks whether the text that a token decodes to is the content of a special token. */
    for (size_t i = 0; i < t->num_added; i++) {
        int32_t same = rf_bpe_find_decoded(&t->bpe, t->added[i].id);
        t->bpe.tokens[t->added[i].id].skipped = same >= 0 && t->bpe.tokens[same].special;
    }
    return RF_OK;
}

/* ---- normalizer, pre-tokenizer, decoder ---- */

static rf_status read_normalizer(reader *r, const rf_json_value *v) {
    const char *type;
    RF_TRY(component(r, v, "normalizer", &type));
    if (strcmp(type, "Sequence") == 0) return each(r, v, "normalizers", read_normalizer);
    if (strcmp(type, "NFC") != 0) return refuse_type(r, "normalizer", type);
    r->t->nfc = true;
    return RF_OK;
}

static rf_status read_split(reader *r, const rf_json_value *v, rf_split_stage *s, const char *where) {
    static const char *const names[] = {"Isolated", "Removed", "Contiguous", "MergedWithPrevious", "MergedWithNext"};
    const char *behavior;
    RF_TRY(rf_json_get_string(r->doc, v, "behavior", &behavior, r->err));
    RF_TRY(rf_json_get_bool(r->doc, v, "invert", &s->invert, r->err));
    size_t i = 0;
    while (i < sizeof names / sizeof *names && strcmp(names[i], behavior) != 0) i++;
    if (i == sizeof names / sizeof *names) return refuse_type(r, "pre_tokenizer Split behavior", behavior);
    s->behavior = (rf_split_behavior)i;
    const rf_json_value *pattern = rf_json_get(v, "pattern"), *kind = rf_json_first(pattern);
    const char *text = kind ? rf_json_string(kind) : NULL;
    if (!rf_json_is_object(pattern) || !text || rf_json_next(kind)) {
        return wrong(r, "the pattern of pre_tokenizer Split", "{\"Regex\": text} or {\"String\": text}");
    }
    bool literal = strcmp(rf_json_key(kind), "String") == 0;
    if (!literal && strcmp(rf_json_key(kind), "Regex") != 0) {
        return refuse_type(r, "pre_tokenizer Split pattern", rf_json_key(kind));
    }
    return rf_split_stage_init(s, text, literal, where, r->err);
}

static rf_status read_pre_tokenizer(reader *r, const rf_json_value *v) {
    const char *type;
    RF_TRY(component(r, v, "pre_tokenizer", &type));
    if (strcmp(type, "Sequence") == 0) return each(r, v, "pretokenizers", read_pre_tokenizer);
    rf_tokenizer *t = r->t;
    if (r->byte_level_seen) {
        return rf_fail(r->err, RF_ERR_UNSUPPORTED, "%s: pre_tokenizer '%.60s' after ByteLevel is not supported",
                       rf_json_name(r->doc), type);
    }
    if (t->num_stages == RF_TOKENIZER_MAX_STAGES) {
        return rf_fail(r->err, RF_ERR_UNSUPPORTED, "%s: more than %d pre_tokenizers", rf_json_name(r->doc),
                       RF_TOKENIZER_MAX_STAGES);
    }
    char where[160];
    snprintf(where, sizeof where, "%.100s: pre_tokenizer %.20s", rf_json_name(r->doc), type);
    rf_split_stage *s = &t->stages[t->num_stages];
    rf_status st = RF_OK;
    if (strcmp(type, "Split") == 0) {
        st = read_split(r, v, s, where);
    } else if (strcmp(type, "Digits") == 0) {
        bool single;
        RF_TRY(rf_json_get_bool(r->doc, v, "individual_digits", &single, r->err));
        s->behavior = single ? RF_SPLIT_ISOLATED : RF_SPLIT_CONTIGUOUS;
        st = rf_split_stage_init(s, DIGITS_PATTERN, false, where, r->err);
    } else if (strcmp(type, "ByteLevel") == 0) {
        bool use_regex, trim;
        RF_TRY(rf_json_get_bool(r->doc, v, "add_prefix_space", &s->prefix_space, r->err));
        RF_TRY(rf_json_opt_bool(r->doc, v, "use_regex", true, &use_regex, r->err));
        RF_TRY(rf_json_opt_bool(r->doc, v, "trim_offsets", true, &trim, r->err)); /* no offsets here */
        r->byte_level_seen = true;
        if (use_regex) st = rf_split_stage_init(s, BYTE_LEVEL_PATTERN, false, where, r->err);
    } else {
        return refuse_type(r, "pre_tokenizer", type);
    }
    t->num_stages++; /* also after a failure, to be freed */
    return st;
}

static rf_status read_decoder(reader *r, const rf_json_value *v) {
    const char *type;
    RF_TRY(component(r, v, "decoder", &type));
    if (strcmp(type, "Sequence") == 0) return each(r, v, "decoders", read_decoder);
    if (strcmp(type, "ByteLevel") != 0 || r->byte_level_decoder) return refuse_type(r, "decoder", type);
    r->byte_level_decoder = true;
    return RF_OK;
}

/* ---- post-processor ---- */

static rf_status append_template_token(reader *r, const rf_json_value *v, const rf_json_value *piece,
                                       rf_token_ids *out) {
    const char *id;
    RF_TRY(rf_json_get_string(r->doc, piece, "id", &id, r->err));
    const rf_json_value *ids = rf_json_get(rf_json_get(rf_json_get(v, "special_tokens"), id), "ids");
    if (!rf_json_is_array(ids)) {
        return rf_fail(r->err, RF_ERR_CONFIG, "%s: TemplateProcessing has no ids for its special token '%.60s'",
                       rf_json_name(r->doc), id);
    }
    for (const rf_json_value *m = rf_json_first(ids); m; m = rf_json_next(m)) {
        double number = rf_json_number(m);
        const rf_bpe *b = &r->t->bpe;
        if (!(number >= 0 && number < b->num_tokens) || number != floor(number) || !b->tokens[(int32_t)number].used) {
            return rf_fail(r->err, RF_ERR_CONFIG, "%s: TemplateProcessing names an id of '%.60s' that no token has",
                           rf_json_name(r->doc), id);
        }
        int32_t one = (int32_t)number;
        RF_TRY(rf_token_ids_append(out, &one, 1, r->err));
    }
    return RF_OK;
}

static rf_status read_template(reader *r, const rf_json_value *v, rf_token_ids *before, rf_token_ids *after) {
    const rf_json_value *single = rf_json_get(v, "single");
    if (!rf_json_is_array(single)) return wrong(r, "TemplateProcessing.single", "an array");
    int num_sequences = 0;
    for (const rf_json_value *m = rf_json_first(single); m; m = rf_json_next(m)) {
        const rf_json_value *special = rf_json_get(m, "SpecialToken"), *sequence = rf_json_get(m, "Sequence");
        const char *id;
        if (special) {
            RF_TRY(append_template_token(r, v, special, num_sequences ? after : before));
        } else if (sequence) {
            RF_TRY(rf_json_get_string(r->doc, sequence, "id", &id, r->err));
            num_sequences += strcmp(id, "A") == 0 ? 1 : 2;
        } else {
            return wrong(r, "a piece of TemplateProcessing.single", "SpecialToken or Sequence");
        }
    }
    if (num_sequences != 1) return wrong(r, "TemplateProcessing.single", "a template with the text ($A) once");
    return RF_OK;
}

static rf_status read_post_processor(reader *r, const rf_json_value *v) {
    const char *type;
    RF_TRY(component(r, v, "post_processor", &type));
    if (strcmp(type, "Sequence") == 0) return each(r, v, "processors", read_post_processor);
    if (strcmp(type, "ByteLevel") == 0) return RF_OK; /* offsets only */
    if (strcmp(type, "TemplateProcessing") != 0) return refuse_type(r, "post_processor", type);
    if (r->template_seen)
        return refuse_type(r, "post_processor", "TemplateProcessing twice"); /* nor does the library */
    r->template_seen = true;
    return read_template(r, v, &r->t->prefix, &r->t->suffix);
}

/* ---- files ---- */

rf_status rf_tokenizer_read(rf_tokenizer *t, const rf_json *doc, rf_error *err) {
    reader r = {.t = t, .doc = doc, .err = err};
    const rf_json_value *root = rf_json_root(doc), *added = rf_json_get(root, "added_tokens");
    const char *name = rf_json_name(doc), *version;
    if (!rf_json_is_object(root)) return wrong(&r, "the file", "an object");
    RF_TRY(rf_json_opt_string(doc, root, "version", "1.0", &version, err));
    if (strcmp(version, "1.0") != 0) return refuse_type(&r, "version", version);
    if (rf_json_has(root, "added_tokens") && !rf_json_is_array(added)) return wrong(&r, "added_tokens", "an array");
    if (!rf_json_is_object(rf_json_get(root, "model"))) return wrong(&r, "model", "an object");
    /* cheap parts first, so that an unknown one is refused before the vocabulary is read */
    if (rf_json_has(root, "normalizer")) RF_TRY(read_normalizer(&r, rf_json_get(root, "normalizer")));
    if (rf_json_has(root, "pre_tokenizer")) RF_TRY(read_pre_tokenizer(&r, rf_json_get(root, "pre_tokenizer")));
    if (!r.byte_level_seen) {
        return rf_fail(err, RF_ERR_UNSUPPORTED, "%s: no ByteLevel pre_tokenizer, and only byte-level BPE is supported",
                       name);
    }
    if (rf_json_has(root, "decoder")) RF_TRY(read_decoder(&r, rf_json_get(root, "decoder")));
    if (!r.byte_level_decoder) {
        return rf_fail(err, RF_ERR_UNSUPPORTED, "%s: no ByteLevel decoder, and only byte-level BPE is supported", name);
    }
    RF_TRY(read_model(&r, rf_json_get(root, "model"), rf_json_count(added)));
    RF_TRY(read_added(&r, added));
    while (t->bpe.num_tokens > 0 && !t->bpe.tokens[t->bpe.num_tokens - 1].used) t->bpe.num_tokens--;
    if (t->bpe.num_tokens == 0) return rf_fail(err, RF_ERR_CONFIG, "%s: the vocabulary is empty", name);
    if (rf_json_has(root, "post_processor")) RF_TRY(read_post_processor(&r, rf_json_get(root, "post_processor")));
    return RF_OK;
}

/* A token by the key of tokenizer_config.json: a string, or an added token's object. */
static rf_status config_token(const rf_tokenizer *t, const rf_json *doc, const char *key, int32_t *id, rf_error *err) {
    const rf_json_value *root = rf_json_root(doc), *v = rf_json_get(root, key);
    if (!rf_json_has(root, key)) return RF_OK;
    const char *content = rf_json_string(v);
    if (rf_json_is_object(v)) RF_TRY(rf_json_get_string(doc, v, "content", &content, err));
    if (!content) {
        return rf_fail(err, RF_ERR_CONFIG, "%s: '%s' must be a string or an object with content", rf_json_name(doc),
                       key);
    }
    *id = rf_bpe_find(&t->bpe, content, strlen(content));
    if (*id >= 0) return RF_OK;
    return rf_fail(err, RF_ERR_CONFIG, "%s: %s '%.60s' is not in tokenizer.json", rf_json_name(doc), key, content);
}

rf_status rf_tokenizer_read_config(rf_tokenizer *t, const rf_json *doc, rf_error *err) {
    t->special = (rf_special_ids){-1, -1, -1, -1};
    if (doc) {
        if (!rf_json_is_object(rf_json_root(doc))) {
            return rf_fail(err, RF_ERR_CONFIG, "%s: must be an object", rf_json_name(doc));
        }
        RF_TRY(config_token(t, doc, "bos_token", &t->special.bos, err));
        RF_TRY(config_token(t, doc, "eos_token", &t->special.eos, err));
        RF_TRY(config_token(t, doc, "pad_token", &t->special.pad, err));
        RF_TRY(config_token(t, doc, "mask_token", &t->special.mask, err));
    }
    static const char *const masks[] = {"<|mdm_mask|>", "<|mask|>", "<|MASK|>", "[MASK]"};
    for (size_t i = 0; i < sizeof masks / sizeof *masks && t->special.mask < 0; i++) {
        int32_t id = rf_bpe_find(&t->bpe, masks[i], strlen(masks[i]));
        for (size_t k = 0; id >= 0 && k < t->num_added; k++) {
            if (t->added[k].id == id) t->special.mask = id;
        }
    }
    return RF_OK;
}
