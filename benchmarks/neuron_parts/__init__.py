"""Parts of the benchmark of neuron circuits: pairs, agreement, exact patching, edges, steering."""
