"""Volumes: what each source needs, and what does not go with it."""

import base64
from typing import Any

import pytest

from hasten.cluster.manifests.objects import volume_objects
from hasten.cluster.spec import Volume
from hasten.core.errors import ConfigError, UnsupportedError

OSS: dict[str, Any] = {"oss_bucket": "b", "oss_url": "oss.example"}


def made(secret: str | None = None, **options: Any) -> list[dict[str, Any]]:
    return volume_objects(Volume(**{"name": "models", "namespace": "team", **options}), secret)


def test_a_key_is_in_the_secret_and_nowhere_else() -> None:
    secret, volume, claim = made("s3cr3t", access_key_id="id", **OSS)
    assert {name: base64.b64decode(value) for name, value in secret["data"].items()} == {
        "akId": b"id",
        "akSecret": b"s3cr3t",
    }
    reference = {"name": secret["metadata"]["name"], "namespace": secret["metadata"]["namespace"]}
    assert volume["spec"]["csi"]["nodePublishSecretRef"] == reference
    assert "s3cr3t" not in repr([volume, claim])


@pytest.mark.parametrize(
    "options", [OSS, {"s3_bucket": "b"}, {"nfs_server": "10.0.0.5", "path": "/e"}], ids=["oss", "s3", "nfs"]
)
@pytest.mark.parametrize("read_only", [False, True])
def test_the_claim_and_the_volume_are_for_each_other(options: dict[str, Any], read_only: bool) -> None:
    volume, claim = made(read_only=read_only, **options)
    assert volume["spec"]["claimRef"] == {"namespace": "team", "name": "models"}
    chosen = claim["spec"].get("volumeName") or claim["spec"]["selector"]["matchLabels"]["alicloud-pvname"]
    assert chosen == volume["metadata"]["name"] == "team.models"
    assert claim["spec"].get("selector", {}).get("matchLabels", {}).items() <= volume["metadata"]["labels"].items()
    modes = ["ReadOnlyMany" if read_only else "ReadWriteMany"]
    assert volume["spec"]["accessModes"] == claim["spec"]["accessModes"] == modes
    assert volume["spec"]["persistentVolumeReclaimPolicy"] == "Retain"
    assert volume["spec"]["storageClassName"] == claim["spec"]["storageClassName"] == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs --oss-bucket, --s3-bucket or --nfs-server"),
        ({"path": "/here"}, "needs --oss-bucket"),
        ({"oss_bucket": "b"}, "--oss-bucket needs --oss-url"),
        ({"nfs_server": "s"}, "--nfs-server needs --path"),
        ({"nfs_server": "s", "path": "x"}, "--nfs-server needs --path, the folder that it exports, from / on"),
        ({"s3_bucket": "b", "oss_url": "u"}, "--oss-url does not go with --s3-bucket"),
        ({"nfs_server": "s", "path": "/e", "s3_region": "r"}, "--s3-region does not go with --nfs-server"),
        ({"nfs_server": "s", "path": "/e", "access_key_id": "i"}, "--access-key-id does not go with --nfs-server"),
        ({**OSS, "access_key_id": "i"}, "go together"),
        ({**OSS, "secret": "s"}, "go together"),
        ({**OSS, "name": "a" * 60}, "the namespace and the volume's name together"),
    ],
)
def test_what_does_not_go_together_is_said(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        made(**options)


def test_a_key_for_s3_is_the_drivers() -> None:
    with pytest.raises(UnsupportedError, match="Mountpoint for S3 takes no key of a volume"):
        made("s", s3_bucket="b", access_key_id="i")
