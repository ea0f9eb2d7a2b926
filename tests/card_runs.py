"""What is tried on the make-believe accelerator: `outcomes` says for each run by name "" or what went wrong.

Every run is made on the CPU and on the card, and must give the same numbers. TransformerLens asks a residual stream
that it starts in the middle from for the very type `Tensor`, so runs that do this are made on a TransformerBridge or
left out.
"""

import traceback
import warnings
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

import tl_circuitlasso as tcl
from tests import architectures
from tests.card import card
from tests.sae.training import PlainSAE, plain_sae
from tl_circuitlasso import baselines, evaluate, solve
from tl_circuitlasso.models import adapt

Run = Callable[[torch.device], Any]

HOOKS = ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post")
CPU = torch.device("cpu")
TOLERANCE = 1e-2  # of two solvers that each stop at a gap of 1e-4
TOKENS = architectures.prompts(batch=12)
OTHERS = architectures.prompts(batch=12, seed=1)


def last_logits(logits: Tensor, rows: Tensor) -> Tensor:
    return (logits[:, -1, 1] - logits[:, -1, 2]).sum()


def model_on(device: torch.device) -> Any:
    model = architectures.small()
    model.cfg.device = str(device)
    return model if device.type == "cpu" else model.to(device)


def circuit(**options: Any) -> Run:
    return lambda device: tcl.circuit_lasso(model_on(device), TOKENS, progress=False, **{"seed": 0, **options})


def saes_on(device: torch.device) -> dict[str, PlainSAE]:
    acts = adapt(model_on(CPU)).run(TOKENS, torch.ones_like(TOKENS, dtype=torch.bool), HOOKS)
    found = {hook: plain_sae(acts[hook][:, 1:].flatten(0, 1), 20, seed=n) for n, hook in enumerate(HOOKS)}
    return {hook: PlainSAE(*(part.to(device) for part in vars(sae).values())) for hook, sae in found.items()}


def features(strength: float | str = 0.3, **options: Any) -> Run:
    def run(device: torch.device) -> Any:
        basis = tcl.SAEFeatures(saes_on(device), min_count=2, **options)
        return tcl.circuit_lasso(model_on(device), TOKENS, basis=basis, strength=strength, progress=False)

    return run


def baseline(name: str, **options: Any) -> Run:
    method = getattr(baselines, name)
    return lambda device: method(model_on(device), TOKENS, OTHERS, last_logits, **options)


def judged(what: Callable[..., Any], **options: Any) -> Run:
    return lambda device: what(model_on(device), default_graph(), TOKENS, OTHERS, last_logits, **options)


@lru_cache
def default_graph() -> tcl.AttributionGraph:
    return tcl.circuit_lasso(model_on(CPU), TOKENS, target=target("difference"), progress=False, seed=0)


def confirmed(model: Any, graph: tcl.AttributionGraph, *options: Any) -> Any:
    return evaluate.confirm(model, graph, *options)


def steered(model: Any, graph: tcl.AttributionGraph, clean: Tensor, other: Tensor, metric: Any) -> Any:
    return evaluate.steer(model, graph, None, 2.0, clean, metric, other=other)


