"""The two models around the token model in FasterTransformer's examples: text to tokens, and tokens to text.

preprocessing: QUERY [batch, 1] to INPUT_ID [batch, longest] and REQUEST_INPUT_LEN [batch, 1]; words, several in one
text separated by commas as in CSV, to BAD_WORDS_IDS and STOP_WORDS_IDS [batch, 2, longest].
postprocessing: TOKENS_BATCH [batch, beam, longest] to OUTPUT [batch, beam], up to SEQUENCE_LENGTH where it is given.
"""

import csv
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import model_config_pb2

from hasten.core.errors import ConfigError, InvalidRequestError
from hasten.engine.text import Tokenizer
from hasten.server.models.config import parameter
from hasten.server.models.model import DependentModel
from hasten.server.models.parameters import TOKENIZER
from hasten.server.models.token_inputs import pack_words
from hasten.server.models.work import Work
from hasten.server.tokenizing import FEW_DECODED, MAX_DECODED, Result, check_words, tokenizing
from hasten.server.types import InferResponse, Tensor, invalid

if TYPE_CHECKING:
    from hasten.server.lifecycle import Registry

_MAX_CSV_CHARACTERS = 32 << 10
"""Of the words of one item, with commas and quotes."""
_MAX_DISTINCT_WORDS = 16_384
"""Of all items of a request."""


