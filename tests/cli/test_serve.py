import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.grpc as grpcclient
from tests.waiting import LIMIT_S, eventually
from tritonclient.utils import InferenceServerException

from hasten.cli.main import build_parser, main
from hasten.cli.serve import serve_options
from hasten.core.errors import ConfigError
from hasten.core.ports import free_port
from hasten.core.types import SamplingParams
from hasten.engine.llm import LLM
from hasten.server.listeners import open_port

DEMO = Path(__file__).parents[2] / "examples" / "demo-model"
LOCAL = [
    *("--http-address", "127.0.0.1", "--grpc-address", "127.0.0.1"),
    *("--http-port", "0", "--grpc-port", "0", "--metrics-port", "0"),
]


class Server:
    """`hasten serve` in a process of its own, with its log in a file."""

    def __init__(self, log: Path, *arguments: str) -> None:
        self.log = log
        with log.open("w") as stream:
            command = [sys.executable, "-m", "hasten", "serve", *LOCAL, *arguments]
            self._mark = f"HASTEN_TEST_SERVER={log}".encode()
            environment = {**os.environ, "HASTEN_TEST_SERVER": str(log)}
            self.process = subprocess.Popen(command, stderr=stream, stdout=stream, env=environment)

    @property
    def text(self) -> str:
        return self.log.read_text()

    def wait_for(self, words: str) -> str:
        """What the log says, once it says these words."""
        eventually(lambda: words in self.text or self.process.poll() is not None, lambda: self.text)
        assert words in self.text, self.text
        return self.text

    def address(self, service: str) -> str:
        found = re.search(rf"Started {service} at (127\.0\.0\.1:\d+)", self.wait_for("Started Metrics Service"))
        assert found is not None
        return found[1]

    @property
    def http(self) -> str:
        return f"http://{self.address('HTTPService')}"

    def end(self) -> int:
        return self.process.wait(LIMIT_S)

    def children(self) -> list[int]:
        """Processes that it started, itself left out, also when it is gone."""
        numbers = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()]
        return [
            number for number in numbers if number != self.process.pid and self._mark in strings_of(number, "environ")
        ]


def strings_of(process: int, file: str) -> list[bytes]:
    """The strings of a file of /proc, none of a process that is gone."""
    try:
        return Path(f"/proc/{process}/{file}").read_bytes().split(b"\0")
    except OSError:
        return []


Start = Callable[..., Server]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    servers: list[Server] = []

    def made(*arguments: str) -> Server:
        servers.append(Server(tmp_path / f"log{len(servers)}", *arguments))
        return servers[-1]

    yield made
    for server in servers:
        kill(server)


def kill(server: Server) -> None:
    for process in (server.process.pid, *server.children()):
        try:
            os.kill(process, signal.SIGKILL)
        except ProcessLookupError:
            continue
    server.process.wait(LIMIT_S)


def listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def wait_until_gone(server: Server) -> None:
    """Wait until nothing of it is left."""
    eventually(lambda: not server.children())


