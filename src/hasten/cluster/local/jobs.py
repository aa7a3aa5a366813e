"""The supervisor of a job: GPUs, instances, retries, limits of time, and the end."""

import time

from hasten.cluster.local.children import Child
from hasten.cluster.local.environment import rank_environment
from hasten.cluster.local.gpus import Wait
from hasten.cluster.local.state import Folder, InstanceState
from hasten.cluster.local.supervisor import Supervisor, back_off
from hasten.core.errors import ClusterError
from hasten.core.ports import free_port

GRACE_S = 10.0
"""Between SIGTERM and SIGKILL."""
_TOGETHER_S = 1.0
"""Ranks that end together need not end in the same moment."""
_STAYS_S = 600.0
"""A job that lives longer after its end is removed by the next command instead: no process waits for days."""
_FOREVER = 3600.0


class JobSupervisor(Supervisor):
    """Runs a job once, and again after failures as often as was asked.

    The instances stand and fall together: all get their GPUs at once, the failure of one ends the others, and a retry
    starts all. The job has succeeded when its chief has.
    """

    def __init__(self, folder: Folder) -> None:
        super().__init__(folder)
        self.plan = folder.job_plan()
        self._running: dict[str, Child] = {}
        self._deadline: float | None = None

    def work(self) -> None:
        """From the queue to the end, and to the deletion where that is soon."""
        self._wait_for_gpus()
        self._finish(self._attempts())
        if self.state.expires is not None and self.state.expires - time.time() <= _STAYS_S:
            self._expire()

    def _expire(self) -> None:
        """Stay until the job is to be deleted, and do it; the process ends with that."""
        self.conclude()
        while (left := (self.state.expires or 0.0) - time.time()) > 0:
            self.turn(left)
        self.folder.remove()
        raise SystemExit

    def _wait_for_gpus(self) -> None:
        tickets = self.gpus.of(self.folder)
        if self.plan.gpus and not tickets:
            raise ClusterError("its ticket for GPUs is gone or cannot be read")
        for ticket in tickets:
            while isinstance(got := self.take(ticket), Wait):
                if got.reason != self.state.reason:
                    self.state.reason = got.reason
                    self.note("Waiting", got.reason)
                    self.save()
                self.turn(got.pause)
            for number, instance in enumerate(self.state.instances):
                instance.devices = got[number * self.plan.gpus : (number + 1) * self.plan.gpus]
        self.state.reason = None

    def _attempts(self) -> str | None:
        """All attempts; None for success, else why the last one failed."""
        if self.plan.running_timeout is not None:
            self._deadline = time.monotonic() + self.plan.running_timeout
        for attempt in range(self.plan.retry + 1):
            failure = self._attempt()
            if failure is None or attempt == self.plan.retry or self._late():
                return failure
            self._stop(failure)
            pause = back_off(attempt)
            self.note("Restarting", f"{failure}; attempt {attempt + 2} of {self.plan.retry + 1} follows", warning=True)
            self._show("PENDING", f"{failure}; starts again")
            self._sleep(pause)
            for instance in self.state.instances:
                instance.restarts += 1
            if self._late():
                return self._too_long()
        raise AssertionError

    def _attempt(self) -> str | None:
        """Start all instances, and wait for the chief's success or for a failure, which is reported."""
        port = free_port()
        for index, instance in enumerate(self.state.instances):
            env = rank_environment(self.plan, index, port)
            child = self.launch(instance, self.plan.launch, self.plan.launch.command, env)
            if isinstance(child, str):
                instance.status, instance.ended, instance.reason = "FAILED", time.time(), child
                return child
            self._running[instance.name] = child
            self.note("Started", f"process {child.pid}", instance.name)
        self._show("RUNNING", None)
        while True:
            for instance in self.state.instances:
                failure = self._look_at(instance)
                if failure is not None:
                    return failure
            if self.state.instances[0].status == "SUCCEEDED":
                return None
            if self._late():
                return self._too_long()
            self.turn(self._left())

    def _look_at(self, instance: InstanceState) -> str | None:
        """Note an instance's end; the sentence about a failure."""
        child = self._running.get(instance.name)
        if child is None or child.code is None:
            return None
        del self._running[instance.name]
        instance.ended = time.time()
        if child.code == 0:
            instance.status = "SUCCEEDED"
            self.note("Completed", child.how_it_ended(), instance.name)
            return None
        instance.status, instance.reason = "FAILED", child.how_it_ended()
        self.note("Failed", instance.reason, instance.name, warning=True)
        return f"{instance.name} {instance.reason}"

    def _stop(self, reason: str, status: str = "FAILED", grace: float = GRACE_S) -> None:
        """End what still runs of an attempt."""
        self.children.wait_for(self._running.values(), _TOGETHER_S)
        for instance in self.state.instances:
            self._look_at(instance)
        ended = set(self._running)
        self.children.end(list(self._running.values()), grace)
        self._running.clear()
        for instance in self.state.instances:
            if instance.name in ended:
                instance.status, instance.ended, instance.reason = status, time.time(), f"was ended: {reason}"

    def _finish(self, failure: str | None) -> None:
        """Write the job's end, and do with what still runs as was asked."""
        status = "SUCCEEDED" if failure is None else "FAILED"
        stays = self.plan.clean_task_policy == "None" and not self._late()
        ended = time.time()
        if not stays:
            self._stop(failure or "the job has succeeded", status)
            self.give_gpus_back()
        self.state.ended = ended
        if self.plan.ttl_after_finished is not None:
            self.state.expires = ended + self.plan.ttl_after_finished
        self.note(status.capitalize(), failure or "the job has succeeded", warning=failure is not None)
        if self.plan.clean_task_policy == "All":
            self._forget_instances()
        self._show(status, failure)
        while stays and self._running:
            self.turn(_FOREVER)
            for instance in self.state.instances:
                self._look_at(instance)
            self.save()

    def _forget_instances(self) -> None:
        self.state.instances = []
        for file in self.folder.logs.iterdir():
            file.unlink()

    def end_all(self) -> None:
        """Somebody deletes the job, or ends its supervisor, as a machine does that shuts down."""
        reason = "the job was deleted" if self.folder.end_mark.exists() else "its supervisor was signalled to end"
        self.children.end(self.children.running, GRACE_S)
        for instance in self.state.instances:
            if instance.status not in ("SUCCEEDED", "FAILED"):
                instance.status, instance.ended, instance.reason = "FAILED", time.time(), reason
        if self.state.ended is None:
            self.state.ended = time.time()
            self._show("FAILED", reason)

    def _show(self, status: str, reason: str | None) -> None:
        self.state.status, self.state.reason = status, reason
        for instance in self.state.instances:
            if status == "PENDING":
                instance.status, instance.reason = "PENDING", reason
        self.save()

    def _sleep(self, seconds: float) -> None:
        end = time.monotonic() + min(seconds, self._left())
        while time.monotonic() < end:
            self.turn(end - time.monotonic())

    def _left(self) -> float:
        return _FOREVER if self._deadline is None else self._deadline - time.monotonic()

    def _late(self) -> bool:
        return self._left() <= 0

    def _too_long(self) -> str:
        return f"it ran longer than --running-timeout, {self.plan.running_timeout:g} s"
