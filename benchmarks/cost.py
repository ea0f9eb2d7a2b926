"""What finding a circuit costs, in bare forward passes of the same model on the same prompts, in one process.

    python -m benchmarks.cost                          GPT-2 small's shape, random weights, 32 pairs of 32 tokens
    python -m benchmarks.cost --layers 6 --skip package-eap-ig
    python -m benchmarks.cost --grow --plot cost.svg --layers 6 --d-model 384 --vocab 8192
                                                       how the cost grows with layers, heads, prompts and length

`package-eap` and `package-eap-ig` are a re-enactment of how the EAP-IG package works: every head's output is written
out in d_model, every head reads copies of the residual stream of its own through q, k and v, the differences of all
nodes are held as one (batch, pos, node, d_model) tensor, and parameters collect gradients.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from tl_circuitlasso import baselines
from tl_circuitlasso.bench.measure import Cost, measured
from tl_circuitlasso.models.build import build_hooked_transformer


@dataclass(frozen=True)
class Problem:
    """A model's shape and a data set's size."""

    layers: int = 12
    heads: int = 12
    d_model: int = 768
    vocab: int = 50257
    prompts: int = 32
    length: int = 32
    batch_size: int = 32

    def model(self) -> Any:
        config = {
            "n_layers": self.layers,
            "n_heads": self.heads,
            "d_model": self.d_model,
            "d_head": self.d_model // self.heads,
            "d_mlp": 4 * self.d_model,
            "d_vocab": self.vocab,
            "n_ctx": max(64, self.length),
            "act_fn": "gelu_new",
            "normalization_type": "LN",
            "seed": 0,
        }
        return build_hooked_transformer(config, {}, random_weights=True)

    def pairs(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        shape = (2, self.prompts, self.length)
        clean, corrupted = torch.randint(self.vocab, shape, generator=generator)
        return clean, corrupted


def logit_difference(logits: Tensor, rows: Tensor) -> Tensor:
    """A metric that costs nothing: the difference of two logits at the last position."""
    return (logits[:, -1, 0] - logits[:, -1, 1]).sum()


# ---- the package's way ----------------------------------------------------------------------------------------------


def package_way(model: Any, clean: Tensor, corrupted: Tensor, batch_size: int, steps: int) -> Tensor:
    """EAP (steps = 0) or EAP-IG on inputs as the package computes them; scores of sources by readers."""
    flags = ("use_attn_result", "use_split_qkv_input", "use_hook_mlp_in")
    for flag in flags:
        setattr(model.cfg, flag, True)
    try:
        layout = _PackageLayout(model)
        for first in range(0, len(clean), batch_size):
            layout.batch(clean[first : first + batch_size], corrupted[first : first + batch_size], steps)
    finally:
        for flag in flags:
            setattr(model.cfg, flag, False)
        model.zero_grad(set_to_none=True)
    return layout.scores / (len(clean) * max(steps, 1))


class _PackageLayout:
    """Hooks and tensors of the package's way for one model."""

    def __init__(self, model: Any) -> None:
        self.model, cfg = model, model.cfg
        self.layers, self.heads = cfg.n_layers, cfg.n_heads
        self.n_sources = 1 + self.layers * (self.heads + 1)
        self.n_readers = self.layers * (3 * self.heads + 1) + 1
        self.scores = torch.zeros(self.n_sources, self.n_readers)

    def batch(self, clean: Tensor, corrupted: Tensor, steps: int) -> None:
        shape = (*clean.shape, self.n_sources, self.model.cfg.d_model)
        self.difference = torch.zeros(shape)
        with torch.no_grad():
            ends = []
            for tokens, sign in ((corrupted, -1.0), (clean, 1.0)):
                hooks = [(name, self._adder(rows, sign)) for name, rows in self._outputs()]
                self.model.run_with_hooks(tokens, fwd_hooks=[*hooks, ("hook_embed", self._keeper(ends))])
        if not steps:
            self._backward(clean, [])
        for k in range(steps):
            mixed = ends[0] + k / steps * (ends[1] - ends[0])
            self._backward(clean, [("hook_embed", lambda act, hook, mixed=mixed: mixed.requires_grad_())])

    def _outputs(self) -> list[tuple[str, slice | int]]:
        found: list[tuple[str, slice | int]] = [("hook_embed", 0)]
        for layer in range(self.layers):
            first = 1 + layer * (self.heads + 1)
            found.append((f"blocks.{layer}.attn.hook_result", slice(first, first + self.heads)))
            found.append((f"blocks.{layer}.hook_mlp_out", first + self.heads))
        return found

    def _adder(self, rows: slice | int, sign: float) -> Callable[..., None]:
        def add(act: Tensor, hook: Any) -> None:
            self.difference[:, :, rows] += sign * act

        return add

    @staticmethod
    def _keeper(ends: list[Tensor]) -> Callable[..., None]:
        return lambda act, hook: ends.append(act.clone())

    def _backward(self, tokens: Tensor, fwd_hooks: list[Any]) -> None:
        with self.model.hooks(fwd_hooks=fwd_hooks, bwd_hooks=self._inputs()):
            logit_difference(self.model(tokens), torch.arange(len(tokens))).backward()

    def _inputs(self) -> list[tuple[str, Callable[..., None]]]:
        found = []
        for layer in range(self.layers):
            sources, first = 1 + layer * (self.heads + 1), layer * (3 * self.heads + 1)
            for number, port in enumerate("qkv"):
                columns = slice(first + number * self.heads, first + (number + 1) * self.heads)
                found.append((f"blocks.{layer}.hook_{port}_input", self._scorer(sources, columns)))
            mlp = slice(first + 3 * self.heads, first + 3 * self.heads + 1)
            found.append((f"blocks.{layer}.hook_mlp_in", self._scorer(sources + self.heads, mlp)))
        end = slice(self.n_readers - 1, self.n_readers)
        found.append((f"blocks.{self.layers - 1}.hook_resid_post", self._scorer(self.n_sources, end)))
        return found

    def _scorer(self, sources: int, columns: slice) -> Callable[..., None]:
        def score(grad: Tensor, hook: Any) -> None:
            wide = grad if grad.ndim == 4 else grad[:, :, None]
            products = torch.einsum("bpsd,bprd->sr", self.difference[:, :, :sources], wide)
            self.scores[:sources, columns] += products

        return score


