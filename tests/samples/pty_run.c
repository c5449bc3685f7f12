/* tests/samples/pty_run.c - runs a program in a terminal of its own and does to it what a person would.
 *
 *   pty_run COLUMNSxROWS OUTPUT EVENT... -- PROGRAM ARGUMENT...
 *     wait:TEXT     until the program has written TEXT since the last wait that ended
 *     send:TEXT     typed
 *     sleep:MS      milliseconds
 *     size:80x24    another window
 *     kill:15       a signal to the program
 *     stopped:      until it is stopped (Ctrl-Z); kill:18 lets it go on
 *     restored:     is the terminal as it was at the start? At the end this is asked anyway
 * Everything that is written goes to OUTPUT. Prints "exit N" or "signal N", and "terminal restored" or "terminal left raw".
 * Exit status 0 if the program ended by itself and all waits came true within TIMEOUT_MS each, else 1 and a line. */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pty.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#define TIMEOUT_MS 20000.0

typedef struct {
    int master, slave, news; /* news: from the watcher */
    FILE *output;
    char *seen; /* since the last wait that ended */
    size_t seen_len, seen_cap;
    pid_t watcher, program;
    int num_stops, ended, status;
} session;

/* What the watcher tells: the program's process id first, then statuses as waitpid gives them. */
typedef struct {
    int what, value; /* 0 process id, 1 status */
} message;

static double now_ms(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e3 + (double)t.tv_nsec * 1e-6;
}

/* A shell in little: its child has the terminal's foreground, so that Ctrl-Z stops it and not a whole session. */
static void watch(int slave, int news, char **argv) {
    int status;
    setsid();
    ioctl(slave, TIOCSCTTY, 0);
    signal(SIGTTOU, SIG_IGN);
    pid_t program = fork();
    if (program == 0) {
        setpgid(0, 0);
        tcsetpgrp(slave, getpid());
        signal(SIGTTOU, SIG_DFL);
        for (int fd = 0; fd < 3; fd++) dup2(slave, fd);
        execv(argv[0], argv);
        _exit(127);
    }
    message m = {0, program};
    if (write(news, &m, sizeof m) != sizeof m) _exit(1);
    while (waitpid(program, &status, WUNTRACED) == program) {
        m = (message){1, status};
        if (write(news, &m, sizeof m) != sizeof m || !WIFSTOPPED(status)) break;
    }
    _exit(0);
}

static void take_output(session *s) {
    char bytes[65536];
    ssize_t n = read(s->master, bytes, sizeof bytes);
    if (n <= 0) return;
    fwrite(bytes, 1, (size_t)n, s->output);
    if (s->seen_len + (size_t)n > s->seen_cap) {
        s->seen_cap = 2 * (s->seen_len + (size_t)n);
        s->seen = realloc(s->seen, s->seen_cap);
        if (!s->seen) exit(1);
    }
    memcpy(s->seen + s->seen_len, bytes, (size_t)n);
    s->seen_len += (size_t)n;
}

static void take_news(session *s) {
    message m;
    if (read(s->news, &m, sizeof m) != sizeof m) {
        s->ended = 1;
        return;
    }
    if (m.what == 0) {
        s->program = m.value;
    } else if (WIFSTOPPED(m.value)) {
        s->num_stops++;
    } else {
        s->ended = 1;
        s->status = m.value;
    }
}

/* Reads what comes for some time, or less if something came. */
static void pump(session *s, double ms) {
    struct pollfd fds[2] = {{s->master, POLLIN, 0}, {s->news, POLLIN, 0}};
    if (poll(fds, s->ended ? 1 : 2, ms > 0 ? (int)ms : 0) <= 0) return;
    if (fds[0].revents & POLLIN) take_output(s);
    if (!s->ended && fds[1].revents) take_news(s);
}

static int same_terminal(const session *s, const struct termios *before) {
    struct termios now;
    if (tcgetattr(s->slave, &now) != 0) return 0;
    return now.c_lflag == before->c_lflag && now.c_iflag == before->c_iflag && now.c_oflag == before->c_oflag &&
           memcmp(now.c_cc, before->c_cc, sizeof now.c_cc) == 0;
}

