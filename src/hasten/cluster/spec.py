"""Specs of training jobs, servers and volumes, with Arena's names. They are validated when they are constructed.

Fields with a help text are the options of `hasten cluster submit`, `serve` and `data create`. None stands for the
backend's default, which the help text gives. A backend that does not support a field raises UnsupportedError
(`backend.refuse_unsupported`).
"""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from decimal import Decimal
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from hasten.core.errors import ConfigError
from hasten.core.option_fields import option

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

PULL_POLICIES = ("Always", "IfNotPresent", "Never")
CLEAN_POLICIES = ("Running", "All", "None")
SYNC_MODES = ("rsync", "git")
_NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_NAMESPACE = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
_OBJECT_NAME = re.compile(rf"{_NAMESPACE.pattern}(\.{_NAMESPACE.pattern})*")
_LONGEST_NAME, _LONGEST_OBJECT_NAME = 63, 253
_LABEL = re.compile(r"[A-Za-z0-9]([-_.A-Za-z0-9]*[A-Za-z0-9])?")
_LONGEST_LABEL = 63
_ENV_NAME = re.compile(r"[-._a-zA-Z][-._a-zA-Z0-9]*")
_QUANTITY = re.compile(r"([0-9]{1,30}(?:\.[0-9]{1,30})?)(m|k|[MGTPE]|[KMGTPE]i)?")
_UNITS = {"m": Decimal("0.001")}
_UNITS |= {unit: Decimal(1000) ** power for power, unit in enumerate(("", *"kMGTPE"))}
_UNITS |= {f"{unit}i": Decimal(1024) ** power for power, unit in enumerate("KMGTPE", start=1)}
_LARGEST_QUANTITY = 2**63 - 1
_LEAST_MEMORY = 1024**2
_LARGEST_NUMBER = 2**31 - 1
"""Kubernetes' counts are 32-bit integers."""
_MOST_SECONDS = 10**9
_MAY_BE_EMPTY = frozenset({"description", "mount_options", "extend_command"})
"""Options that an empty text clears."""
"""About 31 years; what is derived of them fits into Kubernetes' 32-bit integers too."""
_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ms|s|m|h|d)")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
LARGEST_PORT = 65535


def checked_name(name: str, what: str) -> str:
    """A name that Kubernetes takes for a service as well (RFC 1035); ConfigError for others."""
    ends = " and '-', begin with a letter and end with a letter or digit"
    return _checked(name, what, _NAME, _LONGEST_NAME, ends)


def checked_namespace(name: str, what: str = "--namespace") -> str:
    """A name that a namespace can have (RFC 1123, a label); ConfigError for others."""
    return _checked(name, what, _NAMESPACE, _LONGEST_NAME, " and '-', and begin and end with a letter or digit")


def checked_object_name(name: str, what: str) -> str:
    """A name that an object of a cluster can have, whoever made it (RFC 1123, a subdomain); ConfigError for others."""
    parts = ", '-' and '.', and each part between dots must begin and end with a letter or digit"
    return _checked(name, what, _OBJECT_NAME, _LONGEST_OBJECT_NAME, parts)


def _check_label_name(name: str, flag: str) -> None:
    """Raise ConfigError for what is no name of a label, annotation or resource: `example.com/name` or the last part."""
    prefix, divided, last = name.rpartition("/")
    if divided:
        checked_object_name(prefix, f"what is before '/' in {flag} {name!r},")
    _check_label(last, f"{flag} {name!r}: its name {last!r}")


def _check_label(text: str, what: str) -> None:
    fits = len(text) <= _LONGEST_LABEL and _LABEL.fullmatch(text)
    rule = f"at most {_LONGEST_LABEL} letters, digits, '-', '_' and '.', and begin and end with a letter or digit"
    _require(bool(fits), f"{what} must have {rule}")


def _checked(name: str, what: str, pattern: re.Pattern[str], longest: int, rest: str) -> str:
    if len(name) > longest or not pattern.fullmatch(name):
        raise ConfigError(f"{what} {name!r} must have at most {longest} lower-case letters, digits{rest}")
    return name


def checked_text(text: str, what: str) -> str:
    """A text that every backend can pass on as it is; ConfigError for others."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{what} {text!r} is not UTF-8") from None
    _require("\0" not in text, f"{what} {text!r} has a null character")
    return text


def _check_texts(spec: "Workload | Volume") -> None:
    for each in fields(spec):
        value = getattr(spec, each.name)
        flag = flag_of(each) if "help" in each.metadata else each.name
        texts = [value] if isinstance(value, str) else value if isinstance(value, list | tuple) else ()
        may_be_empty = each.name in _MAY_BE_EMPTY or value == each.default
        _require(may_be_empty or all(texts), f"{flag} is empty: give a value, or leave it out")
        for text in texts:
            checked_text(text, flag)


def flag_of(option: "Field[Any]") -> str:
    """A field's name on the command line."""
    return str(option.metadata.get("flag", "--" + option.name.replace("_", "-")))


