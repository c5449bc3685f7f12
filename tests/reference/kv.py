"""What stays of a key-value cache under a budget: every rule in plain numpy, f64, token by token, and the fixture that holds the
engine against it (tests/caching/test_kv_reference.c).

    python tests/reference/kv.py            # golden vectors, then tests/fixtures/kv-rules.json and kv-rules.safetensors
    python tests/reference/kv.py --check    # golden vectors alone

Written from the descriptions of the rules (papers, released codes), one function a rule, in the most direct form: positions in lists,
probabilities of every query as a matrix. Nothing here is shared with the engine.

Symbols   L layers, Hq query heads, Hkv key heads, G = Hq / Hkv, T prompt, N tokens in all, B budget of a layer and key head
          (protected tokens included), w window. P[i, j] = softmax over j <= i of scale q_i . k_j. Ties: lowest index.
Tensors   random with structure (topics, sinks, heavy keys), exact in f16. No rotation: what a rule decides depends on the
          probabilities alone. While decoding, softmax is over the kept slots and the token itself; a token goes after its step.
Margins   every choice keeps MARGIN between the last kept and the first dropped score, relative to it, or both are equal because they
          are the same expression of the same integers; so a correct f32 computation chooses alike.
Readings  where texts leave room (see `CASES` for options):
  h2o, a2sf    accumulators are of a key head: mean (a2sf: sum) of its query heads
  caote        h of the window's sums over all keys, so that o' is the window's mean output; per query head, then pool, then group
  criticalkv   (s + 1e-4) n with s and n both means over the group; the first half is half of the whole budget, and the window, whose
               score is above all, is in it (kvpress)
  lacache      a prompt comes in chunks of C - sinks - L tokens, each compacted at once
  treekv       S and C of a key head, mean of its query heads; the newest query counts before the contest; decoding alone
  lazy         p: mean over the group; a new token's last activation is its own step, its longest gap 0 and then its score 0;
               H1 + H2; decoding alone (a prompt of one token)
  kvcrush      a page holds all heads of a layer; bits head by head, is the score in the upper half of the open tokens of its head;
               anchor 0 1 0 1 ... over all bits
  dapq         no token is protected, no pooling
  laq          window columns protected, scores pooled over the others
  compresskv   equal shares of layers
  fastkv       behind the layer: the int(share T) best by the sum of the heads' pooled scores, and the window beside them; later
               layers attend, pool and choose among those, at most B of them; a prompt within B passes whole
  skipkv       attention of the prompt: max over the group of the window's means; while decoding: mean over the last w tokens of the
               max over the group; pooled in front of the window. Redundancy: softmax over keys of the mean of a column of cosines, where
               in each row the newest near duplicate (cosine above 0.5) counts 0 (R-KV; the released code also drops the first key
               from rows without one). Sentences of two tokens or more, ended before the token of the step; the earlier of two with
               cosine >= 0.95 loses that cosine, the largest of several; none behind the prompt
  ems          the texts leave score and classes open: the window's sums decide, and a join that is made goes to the kept token of the
               largest cos(k) cos(v)
  razor        the budget, sinks with it, stands for the published length of a head that keeps no far tokens; a key head is a retrieval head
               if any head of its group is; what is dropped leaves a mean behind, which is no slot; behind the prompt alone
  trimkv       behind a prompt too, a head goes back to the budget only when it has the buffer more
  global-retention  the same for all slots together, buffer x layers x key heads more; floor (0): every head's best int(floor B) stay, the
               rest of the budget is the best of all others
  tokenselect  1 / sqrt(D), and query head h on key head h / G; true positions; a new choice each step
  fasa         pairs of each prompt, from its last 8 queries, each with the best min(budget, a quarter of what it sees)
  sentencekv   a sentence that does not fit is passed over; the prompt's last one ends with the prompt; one that has not ended is no
               candidate; the query is of new tokens alone, a mean over the group too; tokens that do not count are never read
               between the ends
  icecache     no tree: pages of the first key without one and those nearest to it; a page costs its slots between the ends
"""

import argparse
import json
import math
from fractions import Fraction
from pathlib import Path

import numpy as np

SEED = 20
MARGIN = 1e-6
READ_MARGIN = 5e-6  # of a selection: the engine takes products of queries and keys in f32
L, HQ, HKV, D, T, NEW = 3, 4, 2, 16, 96, 60
MANY = 8  # layers of rules that look at nothing
G = HQ // HKV
N = T + NEW
SCALE = 1 / math.sqrt(D)
WIDTH = 24  # of the hidden state, behind W_O
BUDGETS = (12, 24, 48)
WINDOW = {12: 4, 24: 8, 48: 16}
EVERY = 10  # decoded tokens between two records
HERE = Path(__file__).resolve().parent
FIXTURES = HERE.parent / "fixtures"


# Tensors --------------------------------------------------------------------------------------------


def half(x):
    return x.astype(np.float16).astype(np.float64)


def make_tensors(seed):
    """q [L, N, Hq, D], k and v [L, N, Hkv, D]; pseudo and drafted queries [L, n, Hq, D]; wo [L, Hq, D, WIDTH]."""
    r = np.random.default_rng(seed)
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    topics = 7
    topic = r.integers(0, topics, N)
    weight = r.gamma(1.5, 1.0, N)  # some tokens matter more
    weight[:3] += 2.5
    q, k, v = np.zeros((L, N, HQ, D)), np.zeros((L, N, HKV, D)), np.zeros((L, N, HKV, D))
    pseudo, drafted = np.zeros((L, 16, HQ, D)), np.zeros((L, 8, HQ, D))
    for l in range(L):
        sharp = (2.2, 3.2, 4.4)[l]
        for g in range(HKV):
            c = unit(r.normal(size=(topics, D)))
            common = unit(r.normal(size=D))
            k[l, :, g] = c[topic] * (0.6 + weight[:, None]) + 0.7 * common * weight[:, None] + 0.45 * r.normal(size=(N, D))
            v[l, :, g] = r.normal(size=(N, D)) * (0.5 + r.gamma(2.0, 0.4, (N, 1)))
            for h in range(g * G, (g + 1) * G):
                taste = r.dirichlet(np.ones(topics) * 0.6)

                def queries(n, own):
                    return sharp * (own + 1.2 * (taste @ c) + 0.5 * common) + 0.9 * r.normal(size=(n, D))

                q[l, :, h] = queries(N, 0.7 * c[np.roll(topic, 1)])
                pseudo[l, :, h] = queries(16, 0.7 * c[r.integers(0, topics, 16)])
                drafted[l, :, h] = queries(8, 0.7 * c[topic[T - 1:T + 7]])
    wo = r.normal(size=(L, HQ, D, WIDTH)) / math.sqrt(HQ * D)
    return {"q": half(q), "k": half(k), "v": half(v), "pseudo": half(pseudo), "drafted": half(drafted), "wo": half(wo)}


DOT = 1  # the token that ends a sentence


def make_sentences(seed):
    """hidden [N, WIDTH], tokens [N]: sentences on a few themes, said again and again; some of one token."""
    r = np.random.default_rng(seed)
    themes = r.normal(size=(6, WIDTH))
    hidden, tokens = [], []
    while len(tokens) < N:
        words = int(r.choice((0, 2, 3, 5, 7)))
        hidden += list(themes[r.integers(6)] + r.choice((0.1, 0.9)) * r.normal(size=(words + 1, WIDTH)))
        tokens += list(r.integers(2, 50, words)) + [DOT]
    return half(np.array(hidden[:N])), [int(t) for t in tokens[:N]]


