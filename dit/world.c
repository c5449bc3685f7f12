/* dit/world.c - a world model's folder, and rollouts on it: one frame after the other, the frames in front of it kept. */
#include "dit/world.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "core/arena.h"
#include "core/file.h"
#include "core/json.h"
#include "core/memory.h"
#include "dit/config.h"
#include "dit/forward.h"
#include "dit/vit_vae.h"

#define MAX_NOISE    20.0f /* of a first latent, as in the public loop */
#define TRAIN_STEPS  1000
#define RELEASE_DIT  "oasis500m.safetensors"
#define RELEASE_VAE  "vit-l-20.safetensors"
#define CONFIG_CLASS "OasisWorld"

struct rf_world_model {
    rf_backend *backend;
    char *path;
    rf_json *config, *calibration; /* either may be NULL */
    rf_dit_model *dit;
    rf_vit_vae *vae;
    const char **actions; /* [action_dim], borrowed from config or static; NULL entries: no name */
    int num_actions;
    double fps;
    int num_steps, stabilization_level;
    const char *simulator;
};

/* What a folder says, before any weight is read. */
typedef struct {
    rf_dit_desc dit;
    rf_vit_vae_config vae;
    double fps;
    int num_steps, stabilization_level;
    const char *simulator;
    const rf_json_value *actions;
} world_config;

/* --- the folder ------------------------------------------------------------------------------------------------------ */

/* Of the public model, in the order of its action rows. */
static const char *const oasis_actions[] = {
    "inventory", "ESC",      "hotbar.1",  "hotbar.2", "hotbar.3", "hotbar.4", "hotbar.5", "hotbar.6", "hotbar.7",
    "hotbar.8",  "hotbar.9", "forward",   "back",     "left",     "right",    "cameraX",  "cameraY",  "jump",
    "sneak",     "sprint",   "swapHands", "attack",   "use",      "pickItem", "drop"};

static world_config default_config(void) {
    return (world_config){.dit = rf_dit_config_oasis(),
                          .vae = rf_vit_vae_config_oasis(),
                          .fps = 20.0,
                          .num_steps = 10,
                          .stabilization_level = 15};
}

/* "streams": channels of each modality of a latent. */
static rf_status read_streams(rf_dit_desc *dit, const rf_json *doc, const rf_json_value *root, rf_error *err) {
    const rf_json_value *list = rf_json_get(root, "streams");
    if (list == NULL) return RF_OK;
    size_t num = rf_json_count(list);
    if (!rf_json_is_array(list) || num < 1 || num > RF_MAX_STREAMS)
        return rf_fail(err, RF_ERR_CONFIG, "%s: \"streams\" is not an array of 1..%d channel counts", rf_json_name(doc),
                       RF_MAX_STREAMS);
    dit->num_streams = (int)num;
    for (size_t i = 0; i < num; i++) {
        double channels = rf_json_number(rf_json_at(list, i, NULL));
        if (!(channels >= 1.0 && channels <= dit->in_channels && channels == floor(channels)))
            return rf_fail(err, RF_ERR_CONFIG, "%s: entry %zu of \"streams\" is not a number of channels",
                           rf_json_name(doc), i);
        dit->stream_channels[i] = (int)channels;
    }
    rf_status st = rf_dit_desc_check(dit, err);
    return st == RF_OK ? st : rf_fail_prefix(err, st, "%s", rf_json_name(doc));
}

static rf_status read_config(world_config *out, const rf_json *doc, rf_error *err) {
    const rf_json_value *root = rf_json_root(doc);
    const char *class_name = "";
    if (!rf_json_is_object(root)) return rf_fail(err, RF_ERR_CONFIG, "%s: expected a JSON object", rf_json_name(doc));
    *out = default_config();
    RF_TRY(rf_json_opt_string(doc, root, "_class_name", "", &class_name, err));
    if (strcmp(class_name, CONFIG_CLASS) != 0)
        return rf_fail(err, RF_ERR_UNSUPPORTED, "%s: _class_name is \"%.40s\", expected " CONFIG_CLASS,
                       rf_json_name(doc), class_name);
    const rf_json_value *dit = rf_json_get(root, "dit"), *vae = rf_json_get(root, "vae");
    if (dit == NULL || vae == NULL || !rf_json_is_object(dit) || !rf_json_is_object(vae))
        return rf_fail(err, RF_ERR_CONFIG, "%s: expected objects \"dit\" and \"vae\"", rf_json_name(doc));
    RF_TRY(rf_dit_config_read_oasis(&out->dit, doc, dit, err));
    RF_TRY(rf_vit_vae_config_read(&out->vae, doc, vae, err));
    RF_TRY(rf_json_opt_double(doc, root, "scaling_factor", 1e-6, 1e6, out->vae.scaling_factor, &out->vae.scaling_factor,
                              err));
    RF_TRY(rf_json_opt_double(doc, root, "fps", 0.01, 1000.0, out->fps, &out->fps, err));
    RF_TRY(read_streams(&out->dit, doc, root, err));
    int64_t steps, level;
    RF_TRY(rf_json_opt_int(doc, root, "steps", 1, TRAIN_STEPS, out->num_steps, &steps, err));
    RF_TRY(rf_json_opt_int(doc, root, "stabilization_level", 1, TRAIN_STEPS, out->stabilization_level, &level, err));
    out->num_steps = (int)steps;
    out->stabilization_level = (int)level;
    if (rf_json_has(root, "simulator")) RF_TRY(rf_json_opt_string(doc, root, "simulator", "", &out->simulator, err));
    out->actions = rf_json_get(root, "actions");
    return RF_OK;
}

static rf_status check_fit(const world_config *c, const char *name, rf_error *err) {
    int grid_h = c->vae.input_height / c->vae.patch_size, grid_w = c->vae.input_width / c->vae.patch_size;
    if (c->vae.latent_dim != c->dit.in_channels || grid_h != c->dit.sample_size || grid_w != c->dit.sample_width)
        return rf_fail(err, RF_ERR_CONFIG, "%s: the VAE's latents are %d x %d x %d, the transformer's %d x %lld x %lld",
                       name, c->vae.latent_dim, grid_h, grid_w, c->dit.in_channels, (long long)c->dit.sample_size,
                       (long long)c->dit.sample_width);
    return RF_OK;
}

