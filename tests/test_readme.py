"""README.md and docs/: commands run as they are written, links lead somewhere, and options exist."""

import argparse
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.request import urlopen
from xml.etree import ElementTree

import psutil
import pytest
from tests.checkpoint.hub_site import files_of, hub_site
from tests.waiting import eventually

from hasten.cli.cluster.parser import VerbParser
from hasten.cli.main import build_parser
from hasten.core.ports import free_ports

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), ROOT / "examples" / "stories" / "README.md"]
DEMO = ROOT / "examples" / "demo-model"
HUB_ID = "bigscience/bloom-560m"
LONGEST_S = 1800

NEEDS = {
    "pip": "the network",
    "curl": "the network",
    "docker": "Docker",
    "mpirun": "Open MPI",
    "hasten bench kernels": "NVIDIA GPU",
}
"""Commands that do not run everywhere -> what the text about them must say that they need."""
SHORTER = {
    "hasten bench suite": "--num-requests 2 --batch-sizes 2 --repetitions 1",
    "hasten bench load": "--request-rate 10 20",
    "hasten report": "--against none --max-num-seqs 2 --dataset lambada_test.jsonl",
}
"""Command -> options that make it short enough for a test."""
STAND_INS = {'"n_layer": 24, "hidden_size": 1024': '"vocab_size": 512, "n_layer": 1, "hidden_size": 32'}
"""Text of a command -> what makes it small enough for a test."""
TEXTS = 16
"""Of the data set that stands in for LAMBADA's."""
FOREIGN_OPTIONS = {
    *("--extra-index-url", "--target", "--rm", "--ulimit", "--tb"),  # pip, docker, pytest
    *("--cpunodebind", "--membind"),  # numactl
    *("--no-python", "--nproc-per-node", "--master-addr", "--master-port"),  # torchrun
    *("--count", "--exclude", "--output", "--time-budget", "--min-accuracy", "--url"),  # examples
    *("--minutes", "--clients", "--rounds", "--requests"),  # tests.soak
}


@dataclass
class Block:
    """Indented lines of a page, and the paragraph before them."""

    before: str
    text: str

    @property
    def is_python(self) -> bool:
        return re.match(r"(from|import) \w", self.text) is not None

    @property
    def commands(self) -> list[str]:
        """Of a block of the shell, one per command, however many lines it has."""
        return [] if self.is_python else re.sub(r" \\\n +", " ", self.text).splitlines()


def blocks(page: Path) -> list[Block]:
    parts = re.split(r"((?:^    .*\n(?:\n(?=    ))?)+)", page.read_text(), flags=re.MULTILINE)
    return [
        Block(before.strip().rpartition("\n\n")[2], re.sub(r"^    ", "", text, flags=re.MULTILINE))
        for before, text in zip(parts[::2], parts[1::2], strict=False)
    ]


def prose(page: Path) -> str:
    return re.sub(r"^    .*\n", "", page.read_text(), flags=re.MULTILINE)


def titles_of(page: Path) -> list[str]:
    return re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)


def anchor_of(title: str) -> str:
    return re.sub(r"[^\w -]", "", title).lower().replace(" ", "-")


def spans(page: Path) -> list[str]:
    """What stands in backquotes, a line's end taken for a space."""
    return [" ".join(found.split()) for found in re.findall(r"`([^`]+)`", prose(page))]


