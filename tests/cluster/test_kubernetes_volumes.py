import base64
from typing import Any

import pytest
from tests.cluster.kubernetes_fixtures import World, training, world

from hasten.cluster.manifests.objects import volume_objects
from hasten.cluster.spec import Volume
from hasten.core.errors import ClusterError, ConfigError, ExistsError, NotFoundError

__all__ = ["world"]


def bucket(**options: Any) -> Volume:
    wanted = {"name": "bloom-pvc", "oss_bucket": "models", "oss_url": "oss.example.com", "access_key_id": "id"}
    return Volume(**{**wanted, **options})


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HASTEN_ACCESS_KEY_SECRET", "geheim")


def test_a_volume_and_all_that_belongs_to_it(world: World) -> None:
    world.backend.create_volume(bucket(description="BLOOM"))
    parts = ["PersistentVolume/default.bloom-pvc", "PersistentVolumeClaim/bloom-pvc", "Secret/bloom-pvc-key"]
    assert world.leftovers() == parts
    assert base64.b64decode(world.object("Secret", "bloom-pvc-key")["data"]["akSecret"]) == b"geheim"
    listed = world.backend.volumes("default")
    assert [(each.name, each.access_mode, each.description) for each in listed] == [
        ("bloom-pvc", "ReadWriteMany", "BLOOM"),
    ]
    world.backend.delete_volume("bloom-pvc", "default")
    assert world.leftovers() == []


def namespaces(world: World, *names: str) -> None:
    for name in names:
        world.store.write({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})


NEIGHBOURS = [("a", "b-c"), ("a-b", "c")]
"""Namespaces and names that are the same once they are joined by a hyphen."""


@pytest.mark.parametrize(("gone", "stays"), [NEIGHBOURS, NEIGHBOURS[::-1]])
def test_a_volume_of_another_namespace_stays(world: World, gone: tuple[str, str], stays: tuple[str, str]) -> None:
    namespaces(world, "a", "a-b")
    for namespace, name in NEIGHBOURS:
        world.backend.create_volume(bucket(namespace=namespace, name=name))
    bound = {each["metadata"]["name"] for each in world.store.all("PersistentVolume")}
    assert {each["spec"]["volumeName"] for each in world.store.all("PersistentVolumeClaim")} == bound
    assert len(bound) == 2
    world.backend.delete_volume(gone[1], gone[0])
    namespace, name = stays
    assert world.leftovers() == [
        f"PersistentVolume/{namespace}.{name}",
        f"PersistentVolumeClaim/{name}",
        f"Secret/{name}-key",
    ]


def earlier_volume(world: World, namespace: str, name: str) -> None:
    """A volume as earlier versions named it."""
    secret, volume, claim = volume_objects(bucket(namespace=namespace, name=name), "s")
    volume["metadata"]["name"] = f"{namespace}-{name}"
    for each in (secret, volume, claim):
        world.store.write(each)


def test_a_volume_of_an_earlier_version_is_found_by_its_claim(world: World) -> None:
    namespaces(world, "a", "a-b")
    earlier_volume(world, "a-b", "c")
    world.backend.create_volume(bucket(namespace="a", name="b-c"))
    world.backend.delete_volume("b-c", "a")
    assert "PersistentVolume/a-b-c" in world.leftovers()
    world.backend.delete_volume("c", "a-b")
    assert world.leftovers() == []


def test_a_volume_that_is_kept_for_another_claim_stays(world: World) -> None:
    world.backend.create_volume(bucket())
    claim = {"namespace": "default", "name": "other"}
    world.change(world.object("PersistentVolume", "default.bloom-pvc"), {"spec": {"claimRef": claim}})
    world.backend.delete_volume("bloom-pvc", "default")
    assert world.leftovers() == ["PersistentVolume/default.bloom-pvc"]


def test_nothing_is_left_of_a_volume_that_fails(world: World) -> None:
    world.server.rules.denied.add(("create", "persistentvolumeclaims"))
    with pytest.raises(ClusterError, match="admin may not create persistentvolumeclaims in namespace default"):
        world.backend.create_volume(bucket())
    assert world.leftovers() == []
    world.server.rules.denied = {("create", "persistentvolumes")}
    with pytest.raises(ClusterError, match="admin may not create persistentvolumes in the cluster"):
        world.backend.create_volume(bucket())
    assert world.leftovers() == []


def test_a_name_that_is_taken(world: World) -> None:
    world.backend.create_volume(bucket())
    with pytest.raises(ExistsError, match="Secret bloom-pvc-key in namespace default already"):
        world.backend.create_volume(bucket(oss_bucket="other"))
    assert len(world.leftovers()) == 3


