"""Triton's interpreter without what it repeats, which is more than half of its time; results are the same.

Importing this module changes the interpreter, where kernels run on it in this process.
"""

from collections.abc import Callable
from typing import Any

from triton import knobs


def _once_per_function(patch: Callable[[Any], Any], scope: Callable[[], Any]) -> Callable[[Any], Any]:
    """`patch`, which gives `triton.language` the interpreter's functions, once per function of a kernel.

    The interpreter does it again for each call, and undoes it after each launch.
    """
    patched: set[Any] = set()

    def patch_first(function: Any) -> Any:
        if function not in patched:
            patch(function)
            patched.add(function)
        return scope()

    return patch_first


def _once_per_type(find: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`find`, which gives the numpy type of a Triton type, with its results kept by name."""
    found: dict[str, Any] = {}

    def find_first(triton_type: Any) -> Any:
        if triton_type.name not in found:
            found[triton_type.name] = find(triton_type)
        return found[triton_type.name]

    return find_first


def _without_repetitions() -> None:
    from triton.runtime import interpreter

    interpreter._patch_lang = _once_per_function(interpreter._patch_lang, interpreter._LangPatchScope)
    interpreter._get_np_dtype = _once_per_type(interpreter._get_np_dtype)
    # Overflows are looked at in kernels that are debugged alone, and computed in all.
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)


if knobs.runtime.interpret:
    _without_repetitions()
