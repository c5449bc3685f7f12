/* kernels/attention_checks.h - argument checks of what kernels/checks.h does not know of attention: f32 output, listed out rows,
 * the join with kept attention, merges from a plane of slots. The rules of checks.h: the first of each pair reads no pointer, the
 * second also says which buffers may not be one. Called by both tables after the common checks. */
#ifndef RF_KERNELS_ATTENTION_CHECKS_H
#define RF_KERNELS_ATTENTION_CHECKS_H

#include "kernels/attention.h"

static inline rf_status rf_attention_out_check(const rf_attention_args *a, rf_error *err) {
    const bool joins = a->join_out || a->join_lse;
    if (a->lse_slots < 0 || a->lse_slots > INT32_MAX || a->join_slots < 0 || a->join_slots > INT32_MAX)
        return rf_fail(err, RF_ERR_SHAPE, "attention: lse_slots is %lld, join_slots %lld, must be 0..%d",
                       (long long)a->lse_slots, (long long)a->join_slots, INT32_MAX);
    if (a->out_rows && a->lse && a->lse_slots < 1)
        return rf_fail(err, RF_ERR_SHAPE, "attention: lse with out_rows needs lse_slots, which is %lld",
                       (long long)a->lse_slots);
    if (!a->out_rows && a->lse_slots != 0 && a->lse_slots != a->q_len)
        return rf_fail(err, RF_ERR_ARGUMENT, "attention: lse_slots is %lld without out_rows, must be 0 or q_len, %lld",
                       (long long)a->lse_slots, (long long)a->q_len);
    if (!joins && a->join_rows)
        return rf_fail(err, RF_ERR_ARGUMENT, "attention: join_rows is given without join_out and join_lse");
    if (!joins) return RF_OK;
    if (!a->join_out || !a->join_lse)
        return rf_fail(err, RF_ERR_ARGUMENT, "attention: %s is NULL while the other half of the join is given",
                       a->join_out ? "join_lse" : "join_out");
    if (!a->join_rows && a->batch > 1)
        return rf_fail(err, RF_ERR_ARGUMENT, "attention: a join of %lld samples needs join_rows", (long long)a->batch);
    if (a->join_slots < 1 || (!a->join_rows && a->join_slots < a->q_len))
        return rf_fail(err, RF_ERR_SHAPE, "attention: join_slots is %lld, must be at least %lld",
                       (long long)a->join_slots, (long long)(a->join_rows || a->q_len < 1 ? 1 : a->q_len));
    return RF_OK;
}

static inline rf_status rf_attention_out_check_run(const rf_attention_args *a, rf_error *err) {
    const rf_status status = rf_attention_out_check(a, err);
    if (status != RF_OK || !a->join_out) return status;
    if (a->out == (const void *)a->join_out || (a->lse && a->lse == a->join_lse))
        return rf_fail(err, RF_ERR_ARGUMENT, "attention: %s may not be the plane that is joined",
                       a->out == (const void *)a->join_out ? "out" : "lse");
    return RF_OK;
}

static inline rf_status rf_attention_merge_slots_check(const rf_attention_merge_args *a, rf_error *err) {
    if (a->num_slots < 0 || a->num_slots > INT32_MAX || (a->slots && a->num_slots < 1))
        return rf_fail(err, RF_ERR_SHAPE, "attention_merge: num_slots is %lld, must be %d..%d", (long long)a->num_slots,
                       a->slots ? 1 : 0, INT32_MAX);
    return RF_OK;
}

static inline rf_status rf_attention_merge_slots_check_run(const rf_attention_merge_args *a, rf_error *err) {
    const rf_status status = rf_attention_merge_slots_check(a, err);
    if (status != RF_OK || !a->slots) return status;
    if (a->out == a->out_a || (a->lse && a->lse == a->lse_a))
        return rf_fail(err, RF_ERR_ARGUMENT, "attention_merge: %s may not be the plane that slots are taken from",
                       a->out == a->out_a ? "out" : "lse");
    return RF_OK;
}

#endif
