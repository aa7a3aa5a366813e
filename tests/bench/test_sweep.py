"""A server of OpenAI's API, whoever runs it, at more and more requests in flight."""

import pytest
from tests.bench.load.scripted_server import scripted

from hasten.bench.load.prompts import PromptWriter
from hasten.bench.slo import Slo
from hasten.bench.sweep import SweepOptions, knee, running, sweep


def test_a_server_at_an_address_gets_the_same_load_as_hastens() -> None:
    said: list[str] = []
    options = SweepOptions(prompt_length=5, output_length=3, least_requests=2, rounds=2)
    with scripted() as server:
        found = sweep(running(server.url, PromptWriter(None, 40)), [1, 2], options, said.append)
        bodies = [each.body for each in server.exchanges if each.method == "POST"]
    assert [point.concurrency for point in found.points] == [1, 2][: len(found.points)]
    assert (found.label, found.address, found.start_s) == ("openai", server.url, None)
    for point in found.points:
        assert point.load.completed == 2 * point.concurrency
        assert point.load.output_throughput
        assert point.joules_per_token is None
    assert knee(found.points, Slo({"e2el": 1e6})) is not None
    assert {(body["temperature"], body["ignore_eos"], len(body["prompt"])) for body in bodies} == {(0, True, 5)}
    assert [body["max_tokens"] for body in bodies[:4]] == [3] * 4
    assert bodies[-1]["max_tokens"] == 1, "the last run has prompts alone"
    prompts = [tuple(body["prompt"]) for body in bodies]
    assert len(set(prompts[2:4]) & set(prompts[-2:])) == 0, "no run finds its prompts in a cache"
    assert said[0] == "openai, 1 in flight"
    assert said[-1] == "openai, prompts alone"


@pytest.mark.parametrize(("concurrency", "requests"), [(1, 16), (5, 16), (6, 18), (64, 192)])
def test_a_run_has_some_rounds_of_requests(concurrency: int, requests: int) -> None:
    assert SweepOptions().requests(concurrency) == requests
