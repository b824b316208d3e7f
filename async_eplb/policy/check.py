"""Checks of what policies take and return: loads, placements and groups that do not fit together are refused."""

from async_eplb.errors import (
    InvalidLoad,
    InvalidOptions,
    InvalidPlacement,
    InvalidPolicyOutput,
    LayerCountMismatch,
    TooFewSlots,
    UnplacedExpert,
)
from async_eplb.load.value import ExpertLoad
from async_eplb.placement import ExpertPlacement
from async_eplb.topology import EPTopology


def require_room(load: ExpertLoad, topology: EPTopology) -> None:
    """Check that there is a slot for each expert.

    :raises TooFewSlots: if not
    """
    if topology.num_physical_experts < load.num_logical_experts:
        raise TooFewSlots(
            f"{topology.num_ranks} ranks of {topology.num_local_physical_experts} slots cannot hold "
            f"{load.num_logical_experts} logical experts; give each rank more slots",
            num_physical_experts=topology.num_physical_experts,
            num_logical_experts=load.num_logical_experts,
        )


def groups_stay_on_nodes(num_groups: int, num_logical_experts: int, topology: EPTopology) -> bool:
    """Return whether each group stays on one node: if they divide over the nodes, as in the published algorithm.

    :raises InvalidOptions: if they do, and are not equally large
    """
    if num_groups % topology.num_nodes:
        return False
    if num_logical_experts % num_groups:
        raise InvalidOptions(
            f"{num_groups} groups do not divide {num_logical_experts} logical experts; every group needs as many",
            option="num_groups",
        )
    return True


def require_same_model(load: ExpertLoad, placement: ExpertPlacement) -> None:
    """Check that a load and a placement have the same layers and experts.

    :raises InvalidLoad: if not
    """
    of_load = (load.num_layers, load.num_logical_experts)
    of_placement = (placement.num_layers, placement.num_logical_experts)
    if of_load != of_placement:
        raise InvalidLoad(
            f"the load has {of_load[0]} layers of {of_load[1]} logical experts, the placement {of_placement[0]} layers "
            f"of {of_placement[1]}"
        )


def require_complete(placement: ExpertPlacement, topology: EPTopology) -> None:
    """Check that a placement fits the topology, and has a replica of each expert in each layer.

    :raises InvalidPlacement: if it does not fit
    :raises UnplacedExpert: if an expert has none
    """
    placement.require_fit(topology)
    unplaced = placement.unplaced()
    if unplaced:
        layer, experts = next(iter(unplaced.items()))
        raise UnplacedExpert(
            f"layer {layer}: logical experts {list(experts)} have no replica; each needs one",
            layer=layer,
            logical_experts=experts,
        )


def require_same_kind(new: ExpertPlacement, current: ExpertPlacement, topology: EPTopology) -> None:
    """Check that weights can be moved from the current placement to a new one.

    :raises InvalidPlacement: if layers or experts differ, it does not fit the topology, or it lacks an expert
    """
    if new.num_layers != current.num_layers:
        raise LayerCountMismatch(
            f"it has {new.num_layers} layers; the current one has {current.num_layers}",
            expected=current.num_layers,
            actual=new.num_layers,
        )
    if new.num_logical_experts != current.num_logical_experts:
        raise InvalidPlacement(
            f"it has {new.num_logical_experts} logical experts; the current one has {current.num_logical_experts}",
        )
    require_complete(new, topology)


def require_policy_output(
    policy: object, output: object, current: ExpertPlacement, topology: EPTopology
) -> ExpertPlacement:
    """Return a policy's output, if it is a placement that weights can be moved to from the current one.

    :param policy: its ``repr`` names it in the message
    :raises InvalidPolicyOutput: if not; its cause has the reason
    """
    name = repr(policy)
    if not isinstance(output, ExpertPlacement):
        kind = type(output).__name__
        raise InvalidPolicyOutput(f"{name} returned a {kind}; a policy returns an ExpertPlacement", policy=name)
    try:
        require_same_kind(output, current, topology)
    except InvalidPlacement as error:
        raise InvalidPolicyOutput(f"{name} returned an invalid placement: {error}", policy=name) from error
    return output
