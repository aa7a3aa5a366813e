"""What is known to have broken model servers, one test for each row of the list in docs/operations.md.

Each is sent over every transport that it concerns, to a server that must refuse it and go on serving.
"""

import ast
import asyncio
import contextlib
import hmac
import json
import os
import re
import socket
import struct
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from safetensors.numpy import save_file
from tests.security.site import (
    GENERATION_PATHS,
    KEY,
    OTHER_KEY,
    TEXT,
    TEXT_PATHS,
    TOKENS,
    TRANSPORTS,
    TRITONS,
    VECTORS,
    VOCABULARY,
    Answer,
    Site,
    answered,
    check_clean,
    site,
    tensor,
    text_message,
)
from tests.server.running import running_with_routes
from tests.server.transport_fixtures import Transports
from tests.server.transport_fixtures import serving as serving_transports
from tests.waiting import LIMIT_S, eventually
from tritonclient.grpc import service_pb2 as pb

import hasten
from hasten.core.errors import CheckpointError, ConfigError, HastenError
from hasten.core.kernel_cache import check_kernel_cache
from hasten.engine.chat import ChatTemplate, RenderLimits
from hasten.server import app
from hasten.server.options import EndpointOptions, SecurityOptions, ServeOptions
from hasten.server.protocol.shared_memory import FOLDER, SharedMemory
from hasten.server.security import ApiKeys
from hasten.server.tools.forms import HERMES, LLAMA, MISTRAL, QWEN_CODER, ToolForm
from hasten.server.tools.harmony import HarmonyReader
from hasten.server.tools.parser import ToolParser
from hasten.server.tools.reader import AnswerReader, TextReader
from hasten.server.tools.reasoning import ReasoningReader, Stage, reasoning_form
from hasten.server.tools.xml_parser import XmlToolParser
from hasten.server.types import ServiceError

SOURCE = Path(hasten.__file__).parent
LIST = Path(__file__).parents[2] / "docs" / "operations.md"
MIB = 1 << 20
GROWTH_MIB = 400
"""Less than what the attacks would leave if anything of them was kept."""


def about(*rows: str) -> pytest.MarkDecorator:
    """The advisories that a test is about."""
    return pytest.mark.parametrize("row", ["+".join(rows)], indirect=True)


@pytest.fixture(autouse=True)
def row(request: pytest.FixtureRequest) -> str:
    """Of a test: the advisories that it is about."""
    return str(getattr(request, "param", ""))


@pytest.fixture(scope="module")
def served() -> Iterator[Site]:
    with site() as result:
        yield result
        result.serves()
        asyncio.run(result.server.idle_after())


def refused(answer: Answer, *texts: str) -> None:
    assert answer.is_refusal, answer
    assert all(text in answer.text for text in texts), answer


# Objects that run code when they are read


@about("CVE-2024-50050", "CVE-2025-10164", "CVE-2026-26220", "CVE-2026-3059", "CVE-2026-3060", "CVE-2026-3989")
def test_nothing_is_unpickled() -> None:
    """Weights in .bin files are read with `weights_only`; what comes over sockets is msgpack, JSON or numbers."""
    unsafe = re.compile(
        r"\b(pickle|marshal|shelve|dill|cloudpickle|joblib)\.(loads?|Unpickler)\b|^(eval|exec)$|yaml\.(unsafe_)?load$"
        r"|(broadcast|gather|scatter|send|recv)_object|recv_pyobj"
    )
    for file in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            if name == "torch.load":
                assert any(word.arg == "weights_only" and ast.unparse(word.value) == "True" for word in node.keywords)
            assert not unsafe.search(name), f"{file}:{node.lineno} calls {name}"
            # what multiprocessing receives without a size is pickled; a pipe leads to an own child alone
            unpickles = name.endswith(".recv") and not node.args and not name.endswith("pipe.recv")
            assert not unpickles, f"{file}:{node.lineno} calls {name}"


@about("CVE-2024-50050", "CVE-2026-3059", "CVE-2026-3060", "CVE-2026-3989", "CVE-2026-26220")
@pytest.mark.usefixtures("forked_ranks")
def test_ranks_of_one_host_listen_where_it_alone_reaches_them(tiny_bloom: Path) -> None:
    from hasten.engine.llm import LLM

    before = _listening()
    with LLM(tiny_bloom, device="cpu", tensor_parallel_size=2):
        opened = _listening() - before
        assert opened
        assert {address.rpartition(":")[0] for address in opened} == {"0100007F"}


def _sockets(process: str) -> Iterator[str]:
    """Inodes of the sockets of a process, which may end at any time, and close what it has open."""
    with contextlib.suppress(OSError):
        for file in Path(f"/proc/{process}/fd").iterdir():
            with contextlib.suppress(OSError):
                yield file.readlink().name.removeprefix("socket:[").removesuffix("]")


def _listening() -> set[str]:
    """Addresses, as the kernel writes them, that this process and those that it started listen at."""
    own = os.getpid()
    processes = [str(own), *Path(f"/proc/{own}/task/{own}/children").read_text().split()]
    inodes = {inode for process in processes for inode in _sockets(process)}
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return {row[1] for row in rows if row[3] == "0A" and row[9] in inodes}


@about("CVE-2025-10164")
@pytest.mark.parametrize(
    "path", ["/update_weights_from_tensor", "/update_weights_from_disk", "/collective_rpc", "/v1/x"]
)
def test_no_route_takes_objects(served: Site, path: str) -> None:
    assert served.post(path, b"\x80\x04\x95").status == 404


@about("CVE-2026-26220")
def test_no_websocket_is_opened(served: Site) -> None:
    headers = {
        "connection": "Upgrade",
        "upgrade": "websocket",
        "sec-websocket-version": "13",
        "sec-websocket-key": "eA==",
    }
    for path in ("/", "/v1/completions", "/pd_register"):
        assert served.ask("GET", path, headers=headers).status in (200, 404, 405)


# Templates and code of checkpoints


