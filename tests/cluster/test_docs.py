"""docs/kubernetes.md: its commands parse and make valid objects, and its Role allows what they need."""

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.cluster.manifest_cases import CASES
from tests.cluster.test_manifests import RELEASES, builtins, validate_lists

from hasten.cli.cluster.backend import BACKENDS
from hasten.cli.main import build_parser, main
from hasten.cluster.manifests.objects import CRDS, job_objects, server_objects, volume_objects
from hasten.cluster.spec import TrainingJob, TritonServer, Volume

TEXT = (Path(__file__).parents[2] / "docs" / "kubernetes.md").read_text()
BLOCKS = ["\n".join(line[4:] for line in block.splitlines()) for block in re.findall(r"(?:^    .*\n)+", TEXT, re.M)]


def commands() -> list[list[str]]:
    """The commands that begin with `arena`, as bash divides them; lines that go on are further in."""
    parts = [part for block in BLOCKS for part in re.split(r"^(?=\S)", block, flags=re.M)]
    script = "arena() { printf '%s\\0' \"$@\"; printf '\\f'; }\n" + "\n".join(
        each for each in parts if each.startswith("arena ")
    )
    printed = subprocess.run(["bash", "-c", script], check=True, capture_output=True, text=True).stdout
    return [each.split("\0")[:-1] for each in printed.split("\f")[:-1]]


VERBS = (["submit", "pytorchjob"], ["serve", "triton"], ["data", "create"])
MAKING = [words for words in commands() if words[:2] in VERBS]


class PlanningBackend:
    """A cluster with all CRDs that can only be asked what it would make."""

    name = "kubernetes"

    def default_namespace(self) -> str:
        return "default"

    def plan_job(self, job: TrainingJob) -> list[dict[str, Any]]:
        return job_objects(job)

    def plan_server(self, server: TritonServer) -> list[dict[str, Any]]:
        return server_objects(server, crds=set(CRDS))

    def plan_volume(self, volume: Volume) -> list[dict[str, Any]]:
        return volume_objects(volume, os.environ["HASTEN_ACCESS_KEY_SECRET"] if volume.access_key_id else None)


def test_all_commands_are_found() -> None:
    assert len(commands()) == len(re.findall(r"^    arena ", TEXT, re.M)) > 20
    assert len(MAKING) >= 10


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_a_command_parses(words: list[str]) -> None:
    build_parser().parse_args(["cluster", *words])


@pytest.mark.parametrize("words", MAKING, ids=" ".join)
def test_what_a_command_makes_is_valid(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(BACKENDS, "kubernetes", lambda _: PlanningBackend())
    monkeypatch.setenv("HASTEN_CLUSTER", "kubernetes")
    monkeypatch.setenv("HASTEN_ACCESS_KEY_SECRET", "not-a-real-secret")
    code = main(["cluster", *words[:2], "--dry-run", *words[2:]])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    result = list(yaml.safe_load_all(printed.out))
    validate_lists(list(builtins(result)), RELEASES[-1])


def role() -> dict[str, Any]:
    (text,) = [block for block in BLOCKS if "kind: Role" in block]
    return yaml.safe_load(text)


def test_the_role_is_valid_and_covers_all_that_is_made() -> None:
    validate_lists([role()], RELEASES[-1])
    plurals = {crd.partition(".")[0].removesuffix("s"): crd.partition(".")[0] for crd in CRDS}
    for case in CASES.values():
        for body in case.objects():
            if body["kind"] == "PersistentVolume":
                continue
            group = body["apiVersion"].rpartition("/")[0]
            kind = body["kind"].lower()
            plural = plurals.get(kind, f"{kind}s")
            rules = [rule for rule in role()["rules"] if group in rule["apiGroups"] and plural in rule["resources"]]
            assert any({"get", "create", "patch", "delete"} <= set(rule["verbs"]) for rule in rules), (group, plural)


def test_the_crds_of_the_page_are_those_that_manifests_know() -> None:
    table = TEXT.partition("## CRDs")[2].partition("##")[0]
    assert set(re.findall(r"`([a-z]+\.[a-z0-9.-]+\.[a-z]+)`", table)) >= set(CRDS) - {"scaledobjects.keda.sh"}
    assert "`scaledobjects.keda.sh`" in table
