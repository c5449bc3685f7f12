/* dlm/tokenizer_bpe.c - the vocabulary, the merges, and byte pair encoding of one word.
 *
 * Algorithm  Sennrich et al. 2016 with ranked merges as in GPT-2: of all neighbours that have a merge, the one of lowest rank
 *            (leftmost among equals) becomes one token, until none is left. Short words look over all pairs each time; long
 *            ones keep candidates in a heap over a linked list, O(n log n). */
#include <string.h>

#include "core/memory.h"
#include "dlm/tokenizer_internal.h"

#define SHORT_WORD      48  /* bytes; up to here a scan of all pairs beats the heap */
#define MAX_CACHED_WORD 128 /* bytes */
#define MIN_CACHE_BITS  6
#define MAX_CACHE_BITS  15
#define EMPTY_PAIR      UINT64_MAX

/* ---- byte-level letters ---- */

/* Bytes that are printable in Latin-1 stand for themselves, the 68 others for U+0100 and up in their order. */
static bool is_printable(unsigned b) {
    return (b >= 0x21 && b <= 0x7e) || (b >= 0xa1 && b <= 0xac) || b >= 0xae;
}

uint32_t rf_byte_letter(uint8_t byte) {
    unsigned b = byte;
    if (is_printable(b)) return b;
    if (b <= 0x20) return 0x100 + b;
    if (b <= 0xa0) return 0x100 + 33 + (b - 0x7f);
    return 0x100 + 67; /* 0xad */
}

int rf_letter_byte(uint32_t code) {
    if (code < 0x100) return is_printable(code) ? (int)code : -1;
    if (code <= 0x120) return (int)code - 0x100;
    if (code <= 0x142) return (int)code - 0x121 + 0x7f;
    return code == 0x143 ? 0xad : -1;
}

/* ---- the table of tokens ---- */

static uint64_t hash_bytes(const void *bytes, size_t num, uint64_t seed) {
    const uint8_t *p = bytes;
    uint64_t h = seed ^ (num * 0x9e3779b97f4a7c15u), part;
    for (; num >= 8; num -= 8, p += 8) {
        memcpy(&part, p, 8);
        h = (h ^ part) * 0xff51afd7ed558ccdu;
        h ^= h >> 32;
    }
    if (num) {
        part = 0;
        for (size_t i = 0; i < num; i++) part |= (uint64_t)p[i] << (8 * i);
        h = (h ^ part) * 0xff51afd7ed558ccdu;
        h ^= h >> 32;
    }
    h *= 0xc4ceb9fe1a85ec53u;
    return h ^ (h >> 29);
}

static uint64_t hash_content(const void *bytes, size_t num, bool raw) {
    return hash_bytes(bytes, num, raw ? 0x1234567u : 0);
}

/* The smallest power of two that holds `num` at two thirds. */
static uint32_t table_size(size_t num) {
    uint32_t size = 16;
    while (size < num + num / 2 && size < (1u << 30)) size *= 2;
    return size;
}

rf_status rf_bpe_init(rf_bpe *b, int32_t num_ids, size_t num_expected, size_t num_merges, rf_error *err) {
    *b = (rf_bpe){.unk = -1, .num_tokens = num_ids};
    uint32_t slots = table_size(num_expected), merges = table_size(num_merges);
    b->tokens = rf_alloc_zero((size_t)num_ids + 1, sizeof *b->tokens);
    b->slots = rf_alloc_zero(slots, sizeof *b->slots);
    b->merges = rf_alloc(merges * sizeof *b->merges);
    if (!b->tokens || !b->slots || !b->merges) {
        return rf_fail(err, RF_ERR_MEMORY, "no memory for a vocabulary of %d tokens and %zu merges", (int)num_ids,
                       num_merges);
    }
    memset(b->merges, 0xff, merges * sizeof *b->merges);
    b->slot_mask = slots - 1;
    b->merge_mask = merges - 1;
    return RF_OK;
}

void rf_bpe_clear(rf_bpe *b) {
    rf_text_clear(&b->pool);
    rf_free(b->tokens);
    rf_free(b->slots);
    rf_free(b->merges);
    memset(b, 0, sizeof *b);
}

