/* core/types.c - dtypes, half and bfloat16 conversion, tensor sizes. */
#include "core/types.h"

#include <string.h>
#include <strings.h>

static const struct {
    const char *name;
    size_t bytes;
} dtypes[RF_DTYPE_COUNT] = {
    [RF_DTYPE_F32] = {"f32", 4}, [RF_DTYPE_F16] = {"f16", 2}, [RF_DTYPE_BF16] = {"bf16", 2},
    [RF_DTYPE_I32] = {"i32", 4}, [RF_DTYPE_I64] = {"i64", 8}, [RF_DTYPE_U8] = {"u8", 1},
};

static bool dtype_known(rf_dtype dtype) {
    return (unsigned)dtype < RF_DTYPE_COUNT;
}

size_t rf_dtype_bytes(rf_dtype dtype) {
    return dtype_known(dtype) ? dtypes[dtype].bytes : 0;
}

const char *rf_dtype_name(rf_dtype dtype) {
    return dtype_known(dtype) ? dtypes[dtype].name : "unknown";
}

bool rf_dtype_from_name(const char *name, rf_dtype *out) {
    for (int i = 0; name && i < RF_DTYPE_COUNT; i++) {
        if (strcasecmp(name, dtypes[i].name) == 0) {
            *out = (rf_dtype)i;
            return true;
        }
    }
    return false;
}

static uint32_t float_bits(float f) {
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    return u;
}

static float bits_float(uint32_t u) {
    float f;
    memcpy(&f, &u, sizeof f);
    return f;
}

float rf_f16_to_f32(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16;
    uint32_t exponent = (h >> 10) & 0x1fu;
    uint32_t mantissa = h & 0x3ffu;
    if (exponent == 31) return bits_float(sign | 0x7f800000u | (mantissa << 13));
    if (exponent != 0) return bits_float(sign | ((exponent + 112) << 23) | (mantissa << 13));
    float magnitude = (float)mantissa * 0x1p-24f; /* zero or subnormal: exact in f32 */
    return bits_float(sign | float_bits(magnitude));
}

uint16_t rf_f32_to_f16(float f) {
    uint32_t u = float_bits(f);
    uint32_t sign = (u >> 16) & 0x8000u;
    uint32_t a = u & 0x7fffffffu;
    if (a > 0x7f800000u) return (uint16_t)(sign | 0x7e00u | ((a >> 13) & 0x1ffu)); /* NaN, made quiet */
    if (a >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u); /* 65520 and above round to infinity */
    if (a < 0x38800000u) {                                   /* below 2^-14: a subnormal, in units of 2^-24 */
        if (a < 0x33000000u) return (uint16_t)sign;          /* below 2^-25 */
        uint32_t shift = 126 - (a >> 23);                    /* 14..24 */
        uint32_t m = (a & 0x7fffffu) | 0x800000u;
        uint32_t half = 1u << (shift - 1);
        uint32_t q = m >> shift;
        uint32_t rest = m & ((1u << shift) - 1);
        if (rest > half || (rest == half && (q & 1))) q++;
        return (uint16_t)(sign | q);
    }
    uint32_t r = a - 0x38000000u; /* rebias 127 -> 15 */
    r += 0xfffu + ((r >> 13) & 1);
    return (uint16_t)(sign | (r >> 13));
}

float rf_bf16_to_f32(uint16_t h) {
    return bits_float((uint32_t)h << 16);
}

uint16_t rf_f32_to_bf16(float f) {
    uint32_t u = float_bits(f);
    if ((u & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((u >> 16) | 0x40u); /* NaN, made quiet */
    return (uint16_t)((u + 0x7fffu + ((u >> 16) & 1)) >> 16);
}

static float load_float(const void *src, rf_dtype dtype, size_t i) {
    switch (dtype) {
    case RF_DTYPE_F32: return ((const float *)src)[i];
    case RF_DTYPE_F16: return rf_f16_to_f32(((const uint16_t *)src)[i]);
    default: return rf_bf16_to_f32(((const uint16_t *)src)[i]);
    }
}

void rf_convert(void *dst, rf_dtype dst_dtype, const void *src, rf_dtype src_dtype, size_t num_elems) {
    if (dst_dtype == src_dtype) {
        if (num_elems) memmove(dst, src, num_elems * rf_dtype_bytes(dst_dtype));
        return;
    }
    switch (dst_dtype) {
    case RF_DTYPE_F32:
        if (src_dtype == RF_DTYPE_BF16) {
            for (size_t i = 0; i < num_elems; i++) ((float *)dst)[i] = rf_bf16_to_f32(((const uint16_t *)src)[i]);
        } else {
            for (size_t i = 0; i < num_elems; i++) ((float *)dst)[i] = rf_f16_to_f32(((const uint16_t *)src)[i]);
        }
        break;
    case RF_DTYPE_F16:
        for (size_t i = 0; i < num_elems; i++) ((uint16_t *)dst)[i] = rf_f32_to_f16(load_float(src, src_dtype, i));
        break;
    case RF_DTYPE_BF16:
        for (size_t i = 0; i < num_elems; i++) ((uint16_t *)dst)[i] = rf_f32_to_bf16(load_float(src, src_dtype, i));
        break;
    default: break; /* integers are never converted */
    }
}

int64_t rf_tensor_num_elems(const rf_tensor *t) {
    int64_t n = 1;
    for (int i = 0; i < t->rank; i++) n *= t->shape[i];
    return n;
}

size_t rf_tensor_bytes(const rf_tensor *t) {
    return (size_t)rf_tensor_num_elems(t) * rf_dtype_bytes(t->dtype);
}
