"""Put your own model, SAE, file format or method to the test that this library's pass: what scikit-learn's estimator
checks are for estimators.

Each `check_...` runs all its checks and raises one `CheckFailure` that names every check that failed and why; it
returns the names of those that passed. In a test suite one line does: `check_method(my_method)`.

>>> from tl_circuitlasso import baselines
>>> check_method(baselines.random_edges)
('gives a graph of the model', 'finite scores', 'same again', 'leaves the model as it was', 'counts its passes')
"""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_circuitlasso.baselines.edges import EdgeLayout, as_circuits, written_out
from tl_circuitlasso.demo import load_demo
from tl_circuitlasso.errors import CircuitLassoError, FormatError, InputError
from tl_circuitlasso.evaluate.circuits import check_graph
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.graph.nodes import component_index
from tl_circuitlasso.models import Adapter, adapt
from tl_circuitlasso.models.ablation import from_run
from tl_circuitlasso.models.closure import closure_check
from tl_circuitlasso.models.encoder import Encoder
from tl_circuitlasso.models.patch import run_circuits
from tl_circuitlasso.models.patching import record_all, unembed
from tl_circuitlasso.models.sae import SAEFeatures
from tl_circuitlasso.naming import directory as _directory

PROMPTS, LENGTH = 4, 8  # of random tokens, where none are given
CLOSE = {torch.float64: 1e-9, torch.float32: 2e-4}  # relative; 16-bit models get 5e-2

Check = tuple[str, Callable[[], None]]


__dir__ = _directory(__name__)


class CheckFailure(CircuitLassoError, AssertionError):
    """Something that a model, basis, format or method must do and doesn't."""


def _run(what: str, checks: Iterator[Check]) -> tuple[str, ...]:
    passed, failed = [], []
    for name, check in checks:
        try:
            check()
        except Exception as error:  # whatever a stranger's object raises is a finding
            failed.append(f"{name}: {type(error).__name__}: {error}" if str(error) else name)
        else:
            passed.append(name)
    if failed:
        raise CheckFailure(f"{what} fails {len(failed)} of {len(failed) + len(passed)} checks:\n" + "\n".join(failed))
    return tuple(passed)


def _expect(holds: bool, message: str) -> None:
    if not holds:
        raise CheckFailure(message)


def _close(found: Tensor, wanted: Tensor, what: str, tolerance: float | None = None) -> None:
    limit = CLOSE.get(wanted.dtype, 5e-2) if tolerance is None else tolerance
    scale = float(wanted.abs().max().clamp_min(torch.finfo(torch.float32).tiny))
    error = float((found - wanted).abs().max()) / scale
    _expect(error <= limit, f"{what}: relative error {error:.2g}, tolerance {limit:.0e}")


# ---- models ---------------------------------------------------------------------------------------------------------


def check_model(model: Any, tokens: Int[Tensor, "batch pos"] | None = None) -> tuple[str, ...]:
    """Can this model be read and patched truthfully?

    Checked: it is supported; its activations add up as its weights say (heads, MLPs, norms, unembedding); a circuit of
    all edges is the model and one of none is the run that is patched in; a single cut edge into the logits does what
    the weights say; two runs agree; it is left as it was. `tokens`: two or more prompts; random ones by default.

    Raises
    ------
    CheckFailure: names every check that failed.

    >>> import tl_circuitlasso as tcl
    >>> demo = tcl.load_demo(prompts=1)
    >>> len(check_model(demo.model)) > 3
    True
    """
    return _run("the model", _model_checks(model, tokens))


def _model_checks(model: Any, tokens: Tensor | None) -> Iterator[Check]:
    made: list[Adapter] = []
    yield "is supported", lambda: made.append(adapt(model))
    if not made:
        return
    adapter = made[0]
    prompts = _random_tokens(adapter) if tokens is None else tokens
    before = _state(model)
    yield "activations add up", lambda: _ignore(closure_check(adapter, prompts))
    yield "two runs agree", lambda: _two_runs(adapter, prompts)
    yield "all edges are the model, none the other run", lambda: _ends(adapter, prompts)
    yield "one cut edge does what the weights say", lambda: _one_cut(adapter, prompts)
    yield "is left as it was", lambda: _expect(_state(model) == before, "weights, mode or hooks have changed")


def _ignore(_: Any) -> None: ...


def _random_tokens(adapter: Adapter) -> Int[Tensor, "batch pos"]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(adapter.shape.d_vocab, (PROMPTS, LENGTH), generator=generator)


