"""`hasten repository`: model repositories as `hasten serve --model-repository` reads them."""

import argparse
from dataclasses import replace
from pathlib import Path

from hasten.cli.options import HOST_OPTIONS, Parser, add_engine_options, engine_options, path
from hasten.core.config import EngineConfig
from hasten.core.errors import ConfigError
from hasten.core.extras import require_extra

SERVERS = ("hasten", "triton")


def add_parser(commands: "argparse._SubParsersAction[Parser]") -> None:
    """Add the subcommand `repository`."""
    parser = commands.add_parser(
        "repository", help="create model repositories", description="Create model repositories."
    )
    actions = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    create = actions.add_parser(
        "create",
        help="write a model repository for a checkpoint",
        description="Write a model repository for a checkpoint: the token model `fastertransformer`, the ensemble "
        "`preprocessing`, `fastertransformer`, `postprocessing` around it, and a text model; for a model of vectors or "
        "scores the token model and the text model. The weights stay where they are. What is written may be edited; "
        "options given here are parameters of the token model.",
    )
    create.add_argument("model", type=path, metavar="MODEL", help="folder of the checkpoint, or its Hugging Face id")
    create.add_argument("target", type=path, metavar="DIR", help="folder to write the models' folders into")
    create.add_argument(
        "--for",
        dest="server",
        choices=SERVERS,
        default=SERVERS[0],
        help="server to write it for: hasten, or Triton, whose Python backend then runs hasten's engine as the "
        "token model (default: %(default)s)",
    )
    create.add_argument("--name", default="fastertransformer", help="name of the token model (default: %(default)s)")
    create.add_argument("--text-name", metavar="NAME", help="name of the text model (default: that of MODEL's folder)")
    create.add_argument(
        "--decoupled", action="store_true", help="let the token model and the ensemble stream responses"
    )
    add_engine_options(create, skip=HOST_OPTIONS, chats=True)
    create.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the repository and print the models' folders."""
    require_extra("serve", "hasten repository")
    from hasten.checkpoint.hub import resolve_engine

    engine = resolve_engine(EngineConfig.create(args.model, **engine_options(args)))
    tokenizer = None if engine.tokenizer is None else str(Path(engine.tokenizer).resolve())
    engine = replace(engine, model=str(Path(engine.model).resolve()), tokenizer=tokenizer)
    folders = _for_triton(args, engine) if args.server == "triton" else _for_hasten(args, engine)
    for folder in folders:
        print(folder)
    return 0


def _for_hasten(args: argparse.Namespace, engine: EngineConfig) -> list[Path]:
    from hasten.server.create import model_configs, write_repository

    configs = model_configs(engine, token_name=args.name, text_name=args.text_name, decoupled=args.decoupled)
    target = Path(args.target)
    write_repository(configs, target, engine)
    return [target / config.name for config in configs]


def _for_triton(args: argparse.Namespace, engine: EngineConfig) -> list[Path]:
    from hasten.server.create import create_triton_repository

    if args.text_name is not None:
        raise ConfigError("--text-name has no meaning with --for triton: there is the token model alone")
    return [create_triton_repository(engine, Path(args.target), name=args.name, decoupled=args.decoupled)]
