/* samples/refrain/sweep_frames.c - the parts of a report that only worlds have. Frames are numbered from the prompt's, which is 0. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/image.h"
#include "core/memory.h"
#include "samples/refrain/sweep_page.h"

#define MAX_LINES    8
#define MAX_STRIPS   8
#define MAX_SHOWN    16
#define MAX_CONTROLS 3
#define TOP_DB       60.0 /* of the curves */
#define GAIN         4    /* of a difference */

static int pin_number(const page *p, const char *name) {
    return atoi(sweep_store_pin(p->store, name));
}

/* New frames of a walk. */
static int num_new(const page *p) {
    int frames = pin_number(p, "frames");
    return frames > 1 ? frames - 1 : 1;
}

/* ---- curves over frames ---- */

/* Means over walks of a text of numbers, all frames of a walk after the other. */
static bool read_curve(const page *p, const char *text, double *values) {
    int num = num_new(p), walks = pin_number(p, "walks");
    char *end = NULL;
    memset(values, 0, (size_t)num * sizeof *values);
    for (int i = 0; i < num * walks; i++, text = end) {
        double v = strtod(text, &end);
        if (end == text) return false;
        values[i % num] += v / walks;
    }
    return walks > 0;
}

static bool add_line(const page *p, page_line *line, const sweep_row *row, bool simulator, const char *color,
                     bool dashed) {
    char name[128];
    line->values = rf_alloc_zero((size_t)num_new(p), sizeof *line->values);
    if (!line->values || !read_curve(p, simulator ? row->sim_each : row->psnr_each, line->values)) {
        rf_free(line->values);
        line->values = NULL;
        return false;
    }
    sweep_row_name(row, name, sizeof name);
    for (char *c = name; *c; c++) {
        if (*c == '\'' || *c == '\\') *c = ' '; /* gnuplot's quotes */
    }
    snprintf(line->label, sizeof line->label, "%s  (%.2fx)", name, row->speedup);
    line->color = color;
    line->dashed = dashed;
    return true;
}

/* On the front, and neither slower than the uncached run nor equal to it. */
static bool is_worth_showing(const page *p, const sweep_row *row) {
    return sweep_on_front(p->store, row, sweep_main_metric(p->store)) && row->speedup > 1 &&
           row->psnr_mean < SWEEP_EQUAL_DB;
}

/* Members of the front from fast to mild, evenly picked; returns how many. */
static int pick_front(const page *p, const sweep_row **picked, int most) {
    int num = 0, seen = 0, taken = 0;
    for (int i = 0; i < sweep_store_num(p->store); i++) num += is_worth_showing(p, sweep_store_at(p->store, i));
    for (int i = 0; i < sweep_store_num(p->store) && taken < most; i++) {
        const sweep_row *row = sweep_store_at(p->store, p->order[i]);
        if (!is_worth_showing(p, row)) continue;
        bool wanted = num <= most || seen == (taken * (num - 1) + (most - 1) / 2) / (most - 1);
        seen++;
        if (wanted) picked[taken++] = row;
    }
    return taken;
}

/* Controls of about as many steps as make half, a third and two thirds. */
static int pick_controls(const page *p, const sweep_row **picked) {
    static const double shares[MAX_CONTROLS] = {.7, .5, .3};
    int steps = pin_number(p, "steps"), taken = 0;
    for (int s = 0; s < MAX_CONTROLS; s++) {
        const sweep_row *best = NULL;
        for (int i = 0; i < sweep_store_num(p->store); i++) {
            const sweep_row *row = sweep_store_at(p->store, i);
            if (!sweep_is_control(row) || !sweep_is_measured(row)) continue;
            if (!best || fabs(row->steps - shares[s] * steps) < fabs(best->steps - shares[s] * steps)) best = row;
        }
        bool known = false;
        for (int i = 0; i < taken; i++) known |= picked[i] == best;
        if (best && !known) picked[taken++] = best;
    }
    return taken;
}

static void out_lines(page *p, bool simulator) {
    static const char *const greys[MAX_CONTROLS] = {"#212529", "#6c757d", "#adb5bd"};
    const sweep_row *front[MAX_LINES], *controls[MAX_CONTROLS];
    page_line lines[MAX_LINES + 1] = {0};
    int num = 0, num_front = pick_front(p, front, MAX_LINES - MAX_CONTROLS), num_controls = pick_controls(p, controls);
    int uncached = sweep_store_find(p->store, "none:");
    if (simulator && uncached >= 0)
        num += add_line(p, &lines[num], sweep_store_at(p->store, uncached), true, "#000000", false);
    for (int i = 0; i < num_front; i++) {
        const char *color = page_color_of(front[i]->policy);
        bool repeated = false;
        for (int j = 0; j < i; j++) repeated |= strcmp(front[j]->policy, front[i]->policy) == 0;
        static const char *const more[] = {"#e8590c", "#0ca678", "#7048e8", "#c2255c", "#1098ad"};
        num += add_line(p, &lines[num], front[i], simulator, repeated ? more[i % 5] : color, false);
    }
    for (int i = 0; i < num_controls; i++) num += add_line(p, &lines[num], controls[i], simulator, greys[i], true);
    page_line_plot plot = {.name = simulator ? "frames-simulator" : "frames",
                           .title = simulator ? "PSNR to the simulator over the frames of a walk"
                                              : "PSNR to the uncached run over the frames of a walk",
                           .axis =
                               simulator ? "PSNR to the simulator, dB, mean over walks" : "PSNR, dB, mean over walks",
                           .num_lines = num,
                           .num_points = num_new(p),
                           .lines = lines,
                           .top = TOP_DB};
    page_out_lines(p, &plot);
    for (int i = 0; i < num; i++) rf_free(lines[i].values);
}

