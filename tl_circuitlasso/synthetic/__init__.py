"""Planted truth, for tests, tutorials and comparisons: circuits of made-up networks, and codes of made-up SAEs."""

from tl_circuitlasso.synthetic.problems import CODES as CODES
from tl_circuitlasso.synthetic.problems import Edge as Edge
from tl_circuitlasso.synthetic.problems import Planted as Planted
from tl_circuitlasso.synthetic.problems import planted as planted

__all__ = ["CODES", "Edge", "Planted", "planted"]
