import argparse
import re
from typing import Any

import pytest

from hasten.cli.main import build_parser, main
from hasten.cli.options import (
    Parser,
    add_engine_options,
    add_sampling_options,
    engine_options,
    field_names,
    option_words,
    sampling_params,
)
from hasten.core.config import EngineConfig
from hasten.core.errors import ConfigError, InvalidRequestError
from hasten.core.types import SamplingParams


def engine_args(*argv: str, **defaults: Any) -> dict[str, Any]:
    parser = Parser(prog="hasten")
    add_engine_options(parser, defaults=defaults)
    return engine_options(parser.parse_args(argv), defaults=defaults)


def sampling_args(*argv: str, **defaults: Any) -> SamplingParams:
    parser = Parser(prog="hasten")
    add_sampling_options(parser, defaults=defaults)
    return sampling_params(parser.parse_args(argv), defaults=defaults)


def test_nothing_given_leaves_the_defaults_to_the_dataclasses() -> None:
    assert engine_args() == {}
    assert sampling_args() == SamplingParams()


def test_every_engine_option_reaches_its_field() -> None:
    given = engine_args(
        *("--tensor-para-size", "2", "--block-size", "32", "--kv-cache-memory", "1000", "--max-num-seqs", "7"),
        *("-dt", "bf16", "--device", "cpu", "--no-enable-prefix-caching", "--gpu-memory-utilization", "0.5"),
        *("--tokenizer-path", "there", "--load-format", "dummy", "--no-verify-checksums", "--max-model-len", "99"),
    )
    config = EngineConfig.create("folder", **given)
    assert (config.parallel.tensor_parallel_size, config.cache.block_size, config.scheduler.max_num_seqs) == (2, 32, 7)
    assert (config.cache.kv_cache_memory, config.cache.gpu_memory_utilization) == (1000, 0.5)
    assert (config.dtype, config.device, config.tokenizer, config.load_format) == ("bf16", "cpu", "there", "dummy")
    assert not config.cache.enable_prefix_caching
    assert not config.verify_checksums
    assert config.scheduler.max_model_len == 99


def test_the_names_of_vllm_are_names_of_the_options_too() -> None:
    given = engine_args(
        *("--tensor-parallel-size", "2", "--gpu-memory-utilization", "0.5", "--dtype", "bf16", "--tokenizer", "there"),
        *("--no-enable-prefix-caching", "--kv-cache-memory-bytes", "1G", "--max-num-seqs", "7", "--async-scheduling"),
    )
    assert given == {
        "tensor_parallel_size": 2,
        "gpu_memory_utilization": 0.5,
        "dtype": "bf16",
        "tokenizer": "there",
        "enable_prefix_caching": False,
        "kv_cache_memory": 1 << 30,
        "max_num_seqs": 7,
        "overlap_steps": True,
    }
    assert engine_args("-tp", "3") == {"tensor_parallel_size": 3}
    assert sampling_args("--max-tokens", "5", "--min-tokens", "2") == SamplingParams(max_tokens=5, min_tokens=2)


@pytest.mark.parametrize(
    "argv",
    [
        ["generate", "m", "--prompt", "x"],
        ["serve", "m"],
        ["repository", "create", "m", "r"],
        ["convert", "-i", "m", "-o", "o"],
        ["bench", "lambada", "--tokenizer-path", "m", "--dataset-path", "d"],
        ["bench", "throughput", "m"],
        ["bench", "latency", "m"],
        ["bench", "suite", "m"],
        ["bench", "serving", "m"],
    ],
)
def test_every_command_takes_the_number_of_ranks_under_the_same_names(argv: list[str]) -> None:
    for name in ("-tp", "--tensor-para-size", "--tensor-parallel-size"):
        args = build_parser().parse_args([*argv, name, "4"])
        assert 4 in (getattr(args, "tensor_parallel_size", 0), getattr(args, "tensor_para_size", 0))


