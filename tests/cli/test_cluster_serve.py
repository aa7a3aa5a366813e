"""Servers by the command, in a backend of memory."""

import json
import re

import pytest
import yaml
from tests.cli.memory_backend import MemoryBackend, ago, cluster, instance

from hasten.cluster.backend import Event, LogOptions, Server, ServerUpdate, Status
from hasten.cluster.spec import TritonServer

ARTICLE = (
    *("serve", "triton", "--namespace=default-group", "--version=1", "--data=bloom7b1-pvc:/mnt"),
    *("--name=ft-triton-bloom", "--allow-metrics", "--gpus=2", "--replicas=1", "--image=IMAGE"),
    "--model-repository=/mnt/triton_repo",
)
ADDRESS = "172.16.0.9"


def server(name: str, version: str = "1", **others: object) -> Server:
    made: dict[str, object] = {
        "namespace": "default",
        "desired": 1,
        "available": 1,
        "address": ADDRESS,
        "ports": {"RESTFUL": 8000, "GRPC": 8001, "METRICS": 8002},
        "created": ago(hours=3),
        "instances": (instance(f"{name}-0", ready=True, restarts=2, gpus=0),),
        **others,
    }
    return Server(name=name, version=version, **made)  # type: ignore[arg-type]


def test_the_article_s_server(backend: MemoryBackend, capsys: pytest.CaptureFixture[str]) -> None:
    assert cluster(*ARTICLE) == 0
    assert backend.served == [
        TritonServer(
            name="ft-triton-bloom",
            namespace="default-group",
            version="1",
            data=("bloom7b1-pvc:/mnt",),
            allow_metrics=True,
            gpus=2,
            image="IMAGE",
            model_repository="/mnt/triton_repo",
        )
    ]
    assert capsys.readouterr().out == (
        "server ft-triton-bloom, version 1, is submitted\n"
        "see it: hasten cluster serve get ft-triton-bloom --version 1 -n default-group\n"
    )


def triton(*argv: str) -> int:
    return cluster("serve", "triton", "--name", "x", "--model-repository", "/r", *argv)


def test_a_version_is_the_time(backend: MemoryBackend) -> None:
    assert triton() == 0
    assert re.fullmatch(r"20\d{10}", backend.served[0].version)


def test_every_option_of_a_server(backend: MemoryBackend) -> None:
    options = (
        *("--version", "v2", "--replicas", "3", "--load-model", "a", "--load-model", "b", "--http-port", "18000"),
        *("--grpc-port", "18001", "--metrics-port", "18002", "--runtime", "tritonserver"),
        *("--extend-command", "--log-verbose 1", "--env-from-secret", "KEY=s", "--data-subpath-expr", "p:a/$(B)"),
        *("--temp-dir", "t:/tmp", "--gpumemory", "8", "--gpucore", "50", "--expose-service", "--exit-timeout", "60"),
        *("--startup-timeout", "1200", "--autoscale", "1:4", "--autoscale-by", "queue", "--prometheus", "http://p"),
        *("--multinode", "2", "--gateway", "picker", "--share-memory", "4Gi", "--image-pull-policy", "Always"),
    )
    assert triton(*options) == 0
    assert backend.served == [
        TritonServer(
            name="x",
            model_repository="/r",
            version="v2",
            replicas=3,
            load_model=("a", "b"),
            http_port=18000,
            grpc_port=18001,
            metrics_port=18002,
            runtime="tritonserver",
            extend_command="--log-verbose 1",
            env_from_secret=("KEY=s",),
            data_subpath_expr=("p:a/$(B)",),
            temp_dir=("t:/tmp",),
            gpumemory=8,
            gpucore=50,
            expose_service=True,
            exit_timeout=60,
            startup_timeout=1200,
            autoscale="1:4",
            autoscale_by="queue",
            prometheus="http://p",
            multinode=2,
            gateway="picker",
            share_memory="4Gi",
            image_pull_policy="Always",
        )
    ]


def test_a_dry_run(backend: MemoryBackend, capsys: pytest.CaptureFixture[str]) -> None:
    assert triton("--version", "1", "--dry-run") == 0
    assert list(yaml.safe_load_all(capsys.readouterr().out)) == [
        {"kind": "Deployment", "metadata": {"name": "x-1-tritoninferenceserver"}},
        {"kind": "Service", "metadata": {"name": "x-1-tritoninferenceserver"}},
    ]
    assert backend.served == []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("serve",), "the following arguments are required: COMMAND"),
        (("serve", "triton"), "--name is required"),
        (("serve", "triton", "--name", "x"), "--model-repository is required"),
        (("serve", "triton", "--name", "x", "--model-repository", "/r", "y"), "unrecognized arguments: y"),
        (("serve", "triton", "--name", "x", "--model-repository", "/r", "--version", "1.0"), "--version '1.0' must"),
        (("serve", "custom", "--name", "x", "--image", "i"), "hasten serves the type triton alone (not done: custom"),
        (("serve", "distributed", "--masters", "1"), "hasten serves the type triton alone (not done: custom"),
        (("serve", "traffic-split", "-v", "1:50"), "hasten does not split traffic: give one server several --replicas"),
        (("serve", "update", "custom", "--name", "x"), "hasten serves the type triton alone (not done: custom"),
        (("serve", "update", "triton"), "the following arguments are required: --name"),
        (("serve", "update", "triton", "--name", "x"), "there is nothing to change: give an option such as --replicas"),
        (("serve", "update", "triton", "--name", "x", "--replicas", "-1"), "--replicas must be at least 0, got -1"),
        (("serve", "update", "triton", "--name", "x", "--cpu", "much"), "--cpu 'much' is not a quantity"),
        (("serve", "update", "triton", "--name", "x", "--http-port", "1"), "unrecognized arguments: --http-port"),
        (("serve", "get", "two"), "server two has several versions; choose one with --version"),
        (("serve", "list", "-T", "custom"), "--type custom: there are only triton, triton-serving"),
        (("serve", "logs", "two", "-t", "x"), "argument -t/--tail: invalid int value: 'x'"),
    ],
)
def test_bad_input(
    backend: MemoryBackend, capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], message: str
) -> None:
    backend.server_records = [server("two", "1"), server("two", "2")]
    assert cluster(*argv) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert message in captured.err


