"""`hasten generate`: continue prompts."""

import argparse
import codecs
import io
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten.cli import ahead
from hasten.cli.options import (
    Parser,
    add_engine_options,
    add_sampling_options,
    engine_options,
    path,
    sampling_params,
)
from hasten.core.errors import ConfigError, EngineError
from hasten.core.files import reading
from hasten.core.text import from_command_line, require_utf8, utf8_lines
from hasten.core.types import CompletionOutput, FinishReason, Logprob, RequestOutput, SamplingParams

if TYPE_CHECKING:
    from hasten.engine.llm import LLM

SAMPLING_DEFAULTS = {"temperature": 0.0, "max_tokens": 32}
# `--seed` is the requests' own; the engine's would only say the same again
ENGINE_SKIP = frozenset({"seed"})
_TEXTS = ("prompt", "stop", "bad_words", "choice", "json_schema", "regex", "grammar")


def add_parser(commands: "argparse._SubParsersAction[Parser]") -> None:
    """Add the subcommand `generate`."""
    parser = commands.add_parser(
        "generate",
        help="continue prompts",
        description="Continue prompts with a model, greedily unless a temperature is given.",
    )
    parser.add_argument("model", type=path, metavar="MODEL", help="folder of the checkpoint, or its Hugging Face id")
    parser.text_option = "--prompt"
    parser.add_argument("--prompt", action="append", default=[], help="text to continue; may be given more than once")
    parser.add_argument(
        "--prompts-file", type=path, metavar="FILE", help="file with one prompt per line; - reads standard input"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object per prompt, with token ids")
    parser.add_argument(
        "--stream",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="print text as it is generated (default: on a terminal, for one prompt); with --json, one object per step",
    )
    add_sampling_options(parser, defaults=SAMPLING_DEFAULTS)
    add_engine_options(parser, skip=ENGINE_SKIP)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Generate and print."""
    _take_text(args)
    _write_text()
    prompts = _read_prompts(args)
    _check_shown(args)
    params = sampling_params(args, defaults=_defaults(args))
    stream = _streams(args, len(prompts), params)

    options = engine_options(args, skip=ENGINE_SKIP)
    ahead.begin(args.model, options)

    from hasten.engine.llm import LLM, run_worker

    if not run_worker(args.model, **options):
        with LLM(args.model, **options) as llm:
            (_stream if stream else _generate)(llm, prompts, params, args.json)
    return 0


def _check_shown(args: argparse.Namespace) -> None:
    for name in ("logprobs", "prompt_logprobs"):
        if getattr(args, name, None) is not None and not args.json:
            raise ConfigError(f"--{name.replace('_', '-')} is shown with --json alone; add --json")


def _defaults(args: argparse.Namespace) -> dict[str, Any]:
    """What the command puts in place of SamplingParams' defaults: a beam search leaves the temperature alone."""
    beams = getattr(args, "beam_width", 1) > 1
    return {name: value for name, value in SAMPLING_DEFAULTS.items() if not (beams and name == "temperature")}


def _read_prompts(args: argparse.Namespace) -> list[str]:
    prompts = list(args.prompt)
    for prompt in prompts:
        require_utf8("--prompt", prompt)
    if args.prompts_file is not None:
        prompts += [line for line in _read_lines(args.prompts_file) if line.strip()]
    if not prompts:
        raise ConfigError("there is no prompt; give --prompt or --prompts-file")
    return prompts


def _read_lines(name: str) -> list[str]:
    with reading(f"prompts from {name}"):
        return utf8_lines(_standard_input() if name == "-" else Path(name).read_bytes())


def _standard_input() -> bytes:
    if sys.stdin is None:
        raise ConfigError("cannot read prompts from -: standard input is closed")
    return sys.stdin.buffer.read()


def _take_text(args: argparse.Namespace) -> None:
    """Read options that are texts as UTF-8, also where the locale is another."""
    for name in _TEXTS:
        given = getattr(args, name, None)
        if given is not None:
            setattr(
                args, name, from_command_line(given) if isinstance(given, str) else [*map(from_command_line, given)]
            )


def _write_text() -> None:
    """Let standard output take any text: UTF-8 where the locale has ASCII alone, else escapes for what it lacks."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        ascii_alone = codecs.lookup(sys.stdout.encoding).name == "ascii"
        sys.stdout.reconfigure(encoding="utf-8" if ascii_alone else None, errors="backslashreplace")


def _streams(args: argparse.Namespace, prompts: int, params: SamplingParams) -> bool:
    single = prompts == 1 and params.n == 1
    if args.stream is None:
        return single and not args.json and sys.stdout.isatty()
    if args.stream and not args.json and not single:
        raise ConfigError("--stream prints one text as it grows; for several prompts or --n above 1 add --json")
    return bool(args.stream)


def _generate(llm: "LLM", prompts: list[str], params: SamplingParams, as_json: bool) -> None:
    outputs = llm.generate(prompts, params)
    for output in outputs:
        if as_json:
            print(json.dumps(_as_json(output), ensure_ascii=False))
        else:
            for completion in output.outputs:
                print(f"{_shown(llm, output.prompt)}{completion.text}")
    _raise_failures(outputs)


def _stream(llm: "LLM", prompts: list[str], params: SamplingParams, as_json: bool) -> None:
    outputs = _Finished(llm.stream(prompts, params))
    if as_json:
        for output in outputs:
            print(json.dumps(_as_json(output) | {"finished": output.finished}, ensure_ascii=False), flush=True)
    else:
        print(_shown(llm, prompts[0]), end="", flush=True)
        for piece in _pieces(outputs):
            print(piece, end="", flush=True)
        print()
    _raise_failures(outputs.finished)


def _shown(llm: "LLM", prompt: str | None) -> str:
    """What stands before an output: the prompt that it continues, and nothing where an encoder has read it."""
    return "" if prompt is None or llm.config.encoder is not None else prompt


class _Finished:
    """Streamed outputs, of which the finished ones are kept."""

    def __init__(self, outputs: Iterable[RequestOutput]) -> None:
        self._outputs = outputs
        self.finished: list[RequestOutput] = []

    def __iter__(self) -> Iterator[RequestOutput]:
        for output in self._outputs:
            if output.finished:
                self.finished.append(output)
            yield output


def _raise_failures(outputs: Iterable[RequestOutput]) -> None:
    """What could be made is printed; that something could not be must not be missed."""
    for output in outputs:
        for completion in output.outputs:
            if completion.finish_reason is FinishReason.ERROR:
                raise EngineError(f"a prompt could not be continued: {completion.stop_reason}")


def _pieces(outputs: Iterable[RequestOutput]) -> Iterable[str]:
    """What each cumulative output adds to the one before it."""
    shown = 0
    for output in outputs:
        text = output.outputs[0].text
        yield text[shown:]
        shown = len(text)


def _as_json(output: RequestOutput) -> dict[str, Any]:
    record: dict[str, Any] = {"prompt": output.prompt, "prompt_token_ids": output.prompt_token_ids}
    if output.prompt_logprobs is not None:
        record["prompt_logprobs"] = [_logprobs(position) for position in output.prompt_logprobs]
    completions = [_completion(completion) for completion in output.outputs]
    return record | completions[0] if len(completions) == 1 else record | {"outputs": completions}


def _completion(completion: CompletionOutput) -> dict[str, Any]:
    record: dict[str, Any] = {
        "token_ids": completion.token_ids,
        "text": completion.text,
        "finish_reason": completion.finish_reason,
    }
    if completion.cumulative_logprob is not None:
        record["cumulative_logprob"] = completion.cumulative_logprob
    if completion.logprobs is not None:
        record["logprobs"] = [_logprobs(position) for position in completion.logprobs]
    return record


def _logprobs(position: dict[int, Logprob] | None) -> list[dict[str, Any]] | None:
    if position is None:
        return None
    return [
        {"token_id": token, "token": entry.decoded_token, "logprob": entry.logprob, "rank": entry.rank}
        for token, entry in position.items()
    ]
