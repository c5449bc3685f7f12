/* dit/sampler.c - scheduler configs, and every solver as rows of the coefficient table of kernels/sampler.h.
 *
 * A row is made in double from the f32 levels of dit/schedule.c and rounded once. The references work in f32 throughout;
 * where they subtract two close f32 numbers (1 - ab, 1 - ab/ab_prev) the difference is formed in f32 here too, because at
 * neighbouring timesteps its rounding is larger than all others together.
 * Pitfalls - DDIM's previous timestep is t - num_train / num_steps, whatever the spacing; DDPM's is the next in the list;
 *          - DDIM's noise prediction is taken before x0 is clipped;
 *          - DDPM draws noise wherever t > 0, so with steps_offset 1 its last step does too;
 *          - the SDE solver draws noise at its last step although its weight is 0: step_noise says so, for seed parity. */
#include "dit/sampler.h"

#include <math.h>
#include <string.h>

#include "core/memory.h"
#include "dit/schedule.h"

#define MAX_STEPS       10000
#define MAX_TRAIN_STEPS 100000

/* ---- names ---- */

static const struct {
    const char *name, *class_name;
} kinds[RF_SAMPLER_COUNT] = {
    [RF_SAMPLER_DDPM] = {"ddpm", "DDPMScheduler"},
    [RF_SAMPLER_DDIM] = {"ddim", "DDIMScheduler"},
    [RF_SAMPLER_DPMPP_2M] = {"dpm++2m", "DPMSolverMultistepScheduler"},
    [RF_SAMPLER_DPMPP_2M_SDE] = {"dpm++2m-sde", "DPMSolverMultistepScheduler"},
    [RF_SAMPLER_EULER] = {"euler", "EulerDiscreteScheduler"},
    [RF_SAMPLER_FLOW_EULER] = {"flow-euler", "FlowMatchEulerDiscreteScheduler"},
};

bool rf_sampler_kind_from_name(const char *name, rf_sampler_kind *out) {
    for (int i = 0; i < RF_SAMPLER_COUNT; i++) {
        if (strcmp(name, kinds[i].name) == 0) {
            *out = (rf_sampler_kind)i;
            return true;
        }
    }
    return false;
}

const char *rf_sampler_kind_name(rf_sampler_kind kind) {
    return kind >= 0 && kind < RF_SAMPLER_COUNT ? kinds[kind].name : "unknown";
}

static bool is_dpm(rf_sampler_kind kind) {
    return kind == RF_SAMPLER_DPMPP_2M || kind == RF_SAMPLER_DPMPP_2M_SDE;
}

static bool takes_karras(rf_sampler_kind kind) {
    return is_dpm(kind) || kind == RF_SAMPLER_EULER;
}

/* ---- scheduler_config.json ---- */

rf_scheduler_config rf_scheduler_config_default(void) {
    return (rf_scheduler_config){
        .kind = RF_SAMPLER_DDIM,
        .num_train_timesteps = 1000,
        .beta_start = 1e-4,
        .beta_end = 0.02,
        .beta_schedule = RF_BETA_LINEAR,
        .prediction = RF_PREDICTION_EPSILON,
        .spacing = RF_SPACING_LEADING,
        .set_alpha_to_one = true,
        .clip_sample_range = 1,
        .variance = RF_VARIANCE_FIXED_SMALL,
        .lower_order_final = true,
        .lambda_min_clipped = -INFINITY,
        .final_sigma_zero = true,
        .shift = 1,
        .base_shift = 0.5,
        .max_shift = 1.15,
        .base_seq_len = 256,
        .max_seq_len = 4096,
    };
}

/* A config being read: the first error stops all further reading. */
typedef struct {
    const rf_json *doc;
    const rf_json_value *root;
    rf_error *err;
    rf_status st;
} reader;

static int64_t read_int(reader *r, const char *key, int64_t min, int64_t max, int64_t absent) {
    int64_t v = absent;
    if (r->st == RF_OK) r->st = rf_json_opt_int(r->doc, r->root, key, min, max, absent, &v, r->err);
    return v;
}

static double read_double(reader *r, const char *key, double min, double max, double absent) {
    double v = absent;
    if (r->st == RF_OK) r->st = rf_json_opt_double(r->doc, r->root, key, min, max, absent, &v, r->err);
    return v;
}

