"""Are the edges between SAE features real? Source features are edited, and the target features are read again.

    graph = tcl.circuit_lasso(model, tokens, basis=basis)
    rivals = {"gradient": tcl.baselines.feature_gradient(model, basis, tokens, graph),
              "correlation": tcl.baselines.feature_correlation(model, basis, tokens, graph)}
    found = tcl.evaluate.edges(model, {"CircuitLasso": graph, **rivals}, basis, held_out_tokens)
    found.summary

An edge i -> j is *real* where ablating i moves the code of j by more than chance: the 95 % interval of the effect (a
bootstrap over prompts) excludes zero, and |effect| is above the 95th percentile of |effect| over pairs of features of
the same two hooks that no graph under test keeps. Each pair of hooks has its own: effects of kinds of SAEs differ by a
factor of ten, so one bar for all would call the edges of the one unreal and the non-edges of the other real.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from tl_circuitlasso._checks import whole_number
from tl_circuitlasso.baselines.features import features_of, hook_pairs
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.evaluate.edge_figures import by_sign, summary_of
from tl_circuitlasso.evaluate.edge_recall import measure_all, nulls, recall
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.graph.verbs import in_order
from tl_circuitlasso.models import adapt
from tl_circuitlasso.models.encoder import Encoder
from tl_circuitlasso.models.feature_effects import Mode, Reading, Recording, Trying, record, trials
from tl_circuitlasso.models.sae import SAEFeatures
from tl_circuitlasso.models.tokens import Prompts
from tl_circuitlasso.progress import bar as counting

Key = tuple[str, str, str]  # source, target, port
RESAMPLES = 500
NON_EDGES = "non-edges"
_MEASURED = ("effect", "effect_low", "effect_high", "effect_amplified", "effect_pre", "effect_pre_amplified")
_MODES: tuple[Mode, ...] = ("ablate", "amplify")
_READING: Mapping[str, Reading] = {"": "firing", "v": "elsewhere"}  # by port
_READING_POOLED: Mapping[str, Reading] = {"": "all", "v": "all"}


@dataclass(frozen=True, eq=False)
class EdgeCheck:
    """Edges with their measured effects.

    Attributes
    ----------
    table: one row per edge, method and set ("strongest", "kept" for those drawn at random from the kept ones, or
        "non-edges"): source, target, port, rank (by |score|, in "strongest"), score, weight, cosine (of the two
        decoder directions), kind, prompts (on which the source fires), effect, effect_low, effect_high (of ablation),
        effect_amplified (of doubling), effect_pre, effect_pre_amplified (on the target's pre-activation; NaN where the
        SAE doesn't show it), real. Effects are changes of the target per unit of the source's code, signed as if the
        source were turned up, so they have the units of `weight`.
    summary: per method, set and kind ("persistence" where the cosine is above the bound, else "rest"): edges,
        sign_agreement, sign_amplified, sign_pre (share of edges whose weight has the sign of the effect), precision
        (share of real edges), spearman (of |weight| with |effect|), spearman_pre.
    nulls: by pair of hooks the 95th percentile of |effect| over pairs of features that no graph keeps, of the sources
        drawn for `recall`; `real` asks an edge to exceed it.
    signs: per method and sign of the measured effect, of the kept edges that are real: how many, and the share whose
        weight has that sign. A rule that always says "+" has none of the negative ones.
    recall: per method, sign and least size (.05, .1, .2 standard deviations of the target per one of the source): how
        many sure effects the sources drawn for it have on any feature of the next hook, the share that the graph keeps
        with the right sign (recall), with whatever sign (kept), and the found share of their summed size (mass).
    """

    table: pd.DataFrame
    summary: pd.DataFrame
    nulls: Mapping[tuple[str, str], float]
    signs: pd.DataFrame
    recall: pd.DataFrame

    def precision_at(self, k: int, method: str | None = None) -> float:
        """Share of real edges among the method's k strongest (of the first method, unless one is named)."""
        rows: Any = self.table[self.table["set"] == "strongest"]
        name = rows["method"].iloc[0] if method is None else method
        chosen = rows[(rows["method"] == name) & (rows["rank"] <= k)]
        if not len(chosen):
            raise InputError(f"`method` {name!r} has no tested edges at `k` = {k}: there are {set(rows['method'])}")
        return float(chosen["real"].mean())


def edges(
    model: Any,
    graphs: Any,
    basis: SAEFeatures | Mapping[str, Any],
    tokens: Any,
    *,
    strongest: int = 100,
    sample: int = 200,
    non_edges: int = 200,
    prompts: int = 32,
    positions: Any = "all",
    attention_mask: Tensor | None = None,
    persistence: float = 0.7,
    batch_size: int = 64,
    recall_sources: int = 16,
    progress: bool = True,
    seed: int = 0,
) -> EdgeCheck:
    """Measure the strongest edges of each graph, some of its kept ones, and some non-edges, by editing their sources.

    effect(i -> j) = sum over positions where i fires of (z_j(x) - z_j(x - c_i)) / sum of z_i,

    where c_i is what feature i writes, taken out at all positions of a prompt where it fires; `z_j` is encoded again
    after the layers in between have run. Edges through attention (port "v") are read where the source does not fire,
    edges between pooled features at all samples of the prompt.
    Edges from an SAE's error or into the target node aren't tested. All methods are measured in one run.

    Parameters
    ----------
    graphs: one graph, or {method: graph} over the same SAEs. tokens: prompts, best those the graphs haven't seen.
    strongest, sample, non_edges: how many edges of each sort. prompts: on how many of those where the source fires.
    persistence: cosine of the two decoder directions above which an edge counts as persistence. recall_sources: how
        many sources a pair of hooks are drawn to tell which part of all effects each graph holds.

    Raises
    ------
    InputError: no kept edge between features, graphs of other SAEs, numbers below 1, or tokens on which no source of
        an edge fires.

    >>> import tl_circuitlasso as tcl
    >>> demo = tcl.load_demo(prompts=16)
    >>> saes = {f"blocks.{layer}.hook_resid_post": tcl.synthetic.random_sae(48, 12, seed=layer) for layer in (0, 1)}
    >>> basis = tcl.SAEFeatures(saes)
    >>> graph = tcl.circuit_lasso(demo.model, demo.tokens, basis=basis, progress=False)
    >>> few = {"strongest": 3, "sample": 3, "non_edges": 3, "prompts": 2, "recall_sources": 2}
    >>> found = edges(demo.model, graph, basis, demo.tokens, **few)
    >>> list(found.table.columns[:4])
    ['source', 'target', 'port', 'score']
    """
    counts = {"strongest": strongest, "sample": sample, "non_edges": non_edges, "recall_sources": recall_sources}
    for name, count in counts.items():
        whole_number(name, count)
    how = Trying(prompts, batch_size, seed, _MODES)
    model, graphs = in_order(model, graphs)
    named = {"CircuitLasso": graphs} if isinstance(graphs, AttributionGraph) else dict(graphs)
    adapter = adapt(model)
    whole = SAEFeatures.of(basis)
    encoders = whole.encoders()
    chosen = _chosen(named, set(encoders), strongest, sample, non_edges, seed)
    walk = Prompts(adapter, tokens, attention_mask=attention_mask, positions=positions)
    used = {hook: encoders[hook] for hook in _hooks(chosen)}
    recording = record(adapter, walk, list(dict.fromkeys(h for e in used.values() for h in (e.hook, e.hook_out))))
    unique = chosen.drop_duplicates(["source", "target", "port"])
    reading = _READING_POOLED if whole.mixing == "pooled" else _READING
    effects = _measure(recording, used, unique, reading, how, progress)
    cosines = {key: _cosine(used, *key) for key in zip(unique["source"], unique["target"])}
    with counting(progress=progress, desc="all effects", unit="batch") as bar:
        how = replace(how, modes=("ablate",), read=reading[""])
        truths = measure_all(recording, used, list(named.values()), recall_sources, how, bar.update)
    return _judged(chosen, effects, cosines, persistence, nulls(named, truths), recall(named, truths))


# ---- which edges ----------------------------------------------------------------------------------------------------


def _chosen(
    graphs: Mapping[str, AttributionGraph], hooks: set[str], strongest: int, sample: int, non_edges: int, seed: int
) -> pd.DataFrame:
    random, parts, kept = np.random.default_rng(seed), [], []
    for method, graph in graphs.items():
        table = _feature_edges(graph, hooks)
        if not len(table):
            raise InputError(f"`graphs`: {method} keeps no edge between features of these SAEs: lower its strength")
        kept.append(table)
        top = table.head(strongest).assign(
            method=method, set="strongest", rank=range(1, min(strongest, len(table)) + 1)
        )
        some = np.sort(random.choice(len(table), min(sample, len(table)), replace=False))
        parts += [top, table.iloc[some].assign(method=method, set="kept")]
    every = pd.concat(kept)
    known = set(zip(every["source"], every["target"]))
    return pd.concat([*parts, _non_edges(graphs, hooks, known, non_edges, random)], ignore_index=True)


def _feature_edges(graph: AttributionGraph, hooks: set[str]) -> pd.DataFrame:
    """Kept edges between features of `hooks`, strongest first."""
    table = graph.edge_table()
    table = table[table["kept"] & table["port"].isin(_READING)]
    inside = [all(_hook(end) in hooks for end in ends) for ends in zip(table["source"], table["target"])]
    return table.loc[inside, ["source", "target", "port", "score", "weight"]]


def _non_edges(
    graphs: Mapping[str, AttributionGraph], hooks: set[str], known: set[tuple[str, str]], count: int, random: Any
) -> pd.DataFrame:
    """Pairs of features of connected hooks that no graph keeps, hook pairs in turn."""
    first = next(iter(graphs.values()))
    features = features_of(first)
    pairs = [pair for pair in hook_pairs(first) if set(pair) <= hooks]
    found: dict[tuple[str, str], None] = {}
    for attempt in range(20 * count):
        source, target = pairs[attempt % len(pairs)]
        ends = [f"{hook}#{int(random.choice(features[hook].numpy()))}" for hook in (source, target)]
        if tuple(ends) not in known:
            found[ends[0], ends[1]] = None
        if len(found) == count:
            break
    rows = pd.DataFrame(list(found), columns=["source", "target"])
    return rows.assign(port="", score=0.0, weight=0.0, method=NON_EDGES, set=NON_EDGES)


def _hook(node: str) -> str:
    return node.rpartition("#")[0]


def _feature(node: str) -> int:
    return int(node.rpartition("#")[2])


def _hooks(chosen: pd.DataFrame) -> list[str]:
    return list(dict.fromkeys(_hook(node) for node in (*chosen["source"], *chosen["target"])))


# ---- measuring ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Effect:
    """One edge on every prompt of its source: the source's mass, and the changes by mode of code and pre-activation."""

    mass: Float[np.ndarray, " prompt"]
    code: dict[Mode, Float[np.ndarray, " prompt"]]
    pre: dict[Mode, Float[np.ndarray, " prompt"] | None]


def _measure(
    recording: Recording,
    encoders: Mapping[str, Encoder],
    table: pd.DataFrame,
    reading: Mapping[str, Reading],
    how: Trying,
    progress: bool,
) -> dict[Key, _Effect]:
    groups: Any = table.groupby([table["source"].map(_hook), table["target"].map(_hook), "port"], sort=False)
    found: dict[Key, _Effect] = {}
    total = sum(rows["source"].nunique() for _, rows in groups)
    with counting(total=total, progress=progress, desc="edit features", unit="feature") as bar:
        for (first, last, port), rows in groups:
            ends = (encoders[first], encoders[last])
            sources, targets = (sorted({_feature(node) for node in rows[end]}) for end in ("source", "target"))
            bar_at = bar.n
            merged = _Collected(sources, targets)
            numbers = (torch.tensor(sources), torch.tensor(targets))
            for batch in trials(recording, ends, *numbers, replace(how, read=reading[port])):
                merged.add(batch)
                bar.update(bar_at + int(batch["ablate"].source.max()) + 1 - bar.n)
            bar.update(bar_at + len(sources) - bar.n)
            for source, target in zip(rows["source"], rows["target"]):
                found[source, target, port] = merged.effect(_feature(source), _feature(target))
    return found


class _Collected:
    """The trials of one pair of hooks."""

    def __init__(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        self._source = {feature: at for at, feature in enumerate(sources)}
        self._target = {feature: at for at, feature in enumerate(targets)}
        self._batches: list[dict[str, Any]] = []

    def add(self, batch: Mapping[Mode, Any]) -> None:
        one = batch["ablate"]
        self._batches.append({"source": one.source.numpy(), "mass": one.mass.cpu().numpy(), "by_mode": batch})

    def effect(self, source: int, target: int) -> _Effect:
        at, column = self._source[source], self._target[target]
        rows = [(batch, np.flatnonzero(batch["source"] == at)) for batch in self._batches]
        rows = [(batch, some) for batch, some in rows if len(some)]
        mass = np.concatenate([batch["mass"][some] for batch, some in rows]) if rows else np.zeros(0)
        code: dict[Mode, Any] = {mode: _column(rows, mode, "code", column) for mode in _MODES}
        pre: dict[Mode, Any] = {mode: _column(rows, mode, "pre", column) for mode in _MODES}
        return _Effect(mass, {mode: np.zeros(0) if some is None else some for mode, some in code.items()}, pre)


def _column(rows: Sequence[Any], mode: Mode, what: str, column: int) -> Float[np.ndarray, " prompt"] | None:
    parts = [getattr(batch["by_mode"][mode], what) for batch, _ in rows]
    if not parts or any(part is None for part in parts):
        return None
    return np.concatenate([part[some, column].cpu().numpy() for part, (_, some) in zip(parts, rows)])


def _cosine(encoders: Mapping[str, Encoder], source: str, target: str) -> float:
    """Of the decoder directions; NaN where they don't live in the same space or one is zero."""
    rows = [encoders[_hook(node)].decoder[_feature(node)].double() for node in (source, target)]
    if rows[0].shape != rows[1].shape or not all(bool(row.any()) for row in rows):
        return float("nan")
    return float(torch.cosine_similarity(rows[0], rows[1], dim=0))


# ---- judging --------------------------------------------------------------------------------------------------------


def _judged(
    chosen: pd.DataFrame,
    effects: Mapping[Key, _Effect],
    cosines: Mapping[tuple[str, str], float],
    bound: float,
    bars: Mapping[tuple[str, str], float],
    found: pd.DataFrame,
) -> EdgeCheck:
    keys = list(zip(chosen["source"], chosen["target"], chosen["port"]))
    measured = {key: _numbers(effect) for key, effect in effects.items()}
    table: Any = pd.concat([chosen.reset_index(drop=True), pd.DataFrame([measured[key] for key in keys])], axis=1)
    table["cosine"] = [cosines[key[:2]] for key in keys]
    table["kind"] = np.where(table["cosine"] > bound, "persistence", "rest")
    table = table[table["prompts"] > 0].reset_index(drop=True)
    if not (table["set"] != NON_EDGES).any():
        raise InputError("`tokens`: no source of an edge fires on them: give more prompts, or prompts of the same kind")
    least = [bars.get((_hook(source), _hook(target)), 0.0) for source, target in zip(table["source"], table["target"])]
    clear = (table["effect_low"] > 0) | (table["effect_high"] < 0)
    table["real"] = clear & (table["effect"].abs() > np.array(least))
    methods = [name for name in chosen["method"].unique() if name != NON_EDGES]
    return EdgeCheck(table, summary_of(table), bars, by_sign(table, methods), found)


def _numbers(effect: _Effect) -> dict[str, Any]:
    total = effect.mass.sum()
    if not total:
        return dict.fromkeys(_MEASURED, float("nan")) | {"prompts": 0}
    pre = {mode: float("nan") if values is None else values.sum() / total for mode, values in effect.pre.items()}
    code = {mode: values.sum() / total for mode, values in effect.code.items()}
    interval = _interval(effect.code["ablate"], effect.mass)
    values = (code["ablate"], *interval, code["amplify"], pre["ablate"], pre["amplify"])
    return {"prompts": len(effect.mass), **dict(zip(_MEASURED, values))}


def _interval(change: Float[np.ndarray, " prompt"], mass: Float[np.ndarray, " prompt"]) -> tuple[float, float]:
    """The 95 % bootstrap interval of sum(change) / sum(mass) over prompts; everything for a single prompt."""
    if len(mass) < 2:
        return -np.inf, np.inf
    draws = np.random.default_rng(0).multinomial(len(mass), np.full(len(mass), 1 / len(mass)), RESAMPLES)
    low, high = np.quantile((draws @ change) / (draws @ mass), [0.025, 0.975])
    return float(low), float(high)
