"""Newton steps on a support, compiled: where the nonzeros are right but ill-conditioned, one replaces many sweeps.

Arrays are those of `kernels.descent`: coefficients `a` and pulls `g` of one working set, of whose small Gram the rows
of all that have moved lie in `rows`, at their `slot`.
"""

from typing import no_type_check

import numpy as np

from tl_circuitlasso.solve.jit import inner

FLAT = 1e-6  # relative: a slope that may be rounding


@inner
@no_type_check
def move(a, g, u, slot, rows, free, size, step, limit):
    """a += share * step with the largest share <= limit at which no sign changes and no bound is passed; that share."""
    share, stop = limit, -1
    for m in range(size):
        k = free[m]
        reach = share
        if a[k] * step[m] < 0:
            reach = -a[k] / step[m]
        elif step[m] > 0 and u[k] < np.inf:
            reach = (u[k] - a[k]) / step[m]
        if reach < share:
            share, stop = reach, m
    if share == np.inf:
        return share
    for m in range(size):  # keeps g = c - G a, as descent does
        k = free[m]
        old = a[k]
        a[k] = old + share * step[m]
        if m == stop:
            a[k] = 0.0 if old * step[m] < 0 else u[k]
        change, base = a[k] - old, np.uint64(slot[k] * g.shape[0])
        for n in range(g.shape[0]):
            g[n] -= change * rows[base + np.uint64(n)]
    return share


@inner
@no_type_check
def leap(a, g, w, r, u, strength, active, count, slot, rows):
    """A Newton step on the nonzeros, as far as no sign changes: exact where the support is right.

    Coordinate descent needs as many sweeps as the support is ill-conditioned; one small factorisation replaces them.
    Inside one orthant the objective is a convex quadratic, so a shortened step still goes down. A source that is made
    of those before it has no step of its own: what it can do without changing the fit is to make the penalty smaller,
    until one of them all is at 0.
    """
    size = 0
    free = np.empty(count, np.int64)
    singular = 1e-11 if rows.itemsize == 8 else 1e-6
    factor, step, slope = np.empty((count, count), np.float64), np.empty(count, np.float64), np.empty(count, np.float64)
    # The Cholesky factor of the Gram (+ ridge) of the sources in `free` grows by a row for each of the support: before
    # step n, factor[:size, :size] is that of free[:size], and slope[m] minus the objective's derivative at free[m].
    for n in range(count):
        k = active[n]
        if slot[k] < 0:  # a nonzero of the start that has never moved: its row isn't here
            return False
        if a[k] >= u[k]:  # at its bound, where it stays
            continue
        base, left = slot[k] * g.shape[0], 0.0
        for m in range(size + 1):  # factor[size, m] of the new row; the last, `left`, is its pivot before the root
            left = rows[base + (free[m] if m < size else k)]
            for i in range(m):
                left -= factor[size, i] * factor[m, i]
            if m < size:
                factor[size, m] = left / factor[m, m]
        left += r[k]
        slope[size] = g[k] - r[k] * a[k] - strength * w[k] * (1.0 if a[k] > 0 else -1.0)
        free[size] = k
        if left > singular:
            factor[size, size] = np.sqrt(left)
            size += 1
            continue
        # A copy: step = (-factor^-T factor[size], 1) changes the fit by `left` only, and the objective by -downhill.
        downhill, step[size] = slope[size], 1.0
        for m in range(size - 1, -1, -1):
            step[m] = -factor[size, m]
            for i in range(m + 1, size):
                step[m] -= factor[i, m] * step[i]
            step[m] /= factor[m, m]
            downhill += slope[m] * step[m]
        if abs(downhill) > FLAT * strength * w[k]:
            for m in range(size + 1):
                step[m] *= 1.0 if downhill > 0 else -1.0
            move(a, g, u, slot, rows, free, size + 1, step, abs(downhill) / left if left > 0 else np.inf)
            return False
    if size == 0:
        return False
    for m in range(size):  # forward: factor step = slope
        step[m] = slope[m]
        for i in range(m):
            step[m] -= factor[m, i] * step[i]
        step[m] /= factor[m, m]
    for m in range(size - 1, -1, -1):  # backward, in place: factor' step = step; what is left of m is done
        step[m] /= factor[m, m]
        for i in range(m):
            step[i] -= factor[m, i] * step[m]
    return move(a, g, u, slot, rows, free, size, step, 1.0) == 1.0
