"""The graph of regressed pairs, and what is known of every feature: how often and where it fires, what it writes."""

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_circuitlasso.data.sites import PORTS
from tl_circuitlasso.data.targets import Target
from tl_circuitlasso.features.effects import is_clear
from tl_circuitlasso.features.fit import Regressed
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.graph.nodes import Block, NodeIndex
from tl_circuitlasso.models import readout
from tl_circuitlasso.models.adapter import Adapter
from tl_circuitlasso.models.encoder import Encoder
from tl_circuitlasso.models.feature_collect import CollectedCodes
from tl_circuitlasso.models.feature_setup import TARGET
from tl_circuitlasso.models.feature_survey import BEFORE, Alive, Examples, Firing
from tl_circuitlasso.models.hook_order import writes_to_stream
from tl_circuitlasso.models.sae import ERROR, SAEFeatures, error_block, error_name, hook_block
from tl_circuitlasso.progress import bar

CONTEXTS = 5  # texts shown of each feature
TOP_TOKENS = 5
TOP_LOGITS = 5
LOGIT_ROWS = 1024  # features unembedded at once


@dataclass(frozen=True, eq=False)
class _Edges:
    """One pair's edges as positions in the index."""

    source: Int[Tensor, " edge"]
    target: Int[Tensor, " edge"]
    port: Int[Tensor, " edge"]
    head: Float[Tensor, " edge"]
    columns: dict[str, Float[Tensor, " edge"]]  # weight, regression, q, lasso, score, stability; clear: 1 or 0
    parts: Float[Tensor, "edge head"]  # what of the weight each head brings; no heads where none is told


def feature_graph(
    adapter: Adapter,
    collected: CollectedCodes,
    basis: SAEFeatures,
    target: Target,
    firing: Mapping[str, Firing],
    alive: Mapping[str, Alive],
    examples: Mapping[str, Examples],
    found: Mapping[tuple[str, str], Regressed],
    unread: Collection[tuple[str, str]] = (),
    *,
    progress: bool = False,
) -> AttributionGraph:
    """The graph: one row per nonzero coefficient, kept features and error terms as nodes, the target last.

    An edge's weight is its effect where that is known, else its regression coefficient; where effects are known, the
    coefficients are the column "regression" (0 where the regression found none), q-values the column "q" (1 where
    effects aren't known or too small to be tested), and edges whose effect is too small or unsure aren't kept. Where an
    end stands for several directions (an SAE's error, the model's own logits, more than two classes), the edge has the
    norm of what goes by them: never negative, as directions could as well point the other way.
    """
    index = feature_index(collected, target, alive, has_errors=basis.error)
    parts = [_edges(index, pair, one, collected, adapter, alive, basis, pair in unread) for pair, one in found.items()]
    source, target_end, port, head = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("source", "target", "port", "head")
    )
    columns = {name: torch.cat([part.columns[name] for part in parts]) for name in parts[0].columns}
    extras = {"lasso": columns["lasso"], "persistence": _persistence(index, collected, source, target_end)}
    if any(bool(one.effect.isfinite().any()) for one in found.values()):
        extras |= {"regression": columns["regression"], "q": columns["q"].nan_to_num(1.0)}
    if bool(columns["stability"].isfinite().any()):
        extras["stability"] = columns["stability"].nan_to_num(0.0)
    if basis.mixing == "heads":
        extras["head"] = head
        parts_of = torch.cat([part.parts for part in parts])
        extras |= {f"head.{number}": parts_of[:, number] for number in range(adapter.shape.n_heads)}
    return AttributionGraph(
        index=index,
        source=source,
        target=target_end,
        port=port,
        score=columns["score"],
        weight=columns["weight"],
        kept=(columns["weight"] != 0) & (columns["clear"] > 0),
        extras=extras,
        certificates=tuple(row for pair, one in found.items() for row in _certificates(index, pair, one, alive)),
        node_info=node_info(adapter, collected, basis, firing, alive, examples, progress=progress),
    )


def kept_by_pair(graph: AttributionGraph, *, errors: bool = True) -> Counter[tuple[str, str]]:
    """How many edges are kept of each pair (parent hook, child hook or "target"), with those of SAEs' errors or not."""
    sites = [str(block.site).removesuffix(f".{ERROR}") for block in graph.index.blocks]
    names = [site if block.site.kind == "hook" else TARGET for site, block in zip(sites, graph.index.blocks)]
    counted = graph.kept
    if not errors:
        own = torch.tensor([block.features is not None for block in graph.index.blocks])
        counted = counted & own[graph.index.block_of[graph.source]]
    ends = (graph.index.block_of[end[counted]].tolist() for end in (graph.source, graph.target))
    return Counter((names[source], names[target]) for source, target in zip(*ends))


