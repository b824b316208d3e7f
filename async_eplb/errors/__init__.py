"""The error tree: every way an update can be refused or go wrong, by name.

There is a class where a caller can act on it otherwise than on its parent; the facts that this takes (layer, rank,
slot, sizes, limits) are attributes. The message gives all facts and what to do.
"""

from collections.abc import Sequence

from async_eplb.errors.base import EplbError as EplbError
from async_eplb.errors.connections import BrokenControlGroup as BrokenControlGroup
from async_eplb.errors.connections import BrokenLoadGroup as BrokenLoadGroup
from async_eplb.errors.connections import BrokenTransport as BrokenTransport
from async_eplb.errors.connections import BusyGroup as BusyGroup
from async_eplb.errors.connections import BusyTransport as BusyTransport
from async_eplb.errors.connections import InvalidGroup as InvalidGroup
from async_eplb.errors.connections import IpcUnavailable as IpcUnavailable
from async_eplb.errors.connections import NotAMember as NotAMember
from async_eplb.errors.connections import NoUsableTransport as NoUsableTransport
from async_eplb.errors.connections import OpenTimeout as OpenTimeout
from async_eplb.errors.connections import RankMismatch as RankMismatch
from async_eplb.errors.connections import TransferTimeout as TransferTimeout
from async_eplb.errors.connections import UpdaterMismatch as UpdaterMismatch

# --- Input that was refused; nothing has changed. ---


class InvalidTopology(EplbError, ValueError):
    """Ranks, nodes and slots do not fit together."""


class TooFewSlots(InvalidTopology):
    """There are fewer slots than logical experts, so that not every expert can be placed."""

    num_physical_experts: int
    num_logical_experts: int


class InvalidOptions(EplbError, ValueError):
    """An option, or an argument that chooses among ways to do something, is out of its range."""

    option: str


class UnreadableLog(EplbError, ValueError):
    """A log cannot be opened, or holds no event that can be read."""

    path: str


class MissingExtra(EplbError, ImportError):
    """Something needs a package that is not installed; ``pip install 'async-eplb[EXTRA]'`` brings it."""

    extra: str


class InvalidLoad(EplbError, ValueError):
    """A load is malformed, or does not fit the placement or the model that it is used with."""


class InvalidPlacement(EplbError, ValueError):
    """A placement is malformed, names experts that the model does not have, or does not fit the topology."""


class UnplacedExpert(InvalidPlacement):
    """A logical expert has no replica in the new placement."""

    layer: int
    logical_experts: tuple[int, ...]


class UnheldExpert(InvalidPlacement):
    """The new placement needs a logical expert that no rank holds under the old one."""

    logical_expert: int


class LayerCountMismatch(InvalidPlacement):
    """Old and new placement have different numbers of layers."""

    expected: int
    actual: int


class TooManyReplicas(InvalidPlacement):
    """An expert has more replicas than the published map has room for."""

    layer: int
    logical_expert: int
    replicas: int
    limit: int


class DeadRankPlaced(InvalidPlacement):
    """The new placement puts an expert on a rank that is gone."""

    layer: int
    rank: int


class InvalidPolicyOutput(InvalidPlacement):
    """A policy returned something that weights cannot be moved to."""

    policy: str


class InvalidWeights(EplbError, ValueError):
    """Live weights cannot be moved slot by slot as bytes, or are on several devices."""


class InvalidSlot(InvalidWeights):
    """A tensor has no memory to move slots to and from, or its slots are expanded or share memory."""

    tensor: str


class SlotCountMismatch(InvalidWeights):
    """The first dimension of a tensor is not the number of local physical experts."""

    tensor: str
    expected: int
    actual: int


class MovedWeights(InvalidWeights):
    """Live weights are not where they were when the updater was given them, and were not rebound.

    :param tensors: their names, with the row
    """

    tensors: tuple[str, ...]
    layers: tuple[int, ...]


class StagingTooSmall(EplbError):
    """A rank would stage more of a layer than a staging buffer holds. All ranks refuse such an update."""

    layer: int
    rank: int
    needed_nbytes: int
    reserved_nbytes: int


class MissingWeights(InvalidWeights):
    """A layer changes, but the updater was given no weights for it."""

    layer: int


