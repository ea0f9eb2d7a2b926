"""Taking a spurious concept out of a classifier by its SAE features (SHIFT; Marks et al. 2024, arXiv 2403.19647).

    found = tcl.apps.debias(model, {hook: sae}, texts, classes, concept, splits=5)
    found.summary

A probe reads a class from activations averaged over tokens, and is trained on texts in which class and concept go
together: it can't know which of the two it was meant to learn. Features of the concept are zeroed at every token, what
the SAE misses stays, and the probe is trained again on what is left:

    mean_p x'(p) = mean_p x(p) - sum over i in S of (mean_p z_i(p)) d_i

All ways of choosing S are told the concept on the same balanced texts, and each takes as many features as promise it
most (`apps.removal`, where the circuit's ranking is explained):

    circuit     rounds of sparse logistic regression of the concept on pooled codes, by |A_iy|
    gradient    (mean code where the concept is - where it isn't) (w . d_i), w a probe of the concept: attribution
    probe       |w . d_i| alone
    random      features that fire, drawn at random
    dimensions  those of the activation itself with the largest |w|, as many as the circuit's, set to their mean
    blind       no features: the direction between the two means of the concept projected out
    original, oracle    the probe as it is, and one trained on texts in which class and concept are independent

The rest is what the field reports: accuracy of the class and of the concept, the worst of the four groups, and of n
features spurious-correlation removal and targeted probe perturbation (Karvonen et al. 2025, arXiv 2503.09532)

    SCR(n) = (accuracy after n features - original) / (oracle - original),  the biased probe unchanged, of class and
             concept that whose original accuracy is lower, the other's features zeroed
    TPP(n) = mean over labels of (what its probe loses with its n features - what the other's loses), oracles' probes
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_circuitlasso.apps.pooling import Pooled, pool
from tl_circuitlasso.apps.probes import Probe, train_probe
from tl_circuitlasso.apps.removal import WAYS, Told, chosen_number
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.models import adapt
from tl_circuitlasso.models.sae import SAEFeatures
from tl_circuitlasso.progress import bar

STRENGTH = 0.1  # of lambda_max, in every round
SHARES = (0.25, 0.35)  # of each group: texts to test on, texts that tell the concept
SIZES = (2, 5, 10, 20, 50, 100, 200, 500)
FEWEST = 12  # texts a group
CLASS, CONCEPT = 0, 1


@dataclass(frozen=True, eq=False)
class Debiased:
    """How well each way does.

    Attributes
    ----------
    table: one row per split and method: features (how many were zeroed), profession-like accuracies on balanced texts:
        classes, concept (of the same probe's answers: .5 is blind), worst (of the four groups), equal (worst with as
        many features as the circuit takes), kept (worst of the probe that isn't trained again), seconds (of ranking).
    summary: means over splits, and by how much of the way from original to oracle the worst group comes (`recovered`).
    scr, tpp: by method and number of features, means over splits. features: each split's circuit, strongest first.
    """

    table: pd.DataFrame
    summary: pd.DataFrame
    scr: pd.DataFrame
    tpp: pd.DataFrame
    features: tuple[tuple[str, ...], ...]


def debias(
    model: Any,
    saes: SAEFeatures | Mapping[str, Any],
    texts: Any,
    classes: Sequence[int] | Tensor,
    concept: Sequence[int] | Tensor,
    *,
    strength: float = STRENGTH,
    splits: int = 5,
    sizes: Sequence[int] = SIZES,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = True,
) -> Debiased:
    """Train on texts where class and concept agree, zero features of the concept, and test where they are independent.

    saes: one SAE, at the hook whose activations the probe reads. classes, concept: 0 or 1 for each text. sizes: the
    numbers of features to choose from. One forward pass a text; each split deals the texts of the four groups out anew.

    Raises
    ------
    InputError: not one SAE, labels that aren't 0 and 1 or of another number, a group of fewer than 12 texts, `sizes`
        that the SAE doesn't have, or an SAE whose decoder isn't linear.

    >>> import tl_circuitlasso as tcl
    >>> demo = tcl.load_demo(prompts=128)
    >>> sae = tcl.synthetic.random_sae(48, 12)
    >>> classes = torch.arange(128) % 2  # of no meaning: what a text is about, and what it should not be told by
    >>> concept = torch.arange(128) // 2 % 2
    >>> saes = {"blocks.1.hook_resid_post": sae}
    >>> found = debias(demo.model, saes, demo.tokens, classes, concept, splits=1, sizes=[2])
    >>> list(found.summary.columns)[:2]
    ['features', 'classes']
    """
    adapter = adapt(model)
    encoders = SAEFeatures.of(saes).encoders()
    if len(encoders) != 1:
        raise InputError(f"`saes` has {len(encoders)} SAEs: the probe reads the activations of one hook")
    pooled = pool(adapter, next(iter(encoders.values())), texts, batch_size=batch_size, progress=progress)
    options: Any = {"strength": strength, "splits": splits, "sizes": sizes, "seed": seed, "progress": progress}
    return debias_pooled(pooled, classes, concept, **options)


def debias_pooled(
    pooled: Pooled,
    classes: Sequence[int] | Tensor,
    concept: Sequence[int] | Tensor,
    *,
    strength: float = STRENGTH,
    splits: int = 5,
    sizes: Sequence[int] = SIZES,
    seed: int = 0,
    progress: bool = True,
) -> Debiased:
    """`debias` from activations and codes that are averaged already.

    Raises
    ------
    InputError: labels that aren't 0 and 1 or of another number, a group of fewer than 12 texts, or no number of
        features in `sizes` from 1 to all of them.
    """
    labels = torch.stack([_binary(y, name, len(pooled.x)) for y, name in ((classes, "classes"), (concept, "concept"))])
    there = sorted({size for size in sizes if 0 < size <= len(pooled.written)})
    if not there:
        raise InputError(f"`sizes` has no number from 1 to {len(pooled.written)}, the features of the SAE")
    rows, scr, tpp, chosen = [], [], [], []
    for split in bar(range(splits), progress=progress, desc="debias", unit="split"):
        parts = _split(labels, torch.Generator().manual_seed(seed + split))
        one = _Split(pooled, labels, parts, strength, there, seed + split)
        rows += [{"split": split, **row} for row in one.rows()]
        scr.append(one.scr())
        tpp.append(one.tpp())
        chosen.append(tuple(f"{pooled.hook}#{i}" for i in one.ranked[CONCEPT]["circuit"][: one.circuit].tolist()))
    table = pd.DataFrame(rows)
    return Debiased(table, _summary(table), _mean(scr), _mean(tpp), tuple(chosen))


def _binary(labels: Any, name: str, count: int) -> Int[Tensor, " text"]:
    found = torch.as_tensor(labels).long()
    if found.shape != (count,) or not bool(((found == 0) | (found == 1)).all()):
        raise InputError(f"`{name}` must be 0 or 1 for each of the {count} texts")
    return found


@dataclass(frozen=True, eq=False)
class _Parts:
    """Texts to test on (four equal groups), to tell the concept (likewise), to train on where class and concept agree,
    and as many where they don't depend on each other, for the oracle."""

    test: Int[Tensor, " test"]
    told: Int[Tensor, " told"]
    agreeing: Int[Tensor, " train"]
    independent: Int[Tensor, " train2"]


def _split(labels: Int[Tensor, "2 text"], random: torch.Generator) -> _Parts:
    groups = [((labels[0] == a) & (labels[1] == b)).nonzero().flatten() for a in (0, 1) for b in (0, 1)]
    least = min(map(len, groups))
    if least < FEWEST:
        raise InputError(f"the smallest group of class and concept has {least} texts: give at least {FEWEST} of each")
    groups = [group[torch.randperm(len(group), generator=random)] for group in groups]
    test, told = (int(share * least) for share in SHARES)
    train = least - test - told
    rest = [group[test + told :] for group in groups]
    # two of the four groups agree; the oracle has as many texts in all
    agreeing = torch.cat([rest[0][:train], rest[3][:train]])
    independent = torch.cat([group[: -(-train // 2)] for group in rest])
    return _Parts(
        torch.cat([group[:test] for group in groups]), torch.cat([group[test : test + told] for group in groups]),
        agreeing, independent,
    )  # fmt: skip


class _Split:
    """One way to deal the texts out. `ranked` and `seconds` are by label whose features they are, and way."""

    def __init__(
        self, pooled: Pooled, labels: Tensor, parts: _Parts, strength: float, sizes: list[int], seed: int
    ) -> None:
        self.pooled, self.labels, self.parts, self.sizes = pooled, labels, parts, sizes
        self.biased = self._trained(pooled.x, parts.agreeing)
        self.oracles = [self._trained(pooled.x, parts.independent, label) for label in (CLASS, CONCEPT)]
        self.ranked: list[dict[str, Tensor]] = []
        for label in (CLASS, CONCEPT):
            ranked, self.seconds, self.concept = self._rank(label, strength, seed)
            self.ranked.append(ranked)
        self.number = {way: self._number(order) for way, order in self.ranked[CONCEPT].items()}
        self.circuit = self.number["circuit"]

    def _trained(self, x: Float[Tensor, "text width"], rows: Int[Tensor, " some"], label: int = CLASS) -> Probe:
        return train_probe(x[rows], self.labels[label][rows])

    def _rank(self, label: int, strength: float, seed: int) -> tuple[dict[str, Tensor], dict[str, float], Probe]:
        """By way, the features that tell a label; how long it took; and the probe that some of them use."""
        clock = time.perf_counter()
        probe = self._trained(self.pooled.x, self.parts.told, label)
        told = self.parts.told
        known = Told(self.pooled.codes[told], self.labels[label][told], self.pooled.written @ probe.direction)
        shared = time.perf_counter() - clock
        ranked, seconds = {}, {}
        for way in WAYS:
            clock = time.perf_counter()
            ranked[way] = known.ranked(way, strength, seed)
            seconds[way] = time.perf_counter() - clock + (shared if way in ("gradient", "probe") else 0.0)
        return ranked, seconds, probe

    def _number(self, order: Int[Tensor, " feature"]) -> int:
        parts, (classes, concept) = self.parts, self.labels
        return chosen_number(self.pooled, order, self.sizes, parts.agreeing, classes, parts.told, concept)

    def rows(self) -> list[dict[str, Any]]:
        """The table's rows."""
        found = [self._row("original", self.pooled.x, 0, again=False)]
        for way, order in self.ranked[CONCEPT].items():
            row = self._row(way, self.pooled.without(order[: self.number[way]]), self.number[way])
            equal = self.pooled.without(order[: self.circuit])
            equally = self._figures(self._trained(equal, self.parts.agreeing), equal)["worst"]
            found.append({**row, "equal": equally, "seconds": self.seconds[way]})
        found.append(self._row("dimensions", self._dimensions(), min(self.circuit, self.pooled.x.shape[1])))
        found.append(self._row("blind", self._blind(), 0))
        oracle = self._figures(self.oracles[CLASS], self.pooled.x)
        same = dict.fromkeys(("equal", "kept"), oracle["worst"])
        return [*found, {"method": "oracle", "features": 0, **oracle, **same, "seconds": 0.0}]

    def _row(self, method: str, x: Tensor, features: int, *, again: bool = True) -> dict[str, Any]:
        figures = self._figures(self._trained(x, self.parts.agreeing) if again else self.biased, x)
        kept = self._figures(self.biased, x)["worst"]
        return {
            "method": method, "features": features, **figures, "equal": figures["worst"], "kept": kept, "seconds": 0.0
        }  # fmt: skip

    def _figures(self, probe: Probe, x: Float[Tensor, "text width"]) -> dict[str, float]:
        y, c = self.labels[:, self.parts.test]
        says = probe.says(x[self.parts.test]).long()
        groups = [float((says == y)[(y == a) & (c == b)].double().mean()) for a in (0, 1) for b in (0, 1)]
        return {
            "classes": float((says == y).double().mean()),
            "concept": float((says == c).double().mean()),
            "worst": min(groups),
        }

    def _dimensions(self) -> Float[Tensor, "text width"]:
        x, size = self.pooled.x.clone(), self.concept.weight.abs()
        some = size.argsort(descending=True)[: self.circuit]
        x[:, some] = x[self.parts.told][:, some].mean(0)
        return x

    def _blind(self) -> Float[Tensor, "text width"]:
        x, told = self.pooled.x[self.parts.told], self.labels[CONCEPT][self.parts.told]
        way = torch.nn.functional.normalize(x[told == 1].mean(0) - x[told == 0].mean(0), dim=0)
        return self.pooled.x - (self.pooled.x @ way)[:, None] * way

    def _accuracy(self, probe: Probe, x: Float[Tensor, "text width"], label: int) -> float:
        test = self.parts.test
        return float((probe.says(x[test]).long() == self.labels[label][test]).double().mean())

    def scr(self) -> pd.DataFrame:
        """SCR by way and number of features, of the label of lower accuracy before; NaN where no gap is to close."""
        first = [self._accuracy(self.biased, self.pooled.x, label) for label in (CLASS, CONCEPT)]
        kept = CLASS if first[CLASS] <= first[CONCEPT] else CONCEPT
        gap = self._accuracy(self.oracles[kept], self.pooled.x, kept) - first[kept]

        def of(order: Tensor, size: int) -> float:
            after = self._accuracy(self.biased, self.pooled.without(order[:size]), kept)
            return (after - first[kept]) / gap if gap > 0 else float("nan")

        return self._by_size({way: lambda n, o=o: of(o, n) for way, o in self.ranked[1 - kept].items()})

    def tpp(self) -> pd.DataFrame:
        """TPP by way and number of features."""
        before = [self._accuracy(probe, self.pooled.x, label) for label, probe in enumerate(self.oracles)]

        def lost(order: Tensor, size: int, own: int) -> float:
            x = self.pooled.without(order[:size])
            drop = [before[label] - self._accuracy(self.oracles[label], x, label) for label in (own, 1 - own)]
            return drop[0] - drop[1]

        def of(way: str, size: int) -> float:
            return sum(lost(self.ranked[own][way], size, own) for own in (CLASS, CONCEPT)) / 2

        return self._by_size({way: lambda n, w=way: of(w, n) for way in WAYS})

    def _by_size(self, figures: Mapping[str, Any]) -> pd.DataFrame:
        rows = {way: [figure(size) for size in self.sizes] for way, figure in figures.items()}
        return pd.DataFrame.from_dict(rows, orient="index", columns=pd.Index(self.sizes, name="features"))


def _mean(splits: list[pd.DataFrame]) -> pd.DataFrame:
    found: Any = pd.concat(splits).groupby(level=0, sort=False).mean()
    return found


def _summary(table: pd.DataFrame) -> pd.DataFrame:
    means: Any = table.drop(columns="split").groupby("method", sort=False).mean()
    first, last = means.loc["original", "worst"], means.loc["oracle", "worst"]
    return means.assign(recovered=(means["worst"] - first) / (last - first))
