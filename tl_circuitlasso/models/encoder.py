"""One SAE at its place in a model: checked once, then codes and errors in float32 whatever the SAE is made of.

SAELens SAEs keep what their last call saw (the mean and spread of a layer-normalised input, the shape of heads), and a
decode after another encode would use it. Here every decode follows its own encode, and both leave the SAE as it was.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_circuitlasso.errors import InputError, ModelError
from tl_circuitlasso.models.cross_layer import OUTPUT
from tl_circuitlasso.models.hooks import is_a

ROOM = 1 << 25  # codes that are dense at any one time
LINEAR = 1e-4  # relative: by this much may a decoder be off from a linear one
SEQUENTIAL = ("TemporalSAE", "TemporalTrainingSAE")  # their codes at a position depend on the positions before it


@dataclass(frozen=True, eq=False)
class Encoder:
    """An SAE or transcoder (any object with encode, decode and W_dec) and the hooks between which it stands.

    sae: the object itself; hook: what it reads; hook_out: what its codes explain, `hook` itself but for transcoders;
    later: where a layer of a cross-layer transcoder writes, too, behind `hook_out` (it needs no decode).

    Raises
    ------
    InputError: no encode, decode or W_dec, a W_dec that isn't (feature, width), or, of a cross-layer transcoder,
        (feature, output, width) for MLP outputs that follow one another in the order of computation.
    ModelError: an SAE whose codes mix positions.
    """

    sae: Any
    hook: str
    hook_out: str
    later: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        needed = ("encode", "W_dec") if self.is_cross_layer else ("encode", "decode", "W_dec")
        missing = [name for name in needed if getattr(self.sae, name, None) is None]
        if missing:
            raise InputError(
                f"`saes`: what stands for {self.hook} is a {type(self.sae).__name__} without {', '.join(missing)}; "
                "give a SAELens SAE or an object with encode, decode and W_dec"
            )
        if self.is_cross_layer:
            self._check_outputs()
        elif not isinstance(self.sae.W_dec, Tensor) or self.sae.W_dec.ndim != 2:
            raise InputError(f"`saes`: W_dec of the SAE at {self.hook} must be a (feature, width) matrix")
        if is_a(self.sae, *SEQUENTIAL):
            raise ModelError(
                f"`saes`: the codes of a {type(self.sae).__name__} at {self.hook} depend on earlier positions"
            )

    @property
    def features(self) -> int:
        """How many features the SAE has."""
        return self.sae.W_dec.shape[0]

    def _check_outputs(self) -> None:
        layers = [int(found[1]) for hook in self.outputs if (found := OUTPUT.match(hook))]
        if len(layers) != len(self.outputs) or layers != sorted(set(layers)):
            raise InputError(
                f"`saes`: the cross-layer transcoder at {self.hook} writes to {', '.join(self.outputs)}: `hook_outs` "
                "are MLP outputs (blocks.<layer>.hook_mlp_out) in the order of computation"
            )
        decoder = self.sae.W_dec
        if not isinstance(decoder, Tensor) or decoder.ndim != 3 or decoder.shape[1] != len(self.outputs):
            shape = tuple(decoder.shape) if isinstance(decoder, Tensor) else type(decoder).__name__
            raise InputError(
                f"`saes`: W_dec of the cross-layer transcoder at {self.hook} is {shape}: with {len(self.outputs)} "
                "`hook_outs` it must be (feature, output, width)"
            )

    @property
    def is_cross_layer(self) -> bool:
        """Whether its codes write to MLP outputs of several layers."""
        return self.later is not None

    @property
    def outputs(self) -> tuple[str, ...]:
        """Every hook that the codes write to."""
        return (self.hook_out, *(self.later or ()))

    @property
    def width(self) -> int:
        """The width of what the codes explain."""
        return self.sae.W_dec.shape[-1]

    @property
    def decoder(self) -> Float[Tensor, "feature width"]:
        """What each feature writes at code 1 (times the token's spread in a layer-normalised SAE), of a cross-layer
        transcoder to all its outputs together."""
        decoder = self.sae.W_dec.detach().float()
        return decoder.sum(1) if self.is_cross_layer else decoder

    @property
    def written(self) -> Float[Tensor, "feature width"]:
        """The same, but of length 1 in an SAE whose codes hold the length already."""
        if not getattr(getattr(self.sae, "cfg", None), "rescale_acts_by_decoder_norm", False):
            return self.decoder
        return self.decoder / self.decoder.norm(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)

    @property
    def written_each(self) -> Float[Tensor, "feature out width"]:
        """What a feature of a cross-layer transcoder writes to each output at code 1."""
        return self.sae.W_dec.detach().float()

    @property
    def is_transcoder(self) -> bool:
        """Whether reading and writing happen at different hooks."""
        return self.hook != self.hook_out

    def encode(self, x: Float[Tensor, "sample *width"]) -> Float[Tensor, "sample feature"]:
        """The codes of activations at `hook`, in float32 on the device of `x`."""
        with torch.no_grad(), _unchanged(self.sae):
            return self._codes(x).to(x.device, torch.float32)

    def reconstruct(self, x: Float[Tensor, "sample *width"]) -> Float[Tensor, "sample out"]:
        """What the codes of `x` (with a transcoder's skip connection) say of the activations at `hook_out`."""
        return self._both(x)[1]

    def encode_with_error(
        self, x: Float[Tensor, "sample *width"], out: Float[Tensor, "sample *out_width"]
    ) -> tuple[Float[Tensor, "sample feature"], Float[Tensor, "sample out"]]:
        """The codes of `x`, and the part of the activations `out` at `hook_out` that they miss."""
        codes, fitted = self._both(x)
        return codes, out.flatten(1).float() - fitted

    def edited(
        self, x: Float[Tensor, "sample *width"], change: Callable[[Tensor], Tensor]
    ) -> tuple[Float[Tensor, "sample out"], Float[Tensor, "sample out"]]:
        """What the codes of `x` write, and what they write when `change(codes)` stands in their place."""
        with torch.no_grad(), _unchanged(self.sae):
            codes = self._codes(x)
            plain = self.decoded(codes)
            again = change(self._codes(x))  # a decode may use up what its encode left behind
            other = self.decoded(again)
            skip = getattr(self.sae, "W_skip", None)
            beside = self.ready(x) @ skip.T if isinstance(skip, Tensor) else 0.0
            return (plain + beside).to(x.device, torch.float32), (other + beside).to(x.device, torch.float32)

    def check_linear(self, x: Float[Tensor, "sample *width"]) -> None:
        """Raise an InputError where what codes of `x` write isn't `codes @ written`."""
        plain, edited = self.edited(x, torch.zeros_like)
        off = (plain - edited) - self.encode(x) @ self.written.to(x)
        if float(off.norm()) > LINEAR * float((plain - edited).norm()):
            raise InputError(f"`saes`: the decoder of the SAE at {self.hook} isn't linear in its codes")

    def _both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad(), _unchanged(self.sae):
            codes = self._codes(x)
            fitted = self.decoded(codes)
            skip = getattr(self.sae, "W_skip", None)
            if isinstance(skip, Tensor):
                fitted = fitted + self.ready(x) @ skip.T
            return codes.to(x.device, torch.float32), fitted.to(x.device, torch.float32)

    def _codes(self, x: Tensor) -> Tensor:
        try:
            codes = self.sae.encode(self.ready(x))
        except RuntimeError as error:
            raise InputError(
                f"`saes`: the SAE at {self.hook} can't read activations of shape {tuple(x.shape[1:])} ({error}): it "
                "was made for another model or hook"
            ) from error
        self._check_shape("encode", codes, (len(x), self.features))
        codes = codes.to_dense() if codes.is_sparse else codes
        if not bool(torch.isfinite(codes).all()):
            raise ModelError(
                f"`saes`: codes of the SAE at {self.hook} are NaN or infinite: check its weights and dtype"
            )
        if codes.numel() and float(codes.min()) < 0:
            raise InputError(
                f"`saes`: the SAE at {self.hook} gives negative codes, as AbsTopK does: give one whose codes are zero "
                "or more, such as the positive and the negative parts as features of their own"
            )
        return codes

    def decoded(self, codes: Float[Tensor, "sample feature"]) -> Float[Tensor, "sample out"]:
        """What the codes alone say: a decoder that would add the skip connection itself is shown an input of zeros."""
        skip = getattr(self.sae, "W_skip", None)
        shown = {}
        if isinstance(skip, Tensor) and "input_acts" in signature(self.sae.decode).parameters:
            shown = {"input_acts": skip.new_zeros(len(codes), skip.shape[1])}
        found = self.sae.decode(codes, **shown)
        found = found.flatten(1) if isinstance(found, Tensor) and found.ndim > 2 else found
        self._check_shape("decode", found, (len(codes), self.width))
        return found

    def _check_shape(self, name: str, found: Any, wanted: tuple[int, int]) -> None:
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        if shape != wanted:
            raise InputError(
                f"`saes`: {name} of the SAE at {self.hook} gives {shape} for {wanted[0]} samples; by its W_dec "
                f"({self.features} features, width {self.width}) that should be {wanted}"
            )

    def ready(self, x: Tensor) -> Tensor:
        """As the SAE wants its input: its own dtype and device, heads side by side unless it does that itself."""
        by_head = getattr(self.sae, "hook_z_reshaping_mode", False)
        return (x if by_head else x.flatten(1)).to(self.sae.W_dec.device, self.sae.W_dec.dtype)

    def rows_at_once(self) -> int:
        """How many samples to encode in one go."""
        return max(1, ROOM // self.features)


@contextmanager
def _unchanged(sae: Any) -> Iterator[None]:
    """Put back the attributes that a call leaves on an SAE."""
    before = dict(vars(sae)) if hasattr(sae, "__dict__") else {}
    try:
        yield
    finally:
        if before:
            now = vars(sae)
            for name in [name for name in now if name not in before]:
                del now[name]
            now.update(before)