static rf_status read_actions(rf_world_model *m, const world_config *c, rf_error *err) {
    int dim = c->dit.action_dim, named = (int)(sizeof oasis_actions / sizeof *oasis_actions);
    m->actions = rf_alloc_zero((size_t)dim + 1, sizeof *m->actions);
    if (m->actions == NULL) return rf_fail(err, RF_ERR_MEMORY, "out of memory for action names");
    if (c->actions == NULL) {
        for (int i = 0; i < dim && dim == named; i++) m->actions[i] = oasis_actions[i];
        m->num_actions = dim == named ? named : 0;
        return RF_OK;
    }
    size_t num = rf_json_count(c->actions);
    if (rf_json_is_object(c->actions) || num > (size_t)dim)
        return rf_fail(err, RF_ERR_CONFIG, "%s: \"actions\" is not an array of up to %d names", m->path, dim);
    for (size_t i = 0; i < num; i++) {
        m->actions[i] = rf_json_string(rf_json_at(c->actions, i, NULL));
        if (m->actions[i] == NULL || m->actions[i][0] == 0)
            return rf_fail(err, RF_ERR_CONFIG, "%s: entry %zu of \"actions\" is not a name", m->path, i);
    }
    m->num_actions = (int)num;
    return RF_OK;
}

static rf_status create_model(rf_world_model **out, rf_backend *backend, const char *path, rf_error *err) {
    *out = rf_alloc_zero(1, sizeof **out);
    if (*out != NULL) (*out)->path = rf_strdup(path);
    if (*out == NULL || (*out)->path == NULL) return rf_fail(err, RF_ERR_MEMORY, "out of memory for a model");
    (*out)->backend = backend;
    return RF_OK;
}

static rf_status use_config(rf_world_model *m, const world_config *c, rf_error *err) {
    m->fps = c->fps;
    m->num_steps = c->num_steps;
    m->stabilization_level = c->stabilization_level;
    m->simulator = c->simulator;
    RF_TRY(check_fit(c, m->path, err));
    return read_actions(m, c, err);
}

/* "dir/stem.safetensors.index.json" if it is there, else "dir/stem.safetensors"; rf_free. */
static char *weights_path(const char *dir, const char *stem) {
    char name[64];
    snprintf(name, sizeof name, "%s.safetensors.index.json", stem);
    char *path = rf_path_join(dir, name);
    if (path == NULL || rf_path_exists(path)) return path;
    rf_free(path);
    snprintf(name, sizeof name, "%s.safetensors", stem);
    return rf_path_join(dir, name);
}

static bool has_file(const char *dir, const char *name) {
    char *path = rf_path_join(dir, name);
    bool found = path != NULL && rf_path_exists(path);
    rf_free(path);
    return found;
}

bool rf_world_is_world(const char *dir) {
    if (has_file(dir, RELEASE_DIT)) return true;
    if (!has_file(dir, "config.json") || has_file(dir, "model_index.json")) return false;
    rf_json *doc = NULL;
    char *path = rf_path_join(dir, "config.json");
    const char *class_name = "";
    bool is_world = path != NULL && rf_json_open(&doc, path, NULL) == RF_OK &&
                    rf_json_opt_string(doc, rf_json_root(doc), "_class_name", "", &class_name, NULL) == RF_OK &&
                    strcmp(class_name, CONFIG_CLASS) == 0;
    rf_json_close(doc);
    rf_free(path);
    return is_world;
}

static rf_status load_folder(rf_world_model *m, rf_dtype dtype, rf_error *err) {
    const char *dir = m->path;
    world_config config = default_config();
    bool release = has_file(dir, RELEASE_DIT);
    char *config_path = rf_path_join(dir, "config.json"), *cache_path = rf_path_join(dir, "cache.json");
    char *dit_path = release ? rf_path_join(dir, RELEASE_DIT) : weights_path(dir, "dit");
    char *vae_path = release ? rf_path_join(dir, RELEASE_VAE) : weights_path(dir, "vae");
    rf_status st = config_path && cache_path && dit_path && vae_path
                       ? RF_OK
                       : rf_fail(err, RF_ERR_MEMORY, "out of memory for a path");
    if (st == RF_OK && !rf_path_is_dir(dir)) st = rf_fail(err, RF_ERR_IO, "%s: no such model folder", dir);
    if (st == RF_OK && (!release || rf_path_exists(config_path))) {
        st = rf_json_open(&m->config, config_path, err);
        if (st == RF_OK) st = read_config(&config, m->config, err);
    }
    if (st == RF_OK) st = use_config(m, &config, err);
    if (st == RF_OK) st = rf_dit_model_load_file(&m->dit, m->backend, &config.dit, dit_path, dtype, err);
    if (st == RF_OK) st = rf_vit_vae_load(&m->vae, m->backend, &config.vae, vae_path, dtype, err);
    if (st == RF_OK && rf_path_exists(cache_path)) st = rf_json_open(&m->calibration, cache_path, err);
    rf_free(config_path);
    rf_free(cache_path);
    rf_free(dit_path);
    rf_free(vae_path);
    return st;
}

rf_status rf_world_model_load(rf_world_model **out, rf_backend *backend, const char *dir, rf_dtype dtype,
                              rf_error *err) {
    rf_world_model *m = NULL;
    *out = NULL;
    rf_status st = create_model(&m, backend, dir, err);
    if (st == RF_OK) st = load_folder(m, dtype, err);
    if (st == RF_OK)
        *out = m;
    else
        rf_world_model_close(m);
    return st;
}

