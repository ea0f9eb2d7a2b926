"""Is it a circuit? Five hypothesis tests (Shi et al. 2024, arXiv 2410.13032), each with a p-value.

Three ask what an ideal circuit has: it does as well as the model (equivalence), what is left out knows nothing of the
behaviour (independence), and each of its edges matters (minimality). Two ask whether it is better than chance: than
random circuits of its size, alone (sufficiency) and when cut out of the model (partial necessity).

>>> import tl_circuitlasso as tcl
>>> from tl_circuitlasso.graph.nodes import component_index
>>> demo = tcl.load_demo(prompts=12)
>>> graph = tcl.AttributionGraph.from_edges(
...     component_index(n_layers=3, n_heads=4), {edge: 1.0 for edge in demo.true_edges})
>>> metric = tcl.evaluate.logit_diff(demo.correct, demo.incorrect)
>>> found = tests(demo.model, graph, demo.tokens, demo.corrupted, metric, circuits=40)
>>> bool(found.table.loc["sufficiency", "passes"])
True
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from scipy.stats import binom
from torch import Tensor
from typing_extensions import Unpack

from tl_circuitlasso._checks import whole_number
from tl_circuitlasso.baselines.edges import EdgeLayout
from tl_circuitlasso.data.sites import PORTS
from tl_circuitlasso.data.targets import LogitDiff
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.evaluate.circuits import EdgeMatrix, check_graph, kept_matrix, prune
from tl_circuitlasso.evaluate.faithfulness import check_scale
from tl_circuitlasso.evaluate.interventions import measure
from tl_circuitlasso.evaluate.metrics import Metric
from tl_circuitlasso.evaluate.minimal import live_rows, without_each
from tl_circuitlasso.experiment import Ablation, CutOptions, Experiment, verb
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.graph.selection import Edges, first
from tl_circuitlasso.models.prompt_forms import AnyPrompts
from tl_circuitlasso.progress import bar

PERMUTATIONS = 1000  # of the independence test
TOGETHER = 64  # circuits measured in one call
_EQUAL = 1e-6  # of the metric's range: below, two values are the same but for rounding


@dataclass(frozen=True, eq=False)
class CircuitTests:
    """What the five tests say; `print` it, or show `table` in a notebook.

    Attributes
    ----------
    table: one row per test: `null` (the hypothesis), `statistic`, `p_value` and `passes`. Of the ideal properties,
        equivalence and independence pass where the null can't be rejected, minimality where it is for every edge;
        sufficiency and partial necessity pass where the null is rejected.
    edges: one row per edge of the circuit: source, target, port, `effect` (mean |change| when it alone is cut) and
        `p_value` of the null that it matters no more than an edge of a random path would.
    forward_passes: forward passes per prompt.
    """

    table: pd.DataFrame
    edges: pd.DataFrame
    forward_passes: float

    def __str__(self) -> str:
        return self.table.to_string(float_format=lambda value: f"{value:.3g}")


@verb
def tests(
    model: Any,
    graph: AttributionGraph,
    clean: AnyPrompts = None,
    corrupted: AnyPrompts = None,
    metric: Metric | LogitDiff | None = None,
    ablation: Ablation = "patch",
    *,
    circuits: int = 100,
    quantile: int | float = 0.9,
    margin: int | float = 0.1,
    level: int | float = 0.05,
    seed: int = 0,
    **options: Unpack[CutOptions],
) -> CircuitTests:
    """The five tests of the kept circuit; other arguments as in `faithfulness`.

        equivalence        |P(m(circuit) > m(model)) - 1/2| <= margin, over prompts; binomial
        independence       m(model without the circuit) and m(model) are independent; HSIC, permutations of prompts
        minimality         for each edge, P(its effect > that of a random path's edge in the circuit and that path)
                           <= quantile; binomial, times the number of edges
        sufficiency        P(the circuit is closer to the model than a random one of its size) <= quantile; binomial
        partial necessity  P(cutting it changes the model more than cutting a random one does) <= quantile; binomial

    Distances are means over prompts of |differences|. Random circuits have as many edges as the kept one, all of them
    on paths; where no kept edge has a port, they keep and lose q, k and v of a pair together, too.

    Parameters
    ----------
    circuits: how many random circuits, and random paths, are drawn. quantile: how often the circuit must beat them.
    margin: how far from even the model and an equivalent circuit may be. level: below which p-values reject.

    Raises
    ------
    InputError: nothing kept on a path or everything kept, numbers out of range, and as in `faithfulness`.

    >>> import tl_circuitlasso as tcl
    >>> demo = tcl.load_demo(prompts=4)
    >>> found = tests(demo.model, demo.circuit, demo.tokens, demo.corrupted, demo.target, circuits=10)
    >>> list(found.table.index)
    ['equivalence', 'independence', 'minimality', 'sufficiency', 'partial necessity']
    """
    _check(circuits, quantile, margin, level)
    setup = Experiment.of(model, clean, corrupted, metric, ablation, **options).ready(spread=True)
    layout = check_graph(graph, setup.adapter)
    kept = prune(kept_matrix(graph, layout), layout)
    rows = live_rows(graph, layout, kept)
    if torch.equal(kept, prune(layout.mask()[None], layout)):
        raise InputError("`graph` keeps every edge: there is nothing outside of it to compare with; cut it first")
    draw = _Random(layout, seed, merged=not bool((graph.port[graph.kept] != 0).any()))
    size = draw.size(kept)
    random = torch.cat([draw.circuit(size) for _ in _drawing(setup, circuits, "circuit")])
    outside = layout.mask()[None] & ~torch.cat([kept, random])
    alone = _measured(setup, torch.cat([kept, random]))
    cut = _measured(setup, outside)
    scale = abs(float((alone.model - alone.ablated).mean()))
    far, broken = alone.distance(), cut.distance()
    judged = pd.DataFrame(
        [
            _equivalence(alone.values[0], alone.model, margin, level, scale),
            _independence(cut.values[0], alone.model, level, seed),
            _beats("sufficiency", "no closer to the model than random ones", far[1:] > far[0], quantile, level),
            _beats("partial necessity", "no dearer to cut than random ones", broken[1:] < broken[0], quantile, level),
        ]
    ).set_index("test")
    edges, passes = _minimality(setup, graph, layout, kept, rows, draw, circuits, quantile)
    worst = float(edges.p_value.max())
    minimal = pd.DataFrame(
        [
            _row(
                "minimality",
                "some edge matters no more than a random one",
                float(edges.effect.min()),
                worst,
                worst < level,
            )
        ]
    ).set_index("test")
    order = ["equivalence", "independence", "minimality", "sufficiency", "partial necessity"]
    return CircuitTests(
        pd.concat([judged, minimal]).loc[order], edges, alone.forward_passes + cut.forward_passes + passes
    )


def _check(circuits: int, quantile: int | float, margin: int | float, level: int | float) -> None:
    whole_number("circuits", circuits, least=10, what="of random circuits (with fewer nothing can be rejected)")
    for name, value, high in (("quantile", quantile, 1), ("margin", margin, 0.5), ("level", level, 1)):
        if not 0 < value < high:
            raise InputError(f"`{name}` is {value!r}: give a number between 0 and {high}")


def _row(test: str, null: str, statistic: float, p_value: float, passes: bool) -> dict[str, Any]:
    return {"test": test, "null": null, "statistic": statistic, "p_value": p_value, "passes": bool(passes)}


# ---- measuring ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Values:
    model: Float[Tensor, " prompt"]
    ablated: Float[Tensor, " prompt"]
    values: Float[Tensor, "circuit prompt"]
    forward_passes: float

    def distance(self) -> Float[Tensor, " circuit"]:
        return (self.values - self.model).abs().mean(1)


def _measured(setup: Experiment, circuits: EdgeMatrix) -> _Values:
    pieces = circuits.split(TOGETHER)
    names = [f"measure, part {number} of {len(pieces)}" for number in range(1, len(pieces) + 1)]
    parts = [measure(setup, some, name) for some, name in zip(pieces, names)]
    check_scale(parts[0])
    passes = sum(part.forward_passes for part in parts)
    return _Values(parts[0].model, parts[0].ablated, torch.cat([part.circuits for part in parts]), passes)


def _drawing(setup: Experiment, number: int, what: str) -> Iterable[int]:
    """So many draws, counted: on a large model hundreds take a minute."""
    return bar(range(number), progress=setup.progress, desc=f"draw random {what}s", unit=what)


class _Random:
    """Random circuits and paths of a model, all edges of a circuit on a path.

    merged: an edge is a pair of nodes with all its ports. A circuit of such edges mustn't be compared with random ones
    of as many ports, of which hardly any head would have its q, k and v together.
    """

    def __init__(self, layout: EdgeLayout, seed: int, *, merged: bool = False) -> None:
        self.layout, self.generator = layout, torch.Generator().manual_seed(seed)
        self.source, self.column = layout.mask().nonzero(as_tuple=True)
        target = torch.tensor(layout.targets()[0])[self.column]
        self.number = torch.arange(len(target))  # of the edge that each port belongs to
        first_of = self.number
        if merged:
            _, self.number = (self.source * (layout.n_sources + 1) + target).unique(return_inverse=True)
            first_of = torch.zeros(int(self.number.max()) + 1, dtype=torch.long)
            first_of.scatter_(0, self.number, torch.arange(len(target)))
        self.edges = Edges(self.source[first_of], target[first_of], layout.index.ranks)

    def inside(self, circuit: Bool[Tensor, "1 source reader"]) -> Bool[Tensor, " edge"]:
        """Which edges it has, with any port."""
        found = torch.zeros(len(self.edges), dtype=torch.bool)
        found[self.number[circuit[0, self.source, self.column]]] = True
        return found

    def size(self, circuit: Bool[Tensor, "1 source reader"]) -> int:
        """How many edges it has."""
        return int(self.inside(circuit).sum())

    def circuit(self, size: int) -> EdgeMatrix:
        """So many edges, in the order of random scores."""
        order = torch.randperm(len(self.edges), generator=self.generator)
        return self._matrix(first(self.edges, order, size).nonzero().flatten())

    def path(self) -> list[int]:
        """The edges of a random walk back from the logits to the input."""
        node, found = self.layout.n_sources, []
        while node != 0:
            into = (self.edges.target == node).nonzero().flatten()
            edge = int(into[int(torch.randint(len(into), (1,), generator=self.generator))])
            found.append(edge)
            node = int(self.edges.source[edge])
        return found

    def inflated(self, kept: Bool[Tensor, "1 source reader"]) -> Bool[Tensor, "2 source reader"]:
        """The circuit and a random path that isn't all in it; and the same without one of the path's new edges."""
        inside = self.inside(kept)
        while True:
            path = torch.tensor(self.path())
            new = path[~inside[path]]
            if len(new):
                break
        larger = kept | self._matrix(path)
        one = int(new[int(torch.randint(len(new), (1,), generator=self.generator))])
        return torch.cat([larger, larger & ~self._matrix(torch.tensor([one]))])

    def _matrix(self, rows: Tensor) -> EdgeMatrix:
        matrix = torch.zeros(1, self.layout.n_sources, self.layout.n_readers, dtype=torch.bool)
        chosen = torch.isin(self.number, rows)
        matrix[0, self.source[chosen], self.column[chosen]] = True
        return matrix


# ---- the tests ------------------------------------------------------------------------------------------------------


def _equivalence(
    circuit: Float[Tensor, " prompt"],
    model: Float[Tensor, " prompt"],
    margin: int | float,
    level: int | float,
    scale: float,
) -> dict[str, Any]:
    difference = circuit - model
    even = difference.abs() <= _EQUAL * scale
    n = len(model)
    halves = 2 * int(((difference > 0) & ~even).sum()) + int(even.sum())  # a draw is half a win for either
    more = max(halves, 2 * n - halves)
    # The null's likeliest way to such a share is its edge, 1/2 + margin; either side counts. Whole numbers, as a share
    # that is rounded would count one prompt too many or too few.
    chance = binom.sf((more + 1) // 2 - 1, n, 0.5 + margin) + binom.cdf(n - (more + 1) // 2, n, 0.5 + margin)
    away = more / (2 * n) - 0.5
    p_value = min(1.0, float(chance))
    return _row("equivalence", "as good as the model, prompt by prompt", away, p_value, p_value > level)


def _independence(
    complement: Float[Tensor, " prompt"], model: Float[Tensor, " prompt"], level: int | float, seed: int
) -> dict[str, Any]:
    own, other = _centred_kernel(complement.numpy()), _centred_kernel(model.numpy())
    statistic = float((own * other).mean())
    random = np.random.default_rng(seed)
    above = 0
    for _ in range(PERMUTATIONS):
        order = random.permutation(len(own))
        above += float((own[np.ix_(order, order)] * other).mean()) >= statistic * (1 - 1e-9)
    p_value = (1 + above) / (1 + PERMUTATIONS)
    null = "what is left out is independent of the behaviour"
    return _row("independence", null, statistic, p_value, p_value > level)


def _centred_kernel(values: np.ndarray) -> np.ndarray:
    """A Gaussian kernel of the values' median distance, its rows and columns centred."""
    distance = np.abs(values[:, None] - values[None])
    width = np.median(distance[distance > 0]) if (distance > 0).any() else 1.0
    kernel = np.exp(-((distance / width) ** 2) / 2)
    return kernel - kernel.mean(0) - kernel.mean(1, keepdims=True) + kernel.mean()


def _beats(test: str, null: str, wins: Tensor, quantile: int | float, level: int | float) -> dict[str, Any]:
    p_value = float(binom.sf(int(wins.sum()) - 1, len(wins), quantile))
    return _row(test, null, float(wins.double().mean()), p_value, p_value < level)


def _minimality(
    setup: Experiment,
    graph: AttributionGraph,
    layout: EdgeLayout,
    kept: EdgeMatrix,
    rows: list[int],
    draw: _Random,
    circuits: int,
    quantile: int | float,
) -> tuple[pd.DataFrame, float]:
    found = without_each(setup, graph, layout, kept, rows)
    effect = (found.values - found.base).abs().mean(1)
    inflated = _measured(setup, torch.cat([draw.inflated(kept) for _ in _drawing(setup, circuits, "path")]))
    pairs = inflated.values.unflatten(0, (circuits, 2))
    chance = (pairs[:, 0] - pairs[:, 1]).abs().mean(1)
    wins = (effect[:, None] > chance).sum(1).numpy()
    names = graph.index.names
    table = pd.DataFrame(
        {
            "source": [names[int(graph.source[row])] for row in rows],
            "target": [names[int(graph.target[row])] for row in rows],
            "port": [PORTS[int(graph.port[row])] for row in rows],
            "effect": effect.numpy(),
            "p_value": np.minimum(1.0, len(rows) * binom.sf(wins - 1, circuits, quantile)),
        }
    )
    table = table.sort_values("effect", ascending=False, kind="stable", ignore_index=True)
    return table, found.forward_passes + inflated.forward_passes
