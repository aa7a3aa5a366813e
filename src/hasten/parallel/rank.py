"""The rank of this process, from the environment that its launcher set. Imports no torch."""

import hashlib
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from hasten.core.errors import ConfigError
from hasten.core.parallel_config import ParallelConfig
from hasten.core.ports import free_port

LOCAL = "127.0.0.1"
"""Where ranks that one process starts meet."""
_MASTER_PORT = 29500
"""As torchrun has it."""
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
    starts_node: bool = False
    """Whether this process, the only one of its host so far, is to start the other ranks of its host, or all of them
    where rank 0 is not among them."""

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
        if not 0 <= rank < size:
            raise ConfigError(f"the environment has {rank_name}={rank}, which is none of {size_name}={size} ranks")
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


def rank_info(parallel: ParallelConfig, env: Mapping[str, str] = os.environ) -> RankInfo | None:
    """The rank of this process among those of several processes that users or clusters started; None where it has none.

    Where they started one process for each of several hosts it is the first rank of its host. ConfigError where the
    environment contradicts itself or `parallel`.
    """
    given = [name for name in ("node_rank", "master_addr", "master_port") if getattr(parallel, name) is not None]
    if given and parallel.nnodes in (None, 1):
        raise ConfigError(f"{given[0]} is for ranks on several hosts; give nnodes as well")
    launched = rank_from_environment(env)
    fits = parallel.nnodes is None and launched is not None and parallel.ranks in (1, launched.size)
    if launched is not None and (fits or _is_launcher(env)):
        if parallel.nnodes not in (None, 1):
            raise ConfigError(
                f"nnodes is {parallel.nnodes}, but torchrun, mpirun or a cluster started this process as rank "
                f"{launched.rank} of {launched.size} already; leave nnodes out"
            )
        return launched
    nodes = _nodes(parallel, env)
    if nodes is None:
        return launched if parallel.nnodes is None else None
    ranks, local_size = parallel.ranks, parallel.ranks // nodes.count
    if ranks % nodes.count:
        raise ConfigError(
            f"tensor_parallel_size {parallel.tensor_parallel_size} times pipeline_parallel_size "
            f"{parallel.pipeline_parallel_size} is {ranks} ranks, which {nodes.source} does not divide; choose a "
            "multiple, or nnodes 1 for ranks on this host alone"
        )
    return RankInfo(nodes.rank * local_size, ranks, local_size, nodes.address, nodes.port, starts_node=True)


@dataclass(frozen=True)
class _Nodes:
    """Which of several hosts this one is."""

    count: int
    rank: int
    address: str
    port: int
    source: str
    """What says how many there are, for messages."""


def _nodes(parallel: ParallelConfig, env: Mapping[str, str]) -> _Nodes | None:
    """The hosts as options say, or else an environment in which every host has one process; None: this one alone."""
    found = _nodes_from_environment(env) if parallel.ranks > 1 or parallel.nnodes is not None else None
    if parallel.nnodes is None:
        return found
    if parallel.nnodes == 1:
        return None
    if found is not None and found.count != parallel.nnodes:
        raise ConfigError(f"nnodes is {parallel.nnodes}, but the environment has {found.source}; leave nnodes out")
    rank, address = parallel.node_rank, parallel.master_addr
    if found is not None:
        rank, address = found.rank if rank is None else rank, address or found.address
    if rank is None or not address:
        raise ConfigError(
            f"nnodes is {parallel.nnodes}: give node_rank (0 to {parallel.nnodes - 1}) and master_addr (the host of "
            "node 0) as well"
        )
    port = parallel.master_port or (found.port if found is not None else _MASTER_PORT)
    return _checked(_Nodes(parallel.nnodes, rank, address, port, f"nnodes {parallel.nnodes}"))


_NODE_NAMES = (
    ("LWS_GROUP_SIZE", "LWS_WORKER_INDEX", "LWS_LEADER_ADDRESS", None),
    ("PET_NNODES", "PET_NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT"),
    ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT"),
)
"""Number of hosts and of this one, address and port of the first: LeaderWorkerSet's names, and those of operators."""


def on_several_hosts(env: Mapping[str, str] = os.environ) -> bool:
    """Whether the environment is that of one process on each of several hosts."""
    return not _is_launcher(env) and _nodes_from_environment(env) is not None


def _nodes_from_environment(env: Mapping[str, str]) -> _Nodes | None:
    found: list[_Nodes] = []
    for count, rank, address, port in _NODE_NAMES:
        if not (env.get(count, "").isdecimal() and rank in env and address in env) or env[count] == "1":
            continue
        number = _number(env, port) if port is not None and port in env else _MASTER_PORT
        found.append(
            _checked(_Nodes(int(env[count]), _number(env, rank), env[address], number, f"{count}={env[count]}"))
        )
    for other in found[1:]:
        if (other.count, other.rank) != (found[0].count, found[0].rank):
            raise ConfigError(
                f"the environment has {found[0].source} for host {found[0].rank}, but {other.source} for host "
                f"{other.rank}; unset what is wrong, or give nnodes, node_rank and master_addr"
            )
    return found[0] if found else None


def _checked(nodes: _Nodes) -> _Nodes:
    if not 0 <= nodes.rank < nodes.count:
        raise ConfigError(f"node {nodes.rank} is none of {nodes.count} ({nodes.source}), which are numbered from 0")
    return nodes


def _is_launcher(env: Mapping[str, str]) -> bool:
    """Whether each rank has a process of its own, which knows how many there are on its host, or mpirun started it."""
    return "LOCAL_WORLD_SIZE" in env or _from_mpirun(env)


def _from_mpirun(env: Mapping[str, str]) -> bool:
    sizes = (env.get(name, "1") for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"))
    return any(size != "1" for size in sizes)


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
