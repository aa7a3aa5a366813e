import contextlib
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import pytest
from tests.waiting import LIMIT_S


class Done(Protocol):
    """What the fixtures of this folder return."""

    status: int
    out: str
    err: str


Hasten = Callable[..., Done]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def many_layers(make_bloom: Callable[..., Path]) -> Path:
    """So many tensors that the log of one conversion fills a pipe."""
    return make_bloom(n_layer=48, hidden_size=32, n_head=4)


def test_the_log_is_faster_transformers(tiny_bloom: Path, tmp_path: Path, hasten_here: Hasten) -> None:
    out = tmp_path / "out"
    done = hasten_here("convert", "-i", tiny_bloom, "-o", f"{out}/", "-tp", 2, "-dt", "fp16", "-p", 2, "-v", "-s")
    lines = done.out.splitlines()
    assert done.status == 0
    assert lines[:12] == [
        "",
        "======================= Arguments =======================",
        f" - input_dir...........: {tiny_bloom}",
        f" - output_dir..........: {out}/",
        " - tensor_para_size....: 2",
        " - data_type...........: fp16",
        " - processes...........: 2",
        " - verbose.............: True",
        " - by_shard............: True",
        "=========================================================",
        "loading from safetensors format",
        "model file num: 1",
    ]
    folder = out / "2-gpu"
    for line in (
        f" - model.pre_decoder_layernorm.bias................: shape (64,)              "
        f"| saved at {folder}/model.pre_decoder_layernorm.bias.bin",
        f" - model.layers.0.attention.query_key_value.bias...: shape (3, 32)          s "
        f"| saved at {folder}/model.layers.0.attention.query_key_value.bias.0.bin (0/2)",
        f" - model.layers.2.mlp.dense_4h_to_h.weight.........: shape (128, 64)        s "
        f"| saved at {folder}/model.layers.2.mlp.dense_4h_to_h.weight.1.bin (1/2)",
    ):
        assert line in lines
    assert len(lines) == 12 + len(list(folder.glob("*.bin"))) + 1
    assert re.fullmatch(r"Checkpoint conversion \(HF >> FT\) has done \(elapsed time: \d+\.\d\d sec\)", lines[-1])


def test_a_quiet_run_prints_no_tensors(tiny_bloom: Path, tmp_path: Path, hasten_here: Hasten) -> None:
    done = hasten_here("convert", "-i", tiny_bloom, "-o", tmp_path / "out", "--format", "safetensors")
    lines = done.out.splitlines()
    assert lines[9:12] == [" - format..............: safetensors", "=" * 57, "loading from safetensors format"]
    assert lines[-1].startswith("Checkpoint conversion (HF >> safetensors) has done")
    assert len(lines) == 14
    assert done.err == ""
    again = hasten_here("convert", "--input-dir", tmp_path / "out", "--output-dir", tmp_path / "ft", "--by-shard")
    assert "loading from ranked safetensors format" in again.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-tp", "3"], "tensor parallel size 3 does not divide attention heads (8)"),
        (["-p", "0"], "processes must be at least 1"),
        (["-dt", "int8"], "invalid choice: 'int8'"),
        (["-i", "nowhere"], "there is no folder nowhere"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], message: str, tiny_bloom: Path, tmp_path: Path, hasten_here: Hasten
) -> None:
    done = hasten_here("convert", "-i", tiny_bloom, "-o", tmp_path / "out", *arguments)
    assert done.status == 2
    assert done.err.startswith("hasten: error: ")
    assert message in done.err
    assert len(done.err.splitlines()) == 1
    assert done.out == ""
    assert not (tmp_path / "out").exists()


def test_a_terminal_gets_a_bar(tiny_bloom: Path, tmp_path: Path) -> None:
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "hasten", "convert", "-i", str(tiny_bloom), "-o", str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=slave, env={**os.environ, "TERM": "xterm"})
    os.close(slave)
    seen = b""
    with contextlib.suppress(OSError):
        while chunk := os.read(master, 4096):
            seen += chunk
    os.close(master)
    assert process.wait() == 0
    assert b"MB" in seen or b"kB" in seen


