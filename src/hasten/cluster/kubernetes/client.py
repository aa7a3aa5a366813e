"""The few requests that hasten makes of an API server, through the official client.

Objects are JSON as the server sends it: building the client's models of a thousand pods would take many times as long
as the server's answer. How lists, patches and deletions work: kubernetes.io/docs/reference/using-api/api-concepts.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec
import urllib3
from kubernetes.client import ApiClient, ApiException
from kubernetes.config import ConfigException

from hasten.cluster.kubernetes.config import Access
from hasten.cluster.kubernetes.errors import (
    Attempt,
    ExpiredError,
    MissingKindError,
    answered,
    bad_config,
    missing_kind,
    no_namespace,
    unreachable,
    untrusted,
)
from hasten.cluster.kubernetes.resources import NAMESPACES, PODS, Object, Resource, version_path
from hasten.cluster.kubernetes.shapes import DECODERS
from hasten.core.errors import ClusterError, NotFoundError

FIELD_MANAGER = "hasten"
CONNECT_SECONDS = 5.0
ANSWER_SECONDS = 30.0
PAGE = 2000
"""Objects of one answer: a list of more comes in several."""
_BUSY = 429
_ATTEMPTS_WHEN_BUSY = 4
_LONGEST_WAIT = 10.0
_METHODS = {"get": "GET", "list": "GET", "create": "POST", "patch": "PATCH", "delete": "DELETE"}
_ANYTHING: "msgspec.json.Decoder[Any]" = msgspec.json.Decoder()
_APPLY = "application/apply-patch+yaml"

Query = Sequence[tuple[str, Any]]


class Cluster:
    """A connection to one cluster's API server."""

    def __init__(self, access: Access) -> None:
        self.access = access
        self.server: str = access.configuration.host
        self.client = ApiClient(access.configuration)
        self.client.user_agent = FIELD_MANAGER
        self._kinds: dict[str, dict[str, Resource]] = {}

    def get(self, resource: Resource, namespace: str | None, name: str) -> Object:
        """One object; NotFoundError where there is none."""
        return self._ask(self._attempt("get", resource, namespace, name))

    def find(self, resource: Resource, namespace: str | None, name: str) -> Object | None:
        """One object, if there is one."""
        try:
            return self.get(resource, namespace, name)
        except NotFoundError:
            return None

    def list_all(
        self, resource: Resource, namespace: str | None, *, labels: str = "", fields: str = ""
    ) -> list[Object]:
        """All objects of a kind that match the selectors; `namespace=None` is all namespaces."""
        attempt = self._attempt("list", resource, namespace)
        query = [("labelSelector", labels), ("fieldSelector", fields)]
        chosen = [(name, value) for name, value in query if value]
        try:
            return self._pages(attempt, [*chosen, ("limit", PAGE)])
        except ExpiredError:
            # the list changed so much on its way that the server cannot go on with it
            return self._pages(attempt, chosen)

    def _pages(self, attempt: Attempt, query: Query) -> list[Object]:
        page = self._page(attempt, query)
        items: list[Object] = page["items"]
        while page["metadata"].get("continue"):
            page = self._page(attempt, [*query, ("continue", page["metadata"]["continue"])])
            items += page["items"]
        return items

    def _page(self, attempt: Attempt, query: Query) -> Any:
        decoder = DECODERS.get(attempt.resource) if attempt.resource else None
        return self._decoded(self._send(attempt, query, None)[1], decoder or _ANYTHING)

    def create(self, body: Object) -> Object:
        """Make an object; ExistsError where its name is taken."""
        attempt = self._attempt_for("create", body, named=False)
        return self._ask(attempt, [("fieldManager", FIELD_MANAGER)], body)

    def apply(self, body: Object) -> tuple[Object, bool]:
        """Server-side apply: the object as it is now, and whether it is new.

        Whatever was applied before and is not in `body` is taken away; what others manage is left alone, and to change
        it is a ClusterError (kubernetes.io/docs/reference/using-api/server-side-apply).
        """
        attempt = self._attempt_for("patch", body)
        status, answer = self._send(attempt, [("fieldManager", FIELD_MANAGER), ("force", "false")], body, _APPLY)
        return self._decoded(answer), status == 201

    def delete(self, resource: Resource, namespace: str | None, name: str, policy: str = "Background") -> None:
        """Delete an object and what belongs to it: after it (Background) or before it is gone (Foreground)."""
        self._ask(self._attempt("delete", resource, namespace, name), [("propagationPolicy", policy)])

    def read(self, path: str) -> Object:
        """What stands at a path outside the kinds of objects, such as `/version`."""
        return self._ask(Attempt(self.server, "GET", "get", path))

    def kinds(self, api_version: str) -> dict[str, Resource]:
        """Kinds of a group and version, by name; MissingKindError if the server has none."""
        if api_version not in self._kinds:
            path = version_path(api_version)
            try:
                found = self.read(path)["resources"]
            except NotFoundError as error:
                raise missing_kind("any", api_version, self.server) from error
            self._kinds[api_version] = {
                entry["kind"]: Resource(api_version, entry["kind"], entry["name"], entry["namespaced"])
                for entry in found
                if "/" not in entry["name"]
            }
        return self._kinds[api_version]

    def resource_of(self, body: Object) -> Resource:
        """Where an object belongs; MissingKindError if the cluster does not know its kind."""
        version, kind = body["apiVersion"], body["kind"]
        try:
            return self.kinds(version)[kind]
        except (KeyError, MissingKindError) as error:
            raise missing_kind(kind, version, self.server) from error

    def has(self, resource: Resource) -> bool:
        """Whether the cluster knows a kind."""
        try:
            return resource.kind in self.kinds(resource.api_version)
        except MissingKindError:
            return False

    def check_namespace(self, namespace: str) -> None:
        """NotFoundError if there is no such namespace. Says nothing where the user may not look."""
        try:
            self.get(NAMESPACES, None, namespace)
        except NotFoundError as error:
            raise no_namespace(namespace, self.server) from error
        except ClusterError:
            return

    def log(self, namespace: str, pod: str, query: Query, silence: float = ANSWER_SECONDS) -> Any:
        """Response of urllib3 that streams a container's log; to be closed. `silence`: seconds to wait for more."""
        path = PODS.path(namespace, pod, "log")
        attempt = Attempt(self.server, "GET", "get", path, PODS, namespace, pod, "log")
        with self._translated(attempt):
            response = self._call(attempt, query, None, "application/json", silence)
            if response.status != 200:
                raise answered(attempt, response.status, response.read())
            return response.response

    def _attempt(self, verb: str, resource: Resource, namespace: str | None = None, name: str | None = None) -> Attempt:
        path = resource.path(namespace, name)
        return Attempt(self.server, _METHODS[verb], verb, path, resource, namespace, name)

    def _attempt_for(self, verb: str, body: Object, *, named: bool = True) -> Attempt:
        resource, metadata = self.resource_of(body), body["metadata"]
        namespace = metadata.get("namespace") if resource.namespaced else None
        path = resource.path(namespace, metadata["name"] if named else None)
        return Attempt(self.server, _METHODS[verb], verb, path, resource, namespace, metadata["name"])

    def review(self, resource: Resource) -> Object:
        """Create one of the objects that only ask something and have no name."""
        body = {"apiVersion": resource.api_version, "kind": resource.kind}
        return self._ask(self._attempt("create", resource), (), body)

    def _ask(self, attempt: Attempt, query: Query = (), body: Object | None = None) -> Any:
        return self._decoded(self._send(attempt, query, body)[1])

    def _decoded(self, answer: bytes, decoder: "msgspec.json.Decoder[Any]" = _ANYTHING) -> Any:
        try:
            return decoder.decode(answer)
        except msgspec.DecodeError as error:
            raise ClusterError(
                f"what answers at {self.server} is no API server: {answer[:60]!r}; check the kubeconfig's address"
            ) from error

    def _send(
        self, attempt: Attempt, query: Query, body: Object | None, content_type: str = "application/json"
    ) -> tuple[int, bytes]:
        for left in reversed(range(_ATTEMPTS_WHEN_BUSY)):
            with self._translated(attempt):
                response = self._call(attempt, query, body, content_type, ANSWER_SECONDS)
                answer: bytes = response.read()
            if response.status != _BUSY or not left:
                break
            # the server says that it did nothing, so that any request can be repeated
            time.sleep(min(_LONGEST_WAIT, float(response.headers.get("Retry-After") or 1)))
        if 200 <= response.status < 300:
            return response.status, answer
        raise answered(attempt, response.status, answer, self._token())

    def _call(self, attempt: Attempt, query: Query, body: Object | None, content_type: str, silence: float) -> Any:
        request = self.client.param_serialize(
            attempt.method,
            attempt.path,
            query_params=list(query),
            header_params={"Accept": "application/json", "Content-Type": content_type},
            body=body,
            auth_settings=["BearerToken"],
        )
        return self.client.call_api(*request, _request_timeout=(CONNECT_SECONDS, silence))

    @contextmanager
    def _translated(self, attempt: Attempt) -> Iterator[None]:
        try:
            yield
        except urllib3.exceptions.HTTPError as error:
            raise unreachable(attempt, error, self.access.configuration.proxy) from error
        except ApiException as error:
            raise untrusted(attempt, str(error.reason)) from error
        except ConfigException as error:
            raise bad_config(error, self.access.source) from error

    def _token(self) -> str | None:
        key = self.access.configuration.api_key.get("BearerToken")
        return str(key).partition(" ")[2] if key else None
