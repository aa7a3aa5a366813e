"""A deletion and an update touch what they name and nothing else, whatever stands beside it."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.cluster.kubernetes_fixtures import World, serving, training, world
from tests.cluster.local_site import Site, site
from tests.waiting import eventually

from hasten.cluster.backend import Backend, ServerUpdate, Status
from hasten.cluster.spec import TrainingJob, Volume
from hasten.core.errors import ConfigError, ExistsError

__all__ = ["world"]

NAMESPACES = ("a", "a-b", "default")
JOBS = (("default", "a"), ("default", "a-b"), ("a", "a"), ("a", "b-a"), ("a-b", "a"))
SERVERS = (("default", "a", "1"), ("default", "a", "1-1"), ("default", "a-1", "2"), ("a", "a", "1"), ("a-b", "a", "1"))
VOLUMES = (("default", "a"), ("default", "a-key"), ("a", "b-c"), ("a-b", "c"), ("a", "a"))


@pytest.fixture
def full(world: World) -> World:
    """A cluster where names are each other's beginnings, and the same in several namespaces."""
    for name in NAMESPACES:
        world.store.write({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
    for namespace, name in JOBS:
        world.backend.submit(training(name, namespace=namespace, config_file=[f"{__file__}:/etc/x"]))
    for namespace, name, version in SERVERS:
        world.backend.serve(serving(name, version, namespace=namespace, replicas=2, allow_metrics=True))
    for namespace, name in VOLUMES:
        world.backend.create_volume(Volume(namespace=namespace, name=name, nfs_server="s", path=f"/{namespace}/{name}"))
    return world


def state(world: World) -> dict[str, str]:
    """All objects as they are stored, by kind, namespace and name."""
    world.store.settle()
    return {
        f"{each['kind']} {each['metadata'].get('namespace', '')} {each['metadata']['name']}": json.dumps(each)
        for each in world.store.all()
    }


def changed(world: World, act: Callable[[Backend], object]) -> set[str]:
    """What is not as it was, once something was done."""
    before = state(world)
    act(world.backend)
    after = state(world)
    return {key for key in before | after if before.get(key) != after.get(key)}


@pytest.mark.parametrize(("namespace", "name"), JOBS)
def test_a_job_is_deleted_alone(full: World, namespace: str, name: str) -> None:
    gone = changed(full, lambda backend: backend.delete_job(name, namespace))
    assert gone == {f"PyTorchJob {namespace} {name}", f"ConfigMap {namespace} {name}-config"}


@pytest.mark.parametrize(("namespace", "name", "version"), SERVERS)
def test_a_server_is_deleted_alone(full: World, namespace: str, name: str, version: str) -> None:
    gone = changed(full, lambda backend: backend.delete_server(name, version, namespace))
    own = f"{namespace} {name}-{version}-tritoninferenceserver"
    assert gone == {f"{kind} {own}" for kind in ("Deployment", "Service", "PodDisruptionBudget", "PodMonitor")}


@pytest.mark.parametrize(("namespace", "name", "version"), SERVERS)
def test_a_server_is_changed_alone(full: World, namespace: str, name: str, version: str) -> None:
    update = ServerUpdate(image="hasten:2", replicas=3, env=["A=1"], label=["team=b"])
    own = {f"Deployment {namespace} {name}-{version}-tritoninferenceserver"}
    assert changed(full, lambda backend: backend.update_server(name, version, namespace, update)) == own


@pytest.mark.parametrize(("namespace", "name"), VOLUMES)
def test_a_volume_is_deleted_alone(full: World, namespace: str, name: str) -> None:
    gone = changed(full, lambda backend: backend.delete_volume(name, namespace))
    assert gone == {f"PersistentVolumeClaim {namespace} {name}", f"PersistentVolume  {namespace}.{name}"}


def test_the_key_of_a_volume_is_its_own(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HASTEN_ACCESS_KEY_SECRET", "secret")
    bucket: dict[str, Any] = {"oss_bucket": "b", "oss_url": "u", "access_key_id": "i"}
    for name in ("a", "a-key"):
        world.backend.create_volume(Volume(name=name, **bucket))
    gone = changed(world, lambda backend: backend.delete_volume("a", "default"))
    assert gone == {"PersistentVolumeClaim default a", "PersistentVolume  default.a", "Secret default a-key"}


def test_names_and_versions_that_make_the_same_do_not_share(world: World) -> None:
    world.backend.serve(serving("a", "b-c"))
    assert changed(world, _taken) == set()


def _taken(backend: Backend) -> None:
    with pytest.raises(ExistsError, match="there is a Deployment a-b-c-tritoninferenceserver already"):
        backend.serve(serving("a-b", "c"))


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Site]:
    with site(tmp_path / "home") as result:
        yield result


def test_local_neighbours(here: Site, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    for namespace, name in JOBS:
        here.backend.submit(TrainingJob(name=name, namespace=namespace, command="exec sleep 600"))
    for namespace, name in VOLUMES:
        here.backend.create_volume(Volume(namespace=namespace, name=name, path=str(tmp_path)))
    backend = here.backend
    eventually(lambda: {job.status for job in backend.jobs(None)} == {Status.RUNNING}, lambda: f"{backend.jobs(None)}")
    here.backend.delete_job("a", "a")
    here.backend.delete_volume("b-c", "a")
    left = {(job.namespace, job.name): job.status for job in here.backend.jobs(None)}
    assert left == {key: Status.RUNNING for key in JOBS if key != ("a", "a")}
    assert {(volume.namespace, volume.name) for volume in here.backend.volumes(None)} == set(VOLUMES) - {("a", "b-c")}


def test_an_update_of_one_version_names_it(full: World) -> None:
    before = state(full)
    with pytest.raises(ConfigError, match="has the versions 1, 1-1: name one with --version"):
        full.backend.update_server("a", None, "default", ServerUpdate(replicas=5))
    assert state(full) == before
