"""The test's API server behaves as the pages in its modules say, seen through the official client."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from kubernetes.client import ApiClient, ApiException, Configuration, CoreV1Api, CustomObjectsApi
from tests.cluster.api_server import ADMIN, ApiServer

Object = dict[str, Any]
APPLY, MERGE = "application/apply-patch+yaml", "application/merge-patch+json"


class Client:
    """The official client, with JSON in and out."""

    def __init__(self, server: ApiServer) -> None:
        self.api: Any = ApiClient(Configuration(host=server.url, api_key={"BearerToken": f"Bearer {ADMIN}"}))
        self.custom: Any = CustomObjectsApi(self.api)
        self.core: Any = CoreV1Api(self.api)

    def apply(self, spec: Object, manager: str, *, force: bool = False, **metadata: Any) -> Object:
        body = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "d", **metadata}, "spec": spec}
        return self.patch(body, APPLY, fieldManager=manager, force=str(force).lower())

    def patch(self, body: Object, content_type: str, **query: str) -> Object:
        return self.ask("PATCH", "/apis/apps/v1/namespaces/default/deployments/d", body, content_type, **query)

    def ask(self, method: str, path: str, body: Any = None, content_type: str | None = None, **query: str) -> Object:
        headers = {"Accept": "application/json", "Content-Type": content_type or "application/json"}
        request = self.api.param_serialize(
            method,
            path,
            query_params=list(query.items()),
            header_params=headers,
            body=body,
            auth_settings=["BearerToken"],
        )
        response = self.api.call_api(*request)
        answer = response.read()
        self.api.response_deserialize(response, {})
        read: Object = json.loads(answer)
        return read


@pytest.fixture
def server() -> Iterator[ApiServer]:
    result = ApiServer()
    try:
        yield result
    finally:
        result.close()


@pytest.fixture
def client(server: ApiServer) -> Client:
    return Client(server)


def refused(ask: Callable[[], object]) -> Object:
    """The Status of a request that is refused."""
    with pytest.raises(ApiException) as error:
        ask()
    status: Object = json.loads(error.value.body or "")
    assert status["code"] == error.value.status
    return status


def managers(body: Object) -> dict[str, Any]:
    return {f"{each['manager']}/{each['operation']}": each["fieldsV1"] for each in body["metadata"]["managedFields"]}


def pods(*containers: Object) -> Object:
    return {"template": {"spec": {"containers": list(containers)}}}


def test_an_apply_makes_and_changes_and_owns(client: Client) -> None:
    result = client.apply({"replicas": 2, **pods({"name": "a", "image": "x"})}, "one")
    assert result["metadata"]["generation"] == 1
    fields = managers(result)["one/Apply"]["f:spec"]
    container = fields["f:template"]["f:spec"]["f:containers"]
    assert container == {'k:{"name":"a"}': {".": {}, "f:name": {}, "f:image": {}}}
    assert "f:replicas" in fields
    again = client.apply({"replicas": 2, **pods({"name": "a", "image": "x"})}, "one")
    assert again["metadata"]["resourceVersion"] == result["metadata"]["resourceVersion"]
    changed = client.apply({"replicas": 3, **pods({"name": "a", "image": "x"})}, "one")
    assert (changed["spec"]["replicas"], changed["metadata"]["generation"]) == (3, 2)


def test_what_is_not_applied_again_is_removed(client: Client) -> None:
    client.apply({"paused": True, **pods({"name": "a", "image": "x"}, {"name": "b", "image": "y"})}, "one")
    changed = client.apply(pods({"name": "a"}), "one")
    assert changed["spec"]["template"]["spec"]["containers"] == [{"name": "a"}]
    assert "paused" not in changed["spec"]
    assert changed["spec"]["replicas"] == 1  # a default, which is nobody's


def test_a_conflict_names_fields_and_managers_and_force_decides(client: Client) -> None:
    client.apply(pods({"name": "a", "image": "x"}), "one")
    status = refused(lambda: client.apply(pods({"name": "a", "image": "z"}), "two"))
    assert (status["code"], status["reason"]) == (409, "Conflict")
    assert status["details"]["causes"] == [
        {
            "reason": "FieldManagerConflict",
            "message": 'conflict with "one" using apps/v1',
            "field": '.spec.template.spec.containers[name="a"].image',
        }
    ]
    forced = client.apply(pods({"name": "a", "image": "z"}), "two", force=True)
    container = managers(forced)["one/Apply"]["f:spec"]["f:template"]["f:spec"]["f:containers"]['k:{"name":"a"}']
    assert "f:image" not in container
    assert "f:name" in container  # the same value is shared


def test_a_shared_field_stays_when_one_gives_it_up(client: Client) -> None:
    client.apply({"replicas": 2, "paused": True}, "one")
    client.apply({"replicas": 2}, "two")
    assert client.apply({"paused": True}, "one")["spec"]["replicas"] == 2
    assert client.apply({"paused": True}, "two")["spec"] == {"replicas": 1, "paused": True}  # the default again


def test_other_writes_take_what_they_change(client: Client) -> None:
    client.apply({"replicas": 2, "paused": True}, "one")
    changed = client.patch({"spec": {"replicas": 5}}, MERGE, fieldManager="kubectl")
    assert managers(changed)["kubectl/Update"] == {"f:spec": {"f:replicas": {}}}
    assert "f:replicas" not in managers(changed)["one/Apply"]["f:spec"]
    assert refused(lambda: client.apply({"replicas": 2, "paused": True}, "one"))["reason"] == "Conflict"
    assert "paused" not in client.patch({"spec": {"paused": None}}, MERGE)["spec"]


def test_preconditions(client: Client) -> None:
    result = client.apply({"replicas": 2}, "one")["metadata"]
    client.apply({"replicas": 3}, "one")
    assert refused(lambda: client.apply({}, "one", resourceVersion=result["resourceVersion"]))["code"] == 409
    assert refused(lambda: client.apply({}, "one", uid="other"))["code"] == 409
    assert refused(lambda: client.apply({}, "one", managedFields=[{"manager": "x"}]))["code"] == 400
    client.ask("DELETE", "/apis/apps/v1/namespaces/default/deployments/d")
    assert refused(lambda: client.apply({}, "one", uid=result["uid"]))["code"] == 409


def test_a_dry_run_answers_and_keeps_nothing(server: ApiServer, client: Client) -> None:
    body = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "c"}}
    path = "/api/v1/namespaces/default/configmaps"
    assert client.ask("POST", path, body, dryRun="All")["metadata"]["uid"]
    assert server.store.names() == []
    client.ask("POST", path, body)
    assert refused(lambda: client.ask("POST", path, body, dryRun="All"))["reason"] == "AlreadyExists"
    client.ask("DELETE", f"{path}/c", dryRun="All")
    assert server.store.names() == ["ConfigMap/c"]


def owned(name: str, owner: Object, *, blocks: bool = False, finalizers: tuple[str, ...] = ()) -> Object:
    reference = {"apiVersion": "v1", "kind": "ConfigMap", "name": owner["metadata"]["name"]}
    reference |= {"uid": owner["metadata"]["uid"], "blockOwnerDeletion": blocks}
    metadata = {"name": name, "ownerReferences": [reference], "finalizers": list(finalizers)}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata}


def test_deletion_in_the_background_and_in_the_foreground(server: ApiServer, client: Client) -> None:
    path = "/api/v1/namespaces/default/configmaps"
    store = server.store
    for policy in ("Background", "Foreground"):
        body = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "owner"}}
        owner = client.ask("POST", path, body)
        client.ask("POST", path, owned("held", owner, blocks=True, finalizers=("example.com/f",)))
        client.ask("POST", path, owned("free", owner))
        client.ask("DELETE", f"{path}/owner", propagationPolicy=policy)
        store.settle()
        assert store.names() == ["ConfigMap/held"] + ["ConfigMap/owner"] * (policy == "Foreground")
        held = client.ask("GET", f"{path}/held")
        assert held["metadata"]["deletionTimestamp"]
        client.ask("PATCH", f"{path}/held", {"metadata": {"finalizers": None}}, MERGE)
        store.settle()
        assert store.names() == []


def test_an_owner_of_the_same_name_is_not_the_owner(server: ApiServer, client: Client) -> None:
    path = "/api/v1/namespaces/default/configmaps"
    owner = {"metadata": {"name": "owner", "uid": "of-one-that-is-gone"}}
    client.ask("POST", path, {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "owner"}})
    client.ask("POST", path, owned("orphan", owner))
    server.store.settle()
    assert server.store.names() == ["ConfigMap/owner"]


def test_selectors(server: ApiServer, client: Client) -> None:
    for name, labels in (("a", {"x": "1", "y": "1"}), ("b", {"x": "2"}), ("c", {})):
        metadata = {"name": name, "labels": labels}
        server.store.write({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata})

    def names(**selectors: str) -> list[str]:
        items = client.ask("GET", "/api/v1/namespaces/default/configmaps", **selectors)["items"]
        return [item["metadata"]["name"] for item in items]

    for selector, found in (
        ("x=1", ["a"]),
        ("x!=1", ["b", "c"]),
        ("x", ["a", "b"]),
        ("!x", ["c"]),
        ("x in (1, 2),y==1", ["a"]),
        ("x notin (1)", ["b", "c"]),
    ):
        assert names(labelSelector=selector) == found
    assert names(fieldSelector="metadata.name!=a") == ["b", "c"]
    assert refused(lambda: names(fieldSelector="data.x=1"))["code"] == 400


def test_pages(server: ApiServer, client: Client) -> None:
    for number in range(5):
        server.store.write({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": f"c{number}"}})
    first = client.core.list_namespaced_config_map("default", limit=2)
    server.store.remove("v1", "ConfigMap", "default", "c4")
    second = client.core.list_namespaced_config_map("default", limit=2, _continue=first.metadata._continue)
    assert [each.metadata.name for each in (*first.items, *second.items)] == ["c0", "c1", "c2", "c3"]
    assert first.metadata.remaining_item_count == 3
    server.rules.expired.add("all")
    ask = client.core.list_namespaced_config_map
    assert refused(lambda: ask("default", limit=2, _continue=second.metadata._continue))["code"] == 410


def test_what_is_refused(server: ApiServer, client: Client) -> None:
    path = "/api/v1/namespaces/default/configmaps"
    body = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "Not A Name"}}
    assert refused(lambda: client.ask("POST", path, body))["details"]["causes"][0]["field"] == "metadata.name"
    assert refused(lambda: client.ask("POST", path, {**body, "kind": "Secret"}))["code"] == 400
    body["metadata"] = {"name": "c"}
    missing = refused(lambda: client.ask("POST", "/api/v1/namespaces/nowhere/configmaps", body))
    assert (missing["code"], missing["details"]["kind"]) == (404, "namespaces")
    assert refused(lambda: client.ask("GET", f"{path}/nothing"))["message"] == 'configmaps "nothing" not found'
    assert refused(lambda: client.ask("PUT", f"{path}/c", body))["code"] == 405
    assert refused(lambda: client.ask("PATCH", f"{path}/c", body, "application/json-patch+json"))["code"] == 415
    server.rules.denied.add(("get", "configmaps"))
    status = refused(lambda: client.ask("GET", f"{path}/nothing"))
    assert status["message"] == (
        'configmaps "nothing" is forbidden: User "admin" cannot get resource "configmaps" in API group "" '
        'in the namespace "default"'
    )
    with pytest.raises(ApiException) as error:
        client.custom.list_cluster_custom_object("example.com", "v1", "things")
    assert (error.value.status, error.value.body) == (404, "404 page not found\n")


def test_the_official_client_reads_its_objects(server: ApiServer, client: Client) -> None:
    spec = {"containers": [{"name": "a", "image": "x"}]}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": spec, "status": {"phase": "Failed"}}
    result = client.core.create_namespaced_pod("default", pod)
    assert result.status.phase == "Pending"  # a status is not made by its user
    state: Object = {"running": {}}
    statuses = [
        {"name": "a", "state": state, "image": "x", "imageID": "y", "ready": True, "restartCount": 0},
    ]
    server.store.write({**pod, "status": {"phase": "Running", "containerStatuses": statuses}})
    server.log("default", "p", "a").write("one", "two")
    assert client.core.read_namespaced_pod_log("p", "default", tail_lines=1) == "two\n"
    assert client.core.list_pod_for_all_namespaces().items[0].status.container_statuses[0].ready
