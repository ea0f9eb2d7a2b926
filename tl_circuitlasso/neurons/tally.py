"""What is summed over prompts of every neuron's contributions: nothing that grows with their number.

Against the mean reference, a neuron's mean over the partners at the same position, contributions come from one pass:

    sum_prompts m (u - mean u') = sum m u - (sum m) (sum u') / N        at every position
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_circuitlasso.errors import InputError
from tl_circuitlasso.features.graph import Text
from tl_circuitlasso.models.neuron_scores import Batch
from tl_circuitlasso.models.rotary import position_ids
from tl_circuitlasso.neurons.behaviour import Behaviour

EXAMPLES = 3  # places shown for each neuron: where it contributes most
POSITIONS = 64  # prompts up to this long have their contributions shown by position
MOST = 2 << 30  # bytes that the sums may take


class Tally:
    """Running sums over prompts by neuron and position (from the first real token), and the best places."""

    def __init__(self, width: int, neurons: int, reference: str) -> None:
        sums = 3 if reference == "mean" else 1
        if (size := 8 * sums * width * neurons) > MOST:
            raise InputError(
                f"`tokens` are {width} long: the sums over {neurons} neurons at each position would take "
                f"{size / 2**30:.1f} GiB; give shorter prompts" + (", or reference='corrupted'" if sums > 1 else "")
            )
        self.width, self.reference = width, reference
        self.products: dict[str, Tensor] = {}
        self.multipliers: dict[str, Tensor] = {}
        self.partners: dict[str, Tensor] = {}
        self.best: dict[str, tuple[Tensor, Tensor]] = {}  # values and places (prompt, position), (example, neuron)
        self.seen = torch.zeros(width, dtype=torch.long)
        self.prompts, self.first = 0, ""

    def add(
        self,
        key: str,
        batch: Batch,
        at: Float[Tensor, "prompt pos neuron"],
        own: Float[Tensor, "prompt pos neuron"],
        other: Float[Tensor, "prompt pos neuron"],
    ) -> None:
        """Take in a batch's multipliers at some neurons, and what these do in both runs."""
        self.first = self.first or key
        if key == self.first:
            self.prompts += len(batch.rows)
            self.seen += torch.bincount(position_ids(batch.mask)[batch.mask].cpu(), minlength=self.width)
        product = torch.where(batch.mask[..., None], at * (own - other), 0.0)
        if self.reference == "mean":
            self._sum(self.products, key, batch, at * own)
            self._sum(self.multipliers, key, batch, at)
            self._sum(self.partners, key, batch, other)
        else:
            self._sum(self.products, key, batch, product)
        self._keep_best(key, batch, product)

    def _sum(self, sums: dict[str, Tensor], key: str, batch: Batch, values: Tensor) -> None:
        if key not in sums:
            sums[key] = torch.zeros(self.width, values.shape[2], dtype=torch.float64, device=values.device)
        sums[key].index_add_(0, position_ids(batch.mask)[batch.mask], values[batch.mask].double())

    def contributions(self, key: str) -> Float[Tensor, "pos neuron"]:
        """Each neuron's mean contribution per prompt at each position, on the CPU."""
        total = self.products[key]
        if self.reference == "mean":
            mean = self.partners[key] / self.seen.clamp_min(1).to(total.device)[:, None]
            total = total - self.multipliers[key] * mean
        return total.cpu() / self.prompts

    def _keep_best(self, key: str, batch: Batch, product: Tensor) -> None:
        pos = product.shape[1]
        values, where = product.flatten(0, 1).abs().topk(min(EXAMPLES, product.shape[0] * pos), dim=0)
        real = position_ids(batch.mask).flatten()
        places = torch.stack([batch.rows.to(where.device)[where // pos], real[where]])
        if key in self.best:
            old_values, old_places = self.best[key]
            values, places = torch.cat([old_values, values]), torch.cat([old_places, places], 1)
            values, order = values.topk(min(EXAMPLES, len(values)), dim=0)
            places = places.gather(1, order.expand(2, *order.shape))
        self.best[key] = values, places

    def places(self, key: str, neurons: list[int], behaviour: Behaviour, text: Text) -> list[dict[str, Any]]:
        """Of some neurons contributions by position and the contexts of the largest differences."""
        own = self.contributions(key)[:, neurons]
        values, places = (part[..., neurons].cpu() for part in self.best[key])
        found: list[dict[str, Any]] = []
        for number in range(len(neurons)):
            contexts = [
                behaviour.context(int(row), int(position), float(value), text)
                for value, row, position in zip(values[:, number], *places[:, :, number])
            ]
            found.append({"contexts": contexts})
            if self.width <= POSITIONS:
                found[-1]["by_position"] = {str(i): value for i, value in enumerate(own[:, number].tolist()) if value}
        return found
