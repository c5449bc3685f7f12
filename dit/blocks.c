/* dit/blocks.c - consistency of a description. */
#include "dit/blocks.h"

#include <math.h>

int rf_dit_desc_num_blocks(const rf_dit_desc *desc) {
    int num = 0;
    for (int g = 0; g < desc->num_groups; g++) num += desc->groups[g].count;
    return num;
}

int rf_dit_desc_num_temporal(const rf_dit_desc *desc) {
    int num = 0;
    for (int g = 0; g < desc->num_groups; g++)
        for (int p = 0; p < desc->groups[g].num_parts; p++)
            if (desc->groups[g].parts[p].kind == RF_PART_SELF && desc->groups[g].parts[p].scope == RF_SCOPE_PIXEL)
                num += desc->groups[g].count;
    return num;
}

int64_t rf_dit_desc_num_chunks(const rf_dit_desc *desc) {
    if (desc->cond_dim == 0) return 0;
    int64_t num = 2; /* final shift and scale */
    for (int g = 0; g < desc->num_groups; g++) num += (int64_t)desc->groups[g].count * desc->groups[g].num_chunks;
    return num;
}

int64_t rf_dit_desc_out_dim(const rf_dit_desc *desc) {
    int64_t patch =
        desc->out_patch ? (int64_t)desc->out_patch * desc->out_patch : (int64_t)desc->pt * desc->ph * desc->pw;
    return desc->out_channels * patch;
}

static rf_status check_size(const char *name, int64_t value, int64_t max, rf_error *err) {
    if (value < 1 || value > max)
        return rf_fail(err, RF_ERR_CONFIG, "%s is %lld, expected 1..%lld", name, (long long)value, (long long)max);
    return RF_OK;
}

static rf_status check_part(const rf_dit_desc *desc, const rf_block_group *group, const rf_part_desc *part,
                            rf_error *err) {
    bool any = false;
    for (int s = 0; s < desc->num_segments; s++) {
        const rf_part_segment *seg = &part->segments[s];
        if (!seg->present) continue;
        any = true;
        int chunks[3] = {seg->shift, seg->scale, seg->gate};
        for (int i = 0; i < 3; i++)
            if (chunks[i] < -1 || chunks[i] >= group->num_chunks)
                return rf_fail(err, RF_ERR_CONFIG, "modulation chunk %d of a part, expected -1..%d", chunks[i],
                               group->num_chunks - 1);
        if ((seg->shift < 0) != (seg->scale < 0))
            return rf_fail(err, RF_ERR_CONFIG, "a part has a shift without a scale or the reverse");
    }
    if (!any) return rf_fail(err, RF_ERR_CONFIG, "a part has no segment");
    if (part->rope < -1 || part->rope >= desc->num_ropes)
        return rf_fail(err, RF_ERR_CONFIG, "a part names rotary positions %d of %d", part->rope, desc->num_ropes);
    if (part->norm != RF_PART_NORM_NONE && !(part->norm_eps > 0.0 && part->norm_eps < 1.0))
        return rf_fail(err, RF_ERR_CONFIG, "norm eps is %g, expected more than 0 and less than 1", part->norm_eps);
    if ((part->kind == RF_PART_MLP || part->kind == RF_PART_PARALLEL))
        return check_size("MLP width", part->ffn_dim, 1 << 18, err);
    return RF_OK;
}

