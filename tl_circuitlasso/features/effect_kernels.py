"""The compiled sums of what edges do: sample by sample, with the child's codes spread out so that each is one look."""

from typing import no_type_check

import numpy as np

from tl_circuitlasso.solve.jit import kernel


@kernel
@no_type_check
def add_changes(
    starts, columns, values, child_starts, child_columns, child_values, first, target, reads, thresholds, top, fires,
    code, total,
):  # fmt: skip
    """total[e] += sum over samples of delta_mij (see `effects`) for the edges e, ordered by source.

    Codes of parent and child are CSR. `first`: where each source's edges begin; columns beyond those sources are passed
    over. `fires`, `code`: one place for each feature of parent and child, all zero, and so again at the end.
    """
    sources, features = first.shape[0] - 1, fires.shape[0]
    for m in range(starts.shape[0] - 1):
        weakest, least = 0, np.inf
        for k in range(child_starts[m], child_starts[m + 1]):
            j, z = child_columns[k], np.float64(child_values[k])
            code[j] = z
            if 0 < z < least:
                weakest, least = j, z
        for k in range(starts[m], starts[m + 1]):
            i, z = columns[k], np.float64(values[k])
            if i < features:
                fires[i] = True
            elif i >= sources or fires[i % features]:
                continue
            bar = least - z * max(reads[i, weakest], 0.0) if top else -np.inf
            for e in range(first[i], first[i + 1]):
                j = target[e]
                if code[j] != 0:
                    moved = z * reads[i, j]
                    gone = moved > 0 and code[j] - moved < max(thresholds[j], bar)
                    total[e] += code[j] if gone else moved
        for k in range(child_starts[m], child_starts[m + 1]):
            code[child_columns[k]] = 0.0
        for k in range(starts[m], starts[m + 1]):
            if columns[k] < features:
                fires[columns[k]] = False
