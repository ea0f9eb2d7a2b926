"""Does an SAE fit the model? Shapes must; what its metadata says of its training is compared, and warned about.

SAELens' metadata answers None for whatever it doesn't hold, so only values that are there are compared.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from tl_circuitlasso._checks import warn
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.models.adapter import Adapter
from tl_circuitlasso.models.encoder import Encoder
from tl_circuitlasso.models.tokens import Batch

UNNAMED = "custom"  # as TransformerLens calls models that it hasn't loaded by a name
CENTRED = 1e-4  # mean over d_model of what a centred model writes, relative to its size


class SAEMismatch(UserWarning):
    """An SAE's metadata says that it was made for something else."""


def check_shapes(encoders: Mapping[str, Encoder], acts: Mapping[str, Tensor]) -> None:
    """InputError where an SAE is made for activations of another width than those at its hooks."""
    for encoder in encoders.values():
        weight = getattr(encoder.sae, "W_enc", None)
        shape = tuple(weight.shape) if isinstance(weight, Tensor) and weight.ndim == 2 else (None, None)
        reads = (
            shape[1] if shape[0] == encoder.features != shape[1] else shape[0]
        )  # circuit-tracer stores it transposed
        for hook, width in ((encoder.hook, reads), *((out, encoder.width) for out in encoder.outputs)):
            there = acts[hook][0, 0].numel()
            if width is not None and width != there:
                raise InputError(
                    f"`saes`: the SAE at {encoder.hook} works on width {width}, but activations at {hook} have width "
                    f"{there}: it was made for another model or hook"
                )


def check_cross_layer(encoders: Mapping[str, Encoder], order: Mapping[str, int], *, error: bool) -> None:
    """InputError where a cross-layer transcoder's error is asked for, or it writes to what is computed before it."""
    for encoder in encoders.values():
        if not encoder.is_cross_layer:
            continue
        if error:
            raise InputError(
                f"`error`: what the cross-layer transcoder at {encoder.hook} misses of an MLP's output it shares with "
                "the layers below: pass SAEFeatures(..., error=False)"
            )
        if order[encoder.hook] > order[encoder.hook_out]:
            raise InputError(
                f"`saes`: the cross-layer transcoder at {encoder.hook} writes to {encoder.hook_out}, which is computed "
                "before what it reads"
            )


def check_hooks(encoders: Mapping[str, Encoder]) -> None:
    """InputError where two SAEs read one activation: the stream between two layers has a name on either side."""
    seen: dict[str, str] = {}
    for hook in encoders:
        twin = seen.setdefault(_stream(hook), hook)
        if twin != hook:
            raise InputError(f"`saes` names one activation twice, as {twin} and as {hook}: keep one of them")


def check_labels(encoders: Mapping[str, Encoder], labels: Mapping[str, str]) -> None:
    """InputError where a label is of a node that there can't be: of another hook, or beyond the SAE's features."""
    for name in labels:
        hook, mark, number = name.rpartition("#")
        hook = hook if mark or len(encoders) > 1 else next(iter(encoders))
        if hook not in encoders or not number.isdigit() or int(number) >= encoders[hook].features:
            raise InputError(
                f"`labels` names {name!r}, which is no feature of {', '.join(encoders)}: write '<hook>#<number>'"
            )


def warn_of_mismatches(adapter: Adapter, encoders: Mapping[str, Encoder], batch: Batch) -> None:
    """One `SAEMismatch` warning for each way in which an SAE's metadata doesn't fit the model or the prompts."""
    for encoder in encoders.values():
        for complaint in _complaints(adapter, encoder, batch):
            warn(f"the SAE at {encoder.hook} {complaint}", SAEMismatch)


def metadata(sae: Any) -> dict[str, Any]:
    """What an SAE says of itself: SAELens' metadata as a plain mapping, empty for other objects."""
    held = getattr(getattr(sae, "cfg", None), "metadata", None)
    if isinstance(held, Mapping):
        return dict(held)
    as_dict = getattr(held, "to_dict", None)
    return {} if as_dict is None else dict(as_dict())


def _complaints(adapter: Adapter, encoder: Encoder, batch: Batch) -> Iterator[str]:
    said = metadata(encoder.sae)
    trained_at = said.get("hook_name")
    if trained_at and _stream(trained_at) != _stream(encoder.hook):
        yield f"was trained at {trained_at}: its codes mean little elsewhere"
    name = said.get("model_name")
    if name and adapter.name != UNNAMED and _plain(name) != _plain(adapter.name):
        yield f"was trained on {name}, this model is {adapter.name}"
    yield from _about_tokens(adapter, said, batch)
    yield from _about_processing(adapter, said, encoder)


def _about_tokens(adapter: Adapter, said: Mapping[str, Any], batch: Batch) -> Iterator[str]:
    bos = adapter.special_ids()[0]
    prepended = said.get("prepend_bos")
    if bos is not None and prepended is not None:
        first = batch.tokens[batch.mask & (batch.mask.cumsum(1) == 1)]
        share = float((first == bos).float().mean())
        if prepended and share < 0.5:
            yield "was trained on prompts that begin with BOS, these don't"
        elif not prepended and share > 0.5:
            yield "was trained on prompts without BOS, these begin with it"
    context = said.get("context_size")
    longest = int(batch.mask.sum(1).max())
    if isinstance(context, int) and longest > context:
        yield f"was trained on {context} positions, these prompts have {longest}"


def _about_processing(adapter: Adapter, said: Mapping[str, Any], encoder: Encoder) -> Iterator[str]:
    """SAEs are trained without weight processing unless their metadata says otherwise."""
    if "model_name" not in said:
        return
    wanted = said.get("model_from_pretrained_kwargs") or {}
    if _is_centred(adapter) and not wanted.get("center_writing_weights"):
        yield "was trained on a model with uncentred weights: load the model with from_pretrained_no_processing"
    inside_norm = ".ln" in encoder.hook or "hook_normalized" in encoder.hook
    if inside_norm and _is_folded(adapter) and not wanted.get("fold_ln"):
        yield "reads a norm's output, and this model's norms are folded (fold_ln): use from_pretrained_no_processing"


def _is_folded(adapter: Adapter) -> bool:
    return str(getattr(adapter.model.cfg, "normalization_type", "")) in ("LNPre", "RMSPre")


def _is_centred(adapter: Adapter) -> bool:
    """Whether what a layer writes has mean zero over d_model, as `center_writing_weights` makes it."""
    written = adapter.writer(0)[0]
    return bool(written.mean(-1).abs().max() < CENTRED * written.abs().mean())


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.rpartition("/")[2].lower())


def _stream(hook: str) -> str:
    """One name for the residual stream between two layers, which is hooked on both sides."""
    found = re.fullmatch(r"blocks\.(\d+)\.hook_resid_pre", hook)
    return f"blocks.{int(found[1]) - 1}.hook_resid_post" if found and int(found[1]) else hook