def test_update(backend: MemoryBackend, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--version", "1", "--replicas", "0", "--image", "i", "-e", "A=1", "--env", "B=2", "--memory", "2Gi")
    assert cluster("serve", "update", "triton", "--name", "x", *options) == 0
    update = ServerUpdate(replicas=0, image="i", env=("A=1", "B=2"), memory="2Gi")
    assert backend.asked == [("x", "1", "default", update)]
    assert capsys.readouterr().out == "server x is updated\nsee it: hasten cluster serve get x --version 1\n"


def test_list(backend: MemoryBackend, capsys: pytest.CaptureFixture[str]) -> None:
    backend.server_records = [server("bloom"), server("new", "202608011200", available=0, address=None, ports={})]
    assert cluster("serve", "list") == 0
    assert capsys.readouterr().out.splitlines() == [
        "NAME   TYPE    VERSION       DESIRED  AVAILABLE  ADDRESS     PORTS",
        "bloom  Triton  1             1        1          172.16.0.9  RESTFUL:8000,GRPC:8001",
        "new    Triton  202608011200  1        0          N/A         N/A",
    ]
    backend.server_records.append(server("big", namespace="other", gpus=2))
    assert cluster("serve", "ls", "-A", "-T", "triton", "-o", "wide") == 0
    assert capsys.readouterr().out.splitlines() == [
        "NAMESPACE  NAME   TYPE    VERSION       DESIRED  AVAILABLE  ADDRESS     PORTS"
        "                                GPU",
        "default    bloom  Triton  1             1        1          172.16.0.9"
        "  RESTFUL:8000,GRPC:8001,METRICS:8002  0",
        "default    new    Triton  202608011200  1        0          N/A         N/A"
        "                                  0",
        "other      big    Triton  1             1        1          172.16.0.9"
        "  RESTFUL:8000,GRPC:8001,METRICS:8002  2",
    ]
    assert cluster("serve", "list", "-o", "json") == 0
    assert [load["ports"].get("GRPC") for load in json.loads(capsys.readouterr().out)] == [8001, None]


def test_get(backend: MemoryBackend, capsys: pytest.CaptureFixture[str]) -> None:
    backend.server_records = [server("bloom")]
    assert cluster("serve", "get", "bloom", "-v", "1") == 0
    assert capsys.readouterr().out.splitlines() == [
        "Name:       bloom",
        "Namespace:  default",
        "Type:       Triton",
        "Version:    1",
        "Desired:    1",
        "Available:  1",
        "Age:        3h",
        "Address:    172.16.0.9",
        "Port:       RESTFUL:8000,GRPC:8001,METRICS:8002",
        "",
        "Instances:",
        "  NAME     STATUS   AGE  READY  RESTARTS  NODE",
        "  ----     ------   ---  -----  --------  ----",
        "  bloom-0  RUNNING  5m   1/1    2         192.168.123.35",
    ]


def test_get_of_one_that_does_not_start(backend: MemoryBackend, capsys: pytest.CaptureFixture[str]) -> None:
    event = Event(time=ago(days=400), kind="Warning", reason="Failed", source="pod/bloom-0", message="no image")
    waiting = instance("bloom-0", Status.PENDING, gpus=2, node=None, reason="the image\nis not there")
    backend.server_records = [server("bloom", available=0, gpus=2, instances=(waiting,), events=(event,))]
    assert cluster("serve", "get", "bloom", "-e") == 0
    assert capsys.readouterr().out.splitlines()[8:] == [
        "Port:       RESTFUL:8000,GRPC:8001,METRICS:8002",
        "GPUs:       2",
        "Reason:     bloom-0: the image is not there",
        "",
        "Instances:",
        "  NAME     STATUS   AGE  READY  RESTARTS  GPU  NODE",
        "  ----     ------   ---  -----  --------  ---  ----",
        "  bloom-0  PENDING  5m   0/1    0         2    N/A",
        "",
        "Events:",
        "  SOURCE       TYPE     AGE  MESSAGE",
        "  ------       ----     ---  -------",
        "  pod/bloom-0  Warning  1y   [Failed] no image",
    ]


def test_logs_attach_and_delete(backend: MemoryBackend, capsys: pytest.CaptureFixture[str]) -> None:
    backend.server_records = [server("two", "1"), server("two", "2"), server("one")]
    assert cluster("serve", "logs", "two", "-v", "2", "-t", "1", "-i", "two-0") == 0
    assert cluster("serve", "attach", "two", "-v", "2", "--", "ls", "-v") == 0
    assert backend.asked == [
        ("2", LogOptions(tail=1, instance="two-0")),
        ("two", "2", "default", None, None, ["ls", "-v"]),
    ]
    capsys.readouterr()
    assert cluster("serve", "delete", "two", "-v", "1") == 0
    assert cluster("serve", "del", "two", "gone", "one") == 1
    captured = capsys.readouterr()
    assert captured.out == "server two is deleted\nserver two is deleted\nserver one is deleted\n"
    assert captured.err == "hasten: error: there is no server gone in namespace default\n"
