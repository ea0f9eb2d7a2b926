"""Circuits among SAE features: from codes to certified regressions between hooks, and from those to a graph."""

from tl_circuitlasso.features.learning import FeatureSetup as FeatureSetup
from tl_circuitlasso.features.learning import learn_features as learn_features
from tl_circuitlasso.features.regression import Rule as Rule