static bool read_bool(reader *r, const char *key, bool absent) {
    bool v = absent;
    if (r->st == RF_OK) r->st = rf_json_opt_bool(r->doc, r->root, key, absent, &v, r->err);
    return v;
}

typedef struct {
    const char *name;
    int value;
} word;

/* One of up to 8 words (ended by a NULL name), the first if absent is NULL. Others are refused with the list. */
static int read_word(reader *r, const char *key, const char *absent, const word *words) {
    const char *text = absent;
    if (r->st == RF_OK) r->st = rf_json_opt_string(r->doc, r->root, key, absent, &text, r->err);
    if (r->st != RF_OK) return words[0].value;
    char list[256] = "";
    for (const word *w = words; w->name; w++) {
        if (strcmp(text, w->name) == 0) return w->value;
        size_t used = strlen(list);
        if (used + strlen(w->name) + 3 < sizeof list) {
            if (used) strcat(list, ", ");
            strcat(list, w->name);
        }
    }
    r->st = rf_fail(r->err, RF_ERR_UNSUPPORTED, "%s: %s '%s' is not supported (supported: %s)", rf_json_name(r->doc),
                    key, text, list);
    return words[0].value;
}

/* Keys that must be absent, null or false. */
static void refuse_keys(reader *r, const char *const *keys) {
    for (; r->st == RF_OK && *keys; keys++) {
        const rf_json_value *v = rf_json_has(r->root, *keys) ? rf_json_get(r->root, *keys) : NULL;
        if (!v) continue;
        if (rf_json_is_number(v) || rf_json_is_string(v) || rf_json_is_array(v) || rf_json_is_object(v)) {
            r->st = rf_fail(r->err, RF_ERR_UNSUPPORTED, "%s: %s is set, which is not supported", rf_json_name(r->doc),
                            *keys);
        } else if (read_bool(r, *keys, false)) {
            r->st = rf_fail(r->err, RF_ERR_UNSUPPORTED, "%s: %s true is not supported", rf_json_name(r->doc), *keys);
        }
    }
}

static rf_sampler_kind read_kind(reader *r) {
    const char *name = NULL;
    r->st = rf_json_get_string(r->doc, r->root, "_class_name", &name, r->err);
    if (r->st != RF_OK) return RF_SAMPLER_DDIM;
    for (int i = 0; i < RF_SAMPLER_COUNT; i++) {
        if (strcmp(name, kinds[i].class_name) != 0) continue;
        if (i != RF_SAMPLER_DPMPP_2M) return (rf_sampler_kind)i;
        return (rf_sampler_kind)read_word(
            r, "algorithm_type", "dpmsolver++",
            (const word[]){{"dpmsolver++", RF_SAMPLER_DPMPP_2M}, {"sde-dpmsolver++", RF_SAMPLER_DPMPP_2M_SDE}, {0}});
    }
    r->st = rf_fail(r->err, RF_ERR_UNSUPPORTED, "%s: scheduler '%s' is not supported (supported: %s, %s, %s, %s, %s)",
                    rf_json_name(r->doc), name, kinds[RF_SAMPLER_DDPM].class_name, kinds[RF_SAMPLER_DDIM].class_name,
                    kinds[RF_SAMPLER_DPMPP_2M].class_name, kinds[RF_SAMPLER_EULER].class_name,
                    kinds[RF_SAMPLER_FLOW_EULER].class_name);
    return RF_SAMPLER_DDIM;
}

static void read_flow(reader *r, rf_scheduler_config *c) {
    c->prediction = RF_PREDICTION_FLOW;
    c->shift = read_double(r, "shift", 1e-3, 1e3, 1);
    c->dynamic_shifting = read_bool(r, "use_dynamic_shifting", false);
    c->base_shift = read_double(r, "base_shift", -20, 20, 0.5);
    c->max_shift = read_double(r, "max_shift", -20, 20, 1.15);
    c->base_seq_len = (int)read_int(r, "base_image_seq_len", 1, INT32_MAX, 256);
    c->max_seq_len = (int)read_int(r, "max_image_seq_len", 1, INT32_MAX, 4096);
    read_word(r, "time_shift_type", "exponential", (const word[]){{"exponential", 0}, {0}});
    refuse_keys(r, (const char *const[]){"invert_sigmas", "shift_terminal", "stochastic_sampling", "use_karras_sigmas",
                                         "use_exponential_sigmas", "use_beta_sigmas", NULL});
    if (r->st == RF_OK && c->max_seq_len <= c->base_seq_len) {
        r->st = rf_fail(r->err, RF_ERR_CONFIG, "%s: max_image_seq_len %d is not above base_image_seq_len %d",
                        rf_json_name(r->doc), c->max_seq_len, c->base_seq_len);
    }
}

