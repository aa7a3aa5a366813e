"""Ports for processes that open them later."""

import errno
import random
import socket
from contextlib import ExitStack
from pathlib import Path

EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
"""First and last port of those that the system gives to connections and to listeners on port 0."""
_LOWEST, _HIGHEST = 10_000, 30_000
"""Below are ports of known services, above those of Kubernetes' nodes."""
_LEAST, _ATTEMPTS = 1000, 100


def free_ports(count: int, address: str = "127.0.0.1") -> list[int]:
    """Different ports of an address on which nobody listens.

    Any process may take them before they are opened, but the system gives none of them away by itself. Where its own
    ports leave no room for that, they are such ports.
    """
    chosen = _chosen_ports()
    draw = random.SystemRandom()  # a program's own seed would give all its processes the same ports
    found: list[int] = []
    with ExitStack() as opened:
        for _ in range(_ATTEMPTS + count):
            probe = opened.enter_context(socket.socket())
            try:
                probe.bind((address, draw.choice(chosen) if chosen else 0))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                continue
            found.append(probe.getsockname()[1])
            if len(found) == count:
                return found
    raise OSError(errno.EADDRINUSE, f"no {count} free ports of {address} were found")


def free_port(address: str = "127.0.0.1") -> int:
    """A port of an address on which nobody listens; see `free_ports`."""
    return free_ports(1, address)[0]


def port_is_free(port: int, address: str) -> bool:
    """Whether one could listen on a port now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError:
            return False
        return True


def _chosen_ports() -> range:
    """Ports that the system does not give away; none where they are too few."""
    try:
        first = int(EPHEMERAL.read_text().split()[0])
    except OSError:
        return range(0)
    ports = range(_LOWEST, min(_HIGHEST, first))
    return ports if len(ports) >= _LEAST else range(0)
