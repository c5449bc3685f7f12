/* dit/schedule.c - training tables, timestep spacings, Karras and flow sigmas.
 *
 * Source   Spacings: Lin et al. 2023, arXiv 2305.08891, table 2; Karras et al. 2022, arXiv 2206.00364, eq. 5 with rho 7.
 * Pitfalls - rounding is half to even (rint), as numpy's;
 *          - numpy's arange with a float step can give one value too many: the count is bounded by the steps asked for;
 *          - "leading" divides by num_steps in DDPM, DDIM and Euler, but by num_steps + 1 in DPM-Solver++;
 *          - SD3's flow schedule is shifted twice at its end (its smallest sigma already carries the shift). */
#include "dit/schedule.h"

#include <math.h>
#include <string.h>

#include "core/memory.h"

#define KARRAS_RHO 7.0

/* ---- training table ---- */

static double cosine_alpha_bar(double t) {
    double c = cos((t + 0.008) / 1.008 * M_PI / 2);
    return c * c;
}

static float beta_at(const rf_scheduler_config *c, int i) {
    int num = c->num_train_timesteps;
    if (c->beta_schedule == RF_BETA_SQUAREDCOS_CAP_V2) {
        double beta = 1 - cosine_alpha_bar((i + 1) / (double)num) / cosine_alpha_bar(i / (double)num);
        return (float)(beta < 0.999 ? beta : 0.999);
    }
    bool scaled = c->beta_schedule == RF_BETA_SCALED_LINEAR;
    float first = (float)(scaled ? sqrt(c->beta_start) : c->beta_start);
    float last = (float)(scaled ? sqrt(c->beta_end) : c->beta_end);
    float gap = num > 1 ? (last - first) / (float)(num - 1) : 0;
    float v = i < num / 2 || num == 1 ? first + gap * (float)i : last - gap * (float)(num - 1 - i); /* from both ends */
    return scaled ? v * v : v;
}

static rf_status make_alpha_bar(rf_schedule *s, const rf_scheduler_config *c, rf_error *err) {
    s->alpha_bar = rf_alloc((size_t)s->num_train * sizeof *s->alpha_bar);
    if (!s->alpha_bar) return rf_fail(err, RF_ERR_MEMORY, "schedule: no memory for %d noise levels", s->num_train);
    double product = 1;
    for (int i = 0; i < s->num_train; i++) {
        product *= (double)(1.0f - beta_at(c, i));
        s->alpha_bar[i] = (float)product;
    }
    /* every solver divides by alpha-bar and by 1 - alpha-bar */
    if (!(s->alpha_bar[0] < 1) || !(s->alpha_bar[s->num_train - 1] > 0)) {
        return rf_fail(err, RF_ERR_CONFIG,
                       "scheduler: betas %g..%g over %d timesteps give alpha-bar %g..%g, which must stay inside (0, 1)",
                       c->beta_start, c->beta_end, s->num_train, (double)s->alpha_bar[0],
                       (double)s->alpha_bar[s->num_train - 1]);
    }
    return RF_OK;
}

static float table_sigma(const rf_schedule *s, int t) {
    float ab = s->alpha_bar[t];
    return sqrtf((1.0f - ab) / ab);
}

/* Linear between whole timesteps, constant outside. */
static double sigma_at(const rf_schedule *s, double t) {
    if (t <= 0) return table_sigma(s, 0);
    if (t >= s->num_train - 1) return table_sigma(s, s->num_train - 1);
    int low = (int)t;
    double a = table_sigma(s, low);
    if (t == low) return a;
    return a + (t - low) * ((double)table_sigma(s, low + 1) - a);
}

/* The timestep whose log sigma this is, linear between whole timesteps. */
static double timestep_of(const rf_schedule *s, double sigma) {
    double log_sigma = log(fmax(sigma, 1e-10));
    int low = 0, high = s->num_train - 1; /* largest low with log sigma(low) <= log_sigma; the table rises */
    while (low < high) {
        int mid = low + (high - low + 1) / 2;
        if ((double)logf(table_sigma(s, mid)) <= log_sigma)
            low = mid;
        else
            high = mid - 1;
    }
    if (s->num_train == 1) return 0;
    if (low > s->num_train - 2) low = s->num_train - 2;
    float log_low = logf(table_sigma(s, low)), log_high = logf(table_sigma(s, low + 1));
    double w = ((double)log_low - log_sigma) / (double)(log_low - log_high);
    w = fmin(fmax(w, 0), 1);
    return (1 - w) * low + w * (low + 1);
}

/* ---- spacings ---- */

