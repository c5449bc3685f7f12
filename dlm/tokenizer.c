/* dlm/tokenizer.c - opening, encoding (added tokens, normalization, words) and decoding. */
#include "dlm/tokenizer.h"

#include <string.h>

#include "core/file.h"
#include "core/memory.h"
#include "dlm/tokenizer_internal.h"

static const char replacement[] = "\xef\xbf\xbd"; /* U+FFFD */

/* ---- growable outputs ---- */

/* A capacity of at least num + more, doubling; 0 if that overflows. */
static size_t grown(size_t num, size_t more, size_t capacity, size_t elem_bytes) {
    if (more > SIZE_MAX / elem_bytes / 4 - num) return 0;
    size_t wanted = num + more, doubled = capacity * 2;
    return wanted > doubled ? wanted + 16 : doubled;
}

rf_status rf_token_ids_append(rf_token_ids *ids, const int32_t *more, size_t num, rf_error *err) {
    if (ids->capacity - ids->num < num) {
        size_t capacity = grown(ids->num, num, ids->capacity, sizeof *ids->ids);
        int32_t *p = capacity ? rf_realloc(ids->ids, capacity * sizeof *p) : NULL;
        if (!p) return rf_fail(err, RF_ERR_MEMORY, "no memory for %zu token ids", ids->num + num);
        ids->ids = p;
        ids->capacity = capacity;
    }
    if (num) memcpy(ids->ids + ids->num, more, num * sizeof *more);
    ids->num += num;
    return RF_OK;
}

rf_status rf_text_append(rf_text *text, const void *more, size_t num_bytes, rf_error *err) {
    if (!text->bytes || text->capacity - text->num <= num_bytes) {
        size_t capacity = grown(text->num, num_bytes + 1, text->capacity, 1);
        char *p = capacity ? rf_realloc(text->bytes, capacity) : NULL;
        if (!p) return rf_fail(err, RF_ERR_MEMORY, "no memory for %zu bytes of text", text->num + num_bytes);
        text->bytes = p;
        text->capacity = capacity;
    }
    if (num_bytes) memcpy(text->bytes + text->num, more, num_bytes);
    text->num += num_bytes;
    text->bytes[text->num] = 0;
    return RF_OK;
}

void rf_token_ids_clear(rf_token_ids *ids) {
    rf_free(ids->ids);
    *ids = (rf_token_ids){0};
}

void rf_text_clear(rf_text *text) {
    rf_free(text->bytes);
    *text = (rf_text){0};
}

/* ---- open and close ---- */

static rf_status build(rf_tokenizer **out, const rf_json *tokenizer, const rf_json *config, rf_error *err) {
    rf_tokenizer *t = rf_alloc_zero(1, sizeof *t);
    if (!t) return rf_fail(err, RF_ERR_MEMORY, "%s: no memory", rf_json_name(tokenizer));
    memset(t->plain.first, 0xff, sizeof t->plain.first);
    memset(t->normalized.first, 0xff, sizeof t->normalized.first);
    rf_status st = rf_tokenizer_read(t, tokenizer, err);
    if (st == RF_OK) st = rf_tokenizer_read_config(t, config, err);
    if (st != RF_OK) {
        rf_tokenizer_close(t);
        return st;
    }
    *out = t;
    return RF_OK;
}

rf_status rf_tokenizer_parse(rf_tokenizer **out, const char *tokenizer_json, size_t tokenizer_bytes, const char *config,
                             size_t config_bytes, rf_error *err) {
    *out = NULL;
    rf_json *tokenizer_doc = NULL, *config_doc = NULL;
    rf_status st = rf_json_parse(&tokenizer_doc, tokenizer_json, tokenizer_bytes, "tokenizer.json", err);
    if (st == RF_OK && config) st = rf_json_parse(&config_doc, config, config_bytes, "tokenizer_config.json", err);
    if (st == RF_OK) st = build(out, tokenizer_doc, config_doc, err);
    rf_json_close(tokenizer_doc);
    rf_json_close(config_doc);
    return st;
}

