"""The benchmark on a real model: its prompts are what they claim to be, and its tables say what `evaluate` says."""

import contextlib
import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import real_model
from benchmarks.data import story_model
from benchmarks.real import makers, measure, methods, tasks, wording
from benchmarks.real.makers import Pair
from tests.helpers import shared_folder
from tl_circuitlasso import baselines, evaluate
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.models.adapter import adapt
from tl_circuitlasso.models.build import build_hooked_transformer

MEASURED, LEFT_OUT = ("ioi", "stories"), ("agreement", "capitals")  # stories260K knows no verb and no capital
METHODS = "lasso,lasso-pairs,eap,random"


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any], Path]:
    """What the short form prints and writes."""
    shared_folder("models", "stories260K")
    folder, printed = tmp_path_factory.mktemp("rehearsal"), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
        files = ["--json", str(folder / "all.json"), "--plot", str(folder / "curves.svg")]
        assert real_model.main(["--rehearse", "--threads", "1", "--methods", METHODS, *files]) == 0
    return printed.getvalue(), json.loads((folder / "all.json").read_text()), folder / "curves.svg"


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def names_of(figures: dict[str, Any]) -> set[str]:
    """The methods that there are figures of: all, but for those that say why they were left out."""
    every = {method.name for method in methods.chosen(METHODS)}
    assert set(figures["left_out"]) <= {"CircuitLasso, contrast pairs"}
    assert all(len(reason) > 20 for reason in figures["left_out"].values())
    return every - set(figures["left_out"])


@pytest.mark.slow
def test_every_method_has_its_rows(rehearsed) -> None:
    printed, whole, _ = rehearsed
    assert [one["task"] for one in whole["tasks"]] == list(MEASURED) and set(whole["left_out"]) == set(LEFT_OUT)
    assert all(f"## {name}\n\nleft out: `{name}` has no prompt" in printed for name in LEFT_OUT)
    rows = [tuple(cells(line)) for line in printed.splitlines() if line.startswith("| ")]
    for figures in whole["tasks"]:
        names = names_of(figures)
        part = printed[printed.index(f"## {figures['task']}\n") :]
        for name in names:
            assert len([row for row in rows if row[2:3] == (name,)]) == len(MEASURED) * 3 * 2
            assert part.count(f"\n| {name} |") >= 3, "circuits, stability and cost have a row of each method"
        for kind in ("circuits", "stability", "spent"):
            assert set(figures[kind]) == names
        assert set(figures["curves"]) == set(measure.ABLATIONS)


@pytest.mark.slow
def test_cpr_stands_beside_cmd(rehearsed) -> None:
    printed, whole, picture = rehearsed
    headers = [cells(line) for line in printed.splitlines() if line.startswith("| ") and "CPR" in line]
    assert len(headers) == len(MEASURED)
    assert all(header[header.index("CPR") + 1] == "CMD" for header in headers)
    for figures in whole["tasks"]:
        for rankings in figures["curves"].values():
            assert all({"cpr", "cmd"} <= set(curve) for curves in rankings.values() for curve in curves.values())
    drawn = picture.read_text()
    assert "<svg" in drawn and drawn.count("CPR") == drawn.count("CMD")


