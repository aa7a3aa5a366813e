import asyncio

import pytest
from tests.server.service_fixtures import LONGEST, Running, demo, streaming, token_request
from tests.waiting import attempts

from hasten.core.errors import EngineError, InvalidRequestError
from hasten.server.engine.queue import QueueFullError, QueueTimeoutError
from hasten.server.exposition import Histogram
from hasten.server.models.work import Clock
from hasten.server.statistics import (
    Counters,
    FailureReason,
    ModelCounters,
    Tally,
)
from hasten.server.types import ErrorKind, InferRequest, ServiceError

pytestmark = pytest.mark.any_python

__all__ = ["demo", "streaming"]

PROMPTS = [[9, 10, 304, 262], [5]]


def test_a_histogram_counts_what_is_at_most_its_bound() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 9.0):
        histogram.observe(value)
    assert histogram.counts == [2, 2, 1]
    assert (histogram.count, histogram.total) == (5, 14.0)


def test_a_request_is_pending_until_its_first_response_and_counts_once() -> None:
    counters = ModelCounters()
    tally = Tally(counters, Clock(), 3, decoupled=True)
    assert counters.pending == 1
    tally.respond()
    assert counters.pending == 0
    tally.succeed()
    tally.fail(GeneratorExit())  # its client leaves with the last response
    counts = counters.durations.counts
    assert (counts["success"], counts["fail"], counters.pending) == (1, 0, 0)
    assert (counters.inference_count, counters.execution_count) == (3, 1)
    assert counters.first_response_ms.count == 1


def caused(kind: ErrorKind, cause: Exception) -> ServiceError:
    error = ServiceError(kind, "x")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (QueueFullError("x"), FailureReason.REJECTED),
        (QueueTimeoutError("x"), FailureReason.REJECTED),
        (caused(ErrorKind.UNAVAILABLE, QueueFullError("x")), FailureReason.REJECTED),
        (asyncio.CancelledError(), FailureReason.CANCELED),
        (GeneratorExit(), FailureReason.CANCELED),
        (EngineError("x"), FailureReason.BACKEND),
        (InvalidRequestError("x"), FailureReason.OTHER),
        (ValueError("x"), FailureReason.OTHER),
    ],
)
def test_why_requests_fail(error: BaseException, reason: FailureReason) -> None:
    counters = ModelCounters()
    Tally(counters, Clock(), 1, decoupled=False).fail(error)
    assert {name: count for name, count in counters.failures.items() if count} == {reason: 1}
    assert (counters.pending, counters.durations.counts["fail"]) == (0, 1)


def test_what_the_protocol_reports(demo: Running) -> None:
    (before,) = demo.service.statistics("fastertransformer")
    demo.infer(token_request(PROMPTS, 4))
    demo.infer(token_request(PROMPTS[:1], 4))
    (after,) = demo.service.statistics("fastertransformer", "1")
    assert (after.name, after.version) == ("fastertransformer", "1")
    assert after.inference_count == before.inference_count + 3
    assert after.execution_count == before.execution_count + 2
    assert after.last_inference > 1_700_000_000_000
    stats, old = after.inference_stats, before.inference_stats
    assert stats.success.count == old.success.count + 2
    parts = [stats.queue, stats.compute_input, stats.compute_infer, stats.compute_output]
    assert all(part.count == stats.success.count for part in parts)
    assert all(part.ns > 0 for part in parts)
    assert sum(part.ns for part in parts) <= stats.success.ns
    sizes = [batch.batch_size for batch in after.batch_stats]
    assert sizes == sorted(sizes)
    assert {1, 2} <= set(sizes)
    assert sum(batch.compute_infer.count for batch in after.batch_stats) == stats.success.count


def test_most_of_the_time_is_that_of_the_engine(demo: Running) -> None:
    for _ in attempts("more time to compute tokens than to make a tensor of them"):
        (before,) = demo.service.statistics("fastertransformer")
        demo.infer(token_request(PROMPTS, 20))
        (after,) = demo.service.statistics("fastertransformer")
        infer, output = (
            getattr(after.inference_stats, part).ns - getattr(before.inference_stats, part).ns
            for part in ("compute_infer", "compute_output")
        )
        if infer > output:
            break


def test_refused_before_the_model_is_not_a_failure_of_it(demo: Running) -> None:
    counts = demo.service.counters["fastertransformer", "1"].durations.counts
    before = counts["fail"]
    demo.refused(InferRequest("fastertransformer", []))
    assert counts["fail"] == before
    demo.refused(token_request([[5000]], 4))
    assert counts["fail"] == before + 1


def test_statistics_of_what_is_not_there(demo: Running) -> None:
    for model, version, message in (
        ("nope", "", "requested model 'nope' is not available"),
        ("demo", "9", "requested model version is not available for model 'demo'"),
    ):
        with pytest.raises(ServiceError) as caught:
            demo.service.statistics(model, version)
        assert (caught.value.kind, str(caught.value)) == (ErrorKind.INVALID, message)
    everything = demo.service.statistics()
    assert [stats.name for stats in everything] == sorted(stats.name for stats in everything)
    assert [stats.name for stats in demo.service.statistics("", "1")] == [stats.name for stats in everything]


def test_counters_of_a_language_model(streaming: Running) -> None:
    counters = streaming.service.counters["fastertransformer", "1"]
    assert counters.load_seconds > 0
    language = counters.language
    assert language is not None
    before = language.total
    responded = counters.first_response_ms.count
    streaming.stream(token_request(PROMPTS, 5, end_id=5000))
    now = language.total
    assert (now.prompt_tokens - before.prompt_tokens, now.generation_tokens - before.generation_tokens) == (5, 10)
    assert now.time_to_first_token.count == before.time_to_first_token.count + 2
    assert counters.first_response_ms.count == responded + 1
    assert streaming.service.counters["demo", "1"].language is None


def test_a_client_that_leaves_is_counted(streaming: Running) -> None:
    counters = streaming.service.counters["fastertransformer", "1"]
    before = counters.failures[FailureReason.CANCELED]

    async def leave() -> None:
        for _ in attempts("a response with more to come"):
            responses = streaming.service.stream(token_request(PROMPTS, LONGEST, end_id=5000))
            if not (await anext(responses)).final:
                break
        await responses.aclose()

    streaming.run(leave())
    assert counters.failures[FailureReason.CANCELED] == before + 1


def test_counters_are_kept_by_model_and_version() -> None:
    counters = Counters()
    assert counters["a", "1"] is counters["a", "1"]
    counters["a", "2"].pending = 1
    assert list(counters) == [("a", "1"), ("a", "2")]
