"""Requests of the test's API server: paths, verbs, rights, and what is done."""

import json
import re
import socket
import ssl
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import MappingProxyType
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.cluster.api_server_discovery import discovered
from tests.cluster.api_server_exec import WebSocket, accept_key, run_command
from tests.cluster.api_server_kinds import BY_NAME, Kind, Object, RefusedError, bad_request, forbidden, not_found
from tests.cluster.api_server_logs import container_of, log_chunks

if TYPE_CHECKING:
    from tests.cluster.api_server import ApiServer

_READ = {"GET": "get", "POST": "create", "PATCH": "patch", "DELETE": "delete"}
_APPLY, _MERGE = "application/apply-patch+yaml", "application/merge-patch+json"
_NONE: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class _Target:
    """What a path names."""

    kind: Kind
    namespace: str | None
    name: str | None
    subresource: str | None


class HttpServer(ThreadingHTTPServer):
    """Listens for one ApiServer, on a free port of this machine."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, api: "ApiServer", certificate: str | None = None, key: str | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate, key)
            self.socket = context.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)
        self.api = api
        self._open: set[socket.socket] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Remember connections, so that they can be dropped."""
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Forget a connection."""
        self._open.discard(request)
        super().shutdown_request(request)

    def drop_connections(self) -> None:
        """Break all connections, as a network does."""
        for each in list(self._open):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Connections that break are no news; anything else is a mistake of this server."""
        error = sys.exception()
        if not isinstance(error, OSError):
            self.api.mistakes.append("".join(traceback.format_exception(error)))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: HttpServer

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Keep quiet."""

    def do_GET(self) -> None:
        self._answer()

    do_POST = do_PATCH = do_DELETE = do_PUT = do_GET  # noqa: N815

    @property
    def api(self) -> "ApiServer":
        return self.server.api

    def _answer(self) -> None:
        split = urlsplit(self.path)
        self.query = {key: values[-1] for key, values in parse_qs(split.query, keep_blank_values=True).items()}
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.api.requests.append(f"{self.command} {split.path}")
        try:
            self._check_load()
            self._route([unquote(part) for part in split.path.split("/") if part])
        except RefusedError as error:
            headers = {"Retry-After": "1"} if error.code == 429 else {}
            self._send(error.code, json.dumps(error.status).encode(), headers=headers)

    def _send(
        self, code: int, body: bytes, content_type: str = "application/json", headers: Mapping[str, str] = _NONE
    ) -> None:
        self.send_response(code)
        for name, value in {"Content-Type": content_type, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _send_object(self, code: int, body: Object) -> None:
        self._send(code, json.dumps({key: value for key, value in body.items() if key != "_due"}).encode())

    def _check_load(self) -> None:
        if self.api.rules.busy > 0:
            self.api.rules.busy -= 1
            raise RefusedError(429, "TooManyRequests", "too many requests, please try again later")

    def _user(self) -> str:
        token = (self.headers.get("Authorization") or "").partition(" ")[2]
        if token not in self.api.rules.users:
            raise RefusedError(401, "Unauthorized", "Unauthorized")
        return self.api.rules.users[token]

    def _route(self, parts: list[str]) -> None:
        user = self._user()
        if (found := discovered(self.api.store.kinds(), parts)) is not None:
            return self._send_object(200, found)
        if parts == ["apis", "authentication.k8s.io", "v1", "selfsubjectreviews"] and self.command == "POST":
            who = {"username": user, "uid": "1", "groups": ["developers", "system:authenticated"]}
            review = {"apiVersion": "authentication.k8s.io/v1", "kind": "SelfSubjectReview", "metadata": {}}
            return self._send_object(201, {**review, "status": {"userInfo": who}})
        target = self._target(parts)
        if target is None:
            return self._send(404, b"404 page not found\n", "text/plain; charset=utf-8")
        self._authorize(user, target)
        if target.kind not in self.api.store.kinds():
            return self._send(404, b"404 page not found\n", "text/plain; charset=utf-8")
        return self._serve(target)

    def _target(self, parts: list[str]) -> _Target | None:
        head = 2 if parts[:1] == ["api"] else 3
        group = "" if head == 2 else parts[1] if len(parts) > 1 else ""
        version, rest = "/".join(parts[1:head]), parts[head:]
        namespace = None
        if len(rest) > 2 and rest[0] == "namespaces":
            namespace, rest = rest[1], rest[2:]
        if not rest or parts[0] not in ("api", "apis"):
            return None
        kind = BY_NAME.get(f"{rest[0]}.{group}" if group else rest[0])
        if kind is None or kind.api_version != version or (namespace is not None) > kind.namespaced:
            return None
        name, subresource = [*rest[1:], None, None][:2]
        return _Target(kind, namespace, name, subresource)

    def _authorize(self, user: str, target: _Target) -> None:
        verb = _READ.get(self.command, "update")
        if verb == "get" and target.name is None:
            verb = "list"
        if target.subresource == "exec":
            verb = "create"
        self._allow(user, verb, target)
        if self.headers.get("Content-Type") == _APPLY:
            self._applies_new = lambda: self._allow(user, "create", target)

    def _allow(self, user: str, verb: str, target: _Target) -> None:
        kind = target.kind
        resource = kind.plural + (f"/{target.subresource}" if target.subresource else "")
        full = resource + (f".{kind.group}" if kind.group else "")
        if (verb, full) in self.api.rules.denied:
            where = f'in the namespace "{target.namespace}"' if target.namespace else "at the cluster scope"
            why = f'User "{user}" cannot {verb} resource "{resource}" in API group "{kind.group}" {where}'
            raise forbidden(kind, target.name or "", why)

    def _serve(self, target: _Target) -> None:
        kind, namespace, name = target.kind, target.namespace, target.name
        if target.subresource is not None:
            return self._serve_pod(target)
        if self.command == "GET" and name is None:
            return self._send(200, self.api.list(kind, namespace, self.query))
        if self.command == "GET" and name is not None:
            return self._send_object(200, self.api.store.get(kind, namespace or "", name))
        dry = self.query.get("dryRun") == "All"
        if self.command == "POST" and name is None:
            manager = self.query.get("fieldManager") or self.headers.get("User-Agent", "").partition("/")[0]
            created = self.api.store.create(
                kind, namespace or "", self._read(kind, namespace, None), manager, dry_run=dry
            )
            return self._send_object(201, created)
        if self.command == "PATCH" and name is not None:
            return self._patch(kind, namespace or "", name, dry)
        if self.command == "DELETE" and name is not None:
            return self._delete(kind, namespace or "", name, dry)
        raise RefusedError(405, "MethodNotAllowed", "the server does not allow this method on the requested resource")

    def _read(self, kind: Kind, namespace: str | None, name: str | None) -> Object:
        try:
            body: Object = json.loads(self.body)
        except ValueError as error:
            raise bad_request(f"the object provided is unrecognized: {error}") from error
        metadata = body.get("metadata") or {}
        if (body.get("apiVersion"), body.get("kind")) != (kind.api_version, kind.kind):
            raise bad_request(f"the object provided is not a {kind.kind} of {kind.api_version}")
        if namespace is not None and metadata.get("namespace", namespace) != namespace:
            raise bad_request("the namespace of the provided object does not match the namespace sent on the request")
        if name is not None and metadata.get("name", name) != name:
            raise bad_request("the name of the object does not match the name on the URL")
        return body

    def _patch(self, kind: Kind, namespace: str, name: str, dry: bool) -> None:
        store, how = self.api.store, self.headers.get("Content-Type")
        manager = self.query.get("fieldManager")
        if how == _MERGE:
            patch: Object = json.loads(self.body)
            return self._send_object(200, store.merge_patch(kind, namespace, name, patch, manager or "m", dry_run=dry))
        if how != _APPLY:
            raise RefusedError(415, "UnsupportedMediaType", f"the body of the request was in an unknown format: {how}")
        if not manager:
            raise bad_request("PatchOptions.meta.k8s.io is invalid: fieldManager: Required value")
        body = self._read(kind, namespace if kind.namespaced else None, name)
        try:
            store.get(kind, namespace, name)
        except RefusedError:
            self._applies_new()
        force = self.query.get("force") == "true"
        result, new = store.apply(kind, namespace, name, body, manager, force=force, dry_run=dry)
        return self._send_object(201 if new else 200, result)

    def _delete(self, kind: Kind, namespace: str, name: str, dry: bool) -> None:
        policy = self.query.get("propagationPolicy", "Background")
        if policy not in ("Background", "Foreground"):
            raise bad_request(f"this server does not know the propagation policy {policy}")
        gone = self.api.store.delete(kind, namespace, name, policy, dry_run=dry)
        if gone["metadata"].get("deletionTimestamp"):
            return self._send_object(200, gone)
        details = {"name": name, "kind": kind.plural, "uid": gone["metadata"]["uid"]}
        answer = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": details}
        return self._send_object(200, answer)

    def _serve_pod(self, target: _Target) -> None:
        kind, namespace, name = target.kind, target.namespace or "", target.name or ""
        if kind.kind != "Pod" or target.subresource not in ("log", "exec"):
            raise not_found(kind, name)
        pod = self.api.store.get(kind, namespace, name)
        container = container_of(pod, self.query.get("container"))
        if target.subresource == "exec":
            return self._exec()
        if self.query.get("previous") == "true":
            raise bad_request(f'previous terminated container "{container}" in pod "{name}" not found')
        log = self.api.log(namespace, name, container)
        return self._stream(log_chunks(log, self.query, lambda: self._runs(kind, namespace, name, container)))

    def _runs(self, kind: Kind, namespace: str, name: str, container: str) -> bool:
        try:
            pod = self.api.store.get(kind, namespace, name)
        except RefusedError:
            return False
        states = {each["name"]: each["state"] for each in pod["status"].get("containerStatuses") or ()}
        return "running" in states.get(container, {})

    def _stream(self, chunks: Iterator[bytes]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/plain")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            for chunk in chunks:
                if chunk:
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))
            self.wfile.write(b"0\r\n\r\n")
        except ConnectionError:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

    def _exec(self) -> None:
        offered = re.split(r"\s*,\s*", self.headers.get("Sec-WebSocket-Protocol") or "")
        chosen = next((protocol for protocol in self.api.rules.protocols if protocol in offered), None)
        if self.headers.get("Upgrade", "").lower() != "websocket" or chosen is None:
            raise bad_request("unable to upgrade: a websocket with one of its protocols is needed")
        self.send_response(101)
        self.send_header("Upgrade", "websocket")
        self.send_header("Connection", "Upgrade")
        self.send_header("Sec-WebSocket-Accept", accept_key(self.headers["Sec-WebSocket-Key"]))
        self.send_header("Sec-WebSocket-Protocol", chosen)
        self.end_headers()
        self.close_connection = True
        command = parse_qs(urlsplit(self.path).query)["command"]
        run_command(WebSocket(self.connection, self.rfile), command, terminal=self.query.get("tty") == "true")

    _applies_new: Callable[[], None]