class InvalidTable(EplbError, ValueError):
    """A tensor of an engine cannot be published into: another dtype, shape or device, too narrow, or shared memory."""

    table: str


class MissingTable(EplbError, AttributeError):
    """A table was asked for that the maps are not published into."""

    table: str


class PlacementDisagreement(EplbError):
    """Ranks began the same update with different placements, topologies, weight layouts or options."""

    digests: tuple[int, ...]
    ranks: tuple[int, ...]


class GenerationMismatch(EplbError):
    """Ranks that should begin the same update have begun different numbers of updates before."""

    generations: tuple[int, ...]


class StepMismatch(EplbError):
    """Ranks have passed different numbers of step boundaries, or a rank has skipped one."""

    steps: tuple[int, ...]


class SkippedPass(StepMismatch):
    """The number of a step is not the next one: this rank has skipped forward passes, or repeated one."""


# --- Use at the wrong time. ---


class BusyUpdater(EplbError, RuntimeError):
    """An update, or a rebalancer, is running already; each runs one at a time."""


class ClosedUpdater(EplbError, RuntimeError):
    """The updater is not open: not entered yet, closed, or closed by an earlier failure."""


class WrongEventLoop(EplbError, RuntimeError):
    """An object was used from another thread, or from another event loop, than it was opened in."""


class ClosedRebalancer(EplbError, RuntimeError):
    """A rebalancer does not run, or was cancelled before it made the rebalance that was demanded."""


# --- What went wrong while weights moved. ---


class RebalanceFailed(EplbError):
    """A demanded rebalance failed; the cause says why, and the rebalancer's task has raised it too."""

    number: int


class InvalidBallot(EplbError, ValueError):
    """Another rank sent a ballot in a control round that no rank of this version sends."""

    row: tuple[int, ...]


class UpdateNotBegun(EplbError):
    """Other ranks did not begin the update in time; nothing was moved."""

    generation: int
    ranks: tuple[int, ...]
    timeout_s: float


class UpdateCancelled(EplbError):
    """The caller of a rank cancelled the update; all ranks ended it after the same layer."""

    ranks: tuple[int, ...]


class UpdateAborted(EplbError):
    """Another rank failed; all ranks ended the update after the same layer and closed."""

    ranks: tuple[int, ...]


class UpdateStalled(EplbError):
    """A stage of an update has done one thing for too long. The event of the same name lists what all stages did.

    :param stage: plan, transfer, relay, agree or commit
    :param doing: what the stage did
    :param waiting_for: ranks that it waits for, as far as their last ballots show
    """

    layer: int
    stage: str
    doing: str
    timeout_s: float
    waiting_for: tuple[int, ...]


class CommitFailed(EplbError):
    """This rank could not copy a layer that all ranks had agreed on. It must not serve before it recovers.

    The layer's live slots may contain anything; its staging is kept, and ``recover()`` copies it anew.
    """

    rank: int
    layer: int
    step: int


class RankInDoubt(EplbError):
    """This rank cannot know whether a peer has committed a layer: the control round that decides it was lost.

    :param missing: ranks that sent no ballot, as far as this is known
    """

    step: int
    boundary: int
    missing: tuple[int, ...] = ()


class Unrecoverable(EplbError):
    """The remaining ranks cannot reach the same layers: one has committed a layer that another has no bytes of.

    :param ranks: ranks that have no bytes of these layers
    """

    ranks: tuple[int, ...]
    layers: tuple[int, ...]


class InvalidWeightSource(EplbError, ValueError):
    """A source of weights does not hold an expert, or holds it in another size."""

    layer: int
    logical_expert: int


class VerificationError(EplbError):
    """Bytes that arrived, or were committed, are not those of the expert that the slot should contain."""

    layer: int
    rank: int
    slots: tuple[int, ...]
    expected: Sequence[int]
    actual: Sequence[int]


class CanaryMismatch(VerificationError):
    """A slot's canary names another logical expert than the new map does."""


class ChecksumMismatch(VerificationError):
    """A slot's bytes do not have the checksum that the sending rank computed."""


class WorldError(EplbError):
    """A process of a local world failed; the message carries its traceback."""

    rank: int
