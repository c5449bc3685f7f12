/* samples/refrain/terminal.c
 *
 * Sources  ECMA-48; xterm control sequences (alternate screen 1049, DA1); synchronized output (private mode 2026); the kitty
 *          keyboard protocol for keys that are let go. Terminals pass over what they do not know, so only what changes the
 *          picture is asked for: graphics and keyboard by one query that DA1, which all answer, brings to an end. */
#include "samples/refrain/terminal.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <termios.h>
#include <unistd.h>

#include "core/memory.h"
#include "core/video.h"
#include "samples/refrain/program.h"

#define ANSWER_MS     400  /* the longest wait for an answer: a slow line */
#define SEQUENCE_MS   30   /* between the bytes of one key; an ESC alone is the key */
#define MAX_PIXELS    1200 /* sixel: the longer side of what is sent */
#define CELL_WIDTH    8    /* pixels, where the terminal does not say */
#define CELL_HEIGHT   16
#define KEYBOARD_ASK  "\x1b[>11u" /* ambiguity, event types, all keys as sequences */
#define KEYBOARD_BACK "\x1b[<u"

struct terminal {
    terminal_drawing drawing;
    bool releases; /* the keyboard protocol is on */
    int columns, rows, cell_width, cell_height;
    int num_colors;
    int picture_number; /* kitty: 1 or 2, the last one drawn */
    draw_cell *shown;   /* [rows * columns], blocks */
    size_t num_shown;
    int shown_columns, shown_rows, shown_left, shown_top; /* of the picture */
    draw_buffer buffer;
    char input[512];
    size_t input_len;
};

/* For signal handlers. */
static struct {
    struct termios before;
    volatile sig_atomic_t raw, releases, pictures, stopping, suspend, resized;
} screen;

static const int ending_signals[] = {SIGINT, SIGTERM, SIGHUP, SIGQUIT};
static const int fault_signals[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT};

/* ---- in and out of raw mode ---- */

/* May be called in a signal handler. */
static void write_all(const char *bytes, size_t num_bytes) {
    while (num_bytes > 0) {
        ssize_t n = write(STDOUT_FILENO, bytes, num_bytes);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) return;
        bytes += n;
        num_bytes -= (size_t)n;
    }
}

static void leave(void) {
    /* ends a string that was being sent; shows the cursor, resets colours, leaves the alternate screen */
    static const char end[] = "\x1b\\\x1b[?2026l", pictures[] = "\x1b_Ga=d,d=A,q=2\x1b\\";
    static const char back[] = "\x1b[0m\x1b[?25h\x1b[?1049l";
    if (!screen.raw) return;
    screen.raw = 0;
    write_all(end, sizeof end - 1);
    if (screen.pictures) write_all(pictures, sizeof pictures - 1);
    if (screen.releases) write_all(KEYBOARD_BACK, sizeof KEYBOARD_BACK - 1);
    write_all(back, sizeof back - 1);
    tcsetattr(STDIN_FILENO, TCSAFLUSH, &screen.before);
}

static void enter(const terminal *t) {
    static const char on[] = "\x1b[?1049h\x1b[?25l\x1b[2J";
    struct termios raw = screen.before;
    raw.c_lflag &= ~(tcflag_t)(ICANON | ECHO | IEXTEN);
    raw.c_iflag &= ~(tcflag_t)(IXON | ICRNL | INLCR);
    raw.c_cc[VMIN] = 0;
    raw.c_cc[VTIME] = 0;
    tcsetattr(STDIN_FILENO, TCSADRAIN, &raw);
    screen.raw = 1;
    write_all(on, sizeof on - 1);
    if (t->releases) write_all(KEYBOARD_ASK, sizeof KEYBOARD_ASK - 1);
}

static void on_ending(int number) {
    if (!screen.stopping) {
        screen.stopping = 1;
        return;
    }
    leave();
    signal(number, SIG_DFL);
    raise(number);
}

