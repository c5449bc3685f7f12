/* samples/refrain/program.c - messages, cancelling, and finding things. Only this file and the start of
 * main.c read the environment. */
#include "samples/refrain/program.h"

#include <errno.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "core/file.h"
#include "core/memory.h"
#include "dlm/model.h"

#define SAMPLE_MODEL "objects"
#define SAMPLE_WORLD "maze"
#define SAMPLE_TEXT  "text"

static void say_line(const char *prefix, const char *format, va_list args) {
    char line[1024];
    vsnprintf(line, sizeof line, format, args);
    for (char *c = line; *c; c++) {
        if ((unsigned char)*c < 32 || *c == 127) *c = '?';
    }
    fprintf(stderr, "refrain: %s%s\n", prefix, line);
}

void say_error(const char *format, ...) {
    va_list args;
    va_start(args, format);
    say_line("", format, args);
    va_end(args);
}

void say(const char *format, ...) {
    va_list args;
    va_start(args, format);
    say_line("", format, args);
    va_end(args);
}

void print_clean(const char *text) {
    for (const char *c = text; *c; c++) {
        bool control = ((unsigned char)*c < 32 && *c != '\n' && *c != '\t') || *c == 127;
        putchar(control ? '?' : *c);
    }
}

int fail_with(const rf_error *err) {
    say_error("%s", err->message);
    if (err->status == RF_ERR_ARGUMENT) return EXIT_USAGE;
    if (err->status == RF_ERR_CANCELLED) return EXIT_CANCELLED;
    return EXIT_FAILED;
}

static void log_to_stderr(void *user, rf_log_level level, const char *line) {
    (void)user;
    say("%s%s", level == RF_LOG_WARN ? "warning: " : "", line);
}

rf_log program_log(int verbosity) {
    rf_log log = {.write = log_to_stderr, .user = NULL, .level = RF_LOG_WARN};
    if (verbosity < 0) log.level = RF_LOG_ERROR;
    if (verbosity == 1) log.level = RF_LOG_INFO;
    if (verbosity > 1) log.level = RF_LOG_DEBUG;
    return log;
}

static volatile sig_atomic_t cancel_flag;

static void on_cancel(int signal_number) {
    (void)signal_number;
    cancel_flag = 1;
}

void cancel_install(void) {
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_handler = on_cancel;
    action.sa_flags = SA_RESTART | (int)SA_RESETHAND;
    sigemptyset(&action.sa_mask);
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
}

bool cancel_requested(void) {
    return cancel_flag != 0;
}

double now_ms(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e3 + (double)t.tv_nsec * 1e-6;
}

int finish_stdout(int exit_status) {
    if (fflush(stdout) != 0 || ferror(stdout)) {
        say_error("standard output: cannot write: %s", strerror(errno));
        return exit_status == EXIT_OK ? EXIT_FAILED : exit_status;
    }
    return exit_status;
}

rf_status dtype_for(rf_dtype *out, const char *name, const rf_backend *backend, rf_error *err) {
    if (strcmp(name, "auto") == 0) {
        *out = rf_backend_get_kind(backend) == RF_BACKEND_CUDA ? RF_DTYPE_BF16 : RF_DTYPE_F32;
        return RF_OK;
    }
    if (!rf_dtype_from_name(name, out) || (*out != RF_DTYPE_F32 && *out != RF_DTYPE_BF16)) {
        return rf_fail(err, RF_ERR_ARGUMENT, "--dtype: expected auto, f32 or bf16, found %s", name);
    }
    if (*out == RF_DTYPE_BF16 && rf_backend_get_kind(backend) == RF_BACKEND_CPU) {
        return rf_fail(err, RF_ERR_ARGUMENT, "--dtype bf16 needs a CUDA device; %s computes in f32",
                       rf_backend_name(backend));
    }
    return RF_OK;
}

/* "<folder of the program>/<relative>", or NULL. */
static char *beside_program(const char *relative) {
    char exe[PATH_MAX];
    ssize_t len = readlink("/proc/self/exe", exe, sizeof exe - 1);
    if (len <= 0) return NULL;
    exe[len] = 0;
    char *slash = strrchr(exe, '/');
    if (!slash) return NULL;
    *slash = 0;
    char *joined = rf_path_join(exe, relative);
    if (!joined) return NULL;
    char resolved[PATH_MAX];
    bool found = realpath(joined, resolved) != NULL;
    rf_free(joined);
    return found ? rf_strdup(resolved) : NULL;
}

/* Takes folder; gives "<folder>/<name>" if that is a folder, else NULL. */
static char *model_in(char *folder, const char *name) {
    char *path = folder ? rf_path_join(folder, name) : NULL;
    rf_free(folder);
    if (path && rf_path_is_dir(path)) return path;
    rf_free(path);
    return NULL;
}

static rf_status find_or(char **out, const char *name, const char *sample, rf_error *err) {
    const char *wanted = name ? name : sample;
    const char *env = getenv("REFRAIN_MODELS");
    char *path = NULL;
    if (name && rf_path_exists(name)) {
        path = rf_strdup(name);
        if (!path) return rf_fail(err, RF_ERR_MEMORY, "%s: no memory for its name", name);
    }
    if (!path && !strchr(wanted, '/')) {
        if (env && env[0]) path = model_in(rf_strdup(env), wanted);
        if (!path) path = model_in(beside_program("../samples/models"), wanted);
        if (!path) path = model_in(beside_program("../share/refrain/models"), wanted);
    }
    if (!path && name) {
        return rf_fail(err, RF_ERR_MISSING, "%s: no such model folder", name);
    }
    if (!path) {
        return rf_fail(err, RF_ERR_MISSING,
                       "the sample model '%s' was not found beside the program (../samples/models) nor in "
                       "$REFRAIN_MODELS; name a model folder with -m",
                       sample);
    }
    *out = path;
    return RF_OK;
}

