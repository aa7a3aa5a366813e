"""A start on a GPU and a few requests, in a process without kernels: what was compiled beside the others, as JSON.

start_child.py MODEL OPTIONS (of the engine, as JSON)
"""

import json
import sys
import time
from typing import Any

import torch
from triton import knobs

from hasten import LLM, SamplingParams
from hasten.engine.runner import Runner

PROMPTS = [[1, 2, 3]]


def main() -> None:
    """Start, compute, and say which kernels were not there when they were to be launched."""
    late: list[str] = []
    runner: Any = Runner
    compile_kernels = runner.compile_kernels

    def note(*, fn: Any, **_: Any) -> bool:
        late.append(fn.name)
        return False

    def compiled(self: Runner, *args: Any) -> None:
        compile_kernels(self, *args)
        knobs.runtime.jit_cache_hook = note

    runner.compile_kernels = compiled
    began = time.monotonic()
    with LLM(sys.argv[1], **json.loads(sys.argv[2])) as llm:
        ready, late_at_start = time.monotonic(), list(late)
        seconds = {"start": ready - began, **llm.engine.worker.start_times.seconds}
        for count, params in ((1, {}), (1, {"temperature": 1.0}), (24, {"temperature": 1.0, "top_p": 0.9})):
            own = SamplingParams(**({"temperature": 0.0} | params), max_tokens=3, ignore_eos=True, detokenize=False)  # type: ignore[arg-type]
            since = time.monotonic()
            llm.generate(PROMPTS * count, own, use_tqdm=False)
            seconds[f"{count} x {params}"] = time.monotonic() - since
    torch.cuda.synchronize()
    json.dump({"start": late_at_start, "requests": late[len(late_at_start) :], "seconds": seconds}, sys.stdout)


if __name__ == "__main__":
    main()
