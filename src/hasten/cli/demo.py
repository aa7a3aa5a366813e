"""`hasten demo`: convert, compare, generate, serve and report with the demo model, by the public commands."""

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hasten
from hasten.cli.interrupts import cleaned_up_when_terminated
from hasten.cli.options import Parser, path
from hasten.core.errors import ConfigError, EngineError
from hasten.core.extras import require_extra
from hasten.core.ports import free_ports

PROMPT = "That year the spring came early."
MOST_DIFFERING = 0.01
"""Share of the samples by which the accuracies may differ."""
_STOP_S = 60.0
"""That the server may take to end."""


@dataclass(frozen=True)
class Comparison:
    """What `bench lambada --compare` found."""

    hf_accuracy: float
    hf_seconds: float
    accuracy: float
    seconds: float
    differing: int
    total: int

    @property
    def speedup(self) -> float:
        """How many times as fast as Hugging Face."""
        return self.hf_seconds / self.seconds

    @property
    def faults(self) -> list[str]:
        """What the demo must not show: another accuracy, or no gain in time."""
        faults = []
        if abs(self.hf_accuracy - self.accuracy) > 100 * MOST_DIFFERING:
            faults.append(f"accuracies differ: {self.hf_accuracy:.2f}% and {self.accuracy:.2f}%")
        if self.speedup <= 1:
            faults.append(f"hasten is not faster: {self.speedup:.2f} times Hugging Face's speed")
        return faults