static void on_fault(int number) {
    leave();
    signal(number, SIG_DFL);
    raise(number);
}

static void on_note(int number) {
    if (number == SIGWINCH) screen.resized = 1;
    if (number == SIGTSTP) screen.suspend = 1;
}

static void handle(int number, void (*handler)(int)) {
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_handler = handler;
    action.sa_flags = handler == SIG_DFL ? 0 : SA_RESTART;
    sigemptyset(&action.sa_mask);
    sigaction(number, &action, NULL);
}

static void handle_all(bool ours) {
    for (size_t i = 0; i < sizeof ending_signals / sizeof ending_signals[0]; i++)
        handle(ending_signals[i], ours ? on_ending : SIG_DFL);
    for (size_t i = 0; i < sizeof fault_signals / sizeof fault_signals[0]; i++)
        handle(fault_signals[i], ours ? on_fault : SIG_DFL);
    handle(SIGWINCH, ours ? on_note : SIG_DFL);
    handle(SIGTSTP, ours ? on_note : SIG_DFL);
}

bool terminal_stopping(void) {
    return screen.stopping != 0;
}

static void suspend(terminal *t) {
    screen.suspend = 0;
    leave();
    handle(SIGTSTP, SIG_DFL);
    raise(SIGTSTP);
    handle(SIGTSTP, on_note);
    enter(t);
    screen.resized = 1;
}

void terminal_pause_if_asked(terminal *t) {
    if (screen.suspend) suspend(t);
}

/* ---- what it can do ---- */

rf_status terminal_check(rf_error *err) {
    if (!isatty(STDIN_FILENO) || !isatty(STDOUT_FILENO)) {
        return rf_fail(err, RF_ERR_ARGUMENT, "--play: standard %s is not a terminal",
                       isatty(STDIN_FILENO) ? "output" : "input");
    }
    if (strcmp(terminal_type(), "dumb") == 0)
        return rf_fail(err, RF_ERR_ARGUMENT, "--play: a terminal of type 'dumb' cannot be drawn on (TERM)");
    return RF_OK;
}

static void read_size(terminal *t) {
    struct winsize size = {0};
    screen.resized = 0;
    bool told = ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 0 && size.ws_row > 0;
    t->columns = told ? size.ws_col : 80;
    t->rows = told ? size.ws_row : 24;
    t->cell_width = told && size.ws_xpixel ? size.ws_xpixel / size.ws_col : 0;
    t->cell_height = told && size.ws_ypixel ? size.ws_ypixel / size.ws_row : 0;
    if (t->cell_width < 2 || t->cell_height < 2) {
        t->cell_width = CELL_WIDTH;
        t->cell_height = CELL_HEIGHT;
    }
    terminal_forget(t);
}

static ssize_t read_more(terminal *t, int timeout_ms) {
    struct pollfd in = {.fd = STDIN_FILENO, .events = POLLIN};
    if (t->input_len == sizeof t->input || poll(&in, 1, timeout_ms) <= 0) return 0;
    ssize_t n = read(STDIN_FILENO, t->input + t->input_len, sizeof t->input - t->input_len);
    if (n > 0) t->input_len += (size_t)n;
    if ((n < 0 && errno != EINTR && errno != EAGAIN) || (n <= 0 && in.revents & (POLLHUP | POLLERR)))
        screen.stopping = 1; /* the terminal is gone */
    return n;
}

/* The DA1 answer "ESC [ ? 62 ; 4 c": its length, or 0 if it is not complete; 4 says sixel. */
static size_t find_da1(const char *text, size_t len, bool *sixel) {
    for (size_t i = 0; i + 3 < len; i++) {
        if (memcmp(text + i, "\x1b[?", 3) != 0) continue;
        size_t j = i + 3;
        int number = 0;
        bool has_4 = false;
        for (; j < len && (text[j] == ';' || (text[j] >= '0' && text[j] <= '9')); j++) {
            if (text[j] == ';') {
                has_4 = has_4 || number == 4;
                number = 0;
            } else if (number < 1000) {
                number = number * 10 + text[j] - '0';
            }
        }
        if (j >= len || text[j] != 'c') continue;
        *sixel = has_4 || number == 4;
        return j + 1;
    }
    return 0;
}

