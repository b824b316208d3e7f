"""Prometheus metrics and OpenTelemetry spans of a run that serves, against its log."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from prometheus_client import CollectorRegistry, Gauge, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from support.logs import log_of_serving

from async_eplb.errors import InvalidOptions, MissingExtra, VerificationError
from async_eplb.events.metrics import Metrics
from async_eplb.events.schema import Reason
from async_eplb.events.tracing import Spans
from async_eplb.update.outcome import OUTCOMES

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What rank 0 logs of two updates, and of a third one that fails."""
    folder = log_of_serving(tmp_path_factory.mktemp("log"))
    events = [json.loads(line) for line in (folder / "rank-0.jsonl").read_text().splitlines()]
    (started, *_) = (event for event in events if event["event"] == "eplb.update.started")
    fault = {"error": "BrokenTransport", "error_message": "cut", "committed_layers": [], "duration_ms": 5.0}
    failed = {**started, **fault, "event": "eplb.update.failed"}
    return [*events, {**started, "generation": 3}, {**failed, "generation": 3}]


Samples = dict[tuple[str, tuple[str, ...]], float]


def samples(events: list[dict[str, Any]], updater: str = "", **options: Any) -> Samples:
    """Return name and label values → value of what Prometheus would scrape of one updater."""
    registry = CollectorRegistry()
    observe = Metrics(registry, **options)
    for event in events:
        observe(event)
    return scraped(registry, updater)


def scraped(registry: CollectorRegistry, updater: str) -> Samples:
    families = text_string_to_metric_families(generate_latest(registry).decode())
    return {
        (s.name, tuple(value for label, value in s.labels.items() if label != "updater")): s.value
        for family in families
        for s in family.samples
        if s.labels["updater"] == updater and not s.name.endswith("_created")
    }


def total(events: list[dict[str, Any]], name: str, key: str) -> float:
    return float(sum(event[key] for event in events if event["event"] == name))


def test_metrics_are_the_sums_of_the_log(events: list[dict[str, Any]]) -> None:
    """Durations in seconds, bytes by direction and link, faults by error, the balance of the last rebalance."""
    seen = samples(events)
    for stage, name, key in (
        ("plan", "eplb.layer.planned", "duration_ms"),
        ("transfer", "eplb.layer.transferred", "duration_ms"),
        ("wait", "eplb.layer.committed", "wait_ms"),
        ("commit", "eplb.layer.committed", "duration_ms"),
    ):
        assert seen["eplb_layer_stage_duration_seconds_sum", (stage,)] == pytest.approx(total(events, name, key) / 1e3)
        assert seen["eplb_layer_stage_duration_seconds_count", (stage,)] == 6
    for direction in ("sent", "received"):
        for link in ("within_node", "across_nodes"):
            expected = total(events, "eplb.layer.transferred", f"{direction}_nbytes_{link}")
            assert seen["eplb_transferred_bytes_total", (direction, link)] == expected
    commits = total(events, "eplb.layer.committed", "copy_ms") / 1e3
    assert seen["eplb_serving_stall_seconds_sum", ("commit",)] == pytest.approx(commits)
    fences = sum(event["event"] == "eplb.fence.waited" for event in events)
    assert seen["eplb_serving_stall_seconds_count", ("fence",)] == fences
    for beside in ("update", "nothing"):
        passes = [e for e in events if e["event"] == "eplb.passes.timed" and e["beside"] == beside]
        num_passes = sum(each["num_passes"] for each in passes)
        assert seen["eplb_pass_duration_seconds_count", (beside,)] == num_passes > 0
        total_s = sum(each["num_passes"] * each["mean_ms"] for each in passes) / 1e3
        assert seen["eplb_pass_duration_seconds_sum", (beside,)] == pytest.approx(total_s)
    assert seen["eplb_update_duration_seconds_count", ("finished",)] == 2
    assert seen["eplb_update_duration_seconds_sum", ("failed",)] == 0.005
    assert seen["eplb_update_faults_total", ("BrokenTransport",)] == 1
    assert seen["eplb_balancedness_ratio", ("after",)] == 0.875
    assert seen["eplb_rebalances_total", ("pays",)] == 2


def test_an_exclusive_commit_stalls_nobody(events: list[dict[str, Any]]) -> None:
    """Its step is 0."""
    exclusive = [{**event, "step": 0} for event in events if event["event"] == "eplb.layer.committed"]
    assert samples(exclusive)["eplb_serving_stall_seconds_count", ("commit",)] == 0


