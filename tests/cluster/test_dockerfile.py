"""The Dockerfile is read, not built: there is no daemon here. Rules that it must keep, each with what breaks it."""

import fnmatch
import json
import re
import shutil
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from tests.waiting import LIMIT_S

from hasten.cluster.manifests.pod import USER
from hasten.cluster.spec import TritonServer

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
INSTRUCTIONS = set("ARG CMD COPY ENTRYPOINT ENV EXPOSE FROM HEALTHCHECK LABEL RUN USER WORKDIR".split())
FINAL = ("cpu", "cuda")


@dataclass
class Stage:
    """A stage, with what it says itself."""

    name: str
    base: str
    steps: list[tuple[str, str]] = field(default_factory=list)


def instructions(text: str) -> Iterator[tuple[str, str]]:
    """Instructions and their arguments, with continued lines joined and comments left out."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    for line in re.sub(r"\\\n", " ", "\n".join(lines)).splitlines():
        word, _, rest = line.strip().partition(" ")
        if word:
            yield word, " ".join(rest.split())


def stages(text: str) -> dict[str, Stage]:
    found: dict[str, Stage] = {}
    for word, rest in instructions(text):
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            found[name] = Stage(name, base)
        elif found:
            found[list(found)[-1]].steps.append((word, rest))
    return found


def inherited(found: dict[str, Stage], name: str) -> list[tuple[str, str]]:
    """The steps of a stage, after those of the stages that it is made from."""
    stage = found[name]
    before = inherited(found, stage.base) if stage.base in found else []
    return before + stage.steps


def ignored(path: str) -> bool:
    """Whether .dockerignore leaves a file or folder at the root out: the last rule that fits decides."""
    hidden = False
    for rule in (ROOT / ".dockerignore").read_text().split():
        if fnmatch.fnmatch(path, rule.lstrip("!")):
            hidden = not rule.startswith("!")
    return hidden


def complaints(text: str) -> list[str]:
    """All rules that a Dockerfile breaks."""
    found = stages(text)
    message = [f"{word} is not used here" for word, _ in instructions(text) if word not in INSTRUCTIONS]
    seen: set[str] = set()
    for stage in found.values():
        if stage.base not in seen and not re.fullmatch(r"[\w./-]+:[\w.-]*\d[\w.-]*", stage.base):
            message.append(f"{stage.name}: {stage.base} is neither a stage above nor an image with a version")
        for word, rest in stage.steps:
            message += [f"{stage.name}: {problem}" for problem in step_problems(word, rest, seen)]
        seen.add(stage.name)
    for name in FINAL:
        message += [f"{name}: {problem}" for problem in image_problems(inherited(found, name))]
    return message


def step_problems(word: str, rest: str, seen: set[str]) -> Iterator[str]:
    if word in ("ENTRYPOINT", "CMD") and not rest.startswith("["):
        yield f"{word} without brackets runs in a shell, which keeps signals for itself"
    for source in re.findall(r"(?:--from=|,from=)([\w-]+)", rest):
        if source not in seen:
            yield f"{source} is not a stage above"
    if word == "COPY" and "--from" not in rest:
        for path in rest.split()[:-1]:
            if not (ROOT / path).exists() or ignored(path):
                yield f"{path} is not there, or .dockerignore leaves it out"
    if "apt-get install" in rest and not ("--no-install-recommends" in rest and "rm -rf /var/lib/apt/lists" in rest):
        yield "apt-get installs more than is named, or leaves its lists behind"
    if re.search(r"\b(curl|wget)\b.*\|\s*(ba)?sh\b", rest):
        yield "a script of the network is run"


def image_problems(steps: list[tuple[str, str]]) -> Iterator[str]:
    users = [rest for word, rest in steps if word == "USER"]
    if not users or steps[-1][0] != "USER" or not re.fullmatch(r"[1-9]\d*:[1-9]\d*", users[-1]):
        yield "the last step is not USER with numbers other than root's, which Kubernetes could check"
    starts = [json.loads(rest) for word, rest in steps if word == "ENTRYPOINT" and rest.startswith("[")]
    if starts[-1:] != [["hasten"]]:
        yield "it does not start hasten"
    copies = [number for number, (word, rest) in enumerate(steps) if word == "COPY" and "/opt/hasten" in rest]
    installs = [number for number, (word, rest) in enumerate(steps) if word == "RUN" and "--no-deps /dist" in rest]
    if not copies or not installs or copies[-1] > installs[-1]:
        yield "hasten is not a layer of its own above what it needs"


def test_the_dockerfile_keeps_the_rules() -> None:
    assert complaints(DOCKERFILE) == []


@pytest.mark.parametrize(
    ("good", "bad", "complaint"),
    [
        ("python:3.11-slim-bookworm", "python:latest", "neither a stage above nor an image"),
        ("FROM runtime AS cpu", "FROM runtme AS cpu", "neither a stage above nor an image"),
        ('ENTRYPOINT ["hasten"]', "ENTRYPOINT hasten", "without brackets"),
        ('ENTRYPOINT ["hasten"]', 'ENTRYPOINT ["sh"]', "does not start hasten"),
        ("USER 1000:1000\n", "USER hasten\n", "the last step is not USER"),
        ("USER 1000:1000\n", "", "the last step is not USER"),
        ("COPY src ./src", "COPY source ./src", "source is not there"),
        ("COPY src ./src", "COPY tests ./src", "tests is not there, or .dockerignore"),
        ("--from=requirements-cpu", "--from=requirement-cpu", "requirement-cpu is not a stage"),
        (" --no-install-recommends", "", "installs more than is named"),
        (" && rm -rf /var/lib/apt/lists/* \\\n", "", "leaves its lists behind"),
        ("WORKDIR /home/hasten", "MAINTAINER me", "MAINTAINER is not used"),
        ("EXPOSE", "ADD https://example.com/x /x\nEXPOSE", "ADD is not used"),
    ],
)
def test_what_breaks_a_rule_is_found(good: str, bad: str, complaint: str) -> None:
    assert good in DOCKERFILE
    message = complaints(DOCKERFILE.replace(good, bad))
    assert any(complaint in each for each in message), message


def test_the_image_is_what_manifests_expect() -> None:
    for name in FINAL:
        steps = inherited(stages(DOCKERFILE), name)
        assert steps[-1] == ("USER", f"{USER}:{USER}")
        ports = TritonServer(name="a", version="1", model_repository="/m").ports.values()
        assert ("EXPOSE", " ".join(map(str, ports))) in steps


def test_both_images_have_the_requirements_of_the_project(tmp_path: Path) -> None:
    """The line of the Dockerfile that lists them does so here."""
    found = stages(DOCKERFILE)
    (script,) = re.findall(r'python -c "(.*?)"$', dict(found["requirements"].steps)["RUN"])
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], cwd=tmp_path, check=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    cpu = [*project["dependencies"], *extras["serve"], *extras["cluster"]]
    assert (tmp_path / "cpu.txt").read_text().splitlines() == cpu
    assert (tmp_path / "cuda.txt").read_text().splitlines() == [*cpu, *extras["gpu"]]
    for name in FINAL:
        assert f"-r {name}.txt" in dict(found[f"requirements-{name}"].steps)["RUN"]
        assert ("COPY", f"--from=requirements-{name} /opt/hasten /opt/hasten") in found[name].steps


def test_nothing_but_what_is_copied_is_sent_to_the_builder() -> None:
    sent = {path.name for path in ROOT.iterdir() if not ignored(path.name)}
    assert sent == {"LICENSE", "README.md", "constraints.txt", "examples", "pyproject.toml", "src"}


def test_the_health_check_asks_whether_the_server_is_ready() -> None:
    """The check of the image, run here at the port of a server that is ready, of one that is not, and of none."""
    (check,) = [rest for word, rest in inherited(stages(DOCKERFILE), "cpu") if word == "HEALTHCHECK"]
    program = json.loads(check.partition("CMD ")[2])[-1]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        command = [sys.executable, "-c", program.replace("8000", str(port))]
        for status, code in (("200 OK", 0), ("400 Bad Request", 1)):
            with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
                connection, _ = listener.accept()
                with connection:
                    requested = connection.recv(4096)
                    connection.sendall(f"HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n".encode())
                assert process.wait(LIMIT_S) == code
            assert requested.startswith(b"GET /v2/health/ready ")
    assert subprocess.run(command, check=False, stderr=subprocess.DEVNULL).returncode != 0