@pytest.mark.slow
def test_curves_and_circuits_are_what_faithfulness_says(rehearsed) -> None:
    _, whole, _ = rehearsed
    model = story_model()
    task = tasks.task(model, "ioi", prompts=6)
    graph = baselines.eap(model, task.clean, task.corrupted, evaluate.logit_diff(task.correct, task.incorrect))
    figures = whole["tasks"][0]
    curves = {ranking: figures["curves"]["patch"][ranking]["EAP"] for ranking in measure.RANKINGS}
    order = graph.score.argsort(descending=True, stable=True)
    for place in (3, 5, 6):
        count = curves["|score|"]["requested"][place]
        signed = graph.keep(torch.zeros_like(graph.kept).index_fill(0, order[:count], True))
        for ranking, circuit in (("|score|", measure.strongest(graph, count)), ("signed score", signed)):
            found = evaluate.faithfulness(model, circuit, task.clean, task.corrupted, task.metric)
            assert curves[ranking]["faithfulness"][place] == pytest.approx(found.faithfulness, abs=1e-4)
    own = figures["circuits"]["EAP"]
    circuit = measure.strongest(graph, own["edges"])
    found = evaluate.faithfulness(model, circuit, task.clean, task.others(0), task.metric)
    assert own["faithfulness"]["resample"][0] == pytest.approx(found.faithfulness, abs=1e-4)
    assert own["edges"] == figures["circuits"]["CircuitLasso"]["edges"] and not own["own"]


def test_scores_of_half_samples_are_means_of_single_prompts() -> None:
    shared_folder("models", "stories260K")
    model = story_model()
    task = tasks.task(model, "stories", prompts=6)
    halves = measure.half_samples(6, 4, seed=0)
    assert all(len(set(rows.tolist())) == 3 for rows in halves)
    layout = measure.EdgeLayout(adapt(model).shape)
    added, _ = measure._additive(model, methods.METHODS["eap-ig"], task, halves, layout, 0)
    rerun, _ = measure._rerun(model, methods.METHODS["eap-ig"], task, halves, layout, 0)
    for one, other in zip(added, rerun):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5 * float(other.abs().max()))


def test_agreement_is_the_mean_jaccard_of_pairs() -> None:
    found = measure.agreement(torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [1, 0, 1, 0]], dtype=torch.bool))
    assert (found.mean, found.least) == (pytest.approx((1 / 2 + 1 / 3 + 1 / 2) / 3), pytest.approx(1 / 3))
    assert measure.agreement(torch.zeros(3, 5, dtype=torch.bool)).mean != 1.0  # no circuit agrees with nothing


