"""Training jobs by the command, in a backend of memory."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml
from tests.cli.memory_backend import MemoryBackend, ago, cluster, instance, job

from hasten.cluster.backend import Event, Job, LogOptions, Status
from hasten.cluster.spec import TrainingJob

ARTICLE = (
    *("submit", "pytorchjob", "--gpus=1", "--image", "IMAGE", "--name", "convert-bloom", "--workers", "1"),
    *("--namespace", "default-group", "--data", "bloom-pvc:/mnt"),
    "python .../huggingface_bloom_convert.py -i /mnt/model/bloom-7b1 -o /mnt/model/bloom-7b1-ft-fp16 -tp 2 -dt fp16 "
    "-p 64 -v",
)
COMMANDS = (
    "python a.py --n 1 -v",
    "  two  spaces\tand a tab ",
    """echo 'single' "double" `back` $(date) $HOME ${A:-b} \\n \\\\ !x""",
    "line one\nline two # no comment\n\nline four",
    "grep '&&' a | b > c; d & wait < e",
    "echo --name other --gpus 9",
    "printf '%s é ∑ 文\n' \u00a0",
    "-",
)


def submit(*argv: str) -> int:
    return cluster("submit", "pytorchjob", "--name", "x", *argv)


def test_the_article_s_conversion(backend: MemoryBackend, capsys: pytest.CaptureFixture[str]) -> None:
    assert cluster(*ARTICLE) == 0
    assert backend.submitted == [
        TrainingJob(
            name="convert-bloom",
            namespace="default-group",
            gpus=1,
            image="IMAGE",
            workers=1,
            data=("bloom-pvc:/mnt",),
            command=ARTICLE[-1],
        )
    ]
    assert capsys.readouterr().out == (
        "job convert-bloom is submitted\nsee it: hasten cluster get convert-bloom -n default-group\n"
    )


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("dashes", [(), ("--",)])
def test_a_quoted_command_arrives_as_it_is(backend: MemoryBackend, command: str, dashes: tuple[str, ...]) -> None:
    assert submit(*dashes, command) == 0
    assert backend.submitted[0].command == command


@pytest.mark.parametrize(
    ("words", "command"),
    [
        (("--", "python", "a.py", "--n", "1"), "python a.py --n 1"),
        (("python", "a.py", "--n", "1", "--name", "y", "-n", "z"), "python a.py --n 1 --name y -n z"),
        (("python", "a.py", "--", "b"), "python a.py -- b"),
        (("--gpus", "2", "--", "--odd", "a  b"), "--odd a  b"),
        (("--", "python a.py", "--gpus", "1"), "python a.py --gpus 1"),
        (("python a.py", "--n", "1"), "python a.py --n 1"),
    ],
)
def test_words_of_a_command_are_joined(backend: MemoryBackend, words: tuple[str, ...], command: str) -> None:
    assert submit(*words) == 0
    assert backend.submitted[0].command == command
    assert backend.submitted[0].name == "x"


def test_every_option_of_a_job(backend: MemoryBackend, tmp_path: Path) -> None:
    options = (
        *("--image=i", "--gpus", "2", "--workers=3", "--cpu", "500m", "--memory", "16Gi", "--device", "amd.com/gpu=1"),
        *("--working-dir", "/w", "-e", "A=1", "-eB=2", "--env=C=x=y", "-d", "p:/a", "--data=q:/b", "--data-dir", "/c"),
        *("-a", "k=v", "-l", "m=n", "--selector", "s=t", "--toleration", "all", "-p", "high", "--queue", "night"),
        *("--gang", "--image-pull-secret", "s1", "--image-pull-secret", "s2", "--image-pull-policy", "Never"),
        *("--shell", "bash", "--retry", "2", "--share-memory", "1Gi", "--nproc-per-node", "auto"),
        *("--clean-task-policy", "All", "--running-timeout", "2h", "--ttl-after-finished", "7d", "--scheduler", "s"),
        *("--hostNetwork", "--rdma", "--config-file", "f:/g", "--sync-mode", "git", "--sync-source", "https://h/r"),
        *("--tensorboard", "--logdir", "/logs", "--api", "trainer", "-n", "space"),
    )
    assert submit(*options, "run") == 0
    assert backend.submitted == [
        TrainingJob(
            name="x",
            namespace="space",
            command="run",
            image="i",
            gpus=2,
            workers=3,
            cpu="500m",
            memory="16Gi",
            device=("amd.com/gpu=1",),
            working_dir="/w",
            env=("A=1", "B=2", "C=x=y"),
            data=("p:/a", "q:/b"),
            data_dir=("/c",),
            annotation=("k=v",),
            label=("m=n",),
            selector=("s=t",),
            toleration=("all",),
            priority="high",
            queue="night",
            gang=True,
            image_pull_secret=("s1", "s2"),
            image_pull_policy="Never",
            shell="bash",
            retry=2,
            share_memory="1Gi",
            nproc_per_node="auto",
            clean_task_policy="All",
            running_timeout="2h",
            ttl_after_finished="7d",
            scheduler="s",
            host_network=True,
            rdma=True,
            config_file=("f:/g",),
            sync_mode="git",
            sync_source="https://h/r",
            tensorboard=True,
            logdir="/logs",
            api="trainer",
        )
    ]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("run",), "there is a job x in default already"),
        ((), "there is no command to run"),
        (("--",), "there is no command to run"),
        (("--gpu", "1", "run"), "unrecognized arguments: --gpu (see `hasten cluster submit pytorchjob --help`)"),
        (("-z", "run"), "unrecognized arguments: -z"),
        (("--gpus", "many", "run"), "argument --gpus: invalid int value: 'many'"),
        (("--gpus",), "argument --gpus: expected one argument"),
        (("--workers", "0", "run"), "--workers must be at least 1, got 0"),
        (("--data", "pvc", "run"), "--data 'pvc' is not SOURCE:/PATH"),
        (("--image-pull-policy", "Later", "run"), "invalid choice: 'Later'"),
        (("--name", "Not_A_Name", "run"), "--name 'Not_A_Name' must have at most 63"),
        (("python a.py", "--gpus", "2"), "--gpus stands behind the command 'python a.py'"),
        (("--arena-namespace", "arena-system", "run"), "--arena-namespace says where Arena finds its operators"),
    ],
)
def test_what_cannot_be_submitted(
    backend: MemoryBackend, capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], message: str
) -> None:
    backend.submitted.append(TrainingJob(name="x", command="run"))
    assert submit(*argv) == (1 if "already" in message else 2)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("hasten: error: ")
    assert message in captured.err
    assert len(backend.submitted) == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("submit", "pytorchjob", "run"), "--name is required"),
        (
            ("submit", "tfjob", "--name", "x", "--ps", "1", "run"),
            "submits jobs of the type pytorchjob alone (not done: tfjob",
        ),
        (("submit", "job"), "invalid choice: 'job'"),
        (("submit",), "the following arguments are required: TYPE"),
        ((), "the following arguments are required: COMMAND"),
    ],
)
def test_what_is_no_submission(
    backend: MemoryBackend, capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], message: str
) -> None:
    assert cluster(*argv) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("argv", [("-n", "a", "submit", "pytorch"), ("submit", "-n", "a", "pytorchjob")])
def test_a_namespace_before_the_verb(backend: MemoryBackend, argv: tuple[str, ...]) -> None:
    assert cluster(*argv, "--name", "x", "run") == 0
    assert backend.submitted[0].namespace == "a"
    assert cluster(*argv, "--name", "y", "-n", "b", "run") == 0
    assert backend.submitted[1].namespace == "b"


def test_a_dry_run_prints_objects_and_touches_nothing(
    backend: MemoryBackend, capsys: pytest.CaptureFixture[str]
) -> None:
    command = "echo 'a: b' # c\n\techo \"$HOME\"  "
    assert submit("--dry-run", command) == 0
    out = capsys.readouterr().out
    planned = backend.plan_job(TrainingJob(name="x", command=command))
    assert list(yaml.safe_load_all(out)) == planned
    assert out.startswith(
        "kind: ConfigMap\nmetadata:\n  name: x\n  labels:\n    app: pytorchjob\n---\nkind: PyTorchJob\n"
    )
    assert "&id" not in out
    assert backend.submitted == []


def two_jobs() -> list[Job]:
    finished = datetime(2026, 8, 1, 12, tzinfo=UTC)
    return [
        job("convert-bloom", Status.SUCCEEDED, created=finished, ended=finished + timedelta(minutes=3, seconds=20)),
        job("compare", gpus=2, created=ago(hours=2), instances=(instance("compare-master-0", gpus=2),)),
        job("waits", Status.PENDING, namespace="other", created=ago(minutes=45), gpus=4, instances=()),
    ]


def test_list(backend: MemoryBackend, capsys: pytest.CaptureFixture[str]) -> None:
    backend.job_records = two_jobs()
    table = [
        "NAME           STATUS     TRAINER     DURATION  GPU(Requested)  GPU(Allocated)  NODE",
        "convert-bloom  SUCCEEDED  PYTORCHJOB  3m        1               N/A             192.168.123.35",
        "compare        RUNNING    PYTORCHJOB  2h        2               2               192.168.123.35",
    ]
    for argv in (["list"], ["ls"], ["list", "-o", "wide"], ["list", "-T", "pytorch"], ["list", "-n", "default"]):
        assert cluster(*argv) == 0
        assert capsys.readouterr().out.splitlines() == table
    assert cluster("list", "-A") == 0
    assert capsys.readouterr().out.splitlines() == [
        "NAMESPACE  NAME           STATUS     TRAINER     DURATION  GPU(Requested)  GPU(Allocated)  NODE",
        "default    convert-bloom  SUCCEEDED  PYTORCHJOB  3m        1               N/A             192.168.123.35",
        "default    compare        RUNNING    PYTORCHJOB  2h        2               2               192.168.123.35",
        "other      waits          PENDING    PYTORCHJOB  45m       4               0               N/A",
    ]
    assert cluster("list", "-n", "empty") == 0
    assert capsys.readouterr().out == "NAME  STATUS  TRAINER  DURATION  GPU(Requested)  GPU(Allocated)  NODE\n"


def test_list_for_programs(backend: MemoryBackend, capsys: pytest.CaptureFixture[str]) -> None:
    backend.job_records = two_jobs()
    assert cluster("list", "-A", "-o", "json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [each["name"] for each in found] == ["convert-bloom", "compare", "waits"]
    first = found[0]
    assert (first["status"], first["trainer"], first["created"]) == ("SUCCEEDED", "PYTORCHJOB", "2026-08-01T12:00:00Z")
    assert (first["duration"], first["priority"], first["instances"][0]["node"]) == (200.0, None, "192.168.123.35")
    assert cluster("list", "-o", "yaml") == 0
    assert yaml.safe_load(capsys.readouterr().out)[0] == first
    assert cluster("list", "-T", "trainjob", "-o", "json") == 0
    assert capsys.readouterr().out == "[]\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("list", "-T", "mpijob"), "--type mpijob: there are only pytorchjob"),
        (("list", "-o", "xml"), "invalid choice: 'xml'"),
        (("list", "x"), "unrecognized arguments: x"),
        (("list", "--all"), "unrecognized arguments: --all"),
        (("get",), "the following arguments are required: NAME"),
        (("logs", "x", "--since", "soon"), "--since 'soon' is not a duration"),
        (("logs", "x", "--since-time", "2026-08-01"), "--since-time '2026-08-01' is not a moment of RFC 3339"),
        (("logs", "x", "--since-time", "noon"), "--since-time 'noon' is not a moment of RFC 3339"),
        (("logs", "x", "--since", "1h", "--since-time", "2026-08-01T12:00:00Z"), "not allowed with argument --since"),
        (("logs", "x", "-t", "-2"), "--tail must be at least -1 (all lines), got -2"),
        (("prune",), "the following arguments are required: -s/--since"),
        (("prune", "--since", "7"), "--since '7' is not a duration"),
        (("delete",), "the following arguments are required: NAME"),
        (("attach",), "the following arguments are required: NAME"),
        (("attach", "--", "ls"), "the following arguments are required: NAME"),
    ],
)
def test_bad_input(
    backend: MemoryBackend, capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], message: str
) -> None:
    assert cluster(*argv) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert message in captured.err


@pytest.mark.parametrize("verb", [("get",), ("logs",), ("delete",)])
def test_a_job_that_is_not_there(
    backend: MemoryBackend, capsys: pytest.CaptureFixture[str], verb: tuple[str, ...]
) -> None:
    assert cluster(*verb, "gone") == 1
    assert capsys.readouterr().err == "hasten: error: there is no job gone in namespace default\n"


@pytest.mark.parametrize("verb", ["get", "logs", "attach", "delete"])
def test_a_job_of_another_type(backend: MemoryBackend, capsys: pytest.CaptureFixture[str], verb: str) -> None:
    backend.job_records = [job("x", trainer="TRAINJOB")]
    assert cluster(verb, "x", "-T", "pytorchjob") == 1
    assert capsys.readouterr().err == "hasten: error: job x is a trainjob, not a pytorchjob\n"
    assert cluster(verb, "x", "-T", "trainjob") == (7 if verb == "attach" else 0)


def test_get(backend: MemoryBackend, capsys: pytest.CaptureFixture[str]) -> None:
    began = datetime(2026, 8, 1, 12)
    ended = began + timedelta(minutes=3)
    worker = instance("x-worker-0", Status.SUCCEEDED, created=began, ended=ended, is_chief=False, gpus=8, node=None)
    chief = instance("x-master-0", Status.SUCCEEDED, created=began, ended=ended)
    backend.job_records = [
        job("x", Status.SUCCEEDED, created=began, ended=ended, instances=(chief, worker), priority="high")
    ]
    assert cluster("get", "x") == 0
    assert capsys.readouterr().out.splitlines() == [
        "Name:        x",
        "Status:      SUCCEEDED",
        "Namespace:   default",
        "Priority:    high",
        "Trainer:     PYTORCHJOB",
        "Duration:    3m",
        "CreateTime:  2026-08-01 12:00:00",
        "EndTime:     2026-08-01 12:03:00",
        "",
        "Instances:",
        "  NAME        STATUS     AGE  IS_CHIEF  GPU(Requested)  NODE",
        "  ----        ------     ---  --------  --------------  ----",
        "  x-master-0  SUCCEEDED  3m   true      1               192.168.123.35",
        "  x-worker-0  SUCCEEDED  3m   false     8               N/A",
    ]


def test_get_with_events_and_gpus(backend: MemoryBackend, capsys: pytest.CaptureFixture[str]) -> None:
    event = Event(time=ago(minutes=2), kind="Normal", reason="Started", source="pod/x-master-0", message="it\nruns")
    backend.job_records = [job("x", events=(event,))]
    assert cluster("get", "x", "-e", "-g") == 0
    assert capsys.readouterr().out.splitlines()[7:] == [
        "EndTime:     N/A",
        "",
        "Instances:",
        "  NAME        STATUS   AGE  IS_CHIEF  GPU(Requested)  NODE",
        "  ----        ------   ---  --------  --------------  ----",
        "  x-master-0  RUNNING  5m   true      1               192.168.123.35",
        "",
        "GPUs:",
        "  INSTANCE    NODE(IP)        GPU(Requested)  GPU(IndexId)  GPU(DutyCycle)  GPU Memory(Used/Total)",
        "  --------    --------        --------------  ------------  --------------  ----------------------",
        "  x-master-0  192.168.123.35  1               N/A           N/A             N/A",
        "",
        "  Allocated/Requested GPUs of Job: 1/1",
        "",
        "Events:",
        "  SOURCE          TYPE    AGE  MESSAGE",
        "  ------          ----    ---  -------",
        "  pod/x-master-0  Normal  2m   [Started] it runs",
    ]


WARNED = Event(time=ago(minutes=1), kind="Warning", reason="FailedScheduling", source="pod/x", message="no GPU is free")


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (job("x", Status.PENDING, reason="0/3 nodes fit"), "0/3 nodes fit"),
        (job("x", Status.PENDING, instances=(instance("x-0", Status.PENDING, reason="no image"),)), "no image"),
        (job("x", Status.PENDING, events=(WARNED,)), "no GPU is free"),
        (job("x", Status.QUEUING), "its backend has not said why"),
        (job("x", Status.FAILED, reason="exit status 3"), "exit status 3"),
        (job("x", Status.RUNNING, reason="old"), None),
    ],
)
def test_get_says_why(
    backend: MemoryBackend, capsys: pytest.CaptureFixture[str], record: Job, reason: str | None
) -> None:
    backend.job_records = [record]
    assert cluster("get", "x") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("Reason:")] == ([f"Reason:      {reason}"] if reason else [])


def test_get_for_programs(backend: MemoryBackend, capsys: pytest.CaptureFixture[str]) -> None:
    backend.job_records = [job("x", events=(WARNED,))]
    assert cluster("get", "x", "-o", "json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["events"][0]["reason"] == "FailedScheduling"
    assert cluster("get", "x", "-o", "yaml") == 0
    assert yaml.safe_load(capsys.readouterr().out).keys() == found.keys()


def test_logs(backend: MemoryBackend, capsys: pytest.CaptureFixture[str]) -> None:
    backend.job_records = [job("x")]
    assert cluster("logs", "x") == 0
    assert capsys.readouterr().out == "first\n  second\n\n"
    moment = datetime(2026, 8, 1, 12, tzinfo=UTC)
    assert cluster("log", "-f", "-t", "5", "--timestamps", "-i", "x-1", "-c", "c", "--since", "1h30m", "x") == 0
    assert cluster("logs", "x", "--since-time", "2026-08-01T14:00:00+02:00") == 0
    assert backend.asked == [
        ("x", LogOptions()),
        ("x", LogOptions(follow=True, tail=5, timestamps=True, instance="x-1", container="c", since=5400.0)),
        ("x", LogOptions(since_time=moment)),
    ]


@pytest.mark.parametrize(
    ("argv", "asked"),
    [
        (("x",), ("x", "default", None, None, [])),
        (("x", "ls", "-l"), ("x", "default", None, None, ["ls", "-l"])),
        (("-i", "x-1", "x", "-c", "c", "--", "ls", "-i", "--"), ("x", "default", "x-1", "c", ["ls", "-i", "--"])),
        (("x", "-n", "a", "--", "sh", "-c", "echo a  b"), ("x", "a", None, None, ["sh", "-c", "echo a  b"])),
    ],
)
def test_attach(backend: MemoryBackend, argv: tuple[str, ...], asked: tuple[object, ...]) -> None:
    backend.job_records = [job("x")]
    assert cluster("attach", *argv) == 7
    assert backend.asked == [asked]


def test_delete_goes_on_where_one_is_not_there(backend: MemoryBackend, capsys: pytest.CaptureFixture[str]) -> None:
    backend.job_records = [job("a"), job("b"), job("c")]
    assert cluster("delete", "a", "gone", "c") == 1
    captured = capsys.readouterr()
    assert captured.out == "job a is deleted\njob c is deleted\n"
    assert captured.err == "hasten: error: there is no job gone in namespace default\n"
    assert cluster("del", "b") == 0
    assert backend.job_records == []


def test_prune(backend: MemoryBackend, capsys: pytest.CaptureFixture[str]) -> None:
    old, young = ago(days=8), ago(days=6)
    backend.job_records = [
        job("old", Status.SUCCEEDED, created=ago(days=30), ended=old),
        job("failed", Status.FAILED, created=ago(days=30), instances=(instance("f-0", Status.FAILED, ended=old),)),
        job("young", Status.SUCCEEDED, created=ago(days=30), ended=young),
        job("runs", Status.RUNNING, created=ago(days=30)),
        job("elsewhere", Status.FAILED, namespace="other", created=ago(days=30), ended=old),
    ]
    assert cluster("prune", "--since", "7d") == 0
    assert capsys.readouterr().out == "job old is deleted\njob failed is deleted\n"
    assert cluster("prune", "-s", "7d") == 0
    assert capsys.readouterr().out == "no job ended more than 7d ago\n"
    assert cluster("prune", "-A", "-s", "7d") == 0
    assert capsys.readouterr().out == "job other/elsewhere is deleted\n"
    assert [job_record.name for job_record in backend.job_records] == ["young", "runs"]
