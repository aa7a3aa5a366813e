"""A rank other than 0 of a model that several processes serve: it computes, and rank 0 has the ports and answers."""

import signal

from hasten.core.config import EngineConfig
from hasten.core.errors import ConfigError
from hasten.server.models.interfaces import Kind
from hasten.server.options import ServeOptions
from hasten.server.repository import FolderRepository


def follow(options: ServeOptions) -> int:
    """Compute until rank 0 ends; returns the exit status.

    ConfigError where it is not clear which model that is. A signal to end does nothing here: whoever started the ranks
    sends it to rank 0 as well, which finishes what is under way and then ends the others.
    """
    config = options.engine or _engine_of(options)
    from hasten.engine.launch import run_worker

    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, signal.SIG_IGN)
    run_worker(config)
    return 0


def _engine_of(options: ServeOptions) -> EngineConfig:
    """The engine of the one version of the one token model that is loaded at the start."""
    repository = FolderRepository(
        options.model_repository, auto_complete=not options.repository.disable_auto_complete_config
    )
    explicit = options.repository.model_control_mode == "explicit" and "*" not in options.repository.load_model
    names = options.repository.load_model if explicit else repository.names()
    described = [description for name in names if (description := repository.describe(name)) is not None]
    found = [(one, version) for one in described if one.kind is Kind.TOKEN for version in one.versions]
    if len(found) != 1:
        raise ConfigError(
            f"ranks that others started serve one model, but the repository has {len(found)} token models and versions "
            "to load; name one with --model-control-mode explicit --load-model"
        )
    description, version = found[0]
    return description.engine_config(version)
