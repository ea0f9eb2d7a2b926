"""What every measurement starts from, checked once: model, prompts and partners, a metric, and what cut edges carry.

    experiment = tcl.Experiment(model, clean, corrupted, metric, ablation="mean")
    graph = tcl.baselines.eap_ig(experiment)
    curve = tcl.evaluate.curve(experiment, graph)

The verbs of `evaluate` and `baselines` take an experiment in the model's place, and then nothing that it has already.
Called with a model, they take the same arguments and make the experiment themselves.
"""

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field, fields
from functools import wraps
from typing import Any, ParamSpec, TypedDict, TypeVar, get_args

from tl_circuitlasso._checks import instance, one_of, whole_number, whole_or_none
from tl_circuitlasso.data.targets import LogitDiff
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.models import Adapter
from tl_circuitlasso.models.device import refuse_spread
from tl_circuitlasso.models.metric import Metric
from tl_circuitlasso.models.pairs import Pairs, pairs_of
from tl_circuitlasso.models.prompt_forms import AnyPrompts
from tl_circuitlasso.models.tokens import Prompts

ABLATIONS = ("patch", "zero", "mean", "mean-all", "optimal")
MISSING = "`metric` is missing: give metric(logits, rows) -> sum over rows, or a tcl.LogitDiff(correct, incorrect)"


@dataclass(frozen=True)
class Optimal:
    """How the constants of optimal ablation are fitted; `ablation="optimal"` is `Optimal()`.

    Attributes
    ----------
    positions: "each" (a constant for each position, started from ablation "mean") or "shared" (one for all positions,
        from "mean-all").
    metric: what the constants maximise; None is the metric that is measured. Needed where that has no derivative
        (accuracy); good where it can grow without bound (a logit difference): `evaluate.kl` can't.
    steps: the most L-BFGS steps for a circuit; it ends before where the metric's mean has stopped rising.
    tolerance: a rise that counts as none, as a share of the rise so far.
    prompts: how many prompts, drawn at random by `seed`, the constants are fitted on; None is all.

    Raises
    ------
    InputError: a value that can't be used.

    >>> import tl_circuitlasso as tcl
    >>> demo = tcl.load_demo(prompts=2)
    >>> metric = tcl.evaluate.kl(demo.model(demo.tokens)[:, -1].detach())
    >>> how = Optimal(positions="shared", steps=2)
    >>> tcl.evaluate.faithfulness(demo.model, demo.circuit, demo.tokens, None, metric, how).edges
    14
    """

    positions: str = "each"
    metric: Metric | None = None
    steps: int = 50
    tolerance: int | float = 1e-3
    prompts: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        one_of("positions", self.positions, ("each", "shared"))
        whole_number("steps", self.steps)
        whole_or_none("prompts", self.prompts)
        if not self.tolerance >= 0:
            raise InputError(f"`tolerance` is {self.tolerance!r}: give a share of the rise, 0 or more")


Ablation = str | Optimal


