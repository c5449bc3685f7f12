/* samples/refrain/program.h - what the commands share: messages, exit status, cancelling, devices and models by name.
 *
 * Standard output carries results only (--json, tables, info, metadata); everything said to a person goes to standard error,
 * one line each, "refrain: ...". */
#ifndef REFRAIN_PROGRAM_H
#define REFRAIN_PROGRAM_H

#include "core/backend.h"
#include "dit/pipeline.h"
#include "dit/world.h"

#ifndef RF_VERSION
#define RF_VERSION "unknown"
#endif

enum { EXIT_OK = 0, EXIT_FAILED = 1, EXIT_USAGE = 2, EXIT_CANCELLED = 130 };

/* The commands; argv[0] is the command's name. */
int cmd_image(int argc, char **argv);
int cmd_info(int argc, char **argv);
int cmd_bench(int argc, char **argv);
int cmd_metadata(int argc, char **argv);
int cmd_policies(int argc, char **argv);
int cmd_world(int argc, char **argv);
int cmd_text(int argc, char **argv);
int cmd_eval(int argc, char **argv);
int cmd_sweep(int argc, char **argv);
int cmd_calibrate(int argc, char **argv);

/* "refrain: ..." on standard error. Control characters (a file name may hold any) are shown as '?', so that one message
 * stays one line. */
void say_error(const char *format, ...) __attribute__((format(printf, 1, 2)));
void say(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* Text from a file to standard output: what a terminal would obey is shown as '?', newlines and tabs stay. */
void print_clean(const char *text);

/* Says err's message; gives the exit status that belongs to it: 2 where the command line was at fault, 130 when cancelled,
 * else 1. */
int fail_with(const rf_error *err);

/* Log of the library to standard error; verbosity -1 errors, 0 also warnings, 1 also information, 2 also debugging. */
rf_log program_log(int verbosity);

/* SIGINT and SIGTERM ask a run to stop; a second one ends the process at once. */
void cancel_install(void);
bool cancel_requested(void);

double now_ms(void); /* monotonic */

/* Flushes standard output and reports what could not be written (a full disk). */
int finish_stdout(int exit_status);

/* --dtype NAME for a backend: "auto" is bf16 on CUDA and f32 on the host. */
rf_status dtype_for(rf_dtype *out, const char *name, const rf_backend *backend, rf_error *err);

/* The folder of a model: `name` itself if it is a path that exists, else NAME in $REFRAIN_MODELS, beside the program
 * (../samples/models) or in its install folder (../share/refrain/models). NULL stands for the shipped sample model of
 * images, for find_world of worlds, for find_text of text. *out is rf_free'd by the caller. */
rf_status find_model(char **out, const char *name, rf_error *err);
rf_status find_world(char **out, const char *name, rf_error *err);
rf_status find_text(char **out, const char *name, rf_error *err);

/* Folder or config, device and dtype: what comes before a model itself. find: one of the functions above. */
rf_status open_place(char **path, rf_backend **backend, rf_dtype *dtype, const char *name, const char *synthetic,
                     rf_status (*find)(char **, const char *, rf_error *), const char *device, int threads,
                     const char *dtype_name, const rf_log *log, rf_error *err);
/* Drops slashes at the end of path; gives its last element. */
const char *short_name(char *path);

/* A device and an image model on it. Also after a failure what is there must be given back: close model and backend, free path. */
typedef struct {
    char *path;       /* as loaded; of a synthetic model its config */
    const char *name; /* last element of path, for people */
    rf_backend *backend;
    rf_dtype dtype;
    rf_image_model *model;
} opened_model;
/* name: as for find_model; synthetic: a config whose weights are drawn, or NULL. log stays with the backend. */
rf_status open_image_model(opened_model *out, const char *name, const char *synthetic, const char *device, int threads,
                           const char *dtype, const rf_log *log, rf_error *err);

/* The same for a world model. */
typedef struct {
    char *path;
    const char *name;
    rf_backend *backend;
    rf_dtype dtype;
    rf_world_model *model;
} opened_world;
rf_status open_world_model(opened_world *out, const char *name, const char *synthetic, const char *device, int threads,
                           const char *dtype, const rf_log *log, rf_error *err);

/* $TERM ("" if unset), and whether the terminal says that it takes 24-bit colours or, less, 256. */
const char *terminal_type(void);
int terminal_num_colors(void); /* 1 << 24, 256 or 16 */

/* $XDG_CACHE_HOME/refrain/gemm-tuning (default ~/.cache), making the folders if `create`; NULL if there is no home. rf_free. */
char *tuning_cache_path(bool create);

/* Bytes as "123.4 MB". */
void format_bytes(char *out, size_t out_bytes, double bytes);

#endif
