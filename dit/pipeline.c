/* dit/pipeline.c - a model folder, and the denoising loop over it.
 *
 * Everything a step needs is on the device before the loop: solver weights, timesteps, modulation rows, noise. A step is three
 * things - forward, solver update, advance of the counters - and on CUDA one captured graph. */
#include "dit/pipeline.h"

#include <ctype.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <time.h>

#include "core/arena.h"
#include "core/file.h"
#include "core/json.h"
#include "core/memory.h"
#include "core/text.h"
#include "dit/config.h"

struct rf_image_model {
    rf_backend *backend;
    char *path;
    rf_dit_model *dit;
    rf_vae *vae;
    rf_scheduler_config scheduler;
    char **class_names; /* [num_classes], entries may be NULL */
    int num_classes;
    rf_json *calibration; /* cache.json, or NULL */
};

/* --- the folder ------------------------------------------------------------------------------------------------------ */

/* id2label of model_index.json: {"0": "name", ...}. Ids outside the model's classes are an error. */
static rf_status read_class_names(rf_image_model *m, const rf_json *index, rf_error *err) {
    m->num_classes = m->dit->desc.num_classes;
    m->class_names = rf_alloc_zero((size_t)m->num_classes + 1, sizeof *m->class_names);
    if (m->class_names == NULL) return rf_fail(err, RF_ERR_MEMORY, "out of memory for class names");
    const rf_json_value *labels = index ? rf_json_get(rf_json_root(index), "id2label") : NULL;
    if (labels == NULL) return RF_OK;
    if (!rf_json_is_object(labels))
        return rf_fail(err, RF_ERR_CONFIG, "%s: id2label is not an object", rf_json_name(index));
    for (size_t i = 0; i < rf_json_count(labels); i++) {
        const char *key = NULL, *name = rf_json_string(rf_json_at(labels, i, &key));
        char *end = NULL;
        long id = key && isdigit((unsigned char)key[0]) ? strtol(key, &end, 10) : -1;
        if (id < 0 || id >= m->num_classes || *end != 0 || name == NULL)
            return rf_fail(err, RF_ERR_CONFIG, "%s: id2label has the entry \"%.40s\", expected 0..%d with a name",
                           rf_json_name(index), key ? key : "", m->num_classes - 1);
        rf_free(m->class_names[id]);
        m->class_names[id] = rf_strdup(name);
        if (m->class_names[id] == NULL) return rf_fail(err, RF_ERR_MEMORY, "out of memory for class names");
    }
    return RF_OK;
}

static rf_status check_fit(const rf_image_model *m, rf_error *err) {
    int want = rf_vae_get_config(m->vae)->latent_channels;
    if (want != m->dit->desc.in_channels)
        return rf_fail(err, RF_ERR_CONFIG, "%s: the transformer has %d latent channels, the VAE %d", m->path,
                       m->dit->desc.in_channels, want);
    return RF_OK;
}

static rf_status open_part(const char *dir, const char *part, const char *file, rf_json **doc, rf_error *err) {
    char *folder = rf_path_join(dir, part), *path = folder ? rf_path_join(folder, file) : NULL;
    rf_status st = path ? rf_json_open(doc, path, err) : rf_fail(err, RF_ERR_MEMORY, "out of memory for a path");
    rf_free(path);
    rf_free(folder);
    return st;
}

