"""The log schema: every event as it is logged, whole."""

import json
import logging
import re
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import ANY

import anyio
import pytest
import structlog
import trio
import trio.testing
from structlog.testing import LogCapture
from support.helpers import memory_world, on_all, together
from support.logs import DROPPED, PASSES
from test_rebalancer import REBALANCE_FINISHED

from async_eplb import EPTopology, ExpertPlacement, UpdateOptions
from async_eplb.errors import UpdateStalled
from async_eplb.events import schema as events
from async_eplb.events.emit import emit
from async_eplb.events.reference import event_reference
from async_eplb.events.schema import EVENTS, STAMPS, Event, field_names
from async_eplb.load.value import ExpertLoad
from async_eplb.policy import Hierarchical, RebalanceTerms, choose
from async_eplb.testing.workers import ScheduledWorkers
from async_eplb.transport import MemorySchedule
from async_eplb.workers import Work

T = TypeVar("T")

TOPOLOGY = EPTopology(num_ranks=4, num_nodes=2, num_local_physical_experts=6)
OLD_ROW = [0, 1, 2, 3, 4, 5] + [6] * 6 + [7] * 12
NEW_ROW = [0, 2, 6, 6, 7, -1] + [1] * 6 + [3] * 6 + [4, 5, 7, 7, 7, 7]
"""On rank 0 each of the six sources occurs once. An expert has 204 bytes."""

SCRATCH_NBYTES = 256 + 1280 + 256 + 256
"""Map rows of 24 physical experts, and of 8 logical ones with up to 17 replicas, as int64 and aligned."""

SCHEDULE = MemorySchedule(exchange_s=0.5, control_s=0.125)
WORK_S = {"plan": 0.25, "commit": 0.25}
"""Times are sums of powers of two, so that they are exact. A staged layer waits for two rounds: the one that is under
way, and its own."""

HOST_TIME = ANY
"""Time of the serving thread, which no virtual clock sets."""


def stamped(name: str, level: str = "info") -> dict[str, Any]:
    """Return the keys of every event, as rank 0 logs it in its first update and before its first step."""
    return {
        "event": name,
        "log_level": level,
        "schema_version": 1,
        "run_id": ANY,
        "monotonic_s": ANY,
        "wall_s": ANY,
        "generation": 1,
        "rank": 0,
        "layer": None,
        "step": 0,
    }


UPDATE_OF_ONE_LAYER: list[dict[str, Any]] = [
    {
        **stamped("eplb.update.started"),
        "mode": "exclusive",
        "num_ranks": 4,
        "num_nodes": 2,
        "num_layers": 1,
        "num_unchanged_layers": 1,
        "staging_nbytes": 2 * (6 * 5 * 256 + SCRATCH_NBYTES),
    },
    {
        **stamped("eplb.update.inputs_logged"),
        "num_ranks": 4,
        "num_nodes": 2,
        "num_ranks_per_node": 2,
        "num_local_physical_experts": 6,
        "weight_shapes": {1: [[6, 8, 8], [6, 8, 4], [6, 8], [6, 8, 2], [6]]},
        "staged_slots": [3],
        "layers": [1],
        "old_physical_to_logical_map": [OLD_ROW],
        "new_physical_to_logical_map": [NEW_ROW],
    },
    {
        **stamped("eplb.layer.planned"),
        "layer": 1,
        "duration_ms": 250.0,
        "num_same_gpu": 1,
        "num_free_rider": 1,
        "num_same_node": 1,
        "num_cross_node": 1,
        "num_sends": 4,
    },
    {
        **stamped("eplb.layer.decided", "debug"),
        "layer": 1,
        "slot_sources": ["unchanged", "same_gpu", "same_node", "free_rider", "cross_node", "empty"],
        "local_copies": [{"src_slot": 2, "dst_slot": 1}],
        "recvs": [
            {"logical_expert": 6, "src_rank": 1, "dst_slot": 2},
            {"logical_expert": 7, "src_rank": 2, "dst_slot": 4},
        ],
        "sends": [
            {"logical_expert": 1, "dst_rank": 1, "src_slot": 1},
            {"logical_expert": 3, "dst_rank": 2, "src_slot": 3},
            {"logical_expert": 4, "dst_rank": 3, "src_slot": 4},
            {"logical_expert": 5, "dst_rank": 3, "src_slot": 5},
        ],
        "fan_outs": [{"staged_slot": 2, "dst_slot": 3}],
        "relays": [],
    },
    {
        **stamped("eplb.layer.transferred"),
        "layer": 1,
        "duration_ms": 500.0,
        "copied_nbytes": 204,
        "sent_nbytes": 816,
        "sent_to_ranks": [1, 2, 3],
        "sent_nbytes_by_rank": [204, 204, 408],
        "sent_nbytes_by_node": [204, 612],
        "sent_nbytes_within_node": 204,
        "sent_nbytes_across_nodes": 612,
        "received_nbytes": 408,
        "received_from_ranks": [1, 2],
        "received_nbytes_by_rank": [204, 204],
        "received_nbytes_by_node": [204, 204],
        "received_nbytes_within_node": 204,
        "received_nbytes_across_nodes": 204,
    },
    {
        **stamped("eplb.layer.committed"),
        "layer": 1,
        "duration_ms": 250.0,
        "copy_ms": HOST_TIME,
        "wait_ms": 250.0,
        "num_slots": 4,
        "nbytes": 816,
    },
    {
        **stamped("eplb.update.finished"),
        "duration_ms": 1375.0,
        "plan_ms": 250.0,
        "transfer_ms": 500.0,
        "wait_ms": 250.0,
        "commit_ms": 250.0,
        "overlap": 1000 / 1375,
        "num_layers": 1,
        "sent_nbytes_within_node": 204,
        "sent_nbytes_across_nodes": 612,
        "received_nbytes_within_node": 204,
        "received_nbytes_across_nodes": 204,
    },
]