rf_status rf_dit_desc_check(const rf_dit_desc *desc, rf_error *err) {
    rf_status st = RF_OK;
    struct {
        const char *name;
        int64_t value, max;
    } sizes[] = {
        {"width", desc->width, 1 << 15},
        {"number of heads", desc->num_heads, 1 << 10},
        {"head dim", desc->head_dim, 1 << 10},
        {"number of segments", desc->num_segments, RF_MAX_SEGMENTS},
        {"patch frames", desc->pt, 64},
        {"patch height", desc->ph, 64},
        {"patch width", desc->pw, 64},
        {"input channels", desc->in_channels, 1 << 10},
        {"output channels", desc->out_channels, 1 << 10},
        {"output patch", desc->out_patch ? desc->out_patch : 1, 64},
        {"timestep frequencies", desc->cond_dim ? desc->num_freqs : 1, 1 << 14},
        {"sample size", desc->sample_size, 1 << 13},
        {"sample frames", desc->sample_frames, 1 << 13},
        {"block groups", desc->num_groups, RF_MAX_GROUPS},
    };
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes && st == RF_OK; i++)
        st = check_size(sizes[i].name, sizes[i].value, sizes[i].max, err);
    if (st != RF_OK) return st;
    if (desc->width != (int64_t)desc->num_heads * desc->head_dim)
        return rf_fail(err, RF_ERR_CONFIG, "width %lld is not heads %d x head dim %d", (long long)desc->width,
                       desc->num_heads, desc->head_dim);
    if (desc->cond_dim < 0 || desc->cond_dim > 1 << 15)
        return rf_fail(err, RF_ERR_CONFIG, "condition width is %lld, expected 0..%d", (long long)desc->cond_dim,
                       1 << 15);
    if (desc->cond_dim && desc->out_channels != desc->in_channels && desc->out_channels != 2 * desc->in_channels)
        return rf_fail(err, RF_ERR_CONFIG, "%d output channels, expected %d or, with learned variance, %d",
                       desc->out_channels, desc->in_channels, 2 * desc->in_channels);
    if (desc->num_freqs % 2 != 0)
        return rf_fail(err, RF_ERR_CONFIG, "timestep frequencies %d are odd", desc->num_freqs);
    if (desc->pos == RF_POS_SINCOS_2D && desc->width % 4 != 0)
        return rf_fail(err, RF_ERR_CONFIG, "width %lld is not a multiple of 4, which 2-D positions need",
                       (long long)desc->width);
    if (desc->action_dim < 0 || desc->action_dim > 1 << 12)
        return rf_fail(err, RF_ERR_CONFIG, "length of an action is %d, expected 0..%d", desc->action_dim, 1 << 12);
    if (desc->action_dim > 0 && desc->num_classes > 0)
        return rf_fail(err, RF_ERR_UNSUPPORTED, "labels and actions in one model are not supported");
    if (desc->num_ropes < 0 || desc->num_ropes > RF_MAX_ROPES)
        return rf_fail(err, RF_ERR_CONFIG, "%d kinds of rotary positions, expected 0..%d", desc->num_ropes,
                       RF_MAX_ROPES);
    for (int i = 0; i < desc->num_ropes; i++) {
        int per_pair = desc->ropes[i].kind == RF_ROPE_AXIAL ? 4 : 2;
        if (desc->ropes[i].num_pairs < 1 || desc->ropes[i].num_pairs > desc->head_dim / per_pair)
            return rf_fail(err, RF_ERR_CONFIG, "rotary positions turn %d pairs%s of a head of %d",
                           desc->ropes[i].num_pairs, per_pair == 4 ? " an axis" : "", desc->head_dim);
    }
    if (desc->final_norm != RF_PART_NORM_LAYER && (desc->final_norm != RF_PART_NORM_LAYER_AFFINE || desc->cond_dim))
        return rf_fail(err, RF_ERR_CONFIG,
                       "the final norm is of kind %d, expected a LayerNorm, affine only without conditioning",
                       (int)desc->final_norm);
    int channels = 0;
    if (desc->num_streams < 0 || desc->num_streams > RF_MAX_STREAMS)
        return rf_fail(err, RF_ERR_CONFIG, "%d streams, expected 0..%d", desc->num_streams, RF_MAX_STREAMS);
    for (int i = 0; i < desc->num_streams; i++) {
        if (desc->stream_channels[i] < 1)
            return rf_fail(err, RF_ERR_CONFIG, "stream %d has %d channels", i, desc->stream_channels[i]);
        channels += desc->stream_channels[i];
    }
    if (desc->num_streams > 0 && channels != desc->in_channels)
        return rf_fail(err, RF_ERR_CONFIG, "streams of %d channels in all, expected %d", channels, desc->in_channels);
    if (desc->num_classes < 0 || desc->num_classes > 1 << 20)
        return rf_fail(err, RF_ERR_CONFIG, "number of classes is %d, expected 0..%d", desc->num_classes, 1 << 20);
    int64_t sample_width = desc->sample_width ? desc->sample_width : desc->sample_size;
    if (sample_width < 1 || sample_width > 1 << 13 || desc->sample_size % desc->ph != 0 || sample_width % desc->pw != 0)
        return rf_fail(err, RF_ERR_CONFIG, "sample size %lld x %lld is not a multiple of the patch %d x %d",
                       (long long)desc->sample_size, (long long)sample_width, desc->ph, desc->pw);
    for (int g = 0; g < desc->num_groups; g++) {
        const rf_block_group *group = &desc->groups[g];
        if ((st = check_size("blocks", group->count, 1 << 10, err)) != RF_OK) return st;
        if ((st = check_size("parts of a block", group->num_parts, RF_MAX_PARTS, err)) != RF_OK) return st;
        if (desc->cond_dim == 0 ? group->num_chunks != 0 : group->num_chunks < 1 || group->num_chunks > 64)
            return rf_fail(err, RF_ERR_CONFIG, "modulation chunks is %d, expected %s", group->num_chunks,
                           desc->cond_dim ? "1..64" : "0 without conditioning");
        for (int p = 0; p < group->num_parts; p++)
            if ((st = check_part(desc, group, &group->parts[p], err)) != RF_OK) return st;
    }
    return RF_OK;
}
