"""Servers: the command line of the server, its probes and its end, and what is refused."""

import shlex
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.cluster.manifest_cases import ALL_CRDS, CASES
from tests.cluster.test_manifests_job import FEW, TEXTS, expanded

from hasten.cli.main import build_parser
from hasten.cli.serve import serve_options
from hasten.cluster.manifests.objects import server_objects
from hasten.cluster.spec import TritonServer
from hasten.core.errors import ConfigError

NAMES = TEXTS.filter(bool)


def server(**options: Any) -> TritonServer:
    return TritonServer(**{"name": "bloom", "version": "1", "image": "i", "model_repository": "/m", **options})


def pod_of(made: list[dict[str, Any]]) -> dict[str, Any]:
    spec = made[0]["spec"]
    return (spec["leaderWorkerTemplate"]["leaderTemplate"] if "leaderWorkerTemplate" in spec else spec["template"])[
        "spec"
    ]


def words_of(made: list[dict[str, Any]]) -> list[str]:
    """The words that the shell makes of a server's command."""
    shell, option, argument = pod_of(made)["containers"][0]["command"]
    assert (shell, option) == ("sh", "-c")
    return shlex.split(expanded(argument, {"HOME": "wrong"}))


@FEW
@given(NAMES, st.lists(NAMES, max_size=3))
def test_any_name_of_a_folder_or_of_a_model_arrives(folder: str, models: list[str]) -> None:
    words = words_of(server_objects(server(model_repository=folder, load_model=models), crds=ALL_CRDS))
    assert words[:3] == ["exec", "hasten", "serve"]
    assert f"--model-repository={folder}" in words
    assert [word for word in words if word.startswith("--load-model=")] == [f"--load-model={model}" for model in models]


@pytest.mark.parametrize(
    "name",
    [n for n, case in CASES.items() if isinstance(case.spec, TritonServer) and case.spec.runtime == "hasten"],
)
def test_hasten_serve_takes_the_command_line(name: str) -> None:
    spec, result = CASES[name].spec, CASES[name].objects()
    assert isinstance(spec, TritonServer)
    words = words_of(result)
    options = serve_options(build_parser().parse_args(words[words.index("serve") :]))
    assert options.model_repository == (spec.model_repository,)
    assert (options.endpoints.http_port, options.endpoints.grpc_port) == (spec.http_port, spec.grpc_port)
    assert options.endpoints.metrics_port == spec.metrics_port
    assert options.endpoints.allow_metrics == spec.allow_metrics
    assert options.server.exit_timeout_secs == spec.exit_timeout
    assert options.repository.load_model == tuple(spec.load_model)
    assert options.repository.model_control_mode == ("explicit" if spec.load_model else "none")


@FEW
@given(st.integers(1, 100_000), st.integers(1, 100_000))
def test_a_server_has_its_time_to_load_and_to_end(start: int, end: int) -> None:
    objects = server_objects(server(startup_timeout=start, exit_timeout=end), crds=ALL_CRDS)
    (main,) = pod_of(objects)["containers"]
    startup = main["startupProbe"]
    assert start <= startup["periodSeconds"] * startup["failureThreshold"] < start + startup["periodSeconds"]
    assert objects[0]["spec"]["progressDeadlineSeconds"] > start
    assert pod_of(objects)["terminationGracePeriodSeconds"] > end + main["lifecycle"]["preStop"]["sleep"]["seconds"]


def test_metrics_are_collected_by_the_operator_or_by_annotations() -> None:
    spec = server(allow_metrics=True)
    with_operator = server_objects(spec, crds=ALL_CRDS)
    assert [each["kind"] for each in with_operator] == ["Deployment", "Service", "PodMonitor"]
    assert "annotations" not in with_operator[0]["spec"]["template"]["metadata"]
    without = server_objects(spec, crds=frozenset())
    assert [each["kind"] for each in without] == ["Deployment", "Service"]
    assert without[0]["spec"]["template"]["metadata"]["annotations"]["prometheus.io/port"] == "8002"


def test_the_public_service_has_no_metrics() -> None:
    _, service = server_objects(server(allow_metrics=True, expose_service=True), crds=frozenset())
    assert service["spec"]["type"] == "LoadBalancer"
    assert [port["name"] for port in service["spec"]["ports"]] == ["http-serving", "grpc-serving"]


