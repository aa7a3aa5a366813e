"""How many threads torch computes with."""

import os

import torch

from hasten.core.cpus import available_cpus


def limit_threads() -> int:
    """Let torch use no more threads than the process has CPUs; returns their number.

    torch counts the CPUs of the machine and knows no container's quota: threads beyond it only wait for each other.
    OMP_NUM_THREADS is the user's own choice, and holds.
    """
    cpus = available_cpus()
    if "OMP_NUM_THREADS" not in os.environ and cpus < torch.get_num_threads():
        torch.set_num_threads(cpus)
    return torch.get_num_threads()