END_OF_A_CANCELLED_UPDATE: dict[str, Any] = {
    **stamped("eplb.update.failed", "warning"),
    "duration_ms": 1375.0,
    "error": "UpdateCancelled",
    "error_message": "ranks [1] cancelled the update after 1 of 2 layers",
    "committed_layers": [0],
}

UNTIL_A_FENCE_S = 0.8125
"""A round shows the layer staged at 0.75 s; the next one, which carries the fence, takes until 0.875 s."""

WAIT_AT_A_FENCE: dict[str, Any] = {
    **stamped("eplb.fence.waited", "warning"),
    "step": 1,
    "duration_ms": HOST_TIME,
    "lead": 2,
}

STALL: dict[str, Any] = {
    **stamped("eplb.update.stalled", "warning"),
    "layer": 0,
    "stage": "commit",
    "doing": "copying",
    "duration_ms": 4000.0,
    "stages": ["commit: layer number 0, copying"],
    "buffers": ["<StagingBuffer 0 staged: slots [0, 1, 2, 3]>", "<StagingBuffer 1 free: slots []>"],
    "rank_states": ["staged 1, launchable 0, finished 0, fence 0, step 0, OK"],
}

EVALUATED_REBALANCE: dict[str, Any] = {
    **stamped("eplb.rebalance.evaluated"),
    "generation": 3,
    "rank": 1,
    "step": 7,
    "policy": "Hierarchical(num_groups=2)",
    "pays": True,
    "reason": "pays",
    "num_layers": 2,
    "num_changed_layers": 1,
    "mean_balancedness_before": 0.75,
    "mean_balancedness_after": 1.0,
    "min_balancedness_before": 0.5,
    "min_balancedness_after": 1.0,
    "num_receives": 2,
    "num_slots": 4,
    "received_nbytes": 2048,
    "transfer_ms": 500.0,
    "saved_ms_per_step": 125.0,
    "horizon_steps": 16,
}


@cache
def log_of_an_update() -> list[dict[str, Any]]:
    """Return what rank 0 logs when the second of two layers changes, with everything that can be logged."""
    old, new = (ExpertPlacement.from_mapping([OLD_ROW, row], 8) for row in (OLD_ROW, NEW_ROW))
    return _log_of_rank_0(old, new, UpdateOptions(log_inputs=True, log_decisions=True))


@cache
def log_of_a_cancelled_update() -> list[dict[str, Any]]:
    """Return what rank 0 logs when both layers change and rank 1 cancels while the first is being transferred."""
    old, new = (ExpertPlacement.from_mapping([row, row], 8) for row in (OLD_ROW, NEW_ROW))
    return _log_of_rank_0(old, new, UpdateOptions(staging_depth=1), cancel_rank_1_after_s=0.5)


def _log_of_rank_0(
    old: ExpertPlacement, new: ExpertPlacement, options: UpdateOptions, cancel_rank_1_after_s: float | None = None
) -> list[dict[str, Any]]:
    captures = [LogCapture() for _ in range(TOPOLOGY.num_ranks)]
    loggers = [
        structlog.wrap_logger(
            None, processors=[capture], wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG)
        )
        for capture in captures
    ]

    async def update() -> None:
        async with memory_world(
            old,
            TOPOLOGY,
            schedule=SCHEDULE,
            options=options,
            workers=lambda: ScheduledWorkers(WORK_S),
            loggers=loggers,
        ) as ranks:

            async def update_rank_1() -> None:
                with anyio.move_on_after(cancel_rank_1_after_s):
                    await ranks[1].updater.update(new)

            others = [rank.updater for rank in ranks if rank is not ranks[1]]
            await together([update_rank_1, *(partial(updater.update, new) for updater in others)])

    trio.run(update, clock=trio.testing.MockClock(autojump_threshold=0))
    return [dict(entry) for entry in captures[0].entries]


