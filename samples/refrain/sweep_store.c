/* samples/refrain/sweep_store.c - one table of columns serves CSV out, CSV in and JSON. */
#include "samples/refrain/sweep_store.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <math.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <cjson/cJSON.h>

#include "core/file.h"
#include "core/json.h"
#include "core/memory.h"

#define MAX_CSV_BYTES       ((size_t)1 << 30)
#define MAX_REFERENCE_BYTES ((size_t)1 << 40)
#define MAX_HEADER_BYTES    ((size_t)1 << 20)
#define HEADER_ALIGN        64
#define JSON_EVERY_S        2

typedef enum { TEXT, NUMBER, TEXT_NUMBERS } column_type;

typedef struct {
    const char *name;
    column_type type;
    size_t offset;
    unsigned of; /* kinds of store that have it */
} column;

enum { IMAGES = 1, WORLDS = 2, TEXTS = 4, CACHES = 8, PICTURES = IMAGES | WORLDS, ALL = PICTURES | TEXTS };

#define COLUMN(field, type, of)                                                                                        \
    { #field, type, offsetof(sweep_row, field), of }
#define TEXT_COLUMN(field)     COLUMN(field, TEXT, ALL)
#define NUMBER_COLUMN(field)   COLUMN(field, NUMBER, ALL)
#define PICTURE_COLUMN(field)  COLUMN(field, NUMBER, PICTURES)
#define PICTURES_COLUMN(field) COLUMN(field, TEXT_NUMBERS, PICTURES)
#define WORLD_COLUMN(field)    COLUMN(field, NUMBER, WORLDS)
#define TOKEN_COLUMN(field)    COLUMN(field, NUMBER, TEXTS)
#define KV_COLUMN(field)       COLUMN(field, NUMBER, CACHES)

static const column columns[] = {
    TEXT_COLUMN(policy),
    TEXT_COLUMN(options),
    TEXT_COLUMN(status),
    NUMBER_COLUMN(steps),
    NUMBER_COLUMN(speedup),
    TOKEN_COLUMN(score),
    TOKEN_COLUMN(agreement),
    TOKEN_COLUMN(tok_s),
    TOKEN_COLUMN(nfe),
    TOKEN_COLUMN(row_passes),
    TOKEN_COLUMN(key_reads),
    TOKEN_COLUMN(text_tokens),
    KV_COLUMN(kept_bytes),
    KV_COLUMN(full_bytes),
    KV_COLUMN(evictions),
    KV_COLUMN(score_ms),
    KV_COLUMN(kv_budget),
    WORLD_COLUMN(plain_speedup),
    WORLD_COLUMN(frames_per_s),
    WORLD_COLUMN(kept),
    WORLD_COLUMN(frame_denoise_ms),
    WORLD_COLUMN(frame_context_ms),
    WORLD_COLUMN(frame_decode_ms),
    PICTURE_COLUMN(psnr_mean),
    PICTURE_COLUMN(psnr_median),
    PICTURE_COLUMN(psnr_worst),
    PICTURE_COLUMN(ssim_mean),
    PICTURE_COLUMN(ssim_median),
    PICTURE_COLUMN(ssim_worst),
    PICTURE_COLUMN(latent_mean),
    PICTURE_COLUMN(latent_median),
    PICTURE_COLUMN(latent_worst),
    PICTURE_COLUMN(max_abs),
    NUMBER_COLUMN(loop_ms),
    NUMBER_COLUMN(loop_min_ms),
    NUMBER_COLUMN(loop_max_ms),
    NUMBER_COLUMN(repeats),
    NUMBER_COLUMN(base_ms),
    PICTURE_COLUMN(share_steps),
    PICTURE_COLUMN(share_blocks),
    NUMBER_COLUMN(share_rows),
    PICTURE_COLUMN(steps_full),
    PICTURE_COLUMN(steps_partial),
    PICTURE_COLUMN(steps_skipped),
    NUMBER_COLUMN(cache_bytes),
    PICTURE_COLUMN(decide_ms),
    PICTURES_COLUMN(psnr_each),
    PICTURES_COLUMN(ssim_each),
    WORLD_COLUMN(worst_frame),
    WORLD_COLUMN(first_under_30),
    WORLD_COLUMN(sim_psnr),
    WORLD_COLUMN(frame_forwards),
    COLUMN(arena_bytes, NUMBER, WORLDS | TEXTS),
    COLUMN(sim_each, TEXT_NUMBERS, WORLDS),
    COLUMN(score_each, TEXT_NUMBERS, TEXTS),
    PICTURES_COLUMN(latent_each),
    COLUMN(kinds, TEXT, PICTURES),
    TEXT_COLUMN(reason),
    TEXT_COLUMN(key),
};
#define NUM_COLUMNS (sizeof columns / sizeof columns[0])

typedef struct {
    double unix_seconds, ms;
} baseline;

struct sweep_store {
    unsigned kind; /* IMAGES, WORLDS, TEXTS, or TEXTS and CACHES */
    char *folder;
    int lock;
    sweep_pin *pins;
    int num_pins;
    sweep_row *rows;
    int num, room;
    baseline *baselines;
    int num_baselines, baseline_room;
    time_t json_written;
};

/* --- small things ------------------------------------------------------------------------------------------------- */

static char **text_of(const sweep_row *row, size_t c) {
    return (char **)(void *)((char *)(uintptr_t)row + columns[c].offset);
}

static double *number_of(const sweep_row *row, size_t c) {
    return (double *)(void *)((char *)(uintptr_t)row + columns[c].offset);
}

void sweep_row_clear(sweep_row *row) {
    for (size_t c = 0; c < NUM_COLUMNS; c++) {
        if (columns[c].type == NUMBER) {
            *number_of(row, c) = NAN;
        } else {
            rf_free(*text_of(row, c));
            *text_of(row, c) = NULL;
        }
    }
}

static int compare_doubles(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

double sweep_median(const double *values, int num) {
    if (num < 1) return NAN;
    double *sorted = rf_alloc((size_t)num * sizeof *sorted);
    if (!sorted) return NAN;
    memcpy(sorted, values, (size_t)num * sizeof *sorted);
    qsort(sorted, (size_t)num, sizeof *sorted, compare_doubles);
    double median = num % 2 ? sorted[num / 2] : .5 * (sorted[num / 2 - 1] + sorted[num / 2]);
    rf_free(sorted);
    return median;
}

void sweep_key_hash(const char *key, char out[17]) {
    uint64_t h = UINT64_C(14695981039346656037);
    for (; *key; key++) h = (h ^ (unsigned char)*key) * UINT64_C(1099511628211);
    snprintf(out, 17, "%016" PRIx64, h);
}

static rf_status no_memory(rf_error *err) {
    return rf_fail(err, RF_ERR_MEMORY, "no memory for the results of the sweep");
}

static rf_status io_error(rf_error *err, const char *folder, const char *name, const char *what) {
    return rf_fail(err, RF_ERR_IO, "%s/%s: cannot %s: %s", folder, name, what, strerror(errno));
}

/* A growing text. */
typedef struct {
    char *text;
    size_t len, room;
    bool failed;
} buffer;

static void put(buffer *b, const char *text, size_t len) {
    if (b->failed) return;
    if (b->len + len + 1 > b->room) {
        size_t room = 2 * (b->len + len + 1) + 256;
        char *grown = rf_realloc(b->text, room);
        if (!grown) {
            b->failed = true;
            return;
        }
        b->text = grown;
        b->room = room;
    }
    memcpy(b->text + b->len, text, len);
    b->len += len;
    b->text[b->len] = 0;
}

static void put_text(buffer *b, const char *text) {
    put(b, text, strlen(text));
}

/* --- CSV ---------------------------------------------------------------------------------------------------------- */

static bool has_column(const sweep_store *store, size_t c) {
    return (columns[c].of & store->kind) != 0;
}

static size_t num_columns(const sweep_store *store) {
    size_t num = 0;
    for (size_t c = 0; c < NUM_COLUMNS; c++) num += has_column(store, c);
    return num;
}

static void put_header(buffer *b, const sweep_store *store) {
    for (size_t c = 0; c < NUM_COLUMNS; c++) {
        if (!has_column(store, c)) continue;
        if (c) put_text(b, ",");
        put_text(b, columns[c].name);
    }
    put_text(b, "\n");
}

/* Quoted where a reader of CSV needs it; a field is one line. */
static void put_field(buffer *b, const char *text) {
    bool quote = text[strcspn(text, ",\"\n\r")] != 0;
    if (quote) put_text(b, "\"");
    for (; *text; text++) {
        char c = *text == '\n' || *text == '\r' ? ' ' : *text;
        if (c == '"') put_text(b, "\"");
        put(b, &c, 1);
    }
    if (quote) put_text(b, "\"");
}

static void put_row(buffer *b, const sweep_store *store, const sweep_row *row) {
    for (size_t c = 0; c < NUM_COLUMNS; c++) {
        char number[40];
        if (!has_column(store, c)) continue;
        if (c) put_text(b, ",");
        if (columns[c].type != NUMBER) {
            put_field(b, *text_of(row, c));
        } else if (isfinite(*number_of(row, c))) {
            snprintf(number, sizeof number, "%.9g", *number_of(row, c));
            put_text(b, number);
        }
    }
    put_text(b, "\n");
}

/* The next field of a line, unquoted in place; NULL behind the last one or if quotes do not close. */
static char *next_field(char **at) {
    char *p = *at;
    if (!p) return NULL;
    if (*p != '"') {
        char *end = p + strcspn(p, ",");
        *at = *end ? end + 1 : NULL;
        *end = 0;
        return p;
    }
    char *to = p, *from = p + 1;
    for (; *from && !(from[0] == '"' && from[1] != '"'); from++) {
        if (from[0] == '"') from++;
        *to++ = *from;
    }
    if (*from != '"' || (from[1] && from[1] != ',')) return NULL;
    *at = from[1] ? from + 2 : NULL;
    *to = 0;
    return p;
}

static rf_status read_row(char *line, const sweep_store *store, int line_number, sweep_row *row, rf_error *err) {
    const char *folder = store->folder;
    char *at = line;
    memset(row, 0, sizeof *row);
    sweep_row_clear(row);
    for (size_t c = 0; c < NUM_COLUMNS; c++) {
        if (!has_column(store, c)) {
            if (columns[c].type == NUMBER) continue;
            *text_of(row, c) = rf_strdup("");
            if (*text_of(row, c)) continue;
            sweep_row_clear(row);
            return no_memory(err);
        }
        char *field = next_field(&at), *end = NULL;
        if (!field || (c + 1 == NUM_COLUMNS && at)) {
            sweep_row_clear(row);
            return rf_fail(err, RF_ERR_FORMAT, "%s/results.csv: line %d: expected %zu fields, found %s", folder,
                           line_number, num_columns(store), field ? "more" : "fewer or a quote that does not close");
        }
        if (columns[c].type != NUMBER) {
            *text_of(row, c) = rf_strdup(field);
            if (*text_of(row, c)) continue;
            sweep_row_clear(row);
            return no_memory(err);
        }
        if (!*field) continue;
        *number_of(row, c) = strtod(field, &end);
        if (*end) {
            rf_fail(err, RF_ERR_FORMAT, "%s/results.csv: line %d: %s: expected a number, found '%s'", folder,
                    line_number, columns[c].name, field);
            sweep_row_clear(row);
            return RF_ERR_FORMAT;
        }
    }
    return RF_OK;
}

static rf_status keep_row(sweep_store *store, sweep_row *row, rf_error *err) {
    if (store->num == store->room) {
        int room = store->room ? 2 * store->room : 64;
        sweep_row *rows = rf_realloc(store->rows, (size_t)room * sizeof *rows);
        if (!rows) {
            sweep_row_clear(row);
            return no_memory(err);
        }
        store->rows = rows;
        store->room = room;
    }
    store->rows[store->num++] = *row;
    memset(row, 0, sizeof *row);
    return RF_OK;
}

static rf_status keep_baseline(sweep_store *store, double unix_seconds, double ms, rf_error *err) {
    if (store->num_baselines == store->baseline_room) {
        int room = store->baseline_room ? 2 * store->baseline_room : 64;
        baseline *grown = rf_realloc(store->baselines, (size_t)room * sizeof *grown);
        if (!grown) return no_memory(err);
        store->baselines = grown;
        store->baseline_room = room;
    }
    store->baselines[store->num_baselines++] = (baseline){unix_seconds, ms};
    return RF_OK;
}

/* Appends text to a file of the folder and syncs it. A part that was written before an error (a full disk) is taken
 * back. */
static rf_status append_file(const sweep_store *store, const char *name, const buffer *text, rf_error *err) {
    if (text->failed) return no_memory(err);
    char *path = rf_path_join(store->folder, name);
    if (!path) return no_memory(err);
    int fd = open(path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0666);
    rf_free(path);
    if (fd < 0) return io_error(err, store->folder, name, "write");
    off_t before = lseek(fd, 0, SEEK_END);
    rf_status st = RF_OK;
    for (size_t done = 0; done < text->len && st == RF_OK;) {
        ssize_t num = write(fd, text->text + done, text->len - done);
        if (num < 0 && errno != EINTR) st = io_error(err, store->folder, name, "write");
        if (num > 0) done += (size_t)num;
    }
    if (st == RF_OK && fsync(fd) != 0 && errno != EINVAL) st = io_error(err, store->folder, name, "write");
    if (st != RF_OK && before >= 0 && ftruncate(fd, before) != 0) { /* the next start cuts the torn line off */
    }
    if (close(fd) != 0 && st == RF_OK) st = io_error(err, store->folder, name, "write");
    return st;
}

static rf_status write_file(const char *folder, const char *name, const buffer *text, rf_error *err) {
    if (text->failed) return no_memory(err);
    char *path = rf_path_join(folder, name);
    rf_status st = path ? rf_file_write(path, text->text, text->len, err) : no_memory(err);
    rf_free(path);
    return st;
}

static rf_status rewrite_results(const sweep_store *store, rf_error *err) {
    buffer b = {0};
    put_header(&b, store);
    for (int i = 0; i < store->num; i++) put_row(&b, store, &store->rows[i]);
    rf_status st = write_file(store->folder, "results.csv", &b, err);
    rf_free(b.text);
    return st;
}

/* A file of lines without the last one if that has no end. *out NULL: no such file. */
static rf_status read_lines(const sweep_store *store, const char *name, char **out, size_t *len, bool *torn,
                            rf_error *err) {
    char *path = rf_path_join(store->folder, name);
    *out = NULL;
    if (!path) return no_memory(err);
    rf_status st = rf_path_exists(path) ? rf_file_read(path, MAX_CSV_BYTES, out, len, err) : RF_OK;
    rf_free(path);
    if (st != RF_OK || !*out) return st;
    size_t whole = *len;
    while (whole > 0 && (*out)[whole - 1] != '\n') whole--;
    *torn = whole < *len;
    (*out)[whole] = 0;
    *len = whole;
    return RF_OK;
}

static rf_status load_results(sweep_store *store, rf_error *err) {
    char *text = NULL;
    size_t len = 0;
    bool changed = false;
    buffer header = {0};
    put_header(&header, store);
    rf_status st = header.failed ? no_memory(err) : read_lines(store, "results.csv", &text, &len, &changed, err);
    if (st == RF_OK && (!text || len == 0)) {
        st = rewrite_results(store, err);
    } else if (st == RF_OK && strncmp(text, header.text, header.len) != 0) {
        st = rf_fail(err, RF_ERR_FORMAT,
                     "%s/results.csv: the columns are not those of this version; name another folder", store->folder);
    } else if (st == RF_OK) {
        int line_number = 2;
        for (char *line = text + header.len; *line && st == RF_OK; line_number++) {
            sweep_row row;
            char *end = strchr(line, '\n');
            *end = 0;
            st = read_row(line, store, line_number, &row, err);
            if (st == RF_OK && sweep_store_find(store, row.key) >= 0) {
                sweep_row_clear(&row);
                changed = true;
            } else if (st == RF_OK) {
                st = keep_row(store, &row, err);
            }
            line = end + 1;
        }
        if (st == RF_OK && changed) st = rewrite_results(store, err);
    }
    rf_free(header.text);
    rf_free(text);
    return st;
}

static rf_status load_baselines(sweep_store *store, rf_error *err) {
    char *text = NULL;
    size_t len = 0;
    bool torn = false;
    rf_status st = read_lines(store, "baselines.csv", &text, &len, &torn, err);
    for (char *line = text; st == RF_OK && line && *line;) {
        char *end = strchr(line, '\n');
        double seconds, ms;
        if (sscanf(line, "%lf,%lf", &seconds, &ms) == 2)
            st = keep_baseline(store, seconds, ms, err); /* the header is not */
        line = end + 1;
    }
    if (st == RF_OK && torn) {
        buffer b = {.text = text, .len = len};
        st = write_file(store->folder, "baselines.csv", &b, err);
    }
    rf_free(text);
    return st;
}

/* --- pins --------------------------------------------------------------------------------------------------------- */

/* {"refrain_sweep":1,"settings":{...}} with more members in `root`. */
static void add_pins(cJSON *root, const sweep_store *store) {
    cJSON_AddNumberToObject(root, "refrain_sweep", 1);
    cJSON *settings = cJSON_AddObjectToObject(root, "settings");
    for (int i = 0; i < store->num_pins; i++)
        cJSON_AddStringToObject(settings, store->pins[i].name, store->pins[i].value);
}

/* Names beginning with '_' are for people and may differ. */
static rf_status compare_pins(const sweep_store *store, const rf_json *doc, rf_error *err) {
    char text[400];
    size_t used = 0;
    const rf_json_value *settings = rf_json_get(rf_json_root(doc), "settings");
    text[0] = 0;
    for (int i = 0; i < store->num_pins; i++) {
        const sweep_pin *pin = &store->pins[i];
        const rf_json_value *v = settings ? rf_json_get(settings, pin->name) : NULL;
        const char *there = v ? rf_json_string(v) : NULL;
        if (pin->name[0] == '_' || (there && strcmp(there, pin->value) == 0)) continue;
        int len = snprintf(text + used, sizeof text - used, "%s%s %s (now %s)", used ? ", " : "", pin->name,
                           there ? there : "unknown", pin->value);
        used += len < 0 ? 0 : (size_t)len;
        if (used >= sizeof text) break;
    }
    if (!text[0]) return RF_OK;
    return rf_fail(err, RF_ERR_ARGUMENT, "%s: made with %s; name another --report folder", store->folder, text);
}

/* Values written by the first run stay: dates and the like are of the beginning. */
static rf_status take_notes(sweep_store *store, const rf_json *doc, rf_error *err) {
    const rf_json_value *settings = rf_json_get(rf_json_root(doc), "settings");
    for (int i = 0; i < store->num_pins; i++) {
        const rf_json_value *v = settings ? rf_json_get(settings, store->pins[i].name) : NULL;
        if (store->pins[i].name[0] != '_' || !v || !rf_json_string(v)) continue;
        char *copy = rf_strdup(rf_json_string(v));
        if (!copy) return no_memory(err);
        rf_free(store->pins[i].value);
        store->pins[i].value = copy;
    }
    return RF_OK;
}

static rf_status open_settings(sweep_store *store, rf_error *err) {
    char *path = rf_path_join(store->folder, "settings.json");
    if (!path) return no_memory(err);
    rf_status st = RF_OK;
    if (rf_path_exists(path)) {
        rf_json *doc = NULL;
        st = rf_json_open(&doc, path, err);
        if (st == RF_OK) st = compare_pins(store, doc, err);
        if (st == RF_OK) st = take_notes(store, doc, err);
        rf_json_close(doc);
    } else {
        char *csv = rf_path_join(store->folder, "results.csv");
        if (!csv) st = no_memory(err);
        if (csv && rf_path_exists(csv))
            st = rf_fail(err, RF_ERR_ARGUMENT,
                         "%s: holds results.csv without settings.json; name another --report folder", store->folder);
        rf_free(csv);
        cJSON *root = cJSON_CreateObject();
        add_pins(root, store);
        char *text = st == RF_OK ? cJSON_Print(root) : NULL;
        if (st == RF_OK) st = text ? rf_file_write(path, text, strlen(text), err) : no_memory(err);
        cJSON_free(text);
        cJSON_Delete(root);
    }
    rf_free(path);
    return st;
}

/* --- opening ------------------------------------------------------------------------------------------------------ */

static rf_status make_folder(const char *path, rf_error *err) {
    if (mkdir(path, 0777) == 0 || rf_path_is_dir(path)) return RF_OK;
    return rf_fail(err, RF_ERR_IO, "%s: cannot make the folder: %s", path, strerror(errno));
}

static rf_status lock_folder(sweep_store *store, rf_error *err) {
    char *path = rf_path_join(store->folder, ".lock");
    if (!path) return no_memory(err);
    store->lock = open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0666);
    rf_free(path);
    if (store->lock < 0) return io_error(err, store->folder, ".lock", "write");
    if (flock(store->lock, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK)
        return rf_fail(err, RF_ERR_STATE, "%s: another sweep is writing there", store->folder);
    return RF_OK;
}

rf_status sweep_store_open(sweep_store **out, const char *folder, const sweep_pin *pins, int num_pins, rf_error *err) {
    *out = NULL;
    sweep_store *store = rf_alloc_zero(1, sizeof *store);
    if (!store) return no_memory(err);
    store->lock = -1;
    store->kind = IMAGES;
    store->pins = rf_alloc_zero((size_t)num_pins, sizeof *store->pins);
    rf_status st = store->pins ? RF_OK : no_memory(err);
    for (int i = 0; i < num_pins && st == RF_OK; i++) {
        store->pins[i] = (sweep_pin){pins[i].name, rf_strdup(pins[i].value)};
        store->num_pins = i + 1;
        if (!store->pins[i].value) st = no_memory(err);
        if (strcmp(pins[i].name, "frames") == 0) store->kind = WORLDS;
        if (strcmp(pins[i].name, "tasks") == 0) store->kind = TEXTS;
        if (strcmp(pins[i].name, "kv") == 0) store->kind = TEXTS | CACHES;
    }
    if (st == RF_OK && folder) {
        store->folder = rf_strdup(folder);
        size_t len = store->folder ? strlen(store->folder) : 0;
        while (len > 1 && store->folder[len - 1] == '/') store->folder[--len] = 0;
        if (!store->folder) st = no_memory(err);
        if (st == RF_OK) st = make_folder(store->folder, err);
        if (st == RF_OK) st = lock_folder(store, err);
        if (st == RF_OK) st = open_settings(store, err);
        if (st == RF_OK) st = load_results(store, err);
        if (st == RF_OK) st = load_baselines(store, err);
    }
    if (st != RF_OK) {
        sweep_store_close(store);
        return st;
    }
    *out = store;
    return RF_OK;
}

void sweep_store_close(sweep_store *store) {
    if (!store) return;
    for (int i = 0; i < store->num; i++) sweep_row_clear(&store->rows[i]);
    for (int i = 0; i < store->num_pins; i++) rf_free(store->pins[i].value);
    if (store->lock >= 0) close(store->lock);
    rf_free(store->rows);
    rf_free(store->baselines);
    rf_free(store->pins);
    rf_free(store->folder);
    rf_free(store);
}

bool sweep_store_is_world(const sweep_store *store) {
    return store->kind == WORLDS;
}

bool sweep_store_is_text(const sweep_store *store) {
    return (store->kind & TEXTS) != 0;
}

bool sweep_store_is_kv(const sweep_store *store) {
    return (store->kind & CACHES) != 0;
}

const char *sweep_store_folder(const sweep_store *store) {
    return store->folder;
}

int sweep_store_num(const sweep_store *store) {
    return store->num;
}

const sweep_row *sweep_store_at(const sweep_store *store, int index) {
    return &store->rows[index];
}

int sweep_store_find(const sweep_store *store, const char *key) {
    for (int i = 0; i < store->num; i++) {
        if (strcmp(store->rows[i].key, key) == 0) return i;
    }
    return -1;
}

int sweep_store_num_pins(const sweep_store *store) {
    return store->num_pins;
}

const sweep_pin *sweep_store_pin_at(const sweep_store *store, int index) {
    return &store->pins[index];
}

const char *sweep_store_pin(const sweep_store *store, const char *name) {
    for (int i = 0; i < store->num_pins; i++) {
        if (strcmp(store->pins[i].name, name) == 0) return store->pins[i].value;
    }
    return "";
}

/* --- rows --------------------------------------------------------------------------------------------------------- */

rf_status sweep_store_add(sweep_store *store, sweep_row *row, rf_error *err) {
    rf_status st = RF_OK;
    for (size_t c = 0; c < NUM_COLUMNS && st == RF_OK; c++) {
        if (columns[c].type == NUMBER || *text_of(row, c)) continue;
        *text_of(row, c) = rf_strdup("");
        if (!*text_of(row, c)) st = no_memory(err);
    }
    if (st == RF_OK && store->folder) {
        buffer b = {0};
        put_row(&b, store, row);
        st = append_file(store, "results.csv", &b, err);
        rf_free(b.text);
    }
    if (st != RF_OK) {
        sweep_row_clear(row);
        return st;
    }
    st = keep_row(store, row, err);
    time_t now = time(NULL);
    if (st == RF_OK && store->folder && now - store->json_written >= JSON_EVERY_S) {
        st = sweep_store_write_json(store, err);
        store->json_written = now;
    }
    return st;
}

rf_status sweep_store_forget_refusal(sweep_store *store, const char *key, rf_error *err) {
    int i = sweep_store_find(store, key);
    if (i < 0 || strcmp(store->rows[i].status, "refused") != 0) return RF_OK;
    sweep_row_clear(&store->rows[i]);
    memmove(&store->rows[i], &store->rows[i + 1], (size_t)(store->num - i - 1) * sizeof store->rows[i]);
    store->num--;
    return store->folder ? rewrite_results(store, err) : RF_OK;
}

/* --- JSON --------------------------------------------------------------------------------------------------------- */

static void add_number(cJSON *object, const char *name, double value) {
    char text[40];
    snprintf(text, sizeof text, "%.9g", value);
    cJSON_AddItemToObject(object, name, isfinite(value) ? cJSON_CreateRaw(text) : cJSON_CreateNull());
}

static void add_numbers(cJSON *object, const char *name, const char *text) {
    cJSON *list = cJSON_AddArrayToObject(object, name);
    for (char *end = NULL;; text = end) {
        double v = strtod(text, &end);
        if (end == text) return;
        cJSON_AddItemToArray(list, isfinite(v) ? cJSON_CreateNumber(v) : cJSON_CreateNull());
    }
}

static cJSON *row_json(const sweep_store *store, const sweep_row *row) {
    cJSON *o = cJSON_CreateObject();
    for (size_t c = 0; c < NUM_COLUMNS; c++) {
        if (!has_column(store, c)) continue;
        if (columns[c].type == NUMBER) {
            add_number(o, columns[c].name, *number_of(row, c));
        } else if (columns[c].type == TEXT) {
            cJSON_AddStringToObject(o, columns[c].name, *text_of(row, c));
        } else {
            add_numbers(o, columns[c].name, *text_of(row, c));
        }
    }
    return o;
}

rf_status sweep_store_json(const sweep_store *store, int found, char **out, rf_error *err) {
    *out = NULL;
    cJSON *root = cJSON_CreateObject();
    add_pins(root, store);
    if (found >= 0) cJSON_AddItemToObject(root, "found", row_json(store, &store->rows[found]));
    cJSON *baselines = cJSON_AddArrayToObject(root, "baseline_ms");
    for (int i = 0; i < store->num_baselines; i++)
        cJSON_AddItemToArray(baselines, cJSON_CreateNumber(store->baselines[i].ms));
    cJSON *rows = cJSON_AddArrayToObject(root, "results");
    for (int i = 0; i < store->num; i++) cJSON_AddItemToArray(rows, row_json(store, &store->rows[i]));
    char *text = cJSON_Print(root);
    cJSON_Delete(root);
    *out = text ? rf_strdup(text) : NULL;
    cJSON_free(text);
    return *out ? RF_OK : no_memory(err);
}

rf_status sweep_store_write_json(const sweep_store *store, rf_error *err) {
    if (!store->folder) return RF_OK;
    buffer b = {0};
    rf_status st = sweep_store_json(store, -1, &b.text, err);
    if (st != RF_OK) return st;
    b.len = strlen(b.text);
    put_text(&b, "\n");
    st = write_file(store->folder, "results.json", &b, err);
    rf_free(b.text);
    return st;
}

/* --- timings of the uncached loop --------------------------------------------------------------------------------- */

rf_status sweep_store_add_baseline(sweep_store *store, double ms, rf_error *err) {
    double now = (double)time(NULL);
    if (store->folder) {
        char line[80];
        buffer b = {0};
        if (store->num_baselines == 0) put_text(&b, "unix_seconds,loop_ms\n");
        snprintf(line, sizeof line, "%.0f,%.6f\n", now, ms);
        put_text(&b, line);
        rf_status st = append_file(store, "baselines.csv", &b, err);
        rf_free(b.text);
        if (st != RF_OK) return st;
    }
    return keep_baseline(store, now, ms, err);
}

int sweep_store_num_baselines(const sweep_store *store) {
    return store->num_baselines;
}

double sweep_store_baseline(const sweep_store *store, int index, double *unix_seconds) {
    *unix_seconds = store->baselines[index].unix_seconds;
    return store->baselines[index].ms;
}

double sweep_store_base_ms(const sweep_store *store, int last) {
    int num = last > 0 && last < store->num_baselines ? last : store->num_baselines;
    double *ms = num > 0 ? rf_alloc((size_t)num * sizeof *ms) : NULL;
    if (!ms) return NAN;
    for (int i = 0; i < num; i++) ms[i] = store->baselines[store->num_baselines - num + i].ms;
    double median = sweep_median(ms, num);
    rf_free(ms);
    return median;
}

/* --- the reference ------------------------------------------------------------------------------------------------ */

void sweep_reference_free(sweep_reference *reference) {
    rf_free(reference->latents);
    rf_free(reference->pictures);
    memset(reference, 0, sizeof *reference);
}

static size_t num_floats(int num, const int shape[3]) {
    return (size_t)num * (size_t)shape[0] * (size_t)shape[1] * (size_t)shape[2];
}

static rf_status read_shape(const rf_json *doc, const char *name, int shape[3], rf_error *err) {
    const rf_json_value *list = rf_json_get(rf_json_root(doc), name);
    for (int i = 0; i < 3; i++) {
        const rf_json_value *v = list ? rf_json_at(list, (size_t)i, NULL) : NULL;
        double d = v ? rf_json_number(v) : NAN;
        if (!(d >= 1 && d <= 65536))
            return rf_fail(err, RF_ERR_FORMAT, "%s: %s: expected three sizes 1..65536", rf_json_name(doc), name);
        shape[i] = (int)d;
    }
    return RF_OK;
}

static rf_status parse_reference(const sweep_store *store, const char *path, const char *bytes, size_t num_bytes,
                                 sweep_reference *out, rf_error *err) {
    const char *end = memchr(bytes, '\n', num_bytes < MAX_HEADER_BYTES ? num_bytes : MAX_HEADER_BYTES);
    if (!end) return rf_fail(err, RF_ERR_FORMAT, "%s: expected a line of JSON at its beginning", path);
    size_t header = (size_t)(end - bytes) + 1;
    rf_json *doc = NULL;
    int64_t num = 0;
    rf_status st = rf_json_parse(&doc, bytes, header, path, err);
    if (st == RF_OK) st = compare_pins(store, doc, err);
    if (st == RF_OK) st = rf_json_get_int(doc, rf_json_root(doc), "num", 1, 1000000, &num, err);
    if (st == RF_OK) st = read_shape(doc, "latent", out->latent, err);
    if (st == RF_OK) st = read_shape(doc, "image", out->image, err);
    out->num = (int)num;
    rf_json_close(doc);
    if (st != RF_OK) return st;
    size_t latents = num_floats(out->num, out->latent) * sizeof(float);
    size_t pictures = num_floats(out->num, out->image) * sizeof(float);
    if (num_bytes - header != latents + pictures)
        return rf_fail(err, RF_ERR_FORMAT, "%s: expected %zu bytes behind the first line, found %zu", path,
                       latents + pictures, num_bytes - header);
    out->latents = rf_alloc(latents);
    out->pictures = rf_alloc(pictures);
    if (!out->latents || !out->pictures) return no_memory(err);
    memcpy(out->latents, bytes + header, latents);
    memcpy(out->pictures, bytes + header + latents, pictures);
    return RF_OK;
}

rf_status sweep_store_load_reference(const sweep_store *store, sweep_reference *out, rf_error *err) {
    memset(out, 0, sizeof *out);
    if (!store->folder) return rf_fail(err, RF_ERR_MISSING, "no stored reference");
    char *path = rf_path_join(store->folder, "reference.f32"), *bytes = NULL;
    size_t num_bytes = 0;
    rf_status st = path ? RF_OK : no_memory(err);
    if (st == RF_OK && !rf_path_exists(path)) st = rf_fail(err, RF_ERR_MISSING, "%s: no such file", path);
    if (st == RF_OK) st = rf_file_read(path, MAX_REFERENCE_BYTES, &bytes, &num_bytes, err);
    if (st == RF_OK) st = parse_reference(store, path, bytes, num_bytes, out, err);
    if (st != RF_OK) sweep_reference_free(out);
    rf_free(bytes);
    rf_free(path);
    return st;
}

rf_status sweep_store_save_reference(const sweep_store *store, const sweep_reference *r, rf_error *err) {
    if (!store->folder) return RF_OK;
    cJSON *root = cJSON_CreateObject();
    add_pins(root, store);
    cJSON_AddNumberToObject(root, "num", r->num);
    cJSON_AddItemToObject(root, "latent", cJSON_CreateIntArray(r->latent, 3));
    cJSON_AddItemToObject(root, "image", cJSON_CreateIntArray(r->image, 3));
    cJSON_AddStringToObject(root, "floats",
                            "little-endian f32: latents [num, latent], then pictures [num, image] in about [-1, 1]");
    char *text = cJSON_PrintUnformatted(root);
    cJSON_Delete(root);
    char *path = rf_path_join(store->folder, "reference.f32");
    rf_file_writer *writer = NULL;
    rf_status st = text && path ? rf_file_writer_open(&writer, path, err) : no_memory(err);
    if (st == RF_OK) {
        size_t len = strlen(text) + 1;
        rf_file_writer_write(writer, text, len - 1);
        for (; len % HEADER_ALIGN != 0; len++) rf_file_writer_write(writer, " ", 1);
        rf_file_writer_write(writer, "\n", 1);
        rf_file_writer_write(writer, r->latents, num_floats(r->num, r->latent) * sizeof(float));
        rf_file_writer_write(writer, r->pictures, num_floats(r->num, r->image) * sizeof(float));
        st = rf_file_writer_commit(writer, err);
    }
    cJSON_free(text);
    rf_free(path);
    return st;
}

rf_status sweep_store_picture_path(const sweep_store *store, const char *name, char **out, rf_error *err) {
    *out = NULL;
    char *folder = rf_path_join(store->folder, "pictures");
    rf_status st = folder ? make_folder(folder, err) : no_memory(err);
    if (st == RF_OK) {
        *out = rf_path_join(folder, name);
        if (!*out) st = no_memory(err);
    }
    rf_free(folder);
    return st;
}
