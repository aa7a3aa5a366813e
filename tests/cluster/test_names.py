"""Names that verbs are given: none may reach beyond what it names."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.cluster.kubernetes_fixtures import World, serving, training, world

from hasten.cluster.backend import Backend, LogOptions, ServerUpdate
from hasten.cluster.local.backend import LocalBackend
from hasten.cluster.spec import Volume
from hasten.core.errors import ConfigError, NotFoundError

__all__ = ["world"]

BAD_NAMES = ("", ".", "..", "../default/x", "a/b", "UPPER", "a b", "-x", "a\n", "x?y=z", "%2e%2e", "é")
VERBS: dict[str, Callable[[Backend, str, str], object]] = {
    "get": lambda backend, name, where: backend.job(name, where),
    "logs": lambda backend, name, where: list(backend.job_logs(name, where, LogOptions())),
    "attach": lambda backend, name, where: backend.attach_job(name, where, None, None, ["true"]),
    "delete": lambda backend, name, where: backend.delete_job(name, where),
    "data delete": lambda backend, name, where: backend.delete_volume(name, where),
    "serve get": lambda backend, name, where: backend.server(name, None, where),
    "serve logs": lambda backend, name, where: list(backend.server_logs(name, None, where, LogOptions())),
    "serve attach": lambda backend, name, where: backend.attach_server(name, None, where, None, None, ["true"]),
    "serve delete": lambda backend, name, where: backend.delete_server(name, None, where),
    "serve update": lambda backend, name, where: backend.update_server(name, None, where, ServerUpdate(replicas=1)),
}
LISTS: dict[str, Callable[[Backend, str], object]] = {
    "list": lambda backend, where: backend.jobs(where),
    "data list": lambda backend, where: backend.volumes(where),
    "serve list": lambda backend, where: backend.servers(where),
}


@pytest.fixture(params=["local", "kubernetes"])
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Backend]:
    """Each of the two; the second with a job, a server and a volume that a name could reach."""
    if request.param == "local":
        yield LocalBackend(tmp_path / "home")
        assert not (tmp_path / "home").exists()
        return
    there: World = request.getfixturevalue("world")
    there.backend.submit(training())
    there.backend.serve(serving())
    there.backend.create_volume(Volume(name="v", nfs_server="s", path="/p"))
    before = there.leftovers()
    yield there.backend
    assert there.leftovers() == before


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_checks_names(backend: Backend, verb: str) -> None:
    for name in BAD_NAMES:
        with pytest.raises(ConfigError, match=r"must have at most"):
            VERBS[verb](backend, name, "default")
        with pytest.raises(ConfigError, match=r"namespace '.*must have at most"):
            VERBS[verb](backend, "x", name)
    with pytest.raises(NotFoundError, match="there is no"):
        VERBS[verb](backend, "x", "default")


@pytest.mark.parametrize("verb", LISTS)
def test_lists_check_their_namespace(backend: Backend, verb: str) -> None:
    for name in BAD_NAMES:
        with pytest.raises(ConfigError, match=r"namespace '.*must have at most"):
            LISTS[verb](backend, name)


VERSIONED: dict[str, Callable[[Backend, str], object]] = {
    "serve get": lambda backend, version: backend.server("x", version, "default"),
    "serve logs": lambda backend, version: list(backend.server_logs("x", version, "default", LogOptions())),
    "serve attach": lambda backend, version: backend.attach_server("x", version, "default", None, None, []),
    "serve delete": lambda backend, version: backend.delete_server("x", version, "default"),
    "serve update": lambda backend, version: backend.update_server("x", version, "default", ServerUpdate(gpus=0)),
}


@pytest.mark.parametrize("verb", VERSIONED)
def test_versions_are_checked(backend: Backend, verb: str) -> None:
    for version in BAD_NAMES:
        with pytest.raises(ConfigError, match=r"--version '.*must have"):
            VERSIONED[verb](backend, version)


def test_jobs_and_volumes_that_others_named_can_be_used(world: World) -> None:
    metadata = {"name": "7b.train", "namespace": "default"}
    world.store.write(
        {
            "apiVersion": "kubeflow.org/v1",
            "kind": "PyTorchJob",
            "metadata": metadata,
            "spec": {"pytorchReplicaSpecs": {}},
        }
    )
    assert world.backend.job("7b.train", "default").name == "7b.train"
    world.backend.delete_job("7b.train", "default")
    assert world.leftovers() == []