def test_a_wait_at_a_fence_is_logged_completely() -> None:
    """The rank steps while a round that carries its fence is under way, and later fences are further ahead."""
    alone = EPTopology(num_ranks=1, num_nodes=1, num_local_physical_experts=4)
    old, new = (ExpertPlacement.from_mapping([row]) for row in ([0, 1, 2, 3], [3, 2, 1, 0]))
    capture = LogCapture()
    logger = structlog.wrap_logger(None, processors=[capture])

    async def serve() -> None:
        async with memory_world(
            old, alone, schedule=SCHEDULE, options=UpdateOptions(lead=1), loggers=[logger]
        ) as ranks:
            updater = ranks[0].updater
            handle = updater.begin(new)
            await anyio.sleep(UNTIL_A_FENCE_S)
            await updater.step()
            await handle.wait()

    trio.run(serve, clock=trio.testing.MockClock(autojump_threshold=0))
    logged = {entry["event"]: dict(entry) for entry in capture.entries}
    assert logged["eplb.fence.waited"] == WAIT_AT_A_FENCE
    assert logged["eplb.layer.committed"]["step"] == 1
    assert 0 < logged["eplb.fence.waited"]["duration_ms"] < 10_000
    assert 0 < logged["eplb.layer.committed"]["copy_ms"] < 10_000


def test_commits_that_are_launched_together_take_turns() -> None:
    """The time of each begins where the one before ends, so that none counts twice."""
    alone = EPTopology(num_ranks=1, num_nodes=1, num_local_physical_experts=4)
    old, new = (ExpertPlacement.from_mapping([row] * 3) for row in ([0, 1, 2, 3], [3, 2, 1, 0]))
    capture = LogCapture()
    logger = structlog.wrap_logger(None, processors=[capture])

    async def serve() -> None:
        options = UpdateOptions(staging_depth=3)
        async with memory_world(old, alone, schedule=SCHEDULE, options=options, loggers=[logger]) as ranks:
            handle = ranks[0].updater.begin(new)
            while not handle.done:
                await anyio.sleep(100.0)
                for _ in range(5):
                    await ranks[0].updater.step()

    trio.run(serve, clock=trio.testing.MockClock(autojump_threshold=0))
    commits = [entry for entry in capture.entries if entry["event"] == "eplb.layer.committed"]
    assert len(commits) == 3
    assert commits[0]["duration_ms"] == pytest.approx(commits[0]["copy_ms"])
    assert [commit["duration_ms"] for commit in commits[1:]] == [0.0, 0.0]
    assert sum(commit["copy_ms"] for commit in commits[1:]) > 0.0


def test_a_stall_is_logged_completely() -> None:
    """A commit takes twice as long as a stage may."""
    alone = EPTopology(num_ranks=1, num_nodes=1, num_local_physical_experts=4)
    old, new = (ExpertPlacement.from_mapping([row]) for row in ([0, 1, 2, 3], [3, 2, 1, 0]))
    options = UpdateOptions(transfer_timeout_s=1.0, control_timeout_s=2.0, progress_timeout_s=4.0)
    capture = LogCapture()
    logger = structlog.wrap_logger(None, processors=[capture])

    class HangingWorkers(ScheduledWorkers):
        async def run(self, kind: str, function: Callable[[], T]) -> T:
            if kind == Work.COMMIT:
                with anyio.CancelScope(shield=True):
                    await anyio.sleep(8.0)
            return await super().run(kind, function)

    async def update() -> None:
        async with memory_world(
            old, alone, schedule=SCHEDULE, options=options, loggers=[logger], workers=HangingWorkers
        ) as ranks:
            with pytest.raises(UpdateStalled):
                await ranks[0].updater.update(new)

    trio.run(update, clock=trio.testing.MockClock(autojump_threshold=0))
    assert [dict(entry) for entry in capture.entries if entry["event"] == "eplb.update.stalled"] == [STALL]


