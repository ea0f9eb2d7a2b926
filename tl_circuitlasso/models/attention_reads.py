"""What attention makes of a feature elsewhere: its mean response through the heads' values, by the patterns seen.

Where feature i fires at positions q, the column of a regression is z~_mi = sum_q P[p, q] z_i(q), and head h writes

    sum_q P_h[p, q] z_i(q) / (s(q) s'(p)) d_i W_V^h W_O^h

at p, with s and s' the scales of the norms before and behind the heads. Per unit of z~ that is, on average,

    a_ih d_i W_V^h W_O^h,      a_ih = sum_{p,q} P_h[p, q] z_i(q) / (s(q) s'(p)) / sum_{p,q} P[p, q] z_i(q)

P is the pattern that the column is made with: the head's own, or the mean of all heads (and layers) on the way. So all
that must be summed are two numbers for each feature and head. Left out: that patterns change, too, the derivative of
the norm, and attention to what attention has brought.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_circuitlasso.models.adapter import Adapter


@dataclass(eq=False)
class Attended:
    """What is summed of one parent and one layer, in float32 on the model's device.

    moved: sum of P_h z_i over both scales; seen: the same without scales. Both are added to in place.
    """

    moved: Float[Tensor, "feature head"]
    seen: Float[Tensor, "feature head"]

    @classmethod
    def empty(cls, adapter: Adapter, features: int) -> "Attended":
        """No samples yet."""
        return cls(*torch.zeros(2, features, adapter.shape.n_heads, device=adapter.device))

    def tensors(self) -> dict[str, Tensor]:
        """Both of them by name."""
        return dict(vars(self))

    def add(
        self,
        codes: Float[Tensor, "seen feature"],
        pattern: Float[Tensor, "head kept seen"],
        scale: Float[Tensor, " seen"],
        behind: Float[Tensor, " kept"],
    ) -> None:
        """Take in one prompt: `scale` of the norm at the positions that are seen, `behind` where they are seen from."""
        weights = codes.float().T
        self.moved += weights @ ((pattern / behind[:, None]).sum(1) / scale).T.float()
        self.seen += weights @ pattern.sum(1).T.float()


@dataclass(frozen=True, eq=False)
class Passage:
    """A layer whose attention is on the way: what was summed, and what has become of each feature in front of it."""

    layer: int
    sums: Attended
    response: Float[Tensor, "kept d_model"]


def mixed_responses(
    adapter: Adapter, passages: Sequence[Passage], features: Int[Tensor, " kept"], *, by_head: bool
) -> Iterator[dict[int, Float[Tensor, "kept d_model"]]]:
    """Per column of a regression (one, or one for each head), what attention writes for a unit of it, by layer.

    A feature that nothing has attended to is written nowhere.
    """
    heads = range(adapter.shape.n_heads)
    for column in [[head] for head in heads] if by_head else [list(heads)]:
        seen = torch.stack([passage.sums.seen[features][:, column] for passage in passages]).mean((0, 2))
        seen = seen.clamp(min=1e-30)[:, None]
        yield {passage.layer: _written(adapter, passage, features, column) / seen for passage in passages}


def _written(
    adapter: Adapter, passage: Passage, features: Int[Tensor, " kept"], heads: Sequence[int]
) -> Float[Tensor, "kept d_model"]:
    """sum over heads of moved_ih r_i W_V^h W_O^h."""
    values, (output, _) = adapter.reader(passage.layer, "v").weight.float(), adapter.writer(passage.layer)
    moved = passage.sums.moved[features]
    total = torch.zeros_like(passage.response)
    for head in heads:
        total += moved[:, head, None] * (passage.response @ values[head] @ output[head].float())
    return total