rf_status rf_image_model_load(rf_image_model **out, rf_backend *backend, const char *dir, rf_dtype dtype,
                              rf_error *err) {
    rf_json *index = NULL, *scheduler = NULL;
    char *index_path = rf_path_join(dir, "model_index.json");
    char *dit_path = rf_path_join(dir, "transformer"), *vae_path = rf_path_join(dir, "vae");
    char *cache_path = rf_path_join(dir, "cache.json");
    *out = NULL;
    rf_image_model *m = rf_alloc_zero(1, sizeof *m);
    rf_status st = RF_OK;
    if (m != NULL) m->path = rf_strdup(dir);
    if (!m || !m->path || !index_path || !dit_path || !vae_path)
        st = rf_fail(err, RF_ERR_MEMORY, "out of memory for a model");
    if (st == RF_OK && !rf_path_is_dir(dir)) st = rf_fail(err, RF_ERR_IO, "%s: no such model folder", dir);
    if (st == RF_OK) st = rf_json_open(&index, index_path, err);
    if (st == RF_OK) st = open_part(dir, "scheduler", "scheduler_config.json", &scheduler, err);
    if (st == RF_OK) st = rf_scheduler_config_read(&m->scheduler, scheduler, err);
    if (st == RF_OK) {
        m->backend = backend;
        st = rf_dit_model_load(&m->dit, backend, dit_path, dtype, err);
    }
    if (st == RF_OK) st = rf_vae_load(&m->vae, backend, vae_path, dtype, err);
    if (st == RF_OK) st = check_fit(m, err);
    if (st == RF_OK) st = read_class_names(m, index, err);
    if (st == RF_OK && cache_path == NULL) st = rf_fail(err, RF_ERR_MEMORY, "out of memory for a model");
    if (st == RF_OK && rf_path_exists(cache_path)) st = rf_json_open(&m->calibration, cache_path, err);
    if (st == RF_OK) {
        *out = m;
        m = NULL;
    }
    rf_image_model_close(m);
    rf_json_close(index);
    rf_json_close(scheduler);
    rf_free(index_path);
    rf_free(dit_path);
    rf_free(vae_path);
    rf_free(cache_path);
    return st;
}

rf_status rf_image_model_synthetic(rf_image_model **out, rf_backend *backend, const char *config, rf_dtype dtype,
                                   uint64_t seed, rf_error *err) {
    rf_dit_desc desc;
    rf_status st;
    *out = NULL;
    if (rf_path_exists(config)) {
        rf_json *doc = NULL;
        st = rf_json_open(&doc, config, err);
        if (st == RF_OK) st = rf_dit_config_read(&desc, doc, err);
        rf_json_close(doc);
    } else {
        st = rf_dit_config_builtin(&desc, config, err);
    }
    if (st != RF_OK) return st;
    rf_image_model *m = rf_alloc_zero(1, sizeof *m);
    if (m == NULL) return rf_fail(err, RF_ERR_MEMORY, "out of memory for a model");
    m->backend = backend;
    m->scheduler = rf_scheduler_config_default();
    m->path = rf_strdup(config);
    rf_vae_config vae = rf_vae_config_sd();
    vae.latent_channels = desc.in_channels;
    if (m->path == NULL) st = rf_fail(err, RF_ERR_MEMORY, "out of memory for a model");
    if (st == RF_OK) st = rf_dit_model_synthetic(&m->dit, backend, &desc, dtype, seed, err);
    if (st == RF_OK) st = rf_vae_synthetic(&m->vae, backend, &vae, dtype, seed + 1, err);
    if (st == RF_OK) st = read_class_names(m, NULL, err);
    if (st == RF_OK)
        *out = m;
    else
        rf_image_model_close(m);
    return st;
}

void rf_image_model_close(rf_image_model *model) {
    if (model == NULL) return;
    for (int i = 0; model->class_names != NULL && i < model->num_classes; i++) rf_free(model->class_names[i]);
    rf_free(model->class_names);
    rf_json_close(model->calibration);
    rf_vae_close(model->vae);
    rf_dit_model_close(model->dit);
    rf_free(model->path);
    rf_free(model);
}

static int vae_factor(const rf_vae *vae) {
    return 1 << (rf_vae_get_config(vae)->num_levels - 1);
}

rf_image_model_info rf_image_model_get_info(const rf_image_model *m) {
    int side = (int)m->dit->desc.sample_size * vae_factor(m->vae);
    return (rf_image_model_info){.path = m->path,
                                 .transformer = m->dit,
                                 .vae = m->vae,
                                 .scheduler = m->scheduler,
                                 .num_classes = m->num_classes,
                                 .weights_bytes = rf_params_tensor_bytes(m->dit->params) + rf_vae_weights_bytes(m->vae),
                                 .num_params = rf_params_num_elems(m->dit->params) + rf_vae_num_params(m->vae),
                                 .image_height = side,
                                 .image_width = side,
                                 .calibration = m->calibration ? rf_json_root(m->calibration) : NULL};
}

const char *rf_image_model_class_name(const rf_image_model *model, int class_id) {
    return class_id >= 0 && class_id < model->num_classes ? model->class_names[class_id] : NULL;
}