def options_given(spec: "Workload | Volume") -> dict[str, str]:
    """Names of fields that have another value than their default -> what the command line calls them."""
    found = {}
    for each in fields(spec):
        default = each.default_factory() if each.default_factory is not MISSING else each.default
        if getattr(spec, each.name) != default:
            found[each.name] = flag_of(each)
    return found


def quantity(text: str, flag: str) -> Decimal:
    """The number that a Kubernetes quantity such as 500m or 16Gi means; ConfigError for others."""
    found = _QUANTITY.fullmatch(text)
    if found is None:
        raise ConfigError(f"{flag} {text!r} is not a quantity such as 4, 500m or 2Gi")
    number = Decimal(found[1]) * _UNITS[found[2] or ""]
    _require(number <= _LARGEST_QUANTITY, f"{flag} {text!r} is more than Kubernetes counts, {_LARGEST_QUANTITY}")
    return number


def _check_cores(text: str | None) -> None:
    if text is not None:
        thousandths = quantity(text, "--cpu") * 1000
        _require(thousandths == int(thousandths), f"--cpu {text!r} is finer than a thousandth of a core, 1m")


def _check_bytes(text: str | None, flag: str) -> None:
    if text is not None:
        least = quantity(text, flag) >= _LEAST_MEMORY
        _require(least, f"{flag} {text!r} is less than 1Mi: give a unit, such as 2Gi")


def _check_number(number: int, flag: str, least: int, most: int = _LARGEST_NUMBER) -> None:
    _require(number >= least, f"{flag} must be at least {least}, got {number}")
    _require(number <= most, f"{flag} must be at most {most}, got {number}")


def is_number(text: str) -> bool:
    """Whether a text is a whole number of ASCII digits that Kubernetes can count."""
    return text.isascii() and text.isdecimal() and len(text) <= 10 and int(text) <= _LARGEST_NUMBER


def pairs(texts: Sequence[str], flag: str, separator: str = "=") -> dict[str, str]:
    """`["a=1", "b=2"]` as a mapping, the first separator dividing; ConfigError names the option of the bad one."""
    parsed: dict[str, str] = {}
    for text in texts:
        key, found, value = text.partition(separator)
        if not found or not key:
            raise ConfigError(f"{flag} {text!r} is not NAME{separator}VALUE")
        parsed[key] = value
    return parsed


def mounts(texts: Sequence[str], flag: str) -> list[tuple[str, str]]:
    """`["pvc:/mnt"]` as pairs of a source and an absolute path inside; ConfigError names the bad one."""
    parsed = []
    for text in texts:
        source, found, path = text.rpartition(":")
        if not found or not source or not path.startswith("/"):
            raise ConfigError(f"{flag} {text!r} is not SOURCE:/PATH")
        _check_folder(path, f"{flag} {text!r}")
        parsed.append((source, path))
    return parsed


def node_folders(texts: Sequence[str]) -> list[tuple[str, str]]:
    """`["/data", "/x:/mnt"]` of --data-dir as pairs of absolute paths, outside and inside; ConfigError for others."""
    parsed = []
    for text in texts:
        outside, found, inside = text.partition(":")
        inside = inside if found else outside
        what = f"--data-dir {text!r}"
        _require(outside.startswith("/") and inside.startswith("/"), f"{what} is not /FROM:/PATH or /PATH")
        _require(".." not in outside.split("/"), f"{what} has '..': write the path without it")
        _check_folder(inside, what)
        parsed.append((outside, inside))
    return parsed


def _check_folder(path: str, what: str) -> None:
    """ConfigError for a path that nothing can be mounted at, or that Kubernetes refuses."""
    parts = path.split("/")
    _require(".." not in parts, f"{what} has '..': write the path without it")
    _require(bool({*parts} - {"", "."}), f"{what} would hide the whole file system: give a folder in it")


def seconds(text: str, flag: str) -> float:
    """A duration such as `90s`, `1h30m` or `7d`; ConfigError for others."""
    found = _DURATION.findall(text)
    if not found or "".join(number + unit for number, unit in found) != text:
        raise ConfigError(f"{flag} {text!r} is not a duration such as 90s, 30m, 1h30m or 7d")
    total = sum(float(number) * _SECONDS[unit] for number, unit in found)
    _require(total <= _MOST_SECONDS, f"{flag} {text!r} is more than {_MOST_SECONDS} seconds")
    return total


