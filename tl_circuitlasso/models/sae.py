"""SAE features as nodes: which SAEs stand at which hooks, which pairs are regressed, and what is left out.

    basis = tcl.SAEFeatures({"blocks.0.hook_resid_post": sae0, "blocks.1.hook_resid_post": sae1})
    graph = tcl.circuit_lasso(model, tokens, basis=basis)

An SAE is anything with `encode`, `decode` and `W_dec`: those of SAELens (standard, TopK, BatchTopK, JumpReLU, gated,
matryoshka, transcoders), a folder that SAELens saved, a "release/sae_id" that it knows, or an object of one's own.
Activations are encoded as the model makes them: SAEs are never attached.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any

from tl_circuitlasso._checks import whole_number, whole_or_none
from tl_circuitlasso.data.sites import Site, parse_site
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.graph.nodes import Block
from tl_circuitlasso.models.cross_layer import is_whole, layers_of
from tl_circuitlasso.models.encoder import Encoder
from tl_circuitlasso.models.sae_checks import metadata

MIXINGS = ("same", "mean", "heads", "pooled")
PENALTIES = ("read", "l1", "adaptive")
ERROR = "hook_sae_error"  # as SAELens calls it
Pairs = str | tuple[tuple[str, str], ...]


@dataclass(frozen=True, eq=False)
class SAEFeatures:
    """The features of several SAEs as nodes "<hook>#<feature>"; made for tens of thousands of them.

    Parameters
    ----------
    saes: {hook name: SAE}, or a list of pairs (hook name, SAE), or of SAEs that say their hook (SAELens' do, in
        `cfg.metadata.hook_name`). A transcoder goes under the hook that it reads; where it writes stands in its
        `hook_out`, or where SAELens keeps it, in `cfg.metadata.hook_name_out`. A cross-layer transcoder is one such
        object a layer, with `hook_outs` and a W_dec of (feature, output, width) (`tcl.CrossLayer`), or circuit-tracer's
        object of all layers; it needs `error=False`, as what it misses belongs to no single layer.
    pairs: "adjacent" (each hook with the next, in the order of computation), "all" (each hook with every later one) or
        a list of (hook, hook); every pair is a regression of its own. Hooks that feed no other one feed the target,
        unless the list has pairs (hook, "target").
    mixing: where a parent is looked at. "same": the child's own position. "mean": also through attention, its codes
        averaged over positions (but BOS) by the mean pattern of the heads between the two hooks (port "v"). "heads":
        the same with each head's own pattern. "pooled": the mean over each prompt's kept positions, one sample a
        prompt.
    min_count: features that fire fewer times than this are left out, as are those that never or always fire.
    max_features: of the rest at most this many a hook: those with the most variance of code times decoder norm.
    error: whether what an SAE misses is a node too, "<hook>.hook_sae_error", seen in `error_directions` principal
        directions.
    penalty: "read": parents are taken out where they fire, and the layers up to the child run on from there (between
        hooks of the residual stream, heads, neurons, norms, attention's and MLPs' outputs, for SAEs and transcoders;
        see `models.feature_replay`). Weights say what that does to the child's code, and the smaller it is, the dearer
        is the parent to the regression, which can't act against it. Kept are edges of some size that aren't chance,
        inhibition and what the regression left out included (`features.effects`). Pairs of which it isn't known what
        stands between are warned about: there, for the target, and where samples are fewer than half the columns, the
        penalty is "l1", as the graph's provenance says of every pair.
        "l1": all alike, weights are least squares. "adaptive": a second solve whose weights come from the first.
    draws: half-samples from which to tell each edge's stability (a column of the graph); 0 for none.
    held_out: share of the prompts kept out of the regressions, on which their R^2 is measured.
    labels: {node name or feature: text}, or a JSON file with such an object.
    memory: bytes that codes may take before they go to disk (None: half of what is free), and regressions may take at
        all (None: what is free).

    Raises
    ------
    InputError: unknown names, numbers out of range, no SAE, a hook twice, a pair of unknown hooks, a bad labels file.

    >>> import tl_circuitlasso as tcl
    >>> demo = tcl.load_demo(prompts=32)
    >>> saes = {f"blocks.{layer}.hook_resid_post": tcl.synthetic.random_sae(48, 12, seed=layer) for layer in (0, 1)}
    >>> basis = SAEFeatures(saes)
    >>> graph = tcl.circuit_lasso(demo.model, demo.tokens, basis=basis, progress=False)
    >>> len(graph.index), graph.provenance["pairs"][0]["source"]
    (16, 'blocks.0.hook_resid_post')
    """

    saes: Any
    pairs: Any = "adjacent"
    mixing: str = "same"
    min_count: int = 20
    max_features: Any = None
    error: bool = True
    penalty: str = "read"
    labels: Any = None
    error_directions: int = 16
    draws: int = 0
    held_out: float = 0.1
    memory: int | None = None
    name: str = field(default="sae", init=False)

    def __post_init__(self) -> None:
        _check_choice("mixing", self.mixing, MIXINGS)
        _check_choice("penalty", self.penalty, PENALTIES)
        whole_number("min_count", self.min_count)
        whole_number("draws", self.draws, least=0)
        whole_number("error_directions", self.error_directions)
        for name in ("max_features", "memory"):
            whole_or_none(name, getattr(self, name))
        if not isinstance(self.held_out, Real) or not 0 <= self.held_out < 1:
            raise InputError(f"`held_out` is {self.held_out!r}: give a share of the prompts from 0 to below 1")
        object.__setattr__(self, "saes", _by_hook(self.saes))
        object.__setattr__(self, "pairs", _checked_pairs(self.pairs, set(self.saes)))
        object.__setattr__(self, "labels", _read_labels(self.labels))

    @classmethod
    def of(cls, saes: "SAEFeatures | Any") -> "SAEFeatures":
        """The basis itself, or that of SAEs by hook."""
        return saes if isinstance(saes, SAEFeatures) else cls(saes)

    def encoders(self, *, cross_layer: bool = False) -> dict[str, Encoder]:
        """The SAEs, each at its place, by the hook that it reads; names and paths are loaded here.

        Raises
        ------
        InputError: a cross-layer transcoder, unless the caller knows what to do with one (`cross_layer`).
        """
        loaded = {hook: load_sae(sae) for hook, sae in dict(self.saes).items()}
        found = {hook: Encoder(sae, hook, *_writes_at(sae, hook)) for hook, sae in loaded.items()}
        if not cross_layer and (wrong := [hook for hook, one in found.items() if one.is_cross_layer]):
            raise InputError(
                f"`saes`: the SAE at {wrong[0]} is a cross-layer transcoder, which writes to several layers: only "
                "`circuit_lasso` knows what to do with those"
            )
        return found

    def arguments(self) -> dict[str, Any]:
        """What was asked for, as plain data for a graph's provenance."""
        names = ("mixing", "min_count", "max_features", "error", "penalty", "error_directions", "draws", "held_out")
        pairs = self.pairs if isinstance(self.pairs, str) else [list(pair) for pair in self.pairs]
        return {"basis": self.name, "hooks": list(dict(self.saes)), "pairs": pairs} | {
            name: getattr(self, name) for name in names
        }

    def label(self, node: str) -> str | None:
        """What the user calls a node, by its name or (where there is one SAE only) by its feature's number."""
        assert isinstance(self.labels, dict)
        feature = node.rpartition("#")[2]
        alone = len(dict(self.saes)) == 1
        return self.labels.get(node, self.labels.get(feature) if alone else None)


