/* kernels/conv_mma.cu - convolution as an implicit GEMM on the tensor cores (mma.sync), without a column buffer.
 * Maths    as kernels/conv.cu; bf16 in and out, f32 accumulation, bias (f32) and addend (bf16) before the one rounding.
 * Shapes   in_channels a multiple of 64, out_channels of 8; 1x1 or 3x3, stride 1 or 2, optional doubling of x on the read.
 * Mapping  GEMM of M = output pixels, N = output channels, K = taps x in_channels. The weights [out, tap, in] are the GEMM's
 *          B with K contiguous. A row of A for one K block of 64 is 64 neighbouring channels of one input pixel: 128 bytes
 *          that cp.async copies, or fills with zeros where the tap falls into the padding.
 * Launch   block = BM pixels x BN channels, pixels fastest so that neighbours share weights; a ring of 3 stages in shared
 *          memory, rows of 128 bytes with 16-byte chunk c of row r at c ^ (r & 7): no bank conflict for cp.async or ldmatrix.
 *            large  128 x 128, 256 threads, warps 2 x 4 of 64 x 32      96 KiB, two blocks per H100 multiprocessor
 *            small   64 x 64,  128 threads, warps 2 x 2 of 32 x 32      48 KiB, for grids that would leave the card idle
 * Cost     compute bound: 2 M N K flop.  Arch  sm_80 and later.
 * Checked  tests/kernels against the CPU table. */
#include <cuda_runtime.h>

#include "kernels/conv_mma.h"
#include "kernels/device.cuh"
#include "kernels/launch.cuh"

#define BK     64
#define STAGES 3

typedef struct {
    const rf_bf16 *x, *w, *addend;
    const float *bias;
    rf_bf16 *y;
    int height, width, in, out_w, out_hw, out, pixels; /* out_hw: pixels of one output image */
    int kernel, stride, pad, up;
} conv_args;

static __device__ __forceinline__ void copy16(uint32_t dst, const void *src, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(valid ? 16 : 0) : "memory");
}
static __device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t addr) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(addr)
                 : "memory");
}
static __device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
/* Byte offset of a 16-byte chunk in a tile with rows of 128 bytes. */
static __device__ __forceinline__ uint32_t swizzled(int row, int chunk) {
    return (uint32_t)(row * 128 + ((chunk ^ (row & 7)) << 4));
}

