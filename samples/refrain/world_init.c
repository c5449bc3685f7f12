/* samples/refrain/world_init.c - what a rollout starts from and what it does: first frames and action rows. */
#include <ctype.h>
#include <errno.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

#include "core/memory.h"
#include "samples/refrain/program.h"
#include "samples/refrain/world_run.h"

#define DEFAULT_WORLD   11
#define MAX_READ_FRAMES 1024               /* of a video: its last frames are wanted, and it is read from the start */
#define TEXT_BYTES      ((size_t)32 << 10) /* of an action list as text */

void world_note(world_run *run, const char *format, ...) {
    va_list args;
    if (run->num_notes == (int)(sizeof run->notes / sizeof run->notes[0])) return;
    va_start(args, format);
    vsnprintf(run->notes[run->num_notes++], sizeof run->notes[0], format, args);
    va_end(args);
}

/* ---- names ---- */

rf_status world_name_actions(world_run *run, rf_error *err) {
    int dim = run->info.action_dim;
    run->action_names = rf_alloc_zero((size_t)dim + 1, sizeof *run->action_names);
    run->rest = rf_alloc_zero((size_t)dim + 1, sizeof *run->rest);
    if (!run->action_names || !run->rest) return rf_fail(err, RF_ERR_MEMORY, "no memory for %d actions", dim);
    for (int i = 0; i < dim; i++) run->action_names[i] = rf_world_model_action_name(run->model, i);
    world_act rest = world_find_act(run, "none noop");
    if (rest.place >= 0) run->rest[rest.place] = 1;
    return RF_OK;
}

world_act world_find_act(const world_run *run, const char *words) {
    for (const char *w = words; *w;) {
        size_t len = strcspn(w, " "), name_len = strcspn(w, " =");
        for (int i = 0; i < run->info.action_dim; i++) {
            const char *name = run->action_names[i];
            if (!name || strlen(name) != name_len || memcmp(name, w, name_len) != 0) continue;
            return (world_act){i, name_len < len ? (float)atof(w + name_len + 1) : 1};
        }
        w += len;
        while (*w == ' ') w++;
    }
    return (world_act){-1, 0};
}

void world_action_text(const world_run *run, const float *row, char *text, size_t text_bytes) {
    size_t used = 0;
    text[0] = 0;
    for (int i = 0; i < run->info.action_dim; i++) {
        char part[96];
        int len;
        if (row[i] == 0 || used + 1 >= text_bytes) continue;
        const char *plus = used ? "+" : "", *name = run->action_names[i];
        char number[16];
        snprintf(number, sizeof number, "#%d", i);
        if (row[i] == 1) {
            len = snprintf(part, sizeof part, "%s%s", plus, name ? name : number);
        } else {
            len = snprintf(part, sizeof part, "%s%s=%g", plus, name ? name : number, (double)row[i]);
        }
        if (len < 0) continue;
        snprintf(text + used, text_bytes - used, "%s", part);
        used = strlen(text);
    }
    if (used == 0) snprintf(text, text_bytes, "none");
}

/* All rows in the text form, equal neighbours as name*count. */
static char *actions_text(const world_run *run) {
    size_t dim = (size_t)run->info.action_dim, used = 0;
    char *text = rf_alloc(TEXT_BYTES);
    if (!text) return NULL;
    text[0] = 0;
    for (int i = 0; i < run->num_actions;) {
        const float *row = run->actions + (size_t)i * dim;
        int count = 1;
        while (i + count < run->num_actions && memcmp(row, row + (size_t)count * dim, dim * sizeof *row) == 0) count++;
        char name[256], times[16] = "";
        world_action_text(run, row, name, sizeof name);
        if (count > 1) snprintf(times, sizeof times, "*%d", count);
        if (used + strlen(name) + strlen(times) + 8 > TEXT_BYTES) {
            snprintf(text + used, TEXT_BYTES - used, ",...");
            break;
        }
        used += (size_t)snprintf(text + used, TEXT_BYTES - used, "%s%s%s", used ? "," : "", name, times);
        i += count;
    }
    return text;
}