/* True if text is one of the comma-separated names, letter case aside. */
static bool is_synonym(const char *names, const char *text) {
    size_t len = strlen(text);
    while (*names != 0) {
        while (*names == ' ' || *names == ',') names++;
        size_t n = strcspn(names, ",");
        while (n > 0 && names[n - 1] == ' ') n--;
        if (n == len && strncasecmp(names, text, n) == 0) return true;
        names += strcspn(names, ",");
    }
    return false;
}

rf_status rf_image_model_find_class(const rf_image_model *m, const char *name_or_id, int *class_id, rf_error *err) {
    char *end = NULL;
    long id = strtol(name_or_id, &end, 10);
    if (*name_or_id != 0 && *end == 0) {
        if (id < 0 || id >= m->num_classes)
            return rf_fail(err, RF_ERR_ARGUMENT, "class %.40s, expected 0..%d", name_or_id, m->num_classes - 1);
        *class_id = (int)id;
        return RF_OK;
    }
    int best[3] = {-1, -1, -1}, distance[3] = {1 << 20, 1 << 20, 1 << 20};
    for (int i = 0; i < m->num_classes; i++) {
        const char *name = m->class_names[i];
        if (name == NULL) continue;
        if (is_synonym(name, name_or_id) || strcasecmp(name, name_or_id) == 0) {
            *class_id = i;
            return RF_OK;
        }
        int d = rf_text_distance(name, strlen(name), name_or_id, strlen(name_or_id)), at = 3;
        while (at > 0 && d < distance[at - 1]) at--;
        for (int k = 2; k > at; k--) {
            best[k] = best[k - 1];
            distance[k] = distance[k - 1];
        }
        if (at < 3) {
            best[at] = i;
            distance[at] = d;
        }
    }
    if (best[0] < 0)
        return rf_fail(err, RF_ERR_ARGUMENT, "class \"%.40s\": this model has no class names, expected a number 0..%d",
                       name_or_id, m->num_classes - 1);
    return rf_fail(err, RF_ERR_ARGUMENT, "no class \"%.40s\"; the nearest of %d are %.40s%s%.40s%s%.40s", name_or_id,
                   m->num_classes, m->class_names[best[0]], best[1] >= 0 ? ", " : "",
                   best[1] >= 0 ? m->class_names[best[1]] : "", best[2] >= 0 ? ", " : "",
                   best[2] >= 0 ? m->class_names[best[2]] : "");
}

/* --- options --------------------------------------------------------------------------------------------------------- */

rf_image_options rf_image_options_default(void) {
    return (rf_image_options){.batch = 1,
                              .num_steps = 50,
                              .cfg_scale = 4.0,
                              .sampler = RF_SAMPLER_COUNT,
                              .residual_dtype = RF_DTYPE_COUNT,
                              .use_graphs = true};
}

rf_status rf_image_options_check(const rf_image_options *o, rf_error *err) {
    if (o->batch < 1 || o->batch > 4096) return rf_fail(err, RF_ERR_ARGUMENT, "batch %d, expected 1..4096", o->batch);
    if (o->num_steps < 1 || o->num_steps > 10000)
        return rf_fail(err, RF_ERR_ARGUMENT, "%d steps, expected 1..10000", o->num_steps);
    if (!(o->cfg_scale >= 0.0 && o->cfg_scale <= 1000.0))
        return rf_fail(err, RF_ERR_ARGUMENT, "guidance scale %g, expected 0..1000", o->cfg_scale);
    if (!(o->eta >= 0.0 && o->eta <= 1.0)) return rf_fail(err, RF_ERR_ARGUMENT, "eta %g, expected 0..1", o->eta);
    if ((int)o->sampler < 0 || o->sampler > RF_SAMPLER_COUNT)
        return rf_fail(err, RF_ERR_ARGUMENT, "sampler %d is unknown", (int)o->sampler);
    if (o->height < 0 || o->width < 0 || o->height > 16384 || o->width > 16384)
        return rf_fail(err, RF_ERR_ARGUMENT, "picture of %d x %d, expected up to 16384", o->width, o->height);
    if (!(o->max_drift >= 0.0 && o->max_drift <= 1e6))
        return rf_fail(err, RF_ERR_ARGUMENT, "drift bound %g, expected 0..1e6", o->max_drift);
    if (o->vae_batch < 0) return rf_fail(err, RF_ERR_ARGUMENT, "VAE batch %d is negative", o->vae_batch);
    return RF_OK;
}

