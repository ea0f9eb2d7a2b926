"""Does a method find the same circuit again? Agreement of circuits over resamples of the prompts, or over templates.

>>> from tl_circuitlasso.graph.nodes import component_index
>>> index = component_index(n_layers=1, n_heads=1)
>>> a = AttributionGraph.from_edges(index, {("input", "m0"): 1.0, ("m0", "logits"): 1.0})
>>> b = AttributionGraph.from_edges(index, {("input", "m0"): 1.0, ("m0", "logits"): 1.0, ("input", "logits"): 1.0})
>>> round(agreement([a, b]), 3)
0.667
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from scipy.stats import beta
from torch import Tensor

from tl_circuitlasso.data.targets import LogitDiff
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.evaluate.metrics import Metric
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.models import Adapter, adapt
from tl_circuitlasso.models.metric import as_metric
from tl_circuitlasso.models.prompt_forms import AnyPrompts
from tl_circuitlasso.progress import bar

Edge = tuple[str, str]


@dataclass(frozen=True, eq=False)
class Stability:
    """How alike the circuits of resampled prompts are.

    Attributes
    ----------
    jaccard: mean over pairs of resamples of |both| / |either| of their edges, ports merged; the field asks for > .8.
    edges: one row per edge that any resample kept, most frequent first: source, target, `share` of the resamples that
        kept it, `low` and `high` (its exact binomial interval) and `verdict`: "in" where the interval lies above 1/2,
        "out" where it lies below, else "abstain".
    sizes: the number of edges of each circuit.
    """

    jaccard: float
    edges: pd.DataFrame
    sizes: tuple[int, ...]

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
        keeps its meaning on the drawn prompts, and is None for methods that use none.
    k, how: cut every graph to k edges by `graph.top_k(k, how=how)`; None takes the edges that the method keeps.
    confidence: of the intervals behind each edge's verdict. progress: how many resamples are done.

    Raises
    ------
    InputError: fewer than 2 resamples, a confidence outside (0, 1), or what the method raises.

    >>> import tl_circuitlasso as tcl
    >>> demo = tcl.load_demo(prompts=8)
    >>> found = stability(tcl.baselines.eap, demo.model, demo.tokens, demo.corrupted, demo.target, resamples=3, k=6)
    >>> len(found.sizes), list(found.edges.columns)
    (3, ['source', 'target', 'share', 'low', 'high', 'verdict'])
    """
    if not isinstance(resamples, int) or isinstance(resamples, bool) or resamples < 2:
        raise InputError(f"`resamples` is {resamples!r}: how often prompts are drawn again is an integer >= 2")
    if not 0 < confidence < 1:
        raise InputError(f"`confidence` is {confidence!r}: give a share between 0 and 1, such as .95")
    if isinstance(metric, LogitDiff):
        metric = as_metric(metric, model if isinstance(model, Adapter) else adapt(model), len(clean))
    circuits = []
    for drawn in bar(list(_draws(len(clean), resamples, seed)), progress=progress, desc="stability", unit="resample"):
        graph = method(model, _rows(clean, drawn), _rows(corrupted, drawn), _on(metric, drawn), **options)
        circuits.append((graph if k is None else graph.top_k(k, how=how)).kept_edges())
    return Stability(
        jaccard=_mean_jaccard(circuits),
        edges=_verdicts(circuits, confidence),
        sizes=tuple(map(len, circuits)),
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


def _draws(prompts: int, resamples: int, seed: int) -> Iterator[Int[Tensor, " prompt"]]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(resamples):
        yield torch.randint(prompts, (prompts,), generator=generator)


def _rows(prompts: AnyPrompts | None, drawn: Int[Tensor, " prompt"]) -> AnyPrompts | None:
    if prompts is None or isinstance(prompts, Tensor):
        return None if prompts is None else prompts[drawn.to(prompts.device)]
    return [str(prompts[row]) for row in drawn.tolist()]


def _on(metric: Any, drawn: Int[Tensor, " prompt"]) -> Any:
    return None if metric is None else lambda logits, rows: metric(logits, drawn[rows.cpu()])


def _members(circuits: list[set[Edge]]) -> tuple[list[Edge], np.ndarray]:
    edges = sorted(set().union(*circuits))
    return edges, np.array([[edge in circuit for edge in edges] for circuit in circuits], dtype=float)


def _mean_jaccard(circuits: list[set[Edge]]) -> float:
    _, member = _members(circuits)
    both = member @ member.T if member.size else np.zeros((len(circuits),) * 2)
    size = member.sum(1) if member.size else np.zeros(len(circuits))
    either = size[:, None] + size[None] - both
    alike = np.where(either > 0, both / np.maximum(either, 1), 1.0)  # two empty circuits are the same
    return float(alike[np.triu_indices(len(circuits), 1)].mean())


def _verdicts(circuits: list[set[Edge]], confidence: int | float) -> pd.DataFrame:
    edges, member = _members(circuits)
    kept, n, tail = member.sum(0) if member.size else np.zeros(0), len(circuits), (1 - confidence) / 2
    low = np.where(kept > 0, beta.ppf(tail, kept, n - kept + 1), 0.0)
    high = np.where(kept < n, beta.ppf(1 - tail, kept + 1, np.maximum(n - kept, 1)), 1.0)
    verdict = np.where(low > 0.5, "in", np.where(high < 0.5, "out", "abstain"))
    ends = {"source": [source for source, _ in edges], "target": [target for _, target in edges]}
    table = pd.DataFrame({**ends, "share": kept / n, "low": low, "high": high, "verdict": verdict})
    return table.sort_values("share", ascending=False, kind="stable", ignore_index=True)