int world_simulator_action(const world_run *run, const float *row) {
    int place = -1;
    for (int i = 0; i < run->info.action_dim; i++) {
        if (row[i] == 0) continue;
        if (place >= 0 || row[i] != 1) return -1;
        place = i;
    }
    if (place < 0 || run->rest[place] == 1) return MAZE_NONE;
    for (int action = 0; action < MAZE_NUM_ACTIONS; action++) {
        const char *name = maze_action_name(action);
        if (name && run->action_names[place] && strcmp(name, run->action_names[place]) == 0) return action;
    }
    return -1;
}

/* ---- first frames ---- */

static bool has_simulator(const world_run *run) {
    return run->info.simulator && strcmp(run->info.simulator, "maze") == 0;
}

static rf_status alloc_prompt(world_prompt *p, int num, rf_error *err) {
    p->frames = rf_alloc_zero((size_t)num, sizeof *p->frames);
    if (!p->frames) return rf_fail(err, RF_ERR_MEMORY, "--init: no memory for %d frames", num);
    p->num = num;
    return RF_OK;
}

static rf_status prompt_from_seed(world_run *run, uint64_t seed, rf_error *err) {
    static const uint8_t black[3] = {0, 0, 0};
    world_prompt *p = &run->prompt;
    RF_TRY(alloc_prompt(p, 1, err));
    RF_TRY(rf_image_create(&p->frames[0], run->info.frame_width, run->info.frame_height, black, err));
    maze_init(&p->simulator, seed);
    maze_render(&p->simulator, run->info.frame_width, run->info.frame_height, SIMULATOR_SAMPLES, p->frames[0].rgb);
    p->simulated = true;
    snprintf(p->text, sizeof p->text, "seed %ju", (uintmax_t)seed);
    return RF_OK;
}

/* For random weights, whose frames show nothing anyway. */
static rf_status prompt_from_gradient(world_run *run, rf_error *err) {
    static const uint8_t black[3] = {0, 0, 0};
    world_prompt *p = &run->prompt;
    RF_TRY(alloc_prompt(p, 1, err));
    int width = run->info.frame_width, height = run->info.frame_height;
    RF_TRY(rf_image_create(&p->frames[0], width, height, black, err));
    for (int y = 0; y < height; y++) {
        for (int x = 0; x < width; x++) {
            uint8_t *rgb = p->frames[0].rgb + ((size_t)y * (size_t)width + (size_t)x) * 3;
            rgb[0] = (uint8_t)(x * 255 / width);
            rgb[1] = (uint8_t)(y * 255 / height);
            rgb[2] = 128;
        }
    }
    snprintf(p->text, sizeof p->text, "gradient");
    return RF_OK;
}

/* All frames of one file have one size. */
static rf_status fit_frames(world_run *run, const char *path, rf_error *err) {
    world_prompt *p = &run->prompt;
    int width = run->info.frame_width, height = run->info.frame_height;
    int had_width = p->frames[0].width, had_height = p->frames[0].height;
    if (had_width == width && had_height == height) return RF_OK;
    if (run->args.strict) {
        return rf_fail(err, RF_ERR_SHAPE, "%s: %dx%d pixels, expected %dx%d, the size of %s's frames (--strict)", path,
                       had_width, had_height, width, height, run->model_name);
    }
    for (int i = 0; i < p->num; i++) {
        rf_image fitted = {0};
        RF_TRY(rf_image_resize(&fitted, &p->frames[i], width, height, err));
        rf_image_free(&p->frames[i]);
        p->frames[i] = fitted;
    }
    bool stretched = (int64_t)had_width * height != (int64_t)had_height * width;
    world_note(run, "%s: resized from %dx%d to %dx%d%s", path, had_width, had_height, width, height,
               stretched ? ", which changes its proportions" : "");
    return RF_OK;
}