def _check_quotes(text: str, flag: str) -> None:
    """ConfigError for words that no shell can divide, at which each start of a container would fail."""
    try:
        shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"{flag} {text!r} is not words of a shell: {str(error).lower()}") from None


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What jobs and servers have in common."""

    name: str = option("", "its name (required)")
    namespace: str = "default"
    image: str | None = option(None, "image that its containers run")
    gpus: int = option(0, "GPUs of each instance")
    cpu: str | None = option(None, "cores of each instance, such as 4 or 500m")
    memory: str | None = option(None, "memory of each instance, such as 16Gi")
    device: Sequence[str] = option((), "other devices, NAME=COUNT; may be given more than once")
    env: Sequence[str] = option((), "environment variable, NAME=VALUE; may be given more than once", short="-e")
    data: Sequence[str] = option(
        (), "volume and where to mount it, NAME:/PATH; may be given more than once", short="-d"
    )
    data_dir: Sequence[str] = option(
        (), "folder of the node and where to mount it, /FROM:/PATH or /PATH; may be given more than once"
    )
    config_file: Sequence[str] = option(
        (), "file of this machine and where to mount it, FILE:/PATH; may be given more than once"
    )
    map_paths: bool = option(
        False,
        "locally, mount nothing: replace the paths of --data, --data-dir and --config-file by their folders where they "
        "begin a word or follow one of = : , ; ( ' \" in the command, --env, --working-dir and --model-repository",
    )
    annotation: Sequence[str] = option((), "annotation, NAME=VALUE; may be given more than once", short="-a")
    label: Sequence[str] = option((), "label, NAME=VALUE; may be given more than once", short="-l")
    selector: Sequence[str] = option((), "label a node must have, NAME=VALUE; may be given more than once")
    toleration: Sequence[str] = option(
        (), "taint to tolerate: KEY, KEY=VALUE:EFFECT,OPERATOR or all; may be given more than once"
    )
    image_pull_secret: Sequence[str] = option((), "secret of the image's registry; may be given more than once")
    image_pull_policy: str | None = option(
        None, "when to pull the image (default: Always for jobs, IfNotPresent for servers)", choices=PULL_POLICIES
    )
    share_memory: str | None = option(None, "size of /dev/shm (default: 2Gi)")
    working_dir: str | None = option(None, "folder to start in (default: /root in a cluster, this folder locally)")
    priority: str | None = option(None, "priority class", short="-p")
    scheduler: str | None = option(None, "name of the scheduler")
    host_network: bool = option(False, "use the node's network", flag="--hostNetwork")

    def __post_init__(self) -> None:
        checked_name(self.name, "--name")
        checked_namespace(self.namespace)
        _check_texts(self)
        _check_number(self.gpus, "--gpus", 0)
        _check_cores(self.cpu)
        _check_bytes(self.memory, "--memory")
        _check_bytes(self.share_memory, "--share-memory")
        for name in pairs(self.env, "--env"):
            _require(bool(_ENV_NAME.fullmatch(name)), f"--env {name!r} is not a name of a variable")
        for flag, texts in (("--annotation", self.annotation), ("--label", self.label), ("--selector", self.selector)):
            for name, value in pairs(texts, flag).items():
                _check_label_name(name, flag)
                if value and flag != "--annotation":
                    _check_label(value, f"{flag} {name}: its value {value!r}")
        _require(self.image is None or bool(self.image.strip()), "--image is empty: give the name of an image")
        for name, count in pairs(self.device, "--device").items():
            _check_label_name(name, "--device")
            _require(is_number(count), f"--device {name}={count}: {count!r} is not a number up to {_LARGEST_NUMBER}")
        for volume, _ in mounts(self.data, "--data"):
            checked_object_name(volume, "--data")
        mounts(self.config_file, "--config-file")
        node_folders(self.data_dir)


@dataclass(frozen=True, kw_only=True)
class TrainingJob(Workload):
    """A command that runs to its end on one or several instances: `submit pytorchjob`."""

    if_taken: ClassVar[str] = "take another name, or delete it"
    """What to do where there is one of this name."""

    command: str = ""
    """For a shell, exactly as the user gave it."""
    workers: int = option(1, "instances, the master included")
    queue: str | None = option(None, "queue of the scheduler")
    gang: bool = option(False, "start all instances or none")
    shell: str = option("sh", "shell that runs the command")
    retry: int = option(0, "maximum restarts after failures")
    nproc_per_node: str | None = option(None, "processes of each instance for torchrun: auto, cpu, gpu or a number")
    clean_task_policy: str | None = option(
        None, "instances to delete at the end (default: Running)", choices=CLEAN_POLICIES
    )
    running_timeout: str | None = option(None, "end the job after this time, such as 2h")
    ttl_after_finished: str | None = option(None, "delete the job this long after its end, such as 7d")
    rdma: bool = option(False, "use RDMA devices")
    sync_mode: str | None = option(None, "how to fetch the code before the start", choices=SYNC_MODES)
    sync_source: str | None = option(None, "where to fetch the code from")
    tensorboard: bool = option(False, "run TensorBoard along with the job")
    logdir: str | None = option(None, "folder that TensorBoard reads (default: /training_logs)")
    api: Literal["pytorchjob", "trainer", "indexed"] = option(
        "pytorchjob",
        "object to create: a PyTorchJob (kubeflow.org/v1), a TrainJob (trainer.kubeflow.org/v1alpha1) or an "
        "Indexed Job (batch/v1) of independent instances, numbered by JOB_COMPLETION_INDEX",
        choices=("pytorchjob", "trainer", "indexed"),
    )
    parallelism: int | None = option(None, "instances of an Indexed Job that run at a time (default: all)")

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(bool(self.command.strip()), "there is no command to run: give it after the options, in quotes")
        _check_number(self.workers, "--workers", 1)
        _check_number(self.retry, "--retry", 0, _LARGEST_NUMBER - 1)
        for flag, text in (
            ("--running-timeout", self.running_timeout),
            ("--ttl-after-finished", self.ttl_after_finished),
        ):
            if text is not None:
                seconds(text, flag)
        count = self.nproc_per_node
        known = count in (None, "auto", "cpu", "gpu") or (is_number(str(count)) and int(str(count)) > 0)
        _require(known, f"--nproc-per-node {count!r} is none of auto, cpu, gpu and a number")
        _require((self.sync_mode is None) == (self.sync_source is None), "--sync-mode and --sync-source go together")
        _require(self.tensorboard or self.logdir is None, "--logdir needs --tensorboard")
        if self.parallelism is not None:
            _require(self.api == "indexed", "--parallelism needs --api indexed: other jobs have all instances at once")
            _check_number(self.parallelism, "--parallelism", 1)


@dataclass(frozen=True, kw_only=True)
class TritonServer(Workload):
    """Replicas that serve a repository of models over Triton's protocol: `serve triton`."""

    if_taken: ClassVar[str] = "update it, take another --version, or delete it"
    """What to do where there is one of this name and version."""
    version: str = option("", "version of the server (default: the time, YYYYMMDDHHMM)")
    replicas: int = option(1, "instances of the server")
    model_repository: str | None = option(None, "folder of the models, as its containers see it (required)")
    load_model: Sequence[str] = option((), "model to load, instead of all; may be given more than once")
    http_port: int = option(8000, "port of HTTP")
    grpc_port: int = option(8001, "port of gRPC")
    metrics_port: int = option(8002, "port of metrics")
    allow_metrics: bool = option(False, "expose metrics, and have them collected")
    runtime: Literal["hasten", "tritonserver"] = option(
        "hasten", "server in the image", choices=("hasten", "tritonserver")
    )
    extend_command: str | None = option(None, "further options of the server, as one string for the shell")
    env_from_secret: Sequence[str] = option(
        (), "environment variable from the key of that name of a secret, NAME=SECRET; may be given more than once"
    )
    data_subpath_expr: Sequence[str] = option(
        (), "folder of a volume to mount instead of all of it, NAME:EXPRESSION; may be given more than once"
    )
    temp_dir: Sequence[str] = option((), "empty folder, NAME:/PATH; may be given more than once")
    gpumemory: int = option(0, "GiB of a shared GPU, instead of --gpus")
    gpucore: int = option(0, "hundredths of a shared GPU, instead of --gpus")
    expose_service: bool = option(False, "make the service reachable from outside the cluster")
    exit_timeout: int = option(30, "seconds for in-flight requests when an instance shuts down")
    startup_timeout: int = option(900, "seconds that an instance has to load its models")
    autoscale: str | None = option(None, "minimum and maximum replicas, MIN:MAX")
    autoscale_by: Literal["cpu", "queue"] = option(
        "cpu", "metric of --autoscale: use of cores (HPA) or waiting requests (KEDA)", choices=("cpu", "queue")
    )
    prometheus: str | None = option(None, "address of Prometheus, for --autoscale-by queue")
    multinode: int = option(1, "nodes per instance, for models larger than one node")
    gateway: str | None = option(
        None, "endpoint picker of a gateway: create an InferencePool that queries this service"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        checked_version(self.version)
        checked_name(self.full_name, "--name and --version make")
        for flag in ("replicas", "gpumemory", "gpucore"):
            _check_number(getattr(self, flag), f"--{flag}", 0)
        _check_number(self.multinode, "--multinode", 1)
        _require(bool(self.model_repository), "--model-repository is required")
        for flag, port in self.ports.items():
            _require(0 < port <= LARGEST_PORT, f"--{flag}-port must be from 1 to {LARGEST_PORT}, got {port}")
        _require(len(set(self.ports.values())) == len(self.ports), "the three ports must differ")
        for flag in ("exit_timeout", "startup_timeout"):
            _check_number(getattr(self, flag), f"--{flag.replace('_', '-')}", 1, _MOST_SECONDS)
        for name, secret in pairs(self.env_from_secret, "--env-from-secret").items():
            checked_object_name(secret, f"--env-from-secret {name}: its secret")
        for volume, folder in pairs(self.data_subpath_expr, "--data-subpath-expr", ":").items():
            within = not folder.startswith("/") and ".." not in folder.split("/")
            _require(within, f"--data-subpath-expr {volume}:{folder} leaves the volume: give a folder in it")
        _check_quotes(self.extend_command or "", "--extend-command")
        mounts(self.temp_dir, "--temp-dir")
        if self.autoscale is not None:
            self.scale_limits()

    @property
    def ports(self) -> dict[str, int]:
        """Port of each endpoint."""
        return {"http": self.http_port, "grpc": self.grpc_port, "metrics": self.metrics_port}

    @property
    def full_name(self) -> str:
        """Name of what is made for it, as Arena's."""
        return f"{self.name}-{self.version}-tritoninferenceserver"

    def scale_limits(self) -> tuple[int, int]:
        """Least and most replicas of --autoscale."""
        least, _, most = (self.autoscale or "").partition(":")
        good = is_number(least) and is_number(most) and int(least) <= int(most) and int(most) > 0
        _require(good, f"--autoscale {self.autoscale!r} is not MIN:MAX")
        return int(least), int(most)


def record_of(spec: "DataclassInstance") -> dict[str, Any]:
    """The options that are not at their defaults, as JSON has them."""
    defaults = {field.name: field.default for field in fields(spec)}
    chosen = {name: getattr(spec, name) for name in defaults}
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in chosen.items()
        if value not in (defaults[name], [])
    }