def _two_runs(adapter: Adapter, tokens: Tensor) -> None:
    first, second = (adapter.run(tokens, None, ["logits"])["logits"] for _ in range(2))
    _expect(torch.equal(first, second), "the logits of two runs on the same prompts differ: is dropout on?")


def _cut_run(adapter: Adapter, tokens: Tensor, kept: Tensor) -> Float[Tensor, "circuit batch pos vocab"]:
    cut = from_run(adapter, tokens.flip(0), None)
    return run_circuits(adapter, tokens, None, as_circuits(kept, EdgeLayout(adapter.shape)), cut)


def _ends(adapter: Adapter, tokens: Tensor) -> None:
    mask = EdgeLayout(adapter.shape).mask()
    full, empty = _cut_run(adapter, tokens, torch.stack([mask, torch.zeros_like(mask)]))
    clean, other = (adapter.run(some, None, ["logits"])["logits"] for some in (tokens, tokens.flip(0)))
    _close(full, clean, "a circuit of all edges against the model")
    _close(empty, other, "a circuit of no edge against the run that is patched in")


def _one_cut(adapter: Adapter, tokens: Tensor) -> None:
    """Edges into the logits, by the engine and by the unembedding of what is left of the last stream."""
    layout = EdgeLayout(adapter.shape)
    plain, other = record_all(adapter, tokens), record_all(adapter, tokens.flip(0))
    change = plain.written.map(torch.sub, other.written)
    everywhere = torch.ones_like(tokens, dtype=torch.bool).nonzero(as_tuple=True)
    deltas = written_out(adapter, change, everywhere).unflatten(1, tokens.shape)
    sources = sorted({0, 1, layout.n_sources - 1})
    kept = layout.mask().repeat(len(sources), 1, 1)
    for number, source in enumerate(sources):
        kept[number, source, -1] = False
    for found, source in zip(_cut_run(adapter, tokens, kept), sources):
        wanted = unembed(adapter, plain.streams.logits - deltas[source])
        _close(found, wanted, f"without {layout.index.names[source]}->logits")


def _state(model: Any) -> tuple[Any, ...]:
    sums = tuple(float(part.detach().double().sum()) for part in model.parameters())
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    return sums, hooks, model.training, tuple(part.requires_grad for part in model.parameters())


# ---- bases ----------------------------------------------------------------------------------------------------------


def check_basis(
    sae: Any, model: Any, hook: str | None = None, tokens: Int[Tensor, "batch pos"] | None = None
) -> tuple[str, ...]:
    """Can this SAE, or anything with `encode`, `decode` and `W_dec`, be the basis of a graph of this model?

    Checked: shapes; finite codes that aren't negative; a sample's codes don't depend on the samples beside it; what
    codes and error say is the activation; a feature writes along its row of W_dec; two calls agree and leave the object
    as it was. `hook`: where it reads, by default what its metadata say.

    Raises
    ------
    CheckFailure: names every check that failed. InputError: no hook is given or known.

    >>> import tl_circuitlasso as tcl
    >>> demo = tcl.load_demo(prompts=1)
    >>> sae = tcl.synthetic.random_sae(48, 8)
    >>> len(check_basis(sae, demo.model, "blocks.0.hook_resid_post")) > 3
    True
    """
    place = hook or _own_hook(sae)
    return _run(f"the basis at {place}", _basis_checks(sae, adapt(model), place, tokens))


def _own_hook(sae: Any) -> str:
    cfg = getattr(sae, "cfg", None)
    metadata = getattr(cfg, "metadata", None)
    found = getattr(metadata, "hook_name", None) or getattr(cfg, "hook_name", None)
    if not isinstance(found, str):
        raise InputError("`hook` is missing, and the SAE doesn't say what it reads: give the name of a hook")
    return found


def _basis_checks(sae: Any, adapter: Adapter, hook: str, tokens: Tensor | None) -> Iterator[Check]:
    made: list[Encoder] = []
    yield "has encode, decode and W_dec", lambda: made.append(SAEFeatures({hook: sae}).encoders()[hook])
    if not made:
        return
    encoder = made[0]
    prompts = _random_tokens(adapter) if tokens is None else tokens
    acts = adapter.run(prompts, None, {hook, encoder.hook_out})
    x, out = (acts[name].flatten(0, 1) for name in (hook, encoder.hook_out))
    before = dict(vars(sae)) if hasattr(sae, "__dict__") else {}
    yield "reads this model's activations", lambda: _ignore(encoder.encode_with_error(x, out))
    yield "codes aren't negative", lambda: _expect(bool((encoder.encode(x) >= 0).all()), "some codes are below 0")
    yield (
        "codes stand by themselves",
        lambda: _close(encoder.encode(x[:2]), encoder.encode(x)[:2], "alone and together"),
    )
    yield "codes and error are the activation", lambda: _adds_up(encoder, x, out)
    yield "features write along W_dec", lambda: _writes(encoder, x)
    yield "two calls agree", lambda: _expect(torch.equal(encoder.encode(x), encoder.encode(x)), "codes differ")
    yield "is left as it was", lambda: _expect(_same(before, sae), "attributes have changed")


