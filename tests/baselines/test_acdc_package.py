"""ACDC against its own package: which edges it kept, and what each was worth when it was tried."""

import json
from pathlib import Path

import pytest
import torch

from tests.baselines.test_reference import loaded, logit_difference
from tl_circuitlasso import baselines

RUNS = json.loads((Path(__file__).parent / "golden" / "acdc.json").read_text())["runs"]


@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run['model']}, {run['metric']}")
def test_kept_edges_and_their_effects_equal_the_packages(run):
    model, tokens, _ = loaded(run["model"], "f64")
    clean, corrupted = (tokens[name][: run["prompts"]] for name in ("clean", "corrupted"))
    metric = None if run["metric"] == "kl" else logit_difference(tokens["labels"])
    found = baselines.acdc(model, clean, corrupted, metric, threshold=run["threshold"])
    every = found.edge_table()
    names = [f"{s}->{t}" + (f"<{p}>" if p else "") for s, t, p in zip(every.source, every.target, every.port)]
    effects = dict(zip(names, every.weight))
    kept = {name for name, inside in zip(names, every.kept) if inside}
    assert kept == on_paths(run["edges"]) and 0 < len(kept) < len(names)
    ours, theirs = (torch.tensor([side[name] for name in sorted(kept)]).double() for side in (effects, run["edges"]))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


def on_paths(edges):
    """The package leaves edges whose source nothing feeds; here they go."""
    some = {name: (name.split("->")[0], name.split("->")[1].split("<")[0]) for name in edges}
    while True:
        fed = {"input", *(target for _, target in some.values())}
        read = {"logits", *(source for source, _ in some.values())}
        left = {name: (source, target) for name, (source, target) in some.items() if source in fed and target in read}
        if left == some:
            return set(some)
        some = left
