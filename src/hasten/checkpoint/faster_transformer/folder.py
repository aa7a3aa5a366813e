"""Which family of FasterTransformer's a model or a folder is of, and what the folder's config.ini says."""

import logging
from dataclasses import dataclass
from pathlib import Path

from hasten.checkpoint.faster_transformer.bert import Bert
from hasten.checkpoint.faster_transformer.bloom import Bloom
from hasten.checkpoint.faster_transformer.family import Family
from hasten.checkpoint.faster_transformer.gpt2 import GPT2
from hasten.checkpoint.faster_transformer.gpt_neox import GPTNeoX
from hasten.checkpoint.faster_transformer.gptj import GPTJ
from hasten.checkpoint.faster_transformer.ini import (
    CONFIG_INI,
    INT8_MODES,
    NO_SMOOTHQUANT,
    Section,
    read_sections,
    unreadable,
)
from hasten.checkpoint.faster_transformer.opt import OPT
from hasten.checkpoint.faster_transformer.t5 import MT5, T5
from hasten.core.dtypes import Quantization
from hasten.core.errors import CheckpointError, ConfigError, UnsupportedError
from hasten.core.model_config import ModelConfig

_log = logging.getLogger(__name__)

FAMILIES: tuple[Family, ...] = (Bloom(), OPT(), GPT2(), GPTJ(), GPTNeoX(), MT5(), T5(), Bert())
"""Those of one section of config.ini in the order in which they are tried: the last takes what is no other's."""


def family_of(architecture: str) -> Family | None:
    """The family of an architecture, None where FasterTransformer had none."""
    return next(
        (each for each in FAMILIES if architecture == each.architecture or architecture in each.other_architectures),
        None,
    )


def writable_family(config: ModelConfig) -> Family:
    """The family that a model is written as; UnsupportedError says why FasterTransformer could not compute it."""
    family = family_of(config.architecture)
    if family is None:
        known = ", ".join(each.architecture for each in FAMILIES)
        why = f"FasterTransformer had no {config.architecture} (it had {known})"
    else:
        other = None if config.task in family.tasks else "vectors or scores of texts"
        problem = other or family.why_not(config)
        if problem is None:
            return family
        why = f"FasterTransformer's {family.label} has no {problem}"
    raise UnsupportedError(f"{why}; convert to hasten's own format with --format safetensors")


@dataclass(frozen=True)
class Folder:
    """What config.ini says of a folder."""

    family: Family
    config: ModelConfig
    """It does not say whether the head is tied: it is unless there is a file of a head that differs."""
    ranks: int
    model_name: str
    quantization: Quantization | None


def read_folder(path: Path) -> Folder:
    """Read config.ini of a folder; CheckpointError or UnsupportedError names the key that is wrong."""
    ini = path / CONFIG_INI
    sections = read_sections(ini)
    family, section = _family_of(ini, sections)
    family.check(section)
    try:
        config = family.config(section)
        ranks, mode = _ranks(path, section, family), _quantization(section)
        folder = Folder(family, config, ranks, section.text(family.name_key, ""), mode)
    except ConfigError as error:
        raise unreadable(ini, str(error)) from error
    if unknown := sorted(family.unknown(section)):
        _log.warning("%s: ignored, since hasten does not know what they change: %s", ini, ", ".join(unknown))
    return folder


def _family_of(ini: Path, sections: dict[str, Section]) -> tuple[Family, Section]:
    for family in FAMILIES:
        if family.section in sections and family.recognizes(sections[family.section]):
            return family, sections[family.section]
    known = ", ".join(dict.fromkeys(f"[{family.section}]" for family in FAMILIES))
    raise CheckpointError(
        f"{ini} has none of the sections {known}: it is of a kind of model that hasten does not read from "
        "FasterTransformer's format"
    )


def _quantization(section: Section) -> Quantization | None:
    mode = section.text("int8_mode", "0")
    if mode not in INT8_MODES:
        raise UnsupportedError(f"{section.path}: int8_mode is {mode!r}, but must be 0 or 1: {NO_SMOOTHQUANT}")
    return INT8_MODES[mode]


def _ranks(path: Path, section: Section, family: Family) -> int:
    """Ranks that a folder's files are for; not every family's config.ini says it."""
    if "tensor_para_size" in section:
        return section.count("tensor_para_size")
    found = len(list(path.glob(f"{family.of_all_ranks}.*.bin")))
    if not found:
        raise CheckpointError(
            f"{path / family.of_all_ranks}.0.bin is missing; copy it, or convert the checkpoint again"
        )
    return found
