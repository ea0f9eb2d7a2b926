"""How many edges: a rule that knows no truth.

An edge counts if cutting it would cost at least about one percent of what the costliest edge into the target costs.
Scores are estimates, so the cut isn't made at one percent exactly, through the middle of a cluster, but in the widest
gap near it.

>>> import torch
>>> round(widest_gap(torch.tensor([1.0, .5, .02, .004, .003])), 4)       # the gap from .02 to .004 is the widest
0.0089
"""

import torch
from jaxtyping import Float
from torch import Tensor

CENTRE = 0.01  # of the largest score
WIDTH = 10**0.5  # how far from the centre a gap may lie: half a decade on either side
CLEAR = 2.0  # the least ratio across a gap; where there is none, the cut is at the centre
_NOTHING = 1e-12


def widest_gap(
    scores: Float[Tensor, " edge"], centre: float = CENTRE, width: float = WIDTH, *, largest: float | None = None
) -> float:
    """The threshold, in units of the scores, in the middle (on a log scale) of the widest gap near `centre`.

    With r_1 >= r_2 >= ... the scores over `largest` (None: over their largest), the gaps (r_i+1, r_i) count as far as
    they lie in [centre / width, centre * width]; the one of largest ratio there wins, and if even that isn't clear,
    the cut is at `centre`. Infinite when no score is positive.
    """
    return float(widest_gaps(scores, centre, width, largest=None if largest is None else torch.tensor(largest)))


def widest_gaps(
    scores: Float[Tensor, "*draw edge"],
    centre: float = CENTRE,
    width: float = WIDTH,
    *,
    largest: Float[Tensor, "*draw"] | None = None,
) -> Float[Tensor, "*draw"]:
    """`widest_gap` for several sets of scores at once.

    >>> widest_gaps(torch.tensor([[1.0, 0.5, 0.001], [2.0, 1.0, 0.002]])).tolist() == [.01, .02]
    True
    """
    if not scores.shape[-1]:
        return torch.full(scores.shape[:-1], torch.inf, dtype=torch.float64)
    most = scores.double().amax(-1)
    unit = most if largest is None else largest.double()
    relative = (scores.double() / unit[..., None]).clamp_min(_NOTHING).sort(dim=-1, descending=True).values
    low = torch.cat([relative[..., 1:], torch.full_like(relative[..., :1], _NOTHING)], dim=-1)
    high, low = (side.clamp(centre / width, centre * width) for side in (relative, low))
    ratio, best = (high / low).max(-1, keepdim=True)
    middle = (high.gather(-1, best) * low.gather(-1, best)).sqrt()
    bar = torch.where(ratio < CLEAR, centre, middle)[..., 0] * unit
    return torch.where(most > 0, bar, torch.inf)


def lowered(bar: Float[Tensor, "*draw"], way: Float[Tensor, "*draw"]) -> Float[Tensor, "*draw"]:
    """The threshold, lowered where the cheapest edge of the best path (`way`) isn't above it: a circuit has a path.

    >>> found = lowered(torch.tensor([0.5, 0.5]), torch.tensor([2.0, 0.25]))
    >>> [round(bar, 6) for bar in found.tolist()], bool(found[1] < 0.25)
    ([0.5, 0.25], True)
    """
    return torch.minimum(bar.double(), way.double() * (1 - 1e-9))
