"""The environment of a job's instances: what PyTorchJob's operator and the device plugin of a cluster would set."""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from hasten.cluster.local.gpus import VISIBLE
from hasten.cluster.local.launch import JobPlan
from hasten.cluster.local.processes import MARK

MASTER_ADDRESS = "localhost"
_RANKS = (
    "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT "
    "PET_NNODES PET_NODE_RANK PET_MASTER_ADDR PET_MASTER_PORT PET_NPROC_PER_NODE"
).split()
"""Variables that say which rank a process is. Those of the command that submits are not the job's."""


def instance_environment(env: Mapping[str, str], mark: str, given: Sequence[str]) -> dict[str, str]:
    """This process's environment, the mark of an instance, the GPUs that it is given, and its own variables, which win.

    An instance without GPUs sees none, as in a cluster. Programs beside this Python are found, last of all.
    """
    inherited = {name: value for name, value in os.environ.items() if name not in _RANKS}
    inherited["PATH"] = os.pathsep.join([inherited.get("PATH", os.defpath), str(Path(sys.executable).parent)])
    return {**inherited, "PYTHONUNBUFFERED": "1", VISIBLE: ",".join(given), **env, MARK: mark}


def rank_environment(plan: JobPlan, index: int, port: int) -> dict[str, str]:
    """Which of a job's instances this is, and where they meet.

    An instance is a node here, as it is in a cluster: LOCAL_WORLD_SIZE is 1, and an instance's GPUs are its own. With
    --nproc-per-node N the WORLD_SIZE counts N processes for each instance, which torchrun starts; `auto`, `cpu` and
    `gpu` leave the number to torchrun.
    """
    count = len(plan.names)
    nproc = plan.nproc_per_node or ""
    number = int(nproc) if nproc.isdecimal() else 1
    variables = {"MASTER_ADDR": MASTER_ADDRESS, "MASTER_PORT": str(port)}
    variables |= {f"PET_{name}": value for name, value in variables.items()}
    variables |= {"RANK": str(index), "WORLD_SIZE": str(count * number), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    variables |= {"PET_NNODES": str(count), "PET_NODE_RANK": str(index)}
    if plan.nproc_per_node is not None:
        variables["PET_NPROC_PER_NODE"] = plan.nproc_per_node
    return variables
