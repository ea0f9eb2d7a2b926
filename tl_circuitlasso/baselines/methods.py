"""Every method that scores the edges of a model, by name and with one call: `METHODS[name](model, clean, corrupted,
metric, **options)`, options as the method's own signature has them."""

from collections.abc import Callable, Mapping
from typing import Any

from typing_extensions import Unpack

from tl_circuitlasso.baselines.acdc import acdc
from tl_circuitlasso.baselines.exact import exact
from tl_circuitlasso.baselines.gradient import clean_corrupted, eap, eap_ig, eap_ig_activations
from tl_circuitlasso.baselines.observational import correlation, information_flow_routes, magnitude, random_edges
from tl_circuitlasso.baselines.paths import bootstrap_eap_ig, eap_gp
from tl_circuitlasso.baselines.relevance import relp_edges
from tl_circuitlasso.data.targets import LogitDiff
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.experiment import Experiment, PromptOptions, verb
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.models.metric import Metric
from tl_circuitlasso.models.positions import Positions
from tl_circuitlasso.models.prompt_forms import AnyPrompts

Method = Callable[..., AttributionGraph]


@verb
def lasso_confirm(
    model: Any,
    clean: AnyPrompts = None,
    corrupted: AnyPrompts = None,
    metric: Metric | LogitDiff | None = None,
    *,
    budget: int | None = None,
    positions: Positions = "last",
    seed: int = 0,
    steps: int = 1,
    **options: Unpack[PromptOptions],
) -> AttributionGraph:
    """`circuit_lasso(method="lasso+confirm")`, called as the other methods are: a skeleton by regression between the
    prompts and their partners, of which at most `budget` edges are then measured, the weakest first.

    A LogitDiff is what the skeleton explains, too; of another metric, or None, it explains the model's own logits at
    `positions`. The steps aren't used; options: as in `tcl.Experiment`.

    >>> import tl_circuitlasso as tcl
    >>> demo = tcl.load_demo(prompts=32)
    >>> found = lasso_confirm(demo.model, demo.tokens, demo.corrupted, demo.target, budget=3, progress=False)
    >>> found.provenance["confirm"]["tested"]
    3
    """
    from tl_circuitlasso.discover.run import circuit_lasso

    if isinstance(model, Experiment):
        own = model.ready(metric=False)
        whole, model, metric = own.pairs.clean.whole(), own.model, own.metric
        clean, corrupted = whole.tokens, own.pairs.corrupted.whole().tokens
        options = {"attention_mask": whole.mask, "batch_size": own.batch_size, "progress": own.progress}
    asked: dict[str, Any] = {"target": metric} if isinstance(metric, LogitDiff) else {"metric": metric}
    asked |= {"method": "lasso+confirm", "corrupted": corrupted, "budget": budget, "positions": positions, "seed": seed}
    return circuit_lasso(model, clean, **asked, **options)


METHODS: Mapping[str, Method] = {
    "acdc": acdc,
    "bootstrap-eap-ig": bootstrap_eap_ig,
    "clean-corrupted": clean_corrupted,
    "correlation": correlation,
    "eap": eap,
    "eap-gp": eap_gp,
    "eap-ig": eap_ig,
    "eap-ig-activations": eap_ig_activations,
    "exact": exact,
    "information-flow-routes": information_flow_routes,
    "lasso+confirm": lasso_confirm,
    "magnitude": magnitude,
    "random": random_edges,
    "relp": relp_edges,
}


def method(name: str) -> Method:
    """The method called `name`.

    >>> method("eap").__name__
    'eap'

    Raises
    ------
    InputError: there is none; the message lists those there are.
    """
    if name not in METHODS:
        raise InputError(f"`method` is {name!r}: choose among {', '.join(METHODS)}")
    return METHODS[name]
