"""A process that starts an engine, computes a token, and prints how long each phase took, as JSON.

Its first argument is JSON: `model`, `options` of the engine, and `spawned`, when it was started, on the clock of
`time.monotonic`, which all processes of a machine share.
"""

import dataclasses
import gc
import json
import sys
import time
from typing import Any

from hasten.core import gpu_start
from hasten.core.gpu_weights import folder_of

_PROMPT = [1, 2, 3, 4]


def main() -> None:
    """Start and measure."""
    began = time.monotonic()
    arguments: dict[str, Any] = json.loads(sys.argv[1])
    from hasten.core.config import EngineConfig
    from hasten.core.errors import HastenError

    try:
        # as the process of a server's engine does
        gpu_start.begin(folder_of(EngineConfig.create(arguments["model"], **arguments["options"])))
        gc.disable()
        measured = _start(arguments["model"], arguments["options"], began, arguments["spawned"])
    except HastenError as error:
        measured = {"error": type(error).__name__, "message": str(error)}
    sys.stdout.write(json.dumps(measured) + "\n")


def _start(model: str, options: dict[str, Any], began: float, spawned: float) -> dict[str, Any]:
    seconds = {"python": began - spawned}
    import torch  # noqa: F401 - that takes most of the time

    imported = time.monotonic()
    seconds["import torch"] = imported - began
    from hasten.bench import report
    from hasten.core.types import SamplingParams
    from hasten.engine.llm import LLM

    start = time.monotonic()
    seconds["import hasten"] = start - imported
    with LLM(model, **options) as llm:
        ready = time.monotonic()
        phases = llm.engine.worker.start_times.seconds
        token = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True, detokenize=False)
        llm.generate([_PROMPT], token, use_tqdm=False)
        first = time.monotonic()
        llm.generate([_PROMPT], token, use_tqdm=False)
        second = time.monotonic()
        llm.engine.prepare()
        done = time.monotonic()
        environment = report.environment(llm.device, llm.dtype)
    other = ready - start - sum(phases.values())
    seconds |= {**phases, "other": other, "first token": first - ready}
    return {
        "seconds": seconds,
        "total_s": first - spawned,
        "second_token_s": second - first,
        "deferred_s": done - second,
        "environment": dataclasses.asdict(environment),
    }


if __name__ == "__main__":
    main()
