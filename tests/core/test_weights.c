/* tests/core/test_weights.c - every check of the safetensors reader has a file that fails it. */
#include "core/weights.h"

#include "core/file.h"
#include "core/memory.h"
#include "tests/test_util.h"

static rf_error err;
static rf_weights *w;
static char dir[256], path[400];

static void setup(void) {
    ck_assert_ptr_nonnull(rf_temp_dir_make(dir, sizeof dir));
}
static void teardown(void) {
    rf_temp_dir_remove(dir);
}

/* A file in memory: length, header, data bytes 0, 1, 2, ... Lives in a static 64-byte-aligned buffer. */
static size_t build(char **out, const char *header, size_t data_bytes) {
    static _Alignas(64) char file[65536];
    uint64_t len = strlen(header);
    for (int i = 0; i < 8; i++) file[i] = (char)(len >> (8 * i));
    memcpy(file + 8, header, len);
    for (size_t i = 0; i < data_bytes; i++) file[8 + len + i] = (char)i;
    *out = file;
    return 8 + len + data_bytes;
}

static rf_status open_header(const char *header, size_t data_bytes) {
    char *file;
    size_t num = build(&file, header, data_bytes);
    return rf_weights_open_memory(&w, file, num, "mem", &err);
}

static void write_file(const char *name, const char *header, size_t data_bytes) {
    char *file;
    size_t num = build(&file, header, data_bytes);
    snprintf(path, sizeof path, "%s/%s", dir, name);
    rf_assert_ok(rf_file_write(path, file, num, &err), err);
}

static void write_text(const char *name, const char *text) {
    snprintf(path, sizeof path, "%s/%s", dir, name);
    rf_assert_ok(rf_file_write(path, text, strlen(text), &err), err);
}

#define TWO                                                                                                            \
    "{\"__metadata__\":{\"format\":\"pt\",\"x\":\"1\"},\"b\":{\"dtype\":\"F32\",\"shape\":[2,3],\"data_offsets\":[0,"  \
    "24]}, "                                                                                                           \
    "\"a\":{\"data_offsets\":[24,32],\"shape\":[4],\"dtype\":\"BF16\"}}      "
#define ONE(name) "{\"" name "\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[0,2]}}"

START_TEST(a_good_file_opens) {
    rf_tensor t;
    rf_assert_ok(open_header(TWO, 32), err);
    ck_assert_uint_eq(rf_weights_count(w), 2);
    ck_assert_str_eq(rf_weights_name(w, 0), "a");
    ck_assert_str_eq(rf_weights_name(w, 1), "b");
    ck_assert_ptr_null(rf_weights_name(w, 2));
    ck_assert(rf_weights_has(w, "b") && !rf_weights_has(w, "c"));
    ck_assert_uint_eq(rf_weights_total_bytes(w), 32);
    ck_assert_str_eq(rf_weights_metadata(w, "format"), "pt");
    ck_assert_ptr_null(rf_weights_metadata(w, "none"));
    rf_assert_ok(rf_weights_get(w, "a", &t, &err), err);
    ck_assert(t.dtype == RF_DTYPE_BF16 && t.rank == 1 && t.shape[0] == 4);
    ck_assert_int_eq(((const char *)t.data)[0], 24);
    rf_weights_close(w);
    rf_weights_close(NULL);
}
END_TEST

