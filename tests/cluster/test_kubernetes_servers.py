import json
from typing import Any

import pytest
from kubernetes.client import ApiClient, Configuration, CustomObjectsApi
from tests.cluster.api_server import ADMIN
from tests.cluster.api_server_kinds import BY_NAME
from tests.cluster.kubernetes_fixtures import GPU_NODE, World, serving, world

from hasten.cluster.backend import ServerUpdate
from hasten.cluster.table import server_details
from hasten.core.errors import ClusterError, ConfigError, ExistsError, NotFoundError, UnsupportedError

__all__ = ["world"]

NAME = "ft-triton-bloom-1-tritoninferenceserver"


def container(world: World, kind: str = "Deployment") -> dict[str, Any]:
    """The server's container as it is stored."""
    body = world.object(kind, NAME)
    template = body["spec"].get("template") or body["spec"]["leaderWorkerTemplate"]["leaderTemplate"]
    one: dict[str, Any] = template["spec"]["containers"][0]
    return one


def start_pod(world: World, name: str = "a") -> dict[str, Any]:
    """A pod that the Deployment's controllers make."""
    owner = world.object("Deployment", NAME)
    template = owner["spec"]["template"]
    pod = world.pod(f"{NAME}-{name}", template["metadata"]["labels"], template["spec"], owner)
    world.run(pod)
    return pod


def test_a_server_and_all_that_belongs_to_it(world: World) -> None:
    world.backend.serve(serving(replicas=2, allow_metrics=True))
    assert world.leftovers() == [
        f"Deployment/{NAME}",
        f"PodDisruptionBudget/{NAME}",
        f"PodMonitor/{NAME}",
        f"Service/{NAME}",
    ]
    owner = world.object("Deployment", NAME)["metadata"]
    assert [(each["manager"], each["operation"]) for each in owner["managedFields"]] == [("hasten", "Apply")]
    for kind in ("PodDisruptionBudget", "PodMonitor", "Service"):
        assert world.object(kind, NAME)["metadata"]["ownerReferences"][0]["uid"] == owner["uid"]
    start_pod(world)
    world.change(world.object("Deployment", NAME), {"status": {"availableReplicas": 1}})
    server = world.backend.servers("default")[0]
    assert (server.name, server.version, server.desired, server.available) == ("ft-triton-bloom", "1", 2, 1)
    assert server.ports == {"RESTFUL": 8000, "GRPC": 8001, "METRICS": 8002}
    assert (server.address, server.gpus, server.type) == ("10.96.0.1", 4, "Triton")
    assert [(each.name, each.gpus, each.node, each.ready) for each in server.instances] == [
        (f"{NAME}-a", 2, GPU_NODE, True)
    ]
    world.backend.delete_server("ft-triton-bloom", None, "default")
    assert world.leftovers() == []


def test_events_of_a_server_are_also_those_of_its_replica_set(world: World) -> None:
    world.backend.serve(serving())
    labels = world.object("Deployment", NAME)["spec"]["template"]["metadata"]["labels"]
    metadata = {"name": f"{NAME}-5d4", "namespace": "default", "labels": labels}
    result = world.store.write({"apiVersion": "apps/v1", "kind": "ReplicaSet", "metadata": metadata, "spec": {}})
    world.event(result, "FailedCreate", "exceeded quota: gpus", "2026-11-23T10:00:00Z")
    events = world.backend.server("ft-triton-bloom", None, "default").events
    assert [(event.reason, event.source) for event in events] == [("FailedCreate", f"replicaset/{NAME}-5d4")]


REFUSED = (
    'pods "x" is forbidden: violates PodSecurity "restricted:latest": hostNetwork (pod must not set '
    "spec.securityContext.hostNetwork=true)"
)


def test_pods_that_are_refused_are_told(world: World) -> None:
    """By the Deployment's condition, in any list and without events."""
    world.backend.serve(serving())
    condition = {"type": "ReplicaFailure", "status": "True", "reason": "FailedCreate", "message": REFUSED}
    progress = {"type": "Progressing", "status": "True", "reason": "NewReplicaSetCreated"}
    world.change(world.object("Deployment", NAME), {"status": {"conditions": [progress, condition]}})
    for server in (world.backend.servers("default")[0], world.backend.server("ft-triton-bloom", None, "default")):
        assert server.reason == f"FailedCreate: {REFUSED}"
        assert f"Reason:     FailedCreate: {REFUSED}" in server_details(server)
    world.change(world.object("Deployment", NAME), {"status": {"conditions": [{**condition, "status": "False"}]}})
    assert world.backend.server("ft-triton-bloom", None, "default").reason is None


