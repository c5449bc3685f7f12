/* samples/refrain/progress.h - a bar with step rate and time left, drawn only where a person watches. */
#ifndef REFRAIN_PROGRESS_H
#define REFRAIN_PROGRESS_H

#include <stdbool.h>

typedef struct {
    bool shown; /* standard error is a terminal and nobody asked for quiet */
    int total;  /* steps of the whole run */
    double start_ms, drawn_ms;
    char note[48]; /* shown at the end; the owner changes it at will */
} progress_bar;

void progress_begin(progress_bar *bar, int total, bool quiet);
/* After `done` steps; redraws at most ten times a second. */
void progress_update(progress_bar *bar, int done);
/* Clears the line, so that what is printed next stands alone. Harmless when nothing is shown. */
void progress_end(progress_bar *bar);

#endif