static void read_betas(reader *r, rf_scheduler_config *c) {
    c->beta_start = read_double(r, "beta_start", 1e-7, 0.999, 1e-4);
    c->beta_end = read_double(r, "beta_end", 1e-7, 0.999, 0.02);
    c->beta_schedule = (rf_beta_schedule)read_word(r, "beta_schedule", "linear",
                                                   (const word[]){{"linear", RF_BETA_LINEAR},
                                                                  {"scaled_linear", RF_BETA_SCALED_LINEAR},
                                                                  {"squaredcos_cap_v2", RF_BETA_SQUAREDCOS_CAP_V2},
                                                                  {0}});
    refuse_keys(r, (const char *const[]){"trained_betas", "rescale_betas_zero_snr", "thresholding", NULL});
    if (r->st == RF_OK && c->beta_start > c->beta_end) {
        r->st = rf_fail(r->err, RF_ERR_CONFIG, "%s: beta_start %g is above beta_end %g", rf_json_name(r->doc),
                        c->beta_start, c->beta_end);
    }
}

static void read_dpm(reader *r, rf_scheduler_config *c) {
    c->sigmas = read_bool(r, "use_karras_sigmas", false) ? RF_SIGMAS_KARRAS : RF_SIGMAS_DEFAULT;
    c->lower_order_final = read_bool(r, "lower_order_final", true);
    c->euler_at_final = read_bool(r, "euler_at_final", false);
    const rf_json_value *lambda_min = rf_json_get(r->root, "lambda_min_clipped");
    c->lambda_min_clipped = -INFINITY; /* written out by the reference, although the number getter refuses it */
    if (!lambda_min || rf_json_number(lambda_min) != -INFINITY)
        c->lambda_min_clipped = read_double(r, "lambda_min_clipped", -1e30, 1e3, -INFINITY);
    read_word(r, "solver_type", "midpoint", (const word[]){{"midpoint", 0}, {0}});
    /* the variance half is dropped, so what it means does not matter */
    read_word(r, "variance_type", "learned", (const word[]){{"learned", 0}, {"learned_range", 0}, {0}});
    refuse_keys(r, (const char *const[]){"use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas",
                                         "use_flow_sigmas", "use_dynamic_shifting", NULL});
    int64_t order = read_int(r, "solver_order", INT32_MIN, INT32_MAX, 2);
    if (r->st == RF_OK && order != 2) {
        r->st = rf_fail(r->err, RF_ERR_UNSUPPORTED, "%s: solver_order %lld is not supported (supported: 2)",
                        rf_json_name(r->doc), (long long)order);
    }
}

static void read_euler(reader *r, rf_scheduler_config *c) {
    c->sigmas = read_bool(r, "use_karras_sigmas", false) ? RF_SIGMAS_KARRAS : RF_SIGMAS_DEFAULT;
    read_word(r, "interpolation_type", "linear", (const word[]){{"linear", 0}, {0}});
    read_word(r, "timestep_type", "discrete", (const word[]){{"discrete", 0}, {0}});
    refuse_keys(r, (const char *const[]){"use_exponential_sigmas", "use_beta_sigmas", "sigma_min", "sigma_max", NULL});
}

