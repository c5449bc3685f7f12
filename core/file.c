/* core/file.c - whole files in, and files out that are either complete or not there.
 *
 * A target that is no regular file (a pipe, /dev/stdout) cannot be replaced by renaming, so it is written directly. */
#include "core/file.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "core/memory.h"

#define WRITE_BUFFER_BYTES 65536
#define MAX_TEMP_TRIES     100

rf_status rf_file_read(const char *path, size_t max_bytes, char **out, size_t *out_bytes, rf_error *err) {
    *out = NULL;
    *out_bytes = 0;
    rf_status st = RF_OK;
    char *data = NULL;
    struct stat info;
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* a pipe must not block before fstat refuses it */
    if (fd < 0) {
        st = errno == ENOENT ? RF_ERR_MISSING : RF_ERR_IO;
        return rf_fail(err, st, "%s: cannot open: %s", path, strerror(errno));
    }
    if (fstat(fd, &info) != 0) {
        st = rf_fail(err, RF_ERR_IO, "%s: cannot read its size: %s", path, strerror(errno));
        goto done;
    }
    if (!S_ISREG(info.st_mode)) {
        st = rf_fail(err, RF_ERR_IO, "%s: %s", path, S_ISDIR(info.st_mode) ? "is a folder" : "is not a regular file");
        goto done;
    }
    if ((uintmax_t)info.st_size > max_bytes) {
        st = rf_fail(err, RF_ERR_FORMAT, "%s: %jd bytes, the limit is %zu", path, (intmax_t)info.st_size, max_bytes);
        goto done;
    }
    size_t num_bytes = (size_t)info.st_size;
    data = rf_alloc(num_bytes + 1);
    if (!data) {
        st = rf_fail(err, RF_ERR_MEMORY, "%s: no memory for %zu bytes", path, num_bytes);
        goto done;
    }
    for (size_t have = 0; have < num_bytes;) {
        ssize_t got = read(fd, data + have, num_bytes - have);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) {
            st = rf_fail(err, RF_ERR_IO, "%s: cannot read: %s", path, strerror(errno));
            goto done;
        }
        if (got == 0) {
            st = rf_fail(err, RF_ERR_IO, "%s: became shorter while it was read (%zu of %zu bytes)", path, have,
                         num_bytes);
            goto done;
        }
        have += (size_t)got;
    }
    data[num_bytes] = 0;
    *out = data;
    *out_bytes = num_bytes;
    data = NULL;
done:
    close(fd);
    rf_free(data);
    return st;
}

struct rf_file_writer {
    int fd;
    int saved_errno; /* first write error, 0 if none */
    bool direct;     /* no temporary file: the target cannot be renamed over */
    size_t buffered;
    char target[PATH_MAX];
    char temp[PATH_MAX + 64];
    char buffer[WRITE_BUFFER_BYTES];
};

