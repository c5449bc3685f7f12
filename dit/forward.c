/* dit/forward.c - the executor.
 *
 * Between two GEMMs there is one fused kernel: the residual of the part that just finished and the norm of the part that comes
 * next. So a part leaves its output "pending", and whoever needs the residual stream next - a part's norm, or the head -
 * settles it. Per layer of a DiT: qkv GEMM, attention, out GEMM, residual+norm, fc1 GEMM, fc2 GEMM, residual+norm.
 *
 * Arena (device), R = branches*batch*tokens rows:
 *   patches [R, patch_dim]  x [R, width]  h [R, width]  y [R, width]  wide [R, max(3 width, ffn)]  attn [R, width]
 *   out [R, out_dim] f32    modulation table and what makes it, pos [tokens, width], slots, indices, step */
#include "dit/forward.h"

#include <math.h>
#include <string.h>

#include "core/arena.h"
#include "core/memory.h"

typedef struct {
    /* activations */
    void *patches, *x, *h, *y, *wide, *attn;
    float *out;
    void *attn_workspace;
    size_t attn_workspace_bytes;
    void *pos; /* [tokens, width] f32 */
    /* modulation: U = rows_per_step distinct (timestep, label) rows a step, C = steps_per_chunk */
    void *table;                               /* [C*U, num_chunks*width] */
    float *timesteps;                          /* [steps rounded up to C, U] */
    int32_t *label_rows;                       /* [C*U] */
    void *fourier, *temb_hidden, *temb, *cond; /* [C*U, num_freqs | cond_dim ...] */
    int32_t *slots, *mod_index, *step;
} buffers;

struct rf_dit_session {
    const rf_dit_model *model;
    const rf_ops *ops;
    rf_stream *stream;
    rf_dit_session_options options;

    int64_t samples, tokens, rows; /* samples = branches * batch */
    int64_t patch_dim, out_dim, chunk_cols;
    int rows_per_step, steps_per_chunk, padded_steps;

    void *memory;
    size_t memory_bytes;
    buffers b;

    /* host staging of begin(): sized when planned, page-locked */
    float *host_timesteps;
    int32_t *host_ints; /* slots [samples], then label rows [C*U] */

    int num_steps, step; /* of the run; host mirror of the device counter */

    rf_dit_observer observer;
    void *observer_user;
};

/* The residual that has not been added yet. */
typedef struct {
    bool active;
    const void *base; /* NULL: x itself */
    int64_t base_period;
    int64_t gate; /* column in the modulation row, -1 = 1 */
} pending_residual;

rf_dit_session_options rf_dit_session_options_default(void) {
    return (rf_dit_session_options){.batch = 1,
                                    .branches = 1,
                                    .frames = 1,
                                    .max_steps = 1,
                                    .residual_dtype = RF_DTYPE_COUNT,
                                    .modulation_budget_bytes = (size_t)1 << 30};
}

/* --- one part after the other --------------------------------------------------------------------------------------- */

static rf_modulation modulation(const rf_dit_session *s) {
    return (rf_modulation){.table = s->b.table,
                           .dtype = s->model->dtype,
                           .stride = s->chunk_cols,
                           .index = s->b.mod_index,
                           .rows_per_group = s->tokens};
}

static int64_t column(const rf_dit_session *s, int64_t first_chunk, int chunk) {
    return chunk < 0 ? -1 : (first_chunk + chunk) * s->model->desc.width;
}

