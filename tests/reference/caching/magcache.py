"""MagCache, arXiv 2506.09045: a table g_s of how the residual's size changes from step to step, measured before.

s >= start = int(retain * T): ratio *= g_s; n += 1; err += |1 - ratio|; err <= threshold and n <= max_skips -> skip,
x_out = x_in + r; else full, ratio = 1, n = 0, err = 0. A table of another length is resampled by nearest neighbour:
index round(i (len - 1) / (T - 1)). With the table "flux" the step whose table index is 11 is always full. "flat:g" is
g at every step. Nothing is measured, so all images and branches do the same."""

from step import SKIP

TABLES = {
    "flux": [
        1, 1.21094, 1.11719, 1.07812, 1.0625, 1.03906, 1.03125, 1.03906, 1.02344, 1.03125, 1.02344, 0.98047, 1.01562,
        1.00781, 1, 1.00781, 1, 1.00781, 1, 1, 0.99609, 0.99609, 0.98047, 0.98828, 0.96484, 0.95703, 0.93359, 0.89062,
    ],
}


def resample(table, num):
    if len(table) == num:
        return table
    if len(table) == 1:
        return table * num
    return [table[round(i * (len(table) - 1) / (num - 1))] for i in range(num)]


class MagCache:
    def __init__(self, run, threshold, max_skips, retain=0.2, table="flux", last=False):
        assert not last
        self.threshold, self.max_skips = threshold, max_skips
        self.start = int(retain * run.num_steps)
        if table.startswith("flat:"):
            table = table[len("flat:"):]
        values = TABLES.get(table) or [float(v) for v in table.split(":")]
        self.table = resample(values, run.num_steps)
        self.ratio, self.count, self.err = 1.0, 0, 0.0
        self.residual = None
        num = run.num_steps
        self.always = [s for s in range(num) if table == "flux" and round(s * 27 / (num - 1)) == 11]

    def step(self, st):
        x_in = st.x_in()
        skip = False
        if st.s >= self.start and self.residual is not None:
            self.ratio *= self.table[st.s]
            self.count += 1
            self.err += abs(1 - self.ratio)
            st.compared(self.err, self.threshold)
            skip = self.err <= self.threshold and self.count <= self.max_skips and st.s not in self.always
        if skip:
            st.did(SKIP)
            return st.final(x_in + self.residual)
        self.ratio, self.count, self.err = 1.0, 0, 0.0
        x_out = st.all_blocks(x_in)
        self.residual = x_out - x_in
        return st.final(x_out)
