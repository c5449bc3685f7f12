/* core/weights.c - safetensors, opened without trusting a byte of it.
 *
 * Source   https://github.com/huggingface/safetensors, format section. Differs: a duplicate name is an error here.
 * The header has its own small parser rather than cJSON: offsets and dims need all 64 bits (cJSON keeps doubles), and a
 * hostile header of 100 MB must not become millions of tree nodes. Depth is fixed by the grammar, so nothing recurses:
 *     { "name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ..., "__metadata__": {"k": "v", ...} }
 * Pitfall  a map can only be read as long as nobody shortens the file behind it. */
#include "core/weights.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "core/file.h"
#include "core/json_internal.h"
#include "core/memory.h"

#define MAX_HEADER_BYTES ((uint64_t)100 * 1000 * 1000) /* the limit of the reference implementation */
#define MAX_SHARDS       10000
#define MAX_DTYPE_LEN    15

typedef struct {
    const char *name; /* in the shard's pool */
    char dtype_name[MAX_DTYPE_LEN + 1];
    rf_dtype dtype; /* RF_DTYPE_COUNT: known or unknown to the format, but not read here */
    uint32_t rank;
    uint32_t shard;
    int64_t shape[RF_MAX_RANK]; /* the first dims; rank may be larger */
    uint64_t num_elems;
    uint64_t begin, end; /* in the data section */
    const char *data;
    void *copy; /* owned: the bytes moved to an aligned place, NULL for nearly every file */
} entry;

typedef struct {
    char *file_name;   /* owned; for messages */
    const char *bytes; /* the whole file */
    size_t num_bytes;
    void *map;  /* munmap'd, NULL if the bytes are borrowed */
    char *pool; /* owned: decoded names and metadata */
} shard;

struct rf_weights {
    char *name; /* owned; what the caller opened */
    shard *shards;
    size_t num_shards;
    entry *entries; /* by name */
    size_t num_entries;
    size_t max_entries;
    size_t total_bytes;
    rf_dtype main_dtype;
    const char **metadata; /* key, value, key, value ... of the first shard */
    size_t num_metadata;
    size_t max_metadata;
};

/* ---- dtypes of the format ---- */

static const struct {
    const char *name;
    unsigned bits;
    rf_dtype dtype;
} format_dtypes[] = {
    {"F32", 32, RF_DTYPE_F32},      {"F16", 16, RF_DTYPE_F16},      {"BF16", 16, RF_DTYPE_BF16},
    {"I32", 32, RF_DTYPE_I32},      {"I64", 64, RF_DTYPE_I64},      {"U8", 8, RF_DTYPE_U8},
    {"F64", 64, RF_DTYPE_COUNT},    {"F8_E4M3", 8, RF_DTYPE_COUNT}, {"F8_E5M2", 8, RF_DTYPE_COUNT},
    {"F8_E8M0", 8, RF_DTYPE_COUNT}, {"F4", 4, RF_DTYPE_COUNT},      {"F6_E2M3", 6, RF_DTYPE_COUNT},
    {"I8", 8, RF_DTYPE_COUNT},      {"F6_E3M2", 6, RF_DTYPE_COUNT}, {"I16", 16, RF_DTYPE_COUNT},
    {"U16", 16, RF_DTYPE_COUNT},    {"U32", 32, RF_DTYPE_COUNT},    {"U64", 64, RF_DTYPE_COUNT},
    {"BOOL", 8, RF_DTYPE_COUNT},    {"C64", 64, RF_DTYPE_COUNT},
};

/* Bits of an element, 0 for a dtype that this list does not know. */
static unsigned format_dtype(const char *name, rf_dtype *dtype) {
    for (size_t i = 0; i < sizeof format_dtypes / sizeof *format_dtypes; i++) {
        if (strcmp(name, format_dtypes[i].name) == 0) {
            *dtype = format_dtypes[i].dtype;
            return format_dtypes[i].bits;
        }
    }
    *dtype = RF_DTYPE_COUNT;
    return 0;
}

/* ---- header parser ---- */

typedef struct {
    const char *file; /* for messages */
    const char *text;
    size_t len;
    size_t at;
    char *pool; /* where decoded strings go; never more bytes than the header has */
    size_t pool_used;
    rf_error *err;
} parser;

static rf_status bad(parser *p, const char *what) {
    return rf_fail(p->err, RF_ERR_FORMAT, "%s: header byte %zu: %s", p->file, p->at, what);
}

static void skip_space(parser *p) {
    while (p->at < p->len && memchr(" \t\r\n", p->text[p->at], 4)) p->at++;
}

/* Takes `c` if it comes next. */
static bool take(parser *p, char c) {
    skip_space(p);
    if (p->at >= p->len || p->text[p->at] != c) return false;
    p->at++;
    return true;
}

