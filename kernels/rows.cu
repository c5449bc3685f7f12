/* kernels/rows.cu - packed copies of listed rows.
 * Maths    gather dst[i] = src[rows[i]], scatter dst[rows[i]] = src[i].
 * Launch   a warp per row, 8 rows a block; words of 16, 8, 4 or 2 bytes, the widest that divides rows, strides and bases.
 * Cost     bandwidth bound, 2 * num_rows * row bytes.  Arch  sm_80 and later.
 * Checked  tests/kernels against the CPU table. */
#include <cuda_runtime.h>

#include "kernels/checks.h"
#include "kernels/device.cuh"
#include "kernels/launch.cuh"
#include "kernels/ops_cuda.h"

static constexpr int ROWS = 8; /* of a block */

template <class Word, bool SCATTER>
static __global__ void __launch_bounds__(ROWS * 32)
    rows_kernel(const Word *src, Word *dst, const int32_t *rows, int64_t num_rows, int64_t words, int64_t src_words,
                int64_t dst_words) {
    rf_wait_for_previous();
    const int lane = threadIdx.x & 31;
    const int64_t stride = (int64_t)gridDim.x * ROWS;
    for (int64_t i = (int64_t)blockIdx.x * ROWS + (threadIdx.x >> 5); i < num_rows; i += stride) {
        const int64_t listed = rows[i];
        const Word *const from = src + (SCATTER ? i : listed) * src_words;
        Word *const to = dst + (SCATTER ? listed : i) * dst_words;
#pragma unroll 4
        for (int64_t c = lane; c < words; c += 32) to[c] = from[c];
    }
}

template <class Word>
static rf_status launch(rf_stream *stream, const rf_rows_args *args, bool scatter, rf_error *err) {
    auto words = [&](int64_t elements) {
        return elements * (int64_t)rf_dtype_bytes(args->dtype) / (int64_t)sizeof(Word);
    };
    const int64_t src_ld = args->src_ld ? args->src_ld : args->cols, dst_ld = args->dst_ld ? args->dst_ld : args->cols;
    const dim3 grid(rf_blocks_for(args->num_rows, ROWS));
    return rf_launch_early(stream, scatter ? "scatter_rows" : "gather_rows", err,
                           scatter ? rows_kernel<Word, true> : rows_kernel<Word, false>, grid, dim3(ROWS * 32), 0,
                           (const Word *)args->src, (Word *)args->dst, args->rows, args->num_rows, words(args->cols),
                           words(src_ld), words(dst_ld));
}

static rf_status copy_rows(rf_stream *stream, const rf_rows_args *args, bool scatter, rf_error *err) {
    rf_status status = stream ? rf_rows_check_run(args, err) : rf_rows_check(args, err);
    if (status != RF_OK || !stream || args->num_rows == 0) return status;
    const int64_t element = (int64_t)rf_dtype_bytes(args->dtype);
    auto divides = [&](int64_t bytes) {
        return args->cols * element % bytes == 0 && args->src_ld * element % bytes == 0 &&
               args->dst_ld * element % bytes == 0 && rf_is_aligned(args->src, (size_t)bytes) &&
               rf_is_aligned(args->dst, (size_t)bytes);
    };
    if (divides(16)) return launch<uint4>(stream, args, scatter, err);
    if (divides(8)) return launch<uint2>(stream, args, scatter, err);
    if (divides(4)) return launch<uint32_t>(stream, args, scatter, err);
    return launch<uint16_t>(stream, args, scatter, err);
}

extern "C" rf_status rf_gather_rows_cuda(rf_stream *stream, const rf_rows_args *args, rf_error *err) {
    return copy_rows(stream, args, false, err);
}

extern "C" rf_status rf_scatter_rows_cuda(rf_stream *stream, const rf_rows_args *args, rf_error *err) {
    return copy_rows(stream, args, true, err);
}
