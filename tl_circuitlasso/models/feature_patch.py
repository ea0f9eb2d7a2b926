"""Running a model with only some neurons, residual dimensions or SAE features: the others carry ablated values.

At a site with activation x, codes f(x) (for neurons and dimensions x itself) and decoder d,

    x' = d(f')            + error          f'_i = f_i(x) for kept i, else an ablated value
    error = x - d(f(x)) (kept), an ablated error, or nothing (removed)

where x already feels what was ablated at earlier sites. With all features and the error kept the model isn't touched.
Codes are dense for a few positions at a time only.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_circuitlasso.errors import ModelError
from tl_circuitlasso.models.adapter import Adapter
from tl_circuitlasso.models.encoder import Encoder
from tl_circuitlasso.models.hooks import Observer

AT_ONCE = 1 << 25  # codes that are dense at any one time


@dataclass(frozen=True, eq=False)
class FeatureSite:
    """A place whose coordinates are features: an SAE's, or with encoder None the activation's own.

    `reads` is the hook that is encoded, `writes` the one that is changed: the same, but for transcoders.
    """

    name: str
    reads: str
    writes: str
    features: int
    encoder: Encoder | None

    def codes(self, x: Float[Tensor, "row *width"]) -> Float[Tensor, "row feature"]:
        """The features of activations at `reads`."""
        return x.flatten(1) if self.encoder is None else self.encoder.encode(x)

    def error(
        self, x: Float[Tensor, "row *width"], out: Float[Tensor, "row *out_width"]
    ) -> Float[Tensor, "row out"] | None:
        """What the features miss of the activations `out` at `writes`; None where they miss nothing."""
        return None if self.encoder is None else out.flatten(1).float() - self.encoder.reconstruct(x)

    @property
    def rows_at_once(self) -> int:
        """How many positions to encode in one go."""
        return max(1, AT_ONCE // self.features)


@dataclass(frozen=True, eq=False)
class Kept:
    """What of a site stays as it is: its features, and the error: "keep", "ablate" or "remove"."""

    features: Bool[Tensor, " feature"]
    error: str

    def untouched(self, site: FeatureSite) -> bool:
        """Whether nothing of the site changes."""
        return bool(self.features.all()) and (site.encoder is None or self.error == "keep")


@dataclass(frozen=True, eq=False)
class Carried:
    """What changed features carry: values by position (means, zeros), codes of other activations at `reads`, or a
    multiple of their own codes.

    Attributes
    ----------
    values, errors: by site name, with axes of one where all positions (or prompts) are alike.
    others: activations of another run by hook name, from which codes and errors are taken; empty with `values`.
    scale: the multiple, for steering; None where one of the above is meant.
    """

    values: Mapping[str, Float[Tensor, "#batch #pos feature"]]
    errors: Mapping[str, Float[Tensor, "#batch #pos out"]]
    others: Mapping[str, Tensor]
    scale: float | None = None


def hooks_of(sites: Sequence[FeatureSite]) -> list[str]:
    """Every hook that the sites read or write, each once."""
    return list(dict.fromkeys(hook for site in sites for hook in (site.reads, site.writes)))


def run_features(
    adapter: Adapter,
    tokens: Int[Tensor, "batch pos"],
    mask: Bool[Tensor, "batch pos"] | None,
    sites: Sequence[FeatureSite],
    kept: Mapping[str, Kept],
    carried: Carried,
) -> Float[Tensor, "batch pos vocab"]:
    """The logits with everything outside `kept` ablated. One forward pass.

    Raises
    ------
    ModelError: a hook of the model is missing, or fires in the wrong order.
    """
    live = [site for site in sites if not kept[site.name].untouched(site)]
    editor = _Editor(Writer(adapter, tokens.shape, carried), kept)
    return adapter.run(tokens, mask, ["logits"], edits=editor.edits(live))["logits"]


class Writer:
    """What sites write in a pass where some of their features are ablated."""

    def __init__(self, adapter: Adapter, shape: torch.Size, carried: Carried) -> None:
        self.adapter, self.shape, self.carried = adapter, tuple(shape), carried

    def rows(self, activation: Tensor) -> Float[Tensor, "row *width"]:
        """One row per position, prompt by prompt; some models flatten these axes themselves."""
        by_row = activation if activation.ndim == 2 else activation.flatten(0, 1)
        return by_row.to(self.adapter.compute_dtype)

    def written(
        self,
        site: FeatureSite,
        kept: Kept,
        x: Float[Tensor, "row *width"],
        out: Float[Tensor, "row out"],
        codes: Float[Tensor, "row feature"] | None = None,
    ) -> Float[Tensor, "row out"]:
        """What takes the place of `out` at the site where it reads `x`; kept features have the values `codes`, or those
        that `x` has."""
        pieces = []
        for rows in torch.arange(len(x), device=x.device).split(site.rows_at_once):
            known = None if codes is None else codes[rows]
            pieces.append(self._piece(site, kept, x[rows], out[rows], rows, known))
        return torch.cat(pieces)

    def values(self, site: FeatureSite, x: Float[Tensor, "row *width"]) -> Float[Tensor, "row feature"]:
        """What the site's features carry when ablated."""
        return self._values(site, torch.arange(len(x), device=x.device), site.codes(x)).expand(len(x), -1)

    def _piece(
        self, site: FeatureSite, kept: Kept, x: Tensor, out: Tensor, rows: Tensor, known: Tensor | None
    ) -> Tensor:
        def mixed(own: Tensor) -> Tensor:
            stay = own if known is None else known.to(own)
            return torch.where(kept.features.to(own.device), stay, self._values(site, rows, own))

        if site.encoder is None:
            return mixed(out)
        plain, edited = site.encoder.edited(x, mixed)
        match kept.error:
            case "keep":
                return out + (edited - plain).to(out)
            case "remove":
                return edited
            case _:
                return edited + self._errors(site, rows).to(edited)

    def _values(self, site: FeatureSite, rows: Tensor, codes: Tensor) -> Float[Tensor, "row feature"]:
        if self.carried.scale is not None:
            return self.carried.scale * codes
        if site.name in self.carried.values:
            return self._at(self.carried.values[site.name], rows).to(codes)
        return site.codes(self.rows(self.carried.others[site.reads])[rows]).to(codes)

    def _errors(self, site: FeatureSite, rows: Tensor) -> Float[Tensor, "row out"]:
        if site.name in self.carried.errors:
            return self._at(self.carried.errors[site.name], rows)
        other = (self.rows(self.carried.others[hook])[rows] for hook in (site.reads, site.writes))
        found = site.error(*other)
        assert found is not None  # only SAEs have errors
        return found

    def _at(self, values: Tensor, rows: Tensor) -> Tensor:
        batch, pos = self.shape
        prompts = rows // pos if values.shape[0] == batch else torch.zeros_like(rows)
        positions = rows % pos if values.shape[1] == pos else torch.zeros_like(rows)
        return values[prompts, positions]


class _Editor:
    """What has been heard of a pass, and the edits of its sites."""

    def __init__(self, writer: Writer, kept: Mapping[str, Kept]) -> None:
        self.writer, self.kept = writer, kept
        self.heard: dict[str, Tensor] = {}

    def edits(self, sites: Sequence[FeatureSite]) -> Iterator[tuple[str, Observer]]:
        for site in sites:
            if site.reads != site.writes:
                yield site.reads, partial(self.heard.__setitem__, site.reads)
            yield site.writes, partial(self._edit, site)

    def _edit(self, site: FeatureSite, activation: Tensor) -> Tensor:
        read = activation if site.reads == site.writes else self.heard.get(site.reads)
        if read is None:
            raise ModelError(f"`{site.reads}` is computed after `{site.writes}`, which its features should write")
        x, out = self.writer.rows(read), self.writer.rows(activation).flatten(1)
        made = self.writer.written(site, self.kept[site.name], x, out)
        return made.to(activation.dtype).reshape(activation.shape)
