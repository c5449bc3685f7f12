/* samples/refrain/text_show.c */
#include "samples/refrain/text_show.h"

#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#define MASK_SIGN "\xc2\xb7" /* a middle dot */
#define END_SIGN  "|"
#define LINE_SIGN "\xe2\x86\xb5"
#define NO_COLOR  "\033[0m"

static const char new_color[] = "\033[1;32m", dim_color[] = "\033[2m", no_color[] = "";

/* ---- output ---- */

/* Control characters, and those that Latin 1 has in UTF-8. */
static void print_safe(FILE *f, const char *bytes, size_t num_bytes) {
    for (size_t i = 0; i < num_bytes; i++) {
        unsigned char c = (unsigned char)bytes[i], next = i + 1 < num_bytes ? (unsigned char)bytes[i + 1] : 0;
        bool latin = c == 0xc2 && next >= 0x80 && next < 0xa0;
        bool control = (c < 32 && c != '\n' && c != '\t') || c == 127 || latin;
        putc(control ? '?' : c, f);
        i += latin;
    }
}

void text_print(const char *bytes, size_t num_bytes) {
    if (num_bytes == 0) return;
    if (isatty(STDOUT_FILENO)) {
        print_safe(stdout, bytes, num_bytes);
    } else {
        fwrite(bytes, 1, num_bytes, stdout);
    }
}

/* ---- final text ---- */

void text_show_begin(text_show *s, const opened_text *text, const rf_decode_options *options, const arg_list *stops) {
    *s = (text_show){.text = text, .options = options, .stops = stops};
    if (text->tokenizer) s->decoder = rf_token_stream_start(text->tokenizer, true);
}

void text_show_free(text_show *s) {
    rf_text_clear(&s->out);
}

static bool is_end(const text_show *s, int32_t id) {
    const rf_text_desc *d = &s->text->model->desc;
    for (int i = 0; i < d->num_eos && !s->options->ignore_eos; i++) {
        if (d->eos_ids[i] == id) return true;
    }
    return false;
}

/* Cuts at the first stop string that ends behind byte `from`. */
static void find_stop(text_show *s, size_t from) {
    size_t cut = s->out.num;
    for (int i = 0; s->stops && i < s->stops->count; i++) {
        const char *stop = s->stops->items[i];
        size_t len = strlen(stop), at = from > len ? from - len : 0;
        for (; at + len <= s->out.num && at < cut; at++) {
            if (memcmp(s->out.bytes + at, stop, len) == 0) {
                cut = at;
                s->stopped = true;
            }
        }
    }
    if (!s->stopped) return;
    s->out.num = cut;
    if (s->out.bytes) s->out.bytes[cut] = 0;
}

/* Bytes at the end that may be the beginning of a stop string. */
static size_t held_back(const text_show *s) {
    size_t most = 0;
    for (int i = 0; s->stops && i < s->stops->count; i++) {
        const char *stop = s->stops->items[i];
        size_t len = strlen(stop) - 1;
        if (len > s->out.num) len = s->out.num;
        while (len > most && memcmp(s->out.bytes + s->out.num - len, stop, len) != 0) len--;
        if (len > most) most = len;
    }
    return most;
}

static void print_final(text_show *s, bool all) {
    size_t end = s->out.num - (all || s->stopped ? 0 : held_back(s));
    if (!s->stream || end <= s->num_printed) return;
    text_print(s->out.bytes + s->num_printed, end - s->num_printed);
    fflush(stdout);
    s->num_printed = end;
}

static rf_status take_final(text_show *s, const int32_t *tokens, int32_t num, rf_error *err) {
    int32_t mask = s->text->model->desc.mask_id;
    while (s->num_final < num && !s->ended && !s->stopped) {
        int32_t id = tokens[s->num_final];
        size_t before = s->out.num;
        if (mask >= 0 && id == mask && s->text->model->desc.attention != RF_TEXT_CAUSAL) return RF_OK;
        s->ended = is_end(s, id);
        if (s->ended) return RF_OK;
        if (s->text->tokenizer) {
            RF_TRY(rf_token_stream_push(&s->decoder, id, &s->out, err));
        } else {
            if (s->num_final > 0) RF_TRY(rf_text_append(&s->out, ",", 1, err));
            RF_TRY(text_decode(s->text, &id, 1, &s->out, err));
        }
        s->num_final++;
        find_stop(s, before);
    }
    return RF_OK;
}

