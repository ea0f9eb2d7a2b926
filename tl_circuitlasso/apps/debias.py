"""Taking a spurious concept out of a classifier by its SAE features (SHIFT; Marks et al. 2024, arXiv 2403.19647).

    found = tcl.apps.debias(model, {hook: sae}, texts, classes, concept, splits=5)
    found.summary

A probe reads a class from activations averaged over tokens, and is trained on texts in which class and concept go
together: it can't know which of the two it was meant to learn. Features of the concept are zeroed at every token, what
the SAE misses stays, and the probe is trained again on what is left. As decoders are linear,

    mean_p x'(p) = mean_p x(p) - sum over i in S of (mean_p z_i(p)) d_i

so one forward pass a text serves every way of choosing S. All ways are told the concept on the same balanced texts:

    circuit     |A_iy| of the sparse logistic regression of the concept on pooled codes: its support, strongest first
    gradient    (mean code where the concept is - where it isn't) (w . d_i), w a probe of the concept: attribution
    probe       |w . d_i| alone
    random      features that fire, drawn at random
    dimensions  those of the activation itself with the largest |w|, set to their mean
    blind       no features: the direction between the two means of the concept projected out
    original, oracle    the probe as it is, and one trained on texts in which class and concept are independent

All but the last three take as many features as the regression keeps. The rest is what the field reports: accuracy of
the class and of the concept, the worst of the four groups, and spurious-correlation removal (SCR; Karvonen et al. 2025)

    SCR(n) = (accuracy after n features - original) / (oracle - original),  the biased probe unchanged
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_circuitlasso import solve
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.models import Adapter, Prompts, adapt
from tl_circuitlasso.models.encoder import Encoder
from tl_circuitlasso.models.feature_effects import ENCODE_CHUNK
from tl_circuitlasso.models.sae import SAEFeatures

WAYS = ("circuit", "gradient", "probe", "random")
STRENGTH = 0.1  # of lambda_max
SHARES = (0.25, 0.35)  # of each group: texts to test on, texts that tell the concept
SIZES = (2, 5, 10, 20, 50, 100, 500)
RIDGE = 1e-2
FEWEST = 12  # texts a group
LINEAR = 1e-4  # relative: by this much may a decoder be off from a linear one


@dataclass(frozen=True, eq=False)
class Debiased:
    """How well each way does.

    Attributes
    ----------
    table: one row per split and method: features (how many were zeroed), profession-like accuracies on balanced texts:
        classes, concept (of the same probe's answers: .5 is blind), worst (of the four groups), kept (the same three of
        the probe that isn't trained again), seconds (of ranking).
    summary: means over splits, and by how much of the way from original to oracle the worst group comes (`recovered`).
    scr: SCR by method and number of features, mean over splits. features: each split's circuit, strongest first.
    """

    table: pd.DataFrame
    summary: pd.DataFrame
    scr: pd.DataFrame
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
) -> Debiased:
    """Train on texts where class and concept agree, zero features of the concept, and test where they are independent.

    saes: one SAE, at the hook whose activations the probe reads. classes, concept: 0 or 1 for each text. One forward
    pass a text; each split deals the texts of the four groups out anew.

    Raises
    ------
    InputError: not one SAE, labels that aren't 0 and 1 or of another number, a group of fewer than 12 texts, or an SAE
        whose decoder isn't linear.
    """
    adapter = model if isinstance(model, Adapter) else adapt(model)
    encoders = (saes if isinstance(saes, SAEFeatures) else SAEFeatures(saes)).encoders()
    if len(encoders) != 1:
        raise InputError(f"`saes` has {len(encoders)} SAEs: the probe reads the activations of one hook")
    pooled = pool(adapter, next(iter(encoders.values())), texts, batch_size=batch_size)
    return debias_pooled(pooled, classes, concept, strength=strength, splits=splits, sizes=sizes, seed=seed)


@dataclass(frozen=True, eq=False)
class Pooled:
    """Activations and codes averaged over each text's tokens (BOS left out), and what each feature writes."""

    hook: str
    x: Float[Tensor, "text width"]
    codes: Float[Tensor, "text feature"]
    written: Float[Tensor, "feature width"]

    def without(self, features: Int[Tensor, " zeroed"]) -> Float[Tensor, "text width"]:
        """The activations with some features at zero."""
        return self.x - self.codes[:, features] @ self.written[features]


def pool(adapter: Adapter, encoder: Encoder, texts: Any, *, batch_size: int = 32) -> Pooled:
    """Average activations and codes over tokens; one forward pass a text.

    Raises
    ------
    InputError: a transcoder, or an SAE whose decoder isn't linear.
    """
    if encoder.is_transcoder:
        raise InputError(
            f"`saes`: a transcoder stands at {encoder.hook}: debiasing needs an SAE of what the probe reads"
        )
    found, codes = [], []
    for number, batch in enumerate(Prompts(adapter, texts, batch_size=batch_size)):
        x = adapter.run(batch.tokens, batch.mask, [encoder.hook])[encoder.hook].flatten(2)
        rows = x[batch.keep]
        if number == 0:
            _check_linear(encoder, rows[:ENCODE_CHUNK])
        prompt = batch.keep.nonzero()[:, 0]
        count = batch.keep.sum(1).clamp(min=1)[:, None]
        z = torch.cat([encoder.encode(some) for some in rows.split(ENCODE_CHUNK)])
        for parts, values in ((found, rows), (codes, z)):
            total = torch.zeros(len(batch.tokens), values.shape[1], dtype=torch.float64, device=values.device)
            parts.append((total.index_add(0, prompt, values.double()) / count).cpu())
    return Pooled(encoder.hook, torch.cat(found), torch.cat(codes), encoder.written.double().cpu())


def _check_linear(encoder: Encoder, x: Float[Tensor, "row width"]) -> None:
    plain, edited = encoder.edited(x, torch.zeros_like)
    off = (plain - edited) - encoder.encode(x) @ encoder.written.to(x)
    if float(off.norm()) > LINEAR * float((plain - edited).norm()):
        raise InputError(f"`saes`: the decoder of the SAE at {encoder.hook} isn't linear in its codes")


def debias_pooled(
    pooled: Pooled,
    classes: Sequence[int] | Tensor,
    concept: Sequence[int] | Tensor,
    *,
    strength: float = STRENGTH,
    splits: int = 5,
    sizes: Sequence[int] = SIZES,
    seed: int = 0,
) -> Debiased:
    """`debias` from activations and codes that are averaged already.

    Raises
    ------
    InputError: labels that aren't 0 and 1 or of another number, or a group of fewer than 12 texts.
    """
    labels = torch.stack([_binary(y, name, len(pooled.x)) for y, name in ((classes, "classes"), (concept, "concept"))])
    rows, scr, chosen = [], [], []
    for split in range(splits):
        parts = _split(labels, torch.Generator().manual_seed(seed + split))
        one = _Split(pooled, labels, parts, strength, seed + split)
        rows += [{"split": split, **row} for row in one.rows()]
        scr += [{"split": split, **row} for row in one.scr(sizes)]
        chosen.append(tuple(f"{pooled.hook}#{i}" for i in one.ranked["circuit"][: one.size].tolist()))
    table = pd.DataFrame(rows)
    curve = pd.DataFrame(scr, columns=["split", "method", "features", "scr"])
    return Debiased(
        table,
        _summary(table),
        curve.pivot_table(values="scr", index="method", columns="features", aggfunc="mean"),
        tuple(chosen),
    )


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
    concept: Int[Tensor, " told"]
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


@dataclass(frozen=True, eq=False)
class _Probe:
    """Logistic regression on standardised activations."""

    mean: Float[Tensor, " width"]
    spread: Float[Tensor, " width"]
    weight: Float[Tensor, " width"]
    bias: Float[Tensor, ""]

    @property
    def direction(self) -> Float[Tensor, " width"]:
        """Its weights in the activations' own units."""
        return self.weight / self.spread

    def says(self, x: Float[Tensor, "text width"]) -> Bool[Tensor, " text"]:
        """Whether it says 1."""
        return ((x - self.mean) / self.spread) @ self.weight + self.bias > 0


def train_probe(x: Float[Tensor, "text width"], y: Int[Tensor, " text"]) -> _Probe:
    """min over w, b of the mean cross-entropy + RIDGE / 2 |w|^2, by L-BFGS, x in standard deviations."""
    mean, spread = x.mean(0), x.std(0).clamp(min=1e-6 * float(x.std()) + 1e-30)
    ready, wanted = (x - mean) / spread, y.to(x)
    with torch.enable_grad():
        weight, bias = (torch.zeros(size, dtype=x.dtype, requires_grad=True) for size in (x.shape[1], ()))
        search = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            search.zero_grad()
            loss = torch.nn.functional.binary_cross_entropy_with_logits(ready @ weight + bias, wanted)
            loss = loss + RIDGE / 2 * weight.square().sum()
            loss.backward()
            return loss

        search.step(closure)  # type: ignore[arg-type]
    return _Probe(mean, spread, weight.detach(), bias.detach())


class _Split:
    """One way to deal the texts out."""

    def __init__(self, pooled: Pooled, labels: Tensor, parts: _Parts, strength: float, seed: int) -> None:
        self.pooled, self.labels, self.parts = pooled, labels, parts
        self.biased = self._trained(pooled.x, parts.agreeing)
        self.oracle = self._trained(pooled.x, parts.independent)
        clock = time.perf_counter()
        x, self.told = pooled.x[parts.concept], labels[1][parts.concept]
        self.concept = train_probe(x, self.told)
        shared = time.perf_counter() - clock
        self.ranked: dict[str, Tensor] = {}
        self.seconds: dict[str, float] = {}
        for way in WAYS:
            clock = time.perf_counter()
            self.ranked[way] = self._rank(way, strength, seed)
            self.seconds[way] = time.perf_counter() - clock + (shared if way in ("gradient", "probe") else 0.0)

    def _trained(self, x: Float[Tensor, "text width"], rows: Int[Tensor, " some"]) -> _Probe:
        return train_probe(x[rows], self.labels[0][rows])

    def _rank(self, way: str, strength: float, seed: int) -> Int[Tensor, " feature"]:
        codes = self.pooled.codes[self.parts.concept]
        reads = self.pooled.written @ self.concept.direction
        fires = (codes > 0).any(0).nonzero().flatten()
        match way:
            case "circuit":
                size = _circuit(codes, self.told, strength)
                self.size = int((size > 0).sum())
            case "gradient":
                size = ((codes[self.told == 1].mean(0) - codes[self.told == 0].mean(0)) * reads).abs()
            case "probe":
                size = reads.abs()
            case _:
                size = torch.zeros(codes.shape[1], dtype=codes.dtype)
                size[fires] = 1 + torch.rand(len(fires), generator=torch.Generator().manual_seed(seed)).to(size)
        return size.argsort(descending=True, stable=True)

    def rows(self) -> list[dict[str, Any]]:
        """The table's rows."""
        found = [self._row("original", self.pooled.x, 0, 0.0, again=False)]
        for way in WAYS:
            x = self.pooled.without(self.ranked[way][: self.size])
            found.append(self._row(way, x, self.size, self.seconds[way]))
        for name, x, count in (("dimensions", self._dimensions(), self.size), ("blind", self._blind(), 0)):
            found.append(self._row(name, x, count, 0.0))
        oracle = self._figures(self.oracle, self.pooled.x)
        return [*found, {"method": "oracle", "features": 0, **oracle, "kept": oracle["worst"], "seconds": 0.0}]

    def _row(self, method: str, x: Tensor, features: int, seconds: float, *, again: bool = True) -> dict[str, Any]:
        probe = self._trained(x, self.parts.agreeing) if again else self.biased
        kept = self._figures(self.biased, x)["worst"]
        return {"method": method, "features": features, **self._figures(probe, x), "kept": kept, "seconds": seconds}

    def _figures(self, probe: _Probe, x: Float[Tensor, "text width"]) -> dict[str, float]:
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
        some = size.argsort(descending=True)[: self.size]
        x[:, some] = x[self.parts.concept][:, some].mean(0)
        return x

    def _blind(self) -> Float[Tensor, "text width"]:
        x = self.pooled.x[self.parts.concept]
        way = torch.nn.functional.normalize(x[self.told == 1].mean(0) - x[self.told == 0].mean(0), dim=0)
        return self.pooled.x - (self.pooled.x @ way)[:, None] * way

    def scr(self, sizes: Sequence[int]) -> list[dict[str, Any]]:
        """SCR of every way and number of features."""
        first, last = (self._figures(probe, self.pooled.x)["classes"] for probe in (self.biased, self.oracle))
        found = []
        for way, ranked in self.ranked.items():
            for size in (size for size in sizes if size <= len(ranked)):
                after = self._figures(self.biased, self.pooled.without(ranked[:size]))["classes"]
                removed = (after - first) / (last - first) if last > first else float("nan")
                found.append({"method": way, "features": size, "scr": removed})
        return found


def _circuit(
    codes: Float[Tensor, "text feature"], y: Int[Tensor, " text"], strength: float
) -> Float[Tensor, " feature"]:
    """|A_iy| in standard deviations of the codes."""
    spread = codes.std(0)
    alive = spread > 0
    ready = (codes[:, alive] - codes[:, alive].mean(0)) / spread[alive]
    size = torch.zeros(codes.shape[1], dtype=codes.dtype)
    size[alive] = solve.logistic_lasso(ready, y, strength=strength).value[:, 0].abs().to(size)
    return size


def _summary(table: pd.DataFrame) -> pd.DataFrame:
    means: Any = table.drop(columns="split").groupby("method", sort=False).mean()
    first, last = means.loc["original", "worst"], means.loc["oracle", "worst"]
    return means.assign(recovered=(means["worst"] - first) / (last - first))
