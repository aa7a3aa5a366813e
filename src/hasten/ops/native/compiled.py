"""The machine code of kernels: numba compiles it once for a processor, and every later start reads it.

Reading it takes llvmlite alone, which is imported in a tenth of numba's time.
"""

import fcntl
import logging
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from hashlib import sha256
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

import llvmlite.binding as llvm

from hasten.core.errors import ConfigError
from hasten.core.kernel_cache import check_kernel_cache
from hasten.core.progress import progress_bar

Kind = Literal["fp32", "bf16", "bytes"]
"""What kernels are compiled together: those that every start needs, those of weights or keys and values in bf16, and
those of weights in 8 or 4 bits."""
KINDS: tuple[Kind, ...] = get_args(Kind)
_CODE = Path(__file__).parent / "code"
_LONGEST_TURN_S, _LOOK_S = 120.0, 0.05
"""How long to wait for another process that compiles, some 15 s of a free core, and how often to look."""
_engines: list[Any] = []
"""Code is freed with its engine."""
_code: dict[Kind, dict[str, bytes]] = {}
"""Machine code of the kernels of a kind, by name, once it has been read or compiled."""
_log = logging.getLogger(__name__)


def kernel_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """Where compiled kernels are kept: the user's cache."""
    folder = environment.get("XDG_CACHE_HOME")
    return (Path(folder) if folder else Path("~/.cache").expanduser()) / "hasten" / "kernels"


def prepare(kind: Kind, *, show_progress: bool = False) -> None:
    """Read the machine code of a kind, or compile it, which a bar shows on a terminal if `show_progress`."""
    if kind in _code:
        return
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    folder = own_folder(kind)
    code = None if folder is None else _read(folder)
    if code is None:
        code = _compiled(kind, show_progress) if folder is None else _kept(folder, kind, show_progress)
    _code[kind] = code


@cache
def addresses(kind: Kind) -> dict[str, int]:
    """The address of each kernel of a kind, by its name; they are compiled where that has not been done."""
    prepare(kind)
    return {name: _loaded(name, content) for name, content in _code[kind].items()}


def are_kept() -> bool:
    """Whether later starts read the kernels that this process has."""
    folders = [own_folder(kind) for kind in _code]
    return all(folder is not None and folder.is_dir() for folder in folders)


@cache
def multiplies_bytes() -> bool:
    """Whether the processor adds up products of bytes, four at a time in vectors of 512 bits."""
    return bool(llvm.get_host_cpu_features().get("avx512vnni"))


@cache
def multiplies_tiles() -> bool:
    """Whether the processor adds up products of bytes in tiles, too, with which `multiplies_bytes`."""
    return multiplies_bytes() and bool(llvm.get_host_cpu_features().get("amx-int8"))


@cache
def multiplies_pairs() -> bool:
    """Whether the processor adds up products of bf16, two at a time in vectors of 512 bits."""
    return bool(llvm.get_host_cpu_features().get("avx512bf16"))


@cache
def multiplies_pair_tiles() -> bool:
    """Whether the processor adds up products of bf16 in tiles, too, with which `multiplies_pairs`."""
    return multiplies_pairs() and bool(llvm.get_host_cpu_features().get("amx-bf16"))


def own_folder(kind: Kind) -> Path | None:
    """The folder for this code on this processor, there or not; None where what is in it could be another user's."""
    folder = kernel_folder()
    try:
        check_kernel_cache(folder)
    except (ConfigError, OSError, RuntimeError):
        return None
    digest = sha256()
    for file in sorted(_CODE.glob("*.py")):
        digest.update(file.read_bytes())
    processor = (llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten())
    digest.update("\n".join((version("numba"), version("llvmlite"), *processor)).encode())
    return folder / f"{digest.hexdigest()[:32]}-{kind}"


def _kept(folder: Path, kind: Kind, show_progress: bool) -> dict[str, bytes]:
    """Compile the kernels and keep them, or read those that another process was compiling meanwhile."""
    with _turn(folder.parent):
        code = _read(folder)
        if code is None:
            code = _compiled(kind, show_progress)
            with suppress(OSError):  # a full disk, for one: the next start compiles again
                _write(folder, code)
    return code