def feature_index(
    collected: CollectedCodes, target: Target, alive: Mapping[str, Alive], *, has_errors: bool
) -> NodeIndex:
    """Hooks in the order of computation, each with its features and (as a parent) its error; the target last."""
    parents = {parent for parent, _ in collected.pairs}
    blocks: list[Block] = []
    for hook in collected.encoders:
        rank = collected.order[hook]
        blocks.append(hook_block(hook, rank, alive[hook].features.tolist()))
        if has_errors and hook in parents:
            blocks.append(error_block(hook, rank))
    if any(child == TARGET for _, child in collected.pairs):
        blocks.append(Block(readout.target_site(target), max(collected.order.values()) + 1))
    return NodeIndex(tuple(blocks))


def _edges(
    index: NodeIndex,
    pair: tuple[str, str],
    one: Regressed,
    collected: CollectedCodes,
    adapter: Adapter,
    alive: Mapping[str, Alive],
    basis: SAEFeatures,
    unread: bool,
) -> _Edges:
    """Columns of the regression as nodes: copies of a feature by port, error directions as one node."""
    parent, child = pair
    features = len(alive[parent].features)
    copies = 1
    if collected.routes[pair] is not None:
        copies += adapter.shape.n_heads if basis.mixing == "heads" else 1
    copy = one.source // features
    is_error = copy >= copies
    start = _start(index, parent)
    source = torch.where(is_error, start, start + one.source % features)
    if bool(is_error.any()):
        source = torch.where(is_error, index.position(error_name(parent)), source)
    single = child == TARGET
    target = torch.full_like(one.target, len(index) - 1) if single else _start(index, child) + one.target
    port = torch.where(~is_error & (copy > 0), PORTS.index("v"), 0)
    head = torch.where(~is_error & (copy > 0) & (basis.mixing == "heads"), copy - 1, -1).double()
    score = one.score * _share(one.spread)[one.target] if single else one.score
    columns = {
        "weight": torch.where(one.effect.isnan(), one.weight, one.effect),
        "regression": one.weight,
        "q": one.q,
        "lasso": one.lasso,
        "score": score,
        "stability": one.stability,
        "clear": _clear_edges(one, pair, collected, alive, unread).double(),
    }
    summed = is_error | (single & (len(one.gap) > 1))
    heads = adapter.shape.n_heads if basis.mixing == "heads" else 0
    parts = _by_head(head, columns["weight"], heads)
    return _merged(_Edges(source, target, port, head, columns, parts), summed, len(index))


def _clear_edges(
    one: Regressed, pair: tuple[str, str], collected: CollectedCodes, alive: Mapping[str, Alive], unread: bool
) -> Bool[Tensor, " edge"]:
    """Which of a pair's coefficients are edges whose effect can be told from none."""
    if pair[1] == TARGET:
        return torch.ones_like(one.source, dtype=torch.bool)
    lengths = [collected.encoders[hook].written.norm(dim=1).double().cpu()[alive[hook].features] for hook in pair]
    return is_clear(replace(one, effect=_whole(one, len(lengths[0]))), lengths[0], lengths[1], unread=unread)


def _whole(one: Regressed, features: int) -> Float[Tensor, " edge"]:
    """Effects, of an edge through several heads that of all of them."""
    through = (one.source >= features) & one.effect.isfinite()  # an error's directions stand behind the copies
    key = torch.stack([one.source % features, one.target, through.long()])
    _, place = torch.unique(key, dim=1, return_inverse=True)
    sums = torch.zeros(len(one.source), dtype=torch.float64).index_add(0, place, one.effect)
    return torch.where(through, sums[place], one.effect)


def _share(spread: Float[Tensor, " target"]) -> Float[Tensor, " target"]:
    """Each target column's part of the target as a whole, in standard deviations: 1 for a single column."""
    return spread / spread.square().sum().sqrt().clamp(min=1e-300)