@dataclass(frozen=True, eq=False)
class Experiment:
    """A model, pairs of prompts, a metric, and what a cut edge carries in place of what its source does.

    `dataclasses.replace(experiment, ablation="mean")` is the same with another choice, checked again.

    Parameters
    ----------
    model: a TransformerLens model. clean, corrupted: whatever `circuit_lasso` takes as prompts; both of a pair have the
        same length. `corrupted` may be None where nothing is patched from it ("patch") or averaged over it.
    metric: `metric(logits, rows)` returns the sum over a batch's rows of what the circuit should keep high (a logit
        difference; for a loss, its negative), or a `tcl.LogitDiff`; `rows` are the prompts' numbers in the data set.
        Index -1 of the logits is each prompt's last real token, whatever the lengths. `evaluate.logit_diff` and its
        neighbours make some.
    ablation: what a cut edge carries: the source's output on the corrupted prompt ("patch"), its mean over prompts at
        the same position ("mean"), over prompts and positions ("mean-all"), the constants that hurt the metric least
        ("optimal", or an `evaluate.Optimal`), or nothing ("zero").
    attention_mask: True at real positions; left and right padding are both right.
    mean_over: whether means are over the "clean" or the "corrupted" prompts.
    input_node: whether `input` is the token embedding alone ("embed", as in EAP-IG), so that learned positions are
        never cut, or everything in front of the first layer ("resid"). It makes no difference to "patch".
    batch_size: the most prompts of one forward pass.
    saes: {hook: SAE}, for graphs of SAE features: anything with encode, decode and W_dec. Hooks that a graph doesn't
        have are outside of its circuit as a whole.
    error: what becomes of the part that SAEs miss: "keep", "remove", or "graph": it's a node where the graph has one
        for it, and kept else.
    rest: whether features that a graph has no node for count as outside of the circuit ("ablate") or stay ("keep").
    progress: a bar on a terminal, elsewhere a line every ten seconds, of what takes long.

    Attributes
    ----------
    pairs: the checked prompts. objective: the metric as it is called. `clean` and `corrupted` are checked prompts, too.

    Raises
    ------
    InputError: prompts, a metric or a name that can't be used. ModelError: a model that the adapter refuses.

    >>> import tl_circuitlasso as tcl
    >>> demo = tcl.load_demo(prompts=4)
    >>> experiment = Experiment(demo.model, demo.tokens, demo.corrupted, demo.target)
    >>> experiment
    Experiment(4 prompts with partners, metric=LogitDiff, ablation='patch')
    >>> tcl.evaluate.faithfulness(experiment, demo.circuit).faithfulness > 0.9
    True
    >>> tcl.baselines.eap_ig(experiment).provenance["prompts"]
    4
    """

    model: Any
    clean: AnyPrompts
    corrupted: AnyPrompts | None = None
    metric: Metric | LogitDiff | None = None
    ablation: Ablation = "patch"
    _: KW_ONLY
    attention_mask: Any = None
    mean_over: str = "clean"
    input_node: str = "embed"
    batch_size: int = 32
    saes: Mapping[str, Any] | None = None
    error: str = "graph"
    rest: str = "ablate"
    progress: bool = True
    pairs: Pairs = field(init=False)
    objective: Metric = field(init=False)

    def __post_init__(self) -> None:
        one_of("ablation", self.cut, ABLATIONS)
        one_of("mean_over", self.mean_over, ("clean", "corrupted"))
        one_of("input_node", self.input_node, ("embed", "resid"))
        one_of("error", self.error, ("graph", "keep", "remove"))
        one_of("rest", self.rest, ("ablate", "keep"))
        if self.saes is not None:
            instance("saes", self.saes, Mapping, "{hook: SAE}")
        pairs = _pairs(self)
        objective = _missing if self.metric is None else pairs.metric(self.metric)
        corrupted = None if self.corrupted is None else pairs.corrupted
        made = {"clean": pairs.clean, "corrupted": corrupted, "pairs": pairs, "objective": objective}
        for name, value in made.items():
            object.__setattr__(self, name, value)

    @classmethod
    def of(cls, model: Any, *data: Any, **options: Any) -> "Experiment":
        """The experiment that stands in the model's place, or one that is made of the arguments."""
        return model if isinstance(model, Experiment) else cls(model, *data, **options)

    @property
    def adapter(self) -> Adapter:
        """The model, as everything here runs it."""
        return self.pairs.adapter

    @property
    def cut(self) -> str:
        """The ablation's name."""
        return "optimal" if isinstance(self.ablation, Optimal) else self.ablation

    @property
    def optimal(self) -> Optimal:
        """How optimal constants are fitted."""
        return self.ablation if isinstance(self.ablation, Optimal) else Optimal()

    def __len__(self) -> int:
        return len(self.pairs)

    def __repr__(self) -> str:
        partners = "" if self.corrupted is None else " with partners"
        metric = "" if self.metric is None else f", metric={type(self.metric).__name__}"
        return f"Experiment({len(self)} prompts{partners}{metric}, ablation={self.cut!r})"

    def ready(self, *, metric: bool = True, cut: bool = True, fitted: str = "", spread: bool = False) -> "Experiment":
        """Itself, where it has what a verb takes: a metric, what cut edges carry, and that not `fitted`, if that says
        to what constants would be; a model on several devices only where the verb follows one that is `spread`.

        Raises
        ------
        InputError: no metric, no corrupted prompts though the ablation reads them, or optimal ablation. ModelError: a
        model on several devices.
        """
        if not spread or self.cut == "optimal":
            refuse_spread(self.adapter.model, "ablation 'optimal'" if spread else "what was called")
        if metric and self.metric is None:
            raise InputError(MISSING)
        reads = self.cut == "patch" or (self.cut != "zero" and self.mean_over == "corrupted")
        if cut and reads and self.corrupted is None:
            raise InputError(
                f"`corrupted` is missing: ablation={self.cut!r} reads it; without corrupted prompts use "
                "ablation='mean', 'mean-all', 'optimal' or 'zero', and means over the clean prompts"
            )
        if fitted and self.cut == "optimal":
            raise InputError(f"`ablation` 'optimal' fits constants to {fitted}: use 'mean'")
        return self