def _same(before: dict[str, Any], sae: Any) -> bool:
    now = vars(sae) if hasattr(sae, "__dict__") else {}
    return now.keys() == before.keys() and all(now[name] is before[name] for name in now)


def _adds_up(encoder: Encoder, x: Tensor, out: Tensor) -> None:
    _, error = encoder.encode_with_error(x, out)
    _close(encoder.reconstruct(x) + error, out.flatten(1).float(), "what codes and error say against the activation")


def _writes(encoder: Encoder, x: Tensor) -> None:
    """Codes of one feature raised by 1: the change must point where its row of W_dec does."""
    codes = encoder.encode(x)
    if not bool(codes.any()):
        raise CheckFailure("no feature fires on these prompts: give `tokens` that it was trained on")
    for feature in codes.sum(0).topk(min(3, encoder.features)).indices.tolist():

        def raised(values: Tensor, feature: int = feature) -> Tensor:
            return values.index_add(1, torch.tensor([feature]).to(values.device), torch.ones_like(values[:, :1]))

        plain, other = encoder.edited(x, raised)
        row = encoder.decoder[feature].to(other.device)
        along = torch.nn.functional.cosine_similarity(other - plain, row.expand_as(plain), dim=1)
        _expect(float(along.min()) > 0.99, f"feature {feature} writes elsewhere (cosine {float(along.min()):.2f})")


# ---- formats --------------------------------------------------------------------------------------------------------


def check_format(
    reader: Callable[[Path], AttributionGraph], writer: Callable[[AttributionGraph, Path], Any], suffix: str = ".json"
) -> tuple[str, ...]:
    """Does a format give component graphs back, and refuse what isn't one?

    Checked: kept edges and their scores survive, with and without ports, in parallel and attention-only models, and of
    an empty circuit; writing changes no graph; no file, an empty one, half a file and foreign bytes raise `FormatError`
    and nothing else.

    Raises
    ------
    CheckFailure: names every check that failed.

    >>> import tl_circuitlasso as tcl
    >>> len(check_format(tcl.formats.from_eap, tcl.formats.to_eap)) > 3
    True
    """
    with tempfile.TemporaryDirectory() as folder:
        return _run("the format", _format_checks(reader, writer, Path(folder), suffix))


