"""Cross-layer transcoders (CLTs): features that read one layer and write to the MLP outputs of it and of later ones.

    z_l = act(W_enc_l x_l + b_l)         mlp_out_m ~ sum over l <= m of z_l W_dec_l[:, m - l] + b_m

Each layer is an SAE of its own here, at the hook that it reads, whose `W_dec` has one more axis: the outputs in
`hook_outs` (Ameisen et al. 2025, Circuit Tracing; layout of circuit-tracer's `CrossLayerTranscoder`).
"""

import re
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_circuitlasso.errors import InputError

OUTPUT = re.compile(r"blocks\.(\d+)\.hook_mlp_out\Z")


@dataclass(frozen=True, eq=False)
class CrossLayer:
    """One layer of a cross-layer transcoder: code = x W_enc + b_enc where that is above `threshold`, else 0.

    W_enc: (width, feature); W_dec: what a feature writes to each of `hook_outs`, MLP outputs in the order of
    computation; threshold: one number or one a feature, 0 for ReLU.

    >>> outs = ("blocks.0.hook_mlp_out", "blocks.1.hook_mlp_out")
    >>> layer = CrossLayer(torch.eye(2), torch.zeros(2), torch.ones(2, 2, 2), outs)
    >>> layer.encode(torch.tensor([[1.0, -1.0]])).tolist()
    [[1.0, 0.0]]
    """

    W_enc: Float[Tensor, "width feature"]
    b_enc: Float[Tensor, " feature"]
    W_dec: Float[Tensor, "feature out width"]
    hook_outs: tuple[str, ...]
    threshold: float | Float[Tensor, " feature"] = 0.0

    def encode(self, x: Float[Tensor, "*sample width"]) -> Float[Tensor, "*sample feature"]:
        """The codes of what stands at the hook that the layer reads."""
        pre = x @ self.W_enc + self.b_enc
        return torch.where(pre > self.threshold, pre, 0.0).clamp(min=0.0)


def is_whole(saes: Any) -> bool:
    """Whether this is a transcoder of all layers, as circuit-tracer keeps it."""
    return all(hasattr(saes, name) for name in ("encode_layer", "feature_input_hook", "n_layers"))


def layers_of(transcoder: Any) -> dict[str, CrossLayer]:
    """A circuit-tracer `CrossLayerTranscoder` layer by layer, by the hook that each reads; weights are shared.

    Raises
    ------
    InputError: weights that are still on disk, a skip connection, or an activation function that isn't known.
    """
    for name in ("W_enc", "W_dec"):
        if getattr(transcoder, name, None) is None:
            option = "lazy_encoder" if name == "W_enc" else "lazy_decoder"
            raise InputError(f"`saes`: {name} of the cross-layer transcoder isn't loaded: load it with {option}=False")
    if getattr(transcoder, "W_skip", None) is not None:
        raise InputError(
            "`saes`: the cross-layer transcoder has a skip connection from what it reads, and it isn't known what its "
            "features do to each other then: give one without"
        )
    count = int(transcoder.n_layers)
    outs = tuple(f"blocks.{layer}.{transcoder.feature_output_hook}" for layer in range(count))
    levels = _thresholds(transcoder.activation_function, count)
    return {
        f"blocks.{layer}.{transcoder.feature_input_hook}": CrossLayer(
            transcoder.W_enc[layer].detach().T,
            transcoder.b_enc[layer].detach(),
            transcoder.W_dec[layer].detach(),
            outs[layer:],
            levels[layer],
        )
        for layer in range(count)
    }


def _thresholds(function: Any, count: int) -> list[float | Tensor]:
    if function in (torch.relu, torch.nn.functional.relu) or isinstance(function, torch.nn.ReLU):
        return [0.0] * count
    threshold = getattr(function, "threshold", None)
    if not isinstance(threshold, Tensor) or len(threshold) != count:
        raise InputError(
            "`saes`: the activation function of the cross-layer transcoder is neither ReLU nor JumpReLU with a "
            "threshold for each layer: give its layers as tcl.CrossLayer objects, or objects with an `encode` of their "
            "own"
        )
    return [threshold[layer].detach().flatten() for layer in range(count)]
