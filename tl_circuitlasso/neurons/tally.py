"""What is summed over prompts of every neuron's contributions: nothing that grows with their number."""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_circuitlasso.models.neuron_scores import Batch
from tl_circuitlasso.models.rotary import position_ids
from tl_circuitlasso.neurons.behaviour import Behaviour

EXAMPLES = 3  # places shown for each neuron: where it contributes most
POSITIONS = 64  # prompts up to this long have their contributions told apart by position


class Tally:
    """Running sums over prompts: contributions by neuron, by neuron and position from the end, and the best places."""

    def __init__(self, width: int) -> None:
        self.total: dict[str, Tensor] = {}
        self.by_position: dict[str, Tensor] = {}
        self.best: dict[str, tuple[Tensor, Tensor]] = {}  # values and places (prompt, position), (example, neuron)
        self.width = width if width <= POSITIONS else 0
        self.prompts, self.first = 0, ""

    def add(self, key: str, batch: Batch, product: Float[Tensor, "prompt pos neuron"]) -> None:
        self.first = self.first or key
        self.prompts += len(batch.rows) * (key == self.first)
        self.total[key] = self.total.get(key, 0.0) + product.sum((0, 1))
        if self.width:
            ends = _from_the_end(batch.mask)
            sums = product.new_zeros(self.width, product.shape[2])
            sums.index_add_(0, ends.flatten().clamp_max(self.width - 1), product.flatten(0, 1))
            self.by_position[key] = self.by_position.get(key, 0.0) + sums
        self._keep_best(key, batch, product)

    def _keep_best(self, key: str, batch: Batch, product: Tensor) -> None:
        pos = product.shape[1]
        values, where = product.flatten(0, 1).abs().topk(min(EXAMPLES, product.shape[0] * pos), dim=0)
        real = position_ids(batch.mask).flatten()  # counted from the first real token
        places = torch.stack([batch.rows.to(where.device)[where // pos], real[where]])
        if key in self.best:
            old_values, old_places = self.best[key]
            values, places = torch.cat([old_values, values]), torch.cat([old_places, places], 1)
            values, order = values.topk(min(EXAMPLES, len(values)), dim=0)
            places = places.gather(1, order.expand(2, *order.shape))
        self.best[key] = values, places

    def places(self, key: str, neuron: int, behaviour: Behaviour, words: Any) -> dict[str, Any]:
        """Contributions by position (0 is the last token) and the contexts of the largest ones."""
        found: dict[str, Any] = {}
        if self.width:
            by_position = (self.by_position[key][:, neuron] / self.prompts).tolist()
            found["by_position"] = {str(-1 - i): value for i, value in enumerate(by_position) if value}
        values, places = self.best[key]
        found["contexts"] = [
            behaviour.context(int(row), int(position), float(value), words)
            for value, row, position in zip(values[:, neuron], *places[:, :, neuron])
        ]
        return found


def _from_the_end(mask: Bool[Tensor, "batch pos"]) -> Int[Tensor, "batch pos"]:
    """How many real tokens follow each position."""
    return mask.flip(1).cumsum(1).flip(1).sub(1).clamp_min(0)
