"""One prompt as a graph of tokens, features at positions and logits, as circuit-tracer draws it.

    view = tcl.apps.prompt_graph(model, graph, basis, "The cat sat on the mat")
    small = tcl.apps.influence(view).pruned(nodes=0.8, edges=0.98)
    tcl.formats.to_circuit_tracer(small, "prompt.json", prompt="The cat sat on the mat")

Nodes are tokens (`hook_embed.pos3#464`), features where they fire (`blocks.1.hook_resid_post.pos3#17`), what an SAE
misses there (`blocks.1.hook_resid_post.hook_sae_error.pos3`), what nothing here explains of its children
(`...hook_unexplained.pos3`), and the likeliest next tokens (`hook_unembed.pos7#11`). Scores are in units of what the
edge points at:

    token -> feature     of hooks that no other one feeds: what the code loses where the mean of the prompt's embeddings
                         stands in the token's place
    feature -> feature   A_ij z_i(p), through attention B_ij times its part of the mean that the heads make of z_i
    error, unexplained   as `apps.contributions` counts them, at the child's position
    feature -> logit     of hooks that feed no other one: what the logit, less the mean of all logits, loses where what
                         the feature writes there is taken out; likewise of the SAE's error
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_circuitlasso._checks import whole_number
from tl_circuitlasso.apps.contributions import Contributions, contributions, one_prompt
from tl_circuitlasso.data.sites import UNEXPLAINED, parse_site
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.graph.nodes import Block, NodeIndex
from tl_circuitlasso.graph.verbs import in_order
from tl_circuitlasso.models import Adapter, adapt
from tl_circuitlasso.models.encoder import Encoder
from tl_circuitlasso.models.feature_effects import contribution
from tl_circuitlasso.models.hook_order import attention_between
from tl_circuitlasso.models.hooks import resting
from tl_circuitlasso.models.names import act
from tl_circuitlasso.models.sae import ERROR, SAEFeatures, error_name
from tl_circuitlasso.models.tokens import Batch, Prompts
from tl_circuitlasso.progress import bar as counting

TOKENS, LOGITS = "hook_embed", "hook_unembed"
SHARE = 0.95  # of all probability: so much of it the logits hold that are shown
AT_ONCE = 32  # copies of the prompt that are run together
Edges = dict[tuple[str, str], float]


def prompt_graph(
    model: Any,
    graph: Any,
    basis: SAEFeatures | Mapping[str, Any],
    prompt: str | Sequence[int] | Tensor,
    *,
    positions: Any = "all",
    logits: int = 10,
    progress: bool = True,
) -> AttributionGraph:
    """The kept edges of a learned graph on one prompt, position by position, from its tokens to its next token.

    logits: at most so many of the likeliest next tokens, fewer where they hold 95 % of all probability;
    `apps.influence` weighs them by it. One forward pass of the prompt for each token, and for each feature and each
    error at a position of the last hooks, beside those of `apps.contributions`.

    Raises
    ------
    InputError: as `apps.contributions`; a model without a hook for its embeddings; `logits` below 1.

    >>> import tl_circuitlasso as tcl
    >>> demo = tcl.load_demo(prompts=32)
    >>> saes = {f"blocks.{layer}.hook_resid_post": tcl.synthetic.random_sae(48, 12, seed=layer) for layer in (0, 1)}
    >>> basis = tcl.SAEFeatures(saes)
    >>> graph = tcl.circuit_lasso(demo.model, demo.tokens, basis=basis, progress=False)
    >>> view = prompt_graph(demo.model, graph, basis, demo.tokens[0], logits=2)
    >>> view.index.names[0].startswith("hook_embed.pos0#"), view.index.names[-1].startswith("hook_unembed.pos")
    (True, True)
    """
    logits = whole_number("logits", logits)
    model, graph = in_order(model, graph)
    adapter = adapt(model)
    if adapter.point(TOKENS) is None:
        raise InputError(f"`model` ({adapter.architecture}) has no {TOKENS}: its tokens can't be taken out one by one")
    basis = SAEFeatures.of(basis)
    view = contributions(adapter, graph, basis, prompt, positions=positions)
    (batch,) = Prompts(adapter, one_prompt(prompt), positions=positions)
    seen = _Seen.of(adapter, batch, basis.encoders(), graph, logits)
    edges = seen.between(view)
    with counting(progress=progress, desc="prompt_graph", unit="run") as runs:
        edges |= seen.to_logits(runs.update)
        used = {source for source, _ in edges}
        edges |= {ends: value for ends, value in seen.from_tokens(runs.update).items() if ends[1] in used}
    index = seen.index(edges)
    provenance = {**graph.provenance, "view": "one prompt", "prompt_tokens": list(view.tokens)}
    info = {name: seen.facts(name, view.tokens) for name in index.names}
    return AttributionGraph.from_edges(index, edges, node_info=info, provenance=provenance)


@dataclass(frozen=True, eq=False)
class _Seen:
    """One prompt's activations and codes; `shown`: by hook, the features that the graph names."""

    adapter: Adapter
    batch: Batch
    encoders: Mapping[str, Encoder]
    graph: AttributionGraph
    acts: Mapping[str, Tensor]
    codes: Mapping[str, Float[Tensor, "pos feature"]]
    chosen: Int[Tensor, " logit"]
    probability: Float[Tensor, " logit"]

    @classmethod
    def of(
        cls, adapter: Adapter, batch: Batch, encoders: Mapping[str, Encoder], graph: AttributionGraph, most: int
    ) -> "_Seen":
        named = [str(block.site) for block in graph.index.blocks]  # in the order of computation
        used = {hook: encoders[hook] for hook in named if hook in encoders}
        hooks = {name for encoder in used.values() for name in (encoder.hook, encoder.hook_out)}
        patterns = [act("pattern", layer) for layer in range(adapter.shape.n_layers)]
        acts = adapter.run(batch.tokens, batch.mask, [*hooks, *patterns, TOKENS, "logits"])
        codes = {hook: encoder.encode(acts[hook][0]).double().cpu() for hook, encoder in used.items()}
        probability, chosen = acts["logits"][0, _last(batch)].double().softmax(0).sort(descending=True)
        count = min(most, 1 + int((probability.cumsum(0) < SHARE).sum()))
        return cls(adapter, batch, used, graph, acts, codes, chosen[:count].cpu(), probability[:count].cpu())

    # -- edges -----------------------------------------------------------------------------------------------------

    def between(self, view: Contributions) -> Edges:
        """From features, errors and what isn't explained to features, by position; ports are added up."""
        found: Edges = defaultdict(float)
        rows = view.table[view.table["target"].str.contains("#")]
        columns = ("position", "source", "target", "port", "contribution")
        for position, source, target, port, value in zip(*(rows[name].tolist() for name in columns)):
            if source.endswith(".bias") or not value:
                continue
            for place, part in self._where(source, target, position) if port == "v" else [(position, 1.0)]:
                found[_at(source.replace(".unexplained", f".{UNEXPLAINED}"), place), _at(target, position)] += (
                    part * value
                )
        return {ends: value for ends, value in found.items() if value}

    def _where(self, source: str, target: str, position: int) -> Iterator[tuple[int, float]]:
        """From which positions heads bring a feature, and which part comes from each."""
        hook, _, number = source.rpartition("#")
        layers = attention_between(hook, target.rpartition("#")[0], self.adapter.shape.n_layers)
        pattern = torch.stack([self.acts[act("pattern", layer)][0, :, position].double().cpu() for layer in layers])
        brought = pattern.mean((0, 1)) * self.codes[hook][:, int(number)] * self.batch.words[0].cpu()
        brought = brought / brought.sum().clamp(min=1e-300)
        return ((place, float(brought[place])) for place in brought.nonzero().flatten().tolist())

    def from_tokens(self, tick: Callable[[int], Any]) -> Edges:
        """What the features of hooks that nothing feeds lose, position by position, without each token."""
        targets = {self._hook(target) for target in self.graph.target[self.graph.kept].tolist()}
        first = {hook: encoder for hook, encoder in self.encoders.items() if hook not in targets}
        embedded, found = self.acts[TOKENS][0], {}
        mean = embedded[self.batch.mask[0]].mean(0)
        for some in self.batch.mask[0].nonzero().flatten().split(AT_ONCE):
            instead = embedded.repeat(len(some), 1, 1)
            instead[torch.arange(len(some)), some] = mean
            acts = self._run(TOKENS, instead, [encoder.hook for encoder in first.values()])
            tick(len(some))
            for hook, encoder in first.items():
                left = encoder.encode(acts[hook].flatten(0, 1)).double().cpu().unflatten(0, acts[hook].shape[:2])
                for place, feature in self._firing(hook):
                    lost = self.codes[hook][place, feature] - left[:, place, feature]
                    target = _at(f"{hook}#{feature}", place)
                    found |= {(self._token(p), target): float(x) for p, x in zip(some.tolist(), lost) if x}
        return found

    def to_logits(self, tick: Callable[[int], Any]) -> Edges:
        """What the chosen logits lose without each feature, and each error, of hooks that feed no other hook."""
        ends = [self._hook(end) for end in self.graph.source[self.graph.kept].tolist()]
        feeding = {hook for hook, end in zip(ends, self.graph.target[self.graph.kept].tolist()) if self._hook(end)}
        found: Edges = {}
        for hook, encoder in self.encoders.items():
            if hook not in feeding:
                found |= self._lost(encoder, self._firing(hook), tick)
        return found

    def _lost(self, encoder: Encoder, firing: list[tuple[int, int]], tick: Callable[[int], Any]) -> Edges:
        read, out = self.acts[encoder.hook][0], self.acts[encoder.hook_out][0]
        keep = self.batch.keep[0].nonzero().flatten()
        taken = encoder.encode_with_error(read[keep], out[keep])[1].to(out)
        names, places = [_at(error_name(encoder.hook), p) for p in keep.tolist()], keep
        if firing:
            place, feature = torch.tensor(firing, device=out.device).T
            with torch.no_grad():
                taken = torch.cat([taken, contribution(encoder, read[place], feature).to(taken)])
            names += [_at(f"{encoder.hook}#{i}", p) for p, i in firing]
            places = torch.cat([places, place])
        plain = self._centred(self.acts["logits"])
        found: Edges = {}
        for rows in torch.arange(len(names)).split(AT_ONCE):
            instead = out.repeat(len(rows), *[1] * out.ndim)
            instead[torch.arange(len(rows)), places[rows]] -= taken[rows].view(-1, *out.shape[1:])
            lost = plain - self._centred(self._run(encoder.hook_out, instead, ["logits"])["logits"])
            tick(len(rows))
            for row, losses in zip(rows.tolist(), lost):
                found |= {(names[row], self._logit(k)): float(x) for k, x in enumerate(losses) if x}
        return found

    def _centred(self, logits: Float[Tensor, "row pos vocab"]) -> Float[Tensor, "row logit"]:
        last = logits[:, _last(self.batch)].double().cpu()
        return last[:, self.chosen] - last.mean(1, keepdim=True)

    def _run(self, hook: str, instead: Tensor, wanted: Sequence[str]) -> dict[str, Tensor]:
        """The prompt run again with other activations at a hook, one row each."""
        tokens, mask = (x.expand(len(instead), -1) for x in (self.batch.tokens, self.batch.mask))
        with torch.no_grad(), resting(self.adapter.model):
            return self.adapter.run(tokens, mask, wanted, edits=[(hook, lambda old: instead.to(old.dtype))])

    # -- nodes -----------------------------------------------------------------------------------------------------

    def _hook(self, node: int) -> str:
        """The hook of a feature of these SAEs; empty for other nodes."""
        hook, _, _ = self.graph.index.names[node].rpartition("#")
        return hook if hook in self.encoders else ""

    def _firing(self, hook: str) -> list[tuple[int, int]]:
        """Position and number of the graph's features that fire at samples."""
        block = next(block for block in self.graph.index.blocks if str(block.site) == hook)
        named = torch.tensor(block.features)
        fires = (self.codes[hook][:, named] > 0) & self.batch.keep[0].cpu()[:, None]
        return [(place, int(named[column])) for place, column in fires.nonzero().tolist()]

    def _token(self, position: int) -> str:
        return f"{_at(TOKENS, position)}#{int(self.batch.tokens[0, position])}"

    def _logit(self, number: int) -> str:
        return f"{_at(LOGITS, _last(self.batch))}#{int(self.chosen[number])}"

    def index(self, edges: Edges) -> NodeIndex:
        """Tokens, then each hook's features and errors by position, then logits."""
        places: dict[str, set[int]] = defaultdict(set)
        for name in {end for ends in edges for end in ends}:
            site, mark, number = name.rpartition("#")
            places[site if mark else name] |= {int(number)} if mark else set()
        for number in range(len(self.chosen)):  # a logit that nothing bears on is shown, too
            site, _, token = self._logit(number).rpartition("#")
            places[site].add(int(token))
        order = {hook: rank for rank, hook in enumerate(self.encoders, 1)}

        def rank(site: str) -> int:
            base = site.rpartition(".pos")[0]
            hook = base.removesuffix(f".{ERROR}").removesuffix(f".{UNEXPLAINED}")
            return {TOKENS: 0, LOGITS: len(order) + 1}.get(hook, order.get(hook, 0))

        ordered = sorted(places, key=lambda site: (rank(site), site.rpartition(".pos")[0], _position(site)))
        return NodeIndex(
            tuple(Block(parse_site(site), rank(site), tuple(sorted(places[site])) or None) for site in ordered)
        )

    def facts(self, name: str, tokens: Sequence[str]) -> dict[str, Any]:
        """What is known of a node: of a feature what the learned graph knows, and its code here."""
        site, mark, number = name.rpartition("#")
        hook, _, place = (site if mark else name).rpartition(".pos")
        if hook == TOKENS:
            return {"label": tokens[int(place)]}
        if hook == LOGITS:
            row = self.chosen.tolist().index(int(number))
            tokenizer = getattr(self.adapter.model, "tokenizer", None)
            text = number if tokenizer is None else tokenizer.decode([int(number)])
            return {"label": text, "probability": float(self.probability[row])}
        if not mark:
            return {}
        known = dict(self.graph.node_info.get(f"{hook}#{number}", {}))
        return known | {"activation": float(self.codes[hook][int(place), int(number)])}


def _at(name: str, position: int) -> str:
    """A node's name with its position behind the hook.

    >>> _at("blocks.1.hook_resid_post#7", 3), _at("hook_embed", 0)
    ('blocks.1.hook_resid_post.pos3#7', 'hook_embed.pos0')
    """
    hook, mark, number = name.rpartition("#")
    return f"{hook}.pos{position}#{number}" if mark else f"{name}.pos{position}"


def _position(site: str) -> int:
    return int(site.rpartition(".pos")[2])


def _last(batch: Batch) -> int:
    """The prompt's last real position."""
    return int(batch.mask[0].nonzero().max())