/* --- session --------------------------------------------------------------------------------------------------------- */

struct rf_image_session {
    const rf_image_model *model;
    const rf_ops *ops;
    rf_image_options options;
    rf_stream *stream;
    rf_dit_session *dit;
    rf_vae_session *vae;
    rf_sampler_plan plan;
    rf_graph *graph; /* a step; with a policy the forward session keeps its own */

    int branches, vae_batch;
    int64_t latent_elems; /* of one sample */
    int height, width;    /* latent */

    /* device */
    void *memory;
    size_t memory_bytes;
    float *x, *x0, *noise;
    rf_sampler_coefs *coefs;
    /* host */
    float *staging; /* page-locked: one batch of latents */
    float *draws;   /* torch generators: both branches' draws */
    float *timesteps;
    int32_t *labels;
    double *step_ms, *output_gain;
    double denoise_ms, decode_ms;
};

static double now_ms(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e3 + (double)t.tv_nsec * 1e-6;
}

/* How much the last latent moves with the model's output at each step if later outputs stayed the same: state (x, x0 of the
 * step before) walked backwards through the solver's weights. */
static void fill_output_gain(rf_image_session *s) {
    double by_x = 1, by_x0 = 0; /* of the final x, with respect to a step's result: x' and x0' */
    for (int i = s->plan.num_steps - 1; i >= 0; i--) {
        const rf_sampler_coefs *c = &s->plan.coefs[i];
        double x0 = c->x0 * by_x + by_x0; /* x0 acts through x' and as the next step's x0_prev */
        s->output_gain[i] = fabs(c->out * by_x + c->x0_out * x0);
        double next_x = c->x * by_x + c->x0_x * x0;
        by_x0 = c->x0_prev * by_x;
        by_x = next_x;
    }
}

static rf_status take_buffers(rf_image_session *s, rf_arena *arena, rf_error *err) {
    size_t n = (size_t)s->latent_elems * (size_t)s->options.batch;
    size_t slices = s->plan.uses_noise ? (size_t)s->plan.num_steps : 0;
    rf_status st = rf_arena_take(arena, (void **)&s->x, "latents", n, sizeof(float), err);
    if (st == RF_OK) st = rf_arena_take(arena, (void **)&s->x0, "predicted latents", n, sizeof(float), err);
    if (st == RF_OK) st = rf_arena_take(arena, (void **)&s->noise, "step noise", n * slices, sizeof(float), err);
    if (st == RF_OK)
        st = rf_arena_take(arena, (void **)&s->coefs, "solver weights", (size_t)s->plan.num_steps, sizeof *s->coefs,
                           err);
    return st;
}

static rf_status allocate(rf_image_session *s, rf_error *err) {
    rf_backend *backend = s->model->backend;
    rf_arena arena;
    rf_arena_init_counting(&arena);
    rf_status st = take_buffers(s, &arena, err);
    if (st == RF_OK) st = rf_backend_alloc(backend, &s->memory, arena.peak, err);
    if (st != RF_OK) return st;
    s->memory_bytes = arena.peak;
    rf_arena_init(&arena, s->memory, s->memory_bytes);
    st = take_buffers(s, &arena, err);
    size_t batch = (size_t)s->options.batch, n = (size_t)s->latent_elems * batch, steps = (size_t)s->plan.num_steps;
    if (st == RF_OK) st = rf_backend_alloc_pinned(backend, (void **)&s->staging, n * sizeof(float), err);
    s->draws = rf_alloc(n * (size_t)s->branches * sizeof(float));
    s->timesteps = rf_alloc(steps * sizeof(float));
    s->labels = rf_alloc(batch * (size_t)s->branches * sizeof(int32_t));
    s->step_ms = rf_alloc_zero(steps, sizeof(double));
    s->output_gain = rf_alloc_zero(steps, sizeof(double));
    if (st == RF_OK && (!s->draws || !s->timesteps || !s->labels || !s->step_ms || !s->output_gain))
        st = rf_fail(err, RF_ERR_MEMORY, "out of memory for a session");
    if (st == RF_OK) st = rf_stream_zero(s->stream, s->memory, s->memory_bytes, err);
    if (st == RF_OK) st = rf_stream_upload(s->stream, s->coefs, s->plan.coefs, steps * sizeof *s->coefs, err);
    if (st == RF_OK) st = rf_stream_synchronize(s->stream, err);
    return st;
}

