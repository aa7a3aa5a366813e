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

import pytest
from tests.cluster.api_server import ADMIN, ApiServer
from tests.cluster.kubernetes_fixtures import World, training, world

from hasten.cluster.kubernetes.place import KubernetesPlace
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
    assert KubernetesPlace().default_namespace() == "of-home"
    named = world.server.kubeconfig(tmp_path / "named", namespace="of-variable")
    monkeypatch.setenv("KUBECONFIG", f"{tmp_path / 'not-there'}:{named}")
    assert KubernetesPlace().default_namespace() == "of-variable"
    given = world.server.kubeconfig(tmp_path / "given")
    assert KubernetesPlace(given).default_namespace() == "default"


def test_contexts(world: World, tmp_path: Path) -> None:
    config = world.server.kubeconfig(tmp_path / "config")
    assert KubernetesPlace(config, "test").version().startswith("Kubernetes v1.37.0 at http://127.0.0.1")
    with pytest.raises(ConfigError, match=r"has no context other; it has test"):
        KubernetesPlace(config, "other")


def test_what_is_wrong_with_a_configuration(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no cluster is configured: ~/.kube/config does not exist and this is not a"):
        KubernetesPlace()
    with pytest.raises(ConfigError, match="there is no kubeconfig /nowhere"):
        KubernetesPlace("/nowhere")
    for text in ("[1, 2]", "a: b: c", "{}", "", "current-context: x\ncontexts: []\nclusters: []\nusers: []"):
        (tmp_path / "bad").write_text(text)
        with pytest.raises(ConfigError, match="cannot use the kubeconfig"):
            KubernetesPlace(str(tmp_path / "bad"))
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.96.0.1")
    with pytest.raises(ConfigError, match="pod's service account"):
        KubernetesPlace()


def test_a_server_that_is_not_there_is_told_within_seconds(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    server = ApiServer()
    config = server.kubeconfig(tmp_path / "config")
    server.close()
    start = time.monotonic()
    with pytest.raises(ClusterError, match=r"no answer from the cluster at http://127.* \(.*refused.*\): check"):
        KubernetesPlace(config).jobs("default")
    with pytest.raises(ClusterError, match=r"address$"):
        KubernetesPlace(config).version()
    assert time.monotonic() - start < 5
    assert not caplog.records


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
            KubernetesPlace(str(tmp_path / "config")).jobs("default")


def test_a_name_that_is_not_known(world: World, tmp_path: Path) -> None:
    text = Path(world.server.kubeconfig(tmp_path / "config")).read_text()
    (tmp_path / "config").write_text(text.replace("127.0.0.1", "no-such-host.invalid"))
    with pytest.raises(ClusterError, match=r"no answer from the cluster at http://no-such-host\.invalid"):
        KubernetesPlace(str(tmp_path / "config")).version()


def test_a_connection_that_breaks_leaves_open_what_was_done(world: World) -> None:
    world.store.admission.append(lambda kind, body: world.server.drop_connections())
    with pytest.raises(ClusterError, match=r"no answer .*Whether it did create PyTorchJob convert-bloom is not known"):
        world.place.submit(training())


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
    told = world.place.whoami()
    assert told.startswith("admin (developers, system:authenticated) at http://127.0.0.1")
    assert "context test of" in told


def test_a_busy_server_is_asked_again(world: World) -> None:
    world.server.rules.busy = 1
    world.place.submit(training())
    assert world.leftovers() == ["PyTorchJob/convert-bloom"]


def test_a_proxy_is_not_asked_for_this_machine(world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = world.server.kubeconfig(tmp_path / "config")
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert KubernetesPlace(config).jobs("default") == []
    text = Path(config).read_text().replace("127.0.0.1", "cluster.invalid")
    (tmp_path / "far").write_text(text)
    with pytest.raises(ClusterError, match=r"through the proxy http://127.0.0.1:9"):
        KubernetesPlace(str(tmp_path / "far")).jobs("default")


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
        KubernetesPlace(secure.kubeconfig(tmp_path / "a")).version()
    trusting = KubernetesPlace(secure.kubeconfig(tmp_path / "b", **{"certificate-authority": certificate[0]}))
    assert trusting.version().startswith("Kubernetes v1.37.0 at https://127.0.0.1")
    careless = KubernetesPlace(secure.kubeconfig(tmp_path / "c", ADMIN, None, **{"insecure-skip-tls-verify": True}))
    assert careless.jobs("default") == []


def test_commands_over_tls(
    secure: ApiServer, certificate: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(secure, tmp_path)
    config = secure.kubeconfig(tmp_path / "config", ADMIN, **{"certificate-authority": certificate[0]})
    place = KubernetesPlace(config)
    place.submit(training())
    world.run(world.train("convert-bloom"))
    data = b"0123456789" * 30_000
    (tmp_path / "in").write_bytes(data)
    with (tmp_path / "in").open() as source, (tmp_path / "out").open("w") as sink, monkeypatch.context() as patch:
        patch.setattr(sys, "stdin", source)
        patch.setattr(sys, "stdout", sink)
        assert place.attach_job("convert-bloom", "default", None, None, ["cat"]) == 0
    assert (tmp_path / "out").read_bytes() == data