@about("CVE-2026-5760")
@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch FILE') }}",
        "{{ (lipsum|attr('__globals__'))['os'].popen('touch FILE').read() }}",
        "{{ messages.append({}) }}",
        "{{ messages.__init__.__globals__ }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ self._TemplateReference__context }}",
        "{{ raise_exception.__globals__ }}",
        "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
        "{{ ('%s' | format(messages)).__class__ }}",
        "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
        "{{ 'a' * 10**10 }}",
    ],
)
def test_a_chat_template_reaches_nothing(tmp_path: Path, source: str) -> None:
    marker = tmp_path / "touched"
    result = source.replace("FILE", str(marker))
    try:
        text = ChatTemplate(result, {}).render([{"role": "user", "content": "x"}], limits=RenderLimits(1000, 0.2))
    except HastenError as error:
        text = str(error)
        assert "\n" not in text
    assert not marker.exists()
    assert not any(word in text for word in ("root:", "<class", "posix", "builtins", "subprocess"))


@about("CVE-2026-22807")
def test_code_beside_a_checkpoint_is_never_imported(tmp_path: Path, tiny_bloom: Path) -> None:
    import shutil

    from hasten.cli.main import main

    folder, marker = tmp_path / "model", tmp_path / "imported"
    shutil.copytree(tiny_bloom, folder)
    for file in ("config.json", "tokenizer_config.json"):
        given = json.loads((folder / file).read_text())
        mapped = {name: f"evil.{name}" for name in ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer")}
        (folder / file).write_text(json.dumps(given | {"auto_map": mapped}))
    for name in ("evil", "modeling_evil", "conftest", "sitecustomize"):
        (folder / f"{name}.py").write_text(f"open({str(marker)!r}, 'w')\n")
    for command in (["plan", str(folder), "--cpu"], ["convert", str(folder), str(tmp_path / "out")]):
        main(command)
    from hasten.engine.llm import LLM

    with contextlib.suppress(HastenError), LLM(folder) as llm:
        llm.generate("the", use_tqdm=False)
    assert not marker.exists()


@about("cache directories")
def test_kernels_that_others_can_write_are_refused(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    check_kernel_cache(tmp_path / "cache")
    (tmp_path / "cache").chmod(0o777)
    with pytest.raises(ConfigError, match="who could run code here") as error:
        check_kernel_cache(tmp_path / "cache")
    assert "\n" not in str(error.value)


# Numbers and lists without an end

_HUGE = ("2147483648", "9223372036854775808", "1e400", "-1", '"5"', "NaN")


@about("CVE-2026-34756", "best_of")
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_completions_are_bounded(served: Site, transport: str) -> None:
    names = ("n", "best_of", "beam_width") if transport in ("completions", "chat") else ("n", "beam_width")
    for name in names:
        for value in _HUGE:
            answer = TRANSPORTS[transport](served, f'"{name}":{value}')
            if (name, value, transport) not in _READ_AS_NUMBERS:
                refused(answer)


_READ_AS_NUMBERS = {(name, '"5"', transport) for name in ("n", "beam_width") for transport in TRANSPORTS}
"""vLLM's clients of Triton write numbers as texts."""


@about("CVE-2026-34756", "best_of")
@pytest.mark.parametrize("count", [2**31 - 1, 2**32 - 1])
def test_beams_of_the_token_model_are_bounded(served: Site, count: int) -> None:
    def message(name: str) -> Any:
        result = pb.ModelInferRequest(model_name=TOKENS)
        for each, value in {"input_ids": 5, "input_lengths": 1, "request_output_len": 1, name: count}.items():
            if each not in {tensor.name for tensor in result.inputs}:
                tensor(result, each, "UINT32", [1, 1], struct.pack("<I", value))
        return result

    refused(served.call("ModelInfer", message("beam_width")), "beam_width")
    refused(served.stream(message("beam_width")), "beam_width")


@about("prompt_logprobs")
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_log_probabilities_are_bounded(served: Site, transport: str) -> None:
    for name in ("logprobs", "prompt_logprobs", "top_logprobs"):
        for value in ("-1", "2147483648", "9223372036854775808"):
            flag = '"logprobs":true,' if transport == "chat" and name == "top_logprobs" else ""
            answer = TRANSPORTS[transport](served, f'{flag}"{name}":{value}')
            # more than the vocabulary has stands for all of it in Triton's protocol, and this one is small
            of_all = transport in TRITONS and name != "top_logprobs" and value != "-1"
            assert answer.is_refusal or (of_all and answer.status == 200), answer
    refused(TRANSPORTS[transport](served, '"echo":true,"logprobs":1000000,"max_tokens":1'))


@about("prompt_logprobs")
def test_log_probabilities_of_all_prompts_are_bounded(served: Site) -> None:
    body = {"model": TEXT, "prompt": [[5] * 400] * 500, "echo": True, "logprobs": 20, "max_tokens": 1}
    refused(served.post("/v1/completions", body), "200000 tokens with 21 log-probabilities each")


_TOO_LONG = {
    "bad_words": json.dumps(["a"] * 20_000),
    "one bad word": json.dumps(["a" * MIB]),
    "stop": json.dumps(["a"] * 20_000),
    "stop_token_ids": json.dumps([5] * 20_000),
    "allowed_token_ids": json.dumps([5] * 200_000),
    "logit_bias": json.dumps({str(number): 1 for number in range(20_000)}),
}
_OUTSIDE = {
    "stop_token_ids": json.dumps([VOCABULARY]),
    "stop_token_ids below": json.dumps([-1]),
    "stop_token_ids far": json.dumps([2**63]),
    "allowed_token_ids": json.dumps([VOCABULARY]),
    "logit_bias": json.dumps({str(VOCABULARY): 1}),
    "logit_bias below": json.dumps({"-1": 1}),
    "logit_bias far": json.dumps({str(2**63): 1}),
    "logit_bias high": '{"5":1e400}',
}


@about("GHSA-4fv6-24cq-h5pw", "GHSA-m9fh-2f8w-jhw9", "GHSA-83mh-6mwq-3hg9", "GHSA-rp22-rc8r-qjmh")
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_lists_are_bounded_and_ids_are_of_the_vocabulary(served: Site, transport: str) -> None:
    for name, value in [*_TOO_LONG.items(), *_OUTSIDE.items()]:
        field = "bad_words" if name == "one bad word" else name.split()[0]
        refused(TRANSPORTS[transport](served, f'"{field}":{value}'))
    served.serves()


@about("GHSA-4fv6-24cq-h5pw", "GHSA-m9fh-2f8w-jhw9", "GHSA-83mh-6mwq-3hg9", "GHSA-rp22-rc8r-qjmh")
def test_prompts_are_bounded_and_of_the_vocabulary(served: Site) -> None:
    prompts: list[list[Any]] = [[VOCABULARY], [-1], [2**63], [5] * 100_000, [[5]] * 5000, [[]]]
    for ids in prompts:
        refused(served.post("/v1/completions", {"model": TEXT, "prompt": ids}))
        refused(served.post("/v1/embeddings", {"model": VECTORS, "input": ids}))
    for texts in ([""] * 5000, "a " * 500_000):
        refused(served.post("/v1/completions", {"model": TEXT, "prompt": texts}))
        refused(served.post("/v1/embeddings", {"model": VECTORS, "input": texts}))
        refused(served.post("/rerank", {"model": VECTORS, "query": "a", "documents": texts}))
    many = [{"role": "user", "content": ""}] * 50_000
    for path, extra in (("/v1/chat/completions", {}), ("/tokenize", {}), ("/v1/messages", {"max_tokens": 1})):
        refused(served.post(path, {"model": TEXT, "messages": many, **extra}))
    for given in (many, "a " * 500_000):
        refused(served.post("/v1/responses", {"model": TEXT, "input": given}))
    for body in ({"tokens": [VOCABULARY]}, {"tokens": [-1]}, {"tokens": [5] * 300_000}):
        refused(served.post("/detokenize", {"model": TEXT, **body}))
    for name, value in (
        ("dimensions", 2**63),
        ("dimensions", -1),
        ("truncate_prompt_tokens", 2**63),
        ("truncate_prompt_tokens", 2**70),
    ):
        answer = served.post("/v1/embeddings", {"model": VECTORS, "input": "a", name: value})
        assert answer.is_refusal or (name == "truncate_prompt_tokens" and answer.status == 200), answer


_GRAMMARS: dict[str, dict[str, Any]] = {
    "nested repeats": {"guided_regex": "((a{1,1000}){1,1000}){1,1000}"},
    "backtracking": {"guided_regex": "(a+)+$"},
    "not a regex": {"guided_regex": "("},
    "choice": {"guided_choice": ["a" * 20 + str(number) for number in range(100_000)]},
    "endless $ref": {"guided_json": {"$ref": "#"}},
    "$ref elsewhere": {"guided_json": {"$ref": "http://127.0.0.1:9/x"}},
    "pattern": {"guided_json": {"type": "string", "pattern": "("}},
    "repeats in a pattern": {"guided_json": {"type": "string", "pattern": "(a{1,10000}){1,10000}"}},
    "type": {"guided_json": {"type": "no such"}},
    "deep": {"guided_json": json.loads('{"items":' * 200 + "{}" + "}" * 200)},
    "Lark": {"guided_grammar": "start: start start start"},
    "response_format": {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 5}}}},
    "a tool": {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "x", "pattern": "("}}}]},
}


