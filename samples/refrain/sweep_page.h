/* samples/refrain/sweep_page.h - what the files of a sweep's report share: writing HTML, and the plots.
 *
 *   sweep_report.c  verdicts, the table for a terminal, the page with its summary, table and pictures
 *   sweep_plot.c    writing HTML; plots by gnuplot or, without it, as SVG of our own
 *   sweep_words.c   what only text has: its summary, its table, how it was measured
 *   sweep_frames.c  what only worlds have: quality over frames, strips of frames, their table, what was refused */
#ifndef REFRAIN_SWEEP_PAGE_H
#define REFRAIN_SWEEP_PAGE_H

#include "core/file.h"
#include "samples/refrain/sweep_report.h"

/* What a plot has to the right: speed-up as measured; all token rows over the computed ones; the speed-up against the run that computes
 * everything in every step; text: tokens a second; KV policies: the part of the cache's bytes that is kept, in %. */
typedef enum { SWEEP_X_SPEED = 0, SWEEP_X_WORK, SWEEP_X_PLAIN, SWEEP_X_RATE, SWEEP_X_KEPT } sweep_axis;
double sweep_x_of(const sweep_row *row, sweep_axis axis);
bool sweep_on_front_by(const sweep_store *store, const sweep_row *row, sweep_metric metric, sweep_axis axis);
/* The control by rising x. Returns the number of points; points NULL: counts only. */
int sweep_control_points(const sweep_store *store, sweep_axis axis, const sweep_row **points);
bool sweep_is_doubtful(const sweep_row *row);
/* The metric in which a sweep's front is drawn first. */
sweep_metric sweep_main_metric(const sweep_store *store);

typedef struct {
    rf_file_writer *file;
    const sweep_store *store;
    const int *order; /* by falling speed-up */
    bool by_gnuplot;
} page;

void page_out(page *p, const char *format, ...) __attribute__((format(printf, 2, 3)));
void page_out_text(page *p, const char *text); /* text of any origin */
void page_out_number(page *p, const char *before, const char *after, double value, int digits);
void page_out_base64(page *p, const uint8_t *bytes, size_t num);
void page_out_name(page *p, const sweep_row *row);
/* A picture inside the page; nothing if it cannot be read. */
void page_out_png(page *p, const char *path, const char *alt);
/* Saves the absolute difference of two pictures times gain: black where they are equal. */
bool sweep_save_difference(const char *a_path, const char *b_path, int gain, const char *to);
/* "<folder>/SUBFOLDER/NAME ENDING", rf_free. */
char *page_path(const sweep_store *store, const char *subfolder, const char *name, const char *ending);
const char *page_color_of(const char *policy);

/* All plots of speed against quality that the store has numbers for. */
void page_out_plots(page *p);

/* Values over frame 1, 2, ...: NaN leaves a gap. */
typedef struct {
    char label[160];
    const char *color;
    bool dashed;
    double *values; /* [num_points] */
} page_line;
typedef struct {
    const char *name, *title, *axis;
    int num_lines, num_points;
    const page_line *lines;
    double top; /* values above are drawn there */
} page_line_plot;
void page_out_lines(page *p, const page_line_plot *plot);

/* "above 5 points", ... as a cell of a table. */
void page_out_verdict(page *p, const sweep_verdict *verdict);
/* The fastest row at a level: of the policies, or of the control. NULL: none. */
const sweep_row *page_fastest(const page *p, sweep_metric metric, double level, bool control);

/* ---- sweep_words.c ---- */

/* Of KV policies: the smallest cache at a quality, the best policy at a size; the table; how it was measured. */
void page_out_kv_summary(page *p);
void page_out_kv_table(page *p);
void page_out_kv_method(page *p);
void page_out_words_summary(page *p);
void page_out_words_table(page *p);
void page_out_words_method(page *p);

/* ---- sweep_frames.c ---- */

void page_out_curves(page *p);
void page_out_frame_strips(page *p);
void page_out_frame_table(page *p);
void page_out_refusals(page *p);

#endif
