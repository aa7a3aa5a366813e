"""A server of OpenAI's API and the page over real engines, in a thread with an event loop of its own."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests.server.loop_thread import LoopThread
from tritonclient.grpc import model_config_pb2

from hasten.core.config import EngineConfig
from hasten.server.create import model_configs
from hasten.server.engine.client import EngineClient
from hasten.server.engine.queue import QueueLimits
from hasten.server.listeners import HttpListener
from hasten.server.openai.prompts import ChatPrompts
from hasten.server.openai.routes import openai_routes
from hasten.server.page.routes import page_routes
from hasten.server.protocol.http import http_app
from hasten.server.repository import MemoryRepository
from hasten.server.security import Admission, ApiKeys
from hasten.server.service import Service

DEMO = Path(__file__).parents[2] / "examples" / "demo-model"
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def with_template(folder: Path, template: str = TEMPLATE) -> Path:
    """A copy of the demo model whose tokenizer has a chat template."""
    path = folder / "chat-model"
    shutil.copytree(DEMO, path)
    file = path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": template}))
    return path


def models(
    folder: Path, token_name: str, text_name: str | None = None, limits: QueueLimits | None = None, **options: Any
) -> list[model_config_pb2.ModelConfig]:
    """A token model over a checkpoint, and its text model if that has a name."""
    config = EngineConfig.create(str(folder), **options)
    result = model_configs(config, token_name=token_name, text_name=text_name or "unused", limits=limits)
    return [each for each in result if each.name in (token_name, text_name)]


class Site:
    """A service over some models, and the server of its API; `configs` describe the models."""

    def __init__(
        self,
        configs: Iterable[model_config_pb2.ModelConfig],
        keys: ApiKeys | None = None,
        *,
        with_metrics: bool = False,
    ) -> None:
        self._with_metrics = with_metrics
        self._keys = keys
        self._thread = LoopThread()
        try:
            self.service, self.url = self._thread.run(self._start(list(configs)))
        except BaseException:
            self._thread.close()
            raise

    async def _start(self, configs: list[model_config_pb2.ModelConfig]) -> tuple[Service, str]:
        service = Service(MemoryRepository(configs))
        await service.start()
        prompts = ChatPrompts()
        app = http_app(
            [*openai_routes(service, prompts, with_metrics=self._with_metrics), *page_routes(service, prompts)],
            Admission(keys=self._keys, open_paths=frozenset({"/"})),
            1 << 22,
        )
        self._listener = HttpListener("127.0.0.1", 0, "--http-port")
        await self._listener.start(app)
        return service, f"http://127.0.0.1:{self._listener.port}"

    def engine(self, name: str) -> EngineClient:
        return self.service.engines()[name, "1"]

    def generated(self, name: str) -> int:
        """Tokens that an engine has computed so far."""
        return self.engine(name).stats().generation_tokens

    def idle(self, name: str) -> bool:
        """Whether an engine computes nothing and holds no blocks."""
        stats = self.engine(name).stats()
        return (stats.running, stats.waiting, stats.used_blocks) == (0, 0, 0)

    def read_pending(self) -> None:
        """Let the loop read what engines have sent: what has come is read before a time that has passed counts."""
        self._thread.run(asyncio.sleep(0.05))

    async def _stop(self) -> None:
        await self._listener.stop(0)
        await self.service.close(0)

    def close(self) -> None:
        try:
            self._thread.run(self._stop())
        finally:
            self._thread.close()
