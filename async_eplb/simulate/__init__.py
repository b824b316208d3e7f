"""Predict how long updates take on clusters that need not be there: real plans, and a model of their links."""

from async_eplb.simulate.case import UpdateCase
from async_eplb.simulate.clusters import CLUSTERS, Cluster, Link
from async_eplb.simulate.compare import VARIANTS, UpdateCosts, Variant, compare_plans
from async_eplb.simulate.cost import LayerCosts, layer_costs, lower_bounds
from async_eplb.simulate.models import MODELS, Model

__all__ = [
    "CLUSTERS",
    "MODELS",
    "VARIANTS",
    "Cluster",
    "LayerCosts",
    "Link",
    "Model",
    "UpdateCase",
    "UpdateCosts",
    "Variant",
    "compare_plans",
    "layer_costs",
    "lower_bounds",
]
