/* samples/refrain/progress.c */
#include "samples/refrain/progress.h"

#include <stdio.h>
#include <unistd.h>

#include "samples/refrain/program.h"

#define BAR_COLUMNS     30
#define REDRAW_EVERY_MS 100.0

void progress_begin(progress_bar *bar, int total, bool quiet) {
    bar->shown = !quiet && isatty(STDERR_FILENO);
    bar->total = total > 0 ? total : 1;
    bar->start_ms = now_ms();
    bar->drawn_ms = 0;
    bar->note[0] = 0;
}

void progress_update(progress_bar *bar, int done) {
    double now = now_ms();
    if (!bar->shown || (done < bar->total && now - bar->drawn_ms < REDRAW_EVERY_MS)) return;
    bar->drawn_ms = now;
    double seconds = (now - bar->start_ms) / 1e3;
    double rate = seconds > 0 ? done / seconds : 0;
    int filled = BAR_COLUMNS * done / bar->total;
    char line[BAR_COLUMNS + 1];
    for (int i = 0; i < BAR_COLUMNS; i++) line[i] = i < filled ? '=' : ' ';
    line[BAR_COLUMNS] = 0;
    fprintf(stderr, "\r[%s] step %d/%d  %.1f step/s  %.0f s left  %s\033[K", line, done, bar->total, rate,
            rate > 0 ? (bar->total - done) / rate : 0, bar->note);
    fflush(stderr);
}

void progress_end(progress_bar *bar) {
    if (!bar->shown) return;
    fputs("\r\033[K", stderr);
    fflush(stderr);
    bar->shown = false;
}