@about("GHSA-q9q8-922v-2c42", "GHSA-rwxx-mrjm-wc2m", "CVE-2025-48944", "GHSA-vrq3-r879-7m65")
@pytest.mark.parametrize("name", _GRAMMARS)
def test_a_grammar_ends_in_time(served: Site, name: str) -> None:
    body = {"model": TEXT, "max_tokens": 2, **_GRAMMARS[name]}
    messages = [{"role": "user", "content": "Anna"}]
    for path, prompt in (("/v1/completions", {"prompt": "Anna"}), ("/v1/chat/completions", {"messages": messages})):
        if path == "/v1/completions" and name == "a tool":
            continue
        assert served.post(path, body | prompt).status in (200, 400)
        served.serves()


_PATTERN = {"type": "string", "pattern": "(a{1,10000}){1,10000}"}
_SCHEMA = {"type": "object", "properties": {"a": _PATTERN, "b": {"type": 5}}}


@about("GHSA-q9q8-922v-2c42", "GHSA-rwxx-mrjm-wc2m", "CVE-2025-48944", "GHSA-vrq3-r879-7m65")
def test_the_schema_of_a_tool_ends_in_time(served: Site) -> None:
    messages = [{"role": "user", "content": "Anna"}]
    function = {"name": "f", "parameters": _SCHEMA}
    for path, body in (
        ("chat/completions", {"messages": messages, "tools": [{"type": "function", "function": function}]}),
        ("responses", {"input": "Anna", "tools": [{"type": "function", **function}]}),
        ("responses", {"input": "Anna", "text": {"format": {"type": "json_schema", "name": "x", "schema": _SCHEMA}}}),
    ):
        chosen = {"tool_choice": "required"} if "tools" in body else {}
        assert served.post(f"/v1/{path}", {"model": TEXT, **chosen, **body}).status in (200, 400)
    tool = {"name": "f", "input_schema": _SCHEMA}
    requested = {"messages": messages, "max_tokens": 2, "tools": [tool], "tool_choice": {"type": "any"}}
    assert served.post("/v1/messages", {"model": TEXT, **requested}).status in (200, 400)
    served.serves()


