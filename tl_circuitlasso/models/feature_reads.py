"""What the MLPs between two hooks make of a feature: mean linear responses, summed while codes are collected.

Feature i adds z_i d_i to the residual stream. Behind the MLPs on the way to a later hook that has become z_i r_i, with

    r_i = d_i + sum over MLPs of E_i[J] r_i,        E_i[J] = sum_m z_mi J_m / sum_m z_mi

where J_m is the MLP's Jacobian at sample m, the derivative of its norm included. For an MLP with the folded weights of
`weights.MLP`, a norm of scale s and normalised input n = x / s of width w,

    J d = [act'(pre) * (d W_in - (pre - b_in) (n . d) / w)] W_out / s

and likewise with both factors of a gated one. So all that must be summed for each feature is z act'(pre) / s over the
neurons, and z (n . d_i) times one vector of the stream: sparse codes times dense activations of the forward pass that
makes the codes. Several MLPs follow one another with the product of their means in place of the mean of their product,
and the second sum keeps to d_i; attention is left out: what it brings of a feature from its own position is small.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_circuitlasso import storage
from tl_circuitlasso.errors import ModelError
from tl_circuitlasso.models.adapter import Adapter
from tl_circuitlasso.models.architecture import norm_at
from tl_circuitlasso.models.closure import closure_report
from tl_circuitlasso.models.encoder import Encoder
from tl_circuitlasso.models.hook_order import reads_stream, stream_place
from tl_circuitlasso.models.tokens import Batch
from tl_circuitlasso.sharing import Ranks

SAMPLES = 1 << 14  # summed over; more change next to nothing
KIND = "feature reads"
SUMS = ("slopes", "linear", "radial", "mass", "mean_slopes", "mean_linear", "count")


@dataclass(eq=False)
class Sums:
    """What is summed of one parent and one layer, in float32 on the model's device.

    slopes, linear: z times the slope of the activation function, and (gated MLPs) of the other factor, over the scale;
    radial: z (n . d) times what the norm takes back; mean_slopes, mean_linear, count: over all samples alike.
    """

    slopes: Float[Tensor, "feature d_mlp"]
    linear: Float[Tensor, "feature second"]
    radial: Float[Tensor, "feature d_model"]
    mass: Float[Tensor, " feature"]
    mean_slopes: Float[Tensor, " d_mlp"]
    mean_linear: Float[Tensor, " second"]
    count: Float[Tensor, ""]

    @classmethod
    def empty(cls, adapter: Adapter, features: int) -> "Sums":
        """No samples yet."""
        shape = adapter.shape
        second = shape.d_mlp if shape.gated else 0
        sizes = ((features, shape.d_mlp), (features, second), (features, shape.d_model), (features,), (shape.d_mlp,))
        return cls(*(torch.zeros(size, device=adapter.device) for size in (*sizes, (second,), ())))

    def tensors(self) -> dict[str, Tensor]:
        """All of them by name."""
        return {name: getattr(self, name) for name in SUMS}

    def mean(self, name: str, features: Int[Tensor, " kept"]) -> Float[Tensor, "kept width"]:
        """A feature's mean of `slopes` or `linear`; where it never fired, that of all samples."""
        mass = self.mass[features][:, None]
        overall = getattr(self, f"mean_{name}") / self.count.clamp(min=1)
        return torch.where(mass > 0, getattr(self, name)[features] / mass.clamp(min=1e-30), overall)


