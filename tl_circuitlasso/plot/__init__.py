"""Pictures of circuits: static drawings and charts with matplotlib, and an interactive page that works offline.

    from tl_circuitlasso import plot
    plot.circuit(graph, "circuit.png")                     # layered drawing, one ribbon per kept edge
    plot.interactive(graph, "circuit.html", other=eap)     # one self-contained file: pan, zoom, threshold, search
    plot.show(graph)                                       # the same under a notebook's cell, or in the web browser
    plot.adjacency(graph)                                  # heat map, row = source, column = target
    plot.strength_path({0.1: sparse, 0.05: denser})        # edges against lambda, with stability
    plot.scatter(graph, eap, names=("CircuitLasso", "EAP-IG"))
    plot.curves({"CircuitLasso": curve})                   # faithfulness against size
    plot.flow(tcl.apps.concepts(graph))                    # concepts carried along, merged and dropped between layers

Every function returns a matplotlib Figure (`interactive`: the path written) and, where it's given a path, writes the
file whole or not at all.
"""

from tl_circuitlasso._fits import guard as _guard
from tl_circuitlasso.naming import directory as _directory
from tl_circuitlasso.plot.charts import curves as curves
from tl_circuitlasso.plot.charts import scatter as scatter
from tl_circuitlasso.plot.charts import strength_path as strength_path
from tl_circuitlasso.plot.circuit import circuit as circuit
from tl_circuitlasso.plot.flow import flow as flow
from tl_circuitlasso.plot.heatmap import adjacency as adjacency
from tl_circuitlasso.plot.interactive import interactive as interactive
from tl_circuitlasso.plot.notebook import show as show

__all__ = ["adjacency", "circuit", "curves", "flow", "interactive", "scatter", "show", "strength_path"]

__dir__ = _directory(__name__)
_guard(__name__, __dir__())
