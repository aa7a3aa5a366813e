"""What pods of jobs and of servers have in common: metadata, storage, environment, resources, security.

Everything runs as a user without rights on a root file system that cannot be written. What programs do write to is
there as a volume: /tmp, the home folder, /dev/shm.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from hasten.cluster.spec import (
    TrainingJob,
    TritonServer,
    Workload,
    is_number,
    mounts,
    node_folders,
    options_given,
    pairs,
)
from hasten.core.errors import ConfigError, UnsupportedError

Object = dict[str, Any]
"""A Kubernetes object, or a part of one, as plain data."""

USER = 1000
"""Number of the user and of the group of all containers: that of the image which the Dockerfile makes."""
HOME = "/root"
"""Arena starts commands here. It is an empty volume, so that a user other than root can enter and write."""
MANAGER = "hasten"
GPU = "nvidia.com/gpu"
GPU_MEMORY = "aliyun.com/gpu-mem"
GPU_CORES = "aliyun.com/gpu-core.percentage"
RDMA = "rdma/hca"

_VOLUME_NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_EFFECTS = ("NoSchedule", "PreferNoSchedule", "NoExecute")
_OPERATORS = ("Equal", "Exists")


def given(**fields: Any) -> Object:
    """The fields that say something: all but None, False and what is empty."""
    return {name: value for name, value in fields.items() if value or (value == 0 and value is not False)}


def literal(text: str) -> str:
    """A text that Kubernetes hands over as it is.

    In commands and values it would replace `$(NAME)` by a variable's value, and `$$` by `$`.
    """
    return re.sub(r"\$(?=[$(])", "$$", text)


def merged(own: Mapping[str, str], users: Sequence[str], flag: str) -> dict[str, str]:
    """Own labels or annotations and the user's; ConfigError where the user wants another value of an own one."""
    added = pairs(users, flag)
    for name, value in added.items():
        if own.get(name, value) != value:
            raise ConfigError(f"{flag} {name}={value}: hasten sets it to {own[name]!r}; choose another name")
    return {**own, **added}


def metadata(
    spec: Workload, name: str, labels: Mapping[str, str], annotations: Mapping[str, str] | None = None
) -> Object:
    """Name, namespace, labels and annotations of an object that is made for `spec`."""
    return {
        "name": name,
        "namespace": spec.namespace,
        "labels": merged({**labels, "app.kubernetes.io/managed-by": MANAGER}, spec.label, "--label"),
        **given(annotations=merged(annotations or {}, spec.annotation, "--annotation")),
    }


class Storage:
    """Volumes of a pod, and where its container mounts them."""

    def __init__(self) -> None:
        self.mounts: list[Object] = []
        self._sources: dict[str, Object] = {}

    @property
    def volumes(self) -> list[Object]:
        """The volumes, by name."""
        return [{"name": name, **source} for name, source in self._sources.items()]

    def has(self, path: str) -> bool:
        """Whether something is mounted at a path."""
        return any(mount["mountPath"].rstrip("/") == path.rstrip("/") for mount in self.mounts)

    def holds(self, path: str) -> bool:
        """Whether a path is in something that is mounted."""
        return any(f"{path.rstrip('/')}/".startswith(mount["mountPath"].rstrip("/") + "/") for mount in self.mounts)

    def add(self, name: str, source: Object, path: str, **how: Any) -> None:
        """Mount a volume; ConfigError where the path or the name is taken."""
        if self.has(path):
            raise ConfigError(f"two things are to be mounted at {path}; mount one of them elsewhere")
        if self._sources.setdefault(name, source) != source:
            raise ConfigError(f"two volumes of the pod have the name {name!r}; rename the one that is yours")
        self.mounts.append({"name": name, "mountPath": path, **how})


def shared_storage(spec: Workload) -> Storage:
    """What the user mounts and other pods can mount as well: --data and --data-dir."""
    storage = Storage()
    _add_claims(storage, spec)
    _add_folders(storage, spec.data_dir)
    return storage


