"""The sections of a report that are measured, each taken from the store where it has it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from hasten.bench import lambada, latency, startup
from hasten.bench.evaluation.accuracy import Accuracy, accuracy
from hasten.bench.evaluation.engines import Engines
from hasten.bench.evaluation.form import Latencies, Starts
from hasten.bench.evaluation.limits import Plan, plan
from hasten.bench.evaluation.store import SectionStore
from hasten.bench.evaluation.subject import Subject, tenths
from hasten.bench.load.prompts import PromptWriter
from hasten.bench.sweep import Server, Sweep, running, started, sweep
from hasten.bench.workloads import fixed
from hasten.core.errors import HastenError
from hasten.engine.planning import hardware


class Sections:
    """The measured sections of a report on a subject; `say` receives progress."""

    def __init__(self, subject: Subject, store: SectionStore, say: Callable[[str], None]) -> None:
        self._subject, self._store, self._say = subject, store, say

    def plan(self, notes: list[str]) -> Plan | None:
        """Device and memory; None, with a note, for models that a plan does not know."""
        subject = self._subject
        if subject.engine.parallel.pipeline_parallel_size > 1:
            notes.append("no memory plan and no roofline: they do not know pipeline stages")
            return None
        if (stored := subject.stored_format) is not None:
            notes.append(f"no memory plan and no roofline: they do not know the bytes of weights in {stored}")
            return None
        try:
            gpu = hardware.this_gpu() if subject.device.type == "cuda" else None
            return self._store.section(
                "memory plan",
                Plan,
                {"setup": subject.setup},
                lambda: plan(subject.model, gpu or hardware.this_cpu(), subject.setup),
            )
        except HastenError as error:
            notes.append(f"no memory plan and no roofline: {error}")
            return None

    def starts(self) -> Starts:
        """Cold and warm starts, each in a process of its own."""
        subject, repetitions = self._subject, self._subject.options.scale.starts

        def measure() -> Starts:
            measured = startup.measure(subject.engine.model, subject.start_options, repetitions=repetitions)
            return Starts(measured.starts)

        return self._store.section("start", Starts, {"repetitions": repetitions}, measure)

    def served(self) -> Sweep:
        """The model, served by hasten, at more and more requests in flight."""
        subject = self._subject

        def measure() -> Sweep:
            with started(subject.engine, subject.gpus) as server:
                return sweep(server, subject.concurrencies, subject.options.scale.load, self._say)

        return self._store.section("served model", Sweep, self._load, measure)

    def require_servers(self) -> None:
        """EngineError where a server that is still to be measured does not answer: better before hours than after."""
        for url in self._subject.options.against.urls:
            if not self._store.has(f"server at {url}", Sweep, {"url": url, **self._load}):
                self._running(url)

    def served_at(self, url: str) -> Sweep:
        """The same load on a server that runs."""
        subject = self._subject

        def measure() -> Sweep:
            return sweep(self._running(url), subject.concurrencies, subject.options.scale.load, self._say)

        return self._store.section(f"server at {url}", Sweep, {"url": url, **self._load}, measure)

    def _running(self, url: str) -> Server:
        return running(url, PromptWriter(self._subject.tokenizer))

    def accuracy(self, engines: Engines) -> Accuracy:
        """Last words of the texts, engines in turns batch by batch."""
        subject, options = self._subject, self._subject.options
        times = options.scale.accuracy_repetitions

        def measure() -> Accuracy:
            results = lambada.run(
                engines.all,
                subject.samples,
                subject.tokenizer,
                batch_size=options.batch_size,
                repetitions=times,
                advance=tenths(self._say, len(subject.samples) * times, "texts"),
            )
            return accuracy(
                results,
                engines.llm,
                subject.tokenizer,
                dataset=Path(options.dataset).name,
                batch_size=options.batch_size,
                not_measured=engines.not_measured,
            )

        known = {"texts": subject.samples_hash, "repetitions": times, "batch_size": options.batch_size}
        return self._store.section("accuracy", Accuracy, {**self._compared, **known}, measure)

    def latencies(self, engines: Engines) -> Latencies:
        """Times of batches of equal requests, engines in turns."""
        scale = self._subject.options.scale

        def measure() -> Latencies:
            results = []
            for size in scale.batch_sizes:
                self._say(f"latency, batch {size}")
                workload = fixed(size, scale.latency_length, scale.latency_length)
                vocab_size = engines.llm.config.vocab_size
                results += latency.measure(engines.all, workload, vocab_size, repetitions=scale.repetitions)
            return Latencies(results, engines.not_measured)

        known = {
            "batch_sizes": scale.batch_sizes,
            "length": scale.latency_length,
            "repetitions": scale.repetitions,
        }
        return self._store.section("latency", Latencies, {**self._compared, **known}, measure)

    @property
    def _load(self) -> dict[str, Any]:
        return {"concurrencies": self._subject.concurrencies, "load": self._subject.options.scale.load}

    @property
    def _compared(self) -> dict[str, Any]:
        options = self._subject.options
        return {"against": options.against.engines, "hf_model": options.hf_model}