rf_status rf_world_model_synthetic(rf_world_model **out, rf_backend *backend, const char *name, rf_dtype dtype,
                                   uint64_t seed, rf_error *err) {
    rf_world_model *m = NULL;
    world_config config = default_config();
    *out = NULL;
    rf_status st = create_model(&m, backend, name, err);
    if (st == RF_OK && rf_path_exists(name)) {
        st = rf_json_open(&m->config, name, err);
        if (st == RF_OK) st = read_config(&config, m->config, err);
    } else if (st == RF_OK && strcmp(name, "oasis-500m") != 0) {
        st = rf_fail(err, RF_ERR_ARGUMENT, "no built-in world \"%.40s\"; there is oasis-500m", name);
    }
    if (st == RF_OK) st = use_config(m, &config, err);
    if (st == RF_OK) st = rf_dit_model_synthetic(&m->dit, backend, &config.dit, dtype, seed, err);
    if (st == RF_OK) st = rf_vit_vae_synthetic(&m->vae, backend, &config.vae, dtype, seed + 100, err);
    if (st == RF_OK)
        *out = m;
    else
        rf_world_model_close(m);
    return st;
}

void rf_world_model_close(rf_world_model *m) {
    if (m == NULL) return;
    rf_vit_vae_close(m->vae);
    rf_dit_model_close(m->dit);
    rf_free(m->actions);
    rf_json_close(m->config);
    rf_json_close(m->calibration);
    rf_free(m->path);
    rf_free(m);
}

rf_world_model_info rf_world_model_get_info(const rf_world_model *m) {
    const rf_dit_desc *d = &m->dit->desc;
    const rf_vit_vae_config *v = rf_vit_vae_get_config(m->vae);
    return (rf_world_model_info){.path = m->path,
                                 .transformer = m->dit,
                                 .frame_height = v->input_height,
                                 .frame_width = v->input_width,
                                 .latent_channels = d->in_channels,
                                 .latent_height = (int)d->sample_size,
                                 .latent_width = (int)d->sample_width,
                                 .action_dim = d->action_dim,
                                 .num_actions = m->num_actions,
                                 .max_frames = (int)d->sample_frames,
                                 .fps = m->fps,
                                 .num_steps = m->num_steps,
                                 .stabilization_level = m->stabilization_level,
                                 .simulator = m->simulator,
                                 .weights_bytes =
                                     rf_params_tensor_bytes(m->dit->params) + rf_vit_vae_weights_bytes(m->vae),
                                 .num_params = rf_params_num_elems(m->dit->params) + rf_vit_vae_num_params(m->vae),
                                 .calibration = m->calibration ? rf_json_root(m->calibration) : NULL};
}

const char *rf_world_model_action_name(const rf_world_model *m, int action) {
    return action >= 0 && action < m->dit->desc.action_dim ? m->actions[action] : NULL;
}

/* --- options --------------------------------------------------------------------------------------------------------- */

static const char *const context_names[] = {"rebuild", "keep", "sinks"};

bool rf_context_mode_from_name(const char *name, rf_context_mode *out) {
    for (int i = 0; i < 3; i++) {
        if (strcmp(name, context_names[i]) != 0) continue;
        *out = (rf_context_mode)i;
        return true;
    }
    return false;
}

const char *rf_context_mode_name(rf_context_mode mode) {
    return (int)mode >= 0 && mode <= RF_CONTEXT_SINKS ? context_names[mode] : "unknown";
}

rf_world_options rf_world_options_default(void) {
    return (rf_world_options){
        .batch = 1, .num_sinks = 2, .context_cache = true, .residual_dtype = RF_DTYPE_COUNT, .use_graphs = true};
}

static int steps_of(const rf_world_options *o, const rf_world_model *m) {
    return o->num_steps ? o->num_steps : m->num_steps;
}
static int window_of(const rf_world_options *o, const rf_world_model *m) {
    return o->window ? o->window : (int)m->dit->desc.sample_frames;
}

rf_status rf_world_options_check(const rf_world_options *o, const rf_world_model *m, rf_error *err) {
    int steps = steps_of(o, m), window = window_of(o, m), most = (int)m->dit->desc.sample_frames;
    if (o->batch < 1 || o->batch > 1024) return rf_fail(err, RF_ERR_ARGUMENT, "batch %d, expected 1..1024", o->batch);
    if (steps < 1 || steps > TRAIN_STEPS)
        return rf_fail(err, RF_ERR_ARGUMENT, "%d steps a frame, expected 1..%d", steps, TRAIN_STEPS);
    if (o->stabilization_level < 0 || o->stabilization_level > TRAIN_STEPS)
        return rf_fail(err, RF_ERR_ARGUMENT, "stabilization level %d, expected 1..%d", o->stabilization_level,
                       TRAIN_STEPS);
    if (window < 2 || window > most)
        return rf_fail(err, RF_ERR_ARGUMENT, "a window of %d frames, this model was trained with 2..%d", window, most);
    if ((int)o->context < 0 || o->context > RF_CONTEXT_SINKS)
        return rf_fail(err, RF_ERR_ARGUMENT, "context mode %d is unknown", (int)o->context);
    if (o->context == RF_CONTEXT_SINKS && (o->num_sinks < 1 || o->num_sinks > window - 2))
        return rf_fail(err, RF_ERR_ARGUMENT, "%d sinks in a window of %d frames, expected 1..%d", o->num_sinks, window,
                       window - 2);
    if (!(o->max_drift >= 0.0 && o->max_drift <= 1e6))
        return rf_fail(err, RF_ERR_ARGUMENT, "drift bound %g, expected 0..1e6", o->max_drift);
    return RF_OK;
}

/* --- session --------------------------------------------------------------------------------------------------------- */

enum { MARK_BEGIN = 0, MARK_CONTEXT, MARK_DENOISED, MARK_DECODE, MARK_DECODED };

struct rf_world_session {
    const rf_world_model *model;
    const rf_ops *ops;
    rf_world_options options;
    rf_stream *stream;
    rf_dit_context *context;
    rf_dit_session *denoise; /* the newest frame alone */
    rf_dit_session *commit;  /* frames of the context: keys and values only */
    rf_vit_vae_session *vae;
    rf_graph *step_graph;
    rf_graph **commit_graphs; /* [window]: passes of f frames */
    bool *commit_ran;         /* [window] */

    int window, num_steps;
    int64_t latent_elems, frame_elems; /* of one rollout */

