"""The compiled inner loops of the working-set solver (numba, one target at a time, released from the GIL).

Everything here works in scaled units: the Gram has a unit diagonal, so a coordinate step needs no division by
curvature. Arrays are target-major: a row of `cross`, `coef`, `pull` belongs to one target. Each target is computed by
itself in a fixed order, so results don't depend on the number of threads or on how targets are split into chunks.
"""

from typing import no_type_check

import numpy as np

from tl_circuitlasso.solve.jit import inner, kernel

LEAP_UP_TO = 256  # nonzeros up to which a factorisation is cheaper than the sweeps it replaces
LEAPS = 3
NEGATIVE = 1e-4  # relative; rounding in float32 stays far below
PACK_FROM = 8  # nonzeros per row of the Gram from which its tiles are copied for sparse products
FULL_EVERY = 5  # sweeps over the nonzeros between two sweeps over the whole working set


@inner
@no_type_check
def gap_of(cross, coef, pull, weight, ridge, upper, square, strength, one_sided, forbid):
    """Duality gap of one target (see `certificate`); forbidden, dead and zero-bounded sources are masked out."""
    fit, energy, size, bound, ag = 0.0, 0.0, 0.0, np.inf, 0.0
    boxed = False
    for i in range(coef.shape[0]):
        if forbid[i]:
            continue
        a, g, w = np.float64(coef[i]), np.float64(pull[i]), np.float64(weight[i])
        if a != 0.0:
            fit += a * (np.float64(cross[i]) + g)
            ag += a * g
            energy += ridge[i] * a * a
            size += w * abs(a)
            g -= ridge[i] * a
        boxed = boxed or upper[i] < np.inf
        if upper[i] == np.inf:
            size_of_pull = g if one_sided else abs(g)
            if size_of_pull > 0 and strength * w < bound * size_of_pull:
                bound = strength * w / size_of_pull
    residual = max(square - fit, 0.0)
    natural = (residual + ag) / residual if residual > 0 else 1.0
    best = np.inf
    for candidate in (natural, 1.0):
        s = max(min(candidate, bound), 0.0)
        gap = 0.5 * (1 - s) ** 2 * residual - s * ag + 0.5 * (1 + s * s) * energy + strength * size
        if boxed:
            for i in range(coef.shape[0]):
                if not forbid[i] and upper[i] < np.inf:
                    excess = s * (pull[i] - ridge[i] * coef[i]) - strength * weight[i]
                    if excess > 0:
                        gap += excess * upper[i]
        best = min(best, gap)
    if square > 0 and not best > -NEGATIVE * square:
        return np.inf  # no convex problem has a negative gap: the Gram is indefinite, or a coefficient has overflowed
    return max(best, 0.0)


@kernel
@no_type_check
def sparse_products(gram, cross, coef, todo, pull, tile):
    """pull = cross - coef @ gram for the rows in `todo`, through the nonzeros of `coef` and one tile of G at a time."""
    sources = gram.shape[0]
    starts = np.empty(todo.shape[0] + 1, np.int64)
    starts[0] = 0
    for n in range(todo.shape[0]):
        count = 0
        for i in range(sources):
            count += coef[todo[n], i] != 0
        starts[n + 1] = starts[n] + count
    where, what = np.empty(starts[-1], np.int64), np.empty(starts[-1], coef.dtype)
    for n in range(todo.shape[0]):
        at = starts[n]
        for i in range(sources):
            if coef[todo[n], i] != 0:
                where[at], what[at] = i, coef[todo[n], i]
                at += 1
    if starts[-1] <= PACK_FROM * sources:  # too few to pay for a copy of the Gram: whole rows, four at a time
        for n in range(todo.shape[0]):
            row, own = pull[todo[n]], cross[todo[n]]
            for k in range(sources):
                row[k] = own[k]
            at, stop = starts[n], starts[n + 1]
            while at < stop:
                # a row that isn't there is the last one, taken zero times
                i0, i1 = where[at], where[min(at + 1, stop - 1)]
                i2, i3 = where[min(at + 2, stop - 1)], where[min(at + 3, stop - 1)]
                v0, v1 = what[at], what[at + 1] if at + 1 < stop else 0.0 * what[at]
                v2 = what[at + 2] if at + 2 < stop else 0.0 * what[at]
                v3 = what[at + 3] if at + 3 < stop else 0.0 * what[at]
                r0, r1, r2, r3 = gram[i0], gram[i1], gram[i2], gram[i3]
                for k in range(sources):
                    row[k] -= v0 * r0[k] + v1 * r1[k] + v2 * r2[k] + v3 * r3[k]
                at += 4
        return
    packed = np.empty((sources, tile), gram.dtype)
    total = np.empty(tile, gram.dtype)
    for left in range(0, sources, tile):
        width = min(tile, sources - left)
        for i in range(sources):  # a contiguous copy that stays in cache over all targets
            for k in range(width):
                packed[i, k] = gram[i, left + k]
        for n in range(todo.shape[0]):
            row = pull[todo[n]]
            for k in range(width):
                total[k] = cross[todo[n], left + k]
            at, stop = starts[n], starts[n + 1]
            while at + 4 <= stop:
                r0, r1, r2, r3 = packed[where[at]], packed[where[at + 1]], packed[where[at + 2]], packed[where[at + 3]]
                v0, v1, v2, v3 = what[at], what[at + 1], what[at + 2], what[at + 3]
                for k in range(width):
                    total[k] -= v0 * r0[k] + v1 * r1[k] + v2 * r2[k] + v3 * r3[k]
                at += 4
            while at < stop:
                i, v = where[at], what[at]
                for k in range(width):
                    total[k] -= v * packed[i, k]
                at += 1
            for k in range(width):
                row[left + k] = total[k]


