"""Single layers run on from edited streams, at a few positions of prompts whose activations are at hand.

An edit takes some of what a feature writes out of the residual stream, at the positions of a *group*: one feature on
one prompt. `Layers` recomputes attention and MLP there, exactly but for what other positions would change:

    q', k', v' from the edited stream;   score' of every edited query with every key, edited or not;
    pattern'[p, k] = pattern[p, k] e^(score' - score) / (1 + sum_k pattern[p, k] (e^(score' - score) - 1))

so masks, windows, position biases and attention sinks are as they were. All in float32, from the activations of an
ordinary forward pass; what is unedited is computed the same way, so that an edit of nothing changes nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from tl_circuitlasso.errors import ModelError
from tl_circuitlasso.models.adapter import Adapter
from tl_circuitlasso.models.architecture import norm_at
from tl_circuitlasso.models.feature_places import Place, Step
from tl_circuitlasso.models.hooks import find_module
from tl_circuitlasso.models.names import Kind, act
from tl_circuitlasso.models.norms import Norm, apply_norm, read_norm, scale_of
from tl_circuitlasso.models.port_reads import port_projection
from tl_circuitlasso.models.rotary import position_ids
from tl_circuitlasso.models.weights import Port, is_joint, port_norm, repeat_heads

LARGEST = 60.0  # change of a score, lest its exponential is infinite
CLOSE = 1e-2  # relative: by this much may a norm's hook differ from what is computed for it


@dataclass(frozen=True, eq=False)
class Rows:
    """Positions of some groups, padded to equal number: the group's prompt, its positions, and which of them are real.

    What isn't real is any other position: it is computed, but neither read by the others nor counted.
    """

    prompt: Int[Tensor, " group"]
    position: Int[Tensor, "group row"]
    real: Bool[Tensor, "group row"]

    def of(self, activation: Shaped[Tensor, "prompt pos *width"]) -> Shaped[Tensor, "group row *width"]:
        """An activation at the rows."""
        return activation[self.prompt[:, None], self.position]


def check_step(adapter: Adapter, step: Step) -> None:
    """ModelError, with the reason, for a layer that can't be run on from edited streams."""
    if step.kind == "mlp":
        adapter.mlp(step.layer)  # refuses mixtures of experts
        return
    for port in ("q", "k"):
        norm = port_norm(adapter.model.blocks[step.layer].attn, port, adapter.compute_dtype)
        if norm is not None and is_joint(norm, adapter.shape.d_head):
            raise ModelError(f"`model` ({adapter.architecture}) normalises the queries of all heads together")
    if adapter.shortformer:
        raise ModelError(f"`model` ({adapter.architecture}) adds positions inside attention")


def wanted(steps: tuple[Step, ...]) -> set[str]:
    """The activations that the steps are run on from."""
    found: set[str] = set()
    for step in steps:
        kinds: tuple[Kind, ...] = (
            ("resid_pre", "pattern") if step.kind == "attn" else ("resid_pre", "resid_post", "mlp_out")
        )
        found |= {act(kind, step.layer) for kind in kinds}
    return found


