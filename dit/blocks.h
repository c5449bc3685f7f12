/* dit/blocks.h - the description of a diffusion transformer: what the executor runs from.
 *
 * A family is data in this grammar plus a weight map; the executor (dit/forward.c) never asks for a model's name. What a
 * description asks for and no kernel can do is refused when a session is planned.
 *
 *   x     = PatchLinear(latent) + pos
 *   c     = MLP_t(fourier(t)) + adders                    adders: class label, action (later: pooled text, guidance)
 *   mod   = W SiLU(c) per block                           a row of `num_chunks` vectors of `width`, for a sample or a frame
 *   block = for part in parts:  y = norm(x) (1 + scale) + shift;  o = f(y);  x += gate * o
 *   out   = Linear(norm(x) (1 + scale) + shift), rows in order (channel, pt, ph, pw)
 *
 * cond_dim 0: no conditioning at all (the transformers of a VAE); then there are no chunks, and norms may have weights.
 *
 *   DiT        L x { SELF(chunks 0,1 -> 2)  MLP(3,4 -> 5) }
 *   open-oasis L x { SELF(FRAME, rope 0; 0,1 -> 2)  MLP(3,4 -> 5)  SELF(PIXEL, causal, rope 1; 6,7 -> 8)  MLP(9,10 -> 11) }
 *   its VAE    L x { SELF(affine norm, rope 0)  MLP(affine norm) } */
#ifndef RF_DIT_BLOCKS_H
#define RF_DIT_BLOCKS_H

#include "core/status.h"
#include "kernels/gemm.h"
#include "kernels/norm.h"

