"""The attribution graph: what every method of this library returns and every tool of it reads.

An `AttributionGraph` holds a `NodeIndex` and one row per candidate edge: source, target, port (q, k or v where a head's
inputs are told apart), score, weight and whether it's kept. Scores and membership are both kept, so a *circuit* is the
same type with fewer kept edges. Graphs are frozen: every operation returns a new one.

>>> import torch
>>> from tl_circuitlasso.graph.nodes import component_index
>>> index = component_index(n_layers=1, n_heads=1)
>>> graph = AttributionGraph.from_adjacency(index, torch.tensor(
...     [[0, .9, .1, 0], [0, 0, 0, .5], [0, 0, 0, 0], [0, 0, 0, 0]]))
>>> sorted(graph.threshold(.4).kept_edges())
[('a0.h0', 'logits'), ('input', 'a0.h0')]
"""

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from numbers import Real
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_circuitlasso._checks import shortened, whole_number
from tl_circuitlasso._fits import told
from tl_circuitlasso.data.sites import PORTS
from tl_circuitlasso.errors import FormatError, InputError
from tl_circuitlasso.graph import file as graph_file
from tl_circuitlasso.graph import selection
from tl_circuitlasso.graph.nodes import NodeIndex
from tl_circuitlasso.graph.verbs import Verbs

