/* samples/refrain/flops.c */
#include "samples/refrain/flops.h"

double forward_flops(const rf_dit_desc *d, double tokens, double seen) {
    double width = (double)d->width;
    double flops = 2 * tokens * width * (double)(d->in_channels + d->out_channels) * d->pt * d->ph * d->pw;
    for (int g = 0; g < d->num_groups; g++) {
        const rf_block_group *group = &d->groups[g];
        for (int p = 0; p < group->num_parts; p++) {
            const rf_part_desc *part = &group->parts[p];
            double part_flops = 0, keys = part->scope == RF_SCOPE_PIXEL ? seen : tokens;
            if (part->kind != RF_PART_MLP) part_flops += 8 * tokens * width * width + 4 * tokens * keys * width;
            if (part->kind == RF_PART_MLP || part->kind == RF_PART_PARALLEL) {
                part_flops += 4 * tokens * width * (double)part->ffn_dim;
            }
            flops += group->count * part_flops;
        }
    }
    return flops;
}

double context_elems(const rf_dit_desc *d, double tokens) {
    return 2.0 * rf_dit_desc_num_temporal(d) * tokens * (double)d->width;
}

double modulation_elems(const rf_dit_desc *d) {
    return (double)rf_dit_desc_num_chunks(d) * (double)d->width * (double)d->cond_dim;
}
