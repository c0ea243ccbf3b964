"""The prefixes of layer paths in every dialect, and the pipeline components that they stand for.

* `lora_unet_<path with "_" for ".">` and its relatives: sd-scripts, LyCORIS, OneTrainer;
* `diffusion_model.<path>` and `text_encoders.<text encoder>.transformer.<path>`: ComfyUI;
* `<component>.<path>`: diffusers;
* `base_model.model.<path>`: PEFT.

Programs mix them: they spell a text encoder by one and the denoiser by another, or nest one in another, since wrapping
a model prepends a prefix to its layers. Sources besides those named in the formats: diffusers 0.42.1
`loaders/lora_conversion_utils.py`, ComfyUI `comfy/lora.py`.
"""

import re
from collections.abc import Sequence

from diffadapt.formats.names import Names
from diffadapt.formats.verdicts import Place, Unused, Verdict
from diffadapt.runtime.components import is_text_encoder

FLAT = re.compile(r"(lora_(?:unet|transformer|te\d?|prior_unet|prior_te)|oft_(?:unet|te\d?)|lycoris)_")
COMFY = re.compile(r"diffusion_model\.|text_encoders\.")
COMPONENT = re.compile(r"unet|transformer(_\d|_ref)?|text_encoder(_\d)?|prior|decoder|connectors|text_conditioner")
PEFT = "base_model.model."
LTX2_PROJECTION = "text_embedding_projection."
"""Prefix of the layers of LTX-2's connectors that its checkpoint has outside `diffusion_model.`."""

_DENOISER = "diffusion_model."
_EXPERT = re.compile(r"transformer_(\d)\.")
_TEXT_ENCODER = re.compile(r"(?:text_encoders\.(?:(?!transformer\.)(\w+)\.)?|(clip_[lgh]|t5xxl)\.)(?:transformer\.)?")
_NUMBERED_TEXT = re.compile(r"te(\d?)\.")
_TEXT_ENCODERS = {
    "": ("text_encoder",),
    "1": ("text_encoder",),
    "2": ("text_encoder_2",),
    # The T5 of SD3; sd-scripts gives Flux's T5 this number, too.
    "3": ("text_encoder_3", "text_encoder_2"),
}
_ANY_TEXT_ENCODER = ("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4")
_CLIP = {"clip_l": ("text_encoder", "text_encoder_2"), "clip_g": ("text_encoder_2",), "clip_h": ("text_encoder",)}
_WRAPPER = re.compile(
    r"(?:base_model\.model|module|model|net|dit|pipe|unet|transformer|conditional_transformer|diffusion_model)\."
)
_FLAT_WRAPPER = re.compile(r"diffusion_model_|(?:transformer|unet|model)_(?!blocks_)")
"""Prefixes that come from wrapping a whole model, dotted and flattened."""

_MOST_WRAPPERS = 4
"""More than any known file has."""

_COMPILED = "_orig_mod."
_LIKE_A_COMPONENT = "transformer.blocks."
_TRUNCATED = "sformer_blocks."
_PROJECTION = re.compile(r"(?:.*[._])?text_projection")
_NO_PROJECTION = "a projection of the whole prompt, which this text encoder does not have and nothing would read"


def place(path: str, name: str, names: Names) -> Verdict:
    """Return the verdict on a tensor, whatever dialect its key is in.

    Args:
        path: the layer's path in the file.
        name: canonical name of the tensor.
        names: the models to resolve the path against.
    """
    verdict = _place_as_written(path, name, names)
    inner = path
    for _ in range(_MOST_WRAPPERS):
        if isinstance(verdict, Place) or (isinstance(verdict, Unused) and verdict.harmless):
            return verdict
        unwrapped = _unwrapped(inner)
        if unwrapped == inner:
            break
        inner = unwrapped
        other = _place_as_written(inner, name, names)
        if not isinstance(other, Unused) or other.harmless:
            return other
    return verdict