#ifdef __cplusplus
extern "C" {
#endif

#define RF_MAX_SEGMENTS 2 /* rows are [text | image]; a family without text rows has the image segment alone */
#define RF_MAX_PARTS    4
#define RF_MAX_GROUPS   4
#define RF_MAX_ROPES    2
#define RF_MAX_STREAMS  4

typedef enum {
    RF_PART_SELF = 0, /* self-attention over the rows of its segments */
    RF_PART_CROSS,    /* attention to a context whose K,V do not change during a run */
    RF_PART_MLP,
    RF_PART_PARALLEL /* SELF and MLP on one normed input, one output matrix */
} rf_part_kind;

typedef enum {
    RF_SCOPE_ALL = 0, /* all rows of a sample see each other */
    RF_SCOPE_FRAME,   /* rows of one frame */
    RF_SCOPE_PIXEL    /* one pixel over the frames */
} rf_scope;

typedef enum { RF_QK_NORM_NONE = 0, RF_QK_NORM_RMS_HEAD, RF_QK_NORM_LAYER_HEAD, RF_QK_NORM_RMS_ALL } rf_qk_norm;
typedef enum { RF_PART_NORM_NONE = 0, RF_PART_NORM_LAYER, RF_PART_NORM_LAYER_AFFINE, RF_PART_NORM_RMS } rf_part_norm;
typedef enum { RF_MOD_ROWS_SAMPLE = 0, RF_MOD_ROWS_FRAME, RF_MOD_ROWS_SEGMENT } rf_mod_rows;
typedef enum { RF_POS_NONE = 0, RF_POS_SINCOS_2D } rf_pos_kind;

/* Rotary positions (kernels/rope.h). AXIAL: by row and column of a frame, num_pairs pairs an axis, "pixel" frequencies up to max_freq;
 * TIME: by frame, num_pairs pairs in all. */
typedef enum { RF_ROPE_AXIAL = 0, RF_ROPE_TIME } rf_rope_kind;
typedef struct {
    rf_rope_kind kind;
    int num_pairs;
    double max_freq, theta;
} rf_rope_desc;

/* How one segment takes part. Chunk indices into the block's modulation row; -1 = none. */
typedef struct {
    bool present;
    int weight_set; /* two segments that name the same set share weights */
    int shift, scale, gate;
} rf_part_segment;

typedef struct {
    rf_part_kind kind;
    rf_part_segment segments[RF_MAX_SEGMENTS]; /* [0] is the image segment, [1] text */
    bool from_block_input;                     /* reads the block's input, not the current residual (SD3.5) */
    rf_part_norm norm;
    double norm_eps;
    rf_qk_norm qk_norm;
    double qk_eps;
    int rope; /* index in the description's ropes, -1 = none */
    rf_scope scope;
    bool causal_frames; /* PIXEL: a row sees its own and earlier frames */
    bool masked;        /* text keys past a sample's length are not seen */
    bool qkv_bias, out_bias;
    int64_t ffn_dim; /* MLP, PARALLEL */
    rf_act act;
    bool dead; /* output dropped: only K,V are needed (text rows of a last joint block) */
} rf_part_desc;

typedef struct {
    int count;      /* blocks in a row with these parts */
    int num_chunks; /* vectors of `width` in a block's modulation row */
    int num_parts;
    rf_part_desc parts[RF_MAX_PARTS];
} rf_block_group;

typedef struct {
    char family[32]; /* for people: "DiT"; nothing may branch on it */
    int64_t width;
    int num_heads, head_dim;
    int num_segments;

    int pt, ph, pw;
    int in_channels, out_channels; /* of a denoiser: out_channels = 2 * in_channels: a variance half */
    /* Channels of each stream (modality: colour, depth, rays ...) of a denoiser's output, in order; they add up to in_channels. Policies
     * that look at tokens keep statistics for each. 0 streams = one of all channels. */
    int num_streams, stream_channels[RF_MAX_STREAMS];
    int out_patch; /* side of the square patch that comes out (the two halves of a VAE); 0 = the patch that goes in */
    rf_pos_kind pos;
    double pos_base_size;     /* patches per side that positions were trained for; 0 = the grid itself */
    double pos_interpolation; /* positions are index * (base / grid) / interpolation */
    int num_ropes;
    rf_rope_desc ropes[RF_MAX_ROPES];

    /* timestep embedding */
    int num_freqs;     /* dim of the Fourier vector */
    double freq_shift; /* 1 in diffusers' DiT, 0 in the original */
    double max_period;
    double timestep_scale;
    int64_t cond_dim; /* width of c; 0 = no conditioning */
    int num_classes;  /* label table has num_classes + 1 rows, the last is the null class; 0 = no label adder */
    int action_dim;   /* numbers a frame is told beside its timestep; 0 = no action adder */

    rf_mod_rows mod_rows;
    rf_part_norm final_norm; /* LAYER, or LAYER_AFFINE without conditioning */
    double final_eps;

    /* guidance: how branches are combined by default */
    int guided_channels; /* channels that guidance acts on: in_channels (diffusers) or 3 (original DiT) */

    int64_t sample_size;  /* latent height the model was trained at */
    int64_t sample_width; /* and width; 0 = the same */
    int64_t sample_frames;

    int num_groups;
    rf_block_group groups[RF_MAX_GROUPS];
} rf_dit_desc;

int rf_dit_desc_num_blocks(const rf_dit_desc *desc);
/* Parts with scope PIXEL in the whole model: they need a context (dit/context.h). */
int rf_dit_desc_num_temporal(const rf_dit_desc *desc);
/* Vectors of `width` in the modulation row of the whole model: all blocks and the final (shift, scale); 0 without conditioning. */
int64_t rf_dit_desc_num_chunks(const rf_dit_desc *desc);
/* Numbers that the head gives for a token: out_channels times the patch that comes out. */
int64_t rf_dit_desc_out_dim(const rf_dit_desc *desc);
/* Internal consistency: positive sizes, heads * head_dim = width, chunk indices in range, ... */
rf_status rf_dit_desc_check(const rf_dit_desc *desc, rf_error *err);

#ifdef __cplusplus
}
#endif
#endif
