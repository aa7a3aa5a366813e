"""What users may ask for: names, quantities and numbers, at their bounds."""

import re
from typing import Any, cast

import pytest

from hasten.cluster.backend import ServerUpdate
from hasten.cluster.spec import (
    TrainingJob,
    TritonServer,
    Volume,
    checked_namespace,
    checked_object_name,
    quantity,
    seconds,
)
from hasten.core.errors import ConfigError

INT32 = 2**31 - 1


def job(**options: Any) -> TrainingJob:
    return TrainingJob(**{"name": "x", "command": "run", **options})


def server(**options: Any) -> TritonServer:
    return TritonServer(**{"name": "x", "version": "1", "model_repository": "/m", **options})


@pytest.mark.parametrize(
    ("text", "number"),
    [("4", 4), ("500m", 0.5), ("1.5", 1.5), ("2k", 2000), ("1Ki", 1024), ("16Gi", 16 * 2**30), ("1M", 10**6)],
)
def test_quantities(text: str, number: float) -> None:
    assert quantity(text, "--memory") == number


@pytest.mark.parametrize("text", ["1ki", "1mi", "1K", "-1", "1e3", "Gi", "1 Gi", "1Gi\n", "\u0663", "1..5", "9" * 31])
def test_what_is_no_quantity(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--size '.*' is not a quantity such as"):
        Volume(name="v", size=text)
    with pytest.raises(ConfigError, match=r"--memory '.*' is not a quantity such as"):
        job(memory=text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": "16"}, "--memory '16' is less than 1Mi: give a unit, such as 2Gi"),
        ({"memory": "1Ki"}, "--memory '1Ki' is less than 1Mi"),
        ({"memory": "500m"}, "--memory '500m' is less than 1Mi"),
        ({"share_memory": "64k"}, "--share-memory '64k' is less than 1Mi"),
        ({"memory": "8Ei"}, "--memory '8Ei' is more than Kubernetes counts, 9223372036854775807"),
        ({"cpu": "0.0001"}, "--cpu '0.0001' is finer than a thousandth of a core"),
        ({"cpu": "1.5m"}, "--cpu '1.5m' is finer than a thousandth of a core"),
        ({"cpu": "10E"}, "--cpu '10E' is more than Kubernetes counts"),
        ({"gpus": INT32 + 1}, f"--gpus must be at most {INT32}, got {INT32 + 1}"),
        ({"device": ["a/b=\u0663"]}, "is not a number"),
        ({"device": ["a/b=99999999999"]}, "is not a number up to"),
    ],
)
def test_amounts_beyond_their_bounds(options: dict[str, Any], message: str) -> None:
    for make in (job, server):
        with pytest.raises(ConfigError, match=message):
            make(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 2**31}, f"--workers must be at most {INT32}, got 2147483648"),
        ({"retry": INT32}, f"--retry must be at most {INT32 - 1}"),  # Kubernetes is told one more
        ({"nproc_per_node": "0"}, "--nproc-per-node '0' is none of auto, cpu, gpu and a number"),
        ({"nproc_per_node": "\u0663"}, "is none of auto, cpu, gpu and a number"),
        ({"running_timeout": "99999999999d"}, "--running-timeout '99999999999d' is more than 1000000000 seconds"),
        ({"ttl_after_finished": "9" * 400 + "s"}, "--ttl-after-finished '9+s' is more than"),
    ],
)
def test_numbers_of_jobs_beyond_their_bounds(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        job(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"startup_timeout": 999999999999}, "--startup-timeout must be at most 1000000000, got 999999999999"),
        ({"exit_timeout": 2**63}, "--exit-timeout must be at most 1000000000"),
        ({"exit_timeout": 0}, "--exit-timeout must be at least 1, got 0"),
        ({"replicas": 2**31}, f"--replicas must be at most {INT32}"),
        ({"multinode": 2**31}, f"--multinode must be at most {INT32}"),
        ({"gpumemory": -1}, "--gpumemory must be at least 0, got -1"),
        ({"gpucore": 2**31}, "--gpucore must be at most"),
        ({"autoscale": "1:99999999999"}, "--autoscale '1:99999999999' is not MIN:MAX"),
        ({"autoscale": "\u0661:\u0663"}, "is not MIN:MAX"),
    ],
)
def test_numbers_of_servers_beyond_their_bounds(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        server(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label": ["a=b=c"]}, "--label a: its value 'b=c' must have at most 63 letters"),
        ({"label": [f"a={'v' * 64}"]}, "--label a: its value 'v+' must have at most 63 letters"),
        ({"label": ["a/b/c=d"]}, "what is before '/' in --label 'a/b/c', 'a/b' must have"),
        ({"label": ["/c=d"]}, "what is before '/' in --label '/c', '' must have"),
        ({"label": ["example.com/=d"]}, "--label 'example.com/': its name '' must have"),
        ({"selector": ["-gpu=h100"]}, "--selector '-gpu': its name '-gpu' must have at most 63 letters"),
        ({"selector": ["gpu=h 100"]}, "--selector gpu: its value 'h 100' must have"),
        ({"annotation": [f"{'a' * 64}=b"]}, "--annotation 'a+': its name 'a+' must have at most 63 letters"),
        ({"device": ["amd.com/g pu=1"]}, "--device 'amd.com/g pu': its name 'g pu' must have"),
        ({"image": " "}, "--image is empty: give the name of an image"),
    ],
)
def test_names_and_values_that_kubernetes_refuses(options: dict[str, Any], message: str) -> None:
    for make in (job, server):
        with pytest.raises(ConfigError, match=message):
            make(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": ["v:/"]}, "--data 'v:/' would hide the whole file system: give a folder in it"),
        ({"data": ["v:/./"]}, "would hide the whole file system"),
        ({"data": ["v:/a/../b"]}, "--data 'v:/a/../b' has '..'"),
        ({"data_dir": ["/"]}, "--data-dir '/' would hide the whole file system"),
        ({"data_dir": ["/a/../b:/c"]}, "--data-dir '/a/../b:/c' has '..'"),
        ({"data_dir": ["/a:b"]}, "--data-dir '/a:b' is not /FROM:/PATH or /PATH"),
        ({"data_dir": ["a:/b"]}, "--data-dir 'a:/b' is not /FROM:/PATH or /PATH"),
        ({"config_file": ["f:/"]}, "--config-file 'f:/' would hide the whole file system"),
        ({"working_dir": ""}, "--working-dir is empty: give a value, or leave it out"),
        ({"data": ["v:/a", ""]}, "--data is empty"),
    ],
)
def test_what_can_be_mounted_nowhere(options: dict[str, Any], message: str) -> None:
    for make in (job, server):
        with pytest.raises(ConfigError, match=re.escape(message)):
            make(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": ["v:/a"], "data_subpath_expr": ["v:../b"]}, "--data-subpath-expr v:../b leaves the volume"),
        ({"data": ["v:/a"], "data_subpath_expr": ["v:/b"]}, "--data-subpath-expr v:/b leaves the volume"),
        ({"env_from_secret": ["A="]}, "--env-from-secret A: its secret '' must have"),
        ({"extend_command": "--log-file 'a b"}, "is not words of a shell: no closing quotation"),
        ({"load_model": [""]}, "--load-model is empty"),
    ],
)
def test_servers_that_would_fail_at_each_start(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        server(**options)


def test_an_empty_text_clears_what_may_be_empty() -> None:
    server(extend_command="")
    Volume(name="v", nfs_server="s", path="/x", description="", mount_options="")
    for option in ("path", "nfs_server", "s3_bucket", "oss_bucket", "size"):
        with pytest.raises(ConfigError, match=f"--{option.replace('_', '-')} is empty"):
            Volume(**cast("Any", {"name": "v", option: ""}))


def test_names_and_values_that_kubernetes_takes() -> None:
    labels = ["a=", "a_b.C=d-e_f.9", f"example.com/{'n' * 63}={'v' * 63}"]
    for make in (job, server):
        make(
            label=labels, selector=labels, annotation=["a=any text: {b/c=d}"], device=["amd.com/gpu=1"], image="r:1/i@x"
        )


def test_numbers_at_their_bounds() -> None:
    job(gpus=INT32, workers=INT32, retry=INT32 - 1, running_timeout="1000000000s", memory="7Ei", cpu="1m")
    server(replicas=INT32, multinode=INT32, startup_timeout=10**9, exit_timeout=10**9, autoscale=f"1:{INT32}")
    assert seconds("1h30m", "--since") == 5400


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "A", "-a", "a-", "a_b", "a b", "a\n", "a\0", "\u00e9"])
def test_what_is_no_name(name: str) -> None:
    for make in (
        lambda: job(name=name),
        lambda: server(name=name),
        lambda: Volume(name=name),
        lambda: job(namespace=name),
        lambda: checked_namespace(name),
        lambda: checked_object_name(name, "--data"),
    ):
        with pytest.raises(ConfigError, match="must have at most"):
            make()
    if name != "":
        with pytest.raises(ConfigError, match=r"--data '.*' (must have at most|has a null character)"):
            job(data=[f"{name}:/mnt"])


