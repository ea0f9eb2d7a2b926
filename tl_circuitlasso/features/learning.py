"""Circuits among SAE features: codes -> which features live -> one regression per pair of hooks -> graph.

prompts      Prompts       batches of tokens, masks and the positions that are samples      models/tokens.py
  | collect_codes           one forward pass a batch; SAEs encode what the model makes      models/feature_collect.py
codes        CodeStore      CSR by hook, in memory or on disk                               models/feature_store.py
  | survey, choose_alive    which features fire often enough to be explained                models/feature_survey.py
  | replay                  what features do to each other: the layers between run on       models/feature_replay.py
effects      Effects        S_ij and its standard error, where it is anything
  | regress_pair            sums, a certified sparse solve, held-out R^2; then the next pair features/regression.py
graph        AttributionGraph  with what is known of every feature                          features/graph.py

With a checkpoint folder codes, effects, blocks of children and finished pairs are files of their own (`kept`): a killed
run loses a minute of a replay at most, or one block of a pair's children and the pair's sums.
"""

import math
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tl_circuitlasso._checks import warn
from tl_circuitlasso.data.sharing import ALONE, Ranks
from tl_circuitlasso.data.targets import Labels, Target
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.features.classes import classify_pair
from tl_circuitlasso.features.effects import UNREAD
from tl_circuitlasso.features.few import regress_samples
from tl_circuitlasso.features.fit import Regressed
from tl_circuitlasso.features.graph import feature_graph, kept_by_pair
from tl_circuitlasso.features.kept import Kept, replay_kept
from tl_circuitlasso.features.regression import Rule, regress_pair
from tl_circuitlasso.features.samples import PairData, columns_of
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.models.adapter import Adapter
from tl_circuitlasso.models.feature_collect import CollectedCodes, collect_codes
from tl_circuitlasso.models.feature_path import known_paths
from tl_circuitlasso.models.feature_replay import replay
from tl_circuitlasso.models.feature_setup import TARGET
from tl_circuitlasso.models.feature_sums import Effects
from tl_circuitlasso.models.feature_survey import Alive, Firing, choose_alive, strongest, survey
from tl_circuitlasso.models.sae import SAEFeatures
from tl_circuitlasso.models.tokens import Prompts
from tl_circuitlasso.progress import bar as counting

LEAST_PROMPTS = 20  # with fewer, none is held out
Pair = tuple[str, str]


class UnreadPair(UserWarning):
    """It isn't known what stands between two hooks, so their edges are what the regression alone says."""


class NoEdges(UserWarning):
    """Between the features of two hooks no edge is kept, because of what their effects on each other are."""


@dataclass(frozen=True, eq=False)
class FeatureSetup:
    """What to look for, beside the basis: the behaviour, how sparse, and where to run the regressions."""

    target: Target
    last: bool
    rule: Rule
    device: torch.device | str = "cpu"
    checkpoint: Path | None = None
    progress: bool = True
    ranks: Ranks = ALONE


def learn_features(
    adapter: Adapter, prompts: Prompts, basis: SAEFeatures, setup: FeatureSetup
) -> tuple[AttributionGraph, CollectedCodes]:
    """The sparse circuit among the features of `basis`, pair by pair, and what it was made from.

    The processes of `setup.ranks` share the prompts, and each pair's children; all get the same graph.

    Raises
    ------
    InputError: an SAE, pair, target or checkpoint that doesn't fit, no feature left, or too little memory (estimated
        before anything is allocated). ModelError: NaN or infinite activations or codes.
    """
    collected = collect_codes(
        adapter,
        prompts,
        basis,
        setup.target,
        last=setup.last,
        checkpoint=setup.checkpoint,
        progress=setup.progress,
        ranks=setup.ranks,
    )
    clock = time.perf_counter()
    widths = {hook: encoder.features for hook, encoder in collected.encoders.items()}
    firing = survey(collected.store, widths, setup.ranks)
    alive = {
        hook: choose_alive(hook, firing[hook], encoder.decoder, basis) for hook, encoder in collected.encoders.items()
    }
    surveyed = time.perf_counter()
    found, unread, replayed = _regress_all(adapter, collected, basis, setup, alive)
    regressed = time.perf_counter()
    shown, kept = setup.progress and setup.ranks.rank == 0, {hook: some.features for hook, some in alive.items()}
    examples = strongest(collected.store, kept, setup.ranks, progress=shown)
    made = (firing, alive, examples, found, unread)
    graph = feature_graph(adapter, collected, basis, setup.target, *made, progress=shown)
    seconds = {
        "forward and encoding": collected.seconds,
        "survey": surveyed - clock,
        "statistics": sum(one.seconds["statistics"] for one in found.values()),
        "solve": sum(one.seconds["solve"] for one in found.values()),
        "replay": replayed,
        "held out": sum(one.seconds["held out"] for one in found.values()),
        "pairs": regressed - surveyed,
        "node info": time.perf_counter() - regressed,
    }
    _tell_empty(graph, found)
    return _with_record(graph, basis, seconds, collected, firing, alive, found, unread), collected


