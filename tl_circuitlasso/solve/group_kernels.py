"""The compiled inner loops of the group solver: block coordinate descent on a working set of row groups.

Rows are rotated so that the Gram of a row group is diagonal (`eigen`); a Frobenius norm does not see the rotation, and
a block step then needs one number, the norm of the new block. Arrays are target-major as in `kernels`; the columns of
a target group lie side by side from `first` on.
"""

from typing import no_type_check

import numpy as np

from tl_circuitlasso.solve.jit import inner, kernel
from tl_circuitlasso.solve.kernels import cutoff

NEGATIVE = 1e-4  # relative; rounding stays far below
FULL_EVERY = 5  # sweeps over the support between two sweeps over the whole working set
STILL = 1e-30  # squared change, relative to the squared size of the step's input, that is rounding


@inner
@no_type_check
def gap_of_group(cross, coef, pull, first, count, starts, weight, square, strength):
    """Duality gap of one target group (see `certificate`); forbidden row groups have an infinite weight."""
    fit, ag, size, bound = 0.0, 0.0, 0.0, np.inf
    for b in range(starts.shape[0] - 1):
        w = weight[b]
        if w == np.inf:
            continue
        inside, force = 0.0, 0.0
        for t in range(first, first + count):
            for i in range(starts[b], starts[b + 1]):
                a, g = coef[t, i], pull[t, i]
                force += g * g
                inside += a * a
                fit += a * (cross[t, i] + g)
                ag += a * g
        size += w * np.sqrt(inside)
        if force > 0:
            bound = min(bound, strength * w / np.sqrt(force))
    residual = max(square - fit, 0.0)
    natural = (residual + ag) / residual if residual > 0 else 1.0
    s, one = max(min(natural, bound), 0.0), max(min(1.0, bound), 0.0)
    best = 0.5 * (1 - s) ** 2 * residual - s * ag + strength * size
    best = min(best, 0.5 * (1 - one) ** 2 * residual - one * ag + strength * size)
    if square > 0 and not best > -NEGATIVE * square:
        return np.inf  # no convex problem has a negative gap: the Gram is indefinite, or a coefficient has overflowed
    return max(best, 0.0)


@inner
@no_type_check
def choose_groups(coef, pull, first, count, starts, weight, strength, least, work):
    """Writes the next working set of row groups into `work`: the support and the worst violators."""
    groups = starts.shape[0] - 1
    support, violators, cut = 0, 0, 0.0
    excess = np.empty(groups, np.float64)  # -1: in the support
    for b in range(groups):
        excess[b] = 0.0
        w = weight[b]
        if w == np.inf:
            continue
        inside, force = 0.0, 0.0
        for t in range(first, first + count):
            for i in range(starts[b], starts[b + 1]):
                inside += coef[t, i] * coef[t, i]
                force += pull[t, i] * pull[t, i]
        over = np.sqrt(force) / w - strength
        if inside > 0:
            excess[b] = -1.0
            support += 1
        elif over > 0:
            excess[b] = over
            cut = max(cut, over)
            violators += 1
    room = max(least, 2 * support + 4) - support
    cut = cutoff(excess, violators, room, cut)
    size, at = support + min(violators, room), 0
    for b in range(groups):
        if at < size and (excess[b] < 0 or (excess[b] > 0 and excess[b] >= cut)):
            work[at] = b
            at += 1
    return at


@inner
@no_type_check
def block_norm(squares, eigen, start, stop, cut):
    """t = ||Z||_F of the minimiser of tr(Z'DZ)/2 - tr(R'Z) + cut ||Z||_F, with ||R_i||^2 in `squares`.

    Z_i = R_i t / (d_i t + cut), so t solves sum_i ||R_i||^2 / (d_i t + cut)^2 = 1. The inverse root of that sum is
    concave and rises, so Newton from 0 climbs to the answer without overshooting; it is exact where all d_i agree.
    """
    t = 0.0
    for _ in range(100):
        total, slope = 0.0, 0.0
        for i in range(start, stop):
            below = eigen[i] * t + cut
            share = squares[i] / (below * below)
            total += share
            slope += share * eigen[i] / below
        if slope <= 0:
            break
        step = total * (np.sqrt(total) - 1.0) / slope
        t += step
        if step <= 1e-15 * t:
            break
    return t


@inner
@no_type_check
def subtract_rows(pull, first, change, rows, top, bottom, width):
    """pull[t] -= change[t, i] rows[i] over the rows of a block, four at a time so that sums stay in registers."""
    for t in range(change.shape[0]):
        i = top
        while i + 4 <= bottom:
            v0, v1, v2, v3 = change[t, i - top], change[t, i + 1 - top], change[t, i + 2 - top], change[t, i + 3 - top]
            for m in range(width):
                pull[t, m] -= v0 * rows[i, m] + v1 * rows[i + 1, m] + v2 * rows[i + 2, m] + v3 * rows[i + 3, m]
            i += 4
        while i < bottom:
            v = change[t, i - top]
            for m in range(width):
                pull[t, m] -= v * rows[i, m]
            i += 1


