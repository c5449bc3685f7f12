"""One denoising step of one image as a policy sees it, and the words of policies.

A policy is a class with `__init__(self, run, **options)` and `step(self, st)`, which returns the model output [G,
N, O] of both branches and leaves in `st` what it did. Every policy here runs the network itself, so that what is
computed, reused or predicted can be read in its own file. State is kept per branch (the leading axis G of
everything stored); the decision is one for both branches.
"""

import math

from model import PARTS

FULL, PARTIAL, SKIP = "full", "partial", "skip"


def rel1(a, b):
    """[G]: mean |a - b| / mean |b| of every branch, b the older."""
    dims = tuple(range(1, a.dim()))
    return ((a - b).abs().sum(dims) / b.abs().sum(dims)).tolist()


class Run:
    """What is known before the first step."""

    def __init__(self, net, solver, num_steps, labels):
        self.net, self.solver, self.num_steps, self.labels = net, solver, num_steps, labels
        self.timesteps = solver.timesteps
        self.time_embeddings = [net.time_embedding(t) for t in self.timesteps]


class Step:
    def __init__(self, run, s, x):
        net = run.net
        self.run, self.net, self.s, self.num_steps = run, net, s, run.num_steps
        self.rows = net.patchify(x)  # the model's input [N, C*p*p]; DDIM does not scale it
        self.c = net.condition(run.timesteps[s], run.labels)
        self.mods = [net.modulation(b, self.c) for b in range(net.num_blocks)]
        self.kind, self.statistic, self.threshold = FULL, math.nan, math.nan

    def did(self, kind):
        self.kind = kind

    def compared(self, statistic, threshold):
        self.statistic, self.threshold = float(statistic), float(threshold)

    def x_in(self):
        return self.net.embed(self.rows, len(self.run.labels))

    def part(self, block, part, x):
        return self.net.part(block, part, x, self.mods[block])

    def add(self, block, part, x, y):
        return x + self.mods[block][part][2] * y

    def blocks(self, x, begin, end):
        for b in range(begin, end):
            for p in PARTS:
                x = self.add(b, p, x, self.part(b, p, x))
        return x

    def all_blocks(self, x):
        return self.blocks(x, 0, self.net.num_blocks)

    def final(self, x):
        return self.net.final(x, self.c)

    def eps_cols(self, out):
        """The columns of an output that the solver uses: no variance half."""
        return out[..., : self.rows.shape[-1]]


class Nothing:
    """No policy: every step in full."""

    def __init__(self, run):
        pass

    def step(self, st):
        return st.final(st.all_blocks(st.x_in()))


def is_grid_full(s, first, interval, last_full):
    """The common schedule: full while s < first, then full whenever interval - 1 steps have been skipped."""
    return s < first or s - last_full >= interval