def _regress_all(
    adapter: Adapter, collected: CollectedCodes, basis: SAEFeatures, setup: FeatureSetup, alive: Mapping[str, Alive]
) -> tuple[dict[Pair, Regressed], dict[Pair, str], float]:
    """Every pair's regression: from the checkpoint of process 0 where it is done, else solved and written there; the
    pairs of which it isn't known what stands between, with the reason; and the seconds that replays took."""
    places: dict[Pair, Place] = {}
    for number, pair in enumerate(collected.pairs):
        data = _pair_data(adapter, collected, basis, alive, pair)
        kept = Kept.of(setup.checkpoint, number, data, collected.origin, vars(setup.rule), setup.ranks)
        places[pair] = Place(data, kept, kept.regression())
    clock = time.perf_counter()
    effects, unread = _effects(adapter, collected, basis, setup, alive, places)
    replayed = time.perf_counter() - clock
    shown = setup.progress and setup.ranks.rank == 0
    found: dict[Pair, Regressed] = {}
    for pair, place in counting(places.items(), desc="regress", unit="pair", progress=shown):
        done = place.done
        if done is None:
            done = regress(replace(place.data, effects=effects.get(pair)), basis, setup, pair, place.kept)
            place.kept.finish(done)
        found[pair] = done
    return found, unread, replayed


@dataclass(frozen=True, eq=False)
class Place:
    """A pair's samples, where what is finished of it is kept, and the regression where it is done."""

    data: PairData
    kept: Kept
    done: Regressed | None


def _effects(
    adapter: Adapter, collected: CollectedCodes, basis: SAEFeatures, setup: FeatureSetup, alive: Mapping[str, Alive],
    places: Mapping[Pair, Place],
) -> tuple[dict[Pair, Effects], dict[Pair, str]]:  # fmt: skip
    """What features do to each other, of the pairs that aren't done; and why it can't be told of others."""
    if basis.penalty != "read":
        return {}, {}
    pairs = [pair for pair in places if pair[1] != TARGET]
    paths, unread = known_paths(adapter, collected.encoders, pairs, collected.first)
    if basis.mixing == "pooled":
        paths, unread = (
            {},
            dict.fromkeys(pairs, "under mixing 'pooled' samples are prompts, not positions"),
        )
    for pair, reason in unread.items():
        warn(
            f"{' -> '.join(pair)}: what the one does to the other isn't told ({reason}); its edges are coefficients of "
            f"a plain Lasso that stand out ({UNREAD} standard deviations or more)",
            UnreadPair,
        )
    waiting = {pair: path for pair, path in paths.items() if places[pair].done is None}
    known = {pair: effects for pair in waiting if (effects := places[pair].kept.effects()) is not None}
    waiting = {pair: path for pair, path in waiting.items() if pair not in known}
    features = {hook: some.features for hook, some in alive.items()}
    copies = {pair: len(places[pair].data.columns) for pair in waiting}
    kept_at = replay_kept([places[pair].kept for pair in waiting], setup.ranks)
    options: dict[str, Any] = {"progress": setup.progress and setup.ranks.rank == 0, "ranks": setup.ranks}
    made = replay(adapter, collected.store, waiting, features, copies, kept_at=kept_at, **options)
    for pair, effects in made.items():
        places[pair].kept.keep_effects(effects)
    if kept_at is not None:
        shutil.rmtree(kept_at.folder, ignore_errors=True)
    return known | made, unread


def regress(
    data: PairData, basis: SAEFeatures, setup: FeatureSetup, pair: tuple[str, str], kept: Kept | None = None
) -> Regressed:
    """One pair's regression, in the way that its target and the number of its samples ask for; `kept` is where blocks
    of its children are, of those that are solved by their Gram.

    Raises
    ------
    InputError: fewer than two samples, or what the way itself refuses.
    """
    samples = setup.ranks.count(data.count(held=False))
    if samples < 2:
        raise InputError(
            f"`tokens` give {samples} sample(s) for {' -> '.join(pair)}: a regression needs at least two, and "
            "thousands to be of use"
        )
    if pair[1] == TARGET and isinstance(setup.target, Labels):
        return classify_pair(data, setup.rule, setup.target, memory=basis.memory, ranks=setup.ranks)
    if data.sources > 2 * samples:
        return regress_samples(data, setup.rule, memory=basis.memory, ranks=setup.ranks)
    options: dict[str, Any] = {"memory": basis.memory, "ranks": setup.ranks}
    return regress_pair(data, setup.rule, device=setup.device, kept=kept, **options)


