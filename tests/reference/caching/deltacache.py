"""Delta-DiT, arXiv 2406.01125: the residual across a range of round(fraction * L) blocks is reused, at the rear of
the stack in early steps (s < split * T), at its front in later ones. Full while s < first, then every `interval`
steps; full steps store both ranges."""

from step import PARTIAL, is_grid_full


class DeltaCache:
    def __init__(self, run, interval, fraction, split=0.5, first=1):
        num = run.net.num_blocks
        blocks = round(fraction * num)
        self.interval, self.first, self.split = interval, first, split * run.num_steps
        self.rear, self.front = (num - blocks, num), (0, blocks)
        self.last_full, self.kept = None, {}

    def step(self, st):
        num = st.net.num_blocks
        full = self.last_full is None or is_grid_full(st.s, self.first, self.interval, self.last_full)
        x = [st.x_in()]
        if full:
            for b in range(num):
                x.append(st.blocks(x[b], b, b + 1))
            self.kept = {span: x[span[1]] - x[span[0]] for span in (self.rear, self.front)}
            self.last_full = st.s
            return st.final(x[num])
        st.did(PARTIAL)
        begin, end = self.rear if st.s < self.split else self.front
        x = st.blocks(x[0], 0, begin) + self.kept[begin, end]
        return st.final(st.blocks(x, end, num))
