"""What one feature does to those of a later hook: taken out of prompts as they were, the layers between run on.

Where feature i fires on a prompt, what it writes, z_i(p) d_i, is taken out of the activations of an ordinary forward
pass at all those positions; the layers between the two hooks are run on from there (`feature_layers`), at these
positions only, and the child's SAE encodes what it would have read. So all is in it that stands between: norms, MLPs,
heads with their patterns, thresholds, the competition of TopK codes, children that would be turned on. Per unit of z_i,

    S_ij = sum over prompts of c_ij / sum over prompts of m_i,     c_ij = sum_p z_j(p) - z_j'(p),    m_i = sum_p z_i(p)

over the positions where i fires (port ""), or over those where it doesn't, to which attention brings it ("v"). Up to
`GROUPS` prompts tell of each feature, and how far they differ tells the standard error of S_ij. What positions that
aren't looked at pass on is left out: a feature seen through two attentions, by way of a third position.
"""

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_circuitlasso.data.checkpoint import Checkpoint
from tl_circuitlasso.data.sharing import ALONE, Ranks
from tl_circuitlasso.models.adapter import Adapter
from tl_circuitlasso.models.encoder import Encoder
from tl_circuitlasso.models.feature_codes import Chunk
from tl_circuitlasso.models.feature_effects import ENCODE_CHUNK, contribution
from tl_circuitlasso.models.feature_layers import Layers, Rows
from tl_circuitlasso.models.feature_path import Path
from tl_circuitlasso.models.feature_sums import Effects, Sums, Tally
from tl_circuitlasso.models.feature_survey import positions_of
from tl_circuitlasso.models.tokens import Batch, find_bos
from tl_circuitlasso.progress import bar as counting

GROUPS = 24  # prompts that tell of one feature
ELSEWHERE = 8  # positions of a prompt at which what attention brings is read
ROWS = 1 << 12  # positions at once
ROOM = 1 << 25  # codes that are dense at any one time
PROMPTS = 32  # prompts that are run on together
KEPT_SECONDS = 60.0  # between two writes of the sums, where they are kept
SUMS = "sums.safetensors"
ALIKE = 1e-4  # relative: as exactly is what a feature writes its code times its decoder row
_ORDER, _SPAN = 2654435761, 1 << 32

Pair = tuple[str, str]
Groups = tuple[Int[Tensor, " group"], Int[Tensor, " group"]]  # features (by place), and prompts that tell of them


# ---- which features on which prompts --------------------------------------------------------------------------------


def chosen_groups(
    chunks: Iterable[Chunk], kept: Mapping[str, Int[Tensor, " _kept"]], most: int, *, progress: bool = False
) -> dict[str, Groups]:
    """By hook, the kept features (by place) and the prompts that tell of them: of each, up to `most` prompts.

    All features prefer the same prompts, so that few prompts tell of many.
    """
    nothing = torch.zeros(2, 0, dtype=torch.int64)  # a process may have no prompts
    found: dict[str, list[Tensor]] = {hook: [nothing] for hook in kept}
    for chunk in counting(chunks, progress=progress, desc="choose prompts", unit="chunk"):
        for hook, features in kept.items():
            codes = chunk.codes[hook]
            place = positions_of(features, codes.width)[codes.columns.long()]
            found[hook].append(_distinct(place[place >= 0], chunk.prompt[codes.row].long()[place >= 0]))
    return {hook: _first(torch.cat(parts, 1), most) for hook, parts in found.items()}


