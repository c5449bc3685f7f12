/* core/file.h - whole files in, and files out that are either complete or not there. */
#ifndef RF_CORE_FILE_H
#define RF_CORE_FILE_H

#include <stdio.h>

#include "core/status.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Reads a regular file of at most max_bytes. *out is rf_free'd by the caller; one zero byte follows the data. */
rf_status rf_file_read(const char *path, size_t max_bytes, char **out, size_t *out_bytes, rf_error *err);

/* Writes to "<path>.tmp-<pid>-<n>" beside the target; commit flushes, syncs and renames, discard removes it. Write
 * errors (disk full) are remembered and reported by commit. */
typedef struct rf_file_writer rf_file_writer;
rf_status rf_file_writer_open(rf_file_writer **out, const char *path, rf_error *err);
void rf_file_writer_write(rf_file_writer *w, const void *bytes, size_t num_bytes);
rf_status rf_file_writer_commit(rf_file_writer *w, rf_error *err); /* frees w in every case */
void rf_file_writer_discard(rf_file_writer *w);                    /* NULL is a no-op */

/* One call for small files. */
rf_status rf_file_write(const char *path, const void *bytes, size_t num_bytes, rf_error *err);

bool rf_path_exists(const char *path);
bool rf_path_is_dir(const char *path);
/* "dir/name" in a fresh buffer (rf_free). NULL when memory is out. */
char *rf_path_join(const char *dir, const char *name);

#ifdef __cplusplus
}
#endif
#endif