/* x += gate * y if something is pending, and h = norm(x) if a norm is asked for. stream NULL: only check. */
static rf_status settle(rf_dit_session *s, rf_stream *stream, pending_residual *pending, rf_part_norm norm, double eps,
                        int64_t shift, int64_t scale, rf_error *err) {
    rf_norm_kind kind = norm == RF_PART_NORM_RMS ? RF_NORM_RMS : RF_NORM_LAYER;
    if (norm == RF_PART_NORM_LAYER_AFFINE)
        return rf_fail(err, RF_ERR_UNSUPPORTED, "affine part norms have no weight map");
    if (pending->active) {
        rf_residual_args args = {.x = s->b.x,
                                 .base = pending->base,
                                 .base_period = pending->base_period,
                                 .num_terms = 1,
                                 .terms = {s->b.y},
                                 .x_dtype = s->options.residual_dtype,
                                 .base_dtype = RF_DTYPE_F32,
                                 .y_dtype = s->model->dtype,
                                 .num_rows = s->rows,
                                 .cols = s->model->desc.width,
                                 .gate_mod = modulation(s),
                                 .gate = pending->gate,
                                 .norm_y = norm == RF_PART_NORM_NONE ? NULL : s->b.h,
                                 .norm_y_dtype = s->model->dtype,
                                 .norm_kind = kind,
                                 .norm_eps = (float)eps,
                                 .norm_mod = modulation(s),
                                 .norm_shift = shift,
                                 .norm_scale = scale};
        pending->active = false;
        return s->ops->residual(stream, &args, err);
    }
    if (norm == RF_PART_NORM_NONE) return RF_OK;
    rf_norm_args args = {.x = s->b.x,
                         .y = s->b.h,
                         .x_dtype = s->options.residual_dtype,
                         .y_dtype = s->model->dtype,
                         .num_rows = s->rows,
                         .cols = s->model->desc.width,
                         .kind = kind,
                         .eps = (float)eps,
                         .mod = modulation(s),
                         .shift = shift,
                         .scale = scale};
    return s->ops->norm(stream, &args, err);
}

static rf_status linear(rf_dit_session *s, rf_stream *stream, const rf_linear *l, const void *x, void *y, int64_t m,
                        int64_t n, int64_t k, rf_act act, rf_dtype y_dtype, rf_error *err) {
    rf_gemm_args args = rf_gemm_args_default(s->model->dtype, m, n, k);
    args.x = x;
    args.w = l->w;
    args.bias = l->b;
    args.y = y;
    args.y_dtype = y_dtype;
    args.act = act;
    return s->ops->gemm(stream, &args, err);
}

static rf_status run_self(rf_dit_session *s, rf_stream *stream, const rf_part_desc *part, const rf_part_weights *w,
                          rf_error *err) {
    const rf_dit_desc *d = &s->model->desc;
    rf_dtype dtype = s->model->dtype;
    rf_status st =
        linear(s, stream, &w->qkv, s->b.h, s->b.wide, s->rows, 3 * d->width, d->width, RF_ACT_NONE, dtype, err);
    int64_t sequences = part->scope == RF_SCOPE_FRAME ? s->samples * (s->options.frames / d->pt) : s->samples;
    rf_attention_args args = rf_attention_args_packed(dtype, sequences, s->rows / sequences, d->num_heads, d->head_dim,
                                                      s->b.wide, s->b.attn);
    args.workspace = s->b.attn_workspace;
    args.workspace_bytes = s->b.attn_workspace_bytes;
    if (st == RF_OK) st = s->ops->attention(stream, &args, err);
    if (st == RF_OK)
        st = linear(s, stream, &w->out, s->b.attn, s->b.y, s->rows, d->width, d->width, RF_ACT_NONE, dtype, err);
    return st;
}

static rf_status run_mlp(rf_dit_session *s, rf_stream *stream, const rf_part_desc *part, const rf_part_weights *w,
                         rf_error *err) {
    int64_t width = s->model->desc.width;
    rf_dtype dtype = s->model->dtype;
    rf_status st = linear(s, stream, &w->fc1, s->b.h, s->b.wide, s->rows, part->ffn_dim, width, part->act, dtype, err);
    if (st == RF_OK)
        st = linear(s, stream, &w->fc2, s->b.wide, s->b.y, s->rows, width, part->ffn_dim, RF_ACT_NONE, dtype, err);
    return st;
}

