import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import tritonclient.grpc as grpcclient
from tests.server.transport_fixtures import Transports, serving
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc
from tritonclient.utils import InferenceServerException

from hasten.core.errors import ConfigError
from hasten.server.listeners import open_port
from hasten.server.security import ApiKeys, Tls

KEY, OTHER = "key-one", "zweiter-schlüssel"


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    file = tmp_path / "keys"
    file.write_text(f"# for tests\n{KEY}\n\n  {OTHER}  \n", encoding="utf-8")
    return file


@pytest.mark.parametrize(
    ("authorization", "key", "admitted"),
    [
        (f"Bearer {KEY}", "", True),
        (f"bearer  {KEY} ", "", True),
        ("", KEY, True),
        ("", OTHER, True),
        (f"Bearer {KEY}x", "", False),
        (f"Bearer {KEY[:-1]}", "", False),
        ("Bearer ", "", False),
        ("Bearer", "", False),
        (f"Basic {KEY}", "", False),
        (KEY, "", False),
        ("", "", False),
        ("", "# for tests", False),
        ("Bearer \udcff", "", False),
    ],
)
def test_a_key_of_the_file_is_admitted(key_file: Path, authorization: str, key: str, admitted: bool) -> None:
    assert (ApiKeys.from_file(str(key_file)).tenant(authorization, key) is not None) is admitted


@pytest.mark.parametrize("content", ["", "\n# only words\n"])
def test_a_file_without_keys_is_an_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "keys").write_text(content)
    with pytest.raises(ConfigError, match="has no API key"):
        ApiKeys.from_file(str(tmp_path / "keys"))
    with pytest.raises(ConfigError, match="cannot read API keys from"):
        ApiKeys.from_file(str(tmp_path / "none"))


@pytest.fixture(scope="module")
def locked() -> Iterator[Transports]:
    with serving(Transports(keys=ApiKeys([KEY, OTHER]))) as site:
        yield site


BODY = {"INPUT0": 1, "INPUT1": 2}


def test_http_wants_a_key(locked: Transports) -> None:
    with httpx.Client(base_url=f"http://{locked.http}") as client:
        for headers in ({}, {"Authorization": "Bearer no"}, {"x-api-key": ""}):
            before = locked.service.begun
            answer = client.post("/v2/models/add/generate", json=BODY, headers=headers)
            assert answer.status_code == 401
            assert "a valid API key is required" in answer.json()["error"]
            assert answer.headers["www-authenticate"] == "Bearer"
            assert locked.service.begun == before
        assert client.get("/v2").status_code == 401
        assert client.get("/v2/health/ready/").status_code == 401
        refusal = client.get("/v1/models").json()["error"]
        assert (refusal["type"], refusal["param"], refusal["code"]) == (
            "invalid_request_error",
            None,
            "invalid_api_key",
        )
        for headers in ({"Authorization": f"Bearer {KEY}"}, {"x-api-key": KEY}):
            assert client.post("/v2/models/add/generate", json=BODY, headers=headers).status_code == 200
        for probe in ("live", "ready"):
            assert client.get(f"/v2/health/{probe}").status_code == 200


def test_grpc_wants_a_key(locked: Transports) -> None:
    with grpcclient.InferenceServerClient(locked.grpc) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        with pytest.raises(InferenceServerException, match="a valid API key is required") as error:
            client.get_server_metadata()
        assert error.value.status() == "StatusCode.UNAUTHENTICATED"
        for headers in ({"authorization": f"Bearer {KEY}"}, {"x-api-key": KEY}):
            assert client.get_server_metadata(headers=headers).name == "triton"


def test_every_call_but_the_probes_wants_a_key(locked: Transports) -> None:
    calls = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods_by_name
    with grpc.insecure_channel(locked.grpc) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        for name in set(calls) - {"ServerLive", "ServerReady"}:
            call = getattr(stub, name)
            with pytest.raises(grpc.RpcError) as error:
                list(call(iter(()))) if name == "ModelStreamInfer" else call(getattr(pb, f"{name}Request")())
            assert error.value.code() is grpc.StatusCode.UNAUTHENTICATED