static rf_status expect(parser *p, char c) {
    const char what[] = {'\'', c, '\'', ' ', 'e', 'x', 'p', 'e', 'c', 't', 'e', 'd', 0};
    return take(p, c) ? RF_OK : bad(p, what);
}

static bool take_hex4(parser *p, uint32_t *code) {
    if (p->len - p->at < 4) return false;
    *code = 0;
    for (int i = 0; i < 4; i++) {
        char c = p->text[p->at + (size_t)i];
        int digit = c >= '0' && c <= '9'   ? c - '0'
                    : c >= 'a' && c <= 'f' ? c - 'a' + 10
                    : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                           : -1;
        if (digit < 0) return false;
        *code = *code * 16 + (uint32_t)digit;
    }
    p->at += 4;
    return true;
}

static void put_utf8(parser *p, uint32_t code) {
    char *out = p->pool + p->pool_used;
    if (code < 0x80) {
        out[0] = (char)code;
        p->pool_used += 1;
    } else if (code < 0x800) {
        out[0] = (char)(0xc0 | (code >> 6));
        out[1] = (char)(0x80 | (code & 0x3f));
        p->pool_used += 2;
    } else if (code < 0x10000) {
        out[0] = (char)(0xe0 | (code >> 12));
        out[1] = (char)(0x80 | ((code >> 6) & 0x3f));
        out[2] = (char)(0x80 | (code & 0x3f));
        p->pool_used += 3;
    } else {
        out[0] = (char)(0xf0 | (code >> 18));
        out[1] = (char)(0x80 | ((code >> 12) & 0x3f));
        out[2] = (char)(0x80 | ((code >> 6) & 0x3f));
        out[3] = (char)(0x80 | (code & 0x3f));
        p->pool_used += 4;
    }
}

/* After the backslash. */
static rf_status take_escape(parser *p) {
    static const char from[] = "\"\\/bfnrt", to[] = "\"\\/\b\f\n\r\t";
    if (p->at >= p->len) return bad(p, "the header ends inside a string");
    char c = p->text[p->at++];
    const char *simple = c ? strchr(from, c) : NULL;
    if (simple) {
        p->pool[p->pool_used++] = to[simple - from];
        return RF_OK;
    }
    uint32_t code = 0, low = 0;
    if (c != 'u' || !take_hex4(p, &code)) return bad(p, "unknown escape in a string");
    if (code >= 0xd800 && code <= 0xdbff) {
        bool pair = p->len - p->at >= 2 && p->text[p->at] == '\\' && p->text[p->at + 1] == 'u';
        if (pair) p->at += 2;
        if (!pair || !take_hex4(p, &low) || low < 0xdc00 || low > 0xdfff) return bad(p, "half of a surrogate pair");
        code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
    } else if (code >= 0xdc00 && code <= 0xdfff) {
        return bad(p, "half of a surrogate pair");
    }
    if (code == 0) return bad(p, "a zero character inside a string");
    put_utf8(p, code);
    return RF_OK;
}

/* Decodes a string into the pool. A string of n raw bytes with its quotes takes at most n - 1 pool bytes. */
static rf_status take_string(parser *p, const char **out) {
    if (!take(p, '"')) return bad(p, "a string was expected");
    size_t start = p->pool_used;
    for (;;) {
        if (p->at >= p->len) return bad(p, "the header ends inside a string");
        unsigned char c = (unsigned char)p->text[p->at];
        if (c == '"') break;
        if (c == '\\') {
            p->at++;
            rf_status st = take_escape(p);
            if (st != RF_OK) return st;
            continue;
        }
        size_t len = rf_utf8_sequence(p->text + p->at, p->len - p->at);
        if (len == 0 || c < 0x20) return bad(p, "a string that is not valid UTF-8 text");
        memcpy(p->pool + p->pool_used, p->text + p->at, len);
        p->pool_used += len;
        p->at += len;
    }
    p->at++;
    p->pool[p->pool_used++] = 0;
    *out = p->pool + start;
    return RF_OK;
}

/* A whole number 0..INT64_MAX; no sign, fraction or exponent. */
static rf_status take_size(parser *p, uint64_t *out) {
    skip_space(p);
    size_t start = p->at;
    uint64_t value = 0;
    while (p->at < p->len && p->text[p->at] >= '0' && p->text[p->at] <= '9') {
        if (__builtin_mul_overflow(value, (uint64_t)10, &value) ||
            __builtin_add_overflow(value, (uint64_t)(p->text[p->at] - '0'), &value) || value > INT64_MAX) {
            return bad(p, "a number beyond 2^63 - 1");
        }
        p->at++;
    }
    bool leading_zero = p->at - start > 1 && p->text[start] == '0';
    if (p->at == start || leading_zero) return bad(p, "a whole number, zero or more, was expected");
    *out = value;
    return RF_OK;
}