static rf_status run_part(rf_dit_session *s, rf_stream *stream, int block, int p, const rf_part_desc *part,
                          int64_t first_chunk, pending_residual *pending, rf_error *err) {
    const rf_part_segment *seg = &part->segments[0];
    const rf_part_weights *w = &s->model->parts[block * RF_MAX_PARTS + p];
    rf_status st = settle(s, stream, pending, part->norm, part->norm_eps, column(s, first_chunk, seg->shift),
                          column(s, first_chunk, seg->scale), err);
    if (st != RF_OK) return st;
    switch (part->kind) {
    case RF_PART_SELF: st = run_self(s, stream, part, w, err); break;
    case RF_PART_MLP: st = run_mlp(s, stream, part, w, err); break;
    default: st = rf_fail(err, RF_ERR_UNSUPPORTED, "this kind of part has no kernel yet"); break;
    }
    *pending = (pending_residual){.active = true, .gate = column(s, first_chunk, seg->gate)};
    return st;
}

/* What the grammar can say and this executor cannot do. */
static rf_status check_supported(const rf_dit_desc *d, rf_error *err) {
    if (d->num_segments != 1) return rf_fail(err, RF_ERR_UNSUPPORTED, "text segments are not supported");
    if (d->mod_rows != RF_MOD_ROWS_SAMPLE)
        return rf_fail(err, RF_ERR_UNSUPPORTED, "only one modulation row per sample is supported");
    for (int g = 0; g < d->num_groups; g++) {
        for (int p = 0; p < d->groups[g].num_parts; p++) {
            const rf_part_desc *part = &d->groups[g].parts[p];
            const char *what = NULL;
            if (part->kind != RF_PART_SELF && part->kind != RF_PART_MLP)
                what = "cross-attention and parallel parts";
            else if (part->norm == RF_PART_NORM_NONE)
                what = "parts without a norm";
            else if (part->from_block_input)
                what = "parts that read the block's input";
            else if (part->qk_norm != RF_QK_NORM_NONE)
                what = "q/k norms";
            else if (part->rope >= 0)
                what = "rotary positions";
            else if (part->scope == RF_SCOPE_PIXEL || part->causal_frames)
                what = "attention over frames";
            else if (part->masked || part->dead)
                what = "masked or dead rows";
            if (what != NULL) return rf_fail(err, RF_ERR_UNSUPPORTED, "%s are not supported", what);
        }
    }
    return RF_OK;
}

/* The whole forward: queued on stream, or only checked if stream is NULL. */
static rf_status walk(rf_dit_session *s, rf_stream *stream, const float *latent, const float *in_scale,
                      int64_t in_scale_stride, rf_error *err) {
    const rf_dit_desc *d = &s->model->desc;
    rf_patchify_args patchify = {.latent = latent,
                                 .out = s->b.patches,
                                 .dtype = s->model->dtype,
                                 .batch = s->options.batch,
                                 .branches = s->options.branches,
                                 .channels = d->in_channels,
                                 .frames = s->options.frames,
                                 .height = s->options.height,
                                 .width = s->options.width,
                                 .pt = d->pt,
                                 .ph = d->ph,
                                 .pw = d->pw,
                                 .scale = in_scale,
                                 .step = s->b.step,
                                 .scale_stride = in_scale_stride};
    rf_status st = s->ops->patchify(stream, &patchify, err);
    if (st == RF_OK)
        st = linear(s, stream, &s->model->patch, s->b.patches, s->b.y, s->rows, d->width, s->patch_dim, RF_ACT_NONE,
                    s->model->dtype, err);
    pending_residual pending = {.active = true, .base = s->b.pos, .base_period = s->tokens, .gate = -1};
    int64_t chunk = 0;
    int block = 0;
    for (int g = 0; g < d->num_groups && st == RF_OK; g++) {
        const rf_block_group *group = &d->groups[g];
        for (int i = 0; i < group->count && st == RF_OK; i++, block++, chunk += group->num_chunks) {
            for (int p = 0; p < group->num_parts && st == RF_OK; p++) {
                st = run_part(s, stream, block, p, &group->parts[p], chunk, &pending, err);
                if (st == RF_OK && s->observer != NULL && stream != NULL) {
                    st = settle(s, stream, &pending, RF_PART_NORM_NONE, 0.0, -1, -1, err);
                    s->observer(s->observer_user, block, p, s->b.x, s->rows, d->width);
                }
            }
        }
    }
    if (st == RF_OK)
        st = settle(s, stream, &pending, RF_PART_NORM_LAYER, d->final_eps, chunk * d->width, (chunk + 1) * d->width,
                    err);
    if (st == RF_OK)
        st = linear(s, stream, &s->model->final, s->b.h, s->b.out, s->rows, s->out_dim, d->width, RF_ACT_NONE,
                    RF_DTYPE_F32, err);
    return st;
}

