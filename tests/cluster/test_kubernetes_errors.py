from typing import Any

import pytest
from tests.cluster.api_server_kinds import Kind, forbidden
from tests.cluster.kubernetes_fixtures import World, training, world

from hasten.core.errors import ClusterError, NotFoundError, UnsupportedError

__all__ = ["world"]


def test_a_cluster_without_a_training_operator(world: World) -> None:
    world.store.crds.clear()
    for ask in (
        lambda: world.place.submit(training()),
        lambda: world.place.jobs("default"),
        lambda: world.place.job("x", "default"),
    ):
        with pytest.raises(ClusterError, match=r"does not know the kind PyTorchJob .*training operator; to install"):
            ask()
    world.store.crds.add("pytorchjobs.kubeflow.org")
    assert world.place.jobs("default") == []
    world.place.submit(training())


def test_rights_are_checked_before_the_kind_is_looked_up(world: World) -> None:
    world.server.rules.denied |= {("list", "pytorchjobs.kubeflow.org"), ("list", "trainjobs.trainer.kubeflow.org")}
    with pytest.raises(ClusterError, match=r"admin may not list pytorchjobs.kubeflow.org in namespace default: have a"):
        world.place.jobs("default")
    world.store.crds.clear()
    with pytest.raises(ClusterError, match="does not know the kind PyTorchJob"):
        world.connect().jobs("default")


def test_who_may_see_one_kind_of_jobs_sees_those(world: World) -> None:
    world.place.submit(training())
    world.server.rules.denied.add(("list", "trainjobs.trainer.kubeflow.org"))
    assert [job.name for job in world.place.jobs("default")] == ["convert-bloom"]


def test_a_job_that_is_not_there(world: World) -> None:
    with pytest.raises(NotFoundError, match="there is no training job nothing in namespace default"):
        world.place.job("nothing", "default")
    with pytest.raises(NotFoundError, match="there is no training job nothing"):
        world.place.delete_job("nothing", "default")
    for ask in (
        lambda: world.place.jobs("nowhere"),
        lambda: world.place.job("nothing", "nowhere"),
        lambda: world.place.submit(training(namespace="nowhere")),
    ):
        with pytest.raises(NotFoundError, match=r"there is no namespace nowhere in the cluster at http://127.0.0.1"):
            ask()


def test_a_quota_refuses(world: World) -> None:
    def quota(kind: Kind, body: dict[str, Any]) -> None:
        raise forbidden(kind, body["metadata"]["name"], "exceeded quota: jobs, requested: 1, used: 4, limited: 4")

    world.store.admission.append(quota)
    with pytest.raises(ClusterError, match="the quota of namespace default does not allow PyTorchJob convert-bloom"):
        world.place.submit(training())


def test_an_option_of_another_place(world: World) -> None:
    with pytest.raises(UnsupportedError, match="kubernetes cannot do --map-paths"):
        world.place.submit(training(map_paths=True))


def test_what_cannot_be_rolled_back_is_told(world: World) -> None:
    world.server.rules.denied |= {("create", "services"), ("delete", "pytorchjobs.kubeflow.org")}
    with pytest.raises(ClusterError, match=r"services.*Not removed again.*: PyTorchJob convert-bloom"):
        world.place.submit(training(tensorboard=True, logdir="/mnt/logs"))
