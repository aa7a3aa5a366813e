import base64
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
from tests.cluster.api_server import ADMIN, ApiServer
from tests.cluster.kubernetes_fixtures import World, serving, training, world

from hasten.cli.main import main
from hasten.cluster.kubernetes.backend import KubernetesBackend
from hasten.core.errors import ClusterError, ConfigError

__all__ = ["world"]


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What this machine's user has set plays no part."""
    for name in ("KUBECONFIG", "KUBERNETES_SERVICE_HOST", "http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def test_the_file_of_the_option_of_the_variable_and_of_the_home(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / ".kube").mkdir()
    world.server.kubeconfig(tmp_path / ".kube" / "config", namespace="of-home")
    assert KubernetesBackend().default_namespace() == "of-home"
    named = world.server.kubeconfig(tmp_path / "named", namespace="of-variable")
    monkeypatch.setenv("KUBECONFIG", f"{tmp_path / 'not-there'}:{named}")
    assert KubernetesBackend().default_namespace() == "of-variable"
    given = world.server.kubeconfig(tmp_path / "given")
    assert KubernetesBackend(given).default_namespace() == "default"


def test_contexts(world: World, tmp_path: Path) -> None:
    config = world.server.kubeconfig(tmp_path / "config")
    assert KubernetesBackend(config, "test").version().startswith("Kubernetes v1.37.0 at http://127.0.0.1")
    with pytest.raises(ConfigError, match=r"has no context other; it has test"):
        KubernetesBackend(config, "other")


def test_what_is_wrong_with_a_configuration(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no cluster is configured: ~/.kube/config does not exist and this is not a"):
        KubernetesBackend()
    with pytest.raises(ConfigError, match="there is no kubeconfig /nowhere"):
        KubernetesBackend("/nowhere")
    for text in ("[1, 2]", "a: b: c", "{}", "", "current-context: x\ncontexts: []\nclusters: []\nusers: []"):
        (tmp_path / "bad").write_text(text)
        with pytest.raises(ConfigError, match="cannot use the kubeconfig"):
            KubernetesBackend(str(tmp_path / "bad"))
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.96.0.1")
    with pytest.raises(ConfigError, match="pod's service account"):
        KubernetesBackend()


def test_a_dry_run_needs_no_cluster(caplog: pytest.LogCaptureFixture) -> None:
    backend = KubernetesBackend(only_plans=True)
    assert backend.default_namespace() == "default"
    assert [each["kind"] for each in backend.plan_job(training())] == ["PyTorchJob"]
    assert [each["kind"] for each in backend.plan_server(serving())] == ["Deployment", "Service"]
    assert not caplog.records  # as there would be of attempts that are made again
    kinds = [each["kind"] for each in backend.plan_server(serving(allow_metrics=True, multinode=2))]
    assert kinds == ["LeaderWorkerSet", "Service", "PodMonitor"]
    assert "for a cluster with all CRDs of docs/kubernetes.md: no cluster is configured" in caplog.text


def test_a_dry_run_needs_no_cluster_that_answers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    server = ApiServer()
    config = server.kubeconfig(tmp_path / "config", namespace="team")
    server.close()
    backend = KubernetesBackend(config)
    assert backend.default_namespace() == "team"
    assert [each["kind"] for each in backend.plan_server(serving())] == ["Deployment", "Service"]
    assert not caplog.records  # as there would be of attempts that are made again
    assert backend.plan_server(serving(allow_metrics=True))[-1]["kind"] == "PodMonitor"
    assert "no answer from the cluster" in caplog.text
    with pytest.raises(ClusterError, match="no answer from the cluster"):
        backend.serve(serving(allow_metrics=True))


def test_a_dry_run_by_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("cluster", "--cluster", "kubernetes")
    server = ("--name", "x", "--version", "1", "--image", "i", "--model-repository", "/m")
    assert main([*options, "serve", "triton", *server, "--dry-run"]) == 0
    assert main([*options, "submit", "pytorchjob", "--name", "x", "--image", "i", "--dry-run", "run"]) == 0
    assert main([*options, "data", "create", "v", "--nfs-server", "s", "--path", "/p", "--dry-run"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.count("kind: Deployment\n") == 1
    assert main([*options, "serve", "triton", *server]) == 2
    assert main([*options, "--config", "/nowhere", "serve", "triton", *server, "--dry-run"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[2].strip()[:28] for line in errors] == [
        "error: no cluster is configu",
        "error: there is no kubeconfi",
    ]


def test_a_server_that_is_not_there_is_an_error_at_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    server = ApiServer()
    config = server.kubeconfig(tmp_path / "config")
    server.close()
    with pytest.raises(ClusterError, match=r"no answer from the cluster at http://127.* \(.*refused.*\): check"):
        KubernetesBackend(config).jobs("default")
    with pytest.raises(ClusterError, match=r"address$"):
        KubernetesBackend(config).version()
    assert not caplog.records  # as there would be of attempts that are made again


class _Page(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "13")
        self.end_headers()
        self.wfile.write(b"<html></html>")

    def log_message(self, *args: object) -> None:
        pass


def test_something_else_that_answers(world: World, tmp_path: Path) -> None:
    with HTTPServer(("127.0.0.1", 0), _Page) as server:
        threading.Thread(target=server.handle_request).start()
        text = Path(world.server.kubeconfig(tmp_path / "config")).read_text()
        port = str(server.server_address[1])
        (tmp_path / "config").write_text(text.replace(world.server.url.rpartition(":")[2], port))
        with pytest.raises(ClusterError, match=r"is no API server: b'<html></html>'; check the kubeconfig's address"):
            KubernetesBackend(str(tmp_path / "config")).jobs("default")


def test_a_name_that_is_not_known(world: World, tmp_path: Path) -> None:
    text = Path(world.server.kubeconfig(tmp_path / "config")).read_text()
    (tmp_path / "config").write_text(text.replace("127.0.0.1", "no-such-host.invalid"))
    with pytest.raises(ClusterError, match=r"no answer from the cluster at http://no-such-host\.invalid"):
        KubernetesBackend(str(tmp_path / "config")).version()


def test_a_connection_that_breaks_leaves_open_what_was_done(world: World) -> None:
    world.store.admission.append(lambda kind, body: world.server.drop_connections())
    with pytest.raises(ClusterError, match=r"no answer .*Whether it did create PyTorchJob convert-bloom is not known"):
        world.backend.submit(training())


def _web_token(expiry: float) -> str:
    parts = ({"alg": "RS256"}, {"exp": int(expiry), "sub": "me"})
    encoded = [base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in parts]
    return ".".join([*encoded, "c2lnbmF0dXJl"])


def test_who_is_not_known(world: World) -> None:
    with pytest.raises(ClusterError, match=r"does not know who asks .*the token or certificate is missing, wrong or"):
        world.connect("wrong").jobs("default")
    with pytest.raises(ClusterError, match="does not know who asks"):
        world.connect(None).submit(training())
    ended = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC).timestamp()
    with pytest.raises(ClusterError, match="its token expired at 2026-01-02 03:04:05 UTC; log in again"):
        world.connect(_web_token(ended)).whoami()
    with pytest.raises(ClusterError, match="missing, wrong or expired"):
        world.connect(_web_token(time.time() + 1000)).whoami()


def test_who_is_known(world: World) -> None:
    message = world.backend.whoami()
    assert message.startswith("admin (developers, system:authenticated) at http://127.0.0.1")
    assert "context test of" in message


def test_a_busy_server_is_asked_again(world: World) -> None:
    world.server.rules.busy = 1
    world.backend.submit(training())
    assert world.leftovers() == ["PyTorchJob/convert-bloom"]


def test_a_proxy_is_not_asked_for_this_machine(world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = world.server.kubeconfig(tmp_path / "config")
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert KubernetesBackend(config).jobs("default") == []
    text = Path(config).read_text().replace("127.0.0.1", "cluster.invalid")
    (tmp_path / "far").write_text(text)
    with pytest.raises(ClusterError, match=r"through the proxy http://127.0.0.1:9"):
        KubernetesBackend(str(tmp_path / "far")).jobs("default")


class _Proxy(BaseHTTPRequestHandler):
    """Answers itself, and remembers for whom it was asked."""

    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        body = json.dumps({"gitVersion": "v1.0-by-proxy", "items": [], "metadata": {}}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def proxy() -> Iterator[str]:
    _Proxy.asked.clear()
    with HTTPServer(("127.0.0.1", 0), _Proxy) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_the_proxy_of_the_kubeconfig_holds_for_all_hosts(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, proxy: str
) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1,localhost,*")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    config = world.server.kubeconfig(tmp_path / "config", ADMIN, None, **{"proxy-url": proxy})
    assert KubernetesBackend(config).version() == f"Kubernetes v1.0-by-proxy at {world.server.url}"
    assert _Proxy.asked == [f"{world.server.url}/version"]
    assert world.server.requests == []


def test_the_proxy_of_the_environment_leaves_its_hosts_alone(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, proxy: str
) -> None:
    monkeypatch.setenv("http_proxy", proxy)
    text = Path(world.server.kubeconfig(tmp_path / "config")).read_text()
    (tmp_path / "far").write_text(text.replace("127.0.0.1", "cluster.invalid"))
    assert "by-proxy" in KubernetesBackend(str(tmp_path / "far")).version()
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "cluster.invalid")
    with pytest.raises(ClusterError, match=r"no answer from the cluster at http://cluster\.invalid"):
        KubernetesBackend(str(tmp_path / "far")).version()


def plugin(world: World, folder: Path, script: str) -> str:
    """A kubeconfig whose user's credentials a command tells."""
    (folder / "plugin").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "plugin").chmod(0o755)
    config = json.loads(Path(world.server.kubeconfig(folder / "config")).read_text())
    api = "client.authentication.k8s.io/v1"
    command = {
        "apiVersion": api,
        "command": str(folder / "plugin"),
        "interactiveMode": "Never",
    }
    config["users"][0]["user"] = {"exec": command}
    (folder / "config").write_text(json.dumps(config))
    return str(folder / "config")


def credential(**status: str) -> str:
    body = {"apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential", "status": status}
    return f"echo '{json.dumps(body)}'"


def test_a_plugin_tells_the_credentials(world: World, tmp_path: Path) -> None:
    assert KubernetesBackend(plugin(world, tmp_path, credential(token=ADMIN))).jobs("default") == []


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo 'session expired,' >&2; echo 'log in' >&2; exit 3", "process returned 3. session expired, log in"),
        ("echo nothing", "failed to decode process output"),
        (credential(), "missing token or clientCertificateData"),
        ("echo '{}'", "malformed response"),
    ],
)
def test_a_plugin_that_fails_is_told_as_such(
    world: World, tmp_path: Path, capfd: pytest.CaptureFixture[str], script: str, reason: str
) -> None:
    with pytest.raises(
        ConfigError, match=f"cannot use the kubeconfig .*its credential plugin failed: .*{reason}"
    ) as message:
        KubernetesBackend(plugin(world, tmp_path, script)).jobs("default")
    assert "\n" not in str(message.value)
    assert capfd.readouterr() == ("", "")
    assert world.server.requests == []


def test_a_plugin_that_is_not_there(world: World, tmp_path: Path) -> None:
    config = plugin(world, tmp_path, "")
    (tmp_path / "plugin").unlink()
    with pytest.raises(ConfigError, match=r"its credential plugin failed: .*No such file or directory"):
        KubernetesBackend(config)


def test_a_plugin_that_fails_later(world: World, tmp_path: Path) -> None:
    """Where the credentials expire while a command runs."""
    once = f"[ -e {tmp_path}/asked ] && {{ echo gone >&2; exit 1; }}; touch {tmp_path}/asked"
    ended = credential(token=ADMIN, expirationTimestamp="2026-01-01T00:00:00Z")
    with pytest.raises(ConfigError, match=r"its credential plugin failed: exec: process returned 1\. gone"):
        KubernetesBackend(plugin(world, tmp_path, f"{once}\n{ended}")).jobs("default")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A certificate of this machine's address that it signs itself, and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("makes certificates with openssl")
    folder = tmp_path_factory.mktemp("certificate")
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=test"
    files = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", "key.pem", "-out", "cert.pem"]
    subprocess.run([*command.split(), *files], cwd=folder, check=True, capture_output=True)
    return str(folder / "cert.pem"), str(folder / "key.pem")


@pytest.fixture
def secure(certificate: tuple[str, str]) -> Iterator[ApiServer]:
    server = ApiServer(*certificate)
    try:
        yield server
    finally:
        server.close()


def test_a_certificate_is_checked(secure: ApiServer, certificate: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"no safe connection .*certificate.*: check certificate-authority"):
        KubernetesBackend(secure.kubeconfig(tmp_path / "a")).version()
    trusting = KubernetesBackend(secure.kubeconfig(tmp_path / "b", **{"certificate-authority": certificate[0]}))
    assert trusting.version().startswith("Kubernetes v1.37.0 at https://127.0.0.1")
    careless = KubernetesBackend(secure.kubeconfig(tmp_path / "c", ADMIN, None, **{"insecure-skip-tls-verify": True}))
    assert careless.jobs("default") == []


def test_commands_over_tls(
    secure: ApiServer, certificate: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(secure, tmp_path)
    config = secure.kubeconfig(tmp_path / "config", ADMIN, **{"certificate-authority": certificate[0]})
    backend = KubernetesBackend(config)
    backend.submit(training())
    world.run(world.train("convert-bloom"))
    data = b"0123456789" * 30_000
    (tmp_path / "in").write_bytes(data)
    with (tmp_path / "in").open() as source, (tmp_path / "out").open("w") as sink, monkeypatch.context() as patch:
        patch.setattr(sys, "stdin", source)
        patch.setattr(sys, "stdout", sink)
        assert backend.attach_job("convert-bloom", "default", None, None, ["cat"]) == 0
    assert (tmp_path / "out").read_bytes() == data
