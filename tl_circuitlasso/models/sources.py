"""What every component of a model writes in a pass less what it writes when ablated, and scaling what components write.

Sources are numbered as in `Components`.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from tl_circuitlasso.data.sites import Site
from tl_circuitlasso.models.adapter import Adapter
from tl_circuitlasso.models.hooks import Observer
from tl_circuitlasso.models.names import act
from tl_circuitlasso.models.patching import Written

WRITTEN_OUT = 512 << 20  # bytes of sources kept in d_model; beyond it they are written out again for each layer


class Sources:
    """What sources write in a pass less what they write when ablated: heads as z, written out in d_model on demand.

    `wanted` are the sources that some reader needs, ascending; they are kept written out where they fit the memory set
    aside for it. `value` gives an activation of the pass by the adapter's name, with copies and prompts as first axes.
    """

    def __init__(
        self,
        adapter: Adapter,
        sizes: tuple[int, int, int],
        wanted: list[int],
        value: Callable[[str], Tensor],
        ablated: Written,
    ) -> None:
        self.adapter, self.sizes, self.wanted, self.value, self.ablated = adapter, sizes, wanted, value, ablated
        groups = adapter.shape.components.groups()
        self.kinds, self.starts = list(groups), [rows.start for rows in groups.values()]
        self.group_of = [group for group, rows in enumerate(groups.values()) for _ in range(rows.start, rows.stop)]
        self.place = {column: place for place, column in enumerate(wanted)}
        shape = (len(wanted), *sizes, adapter.shape.d_model)
        empty = torch.empty(0, dtype=adapter.compute_dtype, device=adapter.device)
        fits = math.prod(shape) * empty.element_size() <= WRITTEN_OUT
        self.kept = empty.new_empty(shape) if fits else None
        self.ready = 0
        self.differences: dict[int, Tensor] = {}

    def written_out(self, columns: list[int], copy: int, prompts: slice) -> Float[Tensor, "source prompt pos d_model"]:
        """Some sources, ascending, for some prompts of one copy."""
        if self.kept is None:
            parts = [self._write(group, some, copy, prompts) for group, some in self._by_group(columns)]
            return torch.cat([part.to(self.adapter.device) for part in parts])
        self._keep(self.kept, self.group_of[columns[-1]])
        places = [self.place[column] for column in columns]
        here = self.kept[:, copy, prompts]
        together = places[-1] - places[0] == len(places) - 1
        return here[places[0] : places[-1] + 1] if together else here[places]

    def span(self, columns: list[int]) -> list[int]:
        """Which sources to ask for where `columns` are needed: some more, where that saves a copy of those."""
        if self.kept is None:
            return columns
        first, last = self.place[columns[0]], self.place[columns[-1]]
        return self.wanted[first : last + 1] if last - first < 2 * len(columns) else columns

    def _by_group(self, columns: list[int]) -> Iterator[tuple[int, list[int]]]:
        for group in sorted({self.group_of[column] for column in columns}):
            yield group, [c - self.starts[group] for c in columns if self.group_of[c] == group]

    def _keep(self, kept: Tensor, last_group: int) -> None:
        new = [column for column in self.wanted[self.ready :] if self.group_of[column] <= last_group]
        for group, some in self._by_group(new):
            rows = slice(self.ready, self.ready + len(some))
            for copy in range(self.sizes[0]):
                kept[rows, copy] = self._write(group, some, copy, slice(None))
            self.ready = rows.stop
            self.differences.pop(group)

    def _write(self, group: int, some: list[int], copy: int, prompts: slice) -> Tensor:
        layer, kind = self.kinds[group]
        change = self._difference(group)[copy, prompts]
        if kind != "heads":
            return change[None]
        heads = change[:, :, some].movedim(2, 0).flatten(1, 2)
        return torch.bmm(heads, self.adapter.writer(layer)[0][some]).unflatten(1, change.shape[:2])

    def _difference(self, group: int) -> Float[Tensor, "circuit batch pos ..."]:
        if group not in self.differences:
            layer, kind = self.kinds[group]
            if kind == "input":
                difference = self.value(act("resid_pre", 0)) - self.ablated.input
            elif kind == "mlp":
                difference = self.value(act("mlp_out", layer)) - self.ablated.mlps[layer]
            else:
                scale = self.value(act("scale.attn_out", layer))[..., None]
                difference = self.value(act("z", layer)) / scale - self.ablated.heads[layer]
            self.differences[group] = difference
        return self.differences[group]


# ---- scaled nodes ---------------------------------------------------------------------------------------------------


def scaled_nodes(adapter: Adapter, sites: Iterable[Site], scale: float) -> list[tuple[str, Observer]]:
    """The edits that multiply by `scale` what some heads and MLPs write."""
    heads: dict[int, list[int]] = {}
    edits: list[tuple[str, Observer]] = []
    for site in sites:
        if site.kind == "head":
            heads.setdefault(site.layer, []).append(site.head)
        else:
            edits.append((act("mlp_out", site.layer), lambda out: out * scale))
    return [*edits, *((act("z", layer), partial(_scale_heads, adapter, some, scale)) for layer, some in heads.items())]


def _scale_heads(adapter: Adapter, heads: list[int], scale: float, z: Tensor) -> Tensor:
    factors = z.new_ones(adapter.shape.n_heads)
    factors[heads] = scale
    by_head = z.unflatten(-1, (adapter.shape.n_heads, -1)) if z.ndim == 3 else z  # side by side behind an SAE
    return (by_head * factors[:, None]).view_as(z)
