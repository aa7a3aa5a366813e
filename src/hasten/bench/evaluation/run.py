"""A report: its subject, its measured sections, and what is derived from them."""

import dataclasses
from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

from hasten.bench.engines import HastenEngine
from hasten.bench.evaluation.engines import Engines
from hasten.bench.evaluation.form import Knee, ModelReport
from hasten.bench.evaluation.headline import headline
from hasten.bench.evaluation.limits import cost, roofline
from hasten.bench.evaluation.measured import Sections
from hasten.bench.evaluation.options import ReportOptions
from hasten.bench.evaluation.provenance import file_hashes, provenance
from hasten.bench.evaluation.store import SectionStore
from hasten.bench.evaluation.subject import Subject
from hasten.bench.report import Environment, environment
from hasten.bench.slo import Slo
from hasten.bench.sweep import Sweep, knee
from hasten.checkpoint.hub import model_name
from hasten.ops import TORCH_DTYPES


class Evaluation:
    """One report: its sections, each from the store or measured.

    ConfigError or UnsupportedError, before anything is measured, for a model or options that cannot be reported on.
    """

    def __init__(self, options: ReportOptions, folder: Path, *, fresh: bool, say: Callable[[str], None]) -> None:
        self._subject = subject = Subject.of(options)
        say("hashes of the files …")
        files = file_hashes(Path(subject.engine.model))
        now = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
        self._provenance = provenance(options.command, now, files, subject.gpus)
        identity = {
            "model": self._provenance.model_sha256,
            "packages": self._provenance.packages,
            "device": self._environment().device,
            "gpus": self._provenance.gpus,
            "threads": subject.threads,
            "engine": dict(options.engine),
        }
        self._sections = Sections(subject, SectionStore(folder, identity, fresh=fresh, say=say), say)

    def report(self) -> ModelReport:
        """Measure what is missing, and put all sections together."""
        subject, sections, notes = self._subject, self._sections, list[str]()
        options = subject.options
        sections.require_servers()
        planned = sections.plan(notes)
        starts = sections.starts()
        sweeps = [sections.served(), *map(sections.served_at, options.against.urls)]
        with ExitStack() as stack:
            engines = Engines(stack, options, subject.engine, subject.max_len, subject.threads)
            found = sections.accuracy(engines)
            latencies = sections.latencies(engines)
        own = [each for each in latencies.results if each.engine == HastenEngine.label]
        notes += [each.line for each in dict.fromkeys([*found.not_measured, *latencies.not_measured])]
        best = knee(sweeps[0].points, options.slo)
        price = options.price_per_hour
        report = ModelReport(
            model=model_name(options.model),
            headline="",
            slo=str(options.slo),
            provenance=dataclasses.replace(self._provenance, environment=self._environment()),
            accuracy=found,
            latency=latencies,
            serving=sweeps,
            knees=[_knee(each, options.slo) for each in sweeps],
            cost=None if price is None or best is None else cost(price, sweeps[0], best),
            plan=planned,
            roofline=None if planned is None else roofline(subject.model, planned.device, subject.setup, own),
            startup=starts,
            notes=notes,
        )
        report["headline"] = headline(report)
        return report

    def _environment(self) -> Environment:
        return environment(self._subject.device, TORCH_DTYPES[self._subject.setup.dtype])


def _knee(measured: Sweep, slo: Slo) -> Knee:
    found = knee(measured.points, slo)
    return Knee(measured.label, None if found is None else found.concurrency)
