"""One forward pass: what is read of it, what is changed in it, and the one way in which a model is run.

    acts = adapter.run(tokens, mask, ["logits"], edits=[("z.3", lambda z: 0 * z)])

Whatever the library wants of a model, a `ForwardPass` runs it, with the same preparation each time: evaluation mode, no
gradients unless they are asked for, the mask handed to the model, and no per-head copies that nobody listens to.
"""

import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tl_circuitlasso.errors import InputError
from tl_circuitlasso.models import rotary
from tl_circuitlasso.models.activations import INPUT, Context, Heard, Plan, assert_fired, check_keys, plan
from tl_circuitlasso.models.architecture import Shape, architecture_of, is_shortformer, layout_of, shape_of
from tl_circuitlasso.models.device import devices_of, layer_devices
from tl_circuitlasso.models.hooks import Observer, Place, find_module, is_a, observe, resting, without_costly_flags
from tl_circuitlasso.models.names import KINDS, act

Edits = Iterable[tuple[str, Observer]]  # in this order where they meet; what an edit returns, if anything, flows on


class Runner:
    """A model that runs: its shape, and its activations by name."""

    def __init__(self, model: Any, kind: str) -> None:
        self.model = model
        self.kind = kind
        self.shape: Shape = shape_of(model)
        self.layouts = tuple(layout_of(model, layer) for layer in range(self.shape.n_layers))
        self.architecture = architecture_of(model)
        like = model.blocks[0].attn.W_O
        self.places = layer_devices(model)
        self.device: torch.device = model.unembed.W_U.device  # where sums meet if layers are on several
        self.dtype: torch.dtype = like.dtype
        self.compute_dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        self.model_seconds = 0.0  # of the processor, in the model itself: what all else is measured by

    def run(
        self,
        tokens: Int[Tensor, "batch pos"],
        mask: Bool[Tensor, "..."] | None,
        wanted: Collection[str],
        *,
        edits: Edits = (),
        stop_at_layer: int | None = None,
        gathered: bool = True,
    ) -> dict[str, Tensor]:
        """One forward pass without gradients; the activations named in `wanted`.

        Keys, for batch B, positions P, layer l: "resid_pre.l" and "resid_post.l" (B P d_model), "z.l" (B P head
        d_head), "q.l" (B P head d_head) and "k.l" (B P kv_head d_head) after rotation and query/key norm, "v.l"
        (B P kv_head d_head), "pattern.l" (B head P P), "mlp_pre.l" (the argument of the activation function),
        "mlp_linear.l" (gated MLPs), "mlp_post.l" (B P d_mlp), "attn_out.l" and "mlp_out.l" (B P d_model, as added to
        the residual stream), "logits" (B P vocab, after a soft cap), "pos_embed"; the divisors of the norms
        "scale.attn.l", "scale.mlp.l", "scale.attn_out.l", "scale.mlp_out.l", "scale.final" (B P 1) and "scale.q.l",
        "scale.k.l" (B P head 1, or B P 1 1 where all heads share one), ones where there is no norm. Any hook name of
        the model is a key too. As the model has them, so that they can be changed: "projected.q.l", "projected.k.l" and
        "projected.v.l" before norm and rotation, "mlp_stream.l" and "mlp_read.l", what the norm in front of the MLP and
        the MLP itself are given.

        `edits` are pairs of such a key and a function of the activation in the model's own layout and dtype; what it
        returns, if anything, takes the activation's place, and is what `wanted` shows.

        `mask` is True at real tokens (None: all are real) and always reaches the model, so left and right padding are
        right. Layers that no key needs are not run; `stop_at_layer` stops before that layer in any case. Values are
        references into the forward pass, not copies: don't change them in place. Of a model that is spread over several
        devices they are `gathered` on `device`, or stay at their `place`.

        Raises InputError for unknown keys (naming near matches), and for padding under bidirectional attention, which
        HookedTransformer would attend to; ModelError where a hook never fired.
        """
        made = ForwardPass(self, tokens, mask, wanted, stop_at_layer=stop_at_layer)
        made.run(edits)
        with torch.no_grad():
            return {key: made[key].detach().to(self.device if gathered else self.place(key)) for key in made.keys}

    def place(self, key: str) -> torch.device:
        """The device of an activation: that of its layer, and `device` for both ends of the residual stream, logits,
        and hook names."""
        kind, _, layer = key.rpartition(".")
        ends = key in (act("resid_pre", 0), self.final)
        return self.device if ends or kind not in KINDS else self.places[int(layer)]

    @property
    def spread(self) -> bool:
        """Whether weights are on more than one device."""
        return len(devices_of(self.model)) > 1

    def sound_mask(
        self, tokens: Int[Tensor, "batch pos"], mask: Bool[Tensor, "..."] | None
    ) -> Bool[Tensor, "batch pos"]:
        """The mask of real positions on the model's device; without a mask all are real.

        Raises
        ------
        InputError: another shape than the tokens', or pads that a bidirectional model would attend to.
        """
        if mask is None:
            return torch.ones_like(tokens, dtype=torch.bool, device=self.device)
        if mask.shape != tokens.shape:
            raise InputError(
                f"`attention_mask` has shape {tuple(mask.shape)}, tokens have {tuple(tokens.shape)}; they must be equal"
            )
        mask = mask.to(self.device)
        if not self.shape.causal and self.kind == "HookedTransformer" and not bool(mask.all()):
            raise InputError(
                "`attention_mask` has pads, but a HookedTransformer with bidirectional attention attends to pads; give "
                "prompts of equal length, or one batch for each length"
            )
        return mask

    def point(self, path: str) -> nn.Module | None:
        """The module to listen to, or to change an activation at, for a hook's path; None if there is none."""
        point = find_module(self.model, path)
        if point is None or not is_a(point, "HookPoint"):
            return point
        # Where an SAE is attached to a bridge, the alias still leads to the bare HookPoint, its own name to the SAE.
        name = getattr(point, "name", None)
        return (find_module(self.model, name) if isinstance(name, str) else None) or point

    @property
    def final(self) -> str:
        """The key of the residual stream behind the last layer."""
        return act("resid_post", self.shape.n_layers - 1)

    @property
    def shortformer(self) -> bool:
        """Whether positions join what queries and keys read, and not the residual stream."""
        return is_shortformer(self.model)

    @property
    def starts_midway(self) -> bool:
        """Whether the model can run on from a residual stream, without the layers in front of it."""
        return self.kind == "HookedTransformer" and not self.shortformer


