"""Policies that recompute chosen token rows: ToCa (arXiv 2410.05317), DuCa (2412.18911), DiffSparse's inference
(2604.03674).

Kept per branch: every part's output before its gate; with attention "rows" also q, k, v of every attention. A full
step renews all of it, the row scores s1, and sets every age to 0. A partial step first chooses K rows for every
part, then, part by part in order: compute the part for them from the current hidden state, write them into the kept output, add gate * kept
output. Attention rows: the chosen rows' q, k and v are renewed, their queries attend to all kept keys.
Score    s1 + age_weight * age / period; then every cell x cell square of the grid adds bonus * (its largest score)
         to the row that has it. The K largest; of equals the lower row. age = 0 for the chosen, else + 1, per
         block and part.
         period: ToCa and DuCa the interval, as in the released code; DiffSparse 1.
s1       "attention": column sums of the attention map over queries and heads, of the last time that this block's
         attention was computed in full; "value": sum
         over heads of 1 - |v|; divided by its L2 norm over the rows. An MLP uses its block's attention."""

import math

import torch

from model import PARTS
from step import PARTIAL, SKIP


class TokenRows:
    def __init__(self, run, period, score="attention", age_weight=0.25, bonus=0.6, cell=2):
        net = run.net
        self.net, self.score, self.period = net, score, period
        self.age_weight, self.bonus, self.cell = age_weight, bonus, cell
        self.kept, self.qkv, self.s1, self.age = {}, {}, {}, {}
        self.nearest = []  # (chosen, left out) scores at the border of every choice, for choosing settings

    def scores(self, weights, v):
        received = weights.sum((1, 2)) if self.score == "attention" else (1 - v.norm(dim=-1)).sum(1)
        return received / received.norm(dim=-1, keepdim=True)

    # --- a full step ---

    def full_blocks(self, st, x):
        for b in range(self.net.num_blocks):
            for p in PARTS:
                h = self.net.modulated(p, x, st.mods[b])
                if p == "self":
                    q, k, v = self.net.qkv(b, h)
                    y, weights = self.net.attend(b, q, k, v)
                    self.qkv[b] = [q.clone(), k.clone(), v.clone()]
                    self.s1[b] = self.scores(weights, v)
                else:
                    y = self.net.mlp(b, h)
                self.kept[b, p] = y
                self.age[b, p] = torch.zeros_like(self.s1[b])
                x = st.add(b, p, x, y)
        return x

    # --- a partial step ---

    def choose(self, block, part, count):
        """[G, count] row numbers, ascending"""
        s = self.s1[block] + self.age_weight * self.age[block, part] / self.period
        side, rows = self.net.grid, []
        for g in range(len(s)):
            score = s[g].clone()
            for i in range(0, side, self.cell):
                for j in range(0, side, self.cell):
                    cell = [(i + a) * side + j + b for a in range(self.cell) for b in range(self.cell)
                            if i + a < side and j + b < side]
                    best = max(cell, key=lambda r: (float(s[g][r]), -r))
                    score[best] += self.bonus * s[g][best]
            order = sorted(range(len(score)), key=lambda r: (-float(score[r]), r))
            if 0 < count < len(order):
                self.nearest.append((float(score[order[count - 1]]), float(score[order[count]])))
            rows.append(sorted(order[:count]))
        self.age[block, part] += 1
        for g, chosen in enumerate(rows):
            self.age[block, part][g][chosen] = 0
        return torch.tensor(rows, dtype=torch.int64).reshape(len(s), count)

    def compute_rows(self, st, block, part, x, rows):
        h = self.net.modulated(part, x, st.mods[block])
        for g, chosen in enumerate(rows):
            if len(chosen) == 0:
                continue
            if part == "mlp":
                self.kept[block, part][g, chosen] = self.net.mlp(block, h[g, chosen])
                continue
            new = self.net.qkv(block, h[g : g + 1, chosen])
            for kept, value in zip(self.qkv[block], new):
                kept[g, :, chosen] = value[0]
            q, k, v = [t[g : g + 1] for t in self.qkv[block]]
            self.kept[block, part][g, chosen] = self.net.attend(block, q[:, :, chosen], k, v)[0][0]
        if part == "self" and rows.shape[1] == self.net.tokens:
            q, k, v = self.qkv[block]
            self.s1[block] = self.scores(self.net.attend(block, q, k, v)[1], v)

    def partial_blocks(self, st, x, counts):
        """counts[block, part]: rows computed. All rows of every part is a full step. All rows of one part alone is
        no choice; its output, its ages and, of an attention, s1 are renewed as in a full step."""
        if set(counts.values()) == {self.net.tokens}:
            return self.full_blocks(st, x)
        done = set()
        chosen = {part: self.choose(*part, count) for part, count in counts.items()}  # before anything is computed
        for b in range(self.net.num_blocks):
            for p in PARTS:
                done.add(counts[b, p] > 0)
                self.compute_rows(st, b, p, x, chosen[b, p])
                x = st.add(b, p, x, self.kept[b, p])
        st.did(SKIP if done == {False} else PARTIAL)
        return x


