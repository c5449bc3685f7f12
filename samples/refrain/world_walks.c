/* samples/refrain/world_walks.c */
#include "samples/refrain/world_walks.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "core/memory.h"
#include "core/rng.h"

size_t world_walks_frame_elems(const world_walks *w) {
    return 3 * (size_t)w->info.frame_height * (size_t)w->info.frame_width;
}

size_t world_walks_latent_elems(const world_walks *w) {
    return (size_t)w->info.latent_channels * (size_t)w->info.latent_height * (size_t)w->info.latent_width;
}

static void append_text(char *text, const char *piece) {
    size_t used = strlen(text);
    snprintf(text + used, WALKS_TEXT_BYTES - used, "%s%s", used ? "; " : "", piece);
}

/* --- actions ------------------------------------------------------------------------------------------------------ */

/* What walks do unless --actions says it: what a person would look at first. */
typedef struct {
    const char *act; /* words as world_find_act takes them */
    int count;
} leg;

#define AHEAD "forward"
#define REST  "none noop"
static const leg loop_script[] = {{WORLD_TURN_RIGHT, 8}, {WORLD_TURN_LEFT, 8}, {NULL, 0}};
static const leg walk_script[] = {{AHEAD, 8}, {WORLD_TURN_LEFT, 6}, {AHEAD, 6}, {WORLD_TURN_RIGHT, 4}, {NULL, 0}};
static const leg wander_script[] = {{AHEAD, 4}, {WORLD_TURN_RIGHT, 12}, {AHEAD, 8}, {REST, 4}, {NULL, 0}};
static const leg crab_script[] = {{"strafe-left", 6}, {"strafe-right", 8}, {"back", 4}, {AHEAD, 6}, {NULL, 0}};
static const leg *const scripts[] = {loop_script, walk_script, wander_script, crab_script};
#define NUM_SCRIPTS (int)(sizeof scripts / sizeof scripts[0])

/* rows [num_new][dim] by a script over and over; false if the model has not all its actions. */
static bool by_script(const world_walks *w, const leg *script, float *rows) {
    size_t dim = (size_t)w->info.action_dim;
    for (const leg *l = script; l->act; l++) {
        if (world_find_act(w->words, l->act).place < 0) return false;
    }
    for (int frame = 0; frame < w->num_new;) {
        for (const leg *l = script; l->act; l++) {
            world_act act = world_find_act(w->words, l->act);
            for (int i = 0; i < l->count && frame < w->num_new; i++, frame++)
                rows[(size_t)frame * dim + (size_t)act.place] = act.value;
        }
    }
    return true;
}

/* One action after the other, three frames each. */
static void by_turns(const world_walks *w, int walk, float *rows) {
    int dim = w->info.action_dim, num = w->info.num_actions > 0 ? w->info.num_actions : dim;
    for (int frame = 0; frame < w->num_new && num > 0; frame++)
        rows[(size_t)frame * (size_t)dim + (size_t)((frame / 3 + walk) % num)] = 1;
}

static rf_status by_list(const world_walks *w, const arg_list *lists, int walk, float *rows, rf_error *err) {
    size_t dim = (size_t)w->info.action_dim;
    rf_action_names names = {w->info.action_dim, w->words->action_names};
    float *given = NULL;
    int num = 0;
    RF_TRY(rf_actions_parse(&given, &num, lists->items[walk % lists->count], &names, err));
    for (int frame = 0; frame < w->num_new && num > 0; frame++)
        memcpy(rows + (size_t)frame * dim, given + (size_t)(frame % num) * dim, dim * sizeof *rows);
    rf_free(given);
    return num > 0 ? RF_OK : rf_fail(err, RF_ERR_ARGUMENT, "--actions: an empty list");
}

/* "right*8,left*8" of what was made. */
static void note_actions(world_walks *w, const float *rows) {
    char text[512];
    size_t dim = (size_t)w->info.action_dim, used = 0;
    text[0] = 0;
    for (int i = 0, count; i < w->num_new; i += count) {
        const float *row = rows + (size_t)i * dim;
        char name[128];
        world_action_text(w->words, row, name, sizeof name);
        for (count = 1; i + count < w->num_new && memcmp(row, row + (size_t)count * dim, dim * sizeof *row) == 0;)
            count++;
        if (used + strlen(name) + 16 > sizeof text) break;
        used += (size_t)snprintf(text + used, sizeof text - used, "%s%s*%d", used ? "," : "", name, count);
    }
    append_text(w->action_text, text);
}

static rf_status plan_actions(world_walks *w, const world_walks_options *o, rf_error *err) {
    size_t stride = (size_t)w->num_new * (size_t)w->info.action_dim;
    w->actions = rf_alloc_zero((size_t)w->num * stride + 1, sizeof *w->actions);
    if (!w->actions)
        return rf_fail(err, RF_ERR_MEMORY, "no memory for the actions of %d walks of %d frames", w->num, w->num_new);
    for (int walk = 0; walk < w->num; walk++) {
        float *rows = w->actions + (size_t)walk * stride;
        if (o->actions && o->actions->count > 0) {
            RF_TRY(by_list(w, o->actions, walk, rows, err));
        } else if (!by_script(w, scripts[walk % NUM_SCRIPTS], rows)) {
            memset(rows, 0, stride * sizeof *rows);
            by_turns(w, walk, rows);
        }
        note_actions(w, rows);
    }
    return RF_OK;
}

/* --- first frames ------------------------------------------------------------------------------------------------- */