def add_scratch(held: Storage) -> None:
    """Mount what every container may write to, except where the user mounts something."""
    for name, path in (("tmp", "/tmp"), ("home", HOME)):
        if not held.has(path):
            held.add(name, {"emptyDir": {}}, path)


def storage(spec: Workload) -> Storage:
    """All that a container of the user's image mounts."""
    mounted = shared_storage(spec)
    for number, (_, path) in enumerate(mounts(spec.config_file, "--config-file")):
        source = {"configMap": {"name": f"{object_name(spec)}-config"}}
        mounted.add("config", source, path, subPath=config_key(number), readOnly=True)
    for name, path in mounts(getattr(spec, "temp_dir", ()), "--temp-dir"):
        mounted.add(name, {"emptyDir": {}}, path)
    mounted.add("dshm", {"emptyDir": {"medium": "Memory", "sizeLimit": spec.share_memory or "2Gi"}}, "/dev/shm")
    add_scratch(mounted)
    return mounted


def object_name(spec: Workload) -> str:
    """Name of the main object that is made for a job or for a server."""
    return spec.full_name if isinstance(spec, TritonServer) else spec.name


def config_key(number: int) -> str:
    """Key of a --config-file in its ConfigMap: any name of a file would not do as one."""
    return f"file-{number}"


def _add_claims(storage: Storage, spec: Workload) -> None:
    claims = mounts(spec.data, "--data")
    parts = pairs(getattr(spec, "data_subpath_expr", ()), "--data-subpath-expr", ":")
    unknown = sorted(set(parts) - {claim for claim, _ in claims})
    if unknown:
        raise ConfigError(f"--data-subpath-expr {unknown[0]}: there is no --data {unknown[0]}:/PATH to take a part of")
    for number, (claim, path) in enumerate(claims):
        name = claim if _VOLUME_NAME.fullmatch(claim) else f"data-{number}"
        source = {"persistentVolumeClaim": {"claimName": claim}}
        storage.add(name, source, path, **given(subPathExpr=parts.get(claim)))


def _add_folders(storage: Storage, texts: Sequence[str]) -> None:
    for number, (outside, path) in enumerate(node_folders(texts)):
        storage.add(f"data-dir-{number}", {"hostPath": {"path": outside, "type": "Directory"}}, path)


def environment(spec: Workload, *more: Object) -> list[Object]:
    """Variables of a container: the basic ones, `more`, and the user's, which win."""
    users = pairs(spec.env, "--env")
    variables = [each for each in (*base_environment(gpu=uses_gpu(spec)), *more) if each["name"] not in users]
    return variables + [{"name": name, "value": literal(value)} for name, value in users.items()]


def base_environment(*, gpu: bool) -> list[Object]:
    """Variables that programs need under any user."""
    values = {"HOME": HOME, "USER": MANAGER}
    if not gpu:
        values["NVIDIA_VISIBLE_DEVICES"] = "void"  # images for GPUs ask for all of them otherwise
    return [{"name": name, "value": value} for name, value in values.items()]


def uses_gpu(spec: Workload) -> bool:
    """Whether its containers are to see a GPU."""
    shared = isinstance(spec, TritonServer) and (spec.gpumemory or spec.gpucore)
    return bool(spec.gpus or shared) or any(name.startswith("nvidia.com/") for name in pairs(spec.device, "--device"))


def resources(spec: Workload) -> Object:
    """The same as request and as limit."""
    wanted = pairs(spec.device, "--device")
    if spec.gpus:
        wanted[GPU] = str(spec.gpus)
    if isinstance(spec, TritonServer):
        wanted |= {name: str(count) for name, count in _shared_gpu(spec).items() if count}
    if isinstance(spec, TrainingJob) and spec.rdma:
        wanted[RDMA] = "1"
    wanted |= given(cpu=spec.cpu, memory=spec.memory)
    return {"requests": dict(wanted), "limits": dict(wanted)} if wanted else {}


