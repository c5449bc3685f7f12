/* samples/refrain/draw.h - pictures as bytes for a terminal: half blocks in colour, the kitty graphics protocol, sixel.
 *
 * Sources  kitty graphics protocol (sw.kovidgoyal.net/kitty/graphics-protocol); DEC VT340 sixel; ECMA-48 colours. */
#ifndef REFRAIN_DRAW_H
#define REFRAIN_DRAW_H

#include "core/image.h"

/* Bytes on their way to the terminal. Grows to what a frame needs and stays there; `failed` is kept until draw_reset. */
typedef struct {
    char *bytes;
    size_t len, cap;
    bool failed;
} draw_buffer;
void draw_reset(draw_buffer *buffer);
void draw_free(draw_buffer *buffer);
void draw_put(draw_buffer *buffer, const char *bytes, size_t num_bytes);
void draw_printf(draw_buffer *buffer, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* What a cell of the screen shows: colours of its upper and lower half. */
typedef struct {
    uint8_t upper[3], lower[3];
    bool known; /* else it must be drawn */
} draw_cell;

/* A picture of `columns` x 2 `rows` pixels in cells whose upper left is (left, top), counted from 0. shown [rows * columns]: what is
 * there; only cells that differ are written. num_colors: 1 << 24, 256 or 16. */
void draw_blocks(draw_buffer *buffer, const rf_image *picture, int left, int top, int num_colors, draw_cell *shown);

/* Any picture, scaled by the terminal to columns x rows cells. number alternates 1, 2: the other one is taken away after it. */
void draw_kitty(draw_buffer *buffer, const rf_image *picture, int left, int top, int columns, int rows, int number);

/* A picture pixel by pixel, in 6 x 7 x 6 colours with an ordered dither. */
void draw_sixel(draw_buffer *buffer, const rf_image *picture, int left, int top);

#endif
