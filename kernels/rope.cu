/* kernels/rope.cu - heads of rows turned in place by their positions (kernels/rope.h).
 * Maths    f32, rounded once to the dtype.
 * Launch   grid (parts of a row, rows); a thread turns one vector of 16 bytes where head_dim, num_pairs, the row stride
 *          and the bases allow it, else one pair.
 * Cost     bandwidth bound: the turned columns once read and once written; 144 rows of 32 heads of 64 bf16: 1.2 MB.
 * Arch     sm_80 and later.  Checked  tests/kernels/test_rope.c. */
#include <cuda_runtime.h>

#include "kernels/checks.h"
#include "kernels/launch.cuh"
#include "kernels/ops_cuda.h"
#include "kernels/rope.cuh"

static constexpr int MAX_THREADS = 256, MAX_GRID_ROWS = 65535;

/* VEC: elements of a thread; 2 moves single elements. */
template <class T, int VEC>
static __global__ void __launch_bounds__(MAX_THREADS) rope_kernel(const __grid_constant__ rf_rope_args p) {
    const uint32_t per_head = (uint32_t)(2 * p.num_pairs / VEC), at = blockIdx.x * blockDim.x + threadIdx.x;
    const uint32_t head = at / per_head, col = (at - head * per_head) * VEC;
    rf_wait_for_previous();
    if (head >= (uint32_t)p.num_heads) return;
    for (int64_t r = blockIdx.y; r < p.num_rows; r += gridDim.y) {
        const uint32_t pos = (uint32_t)(p.rows ? p.rows[r] : r) % (uint32_t)p.period;
        T *const x = (T *)p.x + r * p.row_stride + (int64_t)head * p.head_dim + col;
        const float *const table = p.table + (int64_t)pos * p.num_pairs * 2 + col;
        float v[VEC], t[VEC];
        if constexpr (VEC == 2) {
            v[0] = rf_to_f32(x[0]), v[1] = rf_to_f32(x[1]);
            t[0] = table[0], t[1] = table[1];
        } else {
            rf_unpack16(*reinterpret_cast<const uint4 *>(x), v);
            rf_load_angles(table, t);
        }
        rf_turn(v, t);
        if constexpr (VEC == 2)
            x[0] = rf_from_f32<T>(v[0]), x[1] = rf_from_f32<T>(v[1]);
        else
            *reinterpret_cast<uint4 *>(x) = rf_pack16(v);
    }
}

template <class T, int VEC> static rf_status launch(rf_stream *stream, const rf_rope_args *args, rf_error *err) {
    const int64_t per_row = (int64_t)args->num_heads * (2 * args->num_pairs / VEC);
    const int64_t threads = per_row < MAX_THREADS ? rf_ceil_div(per_row, 32) * 32 : MAX_THREADS;
    const int64_t rows = args->num_rows < MAX_GRID_ROWS ? args->num_rows : MAX_GRID_ROWS;
    return rf_launch_early(stream, "rope", err, rope_kernel<T, VEC>,
                           dim3((unsigned)rf_ceil_div(per_row, threads), (unsigned)rows), dim3((unsigned)threads), 0,
                           *args);
}

template <class T> static rf_status launch_width(rf_stream *stream, const rf_rope_args *args, rf_error *err) {
    constexpr int VEC = RF_VEC16<T>;
    if (args->head_dim % VEC == 0 && 2 * args->num_pairs % VEC == 0 && args->row_stride % VEC == 0 &&
        rf_is_aligned(args->x, 16) && rf_is_aligned(args->table, 16))
        return launch<T, VEC>(stream, args, err);
    return launch<T, 2>(stream, args, err);
}

extern "C" rf_status rf_rope_cuda(rf_stream *stream, const rf_rope_args *args, rf_error *err) {
    rf_status status = stream ? rf_rope_check_run(args, err) : rf_rope_check(args, err);
    if (status != RF_OK || !stream || args->num_rows == 0) return status;
    if (args->dtype == RF_DTYPE_F32) return launch_width<float>(stream, args, err);
    return launch_width<rf_bf16>(stream, args, err);
}
