"""Writers of the formats that spell tensors as sd-scripts and LyCORIS do: kohya, OneTrainer and ComfyUI.

The formats differ in the names of layers: flattened or dotted, from the model's original layout or from diffusers.
"""

import hashlib
import re
from collections.abc import Callable, Collection, Iterator, Mapping

import torch
from safetensors.torch import save
from torch import Tensor

from diffadapt.errors import AdapterError
from diffadapt.formats import stored_settings
from diffadapt.formats.document import AdapterState, Document
from diffadapt.formats.embeddings import bundle, own_file
from diffadapt.formats.header_alpha import kept
from diffadapt.formats.original import in_original_layout, join_groups
from diffadapt.formats.peft_methods import BY_TYPE
from diffadapt.formats.prefixes import LTX2_PROJECTION
from diffadapt.formats.second_denoiser import as_first
from diffadapt.formats.text_encoder_names import comfy_path, comfy_text_encoder
from diffadapt.runtime.components import is_text_encoder, text_encoder_number
from diffadapt.types import named
from diffadapt.types.layer_state import LayerState
from diffadapt.types.oft import of_other_program

_SPELLINGS = {
    "lora_down": "lora_down.weight",
    "lora_up": "lora_up.weight",
    "lora_mid": "lora_mid.weight",
    "lora_bias": "lora_up.bias",
    "glora_a1": "a1.weight",
    "glora_a2": "a2.weight",
    "glora_b1": "b1.weight",
    "glora_b2": "b2.weight",
    "q_layer": "q_layer.weight",
    "p_layer": "p_layer.weight",
    "ia3_w": "weight",
    "param_down": "lora_down.weight",
    "param_up": "lora_up.weight",
    # OneTrainer's. sd-scripts and LyCORIS rotate outputs, with other tensors.
    "oft_R": "oft_R.weight",
}
_NORM_SPELLINGS = {"diff": "w_norm", "diff_b": "b_norm"}
_SCALES = re.compile(r"\.norm\.(?:query|key)_norm$|\.distilled_guidance_layer\.norms\.\d+$")
"""Norms of the original layouts of Flux.1, Flux.2 and Chroma, whose only parameter is `scale`. In ComfyUI, those of
HunyuanVideo (`_NORMS_OF_HUNYUAN`) have this layout, too.

ComfyUI looks up a change by the name of a parameter, without `.weight` at its end.
"""
_NORMS_OF_HUNYUAN = re.compile(r"((?:double|single)_blocks\.\d+(?:\.(?:img|txt)_attn)?)[._]([qk])_norm")
_POINTWISE = frozenset(
    {"lora_up", "dora_scale", "initial_norm", "glora_a1", "glora_a2", "glora_b1", "p_layer", "p_start"}
)
_OF_PARAMETERS = frozenset({"param_down", "param_up"})
_PEFT_ONLY = frozenset({"boft_R", "ia3_l"})
_TRANSPOSED_NAMES = {"lora_down": "lora_up", "lora_up": "lora_down"}
_IN_CHECKPOINT = ("unet", "transformer", "prior", "text_conditioner", "connectors")
"""Components that are the denoiser of the original checkpoint or modules of it."""

_ONETRAINER = {"unet": "lora_unet", "transformer": "lora_transformer", "prior": "lora_prior_unet"}
_FLAT_IN_ONETRAINER = frozenset({"qwen", "krea2", "zimage", "sana", "hidream", "ideogram4", "anima"})
"""Families whose flattened files OneTrainer has always read with the prefix `lora_unet_` alone."""
_NUMBERED_BY_NOBODY = frozenset({"sd", "sd2", "lumina2", "anima", None})
"""Families whose only text encoder has no number in sd-scripts."""
_UNNUMBERED_IN_ONETRAINER = frozenset({"sd", "sd2", "chroma", "pixart", "qwen", "sana", None})
"""Families whose only text encoder has no number there."""

_OF_PEFT_ALONE = frozenset(BY_TYPE) - {"full"}
"""Types that no program but PEFT trains, and none but this library reads from a single file."""

_UNKNOWN_TO_COMFY = frozenset({"ia3-lycoris"})
"""Types of LyCORIS that ComfyUI skips with a warning for each key; see `comfy/weight_adapter/__init__.py`, 0bca89e."""

ALWAYS_LIMITED = {"constraint_eps": 1e-8}
"""Settings of sd-scripts' own OFT, which the prefix of the layer names stands for in its files."""

_HASH_OFFSET, _HASH_BYTES = 0x100000, 0x10000


