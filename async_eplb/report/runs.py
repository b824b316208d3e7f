"""The events of one run, by update, on one time line."""

import numpy as np
from numpy.typing import NDArray

from async_eplb.events.schema import UpdateStarted
from async_eplb.report.clocks import Clocks, set_clocks
from async_eplb.report.columns import Table
from async_eplb.report.reading import EventLog
from async_eplb.report.records import Traffic


class Run:
    """One run of a log.

    :param number: of the run in ``log.run_ids``
    """

    def __init__(self, log: EventLog, number: int) -> None:
        self.run_id = log.run_ids[number]
        self.clocks: Clocks = set_clocks(log, number)
        self._tables = {name: _sorted(table, number) for name, table in log.tables.items()}
        for table in self._tables.values():
            table["time_s"] = self.clocks.times_s(table)
        self._links = {name: _sorted(table, number) for name, table in log.links.items()}
        numbers = [np.unique(table["generation"]) for table in self._tables.values()]
        started = self._tables[UpdateStarted.name]
        self.num_nodes = int(started["num_nodes"].max(initial=1))
        self.num_ranks = int(
            max(started["num_ranks"].max(initial=1), *(t["rank"].max(initial=0) + 1 for t in self._tables.values()))
        )
        if self.num_ranks % self.num_nodes:
            self.num_nodes = 1
        self.generations = [int(each) for each in np.unique(np.concatenate(numbers))]

    def events(self, name: str, generation: int | None = None) -> Table:
        """Return the rows of an event, of one update or of all.

        ``time_s`` is the time of emission on the run's time line, in seconds.
        """
        return _part(self._tables[name], generation)

    def links(self, name: str, generation: int | None = None) -> Table:
        """Return the rows of a table of links (``"sent"`` or ``"received"``), of one update or of all."""
        return _part(self._links[name], generation)

    def node_of(self, ranks: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the node of each rank, in the shape of ``ranks``."""
        return np.asarray(ranks // max(self.num_ranks // self.num_nodes, 1))

    def traffic(self, generation: int | None = None) -> Traffic:
        """Return the bytes that all ranks received from each other, in one update or all."""
        nbytes = np.zeros((self.num_ranks, self.num_ranks), dtype=np.int64)
        links = self.links("received", generation)
        known = (links["peer"] >= 0) & (links["peer"] < self.num_ranks)
        np.add.at(nbytes, (links["peer"][known], links["rank"][known]), links["nbytes"][known])
        return Traffic(nbytes, self.num_nodes)


def runs_of(log: EventLog) -> list[Run]:
    """Return the runs of a log that have events, in the order of the log."""
    held = {int(each) for table in log.tables.values() for each in np.unique(table["run_id"])}
    return [Run(log, number) for number in sorted(held)]


def _sorted(table: Table, run: int) -> Table:
    mine = np.flatnonzero(table["run_id"] == run)
    order = mine[np.argsort(table["generation"][mine], kind="stable")]
    return {name: column[order] for name, column in table.items()}


def _part(table: Table, generation: int | None) -> Table:
    if generation is None:
        return table
    start, end = np.searchsorted(table["generation"], [generation, generation + 1])
    return {name: column[start:end] for name, column in table.items()}
