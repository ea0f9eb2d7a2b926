"""Normalisation layers as linear maps: y = ((x - mean(x)) / scale) * gain + bias, given the scale.

The scale is one number per token (per head for a query/key norm); everything else is linear and can be folded into
the weights in front of or behind the norm. Centring, gain and bias are told apart here for every kind of norm.
"""

from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_circuitlasso.errors import ModelError
from tl_circuitlasso.models.hooks import is_a

# Whether a module centres, and whether its weight means `1 + w`: found once, it stays true when the weights change.
_KINDS: WeakKeyDictionary[Any, tuple[bool, bool]] = WeakKeyDictionary()
_REMEDY = "use `design='activation'`, which doesn't need it, or another model"


@dataclass(frozen=True, eq=False)
class Norm:
    """y = ((x - centred * mean(x)) / scale) * gain + bias with scale = sqrt(mean((x - centred * mean(x))^2) + eps).

    `gain` and `bias` are None where the norm has none (as after folding them into the next layer).
    """

    centred: bool
    gain: Float[Tensor, "..."] | None
    bias: Float[Tensor, "width"] | None
    eps: float

    def to(self, device: torch.device) -> "Norm":
        """The same norm on another device."""
        gain, bias = (None if part is None else part.to(device) for part in (self.gain, self.bias))
        return replace(self, gain=gain, bias=bias)


def read_norm(module: nn.Module | None, dtype: torch.dtype) -> Norm | None:
    """The norm that `module` computes, or None where it is missing or the identity.

    Raises ModelError for a module that isn't a norm of the form above.
    """
    if module is None or isinstance(module, nn.Identity):
        return None
    if is_a(module, "LayerNorm", "LayerNormPre", "RMSNorm", "RMSNormPre"):
        return _read_hooked_norm(module, dtype)
    inner = getattr(module, "original_component", None)
    if inner is None or isinstance(inner, nn.Identity):
        return None
    return _probe(inner, dtype)


def _read_hooked_norm(module: Any, dtype: torch.dtype) -> Norm:
    centred = is_a(module, "LayerNorm", "LayerNormPre")
    gain, bias = getattr(module, "w", None), getattr(module, "b", None)
    return Norm(centred, _as(gain, dtype), _as(bias, dtype), float(module.eps))


def _as(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.detach().to(dtype)


def _probe(inner: Any, dtype: torch.dtype) -> Norm:
    """Tell a Hugging Face norm's centring, and whether its weight means `w` or `1 + w`, by what it does.

    The weights themselves are read, not measured: a bfloat16 norm answers with three digits only.
    """
    weight, bias, eps = getattr(inner, "weight", None), getattr(inner, "bias", None), _eps(inner)

    def norm(centred: bool, offset: bool) -> Norm:
        return Norm(centred, _gain(weight, offset, dtype), _as(bias, dtype), eps)

    if inner in _KINDS:
        return norm(*_KINDS[inner])
    kinds = [(c, offset) for c in (False, True) for offset in ((False, True) if weight is not None else (False,))]
    try:
        probe, answer = _ask(inner, weight)
    except (RuntimeError, TypeError) as error:
        raise ModelError(f"the norm {type(inner).__name__} can't be read; {_REMEDY}") from error
    errors = [_distance(apply_norm(norm(*kind), probe.to(dtype)), answer.to(dtype)) for kind in kinds]
    best = min(range(len(kinds)), key=errors.__getitem__)
    if not errors[best] < 0.05:
        raise ModelError(
            f"the norm {type(inner).__name__} is neither LayerNorm nor RMSNorm (relative error {errors[best]:.2g}), so "
            f"its readers can't be linearised; {_REMEDY}"
        )
    _KINDS[inner] = kinds[best]
    return norm(*kinds[best])


def _eps(inner: Any) -> float:
    for name in ("eps", "variance_epsilon", "epsilon"):
        value = getattr(inner, name, None)
        if value is not None:
            return float(value)
    return 1e-5


def _gain(weight: Tensor | None, offset: bool, dtype: torch.dtype) -> Tensor | None:
    if weight is None:
        return None
    return weight.detach().to(dtype) + (1.0 if offset else 0.0)


def _ask(inner: Any, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    if weight is None:
        shape = tuple(getattr(inner, "normalized_shape", (64,)))
        probe = torch.empty(4, *shape)
    else:
        probe = torch.empty(4, *weight.shape, device=weight.device, dtype=weight.dtype)
    generator = torch.Generator().manual_seed(0)
    values = 3.0 + 2.0 * torch.randn(probe.shape, generator=generator)  # off centre: LayerNorm and RMSNorm differ
    probe.copy_(values)
    with torch.no_grad():
        return probe, inner(probe)


def _distance(mine: Tensor, theirs: Tensor) -> float:
    return float((mine - theirs).norm() / theirs.norm().clamp_min(1e-30))


def scale_of(x: Float[Tensor, "*batch width"], norm: Norm) -> Float[Tensor, "*batch 1"]:
    """The divisor sqrt(mean(x^2) + eps), of the centred x for a centring norm."""
    if norm.centred:
        x = x - x.mean(-1, keepdim=True)
    return (x.square().mean(-1, keepdim=True) + norm.eps).sqrt()


def apply_norm(norm: Norm, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
    """What the norm computes."""
    y = (x - x.mean(-1, keepdim=True) if norm.centred else x) / scale_of(x, norm)
    y = y if norm.gain is None else y * norm.gain
    return y if norm.bias is None else y + norm.bias


def fold_behind(
    norm: Norm | None, weight: Float[Tensor, "*head d_in d_out"], bias: Float[Tensor, "*head d_out"]
) -> tuple[Float[Tensor, "*head d_in d_out"], Float[Tensor, "*head d_out"]]:
    """Fold the norm into the linear layer that reads it: norm(x) @ weight + bias = (x @ weight') / scale + bias'."""
    if norm is None:
        return weight, bias
    if norm.bias is not None:
        bias = bias + norm.bias @ weight
    if norm.gain is not None:
        weight = weight * norm.gain[:, None]
    if norm.centred:
        weight = weight - weight.mean(-2, keepdim=True)
    return weight, bias


def fold_ahead(norm: Norm | None, weight: Float[Tensor, "*axes d_out"]) -> Float[Tensor, "*axes d_out"]:
    """Fold the norm into the layer (or bias) whose output it normalises: norm(y @ weight) = (y @ weight') / scale."""
    if norm is None:
        return weight
    if norm.bias is not None and bool(norm.bias.any()):
        raise ModelError("a norm with a bias behind attention or MLP is not supported; use `design='activation'`")
    if norm.centred:
        weight = weight - weight.mean(-1, keepdim=True)
    return weight if norm.gain is None else weight * norm.gain
