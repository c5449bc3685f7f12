/* tests/dit/test_sampler.c - solvers against trajectories of the reference schedulers, and what must hold without them.
 *
 * Bound of the trajectories: the reference's own f32 sums over up to 50 steps; a weight that is wrong in the 5th digit, or
 * a timestep off by one, is far outside. */
#include "dit/sampler.h"

#include <cjson/cJSON.h>

#include "core/file.h"
#include "core/memory.h"
#include "core/weights.h"
#include "tests/test_util.h"

#define TRAJECTORY_BOUND 2e-6
#define TIMESTEP_BOUND   1e-4 /* fractional timesteps only: logarithms of two maths libraries, interpolated */

enum { BATCH = 2, CHANNELS = 4, PIXELS = 16, NUM = BATCH * CHANNELS * PIXELS };

/* ---- the sum of kernels/sampler.h, in f32 ---- */

static void solver_step(const rf_sampler_coefs *c, bool learned, const float *out, const float *variance, float *x,
                        float *x0_prev, const float *noise) {
    for (int i = 0; i < NUM; i++) {
        float x0 = c->x0_x * x[i] + c->x0_out * out[i];
        if (c->clip > 0) x0 = fminf(fmaxf(x0, -c->clip), c->clip);
        float next = c->x * x[i] + c->x0 * x0 + c->out * out[i];
        if (c->x0_prev != 0) next += c->x0_prev * x0_prev[i];
        if (c->noise != 0) {
            float s = c->noise;
            if (learned) {
                float f = (variance[i] + 1) / 2;
                s *= expf(0.5f * (f * c->log_max + (1 - f) * c->log_min));
            }
            next += s * noise[i];
        }
        x0_prev[i] = x0;
        x[i] = next;
    }
}

/* ---- fixtures ---- */

static cJSON *fixture;
static rf_weights *fixture_tensors;

static void open_fixture(void) {
    rf_error err = {0};
    char *text;
    size_t text_bytes;
    rf_assert_ok(rf_file_read(RF_FIXTURE_DIR "/schedulers.json", 64 << 20, &text, &text_bytes, &err), err);
    fixture = cJSON_Parse(text);
    rf_free(text);
    ck_assert_ptr_nonnull(fixture);
    rf_assert_ok(rf_weights_open(&fixture_tensors, RF_FIXTURE_DIR "/schedulers.safetensors", &err), err);
}

static void close_fixture(void) {
    cJSON_Delete(fixture);
    rf_weights_close(fixture_tensors);
}

static const float *tensor(const char *name) {
    rf_error err = {0};
    rf_tensor t;
    rf_assert_ok(rf_weights_get(fixture_tensors, name, &t, &err), err);
    ck_assert_int_eq(t.dtype, RF_DTYPE_F32);
    return t.data;
}

static double number(const cJSON *object, const char *key) {
    const cJSON *v = cJSON_GetObjectItemCaseSensitive(object, key);
    ck_assert_msg(cJSON_IsNumber(v), "no number %s", key);
    return v->valuedouble;
}

static const char *string(const cJSON *object, const char *key) {
    const cJSON *v = cJSON_GetObjectItemCaseSensitive(object, key);
    ck_assert_msg(cJSON_IsString(v), "no string %s", key);
    return v->valuestring;
}

static rf_status read_config_text(rf_scheduler_config *out, const char *text, rf_error *err) {
    rf_json *doc;
    rf_assert_ok(rf_json_parse(&doc, text, strlen(text), "scheduler_config.json", err), *err);
    rf_status st = rf_scheduler_config_read(out, doc, err);
    rf_json_close(doc);
    return st;
}

/* The case's config, through the reader of scheduler_config.json. */
static rf_scheduler_config case_config(const cJSON *entry) {
    rf_error err = {0};
    cJSON *config = cJSON_Duplicate(cJSON_GetObjectItemCaseSensitive(entry, "config"), true);
    cJSON_AddStringToObject(config, "_class_name", string(entry, "class"));
    char *text = cJSON_PrintUnformatted(config);
    rf_scheduler_config c;
    rf_assert_ok(read_config_text(&c, text, &err), err);
    cJSON_free(text);
    cJSON_Delete(config);
    return c;
}

