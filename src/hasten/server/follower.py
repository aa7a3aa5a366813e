"""Ranks other than 0 of a model that several processes serve: they compute, and rank 0 has the ports and answers."""

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from hasten.core.config import EngineConfig
from hasten.core.errors import ConfigError, RankError
from hasten.server.models.interfaces import Kind
from hasten.server.options import ServeOptions
from hasten.server.repository import FolderRepository

_log = logging.getLogger(__name__)


def follow(options: ServeOptions) -> int:
    """Compute until rank 0 ends; returns the exit status.

    Where this process has all ranks of a host and one of the run dies, it starts them anew and waits for rank 0, which
    its server starts again. ConfigError where it is not clear which model that is.
    """
    config = engine_of(options)
    from hasten.engine.launch import launched_rank, run_node, run_worker

    info = launched_rank(config)
    while info is not None and info.starts_node:
        try:
            run_node(config, info, around=_ignoring_signals)
            return 0
        except RankError as error:
            _log.error("%s; waiting for rank 0 to start again", error)
    with _ignoring_signals():
        run_worker(config)
    return 0


@contextmanager
def _ignoring_signals() -> Iterator[None]:
    """While ranks compute, a signal to end does nothing: whoever started them sends it to rank 0 as well.

    Rank 0 finishes what is under way and then ends the others.
    """
    before = {kind: signal.signal(kind, signal.SIG_IGN) for kind in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def engine_of(options: ServeOptions) -> EngineConfig:
    """The engine that is served: of the one version of the one token model that a repository loads at the start."""
    if options.engine is not None:
        return options.engine
    repository = FolderRepository(
        options.model_repository, auto_complete=not options.repository.disable_auto_complete_config
    )
    explicit = options.repository.model_control_mode == "explicit" and "*" not in options.repository.load_model
    names = options.repository.load_model if explicit else repository.names()
    described = [description for name in names if (description := repository.describe(name)) is not None]
    found = [(model, version) for model in described if model.kind is Kind.TOKEN for version in model.versions]
    if len(found) != 1:
        raise ConfigError(
            f"ranks that others started serve one model, but the repository has {len(found)} token models and versions "
            "to load; name one with --model-control-mode explicit --load-model"
        )
    description, version = found[0]
    return description.engine_config(version)