    /* device */
    char *memory;
    size_t memory_bytes;
    float *x, *x0;           /* [batch, C, h, w] the newest latent */
    float *kept;             /* [slots, batch, C*h*w] latents of the window */
    float *passing;          /* [batch, frames, C*h*w] of a context pass */
    int32_t *passing_rows;   /* [batch * frames] */
    rf_sampler_coefs *coefs; /* [num_steps] */

    /* host */
    float *timesteps;       /* [num_steps] */
    float level;            /* timestep that context frames are told */
    float *staging;         /* page-locked: one frame of every rollout */
    int32_t *host_rows;     /* page-locked [batch * window] */
    float *slot_actions;    /* [slots, batch, action_dim] */
    float *passing_actions; /* [batch, frames, action_dim] */
    uint64_t *seeds;

    /* the rollout */
    int *order;     /* [window] slots of the frames in the window, oldest first */
    int num_window; /* the newest included once it is made */
    int num_valid;  /* the first of them whose keys and values are kept */
    int num_frames, num_given, frames_slid;
    int64_t frame_forwards;
    double context_ms, denoise_ms, decode_ms;
    bool measured, started;
    rf_cache_counts total;
};

/* The public loop's schedule: beta from alpha-bar of a sigmoid, both ends clipped, in f32 where it is kept in f32. */
static void sigmoid_alphas_cumprod(float *out) {
    double start = 1.0 / (1.0 + exp(3.0)), end = 1.0 / (1.0 + exp(-3.0)), bar[TRAIN_STEPS + 1];
    for (int i = 0; i <= TRAIN_STEPS; i++) {
        double u = (double)i / TRAIN_STEPS;
        bar[i] = (end - 1.0 / (1.0 + exp(-(6.0 * u - 3.0)))) / (end - start);
    }
    double product = 1.0;
    for (int i = 0; i < TRAIN_STEPS; i++) {
        double beta = 1.0 - (bar[i + 1] / bar[0]) / (bar[i] / bar[0]);
        beta = beta < 0.0 ? 0.0 : beta > 0.999 ? 0.999 : beta;
        product *= (double)(float)(1.0 - (double)(float)beta);
        out[i] = (float)product;
    }
}

/* Entry i of linspace(-1, 999, n + 1) as PyTorch makes it: in f32, from the nearer end. */
static int level_of(int i, int n) {
    float step = 1000.0f / (float)n;
    return (int)(i < (n + 1) / 2 ? -1.0f + step * (float)i : 999.0f - step * (float)(n - i));
}

void rf_world_timesteps(float *out, int num_steps) {
    for (int i = 0; i < num_steps; i++) out[i] = (float)level_of(num_steps - i, num_steps);
}

/* DDIM on v-predictions between linspace(-1, 999, steps + 1), truncated to whole timesteps:
 * x0 = sqrt(a) x - sqrt(1-a) v, eps = sqrt(a) v + sqrt(1-a) x, x' = sqrt(a') x0 + sqrt(1-a') eps; the last a' is 1. */
static void make_schedule(rf_world_session *s, rf_sampler_coefs *coefs) {
    float bar[TRAIN_STEPS];
    sigmoid_alphas_cumprod(bar);
    for (int i = 0; i < s->num_steps; i++) {
        int from = s->num_steps - i;
        int t = level_of(from, s->num_steps), next = level_of(from - 1, s->num_steps);
        double a = bar[t], b = from == 1 || next < 0 ? 1.0 : bar[next];
        double keep = sqrt(b) * sqrt(a) + sqrt(1.0 - b) * sqrt(1.0 - a);
        double turn = sqrt(1.0 - b) * sqrt(a) - sqrt(b) * sqrt(1.0 - a);
        s->timesteps[i] = (float)t;
        coefs[i] = (rf_sampler_coefs){.in_scale = 1.0f,
                                      .timestep = (float)t,
                                      .x0_x = (float)sqrt(a),
                                      .x0_out = (float)-sqrt(1.0 - a),
                                      .x = (float)keep,
                                      .out = (float)turn};
    }
}

static rf_status take_buffers(rf_world_session *s, rf_arena *arena, rf_error *err) {
    size_t batch = (size_t)s->options.batch, one = (size_t)s->latent_elems, window = (size_t)s->window;
    RF_TRY(rf_arena_take(arena, (void **)&s->x, "latents", batch * one, sizeof(float), err));
    RF_TRY(rf_arena_take(arena, (void **)&s->x0, "predicted latents", batch * one, sizeof(float), err));
    RF_TRY(rf_arena_take(arena, (void **)&s->kept, "latents of the window", window * batch * one, sizeof(float), err));
    RF_TRY(rf_arena_take(arena, (void **)&s->passing, "latents of a pass", window * batch * one, sizeof(float), err));
    RF_TRY(rf_arena_take(arena, (void **)&s->passing_rows, "frames of a pass", window * batch, sizeof(int32_t), err));
    return rf_arena_take(arena, (void **)&s->coefs, "solver weights", (size_t)s->num_steps, sizeof *s->coefs, err);
}

