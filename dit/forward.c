/* dit/forward.c - the executor: planning of a session, and the runs on it.
 *
 * Arena (device), R = branches*batch*tokens rows:
 *   patches [R, patch_dim]  x [R, width]  h [R, width]  y [R, width]  wide [R, max(3 width, ffn)]  attn [R, width]
 *   out [R, out_dim] f32    modulation table and what makes it, pos [tokens, width], slots, indices, step */
#include "dit/forward_internal.h"

#include <math.h>
#include <string.h>

#include "core/arena.h"
#include "core/memory.h"

rf_dit_session_options rf_dit_session_options_default(void) {
    return (rf_dit_session_options){.batch = 1,
                                    .branches = 1,
                                    .frames = 1,
                                    .max_steps = 1,
                                    .residual_dtype = RF_DTYPE_COUNT,
                                    .modulation_budget_bytes = (size_t)1 << 30};
}

/* What the grammar can say and this executor cannot do. */
static rf_status check_supported(const rf_dit_desc *d, rf_error *err) {
    if (d->num_segments != 1) return rf_fail(err, RF_ERR_UNSUPPORTED, "text segments are not supported");
    if (d->mod_rows == RF_MOD_ROWS_SEGMENT)
        return rf_fail(err, RF_ERR_UNSUPPORTED, "modulation rows by segment are not supported");
    if (d->mod_rows == RF_MOD_ROWS_FRAME && d->pt != 1)
        return rf_fail(err, RF_ERR_UNSUPPORTED, "modulation by frame with patches of several frames is not supported");
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
            else if (part->scope == RF_SCOPE_PIXEL && (!part->causal_frames || d->mod_rows != RF_MOD_ROWS_FRAME))
                what = "attention over frames that is not causal, or without modulation by frame";
            else if (part->scope == RF_SCOPE_PIXEL && (part->rope < 0 || d->ropes[part->rope].kind != RF_ROPE_TIME))
                what = "attention over frames without rotary positions in time";
            else if (part->scope != RF_SCOPE_PIXEL && part->rope >= 0 && d->ropes[part->rope].kind != RF_ROPE_AXIAL)
                what = "rotary positions in time inside a frame";
            else if (part->scope == RF_SCOPE_ALL && part->rope >= 0 && d->mod_rows == RF_MOD_ROWS_FRAME)
                what = "rotary attention of all frames at once";
            else if (part->masked || part->dead)
                what = "masked or dead rows";
            if (what != NULL) return rf_fail(err, RF_ERR_UNSUPPORTED, "%s are not supported", what);
        }
    }
    return RF_OK;
}
/* --- modulation ------------------------------------------------------------------------------------------------------ */

/* c = MLP_t(fourier(t)) + label or action, row = W SiLU(c) + b. */
rf_status rf_dit_queue_modulation(rf_dit_session *s, rf_stream *stream, int chunk, rf_error *err) {
    const rf_dit_desc *d = &s->model->desc;
    const rf_dit_pass whole = rf_dit_whole_batch(s, stream), *p = &whole;
    rf_dtype dtype = s->model->dtype;
    int64_t rows = (int64_t)s->steps_per_chunk * s->rows_per_step;
    if (d->cond_dim == 0) return RF_OK;
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
        st = rf_dit_linear(p, &s->model->temb1, s->b.fourier, s->b.temb_hidden, rows, d->cond_dim, d->num_freqs,
                           RF_ACT_SILU, dtype, err);
    if (st == RF_OK)
        st = rf_dit_linear(p, &s->model->temb2, s->b.temb_hidden, s->b.temb, rows, d->cond_dim, d->cond_dim,
                           RF_ACT_NONE, dtype, err);
    rf_elementwise_args add = rf_elementwise_args_default(dtype, dtype, rows, d->cond_dim);
    add.x = s->b.temb;
    add.y = s->b.cond;
    add.act = RF_ACT_SILU;
    if (d->action_dim > 0 && st == RF_OK)
        st = rf_dit_linear(p, &s->model->action, s->b.actions, s->b.action_emb, s->rows_per_step, d->cond_dim,
                           rf_dit_padded_actions(d), RF_ACT_NONE, dtype, err);
    if (d->action_dim > 0) {
        add.add = s->b.action_emb;
        add.add_dtype = dtype;
        add.add_index = s->b.label_rows;
        add.add_period = s->rows_per_step;
    } else if (d->num_classes > 0) {
        add.add = s->model->labels;
        add.add_dtype = dtype;
        add.add_index = s->b.label_rows;
        add.add_period = d->num_classes + 1;
    }
    if (st == RF_OK) st = s->ops->elementwise(stream, &add, err);
    if (st == RF_OK)
        st = rf_dit_linear(p, &s->model->mod, s->b.cond, s->b.table, rows, s->chunk_cols, d->cond_dim, RF_ACT_NONE,
                           dtype, err);
    return st;
}

