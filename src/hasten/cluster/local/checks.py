"""What the local backend refuses, and what it says about options that processes cannot follow."""

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from hasten.cluster.backend import refuse_unsupported
from hasten.cluster.local.gpus import GPUS_VARIABLE, devices
from hasten.cluster.local.launch import Launch
from hasten.cluster.local.mounts import mount_command
from hasten.cluster.spec import TrainingJob, TritonServer, Volume, Workload, pairs, quantity
from hasten.core.cpus import available_cpus
from hasten.core.errors import ClusterError, ConfigError

_COMMON = frozenset(
    "name namespace image gpus cpu memory env data data_dir config_file map_paths annotation label share_memory "
    "working_dir".split()
)
JOB_OPTIONS = _COMMON | frozenset(
    "command workers gang shell retry nproc_per_node clean_task_policy running_timeout ttl_after_finished".split()
)
SERVER_OPTIONS = _COMMON | frozenset(
    "version replicas model_repository load_model http_port grpc_port metrics_port allow_metrics extend_command "
    "expose_service exit_timeout startup_timeout".split()
)
VOLUME_OPTIONS = frozenset(("name", "namespace", "path", "read_only", "description"))
_SHARED_MEMORY = "/dev/shm"
_MOUNT_CHECK_S = 60.0
_MOST_INSTANCES = 1000
"""Each is a process with pipes and a log of its own."""


def check_job(job: TrainingJob) -> None:
    """UnsupportedError and ConfigError for what this machine cannot do."""
    refuse_unsupported("the local backend", job, JOB_OPTIONS)
    check_resources(job, job.workers)
    path = pairs(job.env, "--env").get("PATH")
    if shutil.which(job.shell, path=path) is None:
        raise ConfigError(f"--shell {job.shell!r} is not a program of this machine")


def check_server(server: TritonServer) -> None:
    """The same of a server."""
    refuse_unsupported("the local backend", server, SERVER_OPTIONS)
    check_resources(server, server.replicas)


def check_volume(volume: Volume) -> None:
    """The same of a volume: it is a folder that exists."""
    refuse_unsupported("the local backend", volume, VOLUME_OPTIONS)
    if volume.path is None:
        raise ConfigError("give the volume's folder with --path")
    if not Path(volume.path).is_dir():
        raise ConfigError(f"--path {volume.path} is not a folder of this machine")


def check_resources(spec: Workload, count: int) -> None:
    """ConfigError where all instances together ask for more than the machine has."""
    found = len(devices())
    wanted = count * spec.gpus
    if wanted > found:
        each = f" ({count} instances of {spec.gpus})" if count > 1 else ""
        hint = "" if GPUS_VARIABLE in os.environ else f"; {GPUS_VARIABLE}=N says how many where they are not found"
        raise ConfigError(f"--gpus asks for {wanted} GPU{'s' * (wanted != 1)}{each}, this machine has {found}{hint}")
    cores, memory = available_cpus(), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if spec.cpu is not None and count * quantity(spec.cpu, "--cpu") > cores:
        raise ConfigError(f"--cpu {spec.cpu} of {count} instances is more than the {cores} cores of this machine")
    if spec.memory is not None and count * quantity(spec.memory, "--memory") > memory:
        raise ConfigError(f"--memory {spec.memory} of {count} instances is more than this machine's {_gib(memory)}")
    if count > _MOST_INSTANCES:
        raise ConfigError(f"{count} instances are more than this machine runs of one job or server, {_MOST_INSTANCES}")
    if spec.share_memory is not None:
        size = os.statvfs(_SHARED_MEMORY)
        if quantity(spec.share_memory, "--share-memory") > size.f_frsize * size.f_blocks:
            raise ConfigError(
                f"--share-memory {spec.share_memory} is more than this machine's {_SHARED_MEMORY} has, "
                f"{_gib(size.f_frsize * size.f_blocks)}"
            )


def notices(spec: Workload) -> list[tuple[str, str]]:
    """What the user should know of options that are taken but not followed: a reason and a sentence each."""
    said = []
    if spec.image is not None:
        said.append(("ImageNotUsed", f"--image {spec.image} is not used: here the command runs as a process"))
    limits = [f"--{name} {value}" for name, value in (("cpu", spec.cpu), ("memory", spec.memory)) if value is not None]
    if limits:
        verb = "are requests: they were" if len(limits) > 1 else "is a request: it was"
        said.append(("LimitsNotEnforced", f"{' and '.join(limits)} {verb} checked, and nothing enforces it here"))
    return said


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f}Gi"


def check_mounts(launch: Launch, copies: Sequence[tuple[Path, Path, str]]) -> None:
    """ClusterError where the mounts of a launch cannot be made: they are tried, in a process that then ends.

    `copies` are `config_files`, whose originals stand for the copies that are not made yet.
    """
    if not launch.mounts:
        return
    originals = {str(copy): str(original.absolute()) for copy, original, _ in copies}
    mounts = [(originals.get(source, source), path, read_only) for source, path, read_only in launch.mounts]
    trial = subprocess.run(
        mount_command([], mounts, launch.working_dir),
        capture_output=True,
        text=True,
        timeout=_MOUNT_CHECK_S,
        check=False,
        cwd="/",
    )
    if trial.returncode != 0:
        raise ClusterError(trial.stderr.strip().removeprefix("hasten: error: ") or "the mounts cannot be set up")
