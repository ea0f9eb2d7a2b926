"""Every weight of a layer with the norms around it folded in, so that reads and writes are linear given the scales.

A port of a head reads q = rotate(((x @ weight) / scale.attn + bias) / scale.q), an MLP reads
pre = (x @ w_in) / scale.mlp + b_in, a head writes (z @ W_O) / scale.attn_out. Key and value heads that several query
heads share are repeated, so that every port has `n_heads` heads.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_circuitlasso.errors import ModelError
from tl_circuitlasso.models.architecture import Layout, architecture_of, is_shortformer, norm_at
from tl_circuitlasso.models.hooks import find_module, is_a
from tl_circuitlasso.models.norms import Norm, apply_norm, fold_ahead, fold_behind, read_norm

Port = Literal["q", "k", "v"]
Activation = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Reader:
    """How the heads of a layer read the residual stream x through one port.

    q = rotate(((x @ weight) / scale.attn + bias) / scale.q); k likewise; v = (x @ weight) / scale.attn + bias.
    Shortformer models add `pos_embed @ position_weight` beside the bias (None elsewhere).
    """

    weight: Float[Tensor, "head d_model d_head"]
    bias: Float[Tensor, "head d_head"]
    position_weight: Float[Tensor, "head d_model d_head"] | None = None


@dataclass(frozen=True, eq=False)
class MLP:
    """How an MLP reads and writes the residual stream.

    Plain: pre = (x @ w_in) / scale.mlp + b_in; post = act(pre).
    Gated: pre = (x @ w_gate) / scale.mlp + b_gate; linear = (x @ w_in) / scale.mlp + b_in;
    post = act(pre) * linear + b_post.
    Both: mlp_out = (post @ w_out + b_out) / scale.mlp_out.
    """

    w_in: Float[Tensor, "d_model d_mlp"]
    b_in: Float[Tensor, "d_mlp"]
    w_gate: Float[Tensor, "d_model d_mlp"] | None
    b_gate: Float[Tensor, "d_mlp"] | None
    w_out: Float[Tensor, "d_mlp d_model"]
    b_out: Float[Tensor, "d_model"]
    b_post: Float[Tensor, "d_mlp"] | None
    act: Activation
    elementwise: bool  # False for SoLU, which mixes neurons

    def act_grad(self, pre: Float[Tensor, "*batch d_mlp"]) -> Float[Tensor, "*batch d_mlp"]:
        """act'(pre) per neuron; raises ModelError for an activation that mixes neurons (use `act_jvp`)."""
        if not self.elementwise:
            raise ModelError("this MLP's activation mixes neurons and has no derivative per neuron; use `act_jvp`")
        with torch.enable_grad():
            leaf = pre.detach().requires_grad_()
            return torch.autograd.grad(self.act(leaf).sum(), leaf)[0]

    def act_jvp(
        self, pre: Float[Tensor, "*batch d_mlp"], tangent: Float[Tensor, "*batch d_mlp"]
    ) -> Float[Tensor, "*batch d_mlp"]:
        """The change of act(pre) for a small change `tangent` of pre: act'(pre) tangent."""
        if self.elementwise:
            return self.act_grad(pre) * tangent
        return torch.func.jvp(self.act, (pre,), (tangent,))[1]


def read_port(model: Any, layer: int, port: Port, layout: Layout, n_heads: int, dtype: torch.dtype) -> Reader:
    """The folded weights of one port of a layer, repeated to `n_heads` heads."""
    attention = model.blocks[layer].attn
    raw, bias = port_weights(attention, port, dtype)
    weight, bias = fold_behind(norm_at(model, layer, layout.attn_norm, dtype), raw, bias)
    position = raw if port != "v" and is_shortformer(model) else None
    norm = None if port == "v" else port_norm(attention, port, dtype)
    if norm is not None:
        weight, bias = _fold_port_norm(norm, weight), _fold_port_norm(norm, bias)
    return Reader(repeat_heads(weight, n_heads), repeat_heads(bias, n_heads), None if position is None else position)


