"""Errors that hasten raises on purpose, one tree.

    HastenError
    ├── ConfigError             an option or a configuration file is wrong or contradicts another
    ├── UnsupportedError        well formed, but hasten does not do it (an architecture, a data type)
    ├── CheckpointError         a checkpoint cannot be read or written
    │   └── ChecksumError       a file differs from what its manifest says
    ├── InvalidRequestError     a request that the engine must refuse: parameters, length, tokens
    ├── CapacityError           memory does not suffice; the message says what to lower
    ├── EngineError             the engine failed while it ran
    │   └── RankError           a rank of a parallel run died; the message names it
    └── ClusterError            a cluster refused or failed a request
        ├── NotFoundError       there is no job, server or volume of that name
        └── ExistsError         there is one already

A message says what was wrong, where, and what to do. Transports map these classes to their own status codes.
"""


class HastenError(Exception):
    """Base of all errors that hasten raises on purpose."""


class ConfigError(HastenError):
    """An option or a configuration file is wrong or contradicts another."""


class UnsupportedError(HastenError):
    """Well formed, but not something hasten does."""


class CheckpointError(HastenError):
    """A checkpoint cannot be read or written as asked."""


class ChecksumError(CheckpointError):
    """A checkpoint file differs from what its manifest says."""


class InvalidRequestError(HastenError):
    """A request that the engine must refuse."""


class CapacityError(HastenError):
    """Memory does not suffice; the message says what to lower."""


class EngineError(HastenError):
    """The engine failed while it ran."""


class RankError(EngineError):
    """A rank of a parallel run died; the message names it and its error."""


class ClusterError(HastenError):
    """A cluster did not do what it was asked."""


class NotFoundError(ClusterError):
    """There is no job, server or volume of that name."""


class ExistsError(ClusterError):
    """There is a job, server or volume of that name already."""


def error_of(kind: str, message: str) -> HastenError:
    """An error that another process reported by its class's name; other classes become an EngineError."""
    found = globals().get(kind)
    if isinstance(found, type) and issubclass(found, HastenError):
        return found(message)
    return EngineError(f"{kind}: {message}")


def exit_status(error: HastenError) -> int:
    """The exit status of a program that ends with an error: 2 for bad input, 1 for a failed run."""
    return 1 if isinstance(error, EngineError | CapacityError | ClusterError) else 2
