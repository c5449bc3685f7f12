/* caching/features/adacache.c - AdaCache: adaptive caching for faster video generation, arXiv 2411.02397.
 *
 * After a FULL step s, with s' the one before, c = (mean |r_s - r_s'| / mean |r_s'|) / (s - s') is the rate of change
 * of the cached residual; a codebook of pairs c:interval in rising c gives the steps until the next FULL one: the
 * interval of the first pair with c <= its c, of the last pair above all of them. Between, x_out = x_in + r_s.
 * The paper caches every module's output after its gate and reuses all of them together; their sum is the residual of
 * the stack, so that is what is kept and measured here (the paper measures at one or a few blocks). Its motion term
 * (MoReg, video) is not here.
 *
 * Order of tests: s < first FULL; last step FULL (if `last`); fewer than 2 FULL steps FULL; s - s_F >= interval FULL;
 * else SKIP. The branch that changes more decides for both. One read-back for each FULL step, at the step after it.
 * codebook=1:1 never skips. Carried: step 0 takes the carried residual; after that the rule, with no first steps. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "caching/features/features.h"
#include "caching/features/schedule.h"
#include "core/memory.h"

enum { CODEBOOK, FIRST, LAST, NUM_OPTIONS };

#define MAX_PAIRS    32
#define MAX_INTERVAL 1000

static const rf_policy_option options[NUM_OPTIONS] = {
    [CODEBOOK] =
        {"codebook", RF_OPTION_TEXT, "slow", 0, 0, NULL,
         "change:interval pairs in rising order, as 0.08:3/0.16:2/1:1 (slow); or slow, fast (both for about 30 steps), "
         "long (for 100); 1:1 never skips"},
    [FIRST] = {"first", RF_OPTION_INT, "2", 1, 1000, NULL, "steps computed at the start"},
    [LAST] = {"last", RF_OPTION_BOOL, "true", 0, 1, NULL, "the last step is always computed"},
};

static const struct {
    const char *name, *pairs;
} books[] = {
    {"slow", "0.08:3/0.16:2/1:1"},
    {"fast", "0.08:6/0.16:5/0.24:4/0.32:3/0.40:2/1:1"},
    {"long", "0.03:12/0.05:10/0.07:8/0.09:6/0.11:4/1:3"},
};

/* layout.tables */
typedef struct {
    int num;
    double change[MAX_PAIRS];
    int interval[MAX_PAIRS];
    bool never_skips;
} codebook;

typedef struct {
    int rated; /* 1 + the FULL step that `interval` and `change` belong to */
    int interval;
    double change;
} ada_state;

static rf_status parse(const char *text, codebook *book, rf_error *err) {
    for (size_t i = 0; i < sizeof books / sizeof books[0]; i++) {
        if (strcmp(text, books[i].name) == 0) text = books[i].pairs;
    }
    book->num = 0;
    book->never_skips = true;
    for (const char *at = text;;) {
        char *end;
        double change = strtod(at, &end);
        bool good = end != at && *end == ':' && isfinite(change) && change >= 0 && book->num < MAX_PAIRS &&
                    (book->num == 0 || change > book->change[book->num - 1]);
        long interval = 0;
        if (good) {
            at = end + 1;
            interval = strtol(at, &end, 10);
            good = end != at && (*end == 0 || *end == '/') && interval >= 1 && interval <= MAX_INTERVAL;
        }
        if (!good) {
            return rf_fail(err, RF_ERR_ARGUMENT,
                           "policy adacache: codebook='%.80s' is none of slow, fast, long, and up to %d pairs "
                           "change:interval in rising order of change with intervals 1..%d, as 0.08:3/0.16:2/1:1",
                           text, MAX_PAIRS, MAX_INTERVAL);
        }
        book->change[book->num] = change;
        book->interval[book->num++] = (int)interval;
        book->never_skips &= interval == 1;
        if (*end == 0) return RF_OK;
        at = end + 1;
    }
}

static rf_status setup(const rf_policy *policy, const rf_cache_shape *shape, rf_cache_layout *layout, rf_error *err) {
    codebook book;
    rf_status st = parse(rf_policy_text(policy, CODEBOOK), &book, err);
    if (st == RF_OK && !book.never_skips) {
        int first = (int)rf_policy_int(policy, FIRST);
        int min_steps = (first > 2 ? first : 2) + rf_policy_bool(policy, LAST) + 1;
        st = rf_policy_refuse_stochastic(policy, shape, err);
        if (st == RF_OK) st = rf_policy_refuse_few_steps(policy, shape, rf_schedule_min_steps(min_steps), err);
    }
    if (st != RF_OK) return st;
    codebook *kept = rf_alloc(sizeof *kept);
    if (!kept) return rf_fail(err, RF_ERR_MEMORY, "policy adacache: no memory for its codebook");
    *kept = book;
    layout->tables = kept;
    layout->signals = 1u << RF_SIGNAL_SPAN_REFRESH;
    rf_schedule_keep_last(shape, layout, 1);
    layout->spans[0].delta = true;
    return RF_OK;
}

static bool never_or_last(const rf_policy *policy, const rf_step_ctx *ctx) {
    const codebook *book = ctx->layout->tables;
    return ctx->force_full || book->never_skips || rf_ctx_warms_up(ctx, rf_policy_int(policy, FIRST)) ||
           (rf_policy_bool(policy, LAST) && ctx->step == ctx->shape->num_steps - 1);
}

/* Computed whatever the signal says. */
static bool is_fixed(const rf_policy *policy, const rf_step_ctx *ctx) {
    return ctx->num_stored < 2 || never_or_last(policy, ctx);
}

static bool wants_signals(const rf_policy *policy, const void *state, const rf_step_ctx *ctx) {
    const ada_state *s = state;
    return !is_fixed(policy, ctx) && s->rated != ctx->stored[0] + 1;
}

static void plan_step(const rf_policy *policy, void *state, const rf_step_ctx *ctx, rf_step_plan *plan) {
    const codebook *book = ctx->layout->tables;
    ada_state *s = state;
    bool full = !(rf_ctx_on_carried(ctx) && ctx->step == 0) || never_or_last(policy, ctx);
    rf_schedule_begin_plan(ctx, plan);
    if (!is_fixed(policy, ctx)) {
        if (s->rated != ctx->stored[0] + 1) {
            int at = 0;
            s->rated = ctx->stored[0] + 1;
            s->change = rf_ctx_max_rel1(ctx, RF_SIGNAL_SPAN_REFRESH) / (ctx->stored[0] - ctx->stored[1]);
            while (at < book->num - 1 && !(s->change <= book->change[at])) at++;
            s->interval = book->interval[at];
        }
        full = ctx->step - ctx->stored[0] >= s->interval;
        plan->statistic = s->change;
        plan->threshold = s->interval;
    }
    plan->kind = full ? RF_STEP_FULL : RF_STEP_SKIP;
    plan->produce = RF_PRODUCE_SPAN;
    if (ctx->num_stored > 0) plan->num_terms = rf_predict_reuse(plan->weights[0]);
}

const rf_policy_def rf_policy_adacache = {
    .name = "adacache",
    .family = "feature",
    .level = "step",
    .paper = "Adaptive Caching for Faster Video Generation with Diffusion Transformers, arXiv 2411.02397",
    .summary = "a codebook turns the rate of change of the residual into the steps until the next computed one",
    .fits = "every model; a solver that adds no noise, at 9 steps or more",
    .options = options,
    .num_options = NUM_OPTIONS,
    .carries = true,
    .state_bytes = sizeof(ada_state),
    .setup = setup,
    .wants_signals = wants_signals,
    .plan = plan_step,
};
