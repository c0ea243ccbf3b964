"""Errors as the OpenAI API words them: `{"error": {"message", "type", "param", "code"}}`, which its clients show."""

from collections.abc import Mapping
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from diffadapt import AdapterError

_TYPES = {404: "not_found_error", 429: "rate_limit_error"}


_LONGEST = 500
"""The most characters of an unexpected error that a client gets to see."""


class ServiceError(HTTPException):
    """An error that the client gets to see.

    Attributes:
        status_code: HTTP status.
        detail: what was expected, what was found, and what to do.
        param: the field of the request that is wrong.
        code: a word for programs.
        headers: further headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.param = param
        self.code = code

    def response(self) -> JSONResponse:
        """Return the response with this error as its body."""
        kind = _TYPES.get(self.status_code, "server_error" if self.status_code >= 500 else "invalid_request_error")
        error = {"message": self.detail, "type": kind, "param": self.param, "code": self.code}
        return JSONResponse({"error": error}, self.status_code, self.headers)


async def respond(request: Request, error: Exception) -> JSONResponse:
    """Return the response to any error that a route raises."""
    if isinstance(error, ServiceError):
        return error.response()
    if isinstance(error, AdapterError):
        return ServiceError(422, str(error), code="unusable_adapter").response()
    if isinstance(error, RequestValidationError):
        return _invalid_field(error.errors()[0]).response()
    if isinstance(error, HTTPException):
        return ServiceError(error.status_code, f"{request.method} {request.url.path}: {error.detail}").response()
    # The log has the traceback.
    (first, *_) = str(error).splitlines() or [""]
    return ServiceError(500, f"{type(error).__name__}: {first}"[:_LONGEST], code="internal_error").response()


def _invalid_field(problem: Mapping[str, Any]) -> ServiceError:
    """Return the error for the first field that pydantic refuses."""
    path = [str(part) for part in problem["loc"] if part != "body"]
    if problem["type"] == "json_invalid":
        return ServiceError(422, f"the body is no JSON: {problem['ctx']['error']}", code="invalid_json")
    field = getattr(problem.get("ctx", {}).get("error"), "field", path[0] if path else None)
    message = problem["msg"].removeprefix("Value error, ")
    if not path and field is None:
        message = "a JSON object expected, with the header Content-Type: application/json"
    return ServiceError(422, f"{'.'.join(path) or 'body'}: {message}", param=field, code="invalid_value")
