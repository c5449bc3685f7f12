/* samples/refrain/sweep_words.c - the parts of a report that only text has. */
#include <math.h>
#include <string.h>

#include "samples/refrain/sweep_page.h"

/* One token a pass, every row: what the other rows are compared with. NULL: not in this store. */
static const sweep_row *uncached(const page *p) {
    for (int i = 0; i < sweep_store_num(p->store); i++) {
        const sweep_row *row = sweep_store_at(p->store, i);
        if (sweep_is_uncached(row) && sweep_is_measured(row)) return row;
    }
    return NULL;
}

static void out_level(page *p, sweep_metric metric, double level, const char *name) {
    const sweep_row *best = page_fastest(p, metric, level, false), *control = page_fastest(p, metric, level, true);
    page_out(p, "<tr><td class='l'>%s</td>", name);
    if (best) {
        page_out(p, "<td class='l'>");
        page_out_name(p, best);
        page_out(p, "</td>");
        page_out_number(p, "<td><b>", "&times;</b></td>", best->speedup, 2);
        page_out_number(p, "<td>", "&times;</td>", best->share_rows > 0 ? 1 / best->share_rows : NAN, 1);
        page_out_number(p, "<td>", "</td>", 100 * best->score, 1);
        page_out_number(p, "<td>", "</td>", 100 * best->agreement, 1);
        page_out_number(p, "<td>", "</td>", best->tok_s, 1);
    } else {
        page_out(p, "<td class='l open'>none reaches it</td><td></td><td></td><td></td><td></td><td></td>");
    }
    if (control) {
        page_out(p, "<td>%.2f&times;</td><td>%.0f</td>", control->speedup, control->steps);
    } else {
        page_out(p, "<td class='open'>none</td><td></td>");
    }
    if (best && control) {
        double gain = best->speedup / control->speedup;
        page_out(p, "<td class='%s'>%.2f&times;</td></tr>\n", gain > 1 ? "up" : "down", gain);
    } else {
        page_out(p, "<td></td></tr>\n");
    }
}

void page_out_words_summary(page *p) {
    const sweep_row *plain = uncached(p);
    page_out(p, "<h2>Fastest setting at a quality</h2>\n");
    if (plain)
        page_out(
            p,
            "<p>Uncached, one token a pass: <b>%.1f %%</b> exact match, %.1f tokens a second, %.0f passes and %.0f "
            "row-passes a sample.</p>\n",
            100 * plain->score, plain->tok_s, plain->nfe, plain->row_passes);
    page_out(p,
             "<div class='scroll'><table><tr><th class='l'>level</th><th class='l'>fastest setting</th>"
             "<th>speed-up</th><th>fewer<br>row-passes</th><th>exact %%</th><th>agree %%</th><th>tokens/s</th>"
             "<th>fewer passes<br>reach</th><th>with passes<br>a block</th><th>gain over<br>fewer passes</th></tr>\n");
    if (plain) {
        out_level(p, SWEEP_SCORE, 100 * plain->score - 1e-9, "exact match of uncached");
        out_level(p, SWEEP_SCORE, 100 * plain->score - 1, "within 1 point of it");
        out_level(p, SWEEP_SCORE, 100 * plain->score - 5, "within 5 points");
    }
    out_level(p, SWEEP_AGREEMENT, 99.999, "every token equal");
    out_level(p, SWEEP_AGREEMENT, 99, "99 % of tokens equal");
    out_level(p, SWEEP_AGREEMENT, 95, "95 % of tokens equal");
    page_out(p, "</table></div>\n");
}

static void out_row(page *p, int place) {
    const sweep_row *r = sweep_store_at(p->store, p->order[place]);
    bool front = sweep_on_front(p->store, r, SWEEP_SCORE);
    page_out(p, "<tr class='%s'><td>%d</td><td class='l o'>", sweep_is_control(r) ? "c" : front ? "f" : "", place + 1);
    page_out_name(p, r);
    page_out(p, "</td>");
    if (strcmp(r->status, "ok") != 0) {
        page_out(p, "<td class='l open' colspan='12' style='white-space:normal'>refused: ");
        page_out_text(p, r->reason);
        page_out(p, "</td></tr>\n");
        return;
    }
    page_out_number(p, "<td><b>", "&times;</b></td>", r->speedup, 2);
    sweep_verdict v = sweep_judge(p->store, r);
    page_out_verdict(p, &v);
    page_out_number(p, "<td><b>", "</b></td>", 100 * r->score, 1);
    page_out(p, "<td class='l'>");
    page_out_text(p, r->score_each);
    page_out(p, "</td>");
    page_out_number(p, "<td>", "</td>", 100 * r->agreement, 1);
    page_out_number(p, "<td>", "</td>", r->tok_s, 1);
    page_out_number(p, "<td>", "</td>", r->nfe, 1);
    page_out_number(p, "<td>", "</td>", r->row_passes, 0);
    page_out_number(p, "<td>", "</td>", r->key_reads / 1e6, 2);
    page_out_number(p, "<td>", "</td>", 100 * r->share_rows, 1);
    page_out_number(p, "<td>", "</td>", r->loop_ms, r->loop_ms < 100 ? 2 : 0);
    page_out_number(p, "<td>", "</td>", r->cache_bytes / 1e6, 1);
    page_out(p, "</tr>\n");
}

void page_out_words_table(page *p) {
    page_out(p,
             "<h2>All settings, fastest first</h2>\n<p class='sub'>Yellow: on the front of exact match. Grey: the "
             "control. By task: shares right, in the order of the tasks above. Passes, row-passes and key-reads are of "
             "a sample; rows %%: row-passes of those of the uncached run.</p>\n"
             "<div class='scroll'><table class='all'><tr><th>#</th><th class='l'>setting</th><th>speed-up</th><th "
             "class='l'>against fewer passes</th><th>exact<br>%%</th><th class='l'>by task</th><th>agree<br>%%</th>"
             "<th>tokens/s</th><th>passes</th><th>row-<br>passes</th><th>key-reads<br>millions</th><th>rows<br>%%</th>"
             "<th>loop ms</th><th>cache<br>MB</th></tr>\n");
    for (int i = 0; i < sweep_store_num(p->store); i++) out_row(p, i);
    page_out(p, "</table></div>\n");
}

void page_out_words_method(page *p) {
    page_out(p,
             "<h2>How it was measured</h2>\n<p><b>Exact match</b>: share of samples whose completion is the task's "
             "answer, mean over tasks. <b>Agreement</b>: share of tokens, place by place, equal to those of <b>this "
             "program's own uncached run</b>, which computes every row in every pass and commits one token a pass; "
             "mean over samples. Tokens count up to the end of text alone. <b>Row-passes</b>: computed rows summed "
             "over passes (a row of some layers counts in part); <b>key-reads</b>: rows times keys seen. All runs end "
             "when the end of text is committed and no mask is left before it.</p>\n");
}