/* --- modulation ------------------------------------------------------------------------------------------------------ */

/* The table of steps chunk*C .. chunk*C + C-1: c = MLP_t(fourier(t)) + label, row = W SiLU(c) + b. */
static rf_status queue_modulation(rf_dit_session *s, rf_stream *stream, int chunk, rf_error *err) {
    const rf_dit_desc *d = &s->model->desc;
    rf_dtype dtype = s->model->dtype;
    int64_t rows = (int64_t)s->steps_per_chunk * s->rows_per_step;
    const float *t = s->b.timesteps ? s->b.timesteps + (int64_t)chunk * rows : NULL;
    rf_timestep_embed_args embed = {.t = t,
                                    .out = s->b.fourier,
                                    .dtype = dtype,
                                    .num = rows,
                                    .dim = d->num_freqs,
                                    .freq_shift = (float)d->freq_shift,
                                    .max_period = (float)d->max_period};
    rf_status st = s->ops->timestep_embed(stream, &embed, err);
    if (st == RF_OK)
        st = linear(s, stream, &s->model->temb1, s->b.fourier, s->b.temb_hidden, rows, d->cond_dim, d->num_freqs,
                    RF_ACT_SILU, dtype, err);
    if (st == RF_OK)
        st = linear(s, stream, &s->model->temb2, s->b.temb_hidden, s->b.temb, rows, d->cond_dim, d->cond_dim,
                    RF_ACT_NONE, dtype, err);
    rf_elementwise_args add = rf_elementwise_args_default(dtype, dtype, rows, d->cond_dim);
    add.x = s->b.temb;
    add.y = s->b.cond;
    add.act = RF_ACT_SILU;
    if (d->num_classes > 0) {
        add.add = s->model->labels;
        add.add_dtype = dtype;
        add.add_index = s->b.label_rows;
        add.add_period = d->num_classes + 1;
    }
    if (st == RF_OK) st = s->ops->elementwise(stream, &add, err);
    if (st == RF_OK)
        st = linear(s, stream, &s->model->mod, s->b.cond, s->b.table, rows, s->chunk_cols, d->cond_dim, RF_ACT_NONE,
                    dtype, err);
    return st;
}

static rf_status queue_advance(rf_dit_session *s, rf_stream *stream, int increment, rf_error *err) {
    rf_step_advance_args args = {.step = s->b.step,
                                 .increment = increment,
                                 .slots = s->b.slots,
                                 .mod_index = s->b.mod_index,
                                 .num_groups = s->samples,
                                 .rows_per_step = s->rows_per_step,
                                 .steps_per_chunk = s->steps_per_chunk};
    return s->ops->step_advance(stream, &args, err);
}

/* --- planning -------------------------------------------------------------------------------------------------------- */

static int64_t max_ffn(const rf_dit_desc *d) {
    int64_t wide = 3 * d->width;
    for (int g = 0; g < d->num_groups; g++)
        for (int p = 0; p < d->groups[g].num_parts; p++)
            if (d->groups[g].parts[p].ffn_dim > wide) wide = d->groups[g].parts[p].ffn_dim;
    return wide;
}