static int wait_for(session *s, const char *text) {
    size_t len = strlen(text);
    for (double end = now_ms() + TIMEOUT_MS; now_ms() < end;) {
        char *found = s->seen_len >= len ? memmem(s->seen, s->seen_len, text, len) : NULL;
        if (found) {
            s->seen_len -= (size_t)(found + len - s->seen);
            memmove(s->seen, found + len, s->seen_len);
            return 1;
        }
        if (s->ended && poll(&(struct pollfd){s->master, POLLIN, 0}, 1, 0) <= 0) break;
        pump(s, 50);
    }
    return 0;
}

static int set_size(int fd, const char *text) {
    struct winsize size = {0};
    char *end;
    size.ws_col = (unsigned short)strtol(text, &end, 10);
    if (*end == 'x') size.ws_row = (unsigned short)strtol(end + 1, NULL, 10);
    return size.ws_col > 0 && size.ws_row > 0 && ioctl(fd, TIOCSWINSZ, &size) == 0;
}

static int do_event(session *s, const char *event, const struct termios *before) {
    const char *colon = strchr(event, ':');
    if (!colon) return 0;
    const char *value = colon + 1;
    double end = now_ms() + TIMEOUT_MS;
    if (strncmp(event, "wait:", 5) == 0) return wait_for(s, value);
    if (strncmp(event, "send:", 5) == 0) return write(s->master, value, strlen(value)) == (ssize_t)strlen(value);
    if (strncmp(event, "size:", 5) == 0) return set_size(s->slave, value);
    if (strncmp(event, "kill:", 5) == 0) return kill(s->program, atoi(value)) == 0;
    if (strncmp(event, "restored:", 9) == 0) return same_terminal(s, before);
    if (strncmp(event, "sleep:", 6) == 0) {
        for (end = now_ms() + atof(value); now_ms() < end;) pump(s, end - now_ms());
        return 1;
    }
    if (strncmp(event, "stopped:", 8) == 0) {
        for (int stops = s->num_stops ? s->num_stops - 1 : 0; s->num_stops == stops && now_ms() < end;) pump(s, 50);
        return s->num_stops > 0;
    }
    return 0;
}

int main(int argc, char **argv) {
    session s = {0};
    struct termios before;
    int news[2], first_event = 3, dashes = 3, failed = 0;
    while (dashes < argc && strcmp(argv[dashes], "--") != 0) dashes++;
    if (argc < 5 || dashes + 1 >= argc) return 1;
    s.output = fopen(argv[2], "wb");
    if (!s.output || openpty(&s.master, &s.slave, NULL, NULL, NULL) != 0 || pipe(news) != 0) return 1;
    if (!set_size(s.slave, argv[1]) || tcgetattr(s.slave, &before) != 0) return 1;
    s.watcher = fork();
    if (s.watcher == 0) {
        close(s.master);
        close(news[0]);
        watch(s.slave, news[1], argv + dashes + 1);
    }
    close(news[1]);
    s.news = news[0];
    while (!s.program && !s.ended) pump(&s, 100);
    for (int i = first_event; i < dashes && !failed; i++) {
        if (do_event(&s, argv[i], &before)) continue;
        printf("failed at event %d, %s\n", i - first_event + 1, argv[i]);
        failed = 1;
    }
    for (double end = now_ms() + TIMEOUT_MS; !s.ended && !failed && now_ms() < end;) pump(&s, 50);
    if (!s.ended) {
        printf("still running\n");
        failed = 1;
        kill(s.program, SIGKILL);
        while (!s.ended) pump(&s, 100);
    }
    for (int i = 0; i < 20; i++) pump(&s, 5);
    if (WIFEXITED(s.status)) printf("exit %d\n", WEXITSTATUS(s.status));
    if (WIFSIGNALED(s.status)) printf("signal %d\n", WTERMSIG(s.status));
    printf("terminal %s\n", same_terminal(&s, &before) ? "restored" : "left raw");
    fclose(s.output);
    free(s.seen);
    return failed;
}