@contextlib.contextmanager
def _held_in_the_middle(source: Path, out: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """A conversion that has written files and is stuck on its log, which nobody reads further."""
    # a session of its own, as a shell gives a job, so that a signal reaches this process alone
    process = subprocess.Popen(
        [sys.executable, "-m", "hasten", "convert", "-i", str(source), "-o", str(out), "-tp", "2", "-v", "-dt", "bf16"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        while b"saved at" not in process.stdout.readline():
            assert process.poll() is None
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_kill_in_the_middle_leaves_the_old_folder(many_layers: Path, tmp_path: Path, hasten_here: Hasten) -> None:
    out = tmp_path / "out"
    assert hasten_here("convert", "-i", many_layers, "-o", out, "-tp", 2).status == 0
    before = contents(out)
    with _held_in_the_middle(many_layers, out) as process:
        (work,) = tmp_path.glob(".out.hasten-*")
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert list(work.rglob("*.bin"))
    assert contents(out) == before
    assert hasten_here("convert", "-i", many_layers, "-o", out, "-tp", 2, "-dt", "fp16").status == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_the_run_and_cleans_up(
    number: signal.Signals, status: int, many_layers: Path, tmp_path: Path
) -> None:
    with _held_in_the_middle(many_layers, tmp_path / "deep" / "out") as process:
        process.send_signal(number)
        assert process.wait(timeout=LIMIT_S) == status
        assert process.stderr is not None
        error = process.stderr.read().decode()
    assert "Traceback" not in error
    assert error.startswith("hasten: ")
    assert list(tmp_path.iterdir()) == []


PEAKS = """
import re, sys
from pathlib import Path
import hasten.checkpoint.convert
from hasten.cli.main import main

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

before = peak()
for flags in (["-s"], []):
    assert main([*sys.argv[1:], *flags]) == 0
    print("grew", peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
def test_memory_by_shard_is_one_shard_and_one_tensor(make_bloom: Callable[..., Path], tmp_path: Path) -> None:
    from transformers import BloomForCausalLM

    source = make_bloom(n_layer=12, hidden_size=384)
    shards = tmp_path / "in"
    shutil.copytree(source, shards, ignore=shutil.ignore_patterns("*.safetensors"))
    BloomForCausalLM.from_pretrained(source).save_pretrained(shards, max_shard_size="8MB")
    sizes = [path.stat().st_size for path in shards.glob("*.safetensors")]
    assert len(sizes) >= 12
    arguments = ["convert", "-i", str(shards), "-o", str(tmp_path / "out"), "-tp", "2", "-dt", "fp16"]
    done = subprocess.run([sys.executable, "-c", PEAKS, *arguments], capture_output=True, text=True, check=True)
    by_shard, at_once = (int(found) for found in re.findall(r"^grew (\d+)$", done.stdout, re.MULTILINE))
    largest_tensor = 4 * 384 * 4 * 384
    overhead = 28 << 20  # the blocks of the worker, and modules that are imported late
    assert by_shard < max(sizes) + largest_tensor + overhead
    assert at_once > sum(sizes) / 2, "the measure itself does not see what is mapped"


@pytest.mark.parametrize("limit", ["file system", "size of a file"])
def test_a_full_disk(limit: str, tiny_bloom: Path, tmp_path: Path) -> None:
    """A file system that is too small is seen beforehand; a limit that no system tells of, while writing."""
    small = tmp_path / "small"
    small.mkdir()
    command = f'"$@" -i {tiny_bloom} -o {small}/out; status=$?; ls -A {small}; exit $status'
    shell = ["sh", "-c", f"ulimit -f 40; {command}", "sh"]
    if limit == "file system":
        mount = f"mount -t tmpfs -o size=400k none {small}"
        own = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
        if subprocess.run([*own, mount], capture_output=True, check=False).returncode:
            pytest.skip("this user may not mount")
        shell = [*own, f"{mount} && {{ {command}; }}", "sh"]
    done = subprocess.run(
        [*shell, sys.executable, "-m", "hasten", "convert"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "no space left" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout.splitlines()[-1:] == ([] if limit == "file system" else ["model file num: 1"])


def test_what_was_there_is_said_to_be_replaced(tiny_bloom: Path, tmp_path: Path, hasten_here: Hasten) -> None:
    command = ("convert", "-i", tiny_bloom, "-o", tmp_path / "out")
    assert "replaced" not in hasten_here(*command).out
    assert f"\nreplaced {tmp_path / 'out' / '1-gpu'}\nCheckpoint conversion" in hasten_here(*command).out
    assert "replaced" not in hasten_here(*command, "-tp", "2").out
