/* caching/policy.h - what a caching policy is: rules on the host, for one image, with no model in sight.
 *
 * Two families have one list and one way to take options: feature policies of denoisers, which this file is about, and row policies of
 * diffusion language models (caching/rows/rows.h).
 *
 * Three things make a policy (rf_policy_def): options; `setup`, which looks at the shape of a run and declares what state the
 * runtime (caching/cache.h) must keep and what it must measure; and `plan`, which says once per denoising step what is
 * computed, reused or predicted. The runtime owns all state, moves all data and measures all signals; executors run plans.
 *
 * One policy state is one image. Its branches (conditional, unconditional) have state of their own but take one decision. A batch
 * is many states: images that plan the same are computed together, packed, so a batch gives image by image what single runs give.
 *
 *   FULL     every part of every block is computed; what the layout keeps is stored (pushed into the rings)
 *   SKIP     no block runs: the model's output (RF_PRODUCE_OUTPUT) or the hidden state after the last block (RF_PRODUCE_SPAN
 *            over all blocks) is predicted; SPAN still runs patch embedding and the final layer
 *   PARTIAL  a span of blocks is predicted, or parts are produced from their rings, or parts compute only some token rows
 *   PROBE    the first layout.probe_blocks blocks run, their signal is read, then plan_probe decides FULL, PARTIAL or SKIP
 *
 * Prediction is always sum_j w_j Y_j over stored snapshots, j by age (0 = newest), optionally with another row of weights for each
 * class of token rows (layout.num_classes), optionally added to the current input (delta: what is stored is output - input).
 * Gates and modulations always come from the current step: parts are stored before their gate.
 *
 * Carry. A rollout makes frame after frame, each a run. Where the session's options say so (caching/cache.h), a run begins with one
 * snapshot of the run before it, at a step below 0, and not with nothing; what that means to its rule is said in a policy's file (they
 * are those with `carries`). A warm-up is then over. The carried snapshot is history until the first FULL step of the run, and
 * is gone then: a difference between features of two frames, whose noise is not the same, is no derivative.
 * Source of this shape: the methods it has to express, see the head of each file in caching/features/. */
#ifndef RF_CACHING_POLICY_H
#define RF_CACHING_POLICY_H

#include "core/json.h"
#include "core/status.h"

