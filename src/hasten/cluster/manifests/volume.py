"""A volume over object storage or NFS: a PersistentVolume, the claim that jobs mount it by, the Secret of its key."""

import base64

from hasten.cluster.manifests.pod import MANAGER, USER, Object, given
from hasten.cluster.spec import Volume
from hasten.core.errors import ConfigError, UnsupportedError

OSS_DRIVER = "ossplugin.csi.alibabacloud.com"
S3_DRIVER = "s3.csi.aws.com"
_OSS_LABEL = "alicloud-pvname"
_OSSFS_USER = f"-o allow_other -o uid={USER} -o gid={USER} -o umask=022"
"""ossfs lets only root see the files otherwise."""
_LONGEST_LABEL = 63
"""The name is a label's value too."""
_S3_USER = (f"uid={USER}", f"gid={USER}", "allow-other")

_MINE = {
    "oss_bucket": ("oss_url", "access_key_id"),
    "s3_bucket": ("s3_region",),
    "nfs_server": (),
}
"""Options that a source has for itself."""
_FLAGS = ("oss_url", "s3_region", "access_key_id")


def volume_objects(volume: Volume, secret: str | None) -> list[Object]:
    """The Secret if there is a key, the PersistentVolume and the PersistentVolumeClaim.

    `secret` is the secret key that belongs to --access-key-id.
    """
    source = _source(volume)
    if (volume.access_key_id is None) != (secret is None):
        raise ConfigError("--access-key-id and its secret key, the variable HASTEN_ACCESS_KEY_SECRET, go together")
    objects = [] if secret is None else [_secret(volume, secret)]
    return [*objects, _persistent_volume(volume, source), _claim(volume, source)]


def volume_name(volume: Volume) -> str:
    """Name of the PersistentVolume, which no namespace shields from others; ConfigError where it is too long.

    Neither part can have a dot, so no other namespace and name make the same.
    """
    name = f"{volume.namespace}.{volume.name}"
    if len(name) > _LONGEST_LABEL:
        raise ConfigError(
            f"the namespace and the volume's name together, {name!r}, have more than {_LONGEST_LABEL} characters"
        )
    return name


def earlier_volume_name(volume: Volume) -> str:
    """What earlier versions called the PersistentVolume; volumes of other namespaces may have the same name."""
    return f"{volume.namespace}-{volume.name}"


def is_of(persistent_volume: Object, volume: Volume) -> bool:
    """Whether a PersistentVolume is kept for the claim of this volume."""
    claim = (persistent_volume.get("spec") or {}).get("claimRef") or {}
    return (claim.get("namespace"), claim.get("name")) == (volume.namespace, volume.name)


def secret_name(volume: Volume) -> str:
    """Name of the Secret."""
    return f"{volume.name}-key"


def _source(volume: Volume) -> str:
    """Which of the sources it has; ConfigError for options that it has not, or that are missing."""
    source = next((name for name in _MINE if getattr(volume, name) is not None), None)
    if source is None:
        raise ConfigError("a volume of a cluster needs --oss-bucket, --s3-bucket or --nfs-server")
    strange = [name for name in _FLAGS if getattr(volume, name) is not None and name not in _MINE[source]]
    if strange == ["access_key_id"] and source == "s3_bucket":
        raise UnsupportedError(
            "--access-key-id: Mountpoint for S3 takes no key of a volume; give its driver the secret aws-secret, or "
            "the nodes or the driver's service account a role"
        )
    if strange:
        raise ConfigError(f"--{strange[0].replace('_', '-')} does not go with --{source.replace('_', '-')}")
    if source == "oss_bucket" and not volume.oss_url:
        raise ConfigError("--oss-bucket needs --oss-url, such as oss-cn-hangzhou-internal.aliyuncs.com")
    if source == "nfs_server" and not (volume.path or "").startswith("/"):
        raise ConfigError("--nfs-server needs --path, the folder that it exports, from / on")
    return source


def _access(volume: Volume) -> list[str]:
    return ["ReadOnlyMany" if volume.read_only else "ReadWriteMany"]


def _secret(volume: Volume, secret: str) -> Object:
    values = {"akId": volume.access_key_id or "", "akSecret": secret}
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {
            "name": secret_name(volume),
            "namespace": volume.namespace,
            "labels": {"app.kubernetes.io/managed-by": MANAGER},
        },
        "type": "Opaque",
        "data": {name: base64.b64encode(value.encode()).decode() for name, value in values.items()},
    }


def _persistent_volume(volume: Volume, source: str) -> Object:
    how = {"oss_bucket": _oss, "s3_bucket": _s3, "nfs_server": _nfs}[source](volume)
    name = volume_name(volume)
    oss = {_OSS_LABEL: name} if source == "oss_bucket" else {}
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": name, "labels": {"app.kubernetes.io/managed-by": MANAGER, **oss}},
        "spec": {
            "capacity": {"storage": volume.size},
            "accessModes": _access(volume),
            "persistentVolumeReclaimPolicy": "Retain",
            "storageClassName": "",
            "claimRef": {"namespace": volume.namespace, "name": volume.name},
            **how,
        },
    }


def _oss(volume: Volume) -> Object:
    options = [_OSSFS_USER] if volume.oss_fuse == "ossfs" else []
    options += [volume.mount_options] if volume.mount_options else []
    attributes = {
        "bucket": volume.oss_bucket,
        "url": volume.oss_url,
        "path": volume.path or "/",
        "fuseType": volume.oss_fuse,
        **given(otherOpts=" ".join(options)),
    }
    key = {"nodePublishSecretRef": {"name": secret_name(volume), "namespace": volume.namespace}}
    return {
        "csi": {
            "driver": OSS_DRIVER,
            "volumeHandle": volume_name(volume),
            **given(readOnly=volume.read_only),
            **(key if volume.access_key_id is not None else {}),
            "volumeAttributes": attributes,
        }
    }


def _s3(volume: Volume) -> Object:
    options = [*_S3_USER, *(["read-only"] if volume.read_only else ["allow-delete", "allow-overwrite"])]
    options += [f"region {volume.s3_region}"] if volume.s3_region else []
    options += [f"prefix {volume.path.strip('/')}/"] if volume.path and volume.path.strip("/") else []
    return {
        "mountOptions": [*options, *_given_options(volume)],
        "csi": {
            "driver": S3_DRIVER,
            "volumeHandle": volume_name(volume),
            "volumeAttributes": {"bucketName": volume.s3_bucket},
        },
    }


def _nfs(volume: Volume) -> Object:
    source = {"server": volume.nfs_server, "path": volume.path, **given(readOnly=volume.read_only)}
    return {**given(mountOptions=_given_options(volume)), "nfs": source}


def _given_options(volume: Volume) -> list[str]:
    return [text.strip() for text in (volume.mount_options or "").split(",") if text.strip()]


def _claim(volume: Volume, source: str) -> Object:
    name = volume_name(volume)
    oss = {"selector": {"matchLabels": {_OSS_LABEL: name}}}  # as Alibaba Cloud's own tools write it
    chosen: Object = oss if source == "oss_bucket" else {"volumeName": name}
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {
            "name": volume.name,
            "namespace": volume.namespace,
            "labels": {"app.kubernetes.io/managed-by": MANAGER},
            **given(annotations=given(description=volume.description)),
        },
        "spec": {
            "accessModes": _access(volume),
            "storageClassName": "",
            "resources": {"requests": {"storage": volume.size}},
            **chosen,
        },
    }
