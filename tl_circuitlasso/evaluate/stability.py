"""Does a method find the same circuit again? Agreement over resamples of the prompts, and over ways to word them.

>>> from tl_circuitlasso.graph.nodes import component_index
>>> index = component_index(n_layers=1, n_heads=1)
>>> a = AttributionGraph.from_edges(index, {("input", "m0"): 1.0, ("m0", "logits"): 1.0})
>>> b = AttributionGraph.from_edges(index, {("input", "m0"): 1.0, ("m0", "logits"): 1.0, ("input", "logits"): 1.0})
>>> round(agreement([a, b]), 3)
0.667
"""

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from scipy.stats import beta
from torch import Tensor

from tl_circuitlasso._checks import as_seed, fraction, warn, whole_number
from tl_circuitlasso.data.targets import LogitDiff
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.evaluate.metrics import Metric
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.models.prompt_forms import AnyPrompts
from tl_circuitlasso.progress import bar

Edge = tuple[str, str]


@dataclass(frozen=True, eq=False)
class Stability:
    """How alike the circuits of resampled prompts are.

    Attributes
    ----------
    jaccard: mean over pairs of resamples of |both| / |either| of their edges, ports merged; the field asks for > .8.
        Pairs of empty circuits don't count; NaN, with a warning, where all are empty.
    edges: one row per edge that any resample kept, most frequent first: source, target, `share` of the resamples that
        kept it, `low` and `high` (its exact binomial interval) and `verdict`: "in" where the interval lies above 1/2,
        "out" where it lies below, else "abstain". That is about the method; `calibrate` says it about the truth.
    sizes: the number of edges of each circuit.
    candidates: every edge that the method could have kept.
    """

    jaccard: float
    edges: pd.DataFrame
    sizes: tuple[int, ...]
    candidates: frozenset[Edge]

    @property
    def shares(self) -> dict[Edge, float]:
        """The share of resamples that kept it, for every candidate edge."""
        kept = zip(zip(self.edges["source"], self.edges["target"]), self.edges["share"])
        return dict.fromkeys(sorted(self.candidates), 0.0) | dict(kept)

    def __repr__(self) -> str:
        return f"Stability(jaccard {self.jaccard:.3f} over {len(self.sizes)} resamples)"


