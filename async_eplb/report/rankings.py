"""The slowest layers, the slowest links, and the ranks that lag."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from async_eplb.events.schema import LayerCommitted, LayerPlanned, LayerTransferred
from async_eplb.report.columns import Table
from async_eplb.report.records import LayerReport, LinkReport, RankReport
from async_eplb.report.runs import Run

_MIN_SHARE = 1e-2
"""Links with a smaller share of the mean link's bytes are left out: their speed is not measured well."""


def layer_reports(run: Run) -> list[LayerReport]:
    """Return each layer of each update, on the rank with the longest total time from plan to commit."""
    planned, moved, committed = (run.events(event.name) for event in (LayerPlanned, LayerTransferred, LayerCommitted))
    keys, ranks = _keys(committed), committed["rank"]
    plan_ms, transfer_ms = (_looked_up(run.num_ranks, table, keys, ranks) for table in (planned, moved))
    total = plan_ms + transfer_ms + committed["wait_ms"] + committed["duration_ms"]
    # sorted by layer, then by total time: the last row of each layer is that of its slowest rank
    order = np.lexsort((total, keys))
    last = order[np.flatnonzero(np.append(np.diff(keys[order]) != 0, True))] if len(order) else order
    _, index = np.unique(keys, return_inverse=True)
    nbytes = np.bincount(index.reshape(-1), weights=committed["nbytes"])
    return [
        LayerReport(
            generation=int(committed["generation"][at]),
            layer=int(committed["layer"][at]),
            rank=int(ranks[at]),
            total_ms=float(total[at]),
            plan_ms=float(plan_ms[at]),
            transfer_ms=float(transfer_ms[at]),
            wait_ms=float(committed["wait_ms"][at]),
            commit_ms=float(committed["duration_ms"][at]),
            nbytes=int(written),
        )
        for at, written in zip(last, nbytes, strict=True)
    ]


def slowest_layers(runs: Iterable[Run], number: int) -> tuple[LayerReport, ...]:
    """Return the layers with the longest total time on any rank, longest first."""
    layers = [layer for run in runs for layer in layer_reports(run)]
    return tuple(sorted(layers, key=lambda layer: -layer.total_ms)[:number])


def slowest_links(runs: Iterable[Run], number: int) -> tuple[LinkReport, ...]:
    """Return the links with the fewest bytes a second, slowest first; links with very few bytes are left out."""
    found = []
    for run in runs:
        links = run.links("received")
        keys, index = np.unique(links["peer"] * run.num_ranks + links["rank"], return_inverse=True)
        pairs = np.stack(np.divmod(keys, run.num_ranks))
        nbytes, received, times = (
            np.bincount(index.reshape(-1), weights=links[key]) for key in ("nbytes", "transfer_nbytes", "transfer_ms")
        )
        nodes = run.node_of(pairs)
        speeds = np.divide(received * 1e3, times, out=np.full(len(keys), np.inf), where=times > 0)
        busy = np.flatnonzero(nbytes * len(keys) >= nbytes.sum() * _MIN_SHARE)
        found += [
            LinkReport(
                src_rank=int(pairs[0, at]),
                dst_rank=int(pairs[1, at]),
                within_node=bool(nodes[0, at] == nodes[1, at]),
                nbytes=int(nbytes[at]),
                nbytes_per_s=float(speeds[at]),
            )
            for at in sorted(busy, key=lambda at: speeds[at])[:number]
        ]
    return tuple(sorted(found, key=lambda link: link.nbytes_per_s)[:number])


def lagging_ranks(runs: Iterable[Run], number: int) -> tuple[RankReport, ...]:
    """Return the ranks with the largest mean lag in staging their layers, largest first."""
    found = []
    for run in runs:
        moved = run.events(LayerTransferred.name)
        if not len(moved["rank"]):
            continue
        _, index = np.unique(_keys(moved), return_inverse=True)
        lag_ms = (moved["time_s"] - medians(index.reshape(-1), moved["time_s"])[index.reshape(-1)]) * 1e3
        last = np.zeros(len(lag_ms), dtype=bool)  # [transfers]: whether it was the last of its layer
        order = np.lexsort((lag_ms, index.reshape(-1)))
        last[order[np.flatnonzero(np.append(np.diff(index.reshape(-1)[order]) != 0, True))]] = True
        layers = np.bincount(moved["rank"])
        lags, lasts = np.bincount(moved["rank"], weights=lag_ms), np.bincount(moved["rank"], weights=last)
        found += [
            RankReport(
                rank=int(rank),
                lag_ms=float(lags[rank] / layers[rank]),
                num_last=int(lasts[rank]),
                num_layers=int(layers[rank]),
            )
            for rank in np.flatnonzero(layers)
        ]
    return tuple(sorted(found, key=lambda rank: -rank.lag_ms)[:number])


def _keys(table: Table) -> NDArray[np.int64]:
    """Return one number for each (update, layer)."""
    return np.asarray((table["generation"] << 24) + table["layer"])


def _looked_up(num_ranks: int, table: Table, keys: NDArray[np.int64], ranks: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the duration of the same layer on the same rank in another table; 0 where it is not logged."""
    if not len(table["rank"]):
        return np.zeros(len(keys))
    full, wanted = _keys(table) * num_ranks + table["rank"], keys * num_ranks + ranks
    order = np.argsort(full)
    at = np.minimum(np.searchsorted(full[order], wanted), len(order) - 1)
    return np.where(full[order][at] == wanted, table["duration_ms"][order][at], 0.0)


def medians(groups: NDArray[np.intp], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the median of each group's values: float64 ``[groups]``; groups are numbered from 0 without gaps."""
    order = np.lexsort((values, groups))
    counts = np.bincount(groups)
    starts = np.cumsum(counts) - counts
    low, high = starts + (counts - 1) // 2, starts + counts // 2
    return np.asarray((values[order][low] + values[order][high]) / 2)
