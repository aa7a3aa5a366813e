"""Two hosts on one machine: network namespaces of their own where the kernel permits, else nothing but a name."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

_ADDRESSES = ("10.77.0.1", "10.77.0.2")


@dataclass(frozen=True)
class Host:
    """Where to start a process."""

    prefix: list[str]
    """To put before a command."""
    address: str
    is_apart: bool
    """Whether it has a network of its own."""

    def run(self, *command: str) -> None:
        """Run a command there."""
        subprocess.run([*self.prefix, *command], check=True, capture_output=True)

    def cut_off(self) -> None:
        """Let the other host hear nothing more of it, not even that connections end."""
        self.run("ip", "link", "set", "hasten0", "down")


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Two hosts that reach each other at their addresses and share nothing else of a network."""
    with ExitStack() as stack:
        try:
            first = _namespace(stack, [])
            second = _namespace(stack, _enter(first))
            hosts = tuple(
                Host(_enter(pid), address, True) for pid, address in zip((first, second), _ADDRESSES, strict=True)
            )
            hosts[0].run(
                "ip", "link", "add", "hasten0", "type", "veth", "peer", "name", "hasten0", "netns", str(second)
            )
            for host in hosts:
                host.run("ip", "address", "add", f"{host.address}/24", "dev", "hasten0")
                host.run("ip", "link", "set", "hasten0", "up")
        except (OSError, subprocess.CalledProcessError):
            hosts = (Host([], "127.0.0.1", False), Host([], "127.0.0.1", False))
        yield hosts[0], hosts[1]


def _enter(pid: int) -> list[str]:
    return ["nsenter", "-t", str(pid), *([] if os.getuid() == 0 else ["-U", "--preserve-credentials"]), "-n"]


def _namespace(stack: ExitStack, prefix: list[str]) -> int:
    """A process in a new network namespace, with its loopback interface; it ends with the stack."""
    user = [] if os.getuid() == 0 or prefix else ["-r"]
    process = subprocess.Popen(
        [*prefix, "unshare", *user, "-n", "sh", "-c", "ip link set lo up && echo ready && exec cat"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    stack.callback(process.communicate)
    assert process.stdout is not None
    if process.stdout.readline() != b"ready\n":
        raise OSError("no network namespace here")
    return process.pid
