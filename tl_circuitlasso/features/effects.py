"""Which pairs of features are edges: by what one does to the other (`models.feature_replay`), and by how sure that is.

For every pair that anything happened to there is S_ij, what the child's code does per unit of the parent's, and its
standard error over prompts. An edge asks for two things:

- an effect of some size: |S_ij| >= `LEAST` in standard deviations of both (the score), and |S_ij| |d_j| >= `LEAST`
  |d_i|, d what a unit of each feature writes. Between hooks where effects are small throughout, such as one attention's
  output and the next one's, it is enough to stand out among all pairs of features of the two hooks: to be one of the
  largest `OUT_SCORE` by score, and of the largest `OUT_EFFECT` by |S_ij|;
- that it isn't chance: q_ij <= `Q`, the Benjamini-Hochberg adjusted p-value of a t-test of S_ij = 0 among the pairs of
  the two hooks that could be edges at all: r_ij, the root mean square of what happens per unit of the parent, has
  the least size of an edge. |S_ij| <= r_ij, and where there is no effect r_ij says nothing of the test (the sum of the
  squares of normal c_ij is independent of t), so the rate holds (independent filtering: Bourgon et al. 2010, PNAS 107,
  9546), and some thousand tests find what would drown among hundreds of thousands.

The regression needn't have kept it. Where effects aren't known, an edge is a coefficient of at least `UNREAD` in
standard deviations: few, and only those that stand out.
"""

import math
from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from scipy.stats import t as student
from torch import Tensor

from tl_circuitlasso.features.fit import Regressed, Units
from tl_circuitlasso.models.feature_sums import Effects

LEAST = 0.05
OUT_SCORE = 0.015
OUT_EFFECT = 0.03
Q = 0.05
UNREAD = 0.2


def with_effects(found: Regressed, effects: Effects | None, units: Units, *, grow: bool) -> Regressed:
    """With S_ij as the edges' effect, scores and q-values of it, where effects are known; and, if they are to `grow`,
    with pairs of clear effect that the regression has left out: a strength of one's own has the last word.
    """
    if effects is None:
        return found
    judged = effects.together or effects
    scores = _scores(judged.effect, judged.source, judged.target, effects, units)
    bars = _bars(judged, scores)
    least = torch.tensor([least for least, _ in bars]).double()[_copy(judged.source, effects)]
    clear = scores.abs() >= least
    tested = _scores(judged.root_mean_square(), judged.source, judged.target, effects, units) >= least
    grown = _united(found, effects, _wanted(effects, judged, found, clear & grow))
    known = grown.source < effects.sources
    row = torch.where(known, effects.rows(grown.source, grown.target), -1)
    seen = torch.where(known, judged.rows(_seen(effects, grown.source), grown.target), -1)
    nothing = torch.zeros(1, dtype=torch.float64)
    effect, whole = torch.cat([effects.effect, nothing])[row], torch.cat([judged.effect, nothing])[seen]
    every = q_values(judged, tested)
    q = torch.cat([every, nothing + 1])[seen]
    score = _scores(whole, grown.source, grown.target, effects, units)
    return replace(
        grown,
        effect=torch.where(known, effect, grown.effect),
        q=torch.where(known, q, grown.q),
        score=torch.where(known, score, grown.score),
        bars=bars,
        sure=_sure(every, scores),
    )


def _sure(q: Float[Tensor, " entry"], scores: Float[Tensor, " entry"]) -> tuple[int, float]:
    """How many effects aren't chance, and the largest |score| of them."""
    sizes = scores.abs()[q <= Q]
    return len(sizes), float(sizes.max()) if len(sizes) else 0.0


def _copy(source: Int[Tensor, " edge"], effects: Effects) -> Int[Tensor, " edge"]:
    """0 at the child's own position, 1 through attention."""
    return (source // len(effects.groups)).clamp(max=1)


def _bars(judged: Effects, scores: Float[Tensor, " entry"]) -> tuple[tuple[float, float], ...]:
    """By copy the least |score|, and the |effect| from which an effect stands out however little it writes."""
    copy, most = _copy(judged.source, judged), len(judged.groups) * judged.children
    found = []
    for number in range(judged.copies):
        mine = copy == number
        score = _largest(scores[mine].abs(), OUT_SCORE * most)
        found.append((min(LEAST, score), _largest(judged.effect[mine].abs(), OUT_EFFECT * most)))
    return tuple(found)


def _largest(size: Float[Tensor, " entry"], most: float) -> float:
    """What so many are larger than: halfway to the next, so that rounding decides of none; pairs that aren't there are
    0."""
    count = max(1, round(most))
    if count > len(size):
        return 0.0
    ordered = torch.cat([size, size.new_zeros(1)]).topk(count + 1).values
    return float(ordered[-2:].mean())


def _seen(effects: Effects, source: Int[Tensor, " edge"]) -> Int[Tensor, " edge"]:
    """The column that is judged: where copies are of single heads, all of them are judged as one edge."""
    if effects.together is None:
        return source
    features = len(effects.groups)
    return source % features + features * _copy(source, effects)


def _wanted(
    effects: Effects, judged: Effects, found: Regressed, clear: Bool[Tensor, " judged"]
) -> Bool[Tensor, " entry"]:
    """The entries that are to be there: those of clear effect, of an edge through heads the parts of all heads, too."""
    if effects.together is None:
        return clear
    rows = judged.rows(_seen(effects, effects.source), effects.target)
    clear = torch.cat([clear, torch.zeros(1, dtype=torch.bool)])[rows]
    through = (found.source >= len(effects.groups)) & (found.source < effects.sources)
    there = _seen(effects, found.source[through]) * effects.children + found.target[through]
    mine = _seen(effects, effects.source) * effects.children + effects.target
    return clear | torch.isin(mine, there)


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


def q_values(effects: Effects, tested: Bool[Tensor, " entry"] | None = None) -> Float[Tensor, " entry"]:
    """The Benjamini-Hochberg adjusted p-value of each entry among those that are `tested`, 1 for others; None: among
    all pairs of every copy, those that nothing happened to included.

    >>> one = torch.tensor([0, 1]), torch.tensor([0, 0]), torch.tensor([3.0, 1.0]).double(), torch.ones(2).double()
    >>> effects = Effects(*one, torch.tensor([100, 100]), 1, 5)
    >>> q_values(effects).tolist(), q_values(effects, torch.tensor([True, False])).tolist()
    ([0.034..., 1.0], [0.003..., 1.0])
    """
    freedom = (effects.groups[effects.source % len(effects.groups)] - 1).clamp(min=1)
    p = torch.from_numpy(
        2 * student.sf((effects.effect / effects.error.clamp(min=1e-300)).abs().numpy(), freedom.numpy())
    )
    p = torch.where(effects.error.isfinite(), p, 1.0)
    if tested is None:
        return adjusted(p, effects.sources * effects.children)
    return torch.ones_like(p).masked_scatter(tested, adjusted(p[tested], int(tested.sum())))


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
    bars = torch.tensor(found.bars or [(LEAST, math.inf)], dtype=torch.float64)
    least, stands_out = bars[(found.source // len(written)).clamp(max=len(bars) - 1)].unbind(1)
    large = (found.score.abs() >= least) & ((passed_on >= LEAST) | (found.effect.abs() >= stands_out))
    clear = large & (found.q <= Q)
    return torch.where(known, clear, (found.score.abs() >= UNREAD) if unread else torch.ones_like(clear))