class _Processing(DependentModel):
    """A model that needs a tokenizer alone: its own, or the one of the token model that serves at the time."""

    def __init__(self, config: model_config_pb2.ModelConfig, models: "Registry", folder: Path) -> None:
        super().__init__(config, models)
        own = parameter(config, TOKENIZER, "")
        self._own = Tokenizer.from_folder(folder / own) if own else None
        if not own and not self.token_model:
            raise ConfigError(f"model '{config.name}' needs parameter 'token_model' or 'tokenizer_path'")
        self.tokenizer()

    def tokenizer(self) -> Tokenizer:
        """The one to use now; ConfigError where there is none."""
        return self.token_model_tokenizer() if self._own is None else self._own

    async def _run(self, work: Callable[[], Result]) -> Result:
        """Do some work on a thread; a refusal is counted as the token model's where there is one."""
        with self.token_engine().counting_refusals() if self.token_model else nullcontext():
            return await tokenizing.run(work)

    async def _encode(self, tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
        """Token ids of each text: by the token model's limits where there is one."""
        try:
            if not self.token_model:
                return await tokenizing.encode(tokenizer, texts)
            return await self.token_engine().tokenize(texts, tokenizer=tokenizer)
        except InvalidRequestError as error:
            raise invalid(f"input 'QUERY': {error}") from None

    @property
    def ready(self) -> bool:
        """Always: it computes nothing on a device."""
        return True


class Preprocessing(_Processing):
    """Text to tokens."""

    async def execute(self, work: Work) -> AsyncGenerator[InferResponse, None]:
        """One response."""
        work.known_parameters()
        tokenizer = self.tokenizer()
        queries = [_only(texts, index) for index, texts in enumerate(_texts(work.inputs["QUERY"]))]
        prompts = await self._encode(tokenizer, queries)
        outputs = await self._run(partial(_prepared, tokenizer, prompts, work.inputs))
        work.clock.prepare()
        yield work.response([tensor for tensor in outputs if tensor.name in work.outputs], final=True)


def _prepared(tokenizer: Tokenizer, prompts: list[list[int]], inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """The outputs of preprocessing."""
    words = _Words(tokenizer)
    bad, stop = (words.packed(inputs.get(name), len(prompts)) for name in ("BAD_WORDS_DICT", "STOP_WORDS_DICT"))
    lengths = np.array([[len(prompt)] for prompt in prompts], np.uint32)
    ids = np.zeros((len(prompts), int(lengths.max())), np.uint32)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    return [
        Tensor.of("INPUT_ID", "UINT32", ids),
        Tensor.of("REQUEST_INPUT_LEN", "UINT32", lengths),
        Tensor.of("BAD_WORDS_IDS", "INT32", bad),
        Tensor.of("STOP_WORDS_IDS", "INT32", stop),
        Tensor.of("REQUEST_OUTPUT_LEN", "UINT32", inputs["REQUEST_OUTPUT_LEN"].data),
    ]


class Postprocessing(_Processing):
    """Tokens to text."""

    async def execute(self, work: Work) -> AsyncGenerator[InferResponse, None]:
        """One response."""
        work.known_parameters()
        tokenizer, tokens = self.tokenizer(), work.inputs["TOKENS_BATCH"].data
        lengths = _lengths(work, tokens)
        work.clock.prepare()
        if tokens.shape[2] > MAX_DECODED:
            raise invalid(f"input 'TOKENS_BATCH' has {tokens.shape[2]} tokens an item, the limit is {MAX_DECODED}")

        def decode() -> NDArray[Any]:
            texts = np.empty(tokens.shape[:2], dtype=object)
            for item, beam in np.ndindex(texts.shape):
                texts[item, beam] = tokenizer.decode(tokens[item, beam, : lengths[item, beam]].tolist()).encode()
            return texts

        texts = decode() if tokens.size <= FEW_DECODED else await self._run(decode)
        yield work.response([Tensor.of("OUTPUT", "BYTES", texts)], final=True)


def _lengths(work: Work, tokens: NDArray[Any]) -> NDArray[Any]:
    given = work.inputs.get("SEQUENCE_LENGTH")
    if given is None:
        return np.full(tokens.shape[:2], tokens.shape[2])
    if given.shape != tokens.shape[:2]:
        raise invalid(f"input 'SEQUENCE_LENGTH' has shape {list(given.shape)}, not {list(tokens.shape[:2])}")
    return given.data


def _texts(tensor: Tensor) -> list[list[str]]:
    """The texts of each item; ServiceError where they are not UTF-8."""
    rows = []
    for index, row in enumerate(tensor.data.reshape(tensor.shape[0], -1).tolist()):
        try:
            rows.append([text.decode() for text in row])
        except UnicodeDecodeError as error:
            raise invalid(f"item {index} of the batch: input '{tensor.name}' is not UTF-8: {error}") from None
    return rows


def _only(texts: list[str], index: int) -> str:
    if len(texts) != 1:
        raise invalid(f"item {index} of the batch: input 'QUERY' has {len(texts)} texts, but an item has one")
    return texts[0]


class _Words:
    """Words of one request as runs of tokens; each distinct word is tokenized once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._runs: dict[str, list[list[int]]] = {}

    def packed(self, tensor: Tensor | None, batch_size: int) -> NDArray[np.int32]:
        """Each item's words, in the two rows that the token model reads."""
        items = [[] for _ in range(batch_size)] if tensor is None else _read_words(tensor)
        return pack_words([[run for word in words for run in self._word(word)] for words in items])

    def _word(self, word: str) -> list[list[int]]:
        if word not in self._runs:
            if len(self._runs) == _MAX_DISTINCT_WORDS:
                raise invalid(f"the request has more than {_MAX_DISTINCT_WORDS} distinct words, which is the limit")
            self._runs[word] = self._tokenizer.words_ids(word)
        return self._runs[word]


def _read_words(tensor: Tensor) -> list[list[str]]:
    """Each item's words; bounded by their characters before they are taken apart."""
    rows = []
    for index, texts in enumerate(_texts(tensor)):
        size = sum(map(len, texts))
        where = f"item {index} of the batch: "
        if size > _MAX_CSV_CHARACTERS:
            raise invalid(f"{where}input '{tensor.name}' has {size} characters, the limit is {_MAX_CSV_CHARACTERS}")
        try:
            words = [word for row in csv.reader(texts) for word in row if word]
            check_words(f"input '{tensor.name}'", words)
        except csv.Error as error:
            raise invalid(f"{where}input '{tensor.name}' is not CSV: {error}") from None
        except InvalidRequestError as error:
            raise invalid(f"{where}{error}") from None
        rows.append(words)
    return rows
