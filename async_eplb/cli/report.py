"""The command ``report``: text, JSON, comparisons, conditions and pictures from logs."""

import argparse
import json
import sys
from pathlib import Path

from async_eplb.errors import InvalidOptions
from async_eplb.report import EventLog, Report, read_events, summarize
from async_eplb.report.conditions import parse_condition
from async_eplb.report.intervals import pick_update, updates_of
from async_eplb.report.page import write_page
from async_eplb.report.pictures import draw_matrix, draw_timeline
from async_eplb.report.runs import runs_of
from async_eplb.report.text import comparison_lines, report_lines
from async_eplb.report.trace import write_trace

_DESCRIPTION = """\
Read the JSON lines that ranks have logged, and report on their updates: times, bytes, overlap,
stalls, the slowest layers and links, ranks that lag. Lines of other programs are skipped.

Exit status: 0, 1 if a --fail-if condition holds, 2 if there is nothing to report.
"""

_EPILOG = """\
examples:
  async_eplb demo --log-dir logs && async_eplb report logs
  async_eplb report 'logs/*.jsonl.gz' --json
  async_eplb report --compare before/ after/
  async_eplb report logs --html report.html --trace trace.json
  async_eplb report logs --fail-if 'stall_p99_ms > 2' --fail-if 'num_failed > 0'
"""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add ``report`` to the command line."""
    parser = commands.add_parser(
        "report",
        help="report on the updates in logs",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "logs", nargs="*", metavar="LOG", help="file, folder, glob, or - for standard input (default: -)"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help="two logs side by side, with ratios B / A")
    parser.add_argument(
        "--fail-if",
        action="append",
        default=[],
        metavar="CONDITION",
        help="exit with 1 if a figure of --json (with --compare, of B) is so: 'stall_p99_ms > 2'; may be repeated",
    )
    for name, suffix, what in (
        ("timeline", "png", "ranks by time, stages in colour: .png or .svg"),
        ("matrix", "png", "bytes from rank to rank: .png or .svg"),
        ("trace", "json", "a trace for Perfetto and chrome://tracing"),
        ("html", "html", "all of it in one page that works from disk"),
    ):
        parser.add_argument(f"--{name}", type=Path, metavar="FILE", help=f"draw {what}, as in {name}.{suffix}")
    parser.add_argument("--update", type=int, metavar="N", help="number of the update to draw (default: the last)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Read logs, print their report and draw it."""
    report = _compare(options) if options.compare else _report(options)
    figures = report.figures()
    conditions = [parse_condition(text, figures) for text in options.fail_if]
    broken = [why for why in (condition.broken_by(figures) for condition in conditions) if why]
    for why in broken:
        print(f"async_eplb: failed: {why}", file=sys.stderr)
    return 1 if broken else 0


def _report(options: argparse.Namespace) -> Report:
    log = read_events(*(options.logs or ["-"]))
    report = summarize(log)
    try:
        _draw(log, report, options)
    except OSError as error:
        raise InvalidOptions(f"{error.filename} cannot be written: {error.strerror}", option="picture") from error
    if options.json:
        print(json.dumps(report.to_json(), indent=2))
    else:
        print("\n".join(report_lines(report)))
    return report


def _draw(log: EventLog, report: Report, options: argparse.Namespace) -> None:
    if not any((options.timeline, options.matrix, options.trace, options.html)):
        return
    runs = runs_of(log)
    if options.timeline:
        draw_timeline(*pick_update(runs, options.update), options.timeline)
    if options.matrix:
        run, generation = pick_update(runs, options.update)
        draw_matrix(run.traffic(generation), options.matrix, title=f"update {generation}: bytes from rank to rank")
    if options.trace:
        drawn = [pick_update(runs, options.update)] if options.update else list(updates_of(runs))
        write_trace(drawn, options.trace)
    if options.html:
        write_page(runs, report, options.html)


def _compare(options: argparse.Namespace) -> Report:
    if options.logs:
        raise InvalidOptions(f"--compare takes two logs, and {options.logs[0]} is a third", option="compare")
    first, second = (summarize(read_events(name)) for name in options.compare)
    if options.json:
        print(json.dumps([report.to_json()["figures"] for report in (first, second)], indent=2))
    else:
        print("\n".join(comparison_lines(tuple(options.compare), first, second)))
    return second
