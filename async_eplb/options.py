"""What a caller can choose about updates."""

import math
from dataclasses import dataclass

from async_eplb.agreement.lead import MAX_LEAD
from async_eplb.errors import InvalidOptions
from async_eplb.plan import Planner
from async_eplb.verify.column import Verify


@dataclass(frozen=True, slots=True)
class UpdateOptions:
    """How an updater works. Equal on all ranks, except for the logging options.

    :param verify: ``"off"``; ``"canary"``: each slot carries its logical expert, checked before and after the
        commit; ``"checksum"``: a checksum of its bytes too
    :param planner: how the sources of transfers are chosen, and how many peers a rank talks with at a time
    :param staging_depth: layers that may be in staging at once; at least 2 for transfer and commit to overlap, 3 for
        the next transfer to begin without a pause, and one more where the planner relays: the layer that is passed on
    :param operations_per_group: sends and receives that a rank posts together at most; where launches are ordered, it
        posts no more at one step boundary, which bounds the serving thread's time
    :param transfer_timeout_s: deadline of one layer's exchange, and of its second hop, in seconds
    :param control_timeout_s: how long a control round waits for the slowest rank, in seconds; longer than
        ``transfer_timeout_s``, so that a rank which lost a transfer can still say so
    :param progress_timeout_s: how long a stage of an update may do one thing, in seconds: plan a layer, move it, wait
        until all ranks have staged it, wait for its boundary, commit it. Longer than ``control_timeout_s``
    :param lead: boundaries from a rank's last one to a fence, to begin with; larger after a step had to wait
    :param max_step_skew: an update is refused when ranks' step counts are further apart than this
    :param max_replicas: fixed width of :attr:`ExpertMap.logical_to_all_physical_map`; None for what the slots
        can hold
    :param dispatch_seed: of the static dispatch map's even spread
    :param log_inputs: log shapes and both maps of each update
    :param log_decisions: log every slot's source and every send, at level debug
    :raises InvalidOptions: if a number is out of range
    """

    verify: str = "off"
    planner: Planner = Planner()  # noqa: RUF009 - it is immutable
    staging_depth: int = 2
    operations_per_group: int = 256
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
        modes = [mode.value for mode in Verify]
        rules = {
            "verify": (self.verify in modes, f"one of {', '.join(modes)}"),
            "staging_depth": (self.staging_depth >= 1, "at least 1"),
            "operations_per_group": (self.operations_per_group >= 1, "at least 1"),
            "transfer_timeout_s": (0 < self.transfer_timeout_s < math.inf, "more than 0"),
            "control_timeout_s": (
                self.transfer_timeout_s < self.control_timeout_s < math.inf,
                f"more than transfer_timeout_s, which is {self.transfer_timeout_s}",
            ),
            "progress_timeout_s": (
                self.control_timeout_s < self.progress_timeout_s < math.inf,
                f"more than control_timeout_s, which is {self.control_timeout_s}",
            ),
            "lead": (1 <= self.lead <= MAX_LEAD, f"from 1 to {MAX_LEAD}"),
            "max_step_skew": (self.max_step_skew >= 1, "at least 1"),
            "dispatch_seed": (self.dispatch_seed >= 0, "at least 0"),
            "max_replicas": (self.max_replicas is None or self.max_replicas >= 1, "at least 1"),
        }
        for option, (holds, limit) in rules.items():
            if not holds:
                raise InvalidOptions(f"{option} is {getattr(self, option)!r}; it must be {limit}", option=option)