def _merged(edges: _Edges, summed: Tensor, nodes: int) -> _Edges:
    """One row per (source, target, port): error directions and several target columns by their norm, heads by their sum
    where effects are known, else by the strongest of them."""
    edges = replace(edges, columns={name: torch.where(summed, x.abs(), x) for name, x in edges.columns.items()})
    key = (edges.source * nodes + edges.target) * len(PORTS) + edges.port
    unique, place = torch.unique(key, return_inverse=True)
    count = torch.bincount(place, minlength=len(unique))
    if not len(unique) or int(count.max()) == 1:
        return edges
    sizes = (edges.columns[name].abs().numpy() for name in ("regression", "weight", "score"))
    order = torch.from_numpy(np.lexsort((*sizes, place.numpy())))  # by place, then score, weight and coefficient
    row = order[count.cumsum(0) - 1]
    columns = {}
    for name, values in edges.columns.items():
        norm = torch.zeros(len(unique), dtype=values.dtype).index_add(0, place, values.square()).sqrt()
        strongest = values[row]
        shared = summed[row] & (count > 1) & (name not in ("stability", "clear", "q"))
        columns[name] = torch.where(shared, norm, strongest)
    source, target, port, head = (getattr(edges, name)[row] for name in ("source", "target", "port", "head"))
    whole = (head >= 0) & edges.columns["q"][row].isfinite()  # effects are known: heads' parts add up to the edge
    heads = edges.parts.shape[1]
    sums = torch.zeros(len(unique), heads, dtype=torch.float64).index_add(0, place, edges.parts)
    parts = torch.where(whole[:, None], sums, _by_head(head, columns["weight"], heads))
    columns["weight"] = torch.where(whole, parts.sum(1), columns["weight"])
    return _Edges(source, target, port, head, columns, parts)


def _by_head(head: Float[Tensor, " edge"], weight: Float[Tensor, " edge"], heads: int) -> Float[Tensor, "edge head"]:
    """Each edge's weight in the column of its head."""
    return torch.where(head[:, None] == torch.arange(heads), weight[:, None], 0.0)


def _start(index: NodeIndex, hook: str) -> int:
    """Where a hook's features begin on the node axis."""
    return next(where.start for block, where in zip(index.blocks, index.slices) if str(block.site) == hook)


def _persistence(
    index: NodeIndex, collected: CollectedCodes, source: Int[Tensor, " edge"], target: Int[Tensor, " edge"]
) -> Float[Tensor, " edge"]:
    """The cosine of what the two features write; 0 where they don't write to one space."""
    cosine = torch.zeros(len(source), dtype=torch.float64)
    directions = {hook: _unit(encoder.decoder).cpu() for hook, encoder in collected.encoders.items()}
    stream = {hook: writes_to_stream(encoder.hook_out) for hook, encoder in collected.encoders.items()}
    block_of = index.block_of
    ends = block_of[source] * len(index.blocks) + block_of[target]
    for key in ends.unique().tolist():
        one, other = (index.blocks[number] for number in divmod(key, len(index.blocks)))
        hooks = (str(one.site), str(other.site))
        if one.features is None or other.features is None or not (stream[hooks[0]] and stream[hooks[1]]):
            continue
        rows = (ends == key).nonzero().flatten()
        starts = [_start(index, hook) for hook in hooks]
        a = directions[hooks[0]][torch.tensor(one.features)[source[rows] - starts[0]]]
        b = directions[hooks[1]][torch.tensor(other.features)[target[rows] - starts[1]]]
        cosine[rows] = (a * b).sum(1).double()
    return cosine


def _unit(decoder: Float[Tensor, "feature width"]) -> Float[Tensor, "feature width"]:
    return torch.nn.functional.normalize(decoder, dim=1)


def _certificates(
    index: NodeIndex, pair: tuple[str, str], one: Regressed, alive: Mapping[str, Alive]
) -> Iterator[dict[str, Any]]:
    parent, child = pair
    names = [index.names[-1]] * len(one.gap)
    if child != TARGET:
        start = _start(index, child)
        names = list(index.names[start : start + len(alive[child].features)])
    figures = (one.gap, one.iterations, one.converged, one.strength, one.r2)
    for name, gap, iterations, converged, strength, r2 in zip(names, *(figure.tolist() for figure in figures)):
        yield {
            "target": name,
            "source": parent,
            "gap": gap,
            "iterations": iterations,
            "converged": converged,
            "strength": strength,
            "held_out_r2": None if math.isnan(r2) else r2,
        }


# ---- what is known of a feature -------------------------------------------------------------------------------------


