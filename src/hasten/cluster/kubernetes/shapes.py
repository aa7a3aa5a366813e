"""The fields that are read of pods and jobs, of which there may be thousands: the rest of an answer is skipped.

Most of a pod is not needed here (managers of fields, environments, probes), and skipping it takes a fraction of the
time of building it.
"""

from collections.abc import Mapping
from typing import Any, TypedDict

import msgspec

from hasten.cluster.kubernetes.resources import JOBS, PODS, PYTORCH_JOBS, TRAIN_JOBS, Resource


class _Metadata(TypedDict, total=False):
    name: str
    namespace: str
    uid: str
    creationTimestamp: str
    deletionTimestamp: str | None
    labels: dict[str, str] | None
    annotations: dict[str, str] | None


class _Container(TypedDict, total=False):
    name: str
    resources: dict[str, Any] | None


class _Volume(TypedDict, total=False):
    persistentVolumeClaim: dict[str, Any] | None


class _PodSpec(TypedDict, total=False):
    nodeName: str | None
    priorityClassName: str | None
    containers: list[_Container]
    initContainers: list[_Container] | None
    volumes: list[_Volume] | None


class _Pod(TypedDict, total=False):
    metadata: _Metadata
    spec: _PodSpec
    status: dict[str, Any] | None


class _Template(TypedDict, total=False):
    spec: _PodSpec | None


class _Replicas(TypedDict, total=False):
    replicas: int | None
    template: _Template | None


class _Trainer(TypedDict, total=False):
    numNodes: int | None
    resourcesPerNode: dict[str, Any] | None


class _JobSpec(TypedDict, total=False):
    pytorchReplicaSpecs: dict[str, _Replicas] | None
    runPolicy: dict[str, Any] | None
    trainer: _Trainer | None
    parallelism: int | None
    template: _Template | None


class _Job(TypedDict, total=False):
    metadata: _Metadata
    spec: _JobSpec
    status: dict[str, Any] | None


class _Pods(TypedDict):
    metadata: dict[str, Any]
    items: list[_Pod]


class _Jobs(TypedDict):
    metadata: dict[str, Any]
    items: list[_Job]


DECODERS: Mapping[Resource, msgspec.json.Decoder[Any]] = {
    PODS: msgspec.json.Decoder(_Pods),
    PYTORCH_JOBS: msgspec.json.Decoder(_Jobs),
    JOBS: msgspec.json.Decoder(_Jobs),
    TRAIN_JOBS: msgspec.json.Decoder(_Jobs),
}
"""Decoders of lists, for kinds that have one."""
