import gc
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from kubernetes.client import ApiClient, Configuration, CoreV1Api, CustomObjectsApi
from tests.cluster.api_server import ADMIN
from tests.cluster.kubernetes_fixtures import World, training, world

__all__ = ["world"]

JOBS = 1000
MOST = 1.5


def fill(world: World, count: int) -> None:
    """Running jobs with a pod each, all like the first."""
    world.place.submit(training("job-0"))
    world.run(world.train("job-0"))
    world.set_conditions("job-0", "Created", "Running")
    job, pod = world.object("PyTorchJob", "job-0"), world.object("Pod", "job-0-master-0")
    with world.store.lock:
        for number in range(1, count):
            name = f"job-{number}"
            metadata = {**job["metadata"], "name": name, "uid": f"uid-{number}"}
            world.store.put(("pytorchjobs.kubeflow.org", "default", name), {**job, "metadata": metadata})
            labels = {**pod["metadata"]["labels"], "training.kubeflow.org/job-name": name}
            owner = {**pod["metadata"]["ownerReferences"][0], "name": name, "uid": f"uid-{number}"}
            metadata = {**pod["metadata"], "name": f"{name}-master-0", "labels": labels, "ownerReferences": [owner]}
            world.store.put(("pods", "default", metadata["name"]), {**pod, "metadata": metadata})


@contextmanager
def calm() -> Iterator[None]:
    """Python's garbage collector looks at nothing that was there before, such as the server's objects."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def least(first: Callable[[], object], second: Callable[[], object], times: int = 7) -> tuple[float, float]:
    """Seconds of the fastest of several runs of each, taken in turn."""
    taken: tuple[list[float], list[float]] = ([], [])
    for _ in range(times):
        for measured, seconds in zip((first, second), taken, strict=True):
            start = time.perf_counter()
            measured()
            seconds.append(time.perf_counter() - start)
    return min(taken[0]), min(taken[1])


def test_a_thousand_jobs_take_little_more_than_the_lists_themselves(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(world, JOBS)
    configuration = Configuration(host=world.server.url, api_key={"BearerToken": f"Bearer {ADMIN}"})
    client: Any = ApiClient(configuration)

    def raw() -> int:
        """The client's own lists of jobs and pods, as JSON without its models."""
        where = ("kubeflow.org", "v1", "pytorchjobs")
        jobs: Any = CustomObjectsApi(client).list_cluster_custom_object(*where, _preload_content=False)
        pods: Any = CoreV1Api(client).list_pod_for_all_namespaces(_preload_content=False)
        return len(json.loads(jobs.data)["items"]) + len(json.loads(pods.data)["items"])

    assert raw() == 2 * JOBS
    jobs = world.place.jobs(None)
    assert len(jobs) == JOBS
    assert all(len(job.instances) == 1 and job.gpus == 1 for job in jobs)
    with calm():
        theirs, ours = least(raw, lambda: world.place.jobs(None))
    with capsys.disabled():
        told = f"{JOBS} jobs: {ours * 1e3:.0f} ms, the lists themselves {theirs * 1e3:.0f} ms"
        sys.stdout.write(f"\n{told}, ratio {ours / theirs:.2f}\n")
    client.close()
    assert ours / theirs <= MOST


def test_one_list_of_jobs_and_one_of_pods(world: World) -> None:
    fill(world, 5)
    world.server.requests.clear()
    assert len(world.place.jobs("default")) == 5
    kinds = [request.rpartition("/")[2] for request in world.server.requests]
    assert kinds == ["pytorchjobs", "pods", "trainjobs"]


def test_long_lists_come_in_pages(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(world, 7)
    monkeypatch.setattr("hasten.cluster.kubernetes.client.PAGE", 3)
    world.server.requests.clear()
    assert {job.name for job in world.place.jobs("default")} == {f"job-{number}" for number in range(7)}
    assert all(job.instances for job in world.place.jobs("default"))
    assert world.server.requests.count("GET /apis/kubeflow.org/v1/namespaces/default/pytorchjobs") == 6
    world.server.rules.expired.add("all")  # the server forgets what was begun
    assert len(world.place.jobs("default")) == 7