@inner
@no_type_check
def cutoff(excess, violators, room, largest):
    """The excess from which on about `room` of the violators, and no more, are let in; 0 where all fit.

    A bisection: it compiles and runs faster than a partial sort.
    """
    low, cut = 0.0, 0.0 if violators <= room else largest
    while violators > room and cut - low > 1e-3 * cut:
        middle, above = 0.5 * (low + cut), 0
        for i in range(excess.shape[0]):
            above += excess[i] >= middle
        if above > room:
            low = middle
        else:
            cut = middle
    return cut


@inner
@no_type_check
def choose(coef, pull, weight, upper, strength, one_sided, forbid, least, work):
    """Writes the next working set into `work`: support and worst violators, max(least, 4 nonzeros + 16) at most."""
    sources = coef.shape[0]
    support, violators, cut = 0, 0, 0.0
    excess = np.empty(sources, np.float64)
    for i in range(sources):
        excess[i] = 0.0
        if forbid[i] or upper[i] == 0:
            continue
        if coef[i] != 0:
            support += 1
            continue
        over = (pull[i] if one_sided else abs(pull[i])) - strength * weight[i]
        if over > 0:
            excess[i] = over / weight[i]
            cut = max(cut, excess[i])
            violators += 1
    room = max(least, 4 * support + 16) - support
    cut = cutoff(excess, violators, room, cut)
    size, at = support + min(violators, room), 0
    for i in range(sources):
        if at < size and (coef[i] != 0 or (excess[i] > 0 and excess[i] >= cut)):
            work[at] = i
            at += 1
    return at


@inner
@no_type_check
def nonzeros(a, active):
    """Writes the places of the nonzeros of `a` into `active`; their number."""
    count = 0
    for k in range(a.shape[0]):
        if a[k] != 0:
            active[count] = k
            count += 1
    return count


@inner
@no_type_check
def leap(a, g, w, r, u, strength, active, count, slot, rows):
    """A Newton step on the nonzeros, as far as no sign changes: exact where the support is right.

    Coordinate descent needs as many sweeps as the support is ill-conditioned; one small factorisation replaces them.
    Inside one orthant the objective is a convex quadratic, so a shortened step still goes down.
    """
    size = 0
    free = np.empty(count, np.int64)
    for n in range(count):
        k = active[n]
        if slot[k] < 0:
            return False
        if a[k] < u[k]:
            free[size] = k
            size += 1
    if size == 0:
        return False
    factor, step = np.empty((size, size), np.float64), np.empty(size, np.float64)
    for m in range(size):
        k = free[m]
        row = rows[slot[k]]
        step[m] = g[k] - r[k] * a[k] - strength * w[k] * (1.0 if a[k] > 0 else -1.0)
        for n in range(m + 1):
            total = row[free[n]] + (r[k] if n == m else 0.0)
            for i in range(n):
                total -= factor[m, i] * factor[n, i]
            if n < m:
                factor[m, n] = total / factor[n, n]
            elif total > 1e-6:
                factor[m, m] = np.sqrt(total)
            else:
                return False  # copies of one source: leave them to coordinate descent
    for m in range(size):
        for i in range(m):
            step[m] -= factor[m, i] * step[i]
        step[m] /= factor[m, m]
    for m in range(size - 1, -1, -1):
        step[m] /= factor[m, m]
        for i in range(m):
            step[i] -= factor[m, i] * step[m]
    share, stop = 1.0, -1
    for m in range(size):
        k = free[m]
        reach = share
        if a[k] * step[m] < 0:
            reach = -a[k] / step[m]
        elif step[m] > 0 and u[k] < np.inf:
            reach = (u[k] - a[k]) / step[m]
        if reach < share:
            share, stop = reach, m
    for m in range(size):
        k = free[m]
        old = a[k]
        a[k] = old + share * step[m]
        if m == stop:
            a[k] = 0.0 if old * step[m] < 0 else u[k]
        change, row = a[k] - old, rows[slot[k]]
        for n in range(g.shape[0]):
            g[n] -= change * row[n]
    return share == 1.0


