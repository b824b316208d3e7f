"""What the verification modes cost for each layer, and how fast the checksum reads, against one flat copy.

A layer has the shapes of DeepSeek-V3 in FP8: w13 [4096, 7168], w2 [7168, 2048] and their block scales in fp32, 44 MB an
expert; 9 slots of a rank, all of which move. For each mode, *layer*: marking the slots before they are sent, comparing
what is staged and comparing what is live, as an update does it beside serving, from an idle device on; its time on the
clock, which has the waiting for the device in it, and the thread's own. For the checksum of all slots: the device's
time, behind a sleep so that it holds no host time, and the host's. Bandwidth counts bytes read, of the copy those
written too. Two layers and two pairs of flat buffers take turns, each larger than the L2 cache. Without a CUDA device
it runs on the CPU: make it small.

Predicted before the first measurement, for an H100 with Triton. The checksum reads every byte once, in one launch; with
torch's operations each byte is read three times and written once, in four launches a tensor (it was twelve times, in
nine). So 0.16 ms for 396 MB, 2.5 TB/s, 0.55 of a flat copy's time, and 100 µs of host time; with torch's operations
0.65 ms and 1 ms. A layer: off 20 µs, canary 0.2 ms, checksum 1.0 ms, half of it on the device.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median

import numpy as np
import torch
from torch import Tensor

from async_eplb import ExpertWeights
from async_eplb.device import Device, device_for
from async_eplb.scratch import Scratch
from async_eplb.staging import BufferSize, StagingPool
from async_eplb.verify.checksum import plain_checksums
from async_eplb.verify.column import Verifier, Verify, checksum_scratch_nbytes, checksums
from benchmarks._device_time import device_time_ms

_NUM_ROWS = 2
_NUM_WARM_UPS = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the shapes, and how much is measured."""
    parser.add_argument("--slots", type=int, default=9, help="of the rank (default: 9)")
    parser.add_argument("--hidden", type=int, default=7168, help="width of the model (default: 7168)")
    parser.add_argument("--intermediate", type=int, default=2048, help="width of an expert (default: 2048)")
    parser.add_argument("--runs", type=int, default=100, help="runs of each way; medians are shown (default: 100)")