def _place_as_written(path: str, name: str, names: Names) -> Verdict:
    """Return the verdict on a tensor without removing wrapper prefixes."""
    flat = FLAT.match(path)
    if flat:
        rest = path[flat.end() :].replace(".", "_")
        return _excuse_projection(names.flat(_components(flat[1], rest, names), rest, name), rest, names)
    text = _TEXT_ENCODER.match(path)
    if text:
        rest = path[text.end() :]
        return _excuse_projection(names.first(_text_encoders(text[1] or text[2] or ""), rest, name), rest, names)
    if path.startswith(_DENOISER):
        return _in_checkpoint(path.removeprefix(_DENOISER), name, names)
    if path.startswith(LTX2_PROJECTION):
        return names.first(names.owners(path), path, name)
    component, _, rest = path.partition(".")
    if rest and (COMPONENT.fullmatch(component) or (names.models is not None and component in names.models)):
        # If a pipeline has two transformers, only the second one has a number.
        verdict = names.dotted("transformer" if component == "transformer_1" else component, rest, name)
        if isinstance(verdict, Unused) and not verdict.harmless and path.startswith(_LIKE_A_COMPONENT):
            # The name of a block, with dots for underscores.
            whole = names.bare(path, name)
            verdict = whole if isinstance(whole, Place) else verdict
        return _excuse_projection(verdict, rest, names) if is_text_encoder(component) else verdict
    numbered = _NUMBERED_TEXT.match(path)
    if numbered:
        rest = path[numbered.end() :]
        return names.first(_TEXT_ENCODERS.get(numbered[1], (f"text_encoder_{numbered[1]}",)), rest, name)
    return names.bare(path.removeprefix(PEFT), name)


def _in_checkpoint(path: str, name: str, names: Names) -> Verdict:
    """Return the verdict on a tensor of the layer at `path` in the denoiser's original checkpoint."""
    expert = _EXPERT.match(path)
    if expert:
        # Wan 2.2 in one file: the high-noise model and the low-noise model.
        component = "transformer" if expert[1] == "1" else f"transformer_{expert[1]}"
        return names.dotted(component, path[expert.end() :], name)
    return names.first(names.owners(path), path, name)


def _components(prefix: str, flat: str, names: Names) -> Sequence[str]:
    """Return the components that a flattened prefix and the path after it may mean, the likeliest first."""
    if prefix == "lora_prior_te":
        return "text_encoder", "prior_text_encoder"
    if prefix == "lora_prior_unet":
        return "prior", "prior_prior", names.denoiser
    _, text_encoder, number = prefix.partition("_te")
    if not text_encoder:
        return names.owners(flat)
    return _TEXT_ENCODERS.get(number, (f"text_encoder_{number}",))


def _text_encoders(written: str) -> Sequence[str]:
    """Return the components that ComfyUI's name of a text encoder may mean, the likeliest first."""
    if "t5" in written:
        return "text_encoder_3", "text_encoder_2", "text_encoder"
    return _CLIP.get(written, _ANY_TEXT_ENCODER)


def _excuse_projection(verdict: Verdict, path: str, names: Names) -> Verdict:
    """Return the verdict, made harmless for CLIP's text projection if the text encoder has none.

    Programs train the projection with the text encoder, but most pipelines have a CLIP without one.
    """
    if not isinstance(verdict, Unused) or not _PROJECTION.fullmatch(path):
        return verdict
    has_encoder = verdict.component is not None and names.has(verdict.component)
    return Unused(_NO_PROJECTION, verdict.component, harmless=True) if has_encoder else verdict


def _unwrapped(path: str) -> str:
    """Return the path without its outermost wrapper or, if it has none, without the name of a parameter at its end."""
    if _COMPILED in path:
        return path.replace(_COMPILED, "")
    flat = FLAT.match(path)
    if flat:
        wrapper = _FLAT_WRAPPER.match(path, flat.end())
        return path if wrapper is None else path[: flat.end()] + path[wrapper.end() :]
    if path.startswith(_TRUNCATED):
        # Some program took "lora_tran" for a prefix.
        return f"tran{path}"
    wrapper = _WRAPPER.match(path)
    return path.removesuffix(".scale").removesuffix(".weight") if wrapper is None else path[wrapper.end() :]
