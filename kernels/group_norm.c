/* kernels/group_norm.c - the part of GroupNorm that both backends share. */
#include "kernels/norm.h"

size_t rf_group_norm_workspace_bytes(const rf_group_norm_args *args) {
    return (size_t)args->batch * (size_t)args->num_groups * (2 + 3 * RF_GROUP_NORM_MAX_SPLITS) * sizeof(float);
}
