/* samples/train/objects.h - pictures of single 3-D objects, the training data of the sample image model.
 *
 * A picture is a pure function of (seed, index, class, size, samples): nothing is stored, any sample can be drawn again.
 * 6 shapes x 6 materials = 36 classes; class = shape * OBJ_NUM_MATERIALS + material, named "cube-red" .. "star-chrome".
 * (seed, index) decides camera, light, floor, sky, and how the object stands. The CPU and the CUDA build run the same
 * code; they differ by the rounding of sin, cos, exp and pow only.
 *
 *     float rgb[3 * 128 * 128];
 *     int32_t class_id = 0;
 *     obj_render_host(rgb, &class_id, 7, 0, 1, 128, 3);       picture 0 of seed 7, a red cube
 */
#ifndef OBJECTS_H
#define OBJECTS_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { OBJ_NUM_SHAPES = 6, OBJ_NUM_MATERIALS = 6, OBJ_NUM_CLASSES = 36 };

/* "cube-red" and so on; NULL when class_id is outside 0..35. Static storage. */
const char *obj_class_name(int class_id);

/* Renders pictures first_index .. first_index + num_images - 1 of a seed.
 *   rgb        [num_images, 3, size, size]  f32  host  written; -1..1, display (gamma) values
 *   class_ids  [num_images]                 i32  host  read; 0..35, others are taken modulo 36
 *   size       pixels a side, 1..4096
 *   samples    rays along each side of a pixel, 1..8 (3 gives 9 rays a pixel)
 * Returns 0, or -1 when an argument is out of range (nothing is written). Threads: OpenMP, over rows. */
int obj_render_host(float *rgb, const int32_t *class_ids, uint64_t seed, uint64_t first_index, int num_images, int size,
                    int samples);

/* The same on the current CUDA device (objects.cu): rgb and class_ids are device memory, `stream` is a cudaStream_t.
 * Queues one kernel: 0 means queued, -1 a bad argument, a positive value is the cudaError_t of the launch. */
int obj_render_cuda(float *rgb, const int32_t *class_ids, uint64_t seed, uint64_t first_index, int num_images, int size,
                    int samples, void *stream);

#ifdef __cplusplus
}
#endif
#endif