def test_groups_that_are_refused_are_told(world: World) -> None:
    """A LeaderWorkerSet has no such condition: the events of its StatefulSet have it."""
    world.backend.serve(serving(multinode=2, runtime="tritonserver"))
    labels = {"leaderworkerset.sigs.k8s.io/name": NAME}
    metadata = {"name": NAME, "namespace": "default", "labels": labels}
    result = world.store.write({"apiVersion": "apps/v1", "kind": "StatefulSet", "metadata": metadata, "spec": {}})
    neighbour = {"name": "other", "namespace": "default", "labels": {**labels, "leaderworkerset.sigs.k8s.io/name": "o"}}
    other = world.store.write({"apiVersion": "apps/v1", "kind": "StatefulSet", "metadata": neighbour, "spec": {}})
    world.event(result, "FailedCreate", "exceeded quota: gpus", "2026-11-23T10:00:00Z")
    world.event(other, "FailedCreate", "not its own", "2026-11-23T11:00:00Z")
    server = world.backend.server("ft-triton-bloom", None, "default")
    assert server.reason == f"statefulset/{NAME}: FailedCreate: exceeded quota: gpus (2 times)"
    world.server.rules.denied.add(("list", "statefulsets.apps"))
    assert world.backend.server("ft-triton-bloom", None, "default").reason is None


def test_nothing_is_left_of_a_server_that_fails(world: World) -> None:
    world.server.rules.denied.add(("create", "services"))
    with pytest.raises(ClusterError, match="admin may not create services in namespace default"):
        world.backend.serve(serving(replicas=2))
    assert world.leftovers() == []


def test_name_and_version_are_taken(world: World) -> None:
    world.backend.serve(serving())
    with pytest.raises(ExistsError, match="server ft-triton-bloom of version 1 in namespace default already"):
        world.backend.serve(serving(gpus=4))
    world.backend.serve(serving(version="2"))
    assert len(world.backend.servers(None)) == 2
    with pytest.raises(ConfigError, match="has the versions 1, 2: name one with --version"):
        world.backend.delete_server("ft-triton-bloom", None, "default")
    world.backend.delete_server("ft-triton-bloom", "1", "default")
    assert [server.version for server in world.backend.servers("default")] == ["2"]


def test_a_service_of_that_name_is_not_taken_over(world: World) -> None:
    spec = {"ports": [{"port": 80}]}
    world.store.write({"apiVersion": "v1", "kind": "Service", "metadata": {"name": NAME}, "spec": spec})
    with pytest.raises(ExistsError, match=f"there is a Service {NAME} already: take another --name or --version"):
        world.backend.serve(serving())
    assert world.leftovers() == [f"Service/{NAME}"]


def test_a_server_that_is_not_there(world: World) -> None:
    with pytest.raises(NotFoundError, match="there is no server nothing of version 3 in namespace default"):
        world.backend.server("nothing", "3", "default")
    with pytest.raises(NotFoundError, match="no namespace nowhere"):
        world.backend.servers("nowhere")


def test_an_update_changes_what_it_names_and_nothing_else(world: World) -> None:
    world.backend.serve(serving(env=["A=1", "B=2"], load_model=["bloom"], extend_command='--log-verbose=$LEVEL "x y"'))
    before = world.object("Deployment", NAME)
    update = ServerUpdate(image="hasten:2", gpus=4, memory="64Gi", replicas=3, env=["B=3", "C=$(A)"], label=["team=a"])
    world.backend.update_server("ft-triton-bloom", None, "default", update)
    after, each = world.object("Deployment", NAME), container(world)
    assert (each["image"], after["spec"]["replicas"]) == ("hasten:2", 3)
    assert each["resources"]["limits"] == {"nvidia.com/gpu": "4", "memory": "64Gi"} == each["resources"]["requests"]
    values = {variable["name"]: variable["value"] for variable in each["env"]}
    assert (values["A"], values["B"], values["C"]) == ("1", "3", "$$(A)")
    assert after["spec"]["template"]["metadata"]["labels"]["team"] == after["metadata"]["labels"]["team"] == "a"
    assert after["spec"]["selector"] == before["spec"]["selector"]
    changed = {"image", "resources", "env"}
    old = before["spec"]["template"]["spec"]["containers"][0]
    assert {key: value for key, value in each.items() if key not in changed} == {
        key: value for key, value in old.items() if key not in changed
    }
    assert f"PodDisruptionBudget/{NAME}" in world.leftovers()
    world.backend.delete_server("ft-triton-bloom", None, "default")
    assert world.leftovers() == []