static rf_status take_dtype(parser *p, entry *e) {
    size_t pool_used = p->pool_used;
    const char *name;
    rf_status st = take_string(p, &name);
    if (st != RF_OK) return st;
    if (strlen(name) > MAX_DTYPE_LEN) return bad(p, "a dtype name of more than 15 bytes");
    snprintf(e->dtype_name, sizeof e->dtype_name, "%s", name);
    p->pool_used = pool_used;
    return RF_OK;
}

static rf_status take_shape(parser *p, entry *e) {
    rf_status st = expect(p, '[');
    if (st != RF_OK) return st;
    e->rank = 0;
    e->num_elems = 1;
    if (take(p, ']')) return RF_OK;
    do {
        uint64_t dim;
        st = take_size(p, &dim);
        if (st != RF_OK) return st;
        if (__builtin_mul_overflow(e->num_elems, dim, &e->num_elems) || e->num_elems > INT64_MAX) {
            return bad(p, "a shape whose product is beyond 2^63 - 1");
        }
        if (e->rank < RF_MAX_RANK) e->shape[e->rank] = (int64_t)dim;
        e->rank++;
    } while (take(p, ','));
    return expect(p, ']');
}

static rf_status take_offsets(parser *p, entry *e) {
    rf_status st = expect(p, '[');
    if (st == RF_OK) st = take_size(p, &e->begin);
    if (st == RF_OK) st = expect(p, ',');
    if (st == RF_OK) st = take_size(p, &e->end);
    if (st == RF_OK) st = expect(p, ']');
    return st;
}

/* The value of one tensor: each of three keys once, in any order. */
static rf_status take_tensor(parser *p, entry *e) {
    static const char *const keys[] = {"dtype", "shape", "data_offsets"};
    unsigned seen = 0;
    rf_status st = expect(p, '{');
    if (st != RF_OK) return st;
    do {
        size_t pool_used = p->pool_used;
        const char *key;
        unsigned which = 0;
        st = take_string(p, &key);
        if (st != RF_OK) return st;
        while (which < 3 && strcmp(key, keys[which]) != 0) which++;
        p->pool_used = pool_used;
        if (which == 3) return bad(p, "a tensor has a key other than dtype, shape and data_offsets");
        if (seen & (1u << which)) return bad(p, "a tensor has a key twice");
        seen |= 1u << which;
        st = expect(p, ':');
        if (st == RF_OK && which == 0) st = take_dtype(p, e);
        if (st == RF_OK && which == 1) st = take_shape(p, e);
        if (st == RF_OK && which == 2) st = take_offsets(p, e);
        if (st != RF_OK) return st;
    } while (take(p, ','));
    st = expect(p, '}');
    if (st == RF_OK && seen != 7) st = bad(p, "a tensor lacks dtype, shape or data_offsets");
    return st;
}

/* Makes room for one more element of an array that doubles. */
static rf_status grow(parser *p, void **array, size_t num, size_t *max, size_t elem_bytes) {
    if (num < *max) return RF_OK;
    size_t new_max = *max ? *max * 2 : 256, bytes;
    void *grown = __builtin_mul_overflow(new_max, elem_bytes, &bytes) ? NULL : rf_realloc(*array, bytes);
    if (!grown) return rf_fail(p->err, RF_ERR_MEMORY, "%s: no memory for a list of %zu tensors", p->file, new_max);
    *array = grown;
    *max = new_max;
    return RF_OK;
}

/* Texts of __metadata__; those of later shards are checked and dropped. */
static rf_status take_metadata(parser *p, rf_weights *w, bool keep) {
    rf_status st = expect(p, '{');
    if (st != RF_OK) return st;
    if (take(p, '}')) return RF_OK;
    do {
        const char *key, *value;
        void *list = w->metadata;
        st = take_string(p, &key);
        if (st == RF_OK) st = expect(p, ':');
        if (st == RF_OK) st = take_string(p, &value);
        if (st == RF_OK && keep) st = grow(p, &list, w->num_metadata, &w->max_metadata, 2 * sizeof *w->metadata);
        if (st != RF_OK) return st;
        if (!keep) continue;
        w->metadata = list;
        w->metadata[2 * w->num_metadata] = key;
        w->metadata[2 * w->num_metadata + 1] = value;
        w->num_metadata++;
    } while (take(p, ','));
    return expect(p, '}');
}

