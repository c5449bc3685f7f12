/* dlm/tokenizer_internal.h - what the parts of the tokenizer share. */
#ifndef RF_DLM_TOKENIZER_INTERNAL_H
#define RF_DLM_TOKENIZER_INTERNAL_H

#include "core/json.h"
#include "dlm/tokenizer.h"

#define RF_TOKENIZER_MAX_IDS    (1 << 22) /* ids are 0 .. this - 1 */
#define RF_TOKENIZER_MAX_TOKEN  4096      /* bytes of a token's content */
#define RF_TOKENIZER_MAX_STAGES 16        /* of the pre-tokenizer */

/* ---- Unicode (tokenizer_unicode.c) ---- */

/* The code point at text[0], of num > 0 bytes of valid UTF-8; *len receives its bytes. */
uint32_t rf_utf8_next(const uint8_t *text, size_t num, size_t *len);
/* The length of the code point that ends at text[num - 1], num > 0. */
size_t rf_utf8_last_len(const uint8_t *text, size_t num);
size_t rf_utf8_put(uint32_t code, uint8_t out[4]); /* returns the bytes written */

/* Bytes of the valid UTF-8 that text starts with. */
size_t rf_utf8_valid(const uint8_t *text, size_t num);
/* The broken sequence at text[0] (num > 0, where rf_utf8_valid is 0): bytes that one U+FFFD stands for. *cut: more bytes could
 * still make a character of it. */
size_t rf_utf8_broken(const uint8_t *text, size_t num, bool *cut);

bool rf_is_space(uint32_t code); /* White_Space */
bool rf_is_word(uint32_t code);  /* \w of UTS #18: alphabetic, marks, decimal digits, connectors, joiners */

/* What Unicode 15, 15.1 and 16 added, by general category, in order: PCRE2 and utf8proc may be older. */
typedef struct {
    uint32_t first, last;
    char category[3];
} rf_new_codes;
const rf_new_codes *rf_unicode_new(size_t *num);

/* Appends NFC of text (valid UTF-8) to out; *changed = false and nothing appended if it is in that form already. */
rf_status rf_nfc(const uint8_t *text, size_t num, rf_text *out, bool *changed, rf_error *err);

/* ---- vocabulary and merges (tokenizer_bpe.c) ---- */

/* A token's content in canonical form: with `raw` its UTF-8, else the bytes that its byte-level letters stand for. */
typedef struct {
    size_t content_at, decode_at; /* in the pool; equal unless an added token is normalized */
    uint32_t content_bytes, decode_bytes;
    bool used, raw, in_model, special;
    bool decode_raw;
    bool skipped; /* by a decoding that skips special tokens */
} rf_token;

typedef struct {
    uint64_t pair; /* left id << 32 | right id; UINT64_MAX: empty */
    uint32_t rank;
    int32_t id;
} rf_merge;

typedef struct {
    rf_text pool;
    rf_token *tokens; /* [num_tokens], by id */
    int32_t num_tokens;
    uint32_t *slots; /* [slot_mask + 1]: id + 1, 0 empty; by content */
    uint32_t slot_mask;
    rf_merge *merges; /* [merge_mask + 1] */
    uint32_t merge_mask;
    int32_t byte_ids[256]; /* -1: no such token */
    int32_t unk;
    bool fuse_unk, ignore_merges;
} rf_bpe;

/* Byte-level letters (GPT-2): the code point of a byte, the byte of a code point or -1. */
uint32_t rf_byte_letter(uint8_t byte);
int rf_letter_byte(uint32_t code);

/* ids below max_ids; num_expected tokens size the table. */
rf_status rf_bpe_init(rf_bpe *b, int32_t num_ids, size_t num_expected, size_t num_merges, rf_error *err);
void rf_bpe_clear(rf_bpe *b);
/* RF_ERR_CONFIG if the id or the content is taken. */
rf_status rf_bpe_add_token(rf_bpe *b, const char *content, size_t num_bytes, int32_t id, bool in_model, rf_error *err);
int32_t rf_bpe_find(const rf_bpe *b, const char *content, size_t num_bytes); /* by content as the file spells it; -1 */
/* Makes a token decode to other text than its content; and the token whose content is what id decodes to, -1. */
rf_status rf_bpe_set_decoded(rf_bpe *b, int32_t id, const char *text, size_t num_bytes, rf_error *err);
int32_t rf_bpe_find_decoded(const rf_bpe *b, int32_t id);
rf_status rf_bpe_add_merge(rf_bpe *b, const char *left, size_t left_bytes, const char *right, size_t right_bytes,
                           uint32_t rank, rf_error *err);
