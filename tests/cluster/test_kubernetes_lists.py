import sys
from collections.abc import Callable

import pytest
from tests.cluster.kubernetes_fixtures import World, training, world

from hasten.cluster.backend import Job

__all__ = ["world"]

JOBS = 1000
MOST_CALLS = 200


def fill(world: World, count: int) -> None:
    """Running jobs with a pod each, all like the first."""
    world.backend.submit(training("job-0"))
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


def calls(work: Callable[[], object]) -> int:
    """How many functions, Python's and C's, run in this thread: a cost that a busy machine does not change."""
    count = 0

    def profile(_frame: object, event: str, _argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def test_a_job_of_a_thousand_costs_few_calls(world: World) -> None:
    """About 150 for a job and its pod, from the answers' bytes to the record: no look at any other job, no request."""
    fill(world, JOBS)
    jobs: list[Job] = []
    cost = calls(lambda: jobs.extend(world.backend.jobs(None)))
    assert len(jobs) == JOBS
    assert all(len(job.instances) == 1 and job.gpus == 1 for job in jobs)
    assert cost <= MOST_CALLS * JOBS


def test_one_list_of_jobs_and_one_of_pods(world: World) -> None:
    fill(world, 5)
    world.server.requests.clear()
    assert len(world.backend.jobs("default")) == 5
    kinds = [request.rpartition("/")[2] for request in world.server.requests]
    assert kinds == ["pytorchjobs", "pods", "trainjobs", "jobs"]


def test_long_lists_come_in_pages(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(world, 7)
    monkeypatch.setattr("hasten.cluster.kubernetes.client.PAGE", 3)
    world.server.requests.clear()
    assert {job.name for job in world.backend.jobs("default")} == {f"job-{number}" for number in range(7)}
    assert all(job.instances for job in world.backend.jobs("default"))
    assert world.server.requests.count("GET /apis/kubeflow.org/v1/namespaces/default/pytorchjobs") == 6
    world.server.rules.expired.add("all")  # the server forgets what was begun
    assert len(world.backend.jobs("default")) == 7
