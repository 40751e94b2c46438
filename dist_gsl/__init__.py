"""dist_gsl: train deep networks so that they find their own number of neurons.

The mathematics needs torch alone and works in any training loop::

    neurons = dist_gsl.find_neurons(model, example_inputs)
    optimizer = dist_gsl.ProximalSGD(model.parameters(), neurons, dist_gsl.SparseGroupLasso(beta=0.01), lr=0.1)
    small = dist_gsl.compact(model, neurons).model
"""

from dist_gsl.artifact import load, load_with_neurons
from dist_gsl.compaction import Compacted, compact
from dist_gsl.measures import Measures, measure
from dist_gsl.models import create_model
from dist_gsl.neurons import NeuronLayer, Neurons, Slice
from dist_gsl.penalty import SparseGroupLasso, sparse_group_prox
from dist_gsl.proximal import ProximalAdamW, ProximalSGD
from dist_gsl.tracing import ModuleRule, find_neurons

__version__ = "0.1.0"

__all__ = [
    "Compacted",
    "Measures",
    "ModuleRule",
    "NeuronLayer",
    "Neurons",
    "ProximalAdamW",
    "ProximalSGD",
    "Slice",
    "SparseGroupLasso",
    "compact",
    "create_model",
    "find_neurons",
    "load",
    "load_with_neurons",
    "measure",
    "sparse_group_prox",
]
