"""The HTTP service: pictures as in the OpenAI API, the adapters of the folder, and the web page.

It knows a `Studio` that draws, and nothing of Ray: `deployment.py` brings a studio of replicas, the tests one engine.
"""

import asyncio
import base64
import io
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, HTMLResponse, PlainTextResponse
from PIL import Image
from starlette.exceptions import HTTPException

from diffadapt import AdapterError
from examples.serving import uploads
from examples.serving.adapters import AdapterFolder, UnknownAdapter
from examples.serving.cards import card
from examples.serving.engine import Request
from examples.serving.errors import ServiceError, respond
from examples.serving.image_fields import FieldError, ImageFields
from examples.serving.limits import BodyLimit
from examples.serving.links import PictureLinks

PAGE = Path(__file__).with_name("page.html")


@dataclass(frozen=True)
class Model:
    """What clients have to know of the pipeline.

    Attributes:
        name: id of the model.
        native_size: width and height that it was trained with, in pixels.
        multiple: what width and height have to be multiples of.
        slots: how many adapters a request may mix.
    """

    name: str
    native_size: tuple[int, int]
    multiple: int
    slots: int


@dataclass(frozen=True)
class Painted:
    """A picture, and how it was drawn.

    Attributes:
        picture: the picture.
        replica: id of the replica that drew it.
        in_memory: whether the replica had all adapters of the request in memory when the request came.
    """

    picture: Image.Image
    replica: str
    in_memory: bool


class Studio(Protocol):
    """Where pictures are drawn.

    Its methods raise `ServiceError` if the answer is none of the request's fault, such as a full queue.
    """

    async def model(self) -> Model:
        """Return what is drawn with."""
        ...

    async def check(self) -> dict[str, int]:
        """Return the number of replicas by state; raise `ServiceError` if none runs."""
        ...

    async def paint(self, request: Request) -> Painted | AdapterError:
        """Return the picture of a request, or why it cannot be drawn."""
        ...

    async def try_on(self, file: Path) -> str | None:
        """Return why an adapter cannot be used with the model, or `None` if it can."""
        ...

    async def metrics(self) -> str:
        """Return all metrics in the text format of Prometheus."""
        ...


def create_app(studio: Studio, folder: AdapterFolder, *, upload_bytes: int = 2**28) -> FastAPI:
    """Return the service.

    Args:
        studio: draws the pictures.
        folder: the adapters that it draws with.
        upload_bytes: size of the largest adapter that can be uploaded.
    """
    app = FastAPI(title="diffadapt", docs_url=None, redoc_url=None)
    for kind in (ServiceError, AdapterError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, respond)
    app.add_middleware(BodyLimit, elsewhere="/v1/adapters")
    links = PictureLinks(folder.folder / ".pictures")

    @app.post("/v1/images/generations")
    async def generate(fields: ImageFields, http: HttpRequest) -> dict[str, Any]:
        model = await studio.model()
        requests = _requests(fields, folder, model)
        painted = await _while_connected(http, _paint_all(studio, folder, requests))
        kind = fields.output_format or "png"
        encode = _encoder(kind, fields.output_compression)

        def shown(picture: Image.Image) -> dict[str, str]:
            content = encode(picture)
            if fields.response_format == "url":
                return {"url": str(http.url_for("picture", name=links.keep(content, kind)))}
            return {"b64_json": base64.b64encode(content).decode()}

        width, height = painted[0].picture.size
        return {
            "created": int(time.time()),
            "model": model.name,
            "output_format": kind,
            "size": f"{width}x{height}",
            "data": [
                {
                    **shown(drawn.picture),
                    "revised_prompt": request.prompt,
                    "seed": request.seed,
                    "replica": drawn.replica,
                    "in_memory": drawn.in_memory,
                }
                for drawn, request in zip(painted, requests, strict=True)
            ],
        }

    @app.get("/v1/pictures/{name}")
    async def picture(name: str) -> FileResponse:
        file = links.find(name)
        if file is None:
            raise ServiceError(404, "no such picture; links are valid for an hour", code="picture_not_found")
        return FileResponse(file)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        model = await studio.model()
        found = {"id": model.name, "object": "model", "created": 0, "owned_by": "diffadapt"}
        return {"object": "list", "data": [found]}

    @app.get("/v1/adapters")
    async def adapters() -> dict[str, Any]:
        return {"object": "list", "data": await asyncio.to_thread(_cards, folder)}

    @app.get("/v1/adapters/{name}")
    async def adapter(name: str) -> dict[str, Any]:
        try:
            return await asyncio.to_thread(card, folder, name)
        except UnknownAdapter as error:
            _refuse_unknown(error, "name")
        except AdapterError as error:
            raise _unusable(error, folder, "name") from None

    @app.post("/v1/adapters", status_code=201)
    async def upload(http: HttpRequest) -> dict[str, Any]:
        name = await uploads.take(http, folder, upload_bytes, studio.try_on)
        return await asyncio.to_thread(card, folder, name)

    @app.delete("/v1/adapters/{name}")
    async def delete(name: str) -> dict[str, Any]:
        try:
            folder.remove(name)
        except UnknownAdapter as error:
            _refuse_unknown(error, "name")
        return {"id": name, "object": "adapter", "deleted": True}

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "replicas": await studio.check(), "adapters": len(folder.names())}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> str:
        return await studio.metrics()

    @app.get("/", response_class=HTMLResponse)
    async def page() -> str:
        return PAGE.read_text(encoding="utf-8")

    return app


