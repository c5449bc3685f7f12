/* core/memory.c - aligned allocation with process-wide counts.
 *
 * Blocks carry no header of ours: a pointer from rf_alloc is one that free() takes, and the other way round. The JSON
 * reader depends on it, because cJSON's allocation hooks are process-wide (json.c). */
#include "core/memory.h"

#include <malloc.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#define DEFAULT_ALIGN 64

static _Atomic uint64_t num_allocs;
static _Atomic uint64_t num_live;
static _Atomic uint64_t fail_countdown; /* 0 = off */

/* True for the one allocation that the test hook chose. */
static bool must_fail(void) {
    uint64_t left = atomic_load_explicit(&fail_countdown, memory_order_relaxed);
    while (left != 0) {
        if (atomic_compare_exchange_weak(&fail_countdown, &left, left - 1)) return left == 1;
    }
    return false;
}

void *rf_alloc_aligned(size_t bytes, size_t align) {
    if (must_fail()) return NULL;
    if (align < DEFAULT_ALIGN) align = DEFAULT_ALIGN;
    if (bytes > PTRDIFF_MAX - align) return NULL;
    void *p = NULL;
    if (posix_memalign(&p, align, bytes ? bytes : 1) != 0) return NULL;
    atomic_fetch_add_explicit(&num_allocs, 1, memory_order_relaxed);
    atomic_fetch_add_explicit(&num_live, 1, memory_order_relaxed);
    return p;
}

void *rf_alloc(size_t bytes) {
    return rf_alloc_aligned(bytes, DEFAULT_ALIGN);
}

void *rf_alloc_zero(size_t count, size_t elem_bytes) {
    size_t bytes;
    if (__builtin_mul_overflow(count, elem_bytes, &bytes)) return NULL;
    void *p = rf_alloc(bytes);
    if (p) memset(p, 0, bytes);
    return p;
}

void *rf_realloc(void *p, size_t bytes) {
    if (!p) return rf_alloc(bytes);
    void *grown = rf_alloc(bytes);
    if (!grown) return NULL;
    size_t old_bytes = malloc_usable_size(p);
    memcpy(grown, p, old_bytes < bytes ? old_bytes : bytes);
    rf_free(p);
    return grown;
}

char *rf_strdup(const char *s) {
    size_t bytes = strlen(s) + 1;
    char *copy = rf_alloc(bytes);
    if (copy) memcpy(copy, s, bytes);
    return copy;
}

void rf_free(void *p) {
    if (!p) return;
    atomic_fetch_sub_explicit(&num_live, 1, memory_order_relaxed);
    free(p);
}

rf_memory_counts rf_memory_get_counts(void) {
    return (rf_memory_counts){.num_allocs = atomic_load(&num_allocs), .num_live = atomic_load(&num_live)};
}

void rf_memory_fail_nth(uint64_t nth) {
    atomic_store(&fail_countdown, nth);
}
