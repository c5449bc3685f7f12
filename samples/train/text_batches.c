/* samples/train/text_batches.c - training batches of the text models: task samples, tokenized and packed into rows.
 *
 * Loaded by train_text.py, together with ../tasks. Samples stand side by side in rows of fixed length, and what is left of a
 * row is filled with a piece of the corpus, so that no token is padding; `doc`, `pos` and `branch` say what may see what.
 * The tokenizer is the byte-level BPE of text_tokenizer.py, for ASCII text. */
#include "../tasks/tasks.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define MAX_PAIRS (1 << 13) /* of the merge table, a power of two */
#define MAX_WORD  4096
#define MAX_TASKS 64
#define PENDING   8

enum { KIND_PROMPT, KIND_ANSWER, KIND_FILL, KIND_TEXT }; /* of a token; FILL: end-of-text after the first */
enum { LAYOUT_AR, LAYOUT_SLOT, LAYOUT_BLOCK };           /* what follows an answer, see add_end */

typedef struct {
    uint32_t pair[MAX_PAIRS]; /* left << 16 | right, + 1; 0 = empty */
    int32_t rank[MAX_PAIRS];
    uint16_t merged[MAX_PAIRS], byte_id[256];
} bpe;

typedef struct {
    double weight[MAX_TASKS]; /* of a sample of the task */
    int32_t size_low[MAX_TASKS], size_high[MAX_TASKS], length_low[MAX_TASKS], length_high[MAX_TASKS];
    int32_t layout, block, branches, eos, text_low, text_high, max_doc;
    double fill_weight, aware_part;
} mixture;

typedef struct {
    bpe table;
    uint16_t *corpus; /* tokens */
    int64_t corpus_len;
} source;

int source_size(void) {
    return (int)sizeof(source);
}
int mixture_size(void) {
    return (int)sizeof(mixture);
}

static uint32_t slot_of(const bpe *b, uint32_t pair) {
    uint32_t at = pair * 2654435761u >> 19 & (MAX_PAIRS - 1);
    while (b->pair[at] && b->pair[at] != pair + 1) at = (at + 1) & (MAX_PAIRS - 1);
    return at;
}

/* One piece: the pair of lowest rank is merged first, leftmost first. */
static int encode_piece(const bpe *b, const char *s, int n, uint16_t *out) {
    for (int i = 0; i < n; i++) out[i] = b->byte_id[(unsigned char)s[i]];
    while (n > 1) {
        int best = -1, best_rank = 0x7fffffff;
        uint16_t id = 0;
        for (int i = 0; i + 1 < n; i++) {
            uint32_t at = slot_of(b, (uint32_t)out[i] << 16 | out[i + 1]);
            if (b->pair[at] && b->rank[at] < best_rank) {
                best = i;
                best_rank = b->rank[at];
                id = b->merged[at];
            }
        }
        if (best < 0) break;
        out[best] = id;
        memmove(out + best + 1, out + best + 2, (size_t)(n - best - 2) * sizeof *out);
        n--;
    }
    return n;
}

static bool is_letter(int c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z');
}
static bool is_digit(int c) {
    return c >= '0' && c <= '9';
}
static bool is_space(int c) {
    return c == ' ' || (c >= 9 && c <= 13);
}
static bool is_mark(int c) {
    return c != 0 && !is_letter(c) && !is_digit(c) && !is_space(c);
}

