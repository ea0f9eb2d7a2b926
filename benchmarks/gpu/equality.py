"""Whether the card says what the CPU says: graphs by every design, baselines and evaluation, in two precisions."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import tl_circuitlasso as tcl
from benchmarks.gpu.device import Device
from benchmarks.gpu.graphs import SHAPES, built
from benchmarks.gpu.parts import Figures, Size
from tl_circuitlasso import baselines, evaluate
from tl_circuitlasso.models.adapter import adapt

PROMPTS, LENGTH = 16, 8
TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 0.2}  # of the largest score: solvers stop at a gap of 1e-4
FEATURES = 48


def equality(device: Device, size: Size) -> Iterator[Figures]:
    """The bundled model and a GPT-2-shaped one, each on the CPU and on the device; a rehearsal is content with one."""
    for name, model, clean, corrupted in _models(size):
        for dtype in (torch.float32, torch.bfloat16):
            nn.Module.to(model, dtype)  # in place
            model.cfg.dtype = dtype
            for what, run in _runs(clean, corrupted).items():
                yield {"model": name, "dtype": str(dtype).removeprefix("torch."), "what": what} | compared(
                    _on(model, "cpu", run), _on(model, device.kind, run), TOLERANCE[dtype]
                )


def _models(size: Size) -> Iterator[tuple[str, Any, Tensor, Tensor]]:
    if size.shrink == 1:
        demo = tcl.load_demo(prompts=PROMPTS)
        yield "demo", demo.model, demo.tokens, demo.corrupted
    shape = SHAPES["gpt2-small"].shrunk(size.shrink)
    clean, corrupted = torch.randint(shape.vocab, (2, PROMPTS, LENGTH), generator=torch.Generator().manual_seed(0))
    yield "gpt2-small", built(shape, "cpu", LENGTH), clean, corrupted


def _on(model: Any, kind: str, run: Callable[[Any], Any]) -> Any:
    """The run with the model there; it is on the CPU again behind it."""
    try:
        model.cfg.device = kind
        return run(nn.Module.to(model, kind))
    finally:
        model.cfg.device = "cpu"
        nn.Module.to(model, "cpu")


def _runs(clean: Tensor, corrupted: Tensor) -> dict[str, Callable[[Any], Any]]:
    options = {"positions": "last", "progress": False}

    def features(model: Any) -> Any:
        basis = tcl.SAEFeatures(_saes(model, clean), min_count=2)
        return tcl.circuit_lasso(model, clean, basis=basis, progress=False)

    def faithful(model: Any) -> Any:
        graph = baselines.eap(model, clean, corrupted, last).top_k(20)
        found = evaluate.faithfulness(model, graph, clean, corrupted, last)
        return torch.tensor([found.model, found.ablated, found.circuit])

    return {
        "read": lambda model: tcl.circuit_lasso(model, clean, **options),
        "activation": lambda model: tcl.circuit_lasso(
            model, clean, design="activation", basis=tcl.Component(1), strength=0.3, progress=False
        ),
        "SAE features": features,
        "eap_ig": lambda model: baselines.eap_ig(model, clean, corrupted, last),
        "faithfulness": faithful,
    }


def last(logits: Tensor, rows: Tensor) -> Tensor:
    """A metric: the difference of two logits at the last position."""
    return (logits[:, -1, 1] - logits[:, -1, 2]).sum()


def _saes(model: Any, clean: Tensor) -> dict[str, Any]:
    from benchmarks.scaling import PlainSAE

    hooks = [f"blocks.{layer}.hook_resid_post" for layer in range(2)]
    acts = adapt(model).run(clean, torch.ones_like(clean, dtype=torch.bool), hooks)
    saes = {}
    for seed, hook in enumerate(hooks):
        found = PlainSAE.random(acts[hook][:, 1:].flatten(0, 1).cpu(), seed, FEATURES)
        saes[hook] = PlainSAE(*(part.to(acts[hook].device) for part in vars(found).values()))
    return saes


def compared(here: Any, there: Any, tolerance: float) -> Figures:
    """The largest difference beside the largest number, and how much of the circuits is the same."""
    circuits: Figures = {}
    if isinstance(here, tcl.AttributionGraph):
        first, second = ({edge[:3]: edge[3] for edge in _edges(graph)} for graph in (here, there))
        one, other = here.kept_edges(), there.kept_edges()
        circuits = {"Jaccard": len(one & other) / max(len(one | other), 1)}
        keys = sorted({*first, *second})
        here, there = (torch.tensor([edges.get(key, 0.0) for key in keys]) for edges in (first, second))
    largest = float(here.abs().max()) if here.numel() else 0.0
    differ = float((here - there).abs().max()) / max(largest, 1e-30) if here.numel() else 0.0
    return {"difference": differ, **circuits, "equal": "yes" if differ <= tolerance else "NO"}


def _edges(graph: tcl.AttributionGraph) -> Iterator[tuple[str, str, str, float]]:
    table = graph.edge_table()
    yield from zip(table.source, table.target, table.port, table.score.astype(float))
