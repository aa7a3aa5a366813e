"""`hasten cluster serve`: servers of Triton's protocol."""

import argparse
from collections.abc import Callable
from datetime import datetime

from hasten.cli.cluster.backend import (
    SERVER_TYPES,
    add_all_namespaces,
    add_backend_options,
    add_dry_run,
    add_output,
    add_type,
    for_each,
    namespace,
    one_or_all,
    open_backend,
    print_lines,
    print_objects,
    print_records,
)
from hasten.cli.cluster.parser import VerbParser, VerbParsers, refuse
from hasten.cli.cluster.spec import build_spec, see_it
from hasten.cli.cluster.streams import add_attach_options, add_log_options, log_options
from hasten.cli.options import add_fields, given
from hasten.cluster import table
from hasten.cluster.backend import ServerUpdate
from hasten.cluster.spec import TritonServer, checked_name
from hasten.core.errors import ConfigError

Run = Callable[[argparse.Namespace], int]
_OTHER_SERVERS = ("custom", "distributed", "tensorflow", "tf", "tensorrt", "trt", "kserve", "kfserving", "kf", "seldon")
_TRAFFIC = ("traffic-split", "traffic-router-split", "trs")


def add_parser(verbs: VerbParsers) -> None:
    """Add `serve` and its verbs."""
    serve = verbs.add_parser("serve", help="start and manage servers", description="Start and manage servers.")
    serve.fill = _fill_serve


def _fill_serve(serve: VerbParser) -> None:
    add_backend_options(serve)
    actions = serve.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=VerbParser)
    _add_triton(actions)
    refuse(actions, _OTHER_SERVERS, "hasten serves the type triton alone")
    refuse(
        actions, _TRAFFIC, "hasten does not split traffic: give one server several --replicas, or route by a --gateway"
    )

    update = actions.add_parser("update", help="change a server", description="Change a server.")
    update.fill = _fill_update
    listing = _add_verb(actions, "list", run_list, "list the servers", "ls")
    add_all_namespaces(listing)
    get = _add_verb(actions, "get", run_get, "show a server")
    get.add_argument("-e", "--events", action="store_true", help="and what happened to it")
    for parser in (listing, get):
        add_output(parser)
    logs = _add_verb(actions, "logs", run_logs, "print what an instance of a server has written", "log")
    add_log_options(logs)
    attach = _add_verb(actions, "attach", run_attach, "run a command in an instance of a server")
    add_attach_options(attach)
    for parser in (get, logs, attach):
        parser.add_argument("name", metavar="NAME", help="the server")
    delete = _add_verb(actions, "delete", run_delete, "end servers and remove all their objects", "del")
    delete.add_argument("names", metavar="NAME", nargs="+", help="the servers")
    for parser in (get, logs, attach, delete):
        parser.add_argument("-v", "--version", metavar="VERSION", help="which version, where there are several")
    for parser in (listing, get, logs, attach, delete):
        add_type(parser, SERVER_TYPES)


def _add_verb(actions: VerbParsers, name: str, run: Run, words: str, *aliases: str) -> VerbParser:
    parser = actions.add_parser(name, aliases=aliases, help=words, description=f"{words[0].upper()}{words[1:]}.")
    add_backend_options(parser)
    parser.set_defaults(run=run)
    return parser


def _add_triton(actions: VerbParsers) -> None:
    parser = actions.add_parser(
        "triton",
        help="serve a repository of models over Triton's protocol",
        description="Serve a repository of models over Triton's protocol, with hasten or with tritonserver.",
    )
    parser.fill = _fill_triton


def _fill_triton(parser: VerbParser) -> None:
    add_backend_options(parser)
    add_dry_run(parser)
    add_fields(parser, TritonServer, "the server")
    parser.set_defaults(run=run_triton)


def _fill_update(update: VerbParser) -> None:
    add_backend_options(update)
    kinds = update.add_subparsers(title="types", metavar="TYPE", required=True, parser_class=VerbParser)
    refuse(kinds, _OTHER_SERVERS, "hasten serves the type triton alone")
    parser = kinds.add_parser(
        "triton",
        help="a server of Triton's protocol",
        description="Change a server; its instances are replaced one after the other.",
    )
    add_backend_options(parser)
    parser.add_argument("--name", required=True, help="the server")
    parser.add_argument("--version", metavar="VERSION", help="which version, where there are several")
    add_fields(parser, ServerUpdate, "what changes")
    parser.set_defaults(run=run_update)


def run_triton(args: argparse.Namespace) -> int:
    """Start a server, or print what would be made."""
    backend = open_backend(args)
    version = getattr(args, "version", None) or datetime.now().strftime("%Y%m%d%H%M")
    server = build_spec(TritonServer, args, namespace=namespace(args, backend), version=version)
    if args.dry_run:
        return print_objects(backend.plan_server(server))
    backend.serve(server)
    how = see_it(args, backend, "serve", "get", server.name, "--version", server.version)
    return print_lines([f"server {server.name}, version {server.version}, is submitted", how])


def run_update(args: argparse.Namespace) -> int:
    """Change a server."""
    checked_name(args.name, "--name")
    if not given(args, ServerUpdate):
        raise ConfigError("there is nothing to change: give an option such as --replicas")
    update = build_spec(ServerUpdate, args)
    backend = open_backend(args)
    backend.update_server(args.name, args.version, namespace(args, backend), update)
    versioned = ["--version", args.version] if args.version else []
    return print_lines([f"server {args.name} is updated", see_it(args, backend, "serve", "get", args.name, *versioned)])


def run_list(args: argparse.Namespace) -> int:
    """Print the servers."""
    backend = open_backend(args)
    servers = backend.servers(one_or_all(args, backend))
    return print_records(
        servers,
        args.output,
        lambda: table.server_lines(servers, namespaces=args.all_namespaces, all_ports=args.output == "wide"),
    )


def run_get(args: argparse.Namespace) -> int:
    """Print one server."""
    backend = open_backend(args)
    server = backend.server(args.name, args.version, namespace(args, backend))
    return print_records(server, args.output, lambda: table.server_details(server, events=args.events))


def run_logs(args: argparse.Namespace) -> int:
    """Print a log."""
    options = log_options(args)
    backend = open_backend(args)
    lines = backend.server_logs(args.name, args.version, namespace(args, backend), options)
    return print_lines(lines, follow=options.follow)


def run_attach(args: argparse.Namespace) -> int:
    """Run a command in an instance; its exit status is this one's."""
    backend = open_backend(args)
    where = namespace(args, backend)
    return backend.attach_server(args.name, args.version, where, args.instance, args.container, args.command)


def run_delete(args: argparse.Namespace) -> int:
    """Delete servers by name."""
    backend = open_backend(args)
    where = namespace(args, backend)
    return for_each(args.names, lambda name: backend.delete_server(name, args.version, where), "server {} is deleted")