static int32_t find_canonical(const rf_bpe *b, const void *bytes, size_t num, bool raw) {
    uint32_t slot = (uint32_t)hash_content(bytes, num, raw) & b->slot_mask;
    for (; b->slots[slot]; slot = (slot + 1) & b->slot_mask) {
        const rf_token *t = &b->tokens[b->slots[slot] - 1];
        if (t->content_bytes == num && t->raw == raw && memcmp(b->pool.bytes + t->content_at, bytes, num) == 0) {
            return (int32_t)(b->slots[slot] - 1);
        }
    }
    return -1;
}

/* Canonical form of a content: its bytes if every character is a byte-level letter; else false, and the content is raw.
 * bytes has room for num. */
static bool to_bytes(const char *content, size_t num, uint8_t *bytes, size_t *num_out) {
    size_t n = 0;
    const uint8_t *p = (const uint8_t *)content;
    for (size_t i = 0, len; i < num; i += len) {
        int byte = rf_letter_byte(rf_utf8_next(p + i, num - i, &len));
        if (byte < 0) return false;
        bytes[n++] = (uint8_t)byte;
    }
    *num_out = n;
    return true;
}

/* Appends the canonical form to the pool without counting it: at pool.bytes + pool.num. */
static rf_status stage_content(rf_bpe *b, const char *content, size_t num, size_t *num_out, bool *raw, rf_error *err) {
    size_t at = b->pool.num;
    RF_TRY(rf_text_append(&b->pool, content, num, err));
    b->pool.num = at;
    *num_out = num;
    *raw = !to_bytes(content, num, (uint8_t *)b->pool.bytes + at, num_out);
    if (*raw && num) memcpy(b->pool.bytes + at, content, num);
    return RF_OK;
}

int32_t rf_bpe_find(const rf_bpe *b, const char *content, size_t num_bytes) {
    uint8_t bytes[RF_TOKENIZER_MAX_TOKEN];
    size_t num = 0;
    if (num_bytes > sizeof bytes) return -1;
    if (rf_utf8_valid((const uint8_t *)content, num_bytes) != num_bytes) return -1;
    if (to_bytes(content, num_bytes, bytes, &num)) return find_canonical(b, bytes, num, false);
    return find_canonical(b, content, num_bytes, true);
}

rf_status rf_bpe_add_token(rf_bpe *b, const char *content, size_t num_bytes, int32_t id, bool in_model, rf_error *err) {
    size_t num = 0;
    bool raw = false;
    rf_token *t = &b->tokens[id];
    if (t->used) {
        return rf_fail(err, RF_ERR_CONFIG, "id %d belongs to two tokens, the second is '%.60s'", (int)id, content);
    }
    if (num_bytes > RF_TOKENIZER_MAX_TOKEN) {
        return rf_fail(err, RF_ERR_CONFIG, "token %d has %zu bytes, the limit is %d", (int)id, num_bytes,
                       RF_TOKENIZER_MAX_TOKEN);
    }
    RF_TRY(stage_content(b, content, num_bytes, &num, &raw, err));
    const char *staged = b->pool.bytes + b->pool.num;
    uint32_t slot = (uint32_t)hash_content(staged, num, raw) & b->slot_mask;
    for (; b->slots[slot]; slot = (slot + 1) & b->slot_mask) {
        const rf_token *other = &b->tokens[b->slots[slot] - 1];
        if (other->content_bytes == num && other->raw == raw &&
            memcmp(b->pool.bytes + other->content_at, staged, num) == 0) {
            return rf_fail(err, RF_ERR_CONFIG, "token '%.60s' is there twice, with ids %d and %d", content,
                           (int)(b->slots[slot] - 1), (int)id);
        }
    }
    b->slots[slot] = (uint32_t)id + 1;
    *t = (rf_token){.content_at = b->pool.num,
                    .decode_at = b->pool.num,
                    .content_bytes = (uint32_t)num,
                    .decode_bytes = (uint32_t)num,
                    .used = true,
                    .raw = raw,
                    .decode_raw = raw,
                    .in_model = in_model};
    b->pool.num += num;
    return RF_OK;
}

