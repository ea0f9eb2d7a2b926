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
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_circuitlasso.models.ablation import Ablated
from tl_circuitlasso.models.adapter import Adapter
from tl_circuitlasso.models.attention import PORTS, Attending, keeps_heads_shared
from tl_circuitlasso.models.names import PROJECTED, Kind, act, as_projected
from tl_circuitlasso.models.norms import Norm, apply_norm, scale_of
from tl_circuitlasso.models.passes import ForwardPass
from tl_circuitlasso.models.patching import Projection, mlp_norm
from tl_circuitlasso.models.port_reads import alone_readers, by_port, centred_scale, port_projection, project
from tl_circuitlasso.models.sources import Sources
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


def _reads(
    kept: Bool[Tensor, "circuit reader source"], live: Bool[Tensor, "circuit reader"], subtract_above: float
) -> _Reads:
    from_current = kept.sum(2) > subtract_above * kept.shape[2]
    coefficients = torch.where(from_current[..., None], kept.float() - 1, kept.float())
    return _Reads(coefficients, from_current, live & ~kept.all(2))


def _plans(adapter: Adapter, circuits: Circuits, subtract_above: float) -> dict[ReaderKind, _Reads]:
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
        plans[layer, port] = _reads(kept.cpu(), live, subtract_above)
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
    subtract_above: float = 0.5,
) -> Float[Tensor, "circuit batch pos vocab"]:
    """The logits of every circuit on the prompts, all in one forward pass over as many copies of them.

    With `gradients` they can be differentiated with respect to what cut edges carry; no parameter collects a gradient.
    A reader that keeps more than the share `subtract_above` of its edges is served by what it doesn't see, taken off
    the stream; others by the sum of what they see.

    Raises
    ------
    ModelError: a hook of the model is missing or didn't fire, or keys shared between heads can't be told apart.
    """
    plans = _plans(adapter, circuits, subtract_above)
    readers = _Readers(adapter, tokens, adapter.sound_mask(tokens, mask), plans, len(circuits), ablated, gradients)
    readers.made.run(readers.edits())
    return readers.made["logits"].unflatten(0, readers.sizes[:2])


@dataclass(frozen=True, eq=False)
class _Change:
    """What some heads of some prompts of one copy project through a port."""

    rows: slice
    heads: list[int]
    value: Float[Tensor, "prompt pos head d_head"]


def _by_copy(made: ForwardPass, sizes: tuple[int, int, int], key: str) -> Float[Tensor, "circuit batch pos ..."]:
    """An activation of a pass over copies of the prompts."""
    return made[key].unflatten(0, sizes[:2])