def _shared_gpu(server: TritonServer) -> dict[str, int]:
    shared = {GPU_MEMORY: server.gpumemory, GPU_CORES: server.gpucore}
    if server.gpus and any(shared.values()):
        raise ConfigError("--gpus takes whole GPUs, --gpumemory and --gpucore take parts of a shared one: give either")
    return shared


def pod_security() -> Object:
    """Security context of a pod. The number of the user is given for images whose user is root, or has only a name."""
    return {
        "runAsNonRoot": True,
        "runAsUser": USER,
        "runAsGroup": USER,
        "fsGroup": USER,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def container_security(*capabilities: str) -> Object:
    """Security context of a container with no capabilities but these."""
    return {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"], **given(add=list(capabilities))},
    }


def container(
    spec: Workload, name: str, command: list[str], variables: list[Object], held: Storage, **more: Any
) -> Object:
    """The container that runs the user's image."""
    if not spec.image:
        raise ConfigError("--image is required in a cluster")
    folder = spec.working_dir or HOME
    if not folder.startswith("/"):
        raise ConfigError(
            f"--working-dir {folder!r} is not an absolute path: in a cluster it is one of the container's"
        )
    job = isinstance(spec, TrainingJob)
    rdma = ("IPC_LOCK",) if isinstance(spec, TrainingJob) and spec.rdma else ()
    return {
        "name": name,
        "image": spec.image,
        "imagePullPolicy": spec.image_pull_policy or ("Always" if job else "IfNotPresent"),
        "command": command,
        "workingDir": folder,
        "env": variables,
        **given(resources=resources(spec)),
        "securityContext": container_security(*rdma),
        "volumeMounts": held.mounts,
        **more,
    }


def pod(spec: Workload, main: Object, volumes: list[Object], **more: Any) -> Object:
    """A pod of one container: where it may run, and how."""
    return {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": pod_security(),
        **given(
            nodeSelector=pairs(spec.selector, "--selector"),
            tolerations=[toleration(text) for text in spec.toleration],
            imagePullSecrets=[{"name": name} for name in spec.image_pull_secret],
            priorityClassName=spec.priority,
            schedulerName=spec.scheduler,
            hostNetwork=spec.host_network,
            dnsPolicy="ClusterFirstWithHostNet" if spec.host_network else None,
        ),
        "containers": [main],
        "volumes": volumes,
        **more,
    }


def toleration(text: str) -> Object:
    """Arena's forms: `all`, KEY, KEY=VALUE:EFFECT,OPERATOR, and KEY[=VALUE]:EFFECT[:OPERATOR[:SECONDS]]."""
    if text == "all":
        return {"operator": "Exists"}
    taint, *rest = text.replace(",", ":").split(":")
    key, has_value, value = taint.partition("=")
    effect, operator, for_seconds = [*rest, "", "", ""][:3]
    operator = operator or ("Equal" if has_value else "Exists")
    good = key and len(rest) <= 3 and operator in _OPERATORS and (not effect or effect in _EFFECTS)
    good = good and (not for_seconds or (is_number(for_seconds) and effect == "NoExecute"))
    if not good or (operator == "Exists" and value) or (has_value and not rest):
        raise ConfigError(
            f"--toleration {text!r} is none of all, KEY, KEY:EFFECT, KEY=VALUE:EFFECT,OPERATOR and "
            f"KEY=VALUE:EFFECT:OPERATOR:SECONDS; effects are {', '.join(_EFFECTS)}, operators {', '.join(_OPERATORS)}, "
            "seconds go with NoExecute and a value with Equal"
        )
    lasting = int(for_seconds) if for_seconds else None
    return given(key=key, operator=operator, value=value, effect=effect, tolerationSeconds=lasting)


def refuse_options(job: TrainingJob, names: Sequence[str], what: str, reason: str, more: Sequence[str] = ()) -> None:
    """UnsupportedError where a job has any of these options, or the options `more`, which `what` cannot do."""
    options = [flag for name, flag in options_given(job).items() if name in names]
    if options := [*options, *more]:
        raise UnsupportedError(
            f"{what} cannot do {', '.join(options)}: {reason}; leave it out, or submit a PyTorchJob (--api pytorchjob)"
        )