/* One step, queued. stream NULL: the solver kernel is only checked. */
static rf_status queue_solver(rf_image_session *s, rf_stream *stream, rf_error *err) {
    const rf_dit_desc *d = &s->model->dit->desc;
    rf_sampler_step_args args = {.model_out = rf_dit_session_output(s->dit),
                                 .model_dtype = RF_DTYPE_F32,
                                 .x = s->x,
                                 .x0_prev = s->x0,
                                 .noise = s->plan.uses_noise ? s->noise : NULL,
                                 .coefs = s->coefs,
                                 .step = rf_dit_session_step(s->dit),
                                 .batch = s->options.batch,
                                 .branches = s->branches,
                                 .channels = d->in_channels,
                                 .out_channels = d->out_channels,
                                 .frames = 1,
                                 .height = s->height,
                                 .width = s->width,
                                 .pt = d->pt,
                                 .ph = d->ph,
                                 .pw = d->pw,
                                 .guidance_scale = (float)s->options.cfg_scale,
                                 .guided_channels = d->guided_channels,
                                 .learned_variance = s->plan.learned_variance};
    return s->ops->sampler_step(stream, &args, err);
}

#define IN_SCALE_STRIDE ((int64_t)(sizeof(rf_sampler_coefs) / sizeof(float)))

/* What follows the model in a step. */
static rf_status queue_tail(void *user, rf_error *err) {
    rf_image_session *s = user;
    rf_status st = queue_solver(s, s->stream, err);
    return st == RF_OK ? rf_dit_session_queue_advance(s->dit, err) : st;
}

static rf_status queue_step(rf_image_session *s, rf_error *err) {
    rf_status st = rf_dit_session_forward(s->dit, s->x, &s->coefs->in_scale, IN_SCALE_STRIDE, err);
    return st == RF_OK ? queue_tail(s, err) : st;
}

/* Runs every kernel of a step once (code loads lazily), then records the step. */
static rf_status capture_step(rf_image_session *s, rf_error *err) {
    rf_status st = queue_step(s, err);
    if (st == RF_OK) st = rf_stream_synchronize(s->stream, err);
    if (st == RF_OK) rf_stream_set_phase(s->stream, RF_PHASE_RUN);
    if (st == RF_OK) st = rf_graph_begin(s->stream, err);
    if (st != RF_OK) return st;
    st = queue_step(s, err);
    rf_status ended = rf_graph_end(&s->graph, s->stream, st == RF_OK ? err : NULL);
    return st == RF_OK ? ended : st;
}

/* Of a path; a trace names its model wherever the folder is. */
static const char *last_element(const char *path) {
    const char *slash = strrchr(path, '/');
    return slash && slash[1] ? slash + 1 : path;
}

static rf_status check_size(const rf_image_model *m, int pixels, int patch, const char *what, int *latent,
                            rf_error *err) {
    int factor = vae_factor(m->vae), unit = factor * patch;
    if (pixels % unit != 0)
        return rf_fail(err, RF_ERR_ARGUMENT, "%s %d, expected a multiple of %d", what, pixels, unit);
    *latent = pixels / factor;
    return RF_OK;
}

