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
    codes and error say is the activation; a feature writes along its row of W_dec; two calls agree and leave the object
    as it was. `hook`: where it reads, by default what its metadata say.

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
    before = dict(vars(sae)) if hasattr(sae, "__dict__") else {}
    yield "reads this model's activations", lambda: ignore(encoder.encode_with_error(x, out))
    yield "codes aren't negative", lambda: expect(bool((encoder.encode(x) >= 0).all()), "some codes are below 0")
    yield (
        "codes stand by themselves",
        lambda: close(encoder.encode(x[:2]), encoder.encode(x)[:2], "alone and together"),
    )
    yield "codes and error are the activation", lambda: _adds_up(encoder, x, out)
    yield "features write along W_dec", lambda: _writes(encoder, x)
    yield "two calls agree", lambda: expect(torch.equal(encoder.encode(x), encoder.encode(x)), "codes differ")
    yield "is left as it was", lambda: expect(_same(before, sae), "attributes have changed")


def _same(before: dict[str, Any], sae: Any) -> bool:
    now = vars(sae) if hasattr(sae, "__dict__") else {}
    return now.keys() == before.keys() and all(now[name] is before[name] for name in now)


def _adds_up(encoder: Encoder, x: Tensor, out: Tensor) -> None:
    _, error = encoder.encode_with_error(x, out)
    close(encoder.reconstruct(x) + error, out.flatten(1).float(), "what codes and error say against the activation")


def _writes(encoder: Encoder, x: Tensor) -> None:
    """Codes of one feature raised by 1: the change must point where its row of W_dec does."""
    codes = encoder.encode(x)
    if not bool(codes.any()):
        raise CheckFailure("no feature fires on these prompts: give `tokens` that it was trained on")
    for feature in codes.sum(0).topk(min(3, encoder.features)).indices.tolist():

        def raised(values: Tensor, feature: int = feature) -> Tensor:
            return values.index_add(1, torch.tensor([feature]).to(values.device), torch.ones_like(values[:, :1]))

        plain, other = encoder.edited(x, raised)
        row = encoder.decoder[feature].to(other.device)
        along = torch.nn.functional.cosine_similarity(other - plain, row.expand_as(plain), dim=1)
        expect(float(along.min()) > 0.99, f"feature {feature} writes elsewhere (cosine {float(along.min()):.2f})")
