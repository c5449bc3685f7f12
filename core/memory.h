/* core/memory.h - host memory, counted, with a switch that makes the Nth allocation fail.
 *
 * Every host allocation of the library goes through here, so that a test can (a) count allocations between two points
 * and (b) walk N = 1, 2, 3, ... through every failure path. Thread-safe. */
#ifndef RF_CORE_MEMORY_H
#define RF_CORE_MEMORY_H

#include "core/types.h"

#ifdef __cplusplus
extern "C" {
#endif

/* NULL on failure, and for count * elem_bytes that overflows; zero-sized requests give a valid pointer. 64-byte aligned. */
void *rf_alloc(size_t bytes);
/* The same with a larger alignment (a power of two). */
void *rf_alloc_aligned(size_t bytes, size_t align);
void *rf_alloc_zero(size_t count, size_t elem_bytes);
/* Grows or shrinks; on failure returns NULL and leaves p as it was. p may be NULL. */
void *rf_realloc(void *p, size_t bytes);
char *rf_strdup(const char *s);
void rf_free(void *p); /* NULL is a no-op */

typedef struct {
    uint64_t num_allocs; /* successful calls so far in this process */
    uint64_t num_live;   /* not yet freed */
} rf_memory_counts;
rf_memory_counts rf_memory_get_counts(void);

/* Test hook: the nth allocation from now (1 = the next one) and only it fails; 0 turns the hook off. */
void rf_memory_fail_nth(uint64_t nth);

#ifdef __cplusplus
}
#endif
#endif