rf_status rf_bpe_set_decoded(rf_bpe *b, int32_t id, const char *text, size_t num_bytes, rf_error *err) {
    size_t num = 0;
    bool raw = false;
    RF_TRY(stage_content(b, text, num_bytes, &num, &raw, err));
    rf_token *t = &b->tokens[id];
    t->decode_at = b->pool.num;
    t->decode_bytes = (uint32_t)num;
    t->decode_raw = raw;
    b->pool.num += num;
    return RF_OK;
}

int32_t rf_bpe_find_decoded(const rf_bpe *b, int32_t id) {
    const rf_token *t = &b->tokens[id];
    return find_canonical(b, b->pool.bytes + t->decode_at, t->decode_bytes, t->decode_raw);
}

/* ---- merges ---- */

static uint64_t pair_of(int32_t left, int32_t right) {
    return ((uint64_t)(uint32_t)left << 32) | (uint32_t)right;
}

static uint32_t pair_slot(const rf_bpe *b, uint64_t pair) {
    uint64_t h = pair * 0x9e3779b97f4a7c15u;
    return (uint32_t)(h >> 32) & b->merge_mask;
}

/* NULL if the two do not merge. */
static const rf_merge *find_merge(const rf_bpe *b, int32_t left, int32_t right) {
    uint64_t pair = pair_of(left, right);
    for (uint32_t slot = pair_slot(b, pair);; slot = (slot + 1) & b->merge_mask) {
        const rf_merge *m = &b->merges[slot];
        if (m->pair == pair) return m;
        if (m->pair == EMPTY_PAIR) return NULL;
    }
}

static rf_status need_token(const rf_bpe *b, const char *content, size_t num, uint32_t rank, int32_t *id,
                            rf_error *err) {
    *id = rf_bpe_find(b, content, num);
    if (*id >= 0) return RF_OK;
    return rf_fail(err, RF_ERR_CONFIG, "merge %u needs the token '%.*s', which the vocabulary does not have",
                   (unsigned)rank, (int)(num < 60 ? num : 60), content);
}

rf_status rf_bpe_add_merge(rf_bpe *b, const char *left, size_t left_bytes, const char *right, size_t right_bytes,
                           uint32_t rank, rf_error *err) {
    int32_t a, c, id;
    RF_TRY(need_token(b, left, left_bytes, rank, &a, err));
    RF_TRY(need_token(b, right, right_bytes, rank, &c, err));
    size_t at = b->pool.num;
    RF_TRY(rf_text_append(&b->pool, left, left_bytes, err));
    rf_status st = rf_text_append(&b->pool, right, right_bytes, err);
    if (st == RF_OK) st = need_token(b, b->pool.bytes + at, left_bytes + right_bytes, rank, &id, err);
    b->pool.num = at;
    if (st != RF_OK) return st;
    uint64_t pair = pair_of(a, c);
    uint32_t slot = pair_slot(b, pair);
    while (b->merges[slot].pair != EMPTY_PAIR && b->merges[slot].pair != pair) slot = (slot + 1) & b->merge_mask;
    b->merges[slot] = (rf_merge){.pair = pair, .rank = rank, .id = id}; /* the last of equal pairs counts */
    return RF_OK;
}

void rf_bpe_finish(rf_bpe *b) {
    for (int i = 0; i < 256; i++) {
        uint8_t byte = (uint8_t)i;
        int32_t id = find_canonical(b, &byte, 1, false);
        b->byte_ids[i] = id >= 0 && b->tokens[id].in_model ? id : -1;
    }
}

/* ---- encoding a word ---- */

typedef struct rf_word_entry {
    const uint8_t *word;
    uint32_t num_bytes, num_ids;
    size_t at; /* its ids in the output */
} rf_word_entry;

typedef struct rf_symbol {
    int32_t id; /* -1: merged into the one before */
    int32_t prev, next;
} rf_symbol;

typedef struct rf_candidate {
    uint64_t order; /* rank << 32 | position */
    int32_t id;     /* of the merged token, to tell a candidate that is out of date */
} rf_candidate;

