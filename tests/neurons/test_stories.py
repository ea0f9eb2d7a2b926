"""Subject-verb agreement in a real small language model: neurons found on some pairs of prompts, judged on others."""

import pytest
import torch

import tl_circuitlasso as tcl
from tests.helpers import shared_folder
from tl_circuitlasso.models.loading import load_model

STARTS = ("Tim said that", "Lily saw that", "Mom said that", "In the park,", "At home,", "After that,", "Tim saw that")
SIZES = (10, 100, 400, 860)


@pytest.fixture(scope="module")
def stories():
    return load_model(str(shared_folder("models", "stories260K")))


def both_ways(pairs, answers):
    """Every pair in both directions: prompts, partners, and the metric of their answers."""
    right = [answers[0]] * len(pairs) + [answers[1]] * len(pairs)
    clean, corrupted = torch.cat([pairs[:, 0], pairs[:, 1]]), torch.cat([pairs[:, 1], pairs[:, 0]])
    return clean, corrupted, tcl.evaluate.logit_diff(right, right[::-1]), tcl.LogitDiff(right, right[::-1])


def test_half_of_the_neurons_are_the_model_on_pairs_they_were_not_found_on(stories):
    rows = [(f"{start} {one}", f"{start} they") for start in STARTS for one in ("he", "she", "it")]
    tokens = [[stories.to_tokens(text)[0] for text in row] for row in rows]
    pairs = torch.stack([torch.stack(pair) for pair in tokens if len(pair[0]) == len(pair[1]) == 5])
    answers = [int(stories.to_tokens(word, prepend_bos=False)[0, 0]) for word in ("was", "were")]
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))
    cut = len(pairs) * 2 // 3
    clean, corrupted, metric, target = both_ways(pairs[order[:cut]], answers)
    graphs = {
        "ours": tcl.circuit_lasso(
            stories, clean, corrupted=corrupted, basis="neuron", design="read", target=target, progress=False
        ),
        "RelP": tcl.baselines.relp(stories, clean, corrupted, metric, progress=False),
        "random": tcl.baselines.random_nodes(stories),
    }
    *held_out, judge, _ = both_ways(pairs[order[cut:]], answers)
    options = {"mean_over": "corrupted", "sizes": SIZES, "progress": False}
    curves = tcl.evaluate.curves(stories, graphs, *held_out, judge, "mean", **options)
    found = {name: dict(zip(SIZES, curve.faithfulness)) for name, curve in curves.items()}
    assert all(curve[860] == pytest.approx(1.0, abs=1e-3) for curve in found.values())
    for name in ("ours", "RelP"):
        assert found[name][400] > 0.85 and found[name][100] > 0.5 > found["random"][400]
        assert found[name][10] > 0.25 > abs(found["random"][100])
