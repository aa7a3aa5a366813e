import os
import signal
import socket
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.cluster.local_site import Site, alive, site
from tests.waiting import LIMIT_S, eventually

from hasten.cli.main import main
from hasten.cluster.backend import Instance, LogOptions, Server, ServerUpdate, Status
from hasten.cluster.local import serving
from hasten.cluster.local.backend import _new_state
from hasten.cluster.local.launch import Launch, ServerPlan
from hasten.cluster.local.serving import found, spec_of
from hasten.cluster.local.state import Folder, create
from hasten.cluster.local.supervisor import signal_supervisor, start
from hasten.cluster.spec import TritonServer
from hasten.core.errors import ConfigError, ExistsError, NotFoundError, UnsupportedError
from hasten.core.ports import free_port

STAND_IN = """
import http.server, os, signal, sys, time
port = int(sys.argv[sys.argv.index("--http-port") + 1])
def end(*_):
    print("ends", flush=True)
    os._exit(0)
signal.signal(signal.SIGTERM, end)
class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if os.environ["READY"] == "1" else 503)
        self.end_headers()
        self.wfile.write(os.environ.get("WORD", "").encode())
    def log_message(self, *_):
        pass
print("serves", *sys.argv[1:], os.environ["CUDA_VISIBLE_DEVICES"], flush=True)
http.server.ThreadingHTTPServer(("127.0.0.1", port), Health).serve_forever()
"""
"""Takes the options that a supervisor adds, and starts faster than a server with a model."""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv("HASTEN_GPUS", "3")
    with site(tmp_path / "home") as result:
        yield result


class StandIn:
    """A server whose replicas run the code above."""

    def __init__(self, here: Site, **options: Any) -> None:
        self.here = here
        self.folder = Folder(here.home / "servers" / "default" / "s@1")
        self.asked = TritonServer(name="s", version="1", model_repository="/tmp", exit_timeout=60)
        env = {"READY": "1", **options.pop("env", {})}
        self.plan = ServerPlan(
            launch=Launch(command=[sys.executable, "-c", STAND_IN], env=env, working_dir="/"),
            **{
                **{"name": self.asked.full_name, "replicas": 1, "gpus": 0, "ports": {"http": free_port()}},
                **{"address": "127.0.0.1", "exit_timeout": 60.0, "startup_timeout": LIMIT_S},
                **options,
            },
        )
        start(*create(self.folder, self._spec(), _new_state(time.time()), {}, what="server", advice=""))

    def _spec(self) -> dict[str, Any]:
        return spec_of(self.asked, self.plan)

    def change(self, env: dict[str, str] | None = None, **options: Any) -> None:
        launch = replace(self.plan.launch, env={**self.plan.launch.env, **(env or {})})
        self.plan = replace(self.plan, launch=launch, **options)
        self.folder.write_spec(self._spec())
        assert signal_supervisor(self.folder, signal.SIGHUP)

    def seen(self) -> Server:
        return self.here.backend.server("s", None, "default")

    def reaches(self, available: int) -> list[Instance]:
        eventually(lambda: self.seen().available == available, lambda: f"{self.seen()}")
        return list(self.seen().instances)

    def pid(self, number: int) -> int:
        return self.folder.state().instances[number].pid or 0

    def word(self, number: int) -> str:
        port = self.folder.state().instances[number].ports["http"]
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=LIMIT_S) as answer:
                return str(answer.read().decode())
        except OSError:
            return "no answer"

    def logs(self, number: int, **options: Any) -> list[str]:
        chosen = LogOptions(instance=f"{self.plan.name}-{number}", **options)
        return list(self.here.backend.server_logs("s", "1", "default", chosen))