static rf_sampler_options case_options(const cJSON *entry) {
    rf_sampler_options o = {.kind = RF_SAMPLER_COUNT, .num_steps = (int)number(entry, "num_steps")};
    const cJSON *step = cJSON_GetObjectItemCaseSensitive(entry, "step");
    const cJSON *set = cJSON_GetObjectItemCaseSensitive(entry, "set_timesteps");
    if (cJSON_GetObjectItemCaseSensitive(step, "eta")) o.eta = number(step, "eta");
    if (cJSON_GetObjectItemCaseSensitive(set, "mu")) o.mu = number(set, "mu");
    if (cJSON_GetObjectItemCaseSensitive(set, "sigmas")) o.flow_sigmas_per_steps = true;
    return o;
}

static void run_case(const cJSON *entry) {
    const char *name = string(entry, "name");
    bool learned = cJSON_IsTrue(cJSON_GetObjectItemCaseSensitive(entry, "learned_variance"));
    rf_scheduler_config config = case_config(entry);
    rf_sampler_options options = case_options(entry);
    rf_sampler_plan plan;
    rf_error err = {0};
    rf_assert_ok(rf_sampler_plan_make(&plan, &config, &options, learned, &err), err);
    ck_assert_int_eq(plan.num_steps, options.num_steps);
    ck_assert_int_eq(plan.learned_variance, learned);

    char key[128];
    snprintf(key, sizeof key, "%s.x", name);
    const float *want = tensor(key), *init = tensor("init"), *noise = tensor("noise"), *d = tensor("d");
    const cJSON *timesteps = cJSON_GetObjectItemCaseSensitive(entry, "timesteps");
    const cJSON *draws = cJSON_GetObjectItemCaseSensitive(entry, "noise_draws");
    const cJSON *stored = cJSON_GetObjectItemCaseSensitive(entry, "stored_steps")->child;

    float x[NUM], x0_prev[NUM], x_in[NUM], out[NUM], variance[NUM];
    double worst = 0, worst_t = 0;
    for (int i = 0; i < NUM; i++) x[i] = plan.init_scale * init[i];
    worst = rf_compare_f32(x, want, NUM).rel_l2;
    want += NUM;
    for (int step = 0; step < plan.num_steps; step++) {
        const rf_sampler_coefs *c = &plan.coefs[step];
        double t = cJSON_GetArrayItem(timesteps, step)->valuedouble;
        int draw = cJSON_GetArrayItem(draws, step)->valueint;
        if (t == floor(t))
            ck_assert_msg((double)c->timestep == t, "%s: step %d told %g, not %g", name, step, (double)c->timestep, t);
        worst_t = fmax(worst_t, fabs((double)c->timestep - t));
        ck_assert_msg(plan.step_noise[step] == (draw >= 0), "%s: step %d draws noise: %d", name, step,
                      plan.step_noise[step]);
        for (int i = 0; i < NUM; i++) {
            x_in[i] = c->in_scale * x[i];
            out[i] = (0.3f * x_in[i] + 0.0002f * c->timestep) + d[i % 7];
            variance[i] = 0.05f * x_in[i];
        }
        solver_step(c, plan.learned_variance, out, variance, x, x0_prev, draw >= 0 ? noise + draw * NUM : NULL);
        if (stored && stored->valueint == step) {
            worst = fmax(worst, rf_compare_f32(x, want, NUM).rel_l2);
            want += NUM;
            stored = stored->next;
        }
    }
    ck_assert_ptr_null(stored);
    printf("%-45s relative L2 %.2g, timesteps %.2g\n", name, worst, worst_t);
    ck_assert_msg(worst <= TRAJECTORY_BOUND, "%s: relative L2 %g", name, worst);
    ck_assert_msg(worst_t <= TIMESTEP_BOUND, "%s: a timestep is off by %g", name, worst_t);
    rf_sampler_plan_free(&plan);
}

