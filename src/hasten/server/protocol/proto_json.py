"""Protobuf messages as plain values for JSON, the way Triton writes them."""

from typing import Any


def to_json(message: Any) -> dict[str, Any]:
    """Every field in the order of the schema, unset ones with their defaults; of messages and choices the set ones.

    Unlike protobuf's own JSON, whole numbers of 64 bits are numbers.
    """
    values: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if field.is_repeated:
            values[field.name] = _map(field, value) if _is_map(field) else [_plain(field, each) for each in value]
        elif not field.has_presence or message.HasField(field.name):
            values[field.name] = _plain(field, value)
    return values


def _is_map(field: Any) -> bool:
    return field.message_type is not None and bool(field.message_type.GetOptions().map_entry)


def _map(field: Any, values: Any) -> dict[str, Any]:
    kind = field.message_type.fields_by_name["value"]
    return {str(key): _plain(kind, values[key]) for key in values}


def _plain(field: Any, value: Any) -> Any:
    if field.message_type is not None:
        return to_json(value)
    if field.enum_type is not None:
        return field.enum_type.values_by_number[value].name
    return value