@contextmanager
def _turn(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder; where that cannot be had, or another process keeps it for too long, go on without."""
    deadline = time.monotonic() + _LONGEST_TURN_S
    descriptor = None
    try:
        with suppress(OSError):  # no folder, or a file system without locks
            descriptor = os.open(folder, os.O_RDONLY)
            while not _locked(descriptor) and time.monotonic() < deadline:
                time.sleep(_LOOK_S)
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read(folder: Path) -> dict[str, bytes] | None:
    """The code of a kind, by name; None where it is not there."""
    with suppress(OSError):
        return {file.stem: file.read_bytes() for file in folder.glob("*.o")} or None
    return None


def _write(folder: Path, code: dict[str, bytes]) -> None:
    """Keep code: all of it, or nothing where another process was faster (OSError)."""
    with tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as temporary:
        library = Path(temporary) / "complete"
        library.mkdir(mode=0o700)
        for name, content in code.items():
            (library / f"{name}.o").write_bytes(content)
        library.rename(folder)


def _compiled(kind: Kind, show_progress: bool) -> dict[str, bytes]:
    """Machine code of a kind for this processor, by name; of each the function `hasten_NAME`."""
    from numba import cfunc, types

    for module in _modules(kind):
        import_module(f"{__package__}.code.{module}")  # adds to KERNELS
    from hasten.ops.native.code.functions import KERNELS, TEAMS

    functions: list[tuple[str, Any, int]] = [(name, function, 3) for name, function in KERNELS[kind].items()]
    if kind == "fp32":
        functions += [(name, function, 1) for name, function in TEAMS.items()]
    code = {}
    start = time.perf_counter()
    _log.info("compiling kernels for this processor, which takes up to 20 s of a core")
    with progress_bar("Compiling kernels, once for this processor", len(functions), show=show_progress) as bar:
        for name, function, count in functions:
            compiled = cfunc(types.void(*[types.int64] * count), error_model="numpy")(function)
            code[name] = _machine_code(
                compiled.inspect_llvm().replace(compiled.native_name, f"hasten_{name}"), f"hasten_{name}"
            )
            bar.advance()
    _log.info("compiled kernels in %.1f s", time.perf_counter() - start)
    return code


def _modules(kind: Kind) -> tuple[str, ...]:
    """The modules of code with the kernels of a kind that the processor can run."""
    if kind == "bf16":
        by_pairs, by_tiles = ("rounded",) * multiplies_pairs(), ("pair_tiles",) * multiplies_pair_tiles()
        return "attention", "bf16", "prompts", *by_pairs, *by_tiles
    if kind == "bytes":
        return "integers", *("tiles",) * multiplies_tiles()
    return (
        "attention", "beams", "choice", "draw", "edits", "logprobs", "norms", "products", "prompts", "rows", "teams",
    )  # fmt: skip


def _machine_code(text: str, name: str) -> bytes:
    """Machine code of a module of LLVM of which one function is used.

    The others become its own. LLVM then sees that none of them raises, and leaves out what numba and Python would do.
    """
    machine, module = _machine(), llvm.parse_assembly(text)
    for function in module.functions:
        if not function.is_declaration and function.name != name:
            function.linkage = "internal"
    builder = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=3))
    builder.getModulePassManager().run(module, builder)
    code: bytes = machine.emit_object(module)
    return code


def _machine() -> Any:
    options = {"cpu": llvm.get_host_cpu_name(), "features": llvm.get_host_cpu_features().flatten()}
    return llvm.Target.from_default_triple().create_target_machine(**options, opt=3, codemodel="jitdefault", jit=True)


def _loaded(name: str, code: bytes) -> int:
    """Put the code of a kernel into this process: its address."""
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _machine())
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _engines.append(engine)
    address: int = engine.get_function_address(f"hasten_{name}")
    return address
