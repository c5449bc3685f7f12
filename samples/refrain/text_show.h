/* samples/refrain/text_show.h - a decode as it happens: text that is final, stop strings, streaming, the canvas filling in.
 *
 * Final text are the tokens before the first mask (of an autoregressive model: all of them) up to an end of text. It is cut at the
 * first stop string, which also ends the decode. */
#ifndef REFRAIN_TEXT_SHOW_H
#define REFRAIN_TEXT_SHOW_H

#include "samples/refrain/args.h"
#include "samples/refrain/text_model.h"

typedef struct {
    const opened_text *text;
    const rf_decode_options *options; /* which ids end the text */
    const arg_list *stops;            /* NULL = none */
    bool stream;                      /* final text to standard output as it comes */
    bool visual;                      /* the canvas on standard error after each pass */

    rf_token_stream decoder;
    rf_text out;                 /* final text so far */
    int32_t num_final;           /* tokens in it */
    size_t num_printed;          /* bytes of out on standard output */
    bool ended, stopped, failed; /* by an end of text; by a stop string; memory was out */
    int num_passes, num_lines;   /* of the canvas on the screen */
} text_show;

void text_show_begin(text_show *show, const opened_text *text, const rf_decode_options *options, const arg_list *stops);
/* An rf_decode_progress: user is the text_show. False: a stop string, or the user has interrupted. */
bool text_show_progress(void *user, const int32_t *canvas, int32_t length, const int32_t *changed, int32_t num_changed);
/* tokens[num]: the result. Completes out and, where it is streamed, standard output. */
rf_status text_show_end(text_show *show, const int32_t *tokens, int32_t num, rf_error *err);
void text_show_free(text_show *show);

/* To standard output; what a terminal would obey is shown as '?' if it is one. */
void text_print(const char *bytes, size_t num_bytes);

#endif
