from typing import Any

import pytest
from tests.cluster.api_server_kinds import Kind, forbidden
from tests.cluster.kubernetes_fixtures import World, training, world

from hasten.core.errors import ClusterError, NotFoundError, UnsupportedError

__all__ = ["world"]


def test_a_cluster_without_a_training_operator(world: World) -> None:
    world.store.crds.clear()
    for ask in (
        lambda: world.backend.submit(training()),
        lambda: world.backend.jobs("default"),
        lambda: world.backend.job("x", "default"),
    ):
        with pytest.raises(ClusterError, match=r"does not know the kind PyTorchJob .*training operator; to install"):
            ask()
    world.store.crds.add("pytorchjobs.kubeflow.org")
    assert world.backend.jobs("default") == []
    world.backend.submit(training())


def test_rights_are_checked_before_the_kind_is_looked_up(world: World) -> None:
    world.server.rules.denied |= {("list", "pytorchjobs.kubeflow.org"), ("list", "trainjobs.trainer.kubeflow.org")}
    with pytest.raises(ClusterError, match=r"admin may not list pytorchjobs.kubeflow.org in namespace default: have a"):
        world.backend.jobs("default")
    world.store.crds.clear()
    with pytest.raises(ClusterError, match="does not know the kind PyTorchJob"):
        world.connect().jobs("default")


def test_who_may_see_one_kind_of_jobs_sees_those(world: World) -> None:
    world.backend.submit(training())
    world.server.rules.denied.add(("list", "trainjobs.trainer.kubeflow.org"))
    assert [job.name for job in world.backend.jobs("default")] == ["convert-bloom"]


def test_a_job_that_is_not_there(world: World) -> None:
    with pytest.raises(NotFoundError, match="there is no training job nothing in namespace default"):
        world.backend.job("nothing", "default")
    with pytest.raises(NotFoundError, match="there is no training job nothing"):
        world.backend.delete_job("nothing", "default")
    for ask in (
        lambda: world.backend.jobs("nowhere"),
        lambda: world.backend.job("nothing", "nowhere"),
        lambda: world.backend.submit(training(namespace="nowhere")),
    ):
        with pytest.raises(NotFoundError, match=r"there is no namespace nowhere in the cluster at http://127.0.0.1"):
            ask()


def test_a_quota_refuses(world: World) -> None:
    def quota(kind: Kind, body: dict[str, Any]) -> None:
        raise forbidden(kind, body["metadata"]["name"], "exceeded quota: jobs, requested: 1, used: 4, limited: 4")

    world.store.admission.append(quota)
    with pytest.raises(ClusterError, match="the quota of namespace default does not allow PyTorchJob convert-bloom"):
        world.backend.submit(training())


def test_an_option_of_another_backend(world: World) -> None:
    with pytest.raises(UnsupportedError, match="kubernetes cannot do --map-paths"):
        world.backend.submit(training(map_paths=True))


def test_what_cannot_be_rolled_back_is_told(world: World) -> None:
    world.server.rules.denied |= {("create", "services"), ("delete", "pytorchjobs.kubeflow.org")}
    with pytest.raises(ClusterError, match=r"services.*Not removed again.*: PyTorchJob convert-bloom"):
        world.backend.submit(training(tensorboard=True, logdir="/mnt/logs"))
