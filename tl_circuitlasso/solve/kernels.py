"""The compiled inner loops of the working-set solver (numba, one target at a time, released from the GIL).

Everything here works in scaled units: the Gram has a unit diagonal, so a coordinate step needs no division by
curvature. Arrays are target-major: a row of `cross`, `coef`, `pull` belongs to one target. Each target is computed by
itself in a fixed order, so results don't depend on the number of threads or on how targets are split into chunks.

Unsigned indices (`np.uint64`) let loops be vectorised: a signed sum could count from the end of an array.
"""

from typing import no_type_check

import numpy as np

from tl_circuitlasso.solve.jit import inner, kernel
from tl_circuitlasso.solve.leap_kernels import leap

LEAP_UP_TO = 256  # nonzeros up to which a factorisation may be cheaper than the sweeps it replaces
LEAPS = 3
PATIENCE = 500  # sweeps of a target after which it leaps on and on, until its support is settled
EFFORT = 1 << 32  # cubed nonzeros that may go into that at a time: about a second
NEGATIVE = 1e-4  # relative; rounding in float32 stays far below
LANES = 128  # maxima that are kept side by side
FULL_EVERY = 5  # sweeps over the nonzeros between two sweeps over the whole working set


@inner
@no_type_check
def steepest(coef, pull, ridge, reach, one_sided):
    """The largest reach * |pull - ridge * coef|: as many maxima at once as a register holds, then theirs."""
    size, best = coef.shape[0], 0.0
    lanes = np.empty(LANES, np.float64)
    for k in range(LANES):
        lanes[k] = 0.0
    for left in range(0, size, LANES):
        for k in range(min(LANES, size - left)):
            i = np.uint64(left + k)
            g = pull[i] - ridge[i] * coef[i]
            g = (g if one_sided else abs(g)) * reach[i]
            lanes[k] = g if g > lanes[k] else lanes[k]
    for k in range(LANES):
        best = max(best, lanes[k])
    return best


@inner
@no_type_check
def bent(pull, weight, ridge, upper, strength, one_sided):
    """The conjugate of a penalty with a squared part at the pull as it is (`L1.whole_conjugate`)."""
    total = 0.0
    for i in range(pull.shape[0]):
        over = (pull[i] if one_sided else abs(pull[i])) - strength * weight[i]
        if over > 0 and upper[i] > 0:
            best = upper[i] if over >= ridge[i] * upper[i] else over / ridge[i]
            total += best * (over - 0.5 * ridge[i] * best) if best < np.inf else np.inf
    return total


@inner
@no_type_check
def gap_of(cross, coef, pull, weight, ridge, upper, reach, square, strength, one_sided, boxed):
    """Duality gap of one target (see `certificate`).

    `reach` is 1 / weight, or 0 where a bound on the coefficient takes the place of that on its pull; `upper` is 0
    where a source is forbidden or dead; `boxed` says that some bounds are neither 0 nor infinite.
    """
    fit, energy, size, ag = 0.0, 0.0, 0.0, 0.0
    for i in range(coef.shape[0]):
        if coef[i] != 0.0:
            a, g = np.float64(coef[i]), np.float64(pull[i])
            fit += a * (np.float64(cross[i]) + g)
            ag += a * g
            energy += ridge[i] * a * a
            size += np.float64(weight[i]) * abs(a)
    worst = steepest(coef, pull, ridge, reach, one_sided)
    bound = strength / worst if worst > 0 else np.inf
    residual = max(square - fit, 0.0)
    natural = (residual + ag) / residual if residual > 0 else 1.0
    best = np.inf
    for candidate in (natural, 1.0):
        s = max(min(candidate, bound), 0.0)
        gap = 0.5 * (1 - s) ** 2 * residual - s * ag + 0.5 * (1 + s * s) * energy + strength * size
        if boxed:
            for i in range(coef.shape[0]):
                if 0 < upper[i] < np.inf:
                    excess = s * (pull[i] - ridge[i] * coef[i]) - strength * weight[i]
                    if excess > 0:
                        gap += excess * upper[i]
        best = min(best, gap)
    if energy > 0:
        best = min(best, 0.5 * energy + strength * size - ag + bent(pull, weight, ridge, upper, strength, one_sided))
    if square > 0 and not best > -NEGATIVE * square:
        return np.inf  # no convex problem has a negative gap: the Gram is indefinite, or a coefficient has overflowed
    return max(best, 0.0)


@inner
@no_type_check
def worse_than_nothing(cross, coef, pull, weight, ridge, strength):
    """Whether the objective of the coefficients is above that of the empty solution."""
    fit, energy, size = 0.0, 0.0, 0.0
    for i in range(coef.shape[0]):
        if coef[i] != 0.0:
            a = np.float64(coef[i])
            fit += a * (np.float64(cross[i]) + np.float64(pull[i]))
            energy += ridge[i] * a * a
            size += np.float64(weight[i]) * abs(a)
    return not 0.5 * energy + strength * size <= 0.5 * fit


