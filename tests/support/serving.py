"""What tests of `examples/serving` share: a folder of adapters, and a studio of one engine, without Ray."""

import asyncio
import shutil
import socket
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffadapt import AdapterError
from examples.serving.engine import Engine, Request

if TYPE_CHECKING:
    from examples.serving.api import Model, Painted

TINY = Path(__file__).parents[2] / "examples" / "tiny_pipeline"


def folder_of_adapters(parent: Path) -> Path:
    """A copy of the adapters of the embedded pipeline."""
    return Path(shutil.copytree(TINY / "adapters", parent / "adapters"))


class OneEngine:
    """The studio of `api.py` on one engine, which draws requests one by one.

    Attributes:
        painted: the requests that it was asked for.
        failure: what it raises instead of drawing, such as an error about a full queue.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.painted: list[Request] = []
        self.failure: Exception | None = None

    async def model(self) -> "Model":
        from examples.serving.api import Model  # Needs the extra `serve`.

        return Model("tiny", self.engine.native_size, self.engine.multiple, self.engine.slots)

    async def check(self) -> dict[str, int]:
        return {"RUNNING": 1}

    async def paint(self, request: Request) -> "Painted | AdapterError":
        from examples.serving.api import Painted

        self.painted.append(request)
        if self.failure is not None:
            raise self.failure
        (result,) = await asyncio.to_thread(self.engine.draw, [request])
        if isinstance(result, Exception) and not isinstance(result, AdapterError):
            raise result
        return result if isinstance(result, AdapterError) else Painted(result, "here", True)

    async def try_on(self, file: Path) -> str | None:
        try:
            await asyncio.to_thread(self.engine.try_on, file)
        except AdapterError as error:
            return str(error)
        return None

    async def metrics(self) -> str:
        return "pictures 0\n"


def free_port() -> int:
    """A port that nothing listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def served(app: Any) -> Generator[str, None, None]:
    """Serve an application on the loopback interface; yield its address."""
    import uvicorn  # Comes with the extra `serve`.

    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(timeout=30)
