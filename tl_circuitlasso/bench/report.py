"""From scores per case to one table: thresholds, means with intervals, tests between methods."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tl_circuitlasso.bench.calibration import STABLE, calibration, share_of_stable
from tl_circuitlasso.bench.cases import Case
from tl_circuitlasso.data import storage
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.evaluate.structure import Interval, PairedTest, Structure, bootstrap, paired_test
from tl_circuitlasso.graph import AttributionGraph

EMPTY = "(empty graph)"
PAPER = {  # arXiv 2606.16939: mean SHD and seconds over 17 published models, on one A100
    "EAP": (3.61, 33.7),
    "EAP-IG": (2.98, 49.1),
    "CircuitLasso": (3.16, 16.3),
    "CircuitLasso, nonlinear": (2.84, 60.0),
}


@dataclass(frozen=True, eq=False)
class Curve:
    """SHD of edges and nodes as the threshold on the relative score falls: entry k belongs to the k largest scores.

    Thresholds are relative to the case's largest score, so that one number can serve all cases.
    """

    thresholds: np.ndarray  # descending, all > 0; entry 0, infinity, keeps nothing
    shd: np.ndarray
    node_shd: np.ndarray

    @classmethod
    def of(cls, graph: AttributionGraph, case: Case) -> "Curve":
        """The curve of a graph's |scores| over the candidates of a case."""
        scores = graph.pair_scores()
        ranked = sorted(((scores.get(edge, 0.0), edge) for edge in case.candidates), reverse=True)
        ranked = [(score, edge) for score, edge in ranked if score > 0]
        thresholds, shd, node_shd = [math.inf], [len(case.truth)], [len(case.true_nodes)]
        found: set[tuple[str, str]] = set()
        for place, (score, edge) in enumerate(ranked):
            found.add(edge)
            if place + 1 < len(ranked) and ranked[place + 1][0] == score:
                continue  # ties enter together
            thresholds.append(score / ranked[0][0])
            shd.append(len(found ^ case.truth))
            node_shd.append(len({node for pair in found for node in pair} ^ case.true_nodes))
        return cls(np.array(thresholds), np.array(shd), np.array(node_shd))

    def at(self, threshold: float, what: str = "shd") -> int:
        """The SHD with all relative scores >= `threshold` kept."""
        kept = np.searchsorted(-self.thresholds, -threshold, side="right") - 1
        return int(getattr(self, what)[kept])


