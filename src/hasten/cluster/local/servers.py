"""The supervisor of a server: replicas of `hasten serve`, started again when they die, replaced one after the other."""

import hashlib
import http.client
import json
import time

from hasten.cluster.local.children import Child
from hasten.cluster.local.gpus import Wait
from hasten.cluster.local.launch import ServerPlan
from hasten.cluster.local.state import Folder, InstanceState
from hasten.cluster.local.supervisor import Supervisor, back_off
from hasten.core.ports import free_ports, port_is_free

_EXIT_MARGIN_S = 5.0
"""What a server may need above its exit timeout."""
_HEALTHY_S = 60.0
"""After so long a replica that dies is started again as fast as the first time."""
_LOADING_S, _SERVING_S = 0.5, 5.0
"""How often the readiness of a replica is probed, before it is and afterwards."""
_SILENT_S = 60.0
"""A replica that has not answered at all for so long is started again."""
_ANSWER_S = 1.0


class Replica:
    """One replica, beside what the record says of it."""

    def __init__(self, instance: InstanceState) -> None:
        self.instance = instance
        self.child: Child | None = None
        self.was_ready = self.is_silent = False
        self.started = self.answered = 0.0
        self.next_start = self.next_look = 0.0
        self.failures = 0

    def probe(self, path: str) -> int | None:
        """Status of the answer to a GET, None where there is none."""
        connection = http.client.HTTPConnection("127.0.0.1", self.instance.ports["http"], timeout=_ANSWER_S)
        try:
            connection.request("GET", path)
            return connection.getresponse().status
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()


