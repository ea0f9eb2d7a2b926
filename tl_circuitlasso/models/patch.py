"""Running a model as a circuit: an edge outside it carries what its source does in an ablated run.

The stream of a reader v is a sum over sources u, so with a set K of kept edges it is

    x_v = sum over kept u of current_u + sum over cut u of ablated_u + constants
        = ablated stream + sum over kept u of (current_u - ablated_u)
        = current stream - sum over cut u of (current_u - ablated_u)

and whichever of the last two has fewer terms is used: with no kept edge a reader sees the ablated run exactly, with all
of them it isn't touched. The model itself does everything else (attention, neurons, norms), so one circuit costs about
one forward pass. Heads are kept as z and written out in d_model a layer at a time; streams exist for a few prompts and
only for readers whose output the circuit reads. Several circuits share a pass as copies of the prompts.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_circuitlasso.errors import ModelError
from tl_circuitlasso.models.ablation import Ablated
from tl_circuitlasso.models.activations import Context, Heard, Plan, plan
from tl_circuitlasso.models.adapter import Adapter
from tl_circuitlasso.models.attention import PORTS, Attending, keeps_heads_shared
from tl_circuitlasso.models.hooks import find_module, observe, resting
from tl_circuitlasso.models.norms import Norm, apply_norm, scale_of
from tl_circuitlasso.models.patching import Projection, mlp_entry, mlp_norm, own_heads, real_mask
from tl_circuitlasso.models.port_reads import alone_readers, by_port, centred_scale, port_projection, project
from tl_circuitlasso.models.rotary import position_ids
from tl_circuitlasso.models.sources import Sources, hook_point
from tl_circuitlasso.models.tracing import differentiable
from tl_circuitlasso.models.weights import Port

PIECE = 32 << 20  # bytes of the streams made at once

_LATE_PATTERNS = "TransformerLensNative"  # shows its attention patterns only after it has used them

ReaderKind = tuple[int, str]  # (layer, port): its heads through a port, its MLP (""); (n_layers, "") is the logits


# ---- which edges are kept -------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Circuits:
    """Kept edges of some circuits: for every reader (a layer's heads through a port, its MLP, the logits), of which
    sources in front of it, in the order of computation, it reads what they do now."""

    kept: Mapping[ReaderKind, Bool[Tensor, "circuit reader source"]]

    def __len__(self) -> int:
        return next(iter(self.kept.values())).shape[0]

    def chosen(self, circuits: slice) -> "Circuits":
        """Some of the circuits."""
        return Circuits({kind: kept[circuits] for kind, kept in self.kept.items()})

    def read(self, n_sources: int) -> Bool[Tensor, "circuit source"]:
        """Which sources have a kept edge."""
        found = torch.zeros(len(self), n_sources, dtype=torch.bool)
        for kept in self.kept.values():
            found[:, : kept.shape[2]] |= kept.any(1).cpu()
        return found


@dataclass(frozen=True, eq=False)
class _Reads:
    """How the readers of one kind are served: x = (current if `from_current` else ablated stream) + coefficients @
    (current - ablated sources). Readers that aren't `touched` see all sources, or nothing reads them."""

    coefficients: Float[Tensor, "circuit reader source"]
    from_current: Bool[Tensor, "circuit reader"]
    touched: Bool[Tensor, "circuit reader"]


def _reads(kept: Bool[Tensor, "circuit reader source"], live: Bool[Tensor, "circuit reader"]) -> _Reads:
    from_current = kept.sum(2) * 2 > kept.shape[2]
    coefficients = torch.where(from_current[..., None], kept.float() - 1, kept.float())
    return _Reads(coefficients, from_current, live & ~kept.all(2))


def _plans(adapter: Adapter, circuits: Circuits) -> dict[ReaderKind, _Reads]:
    parts = adapter.shape.components
    groups, read = parts.groups(), circuits.read(parts.n_sources)
    plans = {}
    for (layer, port), kept in circuits.kept.items():
        rows = groups.get((layer, "heads" if port else "mlp"))
        # Logits are always read; the norm behind attention takes every head into account.
        always = rows is None or (port != "" and adapter.layouts[layer].attn_post is not None)
        live = torch.ones(kept.shape[:2], dtype=torch.bool)
        if not always:
            assert rows is not None
            live = read[:, rows]
        plans[layer, port] = _reads(kept.cpu(), live)
    return plans


def _wanted(plans: Mapping[ReaderKind, _Reads]) -> list[int]:
    """The sources that a touched reader needs."""
    found: set[int] = set()
    for reads in plans.values():
        found.update(reads.coefficients[reads.touched].any(0).nonzero().flatten().tolist())
    return sorted(found)


# ---- the run --------------------------------------------------------------------------------------------------------


def run_circuits(
    adapter: Adapter,
    tokens: Int[Tensor, "batch pos"],
    mask: Bool[Tensor, "batch pos"] | None,
    circuits: Circuits,
    ablated: Ablated,
    *,
    gradients: bool = False,
) -> Float[Tensor, "circuit batch pos vocab"]:
    """The logits of every circuit on the prompts, all in one forward pass over as many copies of them.

    With `gradients` they can be differentiated with respect to what cut edges carry; no parameter collects a gradient.

    Raises
    ------
    ModelError: a hook of the model is missing or didn't fire, or keys shared between heads can't be told apart.
    """
    made = _Pass(adapter, tokens, real_mask(adapter, tokens, mask), circuits, ablated)
    with differentiable(adapter) if gradients else _resting(adapter):
        return made.run()


@contextmanager
def _resting(adapter: Adapter) -> Iterator[None]:
    with resting(adapter.model), own_heads(adapter):
        yield


@dataclass(frozen=True, eq=False)
class _Change:
    """What some heads of some prompts of one copy project through a port."""

    rows: slice
    heads: list[int]
    value: Float[Tensor, "prompt pos head d_head"]


class _Pass:
    """One forward pass over copies of the prompts, and what has been heard of it so far."""

    def __init__(self, adapter: Adapter, tokens: Tensor, mask: Tensor, circuits: Circuits, ablated: Ablated) -> None:
        self.adapter, self.tokens, self.ablated = adapter, tokens, ablated
        self.sizes = (len(circuits), tokens.shape[0], tokens.shape[1])
        self.real = mask.repeat(len(circuits), 1)
        self.plans = _plans(adapter, circuits)
        self.sources = Sources(adapter, self.sizes, _wanted(self.plans), self.value, ablated.written)
        self.heard: Heard = {}
        self.changes: dict[int, dict[Port, list[_Change]]] = {}
        self.shared = keeps_heads_shared(adapter)
        self.patterns = self._patterns() if self.shared and adapter.architecture == _LATE_PATTERNS else None
        shape, layouts, positions = adapter.shape, adapter.layouts, position_ids(self.real)
        self.context = Context(adapter.model, shape, layouts, adapter.compute_dtype, positions)

    def _patterns(self) -> dict[str, Tensor]:
        """Of the unedited run: all that's needed is where a head may look."""
        names = [f"pattern.{layer}" for layer in range(self.adapter.shape.n_layers)]
        made = self.adapter.run(self.tokens, self.real[: len(self.tokens)], names)
        return {name: pattern.expand(self.sizes[0], *pattern.shape) for name, pattern in made.items()}

    def run(self) -> Float[Tensor, "circuit batch pos vocab"]:
        """The logits of every copy."""
        model, adapter = self.adapter.model, self.adapter
        tokens = self.tokens.to(adapter.device).repeat(self.sizes[0], 1)
        with ExitStack() as stack:
            stack.enter_context(observe(list(self._points())))
            for module, hook in self._module_hooks():
                stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            logits = model(tokens, attention_mask=self.real.long(), return_type="logits")
        return logits.to(adapter.compute_dtype).unflatten(0, self.sizes[:2])

    # -- hooks --------------------------------------------------------------------------------------------------------

    def _points(self) -> Iterator[tuple[Any, Callable[[Tensor], Tensor | None]]]:
        shape = self.adapter.shape
        for layer in range(shape.n_layers):
            keys = [f"resid_pre.{layer}", f"scale.attn_out.{layer}", *([] if shape.attn_only else [f"mlp_out.{layer}"])]
            paths = [path for key in keys for path in self._recipe(key).needed]
            if self.shared:
                paths += [f"blocks.{layer}.attn.hook_{name}" for name in (*PORTS, "pattern")]
            yield from ((hook_point(self.adapter, path), partial(self._keep, path)) for path in paths)
            if not self.shared:
                for port in PORTS:
                    yield (
                        hook_point(self.adapter, f"blocks.{layer}.attn.hook_{port}"),
                        partial(self._swap_port, layer, port),
                    )
            yield hook_point(self.adapter, f"blocks.{layer}.attn.hook_z"), partial(self._swap_z, layer)
        yield hook_point(self.adapter, f"blocks.{shape.n_layers - 1}.hook_resid_post"), self._swap_end

    def _module_hooks(self) -> Iterator[tuple[Any, Any]]:
        if self.adapter.shape.attn_only:
            return
        for layer, block in enumerate(self.adapter.model.blocks):
            if (norm := self.adapter.layouts[layer].mlp_norm) is not None:
                yield find_module(block, norm), partial(self._note, layer)
            yield mlp_entry(block), partial(self._swap_mlp, layer)

    def _keep(self, path: str, activation: Tensor) -> None:
        self.heard[path] = activation.to(self.adapter.compute_dtype)

    def _note(self, layer: int, module: Any, args: tuple, kwargs: dict) -> None:
        self._keep(f"in front of mlp {layer}", args[0])

    def _recipe(self, key: str) -> Plan:
        return plan(key, self.adapter.model, self.adapter.shape, self.adapter.layouts)

    def value(self, key: str) -> Float[Tensor, "circuit batch pos ..."]:
        """An activation of this pass, by the adapter's name for it."""
        recipe = self._recipe(key)
        if silent := [path for path in recipe.needed if path not in self.heard]:
            raise ModelError(f"the hook `{silent[0]}` of `model` ({self.adapter.architecture}) did not fire in time")
        return recipe.derive(self.heard, self.context).unflatten(0, self.sizes[:2])

    # -- what readers see ---------------------------------------------------------------------------------------------

    def _swap_port(self, layer: int, port: Port, activation: Tensor) -> Tensor | None:
        changes = self._port_changes(layer)[port]
        if not changes:
            return None
        changed, added = activation.clone(), None
        if port != "v" and _is_shortformer(self.adapter):  # positions join what is read, not the residual stream
            stream = self.value(f"resid_pre.{layer}").flatten(0, 1)
            reads = port_projection(self.adapter, layer, port)
            scale = None if reads.norm is None else scale_of(stream, reads.norm)
            added = activation - project(reads, stream, scale, list(range(self.adapter.shape.n_heads)))
        for change in changes:
            value = change.value if added is None else change.value + added[change.rows, :, change.heads]
            changed[change.rows, :, change.heads] = value.to(changed.dtype)
        return changed

    def _swap_z(self, layer: int, z: Tensor) -> Tensor | None:
        path = f"blocks.{layer}.attn.hook_z"
        self._keep(path, z)
        changes = self._port_changes(layer) if self.shared else {}
        if not any(changes.values()):
            return None
        projected: dict[Port, Tensor] = {port: self.heard[f"blocks.{layer}.attn.hook_{port}"] for port in PORTS}
        pattern = self.value(f"pattern.{layer}") if self.patterns is None else self.patterns[f"pattern.{layer}"]
        attending = Attending(self.adapter, layer, projected, pattern.flatten(0, 1), self.context.positions)
        heads = {port: attending.heads(port).clone() for port in PORTS}
        for port in PORTS:
            for change in changes[port]:
                heads[port][change.rows, :, change.heads] = change.value
        fresh = attending.output(heads["q"], heads["k"], heads["v"]).reshape(z.shape).to(z.dtype)
        self._keep(path, fresh)
        return fresh

    def _swap_mlp(self, layer: int, module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        given = args[0]
        norm = mlp_norm(self.adapter, layer)
        stream = self.heard[name] if (name := f"in front of mlp {layer}") in self.heard else given
        changed = self._swap_single((layer, ""), stream.to(self.adapter.compute_dtype), given, norm)
        return None if changed is None else ((changed, *args[1:]), kwargs)

    def _swap_end(self, activation: Tensor) -> Tensor | None:
        stream = activation.to(self.adapter.compute_dtype)
        return self._swap_single((self.adapter.shape.n_layers, ""), stream, activation, None)

    def _swap_single(self, kind: ReaderKind, stream: Tensor, given: Tensor, norm: Norm | None) -> Tensor | None:
        """`given`, what the reader reads behind `norm` now, with what each copy lets it see in its place."""
        copies = self.plans[kind].touched[:, 0].nonzero().flatten().tolist()
        if not copies:
            return None
        shape = (*self.sizes, self.adapter.shape.d_model)
        changed = given.clone().reshape(shape)  # OPT flattens tokens
        for copy in copies:
            for prompts, seen in self._seen([(kind, 0)], copy, stream.reshape(shape)):
                changed[copy, prompts] = (seen[0] if norm is None else apply_norm(norm, seen[0])).to(changed.dtype)
        return changed.reshape(given.shape)

    def _port_changes(self, layer: int) -> dict[Port, list[_Change]]:
        if layer not in self.changes:
            made: dict[Port, list[_Change]] = {port: [] for port in PORTS}
            for copy in range(self.sizes[0]):
                for port, change in self._projected(layer, copy):
                    made[port].append(change)
            self.changes = {layer: made}  # those of earlier layers aren't needed any more
        return self.changes[layer]

    def _projected(self, layer: int, copy: int) -> Iterator[tuple[Port, _Change]]:
        groups = self._equal_readers(layer, copy)
        if not groups:
            return
        stream, batch = self.value(f"resid_pre.{layer}"), self.sizes[1]
        reads: dict[Port, Projection] = {port: port_projection(self.adapter, layer, port) for port in PORTS}
        firsts = [((layer, group[0][0]), group[0][1]) for group in groups]
        shared = [(number, group) for number, group in enumerate(groups) if len(group) > 1]
        alone = list(alone_readers(reads, groups))
        for prompts, seen in self._seen(firsts, copy, stream):
            rows = slice(copy * batch + prompts.start, copy * batch + prompts.stop)
            scales = None if reads["q"].norm is None else centred_scale(seen, reads["q"].norm)
            for own in alone:
                yield own.port, _Change(rows, own.heads, own.project(seen, scales))
            for number, group in shared:
                scale = None if scales is None else scales[number]
                for port, heads in by_port(group):
                    yield port, _Change(rows, heads, project(reads[port], seen[number], scale, heads))

    def _equal_readers(self, layer: int, copy: int) -> list[list[tuple[Port, int]]]:
        """The heads of a layer, by port, that see another stream than the model's: those that see the same together,
        those that are alone first."""
        groups: dict[bytes, list[tuple[Port, int]]] = {}
        for port in PORTS:
            reads = self.plans[layer, port]
            for head in reads.touched[copy].nonzero().flatten().tolist():
                key = reads.coefficients[copy, head].numpy().tobytes() + bytes([int(reads.from_current[copy, head])])
                groups.setdefault(key, []).append((port, head))
        return sorted(groups.values(), key=lambda group: len(group) > 1)

    def _seen(
        self, readers: list[tuple[ReaderKind, int]], copy: int, stream: Float[Tensor, "circuit batch pos d_model"]
    ) -> Iterator[tuple[slice, Float[Tensor, "reader prompt pos d_model"]]]:
        """The streams that some readers of the same place see, for a few prompts at a time."""
        plans = [self.plans[kind] for kind, _ in readers]
        coefficients = torch.stack([p.coefficients[copy, reader] for p, (_, reader) in zip(plans, readers)])
        from_current = [bool(p.from_current[copy, reader]) for p, (_, reader) in zip(plans, readers)]
        columns = coefficients.any(0).nonzero().flatten().tolist()
        columns = self.sources.span(columns) if columns else columns
        coefficients = coefficients[:, columns].to(stream)
        base = self._base(readers[0][0], copy)
        size = max(1, PIECE // (stream[0, 0].nbytes * (len(readers) + len(columns))))
        for first in range(0, self.sizes[1], size):
            prompts = slice(first, min(first + size, self.sizes[1]))
            seen = torch.stack([stream[copy, prompts] if now else base[prompts] for now in from_current])
            if columns:
                sources = self.sources.written_out(columns, copy, prompts)
                seen.view(len(readers), -1).addmm_(coefficients, sources.flatten(1))
            yield prompts, seen

    def _base(self, kind: ReaderKind, copy: int) -> Float[Tensor, "batch pos d_model"]:
        """The stream of a reader whose edges are all cut."""
        (layer, port), streams, shape = kind, self.ablated.streams, self.adapter.shape
        end = layer == shape.n_layers
        base = streams.logits if end else streams.mlp[layer] if port == "" else streams.attn[layer]
        own_attention = port == "" and not end and not shape.parallel
        for before in range(layer + own_attention):
            if (was := self.ablated.bias_scales[before]) is not None:
                change = 1 / self.value(f"scale.attn_out.{before}")[copy] - was
                base = base + change * self.adapter.writer(before)[1]
        return base


def _is_shortformer(adapter: Adapter) -> bool:
    return getattr(adapter.model.cfg, "positional_embedding_type", None) == "shortformer"