def problem(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(80, 12, generator=generator, dtype=torch.float64)
    y = x[:, :4] + 0.3 * torch.randn(80, 4, generator=generator, dtype=torch.float64)
    data = solve.moments_of(x, y)
    return data.gram.to(device), data.cross.to(device), data.target_sq_norm.to(device)


def lasso(penalty: Any = None, **options: Any) -> Run:
    def run(device: torch.device) -> Any:
        gram, cross, square = problem(device)
        shape: Any = penalty() if callable(penalty) else penalty
        return solve.lasso(gram, cross, target_sq_norm=square, strength=0.2, penalty=shape, **options).value

    return run


def chosen(rule: str) -> Run:
    def run(device: torch.device) -> Any:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(90, 8, generator=generator, dtype=torch.float64)
        y = x[:, :2] + 0.5 * torch.randn(90, 2, generator=generator, dtype=torch.float64)
        parts = [solve.moments_of(a.to(device), b.to(device)) for a, b in zip(x.split(30), y.split(30))]
        return solve.select(solve.total(parts), rule=rule, folds=parts).solution.value  # type: ignore[arg-type]

    return run


def classes(kind: str) -> Run:
    def run(device: torch.device) -> Any:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(60, 6, generator=generator, dtype=torch.float64)
        y = (x[:, 0] + 0.3 * torch.randn(60, generator=generator, dtype=torch.float64) > 0).long()
        if kind == "logistic":
            return solve.logistic_lasso(x.to(device), y.double().to(device), strength=0.2).value
        return solve.multinomial_lasso(x.to(device), y.to(device), strength=0.2).value

    return run


def target(what: str) -> Any:
    if what == "difference":
        return tcl.LogitDiff(torch.full((12,), 1), torch.full((12,), 2))
    if what == "labels":
        return tcl.Labels(TOKENS[:, -1] % 2)
    return tcl.Values((TOKENS[:, -1] % 5).float())


def runs() -> dict[str, Run]:
    sparse = {"strength": 0.5, "positions": "last"}
    return {
        "read": circuit(),
        **{f"read, strength {strength}": circuit(strength=strength) for strength in (0.1, "ebic", "cv", "stability")},
        **{f"read, {what}": circuit(target=target(what)) for what in ("difference", "labels", "values")},
        "activation": circuit(design="activation", strength=0.5),
        "routed": circuit(design="routed", strength=0.5),
        "activation, cv": circuit(design="activation", strength="cv", positions="last"),
        "neurons": circuit(design="activation", basis="neuron", **sparse),
        "residual": circuit(design="activation", basis="residual", **sparse),
        "lasso+confirm": circuit(method="lasso+confirm", corrupted=OTHERS, target=target("difference")),
        **{f"SAE, {mixing}": features(mixing=mixing) for mixing in ("same", "mean", "heads", "pooled")},
        **{f"SAE, penalty {penalty}": features(penalty=penalty) for penalty in ("l1", "adaptive")},
        **{f"SAE, strength {strength}": features(strength) for strength in ("auto", "ebic", "stability")},
        **{
            f"{name}, {ablation}": baseline(name, ablation=ablation)
            for name in ("eap", "eap_ig", "clean_corrupted", "eap_ig_activations", "node_scores")
            for ablation in ("patch", "mean", "zero")
        },
        **{f"faithfulness, {way}": judged(evaluate.faithfulness, ablation=way) for way in ("patch", "mean", "optimal")},
        "curve": judged(evaluate.curve),
        "minimality": judged(evaluate.minimality),
        "completeness": judged(evaluate.completeness),
        "confirm": judged(confirmed),
        "steer": judged(steered),
        **{f"lasso, {solver}": lasso(solver=solver) for solver in ("auto", "fista", "torch")},
        "lasso, elastic net": lasso(lambda: solve.ElasticNet(0.5)),
        "lasso, non-negative": lasso(lambda: solve.L1(non_negative=True)),
        "lasso, groups": lasso(lambda: solve.Group(torch.arange(12) // 3, torch.arange(4) // 2)),
        "lasso, weights": lasso(lambda: solve.L1(1 + torch.arange(48).view(12, 4) % 3)),
        **{f"select, {rule}": chosen(rule) for rule in ("ebic", "cv", "adaptive", "mcp")},
        **{kind: classes(kind) for kind in ("logistic", "multinomial")},
    }


# ---- comparing ------------------------------------------------------------------------------------------------------


def differences(ours: Any, theirs: Any, path: str = "") -> list[str]:
    """Where two results differ; seconds, paths and provenance are left out."""
    if isinstance(ours, tcl.AttributionGraph):
        columns = ["source", "target", "port", "weight", "score", "kept"]
        tables: Any = [graph.edge_table()[columns] for graph in (ours, theirs)]
        a, b = (table.sort_values(columns[:3]).reset_index(drop=True) for table in tables)
        if not a[columns[:3]].equals(b[columns[:3]]):
            return [f"{path}: other edges"]
        values: Any = [{name: torch.tensor(table[name].to_numpy(float)) for name in columns[3:]} for table in (a, b)]
        return differences(values[0], values[1], path)
    if isinstance(ours, Tensor):
        ours, theirs = ours.detach().cpu().double(), theirs.detach().cpu().double()
        same = ours.shape == theirs.shape and torch.allclose(
            ours, theirs, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True
        )
        return [] if same else [f"{path}: other numbers"]
    if is_dataclass(ours) and not isinstance(ours, type):
        ours, theirs = ({field.name: getattr(one, field.name) for field in fields(one)} for one in (ours, theirs))
    if isinstance(ours, dict):
        return [d for key in ours for d in differences(ours[key], theirs[key], f"{path}.{key}")]
    if isinstance(ours, (tuple, list)):
        return [d for n, pair in enumerate(zip(ours, theirs)) for d in differences(*pair, f"{path}.{n}")]
    if isinstance(ours, (int, float)):
        return differences(torch.tensor(float(ours)), torch.tensor(float(theirs)), path)
    return []


def tried(run: Run) -> str:
    try:
        here = run(CPU)
        with card() as device:
            there = run(device)
        return "; ".join(differences(here, there))
    except Exception as error:  # whatever goes wrong is what this is for
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "tl_circuitlasso" in f.filename]
        where = f" ({frames[-1].name}: {frames[-1].line})" if frames else ""
        return f"{type(error).__name__}: {str(error)[:400]}{where}"


def outcomes(*names: str) -> dict[str, str]:
    """What went wrong in the runs of these names (none: in all); for a process of its own, which is changed."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    every = runs()
    return {name: tried(every[name]) for name in names or every}