@about("CVE-2025-48887")
@pytest.mark.parametrize("form", [HERMES, LLAMA, MISTRAL], ids=lambda form: form.name)
def test_calls_of_tools_are_read_in_a_linear_time(form: ToolForm) -> None:
    """A regular expression over the whole answer took an exponential time; 200,000 characters take some 50 ms here."""
    for opening in ("", f'{form.opening}{{"name": "f", "arguments": ', f'{form.opening}{{"x": "'):
        for unit in ("<", "{", "[", " ", '"', "\\", '{"', form.opening, f"{form.opening}{{", '{"name": "f", '):
            parser, text = ToolParser(form, {"f"}), opening + unit * (200_000 // len(unit))
            began = time.process_time()
            for at in range(0, len(text), 65_536):
                parser.feed(text[at : at + 65_536])
            parser.end()
            assert time.process_time() - began < 5, (opening, unit)


@about("CVE-2025-48887")
@pytest.mark.parametrize("kind", ["xml", "channels", "reasoning"])
def test_calls_between_marks_and_reasoning_are_read_in_a_linear_time(kind: str) -> None:
    """The same of what is no JSON."""
    form = reasoning_form("", "qwen3")
    assert form is not None

    def reader() -> AnswerReader:
        if kind == "xml":
            return XmlToolParser(QWEN_CODER, {"f": None})
        return (
            HarmonyReader(with_calls=True) if kind == "channels" else ReasoningReader(form, Stage.INSIDE, TextReader())
        )

    call, parameter, header = "<tool_call><function=f>", "<parameter=a>", "<|channel|>analysis<|message|>"
    for opening in ("", call, f"{call}{parameter}", header, "<think>"):
        for unit in (
            "<",
            "<|",
            " ",
            "\n",
            call,
            "</function>",
            parameter,
            "</parameter>",
            header,
            "<|end|>",
            "</think",
        ):
            result, text = reader(), opening + unit * (200_000 // len(unit))
            began = time.process_time()
            for at in range(0, len(text), 65_536):
                result.feed(text[at : at + 65_536])
            result.end()
            assert time.process_time() - began < 5, (opening, unit)


# Connections and bytes


@about("CVE-2025-48956", "GHSA-rxc4-3w6r-4v47")
def test_headers_are_bounded(served: Site) -> None:
    before = served.memory()
    for headers in ({"x": "y" * MIB}, {f"x-{number}": "y" for number in range(20_000)}):
        with socket.create_connection(("127.0.0.1", served.server.http), LIMIT_S) as connection:
            lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
            try:
                connection.sendall(f"GET /v2 HTTP/1.1\r\nhost: localhost\r\n{lines}\r\n".encode())
                status = connection.recv(100)
            except ConnectionError:
                continue
            assert status.startswith(b"HTTP/1.1 431") or not status
    answer = served.call("ServerLive", b"", {"x": "y" * MIB})
    assert answer.status in (413, 500, 503)
    assert served.memory() - before < GROWTH_MIB
    served.serves()


@about("CVE-2025-59425")
def test_every_key_is_compared_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []
    original = hmac.compare_digest

    def compare(first: bytes, second: bytes) -> bool:
        compared.append((first, second))
        return original(first, second)

    keys = ApiKeys(["a", "b", "c"])
    monkeypatch.setattr(hmac, "compare_digest", compare)
    for given, admitted in (("a", True), ("c", True), ("d", False), ("", False)):
        compared.clear()
        assert (keys.tenant("", given) is not None) is admitted
        assert len(compared) == 3
        assert {len(digest) for pair in compared for digest in pair} == {32}


@about("GHSA-3f6c-7fw2-ppm4", "CVE-2026-33626")
def test_no_request_makes_the_server_connect_anywhere(served: Site) -> None:
    with socket.create_server(("127.0.0.1", 0)) as trap:
        url = f"http://127.0.0.1:{trap.getsockname()[1]}/x"
        part = {"type": "image_url", "image_url": {"url": url}}
        chat = {"model": TEXT, "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, part]}]}
        refused(served.post("/v1/chat/completions", chat))
        refused(served.post("/v1/completions", {"model": url, "prompt": "a"}))
        for field in ("image_url", "url", "documents", "input_reference"):
            refused(served.post("/v1/embeddings", {"model": VECTORS, "input": "a", field: url}))
        served.post("/v1/embeddings", {"model": VECTORS, "input": url})
        refused(served.post("/v1/completions", {"model": TEXT, "prompt": "a", "guided_json": {"$ref": url}}))
        for name in (url.replace("/", "%2F"), "new"):
            for config in ({"backend": "hasten", "parameters": {"model_checkpoint_path": {"string_value": url}}},):
                body = {"parameters": {"config": json.dumps(config)}}
                assert served.post(f"/v2/repository/models/{name}/load", body).status != 200
        trap.settimeout(0)
        with pytest.raises(BlockingIOError):
            trap.accept()


_LONG = " ".join(["Anna looked out of the window"] * 20)


def _ask_generate(site: Site, salt: str | None) -> Answer:
    body = {"text_input": _LONG, "max_tokens": 1} | ({} if salt is None else {"cache_salt": salt})
    return site.post(f"/v2/models/{TEXT}/generate", body)


def _ask_completions(site: Site, salt: str | None) -> Answer:
    body = {"model": TEXT, "prompt": _LONG, "max_tokens": 1} | ({} if salt is None else {"cache_salt": salt})
    return site.post("/v1/completions", body)


def _ask_chat(site: Site, salt: str | None) -> Answer:
    body = {"model": TEXT, "messages": [{"role": "user", "content": f"chat {_LONG}"}], "max_tokens": 1}
    return site.post("/v1/chat/completions", body | ({} if salt is None else {"cache_salt": salt}))


def _ask_responses(site: Site, salt: str | None) -> Answer:
    body = {"model": TEXT, "input": f"response {_LONG}", "max_output_tokens": 1}
    return site.post("/v1/responses", body | ({} if salt is None else {"cache_salt": salt}))


def _ask_messages(site: Site, salt: str | None) -> Answer:
    body = {"model": TEXT, "messages": [{"role": "user", "content": f"message {_LONG}"}], "max_tokens": 1}
    return site.post("/v1/messages", body | ({} if salt is None else {"cache_salt": salt}))


_ASKS = (_ask_completions, _ask_chat, _ask_responses, _ask_messages)


def _ask_grpc(site: Site, salt: str | None) -> Answer:
    message = text_message('{"max_tokens":1}', _LONG.encode())
    if salt is not None:
        message.parameters["cache_salt"].string_param = salt
    return site.stream(message)


def _ask_tokens(site: Site, salt: str | None) -> Answer:
    message = pb.ModelInferRequest(model_name=TOKENS)
    for name, data in {"input_ids": [7] * 100, "input_lengths": [100], "request_output_len": [1]}.items():
        tensor(message, name, "UINT32", [1, len(data)], np.array(data, np.uint32).tobytes())
    if salt is not None:
        message.parameters["cache_salt"].string_param = salt
    return site.call("ModelInfer", message)


@about("CVE-2025-46570", "GHSA-4qjh-9fv9-r85r")
@pytest.mark.parametrize("ask", [*_ASKS, _ask_generate, _ask_grpc, _ask_tokens])
def test_the_prefix_cache_says_nothing_of_others(served: Site, ask: Callable[[Site, str | None], Answer]) -> None:
    """Whether a prompt's beginning was found is what the time of its first token shows."""
    own, other = f"{ask.__name__} own", f"{ask.__name__} other"

    def hits(site: Site, salt: str | None) -> float:
        before = _hits(served)
        assert ask(site, salt).status == 200
        return _hits(served) - before

    assert hits(served, own) == 0
    assert hits(served, own) > 0
    assert hits(served, other) == 0
    assert hits(served.using(OTHER_KEY), own) == 0
    assert hits(served.using(OTHER_KEY), own) > 0
    hits(served, None)
    assert hits(served, None) > 0
    hits(served.using(OTHER_KEY), None)
    for salt in ("", "x" * 257):
        refused(ask(served, salt), "cache_salt")


def _hits(site: Site) -> float:
    return _total(site, "hasten_prefix_cache_hit_tokens_total")


def _total(site: Site, counter: str) -> float:
    samples = asyncio.run(site.server.metrics())
    return sum(value for name, value in samples.items() if name.startswith(f"{counter}{{"))


@about("CVE-2025-62426")
@pytest.mark.parametrize(
    "name", ["tokenize", "messages", "add_generation_prompt", "chat_template", "bos_token", "tools"]
)
def test_variables_of_templates_override_nothing(served: Site, name: str) -> None:
    messages = [{"role": "user", "content": "Anna"}]
    body = {"model": TEXT, "messages": messages, "chat_template_kwargs": {name: True}}
    for path in ("/v1/chat/completions", "/tokenize"):
        refused(served.post(path, body), "chat_template_kwargs", name)


_WRONG: tuple[tuple[str, str, Any], ...] = (
    *(("POST", path, b"{" * 3000) for path in ("/v1/completions", "/v1/embeddings", f"/v2/models/{TOKENS}/infer")),
    *(("POST", f"/v2/models/{name}/infer", b"{}") for name in ("none", "..", TOKENS)),
    *(("POST", "/v2/repository/models/new/load", {"parameters": {"file:1/x": "eA=="}}) for _ in range(1)),
    ("POST", "/v1/completions", {"model": TEXT, "prompt": {"a": "b"}}),
    ("POST", "/v1/chat/completions", {"model": TEXT, "messages": [{"role": "user", "content": {"a": 1}}]}),
    ("POST", "/score", {"model": TEXT, "text_1": "a", "text_2": "b"}),
    ("POST", "/tokenize", {"model": TEXT, "prompt": "\ud800"}),
    ("POST", "/detokenize", {"model": TEXT, "tokens": ["a"]}),
    ("GET", "/v1/models/none", b""),
    ("DELETE", "/v2/models", b""),
    ("GET", "/..%2f..%2fetc/passwd", b""),
)


@about("CVE-2026-22778")
def test_errors_say_nothing_of_the_machine(served: Site) -> None:
    """`check_clean` looks at every answer in this file; the soak of malformed requests looks at ten thousand each."""
    for method, path, body in _WRONG:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        refused(served.ask(method, path, raw)) if method == "POST" else served.ask(method, path, raw)
    for call in ("ModelInfer", "RepositoryModelLoad", "ModelConfig", "SystemSharedMemoryRegister"):
        assert served.call(call, b"\xff\xff\xff").is_refusal
    for text in ("Traceback (most recent call last)", "at 0x7f00deadbeef", 'File "x"', "/home/me/model"):
        with pytest.raises(AssertionError):
            check_clean(text)


@about("prompt embeds")
def test_no_tensor_is_made_of_a_small_payload(served: Site) -> None:
    for field in ("prompt_embeds", "input_embeds", "multi_modal_data", "encoder_data"):
        refused(served.post("/v1/completions", {"model": TEXT, "prompt": "a", field: "gAJ"}), field)
        refused(served.post("/v1/embeddings", {"model": VECTORS, "input": "a", field: "gAJ"}), field)
    for name in ("request_prompt_embedding", "input_hidden_state", "prompt_embeds"):
        for shape in ([1, 2**20, 2**10], [2**31, 2**31], [1, 1]):
            message = pb.ModelInferRequest(model_name=TOKENS)
            tensor(message, name, "FP32", shape, bytes(4))
            refused(served.call("ModelInfer", message))


# What is open to whom


_CONNECTIONS = 3
_OPEN = {"/", "/docs", "/health", "/ping", "/v2/health/live", "/v2/health/ready"}


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[app.Server, dict[int, Sequence[Any]]]]:
    """A server without models, with keys for metrics too; and the routes of its ports, by number."""
    folder = tmp_path_factory.mktemp("empty")
    (folder / "models").mkdir()
    for name in ("keys", "metrics"):
        (folder / name).write_text(f"{name}-key\n")

    options = ServeOptions(
        model_repository=(str(folder / "models"),),
        endpoints=EndpointOptions(http_port=0, grpc_port=0, metrics_port=0, grpc_max_connections=_CONNECTIONS),
        security=SecurityOptions(api_key_file=str(folder / "keys"), metrics_key_file=str(folder / "metrics")),
    )
    with running_with_routes(options) as served:
        yield served


@about("unkeyed routes")
def test_every_route_of_every_port_wants_a_key(empty: tuple[app.Server, dict[int, Sequence[Any]]]) -> None:
    """`/invocations`, `/pause` and `/score` were open where a key guarded only paths that begin with `/v1`."""
    server, ports = empty
    assert server.http is not None
    for port, routes in ports.items():
        is_api = port == server.http.port
        paths = {re.sub(r"{[^}]*}", "x", route.path): route.methods for route in routes} | {"/invocations": {"POST"}}
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=LIMIT_S) as client:
            for path, methods in paths.items():
                for method in {*methods, "GET", "POST", "OPTIONS"}:
                    status = client.request(method, path).status_code
                    guarded = path == "/metrics" or (is_api and path not in _OPEN)
                    assert (status == 401) is guarded, (method, path, status)
            keys = {"metrics-key": 200, "keys-key": 200, "other": 401, "": 401}
            assert {key: client.get("/metrics", headers={"x-api-key": key}).status_code for key in keys} == keys
            if is_api:
                assert client.get("/v2", headers={"x-api-key": "metrics-key"}).status_code == 401


@about("unkeyed routes")
def test_every_call_over_grpc_wants_a_key(served: Site) -> None:
    stranger = served.using("")
    for name in pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods_by_name:
        if name in ("ServerLive", "ServerReady"):
            assert stranger.call(name, b"").status == 200
        elif name == "ModelStreamInfer":
            assert stranger.stream().status == 401
        else:
            assert stranger.call(name, b"").status == 401


@about("CVE-2026-27482")
def test_no_foreign_page_changes_anything(empty: tuple[app.Server, dict[int, Sequence[Any]]]) -> None:
    for port, routes in empty[1].items():
        own = f"localhost:{port}"
        key = {"x-api-key": "keys-key"}
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=LIMIT_S) as client:
            for route in routes:
                path = re.sub(r"{[^}]*}", "x", route.path)
                for method in route.methods:
                    rebound = client.request(method, path, headers={**key, "host": f"evil.example:{port}"})
                    assert rebound.status_code == 403
                    foreign = client.request(
                        method, path, headers={**key, "host": own, "origin": "https://evil.example"}
                    )
                    assert (foreign.status_code == 403) is (method not in ("GET", "HEAD"))
                    of_own = client.request(method, path, headers={**key, "host": own, "origin": f"http://{own}"})
                    assert of_own.status_code != 403


