"""What can be wrong with a request: values, JSON, bytes and protobuf messages that are changed by chance."""

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

TEXTS = [
    "",
    "\0",
    "x" * 70_000,
    "../../etc/passwd",
    "%s%n%x",
    "{{7*7}}",
    "café 漢字 🙂",
    "\ud800",
    "-1",
    "1e999",
    "null",
    "UINT32",
    "BYTES",
    "FP16",
    "INT128",
    "input_ids",
    "text_output",
]
INTS = [0, 1, -1, 2, 3, 127, 255, 65536, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, -(2**31), -(2**63)]
_HUGE = 10**400
_FLOATS = [0.0, -0.0, 0.5, -1.5, 1e-320, 1e308, float("nan"), float("inf"), float("-inf")]
_NESTED = 40
_DEEP = 100_000
_Path = tuple[Any, Any]
"""A dict or list, and the key or index of one of its values."""


def nasty(rng: random.Random) -> Any:
    """A value that few expect."""
    deep: Any = 1
    for _ in range(_NESTED):
        deep = [deep]
    kinds: list[list[Any]] = [TEXTS, INTS, _FLOATS]
    others: list[Any] = [None, True, False, [], {}, [[]], [None], {"": {}}, [[1], 2], deep, _HUGE]
    return copy.deepcopy(rng.choice(rng.choice([*kinds, others])))


def _paths(value: Any) -> Iterator[_Path]:
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _paths(value[key])


def mutated_json(rng: random.Random, value: Any) -> Any:
    """A copy with one to three changes."""
    held = {"": copy.deepcopy(value)}
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        holder, key = rng.choice(list(_paths(held)))
        _change(rng, holder, key)
    return held.get("")


def _change(rng: random.Random, holder: Any, key: Any) -> None:
    old = holder[key]
    change = rng.randrange(7)
    if change == 0 and key != "":
        del holder[key]
    elif change == 1:
        holder[key] = rng.choice([str(old), [old], {"x": old}, [old, old]])
    elif change == 2 and isinstance(old, dict):
        old[rng.choice(TEXTS)] = nasty(rng)
    elif change == 3 and isinstance(old, list) and old:
        holder[key] = rng.choice([old * 2, old[:-1], old[::-1], old * 500])
    elif change == 4 and isinstance(old, int) and abs(old) < _HUGE:
        holder[key] = rng.choice([-old, old + 1, old - 1, old * 2**20, old % 97 + 0.5])
    elif change == 5 and isinstance(holder, dict) and key != "":
        holder[rng.choice([key.upper(), key + " ", key[:-1], *TEXTS])] = holder.pop(key)
    else:
        holder[key] = nasty(rng)


def json_bytes(rng: random.Random, value: Any) -> bytes:
    """JSON as Python writes it, with NaN and lone surrogates, and now and then something that is none."""
    text = json.dumps(value)
    kind = rng.randrange(30)
    if kind == 0:
        return (text[:-1] + ',"id":"twice","id":1}').encode()
    if kind == 1:
        return text.encode("utf-16")
    if kind == 2:
        return b'{"x":' + b"[" * _DEEP + b"]" * rng.choice((0, _DEEP)) + b"}"
    if kind == 3:
        return b"\xef\xbb\xbf" + text.encode()
    return mutated_bytes(rng, text.encode()) if kind < 8 else text.encode()


def mutated_bytes(rng: random.Random, raw: bytes) -> bytes:
    """Cut off, overwritten, doubled, or with other bytes in between."""
    index = rng.randrange(len(raw) + 1)
    change = rng.randrange(6)
    if change == 0:
        return raw[:index]
    if change == 1:
        return raw[:index] + rng.randbytes(rng.randrange(1, 20)) + raw[index:]
    if change == 2:
        return raw[:index] + rng.choice([b"\xff", b"\x00", b"\xc3\x28", b"\xed\xa0\x80", b"}", b'"']) + raw[index + 1 :]
    if change == 3:
        return raw + raw[index:]
    if change == 4:
        return raw[index:]
    return rng.randbytes(rng.randrange(200))


def mutate_message(rng: random.Random, message: Any) -> None:
    """Change a protobuf message in one to three places."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        _mutate_field(rng, message)


def _mutate_field(rng: random.Random, message: Any) -> None:
    fields = [field for field, _ in message.ListFields()]
    if not fields or rng.random() < 0.25:
        fields = list(message.DESCRIPTOR.fields)
    if not fields:
        return
    field = rng.choice(fields)
    if rng.random() < 0.1:
        message.ClearField(field.name)
    elif field.message_type is not None and field.message_type.GetOptions().map_entry:
        _mutate_map(rng, getattr(message, field.name), field.message_type.fields_by_name["value"])
    elif field.is_repeated:
        _mutate_list(rng, getattr(message, field.name), field)
    elif field.message_type is not None:
        _mutate_field(rng, getattr(message, field.name))
    else:
        setattr(message, field.name, _scalar(rng, field, getattr(message, field.name)))


def _mutate_map(rng: random.Random, found: Any, kind: Any) -> None:
    key = rng.choice([*found, *_unicode(TEXTS), "priority", "timeout", "shared_memory_region", "classification"])
    if kind.message_type is None:
        found[key] = _scalar(rng, kind, None)
    else:
        _mutate_field(rng, found[key])


def _mutate_list(rng: random.Random, found: Any, field: Any) -> None:
    if found and rng.random() < 0.2:
        del found[rng.randrange(len(found))]
    elif field.message_type is not None:
        if not found or rng.random() < 0.2:
            found.add().CopyFrom(rng.choice(list(found)) if found else field.message_type._concrete_class())
        _mutate_field(rng, rng.choice(list(found)))
    elif found and rng.random() < 0.7:
        index = rng.randrange(len(found))
        found[index] = _scalar(rng, field, found[index])
    else:
        found.append(_scalar(rng, field, None))


def _unicode(texts: list[str]) -> list[str]:
    return [text for text in texts if text.isprintable()]


def _scalar(rng: random.Random, field: Any, old: Any) -> Any:
    if field.cpp_type == field.CPPTYPE_STRING:
        if field.type == field.TYPE_BYTES:
            return mutated_bytes(rng, old or b"")
        return rng.choice(_unicode(TEXTS))
    if field.cpp_type in (field.CPPTYPE_FLOAT, field.CPPTYPE_DOUBLE):
        return rng.choice(_FLOATS)
    if field.cpp_type == field.CPPTYPE_BOOL:
        return rng.random() < 0.5
    if field.enum_type is not None:
        return rng.choice(list(field.enum_type.values_by_number))
    bits = 32 if field.cpp_type in (field.CPPTYPE_INT32, field.CPPTYPE_UINT32) else 64
    signed = field.cpp_type in (field.CPPTYPE_INT32, field.CPPTYPE_INT64)
    least, most = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if signed else (0, 2**bits)
    return rng.choice([number for number in INTS if least <= number < most])
