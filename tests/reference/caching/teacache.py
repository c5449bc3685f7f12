"""TeaCache, arXiv 2411.19108.

m_s = the normed and modulated input of block 0's attention (signal "modulated") or the timestep embedding
("timestep").
Every step: rho = rel1(m_s, m_{s-1}); acc += P(rho), P a polynomial, highest power first; m_{s-1} := m_s, skipped
or not.
acc >= threshold -> full, acc = 0, r = x_out - x_in; else skip, x_out = x_in + r. The first `first` and last `last`
steps are full and set acc to 0. Each branch has its own acc; branch "any": full if any asks, "cond": the first
decides."""

from step import SKIP, rel1

NAMED = {
    "identity": [1.0, 0.0],
    "flux": [498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861],
}


class TeaCache:
    def __init__(self, run, threshold, signal="modulated", coefficients="identity", first=1, last=1, branch="any"):
        self.threshold, self.signal, self.branch = threshold, signal, branch
        self.first, self.last = first, last
        self.coefficients = NAMED.get(coefficients) or [float(c) for c in coefficients.split(":")]
        self.acc = [0.0] * len(run.labels)
        self.before, self.residual = None, None

    def polynomial(self, rho):
        total = 0.0
        for c in self.coefficients:
            total = total * rho + c
        return total

    def step(self, st):
        x_in = st.x_in()
        if self.signal == "modulated":
            m = st.net.modulated("self", x_in, st.mods[0])
        else:
            m = st.run.time_embeddings[st.s].expand(len(x_in), -1)
        if self.before is not None:
            self.acc = [a + self.polynomial(rho) for a, rho in zip(self.acc, rel1(m, self.before))]
        self.before = m
        full = self.residual is None or st.s < self.first or st.s >= st.num_steps - self.last
        if not full:
            asks = max(self.acc) if self.branch == "any" else self.acc[0]
            st.compared(asks, self.threshold)
            full = asks >= self.threshold
        if full:
            x_out = st.all_blocks(x_in)
            self.residual = x_out - x_in
            self.acc = [0.0] * len(self.acc)
        else:
            st.did(SKIP)
            x_out = x_in + self.residual
        return st.final(x_out)