static rf_status queue_advance(rf_dit_session *s, rf_stream *stream, int increment, rf_error *err) {
    rf_step_advance_args args = {.step = s->b.step,
                                 .increment = increment,
                                 .slots = s->b.slots,
                                 .mod_index = s->b.mod_index,
                                 .num_groups = s->mod_groups,
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

/* Floats of a rotary table. */
static size_t rope_elems(const rf_dit_session *s, int rope) {
    const rf_rope_desc *r = &s->model->desc.ropes[rope];
    if (rope >= s->model->desc.num_ropes) return 0;
    if (r->kind == RF_ROPE_AXIAL) return (size_t)s->frame_tokens * 4 * (size_t)r->num_pairs;
    return (size_t)RF_MAX_WINDOW * 2 * (size_t)r->num_pairs;
}

/* Hands out every buffer; run twice, counting and real. */
static rf_status take_buffers(rf_dit_session *s, rf_arena *arena, rf_error *err) {
    const rf_dit_desc *d = &s->model->desc;
    size_t act = rf_dtype_bytes(s->model->dtype), rows = (size_t)s->rows, width = (size_t)d->width;
    size_t step_rows = d->cond_dim ? (size_t)s->rows_per_step : 0;
    size_t mod_rows = (size_t)s->steps_per_chunk * step_rows, actions = d->action_dim ? step_rows : 0;
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
        {(void **)&s->b.out_packed, "packed model output", s->options.policy ? rows * (size_t)s->out_dim : 0,
         sizeof(float)},
        {&s->b.attn_workspace, "attention workspace", s->b.attn_workspace_bytes, 1},
        {&s->b.pos, "positions", (size_t)s->tokens * width, sizeof(float)},
        {(void **)&s->b.ropes[0], "rotary positions", rope_elems(s, 0), sizeof(float)},
        {(void **)&s->b.ropes[1], "rotary positions", rope_elems(s, 1), sizeof(float)},
        {&s->b.table, "modulation table", mod_rows * (size_t)s->chunk_cols, act},
        {(void **)&s->b.timesteps, "timesteps", (size_t)s->padded_steps * step_rows, sizeof(float)},
        {(void **)&s->b.label_rows, "label rows", mod_rows, sizeof(int32_t)},
        {&s->b.actions, "actions", actions * (size_t)rf_dit_padded_actions(d), act},
        {&s->b.action_emb, "action embedding", actions * (size_t)d->cond_dim, act},
        {&s->b.fourier, "timestep frequencies", mod_rows * (size_t)d->num_freqs, act},
        {&s->b.temb_hidden, "timestep MLP", mod_rows * (size_t)d->cond_dim, act},
        {&s->b.temb, "timestep embedding", mod_rows * (size_t)d->cond_dim, act},
        {&s->b.cond, "condition", mod_rows * (size_t)d->cond_dim, act},
        {(void **)&s->b.slots, "modulation slots", (size_t)s->mod_groups, sizeof(int32_t)},
        {(void **)&s->b.mod_index, "modulation index", (size_t)s->mod_groups, sizeof(int32_t)},
        {(void **)&s->b.packed_mod_index, "packed modulation index", s->options.policy ? (size_t)s->samples : 0,
         sizeof(int32_t)},
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
    if (d->pos == RF_POS_NONE) {
        memset(out, 0, (size_t)(grid_h * grid_w * d->width) * sizeof *out);
        return;
    }
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

/* The most that any pass of this session asks for: with a policy also fewer samples, and fewer queries. */
static size_t attention_workspace(const rf_dit_session *s) {
    const rf_dit_desc *d = &s->model->desc;
    rf_backend *backend = rf_stream_backend(s->stream);
    bool by_frame = d->groups[0].parts[0].scope == RF_SCOPE_FRAME;
    int64_t len = by_frame ? s->frame_tokens : s->tokens, sequences = s->samples * (by_frame ? s->frames : 1);
    rf_attention_args args =
        rf_attention_args_packed(s->model->dtype, sequences, len, d->num_heads, d->head_dim, NULL, NULL);
    size_t most = s->ops->attention_workspace(backend, &args);
    if (s->options.policy == NULL) return most;
    for (int64_t i = 0; i < s->samples + s->tokens; i++) {
        args.batch = i < s->samples ? i + 1 : s->samples;
        args.q_len = i < s->samples ? s->tokens : i - s->samples + 1;
        size_t bytes = s->ops->attention_workspace(backend, &args);
        if (bytes > most) most = bytes;
    }
    return most;
}

static rf_status check_options(const rf_dit_model *model, const rf_dit_session_options *o, rf_error *err) {
    const rf_dit_desc *d = &model->desc;
    RF_TRY(check_supported(d, err));
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
    if (rf_dit_desc_num_temporal(d) > 0) {
        int64_t frame_tokens = o->height / d->ph * (o->width / d->pw);
        if (o->context == NULL)
            return rf_fail(err, RF_ERR_ARGUMENT, "attention over frames needs a context (dit/context.h)");
        if (rf_dit_context_samples(o->context) != o->batch * o->branches ||
            rf_dit_context_tokens(o->context) != frame_tokens)
            return rf_fail(err, RF_ERR_SHAPE, "a context for %lld x %lld tokens, expected %lld x %lld",
                           (long long)rf_dit_context_samples(o->context), (long long)rf_dit_context_tokens(o->context),
                           (long long)o->batch * o->branches, (long long)frame_tokens);
        if (o->frames > RF_MAX_WINDOW)
            return rf_fail(err, RF_ERR_ARGUMENT, "%lld frames in a pass, expected up to %d", (long long)o->frames,
                           RF_MAX_WINDOW);
    }
    if (o->policy != NULL && d->mod_rows == RF_MOD_ROWS_FRAME && o->frames != 1)
        return rf_fail(err, RF_ERR_UNSUPPORTED, "a policy works on passes of one frame, not %lld",
                       (long long)o->frames);
    if (o->residual_dtype != RF_DTYPE_F32 && o->residual_dtype != RF_DTYPE_COUNT && o->residual_dtype != model->dtype)
        return rf_fail(err, RF_ERR_DTYPE, "residual dtype %s, expected f32 or the model's %s",
                       rf_dtype_name(o->residual_dtype), rf_dtype_name(model->dtype));
    return RF_OK;
}

/* Does the attention of this backend turn queries and keys itself at these shapes? */
static bool takes_rope(const rf_dit_session *s) {
    const rf_dit_desc *d = &s->model->desc;
    const rf_part_desc *first = &d->groups[0].parts[0];
    if (first->kind != RF_PART_SELF || first->rope < 0) return false;
    rf_attention_args args = rf_attention_args_packed(s->model->dtype, s->samples * s->frames, s->frame_tokens,
                                                      d->num_heads, d->head_dim, NULL, NULL);
    args.rope = (const float *)(const void *)s; /* any address: nothing is read */
    args.rope_pairs = 2 * d->ropes[first->rope].num_pairs;
    return s->ops->attention(NULL, &args, NULL) == RF_OK;
}

/* Dry run of every operator with the shapes of this session. */
static rf_status check_operators(rf_dit_session *s, rf_error *err) {
    rf_status st = rf_dit_queue_modulation(s, NULL, 0, err);
    if (st == RF_OK && s->model->desc.cond_dim) st = queue_advance(s, NULL, 0, err);
    if (st == RF_OK) st = rf_dit_walk(s, NULL, NULL, NULL, 0, err);
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
    size_t num_ints = (size_t)s->mod_groups + (size_t)s->steps_per_chunk * (size_t)s->rows_per_step;
    size_t action_bytes =
        (size_t)s->rows_per_step * (size_t)rf_dit_padded_actions(&s->model->desc) * rf_dtype_bytes(s->model->dtype);
    size_t num_floats = (size_t)s->padded_steps * (size_t)s->rows_per_step;
    if (st == RF_OK)
        st = rf_backend_alloc_pinned(backend, (void **)&s->host_timesteps, num_floats * sizeof(float), err);
    if (st == RF_OK) st = rf_backend_alloc_pinned(backend, (void **)&s->host_ints, num_ints * sizeof(int32_t), err);
    if (st == RF_OK && action_bytes > 0)
        st = rf_backend_alloc_pinned(backend, (void **)&s->host_actions, action_bytes, err);
    return st;
}

/* Tables that never change, then one pass over everything with random numbers in the buffers: operators tune themselves and
 * load their code now, not in the loop. */
static rf_status warm_up(rf_dit_session *s, rf_error *err) {
    const rf_dit_desc *d = &s->model->desc;
    int64_t grid_h = s->options.height / d->ph, grid_w = s->options.width / d->pw;
    size_t num_pos = (size_t)(s->tokens * d->width), most = num_pos;
    for (int i = 0; i < d->num_ropes; i++)
        if (rope_elems(s, i) > most) most = rope_elems(s, i);
    float *host = rf_alloc(most * sizeof(float));
    if (host == NULL) return rf_fail(err, RF_ERR_MEMORY, "out of memory for a position table");

    size_t elem = rf_dtype_bytes(s->model->dtype);
    rf_fill_normal_args fill = {
        .out = s->memory, .dtype = s->model->dtype, .num = (int64_t)(s->memory_bytes / elem), .std = 1.0f};
    rf_status st = s->ops->fill_normal(s->stream, &fill, err);
    for (int64_t frame = 0; frame < s->frames; frame++)
        fill_positions(d, grid_h, grid_w, host + frame * s->frame_tokens * d->width);
    if (st == RF_OK) st = rf_stream_upload(s->stream, s->b.pos, host, num_pos * sizeof(float), err);
    if (st == RF_OK) st = rf_stream_synchronize(s->stream, err);
    for (int i = 0; i < d->num_ropes && st == RF_OK; i++) {
        const rf_rope_desc *r = &d->ropes[i];
        if (r->kind == RF_ROPE_AXIAL)
            rf_rope_table_axial(host, grid_h, grid_w, r->num_pairs, r->max_freq);
        else
            rf_rope_table_time(host, RF_MAX_WINDOW, r->num_pairs, r->theta);
        st = rf_stream_upload(s->stream, s->b.ropes[i], host, rope_elems(s, i) * sizeof(float), err);
        if (st == RF_OK) st = rf_stream_synchronize(s->stream, err);
    }
    rf_free(host);

    float zero = 0.0f;
    int32_t *labels = rf_alloc_zero((size_t)s->samples, sizeof *labels);
    if (labels == NULL) return rf_fail(err, RF_ERR_MEMORY, "out of memory for labels");
    if (st == RF_OK && d->cond_dim) st = rf_dit_session_begin(s, &zero, 1, labels, err);
    /* what is seen now need not be planned later; long passes over frames are planned as they come */
    size_t latent_bytes =
        (size_t)(s->options.batch * d->in_channels * s->options.frames * s->options.height * s->options.width) *
        sizeof(float);
    if (d->mod_rows == RF_MOD_ROWS_FRAME && s->frames > 1)
        s->seen_frames = 0;
    else if (st == RF_OK &&
             latent_bytes <=
                 s->memory_bytes) /* any finite floats will do as latents: the arena is full of them, and larger */
        st = rf_dit_walk(s, s->stream, s->memory, NULL, 0, err);
    if (st == RF_OK) st = rf_stream_synchronize(s->stream, err);
    rf_free(labels);
    return st;
}

/* The size of the passes from here on. */
static void set_frames(rf_dit_session *s, int64_t frames) {
    bool by_frame = s->model->desc.mod_rows == RF_MOD_ROWS_FRAME;
    s->frames = frames;
    s->tokens = frames * s->frame_tokens;
    s->rows = s->samples * s->tokens;
    s->mod_groups = by_frame ? s->samples * frames : s->samples;
    s->rows_per_group = by_frame ? s->frame_tokens : s->tokens;
    /* distinct labels of a run: one per sample of the first branch and the null label of the second */
    s->rows_per_step = (int)(by_frame ? s->mod_groups : s->options.batch + (s->options.branches > 1));
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
    s->frame_tokens = (options->height / d->ph) * (options->width / d->pw);
    set_frames(s, options->frames / d->pt);
    s->patch_dim = (int64_t)d->in_channels * d->pt * d->ph * d->pw;
    s->out_dim = rf_dit_desc_out_dim(d);
    s->chunk_cols = rf_dit_desc_num_chunks(d) * d->width;
    size_t step_bytes = (size_t)s->rows_per_step * (size_t)s->chunk_cols * rf_dtype_bytes(model->dtype);
    int64_t fit = step_bytes ? (int64_t)(options->modulation_budget_bytes / step_bytes) : 1;
    s->steps_per_chunk = (int)(fit < 1 ? 1 : fit > options->max_steps ? options->max_steps : fit);
    s->padded_steps = (options->max_steps + s->steps_per_chunk - 1) / s->steps_per_chunk * s->steps_per_chunk;

    s->b.attn_workspace_bytes = attention_workspace(s);

    rf_phase phase = rf_stream_get_phase(stream);
    rf_stream_set_phase(stream, RF_PHASE_PLAN);
    s->fused_rope = takes_rope(s);
    st = check_operators(s, err);
    if (st == RF_OK) st = allocate(s, err);
    if (st == RF_OK) st = warm_up(s, err);
    if (st == RF_OK && options->policy != NULL) st = rf_dit_create_cache(s, err);
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
    rf_dit_destroy_cache(session);
    rf_backend_free_pinned(backend, session->host_timesteps);
    rf_backend_free_pinned(backend, session->host_ints);
    rf_backend_free_pinned(backend, session->host_actions);
    rf_backend_free(backend, session->memory);
    rf_free(session);
}

/* --- a run ----------------------------------------------------------------------------------------------------------- */

static rf_status check_steps(const rf_dit_session *s, int num_steps, rf_error *err) {
    if (s->model->desc.cond_dim == 0)
        return rf_fail(err, RF_ERR_ARGUMENT, "a model without timesteps has no runs to begin");
    if (num_steps < 1 || num_steps > s->options.max_steps)
        return rf_fail(err, RF_ERR_ARGUMENT, "%d steps in a session planned for %d", num_steps, s->options.max_steps);
    if (s->cache != NULL && num_steps != s->options.max_steps)
        return rf_fail(err, RF_ERR_ARGUMENT, "%d steps in a session whose policy was planned for %d", num_steps,
                       s->options.max_steps);
    return RF_OK;
}

/* Everything staged on the host goes to the device, and the first modulation rows are queued. */
static rf_status start_run(rf_dit_session *s, int num_steps, rf_error *err) {
    int64_t rows = (int64_t)s->steps_per_chunk * s->rows_per_step;
    const int32_t *slots = s->host_ints, *label_rows = s->host_ints + s->mod_groups;
    rf_status st = rf_stream_upload(s->stream, s->b.slots, slots, (size_t)s->mod_groups * sizeof(int32_t), err);
    if (st == RF_OK) st = rf_stream_upload(s->stream, s->b.label_rows, label_rows, (size_t)rows * sizeof(int32_t), err);
    if (st == RF_OK)
        st = rf_stream_upload(s->stream, s->b.timesteps, s->host_timesteps,
                              (size_t)s->padded_steps * (size_t)s->rows_per_step * sizeof(float), err);
    if (st == RF_OK) st = rf_stream_zero(s->stream, s->b.step, sizeof(int32_t), err);
    if (st == RF_OK) st = rf_dit_queue_modulation(s, s->stream, 0, err);
    if (st == RF_OK) st = queue_advance(s, s->stream, 0, err);
    s->num_steps = num_steps;
    s->step = 0;
    if (st == RF_OK && s->cache != NULL) {
        st = rf_cache_begin(s->cache, err);
        s->head_step = -1;
    }
    return st;
}

rf_status rf_dit_session_begin(rf_dit_session *s, const float *timesteps, int num_steps, const int32_t *labels,
                               rf_error *err) {
    const rf_dit_desc *d = &s->model->desc;
    RF_TRY(check_steps(s, num_steps, err));
    if (d->mod_rows == RF_MOD_ROWS_FRAME)
        return rf_dit_session_begin_frames(s, (int)s->frames, timesteps, 1, num_steps, NULL, err);
    for (int64_t i = 0; i < s->samples; i++)
        if (d->num_classes > 0 && (labels[i] < 0 || labels[i] > d->num_classes))
            return rf_fail(err, RF_ERR_ARGUMENT, "label %d, expected 0..%d", labels[i], d->num_classes);

    /* host buffers may still be read by an earlier run's uploads */
    RF_TRY(rf_stream_synchronize(s->stream, err));

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
    return start_run(s, num_steps, err);
}

rf_status rf_dit_session_begin_frames(rf_dit_session *s, int frames, const float *timesteps, int64_t timestep_stride,
                                      int num_steps, const float *actions, rf_error *err) {
    const rf_dit_desc *d = &s->model->desc;
    RF_TRY(check_steps(s, num_steps, err));
    if (d->mod_rows != RF_MOD_ROWS_FRAME)
        return rf_fail(err, RF_ERR_ARGUMENT, "this model is not told a timestep for every frame");
    if (frames < 1 || frames > s->options.frames || (s->cache != NULL && frames != s->options.frames))
        return rf_fail(err, RF_ERR_ARGUMENT, "%d frames in a session planned for %lld", frames,
                       (long long)s->options.frames);
    RF_TRY(rf_stream_synchronize(s->stream, err)); /* as above */
    set_frames(s, frames);
    int num = s->rows_per_step;
    int64_t padded = rf_dit_padded_actions(d);
    int32_t *slots = s->host_ints, *action_rows = s->host_ints + s->mod_groups;
    for (int i = 0; i < num; i++) slots[i] = i;
    for (int i = 0; i < s->steps_per_chunk * num; i++) action_rows[i] = i % num;
    for (int i = 0; i < s->padded_steps; i++)
        for (int u = 0; u < num; u++)
            s->host_timesteps[i * num + u] =
                timesteps[(i < num_steps ? i : num_steps - 1) * timestep_stride + (timestep_stride > 1 ? u : 0)] *
                (float)d->timestep_scale;
    for (int64_t i = 0; i < num * padded; i++) {
        int64_t u = i / padded, a = i % padded;
        float value = actions != NULL && a < d->action_dim ? actions[u * d->action_dim + a] : 0.0f;
        if (s->model->dtype == RF_DTYPE_BF16)
            ((uint16_t *)(void *)s->host_actions)[i] = rf_f32_to_bf16(value);
        else
            ((float *)(void *)s->host_actions)[i] = value;
    }
    if (d->action_dim > 0)
        RF_TRY(rf_stream_upload(s->stream, s->b.actions, s->host_actions,
                                (size_t)(num * padded) * rf_dtype_bytes(s->model->dtype), err));
    rf_phase phase = rf_stream_get_phase(s->stream);
    if ((s->seen_frames >> (frames % 64) & 1) == 0) rf_stream_set_phase(s->stream, RF_PHASE_PLAN);
    rf_status st = start_run(s, num_steps, err);
    rf_stream_set_phase(s->stream, phase);
    return st;
}

rf_status rf_dit_session_forward(rf_dit_session *s, const float *latent, const float *in_scale, int64_t in_scale_stride,
                                 rf_error *err) {
    /* a size of pass that is new: operators may choose their algorithms */
    bool seen = s->seen_frames >> (s->frames % 64) & 1;
    rf_phase phase = rf_stream_get_phase(s->stream);
    if (!seen) rf_stream_set_phase(s->stream, RF_PHASE_PLAN);
    rf_status st = rf_dit_walk(s, s->stream, latent, in_scale, in_scale_stride, err);
    rf_stream_set_phase(s->stream, phase);
    if (st == RF_OK) s->seen_frames |= (uint64_t)1 << (s->frames % 64);
    return st;
}

rf_status rf_dit_session_queue_advance(rf_dit_session *s, rf_error *err) {
    return queue_advance(s, s->stream, 1, err);
}

rf_status rf_dit_session_next_step(rf_dit_session *s, rf_error *err) {
    s->step++;
    if (s->step < s->num_steps && s->step % s->steps_per_chunk == 0)
        return rf_dit_queue_modulation(s, s->stream, s->step / s->steps_per_chunk, err);
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
