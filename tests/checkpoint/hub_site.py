"""A Hugging Face hub on 127.0.0.1: the routes that huggingface_hub uses to find and download a model's files."""

import hashlib
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class HubSite:
    """Repositories of models, by id: for each revision, a branch or a commit, the files of its commit."""

    url: str
    commits: dict[tuple[str, str], str] = field(default_factory=dict)
    """(id, revision) -> commit."""
    files: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)
    """(id, commit) -> files."""
    gated: set[str] = field(default_factory=set)
    requests: list[tuple[str, str]] = field(default_factory=list)
    """Method and path of each request."""
    silent: threading.Event = field(default_factory=threading.Event)
    """Set: requests get no answer."""
    closed: threading.Event = field(default_factory=threading.Event)

    def put(self, model: str, files: dict[str, bytes], revision: str = "main") -> str:
        """A new commit of a branch; returns its hash."""
        digest = hashlib.sha1(usedforsecurity=False)
        for name, data in sorted(files.items()):
            digest.update(name.encode() + data)
        commit = digest.hexdigest()
        self.commits[model, revision] = self.commits[model, commit] = commit
        self.files[model, commit] = files
        return commit

    @property
    def downloaded(self) -> list[str]:
        """Names of the files that were sent, in the order of their names."""
        return sorted(
            path.rpartition("/")[2] for method, path in self.requests if method == "GET" and "/resolve/" in path
        )

    def environment(self, home: Path, **more: str) -> dict[str, str]:
        """Variables for a process that uses this hub, with its cache in `home`."""
        own = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
        # nothing between this machine's processes goes through a proxy
        return {**own, "HF_ENDPOINT": self.url, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1", **more}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    site: HubSite

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.site.requests.append((self.command, path))
        if self.site.silent.is_set():
            self.site.closed.wait()
            return
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self._info("/".join(parts[2:4]), "/".join(parts[5:]) or "main")
        elif "resolve" in parts:
            self._file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        else:
            self._send(404, b"")

    def _commit(self, model: str, revision: str) -> str | None:
        commit = self.site.commits.get((model, revision))
        if commit is None:
            known = any(other == model for other, _ in self.site.commits)
            self._send(404, b"", {"X-Error-Code": "RevisionNotFound" if known else "RepoNotFound"})
        return commit

    def _info(self, model: str, revision: str) -> None:
        commit = self._commit(model, revision)
        if commit is not None:
            files = [{"rfilename": name, "size": len(data)} for name, data in self.site.files[model, commit].items()]
            self._send(200, json.dumps({"id": model, "sha": commit, "siblings": files}).encode())

    def _file(self, model: str, revision: str, name: str) -> None:
        commit = self._commit(model, revision)
        if commit is None:
            return
        if model in self.site.gated:
            self._send(403, b"", {"X-Error-Code": "GatedRepo"})
            return
        data = self.site.files[model, commit].get(name)
        if data is None:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            return
        etag = hashlib.sha256(data).hexdigest()
        self._send(200, data, {"ETag": f'"{etag}"', "X-Repo-Commit": commit})

    def _send(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)


@contextmanager
def hub_site() -> Iterator[HubSite]:
    """A hub that runs while the block does."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    site = HubSite(f"http://127.0.0.1:{server.server_address[1]}")
    server.RequestHandlerClass = type("Handler", (_Handler,), {"site": site})
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield site
    finally:
        site.closed.set()
        server.shutdown()
        thread.join()
        server.server_close()


def files_of(folder: Path) -> dict[str, bytes]:
    """The files of a folder, to put on a hub."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
