"""Forty calls as a newcomer would type them, and what each one does.

    python -m benchmarks.natural_calls
    python -m benchmarks.natural_calls --only target

On the bundled model, with a tokenizer of its words. A call does what it says, or is refused by an error that names the
argument and says what to do; anything else is a fault, and the exit status is then 1.
"""

import argparse
import contextlib
import io
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

import tl_circuitlasso as tcl
from tl_circuitlasso.graph import AttributionGraph

WIDTH = 110  # characters of an answer that are printed


@dataclass(frozen=True)
class Call:
    """What is typed, what it is about, and for a call that should be refused a part of the message."""

    about: str
    code: str
    refused: str = ""


@dataclass(frozen=True)
class Answer:
    """What a call did: `refused` where it raised an error of the library's, `fault` where another one."""

    call: Call
    told: str
    refused: bool
    fault: bool
    seconds: float

    @property
    def as_expected(self) -> bool:
        """Whether it was done, or refused for the reason that was to be expected."""
        return not self.fault and self.refused == bool(self.call.refused) and self.call.refused in self.told


_FIND = "model.run_circuit_lasso(prompts, positions='last'"
CALLS = (
    Call("prompts", f"{_FIND})"),
    Call("prompts", "tcl.circuit_lasso(model, tokens, positions='last')"),
    Call("prompts", "tcl.circuit_lasso(model, tokens.numpy(), positions='last')"),
    Call("prompts", "tcl.circuit_lasso(model, table['prompt'], positions='last')"),
    Call("prompts", "tcl.circuit_lasso(model, (batch for batch in tokens.split(4)), positions='last')"),
    Call("prompts", "tcl.circuit_lasso(model, model.tokenizer(prompts), positions='last')"),
    Call("prompts", "tcl.circuit_lasso(model, prompts[0])", "one string"),
    Call("prompts", "tcl.circuit_lasso('gpt2', prompts)", "must be a HookedTransformer"),
    Call("target", f"{_FIND}, target=tcl.LogitDiff(' Mary', ' John'))"),
    Call("target", f"{_FIND}, target=tcl.LogitDiff(right, wrong))"),
    Call("target", f"{_FIND}, target=tcl.LogitDiff(table['right'], table['wrong']))"),
    Call("target", f"{_FIND}, target=tcl.LogitDiff([['Mary', 'Anna']] * len(prompts), wrong))"),
    Call("target", f"{_FIND}, target=tcl.LogitDiff(demo.correct[:, None], demo.incorrect.numpy()))"),
    Call("target", f"{_FIND}, target=tcl.LogitDiff('Mary Ann', 'John'))", "tokens"),
    Call("target", f"{_FIND}, target=tcl.LogitDiff(right[:3], wrong[:3]))", "3 entries"),
    Call("target", f"{_FIND}, target=right)", "`target`"),
    Call("target", f"{_FIND}, target=lambda logits: logits[:, -1].max())", "`target`"),
    Call("target", f"{_FIND}, target=tcl.Labels([number % 2 for number in range(len(prompts))]))"),
    Call("options", f"{_FIND}, corrupted=demo.corrupted, target=demo.target)"),
    Call("options", f"{_FIND}, corrupted=demo.corrupted[:, :-1], target=demo.target)", "`corrupted`"),
    Call("options", f"{_FIND}, basis='neuron', target=demo.target)"),
    Call("options", f"{_FIND}, basis='neurons')", "neuron"),
    Call("options", f"{_FIND}, method='lasso+confirm', corrupted=demo.corrupted)"),
    Call("options", f"{_FIND}, strength=None)", "`strength`"),
    Call("options", f"{_FIND}, max_prompts=0)", "`max_prompts`"),
    Call("options", f"{_FIND}, batch_size='8')", "`batch_size`"),
    Call("options", "tcl.plan(model, prompts, positions='last')"),
    Call("graph", "graph.nodes"),
    Call("graph", "graph.edges"),
    Call("graph", "graph.top_k(np.int64(4)).prune()"),
    Call("graph", "graph.subgraph('m0')", "`nodes`"),
    Call("graph", "graph.plot(folder / 'circuit.svg')"),
    Call("graph", "graph.show()"),
    Call("graph", "graph._repr_html_()"),
    Call("graph", "tcl.load(graph.to('eap', folder / 'circuit.json'))"),
    Call("graph", "graph.to('word', folder / 'circuit.doc')", "'word'"),
    Call("graph", "tcl.explain(graph, 'a2.h0')"),
    Call("graph", "tcl.evaluate.structure(graph, demo.true_edges)"),
    Call("graph", "tcl.evaluate.faithfulness(model, graph, tokens, demo.corrupted, demo.target)"),
    Call("graph", "tcl.compare({'ours': graph, 'planted': demo.circuit}, demo.true_edges)"),
)