@inner
@no_type_check
def descend_groups(
    gram, eigen, work, size, cross, coef, pull, first, count, starts, weight, square, strength, goal, max_sweeps
):
    """Cyclic block descent on the row groups in `work` until the gap restricted to them is at most `goal`.

    Returns the number of sweeps, 0 if the very first one moved nothing.
    """
    # Row group n of the working set has the rows own[n]:own[n + 1] of c, a, g; where[i] is row i's place in the whole.
    own, width, widest = np.empty(size + 1, np.int64), 0, 0
    cut, norm, gathered = np.empty(size, np.float64), np.empty(size, np.float64), np.empty(size, np.bool_)
    own[0] = 0
    for n in range(size):
        here = starts[work[n] + 1] - starts[work[n]]
        width += here
        widest = max(widest, here)
        own[n + 1] = width
        cut[n], norm[n], gathered[n] = weight[work[n]], 0.0, False
    where, d, squares = np.empty(width, np.int64), np.empty(width, np.float64), np.empty(width, np.float64)
    for n in range(size):
        for i in range(own[n], own[n + 1]):
            where[i] = starts[work[n]] + i - own[n]
            d[i] = eigen[where[i]]
    c, a, g = np.empty((count, width)), np.empty((count, width)), np.empty((count, width))
    for t in range(count):
        for i in range(width):
            c[t, i], a[t, i], g[t, i] = cross[first + t, where[i]], coef[first + t, where[i]], pull[first + t, where[i]]
    for n in range(size):
        for t in range(count):
            for i in range(own[n], own[n + 1]):
                norm[n] += a[t, i] * a[t, i]
    # Between any two blocks: g = c - G a over the working set, norm[n] = ||A_n||_F^2, and `rows` holds the small Gram's
    # rows of every group that was ever tried.
    rows, change = np.empty((width, width)), np.empty((count, widest))
    until_full = 0
    for sweep in range(max_sweeps):
        full = until_full <= 0
        if full:
            if sweep > 0 and gap_of_group(c, a, g, 0, count, own, cut, square, strength) <= goal:
                break
            until_full = FULL_EVERY
        moved = False
        for n in range(size):
            if not full and norm[n] == 0:
                continue
            top, bottom, bar, total = own[n], own[n + 1], strength * cut[n], 0.0
            for i in range(top, bottom):  # squares[i]: ||R_i||^2, of what the residual without this block pulls with
                squares[i] = 0.0
            for t in range(count):
                for i in range(top, bottom):
                    z = g[t, i] + d[i] * a[t, i]
                    squares[i] += z * z
            for i in range(top, bottom):
                total += squares[i]
            if total <= bar * bar:
                if norm[n] == 0:
                    continue
                reach = 0.0
            else:
                reach = block_norm(squares, d, top, bottom, bar)
            shift, inside = 0.0, 0.0
            for i in range(top, bottom):  # from here on the factor Z_i = R_i squares[i]
                squares[i] = reach / (d[i] * reach + bar)
            for t in range(count):
                for i in range(top, bottom):
                    new = (g[t, i] + d[i] * a[t, i]) * squares[i]
                    move = new - a[t, i]
                    change[t, i - top] = move
                    a[t, i] = new
                    shift += move * move
                    inside += new * new
            norm[n] = inside
            if shift > STILL * total:  # less is rounding, and would be moved to and fro for ever
                moved = True
            if not gathered[n]:
                gathered[n] = True
                for i in range(top, bottom):
                    source = gram[where[i]]
                    for m in range(width):
                        rows[i, m] = source[where[m]]
            subtract_rows(g, 0, change, rows, top, bottom, width)
        until_full -= 1
        if not moved:
            if full:
                max_sweeps = sweep
                break
            until_full = 0
    for t in range(count):
        for i in range(width):
            coef[first + t, where[i]] = a[t, i]
    return min(sweep + 1, max_sweeps)


@inner
@no_type_check
def refresh(gram, cross, coef, pull, first, count):
    """pull = cross - coef @ gram for the columns of one target group, through the nonzeros of `coef`."""
    width = gram.shape[0]
    for t in range(first, first + count):
        row = pull[t]
        for m in range(width):
            row[m] = cross[t, m]
        for i in range(width):
            if coef[t, i] != 0:
                v, source = coef[t, i], gram[i]
                for m in range(width):
                    row[m] -= v * source[m]


@kernel
@no_type_check
def group_rounds(
    gram, eigen, cross, coef, pull, weight, row_starts, column_starts, square, strength,
    todo, gap, rounds, sweeps, tol, least, max_sweeps, at_once,
):  # fmt: skip
    """Certify every target group in `todo` and improve those above the tolerance; sweeps < 0 marks a stuck one.

    After a single round the pull is left to the caller, who takes the products of many target groups together.
    """
    work = np.empty(row_starts.shape[0], np.int64)
    for n in range(todo.shape[0]):
        h = todo[n]
        first, count, w = column_starts[h], column_starts[h + 1] - column_starts[h], weight[h]
        for _ in range(at_once):
            gap[h] = gap_of_group(cross, coef, pull, first, count, row_starts, w, square[h], strength[h])
            if gap[h] <= 0.5 * tol * square[h] or sweeps[h] < 0:
                break
            size = choose_groups(coef, pull, first, count, row_starts, w, strength[h], least, work)
            spent = descend_groups(
                gram, eigen, work, size, cross, coef, pull, first, count, row_starts, w, square[h], strength[h],
                0.15 * tol * square[h], max_sweeps,
            )  # fmt: skip
            sweeps[h] = sweeps[h] + spent if spent > 0 else -1 - sweeps[h]
            rounds[h] += 1
            if at_once > 1:
                refresh(gram, cross, coef, pull, first, count)
