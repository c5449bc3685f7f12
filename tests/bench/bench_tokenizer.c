/* tests/bench/bench_tokenizer.c - times the tokenizer, or runs it for a comparison. Nothing gates on it.
 *
 *   bench_tokenizer FOLDER FILE [repeats]     opens FOLDER, encodes FILE and decodes it again; best of repeats (default 5)
 *   bench_tokenizer --ids FOLDER              documents from stdin, ids to stdout, for tests/fixtures/make_tokenizer.py --check
 *
 * A document is a u32 of bits (1 add_special_tokens, 2 parse_special), a u32 of bytes and the bytes; its answer a u32 number
 * of ids and the ids, then a u32 number of bytes and the bytes that they decode to. Machine byte order. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "core/file.h"
#include "core/memory.h"
#include "dlm/tokenizer.h"

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void check(rf_status st, const rf_error *err) {
    if (st == RF_OK) return;
    fprintf(stderr, "bench_tokenizer: %s\n", err->message);
    exit(1);
}

static void answer_documents(const rf_tokenizer *t) {
    uint32_t head[2];
    char *text = NULL;
    rf_token_ids ids = {0};
    rf_text back = {0};
    rf_error err = {0};
    while (fread(head, sizeof head, 1, stdin) == 1) {
        text = rf_realloc(text, (size_t)head[1] + 1);
        if (!text || (head[1] && fread(text, head[1], 1, stdin) != 1)) exit(1);
        ids.num = back.num = 0;
        check(rf_tokenizer_encode(t, text, head[1], head[0] & 1, head[0] & 2, &ids, &err), &err);
        check(rf_tokenizer_decode(t, ids.ids, ids.num, head[0] & 1, &back, &err), &err);
        uint32_t num = (uint32_t)ids.num, num_bytes = (uint32_t)back.num;
        fwrite(&num, sizeof num, 1, stdout);
        fwrite(ids.ids, sizeof *ids.ids, num, stdout);
        fwrite(&num_bytes, sizeof num_bytes, 1, stdout);
        fwrite(back.bytes, 1, num_bytes, stdout);
        fflush(stdout);
    }
    rf_free(text);
    rf_token_ids_clear(&ids);
    rf_text_clear(&back);
}

static void time_file(const char *folder, const char *path, int repeats) {
    rf_error err = {0};
    rf_tokenizer *t = NULL;
    char *text = NULL;
    size_t num_bytes = 0;
    rf_token_ids ids = {0};
    rf_text back = {0};
    double open = 1e30, encode = 1e30, decode = 1e30;
    check(rf_file_read(path, (size_t)1 << 31, &text, &num_bytes, &err), &err);
    for (int i = 0; i < repeats; i++) {
        double start = now();
        check(rf_tokenizer_open(&t, folder, &err), &err);
        double opened = now();
        ids.num = back.num = 0;
        check(rf_tokenizer_encode(t, text, num_bytes, false, true, &ids, &err), &err);
        double encoded = now();
        check(rf_tokenizer_decode(t, ids.ids, ids.num, false, &back, &err), &err);
        double decoded = now();
        if (opened - start < open) open = opened - start;
        if (encoded - opened < encode) encode = encoded - opened;
        if (decoded - encoded < decode) decode = decoded - encoded;
        rf_tokenizer_close(t);
    }
    printf("{\"bytes\": %zu, \"ids\": %zu, \"open_s\": %.4f, \"encode_s\": %.4f, \"encode_mb_s\": %.2f, "
           "\"decode_mb_s\": %.1f}\n",
           num_bytes, ids.num, open, encode, (double)num_bytes / encode * 1e-6, (double)back.num / decode * 1e-6);
    rf_free(text);
    rf_token_ids_clear(&ids);
    rf_text_clear(&back);
}

int main(int argc, char **argv) {
    if (argc == 3 && strcmp(argv[1], "--ids") == 0) {
        rf_error err = {0};
        rf_tokenizer *t = NULL;
        check(rf_tokenizer_open(&t, argv[2], &err), &err);
        answer_documents(t);
        rf_tokenizer_close(t);
    } else if (argc == 3 || argc == 4) {
        time_file(argv[1], argv[2], argc == 4 ? atoi(argv[3]) : 5);
    } else {
        fprintf(stderr, "usage: bench_tokenizer FOLDER FILE [repeats] | bench_tokenizer --ids FOLDER\n");
        return 2;
    }
    return 0;
}
