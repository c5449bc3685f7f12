/* core/arena.c - offsets into a block that the arena never touches. */
#include "core/arena.h"

void rf_arena_init_counting(rf_arena *arena) {
    *arena = (rf_arena){0};
}

void rf_arena_init(rf_arena *arena, void *base, size_t capacity) {
    *arena = (rf_arena){.base = base, .capacity = capacity};
}

rf_status rf_arena_take(rf_arena *arena, void **out, const char *name, size_t count, size_t elem_bytes, rf_error *err) {
    *out = NULL;
    size_t bytes, start, end;
    bool overflow = __builtin_mul_overflow(count, elem_bytes, &bytes);
    overflow |= __builtin_add_overflow(arena->used, (size_t)RF_ARENA_ALIGN - 1, &start);
    start &= ~((size_t)RF_ARENA_ALIGN - 1);
    overflow |= __builtin_add_overflow(start, bytes, &end);
    if (overflow) {
        arena->overflow = true;
        return rf_fail(err, RF_ERR_WORKSPACE, "buffer '%s': %zu x %zu bytes is more than memory can address", name,
                       count, elem_bytes);
    }
    if (arena->base && end > arena->capacity) {
        size_t left = arena->capacity > start ? arena->capacity - start : 0;
        return rf_fail(err, RF_ERR_WORKSPACE, "buffer '%s' needs %zu bytes, the arena has %zu of %zu left", name, bytes,
                       left, arena->capacity);
    }
    if (arena->base) *out = arena->base + start;
    arena->used = end;
    if (end > arena->peak) arena->peak = end;
    return RF_OK;
}

size_t rf_arena_mark(const rf_arena *arena) {
    return arena->used;
}

void rf_arena_reset(rf_arena *arena, size_t mark) {
    if (mark <= arena->used) arena->used = mark;
}
