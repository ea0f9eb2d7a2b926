"""Reaching into a model and leaving no trace.

`observe` attaches functions to modules for the time of a `with` block; `resting` holds dropout and gradients off.
Both put everything back whatever ends the block, an exception or Ctrl-C included. Hooks are attached to the modules
themselves, found by walking attributes: TransformerLens' own `run_with_hooks` misses aliases on some bridges, and the
name that a bridge passes to a hook depends on its mode.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tl_circuitlasso.errors import ModelError

Observer = Callable[[Tensor], Tensor | None]


def is_a(thing: object, *class_names: str) -> bool:
    """Whether `thing` has a class of one of these names in its ancestry.

    Names instead of classes: the classes live in different modules in every version of TransformerLens, some are
    gone in 4.x, and asking by name needs no import.
    """
    return any(kind.__name__ in class_names for kind in type(thing).__mro__)


def find_module(model: nn.Module, path: str) -> nn.Module | None:
    """The module at a dotted attribute path, aliases of a bridge included; None if there is none."""
    here: Any = model
    for part in path.split("."):
        try:
            here = here[int(part)] if part.isdigit() else getattr(here, part)
        except (AttributeError, IndexError, TypeError):
            return None
    return here if isinstance(here, nn.Module) else None


@dataclass(frozen=True, eq=False)
class Place:
    """What a module puts out, or with `before` what it is given (the first of its arguments)."""

    module: nn.Module
    before: bool = False


@contextmanager
def observe(observers: Iterable[tuple[Place, Observer]]) -> Iterator[None]:
    """Call `observer(activation)` each time a place has one; a returned tensor replaces the activation.

    Other hooks of these modules keep working and stay attached.
    """
    mark = object()
    touched: list[nn.Module] = []
    handles: list[torch.utils.hooks.RemovableHandle] = []
    try:
        for place, observer in observers:
            module = place.module
            if place.before:
                handles.append(module.register_forward_pre_hook(_as_pre_hook(observer), with_kwargs=True))
            elif is_a(module, "HookPoint"):
                touched.append(module)
                _add_to_hook_point(module, observer, mark)
            else:  # a wrapper around a HookPoint, such as an attached SAE: what flows on is its output
                handles.append(module.register_forward_hook(_as_torch_hook(observer)))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in touched:
            _remove_marked(module, mark)


def _add_to_hook_point(point: Any, observer: Observer, mark: object) -> None:
    # `add_hook`, not `register_forward_hook`: it converts a bridge's flat tensors to heads, and some bridges skip a
    # HookPoint whose own list of hooks is empty. The level marks the hook as ours.
    point.add_hook(lambda activation, hook: observer(activation), level=mark)


def _remove_marked(point: Any, mark: object) -> None:
    for handle in [handle for handle in point.fwd_hooks if handle.context_level is mark]:
        handle.hook.remove()
        point.fwd_hooks[:] = [kept for kept in point.fwd_hooks if kept is not handle]


def _as_torch_hook(observer: Observer) -> Callable[[nn.Module, Any, Tensor], Tensor | None]:
    return lambda module, inputs, output: observer(output)


def _as_pre_hook(observer: Observer) -> Callable[[nn.Module, Any, Any], Any]:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
        changed = observer(args[0])
        return None if changed is None else ((changed, *args[1:]), kwargs)

    return hook


@contextmanager
def resting(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module gets its own training flag back.

    Raises
    ------
    ModelError: another thread has this model at work, whose hooks would hear this thread's activations.
    """
    with _in_one_thread(model):
        training = [module for module in _all_modules(model) if module.training]
        try:
            for module in training:
                module.training = False
            with torch.no_grad():
                yield
        finally:
            for module in training:
                module.training = True


_at_work: dict[int, list[int]] = {}  # by the model's id: the thread that has it at work, and how deep its blocks are
_looking = threading.Lock()


@contextmanager
def _in_one_thread(model: nn.Module) -> Iterator[None]:
    own = threading.get_ident()
    with _looking:
        entry = _at_work.setdefault(id(model), [own, 0])
        if entry[0] != own:
            raise ModelError(
                "`model` is at work in another thread, whose hooks would hear this one's activations: take turns, or "
                "give each thread a model of its own"
            )
        entry[1] += 1
    try:
        yield
    finally:
        with _looking:
            entry[1] -= 1
            if not entry[1]:
                del _at_work[id(model)]


def altering_saes(model: nn.Module) -> list[str]:
    """Where SAEs are attached whose reconstruction alone flows on."""
    return [
        name.replace("._original_component", "")  # of a bridge, whose users leave it out
        for name, module in model.named_modules()
        if hasattr(module, "use_error_term") and not module.use_error_term
    ]


def disturbances(model: nn.Module) -> list[str]:
    """What besides the architecture can make a model compute something else than its weights say."""
    found = [
        f"an SAE without its error term is attached at `{name}` (model.reset_saes(), or use_error_term)"
        for name in altering_saes(model)
    ]
    found += [
        f"a hook of yours is attached at `{name}` (model.reset_hooks(including_permanent=True))"
        for name, module in model.named_modules()
        if getattr(module, "fwd_hooks", ())
    ]
    if torch.is_autocast_enabled() or torch.is_autocast_enabled("cpu"):
        found.append("torch.autocast is on (leave its block)")
    return found


def _all_modules(model: nn.Module) -> Iterator[nn.Module]:
    yield from model.modules()
    wrapped = model.__dict__.get("original_model")  # a bridge keeps the wrapped model out of its module tree
    if isinstance(wrapped, nn.Module):
        yield from wrapped.modules()


# A flag of HookedTransformer's config that makes it compute something extra for a hook point, and the hook points.
COSTLY_FLAGS = {
    "use_attn_result": ("attn.hook_result",),
    "use_split_qkv_input": ("hook_q_input", "hook_k_input", "hook_v_input"),
    "use_attn_in": ("hook_attn_in",),
    "use_hook_mlp_in": ("hook_mlp_in",),
}


@contextmanager
def without_costly_flags(model: Any, wanted: Iterable[str]) -> Iterator[None]:
    """Switch off, for one forward pass, the per-head copies of a HookedTransformer that nobody listens to.

    They don't change what the model computes, but cost up to eight forward passes. A flag stays on where one of its
    hook points has a hook or is wanted.
    """
    wanted = tuple(wanted)
    idle = [flag for flag in COSTLY_FLAGS if getattr(model.cfg, flag, False) is True]
    idle = [flag for flag in idle if not _is_used(model, COSTLY_FLAGS[flag], wanted)]
    try:
        for flag in idle:
            setattr(model.cfg, flag, False)
        yield
    finally:
        for flag in idle:
            setattr(model.cfg, flag, True)


def _is_used(model: Any, points: tuple[str, ...], wanted: tuple[str, ...]) -> bool:
    if any(name.endswith(points) for name in wanted):
        return True
    found = [find_module(block, point) for block in model.blocks for point in points]
    return any(getattr(point, "fwd_hooks", ()) or getattr(point, "bwd_hooks", ()) for point in found)