static bool has_simulator(const world_walks *w) {
    return w->info.simulator && strcmp(w->info.simulator, "maze") == 0;
}

static rf_status load_prompt(world_walks *w, int walk, const char *init, rf_error *err) {
    world_run *words = w->words;
    words->args.init = init;
    rf_status st = world_load_prompt(words, err);
    if (st == RF_OK) {
        const world_prompt *p = &words->prompt;
        world_to_planar(&p->frames[p->num - 1], w->prompts + (size_t)walk * world_walks_frame_elems(w));
        if (p->simulated) w->simulators[walk] = p->simulator;
        w->simulated = p->simulated && (walk == 0 || w->simulated);
        append_text(w->prompt_text, p->text);
    }
    world_free_prompt(&words->prompt);
    return st;
}

static rf_status plan_prompts(world_walks *w, const world_walks_options *o, rf_error *err) {
    const arg_list *inits = o->inits && o->inits->count > 0 ? o->inits : NULL;
    size_t frame = world_walks_frame_elems(w), latent = world_walks_latent_elems(w);
    w->from_latents = !inits && !has_simulator(w);
    w->prompts = rf_alloc_zero((size_t)w->num * (frame > latent ? frame : latent), sizeof *w->prompts);
    w->simulators = rf_alloc_zero((size_t)w->num, sizeof *w->simulators);
    w->seeds = rf_alloc_zero((size_t)w->num, sizeof *w->seeds);
    if (!w->prompts || !w->simulators || !w->seeds)
        return rf_fail(err, RF_ERR_MEMORY, "no memory for the first frames of %d walks", w->num);
    for (int walk = 0; walk < w->num; walk++) {
        char seed[24];
        w->seeds[walk] = o->seed + (uint64_t)walk;
        snprintf(seed, sizeof seed, "%ju", (uintmax_t)(o->first_world + (uint64_t)walk));
        if (w->from_latents) {
            rf_rng_normal_at(w->seeds[walk], 1U << 20, 0, w->prompts + (size_t)walk * latent, latent);
        } else {
            RF_TRY(load_prompt(w, walk, inits ? inits->items[walk % inits->count] : seed, err));
        }
    }
    if (w->from_latents) append_text(w->prompt_text, "latents of noise");
    return RF_OK;
}

/* The frames that the simulator shows, where every walk starts in it and does what it knows. */
static rf_status make_truth(world_walks *w, rf_error *err) {
    static const uint8_t black[3] = {0, 0, 0};
    size_t dim = (size_t)w->info.action_dim, frame = world_walks_frame_elems(w), total = (size_t)(w->num * w->num_new);
    for (size_t i = 0; i < total && w->simulated; i++)
        w->simulated = world_simulator_action(w->words, w->actions + i * dim) >= 0;
    if (!w->simulated) return RF_OK;
    rf_image image = {0};
    w->truth = rf_alloc_zero(total, frame * sizeof *w->truth);
    if (!w->truth) return rf_fail(err, RF_ERR_MEMORY, "no memory for %zu frames of the simulator", total);
    RF_TRY(rf_image_create(&image, w->info.frame_width, w->info.frame_height, black, err));
    for (size_t i = 0; i < total; i++) {
        maze_world *world = &w->simulators[i / (size_t)w->num_new];
        maze_step(world, world_simulator_action(w->words, w->actions + i * dim));
        maze_render(world, image.width, image.height, SIMULATOR_SAMPLES, image.rgb);
        world_to_planar(&image, w->truth + i * frame);
    }
    rf_image_free(&image);
    return RF_OK;
}

/* --- all ---------------------------------------------------------------------------------------------------------- */

rf_status world_walks_make(world_walks *w, const rf_world_model *model, const world_walks_options *o, rf_error *err) {
    *w = (world_walks){.model = model, .info = rf_world_model_get_info(model), .num = o->num, .num_new = o->num_new};
    w->words = rf_alloc_zero(1, sizeof *w->words);
    if (!w->words) return rf_fail(err, RF_ERR_MEMORY, "no memory for %d walks", o->num);
    w->words->model = (rf_world_model *)(uintptr_t)model; /* read only */
    w->words->model_name = o->model_name;
    w->words->info = w->info;
    w->words->options.window = o->window;
    w->words->args.quiet = o->quiet;
    w->words->args.synthetic = o->synthetic;
    RF_TRY(world_name_actions(w->words, err));
    RF_TRY(plan_prompts(w, o, err));
    RF_TRY(plan_actions(w, o, err));
    return make_truth(w, err);
}

void world_walks_free(world_walks *w) {
    if (w->words) {
        rf_free(w->words->action_names);
        rf_free(w->words->rest);
        rf_free(w->words);
    }
    rf_free(w->prompts);
    rf_free(w->simulators);
    rf_free(w->seeds);
    rf_free(w->actions);
    rf_free(w->truth);
    *w = (world_walks){0};
}

rf_status world_walks_start(const world_walks *w, rf_world_session *session, int first, rf_error *err) {
    const uint64_t *seeds = w->seeds + first;
    if (w->from_latents) {
        const float *latents = w->prompts + (size_t)first * world_walks_latent_elems(w);
        return rf_world_session_start_latents(session, latents, 1, NULL, seeds, err);
    }
    return rf_world_session_start(session, w->prompts + (size_t)first * world_walks_frame_elems(w), 1, NULL, seeds,
                                  err);
}

const float *world_walks_actions(const world_walks *w, int walk, int frame) {
    return w->actions + (size_t)(walk * w->num_new + frame) * (size_t)w->info.action_dim;
}