/* Length of the first piece of ASCII text under Qwen2's pattern. s[n] must be readable and 0. */
static int64_t piece_len(const char *s, int64_t n) {
    int64_t i = 0;
    if (s[0] == '\'' && n > 1) {
        int a = s[1] | 32, b = n > 2 ? s[2] | 32 : 0;
        if ((a == 'r' && b == 'e') || (a == 'v' && b == 'e') || (a == 'l' && b == 'l')) return 3;
        if (a == 's' || a == 't' || a == 'm' || a == 'd') return 2;
    }
    if (is_letter(s[0]) || (!is_digit(s[0]) && s[0] != '\r' && s[0] != '\n' && n > 1 && is_letter(s[1]))) {
        for (i = 1; i < n && is_letter(s[i]); i++) {
        }
        return i;
    }
    if (is_digit(s[0])) return 1;
    i = s[0] == ' ';
    if (i < n && is_mark(s[i])) {
        while (i < n && is_mark(s[i])) i++;
        while (i < n && (s[i] == '\r' || s[i] == '\n')) i++;
        return i;
    }
    int64_t newline = 0;
    for (i = 0; i < n && is_space(s[i]); i++)
        if (s[i] == '\r' || s[i] == '\n') newline = i + 1;
    if (newline) return newline;
    return i == n || i < 2 ? (i > 0 ? i : 1) : i - 1;
}

/* Tokens of s[n], 0-terminated ASCII; out holds n. Returns their number. */
int64_t text_encode(const source *src, const char *s, int64_t n, uint16_t *out) {
    int64_t num = 0;
    while (n > 0) {
        int64_t len = piece_len(s, n);
        if (len > MAX_WORD) len = MAX_WORD;
        num += encode_piece(&src->table, s, (int)len, out + num);
        s += len;
        n -= len;
    }
    return num;
}

/* merges [num][3]: left, right, merged, in order of rank; byte_id [256]. */
int source_init(source *src, const int32_t *merges, int num, const int32_t *byte_id, uint16_t *corpus,
                int64_t corpus_len) {
    memset(src, 0, sizeof *src);
    if (num > MAX_PAIRS / 2) return -1;
    for (int i = 0; i < 256; i++) src->table.byte_id[i] = (uint16_t)byte_id[i];
    for (int i = 0; i < num; i++) {
        uint32_t pair = (uint32_t)merges[3 * i] << 16 | (uint32_t)merges[3 * i + 1], at = slot_of(&src->table, pair);
        src->table.pair[at] = pair + 1;
        src->table.rank[at] = i;
        src->table.merged[at] = (uint16_t)merges[3 * i + 2];
    }
    src->corpus = corpus;
    src->corpus_len = corpus_len;
    return 0;
}

/* ---- samples ------------------------------------------------------------------------------------------------------ */

#define MAX_TOKENS (TASK_MAX_PROMPT + 2 * TASK_MAX_ANSWER)

typedef struct {
    int len, task;
    uint16_t id[4096];
    int16_t pos[4096];
    uint8_t kind[4096], branch[4096];
} sample;

typedef struct {
    const source *src;
    const mixture *mix;
    uint64_t state;
    char prompt[TASK_MAX_PROMPT], answer[TASK_MAX_ANSWER];
    uint16_t tokens[16][MAX_TOKENS];
    sample made, pending[PENDING];
    int num_pending, text_task;
} worker;

static uint64_t next_bits(worker *w) { /* xorshift64* */
    w->state ^= w->state >> 12;
    w->state ^= w->state << 25;
    w->state ^= w->state >> 27;
    return w->state * 2685821657736338717u;
}
static int draw(worker *w, int num) {
    return num <= 1 ? 0 : (int)(((next_bits(w) >> 32) * (uint64_t)num) >> 32);
}
static double draw_unit(worker *w) {
    return (double)(next_bits(w) >> 11) * 0x1p-53;
}
static int draw_range(worker *w, int low, int high) {
    return low + draw(w, high - low + 1);
}

static bool put(sample *s, int id, int pos, int kind, int branch, int limit) {
    if (s->len >= limit) return false;
    s->id[s->len] = (uint16_t)id;
    s->pos[s->len] = (int16_t)pos;
    s->kind[s->len] = (uint8_t)kind;
    s->branch[s->len++] = (uint8_t)branch;
    return true;
}

/* End-of-text after an answer, once (AR), to the end of a slot whose length is drawn (SLOT: a few tokens more, a multiple of
 * 32, or a long slot), or to the end of the block and at times one more (BLOCK). */
