"""Which rank a process is, as whoever started it says. Imports no torch."""

import hashlib
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from hasten.core.errors import ConfigError
from hasten.core.ports import free_port

LOCAL = "127.0.0.1"
"""Where ranks that one process starts meet."""
_CONNECT_S = 10.0


@dataclass(frozen=True)
class RankInfo:
    """The rank of this process, and the address at which the ranks meet."""

    rank: int
    size: int
    local_size: int
    address: str
    port: int
    first: int = 0
    """Rank 0's number among all ranks of this host: above 0 where other engines of a server come before this one."""

    @property
    def engines(self) -> int:
        """Engines of as many ranks that share this host; 1 where one spans several hosts."""
        return max(1, self.local_size // self.size)


def rank_from_environment(env: Mapping[str, str] = os.environ) -> RankInfo | None:
    """The rank of this process if torchrun, mpirun (Open MPI, MPICH, Intel) or an operator started it; None otherwise.

    mpirun comes first, and one process alone is no rank: an operator gives each of its pods a rank, in which mpirun
    or hasten may start more. A rank that does not know how many are on its host is such a pod's only one.
    """
    names = (
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"),
        ("PMI_RANK", "PMI_SIZE", "MPI_LOCALNRANKS"),
        ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),
    )
    for rank_name, size_name, local_name in names:
        if rank_name not in env or size_name not in env:
            continue
        rank, size = _number(env, rank_name), _number(env, size_name)
        if size == 1:
            continue
        local_size = _number(env, local_name) if local_name in env else 1 if rank_name == "RANK" else size
        if local_size < size and "MASTER_ADDR" not in env:
            raise ConfigError(
                f"{size_name}={size} ranks on several hosts, but MASTER_ADDR is not set; set it to rank 0's host "
                "(and MASTER_PORT to a free port there)"
            )
        address = env.get("MASTER_ADDR", LOCAL)
        port = _number(env, "MASTER_PORT") if "MASTER_PORT" in env else _port_of_job(env)
        first = _number(env, "LOCAL_RANK") - rank if "LOCAL_RANK" in env and local_size > size else 0
        return RankInfo(rank, size, local_size, address, port, first)
    return None


def free_local_port() -> int:
    """A port of 127.0.0.1 that nobody listens on; ConfigError where ranks of this host cannot meet there."""
    try:
        port = free_port(LOCAL)
        with socket.create_server((LOCAL, port)), socket.create_connection((LOCAL, port), _CONNECT_S):
            return port
    except OSError as error:
        raise ConfigError(
            f"ranks on one host meet at {LOCAL}, which cannot be reached here ({error.strerror or error}); bring the "
            "loopback interface up, or use one rank"
        ) from error


def _number(env: Mapping[str, str], name: str) -> int:
    try:
        return int(env[name])
    except ValueError:
        raise ConfigError(f"the environment has {name}={env[name]!r}, which is not a number") from None


def _port_of_job(env: Mapping[str, str]) -> int:
    """A port that all ranks of one mpirun on this host work out alike: from its job's name or its process."""
    job = env.get("PMIX_NAMESPACE") or env.get("OMPI_MCA_ess_base_jobid") or env.get("PMI_KVSNAME") or str(os.getppid())
    return 20000 + int.from_bytes(hashlib.sha256(job.encode()).digest()[:4], "big") % 12000
