"""What the local backend makes of a job or a server: commands, variables, folders. Written into the record, run by the
supervisor, and printed by a dry run. Pure, but for looks at what exists.
"""

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hasten.cluster.local.launch import JobPlan, Launch, ServerPlan
from hasten.cluster.spec import TrainingJob, TritonServer, Workload, mounts, node_folders, pairs, seconds
from hasten.core.errors import ConfigError

LOCAL_ADDRESS, EVERY_ADDRESS = "127.0.0.1", "0.0.0.0"
_BEFORE = r"(?:(?<=[\s=:,;('\"])|^)"
_AFTER = r"(?![\w.-])"
_PLAIN_FOLDER = re.compile(r"[\w./+@%,=-]+")
FILES = "files"
"""Folder of a record for copies of --config-file."""


@dataclass(frozen=True)
class Source:
    """A registered volume."""

    path: str
    read_only: bool


def job_plan(job: TrainingJob, sources: Mapping[str, Source], folder: Path) -> JobPlan:
    """The plan of a job whose record is to be in `folder`; ConfigError for what does not exist here."""
    roles = ["master-0", *(f"worker-{number}" for number in range(job.workers - 1))]
    given = _mounts(job, sources, folder)
    command = _mapped(job.command, given) if job.map_paths else job.command
    return JobPlan(
        launch=_launch(job, [job.shell, "-c", command], given),
        names=[f"{job.name}-{role}" for role in roles],
        gpus=job.gpus,
        nproc_per_node=job.nproc_per_node,
        retry=job.retry,
        running_timeout=_seconds(job.running_timeout, "--running-timeout"),
        ttl_after_finished=_seconds(job.ttl_after_finished, "--ttl-after-finished"),
        clean_task_policy=job.clean_task_policy or "Running",
    )


def server_plan(server: TritonServer, sources: Mapping[str, Source], folder: Path) -> ServerPlan:
    """The plan of a server whose record is to be in `folder`; ConfigError for what does not exist here."""
    given = _mounts(server, sources, folder)
    address = EVERY_ADDRESS if server.expose_service else LOCAL_ADDRESS
    return ServerPlan(
        launch=_launch(server, _serve_command(server, given, address), given),
        name=server.full_name,
        replicas=server.replicas,
        gpus=server.gpus,
        ports={name: port for name, port in server.ports.items() if name != "metrics" or server.allow_metrics},
        address=address,
        exit_timeout=server.exit_timeout,
        startup_timeout=server.startup_timeout,
    )


def _serve_command(server: TritonServer, given: Sequence[tuple[str, str, bool]], address: str) -> list[str]:
    """`hasten serve`, to which a replica's ports are added."""
    repository, extra = server.model_repository or "", server.extend_command or ""
    if server.map_paths:
        repository, extra = _mapped(repository, given), _mapped(extra, given)
    elif not any(Path(repository).is_relative_to(path) for _, path, _ in given):
        repository = str(Path(repository).absolute())
        if not Path(repository).is_dir():
            raise ConfigError(f"--model-repository {repository} is not a folder of this machine, nor in a --data")
    command = [sys.executable, "-P", "-m", "hasten", "serve", "--model-repository", repository]
    command += ["--http-address", address, "--grpc-address", address]
    command += ["--allow-metrics", str(server.allow_metrics).lower(), "--exit-timeout-secs", str(server.exit_timeout)]
    if server.load_model:
        command += ["--model-control-mode", "explicit"]
        command += [word for model in server.load_model for word in ("--load-model", model)]
    # `exec`: signals are to reach the server, not a shell
    return ["sh", "-c", f'exec "$@" {extra}', "sh", *command] if extra else command


def _launch(spec: Workload, command: list[str], given: Sequence[tuple[str, str, bool]]) -> Launch:
    env, folder = pairs(spec.env, "--env"), spec.working_dir
    if spec.map_paths:
        env = {name: _mapped(value, given) for name, value in env.items()}
        folder = folder and _mapped(folder, given)
    start = str(Path(folder or ".").absolute())
    real = [] if spec.map_paths else list(given)
    if not any(Path(start).is_relative_to(path) for _, path, _ in real) and not Path(start).is_dir():
        raise ConfigError(f"--working-dir {start} is not a folder of this machine")
    return Launch(command=command, env=env, working_dir=start, mounts=real)


def _mounts(spec: Workload, sources: Mapping[str, Source], folder: Path) -> list[tuple[str, str, bool]]:
    mounted = [(sources[name].path, path, sources[name].read_only) for name, path in mounts(spec.data, "--data")]
    mounted += [(outside, inside, False) for outside, inside in node_folders(spec.data_dir)]
    mounted += [(str(copy), path, True) for copy, _, path in config_files(spec, folder)]
    for source, path, _ in mounted:
        if not Path(source).exists() and folder / FILES not in Path(source).parents:
            raise ConfigError(f"{source}, which is to be mounted at {path}, does not exist on this machine")
    taken = [path for _, path, _ in mounted]
    for path in taken:
        if taken.count(path) > 1:
            raise ConfigError(f"{path} is given for two mounts")
    return [mount for mount in mounted if mount[0] != mount[1]]


def config_files(spec: Workload, folder: Path) -> list[tuple[Path, Path, str]]:
    """Copy in the record, file as given, and path inside of each --config-file.

    ConfigError for what is no file and has no copy yet.
    """
    copies = []
    for number, (text, path) in enumerate(mounts(spec.config_file, "--config-file")):
        copy = folder / FILES / str(number)
        if not Path(text).is_file() and not copy.is_file():
            raise ConfigError(f"--config-file {text} is not a file")
        copies.append((copy, Path(text), path))
    return copies


def _mapped(text: str, given: Sequence[tuple[str, str, bool]]) -> str:
    """A text with the folders of mounts instead of their paths; longer paths first, each occurrence once.

    A path counts where it begins the text, or follows white space or one of = : , ; ( ' ", and where no letter, digit,
    '_', '.' or '-' follows it.
    """
    folders = {path.rstrip("/"): source for source, path, _ in given}
    for source in folders.values():
        if not _PLAIN_FOLDER.fullmatch(source):
            raise ConfigError(f"--map-paths cannot put {source!r} into a command: it has characters that shells read")
    if not folders:
        return text
    paths = "|".join(re.escape(path) for path in sorted(folders, key=len, reverse=True))
    return re.sub(f"{_BEFORE}({paths}){_AFTER}", lambda found: folders[found[1]], text)


def _seconds(text: str | None, flag: str) -> float | None:
    return None if text is None else seconds(text, flag)