static rf_status take_header(parser *p, rf_weights *w, uint32_t shard_idx) {
    bool seen_metadata = false;
    rf_status st;
    if (p->len == 0 || p->text[0] != '{') return bad(p, "'{' expected");
    p->at = 1;
    if (!take(p, '}')) {
        do {
            const char *name;
            st = take_string(p, &name);
            if (st == RF_OK) st = expect(p, ':');
            if (st != RF_OK) return st;
            if (strcmp(name, "__metadata__") == 0) {
                if (seen_metadata) return bad(p, "__metadata__ is there twice");
                seen_metadata = true;
                st = take_metadata(p, w, shard_idx == 0);
                if (st != RF_OK) return st;
                continue;
            }
            void *list = w->entries;
            st = grow(p, &list, w->num_entries, &w->max_entries, sizeof *w->entries);
            w->entries = list;
            if (st != RF_OK) return st;
            entry *e = &w->entries[w->num_entries];
            *e = (entry){.name = name, .shard = shard_idx};
            st = take_tensor(p, e);
            if (st != RF_OK) return st;
            w->num_entries++;
        } while (take(p, ','));
        st = expect(p, '}');
        if (st != RF_OK) return st;
    }
    skip_space(p);
    return p->at == p->len ? RF_OK : bad(p, "something follows the closing brace");
}

/* ---- one shard ---- */

static int by_offset(const void *a, const void *b) {
    const entry *x = a, *y = b;
    if (x->begin != y->begin) return x->begin < y->begin ? -1 : 1;
    return (x->end > y->end) - (x->end < y->end); /* an empty tensor comes before what starts at the same byte */
}

static int by_name(const void *a, const void *b) {
    return strcmp(((const entry *)a)->name, ((const entry *)b)->name);
}

/* Sizes, and that the tensors tile the data section exactly. */
static rf_status check_entries(const shard *s, entry *entries, size_t num, const char *data, uint64_t data_bytes,
                               rf_error *err) {
    if (num) qsort(entries, num, sizeof *entries, by_offset);
    uint64_t covered = 0;
    for (size_t i = 0; i < num; i++) {
        entry *e = &entries[i];
        unsigned bits = format_dtype(e->dtype_name, &e->dtype);
        uint64_t total_bits;
        if (e->begin > e->end || e->end > data_bytes) {
            return rf_fail(err, RF_ERR_FORMAT,
                           "%s: tensor '%s': data_offsets [%" PRIu64 ", %" PRIu64 "] do not lie in %" PRIu64
                           " bytes of data",
                           s->file_name, e->name, e->begin, e->end, data_bytes);
        }
        if (e->begin != covered) {
            return rf_fail(err, RF_ERR_FORMAT,
                           "%s: tensor '%s' starts at byte %" PRIu64 ", the one before it ends at %" PRIu64,
                           s->file_name, e->name, e->begin, covered);
        }
        if (bits != 0) {
            bool overflow = __builtin_mul_overflow(e->num_elems, (uint64_t)bits, &total_bits);
            if (overflow || total_bits % 8 != 0 || total_bits / 8 != e->end - e->begin) {
                return rf_fail(err, RF_ERR_FORMAT,
                               "%s: tensor '%s': %" PRIu64 " elements of %s do not take the %" PRIu64
                               " bytes of its offsets",
                               s->file_name, e->name, e->num_elems, e->dtype_name, e->end - e->begin);
            }
        }
        e->data = data + e->begin;
        covered = e->end;
    }
    if (covered != data_bytes) {
        return rf_fail(err, RF_ERR_FORMAT, "%s: tensors cover %" PRIu64 " of %" PRIu64 " bytes of data", s->file_name,
                       covered, data_bytes);
    }
    return RF_OK;
}

/* A view must be aligned for its dtype. The format's writers see to that; a file that does not costs a copy. */
static rf_status align_entries(const shard *s, entry *entries, size_t num, rf_error *err) {
    for (size_t i = 0; i < num; i++) {
        entry *e = &entries[i];
        size_t bytes = (size_t)(e->end - e->begin);
        if (e->dtype == RF_DTYPE_COUNT || (uintptr_t)e->data % rf_dtype_bytes(e->dtype) == 0) continue;
        e->copy = rf_alloc(bytes);
        if (!e->copy) {
            return rf_fail(err, RF_ERR_MEMORY, "%s: tensor '%s': no memory to align its %zu bytes", s->file_name,
                           e->name, bytes);
        }
        if (bytes) memcpy(e->copy, e->data, bytes);
        e->data = e->copy;
    }
    return RF_OK;
}