@about("CVE-2026-27482")
def test_a_server_is_of_this_machine_alone_unless_an_address_is_given() -> None:
    endpoints = EndpointOptions()
    assert (endpoints.http_address, endpoints.grpc_address, endpoints.metrics_address) == ("127.0.0.1", "", "")


@about("CVE-2025-48956", "GHSA-rxc4-3w6r-4v47")
def test_connections_over_grpc_are_bounded(empty: tuple[app.Server, dict[int, Sequence[Any]]]) -> None:
    server = empty[0].grpc
    assert server is not None
    address = server.address

    def live(opened: contextlib.ExitStack) -> int:
        channel = opened.enter_context(grpc.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]))
        call = channel.unary_unary("/inference.GRPCInferenceService/ServerLive")
        return answered(lambda: repr(call(b"", timeout=LIMIT_S))).status

    def lives() -> bool:
        with contextlib.ExitStack() as opened:
            return live(opened) == 200

    with contextlib.ExitStack() as opened:
        assert [live(opened) for _ in range(_CONNECTIONS + 2)] == [200] * _CONNECTIONS + [503, 503]
    eventually(lives)


# Triton Inference Server

_PATHS = (
    *("CVE-2026-24208", "CVE-2026-24209", "triton-8427", "triton-8659", "triton-8665", "triton-8669"),
    *("triton-core-465", "triton-core-472"),
)