def test_names_that_others_gave() -> None:
    """Namespaces and volumes that were made elsewhere may have names that hasten would not give."""
    assert checked_namespace("1-team") == "1-team"
    assert checked_object_name("7b.models-1", "--data") == "7b.models-1"
    job(namespace="1-team", data=["7b.models-1:/mnt"])
    for name in ("a" * 64, "1.2"):
        with pytest.raises(ConfigError):
            checked_namespace(name)
    with pytest.raises(ConfigError):
        checked_object_name("a" * 254, "--data")


@pytest.mark.parametrize("text", ["a\udcffb", "a\0b"])
def test_texts_that_cannot_be_passed_on(text: str) -> None:
    """Bytes that are no UTF-8 come in as lone surrogates, and would arrive as other characters."""
    for make in (
        lambda: job(command=text),
        lambda: job(env=[f"A={text}"]),
        lambda: job(annotation=[f"a={text}"]),
        lambda: server(model_repository=text),
        lambda: server(extend_command=text),
        lambda: ServerUpdate(env=[f"A={text}"]),
        lambda: Volume(name="v", path=text),
        lambda: Volume(name="v", description=text),
    ):
        with pytest.raises(ConfigError, match=r"is not UTF-8$|has a null character$"):
            make()
    job(command="\u00e9 \u6f22 \U0001f642 \x85 \u2028", env=["A=\x1b[0m"])
