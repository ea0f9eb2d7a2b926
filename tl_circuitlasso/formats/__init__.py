"""Other tools' formats: `to_x` and `from_x` for each, plain data first, files as a thin shell around it.

| tool               | out                        | in                         | holds                               |
|--------------------|----------------------------|----------------------------|-------------------------------------|
| EAP-IG             | `to_eap`, `to_eap_graph`   | `from_eap`, `from_eap_graph` | scores and membership, components |
| MIB circuit track  | `to_mib`, `check_mib`      | `from_mib`                 | submission folders of EAP-IG files  |
| ACDC               | `to_acdc`, `to_acdc_effects` | `from_acdc`              | membership, components              |
| AutoCircuit        | `to_auto_circuit`, `..._edges` | `from_auto_circuit`, `..._edges` | scores, components        |
| circuits-benchmark | `to_circuits_benchmark`    | `from_circuits_benchmark`  | kept edges, components              |
| circuit-tracer     | `to_circuit_tracer`, `..._graph` | `from_circuit_tracer` | kept edges, any nodes              |
| Neuronpedia        | `to_neuronpedia`           | `from_neuronpedia`         | kept edges, any nodes               |
| TransformerLens 4  | `to_transformer_lens`      | `from_transformer_lens`    | scores or kept edges, components    |
| networkx           | `to_networkx`, `to_graphml`, `to_gexf`, `to_cytoscape` | `from_...` | everything      |

`read(path)` opens a file of any of them, `write(graph, path, format)` writes one.
`to_x(graph, path=None)` returns the data and writes it if a path is given; each module's docstring says what is lost.
Readers raise `FormatError` and nothing else, and never run code from a file.
"""

from tl_circuitlasso._fits import guard as _guard
from tl_circuitlasso.formats._frontend import cantor_pair, cantor_unpair
from tl_circuitlasso.formats.acdc import from_acdc, to_acdc, to_acdc_effects
from tl_circuitlasso.formats.auto_circuit import (
    from_auto_circuit,
    from_auto_circuit_edges,
    to_auto_circuit,
    to_auto_circuit_edges,
)
from tl_circuitlasso.formats.circuit_tracer import from_circuit_tracer, to_circuit_tracer, to_circuit_tracer_graph
from tl_circuitlasso.formats.circuits_benchmark import from_circuits_benchmark, to_circuits_benchmark
from tl_circuitlasso.formats.eap import from_eap, from_eap_graph, to_eap, to_eap_graph
from tl_circuitlasso.formats.files import guess, option, read, write
from tl_circuitlasso.formats.mib import check_mib, from_mib, to_mib
from tl_circuitlasso.formats.networkx_ import (
    from_cytoscape,
    from_gexf,
    from_graphml,
    from_networkx,
    to_cytoscape,
    to_gexf,
    to_graphml,
    to_networkx,
)
from tl_circuitlasso.formats.neuronpedia import check_neuronpedia, from_neuronpedia, to_neuronpedia
from tl_circuitlasso.formats.transformer_lens_ import from_transformer_lens, to_transformer_lens
from tl_circuitlasso.naming import directory as _directory

__all__ = [
    "cantor_pair",
    "cantor_unpair",
    "check_mib",
    "check_neuronpedia",
    "from_acdc",
    "from_auto_circuit",
    "from_auto_circuit_edges",
    "from_circuit_tracer",
    "from_circuits_benchmark",
    "from_cytoscape",
    "from_eap",
    "from_eap_graph",
    "from_gexf",
    "from_graphml",
    "from_mib",
    "from_networkx",
    "from_neuronpedia",
    "from_transformer_lens",
    "guess",
    "option",
    "read",
    "to_acdc",
    "to_acdc_effects",
    "to_auto_circuit",
    "to_auto_circuit_edges",
    "to_circuit_tracer",
    "to_circuit_tracer_graph",
    "to_circuits_benchmark",
    "to_cytoscape",
    "to_eap",
    "to_eap_graph",
    "to_gexf",
    "to_graphml",
    "to_mib",
    "to_networkx",
    "to_neuronpedia",
    "to_transformer_lens",
    "write",
]

__dir__ = _directory(__name__)
_guard(__name__, __dir__())
