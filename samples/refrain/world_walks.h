/* samples/refrain/world_walks.h - some walks through a world, to measure on: first frames, actions, seeds of noise, and what the simulator
 * shows where the model has one. */
#ifndef REFRAIN_WORLD_WALKS_H
#define REFRAIN_WORLD_WALKS_H

#include "samples/refrain/world_run.h"

#define WALKS_TEXT_BYTES 4096

typedef struct {
    const rf_world_model *model;
    rf_world_model_info info;
    int num, num_new; /* new frames of a walk */
    bool from_latents;
    float *prompts; /* [num][3][H][W], or latents */
    float *actions; /* [num][num_new][action_dim] */
    uint64_t *seeds;
    float
        *truth; /* [num][num_new][3][H][W] of the simulator, or NULL: not all walks start in it and do what it knows */
    char prompt_text[WALKS_TEXT_BYTES], action_text[WALKS_TEXT_BYTES];
    /* while they are made */
    world_run *words;
    bool simulated;
    maze_world *simulators; /* [num] */
} world_walks;

typedef struct {
    const char *model_name, *synthetic;
    const arg_list *inits,
        *actions; /* taken in turns; NULL or empty: worlds first_world + i of the simulator, latents of noise where
                                        there is none; built-in scripts */
    uint64_t seed, first_world;
    int num, num_new, window;
    bool quiet;
} world_walks_options;

/* On failure what is there must be freed too. */
rf_status world_walks_make(world_walks *out, const rf_world_model *model, const world_walks_options *options,
                           rf_error *err);
void world_walks_free(world_walks *walks);

size_t world_walks_frame_elems(const world_walks *walks);
size_t world_walks_latent_elems(const world_walks *walks);
/* Starts a session's rollouts as walks first, first + 1, ... */
rf_status world_walks_start(const world_walks *walks, rf_world_session *session, int first, rf_error *err);
const float *world_walks_actions(const world_walks *walks, int walk, int frame);

#endif
