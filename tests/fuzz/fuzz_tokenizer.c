/* tests/fuzz/fuzz_tokenizer.c - any bytes as a tokenizer.json, a pre-tokenizer pattern, a text, or a chat template.
 *
 * The first byte chooses: 'j' a file, 'p' a pattern up to a newline and a text, 't' a text, 'c' a template. */
#include "dlm/chat_template.h"
#include "dlm/tokenizer.h"

#include "tests/fuzz/fuzz.h"

#define MAX_PATTERN_TEXT 256 /* a pattern may need the whole match limit at every byte */

static const char before[] = "{\"added_tokens\":[{\"id\":6,\"content\":\"<x>\",\"single_word\":false,\"lstrip\":true,"
                             "\"rstrip\":false,\"normalized\":false,"
                             "\"special\":true},{\"id\":7,\"content\":\"e\\u0301q\",\"single_word\":true,\"lstrip\":"
                             "false,\"rstrip\":true,\"normalized\":true,"
                             "\"special\":false}],\"normalizer\":{\"type\":\"NFC\"},\"decoder\":{\"type\":"
                             "\"ByteLevel\"},\"model\":{\"type\":\"BPE\",\"unk_token\":\"a\","
                             "\"vocab\":{\"a\":0,\"b\":1,\"ab\":2,\"\\u0120\":3,\"\\u00cc\":4,\"\\u0123\":5},"
                             "\"merges\":[\"a b\"]},\"pre_tokenizer\":{\"type\":"
                             "\"Sequence\",\"pretokenizers\":[{\"type\":\"Split\",\"behavior\":\"MergedWithNext\","
                             "\"invert\":false,\"pattern\":{\"Regex\":\"";
static const char after[] = "\"}},{\"type\":\"ByteLevel\",\"add_prefix_space\":true,\"use_regex\":false}]}}";

static void use(const rf_tokenizer *t, const char *text, size_t num) {
    rf_error err = {0};
    for (int k = 0; k < 2; k++) {
        rf_token_ids ids = {0};
        rf_text back = {0}, streamed = {0};
        rf_status st = rf_tokenizer_encode(t, text, num, k, !k, &ids, &err);
        fuzz_check_refusal(st, &err);
        if (st != RF_OK && ids.num) abort();
        rf_token_stream stream = rf_token_stream_start(t, k);
        for (size_t i = 0; i < ids.num; i++) {
            size_t num_bytes;
            if (ids.ids[i] < 0 || ids.ids[i] >= rf_tokenizer_vocab_size(t)) abort();
            if (!rf_tokenizer_token_bytes(t, ids.ids[i], &num_bytes)) abort();
            if (rf_token_stream_push(&stream, ids.ids[i], &streamed, &err) != RF_OK) abort();
        }
        if (rf_token_stream_finish(&stream, &streamed, &err) != RF_OK) abort();
        if (rf_tokenizer_decode(t, ids.ids, ids.num, k, &back, &err) != RF_OK) abort();
        if (streamed.num < back.num) abort(); /* U+FFFD is no shorter than what it stands for */
        rf_token_ids_clear(&ids);
        rf_text_clear(&back);
        rf_text_clear(&streamed);
    }
}

static void with_pattern(const char *pattern, size_t pattern_bytes, const char *text, size_t num) {
    rf_error err = {0};
    rf_text json = {0};
    rf_tokenizer *t = NULL;
    rf_text_append(&json, before, sizeof before - 1, &err);
    rf_text_append(&json, pattern, pattern_bytes, &err);
    rf_text_append(&json, after, sizeof after - 1, &err);
    fuzz_check_refusal(rf_tokenizer_parse(&t, json.bytes, json.num, NULL, 0, &err), &err);
    if (t) use(t, text, num);
    rf_tokenizer_close(t);
    rf_text_clear(&json);
}

static void as_template(const char *source, size_t num) {
    static const rf_chat_message messages[] = {
        {"system", " be brief\n", 10}, {"user", "a, b", 4}, {"assistant", "\xc3\xa9", 2}};
    rf_error err = {0};
    rf_chat_template *t = NULL;
    rf_text out = {0};
    rf_chat_options options = {.add_generation_prompt = true};
    fuzz_check_refusal(rf_chat_template_parse(&t, source, num, NULL, "fuzz", &err), &err);
    if (t) fuzz_check_refusal(rf_chat_template_render(t, messages, 3, &options, &out, &err), &err);
    rf_chat_template_close(t);
    rf_text_clear(&out);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static const char words[] = "(?i:'s)|[^\\\\r\\\\n\\\\p{L}\\\\p{N}]?\\\\p{L}+|\\\\p{N}{1,3}| "
                                "?[^\\\\s\\\\p{L}\\\\p{N}]+[\\\\r\\\\n]*|\\\\s+(?!\\\\S)|\\\\s+";
    static const char sample[] = "ab a<x>\xff"
                                 "e\xcc\x81q ae\xcc\x81 1 'S\n \n bb";
    if (size == 0) return 0;
    uint64_t live = rf_memory_get_counts().num_live;
    const char *rest = (const char *)data + 1;
    size_t num = size - 1;
    if (data[0] == 'j') {
        rf_error err = {0};
        rf_tokenizer *t = NULL;
        fuzz_check_refusal(rf_tokenizer_parse(&t, rest, num, "{\"eos_token\":\"a\"}", 17, &err), &err);
        if (t) use(t, sample, sizeof sample);
        rf_tokenizer_close(t);
    } else if (data[0] == 'p') {
        const char *line = memchr(rest, '\n', num);
        size_t pattern_bytes = line ? (size_t)(line - rest) : num, text_bytes = num - pattern_bytes;
        with_pattern(rest, pattern_bytes, rest + pattern_bytes,
                     text_bytes < MAX_PATTERN_TEXT ? text_bytes : MAX_PATTERN_TEXT);
    } else if (data[0] == 'c') {
        as_template(rest, num);
    } else {
        with_pattern(words, sizeof words - 1, rest, num);
    }
    fuzz_check_leaks(live);
    return 0;
}
