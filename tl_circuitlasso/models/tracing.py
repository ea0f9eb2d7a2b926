"""Gradients at every reading point: how an objective changes with what each component reads.

`trace` gives the derivative of an objective with respect to what each head reads through q, k and v, what each MLP
reads and what the unembedding reads; `read_gradient` takes a head's part from its queries, keys or values back to the
residual stream. Only activations have gradients; no parameter collects one.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tl_circuitlasso.errors import InputError, ModelError
from tl_circuitlasso.models.adapter import Adapter
from tl_circuitlasso.models.attention import PORTS, Attending, keeps_heads_shared
from tl_circuitlasso.models.hooks import find_module, observe, resting
from tl_circuitlasso.models.norms import Norm, scale_of
from tl_circuitlasso.models.patching import (
    Projection,
    Streams,
    Written,
    mlp_entry,
    mlp_norm,
    own_heads,
    real_mask,
)
from tl_circuitlasso.models.rotary import position_ids
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


@contextmanager
def differentiable(adapter: Adapter) -> Iterator[None]:
    """The model in evaluation mode with gradients on activations only: no parameter collects one.

    Shared key and value heads of a HookedTransformer are repeated, so that each head has keys and values of its own.
    """
    if torch.is_inference_mode_enabled():
        raise InputError("torch.inference_mode is on, which forbids derivatives: leave its block, or use torch.no_grad")
    model = adapter.model
    parameters = [p for p in _parameters(model) if p.requires_grad]
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        with resting(model), torch.enable_grad(), own_heads(adapter):
            yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def _parameters(model: nn.Module) -> list[nn.Parameter]:
    wrapped = model.__dict__.get("original_model")  # a bridge keeps the wrapped model out of its module tree
    more = wrapped.parameters() if isinstance(wrapped, nn.Module) else ()
    return list({id(p): p for p in (*model.parameters(), *more)}.values())


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
    tokens, mask = tokens.to(adapter.device), real_mask(adapter, tokens, mask)
    tape = _Tape(adapter, mask, start, heads or {}, mlps or {}, outputs)
    with differentiable(adapter), tape.listening():
        logits = adapter.model(tokens, attention_mask=mask.long(), return_type="logits")
        value = objective(logits)
        _check_objective(value)
        names = [name for name in tape.heard if tape.differentiated(name)]
        parts = torch.autograd.grad(value, [tape.heard[name] for name in names], allow_unused=True)
    return tape.finish(float(value.detach()), logits.detach(), dict(zip(names, parts)))


def _check_objective(value: Any) -> None:
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise InputError(f"`metric` returned {got}: it must return one number, the sum over the batch's rows")
    if not value.requires_grad:
        raise InputError("`metric` doesn't depend on the logits: compute it from `logits` with torch operations")
    if not bool(value.isfinite()):
        raise InputError("`metric` returned NaN or infinity: check the prompts and the metric")


class _Tape:
    """Hooks that keep the graph's tensors by name; one forward pass long."""

    def __init__(
        self,
        adapter: Adapter,
        mask: Tensor,
        start: Tensor | None,
        heads: Mapping[int, Tensor],
        mlps: Mapping[int, Tensor],
        outputs: bool,
    ) -> None:
        self.adapter, self.mask, self.start, self.heads, self.mlps = adapter, mask, start, heads, mlps
        self.outputs, self.shared = outputs, keeps_heads_shared(adapter)
        self.heard: dict[str, Tensor] = {}
        self.needed: list[str] = []

    @contextmanager
    def listening(self) -> Iterator[None]:
        points, modules = self._points()
        with ExitStack() as stack:
            stack.enter_context(observe(points))
            for module, hook in modules:
                stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            yield

    def _points(self) -> tuple[list[Any], list[Any]]:
        adapter, model = self.adapter, self.adapter.model
        points, modules = [], []
        for layer in range(adapter.shape.n_layers):
            names = {"x": "hook_resid_pre", "z": "attn.hook_z", **{p: f"attn.hook_{p}" for p in PORTS}}
            if not adapter.shape.attn_only:
                names["m"] = "hook_mlp_out"
                modules.append((mlp_entry(model.blocks[layer]), self._fork(f"y.{layer}")))
                norm = adapter.layouts[layer].mlp_norm
                if norm is not None:
                    modules.append((find_module(model.blocks[layer], norm), self._note(f"n.{layer}")))
            if (post := adapter.layouts[layer].attn_post) is not None:
                names |= {"s": f"{post}.hook_scale", "o": "hook_attn_out"}
            if self.shared:
                names["p"] = "attn.hook_pattern"
            points += [self._listen(layer, kind, path) for kind, path in names.items()]
        points.append(self._listen(adapter.shape.n_layers - 1, "end", "hook_resid_post"))
        return points, modules

    def _listen(self, layer: int, kind: str, path: str) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
        module = find_module(self.adapter.model.blocks[layer], path)
        if module is None:
            raise ModelError(f"`model` ({self.adapter.architecture}) has no hook point `blocks.{layer}.{path}`")
        name = f"{kind}.{layer}"
        self.needed.append(name)

        def keep(activation: Tensor) -> Tensor:
            self.heard[name] = self._replaced(kind, layer, activation)
            return self.heard[name]

        return module, keep

    def _replaced(self, kind: str, layer: int, activation: Tensor) -> Tensor:
        if kind == "x" and layer == 0:  # where the derivatives end: nothing in front of it needs a graph
            value = activation if self.start is None else self.start.to(activation)
            return value.detach().clone().requires_grad_()
        constant = self._constant(kind, layer)
        return activation if constant is None else constant.to(activation).detach().clone().requires_grad_()

    def _constant(self, kind: str, layer: int) -> Tensor | None:
        if kind == "m":
            return self.mlps.get(layer)
        heads, behind_norm = self.heads.get(layer), self.adapter.layouts[layer].attn_post is not None
        if heads is None or kind not in "zo":
            return None
        if kind == "z":
            return None if behind_norm else heads
        # Behind a norm the heads' output can't be set through z: the norm would rescale it. Such models have no b_O.
        return torch.einsum("bphe,hed->bpd", heads, self.adapter.writer(layer)[0])

    def _fork(self, name: str) -> Any:
        """Give the module an alias of its input: the derivative at the alias is the module's alone."""

        def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            first, rest = args[0], args[1:]
            self.heard[name] = first.view_as(first)
            return (self.heard[name], *rest), kwargs

        self.needed.append(name)
        return hook

    def _note(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            self.heard[name] = args[0].detach()

        return hook

    def differentiated(self, name: str) -> bool:
        """Whether the derivative at a tensor is asked for."""
        kind = name.partition(".")[0]
        wanted = (*PORTS, "y", "end", *(("z", "m", "o") if self.outputs else ()), *(("z",) if self.shared else ()))
        return self.heard[name].requires_grad and (kind in wanted or (self.outputs and name == "x.0"))

    def finish(self, value: float, logits: Tensor, grads: Mapping[str, Tensor | None]) -> Trace:
        silent = [name for name in self.needed if name not in self.heard]
        if silent:
            raise ModelError(f"a hook of `model` ({self.adapter.architecture}) did not fire: {silent[0]}")
        adapter, dtype = self.adapter, self.adapter.compute_dtype
        heard = {name: tensor.detach().to(dtype) for name, tensor in self.heard.items()}
        shape = heard["x.0"].shape
        heard |= {name: t.reshape(shape) for name, t in heard.items() if name[0] in "yn"}  # some MLPs flatten tokens

        def grad(name: str) -> Tensor:
            found = grads.get(name)
            return torch.zeros_like(heard[name]) if found is None else found.to(dtype).reshape(heard[name].shape)

        layers = range(adapter.shape.n_layers)
        with_mlps = () if adapter.shape.attn_only else layers
        mlp_streams = tuple(heard.get(f"n.{layer}", heard.get(f"y.{layer}")) for layer in with_mlps)
        end = f"end.{layers[-1]}"
        return Trace(
            value=value,
            logits=logits,
            values=Written(
                heard["x.0"],
                tuple(self._unscaled(heard, layer) for layer in layers),
                tuple(heard[f"m.{layer}"] for layer in with_mlps),
            ),
            streams=Streams(tuple(heard[f"x.{layer}"] for layer in layers), mlp_streams, heard[end]),  # type: ignore[arg-type]
            ports=tuple(self._ports(heard, grad, layer) for layer in layers),
            mlps=tuple(
                norm_gradient(mlp_norm(adapter, layer), stream, grad(f"y.{layer}"))  # type: ignore[arg-type]
                for layer, stream in zip(with_mlps, mlp_streams)
            ),
            unembed=grad(end),
            written=self._outputs(grad) if self.outputs else None,
        )

    def _ports(self, heard: Mapping[str, Tensor], grad: Callable[[str], Tensor], layer: int) -> dict[Port, Tensor]:
        if not self.shared or layer in self.heads:  # what reads into replaced heads is read by nobody
            return {port: grad(f"{port}.{layer}") for port in PORTS}
        projected: dict[Port, Tensor] = {port: heard[f"{port}.{layer}"] for port in PORTS}
        attending = Attending(self.adapter, layer, projected, heard[f"p.{layer}"], position_ids(self.mask))
        return attending.own_gradients(grad(f"z.{layer}"))

    def _outputs(self, grad: Callable[[str], Tensor]) -> Written:
        layers = range(self.adapter.shape.n_layers)
        with_mlps = () if self.adapter.shape.attn_only else layers
        return Written(
            grad("x.0"),
            tuple(self._at_heads(grad, layer) for layer in layers),
            tuple(grad(f"m.{layer}") for layer in with_mlps),
        )

    def _at_heads(self, grad: Callable[[str], Tensor], layer: int) -> Tensor:
        if f"o.{layer}" not in self.heard:
            return grad(f"z.{layer}")
        return torch.einsum("bpd,hed->bphe", grad(f"o.{layer}"), self.adapter.writer(layer)[0])

    def _unscaled(self, heard: Mapping[str, Tensor], layer: int) -> Tensor:
        scale = heard.get(f"s.{layer}")
        return heard[f"z.{layer}"] if scale is None else heard[f"z.{layer}"] / scale[..., None]


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