rf_status rf_bpe_run_init(rf_bpe_run *run, const rf_bpe *b, size_t text_bytes, rf_token_ids *out, rf_error *err) {
    *run = (rf_bpe_run){.bpe = b, .out = out};
    int bits = MIN_CACHE_BITS;
    while (bits < MAX_CACHE_BITS && ((size_t)4 << bits) < text_bytes) bits++;
    run->cache = rf_alloc_zero((size_t)1 << bits, sizeof *run->cache);
    if (!run->cache) return rf_fail(err, RF_ERR_MEMORY, "no memory to encode %zu bytes of text", text_bytes);
    run->cache_mask = ((size_t)1 << bits) - 1;
    return RF_OK;
}

void rf_bpe_run_clear(rf_bpe_run *run) {
    rf_free(run->cache);
    rf_free(run->symbols);
    rf_free(run->heap);
    memset(run, 0, sizeof *run);
}

/* The tokens that a word starts from, at most num; without an unknown token, bytes that have none are left out. */
static size_t first_tokens(const rf_bpe *b, const uint8_t *word, size_t num, int32_t *ids, bool *unk) {
    size_t n = 0;
    bool last_unk = false;
    *unk = false;
    for (size_t i = 0; i < num; i++) {
        int32_t id = b->byte_ids[word[i]];
        bool is_unk = id < 0;
        if (is_unk) {
            if (b->unk < 0 || (b->fuse_unk && last_unk)) continue;
            id = b->unk;
            *unk = true;
        }
        last_unk = is_unk;
        ids[n++] = id;
    }
    return n;
}

static size_t merge_short(const rf_bpe *b, int32_t *ids, size_t num) {
    uint32_t ranks[SHORT_WORD];
    int32_t merged[SHORT_WORD];
    const rf_merge *m;
#define LOOK(i)                                                                                                        \
    (m = find_merge(b, ids[i], ids[(i) + 1]), ranks[i] = m ? m->rank : UINT32_MAX, merged[i] = m ? m->id : -1)
    for (size_t i = 0; i + 1 < num; i++) LOOK(i);
    while (num > 1) {
        size_t best = 0;
        for (size_t i = 1; i + 1 < num; i++) best = ranks[i] < ranks[best] ? i : best;
        if (ranks[best] == UINT32_MAX) break;
        ids[best] = merged[best];
        size_t behind = num - best - 2;
        memmove(ids + best + 1, ids + best + 2, behind * sizeof *ids);
        if (behind) {
            memmove(ranks + best + 1, ranks + best + 2, (behind - 1) * sizeof *ranks);
            memmove(merged + best + 1, merged + best + 2, (behind - 1) * sizeof *merged);
        }
        num--;
        if (best + 1 < num) LOOK(best);
        if (best > 0) LOOK(best - 1);
    }
#undef LOOK
    return num;
}

static void heap_push(rf_candidate *heap, size_t *num, rf_candidate c) {
    size_t i = (*num)++;
    for (; i > 0 && heap[(i - 1) / 2].order > c.order; i = (i - 1) / 2) heap[i] = heap[(i - 1) / 2];
    heap[i] = c;
}

static rf_candidate heap_pop(rf_candidate *heap, size_t *num) {
    rf_candidate top = heap[0], last = heap[--*num];
    size_t i = 0;
    for (;;) {
        size_t child = 2 * i + 1;
        if (child >= *num) break;
        if (child + 1 < *num && heap[child + 1].order < heap[child].order) child++;
        if (heap[child].order >= last.order) break;
        heap[i] = heap[child];
        i = child;
    }
    if (*num) heap[i] = last;
    return top;
}

static void push_pair(const rf_bpe *b, const rf_symbol *symbols, int32_t at, rf_candidate *heap, size_t *num) {
    int32_t next = symbols[at].next;
    if (next < 0) return;
    const rf_merge *m = find_merge(b, symbols[at].id, symbols[next].id);
    if (m) heap_push(heap, num, (rf_candidate){((uint64_t)m->rank << 32) | (uint32_t)at, m->id});
}

