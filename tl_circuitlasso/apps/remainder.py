"""What of a child's code on one prompt the kept edges of a parent's SAE don't bring, measured on the model itself.

    error         what the code loses where the parent's SAE has no error: its reconstruction stands in its place
    bias          the code where the SAE has neither error nor features: its decoder's bias alone
    unexplained   what the SAE's features bring beyond the kept edges: other features, what features do together, and
                  what weights get wrong here

At positions that aren't samples (BOS) the parent's activation stays as it is. With what kept edges bring, these add up
to the code.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.models import Adapter
from tl_circuitlasso.models.encoder import Encoder
from tl_circuitlasso.models.feature_effects import Segment
from tl_circuitlasso.models.hooks import resting
from tl_circuitlasso.models.sae import ERROR, error_name
from tl_circuitlasso.models.tokens import Batch

KINDS = ("error", "bias", "unexplained")


@dataclass(frozen=True, eq=False)
class Remainder:
    """A child's codes on one prompt: as they are, and with less and less of the parent's activation."""

    hooks: tuple[str, str]
    code: Float[Tensor, "pos feature"]
    without_error: Float[Tensor, "pos feature"]
    bias: Float[Tensor, "pos feature"]

    def rows(self, edges: pd.DataFrame, targets: Sequence[str], where: Int[Tensor, " sample"]) -> pd.DataFrame:
        """Three rows for each of the targets and positions at which it fires; `edges` says what edges bring there."""
        parent = edges["source"].map(lambda name: parent_and_kind(name)[0])
        brought = edges[parent == self.hooks[0]].groupby(["target", "position"])["contribution"].sum()
        found = []
        for target in targets:
            number = int(target.rpartition("#")[2])
            for position in where[self.code[where, number] > 0].tolist():
                code, less, bias = (
                    float(part[position, number]) for part in (self.code, self.without_error, self.bias)
                )
                error = code - less
                left = code - float(brought.get((target, position), 0.0)) - error - bias
                found += [
                    (position, source_name(self.hooks[0], kind), target, value, code)
                    for kind, value in zip(KINDS, (error, bias, left))
                ]
        return pd.DataFrame(found, columns=["position", "source", "target", "contribution", "target_code"])


def remainder(adapter: Adapter, ends: tuple[Encoder, Encoder], batch: Batch, acts: Mapping[str, Tensor]) -> Remainder:
    """Two runs from the parent's hook to the child's."""
    parent, child = ends
    read, out = acts[parent.hook], acts[parent.hook_out]
    keep = batch.keep
    flat = out[keep].flatten(1)
    error = parent.encode_with_error(read[keep], out[keep])[1]
    nothing = parent.edited(read[keep], torch.zeros_like)[1]
    segment = Segment(adapter, parent.hook_out, child.hook)
    codes = []
    with torch.no_grad(), resting(adapter.model):
        for instead in (flat, flat - error.to(flat), nothing.to(flat)):
            start = out.clone()
            start[keep] = instead.view(-1, *out.shape[2:])
            end = segment.run(batch.tokens, batch.mask, start)
            codes.append(child.encode(end[0]).double().cpu())
    return Remainder((parent.hook, child.hook), *codes)


def parent_and_kind(source: str) -> tuple[str, str]:
    """The hook that a row's source is of, and whether it is an edge's or which of the three.

    >>> parent_and_kind("blocks.0.hook_resid_post#7"), parent_and_kind("blocks.0.hook_resid_post.bias")
    (('blocks.0.hook_resid_post', 'edges'), ('blocks.0.hook_resid_post', 'bias'))
    """
    hook, mark, _ = source.rpartition("#")
    if mark:
        return hook, "edges"
    hook, _, kind = source.rpartition(".")
    return hook, "error" if kind == ERROR else kind


def source_name(hook: str, kind: str) -> str:
    """How the table calls one of the three: the SAE's error as the graph's node of it is called.

    >>> source_name("blocks.0.hook_resid_post", "error"), source_name("blocks.0.hook_resid_post", "bias")
    ('blocks.0.hook_resid_post.hook_sae_error', 'blocks.0.hook_resid_post.bias')
    """
    return error_name(hook) if kind == "error" else f"{hook}.{kind}"


def joined(edges: pd.DataFrame, rest: Sequence[pd.DataFrame], texts: Sequence[str]) -> pd.DataFrame:
    """Edges and the rest, largest |contribution| first."""
    parts = [part.assign(token=[texts[p] for p in part["position"]], port="") for part in rest if len(part)]
    table = pd.concat([edges, *parts], ignore_index=True) if parts else edges
    order = table["contribution"].abs().sort_values(ascending=False, kind="stable").index
    return table.loc[order].reset_index(drop=True)


def with_errors(graph: AttributionGraph, table: pd.DataFrame) -> AttributionGraph:
    """The graph with what each SAE's error brings to its children on the prompt, where it has nodes for errors."""
    rows = table[table["source"].isin([name for name in graph.index.names if name.endswith(f".{ERROR}")])]
    sums = rows.groupby(["source", "target"])["contribution"].sum()
    sums = sums[sums != 0]
    if not len(sums):
        return graph
    source, target = (
        torch.tensor([graph.index.position(name) for name in sums.index.get_level_values(end)]) for end in (0, 1)
    )
    value = torch.tensor(sums.to_numpy(), dtype=graph.score.dtype)
    old = ~torch.isin(graph.source * len(graph.index) + graph.target, source * len(graph.index) + target)
    added = torch.zeros_like(value)
    return replace(
        graph,
        source=torch.cat([graph.source[old], source]),
        target=torch.cat([graph.target[old], target]),
        port=torch.cat([graph.port[old], torch.zeros_like(source)]),
        score=torch.cat([graph.score[old], value]),
        weight=torch.cat([graph.weight[old], added.to(graph.weight)]),
        kept=torch.cat([graph.kept[old], torch.ones_like(source, dtype=torch.bool)]),
        extras={name: torch.cat([one[old], added.to(one)]) for name, one in graph.extras.items()},
    )