def server_of(record: Mapping[str, Any]) -> TritonServer:
    """The server of a record; TypeError for one with options that this version does not know."""
    options: dict[str, Any] = {
        name: tuple(given) if isinstance(given, list) else given for name, given in record.items()
    }
    return TritonServer(**options)


def checked_version(version: str) -> str:
    """A version that can be part of a name; ConfigError for others."""
    _require(
        bool(re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", version)),
        f"--version {version!r} must have lower-case letters, digits and '-'",
    )
    return version


@dataclass(frozen=True, kw_only=True)
class Volume:
    """Data that jobs and servers mount by its name: `data create`."""

    name: str
    namespace: str = "default"
    path: str | None = option(None, "folder of this machine (local), or path in the bucket or the share")
    oss_bucket: str | None = option(None, "bucket of Alibaba Cloud OSS")
    oss_url: str | None = option(None, "endpoint of OSS")
    oss_fuse: Literal["ossfs", "ossfs2"] = option("ossfs2", "how OSS is mounted", choices=("ossfs", "ossfs2"))
    s3_bucket: str | None = option(None, "bucket of S3 (Mountpoint CSI)")
    s3_region: str | None = option(None, "its region")
    nfs_server: str | None = option(None, "server of NFS")
    access_key_id: str | None = option(
        None, "key id of the bucket; the secret key is read from the variable HASTEN_ACCESS_KEY_SECRET"
    )
    size: str = option("100Gi", "size to claim")
    read_only: bool = option(False, "mount it read-only")
    mount_options: str | None = option(None, "further options of the mount, as its driver takes them")
    description: str | None = option(None, "description of its contents")

    def __post_init__(self) -> None:
        checked_name(self.name, "the volume's name")
        checked_namespace(self.namespace)
        _check_texts(self)
        _check_bytes(self.size, "--size")
        sources = [flag for flag in ("oss_bucket", "s3_bucket", "nfs_server") if getattr(self, flag) is not None]
        _require(len(sources) <= 1, f"a volume has one source, got {' and '.join(sources)}")
