/* core/arena.h - one block of memory handed out in order, on the host or on a device.
 *
 * Plan in two passes with the same code: a counting arena (base NULL) only adds up sizes and gives NULL pointers; then
 * the caller allocates `used` bytes once and runs the code again on a real arena. Scratch is taken and given back in
 * stack order with mark/reset. The arena never touches the memory, so base may be device memory. Offsets are aligned, so
 * base itself must be aligned to RF_ARENA_ALIGN (rf_backend_alloc and rf_alloc_aligned give that). */
#ifndef RF_CORE_ARENA_H
#define RF_CORE_ARENA_H

#include "core/status.h"

#ifdef __cplusplus
extern "C" {
#endif

#define RF_ARENA_ALIGN 256

typedef struct {
    char *base;      /* NULL: counting mode */
    size_t capacity; /* bytes; ignored in counting mode */
    size_t used;     /* bytes handed out now */
    size_t peak;     /* most bytes ever handed out: what a real arena needs */
    bool overflow;   /* the counted size passed SIZE_MAX */
} rf_arena;

void rf_arena_init_counting(rf_arena *arena);
void rf_arena_init(rf_arena *arena, void *base, size_t capacity);

/* Takes count * elem_bytes, aligned to RF_ARENA_ALIGN. *out is NULL in counting mode.
 * RF_ERR_WORKSPACE names the buffer, its size and what was left. */
rf_status rf_arena_take(rf_arena *arena, void **out, const char *name, size_t count, size_t elem_bytes, rf_error *err);

size_t rf_arena_mark(const rf_arena *arena);
void rf_arena_reset(rf_arena *arena, size_t mark); /* mark from the same arena, stack order */

#ifdef __cplusplus
}
#endif
#endif