def tokenizer(vocabulary: Sequence[str], folder: Path) -> Any:
    """The words of the bundled model by their ids; read from `folder`, as TransformerLens demands, which adds <bos>."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    number = {word: number for number, word in enumerate(vocabulary)}
    words = Tokenizer(models.WordLevel(number, unk_token="<none>"))
    words.normalizer, words.pre_tokenizer = normalizers.Strip(), pre_tokenizers.WhitespaceSplit()
    marks = {"bos_token": "<bos>", "eos_token": "<none>", "unk_token": "<none>", "pad_token": "<none>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **marks).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@contextlib.contextmanager
def names(prompts: int) -> Iterator[dict[str, Any]]:
    """The names that the calls use: a model with a tokenizer, prompts in several forms, a graph, a folder."""
    demo = tcl.load_demo(prompts=prompts)
    right, wrong = demo.answers, demo.decode(demo.incorrect)
    with tempfile.TemporaryDirectory() as folder:
        demo.model.set_tokenizer(tokenizer(demo.vocabulary, Path(folder, "words")))
        demo.model.cfg.default_prepend_bos = True  # as a model with a tokenizer has it
        yield {
            "tcl": tcl,
            "np": np,
            "demo": demo,
            "model": demo.model,
            "tokens": demo.tokens,
            "prompts": demo.prompts,
            "right": right,
            "wrong": wrong,
            "table": pd.DataFrame({"prompt": demo.prompts, "right": right, "wrong": wrong}),
            "graph": demo.circuit,
            "folder": Path(folder),
        }


def answer(call: Call, known: Mapping[str, Any]) -> Answer:
    """Make a call, and say what came of it."""
    began = time.perf_counter()
    refused = fault = False
    with (
        warnings.catch_warnings(record=True) as warned,
        contextlib.redirect_stderr(io.StringIO()),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        warnings.simplefilter("always")
        try:
            told = in_words(eval(call.code, dict(known)))
        except tcl.CircuitLassoError as error:
            told, refused = f"{type(error).__name__}: {error}", True
        except Exception as error:
            told, fault = f"{type(error).__name__}: {error}", True
    own = [str(one.message) for one in warned if issubclass(one.category, UserWarning)]
    told += f" (warns: {own[0]})" if own else ""
    return Answer(call, told, refused, fault, time.perf_counter() - began)


def in_words(value: Any) -> str:
    """What a call gave, in a line."""
    if isinstance(value, AttributionGraph):
        return f"a graph: {value.n_kept} of {len(value)} edges kept"
    if isinstance(value, pd.DataFrame):
        return f"a table: {len(value)} rows of {', '.join(value.columns[:4])}, ..."
    if isinstance(value, str) and "<svg" in value:
        return f"a picture and a table in HTML, {len(value) // 1000} kB"
    if isinstance(value, Path):
        return f"a file: {value.name}, {value.stat().st_size // 1000} kB"
    return " ".join(str(value).split()) if value is not None else "done"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=sorted({call.about for call in CALLS}), help="the calls about this")
    parser.add_argument("--prompts", type=int, default=32)
    options = parser.parse_args()
    torch.set_num_threads(1)
    chosen = [call for call in CALLS if options.only in (None, call.about)]
    with names(options.prompts) as known:
        answers = []
        for number, call in enumerate(chosen, 1):
            found = answer(call, known)
            answers.append(found)
            mark = "" if found.as_expected else "FAULT " if found.fault else "UNEXPECTED "
            told = found.told if len(found.told) <= WIDTH else found.told[: WIDTH - 3] + "..."
            print(f"{number:2}. {call.code}\n    {mark}{told}  ({found.seconds:.1f} s)", flush=True)
    faults = [found for found in answers if not found.as_expected]
    refused = sum(found.refused for found in answers)
    print(
        f"{len(answers)} calls: {len(answers) - refused} done, {refused} refused by name, {len(faults)} not as expected"
    )
    return min(len(faults), 1)


if __name__ == "__main__":
    raise SystemExit(main())
