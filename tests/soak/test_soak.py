"""Every soak in short, and that each of them can fail. `python -m tests.soak NAME` runs one at its full length."""

import asyncio
import json
import random
from collections.abc import Callable
from typing import Any

import pytest
from tests.soak import departures, engine_death, logprob_load, malformed, mixed_load, reload, slow_readers, termination
from tests.soak.__main__ import NAMES, main
from tests.soak.asks import FailedError
from tests.soak.attacks import HttpAttack, generate, openai, over_grpc, triton
from tests.soak.http_client import request
from tests.soak.pooling_attacks import pooling
from tests.soak.report import Report

SHORT: dict[Callable[..., Report], dict[str, Any]] = {
    malformed.run: {"requests": 200},
    # the figures of so few requests on a busy machine say little: here it is about what hangs, or grows by a multiple
    departures.run: {"clients": 24, "limit": 60.0},
    engine_death.run: {"rounds": 1, "each": 1, "limit": 60.0},
    termination.run: {"each": 1, "tokens": 60, "timeout": 1.0, "grace": 60.0},
    slow_readers.run: {
        **{"readers": 1, "tokens": 160, "completions": 32, "others": 6, "waves": 1},
        **{"limit": 10.0, "growth": 0.5},
    },
    mixed_load.run: {"minutes": 0.05, "limit": 3.0},
    logprob_load.run: {"minutes": 0.05, "limit": 3.0},
    reload.run: {"rounds": 1, "pause": 0.3},
}


@pytest.mark.slow
@pytest.mark.parametrize(("run", "options"), SHORT.items(), ids=lambda value: getattr(value, "__module__", ""))
def test_it_survives(run: Callable[..., Report], options: dict[str, Any]) -> None:
    report = run(**options)
    assert not report.failures, "\n".join(report.failures)
    assert report.figures


def test_a_failure_is_told_by_the_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report("x")
    report.at_most("seconds", 2.0, 1.0)
    report.require(True, "not this")
    assert report.tell() == 1
    assert json.loads(capsys.readouterr().out) == {
        "soak": "x",
        "passed": False,
        "figures": {"seconds": 2.0},
        "failures": ["seconds is 2, the limit is 1"],
    }
    assert Report("x").tell() == 0


def test_an_unknown_name_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["x"]) == main([]) == 2
    message = capsys.readouterr().err
    assert all(name in message for name in NAMES)


@pytest.mark.parametrize("make", [triton, generate, openai, pooling, over_grpc])
def test_an_attack_can_be_made_again(make: Callable[[random.Random], object]) -> None:
    result = [make(random.Random(f"0 {number}")) for number in range(50)]
    assert result == [make(random.Random(f"0 {number}")) for number in range(50)]
    assert len(set(map(repr, result))) > 45


def judged(answer: bytes) -> malformed.Tally:
    """What is said of a server that answers so, whatever it is asked."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(100)
        writer.write(answer)
        writer.close()

    async def attack() -> malformed.Tally:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        tally = malformed.Tally()
        async with server:
            port = server.sockets[0].getsockname()[1]
            await malformed.send_all(port, iter([HttpAttack(request("GET", "/"))]), tally)
        return tally

    return asyncio.run(attack())


def response(status: int, body: bytes) -> bytes:
    return f"HTTP/1.1 {status} X\r\nconnection: close\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (response(500, b"no"), "500"),
        (response(502, b"no"), "502"),
        (b"", "none"),
        (response(200, b"a")[:-1], "none"),
        (response(400, b'{"error": "cannot read /tmp/x"}'), "400"),
        (response(400, b'{"error": "<object at 0x7f0d897fd590>"}'), "400"),
        (response(200, b'data: {"error": "internal error; the server\'s log says more"}'), "200"),
    ],
)
def test_a_server_at_fault_is_found(answer: bytes, code: str) -> None:
    tally = judged(answer)
    assert tally.codes == {code: 1}
    assert len(tally.wrong) == 1


@pytest.mark.parametrize("status", [200, 400, 404, 413, 503])
def test_a_refusal_is_no_fault(status: int) -> None:
    tally = judged(response(status, b"no"))
    assert tally.codes == {str(status): 1}
    assert not tally.wrong


def test_growth_is_seen_behind_the_warm_up() -> None:
    samples = [{"server": 50.0 + min(number, 20), "engine": 100.0 + number / 10} for number in range(100)]
    found = mixed_load.growth(samples, 0.2)
    assert found["server"]["growth"] == 0
    assert found["engine"]["growth"] == pytest.approx(0.069, abs=0.001)


@pytest.mark.parametrize(
    ("error", "refused"),
    [
        (FailedError("404", "Request for unknown model: 'x' has no available versions"), True),
        (FailedError("OK", "Request for unknown model: 'x' is not found"), True),
        (FailedError("200", "Request for unknown model: 'x' is not found", begun=True), False),
        (FailedError("500", "Request for unknown model: 'x' is not found"), False),
        (FailedError("503", "engine x was closed before the request was done"), False),
    ],
)
def test_only_a_model_that_is_not_there_may_refuse(error: FailedError, refused: bool) -> None:
    assert reload.is_refusal(error) == refused
