"""What files have before a layer's path: which component of a pipeline it means, in every dialect.

* `lora_unet_<path with "_" for ".">` and its relatives: sd-scripts, LyCORIS, OneTrainer;
* `diffusion_model.<path>` and `text_encoders.<which>.transformer.<path>`: ComfyUI;
* `<component>.<path>`: diffusers;
* `base_model.model.<path>`: PEFT.

Programs mix them: a text encoder by one and the denoiser by another, or one within another, as what wraps a model puts
a level above its layers. Sources beside those named in the formats: diffusers 0.42.1
`loaders/lora_conversion_utils.py`, ComfyUI `comfy/lora.py`.
"""

import re
from collections.abc import Sequence

from diffadapt.formats.names import Names
from diffadapt.formats.verdicts import Place, Unused, Verdict
from diffadapt.runtime.components import is_text_encoder

FLAT = re.compile(r"(lora_(?:unet|transformer|te\d?|prior_unet|prior_te)|oft_(?:unet|te\d?)|lycoris)_")
COMFY = re.compile(r"diffusion_model\.|text_encoders\.")
PEFT = "base_model.model."
TOP = "text_embedding_projection."
"""What of LTX-2's connectors is beside the denoiser in its checkpoint, and not in it."""

_DENOISER = "diffusion_model."
_EXPERT = re.compile(r"transformer_(\d)\.")
_TEXT_ENCODER = re.compile(r"(?:text_encoders\.(?:(?!transformer\.)(\w+)\.)?|(clip_[lgh]|t5xxl)\.)(?:transformer\.)?")
_NUMBERED_TEXT = re.compile(r"te(\d?)\.")
_COMPONENT = re.compile(r"unet|transformer(_\d|_ref)?|text_encoder(_\d)?|prior|decoder|connectors|text_conditioner")
_TEXT_ENCODERS = {
    "": ("text_encoder",),
    "1": ("text_encoder",),
    "2": ("text_encoder_2",),
    # The T5 of SD3; sd-scripts counts that of Flux so too.
    "3": ("text_encoder_3", "text_encoder_2"),
}
_EVERY = ("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4")
_CLIP = {"clip_l": ("text_encoder", "text_encoder_2"), "clip_g": ("text_encoder_2",), "clip_h": ("text_encoder",)}
_WRAPPED = re.compile(
    r"(?:base_model\.model|module|model|net|dit|pipe|unet|transformer|conditional_transformer|diffusion_model)\."
)
_WRAPPED_FLAT = re.compile(r"diffusion_model_|(?:transformer|unet|model)_(?!blocks_)")
"""Levels that wrap a whole model, dotted and flattened."""
_COMPILED = "_orig_mod."
_CUT = "sformer_blocks."
_PROJECTION = re.compile(r"(?:.*[._])?text_projection")
_NO_PROJECTION = "a projection of the whole prompt, which this text encoder does not have and nothing reads"


def place(path: str, name: str, names: Names) -> Verdict:
    """Where tensor `name` of the layer that a file calls `path` belongs, whichever dialect that is."""
    verdict = _placed(path, name, names)
    inner = path
    # Not more levels than anyone has seen.
    for _ in range(4):
        if isinstance(verdict, Place) or (isinstance(verdict, Unused) and verdict.harmless):
            return verdict
        unwrapped = _unwrapped(inner)
        if unwrapped == inner:
            break
        inner = unwrapped
        other = _placed(inner, name, names)
        if not isinstance(other, Unused) or other.harmless:
            return other
    return verdict


def _placed(path: str, name: str, names: Names) -> Verdict:
    flat = FLAT.match(path)
    if flat and "." not in path:
        rest = path[flat.end() :]
        return _of_text(names.flat(_components(flat[1], rest, names), rest, name), rest)
    text = _TEXT_ENCODER.match(path)
    if text:
        rest = path[text.end() :]
        return _of_text(names.first(_text_encoders(text[1] or text[2] or ""), rest, name), rest)
    if path.startswith(_DENOISER):
        return _in_checkpoint(path.removeprefix(_DENOISER), name, names)
    if path.startswith(TOP):
        return names.first(names.owners(path), path, name)
    component, _, rest = path.partition(".")
    if rest and (_COMPONENT.fullmatch(component) or (names.models is not None and component in names.models)):
        # Of two transformers, pipelines number the second only.
        verdict = names.dotted("transformer" if component == "transformer_1" else component, rest, name)
        return _of_text(verdict, rest) if is_text_encoder(component) else verdict
    numbered = _NUMBERED_TEXT.match(path)
    if numbered:
        rest = path[numbered.end() :]
        return names.first(_TEXT_ENCODERS.get(numbered[1], (f"text_encoder_{numbered[1]}",)), rest, name)
    return names.bare(path.removeprefix(PEFT), name)


def _in_checkpoint(path: str, name: str, names: Names) -> Verdict:
    """Of a layer that the denoiser's original checkpoint calls so."""
    expert = _EXPERT.match(path)
    if expert:
        # Wan 2.2 in one file: the high-noise model and the low-noise one.
        component = "transformer" if expert[1] == "1" else f"transformer_{expert[1]}"
        return names.dotted(component, path[expert.end() :], name)
    return names.first(names.owners(path), path, name)


def _components(prefix: str, flat: str, names: Names) -> Sequence[str]:
    """Which components a flattened prefix and the path after it may mean, the likeliest first."""
    if prefix == "lora_prior_te":
        return "text_encoder", "prior_text_encoder"
    if prefix == "lora_prior_unet":
        return "prior", "prior_prior", names.denoiser
    _, text_encoder, number = prefix.partition("_te")
    if not text_encoder:
        return names.owners(flat)
    return _TEXT_ENCODERS.get(number, (f"text_encoder_{number}",))


def _text_encoders(which: str) -> Sequence[str]:
    """Which components ComfyUI's name of a text encoder may mean, the likeliest first."""
    if "t5" in which:
        return "text_encoder_3", "text_encoder_2", "text_encoder"
    return _CLIP.get(which, _EVERY)


def _of_text(verdict: Verdict, path: str) -> Verdict:
    """Programs train the projection of CLIP with it, though most pipelines have a CLIP without one."""
    if isinstance(verdict, Unused) and _PROJECTION.fullmatch(path) and "has no layer" in verdict.reason:
        return Unused(_NO_PROJECTION, verdict.component, harmless=True)
    return verdict


def _unwrapped(path: str) -> str:
    """The path without its outermost level, or without the name of a parameter; or as it is."""
    if _COMPILED in path:
        return path.replace(_COMPILED, "")
    flat = FLAT.match(path)
    if flat and "." not in path:
        level = _WRAPPED_FLAT.match(path, flat.end())
        return path if level is None else path[: flat.end()] + path[level.end() :]
    if path.startswith(_CUT):
        # Some program took "lora_tran" for a prefix.
        return f"tran{path}"
    found = _WRAPPED.match(path)
    return path.removesuffix(".scale").removesuffix(".weight") if found is None else path[found.end() :]