def test_an_autoscaler_alone_decides_on_the_replicas() -> None:
    kinds = {body["kind"]: body for body in server_objects(server(autoscale="1:4", cpu="2"), crds=ALL_CRDS)}
    assert "replicas" not in kinds["Deployment"]["spec"]
    assert kinds["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]["kind"] == "Deployment"
    assert "PodDisruptionBudget" in kinds


def test_only_the_leader_of_a_group_answers() -> None:
    spec = server(runtime="tritonserver", multinode=2, replicas=2)
    kinds = {body["kind"]: body for body in server_objects(spec, crds=ALL_CRDS)}
    worker_index = "leaderworkerset.sigs.k8s.io/worker-index"
    assert kinds["Service"]["spec"]["selector"][worker_index] == "0"
    assert kinds["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"][worker_index] == "0"
    groups = kinds["LeaderWorkerSet"]["spec"]["leaderWorkerTemplate"]
    assert "ports" in groups["leaderTemplate"]["spec"]["containers"][0]
    assert "startupProbe" not in groups["workerTemplate"]["spec"]["containers"][0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": None}, "--image is required"),
        ({"gpus": 1, "gpumemory": 8}, "--gpus takes whole GPUs"),
        ({"data_subpath_expr": ["models:a"]}, "there is no --data models:/PATH"),
        ({"temp_dir": ["tmp:/a"], "data": ["tmp:/b"]}, "two volumes of the pod have the name 'tmp'"),
        ({"label": ["servingName=x"]}, "--label servingName=x: hasten sets it to 'bloom'"),
        ({"autoscale": "1:2", "replicas": 2, "cpu": "1"}, "leave --replicas out"),
        ({"autoscale": "0:2", "cpu": "1"}, "MIN must be at least 1"),
        ({"autoscale": "1:2"}, "--autoscale-by cpu needs --cpu"),
        ({"autoscale": "1:2", "autoscale_by": "queue", "allow_metrics": True}, "--prometheus ADDRESS"),
        ({"autoscale": "1:2", "autoscale_by": "queue", "prometheus": "http://p"}, "needs --allow-metrics"),
        ({"autoscale_by": "queue"}, "need --autoscale MIN:MAX"),
        ({"gateway": "picker:http"}, "--gateway 'picker:http' is not SERVICE"),
        ({"name": "a" * 30, "multinode": 2, "runtime": "tritonserver"}, "too long for --multinode"),
    ],
)
def test_what_cannot_hold_together_is_said(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        server_objects(server(**options), crds=ALL_CRDS)


def test_ranks_of_hasten_are_started_on_every_node() -> None:
    group = server_objects(server(multinode=2, gpus=8), crds=ALL_CRDS)[0]["spec"]["leaderWorkerTemplate"]
    for pod in (group["leaderTemplate"], group["workerTemplate"]):
        main = pod["spec"]["containers"][0]
        assert main["command"][2].startswith("exec hasten serve --model-repository=")
        assert not any(variable["name"].startswith("PET_") for variable in main["env"])
        assert pod["spec"]["terminationGracePeriodSeconds"] == 45


@pytest.mark.parametrize(
    ("replicas", "longest"),
    [({"replicas": 1}, 50), ({"replicas": 10}, 50), ({"replicas": 11}, 49), ({"autoscale": "1:101", "cpu": "1"}, 48)],
)
def test_names_of_groups_leave_room_for_their_numbers(replicas: dict[str, Any], longest: int) -> None:
    """The label controller-revision-hash of a group's pods is NAME-INDEX-HASH, of ten digits at most, in 63 letters."""
    suffix = len("-1-tritoninferenceserver")
    options = {"multinode": 2, "runtime": "tritonserver", **replicas}
    fits = server(name="a" * (longest - suffix), **options)
    index = max(1, int(str(replicas.get("autoscale", "")).rpartition(":")[2] or replicas.get("replicas", 1))) - 1
    assert len(f"{fits.full_name}-{index}-0123456789") <= 63
    assert server_objects(fits, crds=ALL_CRDS)[0]["kind"] == "LeaderWorkerSet"
    with pytest.raises(
        ConfigError, match=f"too long for --multinode with up to {index + 1} replicas: at most {longest} letters"
    ):
        server_objects(server(name="a" * (longest - suffix + 1), **options), crds=ALL_CRDS)