class ForwardPass:
    """A forward pass, what is to be read of it, and what it has shown so far: `made[key]`.

    `made[key]` is there as soon as the activation is, so an edit can read what was computed in front of it.

    Parameters
    ----------
    wanted, stop_at_layer: as in `Runner.run`. start: (layer, stream) runs on from this residual stream in front of a
    layer; only where the model `starts_midway`. own_heads: whether each head has keys and values of its own where the
    model can be told so. gradients: whether what is read keeps its graph; hold `differentiable` around the pass and
    what follows.
    """

    def __init__(
        self,
        runner: Runner,
        tokens: Int[Tensor, "batch pos"],
        mask: Bool[Tensor, "..."] | None,
        wanted: Collection[str],
        *,
        start: tuple[int, Float[Tensor, "batch pos d_model"]] | None = None,
        stop_at_layer: int | None = None,
        own_heads: bool = False,
        gradients: bool = False,
    ) -> None:
        check_keys(wanted)
        self.runner, self.tokens, self.mask = runner, tokens, runner.sound_mask(tokens, mask)
        self.start, self.stop_at_layer, self.own_heads, self.gradients = start, stop_at_layer, own_heads, gradients
        self.keys = tuple(dict.fromkeys(wanted))
        self.positions = rotary.position_ids(self.mask)
        self._context = Context(runner.model, runner.shape, runner.layouts, runner.compute_dtype, self.positions)
        self._plans = {key: self._plan(key) for key in self.keys}
        self._heard: Heard = {}

    def run(self, edits: Edits = ()) -> None:
        """Run the model, with `edits` as in `Runner.run`."""
        runner, wants_logits, fired = self.runner, "logits" in self._plans, set[str]()
        changes = [(self._plan(key), edit) for key, edit in edits]
        plans = [*self._plans.values(), *(made for made, _ in changes)]
        paths = list(dict.fromkeys(path for made in plans for path in (*made.needed, *made.optional)))
        given, options = self.tokens.to(runner.device), {}
        if self.start is not None:
            given, options = self.start[1].to(runner.dtype), {"start_at_layer": self.start[0]}
        with _ready(runner, paths, self.own_heads, self.gradients), observe(list(self._observers(changes, fired))):
            began = time.process_time()
            logits = runner.model(
                given,
                attention_mask=self.mask.long(),
                return_type="logits" if wants_logits else None,
                stop_at_layer=_stop(plans, self.stop_at_layer, runner.shape.n_layers),
                **options,
            )
            runner.model_seconds += time.process_time() - began
        if wants_logits:
            self._heard["logits"] = self._noted(logits)
        assert_fired(self._plans.values(), self._heard, runner.architecture)
        assert_fired((made for made, _ in changes), fired, runner.architecture)

    def __getitem__(self, key: str) -> Tensor:
        """An activation in the library's layout, in the dtype that it computes in.

        Raises
        ------
        ModelError: its hook hasn't fired yet.
        """
        made = self._plans[key]
        assert_fired((made,), self._heard, self.runner.architecture)
        return self._placed(made.derive(self._heard, self._context), key)

    def _placed(self, activation: Tensor, key: str) -> Tensor:
        return activation.to(self.runner.place(key), self.runner.compute_dtype)

    def gradients_of(self, value: Float[Tensor, ""], keys: Iterable[str]) -> dict[str, Tensor]:
        """The derivative of `value` at activations that one hook shows, zero where it doesn't depend on them."""
        paths = {key: self._plans[key].needed[0] for key in keys}
        ways = [path for path in dict.fromkeys(paths.values()) if self._heard[path].requires_grad]
        parts = torch.autograd.grad(value, [self._heard[path] for path in ways], allow_unused=True)
        known = {path: part for path, part in zip(ways, parts) if part is not None}
        found = {path: known.get(path, torch.zeros_like(self._heard[path])) for path in paths.values()}
        return {key: self._placed(self._plans[key].derive(found, self._context), key) for key in paths}

    # -- listening -------------------------------------------------------------------------------------------------

    def _plan(self, key: str) -> Plan:
        runner = self.runner
        return plan(key, runner.model, runner.shape, runner.layouts)

    def _observers(self, changes: Iterable[tuple[Plan, Observer]], fired: set[str]) -> Iterator[tuple[Place, Observer]]:
        """Edits come first, so that what is read is what flows on."""
        for made, edit in changes:
            path = made.needed[0]
            if (place := self._place(path)) is not None:
                yield place, partial(_edited, fired, path, edit)
        wanted = (path for made in self._plans.values() for path in (*made.needed, *made.optional))
        for path in dict.fromkeys(wanted):
            if (place := self._place(path)) is not None:
                yield place, partial(self._keep, path, place.before)

    def _place(self, path: str) -> Place | None:
        before = path.endswith(INPUT)
        point = self.runner.point(path.removesuffix(INPUT))
        return None if point is None else Place(point, before)

    def _keep(self, path: str, before: bool, activation: Tensor) -> Tensor | None:
        """What a hook point shows may be a view of what flows on: to be on the path of gradients it must flow on."""
        if not self.gradients:
            self._heard[path] = self._noted(activation)
            return None
        # An input is given an alias, at which the derivative is its reader's alone.
        self._heard[path] = activation.view_as(activation) if before else activation
        return self._heard[path]

    def _noted(self, activation: Tensor) -> Tensor:
        return activation if self.gradients else activation.to(self.runner.compute_dtype)


