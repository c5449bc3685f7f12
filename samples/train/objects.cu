/* samples/train/objects.cu - objects.c on a GPU: the same code, one thread per pixel.
 * Launch   grid = (tiles across, tiles down, images), block = 8 x 16 pixels. Thread 0 makes the picture's scene once and
 *          leaves it in shared memory. A warp covers 8 x 4 neighbouring pixels, so its rays take the same branches. */
#include "objects.c"

#include <cuda_runtime.h>

enum { TILE_X = 8, TILE_Y = 16, MAX_GRID_Z = 65535 };

static __global__ void __launch_bounds__(TILE_X *TILE_Y)
    render_kernel(float *rgb, const int32_t *class_ids, uint64_t seed, uint64_t first_index, int size, int samples) {
    __shared__ scene s;
    size_t n = blockIdx.z;
    if (threadIdx.x == 0 && threadIdx.y == 0) scene_make(&s, seed, first_index + n, class_in_range(class_ids[n]));
    __syncthreads(); /* the scene is complete before anyone traces */
    int x = (int)(blockIdx.x * TILE_X + threadIdx.x), y = (int)(blockIdx.y * TILE_Y + threadIdx.y);
    if (x < size && y < size) render_pixel(&s, rgb + n * 3 * (size_t)size * (size_t)size, x, y, size, samples);
}

int obj_render_cuda(float *rgb, const int32_t *class_ids, uint64_t seed, uint64_t first_index, int num_images, int size,
                    int samples, void *stream) {
    if (!arguments_ok(rgb, class_ids, num_images, size, samples) || num_images > MAX_GRID_Z) return -1;
    if (num_images == 0) return 0;
    dim3 block(TILE_X, TILE_Y);
    dim3 grid((unsigned)((size + TILE_X - 1) / TILE_X), (unsigned)((size + TILE_Y - 1) / TILE_Y), (unsigned)num_images);
    render_kernel<<<grid, block, 0, (cudaStream_t)stream>>>(rgb, class_ids, seed, first_index, size, samples);
    return (int)cudaGetLastError();
}
