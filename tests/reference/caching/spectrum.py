"""Spectrum, arXiv 2603.01623: the hidden state after the last block as a Chebyshev series in the step index.

Full while s < first; then full if (skips since the last full + 1) % max(1, floor(W)) == 0, after which W += flex,
to three decimals; W starts at `window`. Prediction: predict.chebyshev over all snapshots; the final layer always
runs. Level "output" predicts the model's output instead. span 0: the steps of the run."""

import math

import predict
from step import SKIP


class Spectrum:
    def __init__(self, run, degree=4, ridge=0.1, first=5, window=2.0, flex=0.75, blend=0.5, span=50, history=64,
                 level="hidden", last=False):
        assert not last
        self.degree, self.ridge, self.first, self.window = degree, ridge, first, window
        self.flex, self.blend, self.span, self.level = flex, blend, span or run.num_steps, level
        self.history, self.most, self.skips = [], history, 0

    def step(self, st):
        full = st.s < self.first or not self.history
        if not full and (self.skips + 1) % max(1, math.floor(self.window)) == 0:
            full = True
            self.window = round(self.window + self.flex, 3)
        if not full:
            st.did(SKIP)
            self.skips += 1
            y = predict.chebyshev(self.history, st.s, self.degree, self.ridge, self.span, self.blend)
            return y if self.level == "output" else st.final(y)
        self.skips = 0
        x_out = st.all_blocks(st.x_in())
        out = st.final(x_out)
        self.history = [(st.s, out if self.level == "output" else x_out)] + self.history[: self.most - 1]
        return out