def port_weights(attention: Any, port: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weight (head, d_model, d_head) and bias (head, d_head) of a port as stored: shared heads once, nothing folded."""
    letter = port.upper()
    stored = "" if port == "q" else "_"  # grouped-query attention keeps the unrepeated weights under `_W_K`
    weight = _first(attention, f"{stored}W_{letter}", f"W_{letter}").to(dtype)
    bias = _first(attention, f"{stored}b_{letter}", f"b_{letter}")
    if bias is None:
        return weight, weight.new_zeros(weight.shape[0], weight.shape[-1])
    return weight, bias.to(dtype).reshape(weight.shape[0], weight.shape[-1])


def _first(module: Any, *names: str) -> Any:
    for name in names:
        value = _get(module, name)
        if value is not None:
            return value
    return None


def _get(module: Any, name: str) -> Tensor | None:
    try:
        value = getattr(module, name)
    except (AttributeError, TypeError):  # what bridges raise for a bias that the model doesn't have
        return None
    return value.detach() if isinstance(value, Tensor) else None


def port_norm(attention: nn.Module, port: Port, dtype: torch.dtype) -> Norm | None:
    """The norm on queries or keys, over a head (Qwen3) or over all heads together (OLMo-2)."""
    return read_norm(find_module(attention, f"{port}_norm"), dtype)


def _fold_port_norm(norm: Norm, tensor: Float[Tensor, "head *rest"]) -> Tensor:
    # The gain runs over d_head, over (head, d_head), or over the two flattened.
    gain = norm.gain
    if gain is not None and gain.ndim == 1 and gain.shape[0] != tensor.shape[-1]:
        gain = gain.reshape(tensor.shape[0], tensor.shape[-1])
    if norm.centred:
        tensor = tensor - tensor.mean(-1, keepdim=True)
    if gain is None:
        return tensor
    return tensor * (gain[:, None] if gain.ndim == 2 and tensor.ndim == 3 else gain)


def is_joint(norm: Norm, d_head: int) -> bool:
    """Whether a query/key norm runs over all heads together."""
    return norm.gain is not None and norm.gain.ndim == 1 and norm.gain.shape[0] != d_head


def repeat_heads(tensor: Float[Tensor, "group *rest"], n_heads: int) -> Float[Tensor, "head *rest"]:
    """Repeat shared heads: head h uses group h // (n_heads / groups)."""
    groups = tensor.shape[0]
    if groups == n_heads:
        return tensor
    shape = (groups, n_heads // groups, *tensor.shape[1:])
    return tensor.unsqueeze(1).expand(shape).reshape(n_heads, *tensor.shape[1:])


def read_writer(model: Any, layer: int, layout: Layout, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """W_O (head, d_head, d_model) and b_O (d_model) with the norm behind attention folded in."""
    attention = model.blocks[layer].attn
    norm = norm_at(model, layer, layout.attn_post, dtype)
    weight = attention.W_O.detach().to(dtype)
    bias = _get(attention, "b_O")
    bias = weight.new_zeros(weight.shape[-1]) if bias is None else bias.to(dtype)
    factor = _residual_factor(model, layer)
    return _times(factor, fold_ahead(norm, weight)), _times(factor, fold_ahead(norm, bias))


def _times(factor: float, tensor: Tensor) -> Tensor:
    return tensor if factor == 1.0 else factor * tensor


def _residual_factor(model: Any, layer: int) -> float:
    """Granite multiplies what a layer writes; one everywhere else."""
    return float(getattr(model.blocks[layer], "residual_contribution_scale", 1.0))


def read_mlp(model: Any, layer: int, layout: Layout, dtype: torch.dtype) -> MLP:
    """The folded weights of a layer's MLP. Raises ModelError for a mixture of experts."""
    mlp = model.blocks[layer].mlp
    if any("MoE" in kind.__name__ for kind in type(mlp).__mro__):
        raise ModelError(
            f"the MLP of layer {layer} of `model` ({architecture_of(model)}) is a mixture of experts: its neurons "
            "differ from token to token, so it can't be read neuron by neuron; use `basis='component'`"
        )
    before, after = norm_at(model, layer, layout.mlp_norm, dtype), norm_at(model, layer, layout.mlp_post, dtype)
    gate = _get(mlp, "W_gate")
    hooked_gated = gate is not None and is_a(mlp, "GatedMLP")  # adds b_in to the product, not to its factor
    b_in = _bias(mlp, "b_in", mlp.W_in.shape[-1], mlp.W_in, dtype)
    inner_bias = torch.zeros_like(b_in) if hooked_gated else b_in
    w_in, b_linear = fold_behind(before, mlp.W_in.detach().to(dtype), inner_bias)
    w_gate, b_gate = (None, None)
    if gate is not None:
        w_gate, b_gate = fold_behind(before, gate.to(dtype), _bias(mlp, "b_gate", gate.shape[-1], gate, dtype))
    w_out = mlp.W_out.detach().to(dtype)
    b_out = _bias(mlp, "b_out", w_out.shape[-1], w_out, dtype)
    act, elementwise = activation_of(model, mlp, dtype)
    factor = _residual_factor(model, layer)
    return MLP(
        w_in,
        b_linear,
        w_gate,
        b_gate,
        _times(factor, fold_ahead(after, w_out)),
        _times(factor, fold_ahead(after, b_out)),
        b_in if hooked_gated and bool(b_in.any()) else None,
        act,
        elementwise,
    )


def _bias(module: Any, name: str, width: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    bias = _get(module, name)
    return like.new_zeros(width, dtype=dtype) if bias is None else bias.to(dtype)


def activation_of(model: Any, mlp: Any, dtype: torch.dtype) -> tuple[Activation, bool]:
    """The MLP's activation function, and whether it works on each neuron alone."""
    inner = getattr(mlp, "original_component", None)
    owner = mlp if inner is None else inner
    for name in ("act_fn", "act", "activation_fn", "activation", "gelu_impl"):
        function = getattr(owner, name, None)
        if callable(function):
            return _with_inner_norm(mlp, function, dtype)
    return _named_activation(str(getattr(model.cfg, "act_fn", "silu"))), True


def _with_inner_norm(mlp: Any, function: Any, dtype: torch.dtype) -> tuple[Activation, bool]:
    if "solu" not in getattr(function, "__name__", ""):
        return function, True
    norm = read_norm(find_module(mlp, "ln"), dtype)
    return (function if norm is None else lambda x: apply_norm(norm, function(x))), False


def _named_activation(name: str) -> Activation:
    if name in ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"):
        return lambda x: nn.functional.gelu(x, approximate="tanh")
    known = {"gelu": nn.functional.gelu, "relu": nn.functional.relu}
    return known.get(name, nn.functional.silu)


def read_unembed(model: Any, dtype: torch.dtype, tokens: Int[Tensor, " some"] | None = None) -> tuple[Tensor, Tensor]:
    """W_U (d_model, vocab) and b_U (vocab) with the final norm folded in; only the columns `tokens`, if given."""
    weight = model.unembed.W_U.detach()
    bias = _bias(model.unembed, "b_U", weight.shape[-1], weight, dtype)
    if tokens is not None:
        tokens = tokens.to(weight.device)
        weight, bias = weight[:, tokens], bias[tokens]
    weight = weight.to(dtype)
    factor = _logit_factor(model)
    return fold_behind(read_final_norm(model, dtype), _times(factor, weight), _times(factor, bias))


def read_final_norm(model: Any, dtype: torch.dtype) -> Norm | None:
    """The norm in front of the unembedding, where that is: in a model that is spread the two may lie apart."""
    norm = read_norm(find_module(model, "ln_final"), dtype)
    return None if norm is None else norm.to(model.unembed.W_U.device)


def _logit_factor(model: Any) -> float:
    """Cohere multiplies its logits, Granite divides them; one everywhere else."""
    wrapped = model.__dict__.get("original_model")
    scale = getattr(wrapped, "logit_scale", None)  # on the model, not its config: set to one once folded into W_U
    divisor = getattr(getattr(wrapped, "config", None), "logits_scaling", None)
    return float(1.0 if scale is None else scale) / float(1.0 if divisor is None else divisor)