def test_a_home_directory_is_expanded_where_the_shell_did_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/anna")
    parse = build_parser().parse_args
    assert parse(["generate", "~/m", "--prompt", "x", "--tokenizer-path=~/t"]).model == "/home/anna/m"
    assert parse(["generate", "~/m", "--prompt", "x", "--tokenizer-path=~/t"]).tokenizer == "/home/anna/t"
    assert parse(["generate", "m", "--prompts-file=~/p"]).prompts_file == "/home/anna/p"
    assert parse(["convert", "-i", "~/m", "--output-dir=~/o"]).output_dir == "/home/anna/o"
    assert parse(["serve", "--model-repository=~/r", "--log-file=~/l"]).model_repository == ["/home/anna/r"]
    assert parse(["serve", "--model-repository=~/r", "--log-file=~/l"]).log_file == "/home/anna/l"
    assert parse(["bench", "latency", "~/m", "--output-path=~/o"]).output_path == "/home/anna/o"
    assert parse(["generate", "./a/~/m/", "--prompts-file", "-"]).model == "./a/~/m/"


@pytest.mark.parametrize(
    "argv",
    [
        ["generate", "", "--prompt", "x"],
        ["convert", "-i", "m", "-o", ""],
        ["quantize", "m", "", "--scheme", "int8"],
        ["serve", "--model-repository="],
        ["bench", "latency", "m", "--output-path", ""],
    ],
)
def test_an_empty_path_is_not_the_current_folder(argv: list[str]) -> None:
    with pytest.raises(ConfigError, match="the path is empty; is the variable that it comes from set"):
        build_parser().parse_args(argv)