def add_parser(commands: "argparse._SubParsersAction[Parser]") -> None:
    """Add the subcommand `demo`."""
    parser = commands.add_parser(
        "demo",
        help="convert, compare, generate, serve and report with the demo model",
        description="Convert the demo model, compare it with Hugging Face on the test stories, generate a story, "
        "serve it to a gRPC client, and write a report on it: about a minute on two quiet cores, half of it for the "
        "report.",
    )
    parser.add_argument("--model", type=path, metavar="PATH", help="model to show (default: the demo model)")
    parser.add_argument("--dataset", type=path, metavar="FILE", help="texts to measure on (default: the test stories)")
    parser.add_argument(
        "--client", type=path, metavar="FILE", help="program that queries the server (default: hasten's)"
    )
    parser.add_argument(
        "--output-dir", type=path, default="build/demo", metavar="PATH", help="where to write (default: %(default)s)"
    )
    parser.add_argument(
        "--report", action=argparse.BooleanOptionalAction, default=True, help="end with a quick report (default: yes)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the commands one after the other; 1 if any fails or the comparison is not as it should be."""
    require_extra("serve", "hasten demo")
    model, dataset, client = args.model or demo_file("model"), args.dataset or demo_file("test.jsonl"), args.client
    client = client or demo_file("client.py")
    for file in (Path(model) / "config.json", Path(dataset), Path(client)):
        if not file.is_file():
            raise ConfigError(f"{file} does not exist")
    from hasten.cli.main import main

    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint, results = str(folder / "model-fp16"), str(folder / "lambada.json")
    start = time.perf_counter()
    steps = _steps(model, dataset, checkpoint, results)
    seconds = []
    for step in steps:
        began = time.perf_counter()
        status = _step(main, step)
        seconds.append(time.perf_counter() - began)
        if status:
            return status
    with cleaned_up_when_terminated():
        status = _serve(checkpoint, model, client, folder / "serve.log")
    if status:
        return status
    comparison = _read(results)
    _show(comparison, convert_seconds=seconds[0], all_seconds=time.perf_counter() - start)
    if args.report and (status := _step(main, _report(model, dataset, folder))):
        return status
    print(f"\nServe this model, with a page at http://localhost:8000/:\n\n$ hasten serve {shlex.quote(checkpoint)}\n")
    for fault in comparison.faults:
        print(f"hasten: demo failed: {fault}", file=sys.stderr)
    return 1 if comparison.faults else 0


def demo_file(name: str) -> str:
    """A file or folder of the demo: in the installed package, or else in the repository that it runs from."""
    package = Path(hasten.__file__).resolve().parent
    found = package / "demo" / name
    if not found.exists():
        source = {"model": "demo-model", "test.jsonl": "stories/test.jsonl"}.get(name, name)
        found = package.parents[1] / "examples" / source
    return str(found.relative_to(Path.cwd()) if found.is_relative_to(Path.cwd()) else found)


def _steps(model: str, dataset: str, checkpoint: str, results: str) -> list[list[str]]:
    inputs = ["--tokenizer-path", model, "--dataset-path", dataset, "--checkpoint-path", checkpoint]
    compare = ["--compare", "--batch-size", "16", "-dt", "fp32", "--show-progress", "--output-path", results]
    return [
        ["convert", "-i", model, "-o", checkpoint, "-tp", "2", "-dt", "fp16"],
        ["bench", "lambada", *inputs, *compare],
        ["generate", checkpoint, "--prompt", PROMPT, "--max-new-tokens", "64", "-dt", "fp32"],
    ]


def _report(model: str, dataset: str, folder: Path) -> list[str]:
    page = str(folder / "report.html")
    return ["report", model, "--dataset", dataset, "-dt", "fp32", "--quick", "--fresh", "--output", page]


def _step(main: Callable[[Sequence[str]], int], command: Sequence[str]) -> int:
    print(f"\n$ {shlex.join(['hasten', *command])}", flush=True)
    return main(command)


def _serve(checkpoint: str, model: str, client: str, log: Path) -> int:
    """Serve, ask with the client, stop; the first status that is not 0."""
    from hasten.bench.served import CALL_S, environment_without_proxy, wait_until_ready

    http, grpc, metrics = free_ports(3)
    host, address = "127.0.0.1", f"127.0.0.1:{grpc}"
    ports = ["--http-port", str(http), "--grpc-port", str(grpc), "--metrics-port", str(metrics)]
    command = ["serve", checkpoint, "-dt", "fp32", "--http-address", host, "--grpc-address", host, *ports]
    command += ["--log-file", str(log)]
    question = [client, "--url", address, "--tokenizer", model, "--prompt", PROMPT]
    log.unlink(missing_ok=True)
    print(f"\n$ {shlex.join(['hasten', *command])} &", flush=True)
    server = subprocess.Popen([sys.executable, "-m", "hasten", *command])
    try:
        wait_until_ready(address, lambda: server.poll() is None, log)
        print(f"$ {shlex.join(['python', *question])}", flush=True)
        reply = subprocess.run(
            [sys.executable, *question], check=False, timeout=CALL_S, env=environment_without_proxy()
        )
        if reply.returncode:
            return reply.returncode
        print("$ kill %1", flush=True)
        server.terminate()
        return server.wait(_STOP_S)
    except subprocess.TimeoutExpired as error:
        what = "the server to end" if error.timeout == _STOP_S else "the client's answer"
        raise EngineError(f"waited {error.timeout:.0f} s for {what}; see {log}") from None
    finally:
        server.kill()
        server.wait()


def _read(path: str) -> Comparison:
    report: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
    *others, ours = report["results"]
    hf = next(other for other in others if other["engine"] == report["compared_with"])
    return Comparison(
        hf_accuracy=hf["accuracy"],
        hf_seconds=hf["seconds"],
        accuracy=ours["accuracy"],
        seconds=ours["seconds"],
        differing=report["differing_samples"],
        total=ours["total"],
    )


def _show(found: Comparison, *, convert_seconds: float, all_seconds: float) -> None:
    from hasten.bench.report import print_table

    print()
    print_table(
        f"The demo on {found.total} stories",
        ("", "Hugging Face", "hasten"),
        [
            ("convert, seconds", "", f"{convert_seconds:.2f}"),
            ("accuracy", f"{found.hf_accuracy:.2f}%", f"{found.accuracy:.2f}%"),
            ("generate calls, seconds", f"{found.hf_seconds:.2f}", f"{found.seconds:.2f}"),
            ("speedup", "1", f"{found.speedup:.2f}"),
            ("samples whose answers differ", "", f"{found.differing} of {found.total}"),
            ("all steps so far, seconds", "", f"{all_seconds:.0f}"),
        ],
    )