@about("triton-8680", "triton-8686", "triton-8833")
@pytest.mark.parametrize(
    "path",
    [*GENERATION_PATHS, *TEXT_PATHS, "/v2/repository/models/x/load", "/v2/logging", "/v1/no-such", "/"],
)
def test_the_same_bytes_are_too_many_at_every_entrance(served: Site, path: str) -> None:
    for length in (str(1 << 40), str((64 << 20) + 1)):
        head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\nx-api-key: {KEY}\r\ncontent-length: {length}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", served.server.http), LIMIT_S) as connection:
            connection.sendall(head.encode())
            assert connection.recv(12) == b"HTTP/1.1 413"


@about("triton-8680", "triton-8686", "triton-8833")
def test_the_same_bytes_are_too_many_over_grpc(served: Site) -> None:
    message = pb.ModelInferRequest(model_name=TOKENS, raw_input_contents=[bytes(33 << 20)])
    assert served.call("ModelInfer", message).status == 413
    assert served.stream(message).status == 413
    for call in ("ModelConfig", "LogSettings", "RepositoryIndex"):
        refused(served.call(call, b"\xfa\x7f" + b"\x80\x80\x40" + bytes(MIB)))


@about("CVE-2025-23310", "CVE-2025-23311")
@pytest.mark.parametrize("path", [*GENERATION_PATHS, "/pooling"])
def test_chunks_cost_no_stack(served: Site, path: str) -> None:
    """65,537 chunks of 6 bytes, in one body."""
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\nx-api-key: {KEY}\r\ntransfer-encoding: chunked\r\n\r\n"
    with socket.create_connection(("127.0.0.1", served.server.http), LIMIT_S) as connection:
        connection.sendall(head.encode() + b"6\r\n      \r\n" * 65_537 + b"0\r\n\r\n")
        assert connection.recv(12) == b"HTTP/1.1 400"


@about(*_PATHS)
@pytest.mark.parametrize(
    "name", ["..", "../x", "%2e%2e", "%2e%2e%2fx", "/etc", "a%00b", "..%5cx", "a/../../b", ".hidden"]
)
def test_no_path_leads_out_of_the_repository(served: Site, name: str) -> None:
    for route in (f"/v2/models/{name}/config", f"/v2/models/{name}/versions/1/config", f"/v2/models/{name}/stats"):
        assert served.ask("GET", route).is_refusal
    plain = name.replace("%2e", ".").replace("%2f", "/").replace("%5c", "\\").replace("%00", "\0")
    files = {"config": '{"backend":"hasten"}', f"file:{plain}/x": "eA=="}
    for body in ({}, {"parameters": files}):
        assert served.post(f"/v2/repository/models/{name}/load", body).status in (400, 404, 500)
    message = pb.RepositoryModelLoadRequest(model_name=plain)
    assert served.call("RepositoryModelLoad", message).status != 200
    assert served.call("ModelConfig", pb.ModelConfigRequest(name=plain, version=plain)).is_refusal
    for route in ("/v1/models/", "/v1/completions?model="):
        assert served.ask("GET", route + name).is_refusal or served.ask("GET", route + name).status == 405