def is_original(family: str | None) -> bool:
    """Return whether sd-scripts uses the original layout for the models of a family.

    It names the layers of the Stable Diffusion UNets as diffusers does, and the layers of newer models as their authors
    do.
    """
    return family not in ("sd", "sd2", "sdxl", None)


def dump_kohya(state: AdapterState) -> dict[str, Document]:
    """Return an adapter as a file of sd-scripts.

    Prefixes are `lora_unet_` and `lora_te_`, the latter with a number if there may be several text encoders; and `oft_`
    instead of `lora_` for sd-scripts' own OFT. Types that sd-scripts does not have are in files of LyCORIS' layout: if
    PEFT alone trains them, with the model's own names, since they cannot be fused.

    Raises:
        AdapterError: the format cannot express the adapter.
    """
    if state.embeddings and not state.layers:
        return _hashed({"": Document(own_file(state), {**kept(state.metadata), "format": "pt"})})
    encoders = _text_encoders(state)
    numbered = not {"text_encoder"}.issuperset(encoders) or state.family not in _NUMBERED_BY_NOBODY
    if state.family is None and any(".block." in path for path in state.layers.get("text_encoder_2", ())):
        raise AdapterError(
            "text_encoder_2: its number in sd-scripts depends on the family of the pipeline, which nothing tells here; "
            "save it from a pipeline, or state the family (convert with family=...)"
        )
    # T5 is the third text encoder of sd-scripts, even without a second CLIP.
    t5 = {"text_encoder_2": "3"} if state.family == "flux" else {}

    layers = [layer for found in state.layers.values() for layer in found.values()]
    as_original = is_original(state.family) and _OF_PEFT_ALONE.isdisjoint(layer.type for layer in layers)

    def prefix(component: str) -> str:
        if not is_text_encoder(component):
            return "lora_unet" if as_original or not is_original(state.family) else "lycoris"
        number = t5.get(component) or text_encoder_number(component) or "1"
        return f"lora_te{number if numbered else ''}"

    limited = {_is_limited(layer) for layer in layers}
    if len(limited) > 1:
        raise AdapterError("an OFT of sd-scripts cannot share a file with other layers")

    def name(component: str, path: str) -> str:
        flat = f"{prefix(component)}_{path}".replace(".", "_")
        return flat.replace("lora_", "oft_", 1) if True in limited else flat

    return _hashed(_document(state, name, as_original, limited=True in limited))


def dump_onetrainer(state: AdapterState) -> dict[str, Document]:
    """Return an adapter as a file of OneTrainer.

    Names are flattened diffusers names with the prefix `lora_unet_`, `lora_transformer_` or `lora_prior_unet_`. Models
    that OneTrainer does not train have the second one. Source: OneTrainer 23df383 `modules/util/load_lora_util.py`.

    Raises:
        AdapterError: the format cannot express the adapter.
    """

    _refuse_types(state, _OF_PEFT_ALONE, "OneTrainer")

    def prefix(component: str) -> str:
        if not is_text_encoder(component):
            if component not in _ONETRAINER:
                raise AdapterError(f"{component}: OneTrainer has no name for it")
            return "lora_unet" if state.family in _FLAT_IN_ONETRAINER else _ONETRAINER[component]
        is_only = state.family in _UNNUMBERED_IN_ONETRAINER and _text_encoders(state) == ["text_encoder"]
        return "lora_te" if is_only else f"lora_te{text_encoder_number(component) or '1'}"

    def name(component: str, path: str) -> str:
        return f"{prefix(component)}_{path}".replace(".", "_")

    return _document(state, name, False, for_onetrainer=True)


def dump_comfy(state: AdapterState) -> dict[str, Document]:
    """Return an adapter as a file of ComfyUI, with dotted names of the original layout after `diffusion_model.`.

    Raises:
        AdapterError: the format cannot express the adapter.
    """

    _refuse_types(state, _OF_PEFT_ALONE | _UNKNOWN_TO_COMFY, "ComfyUI")

    def name(component: str, path: str) -> str:
        norm = _NORMS_OF_HUNYUAN.fullmatch(path)
        if norm is not None:
            path = f"{norm[1]}.norm.{'query' if norm[2] == 'q' else 'key'}_norm"
        if not is_text_encoder(component):
            if component not in _IN_CHECKPOINT:
                raise AdapterError(
                    f"{component}: a ComfyUI file holds one denoiser; load the denoisers' adapters one by one, with "
                    "components=[...], and save each in a file of its own"
                )
            return path if path.startswith(LTX2_PROJECTION) else f"diffusion_model.{path}"
        text_encoder = comfy_text_encoder(state.family, component, state.layers[component])
        if text_encoder is None:
            models = f"{state.family} models" if state.family else "models of an unknown family"
            raise AdapterError(f"{component}: its name in ComfyUI is not known for {models}")
        return f"text_encoders.{text_encoder}.transformer.{comfy_path(path)}"

    return _document(state, name, True, for_comfy=True)