void page_out_curves(page *p) {
    page_out(p,
             "<h2>Quality over frames</h2>\n<p>Errors compound: what a rollout is like at its end matters more than "
             "the mean. Solid: "
             "settings of the front, from fast to mild. Dashed: fewer steps, no cache. Cut at %.0f dB.</p>\n",
             TOP_DB);
    out_lines(p, false);
    if (sweep_main_metric(p->store) == SWEEP_KEPT) out_lines(p, true);
}

/* ---- strips ---- */

/* Numbers of the frames that were saved. */
static int shown_frames(const page *p, int *frames) {
    int num = 0;
    char *end = NULL;
    for (const char *at = sweep_store_pin(p->store, "_shown"); num < MAX_SHOWN; at = end) {
        long v = strtol(at, &end, 10);
        if (end == at) break;
        frames[num++] = (int)v;
    }
    return num;
}

static char *picture_path(const page *p, const char *stem, int index, const char *ending) {
    char tail[48];
    snprintf(tail, sizeof tail, "-%d%s.png", index, ending);
    return page_path(p->store, "pictures", stem, tail);
}

static void out_strip_row(page *p, const char *label, const char *stem, int num, const char *ending) {
    page_out(p, "<tr><td class='l'>%s</td>", label);
    for (int i = 0; i < num; i++) {
        char *path = picture_path(p, stem, i, ending);
        page_out(p, "<td>");
        if (path) page_out_png(p, path, label);
        page_out(p, "</td>");
        rf_free(path);
    }
    page_out(p, "</tr>\n");
}

static bool make_difference(const page *p, const char *stem, int index) {
    char *a = picture_path(p, "reference", index, ""), *b = picture_path(p, stem, index, ""),
         *to = picture_path(p, stem, index, "-difference");
    bool made = a && b && to && sweep_save_difference(a, b, GAIN, to);
    rf_free(a);
    rf_free(b);
    rf_free(to);
    return made;
}

static void out_strip(page *p, const sweep_row *row, const int *frames, int num, bool simulator) {
    char hash[17];
    sweep_key_hash(row->key, hash);
    for (int i = 0; i < num; i++) {
        if (!make_difference(p, hash, i)) return;
    }
    page_out(p, "<div class='strip'><h3>");
    page_out_name(p, row);
    page_out(p, " &nbsp; %.2f&times;, PSNR %.2f dB, worst frame %.2f dB", row->speedup, row->psnr_mean,
             row->psnr_worst);
    if (isfinite(row->kept)) page_out(p, ", %.1f %% of the quality kept", 100 * row->kept);
    page_out(p, "</h3><div class='scroll'><table class='frames'><tr><th class='l'>frame</th>");
    for (int i = 0; i < num; i++) page_out(p, "<th>%d</th>", frames[i]);
    page_out(p, "</tr>\n");
    if (simulator) out_strip_row(p, "simulator", "simulator", num, "");
    out_strip_row(p, "reference", "reference", num, "");
    out_strip_row(p, "cached", hash, num, "");
    out_strip_row(p, "difference", hash, num, "-difference");
    page_out(p, "</table></div></div>\n");
}

void page_out_frame_strips(page *p) {
    const sweep_row *front[MAX_STRIPS];
    int frames[MAX_SHOWN], num = pick_front(p, front, MAX_STRIPS), num_shown = shown_frames(p, frames);
    if (num == 0 || num_shown == 0) return;
    bool simulator = sweep_main_metric(p->store) == SWEEP_KEPT;
    page_out(
        p,
        "<h2>Frames along the front</h2>\n<p>The first walk: %sthe uncached reference, the setting, and their absolute "
        "difference &times;%d (of the saved 8-bit frames). Fastest first.</p>\n",
        simulator ? "the simulator, " : "", GAIN);
    for (int i = 0; i < num; i++) out_strip(p, front[i], frames, num_shown, simulator);
}

/* ---- table ---- */