def test_a_replica_that_dies_comes_back(here: Site) -> None:
    server = StandIn(here, replicas=2, gpus=1)
    first, second = server.reaches(2)
    assert first.node == f"127.0.0.1:{server.plan.ports['http']}"
    assert second.node not in (None, first.node)
    # a replica may be found ready before what it wrote is read
    serves = [f"serves --http-port {server.plan.ports['http']} 0"]
    eventually(lambda: server.logs(0) == serves, lambda: f"{server.logs(0)}")
    assert here.backend.nodes()[0].allocated_gpus == 2
    os.kill(pid := server.pid(1), signal.SIGKILL)
    eventually(lambda: server.seen().instances[1].restarts == 1, lambda: f"{server.seen()}")
    again = server.reaches(2)[1]
    assert (again.node, again.restarts, again.status) == (second.node, 1, Status.RUNNING)
    assert server.pid(1) != pid
    eventually(lambda: len(server.logs(1)) == 2, lambda: f"{server.logs(1)}")
    assert server.logs(1)[1].endswith(" 1")
    messages = [event.message for event in server.seen().events if event.reason == "BackOff"]
    assert messages == ["was killed by SIGKILL, as by a lack of memory; starts again in 0.5 s"]


def test_replicas_are_replaced_one_after_the_other(here: Site) -> None:
    server = StandIn(here, replicas=2, env={"WORD": "old"})
    server.reaches(2)
    pids = [server.pid(0), server.pid(1)]
    server.change(env={"WORD": "new"})
    eventually(lambda: not {server.pid(0), server.pid(1)} & set(pids) and server.seen().available == 2)
    eventually(lambda: all(len(server.logs(number)) == 3 for number in (0, 1)), lambda: f"{server.seen()}")
    written = sorted((*line.split()[:2], number) for number in (0, 1) for line in server.logs(number, timestamps=True))
    # a replica that did not answer for a moment is replaced first
    orders = [[("ends", each), ("serves", each), ("ends", 1 - each), ("serves", 1 - each)] for each in (0, 1)]
    assert [(word, number) for _, word, number in written][2:] in orders
    assert [server.word(number) for number in (0, 1)] == ["new", "new"]
    assert [line.split()[0] for line in server.logs(0)] == ["serves", "ends", "serves"]
    # a form that never gets ready takes one replica and no more
    pids = [server.pid(0), server.pid(1)]
    server.change(env={"READY": "0"})
    server.reaches(1)
    time.sleep(1.0)
    assert len({server.pid(0), server.pid(1)} & set(pids)) == 1
    server.change(env={"READY": "1", "WORD": "newest"}, replicas=3)
    server.reaches(3)
    eventually(lambda: [server.word(number) for number in range(3)] == ["newest"] * 3, lambda: "not new")
    server.change(replicas=1)
    eventually(lambda: len(server.seen().instances) == 1, lambda: f"{server.seen()}")
    assert server.word(0) == "newest"
    assert server.seen().desired == 1


def test_a_replica_that_is_only_busy_is_not_replaced_by_a_form_that_never_gets_ready(here: Site) -> None:
    server = StandIn(here, replicas=2)
    server.reaches(2)
    pids = [server.pid(0), server.pid(1)]
    os.kill(pids[1], signal.SIGSTOP)
    try:
        server.reaches(1)
        for count in (1, 2):  # by the second it has acted on the first
            server.change(env={"READY": "0", "WORD": str(count)})
            eventually(lambda: [event.reason for event in server.seen().events].count("Updated") == count)  # noqa: B023
        assert [server.pid(0), server.pid(1)] == pids
    finally:
        os.kill(pids[1], signal.SIGCONT)
    eventually(lambda: [server.pid(0), server.pid(1)] != pids, lambda: f"{server.seen()}")
    assert len({server.pid(0), server.pid(1)} & set(pids)) == 1


