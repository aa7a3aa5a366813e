"""Jinja's sandbox with bounds: a template ends in time, and makes nothing of a size that its messages do not have.

jinja2 keeps templates from files and from Python's internals; nothing in it bounds loops that write nothing.
"""

import functools
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from jinja2 import Environment, nodes
from jinja2.nodes import EvalContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

_MAX_SIZE = 1 << 24
"""Characters of a text, or items of a list, that a template makes."""
_MAX_EXPONENT = 64
_NO_GLOBALS = ("lipsum",)
"""Functions of jinja2's that make texts of any size."""
_NO_FILTERS = ("batch", "center", "slice", "urlize", "xmlattr")
"""Filters that chat templates have no use for, and whose results may have any size."""
_NO_METHODS = frozenset({"center", "expandtabs", "ljust", "rjust", "translate", "zfill"})
"""The same of texts."""
_SIZED = "hasten_sized"
"""A filter that gives what it gets, unless that is too large."""
_deadline: ContextVar[float] = ContextVar("deadline", default=float("inf"))
"""On the clock of `time.thread_time`."""


_WIDE = re.compile(r"[%:][^%:a-zA-Z]*(\d{5}|[*{])")
"""Of a format: a width that would make a text of any size."""


class TemplateLimitError(Exception):
    """A template makes too much."""


class TemplateTimeError(TemplateLimitError):
    """A template takes too long."""


@contextmanager
def limited_time(seconds: float) -> Iterator[None]:
    """Limit templates that this thread renders meanwhile to `seconds` of its CPU time."""
    token = _deadline.set(time.thread_time() + seconds)
    try:
        yield
    finally:
        _deadline.reset(token)


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Where templates are compiled and rendered. TemplateLimitError, while one is rendered, ends what has no end."""

    intercepted_binops = frozenset({"*", "**", "+", "%"})

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for name in _NO_GLOBALS:
            self.globals.pop(name, None)
        for name in _NO_FILTERS:
            self.filters.pop(name, None)
        self.filters[_SIZED] = self.sized
        self.filters |= {name: self._checked(name, self.filters[name]) for name in _CHECKS}

    @staticmethod
    def _checked(name: str, given: Callable[..., Any]) -> Callable[..., Any]:
        """A filter whose arguments are looked at first; what jinja2 notes at its function stays with it."""

        @functools.wraps(given)
        def checked(*arguments: Any, **options: Any) -> Any:
            _CHECKS[name](*(each for each in arguments if not isinstance(each, Environment | EvalContext)))
            return given(*arguments, **options)

        return checked

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template: nodes.Template = _Bounding().visit(super()._parse(source, name, filename))
        return template

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Whether a template may use an attribute."""
        return super().is_safe_attribute(obj, attr, value) and not (isinstance(obj, str) and attr in _NO_METHODS)

    def call(self, context: Any, function: Any, /, *arguments: Any, **options: Any) -> Any:
        """The result of a call."""
        text = getattr(function, "__self__", None)
        if isinstance(text, str) and (check := _CHECKS.get(function.__name__)) is not None:
            check(*((*arguments, text) if function.__name__ == "join" else (text, *arguments)))
        return super().call(context, function, *arguments, **options)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """What stands for a text's `format`; None where the value is another one."""
        if isinstance(text := getattr(value, "__self__", None), str) and value.__name__ in ("format", "format_map"):
            _check_format(text)
        return super().wrap_str_format(value)

    def tick(self) -> None:
        """Note that a loop or a macro goes on."""
        if time.thread_time() > _deadline.get():
            raise TemplateTimeError

    def sized(self, value: Any) -> Any:
        """A value that a template keeps, unless it is too large."""
        if isinstance(value, str | list | tuple):
            _check_size(len(value))
        return value

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """The result of an operator whose results may be large."""
        if operator == "*":
            _check_product(left, right)
        elif operator == "**" and abs(right) > _MAX_EXPONENT:
            raise TemplateLimitError(f"it takes a power of {right}")
        elif operator == "%" and isinstance(left, str):
            _check_format(left)
        return self.sized(super().call_binop(context, operator, left, right))


def _check_product(left: Any, right: Any) -> None:
    for items, count in ((left, right), (right, left)):
        if isinstance(items, str | list | tuple) and isinstance(count, int):
            _check_size(len(items) * count)


def _check_replace(text: Any, old: Any = "", new: Any = "", *_: Any) -> None:
    _check_size(str(text).count(str(old)) * len(str(new)))


def _check_join(texts: Any, between: Any = "", *_: Any) -> None:
    if isinstance(texts, list | tuple):
        _check_size(len(texts) * len(str(between)) + sum(len(text) for text in texts if isinstance(text, str)))


def _check_format(form: Any, *_: Any) -> None:
    if _WIDE.search(str(form)):
        raise TemplateLimitError(f"it has the format {str(form)[:80]!r}")


def _check_indent(_text: Any, width: Any = 4, *_: Any) -> None:
    _check_size(len(width) if isinstance(width, str) else 1000 * int(width))


def _check_size(size: int) -> None:
    if size > _MAX_SIZE:
        raise TemplateLimitError(f"it makes a text or list of {size} characters or items")


_CHECKS: dict[str, Callable[..., None]] = {
    "format": _check_format,
    "indent": _check_indent,
    "join": _check_join,
    "replace": _check_replace,
}
"""Of filters and methods of texts, by their names."""


class _Bounding(NodeTransformer):
    """Has loops and macros note that they go on, and looks at the size of what is kept or joined."""

    def generic_visit(self, node: nodes.Node, *arguments: Any, **options: Any) -> Any:
        """The node, or what stands for it."""
        super().generic_visit(node, *arguments, **options)
        if isinstance(node, nodes.For | nodes.Macro | nodes.CallBlock):
            node.body.insert(0, nodes.ExprStmt(_call("tick"), lineno=node.lineno))
        elif isinstance(node, nodes.Assign):
            node.node = _call("sized", node.node)
        elif isinstance(node, nodes.AssignBlock):
            node.filter = nodes.Filter(node.filter, _SIZED, [], [], None, None)
        elif isinstance(node, nodes.Concat):
            return _call("sized", node)
        return node


def _call(method: str, *values: nodes.Node) -> nodes.Call:
    """An expression that calls a method of the environment."""
    return nodes.Call(nodes.EnvironmentAttribute(method), [*values], [], None, None)
