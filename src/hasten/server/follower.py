"""Ranks other than 0 of a model that several processes serve: they compute, and rank 0 has the ports and answers."""

import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType

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

    info, signals = launched_rank(config), _Signals()
    while info is not None and info.starts_node:
        try:
            run_node(config, info, starting=signals.ignored, running=signals.noted)
            return 0
        except RankError as error:
            if signals.came:
                _log.error("%s; this host was signalled to end and does not wait for rank 0", error)
                return 1
            _log.error("%s; waiting for rank 0 to start again", error)
    with signals.ignored():
        run_worker(config)
    return 0


class _Signals:
    """Signals to end, which whoever started the ranks sends to rank 0 as well.

    While ranks compute they end nothing: rank 0 finishes what is under way and then ends the others.
    """

    def __init__(self) -> None:
        self.came = False
        """While they were noted."""

    def ignored(self) -> AbstractContextManager[None]:
        """By this process, and by those that it starts meanwhile."""
        return _handled_by(signal.SIG_IGN)

    def noted(self) -> AbstractContextManager[None]:
        """By this process alone."""
        return _handled_by(self._note)

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self.came = True


@contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> Iterator[None]:
    before = {kind: signal.signal(kind, handler) for kind in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for kind, earlier in before.items():
            signal.signal(kind, earlier)


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
