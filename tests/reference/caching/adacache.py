"""AdaCache, arXiv 2411.02397, without motion regularisation.

The paper reuses the gated outputs of all parts of all blocks; together they are r = x_out - x_in of the stack, so
a skip is x_out = x_in + r. After a full step: c = rel1(r, r of the full step before) / steps between the two.
codebook: (bound, interval) pairs, ascending; the interval of the first bound >= c (of the last pair if there is
none) says how many steps later the next full one comes. The first two full steps follow each other. Of two
branches the larger c counts."""

import math

from step import SKIP, rel1


class AdaCache:
    def __init__(self, run, codebook, first=2, last=False):
        self.first, self.last = first, last
        self.codebook = [(float(b), int(i)) for b, i in (pair.split(":") for pair in codebook.split("/"))]
        self.residual, self.last_full, self.next_full, self.change = None, None, 0, None

    def step(self, st):
        x_in = st.x_in()
        forced = st.s < self.first or (self.last and st.s == st.num_steps - 1)
        if self.change is not None and not forced:
            st.compared(self.change, math.nan)  # what the plan of this step goes back to
        if st.s < self.next_full and not forced:
            st.did(SKIP)
            return st.final(x_in + self.residual)
        x_out = st.all_blocks(x_in)
        residual, interval = x_out - x_in, 1
        if self.residual is not None:
            change = max(rel1(residual, self.residual)) / (st.s - self.last_full)
            self.change = change
            bound, interval = next((e for e in self.codebook if change <= e[0]), self.codebook[-1])
            st.edges = [(change, b) for b, _ in self.codebook]  # how near the decision was, for choosing settings
        self.residual, self.last_full, self.next_full = residual, st.s, st.s + interval
        return st.final(x_out)