/* Hands out every buffer; run twice, counting and real. */
static rf_status take_buffers(rf_dit_session *s, rf_arena *arena, rf_error *err) {
    const rf_dit_desc *d = &s->model->desc;
    size_t act = rf_dtype_bytes(s->model->dtype), rows = (size_t)s->rows, width = (size_t)d->width;
    size_t mod_rows = (size_t)s->steps_per_chunk * (size_t)s->rows_per_step;
    struct {
        void **slot;
        const char *name;
        size_t count, elem_bytes;
    } list[] = {
        {&s->b.patches, "patches", rows * (size_t)s->patch_dim, act},
        {&s->b.x, "residual stream", rows * width, rf_dtype_bytes(s->options.residual_dtype)},
        {&s->b.h, "normed rows", rows * width, act},
        {&s->b.y, "part output", rows * width, act},
        {&s->b.wide, "qkv and MLP rows", rows * (size_t)max_ffn(d), act},
        {&s->b.attn, "attention output", rows * width, act},
        {(void **)&s->b.out, "model output", rows * (size_t)s->out_dim, sizeof(float)},
        {&s->b.attn_workspace, "attention workspace", s->b.attn_workspace_bytes, 1},
        {&s->b.pos, "positions", (size_t)s->tokens * width, sizeof(float)},
        {&s->b.table, "modulation table", mod_rows * (size_t)s->chunk_cols, act},
        {(void **)&s->b.timesteps, "timesteps", (size_t)s->padded_steps * (size_t)s->rows_per_step, sizeof(float)},
        {(void **)&s->b.label_rows, "label rows", mod_rows, sizeof(int32_t)},
        {&s->b.fourier, "timestep frequencies", mod_rows * (size_t)d->num_freqs, act},
        {&s->b.temb_hidden, "timestep MLP", mod_rows * (size_t)d->cond_dim, act},
        {&s->b.temb, "timestep embedding", mod_rows * (size_t)d->cond_dim, act},
        {&s->b.cond, "condition", mod_rows * (size_t)d->cond_dim, act},
        {(void **)&s->b.slots, "modulation slots", (size_t)s->samples, sizeof(int32_t)},
        {(void **)&s->b.mod_index, "modulation index", (size_t)s->samples, sizeof(int32_t)},
        {(void **)&s->b.step, "step counter", 1, sizeof(int32_t)},
    };
    for (size_t i = 0; i < sizeof list / sizeof *list; i++) {
        rf_status st = rf_arena_take(arena, list[i].slot, list[i].name, list[i].count, list[i].elem_bytes, err);
        if (st != RF_OK) return st;
    }
    return RF_OK;
}

/* 2-D sin/cos table (He et al. 2022): the first half of the channels encodes the column, the second the row; in each half
 * sines come first. Positions are index * (base / grid) / interpolation. */
static void fill_positions(const rf_dit_desc *d, int64_t grid_h, int64_t grid_w, float *out) {
    int64_t half = d->width / 2, quarter = d->width / 4;
    double base_h = d->pos_base_size > 0 ? d->pos_base_size : (double)grid_h;
    double base_w = d->pos_base_size > 0 ? d->pos_base_size : (double)grid_w;
    for (int64_t row = 0; row < grid_h; row++) {
        for (int64_t col = 0; col < grid_w; col++) {
            /* positions in f32, as the reference keeps them */
            double axis[2] = {(float)((float)col / (float)(grid_w / base_w) / (float)d->pos_interpolation),
                              (float)((float)row / (float)(grid_h / base_h) / (float)d->pos_interpolation)};
            float *v = out + (row * grid_w + col) * d->width;
            for (int a = 0; a < 2; a++) {
                for (int64_t i = 0; i < quarter; i++) {
                    double angle = axis[a] * pow(10000.0, -(double)i / (double)quarter);
                    v[a * half + i] = (float)sin(angle);
                    v[a * half + quarter + i] = (float)cos(angle);
                }
            }
        }
    }
}