@kernel
@no_type_check
def sparse_products(gram, tiles, left, cross, coef, pull, todo):
    """pull = cross - coef @ gram for the rows in `todo`, through the nonzeros of `coef`.

    By whole rows of the Gram, or where it is given without rows by `tiles`, which have its columns from `left` on.
    """
    sources = coef.shape[1]
    # The nonzeros of target n stand in where/what[starts[n]:starts[n + 1]]; the products read nothing else of `coef`.
    starts = np.empty(todo.shape[0] + 1, np.int64)
    starts[0] = 0
    for n in range(todo.shape[0]):
        count, row = 0, coef[todo[n]]
        for i in range(sources):
            count += row[i] != 0
        starts[n + 1] = starts[n] + count
    where, what = np.empty(starts[-1] + 1, np.int64), np.empty(starts[-1] + 1, coef.dtype)
    for n in range(todo.shape[0]):
        at, row = starts[n], coef[todo[n]]
        for i in range(sources):
            where[at], what[at] = i, row[i]  # overwritten by the next where this is a zero
            at += row[i] != 0
    if gram.shape[0] > 0:
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
                for k in range(sources):
                    row[k] -= v0 * gram[i0, k] + v1 * gram[i1, k] + v2 * gram[i2, k] + v3 * gram[i3, k]
                at += 4
        return
    # Tile by tile, all targets: `total` is this tile's part of one target's pull and stays in registers or cache.
    total = np.empty(tiles.shape[2], tiles.dtype)
    for b in range(tiles.shape[0]):
        width = min(tiles.shape[2], sources - left)
        for n in range(todo.shape[0]):
            t, at, stop = todo[n], starts[n], starts[n + 1]
            for k in range(width):
                total[k] = cross[t, np.uint64(left + k)]
            while at + 4 <= stop:
                i0, i1, i2, i3 = where[at], where[at + 1], where[at + 2], where[at + 3]
                v0, v1, v2, v3 = what[at], what[at + 1], what[at + 2], what[at + 3]
                for k in range(width):
                    two = v2 * tiles[b, i2, k] + v3 * tiles[b, i3, k]
                    total[k] -= v0 * tiles[b, i0, k] + v1 * tiles[b, i1, k] + two
                at += 4
            while at < stop:
                i, v = where[at], what[at]
                for k in range(width):
                    total[k] -= v * tiles[b, i, k]
                at += 1
            for k in range(width):
                pull[t, np.uint64(left + k)] = total[k]
        left += width


@inner
@no_type_check
def cutoff(excess, violators, room, largest):
    """The excess from which on about `room` of the violators, and no more, are let in; 0 where all fit.

    A bisection: it compiles and runs faster than a partial sort.
    """
    low, cut = 0.0, 0.0 if violators <= room else largest  # more than `room` lie above `low`, no more above `cut`
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
def choose(coef, pull, weight, upper, strength, one_sided, least, work):
    """Writes the next working set into `work`: support and worst violators.

    It has max(least, 4 nonzeros + 16) sources at most, and room for 3 `least` once a first fit has shown which pulls
    are those of others.
    """
    count, support, cut = 0, 0, 0.0
    for i in range(coef.shape[0]):
        over = (pull[i] if one_sided else abs(pull[i])) - strength * weight[i]
        work[count] = i  # overwritten by the next unless it counts
        count += (over > 0 or coef[i] != 0) and upper[i] > 0
    excess = np.empty(count, np.float64)
    for n in range(count):
        i = work[n]
        if coef[i] != 0:
            excess[n] = 0.0
            support += 1
        else:
            excess[n] = ((pull[i] if one_sided else abs(pull[i])) - strength * weight[i]) / weight[i]
            cut = max(cut, excess[n])
    violators, room = count - support, max(least if support == 0 else 3 * least, 4 * support + 16) - support
    cut = cutoff(excess, violators, room, cut)
    size, at = support + min(violators, room), 0
    for n in range(count):
        i = work[n]
        if at < size and (coef[i] != 0 or excess[n] >= cut):
            work[at] = i
            at += 1
    return at