/* s->bytes are there; reads the header and appends its tensors to w. */
static rf_status read_shard(rf_weights *w, uint32_t shard_idx, rf_error *err) {
    shard *s = &w->shards[shard_idx];
    if (s->num_bytes < 8) {
        return rf_fail(err, RF_ERR_FORMAT, "%s: %zu bytes are too few for a safetensors file", s->file_name,
                       s->num_bytes);
    }
    uint64_t header_bytes = 0;
    for (int i = 7; i >= 0; i--) header_bytes = header_bytes << 8 | (unsigned char)s->bytes[i];
    if (header_bytes > MAX_HEADER_BYTES) {
        return rf_fail(err, RF_ERR_FORMAT,
                       "%s: not a safetensors file: its header would be %" PRIu64 " bytes, the limit is %" PRIu64,
                       s->file_name, header_bytes, MAX_HEADER_BYTES);
    }
    if (header_bytes > s->num_bytes - 8) {
        return rf_fail(err, RF_ERR_FORMAT, "%s: the header needs %" PRIu64 " bytes, the file has %zu after its length",
                       s->file_name, header_bytes, s->num_bytes - 8);
    }
    s->pool = rf_alloc((size_t)header_bytes + 1);
    if (!s->pool)
        return rf_fail(err, RF_ERR_MEMORY, "%s: no memory for %" PRIu64 " bytes of names", s->file_name, header_bytes);
    parser p = {.file = s->file_name, .text = s->bytes + 8, .len = (size_t)header_bytes, .pool = s->pool, .err = err};
    size_t first = w->num_entries;
    rf_status st = take_header(&p, w, shard_idx);
    if (st != RF_OK) return st;
    size_t num = w->num_entries - first;
    const char *data = s->bytes + 8 + header_bytes;
    entry *added = w->entries ? w->entries + first : NULL; /* NULL: no tensor so far */
    st = check_entries(s, added, num, data, s->num_bytes - 8 - header_bytes, err);
    if (st == RF_OK) st = align_entries(s, added, num, err);
    return st;
}

static rf_status map_shard(shard *s, const char *path, rf_error *err) {
    s->file_name = rf_strdup(path);
    if (!s->file_name) return rf_fail(err, RF_ERR_MEMORY, "%s: no memory", path);
    struct stat info;
    rf_status st = RF_OK;
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0) {
        st = errno == ENOENT ? RF_ERR_MISSING : RF_ERR_IO;
        return rf_fail(err, st, "%s: cannot open: %s", path, strerror(errno));
    }
    if (fstat(fd, &info) != 0 || !S_ISREG(info.st_mode)) {
        st = rf_fail(err, RF_ERR_IO, "%s: is not a regular file", path);
    } else if (info.st_size < 8 || (uintmax_t)info.st_size > PTRDIFF_MAX) {
        st = rf_fail(err, RF_ERR_FORMAT, "%s: %jd bytes are too few for a safetensors file", path,
                     (intmax_t)info.st_size);
    } else {
        void *map = mmap(NULL, (size_t)info.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
        if (map == MAP_FAILED) {
            st = rf_fail(err, RF_ERR_IO, "%s: cannot map %jd bytes: %s", path, (intmax_t)info.st_size, strerror(errno));
        } else {
            s->map = map;
            s->bytes = map;
            s->num_bytes = (size_t)info.st_size;
        }
    }
    close(fd);
    return st;
}

/* ---- the whole ---- */

static rf_status create(rf_weights **out, const char *name, size_t num_shards, rf_error *err) {
    rf_weights *w = rf_alloc_zero(1, sizeof *w);
    if (w) {
        w->name = rf_strdup(name);
        w->shards = rf_alloc_zero(num_shards, sizeof *w->shards);
        w->num_shards = num_shards;
    }
    *out = w;
    return w && w->name && w->shards ? RF_OK : rf_fail(err, RF_ERR_MEMORY, "%s: no memory", name);
}

/* After all shards are read: order, duplicates, sums. */
static rf_status finish(rf_weights *w, rf_error *err) {
    size_t counts[RF_DTYPE_COUNT + 1] = {0};
    if (w->num_entries) qsort(w->entries, w->num_entries, sizeof *w->entries, by_name);
    for (size_t i = 0; i < w->num_entries; i++) {
        const entry *e = &w->entries[i];
        if (i > 0 && strcmp(e->name, e[-1].name) == 0) {
            return rf_fail(err, RF_ERR_FORMAT, "%s: tensor '%s' is there twice", w->name, e->name);
        }
        w->total_bytes += (size_t)(e->end - e->begin);
        counts[e->dtype]++;
    }
    w->main_dtype = RF_DTYPE_COUNT;
    size_t most = 0;
    for (int d = 0; d < RF_DTYPE_COUNT; d++) {
        if (counts[d] > most) {
            most = counts[d];
            w->main_dtype = (rf_dtype)d;
        }
    }
    return RF_OK;
}

void rf_weights_close(rf_weights *w) {
    if (!w) return;
    for (size_t i = 0; i < w->num_entries; i++) rf_free(w->entries[i].copy);
    for (size_t i = 0; w->shards && i < w->num_shards; i++) {
        shard *s = &w->shards[i];
        if (s->map) munmap(s->map, s->num_bytes);
        rf_free(s->file_name);
        rf_free(s->pool);
    }
    rf_free(w->shards);
    rf_free(w->entries);
    rf_free(w->metadata);
    rf_free(w->name);
    rf_free(w);
}

