"""A small API server over HTTP for tests: what hasten asks of a Kubernetes cluster, answered as the real one does.

Paths, verbs, lists and patches: kubernetes.io/docs/reference/using-api/api-concepts; who may do what, and that rights
are checked before anything is looked up: /docs/reference/access-authn-authz/authorization and .../rbac; bearer tokens
and SelfSubjectReview: .../authentication; `429` with `Retry-After`: /docs/concepts/cluster-administration/flow-control.
There is no watch, no PUT, no strategic merge patch: hasten uses none of them, and they are refused.
"""

import json
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.cluster.api_server_http import HttpServer
from tests.cluster.api_server_kinds import Key, Kind, RefusedError
from tests.cluster.api_server_logs import Log
from tests.cluster.api_server_select import field_matcher, label_matcher
from tests.cluster.api_server_store import Store
from tests.waiting import LIMIT_S

ADMIN = "token-of-admin"


@dataclass
class Rules:
    """Who is known, and what is denied to everybody."""

    users: dict[str, str] = field(default_factory=lambda: {ADMIN: "admin"})
    """Names by token."""
    denied: set[tuple[str, str]] = field(default_factory=set)
    """Verb and resource, such as ("create", "secrets") or ("get", "pods/log")."""
    busy: int = 0
    """So many requests are to be answered with 429."""
    expired: set[str] = field(default_factory=set)
    """Continue tokens that the server has forgotten, and "all"."""
    protocols: tuple[str, ...] = ("v5.channel.k8s.io", "v4.channel.k8s.io")


class ApiServer:
    """A cluster of objects and its HTTP server, on a free port of this machine."""

    def __init__(self, certificate: str | None = None, key: str | None = None) -> None:
        """With the files of a certificate and its key it speaks HTTPS."""
        self.store, self.rules = Store(), Rules()
        self.requests: list[str] = []
        """Method and path of each request."""
        self.mistakes: list[str] = []
        self._logs: dict[tuple[str, str, str], Log] = {}
        self._pages: dict[str, list[Key]] = {}
        self._server = HttpServer(self, certificate, key)
        self._scheme = "https" if certificate else "http"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"{self._scheme}://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        """End it and all that it runs."""
        for log in self._logs.values():
            log.cut()
        self._server.shutdown()
        self._server.drop_connections()
        self._server.server_close()
        self.store.close()
        self._thread.join(LIMIT_S)
        assert not self.mistakes, "\n".join(self.mistakes)

    def drop_connections(self) -> None:
        """Break all connections, as a network does."""
        self._server.drop_connections()

    def kubeconfig(self, path: Path, token: str | None = ADMIN, namespace: str | None = None, **cluster: Any) -> str:
        """Write a configuration whose current context is this server; returns the file's name."""
        context = {"cluster": "here", "user": "me", **({"namespace": namespace} if namespace else {})}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "clusters": [{"name": "here", "cluster": {"server": self.url, **cluster}}],
            "users": [{"name": "me", "user": {"token": token} if token else {}}],
            "contexts": [{"name": "test", "context": context}],
        }
        path.write_text(json.dumps(config))
        return str(path)

    def log(self, namespace: str, pod: str, container: str) -> Log:
        """Log of a container."""
        return self._logs.setdefault((namespace, pod, container), Log())

    def list(self, kind: Kind, namespace: str | None, query: dict[str, str]) -> bytes:
        """Answer to a list: all that match, or a page of them as they were at its first page."""
        limit = int(query.get("limit") or 0)
        token = query.get("continue")
        if token:
            if token in self.rules.expired or "all" in self.rules.expired:
                raise RefusedError(410, "Expired", "The provided continue parameter is too old to display a list")
            keys = self._pages.pop(token)
        else:
            labels = label_matcher(query.get("labelSelector", ""))
            fields = field_matcher(kind, query.get("fieldSelector", ""))
            keys = self.store.select(kind, namespace, lambda one: labels(one) and fields(one))
        metadata: dict[str, Any] = {"resourceVersion": self.store.version}
        if limit and len(keys) > limit:
            following = f"page-{len(self._pages)}-{self.store.version}"
            self._pages[following] = keys[limit:]
            metadata |= {"continue": following, "remainingItemCount": len(keys) - limit}
            keys = keys[:limit]
        head = {"kind": f"{kind.kind}List", "apiVersion": kind.api_version, "metadata": metadata}
        items = b",".join(self.store.encoded(keys))
        return json.dumps(head).encode()[:-1] + b', "items": [' + items + b"]}"
