"""The way from a parent's hook to a child's: which layers stand between, and what they make of an edit."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from tl_circuitlasso.errors import ModelError
from tl_circuitlasso.models.adapter import Adapter
from tl_circuitlasso.models.closure import closure_report
from tl_circuitlasso.models.encoder import Encoder
from tl_circuitlasso.models.feature_layers import Layers, Rows, check_step, wanted
from tl_circuitlasso.models.feature_places import Place, Step, place_of, steps_between, written_place
from tl_circuitlasso.models.names import act
from tl_circuitlasso.models.tokens import Batch, first_prompts


@dataclass(frozen=True, eq=False)
class Path:
    """What stands between a parent and a child; `of` raises ModelError where that isn't known.

    MLPs that a cross-layer transcoder writes to are what its features make of them: where one is taken out, each of
    these MLPs gives what that feature wrote to it less, and doesn't answer by itself.
    """

    parent: Encoder
    child: Encoder
    steps: tuple[Step, ...]

    @classmethod
    def of(cls, adapter: Adapter, parent: Encoder, child: Encoder) -> "Path":
        """From the hooks of the two."""
        steps = steps_between(adapter, parent.hook_out, child.hook)
        path = cls(parent, child, steps)
        if parent.is_cross_layer and place_of(child.hook).kind in ("post", "mlp"):
            raise ModelError(f"a cross-layer transcoder stands for the MLP that is read at {child.hook}")
        for step in steps:
            if path.output(step) is None:
                check_step(adapter, step)
        return path

    def output(self, step: Step) -> int | None:
        """Which of the outputs of a cross-layer transcoder a step is; None for a layer that is run on."""
        hook = f"blocks.{step.layer}.hook_mlp_out"
        mine = self.parent.is_cross_layer and step.kind == "mlp" and hook in self.parent.outputs
        return self.parent.outputs.index(hook) if mine else None

    def wanted(self) -> set[str]:
        """The activations that it is run on from."""
        found = wanted(self.steps) | {self.parent.hook, self.parent.hook_out, self.child.hook}
        if place_of(self.child.hook).kind == "normed":
            found |= {act(kind, place_of(self.child.hook).layer) for kind in ("resid_pre", "resid_post", "mlp_out")}
        layers = [step.layer for step in self.steps] + [written_place(self.parent.hook_out).layer]
        return found | {act("z", layer) for layer in layers if written_place(self.parent.hook_out).kind == "z"}

    def change(self, layers: Layers, rows: Rows, taken: Float[Tensor, "group row *width"], head: int | None) -> Tensor:
        """How much less the child's hook shows at the rows, where `taken` is taken out at the parent's; of a
        cross-layer transcoder it has an axis of outputs in front of the width."""
        start, end = written_place(self.parent.hook_out), place_of(self.child.hook)
        change = _started(layers, start, rows, taken[:, :, 0] if self.parent.is_cross_layer else taken, end.kind)
        front = change
        for number, step in enumerate(self.steps):
            if (output := self.output(step)) is not None:
                change = change + taken[:, :, output]
                continue
            beside = layers.adapter.shape.parallel and Step(step.layer, "attn") in self.steps[:number]
            front = front if step.kind == "mlp" and beside else change
            inside = (
                layers.heads_change(step.layer, rows, front, head)
                if step.kind == "attn"
                else layers.neurons_change(step.layer, rows, front)
            )
            if step is self.steps[-1] and end.kind in ("z", "post"):
                return inside
            writes = layers.attention_written if step.kind == "attn" else layers.mlp_written
            written = writes(step.layer, rows, inside)
            if step is self.steps[-1] and end.kind in ("attn", "mlp"):
                return written
            change = change + written
        return layers.normed_change(end, self.child.hook, rows, change) if end.kind == "normed" else change


def _started(layers: Layers, start: Place, rows: Rows, taken: Tensor, end: str) -> Tensor:
    """What is taken out of the stream, or of what the child shows, where it is taken out of heads or neurons."""
    if start.kind == "z":
        return layers.attention_written(start.layer, rows, taken.unflatten(2, (layers.adapter.shape.n_heads, -1)))
    return layers.mlp_written(start.layer, rows, taken.flatten(2)) if start.kind == "post" else taken


def known_paths(
    adapter: Adapter, encoders: Mapping[str, Encoder], pairs: Iterable[tuple[str, str]], batch: Batch
) -> tuple[dict[tuple[str, str], Path], dict[tuple[str, str], str]]:
    """The ways between pairs of hooks, and for the others the reason why none is known.

    On the first prompts is looked up whether layers are what their weights say.
    """
    paths: dict[tuple[str, str], Path] = {}
    reasons: dict[tuple[str, str], str] = {}
    for pair in pairs:
        try:
            path = Path.of(adapter, *(encoders[hook] for hook in pair))
            _check_shown(adapter, path, batch)
            paths[pair] = path
        except ModelError as error:
            reasons[pair] = str(error)
    if any(path.steps for path in paths.values()) and (failure := _failure(adapter, batch)):
        reasons |= {pair: failure for pair, path in paths.items() if path.steps}
    return {pair: path for pair, path in paths.items() if pair not in reasons}, reasons


def _failure(adapter: Adapter, batch: Batch) -> str | None:
    try:
        failed = closure_report(adapter, batch.tokens, batch.mask).first_failure
    except ModelError as error:
        return str(error)
    return (
        None if failed is None else f"the layers of {adapter.architecture} aren't what their weights say ({failed[0]})"
    )


def _check_shown(adapter: Adapter, path: Path, batch: Batch) -> None:
    """ModelError where the child reads a norm's output that isn't what its weights say."""
    end = place_of(path.child.hook)
    if end.kind == "normed":
        some = first_prompts(batch, 1)
        layers = Layers(adapter, adapter.run(some.tokens, some.mask, path.wanted()), some.mask)
        layers.norm_shown(end, path.child.hook)