@dataclass(eq=False)
class Reads:
    """The sums of all parents whose features pass an MLP on their way to a child.

    layers: by parent, the MLPs on the way to its children; sums: by parent and layer; samples: how many are in them;
    loaded: whether they are those of an earlier run, to which nothing is added; seconds: what summing took.
    """

    adapter: Adapter
    encoders: Mapping[str, Encoder]
    layers: Mapping[str, Sequence[int]]
    limit: int = SAMPLES
    samples: int = 0
    loaded: bool = False
    seconds: float = 0.0
    sums: dict[tuple[str, int], Sums] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for hook, layers in self.layers.items():
            for layer in layers:
                self.sums.setdefault((hook, layer), Sums.empty(self.adapter, self.encoders[hook].features))

    @property
    def wants_more(self) -> bool:
        """Whether the samples are still too few."""
        return bool(self.sums) and not self.loaded and self.samples < self.limit

    def wanted(self) -> set[str]:
        """The activations that the sums are made of."""
        gated = ("mlp_linear",) if self.adapter.shape.gated else ()
        stream = ("resid_pre",) if self.adapter.shape.parallel else ("resid_post", "mlp_out")
        kinds = ("mlp_pre", *gated, "scale.mlp", "scale.mlp_out", *stream)
        return {f"{kind}.{layer}" for _, layer in self.sums for kind in kinds}

    def add(
        self, hook: str, codes: Float[Tensor, "sample feature"], acts: Mapping[str, Tensor], rows: tuple[Tensor, ...]
    ) -> None:
        """Take in the codes of some samples, which are the `rows` of the activations."""
        clock = time.perf_counter()
        sparse = _csr(codes) if codes.device.type == "cpu" else None
        for layer in self.layers.get(hook, ()):
            slopes = _slopes(self.adapter, acts, layer, rows)
            total = self.sums[hook, layer]
            total.mass += codes.sum(0)
            total.count += len(codes)
            for name in ("slopes", "linear"):
                values = getattr(slopes, name)
                getattr(total, name).add_(_product(codes, sparse, values))
                getattr(total, f"mean_{name}").add_(values.sum(0))
            if slopes.back is not None and slopes.normed is not None:
                directions = self.encoders[hook].written.to(slopes.normed)
                total.radial.add_(_radial(codes, sparse, slopes.normed, directions, slopes.back))
        self.seconds += time.perf_counter() - clock

    def add_up(self, ranks: Ranks) -> None:
        """The sums of all processes, on each of them."""
        for total in self.sums.values():
            for x in total.tensors().values():
                ranks.add_up(x)

    def save(self, path: Path, identity: Mapping[str, Any]) -> None:
        """Keep the sums in a file, for a run that resumes."""
        named = {
            f"{hook}/{layer}/{name}": x for (hook, layer), s in self.sums.items() for name, x in s.tensors().items()
        }
        storage.write_tensors(
            path, named, {"kind": KIND, "identity": self._identity(identity), "samples": self.samples}
        )

    def load(self, path: Path, identity: Mapping[str, Any]) -> None:
        """Take over the sums that a file holds, if it is there and they are of these hooks, SAEs and layers."""
        if not self.sums or not path.exists():
            return
        tensors, data = storage.read_tensors(path, KIND)
        if data.get("identity") == self._identity(identity):
            for (hook, layer), total in self.sums.items():
                for name, x in total.tensors().items():
                    x.copy_(tensors[f"{hook}/{layer}/{name}"])
            self.samples, self.loaded = int(data["samples"]), True

    def _identity(self, identity: Mapping[str, Any]) -> dict[str, Any]:
        layers = {hook: list(some) for hook, some in self.layers.items()}
        return {**identity, "layers": layers, "limit": self.limit}

    def responses(self, parent: str, child: str, features: Int[Tensor, " kept"]) -> Float[Tensor, "kept d_model"]:
        """r_i of some features at the child's hook: what a code of 1 has become of there, on the CPU."""
        response = self.encoders[parent].written.to(self.adapter.device)[features.to(self.adapter.device)]
        for layer in mlps_between(self.adapter, self.encoders[parent].hook_out, child):
            if (parent, layer) in self.sums:
                response = response + self._through(parent, layer, response, features.to(response.device))
        return response.cpu()

    def _through(
        self, parent: str, layer: int, response: Float[Tensor, "kept d_model"], features: Int[Tensor, " kept"]
    ) -> Float[Tensor, "kept d_model"]:
        mlp, total = self.adapter.mlp(layer), self.sums[parent, layer]
        gate = mlp.w_in if mlp.w_gate is None else mlp.w_gate
        change = (response @ gate.float()) * total.mean("slopes", features)
        if mlp.w_gate is not None:
            change = change + (response @ mlp.w_in.float()) * total.mean("linear", features)
        back = total.radial[features] / total.mass[features][:, None].clamp(min=1e-30)
        return change @ mlp.w_out.float() - torch.where(total.mass[features][:, None] > 0, back, 0.0)


def reads_of(
    adapter: Adapter, encoders: Mapping[str, Encoder], pairs: Sequence[tuple[str, str]], batch: Batch, room: int | None
) -> Reads:
    """What to sum for the pairs: nothing where the MLPs can't be read as above, or the sums don't fit into `room`."""
    layers = {parent: _layers(adapter, encoders, parent, pairs) for parent in dict.fromkeys(p for p, _ in pairs)}
    layers = {parent: some for parent, some in layers.items() if some}
    shape = adapter.shape
    width = shape.d_mlp * (2 if shape.gated else 1) + shape.d_model
    need = sum(4 * encoders[parent].features * width * len(some) for parent, some in layers.items())
    fits = room is None or need <= room
    return Reads(adapter, encoders, layers if layers and fits and _readable(adapter, batch, layers) else {})


