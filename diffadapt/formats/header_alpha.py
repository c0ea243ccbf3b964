"""Alphas that stand in a file's header or config rather than in tensors.

Three kinds of headers have them, in files of any format:

* PEFT's `adapter_config.json`;
* `lora_adapter_metadata`, the same options as JSON, with the component in front of each (diffusers, SimpleTuner);
* plain entries: `alpha` or `lora_alpha`, and `rank` (LightX2V). They count for factors with PEFT's names only, whose
  files have no alpha tensors. As in diffusers 0.42.1 (`MiniMaxH3LoraLoaderMixin`), alpha is divided by the rank of each
  layer's factors.

`ss_network_alpha` is none of them: the files of sd-scripts have alpha tensors, which may differ from it.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from diffadapt.formats import peft_methods
from diffadapt.formats.format import Header
from diffadapt.formats.header_options import METADATA, options_by_component
from diffadapt.runtime.components import is_text_encoder

_ALPHAS, _RANKS = ("lora_alpha", "alpha"), ("rank", "r", "lora_rank")


class HeaderAlpha(NamedTuple):
    """The alpha of one layer according to the header.

    Attributes:
        value: the alpha, such that `alpha / rank` is the scale; `None` if the header has none for this layer.
        notes: entries of the header that contradict it, or that are not used.
    """

    value: float | None
    notes: tuple[str, ...] = ()


class HeaderAlphas:
    """The alphas in the header of a file.

    Attributes:
        are_there: whether the header has any.
    """

    def __init__(self, header: Header) -> None:
        """
        Raises:
            AdapterError: `lora_adapter_metadata` is not a JSON object.
        """
        self._what = "adapter_config.json" if header.config is not None else METADATA
        self._options = options_by_component(header)
        self._alphas = {name: header.metadata[name] for name in _ALPHAS if name in header.metadata}
        self._ranks = {name: header.metadata[name] for name in _RANKS if name in header.metadata}
        numbers = {name: _number(text) for name, text in self._alphas.items()}
        self._plain = next((number for number in numbers.values() if number is not None), None)
        self._by_component: dict[str, Mapping[str, Any]] = {}
        self.are_there = bool(self._options or self._alphas)

    def of(self, component: str, paths: Sequence[str], rank: int, *, peft_names: bool) -> HeaderAlpha:
        """Return the alpha of a layer.

        Args:
            component: the component of the layer.
            paths: the paths of the layer that patterns may refer to, the likeliest first.
            rank: the rank of its tensors.
            peft_names: whether its tensors have the names that PEFT gives to the factors of a LoRA.

        Raises:
            AdapterError: an option is not of the expected kind.
        """
        options = self._by_component.get(component)
        if options is None:
            options = self._by_component[component] = self._options_of(component)
        value = peft_methods.alpha(options, paths, rank) if options else None
        plain = self._plain
        if value is not None:
            notes = [
                f"the header has {name}={text}, but {self._what} makes the scale {value / rank:g}, which is used"
                for name, text in self._alphas.items()
                if (number := _number(text)) is not None and number not in (value, self._global(options))
            ]
            return HeaderAlpha(value, tuple(notes))
        if not self._alphas:
            return HeaderAlpha(None)
        shown = " and ".join(f"{name}={text}" for name, text in self._alphas.items())
        if plain is None:
            return HeaderAlpha(None, (f"the header has {shown}, which is not a number; the scale is 1",))
        if not peft_names:
            return HeaderAlpha(
                None, (f"the header has {shown}, but files with these names have alphas as tensors; the scale is 1",)
            )
        notes = (
            [f"the header has {shown}; the first is used"] if len(set(map(_number, self._alphas.values()))) > 1 else []
        )
        notes += [
            f"the header has {name}={text}, but the factors have rank {rank}, which alpha={plain:g} is divided by"
            for name, text in self._ranks.items()
            if _number(text) not in (None, rank)
        ]
        return HeaderAlpha(plain, tuple(notes))

    def _options_of(self, component: str) -> Mapping[str, Any]:
        """Return the options for a component.

        A model saved by itself has no component in its keys, and none in its header. Programs that spell layers as
        another one does may still name the denoiser in the header by another of its names.
        """
        found = self._options.get(component) or self._options.get("")
        if found or is_text_encoder(component):
            return found or {}
        denoisers = [options for name, options in self._options.items() if not is_text_encoder(name)]
        return denoisers[0] if len(denoisers) == 1 else {}

    @staticmethod
    def _global(options: Mapping[str, Any]) -> Any:
        return options.get("lora_alpha", options.get("alpha"))


def kept(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the metadata of a file that another file of its content keeps: all but its alphas and ranks."""
    return {key: value for key, value in metadata.items() if key not in (METADATA, *_ALPHAS, *_RANKS)}


def _number(text: str) -> float | None:
    """Return the number that a plain entry is, or `None` if it is something else."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
