"""`hasten cluster`: submit, list, get, logs, attach, delete and prune, of training jobs."""

import argparse
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

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
from hasten.cli.cluster.parser import VerbParser, VerbParsers, refuse
from hasten.cli.cluster.spec import build_spec, see_it
from hasten.cli.cluster.streams import add_attach_options, add_log_options, log_options
from hasten.cli.options import add_fields
from hasten.cluster import table
from hasten.cluster.backend import Backend, Job
from hasten.cluster.spec import TrainingJob, seconds
from hasten.core.errors import NotFoundError

Run = Callable[[argparse.Namespace], int]
_OTHER_TRAINERS = (
    *("tfjob", "tf", "mpijob", "mpi", "horovodjob", "horovod", "etjob", "et", "volcanojob", "vj", "sparkjob", "spark"),
    *("deepspeedjob", "deepspeed", "rayjob", "ray"),
)


def add_parsers(verbs: VerbParsers) -> None:
    """Add the verbs."""
    submit = verbs.add_parser("submit", help="start a training job", description="Start a training job.")
    submit.fill = _fill_submit
    listing = _add_verb(verbs, "list", run_list, "list the training jobs", "ls")
    add_all_namespaces(listing)
    get = _add_verb(verbs, "get", run_get, "show a training job, and why it waits or has failed")
    get.add_argument("name", metavar="NAME", help="the job")
    get.add_argument("-e", "--events", action="store_true", help="and what happened to it")
    get.add_argument("-g", "--gpu", action="store_true", help="and its GPUs")
    for parser in (listing, get):
        add_output(parser)

    logs = _add_verb(verbs, "logs", run_logs, "print what an instance of a job has written", "log")
    logs.add_argument("name", metavar="NAME", help="the job")
    add_log_options(logs)
    attach = _add_verb(verbs, "attach", run_attach, "run a command in an instance of a job")
    attach.add_argument("name", metavar="NAME", help="the job")
    add_attach_options(attach)
    delete = _add_verb(verbs, "delete", run_delete, "end jobs and remove all their objects", "del")
    delete.add_argument("names", metavar="NAME", nargs="+", help="the jobs")
    for parser in (listing, get, logs, attach, delete):
        add_type(parser, JOB_TYPES)

    prune = _add_verb(verbs, "prune", run_prune, "delete jobs that ended some time ago")
    prune.add_argument("-s", "--since", required=True, metavar="TIME", help="they ended longer ago, such as 12h or 7d")
    add_all_namespaces(prune)


def _add_verb(verbs: VerbParsers, name: str, run: Run, words: str, *aliases: str) -> VerbParser:
    parser = verbs.add_parser(name, aliases=aliases, help=words, description=f"{words[0].upper()}{words[1:]}.")
    add_backend_options(parser)
    parser.set_defaults(run=run)
    return parser


def _fill_submit(submit: VerbParser) -> None:
    add_backend_options(submit)
    kinds = submit.add_subparsers(title="types", metavar="TYPE", required=True, parser_class=VerbParser)
    refuse(kinds, _OTHER_TRAINERS, "hasten submits jobs of the type pytorchjob alone")
    parser = kinds.add_parser(
        "pytorchjob",
        aliases=["pytorch"],
        help="a command, on one or several instances",
        usage="%(prog)s [options] [--] COMMAND ...",
        description="Run a command to its end, on one or several instances. Its words are joined with one space and "
        "given to a shell: in one pair of quotes it arrives exactly as it is. Options stand before its first word.",
    )
    parser.words_before_command = 0
    add_backend_options(parser)
    add_dry_run(parser)
    add_fields(parser, TrainingJob, "the job")
    parser.set_defaults(run=run_submit)


def run_submit(args: argparse.Namespace) -> int:
    """Start a job, or print what would be made."""
    backend = open_backend(args)
    job = build_spec(TrainingJob, args, namespace=namespace(args, backend), command=" ".join(args.command))
    if args.dry_run:
        return print_objects(backend.plan_job(job))
    backend.submit(job)
    return print_lines([f"job {job.name} is submitted", see_it(args, backend, "get", job.name)])


def run_list(args: argparse.Namespace) -> int:
    """Print the jobs."""
    backend = open_backend(args)
    jobs = of_type(backend.jobs(one_or_all(args, backend)), args.type)
    return print_records(jobs, args.output, lambda: table.job_lines(jobs, namespaces=args.all_namespaces))


def of_type(jobs: list[Job], kind: str | None) -> list[Job]:
    """Those of a type; all of them without one."""
    return jobs if kind is None else [job for job in jobs if job.trainer.lower() == kind]


def run_get(args: argparse.Namespace) -> int:
    """Print one job."""
    job = find(open_backend(args), args)
    return print_records(job, args.output, lambda: table.job_details(job, events=args.events, gpus=args.gpu))


def find(backend: Backend, args: argparse.Namespace) -> Job:
    """The job that is named; NotFoundError where it is of another type than asked."""
    job = backend.job(args.name, namespace(args, backend))
    check_type(job, args.type)
    return job


def check_type(job: Job, kind: str | None) -> None:
    """NotFoundError where a job is not of this type."""
    if not of_type([job], kind):
        raise NotFoundError(f"job {job.name} is a {job.trainer.lower()}, not a {kind}")


def run_logs(args: argparse.Namespace) -> int:
    """Print a log."""
    options = log_options(args)
    backend = open_backend(args)
    if args.type is not None:
        find(backend, args)
    return print_lines(backend.job_logs(args.name, namespace(args, backend), options), follow=options.follow)


def run_attach(args: argparse.Namespace) -> int:
    """Run a command in an instance; its exit status is this one's."""
    backend = open_backend(args)
    if args.type is not None:
        find(backend, args)
    return backend.attach_job(args.name, namespace(args, backend), args.instance, args.container, args.command)


def run_delete(args: argparse.Namespace) -> int:
    """Delete jobs by name."""
    backend = open_backend(args)
    where = namespace(args, backend)

    def delete(name: str) -> None:
        if args.type is not None:
            check_type(backend.job(name, where), args.type)
        backend.delete_job(name, where)

    return for_each(args.names, delete, "job {} is deleted")


def run_prune(args: argparse.Namespace) -> int:
    """Delete jobs that ended long ago."""
    before = datetime.now(UTC) - timedelta(seconds=seconds(args.since, "--since"))
    backend = open_backend(args)
    old = [job for job in backend.jobs(one_or_all(args, backend)) if job.status.ended and _end(job) < before]
    if not old:
        return print_lines([f"no job ended more than {args.since} ago"])
    where = {f"{job.namespace}/{job.name}" if args.all_namespaces else job.name: job for job in old}

    def delete(label: str) -> None:
        backend.delete_job(where[label].name, where[label].namespace)

    return for_each(list(where), delete, "job {} is deleted")


def _end(job: Job) -> datetime:
    """When a job ended; the nearest earlier moment known, where its backend has not noted that."""
    return job.ended or max((instance.ended for instance in job.instances if instance.ended), default=job.created)