def _document(
    state: AdapterState,
    name: Callable[[str, str], str],
    as_original: bool,
    *,
    for_comfy: bool = False,
    for_onetrainer: bool = False,
    limited: bool = False,
) -> dict[str, Document]:
    """Return an adapter as one file.

    Args:
        state: the adapter.
        name: `(component, dotted path) -> name of the layer in the file`.
        as_original: whether to write the layers of the original layout.
        for_comfy: whether to write what only ComfyUI needs: the bias of a LoRA as a change of the layer's bias, and the
            names of parameters that are not weights.
        for_onetrainer: whether to give the factors of a LoHa on a convolution the shapes of convolutions.
        limited: whether the adapter is sd-scripts' own OFT.
    """
    state = as_first(state)
    tensors = bundle(state)
    modules: dict[str, str] = {}
    for component, layers in state.layers.items():
        if as_original:
            layers = in_original_layout(layers, state.layouts.get(component, {}))
            layers = join_groups(layers, state.fused.get(component, {}))
        for path, layer in layers.items():
            # In other tools, CLIP has the `text_model.` prefix that transformers 5 dropped.
            prefix = "text_model." if path.startswith("encoder.layers.") else ""
            # A weight that is no layer's has a path of its own.
            module, where = name(component, prefix + path.removesuffix(".weight")), f"{component}.{path}"
            if layer.group:
                raise AdapterError(
                    f"{where}: its lengths are those of {len(layer.group)} layers together, which this format has one "
                    "by one"
                )
            if module in modules:
                raise AdapterError(f"{where}: {modules[module]} has its name in this format")
            modules[module] = where
            is_scale = for_comfy and _SCALES.search(module) is not None
            if is_scale:
                module = f"{module}.scale"
            for spelling, tensor in _spelled(where, layer):
                if is_scale and spelling == _NORM_SPELLINGS["diff"]:
                    spelling = "diff"
                if for_onetrainer and spelling.startswith("hada_w"):
                    tensor = _as_convolution(spelling, tensor, layer, where)
                if for_comfy and spelling == _SPELLINGS["lora_bias"]:
                    spelling, tensor = "diff_b", tensor * layer.scale
                if limited and as_original and spelling == "oft_blocks":
                    # For Flux, sd-scripts numbers the blocks of every layer, even of one that is not fused.
                    spelling = "oft_blocks.0"
                tensors[f"{module}.{spelling}"] = tensor
            if layer.widens:
                shape = named(layer.type).geometry(layer.tensors).weight_shape
                tensors[f"{module}.reshape_weight"] = torch.tensor(shape)
            alpha = _alpha(where, layer, ALWAYS_LIMITED if limited else {})
            if alpha is not None:
                tensors[f"{module}.alpha"] = torch.tensor(alpha)
    every = [layer for layers in state.layers.values() for layer in layers.values()]
    ranks = {layer.rank for layer in every}
    metadata = {
        "ss_network_module": "networks.lora" if {layer.type for layer in every} <= {"lora"} else "lycoris.kohya",
        "ss_network_dim": str(max(rank or 0 for rank in ranks)) if len(ranks) == 1 else "Dynamic",
        **kept(state.metadata),
        **stored_settings.entry(every),
        "format": "pt",
    }
    return {"": Document(tensors, metadata)}


def _hashed(documents: dict[str, Document]) -> dict[str, Document]:
    """Return the document with the hashes by which web interfaces identify a file.

    They cover its tensors and its training metadata only. Source: sd-scripts 48d368f `library/train_util.py`,
    `precalculate_safetensors_hashes`.
    """
    document = documents[""]
    training = {key: value for key, value in document.metadata.items() if key.startswith("ss_")}
    content = save({k: t.detach().cpu().contiguous() for k, t in document.tensors.items()}, training)
    start = 8 + int.from_bytes(content[:8], "little")
    hashes = {
        "sshs_model_hash": hashlib.sha256(content[start:]).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(content[_HASH_OFFSET : _HASH_OFFSET + _HASH_BYTES]).hexdigest()[:8],
    }
    return {"": Document(document.tensors, {**document.metadata, **hashes})}