def test_options_are_words_of_the_command_line_that_gives_them() -> None:
    given = {"enable_prefix_caching": False, "deterministic": True, "max_num_seqs": 4, "dtype": "bf16"}
    words = option_words({**given, "quantization": None})
    assert engine_options(build_parser().parse_args(["warm", "m", *words])) == given


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("max_tokens must be at least 1", "--max-new-tokens must be at least 1"),
        ("lower max_model_len or raise kv_cache_memory.", "lower --max-model-len or raise --kv-cache-memory."),
        ("name one with tokenizer=", "name one with --tokenizer-path"),
        ('use device="cpu"', "use --device cpu"),
        ("/x/max_tokens/config.json has no 'max_tokens'", "/x/max_tokens/config.json has no 'max_tokens'"),
        ("the model's tokenizer has no end", "the model's tokenizer has no end"),
        ("max_tokens.json is missing", "max_tokens.json is missing"),
        ("vocab_size 5", "vocab_size 5"),
        ("temperature must be finite", "--temperature must be finite"),
        ("regex cannot be compiled", "--regex cannot be compiled"),
        ("stop holds an empty string", "--stop holds an empty string"),
        ("device 'gpu' is not known; use a device", "--device 'gpu' is not known; use a device"),
        ("the seed must be even", "the seed must be even"),
        ("--max-new-tokens is 0", "--max-new-tokens is 0"),
    ],
)
def test_errors_name_options_and_not_fields(message: str, shown: str) -> None:
    parser = build_parser().parse_args(["generate", "m", "--prompt", "x"]).parser
    assert parser.named_by_options(message) == shown


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["generate", "m", "Once upon"],
            "Once upon; give a text behind --prompt: hasten generate MODEL --prompt 'Once up",
        ),
        (["generate", "m", "Once", "upon"], "give a text behind --prompt: hasten generate MODEL --prompt 'Once upon'"),
        (["embed", "m", "it's"], """give a text behind --text: hasten embed MODEL --text 'it'"'"'s'"""),
        (["classify", "m", "text"], "give a text behind --text: hasten classify MODEL --text text"),
        (["fill-mask", "m", "a [MASK]"], "give a text behind --text: hasten fill-mask MODEL --text 'a [MASK]'"),
        (["generate", "m", "Once", "--max-token", "3"], "Once --max-token 3; did you mean --max-tokens?"),
        (["serve", "m", "Once"], "unrecognized arguments: Once (see"),
    ],
)
def test_a_text_without_an_option_is_told_where_it_belongs(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        build_parser().parse_args(argv)


def test_an_option_of_one_letter_is_not_the_beginning_of_another() -> None:
    with pytest.raises(ConfigError, match=r"unrecognized arguments: -p 2 \(see"):
        build_parser().parse_args(["generate", "m", "-p", "2"])
    assert build_parser().parse_args(["convert", "-i", "m", "-o", "o", "-p2"]).processes == 2


def test_help_has_an_option_once_with_all_its_names(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "-tp, --tensor-para-size, --tensor-parallel-size SIZE number of ranks" in text
    assert "--kv-cache-memory, --kv-cache-memory-bytes MEMORY bytes of" in text


def test_every_field_with_a_help_text_is_offered() -> None:
    parser = Parser(prog="hasten")
    add_engine_options(parser, chats=True)
    offered = {action.dest for action in parser._actions}
    assert offered - {"help"} == field_names(EngineConfig) - {"model"}


@pytest.mark.parametrize("option", ["--tool-call-parser", "--reasoning-parser"])
def test_options_of_chats_are_for_commands_that_serve_them(option: str) -> None:
    for command in (["serve", "m"], ["batch", "in", "out", "--model", "m"], ["bench", "load", "m"]):
        build_parser().parse_args([*command, option, "mistral"])
    for command in (["generate", "m"], ["embed", "m"], ["bench", "latency", "m"], ["plan", "m"]):
        with pytest.raises(ConfigError, match=f"unrecognized arguments: {option}"):
            build_parser().parse_args([*command, option, "mistral"])


def test_a_command_can_have_defaults_of_its_own() -> None:
    assert engine_args(enable_prefix_caching=False) == {"enable_prefix_caching": False}
    assert engine_args("--enable-prefix-caching", enable_prefix_caching=False) == {"enable_prefix_caching": True}


def test_sampling_options() -> None:
    params = sampling_args(
        *("--max-new-tokens", "5", "--min-new-tokens", "2", "--temperature", "0.5", "--top-k", "3", "--top-p", "0.9"),
        *("--stop", "a b", "--stop", "c", "--stop-token-ids", "7", "--seed", "11", "--ignore-eos", "--n", "2"),
        *("--logprobs", "1", "--no-skip-special-tokens", "--bad-words", "x"),
    )
    assert params == SamplingParams(
        max_tokens=5,
        min_tokens=2,
        temperature=0.5,
        top_k=3,
        top_p=0.9,
        stop=("a b", "c"),
        stop_token_ids=(7,),
        seed=11,
        ignore_eos=True,
        n=2,
        logprobs=1,
        skip_special_tokens=False,
        bad_words=("x",),
    )


def test_help_tells_the_defaults_in_force() -> None:
    parser = Parser(prog="hasten")
    add_sampling_options(parser, defaults={"max_tokens": 32})
    add_engine_options(parser, defaults={"enable_prefix_caching": False}, skip=frozenset({"seed"}))
    text = " ".join(parser.format_help().split())
    assert "maximum new tokens (default: 32)" in text
    assert "tokens per block of the key/value cache (default: 16)" in text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--block-size", "many"], "argument --block-size: invalid int value: 'many'"),
        (["--no-such-option"], "unrecognized arguments: --no-such-option"),
        (["--load-format", "magic"], "argument --load-format: invalid choice: 'magic'"),
        (["--block"], "unrecognized arguments: --block"),
    ],
)
def test_bad_options_are_config_errors(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        engine_args(*argv)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("argv", [["--temperature", "-1"], ["--top-p", "0"], ["--max-new-tokens", "0"]])
def test_bad_sampling_values_are_request_errors(argv: list[str]) -> None:
    with pytest.raises(InvalidRequestError):
        sampling_args(*argv)


def test_values_are_not_shared_between_uses() -> None:
    first = argparse.Namespace(stop=["a"])
    assert sampling_params(first).stop == ("a",)
    assert sampling_params(argparse.Namespace()).stop == ()
