"""The service on Ray Serve: replicas that draw, and a front that speaks HTTP.

    client ── Front (api.py) ── Ray's router ── Painter, any number of replicas (engine.py)

Ray starts, places, restarts, scales and routes. A request goes to a replica that had its first adapter lately, if one
is free (`serve.multiplexed`), and requests that wait together are drawn together (`serve.batch`).
"""

import asyncio
import contextvars
import importlib
import ipaddress
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from fastapi import FastAPI
from PIL import Image
from pydantic import BaseModel, ConfigDict
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from ray.util import metrics

from diffadapt import AdapterError
from examples.serving.adapters import AdapterFolder
from examples.serving.api import Model, Painted, create_app
from examples.serving.engine import Abandoned, Engine, Request
from examples.serving.errors import ServiceError


class Settings(BaseModel):
    """The arguments of the application, in `cluster.yaml` under `args`.

    Attributes:
        pipeline: path or hub id of the pipeline.
        adapters: folder of the adapters, which all machines share.
        slots: how many different adapters a batch may have.
        samples: how many pictures a replica draws at once.
        pool_bytes: bytes of adapters that a replica keeps in memory.
        upload_bytes: size of the largest adapter that can be uploaded.
        compiled: whether to compile the denoiser, or the backend of `torch.compile` to do it with.
        timeout_s: seconds after which a request that is not answered is given up.
        replicas: number of replicas; `deployments` in the YAML file may say something else, also `autoscaling_config`.
    """

    model_config = ConfigDict(extra="forbid")

    pipeline: str
    adapters: str
    slots: int = 8
    samples: int = 8
    pool_bytes: int = 2**30
    upload_bytes: int = 2**28
    compiled: bool | str = False
    timeout_s: float = 300.0
    replicas: int = 1


def build(settings: Settings) -> serve.Application:
    """Return the application, as `serve run` and `serve deploy` want it."""

    def app() -> FastAPI:
        _stay_on_loopback()
        handle = serve.get_deployment_handle("Painter", app_name=serve.get_replica_context().app_name)
        folder = AdapterFolder(settings.adapters)
        return create_app(Replicas(handle, settings), folder, upload_bytes=settings.upload_bytes)

    deployment: Any = serve.deployment
    front = deployment(
        serve.ingress(app)(),
        name="Front",
        # It only waits, for as many requests as the replicas have queued.
        max_ongoing_requests=10_000,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=5,
        graceful_shutdown_wait_loop_s=0.1,
    )
    # Twice as many as are drawn at once: while one batch is drawn, the adapters of the next are read.
    painter = Painter.options(num_replicas=settings.replicas, max_ongoing_requests=2 * settings.samples)
    return front.bind(painter.bind(settings))


@serve.deployment(
    name="Painter",
    max_queued_requests=256,
    graceful_shutdown_timeout_s=5,
    graceful_shutdown_wait_loop_s=0.1,
    health_check_period_s=5,
    health_check_timeout_s=30,
)
class Painter:
    """A replica: one engine, and the thread that draws with it."""

    def __init__(self, settings: Settings) -> None:
        _stay_on_loopback()
        self.settings = settings
        self.id = serve.get_replica_context().replica_id.unique_id
        self.engine = Engine(
            settings.pipeline,
            settings.adapters,
            slots=settings.slots,
            samples=settings.samples,
            pool_bytes=settings.pool_bytes,
            compiled=settings.compiled,
        )
        if settings.compiled:
            self.engine.warm_up()
        # Notes that this replica has an adapter, for the router. The engine's pool decides what is in memory, and the
        # note is as short as the pool, so that requests come where the adapter still is.
        self._hold = serve.multiplexed(max_num_models_per_replica=self.engine.capacity())(_noted)
        self._drawing = ThreadPoolExecutor(1, thread_name_prefix="painter")
        self._idle = asyncio.Event()
        self._idle.set()
        self._batched.set_max_batch_size(settings.samples)
        self._pictures = metrics.Counter("diffadapt_pictures", "Requests by outcome.", ("outcome",))
        self._rows = metrics.Histogram("diffadapt_batch_rows", "Requests per batch.", [1, 2, 4, 8, 16, 32])
        self._seconds = metrics.Histogram("diffadapt_batch_seconds", "Seconds per batch.", [0.1, 0.3, 1, 3, 10, 30])
        self._adapters = metrics.Counter("diffadapt_adapters", "Adapters of requests by where they were.", ("where",))
        self._pool = metrics.Gauge("diffadapt_pool_bytes", "Bytes of adapters in memory.")

    async def model(self) -> Model:
        """Return what is drawn with."""
        name = Path(self.settings.pipeline).name
        return Model(name, self.engine.native_size, self.engine.multiple, self.engine.slots)

    async def paint(self, request: Request) -> Painted | AdapterError:
        """Return the picture of a request, or why it cannot be drawn."""
        model_id = serve.get_multiplexed_model_id()
        if model_id:
            await self._hold(model_id)
        ready = set(self.engine.pool.ready)
        for adapter in request.adapters:
            self._adapters.inc(tags={"where": "memory" if adapter in ready else "disk"})
        await asyncio.to_thread(self.engine.prefetch, request.adapters)
        # Ray makes a batch as soon as requests arrive, also if it has to wait for the one before. A batch that is made
        # when its turn has come is larger.
        await self._idle.wait()
        # Ray divides batches by the adapter that requests were routed by, since it takes it for a model that has to be
        # drawn with alone. Here adapters share a batch, so a request enters it in a context without that name.
        waiting = _Waiting(request)
        task = contextvars.Context().run(asyncio.ensure_future, self._batched(waiting))
        try:
            result = await task
        finally:
            waiting.is_wanted = False
            task.cancel()
        if isinstance(result, AdapterError):
            return result
        if isinstance(result, Exception):
            raise result
        return Painted(result, self.id, ready.issuperset(request.adapters))

    async def try_on(self, file: str) -> str | None:
        """Return why an adapter cannot be used with the model, or `None` if it can."""
        try:
            await asyncio.to_thread(self.engine.try_on, Path(file))
        except AdapterError as error:
            return str(error)
        return None

    @serve.batch(batch_wait_timeout_s=0.02)
    async def _batched(self, waiting: list["_Waiting"]) -> list[Image.Image | Exception]:
        """Draw requests that wait together."""
        started = time.monotonic()
        self._idle.clear()
        requests = [one.request for one in waiting]
        draw = asyncio.get_running_loop().run_in_executor(
            self._drawing, self.engine.draw, requests, lambda: any(one.is_wanted for one in waiting)
        )
        try:
            results = await draw
        finally:
            self._idle.set()
        self._rows.observe(len(requests))
        self._seconds.observe(time.monotonic() - started)
        self._pool.set(self.engine.pool.bytes)
        for result in results:
            self._pictures.inc(tags={"outcome": _outcome(result)})
        return results