START_TEST(get_refuses_by_name) {
    rf_tensor t;
    rf_assert_ok(open_header("{\"f8\":{\"dtype\":\"F8_E4M3\",\"shape\":[2],\"data_offsets\":[0,2]},"
                             "\"new\":{\"dtype\":\"Q3_X\",\"shape\":[5],\"data_offsets\":[2,4]},"
                             "\"r6\":{\"dtype\":\"U8\",\"shape\":[1,1,1,1,1,2],\"data_offsets\":[4,6]},"
                             "\"m\":{\"dtype\":\"I32\",\"shape\":[1,2],\"data_offsets\":[6,14]},"
                             "\"s\":{\"dtype\":\"I64\",\"shape\":[],\"data_offsets\":[14,22]}}",
                             22),
                 err);
    rf_assert_fails(rf_weights_get(w, "none", &t, &err), err, RF_ERR_MISSING, "mem: tensor 'none' is missing");
    rf_assert_fails(rf_weights_get(w, "f8", &t, &err), err, RF_ERR_DTYPE, "F8_E4M3");
    rf_assert_fails(rf_weights_get(w, "new", &t, &err), err, RF_ERR_DTYPE, "Q3_X");
    rf_assert_fails(rf_weights_get(w, "r6", &t, &err), err, RF_ERR_SHAPE, "6 dims");
    rf_assert_fails(rf_weights_get_shaped(w, "m", 2, (const int64_t[]){-1, 3}, &t, &err), err, RF_ERR_SHAPE,
                    "must have shape [?, 3], found [1, 2]");
    rf_assert_fails(rf_weights_get_shaped(w, "m", 1, (const int64_t[]){2}, &t, &err), err, RF_ERR_SHAPE, "[2], found");
    rf_assert_ok(rf_weights_get_shaped(w, "m", 2, (const int64_t[]){-1, 2}, &t, &err), err);
    rf_assert_ok(rf_weights_get_shaped(w, "s", 0, NULL, &t, &err), err);
    ck_assert_uint_eq((uintptr_t)t.data % 8, 0); /* the file has it at an odd place */
    ck_assert_int_eq(((const char *)t.data)[0], 14);
    ck_assert_int_eq(rf_weights_main_dtype(w), RF_DTYPE_I32 < RF_DTYPE_I64 ? RF_DTYPE_I32 : RF_DTYPE_I64);
    rf_weights_close(w);
}
END_TEST

START_TEST(an_empty_header_is_a_file_without_tensors) {
    rf_assert_ok(open_header("{}", 0), err);
    ck_assert_uint_eq(rf_weights_count(w), 0);
    ck_assert_int_eq(rf_weights_main_dtype(w), RF_DTYPE_COUNT);
    ck_assert(!rf_weights_has(w, ""));
    rf_weights_close(w);
}
END_TEST

START_TEST(escaped_names_are_decoded) {
    rf_assert_ok(
        open_header("{\"a\\u00e9\\ud83d\\ude00\\n\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[0,2]}}", 2), err);
    ck_assert_str_eq(rf_weights_name(w, 0), "a\xc3\xa9\xf0\x9f\x98\x80\n");
    rf_weights_close(w);
}
END_TEST

#define T(dtype, shape, offsets) "{\"x\":{\"dtype\":\"" dtype "\",\"shape\":" shape ",\"data_offsets\":" offsets "}}"