static rf_status allocate(rf_world_session *s, rf_error *err) {
    rf_backend *backend = s->model->backend;
    size_t batch = (size_t)s->options.batch, window = (size_t)s->window;
    size_t actions = batch * (size_t)s->model->dit->desc.action_dim;
    size_t staged = batch * (size_t)(s->frame_elems > s->latent_elems ? s->frame_elems : s->latent_elems);
    rf_arena arena;
    rf_arena_init_counting(&arena);
    RF_TRY(take_buffers(s, &arena, err));
    s->memory_bytes = arena.peak;
    RF_TRY(rf_backend_alloc(backend, (void **)&s->memory, s->memory_bytes, err));
    rf_arena_init(&arena, s->memory, s->memory_bytes);
    RF_TRY(take_buffers(s, &arena, err));
    RF_TRY(rf_stream_zero(s->stream, s->memory, s->memory_bytes, err));
    RF_TRY(rf_backend_alloc_pinned(backend, (void **)&s->staging, staged * sizeof(float), err));
    RF_TRY(rf_backend_alloc_pinned(backend, (void **)&s->host_rows, batch * window * sizeof(int32_t), err));
    s->timesteps = rf_alloc((size_t)s->num_steps * sizeof(float));
    s->slot_actions = rf_alloc_zero(window * (actions + 1), sizeof(float));
    s->passing_actions = rf_alloc_zero(window * (actions + 1), sizeof(float));
    s->seeds = rf_alloc_zero(batch, sizeof *s->seeds);
    s->order = rf_alloc_zero(window, sizeof *s->order);
    s->commit_graphs = rf_alloc_zero(window + 1, sizeof *s->commit_graphs);
    s->commit_ran = rf_alloc_zero(window + 1, sizeof *s->commit_ran);
    rf_sampler_coefs *coefs = rf_alloc_zero((size_t)s->num_steps, sizeof *coefs);
    rf_status st = RF_OK;
    if (!s->timesteps || !s->slot_actions || !s->passing_actions || !s->seeds || !s->order || !s->commit_graphs ||
        !s->commit_ran || !coefs)
        st = rf_fail(err, RF_ERR_MEMORY, "out of memory for a session");
    if (st == RF_OK) {
        make_schedule(s, coefs);
        st = rf_stream_upload(s->stream, s->coefs, coefs, (size_t)s->num_steps * sizeof *coefs, err);
        rf_status done = rf_stream_synchronize(s->stream, st == RF_OK ? err : NULL);
        if (st == RF_OK) st = done;
    }
    rf_free(coefs);
    return st;
}

static rf_status queue_tail(void *user, rf_error *err) {
    rf_world_session *s = user;
    const rf_dit_desc *d = &s->model->dit->desc;
    rf_sampler_step_args args = {.model_out = rf_dit_session_output(s->denoise),
                                 .model_dtype = RF_DTYPE_F32,
                                 .x = s->x,
                                 .x0_prev = s->x0,
                                 .coefs = s->coefs,
                                 .step = rf_dit_session_step(s->denoise),
                                 .batch = s->options.batch,
                                 .branches = 1,
                                 .channels = d->in_channels,
                                 .out_channels = d->in_channels,
                                 .frames = 1,
                                 .height = d->sample_size,
                                 .width = d->sample_width,
                                 .pt = 1,
                                 .ph = d->ph,
                                 .pw = d->pw,
                                 .guidance_scale = 1.0f,
                                 .guided_channels = d->in_channels};
    RF_TRY(s->ops->sampler_step(s->stream, &args, err));
    return rf_dit_session_queue_advance(s->denoise, err);
}

static rf_status queue_step(rf_world_session *s, rf_error *err) {
    RF_TRY(rf_dit_session_forward(s->denoise, s->x, NULL, 0, err));
    return queue_tail(s, err);
}

static bool uses_graphs(const rf_world_session *s) {
    return s->options.use_graphs && rf_backend_has_graphs(s->model->backend);
}

static rf_status capture(rf_world_session *s, rf_graph **out, rf_status (*queue)(rf_world_session *, rf_error *),
                         rf_error *err) {
    RF_TRY(rf_stream_synchronize(s->stream, err));
    RF_TRY(rf_graph_begin(s->stream, err));
    rf_status st = queue(s, err);
    rf_status ended = rf_graph_end(out, s->stream, st == RF_OK ? err : NULL);
    return st == RF_OK ? ended : st;
}

static rf_status compute_context(void *user, rf_error *err);

/* Of a path; a trace names its model wherever the folder is. */
static const char *last_element(const char *path) {
    const char *slash = strrchr(path, '/');
    return slash && slash[1] ? slash + 1 : path;
}

static rf_status create_forwards(rf_world_session *s, rf_error *err) {
    const rf_world_options *o = &s->options;
    const rf_dit_desc *d = &s->model->dit->desc;
    rf_dit_session_options f = rf_dit_session_options_default();
    f.batch = o->batch;
    f.height = d->sample_size;
    f.width = d->sample_width;
    f.residual_dtype = o->residual_dtype;
    f.context = s->context;
    f.model_name = last_element(s->model->path);
    f.sampler_name = "ddim";

    rf_dit_session_options commit = f;
    commit.frames = s->window - 1;
    commit.store_context = commit.context_only = true;
    RF_TRY(rf_dit_session_create(&s->commit, s->model->dit, s->stream, &commit, err));

    f.max_steps = s->num_steps;
    f.timesteps = s->timesteps;
    f.policy = o->policy;
    f.cache = (rf_cache_options){.max_drift = o->max_drift, .record = o->record_trace, .carry = o->carry};
    f.force_policy = o->force_policy;
    f.calibration = s->model->calibration ? rf_json_root(s->model->calibration) : NULL;
    f.use_graphs = o->use_graphs;
    RF_TRY(rf_dit_session_create(&s->denoise, s->model->dit, s->stream, &f, err));
    if (!o->context_cache) rf_dit_session_set_prepare(s->denoise, compute_context, s);
    return RF_OK;
}

/* Chooses algorithms and captures a step. */
static rf_status rehearse(rf_world_session *s, rf_error *err) {
    int slot = 0;
    RF_TRY(rf_dit_context_set_window(s->context, &slot, 0, 1, err));
    RF_TRY(rf_dit_session_begin_frames(s->denoise, 1, s->timesteps, 1, s->num_steps, NULL, err));
    RF_TRY(queue_step(s, err));
    if (uses_graphs(s) && s->options.context_cache) RF_TRY(capture(s, &s->step_graph, queue_step, err));
    return rf_stream_synchronize(s->stream, err);
}

