"""Options of updates, and which of them ranks must agree on."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from itertools import pairwise
from numbers import Integral
from types import MappingProxyType

from async_eplb.agreement.lead import MAX_LEAD
from async_eplb.arguments import DEADLINE_S, Flag, OneOf, OrNone, Whole, settle
from async_eplb.errors import InvalidOptions
from async_eplb.plan import Planner
from async_eplb.verify.column import Verify

Canonical = str | int | None | Mapping[str, "Canonical"]

_AGREED = MappingProxyType({"agreed": True})
"""Metadata of fields that ranks must agree on; :meth:`UpdateOptions.wire` returns their values."""


@dataclass(frozen=True, slots=True)
class UpdateOptions:
    """How an updater works.

    An update is refused unless all ranks have the same ``verify``, ``planner``, ``staging_depth``, ``reserve_nbytes``
    and ``operations_per_group``, on which it depends what they send each other and in which order. The others, except
    for the logging options, should be equal too, but this is not checked.

    :param verify: ``"off"``; ``"canary"``: each slot carries the number of its logical expert, which is checked before
        and after the commit; ``"checksum"``: a checksum of its bytes too
    :param planner: how the sources of transfers are chosen
    :param staging_depth: layers that may be in staging at once; at least 2 for transfer and commit to overlap, 3 for
        the next transfer to begin without a pause, and one more where the planner relays: the layer that is passed on
    :param reserve_nbytes: device memory for staged slots, in bytes: all ``staging_depth`` buffers together, an equal
        share for each, rounded down to a multiple of 256. It is allocated when the updater is opened. None: a whole
        layer of this rank in each buffer, so that every update fits. With less, an update is refused if a rank would
        stage more of a layer than a buffer holds (:class:`StagingTooSmall`). Tables for commits and verification take
        about a hundredth more; :attr:`ExpertUpdater.reserved_nbytes` says the sum
    :param operations_per_group: sends and receives that a rank posts together at most; where launches are ordered, it
        posts no more at one step boundary, which bounds the serving thread's time
    :param open_timeout_s: how long opening waits for all ranks, also in a recovery, in seconds; longer than the slowest
        rank takes to load its model after the fastest
    :param transfer_timeout_s: deadline of one layer's exchange, and of its second hop, in seconds
    :param control_timeout_s: how long a control round waits for the slowest rank, in seconds; longer than
        ``transfer_timeout_s``, so that a rank which lost a transfer can still report it
    :param progress_timeout_s: how long a stage of an update may do one thing, in seconds: plan a layer, move it, wait
        until all ranks have staged it, wait for its boundary, commit it. Longer than ``control_timeout_s``
    :param lead: boundaries from a rank's last one to a fence, to begin with; larger after a step had to wait
    :param max_step_skew: an update is refused when ranks' step counts are further apart than this
    :param max_replicas: how many replicas of an expert :attr:`ExpertMap.logical_to_all_physical_map` has room for; None
        for what the slots can hold, or what fits an engine's table
    :param dispatch_seed: of the static dispatch map's even spread
    :param log_inputs: log shapes and both maps of each update
    :param log_decisions: log every slot's source and every send, at level debug
    :raises InvalidOptions: if an option is of another type or out of its range
    """

    verify: str = field(default="off", metadata=_AGREED)
    planner: Planner = field(default=Planner(), metadata=_AGREED)
    staging_depth: int = field(default=2, metadata=_AGREED)
    reserve_nbytes: int | None = field(default=None, metadata=_AGREED)
    operations_per_group: int = field(default=256, metadata=_AGREED)
    open_timeout_s: float = 300.0
    transfer_timeout_s: float = 30.0
    control_timeout_s: float = 60.0
    progress_timeout_s: float = 300.0
    lead: int = 2
    max_step_skew: int = 1000
    max_replicas: int | None = None
    dispatch_seed: int = 0
    log_inputs: bool = False
    log_decisions: bool = False

    def __post_init__(self) -> None:
        settle(
            self,
            InvalidOptions,
            verify=OneOf(tuple(mode.value for mode in Verify)),
            staging_depth=Whole(1),
            reserve_nbytes=OrNone(Whole(1)),
            operations_per_group=Whole(1),
            open_timeout_s=DEADLINE_S,
            transfer_timeout_s=DEADLINE_S,
            control_timeout_s=DEADLINE_S,
            progress_timeout_s=DEADLINE_S,
            lead=Whole(1, MAX_LEAD),
            max_step_skew=Whole(1),
            max_replicas=OrNone(Whole(1)),
            dispatch_seed=Whole(0),
            log_inputs=Flag(),
            log_decisions=Flag(),
        )
        if not isinstance(self.planner, Planner):
            raise InvalidOptions(f"planner is {self.planner!r}; it must be a Planner", option="planner")
        for short, long in pairwise(("transfer_timeout_s", "control_timeout_s", "progress_timeout_s")):
            least, value = getattr(self, short), getattr(self, long)
            if value <= least:
                raise InvalidOptions(
                    f"{long} is {value!r}; it must be more than {short}, which is {least}", option=long
                )

    def wire(self) -> dict[str, Canonical]:
        """Return the options that ranks must agree on, by name, as :func:`canonical` encodes them."""
        return {each.name: canonical(getattr(self, each.name)) for each in fields(self) if "agreed" in each.metadata}


def canonical(value: object) -> Canonical:
    """Encode a value so that it is the same on all ranks, whatever their versions of Python print.

    Strings, integers and None stay as they are, an Enum is its value, a dataclass (such as a :class:`Planner`) its
    fields by name. ``json.dumps`` with ``sort_keys=True`` takes the result.

    :raises TypeError: for anything else
    """
    if isinstance(value, Enum):
        return canonical(value.value)
    if isinstance(value, Integral):  # numpy's too
        return int(value)
    if value is None or isinstance(value, str):
        return value
    if is_dataclass(value):
        return {each.name: canonical(getattr(value, each.name)) for each in fields(value)}
    raise TypeError(f"{value!r} has no canonical form")