static void out_verdict(page *p, const sweep_verdict *v) {
    const char *kind = v->kind == SWEEP_VERDICT_ABOVE ? "up" : v->kind == SWEEP_VERDICT_BELOW ? "down" : "open";
    page_out(p, "<td class='l v %s'>", kind);
    page_out_text(p, v->text);
    page_out(p, "</td>");
}

static void out_row(page *p, int place) {
    const sweep_row *r = sweep_store_at(p->store, p->order[place]);
    bool front = sweep_on_front(p->store, r, sweep_main_metric(p->store));
    const char *kind = sweep_is_control(r) || sweep_is_uncached(r) ? "c" : front ? "f" : "";
    if (strcmp(r->status, "ok") != 0) return;
    page_out(p, "<tr class='%s'><td>%d</td><td class='l o'>", kind, place + 1);
    page_out_name(p, r);
    page_out(p, "</td>");
    page_out_number(p, "<td><b>", "&times;</b>", r->speedup, 2);
    page_out(p, sweep_is_doubtful(r) ? " <span class='down'>?</span></td>" : "</td>");
    page_out_number(p, "<td>", "&times;</td>", r->plain_speedup, 2);
    sweep_verdict v = sweep_judge(p->store, r);
    out_verdict(p, &v);
    int digits = r->frame_denoise_ms < 10 ? 3 : 1;
    page_out_number(p, "<td>", "</td>", r->frame_denoise_ms, digits);
    page_out_number(p, "<td>", "</td>", r->frame_context_ms, digits);
    page_out_number(p, "<td>", "</td>", r->frame_decode_ms, digits);
    page_out_number(p, "<td><b>", "</b></td>", r->frames_per_s, 2);
    page_out_number(p, "<td><b>", "</b></td>", r->psnr_mean, 2);
    page_out_number(p, "<td>", "", r->psnr_worst, 2);
    page_out_number(p, " <span class='open'>(", ")</span></td>", r->worst_frame, 0);
    page_out_number(p, "<td>", "</td>", r->first_under_30, 0);
    page_out_number(p, "<td>", "</td>", r->ssim_mean, 4);
    page_out_number(p, "<td>", "</td>", r->sim_psnr, 2);
    page_out_number(p, "<td><b>", "</b></td>", 100 * r->kept, 1);
    page_out_number(p, "<td>", "</td>", 100 * r->share_steps, 0);
    page_out_number(p, "<td>", "</td>", 100 * r->share_rows, 0);
    page_out_number(p, "<td>", "</td>", r->frame_forwards, 0);
    page_out_number(p, "<td>", "</td>", r->cache_bytes / 1e6, 1);
    page_out(p, "</tr>\n");
}

void page_out_frame_table(page *p) {
    page_out(
        p,
        "<h2>All settings, fastest first</h2>\n<p class='sub'>Yellow: on the front. Grey: no policy. Speed-up: over "
        "the "
        "uncached run with exact reuse, and over the one that computes its whole window in every step. Milliseconds a "
        "new "
        "frame; frames/s with decoding. Computed: full steps and token rows, of what the uncached run computes; "
        "frame-forwards of "
        "a walk. A red ? marks a speed-up above what the computed rows allow.</p>\n"
        "<div class='scroll'><table class='all'><tr><th>#</th><th "
        "class='l'>setting</th><th>speed-up</th><th>over<br>no "
        "reuse</th><th class='l'>against fewer steps</th><th>denoise<br>ms</th><th>context<br>ms</th><th>decode<br>ms"
        "</th><th>frames/s</th><th>PSNR dB<br>mean</th><th>worst<br>(frame)</th><th>first<br>&lt; 30</th><th>SSIM</th>"
        "<th>to simu-<br>lator, dB</th><th>kept<br>%%</th><th>steps<br>%%</th><th>rows<br>%%</th><th>forwards</th>"
        "<th>cache<br>MB</th></tr>\n");
    for (int i = 0; i < sweep_store_num(p->store); i++) out_row(p, i);
    page_out(p, "</table></div>\n");
}

void page_out_refusals(page *p) {
    int num = 0;
    for (int i = 0; i < sweep_store_num(p->store); i++)
        num += strcmp(sweep_store_at(p->store, i)->status, "refused") == 0;
    if (num == 0) return;
    page_out(p,
             "<h2>Refused at %s steps a frame</h2>\n<div class='scroll'><table><tr><th class='l'>setting</th><th "
             "class='l'>why</th></tr>\n",
             sweep_store_pin(p->store, "steps"));
    for (int i = 0; i < sweep_store_num(p->store); i++) {
        const sweep_row *row = sweep_store_at(p->store, i);
        if (strcmp(row->status, "refused") != 0) continue;
        page_out(p, "<tr><td class='l o'>");
        page_out_name(p, row);
        page_out(p, "</td><td class='l o'>");
        page_out_text(p, row->reason);
        page_out(p, "</td></tr>\n");
    }
    page_out(p, "</table></div>\n");
}
