"""Static interval: full while s < first, then every `interval` steps; between them the model's output, the
residual of the whole stack or the hidden state after it is predicted from the last full steps."""

import predict
from step import SKIP, is_grid_full


class Interval:
    def __init__(self, run, interval, first=1, level="residual", order=0, predictor="taylor", last=False):
        self.interval, self.first, self.level, self.order, self.last = interval, first, level, order, last
        self.predict = predict.taylor if predictor == "taylor" else predict.newton
        self.history = []

    def step(self, st):
        full = not self.history or is_grid_full(st.s, self.first, self.interval, self.history[0][0])
        if self.last and st.s == st.num_steps - 1:
            full = True
        x_in = None if self.level == "output" else st.x_in()
        if not full:
            st.did(SKIP)
            y = self.predict(self.history, st.s, self.order)
            if self.level == "output":
                return y
            return st.final(x_in + y if self.level == "residual" else y)
        x_out = st.all_blocks(st.x_in())
        out = st.final(x_out)
        y = {"output": out, "hidden": x_out, "residual": x_out - x_in if x_in is not None else None}[self.level]
        self.history.insert(0, (st.s, y))
        return out
