import subprocess
import sys
from pathlib import Path

DEMO = Path(__file__).parents[2] / "examples" / "demo-model"
ALONE = """
import sys
from importlib.abc import MetaPathFinder

class Absent(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in {absent!r}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
import hasten.bench.kernels
import hasten.bench.suite
import hasten.cli.main
from hasten import LLM, SamplingParams

with LLM({model!r}) as llm:
    print(len(llm.generate(["once"], SamplingParams(max_tokens=3, ignore_eos=True))[0].outputs[0].token_ids))
"""


def test_engine_and_benchmarks_need_neither_the_servers_nor_the_clusters_libraries() -> None:
    absent = {"grpc", "httptools", "kubernetes", "llguidance", "msgspec", "psutil", "starlette", "tritonclient"}
    absent |= {"uvicorn", "uvloop", "google"}
    code = ALONE.format(absent=absent, model=str(DEMO))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "3\n"), done.stderr
