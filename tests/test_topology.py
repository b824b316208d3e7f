"""Nodes are found from the hosts that ranks are on."""

import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.groups import stateless_groups

from async_eplb import EPTopology, groups
from async_eplb.errors import InvalidTopology, OpenTimeout
from async_eplb.topology import num_nodes_of

HOSTS = st.lists(st.sampled_from("abcd"), min_size=1, max_size=12)


@given(HOSTS)
def test_nodes_are_hosts_of_equally_many_consecutive_ranks_or_there_is_one(hosts: list[str]) -> None:
    """So that a topology's arithmetic says the same of each pair of ranks as their hosts do."""
    topology = EPTopology(len(hosts), num_nodes_of(hosts), 1)
    same_node = [[topology.node_of(a) == topology.node_of(b) for b in range(len(hosts))] for a in range(len(hosts))]
    same_host = [[a == b for b in hosts] for a in hosts]
    if topology.num_nodes > 1:
        assert same_node == same_host
    else:
        each = [hosts.count(host) for host in dict.fromkeys(hosts)]
        in_order = hosts == [host for host, count in zip(dict.fromkeys(hosts), each, strict=True) for _ in range(count)]
        assert len(each) == 1 or not in_order or len(set(each)) > 1


def found(hosts: list[str], monkeypatch: pytest.MonkeyPatch, *, timeout_s: float = 30.0) -> list[object]:
    """Return what each rank of a stateless group finds, or its error; a host without a name has an absent rank."""
    local, outcomes = threading.local(), dict[int, object]()
    monkeypatch.setattr(groups, "BOOT_ID", SimpleNamespace(read_text=lambda: local.host))

    def find(rank: int) -> None:
        local.host = hosts[rank]
        try:
            outcomes[rank] = EPTopology.from_group(joined[rank], 3, timeout_s=timeout_s)
        except OpenTimeout as error:
            outcomes[rank] = error

    joined = stateless_groups(len(hosts))
    threads = [threading.Thread(target=find, args=(rank,)) for rank, host in enumerate(hosts) if host]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [outcomes[rank] for rank in sorted(outcomes)]


@pytest.mark.parametrize(
    ("hosts", "num_nodes"), [("aabb", 2), ("abab", 1), ("aab", 1), ("aaaa", 1), ("abc", 3)], ids=str
)
def test_all_ranks_find_the_same(hosts: str, num_nodes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over the group's store, without torch's registry."""
    assert found(list(hosts), monkeypatch) == [EPTopology(len(hosts), num_nodes, 3)] * len(hosts)


def test_a_rank_that_does_not_come_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """In time."""
    for outcome in found(["a", "", "a"], monkeypatch, timeout_s=0.1):
        assert isinstance(outcome, OpenTimeout)
        assert outcome.missing == (1,)


def test_slots_are_checked_before_anyone_is_waited_for() -> None:
    """No rank hears of it."""
    with pytest.raises(InvalidTopology, match="num_local_physical_experts"):
        EPTopology.from_group(stateless_groups(2)[0], 0)


def test_a_host_without_a_boot_id_is_known_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the kernel is another."""
    monkeypatch.setattr(groups, "BOOT_ID", Path("/nowhere"))
    monkeypatch.setattr(groups, "socket", SimpleNamespace(gethostname=lambda: "example"))
    assert groups.host_id() == "example"
