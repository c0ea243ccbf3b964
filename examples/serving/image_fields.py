"""The body of `POST /v1/images/generations`: the fields of the OpenAI API and those of this service."""

import difflib
import re
import secrets
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

import diffadapt
from examples.serving.engine import Request
from examples.serving.strengths import read_strength, refuse_large

MOST_PICTURES = 16
MOST_STEPS = 200
MOST_PIXELS = 4
"""How many times as many pixels as the model was trained with a picture may have."""


def _read_adapters(value: Any) -> dict[str, Any]:
    """Return adapter name -> strength."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f'{value!r} is no mapping, expected {{"name": strength}}')
    strengths: dict[str, Any] = {}
    for name, strength in value.items():
        try:
            strengths[name] = read_strength(strength)
        except ValueError as error:
            raise ValueError(f"the strength of {name!r}: {error}") from None
    return strengths


class FieldError(ValueError):
    """A field that is well-formed but cannot be used here.

    Attributes:
        field: the name of the field.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


class ImageFields(BaseModel):
    """The body of a request for pictures.

    Fields that this service does not know are refused, so that a misspelt one is not without effect.
    """

    model_config = ConfigDict(extra="forbid", strict=True, arbitrary_types_allowed=True)

    prompt: str = Field(max_length=32_000)
    adapters: Annotated[dict[str, Any], BeforeValidator(_read_adapters)] = {}
    seed: int | None = Field(None, ge=0, lt=2**63 - MOST_PICTURES)
    n: int | None = Field(1, ge=1, le=MOST_PICTURES)
    size: str | None = "auto"
    num_inference_steps: int | None = Field(None, ge=1, le=MOST_STEPS)
    guidance_scale: float | None = Field(None, ge=0, le=50, allow_inf_nan=False)
    response_format: Literal["b64_json", "url"] | None = "b64_json"
    output_format: Literal["png", "jpeg", "webp"] | None = "png"
    output_compression: int | None = Field(100, ge=0, le=100)

    # Accepted without an effect: there is one model, and what its pictures look like is up to the fields above.
    model: str | None = None
    user: str | None = None
    quality: Literal["auto", "standard", "hd", "low", "medium", "high"] | None = None
    style: Literal["vivid", "natural"] | None = None
    moderation: Literal["auto", "low"] | None = None

    # Accepted only with the value that says what happens here.
    background: Literal["auto", "opaque"] | None = None
    stream: Literal[False] | None = None
    partial_images: Literal[0] | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_fields(cls, fields: Any) -> Any:
        for name in fields if isinstance(fields, dict) else ():
            if name not in cls.model_fields:
                near = difflib.get_close_matches(name, cls.model_fields, n=1)
                raise FieldError(name, "unknown field" + (f"; did you mean {near[0]!r}?" if near else ""))
        return fields

    @field_validator("size")
    @classmethod
    def _check_size(cls, size: str | None) -> str | None:
        if size not in (None, "auto") and not re.fullmatch(r"[1-9]\d{0,4}x[1-9]\d{0,4}", size):
            raise ValueError(f"{size!r} is no size, expected WIDTHxHEIGHT or 'auto'")
        return size

    def requests(self, native_size: tuple[int, int], multiple: int) -> list[Request]:
        """Return one request per picture. Picture i has the seed `seed + i`.

        Args:
            native_size: width and height that the model was trained with.
            multiple: what width and height have to be multiples of.

        Raises:
            FieldError: the pictures are too large, a tag in the prompt cannot be parsed, or an adapter is in a tag and
                in `adapters`.
        """
        prompt, tagged = _parsed(self.prompt)
        for name in tagged:
            if name in self.adapters:
                raise FieldError("adapters", f"{name!r} is in adapters and in a tag of the prompt; name it once")
        size = native_size if self.size in (None, "auto") else _size(self.size, native_size, multiple)
        seed = secrets.randbelow(2**32) if self.seed is None else self.seed
        defaults = Request("")
        return [
            Request(
                prompt,
                {**tagged, **self.adapters},
                seed + index,
                defaults.steps if self.num_inference_steps is None else self.num_inference_steps,
                size,
                defaults.guidance_scale if self.guidance_scale is None else self.guidance_scale,
            )
            for index in range(self.n or 1)
        ]


def _parsed(prompt: str) -> tuple[str, dict[str, Any]]:
    """Return the prompt without adapter tags, and the strengths in them."""
    try:
        text, tagged = diffadapt.parse_prompt(prompt)
        for strength in tagged.values():
            refuse_large(strength)
    except ValueError as error:
        raise FieldError("prompt", str(error)) from None
    return text, dict(tagged)


def _size(size: str, native: tuple[int, int], multiple: int) -> tuple[int, int]:
    """Return width and height."""
    width, height = map(int, size.split("x"))
    most = MOST_PIXELS * native[0] * native[1]
    if width % multiple or height % multiple:
        raise FieldError("size", f"{size} cannot be drawn, width and height have to be multiples of {multiple}")
    if width * height > most:
        best = f"{native[0]}x{native[1]}"
        raise FieldError("size", f"{size} is too large, expected at most {most} pixels; {best} is best")
    return width, height
