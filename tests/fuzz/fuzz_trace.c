/* tests/fuzz/fuzz_trace.c - any bytes as a trace: read, and if they are one, replayed on the model that they speak
 * of. */
#include "caching/trace.h"

#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>

#include "tests/fuzz/fuzz.h"

#define MAX_SITES 64
#define MAX_STEPS 64

static void read_plans(const rf_trace *trace, const rf_trace_info *info) {
    uint8_t parts[MAX_SITES];
    int32_t rows[MAX_SITES];
    for (int image = 0; image < info->num_images && image < 8; image++) {
        for (int step = 0; step < info->num_steps; step++) {
            rf_step_plan plan = {.parts = parts, .rows = rows};
            rf_error err = {0};
            if (rf_trace_get_plan(trace, image, step, &plan, &err) != RF_OK) abort();
            if (plan.kind > RF_STEP_SKIP || plan.produce > RF_PRODUCE_SPAN || plan.num_terms > RF_CACHE_MAX_TERMS ||
                plan.span < 0 || plan.span >= RF_CACHE_MAX_SPANS || (plan.use_verified && !plan.verify))
                abort();
            for (int i = 0; i < info->num_blocks * info->num_parts; i++) {
                if (parts[i] > RF_DO_ROWS || rows[i] < 0 || rows[i] > info->tokens) abort();
            }
        }
    }
}

/* What the runtime would trip over. */
static void check_plan(const rf_cache_shape *shape, const rf_cache_layout *layout, const rf_step_plan *p,
                       int num_stored) {
    if (p->kind == RF_STEP_PROBE || p->verify || p->num_terms > num_stored) abort();
    if (p->kind == RF_STEP_FULL) return;
    if (num_stored == 0 || (p->kind == RF_STEP_PARTIAL && p->produce == RF_PRODUCE_OUTPUT)) abort();
    if (p->produce == RF_PRODUCE_OUTPUT && (layout->output_depth < 1 || p->num_terms > layout->output_depth)) abort();
    if (p->produce == RF_PRODUCE_SPAN && p->num_terms > layout->spans[p->span].depth) abort();
    for (int i = 0; i < shape->num_blocks * shape->num_parts; i++) {
        if (p->parts[i] == RF_DO_COMPUTE) continue;
        if (shape->part_kinds[i] >= RF_CACHE_NUM_KINDS || layout->part_depth[shape->part_kinds[i]] < 1) abort();
        if (p->parts[i] == RF_DO_ROWS && (!layout->tokens.used || p->rows[i] < 1 || p->rows[i] >= shape->tokens))
            abort();
    }
}

static void run_plans(const rf_policy *policy, const rf_cache_shape *shape, const rf_cache_layout *layout, int image) {
    int stored[RF_CACHE_MAX_TERMS] = {0}, num_stored = 0;
    for (int step = 0; step < shape->num_steps; step++) {
        uint8_t parts[MAX_SITES] = {0};
        int32_t rows[MAX_SITES] = {0};
        rf_step_plan plan = {.parts = parts, .rows = rows};
        rf_step_ctx ctx = {.shape = shape,
                           .layout = layout,
                           .image = image,
                           .step = step,
                           .force_full = image == 1 && step % 5 == 3,
                           .num_stored = num_stored,
                           .stored = stored};
        rf_policy_get_def(policy)->plan(policy, NULL, &ctx, &plan);
        if (ctx.force_full && plan.kind != RF_STEP_FULL) abort();
        check_plan(shape, layout, &plan, num_stored);
        if (plan.kind != RF_STEP_FULL) continue;
        memmove(stored + 1, stored, sizeof stored - sizeof stored[0]);
        stored[0] = step;
        num_stored++;
    }
}

static void replay(const char *path, const rf_trace_info *info) {
    uint8_t kinds[MAX_SITES];
    float numbers[2 * MAX_STEPS];
    for (int i = 0; i < info->num_blocks * info->num_parts; i++) {
        kinds[i] = i % info->num_parts == 0   ? RF_CACHE_SELF
                   : i % info->num_parts == 1 ? RF_CACHE_MLP
                                              : RF_CACHE_NO_PART;
    }
    for (int i = 0; i < 2 * MAX_STEPS; i++) numbers[i] = (float)(MAX_STEPS - i % MAX_STEPS);
    rf_cache_shape shape = {.model = "fuzz",
                            .num_steps = info->num_steps,
                            .timesteps = numbers,
                            .temb_change = numbers + MAX_STEPS,
                            .sampler = "ddim",
                            .force = true,
                            .batch = 1,
                            .branches = info->branches,
                            .tokens = info->tokens,
                            .frames = 1,
                            .grid_h = 1,
                            .grid_w = info->tokens,
                            .width = 8,
                            .in_cols = 4,
                            .out_cols = 4,
                            .pred_cols = 4,
                            .num_blocks = info->num_blocks,
                            .num_parts = info->num_parts,
                            .part_kinds = kinds};
    rf_error err = {0};
    rf_policy *policy = NULL;
    rf_cache_layout layout = {0};
    if (rf_policy_create(&policy, "replay", &err) != RF_OK) abort();
    if (rf_policy_set_one(policy, "file", path, &err) != RF_OK) abort();
    rf_status st = rf_policy_get_def(policy)->setup(policy, &shape, &layout, &err);
    fuzz_check_refusal(st, &err);
    for (int image = 0; image < 3 && st == RF_OK; image++) run_plans(policy, &shape, &layout, image);
    rf_free(layout.tables);
    rf_policy_destroy(policy);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    /* the reader takes a path: a file in memory, made once */
    static int file = -1;
    char path[64];
    if (file < 0) file = memfd_create("trace", 0);
    if (file < 0 || ftruncate(file, 0) != 0 || pwrite(file, data, size, 0) != (ssize_t)size) abort();
    snprintf(path, sizeof path, "/proc/self/fd/%d", file);

    uint64_t live = rf_memory_get_counts().num_live;
    rf_error err = {0};
    rf_trace *trace = NULL;
    fuzz_check_refusal(rf_trace_open(&trace, path, &err), &err);
    if (trace) {
        rf_trace_info info = rf_trace_get_info(trace);
        if (info.num_blocks * info.num_parts <= MAX_SITES && info.num_steps <= MAX_STEPS) {
            read_plans(trace, &info);
            replay(path, &info);
        }
    }
    rf_trace_close(trace);
    fuzz_check_leaks(live);
    return 0;
}
