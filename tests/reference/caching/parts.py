"""Policies that keep the output of every part (attention, MLP) of every block before its gate: FORA, TaylorSeer,
HiCache, SpeCa, PAB. The gates and modulations of the current step are always computed."""

import predict
from step import FULL, PARTIAL, SKIP, is_grid_full
from model import PARTS


class PartPolicy:
    """Subclasses say when a step is full and what a part is between full steps."""

    def __init__(self, run):
        self.slots = {(b, p): [] for b in range(run.net.num_blocks) for p in PARTS}
        self.last_full = None

    def compute(self, st, block, part, x):
        y = st.part(block, part, x)
        self.store(st, block, part, y)
        return y

    def store(self, st, block, part, y):
        self.slots[block, part].insert(0, (st.s, y))

    def produce(self, st, block, part):
        raise NotImplementedError

    def run_blocks(self, st, x, blocks, full):
        for b in blocks:
            for p in PARTS:
                x = st.add(b, p, x, self.compute(st, b, p, x) if full else self.produce(st, b, p))
        return x

    def step(self, st):
        full = self.last_full is None or self.is_full(st)
        if full:
            self.last_full = st.s
        else:
            st.did(SKIP)
        return st.final(self.run_blocks(st, st.x_in(), range(st.net.num_blocks), full))


class Fora(PartPolicy):
    """FORA, arXiv 2407.01425: full on the first step and where the step number divides by `interval`; the
    released code counts steps down to 0, so that the last one is full."""

    def __init__(self, run, interval, count="down"):
        super().__init__(run)
        self.interval, self.count = interval, count

    def is_full(self, st):
        number = st.num_steps - 1 - st.s if self.count == "down" else st.s
        return number % self.interval == 0

    def produce(self, st, block, part):
        return self.slots[block, part][0][1]


class TaylorSeer(PartPolicy):
    """TaylorSeer, arXiv 2503.06923. Full while s < first, then every `interval` steps. Full: F0 = new, and for i <
    order, while an old Fi exists and s > first - 2, F(i+1) = (Fi new - Fi old) / gap. Else sum_i Fi k^i / i!. mode
    "last", the paper's lighter form: one slot, the hidden state after the last block, so that no block runs
    between full steps."""

    def __init__(self, run, interval, order=1, first=1, mode="parts", predictor="taylor"):
        super().__init__(run)
        self.interval, self.order, self.first, self.mode, self.predictor = interval, order, first, mode, predictor
        self.hidden = None

    def is_full(self, st):
        return is_grid_full(st.s, self.first, self.interval, self.last_full)

    def update(self, old, s, y):
        """(step, factors) of the last full step, and the new value -> the same of this one"""
        if self.predictor == "newton":  # the polynomial through the last order + 1 values: keep those
            return (s, [(s, y)] + (old[1] if old else []))
        factors = [y]
        if old and s > self.first - 2:
            gap = s - old[0]
            for i in range(min(self.order, len(old[1]))):
                factors.append((factors[i] - old[1][i]) / gap)
        return (s, factors)

    def store(self, st, block, part, y):
        if self.mode == "parts":
            self.slots[block, part] = self.update(self.slots[block, part], st.s, y)

    def evaluate(self, slot, s):
        if self.predictor == "newton":
            return predict.newton(slot[1], s, self.order)
        k, total, term = s - slot[0], 0, 1.0
        for i, f in enumerate(slot[1]):
            if i > 0:
                term *= k / i
            total = total + term * f
        return total

    def produce(self, st, block, part):
        return self.evaluate(self.slots[block, part], st.s)

    def step(self, st):
        full = self.last_full is None or self.is_full(st)
        if full:
            self.last_full = st.s
        if self.mode == "parts" or full:
            x = self.run_blocks(st, st.x_in(), range(st.net.num_blocks), full)
            if self.mode == "last":
                self.hidden = self.update(self.hidden, st.s, x)
        else:
            x = self.evaluate(self.hidden, st.s)
        if not full:
            st.did(SKIP)
        return st.final(x)


class HiCache(TaylorSeer):
    """HiCache, arXiv 2508.16984: TaylorSeer's factors and schedule, Hermite polynomials instead of powers."""

    def __init__(self, run, interval, order=1, first=1, sigma=0.5, mode="parts"):
        super().__init__(run, interval, order, first, mode)
        self.sigma = sigma

    def evaluate(self, slot, s):
        return predict.hicache(slot[1], s - slot[0], self.sigma)


class SpeCa(TaylorSeer):
    """SpeCa, arXiv 2509.11628. Draft: TaylorSeer. Verify, from the min-th draft in a row on: the last block
    computed from its drafted input gives x, the draft gives xhat; error = mean |x - xhat| / (|xhat| + 1e-10).
    Full: s < first; after max drafts;
    after min drafts or more if the last error > max(0.01, base decay^(s / T)), any branch; s is the step that asks.
    output "draft": the step goes on with xhat; "verified": with x where there is one."""

    def __init__(self, run, order=4, base=0.1, decay=0.01, min=2, max=5, first=3, output="draft"):
        super().__init__(run, interval=0, order=order, first=first)
        self.base, self.decay, self.min, self.max, self.output = base, decay, min, max, output
        self.drafts, self.error = 0, None

    def is_full(self, st):
        if st.s < self.first or self.drafts >= self.max:
            return True
        if self.drafts < self.min or self.drafts == 0:
            return False
        threshold = max(0.01, self.base * self.decay ** (st.s / st.num_steps))
        st.compared(self.error, threshold)
        return self.error > threshold

    def step(self, st):
        num = st.net.num_blocks
        if self.last_full is None or self.is_full(st):
            self.last_full, self.drafts = st.s, 0
            return st.final(self.run_blocks(st, st.x_in(), range(num), True))
        self.drafts += 1
        x = self.run_blocks(st, st.x_in(), range(num - 1), False)
        drafted = self.run_blocks(st, x, [num - 1], False)
        if self.drafts < self.min:
            st.did(SKIP)
            return st.final(drafted)
        st.did(PARTIAL)
        computed = st.blocks(x, num - 1, num)
        self.error = max(((computed - drafted).abs() / (drafted.abs() + 1e-10)).mean((1, 2)).tolist())
        return st.final(drafted if self.output == "draft" else computed)


class Pab(PartPolicy):
    """Pyramid Attention Broadcast, arXiv 2408.12588: a part of a kind with range r computes where its call count
    divides by r or the timestep is outside (lo, hi), else its last output is used again. The count advances on
    every step. Range 1: never reused."""

    def __init__(self, run, self_range, mlp_range, lo, hi):
        super().__init__(run)
        self.ranges, self.lo, self.hi = {"self": self_range, "mlp": mlp_range}, lo, hi

    def step(self, st):
        inside = self.lo < st.run.timesteps[st.s] < self.hi
        reuse = {p: inside and st.s % self.ranges[p] != 0 for p in PARTS}
        st.did(SKIP if all(reuse.values()) else PARTIAL if any(reuse.values()) else FULL)
        x = st.x_in()
        for b in range(st.net.num_blocks):
            for p in PARTS:
                y = self.slots[b, p][0][1] if reuse[p] else self.compute(st, b, p, x)
                x = st.add(b, p, x, y)
        return st.final(x)