START_TEST(every_fixture_case_follows_the_reference_trajectory) {
    open_fixture();
    const cJSON *cases = cJSON_GetObjectItemCaseSensitive(fixture, "cases"), *entry;
    ck_assert_int_gt(cJSON_GetArraySize(cases), 30);
    cJSON_ArrayForEach(entry, cases) run_case(entry);
    close_fixture();
}
END_TEST

START_TEST(config_files_of_the_reference_are_read) {
    static const struct {
        const char *file;
        rf_sampler_kind kind;
    } files[] = {{"ddpm", RF_SAMPLER_DDPM},
                 {"ddim", RF_SAMPLER_DDIM},
                 {"dpmpp", RF_SAMPLER_DPMPP_2M},
                 {"euler", RF_SAMPLER_EULER},
                 {"flow", RF_SAMPLER_FLOW_EULER}};
    for (size_t i = 0; i < sizeof files / sizeof *files; i++) {
        char path[512];
        rf_error err = {0};
        rf_json *doc;
        rf_scheduler_config c;
        snprintf(path, sizeof path, RF_FIXTURE_DIR "/scheduler-configs/%s.json", files[i].file);
        rf_assert_ok(rf_json_open(&doc, path, &err), err);
        rf_assert_ok(rf_scheduler_config_read(&c, doc, &err), err);
        rf_json_close(doc);
        ck_assert_int_eq(c.kind, files[i].kind);
    }
}
END_TEST

/* ---- check values ---- */

static rf_sampler_plan make_plan(const rf_scheduler_config *config, rf_sampler_options options) {
    rf_sampler_plan plan;
    rf_error err = {0};
    rf_assert_ok(rf_sampler_plan_make(&plan, config, &options, false, &err), err);
    return plan;
}

START_TEST(linear_betas_give_the_known_alpha_bars) {
    /* the x0 of an epsilon model is (x - sqrt(1-ab) out) / sqrt(ab): ab = 1 / x0_x^2 */
    static const struct {
        int t;
        double ab;
    } known[] = {{0, .9999}, {20, .993735}, {499, .078587}, {980, .000059}, {999, .000040}};
    rf_scheduler_config c = rf_scheduler_config_default();
    rf_sampler_plan plan = make_plan(&c, (rf_sampler_options){.kind = RF_SAMPLER_DDIM, .num_steps = 1000});
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        const rf_sampler_coefs *row = &plan.coefs[999 - known[i].t];
        ck_assert_float_eq(row->timestep, (float)known[i].t);
        ck_assert_double_eq_tol(1 / ((double)row->x0_x * (double)row->x0_x), known[i].ab, 5.1e-7);
    }
    rf_sampler_plan_free(&plan);
}
END_TEST

START_TEST(known_timesteps_of_the_model_families) {
    rf_scheduler_config c = rf_scheduler_config_default();
    rf_sampler_plan plan = make_plan(&c, (rf_sampler_options){.kind = RF_SAMPLER_DDIM, .num_steps = 50});
    for (int i = 0; i < 50; i++) ck_assert_float_eq(plan.coefs[i].timestep, 980.0f - 20.0f * (float)i);
    rf_sampler_plan_free(&plan);

    plan = make_plan(&c, (rf_sampler_options){.kind = RF_SAMPLER_DDIM, .num_steps = 250}); /* DiT: 996, 992, ..., 0 */
    for (int i = 0; i < 250; i++) ck_assert_float_eq(plan.coefs[i].timestep, 996.0f - 4.0f * (float)i);
    rf_sampler_plan_free(&plan);

    c.spacing = RF_SPACING_LINSPACE; /* PixArt: 999, 949, 899, ..., 100, 50 */
    plan = make_plan(&c, (rf_sampler_options){.kind = RF_SAMPLER_DPMPP_2M, .num_steps = 20});
    ck_assert_float_eq(plan.coefs[0].timestep, 999);
    ck_assert_float_eq(plan.coefs[1].timestep, 949);
    ck_assert_float_eq(plan.coefs[2].timestep, 899);
    ck_assert_float_eq(plan.coefs[18].timestep, 100);
    ck_assert_float_eq(plan.coefs[19].timestep, 50);
    rf_sampler_plan_free(&plan);
}
END_TEST

