"""Prompt tags such as `<lora:name:0.8>`, removed from the prompt and converted to an argument for `activate`.

The syntax is a combination of AUTOMATIC1111/stable-diffusion-webui and KohakuBlueleaf/a1111-sd-webui-lycoris (the
strength of the text encoders, then the strength of the denoiser), cheald/sd-webui-loractl (values at positions) and
hako-mikan/sd-webui-lora-block-weight (block weights, ranges of steps).
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TypeAlias, overload

from diffadapt.errors import AdapterError, naming
from diffadapt.strengths.block_lists import block_weights
from diffadapt.strengths.by_prefix import SharedStrengths, Strength
from diffadapt.strengths.schedules import Axis, Piecewise

Activation: TypeAlias = dict[str, Strength]

_TAG = r"<(?:lora|lyco):([^<>]*)>"
_GAP = re.compile(rf"[\s,]*(?:(?<!\\){_TAG}[\s,]*)+")
_ESCAPED = re.compile(rf"\\({_TAG})")
_RANGE = re.compile(r"([\d.]+)-([\d.]+)")
_TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4")


@overload
def parse_prompt(prompt: str) -> tuple[str, Activation]: ...


@overload
def parse_prompt(prompt: list[str] | tuple[str, ...]) -> tuple[list[str], list[Activation]]: ...


def parse_prompt(
    prompt: str | list[str] | tuple[str, ...],
) -> tuple[str, Activation] | tuple[list[str], list[Activation]]:
    """Remove the adapter tags from a prompt and convert them to strengths.

    | tag | strength |
    |---|---|
    | `<lora:ink>` | 1 |
    | `<lora:ink:0.8>`, `<lyco:ink:0.8>` | 0.8 |
    | `<lora:ink:0.5:0.8>`, `<lora:ink:te=0.5:unet=0.8>` | 0.5 for text encoders, 0.8 for everything else |
    | `<lora:ink:0.8:0.2-0.7>`, `<lora:ink:0.8:start=0.2:end=0.7>` | 0.8 in this part of a run, 0 in the rest |
    | `<lora:ink:0@0,1@0.5>` | values at positions, with straight lines between them |
    | `<lora:ink:0.8:lbw=1,0,0,...>` | 0.8 times the `block_weights` |

    A range may also be written `step=0.2-0.7`, and `end=` as `stop=`. A range does not include the step at its end,
    except that a range up to the fraction 1 includes the last step. Ranges apply only to the denoiser; text encoders
    run before it and keep their strength. Positions up to 1 are fractions of a run; if any of them is above 1, they are
    all step numbers, from 0.

    A tag after a backslash stays in the prompt, without the backslash. Other tags (`<hypernet:...>`) stay unchanged.

    Args:
        prompt: one prompt or several.

    Returns:
        The prompt without tags, and a mapping from adapter names to strengths for `pipe.adapters.activate`. For several
        prompts, a list of each.

    Raises:
        AdapterError: a tag cannot be parsed, or an adapter appears twice in a prompt.
    """
    if not isinstance(prompt, str):
        parsed = [parse_prompt(one) for one in prompt]
        return [text for text, _ in parsed], [activation for _, activation in parsed]
    activation: Activation = {}

    def without_tags(gap: re.Match[str]) -> str:
        for tag in re.finditer(_TAG, gap[0]):
            with naming(tag[0]):
                name, strength = _parse_tag(tag[1])
                if name in activation:
                    raise AdapterError(f"{name!r} appears twice in the prompt; name each adapter once")
                activation[name] = strength
        return _filler(gap)

    return _ESCAPED.sub(r"\1", _GAP.sub(without_tags, prompt)), activation


def _filler(gap: re.Match[str]) -> str:
    """Return the text that replaces adjacent tags and the spaces and commas around them."""
    before, after = gap.string[: gap.start()][-1:], gap.string[gap.end() :][:1]
    if not before or before in "([{" or not after or after in ")]},.;:!?":
        return ""
    around = re.sub(_TAG, "", gap[0])
    return ", " if "," in around else " " if around else ""


def _parse_tag(tag: str) -> tuple[str, Strength]:
    """Return the name and strength of the adapter in a tag, given the text between `<lora:` and `>`."""
    name, *items = (item.strip() for item in tag.split(":"))
    if not name:
        raise AdapterError("no name, expected <lora:name:strength>")
    found: dict[str, str] = {}
    for item in items:
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals:
            key, value = _key_of(item, found), item
        elif key in ("stop", "end"):
            key = "end"
        if key not in ("te", "unet", "lbw", "start", "end", "step"):
            raise AdapterError(f"{item!r} is unknown; strengths, te=, unet=, lbw=, start=, end= and step= are known")
        if key in found:
            raise AdapterError(f"{item!r}: {key} is there twice")
        found[key] = value
    return name, _strength(found)


def _key_of(item: str, found: Iterable[str]) -> str:
    """Return the key of an item without one, judged by its form and by the keys that were found before it."""
    if _RANGE.fullmatch(item):
        return "step"
    if item.count(",") > 10 and "@" not in item:
        return "lbw"
    return "te" if "te" not in found else "unet"


def _strength(found: dict[str, str]) -> Strength:
    """Return the strength that the items of a tag, by key, describe."""
    te = _amount(found.get("te", "1"))
    unet = _amount(found["unet"]) if "unet" in found else te
    ranged = _ranged(unet, found)
    if ranged == te and "lbw" not in found:
        return te
    strengths = SharedStrengths({"": ranged, **dict.fromkeys(_TEXT_ENCODERS, te)})
    for prefix, weight in block_weights(found["lbw"]).items() if "lbw" in found else ():
        strengths[prefix] = _times(te if prefix in _TEXT_ENCODERS else ranged, weight)
    return strengths


def _amount(text: str) -> float | Piecewise:
    """Parse a number, or values at positions."""
    if "@" not in text:
        return _number(text)
    points = sorted(_point(part) for part in re.split("[,;]", text))
    return Piecewise(points, over=_axis([position for position, _ in points]))


def _point(text: str) -> tuple[float, float]:
    """Parse `value@position`; return the position and the value."""
    value, at, position = text.partition("@")
    if not at:
        raise AdapterError(f"{text!r}: value@position expected")
    return _number(position), _number(value)


def _ranged(amount: float | Piecewise, found: dict[str, str]) -> float | Piecewise:
    """Return the amount limited to the range in `found`, if there is one, and 0 in the rest of the run."""
    start, end = found.get("start"), found.get("end")
    if "step" in found:
        match = _RANGE.fullmatch(found["step"])
        if match is None or start is not None or end is not None:
            raise AdapterError(f"{found['step']!r}: one range expected, as first-last, or start= and end=")
        start, end = match.groups()
    if start is None and end is None:
        return amount
    first, last = _number(start or "0"), math.inf if end is None else _number(end)
    finite = [position for position in (first, last) if position < math.inf]
    axis = _axis(finite)
    if isinstance(amount, Piecewise):
        raise AdapterError("values at positions and a range cannot be combined; write the zeros as values at positions")
    if not 0 <= first < last or (axis == "step" and any(not position.is_integer() for position in finite)):
        raise AdapterError(
            f"range from {start or 0} to {end or 'the end'}, expected two fractions of a run or two numbers of steps"
        )
    points = [(0.0, 0.0), (first, amount)] if first else [(0.0, amount)]
    if last < math.inf and (last, axis) != (1.0, "fraction"):
        points.append((last, 0.0))
    return Piecewise(points, hold=True, over=axis)


def _axis(positions: Sequence[float]) -> Axis:
    """Return the axis of positions in a tag: fractions of a run, or steps if one is above 1."""
    return "step" if max(positions) > 1 else "fraction"


def _times(amount: float | Piecewise, weight: float) -> float | Piecewise:
    if isinstance(amount, Piecewise):
        return replace(amount, points=[(position, value * weight) for position, value in amount.points])
    return amount * weight


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise AdapterError(f"{text!r} is no number")
    return number