rf_status rf_weights_open_memory(rf_weights **out, const void *bytes, size_t num_bytes, const char *name,
                                 rf_error *err) {
    *out = NULL;
    rf_weights *w = NULL;
    rf_status st = create(&w, name, 1, err);
    if (st == RF_OK) {
        shard *s = &w->shards[0];
        s->bytes = bytes;
        s->num_bytes = num_bytes;
        s->file_name = rf_strdup(name);
        st = s->file_name ? read_shard(w, 0, err) : rf_fail(err, RF_ERR_MEMORY, "%s: no memory", name);
    }
    if (st == RF_OK) st = finish(w, err);
    if (st != RF_OK) {
        rf_weights_close(w);
        return st;
    }
    *out = w;
    return RF_OK;
}

static rf_status open_single(rf_weights **out, const char *path, rf_error *err) {
    rf_weights *w = NULL;
    rf_status st = create(&w, path, 1, err);
    if (st == RF_OK) st = map_shard(&w->shards[0], path, err);
    if (st == RF_OK) st = read_shard(w, 0, err);
    if (st == RF_OK) st = finish(w, err);
    if (st != RF_OK) {
        rf_weights_close(w);
        return st;
    }
    *out = w;
    return RF_OK;
}

/* ---- an index and its shards ---- */

typedef struct {
    const char *name;       /* tensor; borrowed from the JSON */
    const char *shard_name; /* file; borrowed from the JSON */
} mapping;

static int by_shard(const void *a, const void *b) {
    return strcmp(((const mapping *)a)->shard_name, ((const mapping *)b)->shard_name);
}

static int by_mapping_name(const void *a, const void *b) {
    return strcmp(((const mapping *)a)->name, ((const mapping *)b)->name);
}

static bool is_plain_file_name(const char *name) {
    size_t len = strlen(name);
    return len > 0 && len <= NAME_MAX && !strchr(name, '/') && strcmp(name, ".") != 0 && strcmp(name, "..") != 0;
}

static rf_status read_weight_map(const rf_json *doc, mapping **out, size_t *out_num, rf_error *err) {
    const rf_json_value *map = rf_json_get(rf_json_root(doc), "weight_map");
    if (!map) return rf_fail(err, RF_ERR_MISSING, "%s: key 'weight_map' is missing", rf_json_name(doc));
    if (!rf_json_is_object(map)) {
        return rf_fail(err, RF_ERR_FORMAT, "%s: 'weight_map' is not an object", rf_json_name(doc));
    }
    size_t num = rf_json_count(map), i = 0;
    mapping *list = rf_alloc_zero(num, sizeof *list);
    if (!list) return rf_fail(err, RF_ERR_MEMORY, "%s: no memory for %zu names", rf_json_name(doc), num);
    *out = list;
    *out_num = num;
    for (const rf_json_value *v = rf_json_first(map); v; v = rf_json_next(v), i++) {
        list[i] = (mapping){rf_json_key(v), rf_json_string(v)};
        if (!list[i].shard_name || !is_plain_file_name(list[i].shard_name)) {
            return rf_fail(err, RF_ERR_FORMAT, "%s: the file of tensor '%s' must be a plain file name, found '%s'",
                           rf_json_name(doc), list[i].name, list[i].shard_name ? list[i].shard_name : "no string");
        }
    }
    if (num) qsort(list, num, sizeof *list, by_shard);
    return RF_OK;
}

/* list in shard order; gives w its shards and reads them. */
static rf_status read_shards(rf_weights *w, const char *folder, const mapping *list, size_t num, rf_error *err) {
    size_t shard_idx = 0;
    for (size_t i = 0; i < num; i++) {
        if (i > 0 && strcmp(list[i].shard_name, list[i - 1].shard_name) == 0) continue;
        char *path = rf_path_join(folder, list[i].shard_name);
        if (!path) return rf_fail(err, RF_ERR_MEMORY, "%s: no memory", w->name);
        rf_status st = map_shard(&w->shards[shard_idx], path, err);
        rf_free(path);
        if (st == RF_OK) st = read_shard(w, (uint32_t)shard_idx, err);
        if (st != RF_OK) return st;
        shard_idx++;
    }
    return RF_OK;
}

/* Both lists in name order: the index and the files must name the same tensors in the same files. */
static rf_status compare_with_index(const rf_weights *w, const mapping *list, size_t num, rf_error *err) {
    size_t i = 0, j = 0;
    while (i < num || j < w->num_entries) {
        int order = i == num ? 1 : j == w->num_entries ? -1 : strcmp(list[i].name, w->entries[j].name);
        if (order < 0) {
            return rf_fail(err, RF_ERR_MISSING, "%s: tensor '%s' is not in %s", w->name, list[i].name,
                           list[i].shard_name);
        }
        const entry *e = &w->entries[j];
        const char *file = w->shards[e->shard].file_name;
        if (order > 0) {
            return rf_fail(err, RF_ERR_FORMAT, "%s: tensor '%s' of %s is not in the index", w->name, e->name, file);
        }
        const char *slash = strrchr(file, '/');
        if (strcmp(slash ? slash + 1 : file, list[i].shard_name) != 0) {
            return rf_fail(err, RF_ERR_MISSING, "%s: tensor '%s' is in %s, not in %s", w->name, e->name, file,
                           list[i].shard_name);
        }
        i++;
        j++;
        if (i < num && strcmp(list[i].name, list[i - 1].name) == 0) {
            return rf_fail(err, RF_ERR_FORMAT, "%s: tensor '%s' is in the index twice", w->name, list[i].name);
        }
    }
    return RF_OK;
}

