"""Running a circuit of *edges* between features: each feature hears only those that a kept edge leads from.

The value of a feature v is its code in a run of its own, in which at every earlier site

    u has its value in the circuit where u -> v is kept, and carries an ablated value otherwise,

and so on down to the logits. The first site's features are those of the whole model, which nothing in front of it is
cut from. No edge leads into what an SAE misses: it is taken from a run in which all features of the circuit have their
values. Where every two features of a circuit are joined, this is the circuit of its nodes (`feature_patch`).

Features that hear the same share a run, and runs that fit the memory share a pass.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_circuitlasso.models.adapter import Adapter
from tl_circuitlasso.models.feature_patch import AT_ONCE, Carried, FeatureSite, Kept, Writer
from tl_circuitlasso.models.run_on import run_on

Heard = Mapping[str, Kept]  # by earlier site


@dataclass(frozen=True, eq=False)
class Listener:
    """Features of one site that hear the same: which they are, and what they hear."""

    features: Bool[Tensor, " feature"]
    heard: Heard


@dataclass(frozen=True, eq=False)
class Wiring:
    """Who hears what: the features of each site, what its SAE misses, and the logits."""

    listeners: Mapping[str, Sequence[Listener]]
    errors: Mapping[str, Heard]
    logits: Heard

    @property
    def runs(self) -> int:
        """How many runs of (a part of) the model each prompt takes."""
        return 1 + len(self.errors) + sum(map(len, self.listeners.values()))


def run_wired(
    adapter: Adapter,
    tokens: Int[Tensor, "batch pos"],
    mask: Bool[Tensor, "batch pos"] | None,
    sites: Sequence[FeatureSite],
    wiring: Wiring,
    carried: Carried,
) -> Float[Tensor, "batch pos vocab"]:
    """The logits of a circuit of edges; `sites` in the order of computation. `wiring.runs` passes at most.

    Raises
    ------
    ModelError: a hook of the model is missing.
    """
    circuit = _Values(adapter, tokens, adapter.sound_mask(tokens, mask), carried)
    for number, site in enumerate(sites):
        circuit.enter(site, sites[:number], wiring)
    (logits,) = circuit.run(sites, [wiring.logits], ["logits"])
    return logits["logits"]


class _Values:
    """The values that features have in the circuit, site by site, and what was read there for the errors."""

    def __init__(self, adapter: Adapter, tokens: Tensor, mask: Tensor, carried: Carried) -> None:
        self.adapter, self.tokens, self.mask = adapter, tokens, mask
        self.writer = Writer(adapter, tokens.shape, carried)
        self.read: dict[str, Tensor] = {}
        self.out: dict[str, Tensor] = {}
        self.shapes: dict[str, torch.Size] = {}
        self.codes: dict[str, Tensor] = {}

    def enter(self, site: FeatureSite, before: Sequence[FeatureSite], wiring: Wiring) -> None:
        """Find the values of a site from those of the sites before it."""
        hooks = list(dict.fromkeys((site.reads, site.writes)))
        (acts,) = self.run(before, [wiring.errors[site.name]], hooks)
        self.read[site.name] = self.writer.rows(acts[site.reads])
        self.out[site.name] = self.writer.rows(acts[site.writes]).flatten(1)
        self.shapes[site.name] = acts[site.writes].shape
        rows = len(self.read[site.name])
        codes = torch.zeros(rows, site.features, device=self.adapter.device, dtype=self.adapter.compute_dtype)
        listeners = wiring.listeners[site.name]
        at_once = max(1, AT_ONCE // (rows * site.features))
        for first in range(0, len(listeners), at_once):
            some = listeners[first : first + at_once]
            found = self.run(before, [one.heard for one in some], [site.reads])
            for one, heard in zip(some, found):
                self._note(site, one, self.writer.rows(heard[site.reads]), codes)
        self.codes[site.name] = codes

    def _note(self, site: FeatureSite, one: Listener, x: Tensor, codes: Tensor) -> None:
        features = one.features.nonzero().flatten().to(codes.device)
        for rows in torch.arange(len(x), device=x.device).split(site.rows_at_once):
            codes[rows[:, None], features] = site.codes(x[rows])[:, features].to(codes)

    def run(
        self, before: Sequence[FeatureSite], heard: Sequence[Heard], wanted: Sequence[str]
    ) -> list[dict[str, Tensor]]:
        """What is wanted of one run for each of `heard`, all in one pass."""
        copies = len(heard)
        given = {site.writes: torch.cat([self._written(site, one[site.name]) for one in heard]) for site in before}
        tokens, mask = (one.repeat(copies, 1) for one in (self.tokens, self.mask))
        with torch.no_grad():
            made = run_on(self.adapter, tokens, mask, given, wanted)
        parts = {key: made[key].detach().to(self.adapter.device).split(len(made[key]) // copies) for key in wanted}
        return [{key: part[number] for key, part in parts.items()} for number in range(copies)]

    def _written(self, site: FeatureSite, kept: Kept) -> Tensor:
        name = site.name
        made = self.writer.written(site, kept, self.read[name], self.out[name], self.codes[name])
        return made.reshape(self.shapes[name])