# ---- prompts --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wordy(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A random model to which every word of the tasks is one token, "Ruth" and "Texas" apart."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    splitter = pre_tokenizers.Whitespace()
    texts = [*wording.INDIRECT_OBJECT, *wording.CAPITAL, *wording.NAMES, *wording.PLACES, *wording.THINGS]
    texts += [
        *wording.PRONOUN,
        *wording.OPPOSITE,
        *wording.PLURAL,
        *wording.LANGUAGE,
        *wording.SEQUENCE,
        "List: he she",
    ]
    texts += [
        word for row in (*wording.PEOPLE, *wording.OPPOSITES, *wording.LANGUAGES, *wording.ORDERS) for word in row
    ]
    texts += [form for word in wording.COUNTED for form in (word, f"{word}s")]
    texts += [shared_folder("datasets", "sva", name).read_text() for name in makers.AGREEMENT.values()]
    texts += [shared_folder("datasets", "capitals", "city_state_capital.csv").read_text()]
    words = {word for text in texts for word, _ in splitter.pre_tokenize_str(text)} - {"Texas"}
    vocabulary = {word: number for number, word in enumerate(["<bos>", "<unk>", "the", *sorted(words - {"the"})])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = splitter
    folder = tmp_path_factory.mktemp("tokenizer")
    special = {"bos_token": "<bos>", "unk_token": "<unk>", "pad_token": "<bos>", "eos_token": "<bos>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    config = {
        "n_layers": 1, "n_heads": 2, "d_model": 16, "d_head": 8, "d_mlp": 32, "d_vocab": len(vocabulary), "n_ctx": 32,
        "act_fn": "gelu_new", "normalization_type": "LN", "seed": 0, "init_weights": True, "initializer_range": 0.5,
    }  # fmt: skip
    model = build_hooked_transformer(config, {}, random_weights=True)
    model.set_tokenizer(AutoTokenizer.from_pretrained(folder), default_padding_side="right")
    return model


def text(model: Any, tokens: torch.Tensor) -> str:
    return " ".join(model.tokenizer.convert_ids_to_tokens(tokens.tolist()))


@pytest.mark.parametrize("name", [name for name in tasks.TASKS if name != "stories"])
@pytest.mark.parametrize("split", wording.SPLITS)
def test_only_prompts_that_the_model_gets_right_are_kept(wordy, name: str, split: str) -> None:
    task = tasks.task(wordy, name, prompts=20, split=split, seed=1)
    assert task.clean.shape == task.corrupted.shape and len(task) == 20 < task.looked_at
    last = wordy(task.clean)[:, -1]
    assert bool((last.gather(1, task.correct[:, None]) > last.gather(1, task.incorrect[:, None])).all())
    again, other = (tasks.task(wordy, name, prompts=20, split=split, seed=seed) for seed in (1, 2))
    assert torch.equal(task.clean, again.clean) and not torch.equal(task.clean, other.clean)


@pytest.mark.parametrize("third", [False, True])
def test_the_second_subject_alone_is_replaced(wordy, third: bool) -> None:
    task = tasks.task(wordy, "ioi", prompts=20, third=third)
    changed = task.clean != task.corrupted
    assert changed.sum(1).tolist() == [1] * 20
    assert torch.equal(task.clean[changed], task.incorrect)  # the subject's name was there
    answers = task.corrupted[changed] == task.correct
    assert bool(answers.all()) if not third else not bool(answers.any())
    for prompt, right, wrong in zip(task.clean, task.correct, task.incorrect):
        assert (prompt == right).sum() == 1 and (prompt == wrong).sum() == 2


def test_held_out_prompts_share_no_name_and_no_template_with_seen_ones(wordy) -> None:
    seen, held_out = (tasks.task(wordy, "ioi", prompts=40, split=split) for split in wording.SPLITS)
    names = [set(torch.cat([task.correct, task.incorrect]).tolist()) for task in (seen, held_out)]
    assert not names[0] & names[1]
    starts = [{text(wordy, prompt[:2]) for prompt in task.clean} for task in (seen, held_out)]
    assert starts[0] == {"<bos> When", "<bos> After", "<bos> Then", "<bos> While"} and not starts[0] & starts[1]


def test_subjects_change_their_number_and_states_their_name(wordy) -> None:
    number = tasks.task(wordy, "agreement", prompts=10)
    verbs = {text(wordy, pair) for pair in torch.stack([number.correct, number.incorrect], 1)}
    assert verbs <= {f"{a} {b}" for one in ("is are", "has have", "does do", "goes go") for a, b in both_ways(one)}
    assert (number.clean != number.corrupted).sum(1).tolist() == [1] * 10
    state = tasks.task(wordy, "capitals", prompts=10)
    prompt = text(wordy, state.clean[0])
    assert prompt.startswith("<bos> The") and prompt.endswith("is") and "<unk>" not in prompt


def test_repeats_change_the_word_that_follows(wordy) -> None:
    task = tasks.task(wordy, "repeats", prompts=10)
    assert (task.clean != task.corrupted).sum(1).tolist() == [1] * 10
    for prompt, right in zip(task.clean.tolist(), task.correct.tolist()):
        assert prompt[-3:] == prompt[prompt.index(right) - 3 : prompt.index(right)]


@pytest.mark.parametrize(
    ("name", "table"),
    [("opposites", wording.OPPOSITES), ("languages", wording.LANGUAGES), ("pronouns", zip(*wording.PEOPLE))],
)
def test_each_word_has_its_own_answer(wordy, name: str, table: Any) -> None:
    task = tasks.task(wordy, name, prompts=10)
    pairs = {frozenset(pair) for pair in table}
    for prompt, answer in zip(task.clean, task.correct):
        words = set(text(wordy, prompt).split())
        if name == "pronouns":
            men = {min(pair & set(wording.PEOPLE[0])) for pair in pairs}
            assert text(wordy, answer[None]) == ("he" if words & men else "she")
        else:
            assert any(text(wordy, answer[None]) in pair and words & pair for pair in pairs)


def both_ways(pair: str) -> Iterator[tuple[str, str]]:
    one, other = pair.split()
    return iter([(one, other), (other, one)])


def test_a_word_of_several_tokens_is_no_answer(wordy) -> None:
    adapter = adapt(wordy)
    assert makers.word_id(adapter, "Mary") == wordy.tokenizer.convert_tokens_to_ids("Mary")
    assert makers.word_id(adapter, "New York") is None
    shared_folder("models", "stories260K")
    assert set(makers.single(adapt(story_model()), wording.NAMES)) == {"Tim", "Lily", "Timmy"}


def test_every_prompt_gets_another_one_to_take_activations_from(wordy) -> None:
    task = tasks.task(wordy, "ioi", prompts=20)
    others = task.others(seed=3)
    assert not bool((others == task.clean).all(1).any())
    assert sorted(map(tuple, others.tolist())) == sorted(map(tuple, task.clean.tolist()))
    with pytest.raises(InputError, match="`ablations` has 'noise'"):
        measure.ablated(task, "noise", 0)


def test_prompts_that_do_not_pair_up_are_refused(wordy) -> None:
    task = tasks.task(wordy, "ioi", prompts=4)
    refused = {
        "must be equal": {"corrupted": task.corrupted[:, 1:]},
        "prompt 2 and its counterpart are the same": {"corrupted": torch.cat([task.corrupted[:2], task.clean[2:]])},
        "answers to prompt 0 are the same": {"incorrect": task.correct},
    }
    for message, wrong in refused.items():
        with pytest.raises(InputError, match=message):
            replace(task, **wrong)
    uneven = [Pair([0, 3, 4], [0, 4, 4], 3, 4), Pair([0, 3], [0, 4], 3, 4)]
    with pytest.raises(InputError, match="of 2 and of 3 tokens"):
        tasks.gathered(adapt(wordy), "ioi", uneven, 2, "")
    hopeless = [Pair([0, 3], [0, 4], answer, answer) for answer in range(8)]
    with pytest.raises(InputError, match="gets 0 of 8 prompts right"):
        tasks.gathered(adapt(wordy), "ioi", hopeless, 2, "")
    uneven_twins = [("Mary went to", "Mary to", 3, 4)]
    with pytest.raises(InputError, match="no prompt of its counterpart's length"):
        makers._equal(adapt(wordy), "agreement", uneven_twins, "")


def test_the_most_frequent_length_is_used(wordy) -> None:
    texts = [("Mary went to", "John went to", 3, 4), ("Mary gave a", "John gave a", 4, 3), ("Mary to", "John to", 3, 4)]
    pairs, _ = makers._equal(adapt(wordy), "agreement", texts, "")
    assert [len(pair.clean) for pair in pairs] == [4, 4]


def test_what_there_is_not_is_named(wordy) -> None:
    for wrong, options in (("`name` is 'poems'", {}), ("`split` is 'new'", {"split": "new"})):
        with pytest.raises(InputError, match=wrong):
            tasks.task(wordy, "ioi" if options else "poems", prompts=2, **options)
    with pytest.raises(InputError, match="`methods` has 'acdc'"):
        methods.chosen("lasso,acdc")


def test_stories_have_another_story_with_another_answer() -> None:
    assert tasks._partners([5, 5, 7]) == [2, 2, 0]
    shared_folder("models", "stories260K")
    model = story_model()
    task = tasks.task(model, "stories", prompts=10, seed=4)
    logits = model(task.clean)[:, -1]
    assert torch.equal(logits.argmax(1), task.correct) and task.target is None and task.reference is not None
    assert float(task.metric(model(task.clean), torch.arange(10))) == pytest.approx(0.0, abs=1e-4)
    assert bool((task.correct != task.incorrect).all())