def stability(
    method: Callable[..., AttributionGraph],
    model: Any,
    clean: AnyPrompts,
    corrupted: AnyPrompts | None,
    metric: Metric | LogitDiff | None,
    *,
    resamples: int = 100,
    k: int | None = None,
    how: str = "top",
    confidence: int | float = 0.95,
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> Stability:
    """The circuits that a method finds on prompts drawn again with replacement, and how far they agree.

    Parameters
    ----------
    method: called as `method(model, clean, corrupted, metric, **options)`, as all of `baselines.METHODS` are; `metric`
        keeps its meaning on the drawn prompts (a `LogitDiff` stays one, with their answers), and is None for methods
        that use none.
    k, how: cut every graph to k edges by `graph.top_k(k, how=how)`; None takes the edges that the method keeps.
    confidence: of the intervals behind each edge's verdict. progress: how many resamples are done.

    >>> import tl_circuitlasso as tcl
    >>> demo = tcl.load_demo(prompts=12)
    >>> answers = tcl.LogitDiff(demo.correct, demo.incorrect)
    >>> found = stability(tcl.baselines.eap, demo.model, demo.tokens, demo.corrupted, answers, resamples=4, k=6)
    >>> len(found.sizes), found.jaccard > 0.5
    (4, True)

    Raises
    ------
    InputError: fewer than 2 resamples, a confidence outside (0, 1), or what the method raises.
    """
    resamples = whole_number("resamples", resamples, least=2, what="of times that prompts are drawn again")
    fraction("confidence", confidence, "such as .95", whole=False)
    find = _Finding(method, model, clean, corrupted, metric, k, how, options)
    draws = list(_draws(len(clean), resamples, as_seed(seed)))
    circuits, candidates = find.all(bar(draws, progress=progress, desc="stability", unit="resample"))
    return Stability(
        jaccard=_mean_jaccard(circuits),
        edges=_verdicts(circuits, confidence),
        sizes=tuple(map(len, circuits)),
        candidates=candidates,
    )


@dataclass(frozen=True, eq=False)
class Wording:
    """How far circuits depend on the way that prompts are worded.

    Attributes
    ----------
    jaccard: mean over pairs of wordings of |both| / |either| of their circuits' edges, ports merged.
    shuffled: the same where the prompts are dealt to groups of the same sizes at random: what so many prompts agree on
        whatever the wording. Where `jaccard` is lower, the wording matters.
    edges: one row per edge that any wording's circuit has: source, target, and a column of bools per wording.
    sizes: the number of edges of each wording's circuit.
    """

    jaccard: float
    shuffled: float
    edges: pd.DataFrame
    sizes: Mapping[str, int]

    def __repr__(self) -> str:
        return f"Wording(jaccard {self.jaccard:.3f}, shuffled {self.shuffled:.3f}, {len(self.sizes)} wordings)"


def wording(
    method: Callable[..., AttributionGraph],
    model: Any,
    clean: AnyPrompts,
    corrupted: AnyPrompts | None,
    metric: Metric | LogitDiff | None,
    groups: Sequence[Hashable],
    *,
    shuffles: int = 3,
    k: int | None = None,
    how: str = "top",
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> Wording:
    """The circuits that a method finds on each way of wording a task alone, and how far they agree.

    Parameters
    ----------
    groups: which wording (template) each prompt has; prompts of one wording are used together.
    shuffles: how often prompts are dealt out at random for comparison. Others as in `stability`.

    Raises
    ------
    InputError: another number of groups than of prompts, only one wording, or what the method raises.

    >>> import tl_circuitlasso as tcl
    >>> demo = tcl.load_demo(prompts=8)
    >>> groups = [prompt.split()[0] for prompt in demo.prompts]  # After, When, While
    >>> data = (demo.model, demo.tokens, demo.corrupted, demo.target)
    >>> 0 <= wording(tcl.baselines.eap, *data, groups, shuffles=1, k=6).jaccard <= 1
    True
    """
    shuffles = whole_number("shuffles", shuffles, least=1, what="of times that prompts are dealt out at random")
    if len(groups) != len(clean):
        raise InputError(f"`groups` has {len(groups)} entries for {len(clean)} prompts: name the wording of each")
    names = list(dict.fromkeys(map(str, groups)))
    if len(names) < 2:
        raise InputError(f"`groups` has one wording ({', '.join(names)}): agreement is between two or more")
    number = torch.tensor([names.index(str(group)) for group in groups])
    generator = torch.Generator().manual_seed(seed)
    deals = [number, *(number[torch.randperm(len(number), generator=generator)] for _ in range(shuffles))]
    rows = [(deal == one).nonzero().flatten() for deal in deals for one in range(len(names))]
    find = _Finding(method, model, clean, corrupted, metric, k, how, options)
    circuits = find.all(bar(rows, progress=progress, desc="stability", unit="group"))[0]
    dealt = [circuits[start : start + len(names)] for start in range(0, len(circuits), len(names))]
    return Wording(
        jaccard=_mean_jaccard(dealt[0]),
        shuffled=float(np.mean([_mean_jaccard(some) for some in dealt[1:]])),
        edges=_by_wording(names, dealt[0]),
        sizes=dict(zip(names, map(len, dealt[0]))),
    )


def agreement(graphs: Mapping[str, AttributionGraph] | Iterable[AttributionGraph]) -> float:
    """Mean over pairs of graphs of |both| / |either| of their kept edges: such as of one task in several wordings.

    Raises
    ------
    InputError: fewer than two graphs.

    >>> import tl_circuitlasso as tcl
    >>> demo = tcl.load_demo(prompts=1)
    >>> agreement([demo.circuit, demo.circuit])
    1.0
    """
    some = list(graphs.values() if isinstance(graphs, Mapping) else graphs)
    if len(some) < 2:
        raise InputError(f"`graphs` has {len(some)}: agreement is between two or more")
    return _mean_jaccard([graph.kept_edges() for graph in some])


@dataclass(frozen=True, eq=False)
class _Finding:
    """A method with all that it's given but for which prompts.

    Raises
    ------
    InputError: no prompts, or another number of partners.
    """

    method: Callable[..., AttributionGraph]
    model: Any
    clean: AnyPrompts
    corrupted: AnyPrompts | None
    metric: Any
    k: int | None
    how: str
    options: Mapping[str, Any]

    def __post_init__(self) -> None:
        if not len(self.clean):
            raise InputError("`clean` is empty: give the prompts that are to be drawn from")
        if self.corrupted is not None and len(self.corrupted) != len(self.clean):
            raise InputError(
                f"`corrupted` has {len(self.corrupted)} prompts and `clean` {len(self.clean)}: give a partner for each"
            )

    def all(self, rows: Iterable[Int[Tensor, " prompt"]]) -> tuple[list[set[Edge]], frozenset[Edge]]:
        """The circuit of each set of prompts, and every edge that could be in one."""
        circuits, candidates = [], frozenset()
        for some in rows:
            prompts = (_rows(prompts, some) for prompts in (self.clean, self.corrupted))
            graph = self.method(self.model, *prompts, _on(self.metric, some), **self.options)
            circuits.append((graph if self.k is None else graph.top_k(self.k, how=self.how)).kept_edges())
            candidates |= graph.candidate_edges()
        return circuits, candidates


def _draws(prompts: int, resamples: int, seed: int) -> Iterator[Int[Tensor, " prompt"]]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(resamples):
        yield torch.randint(prompts, (prompts,), generator=generator)


def _rows(prompts: AnyPrompts | None, drawn: Int[Tensor, " prompt"]) -> AnyPrompts | None:
    if prompts is None or isinstance(prompts, Tensor):
        return None if prompts is None else prompts[drawn.to(prompts.device)]
    return [str(prompts[row]) for row in drawn.tolist()]


def _on(metric: Any, drawn: Int[Tensor, " prompt"]) -> Any:
    if isinstance(metric, LogitDiff):
        return metric.take(drawn)
    return None if metric is None else lambda logits, rows: metric(logits, drawn[rows.cpu()])


def _members(circuits: list[set[Edge]]) -> tuple[list[Edge], np.ndarray]:
    edges = sorted(set().union(*circuits))
    return edges, np.array([[edge in circuit for edge in edges] for circuit in circuits], dtype=float)


def _mean_jaccard(circuits: list[set[Edge]]) -> float:
    _, member = _members(circuits)
    both = member @ member.T if member.size else np.zeros((len(circuits),) * 2)
    size = member.sum(1) if member.size else np.zeros(len(circuits))
    either = size[:, None] + size[None] - both
    pairs = np.triu_indices(len(circuits), 1)
    some = either[pairs] > 0  # two empty circuits say nothing of how steady a method is
    if not some.any():
        warn("every circuit is empty, so there is no agreement to speak of: it's NaN")
        return math.nan
    return float((both[pairs][some] / either[pairs][some]).mean())


def _by_wording(names: list[str], circuits: list[set[Edge]]) -> pd.DataFrame:
    edges, member = _members(circuits)
    ends = {"source": [source for source, _ in edges], "target": [target for _, target in edges]}
    inside = member.astype(bool).reshape(len(circuits), len(edges))
    return pd.DataFrame({**ends, **{name: inside[row] for row, name in enumerate(names)}})


def _verdicts(circuits: list[set[Edge]], confidence: int | float) -> pd.DataFrame:
    edges, member = _members(circuits)
    kept, n, tail = member.sum(0) if member.size else np.zeros(0), len(circuits), (1 - confidence) / 2
    low = np.where(kept > 0, beta.ppf(tail, kept, n - kept + 1), 0.0)
    high = np.where(kept < n, beta.ppf(1 - tail, kept + 1, np.maximum(n - kept, 1)), 1.0)
    verdict = np.where(low > 0.5, "in", np.where(high < 0.5, "out", "abstain"))
    ends = {"source": [source for source, _ in edges], "target": [target for _, target in edges]}
    table = pd.DataFrame({**ends, "share": kept / n, "low": low, "high": high, "verdict": verdict})
    return table.sort_values("share", ascending=False, kind="stable", ignore_index=True)