rf_status rf_tokenizer_open(rf_tokenizer **out, const char *folder, rf_error *err) {
    *out = NULL;
    rf_json *tokenizer_doc = NULL, *config_doc = NULL;
    char *tokenizer_path = rf_path_join(folder, "tokenizer.json");
    char *config_path = rf_path_join(folder, "tokenizer_config.json");
    rf_status st = RF_OK;
    if (!tokenizer_path || !config_path) {
        st = rf_fail(err, RF_ERR_MEMORY, "%s: no memory", folder);
    } else if (!rf_path_exists(tokenizer_path)) {
        st = rf_fail(err, RF_ERR_MISSING, "%s: no tokenizer.json in this folder", folder);
    }
    if (st == RF_OK) st = rf_json_open(&tokenizer_doc, tokenizer_path, err);
    if (st == RF_OK && rf_path_exists(config_path)) st = rf_json_open(&config_doc, config_path, err);
    if (st == RF_OK) st = build(out, tokenizer_doc, config_doc, err);
    rf_json_close(tokenizer_doc);
    rf_json_close(config_doc);
    rf_free(tokenizer_path);
    rf_free(config_path);
    return st;
}

void rf_tokenizer_close(rf_tokenizer *t) {
    if (!t) return;
    rf_bpe_clear(&t->bpe);
    rf_free(t->added);
    rf_free(t->plain.nodes);
    rf_free(t->normalized.nodes);
    for (int i = 0; i < t->num_stages; i++) rf_split_stage_clear(&t->stages[i]);
    rf_token_ids_clear(&t->prefix);
    rf_token_ids_clear(&t->suffix);
    rf_free(t);
}

/* ---- added tokens ---- */

static int32_t trie_child(const rf_trie *trie, int32_t node, uint8_t byte) {
    if (node < 0) return trie->first[byte];
    int32_t child = trie->nodes[node].child;
    while (child >= 0 && trie->nodes[child].byte != byte) child = trie->nodes[child].sibling;
    return child;
}

rf_status rf_trie_add(rf_trie *trie, const uint8_t *text, size_t num, int32_t token, rf_error *err) {
    int32_t node = -1;
    for (size_t i = 0; i < num; i++) {
        int32_t child = trie_child(trie, node, text[i]);
        if (child < 0) {
            if (trie->num == trie->capacity) {
                size_t capacity = trie->capacity * 2 + 64;
                rf_trie_node *nodes = capacity > INT32_MAX ? NULL : rf_realloc(trie->nodes, capacity * sizeof *nodes);
                if (!nodes) return rf_fail(err, RF_ERR_MEMORY, "no memory for %zu letters of added tokens", capacity);
                trie->nodes = nodes;
                trie->capacity = capacity;
            }
            child = (int32_t)trie->num++;
            int32_t *head = node < 0 ? &trie->first[text[i]] : &trie->nodes[node].child;
            trie->nodes[child] = (rf_trie_node){.child = -1, .sibling = *head, .token = -1, .byte = text[i]};
            *head = child;
        }
        node = child;
    }
    if (node < 0 || trie->nodes[node].token >= 0) {
        return rf_fail(err, RF_ERR_CONFIG, "added tokens: '%.*s' is the text of two tokens", (int)(num < 60 ? num : 60),
                       (const char *)text);
    }
    trie->nodes[node].token = token;
    return RF_OK;
}

/* The longest added token at the first place from *at on that has one: its index and [*at, *end); -1 if there is none. */
static int32_t next_added(const rf_trie *trie, const uint8_t *text, size_t num, size_t *at, size_t *end) {
    for (; *at < num; ++*at) {
        if (trie->first[text[*at]] < 0) continue;
        int32_t node = -1, found = -1;
        for (size_t i = *at; i < num; i++) {
            node = trie_child(trie, node, text[i]);
            if (node < 0) break;
            if (trie->nodes[node].token >= 0) {
                found = trie->nodes[node].token;
                *end = i + 1;
            }
        }
        if (found >= 0) return found;
    }
    return -1;
}

/* ---- encode ---- */

typedef struct {
    const rf_tokenizer *t;
    bool parse_special;
    void *match_data;
    rf_text_block *blocks;
    rf_bpe_run bpe;
    rf_error *err;
} encode_run;

static rf_status encode_piece(encode_run *r, int level, const uint8_t *text, size_t num);

/* Cuts text at its added tokens, as the library does: see add_tokens' flags in its documentation. A token may take the
 * spaces that the one before took already (rstrip, then lstrip); then it is empty and gives no id. */
