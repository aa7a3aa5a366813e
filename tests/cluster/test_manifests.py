"""Objects against golden files, against Kubernetes' schemas of three releases, and against those of custom resources.

HASTEN_REWRITE_GOLDEN=1 writes the golden files anew, and fails, so that no run passes by rewriting them.
"""

import copy
import dataclasses
import json
import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import kubernetes_validate
import pytest
import yaml
from tests.cluster.manifest_cases import ALL_CRDS, ARTICLE, CASES, SERVERS, Case

from hasten.cluster.manifests.objects import job_objects, owned, server_objects
from hasten.cluster.spec import TrainingJob, TritonServer, Volume
from hasten.core.errors import ClusterError

Object = dict[str, Any]
HERE = Path(__file__).parent
RELEASES = ("1.35", "1.36", "1.37")
LOCAL_ONLY = {"map_paths"}
SCHEMAS = {path.stem: json.loads(path.read_text()) for path in (HERE / "crds").glob("*.json")}


def is_custom(one: Object) -> bool:
    return one["kind"].lower() in SCHEMAS


def templates(value: Any, schema: Any, whole: Object) -> Iterator[Object]:
    """The parts of an object that its schema marks as pod templates."""
    if "$ref" in schema:
        schema = whole["$defs"][schema["$ref"].rpartition("/")[2]]
    if schema.get("podTemplate"):
        yield value
        return
    for name, part in (schema.get("properties") or {}).items():
        if isinstance(part, dict) and isinstance(value, dict) and name in value:
            yield from templates(value[name], part, whole)
    if isinstance(value, list) and "items" in schema:
        for item in value:
            yield from templates(item, schema["items"], whole)


def builtins(objects: list[Object]) -> Iterator[Object]:
    """Objects of Kubernetes' own kinds, and the pods in others."""
    for body in objects:
        if not is_custom(body):
            yield body
            continue
        schema = SCHEMAS[body["kind"].lower()]
        for template in templates(body, schema, schema):
            yield {"apiVersion": "v1", "kind": "Pod", **template}


def validate_lists(objects: list[Object], release: str) -> None:
    """Validate objects of the same kind at once, for speed."""
    by_kind: dict[tuple[str, str], list[Object]] = defaultdict(list)
    for body in objects:
        by_kind[body["apiVersion"], body["kind"]].append(body)
    for (version, kind), items in by_kind.items():
        whole = {"apiVersion": version, "kind": f"{kind}List", "metadata": {}, "items": items}
        kubernetes_validate.validate(whole, release, strict=True)


def dumped(objects: list[Object]) -> str:
    return yaml.safe_dump_all(objects, sort_keys=False, allow_unicode=True, width=120)


def portable(objects: list[Object]) -> list[Object]:
    """The objects as they would be in a checkout at /checkout."""
    moved: list[Object] = json.loads(json.dumps(objects).replace(str(HERE), "/checkout/tests/cluster"))
    return moved


@pytest.mark.parametrize("name", CASES)
def test_objects_are_those_of_the_golden_file(name: str) -> None:
    path = HERE / "golden" / f"{name}.yaml"
    result = portable(CASES[name].objects())
    if os.environ.get("HASTEN_REWRITE_GOLDEN"):
        path.write_text(dumped(result))
        pytest.fail(f"{path} was written anew: read it, then run without HASTEN_REWRITE_GOLDEN")
    assert list(yaml.safe_load_all(path.read_text())) == result
    assert path.read_text() == dumped(result), "the golden file is not written as it would be printed"


def test_every_golden_file_has_a_case() -> None:
    assert {path.stem for path in (HERE / "golden").glob("*.yaml")} == set(CASES)


