"""EasyCache, arXiv 2507.02860.

x = model input, o = the solver's columns of the model output. Full step: kappa = mean|o_s - o_s'| / mean|x_s -
x_s'| with s' the full step before. Every step: acc += kappa * mean|x_s - x_{s-1}| / mean|o_last full|; acc <
threshold -> skip, out = x_s + (o - x) of the last full step; else full, acc = 0. The first steps and (option) the
last are full, and so is every step before two full steps have given a kappa. The variance half is reused as is.
Each branch has its own kappa and acc; branch "any": any asks, "cond": the first decides."""

import torch

from step import SKIP


def mean_abs(a):
    return a.abs().mean(tuple(range(1, a.dim())))


class EasyCache:
    def __init__(self, run, threshold, first=5, last=True, branch="any"):
        self.threshold, self.first, self.last, self.branch = threshold, first, last, branch
        self.acc = None
        self.kappa = None
        self.x_before = self.x_full = self.out_full = None

    def step(self, st):
        x = st.rows[None]
        if self.kappa is not None:
            step_size = mean_abs(x - self.x_before)
            self.acc = self.acc + self.kappa * step_size / mean_abs(st.eps_cols(self.out_full))
        self.x_before = x
        full = self.kappa is None or st.s < self.first or (self.last and st.s == st.num_steps - 1)
        if not full:
            asks = self.acc.max() if self.branch == "any" else self.acc[0]
            st.compared(asks, self.threshold)
            full = bool(asks >= self.threshold)
        if not full:
            st.did(SKIP)
            out = self.out_full.clone()
            out[..., : x.shape[-1]] += x - self.x_full
            return out
        out = st.final(st.all_blocks(st.x_in()))
        if self.out_full is not None:
            change = mean_abs(st.eps_cols(out) - st.eps_cols(self.out_full))
            self.kappa = change / mean_abs(x - self.x_full)
        self.acc = torch.zeros(len(out), dtype=out.dtype)
        self.x_full, self.out_full = x, out
        return out