static bool contains(const char *text, size_t len, const char *part) {
    return memmem(text, len, part, strlen(part)) != NULL;
}

/* Asks for graphics, keyboard and, as the end of all answers, DA1. */
static void ask(terminal *t, bool *kitty, bool *sixel) {
    static const char questions[] = "\x1b_Gi=31,s=1,v=1,a=q,t=d,f=24;AAAA\x1b\\\x1b[?u\x1b[c";
    double end = now_ms() + ANSWER_MS;
    size_t answered = 0;
    write_all(questions, sizeof questions - 1);
    while (!answered && now_ms() < end) {
        read_more(t, (int)(end - now_ms()) + 1);
        answered = find_da1(t->input, t->input_len, sixel);
    }
    *kitty = contains(t->input, answered, "\x1b_Gi=31;OK");
    t->releases = false;
    for (size_t i = 0; i + 4 < answered; i++) { /* ESC [ ? flags u */
        if (memcmp(t->input + i, "\x1b[?", 3) != 0) continue;
        size_t j = i + 3;
        while (j < answered && t->input[j] >= '0' && t->input[j] <= '9') j++;
        t->releases = t->releases || (j < answered && t->input[j] == 'u' && j > i + 3);
    }
    memmove(t->input, t->input + answered, t->input_len - answered);
    t->input_len -= answered;
}

rf_status terminal_open(terminal **out, const char *drawing, rf_error *err) {
    *out = NULL;
    RF_TRY(terminal_check(err));
    terminal *t = rf_alloc_zero(1, sizeof *t);
    if (!t) return rf_fail(err, RF_ERR_MEMORY, "--play: no memory for a screen");
    if (tcgetattr(STDIN_FILENO, &screen.before) != 0) {
        rf_free(t);
        return rf_fail(err, RF_ERR_IO, "--play: cannot read the terminal's settings: %s", strerror(errno));
    }
    bool kitty = false, sixel = false;
    t->num_colors = terminal_num_colors();
    screen.stopping = screen.suspend = 0;
    handle_all(true);
    enter(t);
    if (strcmp(terminal_type(), "linux") != 0) ask(t, &kitty, &sixel); /* the console would show the questions */
    screen.releases = t->releases;
    if (t->releases) write_all(KEYBOARD_ASK, sizeof KEYBOARD_ASK - 1);
    bool automatic = strcmp(drawing, "auto") == 0;
    if ((automatic && kitty) || strcmp(drawing, "kitty") == 0) {
        t->drawing = TERMINAL_KITTY;
    } else if ((automatic && sixel) || strcmp(drawing, "sixel") == 0) {
        t->drawing = TERMINAL_SIXEL;
    }
    screen.pictures = t->drawing == TERMINAL_KITTY;
    read_size(t);
    *out = t;
    return RF_OK;
}

void terminal_close(terminal *t) {
    if (!t) return;
    leave();
    handle_all(false);
    draw_free(&t->buffer);
    rf_free(t->shown);
    rf_free(t);
}

terminal_drawing terminal_get_drawing(const terminal *t) {
    return t->drawing;
}

bool terminal_tells_releases(const terminal *t) {
    return t->releases;
}

/* ---- keys ---- */

static void drop_input(terminal *t, size_t num) {
    memmove(t->input, t->input + num, t->input_len - num);
    t->input_len -= num;
}

