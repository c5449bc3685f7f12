/* samples/refrain/main.c - the `refrain` program: picks the command.
 *
 * One file per command (cmd_*.c); args.c reads options, report.c writes JSON and PNG texts, progress.c draws the bar,
 * program.c holds what all of them need. */
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "samples/refrain/args.h"
#include "samples/refrain/program.h"

typedef struct {
    const char *name;
    int (*run)(int argc, char **argv);
    const char *about;
} command;

static const command commands[] = {
    {"image", cmd_image, "sample images of classes with a diffusion transformer"},
    {"world", cmd_world, "walk through a world model: frames from actions, as a video or live"},
    {"text", cmd_text, "complete a prompt with a diffusion or an autoregressive language model"},
    {"eval", cmd_eval, "score a text model on built-in tasks"},
    {"info", cmd_info, "what a model folder or a safetensors file holds"},
    {"bench", cmd_bench, "time forwards or whole images"},
    {"metadata", cmd_metadata, "print the settings embedded in a PNG"},
    {"policies", cmd_policies, "ways to reuse work between steps, and a model's presets"},
#ifdef RF_HAVE_SWEEP
    {"sweep", cmd_sweep, "speed against quality of policies, and a report"},
#endif
#ifdef RF_HAVE_CALIBRATE
    {"calibrate", cmd_calibrate, "measure on a model what some policies need to know about it"},
#endif
};
static const char command_names[] = "image world text eval info bench metadata policies"
#ifdef RF_HAVE_SWEEP
                                    " sweep"
#endif
#ifdef RF_HAVE_CALIBRATE
                                    " calibrate"
#endif
    ;

#define NUM_COMMANDS (sizeof commands / sizeof commands[0])

static void print_help(void) {
    printf("usage: refrain COMMAND [options]\n"
           "Runs diffusion transformers and language models on CPU and NVIDIA GPUs.\n\ncommands:\n");
    for (size_t i = 0; i < NUM_COMMANDS; i++) printf("  %-12s%s\n", commands[i].name, commands[i].about);
    printf("\n  refrain COMMAND --help   options of a command, with their defaults\n"
           "  refrain --list-devices   the devices that --device can name\n"
           "  refrain --version        version and what is compiled in\n\n"
           "Results go to standard output, messages to standard error. Exit status: 0 done,\n"
           "1 failed, 2 wrong usage, 130 interrupted.\n");
}

static void print_version(void) {
#ifdef RF_HAVE_CUDA
    printf("refrain %s (CPU, CUDA)\n", RF_VERSION);
#else
    printf("refrain %s (CPU; built without CUDA)\n", RF_VERSION);
#endif
}

static void list_devices(void) {
    char line[512];
    for (int i = 0; rf_backend_list(i, line, sizeof line); i++) printf("%s\n", line);
}

static int unknown_command(const char *name) {
    size_t near_len = 0;
    const char *near = args_nearest(name, command_names, &near_len);
    if (near) {
        say_error("no command '%s'; did you mean %.*s? (commands: %s)", name, (int)near_len, near, command_names);
    } else {
        say_error("no command '%s'; commands: %s", name, command_names);
    }
    return EXIT_USAGE;
}

#ifdef __linux__
#define RESTARTED "REFRAIN_RESTARTED"

/* Threads that wait spin for some milliseconds before they sleep, and on cores that others use too they spin away the time
 * of the thread they wait for. A shorter spin (a barrier's length) costs nothing on an idle machine and makes a busy one
 * about twice as fast (docs/performance.md). GNU OpenMP reads the setting when it is loaded, before main: so the program
 * starts itself once more, unless the user has said something about waiting. If that fails it runs as it is. */
static void restart_with_short_spin(char **argv) {
    char path[PATH_MAX];
    if (getenv(RESTARTED)) {
        unsetenv(RESTARTED);
        return;
    }
    if (getenv("OMP_WAIT_POLICY") || getenv("GOMP_SPINCOUNT")) return;
    ssize_t len = readlink("/proc/self/exe", path, sizeof path - 1);
    if (len < 0 || setenv(RESTARTED, "1", 1) != 0 || setenv("GOMP_SPINCOUNT", "5000", 1) != 0) return;
    path[len] = 0;
    execv(path, argv);
}
#endif

int main(int argc, char **argv) {
#ifdef __linux__
    restart_with_short_spin(argv);
#endif
    /* A full disk or a closed pipe is a failed write with a message, not a signal. */
    signal(SIGXFSZ, SIG_IGN);
    signal(SIGPIPE, SIG_IGN);
    if (argc < 2) {
        say_error("expected a command (%s), found nothing; refrain --help says more", command_names);
        return EXIT_USAGE;
    }
    const char *first = argv[1];
    for (size_t i = 0; i < NUM_COMMANDS; i++) {
        if (strcmp(first, commands[i].name) == 0) return finish_stdout(commands[i].run(argc - 1, argv + 1));
    }
    if (strcmp(first, "--help") == 0 || strcmp(first, "-h") == 0 || strcmp(first, "help") == 0) {
        print_help();
    } else if (strcmp(first, "--version") == 0) {
        print_version();
    } else if (strcmp(first, "--list-devices") == 0) {
        list_devices();
    } else if (first[0] == '-') {
        say_error("unknown option %s before a command (refrain --help)", first);
        return EXIT_USAGE;
    } else {
        return unknown_command(first);
    }
    return finish_stdout(EXIT_OK);
}
