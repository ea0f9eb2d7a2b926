"""The attribution graph: nodes, edges and scores, its file, verbs, explanations and selections."""

from tl_circuitlasso.graph.attribution import AttributionGraph as AttributionGraph