static rf_status open_temp(rf_file_writer *w, rf_error *err) {
    static _Atomic unsigned next_number;
    for (int i = 0; i < MAX_TEMP_TRIES; i++) {
        snprintf(w->temp, sizeof w->temp, "%s.tmp-%ld-%u", w->target, (long)getpid(),
                 atomic_fetch_add(&next_number, 1));
        w->fd = open(w->temp, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
        if (w->fd >= 0) return RF_OK;
        if (errno != EEXIST) break;
    }
    return rf_fail(err, RF_ERR_IO, "%s: cannot write here: %s", w->target, strerror(errno));
}

rf_status rf_file_writer_open(rf_file_writer **out, const char *path, rf_error *err) {
    *out = NULL;
    if (!path[0]) return rf_fail(err, RF_ERR_ARGUMENT, "the name of a file to write is empty");
    if (strlen(path) >= PATH_MAX)
        return rf_fail(err, RF_ERR_ARGUMENT, "a file name of %zu bytes is too long", strlen(path));
    rf_file_writer *w = rf_alloc(sizeof *w);
    if (!w) return rf_fail(err, RF_ERR_MEMORY, "%s: no memory for a write buffer", path);
    w->fd = -1;
    w->saved_errno = 0;
    w->direct = false;
    w->buffered = 0;
    w->temp[0] = 0;
    snprintf(w->target, sizeof w->target, "%s", path);

    rf_status st = RF_OK;
    struct stat info;
    bool exists = stat(path, &info) == 0;
    if (exists && S_ISDIR(info.st_mode)) {
        st = rf_fail(err, RF_ERR_IO, "%s: is a folder, a file name is needed", path);
    } else if (exists && !S_ISREG(info.st_mode)) {
        w->direct = true;
        w->fd = open(path, O_WRONLY | O_CLOEXEC);
        if (w->fd < 0) st = rf_fail(err, RF_ERR_IO, "%s: cannot write: %s", path, strerror(errno));
    } else {
        /* A link keeps pointing where it does: the file behind it is replaced. */
        char resolved[PATH_MAX];
        if (exists && realpath(path, resolved)) snprintf(w->target, sizeof w->target, "%s", resolved);
        st = open_temp(w, err);
        if (st == RF_OK && exists) (void)!fchmod(w->fd, info.st_mode & 07777);
    }
    if (st != RF_OK) {
        rf_free(w);
        return st;
    }
    *out = w;
    return RF_OK;
}

static void write_out(rf_file_writer *w, const char *bytes, size_t num_bytes) {
    while (num_bytes > 0 && w->saved_errno == 0) {
        ssize_t put = write(w->fd, bytes, num_bytes);
        if (put < 0) {
            if (errno != EINTR) w->saved_errno = errno;
            continue;
        }
        bytes += put;
        num_bytes -= (size_t)put;
    }
}

static void flush_buffer(rf_file_writer *w) {
    write_out(w, w->buffer, w->buffered);
    w->buffered = 0;
}

void rf_file_writer_write(rf_file_writer *w, const void *bytes, size_t num_bytes) {
    if (num_bytes == 0 || w->saved_errno != 0) return;
    if (num_bytes > sizeof w->buffer - w->buffered) flush_buffer(w);
    if (num_bytes >= sizeof w->buffer) {
        write_out(w, bytes, num_bytes);
    } else {
        memcpy(w->buffer + w->buffered, bytes, num_bytes);
        w->buffered += num_bytes;
    }
}

/* Best effort: makes the new name itself survive a power cut. */
static void sync_folder_of(const char *path) {
    char dir[PATH_MAX];
    char *slash;
    snprintf(dir, sizeof dir, "%s", path);
    slash = strrchr(dir, '/');
    if (!slash) {
        snprintf(dir, sizeof dir, ".");
    } else {
        slash[slash == dir ? 1 : 0] = 0;
    }
    int fd = open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0) return;
    fsync(fd);
    close(fd);
}

rf_status rf_file_writer_commit(rf_file_writer *w, rf_error *err) {
    rf_status st = RF_OK;
    flush_buffer(w);
    if (w->saved_errno == 0 && !w->direct && fsync(w->fd) != 0) w->saved_errno = errno;
    if (close(w->fd) != 0 && w->saved_errno == 0) w->saved_errno = errno;
    w->fd = -1;
    if (w->saved_errno != 0) {
        st = rf_fail(err, RF_ERR_IO, "%s: cannot write: %s", w->target, strerror(w->saved_errno));
    } else if (!w->direct && rename(w->temp, w->target) != 0) {
        st = rf_fail(err, RF_ERR_IO, "%s: cannot rename the finished file to it: %s", w->target, strerror(errno));
    } else if (!w->direct) {
        w->temp[0] = 0;
        sync_folder_of(w->target);
    }
    rf_file_writer_discard(w);
    return st;
}

void rf_file_writer_discard(rf_file_writer *w) {
    if (!w) return;
    if (w->fd >= 0) close(w->fd);
    if (w->temp[0]) unlink(w->temp);
    rf_free(w);
}

rf_status rf_file_write(const char *path, const void *bytes, size_t num_bytes, rf_error *err) {
    rf_file_writer *w = NULL;
    rf_status st = rf_file_writer_open(&w, path, err);
    if (st != RF_OK) return st;
    rf_file_writer_write(w, bytes, num_bytes);
    return rf_file_writer_commit(w, err);
}

bool rf_path_exists(const char *path) {
    struct stat info;
    return stat(path, &info) == 0;
}

bool rf_path_is_dir(const char *path) {
    struct stat info;
    return stat(path, &info) == 0 && S_ISDIR(info.st_mode);
}

char *rf_path_join(const char *dir, const char *name) {
    size_t dir_len = strlen(dir);
    size_t bytes = dir_len + strlen(name) + 2;
    char *path = rf_alloc(bytes);
    bool has_slash = dir_len > 0 && dir[dir_len - 1] == '/';
    if (path) snprintf(path, bytes, "%s%s%s", dir, dir_len == 0 || has_slash ? "" : "/", name);
    return path;
}
