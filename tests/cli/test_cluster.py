"""The command `hasten cluster` as a whole: its start, where it runs, completion."""

import argparse
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.cli.memory_backend import MemoryBackend
from tests.waiting import attempts

import hasten
from hasten.cli.cluster import backend as cluster_backend
from hasten.cli.cluster.parser import VerbParser
from hasten.cli.main import build_parser, main

TIMED = """
import sys, time
from hasten.cli.main import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    assert end.code == 0, end.code
heavy = {"torch", "transformers", "numpy", "rich", "kubernetes", "yaml", "psutil", "hasten.cluster.local.backend"}
print("heavy:", sorted(heavy & set(sys.modules)), file=sys.stderr)
print("cpu:", time.process_time(), file=sys.stderr)
"""


@pytest.mark.parametrize("argv", [(), ("submit", "pytorchjob"), ("serve", "triton")])
def test_help_is_quick_and_imports_nothing_heavy(argv: tuple[str, ...]) -> None:
    command = [sys.executable, "-c", TIMED, "cluster", *argv, "--help"]
    for _ in attempts("help for half a second of CPU time"):  # the first one may compile modules
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert "heavy: []" in done.stderr
        assert done.stdout.startswith("usage: hasten cluster")
        if float(done.stderr.rpartition("cpu: ")[2]) < 0.5:
            break


def test_help_of_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    for path in all_paths():
        with pytest.raises(SystemExit) as left:
            main([*path, "--help"])
        assert left.value.code == 0
        assert capsys.readouterr().out.startswith(f"usage: hasten {' '.join(path)}")


def all_paths() -> list[list[str]]:
    """Of cluster's verbs, without aliases and those that are refused."""
    cluster = subparsers(build_parser())["cluster"]
    return [
        path.split()
        for path in sorted({descendant.prog.removeprefix("hasten ") for descendant in descendants(cluster)})
    ]


def subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    if isinstance(parser, VerbParser):
        parser.filled()
    actions = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return {name: child for action in actions for name, child in action.choices.items() if child.add_help}


