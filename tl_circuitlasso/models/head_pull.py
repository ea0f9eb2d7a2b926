"""From what moves attention scores back to what a head projects: scale, soft cap, rotation and norms, transposed.

Sweeps differ in which runs they hold beside each other, and where they look; how a head is made is the same for all.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_circuitlasso.models.adapter import Adapter
from tl_circuitlasso.models.views import secant
from tl_circuitlasso.models.weights import Port, repeat_heads

EVERY = slice(None)


def score_slope(
    adapter: Adapter, layer: int, sides: Callable[[Port], tuple[Tensor, Tensor]], heads: slice = EVERY
) -> Tensor | float:
    """Change of a score per change of q . k: one over the scale, times the secant of a soft cap if there is one.

    sides: the queries or keys of both runs, (pair pos head d_head); asked for only where there is a cap.
    """
    scale, cap = adapter.attn_scale(layer), adapter.attn_soft_cap
    if cap is None:
        return 1 / scale
    scores = []
    for q, k in zip(sides("q"), sides("k")):
        keys = repeat_heads(k.movedim(2, 0), adapter.shape.n_heads)[heads].movedim(0, 1)
        scores.append(q[:, :, heads].transpose(1, 2) @ keys.mT / scale)
    return secant(lambda score: cap * torch.tanh(score / cap), *scores)[:, None] / scale


def unrotated(
    adapter: Adapter,
    layer: int,
    n: Float[Tensor, "pair direction head pos d_head"],
    positions: Int[Tensor, "pair pos"],
    inverse: Float[Tensor, "pair pos group 1"],
    heads: slice = EVERY,
) -> Float[Tensor, "pair direction head pos d_head"]:
    """From rotated and normalised queries or keys back to what the head projects.

    inverse: one over the scale of their norm, by head, by group of heads that share it, or one for all.
    """
    n = adapter.rotate(n.transpose(2, 3), positions, layer, back=True).transpose(2, 3)
    shared = inverse.shape[2] not in (1, adapter.shape.n_heads)
    scale = repeat_heads(inverse.movedim(2, 0), adapter.shape.n_heads).movedim(0, 2) if shared else inverse
    scale = scale if scale.shape[2] == 1 else scale[:, :, heads]
    return n * scale.transpose(1, 2).unsqueeze(1)
