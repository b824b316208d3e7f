"""Memory for what a layer needs beside its slots: tables, map rows and checksums, and their way to the device."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from async_eplb.device import Device
from async_eplb.errors import EplbError

ALIGNMENT = 256
"""Slots and pieces of scratch begin at multiples of this, in bytes."""

_DTYPES = {np.dtype(np.int32): torch.int32, np.dtype(np.int64): torch.int64}


def aligned(nbytes: int) -> int:
    """Return the least multiple of :data:`ALIGNMENT` that holds so many bytes."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class Scratch:
    """Memory that is allocated once and handed out in pieces: on the device, and as much on the host for uploads.

    :param nbytes: of both; as many as the aligned pieces that are taken between two calls of :meth:`clear`
    """

    def __init__(self, device: Device, nbytes: int) -> None:
        self.nbytes = nbytes
        self._device = device
        self._on_device = device.allocate(nbytes)
        self._on_host = device.allocate_host(nbytes)
        self._uploaded = device.record()
        self._end = 0

    def clear(self) -> None:
        """Take all pieces back. Blocks until the device has read what was uploaded (rule 14)."""
        self._uploaded.synchronize()
        self._end = 0

    def take(self, nbytes: int) -> Tensor:
        """Return a piece of device memory, whatever it holds: uint8 ``[nbytes]``.

        :raises EplbError: if too little is left
        """
        return self._on_device[self._place(nbytes)]

    def upload(self, *arrays: npt.NDArray[np.integer]) -> list[Tensor]:
        """Copy arrays to a piece each, all at once, on the current stream; return them there.

        :param arrays: int32 or int64

        :raises EplbError: if too little is left
        """
        if not arrays:
            return []
        places = [self._place(array.nbytes) for array in arrays]
        on_host = self._on_host.numpy()
        for place, array in zip(places, arrays, strict=True):
            on_host[place] = array.reshape(-1).view(np.uint8)
        together = slice(places[0].start, places[-1].stop)
        self._on_device[together].copy_(self._on_host[together], non_blocking=True)
        self._uploaded = self._device.record()
        return [
            self._on_device[place].view(_DTYPES[array.dtype]).view(array.shape)
            for place, array in zip(places, arrays, strict=True)
        ]

    def _place(self, nbytes: int) -> slice:
        start, end = self._end, self._end + nbytes
        if end > self.nbytes:
            raise EplbError(
                f"scratch memory has {self.nbytes} bytes, of which {start} are in use: no room for {nbytes}"
            )
        self._end = aligned(end)
        return slice(start, end)
