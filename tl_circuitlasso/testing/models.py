"""A model: whether the library reads it truthfully, and cuts it as it says."""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_circuitlasso.baselines.edges import EdgeLayout, as_circuits, written_out
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.models import Adapter, adapt
from tl_circuitlasso.models.ablation import from_run
from tl_circuitlasso.models.closure import closure_check
from tl_circuitlasso.models.patch import run_circuits
from tl_circuitlasso.models.patching import record_all, unembed
from tl_circuitlasso.testing.checking import Check, close, expect, ignore, random_tokens, run, state


def check_model(model: Any, tokens: Int[Tensor, "batch pos"] | None = None) -> tuple[str, ...]:
    """Can this model be read and patched truthfully?

    Checked: it is supported; its activations add up as its weights say (heads, MLPs, norms, unembedding); a circuit of
    all edges is the model and one of none is the run that is patched in; a single cut edge into the logits does what
    the weights say; two runs agree; it is left as it was. `tokens`: two or more prompts; random ones by default.

    Raises
    ------
    CheckFailure: names every check that failed. InputError: one prompt, or all the same.

    >>> import tl_circuitlasso as tcl
    >>> demo = tcl.load_demo(prompts=1)
    >>> len(check_model(demo.model)) > 3
    True
    """
    if tokens is not None and torch.equal(tokens, tokens.flip(0)):
        raise InputError("`tokens` read the same from the last prompt to the first: give two or more different prompts")
    return run("the model", _model_checks(model, tokens))


def _model_checks(model: Any, tokens: Tensor | None) -> Iterator[Check]:
    made: list[Adapter] = []
    yield "is supported", lambda: made.append(adapt(model))
    if not made:
        return
    adapter = made[0]
    prompts = random_tokens(adapter) if tokens is None else tokens
    before = state(model)
    yield "activations add up", lambda: ignore(closure_check(adapter, prompts))
    yield "two runs agree", lambda: _two_runs(adapter, prompts)
    yield "all edges are the model, none the other run", lambda: _ends(adapter, prompts)
    yield "one cut edge does what the weights say", lambda: _one_cut(adapter, prompts)
    yield "is left as it was", lambda: expect(state(model) == before, "weights, mode or hooks have changed")


def _two_runs(adapter: Adapter, tokens: Tensor) -> None:
    first, second = (adapter.run(tokens, None, ["logits"])["logits"] for _ in range(2))
    expect(torch.equal(first, second), "the logits of two runs on the same prompts differ: is dropout on?")


def _cut_run(adapter: Adapter, tokens: Tensor, kept: Tensor) -> Float[Tensor, "circuit batch pos vocab"]:
    cut = from_run(adapter, tokens.flip(0), None)
    return run_circuits(adapter, tokens, None, as_circuits(kept, EdgeLayout(adapter.shape)), cut)


def _ends(adapter: Adapter, tokens: Tensor) -> None:
    mask = EdgeLayout(adapter.shape).mask()
    full, empty = _cut_run(adapter, tokens, torch.stack([mask, torch.zeros_like(mask)]))
    clean, other = (adapter.run(some, None, ["logits"])["logits"] for some in (tokens, tokens.flip(0)))
    close(full, clean, "a circuit of all edges against the model")
    close(empty, other, "a circuit of no edge against the run that is patched in")


def _one_cut(adapter: Adapter, tokens: Tensor) -> None:
    """Edges into the logits, by the engine and by the unembedding of what is left of the last stream."""
    layout = EdgeLayout(adapter.shape)
    plain, other = record_all(adapter, tokens), record_all(adapter, tokens.flip(0))
    change = plain.written.map(torch.sub, other.written)
    everywhere = torch.ones_like(tokens, dtype=torch.bool).nonzero(as_tuple=True)
    deltas = written_out(adapter, change, everywhere).unflatten(1, tokens.shape)
    sources = sorted({0, 1, layout.n_sources - 1})
    kept = layout.mask().repeat(len(sources), 1, 1)
    for number, source in enumerate(sources):
        kept[number, source, -1] = False
    for found, source in zip(_cut_run(adapter, tokens, kept), sources):
        wanted = unembed(adapter, plain.streams.logits - deltas[source])
        close(found, wanted, f"without {layout.index.names[source]}->logits")