def test_an_update_that_changes_nothing_leaves_the_object_alone(world: World) -> None:
    world.backend.serve(serving())
    before = world.object("Deployment", NAME)
    world.backend.update_server("ft-triton-bloom", None, "default", ServerUpdate(image="hasten:1"))
    assert world.object("Deployment", NAME) == before


@pytest.mark.parametrize(
    ("options", "update"),
    [
        ({}, {"replicas": 2}),
        ({"multinode": 2}, {"replicas": 2}),
        ({}, {"env": ["ZEBRA=2"]}),
        ({}, {"replicas": 3, "image": "hasten:1"}),
        ({}, {"gpus": 2}),
        ({"gpus": 0}, {"gpus": 0}),
        ({"gpus": 0, "gpumemory": 8}, {"gpus": 0}),
        ({"gpus": 0, "device": ["nvidia.com/mig-1g.10gb=1"]}, {"gpus": 0}),
        ({"memory": "4Gi"}, {"memory": "4Gi"}),
    ],
)
def test_an_update_replaces_no_pod_that_it_does_not_change(
    world: World, options: dict[str, Any], update: dict[str, Any]
) -> None:
    """Lists keep their order, whatever the alphabet says: any other order would be another pod template."""
    storage: dict[str, Any] = {"data": ["zoo:/z", "ant:/a"], "temp_dir": ["y:/m", "b:/b"]}
    world.backend.serve(serving(env=["ZEBRA=2", "ANT=1", "MULE=$(ZEBRA)"], allow_metrics=True, **storage, **options))
    kind = "LeaderWorkerSet" if "multinode" in options else "Deployment"
    before = world.object(kind, NAME)["spec"]
    world.backend.update_server("ft-triton-bloom", None, "default", ServerUpdate(**update))
    after = world.object(kind, NAME)["spec"]
    assert after["replicas"] == update.get("replicas", 1)
    assert json.dumps({**after, "replicas": 1}, sort_keys=True) == json.dumps(before, sort_keys=True)


def test_a_changed_variable_stays_where_it_is(world: World) -> None:
    world.backend.serve(serving(env=["ZEBRA=2", "ANT=1"]))
    names = [each["name"] for each in container(world)["env"]]
    world.backend.update_server("ft-triton-bloom", None, "default", ServerUpdate(env=["ZEBRA=3", "NEW=$(ANT)"], gpus=4))
    assert [each["name"] for each in container(world)["env"]] == [*names, "NEW"]
    assert next(each["value"] for each in container(world)["env"] if each["name"] == "ZEBRA") == "3"


def test_an_update_of_the_command_keeps_the_rest_of_it(world: World) -> None:
    world.backend.serve(serving(extend_command='--log-verbose=$LEVEL "$(date)" # x'))
    start = container(world)["command"][2]
    assert start.endswith('--log-verbose=$LEVEL "$$(date)" # x')

    def updated(**options: Any) -> str:
        world.backend.update_server("ft-triton-bloom", "1", "default", ServerUpdate(**options))
        command: str = container(world)["command"][2]
        return command

    moved = updated(model_repository="/mnt/it's new")
    assert moved == start.replace("--model-repository=/mnt/triton_repo", "'--model-repository=/mnt/it'\"'\"'s new'")
    loaded = updated(load_model=["a", "b"])
    options = "--model-control-mode=explicit --load-model=a --load-model=b"
    assert loaded == moved.replace(" --log-verbose", f" {options} --log-verbose")
    assert updated(extend_command="--strict-readiness=false").endswith(f"{options} --strict-readiness=false")


def test_gpus_come_and_go_with_what_hides_them(world: World) -> None:
    world.backend.serve(serving(gpus=0))
    hidden = {"name": "NVIDIA_VISIBLE_DEVICES", "value": "void"}
    assert hidden in container(world)["env"]
    world.backend.update_server("ft-triton-bloom", None, "default", ServerUpdate(gpus=1))
    assert hidden not in container(world)["env"]
    assert world.backend.servers("default")[0].gpus == 1
    world.backend.update_server("ft-triton-bloom", None, "default", ServerUpdate(gpus=0))
    assert hidden in container(world)["env"]


@pytest.mark.parametrize("shared", [{"gpumemory": 8}, {"gpucore": 50}, {"gpumemory": 8, "gpucore": 50}])
def test_whole_gpus_and_parts_of_one_do_not_go_together(world: World, shared: dict[str, Any]) -> None:
    """As where a server is made."""
    with pytest.raises(ConfigError, match="--gpus takes whole GPUs"):
        world.backend.serve(serving(gpus=1, **shared))
    world.backend.serve(serving(gpus=0, **shared))
    before = world.object("Deployment", NAME)
    with pytest.raises(ConfigError, match="--gpumemory and --gpucore take parts of a shared one: give either"):
        world.backend.update_server("ft-triton-bloom", None, "default", ServerUpdate(gpus=1))
    assert world.object("Deployment", NAME) == before


