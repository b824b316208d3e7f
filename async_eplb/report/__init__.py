"""Reports of updates from their logs: figures and pictures."""

from async_eplb.report.reading import EventLog, read_events
from async_eplb.report.records import Report
from async_eplb.report.summary import summarize

__all__ = ["EventLog", "Report", "read_events", "summarize"]
