"""Activations and codes averaged over a text's tokens: what a probe reads, and what is left of it without features.

As decoders are linear, zeroing features at every token takes the mean of what they write out of the mean activation:
one forward pass a text serves every choice of features.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_circuitlasso.errors import InputError
from tl_circuitlasso.models import Adapter, Prompts
from tl_circuitlasso.models.encoder import Encoder
from tl_circuitlasso.models.feature_effects import ENCODE_CHUNK
from tl_circuitlasso.progress import bar


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


@dataclass(frozen=True, eq=False)
class Tokens:
    """The activations of some texts' tokens, BOS left out, and the number of each token's text among `texts`."""

    x: Float[Tensor, "token width"]
    text: Int[Tensor, " token"]
    texts: int


def token_activations(
    adapter: Adapter, hook: str, texts: Any, *, batch_size: int = 32, progress: bool = False
) -> Iterator[Tokens]:
    """Batch by batch; one forward pass a text."""
    prompts = Prompts(adapter, texts, batch_size=batch_size)
    with bar(total=prompts.n_prompts, progress=progress, desc="pool", unit="text") as counting:
        for batch in prompts:
            x = adapter.run(batch.tokens, batch.mask, [hook])[hook].flatten(2)
            yield Tokens(x[batch.keep], batch.keep.nonzero()[:, 0], len(batch.tokens))
            counting.update(len(batch.tokens))


def pool(adapter: Adapter, encoder: Encoder, texts: Any, *, batch_size: int = 32, progress: bool = False) -> Pooled:
    """Average activations and codes over tokens; one forward pass a text.

    Raises
    ------
    InputError: a transcoder, or an SAE whose decoder isn't linear.
    """
    parts = token_activations(adapter, encoder.hook, texts, batch_size=batch_size, progress=progress)
    return pooled_tokens(encoder, parts)


def pooled_tokens(encoder: Encoder, parts: Iterable[Tokens]) -> Pooled:
    """The same from `token_activations`; a text's tokens come in one part.

    Raises
    ------
    InputError: a transcoder, or an SAE whose decoder isn't linear.
    """
    if encoder.is_transcoder:
        raise InputError(
            f"`saes`: a transcoder stands at {encoder.hook}: debiasing needs an SAE of what the probe reads"
        )
    found, codes = [], []
    for number, part in enumerate(parts):
        if number == 0:
            encoder.check_linear(part.x[:ENCODE_CHUNK])
        z = torch.cat([encoder.encode(some) for some in part.x.split(ENCODE_CHUNK)])
        for means, values in ((found, part.x), (codes, z)):
            means.append(_means(values, part))
    return Pooled(encoder.hook, torch.cat(found), torch.cat(codes), encoder.written.double().cpu())


def _means(values: Float[Tensor, "token width"], part: Tokens) -> Float[Tensor, "text width"]:
    """By text; zero where a text has no token."""
    total = torch.zeros(part.texts, values.shape[1], dtype=torch.float64, device=values.device)
    count = torch.bincount(part.text, minlength=part.texts).clamp(min=1)
    return (total.index_add(0, part.text, values.double()) / count[:, None]).cpu()