template <int BM, int BN, int WARPS_M, int WARPS_N, int BLOCKS_PER_SM>
static __global__ void __launch_bounds__(WARPS_M *WARPS_N * 32, BLOCKS_PER_SM) conv_kernel(const conv_args e) {
    constexpr int threads = WARPS_M * WARPS_N * 32, rows_at_once = threads / 8;
    constexpr int a_rows = BM / rows_at_once, b_rows = BN / rows_at_once; /* rows a thread copies a chunk of */
    constexpr int wm = BM / WARPS_M, wn = BN / WARPS_N, stage_bytes = (BM + BN) * BK * 2;
    static_assert(BM % rows_at_once == 0 && BN % rows_at_once == 0 && wm % 16 == 0 && wn % 16 == 0, "tile shape");
    extern __shared__ __align__(128) uint8_t shared[];
    const uint32_t ring = (uint32_t)__cvta_generic_to_shared(shared);
    const int tid = threadIdx.x, warp = tid / 32, lane = tid & 31;
    const int pixel0 = blockIdx.x * BM, out0 = blockIdx.y * BN;

    /* This thread copies chunk tid % 8 of rows tid / 8 + i * rows_at_once. */
    const int chunk = tid % 8, copy_row = tid / 8;
    int image[a_rows], iy0[a_rows], ix0[a_rows]; /* first pixel of the sample in x; input place under tap (0, 0) */
#pragma unroll
    for (int i = 0; i < a_rows; i++) {
        const int pixel = pixel0 + copy_row + i * rows_at_once, sample = pixel / e.out_hw,
                  rest = pixel - sample * e.out_hw;
        image[i] = sample * e.height * e.width;
        iy0[i] = pixel < e.pixels ? rest / e.out_w * e.stride - e.pad : -(1 << 28); /* far outside: zeros */
        ix0[i] = rest % e.out_w * e.stride - e.pad;
    }
    const int limit_y = e.height << e.up, limit_x = e.width << e.up;
    const int depth = e.kernel * e.kernel * e.in, num_k_blocks = depth / BK;
    int next = 0, next_ky = 0, next_kx = 0, next_c = 0; /* K block that the next load_stage takes */

    auto load_stage = [&](int slot) {
        const uint32_t a = ring + slot * stage_bytes, b = a + BM * BK * 2;
#pragma unroll
        for (int i = 0; i < a_rows; i++) {
            const int iy = iy0[i] + next_ky, ix = ix0[i] + next_kx;
            const bool inside = (unsigned)iy < (unsigned)limit_y && (unsigned)ix < (unsigned)limit_x;
            const int at = inside ? (image[i] + (iy >> e.up) * e.width + (ix >> e.up)) * e.in + next_c + chunk * 8 : 0;
            copy16(a + swizzled(copy_row + i * rows_at_once, chunk), e.x + at, inside);
        }
#pragma unroll
        for (int i = 0; i < b_rows; i++) {
            const int row = copy_row + i * rows_at_once;
            const bool inside = out0 + row < e.out;
            const int64_t at = inside ? (int64_t)(out0 + row) * depth + next * BK + chunk * 8 : 0;
            copy16(b + swizzled(row, chunk), e.w + at, inside);
        }
        next++;
        next_c += BK;
        if (next_c == e.in) {
            next_c = 0;
            if (++next_kx == e.kernel) {
                next_kx = 0;
                next_ky++;
            }
        }
    };

    float acc[wm / 16][wn / 8][4];
#pragma unroll
    for (int i = 0; i < wm / 16; i++)
#pragma unroll
        for (int j = 0; j < wn / 8; j++)
#pragma unroll
            for (int q = 0; q < 4; q++) acc[i][j][q] = 0.0f;

                /* One commit per stage even if there is nothing left to load: the count of outstanding groups stays the same. */
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++) {
        if (s < num_k_blocks) load_stage(s);
        asm volatile("cp.async.commit_group;" ::: "memory");
    }
    const int warp_row = warp / WARPS_N * wm, warp_col = warp % WARPS_N * wn;
    /* ldmatrix: lane l gives the address of row l % 8 of matrix l / 8. A: rows 0-7, 8-15 of k 0-7, then of k 8-15.
     * B: channels 0-7 of k 0-7 and 8-15, then channels 8-15. */
    const int a_row = warp_row + (lane & 15), a_chunk = lane >> 4;
    const int b_row = warp_col + (lane & 7) + (lane >> 4) * 8, b_chunk = lane >> 3 & 1;
    int slot = 0;
#pragma unroll 1
    for (int kb = 0; kb < num_k_blocks; kb++) {
        asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2) : "memory");
        __syncthreads(); /* block kb has landed for everyone; everyone is done with block kb - 1, whose slot is filled next */
        if (next < num_k_blocks) load_stage(slot == 0 ? STAGES - 1 : slot - 1);
        asm volatile("cp.async.commit_group;" ::: "memory");
        const uint32_t a = ring + slot * stage_bytes, b = a + BM * BK * 2;
#pragma unroll
        for (int k = 0; k < BK / 16; k++) {
            uint32_t fa[wm / 16][4], fb[wn / 16][4];
#pragma unroll
            for (int i = 0; i < wm / 16; i++) load_matrices(fa[i], a + swizzled(a_row + 16 * i, 2 * k + a_chunk));
#pragma unroll
            for (int j = 0; j < wn / 16; j++) load_matrices(fb[j], b + swizzled(b_row + 16 * j, 2 * k + b_chunk));
#pragma unroll
            for (int i = 0; i < wm / 16; i++)
#pragma unroll
                for (int j = 0; j < wn / 8; j++) mma(acc[i][j], fa[i], fb[j / 2][j % 2 * 2], fb[j / 2][j % 2 * 2 + 1]);
        }
        if (++slot == STAGES) slot = 0;
    }

    /* acc[i][j]: rows lane / 4 and + 8 of row block i, columns 2 (lane % 4), + 1 of column block j. */