@dataclass
class _Waiting:
    """A request that waits for its picture, as long as somebody waits for the answer."""

    request: Request
    is_wanted: bool = True


async def _noted(name: str) -> str:
    return name


def _outcome(result: Image.Image | Exception) -> str:
    """Return what became of a request, for the metrics."""
    if isinstance(result, Abandoned):
        return "abandoned"
    return "refused" if isinstance(result, Exception) else "drawn"


def _stay_on_loopback() -> None:
    """Bind the port of this replica to the loopback address, if that is how Ray knows this machine.

    Ray Serve lets deployments call each other by gRPC and opens a port for that on all interfaces of the machine. It
    has no option for the address.
    """
    address = ray.util.get_node_ip_address()
    if not ipaddress.ip_address(address).is_loopback:
        return
    server: Any = importlib.import_module("grpc.aio._server").Server
    add_port = server.add_insecure_port
    server.add_insecure_port = lambda self, at: add_port(self, at.replace("[::]", address))


class Replicas:
    """The studio of `api.py`: the replicas, behind Ray's router."""

    def __init__(self, painter: DeploymentHandle[Any], settings: Settings) -> None:
        self._painter = painter
        self._settings = settings
        self._model: Model | None = None

    async def model(self) -> Model:
        """Return what is drawn with."""
        model = self._model or await self._ask("model")
        self._model = model
        return model

    async def check(self) -> dict[str, int]:
        """Return the number of replicas by state; raise `ServiceError` if none runs."""
        status = await asyncio.to_thread(serve.status)
        app = status.applications[serve.get_replica_context().app_name]
        states = {str(state): count for state, count in app.deployments["Painter"].replica_states.items()}
        if not states.get("RUNNING"):
            raise ServiceError(503, f"no replica is running: {states}", code="unavailable")
        return states

    async def paint(self, request: Request) -> Painted | AdapterError:
        """Return the picture of a request, or why it cannot be drawn."""
        return await self._ask("paint", request, routed_by=next(iter(request.adapters), ""))

    async def try_on(self, file: Path) -> str | None:
        """Return why an adapter cannot be used with the model, or `None` if it can."""
        return await self._ask("try_on", str(file))

    async def metrics(self) -> str:
        """Return the metrics that Ray exports on this machine."""
        node_id = ray.get_runtime_context().get_node_id()
        port = next((node["MetricsExportPort"] for node in ray.nodes() if node["NodeID"] == node_id), 0)
        try:
            return await asyncio.to_thread(_fetch, f"http://{ray.util.get_node_ip_address()}:{port}/metrics")
        except OSError as error:
            raise ServiceError(503, f"Ray's exporter does not answer: {error}", code="no_metrics") from None

    async def _ask(self, method: str, *arguments: Any, routed_by: str = "") -> Any:
        """Call a replica; if it dies, another one, once.

        Raises:
            ServiceError: the queue is full, no replica answers in time, or two of them died.
        """
        handle = getattr(self._painter.options(multiplexed_model_id=routed_by), method)
        deadline = asyncio.get_running_loop().time() + self._settings.timeout_s
        for is_last in (False, True):
            left = deadline - asyncio.get_running_loop().time()
            try:
                return await asyncio.wait_for(_answer(handle, arguments), left)
            except RayTaskError as error:
                # Its own text has the traceback in it, which is in the log of the replica.
                raise error.cause from None
            except RayActorError:
                if is_last:
                    raise ServiceError(503, "two replicas died at this request", code="replica_died") from None
            except BackPressureError:
                wait = {"Retry-After": "2"}
                raise ServiceError(503, "too many requests wait", code="overloaded", headers=wait) from None
            except DeploymentUnavailableError as error:
                raise ServiceError(503, str(error), code="unavailable") from None
            except asyncio.TimeoutError:
                message = f"not answered within {self._settings.timeout_s:g} seconds"
                raise ServiceError(504, message, code="timeout") from None
        raise AssertionError


async def _answer(handle: Any, arguments: tuple[Any, ...]) -> Any:
    """Return what a replica answers. If nobody waits for it any more, the replica is told so."""
    response = handle.remote(*arguments)
    try:
        return await response
    except asyncio.CancelledError:
        response.cancel()
        raise


def _fetch(url: str) -> str:
    with urllib.request.urlopen(url, timeout=5) as response:
        return response.read().decode()