@pytest.mark.parametrize("kind", [TrainingJob, TritonServer, Volume])
def test_every_option_has_a_case(kind: type[Any]) -> None:
    options = {entry.name: entry.default for entry in dataclasses.fields(kind) if "help" in entry.metadata}
    specs = [case.spec for case in CASES.values() if isinstance(case.spec, kind)]
    shown = {name for name, default in options.items() if any(getattr(spec, name) != default for spec in specs)}
    assert set(options) - shown - LOCAL_ONLY == set()


@pytest.mark.parametrize("release", RELEASES)
def test_builtin_kinds_are_valid_in_every_release(release: str) -> None:
    validate_lists([body for case in CASES.values() for body in builtins(case.objects())], release)


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("volume")])
def test_custom_resources_are_valid(name: str) -> None:
    for body in filter(is_custom, CASES[name].objects()):
        jsonschema.validate(body, SCHEMAS[body["kind"].lower()], cls=jsonschema.Draft202012Validator)


def test_every_schema_is_used_and_is_itself_valid() -> None:
    used = {body["kind"].lower() for case in CASES.values() for body in case.objects() if is_custom(body)}
    assert used == set(SCHEMAS)
    for schema in SCHEMAS.values():
        jsonschema.Draft202012Validator.check_schema(schema)


@pytest.mark.parametrize("release", RELEASES)
def test_a_misspelt_field_is_found(release: str) -> None:
    good = SERVERS["serve"].objects()
    for kind in ("Deployment", "Service"):
        bad = copy.deepcopy(good)
        next(entry for entry in bad if entry["kind"] == kind)["spec"]["tipe"] = "x"
        with pytest.raises(kubernetes_validate.ValidationError, match="tipe"):
            validate_lists(bad, release)
    pods = list(builtins(CASES["job"].objects()))
    assert [entry["kind"] for entry in pods] == ["Pod"]
    pods[0]["spec"]["containers"][0]["imagePullPolice"] = "Always"
    with pytest.raises(kubernetes_validate.ValidationError, match="imagePullPolice"):
        validate_lists(pods, release)


@pytest.mark.parametrize("name", ["job-limits", "train-job-options", "serve-multinode", "serve-autoscale-queue"])
def test_a_misspelt_field_of_a_custom_resource_is_found(name: str) -> None:
    entry = next(filter(is_custom, CASES[name].objects()))
    entry["spec"]["replicsa"] = 1
    with pytest.raises(jsonschema.ValidationError, match="replicsa"):
        jsonschema.validate(entry, SCHEMAS[entry["kind"].lower()])


@pytest.mark.parametrize("name", CASES)
def test_every_object_is_labelled_and_in_its_namespace(name: str) -> None:
    for body in CASES[name].objects():
        assert body["metadata"]["labels"]["app.kubernetes.io/managed-by"] == "hasten"
        if body["kind"] != "PersistentVolume":
            assert body["metadata"]["namespace"] == CASES[name].spec.namespace


@pytest.mark.parametrize("name", CASES)
def test_objects_have_different_names_and_come_as_plain_data(name: str) -> None:
    result = CASES[name].objects()
    names = [(entry["kind"], entry["metadata"]["name"]) for entry in result]
    assert len(set(names)) == len(names)
    assert "&id" not in dumped(result)
    assert json.loads(json.dumps(result)) == result


def every_pod() -> list[tuple[str, Object]]:
    found = []
    for name, case in CASES.items():
        for body in builtins(case.objects()):
            if body["kind"] == "Pod":
                found.append((name, body))
            if body["kind"] == "Deployment":
                found.append((name, body["spec"]["template"]))
    return found


def test_every_pod_runs_without_rights() -> None:
    pods = every_pod()
    assert len(pods) > len(CASES) / 2
    for name, entry in pods:
        security = entry["spec"]["securityContext"]
        assert security["runAsNonRoot"], name
        assert security["runAsUser"], name
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}, name
        for each in entry["spec"]["containers"] + entry["spec"].get("initContainers", []):
            mine = each["securityContext"]
            assert not mine["allowPrivilegeEscalation"], name
            assert mine["readOnlyRootFilesystem"], name
            assert mine["capabilities"]["drop"] == ["ALL"], name
            assert set(mine["capabilities"].get("add", [])) <= {"IPC_LOCK"}, name


