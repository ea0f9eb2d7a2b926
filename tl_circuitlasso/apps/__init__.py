"""What circuits are good for: following concepts through the layers, reading one prompt, naming features."""

from tl_circuitlasso._fits import guard as _guard
from tl_circuitlasso.apps.concepts import Concepts as Concepts
from tl_circuitlasso.apps.concepts import concepts as concepts
from tl_circuitlasso.apps.contributions import Contributions as Contributions
from tl_circuitlasso.apps.contributions import contributions as contributions
from tl_circuitlasso.apps.debias import Debiased as Debiased
from tl_circuitlasso.apps.debias import debias as debias
from tl_circuitlasso.apps.influence import Influence as Influence
from tl_circuitlasso.apps.influence import influence as influence
from tl_circuitlasso.apps.labels import neuronpedia_labels as neuronpedia_labels
from tl_circuitlasso.apps.labels import with_labels as with_labels
from tl_circuitlasso.apps.prompt_graph import prompt_graph as prompt_graph
from tl_circuitlasso.naming import directory as _directory

__dir__ = _directory(__name__)
_guard(__name__, __dir__())