static rf_status open_index(rf_weights **out, const char *path, rf_error *err) {
    rf_weights *w = NULL;
    rf_json *doc = NULL;
    mapping *list = NULL;
    char *folder = rf_strdup(path);
    size_t num = 0, num_shards = 0;
    rf_status st = folder ? rf_json_open(&doc, path, err) : rf_fail(err, RF_ERR_MEMORY, "%s: no memory", path);
    if (st == RF_OK) st = read_weight_map(doc, &list, &num, err);
    if (st != RF_OK) goto done;

    for (size_t i = 0; i < num; i++) num_shards += i == 0 || strcmp(list[i].shard_name, list[i - 1].shard_name) != 0;
    if (num_shards == 0 || num_shards > MAX_SHARDS) {
        st = rf_fail(err, RF_ERR_FORMAT, "%s: names %zu files, 1 to %d are allowed", path, num_shards, MAX_SHARDS);
        goto done;
    }
    char *slash = strrchr(folder, '/');
    if (slash) {
        slash[1] = 0;
    } else {
        folder[0] = 0;
    }
    st = create(&w, path, num_shards, err);
    if (st == RF_OK) st = read_shards(w, folder, list, num, err);
    if (st == RF_OK) st = finish(w, err);
    if (st != RF_OK) goto done;
    qsort(list, num, sizeof *list, by_mapping_name);
    st = compare_with_index(w, list, num, err);
    if (st != RF_OK) goto done;
    *out = w;
    w = NULL;
done:
    rf_weights_close(w);
    rf_json_close(doc);
    rf_free(list);
    rf_free(folder);
    return st;
}

/* ---- choosing a file in a folder ---- */

#define SINGLE_SUFFIX ".safetensors"
#define INDEX_SUFFIX  ".safetensors.index.json"

static bool ends_with(const char *s, const char *suffix) {
    size_t len = strlen(s), suffix_len = strlen(suffix);
    return len >= suffix_len && strcmp(s + len - suffix_len, suffix) == 0;
}

/* "model.fp16.safetensors" is a variant of "model.safetensors". */
static bool is_variant_of(const char *name, const char *plain, const char *suffix) {
    size_t stem_len = strlen(plain) - strlen(suffix);
    return strcmp(name, plain) != 0 && strncmp(name, plain, stem_len) == 0 && name[stem_len] == '.';
}

typedef struct {
    char **names;
    size_t num;
} name_list;

static int by_string(const void *a, const void *b) {
    return strcmp(*(char *const *)a, *(char *const *)b);
}

static void free_names(name_list *list) {
    for (size_t i = 0; i < list->num; i++) rf_free(list->names[i]);
    rf_free(list->names);
}

/* The names of a folder that end in suffix, sorted. */
static rf_status list_folder(name_list *list, const char *folder, const char *suffix, rf_error *err) {
    rf_status st = RF_OK;
    struct dirent *item;
    DIR *dir = opendir(folder);
    if (!dir) return rf_fail(err, RF_ERR_IO, "%s: cannot read the folder: %s", folder, strerror(errno));
    while (st == RF_OK && (item = readdir(dir)) != NULL) {
        if (!ends_with(item->d_name, suffix) || item->d_name[0] == '.') continue;
        char **grown = rf_realloc(list->names, (list->num + 1) * sizeof *grown);
        char *name = grown ? rf_strdup(item->d_name) : NULL;
        if (grown) list->names = grown;
        if (name) {
            list->names[list->num++] = name;
        } else {
            st = rf_fail(err, RF_ERR_MEMORY, "%s: no memory for a list of files", folder);
        }
    }
    closedir(dir);
    if (list->num) qsort(list->names, list->num, sizeof *list->names, by_string);
    return st;
}

/* The one name that is no variant of another; NULL if there is none, RF_ERR_CONFIG if there are two. */
static rf_status choose(const name_list *list, const char *folder, const char *suffix, const char **chosen,
                        rf_error *err) {
    *chosen = NULL;
    for (size_t i = 0; i < list->num; i++) {
        bool variant = false;
        for (size_t j = 0; j < list->num && !variant; j++)
            variant = is_variant_of(list->names[i], list->names[j], suffix);
        if (variant) continue;
        if (*chosen) {
            return rf_fail(err, RF_ERR_CONFIG, "%s: holds both %s and %s; name the one to open", folder, *chosen,
                           list->names[i]);
        }
        *chosen = list->names[i];
    }
    return RF_OK;
}

