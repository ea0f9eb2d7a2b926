"""The compiled Gram of sparse codes: one output row at a time stays in cache while the samples that feed it pass by."""

from typing import no_type_check

from tl_circuitlasso.solve.jit import kernel


@kernel
@no_type_check
def gather_gram(col_starts, col_rows, col_order, row_starts, row_columns, values, out):
    """out = X'X from X in CSC (`col_*`) and CSR (`row_*`); `col_order` is the place of a CSC entry in the CSR arrays.

    Columns are sorted in a row, so the entries from a given one on are its partners in the upper triangle.
    """
    for i in range(out.shape[0]):
        row = out[i]
        for k in range(col_starts[i], col_starts[i + 1]):
            at = col_order[k]
            value, stop = values[at], row_starts[col_rows[k] + 1]
            for n in range(at, stop):
                row[row_columns[n]] += value * values[n]
    for i in range(out.shape[0]):
        for j in range(i):
            out[i, j] = out[j, i]
