"""An open-loop load on a server: each request is sent when it is due, whatever became of those before it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from hasten.bench.load.arrivals import AT_ONCE
from hasten.bench.load.client import ClientOptions, Ran
from hasten.bench.load.metrics import LoadResult, result_of
from hasten.bench.load.processes import LoadClients
from hasten.bench.load.prompts import PromptWriter
from hasten.bench.load.reply import Record
from hasten.bench.load.workload import Conversation, Schedule, Workload
from hasten.bench.slo import Slo
from hasten.core.errors import EngineError
from hasten.core.progress import progress_bar

_WARM_UP_RUN = -1
"""Its random prompts are those of no measured run."""


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """What is measured."""

    schedules: Sequence[Schedule]
    """One per run."""
    processes: int = 1
    warm_ups: int = 1
    """Requests before the first run, one after the other."""
    slo: Slo = field(default_factory=Slo)
    """What a request has to meet to count for the goodput."""
    show_progress: bool = True


def measure(
    client: ClientOptions, workload: Workload, writer: PromptWriter, options: LoadOptions
) -> Iterator[LoadResult]:
    """Run each schedule and yield its figures; EngineError where the server answers no request of a run."""
    with LoadClients(client, options.processes) as clients:
        _warm_up(clients, workload, options.warm_ups)
        for number, schedule in enumerate(options.schedules):
            plan = workload.plan(number, schedule)
            ran = _run(clients, plan, client, schedule, options.show_progress)
            for each in ran:
                _count_tokens(each.records, writer)
            _require_answers(ran, plan)
            yield result_of(
                ran,
                request_rate=schedule.name,
                max_concurrency=client.max_concurrency,
                slo=options.slo,
            )


def _run(
    clients: LoadClients, plan: list[Conversation], client: ClientOptions, schedule: Schedule, show_progress: bool
) -> list[Ran]:
    with progress_bar(f"rate {schedule.name}", sum(len(each.turns) for each in plan), show=show_progress) as bar:
        return clients.run(
            plan,
            waits_for_slots=schedule.at_once and client.max_concurrency is not None,
            duration=schedule.duration,
            progress=_advance(bar.advance),
        )


def _advance(advance: Callable[[float], None]) -> Callable[[int], None]:
    """A function of the requests that have ended so far that moves a bar on."""
    seen = 0

    def take(done: int) -> None:
        nonlocal seen
        advance(done - seen)
        seen = done

    return take


def _warm_up(clients: LoadClients, workload: Workload, count: int) -> None:
    """Send requests one after the other; EngineError where one fails: no other will go well."""
    for number in range(count):
        plan = workload.plan(_WARM_UP_RUN - number, Schedule(rate=AT_ONCE, num_prompts=1))
        _require_answers(clients.run([Conversation(plan[0].turns[:1])]), plan)


def _require_answers(ran: Sequence[Ran], plan: Sequence[Conversation]) -> None:
    records = [record for each in ran for record in each.records]
    if not all(record.error for record in records):
        return
    if not records:
        raise EngineError(f"none of {len(plan)} requests was due within the duration; raise it")
    failed = f"all {len(records)} requests failed" if len(records) > 1 else "the request failed"
    raise EngineError(f"{failed}, the first with {records[0].error}: {records[0].message}")


def _count_tokens(records: Sequence[Record], writer: PromptWriter) -> None:
    """Count with the tokenizer what the server has not counted."""
    if not writer.has_tokenizer:
        return
    for record in records:
        if record.error:
            continue
        if record.output_tokens is None:
            record.output_tokens = writer.count(record.output)
        if record.input_tokens is None:
            record.input_tokens = writer.count(record.prompt)