static bool add_end(worker *w, sample *s, int answer_begin, int limit) {
    int pos = s->len, extra = 0, answer = s->len + 1 - answer_begin;
    if (!put(s, w->mix->eos, pos, KIND_ANSWER, 0, limit)) return false;
    if (w->mix->layout == LAYOUT_SLOT) {
        double u = draw_unit(w);
        if (u < 0.5)
            extra = draw(w, 17);
        else if (u < 0.8)
            extra = (32 - answer % 32) % 32 + (draw(w, 4) == 0 ? 32 * draw_range(w, 1, 3) : 0);
        else if (u < 0.95)
            extra = draw(w, 65);
        else
            extra = draw(w, 257);
    } else if (w->mix->layout == LAYOUT_BLOCK) {
        int block = w->mix->block;
        extra = (block - s->len % block) % block + (draw(w, 4) == 0 ? block : 0);
    }
    for (int i = 0; i < extra; i++)
        if (!put(s, w->mix->eos, s->len, KIND_FILL, 0, limit)) break;
    return true;
}

static void text_piece(worker *w, sample *s, int len) {
    int64_t places = w->src->corpus_len - len;
    int64_t at = (int64_t)(draw_unit(w) * (double)(places > 0 ? places : 1));
    if (len > 4096) len = 4096;
    s->len = 0;
    s->task = w->text_task;
    for (int i = 0; i < len && at + i < w->src->corpus_len; i++) put(s, w->src->corpus[at + i], i, KIND_TEXT, 0, 4096);
}

static int draw_task(worker *w) {
    double total = 0.0, u;
    for (int i = 0; i < task_count(); i++) total += w->mix->weight[i];
    u = draw_unit(w) * total;
    for (int i = 0; i < task_count(); i++)
        if ((u -= w->mix->weight[i]) < 0.0) return i;
    return w->text_task;
}

static bool make_sample(worker *w, sample *s, int limit) {
    const mixture *mix = w->mix;
    int task = draw_task(w), branches = 0, common = 0, num[16], num_prompt[16];
    const task_info *info = task_at(task);
    s->len = 0;
    s->task = task;
    if (info->kind == TASK_TEXT) {
        text_piece(w, s, draw_range(w, mix->text_low, mix->text_high));
        return s->len > 0;
    }
    task_settings settings = {.aware = draw_unit(w) < mix->aware_part};
    if (info->size_name)
        settings.size = draw_range(w, mix->size_low[task], mix->size_high[task]);
    else
        settings.length = (size_t)draw_range(w, mix->length_low[task], mix->length_high[task]);
    uint64_t seed = next_bits(w) | 1u << 31; /* judges use seeds below 2^31 */
    bool several =
        mix->layout == LAYOUT_AR && !settings.aware && (info->kind == TASK_RECALL || strcmp(info->name, "kv") == 0);
    int wanted = several ? mix->branches : 1;
    for (int q = 0; q < wanted && q < 16; q++) {
        settings.question = q;
        if (task_generate(task, seed, &settings, w->prompt, sizeof w->prompt, w->answer, sizeof w->answer))
            return false;
        uint16_t *t = w->tokens[branches];
        num_prompt[branches] = (int)text_encode(w->src, w->prompt, (int64_t)strlen(w->prompt), t);
        num[branches] = num_prompt[branches] +
                        (int)text_encode(w->src, w->answer, (int64_t)strlen(w->answer), t + num_prompt[branches]);
        int same = 0, least = num_prompt[branches];
        bool again = false;
        for (int b = 0; b < branches && !again; b++) {
            int n = num_prompt[b] < num_prompt[branches] ? num_prompt[b] : num_prompt[branches];
            for (same = 0; same < n && w->tokens[b][same] == t[same]; same++) {
            }
            again = same == n;
            if (same < least) least = same;
        }
        if (again) continue;
        common = branches == 0 ? num_prompt[0] : least < common ? least : common;
        branches++;
    }
    if (branches == 1) {
        for (int i = 0; i < num[0]; i++)
            if (!put(s, w->tokens[0][i], i, i < num_prompt[0] ? KIND_PROMPT : KIND_ANSWER, 0, limit)) return false;
        return add_end(w, s, num_prompt[0], limit);
    }
    for (int i = 0; i < common; i++)
        if (!put(s, w->tokens[0][i], i, KIND_PROMPT, 0, limit)) return false;
    for (int b = 0; b < branches; b++) {
        if (s->len + num[b] - common + 1 > limit) return b > 0;
        for (int i = common; i < num[b]; i++)
            put(s, w->tokens[b][i], i, i < num_prompt[b] ? KIND_PROMPT : KIND_ANSWER, b + 1, limit);
        put(s, mix->eos, num[b], KIND_ANSWER, b + 1, limit);
    }
    return true;
}