def _pairs(given: Experiment) -> Pairs:
    if isinstance(given.clean, Prompts):  # of an experiment that this one differs from
        own = pairs_of(given.clean.adapter, given.clean, given.corrupted)
        return own if own.batch_size == given.batch_size else own.batched(whole_number("batch_size", given.batch_size))
    options = {"attention_mask": given.attention_mask, "batch_size": given.batch_size}
    return pairs_of(given.model, given.clean, given.corrupted, **options)


def _missing(logits: Any, rows: Any) -> Any:
    raise InputError(MISSING)


# ---- verbs that take one --------------------------------------------------------------------------------------------


class PromptOptions(TypedDict, total=False):
    """What every verb takes that reads prompts; see `Experiment` for each."""

    attention_mask: Any
    batch_size: int
    progress: bool


class CutOptions(PromptOptions, total=False):
    """What those take that cut edges between components."""

    mean_over: str
    input_node: str


class MethodOptions(CutOptions, total=False):
    """What those of `baselines` take."""

    ablation: Ablation


class FeatureOptions(CutOptions, total=False):
    """What those take that run circuits of SAE features too."""

    saes: Mapping[str, Any] | None
    error: str
    rest: str


P = ParamSpec("P")
R = TypeVar("R")
_SHARED = {one.name: one for one in fields(Experiment) if one.init and one.name != "model"}
_REPEATED = {*_SHARED, "prompts"}  # which is what `steer` calls the clean ones


def verb(function: Callable[P, R]) -> Callable[P, R]:
    """A function of `(model, ..., **options: Unpack[...])` that names its options one by one in its signature, refuses
    others in its own name, and takes an `Experiment` in the model's place.

    Raises
    ------
    TypeError: a keyword that it doesn't have. InputError: an argument that the experiment has already.
    """
    signature, name = _spelled_out(function), function.__name__

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if unknown := [key for key in kwargs if key not in signature.parameters]:
            near = difflib.get_close_matches(unknown[0], signature.parameters, 1)
            meant = f"; did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"{name}() got an unexpected keyword argument {unknown[0]!r}{meant}")
        if any(isinstance(given, Experiment) for given in (*args, kwargs.get("model"))):
            _refuse_again(name, signature.bind_partial(*args, **kwargs).arguments)
        return function(*args, **kwargs)

    call.__signature__ = signature  # type: ignore[attr-defined]
    return call


def _spelled_out(function: Callable[..., Any]) -> inspect.Signature:
    """The signature with each of the options that `**options` stands for, as `Experiment` has it."""
    signature = inspect.signature(function)
    *named, last = signature.parameters.values()
    if last.kind is not last.VAR_KEYWORD:
        return signature
    options = get_args(last.annotation)[0].__annotations__
    spelled = [
        inspect.Parameter(one.name, last.KEYWORD_ONLY, default=one.default, annotation=one.type)
        for one in _SHARED.values()
        if one.name in options and one.name not in signature.parameters
    ]
    return signature.replace(parameters=[*named, *spelled])


def _refuse_again(verb: str, given: Mapping[str, Any]) -> None:
    if again := [name for name, value in given.items() if value is not None and name in _REPEATED]:
        raise InputError(
            f"`{again[0]}` is given to {verb}() beside an experiment, which has its own: leave it out, or give "
            f"dataclasses.replace(experiment, {again[0]}=...)"
        )
