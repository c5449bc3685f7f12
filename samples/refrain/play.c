/* samples/refrain/play.c - walking about in a world: keys act, frames are drawn as fast as they are made, but no faster than
 * the world's own pace.
 *
 * Keys     A terminal says when a key is pressed and repeats it while it is held; only some say when it is let go. Where they do not,
 *          the newest key acts for HOLD_MS after it was last heard of, and in one frame at least, however slow frames are.
 * Memory   Nothing is kept of a frame: a rollout may go on for ever. */
#include "samples/refrain/play.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/memory.h"
#include "samples/refrain/program.h"
#include "samples/refrain/terminal.h"
#include "samples/refrain/world_run.h"

#define HOLD_MS       150.0
#define MESSAGE_MS    2500.0
#define NEWEST_WEIGHT 0.15 /* of the newest frame in the means that are shown */
#define MAX_KEYS      48
#define MAX_SAVED     10000
#define MAX_HELP      20
#define HELP_COLUMNS  3

/* A key and what it does. */
typedef struct {
    int code;
    const char *shown;
    world_act act;
    char name[48]; /* the action's */
} binding;

typedef struct {
    world_run *run;
    terminal *screen;
    binding keys[MAX_KEYS];
    int num_keys;

    const binding *held; /* NULL = none */
    bool down, fresh;    /* not yet let go; not yet acted */
    double heard_ms;
    bool paused, help, quit, restart;

    rf_image frame;
    float *planar, *row;
    char action[96]; /* of the frame shown */
    char message[96];
    double message_until_ms, period_ms, frame_ms; /* means of the newest frames, 0 = not known */
    int64_t restarts;
} game;

/* ---- keys ---- */

static bool is_bound(const game *g, int place) {
    for (int i = 0; i < g->num_keys; i++) {
        if (g->keys[i].act.place == place) return true;
    }
    return false;
}

static void bind(game *g, int code, const char *shown, world_act act) {
    if (act.place < 0 || g->num_keys == MAX_KEYS) return;
    binding *b = &g->keys[g->num_keys++];
    const char *name = g->run->action_names[act.place];
    *b = (binding){.code = code, .shown = shown, .act = act};
    if (act.value == 1) {
        snprintf(b->name, sizeof b->name, "%s", name ? name : "?");
    } else {
        snprintf(b->name, sizeof b->name, "%s=%g", name ? name : "?", (double)act.value);
    }
}

static void bind_words(game *g, const char *words, int first, const char *first_shown, int second,
                       const char *second_shown) {
    world_act act = world_find_act(g->run, words);
    bind(g, first, first_shown, act);
    bind(g, second, second_shown, act);
}

/* Where "left" turns, a and d do too, unless there are actions to the side; where the camera turns, "left" is to the side. */
static void bind_all(game *g) {
    static const char *const digits[] = {"1", "2", "3", "4", "5", "6", "7", "8", "9"};
    const world_run *run = g->run;
    bool camera = world_find_act(run, "cameraX").place >= 0;
    bool turns = world_find_act(run, "turn-left turn_left").place >= 0;
    bind_words(g, "forward forwards ahead up", 'w', "w", KEY_UP, "up");
    bind_words(g, "back backward backwards down", 's', "s", KEY_DOWN, "down");
    bind_words(g, WORLD_TURN_LEFT, 'q', "q", KEY_LEFT, "left");
    bind_words(g, WORLD_TURN_RIGHT, 'e', "e", KEY_RIGHT, "right");
    const char *to_left = camera || turns ? "strafe-left strafe_left left" : "strafe-left strafe_left";
    const char *to_right = camera || turns ? "strafe-right strafe_right right" : "strafe-right strafe_right";
    bool sideways = world_find_act(run, to_left).place >= 0;
    bind(g, 'a', "a", world_find_act(run, sideways ? to_left : WORLD_TURN_LEFT));
    bind(g, 'd', "d", world_find_act(run, sideways ? to_right : WORLD_TURN_RIGHT));
    int digit = 0;
    for (int i = 0; i < run->info.action_dim && digit < 9; i++) {
        if (!run->action_names[i] || run->rest[i] == 1 || is_bound(g, i)) continue;
        bind(g, '1' + digit, digits[digit], (world_act){i, 1});
        digit++;
    }
}

