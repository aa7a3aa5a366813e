"""What shortens `import torch`, most of the time of a start: parts that no engine uses, and libraries on another CPU.

The parts are packages that torch's own `__init__` imports for its users, and what registers shapes of results for
compilers (`torch._meta_registrations`). Each is there by name from the beginning. When anything is looked up in one of
them, or anything further of torch is imported, the code of all of them runs, in torch's own order. Only for processes
that hasten has for itself: a program's own torch stays as it is.
"""

import ctypes
import re
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

VERSIONS = ("2.11", "2.13")
"""Of torch, with which this was tested: in others, parts could be needed in another order."""
_PARTS = frozenset(
    {
        "torch._meta_registrations",
        "torch.distributions",
        "torch.export",
        "torch.masked",
        "torch.nn.intrinsic",
        "torch.nn.qat",
        "torch.nn.quantizable",
        "torch.nn.quantized",
        "torch.profiler",
        "torch.quantization",
        "torch.utils.data",
    }
)
_WITHOUT = frozenset({"torch.utils._device"})
"""What else is imported of torch, by `with torch.device(...)`, that finds all that it needs."""
_VERSION = re.compile(r"^__version__ = '(\d+\.\d+)", re.MULTILINE)


_LIBRARIES = (
    ("torch", "lib/libtorch_global_deps.so", ctypes.RTLD_GLOBAL),
    ("torch", "lib/libtorch_python.so", ctypes.RTLD_LOCAL),
    ("triton", "_C/libtriton.so", ctypes.RTLD_LOCAL),
)
"""By their packages, and how these open them."""


def begin() -> None:
    """Prepare for an `import torch` that is to follow: leave the parts out, and open libraries in a thread."""
    if "torch" not in sys.modules:
        postpone_parts()
        libraries = [(folder / file, mode) for package, file, mode in _LIBRARIES if (folder := _folder(package))]
        threading.Thread(target=_open, args=(libraries,), name="libraries", daemon=True).start()


def _open(libraries: list[tuple[Path, int]]) -> None:
    """Open them without Python's lock: an import of the modules that are linked to them would hold it meanwhile."""
    for path, mode in libraries:
        with suppress(OSError):  # the import says what is wrong
            ctypes.CDLL(str(path), mode)


def _folder(package: str) -> Path | None:
    """Where a package lies that would be imported."""
    spec = find_spec(package)
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def postpone_parts() -> bool:
    """Let a later `import torch` leave the parts out; whether it does, which it does not where torch is imported."""
    if "torch" in sys.modules or _version() not in VERSIONS:
        return False
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    return True


def _version() -> str | None:
    """Major and minor version of the torch that would be imported."""
    folder = _folder("torch")
    try:
        text = "" if folder is None else (folder / "version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    found = _VERSION.search(text)
    return None if found is None else found[1]


class _Part(ModuleType):
    """A module whose code has not run yet."""

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("__") or name == "__all__":
            _run_for(self)
            if type(self) is not _Part or name in vars(self):
                return getattr(self, name)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")


_lock = threading.RLock()
_waiting: list[_Part] = []
"""In torch's own order."""


_depth = 0
"""How many parts run, each for the one before it."""


def _run_for(part: _Part | None = None) -> None:
    """Run the code of all parts, so that the rest of torch finds it whole: while it is being imported, of this alone.

    Other threads wait meanwhile. What runs finds in its part what is there by then.
    """
    global _depth
    with _lock:
        is_whole = not getattr(getattr(sys.modules.get("torch"), "__spec__", None), "_initializing", False)
        for each in list(_waiting) if is_whole and _depth == 0 else [part]:
            if each is None or each not in _waiting:
                continue
            loader = each.__loader__
            assert isinstance(loader, _PartLoader)
            _waiting.remove(each)
            _depth += 1
            try:
                loader.run(each)
            except BaseException:
                _waiting.insert(0, each)
                raise
            finally:
                _depth -= 1
            each.__class__ = ModuleType  # type: ignore[assignment]


class _PartLoader(SourceFileLoader):
    """Makes a module and leaves its code for later."""

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        part = _Part(spec.name)
        _waiting.append(part)
        return part

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing yet, but for what the code does that is needed without it."""
        if module.__name__ == "torch._meta_registrations":
            _let_generators_be_made()

    def run(self, module: ModuleType) -> None:
        """Run its code."""
        super().exec_module(module)


class _Present:
    """Loads a module that is there by now."""

    def __init__(self, module: ModuleType) -> None:
        self._module, self._spec = module, module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """See `importlib.abc.Loader`."""
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        """See `importlib.abc.Loader`."""
        module.__spec__ = self._spec


def _let_generators_be_made() -> None:
    """Where torch 2.13 imports `torch._meta_registrations`, a module of that one gives `torch.Generator` its type."""
    import torch

    if (give := getattr(torch._C, "_set_generator_metaclass", None)) is not None:
        from torch._opaque_base import OpaqueBaseMeta

        give(OpaqueBaseMeta)


class _Finder:
    """Finds the parts before others do, and lets them run before anything further of torch is imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """See `importlib.abc.MetaPathFinder`."""
        if fullname.startswith("torch.") and fullname not in _WITHOUT and _waiting:
            parent = sys.modules.get(fullname.rpartition(".")[0])
            _run_for(parent if isinstance(parent, _Part) else None)
            # the parts may have imported it; importlib would load it anew, were it found there
            if (present := sys.modules.pop(fullname, None)) is not None:
                return ModuleSpec(fullname, _Present(present))  # type: ignore[arg-type]
        if fullname not in _PARTS:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _PartLoader(fullname, spec.loader.path)
        return spec