def load_sae(source: Any) -> Any:
    """The SAE that `source` means: a folder that SAELens saved, "release/sae_id", (release, sae_id), or an SAE itself.

    Raises
    ------
    InputError: SAELens isn't installed, or it can't load that; the message says why.

    >>> import tempfile
    >>> from sae_lens import StandardSAE, StandardSAEConfig
    >>> folder = tempfile.mkdtemp()
    >>> _ = StandardSAE(StandardSAEConfig(d_in=8, d_sae=32)).save_model(folder)
    >>> load_sae(folder).cfg.d_sae                    # or "gpt2-small-res-jb/blocks.7.hook_resid_pre", from the hub
    32
    """
    if not isinstance(source, str | Path | tuple):
        return source
    try:
        from sae_lens import SAE
    except ImportError as error:
        raise InputError(
            f"`saes`: {source!r} needs SAELens to load it ({error}): pip install 'tl-circuitlasso[sae]', or give an "
            "object with encode, decode and W_dec"
        ) from error
    try:
        if isinstance(source, tuple):
            return SAE.from_pretrained(*source)
        if Path(source).is_dir():
            return SAE.load_from_disk(source)
        release, _, sae_id = str(source).partition("/")
        return SAE.from_pretrained(release, sae_id)
    except Exception as error:  # SAELens and the hub raise whatever their storage raises
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"`saes`: {source!r} is neither a folder with an SAE nor a release that could be loaded: {first}"
        ) from error


def hook_block(hook: str, rank: int, features: Iterable[int]) -> Block:
    """The block of a hook's kept features."""
    return Block(parse_hook(hook), rank, tuple(features))


def error_block(hook: str, rank: int) -> Block:
    """The block of a hook's one error node."""
    return Block(parse_hook(error_name(hook)), rank)


def error_name(hook: str) -> str:
    """How the node is called that stands for what the SAE at `hook` misses."""
    return f"{hook}.{ERROR}"