#ifdef __cplusplus
extern "C" {
#endif

#define RF_CACHE_MAX_TERMS    64 /* snapshots of one ring */
#define RF_CACHE_MAX_CLASSES  3
#define RF_CACHE_MAX_HORIZON  16
#define RF_CACHE_MAX_SPANS    2
#define RF_CACHE_MAX_STREAMS  8
#define RF_POLICY_MAX_OPTIONS 24

/* --- options -------------------------------------------------------------------------------------------------------- */

typedef enum { RF_OPTION_INT = 0, RF_OPTION_DOUBLE, RF_OPTION_BOOL, RF_OPTION_CHOICE, RF_OPTION_TEXT } rf_option_type;

typedef struct {
    const char *name;
    rf_option_type type;
    const char *def;     /* the default, as a user would write it */
    double min, max;     /* INT, DOUBLE: both allowed */
    const char *choices; /* CHOICE: space-separated */
    const char *help;
} rf_policy_option;

typedef struct rf_policy rf_policy; /* a policy with its option values: plain data, shareable between sessions */

/* Names near to a wrong one are suggested. */
rf_status rf_policy_create(rf_policy **out, const char *name, rf_error *err);
void rf_policy_destroy(rf_policy *policy);           /* NULL is a no-op */
rf_policy *rf_policy_clone(const rf_policy *policy); /* NULL: out of memory */
/* "k=v,k2=v2" or "" ; an unknown key is RF_ERR_ARGUMENT and lists the valid ones; so is a value out of range. */
rf_status rf_policy_set(rf_policy *policy, const char *options, rf_error *err);
/* One option; value may hold commas. */
rf_status rf_policy_set_one(rf_policy *policy, const char *key, const char *value, rf_error *err);
/* All resolved options as "k=v,k2=v2" in table order. Returns the length needed, as snprintf. */
size_t rf_policy_describe(const rf_policy *policy, char *text, size_t text_bytes);

const struct rf_policy_def *rf_policy_get_def(const rf_policy *policy);
/* Values by index in the def's table. CHOICE gives the index in choices as int. */
int64_t rf_policy_int(const rf_policy *policy, int option);
double rf_policy_double(const rf_policy *policy, int option);
bool rf_policy_bool(const rf_policy *policy, int option);
const char *rf_policy_text(const rf_policy *policy, int option); /* TEXT and CHOICE, borrowed */
/* A value as text, in the form that set takes. */
size_t rf_policy_value_text(const rf_policy *policy, int option, char *text, size_t text_bytes);

/* --- the run, as a policy sees it ------------------------------------------------------------------------------------ */

/* SELF is attention among the rows of a run (of a frame, where a model is spatial and temporal by turns); TEMPORAL attention of a
 * row to the same place in earlier frames, whose keys and values stay as they are during a run. So any rows of a TEMPORAL part
 * can be computed without the others, as those of an MLP. */
typedef enum {
    RF_CACHE_SELF = 0,
    RF_CACHE_CROSS,
    RF_CACHE_MLP,
    RF_CACHE_PARALLEL,
    RF_CACHE_TEMPORAL,
    RF_CACHE_NUM_KINDS
} rf_cache_part_kind;
#define RF_CACHE_NO_PART 255

/* A stream (modality) of the output: these token rows, these of its columns. */
typedef struct {
    int64_t row_begin, row_end;
    int64_t col_begin, col_end; /* of pred_cols; 0, 0 = all */
} rf_cache_stream;

typedef struct {
    const char *model; /* for messages */
    int num_steps;
    const float *timesteps;   /* [num_steps] as the model is told, 0..1000 scale, step order (noisiest first) */
    const float *temb_change; /* [num_steps] rel1 of the timestep embedding against the step before; [0] = 0 */
    const char *sampler;
    bool stochastic;                        /* the solver adds noise inside the loop */
    bool force;                             /* the user insists: misfits are not refused */
    int64_t batch;                          /* images */
    int branches;                           /* 1 or 2 */
    int64_t tokens, frames, grid_h, grid_w; /* tokens = frames * grid_h * grid_w */
    int64_t width, in_cols, out_cols;       /* per token: hidden, model input, model output */
    /* the first columns of an output, which the solver uses (no variance half); = in_cols where deltas are kept */
    int64_t pred_cols;
    int num_blocks, num_parts; /* num_parts: most parts of a block */
    const uint8_t *part_kinds; /* [num_blocks * num_parts] rf_cache_part_kind or RF_CACHE_NO_PART */
    /* what has statistics of its own in the output; together every row and predicted column once. 0 = all is one stream */
    int num_streams;
    const rf_cache_stream *streams;
    /* the model's cache.json (measured tables, presets), or NULL; read it in setup only */
    const rf_json_value *calibration;
} rf_cache_shape;

/* --- what the runtime keeps and measures ------------------------------------------------------------------------------ */

/* A measured signal is 4 floats per branch, (sum |a-b|, sum |b|, sum (a-b)^2, sum b^2) unless said otherwise; b is the older. */
typedef enum {
    RF_SIGNAL_INPUT_STEP = 0, /* model input against the step before; at the start of every step; both branches alike */
    RF_SIGNAL_MODULATED_STEP, /* normed and modulated input of the first part of block 0 against the step before; likewise */
    RF_SIGNAL_INPUT_REFRESH, /* model input against that of the last stored step; measured by FULL steps, before storing */
    RF_SIGNAL_OUTPUT_REFRESH, /* first pred_cols columns of the output, likewise */
    RF_SIGNAL_OUTPUT_SIZE,    /* (sum |output|, 0, sum output^2, 0) of a FULL step, same columns */
    RF_SIGNAL_SPAN_REFRESH,   /* what span 0 stores, against the last stored; FULL steps */
    RF_SIGNAL_SPAN_NORMS, /* [0] = sum over token rows of |new row| / |last stored row| of span 0; FULL steps (MagCache) */
    RF_SIGNAL_PROBE,      /* residual of the probe's blocks against that of the last stored step; in PROBE steps */
    RF_SIGNAL_VERIFY, /* [0] = sum |x - xhat| / (|xhat| + 1e-10) after the last block, x computed; verify steps (SpeCa) */
    RF_SIGNAL_CURVATURE, /* layout.curvature; read through rf_ctx_drift, not as 4 floats; FULL steps with 3 snapshots */
    RF_SIGNAL_DRIFT,     /* prediction against computed value at a refresh; the runtime's own (drift guard) */
    RF_SIGNAL_COUNT
} rf_signal;

typedef struct {
    int begin, end; /* blocks [begin, end) */
    int depth;      /* snapshots kept; 0 = span not used */
    bool delta;     /* stores output - input of the span (else the output) */
} rf_cache_span;

/* Filled by setup; zeroed before. Device memory follows from it, and from nothing else. */
typedef struct {
    int output_depth;  /* ring of model outputs, f32; 0 = none */
    bool output_delta; /* stores output - model input (EasyCache) */
    rf_cache_span spans[RF_CACHE_MAX_SPANS];
    int part_depth[RF_CACHE_NUM_KINDS]; /* rings of part outputs before their gate, one for every part of that kind */
    int probe_blocks;                   /* > 0: PROBE steps exist; the probe's residual is kept (depth 1) */
    uint32_t signals;                   /* bits 1 << rf_signal that plan reads; DRIFT is added by the runtime */
    int num_classes;                    /* rows of weights; 0 and 1 = one; 3 with curvature */

    struct { /* WorldCache; needs output_depth 3. See kernels/cache.h */
        bool used, pooled, mean_over_all;
        bool timestep_gaps; /* gaps between snapshots are t[older] - t[newer] instead of steps */
        float p_stable, p_chaotic, eps, floor;
        int horizon;
        float step_a[RF_CACHE_MAX_HORIZON], step_b[RF_CACHE_MAX_HORIZON]; /* yhat(k) - yhat(k-1) = a_k v0 + b_k v1 */
    } curvature;

    /* Token rows; needs part_depth 1 for every kind whose parts are ever DO_ROWS or DO_PRODUCE, and blocks of one SELF part and an MLP
     * (TEMPORAL parts and more MLPs besides). Rows are scored by the SELF part of their block and chosen once for the whole
     * block: all its DO_ROWS parts compute the same rows, and a plan gives them the same number. */
    struct {
        bool used;
        bool value_score;    /* score by value norm instead of attention received */
        bool attention_rows; /* DO_ROWS on self-attention: chosen rows' q, k and v are renewed (all are kept) */
        bool random;
        uint64_t seed;
        float age_weight, bonus;
        int cell;
    } tokens;

    bool never_refreshes; /* nothing is stored after the first full steps: no prediction is checked, no drift guard */
    bool is_static;       /* plan never reads a signal: no decision cost, no read-back */
    void *tables;         /* rf_alloc'ed by setup, freed by the runtime with rf_free; policies' own schedule */
} rf_cache_layout;

/* --- one step ---------------------------------------------------------------------------------------------------------- */

typedef struct {
    const rf_cache_shape *shape;
    const rf_cache_layout *layout;
    int image; /* index in the batch */
    int step;
    bool force_full; /* the drift guard asks: plan must return FULL with its own bookkeeping as if its rule had asked */
    int num_stored;  /* pushes so far (FULL steps before this one, or the carried snapshot) */
    const int *stored; /* their steps, newest first, min(num_stored, RF_CACHE_MAX_TERMS) entries */
    /* the run began with a snapshot of the run before. Until the first FULL step num_stored is 1 and stored[0] below 0 */
    bool carried;
    const float (*signals)[2][4];               /* [RF_SIGNAL_COUNT][branch]: latest measurement */
    const int *signal_steps;                    /* [RF_SIGNAL_COUNT]: the step it was taken at, -1 = never */
    const float (*drift)[RF_CACHE_MAX_HORIZON]; /* [stream * 2 + branch]: E(1..horizon) of the last curvature */
} rf_step_ctx;

/* sum |a-b| / sum |b| of a branch, 0 if the denominator is 0 and the numerator too, else huge. */
double rf_ctx_rel1(const rf_step_ctx *ctx, rf_signal signal, int branch);
/* The largest rel1 over the branches. */
double rf_ctx_max_rel1(const rf_step_ctx *ctx, rf_signal signal);
/* Is the carried snapshot all the history there is? */
static inline bool rf_ctx_on_carried(const rf_step_ctx *ctx) {
    return ctx->num_stored > 0 && ctx->stored[0] < 0;
}
/* Is step one of `first` that are computed in any case? A carried snapshot ends a warm-up, but not one as long as the run. */
static inline bool rf_ctx_warms_up(const rf_step_ctx *ctx, int64_t first) {
    return ctx->step < first && !(ctx->carried && first < ctx->shape->num_steps);
}

typedef enum { RF_STEP_FULL = 0, RF_STEP_PARTIAL, RF_STEP_SKIP, RF_STEP_PROBE } rf_step_kind;
typedef enum { RF_PRODUCE_NONE = 0, RF_PRODUCE_OUTPUT, RF_PRODUCE_SPAN } rf_produce;
typedef enum { RF_DO_COMPUTE = 0, RF_DO_PRODUCE, RF_DO_ROWS } rf_part_do;

/* The runtime hands plan a zeroed plan: FULL, everything computed. */
typedef struct {
    rf_step_kind kind;
    rf_produce produce; /* SKIP and PARTIAL; on FULL: which prediction the drift guard checks (NONE: parts, if any) */
    int span;           /* RF_PRODUCE_SPAN: index in layout.spans */
    bool verify;        /* compute the last block too, from its predicted input, and measure RF_SIGNAL_VERIFY */
    bool use_verified;  /* and go on with the computed value */
    uint8_t *parts;     /* [num_blocks * num_parts] rf_part_do, outside a produced span; FULL: ignored */
    int32_t *rows;      /* [num_blocks * num_parts] token rows of RF_DO_ROWS: 0..tokens */
    int num_terms;      /* prediction of this step; on FULL what would have been used (0 = no history: no drift) */
    float weights[RF_CACHE_MAX_CLASSES][RF_CACHE_MAX_TERMS]; /* by class and age */
    /* for people and the trace */
    int horizon;                 /* steps since the last stored one */
    double statistic, threshold; /* what was compared; NaN if nothing was */
} rf_step_plan;

/* A computed part of a PARTIAL step renews its ring in place if the ring's depth is 1, else it is not stored. */

typedef struct rf_policy_def {
    const char *name;
    const char *family;  /* "feature", "row" */
    const char *level;   /* "step", "block", "part", "token", "replay"; "row" */
    const char *paper;   /* title, arXiv number */
    const char *summary; /* one line */
    const char *fits;    /* which models and samplers */
    const rf_policy_option *options;
    int num_options;
    size_t state_bytes; /* of one image; zeroed by the runtime at the start of a run */
    bool carries;       /* plan can begin from a snapshot of the run before; else refused where one is asked for */
    rf_status (*setup)(const rf_policy *policy, const rf_cache_shape *shape, rf_cache_layout *layout, rf_error *err);
    /* Does plan of this step read signals measured since the last read-back? NULL: always, unless layout.is_static. */
    bool (*wants_signals)(const rf_policy *policy, const void *state, const rf_step_ctx *ctx);
    void (*plan)(const rf_policy *policy, void *state, const rf_step_ctx *ctx, rf_step_plan *plan);
    void (*plan_probe)(const rf_policy *policy, void *state, const rf_step_ctx *ctx, rf_step_plan *plan);
    const struct rf_row_rules *rows; /* family "row", else NULL; setup refuses then, and there is no plan */
} rf_policy_def;

/* The feature policies, in the order in which they are listed for people. */
int rf_policy_count(void);
const rf_policy_def *rf_policy_at(int index); /* NULL past the end */
/* The row policies, likewise. */
int rf_row_policy_count(void);
const rf_policy_def *rf_row_policy_at(int index);
const rf_policy_def *rf_policy_find(const char *name); /* of both families; NULL if there is none */

/* --- for policies -------------------------------------------------------------------------------------------------------- */

/* RF_ERR_UNSUPPORTED unless shape->force: "NAME needs a solver that adds no noise ..." / "... at least N steps ...". */
rf_status rf_policy_refuse_stochastic(const rf_policy *policy, const rf_cache_shape *shape, rf_error *err);
rf_status rf_policy_refuse_few_steps(const rf_policy *policy, const rf_cache_shape *shape, int min_steps,
                                     rf_error *err);

/* Weights by age of predictors over stored steps (caching/predict.c). stored: steps newest first; step: the one to predict.
 * order is lowered to what num_stored allows. Return the number of terms. */
int rf_predict_reuse(float *weights);
int rf_predict_taylor(float *weights, const int *stored, int num_stored, int step, int order);
int rf_predict_newton(float *weights, const int *stored, int num_stored, int step, int order);
int rf_predict_hermite(float *weights, const int *stored, int num_stored, int step, int order, double sigma);
/* Chebyshev ridge (Spectrum): basis T_0..T_degree on 2 s / span - 1; blend * Chebyshev + (1 - blend) * linear. */
int rf_predict_chebyshev(float *weights, const int *stored, int num_stored, int step, int degree, double lambda,
                         double span, double blend);

#ifdef __cplusplus
}
#endif
#endif
