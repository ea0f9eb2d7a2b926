"""Every method that scores all edges of a model, by name and with one call: `METHODS[name](model, clean, corrupted,
metric, **options)`, options as the method's own signature has them."""

from collections.abc import Callable, Mapping

from tl_circuitlasso.baselines.acdc import acdc
from tl_circuitlasso.baselines.exact import exact
from tl_circuitlasso.baselines.gradient import clean_corrupted, eap, eap_ig, eap_ig_activations
from tl_circuitlasso.baselines.observational import correlation, information_flow_routes, magnitude, random_edges
from tl_circuitlasso.baselines.paths import bootstrap_eap_ig, eap_gp
from tl_circuitlasso.baselines.relevance import relp_edges
from tl_circuitlasso.errors import InputError
from tl_circuitlasso.graph import AttributionGraph

Method = Callable[..., AttributionGraph]


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
    "magnitude": magnitude,
    "random": random_edges,
    "relp": relp_edges,
}
CHOOSE = ("acdc", "bootstrap-eap-ig")  # whose kept edges are a circuit by their own rule; the others rank


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