def test_replicas_wait_for_gpus(here: Site) -> None:
    server = StandIn(here, replicas=2, gpus=2)
    server.reaches(1)
    eventually(
        lambda: len(server.seen().instances) == 2 and server.seen().instances[1].reason is not None,
        lambda: f"{server.seen()}",
    )
    waiting = server.seen().instances[1]
    assert (waiting.status, waiting.reason) == (Status.PENDING, "waits for 2 GPUs, 1 of 3 is free")
    server.change(gpus=1)
    # the second replica fits beside the first's old form, which is replaced only then
    eventually(lambda: [each.gpus for each in server.seen().instances] == [1, 1], lambda: f"{server.seen()}")
    server.reaches(2)
    assert here.backend.nodes()[0].allocated_gpus == 2


def test_a_replica_that_is_never_ready_is_started_again(here: Site) -> None:
    server = StandIn(here, env={"READY": "0"}, startup_timeout=0.7)
    eventually(lambda: any(each.restarts for each in server.seen().instances), lambda: f"{server.seen()}")
    messages = [event.message for event in server.seen().events if event.reason == "BackOff"]
    assert messages[0] == "was not ready within --startup-timeout, 0.7 s; starts again in 0.5 s"


def test_deleting_leaves_nothing(here: Site) -> None:
    server = StandIn(here, replicas=2)
    server.reaches(2)
    pids = [server.pid(0), server.pid(1), server.folder.state().pid or 0]
    following = here.backend.server_logs("s", None, "default", LogOptions(follow=True))
    assert next(following).startswith("serves")
    here.backend.delete_server("s", None, "default")
    assert not any(alive(pid) for pid in pids)
    assert list(following) == ["ends"]
    assert not server.folder.path.exists()
    with pytest.raises(NotFoundError, match="there is no server s in namespace default"):
        here.backend.server("s", None, "default")


def test_a_server_whose_supervisor_was_killed(here: Site) -> None:
    server = StandIn(here)
    server.reaches(1)
    pid = server.pid(0)
    assert signal_supervisor(server.folder, signal.SIGKILL)
    eventually(lambda: server.seen().available == 0, lambda: f"{server.seen()}")
    (instance,) = server.seen().instances
    assert (instance.status, instance.reason) == (Status.FAILED, "its supervisor was killed")
    assert not alive(pid)


@pytest.mark.slow
def test_hasten_serves_a_model(here: Site, tmp_path: Path) -> None:
    """The demo model's repository, from `serve triton` to its deletion, with a replica killed in between."""
    assert main(["repository", "create", "examples/demo-model", str(tmp_path / "models")]) == 0
    ports: dict[str, Any] = {f"{name}_port": free_port() for name in ("http", "grpc", "metrics")}
    requested = TritonServer(name="demo", version="1", model_repository=str(tmp_path / "models"), **ports)
    here.backend.serve(requested)
    with pytest.raises(
        ExistsError, match=r"server demo of version 1 exists in .*: update it, take another --version, or"
    ):
        here.backend.serve(requested)
    with pytest.raises(ConfigError, match=f"--http-port {ports['http_port']} is a port of server demo@1"):
        here.backend.serve(replace(requested, version="2"))

    def ready(restarts: int = 0) -> bool:
        server = here.backend.server("demo", None, "default")
        return server.available == 1 and server.instances[0].restarts == restarts

    eventually(ready, lambda: "\n".join(here.backend.server_logs("demo", None, "default", LogOptions())))
    folder = found(here.home, "demo", None, "default")
    os.kill(folder.state().instances[0].pid or 0, signal.SIGKILL)
    eventually(lambda: ready(restarts=1), lambda: f"{here.backend.server('demo', None, 'default')}")
    (server,) = here.backend.servers(None)
    assert (server.address, server.ports) == (
        "127.0.0.1",
        {"RESTFUL": ports["http_port"], "GRPC": ports["grpc_port"]},
    )
    assert (server.instances[0].restarts, server.desired, server.version) == (1, 1, "1")
    url = f"http://127.0.0.1:{ports['http_port']}/v2/models/fastertransformer/ready"
    with urllib.request.urlopen(url, timeout=LIMIT_S) as answer:
        assert answer.status == 200
    here.backend.delete_server("demo", "1", "default")
    assert here.backend.servers(None) == []