def test_every_pod_can_write_where_programs_write_and_enter_its_working_folder() -> None:
    for name, entry in every_pod():
        sources = {volume["name"]: volume for volume in entry["spec"]["volumes"]}
        for each in entry["spec"]["containers"] + entry["spec"].get("initContainers", []):
            mounted = {mount["mountPath"]: sources[mount["name"]] for mount in each["volumeMounts"]}
            assert {"/tmp", "/root"} <= set(mounted), name
            if each.get("workingDir") == "/root":
                assert "emptyDir" in mounted["/root"], name


def test_an_owner_is_named_in_what_it_owns_and_nowhere_else() -> None:
    result = CASES["job-tensorboard"].objects()
    live = {**result[0], "metadata": {**result[0]["metadata"], "uid": "1-2-3"}}
    reference = {"apiVersion": "kubeflow.org/v1", "kind": "PyTorchJob", "name": "train", "uid": "1-2-3"}
    dependents = owned(result[1:], live)
    assert [item["metadata"]["ownerReferences"] for item in dependents] == [[reference], [reference]]
    assert all("ownerReferences" not in item["metadata"] for item in result)
    validate_lists(dependents, RELEASES[-1])


@pytest.mark.parametrize(
    ("options", "crd", "flag"),
    [
        ({"runtime": "tritonserver", "multinode": 2}, "leaderworkersets.leaderworkerset.x-k8s.io", "--multinode"),
        ({"gateway": "picker"}, "inferencepools.inference.networking.k8s.io", "--gateway"),
        (
            {"autoscale": "1:2", "autoscale_by": "queue", "prometheus": "http://p", "allow_metrics": True},
            "scaledobjects.keda.sh",
            "--autoscale-by queue",
        ),
    ],
)
def test_a_missing_crd_is_named_with_how_to_install_it(options: Object, crd: str, flag: str) -> None:
    spec = TritonServer(name="a", version="1", image="i", model_repository="/m", **options)
    assert server_objects(spec, crds=ALL_CRDS)
    with pytest.raises(ClusterError, match=rf"{flag} needs .*no CRD {crd}; to install it: see https://"):
        server_objects(spec, crds=ALL_CRDS - {crd})


def test_objects_are_made_anew_each_time() -> None:
    spec = TrainingJob(name="a", image="i", command="c")
    first = job_objects(spec)
    first[0]["spec"].clear()
    assert job_objects(spec)[0]["spec"]


def test_the_articles_names_are_arenas() -> None:
    served = {body["kind"]: body for body in ARTICLE["article-serve"].objects()}
    assert set(served) == {"Deployment", "Service", "PodMonitor"}
    service = served["Service"]
    assert service["metadata"]["name"] == "ft-triton-bloom-1-tritoninferenceserver"
    assert {port["name"]: port["port"] for port in service["spec"]["ports"]} == {
        "http-serving": 8000,
        "grpc-serving": 8001,
        "http-metrics": 8002,
    }
    labels = served["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()


def _is_server(case: Case) -> bool:
    return isinstance(case.spec, TritonServer)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if _is_server(case)])
def test_selectors_of_a_server_find_its_pods(name: str) -> None:
    result = CASES[name].objects()
    main = result[0]["spec"]
    template = main["template"] if "template" in main else main["leaderWorkerTemplate"]["leaderTemplate"]
    labels = template["metadata"]["labels"] | {"leaderworkerset.sigs.k8s.io/worker-index": "0"}
    for entry in result:
        selector = entry["spec"].get("selector") if entry["kind"] != "ConfigMap" else None
        if selector is not None:
            assert selector.get("matchLabels", selector).items() <= labels.items(), entry["kind"]
