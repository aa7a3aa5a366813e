"""Names that verbs are given: none may reach beyond what it names."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.cluster.kubernetes_fixtures import World, serving, training, world

from hasten.cluster.local.place import LocalPlace
from hasten.cluster.places import LogOptions, Place, ServerUpdate
from hasten.cluster.spec import Volume
from hasten.core.errors import ConfigError, NotFoundError

__all__ = ["world"]

BAD_NAMES = ("", ".", "..", "../default/x", "a/b", "UPPER", "a b", "-x", "a\n", "x?y=z", "%2e%2e", "é")
VERBS: dict[str, Callable[[Place, str, str], object]] = {
    "get": lambda place, name, where: place.job(name, where),
    "logs": lambda place, name, where: list(place.job_logs(name, where, LogOptions())),
    "attach": lambda place, name, where: place.attach_job(name, where, None, None, ["true"]),
    "delete": lambda place, name, where: place.delete_job(name, where),
    "data delete": lambda place, name, where: place.delete_volume(name, where),
    "serve get": lambda place, name, where: place.server(name, None, where),
    "serve logs": lambda place, name, where: list(place.server_logs(name, None, where, LogOptions())),
    "serve attach": lambda place, name, where: place.attach_server(name, None, where, None, None, ["true"]),
    "serve delete": lambda place, name, where: place.delete_server(name, None, where),
    "serve update": lambda place, name, where: place.update_server(name, None, where, ServerUpdate(replicas=1)),
}
LISTS: dict[str, Callable[[Place, str], object]] = {
    "list": lambda place, where: place.jobs(where),
    "data list": lambda place, where: place.volumes(where),
    "serve list": lambda place, where: place.servers(where),
}


@pytest.fixture(params=["local", "kubernetes"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """Each of the two; the second with a job, a server and a volume that a name could reach."""
    if request.param == "local":
        yield LocalPlace(tmp_path / "home")
        assert not (tmp_path / "home").exists()
        return
    there: World = request.getfixturevalue("world")
    there.place.submit(training())
    there.place.serve(serving())
    there.place.create_volume(Volume(name="v", nfs_server="s", path="/p"))
    before = there.leftovers()
    yield there.place
    assert there.leftovers() == before


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_checks_names(place: Place, verb: str) -> None:
    for name in BAD_NAMES:
        with pytest.raises(ConfigError, match=r"must have at most"):
            VERBS[verb](place, name, "default")
        with pytest.raises(ConfigError, match=r"namespace '.*must have at most"):
            VERBS[verb](place, "x", name)
    with pytest.raises(NotFoundError, match="there is no"):
        VERBS[verb](place, "x", "default")


@pytest.mark.parametrize("verb", LISTS)
def test_lists_check_their_namespace(place: Place, verb: str) -> None:
    for name in BAD_NAMES:
        with pytest.raises(ConfigError, match=r"namespace '.*must have at most"):
            LISTS[verb](place, name)


VERSIONED: dict[str, Callable[[Place, str], object]] = {
    "serve get": lambda place, version: place.server("x", version, "default"),
    "serve logs": lambda place, version: list(place.server_logs("x", version, "default", LogOptions())),
    "serve attach": lambda place, version: place.attach_server("x", version, "default", None, None, []),
    "serve delete": lambda place, version: place.delete_server("x", version, "default"),
    "serve update": lambda place, version: place.update_server("x", version, "default", ServerUpdate(gpus=0)),
}


@pytest.mark.parametrize("verb", VERSIONED)
def test_versions_are_checked(place: Place, verb: str) -> None:
    for version in BAD_NAMES:
        with pytest.raises(ConfigError, match=r"--version '.*must have"):
            VERSIONED[verb](place, version)


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
    assert world.place.job("7b.train", "default").name == "7b.train"
    world.place.delete_job("7b.train", "default")
    assert world.leftovers() == []