static rf_status check_options(const rf_dit_model *model, const rf_dit_session_options *o, rf_error *err) {
    const rf_dit_desc *d = &model->desc;
    if (o->batch < 1 || o->batch > 65536 || o->branches < 1 || o->branches > 2)
        return rf_fail(err, RF_ERR_ARGUMENT, "batch %lld with %d branches, expected 1..65536 and 1 or 2",
                       (long long)o->batch, o->branches);
    if (o->max_steps < 1 || o->max_steps > 10000)
        return rf_fail(err, RF_ERR_ARGUMENT, "%d steps, expected 1..10000", o->max_steps);
    if (o->frames < 1 || o->height < 1 || o->width < 1 || o->frames % d->pt || o->height % d->ph || o->width % d->pw ||
        o->frames > 4096 || o->height > 4096 || o->width > 4096)
        return rf_fail(err, RF_ERR_ARGUMENT,
                       "latent of %lld x %lld x %lld, expected multiples of the patch %d x %d x %d up to 4096",
                       (long long)o->frames, (long long)o->height, (long long)o->width, d->pt, d->ph, d->pw);
    if (o->residual_dtype != RF_DTYPE_F32 && o->residual_dtype != RF_DTYPE_COUNT && o->residual_dtype != model->dtype)
        return rf_fail(err, RF_ERR_DTYPE, "residual dtype %s, expected f32 or the model's %s",
                       rf_dtype_name(o->residual_dtype), rf_dtype_name(model->dtype));
    return check_supported(d, err);
}

/* Dry run of every operator with the shapes of this session. */
static rf_status check_operators(rf_dit_session *s, rf_error *err) {
    rf_status st = queue_modulation(s, NULL, 0, err);
    if (st == RF_OK) st = queue_advance(s, NULL, 0, err);
    if (st == RF_OK) st = walk(s, NULL, NULL, NULL, 0, err);
    return st;
}

static rf_status allocate(rf_dit_session *s, rf_error *err) {
    rf_backend *backend = rf_stream_backend(s->stream);
    rf_arena arena;
    rf_arena_init_counting(&arena);
    rf_status st = take_buffers(s, &arena, err);
    if (st == RF_OK && arena.overflow) st = rf_fail(err, RF_ERR_ARGUMENT, "this batch does not fit any address space");
    if (st == RF_OK) st = rf_backend_alloc(backend, &s->memory, arena.peak, err);
    if (st != RF_OK) return st;
    s->memory_bytes = arena.peak;
    rf_arena_init(&arena, s->memory, s->memory_bytes);
    st = take_buffers(s, &arena, err);
    size_t num_ints = (size_t)s->samples + (size_t)s->steps_per_chunk * (size_t)s->rows_per_step;
    size_t num_floats = (size_t)s->padded_steps * (size_t)s->rows_per_step;
    if (st == RF_OK)
        st = rf_backend_alloc_pinned(backend, (void **)&s->host_timesteps, num_floats * sizeof(float), err);
    if (st == RF_OK) st = rf_backend_alloc_pinned(backend, (void **)&s->host_ints, num_ints * sizeof(int32_t), err);
    return st;
}

/* Tables that never change, then one pass over everything with random numbers in the buffers: operators tune themselves and
 * load their code now, not in the loop. */
static rf_status warm_up(rf_dit_session *s, rf_error *err) {
    const rf_dit_desc *d = &s->model->desc;
    size_t num_pos = (size_t)(s->tokens * d->width);
    float *host = rf_alloc(num_pos * sizeof(float));
    if (host == NULL) return rf_fail(err, RF_ERR_MEMORY, "out of memory for a position table");
    fill_positions(d, s->options.height / d->ph, s->options.width / d->pw, host);

    size_t elem = rf_dtype_bytes(s->model->dtype);
    rf_fill_normal_args fill = {
        .out = s->memory, .dtype = s->model->dtype, .num = (int64_t)(s->memory_bytes / elem), .std = 1.0f};
    rf_status st = s->ops->fill_normal(s->stream, &fill, err);
    if (st == RF_OK) st = rf_stream_upload(s->stream, s->b.pos, host, num_pos * sizeof(float), err);
    if (st == RF_OK) st = rf_stream_synchronize(s->stream, err);
    rf_free(host);

    float zero = 0.0f;
    int32_t *labels = rf_alloc_zero((size_t)s->samples, sizeof *labels);
    if (labels == NULL) return rf_fail(err, RF_ERR_MEMORY, "out of memory for labels");
    if (st == RF_OK) st = rf_dit_session_begin(s, &zero, 1, labels, err);
    /* any finite floats will do as latents; the output buffer is at least as large */
    if (st == RF_OK) st = walk(s, s->stream, s->b.out, NULL, 0, err);
    if (st == RF_OK) st = rf_stream_synchronize(s->stream, err);
    rf_free(labels);
    return st;
}

