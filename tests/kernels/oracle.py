"""Independent float64 oracles: loops over tokens in NumPy, written from the equations and not from the code."""

import numpy as np


def _softplus(v):
    return np.log1p(np.exp(-np.abs(v))) + np.maximum(v, 0)


def _silu(v):
    return v / (1 + np.exp(-v))


def scan(x, dt, A, B, C, D=None, z=None, dt_bias=None, *, softplus=False, reverse=False, h0=None):
    """One sequence: x, dt (l, d), A (d, n), B, C (l, n). Returns y (l, d), final state (d, n)."""
    x, dt, A, B, C = (np.asarray(t, np.float64) for t in (x, dt, A, B, C))
    if dt_bias is not None:
        dt = dt + np.asarray(dt_bias, np.float64)
    if softplus:
        dt = _softplus(dt)
    h = np.zeros(A.shape) if h0 is None else np.asarray(h0, np.float64).copy()
    y = np.zeros(x.shape)
    order = range(len(x) - 1, -1, -1) if reverse else range(len(x))
    for t in order:
        h = np.exp(dt[t][:, None] * A) * h + np.outer(dt[t] * x[t], B[t])
        y[t] = h @ C[t]
    if D is not None:
        y += np.asarray(D, np.float64) * x
    if z is not None:
        y *= _silu(np.asarray(z, np.float64))
    return y, h


def conv(x, weight, bias=None, *, silu=True, reverse=False):
    """One sequence x (l, d), weight (d, w): y_t = sum_k weight[:, k] x_{t - (w - 1 - k)}, mirrored when reverse."""
    x, weight = np.asarray(x, np.float64), np.asarray(weight, np.float64)
    taps = weight.shape[1]
    y = np.zeros(x.shape) if bias is None else np.tile(np.asarray(bias, np.float64), (len(x), 1))
    for t in range(len(x)):
        for k in range(taps):
            back = taps - 1 - k
            source = t + back if reverse else t - back
            if 0 <= source < len(x):
                y[t] += weight[:, k] * x[source]
    return _silu(y) if silu else y


def mixer_core(x, z, forward, backward, gaps=((1.0,), (1.0,))):
    """One sequence: x, z (l, d), gaps (2, l); forward, backward are ScanWeights of arrays. Returns (l, d)."""
    total = np.zeros(np.shape(x))
    for w, reverse, gap in ((forward, False, gaps[0]), (backward, True, gaps[1])):
        w = type(w)(*(np.asarray(t, np.float64) for t in w))
        rank, n = w.dt_proj.shape[1], w.A_log.shape[1]
        u = conv(x, w.conv_weight, w.conv_bias, reverse=reverse)
        proj = u @ w.x_proj.T
        dt = np.asarray(gap, np.float64)[:, None] * _softplus(proj[:, :rank] @ w.dt_proj.T + w.dt_bias)
        y, _ = scan(u, dt, -np.exp(w.A_log), proj[:, rank : rank + n], proj[:, rank + n :], w.D, reverse=reverse)
        total += y
    total /= 2
    return total if z is None else total * _silu(np.asarray(z, np.float64))


def pooled_core(x, z, rows, columns, count, weight, forward, backward, *, norm=None, eps=1e-5):
    """One picture's tokens x, z (l, d) at (row, column): x_proj, dt_proj and scan on one token a row. Returns (l, d).

    There are `count` rows; the scan sees `weight` times the sum of each. For columns exchange rows and columns.
    """
    order = sorted(range(len(x)), key=lambda t: (rows[t], columns[t]))
    total = np.zeros(np.shape(x))
    for w, reverse in ((forward, False), (backward, True)):
        w = type(w)(*(np.asarray(t, np.float64) for t in w))
        rank, n = w.dt_proj.shape[1], w.A_log.shape[1]
        u = conv(np.asarray(x, np.float64)[order], w.conv_weight, w.conv_bias, reverse=reverse)
        pooled = np.zeros((count, u.shape[1]))
        for place, t in enumerate(order):
            pooled[rows[t]] += weight * u[place]
        proj = pooled @ w.x_proj.T
        dt = _softplus(proj[:, :rank] @ w.dt_proj.T + w.dt_bias)
        y, _ = scan(pooled, dt, -np.exp(w.A_log), proj[:, rank : rank + n], proj[:, rank + n :], reverse=reverse)
        for place, t in enumerate(order):
            total[t] += (y[rows[t]] + w.D * u[place]) / 2
    if norm is not None:
        centred = total - total.mean(-1, keepdims=True)
        total = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * np.asarray(norm[0]) + np.asarray(
            norm[1]
        )
    return total * _silu(np.asarray(z, np.float64))
