"""What was measured, as Markdown tables, as one JSON file, and as a figure."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.real import measure
from benchmarks.real.measure import Agreement, Circuit, Spent, Stability
from benchmarks.real.tasks import Task
from tl_circuitlasso import plot
from tl_circuitlasso.evaluate.curves import Curve
from tl_circuitlasso.plot.style import new_figure

PANEL = (6.8, 5.2)  # inches


@dataclass(frozen=True, eq=False)
class Result:
    """All figures of one task; curves by ablation, ranking and method, the rest by method."""

    task: Task
    judged: Task
    curves: Mapping[str, Mapping[str, Mapping[str, Curve]]]
    circuits: Mapping[str, Circuit]
    stability: Mapping[str, Stability]
    spent: Mapping[str, Spent]
    left_out: Mapping[str, str]


def markdown(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table whose numbers are rounded as they come.

    >>> print(markdown(["a", "b"], [["x", 0.12345], ["y", 3]]))
    | a | b |
    |---|---|
    | x | .123 |
    | y | 3 |
    """
    lines = [header, ["---"] * len(header), *([_cell(value) for value in row] for row in rows)]
    made = [f"| {' | '.join(line)} |" for line in lines]
    made[1] = made[1].replace(" ", "")
    return "\n".join(made)


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    text = f"{value:.3f}" if abs(value) < 100 else f"{value:.0f}"
    return text.replace("0.", ".", 1) if text.lstrip("-").startswith("0.") else text


# ---- tables ---------------------------------------------------------------------------------------------------------


def tables(result: Result) -> str:
    """Everything of one task, headings between."""
    parts = [
        f"## {result.task.name}",
        _about(result),
        "### Faithfulness at shares of the edges; CPR (more is better) never without CMD (less is better)",
        curve_table(result),
        *_section("### Circuits: chosen by the method, or as many of its strongest edges", circuit_table(result)),
        *_section("### Jaccard of circuits over half-samples of the prompts", stability_table(result)),
        "### Cost",
        cost_table(result),
        *(f"{name} is left out: {reason}" for name, reason in result.left_out.items()),
    ]
    return "\n\n".join(parts)


def _section(heading: str, table: str) -> list[str]:
    return [heading, table] if table else []


def _about(result: Result) -> str:
    task, judged = result.task, result.judged
    text = f"{_prompts(task)}; {task.note}; metric: {_metric(task)}."
    return text if judged is task else f"{text} Judged on {_prompts(judged)}; {judged.note}."


def _prompts(task: Task) -> str:
    return f"{len(task)} prompts of {task.clean.shape[1]} tokens, all that the model gets right of {task.looked_at}"


def _metric(task: Task) -> str:
    return "difference of two logits" if task.reference is None else "minus the KL divergence from the model, in nats"


def curve_table(result: Result) -> str:
    """Every method's faithfulness by ablation and ranking."""
    shown = measure.sizes()
    header = ["cut edges carry", "ranked by", "method", *(f"{100 * share:g} %" for _, share in shown), "CPR", "CMD"]
    rows = [
        [ablation, ranking, name, *(curve.faithfulness[place] for place, _ in shown), curve.cpr, curve.cmd]
        for ablation, rankings in result.curves.items()
        for ranking, curves in rankings.items()
        for name, curve in curves.items()
    ]
    return markdown(header, rows)


def circuit_table(result: Result) -> str:
    """Sizes and faithfulness of single circuits; nothing where no method chooses one."""
    if not result.circuits:
        return ""
    ablations = list(result.curves)
    header = ["method", "chosen", "edges, q k v apart", "merged", "connected, apart", *ablations]
    rows = [
        [name, "yes" if one.own else "no", one.edges, one.pairs, one.connected]
        + [_interval(one.faithfulness[ablation]) for ablation in ablations]
        for name, one in result.circuits.items()
    ]
    return markdown(header, rows)


def _interval(figures: tuple[float, float, float]) -> str:
    value, low, high = map(_cell, figures)
    return f"{value} [{low}, {high}]"


def stability_table(result: Result) -> str:
    """How alike circuits of half the prompts are; nothing where that wasn't asked for."""
    if not result.stability:
        return ""
    count = next(iter(result.stability.values())).n_top
    kinds = ("mean", "sd", "least")
    header = ["method", *(f"chosen, {kind}" for kind in kinds), *(f"{count} strongest, {kind}" for kind in kinds)]
    rows = [[name, *_figures(one.own), *_figures(one.top)] for name, one in result.stability.items()]
    return markdown(header, rows)


def _figures(agreement: Agreement | None) -> list[Any]:
    return ["", "", ""] if agreement is None else [agreement.mean, agreement.deviation, agreement.least]


def cost_table(result: Result) -> str:
    """Processor time in bare forward passes, and peak memory."""
    header = ["method", "seconds", "forward passes", "peak MiB", "above bare passes", "times, with weights"]
    rows = [[name, *asdict(spent).values()] for name, spent in result.spent.items()]
    return markdown(header, rows)


# ---- files ----------------------------------------------------------------------------------------------------------


def plain(result: Result) -> dict[str, Any]:
    """All figures as JSON takes them."""
    curves = {
        ablation: {ranking: {name: vars(one) for name, one in some.items()} for ranking, some in rankings.items()}
        for ablation, rankings in result.curves.items()
    }
    figures = {
        name: {method: asdict(one) for method, one in getattr(result, name).items()}
        for name in ("circuits", "stability", "spent")
    }
    about = {"task": result.task.name, "prompts": len(result.task), "looked_at": result.task.looked_at}
    return {**about, "about": _about(result), "curves": curves, **figures, "left_out": dict(result.left_out)}


def draw(results: Sequence[Result], path: Path) -> None:
    """Faithfulness against size: a row of panels for each task and ranking, a panel for each ablation."""
    panels = [
        [
            (f"{result.task.name}, {ablation}, by {ranking}", rankings[ranking])
            for ablation, rankings in result.curves.items()
        ]
        for result in results
        for ranking in measure.RANKINGS
    ]
    figure = new_figure(PANEL[0] * len(panels[0]), PANEL[1] * len(panels))
    axes = figure.subplots(len(panels), len(panels[0]), squeeze=False)
    for row, some in zip(axes, panels):
        for ax, (title, curves) in zip(row, some):
            plot.curves(curves, title=title, ax=ax)
    figure.set_layout_engine("tight")
    plot.style.save(figure, path)