def actions_of(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    return (parser.filled() if isinstance(parser, VerbParser) else parser)._actions


def words_of(command: str) -> list[str]:
    return shlex.split(command, comments=True)


def parser_for(words: list[str]) -> argparse.ArgumentParser:
    """The parser of a subcommand, as deep as the words name one."""
    parser: argparse.ArgumentParser = build_parser()
    for word in words:
        deeper = [action.choices for action in actions_of(parser) if isinstance(action, argparse._SubParsersAction)]
        if not deeper or word not in deeper[0]:
            break
        parser = deeper[0][word]
    return parser


def all_options(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in actions_of(parser):
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for deeper in action.choices.values():
                yield from all_options(deeper)


class Walk:
    """A folder in which commands run one after the other, and the server that the last of them started."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        self.aliases = ""
        self.http, self.grpc, self.metrics = free_ports(3)
        self.environment = environment
        self.server: subprocess.Popen[bytes] | None = None

    @property
    def ports(self) -> str:
        return f"--http-port {self.http} --grpc-port {self.grpc} --metrics-port {self.metrics}"

    def run(self, command: str) -> None:
        """Run a command to its end, or start a server and wait until it is ready."""
        for text, stand_in in STAND_INS.items():
            command = command.replace(text, stand_in)
        for start, options in SHORTER.items():
            if command.startswith(start):
                command = f"{command} {options}"
        if found := re.fullmatch(r'alias (\w+)="(.+)"', command):
            self.aliases += f'{found[1]}() {{ {found[2]} "$@"; }}\n'
        elif command.startswith("hasten serve "):
            self.serve(f"{command} --http-address 127.0.0.1 --grpc-address 127.0.0.1 {self.ports}")
        elif command.startswith("arena serve triton "):
            self.stop()
            self.shell(f"{command} {self.ports}")
        elif command.startswith("python examples/client.py"):
            self.shell(f"{command} --url localhost:{self.grpc}")
        else:
            self.shell(command)

    def shell(self, command: str) -> None:
        done = subprocess.run(
            ["bash", "-c", self.aliases + command],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=LONGEST_S,
            check=False,
        )
        assert done.returncode == 0, (
            f"{command}: status {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        )

    def python(self, code: str) -> None:
        code = code.replace("localhost:8000", f"localhost:{self.http}")
        self.shell(f"python -c {shlex.quote(code)}")

    def serve(self, command: str) -> None:
        self.stop()
        log = self.folder / "serve.log"
        with log.open("w") as stream:
            server = self.server = subprocess.Popen(
                words_of(command), cwd=self.folder, env=self.environment, stdout=stream, stderr=stream
            )
        eventually(lambda: self.is_ready() or server.poll() is not None, log.read_text)
        assert server.poll() is None, f"{command}\n{log.read_text()}"

    def is_ready(self) -> bool:
        try:
            with urlopen(f"http://127.0.0.1:{self.http}/v2/health/ready", timeout=10) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def stop(self) -> None:
        """End the server, which must end well."""
        if self.server is not None:
            self.server.terminate()
            status, self.server = self.server.wait(LONGEST_S), None
            assert status == 0, (self.folder / "serve.log").read_text()


@pytest.fixture
def walk(tmp_path: Path) -> Iterator[Walk]:
    """A folder like a clone of the repository, with a hub and a state of its own; what is left running is ended."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    with hub_site() as hub:
        hub.put(HUB_ID, files_of(DEMO))
        scripts = Path(sys.executable).parent
        environment = hub.environment(
            tmp_path / "huggingface",
            HASTEN_HOME=str(tmp_path / "home"),
            OMP_NUM_THREADS="1",
            PATH=f"{scripts}:{os.environ['PATH']}",
            no_proxy="localhost,127.0.0.1",
        )
        environment.pop("HASTEN_CLUSTER", None)
        result = Walk(tmp_path, environment)
        yield result
    for process in psutil.process_iter():
        try:
            if process.environ().get("HASTEN_HOME") == environment["HASTEN_HOME"]:
                process.kill()
        except psutil.Error:
            continue


def needs(command: str) -> str | None:
    return next((what for start, what in NEEDS.items() if f"{command} ".startswith(f"{start} ")), None)


@pytest.mark.slow
@pytest.mark.any_python
@pytest.mark.timeout(LONGEST_S)
def test_the_readme_from_top_to_bottom(walk: Walk) -> None:
    for block in blocks(README):
        if block.is_python:
            walk.python(block.text)
        for command in block.commands:
            if command.startswith("curl "):
                texts = (ROOT / "examples" / "stories" / "test.jsonl").read_text().splitlines(keepends=True)
                (walk.folder / command.rpartition("/")[2]).write_text("".join(texts[:TEXTS]))
            elif needs(command) is None:
                walk.run(command)
    walk.stop()


@pytest.mark.slow
@pytest.mark.any_python
def test_the_examples_of_the_python_api_run(walk: Walk) -> None:
    examples = [block.text for block in blocks(ROOT / "docs" / "python.md") if block.is_python]
    assert examples
    for example in examples:
        walk.python(example)


@pytest.mark.parametrize("page", [README, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_what_a_command_needs_stands_with_it(page: Path) -> None:
    found = [(command, block.before) for block in blocks(page) for command in block.commands]
    for paragraph in re.split(r"\n\n|\n(?=- )", prose(page)):
        found += [(" ".join(span.split()), paragraph) for span in re.findall(r"`([^`|]+)`", paragraph)]
    for command, text in found:
        what = needs(command)
        if what is not None and " " in command and not text.startswith("|"):
            assert re.search(rf"\bneeds\b[^.]*{what}", " ".join(text.split())), f"{page.name}: {command}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_parse(page: Path) -> None:
    for block in blocks(page):
        for command in block.commands:
            if command.startswith("hasten "):
                build_parser().parse_args(words_of(command)[1:])
    for span in spans(page):
        found = re.search(r"(?:^|\s)hasten ((?:[a-z]+ ?)+.*)", span)
        if found and "=" not in found[1].partition(" ")[0]:
            words = found[1].split()
            known = set(all_options(parser_for(words)))
            assert {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)} <= known, span


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_option_exists(page: Path) -> None:
    known = set(all_options(build_parser())) | FOREIGN_OPTIONS
    named = {option for span in spans(page) for option in re.findall(r"(?:^|[\s/'])(--[a-z][a-zA-Z0-9-]+)", span)}
    assert named <= known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = prose(page)
    defined = re.findall(r"^\[[^]]+\]: (?!https?:)(\S+)$", text, re.MULTILINE)
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", text) + defined:
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in {anchor_of(title) for title in titles_of(target)}, link


def test_the_bounds_of_all_figures_link_to_entries_of_the_log() -> None:
    text = re.sub(r"`[^`]*`", "", prose(ROOT / "docs" / "performance.md"))
    defined = re.findall(r"^\[([^]]+)\]: performance-log\.md#", text, re.MULTILINE)
    used = re.findall(r"\[([^]]+)\](?![:(])", text)
    assert len(set(defined)) == len(defined)
    assert set(used) == set(defined)
    for area in text.partition("## What bounds each figure")[2].split("\n### ")[1:]:
        assert re.findall(r"^- \*\*(.+?)\*\*:", area, re.MULTILINE) == ["Bound", "Gains most", "Not in use"], area


def test_the_log_has_an_index_of_its_entries_by_area() -> None:
    log = ROOT / "docs" / "performance-log.md"
    index, _, entries = log.read_text().partition("\n## Entries\n")
    titles = re.findall(r"^### (.+)$", entries, re.MULTILINE)
    assert len(set(titles)) == len(titles)
    assert [title[:10] for title in titles] == sorted((title[:10] for title in titles), reverse=True)
    order = {anchor_of(title): number for number, title in enumerate(titles)}
    found: set[str] = set()
    areas = re.split(r"^\*\*\[", index, flags=re.MULTILINE)[1:]
    for area in areas:
        lines = re.findall(r"^- (\S+): \[(.+)\]\(#(.+)\)$", area, re.MULTILINE)
        for date, text, anchor in lines:
            assert f"{date}: {text}".lower() == titles[order[anchor]].lower(), area
        anchors = [anchor for *_, anchor in lines]
        assert anchors
        assert sorted(anchors, key=order.__getitem__) == anchors, "newest first, as the entries are"
        found |= set(anchors)
    assert found == set(order)
    bounds = re.findall(r"^### (.+)$", (ROOT / "docs" / "performance.md").read_text(), re.MULTILINE)
    assert [area.partition("](")[0] for area in areas] == bounds


def test_extras_targets_and_stages_exist() -> None:
    text = "".join(page.read_text() for page in (README, ROOT / "CONTRIBUTING.md"))
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {name for group in re.findall(r"\.\[([a-z,]+)\]", text) for name in group.split(",")}
    assert named
    assert named <= set(extras)
    makefile, dockerfile = (ROOT / "Makefile").read_text(), (ROOT / "Dockerfile").read_text()
    for target in re.findall(r"(?:`|    )make ([a-z]+)", text):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for stage in re.findall(r"--target (\w+)", text):
        assert f" AS {stage}\n" in dockerfile, stage


def test_the_picture_shows_the_figures_of_the_table() -> None:
    table = README.read_text().partition("## Figures")[2].split("\n\n")[2]
    expected = []
    for line in table.splitlines()[2:]:
        *_, theirs, ours, speedup = (cell.strip() for cell in line.strip("|").split("|"))
        units = [value.rpartition(" ")[2] for value in (theirs, ours)]
        columns = [re.findall(r"\d[\d.]*", value.partition(",")[0]) for value in (theirs, ours, speedup)]
        for hf, hasten, factor in zip(*columns, strict=True):
            expected.append([f"{hf} {units[0]}", f"{hasten} {units[1]}", f"{factor} x"])
    namespace = {"svg": "http://www.w3.org/2000/svg"}
    found = []
    for row in ElementTree.parse(ROOT / "docs" / "figures.svg").getroot().iterfind("svg:g", namespace):
        _, *values = (text.text or "" for text in row.iterfind("svg:text", namespace))
        found.append(values)
        gray, blue = (float(bar.attrib["width"]) for bar in row.iterfind("svg:rect", namespace))
        hf_time, time = (float(value.split()[0]) for value in values[:2])
        assert blue / gray == pytest.approx(time / hf_time, abs=0.001)
    assert found == expected
    assert len(found) == 8
