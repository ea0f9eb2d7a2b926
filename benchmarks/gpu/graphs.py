"""Component graphs of random weights in the shapes of real models: seconds, forward-equivalents, and memory.

Memory stands beside what the bare forward pass takes, beside what `tcl.plan` said, and beside what EAP-IG takes: the
library's own, and the batch x pos x nodes x d_model floats of the usual layout, which isn't run.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import tl_circuitlasso as tcl
from benchmarks.gpu.device import Device, forget_peak, once, peak_gib
from benchmarks.gpu.parts import Figures, Size
from tl_circuitlasso import baselines
from tl_circuitlasso.models.build import build_hooked_transformer

BATCH = 32
LARGEST = 3  # costs of the profile that are named
PROFILED = 32  # prompts of the profiled run


@dataclass(frozen=True)
class Shape:
    """The sizes of a model, and the fields of its config that aren't sizes."""

    layers: int
    heads: int
    kv_heads: int
    d_model: int
    d_head: int
    d_mlp: int
    vocab: int
    kind: str
    dtype: str = "bfloat16"

    def shrunk(self, by: int) -> "Shape":
        """The same kind in small."""
        heads = max(2, self.heads // 8)
        small = {"layers": 2, "heads": heads, "kv_heads": max(1, heads // 2) if self.kv_heads < self.heads else heads}
        widths = {name: max(8, getattr(self, name) // by) for name in ("d_model", "d_mlp")}
        return self if by == 1 else replace(self, **small, **widths, d_head=8, vocab=60, dtype="float32")

    def config(self, length: int) -> dict[str, Any]:
        """The model as TransformerLens is told of it."""
        return KINDS[self.kind] | {
            "n_layers": self.layers,
            "n_heads": self.heads,
            "d_model": self.d_model,
            "d_head": self.d_head,
            "d_mlp": self.d_mlp,
            "d_vocab": self.vocab,
            "n_ctx": max(64, length),
            "dtype": self.dtype,
            "seed": 0,
            **({} if self.kv_heads == self.heads else {"n_key_value_heads": self.kv_heads}),
            **({"rotary_dim": self.d_head} if self.kind != "gpt2" else {}),
        }


_ROTARY = {"positional_embedding_type": "rotary", "gated_mlp": True, "normalization_type": "RMS", "final_rms": True}
KINDS: dict[str, dict[str, Any]] = {
    "gpt2": {"act_fn": "gelu_new", "normalization_type": "LN"},
    "llama": {**_ROTARY, "act_fn": "silu"},
    "gemma2": {
        **_ROTARY,
        "act_fn": "gelu_pytorch_tanh",
        "use_normalization_before_and_after": True,
        "attn_scores_soft_cap": 50.0,
        "output_logits_soft_cap": 30.0,
    },
}
SHAPES = {
    "gpt2-small": Shape(12, 12, 12, 768, 64, 3072, 50_257, "gpt2", "float32"),
    "llama-3.2-1b": Shape(16, 32, 8, 2048, 64, 8192, 128_256, "llama"),
    "gemma-2-2b": Shape(26, 8, 4, 2304, 256, 9216, 256_000, "gemma2"),
    "llama-3.1-8b": Shape(32, 32, 8, 4096, 128, 14_336, 128_256, "llama"),
}


def graphs(device: Device, size: Size) -> Iterator[Figures]:
    """Every shape in turn, the smallest first."""
    for name in size.shapes:
        shape = SHAPES[name].shrunk(size.shrink)
        model = built(shape, device.kind, size.length)
        clean, corrupted = prompts(shape, size)
        bare, held = _measured(device, lambda model=model, clean=clean: _forward(model, clean))
        options = {"positions": "last", "batch_size": BATCH, "progress": False}
        ahead = tcl.plan(model, clean, **options)
        found: list[tcl.AttributionGraph] = []

        def circuit(model: Any = model, clean: Tensor = clean, found: Any = found, options: Any = options) -> None:
            found.append(tcl.circuit_lasso(model, clean, **options))

        spent, peak = _measured(device, circuit)
        record = found[-1].provenance
        yield {
            "shape": name,
            "prompts": size.prompts,
            "bare s": bare,
            "circuit s": spent,
            "forward-equivalents": spent / bare,
            **{f"{stage} s": value for stage, value in record["seconds"].items() if stage != "total"},
            "planned s": ahead.seconds,
            "kept": len(found[-1].kept_edges()),
            "bare GiB": held,
            "circuit GiB": peak,
            "planned GiB": round(ahead.bytes / 2**30, 3),
            "EAP-IG layout GiB": round(_usual_layout(shape, size), 3),
        }
        spent, peak = _measured(device, lambda m=model, a=clean, b=corrupted: _eap_ig(m, a, b))
        yield {"shape": name, "EAP-IG s": spent, "EAP-IG forward-equivalents": spent / bare, "EAP-IG GiB": peak}
        if name == size.shapes[0]:
            yield {"shape": name, "largest costs": largest_costs(device, model, clean[:PROFILED])}
        del model


def built(shape: Shape, kind: str, length: int) -> Any:
    """The model, its weights made where they are to be."""
    with torch.device(kind):
        return build_hooked_transformer(shape.config(length), {}, device=kind, random_weights=True)


def prompts(shape: Shape, size: Size) -> tuple[Tensor, Tensor]:
    """Random tokens, and their counterparts."""
    generator = torch.Generator().manual_seed(0)
    clean, corrupted = torch.randint(shape.vocab, (2, size.prompts, size.length), generator=generator)
    return clean, corrupted


def largest_costs(device: Device, model: Any, clean: Tensor) -> str:
    """The operations that take most time of their own, with their shares, but for the second look's many small ones."""
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.kind == "cuda")
    with profile(activities=kinds) as seen:
        tcl.circuit_lasso(model, clean, positions="last", batch_size=BATCH, progress=False, refined=False)
    own = "self_device_time_total" if device.kind == "cuda" else "self_cpu_time_total"
    rows = sorted(seen.key_averages(), key=lambda row: -getattr(row, own))
    total = sum(getattr(row, own) for row in rows) or 1
    return ", ".join(f"{row.key} {getattr(row, own) / total:.0%}" for row in rows[:LARGEST])


def _measured(device: Device, run: Any) -> tuple[float, float | None]:
    forget_peak(device.kind)
    held = torch.cuda.memory_allocated() / 2**30 if device.kind == "cuda" else 0.0
    spent, peak = once(device.kind, run), peak_gib(device.kind)
    return spent, None if peak is None else round(peak - held, 3)


def _forward(model: Any, clean: Tensor) -> None:
    device = next(model.parameters()).device
    with torch.no_grad():
        for part in clean.split(BATCH):
            model(part.to(device))


def _eap_ig(model: Any, clean: Tensor, corrupted: Tensor) -> None:
    baselines.eap_ig(model, clean, corrupted, lambda logits, rows: (logits[:, -1, 0] - logits[:, -1, 1]).sum())


def _usual_layout(shape: Shape, size: Size) -> float:
    """GiB of the differences of all nodes of a batch, each written out in d_model, in single precision."""
    nodes = 1 + shape.layers * (shape.heads + 1)
    return 4 * min(BATCH, size.prompts) * size.length * nodes * shape.d_model / 2**30