def make_retention(seed):
    """Log retention [L, Hkv, N] of every token: some are forgotten at once, few never, and heads differ."""
    r = np.random.default_rng(seed)
    g = r.normal(size=(L, HKV, 1)) + 4 + 2 * r.normal(size=(L, HKV, N))
    return half(-np.log1p(np.exp(-g)))


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def prompt_attention(x, layer, tokens):
    """Z, P [Hq, tokens, tokens], causal."""
    q, k = x["q"][layer, :tokens], x["k"][layer, :tokens]
    z = np.stack([SCALE * q[:, h] @ k[:, h // G].T for h in range(HQ)])
    p = softmax(np.where(np.tril(np.ones((tokens, tokens), bool)), z, -np.inf))
    return z, p


# Parts ----------------------------------------------------------------------------------------------

closest = [math.inf]  # the smallest relative gap that a choice had


def note_gap(a, b, bound=None):
    """a kept, b dropped."""
    if a != b:
        closest[0] = min(closest[0], abs(a - b) / (bound or max(abs(a), abs(b))))


def top(score, count, allowed=None):
    """The `count` best indices, ascending."""
    order = sorted(range(len(score)) if allowed is None else allowed, key=lambda j: (-score[j], j))
    if 0 < count < len(order):
        note_gap(score[order[count - 1]], score[order[count]])
    return sorted(order[:max(count, 0)])


def pool(x, kind, size):
    out = np.zeros(len(x))
    for j in range(len(x)):
        near = [x[i] for i in range(j - size // 2, j + size // 2 + 1) if 0 <= i < len(x)]
        out[j] = x[j] if kind == "none" else sum(near) / size if kind == "avg" else max(near)
    return out


def over_group(x, how="mean"):
    """[Hq, n] -> [Hkv, n]"""
    x = np.asarray(x).reshape(HKV, G, -1)
    return {"mean": x.mean(1), "sum": x.sum(1), "max": x.max(1)}[how]


def pyramid(num_layers, capacity, window, keys, beta):
    """Without the window. The formula alone: whether it applies is the rule's business."""
    base = capacity - window
    low = base // beta
    high = 2 * base - low
    if high >= keys - window:
        high = keys - window
        low = 2 * base - high
    step = (high - low) // (num_layers - 1)
    return [high - l * step for l in range(num_layers)]


def half_even(x):
    below = math.floor(x)
    part = x - below
    return below + (1 if part > 0.5 or (part == 0.5 and below % 2) else 0)


def flat_heads(scores, base, floor, normalise):
    """Ada-KV's budgets of heads; scores [H, n]."""
    s = np.array(scores, float)
    if normalise:
        for h in range(len(s)):
            s[h] *= sum(sorted(s[h], reverse=True)[:base]) / sum(s[h])
    n = s.shape[1]
    flat = top(s.reshape(-1), len(s) * base)
    counts = [sum(1 for i in flat if i // n == h) for h in range(len(s))]
    return [half_even(c * (1 - floor) + math.floor(floor * base)) for c in counts]


def cake_budgets(preference, total, most):
    """Layers done so far share the whole total."""
    real = [p / sum(preference) * total for p in preference]
    b = [int(r) for r in real]
    excess = sum(max(x - most, 0) for x in b)
    b = [min(x, most) for x in b]

    def spread(amount, fits):
        if not fits:
            return
        each, left = divmod(abs(amount), len(fits))
        sign = 1 if amount > 0 else -1
        for place, i in enumerate(fits):
            b[i] += sign * (each + (1 if place < left else 0))

    if excess > 0:
        spread(excess, [i for i, x in enumerate(b) if x < most])
    difference = total - sum(b)
    if difference > 0:
        spread(difference, [i for i, x in enumerate(b) if x < most])
    elif difference < 0:
        spread(difference, [i for i, x in enumerate(b) if x > 1])
    return [min(x, most) for x in b]


class Ladder:
    """LaCache: lists of all layers, compacted together."""

    def __init__(self, layers, cap, sinks, span, overlap):
        self.lists = [[] for _ in range(layers)]
        self.cap, self.sinks, self.cursor = cap, sinks, sinks
        self.b = 1 + -((layers - span) // -(span - overlap))
        self.a = min(-(span // -(span - overlap)), self.b)
        self.r = self.b - self.a
        self.compacted = False

    def append(self, token):
        for one in self.lists:
            one.append(token)

    def compact(self):
        """True if tokens went."""
        layers, n = len(self.lists), len(self.lists[0])
        if n <= self.cap:
            return False
        if not self.compacted:  # the average length is to be the cap
            self.compacted = True
            self.cap += self.r // 2
            if n <= self.cap:
                return False
        need = n - self.cap
        room = self.cap - self.cursor - layers
        can = max(room, 0) // self.a * self.r

        def rungs(start, b, r, stride, count):
            for i in range(layers):
                one = self.lists[i]
                keep = list(range(start))
                keep += [start + i % (r + 1) + b * j + stride * m for j in range(count) for m in range(self.a)]
                self.lists[i] = [one[s] for s in keep + list(range(start + b * count, len(one)))]

        if need <= can:
            count = -(need // -self.r)
            rungs(self.cursor, self.b, self.r, 1, count)
            self.cursor += self.a * count
        else:
            rungs(self.cursor, self.b, self.r, 1, max(room, 0) // self.a)
            need -= can
            span = (self.cap - self.sinks - layers) // self.a * self.r
            tau = -(need // -span)
            b = self.b + (tau - 1) * (self.b - 1)
            r = b - self.a
            count = -(need // -r)
            rungs(self.sinks, b, r, tau, count)
            self.cursor = self.sinks + self.a * count
        return True


def contest(slots, cursor, region, score):
    """TreeKV: `region` + 1 slots, cursor from 1; the slot that goes, and the next cursor."""
    left, right = slots[cursor - 1], slots[cursor]
    note_gap(score[left], score[right])
    return (left if score[left] <= score[right] else right), cursor % region + 1


# Prompts: each returns kept positions [layer][key head] ---------------------------------------------


def everywhere(kept):
    return [[list(kept) for _ in range(HKV)] for _ in range(L)]


def streaming(tokens, budget, sinks=4):
    return everywhere(range(tokens) if tokens <= budget else [*range(sinks), *range(tokens - budget + sinks, tokens)])


def heavy(score, budget, sinks=0, recents=0):
    n = len(score)
    if n <= budget:
        return list(range(n))
    fixed = [*range(sinks), *range(n - recents, n)]
    return sorted(fixed + top(score, budget - len(fixed), range(sinks, n - recents)))


def column_sums(p, weights=None):
    return p.sum(1) if weights is None else np.einsum("hij,i->hj", p, weights)


def observed(x, budget):
    kept = []
    for l in range(L):
        s = column_sums(prompt_attention(x, l, T)[1]) / (T - np.arange(T))
        kept.append([heavy(one, budget) for one in over_group(s)])
    return kept


def window_scores(p, w):
    return p[:, -w:, :-w].sum(1)


def behind(scores, n, w):
    """The n best columns before the window, and the window."""
    return top(scores, n) + list(range(T - w, T))


def snapkv(x, budget, w, kind, size, group="mean"):
    if T <= budget:
        return everywhere(range(T))
    kept = []
    for l in range(L):
        s = [pool(one, kind, size) for one in window_scores(prompt_attention(x, l, T)[1], w)]
        kept.append([behind(one, budget - w, w) for one in over_group(s, group)])
    return kept


def fastkv(x, budget, w, layer=None, share=0.2, size=7):
    """Kept positions, and the window's sums [L, Hq, T] over the tokens that each layer receives, in order, 0 behind them."""
    layer = max(L // 2 - 1, 0) if layer is None else layer
    got, kept, sums = list(range(T)), [], np.zeros((L, HQ, T))
    for l in range(L):
        n = len(got)
        q, k = x["q"][l, got], x["k"][l, got]
        z = np.stack([SCALE * q[:, h] @ k[:, h // G].T for h in range(HQ)])
        p = softmax(np.where(np.tril(np.ones((n, n), bool)), z, -np.inf))
        sums[l, :, :n] = p[:, -w:].sum(1)
        s = over_group([pool(one, "max", size) for one in window_scores(p, w)], "sum")
        window = list(range(n - w, n))
        best = [list(range(n)) if n <= budget else top(one, budget - w) + window for one in s]
        kept.append([[got[i] for i in one] for one in best])
        if l == layer and n > budget and int(share * n) + w < n:
            got = [got[i] for i in top(s.sum(0), int(share * n)) + window]
    return kept, sums


FAST = [(4, 12, None, 0.2), (8, 24, None, 0.2), (16, 48, None, 0.2), (8, 24, 1, 0.5), (8, 48, 0, 0.4), (4, 24, 2, 0.3)]


def pyramidkv(x, budget, w, size=7, beta=20):
    base = budget - w
    share = [base] * L if T < 2 * base else pyramid(L, budget, w, T, beta)
    kept = []
    for l in range(L):
        s = over_group([pool(one, "max", size) for one in window_scores(prompt_attention(x, l, T)[1], w)])
        kept.append([behind(one, share[l], w) for one in s])
    return kept


def flat(scores, budget, w, floor):
    base = budget - w
    return [behind(one, n, w) for one, n in zip(scores, flat_heads(scores, base, floor, False))]


def adakv(x, budget, w, floor=0.2, size=7):
    kept = []
    for l in range(L):
        s = over_group(window_scores(prompt_attention(x, l, T)[1], w) / w)
        kept.append(flat([pool(one, "max", size) for one in s], budget, w, floor))
    return kept


def flat_all(x, budget, w, size):
    """One top over all layers and heads, no floor."""
    s = []
    for l in range(L):
        s += list(over_group([pool(one, "avg", size) for one in window_scores(prompt_attention(x, l, T)[1], w)]))
    n = T - w
    best = top(np.concatenate(s), L * HKV * (budget - w))
    return [[[i - (l * HKV + g) * n for i in best if i // n == l * HKV + g] + list(range(n, T)) for g in range(HKV)]
            for l in range(L)]


def knorm(x, budget):
    return [[heavy(-np.linalg.norm(x["k"][l, :T, g], axis=-1), budget) for g in range(HKV)] for l in range(L)]


def key_cosines(k):
    unit = k / np.linalg.norm(k, axis=-1, keepdims=True)
    anchor = unit.mean(0)
    return unit @ (anchor / np.linalg.norm(anchor))


def keydiff(x, budget):
    return [[heavy(-key_cosines(x["k"][l, :T, g]), budget) for g in range(HKV)] for l in range(L)]


def expected_logits(x, l, sinks=4):
    """Mean and biased covariance of the queries behind the sinks; no rotation here, so nothing to average."""
    out = np.zeros((HQ, T))
    for h in range(HQ):
        q, k = x["q"][l, sinks:T, h], x["k"][l, :T, h // G]
        mean = q.mean(0)
        cov = (q - mean).T @ (q - mean) / len(q)
        out[h] = k @ mean / math.sqrt(D) + np.einsum("ti,ij,tj->t", k, cov, k) / (2 * D)
    return out


def expected(x, budget, sinks=4):
    kept = []
    for l in range(L):
        s = over_group(softmax(expected_logits(x, l)[:, sinks:])) * np.linalg.norm(x["v"][l, sinks:T], axis=-1).T
        kept.append([[*range(sinks), *(sinks + j for j in top(one, budget - sinks))] for one in s])
    return kept


def cake_preference(p, w, tau1, tau2):
    part = p[:, -w:, :-w]
    spread = -(part * np.log(part + 1e-10)).sum()
    shift = part.var(axis=1, ddof=1).sum()
    return spread ** (1 / tau1) * shift ** (1 / tau2)


def cake(x, budget, w, gamma=200.0, tau1=1.6, tau2=0.4):
    """Also each layer's final budget without the window."""
    prefer, stored, kept, share = [], [], [], []
    for l in range(L):
        p = prompt_attention(x, l, T)[1]
        prefer.append(cake_preference(p, w, tau1, tau2))
        part = p[:, -w:, :-w]
        e = part.mean(1) + gamma * part.var(axis=1, ddof=1)
        stored.append(over_group([pool(one, "avg", 5) for one in e]))
        kept.append([list(range(T - w)) for _ in range(HKV)])
        share = cake_budgets(prefer, (budget - w) * L, T - w)
        if l > 0:  # real budgets are truncated
            closest[0] = min(closest[0], *(abs(r - round(r)) for r in np.array(prefer) / sum(prefer) * (budget - w) * L))
        for done in range(l + 1):  # earlier layers shrink again, by the scores that they still have
            for g in range(HKV):
                now = kept[done][g]
                left = stored[done][g][now]
                kept[done][g] = [now[i] for i in top(left, share[done])]
    return [[one + list(range(T - w, T)) for one in layer] for layer in kept], share


def removal_terms(x, l, w, value):
    """[Hq, T], every column."""
    z, p = prompt_attention(x, l, T)
    out = np.zeros((HQ, T))
    for h in range(HQ):
        v = x["v"][l, :T, h // G]
        for i in range(T - w, T):
            o = p[h, i] @ v
            for j in range(i + 1):
                a, b, d = p[h, i, j], z[h, i, j], v[j] - o
                if value == "obc-value":
                    out[h, j] += a * a * (v[j] @ v[j])
                elif value == "obc-key":
                    out[h, j] += (a * b) ** 2 * (d @ d)
                elif value == "obc-joint":
                    e = a * v[j] + a * b * d
                    out[h, j] += e @ e
                else:
                    a = min(a, 1 - 1e-4)
                    out[h, j] += (a / (1 - a)) ** 2 * (d @ d)
    return out


def by_removal(x, budget, w, value, kind="none", size=5):
    kept = []
    for l in range(L):
        s = removal_terms(x, l, w, value)[:, :T - w]
        kept.append([behind(one, budget - w, w) for one in over_group([pool(one, kind, size) for one in s])])
    return kept


def obcache_adakv(x, budget, w, value="obc-joint", floor=0.2, size=7):
    kept = []
    for l in range(L):
        s = over_group(removal_terms(x, l, w, value)[:, :T - w])
        kept.append(flat([pool(one, "max", size) for one in s], budget, w, floor))
    return kept


def caote_scores(s, v, fast=False):
    h = s / s.sum()
    o = v.mean(0) if fast else h @ v
    return h / (1 - h) * np.linalg.norm(o - v, axis=-1)


def caote_snapkv(x, budget, w, size=5, fast=False):
    kept = []
    for l in range(L):
        s = column_sums(prompt_attention(x, l, T)[1][:, -w:])
        c = [caote_scores(one, x["v"][l, :T, h // G], fast)[:T - w] for h, one in enumerate(s)]
        kept.append([behind(one, budget - w, w) for one in over_group([pool(one, "avg", size) for one in c])])
    return kept


def caote_h2o(x, budget):
    kept = []
    for l in range(L):
        s = column_sums(prompt_attention(x, l, T)[1])
        c = over_group([caote_scores(one, x["v"][l, :T, h // G]) for h, one in enumerate(s)])
        kept.append([heavy(one, budget, 0, budget // 2) for one in c])
    return kept


def wo_norms(x, l):
    return np.stack([np.abs(x["v"][l, :T, h // G] @ x["wo"][l, h]).sum(-1) for h in range(HQ)])


def criticalkv(x, budget, w, mean=False, size=5):
    kept = []
    for l in range(L):
        s = window_scores(prompt_attention(x, l, T)[1], w) / (w if mean else 1)
        s = over_group([pool(one, "avg", size) for one in s])
        n = over_group(wo_norms(x, l))
        layer = []
        for g in range(HKV):
            first = top(s[g], max(budget // 2 - w, 0))
            rest = [j for j in range(T - w) if j not in first]
            second = top((s[g] + 1e-4) * n[g, :T - w], budget - w - len(first), rest)
            layer.append(sorted(first + second) + list(range(T - w, T)))
        kept.append(layer)
    return kept


def merge_joins(x, kept):
    """kvpress's weights: [from, to, weight] of each layer and key head, weights of 0 left out."""
    out = []
    for l in range(L):
        for g in range(HKV):
            k, v = x["k"][l, :T, g], x["v"][l, :T, g]
            unit, size = k / np.linalg.norm(k, axis=-1, keepdims=True), np.linalg.norm(v, axis=-1)
            joins = []
            for e in sorted(set(range(T)) - set(kept[l][g])):
                like = [unit[e] @ unit[t] for t in kept[l][g]]
                t = kept[l][g][int(np.argmax(like))]
                second = sorted(like)[-2]
                note_gap(max(like), second)
                weight = max(max(like), 0.0) * size[e] / (size[e] + size[t])
                if weight > 0:
                    joins.append([e, t, weight])
            out.append(joins)
    return out


def ems_joins(x, kept):
    out = []
    for l in range(L):
        for g in range(HKV):
            k, v = x["k"][l, :T, g], x["v"][l, :T, g]
            k, v = (a / np.linalg.norm(a, axis=-1, keepdims=True) for a in (k, v))
            joins = []
            for e in sorted(set(range(T)) - set(kept[l][g])):
                like = [(k[e] @ k[t]) * (v[e] @ v[t]) for t in kept[l][g]]
                joins.append([e, kept[l][g][int(np.argmax(like))], 1.0])
            out.append(joins)
    return out


def elastic(x, budget):
    kept = []
    for l in range(L):
        s = column_sums(prompt_attention(x, l, T)[1]).mean(0)
        kept.append([heavy(s, budget, 4, 1) for _ in range(HKV)])
    return kept


def near_joins(kept):
    """Nearest kept index, the lower of two; plain means, so every weight is 1."""
    out = []
    for l in range(L):
        for g in range(HKV):
            out.append([[e, min(kept[l][g], key=lambda t: (abs(t - e), t)), 1.0]
                        for e in sorted(set(range(T)) - set(kept[l][g]))])
    return out


def kvcrush(x, budget, w, sinks, page, share=0.25):
    kept = []
    for l in range(L):
        s = over_group(window_scores(prompt_attention(x, l, T)[1], w))
        count, fit = (T - w - sinks) // page, (budget - w - sinks) // page
        pages = [list(range(sinks + i * page, sinks + (i + 1) * page)) for i in range(count)]
        crushed = int(share * fit)
        best = top([s[:, pg].sum() for pg in pages], fit - crushed)
        upper = [set(top(one, count * page // 2, range(sinks, sinks + count * page))) for one in s]
        rest = [i for i in range(count) if i not in best]
        bits = {i: [j in upper[g] for g in range(HKV) for j in pages[i]] for i in rest}
        far = {i: sum(bit != (at % 2 == 1) for at, bit in enumerate(bits[i])) for i in rest}
        order = sorted(rest, key=lambda i: (far[i], i))
        spread = [order[round(i * (len(order) - 1) / (crushed - 1))] for i in range(crushed)]
        kept.append([sorted([*range(sinks), *range(T - w, T), *(j for i in best + spread for j in pages[i])])] * HKV)
    return kept


def outside_attention(x, l, rows):
    """[Hq, n, T]: queries behind the prompt over its keys alone."""
    return np.stack([softmax(SCALE * rows[l, :, h] @ x["k"][l, :T, h // G].T) for h in range(HQ)])


def dapq(x, budget):
    return [[heavy(one, budget) for one in over_group(outside_attention(x, l, x["pseudo"]).sum(1))] for l in range(L)]


def laq_sums(x, l, with_window):
    s = outside_attention(x, l, x["drafted"]).sum(1)
    return s + prompt_attention(x, l, T)[1][:, -8:].sum(1) if with_window else s


def laq(x, budget, w, with_window, size=7):
    kept = []
    for l in range(L):
        s = over_group([pool(one, "max", size) for one in laq_sums(x, l, with_window)[:, :T - w]])
        kept.append([behind(one, budget - w, w) for one in s])
    return kept


HEAD_LIST = [[1, 0, 0, 1], [0, 1, 1, 1], [0, 0, 1, 0]]


def compresskv(x, budget, w, size=5):
    kept = []
    for l in range(L):
        s = [pool(one, "avg", size) for one in window_scores(prompt_attention(x, l, T)[1], w)]
        mean = np.mean([one for h, one in enumerate(s) if HEAD_LIST[l][h]], axis=0)
        kept.append([behind(mean, budget - w, w)] * HKV)
    return kept


RETRIEVAL = [[1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]]  # heads


def razor(budget, sinks=4):
    near = [*range(sinks), *range(T - budget + sinks, T)]
    return [[list(range(T)) if any(RETRIEVAL[l][g * G:(g + 1) * G]) else near for g in range(HKV)] for l in range(L)]


# Decoding: each returns a list of records, the first behind the prompt, then one every EVERY tokens ---


def decode(x, kept, tokens, after):
    """after(layer, position, slots [key head], p [query head][slot]) changes slots in place."""
    kept = [[list(one) for one in layer] for layer in kept]
    records = [json.loads(json.dumps(kept))]
    for t in range(tokens, tokens + NEW):
        for l in range(L):
            for g in range(HKV):
                kept[l][g].append(t)
            p = [softmax(SCALE * x["k"][l, kept[l][h // G], h // G] @ x["q"][l, t, h]) for h in range(HQ)]
            after(l, t, kept[l], p)
        if (t - tokens + 1) % EVERY == 0:
            records.append(json.loads(json.dumps(kept)))
    return records


def group_rows(p, g, how):
    rows = [p[h] for h in range(g * G, (g + 1) * G)]
    return np.sum(rows, 0) / (G if how == "mean" else 1)


def decode_streaming(x, budget, sinks=4):

    def after(l, t, slots, p):
        for one in slots:
            if len(one) > budget:
                del one[sinks:len(one) - (budget - sinks)]

    return decode(x, streaming(T, budget, sinks), T, after)


def accumulated(x, budget, recents, decay, how):
    """H2O (decay 1, mean) and A2SF."""
    acc = [[{} for _ in range(HKV)] for _ in range(L)]
    kept = []
    for l in range(L):
        s = over_group(column_sums(prompt_attention(x, l, T)[1], decay ** np.arange(T - 1, -1, -1.0)), how)
        kept.append([heavy(one, budget, 0, recents) for one in s])
        for g in range(HKV):
            acc[l][g] = {j: s[g][j] for j in kept[l][g]}

    def after(l, t, slots, p):
        for g, one in enumerate(slots):
            row = group_rows(p, g, how)
            acc[l][g] = {j: decay * acc[l][g].get(j, 0.0) + row[i] for i, j in enumerate(one)}
            if len(one) > budget:
                one[:] = [one[i] for i in heavy([acc[l][g][j] for j in one], budget, 0, recents)]

    return decode(x, kept, T, after)


def tova(x, budget, recents=0):
    kept = []
    for l in range(L):
        kept.append([heavy(prompt_attention(x, l, T)[1][:, -1].mean(0), budget, 0, recents)] * HKV)

    def after(l, t, slots, p):
        assert slots[0] == slots[1]
        if len(slots[0]) > budget:
            best = heavy(np.mean(p, 0), budget, 0, recents)
            for one in slots:
                one[:] = [one[i] for i in best]

    return decode(x, kept, T, after)


def decode_cake(x, budget, w, **options):
    kept, share = cake(x, budget, w, **options)

    def after(l, t, slots, p):
        for g, one in enumerate(slots):
            n = len(one) - w
            if n > share[l]:
                s = np.mean([pool(p[h][:n], "avg", 5) for h in range(g * G, (g + 1) * G)], 0)
                one[:] = [one[i] for i in top(s, share[l])] + one[n:]

    return decode(x, kept, T, after)


def decode_knorm(x, budget):

    def after(l, t, slots, p):
        for g, one in enumerate(slots):
            one[:] = [one[i] for i in heavy(-np.linalg.norm(x["k"][l, one, g], axis=-1), budget)]

    return decode(x, knorm(x, budget), T, after)


def decode_keydiff(x, budget, every):

    def after(l, t, slots, p):
        if (t - T + 1) % every == 0:
            for g, one in enumerate(slots):
                one[:] = [one[i] for i in heavy(-key_cosines(x["k"][l, one, g]), budget)]

    return decode(x, keydiff(x, budget), T, after)


def redundancy(k):
    unit = k / np.linalg.norm(k, axis=-1, keepdims=True)
    cosine = unit @ unit.T
    for i, row in enumerate(cosine):
        row[i] = 0
        near = np.nonzero(row > 0.5)[0]
        if len(near):
            row[near[-1]] = 0
    return softmax(cosine.mean(0))


def said_again(x, end, threshold=0.95):
    """Penalty of each of the first `end` tokens."""
    spans, vectors, first = [], [], 0
    for t in range(end):
        if x["tokens"][t] == DOT:
            if t > first:
                mean = x["hidden"][first:t + 1].mean(0)
                spans.append(range(first, t + 1))
                vectors.append(mean / np.linalg.norm(mean))
            first = t + 1
    out = np.zeros(N)
    for i, one in enumerate(vectors):
        cosines = [float(one @ other) for other in vectors[i + 1:]]
        out[list(spans[i])] = max([c for c in cosines if c >= threshold], default=0)
    return out


def skipkv(x, budget, w, every, sigma=0.1, penalty=1.0, size=7):
    """Behind the prompt and every so many tokens."""
    kept = []
    mix = lambda attention, k: attention if sigma == 0 else sigma * attention - (1 - sigma) * redundancy(k)[:len(attention)]
    for l in range(L):
        s = over_group(window_scores(prompt_attention(x, l, T)[1], w) / w, "max")
        kept.append([behind(mix(pool(s[g], "max", size), x["k"][l, :T, g]), budget - w, w) for g in range(HKV)])
    seen = min(w, every)
    rows = [[{} for _ in range(HKV)] for _ in range(L)]

    def after(l, t, slots, p):
        since = (t - T) % every + 1
        for g, one in enumerate(slots):
            if since == every - seen + 1:
                rows[l][g] = {}
            for i, j in enumerate(one):
                rows[l][g][j] = rows[l][g].get(j, 0.0) + max(p[h][i] for h in range(g * G, (g + 1) * G)) / seen
            if since < every or len(one) <= budget:
                continue
            old = one[:len(one) - w]
            s = mix(pool(np.array([rows[l][g][j] for j in old]), "max", size), x["k"][l, one, g])
            s = s - penalty * said_again(x, t)[old]
            one[:] = [old[i] for i in top(s, budget - w)] + one[len(one) - w:]

    return decode(x, kept, T, after)


def lacache(budget, tokens, span, overlap, layers=L, sinks=4):
    ladder = Ladder(layers, budget, sinks, span, overlap)
    chunk = budget - sinks - layers
    for t in range(tokens):
        ladder.append(t)
        if (t + 1) % chunk == 0 or t == tokens - 1:
            ladder.compact()
    records = [[[list(one)] * HKV for one in ladder.lists]]
    for t in range(tokens, tokens + NEW):
        ladder.append(t)
        ladder.compact()
        if (t - tokens + 1) % EVERY == 0:
            records.append([[list(one)] * HKV for one in ladder.lists])
    return records


def treekv(x, budget, tokens, sinks=4):
    recents = (budget - sinks) // 2
    region = budget - sinks - recents
    cursor = [[1] * HKV for _ in range(L)]
    total, seen = {}, {}
    for l in range(L):
        s = over_group(column_sums(prompt_attention(x, l, tokens)[1]))
        for g in range(HKV):
            for j in range(tokens):
                total[l, g, j], seen[l, g, j] = s[g][j], tokens - j

    def after(l, t, slots, p):
        for g, one in enumerate(slots):
            row = group_rows(p, g, "mean")
            for i, j in enumerate(one):
                total[l, g, j] = total.get((l, g, j), 0.0) + row[i]
                seen[l, g, j] = seen.get((l, g, j), 0) + 1
            if len(one) > budget:
                open_slots = one[sinks:len(one) - recents]
                assert len(open_slots) == region + 1
                score = {j: total[l, g, j] / seen[l, g, j] for j in open_slots}
                gone, cursor[l][g] = contest(open_slots, cursor[l][g], region, score)
                one.remove(gone)

    return decode(x, everywhere(range(tokens)), tokens, after)


def lazy(x, budget, every, activation):
    """Of a prompt of one token."""
    last, gap = {}, {}
    for l in range(L):
        for g in range(HKV):
            last[l, g, 0], gap[l, g, 0] = 0, 0
    sigmoid = lambda y: 1 / (1 + math.exp(-y))

    def after(l, t, slots, p):
        for g, one in enumerate(slots):
            row = group_rows(p, g, "mean")
            for i, j in enumerate(one):
                if j == t:
                    last[l, g, j], gap[l, g, j] = t, 0
                elif row[i] >= activation:
                    gap[l, g, j] = max(gap[l, g, j], t - last[l, g, j])
                    last[l, g, j] = t
                closest[0] = min(closest[0], abs(row[i] - activation) / activation)
            if t % every == 0 and len(one) > budget:  # t tokens were generated behind the first
                score = []
                for j in one:
                    m, idle = gap[l, g, j], t - last[l, g, j]
                    score.append(2 * sigmoid(-idle / m) + 2 * sigmoid(-1 / m) if m > 0 else 0.0)
                one[:] = [one[i] for i in heavy(score, budget, 0, every)]

    return decode(x, everywhere([0]), 1, after)


def trimkv(x, budget, buffer):
    """Log retention times age; the age counts to the token that comes next, behind `seen` tokens."""

    def evict(l, g, slots, seen):
        if len(slots) < budget + buffer:
            return slots
        return [slots[i] for i in top([(seen + 1 - j) * x["gate"][l, g, j] for j in slots], budget)]

    def after(l, t, slots, p):
        for g, one in enumerate(slots):
            one[:] = evict(l, g, one, t + 1)

    return decode(x, [[evict(l, g, list(range(T)), T) for g in range(HKV)] for l in range(L)], T, after)


def global_retention(x, budget, buffer, floor=0.0):
    """One choice over all layers and key heads."""
    heads = [(l, g) for l in range(L) for g in range(HKV)]

    def evict(slots, seen):
        """slots {(layer, key head): list}"""
        if sum(map(len, slots.values())) < len(heads) * (budget + buffer):
            return
        score = {(h, j): (seen + 1 - j) * x["gate"][h][j] for h in heads for j in slots[h]}
        sure = [(h, slots[h][i]) for h in heads for i in top([score[h, j] for j in slots[h]], int(floor * budget))]
        rest = [token for token in score if token not in sure]
        kept = sure + [rest[i] for i in top([score[token] for token in rest], len(heads) * budget - len(sure))]
        for h in heads:
            slots[h][:] = sorted(j for head, j in kept if head == h)

    prompt = {h: list(range(T)) for h in heads}
    evict(prompt, T)
    now = {}

    def after(l, t, slots, p):
        now.update({(l, g): one for g, one in enumerate(slots)})
        if l == L - 1:
            evict(now, t + 1)

    return decode(x, [[prompt[l, g] for g in range(HKV)] for l in range(L)], T, after)


# Everything stays, a step reads a few: lists of what is read [layer][key head], every EVERY tokens --------


def read_selection(budget, init, select, local, choose, layers=()):
    """choose(layer, token, first, end, count): of each key head `count` slots between first and end, or as many as it finds. `layers`
    that read everything."""
    share = min(budget, init + select + local)
    first = init * share // (init + select + local)
    near = max(local * share // (init + select + local), 1)
    records = []
    for t in range(T + EVERY - 1, N, EVERY):
        n, record = t + 1, []
        for l in range(L):
            if n <= budget or l in layers:
                record.append([list(range(n))] * HKV)
                continue
            found = choose(l, t, first, n - near, budget - first - near)
            record.append([[*range(first), *sorted(one), *range(n - near, n)] for one in found])
        records.append(record)
    return records


def tokenselect(x, budget, init, select, local):

    def choose(l, t, first, end, count):
        p = [softmax(SCALE * x["k"][l, first:end, h // G] @ x["q"][l, t, h]) for h in range(HQ)]
        return [[first + j for j in top(np.sum(p, 0), count)]] * HKV

    return read_selection(budget, init, select, local, choose)


def fasa_pairs(x, l, h, budget, dims, window=8):
    """Pairs (c, c + D / 2) of a query head whose own logits agree best with the whole ones on the prompt's last queries."""
    half_dim, k = D // 2, x["k"][l, :T, h // G]
    agreement = [Fraction(0)] * half_dim
    for i in range(T - window, T):
        parts = x["q"][l, i, h] * k[:i + 1]
        pair = parts[:, :half_dim] + parts[:, half_dim:]
        count = min(budget, max((i + 1) // 4, 1))
        best = set(top(pair.sum(1), count))
        for c in range(half_dim):
            agreement[c] += Fraction(len(best & set(top(pair[:, c], count))), count)
    return sorted(range(half_dim), key=lambda c: (-agreement[c], c))[:dims // 2]


def fasa(x, budget, init, select, local, dims):
    pairs = [[fasa_pairs(x, l, h, budget, dims) for h in range(HQ)] for l in range(L)]

    def choose(l, t, first, end, count):
        p = []
        for h in range(HQ):
            columns = [c for pair in pairs[l][h] for c in (pair, pair + D // 2)]
            p.append(softmax(SCALE * x["k"][l, first:end, h // G][:, columns] @ x["q"][l, t, h][columns]))
        return [[first + j for j in top(one, count)] for one in over_group(p)]

    return read_selection(budget, init, select, local, choose)


def whole_units(units, ranks, first, end, count):
    """Slots between first and end of the units that are read: the best of each rank list, then the second of each, and so on; one that no
    longer fits is passed over."""
    taken = []
    for place in range(len(units)):
        for rank in ranks:
            unit = rank[place]
            size = sum(first <= j < end for j in units[unit])
            if unit not in taken and size <= count:
                taken.append(unit)
                count -= size
    return [j for unit in taken for j in units[unit] if first <= j < end]


def read_units(units, scores, first, end, count):
    """scores: one list over the units for each rank."""
    ranks = [sorted(range(len(units)), key=lambda u: (-s[u], u)) for s in scores]
    got = whole_units(units, ranks, first, end, count)
    for rank, s in zip(ranks, scores):  # neighbours in rank that may change places if nothing else is read then
        for i in range(len(rank) - 1):
            gap = abs(s[rank[i]] - s[rank[i + 1]]) / np.abs(s).max()
            if 0 < gap < READ_MARGIN:
                rank[i], rank[i + 1] = rank[i + 1], rank[i]
                if set(whole_units(units, ranks, first, end, count)) != set(got):
                    closest[0] = min(closest[0], gap)
                rank[i], rank[i + 1] = rank[i + 1], rank[i]
    return got


def near_pages(k, page):
    """Pages of a prompt's keys: the first that has none, and those nearest to it that have none."""
    left, pages = list(range(len(k))), []
    while left:
        seed = left[0]
        far = [((k[j] - k[seed])**2).sum() for j in left[1:]]
        near = top([-d for d in far], page - 1)
        pages.append([seed, *(left[1 + i] for i in near)])
        left = [j for j in left if j not in pages[-1]]
    return pages


def sentencekv(x, budget, init, select, local, w, factor=3, size=7):
    """The prompt's last sentence ends with the prompt; the one that the model is in has no vector yet."""
    ends = lambda tokens: [t for t in tokens if x["tokens"][t] == DOT]
    prompt, first = [], 0
    for end in sorted({*ends(range(T)), T - 1}):
        prompt.append(range(first, end + 1))
        first = end + 1
    counts = snapkv(x, factor * budget, w, "max", size)  # the others have no part in their sentence

    def choose(l, t, first, end, count):
        new, begin = [], T
        for dot in ends(range(T, t + 1)):
            new.append(list(range(begin, dot + 1)))
            begin = dot + 1
        now = new[-1] if begin > t else range(begin, t + 1)
        out = []
        for g in range(HKV):
            sentences = [[j for j in one if j in counts[l][g]] for one in prompt] + new
            sentences = [one for one in sentences if one]
            q = np.mean([x["q"][l, i, h] for i in now for h in range(g * G, (g + 1) * G)], 0)
            out.append(read_units(sentences, [np.array([x["k"][l, one, g].mean(0) @ q for one in sentences])], first, end, count))
        return out

    return read_selection(budget, init, select, local, choose)


def icecache(x, budget, init, select, local, page, layers=2):
    prompt = {(l, g): near_pages(x["k"][l, :T, g], page) for l in range(layers, L) for g in range(HKV)}

    def choose(l, t, first, end, count):
        out = []
        for g in range(HKV):
            pages = prompt[l, g] + [list(range(a, min(a + page, t + 1))) for a in range(T, t + 1, page)]
            means = np.array([x["k"][l, one, g].mean(0) for one in pages])
            out.append(read_units(pages, [means @ x["q"][l, t, h] for h in range(g * G, (g + 1) * G)], first, end, count))
        return out

    return read_selection(budget, init, select, local, choose, range(layers))


# Golden vectors -------------------------------------------------------------------------------------


def ranges(text):
    out = []
    for part in text.split(","):
        a, _, b = part.partition("-")
        out += range(int(a), int(b or a) + 1)
    return out


def as_ranges(numbers):
    runs = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ",".join(f"{a}-{b}" if b > a else str(a) for a, b in runs)


def check_golden():
    p = pyramid(32, 128, 8, 10**6, 20)
    assert p[:3] == [234, 227, 220] and p[-2:] == [24, 17] and sum(p) == 4016
    assert pyramid(4, 64, 8, 200, 20) == [110, 74, 38, 2] and pyramid(4, 64, 8, 100, 20) == [92, 68, 44, 20]
    two = [[.50, .20, .10, .06, .05, .04, .03, .02], [.16, .15, .14, .13, .12, .11, .10, .09]]
    assert flat_heads(two, 3, .2, True) == [2, 2] and flat_heads(two, 3, .2, False) == [2, 3]
    ladder = Ladder(4, 16, 2, 2, 0)
    assert (ladder.b, ladder.a) == (2, 1)
    want = {
        16: ("0-2,4-16", "0,1,3,4-16", 3),
        20: ("0-2,4,6,8,10,12-20", "0,1,3,5,7,9,11,12-20", 7),
        25: ("0-2,4,6,8,10,12,14,16,18,20,22-25", "0,1,3,5,7,9,11,13,15,17,19,21-25", 12),
        26: ("0-2,6,8,10,12,14,16,18,20,22-26", "0,1,5,7,9,11,13,15,17,19,21,22-26", 3),
        39: ("0-2,10,18,24,28,30,32-39", "0,1,9,17,23,27,29,31,32-39", 6),
    }
    for t in range(40):
        ladder.append(t)
        ladder.compact()
        if t in want:
            even, odd, cursor = want[t]
            assert ladder.lists[0] == ladder.lists[2] == ranges(even), (t, ladder.lists[0])
            assert ladder.lists[1] == ladder.lists[3] == ranges(odd) and ladder.cursor == cursor, (t, ladder.lists[1])
    slots, cursor = [], 1
    for t in range(40):
        slots.append(t)
        if len(slots) > 8:
            gone, cursor = contest(slots, cursor, 8, dict.fromkeys(slots, 1.0))
            slots.remove(gone)
        if t == 23:
            assert slots == [3, 7, 11, 15, 17, 19, 21, 23], slots
    assert slots == [15, 23, 27, 31, 33, 35, 37, 39], slots
    r = np.random.default_rng(8)
    p, v = softmax(r.normal(size=12)), r.normal(size=(12, 5))
    for j in range(12):  # what is left after a removal, against the closed form
        rest = [i for i in range(12) if i != j]
        gone = (p[rest] / p[rest].sum()) @ v[rest]
        assert abs(np.linalg.norm(p @ v - gone) - caote_scores(p, v)[j]) < 1e-14


# The fixture ----------------------------------------------------------------------------------------


def statistics(x):
    """name -> f64 array [L, heads, T] or [L, Hq]: everything that layers measure on the prompt."""
    out = {}
    attention = [prompt_attention(x, l, T)[1] for l in range(L)]
    each = lambda f: np.stack([f(l) for l in range(L)])
    out["all.s1"] = each(lambda l: attention[l].sum(1))
    out["decay.s1"] = each(lambda l: column_sums(attention[l], 0.95 ** np.arange(T - 1, -1, -1.0)))
    out["last.s1"] = each(lambda l: attention[l][:, -1])
    out["pseudo.s1"] = each(lambda l: outside_attention(x, l, x["pseudo"]).sum(1))
    out["drafted.s1"] = each(lambda l: laq_sums(x, l, False))
    out["drafted8.s1"] = each(lambda l: laq_sums(x, l, True))
    for w in (4, 8, 16):
        rows = [a[:, -w:] for a in attention]
        out[f"window{w}.s1"] = each(lambda l: rows[l].sum(1))
        out[f"window{w}.s2"] = each(lambda l: (rows[l]**2).sum(1))
        part = [a[:, :, :-w] for a in rows]
        out[f"window{w}.entropy"] = each(lambda l: -(part[l] * np.log(part[l] + 1e-300)).sum((1, 2)))
        for value in ("obc-joint", "removal") + (("obc-value", "obc-key") if w == 8 else ()):
            out[f"window{w}.{value}"] = each(lambda l: removal_terms(x, l, w, value))
    for i, (w, b, layer, share) in enumerate(FAST):
        out[f"fast{w}.{i}.s1"] = fastkv(x, b, w, layer, share)[1]
    out["key_norm"] = each(lambda l: np.linalg.norm(x["k"][l, :T], axis=-1).T)
    out["value_norm"] = each(lambda l: np.linalg.norm(x["v"][l, :T], axis=-1).T)
    out["key_cosine"] = each(lambda l: np.stack([key_cosines(x["k"][l, :T, g]) for g in range(HKV)]))
    out["expected"] = each(lambda l: expected_logits(x, l))
    out["wo_norm"] = each(lambda l: wo_norms(x, l))
    return out


def short_statistics(x, out, tokens):
    p = [prompt_attention(x, l, tokens)[1] for l in range(L)]
    out[f"short{tokens}.s1"] = np.stack([one.sum(1) for one in p])
    out[f"short{tokens}.peak"] = np.stack([one.max(1) for one in p])


def parts(r):
    """Vectors for the parts of caching/kv/kv.h."""
    out = {"pool": [], "top": [], "pyramid": [], "flat_heads": [], "cake": []}
    f32 = lambda a: [float(v) for v in np.asarray(a, np.float32)]
    for kind, size, n in (("avg", 5, 23), ("max", 7, 23), ("avg", 7, 3), ("max", 3, 1), ("none", 5, 4)):
        x = f32(r.normal(size=n))
        out["pool"].append({"kind": kind, "size": size, "in": x, "out": f32(pool(x, kind, size))})
    for n, count, levels in ((20, 7, 4), (31, 30, 3), (9, 9, 2), (9, 0, 2)):  # with equal scores
        x = [float(v) for v in r.integers(0, levels, n)]
        out["top"].append({"in": x, "count": count, "out": top(x, count)})
    for layers, cap, w, keys, beta in ((32, 128, 8, 10**6, 20), (4, 64, 8, 200, 20), (4, 64, 8, 100, 20), (3, 24, 8, 96, 20),
                                       (3, 48, 16, 96, 20), (9, 200, 32, 1000, 10), (5, 100, 16, 180, 2)):
        out["pyramid"].append({"layers": layers, "capacity": cap, "window": w, "keys": keys, "beta": beta,
                               "out": pyramid(layers, cap, w, keys, beta)})
    two = [[.50, .20, .10, .06, .05, .04, .03, .02], [.16, .15, .14, .13, .12, .11, .10, .09]]
    flats = [(two, 3, .2, True), (two, 3, .2, False)]
    flats += [(r.gamma(.5, 1, (h, n)) * r.gamma(1, 1, (h, 1)), b, f, m)
              for h, n, b, f in ((4, 40, 10, .2), (3, 25, 7, .5), (2, 60, 20, 0.0)) for m in (False, True)]
    for s, base, floor, normalise in flats:
        s = [f32(one) for one in s]
        out["flat_heads"].append({"scores": s, "base": base, "floor": floor, "normalise": normalise,
                                  "out": flat_heads(s, base, floor, normalise)})
    for prefer, total, most in (([1.0], 48, 88), ([1.0], 96, 80), ([1.0, 2.0], 96, 80), ([10.0, 1.0, 2.5], 96, 60),
                                ([1.0, 1.0, 1.0], 100, 80), ([30.0, 1.0, 40.0, 2.0, 3.0], 150, 40),
                                ([5.5, 4.25, 3.1, 2.7, 1.9, 0.8, 0.7, 0.3], 801, 300)):
        out["cake"].append({"preference": prefer, "total": total, "most": most, "out": cake_budgets(prefer, total, most)})
    return out


def make_cases(x):
    """method, options, budget, prompt, statistics (field: tensor), records, joins."""
    cases = []

    def add(method, options, budget, stats, records, tokens=T, joins=None, layers=L):
        name = f"{method}:{options}" if options else method
        prompt_only = not isinstance(records[0][0][0], list)
        if prompt_only:
            records = [records]
        case = {"name": f"{name}@{budget}", "method": method, "rule": name, "budget": budget, "prompt": tokens, "layers": layers,
                "decodes": not prompt_only, "stats": stats,
                "kept": [[[as_ranges(one) for one in layer] for layer in record] for record in records]}
        if joins is not None:
            case["join_keys"] = method in ("elastic", "ems")
            case["join_some"] = method == "ems"  # which of them is open
            case["joins"] = [[[e, t, float(f"{w:.8g}")] for e, t, w in one] for one in joins]
        cases.append(case)

    for b in BUDGETS:
        w = WINDOW[b]
        win = lambda *fields: {f: f"window{w}.{f}" for f in fields}
        s1 = win("s1")
        add("streaming", "", b, {}, decode_streaming(x, b))
        add("h2o", "", b, {"s1": "all.s1"}, accumulated(x, b, b // 2, 1.0, "mean"))
        add("observed", "", b, {"s1": "all.s1"}, observed(x, b))
        recents = min(16, b // 3)
        add("a2sf", f"alpha=0.95,recents={recents}", b, {"s1": "decay.s1"}, accumulated(x, b, recents, 0.95, "sum"))
        add("tova", "", b, {"s1": "last.s1"}, tova(x, b))
        add("tova", "last=true", b, {"s1": "last.s1"}, tova(x, b, 1))
        add("snapkv", f"window={w}", b, s1, snapkv(x, b, w, "avg", 5))
        add("snapkv", f"window={w},pool=max,pool_size=7", b, s1, snapkv(x, b, w, "max", 7))
        add("snapkv", f"window={w},pool=none", b, s1, snapkv(x, b, w, "none", 1))
        add("snapkv", f"window={w},group=max", b, s1, snapkv(x, b, w, "avg", 5, "max"))
        add("pyramidkv", f"window={w}", b, s1, pyramidkv(x, b, w))
        add("adakv", f"window={w}", b, s1, adakv(x, b, w))
        add("adakv", f"window={w},floor=0.5", b, s1, adakv(x, b, w, 0.5))
        add("snapkv", f"window={w},alloc=flat-all,floor=0", b, s1, flat_all(x, b, w, 5))
        add("knorm", "", b, {"key_norm": "key_norm"}, knorm(x, b))
        add("knorm", "schedule=step", b, {"key_norm": "key_norm"}, decode_knorm(x, b))
        add("keydiff", "", b, {"key_cosine": "key_cosine"}, keydiff(x, b))
        add("keydiff", "schedule=every,every=10", b, {"key_cosine": "key_cosine"}, decode_keydiff(x, b, 10))
        add("keydiff", "schedule=every,every=7", b, {"key_cosine": "key_cosine"}, decode_keydiff(x, b, 7))
        add("expected", "", b, {"expected": "expected", "value_norm": "value_norm"}, expected(x, b))
        for taus in ("", ",tau1=0.8,tau2=2.5"):
            o = {} if not taus else {"tau1": 0.8, "tau2": 2.5}
            add("cake", f"window={w}{taus}", b, win("s1", "s2", "entropy"), decode_cake(x, b, w, **o))
        joint = {"removal": f"window{w}.obc-joint"}
        add("obcache", f"window={w}", b, joint, obcache_adakv(x, b, w))
        add("snapkv", f"window={w},value=obc-joint", b, joint, by_removal(x, b, w, "obc-joint", "avg"))
        add("removal", f"window={w}", b, {"removal": f"window{w}.removal"}, by_removal(x, b, w, "removal"))
        kv = {**s1, "k": "k", "v": "v"}
        add("caote", f"window={w}", b, kv, caote_snapkv(x, b, w))
        add("caote", f"window={w},value=fastcaote", b, kv, caote_snapkv(x, b, w, fast=True))
        add("h2o", "value=caote,schedule=prefill", b, {"s1": "all.s1", "k": "k", "v": "v"}, caote_h2o(x, b))
        add("criticalkv", f"window={w},reduce=sum", b, {**s1, "wo_norm": "wo_norm"}, criticalkv(x, b, w))
        add("criticalkv", f"window={w}", b, {**s1, "wo_norm": "wo_norm"}, criticalkv(x, b, w, True))
        kept = snapkv(x, b, w, "avg", 5)
        add("merge", f"window={w}", b, kv, kept, joins=merge_joins(x, kept))
        kept = snapkv(x, b, w, "none", 1)
        add("ems", f"window={w}", b, kv, kept, joins=ems_joins(x, kept))
        kept = elastic(x, b)
        add("elastic", "", b, {"s1": "all.s1"}, kept, joins=near_joins(kept))
        add("dapq", "pseudo=16", b, {"s1": "pseudo.s1"}, dapq(x, b))
        add("laq", f"window={w},with_window=false", b, {"s1": "drafted.s1"}, laq(x, b, w, False))
        add("laq", f"window={w}", b, {"s1": "drafted8.s1"}, laq(x, b, w, True))
        add("compresskv", f"window={w}", b, s1, compresskv(x, b, w))
        add("fastkv", f"window={w},tsp_share=1", b, s1, snapkv(x, b, w, "max", 7, "sum"))
        for tokens in (T, 5):
            add("lacache", "ladder_span=2", b, {}, lacache(b, tokens, 2, 0), tokens)
            add("lacache", "ladder_span=1", b, {}, lacache(b, tokens, 1, 0), tokens)
        for options in ({}, {"penalty": 0.0}, {"sigma": 0.0}, {"every": 6}):
            every = options.get("every", 10)
            text = "".join(f",{name}={value:g}" for name, value in
                           zip(("sentence_penalty", "redundancy"), (options.get("penalty", 1), options.get("sigma", 0.1))))
            o = {"every": every, **options}
            kv = s1 if options.get("sigma") == 0 else {**s1, "k": "k", "v": "v"}
            add("skipkv", f"window={w},every={every},delimiter1={DOT},delimiter2=-1{text}", b, kv, skipkv(x, b, w, **o))
        add("treekv", "", b, {"s1": "short12.s1"}, treekv(x, b, 12), 12)
        add("lazy", "every=8,window=8,activation=0.05", b, {"peak": "short1.peak"}, lazy(x, b, 8, 0.05), 1)
    for i, (w, b, layer, share) in enumerate(FAST):
        options = f"window={w}" + (f",tsp_layer={layer}" if layer is not None else "") + (f",tsp_share={share}" if share != 0.2 else "")
        add("fastkv", options, b, {"s1": f"fast{w}.{i}.s1"}, fastkv(x, b, w, layer, share)[0])
    add("fastkv", "window=8", T, {"s1": "window8.s1"}, snapkv(x, T, 8, "max", 7, "sum"))
    more = 120  # than the prompt has: nothing goes before the 25th token
    add("streaming", "", more, {}, decode_streaming(x, more))
    add("h2o", "", more, {"s1": "all.s1"}, accumulated(x, more, more // 2, 1.0, "mean"))
    add("a2sf", "", more, {"s1": "decay.s1"}, accumulated(x, more, 16, 0.95, "sum"))
    add("tova", "", more, {"s1": "last.s1"}, tova(x, more))
    add("keydiff", "schedule=every,every=10", more, {"key_cosine": "key_cosine"}, decode_keydiff(x, more, 10))
    add("lacache", "ladder_span=2", more, {}, lacache(more, T, 2, 0))
    for span, overlap in ((4, 0), (3, 1), (3, 2)):  # of more layers, where a rung keeps 1, 2 and 3 slots
        for b in (24, 48):
            add("lacache", f"ladder_span={span},ladder_overlap={overlap}", b, {}, lacache(b, T, span, overlap, MANY), layers=MANY)
    for value in ("obc-value", "obc-key"):
        add("snapkv", f"window=8,value={value}", 24, {"removal": f"window8.{value}"}, by_removal(x, 24, 8, value, "avg"))
    s1 = {"s1": "window8.s1"}
    add("pyramidkv", "window=8,beta=2", 48, s1, pyramidkv(x, 48, 8, beta=2))
    add("pyramidkv", "window=8", 64, s1, pyramidkv(x, 64, 8))  # T < 2 (B - w): uniform
    add("snapkv", "window=8", T, s1, snapkv(x, T, 8, "avg", 5))
    for b, w, sinks, page in ((48, 8, 8, 2), (24, 4, 4, 1), (48, 8, 8, 4)):
        add("kvcrush", f"window={w},sinks={sinks},page={page}", b, {"s1": f"window{w}.s1"}, kvcrush(x, b, w, sinks, page))
    for b in BUDGETS:
        add("trimkv", "buffer=7", b, {"gate": "gate"}, trimkv(x, b, 7))
        add("trimkv", "", b, {"gate": "gate"}, trimkv(x, b, 128))  # the prompt is within the buffer
    for b in BUDGETS:
        add("global-retention", "", b, {"gate": "gate"}, global_retention(x, b, 32))
    for floor, buffer in ((0.0, 7), (0.5, 7), (1.0, 40)):
        add("global-retention", f"buffer={buffer},floor={floor:g}", 24, {"gate": "gate"}, global_retention(x, 24, buffer, floor))
    for b in BUDGETS:
        add("razor", "", b, {}, razor(b))
    add("razor", "sinks=2", 24, {}, razor(24, 2))
    for b in BUDGETS:  # behind the prompt alone: no buffer
        add("trimkv", "schedule=prefill", b, {"gate": "gate"}, trimkv(x, b, 0)[0])
    return cases


def make_selections(x):
    """method, options, budget, statistics of the prompt, what is read."""
    cases = []

    def add(method, options, budget, records, stats=()):
        name = f"{method}:{options}" if options else method
        cases.append({"name": f"{name}@{budget}", "method": method, "rule": name, "budget": budget, "stats": dict(stats),
                      "read": [[[as_ranges(one) for one in layer] for layer in record] for record in records]})

    for b in BUDGETS:
        add("tokenselect", "", b, tokenselect(x, b, 128, 2048, 512))
    add("tokenselect", "init=2,select=20,local=6", 24, tokenselect(x, 24, 2, 20, 6))
    add("tokenselect", "init=3,local=5,select=8", 120, tokenselect(x, 120, 3, 8, 5))  # reads all, then not
    for b in BUDGETS:
        add("fasa", "select_dims=6", b, fasa(x, b, 0, 256, 1, 6))
    add("fasa", "select_dims=4,init=4,local=6,select=30", 24, fasa(x, 24, 4, 30, 6, 4))
    add("fasa", "", 12, fasa(x, 12, 0, 256, 1, 32))  # every pair that there is
    for b in BUDGETS:
        add("icecache", "page=4", b, icecache(x, b, 4, 256, 16, 4))
    add("icecache", "skip_layers=0,page=3,init=2,local=3,select=19", 24, icecache(x, 24, 2, 19, 3, 3, 0))
    add("icecache", "skip_layers=0", 48, icecache(x, 48, 4, 256, 16, 8, 0))
    dots = f"delimiter1={DOT},delimiter2=-1,delimiter3=-1,delimiter4=-1"
    s1 = {"s1": "window8.s1"}
    for b in BUDGETS:
        add("sentencekv", f"window=8,{dots}", b, sentencekv(x, b, 32, 256, 32, 8), s1)
    for b in (16, 30):
        add("sentencekv", f"window=8,init=2,local=3,select=25,{dots}", b, sentencekv(x, b, 2, 25, 3, 8), s1)
    return cases


def make(seed):
    closest[0] = math.inf
    x = make_tensors(seed)
    x["hidden"], x["tokens"] = make_sentences(seed + 2)
    x["gate"] = make_retention(seed + 3)
    r = np.random.default_rng(seed + 1)
    cases, pieces, stats = make_cases(x), parts(r), statistics(x)
    gap = closest[0]
    closest[0] = math.inf
    selections = make_selections(x)
    for tokens in (1, 12):
        short_statistics(x, stats, tokens)
    return x, cases, selections, pieces, stats, gap, closest[0]


def main():
    a = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    a.add_argument("--check", action="store_true", help="golden vectors alone")
    a.add_argument("--out", type=Path, default=FIXTURES)
    o = a.parse_args()
    check_golden()
    if o.check:
        return
    from safetensors.numpy import save
    x, cases, selections, pieces, stats, gap, gap_read = make(SEED)
    print(f"{len(cases)} cases, closest choice {gap:.2g}; {len(selections)} selections, closest choice {gap_read:.2g}")
    if gap < MARGIN or gap_read < READ_MARGIN:
        raise SystemExit(f"a choice is nearer than {MARGIN} or {READ_MARGIN}: take another SEED")
    tensors = {n: np.ascontiguousarray(x[n].astype(np.float16)) for n in ("q", "k", "v", "hidden", "gate")}
    tensors |= {n: np.ascontiguousarray(s.astype(np.float32)) for n, s in stats.items()}
    meta = {"origin": f"python tests/reference/kv.py, seed {SEED}"}  # one key: the writer does not sort them
    (o.out / "kv-rules.safetensors").write_bytes(save(tensors, meta))
    head = {"command": "python tests/reference/kv.py", "seed": SEED, "layers": L, "q_heads": HQ, "kv_heads": HKV, "head_dim": D,
            "prompt": T, "new": NEW, "every": EVERY, "tokens": x["tokens"], "head_classes": HEAD_LIST, "retrieval_heads": RETRIEVAL, "layer_shares": [1 / L] * L,
            "without": {"none": "keeps everything", "random": "the engine's own generator",
                        "epicache": "prompts in blocks: tests/dlm/test_kv_session.c states them",
                        **{name: "stated in tests/caching/test_kv_demote.c"
                           for name in ("kivi", "zipcache", "mikv", "arkv", "minicache")}}}
    lines = ["{"] + [f"{json.dumps(k)}: {json.dumps(v)}," for k, v in head.items()]
    lines += ['"parts": {', ",\n".join(f"{json.dumps(k)}: [\n" + ",\n".join(json.dumps(v) for v in vs) + "]"
                                      for k, vs in pieces.items()), "},", '"cases": [']
    lines += [",\n".join(json.dumps(c) for c in cases), "],", '"selections": [', ",\n".join(json.dumps(c) for c in selections), "]}"]
    (o.out / "kv-rules.json").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