static rf_status open_folder(rf_weights **out, const char *folder, rf_error *err) {
    static const char *const suffixes[] = {INDEX_SUFFIX, SINGLE_SUFFIX};
    rf_status st = RF_OK;
    for (int i = 0; i < 2; i++) {
        name_list list = {0};
        const char *chosen = NULL;
        char *path = NULL;
        st = list_folder(&list, folder, suffixes[i], err);
        if (st == RF_OK) st = choose(&list, folder, suffixes[i], &chosen, err);
        if (st == RF_OK && chosen) {
            path = rf_path_join(folder, chosen);
            st = path ? (i == 0 ? open_index : open_single)(out, path, err)
                      : rf_fail(err, RF_ERR_MEMORY, "%s: no memory", folder);
        }
        bool found = chosen != NULL;
        rf_free(path);
        free_names(&list);
        if (st != RF_OK || found) return st;
    }
    return rf_fail(err, RF_ERR_MISSING, "%s: holds no .safetensors file and no .safetensors.index.json", folder);
}

rf_status rf_weights_open(rf_weights **out, const char *path, rf_error *err) {
    *out = NULL;
    if (rf_path_is_dir(path)) return open_folder(out, path, err);
    if (ends_with(path, ".json")) return open_index(out, path, err);
    return open_single(out, path, err);
}

/* ---- getters ---- */

size_t rf_weights_count(const rf_weights *w) {
    return w->num_entries;
}
const char *rf_weights_name(const rf_weights *w, size_t index) {
    return index < w->num_entries ? w->entries[index].name : NULL;
}

static const entry *find(const rf_weights *w, const char *name) {
    const entry key = {.name = name};
    return w->num_entries ? bsearch(&key, w->entries, w->num_entries, sizeof key, by_name) : NULL;
}

bool rf_weights_has(const rf_weights *w, const char *name) {
    return find(w, name) != NULL;
}
size_t rf_weights_total_bytes(const rf_weights *w) {
    return w->total_bytes;
}
rf_dtype rf_weights_main_dtype(const rf_weights *w) {
    return w->main_dtype;
}

rf_status rf_weights_get(const rf_weights *w, const char *name, rf_tensor *out, rf_error *err) {
    memset(out, 0, sizeof *out);
    const entry *e = find(w, name);
    if (!e) return rf_fail(err, RF_ERR_MISSING, "%s: tensor '%s' is missing", w->name, name);
    if (e->dtype == RF_DTYPE_COUNT) {
        return rf_fail(err, RF_ERR_DTYPE, "%s: tensor '%s' has dtype %s, which is not read", w->name, name,
                       e->dtype_name);
    }
    if (e->rank > RF_MAX_RANK) {
        return rf_fail(err, RF_ERR_SHAPE, "%s: tensor '%s' has %u dims, at most %d are read", w->name, name, e->rank,
                       RF_MAX_RANK);
    }
    out->data = (void *)e->data; /* a view: read-only behind the map */
    out->dtype = e->dtype;
    out->rank = (int)e->rank;
    for (int i = 0; i < out->rank; i++) out->shape[i] = e->shape[i];
    return RF_OK;
}

/* "[2, ?, 4]" */
static void print_shape(char *text, size_t text_bytes, int rank, const int64_t *shape) {
    size_t used = (size_t)snprintf(text, text_bytes, "[");
    for (int i = 0; i < rank && used < text_bytes; i++) {
        const char *comma = i ? ", " : "";
        used += (size_t)(shape[i] < 0 ? snprintf(text + used, text_bytes - used, "%s?", comma)
                                      : snprintf(text + used, text_bytes - used, "%s%" PRId64, comma, shape[i]));
    }
    if (used < text_bytes) snprintf(text + used, text_bytes - used, "]");
}

rf_status rf_weights_get_shaped(const rf_weights *w, const char *name, int rank, const int64_t *shape, rf_tensor *out,
                                rf_error *err) {
    rf_status st = rf_weights_get(w, name, out, err);
    if (st != RF_OK) return st;
    bool same = rank == out->rank;
    for (int i = 0; same && i < rank; i++) same = shape[i] == -1 || shape[i] == out->shape[i];
    if (same) return RF_OK;
    char wanted[160], found[160];
    print_shape(wanted, sizeof wanted, rank, shape);
    print_shape(found, sizeof found, out->rank, out->shape);
    return rf_fail(err, RF_ERR_SHAPE, "%s: tensor '%s' must have shape %s, found %s", w->name, name, wanted, found);
}

const char *rf_weights_metadata(const rf_weights *w, const char *key) {
    for (size_t i = 0; i < w->num_metadata; i++) {
        if (strcmp(w->metadata[2 * i], key) == 0) return w->metadata[2 * i + 1];
    }
    return NULL;
}