/* numpy's linspace(first, last, num)[i]. */
static double linspace_at(double first, double last, int num, int i) {
    if (i == 0) return first;
    if (i == num - 1) return last;
    return first + i * ((last - first) / (num - 1));
}

/* The timesteps of a spacing, falling. `levels` of the table are in use (fewer than num_train if the noisiest are clipped).
 * whole: rounded (all but Euler's linspace). skip_zero: DPM-Solver++ places num_steps + 1 points and leaves the last, 0, out. */
static rf_status space_timesteps(rf_schedule *s, const rf_scheduler_config *c, int levels, bool whole, bool skip_zero,
                                 rf_error *err) {
    int num = s->num_steps, points = num + (skip_zero ? 1 : 0);
    if (c->spacing == RF_SPACING_LINSPACE) {
        for (int i = 0; i < num; i++) {
            double t = linspace_at(0, levels - 1, points, points - 1 - i);
            s->timesteps[i] = whole ? rint(t) : (double)(float)t;
        }
    } else if (c->spacing == RF_SPACING_LEADING) {
        int gap = levels / points;
        if (gap < 1) {
            return rf_fail(err, RF_ERR_ARGUMENT, "sampler: %d steps of leading spacing do not fit in %d timesteps", num,
                           levels);
        }
        for (int i = 0; i < num; i++) s->timesteps[i] = (double)(points - 1 - i) * gap + c->steps_offset;
    } else {
        double gap = (double)s->num_train / num, delta = (levels - gap) - levels;
        double count = ceil(levels / gap);
        if (count < num) s->num_steps = num = (int)count;
        for (int i = 0; i < num; i++) s->timesteps[i] = rint(levels + i * delta) - 1;
    }
    for (int i = 0; i < num; i++) {
        if (s->timesteps[i] < 0 || s->timesteps[i] > s->num_train - 1) {
            return rf_fail(err, RF_ERR_ARGUMENT,
                           "sampler: step %d of %d is timestep %g (steps_offset %d), outside 0..%d", i, num,
                           s->timesteps[i], c->steps_offset, s->num_train - 1);
        }
    }
    return RF_OK;
}

static void karras_sigmas(rf_schedule *s, double sigma_max, double sigma_min) {
    double high = pow(sigma_max, 1 / KARRAS_RHO), low = pow(sigma_min, 1 / KARRAS_RHO);
    for (int i = 0; i < s->num_steps; i++) {
        double ramp = linspace_at(0, 1, s->num_steps, i);
        s->sigmas[i] = pow(high + ramp * (low - high), KARRAS_RHO);
    }
}

/* ---- one function per kind of schedule ---- */

static rf_status dpm_schedule(rf_schedule *s, const rf_scheduler_config *c, const rf_sampler_options *o,
                              rf_error *err) {
    if (o->sigmas == RF_SIGMAS_KARRAS) {
        karras_sigmas(s, table_sigma(s, s->num_train - 1), table_sigma(s, 0));
        for (int i = 0; i < s->num_steps; i++) {
            double t = timestep_of(s, s->sigmas[i]);
            s->timesteps[i] = c->beta_schedule == RF_BETA_SQUAREDCOS_CAP_V2 ? trunc(t) : rint(t);
        }
    } else {
        int levels = s->num_train; /* those with lambda = log(sqrt(ab)) - log(sqrt(1-ab)) of at least the bound */
        while (levels > 0) {
            float ab = s->alpha_bar[levels - 1];
            if ((double)(logf(sqrtf(ab)) - logf(sqrtf(1.0f - ab))) >= c->lambda_min_clipped) break;
            levels--;
        }
        if (levels < 1) {
            return rf_fail(err, RF_ERR_CONFIG, "scheduler: lambda_min_clipped %g leaves no timestep",
                           c->lambda_min_clipped);
        }
        rf_status st = space_timesteps(s, c, levels, true, true, err);
        if (st != RF_OK) return st;
        for (int i = 0; i < s->num_steps; i++) s->sigmas[i] = sigma_at(s, s->timesteps[i]);
    }
    s->sigmas[s->num_steps] = c->final_sigma_zero ? 0 : (double)table_sigma(s, 0);
    return RF_OK;
}

static rf_status euler_schedule(rf_schedule *s, const rf_scheduler_config *c, const rf_sampler_options *o,
                                rf_error *err) {
    rf_status st = space_timesteps(s, c, s->num_train, c->spacing != RF_SPACING_LINSPACE, false, err);
    if (st != RF_OK) return st;
    for (int i = 0; i < s->num_steps; i++) s->sigmas[i] = sigma_at(s, s->timesteps[i]);
    if (o->sigmas == RF_SIGMAS_KARRAS) {
        karras_sigmas(s, s->sigmas[0], s->sigmas[s->num_steps - 1]); /* between the spacing's ends, not the table's */
        for (int i = 0; i < s->num_steps; i++) s->timesteps[i] = (double)(float)timestep_of(s, s->sigmas[i]);
    }
    s->sigmas[s->num_steps] = c->final_sigma_zero ? 0 : (double)table_sigma(s, 0);
    return RF_OK;
}