def _pair_data(
    adapter: Adapter,
    collected: CollectedCodes,
    basis: SAEFeatures,
    alive: Mapping[str, Alive],
    pair: Pair,
) -> PairData:
    parent, child = pair
    heads = adapter.shape.n_heads if basis.mixing == "heads" else None
    return PairData(
        store=collected.store,
        parent=parent,
        child=None if child == TARGET else child,
        columns=columns_of(parent, collected.routes[pair], heads),
        features=alive[parent].features,
        child_features=torch.arange(collected.target_columns) if child == TARGET else alive[child].features,
        errors=collected.errors.get(parent, 0),
        pooled=basis.mixing == "pooled",
        held_out=basis.held_out if collected.prompts >= LEAST_PROMPTS else 0.0,
    )


# ---- what happened --------------------------------------------------------------------------------------------------


def _tell_empty(graph: AttributionGraph, found: Mapping[Pair, Regressed]) -> None:
    """Warn of pairs of hooks between whose features no edge is kept though their effects are known."""
    kept = kept_by_pair(graph, errors=False)
    for pair, one in found.items():
        if one.sure is None or one.bars is None or kept[pair]:
            continue
        count, largest = one.sure
        what = (
            f"{count} effects aren't chance, and the largest moves the child by {largest:.2g} of its standard deviation"
            if count
            else "no effect of a feature on another can be told from chance"
        )
        warn(
            f"{' -> '.join(pair)}: no edge between features is kept: {what} (edges have {one.bars[0][0]:.2g} or more, "
            "and pass on a twentieth of what the parent writes). More prompts, SAEs of hooks that follow each other "
            "directly, or mixing='heads' may show more",
            NoEdges,
        )


def _with_record(
    graph: AttributionGraph,
    basis: SAEFeatures,
    seconds: Mapping[str, float],
    collected: CollectedCodes,
    firing: Mapping[str, Firing],
    alive: Mapping[str, Alive],
    found: Mapping[tuple[str, str], Regressed],
    unread: Mapping[tuple[str, str], str],
) -> AttributionGraph:
    """The graph with the figures of every pair: edges, held-out R^2, strength, seconds."""
    kept = kept_by_pair(graph)
    record = {
        "samples": collected.samples,
        "chunks_on_disk": collected.chunks_on_disk,
        "seconds": dict(seconds),
        "left_out": {hook: dict(some.left_out) for hook, some in alive.items()},
        "alive": {hook: len(some.features) for hook, some in alive.items()},
        "active_per_sample": {hook: float(one.count.sum() / max(one.samples, 1)) for hook, one in firing.items()},
        "pairs": [
            _figures(pair, one, kept[pair], len(alive[pair[1]].features) if pair[1] in alive else 1)
            | _how(pair, one, basis, unread)
            for pair, one in found.items()
        ],
        "candidates": {
            f"{parent}->{child}": len(alive[parent].features) * (len(alive[child].features) if child in alive else 1)
            for parent, child in found
        },
    }
    return replace(graph, provenance=record)


def _figures(pair: tuple[str, str], one: Regressed, edges: int, targets: int) -> dict[str, Any]:
    """What is told of a pair: `edges` are the graph's that are kept, `coefficients` all nonzero ones, of which those
    of an error's directions and of a target's columns make one edge each."""
    explained = one.r2[~one.r2.isnan()]
    return {
        "source": pair[0],
        "target": pair[1],
        "samples": one.samples,
        "edges": edges,
        "edges_per_target": edges / targets,
        "coefficients": int((one.lasso != 0).sum()),
        "held_out_r2": None if math.isnan(one.overall) else one.overall,
        "median_held_out_r2": float(explained.median()) if len(explained) else None,
        "strength": float(one.strength.median()),
        "largest_gap": float(one.gap.max()) if len(one.gap) else 0.0,
        "seconds": dict(one.seconds),
    }


def _how(pair: Pair, one: Regressed, basis: SAEFeatures, unread: Mapping[Pair, str]) -> dict[str, Any]:
    """How it was told what a pair's edges are: by effects and their penalty, or by which other one, and why."""
    read = bool(one.effect.isfinite().any())
    found = {
        "effects": "replay" if read else None,
        "penalty": "l1" if basis.penalty == "read" and not read else basis.penalty,
    }
    if one.sure is not None and one.bars is not None:
        found |= {"sure_effects": one.sure[0], "largest_sure_score": one.sure[1], "least_score": one.bars[0][0]}
    return found | ({"reason": unread[pair]} if pair in unread else {})
