"""Gradients at every reading point: how an objective changes with what each component reads.

`trace` gives the derivative of an objective with respect to what each head reads through q, k and v, what each MLP
reads and what the unembedding reads; `read_gradient` takes a head's part from its queries, keys or values back to the
residual stream. Only activations have gradients; no parameter collects one.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_circuitlasso.models.adapter import Adapter
from tl_circuitlasso.models.attention import PORTS, Attending, keeps_heads_shared
from tl_circuitlasso.models.hooks import Observer
from tl_circuitlasso.models.metric import as_objective
from tl_circuitlasso.models.names import PROJECTED, Kind, act, as_projected
from tl_circuitlasso.models.norms import Norm, scale_of
from tl_circuitlasso.models.passes import ForwardPass, differentiable
from tl_circuitlasso.models.patching import Projection, Streams, Written, mlp_norm
from tl_circuitlasso.models.weights import Port

Objective = Callable[[Tensor], Tensor]  # logits -> scalar


@dataclass(frozen=True, eq=False)
class Trace:
    """One forward and backward pass: what was written and read, and the objective's derivatives.

    `ports[l][p]` is the derivative with respect to the queries, keys or values as projected, before query/key norm and
    rotation; `mlps` and `logits` with respect to what these readers see of the residual stream; `written` with respect
    to what each component wrote (as in `Written`), that is, through all of its readers; only kept if asked for.
    """

    value: float
    logits: Float[Tensor, "batch pos vocab"]
    values: Written
    streams: Streams
    ports: tuple[dict[Port, Float[Tensor, "batch pos head d_head"]], ...]
    mlps: tuple[Float[Tensor, "batch pos d_model"], ...]
    unembed: Float[Tensor, "batch pos d_model"]
    written: Written | None


def trace(
    adapter: Adapter,
    tokens: Int[Tensor, "batch pos"],
    mask: Bool[Tensor, "batch pos"] | None,
    objective: Objective,
    *,
    start: Float[Tensor, "batch pos d_model"] | None = None,
    heads: Mapping[int, Float[Tensor, "batch pos head d_head"]] | None = None,
    mlps: Mapping[int, Float[Tensor, "batch pos d_model"]] | None = None,
    outputs: bool = False,
) -> Trace:
    """One forward and one backward pass of `objective(logits)`.

    `start` replaces the residual stream in front of the first layer, `heads[l]` all z of a layer and `mlps[l]` what an
    MLP writes; replaced activations are constants, so no derivative flows through them into their own inputs. With
    `outputs` the derivatives at what is written are kept too.

    Raises
    ------
    InputError: the objective isn't a finite scalar that depends on the logits.
    ModelError: a hook point didn't fire.
    """
    tape = _Tape(adapter, tokens, mask, heads or {}, mlps or {}, outputs)
    with differentiable(adapter):
        tape.made.run(tape.edits(start))
        value = as_objective(objective(tape.made["logits"]))
        grads = tape.made.gradients_of(value, tape.differentiated())
    with torch.no_grad():
        return tape.finish(float(value.detach()), grads)


class _Tape:
    """What is heard and set in one forward pass, by the library's names for activations."""

    def __init__(
        self,
        adapter: Adapter,
        tokens: Tensor,
        mask: Tensor | None,
        heads: Mapping[int, Tensor],
        mlps: Mapping[int, Tensor],
        outputs: bool,
    ) -> None:
        self.adapter, self.heads, self.mlps, self.outputs = adapter, heads, mlps, outputs
        self.layers = range(adapter.shape.n_layers)
        self.with_mlps = () if adapter.shape.attn_only else self.layers
        self.shared = keeps_heads_shared(adapter)
        wanted = [adapter.final, *(key for layer in self.layers for key in self._keys(layer)), "logits"]
        self.made = ForwardPass(adapter, tokens, mask, wanted, own_heads=True, gradients=True)

    def _keys(self, layer: int) -> Iterator[str]:
        kinds: list[Kind] = ["resid_pre", "z", *PROJECTED]
        kinds.extend([] if self.adapter.shape.attn_only else ["mlp_out", "mlp_stream", "mlp_read"])
        kinds.extend(["pattern"] if self.shared else [])
        kinds.extend(["scale.attn_out", "attn_out"] if self._behind_norm(layer) else [])
        return (act(kind, layer) for kind in kinds)

    def _behind_norm(self, layer: int) -> bool:
        return self.adapter.layouts[layer].attn_post is not None

    def edits(self, start: Tensor | None) -> Iterator[tuple[str, Observer]]:
        """Where derivatives end: nothing in front of the first layer, or of what is set, needs a graph."""
        yield act("resid_pre", 0), lambda activation: _constant(activation if start is None else start, activation)
        for layer, value in self.mlps.items():
            yield act("mlp_out", layer), partial(_constant, value)
        for layer, heads in self.heads.items():
            if self._behind_norm(layer):
                # Their output can't be set through z: the norm would rescale it. Such models have no b_O.
                written = torch.einsum("bphe,hed->bpd", heads, self.adapter.writer(layer)[0])
                yield act("attn_out", layer), partial(_constant, written)
            else:
                yield act("z", layer), partial(_constant, heads)

    def differentiated(self) -> list[str]:
        """The activations whose derivatives are asked for."""
        kinds: list[Kind] = [*PROJECTED]
        kinds.extend(["z"] if self.outputs or self.shared else [])
        keys = [self.adapter.final, *(act(kind, layer) for kind in kinds for layer in self.layers)]
        keys += [act("mlp_read", layer) for layer in self.with_mlps]
        if self.outputs:
            behind = [layer for layer in self.layers if self._behind_norm(layer)]
            keys += [act("resid_pre", 0), *(act("mlp_out", layer) for layer in self.with_mlps)]
            keys += [act("attn_out", layer) for layer in behind]
        return keys

    def heard(self, key: str) -> Tensor:
        return self.made[key].detach()

    def finish(self, value: float, grads: Mapping[str, Tensor]) -> Trace:
        adapter, layers = self.adapter, self.layers
        mlp_streams = tuple(self.heard(act("mlp_stream", layer)) for layer in self.with_mlps)
        values = Written(
            self.heard(act("resid_pre", 0)),
            tuple(self._unscaled(layer) for layer in layers),
            tuple(self.heard(act("mlp_out", layer)) for layer in self.with_mlps),
        )
        return Trace(
            value=value,
            logits=self.heard("logits"),
            values=values,
            streams=Streams(
                tuple(self.heard(act("resid_pre", layer)) for layer in layers),
                mlp_streams,
                self.heard(self.adapter.final),
            ),
            ports=tuple(self._ports(grads, layer) for layer in layers),
            mlps=tuple(
                norm_gradient(mlp_norm(adapter, layer), stream, grads[act("mlp_read", layer)])
                for layer, stream in zip(self.with_mlps, mlp_streams)
            ),
            unembed=grads[self.adapter.final],
            written=self._outputs(grads) if self.outputs else None,
        )

    def _ports(self, grads: Mapping[str, Tensor], layer: int) -> dict[Port, Tensor]:
        if layer in self.heads:  # what reads into replaced heads is read by nobody
            return dict.fromkeys(PORTS, torch.zeros_like(self.heard(act("z", layer))))
        if not self.shared:
            return {port: grads[as_projected(port, layer)] for port in PORTS}
        projected: dict[Port, Tensor] = {port: self.heard(as_projected(port, layer)) for port in PORTS}
        pattern, positions = self.heard(act("pattern", layer)), self.made.positions
        return Attending(self.adapter, layer, projected, pattern, positions).own_gradients(grads[act("z", layer)])

    def _outputs(self, grads: Mapping[str, Tensor]) -> Written:
        return Written(
            grads[act("resid_pre", 0)],
            tuple(self._at_heads(grads, layer) for layer in self.layers),
            tuple(grads[act("mlp_out", layer)] for layer in self.with_mlps),
        )

    def _at_heads(self, grads: Mapping[str, Tensor], layer: int) -> Tensor:
        if not self._behind_norm(layer):
            return grads[act("z", layer)]
        return torch.einsum("bpd,hed->bphe", grads[act("attn_out", layer)], self.adapter.writer(layer)[0])

    def _unscaled(self, layer: int) -> Tensor:
        z = self.heard(act("z", layer))
        return z / self.heard(act("scale.attn_out", layer))[..., None] if self._behind_norm(layer) else z


