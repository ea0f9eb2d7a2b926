"""Which pairs of features are edges: by what one does to the other (`models.feature_replay`), and by how sure that is.

For every pair that anything happened to there is S_ij, what the child's code does per unit of the parent's, and its
standard error over prompts. An edge asks for two things:

- an effect that can be told from none: |S_ij| >= `LEAST` in standard deviations of both (the score), and |S_ij| |d_j|
  >= `LEAST` |d_i|, d what a unit of each feature writes;
- that it isn't chance: q_ij <= `Q`, the Benjamini-Hochberg adjusted p-value of a t-test of S_ij = 0 among all p q pairs
  of the two hooks (those that nothing happened to have p = 1).

The regression needn't have kept it. Where effects aren't known, an edge is a coefficient of at least `UNREAD` in
standard deviations: few, and only those that stand out.
"""

from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from scipy.stats import t as student
from torch import Tensor

from tl_circuitlasso.features.fit import Regressed, Units
from tl_circuitlasso.models.feature_replay import Effects

LEAST = 0.05
Q = 0.05
UNREAD = 0.2


def with_effects(found: Regressed, effects: Effects | None, units: Units, *, grow: bool) -> Regressed:
    """With S_ij as the edges' effect, scores and q-values of it, where effects are known; and, if they are to `grow`,
    with pairs of clear effect that the regression has left out: a strength of one's own has the last word.
    """
    if effects is None:
        return found
    scores = _scores(effects.effect, effects.source, effects.target, effects, units)
    grown = _united(found, effects, (scores.abs() >= LEAST) & grow)
    known = grown.source < effects.sources
    row = torch.where(known, effects.rows(grown.source, grown.target), -1)
    effect = torch.cat([effects.effect, torch.zeros(1).double()])[row]
    q = torch.cat([q_values(effects), torch.ones(1).double()])[row]
    score = _scores(effect, grown.source, grown.target, effects, units)
    return replace(
        grown,
        effect=torch.where(known, effect, grown.effect),
        q=torch.where(known, q, grown.q),
        score=torch.where(known, score, grown.score),
    )


def _scores(
    effect: Float[Tensor, " edge"], source: Int[Tensor, " edge"], target: Int[Tensor, " edge"], effects: Effects,
    units: Units,
) -> Float[Tensor, " edge"]:  # fmt: skip
    """Effects in standard deviations of both codes; 0 where one doesn't vary."""
    feature = source % len(effects.groups)
    return (effect * units.source[feature] / units.target[target]).nan_to_num(0.0, 0.0, 0.0)


def _united(found: Regressed, effects: Effects, clear: Bool[Tensor, " entry"]) -> Regressed:
    """The coefficients of the regression, and pairs of clear effect with a coefficient of 0, ordered by target."""
    mine = torch.zeros(len(effects.source), dtype=torch.bool)
    rows = effects.rows(found.source, found.target)
    mine[rows[(rows >= 0) & (found.source < effects.sources)]] = True
    new = (clear & ~mine).nonzero().flatten()
    source, target = torch.cat([found.source, effects.source[new]]), torch.cat([found.target, effects.target[new]])
    order = target.argsort(stable=True)
    nothing = torch.zeros(len(new), dtype=torch.float64)
    columns = {name: torch.cat([getattr(found, name), nothing])[order] for name in ("weight", "lasso", "score")}
    unknown = torch.full_like(nothing, torch.nan)
    columns |= {name: torch.cat([getattr(found, name), unknown])[order] for name in ("effect", "q", "stability")}
    return replace(found, source=source[order], target=target[order], **columns)


def q_values(effects: Effects) -> Float[Tensor, " entry"]:
    """The Benjamini-Hochberg adjusted p-value of each entry, among all pairs of every copy.

    >>> one = torch.tensor([0, 1]), torch.tensor([0, 0]), torch.tensor([3.0, 1.0]).double(), torch.ones(2).double()
    >>> q_values(Effects(*one, torch.tensor([100, 100]), 1, 5)).tolist()
    [0.034..., 1.0]
    """
    freedom = (effects.groups[effects.source % len(effects.groups)] - 1).clamp(min=1)
    p = torch.from_numpy(
        2 * student.sf((effects.effect / effects.error.clamp(min=1e-300)).abs().numpy(), freedom.numpy())
    )
    return adjusted(torch.where(effects.error.isfinite(), p, 1.0), effects.sources * effects.children)


def adjusted(p: Float[Tensor, " test"], tests: int) -> Float[Tensor, " test"]:
    """q_(k) = min over l >= k of p_(l) tests / l, p_(1) <= p_(2) <= ...: Benjamini and Hochberg 1995.

    `tests`: how many there are, those with p = 1 that aren't listed included.

    >>> adjusted(torch.tensor([0.01, 0.5, 0.02], dtype=torch.float64), 10).tolist()
    [0.1, 1.0, 0.1]
    """
    order = p.argsort()
    ranked = p[order] * tests / torch.arange(1, len(p) + 1, dtype=p.dtype)
    least = ranked.flip(0).cummin(0).values.flip(0).clamp(max=1.0)
    return torch.empty_like(p).index_put((order,), least)


def is_clear(
    found: Regressed, written: Float[Tensor, " source"], child_written: Float[Tensor, " target"], *, unread: bool
) -> Bool[Tensor, " edge"]:
    """Which coefficients are edges: those of clear and sure effect, and where effects aren't known all, or where
    nothing could be `unread` but should have been, those that stand out.

    written, child_written: the lengths of what one unit of each feature writes.
    """
    known = found.effect.isfinite()
    source, target = found.source % len(written), found.target.clamp(max=len(child_written) - 1)
    passed_on = found.effect.abs() * child_written[target] / written[source].clamp(min=1e-30)
    clear = (found.score.abs() >= LEAST) & (passed_on >= LEAST) & (found.q <= Q)
    return torch.where(known, clear, (found.score.abs() >= UNREAD) if unread else torch.ones_like(clear))