static void say_on_screen(game *g, const char *text) {
    snprintf(g->message, sizeof g->message, "%s", text);
    g->message_until_ms = now_ms() + MESSAGE_MS;
}

/* The frame that is shown, under the first name that is free. */
static rf_status save_frame(game *g, rf_error *err) {
    char path[64], message[96];
    world_settings settings;
    int number = 0;
    do {
        snprintf(path, sizeof path, "frame-%03d.png", number);
    } while (rf_path_exists(path) && ++number < MAX_SAVED);
    RF_TRY(world_settings_make(g->run, &settings, err));
    rf_error save_err = {0};
    rf_status st = rf_image_save_png(&g->frame, path, settings.texts, 2, &save_err);
    world_settings_free(&settings);
    snprintf(message, sizeof message, "%.90s", st == RF_OK ? path : save_err.message);
    if (st == RF_OK) snprintf(message, sizeof message, "saved %s", path);
    say_on_screen(g, message);
    return RF_OK; /* a full disk does not end the game */
}

static rf_status on_key(game *g, const terminal_key *key, rf_error *err) {
    for (int i = 0; i < g->num_keys; i++) {
        if (g->keys[i].code != key->code || key->control) continue;
        if (key->release) {
            if (g->held == &g->keys[i]) g->down = false;
            return RF_OK;
        }
        g->held = &g->keys[i];
        g->fresh = true;
        g->down = terminal_tells_releases(g->screen);
        g->heard_ms = now_ms();
        return RF_OK;
    }
    if (key->release || key->control) return RF_OK;
    switch (key->code) {
    case ' ':
        g->held = NULL;
        g->down = g->fresh = false;
        break;
    case 'p': g->paused = !g->paused; break;
    case 'r': g->restart = true; break;
    case 'o': return save_frame(g, err);
    case '?':
    case 'h': g->help = !g->help; break;
    case 'x':
    case KEY_ESCAPE: g->quit = true; break;
    default: break;
    }
    return RF_OK;
}

/* All keys that come until `until_ms` (those that are there, if it has passed). */
static rf_status read_keys(game *g, double until_ms, rf_error *err) {
    for (;;) {
        terminal_key key;
        double left = until_ms - now_ms();
        if (!terminal_read_key(g->screen, left > 0 ? (int)ceil(left) : 0, &key)) break;
        RF_TRY(on_key(g, &key, err));
        if (g->quit) break;
    }
    if (terminal_stopping()) g->quit = true;
    terminal_pause_if_asked(g->screen);
    return RF_OK;
}

/* The row of the next frame. */
static void act(game *g) {
    size_t row_bytes = (size_t)g->run->info.action_dim * sizeof *g->row;
    bool acts = g->held && (g->down || g->fresh || now_ms() - g->heard_ms < HOLD_MS);
    g->fresh = false;
    if (!acts) {
        g->held = g->down ? g->held : NULL;
        memcpy(g->row, g->run->rest, row_bytes);
    } else {
        memset(g->row, 0, row_bytes);
        g->row[g->held->act.place] = g->held->act.value;
    }
    world_action_text(g->run, g->row, g->action, sizeof g->action);
}

/* ---- the screen ---- */