rf_status rf_world_session_create(rf_world_session **out, const rf_world_model *model, const rf_world_options *options,
                                  rf_error *err) {
    *out = NULL;
    RF_TRY(rf_world_options_check(options, model, err));
    rf_world_session *s = rf_alloc_zero(1, sizeof *s);
    if (s == NULL) return rf_fail(err, RF_ERR_MEMORY, "out of memory for a session");
    const rf_dit_desc *d = &model->dit->desc;
    const rf_vit_vae_config *v = rf_vit_vae_get_config(model->vae);
    s->model = model;
    s->options = *options;
    s->ops = rf_ops_for(model->backend);
    s->window = window_of(options, model);
    s->num_steps = steps_of(options, model);
    int level = options->stabilization_level ? options->stabilization_level : model->stabilization_level;
    s->level = (float)(level - 1);
    s->latent_elems = (int64_t)d->in_channels * d->sample_size * d->sample_width;
    s->frame_elems = (int64_t)3 * v->input_height * v->input_width;
    int64_t tokens = d->sample_size / d->ph * (d->sample_width / d->pw);
    rf_status st = rf_stream_create(&s->stream, model->backend, err);
    if (st == RF_OK) st = rf_gemm_set_tuning(s->stream, options->tune_gemm, err);
    if (st == RF_OK && options->gemm_tuning) st = rf_gemm_tuning_load(s->stream, options->gemm_tuning, err);
    if (st == RF_OK) st = allocate(s, err);
    if (st == RF_OK)
        st = rf_dit_context_create(&s->context, model->dit, s->stream, options->batch, tokens, s->window, err);
    if (st == RF_OK) st = create_forwards(s, err);
    if (st == RF_OK) st = rf_vit_vae_session_create(&s->vae, model->vae, s->stream, options->batch, err);
    if (st == RF_OK && options->policy == NULL) st = rehearse(s, err);
    if (st == RF_OK && options->gemm_tuning && rf_gemm_tuning_changed(s->stream))
        st = rf_gemm_tuning_save(s->stream, options->gemm_tuning, err);
    if (st == RF_OK) {
        rf_stream_set_phase(s->stream, RF_PHASE_RUN);
        *out = s;
    } else {
        rf_world_session_destroy(s);
    }
    return st;
}

void rf_world_session_destroy(rf_world_session *s) {
    if (s == NULL) return;
    if (s->stream) rf_stream_synchronize(s->stream, NULL);
    rf_graph_destroy(s->step_graph);
    for (int f = 0; s->commit_graphs != NULL && f <= s->window; f++) rf_graph_destroy(s->commit_graphs[f]);
    rf_free(s->commit_graphs);
    rf_free(s->commit_ran);
    rf_vit_vae_session_destroy(s->vae);
    rf_dit_session_destroy(s->denoise);
    rf_dit_session_destroy(s->commit);
    rf_dit_context_destroy(s->context);
    rf_backend_free_pinned(s->model->backend, s->staging);
    rf_backend_free_pinned(s->model->backend, s->host_rows);
    rf_backend_free(s->model->backend, s->memory);
    rf_stream_destroy(s->stream);
    rf_free(s->timesteps);
    rf_free(s->slot_actions);
    rf_free(s->passing_actions);
    rf_free(s->seeds);
    rf_free(s->order);
    rf_free(s);
}

/* --- the window ------------------------------------------------------------------------------------------------------ */

/* A slot that no frame of the window lies in. */
static int free_slot(const rf_world_session *s) {
    for (int slot = 0; slot < s->window; slot++) {
        bool used = false;
        for (int i = 0; i < s->num_window; i++) used |= s->order[i] == slot;
        if (!used) return slot;
    }
    return -1;
}

/* Makes room for one more frame. */
static void slide(rf_world_session *s) {
    if (s->num_window < s->window) return;
    int leaves = s->options.context == RF_CONTEXT_SINKS ? s->options.num_sinks : 0;
    memmove(s->order + leaves, s->order + leaves + 1, (size_t)(s->num_window - 1 - leaves) * sizeof *s->order);
    s->num_window--;
    s->frames_slid++;
    if (s->options.context == RF_CONTEXT_REBUILD)
        s->num_valid = 0;
    else if (s->num_valid > leaves)
        s->num_valid--;
}

static float *actions_of(const rf_world_session *s, int slot) {
    return s->slot_actions + (size_t)slot * (size_t)s->options.batch * (size_t)s->model->dit->desc.action_dim;
}

/* A context pass over the frames that wait in `passing`. */
static rf_status queue_commit(rf_world_session *s, rf_error *err) {
    return rf_dit_session_forward(s->commit, s->passing, NULL, 0, err);
}

/* Keys and values of the window's frames from num_valid on. */
static rf_status commit_frames(rf_world_session *s, rf_error *err) {
    int first = s->num_valid, frames = s->num_window - first, batch = s->options.batch;
    int dim = s->model->dit->desc.action_dim;
    if (frames == 0) return RF_OK;
    RF_TRY(rf_stream_synchronize(s->stream, err)); /* the staged rows may still be read */
    for (int b = 0; b < batch; b++) {
        for (int f = 0; f < frames; f++) {
            int slot = s->order[first + f];
            s->host_rows[b * frames + f] = slot * batch + b;
            memcpy(s->passing_actions + (b * frames + f) * dim, actions_of(s, slot) + b * dim,
                   (size_t)dim * sizeof(float));
        }
    }
    RF_TRY(rf_stream_upload(s->stream, s->passing_rows, s->host_rows, (size_t)(batch * frames) * sizeof(int32_t), err));
    rf_rows_args gather = {.src = s->kept,
                           .dst = s->passing,
                           .rows = s->passing_rows,
                           .dtype = RF_DTYPE_F32,
                           .num_rows = batch * frames,
                           .cols = s->latent_elems};
    RF_TRY(s->ops->gather_rows(s->stream, &gather, err));
    RF_TRY(rf_dit_context_set_window(s->context, s->order, first, frames, err));
    RF_TRY(rf_dit_session_begin_frames(s->commit, frames, &s->level, 1, 1, s->passing_actions, err));
    if (s->commit_graphs[frames] != NULL) {
        RF_TRY(rf_graph_launch(s->commit_graphs[frames], s->stream, err));
    } else {
        if (s->commit_ran[frames] && uses_graphs(s)) {
            RF_TRY(capture(s, &s->commit_graphs[frames], queue_commit, err));
            RF_TRY(rf_graph_launch(s->commit_graphs[frames], s->stream, err));
        } else {
            RF_TRY(queue_commit(s, err));
        }
        s->commit_ran[frames] = true;
    }
    s->frame_forwards += (int64_t)frames * batch;
    s->num_valid = s->num_window;
    return RF_OK;
}