rf_status find_model(char **out, const char *name, rf_error *err) {
    return find_or(out, name, SAMPLE_MODEL, err);
}

rf_status find_world(char **out, const char *name, rf_error *err) {
    return find_or(out, name, SAMPLE_WORLD, err);
}

rf_status find_text(char **out, const char *name, rf_error *err) {
    return find_or(out, name, SAMPLE_TEXT, err);
}

char *tuning_cache_path(bool create) {
    const char *cache = getenv("XDG_CACHE_HOME");
    const char *home = getenv("HOME");
    char *base = NULL;
    if (cache && cache[0] == '/') {
        base = rf_strdup(cache);
    } else if (home && home[0] == '/') {
        base = rf_path_join(home, ".cache");
    }
    if (!base) return NULL;
    char *folder = rf_path_join(base, "refrain");
    if (create && folder) {
        /* Failure shows when the file is written. */
        (void)mkdir(base, 0777);
        (void)mkdir(folder, 0777);
    }
    char *path = folder ? rf_path_join(folder, "gemm-tuning") : NULL;
    rf_free(base);
    rf_free(folder);
    return path;
}

void format_bytes(char *out, size_t out_bytes, double bytes) {
    const char *units[] = {"bytes", "kB", "MB", "GB", "TB"};
    int unit = 0;
    while (bytes >= 1000 && unit < 4) {
        bytes /= 1000;
        unit++;
    }
    snprintf(out, out_bytes, unit == 0 ? "%.0f %s" : "%.1f %s", bytes, units[unit]);
}

const char *short_name(char *path) {
    size_t len = strlen(path);
    while (len > 1 && path[len - 1] == '/') path[--len] = 0;
    const char *slash = strrchr(path, '/');
    return slash && slash[1] ? slash + 1 : path;
}

rf_status open_place(char **path, rf_backend **backend, rf_dtype *dtype, const char *name, const char *synthetic,
                     rf_status (*find)(char **, const char *, rf_error *), const char *device, int threads,
                     const char *dtype_name, const rf_log *log, rf_error *err) {
    if (synthetic) {
        *path = rf_strdup(synthetic);
        if (!*path) return rf_fail(err, RF_ERR_MEMORY, "%s: no memory for its name", synthetic);
    } else {
        RF_TRY(find(path, name, err));
    }
    RF_TRY(rf_backend_open(backend, device, threads, err));
    rf_backend_set_log(*backend, log);
    return dtype_for(dtype, dtype_name, *backend, err);
}

rf_status open_image_model(opened_model *out, const char *name, const char *synthetic, const char *device, int threads,
                           const char *dtype, const rf_log *log, rf_error *err) {
    *out = (opened_model){0};
    RF_TRY(open_place(&out->path, &out->backend, &out->dtype, name, synthetic, find_model, device, threads, dtype, log,
                      err));
    if (!synthetic && rf_world_is_world(out->path))
        return rf_fail(err, RF_ERR_ARGUMENT, "%s: a world model, and not one of images (refrain world)", out->path);
    if (!synthetic && rf_text_is_text(out->path))
        return rf_fail(err, RF_ERR_ARGUMENT, "%s: a text model, and not one of images (refrain text)", out->path);
    if (synthetic) {
        RF_TRY(rf_image_model_synthetic(&out->model, out->backend, synthetic, out->dtype, 0, err));
    } else {
        RF_TRY(rf_image_model_load(&out->model, out->backend, out->path, out->dtype, err));
    }
    out->name = short_name(out->path);
    return RF_OK;
}

rf_status open_world_model(opened_world *out, const char *name, const char *synthetic, const char *device, int threads,
                           const char *dtype, const rf_log *log, rf_error *err) {
    *out = (opened_world){0};
    RF_TRY(open_place(&out->path, &out->backend, &out->dtype, name, synthetic, find_world, device, threads, dtype, log,
                      err));
    if (!synthetic && rf_path_is_dir(out->path) && !rf_world_is_world(out->path))
        return rf_fail(err, RF_ERR_ARGUMENT, "%s: not a world model (of %s)", out->path,
                       rf_text_is_text(out->path) ? "text: refrain text" : "images: refrain image");
    if (synthetic) {
        RF_TRY(rf_world_model_synthetic(&out->model, out->backend, synthetic, out->dtype, 0, err));
    } else {
        RF_TRY(rf_world_model_load(&out->model, out->backend, out->path, out->dtype, err));
    }
    out->name = short_name(out->path);
    return RF_OK;
}

const char *terminal_type(void) {
    const char *type = getenv("TERM");
    return type ? type : "";
}

int terminal_num_colors(void) {
    static const char *const known[] = {"direct", "truecolor", "kitty", "foot", "alacritty", "wezterm", "ghostty"};
    const char *color = getenv("COLORTERM"), *type = terminal_type();
    if (color && (strcmp(color, "truecolor") == 0 || strcmp(color, "24bit") == 0)) return 1 << 24;
    for (size_t i = 0; i < sizeof known / sizeof known[0]; i++) {
        if (strstr(type, known[i])) return 1 << 24;
    }
    return strstr(type, "256") ? 256 : 16;
}