static rf_status prompt_from_file(world_run *run, const char *path, rf_error *err) {
    world_prompt *p = &run->prompt;
    const char *slash = strrchr(path, '/');
    const char *name = slash && slash[1] ? slash + 1 : path;
    rf_image *frames = NULL;
    int num = 0;
    RF_TRY(rf_video_read(path, MAX_READ_FRAMES, &frames, &num, err));
    int most = run->options.window - 1, first = num > most ? num - most : 0;
    rf_status st = alloc_prompt(p, num - first, err);
    for (int i = first; i < num && st == RF_OK; i++) {
        p->frames[i - first] = frames[i];
        frames[i] = (rf_image){0};
    }
    rf_video_frames_free(frames, num);
    RF_TRY(st);
    if (num == 1) {
        snprintf(p->text, sizeof p->text, "picture %.100s", name);
    } else {
        snprintf(p->text, sizeof p->text, "video %.100s, frames %d..%d", name, first + 1, num);
    }
    if (first > 0)
        world_note(run, "%s: the last %d of its %s%d frames are the prompt (a window of %d)", path, p->num,
                   num == MAX_READ_FRAMES ? "first " : "", num, run->options.window);
    return fit_frames(run, path, err);
}

/* "12" or "-1"; anything else is a file. */
static bool is_number(const char *text) {
    if (*text == '-') text++;
    return *text && text[strspn(text, "0123456789")] == 0;
}

rf_status world_load_prompt(world_run *run, rf_error *err) {
    const char *init = run->args.init;
    if (!init && has_simulator(run)) return prompt_from_seed(run, DEFAULT_WORLD, err);
    if (!init && run->args.synthetic) return prompt_from_gradient(run, err);
    if (!init)
        return rf_fail(err, RF_ERR_ARGUMENT, "--init: %s has no simulator, expected a picture or a video to start from",
                       run->model_name);
    if (!is_number(init)) return prompt_from_file(run, init, err);
    if (!has_simulator(run)) {
        return rf_fail(err, RF_ERR_ARGUMENT,
                       "--init %s: %s has no simulator to draw a first frame, expected a picture or a video", init,
                       run->model_name);
    }
    errno = 0;
    uint64_t seed = strtoull(init, NULL, 10);
    if (errno == ERANGE)
        return rf_fail(err, RF_ERR_ARGUMENT, "--init: expected a seed up to %ju, found %s", UINTMAX_MAX, init);
    if (init[0] == '-') {
        uint32_t random = 0;
        if (getrandom(&random, sizeof random, 0) != (ssize_t)sizeof random) random = (uint32_t)(now_ms() * 1e3);
        seed = random;
    }
    return prompt_from_seed(run, seed, err);
}

void world_free_prompt(world_prompt *p) {
    for (int i = 0; p->frames && i < p->num; i++) rf_image_free(&p->frames[i]);
    rf_free(p->frames);
    *p = (world_prompt){0};
}

void world_to_planar(const rf_image *image, float *planar) {
    size_t pixels = (size_t)image->width * (size_t)image->height;
    for (size_t i = 0; i < pixels; i++) {
        for (size_t c = 0; c < 3; c++) planar[c * pixels + i] = (float)image->rgb[i * 3 + c] / 127.5F - 1;
    }
}

/* ---- actions ---- */