def _requests(fields: ImageFields, folder: AdapterFolder, model: Model) -> list[Request]:
    """Return one request per picture, all of which can be drawn as far as the fields and the folder tell.

    Raises:
        ServiceError: 404 for an unknown adapter, 422 for a field.
    """
    try:
        requests = fields.requests(model.native_size, model.multiple)
    except FieldError as error:
        raise ServiceError(422, str(error), param=error.field, code="invalid_value") from None
    names = list(requests[0].adapters)
    for name in names:
        try:
            folder.path(name)
        except UnknownAdapter as error:
            _refuse_unknown(error, "adapters" if name in fields.adapters else "prompt")
    if len(names) > model.slots:
        raise ServiceError(
            422, f"adapters: {len(names)} adapters, but at most {model.slots} can be mixed", param="adapters"
        )
    if fields.model in folder.names():
        message = f'model: {fields.model!r} is an adapter; ask for it by adapters, as {{"{fields.model}": 1.0}}'
        raise ServiceError(422, message, param="model", code="invalid_value")
    return requests


async def _paint_all(studio: Studio, folder: AdapterFolder, requests: Sequence[Request]) -> list[Painted]:
    """Return the pictures of all requests; if one fails, the others are given up.

    Raises:
        ServiceError: a request cannot be drawn.
    """
    tasks = [asyncio.ensure_future(studio.paint(request)) for request in requests]
    try:
        painted: list[Painted] = []
        for result in await asyncio.gather(*tasks):
            if isinstance(result, UnknownAdapter):
                _refuse_unknown(result, "adapters")
            if isinstance(result, AdapterError):
                raise _unusable(result, folder, "adapters")
            painted.append(result)
        return painted
    finally:
        for task in tasks:
            task.cancel()


async def _while_connected(http: HttpRequest, painting: Awaitable[list[Painted]]) -> list[Painted]:
    """Return the pictures; give up if the client leaves, so that nobody waits behind what nobody wants."""
    task = asyncio.ensure_future(painting)
    leaving = asyncio.ensure_future(_left(http))
    try:
        await asyncio.wait([task, leaving], return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ServiceError(499, "the client has left", code="client_left")
        return task.result()
    finally:
        task.cancel()
        leaving.cancel()


async def _left(http: HttpRequest) -> None:
    """Wait until the client closes the connection."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


def _refuse_unknown(error: UnknownAdapter, field: str) -> NoReturn:
    raise ServiceError(404, str(error), param=field, code="adapter_not_found") from None


def _unusable(error: AdapterError, folder: AdapterFolder, field: str) -> ServiceError:
    return ServiceError(422, folder.without_paths(str(error)), param=field, code="unusable_adapter")


def _cards(folder: AdapterFolder) -> list[dict[str, Any]]:
    """Return the cards of all adapters; a file that cannot be read says why."""
    cards: list[dict[str, Any]] = []
    for name in folder.names():
        try:
            cards.append(card(folder, name))
        except UnknownAdapter:
            continue  # It was deleted just now.
        except AdapterError as error:
            cards.append({"id": name, "object": "adapter", "error": folder.without_paths(str(error))})
    return cards


def _encoder(kind: str, compression: int | None) -> Callable[[Image.Image], bytes]:
    """Return the function that encodes pictures, with a quality from 0 to 100 unless they are PNGs."""
    quality = {} if kind == "png" or compression is None else {"quality": compression}

    def encode(picture: Image.Image) -> bytes:
        buffer = io.BytesIO()
        picture.save(buffer, kind, **quality)
        return buffer.getvalue()

    return encode