def _edited(fired: set[str], path: str, edit: Observer, activation: Any) -> Any:
    fired.add(path)
    return edit(activation)


def _stop(plans: list[Plan], stop_at_layer: int | None, n_layers: int) -> int | None:
    """The first layer that needn't run, or None where the output of the whole model is needed."""
    if any(made.last_layer is None for made in plans):
        return stop_at_layer
    needed = max((made.last_layer + 1 for made in plans if made.last_layer is not None), default=0)
    return min(needed, n_layers if stop_at_layer is None else stop_at_layer)


# ---- preparation ----------------------------------------------------------------------------------------------------


@contextmanager
def _ready(runner: Runner, paths: list[str], own_heads: bool, gradients: bool) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(differentiable(runner) if gradients else resting(runner.model))
        if runner.kind == "HookedTransformer":
            stack.enter_context(without_costly_flags(runner.model, paths))
            if own_heads:
                stack.enter_context(_ungrouped(runner))
        yield


@contextmanager
def _ungrouped(runner: Runner) -> Iterator[None]:
    """Shared keys and values repeated inside the block, so that each head has its own."""
    cfg, shape = runner.model.cfg, runner.shape
    shared = shape.n_kv_heads != shape.n_heads and not cfg.ungroup_grouped_query_attention
    try:
        if shared:
            cfg.ungroup_grouped_query_attention = True
        yield
    finally:
        if shared:
            cfg.ungroup_grouped_query_attention = False


@contextmanager
def differentiable(runner: Runner) -> Iterator[None]:
    """The model in evaluation mode with gradients on activations only: no parameter collects one."""
    if torch.is_inference_mode_enabled():
        raise InputError("torch.inference_mode is on, which forbids derivatives: leave its block, or use torch.no_grad")
    parameters = [p for p in _parameters(runner.model) if p.requires_grad]
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        with resting(runner.model), torch.enable_grad():
            yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def _parameters(model: nn.Module) -> list[nn.Parameter]:
    wrapped = model.__dict__.get("original_model")  # a bridge keeps the wrapped model out of its module tree
    more = wrapped.parameters() if isinstance(wrapped, nn.Module) else ()
    return list({id(p): p for p in (*model.parameters(), *more)}.values())