rf_status rf_scheduler_config_read(rf_scheduler_config *out, const rf_json *config, rf_error *err) {
    rf_scheduler_config c = rf_scheduler_config_default();
    reader r = {.doc = config, .root = rf_json_root(config), .err = err};
    if (!rf_json_is_object(r.root)) {
        return rf_fail(err, RF_ERR_CONFIG, "%s: a scheduler config is a JSON object", rf_json_name(config));
    }
    c.kind = read_kind(&r);
    c.num_train_timesteps = (int)read_int(&r, "num_train_timesteps", 1, MAX_TRAIN_STEPS, 1000);
    if (c.kind == RF_SAMPLER_FLOW_EULER) {
        read_flow(&r, &c);
    } else {
        bool leading = c.kind == RF_SAMPLER_DDPM || c.kind == RF_SAMPLER_DDIM;
        read_betas(&r, &c);
        c.prediction = (rf_prediction)read_word(&r, "prediction_type", "epsilon",
                                                (const word[]){{"epsilon", RF_PREDICTION_EPSILON},
                                                               {"v_prediction", RF_PREDICTION_V},
                                                               {"sample", RF_PREDICTION_SAMPLE},
                                                               {0}});
        c.spacing = (rf_spacing)read_word(&r, "timestep_spacing", leading ? "leading" : "linspace",
                                          (const word[]){{"leading", RF_SPACING_LEADING},
                                                         {"trailing", RF_SPACING_TRAILING},
                                                         {"linspace", RF_SPACING_LINSPACE},
                                                         {0}});
        c.steps_offset = (int)read_int(&r, "steps_offset", 0, MAX_TRAIN_STEPS, 0);
        if (leading) {
            c.clip_sample = read_bool(&r, "clip_sample", true);
            c.clip_sample_range = read_double(&r, "clip_sample_range", 1e-6, 1e6, 1);
        } else {
            c.final_sigma_zero =
                read_word(&r, "final_sigmas_type", "zero", (const word[]){{"zero", 1}, {"sigma_min", 0}, {0}}) == 1;
        }
        if (c.kind == RF_SAMPLER_DDIM) c.set_alpha_to_one = read_bool(&r, "set_alpha_to_one", true);
        if (c.kind == RF_SAMPLER_DDPM) {
            /* the log form of fixed_small is the same number by another route */
            c.variance = (rf_variance)read_word(&r, "variance_type", "fixed_small",
                                                (const word[]){{"fixed_small", RF_VARIANCE_FIXED_SMALL},
                                                               {"fixed_small_log", RF_VARIANCE_FIXED_SMALL},
                                                               {"fixed_large", RF_VARIANCE_FIXED_LARGE},
                                                               {"learned_range", RF_VARIANCE_LEARNED_RANGE},
                                                               {0}});
        }
        if (is_dpm(c.kind)) read_dpm(&r, &c);
        if (c.kind == RF_SAMPLER_EULER) read_euler(&r, &c);
    }
    if (r.st == RF_OK) *out = c;
    return r.st;
}

/* ---- solvers ---- */

/* At a level where x = a * x0 + s * noise: x0 and the noise prediction as sums over x and the model's output. */
typedef struct {
    double x0_x, x0_out, eps_x, eps_out;
} conversion;

static conversion convert_prediction(rf_prediction prediction, double a, double s) {
    switch (prediction) {
    case RF_PREDICTION_SAMPLE: return (conversion){0, 1, 1 / s, -a / s};
    case RF_PREDICTION_V: return (conversion){a, -s, s, a};
    case RF_PREDICTION_FLOW: return (conversion){1, -s, 1, a};
    default: return (conversion){1 / a, -s / a, 0, 1};
    }
}

static void set_x0(rf_sampler_coefs *row, const rf_scheduler_config *c, const conversion *v) {
    row->x0_x = (float)v->x0_x;
    row->x0_out = (float)v->x0_out;
    if (c->clip_sample) row->clip = (float)c->clip_sample_range;
}

static void ddpm_row(rf_sampler_coefs *row, const rf_scheduler_config *c, const rf_schedule *s, int i,
                     bool learned_variance) {
    int t = (int)s->timesteps[i];
    float ab = s->alpha_bar[t], ab_prev = i + 1 < s->num_steps ? s->alpha_bar[(int)s->timesteps[i + 1]] : 1.0f;
    float bb = 1.0f - ab, bb_prev = 1.0f - ab_prev, alpha = ab / ab_prev, beta = 1.0f - alpha;
    conversion v = convert_prediction(c->prediction, sqrt(ab), sqrt(bb));
    set_x0(row, c, &v);
    row->x0 = (float)(sqrt(ab_prev) * beta / bb);
    row->x = (float)(sqrt(alpha) * bb_prev / bb);
    if (t == 0) return; /* no noise at the end */
    double posterior = fmax((double)bb_prev / bb * beta, 1e-20);
    if (learned_variance) {
        row->noise = 1;
        row->log_min = (float)log(posterior);
        row->log_max = (float)log(fmax(beta, 1e-20));
    } else {
        row->noise = (float)sqrt(c->variance == RF_VARIANCE_FIXED_LARGE ? (double)beta : posterior);
    }
}

