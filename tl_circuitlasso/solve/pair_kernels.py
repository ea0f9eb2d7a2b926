"""Compiled loops over sparse codes and coefficients; a call does a range of rows, so threads can share them."""

from typing import no_type_check

import numpy as np

from tl_circuitlasso.solve.jit import kernel


@kernel
@no_type_check
def gather_cross(col_starts, col_rows, col_values, row_starts, row_columns, row_values, out, start, stop):
    """out[start:stop] += X'Y for those sources, from X in CSC and Y in CSR."""
    for i in range(start, stop):
        row = out[i]
        for k in range(col_starts[i], col_starts[i + 1]):
            sample, value = col_rows[k], col_values[k]
            for n in range(row_starts[sample], row_starts[sample + 1]):
                row[row_columns[n]] += value * row_values[n]


@kernel
@no_type_check
def gather_upper(col_starts, col_rows, col_places, row_starts, row_columns, row_values, out, start, stop):
    """The upper triangle of out[start:stop] += X'X; `col_places` says where a CSC entry stands in the CSR arrays.

    Columns are sorted in a row, so the entries from a given one on are its partners in the upper triangle.
    """
    for i in range(start, stop):
        row = out[i]
        for k in range(col_starts[i], col_starts[i + 1]):
            place = col_places[k]
            value, end = row_values[place], row_starts[col_rows[k] + 1]
            for n in range(place, end):
                row[row_columns[n]] += value * row_values[n]


@kernel
@no_type_check
def least_squares(gram, cross, starts, rows, out, ridge, start, stop):
    """out[starts[j]:starts[j + 1]] = argmin_b 1/2 b'G b - c'b on the sources `rows` of each target's support.

    `cross` holds c for each entry of the support. A Cholesky factorisation per target, with `ridge` times the diagonal
    added so that copies of one source share the fit; a source that rounding makes less than a copy is left out.
    """
    for j in range(start, stop):
        first, size = starts[j], starts[j + 1] - starts[j]
        factor = np.empty((size, size))  # lower triangle, row by row: rows before `a` are those of the factor
        for a in range(size):
            for b in range(a + 1):
                value = gram[rows[first + a], rows[first + b]]
                if a == b:
                    value *= 1.0 + ridge
                for c in range(b):
                    value -= factor[a, c] * factor[b, c]
                if a == b:
                    least = 0.5 * ridge * gram[rows[first + a], rows[first + a]]
                    factor[a, a] = np.sqrt(value) if value > least else np.inf  # its coefficient is 0
                else:
                    factor[a, b] = value / factor[b, b]
        for a in range(size):  # forward: factor out = cross
            value = cross[first + a]
            for c in range(a):
                value -= factor[a, c] * out[first + c]
            out[first + a] = value / factor[a, a]
        for a in range(size - 1, -1, -1):  # backward, in place: factor' out = out
            value = out[first + a]
            for c in range(a + 1, size):
                value -= factor[c, a] * out[first + c]
            out[first + a] = value / factor[a, a]
