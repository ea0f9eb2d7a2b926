"""Does zeroing the features of a concept make a classifier fair? Two tasks, with baselines, in one run.

    python -m benchmarks.train_saes --out DIR --hooks blocks.2.hook_resid_post
    python -m benchmarks.debias --sae DIR/blocks.2.hook_resid_post              stories260K, stories
    python -m benchmarks.debias --sae DIR/blocks.2.hook_resid_post --task bios

"bios": biographies of accountants against other professions (class) by gender (concept). "stories": TinyStories with an
animal against those without (class), about a girl or a boy (concept), which a model of that text can tell. The probe is
trained where the two agree, and tested on equal numbers of all four groups. Prints accuracies, the worst group, how far
it comes from the original probe to the oracle, seconds of ranking, and spurious-correlation removal by number of
features; means over splits.
"""

import argparse
import csv
import re
import sys
import time
from pathlib import Path

import pandas as pd
import torch

import tl_circuitlasso as tcl
from benchmarks.data import STORY_END, data_folder, story_model
from tl_circuitlasso.apps.debias import debias_pooled, pool
from tl_circuitlasso.models import adapt


def biographies(
    model: object, length: int, accountants: int
) -> tuple[torch.Tensor, torch.Tensor, list[int], list[int]]:
    """Tokens and mask, whether each is about an accountant, and whether about a woman."""
    path = data_folder("datasets", "bias_in_bios_small", "bios.csv")
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    classes = [int(row["profession"] == "accountant") for row in rows]
    concept = [int(row["gender"].lower() == "female") for row in rows]
    seen: dict[tuple[int, int], int] = {}
    chosen = []
    for number, group in enumerate(zip(classes, concept)):
        seen[group] = seen.get(group, 0) + 1
        if not group[0] or seen[group] <= accountants:
            chosen.append(number)
    tokenizer = model.tokenizer  # type: ignore[attr-defined]
    ids = [tokenizer(rows[i]["hard_text"], add_special_tokens=False)["input_ids"][: length - 1] for i in chosen]
    tokens = torch.full((len(ids), 1 + max(map(len, ids))), tokenizer.bos_token_id)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    for row, some in enumerate(ids):
        tokens[row, 1 : 1 + len(some)] = torch.tensor(some)
        mask[row, : 1 + len(some)] = True
    return tokens, mask, [classes[i] for i in chosen], [concept[i] for i in chosen]


ANIMALS = ("dog", "cat", "bird", "bear", "rabbit", "fish", "duck", "frog", "mouse", "lion", "puppy", "kitten", "bunny")


def stories(model: object, length: int, count: int) -> tuple[torch.Tensor, torch.Tensor, list[int], list[int]]:
    """The first tokens of stories, whether they have an animal in them, and whether a girl rather than a boy."""
    text = data_folder("datasets", "tinystories", "train_part_cased.txt").read_text(encoding="utf-8")
    tokenizer = model.tokenizer  # type: ignore[attr-defined]
    rows, classes, concept = [], [], []
    seen: dict[tuple[int, int], int] = {}
    for story in text.split(STORY_END):
        ids = tokenizer(story.strip(), add_special_tokens=False)["input_ids"][: length - 1]
        if len(ids) < length - 1:
            continue
        words = re.findall(r"[a-z]+", tokenizer.decode(ids).lower())
        she, he = (sum(words.count(one) for one in some) for some in (("she", "her", "girl"), ("he", "his", "boy")))
        group = (int(any(word.rstrip("s") in ANIMALS for word in words)), int(she > he))
        if min(she, he) or she == he or seen.get(group, 0) >= count:
            continue
        seen[group] = seen.get(group, 0) + 1
        rows.append([tokenizer.bos_token_id, *ids])
        classes.append(group[0])
        concept.append(group[1])
    tokens = torch.tensor(rows)
    return tokens, torch.ones_like(tokens, dtype=torch.bool), classes, concept


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    pd.set_option("display.width", 200, "display.max_columns", 30)
    model = story_model(options.model)
    adapter = adapt(model)
    sae = tcl.load_sae(options.sae)
    hook = str(sae.cfg.metadata.hook_name)
    make = biographies if options.task == "bios" else stories
    tokens, mask, classes, concept = make(model, options.length, options.texts)
    clock = time.perf_counter()
    encoder = tcl.SAEFeatures({hook: sae}).encoders()[hook]
    pooled = pool(adapter, encoder, [(tokens[i : i + 32], mask[i : i + 32]) for i in range(0, len(tokens), 32)])
    print(
        f"{len(tokens)} texts, {int(mask.sum())} tokens; forward passes and codes {time.perf_counter() - clock:.1f} s"
    )
    found = debias_pooled(pooled, classes, concept, splits=options.splits, strength=options.strength, seed=options.seed)
    print(found.summary.round(3).to_string(), "\n")
    spread = found.table.groupby("method", sort=False)["worst"].std()
    print("standard deviation of the worst group over splits:", spread.round(3).to_dict(), "\n")
    print("SCR\n", found.scr.round(3).to_string())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sae", type=Path, required=True, help="the folder of one SAE")
    parser.add_argument("--model", type=Path, help="the model's folder; default: stories260K")
    parser.add_argument("--length", type=int, default=128, help="of a text, in tokens; default %(default)s")
    parser.add_argument("--task", choices=("stories", "bios"), default="stories")
    parser.add_argument(
        "--texts", type=int, default=200, help="of each group (accountants) at most; default %(default)s"
    )
    parser.add_argument("--splits", type=int, default=5)
    parser.add_argument("--strength", type=float, default=0.1, help="of lambda_max; default %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    return parser


if __name__ == "__main__":
    sys.exit(main())
