"""What shortens `import torch`, most of the time of a start: parts that no engine uses, and libraries on another CPU.

The parts are packages that torch's own `__init__` imports for its users, and what registers shapes of results for
compilers (`torch._meta_registrations`). Each is there by name from the beginning, and is imported when anything is
looked up in it, or one of its modules is imported. Only for processes that hasten has for itself: a program's own torch
stays as it is.
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
            _run(self)
            if type(self) is not _Part or name in vars(self):
                return getattr(self, name)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")


_lock = threading.RLock()
_begun: set[str] = set()
"""Names of parts whose code runs, or has run."""


def _run(part: _Part) -> None:
    """Run a part's code, which other threads wait for; while it runs, it finds in the part what is there by then."""
    with _lock:
        if part.__name__ in _begun:
            return
        loader = part.__loader__
        assert isinstance(loader, _PartLoader)
        _begun.add(part.__name__)
        try:
            loader.run(part)
        except BaseException:
            _begun.discard(part.__name__)
            raise
        part.__class__ = ModuleType  # type: ignore[assignment]


class _PartLoader(SourceFileLoader):
    """Makes a module and leaves its code for later."""

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Part(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing yet, but for what the code does that is needed without it."""
        if module.__name__ == "torch._meta_registrations":
            _let_generators_be_made()

    def run(self, module: ModuleType) -> None:
        """Run its code."""
        super().exec_module(module)


def _let_generators_be_made() -> None:
    """Where torch 2.13 imports `torch._meta_registrations`, a module of that one gives `torch.Generator` its type."""
    import torch

    if (give := getattr(torch._C, "_set_generator_metaclass", None)) is not None:
        from torch._opaque_base import OpaqueBaseMeta

        give(OpaqueBaseMeta)


class _Finder:
    """Finds the parts before others do."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """See `importlib.abc.MetaPathFinder`."""
        parent = sys.modules.get(fullname.rpartition(".")[0])
        if isinstance(parent, _Part):
            _run(parent)
        if fullname not in _PARTS:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _PartLoader(fullname, spec.loader.path)
        return spec