static void status_text(const game *g, char *text, size_t text_bytes) {
    const world_run *run = g->run;
    const rf_world_session_info *s = &run->last;
    char steps[96] = "", partly[32] = "", rate[48] = "";
    if (s->has_cache && s->last.steps > 0) {
        if (s->last.steps_partial > 0) snprintf(partly, sizeof partly, ", %jd partly", (intmax_t)s->last.steps_partial);
        snprintf(steps, sizeof steps, "%.24s: %jd of %d steps computed%s, %jd reused", world_policy_name(run),
                 (intmax_t)s->last.steps_full, run->options.num_steps, partly, (intmax_t)s->last.steps_skipped);
    } else {
        snprintf(steps, sizeof steps, "%d steps", run->options.num_steps);
    }
    if (g->period_ms > 0) snprintf(rate, sizeof rate, "%.1f frames/s  %.0f ms  ", 1e3 / g->period_ms, g->frame_ms);
    snprintf(text, text_bytes, " %s%s  context %d, %s", rate, steps, s->context_frames,
             run->options.context_cache ? rf_context_mode_name(run->options.context) : "not kept");
}

static void frame_text(const game *g, char *text, size_t text_bytes) {
    const char *note = now_ms() < g->message_until_ms ? g->message
                       : g->paused                    ? "paused (p goes on)"
                                                      : "? for the keys";
    snprintf(text, text_bytes, " %-14s frame %d%s  %s", g->action, g->run->num_made, g->run->video ? " (recorded)" : "",
             note);
}

/* "w, up forward", HELP_COLUMNS of them a line. */
static int help_lines(const game *g, char lines[MAX_HELP][128]) {
    int num = 0, column = 0;
    lines[0][0] = 0;
    for (int i = 0; i < g->num_keys && num < MAX_HELP - 3; i++) {
        char both[32], entry[64];
        bool pair = i + 1 < g->num_keys && g->keys[i].act.place == g->keys[i + 1].act.place &&
                    g->keys[i].act.value == g->keys[i + 1].act.value;
        snprintf(both, sizeof both, pair ? "%s, %s" : "%s", g->keys[i].shown, pair ? g->keys[i + 1].shown : "");
        snprintf(entry, sizeof entry, " %-8s %-16.30s", both, g->keys[i].name);
        size_t used = strlen(lines[num]);
        snprintf(lines[num] + used, 128 - used, "%s", entry);
        if (pair) i++;
        if (++column == HELP_COLUMNS) {
            lines[++num][0] = 0;
            column = 0;
        }
    }
    if (column > 0) num++;
    snprintf(lines[num++], 128, " space    nothing          p        pause            r        from the start");
    snprintf(lines[num++], 128, " o        save the frame   ?        these lines      x, Esc   end");
    return num;
}

static rf_status show(game *g, rf_error *err) {
    char help[MAX_HELP][128], status[256], frame[256];
    const char *lines[MAX_HELP + 2];
    int num = 0, num_help = g->help ? help_lines(g, help) : 0;
    for (int i = 0; i < num_help; i++) lines[num++] = help[i];
    frame_text(g, frame, sizeof frame);
    status_text(g, status, sizeof status);
    lines[num++] = frame;
    lines[num++] = status;
    return terminal_draw(g->screen, &g->frame, lines, num, err);
}

/* ---- the game ---- */

static rf_status make_frame(game *g, rf_error *err) {
    world_run *run = g->run;
    rf_image made = {0};
    act(g);
    RF_TRY(rf_world_session_step(run->session, g->row, NULL, err));
    RF_TRY(rf_world_session_read_frame(run->session, g->planar, err));
    RF_TRY(rf_image_from_planar(&made, g->planar, run->info.frame_width, run->info.frame_height, err));
    rf_image_free(&g->frame);
    g->frame = made;
    run->last = rf_world_session_get_info(run->session);
    run->denoise_ms += run->last.denoise_ms;
    run->context_ms += run->last.context_ms;
    run->decode_sum_ms += run->last.decode_ms;
    run->num_made++;
    RF_TRY(world_write_trace(run, run->num_made, err));
    return run->video ? rf_video_writer_add(run->video, g->frame.rgb, err) : RF_OK;
}