rf_status rf_dit_session_create(rf_dit_session **out, const rf_dit_model *model, rf_stream *stream,
                                const rf_dit_session_options *options, rf_error *err) {
    const rf_dit_desc *d = &model->desc;
    *out = NULL;
    rf_status st = check_options(model, options, err);
    if (st != RF_OK) return st;
    rf_dit_session *s = rf_alloc_zero(1, sizeof *s);
    if (s == NULL) return rf_fail(err, RF_ERR_MEMORY, "out of memory for a session");
    s->model = model;
    s->ops = rf_ops_for(rf_stream_backend(stream));
    s->stream = stream;
    s->options = *options;
    if (s->options.residual_dtype == RF_DTYPE_COUNT) s->options.residual_dtype = model->dtype;
    s->samples = options->branches * options->batch;
    s->tokens = (options->frames / d->pt) * (options->height / d->ph) * (options->width / d->pw);
    s->rows = s->samples * s->tokens;
    s->patch_dim = (int64_t)d->in_channels * d->pt * d->ph * d->pw;
    s->out_dim = (int64_t)d->out_channels * d->pt * d->ph * d->pw;
    s->chunk_cols = rf_dit_desc_num_chunks(d) * d->width;
    /* distinct labels of a run: one per sample of the first branch and the null label of the second */
    s->rows_per_step = (int)(options->batch + (options->branches > 1));
    size_t step_bytes = (size_t)s->rows_per_step * (size_t)s->chunk_cols * rf_dtype_bytes(model->dtype);
    int64_t fit = (int64_t)(options->modulation_budget_bytes / step_bytes);
    s->steps_per_chunk = (int)(fit < 1 ? 1 : fit > options->max_steps ? options->max_steps : fit);
    s->padded_steps = (options->max_steps + s->steps_per_chunk - 1) / s->steps_per_chunk * s->steps_per_chunk;

    rf_attention_args attention =
        rf_attention_args_packed(model->dtype, s->samples, s->tokens, d->num_heads, d->head_dim, NULL, NULL);
    s->b.attn_workspace_bytes = s->ops->attention_workspace(rf_stream_backend(stream), &attention);

    rf_phase phase = rf_stream_get_phase(stream);
    rf_stream_set_phase(stream, RF_PHASE_PLAN);
    st = check_operators(s, err);
    if (st == RF_OK) st = allocate(s, err);
    if (st == RF_OK) st = warm_up(s, err);
    rf_stream_set_phase(stream, phase);
    if (st == RF_OK)
        *out = s;
    else
        rf_dit_session_destroy(s);
    return st;
}

void rf_dit_session_destroy(rf_dit_session *session) {
    if (session == NULL) return;
    rf_backend *backend = rf_stream_backend(session->stream);
    rf_stream_synchronize(session->stream, NULL);
    rf_backend_free_pinned(backend, session->host_timesteps);
    rf_backend_free_pinned(backend, session->host_ints);
    rf_backend_free(backend, session->memory);
    rf_free(session);
}

/* --- a run ----------------------------------------------------------------------------------------------------------- */