/* Length of the sequence at the start of the input, 0 if more may belong to it. */
static size_t sequence_len(const terminal *t) {
    const char *s = t->input;
    if (t->input_len < 2) return 0;
    if (s[1] == 'O') return t->input_len < 3 ? 0 : 3;
    if (s[1] == '_' || s[1] == 'P' || s[1] == ']') { /* an answer that came late: a string up to ESC \ */
        for (size_t i = 3; i < t->input_len; i++) {
            if (s[i - 1] == '\x1b' && s[i] == '\\') return i + 1;
        }
        return 0;
    }
    if (s[1] != '[') return 2;
    for (size_t i = 2; i < t->input_len; i++) {
        if ((unsigned char)s[i] >= 0x40 && (unsigned char)s[i] <= 0x7e) return i + 1;
    }
    return 0;
}

/* "ESC [ number ; modifiers : event final": false for what is no key of ours. */
static bool read_sequence(const char *s, size_t len, terminal_key *key) {
    int numbers[2][2] = {{0, 0}, {0, 0}}, field = 0, part = 0;
    for (size_t i = 2; i + 1 < len; i++) {
        if (s[i] == ';') {
            field++;
            part = 0;
        } else if (s[i] == ':') {
            part++;
        } else if (s[i] >= '0' && s[i] <= '9') {
            if (field < 2 && part < 2 && numbers[field][part] < 100000000)
                numbers[field][part] = numbers[field][part] * 10 + s[i] - '0';
        } else {
            return false;
        }
    }
    *key = (terminal_key){.control = numbers[1][0] > 0 && (numbers[1][0] - 1) & 4, .release = numbers[1][1] == 3};
    switch (s[len - 1]) {
    case 'A': key->code = KEY_UP; return true;
    case 'B': key->code = KEY_DOWN; return true;
    case 'C': key->code = KEY_RIGHT; return true;
    case 'D': key->code = KEY_LEFT; return true;
    case 'u': key->code = numbers[0][0]; return key->code > 0 && key->code < 57344; /* above: modifiers alone */
    default: return false;
    }
}

/* With the keyboard protocol on, the terminal sends these as keys and not as signals. */
static bool acts_as_signal(const terminal_key *key) {
    if (!key->control || key->release) return false;
    if (key->code == 'c' || key->code == '\\') screen.stopping = 1;
    if (key->code == 'z') screen.suspend = 1;
    return key->code == 'c' || key->code == '\\' || key->code == 'z';
}

bool terminal_read_key(terminal *t, int timeout_ms, terminal_key *key) {
    double end = now_ms() + timeout_ms;
    for (;;) {
        while (t->input_len > 0) {
            if (t->input[0] != '\x1b') {
                unsigned char c = (unsigned char)t->input[0];
                drop_input(t, 1);
                if (c >= 128) continue;
                *key = (terminal_key){.code = c < 32 && c != '\r' && c != '\t' ? c + 96 : c,
                                      .control = c < 32 && c != '\r' && c != '\t'};
                return true;
            }
            size_t len = sequence_len(t);
            if (len == 0 && read_more(t, SEQUENCE_MS) > 0) continue;
            if (len == 0) { /* nothing more came: the key itself, or the rest of something broken */
                bool alone = t->input_len == 1;
                t->input_len = 0;
                if (!alone) continue;
                *key = (terminal_key){.code = KEY_ESCAPE};
                return true;
            }
            bool is_key = read_sequence(t->input, len, key);
            drop_input(t, len);
            if (is_key && acts_as_signal(key)) return false;
            if (is_key) return true;
        }
        int left = (int)(end - now_ms());
        if (screen.stopping || screen.suspend || screen.resized) left = 0;
        if (read_more(t, left > 0 ? left : 0) <= 0) return false;
    }
}

/* ---- drawing ---- */

void terminal_forget(terminal *t) {
    for (size_t i = 0; i < t->num_shown; i++) t->shown[i].known = false;
    t->shown_columns = 0;
}

