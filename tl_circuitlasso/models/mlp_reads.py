"""What an MLP makes of a feature: its mean linear response, summed while codes are collected.

    E_i[J] = sum_m z_mi J_m / sum_m z_mi

where J_m is the MLP's Jacobian at sample m, the derivative of its norm included. For an MLP with the folded weights of
`weights.MLP`, a norm of scale s and normalised input n = x / s of width w,

    J d = [act'(pre) * (d W_in - (pre - b_in) (n . d) / w)] W_out / s

and likewise with both factors of a gated one. So all that must be summed for each feature is z act'(pre) / s over the
neurons, and z (n . d_i) times one vector of the stream: sparse codes times dense activations of the forward pass that
makes the codes. The second sum keeps to d_i, whatever has become of it in front of the MLP.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_circuitlasso.models.adapter import Adapter
from tl_circuitlasso.models.architecture import norm_at
from tl_circuitlasso.models.codes import Codes


def wanted(adapter: Adapter, layer: int) -> set[str]:
    """The activations that the sums of a layer are made of."""
    gated = ("mlp_linear",) if adapter.shape.gated else ()
    stream = ("resid_pre",) if adapter.shape.parallel else ("resid_post", "mlp_out")
    return {f"{kind}.{layer}" for kind in ("mlp_pre", *gated, "scale.mlp", "scale.mlp_out", *stream)}


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
        return dict(vars(self))

    def mean(self, name: str, features: Int[Tensor, " kept"]) -> Float[Tensor, "kept width"]:
        """A feature's mean of `slopes` or `linear`; where it never fired, that of all samples."""
        mass = self.mass[features][:, None]
        return torch.where(mass > 0, getattr(self, name)[features] / mass.clamp(min=1e-30), self.overall(name))

    def overall(self, name: str) -> Float[Tensor, " width"]:
        """The mean of `slopes` or `linear` over all samples alike."""
        return getattr(self, f"mean_{name}") / self.count.clamp(min=1)

    def add(
        self,
        adapter: Adapter,
        layer: int,
        dense: Float[Tensor, "sample feature"],
        codes: Codes,
        acts: Mapping[str, Tensor],
        rows: tuple[Tensor, ...],
        directions: Float[Tensor, "feature d_model"],
    ) -> None:
        """Take in the codes of some samples, dense and not, which are the `rows` of the activations."""
        sparse = codes if dense.device.type == "cpu" else None  # an accelerator multiplies dense codes faster
        slopes = _slopes(adapter, acts, layer, rows)
        self.mass += dense.sum(0)
        self.count += len(dense)
        for name in ("slopes", "linear"):
            values = getattr(slopes, name)
            getattr(self, name).add_(_product(dense, sparse, values))
            getattr(self, f"mean_{name}").add_(values.sum(0))
        if slopes.back is not None and slopes.normed is not None:
            self.radial.add_(_radial(dense, sparse, slopes.normed, directions.to(slopes.normed), slopes.back))

    def answer(
        self, adapter: Adapter, layer: int, response: Float[Tensor, "kept d_model"], features: Int[Tensor, " kept"]
    ) -> Float[Tensor, "kept d_model"]:
        """What the MLP adds to what has become of each feature, where it fires."""
        change = _moved(adapter, layer, response, self.mean("slopes", features), self.mean("linear", features))
        back = self.radial[features] / self.mass[features][:, None].clamp(min=1e-30)
        return change - torch.where(self.mass[features][:, None] > 0, back, 0.0)

    def answer_anywhere(
        self, adapter: Adapter, layer: int, response: Float[Tensor, "kept d_model"]
    ) -> Float[Tensor, "kept d_model"]:
        """The same at any sample, whatever fires there."""
        return _moved(adapter, layer, response, self.overall("slopes"), self.overall("linear"))


def _moved(
    adapter: Adapter,
    layer: int,
    change: Float[Tensor, "kept d_model"],
    slopes: Float[Tensor, "*kept d_mlp"],
    linear: Float[Tensor, "*kept second"],
) -> Float[Tensor, "kept d_model"]:
    mlp = adapter.mlp(layer)
    gate = mlp.w_in if mlp.w_gate is None else mlp.w_gate
    moved = (change @ gate.float()) * slopes
    if mlp.w_gate is not None:
        moved = moved + (change @ mlp.w_in.float()) * linear
    return moved @ mlp.w_out.float()


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


def _product(
    dense: Float[Tensor, "sample feature"], sparse: Codes | None, values: Float[Tensor, "sample column"]
) -> Float[Tensor, "feature column"]:
    """codes' values."""
    return dense.T @ values if sparse is None else torch.from_numpy(sparse.matrix().T @ values.numpy())


def _radial(
    dense: Float[Tensor, "sample feature"],
    sparse: Codes | None,
    normed: Float[Tensor, "sample d_model"],
    directions: Float[Tensor, "feature d_model"],
    back: Float[Tensor, "sample d_model"],
) -> Float[Tensor, "feature d_model"]:
    """sum over samples of z (n . d) times `back`."""
    if sparse is None:
        return (dense * (normed @ directions.T)).T @ back
    along = torch.einsum("ed,ed->e", normed[sparse.row], directions[sparse.columns.long()])
    return torch.from_numpy(sparse.matrix(sparse.values * along).T @ back.numpy())