@about(*_PATHS)
@pytest.mark.parametrize("leads", ["/etc", "../../..", "../x", "/sys/../etc"])
@pytest.mark.parametrize("parameter", ["model_checkpoint_path", "tokenizer_path", "default_model_filename"])
def test_a_configuration_that_is_sent_names_no_folder_elsewhere(served: Site, parameter: str, leads: str) -> None:
    config = {"backend": "hasten", "max_batch_size": 8, "parameters": {parameter: {"string_value": leads}}}
    if parameter == "default_model_filename":
        config = {"backend": "hasten", "max_batch_size": 8, parameter: leads}
    body = {"parameters": {"config": json.dumps(config)}}
    answer = served.post(f"/v2/repository/models/{TOKENS}/load", body)
    assert "cannot lead elsewhere" in answer.text
    served.serves()


@about(*_PATHS)
@pytest.mark.parametrize("leads", ["/etc/passwd", "../../x", "labels.txt"])
def test_no_file_of_labels_is_read(served: Site, leads: str) -> None:
    output = {"name": "output_ids", "data_type": "TYPE_UINT32", "dims": [-1, -1], "label_filename": leads}
    body = {"parameters": {"config": json.dumps({"backend": "hasten", "max_batch_size": 8, "output": [output]})}}
    answer = served.post(f"/v2/repository/models/{TOKENS}/load", body)
    assert answer.status != 200
    assert "label_filename" in answer.text


@about("CVE-2026-24146", "triton-core-493")
def test_outputs_are_bounded_and_asked_for_once(served: Site) -> None:
    inputs = [{"name": "input_ids", "datatype": "UINT32", "shape": [1, 1], "data": [5]}]
    for outputs in ([{"name": "output_ids"}] * 2, [{"name": f"x{number}"} for number in range(100_000)]):
        refused(served.post(f"/v2/models/{TOKENS}/infer", {"inputs": inputs, "outputs": outputs}))
        message = pb.ModelInferRequest(model_name=TOKENS)
        for output in outputs:
            message.outputs.add(name=output["name"])
        refused(served.call("ModelInfer", message))
        refused(served.stream(message))


@about("triton-8570", "triton-8764")
@pytest.mark.parametrize(("encoding", "wbits"), [("gzip", 31), ("deflate", 15)])
def test_a_compressed_bomb_leaves_nothing(served: Site, encoding: str, wbits: int) -> None:
    packer = zlib.compressobj(9, wbits=wbits)
    bomb = b"".join([packer.compress(bytes(MIB)) for _ in range(80)]) + packer.flush()
    paths = (f"/v2/models/{TOKENS}/infer", f"/v2/models/{TEXT}/generate", "/v1/completions", "/v1/embeddings")
    for path in paths:
        refused(served.post(path, bomb, {"content-encoding": encoding}))
    before = served.memory()
    for path in paths * 3:
        refused(served.post(path, bomb, {"content-encoding": encoding}))
    assert served.memory() - before < GROWTH_MIB


_DEEP = 100_000
_TAKES_ANY_FIELD = ("/v2/logging", "/v2/repository/index")
_NUMBERS = ("1e999", "-1e999", "99999999999999999999999999", "1" * 5000, "NaN", "Infinity", "-0.0e-999999")


@about("triton-8172", "triton-8676", "triton-core-434", "triton-core-475")
@pytest.mark.parametrize(
    "path",
    [
        *(*GENERATION_PATHS, *TEXT_PATHS, "/v2/repository/index"),
        *("/v2/logging", "/v2/trace/setting", "/v2/systemsharedmemory/region/x/register"),
    ],
)
def test_json_is_neither_deep_nor_endless(served: Site, path: str) -> None:
    for body in (b"[" * _DEEP, b'{"a":' * _DEEP, b'{"model":' + b"[" * _DEEP + b"]" * _DEEP + b"}"):
        refused(served.post(path, body))
    for number in _NUMBERS:
        for field in ("max_tokens", "input", "log_verbose_level", "byte_size"):
            answer = served.post(path, f'{{"model":"{TEXT}","{field}":{number}}}'.encode())
            assert answer.is_refusal or (answer.status == 200 and path in _TAKES_ANY_FIELD), answer


_SHAPES: tuple[list[int], ...] = (
    [2**62, 4],
    [2**31, 2**33],
    [-1],
    [-(2**63)],
    [0],
    [],
    [1] * 100,
    [2**63 - 1, 2**63 - 1],
    [3],
)


@about("triton-8172", "triton-8676", "triton-core-434", "triton-core-475")
@pytest.mark.parametrize("datatype", ["UINT32", "BYTES", "FP64"])
def test_shapes_do_not_wrap(served: Site, datatype: str) -> None:
    for shape in _SHAPES:
        message = pb.ModelInferRequest(model_name=TOKENS)
        tensor(message, "input_ids", datatype, list(shape), bytes(8))
        refused(served.call("ModelInfer", message))
        column = {"name": "input_ids", "datatype": datatype, "shape": shape, "parameters": {"binary_data_size": 8}}
        head = json.dumps({"inputs": [column]}).encode()
        headers = {"Inference-Header-Content-Length": str(len(head))}
        refused(served.post(f"/v2/models/{TOKENS}/infer", head + bytes(8), headers))
        refused(served.post(f"/v2/models/{TOKENS}/infer", {"inputs": [column | {"data": [1], "parameters": {}}]}))


@pytest.fixture
def region() -> Iterator[str]:
    name = f"hasten-cves-{os.getpid()}"
    (FOLDER / name).write_bytes(bytes(64))
    yield f"/{name}"
    (FOLDER / name).unlink()