static rf_scheduler_config flow_config(double shift) {
    rf_scheduler_config c = rf_scheduler_config_default();
    c.kind = RF_SAMPLER_FLOW_EULER;
    c.prediction = RF_PREDICTION_FLOW;
    c.shift = shift;
    return c;
}

START_TEST(sd3_flow_schedule_is_shifted_twice_at_its_end) {
    rf_scheduler_config c = flow_config(3);
    rf_sampler_plan plan = make_plan(&c, (rf_sampler_options){.kind = RF_SAMPLER_COUNT, .num_steps = 28});
    static const struct {
        int step;
        double sigma;
    } known[] = {{0, 1}, {1, .987381}, {2, .974108}, {26, .110906}, {27, .008929}};
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        const rf_sampler_coefs *row = &plan.coefs[known[i].step];
        ck_assert_double_eq_tol(-(double)row->x0_out, known[i].sigma, 5.1e-7);
        ck_assert_double_eq_tol((double)row->timestep, 1000 * known[i].sigma, 5.1e-4);
    }
    ck_assert_double_eq_tol((double)plan.coefs[27].out, -.008929, 5.1e-7); /* the run ends at sigma 0 */
    rf_sampler_plan_free(&plan);
}
END_TEST

START_TEST(dynamic_shift_follows_the_number_of_tokens) {
    rf_scheduler_config c = flow_config(1);
    c.dynamic_shifting = true;
    static const struct {
        int64_t tokens;
        double mu;
    } known[] = {{256, .5}, {4096, 1.15}, {1024, .63}};
    for (size_t k = 0; k < sizeof known / sizeof *known; k++) {
        rf_sampler_options o = {.kind = RF_SAMPLER_COUNT, .num_steps = 4, .num_tokens = known[k].tokens};
        o.flow_sigmas_per_steps = true; /* FLUX: 1, .75, .5, .25 before the shift */
        rf_sampler_plan plan = make_plan(&c, o);
        for (int i = 0; i < 4; i++) {
            double sigma = 1 - .25 * i, e = exp(known[k].mu);
            ck_assert_double_eq_tol(-(double)plan.coefs[i].x0_out, e / (e + 1 / sigma - 1), 1e-6);
        }
        rf_sampler_plan_free(&plan);
    }
}
END_TEST

/* ---- properties ---- */

/* A model that knows the answer leads every deterministic solver to it, whatever the number of steps. */
START_TEST(weights_are_exact_when_the_prediction_of_x0_is_constant) {
    static const rf_prediction predictions[] = {RF_PREDICTION_EPSILON, RF_PREDICTION_V, RF_PREDICTION_SAMPLE,
                                                RF_PREDICTION_FLOW};
    static const int step_counts[] = {1, 2, 5, 14, 15, 40};
    for (int kind = 0; kind < RF_SAMPLER_COUNT; kind++) {
        if (kind == RF_SAMPLER_DDPM || kind == RF_SAMPLER_DPMPP_2M_SDE) continue;
        for (size_t p = 0; p < 4; p++) {
            if ((kind == RF_SAMPLER_FLOW_EULER) != (predictions[p] == RF_PREDICTION_FLOW)) continue;
            for (int spacing = 0; spacing < 3; spacing++) {
                for (size_t n = 0; n < sizeof step_counts / sizeof *step_counts; n++) {
                    /* DDIM steps by 1000 / n, so with another n trailing timesteps end above 0, as in the reference */
                    if (kind == RF_SAMPLER_DDIM && 1000 % step_counts[n] != 0) continue;
                    rf_scheduler_config c =
                        kind == RF_SAMPLER_FLOW_EULER ? flow_config(3) : rf_scheduler_config_default();
                    c.prediction = predictions[p];
                    c.spacing = (rf_spacing)spacing;
                    rf_sampler_plan plan =
                        make_plan(&c, (rf_sampler_options){.kind = (rf_sampler_kind)kind, .num_steps = step_counts[n]});
                    float x0 = 0.7f;
                    double x = (double)plan.init_scale * 1.3, x0_prev = 0;
                    for (int i = 0; i < plan.num_steps; i++) {
                        const rf_sampler_coefs *row = &plan.coefs[i];
                        double out =
                            ((double)x0 - (double)row->x0_x * x) / (double)row->x0_out; /* so that x0 comes out */
                        x = (double)row->x * x + (double)row->x0 * (double)x0 + (double)row->x0_prev * x0_prev +
                            (double)row->out * out;
                        x0_prev = (double)x0;
                    }
                    ck_assert_msg(fabs(x - (double)x0) < 2e-4, "%s, prediction %d, spacing %d, %d steps: ends at %g",
                                  rf_sampler_kind_name((rf_sampler_kind)kind), predictions[p], spacing, plan.num_steps,
                                  x);
                    rf_sampler_plan_free(&plan);
                }
            }
        }
    }
}
END_TEST

