/* kernels/gemm_plan.h - what gemm.cu (operator) and gemm_tune.cu (choice of algorithms) share. Internal to kernels/.
 *
 * A plan is one row of the per-stream table: a key that says everything an algorithm's validity depends on, the cuBLASLt
 * descriptors built for it, and the algorithm. Plans are made in phase PLAN and only looked up in phase RUN. */
#ifndef RF_KERNELS_GEMM_PLAN_H
#define RF_KERNELS_GEMM_PLAN_H

#include <cublasLt.h>

#include "core/backend.h"
#include "kernels/gemm.h"
#include "kernels/gemm_skinny.h"
#include "kernels/gemm_stream.h"
#include "kernels/gemm_wgmma.h"
#include "kernels/gemv.h"

#define RF_GEMM_WORKSPACE_BYTES (32u << 20)
#define RF_GEMM_MAX_CANDIDATES  128

/* Field order is the order in the tuning file. alpha, beta's value, w_is_constant and the addresses are free; alignment
 * classes are not: 16 for every address that is a multiple of 16, else 8, 4, 2. */
enum {
    RF_GEMM_KEY_M = 0,
    RF_GEMM_KEY_N,
    RF_GEMM_KEY_K,
    RF_GEMM_KEY_LDX,
    RF_GEMM_KEY_LDW,
    RF_GEMM_KEY_LDY,
    RF_GEMM_KEY_BATCHES,
    RF_GEMM_KEY_X_STRIDE,
    RF_GEMM_KEY_W_STRIDE,
    RF_GEMM_KEY_Y_STRIDE,
    RF_GEMM_KEY_DTYPE,
    RF_GEMM_KEY_Y_DTYPE,
    RF_GEMM_KEY_W_IS_KN,
    RF_GEMM_KEY_ACT,
    RF_GEMM_KEY_BIAS,   /* 0, 1 */
    RF_GEMM_KEY_ADDEND, /* 0 none, 1 y0 apart from y, 2 y0 == y */
    RF_GEMM_KEY_ALIGN_X,
    RF_GEMM_KEY_ALIGN_W,
    RF_GEMM_KEY_ALIGN_Y, /* the lower of y and y0 */
    RF_GEMM_KEY_ALIGN_BIAS,
    RF_GEMM_KEY_FIELDS
};
typedef struct {
    int64_t v[RF_GEMM_KEY_FIELDS];
} rf_gemm_key;

typedef struct {
    int id; /* order of preference on ties; RF_GEMM_WGMMA_ID and above: own kernels (see below) */
    cublasLtMatmulAlgo_t algo;
} rf_gemm_candidate;

typedef struct {
    rf_gemm_key key;
    bool ready; /* descriptors built and the algorithm checked here; false after a load from a file */
    bool tuned; /* measured, here or in the file's process */
    rf_gemm_candidate choice;
    double us; /* measured; 0 if not */

    /* What cuBLASLt does inside the GEMM; what is left over goes to finish_kernel. */
    bool fuse_bias, fuse_act, fuse_addend;
    cublasLtMatmulDesc_t desc;
    cublasLtMatrixLayout_t layout_w, layout_x, layout_y;
} rf_gemm_plan;

typedef struct {
    rf_backend *backend;
    cublasLtHandle_t handle;
    cublasLtMatmulPreference_t preference;
    void *workspace; /* device, RF_GEMM_WORKSPACE_BYTES */
    size_t version;  /* cublasLtGetVersion */
    char card[256];
    bool tune, changed;

    rf_gemm_plan **slots; /* open addressing, power of two */
    size_t num_slots, num_plans;
} rf_gemm_state;

/* An own kernel, the functions of its header; its plan ids are first_id + config. */
typedef struct {
    int first_id;
    int (*num_configs)(void);
    const char *(*config_name)(int config);
    rf_status (*check)(rf_stream *stream, const rf_gemm_args *args, int config, rf_error *err);
    rf_status (*force)(rf_stream *stream, const rf_gemm_args *args, int config, rf_error *err);
} rf_gemm_own_kernel;
#define RF_GEMM_NUM_OWN_KERNELS 4
/* gemm.cu: the i-th own kernel, 0 <= i < RF_GEMM_NUM_OWN_KERNELS; the one with this id, NULL for cuBLASLt's. */
const rf_gemm_own_kernel *rf_gemm_own_kernel_at(int i);
const rf_gemm_own_kernel *rf_gemm_own_kernel_of(int id);

/* gemm.cu: queues one GEMM as the plan says, with a candidate in place of the plan's own choice. Allocates nothing. */
rf_status rf_gemm_plan_launch(rf_gemm_state *state, rf_stream *stream, const rf_gemm_plan *plan,
                              const rf_gemm_candidate *candidate, const rf_gemm_args *args, rf_error *err);
/* gemm.cu: the plan with this key, made empty if there is none. NULL when memory is out. */
rf_gemm_plan *rf_gemm_plan_insert(rf_gemm_state *state, const rf_gemm_key *key);
/* gemm.cu: the state of a stream, made on the first call in phase PLAN. */
rf_status rf_gemm_state_get(rf_gemm_state **out, rf_stream *stream, rf_error *err);

/* gemm_tune.cu: lists up to RF_GEMM_MAX_CANDIDATES candidates beyond the num_heuristics already in the list, times all of
 * them for the plan's key and sets the plan's choice. */
rf_status rf_gemm_tune(rf_gemm_state *state, rf_stream *stream, rf_gemm_plan *plan, const rf_gemm_args *args,
                       rf_gemm_candidate *candidates, int num_candidates, rf_error *err);

#endif
