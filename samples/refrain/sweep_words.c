/* samples/refrain/sweep_words.c - the parts of a report that only text has, and only policies of an autoregressive model's cache. */
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

/* --- KV policies -------------------------------------------------------------------------------------------------- */

/* The least kept at a level; of equals the better one. NULL: none. */
static const sweep_row *smallest(const page *p, double level) {
    const sweep_row *best = NULL;
    for (int i = 0; i < sweep_store_num(p->store); i++) {
        const sweep_row *row = sweep_store_at(p->store, i);
        if (!sweep_is_measured(row) || sweep_is_uncached(row) || !(100 * row->score >= level)) continue;
        double x = sweep_x_of(row, SWEEP_X_KEPT), least = best ? sweep_x_of(best, SWEEP_X_KEPT) : INFINITY;
        if (x < least || (x <= least && row->score > best->score)) best = row;
    }
    return best;
}

static void out_kv_numbers(page *p, const sweep_row *row) {
    page_out(p, "<td class='l'>");
    page_out_name(p, row);
    page_out(p, "</td>");
    page_out_number(p, "<td><b>", "</b></td>", 100 * row->score, 1);
    page_out_number(p, "<td>", "</td>", 100 * row->agreement, 1);
    page_out_number(p, "<td><b>", "</b></td>", sweep_x_of(row, SWEEP_X_KEPT), 1);
    page_out_number(p, "<td>", "</td>", row->kept_bytes / 1e6, 3);
    page_out_number(p, "<td>", "</td></tr>\n", row->tok_s, 1);
}

static void out_kv_level(page *p, double level, const char *name) {
    const sweep_row *best = smallest(p, level);
    page_out(p, "<tr><td class='l'>%s</td>", name);
    if (best) {
        out_kv_numbers(p, best);
    } else {
        page_out(p, "<td class='l open'>none reaches it</td><td></td><td></td><td></td><td></td><td></td></tr>\n");
    }
}

/* The best policy of each size. */
static void out_kv_sizes(page *p) {
    for (int i = 0; i < sweep_store_num(p->store); i++) {
        const sweep_row *first = sweep_store_at(p->store, i), *best = NULL;
        bool seen = !sweep_is_measured(first) || sweep_is_uncached(first) || !first->options[0];
        for (int k = 0; k < i && !seen; k++) {
            const sweep_row *other = sweep_store_at(p->store, k);
            seen = sweep_is_measured(other) && strcmp(other->options, first->options) == 0;
        }
        for (int k = i; k < sweep_store_num(p->store) && !seen; k++) {
            const sweep_row *row = sweep_store_at(p->store, k);
            if (!sweep_is_measured(row) || strcmp(row->options, first->options) != 0) continue;
            if (!best || row->score > best->score || (row->score >= best->score && row->agreement > best->agreement))
                best = row;
        }
        if (!best) continue;
        page_out(p, "<tr><td class='l'>best with ");
        page_out_text(p, first->options);
        page_out(p, "</td>");
        out_kv_numbers(p, best);
    }
}

void page_out_kv_summary(page *p) {
    const sweep_row *full = uncached(p);
    page_out(p, "<h2>Smallest cache at a quality, best policy at a size</h2>\n");
    if (full)
        page_out(p,
                 "<p>Full cache: <b>%.1f %%</b> exact match, %.3f MB of keys and values a sample, %.1f tokens a "
                 "second.</p>\n",
                 100 * full->score, full->full_bytes / 1e6, full->tok_s);
    page_out(p, "<div class='scroll'><table><tr><th class='l'>level</th><th class='l'>setting</th><th>exact %%</th>"
                "<th>agree %%</th><th>kept %%</th><th>kept MB</th><th>tokens/s</th></tr>\n");
    if (full) {
        out_kv_level(p, 100 * full->score - 1e-9, "exact match of the full cache");
        out_kv_level(p, 100 * full->score - 1, "within 1 point of it");
        out_kv_level(p, 100 * full->score - 5, "within 5 points");
    }
    out_kv_sizes(p);
    page_out(p, "</table></div>\n");
}

static void out_kv_row(page *p, int place) {
    const sweep_row *r = sweep_store_at(p->store, p->order[place]);
    bool front = sweep_on_front_by(p->store, r, SWEEP_SCORE, SWEEP_X_KEPT);
    page_out(p, "<tr class='%s'><td>%d</td><td class='l o'>", sweep_is_uncached(r) ? "c" : front ? "f" : "", place + 1);
    page_out_name(p, r);
    page_out(p, "</td>");
    if (strcmp(r->status, "ok") != 0) {
        page_out(p, "<td class='l open' colspan='11' style='white-space:normal'>refused: ");
        page_out_text(p, r->reason);
        page_out(p, "</td></tr>\n");
        return;
    }
    page_out_number(p, "<td><b>", "</b></td>", 100 * r->score, 1);
    page_out(p, "<td class='l'>");
    page_out_text(p, r->score_each);
    page_out(p, "</td>");
    page_out_number(p, "<td>", "</td>", 100 * r->agreement, 1);
    page_out_number(p, "<td><b>", "</b></td>", sweep_x_of(r, SWEEP_X_KEPT), 1);
    page_out_number(p, "<td>", "</td>", r->kept_bytes / 1e6, 3);
    page_out_number(p, "<td>", "</td>", r->kv_budget > 0 ? r->kv_budget : NAN, 0);
    page_out_number(p, "<td>", "</td>", r->evictions, 0);
    page_out_number(p, "<td>", "</td>", r->score_ms, 2);
    page_out_number(p, "<td>", "</td>", r->tok_s, 1);
    page_out_number(p, "<td>", "&times;</td>", r->speedup, 2);
    page_out_number(p, "<td>", "</td></tr>\n", r->loop_ms, r->loop_ms < 100 ? 2 : 0);
}

void page_out_kv_table(page *p) {
    page_out(
        p,
        "<h2>All settings, best first</h2>\n<p class='sub'>Yellow: nothing that keeps fewer bytes is as good. Grey: "
        "the "
        "full cache. By task: shares right, in the order of the tasks above. Kept: keys and values at the end of a "
        "sample with the rule's scales, lists and statistics; budget: tokens a layer and key head, mean over samples; "
        "scoring: of a sample, behind the prompt and while decoding.</p>\n"
        "<div class='scroll'><table class='all'><tr><th>#</th><th class='l'>setting</th><th>exact<br>%%</th>"
        "<th class='l'>by task</th><th>agree<br>%%</th><th>kept<br>%%</th><th>kept<br>MB</th><th>budget</th>"
        "<th>evictions</th><th>scoring<br>ms</th><th>tokens/s</th><th>speed-up</th><th>loop ms</th></tr>\n");
    for (int i = 0; i < sweep_store_num(p->store); i++) out_kv_row(p, i);
    page_out(p, "</table></div>\n");
}

void page_out_kv_method(page *p) {
    bool agnostic = strcmp(sweep_store_pin(p->store, "kv"), "agnostic") == 0;
    page_out(
        p,
        "<h2>How it was measured</h2>\n<p><b>Exact match</b>: share of samples whose completion is the task's answer, "
        "mean over tasks. <b>Agreement</b>: share of tokens, place by place, equal to those of this program with the "
        "full cache; mean over samples. %s</p>\n",
        agnostic ? "<b>Question-agnostic</b>: the prompt is compressed up to its question as if nothing followed; the "
                   "question is fed behind it."
                 : "<b>Question-aware</b>: the whole prompt is compressed, its question at the end with it, so that a "
                   "rule which looks at the last queries sees what is asked.");
}