static void ddim_row(rf_sampler_coefs *row, const rf_scheduler_config *c, const rf_schedule *s, int i, double eta) {
    int t = (int)s->timesteps[i], t_prev = t - s->num_train / s->num_steps;
    float ab = s->alpha_bar[t];
    float ab_prev = t_prev >= 0 ? s->alpha_bar[t_prev] : c->set_alpha_to_one ? 1.0f : s->alpha_bar[0];
    float bb = 1.0f - ab, bb_prev = 1.0f - ab_prev;
    double std = eta * sqrt((double)bb_prev / bb * (1.0f - ab / ab_prev));
    double direction = sqrt(fmax((double)bb_prev - std * std, 0));
    conversion v = convert_prediction(c->prediction, sqrt(ab), sqrt(bb));
    set_x0(row, c, &v);
    row->x0 = (float)sqrt(ab_prev);
    row->x = (float)(direction * v.eps_x);
    row->out = (float)(direction * v.eps_out);
    row->noise = (float)std;
}

/* The VP form of a sigma: x = a * x0 + s * noise; lambda = log(a / s) is infinite at the end. */
typedef struct {
    double a, s, lambda;
} level;

static level level_of(double sigma) {
    double a = 1 / sqrt(sigma * sigma + 1);
    return (level){a, sigma * a, sigma > 0 ? -log(sigma) : INFINITY};
}

static void dpm_row(rf_sampler_coefs *row, const rf_scheduler_config *c, const rf_schedule *s, int i, bool sde) {
    int num = s->num_steps;
    level now = level_of(s->sigmas[i]), next = level_of(s->sigmas[i + 1]);
    conversion v = convert_prediction(c->prediction, now.a, now.s);
    set_x0(row, c, &v);

    double h = next.lambda - now.lambda;
    double x0 = -next.a * expm1(sde ? -2 * h : -h);
    row->x = (float)(sde ? next.s / now.s * exp(-h) : next.s / now.s);
    if (sde) row->noise = (float)(next.s * sqrt(-expm1(-2 * h)));

    bool first_order =
        i == 0 || (i == num - 1 && (c->euler_at_final || (c->lower_order_final && num < 15) || c->final_sigma_zero));
    double h_prev = i > 0 ? now.lambda - -log(s->sigmas[i - 1]) : 0;
    /* equal neighbours (more steps than distinct timesteps): no difference to extrapolate from */
    double extra = first_order || h_prev == 0 ? 0 : x0 * 0.5 * h / h_prev;
    row->x0 = (float)(x0 + extra);
    row->x0_prev = (float)-extra;
}

static void euler_row(rf_sampler_coefs *row, const rf_scheduler_config *c, const rf_schedule *s, int i) {
    double sigma = s->sigmas[i], ratio = s->sigmas[i + 1] / sigma; /* x' = x + (x - x0) / sigma * (next - sigma) */
    row->in_scale = (float)(1 / sqrt(sigma * sigma + 1));
    if (c->prediction == RF_PREDICTION_EPSILON) { /* the same without going through x0, which is far from x */
        row->x0_x = 1;
        row->x0_out = (float)-sigma;
        row->x = 1;
        row->out = (float)(s->sigmas[i + 1] - sigma);
        return;
    }
    level now = level_of(sigma);
    row->x0_x = c->prediction == RF_PREDICTION_V ? (float)(now.a * now.a) : 0;
    row->x0_out = c->prediction == RF_PREDICTION_V ? (float)-now.s : 1;
    row->x = (float)ratio;
    row->x0 = (float)(1 - ratio);
}

