"""Parameters of a request that are the protocol's and not the model's, checked here for all transports."""

from collections.abc import Mapping

from hasten.server.types import ErrorKind, Parameter, ServiceError

EMPTY_FINAL = "triton_enable_empty_final_response"
_RESERVED: Mapping[str, tuple[tuple[type, ...], str]] = {
    "priority": ((int,), "int64_param or uint64_param"),
    "timeout": ((int,), "int64_param"),
    "sequence_id": ((int, str), "int64_param or string_param"),
    "sequence_start": ((bool,), "bool_param"),
    "sequence_end": ((bool,), "bool_param"),
    "binary_data_output": ((bool,), "bool_param"),
    EMPTY_FINAL: ((bool,), "bool_param"),
    "cache_salt": ((str,), "string_param"),
    "headers": ((bool, int, float, str), "any type"),
}
_NOT_NEGATIVE = ("priority", "timeout")


def own_parameters(parameters: Mapping[str, Parameter]) -> dict[str, Parameter]:
    """The model's own parameters; ServiceError with Triton's text where one of the protocol's is wrong."""
    for name, value in parameters.items():
        if name in _RESERVED:
            types, expected = _RESERVED[name]
            if type(value) not in types:
                raise _invalid(f"invalid value type for '{name}' parameter, expected {expected}.")
            if name in _NOT_NEGATIVE and isinstance(value, int) and value < 0:
                raise _invalid(f"invalid value for '{name}', expected value >= 0.")
        elif name.startswith("triton_"):
            raise _invalid(
                "parameter keys starting with 'triton_' are reserved for Triton usage. Only the following keys "
                f"starting with 'triton_' are allowed: {EMPTY_FINAL}"
            )
    return {name: value for name, value in parameters.items() if name not in _RESERVED}


def _invalid(message: str) -> ServiceError:
    return ServiceError(ErrorKind.INVALID, message)
