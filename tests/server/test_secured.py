"""`hasten serve` with TLS, certificates of clients and API keys at once, as stock clients meet it."""

import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import tritonclient.grpc as grpcclient
import tritonclient.http as httpclient
from tests.server.serve_process import serve_process
from tests.server.test_security import KEY, pki
from tritonclient.utils import InferenceServerException

__all__ = ["pki"]  # a fixture

DEMO = Path(__file__).parents[2] / "examples" / "demo-model"
HEADERS = {"authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def places(pki: Path) -> Iterator[dict[str, str]]:
    """HOST:PORT by the service's name."""
    (pki / "keys").write_text(f"{KEY}\n")
    files = {"tls-certificate": "server.pem", "tls-key": "server.key", "tls-client-ca": "ca.pem"}
    security = [f"--{option}={pki / name}" for option, name in (files | {"api-key-file": "keys"}).items()]
    with serve_process(pki / "log", str(DEMO), *security) as found:
        yield found


def context(pki: Path, *, shows_certificate: bool = True) -> ssl.SSLContext:
    output = ssl.create_default_context(cafile=str(pki / "ca.pem"))
    if shows_certificate:
        output.load_cert_chain(pki / "client.pem", pki / "client.key")
    return output


def inputs(module: Any) -> list[Any]:
    values = {"input_ids": [[5, 6, 7]], "input_lengths": [[3]], "request_output_len": [[4]]}
    output = [module.InferInput(name, [len(value), len(value[0])], "UINT32") for name, value in values.items()]
    for each, value in zip(output, values.values(), strict=True):
        each.set_data_from_numpy(np.array(value, np.uint32))
    return output


def test_grpc(places: dict[str, str], pki: Path) -> None:
    files = {"root_certificates": str(pki / "ca.pem")}
    own = {"private_key": str(pki / "client.key"), "certificate_chain": str(pki / "client.pem")}
    with grpcclient.InferenceServerClient(places["GRPCInferenceService"], ssl=True, **files, **own) as client:
        result = client.infer("fastertransformer", inputs(grpcclient), headers=HEADERS)
        assert result.as_numpy("output_ids").shape == (1, 1, 7)
        with pytest.raises(InferenceServerException, match="a valid API key is required"):
            client.infer("fastertransformer", inputs(grpcclient))
    stranger = grpcclient.InferenceServerClient(places["GRPCInferenceService"], ssl=True, **files)
    with stranger, pytest.raises(InferenceServerException):
        stranger.get_server_metadata(headers=HEADERS, client_timeout=5)


def test_http(places: dict[str, str], pki: Path) -> None:
    fields = {"ssl": True, "ssl_context_factory": lambda: context(pki)}
    with httpclient.InferenceServerClient(places["HTTPService"], **fields) as client:
        result = client.infer("fastertransformer", inputs(httpclient), headers=dict(HEADERS))  # it adds its own
        assert result.as_numpy("output_ids").shape == (1, 1, 7)
        with pytest.raises(InferenceServerException, match="a valid API key is required") as refused:
            client.infer("fastertransformer", inputs(httpclient))
        assert refused.value.status() == "401"
    with httpx.Client(verify=context(pki, shows_certificate=False)) as stranger, pytest.raises(httpx.TransportError):
        stranger.get(f"https://{places['HTTPService']}/v2", headers=HEADERS)


def test_openai(places: dict[str, str], pki: Path) -> None:
    base = f"https://{places['HTTPService']}/v1"
    with openai.DefaultHttpxClient(verify=context(pki)) as session:
        client = openai.OpenAI(base_url=base, api_key=KEY, http_client=session, max_retries=0)
        created = client.completions.create(model="demo-model", prompt=[5, 6, 7], max_tokens=4)
        assert created.usage is not None
        assert created.usage.completion_tokens == 4
        with pytest.raises(openai.AuthenticationError, match="a valid API key is required") as refused:
            client.with_options(api_key="other").models.list()
        assert refused.value.code == "invalid_api_key"
    with openai.DefaultHttpxClient(verify=context(pki, shows_certificate=False)) as stranger:
        client = openai.OpenAI(base_url=base, api_key=KEY, http_client=stranger, max_retries=0)
        with pytest.raises(openai.APIConnectionError):
            client.models.list()


def test_metrics_stay_open(places: dict[str, str]) -> None:
    answer = httpx.get(f"http://{places['Metrics']}/metrics")
    assert answer.status_code == 200
    assert "nv_inference_request_success" in answer.text