/* The window of denoising: all frames but the newest are kept, and the newest will lie in its slot. */
static rf_status show_window(rf_world_session *s, int new_slot, rf_error *err) {
    int slots[RF_MAX_WINDOW];
    memcpy(slots, s->order, (size_t)s->num_window * sizeof *slots);
    slots[s->num_window] = new_slot;
    return rf_dit_context_set_window(s->context, slots, s->num_window, 1, err);
}

/* Without a context cache: in front of every step that computes. */
static rf_status compute_context(void *user, rf_error *err) {
    rf_world_session *s = user;
    s->num_valid = 0;
    RF_TRY(commit_frames(s, err));
    return show_window(s, free_slot(s), err);
}

/* --- a rollout ------------------------------------------------------------------------------------------------------- */

static void reset(rf_world_session *s, const uint64_t *seeds) {
    memcpy(s->seeds, seeds, (size_t)s->options.batch * sizeof *seeds);
    s->num_window = s->num_valid = s->num_frames = s->num_given = s->frames_slid = 0;
    s->frame_forwards = 0;
    s->context_ms = s->denoise_ms = s->decode_ms = 0.0;
    s->total = (rf_cache_counts){0};
    s->started = false;
}

/* The latents in x become the window's newest frame. */
static rf_status push_frame(rf_world_session *s, int slot, const float *actions, int64_t stride, rf_error *err) {
    int dim = s->model->dit->desc.action_dim;
    int64_t elems = s->options.batch * s->latent_elems;
    for (int b = 0; b < s->options.batch; b++)
        for (int a = 0; a < dim; a++) actions_of(s, slot)[b * dim + a] = actions ? actions[b * stride + a] : 0.0f;
    s->order[s->num_window++] = slot;
    return rf_stream_copy(s->stream, s->kept + slot * elems, s->x, (size_t)elems * sizeof(float), err);
}

/* frames [batch][num_frames][elems] of pictures or latents; picture: through the VAE. */
static rf_status start(rf_world_session *s, const float *frames, int num_frames, bool picture, const float *actions,
                       const uint64_t *seeds, rf_error *err) {
    int batch = s->options.batch, dim = s->model->dit->desc.action_dim;
    size_t elems = (size_t)(picture ? s->frame_elems : s->latent_elems);
    if (num_frames < 1) return rf_fail(err, RF_ERR_ARGUMENT, "%d frames to start from, expected 1 or more", num_frames);
    RF_TRY(rf_stream_synchronize(s->stream, err));
    reset(s, seeds);
    int first = num_frames > s->window - 1 ? num_frames - (s->window - 1) : 0;
    for (int f = first; f < num_frames; f++) {
        RF_TRY(rf_stream_synchronize(s->stream, err));
        for (int b = 0; b < batch; b++)
            memcpy(s->staging + (size_t)b * elems, frames + (size_t)(b * num_frames + f) * elems,
                   elems * sizeof(float));
        float *dst = picture ? (float *)rf_vit_vae_session_output(s->vae) : s->x;
        RF_TRY(rf_stream_upload(s->stream, dst, s->staging, (size_t)batch * elems * sizeof(float), err));
        if (picture) RF_TRY(rf_vit_vae_session_encode(s->vae, dst, s->x, err));
        const float *row = actions ? actions + (size_t)f * (size_t)dim : NULL;
        RF_TRY(push_frame(s, free_slot(s), row, (int64_t)num_frames * dim, err));
    }
    s->num_given = num_frames;
    if (rf_dit_session_cache(s->denoise) != NULL) rf_cache_forget(rf_dit_session_cache(s->denoise));
    s->started = true;
    return rf_stream_synchronize(s->stream, err);
}

rf_status rf_world_session_start(rf_world_session *s, const float *frames, int num_frames, const float *actions,
                                 const uint64_t *seeds, rf_error *err) {
    return start(s, frames, num_frames, true, actions, seeds, err);
}

rf_status rf_world_session_start_latents(rf_world_session *s, const float *latents, int num_frames,
                                         const float *actions, const uint64_t *seeds, rf_error *err) {
    return start(s, latents, num_frames, false, actions, seeds, err);
}

/* The first x of frame number `frame` (given ones counted): rollout b draws stream `frame` of its seed, or, with the torch generators, a
 * generator of its own for each frame. */
static rf_status upload_noise(rf_world_session *s, const float *noise, rf_error *err) {
    size_t one = (size_t)s->latent_elems, num = one * (size_t)s->options.batch;
    uint64_t frame = (uint64_t)(s->num_given + s->num_frames);
    RF_TRY(rf_stream_synchronize(s->stream, err));
    if (noise != NULL) memcpy(s->staging, noise, num * sizeof(float));
    for (int b = 0; b < s->options.batch && noise == NULL; b++) {
        if (s->options.rng == RF_RNG_COUNTER) {
            rf_rng_normal_at(s->seeds[b], frame, 0, s->staging + (size_t)b * one, one);
        } else {
            rf_rng rng;
            rf_rng_init(&rng, s->options.rng, s->seeds[b] + frame);
            rf_rng_normal(&rng, s->staging + (size_t)b * one, one);
        }
    }
    for (size_t i = 0; i < num; i++)
        s->staging[i] = s->staging[i] < -MAX_NOISE ? -MAX_NOISE : s->staging[i] > MAX_NOISE ? MAX_NOISE : s->staging[i];
    return rf_stream_upload(s->stream, s->x, s->staging, num * sizeof(float), err);
}

static void add_counts(rf_cache_counts *total, const rf_cache_counts *one) {
    total->images += one->images;
    total->steps = one->steps;
    total->steps_full += one->steps_full;
    total->steps_partial += one->steps_partial;
    total->steps_skipped += one->steps_skipped;
    total->blocks_computed += one->blocks_computed;
    total->blocks_total += one->blocks_total;
    total->rows_computed += one->rows_computed;
    total->rows_total += one->rows_total;
    total->bytes = one->bytes;
    total->decide_ms += one->decide_ms;
    total->read_backs += one->read_backs;
}

