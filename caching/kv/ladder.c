/* caching/kv/ladder.c - LaCache: a ladder over layers and positions, by index alone.
 *
 * LaCache: Ladder-Shaped KV Caching for Efficient Long-Context Modeling of LLMs (ICML 2025); the released rule.
 * A compaction takes rungs of b = 1 + ceil((L - S) / (S - O)) slots behind the cursor, of each a = min(ceil(S / (S - O)), b) stay:
 * those from (layer mod (r + 1)) on, r = b - a. The cursor goes on behind what stayed; when rungs no longer fit in front of the
 * last L slots, it starts over with wider ones. The figure of the paper shows contiguous spans of layers; the released rule is the
 * modulo, so with a = 1, r = 1 even layers share one set and odd ones the other.
 * The first compaction raises the cap by r / 2, so that the mean size is what was asked. Here it is raised from the start: until a
 * head reaches the cap, there is no difference.
 * The newest L slots never thin out, but for up to r - 1 of them when a compaction takes many slots (rungs are whole).
 * A prompt goes in by chunks of cap - sinks - L tokens (bulk compaction would leave far fewer than the cap). */
#include "caching/kv/book.h"

#include <string.h>

static int32_t ceil_div(int32_t a, int32_t b) {
    return (a + b - 1) / b;
}
static int32_t min32(int32_t a, int32_t b) {
    return a < b ? a : b;
}

rf_status rf_kv_ladder_setup(rf_kv_ladder *out, const rf_kv_rule *rule, int num_layers, int32_t budget, rf_error *err) {
    int32_t span = rule->ladder_span > 0 ? rule->ladder_span : num_layers / 2;
    int32_t overlap = rule->ladder_overlap, layers = num_layers;
    *out = (rf_kv_ladder){.layers = layers, .sinks = rule->sinks, .cap = budget};
    if (overlap < 0 || span <= overlap || span >= layers)
        return rf_fail(err, RF_ERR_ARGUMENT,
                       "ladder: overlap < span < layers is wanted: overlap %d, span %d, %d layers", overlap, span,
                       layers);
    out->rung = 1 + ceil_div(layers - span, span - overlap);
    out->kept = min32(ceil_div(span, span - overlap), out->rung);
    out->drop = out->rung - out->kept;
    if (out->drop < 1)
        return rf_fail(err, RF_ERR_ARGUMENT, "ladder: span %d and overlap %d drop nothing with %d layers", span,
                       overlap, layers);
    if (budget == 0) return RF_OK;
    out->cap = budget + out->drop / 2;
    if (out->cap - rule->sinks - layers < out->kept)
        return rf_fail(err, RF_ERR_ARGUMENT,
                       "ladder: a budget of at least sinks %d + layers %d + %d is wanted, found %d", rule->sinks,
                       layers, out->kept, budget);
    return RF_OK;
}

/* Of keep[0..n): slots begin..begin + rungs * width go, but offset + width * j + step * m stays for m < kept. */
static int32_t take_rungs(int32_t begin, int32_t rungs, int32_t width, int32_t offset, int32_t step, int32_t kept,
                          int32_t n, int32_t *keep, uint8_t *mark) {
    int32_t end = min32(begin + rungs * width, n), num = 0;
    memset(mark, 1, (size_t)n);
    if (end > begin) memset(mark + begin, 0, (size_t)(end - begin));
    for (int32_t j = 0; j < rungs; j++) {
        for (int32_t m = 0; m < kept; m++) {
            int32_t slot = begin + offset + width * j + step * m;
            if (slot < n) mark[slot] = 1;
        }
    }
    for (int32_t i = 0; i < n; i++) {
        if (mark[i]) keep[num++] = keep[i];
    }
    return num;
}

int32_t rf_kv_ladder_compact(const rf_kv_ladder *l, int layer, int32_t *cursor, int32_t n, int32_t *keep,
                             uint8_t *mark) {
    int32_t need = n - l->cap, a = l->kept, b = l->rung, r = l->drop;
    int32_t rest = l->cap - *cursor - l->layers;
    if (rest < 0) rest = 0;
    int32_t can = rest / a * r, offset = layer % (r + 1);
    for (int32_t i = 0; i < n; i++) keep[i] = i;
    if (need <= can) {
        int32_t rungs = ceil_div(need, r), num = take_rungs(*cursor, rungs, b, offset, 1, a, n, keep, mark);
        *cursor += a * rungs;
        return num;
    }
    /* what still fits; on the list that is left over from the sinks, with rungs wide enough for the rest */
    n = take_rungs(*cursor, rest / a, b, offset, 1, a, n, keep, mark);
    need -= can;
    int32_t round = (l->cap - l->sinks - l->layers) / a * r, times = ceil_div(need, round);
    int32_t wide = b + (times - 1) * (b - 1), drop = wide - a, rungs = ceil_div(need, drop);
    int32_t num = take_rungs(l->sinks, rungs, wide, layer % (drop + 1), times, a, n, keep, mark);
    *cursor = l->sinks + a * rungs;
    return num;
}

int32_t rf_kv_ladder_prompt(const rf_kv_ladder *l, int layer, int32_t *cursor, int32_t num_tokens, int32_t *keep,
                            int32_t *list, uint8_t *mark) {
    int32_t chunk = l->cap - l->sinks - l->layers, num = 0;
    for (int32_t done = 0; done < num_tokens;) {
        int32_t some = min32(num == 0 ? l->cap : chunk, num_tokens - done);
        for (int32_t i = 0; i < some; i++) list[num++] = done + i;
        done += some;
        while (num > l->cap) {
            int32_t left = rf_kv_ladder_compact(l, layer, cursor, num, keep, mark);
            for (int32_t i = 0; i < left; i++) list[i] = list[keep[i]];
            num = left;
        }
    }
    memcpy(keep, list, (size_t)num * sizeof *keep);
    return num;
}
