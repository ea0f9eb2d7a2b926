"""Other ways to find circuits, for comparison: each returns an `AttributionGraph` of all edges, all kept unless the
method chooses (`acdc`, `bootstrap_eap_ig`).

Every method is called as `method(model, clean, corrupted, metric, *, steps=5, attention_mask=None, ...)`; `METHODS` has
them by name.
"""

from tl_circuitlasso._fits import guard as _guard
from tl_circuitlasso.baselines.acdc import (
    acdc as acdc,
)
from tl_circuitlasso.baselines.exact import (
    exact as exact,
)
from tl_circuitlasso.baselines.exact_neurons import (
    exact_neurons as exact_neurons,
)
from tl_circuitlasso.baselines.features import (
    feature_correlation as feature_correlation,
)
from tl_circuitlasso.baselines.features import (
    feature_gradient as feature_gradient,
)
from tl_circuitlasso.baselines.gradient import (
    clean_corrupted as clean_corrupted,
)
from tl_circuitlasso.baselines.gradient import (
    eap as eap,
)
from tl_circuitlasso.baselines.gradient import (
    eap_ig as eap_ig,
)
from tl_circuitlasso.baselines.gradient import (
    eap_ig_activations as eap_ig_activations,
)
from tl_circuitlasso.baselines.methods import (
    METHODS as METHODS,
)
from tl_circuitlasso.baselines.methods import (
    method as method,
)
from tl_circuitlasso.baselines.neurons import (
    gradient_activation as gradient_activation,
)
from tl_circuitlasso.baselines.neurons import (
    integrated_gradients as integrated_gradients,
)
from tl_circuitlasso.baselines.neurons import (
    random_nodes as random_nodes,
)
from tl_circuitlasso.baselines.neurons import (
    relp as relp,
)
from tl_circuitlasso.baselines.nodes import (
    node_scores as node_scores,
)
from tl_circuitlasso.baselines.observational import (
    correlation as correlation,
)
from tl_circuitlasso.baselines.observational import (
    information_flow_routes as information_flow_routes,
)
from tl_circuitlasso.baselines.observational import (
    random_edges as random_edges,
)
from tl_circuitlasso.baselines.paths import (
    bootstrap_eap_ig as bootstrap_eap_ig,
)
from tl_circuitlasso.baselines.paths import (
    eap_gp as eap_gp,
)
from tl_circuitlasso.naming import directory as _directory

__dir__ = _directory(__name__)
_guard(__name__, __dir__())