@kernel
@no_type_check
def descend(gram, work, width, cross, coef, pull, weight, ridge, upper, square, strength, one_sided, goal, max_sweeps):
    """Cyclic coordinate descent on the working set until the gap restricted to it is at most `goal`.

    A row of the small Gram is gathered only when its coordinate first moves: most of a generous working set never
    does. Returns the number of sweeps, 0 if the very first one moved nothing.
    """
    c, a, g = np.empty(width, gram.dtype), np.empty(width, gram.dtype), np.empty(width, gram.dtype)
    w, r, u = np.empty(width, gram.dtype), np.empty(width, gram.dtype), np.empty(width, gram.dtype)
    forbid, slot, active = np.empty(width, np.bool_), np.empty(width, np.int64), np.empty(width, np.int64)
    for k in range(width):
        i = work[k]
        c[k], a[k], g[k], w[k], r[k], u[k] = cross[i], coef[i], pull[i], weight[i], ridge[i], upper[i]
        forbid[k], slot[k] = False, -1
    used, count, until_full = 0, width, 0
    rows = np.empty((min(width, 32), width), gram.dtype)
    for sweep in range(max_sweeps):
        full = until_full <= 0
        if full:
            if sweep > 0 and gap_of(c, a, g, w, r, u, square, strength, one_sided, forbid) <= goal:
                break
            until_full, count = FULL_EVERY, width
            for k in range(width):
                active[k] = k
        moved = False
        for n in range(count):
            k = active[n]
            old = a[k]
            z, cut = g[k] + old, strength * w[k]
            if z > cut:
                a[k] = min((z - cut) / (1 + r[k]), u[k])
            elif z < -cut and not one_sided:
                a[k] = (z + cut) / (1 + r[k])
            else:
                a[k] = 0.0
            step = a[k] - old
            if step != 0:
                moved = True
                if slot[k] < 0:
                    if used == rows.shape[0]:
                        larger = np.empty((min(2 * used, width), width), gram.dtype)
                        for old_row in range(used):
                            for m in range(width):
                                larger[old_row, m] = rows[old_row, m]
                        rows = larger
                    source, row = gram[work[k]], rows[used]
                    for m in range(width):
                        row[m] = source[work[m]]
                    slot[k] = used
                    used += 1
                row = rows[slot[k]]
                for m in range(width):
                    g[m] -= step * row[m]
        until_full -= 1
        if full:
            if not moved:
                max_sweeps = sweep
                break
            count = nonzeros(a, active)
            if sweep > FULL_EVERY + 1 and count <= LEAP_UP_TO:  # where sweeps do it soon it is not worth its cost
                for _ in range(LEAPS):
                    if leap(a, g, w, r, u, strength, active, count, slot, rows):
                        until_full = 0
                        break
                    count = nonzeros(a, active)
        elif not moved:
            until_full = 0
    for k in range(width):
        coef[work[k]] = a[k]
    return min(sweep + 1, max_sweeps)


@kernel
@no_type_check
def one_round(
    gram, cross, coef, pull, weight, squared, upper, forbid, square, strength, one_sided,
    todo, gap, sweeps, tol, least, max_sweeps,
):  # fmt: skip
    """Certify every target in `todo` and improve those above the tolerance; sweeps < 0 marks one that can't move."""
    work = np.empty(gram.shape[0], np.int64)
    for n in range(todo.shape[0]):
        t = todo[n]
        w, u = weight[t % weight.shape[0]], upper[t % upper.shape[0]]
        r, f = strength[t] * squared[t % squared.shape[0]], forbid[t % forbid.shape[0]]
        c, a, g, yy, level = cross[t], coef[t], pull[t], square[t], strength[t]
        gap[t] = gap_of(c, a, g, w, r, u, yy, level, one_sided, f)
        if gap[t] <= 0.5 * tol * yy or sweeps[t] < 0:
            continue
        width = choose(a, g, w, u, level, one_sided, f, least, work)
        goal = 0.15 * tol * yy
        spent = descend(gram, work, width, c, a, g, w, r, u, yy, level, one_sided, goal, max_sweeps)
        sweeps[t] = sweeps[t] + spent if spent > 0 else -1 - sweeps[t]
