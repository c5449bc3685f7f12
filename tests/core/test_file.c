/* tests/core/test_file.c - reading with limits, writing all or nothing. */
#include <dirent.h>
#include <sys/stat.h>

#include "core/file.h"
#include "core/memory.h"
#include "tests/test_util.h"

static char dir[256], path[400];

static void setup(void) {
    ck_assert_ptr_nonnull(rf_temp_dir_make(dir, sizeof dir));
    snprintf(path, sizeof path, "%s/out", dir);
}

static void teardown(void) {
    rf_temp_dir_remove(dir);
}

static int num_files(void) {
    int num = 0;
    DIR *d = opendir(dir);
    struct dirent *item;
    while ((item = readdir(d)) != NULL) num += item->d_name[0] != '.';
    closedir(d);
    return num;
}

START_TEST(what_is_written_reads_back) {
    static char big[200000];
    rf_error err = {0};
    char *text = NULL;
    size_t num = 0;
    for (size_t i = 0; i < sizeof big; i++) big[i] = (char)(i * 7);
    rf_file_writer *w = NULL;
    rf_assert_ok(rf_file_writer_open(&w, path, &err), err);
    rf_file_writer_write(w, big, 10);
    rf_file_writer_write(w, big + 10, sizeof big - 20);
    rf_file_writer_write(w, big + sizeof big - 10, 10);
    ck_assert(!rf_path_exists(path));
    rf_assert_ok(rf_file_writer_commit(w, &err), err);
    rf_assert_ok(rf_file_read(path, sizeof big, &text, &num, &err), err);
    ck_assert_uint_eq(num, sizeof big);
    ck_assert_mem_eq(text, big, sizeof big);
    ck_assert_int_eq(text[num], 0);
    ck_assert_int_eq(num_files(), 1);
    rf_free(text);
}
END_TEST

START_TEST(discard_leaves_the_old_file) {
    rf_error err = {0};
    rf_file_writer *w = NULL;
    char *text;
    size_t num;
    rf_assert_ok(rf_file_write(path, "old", 3, &err), err);
    ck_assert_int_eq(chmod(path, 0640), 0);
    rf_assert_ok(rf_file_writer_open(&w, path, &err), err);
    rf_file_writer_write(w, "new", 3);
    rf_file_writer_discard(w);
    rf_file_writer_discard(NULL);
    rf_assert_ok(rf_file_read(path, 100, &text, &num, &err), err);
    ck_assert_str_eq(text, "old");
    rf_free(text);
    rf_assert_ok(rf_file_write(path, "new", 3, &err), err);
    struct stat info;
    ck_assert_int_eq(stat(path, &info), 0);
    ck_assert_int_eq(info.st_mode & 0777, 0640);
    ck_assert_int_eq(num_files(), 1);
}
END_TEST

START_TEST(a_link_stays_a_link) {
    rf_error err = {0};
    char link_path[400];
    struct stat info;
    snprintf(link_path, sizeof link_path, "%s/link", dir);
    rf_assert_ok(rf_file_write(path, "old", 3, &err), err);
    ck_assert_int_eq(symlink("out", link_path), 0);
    rf_assert_ok(rf_file_write(link_path, "newer", 5, &err), err);
    ck_assert_int_eq(lstat(link_path, &info), 0);
    ck_assert(S_ISLNK(info.st_mode));
    ck_assert_int_eq(stat(path, &info), 0);
    ck_assert_int_eq(info.st_size, 5);
}
END_TEST

START_TEST(a_full_disk_is_reported) {
    rf_error err = {0};
    if (!rf_path_exists("/dev/full")) return;
    rf_assert_fails(rf_file_write("/dev/full", "x", 1, &err), err, RF_ERR_IO, "/dev/full: cannot write: No space left");
    rf_assert_ok(rf_file_write("/dev/null", "x", 1, &err), err);
    ck_assert(rf_path_exists("/dev/full"));
}
END_TEST

START_TEST(bad_targets_are_named) {
    rf_error err = {0};
    rf_file_writer *w = NULL;
    char deep[400], longest[8192];
    snprintf(deep, sizeof deep, "%s/none/out", dir);
    rf_assert_fails(rf_file_writer_open(&w, deep, &err), err, RF_ERR_IO, deep);
    rf_assert_fails(rf_file_writer_open(&w, dir, &err), err, RF_ERR_IO, "is a folder");
    rf_assert_fails(rf_file_writer_open(&w, "", &err), err, RF_ERR_ARGUMENT, "empty");
    memset(longest, 'x', sizeof longest - 1);
    longest[sizeof longest - 1] = 0;
    rf_assert_fails(rf_file_writer_open(&w, longest, &err), err, RF_ERR_ARGUMENT, "too long");
}
END_TEST

START_TEST(reading_refuses_with_the_reason) {
    rf_error err = {0};
    char *text;
    size_t num;
    rf_assert_fails(rf_file_read(path, 10, &text, &num, &err), err, RF_ERR_MISSING, path);
    rf_assert_fails(rf_file_read(dir, 10, &text, &num, &err), err, RF_ERR_IO, "is a folder");
    rf_assert_fails(rf_file_read("/dev/null", 10, &text, &num, &err), err, RF_ERR_IO, "not a regular file");
    rf_assert_ok(rf_file_write(path, "12345", 5, &err), err);
    rf_assert_fails(rf_file_read(path, 4, &text, &num, &err), err, RF_ERR_FORMAT, "5 bytes, the limit is 4");
    ck_assert_ptr_null(text);
}
END_TEST

START_TEST(every_failed_allocation_is_survived) {
    rf_error err = {0};
    uint64_t live = rf_memory_get_counts().num_live;
    for (uint64_t n = 1;; n++) {
        rf_memory_fail_nth(n);
        rf_status st = rf_file_write(path, "x", 1, &err);
        rf_memory_fail_nth(0);
        ck_assert_uint_eq(rf_memory_get_counts().num_live, live);
        if (st == RF_OK) break;
        ck_assert_int_eq(st, RF_ERR_MEMORY);
        ck_assert_int_eq(num_files(), 0);
    }
    char *text;
    size_t num;
    rf_memory_fail_nth(1);
    rf_assert_fails(rf_file_read(path, 10, &text, &num, &err), err, RF_ERR_MEMORY, path);
}
END_TEST

START_TEST(paths_join) {
    const char *const cases[][3] = {{"a", "b", "a/b"}, {"a/", "b", "a/b"}, {"", "b", "b"}, {"/", "b", "/b"}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char *joined = rf_path_join(cases[i][0], cases[i][1]);
        ck_assert_str_eq(joined, cases[i][2]);
        rf_free(joined);
    }
    ck_assert(rf_path_is_dir(dir) && !rf_path_is_dir(path) && !rf_path_exists(path));
}
END_TEST

int main(void) {
    Suite *suite = suite_create("file");
    TCase *tc = tcase_create("all");
    tcase_add_checked_fixture(tc, setup, teardown);
    tcase_add_test(tc, what_is_written_reads_back);
    tcase_add_test(tc, discard_leaves_the_old_file);
    tcase_add_test(tc, a_link_stays_a_link);
    tcase_add_test(tc, a_full_disk_is_reported);
    tcase_add_test(tc, bad_targets_are_named);
    tcase_add_test(tc, reading_refuses_with_the_reason);
    tcase_add_test(tc, every_failed_allocation_is_survived);
    tcase_add_test(tc, paths_join);
    suite_add_tcase(suite, tc);
    return rf_run_suite(suite);
}
