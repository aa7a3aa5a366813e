import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.bench.report_form import form_errors
from tests.waiting import eventually

from hasten.bench import served as bench_served
from hasten.bench import serving
from hasten.bench.report import Spread
from hasten.bench.served import (
    HOST,
    Served,
    channel_options,
    environment_without_proxy,
    served,
    wait_until_ready,
)
from hasten.bench.serving import Load, Turns
from hasten.cli.main import main
from hasten.core.config import EngineConfig
from hasten.core.errors import EngineError
from hasten.core.ports import free_port
from hasten.engine.llm import LLM

DEMO = Path(__file__).parents[2] / "examples" / "demo-model"
# of an odd number of values the median is one of them, and the ratio of medians exactly the median's ratio
LOAD = Load(concurrency=3, prompt_length=5, output_length=4, requests=3, rounds=3)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(EngineConfig.create(str(DEMO)), tmp_path_factory.mktemp("server") / "log") as server:
        yield server


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(str(DEMO)) as llm:
        yield llm


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The environment of a machine behind a proxy, which takes connections and never answers."""
    with socket.create_server((HOST, 0)) as listener:
        address = f"http://{HOST}:{listener.getsockname()[1]}"
        for name in ("http_proxy", "https_proxy", "grpc_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
            monkeypatch.setenv(name, address)
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        yield


@pytest.mark.usefixtures("proxy")
def test_a_proxy_does_not_come_between(llm: LLM, tmp_path: Path) -> None:
    with served(EngineConfig.create(str(DEMO)), tmp_path / "log") as server:
        assert len(serving.measure(llm, server, LOAD)) == 3
    assert environment_without_proxy()["no_proxy"] == "127.0.0.1,localhost,::1"


def test_proxies_of_other_hosts_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ("grpc.enable_http_proxy", 0) in channel_options("127.0.0.1:80")
    assert ("grpc.enable_http_proxy", 0) in channel_options("[::1]:80")
    assert ("grpc.enable_http_proxy", 0) not in channel_options("gpu-host:80")
    monkeypatch.setenv("no_proxy", "intranet")
    monkeypatch.setenv("no_grpc_proxy", "other")
    environment = environment_without_proxy()
    assert environment["no_proxy"] == "intranet,127.0.0.1,localhost,::1"
    assert environment["no_grpc_proxy"] == "other,127.0.0.1,localhost,::1"


def test_a_server_that_never_answers_is_waited_for_no_longer_than_the_limit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(bench_served, "_START_S", 0.2)
    monkeypatch.setattr(bench_served, "_ANSWER_S", 0.1)
    with socket.create_server((HOST, 0)) as silent:
        address = f"{HOST}:{silent.getsockname()[1]}"
        for log, words in ((None, "nothing"), ("loading\nstill loading\n", "still loading")):
            if log is not None:
                (tmp_path / "log").write_text(log)
            late = rf"the server at {address} was not ready within .*; its log says: {words}$"
            with pytest.raises(EngineError, match=late):
                wait_until_ready(address, lambda: True, tmp_path / "log")


def test_engine_and_servers_take_turns(llm: LLM, server: Served) -> None:
    single, at_once, streams = serving.measure(llm, server, LOAD, server.address)
    assert (single.name, single.unit, list(single.values)) == ("one request", "ms", ["engine", "hasten, gRPC"])
    assert list(at_once.ratios) == ["hasten, gRPC", "peer, gRPC"]
    assert (streams.name, list(streams.ratios)) == (
        "3 streams at once",
        ["hasten, gRPC", "hasten, OpenAI's API"],
    )
    for each in (single, at_once, streams):
        for caller, ratio in each.ratios.items():
            assert ratio == pytest.approx(each.values[caller].p50 / each.values["engine"].p50)
    assert server.start_s > 0


def test_other_tokens_are_an_error() -> None:
    with pytest.raises(EngineError, match="one: b gives other tokens than the engine"):
        serving._in_turns("one", "ms", {"a": lambda: [[1]], "b": lambda: [[2]]}, 1, lambda seconds: seconds)


def test_a_peer_that_is_not_there(llm: LLM, server: Served) -> None:
    port = free_port(HOST)
    with pytest.raises(EngineError, match=r"3 requests at once: peer, gRPC: .*UNAVAILABLE"):
        serving.measure(llm, server, LOAD, f"127.0.0.1:{port}")


def test_a_server_that_does_not_get_ready(tmp_path: Path) -> None:
    server = served(EngineConfig.create(str(tmp_path)), tmp_path / "log")
    with pytest.raises(EngineError, match=r"ended before it was ready; its log says: .*config\.json"), server:
        pass


def listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex((HOST, port)) == 0


def test_a_server_ends_with_who_measures_it(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from hasten.bench.served import served\n"
        "from hasten.core.config import EngineConfig\n"
        "if __name__ == '__main__':\n"
        "    with served(EngineConfig.create(sys.argv[1]), Path(sys.argv[2])) as server:\n"
        "        print(server.http_port, flush=True)\n"
        "        time.sleep(600)\n"
    )
    script = tmp_path / "measure.py"
    script.write_text(program)
    command = [sys.executable, str(script), str(DEMO), str(tmp_path / "log")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as measure:
        assert measure.stdout is not None
        port = int(measure.stdout.readline())
        assert listens(port)
        measure.kill()
    eventually(lambda: not listens(port))


def test_the_servers_process_needs_no_torch() -> None:
    code = "import sys, hasten.bench.served; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown == "[]\n"


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "plot.svg"
    sizes = ["--concurrency", "2", "--prompt-length", "3", "--output-length", "2", "--requests", "1", "--rounds", "1"]
    assert main(["bench", "serving", str(DEMO), *sizes, "--json", "--plot", str(plot)]) == 0
    assert "2 streams at once, tokens/s</text>" in plot.read_text()
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert form_errors(found) == []
    assert found["start_s"] > 0
    assert [each["name"] for each in found["results"]] == ["one request", "2 requests at once", "2 streams at once"]


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    spread = Spread(1.0, 2.0, 3.0)
    turns = Turns("one request", "ms", {"engine": spread, "hasten, gRPC": spread}, {"hasten, gRPC": 1.25})
    serving.show("title", 3.21, [turns])
    out = capsys.readouterr().out
    assert "3.21 s" in out
    assert "1.25 x" in out
