"""What is asked for: how it is written down, and how an update changes it."""

import json
from dataclasses import replace

import pytest

from hasten.cluster.backend import ServerUpdate
from hasten.cluster.spec import TrainingJob, TritonServer, record_of, server_of
from hasten.core.errors import ConfigError

SERVER = TritonServer(name="s", version="1", model_repository="/m", env=("A=1", "B=2"), replicas=2)


def test_an_update_is_put_into_what_was_asked() -> None:
    update = ServerUpdate(env=["B=3", "C=4"], load_model=["x"], extend_command="--id y", replicas=0)
    result = update.applied_to(SERVER)
    assert result == replace(SERVER, env=("A=1", "B=3", "C=4"), load_model=("x",), extend_command="--id y", replicas=0)
    assert ServerUpdate().applied_to(SERVER) == SERVER
    assert ServerUpdate(extend_command="").applied_to(result).extend_command == ""


def test_an_update_keeps_the_rules_of_a_server() -> None:
    with pytest.raises(ConfigError, match="--replicas must be at least 0"):
        ServerUpdate(replicas=-1)
    with pytest.raises(ConfigError, match="created with --autoscale, which decides on their number"):
        ServerUpdate(replicas=1).applied_to(replace(SERVER, replicas=1, autoscale="1:4"))


def test_a_server_is_what_its_record_says() -> None:
    for server in (SERVER, replace(SERVER, replicas=0, allow_metrics=True, gpus=2, temp_dir=("a:/b",))):
        record = json.loads(json.dumps(record_of(server)))
        assert server_of(record) == server
    assert record_of(SERVER) == {
        "name": "s", "version": "1", "model_repository": "/m", "env": ["A=1", "B=2"], "replicas": 2
    }  # fmt: skip
    assert record_of(TrainingJob(name="j", command="true")) == {"name": "j", "command": "true"}
    with pytest.raises(TypeError, match="later"):
        server_of({**record_of(SERVER), "later": 1})