static rf_status encode_with_added(encode_run *r, const rf_trie *trie, int level, const uint8_t *text, size_t num) {
    size_t done = 0, at = 0, end = 0;
    size_t spaces_from = 0, spaces_end = 0; /* a run of spaces that was walked already */
    for (int32_t index; (index = next_added(trie, text, num, &at, &end)) >= 0; at = end) {
        const rf_added_token *a = &r->t->added[index];
        size_t start = at, stop = end, len;
        if (a->special && !r->parse_special) continue;
        if (a->single_word) {
            len = start ? rf_utf8_last_len(text, start) : 0;
            if (start && rf_is_word(rf_utf8_next(text + start - len, len, &len))) continue;
            if (stop < num && rf_is_word(rf_utf8_next(text + stop, num - stop, &len))) continue;
        }
        if (a->lstrip) {
            while (start > done) {
                len = rf_utf8_last_len(text, start);
                if (!rf_is_space(rf_utf8_next(text + start - len, len, &len))) break;
                start -= len;
            }
            if (start < done) start = done;
        }
        if (a->rstrip && stop >= spaces_from && stop < spaces_end) {
            stop = spaces_end;
        } else if (a->rstrip) {
            spaces_from = stop;
            while (stop < num && rf_is_space(rf_utf8_next(text + stop, num - stop, &len))) stop += len;
            spaces_end = stop;
        }
        if (done < start) RF_TRY(encode_piece(r, level + 1, text + done, start - done));
        if (start < stop) RF_TRY(rf_token_ids_append(r->bpe.out, &a->id, 1, r->err));
        done = stop;
    }
    return done < num ? encode_piece(r, level + 1, text + done, num - done) : RF_OK;
}

/* Levels: 0 the text as given, 1 between plain added tokens, 2 between normalized ones. */
static rf_status encode_piece(encode_run *r, int level, const uint8_t *text, size_t num) {
    const rf_tokenizer *t = r->t;
    if (level == 0) return encode_with_added(r, &t->plain, 0, text, num);
    if (level == 2) {
        return rf_split_run(t->stages, t->num_stages, text, num, r->match_data, &r->blocks, &r->bpe, r->err);
    }
    if (t->nfc) {
        rf_text composed = {0}, *kept = NULL;
        bool changed;
        rf_status st = rf_nfc(text, num, &composed, &changed, r->err);
        if (st == RF_OK && changed) st = rf_text_block_add(&r->blocks, &kept, r->err);
        if (st != RF_OK) {
            rf_text_clear(&composed);
            return st;
        }
        if (changed) {
            *kept = composed;
            text = (const uint8_t *)kept->bytes;
            num = kept->num;
        }
    }
    return encode_with_added(r, &t->normalized, 1, text, num);
}

/* Appends valid UTF-8 in place of text. With `cut`, stops before an unfinished sequence at the end; *num_cut is its length. */
static rf_status append_valid(rf_text *out, const uint8_t *text, size_t num, size_t *num_cut, rf_error *err) {
    size_t at = 0;
    if (num_cut) *num_cut = 0;
    while (at < num) {
        size_t good = rf_utf8_valid(text + at, num - at);
        RF_TRY(rf_text_append(out, text + at, good, err));
        at += good;
        if (at == num) break;
        bool cut;
        size_t broken = rf_utf8_broken(text + at, num - at, &cut);
        if (cut && num_cut) {
            *num_cut = broken;
            break;
        }
        RF_TRY(rf_text_append(out, replacement, sizeof replacement - 1, err));
        at += broken;
    }
    return RF_OK;
}

static rf_status encode_text(encode_run *r, const uint8_t *text, size_t num) {
    if (num == 0) return RF_OK;
    if (rf_utf8_valid(text, num) != num) {
        rf_text *copy = NULL;
        RF_TRY(rf_text_block_add(&r->blocks, &copy, r->err));
        RF_TRY(append_valid(copy, text, num, NULL, r->err));
        text = (const uint8_t *)copy->bytes;
        num = copy->num;
    }
    return encode_piece(r, 0, text, num);
}

