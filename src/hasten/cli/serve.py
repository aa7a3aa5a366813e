"""`hasten serve`: a model, or a repository of models, behind gRPC and HTTP."""

import argparse
import dataclasses
import typing
from typing import Any

from hasten.cli.options import Parser, add_engine_options, add_fields, engine_options, given, path
from hasten.core.config import EngineConfig
from hasten.core.errors import ConfigError
from hasten.core.extras import require_extra
from hasten.core.parallel_config import ParallelConfig
from hasten.server.options import (
    EndpointOptions,
    LogOptions,
    ModelOptions,
    RepositoryOptions,
    SecurityOptions,
    ServeOptions,
    ServerOptions,
)

_PARTS: dict[str, tuple[type[Any], str]] = {
    "endpoints": (EndpointOptions, "where to listen"),
    "repository": (RepositoryOptions, "with --model-repository"),
    "model": (ModelOptions, "with MODEL"),
    "server": (ServerOptions, "the server"),
    "log": (LogOptions, "log"),
    "security": (SecurityOptions, "security"),
}
_TRUE, _FALSE = ("true", "1", "on"), ("false", "0", "off")


def add_parser(commands: "argparse._SubParsersAction[Parser]") -> None:
    """Add the subcommand `serve`."""
    parser = commands.add_parser(
        "serve",
        fromfile_prefix_chars="@",
        help="serve a model over Triton's, OpenAI's and Anthropic's APIs",
        description="Serve a model, or the models of a repository, over Triton's protocol (gRPC and HTTP) and "
        "OpenAI's and Anthropic's APIs. Options have tritonserver's names where it has them. Switches take true or "
        "false; alone they mean true. @FILE stands for the options in a file, one per line, as `hasten tune` writes "
        "them.",
    )
    parser.add_argument(
        "model", type=path, metavar="MODEL", nargs="?", help="folder of the checkpoint, or its Hugging Face id"
    )
    parser.add_argument(
        "--model-repository",
        "--model-store",
        action="append",
        default=[],
        type=path,
        metavar="DIR",
        help="folder of models, each NAME/config.pbtxt with NAME/VERSION; may be given more than once",
    )
    for kind, title in _PARTS.values():
        switches = _switches(kind)
        add_fields(parser, kind, title, skip=set(switches))
        group = parser.add_argument_group(f"{title}, on or off") if switches else None
        for name, field in switches.items():
            assert group is not None
            group.add_argument(
                f"--{name.replace('_', '-')}",
                type=_switch,
                nargs="?",
                const=True,
                default=argparse.SUPPRESS,
                metavar="true|false",
                help=f"{field.metadata['help']} (default: {str(field.default).lower()})",
            )
    add_engine_options(parser, chats=True)
    parser.set_defaults(run=run)


def _switches(kind: type[Any]) -> dict[str, "dataclasses.Field[Any]"]:
    hints = typing.get_type_hints(kind)
    return {field.name: field for field in dataclasses.fields(kind) if hints[field.name] is bool}


def _switch(text: str) -> bool:
    if text.lower() not in (*_TRUE, *_FALSE):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() in _TRUE


def run(args: argparse.Namespace) -> int:
    """Serve until a signal comes."""
    require_extra("serve", "hasten serve")
    from hasten.parallel.rank import on_several_hosts, rank_info

    options = serve_options(args)
    engine = options.engine
    if engine is None and on_several_hosts():
        # what a repository has is read before it is served only where it says which ranks this host has
        from hasten.server.follower import engine_of

        engine = engine_of(options)
    rank = rank_info(ParallelConfig() if engine is None else engine.parallel)
    if rank is not None and options.model.data_parallel_size > 1:
        raise ConfigError(
            f"data_parallel_size is {options.model.data_parallel_size}, but this is one of {rank.size} ranks that "
            "torchrun, mpirun or a cluster started, which serve one engine; leave the option out"
        )
    if rank is not None and rank.rank > 0:
        from hasten.server.follower import follow

        return follow(options)
    if options.engine is not None:
        options = _with_engines_ahead(options, options.engine)

    from hasten.server.app import run_server

    return run_server(options)


def _with_engines_ahead(options: ServeOptions, engine: EngineConfig) -> ServeOptions:
    """The options with a folder in place of the model's name, and its engines' processes started.

    What the models are called, and whether there is a tokenizer, is known only then. While this process imports the
    server, the others import torch.
    """
    from hasten.checkpoint.hub import resolve_engine
    from hasten.core.gpu_weights import folder_of
    from hasten.parallel.rank import rank_info
    from hasten.server.engine import spawned

    options = dataclasses.replace(options, engine=resolve_engine(engine))
    assert options.engine is not None
    count = options.model.data_parallel_size
    spawned.start_ahead(
        count, folder_of(options.engine) if count == 1 and rank_info(ParallelConfig()) is None else None
    )
    return options


def serve_options(args: argparse.Namespace) -> ServeOptions:
    """What the command line asks for; ConfigError for options that have no effect on what is served."""
    parts = {name: given(args, kind) for name, (kind, _) in _PARTS.items()}
    engine = engine_options(args)
    if args.model is None:
        unused, why = {**parts["model"], **engine}, "of one MODEL: write it into the model's config.pbtxt"
    else:
        unused, why = parts["repository"], "of --model-repository"
    for name in unused:
        raise ConfigError(f"--{name.replace('_', '-')} is an option {why}")
    return ServeOptions(
        engine=None if args.model is None else EngineConfig.create(args.model, **engine),
        model_repository=tuple(args.model_repository),
        **{name: kind(**_tuples(parts[name])) for name, (kind, _) in _PARTS.items()},
    )


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