class _Readers:
    """One forward pass over copies of the prompts, and what its readers are made to see."""

    def __init__(
        self,
        adapter: Adapter,
        tokens: Tensor,
        mask: Tensor,
        plans: Mapping[ReaderKind, _Reads],
        copies: int,
        ablated: Ablated,
        gradients: bool,
    ) -> None:
        self.adapter, self.ablated, self.plans = adapter, ablated, plans
        self.sizes = (copies, tokens.shape[0], tokens.shape[1])
        self.changes: dict[int, dict[Port, list[_Change]]] = {}
        self.shared = keeps_heads_shared(adapter)
        self.patterns: dict[str, Tensor] | None = None
        if self.shared and adapter.architecture == _LATE_PATTERNS:  # all that's needed is where a head may look
            names = [act("pattern", layer) for layer in range(adapter.shape.n_layers)]
            made = adapter.run(tokens, mask, names)
            self.patterns = {name: pattern.repeat(self.sizes[0], 1, 1, 1) for name, pattern in made.items()}
        many, real = tokens.repeat(self.sizes[0], 1), mask.repeat(self.sizes[0], 1)
        self.made = ForwardPass(adapter, many, real, self._keys(), own_heads=True, gradients=gradients)
        # Not `self.value`: in a circle of references, all activations would wait for the garbage collector.
        self.value = partial(_by_copy, self.made, self.sizes)
        self.sources = Sources(adapter, self.sizes, _wanted(self.plans), self.value, ablated.written)

    def _keys(self) -> list[str]:
        kinds: list[Kind] = ["resid_pre", "z", "scale.attn_out"]
        kinds.extend([] if self.adapter.shape.attn_only else ["mlp_out", "mlp_stream"])
        kinds.extend([*PROJECTED, "pattern"] if self.shared else [])
        return [*(act(kind, layer) for layer in range(self.adapter.shape.n_layers) for kind in kinds), "logits"]

    def edits(self) -> Iterator[tuple[str, Callable[[Tensor], Tensor | None]]]:
        """What every reader is given."""
        shape = self.adapter.shape
        for layer in range(shape.n_layers):
            if self.shared:
                yield act("z", layer), partial(self._swap_z, layer)
            else:
                yield from ((as_projected(port, layer), partial(self._swap_port, layer, port)) for port in PORTS)
            if not shape.attn_only:
                yield act("mlp_read", layer), partial(self._swap_mlp, layer)
        yield self.adapter.final, self._swap_end

    # -- what readers see ---------------------------------------------------------------------------------------------

    def _swap_port(self, layer: int, port: Port, activation: Tensor) -> Tensor | None:
        changes = self._port_changes(layer)[port]
        if not changes:
            return None
        changed, added = activation.clone(), None
        if port != "v" and self.adapter.shortformer:  # positions join what is read, not the residual stream
            stream = self._in_front(layer).flatten(0, 1)
            reads = port_projection(self.adapter, layer, port)
            scale = None if reads.norm is None else scale_of(stream, reads.norm)
            added = activation - project(reads, stream, scale, list(range(self.adapter.shape.n_heads)))
        for change in changes:
            value = change.value if added is None else change.value + added[change.rows, :, change.heads]
            changed[change.rows, :, change.heads] = value.to(changed.dtype)
        return changed

    def _swap_z(self, layer: int, z: Tensor) -> Tensor | None:
        changes = self._port_changes(layer)
        if not any(changes.values()):
            return None
        projected: dict[Port, Tensor] = {port: self.made[as_projected(port, layer)] for port in PORTS}
        pattern = self.made[act("pattern", layer)] if self.patterns is None else self.patterns[act("pattern", layer)]
        attending = Attending(self.adapter, layer, projected, pattern, self.made.positions)
        heads = {port: attending.heads(port).clone() for port in PORTS}
        for port in PORTS:
            for change in changes[port]:
                heads[port][change.rows, :, change.heads] = change.value
        return attending.output(heads["q"], heads["k"], heads["v"]).reshape(z.shape).to(z.dtype)

    def _swap_mlp(self, layer: int, given: Tensor) -> Tensor | None:
        norm = mlp_norm(self.adapter, layer)
        stream = given.to(self.adapter.compute_dtype) if norm is None else self.made[act("mlp_stream", layer)]
        return self._swap_single((layer, ""), stream, given, norm)

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
        stream, batch = self._in_front(layer), self.sizes[1]
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

    def _in_front(self, layer: int) -> Float[Tensor, "circuit batch pos d_model"]:
        """The stream in front of a layer, where its weights are."""
        return self.value(act("resid_pre", layer)).to(self.adapter.places[layer])

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
        base = self._base(readers[0][0], copy).to(stream.device)
        size = max(1, PIECE // (stream[0, 0].nbytes * (len(readers) + len(columns))))
        for first in range(0, self.sizes[1], size):
            prompts = slice(first, min(first + size, self.sizes[1]))
            seen = torch.stack([stream[copy, prompts] if now else base[prompts] for now in from_current])
            if columns:
                sources = self.sources.written_out(columns, copy, prompts)
                seen.view(len(readers), -1).addmm_(coefficients, sources.flatten(1).to(seen.device))
            yield prompts, seen

    def _base(self, kind: ReaderKind, copy: int) -> Float[Tensor, "batch pos d_model"]:
        """The stream of a reader whose edges are all cut."""
        (layer, port), streams, shape = kind, self.ablated.streams, self.adapter.shape
        end = layer == shape.n_layers
        base = streams.logits if end else streams.mlp[layer] if port == "" else streams.attn[layer]
        own_attention = port == "" and not end and not shape.parallel
        for before in range(layer + own_attention):
            if (was := self.ablated.bias_scales[before]) is not None:
                scale = self.value(act("scale.attn_out", before))[copy]
                base = base + ((1 / scale - was.to(scale.device)) * self.adapter.writer(before)[1]).to(base.device)
        return base