def descendants(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    return [parser, *(found for child in subparsers(parser).values() for found in descendants(child))]


def test_every_verb_takes_the_options_of_the_backend() -> None:
    without = {"hasten cluster completion"}
    for parser in descendants(subparsers(build_parser())["cluster"]):
        taken = {"-n", "--cluster", "--config", "--loglevel", "--arena-namespace"} <= set(parser._option_string_actions)
        assert taken == (parser.prog not in without), parser.prog


def test_whoami_and_version(backend: MemoryBackend, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cluster", "whoami"]) == 0
    assert main(["cluster", "version"]) == 0
    assert capsys.readouterr().out == f"somebody\nhasten: {hasten.__version__}\nmemory: 1.0\n"


Opened = list[argparse.Namespace]


@pytest.fixture
def opened(backend: MemoryBackend, monkeypatch: pytest.MonkeyPatch) -> Opened:
    """What the Kubernetes backend was opened with."""
    found: Opened = []

    def kubernetes(args: argparse.Namespace) -> MemoryBackend:
        found.append(args)
        return backend

    monkeypatch.setitem(cluster_backend.BACKENDS, "kubernetes", kubernetes)
    return found


@pytest.mark.parametrize(
    ("argv", "variable", "kubernetes"),
    [
        (("whoami",), None, False),
        (("whoami",), "", False),
        (("whoami",), "kubernetes", True),
        (("whoami", "--cluster", "local"), "kubernetes", False),
        (("whoami", "--cluster", "kubernetes"), None, True),
        (("--cluster", "kubernetes", "whoami"), None, True),
        (("--cluster", "kubernetes", "whoami", "--cluster", "local"), None, False),
        (("serve", "--cluster", "kubernetes", "list"), "local", True),
    ],
)
def test_which_backend(
    opened: Opened, monkeypatch: pytest.MonkeyPatch, argv: tuple[str, ...], variable: str | None, kubernetes: bool
) -> None:
    if variable is not None:
        monkeypatch.setenv("HASTEN_CLUSTER", variable)
    assert main(["cluster", *argv]) == 0
    assert bool(opened) == kubernetes


def test_the_kubeconfig_is_kubernetes_own(
    opened: Opened, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--config", "file", "--context", "one")
    assert main(["cluster", *options, "whoami", "--cluster", "kubernetes"]) == 0
    assert (opened[0].kubeconfig, opened[0].context) == ("file", "one")
    monkeypatch.undo()
    for flag in ("--config", "--context"):
        assert main(["cluster", "--cluster", "local", "whoami", flag, "x"]) == 2
        assert capsys.readouterr().err.startswith(f"hasten: error: {flag} is of Kubernetes: add --cluster kubernetes")


def test_a_backend_that_is_not_known(
    backend: MemoryBackend, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cluster", "list", "--cluster", "slurm"]) == 2
    assert "invalid choice: 'slurm'" in capsys.readouterr().err
    monkeypatch.setenv("HASTEN_CLUSTER", "slurm")
    assert main(["cluster", "list"]) == 2
    assert "HASTEN_CLUSTER is 'slurm', which is none of local, kubernetes" in capsys.readouterr().err


def test_log_level() -> None:
    code = (
        "import sys, logging\n"
        "from hasten.cli.cluster import backend\n"
        "from hasten.cli.main import main\n"
        "from tests.cli.memory_backend import MemoryBackend\n"
        "class Talks(MemoryBackend):\n"
        "    def whoami(self):\n"
        "        logging.getLogger('hasten.cluster').info('asked')\n"
        "        logging.getLogger('kubernetes.client.rest').debug('a secret')\n"
        "        return 'somebody'\n"
        "backend.BACKENDS['local'] = lambda args: Talks()\n"
        "sys.exit(main(['cluster', 'whoami', *sys.argv[1:]]))"
    )
    root = Path(__file__).parents[2]
    for level, message in ((None, ""), ("warn", ""), ("info", "INFO hasten.cluster: asked\n"), ("debug", "INFO ")):
        argv = [] if level is None else ["--loglevel", level]
        command = [sys.executable, "-c", code, "--cluster", "local", *argv]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
        assert (done.stdout, done.stderr.startswith(message)) == ("somebody\n", True)
        assert "secret" not in done.stderr
        assert bool(message) == bool(done.stderr)
    assert logging.getLogger("hasten").level == logging.NOTSET


def completion(shell: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["cluster", "completion", shell]) == 0
    return capsys.readouterr().out


def bash(script: str, *argv: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(["bash", *argv], input=script, capture_output=True, text=True, check=False)


Complete = Callable[..., list[str]]


@pytest.fixture
def complete(capsys: pytest.CaptureFixture[str]) -> Complete:
    """What bash offers for the last of some words."""
    script = completion("bash", capsys)

    def run(*words: str) -> list[str]:
        setup = f"COMP_WORDS=({' '.join(map(repr, words))}); COMP_CWORD={len(words) - 1}; _hasten"
        done = bash(f'{script}\n{setup}\nprintf "%s\\n" "${{COMPREPLY[@]}}"')
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout.split()

    return run


def test_the_bash_script(capsys: pytest.CaptureFixture[str], complete: Complete) -> None:
    assert bash(completion("bash", capsys), "-n").stderr == ""
    assert complete("hasten", "clu") == ["cluster"]
    assert complete("hasten", "cluster", "s") == ["submit", "serve"]
    assert complete("hasten", "cluster", "serve", "t") == ["triton"]
    assert complete("hasten", "cluster", "-n", "space", "submit", "py") == ["pytorchjob", "pytorch"]
    assert complete("hasten", "cluster", "submit", "pytorchjob", "--image-pull-p") == ["--image-pull-policy"]
    assert complete("hasten", "cluster", "list", "-o", "") == ["wide", "json", "yaml"]
    assert complete("hasten", "cluster", "list", "-o", "json", "--all") == ["--all-namespaces", "--allNamespaces"]
    assert complete("hasten", "cluster", "completion", "z") == ["zsh"]
    assert complete("hasten", "convert", "--verb") == ["--verbose"]
    assert complete("hasten", "cluster", "submit", "tfj") == []


def test_the_zsh_script(capsys: pytest.CaptureFixture[str]) -> None:
    script = completion("zsh", capsys)
    assert script.startswith("#compdef hasten\n")
    common = script[: script.index("\n_hasten() {")]
    done = bash(f"{common}\n_hasten_candidates hasten cluster data")
    assert done.stdout.split()[:3] == ["list", "ls", "create"]
    assert script.endswith("compdef _hasten hasten\n")


def test_the_fish_script(capsys: pytest.CaptureFixture[str]) -> None:
    lines = completion("fish", capsys).splitlines()
    opened = [line for line in lines if line.split()[:1] and line.split()[0] in ("function", "switch", "for", "if")]
    assert [line.strip() for line in lines].count("end") == len(opened)
    at = lines.index("        case 'hasten cluster top'")
    assert lines[at + 1].split()[:4] == ["printf", "'%s\\n'", "node", "job"]


def test_a_shell_that_is_not_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cluster", "completion", "tcsh"]) == 2
    assert "invalid choice: 'tcsh'" in capsys.readouterr().err
