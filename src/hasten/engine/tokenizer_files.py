"""The files of a tokenizer's folder: tokenizer.json, and what the files around it add to it.

tokenizer.json alone is read without transformers, which takes seconds to import. Where the other files name tokens that
it lacks, or change how it prepares, begins and ends a text, transformers puts them together.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import ByteLevel

from hasten.core.errors import CheckpointError
from hasten.core.text import from_json

_FLAGS = ("lstrip", "normalized", "rstrip", "single_word", "special")
_TOKENIZER_CONFIG, _MAP, _ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
_MASKS = ("[MASK]", "<mask>")
_OF_BERT = {
    "do_lower_case": "lowercase",
    "strip_accents": "strip_accents",
    "tokenize_chinese_chars": "handle_chinese_chars",
}
"""Settings of tokenizer_config.json, and what the normalizer calls them."""

_CLEAN_UP = "clean_up_tokenization_spaces"
_CLEAN_UP_BPE = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"


@dataclass(frozen=True)
class _Declared:
    """A token that a file beside tokenizer.json names."""

    content: str
    file: Path
    token_id: int | None = None
    flags: Mapping[str, bool] | None = None


def require(path: Path) -> None:
    """CheckpointError where neither a folder nor a file has a tokenizer."""
    files = [path / "tokenizer.json", path / _TOKENIZER_CONFIG] if path.is_dir() else [path]
    if not any(file.is_file() for file in files):
        raise CheckpointError(f"{path} has no tokenizer.json; name the tokenizer's folder with --tokenizer-path")


def load(path: Path) -> FastTokenizer:
    """The tokenizer of a folder, or of a tokenizer.json alone; CheckpointError names what is wrong, and where."""
    require(path)
    if path.is_dir():
        file = path / "tokenizer.json"
        fast = _from_file(file) if file.is_file() else None
        declared = list(_declared(path))
        if fast is None or not _is_complete(fast, declared) or _changes_ends(path, fast) or _changes_text(path, fast):
            fast = _from_transformers(path)
        _check_ids(fast, declared)
        return fast
    return _from_file(path)


def mask_token(path: Path, fast: FastTokenizer) -> str | None:
    """The token that stands for a missing word, as the files of a folder name it, or as BERT and RoBERTa call it."""
    for file in (_TOKENIZER_CONFIG, _MAP) if path.is_dir() else ():
        token = _json(path / file).get("mask_token")
        content = token.get("content") if isinstance(token, dict) else token
        if isinstance(content, str):
            return content
    special = {token.content for token in fast.get_added_tokens_decoder().values() if token.special}
    return next((token for token in _MASKS if token in special), None)


def cleans_up(path: Path, fast: FastTokenizer) -> bool:
    """Whether decoded text is cleaned up. As in transformers, tokenizer_config.json must insist on it for BPE."""
    config = _json(path / _TOKENIZER_CONFIG) if path.is_dir() else {}
    is_bpe = type(fast.model).__name__ == "BPE"
    return bool(config.get(_CLEAN_UP) and (config.get(_CLEAN_UP_BPE) or not is_bpe))


def _from_file(file: Path) -> FastTokenizer:
    try:
        return FastTokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception for a malformed file
        raise CheckpointError(f"{file} cannot be read as a tokenizer: {error}") from error


def _from_transformers(folder: Path) -> FastTokenizer:
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        found: FastTokenizer = loaded.backend_tokenizer
    except Exception as error:  # its readers raise whatever a malformed file leads to
        message = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"{folder}: its tokenizer cannot be read ({message:.300})") from error
    return found


def _declared(folder: Path) -> Iterator[_Declared]:
    config = _json(folder / _TOKENIZER_CONFIG)
    tokens = _section(config, "added_tokens_decoder", folder / _TOKENIZER_CONFIG)
    for token_id, token in tokens.items():
        if not (isinstance(token, dict) and isinstance(token.get("content"), str) and token_id.isdecimal()):
            raise CheckpointError(f"{folder / _TOKENIZER_CONFIG}: added_tokens_decoder has no token in {token_id!r}")
        flags = {name: bool(token.get(name, False)) for name in _FLAGS}
        yield _Declared(token["content"], folder / _TOKENIZER_CONFIG, int(token_id), flags)
    yield from _named(config, folder / _TOKENIZER_CONFIG)
    if not tokens:  # else transformers looks at these two no more
        yield from _named(_json(folder / _MAP), folder / _MAP)
    for content, token_id in _json(folder / _ADDED).items():
        if type(token_id) is not int:
            raise CheckpointError(f"{folder / _ADDED}: {content!r} has no token id, but {token_id!r}")
        yield _Declared(content, folder / _ADDED, token_id)


def _named(raw: Mapping[str, Any], file: Path) -> Iterator[_Declared]:
    """Special tokens by their role, such as `eos_token`, and the list of the others."""
    tokens = [value for name, value in raw.items() if name.endswith("_token")]
    for name in ("additional_special_tokens", "extra_special_tokens"):
        more = raw.get(name) or []
        tokens += more.values() if isinstance(more, dict) else more
    for token in tokens:
        content = token.get("content") if isinstance(token, dict) else token
        if isinstance(content, str):
            yield _Declared(content, file)


def _json(path: Path) -> dict[str, Any]:
    try:
        raw = from_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}); copy it again") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} is not a JSON object; copy it again")
    return raw


def _section(raw: Mapping[str, Any], name: str, file: Path) -> dict[str, Any]:
    value = raw.get(name) or {}
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: {name} is not a JSON object")
    return value


def _is_complete(fast: FastTokenizer, declared: list[_Declared]) -> bool:
    """Whether tokenizer.json has all declared tokens, as they are declared."""
    own: dict[str, AddedToken] = {str(token): token for token in fast.get_added_tokens_decoder().values()}
    return all(
        token.content in own
        and (token.flags is None or all(getattr(own[token.content], flag) == on for flag, on in token.flags.items()))
        for token in declared
    )


def _changes_ends(folder: Path, fast: FastTokenizer) -> bool:
    """Whether tokenizer_config.json sets anew which tokens begin and end a text."""
    config = _json(folder / _TOKENIZER_CONFIG)
    said = [config[name] for name in ("add_bos_token", "add_eos_token") if config.get(name) is not None]
    adds = fast.num_special_tokens_to_add(is_pair=False) > 0
    return any(said) or (bool(said) and adds)


def _changes_text(folder: Path, fast: FastTokenizer) -> bool:
    """Whether tokenizer_config.json contradicts tokenizer.json in what becomes of a text before it is tokenized.

    Of the settings that transformers' tokenizers of BERT and GPT-2 have for that, its own win.
    """
    before: dict[str, Any] = {}
    if isinstance(fast.normalizer, BertNormalizer):
        before = {ours: getattr(fast.normalizer, theirs) for ours, theirs in _OF_BERT.items()}
    if isinstance(fast.pre_tokenizer, ByteLevel):
        before["add_prefix_space"] = fast.pre_tokenizer.add_prefix_space
    config = _json(folder / _TOKENIZER_CONFIG)
    return any(config.get(name) is not None and config[name] != value for name, value in before.items())


def _check_ids(fast: FastTokenizer, declared: list[_Declared]) -> None:
    for token in declared:
        found = fast.token_to_id(token.content)
        if token.token_id is not None and found != token.token_id:
            has = "does not have it" if found is None else f"gives it id {found}"
            raise CheckpointError(
                f"{token.file}: token {token.content!r} has id {token.token_id}, but the tokenizer {has}; "
                "the files of the tokenizer contradict each other"
            )