Pair = tuple[str, str]  # source and target
Entry = tuple[str, str, str]  # and the port between

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class AttributionGraph(Verbs):
    """Candidate edges with scores, and which of them make the circuit.

    Attributes
    ----------
    index: the nodes and their order.
    source, target: each edge's ends as positions in `index`; rank[source] < rank[target].
    port: each edge's port as a position in `PORTS` ("", "q", "k", "v").
    score: how much the edge matters for the target, signed where the method gives a sign; fp64.
    weight: the regression coefficient (or the method's raw value) behind the score; fp64.
    kept: whether the edge belongs to the circuit.
    extras: further columns, one value per edge: `stability` (share of resamples that keep it), `effect` (measured) ...
    certificates: one row per regression: target, gap (relative duality gap), iterations, converged.
    node_info: what is known of a node beside its name (label, frequency, contexts), for pictures and `explain`.
    provenance: versions, model, data hash, arguments, seconds and passes; plain data.

    Raises
    ------
    InputError: columns of different lengths, NaN or infinite scores, an edge against the order of computation, or an
        edge given twice.

    >>> from tl_circuitlasso.graph.nodes import component_index
    >>> edges = {("input", "m0"): 1.0, ("m0", "logits"): -0.5, ("input", "a0.h0", "q"): 0.1}
    >>> graph = AttributionGraph.from_edges(component_index(n_layers=1, n_heads=1), edges)
    >>> graph.nodes, graph.n_kept
    (('input', 'a0.h0', 'm0', 'logits'), 3)
    >>> graph.edges[["source", "target", "port", "score"]].values.tolist()
    [['input', 'm0', '', 1.0], ['m0', 'logits', '', -0.5], ['input', 'a0.h0', 'q', 0.1]]
    >>> graph.threshold(0.5).kept_edges() == graph.subgraph(["input", "m0", "logits"]).kept_edges()
    True
    >>> float(graph.adjacency()[0, graph.index.position("m0")]), graph.keep(graph.score > 0).n_kept
    (1.0, 2)
    """

    index: NodeIndex
    source: Int[Tensor, " edge"]
    target: Int[Tensor, " edge"]
    port: Int[Tensor, " edge"]
    score: Float[Tensor, " edge"]
    weight: Float[Tensor, " edge"]
    kept: Bool[Tensor, " edge"]
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    certificates: tuple[Mapping[str, Any], ...] = ()
    node_info: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        columns = {name: getattr(self, name) for name in graph_file.COLUMNS} | dict(self.extras)
        lengths = {name: tuple(column.shape) for name, column in columns.items()}
        if len(set(lengths.values())) > 1:
            raise InputError(f"columns differ in length: {lengths}; give every column one value per edge")
        for name in ("score", "weight"):
            if not bool(columns[name].isfinite().all()):
                raise InputError(f"`{name}` has NaN or infinite values: an edge's {name} must be a finite number")
        self._check_ends()

    def _check_ends(self) -> None:
        ends = torch.stack([self.source, self.target])
        if ends.numel() and not 0 <= int(ends.min()) <= int(ends.max()) < len(self.index):
            raise InputError(f"`source` and `target` must be positions in the index, 0 to {len(self.index) - 1}")
        if self.port.numel() and not 0 <= int(self.port.min()) <= int(self.port.max()) < len(PORTS):
            raise InputError(f"`port` must be a position in {PORTS}")
        backwards = self.index.ranks[self.source] >= self.index.ranks[self.target]
        if bool(backwards.any()):
            edge = int(backwards.nonzero()[0])
            raise InputError(f"edge {self._name(edge)} runs against the order of computation: swap its ends")
        key = (self.source * len(self.index) + self.target) * len(PORTS) + self.port
        if key.unique().numel() != key.numel():
            raise InputError("an edge is given twice: one row per source, target and port")

    def _name(self, edge: int) -> str:
        names, port = self.index.names, PORTS[int(self.port[edge])]
        return f"{names[int(self.source[edge])]}->{names[int(self.target[edge])]}" + (f"<{port}>" if port else "")

    @classmethod
    def from_adjacency(
        cls,
        index: NodeIndex,
        score: Float[Tensor, "source target"],
        *,
        weight: Float[Tensor, "source target"] | None = None,
        candidates: Bool[Tensor, "source target"] | None = None,
        **rest: Any,
    ) -> "AttributionGraph":
        """A graph without ports from a dense matrix; every allowed pair is a candidate, every nonzero one is kept.

        >>> from tl_circuitlasso.graph.nodes import component_index
        >>> index = component_index(n_layers=1, n_heads=1)
        >>> score = torch.zeros(4, 4)
        >>> score[0, 2] = 1.5
        >>> AttributionGraph.from_adjacency(index, score).kept_edges()
        {('input', 'm0')}
        """
        mask = index.allowed() if candidates is None else candidates
        forbidden = (score != 0) & ~mask
        if bool(forbidden.any()):
            s, t = (int(i) for i in forbidden.nonzero()[0])
            raise InputError(f"`score` has a value at {index.names[s]}->{index.names[t]}, which isn't a candidate edge")
        source, target = mask.nonzero(as_tuple=True)
        values = score[source, target].double()
        return cls(
            index=index,
            source=source,
            target=target,
            port=torch.zeros_like(source),
            score=values,
            weight=values if weight is None else weight[source, target].double(),
            kept=values != 0,
            **rest,
        )

    @classmethod
    def from_edges(
        cls,
        index: NodeIndex,
        edges: Mapping[Pair, float] | Mapping[Entry, float] | Mapping[Pair | Entry, float],
        **rest: Any,
    ) -> "AttributionGraph":
        """A graph from `{(source, target): score}` or `{(source, target, port): score}` by name; all edges are kept.

        >>> from tl_circuitlasso.graph.nodes import component_index
        >>> index = component_index(n_layers=1, n_heads=1)
        >>> AttributionGraph.from_edges(index, {("input", "a0.h0", "v"): 1.0}).kept_edges()
        {('input', 'a0.h0')}
        """
        keys = [(*key, "") if len(key) == 2 else key for key in edges]
        bad = [port for *_, port in keys if port not in PORTS]
        if bad:
            raise InputError(f"`edges` has the port {bad[0]!r}: write one of {PORTS}")
        score = torch.tensor(list(edges.values()), dtype=torch.float64)
        return cls(
            index=index,
            source=torch.tensor([index.position(s) for s, _, _ in keys], dtype=torch.long),
            target=torch.tensor([index.position(t) for _, t, _ in keys], dtype=torch.long),
            port=torch.tensor([PORTS.index(p) for _, _, p in keys], dtype=torch.long),
            score=score,
            weight=score.clone(),
            kept=torch.ones(len(keys), dtype=torch.bool),
            **rest,
        )

    # ---- reading ----------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """The number of candidate edges, ports counted apart."""
        return self.score.numel()

    @property
    def n_kept(self) -> int:
        """The number of kept edges, ports merged."""
        return len(self.kept_edges())

    @property
    def nodes(self) -> tuple[str, ...]:
        """The circuit's nodes in the order of computation: those that a kept edge touches."""
        kept = self.kept_nodes()
        return tuple(name for name in self.index.names if name in kept)

    @property
    def edges(self) -> pd.DataFrame:
        """The circuit's edges: the kept rows of `edge_table`, strongest first."""
        table = self.edge_table()
        return table.loc[table.kept, table.columns.drop("kept")].reset_index(drop=True)

    def edge_table(self) -> pd.DataFrame:
        """All candidate edges: source, target, port, weight, score, kept and the extras, largest |score| first.

        >>> import tl_circuitlasso as tcl
        >>> graph = tcl.load_demo(prompts=1).circuit
        >>> graph.edge_table().head(2)[["source", "target", "kept"]].values.tolist()
        [['a2.h0', 'logits', True], ['m0', 'a2.h0', True]]
        """
        order = self.score.abs().argsort(descending=True, stable=True)
        return self._rows().iloc[order.numpy()].reset_index(drop=True)

    def _rows(self, rows: Int[Tensor, " row"] | None = None) -> pd.DataFrame:
        chosen = torch.arange(len(self)) if rows is None else rows
        names = np.array(self.index.names, dtype=object)
        columns = {
            "source": names[self.source[chosen].numpy()],
            "target": names[self.target[chosen].numpy()],
            "port": np.array(PORTS, dtype=object)[self.port[chosen].numpy()],
        }
        numbers = {"weight": self.weight, "score": self.score, "kept": self.kept, **self.extras}
        return pd.DataFrame(columns | {name: column[chosen].numpy() for name, column in numbers.items()})

    def kept_edges(self) -> set[tuple[str, str]]:
        """The circuit's edges as (source, target) names, ports merged.

        >>> import tl_circuitlasso as tcl
        >>> graph = tcl.load_demo(prompts=1).circuit
        >>> sorted(graph.kept_edges())[:2]
        [('a0.h1', 'a1.h2'), ('a1.h2', 'a2.h0')]
        """
        return self._pairs(self.kept)

    def candidate_edges(self) -> set[tuple[str, str]]:
        """Every edge that the method could have returned, ports merged.

        >>> import tl_circuitlasso as tcl
        >>> graph = tcl.load_demo(prompts=1).circuit
        >>> len(graph.candidate_edges())
        117
        """
        return self._pairs(torch.ones_like(self.kept))

    def _pairs(self, mask: Bool[Tensor, " edge"]) -> set[tuple[str, str]]:
        names = self.index.names
        pairs = zip(self.source[mask].tolist(), self.target[mask].tolist())
        return {(names[s], names[t]) for s, t in pairs}

    def kept_nodes(self) -> set[str]:
        """The names of all nodes that a kept edge touches.

        >>> import tl_circuitlasso as tcl
        >>> graph = tcl.load_demo(prompts=1).circuit
        >>> sorted(graph.kept_nodes())
        ['a0.h1', 'a1.h2', 'a2.h0', 'input', 'logits', 'm0']
        """
        return {name for edge in self.kept_edges() for name in edge}

    def pair_scores(self) -> dict[tuple[str, str], float]:
        """Each candidate edge's largest |score| over its ports, by (source, target) name.

        >>> import tl_circuitlasso as tcl
        >>> graph = tcl.load_demo(prompts=1).circuit
        >>> round(graph.pair_scores()["a2.h0", "logits"], 2)
        1.44
        """
        matrix = self.adjacency(absolute=True)
        names = self.index.names
        unique = {(s, t) for s, t in zip(self.source.tolist(), self.target.tolist())}
        return {(names[s], names[t]): float(matrix[s, t]) for s, t in sorted(unique)}

    @told
    def adjacency(
        self, *, port: str | None = None, kept_only: bool = False, absolute: bool = False
    ) -> Float[Tensor, "source target"]:
        """Scores as a dense matrix; ports merge to the entry of largest size unless one `port` is asked for.

        >>> import tl_circuitlasso as tcl
        >>> graph = tcl.load_demo(prompts=1).circuit
        >>> graph.adjacency(kept_only=True).count_nonzero().item()
        6
        """
        if port is not None and port not in PORTS:
            raise InputError(f"`port` {port!r} is not one of {PORTS}")
        rows = self.kept.clone() if kept_only else torch.ones_like(self.kept)
        if port is not None:
            rows &= self.port == PORTS.index(port)
        entry = (self.source * len(self.index) + self.target)[rows]
        score = self.score[rows].abs() if absolute else self.score[rows]
        flat = torch.zeros(len(self.index) ** 2, dtype=torch.float64)
        highest = flat.scatter_reduce(0, entry, score, "amax", include_self=False)
        lowest = flat.scatter_reduce(0, entry, score, "amin", include_self=False)
        return torch.where(highest >= -lowest, highest, lowest).view(len(self.index), len(self.index))

    @cached_property
    def certificate(self) -> pd.DataFrame:
        """Per regression: relative duality gap, iterations and whether it converged; indexed by target."""
        columns = ["target", "gap", "iterations", "converged"]
        return pd.DataFrame(list(self.certificates), columns=columns if not self.certificates else None).set_index(
            "target"
        )

    # ---- new graphs -------------------------------------------------------------------------------------------------

    def keep(self, mask: Any) -> "AttributionGraph":
        """The same candidates with exactly the edges of `mask` kept: one truth value for each candidate.

        Raises
        ------
        InputError: something else.

        >>> import tl_circuitlasso as tcl
        >>> graph = tcl.load_demo(prompts=1).circuit
        >>> graph.keep(graph.score > 1).n_kept
        6
        """
        try:
            chosen = torch.as_tensor(mask) if isinstance(mask, Tensor | np.ndarray | list | tuple) else None
        except (TypeError, ValueError, RuntimeError):
            chosen = None
        if chosen is None or chosen.dtype != torch.bool or chosen.shape != self.kept.shape:
            given = shortened(mask) if chosen is None else f"of {chosen.dtype} and shape {tuple(chosen.shape)}"
            raise InputError(
                f"`mask` is {given}: give one truth value for each of the {len(self)} candidate edges, such as "
                "`graph.score > 0`; to keep edges by name use AttributionGraph.from_edges"
            )
        return replace(self, kept=chosen)

    def threshold(self, x: int | float | np.number) -> "AttributionGraph":
        """Keep the edges with |score| >= x.

        >>> import tl_circuitlasso as tcl
        >>> graph = tcl.load_demo(prompts=1).circuit
        >>> sorted(graph.threshold(1.43).kept_edges())
        [('a2.h0', 'logits'), ('m0', 'a2.h0')]
        """
        if not (isinstance(x, Real) and math.isfinite(x) and x >= 0):
            raise InputError(f"`x` is {shortened(x)}: a threshold is a finite number >= 0 on |score|")
        return self.keep(self.score.abs() >= x)

    @told
    def top_k(self, k: SupportsIndex, *, how: str = "top", ports: bool = False) -> "AttributionGraph":
        """Keep a circuit of k edges by |score|, each of them on a path from a root to a sink (see `prune`).

        how: "top", the strongest edges, weaker ones taken in where a stronger one would be left hanging without them;
        "greedy", grown back from the target, always by the strongest edge into what is already inside; "milp", the
        circuit with the largest sum of |score|, proven optimal by an integer programme (small graphs).

        An edge is a (source, target) pair, as in `kept_edges`; with `ports=True` q, k and v count apart, as in EAP-IG.
        Ties go to the earlier edge. Where no path fits, the circuit stays below k, which is logged as a warning.

        Raises
        ------
        InputError: k isn't a whole number >= 0, an unknown `how`, or "milp" on more than 20,000 edges.
        SolveError: the integer programme ran out of time.

        >>> import tl_circuitlasso as tcl
        >>> graph = tcl.load_demo(prompts=1).circuit
        >>> graph.top_k(4).n_kept
        4
        """
        k = whole_number("k", k, least=0, what="of edges to keep")
        edges = self._edges
        chosen = self.keep(selection.choose(edges, self.score.abs(), k, how, None if ports else edges.pairs))
        found = int(chosen.kept.sum()) if ports else chosen.n_kept
        if found < min(k, len(self) if ports else edges.pairs.unique().numel()):
            _log.warning("top_k(%d, how=%r): %d edges, since no more of them make whole paths", k, how, found)
        return chosen

    def prune(self) -> "AttributionGraph":
        """Drop kept edges that aren't on a kept path from a root to a sink.

        Roots are nodes that no candidate edge feeds (`input`), sinks nodes that feed no candidate edge (`logits`).

        >>> import tl_circuitlasso as tcl
        >>> graph = tcl.load_demo(prompts=1).circuit
        >>> graph.threshold(1.43).prune().n_kept  # nothing is left that reaches from the input to the logits
        0
        """
        return self.keep(selection.on_path(self._edges, self.kept))

    @cached_property
    def _edges(self) -> selection.Edges:
        return selection.Edges(self.source, self.target, self.index.ranks)

    def subgraph(self, nodes: Iterable[str]) -> "AttributionGraph":
        """Keep only edges whose two ends are among `nodes`; the candidates stay.

        Raises
        ------
        InputError: one name instead of several, or a name that the graph doesn't have.

        >>> import tl_circuitlasso as tcl
        >>> graph = tcl.load_demo(prompts=1).circuit
        >>> graph.subgraph(["a2.h0", "logits"]).kept_edges()
        {('a2.h0', 'logits')}
        """
        if isinstance(nodes, str) or not isinstance(nodes, Iterable):
            raise InputError(f"`nodes` is {shortened(nodes)}: give a list of names, such as ['input', 'm0']")
        inside = torch.zeros(len(self.index), dtype=torch.bool)
        inside[[self.index.position(name) for name in nodes]] = True
        return self.keep(self.kept & inside[self.source] & inside[self.target])

    # ---- files ------------------------------------------------------------------------------------------------------

    @told
    def save(self, path: str | Path) -> None:
        """Write the whole graph without loss: `.safetensors` or `.json` by the suffix, else a folder with both.

        Raises
        ------
        InputError: the path can't be written to. Nothing is left half-written.

        >>> import tempfile
        >>> import tl_circuitlasso as tcl
        >>> graph = tcl.load_demo(prompts=1).circuit
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     graph.save(Path(folder) / "circuit")
        ...     files = sorted(path.name for path in (Path(folder) / "circuit").iterdir())
        >>> files
        ['graph.json', 'graph.safetensors']
        """
        columns = {name: getattr(self, name) for name in graph_file.COLUMNS}
        header = {
            "index": self.index.to_json(),
            "certificates": [dict(row) for row in self.certificates],
            "node_info": {name: dict(info) for name, info in self.node_info.items()},
            "provenance": dict(self.provenance),
        }
        graph_file.write(Path(path), graph_file.Parts(columns, self.extras, header), self._rows)

    @classmethod
    def load(cls, path: str | Path) -> "AttributionGraph":
        """Read what `save` wrote; runs no code from the file.

        Raises
        ------
        FormatError: missing, truncated, foreign or inconsistent; the message names the file and the fault.

        >>> import tempfile
        >>> import tl_circuitlasso as tcl
        >>> graph = tcl.load_demo(prompts=1).circuit
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     graph.save(Path(folder) / "circuit.safetensors")
        ...     again = AttributionGraph.load(Path(folder) / "circuit.safetensors")
        >>> again.kept_edges() == graph.kept_edges()
        True
        """
        parts = graph_file.read(Path(path))
        try:
            return cls(
                index=NodeIndex.from_json(parts.header["index"]),
                certificates=tuple(parts.header["certificates"]),
                node_info=parts.header["node_info"],
                provenance=parts.header["provenance"],
                extras=parts.extras,
                **parts.columns,
            )
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise FormatError(f"{path}: a graph with missing or wrong entries ({error})") from error

    # ---- showing ----------------------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        shown = self._strongest(8)
        lines = [f"AttributionGraph: {self._counts()}"]
        lines += [
            f"  {source} -> {target}{f' <{port}>' if port else ''}  {score:.4g}"
            for source, target, port, score in zip(shown.source, shown.target, shown.port, shown.score)
        ]
        rest = int(self.kept.sum()) - len(shown)
        apart = ", those into q, k and v apart" if int(self.kept.sum()) > self.n_kept else ""
        return "\n".join(lines + ([f"  ... {rest} more{apart}: graph.edge_table()"] if rest > 0 else []))

    def _strongest(self, count: int) -> pd.DataFrame:
        kept = self.kept.nonzero().flatten()
        top = kept[self.score[kept].abs().argsort(descending=True, stable=True)[:count]]
        return self._rows(top)

    def _counts(self) -> str:
        pair = self.source * len(self.index) + self.target
        kept, candidates = pair[self.kept].unique().numel(), pair.unique().numel()
        return f"{len(self.index)} nodes, {kept} of {candidates} edges kept"
