"""Planted truth, for tests, tutorials and comparisons: circuits of made-up networks and transformers, codes of made-up
SAEs, and SAEs of random directions."""

from tl_circuitlasso._fits import guard as _guard
from tl_circuitlasso.naming import directory as _directory
from tl_circuitlasso.synthetic.problems import CODES as CODES
from tl_circuitlasso.synthetic.problems import Edge as Edge
from tl_circuitlasso.synthetic.problems import Planted as Planted
from tl_circuitlasso.synthetic.problems import planted as planted
from tl_circuitlasso.synthetic.saes import RandomSAE as RandomSAE
from tl_circuitlasso.synthetic.saes import random_sae as random_sae
from tl_circuitlasso.synthetic.transformers import PlantedTransformer as PlantedTransformer
from tl_circuitlasso.synthetic.transformers import planted_transformer as planted_transformer

__all__ = [
    "CODES",
    "Edge",
    "Planted",
    "PlantedTransformer",
    "RandomSAE",
    "planted",
    "planted_transformer",
    "random_sae",
]

__dir__ = _directory(__name__)
_guard(__name__, __dir__())