static const struct {
    const char *header;
    size_t data_bytes;
    const char *part;
} bad_headers[] = {
    {"", 0, "'{' expected"},
    {" {}", 0, "'{' expected"},
    {"{} x", 0, "follows the closing brace"},
    {"{\"a\"", 0, "':' expected"},
    {"{\"a", 0, "ends inside a string"},
    {"{\"a\\", 0, "ends inside a string"},
    {"{\"a\\q\":", 0, "unknown escape"},
    {"{\"\\u0000\":", 0, "zero character"},
    {"{\"\\ud800x\":", 0, "surrogate"},
    {"{\"\\udc00\":", 0, "surrogate"},
    {"{\"\xff\":", 0, "UTF-8"},
    {"{1:2}", 0, "a string was expected"},
    {"{\"a\":[]}", 0, "'{' expected"},
    {"{\"a\":{}}", 0, "a string was expected"},
    {"{\"a\":{\"dtype\":\"U8\"}}", 0, "lacks dtype"},
    {"{\"a\":{\"dtype\":7}}", 0, "a string was expected"},
    {"{\"a\":{\"dtype\":\"U8\",\"dtype\":\"U8\"}}", 0, "a key twice"},
    {"{\"a\":{\"more\":7}}", 0, "a key other than"},
    {"{\"__metadata__\":{\"k\":7}}", 0, "a string was expected"},
    {"{\"__metadata__\":{},\"__metadata__\":{}}", 0, "there twice"},
    {T("NAME_OF_16_BYTES", "[1]", "[0,1]"), 1, "more than 15 bytes"},
    {T("U8", "[1.0]", "[0,1]"), 1, "']' expected"},
    {T("U8", "[1e3]", "[0,1]"), 1, "']' expected"},
    {T("U8", "[-1]", "[0,1]"), 1, "whole number"},
    {T("U8", "[01]", "[0,1]"), 1, "whole number"},
    {T("U8", "[\"1\"]", "[0,1]"), 1, "whole number"},
    {T("U8", "[[1]]", "[0,1]"), 1, "whole number"},
    {T("U8", "[99999999999999999999]", "[0,1]"), 1, "beyond 2^63"},
    {T("U8", "[1152921504606846976,16]", "[0,1]"), 1, "product is beyond"},
    {T("F32", "[4611686018427387904]", "[0,4]"), 4, "do not take the 4 bytes"},
    {T("U8", "[2]", "[0,3]"), 2, "do not lie in 2 bytes"},
    {T("U8", "[2]", "[2,0]"), 2, "do not lie in 2 bytes"},
    {T("U8", "[2]", "[0,2,4]"), 2, "']' expected"},
    {T("U8", "[2]", "[0]"), 2, "',' expected"},
    {T("F32", "[2]", "[0,4]"), 4, "2 elements of F32 do not take the 4 bytes"},
    {T("F4", "[1]", "[0,1]"), 1, "1 elements of F4"},
    {T("U8", "[1]", "[1,2]"), 2, "starts at byte 1, the one before it ends at 0"},
    {T("U8", "[1]", "[0,1]"), 2, "cover 1 of 2 bytes"},
    {"{\"a\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[0,2]},\"b\":{\"dtype\":\"U8\",\"shape\":[2],\"data_"
     "offsets\":[1,3]}}",
     3, "starts at byte 1, the one before it ends at 2"},
    {"{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]},\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_"
     "offsets\":[1,2]}}",
     2, "'a' is there twice"},
};

START_TEST(every_bad_header_is_refused) {
    rf_assert_fails(open_header(bad_headers[_i].header, bad_headers[_i].data_bytes), err, RF_ERR_FORMAT,
                    bad_headers[_i].part);
    ck_assert_ptr_null(w);
}
END_TEST

START_TEST(no_cut_of_a_good_file_opens) {
    char *file;
    size_t num = build(&file, TWO, 32);
    for (size_t n = 0; n < num; n++) {
        char *cut = malloc(n ? n : 1); /* its own block, so that a sanitizer sees a read past it */
        memcpy(cut, file, n);
        ck_assert_int_eq(rf_weights_open_memory(&w, cut, n, "cut", &err), RF_ERR_FORMAT);
        free(cut);
    }
}
END_TEST

START_TEST(a_long_header_is_refused_before_memory_is_taken) {
    char bytes[16] = {0};
    memset(bytes, 0xff, 8);
    rf_assert_fails(rf_weights_open_memory(&w, bytes, 16, "mem", &err), err, RF_ERR_FORMAT, "the limit is 100000000");
    memset(bytes, 0, 8);
    bytes[0] = 9;
    rf_assert_fails(rf_weights_open_memory(&w, bytes, 16, "mem", &err), err, RF_ERR_FORMAT,
                    "needs 9 bytes, the file has 8");
}
END_TEST

/* ---- files and folders ---- */

static void write_shards(void) {
    write_file("m-00001-of-00002.safetensors", ONE("one"), 2);
    write_file("m-00002-of-00002.safetensors", ONE("two"), 2);
}