@dataclass(eq=False)
class Layers:
    """The layers of a model on some prompts."""

    adapter: Adapter
    acts: Mapping[str, Tensor]
    mask: Bool[Tensor, "prompt pos"]
    _plain: dict[tuple[str, int], Tensor] = field(default_factory=dict)

    def stream(self, layer: int, stage: int) -> Float[Tensor, "prompt pos d_model"]:
        """The residual stream in front of attention (0) or MLP (1) of a layer."""
        if stage == 0 or self.adapter.shape.parallel:
            return self.acts[act("resid_pre", layer)]
        return self.acts[act("resid_post", layer)] - self.acts[act("mlp_out", layer)]

    # -- attention -------------------------------------------------------------------------------------------------

    def heads_change(
        self, layer: int, rows: Rows, change: Float[Tensor, "group row d_model"], only: int | None = None
    ) -> Float[Tensor, "group row head d_head"]:
        """How much less each head gives at the rows (or one head alone), where `change` is taken out in front."""
        x = rows.of(self.stream(layer, 0)) - change
        at = rows.of(position_ids(self.mask))
        q, k, v = (self._project(layer, port, x, at) for port in ("q", "k", "v"))
        plain = {port: self._at_all(layer, port) for port in ("q", "k", "v")}
        moved = self._scores(layer, q, k, plain, rows)
        pattern = self.acts[act("pattern", layer)].float()[rows.prompt[:, None], :, rows.position].transpose(1, 2)
        grown = pattern * torch.expm1(moved.clamp(max=LARGEST))
        after = (pattern + grown) / (1 + grown.sum(-1, keepdim=True)).clamp(min=1e-12)
        everyone = plain["v"][rows.prompt]
        own = torch.where(rows.real[:, :, None, None], v - rows.of(plain["v"]), 0.0)
        to_own = after.gather(-1, rows.position[:, None, None].expand(*after.shape[:3], -1))
        found = -torch.einsum("ghrk,gkhe->grhe", after - pattern, everyone)
        found -= torch.einsum("ghrs,gshe->grhe", torch.where(rows.real[:, None, None], to_own, 0.0), own)
        if only is not None:
            found[:, :, [head for head in range(found.shape[2]) if head != only]] = 0.0
        return found

    def _scores(
        self, layer: int, q: Tensor, k: Tensor, plain: Mapping[str, Tensor], rows: Rows
    ) -> Float[Tensor, "group head row pos"]:
        """score' - score of the rows with all positions."""
        scale, cap = self.adapter.attn_scale(layer), self.adapter.attn_soft_cap

        def capped(scores: Tensor) -> Tensor:
            return scores / scale if cap is None else cap * torch.tanh(scores / scale / cap)

        keys = plain["k"][rows.prompt]
        before = capped(torch.einsum("grhe,gkhe->ghrk", rows.of(plain["q"]), keys))
        after = torch.einsum("grhe,gkhe->ghrk", q, keys)
        own = torch.einsum("grhe,gshe->ghrs", q, k)
        where = torch.where(rows.real, rows.position, after.shape[-1])[:, None, None].expand_as(own)
        after = torch.cat([after, after[..., :1]], -1).scatter(-1, where, own)[..., :-1]
        return capped(after) - before

    def _at_all(self, layer: int, port: Port) -> Float[Tensor, "prompt pos head d_head"]:
        if (port, layer) not in self._plain:
            x = self.stream(layer, 0)
            self._plain[port, layer] = self._project(layer, port, x, position_ids(self.mask))
        return self._plain[port, layer]

    def _project(
        self, layer: int, port: Port, x: Float[Tensor, "group row d_model"], at: Int[Tensor, "group row"]
    ) -> Float[Tensor, "group row head d_head"]:
        """What all heads project from streams, normalised and rotated; shared heads repeated."""
        adapter = self.adapter
        reads = port_projection(adapter, layer, port)
        made = torch.einsum("grd,hde->grhe", x, reads.weight)
        made = made if reads.norm is None else made / scale_of(x, reads.norm)[..., None]
        made = made + reads.bias
        if port == "v":
            return made
        norm = port_norm(adapter.model.blocks[layer].attn, port, adapter.compute_dtype)
        made = made if norm is None else apply_norm(_per_head(norm, adapter.shape.n_heads), made)
        return adapter.rotate(made, at, layer)

    def attention_written(
        self, layer: int, rows: Rows, less: Float[Tensor, "group row head d_head"]
    ) -> Float[Tensor, "group row d_model"]:
        """How much less attention writes where its heads give `less`."""
        adapter = self.adapter
        weight = adapter.writer(layer)[0].flatten(0, 1)
        norm = norm_at(adapter.model, layer, adapter.layouts[layer].attn_post, adapter.compute_dtype)
        if norm is None:
            return less.flatten(2) @ weight
        z = rows.of(self.acts[act("z", layer)]).flatten(2)
        attention = adapter.model.blocks[layer].attn
        raw, bias = attention.W_O.detach().to(z).flatten(0, 1), getattr(attention, "b_O", None)
        bias = 0.0 if bias is None else bias.detach().to(z)
        folded = adapter.writer(layer)[1]
        before, after = ((x @ weight + folded) / scale_of(x @ raw + bias, norm) for x in (z, z - less.flatten(2)))
        return before - after

    # -- MLP -------------------------------------------------------------------------------------------------------

    def neurons_change(
        self, layer: int, rows: Rows, change: Float[Tensor, "group row d_model"]
    ) -> Float[Tensor, "group row d_mlp"]:
        """How much less each neuron gives at the rows, where `change` is taken out in front."""
        return rows.of(self._neurons_at_all(layer)) - self._neurons(layer, rows.of(self.stream(layer, 1)) - change)

    def _neurons_at_all(self, layer: int) -> Float[Tensor, "prompt pos d_mlp"]:
        if ("post", layer) not in self._plain:
            self._plain["post", layer] = self._neurons(layer, self.stream(layer, 1))
        return self._plain["post", layer]

    def _neurons(self, layer: int, x: Float[Tensor, "*row d_model"]) -> Float[Tensor, "*row d_mlp"]:
        mlp, adapter = self.adapter.mlp(layer), self.adapter
        norm = norm_at(adapter.model, layer, adapter.layouts[layer].mlp_norm, adapter.compute_dtype)
        x = x if norm is None else x / scale_of(x, norm)
        linear = x @ mlp.w_in + mlp.b_in
        if mlp.w_gate is None or mlp.b_gate is None:
            return mlp.act(linear)
        return mlp.act(x @ mlp.w_gate + mlp.b_gate) * linear

    def mlp_written(
        self, layer: int, rows: Rows, less: Float[Tensor, "group row d_mlp"]
    ) -> Float[Tensor, "group row d_model"]:
        """How much less the MLP writes where its neurons give `less`."""
        mlp, adapter = self.adapter.mlp(layer), self.adapter
        norm = norm_at(adapter.model, layer, adapter.layouts[layer].mlp_post, adapter.compute_dtype)
        if norm is None:
            return less @ mlp.w_out
        post = rows.of(self._neurons_at_all(layer))
        post = post if mlp.b_post is None else post + mlp.b_post
        module = adapter.model.blocks[layer].mlp
        raw, bias = module.W_out.detach().to(post), getattr(module, "b_out", None)
        bias = 0.0 if bias is None else bias.detach().to(post)
        before, after = ((x @ mlp.w_out + mlp.b_out) / scale_of(x @ raw + bias, norm) for x in (post, post - less))
        return before - after

    # -- norms -----------------------------------------------------------------------------------------------------

    def normed_change(
        self, place: Place, hook: str, rows: Rows, change: Float[Tensor, "group row d_model"]
    ) -> Float[Tensor, "group row d_model"]:
        """How much less a norm's hook shows at the rows, where `change` is taken out in front."""
        norm, at = self.norm_shown(place, hook), rows.of(self.stream(place.layer, place.stage))
        return apply_norm(norm, at) - apply_norm(norm, at - change)

    def norm_shown(self, place: Place, hook: str) -> Norm:
        """The norm as its hook shows it: some show its output, others what it is before gain and bias.

        Raises
        ------
        ModelError: the hook shows neither.
        """
        norm = read_norm(
            find_module(self.adapter.model.blocks[place.layer], hook.split(".")[2]), self.adapter.compute_dtype
        )
        x, shown = self.stream(place.layer, place.stage)[self.mask], self.acts[hook][self.mask].float()
        if norm is not None:
            for one in (norm, Norm(norm.centred, None, None, norm.eps)):
                if float((apply_norm(one, x) - shown).norm()) <= CLOSE * float(shown.norm()):
                    return one
        raise ModelError(f"what {hook} shows isn't known")


def _per_head(norm: Norm, n_heads: int) -> Norm:
    """A norm of single heads with a gain for each, for shared heads repeated."""
    if norm.gain is None or norm.gain.ndim == 1:
        return norm
    return Norm(norm.centred, repeat_heads(norm.gain, n_heads), norm.bias, norm.eps)
