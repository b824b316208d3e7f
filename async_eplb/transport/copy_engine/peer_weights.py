"""Live weights of the ranks of a host: each rank offers its own, maps the others', and reads them by copies."""

import json
import socket
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from async_eplb.device import Device, DeviceEvent, until_passed
from async_eplb.groups import host_id
from async_eplb.transport.copy_engine.cuda_ipc import Copies, PeerMemory, Step
from async_eplb.transport.copy_engine.turns import Turns, sources_of
from async_eplb.transport.exchange import Exchange, Pull, Pulls
from async_eplb.weights import ExpertWeights
from async_eplb.workers import Workers

CLOSE_TIMEOUT_S = 5.0
"""How long copies that are under way, and other ranks, are waited for at the end."""


@dataclass(frozen=True, slots=True)
class Offer:
    """The weights of one rank that others may read.

    :param host: equal for processes of one host
    :param host_name: for messages
    :param handles: of allocations
    :param slots: row → for each tensor, for each slot: number of the allocation, and offset there in bytes
    :param turns: path of the cells by which peers signal to this rank that its turn has come
    """

    host: str
    host_name: str
    handles: list[str]
    slots: dict[int, list[list[tuple[int, int]]]]
    turns: str

    def to_json(self) -> str:
        """Return the offer as text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Offer":
        """Return the offer that :meth:`to_json` wrote.

        :raises RuntimeError: if it is something else
        """
        try:
            fields = json.loads(text)
            slots = {
                int(row): [[(int(number), int(offset)) for number, offset in places] for places in tensors]
                for row, tensors in fields["slots"].items()
            }
            handles = [bytes.fromhex(handle).hex() for handle in fields["handles"]]
            every = [places for tensors in slots.values() for places in tensors]
            if not {number for places in every for number, _ in places} <= set(range(len(handles))):
                raise ValueError("a slot is in an allocation that is not offered")  # noqa: TRY301 - one answer to all
            if len({len(places) for places in every}) > 1:
                raise ValueError("tensors have different numbers of slots")  # noqa: TRY301
            return cls(str(fields["host"]), str(fields["host_name"]), handles, slots, str(fields["turns"]))
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise RuntimeError(f"a rank's offer makes no sense; does it run this version? ({error!r})") from error


_HUNG: "list[PeerWeights]" = []
"""Objects that were closed while copies were under way; their memory must stay for good."""


class PeerWeights:
    """The live weights of other ranks that this rank has mapped.

    :param memory: maps and copies memory of other processes
    :param workers: whose threads do all this
    :raises OSError: if there is no shared memory for turns
    """

    def __init__(self, memory: PeerMemory, device: Device, workers: Workers, rank: int, num_ranks: int) -> None:
        self.workers = workers
        self._memory = memory
        self.device = device
        self.end = device.record()
        """Of all copies so far."""
        self._mappings: list[int] = []
        self._rank = rank
        self._places: dict[tuple[int, int], npt.NDArray[np.int64]] = {}
        """Peer and row → ``[slots, tensors]``: addresses where slots are mapped."""
        self.turns = Turns(rank, num_ranks)

    def offer(self, weights: ExpertWeights) -> Offer:
        """Export live weights."""
        numbers: dict[int, int] = {}
        handles: list[str] = []
        exported: dict[int, tuple[int, int]] = {}
        """Address of a storage → number and address of its allocation."""

        def place(view: Tensor) -> tuple[int, int]:
            storage = view.untyped_storage().data_ptr()
            if storage not in exported:
                base, handle = self._memory.export(storage)
                exported[storage] = numbers.setdefault(base, len(handles)), base
                if len(numbers) > len(handles):
                    handles.append(handle.hex())
            number, base = exported[storage]
            return number, view.data_ptr() - base

        slots = {
            row: [[place(view) for view in tensor.views] for tensor in weights.tensors[row]] for row in weights.rows
        }
        return Offer(host_id(), socket.gethostname(), handles, slots, self.turns.path)

    @property
    def ranks(self) -> frozenset[int]:
        """Ranks whose weights are mapped."""
        return frozenset(peer for peer, _ in self._places)

    def map(self, offers: list[Offer], *, within_host: bool) -> None:
        """Map the offers of all other ranks, or of those of this host.

        :raises RuntimeError: if an allocation cannot be mapped, or a rank is on another host and that is not allowed
        """
        here = offers[self._rank]
        for peer, offer in enumerate(offers):
            if peer == self._rank or (within_host and offer.host != here.host):
                continue
            if offer.host != here.host:
                raise RuntimeError(f"rank {peer} is on another host, {offer.host_name}; this is {here.host_name}")
            bases = [self._open(peer, bytes.fromhex(handle)) for handle in offer.handles]
            for row, tensors in offer.slots.items():
                mapped = [[bases[number] + offset for number, offset in places] for places in tensors]
                self._places[peer, row] = np.array(mapped, dtype=np.int64).T
        self.turns.map({peer: offers[peer].turns for peer in self.ranks}, self._memory.map_host)

    def warm_up(self) -> None:
        """Read a byte of each mapping, and take a turn, which not every system's driver can.

        A device's first copy from another takes a tenth of a second.
        """
        with self.device.transferring():
            target = self.device.allocate(1)
            read = Copies.of([(target.data_ptr(), address, 1) for address in self._mappings])
            self._copy([Step(read, *self.turns.trial())])
        self.end.synchronize()

    def pull(self, exchange: Exchange) -> DeviceEvent:
        """Enqueue all pulls of an exchange, behind the transfer stream; return their end.

        From one peer after another, the next rank first: so ranks that begin together begin with different ones.

        :raises RuntimeError: if a pull is from a rank that is not mapped, or a copy cannot be enqueued
        """
        steps = [] if exchange.pulls is None else self._steps(exchange.row, exchange.pulls)
        with self.device.transferring():
            self._copy(steps)
        return self.end

    def hold_up(self) -> None:
        """Make the transfer stream, and so the next user of staging, wait for copies that nobody waits for any more."""
        self.turns.release()
        with self.device.transferring():
            self.device.wait(self.end)

    def close(self) -> None:
        """Unmap everything, unless copies are still under way after a while: these must not lose their source."""
        self.turns.unlink()
        self.turns.release()
        self._places.clear()
        try:
            until_passed(self.end, time.monotonic() + CLOSE_TIMEOUT_S)
        except TimeoutError:
            _HUNG.append(self)
            return
        while self._mappings:
            self._memory.close(self._mappings.pop())
        self.turns.unmap(self._memory.unmap_host)

    def _steps(self, row: int, pulls: Pulls) -> list[Step]:
        by_peer: dict[int, list[Pull]] = defaultdict(list)
        for pull in pulls.slots:
            by_peer[pull.peer].append(pull)
        steps = []
        for peer in sources_of(self._rank, self.turns.members):
            slots = by_peer.pop(peer, [])
            sources = self._places[peer, row][np.array([pull.src_slot for pull in slots], dtype=np.int64)]
            targets = pulls.memory.addresses([pull.dst_slot for pull in slots])
            nbytes = np.broadcast_to(np.array(pulls.memory.slot_nbytes, dtype=np.int64), targets.shape)
            copies = Copies(targets.ravel(), sources.ravel(), nbytes.ravel())
            steps.append(Step(copies, *(self.turns.around(peer) if pulls.in_turn else ())))
        if by_peer:
            raise RuntimeError(f"nothing is mapped of ranks {sorted(by_peer)}")
        if pulls.in_turn:
            self.turns.advance()
        return steps

    def _copy(self, steps: Sequence[Step]) -> None:
        try:
            self._memory.copy(steps)
        finally:
            self.end = self._memory.end()

    def _open(self, peer: int, handle: bytes) -> int:
        try:
            address = self._memory.open(handle)
        except RuntimeError as error:
            raise RuntimeError(f"the weights of rank {peer} cannot be mapped: {error}") from error
        self._mappings.append(address)
        return address
