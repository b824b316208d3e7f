"""The log schema: every event as it is logged, whole."""

import json
import logging
import re
from functools import cache
from typing import Any
from unittest.mock import ANY

import anyio
import pytest
import structlog
import trio
import trio.testing
from helpers import memory_world, together
from structlog.testing import LogCapture
from test_rebalancer import REBALANCE_FINISHED

from async_eplb import EPTopology, ExpertPlacement, UpdateOptions, events
from async_eplb.events import EVENTS, Event, emit
from async_eplb.load import ExpertLoad
from async_eplb.policy import Hierarchical, RebalanceTerms, choose
from async_eplb.testing import ScheduledWorkers
from async_eplb.transport import MemorySchedule

TOPOLOGY = EPTopology(num_ranks=4, num_nodes=2, num_local_physical_experts=6)
OLD_ROW = [0, 1, 2, 3, 4, 5] + [6] * 6 + [7] * 12
NEW_ROW = [0, 2, 6, 6, 7, -1] + [1] * 6 + [3] * 6 + [4, 5, 7, 7, 7, 7]
"""On rank 0 each of the six sources occurs once. An expert has 204 bytes."""

SCHEDULE = MemorySchedule(exchange_s=0.5, control_s=0.125)
WORK_S = {"plan": 0.25, "commit": 0.25}
"""Times are sums of powers of two, so that they are exact. A staged layer waits for two rounds: the one that is under
way, and its own."""

HOST_TIME = ANY
"""Time of the serving thread, which no virtual clock sets."""

UPDATE_OF_ONE_LAYER: list[dict[str, Any]] = [
    {
        "event": "eplb.update.started",
        "log_level": "info",
        "generation": 1,
        "rank": 0,
        "num_layers": 1,
        "num_unchanged_layers": 1,
        "staging_nbytes": 2 * 3 * 5 * 256,
    },
    {
        "event": "eplb.update.inputs_logged",
        "log_level": "info",
        "generation": 1,
        "rank": 0,
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
        "event": "eplb.layer.planned",
        "log_level": "info",
        "generation": 1,
        "rank": 0,
        "layer": 1,
        "duration_ms": 250.0,
        "num_same_gpu": 1,
        "num_free_rider": 1,
        "num_same_node": 1,
        "num_cross_node": 1,
        "num_sends": 4,
    },
    {
        "event": "eplb.layer.decided",
        "log_level": "debug",
        "generation": 1,
        "rank": 0,
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
        "event": "eplb.layer.transferred",
        "log_level": "info",
        "generation": 1,
        "rank": 0,
        "layer": 1,
        "duration_ms": 500.0,
        "copied_nbytes": 204,
        "sent_nbytes": 816,
        "sent_nbytes_by_rank": [0, 204, 204, 408],
        "sent_nbytes_by_node": [204, 612],
        "sent_nbytes_within_node": 204,
        "sent_nbytes_across_nodes": 612,
        "received_nbytes": 408,
        "received_nbytes_by_rank": [0, 204, 204, 0],
        "received_nbytes_by_node": [204, 204],
        "received_nbytes_within_node": 204,
        "received_nbytes_across_nodes": 204,
    },
    {
        "event": "eplb.layer.committed",
        "log_level": "info",
        "generation": 1,
        "rank": 0,
        "layer": 1,
        "step": 0,
        "duration_ms": 250.0,
        "copy_ms": HOST_TIME,
        "wait_ms": 250.0,
        "num_slots": 4,
        "nbytes": 816,
    },
    {
        "event": "eplb.update.finished",
        "log_level": "info",
        "generation": 1,
        "rank": 0,
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
    "event": "eplb.update.failed",
    "log_level": "warning",
    "generation": 1,
    "rank": 0,
    "duration_ms": 1375.0,
    "error": "UpdateCancelled",
    "error_message": "ranks [1] cancelled the update after 1 of 2 layers",
    "committed_layers": [0],
}

UNTIL_A_FENCE_S = 0.8125
"""A round shows the layer staged at 0.75 s; the next one, which carries the fence, takes until 0.875 s."""

WAIT_AT_A_FENCE: dict[str, Any] = {
    "event": "eplb.fence.waited",
    "log_level": "warning",
    "generation": 1,
    "rank": 0,
    "step": 1,
    "duration_ms": HOST_TIME,
    "lead": 2,
}

EVALUATED_REBALANCE: dict[str, Any] = {
    "event": "eplb.rebalance.evaluated",
    "log_level": "info",
    "generation": 3,
    "rank": 1,
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

            others = [lambda u=rank.updater: u.update(new) for rank in ranks if rank is not ranks[1]]
            await together([update_rank_1, *others])

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
    emit(logger, decision.event(generation=3, rank=1, policy=Hierarchical(num_groups=2)))
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


def test_every_event_is_compared_here() -> None:
    """A new event is listed in EVENTS and gets its dictionary above, or with the rebalancer's tests."""
    here = (*UPDATE_OF_ONE_LAYER, END_OF_A_CANCELLED_UPDATE, WAIT_AT_A_FENCE, EVALUATED_REBALANCE)
    compared = {entry["event"] for entry in (*here, REBALANCE_FINISHED)}
    assert compared == {event.name for event in EVENTS}
    classes = (value for value in vars(events).values() if isinstance(value, type) and issubclass(value, Event))
    assert set(EVENTS) == set(classes) - {Event}


def test_every_event_renders_as_one_line_of_json() -> None:
    """Values are JSON's own: the renderer never falls back to a repr."""
    for entry in (*log_of_an_update(), *log_of_a_cancelled_update(), *log_of_a_decision()):
        line = structlog.processors.JSONRenderer()(None, entry["log_level"], dict(entry))
        assert line == json.dumps(entry)
        assert len(str(line).splitlines()) == 1


@pytest.mark.parametrize("event", EVENTS)
def test_event_names_are_a_noun_and_a_past_tense(event: type[Event]) -> None:
    """``eplb.<noun>.<past tense>``."""
    assert re.fullmatch(r"eplb\.[a-z]+\.([a-z]+_)*[a-z]+ed", event.name)