/* The largest place of the picture's proportions in columns x rows cells. */
static void fit(const terminal *t, const rf_image *picture, int columns, int rows, int *out_columns, int *out_rows) {
    double width = (double)columns * t->cell_width, height = (double)rows * t->cell_height;
    double by_width = width / picture->width, by_height = height / picture->height;
    double zoom = by_width < by_height ? by_width : by_height;
    int c = (int)(picture->width * zoom / t->cell_width + 0.5),
        r = (int)(picture->height * zoom / t->cell_height + 0.5);
    *out_columns = c < 1 ? 1 : c > columns ? columns : c;
    *out_rows = r < 1 ? 1 : r > rows ? rows : r;
}

static rf_status draw_picture(terminal *t, const rf_image *picture, int rows, rf_error *err) {
    rf_image scaled = {0};
    int columns_used, rows_used;
    fit(t, picture, t->columns, rows, &columns_used, &rows_used);
    int left = (t->columns - columns_used) / 2, top = (rows - rows_used) / 2;
    size_t cells = (size_t)columns_used * (size_t)rows_used;
    if (columns_used != t->shown_columns || rows_used != t->shown_rows || left != t->shown_left ||
        top != t->shown_top) {
        draw_printf(&t->buffer, "\x1b[0m\x1b[2J");
        draw_cell *grown = cells > t->num_shown ? rf_realloc(t->shown, cells * sizeof *grown) : t->shown;
        if (!grown) return rf_fail(err, RF_ERR_MEMORY, "--play: no memory for a screen of %zu cells", cells);
        t->shown = grown;
        if (cells > t->num_shown) t->num_shown = cells;
        memset(t->shown, 0, t->num_shown * sizeof *t->shown);
        t->shown_columns = columns_used;
        t->shown_rows = rows_used;
        t->shown_left = left;
        t->shown_top = top;
    }
    if (t->drawing == TERMINAL_KITTY) {
        t->picture_number = t->picture_number == 1 ? 2 : 1;
        draw_kitty(&t->buffer, picture, left, top, columns_used, rows_used, t->picture_number);
        return RF_OK;
    }
    int width = columns_used, height = 2 * rows_used;
    if (t->drawing == TERMINAL_SIXEL) {
        width = columns_used * t->cell_width;
        height = rows_used * t->cell_height;
        int longer = width > height ? width : height;
        if (longer > MAX_PIXELS) {
            width = width * MAX_PIXELS / longer;
            height = height * MAX_PIXELS / longer;
        }
        if (height > 6) height -= height % 6; /* never a line below its place */
    }
    RF_TRY(rf_image_resize(&scaled, picture, width, height, err));
    if (t->drawing == TERMINAL_SIXEL) {
        draw_sixel(&t->buffer, &scaled, left, top);
    } else {
        draw_blocks(&t->buffer, &scaled, left, top, t->num_colors, t->shown);
    }
    rf_image_free(&scaled);
    return RF_OK;
}

rf_status terminal_draw(terminal *t, const rf_image *picture, const char *const *lines, int num_lines, rf_error *err) {
    if (screen.resized) read_size(t);
    if (num_lines > t->rows - 1) num_lines = t->rows > 1 ? t->rows - 1 : 0;
    draw_reset(&t->buffer);
    draw_printf(&t->buffer, "\x1b[?2026h");
    RF_TRY(draw_picture(t, picture, t->rows - num_lines, err));
    for (int i = 0; i < num_lines; i++) {
        int len = (int)strlen(lines[i]), room = t->columns;
        draw_printf(&t->buffer, "\x1b[%d;1H\x1b[0m", t->rows - num_lines + i + 1);
        draw_put(&t->buffer, lines[i], (size_t)(len < room ? len : room));
        if (len < room) draw_printf(&t->buffer, "\x1b[K");
    }
    draw_printf(&t->buffer, "\x1b[?2026l");
    if (t->buffer.failed) return rf_fail(err, RF_ERR_MEMORY, "--play: no memory for a drawn frame");
    write_all(t->buffer.bytes, t->buffer.len);
    return RF_OK;
}