def best_threshold(curves: Sequence[Curve], what: str = "shd") -> float:
    """The one relative threshold with the smallest mean SHD over cases; of equally good ones the middle one."""
    every = np.unique(np.concatenate([curve.thresholds for curve in curves]))
    means = np.array([np.mean([curve.at(t, what) for curve in curves]) for t in every])
    good = every[means <= means.min() + 1e-9]
    return float(good[len(good) // 2])


@dataclass(frozen=True, eq=False)
class Row:
    """One method on one case."""

    case: str
    method: str
    seed: int
    certified: bool
    chooses: bool
    structure: Structure
    curve: Curve
    port_auroc: float
    seconds: float
    peak_mib: float | None
    forward_passes: float
    backward_passes: float
    kept: tuple[tuple[str, str], ...]
    stability: tuple[tuple[float, bool], ...] = ()  # of every candidate edge, with whether it's true


@dataclass(frozen=True)
class Failure:
    """A case, or a method on a case, that gave no result, and why."""

    case: str
    method: str
    reason: str


@dataclass(frozen=True, eq=False)
class Report:
    """Every method on every case, with one seed or more.

    `print(report)` shows the table; `summary` and `cases` are data frames.
    """

    rows: tuple[Row, ...]
    failures: tuple[Failure, ...]
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def methods(self) -> list[str]:
        """The methods with at least one result, in the order in which they ran."""
        return list(dict.fromkeys(row.method for row in self.rows))

    def of(self, method: str, *, certified: bool = False) -> list[Row]:
        """The rows of a method, on all cases or on those whose edges are certified.

        Raises
        ------
        InputError: the method has no results.
        """
        rows = [row for row in self.rows if row.method == method and (row.certified or not certified)]
        if not rows:
            cases = "edge-certified cases" if certified else "cases"
            raise InputError(f"`method` {method!r} has no results on {cases}; there are {', '.join(self.methods)}")
        return rows

    @cached_property
    def thresholds(self) -> dict[str, dict[str, float]]:
        """Each method's best relative thresholds: "shd" over the certified cases, "node_shd" over all."""
        return {method: self._thresholds(method) for method in self.methods}

    def _thresholds(self, method: str) -> dict[str, float]:
        rows = self.of(method)
        certified = [row.curve for row in rows if row.certified] or [row.curve for row in rows]
        return {"shd": best_threshold(certified), "node_shd": best_threshold([r.curve for r in rows], "node_shd")}

    @cached_property
    def cases(self) -> pd.DataFrame:
        """One line per method, case and seed."""
        return pd.DataFrame([self._line(row) for row in self.rows])

    def _line(self, row: Row) -> dict[str, Any]:
        best, found = self.thresholds[row.method], row.structure
        return {
            "case": row.case,
            "method": row.method,
            "seed": row.seed,
            "certified": row.certified,
            "empty_shd": found.empty_shd,
            "shd_default": found.shd if row.chooses else math.nan,
            "shd_global": row.curve.at(best["shd"]),
            "shd_oracle": int(row.curve.shd.min()),
            "auroc": found.auroc,
            "auprc": found.auprc,
            "port_auroc": row.port_auroc,
            "empty_node_shd": found.empty_node_shd,
            "node_shd_default": found.node_shd if row.chooses else math.nan,
            "node_shd_global": row.curve.at(best["node_shd"], "node_shd"),
            "node_auroc": found.node_auroc,
            "seconds": row.seconds,
            "forward_passes": row.forward_passes,
            "backward_passes": row.backward_passes,
            "peak_mib": math.nan if row.peak_mib is None else row.peak_mib,
            "kept": [list(edge) for edge in row.kept],
        }

    @cached_property
    def summary(self) -> pd.DataFrame:
        """Means per method: edge figures over certified cases, node figures and costs over all cases and seeds."""
        lines = [self._empty_line(), *(self._mean_line(method) for method in self.methods)]
        return pd.DataFrame(lines).set_index("method")

    def _empty_line(self) -> dict[str, Any]:
        once = self.cases.drop_duplicates("case")
        shd = once[once.certified].empty_shd.mean()
        node = once.empty_node_shd.mean()
        return {"method": EMPTY} | dict.fromkeys(_SHD, shd) | dict.fromkeys(_NODE_SHD, node)

    def _mean_line(self, method: str) -> dict[str, Any]:
        mine = self.cases[self.cases.method == method]
        edges = mine[mine.certified]
        return (
            {"method": method, "cases": len(set(mine["case"])), "certified": len(set(edges["case"]))}
            | {name: edges[name].mean() for name in (*_SHD, "auroc", "auprc", "port_auroc")}
            | {name: mine[name].mean() for name in (*_NODE_SHD, "node_auroc", *_COST)}
        )

    def interval(self, method: str, figure: str, *, certified: bool = True) -> Interval:
        """The mean of a column of `cases` for a method, with its bootstrap interval over cases; NaN is left out.

        A case's seeds count as one: their mean.

        Raises
        ------
        InputError: no such figure, or no values of it.
        """
        return bootstrap(self._values(method, figure, certified).tolist())

    def _values(self, method: str, figure: str, certified: bool) -> pd.Series:
        if figure not in self.cases:
            raise InputError(f"`figure` {figure!r} is not a column: {', '.join(self.cases.columns)}")
        lines = self.cases[(self.cases.method == method) & (self.cases.certified | (not certified))]
        return lines.astype({figure: float}).groupby("case", sort=False)[figure].mean().dropna()

    def test(self, first: tuple[str, str], second: tuple[str, str], *, certified: bool = True) -> PairedTest:
        """Paired test of (method, figure) against (method, figure) on the cases that both have."""
        a, b = self._values(*first, certified), self._values(*second, certified)
        both = [case for case in a.index if case in b.index]
        return paired_test(a[both].tolist(), b[both].tolist())

    def calibration(self, method: str) -> pd.DataFrame:
        """The share of true edges by stability, over the certified cases; without lines where there is none."""
        return calibration(self._stabilities(method))

    def _stabilities(self, method: str) -> list[tuple[float, bool]]:
        return [pair for row in self.rows if row.method == method and row.certified for pair in row.stability]

    def save(self, path: Path | str) -> None:
        """Write settings, summary, every case's figures and the failures as JSON."""
        data = {
            "settings": self.settings,
            "summary": _plain(self.summary.reset_index()) if self.rows else [],
            "thresholds": {m: {k: _number(v) for k, v in t.items()} for m, t in self.thresholds.items()},
            "cases": _plain(self.cases) if self.rows else [],
            "calibration": {m: _plain(self.calibration(m)) for m in self.methods if self._stabilities(m)},
            "failures": [asdict(failure) for failure in self.failures],
        }
        storage.write_text(Path(path), json.dumps(data, indent=1, allow_nan=False))

    def __str__(self) -> str:
        parts = ["no results"]
        if self.rows:
            parts = [*self._tables(), *self._tests(), *self._seeds(), *self._calibrated(), *self._paper()]
        parts += [f"failed: {f.case}, {f.method or 'loading'}: {f.reason}" for f in self.failures]
        return "\n".join(parts)

    def _tables(self) -> list[str]:
        certified = self.cases[self.cases.certified].case.nunique()
        lines = [self._printed(method) for method in (EMPTY, *self.methods)]
        return [
            f"{self.cases.case.nunique()} cases, {certified} of them with certified edges; means over cases "
            "[95 % bootstrap interval]. Edge figures over certified cases, node figures and costs over all. "
            "default: the method's own choice of edges; global: one threshold, the best for that method; oracle: the "
            "best for each case.",
            pd.DataFrame(lines).fillna("-").to_string(index=False),
        ]

    def _printed(self, method: str) -> dict[str, str]:
        means = self.summary.loc[method]
        line = {"method": method}
        for title, figure, certified in _COLUMNS:
            value = means.get(figure, math.nan)
            shown = _shown(value, figure)
            if method != EMPTY and figure in (*_SHD, *_NODE_SHD) and not math.isnan(value):
                low_high = self.interval(method, figure, certified=certified)
                shown += f" [{low_high.low:.2f} {low_high.high:.2f}]"
            line[title] = shown
        return line

    def _tests(self) -> list[str]:
        ours = [m for m in self.methods if not self._values(m, "shd_default", True).empty]
        others = [m for m in self.methods if m not in ours and not self._values(m, "shd_global", True).empty]
        return [self._tested(mine, other) for mine in ours for other in others]

    def _tested(self, mine: str, other: str) -> str:
        found = self.test((mine, "shd_default"), (other, "shd_global"))
        return (
            f"SHD, {mine} (default) - {other} (global): {found.difference:+.2f} [{found.low:+.2f} {found.high:+.2f}], "
            f"p = {found.p_value:.3g}"
        )

    def _seeds(self) -> list[str]:
        """How far the seeds of a method that chooses are apart."""
        lines = []
        for method, mine in self.cases.dropna(subset="shd_default").groupby("method", sort=False):
            edges = mine[mine.certified]
            by_seed = edges.groupby("seed").shd_default.mean()
            if len(by_seed) < 2 or edges.empty:
                continue
            spread = edges.groupby("case").shd_default.agg(["min", "max"])
            apart = [f"{case} {low:.0f} to {high:.0f}" for case, low, high in spread.itertuples() if low != high]
            lines.append(
                f"{method}: mean SHD of each of {len(by_seed)} seeds {by_seed.min():.2f} to {by_seed.max():.2f}; "
                f"cases whose seeds differ: {', '.join(apart) or 'none'}"
            )
        return lines

    def _calibrated(self) -> list[str]:
        lines = []
        for method in self.methods:
            count, share = share_of_stable(self._stabilities(method))
            if count:
                lines.append(
                    f"{method}: of {count} edges with stability >= {STABLE}, {share:.1%} are true; by stability:"
                )
                lines.append(self.calibration(method).to_string(index=False))
        return lines

    def _paper(self) -> list[str]:
        """The paper's figures beside ours, where the truth is the paper's."""
        if self.settings.get("truth") != "gt" and not self.settings.get("published"):
            return []
        once = self.cases.drop_duplicates("case")
        lines = [self._beside(EMPTY, (once.empty_shd.mean(), math.nan, math.nan))]
        for method in self.methods:
            figures = [self._values(method, name, False) for name in ("shd_default", "shd_global", "seconds")]
            lines.append(self._beside(method, [values.mean() if len(values) else math.nan for values in figures]))
        lines += [self._beside(f"{method} (paper)", (math.nan, *figures)) for method, figures in PAPER.items()]
        models = "the published weights; the paper took 16 of them and IOI"
        if not self.settings.get("published"):
            models = "not the published weights but others, so the figures can't be compared one to one"
        return [
            "On the paper's terms (arXiv 2606.16939), mean SHD against circuits-benchmark's own circuits, all "
            f"{len(once)} cases, and seconds a case; the paper's thresholds aren't published, its seconds are of an "
            f"A100. The models here are {models}.",
            pd.DataFrame(lines).to_string(index=False),
        ]

    @staticmethod
    def _beside(method: str, figures: Sequence[float]) -> dict[str, str]:
        """A line of the table that has the paper's figures in it."""
        titles = ("SHD default", "SHD best threshold", "seconds")
        return {"method": method} | {title: _shown(value, "shd") for title, value in zip(titles, figures)}


_SHD = ("shd_default", "shd_global", "shd_oracle")
_NODE_SHD = ("node_shd_default", "node_shd_global")
_COST = ("seconds", "forward_passes", "backward_passes", "peak_mib")
_COLUMNS = (
    ("SHD default", "shd_default", True),
    ("SHD global", "shd_global", True),
    ("oracle", "shd_oracle", True),
    ("AUROC", "auroc", True),
    ("AUPRC", "auprc", True),
    ("ports", "port_auroc", True),
    ("node SHD default", "node_shd_default", False),
    ("node global", "node_shd_global", False),
    ("seconds", "seconds", False),
    ("forward", "forward_passes", False),
    ("backward", "backward_passes", False),
    ("MiB", "peak_mib", False),
)


def _shown(value: float, figure: str) -> str:
    if math.isnan(value):
        return "-"
    digits = 4 if "auroc" in figure or figure == "auprc" else 0 if figure == "peak_mib" else 2
    return f"{value:.{digits}f}"


def _number(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value.item() if isinstance(value, np.generic) else value


def _plain(frame: pd.DataFrame) -> list[dict[str, Any]]:
    return [{name: _number(value) for name, value in row.items()} for row in frame.to_dict(orient="records")]
