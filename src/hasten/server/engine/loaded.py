"""What the engines of one model have loaded: what they are, and the tokenizer of their texts."""

import asyncio
from collections.abc import Hashable
from pathlib import Path

from hasten.core.config import EngineConfig
from hasten.engine.text import Tokenizer
from hasten.server.engine.wire import EngineInfo


class LoadedModel:
    """See above. Nothing is known until the first engine is there; `foresee` begins to load the tokenizer before."""

    def __init__(self, config: EngineConfig) -> None:
        self.info: EngineInfo
        """What its engines are, which are alike: the cache's blocks are those of all."""
        self.tokenizer: Tokenizer | None = None
        self.started = False
        """Whether all engines have been there: from then on each that comes is a new process of an old one."""
        self._config = config
        self._foreseen: tuple[str, asyncio.Task[Tokenizer]] | None = None
        """A folder and the tokenizer in it, which is being loaded."""
        self._taking = asyncio.Lock()
        self._infos: dict[Hashable, EngineInfo] = {}

    @property
    def foreseen(self) -> str | None:
        """Folder of a tokenizer that is being loaded, or was and is not used yet."""
        return None if self._foreseen is None else self._foreseen[0]

    def foresee(self) -> None:
        """Begin to load the tokenizer of the model's folder, while the engines load the model."""
        folder = self._config.tokenizer or self._config.model
        if Path(folder, "tokenizer.json").is_file():
            loading = asyncio.create_task(asyncio.to_thread(_tokenizer, folder))
            loading.add_done_callback(lambda done: done.cancelled() or done.exception())  # whoever needs it asks
            self._foreseen = (folder, loading)

    async def take(self, engine: Hashable, info: EngineInfo) -> None:
        """Take in what an engine is; load the tokenizer, once at the start and anew for each new process."""
        async with self._taking:
            if info.tokenizer_folder is not None and (self.started or self.tokenizer is None):
                self.tokenizer = await self._load_tokenizer(info.tokenizer_folder)
        self._infos[engine] = info
        self.info = EngineInfo.of_all(list(self._infos.values()))

    async def _load_tokenizer(self, folder: str) -> Tokenizer:
        """The tokenizer that engines name, which is most often the foreseen one."""
        foreseen, self._foreseen = self._foreseen, None
        if foreseen is not None and foreseen[0] == folder:
            return await foreseen[1]
        return await asyncio.to_thread(_tokenizer, folder)


def _tokenizer(folder: str) -> Tokenizer:
    """A folder's tokenizer, with what the first text would else wait for."""
    tokenizer = Tokenizer.from_folder(folder)
    _ = tokenizer.most_bytes_per_token
    return tokenizer