def _refuse_types(state: AdapterState, unknown: Collection[str], program: str) -> None:
    """Raise `AdapterError` if a layer has a type that is `unknown` to a program."""
    for component, layers in state.layers.items():
        for path, layer in layers.items():
            if layer.type in unknown:
                raise AdapterError(f"{component}.{path} is of type {layer.type}, which {program} cannot read")


def _text_encoders(state: AdapterState) -> list[str]:
    return [component for component in state.layers if is_text_encoder(component)]


def _spelled(where: str, layer: LayerState) -> Iterator[tuple[str, Tensor]]:
    """Yield a layer's tensors with the names and shapes of sd-scripts and LyCORIS.

    Args:
        where: component and path of the layer, for messages.
        layer: the layer.
    """
    ones = (1,) * layer.kernel_dims
    if layer.settings.get("scaled_oft"):
        yield "oft_R.scaled_oft", torch.tensor(True)
    for name, tensor in of_other_program(layer.tensors, layer.kernel).items():
        if layer.is_embedding and name in _TRANSPOSED_NAMES:
            # Tools that read these apply them to the weight as it is stored, with its outputs last.
            name, tensor = _TRANSPOSED_NAMES[name], tensor.mT
        if name in _PEFT_ONLY or (name in _OF_PARAMETERS and tensor.ndim > 2):
            raise AdapterError(f"{where}: this format has no place for {name}")
        if name in _POINTWISE:
            tensor = tensor.view(*tensor.shape, *ones)
        elif name == "rescale":
            tensor = tensor.view(-1, 1, *ones)
        elif name == "lokr_w1" and layer.rank is None:
            # Readers ignore alpha if both factors are whole, so PEFT's scale has to be multiplied into one of them.
            tensor = tensor * layer.scale
        elif name == "ia3_w":
            yield "on_input", torch.tensor(int(tensor.shape[1] > 1))
            tensor = tensor.view(1, -1, *ones) if ones else tensor.view(-1)
        if name in named(layer.type).shared:
            # A file cannot hold the same memory twice.
            tensor = tensor.clone()
        spelling = _SPELLINGS.get(name, name)
        if "diff" in layer.tensors and layer.tensors["diff"].ndim == 1:
            spelling = _NORM_SPELLINGS[name]
        yield spelling, tensor


def _as_convolution(name: str, factor: Tensor, layer: LayerState, where: str) -> Tensor:
    """Return a factor of a LoHa in the shape of a convolution, as OneTrainer has it, if its layer is one."""
    if "hada_t1" in layer.tensors:
        raise AdapterError(f"{where}: OneTrainer has no LoHa with a Tucker core")
    if layer.groups > 1 and layer.tensors["hada_w1_a"].shape[0] == layer.outputs:
        raise AdapterError(
            f"{where}: on a convolution of {layer.groups} groups, the factors of OneTrainer's LoHa are those of a "
            "matrix of another shape"
        )
    if not layer.kernel:
        return factor
    kernel = layer.kernel if name.endswith("_b") else (1,) * layer.kernel_dims
    return factor.reshape(len(factor), -1, *kernel)


def _is_limited(layer: LayerState) -> bool:
    return ALWAYS_LIMITED.items() <= layer.settings.items()


def _alpha(where: str, layer: LayerState, implied: Mapping[str, float]) -> float | None:
    """Return the value of a layer's alpha tensor, `None` for no tensor. Some types store a setting in it.

    Args:
        where: component and path of the layer, for messages.
        layer: the layer.
        implied: settings that the prefix of the layer's name stands for.

    Raises:
        AdapterError: the layer has a setting that the format has no place for.
    """
    adapter_type = named(layer.type)
    if layer.type in BY_TYPE:
        # The settings of types that other programs do not have in this layout are in the metadata.
        return layer.alpha if layer.alpha is not None or layer.rank is None else float(layer.rank)
    for name, value in layer.settings.items():
        if name not in (adapter_type.alpha_is, "rank", *adapter_type.marks) and value != implied.get(
            name, adapter_type.settings[name]
        ):
            raise AdapterError(f"{where}: this format has no place for {name}={value:g}")
    if adapter_type.alpha_is is not None:
        return float(layer.settings[adapter_type.alpha_is])
    if layer.rank is None:
        # LyCORIS reads an alpha for every LoKr, even if it has no effect.
        return 1.0 if "lokr_w1" in layer.tensors else None
    return float(layer.rank if layer.alpha is None else layer.alpha)
