"""The models that the oldest supported versions of other libraries lack: a test that needs one of them is skipped.

`from tests.support.versions import diffusers, transformers` takes the place of importing these libraries.
"""

import importlib
import re
from importlib.metadata import version
from typing import Any

import pytest

SINCE = {
    "diffusers": {
        "0.34": "ChromaPipeline ChromaTransformer2DModel CosmosTransformer3DModel HiDreamImagePipeline "
        "HiDreamImageTransformer2DModel HunyuanVideoFramepackTransformer3DModel WanVACETransformer3DModel",
        "0.35": "AutoencoderKLQwenImage FirstBlockCacheConfig FluxKontextPipeline ModularPipeline "
        "QwenImageEditPipeline QwenImagePipeline QwenImageTransformer2DModel SkyReelsV2Transformer3DModel "
        "StableDiffusionXLAutoBlocks",
        "0.36": "AutoencoderKLFlux2 AutoencoderKLHunyuanImage ChronoEditTransformer3DModel Flux2Pipeline "
        "Flux2Transformer2DModel HunyuanImagePipeline HunyuanImageTransformer2DModel HunyuanVideo15Pipeline "
        "HunyuanVideo15Transformer3DModel QwenImageEditPlusPipeline SanaVideoTransformer3DModel "
        "TaylorSeerCacheConfig WanAnimateTransformer3DModel ZImagePipeline ZImageTransformer2DModel",
        "0.37": "Flux2KleinPipeline HeliosTransformer3DModel LTX2Pipeline LTX2VideoTransformer3DModel MagCacheConfig",
        "0.38": "AceStepPipeline AceStepTransformer1DModel NucleusMoEImageTransformer2DModel TextKVCacheConfig",
        "0.39": "AnimaModularPipeline AnimaTextConditioner Ideogram4Pipeline Ideogram4Transformer2DModel "
        "Krea2Pipeline Krea2Transformer2DModel",
        "0.40": "MiniMaxH3ModularPipeline MiniMaxH3Transformer3DModel",
        "0.41": "AutoencoderKLQwenImage21 QwenImage21Pipeline QwenImage21Transformer2DModel",
        "0.42": "Flux3ModularPipeline Flux3Transformer2DModel",
    },
    "transformers": {
        "4.49": "Qwen2_5_VLConfig Qwen2_5_VLForConditionalGeneration",
        "4.50": "Gemma3TextConfig Gemma3TextModel Mistral3Config Mistral3ForConditionalGeneration",
        "4.51": "Qwen3Config Qwen3ForCausalLM Qwen3Model",
        "4.57": "Qwen3VLConfig Qwen3VLForConditionalGeneration Qwen3VLModel",
        "5.4": "Qwen2VLImageProcessorPil",
    },
}
"""Library -> version -> the names that no earlier version has, as far as tests use them."""

_MISSING = re.compile(
    r"module '?(?P<library>diffusers|transformers)'? has no attribute '?(?P<name>\w+)"
    r"|cannot import name '(?P<import>\w+)' from '(?P<from>diffusers|transformers)'"
)

_KNOWN_FAULTS = {
    "value cannot be converted to type float without overflow": ("transformers", "5.0", "a mask of CLIP in float64"),
    "The version of PEFT you are using is not compatible": ("peft", "0.22", "peft inside transformers 5.24"),
}
"""What a version raises -> the library, the first version seen without this fault, and what it concerns."""


class TooOld(pytest.skip.Exception):
    """What a test needs is not in the installed version of a library, or the library is not installed."""


def imported(name: str) -> Any:
    """Return a module, or skip the test if its library is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise TooOld(f"{name} is not installed ({error})") from error


def needs(library: str, least: str, what: str) -> None:
    """Skip the test if the installed version of `library` is older than `least`, the first one that has `what`."""
    if not at_least(library, least):
        raise TooOld(f"{what} needs {library} {least} or newer; this is {version(library)}")


def at_least(library: str, least: str) -> bool:
    """Return whether the installed version of `library` is `least` or newer."""
    return _numbers(version(library)) >= _numbers(least)


class Library:
    """A library whose public names skip the test if the installed version is too old for them."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        """Return a public name of the library, or skip the test."""
        for least, names in SINCE[self._name].items():
            if name in names.split():
                needs(self._name, least, name)
        return getattr(importlib.import_module(self._name), name)


def too_old(error: BaseException) -> TooOld | None:
    """Return the skip for an error about a name that an old version of a library lacks; `None` for any other error."""
    for message, (library, least, what) in _KNOWN_FAULTS.items():
        if message in str(error):
            try:
                needs(library, least, what)
            except TooOld as skip:
                return skip
    found = _MISSING.search(str(error))
    if found is not None:
        try:
            getattr(Library(found["library"] or found["from"]), found["name"] or found["import"])
        except TooOld as skip:
            return skip
        except AttributeError:
            pass
    return None


diffusers: Any = Library("diffusers")
transformers: Any = Library("transformers")


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2])
