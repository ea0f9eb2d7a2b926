"""Circuits of MLP neurons: what a behaviour runs through, and the edges between its neurons."""

from tl_circuitlasso.neurons.behaviour import Behaviour as Behaviour
from tl_circuitlasso.neurons.circuit import neuron_circuit as neuron_circuit
from tl_circuitlasso.neurons.recurring import recurring as recurring