class ServerSupervisor(Supervisor):
    """Keeps as many replicas running as the plan wants, in the form that it has now."""

    kind = "server"

    def __init__(self, folder: Folder) -> None:
        super().__init__(folder)
        self.plan = folder.server_plan()
        self._replicas: list[Replica] = []
        self.state.instances = []

    def work(self) -> None:
        """Until somebody asks for the end."""
        self._note_status("RUNNING")
        while True:
            self._fit_number()
            for replica in self._replicas:
                self._look_at(replica)
            self._replace_one()
            self.turn(self._pause())
            if self.children.news():
                self.plan = self.folder.server_plan()
                self.note("Updated", f"{self.plan.replicas} replicas are wanted, one after the other is replaced")
                self.save()

    def _pause(self) -> float:
        now = time.monotonic()
        moments = [replica.next_start if replica.child is None else replica.next_look for replica in self._replicas]
        return max(0.05, min(moments, default=now + _SERVING_S) - now)

    def _note_status(self, status: str) -> None:
        self.state.status = status
        self.save()

    def _fit_number(self) -> None:
        while len(self._replicas) > self.plan.replicas:
            gone = self._replicas.pop()
            self._stop(gone, "fewer replicas are wanted")
            self.state.instances.remove(gone.instance)
            self._give_back(gone)
            self.save()
        while len(self._replicas) < self.plan.replicas:
            number = len(self._replicas)
            instance = InstanceState(name=f"{self.plan.name}-{number}", created=time.time(), is_chief=number == 0)
            self.state.instances.append(instance)
            self._replicas.append(Replica(instance))
            self.save()

    def _look_at(self, replica: Replica) -> None:
        if replica.child is not None and replica.child.code is not None:
            self._has_died(replica, replica.child.how_it_ended())
        elif replica.child is not None and time.monotonic() >= replica.next_look:
            self._ask(replica)
        elif replica.child is None and time.monotonic() >= replica.next_start:
            self._start(replica)

    def _start(self, replica: Replica) -> None:
        instance = replica.instance
        if not self._have_gpus(replica):
            return
        first = replica is self._replicas[0]
        instance.ports = self._ports(instance.ports, first)
        instance.template = _template(self.plan)
        arguments = [word for name, port in instance.ports.items() for word in (f"--{name}-port", str(port))]
        command = [*self.plan.launch.command, *arguments]
        child = self.launch(instance, self.plan.launch, command, {})
        if isinstance(child, str):
            self._has_died(replica, child)
            return
        replica.child, replica.was_ready, replica.is_silent = child, False, False
        replica.started = replica.answered = time.monotonic()
        replica.next_look = replica.started + _LOADING_S
        instance.reason = "loads its models"
        ports = ", ".join(f"{name} {self.plan.address}:{port}" for name, port in instance.ports.items())
        self.note("Started", f"process {child.pid}: {ports}", instance.name)
        self.save()

    def _ports(self, had: dict[str, int], first: bool) -> dict[str, int]:
        """The plan's ports for the first replica, free ones for the others: the ones that it had, if it can."""
        if first:
            return dict(self.plan.ports)
        if set(had) == set(self.plan.ports) and all(port_is_free(port, self.plan.address) for port in had.values()):
            return had
        return dict(zip(self.plan.ports, free_ports(len(self.plan.ports), self.plan.address), strict=True))

    def _have_gpus(self, replica: Replica) -> bool:
        instance, wanted = replica.instance, self.plan.gpus
        if instance.gpus != wanted:
            self._give_back(replica)
            instance.gpus = wanted
        if wanted == len(instance.devices):
            return True
        mine = self.gpus.of(self.folder, instance.name)
        ticket = mine[0] if mine else self.draw(wanted, instance.name)
        got = ticket if isinstance(ticket, Wait) else self.take(ticket)
        if isinstance(got, Wait):
            replica.next_start = time.monotonic() + got.pause
            if instance.reason != got.reason:
                instance.reason = got.reason
                self.note("Waiting", got.reason, instance.name)
                self.save()
            return False
        instance.devices = got
        return True

    def _give_back(self, replica: Replica) -> None:
        for path in self.gpus.of(self.folder, replica.instance.name):
            self.gpus.give_back(path)
        replica.instance.devices = []

    def _has_died(self, replica: Replica, how: str) -> None:
        """Plan its next start: soon after a long life, later and later after short ones."""
        now = time.monotonic()
        if now - replica.started > _HEALTHY_S:
            replica.failures = 0
        pause = back_off(replica.failures)
        replica.failures += 1
        replica.child, replica.next_start = None, now + pause
        instance = replica.instance
        instance.restarts += 1
        instance.status, instance.ready = "PENDING", False
        instance.reason = f"{how}; starts again in {pause:g} s"
        self.note("BackOff", instance.reason, instance.name, warning=True)
        self.save()

    def _ask(self, replica: Replica) -> None:
        """Whether it is ready; a replica that takes too long to be, or has fallen silent, is ended."""
        now = time.monotonic()
        status = replica.probe("/v2/health/ready")
        instance, ready = replica.instance, status == http.client.OK
        if status is not None:
            replica.answered = now
        if ready != instance.ready:
            answer = f"GET /v2/health/ready: {status or 'no answer'}"
            instance.ready, instance.reason = ready, None if ready else answer
            self.note("Ready" if ready else "NotReady", answer, instance.name, warning=not ready)
            self.save()
        replica.was_ready = replica.was_ready or ready
        replica.is_silent = replica.was_ready and status is None
        replica.next_look = now + (_SERVING_S if ready else _LOADING_S)
        if not replica.was_ready and now - replica.started > self.plan.startup_timeout:
            self._start_again(replica, f"was not ready within --startup-timeout, {self.plan.startup_timeout:g} s")
        elif replica.was_ready and now - replica.answered > _SILENT_S:
            self._start_again(replica, f"has not answered for {_SILENT_S:g} s")

    def _start_again(self, replica: Replica, why: str) -> None:
        self._stop(replica, why)
        self._has_died(replica, why)

    def _replace_one(self) -> None:
        """Stop one replica of an older form, if no other is missing; it then starts in the new one.

        One that says itself that it is not ready serves nobody, and goes first; one that does not answer may only be
        busy.
        """
        wanted = _template(self.plan)
        old = [each for each in self._replicas if each.child is not None and each.instance.template != wanted]
        if not old:
            return
        unready = [each for each in old if not each.instance.ready and not each.is_silent]
        chosen = (unready or old)[0]
        if all(each.instance.ready for each in self._replicas if each is not chosen) or chosen in unready:
            self._stop(chosen, "is replaced")
            chosen.instance.status, chosen.next_start, chosen.failures = "PENDING", 0.0, 0
            self.note("Replaced", "ended, to be started in its new form", chosen.instance.name)
            self.save()

    def _stop(self, replica: Replica, why: str) -> None:
        """End one replica: it takes no more requests, and those under way have their time."""
        instance = replica.instance
        instance.ready, instance.reason = False, why
        self.save()
        if replica.child is not None:
            self.children.end([replica.child], self.plan.exit_timeout + _EXIT_MARGIN_S, group=False)
        replica.child = None

    def end_all(self) -> None:
        """All replicas at once."""
        reason = "the server was deleted" if self.folder.end_mark.exists() else "its supervisor was signalled to end"
        for replica in self._replicas:
            replica.instance.ready, replica.instance.reason = False, reason
        self.save()
        self.children.end(self.children.running, self.plan.exit_timeout + _EXIT_MARGIN_S, group=False)
        for instance in self.state.instances:
            instance.status, instance.ended = "FAILED", time.time()
        self.state.ended, self.state.reason = time.time(), reason
        self._note_status("FAILED")


def _template(plan: ServerPlan) -> str:
    """What tells two forms of a replica apart."""
    form = [plan.launch.command, plan.launch.env, plan.launch.working_dir, plan.launch.mounts, plan.gpus, plan.ports]
    return hashlib.sha256(json.dumps(form).encode()).hexdigest()[:12]