rf_status rf_image_session_create(rf_image_session **out, const rf_image_model *model, const rf_image_options *options,
                                  rf_error *err) {
    *out = NULL;
    rf_status st = rf_image_options_check(options, err);
    if (st != RF_OK) return st;
    rf_image_session *s = rf_alloc_zero(1, sizeof *s);
    if (s == NULL) return rf_fail(err, RF_ERR_MEMORY, "out of memory for a session");
    const rf_dit_desc *d = &model->dit->desc;
    rf_image_model_info info = rf_image_model_get_info(model);
    bool cuda = rf_backend_get_kind(model->backend) == RF_BACKEND_CUDA;
    s->model = model;
    s->options = *options;
    s->ops = rf_ops_for(model->backend);
    s->branches = options->cfg_scale == 1.0 ? 1 : 2;
    st = check_size(model, options->height ? options->height : info.image_height, d->ph, "height", &s->height, err);
    if (st == RF_OK)
        st = check_size(model, options->width ? options->width : info.image_width, d->pw, "width", &s->width, err);
    s->latent_elems = (int64_t)d->in_channels * s->height * s->width;

    rf_sampler_options sampling = {.kind =
                                       options->sampler == RF_SAMPLER_COUNT ? model->scheduler.kind : options->sampler,
                                   .num_steps = options->num_steps,
                                   .eta = options->eta,
                                   .sigmas = options->sigmas,
                                   .num_tokens = (int64_t)(s->height / d->ph) * (s->width / d->pw)};
    if (st == RF_OK)
        st = rf_sampler_plan_make(&s->plan, &model->scheduler, &sampling, d->out_channels == 2 * d->in_channels, err);
    if (st == RF_OK) st = rf_stream_create(&s->stream, model->backend, err);
    if (st == RF_OK) st = rf_gemm_set_tuning(s->stream, options->tune_gemm, err);
    if (st == RF_OK && options->gemm_tuning) st = rf_gemm_tuning_load(s->stream, options->gemm_tuning, err);
    if (st == RF_OK) st = allocate(s, err);
    if (st == RF_OK) fill_output_gain(s);

    rf_dit_session_options forward = rf_dit_session_options_default();
    forward.batch = options->batch;
    forward.branches = s->branches;
    forward.height = s->height;
    forward.width = s->width;
    forward.max_steps = options->num_steps;
    forward.residual_dtype = options->residual_dtype;
    forward.policy = options->policy;
    forward.cache = (rf_cache_options){.max_drift = options->max_drift, .record = options->record_trace};
    forward.model_name = last_element(model->path);
    forward.sampler_name = rf_sampler_kind_name(sampling.kind);
    forward.stochastic = s->plan.uses_noise;
    forward.force_policy = options->force_policy;
    forward.calibration = info.calibration;
    forward.use_graphs = options->use_graphs;
    if (st == RF_OK) {
        forward.max_steps = s->plan.num_steps;
        for (int i = 0; i < s->plan.num_steps; i++) s->timesteps[i] = s->plan.coefs[i].timestep;
        forward.timesteps = s->timesteps;
    }
    if (st == RF_OK) st = rf_dit_session_create(&s->dit, model->dit, s->stream, &forward, err);
    if (st == RF_OK) st = queue_solver(s, NULL, err);
    s->vae_batch = options->vae_batch ? options->vae_batch : cuda ? 4 : 1;
    if (s->vae_batch > options->batch) s->vae_batch = options->batch;
    if (st == RF_OK) st = rf_vae_session_create(&s->vae, model->vae, s->stream, s->vae_batch, s->height, s->width, err);
    if (st == RF_OK && options->use_graphs && options->policy == NULL && rf_backend_has_graphs(model->backend))
        st = capture_step(s, err);
    if (st == RF_OK && options->gemm_tuning && rf_gemm_tuning_changed(s->stream))
        st = rf_gemm_tuning_save(s->stream, options->gemm_tuning, err);
    if (st == RF_OK) {
        rf_stream_set_phase(s->stream, RF_PHASE_RUN);
        *out = s;
    } else {
        rf_image_session_destroy(s);
    }
    return st;
}

void rf_image_session_destroy(rf_image_session *s) {
    if (s == NULL) return;
    rf_graph_destroy(s->graph);
    rf_vae_session_destroy(s->vae);
    rf_dit_session_destroy(s->dit);
    rf_backend_free_pinned(s->model->backend, s->staging);
    rf_backend_free(s->model->backend, s->memory);
    rf_stream_destroy(s->stream);
    rf_sampler_plan_free(&s->plan);
    rf_free(s->draws);
    rf_free(s->timesteps);
    rf_free(s->labels);
    rf_free(s->step_ms);
    rf_free(s->output_gain);
    rf_free(s);
}

/* --- a run ----------------------------------------------------------------------------------------------------------- */

/* Uploads the staging buffer and waits, so that it can be filled again. */
static rf_status upload_latents(rf_image_session *s, float *device, rf_error *err) {
    size_t bytes = (size_t)s->latent_elems * (size_t)s->options.batch * sizeof(float);
    rf_status st = rf_stream_upload(s->stream, device, s->staging, bytes, err);
    return st == RF_OK ? rf_stream_synchronize(s->stream, err) : st;
}

/* First latents and the noise of all steps.
 * counter     image i: stream 0 of seeds[i] is the first latent, stream 1 + step the noise of a step.
 * torch-*     one generator for the batch: randn(batch, ...), then at every step that draws in the reference
 *             randn(branches * batch, ...), of which the first batch rows count (diffusers steps both branches). */
