"""What an update would take on machines that are not there: real plans, and a model of links. Pure."""

from async_eplb.simulate.clusters import CLUSTERS, Cluster, Link
from async_eplb.simulate.cost import LayerCosts, layer_costs, lower_bounds
from async_eplb.simulate.models import MODELS, Model
from async_eplb.simulate.scenario import Scenario
from async_eplb.simulate.study import VARIANTS, Outcome, Variant, simulate

__all__ = [
    "CLUSTERS",
    "MODELS",
    "VARIANTS",
    "Cluster",
    "LayerCosts",
    "Link",
    "Model",
    "Outcome",
    "Scenario",
    "Variant",
    "layer_costs",
    "lower_bounds",
    "simulate",
]
