/* dlm/tokenizer.h - byte-level BPE of a Hugging Face folder (tokenizer.json): text to token ids and back.
 *
 * Ids are those of the Hugging Face `tokenizers` library (compared with 0.23), token for token, on any valid UTF-8.
 *
 * Read    model BPE (vocab, merges as "a b" or ["a", "b"], ignore_merges, unk_token, fuse_unk); added_tokens with
 *         single_word, lstrip, rstrip, normalized, special; normalizer null, NFC; pre_tokenizer Split (Regex, String; every
 *         behavior; invert), Digits, ByteLevel; post_processor ByteLevel, TemplateProcessing; decoder ByteLevel; and Sequence
 *         of these. Anything else is refused by name. truncation and padding are not followed.
 * Bytes   Text need not be valid UTF-8. Every maximal part of a broken sequence counts as U+FFFD, which is what Python's
 *         bytes.decode("utf-8", "replace") gives. Zero bytes are text like any other.
 * Unicode As in the library: NFC with the tables of Unicode 9, categories of Unicode 16 (or newer, where PCRE2 is).
 * Cost    No limit on the length of a text; a word (a match of the pattern) of n bytes costs O(n log n), and no recursion.
 * Threads Nothing changes after open: one tokenizer serves any number of threads. */
#ifndef RF_DLM_TOKENIZER_H
#define RF_DLM_TOKENIZER_H

#include "core/status.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct rf_tokenizer rf_tokenizer;

/* Growable outputs. Zero-initialise; calls append; the clear functions free. */
typedef struct {
    int32_t *ids; /* [num] */
    size_t num, capacity;
} rf_token_ids;
typedef struct {
    char *bytes; /* [num]; one zero byte follows whenever bytes is not NULL */
    size_t num, capacity;
} rf_text;
void rf_token_ids_clear(rf_token_ids *ids);
void rf_text_clear(rf_text *text);
rf_status rf_token_ids_append(rf_token_ids *ids, const int32_t *more, size_t num, rf_error *err);
rf_status rf_text_append(rf_text *text, const void *more, size_t num_bytes, rf_error *err);

/* folder must hold tokenizer.json; bos, eos, pad and mask come from tokenizer_config.json where it is there, and a mask token
 * that it does not name from the added tokens (<|mdm_mask|> of LLaDA, <|mask|> of Dream, <|MASK|> of SDAR, [MASK]). */
rf_status rf_tokenizer_open(rf_tokenizer **out, const char *folder, rf_error *err);
/* The same from memory. config (of config_bytes) may be NULL. */
rf_status rf_tokenizer_parse(rf_tokenizer **out, const char *tokenizer_json, size_t tokenizer_bytes, const char *config,
                             size_t config_bytes, rf_error *err);
void rf_tokenizer_close(rf_tokenizer *t); /* NULL is a no-op */

/* Appends the ids of text[num_bytes] to out; on failure out is as it was.
 * add_special_tokens  puts what the post_processor says around them (a begin-of-text token).
 * parse_special       recognises special added tokens inside the text; without it they are text like any other. Added tokens
 *                     that are not special are always recognised, as the library does. */
rf_status rf_tokenizer_encode(const rf_tokenizer *t, const char *text, size_t num_bytes, bool add_special_tokens,
                              bool parse_special, rf_token_ids *out, rf_error *err);

/* Appends the bytes of ids[num] to out, as they are: a cut through a character leaves invalid UTF-8. An id without a token
 * (outside the vocabulary, or a row that pads the embedding) gives no bytes. skip_special leaves special tokens out. */
rf_status rf_tokenizer_decode(const rf_tokenizer *t, const int32_t *ids, size_t num, bool skip_special, rf_text *out,
                              rf_error *err);

/* Decoding id by id into valid UTF-8. A character that is not complete is held back; broken bytes become U+FFFD as above.
 * The pieces joined are bytes.decode("utf-8", "replace") of rf_tokenizer_decode. */
typedef struct {
    const rf_tokenizer *tokenizer;
    bool skip_special;
    int num_pending; /* bytes held back */
    char pending[4];
} rf_token_stream;
rf_token_stream rf_token_stream_start(const rf_tokenizer *t, bool skip_special);
rf_status rf_token_stream_push(rf_token_stream *s, int32_t id, rf_text *out, rf_error *err);
rf_status rf_token_stream_finish(rf_token_stream *s, rf_text *out, rf_error *err); /* what is held back, as U+FFFD */

int32_t rf_tokenizer_vocab_size(const rf_tokenizer *t); /* largest id + 1; ids between may have no token */
/* The id of a token by its content as tokenizer.json spells it ("<|eot_id|>", or "\u0120the" for " the"); -1 if none. */
int32_t rf_tokenizer_token_id(const rf_tokenizer *t, const char *content, size_t num_bytes);
/* The bytes that id decodes to, borrowed, with their number; NULL if there is no such token. */
const char *rf_tokenizer_token_bytes(const rf_tokenizer *t, int32_t id, size_t *num_bytes);
bool rf_tokenizer_is_special(const rf_tokenizer *t, int32_t id);

/* -1 where the files name none. */
typedef struct {
    int32_t bos, eos, pad, mask;
} rf_special_ids;
rf_special_ids rf_tokenizer_special_ids(const rf_tokenizer *t);

#ifdef __cplusplus
}
#endif
#endif