def openssl(folder: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority, and certificates of it for a server and a client; `stranger` is of no authority."""
    folder = tmp_path_factory.mktemp("pki")
    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    authority = ("-subj", "/CN=test authority", "-addext", "keyUsage=critical,keyCertSign,cRLSign")
    openssl(folder, "req", "-x509", *curve, "-keyout", "ca.key", "-out", "ca.pem", *authority)
    for name in ("server", "client"):
        (folder / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1")
        openssl(folder, "req", *curve, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        signed = ("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial")
        openssl(folder, *signed, "-out", f"{name}.pem", "-extfile", "names")
    openssl(folder, "req", "-x509", *curve, "-keyout", "stranger.key", "-out", "stranger.pem", "-subj", "/CN=stranger")
    return folder


def tls(pki: Path, *, mutual: bool) -> Tls:
    created = Tls.create(str(pki / "server.pem"), str(pki / "server.key"), str(pki / "ca.pem") if mutual else None)
    assert created is not None
    return created


def http_get(site: Transports, pki: Path, client: str | None = None) -> int:
    context = ssl.create_default_context(cafile=str(pki / "ca.pem"))
    if client is not None:
        context.load_cert_chain(pki / f"{client}.pem", pki / f"{client}.key")
    with httpx.Client(verify=context) as session:
        return session.get(f"https://{site.http}/v2").status_code


def grpc_client(site: Transports, pki: Path, client: str | None = None) -> Any:
    files: dict[str, str] = {}
    if client is not None:
        files = {"certificate_chain": str(pki / f"{client}.pem"), "private_key": str(pki / f"{client}.key")}
    return grpcclient.InferenceServerClient(site.grpc, ssl=True, root_certificates=str(pki / "ca.pem"), **files)


def test_tls(pki: Path) -> None:
    with serving(Transports(tls=tls(pki, mutual=False))) as site:
        assert http_get(site, pki) == 200
        with grpc_client(site, pki) as client:
            assert client.get_server_metadata().name == "triton"
        with pytest.raises(httpx.TransportError):
            httpx.get(f"http://{site.http}/v2")
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            httpx.get(f"https://{site.http}/v2")
        with grpcclient.InferenceServerClient(site.grpc) as client, pytest.raises(InferenceServerException):
            client.get_server_metadata(client_timeout=5)


@pytest.mark.parametrize("who", [None, "stranger"])
def test_mutual_tls_wants_a_certificate_of_the_authority(pki: Path, who: str | None) -> None:
    with serving(Transports(tls=tls(pki, mutual=True))) as site:
        assert http_get(site, pki, "client") == 200
        with grpc_client(site, pki, "client") as client:
            assert client.get_server_metadata().name == "triton"
        with pytest.raises(httpx.TransportError):
            http_get(site, pki, who)
        with grpc_client(site, pki, who) as client, pytest.raises(InferenceServerException):
            client.get_server_metadata(client_timeout=5)


def test_tls_needs_files_that_are_there(pki: Path) -> None:
    assert Tls.create(None, None, None) is None
    for certificate, key in ((None, "x"), ("x", None), (None, None)):
        with pytest.raises(ConfigError, match="TLS needs both --tls-certificate and --tls-key"):
            Tls.create(certificate, key, "ca")
    with pytest.raises(ConfigError, match=r"cannot read .*nothing"):
        Tls.create(str(pki / "server.pem"), str(pki / "nothing"), None)


def test_files_that_do_not_fit_are_an_error(pki: Path) -> None:
    locked = pki / "locked.key"
    openssl(pki, "pkey", "-in", "server.key", "-aes256", "-passout", "pass:x", "-out", "locked.key")
    server, key = str(pki / "server.pem"), str(pki / "server.key")
    for files in ((server, str(pki / "client.key"), None), (server, str(locked), None), (server, key, key)):
        with pytest.raises(ConfigError, match="TLS certificate, key or authority cannot be used"):
            Tls.create(*files)


@pytest.mark.parametrize(
    ("address", "port", "message"),
    [
        ("127.0.0.1", 0, "in use"),
        ("203.0.113.1", 0, "Cannot assign"),
        ("no such host", 0, "cannot listen on no such host:"),
        ("::ffff:203.0.113.1", 0, r"cannot listen on \[::ffff:203.0.113.1\]:"),
    ],
)
def test_a_port_that_cannot_be_had_is_an_error(address: str, port: int, message: str) -> None:
    with open_port("127.0.0.1", 0, "--x") as taken:
        number = taken.getsockname()[1] if message == "in use" else port
        with pytest.raises(ConfigError, match=message) as error:
            open_port(address, number, "--http-port")
    assert "(--http-port)" in str(error.value)
