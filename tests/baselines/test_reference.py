"""The baselines against saved outputs of the real EAP-IG package (four models, float32 and float64)."""

import json
from functools import lru_cache
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers import shared_folder, to_matrix
from tl_circuitlasso import baselines
from tl_circuitlasso.baselines.edges import EdgeLayout
from tl_circuitlasso.models import adapt
from tl_circuitlasso.models.build import build_hooked_transformer

MODELS = ("A_gpt2", "B_llama", "C_pythia", "D_interpbench13")
PRECISIONS = {"f32": ("float32", 1e-5), "f64": ("float64", 1e-9)}


@lru_cache(maxsize=1)
def loaded(name: str, precision: str) -> tuple[Any, dict, dict]:
    folder = shared_folder("reference", name)
    config = json.loads((folder / "config.json").read_text())["hooked_transformer_config"]
    dtype = PRECISIONS[precision][0]
    weights = {key: w.to(getattr(torch, dtype)) for key, w in load_file(folder / "model.safetensors").items()}
    model = build_hooked_transformer({**config, "dtype": dtype}, weights)
    return model, load_file(folder / "tokens.safetensors"), load_file(folder / "scores.safetensors")


def logit_difference(labels: torch.Tensor) -> Any:
    def metric(logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        wanted = labels[rows]
        return (logits[:, -1].gather(1, wanted[:, :1]) - logits[:, -1].gather(1, wanted[:, 1:])).sum()

    return metric


def compared(method: Any, theirs: str, name: str, precision: str, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Our matrix and the saved one, both divided by the saved one's largest entry."""
    model, tokens, scores = loaded(name, precision)
    if f"{precision}/{theirs}" not in scores:
        pytest.skip(f"the package has no {theirs} for {name}")
    corrupted = tokens["clean"] if options.get("ablation") == "mean" else tokens["corrupted"]
    graph = method(model, tokens["clean"], corrupted, logit_difference(tokens["labels"]), **options)
    shape = adapt(model).shape
    assert torch.equal(EdgeLayout(shape).mask(), scores["real_edge_mask"].bool())
    reference = scores[f"{precision}/{theirs}"].double()
    largest = reference.abs().max()
    return to_matrix(graph, shape) / largest, reference / largest


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("method", "theirs", "options"),
    [
        (baselines.eap, "EAP", {}),
        (baselines.eap, "EAP.zero", {"ablation": "zero"}),
        (baselines.eap, "EAP.mean-positional", {"ablation": "mean"}),
        (baselines.eap_ig, "EAP-IG-inputs", {}),
        (baselines.clean_corrupted, "clean-corrupted", {}),
        (baselines.information_flow_routes, "information-flow-routes", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_scores_equal_the_packages(method, theirs, options, name, precision):
    ours, reference = compared(method, theirs, name, precision, **options)
    assert (ours - reference).abs().max() < PRECISIONS[precision][1]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["A_gpt2", "B_llama"])
def test_exact_patching_equals_the_packages(name, precision):
    ours, reference = compared(baselines.exact, "exact", name, precision, batch_size=480)
    assert (ours - reference).abs().max() < PRECISIONS[precision][1]


@pytest.mark.parametrize(("name", "precision"), [("A_gpt2", "f32"), ("A_gpt2", "f64"), ("D_interpbench13", "f64")])
def test_integration_over_activations_equals_the_packages(name, precision):
    ours, reference = compared(baselines.eap_ig_activations, "EAP-IG-activations", name, precision)
    assert (ours - reference).abs().max() < PRECISIONS[precision][1]


@pytest.mark.parametrize(("name", "only_embedding"), [("B_llama", ()), ("C_pythia", (12,))])
def test_integration_over_activations_keeps_what_the_package_loses_on_rotary_models(name, only_embedding):
    """Layer-0 readers that see nothing but the replaced embedding get a derivative here, none there."""
    ours, reference = compared(baselines.eap_ig_activations, "EAP-IG-activations", name, "f64")
    differs = ((ours - reference).abs() > 1e-9).nonzero().tolist()
    layer_0_heads = 12  # q, k and v of four heads
    assert {source for source, _ in differs} == {0}
    assert {reader for _, reader in differs} == {*range(layer_0_heads), *only_embedding}
    assert 0.15 < (ours - reference).abs().max() < 0.35


@pytest.mark.parametrize(("method", "theirs"), [("eap", "node.EAP"), ("eap_ig", "node.EAP-IG-inputs")])
def test_node_scores_equal_the_packages_but_for_mlps(method, theirs):
    """The package takes an MLP's derivative at its input; here it's that of its output."""
    model, tokens, scores = loaded("A_gpt2", "f64")
    metric = logit_difference(tokens["labels"])
    ours = baselines.node_scores(model, tokens["clean"], tokens["corrupted"], metric, method=method)
    reference = dict(zip(ours, scores[f"f64/{theirs}"].tolist()))
    largest = max(map(abs, reference.values()))
    wrong = {node for node in ours if abs(ours[node] - reference[node]) > 1e-9 * largest}
    assert wrong == {"m0", "m1"}


def test_scores_do_not_depend_on_the_batch_size():
    model, tokens, _ = loaded("B_llama", "f64")
    metric = logit_difference(tokens["labels"])
    shape = adapt(model).shape
    for method in (baselines.eap, baselines.information_flow_routes):
        whole, single = (
            to_matrix(method(model, tokens["clean"], tokens["corrupted"], metric, batch_size=size), shape)
            for size in (24, 7)
        )
        assert (whole - single).abs().max() < 1e-12 * whole.abs().max()


def test_passes_are_counted_per_prompt():
    model, tokens, _ = loaded("A_gpt2", "f32")
    metric = logit_difference(tokens["labels"])
    made = baselines.eap_ig(model, tokens["clean"], tokens["corrupted"], metric, batch_size=7).provenance
    assert (made["forward_passes"], made["backward_passes"]) == (6, 5)
    assert made["method"] == "eap_ig" and made["prompts"] == 24 and made["seconds"]["total"] > 0
