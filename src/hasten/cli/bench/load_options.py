"""The options of `hasten bench load`."""

import math
from typing import Any

from hasten.cli.bench.common import SAMPLING_DEFAULTS, add_output
from hasten.cli.options import Parser, add_engine_options, add_sampling_options, path, positive, typed
from hasten.core.errors import ConfigError
from hasten.core.text import from_json

NOT_SENT = frozenset({"n", "max_tokens", "seed", "beam_width", "length_penalty", "early_stopping", "prompt_logprobs"})
NOT_SENT |= {"beam_search_diversity_rate"}
"""Sampling parameters that no request of a load has: each is one stream, as long as its schedule says."""
KEY = "OPENAI_API_KEY"
"""The environment variable with the key of OpenAI's API."""
_APIS = ("openai", "openai-chat", "triton-grpc", "triton-generate")


def add_options(parser: Parser) -> None:
    """Add all options."""
    parser.add_argument(
        "model", type=path, metavar="MODEL", nargs="?", help="folder of the checkpoint, or its Hugging Face id"
    )
    _add_server(parser)
    _add_arrivals(parser)
    _add_requests(parser)
    _add_results(parser)
    add_sampling_options(parser, defaults=SAMPLING_DEFAULTS, skip=NOT_SENT)
    add_engine_options(parser, chats=True)


def _add_server(parser: Parser) -> None:
    group = parser.add_argument_group("server")
    group.add_argument(
        "--url",
        metavar="URL",
        help="a running server, such as http://HOST:8000 or grpc://HOST:8001; with https or grpcs, the environment "
        "variable SSL_CERT_FILE names a file of trusted authorities",
    )
    group.add_argument(
        "--api",
        choices=_APIS,
        default="openai",
        help="completions or chats of OpenAI's API, ModelStreamInfer over gRPC, or generate_stream (default: openai)",
    )
    group.add_argument(
        "--served-model-name", metavar="NAME", help="model of the server (default: its first, or the only one for text)"
    )
    group.add_argument(
        "--header",
        action="append",
        default=[],
        type=typed(_header),
        metavar="NAME:VALUE",
        help="header, or metadata of gRPC, of each request; may be given more than once. The environment variable "
        f"{KEY} is sent as the key of OpenAI's API",
    )
    group.add_argument(
        "--extra-body",
        type=typed(json_object),
        default={},
        metavar="JSON",
        help="fields to add to, or replace in, the body of each request over HTTP; null removes one",
    )
    group.add_argument(
        "--timeout", type=typed(_seconds), default=600.0, metavar="SECS", help="per request (default: 600)"
    )


def _add_arrivals(parser: Parser) -> None:
    group = parser.add_argument_group("arrivals")
    group.add_argument(
        "--request-rate",
        type=typed(_rate),
        nargs="+",
        metavar="R",
        help="requests (with --turns: conversations) per second, each measured in a run of its own; inf: all at once "
        "(default: inf; for a trace, the times that it has)",
    )
    group.add_argument(
        "--arrivals",
        choices=("poisson", "constant"),
        default="poisson",
        help="time between two requests: exponentially distributed, or always the same (default: poisson)",
    )
    group.add_argument(
        "--max-concurrency", type=positive, metavar="N", help="maximum requests in flight (default: any)"
    )
    group.add_argument(
        "--num-prompts",
        type=positive,
        metavar="N",
        help="requests, or conversations, per run (default: 100; all of a trace; as many as --duration has)",
    )
    group.add_argument(
        "--duration", type=typed(_seconds), metavar="SECS", help="seconds of a run in which requests become due"
    )
    group.add_argument(
        "--num-warmups",
        type=typed(_count),
        default=1,
        metavar="N",
        help="requests before the first run, one after the other and not measured (default: 1)",
    )
    group.add_argument(
        "--processes", type=positive, metavar="N", help="client processes (default: a quarter of the CPUs, 1 to 4)"
    )


def _add_requests(parser: Parser) -> None:
    group = parser.add_argument_group("requests")
    group.add_argument(
        "--dataset",
        choices=("random", "sharegpt", "prompts", "trace"),
        default="random",
        help="random prompts; conversations in ShareGPT's form; JSON lines with `prompt`; JSON lines with `timestamp` "
        "(default: random)",
    )
    group.add_argument("--dataset-path", type=path, metavar="FILE", help="file of the dataset")
    forms = "N, LOW:HIGH, or lognormal:MEAN,STDDEV[,MAX]"
    group.add_argument(
        "--prompt-length",
        type=typed(_lengths),
        metavar="L",
        help=f"tokens of random prompts: {forms} (default: 128)",
    )
    group.add_argument(
        "--output-length",
        type=typed(_lengths),
        metavar="L",
        help=f"maximum new tokens: {forms} (default: 128; what a dataset says); exact with --ignore-eos",
    )
    group.add_argument(
        "--shared-prefix", type=typed(_count), default=0, metavar="N", help="tokens that all random prompts begin with"
    )
    group.add_argument(
        "--turns",
        type=typed(_lengths),
        metavar="T",
        help="turns per conversation, each sent with those before it and their answers: N or LOW:HIGH (default: 1)",
    )
    group.add_argument(
        "--think-time",
        type=typed(_seconds_or_none),
        default=0.0,
        metavar="SECS",
        help="between an answer and the next turn (default: 0)",
    )
    group.add_argument(
        "--workload-seed", type=int, default=0, metavar="N", help="of prompts, lengths and arrivals (default: 0)"
    )
    group.add_argument(
        "--vocab-size", type=positive, metavar="N", help="token ids of random prompts, where there is no tokenizer"
    )


def _add_results(parser: Parser) -> None:
    group = parser.add_argument_group("results")
    group.add_argument(
        "--goodput",
        nargs="+",
        default=[],
        metavar="LIMITS",
        help="count the requests per second within these limits of ttft, tpot and e2el, such as ttft:200 tpot:15 (ms) "
        "or ttft=200ms,tpot=15ms",
    )
    group.add_argument(
        "--plot", type=path, metavar="FILE", help="draw the latencies by request rate: an SVG, or a PNG for FILE.png"
    )
    add_output(parser)


def _rate(text: str) -> str:
    from hasten.bench.load.arrivals import rate_of

    rate_of(text)
    return text


def _lengths(text: str) -> str:
    from hasten.bench.load.lengths import Lengths

    Lengths.parse(text)
    return text


def _header(text: str) -> tuple[str, str]:
    name, colon, value = text.partition(":")
    if not (colon and name.strip() and text.isprintable() and text.isascii()):
        raise ConfigError("a header is NAME:VALUE in printable ASCII")
    return name.strip(), value.strip()


def json_object(text: str) -> dict[str, Any]:
    """A JSON object; ConfigError for any other text."""
    try:
        value = from_json(text)
    except ValueError as error:
        raise ConfigError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{text!r:.80} is not a JSON object")
    return value


def _count(text: str) -> int:
    if not (text.isascii() and text.isdecimal()):
        raise ConfigError(f"{text!r} is not a whole number of at least 0")
    return int(text)


def _seconds_or_none(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise ConfigError(f"{text!r} is not a number of seconds")
    return value


def _seconds(text: str) -> float:
    value = _seconds_or_none(text)
    if value == 0:
        raise ConfigError("seconds must be above 0")
    return value
