"""What is tried on a model whose two layers lie on two devices: `apart_from_one` says for each run by name how far its
result is from that of one device, or what went wrong.

Derivatives run on the CPU and one make-believe card: PyTorch's engine knows of no second one. All else runs on two.
"""

import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

import tl_circuitlasso as tcl
from tests import architectures
from tests.card import NAME, card
from tests.card_runs import last_logits
from tl_circuitlasso import baselines, evaluate

Run = Callable[[Any, Any], Any]  # of a model and a graph

TWO_CARDS = (f"{NAME}:0", f"{NAME}:1")
WITH_CPU = ("cpu", f"{NAME}:0")
TOKENS = architectures.prompts(batch=8)
OTHERS = architectures.prompts(batch=8, seed=1)
DIFFERENCE = tcl.LogitDiff(torch.full((8,), 1), torch.full((8,), 2))
ENDS = ("norm", "ln_f", "final_layer_norm")  # what stands behind the last layer in a Hugging Face model


def circuit(**options: Any) -> Run:
    return lambda model, graph: tcl.circuit_lasso(model, TOKENS, progress=False, **options)


def scored(name: str, **options: Any) -> Run:
    method = getattr(baselines, name)
    return lambda model, graph: method(model, TOKENS, OTHERS, last_logits, progress=False, **options)


def judged(ablation: str, **options: Any) -> Run:
    given = TOKENS, OTHERS, last_logits, ablation
    return lambda model, graph: evaluate.faithfulness(model, graph, *given, progress=False, **options)


RUNS: dict[str, Run] = {
    "read": circuit(),
    "read, pairs": circuit(corrupted=OTHERS, target=DIFFERENCE, positions="last"),
    "read, labels": circuit(target=tcl.Labels(TOKENS[:, -1] % 2)),
    "lasso+confirm": circuit(method="lasso+confirm", corrupted=OTHERS, target=DIFFERENCE, budget=2),
    **{f"faithfulness, {ablation}": judged(ablation) for ablation in ("patch", "mean", "zero")},
    **{f"eap_ig, {ablation}": scored("eap_ig", steps=2, ablation=ablation) for ablation in ("patch", "mean")},
    "eap": scored("eap"),
    "clean_corrupted": scored("clean_corrupted"),
}
DERIVATIVES = ("eap", "eap_ig, patch", "eap_ig, mean", "clean_corrupted")
REFUSED: dict[str, Run] = {
    "activation": circuit(design="activation"),
    "neurons": circuit(basis="neuron", corrupted=OTHERS, target=DIFFERENCE),
    "optimal": judged("optimal"),
    "relp": scored("relp"),
    "steer": lambda model, graph: evaluate.steer(model, graph, None, 2.0, TOKENS, last_logits, other=OTHERS),
    "device": circuit(device="cpu"),
}


# ---- models on two devices ------------------------------------------------------------------------------------------


def hooked_on(family: str, places: tuple[str, str]) -> Any:
    """As TransformerLens means `n_devices`: layers dealt out in order, the ends with their neighbours."""
    model = architectures.hooked(family)
    torch.nn.Module.to(model, torch.device(places[0]))
    for part in (model.blocks[1], getattr(model, "ln_final", None), model.unembed):
        if part is not None:
            torch.nn.Module.to(part, torch.device(places[1]))
    model.cfg.device, model.cfg.n_devices = places[0], 2
    return model


def bridge_on(family: str, places: tuple[str, str]) -> Any:
    """A bridge over a Hugging Face model that accelerate has dispatched, as `device_map` does."""
    from accelerate import dispatch_model

    model = architectures.hugging_face(family)
    options = {"main_device": places[0], "force_hooks": True}
    placed = dispatch_model(model, device_map=dict(_device_map(model, places)), **options)
    return architectures._bridge_class().boot_transformers(
        "local", hf_model=placed, tokenizer=architectures.tokenizer()
    )


def _device_map(model: Any, places: tuple[str, str]) -> Iterator[tuple[str, str]]:
    base = model.base_model_prefix
    for name, child in getattr(model, base).named_children():
        if isinstance(child, torch.nn.ModuleList):
            yield from ((f"{base}.{name}.{layer}", place) for layer, place in enumerate(places))
        else:
            yield f"{base}.{name}", places[name in ENDS]
    yield from ((name, places[1]) for name, _ in model.named_children() if name != base)


MAKERS = {"hooked": (architectures.hooked, hooked_on), "bridge": (architectures.bridge, bridge_on)}


# ---- comparing ------------------------------------------------------------------------------------------------------


def difference(ours: Any, theirs: Any) -> float:
    """The largest difference of two results beside their largest figure; infinite where other edges are kept."""
    if not isinstance(ours, tcl.AttributionGraph):
        return abs(ours.faithfulness - theirs.faithfulness)
    if not torch.equal(ours.kept, theirs.kept) or not torch.equal(ours.source, theirs.source):
        return float("inf")
    return float((ours.score - theirs.score).abs().max() / theirs.score.abs().max())


def _quiet() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")


def apart_from_one(kind: str, family: str, *names: str) -> dict[str, float | str]:
    """For a process of its own, which is changed: of each run the difference, or what went wrong."""
    _quiet()
    whole, spread = MAKERS[kind]
    found: dict[str, float | str] = {}
    with card():  # before the first derivative: PyTorch counts its devices then
        for name in names:
            model = whole(family)
            graph = scored("eap", steps=1)(model, None).top_k(10)
            try:
                run, places = RUNS[name], WITH_CPU if name in DERIVATIVES else TWO_CARDS
                found[name] = difference(run(spread(family, places), graph), run(model, graph))
            except Exception as error:  # whatever goes wrong is what this is for
                last = traceback.extract_tb(error.__traceback__)[-1]
                found[name] = f"{type(error).__name__}: {str(error)[:300]} ({last.filename}:{last.lineno})"
    return found


def refusals(*names: str) -> dict[str, str]:
    """What is said where a spread model can't be followed."""
    _quiet()
    said = {}
    with card():
        graph = scored("eap")(architectures.hooked("gpt2"), None).top_k(10)
        for name in names or REFUSED:
            try:
                REFUSED[name](hooked_on("gpt2", TWO_CARDS), graph)
                said[name] = "nothing"
            except tcl.ModelError as error:
                said[name] = str(error)
    return said


def misplaced() -> str:
    """What is said of a model whose unembedding TransformerLens has put beside the first layer, as it may."""
    _quiet()
    with card():
        model = hooked_on("gpt2", TWO_CARDS)
        torch.nn.Module.to(model.unembed, torch.device(TWO_CARDS[0]))
        try:
            tcl.circuit_lasso(model, TOKENS, progress=False)
        except tcl.ModelError as error:
            return str(error)
    return "nothing"


def held_apart() -> dict[str, set[str]]:
    """On which devices activations of each layer are during a sweep, and what is read of them."""
    from tl_circuitlasso.models import adapt

    _quiet()
    with card():
        adapter = adapt(hooked_on("gpt2", TWO_CARDS), spread=True)
        keys = ["resid_pre.0", "z.0", "pattern.1", "mlp_out.1", "resid_post.1", "logits"]
        stay = adapter.run(TOKENS, None, keys, gathered=False)
        come = adapter.run(TOKENS, None, keys)
        return {
            "first": {str(stay[key].device) for key in keys[1:2]},
            "second": {str(stay[key].device) for key in keys[2:4]},
            "ends": {str(stay[key].device) for key in (keys[0], *keys[4:])},
            "gathered": {str(value.device) for value in come.values()},
        }