@cache
def log_of_a_decision() -> list[dict[str, Any]]:
    """Return what is logged when one of two layers gets twice as balanced for two receives."""
    old, new = (ExpertPlacement.from_mapping([row, [0, 1, 2, 3]]) for row in ([0, 1, 2, 3], [0, 2, 1, 3]))
    load = ExpertLoad.from_counts([[4, 4, 0, 0], [1, 1, 1, 1]])
    terms = RebalanceTerms(expert_nbytes=1024, link_bytes_per_s=2048.0, layer_step_s=0.25, horizon_steps=16)
    decision = choose(load, old, new, EPTopology(num_ranks=2, num_nodes=1, num_local_physical_experts=2), terms)
    capture = LogCapture()
    logger = structlog.wrap_logger(
        None, processors=[capture], wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG)
    )
    emit(
        logger.bind(run_id="of no updater"),
        decision.event(generation=3, rank=1, step=7, policy=Hierarchical(num_groups=2)),
    )
    return [dict(entry) for entry in capture.entries]


def test_an_update_is_logged_completely() -> None:
    """Names, levels, facts and times of each event, in order."""
    assert log_of_an_update() == UPDATE_OF_ONE_LAYER


def test_an_update_that_ends_early_is_logged_completely() -> None:
    """The last event says why, and which layers are new on every rank."""
    assert log_of_a_cancelled_update()[-1] == END_OF_A_CANCELLED_UPDATE


def test_a_decision_is_logged_completely() -> None:
    """The estimate that it rests on."""
    assert log_of_a_decision() == [EVALUATED_REBALANCE]


def test_every_event_is_stamped_with_its_run_and_both_clocks() -> None:
    """All ranks log one run id, another one each run; times are of the emission, in order."""
    before = (time.monotonic(), time.time())
    old, new = (ExpertPlacement.from_mapping([row]) for row in ([0, 1, 2, 3], [3, 2, 1, 0]))
    topology = EPTopology(num_ranks=2, num_nodes=1, num_local_physical_experts=2)
    runs = []
    for _ in range(2):
        captures = [LogCapture(), LogCapture()]

        async def update(captures: list[LogCapture] = captures) -> None:
            loggers = [structlog.wrap_logger(None, processors=[capture]) for capture in captures]
            async with memory_world(old, topology, loggers=loggers) as ranks:
                await on_all(ranks, lambda u: u.update(new))

        anyio.run(update)
        entries = [entry for capture in captures for entry in capture.entries]
        assert {entry["rank"] for entry in entries} == {0, 1}
        runs.append({entry["run_id"] for entry in entries})
        for name, start, end in zip(("monotonic_s", "wall_s"), before, (time.monotonic(), time.time()), strict=True):
            for capture in captures:
                times = [start, *(entry[name] for entry in capture.entries), end]
                assert times == sorted(times)
    assert [len(run) for run in runs] == [1, 1]
    assert runs[0] != runs[1]


def test_every_event_is_compared_here() -> None:
    """A new event is listed in EVENTS and gets its dictionary above, or with the tests of what logs it."""
    here = (*UPDATE_OF_ONE_LAYER, END_OF_A_CANCELLED_UPDATE, WAIT_AT_A_FENCE, STALL, EVALUATED_REBALANCE)
    compared = {entry["event"] for entry in (*here, PASSES, REBALANCE_FINISHED, DROPPED)}
    assert compared == {event.name for event in EVENTS}
    classes = (value for value in vars(events).values() if isinstance(value, type) and issubclass(value, Event))
    assert set(EVENTS) == set(classes) - {Event}


def test_every_event_renders_as_one_line_of_json() -> None:
    """Values are JSON's own: the renderer never falls back to a repr."""
    for entry in (*log_of_an_update(), *log_of_a_cancelled_update(), *log_of_a_decision()):
        line = structlog.processors.JSONRenderer()(None, entry["log_level"], dict(entry))
        assert line == json.dumps(entry)
        assert len(str(line).splitlines()) == 1


def test_the_reference_is_that_of_the_code() -> None:
    """``python -m async_eplb events > EVENTS.md`` makes it anew."""
    assert (Path(__file__).parents[2] / "EVENTS.md").read_text() == event_reference()


def test_every_key_is_documented() -> None:
    """Those that an event has in the log, and no others."""
    for entry in (*log_of_an_update(), *log_of_a_decision()):
        (event,) = (event for event in EVENTS if event.name == entry["event"])
        assert set(entry) - {"log_level"} == {*field_names(event), *STAMPS}


@pytest.mark.parametrize("event", EVENTS)
def test_event_names_are_a_noun_and_a_past_tense(event: type[Event]) -> None:
    """``eplb.<noun>.<past tense>``."""
    assert re.fullmatch(r"eplb\.[a-z]+\.([a-z]+_)*[a-z]+ed", event.name)
