/* core/types.h - words and small types that every folder uses.
 *
 * Overloaded words, settled once:
 *   layer      a transformer block              part       attention, cross-attention or MLP inside a layer
 *   step       an index into the schedule       timestep   the number a model is told (0..999 for DiT)
 *   sigma      a noise level                    branch     conditional or unconditional rows of one batch
 *   row        one token's vector               segment    a run of rows of one kind (text, image)
 *   KV cache   keys and values of text models   feature cache   outputs of a denoiser's parts
 *   gen block  a span of decoded tokens         thread block    CUDA's
 * Matrices are row-major with the last index contiguous; a Linear weight is [out, in]. */
#ifndef RF_CORE_TYPES_H
#define RF_CORE_TYPES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum {
    RF_DTYPE_F32 = 0,
    RF_DTYPE_F16,
    RF_DTYPE_BF16,
    RF_DTYPE_I32,
    RF_DTYPE_I64,
    RF_DTYPE_U8,
    RF_DTYPE_COUNT
} rf_dtype;

/* Bytes of one element; 0 for a value outside the enum. */
size_t rf_dtype_bytes(rf_dtype dtype);
/* "f32", "f16", "bf16", "i32", "i64", "u8"; static storage. */
const char *rf_dtype_name(rf_dtype dtype);
/* Reads one of those names (any letter case). False if unknown. */
bool rf_dtype_from_name(const char *name, rf_dtype *out);

/* IEEE half and bfloat16 <-> float, round to nearest even, NaN stays NaN. */
float rf_f16_to_f32(uint16_t h);
uint16_t rf_f32_to_f16(float f);
float rf_bf16_to_f32(uint16_t h);
uint16_t rf_f32_to_bf16(float f);
/* Converts num elements between f32, f16 and bf16 (any pair); src and dst may not overlap unless equal dtypes. */
void rf_convert(void *dst, rf_dtype dst_dtype, const void *src, rf_dtype src_dtype, size_t num_elems);

#define RF_MAX_RANK 5

/* A view: somebody else owns the memory. Contiguous, row-major. */
typedef struct {
    void *data;
    rf_dtype dtype;
    int rank;
    int64_t shape[RF_MAX_RANK];
} rf_tensor;

int64_t rf_tensor_num_elems(const rf_tensor *t);
size_t rf_tensor_bytes(const rf_tensor *t);

#ifdef __cplusplus
}
#endif
#endif