def node_info(
    adapter: Adapter,
    collected: CollectedCodes,
    basis: SAEFeatures,
    firing: Mapping[str, Firing],
    alive: Mapping[str, Alive],
    examples: Mapping[str, Examples],
    *,
    progress: bool = False,
) -> dict[str, dict[str, Any]]:
    """Per feature: frequency, mean, std and max of its code, tokens and contexts of its strongest samples, the tokens
    whose logits its decoder direction raises most, and the user's label.

    `mean` is over the samples where it fires, `std` over all. Contexts come from different prompts.
    """
    text = Text(adapter)
    found: dict[str, dict[str, Any]] = {}
    for hook, encoder in collected.encoders.items():
        kept, one = alive[hook].features, firing[hook]
        columns = [
            (one.count / one.samples)[kept].tolist(),
            (one.total / one.count.clamp(min=1))[kept].tolist(),
            one.variance.sqrt()[kept].tolist(),
            one.largest[kept].tolist(),
        ]
        logits = _top_logits(adapter, encoder, kept)
        described = bar(kept.tolist(), progress=progress, desc="describe features", unit="feature")
        for row, feature in enumerate(described):
            frequency, mean, std, largest = (column[row] for column in columns)
            info: dict[str, Any] = {"frequency": frequency, "mean": mean, "std": std, "max": largest}
            info |= {"top_tokens": _top_tokens(examples[hook], row, text), "contexts": []}
            info["contexts"] = list(_contexts(examples[hook], row, text))
            if logits is not None:
                info["top_logits"] = [text.of(token) for token in logits[row].tolist()]
            label = basis.label(f"{hook}#{feature}")
            found[f"{hook}#{feature}"] = info if label is None else info | {"label": label}
    return found


class Text:
    """Tokens as text: by the model's tokenizer, or as numbers where it has none."""

    def __init__(self, adapter: Adapter) -> None:
        self._tokenizer = getattr(adapter.model, "tokenizer", None)
        self._known: dict[int, str] = {}

    def of(self, token: int) -> str:
        """One token, spaces and all."""
        if token not in self._known:
            self._known[token] = str(token) if self._tokenizer is None else self._inside(token)
        return self._known[token]

    def _inside(self, token: int) -> str:
        """A token as it reads in the middle of a text: many tokenizers drop the space of the first."""
        first, both = self._decoded([token]), self._decoded([token, token])
        return both[len(first) :] if both.startswith(first) and len(both) > len(first) else first

    def together(self, tokens: list[int]) -> str:
        """Tokens in a row."""
        return " ".join(map(str, tokens)) if self._tokenizer is None else self._decoded(tokens)

    def _decoded(self, tokens: list[int]) -> str:
        assert self._tokenizer is not None
        return str(self._tokenizer.decode(tokens, clean_up_tokenization_spaces=False))


def _top_tokens(examples: Examples, row: int, text: Text) -> list[str]:
    """The tokens at the feature's strongest samples, by the sum of their codes."""
    weight: dict[int, float] = {}
    for token, value in zip(examples.tokens[row, :, BEFORE].tolist(), examples.value[row].tolist()):
        if value > 0:
            weight[token] = weight.get(token, 0.0) + value
    best = sorted(weight, key=lambda token: -weight[token])[:TOP_TOKENS]
    return [text.of(token) for token in best]


def _contexts(examples: Examples, row: int, text: Text) -> Iterator[dict[str, Any]]:
    seen: set[int] = set()
    rows = zip(*(getattr(examples, name)[row].tolist() for name in ("value", "prompt", "position", "tokens")))
    for value, prompt, position, window in rows:
        if value <= 0 or prompt in seen:
            continue
        seen.add(prompt)
        real = [token for token in window if token >= 0]
        at = sum(token >= 0 for token in window[:BEFORE])
        yield {
            "text": text.together(real),
            "tokens": [text.of(token) for token in real],
            "at": at,
            "value": value,
            "prompt": prompt,
            "position": position,
        }
        if len(seen) == CONTEXTS:
            return


def _top_logits(adapter: Adapter, encoder: Encoder, kept: Int[Tensor, " kept"]) -> Int[Tensor, "kept top"] | None:
    """The tokens whose logits each decoder direction raises most; None where it isn't one of the residual stream."""
    weight, _ = adapter.unembed()
    if not writes_to_stream(encoder.hook_out) or encoder.width != weight.shape[0]:
        return None
    directions = encoder.decoder.to(weight)[kept.to(weight.device)]
    count = min(TOP_LOGITS, weight.shape[1])
    return torch.cat([(some @ weight).topk(count, 1).indices.cpu() for some in directions.split(LOGIT_ROWS)])
