"""How much each feature matters to a metric, by integrated gradients: what SHIFT ranks features by.

With f the codes of a site on a prompt and f' what they carry when ablated,

    effect_i = sum over positions p of (f_i(p) - f'_i(p)) mean over k < steps of d m / d f_i(p) at f + k/steps (f' - f),

one site at a time, what its SAE misses kept (Marks et al. 2024, arXiv 2403.19647, section 3).
"""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from typing_extensions import Unpack

from tl_circuitlasso._checks import whole_number
from tl_circuitlasso.data.targets import LogitDiff
from tl_circuitlasso.evaluate.features import ablated_values, feature_sites
from tl_circuitlasso.evaluate.metrics import Metric
from tl_circuitlasso.experiment import Ablation, Experiment, FeatureOptions, verb
from tl_circuitlasso.graph import AttributionGraph
from tl_circuitlasso.models.feature_patch import Carried, FeatureSite, Kept, Writer
from tl_circuitlasso.models.metric import as_objective
from tl_circuitlasso.models.pairs import PairBatch
from tl_circuitlasso.models.passes import ForwardPass, differentiable
from tl_circuitlasso.models.prompt_forms import AnyPrompts
from tl_circuitlasso.progress import bar


@verb
def feature_attribution(
    model: Any,
    graph: AttributionGraph,
    clean: AnyPrompts = None,
    corrupted: AnyPrompts = None,
    metric: Metric | LogitDiff | None = None,
    ablation: Ablation = "patch",
    *,
    steps: int = 10,
    **options: Unpack[FeatureOptions],
) -> dict[str, float]:
    """The effect of every feature of the graph's sites on the metric, in its units: mean over prompts, by node.

    Parameters
    ----------
    graph: says which sites there are; features it has no node for are scored as well. Its edges don't matter.
    steps: of the sum; each takes a forward and a backward pass for each site.
    The rest as in `tcl.Experiment`.

    Raises
    ------
    InputError: optimal ablation, a decoder that isn't linear in its codes, a metric that doesn't depend on the logits,
        and as in `faithfulness`.

    >>> import tl_circuitlasso as tcl
    >>> demo = tcl.load_demo(prompts=8)
    >>> graph = tcl.baselines.relp(demo.model, demo.tokens, demo.corrupted, demo.target)
    >>> found = feature_attribution(demo.model, graph, demo.tokens, demo.corrupted, demo.target, steps=2)
    >>> len(found) == 3 * demo.model.cfg.d_mlp
    True
    """
    steps = whole_number("steps", steps, what="of integration steps")
    setup = Experiment.of(model, clean, corrupted, metric, ablation, **options).ready(fitted="whole components")
    sites = feature_sites(graph, setup.adapter, setup.saes)
    carried = ablated_values(setup, sites)
    effects = {site.name: torch.zeros(site.features, dtype=torch.float64) for site in sites}
    with bar(total=len(sites) * len(setup.pairs), progress=setup.progress, desc="attribution", unit="prompt") as ticks:
        for number, batch in enumerate(setup.pairs):
            instead = carried(batch)
            for site in sites:
                effects[site.name] += _Site(setup, site, batch, instead, check=number == 0).effects(steps)
                ticks.update(len(batch.rows))
    return {
        f"{name}#{feature}": value / len(setup.pairs)
        for name, values in effects.items()
        for feature, value in enumerate(values.tolist())
    }


class _Site:
    """One site on one batch: its codes, what they carry when ablated, and runs between the two."""

    def __init__(
        self, setup: Experiment, site: FeatureSite, batch: PairBatch, carried: Carried, *, check: bool
    ) -> None:
        self.setup, self.site, self.batch = setup, site, batch
        self.writer = Writer(setup.adapter, batch.clean.tokens.shape, carried)
        acts = setup.adapter.run(batch.clean.tokens, batch.mask, list(dict.fromkeys((site.reads, site.writes))))
        self.shape = acts[site.writes].shape
        self.x, self.out = self.writer.rows(acts[site.reads]), self.writer.rows(acts[site.writes]).flatten(1)
        self.codes, self.ablated = site.codes(self.x), self.writer.values(site, self.x)
        if check and site.encoder is not None:
            site.encoder.check_linear(self.x)

    def effects(self, steps: int) -> Float[Tensor, " feature"]:
        """Summed over positions and prompts."""
        gradient = sum((self._gradient(k / steps) for k in range(steps)), start=torch.zeros_like(self.out)) / steps
        real: Bool[Tensor, " row"] = self.batch.mask.flatten()
        encoder = self.site.encoder
        slope = gradient if encoder is None else gradient @ encoder.written.to(gradient).T
        return (slope * (self.codes - self.ablated))[real].sum(0).double().cpu()

    def _gradient(self, share: float) -> Float[Tensor, "row out"]:
        """The metric's derivative in what the site writes, so far from its own codes to the ablated ones."""
        everything = Kept(torch.ones(self.site.features, dtype=torch.bool), "keep")
        codes = torch.lerp(self.codes, self.ablated, share)
        written = self.writer.written(self.site, everything, self.x, self.out, codes).reshape(self.shape)
        setup, batch, hook = self.setup, self.batch, self.site.writes

        def begin(activation: Tensor) -> Tensor:
            return written.to(activation).detach().clone().requires_grad_()

        made = ForwardPass(setup.adapter, batch.clean.tokens, batch.mask, [hook, "logits"], gradients=True)
        with differentiable(setup.adapter):
            made.run([(hook, begin)])
            value = as_objective(setup.objective(batch.shown(made["logits"]), batch.rows))
            return self.writer.rows(made.gradients_of(value, [hook])[hook]).flatten(1)
