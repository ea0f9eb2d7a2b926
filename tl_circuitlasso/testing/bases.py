"""An SAE: whether its features can be nodes."""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tl_circuitlasso.errors import InputError
from tl_circuitlasso.models import Adapter, adapt
from tl_circuitlasso.models.encoder import Encoder
from tl_circuitlasso.models.sae import SAEFeatures
from tl_circuitlasso.testing.checking import Check, CheckFailure, close, expect, ignore, random_tokens, run


def check_basis(
    sae: Any, model: Any, hook: str | None = None, tokens: Int[Tensor, "batch pos"] | None = None
) -> tuple[str, ...]:
    """Can this SAE, or anything with `encode`, `decode` and `W_dec`, be the basis of a graph of this model?

    Checked: shapes; finite codes that aren't negative; a sample's codes don't depend on the samples beside it; what
    codes and error say is the activation; every feature writes its row of W_dec times its code (times one factor per
    sample where the SAE normalises its input); two calls agree and leave the object as it was. `hook`: where it reads,
    by default what its metadata say.

    Raises
    ------
    CheckFailure: names every check that failed. InputError: no hook is given or known.

    >>> import tl_circuitlasso as tcl
    >>> demo = tcl.load_demo(prompts=1)
    >>> sae = tcl.synthetic.random_sae(48, 8)
    >>> len(check_basis(sae, demo.model, "blocks.0.hook_resid_post")) > 3
    True
    """
    place = hook or _own_hook(sae)
    return run(f"the basis at {place}", _basis_checks(sae, adapt(model), place, tokens))


def _own_hook(sae: Any) -> str:
    cfg = getattr(sae, "cfg", None)
    metadata = getattr(cfg, "metadata", None)
    found = getattr(metadata, "hook_name", None) or getattr(cfg, "hook_name", None)
    if not isinstance(found, str):
        raise InputError("`hook` is missing, and the SAE doesn't say what it reads: give the name of a hook")
    return found


def _basis_checks(sae: Any, adapter: Adapter, hook: str, tokens: Tensor | None) -> Iterator[Check]:
    made: list[Encoder] = []
    yield "has encode, decode and W_dec", lambda: made.append(SAEFeatures({hook: sae}).encoders()[hook])
    if not made:
        return
    encoder = made[0]
    prompts = random_tokens(adapter) if tokens is None else tokens
    acts = adapter.run(prompts, None, {hook, encoder.hook_out})
    x, out = (acts[name].flatten(0, 1) for name in (hook, encoder.hook_out))
    before = _held(sae)
    yield "reads this model's activations", lambda: ignore(encoder.encode_with_error(x, out))
    yield "codes aren't negative", lambda: expect(bool((encoder.encode(x) >= 0).all()), "some codes are below 0")
    yield (
        "codes stand by themselves",
        lambda: close(encoder.encode(x[:2]), encoder.encode(x)[:2], "alone and together"),
    )
    yield "codes and error are the activation", lambda: _adds_up(encoder, x, out)
    yield "features write W_dec", lambda: _writes(encoder, x)
    yield "two calls agree", lambda: expect(torch.equal(encoder.encode(x), encoder.encode(x)), "codes differ")
    yield "is left as it was", lambda: _same(before, _held(sae))


def _held(sae: Any) -> dict[str, tuple[Any, int]]:
    """Its attributes, parameters and buffers, and how often each tensor was changed in place."""
    held: dict[str, Any] = dict(vars(sae)) if hasattr(sae, "__dict__") else {}
    if isinstance(sae, torch.nn.Module):
        held |= {**dict(sae.named_parameters()), **dict(sae.named_buffers())}
    counted = {name: isinstance(value, Tensor) and not value.is_inference() for name, value in held.items()}
    return {name: (value, value._version if counted[name] else 0) for name, value in held.items()}


def _same(before: dict[str, tuple[Any, int]], now: dict[str, tuple[Any, int]]) -> None:
    changed = sorted(before.keys() ^ now.keys()) + [
        name
        for name, (value, times) in now.items()
        if name in before and (value is not before[name][0] or times != before[name][1])
    ]
    expect(not changed, f"changed: {', '.join(changed)}")


def _adds_up(encoder: Encoder, x: Tensor, out: Tensor) -> None:
    _, error = encoder.encode_with_error(x, out)
    close(encoder.reconstruct(x) + error, out.flatten(1).float(), "what codes and error say against the activation")


def _writes(encoder: Encoder, x: Tensor) -> None:
    """All codes raised by random amounts: the change must be these times W_dec, up to one factor per sample."""
    codes = encoder.encode(x)
    if not bool(codes.any()):
        raise CheckFailure("no feature fires on these prompts: give `tokens` that it was trained on")
    coarse = encoder.sae.W_dec.dtype in (torch.float16, torch.bfloat16)
    tolerance = 5e-2 if coarse else 2e-3
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        more = (torch.rand(encoder.features, generator=generator) * codes.max().cpu()).to(codes.device)
        plain, other = encoder.edited(x, lambda values, more=more: values + more.to(values))
        wanted = (more @ encoder.written.to(more.device)).expand_as(plain)
        factor = ((other - plain) * wanted).sum(1) / wanted.square().sum(1)
        close(other - plain, factor[:, None] * wanted, "what raised codes add, against codes @ W_dec", tolerance)
        spread, mean = float(factor.max() - factor.min()), float(factor.mean())
        expect(mean > 0, "features write against their rows of W_dec")
        # A factor that differs from sample to sample is a normalised input's; one for all should be in W_dec.
        alike = spread <= 2 * tolerance * mean
        expect(not alike or abs(mean - 1) <= 5 * tolerance, f"features write {mean:.3g} times their rows of W_dec")