START_TEST(ddim_with_eta_1_is_ddpm_fixed_small) {
    rf_scheduler_config c = rf_scheduler_config_default();
    rf_sampler_plan a = make_plan(&c, (rf_sampler_options){.kind = RF_SAMPLER_DDIM, .num_steps = 50, .eta = 1});
    rf_sampler_plan b = make_plan(&c, (rf_sampler_options){.kind = RF_SAMPLER_DDPM, .num_steps = 50});
    for (int i = 0; i < 50; i++) {
        const rf_sampler_coefs *p = &a.coefs[i], *q = &b.coefs[i];
        ck_assert_float_eq(p->timestep, q->timestep);
        ck_assert_double_eq_tol((double)p->noise, (double)q->noise, 1e-6);
        /* both as a sum over x and the model's output */
        double px = (double)p->x + (double)p->x0 * (double)p->x0_x, qx = (double)q->x + (double)q->x0 * (double)q->x0_x;
        double po = (double)p->out + (double)p->x0 * (double)p->x0_out;
        double qo = (double)q->out + (double)q->x0 * (double)q->x0_out;
        ck_assert_double_eq_tol(px / qx, 1, 2e-5);
        ck_assert_double_eq_tol(po, qo, 2e-5);
    }
    rf_sampler_plan_free(&a);
    rf_sampler_plan_free(&b);
}
END_TEST

START_TEST(any_number_of_steps_gives_finite_rows) {
    for (int kind = 0; kind < RF_SAMPLER_COUNT; kind++) {
        for (int spacing = 0; spacing < 3; spacing++) {
            for (int sigmas = 0; sigmas < 2; sigmas++) {
                for (int num = 1; num <= 1000; num += num < 60 ? 1 : 47) {
                    rf_scheduler_config c =
                        kind == RF_SAMPLER_FLOW_EULER ? flow_config(3) : rf_scheduler_config_default();
                    c.spacing = (rf_spacing)spacing;
                    c.final_sigma_zero = num % 2;
                    rf_sampler_options o = {
                        .kind = (rf_sampler_kind)kind, .num_steps = num, .sigmas = (rf_sigmas)sigmas};
                    rf_sampler_plan plan;
                    rf_error err = {0};
                    rf_status st = rf_sampler_plan_make(&plan, &c, &o, false, &err);
                    if (st != RF_OK) {
                        ck_assert_int_eq(st, RF_ERR_ARGUMENT);
                        continue;
                    }
                    ck_assert_int_eq(plan.num_steps, num);
                    for (int i = 0; i < num; i++) {
                        const float *row = (const float *)&plan.coefs[i];
                        for (size_t k = 0; k < sizeof *plan.coefs / sizeof *row; k++) { /* an assertion each is slow */
                            if (isfinite(row[k])) continue;
                            ck_abort_msg("%s, spacing %d, %d steps, step %d, column %zu: %g",
                                         rf_sampler_kind_name((rf_sampler_kind)kind), spacing, num, i, k,
                                         (double)row[k]);
                        }
                        if (i > 0 && plan.coefs[i].timestep > plan.coefs[i - 1].timestep)
                            ck_abort_msg("timesteps rise");
                    }
                    rf_sampler_plan_free(&plan);
                }
            }
        }
    }
}
END_TEST