def _distinct(feature: Int[Tensor, " code"], prompt: Int[Tensor, " code"]) -> Int[Tensor, "2 pair"]:
    """Every pair once, in order: as one number each, since rows are sorted far more slowly than numbers."""
    base = int(prompt.max()) + 1 if len(prompt) else 1
    numbers = (feature * base + prompt).unique()
    return torch.stack([numbers // base, numbers % base])


def _of_all(mine: Groups, most: int, ranks: Ranks) -> Groups:
    """This process's share of what all processes would choose as one."""
    if ranks.size == 1:
        return mine
    parts = [part["pairs"] for part in ranks.gather({"pairs": torch.stack(mine)})]
    feature, prompt = _first(torch.cat(parts, 1), most)
    own = torch.isin(prompt, mine[1])
    return feature[own], prompt[own]


def _first(pairs: Int[Tensor, "2 pair"], most: int) -> Groups:
    feature, prompt = (part.numpy() for part in pairs)
    order = np.lexsort(((prompt * _ORDER) % _SPAN, feature))
    begins = np.searchsorted(feature[order], feature[order])
    taken = torch.from_numpy(order[np.arange(len(order)) - begins < most])
    return pairs[0, taken], pairs[1, taken]


def _batches(
    adapter: Adapter, chunks: Iterable[Chunk], prompts: Int[Tensor, " chosen"]
) -> Iterator[tuple[Batch, Int[Tensor, " row"]]]:
    """The chosen prompts again, padded on the right, with their numbers; `keep` marks the samples."""
    for chunk in chunks:
        mine = torch.isin(chunk.numbers, prompts).nonzero().flatten()
        starts = torch.cat([chunk.ends.new_zeros(1), chunk.ends[:-1]])
        lengths = (chunk.ends - starts)[mine]
        for some in _alike(mine[lengths.argsort(stable=True)], chunk, starts, causal=adapter.shape.causal):
            yield _batch(adapter, chunk, starts, some), chunk.numbers[some]


def _alike(order: Tensor, chunk: Chunk, starts: Tensor, *, causal: bool) -> Iterator[Tensor]:
    """Some prompts at a time; of equal length where attention looks ahead, and would see pads."""
    if causal:
        yield from (order.split(PROMPTS) if len(order) else ())
        return
    lengths = (chunk.ends - starts)[order]
    for length in lengths.unique():
        yield from order[lengths == length].split(PROMPTS)


def _batch(adapter: Adapter, chunk: Chunk, starts: Tensor, some: Tensor) -> Batch:
    lengths = (chunk.ends - starts)[some]
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    tokens = torch.zeros(mask.shape, dtype=torch.int64)
    tokens[mask] = torch.cat([chunk.tokens[a:b] for a, b in zip(starts[some], chunk.ends[some])]).long()
    rows = torch.isin(chunk.prompt, chunk.numbers[some]).nonzero().flatten()
    place = torch.empty(len(chunk.numbers), dtype=torch.int64)
    place[some] = torch.arange(len(some))
    keep = torch.zeros_like(mask)
    keep[place[chunk.places(chunk.prompt[rows])], chunk.position[rows].long()] = True
    tokens, mask, keep = (part.to(adapter.device) for part in (tokens, mask, keep))
    return Batch(tokens, mask, keep, 0, find_bos(adapter, tokens, mask))


# ---- what they do ---------------------------------------------------------------------------------------------------


def replay(
    adapter: Adapter,
    chunks: Iterable[Chunk],
    paths: Mapping[Pair, Path],
    kept: Mapping[str, Int[Tensor, " _kept"]],
    copies: Mapping[Pair, int],
    *,
    progress: bool = False,
    ranks: Ranks = ALONE,
    kept_at: Checkpoint | None = None,
) -> dict[Pair, Effects]:
    """The effects of every pair: on features at their own position (`copies` 1), and through attention (2), or through
    each head (1 + heads). One more forward pass over the chosen prompts, up to the last child. `kept_at` is where this
    process keeps how far it has come; whoever calls takes it away.
    """
    if not paths:
        return {}
    parents = list(dict.fromkeys(parent for parent, _ in paths))
    mine = chosen_groups(chunks, {hook: kept[hook] for hook in parents}, GROUPS, progress=progress)
    chosen = {hook: _of_all(groups, GROUPS, ranks) for hook, groups in mine.items()}
    tallies = _tallied(adapter, chunks, paths, chosen, kept, copies, kept_at, progress=progress)
    return {pair: tally.effects(len(kept[pair[0]]), ranks) for pair, tally in tallies.items()}


def _tallied(
    adapter: Adapter, chunks: Iterable[Chunk], paths: Mapping[Pair, Path], chosen: Mapping[str, Groups],
    kept: Mapping[str, Tensor], copies: Mapping[Pair, int], kept_at: Checkpoint | None, *, progress: bool,
) -> dict[Pair, Tally]:  # fmt: skip
    """What this process's prompts tell; those whose sums are kept aren't run again."""
    tallies = {pair: _empty(kept[pair[0]], kept[pair[1]], copies[pair]) for pair in paths}
    prompts = torch.cat([prompt for _, prompt in chosen.values()]).unique()
    keys = set().union(*(path.wanted() for path in paths.values()))
    done, saved = (0 if kept_at is None else _resumed(kept_at, tallies)), time.perf_counter()
    with counting(total=len(prompts), desc="replay", unit="prompt", progress=progress) as bar:
        for number, (batch, numbers) in enumerate(_batches(adapter, chunks, prompts)):
            bar.update(len(numbers) if number < done else 0)
            if number < done:
                continue
            acts = adapter.run(batch.tokens, batch.mask, keys)
            again = _Replay(Layers(adapter, acts, batch.mask), batch, numbers, kept)
            with torch.no_grad():
                for parent in chosen:
                    some = {pair: path for pair, path in paths.items() if pair[0] == parent}
                    again.add(some, chosen[parent], tallies)
            bar.update(len(numbers))
            if kept_at is not None and time.perf_counter() - saved > KEPT_SECONDS:
                _keep(kept_at, number + 1, tallies)
                saved = time.perf_counter()
    return tallies


def _keep(kept_at: Checkpoint, done: int, tallies: Mapping[Pair, Tally]) -> None:
    states = enumerate(tally.state() for tally in tallies.values())
    tensors = {f"{number}/{name}": tensor for number, state in states for name, tensor in state.items()}
    kept_at.write(SUMS, tensors, {"batches": done})


def _resumed(kept_at: Checkpoint, tallies: Mapping[Pair, Tally]) -> int:
    """How many batches are in the sums that are kept, which are put into the tallies."""
    found = kept_at.read(SUMS, remade=True)
    if found is None:
        return 0
    tensors, data = found
    for number, tally in enumerate(tallies.values()):
        start = f"{number}/"
        tally.resume({name.removeprefix(start): x for name, x in tensors.items() if name.startswith(start)})
    return data["batches"]


def _empty(features: Tensor, children: Tensor, copies: int) -> Tally:
    none = [Sums(len(children)) for _ in range(copies)]
    together = Sums(len(children)) if copies > 2 else None
    return Tally(none, torch.zeros(3, len(features), dtype=torch.float64), together)


@dataclass(eq=False)
class _Replay:
    """One batch of prompts, and what is encoded of it."""

    layers: Layers
    batch: Batch
    numbers: Int[Tensor, " prompt"]
    kept: Mapping[str, Int[Tensor, " _kept"]]
    _codes: dict[str, Tensor] = field(default_factory=dict)

    def codes(self, encoder: Encoder) -> Float[Tensor, "prompt pos kept"]:
        """The codes of an SAE's kept features at all real positions, 0 at pads."""
        if encoder.hook not in self._codes:
            x, mask = self.layers.acts[encoder.hook], self.batch.mask
            kept = self.kept[encoder.hook].to(x.device)
            found = torch.zeros(*mask.shape, len(kept), device=x.device)
            found[mask] = torch.cat([encoder.encode(rows)[:, kept] for rows in x[mask].split(ENCODE_CHUNK)])
            self._codes[encoder.hook] = found
        return self._codes[encoder.hook]

    def add(self, paths: Mapping[Pair, Path], chosen: tuple[Tensor, Tensor], tallies: Mapping[Pair, Tally]) -> None:
        """Take in the groups of one parent."""
        parent = next(iter(paths.values())).parent
        mine = torch.isin(chosen[1], self.numbers)
        feature, prompt = chosen[0][mine], chosen[1][mine]
        order = self.numbers.argsort()
        prompt = order[torch.searchsorted(self.numbers[order], prompt)]
        device = self.batch.mask.device
        feature, prompt = feature.to(device), prompt.to(device)
        mixed = any(len(tallies[pair].copies) > 1 for pair in paths)
        where = self.batch.words | self.batch.keep if mixed else self.batch.keep
        codes = torch.where(where[prompt], self.codes(parent)[prompt, :, feature], 0.0)
        for some in self._chunks((codes > 0).sum(1), paths):
            self._add_some(paths, parent, feature[some], prompt[some], codes[some], tallies, mixed)

    def _chunks(self, count: Int[Tensor, " group"], paths: Mapping[Pair, Path]) -> Iterator[Tensor]:
        """Groups of like size together, so many that their rows are few enough."""
        widest = max(path.child.features for path in paths.values())
        room = max(1, min(ROWS, ROOM // widest))
        order = count.argsort()
        order = order[count[order] > 0]
        start = 0
        while start < len(order):
            size = max(1, room // (int(count[order[min(start + 64, len(order) - 1)]]) + ELSEWHERE))
            yield order[start : start + size]
            start += size

    def _add_some(
        self, paths: Mapping[Pair, Path], parent: Encoder, feature: Tensor, prompt: Tensor, codes: Tensor,
        tallies: Mapping[Pair, Tally], mixed: bool,
    ) -> None:  # fmt: skip
        fires, keep = codes > 0, self.batch.keep[prompt]
        others, weight = _elsewhere(fires, keep) if mixed else (torch.zeros_like(fires), codes.new_ones(len(codes)))
        rows, at = _padded(prompt, fires | others)
        code = codes.gather(1, at)
        taken = self._taken(parent, rows, code, feature)
        reads = keep.gather(1, at) & rows.real
        mass = torch.where(keep, codes, 0.0).sum(1)
        for pair, path in paths.items():
            tally = tallies[pair]
            tally.feature.index_add_(1, feature.cpu(), torch.stack([mass > 0, mass, mass.square()]).double().cpu())
            own = self._moved(path, rows, taken, None)
            tally.copies[0].add(feature, torch.where((reads & (code > 0))[..., None], own, 0.0).sum(1), mass)
            copies = len(tally.copies) - 1
            elsewhere = (reads & (code == 0))[..., None]
            for number, head in enumerate([None] if copies == 1 else range(copies), 1):
                brought = own if head is None else self._moved(path, rows, taken, head)
                brought = torch.where(elsewhere, brought, 0.0).sum(1)
                tally.copies[number].add(feature, brought * weight[:, None], mass)
            if tally.together is not None:
                tally.together.add(feature, torch.where(elsewhere, own, 0.0).sum(1) * weight[:, None], mass)

    def _taken(
        self, parent: Encoder, rows: Rows, code: Float[Tensor, "group row"], feature: Int[Tensor, " group"]
    ) -> Float[Tensor, "group row *width"]:
        """What the features write at the rows."""
        kept = self.kept[parent.hook].to(feature.device)[feature]
        if parent.is_cross_layer:
            return code[..., None, None] * parent.written_each.to(code)[kept][:, None]
        plain = code[..., None] * parent.written.to(code)[kept][:, None]
        x, where = rows.of(self.layers.acts[parent.hook]), code > 0
        some = where.nonzero()[:: max(1, int(where.sum()) // 16)]
        exact = contribution(parent, x[some[:, 0], some[:, 1]], kept[some[:, 0]])
        if float((exact - plain[some[:, 0], some[:, 1]]).norm()) <= ALIKE * float(exact.norm()):
            return plain
        parts = zip(x[where].split(ENCODE_CHUNK), kept[:, None].expand_as(code)[where].split(ENCODE_CHUNK))
        plain[where] = torch.cat([contribution(parent, some, which) for some, which in parts]).to(plain)
        return plain

    def _moved(self, path: Path, rows: Rows, taken: Tensor, head: int | None) -> Float[Tensor, "group row kept"]:
        """How much less the child's codes are at the rows."""
        less = path.change(self.layers, rows, taken, head)
        x = rows.of(self.layers.acts[path.child.hook])
        edited = path.child.encode((x - less.reshape(x.shape)).flatten(0, 1))
        kept = self.kept[path.child.hook].to(x.device)
        return rows.of(self.codes(path.child)) - edited[:, kept].unflatten(0, x.shape[:2])


def _padded(prompt: Int[Tensor, " group"], where: Bool[Tensor, "group pos"]) -> tuple[Rows, Int[Tensor, "group row"]]:
    """The true positions of each group, padded."""
    count = where.sum(1)
    at = where.int().argsort(dim=1, descending=True, stable=True)[:, : int(count.max())]
    real = torch.arange(at.shape[1], device=at.device) < count[:, None]
    return Rows(prompt, at, real), at


def _elsewhere(
    fires: Bool[Tensor, "group pos"], keep: Bool[Tensor, "group pos"]
) -> tuple[Bool[Tensor, "group pos"], Float[Tensor, " group"]]:
    """Some positions evenly spread over those where a feature doesn't fire, and for how many each of them stands."""
    able = keep & ~fires
    count = able.sum(1, keepdim=True)
    step = (count / ELSEWHERE).clamp(min=1)
    number = able.cumsum(1) - 1
    taken = able & ((number / step).floor() > ((number - 1) / step).floor())
    return taken, count[:, 0] / taken.sum(1).clamp(min=1)
