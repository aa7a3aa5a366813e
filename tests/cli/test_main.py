import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from tests.waiting import LIMIT_S, attempts

import hasten
from hasten.cli.main import _MODULES, build_parser, main
from hasten.core.extras import EXTRAS

TIMED = """
import sys, time
from hasten.cli.main import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    assert end.code == 0, end.code
print("heavy:", sorted({"torch", "transformers", "tokenizers", "numpy", "rich"} & set(sys.modules)), file=sys.stderr)
print("cpu:", time.process_time(), file=sys.stderr)
"""


def run_python(code: str, *argv: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("argv", [["--help"], ["generate", "--help"], ["bench", "lambada", "--help"], ["--version"]])
def test_help_is_quick_and_imports_nothing_heavy(argv: list[str]) -> None:
    for _ in attempts("help for half a second of CPU time"):  # the first one may compile modules
        done = run_python(TIMED, *argv)
        assert done.returncode == 0, done.stderr
        assert "heavy: []" in done.stderr
        assert done.stdout
        if float(done.stderr.rpartition("cpu: ")[2]) < 0.5:
            break


@pytest.mark.parametrize("command", _MODULES)
def test_a_command_alone_is_as_it_is_in_the_whole_command_line(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = []
    for parser in (build_parser(), build_parser(command)):
        with pytest.raises(SystemExit, match="0"):
            parser.parse_args([command, "--help"])
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]
    assert shown[0].startswith(f"usage: hasten {command} ")


def test_a_command_imports_no_other() -> None:
    code = "import sys; from hasten.cli.main import build_parser; build_parser('generate'); print(*sys.modules)"
    imported = run_python(code).stdout.split()
    assert "hasten.cli.generate" in imported
    assert not {f"hasten.cli.{module}" for name, module in _MODULES.items() if name != "generate"} & {*imported}


def test_the_package_is_light_and_its_names_come_when_asked_for() -> None:
    code = "import sys, hasten; hasten.SamplingParams, hasten.ConfigError; print('torch' in sys.modules, dir(hasten))"
    done = run_python(code)
    assert done.stdout.startswith("False"), done.stderr
    assert "'LLM'" in done.stdout


@pytest.mark.parametrize("name", [name for name in hasten.__all__ if name != "__version__"])
def test_every_exported_name_is_there(name: str) -> None:
    assert getattr(hasten, name).__name__ == name


def test_names_that_are_not_exported() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        getattr(hasten, "Nothing")  # noqa: B009 - the plain form is a type error, as it should be


def test_nothing_is_meant_where_no_option_is_near(capsys: pytest.CaptureFixture[str]) -> None:
    """Dashes, which all options have, make none near."""
    assert main(["plan", "m", "--slo", "foo"]) == 2
    assert capsys.readouterr().err == "hasten: error: unrecognized arguments: --slo foo (see `hasten plan --help`)\n"


def test_the_installed_command_and_the_module_are_the_same() -> None:
    done = subprocess.run([sys.executable, "-m", "hasten", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"hasten {hasten.__version__}\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["accelerate"], "invalid choice: 'accelerate'"),
        (["generat"], "did you mean generate? (see `hasten --help`)"),
        (["bench", "suit"], "did you mean suite? (see `hasten bench --help`)"),
        (["generate", "m", "--max-token", "3"], "did you mean --max-tokens? (see `hasten generate --help`)"),
        (["repository", "create", "m", "r", "--decouple"], "mean --decoupled? (see `hasten repository create --help`)"),
        (["cluster", "list", "--al-namespaces"], "did you mean --all-namespaces? (see `hasten cluster list --help`)"),
        (["generate", "m", "--prompt", "x", "--kv-cache-memory", "1X"], "'1X' is not a number of bytes"),
        (
            ["generate", "m", "--prompt", "x", "--gpu-memory-utilization", "2"],
            "--gpu-memory-utilization must be above 0 and at most 1, got 2.0",
        ),
        (["generate", "m", "--prompt", "x", "-tp", "0"], "--tensor-para-size must be at least 1, got 0"),
        (["serve", "m", "--max-num-batched-tokens", "2"], "raise the first or lower the second"),
        (["generate"], "the following arguments are required: MODEL"),
        (["generate", "folder"], "there is no prompt"),
        (["generate", "folder", "--prompts-file", "/nowhere"], "cannot read prompts from /nowhere"),
        (
            ["generate", "folder", "--prompt", "x", "--max-new-tokens", "0"],
            "--max-new-tokens must be at least 1, got 0",
        ),
        (
            ["generate", "folder", "--prompt", "x", "--temperature", "-1"],
            "temperature must be finite and not negative, got -1.0",
        ),
        (["generate", "folder", "--prompt", "x", "--top-p", "1.5"], "--top-p must be above 0 and at most 1, got 1.5"),
        (["generate", "folder", "--prompt", "x", "--prompt", "y", "--stream"], "add --json"),
        (
            ["bench", "lambada", "--tokenizer-path", "a", "--dataset-path", "b", "--beam-width", "2", "--top-p", "0.9"],
            "leave --top-k, --top-p, --temperature out",
        ),
        (["demo", "--model", "nowhere"], "nowhere/config.json does not exist"),
    ],
)
def test_bad_input_is_one_line_and_status_2(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("hasten: error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1


def raising(code: str) -> "subprocess.CompletedProcess[str]":
    """Run the command with `generate` replaced by some code, in a process of its own."""
    return run_python(
        "import sys\n"
        "from hasten.cli import generate, main\n"
        "from hasten.core.errors import CapacityError, RankError\n"
        f"def run(args):\n    {code}\n"
        "generate.run = run\n"
        "sys.exit(main.main(['generate', 'folder', '--prompt', 'x']))"
    )


@pytest.mark.parametrize(
    ("code", "status", "message"),
    [
        ("raise CapacityError('too little memory')", 1, "hasten: error: too little memory\n"),
        ("raise RankError('rank 1 died')", 1, "hasten: error: rank 1 died\n"),
        ("raise KeyboardInterrupt", 130, "hasten: interrupted\n"),
    ],
)
def test_status_of_failures(code: str, status: int, message: str) -> None:
    done = raising(code)
    assert (done.returncode, done.stderr) == (status, message)


@pytest.fixture
def model(tiny_bloom: Path) -> list[str]:
    return ["generate", str(tiny_bloom), "--prompt", "the", "--max-new-tokens", "2", "--device", "cpu"]


def in_shell(command: str, argv: list[str], **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run hasten as `"$@"` of a shell's command, which may close or redirect what hasten prints to."""
    return subprocess.run(
        ["sh", "-c", command, "sh", sys.executable, "-m", "hasten", *argv],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT_S,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("redirection", "unbuffered", "form"),
    [(">&-", "", ()), (">&-", "1", ("--json",)), ("> /dev/full", "", ("--json",)), ("> /dev/full", "1", ())],
)
def test_output_that_cannot_be_written(
    model: list[str], redirection: str, unbuffered: str, form: tuple[str, ...]
) -> None:
    message = "standard output is closed" if redirection == ">&-" else "No space left on device"
    for argv in ([*model, *form], ["--help"], ["--version"]):
        done = in_shell(f'"$@" {redirection}', argv, PYTHONUNBUFFERED=unbuffered)
        assert done.returncode == 1, done.stderr
        assert done.stderr.startswith("hasten: error: ")
        assert message in done.stderr
        assert done.stderr.count("\n") == 1


def to_a_file(path: str) -> int:
    return os.open(path, os.O_WRONLY)


def to_nobody() -> int:
    """The end to write to of a pipe whose reader has gone."""
    reading, writing = os.pipe()
    os.close(reading)
    return writing


@pytest.mark.parametrize(
    ("opened", "status", "message"),
    [
        (partial(to_a_file, "/dev/full"), 1, "hasten: error: cannot write the output: No space left on device\n"),
        (to_nobody, 141, ""),
    ],
    ids=["full", "nobody"],
)
def test_a_log_that_cannot_be_written_is_no_fault_of_the_folder(
    tiny_bloom: Path, tmp_path: Path, opened: Callable[[], int], status: int, message: str
) -> None:
    output, log = tmp_path / "out", opened()
    argv = [sys.executable, "-m", "hasten", "convert", "-i", str(tiny_bloom), "-o", str(output)]
    try:
        done = subprocess.run(argv, stdout=log, stderr=subprocess.PIPE, text=True, check=False, timeout=LIMIT_S)
    finally:
        os.close(log)
    assert (done.returncode, done.stderr) == (status, message)
    assert not output.exists()


def test_the_reader_of_a_table_that_has_gone() -> None:
    code = (
        "import sys; from hasten.bench.report import print_table; from hasten.cli import main, plan\n"
        "plan.run = lambda args: print_table('title', ['name', 'figure'], [['a', '1']])\n"
        "sys.exit(main.main(['plan', 'folder']))"
    )
    pipe = to_nobody()
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], stdout=pipe, stderr=subprocess.PIPE, text=True, check=False, timeout=LIMIT_S
        )
    finally:
        os.close(pipe)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_closed_standard_error_or_input_disturbs_nothing(model: list[str]) -> None:
    expected = in_shell('"$@"', model)
    done = in_shell('"$@" <&- 2>&-', model)
    assert (done.returncode, done.stdout) == (0, expected.stdout)
    assert in_shell('"$@" >&- 2>&-', model).returncode == 1


def test_what_writes_nothing_to_a_closed_output_succeeds(tiny_bloom: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    argv = ["bench", "suite", str(tiny_bloom), "--tests", "lat", "--repetitions", "1", "--max-model-len", "256"]
    done = in_shell('"$@" >&-', [*argv, "--output-path", str(report)])
    assert done.returncode == 1  # the table
    assert "standard output is closed" in done.stderr
    assert json.loads(report.read_text())["lat_b1"]["e2e_s"] > 0


READ_ONLY = "/proc/hasten"
"""A folder that nobody can make, not even root."""


def test_a_file_where_a_folder_is_needed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.touch()
    assert main(["demo", "--output-dir", str(file)]) == 2
    assert capsys.readouterr().err == f"hasten: error: {file} is a file, and a folder is needed there\n"


@pytest.mark.parametrize(
    "argv",
    [
        ["repository", "create", "{model}", READ_ONLY],
        ["repository", "create", "{model}", READ_ONLY, "--for", "triton"],
        ["demo", "--output-dir", READ_ONLY],
        ["convert", "-i", "{model}", "-o", READ_ONLY],
        ["bench", "throughput", "{model}", "--output-path", f"{READ_ONLY}/x.json"],
        ["bench", "throughput", "{model}", "--output-path", "/proc/self/status"],
    ],
)
def test_an_unwritable_folder_is_one_line(
    argv: list[str], tiny_bloom: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([word.format(model=tiny_bloom) for word in argv]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("hasten: error: ")
    assert "/proc/" in captured.err
    assert captured.err.count("\n") == 1


def test_a_gpu_that_is_not_there_is_said_with_what_hides_it(model: list[str]) -> None:
    done = in_shell('"$@"', [*model, "--device", "cuda"], CUDA_VISIBLE_DEVICES="")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("hasten: error: no NVIDIA GPU is visible (CUDA_VISIBLE_DEVICES is '', torch is ")
    assert done.stderr.endswith("use --device cpu\n")
    assert done.stderr.count("\n") == 1


def test_a_cache_too_small_for_what_was_asked_is_bad_input(
    model: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*model, "--kv-cache-memory", "1K"]) == 2
    assert capsys.readouterr().err.endswith("lower --max-model-len or raise --kv-cache-memory\n")


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
from hasten.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_full_disk_is_one_line_that_names_the_file_and_leaves_nothing(tiny_bloom: Path, tmp_path: Path) -> None:
    done = run_python(LIMITED, "repository", "create", str(tiny_bloom), str(tmp_path / "r"))
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"hasten: error: cannot write {tmp_path}/r/")
    assert done.stderr.endswith("config.pbtxt: File too large\n")
    assert done.stderr.count("\n") == 1
    assert run_python(LIMITED.replace("(0,", "(1 << 30,"), "repository", "create", str(tiny_bloom), str(tmp_path / "r"))
    assert list((tmp_path / "r").glob("*/config.pbtxt"))


def test_a_user_without_home_is_told_what_to_set() -> None:
    no_home = {name: value for name, value in os.environ.items() if name not in ("HOME", "HASTEN_HOME")}
    code = (
        "import pwd, sys\n"
        "def getpwuid(number): raise KeyError(number)\n"
        "pwd.getpwuid = getpwuid\n"  # a user without an entry in /etc/passwd
        "from hasten.cli.main import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    for argv, advice in ((["cluster", "list"], "HASTEN_HOME"), (["generate", "~/m", "--prompt", "x"], "HOME")):
        done = subprocess.run(
            [sys.executable, "-c", code, *argv],
            env=no_home,
            capture_output=True,
            text=True,
            check=False,
            timeout=LIMIT_S,
        )
        assert done.returncode == 2, done.stderr
        assert f"there is no home directory; set {advice}" in done.stderr
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "extra", "module"),
    [
        (["serve", "m"], "serve", "grpc"),
        (["repository", "create", "m", "r"], "serve", "tritonclient"),
        (["bench", "serving", "m"], "serve", "starlette"),
        (["demo"], "serve", "uvicorn"),
        (["cluster", "list"], "cluster", "kubernetes"),
    ],
)
def test_a_missing_extra_is_named_by_the_command_that_needs_it(argv: list[str], extra: str, module: str) -> None:
    code = f"import sys\nsys.modules[{module!r}] = None\nfrom hasten.cli.main import main\nsys.exit(main(sys.argv[1:]))"
    done = run_python(code, *argv)
    assert done.returncode == 2, done.stderr
    assert f"needs {EXTRAS[extra][module]}, which is not installed; run: pip install 'hasten[{extra}]'" in done.stderr
    assert done.stderr.count("\n") == 1


def test_unforeseen_errors_keep_their_traceback() -> None:
    done = raising("raise ZeroDivisionError('a bug')")
    assert done.returncode == 1
    assert "Traceback" in done.stderr


SWALLOWS_AN_INTERRUPT = """
import os, signal, time
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0)
except BaseException:
    print("interrupted within an import", flush=True)
"""
IMPORTS_IT = """
import subprocess, sys, time
from hasten.cli import generate, main
def run(args):
    print("begins")
    child = subprocess.Popen(["sleep", "100"]) if "child" in sys.argv else None
    try:
        import swallows
        print("imported")
        while True:
            time.sleep(0.01)
    finally:
        print("cleaned up")
        if child is not None:
            child.kill()
            child.wait()
generate.run = run
sys.exit(main.main(["generate", "folder", "--prompt", "x"]))
"""


@pytest.mark.parametrize(
    ("argv", "printed"), [((), "begins\n"), (("child",), "begins\nimported\ncleaned up\n")], ids=["alone", "child"]
)
def test_an_interrupt_within_an_import_is_not_lost(tmp_path: Path, argv: tuple[str, ...], printed: str) -> None:
    (tmp_path / "swallows.py").write_text(SWALLOWS_AN_INTERRUPT)
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS_IT, *argv],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT_S,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, printed, "hasten: interrupted\n")