@about("triton-8335", "triton-8330", "triton-8170")
def test_a_region_is_never_left(region: str) -> None:
    memory = SharedMemory(allowed=True)
    for offset, size in ((0, 65), (64, 1), (2**63, 1), (1, 2**64 - 1), (-1, 8), (0, 0), (0, -8), (2**64, 2**64)):
        with pytest.raises(ServiceError):
            memory.register("r", region, offset, size)
    memory.register("r", region, 16, 32)
    for size, offset in ((33, 0), (1, 32), (32, 1), (2**64 - 8, 16), (-1, 0), (8, -8), (8, 2**63)):
        with pytest.raises(ServiceError):
            memory.slice("r", size, offset)
    part = memory.slice("r", 32, 0)
    os.truncate(FOLDER / region[1:], 20)
    with pytest.raises(ServiceError):
        part.read()
    with pytest.raises(ServiceError):
        part.write("output", bytes(32))
    assert (FOLDER / region[1:]).stat().st_size == 20


@about("CVE-2025-23319", "CVE-2025-23320", "CVE-2025-23334")
def test_shared_memory_of_clients_is_off(served: Site, region: str) -> None:
    body = {"key": region, "byte_size": 64}
    refused(served.post("/v2/systemsharedmemory/region/x/register", body), "--allow-client-shm")
    message = pb.SystemSharedMemoryRegisterRequest(name="x", key=region, byte_size=64)
    refused(served.call("SystemSharedMemoryRegister", message), "--allow-client-shm")


@about("CVE-2025-23319", "CVE-2025-23320", "CVE-2025-23334")
def test_only_what_a_client_registered_is_named(region: str) -> None:
    memory = SharedMemory(allowed=True)
    with serving_transports(Transports(memory=memory)) as transports:
        url = f"http://{transports.http}/v2/systemsharedmemory"
        assert httpx.post(f"{url}/region/mine/register", json={"key": region, "byte_size": 64}).status_code == 200
        for other in ("other", "", "/dev/shm", "torch_1", "psm_1"):
            answer = httpx.get(f"{url}/region/{other}/status")
            assert answer.status_code in (400, 404)
            assert region[1:] not in answer.text
        column: dict[str, Any] = {"name": "INPUT0", "datatype": "INT32", "shape": [1]}
        column["parameters"] = {"shared_memory_region": "other", "shared_memory_byte_size": 4}
        answer = httpx.post(f"http://{transports.http}/v2/models/add/infer", json={"inputs": [column]})
        assert answer.status_code in (400, 404)
        assert region[1:] not in answer.text


# Clients that leave


def _opened(port: int, path: str, body: object) -> socket.socket:
    raw = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\nx-api-key: {KEY}\r\ncontent-length: {len(raw)}\r\n\r\n"
    result = socket.create_connection(("127.0.0.1", port), LIMIT_S)
    result.sendall(head.encode() + raw)
    return result


def _reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def _half(connection: socket.socket) -> None:
    connection.shutdown(socket.SHUT_WR)
    connection.close()


@about("CVE-2026-9540")
@pytest.mark.parametrize("leave", [_reset, _half, socket.socket.close])
@pytest.mark.parametrize("state", ["head", "body", "queued", "streaming", "whole"])
def test_a_client_that_leaves_leaves_nothing(served: Site, state: str, leave: Callable[[socket.socket], None]) -> None:
    port = served.server.http
    long = {"model": TEXT, "prompt": "Anna", "max_tokens": 1500, "ignore_eos": True}
    if state in ("head", "body"):
        connection = socket.create_connection(("127.0.0.1", port), LIMIT_S)
        rest = b"\r\n{" if state == "body" else b""
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 99\r\n" + rest)
    else:
        ended = _total(served, "vllm:request_success_total")
        connection = _opened(port, "/v1/completions", long | {"stream": state == "streaming"})
        if state == "streaming":
            assert connection.recv(1)
        elif state == "whole":  # while it is computed, or at most a moment after that
            done = "vllm:request_success_total"
            eventually(lambda: _total(served, "vllm:num_requests_running") > 0 or _total(served, done) > ended)
    leave(connection)
    asyncio.run(served.server.idle_after())


# Checkpoints that are no such thing


@about("CTranslate2-4.8.1", "openvino-4002")
def test_a_crafted_checkpoint_is_one_line(tmp_path: Path) -> None:
    from hasten.checkpoint.files import read_tensors

    file = tmp_path / "model.safetensors"
    save_file({"a": np.zeros((4, 4), np.float32)}, file)
    raw, random = file.read_bytes(), np.random.default_rng(0)
    size = struct.unpack("<Q", raw[:8])[0]
    heads = [
        b'{"a":{"dtype":"F32","shape":[4,4],"data_offsets":[0,18446744073709551615]}}',
        b'{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,64]}}',
        b'{"a":{"dtype":"F32","shape":[-4,-4],"data_offsets":[0,64]}}',
        b'{"a":{"dtype":"F32","shape":[4,4],"data_offsets":[64,0]}}',
        b"[" * 10_000,
        b'{"__metadata__":5}',
    ]
    crafted = [struct.pack("<Q", len(head)) + head + raw[8 + size :] for head in heads]
    crafted += [struct.pack("<Q", length) + raw[8:] for length in (0, 1, 2**63, 2**64 - 1)]
    for _ in range(150):
        changed = bytearray(raw)
        for index in random.integers(0, 8 + size, 3):
            changed[index] = random.integers(0, 256)
        crafted.append(bytes(changed))
    for content in crafted:
        file.write_bytes(content)
        with contextlib.suppress(CheckpointError):
            read_tensors(tmp_path)


def _rows() -> set[str]:
    """The advisories that the tests here are about."""
    marks = [mark for test in globals().values() for mark in getattr(test, "pytestmark", ())]
    named = [mark.args[1][0] for mark in marks if mark.args and mark.args[0] == "row"]
    return {item for names in named for item in names.split("+")}


def test_the_list_for_operators_is_that_of_the_tests() -> None:
    _, _, after = LIST.read_text().partition("## Known attacks")
    table = after.partition("\n## ")[0]
    listed = {
        item
        for line in table.splitlines()
        if line.startswith("| `")
        for item in re.findall(r"`([^`]+)`", line.split("|")[1])
    }
    assert listed == _rows()