def test_a_key_without_its_secret(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HASTEN_ACCESS_KEY_SECRET")
    with pytest.raises(ConfigError, match="HASTEN_ACCESS_KEY_SECRET"):
        world.backend.create_volume(bucket())


def claim(world: World, name: str, phase: str) -> None:
    metadata = {"name": name, "annotations": {"owner": "anna"}}
    body = {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": metadata}
    world.store.write({**body, "spec": {"accessModes": ["ReadOnlyMany"]}, "status": {"phase": phase}})


def test_claims_of_others_are_listed_when_bound_and_never_deleted(world: World) -> None:
    claim(world, "shared", "Bound")
    claim(world, "waiting", "Pending")
    assert [(each.name, each.owner, each.access_mode) for each in world.backend.volumes("default")] == [
        ("shared", "anna", "ReadOnlyMany")
    ]
    with pytest.raises(ClusterError, match="volume shared was not created by hasten"):
        world.backend.delete_volume("shared", "default")
    assert len(world.leftovers()) == 2


def test_a_secret_of_somebody_else_stays(world: World) -> None:
    world.backend.create_volume(bucket(access_key_id=None))
    world.store.write({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "bloom-pvc-key"}})
    world.backend.delete_volume("bloom-pvc", "default")
    assert world.leftovers() == ["Secret/bloom-pvc-key"]


def test_what_is_left_of_a_volume_can_be_deleted(world: World) -> None:
    world.backend.create_volume(bucket())
    world.store.remove("v1", "PersistentVolumeClaim", "default", "bloom-pvc")
    world.backend.delete_volume("bloom-pvc", "default")
    assert world.leftovers() == []


def test_a_volume_in_use_stays(world: World) -> None:
    world.backend.create_volume(bucket())
    world.backend.submit(training())
    pod = world.train("convert-bloom")
    with pytest.raises(ClusterError, match="volume bloom-pvc is mounted by convert-bloom-master-0: delete the job"):
        world.backend.delete_volume("bloom-pvc", "default")
    world.run(pod, "Succeeded")
    world.backend.delete_volume("bloom-pvc", "default")
    assert world.store.names("PersistentVolumeClaim") == []


def test_a_volume_that_is_not_there(world: World) -> None:
    with pytest.raises(NotFoundError, match="there is no volume x in namespace default"):
        world.backend.delete_volume("x", "default")
    for ask in (world.backend.volumes, lambda namespace: world.backend.delete_volume("x", namespace)):
        with pytest.raises(NotFoundError, match="no namespace nowhere"):
            ask("nowhere")


def node(
    world: World, name: str, ready: str, allocatable: dict[str, str] | None = None, roles: tuple[str, ...] = ()
) -> None:
    labels = {f"node-role.kubernetes.io/{role}": "" for role in roles}
    status = {
        "addresses": [{"type": "Hostname", "address": name}, {"type": "InternalIP", "address": "10.0.0.1"}],
        "conditions": [{"type": "Ready", "status": ready}],
        "allocatable": {"cpu": "64", **(allocatable or {})},
    }
    metadata = {"name": name, "labels": labels}
    world.store.write({"apiVersion": "v1", "kind": "Node", "metadata": metadata, "spec": {}, "status": status})


def test_nodes_and_their_gpus(world: World) -> None:
    node(world, "gpu-1", "True", {"nvidia.com/gpu": "8", "nvidia.com/mig-1g.10gb": "2"})
    node(world, "amd-1", "Unknown", {"amd.com/gpu": "4"})
    node(world, "head", "True", roles=("control-plane",))
    world.change(world.object("Node", "head"), {"spec": {"unschedulable": True}})
    world.backend.submit(training(gpus=4))
    world.run(world.train("convert-bloom"))
    world.backend.submit(training("ended", gpus=2))
    world.run(world.train("ended"), "Succeeded")
    message = [(each.name, each.role, each.status, each.gpus, each.allocated_gpus) for each in world.backend.nodes()]
    assert message == [
        ("amd-1", "<none>", "NotReady", 4, 0),
        ("gpu-1", "<none>", "Ready", 10, 4),
        ("head", "control-plane", "Ready,SchedulingDisabled", 0, 0),
    ]
    assert world.backend.nodes()[0].address == "10.0.0.1"


def test_the_right_to_see_nodes(world: World) -> None:
    world.server.rules.denied.add(("list", "nodes"))
    with pytest.raises(ClusterError, match="admin may not list nodes in the cluster: have a role bound to it"):
        world.backend.nodes()