def test_two_managers_conflict(world: World) -> None:
    world.backend.serve(serving())
    kind = BY_NAME["deployments.apps"]
    theirs = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": NAME}, "spec": {"replicas": 5}}
    world.store.apply(kind, "default", NAME, theirs, "their-autoscaler", force=True)
    for replicas in (1, 2):  # the number that it was made with is not that which it has
        update = ServerUpdate(replicas=replicas)
        with pytest.raises(ClusterError, match=r'spec\.replicas \(conflict with "their-autoscaler" using apps/v1\)'):
            world.backend.update_server("ft-triton-bloom", None, "default", update)
    assert world.object("Deployment", NAME)["spec"]["replicas"] == 5
    world.backend.update_server("ft-triton-bloom", None, "default", ServerUpdate(image="hasten:2"))
    assert world.object("Deployment", NAME)["spec"]["replicas"] == 5


def test_what_others_added_stays(world: World) -> None:
    world.backend.serve(serving())
    sidecar = {"name": "istio", "image": "istio:1"}
    template = {"metadata": {"annotations": {"restarted": "now"}}, "spec": {"containers": [sidecar]}}
    theirs = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": NAME}, "spec": {"template": template}}
    world.store.apply(BY_NAME["deployments.apps"], "default", NAME, theirs, "istio", force=False)
    world.backend.update_server("ft-triton-bloom", None, "default", ServerUpdate(image="hasten:2"))
    pods = world.object("Deployment", NAME)["spec"]["template"]
    assert [each["image"] for each in pods["spec"]["containers"]] == ["hasten:2", "istio:1"]
    assert pods["metadata"]["annotations"]["restarted"] == "now"


def test_a_server_that_others_made(world: World) -> None:
    configuration = Configuration(host=world.server.url, api_key={"BearerToken": f"Bearer {ADMIN}"})
    labels = {"servingName": "old", "servingVersion": "1", "servingType": "triton-serving"}
    containers = [{"name": "triton", "image": "triton:1", "command": ["sh", "-c", "tritonserver"]}]
    template = {"metadata": {"labels": labels}, "spec": {"containers": containers}}
    spec = {"replicas": 1, "selector": {"matchLabels": labels}, "template": template}
    body = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "old", "labels": labels}, "spec": spec}
    with ApiClient(configuration) as client:
        api = CustomObjectsApi(client)
        api.create_namespaced_custom_object("apps", "v1", "default", "deployments", body, field_manager="helm")
    assert world.backend.servers("default")[0].name == "old"
    before = world.object("Deployment", "old")
    with pytest.raises(UnsupportedError, match="old has no annotation hasten/spec: hasten, or this version"):
        world.backend.update_server("old", None, "default", ServerUpdate(image="triton:2"))
    assert world.object("Deployment", "old") == before
    world.backend.delete_server("old", None, "default")
    assert world.leftovers() == []