rf_status rf_dit_session_begin(rf_dit_session *s, const float *timesteps, int num_steps, const int32_t *labels,
                               rf_error *err) {
    const rf_dit_desc *d = &s->model->desc;
    if (num_steps < 1 || num_steps > s->options.max_steps)
        return rf_fail(err, RF_ERR_ARGUMENT, "%d steps in a session planned for %d", num_steps, s->options.max_steps);
    for (int64_t i = 0; i < s->samples; i++)
        if (d->num_classes > 0 && (labels[i] < 0 || labels[i] > d->num_classes))
            return rf_fail(err, RF_ERR_ARGUMENT, "label %d, expected 0..%d", labels[i], d->num_classes);

    /* host buffers may still be read by an earlier run's uploads */
    rf_status st = rf_stream_synchronize(s->stream, err);
    if (st != RF_OK) return st;

    /* slot of a sample: the first slot with its label */
    int32_t *slots = s->host_ints, *label_rows = s->host_ints + s->samples;
    int used = 0;
    for (int64_t i = 0; i < s->samples; i++) {
        int slot = 0;
        while (slot < used && label_rows[slot] != labels[i]) slot++;
        if (slot == s->rows_per_step)
            return rf_fail(err, RF_ERR_ARGUMENT, "more than %d distinct labels in a run", s->rows_per_step);
        if (slot == used) label_rows[used++] = labels[i];
        slots[i] = slot;
    }
    for (; used < s->rows_per_step; used++) label_rows[used] = label_rows[0];
    for (int i = s->rows_per_step; i < s->steps_per_chunk * s->rows_per_step; i++)
        label_rows[i] = label_rows[i - s->rows_per_step];
    for (int i = 0; i < s->padded_steps; i++) {
        float t = timesteps[i < num_steps ? i : num_steps - 1] * (float)d->timestep_scale;
        for (int u = 0; u < s->rows_per_step; u++) s->host_timesteps[i * s->rows_per_step + u] = t;
    }

    size_t num_rows = (size_t)s->steps_per_chunk * (size_t)s->rows_per_step;
    st = rf_stream_upload(s->stream, s->b.slots, slots, (size_t)s->samples * sizeof(int32_t), err);
    if (st == RF_OK) st = rf_stream_upload(s->stream, s->b.label_rows, label_rows, num_rows * sizeof(int32_t), err);
    if (st == RF_OK)
        st = rf_stream_upload(s->stream, s->b.timesteps, s->host_timesteps,
                              (size_t)s->padded_steps * (size_t)s->rows_per_step * sizeof(float), err);
    if (st == RF_OK) st = rf_stream_zero(s->stream, s->b.step, sizeof(int32_t), err);
    if (st == RF_OK) st = queue_modulation(s, s->stream, 0, err);
    if (st == RF_OK) st = queue_advance(s, s->stream, 0, err);
    s->num_steps = num_steps;
    s->step = 0;
    return st;
}

rf_status rf_dit_session_forward(rf_dit_session *s, const float *latent, const float *in_scale, int64_t in_scale_stride,
                                 rf_error *err) {
    return walk(s, s->stream, latent, in_scale, in_scale_stride, err);
}

rf_status rf_dit_session_queue_advance(rf_dit_session *s, rf_error *err) {
    return queue_advance(s, s->stream, 1, err);
}

rf_status rf_dit_session_next_step(rf_dit_session *s, rf_error *err) {
    s->step++;
    if (s->step < s->num_steps && s->step % s->steps_per_chunk == 0)
        return queue_modulation(s, s->stream, s->step / s->steps_per_chunk, err);
    return RF_OK;
}

const float *rf_dit_session_output(const rf_dit_session *session) {
    return session->b.out;
}
const int32_t *rf_dit_session_step(const rf_dit_session *session) {
    return session->b.step;
}
size_t rf_dit_session_arena_bytes(const rf_dit_session *session) {
    return session->memory_bytes;
}
int rf_dit_session_steps_per_chunk(const rf_dit_session *session) {
    return session->steps_per_chunk;
}

void rf_dit_session_set_observer(rf_dit_session *session, rf_dit_observer observer, void *user) {
    session->observer = observer;
    session->observer_user = user;
}