static rf_status open_index_of(const char *map) {
    char text[1024];
    snprintf(text, sizeof text, "{\"metadata\":{},\"weight_map\":%s}", map);
    write_shards();
    write_text("m.safetensors.index.json", text);
    return rf_weights_open(&w, dir, &err);
}

START_TEST(an_index_opens_its_shards) {
    rf_tensor t;
    rf_assert_ok(open_index_of("{\"two\":\"m-00002-of-00002.safetensors\",\"one\":\"m-00001-of-00002.safetensors\"}"),
                 err);
    ck_assert_uint_eq(rf_weights_count(w), 2);
    rf_assert_ok(rf_weights_get(w, "two", &t, &err), err);
    ck_assert_int_eq(((const char *)t.data)[1], 1);
    rf_weights_close(w);
}
END_TEST

#define S1 "\"m-00001-of-00002.safetensors\""
#define S2 "\"m-00002-of-00002.safetensors\""
static const struct {
    const char *map;
    rf_status status;
    const char *part;
} bad_maps[] = {
    {"7", RF_ERR_FORMAT, "not an object"},
    {"{}", RF_ERR_FORMAT, "names 0 files"},
    {"{\"one\":7}", RF_ERR_FORMAT, "plain file name"},
    {"{\"one\":\"../m-00001-of-00002.safetensors\"}", RF_ERR_FORMAT, "plain file name"},
    {"{\"one\":\"/etc/passwd\"}", RF_ERR_FORMAT, "plain file name"},
    {"{\"one\":\"..\"}", RF_ERR_FORMAT, "plain file name"},
    {"{\"one\":\"\"}", RF_ERR_FORMAT, "plain file name"},
    {"{\"one\":\"absent.safetensors\"}", RF_ERR_MISSING, "absent.safetensors: cannot open"},
    {"{\"one\":" S1 ",\"more\":" S2 "}", RF_ERR_MISSING, "tensor 'more' is not in m-00002"},
    {"{\"one\":" S2 ",\"two\":" S1 "}", RF_ERR_MISSING, "not in m-0000"},
    {"{\"one\":" S1 ",\"two\":" S2 ",\"one\":" S1 "}", RF_ERR_FORMAT, "'one' is in the index twice"},
    {"{\"one\":" S1 ",\"zzz\":" S2 ",\"two\":" S2 "}", RF_ERR_MISSING, "'zzz'"},
};

START_TEST(every_bad_index_is_refused) {
    rf_assert_fails(open_index_of(bad_maps[_i].map), err, bad_maps[_i].status, bad_maps[_i].part);
}
END_TEST

START_TEST(a_tensor_that_the_index_does_not_name_is_refused) {
    write_file("m-1.safetensors", TWO, 32);
    write_text("m.safetensors.index.json", "{\"weight_map\":{\"a\":\"m-1.safetensors\"}}");
    rf_assert_fails(rf_weights_open(&w, path, &err), err, RF_ERR_FORMAT, "tensor 'b' of ");
    write_text("m.safetensors.index.json", "{\"x\":1}");
    rf_assert_fails(rf_weights_open(&w, path, &err), err, RF_ERR_MISSING, "weight_map");
    write_text("m.safetensors.index.json", "{");
    rf_assert_fails(rf_weights_open(&w, path, &err), err, RF_ERR_FORMAT, "not valid JSON");
}
END_TEST

START_TEST(two_shards_with_one_name_are_refused) {
    write_file("m-1.safetensors", ONE("x"), 2);
    write_file("m-2.safetensors", ONE("x"), 2);
    write_text("m.safetensors.index.json", "{\"weight_map\":{\"x\":\"m-1.safetensors\",\"y\":\"m-2.safetensors\"}}");
    rf_assert_fails(rf_weights_open(&w, path, &err), err, RF_ERR_FORMAT, "'x' is there twice");
}
END_TEST

