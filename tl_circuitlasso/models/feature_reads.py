"""What the layers between two hooks make of a feature: what a code of 1 has become of at the later hook.

Feature i adds z_i d_i to the residual stream. Behind the MLPs on the way to a later hook that has become z_i r_i, with

    r_i = d_i + sum over MLPs of E_i[J] r_i,        E_i[J] = sum_m z_mi J_m / sum_m z_mi

as `mlp_reads` has it; several MLPs follow one another with the product of their means in place of the mean of their
product. What attention brings of a feature from its own position is small and left out; what it carries elsewhere is
told by `attention_reads` where children see their parents through it.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_circuitlasso import storage
from tl_circuitlasso.errors import ModelError
from tl_circuitlasso.models.adapter import Adapter
from tl_circuitlasso.models.attention_reads import Attended, Passage, mixed_responses
from tl_circuitlasso.models.closure import closure_report
from tl_circuitlasso.models.codes import Codes
from tl_circuitlasso.models.encoder import Encoder
from tl_circuitlasso.models.hook_order import attention_between, reads_stream, stream_place
from tl_circuitlasso.models.mlp_reads import Sums, wanted
from tl_circuitlasso.models.tokens import Batch
from tl_circuitlasso.sharing import Ranks

SAMPLES = 1 << 14  # summed over; more change next to nothing
KIND = "feature reads"


@dataclass(eq=False)
class Reads:
    """The sums of all parents whose features pass an MLP, or are seen through attention, on their way to a child.

    layers: by parent, the MLPs on the way to its children; heads: likewise the layers through whose attention children
    see it; sums, attended: by parent and layer; samples: how many are in them; loaded: whether they are those of an
    earlier run, to which nothing is added; seconds: what summing took.
    """

    adapter: Adapter
    encoders: Mapping[str, Encoder]
    layers: Mapping[str, Sequence[int]]
    heads: Mapping[str, Sequence[int]] = field(default_factory=dict)
    limit: int = SAMPLES
    samples: int = 0
    loaded: bool = False
    seconds: float = 0.0
    sums: dict[tuple[str, int], Sums] = field(default_factory=dict)
    attended: dict[tuple[str, int], Attended] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.sums.update((key, Sums.empty(self.adapter, width)) for key, width in self._widths(self.layers))
        self.attended.update((key, Attended.empty(self.adapter, width)) for key, width in self._widths(self.heads))

    def _widths(self, layers: Mapping[str, Sequence[int]]) -> Iterator[tuple[tuple[str, int], int]]:
        return (((hook, layer), self.encoders[hook].features) for hook, some in layers.items() for layer in some)

    @property
    def wants_more(self) -> bool:
        """Whether the samples are still too few."""
        return bool(self.sums or self.attended) and not self.loaded and self.samples < self.limit

    def wanted(self) -> set[str]:
        """The activations that the sums are made of."""
        heads = {
            f"{kind}.{layer}" for _, layer in self.attended for kind in ("pattern", "scale.attn", "scale.attn_out")
        }
        return heads.union(*(wanted(self.adapter, layer) for _, layer in self.sums))

    def named(self) -> dict[str, Tensor]:
        """Everything that is summed."""
        parts = (*self.sums.items(), *self.attended.items())
        return {f"{hook}/{layer}/{name}": x for (hook, layer), sums in parts for name, x in sums.tensors().items()}

    def add(
        self,
        hook: str,
        dense: Float[Tensor, "sample feature"],
        codes: Codes,
        acts: Mapping[str, Tensor],
        rows: tuple[Tensor, ...],
    ) -> None:
        """Take in the codes of some samples, dense and not, which are the `rows` of the activations."""
        clock = time.perf_counter()
        for layer in self.layers.get(hook, ()):
            directions = self.encoders[hook].written
            self.sums[hook, layer].add(self.adapter, layer, dense, codes, acts, rows, directions)
        self.seconds += time.perf_counter() - clock

    def attend(
        self,
        hook: str,
        codes: Float[Tensor, "seen feature"],
        acts: Mapping[str, Tensor],
        prompt: int,
        seen: Bool[Tensor, " pos"],
        kept: Bool[Tensor, " pos"],
    ) -> None:
        """Take in the codes of one prompt at all positions that may be seen, as its samples, `kept`, see them."""
        clock = time.perf_counter()
        for layer in self.heads.get(hook, ()):
            pattern = acts[f"pattern.{layer}"][prompt][:, kept][:, :, seen]
            scales = (acts[f"scale.{kind}.{layer}"][prompt, :, 0] for kind in ("attn", "attn_out"))
            self.attended[hook, layer].add(codes, pattern, *(scale[at] for scale, at in zip(scales, (seen, kept))))
        self.seconds += time.perf_counter() - clock

    def add_up(self, ranks: Ranks) -> None:
        """The sums of all processes, on each of them."""
        for x in self.named().values():
            ranks.add_up(x)

    def save(self, path: Path, identity: Mapping[str, Any]) -> None:
        """Keep the sums in a file, for a run that resumes."""
        data = {"kind": KIND, "identity": self._identity(identity), "samples": self.samples}
        storage.write_tensors(path, self.named(), data)

    def load(self, path: Path, identity: Mapping[str, Any]) -> None:
        """Take over the sums that a file holds, if it is there and they are of these hooks, SAEs and layers."""
        if not self.named() or not path.exists():
            return
        tensors, data = storage.read_tensors(path, KIND)
        if data.get("identity") == self._identity(identity):
            for name, x in self.named().items():
                x.copy_(tensors[name])
            self.samples, self.loaded = int(data["samples"]), True

    def _identity(self, identity: Mapping[str, Any]) -> dict[str, Any]:
        layers, heads = ({hook: list(some) for hook, some in found.items()} for found in (self.layers, self.heads))
        return {**identity, "layers": layers, "heads": heads, "limit": self.limit}

    def responses(self, parent: str, child: str, features: Int[Tensor, " kept"]) -> Float[Tensor, "kept d_model"]:
        """r_i of some features at the child's hook: what a code of 1 has become of there, on the CPU."""
        features = features.to(self.adapter.device)
        response = self._written(parent, features)
        for layer in mlps_between(self.adapter, self.encoders[parent].hook_out, child):
            response = self._through(parent, layer, response, features)
        return response.cpu()

    def mixed(
        self, parent: str, child: str, features: Int[Tensor, " kept"], *, by_head: bool
    ) -> list[Float[Tensor, "kept d_model"]]:
        """The same for a unit of what a child sees of a parent through attention, or through each head; else nothing.

        Behind the heads MLPs answer as they do on average over all samples.
        """
        written, features = self.encoders[parent].hook_out, features.to(self.adapter.device)
        ways, mlps = (way(self.adapter, written, child) for way in (heads_between, mlps_between))
        if not ways or any((parent, layer) not in self.attended for layer in ways):
            return []
        response, passages, layers = self._written(parent, features), [], sorted({*ways, *mlps})
        for layer in layers:
            passages += [Passage(layer, self.attended[parent, layer], response)] if layer in ways else []
            response = self._through(parent, layer, response, features) if layer in mlps else response
        columns = mixed_responses(self.adapter, passages, features, by_head=by_head)
        return [self._onward(parent, column, layers, mlps) for column in columns]

    def _onward(
        self, parent: str, brought: Mapping[int, Float[Tensor, "kept d_model"]], layers: Sequence[int], mlps: range
    ) -> Float[Tensor, "kept d_model"]:
        """What has become at the child's hook of what each layer's attention has brought."""
        total = torch.zeros_like(next(iter(brought.values())))
        for layer in layers:
            before = total
            total = total + brought.get(layer, 0.0)
            if layer in mlps and (parent, layer) in self.sums:
                read = before if self.adapter.shape.parallel else total
                total = total + self.sums[parent, layer].answer_anywhere(self.adapter, layer, read)
        return total.cpu()

    def _written(self, parent: str, features: Int[Tensor, " kept"]) -> Float[Tensor, "kept d_model"]:
        return self.encoders[parent].written.to(self.adapter.device)[features].float()

    def _through(
        self, parent: str, layer: int, response: Float[Tensor, "kept d_model"], features: Int[Tensor, " kept"]
    ) -> Float[Tensor, "kept d_model"]:
        """With what an MLP adds where each feature fires; as it is where MLPs can't be read."""
        sums = self.sums.get((parent, layer))
        return response if sums is None else response + sums.answer(self.adapter, layer, response, features)


