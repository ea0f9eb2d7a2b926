"""Neurons that recur: among the foremost of a behaviour in many of its prompts, not only in their mean."""

import torch
from jaxtyping import Float
from torch import Tensor

from tl_circuitlasso._checks import whole_number
from tl_circuitlasso.models.neuron_scores import BySweep, Scoring, products
from tl_circuitlasso.models.neuron_sweep import SECANT
from tl_circuitlasso.neurons.behaviour import Behaviour


def recurring(behaviour: Behaviour, *, foremost: int = 50) -> dict[str, float]:
    """The share of prompts in which each neuron is among the `foremost` of largest positive contribution.

    Neurons that never are don't appear. Two forward passes and one sweep per prompt.

    Raises
    ------
    InputError: `foremost` isn't a whole number from 1 to the number of neurons.
    """
    scoring = Scoring(behaviour.adapter, behaviour.reading, "neuron", "corrupted")
    width = behaviour.adapter.shape.d_mlp
    total = width * len(scoring.keys)
    foremost = whole_number("foremost", foremost, most=total, what="of neurons")
    counts, prompts = torch.zeros(total, dtype=torch.long), 0
    own: dict[str, Float[Tensor, "prompt neuron"]] = {}
    for _, key, product in products(scoring, behaviour.pairs, behaviour.n_prompts, BySweep(SECANT, alone=False)):
        own[key] = product.sum(1).cpu()
        if len(own) == len(scoring.keys):  # the batch is complete
            whole = torch.cat([own[key] for key in scoring.keys], dim=1)
            values, best = whole.topk(foremost, dim=1)
            counts += torch.bincount(best[values > 0], minlength=total)
            prompts, own = prompts + len(whole), {}
    names = ((f"m{i // width}#{i % width}", i) for i in counts.nonzero().flatten().tolist())
    return {name: int(counts[i]) / prompts for name, i in names}
