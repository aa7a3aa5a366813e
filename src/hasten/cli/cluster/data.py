"""`hasten cluster data`: volumes that jobs and servers mount by name. `hasten cluster top`: who uses the GPUs."""

import argparse

from hasten.cli.cluster.backend import (
    JOB_TYPES,
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
from hasten.cli.cluster.jobs import find, of_type
from hasten.cli.cluster.parser import VerbParser, VerbParsers
from hasten.cli.cluster.spec import build_spec
from hasten.cli.options import add_fields
from hasten.cluster import table
from hasten.cluster.backend import Node
from hasten.cluster.spec import Volume
from hasten.core.errors import NotFoundError


def add_parsers(verbs: VerbParsers) -> None:
    """Add `data` and `top`."""
    data = verbs.add_parser("data", help="create and list volumes", description="Create and list volumes.")
    data.fill = _fill_data
    top = verbs.add_parser("top", help="show who uses the GPUs", description="Show who uses the GPUs.")
    top.fill = _fill_top


def _fill_data(data: VerbParser) -> None:
    add_backend_options(data)
    actions = data.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=VerbParser)
    listing = actions.add_parser("list", aliases=["ls"], help="list the volumes", description="List the volumes.")
    add_all_namespaces(listing)
    add_output(listing)
    listing.set_defaults(run=run_list)
    create = actions.add_parser(
        "create",
        help="create a volume",
        description="Create a volume that jobs and servers mount with --data NAME:/PATH.",
    )
    create.add_argument("name", metavar="NAME", help="its name")
    add_dry_run(create)
    add_fields(create, Volume, "the volume")
    create.set_defaults(run=run_create)
    delete = actions.add_parser(
        "delete", aliases=["del"], help="forget volumes", description="Forget volumes; their data stays."
    )
    delete.add_argument("names", metavar="NAME", nargs="+", help="the volumes")
    delete.set_defaults(run=run_delete)
    for parser in (listing, create, delete):
        add_backend_options(parser)


def _fill_top(top: VerbParser) -> None:
    add_backend_options(top)
    kinds = top.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=VerbParser)
    node = kinds.add_parser("node", help="by machine", description="Show the machines and their GPUs.")
    node.add_argument("names", metavar="NAME", nargs="*", help="these machines alone")
    node.set_defaults(run=run_top_node)
    job = kinds.add_parser("job", help="by training job", description="Show the training jobs, most GPUs first.")
    job.add_argument("name", metavar="NAME", nargs="?", help="this job alone")
    add_all_namespaces(job)
    add_type(job, JOB_TYPES)
    job.set_defaults(run=run_top_job)
    for parser in (node, job):
        add_output(parser)
        add_backend_options(parser)


def run_list(args: argparse.Namespace) -> int:
    """Print the volumes."""
    backend = open_backend(args)
    volumes = backend.volumes(one_or_all(args, backend))
    return print_records(volumes, args.output, lambda: table.volume_lines(volumes, namespaces=args.all_namespaces))


def run_create(args: argparse.Namespace) -> int:
    """Make a volume, or print what would be made."""
    backend = open_backend(args)
    volume = build_spec(Volume, args, namespace=namespace(args, backend))
    if args.dry_run:
        return print_objects(backend.plan_volume(volume))
    backend.create_volume(volume)
    return print_lines([f"volume {volume.name} is created"])


def run_delete(args: argparse.Namespace) -> int:
    """Forget volumes by name."""
    backend = open_backend(args)
    where = namespace(args, backend)
    return for_each(args.names, lambda name: backend.delete_volume(name, where), "volume {} is deleted")


def run_top_node(args: argparse.Namespace) -> int:
    """Print the machines."""
    nodes = _named(open_backend(args).nodes(), args.names)
    return print_records(nodes, args.output, lambda: table.node_lines(nodes))


def _named(nodes: list[Node], names: list[str]) -> list[Node]:
    missing = sorted(set(names) - {node.name for node in nodes})
    if missing:
        raise NotFoundError(f"there is no node {' nor '.join(missing)}")
    return [node for node in nodes if not names or node.name in names]


def run_top_job(args: argparse.Namespace) -> int:
    """Print the jobs and their GPUs."""
    backend = open_backend(args)
    jobs = [find(backend, args)] if args.name else of_type(backend.jobs(one_or_all(args, backend)), args.type)
    return print_records(jobs, args.output, lambda: table.top_job_lines(jobs, namespaces=args.all_namespaces))