START_TEST(another_sampler_keeps_the_files_levels) {
    rf_error err = {0};
    rf_scheduler_config c;
    rf_assert_ok(read_config_text(&c,
                                  "{\"_class_name\":\"DDIMScheduler\",\"beta_schedule\":\"scaled_linear\","
                                  "\"beta_start\":0.00085,\"beta_end\":0.012,\"prediction_type\":\"v_prediction\","
                                  "\"timestep_spacing\":\"trailing\"}",
                                  &err),
                 err);
    ck_assert(c.clip_sample); /* the class's default */
    rf_sampler_plan plan = make_plan(&c, (rf_sampler_options){.kind = RF_SAMPLER_DPMPP_2M, .num_steps = 20});
    ck_assert_float_eq(plan.coefs[0].timestep, 999);
    ck_assert_float_eq(plan.coefs[19].timestep, 49);
    ck_assert_float_eq(plan.coefs[0].clip, 0); /* this solver has no clipping */
    ck_assert_double_eq_tol(pow((double)plan.coefs[0].x0_x, 2) + pow((double)plan.coefs[0].x0_out, 2), 1, 1e-6); /* v */
    rf_sampler_plan_free(&plan);
}
END_TEST

/* ---- refusals ---- */

START_TEST(options_out_of_range_are_refused) {
    static const struct {
        rf_sampler_options options;
        const char *part;
    } cases[] = {
        {{.kind = RF_SAMPLER_DDIM, .num_steps = 0}, "0 steps"},
        {{.kind = RF_SAMPLER_DDIM, .num_steps = -1}, "-1 steps"},
        {{.kind = RF_SAMPLER_DDIM, .num_steps = 100001}, "1..10000"},
        {{.kind = RF_SAMPLER_DDIM, .num_steps = 1001}, "trained on 1000"},
        {{.kind = RF_SAMPLER_DDPM, .num_steps = 1001}, "trained on 1000"},
        {{.kind = RF_SAMPLER_DPMPP_2M, .num_steps = 1000}, "leading spacing"},
        {{.kind = RF_SAMPLER_DDIM, .num_steps = 5, .eta = 1.5}, "eta"},
        {{.kind = RF_SAMPLER_DDIM, .num_steps = 5, .eta = NAN}, "eta"},
        {{.kind = RF_SAMPLER_EULER, .num_steps = 5, .eta = 0.5}, "euler has none"},
        {{.kind = RF_SAMPLER_DDIM, .num_steps = 5, .sigmas = RF_SIGMAS_KARRAS}, "karras"},
        {{.kind = RF_SAMPLER_DDIM, .num_steps = 5, .mu = 1}, "dynamic shifting"},
        {{.kind = RF_SAMPLER_FLOW_EULER, .num_steps = 5}, "predicts epsilon"},
        {{.kind = (rf_sampler_kind)99, .num_steps = 5}, "kind 99"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        rf_scheduler_config c = rf_scheduler_config_default();
        rf_sampler_plan plan;
        rf_error err = {0};
        rf_assert_fails(rf_sampler_plan_make(&plan, &c, &cases[i].options, false, &err), err, RF_ERR_ARGUMENT,
                        cases[i].part);
        ck_assert_ptr_null(plan.coefs);
    }
    rf_scheduler_config c = flow_config(1);
    rf_sampler_plan plan;
    rf_error err = {0};
    rf_sampler_options o = {.kind = RF_SAMPLER_DDIM, .num_steps = 5};
    rf_assert_fails(rf_sampler_plan_make(&plan, &c, &o, false, &err), err, RF_ERR_ARGUMENT, "flow-euler can");
    c.dynamic_shifting = true;
    o.kind = RF_SAMPLER_COUNT;
    rf_assert_fails(rf_sampler_plan_make(&plan, &c, &o, false, &err), err, RF_ERR_ARGUMENT, "tokens");

    c = rf_scheduler_config_default();
    c.kind = RF_SAMPLER_DDPM;
    c.variance = RF_VARIANCE_LEARNED_RANGE;
    o.kind = RF_SAMPLER_COUNT;
    rf_assert_fails(rf_sampler_plan_make(&plan, &c, &o, false, &err), err, RF_ERR_CONFIG, "variance channels");
    c.steps_offset = 1;
    c.variance = RF_VARIANCE_FIXED_SMALL;
    o.num_steps = 1000;
    rf_assert_fails(rf_sampler_plan_make(&plan, &c, &o, false, &err), err, RF_ERR_ARGUMENT, "steps_offset 1");
}
END_TEST

START_TEST(configs_that_ask_for_more_are_refused_by_key) {
    static const struct {
        const char *text;
        rf_status status;
        const char *part;
    } cases[] = {
        {"[]", RF_ERR_CONFIG, "object"},
        {"{}", RF_ERR_MISSING, "_class_name"},
        {"{\"_class_name\":\"PNDMScheduler\"}", RF_ERR_UNSUPPORTED, "PNDMScheduler"},
        {"{\"_class_name\":\"PNDMScheduler\"}", RF_ERR_UNSUPPORTED, "EulerDiscreteScheduler"},
        {"{\"_class_name\":\"DDIMScheduler\",\"prediction_type\":\"noise\"}", RF_ERR_UNSUPPORTED, "noise"},
        {"{\"_class_name\":\"DDIMScheduler\",\"beta_schedule\":\"sigmoid\"}", RF_ERR_UNSUPPORTED, "sigmoid"},
        {"{\"_class_name\":\"DDIMScheduler\",\"thresholding\":true}", RF_ERR_UNSUPPORTED, "thresholding"},
        {"{\"_class_name\":\"DDIMScheduler\",\"trained_betas\":[0.1]}", RF_ERR_UNSUPPORTED, "trained_betas"},
        {"{\"_class_name\":\"DDIMScheduler\",\"num_train_timesteps\":0}", RF_ERR_CONFIG, "num_train_timesteps"},
        {"{\"_class_name\":\"DDIMScheduler\",\"num_train_timesteps\":\"x\"}", RF_ERR_CONFIG, "num_train_timesteps"},
        {"{\"_class_name\":\"DDIMScheduler\",\"beta_start\":0.5}", RF_ERR_CONFIG, "beta_end"},
        {"{\"_class_name\":\"DDIMScheduler\",\"rescale_betas_zero_snr\":true}", RF_ERR_UNSUPPORTED, "zero_snr"},
        {"{\"_class_name\":\"DDPMScheduler\",\"variance_type\":\"fixed_large_log\"}", RF_ERR_UNSUPPORTED, "large_log"},
        {"{\"_class_name\":\"DPMSolverMultistepScheduler\",\"solver_order\":3}", RF_ERR_UNSUPPORTED, "solver_order 3"},
        {"{\"_class_name\":\"DPMSolverMultistepScheduler\",\"solver_type\":\"heun\"}", RF_ERR_UNSUPPORTED, "heun"},
        {"{\"_class_name\":\"DPMSolverMultistepScheduler\",\"algorithm_type\":\"dpmsolver\"}", RF_ERR_UNSUPPORTED,
         "algorithm_type"},
        {"{\"_class_name\":\"DPMSolverMultistepScheduler\",\"use_beta_sigmas\":true}", RF_ERR_UNSUPPORTED,
         "beta_sigmas"},
        {"{\"_class_name\":\"EulerDiscreteScheduler\",\"sigma_max\":14.6}", RF_ERR_UNSUPPORTED, "sigma_max"},
        {"{\"_class_name\":\"EulerDiscreteScheduler\",\"interpolation_type\":\"log_linear\"}", RF_ERR_UNSUPPORTED,
         "log_linear"},
        {"{\"_class_name\":\"FlowMatchEulerDiscreteScheduler\",\"shift\":0}", RF_ERR_CONFIG, "shift"},
        {"{\"_class_name\":\"FlowMatchEulerDiscreteScheduler\",\"shift_terminal\":0.1}", RF_ERR_UNSUPPORTED,
         "shift_terminal"},
        {"{\"_class_name\":\"FlowMatchEulerDiscreteScheduler\",\"max_image_seq_len\":256}", RF_ERR_CONFIG,
         "max_image_seq_len"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        rf_scheduler_config c;
        rf_error err = {0};
        rf_assert_fails(read_config_text(&c, cases[i].text, &err), err, cases[i].status, cases[i].part);
    }
}
END_TEST

START_TEST(betas_that_leave_no_signal_are_refused) {
    rf_scheduler_config c = rf_scheduler_config_default();
    c.beta_end = 0.9;
    rf_sampler_plan plan;
    rf_error err = {0};
    rf_sampler_options o = {.kind = RF_SAMPLER_COUNT, .num_steps = 5};
    rf_assert_fails(rf_sampler_plan_make(&plan, &c, &o, false, &err), err, RF_ERR_CONFIG, "alpha-bar");
}
END_TEST

START_TEST(every_failed_allocation_is_reported) {
    for (int kind = 0; kind < RF_SAMPLER_COUNT; kind++) {
        rf_scheduler_config c = kind == RF_SAMPLER_FLOW_EULER ? flow_config(1) : rf_scheduler_config_default();
        rf_sampler_options o = {.kind = (rf_sampler_kind)kind, .num_steps = 5};
        uint64_t live = rf_memory_get_counts().num_live;
        for (uint64_t n = 1; n < 100; n++) {
            rf_sampler_plan plan;
            rf_error err = {0};
            rf_memory_fail_nth(n);
            rf_status st = rf_sampler_plan_make(&plan, &c, &o, false, &err);
            rf_memory_fail_nth(0);
            if (st == RF_OK) {
                ck_assert_uint_gt(n, 2);
                rf_sampler_plan_free(&plan);
                n = 100;
            } else {
                ck_assert_int_eq(st, RF_ERR_MEMORY);
            }
            ck_assert_uint_eq(rf_memory_get_counts().num_live, live);
        }
    }
}
END_TEST

START_TEST(names_of_samplers_go_both_ways) {
    for (int i = 0; i < RF_SAMPLER_COUNT; i++) {
        rf_sampler_kind kind;
        ck_assert(rf_sampler_kind_from_name(rf_sampler_kind_name((rf_sampler_kind)i), &kind));
        ck_assert_int_eq(kind, i);
    }
    rf_sampler_kind kind;
    ck_assert(!rf_sampler_kind_from_name("plms", &kind));
}
END_TEST

int main(void) {
    Suite *suite = suite_create("sampler");
    TCase *reference = tcase_create("reference");
    tcase_add_test(reference, every_fixture_case_follows_the_reference_trajectory);
    tcase_add_test(reference, config_files_of_the_reference_are_read);
    TCase *values = tcase_create("check values");
    tcase_add_test(values, linear_betas_give_the_known_alpha_bars);
    tcase_add_test(values, known_timesteps_of_the_model_families);
    tcase_add_test(values, sd3_flow_schedule_is_shifted_twice_at_its_end);
    tcase_add_test(values, dynamic_shift_follows_the_number_of_tokens);
    TCase *properties = tcase_create("properties");
    tcase_add_test(properties, weights_are_exact_when_the_prediction_of_x0_is_constant);
    tcase_add_test(properties, ddim_with_eta_1_is_ddpm_fixed_small);
    tcase_add_test(properties, any_number_of_steps_gives_finite_rows);
    tcase_add_test(properties, another_sampler_keeps_the_files_levels);
    tcase_add_test(properties, names_of_samplers_go_both_ways);
    TCase *refusals = tcase_create("refusals");
    tcase_add_test(refusals, options_out_of_range_are_refused);
    tcase_add_test(refusals, configs_that_ask_for_more_are_refused_by_key);
    tcase_add_test(refusals, betas_that_leave_no_signal_are_refused);
    tcase_add_test(refusals, every_failed_allocation_is_reported);
    TCase *cases[] = {reference, values, properties, refusals};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        tcase_set_timeout(cases[i], 60);
        suite_add_tcase(suite, cases[i]);
    }
    return rf_run_suite(suite);
}
