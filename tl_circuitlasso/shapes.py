"""The glossary of axis names used in every shape annotation, and the few tensor aliases.

| axis     | runs over                                                           |
|----------|---------------------------------------------------------------------|
| batch    | prompts of one batch                                                |
| pos      | positions of a prompt                                               |
| sample   | kept (prompt, position) pairs: the rows of every regression         |
| node     | coordinates of sites, in the order of a `NodeIndex`                 |
| source   | nodes that feed (rows of an adjacency)                              |
| target   | nodes that are fed (columns of an adjacency)                        |
| edge     | candidate edges, one per (source, target, port)                     |
| head     | attention heads of a layer                                          |
| d_model, d_head, d_mlp, vocab | the model's own widths                         |

Row = source, column = target, as in EAP-IG (circuit-tracer's matrices are the transpose).
"""

from jaxtyping import Float, Int
from torch import Tensor

Tokens = Int[Tensor, "batch pos"]
Gram = Float[Tensor, "source source"]
Cross = Float[Tensor, "source target"]
Adjacency = Float[Tensor, "source target"]