def parse_hook(hook: str) -> Site:
    """The site of a hook name.

    Raises
    ------
    InputError: the name has no "hook" in it, or characters that node names can't have.
    """
    try:
        site = parse_site(hook)
    except InputError as error:
        raise InputError(f"`saes` names the hook {hook!r}, which isn't a hook name: {error}") from None
    if site.kind != "hook":
        raise InputError(f"`saes` names {hook!r}: give a hook name such as blocks.0.hook_resid_post")
    return site


def _by_hook(saes: Any) -> dict[str, Any]:
    if is_whole(saes):
        saes = layers_of(saes)
    ways = "give {hook name: SAE}, or a list of pairs (hook name, SAE); SAEs alone must say their hook, as SAELens' do"
    if metadata(saes).get("hook_name"):
        saes = [saes]
    if not isinstance(saes, Mapping | list | tuple):  # an SAE of SAELens can be iterated over, too
        raise InputError(f"`saes` is a {type(saes).__name__}: {ways}")
    given = list(saes.items()) if isinstance(saes, Mapping) else [_with_hook(item) for item in saes]
    if not given:
        raise InputError("`saes` is empty: give at least one {hook name: SAE}")
    for item in given:
        if not (isinstance(item, tuple | list) and len(item) == 2):
            raise InputError(f"`saes` holds a {type(item).__name__}: {ways}")
        if not isinstance(item[0], str):
            raise InputError(f"`saes` has {item[0]!r:.40} for a hook name: {ways}")
        parse_hook(item[0])
    hooks = [hook for hook, _ in given]
    twice = sorted({hook for hook in hooks if hooks.count(hook) > 1})
    if twice:
        raise InputError(f"`saes` names the hook {twice[0]} more than once: one SAE a hook, others in another call")
    return dict(given)


def _with_hook(item: Any) -> Any:
    """An SAE with the hook that it was trained at, if it says so; anything else as it is."""
    hook = metadata(item).get("hook_name")
    return (hook, item) if hook else item


def _checked_pairs(pairs: Any, hooks: set[str]) -> Pairs:
    if isinstance(pairs, str):
        _check_choice("pairs", pairs, ("adjacent", "all"))
        return pairs
    if not isinstance(pairs, Iterable):
        raise InputError(f"`pairs` is {pairs!r}: give 'adjacent', 'all' or a list of (source hook, target hook)")
    for pair in (pairs := list(pairs)):
        if not (isinstance(pair, tuple | list) and len(pair) == 2):
            raise InputError(f"`pairs` holds {pair!r}: give (source hook, target hook)")
    found = tuple(tuple(pair) for pair in pairs)
    for pair in found:
        unknown = [end for end, known in zip(pair, (hooks, hooks | {"target"})) if end not in known]
        if unknown:
            raise InputError(f"`pairs` names {unknown[0]!r}, which has no SAE here: {', '.join(sorted(hooks))}")
    if len(set(found)) != len(found):
        raise InputError("`pairs` names a pair twice: give each once")
    if not found:
        raise InputError("`pairs` is empty: give at least one pair, or 'adjacent'")
    return found  # type: ignore[return-value]


def _read_labels(labels: Any) -> dict[str, str]:
    if isinstance(labels, str | Path):
        try:
            labels = json.loads(Path(labels).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"`labels`: {labels} isn't a readable JSON file ({error})") from error
    if labels is not None and not isinstance(labels, Mapping):
        raise InputError(f"`labels` is a {type(labels).__name__}: give {{node name: text}}, or a JSON file with that")
    for key, text in (labels or {}).items():
        if not isinstance(text, str):
            raise InputError(f"`labels` has a {type(text).__name__} for {key!r}: give {{node name: text}}")
    return {str(key): text for key, text in (labels or {}).items()}


def _writes_at(sae: Any, hook: str) -> tuple[str, tuple[str, ...] | None]:
    """The hook whose activations the codes explain: another one only for transcoders; of a layer of a cross-layer
    transcoder those behind it, too."""
    outs = getattr(sae, "hook_outs", None)
    if isinstance(outs, Iterable) and (outs := tuple(map(str, outs))):
        return outs[0], outs[1:]
    own = getattr(sae, "hook_out", None)
    if isinstance(own, str) and own:
        return own, None
    cfg = getattr(sae, "cfg", None)
    known = (getattr(where, "hook_name_out", None) for where in (getattr(cfg, "metadata", None), cfg))
    if out := next((name for name in known if isinstance(name, str) and name), None):
        return out, None
    if any("Transcoder" in kind.__name__ for kind in type(sae).__mro__):
        raise InputError(
            f"`saes`: the {type(sae).__name__} at {hook} doesn't say where it writes: set its attribute hook_out, such "
            "as sae.hook_out = 'blocks.0.hook_mlp_out' (SAELens keeps it in sae.cfg.metadata.hook_name_out)"
        )
    return hook, None


def _check_choice(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise InputError(f"`{name}` is {value!r}: use one of {', '.join(map(repr, known))}")