START_TEST(a_folder_opens_its_one_file) {
    rf_assert_fails(rf_weights_open(&w, dir, &err), err, RF_ERR_MISSING, "holds no .safetensors file");
    write_file("model.fp16.safetensors", ONE("half"), 2);
    rf_assert_ok(rf_weights_open(&w, dir, &err), err);
    ck_assert(rf_weights_has(w, "half"));
    rf_weights_close(w);
    write_file("model.safetensors", ONE("plain"), 2);
    rf_assert_ok(rf_weights_open(&w, dir, &err), err);
    ck_assert(rf_weights_has(w, "plain"));
    rf_weights_close(w);
    write_file("other.safetensors", ONE("other"), 2);
    rf_assert_fails(rf_weights_open(&w, dir, &err), err, RF_ERR_CONFIG, "both model.safetensors and other.safetensors");
}
END_TEST

START_TEST(what_is_no_weights_file_is_refused) {
    snprintf(path, sizeof path, "%s/none.safetensors", dir);
    rf_assert_fails(rf_weights_open(&w, path, &err), err, RF_ERR_MISSING, "none.safetensors: cannot open");
    write_text("short.safetensors", "abc");
    rf_assert_fails(rf_weights_open(&w, path, &err), err, RF_ERR_FORMAT, "3 bytes are too few");
    write_text("text.safetensors", "version https://git-lfs.github.com/spec/v1");
    rf_assert_fails(rf_weights_open(&w, path, &err), err, RF_ERR_FORMAT, "not a safetensors file");
    rf_assert_fails(rf_weights_open(&w, "/dev/null", &err), err, RF_ERR_IO, "not a regular file");
}
END_TEST

START_TEST(every_failed_allocation_is_survived) {
    rf_assert_ok(open_index_of("{\"two\":\"m-00002-of-00002.safetensors\",\"one\":\"m-00001-of-00002.safetensors\"}"),
                 err);
    rf_weights_close(w);
    uint64_t live = rf_memory_get_counts().num_live, n = 1;
    for (;; n++) {
        rf_memory_fail_nth(n);
        rf_status st = rf_weights_open(&w, dir, &err);
        rf_memory_fail_nth(0);
        if (st == RF_OK) break;
        ck_assert_msg(st == RF_ERR_MEMORY, "allocation %d: %s", (int)n, err.message);
        ck_assert_uint_eq(rf_memory_get_counts().num_live, live);
    }
    ck_assert_uint_gt(n, 15);
    rf_weights_close(w);
    ck_assert_uint_eq(rf_memory_get_counts().num_live, live);
}
END_TEST

int main(void) {
    Suite *suite = suite_create("weights");
    TCase *tc = tcase_create("all");
    tcase_add_checked_fixture(tc, setup, teardown);
    tcase_add_test(tc, a_good_file_opens);
    tcase_add_test(tc, get_refuses_by_name);
    tcase_add_test(tc, an_empty_header_is_a_file_without_tensors);
    tcase_add_test(tc, escaped_names_are_decoded);
    tcase_add_loop_test(tc, every_bad_header_is_refused, 0, sizeof bad_headers / sizeof *bad_headers);
    tcase_add_test(tc, no_cut_of_a_good_file_opens);
    tcase_add_test(tc, a_long_header_is_refused_before_memory_is_taken);
    tcase_add_test(tc, an_index_opens_its_shards);
    tcase_add_loop_test(tc, every_bad_index_is_refused, 0, sizeof bad_maps / sizeof *bad_maps);
    tcase_add_test(tc, a_tensor_that_the_index_does_not_name_is_refused);
    tcase_add_test(tc, two_shards_with_one_name_are_refused);
    tcase_add_test(tc, a_folder_opens_its_one_file);
    tcase_add_test(tc, what_is_no_weights_file_is_refused);
    tcase_add_test(tc, every_failed_allocation_is_survived);
    suite_add_tcase(suite, tc);
    return rf_run_suite(suite);
}
