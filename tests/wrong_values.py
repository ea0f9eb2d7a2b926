"""Wrong values thrown at public functions, as users do: without the shape checks that the tests run under."""

import inspect
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

import tl_circuitlasso as tcl
from tests import architectures
from tl_circuitlasso import baselines, evaluate, plot
from tl_circuitlasso.graph.nodes import component_index

TOKENS = architectures.prompts(batch=12)


def last(logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return (logits[:, -1, 3] - logits[:, -1, 4]).sum()


def calls(model: Any) -> Iterator[tuple[str, str, Callable[[], Any]]]:
    """What is called, the argument that the message must name, and the call."""
    for method in (tcl.circuit_lasso, tcl.collect_statistics):
        for name, value in ARGUMENTS:
            if method is tcl.collect_statistics and name in ONLY_RUN:
                continue
            yield (
                f"{method.__name__}({name}={value!r:.40})",
                f"`{name}`",
                lambda method=method, name=name, value=value: method(model, TOKENS, progress=False, **{name: value}),
            )
    graph = tcl.AttributionGraph.from_edges(
        component_index(n_layers=2, n_heads=4), {("input", "m0"): 1.0, ("m0", "logits"): 0.5}
    )
    for verb in (baselines.eap, baselines.eap_ig, baselines.exact):
        for name, value in SHARED:
            options = {"clean": TOKENS, "corrupted": TOKENS.flip(0), "metric": last, name: value}
            yield f"{verb.__name__}({name}={value!r:.40})", f"`{name}`", lambda verb=verb, o=options: verb(model, **o)
    for name, value in SHARED:
        options = {"clean": TOKENS, "corrupted": TOKENS.flip(0), "metric": last, name: value}
        for judge in (evaluate.faithfulness, evaluate.completeness, evaluate.curve, evaluate.minimality):
            yield (
                f"{judge.__name__}({name}={value!r:.40})",
                f"`{name}`",
                lambda judge=judge, o=options: judge(model, graph, **o),
            )
        yield (
            f"confirm({name}={value!r:.40})",
            f"`{name}`",
            lambda o=options: evaluate.confirm(model, graph, **o),
        )
    pairs = {"clean": TOKENS, "corrupted": TOKENS.flip(0), "metric": last}
    for verb in (evaluate.faithfulness, evaluate.curve, evaluate.smallest):
        yield f"{verb.__name__}(graph=None)", "`graph`", lambda verb=verb: verb(model, None, **pairs)
    for value in ("x", 3, [1, "a"], [0.5]):
        yield f"curve(sizes={value!r})", "`sizes`", lambda v=value: evaluate.curve(model, graph, **pairs, sizes=v)
    for value in (0, 2, "x", None, True, float("nan")):
        options: dict[str, Any] = {"method": "lasso+confirm", "corrupted": TOKENS.flip(0), "size": value or 0}
        yield f"circuit_lasso(size={value})", "`size`", lambda o=options: tcl.circuit_lasso(model, TOKENS, **o)
        yield f"smallest(share={value})", "`share`", lambda v=value: evaluate.smallest(model, graph, **pairs, share=v)
    for name, value in (("clean", TOKENS[:0]), ("corrupted", TOKENS[:5]), ("resamples", 1), ("seed", -1)):
        options = {**pairs, name: value}
        yield f"stability({name})", f"`{name}`", lambda o=options: evaluate.stability(baselines.eap, model, **o)
    for name, value in (("draws", -1), ("seed", -1), ("level", 1)):
        yield f"bootstrap({name})", f"`{name}`", lambda n=name, v=value: evaluate.bootstrap([1.0, 2.0], **{n: v})
    moments = tcl.solve.Moments(torch.eye(2), torch.ones(2, 1), torch.ones(1), 10)
    yield "ebic(strengths=[])", "`strengths`", lambda: tcl.solve.ebic(moments, strengths=[])
    yield from graph_calls(graph)
    yield from (
        (text, argument, call)
        for text, argument, call in (
            ("Labels([0, 10**9])", "`y`", lambda: tcl.Labels([0, 10**9])),
            ("Labels(None)", "`y`", lambda: tcl.Labels(None)),
            ("Values({})", "`y`", lambda: tcl.Values({})),
            ("LogitDiff([-1], [3])", "`correct`", lambda: tcl.LogitDiff([-1], [3])),
            ("LogitDiff(None, 3)", "`correct`", lambda: tcl.LogitDiff(None, 3)),
            ("logit_diff('a', [3])", "`correct`", lambda: evaluate.logit_diff("a", [3])),
            ("structure(graph, [])", "`true_edges`", lambda: evaluate.structure(graph, [])),
            ("structure(graph, None)", "`true_edges`", lambda: evaluate.structure(graph, None)),
        )
    )


def graph_calls(graph: tcl.AttributionGraph) -> Iterator[tuple[str, str, Callable[[], Any]]]:
    """The graph's own verbs, and pictures."""
    for value in ([("input", "m0")], [True], "all", 3, None, graph.score):
        yield f"keep({value!r:.40})", "`mask`", lambda value=value: graph.keep(value)
    for value in ("m0", 3, None):
        yield f"subgraph({value!r})", "`nodes`", lambda value=value: graph.subgraph(value)
    for value in (-1, 2.5, "3", None, True):
        yield f"top_k({value!r})", "`k`", lambda value=value: graph.top_k(value)
    for value in (-1, "3", None, float("nan")):
        yield f"threshold({value!r})", "`x`", lambda value=value: graph.threshold(value)
    yield "plot.flow(graph)", "`found`", lambda: plot.flow(graph)
    yield "plot.curves(graph)", "`named`", lambda: plot.curves(graph)
    yield "plot.strength_path([g, g])", "`graphs`", lambda: plot.strength_path([graph, graph])


ARGUMENTS: list[tuple[str, Any]] = [
    ("target", [1] * 12),
    ("target", last),
    ("target", "classes"),
    ("target", tcl.LogitDiff([3] * 5, [4] * 5)),
    ("basis", {"blocks.0.hook_resid_pre": object()}),
    ("basis", 3),
    ("basis", None),
    ("design", 3),
    ("design", None),
    ("strength", None),
    ("strength", [0.1]),
    ("strength", 1j),
    ("seed", None),
    ("seed", 2**70),
    ("seed", -1),
    ("seed", 0.5),
    ("batch_size", 8.0),
    ("batch_size", None),
    ("batch_size", "8"),
    ("batch_size", True),
    ("max_prompts", 0),
    ("max_prompts", 2.5),
    ("max_prompts", -3),
    ("positions", None),
    ("positions", 1.5),
    ("positions", {"last"}),
    ("positions", np.ones((12, 9))),
    ("attention_mask", "all"),
    ("attention_mask", [[1, 1]]),
    ("attention_mask", [[2] * 9] * 12),
    ("method", None),
    ("device", 3.5),
    ("nonlinear", "yes"),
    ("refined", "no"),
    ("checkpoint", 3),
]
ONLY_RUN = ("strength", "max_prompts", "method", "device", "refined")  # arguments of a whole run
SHARED: list[tuple[str, Any]] = [
    ("clean", None),
    ("clean", 3),
    ("clean", TOKENS.float()),
    ("clean", [TOKENS[0].tolist(), "w3"]),
    ("clean", torch.full((12, 40), 3)),
    ("corrupted", TOKENS[:5]),
    ("corrupted", TOKENS[:, :5]),
    ("corrupted", "w3 w4"),
    ("metric", None),
    ("metric", "logit-diff"),
    ("metric", [3] * 12),
    ("metric", tcl.LogitDiff([3] * 5, [4] * 5)),
    ("batch_size", 8.0),
    ("batch_size", None),
    ("batch_size", 0),
    ("attention_mask", [[2] * 9] * 12),
    ("attention_mask", torch.ones(12, 4)),
    ("ablation", None),
    ("ablation", "noise"),
    ("mean_over", 3),
    ("input_node", None),
]


ROOMS = ("apps", "baselines", "bench", "evaluate", "formats", "plot", "solve", "synthetic", "testing")


def nonsense() -> list[tuple[str, str, str, list[str]]]:
    """What every public function answers to an object that is nothing, in place of each of its arguments."""
    warnings.simplefilter("ignore")
    found = []
    for room in (None, *ROOMS):
        home = tcl if room is None else getattr(tcl, room)
        for name in dir(home):
            if inspect.isfunction(function := getattr(home, name)):
                found.append((f"{room}.{name}", *answer(function)))
    return found


def answer(function: Callable[..., Any]) -> tuple[str, str, list[str]]:
    """The error's kind and text, and the names that it may give."""
    parameters = inspect.signature(function).parameters.values()
    named = [one for one in parameters if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)]
    asked = [one.name for one in named if one.default is one.empty] or [one.name for one in named]
    try:
        function(**dict.fromkeys(asked, object()))
    except Exception as error:
        return type(error).__name__, str(error), asked
    return "nothing", "", asked


def answers() -> list[list[str]]:
    """What every call of the table answered, with the argument that it had to name."""
    warnings.simplefilter("ignore")
    model = architectures.small(architectures.tokenizer())
    found = []
    for text, argument, call in calls(model):
        try:
            call()
        except Exception as error:
            found.append([text, argument, type(error).__name__, str(error)])
        else:
            found.append([text, argument, "nothing", ""])
    return found
