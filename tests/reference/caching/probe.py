"""First-Block-Cache and DBCache (documentation and code of ParaAttention, diffusers and cache-dit).

FBCache: p = block 0 of x_in, d = p - x_in, rho = rel1(d, d of the last COMPUTED step). rho < threshold -> the
other blocks are replaced by x_out = p + (x_out - p of that computed step). No accumulation.
DBCache: the first `fn` blocks instead of one, the last `bn` blocks always run, what lies between is predicted: its
residual reused, or by TaylorSeer's rule. Before the ratio: full while s < warmup; full if max_cached steps (-1: no
limit) have been cached in all, or max_continuous (-1: no limit) in a row. Any branch asks. accumulate: the ratios
since the last full step are summed (the larger branch's of each step). mask: one digit a step, 1 = full, instead
of warmup."""

import predict
from step import PARTIAL, rel1


class DbCache:
    def __init__(self, run, fn, bn, threshold, warmup=1, interval=1, accumulate=False, mask="",
                 max_cached=-1, max_continuous=-1, calibrator="none", order=1):
        self.front, self.back, self.threshold, self.warmup = fn, run.net.num_blocks - bn, threshold, warmup
        self.max_cached, self.max_continuous = max_cached, max_continuous
        assert interval == 1
        self.accumulate, self.mask, self.sum = accumulate, str(mask), 0.0
        self.order = order if calibrator == "taylor" else 0
        self.num_cached = self.in_a_row = 0
        self.probe, self.history = None, []

    def step(self, st):
        x_in = st.x_in()
        p = st.blocks(x_in, 0, self.front)
        forced = self.mask[st.s : st.s + 1] == "1" if self.mask else st.s < self.warmup
        full = self.probe is None or forced
        full = full or (self.max_cached >= 0 and self.num_cached >= self.max_cached)
        full = full or (self.max_continuous >= 0 and self.in_a_row >= self.max_continuous)
        if not full:
            rho = max(rel1(p - x_in, self.probe))
            if self.accumulate:
                self.sum += rho
                rho = self.sum
            st.compared(rho, self.threshold)
            full = rho >= self.threshold
        if full:
            x = st.blocks(p, self.front, self.back)
            self.probe = p - x_in
            self.history.insert(0, (st.s, x - p))
            self.in_a_row, self.sum = 0, 0.0
        else:
            st.did(PARTIAL)
            self.num_cached += 1
            self.in_a_row += 1
            x = p + predict.taylor(self.history, st.s, self.order)
        return st.final(st.blocks(x, self.back, st.net.num_blocks))


class FbCache(DbCache):
    def __init__(self, run, threshold, warmup=0, max_skips=-1):
        super().__init__(run, 1, 0, threshold, warmup, max_continuous=max_skips)
