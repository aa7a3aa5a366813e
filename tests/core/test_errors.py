import inspect

import hasten
from hasten.core import errors

TREE = {
    errors.HastenError: Exception,
    errors.ConfigError: errors.HastenError,
    errors.UnsupportedError: errors.HastenError,
    errors.CheckpointError: errors.HastenError,
    errors.ChecksumError: errors.CheckpointError,
    errors.InvalidRequestError: errors.HastenError,
    errors.CapacityError: errors.HastenError,
    errors.EngineError: errors.HastenError,
    errors.RankError: errors.EngineError,
    errors.ClusterError: errors.HastenError,
    errors.NotFoundError: errors.ClusterError,
    errors.ExistsError: errors.ClusterError,
}


def test_one_tree() -> None:
    found = {kind for _, kind in inspect.getmembers(errors, inspect.isclass)}
    assert found == set(TREE)
    assert all(kind.__bases__ == (parent,) for kind, parent in TREE.items())


def test_the_drawing_is_the_tree() -> None:
    drawn: dict[str, str] = {}
    above: dict[int, str] = {}
    for line in (errors.__doc__ or "").splitlines():
        words = line.replace("│", " ").replace("├──", "   ").replace("└──", "   ").split()
        if words and words[0].endswith("Error"):
            depth = line.index(words[0])
            above[depth] = words[0]
            drawn[words[0]] = above.get(depth - 4, "Exception")
    assert drawn == {kind.__name__: parent.__name__ for kind, parent in TREE.items()}


def test_every_error_is_exported() -> None:
    for kind in TREE:
        assert kind.__name__ in hasten.__all__
        assert getattr(hasten, kind.__name__) is kind


def test_errors_of_other_processes_are_of_their_own_class() -> None:
    assert type(errors.error_of("ChecksumError", "x")) is errors.ChecksumError
    assert str(errors.error_of("ZeroDivisionError", "x")) == "ZeroDivisionError: x"
    assert type(errors.error_of("ZeroDivisionError", "x")) is errors.EngineError
    assert type(errors.error_of("exit_status", "x")) is errors.EngineError


def test_exit_status() -> None:
    failed = {kind for kind in TREE if errors.exit_status(kind("x")) == 1}
    assert failed == {
        errors.CapacityError,
        errors.EngineError,
        errors.RankError,
        errors.ClusterError,
        errors.NotFoundError,
        errors.ExistsError,
    }
    assert all(errors.exit_status(kind("x")) == 2 for kind in set(TREE) - failed)
