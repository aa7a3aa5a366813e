import random
import socket
from pathlib import Path

import pytest
from tests.waiting import attempts

from hasten.core import ports
from hasten.core.ports import free_port, free_ports, port_is_free


def test_they_differ_and_the_system_gives_none_away() -> None:
    first, last = map(int, ports.EPHEMERAL.read_text().split())
    for _ in attempts("ports that are still free: other tests take some meanwhile"):
        found = free_ports(200)
        assert len(set(found)) == 200
        assert not any(first <= port <= last for port in found)
        if all(port_is_free(port, "127.0.0.1") for port in found):
            break


def test_a_seed_does_not_give_two_processes_the_same() -> None:
    random.seed(0)
    first = free_ports(3)
    random.seed(0)
    assert free_ports(3) != first


@pytest.mark.parametrize("given", ["1024\t65535\n", None], ids=["all of them", "unknown"])
def test_where_the_systems_own_leave_no_room(
    given: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "range"
    if given is not None:
        file.write_text(given)
    monkeypatch.setattr(ports, "EPHEMERAL", file)
    found = free_ports(50)
    assert len(set(found)) == 50


def test_one_that_is_taken_is_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert not port_is_free(port, "127.0.0.1")
        monkeypatch.setattr(ports, "_chosen_ports", lambda: range(port, port + 1))
        with pytest.raises(OSError, match="no 1 free ports of"):
            free_port()


def test_an_address_that_is_not_this_machines() -> None:
    with pytest.raises(OSError, match="assign"):
        free_port("203.0.113.1")