#pragma unroll
    for (int j = 0; j < wn / 8; j++) {
        const int c = out0 + warp_col + 8 * j + 2 * (lane & 3);
        if (c >= e.out) break; /* out is a multiple of 8: whole blocks */
        float2 bias = make_float2(0.0f, 0.0f);
        if (e.bias) bias = *(const float2 *)(e.bias + c);
#pragma unroll
        for (int i = 0; i < wm / 16; i++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int pixel = pixel0 + warp_row + 16 * i + lane / 4 + 8 * half;
                if (pixel >= e.pixels) continue;
                const int64_t at = (int64_t)pixel * e.out + c;
                float u = acc[i][j][2 * half] + bias.x, v = acc[i][j][2 * half + 1] + bias.y;
                if (e.addend) {
                    const float2 add = __bfloat1622float2(*(const __nv_bfloat162 *)(e.addend + at));
                    u += add.x;
                    v += add.y;
                }
                *(uint32_t *)(e.y + at) = rf_pack_bf16(u, v);
            }
        }
    }
}

extern "C" bool rf_conv_mma_fits(const rf_conv2d_args *a) {
    const int64_t pixels = a->batch * rf_conv2d_out_size(a, a->height) * rf_conv2d_out_size(a, a->width);
    return a->dtype == RF_DTYPE_BF16 && a->in_channels % BK == 0 && a->out_channels % 8 == 0 &&
           a->batch * a->height * a->width * a->in_channels < INT32_MAX && pixels < INT32_MAX - 128 &&
           a->out_channels < 65535 * 64;
}

template <int BM, int BN, int WARPS_M, int WARPS_N, int BLOCKS_PER_SM>
static rf_status launch(rf_stream *stream, const conv_args &e, rf_error *err) {
    static std::atomic<uint64_t> allowed{0};
    const size_t shared_bytes = (size_t)STAGES * (BM + BN) * BK * 2;
    void (*kernel)(conv_args) = conv_kernel<BM, BN, WARPS_M, WARPS_N, BLOCKS_PER_SM>;
    const cudaError_t code = rf_allow_shared((const void *)kernel, shared_bytes, &allowed);
    if (code != cudaSuccess) return rf_cuda_fail(err, "conv2d_mma", code);
    const dim3 grid((unsigned)rf_ceil_div(e.pixels, BM), (unsigned)rf_ceil_div(e.out, BN));
    return rf_launch(stream, "conv2d_mma", err, kernel, grid, WARPS_M * WARPS_N * 32, shared_bytes, e);
}

extern "C" rf_status rf_conv_mma_launch(rf_stream *stream, const rf_conv2d_args *a, rf_error *err) {
    conv_args e;
    const int out_h = (int)rf_conv2d_out_size(a, a->height);
    e.x = (const rf_bf16 *)a->x;
    e.w = (const rf_bf16 *)a->w;
    e.addend = (const rf_bf16 *)a->addend;
    e.bias = a->bias;
    e.y = (rf_bf16 *)a->y;
    e.height = (int)a->height;
    e.width = (int)a->width;
    e.in = (int)a->in_channels;
    e.out_w = (int)rf_conv2d_out_size(a, a->width);
    e.out_hw = out_h * e.out_w;
    e.out = (int)a->out_channels;
    e.pixels = (int)(a->batch * e.out_hw);
    e.kernel = a->kernel;
    e.stride = a->stride;
    e.pad = a->pad_before;
    e.up = a->upsample;
    const int64_t large = rf_ceil_div(e.pixels, 128) * rf_ceil_div(e.out, 128);
    if (large < rf_backend_num_sms(rf_stream_backend(stream))) return launch<64, 64, 2, 2, 3>(stream, e, err);
    return launch<128, 128, 2, 4, 2>(stream, e, err);
}