def mlps_between(adapter: Adapter, written: str, read: str) -> range:
    """The layers whose MLP stands between a hook that writes to the residual stream and a later one that reads it."""
    start, end = stream_place(written), stream_place(read)
    if start is None or end is None or not reads_stream(read) or adapter.shape.attn_only:
        return range(0)
    first, inside = divmod(start, 3)
    return range(first if inside <= (not adapter.shape.parallel) else first + 1, end // 3 + (end % 3 == 2))


def _layers(
    adapter: Adapter, encoders: Mapping[str, Encoder], parent: str, pairs: Sequence[tuple[str, str]]
) -> tuple[int, ...]:
    """All MLPs that stand between a parent and any of its children."""
    written = encoders[parent].hook_out
    found = {layer for p, child in pairs if p == parent and child in encoders
             for layer in mlps_between(adapter, written, child)}  # fmt: skip
    same = encoders[parent].width == adapter.shape.d_model
    return tuple(sorted(found)) if same else ()


def _readable(adapter: Adapter, batch: Batch, layers: Mapping[str, Sequence[int]]) -> bool:
    """Whether the MLPs are what their folded weights say, as looked up on the first prompts."""
    try:
        ready = all(adapter.mlp(layer).elementwise for some in layers.values() for layer in some)
        return ready and closure_report(adapter, batch.tokens, batch.mask).first_failure is None
    except ModelError:
        return False


@dataclass(frozen=True, eq=False)
class _Slopes:
    """An MLP's slopes over its scale at some samples; `normed` and `back` are None where it has no norm."""

    slopes: Float[Tensor, "sample d_mlp"]
    linear: Float[Tensor, "sample second"]
    normed: Float[Tensor, "sample d_model"] | None
    back: Float[Tensor, "sample d_model"] | None


def _slopes(adapter: Adapter, acts: Mapping[str, Tensor], layer: int, rows: tuple[Tensor, ...]) -> _Slopes:
    mlp, pre = adapter.mlp(layer), acts[f"mlp_pre.{layer}"][rows]
    scale = acts[f"scale.mlp.{layer}"][rows]
    over = scale * acts[f"scale.mlp_out.{layer}"][rows]
    slopes, linear = mlp.act_grad(pre), pre[:, :0]
    bias = mlp.b_in if mlp.b_gate is None else mlp.b_gate
    turned = (pre - bias) * slopes
    if mlp.w_gate is not None:
        other = acts[f"mlp_linear.{layer}"][rows]
        slopes, linear = slopes * other, mlp.act(pre)
        turned = (pre - bias) * slopes + (other - mlp.b_in) * linear
    norm = norm_at(adapter.model, layer, adapter.layouts[layer].mlp_norm, adapter.compute_dtype)
    normed = back = None
    if norm is not None:
        x = _stream(adapter, acts, layer)[rows]
        normed = (x - x.mean(-1, keepdim=True) if norm.centred else x) / scale
        back = turned @ mlp.w_out / over / x.shape[1]
    return _Slopes(*(None if x is None else x.float() for x in (slopes / over, linear / over, normed, back)))  # type: ignore[arg-type]


def _stream(adapter: Adapter, acts: Mapping[str, Tensor], layer: int) -> Float[Tensor, "batch pos d_model"]:
    """What the MLP of a layer reads."""
    if adapter.shape.parallel:
        return acts[f"resid_pre.{layer}"]
    return acts[f"resid_post.{layer}"] - acts[f"mlp_out.{layer}"]


def _csr(codes: Float[Tensor, "sample feature"]) -> Any:
    rows, columns = codes.nonzero(as_tuple=True)
    starts = np.concatenate([[0], np.cumsum(np.bincount(rows.numpy(), minlength=len(codes)))])
    values = codes[rows, columns].float().numpy()
    return scipy.sparse.csr_matrix((values, columns.int().numpy(), starts), tuple(codes.shape))


def _product(codes: Tensor, sparse: Any, values: Float[Tensor, "sample column"]) -> Float[Tensor, "feature column"]:
    """codes' values."""
    return codes.float().T @ values if sparse is None else torch.from_numpy(sparse.T @ values.numpy())


def _radial(
    codes: Float[Tensor, "sample feature"],
    sparse: Any,
    normed: Float[Tensor, "sample d_model"],
    directions: Float[Tensor, "feature d_model"],
    back: Float[Tensor, "sample d_model"],
) -> Float[Tensor, "feature d_model"]:
    """sum over samples of z (n . d) times `back`."""
    if sparse is None:
        return (codes.float() * (normed @ directions.T)).T @ back
    rows = torch.from_numpy(np.repeat(np.arange(len(codes)), np.diff(sparse.indptr)))
    columns = torch.from_numpy(sparse.indices).long()
    along = torch.einsum("ed,ed->e", normed[rows], directions[columns])
    scaled = scipy.sparse.csr_matrix((sparse.data * along.numpy(), sparse.indices, sparse.indptr), sparse.shape)
    return torch.from_numpy(scaled.T @ back.numpy())