@inner
@no_type_check
def threshold(x, bar, ridge, upper, one_sided):
    """`prox.threshold` of one number."""
    if x > bar:
        return min((x - bar) / (1 + ridge), upper)
    if x < -bar and not one_sided:
        return (x + bar) / (1 + ridge)
    return 0.0


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
def descent(
    gram, work, width, cross, coef, pull, weight, ridge, upper, square, strength, one_sided, goal, max_sweeps, rows,
    patient,
):  # fmt: skip
    """Cyclic coordinate descent on the working set until the gap restricted to it is at most `goal`.

    A row of the small Gram is gathered into `rows` only when its coordinate first moves: most of a generous working
    set never does. Returns the number of sweeps, 0 if the very first one moved nothing.
    """
    c, a, g = np.empty(width, gram.dtype), np.empty(width, gram.dtype), np.empty(width, gram.dtype)
    w, r, u = np.empty(width, gram.dtype), np.empty(width, gram.dtype), np.empty(width, gram.dtype)
    q, slot, active = np.empty(width, gram.dtype), np.empty(width, np.int64), np.empty(width, np.int64)
    boxed = False
    for k in range(width):
        i = work[k]
        c[k], a[k], g[k], w[k], r[k], u[k] = cross[i], coef[i], pull[i], weight[i], ridge[i], upper[i]
        q[k] = 1 / w[k] if u[k] == np.inf else 0.0
        slot[k], boxed = -1, boxed or u[k] < np.inf
    # Between any two steps: g = c - G a over the working set; `rows` holds the rows of all that ever moved, the one of
    # k from slot[k] * width on; `active` lists what this sweep walks (all, or what wasn't 0 after the last full sweep).
    used, count, until_full, rested = 0, width, 0, FULL_EVERY + 1
    for sweep in range(max_sweeps):
        full = until_full <= 0
        if full:
            if sweep > 0 and gap_of(c, a, g, w, r, u, q, square, strength, one_sided, boxed) <= goal:
                break
            until_full, count = FULL_EVERY, width
            for k in range(width):
                active[k] = k
        moved = False
        for n in range(count):
            k = active[n]
            old = a[k]
            a[k] = threshold(g[k] + old, strength * w[k], r[k], u[k], one_sided)
            step = a[k] - old
            if step != 0:
                moved = True
                if slot[k] < 0:  # it moves for the first time: its row of the small Gram is fetched, once
                    i, base, slot[k] = work[k], np.uint64(used * width), used
                    for m in range(width):
                        rows[base + np.uint64(m)] = gram[i, np.uint64(work[m])]
                    used += 1
                base = np.uint64(slot[k] * width)
                for m in range(width):  # keeps g = c - G a: the next coordinate sees this one's step
                    g[m] -= step * rows[base + np.uint64(m)]
        until_full -= 1
        if full:
            if not moved:  # nothing can: an optimum of the working set, as far as this precision knows
                max_sweeps = sweep
                break
            count = nonzeros(a, active)
            most = LEAP_UP_TO if patient else 4 * LEAP_UP_TO
            if sweep - rested > count // 2 and 0 < count <= most:  # it costs no less than the sweeps before it
                rested = sweep
                for _ in range(LEAPS if patient else max(LEAPS, min(count, EFFORT // count**3))):
                    if leap(a, g, w, r, u, strength, active, count, slot, rows):
                        until_full = 0
                        break
                    count = nonzeros(a, active)
        elif not moved:  # the support has settled: look at the whole working set again
            until_full = 0
    for k in range(width):
        coef[work[k]] = a[k]
    return min(sweep + 1, max_sweeps)


@kernel
@no_type_check
def descend(gram, work, width, cross, coef, pull, weight, ridge, upper, square, strength, one_sided, goal, max_sweeps):
    """`descent` with memory of its own."""
    rows = np.empty(width * width, gram.dtype)
    return descent(
        gram, work, width, cross, coef, pull, weight, ridge, upper, square, strength, one_sided, goal, max_sweeps, rows,
        True,
    )  # fmt: skip


@kernel
@no_type_check
def one_round(
    gram, cross, coef, pull, weight, squared, upper, reach, square, strength, one_sided, ridged, boxed,
    todo, gap, sweeps, tol, least, max_sweeps,
):  # fmt: skip
    """Certify every target in `todo` and improve those above the tolerance; sweeps < 0 marks one that can't move."""
    work, r = np.empty(gram.shape[0] + 1, np.int64), np.empty(gram.shape[0], gram.dtype)
    rows = np.empty(0, gram.dtype)  # kept from target to target: fresh memory costs more than what is done in it
    for i in range(gram.shape[0]):
        r[i] = 0.0
    # Of each target in turn: `pull` is cross - coef @ gram on entry and isn't kept up; the caller makes it anew for
    # those that moved. `sweeps` counts what a target has had, and is -1 - that once a round could not move it.
    for n in range(todo.shape[0]):
        t = todo[n]
        w, u, q = weight[t % weight.shape[0]], upper[t % upper.shape[0]], reach[t % reach.shape[0]]
        c, a, g, yy, level = cross[t], coef[t], pull[t], square[t], strength[t]
        if ridged:
            own = squared[t % squared.shape[0]]
            for i in range(gram.shape[0]):
                r[i] = level * own[i]
        if sweeps[t] == 0 and worse_than_nothing(c, a, g, w, r, level):  # a start too far off to descend from
            for i in range(gram.shape[0]):
                a[i], g[i] = 0.0, c[i]
        gap[t] = gap_of(c, a, g, w, r, u, q, yy, level, one_sided, boxed)
        if gap[t] <= 0.5 * tol * yy or sweeps[t] < 0:
            continue
        width = choose(a, g, w, u, level, one_sided, least, work)
        goal = 0.15 * tol * yy
        if width * width > rows.shape[0]:
            rows = np.empty(max(width * width, 2 * rows.shape[0]), gram.dtype)
        patient = sweeps[t] < PATIENCE
        spent = descent(gram, work, width, c, a, g, w, r, u, yy, level, one_sided, goal, max_sweeps, rows, patient)
        sweeps[t] = sweeps[t] + spent if spent > 0 else -1 - sweeps[t]
