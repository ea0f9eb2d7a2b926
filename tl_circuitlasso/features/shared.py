"""One pair's regression among several processes: each has codes of its own, and solves children of its own.

Sums over samples are all-reduced, in float64 and process after process, so they differ from those of one process in the
last bits. Children are dealt out in turn; each is solved alone, so what is found of it doesn't depend on the others.
Where the samples themselves are needed (fewer than half the columns, or labels), every process is given all of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import scipy.sparse
import torch
from jaxtyping import Int
from torch import Tensor

from tl_circuitlasso.data.sharing import Ranks
from tl_circuitlasso.features.fit import PER_EDGE, PER_TARGET, Regressed
from tl_circuitlasso.features.samples import PairData, Part


def everyones(own: Regressed, mine: Int[Tensor, " mine"], ranks: Ranks) -> Regressed:
    """The regression of all children, from the shares of the processes, as one process orders it."""
    if ranks.size == 1:
        return own
    return joined(own, ranks.gather({**own.tensors(), "mine": mine}))


def joined(own: Regressed, parts: Sequence[Mapping[str, Tensor]]) -> Regressed:
    """The regression of all children, from those of some: each part's tensors, and which children it has ("mine")."""
    edges, children = (
        {name: torch.cat([part[name] for part in parts]) for name in names} for names in (PER_EDGE, PER_TARGET)
    )
    edges["target"] = torch.cat([part["mine"][part["target"]] for part in parts])
    by_child = torch.cat([part["mine"] for part in parts]).argsort()
    by_target = edges["target"].argsort(stable=True)
    whole = {name: x[by_target] for name, x in edges.items()} | {name: x[by_child] for name, x in children.items()}
    return replace(own, **whole)


def first_of(own: Regressed | None, ranks: Ranks) -> Regressed | None:
    """What process 0 has, if anything."""
    if ranks.size == 1:
        return own
    plain = ranks.gather_data(None if own is None else own.plain())[0]
    tensors = ranks.gather({} if own is None else own.tensors())[0]
    return None if plain is None else Regressed.of(tensors, plain)


def gathered(pair: PairData, ranks: Ranks) -> PairData:
    """The pair with the samples of all processes, held out or not, instead of where to find this process's."""
    if ranks.size == 1:
        return pair
    own = [_packed(part) for held in (False, True) for part in pair.parts(held=held)]
    named = {f"{number}/{name}": x for number, part in enumerate(own) for name, x in part.items()}
    given: list[Part] = []
    for tensors in ranks.gather(named):
        numbers = sorted({int(key.partition("/")[0]) for key in tensors})
        given += [_unpacked({key: x for key, x in tensors.items() if key.startswith(f"{n}/")}, n) for n in numbers]
    return replace(pair, given=tuple(given))


def _packed(part: Part) -> dict[str, Tensor]:
    child = part.child
    dense = {"child": child} if isinstance(child, Tensor) else _csr("child", child)
    return {**_csr("codes", part.codes), **dense, "extra": part.extra, "prompt": part.prompt}


def _unpacked(tensors: dict[str, Tensor], number: int) -> Part:
    named = {key.removeprefix(f"{number}/"): x for key, x in tensors.items()}
    child = named["child"] if "child" in named else _matrix("child", named)
    return Part(_matrix("codes", named), named["extra"], child, named["prompt"])


def _csr(name: str, matrix: scipy.sparse.csr_matrix) -> dict[str, Tensor]:
    parts = {"starts": matrix.indptr, "columns": matrix.indices, "values": matrix.data}
    tensors = {f"{name}.{key}": torch.from_numpy(np.ascontiguousarray(part)) for key, part in parts.items()}
    return tensors | {f"{name}.shape": torch.tensor(matrix.shape)}


def _matrix(name: str, tensors: dict[str, Tensor]) -> scipy.sparse.csr_matrix:
    values, columns, starts = (tensors[f"{name}.{key}"].numpy() for key in ("values", "columns", "starts"))
    return scipy.sparse.csr_matrix((values, columns, starts), tuple(tensors[f"{name}.shape"].tolist()))