typedef struct {
    int16_t *id, *doc, *pos;
    uint8_t *kind, *branch, *task;
    float *weight;
} batch;

static void place(worker *w, const sample *s, const batch *out, int64_t at, int doc) {
    int answers = 0;
    for (int i = 0; i < s->len; i++) answers += s->kind[i] == KIND_ANSWER || s->kind[i] == KIND_TEXT;
    float weight = 1.0f / sqrtf((float)(answers > 0 ? answers : 1));
    for (int i = 0; i < s->len; i++, at++) {
        out->id[at] = (int16_t)s->id[i];
        out->doc[at] = (int16_t)doc;
        out->pos[at] = s->pos[i];
        out->kind[at] = s->kind[i];
        out->branch[at] = s->branch[i];
        out->task[at] = (uint8_t)s->task;
        out->weight[at] = s->kind[i] == KIND_PROMPT ? 0.0f
                          : s->kind[i] == KIND_FILL ? weight * (float)w->mix->fill_weight
                                                    : weight;
    }
}

int worker_size(void) {
    return (int)sizeof(worker);
}
void worker_init(worker *w, const source *src, uint64_t seed) {
    memset(w, 0, sizeof *w);
    w->src = src;
    w->state = seed * 0x9e3779b97f4a7c15u + 0x1234567u;
    for (int i = 0; i < 16; i++) next_bits(w);
    w->text_task = task_find("text");
}

/* Fills rows of `len` tokens; arrays [rows][len]. */
void worker_fill(worker *w, const mixture *mix, int rows, int len, int16_t *id, int16_t *doc, int16_t *pos,
                 uint8_t *kind, uint8_t *branch, uint8_t *task, float *weight) {
    batch out = {id, doc, pos, kind, branch, task, weight};
    int limit = mix->max_doc < len ? mix->max_doc : len;
    if (limit > 4096) limit = 4096; /* what a sample holds */
    w->mix = mix;
    for (int r = 0; r < rows; r++) {
        int used = 0, docs = 0;
        for (int i = 0; i < w->num_pending; i++)
            if (w->pending[i].len <= len - used) {
                place(w, &w->pending[i], &out, (int64_t)r * len + used, docs++);
                used += w->pending[i].len;
                for (int k = i; k + 1 < w->num_pending; k++) w->pending[k] = w->pending[k + 1];
                w->num_pending--;
                i--;
            }
        for (int misses = 0; used < len && misses < 6;) {
            if (!make_sample(w, &w->made, limit)) {
                misses++;
            } else if (w->made.len <= len - used) {
                place(w, &w->made, &out, (int64_t)r * len + used, docs++);
                used += w->made.len;
            } else {
                if (w->num_pending < PENDING) w->pending[w->num_pending++] = w->made;
                misses++;
                if (len - used > 256 && w->num_pending < PENDING) misses--;
            }
        }
        if (used < len) {
            text_piece(w, &w->made, len - used);
            place(w, &w->made, &out, (int64_t)r * len + used, docs);
        }
    }
}
