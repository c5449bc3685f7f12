"""Predictions from stored snapshots. `history` is a list of (step, tensor), newest first; all return a tensor."""

import math

import numpy as np


def taylor_factors(history, order):
    """TaylorSeer, arXiv 2503.06923: F0 = newest, F(i+1) = (Fi of the newest - Fi of the one before) / gap of those
    two full steps, for all i. Not a divided difference where gaps differ: the gap is always the newest one, and Fi
    of the step before was made with the gap of its own time. Written as the recursion on histories."""
    factors = [history[0][1]]
    if order > 0 and len(history) > 1:
        gap = history[0][0] - history[1][0]
        older = taylor_factors(history[1:], order - 1)
        for i in range(min(order, len(older))):
            factors.append((factors[i] - older[i]) / gap)
    return factors


def taylor(history, s, order):
    k = s - history[0][0]
    return sum(f * (k**i / math.factorial(i)) for i, f in enumerate(taylor_factors(history, order)))


def newton(history, s, order):
    """The polynomial through the newest order + 1 snapshots, at s (Lagrange's form)."""
    points = history[: order + 1]
    total = 0
    for i, (si, y) in enumerate(points):
        weight = 1.0
        for j, (sj, _) in enumerate(points):
            if i != j:
                weight *= (s - sj) / (si - sj)
        total = total + weight * y
    return total


def hermite_polynomial(n, x):
    """Physicists': H0 = 1, H1 = 2x, H(n+1) = 2x Hn - 2n H(n-1)"""
    a, b = 1.0, 2 * x
    if n == 0:
        return a
    for i in range(1, n):
        a, b = b, 2 * x * b - 2 * i * a
    return b


def hicache(factors, k, sigma):
    """HiCache, arXiv 2508.16984: Y0 + sum_i D^i / i! sigma^i H_i(sigma k), D^i TaylorSeer's factors."""
    y = factors[0]
    for i in range(1, len(factors)):
        y = y + factors[i] * (sigma**i * hermite_polynomial(i, sigma * k) / math.factorial(i))
    return y


def chebyshev(history, s, degree, ridge, span, blend):
    """Spectrum, arXiv 2603.01623: ridge regression on T_0..T_degree of 2 s / span - 1 over all snapshots, at s,
    blended with the line through the last two. With one snapshot the line is that snapshot."""
    def basis(at):
        points = np.atleast_1d(2 * np.asarray(at, dtype=np.float64) / span - 1)
        return np.polynomial.chebyshev.chebvander(points, degree)

    b = basis([step for step, _ in history])
    w = np.linalg.solve(b.T @ b + ridge * np.eye(degree + 1), basis(s)[0]) @ b.T
    fit = sum(float(wi) * y for wi, (_, y) in zip(w, history))
    line = newton(history, s, 1)
    return blend * fit + (1 - blend) * line


def lerp_quantile(values, p):
    """Linear interpolation between order statistics at p (n - 1)."""
    v = sorted(values)
    at = p * (len(v) - 1)
    low = math.floor(at)
    high = min(low + 1, len(v) - 1)
    return v[low] + (at - low) * (v[high] - v[low])