# ---- measuring ------------------------------------------------------------------------------------------------------


def methods(problem: Problem, model: Any, steps: int) -> dict[str, Callable[[], Any]]:
    """What is measured, by name."""
    clean, corrupted = problem.pairs()
    size = problem.batch_size

    def lasso() -> Any:
        from tl_circuitlasso.discover.run import circuit_lasso

        return circuit_lasso(model, clean, batch_size=size, progress=False)

    def bare() -> None:
        with torch.no_grad():
            for part in clean.split(size):
                model(part)

    pair = (model, clean, corrupted)
    return {
        "bare forward": bare,
        "circuit-lasso": lasso,
        "eap": lambda: baselines.eap(*pair, logit_difference, batch_size=size),
        "eap-ig": lambda: baselines.eap_ig(*pair, logit_difference, steps=steps, batch_size=size),
        "package-eap": lambda: package_way(*pair, size, 0),
        "package-eap-ig": lambda: package_way(*pair, size, steps),
    }


def run(problem: Problem, *, steps: int, skip: tuple[str, ...], repeats: int) -> pd.DataFrame:
    """Seconds, ratios and peak memory of every method on the CPU: the best of some rounds, in each of which all run."""
    small = replace(problem, d_model=2 * problem.heads, vocab=50, prompts=4, length=6)
    for name, call in methods(small, small.model(), steps).items():
        if name not in skip:
            call()  # first calls pay for imports and allocations
    model = problem.model()
    calls = {name: call for name, call in methods(problem, model, steps).items() if name not in skip}
    calls["bare forward"]()
    rounds = [{name: measured(call)[1] for name, call in calls.items()} for _ in range(repeats)]
    rounds.append({"bare forward": measured(calls["bare forward"])[1]})
    costs = {name: _best([costs[name] for costs in rounds if name in costs]) for name in calls}
    base = costs["bare forward"].cpu_seconds
    ours = costs["circuit-lasso"].cpu_seconds if "circuit-lasso" in costs else math.nan
    return pd.DataFrame(
        [
            {
                "method": name,
                "seconds": cost.seconds,
                "processor seconds": cost.cpu_seconds,
                "forwards": cost.cpu_seconds / base,  # processor time: other programs' load doesn't count
                "times ours": cost.cpu_seconds / ours,
                "peak MiB": cost.peak_mib,
            }
            for name, cost in costs.items()
        ]
    )


def _best(costs: list[Cost]) -> Cost:
    return min(costs, key=lambda cost: cost.cpu_seconds)


GROWTH = {
    "layers": [{"layers": n} for n in (2, 4, 8, 12)],
    "heads": [{"heads": n} for n in (4, 6, 12, 24)],
    "prompts": [{"prompts": n} for n in (8, 32, 128, 512)],
    "length": [{"length": n} for n in (8, 16, 32, 64)],
}


def growth(base: Problem, *, steps: int, skip: tuple[str, ...]) -> pd.DataFrame:
    """The same table while one size changes at a time."""
    parts = []
    for axis, changes in GROWTH.items():
        for change in changes:
            table = run(replace(base, **change), steps=steps, skip=skip, repeats=1)
            parts.append(table.assign(axis=axis, value=change[axis]))
            print(parts[-1].to_string(index=False), flush=True)
    return pd.concat(parts, ignore_index=True)


def plot(table: pd.DataFrame, path: Path) -> None:
    """One panel per axis: processor seconds against size, both logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(GROWTH), figsize=(14, 3.6), sharey=True, layout="constrained")
    for panel, axis in zip(panels, GROWTH):
        for method, rows in table[table.axis == axis].groupby("method", sort=False):
            panel.loglog(rows.value, rows["processor seconds"], marker="o", label=method)
        panel.set_xlabel(axis)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("processor seconds")
    panels[-1].legend(fontsize=8)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in vars(Problem()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--steps", type=int, default=5, help="integration steps of EAP-IG")
    parser.add_argument("--repeats", type=int, default=1, help="the best of so many runs is reported")
    parser.add_argument("--skip", default="", help="comma-separated methods to leave out")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--grow", action="store_true", help="measure how the cost grows instead")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    problem = Problem(**{name: getattr(arguments, name) for name in vars(Problem())})
    skip = tuple(arguments.skip.split(","))
    began = time.perf_counter()
    if arguments.grow:
        table = growth(problem, steps=arguments.steps, skip=skip)
    else:
        table = run(problem, steps=arguments.steps, skip=skip, repeats=arguments.repeats)
        print(table.round(2).to_string(index=False))
    print(f"{problem}, {arguments.threads} threads, {time.perf_counter() - began:.0f} s")
    if arguments.json:
        arguments.json.write_text(json.dumps(table.to_dict(orient="records"), indent=1))
    if arguments.plot and arguments.grow:
        plot(table, arguments.plot)


if __name__ == "__main__":
    main()