static rf_status denoise(rf_world_session *s, rf_error *err) {
    for (int step = 0; step < s->num_steps; step++) {
        if (s->options.policy != NULL) {
            RF_TRY(rf_dit_session_step_cached(s->denoise, s->x, NULL, 0, queue_tail, s, err));
        } else {
            if (!s->options.context_cache) RF_TRY(compute_context(s, err));
            RF_TRY(s->step_graph ? rf_graph_launch(s->step_graph, s->stream, err) : queue_step(s, err));
            s->frame_forwards += s->options.batch;
        }
        RF_TRY(rf_dit_session_next_step(s->denoise, err));
    }
    return RF_OK;
}

rf_status rf_world_session_step(rf_world_session *s, const float *actions, const float *noise, rf_error *err) {
    int dim = s->model->dit->desc.action_dim;
    if (!s->started) return rf_fail(err, RF_ERR_STATE, "a rollout is stepped before it has started");
    for (int i = 0; i < s->options.batch * dim; i++)
        if (!isfinite(actions[i]))
            return rf_fail(err, RF_ERR_ARGUMENT, "action %d of rollout %d is not finite", i % dim, i / dim);
    RF_TRY(upload_noise(s, noise, err));
    slide(s);
    RF_TRY(rf_stream_mark(s->stream, MARK_BEGIN, err));
    if (s->options.context_cache) RF_TRY(commit_frames(s, err));
    int slot = free_slot(s);
    RF_TRY(show_window(s, slot, err));
    RF_TRY(rf_stream_mark(s->stream, MARK_CONTEXT, err));
    RF_TRY(rf_dit_session_begin_frames(s->denoise, 1, s->timesteps, 1, s->num_steps, actions, err));
    RF_TRY(denoise(s, err));
    RF_TRY(rf_stream_mark(s->stream, MARK_DENOISED, err));
    RF_TRY(push_frame(s, slot, actions, dim, err));
    s->num_frames++;
    s->measured = false;
    rf_cache *cache = rf_dit_session_cache(s->denoise);
    if (cache != NULL) {
        RF_TRY(rf_stream_synchronize(s->stream, err));
        RF_TRY(rf_cache_end(cache, err));
        rf_cache_counts counts = rf_cache_get_counts(cache);
        s->frame_forwards += counts.steps_full + counts.steps_partial;
        add_counts(&s->total, &counts);
    }
    return RF_OK;
}

/* Times of the last step, once it is done. */
static rf_status measure(rf_world_session *s, rf_error *err) {
    if (s->measured || s->num_frames == 0) return RF_OK;
    RF_TRY(rf_stream_elapsed_ms(s->stream, MARK_BEGIN, MARK_CONTEXT, &s->context_ms, err));
    RF_TRY(rf_stream_elapsed_ms(s->stream, MARK_CONTEXT, MARK_DENOISED, &s->denoise_ms, err));
    s->measured = true;
    return RF_OK;
}

rf_status rf_world_session_read_frame(rf_world_session *s, float *host, rf_error *err) {
    if (!s->started) return rf_fail(err, RF_ERR_STATE, "a rollout is read before it has started");
    size_t bytes = (size_t)(s->options.batch * s->frame_elems) * sizeof(float);
    RF_TRY(rf_stream_mark(s->stream, MARK_DECODE, err));
    RF_TRY(rf_vit_vae_session_decode(s->vae, s->x, err));
    RF_TRY(rf_stream_download(s->stream, s->staging, rf_vit_vae_session_output(s->vae), bytes, err));
    RF_TRY(rf_stream_mark(s->stream, MARK_DECODED, err));
    RF_TRY(rf_stream_synchronize(s->stream, err));
    memcpy(host, s->staging, bytes);
    RF_TRY(rf_stream_elapsed_ms(s->stream, MARK_DECODE, MARK_DECODED, &s->decode_ms, err));
    return measure(s, err);
}

rf_status rf_world_session_read_latent(rf_world_session *s, float *host, rf_error *err) {
    if (!s->started) return rf_fail(err, RF_ERR_STATE, "a rollout is read before it has started");
    size_t bytes = (size_t)(s->options.batch * s->latent_elems) * sizeof(float);
    RF_TRY(rf_stream_download(s->stream, s->staging, s->x, bytes, err));
    RF_TRY(rf_stream_synchronize(s->stream, err));
    memcpy(host, s->staging, bytes);
    return measure(s, err);
}

rf_world_session_info rf_world_session_get_info(const rf_world_session *s) {
    const rf_cache *cache = rf_dit_session_cache(s->denoise);
    rf_cache_counts last = cache ? rf_cache_get_counts(cache) : (rf_cache_counts){0};
    return (rf_world_session_info){
        .num_frames = s->num_frames,
        .context_frames = s->num_window > 0 ? s->num_window - (s->num_frames > 0) : 0,
        .frames_slid = s->frames_slid,
        .num_steps = s->num_steps,
        .arena_bytes = s->memory_bytes + rf_dit_context_bytes(s->context) + rf_dit_session_arena_bytes(s->denoise) +
                       rf_dit_session_arena_bytes(s->commit) + rf_vit_vae_session_bytes(s->vae) + last.bytes,
        .context_ms = s->context_ms,
        .denoise_ms = s->denoise_ms,
        .decode_ms = s->decode_ms,
        .frame_forwards = s->frame_forwards,
        .graph_nodes = s->step_graph ? rf_graph_num_nodes(s->step_graph) : 0,
        .has_cache = cache != NULL,
        .last = last,
        .total = s->total,
        .step_kinds = cache ? rf_cache_step_kinds(cache) : NULL};
}

rf_status rf_world_session_write_trace(const rf_world_session *s, int first_image, rf_cache_line line, void *user,
                                       rf_error *err) {
    if (s->options.policy == NULL || !s->options.record_trace)
        return rf_fail(err, RF_ERR_STATE, "a session without a policy, or one that does not record, has no trace");
    return rf_cache_write_trace(rf_dit_session_cache(s->denoise), first_image, line, user, err);
}