def test_which_server_is_meant(here: Site, tmp_path: Path) -> None:
    for version in ("1", "2"):
        ports: dict[str, Any] = {"http_port": free_port(), "grpc_port": free_port()}
        here.backend.serve(
            TritonServer(name="two", version=version, model_repository=str(tmp_path), replicas=0, **ports)
        )
    with pytest.raises(ConfigError, match="server two has the versions 1, 2; say which with --version"):
        here.backend.server("two", None, "default")
    assert here.backend.server("two", "2", "default").version == "2"
    with pytest.raises(NotFoundError, match="no server two of version 3"):
        here.backend.server("two", "3", "default")
    here.backend.update_server("two", "1", "default", ServerUpdate(env=("A=1",), image="new"))
    assert found(here.home, "two", "1", "default").server_plan().launch.env == {"A": "1"}
    here.backend.delete_server("two", "1", "default")
    assert [server.version for server in here.backend.servers("default")] == ["2"]


def test_a_server_is_updated_after_its_supervisor_was_killed(here: Site, tmp_path: Path) -> None:
    ports: dict[str, Any] = {"http_port": free_port(), "grpc_port": free_port()}
    here.backend.serve(TritonServer(name="s", version="1", model_repository=str(tmp_path), replicas=0, **ports))
    folder = found(here.home, "s", "1", "default")
    eventually(lambda: folder.state().status == "RUNNING", lambda: "does not begin")
    first = folder.state().pid
    assert signal_supervisor(folder, signal.SIGKILL)
    eventually(lambda: not alive(first or 0), lambda: "it lives")
    here.backend.update_server("s", None, "default", ServerUpdate(label=("a=b",)))
    eventually(lambda: folder.state().status == "RUNNING", lambda: f"{folder.state()}")
    assert folder.state().pid != first
    assert [event.reason for event in here.backend.server("s", None, "default").events] == ["SupervisorLost", "Revived"]


def test_a_supervisor_that_ends_before_it_can_be_told_is_followed_by_another(
    here: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ports: dict[str, Any] = {"http_port": free_port(), "grpc_port": free_port()}
    here.backend.serve(TritonServer(name="s", version="1", model_repository=str(tmp_path), replicas=0, **ports))
    folder = found(here.home, "s", "1", "default")
    eventually(lambda: folder.state().status == "RUNNING", lambda: "does not begin")
    first = folder.state().pid or 0

    def dies(folder: Folder, kind: signal.Signals) -> bool:
        os.kill(first, signal.SIGKILL)
        eventually(lambda: not alive(first))
        return False

    monkeypatch.setattr(serving, "signal_supervisor", dies)
    here.backend.update_server("s", None, "default", ServerUpdate(label=("a=b",)))
    eventually(lambda: folder.state().status == "RUNNING", lambda: f"{folder.state()}")
    assert folder.state().pid != first


def test_a_port_in_use_is_refused(here: Site, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--grpc-port {port} is in use on this machine; give another"):
            here.backend.serve(
                TritonServer(
                    name="s", version="1", model_repository=str(tmp_path), http_port=free_port(), grpc_port=port
                )
            )
    assert here.backend.servers(None) == []


@pytest.mark.parametrize(
    "options",
    [{"runtime": "tritonserver"}, {"autoscale": "1:3"}, {"multinode": 2}, {"gpumemory": 3}, {"temp_dir": ("a:/b",)}],
)
def test_what_servers_cannot_be_here(here: Site, tmp_path: Path, options: dict[str, Any]) -> None:
    flag = "--" + next(iter(options)).replace("_", "-")
    with pytest.raises(UnsupportedError, match=f"the local backend cannot do {flag};"):
        here.backend.serve(TritonServer(name="s", version="1", model_repository=str(tmp_path), **options))
