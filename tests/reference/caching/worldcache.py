"""WorldCache, arXiv 2603.06331: caches the whole model's output; token rows are grouped by the curvature of their
path.

y0, y1, y2 = outputs of the last three full steps (newest first), rows of their solver columns; gaps d0, d1 in steps.
v0 = (y0 - y1) / d0, v1 = (y1 - y2) / d1, a = (v0 - v1) / d0, kappa = |a| / (|v0|^2 + 1e-8), over a set of rows
(one branch, or with `pooled` both together). Option floor: kappa's denominator gains floor * the set's mean
|v0|^2. stable: kappa < Q(p_stable); chaotic: kappa >= Q(p_chaotic); linear: the rest.
k steps later: stable y0; linear y0 + k v0; chaotic y0 + k ((1 - a_k) v0 + a_k v1), a_k = 3x^2 - 2x^3, x = min(k /
max_skips, 1).
After each predicted step E += mean over chaotic rows (rule "code": over all rows, the others counted 0) of
kappa |yhat(k) - yhat(k-1)|. Full, in this order: s < warmup; last step; fewer than three outputs; E >= threshold
in any branch; s - last full > max_skips. Full sets E to 0. Option time "timestep" measures gaps in timesteps, which
changes nothing on evenly spaced ones, the only ones here. The variance half never reaches the latents; it is
predicted by its row's rule here."""

import torch

import predict
from step import SKIP


def smoothstep(x):
    return 3 * x**2 - 2 * x**3


class WorldCache:
    def __init__(self, run, p_stable=0.3, p_chaotic=0.6, max_skips=2, threshold=0.2, warmup=10, rule="code",
                 time="step", pooled=False, floor=0.0):
        self.p_stable, self.p_chaotic, self.max_skips = p_stable, p_chaotic, max_skips
        self.threshold, self.warmup, self.rule, self.pooled, self.floor = threshold, warmup, rule, pooled, floor
        self.history = []
        self.energy = [0.0] * len(run.labels)

    def group(self, st):
        """On a full step with three outputs: velocities, curvature and classes (0 stable, 1 linear, 2 chaotic) of
        all rows."""
        (s0, y0), (s1, y1), (s2, y2) = [(s, st.eps_cols(y)) for s, y in self.history]
        v0, v1 = (y0 - y1) / (s0 - s1), (y1 - y2) / (s1 - s2)
        a = (v0 - v1) / (s0 - s1)
        speed = v0.norm(dim=-1) ** 2
        mean = speed.mean() if self.pooled else speed.mean(-1, keepdim=True)
        self.kappa = a.norm(dim=-1) / (speed + 1e-8 + self.floor * mean)
        self.classes = torch.ones(self.kappa.shape, dtype=torch.int64)
        for rows in [slice(None)] if self.pooled else [slice(g, g + 1) for g in range(len(y0))]:
            values = self.kappa[rows].flatten().tolist()
            low, high = (predict.lerp_quantile(values, p) for p in (self.p_stable, self.p_chaotic))
            # equality is meant exactly: a quantile may be one of the values
            flat = torch.tensor([0 if v < low else 2 if v >= high else 1 for v in values])
            self.classes[rows] = flat.reshape(self.classes[rows].shape)
            st.edges += [(v, q) for v in values for q in (low, high) if v != q]

    def predicted(self, k):
        """The outputs k steps after the last full one; k = 0: that one."""
        (s0, y0), (s1, y1), (s2, y2) = self.history
        v0, v1 = (y0 - y1) / (s0 - s1), (y1 - y2) / (s1 - s2)
        alpha = smoothstep(min(k / self.max_skips, 1.0))
        by_class = [y0, y0 + k * v0, y0 + k * ((1 - alpha) * v0 + alpha * v1)]
        out = by_class[0].clone()
        for i in (1, 2):
            out = torch.where((self.classes == i)[..., None], by_class[i], out)
        return out

    def drift(self, st, k):
        change = (st.eps_cols(self.predicted(k)) - st.eps_cols(self.predicted(k - 1))).norm(dim=-1)
        chaotic = self.classes == 2
        e = torch.where(chaotic, self.kappa * change, torch.zeros_like(change))
        count = torch.ones_like(chaotic) if self.rule == "code" else chaotic
        if self.pooled:
            return [float(e.sum() / count.sum())] * len(e)
        return (e.sum(-1) / count.sum(-1)).tolist()

    def step(self, st):
        st.edges = []
        last_full = self.history[0][0] if self.history else 0
        full = st.s < self.warmup or st.s == st.num_steps - 1 or len(self.history) < 3
        if not full:
            full = max(self.energy) >= self.threshold or st.s - last_full > self.max_skips
            if st.s - last_full <= self.max_skips:  # else the count alone decides
                st.compared(max(self.energy), self.threshold)
        if full:
            out = st.final(st.all_blocks(st.x_in()))
            self.history = [(st.s, out)] + self.history[:2]
            self.energy = [0.0] * len(out)
            if len(self.history) == 3:
                self.group(st)
            return out
        st.did(SKIP)
        k = st.s - last_full
        self.energy = [e + d for e, d in zip(self.energy, self.drift(st, k))]
        return self.predicted(k)
