"""Volumes and machines by the command, in a backend of memory."""

import json

import pytest
import yaml
from tests.cli.memory_backend import MemoryBackend, ago, cluster, instance, job

from hasten.cluster.backend import Job, Node, Status, VolumeRecord
from hasten.cluster.spec import Volume


def volume(name: str, namespace: str = "default") -> VolumeRecord:
    return VolumeRecord(
        name=name,
        namespace=namespace,
        access_mode="ReadOnlyMany",
        description="the model",
        owner="ann",
        created=ago(days=5),
    )


def test_create(backend: MemoryBackend, capsys: pytest.CaptureFixture[str]) -> None:
    assert cluster("data", "create", "bloom-pvc", "--path", "/data", "--description", "the model", "--read-only") == 0
    bucket = ("--oss-bucket", "b", "--oss-url", "u", "--oss-fuse", "ossfs", "--access-key-id", "k", "--size", "1Ti")
    assert cluster("data", "-n", "a", "create", "other", *bucket, "--mount-options=-o x") == 0
    assert capsys.readouterr().out == "volume bloom-pvc is created\nvolume other is created\n"
    assert backend.made_volumes == [
        Volume(name="bloom-pvc", path="/data", description="the model", read_only=True),
        Volume(
            name="other",
            namespace="a",
            oss_bucket="b",
            oss_url="u",
            oss_fuse="ossfs",
            access_key_id="k",
            size="1Ti",
            mount_options="-o x",
        ),
    ]


def test_a_dry_run(backend: MemoryBackend, capsys: pytest.CaptureFixture[str]) -> None:
    assert cluster("data", "create", "v", "--nfs-server", "s", "--dry-run") == 0
    assert yaml.safe_load(capsys.readouterr().out) == {"kind": "PersistentVolumeClaim", "metadata": {"name": "v"}}
    assert backend.made_volumes == []


def test_list(backend: MemoryBackend, capsys: pytest.CaptureFixture[str]) -> None:
    backend.volume_records = [volume("bloom-pvc"), volume("v", "other")]
    assert cluster("data", "list") == 0
    assert capsys.readouterr().out.splitlines() == [
        "NAME       ACCESSMODE    DESCRIPTION  OWNER  AGE",
        "bloom-pvc  ReadOnlyMany  the model    ann    5d",
    ]
    for flag in ("-A", "--allNamespaces"):
        assert cluster("data", "ls", flag) == 0
        assert capsys.readouterr().out.splitlines() == [
            "NAMESPACE  NAME       ACCESSMODE    DESCRIPTION  OWNER  AGE",
            "default    bloom-pvc  ReadOnlyMany  the model    ann    5d",
            "other      v          ReadOnlyMany  the model    ann    5d",
        ]
    assert cluster("data", "list", "-o", "json", "-n", "other") == 0
    assert [load["name"] for load in json.loads(capsys.readouterr().out)] == ["v"]


def test_delete(backend: MemoryBackend, capsys: pytest.CaptureFixture[str]) -> None:
    backend.volume_records = [volume("v")]
    assert cluster("data", "delete", "gone", "v") == 1
    captured = capsys.readouterr()
    assert captured.out == "volume v is deleted\n"
    assert captured.err == "hasten: error: there is no volume gone in namespace default\n"
    assert backend.volume_records == []


@pytest.mark.parametrize(
    ("argv", "status", "message"),
    [
        (("data",), 2, "the following arguments are required: COMMAND"),
        (("data", "create"), 2, "the following arguments are required: NAME"),
        (("data", "create", "V"), 2, "the volume's name 'V' must have"),
        (("data", "create", "v", "--size", "big"), 2, "--size 'big' is not a quantity"),
        (("data", "create", "v", "--oss-fuse", "fuse"), 2, "invalid choice: 'fuse'"),
        (("data", "create", "v", "--s3-bucket", "a", "--nfs-server", "b"), 2, "a volume has one source"),
        (("top",), 2, "the following arguments are required: COMMAND"),
        (("top", "node", "n9"), 1, "there is no node n9"),
        (("top", "job", "gone"), 1, "there is no job gone in namespace default"),
    ],
)
def test_bad_input(
    backend: MemoryBackend, capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], status: int, message: str
) -> None:
    assert cluster(*argv) == status
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err


def test_top_node(backend: MemoryBackend, capsys: pytest.CaptureFixture[str]) -> None:
    assert cluster("top", "node") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "Allocated/Total GPUs In Cluster: 0/0 (0.0%)"
    backend.node_records = [
        Node(name="n1", address="192.168.7.1", role="master", status="Ready", gpus=0, allocated_gpus=0),
        Node(name="n2", address="192.168.7.22", role="<none>", status="NotReady", gpus=3, allocated_gpus=1),
    ]
    assert cluster("top", "node") == 0
    assert capsys.readouterr().out.splitlines() == [
        "NAME  IPADDRESS     ROLE    STATUS    GPU(Total)  GPU(Allocated)",
        "n1    192.168.7.1   master  Ready     0           0",
        "n2    192.168.7.22  <none>  NotReady  3           1",
        "----------------------------------------------------------------",
        "Allocated/Total GPUs In Cluster: 1/3 (33.3%)",
    ]
    assert cluster("top", "node", "n2", "-o", "json") == 0
    assert [load["name"] for load in json.loads(capsys.readouterr().out)] == ["n2"]


def jobs() -> list[Job]:
    four = tuple(instance(f"four-{rank}", gpus=2, is_chief=not rank) for rank in range(2))
    return [
        job("done", Status.FAILED, created=ago(days=2), ended=ago(days=1)),
        job("one", created=ago(minutes=7), instances=(instance("one-0", Status.PENDING, node=None),)),
        job("four", created=ago(hours=26), gpus=4, instances=four),
        job("else", namespace="other", gpus=0),
    ]


def test_top_job(backend: MemoryBackend, capsys: pytest.CaptureFixture[str]) -> None:
    backend.job_records = jobs()
    assert cluster("top", "job") == 0
    assert capsys.readouterr().out.splitlines() == [
        "NAME  STATUS   TRAINER     AGE  GPU(Requested)  GPU(Allocated)  NODE",
        "four  RUNNING  PYTORCHJOB  1d   4               4               192.168.123.35",
        "done  FAILED   PYTORCHJOB  2d   1               N/A             192.168.123.35",
        "one   RUNNING  PYTORCHJOB  7m   1               0               N/A",
        "",
        "Total Allocated/Requested GPUs of Training Jobs: 4/5",
    ]
    assert cluster("top", "job", "one", "-A") == 0
    assert capsys.readouterr().out.splitlines()[:2] == [
        "NAMESPACE  NAME  STATUS   TRAINER     AGE  GPU(Requested)  GPU(Allocated)  NODE",
        "default    one   RUNNING  PYTORCHJOB  7m   1               0               N/A",
    ]
    assert cluster("top", "job", "-A", "-o", "yaml") == 0
    assert len(yaml.safe_load(capsys.readouterr().out)) == 4