INTERRUPTED_AT = """
import atexit, os, signal, sys
from hasten.__main__ import run
class Interrupts:
    @staticmethod
    def find_spec(name, path, target=None):
        if name == where:
            os.kill(os.getpid(), signal.SIGINT)
where = {where!r}
sys.meta_path.insert(0, Interrupts)
if where == "exit":
    atexit.register(os.kill, os.getpid(), signal.SIGINT)
elif where == "parser":
    import argparse
    argparse.ArgumentParser.add_subparsers = lambda *_, **__: os.kill(os.getpid(), signal.SIGINT)
sys.argv = ["hasten", "--version"]
sys.exit(run())
"""


@pytest.mark.parametrize(
    ("where", "status", "error"),
    [
        ("hasten.cli.interrupts", -signal.SIGINT, ""),
        ("hasten.cli.main", 130, "hasten: interrupted\n"),
        ("parser", 130, "hasten: interrupted\n"),
        ("exit", -signal.SIGINT, ""),
    ],
)
def test_an_interrupt_before_or_after_the_command_itself_shows_no_traceback(
    where: str, status: int, error: str
) -> None:
    done = run_python(INTERRUPTED_AT.format(where=where))
    printed = f"hasten {hasten.__version__}\n" if where == "exit" else ""
    assert (done.returncode, done.stdout, done.stderr) == (status, printed, error)


def test_an_interrupt_that_is_ignored_stays_ignored() -> None:
    code = "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n" + INTERRUPTED_AT.format(where="exit")
    done = run_python(code)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"hasten {hasten.__version__}\n", "")


def test_little_is_imported_before_interrupts_are_quiet() -> None:
    code = (
        "import signal, sys\n"
        "before = set(sys.modules)\n"
        "import hasten.__main__\n"
        "print(*sorted(set(sys.modules) - before))\n"
    )
    assert run_python(code).stdout == "gc hasten hasten.__main__\n"


def test_a_reader_that_goes_away_is_no_error() -> None:
    command = [
        sys.executable,
        "-c",
        "import sys; from hasten.cli import generate, main\n"
        "def run(args):\n    [print('x' * 1000) for _ in range(1000)]\n    return 0\n"
        "generate.run = run; sys.exit(main.main(['generate', 'folder', '--prompt', 'x']))",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141
