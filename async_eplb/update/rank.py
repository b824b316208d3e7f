"""One rank and its parts."""

import json
from collections.abc import Callable
from dataclasses import dataclass

from async_eplb.commit.committer import Committer
from async_eplb.device import Device
from async_eplb.events.emit import GuardedLogger
from async_eplb.expert_map import ExpertMap, LayerCommit
from async_eplb.options import UpdateOptions, canonical
from async_eplb.staging import BufferSize
from async_eplb.topology import EPTopology
from async_eplb.transport.identity import Identity
from async_eplb.verify.column import Verifier
from async_eplb.weights import ExpertWeights
from async_eplb.workers import Workers


@dataclass(frozen=True, slots=True, eq=False)
class Rank:
    """One rank and what belongs to it. Handed whole to all that works on its updates, and replaced whole by a rebind.

    :param number: of the rank in the EP group
    :param name: of the updater; None if it has none
    :param live: live weights, as the caller gave them
    :param verifier: has them with a column more, which travels with each slot, if slots are verified
    :param expert_map: published maps
    :param buffer_size: of each staging buffer, equal on all ranks
    :param on_commit: the caller's hook, called with a layer right after its commit is enqueued, in the same thread
    """

    number: int
    name: str | None
    topology: EPTopology
    live: ExpertWeights
    verifier: Verifier
    expert_map: ExpertMap
    committer: Committer
    buffer_size: BufferSize
    device: Device
    workers: Workers
    logger: GuardedLogger
    options: UpdateOptions
    on_commit: Callable[[LayerCommit], None]

    @property
    def weights(self) -> ExpertWeights:
        """The tensors that move: live weights, and the verification column if there is one."""
        return self.verifier.weights

    @property
    def identity(self) -> Identity:
        """What ranks compare when they open a transport (rule 17)."""
        return Identity(self.name or "", self.live.digest().hex(), json.dumps(canonical(self.topology), sort_keys=True))

    @property
    def slots(self) -> slice:
        """This rank's physical experts among those of the group."""
        return self.topology.slots_of(self.number)

    @property
    def relay_peers(self) -> tuple[int, ...]:
        """Ranks of this node that experts are passed on to, or come from, if the planner relays."""
        return self.topology.neighbours_of(self.number) if self.options.planner.relays else ()
