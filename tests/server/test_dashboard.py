"""The dashboard and the scrape configuration of examples/observability, compared with what a server exposes."""

import json
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from tests.server.test_metrics import fake_nvml
from tests.server.test_vllm_metrics import STORY, Served, computed

from hasten.server.access import AccessLog
from hasten.server.engine.client import EngineClient
from hasten.server.metrics import Machine, Metrics
from hasten.server.options import EndpointOptions

FOLDER = Path(__file__).parents[2] / "examples/observability"
_WORDS = {"histogram_quantile", "label_values", "sum", "max", "rate", "increase", "by"}
_SELECTOR = re.compile(r"([a-zA-Z_:][\w:]*)(?:\{([^}]*)\})?")
_GROUPS = re.compile(r"\bby \(([^)]*)\)")
_VALUES = re.compile(r"label_values\((\S+), (\w+)\)")


@pytest.fixture
def labels(
    demo_engine: EngineClient, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> dict[str, dict[str, set[str]]]:
    """The labels of each exposed series, with the values that they have, on a machine with a GPU."""
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml([0.0]))
    for tokens in (8, 8):  # a wait is estimated once a few requests are measured
        run(computed(demo_engine, STORY, stream=True, tokens=tokens))
    access = AccessLog()
    access.counts["openai", "200"] += 1
    text = Metrics(cast(Any, Served(demo_engine)), Machine(), access).text()
    found: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            for name, value in ({"": ""} | sample.labels).items():
                found[sample.name][name].add(value)
    return found


def expressions(value: Any) -> Iterator[str]:
    """All queries of a dashboard."""
    if isinstance(value, dict):
        yield from (each for key, each in value.items() if key in ("expr", "definition"))
        for each in value.values():
            yield from expressions(each)
    elif isinstance(value, list):
        for each in value:
            yield from expressions(each)


def test_every_query_of_the_dashboard_is_answered(labels: dict[str, dict[str, set[str]]]) -> None:
    dashboard = json.loads((FOLDER / "grafana.json").read_text())
    queries = list(expressions(dashboard))
    assert len(queries) > 40
    for query in queries:
        if (values := _VALUES.fullmatch(query)) is not None:
            assert labels[values[1]][values[2]], query
            continue
        grouped = {name for group in _GROUPS.findall(query) for name in group.split(", ")}
        selectors = [(name, given) for name, given in _SELECTOR.findall(_GROUPS.sub("", query)) if "_" in name]
        metrics = [(name, given) for name, given in selectors if name not in _WORDS and not name.startswith("__")]
        assert metrics, query
        for name, given in metrics:
            assert name in labels, f"{name} of {query!r} is not exposed"
            wanted = grouped | {each.split("=")[0].rstrip("!") for each in given.split(",") if each}
            assert wanted <= labels[name].keys(), f"{query!r}: {name} has the labels {sorted(labels[name])}"
            assert "$model_name" not in given or labels[name]["model_name"] == {"story"}


def test_legends_name_labels_and_panels_do_not_overlap(labels: dict[str, dict[str, set[str]]]) -> None:
    panels = json.loads((FOLDER / "grafana.json").read_text())["panels"]
    indices = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels]
    assert len(set(indices)) == len(panels) == len({panel["id"] for panel in panels})
    for panel in panels:
        assert panel["description"]
        for target in panel["targets"]:
            named = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            grouped = {name for group in _GROUPS.findall(target["expr"]) for name in group.split(", ")}
            metrics = [name for name, _ in _SELECTOR.findall(target["expr"]) if name in labels]
            assert named <= (grouped or labels[metrics[0]].keys()), target


def test_prometheus_finds_the_server_at_its_default_port() -> None:
    config = yaml.safe_load((FOLDER / "prometheus.yaml").read_text())
    (job,) = config["scrape_configs"]
    (targets,) = job["static_configs"]
    assert targets["targets"] == [f"localhost:{EndpointOptions.metrics_port}"]
    assert job.get("metrics_path", "/metrics") == "/metrics"