def _constant(value: Tensor, activation: Tensor) -> Tensor:
    return value.to(activation).detach().clone().requires_grad_()


def norm_gradient(
    norm: Norm | None, x: Float[Tensor, "*batch width"], grad: Float[Tensor, "*batch width"]
) -> Float[Tensor, "*batch width"]:
    """The derivative behind a norm taken to the residual stream in front of it: J(x)' grad.

    With c = x - centred * mean(x), s = scale(x), d = width and u = gain * grad (centred likewise):
    J' grad = u / s - c <c, u> / (d s^3).
    """
    if norm is None:
        return grad
    gained = grad if norm.gain is None else grad * norm.gain
    if norm.centred:
        gained = gained - gained.mean(-1, keepdim=True)
    return _through_scale(norm, x, gained / scale_of(x, norm))


def _through_scale(norm: Norm, x: Tensor, linear: Tensor) -> Tensor:
    """From the derivative at fixed scale to the whole one, the scale's own dependence on x taken in."""
    centred = x - x.mean(-1, keepdim=True) if norm.centred else x
    along = (centred * linear).sum(-1, keepdim=True) / (x.shape[-1] * scale_of(x, norm).square())
    return linear - centred * along


def read_gradient(
    projection: Projection, x: Float[Tensor, "token d_model"], grad: Float[Tensor, "token head d_head"]
) -> Float[Tensor, "head token d_model"]:
    """Each head's derivative at its projected queries, keys or values, taken to the residual stream that it reads."""
    back = torch.bmm(grad.transpose(0, 1), projection.weight.transpose(1, 2))
    norm = projection.norm
    return back if norm is None else _through_scale(norm, x, back.div_(scale_of(x, norm)))