@contextmanager
def stopped(processes: Sequence[int]) -> Iterator[None]:
    """Processes stand still: what they have not done yet, they do not do."""
    for process in processes:
        os.kill(process, signal.SIGSTOP)
    try:
        yield
    finally:
        for process in processes:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGCONT)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of the demo model with limits, for tests that do not end it."""
    folder = tmp_path_factory.mktemp("served")
    limits = ["--max-prompt-tokens", "20", "--max-batch", "2", "--max-queue-size", "1", "--max-num-seqs", "1"]
    server = Server(folder / "log", str(DEMO), *limits)
    yield server
    kill(server)


def test_the_log_says_what_is_served(served: Server) -> None:
    text = served.wait_for("ready: page at")
    assert re.search(r"^\| fastertransformer +\| 1 +\| READY +\|$", text, re.MULTILINE)
    assert re.search(r"^\| demo-model +\| 1 +\| READY +\|$", text, re.MULTILINE)
    assert re.search(r"^\| fastertransformer +\| 1 +\| cpu +\| 1 +\| fp32 ", text, re.MULTILINE)
    assert "max_prompt_tokens" not in text, "all options are for verbose logs"
    port = served.address("HTTPService").rpartition(":")[2]
    assert f"ready: page at http://localhost:{port}/, OpenAI's API at http://localhost:{port}/v1" in text
    assert text.index(f"loading {DEMO} ...") < text.index("| fastertransformer ")
    endpoints = re.findall(r'"Started (.*) at 127\.0\.0\.1:(\d+)"', text)
    assert [name for name, _ in endpoints] == ["GRPCInferenceService", "HTTPService", "Metrics Service"]
    assert "Traceback" not in text


def token_inputs(prompts: Sequence[Sequence[int]], wanted: int) -> list[grpcclient.InferInput]:
    arrays = {
        "input_ids": np.array(prompts, np.uint32),
        "input_lengths": np.array([[len(prompt)] for prompt in prompts], np.uint32),
        "request_output_len": np.array([[wanted]] * len(prompts), np.uint32),
    }
    inputs = [grpcclient.InferInput(name, array.shape, "UINT32") for name, array in arrays.items()]
    for tensor, array in zip(inputs, arrays.values(), strict=True):
        tensor.set_data_from_numpy(array)
    return inputs


def test_the_articles_call_is_answered(served: Server) -> None:
    with grpcclient.InferenceServerClient(served.address("GRPCInferenceService")) as client:
        result = client.infer("fastertransformer", token_inputs([[5, 6, 7, 8]], 32))
        ids = result.as_numpy("output_ids")
        assert ids.shape == (1, 1, 36)
        assert ids[0, 0, :4].tolist() == [5, 6, 7, 8]


def test_all_doors_lead_to_the_same_engine(served: Server) -> None:
    with httpx.Client(base_url=served.http, timeout=LIMIT_S) as client:
        generated = client.post("/v2/models/demo-model/generate", json={"text_input": "Anna", "max_tokens": 6}).json()
        body = {"model": "demo-model", "prompt": "Anna", "max_tokens": 6, "temperature": 0}
        model = client.get("/v1/models").json()["data"][0]["id"]
        completed = client.post("/v1/completions", json=body | {"model": model}).json()
        assert generated["text_output"].removeprefix("Anna") == completed["choices"][0]["text"]
        assert client.get("/").text.startswith("<!doctype html>")
    metrics = httpx.get(f"http://{served.address('Metrics Service')}/metrics", timeout=LIMIT_S).text
    assert re.search(r'^hasten_generation_tokens_total\{model="fastertransformer",version="1"\} [1-9]', metrics, re.M)
    assert 'nv_inference_request_success{model="demo-model",version="1"} 1\n' in metrics


def test_prompts_and_batches_have_limits(served: Server) -> None:
    with grpcclient.InferenceServerClient(served.address("GRPCInferenceService")) as client:
        with pytest.raises(InferenceServerException, match="the prompt has 21 tokens, the limit is 20") as error:
            client.infer("fastertransformer", token_inputs([[5] * 21], 4))
        assert error.value.status() == "StatusCode.INVALID_ARGUMENT"
        with pytest.raises(InferenceServerException, match="batch-size must be <= 2 for 'fastertransformer'"):
            client.infer("fastertransformer", token_inputs([[5]] * 3, 4))
    with httpx.Client(base_url=served.http, timeout=LIMIT_S) as client:
        answer = client.post("/v2/models/demo-model/generate", json={"text_input": "the " * 40, "max_tokens": 4})
        assert answer.status_code == 400
        assert "the limit is 20" in answer.json()["error"]


def test_a_full_queue_refuses(served: Server) -> None:
    statuses: list[int] = []

    def ask() -> None:
        body = {"text_input": "Anna", "max_tokens": 30, "min_length": 30}
        statuses.append(
            httpx.post(f"{served.http}/v2/models/demo-model/generate", json=body, timeout=LIMIT_S).status_code
        )

    served.wait_for("Started Metrics Service")
    threads = [threading.Thread(target=ask) for _ in range(6)]
    with stopped(served.children()):
        for thread in threads:
            thread.start()
        eventually(lambda: 503 in statuses)
    for thread in threads:
        thread.join()
    assert set(statuses) == {200, 503}


def long_stream(tokens: int) -> dict[str, Any]:
    return {"text_input": "Anna", "max_tokens": tokens, "min_length": tokens, "stream": True}


def test_work_in_flight_is_finished_before_the_end(start: Start) -> None:
    server = start(str(DEMO), "--exit-timeout-secs", "100")  # a busy machine takes more than the default for the stream
    path = f"{server.http}/v2/models/demo-model/generate"
    engines = server.children()
    with httpx.stream("POST", f"{path}_stream", json=long_stream(1000), timeout=LIMIT_S) as stream:
        lines = stream.iter_lines()
        next(lines)
        with stopped(engines):
            server.process.send_signal(signal.SIGTERM)
            server.wait_for("SIGTERM received")
            refused = httpx.post(path, json={"text_input": "Ben", "max_tokens": 2}, timeout=LIMIT_S)
            assert refused.status_code == 503
            body = {"model": "demo-model", "prompt": "Ben", "max_tokens": 2}
            assert httpx.post(f"{server.http}/v1/completions", json=body, timeout=LIMIT_S).status_code == 503
            assert httpx.get(f"{server.http}/v2/health/ready", timeout=LIMIT_S).status_code == 400
            assert httpx.get(f"{server.http}/v2/health/live", timeout=LIMIT_S).status_code == 200
        events = [json.loads(line[6:]) for line in lines if line]
    assert not any("error" in event for event in events)
    assert len("".join(event["text_output"] for event in events)) > 100
    assert server.end() == 0
    assert engines
    wait_until_gone(server)
    assert "Traceback" not in server.text


def test_the_exit_timeout_ends_what_takes_longer(start: Start) -> None:
    server = start(str(DEMO), "--exit-timeout-secs", "0.5")
    with httpx.stream(
        "POST", f"{server.http}/v2/models/demo-model/generate_stream", json=long_stream(1900), timeout=LIMIT_S
    ) as stream:
        lines = stream.iter_lines()
        next(lines)
        with stopped(server.children()):  # else a fast engine might be done in time
            server.process.send_signal(signal.SIGINT)
            rest = [json.loads(line[6:]) for line in lines if line]
    assert "error" in rest[-1]
    assert server.end() == 0
    wait_until_gone(server)


def runs_an_engine(pid: int) -> bool:
    return b"hasten.server.engine.process" in strings_of(pid, "cmdline")


def test_a_signal_while_models_load_ends_the_server(start: Start) -> None:
    port = free_port()
    server = start(str(DEMO), "--http-port", str(port))
    eventually(lambda: listens(port))
    # a child that is stopped before it runs its own program keeps the server in the call that starts it
    eventually(lambda: any(map(runs_an_engine, server.children())))
    with stopped(server.children()), httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=LIMIT_S) as client:
        assert client.get("/v2/health/live").status_code == 200
        assert client.get("/v2/health/ready").status_code == 400
        server.process.send_signal(signal.SIGTERM)
    assert server.end() == 0
    assert "Started" not in server.text
    wait_until_gone(server)


def test_a_port_in_use_is_an_error_before_anything_is_loaded(start: Start) -> None:
    with open_port("127.0.0.1", 0, "--x") as taken:
        server = start(str(DEMO), "--grpc-port", str(taken.getsockname()[1]))
        assert server.end() == 2
    assert re.search(
        r"hasten: error: cannot listen on 127.0.0.1:\d+ \(--grpc-port\): Address already in use", server.text
    )
    assert "Traceback" not in server.text
    assert server.children() == []


def test_a_checkpoint_that_is_none_is_an_error(start: Start, tmp_path: Path) -> None:
    server = start(str(tmp_path / "nothing"))
    assert server.end() == 2
    assert server.text == (
        f"hasten: error: there is no folder {tmp_path / 'nothing'}; give the folder of a checkpoint, or a "
        "Hugging Face id such as bigscience/bloom-560m\n"
    )
    (tmp_path / "config.json").write_text("{}")
    server = start(str(tmp_path))
    assert server.end() == 2
    last = server.text.splitlines()[-1]
    assert last.startswith(f"hasten: error: cannot load {tmp_path}: ")
    assert 'has neither "architectures" nor "model_type"' in last
    assert "fastertransformer" not in last
    assert "Traceback" not in server.text
    wait_until_gone(server)


def test_a_repository_is_controlled_and_a_second_signal_ends_the_server_at_once(start: Start, tmp_path: Path) -> None:
    models = tmp_path / "models"
    assert main(["repository", "create", str(DEMO), str(models)]) == 0
    shutil.rmtree(models / "ensemble")
    server = start("--model-repository", str(models), "--model-control-mode=explicit", "--exit-timeout-secs=3600")
    with httpx.Client(base_url=server.http, timeout=LIMIT_S) as client:
        assert client.get("/v2/health/ready").status_code == 200
        names = {entry["name"] for entry in client.post("/v2/repository/index").json()}
        assert names == {"fastertransformer", "demo-model", "preprocessing", "postprocessing"}
        assert server.children() == []
        assert client.post("/v2/repository/models/demo-model/load").status_code == 200
        body = {"text_input": "a", "max_tokens": 2}
        assert client.post("/v2/models/demo-model/generate", json=body).status_code == 200
        assert len(server.children()) > 0
        unload = {"parameters": {"unload_dependents": True}}
        assert client.post("/v2/repository/models/demo-model/unload", json=unload).status_code == 200
        wait_until_gone(server)
        assert client.post("/v2/repository/models/demo-model/load").status_code == 200
        with client.stream("POST", "/v2/models/demo-model/generate_stream", json=long_stream(1900)) as stream:
            next(stream.iter_lines())
            with stopped(server.children()):  # the stream stays under way
                end_at_once(server)


def end_at_once(server: Server) -> None:
    """What is under way may take an hour after a first signal, and is given up at the second."""
    server.process.send_signal(signal.SIGTERM)
    server.wait_for("SIGTERM received: no new requests, those under way have 3600 seconds")
    server.process.send_signal(signal.SIGTERM)
    assert server.end() == 1
    wait_until_gone(server)
    assert "Traceback" not in server.text


def parsed(*arguments: str) -> Any:
    return serve_options(build_parser().parse_args(["serve", *arguments]))


def test_options_are_those_of_tritonserver() -> None:
    output = parsed(
        *("--model-repository=/models", "--model-store", "/more", "--model-control-mode=explicit"),
        *("--load-model=a", "--load-model", "b", "--http-port", "9000", "--grpc-port=9001", "--metrics-port=9002"),
        *("--http-address=1.2.3.4", "--allow-metrics=false", "--allow-grpc", "--exit-timeout-secs=5"),
        *("--strict-readiness=0", "--log-verbose=1", "--log-info=true", "--log-format=ISO8601", "--log-file=x"),
        *("--repository-poll-secs=3", "--exit-on-error=false", "--id=me", "--disable-auto-complete-config"),
        *("--grpc-keepalive-time=5000",),
    )
    assert output.model_repository == ("/models", "/more")
    assert output.repository.load_model == ("a", "b")
    assert (output.endpoints.http_port, output.endpoints.grpc_port, output.endpoints.metrics_port) == (9000, 9001, 9002)
    assert (output.endpoints.allow_metrics, output.endpoints.allow_grpc) == (False, True)
    assert output.endpoints.http_address == "1.2.3.4"
    assert ("grpc.keepalive_time_ms", 5000) in output.endpoints.grpc_channel(output.security)
    assert (output.server.exit_timeout_secs, output.server.strict_readiness, output.server.exit_on_error) == (
        5,
        False,
        False,
    )
    assert (output.server.server_id, output.repository.disable_auto_complete_config) == ("me", True)
    assert (output.log.log_verbose, output.log.log_info, output.log.log_format, output.log.log_file) == (
        1,
        True,
        "ISO8601",
        "x",
    )


def test_a_models_options_are_the_engines_and_its_own() -> None:
    output = parsed("m", "--max-num-seqs", "8", "--data-type", "fp16", "--name", "n", "--decoupled", "--max-batch", "4")
    assert output.engine.scheduler.max_num_seqs == 8
    assert output.engine.dtype == "fp16"
    assert (output.model.name, output.model.decoupled, output.model.max_batch) == ("n", True, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either a MODEL or --model-repository"),
        (["m", "--model-repository", "r"], "give either a MODEL or --model-repository"),
        (["m", "--load-model", "x"], "--load-model is an option of --model-repository"),
        (["--model-repository", "r", "--max-num-seqs", "3"], "--max-num-seqs is an option of one MODEL"),
        (["--model-repository", "r", "--max-batch", "3"], "--max-batch is an option of one MODEL"),
        (["m", "--allow-http", "perhaps"], "'perhaps' is neither true nor false"),
        (["m", "--http-thread-count", "8"], "unrecognized arguments: --http-thread-count"),
        (["m", "--log-format", "xml"], "invalid choice: 'xml'"),
        (["m", "--http-port", "99999"], "--http-port must be from 0 to 65535"),
    ],
)
def test_wrong_options_are_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parsed(*arguments)


def test_the_command_line_imports_nothing_heavy() -> None:
    heavy = ("torch", "grpc", "starlette", "numpy")
    code = "import sys; from hasten.cli.main import build_parser; build_parser();"
    code += f"print([name for name in {heavy} if name in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown == "[]\n"


def test_the_servers_process_has_no_torch() -> None:
    code = "import sys, hasten.server.app; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown == "[]\n"


@pytest.mark.any_python
def test_ranks_that_torchrun_started_serve_together(tmp_path: Path) -> None:
    """Rank 0 answers, the other computes with it, and both end with the work that was under way done."""
    log = tmp_path / "log"
    torchrun = str(Path(sys.executable).with_name("torchrun"))
    with log.open("w") as stream:
        command = [torchrun, "--nproc-per-node", "2", "--no-python", sys.executable, "-m", "hasten", "serve"]
        process = subprocess.Popen([*command, *LOCAL, str(DEMO)], stdout=stream, stderr=stream, start_new_session=True)
    try:
        eventually(lambda: "Started Metrics Service" in log.read_text() or process.poll() is not None, log.read_text)
        assert process.poll() is None, log.read_text()
        found = re.search(r"Started HTTPService at (127\.0\.0\.1:\d+)", log.read_text())
        assert found is not None
        request = {"text_input": "Anna looked", "max_tokens": 5, "temperature": 0}
        answer = httpx.post(f"http://{found[1]}/v2/models/demo-model/generate", json=request, timeout=LIMIT_S)
        assert answer.status_code == 200, answer.text
        with LLM(str(DEMO)) as llm:
            alone = llm.generate(["Anna looked"], SamplingParams(temperature=0, max_tokens=5))[0].outputs[0].text
        assert answer.json()["text_output"].endswith(alone)
        table = next(line for line in log.read_text().splitlines() if "| cpu" in line)
        assert "| 2 " in table
        process.terminate()
        process.wait(LIMIT_S)
        assert "SIGTERM received: no new requests" in log.read_text()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.any_python
def test_the_ranks_of_two_hosts_start_again_together(start: Start) -> None:
    meet = ["--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", str(free_port()), "--node-rank"]
    first, second = (start(str(DEMO), "--tensor-para-size", "2", *meet, str(rank)) for rank in range(2))
    request = {"text_input": "Anna looked", "max_tokens": 5, "temperature": 0}

    def answer() -> Any:
        reply = httpx.post(f"{first.http}/v2/models/demo-model/generate", json=request, timeout=LIMIT_S)
        assert reply.status_code == 200, reply.text
        return reply.json()["text_output"]

    before = answer()
    (rank,) = second.children()
    os.kill(rank, signal.SIGKILL)
    assert f"rank 1 of 2 on {socket.gethostname()}" in first.wait_for("ready again")
    assert f"(process {rank}) died: killed by SIGKILL; waiting for rank 0 to start again" in second.text
    assert answer() == before
    first.process.terminate()
    assert (first.end(), second.end()) == (0, 0)


def test_ranks_must_know_which_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["repository", "create", str(DEMO), str(tmp_path)]) == 0
    for variable, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(variable, value)
    explicit = ["--model-control-mode", "explicit", "--load-model", "preprocessing"]
    args = build_parser().parse_args(["serve", "--model-repository", str(tmp_path), *explicit])
    with pytest.raises(ConfigError, match="has 0 token models"):
        args.run(args)