rf_status rf_tokenizer_encode(const rf_tokenizer *t, const char *text, size_t num_bytes, bool add_special_tokens,
                              bool parse_special, rf_token_ids *out, rf_error *err) {
    encode_run r = {.t = t, .parse_special = parse_special, .err = err};
    size_t num_before = out->num;
    rf_status st = rf_bpe_run_init(&r.bpe, &t->bpe, num_bytes, out, err);
    if (st == RF_OK) {
        r.match_data = rf_split_match_data();
        if (!r.match_data) st = rf_fail(err, RF_ERR_MEMORY, "no memory to encode %zu bytes of text", num_bytes);
    }
    if (st == RF_OK && add_special_tokens) st = rf_token_ids_append(out, t->prefix.ids, t->prefix.num, err);
    if (st == RF_OK) st = encode_text(&r, (const uint8_t *)text, num_bytes);
    if (st == RF_OK && add_special_tokens) st = rf_token_ids_append(out, t->suffix.ids, t->suffix.num, err);
    rf_bpe_run_clear(&r.bpe);
    rf_split_match_data_free(r.match_data);
    rf_text_blocks_clear(r.blocks);
    if (st != RF_OK) out->num = num_before;
    return st;
}

/* ---- decode ---- */

static const rf_token *token_of(const rf_tokenizer *t, int32_t id) {
    if (id < 0 || id >= t->bpe.num_tokens || !t->bpe.tokens[id].used) return NULL;
    return &t->bpe.tokens[id];
}

rf_status rf_tokenizer_decode(const rf_tokenizer *t, const int32_t *ids, size_t num, bool skip_special, rf_text *out,
                              rf_error *err) {
    size_t num_before = out->num;
    RF_TRY(rf_text_append(out, NULL, 0, err));
    for (size_t i = 0; i < num; i++) {
        const rf_token *token = token_of(t, ids[i]);
        if (!token || (skip_special && token->skipped)) continue;
        rf_status st = rf_text_append(out, t->bpe.pool.bytes + token->decode_at, token->decode_bytes, err);
        if (st != RF_OK) {
            out->num = num_before;
            out->bytes[num_before] = 0;
            return st;
        }
    }
    return RF_OK;
}

rf_token_stream rf_token_stream_start(const rf_tokenizer *t, bool skip_special) {
    return (rf_token_stream){.tokenizer = t, .skip_special = skip_special};
}

rf_status rf_token_stream_push(rf_token_stream *s, int32_t id, rf_text *out, rf_error *err) {
    const rf_token *token = token_of(s->tokenizer, id);
    if (!token || (s->skip_special && token->skipped) || token->decode_bytes == 0)
        return rf_text_append(out, NULL, 0, err);
    rf_text joined = {0};
    size_t num_before = out->num, num_cut = 0;
    rf_status st = rf_text_append(&joined, s->pending, (size_t)s->num_pending, err);
    if (st == RF_OK) {
        st = rf_text_append(&joined, s->tokenizer->bpe.pool.bytes + token->decode_at, token->decode_bytes, err);
    }
    if (st == RF_OK) st = rf_text_append(out, NULL, 0, err);
    if (st == RF_OK) {
        st = append_valid(out, (const uint8_t *)joined.bytes, joined.num, &num_cut, err);
        if (st == RF_OK) {
            s->num_pending = (int)num_cut; /* at most 3 */
            memcpy(s->pending, joined.bytes + joined.num - num_cut, num_cut);
        } else {
            out->num = num_before;
            out->bytes[num_before] = 0;
        }
    }
    rf_text_clear(&joined);
    return st;
}

rf_status rf_token_stream_finish(rf_token_stream *s, rf_text *out, rf_error *err) {
    RF_TRY(rf_text_append(out, replacement, s->num_pending ? sizeof replacement - 1 : 0, err));
    s->num_pending = 0;
    return RF_OK;
}

/* ---- getters ---- */

int32_t rf_tokenizer_vocab_size(const rf_tokenizer *t) {
    return t->bpe.num_tokens;
}

int32_t rf_tokenizer_token_id(const rf_tokenizer *t, const char *content, size_t num_bytes) {
    return rf_bpe_find(&t->bpe, content, num_bytes);
}

const char *rf_tokenizer_token_bytes(const rf_tokenizer *t, int32_t id, size_t *num_bytes) {
    const rf_token *token = token_of(t, id);
    *num_bytes = token ? token->decode_bytes : 0;
    return token ? t->bpe.pool.bytes + token->decode_at : NULL;
}

bool rf_tokenizer_is_special(const rf_tokenizer *t, int32_t id) {
    const rf_token *token = token_of(t, id);
    return token && token->special;
}

rf_special_ids rf_tokenizer_special_ids(const rf_tokenizer *t) {
    return t->special;
}