rf_status text_show_end(text_show *s, const int32_t *tokens, int32_t num, rf_error *err) {
    if (s->visual && isatty(STDERR_FILENO)) {
        if (s->num_lines > 1) fprintf(stderr, "\033[%dA", s->num_lines - 1);
        fputs("\r\033[J", stderr);
    }
    if (s->failed) return rf_fail(err, RF_ERR_MEMORY, "no memory for the text");
    RF_TRY(take_final(s, tokens, num, err));
    size_t before = s->out.num;
    if (!s->stopped && s->text->tokenizer) {
        RF_TRY(rf_token_stream_finish(&s->decoder, &s->out, err));
        find_stop(s, before);
    }
    print_final(s, true);
    return RF_OK;
}

/* ---- the canvas ---- */

typedef struct {
    int columns, rows, column, line; /* of the screen; where the next character goes */
} screen;

static void put_shown(screen *at, const char *bytes, size_t num_bytes) {
    for (size_t i = 0; i < num_bytes; i++) {
        unsigned char c = (unsigned char)bytes[i];
        bool starts = (c & 0xc0) != 0x80;
        if (starts && at->column == at->columns) {
            at->column = 0;
            if (++at->line < at->rows) fputs("\r\n", stderr);
        }
        if (at->line >= at->rows) return;
        putc(c < 32 || c == 127 ? '?' : c, stderr);
        at->column += starts;
    }
}

static void put_token(const text_show *s, screen *at, int32_t id, bool wraps) {
    size_t len = 0;
    char number[16];
    const char *bytes = s->text->tokenizer ? rf_tokenizer_token_bytes(s->text->tokenizer, id, &len) : NULL;
    if (!bytes) {
        len = (size_t)snprintf(number, sizeof number, s->text->tokenizer ? "?" : "%d ", (int)id);
        bytes = number;
    }
    if (text_utf8_valid(bytes, len) < len) { /* a part of a character */
        put_shown(at, "?", 1);
        return;
    }
    for (size_t i = 0; i < len;) {
        const char *end = memchr(bytes + i, '\n', len - i);
        size_t n = end ? (size_t)(end - bytes) - i : len - i;
        put_shown(at, bytes + i, n);
        i += n;
        if (!end) continue;
        put_shown(at, LINE_SIGN, sizeof LINE_SIGN - 1);
        if (wraps) at->column = at->columns;
        i++;
    }
}

static bool is_masked(const text_show *s, int32_t id) {
    return s->text->model->desc.mask_id >= 0 && id == s->text->model->desc.mask_id;
}

static void put_place(const text_show *s, screen *at, int32_t id, bool wraps) {
    if (is_masked(s, id)) {
        put_shown(at, MASK_SIGN, sizeof MASK_SIGN - 1);
    } else if (is_end(s, id)) {
        put_shown(at, END_SIGN, sizeof END_SIGN - 1);
    } else {
        put_token(s, at, id, wraps);
    }
}

static void draw_on_terminal(text_show *s, const int32_t *canvas, int32_t length, const int32_t *changed,
                             int32_t num_changed) {
    struct winsize size = {0};
    screen at = {.columns = 80, .rows = 24};
    if (ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 0 && size.ws_row > 1)
        at = (screen){.columns = size.ws_col, .rows = size.ws_row - 1};
    if (s->num_lines > 1) fprintf(stderr, "\033[%dA", s->num_lines - 1);
    fputs("\r\033[J", stderr);
    const char *color = no_color;
    for (int32_t i = 0, c = 0; i < length && at.line < at.rows; i++) {
        while (c < num_changed && changed[c] < i) c++;
        bool is_new = c < num_changed && changed[c] == i;
        const char *wanted = is_masked(s, canvas[i]) ? dim_color : is_new ? new_color : no_color;
        if (wanted != color) fprintf(stderr, NO_COLOR "%s", wanted);
        color = wanted;
        put_place(s, &at, canvas[i], true);
    }
    fputs(NO_COLOR, stderr);
    s->num_lines = at.line < at.rows ? at.line + 1 : at.rows;
    fflush(stderr);
}

static void draw_line(const text_show *s, const int32_t *canvas, int32_t length, int32_t num_changed) {
    screen at = {.columns = INT32_MAX, .rows = 1};
    fprintf(stderr, "pass %d, %d new: ", s->num_passes, (int)num_changed);
    for (int32_t i = 0; i < length; i++) put_place(s, &at, canvas[i], false);
    putc('\n', stderr);
}

bool text_show_progress(void *user, const int32_t *canvas, int32_t length, const int32_t *changed,
                        int32_t num_changed) {
    text_show *s = user;
    s->num_passes++;
    if (s->visual && isatty(STDERR_FILENO)) {
        draw_on_terminal(s, canvas, length, changed, num_changed);
    } else if (s->visual) {
        draw_line(s, canvas, length, num_changed);
    }
    if (!s->failed && take_final(s, canvas, length, NULL) != RF_OK) s->failed = true;
    print_final(s, false);
    return !s->failed && !s->stopped && !cancel_requested();
}
