"""Does zeroing the features of a concept make a classifier fair? Three tasks, with baselines, in one run.

    python -m benchmarks.train_saes --out DIR --hooks blocks.2.hook_resid_post
    python -m benchmarks.debias --sae DIR/blocks.2.hook_resid_post              stories260K, stories
    python -m benchmarks.debias --sae DIR/new --train blocks.8.hook_resid_post --model MODEL --task sva

"bios": biographies of accountants against other professions (class) by gender (concept). "sva": beginnings of sentences
with a subject in the singular or plural (class) and another noun before the verb that is either, too (concept).
"stories": TinyStories with an animal against those without (class), about a girl or a boy (concept), which a model of
that text can tell. The probe is trained where the two agree, and tested on equal numbers of all four groups.

With --train an SAE is trained, without labels, on the tokens of the task itself. --keep FILE holds the activations for
another run. Prints accuracies, the worst group, how far it comes from the original probe to the oracle, seconds of
ranking, spurious-correlation removal and targeted probe perturbation by number of features; means over splits.
"""

import argparse
import csv
import json
import re
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import tl_circuitlasso as tcl
from benchmarks.data import STORY_END, data_folder, story_model
from benchmarks.train_saes import Recipe, quality, train_sae
from tl_circuitlasso.apps.debias import debias_pooled
from tl_circuitlasso.apps.pooling import Tokens, pooled_tokens, token_activations
from tl_circuitlasso.models import adapt

BATCH = 256  # tokens a step of an SAE trained here: there are few
Task = tuple[torch.Tensor, torch.Tensor, list[int], list[int]]  # tokens, mask, class, concept


def biographies(model: Any, length: int, accountants: int) -> Task:
    """Whether each is about an accountant, and whether about a woman."""
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
    tokens, mask = padded(model, [rows[i]["hard_text"] for i in chosen], length)
    return tokens, mask, [classes[i] for i in chosen], [concept[i] for i in chosen]


def agreement(model: Any, length: int, count: int) -> Task:
    """ "The girl behind the tables": whether the subject is plural, and whether the other noun is."""
    path = data_folder("datasets", "sva", "nounpp_train.json")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    seen: dict[str, int] = {}
    for row in rows:
        seen[row["case"]] = row["number"] = seen.get(row["case"], 0) + 1
    some = [row for row in rows if row["number"] <= count]
    tokens, mask = padded(model, [row["clean_prefix"] for row in some], length)
    both = [[int(part == "plural") for part in row["case"].split("_")] for row in some]
    return tokens, mask, [one for one, _ in both], [other for _, other in both]


def padded(model: Any, texts: list[str], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """BOS and the first tokens of texts, padded on the right, and which of them are real."""
    tokenizer = model.tokenizer
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"][: length - 1] for text in texts]
    tokens = torch.full((len(ids), 1 + max(map(len, ids))), tokenizer.bos_token_id)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    for row, some in enumerate(ids):
        tokens[row, 1 : 1 + len(some)] = torch.tensor(some)
        mask[row, : 1 + len(some)] = True
    return tokens, mask


ANIMALS = ("dog", "cat", "bird", "bear", "rabbit", "fish", "duck", "frog", "mouse", "lion", "puppy", "kitten", "bunny")


def stories(model: Any, length: int, count: int) -> Task:
    """Whether the beginning of a story has an animal in it, and whether a girl rather than a boy."""
    text = data_folder("datasets", "tinystories", "train_part_cased.txt").read_text(encoding="utf-8")
    tokenizer = model.tokenizer
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


TASKS = {"stories": stories, "bios": biographies, "sva": agreement}


def activations(model: Any, hook: str, task: Task, keep: Path | None) -> Tokens:
    """The activations of all tokens, from the file `keep` where it is there, else written to it."""
    if keep is not None and keep.exists():
        found = load_file(keep)
        return Tokens(found["x"].float(), found["text"], len(task[0]))
    tokens, mask = task[:2]
    batches = [(tokens[i : i + 32], mask[i : i + 32]) for i in range(0, len(tokens), 32)]
    parts, first = [], 0
    for part in tqdm(token_activations(adapt(model), hook, batches), total=len(batches), unit="batch"):
        parts.append((part.x, part.text + first))
        first += part.texts
    x, text = (torch.cat(some) for some in zip(*parts))
    if keep is not None:
        save_file({"x": x.half(), "text": text}, keep)
    return Tokens(x, text, first)


def trained(tokens: Tokens, hook: str, recipe: Recipe, out: Path, name: str) -> None:
    """An SAE of the activations, written to `out`, and how good it is on the tenth of texts that it wasn't shown."""
    held = tokens.text % 10 == 0
    sae = train_sae(tokens.x[~held], hook, recipe, model_name=name)
    sae.save_inference_model(out)
    print("SAE on held-out texts:", {key: round(value, 4) for key, value in quality(sae, tokens.x[held]).items()})


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    pd.set_option("display.width", 200, "display.max_columns", 30)
    model = story_model(options.model)
    task = TASKS[options.task](model, options.length, options.texts)
    hook = options.train or str(tcl.load_sae(options.sae).cfg.metadata.hook_name)
    clock = time.perf_counter()
    tokens = activations(model, hook, task, options.keep)
    print(f"{tokens.texts} texts, {len(tokens.text)} tokens; forward passes {time.perf_counter() - clock:.1f} s")
    if options.train:
        recipe = replace(Recipe(batch=BATCH), **{key: getattr(options, key) for key in ("features", "active", "seed")})
        trained(tokens, hook, replace(recipe, tokens=options.epochs * len(tokens.x)), options.sae, "trained here")
    encoder = tcl.SAEFeatures({hook: tcl.load_sae(options.sae)}).encoders()[hook]
    clock = time.perf_counter()
    pooled = pooled_tokens(encoder, [tokens])
    print(f"codes {time.perf_counter() - clock:.1f} s")
    found = debias_pooled(pooled, *task[2:], splits=options.splits, strength=options.strength, seed=options.seed)
    print(found.summary.round(3).to_string(), "\n")
    spread = found.table.groupby("method", sort=False)["worst"].std()
    print("standard deviation of the worst group over splits:", spread.round(3).to_dict(), "\n")
    print("SCR\n", found.scr.round(3).to_string(), "\n\nTPP\n", found.tpp.round(3).to_string())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sae", type=Path, required=True, help="the folder of one SAE")
    parser.add_argument("--train", metavar="HOOK", help="train the SAE at this hook first, and write it to --sae")
    parser.add_argument("--keep", type=Path, help="a .safetensors file of activations, written, or read if it is there")
    parser.add_argument("--model", type=Path, help="the model's folder; default: stories260K")
    parser.add_argument("--length", type=int, default=128, help="of a text, in tokens; default %(default)s")
    parser.add_argument("--task", choices=TASKS, default="stories")
    parser.add_argument(
        "--texts", type=int, default=200, help="of each group (bios: accountants) at most; default %(default)s"
    )
    parser.add_argument("--splits", type=int, default=5)
    parser.add_argument("--strength", type=float, default=0.1, help="of lambda_max; default %(default)s")
    parser.add_argument("--features", type=int, default=1024, help="of an SAE trained here; default %(default)s")
    parser.add_argument("--active", type=int, default=16, help="of them per token; default %(default)s")
    parser.add_argument("--epochs", type=int, default=12, help="of its training; default %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    return parser


if __name__ == "__main__":
    sys.exit(main())
