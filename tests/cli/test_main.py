import subprocess
import sys

import pytest

import hasten
from hasten.cli.main import main

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
    done = run_python(TIMED, *argv)
    assert done.returncode == 0, done.stderr
    assert "heavy: []" in done.stderr
    assert float(done.stderr.rpartition("cpu: ")[2]) < 0.5
    assert done.stdout


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


def test_the_installed_command_and_the_module_are_the_same() -> None:
    done = subprocess.run([sys.executable, "-m", "hasten", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"hasten {hasten.__version__}\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["accelerate"], "invalid choice: 'accelerate'"),
        (["generate"], "the following arguments are required: MODEL"),
        (["generate", "folder"], "there is no prompt"),
        (["generate", "folder", "--prompts-file", "/nowhere"], "cannot read prompts from /nowhere"),
        (["generate", "folder", "--prompt", "x", "--max-new-tokens", "0"], "max_tokens must be at least 1, got 0"),
        (
            ["generate", "folder", "--prompt", "x", "--temperature", "-1"],
            "temperature must be finite and not negative, got -1.0",
        ),
        (["generate", "folder", "--prompt", "x", "--top-p", "1.5"], "top_p must be above 0 and at most 1, got 1.5"),
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


def test_unforeseen_errors_keep_their_traceback() -> None:
    done = raising("raise ZeroDivisionError('a bug')")
    assert done.returncode == 1
    assert "Traceback" in done.stderr


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
