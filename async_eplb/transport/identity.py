"""Which updater a transport is opened for: what all ranks must have in common, so that two are never mixed. Pure."""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass

from async_eplb.errors import BusyGroup, UpdaterMismatch


@dataclass(frozen=True, slots=True)
class Identity:
    """What one rank opens a transport for.

    :param name: of the updater; empty if it has none
    :param weights: digest of the layout of its live weights
    :param topology: shape of its EP group
    """

    name: str = ""
    weights: str = ""
    topology: str = ""

    def to_json(self, *, taken: bool = False) -> str:
        """Return what other ranks are told.

        :param taken: whether an updater of this name is open on the group already
        """
        return json.dumps([asdict(self), taken])


def require_one(texts: Sequence[str], rank: int) -> None:
    """Check that all ranks open the same updater, and none that is open already. Every rank draws the same conclusion.

    :param texts: what :meth:`Identity.to_json` returned on each rank
    :param rank: that asks, for messages
    :raises UpdaterMismatch: if names or layouts differ
    :raises BusyGroup: if it is open already
    """
    told = [_read(text) for text in texts]
    names = tuple(identity.name for identity, _ in told)
    for key, label in _LABELS.items():
        values: dict[str, list[int]] = defaultdict(list)
        for place, (identity, _) in enumerate(told):
            values[getattr(identity, key)].append(place)
        if len(values) > 1:
            parts = ", ".join(f"{value or None!r} on ranks {ranks}" for value, ranks in values.items())
            raise UpdaterMismatch(
                f"rank {rank}: ranks open different updaters over one transport: {label} is {parts}; ranks make "
                "their updaters and transports in one order, and give each the same name, weights and topology",
                names=names,
            )
    ranks = tuple(place for place, (_, taken) in enumerate(told) if taken)
    if ranks:
        which = f"named {names[rank]!r}" if names[rank] else "without a name"
        raise BusyGroup(
            f"rank {rank}: an updater {which} is open on this group already, on ranks {list(ranks)}; leave it "
            "first, or give each updater of a group its own name: ExpertUpdater(name=...)",
            updater=names[rank],
            ranks=ranks,
        )


def _read(text: str) -> tuple[Identity, bool]:
    """Read what :meth:`Identity.to_json` wrote; anything else is an identity that no rank of this version has."""
    try:
        fields, taken = json.loads(text)
        identity = Identity(**fields)
    except (ValueError, TypeError, RecursionError):
        return Identity(name=f"of another version ({text[:40]})"), False
    return Identity(*map(str, astuple(identity))), taken is True


_LABELS = {"name": "the name", "weights": "the layout of the weights", "topology": "the topology"}