def reads_of(
    adapter: Adapter,
    encoders: Mapping[str, Encoder],
    pairs: Sequence[tuple[str, str]],
    batch: Batch,
    room: int | None,
    *,
    mixed: bool = False,
) -> Reads:
    """What to sum for the pairs, and where children see their parents through attention (`mixed`) for that, too.

    Nothing where the layers aren't what their folded weights say, as looked up on the first prompts, or where the sums
    don't fit into `room`; nothing of the MLPs where one of them can't be read as above.
    """
    layers = _between(adapter, encoders, pairs, mlps_between)
    heads = _between(adapter, encoders, pairs, heads_between) if mixed else {}
    shape, features = adapter.shape, {parent: encoder.features for parent, encoder in encoders.items()}
    width = shape.d_mlp * (2 if shape.gated else 1) + shape.d_model
    need = sum(4 * features[parent] * width * len(some) for parent, some in layers.items())
    need += sum(8 * features[parent] * shape.n_heads * len(some) for parent, some in heads.items())
    if not (layers or heads) or (room is not None and need > room) or not _closes(adapter, batch):
        return Reads(adapter, encoders, {})
    return Reads(adapter, encoders, layers if _elementwise(adapter, layers) else {}, heads)


def mlps_between(adapter: Adapter, written: str, read: str) -> range:
    """The layers whose MLP stands between a hook that writes to the residual stream and a later one that reads it."""
    start, end = stream_place(written), stream_place(read)
    if start is None or end is None or not reads_stream(read) or adapter.shape.attn_only:
        return range(0)
    first, inside = divmod(start, 3)
    return range(first if inside <= (not adapter.shape.parallel) else first + 1, end // 3 + (end % 3 == 2))


def heads_between(adapter: Adapter, written: str, read: str) -> range:
    """The layers whose attention carries what is written to the residual stream to a later hook that reads it."""
    if stream_place(written) is None or not reads_stream(read):
        return range(0)
    return attention_between(written, read, adapter.shape.n_layers)


def _between(
    adapter: Adapter,
    encoders: Mapping[str, Encoder],
    pairs: Sequence[tuple[str, str]],
    way: Callable[[Adapter, str, str], range],
) -> dict[str, tuple[int, ...]]:
    """By parent, all layers that stand between it and any of its children."""
    found: dict[str, set[int]] = {}
    for parent, child in pairs:
        if child in encoders and encoders[parent].width == adapter.shape.d_model:
            found.setdefault(parent, set()).update(way(adapter, encoders[parent].hook_out, child))
    return {parent: tuple(sorted(layers)) for parent, layers in found.items() if layers}


def _closes(adapter: Adapter, batch: Batch) -> bool:
    """Whether layers are what their folded weights say, as looked up on the first prompts."""
    try:
        return closure_report(adapter, batch.tokens, batch.mask).first_failure is None
    except ModelError:
        return False


def _elementwise(adapter: Adapter, layers: Mapping[str, Sequence[int]]) -> bool:
    """Whether every neuron of these MLPs has a slope of its own."""
    try:
        return all(adapter.mlp(layer).elementwise for some in layers.values() for layer in some)
    except ModelError:
        return False