static rf_status upload_noise(rf_image_session *s, const uint64_t *seeds, const float *initial, rf_error *err) {
    size_t batch = (size_t)s->options.batch, one = (size_t)s->latent_elems, n = one * batch;
    rf_rng torch_rng;
    bool counter = s->options.rng == RF_RNG_COUNTER;
    if (!counter) rf_rng_init(&torch_rng, s->options.rng, seeds[0]);

    if (initial != NULL)
        memcpy(s->staging, initial, n * sizeof(float));
    else if (counter)
        for (size_t i = 0; i < batch; i++) rf_rng_normal_at(seeds[i], 0, 0, s->staging + i * one, one);
    else
        rf_rng_normal(&torch_rng, s->staging, n);
    for (size_t i = 0; i < n; i++) s->staging[i] *= s->plan.init_scale;
    rf_status st = upload_latents(s, s->x, err);

    for (int step = 0; step < s->plan.num_steps && s->plan.uses_noise && st == RF_OK; step++) {
        if (!s->plan.step_noise[step]) continue;
        if (counter) {
            for (size_t i = 0; i < batch; i++)
                rf_rng_normal_at(seeds[i], 1 + (uint64_t)step, 0, s->staging + i * one, one);
        } else {
            rf_rng_normal(&torch_rng, s->draws, n * (size_t)s->branches);
            memcpy(s->staging, s->draws, n * sizeof(float));
        }
        st = upload_latents(s, s->noise + (size_t)step * n, err);
    }
    return st;
}

rf_status rf_image_session_denoise(rf_image_session *s, const int *class_ids, const uint64_t *seeds,
                                   const float *initial_noise, rf_image_progress progress, void *user, rf_error *err) {
    int num_steps = s->plan.num_steps, num_classes = s->model->dit->desc.num_classes;
    for (int i = 0; i < s->options.batch; i++) {
        if (class_ids[i] < 0 || class_ids[i] > num_classes)
            return rf_fail(err, RF_ERR_ARGUMENT, "class %d, expected 0..%d", class_ids[i], num_classes);
        s->labels[i] = class_ids[i];
        if (s->branches > 1) s->labels[s->options.batch + i] = num_classes; /* the null class */
    }
    for (int i = 0; i < num_steps; i++) s->timesteps[i] = s->plan.coefs[i].timestep;

    rf_status st = upload_noise(s, seeds, initial_noise, err);
    if (st == RF_OK) st = rf_stream_mark(s->stream, 0, err);
    if (st == RF_OK) st = rf_dit_session_begin(s->dit, s->timesteps, num_steps, s->labels, err);
    double begin_ms = now_ms(), last_ms = begin_ms;
    for (int step = 0; step < num_steps && st == RF_OK; step++) {
        if (s->options.policy != NULL)
            st = rf_dit_session_step_cached(s->dit, s->x, &s->coefs->in_scale, IN_SCALE_STRIDE, queue_tail, s, err);
        else
            st = s->graph ? rf_graph_launch(s->graph, s->stream, err) : queue_step(s, err);
        if (st == RF_OK) st = rf_dit_session_next_step(s->dit, err);
        double t = now_ms();
        s->step_ms[step] = t - last_ms;
        last_ms = t;
        if (st == RF_OK && progress != NULL && !progress(user, step, num_steps))
            st = rf_fail(err, RF_ERR_CANCELLED, "cancelled after step %d of %d", step + 1, num_steps);
    }
    if (st == RF_OK) st = rf_stream_mark(s->stream, 1, err);
    rf_status done = rf_stream_synchronize(s->stream, st == RF_OK ? err : NULL);
    if (st == RF_OK) st = done;
    if (st == RF_OK) st = rf_stream_elapsed_ms(s->stream, 0, 1, &s->denoise_ms, err);
    if (st == RF_OK && s->options.policy != NULL) st = rf_cache_end(rf_dit_session_cache(s->dit), err);
    if (rf_backend_has_graphs(s->model->backend)) /* queueing times say nothing: the device's mean */
        for (int i = 0; i < num_steps; i++) s->step_ms[i] = s->denoise_ms / num_steps;
    return st;
}