static rf_status restart(game *g, rf_error *err) {
    const rf_image *first = &g->run->prompt.frames[g->run->prompt.num - 1];
    rf_image copy = {0};
    static const uint8_t black[3] = {0, 0, 0};
    RF_TRY(rf_image_create(&copy, first->width, first->height, black, err));
    rf_image_blit(&copy, first, 0, 0);
    rf_image_free(&g->frame);
    g->frame = copy;
    g->restart = false;
    snprintf(g->action, sizeof g->action, "start");
    return world_start(g->run, err);
}

static bool ended(const game *g) {
    return g->quit || (g->run->args.num_frames && g->run->num_made + 1 >= g->run->args.num_frames);
}

static void note_time(double *mean, double ms) {
    *mean = *mean > 0 ? *mean + NEWEST_WEIGHT * (ms - *mean) : ms;
}

static rf_status loop(game *g, rf_error *err) {
    double pace_ms = 1e3 / g->run->fps, due = now_ms(), shown_ms = 0;
    RF_TRY(restart(g, err));
    if (g->run->video) RF_TRY(rf_video_writer_add(g->run->video, g->frame.rgb, err));
    RF_TRY(show(g, err));
    while (!ended(g)) {
        double begin = now_ms();
        if (g->paused) {
            RF_TRY(read_keys(g, begin + 100, err));
            if (g->restart) RF_TRY(restart(g, err));
            RF_TRY(show(g, err));
            due = now_ms();
            shown_ms = 0;
            continue;
        }
        RF_TRY(read_keys(g, due, err));
        if (ended(g) || g->paused) continue;
        if (g->restart) RF_TRY(restart(g, err));
        double work = now_ms();
        due = work - due > pace_ms ? work + pace_ms : due + pace_ms; /* a late frame is not caught up */
        RF_TRY(make_frame(g, err));
        RF_TRY(show(g, err));
        double now = now_ms();
        note_time(&g->frame_ms, now - work);
        if (shown_ms > 0) note_time(&g->period_ms, now - shown_ms);
        shown_ms = now;
    }
    return RF_OK;
}

/* While the screen is drawn on, what the library has to say is held back; errors come back as such. */
static void keep_quiet(void *user, rf_log_level level, const char *line) {
    (void)user, (void)level, (void)line;
}

static rf_status finish(world_run *run, rf_error *err) {
    rf_video_writer *video = run->video;
    rf_file_writer *trace = run->trace;
    run->trace = NULL;
    if (trace) RF_TRY(rf_file_writer_commit(trace, err));
    run->video = NULL;
    return video ? rf_video_writer_commit(video, err) : RF_OK;
}

rf_status play_check(rf_error *err) {
    return terminal_check(err);
}

rf_status world_play(world_run *run, rf_error *err) {
    game g = {.run = run};
    const rf_log quiet = {.write = keep_quiet, .level = RF_LOG_ERROR};
    size_t values = (size_t)run->info.frame_width * (size_t)run->info.frame_height * 3;
    g.planar = rf_alloc_zero(values, sizeof *g.planar);
    g.row = rf_alloc_zero((size_t)run->info.action_dim + 1, sizeof *g.row);
    rf_status st = RF_OK;
    if (!g.planar || !g.row) st = rf_fail(err, RF_ERR_MEMORY, "--play: no memory for a frame");
    if (st == RF_OK) bind_all(&g);
    if (st == RF_OK) st = world_open_video(run, err);
    if (st == RF_OK) st = terminal_open(&g.screen, run->args.draw ? run->args.draw : "auto", err);
    if (st == RF_OK) {
        rf_backend_set_log(run->backend, &quiet);
        st = loop(&g, err);
        rf_backend_set_log(run->backend, &run->log);
    }
    terminal_close(g.screen);
    if (st == RF_OK) st = finish(run, err);
    rf_image_free(&g.frame);
    rf_free(g.planar);
    rf_free(g.row);
    return st;
}