static rf_status flow_schedule(rf_schedule *s, const rf_scheduler_config *c, const rf_sampler_options *o,
                               rf_error *err) {
    double mu = o->mu;
    if (c->dynamic_shifting && mu == 0) {
        if (o->num_tokens < 1) {
            return rf_fail(err, RF_ERR_ARGUMENT, "sampler: dynamic shifting needs the number of image tokens, got %lld",
                           (long long)o->num_tokens);
        }
        double slope = (c->max_shift - c->base_shift) / (c->max_seq_len - c->base_seq_len);
        mu = (double)o->num_tokens * slope + (c->base_shift - slope * c->base_seq_len);
    }
    double num_train = s->num_train;
    float first = 1, last = 1.0f / (float)s->num_train;
    if (!c->dynamic_shifting) {
        float shift = (float)c->shift;
        last = shift * last / (1.0f + (shift - 1.0f) * last);
        first = shift / (1.0f + (shift - 1.0f));
    }
    for (int i = 0; i < s->num_steps; i++) {
        double sigma;
        if (o->flow_sigmas_per_steps)
            sigma = (double)(float)linspace_at(1, 1.0 / s->num_steps, s->num_steps, i);
        else
            sigma = linspace_at(first * num_train, last * num_train, s->num_steps, i) / num_train;
        if (c->dynamic_shifting)
            sigma = exp(mu) / (exp(mu) + (1 / sigma - 1));
        else
            sigma = c->shift * sigma / (1 + (c->shift - 1) * sigma);
        s->sigmas[i] = sigma;
        s->timesteps[i] = (double)((float)sigma * (float)s->num_train);
    }
    s->sigmas[s->num_steps] = 0;
    return RF_OK;
}

rf_status rf_schedule_make(rf_schedule *out, const rf_scheduler_config *config, const rf_sampler_options *options,
                           rf_error *err) {
    *out = (rf_schedule){.num_train = config->num_train_timesteps, .num_steps = options->num_steps};
    rf_sampler_kind kind = options->kind;
    bool has_sigmas = kind != RF_SAMPLER_DDPM && kind != RF_SAMPLER_DDIM;
    bool whole = !has_sigmas || (kind != RF_SAMPLER_FLOW_EULER && options->sigmas != RF_SIGMAS_KARRAS &&
                                 !(kind == RF_SAMPLER_EULER && config->spacing == RF_SPACING_LINSPACE));
    if (whole && out->num_steps > out->num_train) {
        return rf_fail(err, RF_ERR_ARGUMENT, "sampler: %d steps of %s, but the model was trained on %d timesteps",
                       out->num_steps, rf_sampler_kind_name(kind), out->num_train);
    }

    size_t num = (size_t)out->num_steps;
    rf_status st = RF_OK;
    out->timesteps = rf_alloc_zero(num, sizeof *out->timesteps);
    if (has_sigmas) out->sigmas = rf_alloc_zero(num + 1, sizeof *out->sigmas);
    if (!out->timesteps || (has_sigmas && !out->sigmas)) {
        st = rf_fail(err, RF_ERR_MEMORY, "schedule: no memory for %d steps", out->num_steps);
    }
    if (st == RF_OK && kind != RF_SAMPLER_FLOW_EULER) st = make_alpha_bar(out, config, err);
    if (st == RF_OK) {
        switch (kind) {
        case RF_SAMPLER_DPMPP_2M:
        case RF_SAMPLER_DPMPP_2M_SDE: st = dpm_schedule(out, config, options, err); break;
        case RF_SAMPLER_EULER: st = euler_schedule(out, config, options, err); break;
        case RF_SAMPLER_FLOW_EULER: st = flow_schedule(out, config, options, err); break;
        default: st = space_timesteps(out, config, out->num_train, true, false, err); break;
        }
    }
    if (st != RF_OK) {
        rf_schedule_free(out);
        return st;
    }
    /* the references keep sigmas in f32 */
    for (int i = 0; out->sigmas && i <= out->num_steps; i++) out->sigmas[i] = (double)(float)out->sigmas[i];
    return RF_OK;
}

void rf_schedule_free(rf_schedule *schedule) {
    rf_free(schedule->alpha_bar);
    rf_free(schedule->timesteps);
    rf_free(schedule->sigmas);
    *schedule = (rf_schedule){0};
}