static void flow_row(rf_sampler_coefs *row, const rf_schedule *s, int i) {
    row->x0_x = 1;
    row->x0_out = (float)-s->sigmas[i];
    row->x = 1;
    row->out = (float)(s->sigmas[i + 1] - s->sigmas[i]);
}

/* ---- plan ---- */

static rf_status check_config(const rf_scheduler_config *c, rf_error *err) {
    if (c->num_train_timesteps < 1 || c->num_train_timesteps > MAX_TRAIN_STEPS) {
        return rf_fail(err, RF_ERR_CONFIG, "scheduler: num_train_timesteps %d is outside 1..%d", c->num_train_timesteps,
                       MAX_TRAIN_STEPS);
    }
    if (c->kind != RF_SAMPLER_FLOW_EULER && !(c->beta_start > 0 && c->beta_start <= c->beta_end && c->beta_end < 1)) {
        return rf_fail(err, RF_ERR_CONFIG, "scheduler: betas %g..%g must rise inside (0, 1)", c->beta_start,
                       c->beta_end);
    }
    if (c->clip_sample && !(c->clip_sample_range > 0)) {
        return rf_fail(err, RF_ERR_CONFIG, "scheduler: clip_sample_range %g must be above 0", c->clip_sample_range);
    }
    if (c->kind == RF_SAMPLER_FLOW_EULER && !(c->shift > 0 && c->max_seq_len > c->base_seq_len)) {
        return rf_fail(err, RF_ERR_CONFIG,
                       "scheduler: shift %g must be above 0, and max_seq_len %d above base_seq_len %d", c->shift,
                       c->max_seq_len, c->base_seq_len);
    }
    return RF_OK;
}

static rf_status check_options(const rf_scheduler_config *c, const rf_sampler_options *o, rf_error *err) {
    const char *name = rf_sampler_kind_name(o->kind);
    if (o->num_steps < 1 || o->num_steps > MAX_STEPS) {
        return rf_fail(err, RF_ERR_ARGUMENT, "sampler: %d steps, must be 1..%d", o->num_steps, MAX_STEPS);
    }
    if (!(o->eta >= 0 && o->eta <= 1)) {
        return rf_fail(err, RF_ERR_ARGUMENT, "sampler: eta %g is outside 0..1", o->eta);
    }
    if (o->eta != 0 && o->kind != RF_SAMPLER_DDIM) {
        return rf_fail(err, RF_ERR_ARGUMENT, "sampler: eta %g is for ddim, %s has none", o->eta, name);
    }
    if (!isfinite(o->mu) || fabs(o->mu) > 50) {
        return rf_fail(err, RF_ERR_ARGUMENT, "sampler: mu %g is outside -50..50", o->mu);
    }
    if (o->mu != 0 && !(o->kind == RF_SAMPLER_FLOW_EULER && c->dynamic_shifting)) {
        return rf_fail(err, RF_ERR_ARGUMENT, "sampler: mu %g is for dynamic shifting, this schedule has none", o->mu);
    }
    if (o->sigmas == RF_SIGMAS_KARRAS && !takes_karras(o->kind)) {
        return rf_fail(err, RF_ERR_ARGUMENT, "sampler: karras sigmas are for dpm++2m, dpm++2m-sde and euler, not %s",
                       name);
    }
    if ((o->kind == RF_SAMPLER_FLOW_EULER) != (c->prediction == RF_PREDICTION_FLOW)) {
        return rf_fail(err, RF_ERR_ARGUMENT, "sampler: %s cannot run a model that predicts %s", name,
                       c->prediction == RF_PREDICTION_FLOW     ? "flow (flow-euler can)"
                       : c->prediction == RF_PREDICTION_SAMPLE ? "the sample"
                       : c->prediction == RF_PREDICTION_V      ? "v"
                                                               : "epsilon");
    }
    return RF_OK;
}