static rf_status merge_long(rf_bpe_run *run, const uint8_t *word, size_t num, rf_error *err) {
    const rf_bpe *b = run->bpe;
    if (num > INT32_MAX / 2) return rf_fail(err, RF_ERR_ARGUMENT, "a word of %zu bytes is too long to encode", num);
    if (run->capacity < num) {
        size_t capacity = 2 * run->capacity > num ? 2 * run->capacity : num;
        rf_free(run->symbols);
        rf_free(run->heap);
        run->symbols = rf_alloc(capacity * sizeof *run->symbols);
        run->heap = rf_alloc(2 * capacity * sizeof *run->heap); /* a merge takes one out and puts at most two in */
        run->capacity = run->symbols && run->heap ? capacity : 0;
        if (!run->capacity) return rf_fail(err, RF_ERR_MEMORY, "no memory to encode a word of %zu bytes", num);
    }
    rf_symbol *symbols = run->symbols;
    rf_candidate *heap = run->heap;
    size_t num_heap = 0;
    bool unk;
    int32_t *first = (int32_t *)heap; /* read out before the heap is used */
    size_t n = first_tokens(b, word, num, first, &unk);
    for (size_t i = 0; i < n; i++) {
        symbols[i] = (rf_symbol){first[i], (int32_t)i - 1, i + 1 < n ? (int32_t)i + 1 : -1};
    }
    for (size_t i = 0; i + 1 < n; i++) push_pair(b, symbols, (int32_t)i, heap, &num_heap);
    while (num_heap) {
        rf_candidate top = heap_pop(heap, &num_heap);
        int32_t at = (int32_t)(uint32_t)top.order, next = symbols[at].next;
        if (symbols[at].id < 0 || next < 0) continue;
        const rf_merge *m = find_merge(b, symbols[at].id, symbols[next].id);
        if (!m || m->id != top.id) continue;
        symbols[at].id = top.id;
        symbols[at].next = symbols[next].next;
        symbols[next].id = -1;
        if (symbols[at].next >= 0) symbols[symbols[at].next].prev = at;
        if (symbols[at].prev >= 0) push_pair(b, symbols, symbols[at].prev, heap, &num_heap);
        push_pair(b, symbols, at, heap, &num_heap);
    }
    int32_t ids[256];
    size_t num_ids = 0;
    for (size_t i = 0; i < n; i++) {
        if (symbols[i].id >= 0) ids[num_ids++] = symbols[i].id;
        if (num_ids == 256 || (i + 1 == n && num_ids)) {
            RF_TRY(rf_token_ids_append(run->out, ids, num_ids, err));
            num_ids = 0;
        }
    }
    return RF_OK;
}

rf_status rf_bpe_word(rf_bpe_run *run, const uint8_t *word, size_t num, rf_error *err) {
    const rf_bpe *b = run->bpe;
    if (num == 1 && b->byte_ids[word[0]] >= 0) return rf_token_ids_append(run->out, &b->byte_ids[word[0]], 1, err);
    rf_word_entry *entry = NULL;
    if (num <= MAX_CACHED_WORD) {
        entry = &run->cache[hash_bytes(word, num, 0) & run->cache_mask];
        if (entry->num_bytes == num && memcmp(entry->word, word, num) == 0) {
            rf_token_ids *out = run->out;
            if (out->capacity - out->num >= entry->num_ids) {
                for (uint32_t i = 0; i < entry->num_ids; i++) out->ids[out->num + i] = out->ids[entry->at + i];
                out->num += entry->num_ids;
                return RF_OK;
            }
            int32_t ids[MAX_CACHED_WORD];
            memcpy(ids, out->ids + entry->at, entry->num_ids * sizeof *ids);
            return rf_token_ids_append(out, ids, entry->num_ids, err);
        }
    }
    size_t at = run->out->num;
    int32_t whole = b->ignore_merges ? find_canonical(b, word, num, false) : -1;
    if (whole >= 0 && b->tokens[whole].in_model) {
        RF_TRY(rf_token_ids_append(run->out, &whole, 1, err));
    } else if (num <= SHORT_WORD) {
        int32_t ids[SHORT_WORD];
        bool unk;
        size_t n = first_tokens(b, word, num, ids, &unk);
        if (unk) { /* the heap's order is the library's where one id stands for different text */
            RF_TRY(merge_long(run, word, num, err));
        } else {
            RF_TRY(rf_token_ids_append(run->out, ids, merge_short(b, ids, n), err));
        }
    } else {
        RF_TRY(merge_long(run, word, num, err));
    }
    if (entry) {
        *entry = (rf_word_entry){word, (uint32_t)num, (uint32_t)(run->out->num - at), at};
    }
    return RF_OK;
}