def factor(weight, position):
    return 1 + weight - 2 * weight * position


class ToCa:
    """Counted down, s' = T - 1 - s: full on the first step and where s' divides by thr, which every full step sets
    anew:
    round(interval / factor(schedule_weight, s' / T)), but with `window` 2 while 0.2 T <= s' < 0.4 T. Between:
    attention from the cache (or as many rows as the MLP), MLP rows floor(N * clamp(ratio * factor(layer_weight, l
    / (L - 1)) * factor(step_weight, s' / T) * (1 + 0.6 module_weight)))."""

    def __init__(self, run, interval, ratio, schedule_weight=0.4, window=True, step_weight=2.0, layer_weight=-0.2,
                 module_weight=2.5, attention="cached", **score):
        self.rows = TokenRows(run, interval, **score)
        self.interval, self.ratio, self.schedule_weight, self.window = interval, ratio, schedule_weight, window
        self.module = 1 + 0.6 * module_weight
        self.step_weight, self.layer_weight, self.attention = step_weight, layer_weight, attention
        self.thr = None

    def is_full(self, st):
        down, num = st.num_steps - 1 - st.s, st.num_steps
        if self.thr is not None and down % self.thr != 0:
            return False
        self.thr = round(self.interval / factor(self.schedule_weight, down / num))
        if self.window and 0.2 * num <= down < 0.4 * num:
            self.thr = 2
        return True

    def counts(self, st):
        down, num, layers = st.num_steps - 1 - st.s, st.num_steps, st.net.num_blocks
        counts = {}
        for b in range(layers):
            base = self.ratio * factor(self.layer_weight, b / (layers - 1)) * factor(self.step_weight, down / num)
            share = min(max(base * self.module, 0.0), 1.0)
            counts[b, "mlp"] = math.floor(share * st.net.tokens)
            counts[b, "self"] = counts[b, "mlp"] if self.attention == "rows" else 0
        return counts

    def step(self, st):
        if self.is_full(st):
            return st.final(self.rows.full_blocks(st, st.x_in()))
        return st.final(self.rows.partial_blocks(st, st.x_in(), self.counts(st)))


class DuCa(ToCa):
    """ToCa's schedule; steps an odd number after a full one are ToCa's, on even ones no block runs and the model's
    output of the full step is used again. (The released code takes over what its last layer left behind.)"""

    def __init__(self, run, **options):
        super().__init__(run, **options)
        self.since, self.output = 0, None

    def step(self, st):
        if self.is_full(st):
            self.since = 0
            self.output = st.final(self.rows.full_blocks(st, st.x_in()))
            return self.output
        self.since += 1
        if self.since % 2 == 1:
            return st.final(self.rows.partial_blocks(st, st.x_in(), self.counts(st)))
        st.did(SKIP)
        return self.output


class DiffSparse:
    """A table of levels 0..4 by step and block: level / 4 of the rows; 0 reuses, 4 computes the block in full.
    Table "uniform": of floor(4 budget T L) quarters the first steps take 4 each; the rest R is spread over the
    other n layer-steps in order, the i-th gets floor((i + 1) R / n) - floor(i R / n)."""

    def __init__(self, run, budget, table="uniform", first=1, attention="rows", age_weight=0.08, **score):
        self.rows = TokenRows(run, 1, age_weight=age_weight, **score)
        assert table == "uniform"
        self.attention, self.first = attention, first
        layers = run.net.num_blocks
        n = (run.num_steps - first) * layers
        quarters = max(math.floor(4 * budget * run.num_steps * layers) - 4 * first * layers, 0)
        self.levels = [4] * (first * layers) + [(i + 1) * quarters // n - i * quarters // n for i in range(n)]

    def step(self, st):
        layers, tokens = st.net.num_blocks, st.net.tokens
        if st.s < self.first:
            return st.final(self.rows.full_blocks(st, st.x_in()))
        counts = {}
        for b in range(layers):
            level = self.levels[st.s * layers + b]
            rows = level * tokens // 4
            counts[b, "mlp"] = rows
            among = 0 < level < 4
            counts[b, "self"] = {"rows": rows, "cached": 0, "full": tokens}[self.attention] if among else rows
        return st.final(self.rows.partial_blocks(st, st.x_in(), counts))