/* The config as solver `kind` takes it over from a file made for another one. */
static rf_scheduler_config adopt(const rf_scheduler_config *file, rf_sampler_kind kind) {
    rf_scheduler_config c = *file;
    if (kind == file->kind || (is_dpm(kind) && is_dpm(file->kind))) {
        c.kind = kind;
        return c;
    }
    c = rf_scheduler_config_default();
    c.kind = kind;
    c.num_train_timesteps = file->num_train_timesteps;
    c.beta_start = file->beta_start;
    c.beta_end = file->beta_end;
    c.beta_schedule = file->beta_schedule;
    c.prediction = file->prediction;
    c.spacing = file->spacing;
    c.steps_offset = file->steps_offset;
    /* DPM-Solver++ and Euler have no clipping; between DDPM and DDIM it is the data's range */
    if (kind == RF_SAMPLER_DDPM || kind == RF_SAMPLER_DDIM) {
        c.clip_sample = file->clip_sample;
        c.clip_sample_range = file->clip_sample_range;
    }
    if (takes_karras(kind)) c.sigmas = file->sigmas;
    c.variance = file->variance;
    return c;
}

rf_status rf_sampler_plan_make(rf_sampler_plan *out, const rf_scheduler_config *config,
                               const rf_sampler_options *options, bool model_has_variance, rf_error *err) {
    *out = (rf_sampler_plan){0};
    rf_sampler_options o = *options;
    if (o.kind == RF_SAMPLER_COUNT) o.kind = config->kind;
    if (o.kind < 0 || o.kind >= RF_SAMPLER_COUNT) {
        return rf_fail(err, RF_ERR_ARGUMENT, "sampler: kind %d is not known", (int)o.kind);
    }
    rf_scheduler_config c = adopt(config, o.kind);
    rf_status st = check_options(&c, &o, err);
    if (st == RF_OK) st = check_config(&c, err);
    if (st != RF_OK) return st;
    if (o.sigmas == RF_SIGMAS_DEFAULT && takes_karras(o.kind)) o.sigmas = c.sigmas;
    bool learned = o.kind == RF_SAMPLER_DDPM && c.variance == RF_VARIANCE_LEARNED_RANGE;
    if (learned && !model_has_variance) {
        return rf_fail(err, RF_ERR_CONFIG,
                       "scheduler: variance_type learned_range, but the model has no variance channels");
    }
    if (is_dpm(o.kind) || o.kind == RF_SAMPLER_EULER) c.clip_sample = false;

    rf_schedule s;
    st = rf_schedule_make(&s, &c, &o, err);
    if (st != RF_OK) return st;
    out->num_steps = s.num_steps;
    out->coefs = rf_alloc_zero((size_t)s.num_steps, sizeof *out->coefs);
    out->step_noise = rf_alloc_zero((size_t)s.num_steps, sizeof *out->step_noise);
    if (!out->coefs || !out->step_noise) {
        rf_schedule_free(&s);
        rf_sampler_plan_free(out);
        return rf_fail(err, RF_ERR_MEMORY, "sampler: no memory for %d steps", o.num_steps);
    }

    out->learned_variance = learned;
    out->init_scale = 1;
    if (o.kind == RF_SAMPLER_EULER) { /* the first sigma is the largest */
        double sigma = s.sigmas[0];
        out->init_scale = (float)(c.spacing == RF_SPACING_LEADING ? sqrt(sigma * sigma + 1) : sigma);
    }
    for (int i = 0; i < s.num_steps; i++) {
        rf_sampler_coefs *row = &out->coefs[i];
        row->in_scale = 1;
        row->timestep = (float)s.timesteps[i];
        switch (o.kind) {
        case RF_SAMPLER_DDPM:
            ddpm_row(row, &c, &s, i, learned);
            out->step_noise[i] = s.timesteps[i] > 0;
            break;
        case RF_SAMPLER_DDIM:
            ddim_row(row, &c, &s, i, o.eta);
            out->step_noise[i] = o.eta > 0;
            break;
        case RF_SAMPLER_DPMPP_2M: dpm_row(row, &c, &s, i, false); break;
        case RF_SAMPLER_DPMPP_2M_SDE:
            dpm_row(row, &c, &s, i, true);
            out->step_noise[i] = true;
            break;
        case RF_SAMPLER_EULER: euler_row(row, &c, &s, i); break;
        default: flow_row(row, &s, i); break;
        }
        out->uses_noise |= row->noise != 0;
    }
    rf_schedule_free(&s);
    return RF_OK;
}

void rf_sampler_plan_free(rf_sampler_plan *plan) {
    if (!plan) return;
    rf_free(plan->coefs);
    rf_free(plan->step_noise);
    *plan = (rf_sampler_plan){0};
}
