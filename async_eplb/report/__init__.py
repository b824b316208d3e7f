"""What happened, read from logs: numbers and pictures."""

from async_eplb.report.reading import EventLog, read_events
from async_eplb.report.summary import summarize
from async_eplb.report.values import Report

__all__ = ["EventLog", "Report", "read_events", "summarize"]