rf_status rf_image_session_read_latents(rf_image_session *s, float *host, rf_error *err) {
    size_t bytes = (size_t)s->latent_elems * (size_t)s->options.batch * sizeof(float);
    rf_status st = rf_stream_download(s->stream, s->staging, s->x, bytes, err);
    if (st == RF_OK) st = rf_stream_synchronize(s->stream, err);
    if (st == RF_OK) memcpy(host, s->staging, bytes);
    return st;
}

/* Decodes vae_batch samples of device latents from `first` on; copies `num` pictures from sample `from` to host. */
static rf_status decode_some(rf_image_session *s, const float *latents, int first, int from, int num, float *host,
                             rf_error *err) {
    int factor = vae_factor(s->model->vae);
    size_t picture = (size_t)3 * (size_t)(s->height * factor) * (size_t)(s->width * factor);
    rf_status st = rf_vae_session_decode(s->vae, latents + (size_t)first * (size_t)s->latent_elems, err);
    if (st == RF_OK)
        st = rf_stream_download(s->stream, host, rf_vae_session_output(s->vae) + (size_t)(from - first) * picture,
                                (size_t)num * picture * sizeof(float), err);
    if (st == RF_OK) st = rf_stream_synchronize(s->stream, err);
    return st;
}

rf_status rf_image_session_decode(rf_image_session *s, float *host, rf_error *err) {
    int factor = vae_factor(s->model->vae), batch = s->options.batch;
    size_t picture = (size_t)3 * (size_t)(s->height * factor) * (size_t)(s->width * factor);
    double begin = now_ms();
    rf_status st = RF_OK;
    for (int done = 0; done < batch && st == RF_OK; done += s->vae_batch) {
        /* the last group reaches back so that it is full; pictures already there are not copied again */
        int first = done + s->vae_batch <= batch ? done : batch - s->vae_batch;
        int num = first + s->vae_batch - done;
        st = decode_some(s, s->x, first, done, num, host + (size_t)done * picture, err);
    }
    s->decode_ms = now_ms() - begin;
    return st;
}

rf_status rf_image_session_preview(rf_image_session *s, int sample, float *host_planar, rf_error *err) {
    if (sample < 0 || sample >= s->options.batch)
        return rf_fail(err, RF_ERR_ARGUMENT, "sample %d, expected 0..%d", sample, s->options.batch - 1);
    int first = sample + s->vae_batch <= s->options.batch ? sample : s->options.batch - s->vae_batch;
    return decode_some(s, s->x0, first, sample, 1, host_planar, err);
}

void rf_image_session_set_observer(rf_image_session *session, rf_dit_observer observer, void *user) {
    rf_dit_session_set_observer(session->dit, observer, user);
}

rf_status rf_image_session_write_trace(const rf_image_session *s, int first_image, rf_cache_line line, void *user,
                                       rf_error *err) {
    if (s->options.policy == NULL || !s->options.record_trace)
        return rf_fail(err, RF_ERR_STATE, "a session without a policy, or one that does not record, has no trace");
    return rf_cache_write_trace(rf_dit_session_cache(s->dit), first_image, line, user, err);
}

rf_image_session_info rf_image_session_get_info(const rf_image_session *s) {
    int factor = vae_factor(s->model->vae);
    const rf_cache *cache = rf_dit_session_cache(s->dit);
    return (rf_image_session_info){.has_cache = cache != NULL,
                                   .cache = cache ? rf_cache_get_counts(cache) : (rf_cache_counts){0},
                                   .step_kinds = cache ? rf_cache_step_kinds(cache) : NULL,
                                   .output_gain = s->output_gain,
                                   .num_graphs = rf_dit_session_num_graphs(s->dit),
                                   .latent_channels = s->model->dit->desc.in_channels,
                                   .latent_height = s->height,
                                   .latent_width = s->width,
                                   .image_height = s->height * factor,
                                   .image_width = s->width * factor,
                                   .num_steps = s->plan.num_steps,
                                   .arena_bytes = s->memory_bytes + rf_dit_session_arena_bytes(s->dit) +
                                                  rf_vae_session_arena_bytes(s->vae) +
                                                  (cache ? rf_cache_get_counts(cache).bytes : 0),
                                   .denoise_ms = s->denoise_ms,
                                   .decode_ms = s->decode_ms,
                                   .step_ms = s->step_ms,
                                   .graph_nodes = s->graph ? rf_graph_num_nodes(s->graph) : 0};
}