def test_an_update_replans_nothing_that_it_does_not_name(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after an upgrade of hasten, whose plans are different from those that the server was made by."""
    world.backend.serve(serving(env=["A=1"]))
    before = world.object("Deployment", NAME)["spec"]
    monkeypatch.setattr("hasten.cluster.manifests.server._PROBE_PERIOD", 7)
    monkeypatch.setattr("hasten.cluster.manifests.pod.USER", 2000)
    world.backend.update_server("ft-triton-bloom", None, "default", ServerUpdate(replicas=2))
    assert world.object("Deployment", NAME)["spec"] == {**before, "replicas": 2}
    world.backend.update_server("ft-triton-bloom", None, "default", ServerUpdate(image="hasten:2", env=["A=2"]))
    after = world.object("Deployment", NAME)["spec"]
    text = json.dumps({**before, "replicas": 2}).replace('"hasten:1"', '"hasten:2"')
    assert json.dumps(after) == text.replace('{"name": "A", "value": "1"}', '{"name": "A", "value": "2"}')


def test_updates_add_up(world: World) -> None:
    world.backend.serve(serving(load_model=["a"], exit_timeout=40))
    for update in (ServerUpdate(load_model=["b"]), ServerUpdate(model_repository="/new"), ServerUpdate(gpus=4)):
        world.backend.update_server("ft-triton-bloom", None, "default", update)
    words = container(world)["command"][2].split()
    assert {"--model-repository=/new", "--load-model=b", "--exit-timeout-secs=40"} <= set(words)
    spec = json.loads(world.object("Deployment", NAME)["metadata"]["annotations"]["hasten/spec"])
    assert (spec["load_model"], spec["model_repository"], spec["gpus"]) == (["b"], "/new", 4)


@pytest.mark.parametrize("text", ["{half", "[]", '{"later": 1}'])
def test_a_server_of_another_version_is_not_changed(world: World, text: str) -> None:
    world.backend.serve(serving())
    body = world.object("Deployment", NAME)
    annotations = {**body["metadata"]["annotations"], "hasten/spec": text}
    world.change(body, {"metadata": {**body["metadata"], "annotations": annotations}})
    before = world.object("Deployment", NAME)
    with pytest.raises(UnsupportedError, match=f"hasten/spec of {NAME} is of another version of hasten"):
        world.backend.update_server("ft-triton-bloom", None, "default", ServerUpdate(replicas=2))
    assert world.object("Deployment", NAME) == before


def test_labels_that_bind_pods_to_their_server_cannot_be_changed(world: World) -> None:
    world.backend.serve(serving())
    with pytest.raises(ConfigError, match="--label servingName=other: hasten sets it to 'ft-triton-bloom'"):
        world.backend.update_server("ft-triton-bloom", None, "default", ServerUpdate(label=["servingName=other"]))


def test_an_autoscaled_server_has_no_number_of_replicas_to_change(world: World) -> None:
    world.backend.serve(serving(autoscale="1:4", cpu="8"))
    assert f"HorizontalPodAutoscaler/{NAME}" in world.leftovers()
    with pytest.raises(ConfigError, match="created with --autoscale, which decides"):
        world.backend.update_server("ft-triton-bloom", None, "default", ServerUpdate(replicas=2))


def test_a_server_over_several_nodes(world: World) -> None:
    world.backend.serve(serving(multinode=2, replicas=2, gpus=8, runtime="tritonserver"))
    server = world.backend.servers("default")[0]
    assert (server.gpus, server.desired, server.available) == (32, 2, 0)
    owner = world.object("LeaderWorkerSet", NAME)
    group = owner["spec"]["leaderWorkerTemplate"]
    for index, template in ((1, group["workerTemplate"]), (0, group["leaderTemplate"])):
        labels = {**template["metadata"]["labels"], "leaderworkerset.sigs.k8s.io/worker-index": str(index)}
        world.run(world.pod(f"{NAME}-0-{index}", labels, template["spec"], owner))
    instances = world.backend.server("ft-triton-bloom", None, "default").instances
    assert [(each.name, each.is_chief) for each in instances] == [(f"{NAME}-0-0", True), (f"{NAME}-0-1", False)]
    world.backend.update_server("ft-triton-bloom", None, "default", ServerUpdate(image="hasten:2", gpus=4))
    group = world.object("LeaderWorkerSet", NAME)["spec"]["leaderWorkerTemplate"]
    for template in (group["leaderTemplate"], group["workerTemplate"]):
        each = template["spec"]["containers"][0]
        assert each["image"] == "hasten:2"
        assert {"name": "PET_NPROC_PER_NODE", "value": "4"} in each["env"]
    world.backend.delete_server("ft-triton-bloom", None, "default")
    assert world.leftovers() == []


def test_what_a_server_needs_and_the_cluster_lacks(world: World) -> None:
    world.store.crds.clear()
    with pytest.raises(ClusterError, match=r"LeaderWorkerSet, but this cluster has no CRD"):
        world.backend.serve(serving(multinode=2, runtime="tritonserver"))
    with pytest.raises(ClusterError, match=r"KEDA, but this cluster has no CRD scaledobjects\.keda\.sh"):
        world.backend.serve(
            serving(autoscale="1:2", autoscale_by="queue", prometheus="http://p:9090", allow_metrics=True)
        )
    world.backend.serve(serving(allow_metrics=True))  # without a PodMonitor then
    assert world.leftovers() == [f"Deployment/{NAME}", f"Service/{NAME}"]
    assert container(world)["image"] == "hasten:1"
    assert [server.name for server in world.backend.servers("default")] == ["ft-triton-bloom"]


def test_more_groups_than_their_name_leaves_room_for(world: World) -> None:
    name = "a" * 26
    world.backend.serve(serving(name, multinode=2, replicas=10, runtime="tritonserver"))
    before = world.store.all("LeaderWorkerSet")
    with pytest.raises(ConfigError, match="too long for --multinode with up to 11 replicas: at most 49 letters"):
        world.backend.update_server(name, None, "default", ServerUpdate(replicas=11))
    assert world.store.all("LeaderWorkerSet") == before