def test_counters_that_are_known_begin_with_0(events: list[dict[str, Any]]) -> None:
    """So that Prometheus sees the first fault as an increase; all causes of an update's end are known."""
    before = samples([], updaters=["draft"], updater="draft")
    assert set(before.values()) == {0.0}
    causes = {outcome.cause for outcome in OUTCOMES if outcome.cause is not Exception}
    known = causes | set(VerificationError.__subclasses__())
    assert {labels[0] for name, labels in before if name == "eplb_update_faults_total"} == {e.__name__ for e in known}
    assert {labels[0] for name, labels in before if name == "eplb_rebalances_total"} == {r.value for r in Reason}
    assert {name for name, _ in set(samples(events)) - set(before)} == {"eplb_balancedness_ratio"}


def test_two_updaters_are_told_apart(events: list[dict[str, Any]]) -> None:
    """By the name that is bound to their events; one that nobody has foretold begins with its first event."""
    both = [*events, *({**event, "updater": "draft"} for event in events[: len(events) // 2])]
    assert samples(both) == samples(events)
    assert samples(both, updater="draft") == samples(events[: len(events) // 2])


def test_metrics_made_twice_are_refused_with_a_hint() -> None:
    """And the registry is as it was, whichever name is taken."""
    registry = CollectorRegistry()
    counted = Metrics(registry)
    for _ in range(2):
        with pytest.raises(InvalidOptions, match="share one Metrics"):
            Metrics(registry)
    failed = {"event": "eplb.update.failed", "duration_ms": 1.0, "error": "UpdateAborted"}
    counted(failed)
    assert scraped(registry, "")["eplb_update_faults_total", ("UpdateAborted",)] == 1
    other = CollectorRegistry()
    taken = Gauge("eplb_balancedness_ratio", "of the application", registry=other)
    with pytest.raises(InvalidOptions):
        Metrics(other)
    other.unregister(taken)
    Metrics(other)


def test_updates_are_spans_and_stages_are_their_children(events: list[dict[str, Any]]) -> None:
    """With the times of the log; a failed update is an error."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    observe = Spans(provider)
    for event in events:
        observe(event)
    spans = exporter.get_finished_spans()
    updates = {span.context.span_id: span for span in spans if span.name == "eplb.update"}
    assert [u.status.status_code for u in updates.values()] == [StatusCode.UNSET, StatusCode.UNSET, StatusCode.ERROR]
    for name, logged_as in (("eplb.transfer", "eplb.layer.transferred"), ("eplb.commit", "eplb.layer.committed")):
        stages = [span for span in spans if span.name == name]
        logged = [each for each in events if each["event"] == logged_as]
        assert len(stages) == len(logged)
        for span, each in zip(stages, logged, strict=True):
            assert span.parent is not None
            parent = updates[span.parent.span_id]
            assert parent.attributes is not None
            assert parent.attributes["eplb.generation"] == each["generation"]
            assert (span.end_time - span.start_time) / 1e6 == pytest.approx(each["duration_ms"], abs=0.01)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("package", "make", "extra"),
    [("prometheus_client", Metrics, "metrics"), ("opentelemetry", Spans, "tracing")],
)
def test_a_missing_package_is_named_with_its_extra(
    package: str, make: type, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``pip install 'async-eplb[EXTRA]'``."""
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtra, match=rf"async-eplb\[{extra}\]") as caught:
        make()
    assert caught.value.extra == extra


def test_the_dashboard_asks_for_metrics_that_there_are(events: list[dict[str, Any]]) -> None:
    """Every name in a query of the Grafana dashboard is scraped, and every metric is shown."""
    dashboard = json.loads((ROOT / "examples" / "grafana" / "dashboard.json").read_text())
    queries = " ".join(target["expr"] for panel in dashboard["panels"] for target in panel["targets"])
    asked = set(re.findall(r"eplb_\w+", queries))
    there = {name for name, _ in samples(events)}
    assert asked <= there
    families = {name.removesuffix("_bucket") for name in there if name.endswith("_bucket")}
    families |= {name for name in there if name.endswith(("_total", "_ratio"))}
    assert {each for each in families if not any(name.startswith(each) for name in asked)} == set()