def _format_checks(reader: Any, writer: Any, folder: Path, suffix: str) -> Iterator[Check]:
    for name, graph in _graphs():
        path = folder / f"{name.replace(' ', '_')}{suffix}"
        yield f"gives back {name}", lambda graph=graph, path=path: _round_trip(reader, writer, graph, path)
    whole = folder / f"whole{suffix}"

    def spoilt(change: Callable[[bytes], bytes]) -> Path:
        writer(dict(_graphs())["a graph with ports"], whole)
        if not whole.is_file():
            raise InputError("the writer writes more than one file: check what becomes of damaged ones yourself")
        bad = folder / f"bad{suffix}"
        bad.write_bytes(change(whole.read_bytes()))
        return bad

    yield "refuses no file", lambda: _refuses(reader, folder / f"none{suffix}")
    yield "refuses an empty file", lambda: _refuses(reader, spoilt(lambda _: b""))
    yield "refuses half a file", lambda: _refuses(reader, spoilt(lambda raw: raw[: len(raw) // 2]))
    yield "refuses foreign bytes", lambda: _refuses(reader, spoilt(lambda _: bytes(range(256)) * 4))


def _graphs() -> list[tuple[str, AttributionGraph]]:
    """Graphs of whole components with scores of either sign, about half of their edges kept."""
    made = []
    for name, ports, options in (
        ("a graph without ports", False, {}),
        ("a graph with ports", True, {}),
        ("a parallel model", True, {"parallel": True}),
        ("an attention-only model", True, {"attn_only": True}),
    ):
        index = component_index(n_layers=2, n_heads=2, **options)
        ends = [(s, t) for s, t in product(index.names, index.names) if index.may_feed(s, t)]
        edges = {(s, t, port): 0.0 for s, t in ends for port in (("q", "k", "v") if ports and t[0] == "a" else ("",))}
        generator = torch.Generator().manual_seed(len(edges))
        scores = torch.randn(len(edges), generator=generator).float().tolist()
        made.append((name, AttributionGraph.from_edges(index, dict(zip(edges, scores))).threshold(0.6)))
    return [*made, ("an empty circuit", made[1][1].top_k(0))]


def _round_trip(reader: Any, writer: Any, graph: AttributionGraph, path: Path) -> None:
    columns = [getattr(graph, name).clone() for name in ("source", "target", "port", "score", "kept")]
    writer(graph, path)
    names = ("source", "target", "port", "score", "kept")
    unchanged = all(torch.equal(old, getattr(graph, name)) for old, name in zip(columns, names))
    _expect(unchanged, "writing has changed the graph")
    again = reader(path)
    _expect(isinstance(again, AttributionGraph), f"the reader gives a {type(again).__name__}")
    _expect(again.kept_edges() == graph.kept_edges(), "other edges are kept")
    wanted, found = graph.pair_scores(), again.pair_scores()
    for edge in graph.kept_edges():
        _expect(abs(found[edge] - wanted[edge]) <= 1e-6 * wanted[edge], f"{'->'.join(edge)} has another score")


def _refuses(reader: Any, path: Path) -> None:
    try:
        reader(path)
    except FormatError:
        return
    raise CheckFailure("it was read, where FormatError is expected")


# ---- methods --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Case:
    model: Any
    clean: Tensor
    corrupted: Tensor
    metric: Callable[[Tensor, Tensor], Tensor]


def check_method(method: Callable[..., AttributionGraph], model: Any = None, **options: Any) -> tuple[str, ...]:
    """Can this method stand in `baselines.METHODS`, the benchmark and `compare`?

    It is called as `method(model, clean, corrupted, metric, **options)` with tokens and a metric `(logits, rows) -> sum
    over rows`, on the bundled model unless one is given. Checked: it gives a graph of the model's components, with
    finite scores, the same twice; the model is left as it was; its provenance counts forward and backward passes.

    Raises
    ------
    CheckFailure: names every check that failed.

    >>> import tl_circuitlasso as tcl
    >>> len(check_method(tcl.baselines.eap)) > 3
    True
    """
    return _run(getattr(method, "__name__", "the method"), _method_checks(method, _case(model), options))


def _case(model: Any) -> _Case:
    if model is None:
        demo = load_demo(prompts=PROMPTS)
        model, clean, corrupted = demo.model, demo.tokens, demo.corrupted
    else:
        clean = _random_tokens(adapt(model))
        corrupted = clean.flip(0)
    wanted = clean[:, -1]

    def metric(logits: Tensor, rows: Tensor) -> Tensor:
        last = logits[:, -1]
        return (last.gather(1, wanted[rows].to(last.device)[:, None] % last.shape[1])).sum()

    return _Case(model, clean, corrupted, metric)


def _method_checks(method: Callable[..., AttributionGraph], case: _Case, options: dict[str, Any]) -> Iterator[Check]:
    found: list[AttributionGraph] = []

    def call() -> AttributionGraph:
        return method(case.model, case.clean, case.corrupted, case.metric, **options)

    def first() -> None:
        graph = call()
        _expect(isinstance(graph, AttributionGraph), f"it gives a {type(graph).__name__}")
        check_graph(graph, adapt(case.model))
        found.append(graph)

    before = _state(case.model)
    yield "gives a graph of the model", first
    if not found:
        return
    graph = found[0]
    yield "finite scores", lambda: _expect(bool(graph.score.isfinite().all()), "NaN or infinite scores")
    yield "same again", lambda: _expect(_equal(call(), graph), "a second call gives other scores or edges")
    yield "leaves the model as it was", lambda: _expect(_state(case.model) == before, "weights, mode or hooks changed")
    yield "counts its passes", lambda: _counts(graph)


def _equal(a: AttributionGraph, b: AttributionGraph) -> bool:
    return len(a) == len(b) and torch.equal(a.kept, b.kept) and torch.allclose(a.score, b.score, rtol=1e-5, atol=1e-9)


def _counts(graph: AttributionGraph) -> None:
    missing = [name for name in ("forward_passes", "backward_passes") if name not in graph.provenance]
    _expect(not missing, f"its provenance has no {' and '.join(missing)}")