def run(options: argparse.Namespace) -> dict[str, float]:
    """Return medians: microseconds of a layer in each mode; bandwidth and microseconds of the checksum and the copy."""
    device = device_for(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    tensors = {row: _tensors(device, options) for row in range(_NUM_ROWS)}
    layers = {mode: _Layers(device, tensors, mode) for mode in Verify}
    nbytes = sum(tensor.nbytes for tensor in tensors[0])
    slots = [
        [layers[Verify.OFF].live.slot_views(row, slot) for slot in range(options.slots)] for row in range(_NUM_ROWS)
    ]
    scratch = Scratch(device, checksum_scratch_nbytes(options.slots, len(tensors[0])))
    flat = [[_random(device, nbytes) for _ in range(2)] for _ in range(_NUM_ROWS)]
    ways: dict[str, tuple[Callable[[], object], ...]] = {
        "checksum": tuple(partial(_checksums, each, scratch) for each in slots),
        "torch_checksum": tuple(partial(plain_checksums, each) for each in slots),
        "flat_copy": tuple(partial(dst.copy_, src) for src, dst in flat),
    }
    layer_us: dict[str, list[tuple[float, float]]] = {mode.value: [] for mode in Verify}
    way_us: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for number in range(-_NUM_WARM_UPS, options.runs):
        row = number % _NUM_ROWS
        timed = {mode.value: _timed(device, partial(layers[mode].verify, row)) for mode in Verify}
        measured = {
            name: (_device_us(device, calls[row]), _timed(device, calls[row])[0]) for name, calls in ways.items()
        }
        if number >= 0:
            for mode, each in timed.items():
                layer_us[mode].append(each)
            for name, pair in measured.items():
                way_us[name].append(pair)
    figures: dict[str, float] = {"layer_mb": nbytes / 1e6}
    for mode, times in layer_us.items():
        figures[f"{mode}_layer_us"], figures[f"{mode}_layer_thread_us"] = (
            median(each) for each in zip(*times, strict=True)
        )
    for name, pairs in way_us.items():
        on_device, on_host = (median(each) for each in zip(*pairs, strict=True))
        figures |= {f"{name}_us": on_device, f"{name}_host_us": on_host}
        figures[f"{name}_gb_s"] = nbytes * (2 if name == "flat_copy" else 1) / on_device / 1e3
    figures["checksum_over_flat_copy"] = figures["checksum_us"] / figures["flat_copy_us"]
    figures["torch_checksum_over_checksum"] = figures["torch_checksum_us"] / figures["checksum_us"]
    return figures


def _checksums(slots: Sequence[Sequence[Tensor]], scratch: Scratch) -> Tensor:
    scratch.clear()
    return checksums(slots, scratch)


class _Layers:
    """Live and staged slots of layers that an update in one mode moves, all of them right."""

    def __init__(self, device: Device, tensors: dict[int, list[Tensor]], mode: Verify) -> None:
        self._device = device
        self.live = ExpertWeights(tensors)
        self._verifier = Verifier(mode, self.live, rank=0)
        weights = self._verifier.weights
        self._experts = np.arange(self.live.num_local_physical_experts)
        self._slots = range(len(self._experts))
        size = BufferSize(
            StagingPool.layer_nbytes(len(self._slots), weights.slot_nbytes(0)), self._verifier.scratch_nbytes(0)
        )
        pool = StagingPool(_NUM_ROWS, device, size)
        pool.allocate()
        self._scratch = [buffer.scratch for buffer in pool.buffers]
        self._content: list[list[dict[int, tuple[Tensor, ...]]]] = []
        for row, buffer in enumerate(pool.buffers):
            buffer.lay_out(self._slots, weights.slot_nbytes(row))
            live = {slot: weights.slot_views(row, slot) for slot in self._slots}
            staged = {slot: buffer.views(slot) for slot in self._slots}
            self._verifier.mark(row, self._experts, self._slots, buffer.scratch)
            for slot in self._slots:
                for there, here in zip(staged[slot], live[slot], strict=True):
                    there.copy_(here)
            self._content.append([staged, live])
        self._synchronize()

    def verify(self, row: int) -> None:
        """Do all that an update does to verify a layer."""
        scratch = self._scratch[row]
        scratch.clear()
        with self._device.transferring():
            self._verifier.mark(row, self._experts, self._slots, scratch)
        experts = dict(enumerate(self._experts.tolist()))
        for content, where in zip(self._content[row], ("staged", "live"), strict=True):
            with self._device.committing():
                self._verifier.check(row, experts, content, where, scratch)

    def _synchronize(self) -> None:
        self._device.record().synchronize()


def _tensors(device: Device, options: argparse.Namespace) -> list[Tensor]:
    hidden, intermediate, block = options.hidden, options.intermediate, 128
    fp8, fp32 = torch.float8_e4m3fn, torch.float32
    shapes = (
        (fp8, (2 * intermediate, hidden)),
        (fp8, (hidden, intermediate)),
        (fp32, (-(-2 * intermediate // block), -(-hidden // block))),
        (fp32, (-(-hidden // block), -(-intermediate // block))),
    )
    return [
        _random(device, options.slots * int(np.prod(shape)) * dtype.itemsize).view(dtype).view(options.slots, *shape)
        for dtype, shape in shapes
    ]


def _random(device: Device, nbytes: int) -> Tensor:
    return device.allocate(nbytes).random_(0, 256)


def _timed(device: Device, call: Callable[[], object]) -> tuple[float, float]:
    """Return microseconds on the clock and of this thread, from an idle device on."""
    device.record().synchronize()
    start, own = time.perf_counter(), time.thread_time()
    call()
    return (time.perf_counter() - start) * 1e6, (time.thread_time() - own) * 1e6


def _device_us(device: Device, call: Callable[[], object]) -> float:
    if device.torch_device.type == "cpu":
        return _timed(device, call)[0]
    return device_time_ms(call) * 1e3