void rf_bpe_finish(rf_bpe *b); /* after the last model token */

/* Scratch of one encode call. */
typedef struct {
    const rf_bpe *bpe;
    rf_token_ids *out;
    struct rf_word_entry *cache; /* [cache_mask + 1] words of this call and where their ids stand in out */
    size_t cache_mask;
    struct rf_symbol *symbols;
    struct rf_candidate *heap;
    size_t capacity; /* of symbols; the heap has twice as many */
} rf_bpe_run;
rf_status rf_bpe_run_init(rf_bpe_run *run, const rf_bpe *b, size_t text_bytes, rf_token_ids *out, rf_error *err);
void rf_bpe_run_clear(rf_bpe_run *run);
/* Appends the ids of one word. The word's memory must stay until the run is cleared. */
rf_status rf_bpe_word(rf_bpe_run *run, const uint8_t *word, size_t num, rf_error *err);

/* ---- pre-tokenizer (tokenizer_split.c) ---- */

typedef enum {
    RF_SPLIT_ISOLATED = 0,
    RF_SPLIT_REMOVED,
    RF_SPLIT_CONTIGUOUS,
    RF_SPLIT_MERGED_WITH_PREVIOUS,
    RF_SPLIT_MERGED_WITH_NEXT
} rf_split_behavior;

typedef struct {
    void *code; /* pcre2_code, NULL: the stage does not split (ByteLevel without its pattern) */
    rf_split_behavior behavior;
    bool invert, prefix_space;
} rf_split_stage;

/* pattern is Oniguruma's (Ruby) syntax, or plain text with `literal`. where names the component in messages. */
rf_status rf_split_stage_init(rf_split_stage *s, const char *pattern, bool literal, const char *where, rf_error *err);
void rf_split_stage_clear(rf_split_stage *s);

/* Texts made during an encode call (normalized, with a space put in front), which words point into. */
typedef struct rf_text_block {
    struct rf_text_block *next;
    rf_text text;
} rf_text_block;
rf_status rf_text_block_add(rf_text_block **list, rf_text **out, rf_error *err);
void rf_text_blocks_clear(rf_text_block *list);

/* Runs text (valid UTF-8, not empty) through the stages; every word goes to the BPE. match_data: of rf_split_match_data. */
rf_status rf_split_run(const rf_split_stage *stages, int num_stages, const uint8_t *text, size_t num, void *match_data,
                       rf_text_block **blocks, rf_bpe_run *bpe, rf_error *err);
void *rf_split_match_data(void); /* NULL: no memory */
void rf_split_match_data_free(void *match_data);

/* ---- added tokens ---- */

typedef struct {
    int32_t id;
    bool single_word, lstrip, rstrip, special;
} rf_added_token;

/* A trie over the bytes of the added tokens of one kind. Node 0 is the root. */
typedef struct {
    int32_t child, sibling; /* -1: none */
    int32_t token;          /* index of the added token that ends here, -1 */
    uint8_t byte;
} rf_trie_node;
typedef struct {
    rf_trie_node *nodes;
    size_t num, capacity;
    int32_t first[256]; /* child of the root by byte, -1 */
} rf_trie;
rf_status rf_trie_add(rf_trie *trie, const uint8_t *text, size_t num, int32_t token, rf_error *err);

struct rf_tokenizer {
    rf_bpe bpe;
    bool nfc;
    rf_added_token *added; /* [num_added] */
    size_t num_added;
    rf_trie plain, normalized; /* looked for before and after normalizing */
    rf_split_stage stages[RF_TOKENIZER_MAX_STAGES];
    int num_stages;
    rf_token_ids prefix, suffix; /* of the post_processor */
    rf_special_ids special;
};

/* tokenizer_json.c */
rf_status rf_tokenizer_read(rf_tokenizer *t, const rf_json *doc, rf_error *err);
rf_status rf_tokenizer_read_config(rf_tokenizer *t, const rf_json *doc, rf_error *err); /* doc may be NULL */

#endif
