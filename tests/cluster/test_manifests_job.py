"""Jobs: their commands arrive as they were given, and what a cluster cannot do is refused."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.waiting import LIMIT_S

from hasten.cluster.manifests.objects import job_objects
from hasten.cluster.manifests.pod import literal, toleration
from hasten.cluster.spec import TrainingJob
from hasten.core.errors import ConfigError, UnsupportedError
from hasten.core.ports import free_port
from hasten.parallel.rank import RankInfo, rank_from_environment

TEXTS = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"))
FEW = settings(max_examples=40, deadline=None)
SHELL_TEXTS = st.text(st.sampled_from([*"$()'\"\\`!*?#&|;<> \n\tHOMEaé{}~="]), max_size=30)


def job(**options: Any) -> TrainingJob:
    return TrainingJob(**{"name": "train", "image": "i", "command": "c", **options})


def main_container(**options: Any) -> dict[str, Any]:
    """The container of a job, as it is read back from YAML."""
    (each,) = yaml.safe_load_all(yaml.safe_dump_all(job_objects(job(**options))))
    return each["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["containers"][0]


def expanded(text: str, variables: dict[str, str]) -> str:
    """What Kubernetes makes of a command's argument: `$$` is `$`, `$(NAME)` the variable's value if there is one."""

    def value(found: re.Match[str]) -> str:
        return "$" if found[0] == "$$" else variables.get(found[1], found[0])

    return re.sub(r"\$\$|\$\(([^)]*)\)", value, text)


@given(TEXTS | SHELL_TEXTS)
@example("$$")
@example("$$(HOME)")
@example("$($(HOME))")
@example("$(")
@example("a$")
def test_kubernetes_hands_over_any_text_as_it_was(text: str) -> None:
    assert expanded(literal(text), {"HOME": "wrong", "": "wrong", "$": "wrong"}) == text


@FEW
@given(TEXTS.filter(str.strip) | SHELL_TEXTS.filter(str.strip))
def test_a_command_is_one_argument_after_the_shell(command: str) -> None:
    shell, option, argument = main_container(command=command, shell="bash")["command"]
    assert (shell, option) == ("bash", "-c")
    assert expanded(argument, {"HOME": "wrong"}) == command


@FEW
@given(SHELL_TEXTS)
def test_a_shell_gets_what_was_quoted_for_it(text: str) -> None:
    command = main_container(command=shlex.join(["printf", "%s", text]))["command"]
    arguments = [expanded(each, {"HOME": "wrong"}) for each in command]
    assert subprocess.run(arguments, check=True, capture_output=True).stdout.decode() == text


@FEW
@given(st.lists(st.tuples(st.from_regex(r"[A-Z_]{1,8}", fullmatch=True), TEXTS), unique_by=lambda pair: pair[0]))
def test_variables_have_the_values_that_were_given(pairs: list[tuple[str, str]]) -> None:
    result = main_container(env=[f"{name}={value}" for name, value in pairs])["env"]
    values = {each["name"]: expanded(each["value"], {"HOME": "wrong"}) for each in result}
    assert len(values) == len(result)
    assert values | dict(pairs) == values


@pytest.mark.parametrize(
    ("text", "made"),
    [
        ("all", {"operator": "Exists"}),
        ("gpu", {"key": "gpu", "operator": "Exists"}),
        ("gpu:NoSchedule", {"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}),
        ("a=b:NoSchedule,Equal", {"key": "a", "operator": "Equal", "value": "b", "effect": "NoSchedule"}),
        ("a=b:NoSchedule", {"key": "a", "operator": "Equal", "value": "b", "effect": "NoSchedule"}),
        ("a=:NoExecute,Exists", {"key": "a", "operator": "Exists", "effect": "NoExecute"}),
        (
            "node.kubernetes.io/unreachable:NoExecute:Exists:0",
            {
                "key": "node.kubernetes.io/unreachable",
                "operator": "Exists",
                "effect": "NoExecute",
                "tolerationSeconds": 0,
            },
        ),
    ],
)
def test_tolerations_in_arenas_forms(text: str, made: dict[str, Any]) -> None:
    assert toleration(text) == made


@pytest.mark.parametrize(
    "text",
    [
        "",
        "=a:NoSchedule",
        "a=b",
        "a:Sometimes",
        "a=b:NoSchedule,Like",
        "a=b:NoSchedule,Exists",
        "a:NoSchedule:Exists:60",
        "a:NoExecute:Exists:soon",
        "a:NoExecute:Exists:60:b",
    ],
)
def test_other_tolerations_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--toleration"):
        toleration(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": None}, "--image is required"),
        ({"data": ["a:/mnt", "b:/mnt"]}, "two things are to be mounted at /mnt"),
        ({"data": ["a:/dev/shm"]}, "two things are to be mounted at /dev/shm"),
        ({"data": ["dshm:/mnt"]}, "two volumes of the pod have the name 'dshm'"),
        ({"data_dir": ["/a:b"]}, "--data-dir '/a:b' is not"),
        ({"label": ["app=mine"]}, "--label app=mine: hasten sets it to 'pytorchjob'"),
        ({"config_file": ["/not/there:/a"]}, "--config-file /not/there: No such file"),
        ({"name": "a" * 55, "workers": 2}, "its instance .*-worker-0' would have more than 63"),
        ({"name": "a" * 57}, "its instance .*-master-0' would have more than 63"),
        ({"tensorboard": True}, "cannot see the job's /training_logs"),
        ({"tensorboard": True, "logdir": "/mntother", "data": ["a:/mnt"]}, "cannot see the job's /mntother"),
        ({"sync_mode": "git", "sync_source": "https://"}, "is not the address of a git repository"),
        ({"api": "trainer", "name": "a" * 49}, "too long for a TrainJob of --workers 1: at most 48 letters"),
        ({"api": "trainer", "name": "a" * 48, "workers": 11}, "too long for a TrainJob of --workers 11: at most 47"),
        ({"api": "indexed", "name": "a" * 61, "workers": 11}, "its instance .*-10' would have more than 63"),
        ({"api": "trainer", "image": None}, "--image is required"),
    ],
)
def test_what_cannot_hold_in_a_cluster_is_said(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        job_objects(job(**options))


def test_files_of_more_than_a_megabyte_belong_into_a_volume(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(bytes(600_000))
    given_twice = [f"{tmp_path}/large:/a", f"{tmp_path}/large:/b"]
    assert len(job_objects(job(config_file=given_twice[:1]))) == 2
    with pytest.raises(ConfigError, match="1200000 bytes, more than 1 MB"):
        job_objects(job(config_file=given_twice))


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"clean_task_policy": "All"}, "--clean-task-policy"),
        ({"gang": True}, "--gang"),
        ({"host_network": True}, "--hostNetwork"),
        ({"image_pull_policy": "Always"}, "--image-pull-policy"),
        ({"nproc_per_node": "gpu"}, "--nproc-per-node gpu"),
        ({"priority": "high"}, "--priority"),
        ({"retry": 1}, "--retry"),
        ({"scheduler": "volcano"}, "--scheduler"),
        ({"sync_mode": "git", "sync_source": "https://a/b"}, "--sync-mode"),
        ({"ttl_after_finished": "1h"}, "--ttl-after-finished"),
        ({"working_dir": "/w"}, "--working-dir"),
    ],
)
def test_what_a_train_job_cannot_do_is_refused_by_name(options: dict[str, Any], flag: str) -> None:
    assert job_objects(job(**options))
    with pytest.raises(UnsupportedError, match=rf"a TrainJob cannot do {flag}: .*--api pytorchjob"):
        job_objects(job(api="trainer", **options))


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"clean_task_policy": "All"}, "--clean-task-policy"),
        ({"gang": True}, "--gang"),
        ({"nproc_per_node": "2"}, "--nproc"),
    ],
)
def test_what_an_indexed_job_cannot_do_is_refused_by_name(options: dict[str, Any], flag: str) -> None:
    with pytest.raises(UnsupportedError, match=rf"an Indexed Job cannot do {flag}.*: its instances are independent"):
        job_objects(job(api="indexed", **options))


@pytest.mark.parametrize("api", ["pytorchjob", "indexed"])
def test_a_container_starts_in_an_absolute_folder(api: str) -> None:
    with pytest.raises(ConfigError, match="--working-dir 'code' is not an absolute path: in a cluster"):
        job_objects(job(api=api, working_dir="code"))


def test_the_users_own_home_folder_is_not_hidden() -> None:
    result = main_container(data=["home-of-all:/root"])
    assert [mount["name"] for mount in result["volumeMounts"] if mount["mountPath"] == "/root"] == ["home-of-all"]


@pytest.mark.any_python
def test_torchrun_in_two_pods_gives_hasten_its_ranks(tmp_path: Path) -> None:
    """Two nodes as an operator starts them: RANK and WORLD_SIZE count nodes, PET_* is for torchrun."""
    port = str(free_port())
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    common |= {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "1", "PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": port}
    tell = "import json, os; print('VARIABLES', json.dumps(dict(os.environ)))"
    torchrun = [str(Path(sys.executable).with_name("torchrun")), "--no-python", sys.executable, "-c", tell]
    pods = [
        subprocess.Popen(
            torchrun,
            env={**os.environ, **common, "RANK": rank, "PET_NODE_RANK": rank, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
        )
        for rank in ("0", "1")
    ]
    try:
        reported = [pod.communicate(timeout=LIMIT_S) for pod in pods]
    finally:
        for pod in pods:
            pod.kill()
            pod.communicate()
    ranks = [rank_from_environment(json.loads(out.partition("VARIABLES ")[2])) for out, _ in reported]
    assert ranks == [RankInfo(rank, 2, 1, "127.0.0.1", int(port)) for rank in (0, 1)], reported
