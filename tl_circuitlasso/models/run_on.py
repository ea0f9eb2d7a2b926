"""Running a model on from activations that are given, without the layers in front of them where that can be."""

import re
from collections.abc import Callable, Collection, Mapping

from jaxtyping import Bool, Int
from torch import Tensor

from tl_circuitlasso.models.passes import ForwardPass, Runner

_RESIDUAL = re.compile(r"blocks\.(\d+)\.hook_resid_(pre|post)\Z")


def run_on(
    runner: Runner,
    tokens: Int[Tensor, "row pos"],
    mask: Bool[Tensor, "row pos"] | None,
    given: Mapping[str, Tensor],
    wanted: Collection[str],
) -> ForwardPass:
    """A pass in which the activations `given` by hook, in the order of computation, take the place of the model's own.

    Behind a residual stream nothing in front of it is felt: of a HookedTransformer only the layers behind the last
    stream that is given are run.
    """
    start, later = None, dict(given)
    for number, (hook, activation) in enumerate(given.items()):
        entry = _RESIDUAL.match(hook) if runner.starts_midway else None
        if entry is not None:
            start = (int(entry[1]) + (entry[2] == "post"), activation)
            later = dict(list(given.items())[number + 1 :])
    made = ForwardPass(runner, tokens, mask, wanted, start=start)
    made.run([(hook, _instead(activation)) for hook, activation in later.items()])
    return made


def _instead(activation: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda old: activation.to(old.dtype).view(old.shape)
