/* samples/refrain/terminal.h - the user's terminal as a screen with keys: raw mode, the alternate screen, what it can draw.
 *
 * There is one. It is given back as it was by terminal_close, and, should the process be ended by a second SIGINT, SIGTERM,
 * SIGHUP or SIGQUIT or by a fault, by a signal handler. The first such signal only asks to stop (terminal_stopping);
 * SIGTSTP suspends between two frames (terminal_pause_if_asked). */
#ifndef REFRAIN_TERMINAL_H
#define REFRAIN_TERMINAL_H

#include "samples/refrain/draw.h"

typedef enum { TERMINAL_BLOCKS = 0, TERMINAL_KITTY, TERMINAL_SIXEL } terminal_drawing;

enum { KEY_ESCAPE = 27, KEY_UP = 0x110000, KEY_DOWN, KEY_RIGHT, KEY_LEFT };

typedef struct {
    int code;     /* a character or KEY_... */
    bool control; /* with Ctrl */
    bool release; /* let go; only where the terminal tells */
} terminal_key;

typedef struct terminal terminal;

/* Are standard input and output a terminal that can be drawn on? RF_ERR_ARGUMENT else. */
rf_status terminal_check(rf_error *err);
/* drawing: "auto" asks the terminal, or "blocks", "kitty", "sixel". */
rf_status terminal_open(terminal **out, const char *drawing, rf_error *err);
void terminal_close(terminal *t); /* NULL is a no-op */

terminal_drawing terminal_get_drawing(const terminal *t);
bool terminal_tells_releases(const terminal *t);
/* Has a signal asked to stop? */
bool terminal_stopping(void);
/* Suspends the process if Ctrl-Z was pressed; returns when it goes on. */
void terminal_pause_if_asked(terminal *t);

/* Waits up to timeout_ms (0: not at all) for a key. False: none came. */
bool terminal_read_key(terminal *t, int timeout_ms, terminal_key *key);

/* Draws the picture as large as the window allows above num_lines lines of ASCII text, which are cut to the width. Takes notice
 * of a new window size. RF_ERR_IO if the terminal is gone. */
rf_status terminal_draw(terminal *t, const rf_image *picture, const char *const *lines, int num_lines, rf_error *err);
/* Everything is drawn anew the next time. */
void terminal_forget(terminal *t);

#endif
