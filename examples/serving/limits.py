"""Bodies of bounded size: a request that is too large is refused before it is in memory."""

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from examples.serving.errors import ServiceError

BODY_BYTES = 2**20
"""The largest body that has no file in it."""


class BodyLimit:
    """Middleware that refuses bodies of more than `BODY_BYTES`, by what the headers say and while they arrive."""

    def __init__(self, app: ASGIApp, elsewhere: str) -> None:
        """
        Args:
            app: the service.
            elsewhere: the path whose route has a limit of its own.
        """
        self._app = app
        self._elsewhere = elsewhere

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on to the service, or answer with 413."""
        if scope["type"] != "http" or scope["path"] == self._elsewhere:
            await self._app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "")
        if announced.isdecimal() and int(announced) > BODY_BYTES:
            await _too_large().response()(scope, receive, send)
            return
        arrived = 0

        async def bounded() -> Message:
            nonlocal arrived
            message = await receive()
            arrived += len(message.get("body", b""))
            if arrived > BODY_BYTES:
                raise _too_large()
            return message

        await self._app(scope, bounded, send)


def _too_large() -> ServiceError:
    return ServiceError(413, f"the body is too large, expected at most {BODY_BYTES / 2**20:g} MiB", code="too_large")