/* A walk that shows what a world is: ahead, a look to the right and back again. */
static rf_status demonstration(world_run *run, rf_error *err) {
    typedef struct {
        world_act act;
        int count;
    } leg;
    world_act ahead = world_find_act(run, "forward"), right = world_find_act(run, WORLD_TURN_RIGHT),
              left = world_find_act(run, WORLD_TURN_LEFT);
    leg legs[3] = {{ahead, 12}, {right, 8}, {left, 8}};
    if (ahead.place < 0 || right.place < 0 || left.place < 0) {
        int num = 0;
        for (int i = 0; i < 3; i++) legs[i] = (leg){{-1, 0}, 8};
        for (int i = 0; i < run->info.action_dim && num < 3; i++) {
            if (run->action_names[i] && run->rest[i] == 0) legs[num++].act = (world_act){i, 1};
        }
    }
    int total = legs[0].count + legs[1].count + legs[2].count;
    size_t dim = (size_t)run->info.action_dim;
    float *rows = rf_alloc_zero((size_t)total, dim * sizeof *rows);
    if (!rows) return rf_fail(err, RF_ERR_MEMORY, "no memory for %d actions", total);
    int num = 0;
    for (int i = 0; i < 3; i++) {
        for (int j = 0; j < legs[i].count; j++, num++) {
            float *row = rows + (size_t)num * dim;
            if (legs[i].act.place >= 0) row[legs[i].act.place] = legs[i].act.value;
            if (legs[i].act.place < 0) memcpy(row, run->rest, dim * sizeof *row);
        }
    }
    run->actions = rows;
    run->num_actions = num;
    return RF_OK;
}

/* Cuts the list or goes on with rest (the demonstration: with itself). */
static rf_status fit_actions(world_run *run, int wanted, rf_error *err) {
    size_t dim = (size_t)run->info.action_dim;
    int had = run->num_actions;
    bool tell = run->args.actions && had != wanted;
    if (had < wanted) {
        float *rows = rf_realloc(run->actions, (size_t)wanted * dim * sizeof *rows);
        if (!rows) return rf_fail(err, RF_ERR_MEMORY, "no memory for %d actions", wanted);
        run->actions = rows;
        for (int i = had; i < wanted; i++)
            memcpy(rows + (size_t)i * dim, run->args.actions ? run->rest : rows + (size_t)(i - had) * dim,
                   dim * sizeof *rows);
        char rest[64];
        world_action_text(run, run->rest, rest, sizeof rest);
        if (tell)
            world_note(run, "%d action%s for %d new frames: the last %d do '%s'", had, had == 1 ? "" : "s", wanted,
                       wanted - had, rest);
    } else if (tell) {
        world_note(run, "%d actions for %d new frame%s: the last %d are not used", had, wanted, wanted == 1 ? "" : "s",
                   had - wanted);
    }
    run->num_actions = wanted;
    return RF_OK;
}

/* The simulator takes one whole action a frame. */
static rf_status check_simulator_actions(const world_run *run, rf_error *err) {
    size_t dim = (size_t)run->info.action_dim;
    for (int i = 0; i < run->num_actions; i++) {
        const float *row = run->actions + (size_t)i * dim;
        char text[128];
        if (world_simulator_action(run, row) >= 0) continue;
        world_action_text(run, row, text, sizeof text);
        return rf_fail(err, RF_ERR_ARGUMENT,
                       "--compare-simulator: the simulator takes one action at a time; frame %d does '%s'", i + 1,
                       text);
    }
    return RF_OK;
}

rf_status world_load_actions(world_run *run, rf_error *err) {
    const world_args *a = &run->args;
    rf_action_names names = {run->info.action_dim, run->action_names};
    if (a->compare_simulator && !run->prompt.simulated) {
        return rf_fail(err, RF_ERR_ARGUMENT,
                       "--compare-simulator: needs a model with a simulator and --init SEED, found %s",
                       run->prompt.text);
    }
    if (a->actions) {
        RF_TRY(rf_actions_parse(&run->actions, &run->num_actions, a->actions, &names, err));
    } else {
        RF_TRY(demonstration(run, err));
    }
    RF_TRY(fit_actions(run, a->num_frames ? (int)a->num_frames - 1 : run->num_actions, err));
    if (a->compare_simulator) RF_TRY(check_simulator_actions(run, err));
    run->actions_text = actions_text(run);
    return run->actions_text ? RF_OK : rf_fail(err, RF_ERR_MEMORY, "no memory for the list of actions");
}
