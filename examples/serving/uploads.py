"""Take an uploaded adapter: bounded, never unpickled, checked before it appears, and never in the place of another."""

import os
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import Request
from starlette.datastructures import UploadFile

from diffadapt import AdapterError
from examples.serving.adapters import SUFFIX, AdapterFolder, NameTaken, check_name
from examples.serving.errors import ServiceError

_FORM_BYTES = 64 * 2**10
"""What a form may have besides the file: boundaries and the name."""
_CHUNK = 2**20
_EXPECTED = "file: a multipart form with a file expected, as `curl -F file=@NAME.safetensors` sends it"
_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
"""How files of `torch.save` start: a zip archive, or a bare pickle."""


async def take(
    request: Request, folder: AdapterFolder, most_bytes: int, try_on: Callable[[Path], Awaitable[str | None]]
) -> str:
    """Put the file of a multipart form into the folder; return the adapter's name.

    Args:
        request: the request with the form: `file`, and `name`, which defaults to the file's name without its suffix.
        folder: the folder.
        most_bytes: the largest file that is taken.
        try_on: returns why an adapter cannot be used with the model, or `None` if it can.

    Raises:
        ServiceError: the file is too large, is no safetensors file, does not fit the model, or its name is taken.
            Nothing is kept of it.
    """
    _refuse_length(request, most_bytes + _FORM_BYTES)
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise ServiceError(422, _EXPECTED, param="file", code="missing_file")
    async with request.form(max_files=1, max_fields=1) as form:
        upload, given = form.get("file"), form.get("name")
        if not isinstance(upload, UploadFile):
            raise ServiceError(422, _EXPECTED, param="file", code="missing_file")
        if (upload.size or 0) > most_bytes:
            raise _too_large(most_bytes)
        shown = Path(upload.filename or "").name
        name = given if isinstance(given, str) else shown.removesuffix(SUFFIX)
        await _refuse_pickle(upload, shown)
        _refuse_name(folder, name)
        with tempfile.TemporaryDirectory(prefix=".upload-", dir=folder.folder) as private:
            file = Path(private) / f"upload{SUFFIX}"
            with file.open("wb") as copy:
                while chunk := await upload.read(_CHUNK):
                    copy.write(chunk)
                copy.flush()
                os.fsync(copy.fileno())
            reason = await try_on(file)
            if reason is not None:
                raise ServiceError(422, reason.replace(str(file), shown or name), param="file", code="unusable_adapter")
            try:
                folder.publish(file, name)
            except NameTaken as error:
                raise ServiceError(409, str(error), param="name", code="name_taken") from None
    return name


def _refuse_length(request: Request, most_bytes: int) -> None:
    """Raise `ServiceError` unless the body says that it is short enough. The server holds it to what it says."""
    length = request.headers.get("content-length", "")
    if not length.isdecimal():
        raise ServiceError(411, "a Content-Length is required", code="length_required")
    if int(length) > most_bytes:
        raise _too_large(most_bytes - _FORM_BYTES)


def _too_large(most_bytes: int) -> ServiceError:
    return ServiceError(
        413, f"file: too large, expected at most {most_bytes / 2**20:g} MiB", param="file", code="file_too_large"
    )


async def _refuse_pickle(upload: UploadFile, shown: str) -> None:
    """Raise `ServiceError` if a file is a pickle or has another suffix than safetensors. A pickle is never opened."""
    start = await upload.read(4)
    await upload.seek(0)
    if start.startswith(_PICKLES) or not shown.endswith(SUFFIX):
        raise ServiceError(
            422,
            f"file: {shown or 'the file'} is no safetensors file. Pickles (.pt, .bin, .ckpt) are not taken, because "
            "reading one can run a program; `diffadapt.read_pickle` reads those that you trust",
            param="file",
            code="no_safetensors",
        )


def _refuse_name(folder: AdapterFolder, name: str) -> None:
    """Raise `ServiceError` if an adapter cannot have this name."""
    try:
        check_name(name)
    except AdapterError as error:
        raise ServiceError(422, f"name: {error}", param="name", code="invalid_name") from None
    if name in folder.names():
        raise ServiceError(
            409, f"an adapter {name!r} exists; delete it first, or choose another name", param="name", code="name_taken"
        )
