"""The dialects of adapter files: how each program names layers and tensors, and where it stores alpha.

They follow the code of the programs and do not use the library's writers, with one exception: which layers of a model
are fused in its original layout is taken from `diffadapt.families`, whose tables `test_families` compares with
diffusers' converters of whole checkpoints. The sources are named in `diffadapt/formats/`.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Literal

import torch
from torch import Tensor, nn

from diffadapt import families
from diffadapt.runtime.targets import Targets
from tests.support.formulas import Content, Method


@dataclass(frozen=True)
class Layer:
    """A layer of a file.

    Attributes:
        stem: Its name there: the key without the name of the tensor.
        component: The component of the pipeline that it belongs to.
        parts: The layers of the model that it consists of, in the order of its outputs.
        swapped: The second half of its outputs comes first.
    """

    stem: str
    component: str
    parts: tuple[str, ...]
    swapped: bool = False

    def joined(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the tensor of the file's layer, given those of the model's layers."""
        whole = torch.cat(list(tensors))
        return torch.cat(whole.chunk(2)[::-1]) if self.swapped else whole

    def split(self, whole: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """Return the tensors of the model's layers, given that of the file's layer."""
        return list((torch.cat(whole.chunk(2)[::-1]) if self.swapped else whole).split(list(sizes)))


Models = Mapping[str, nn.Module]
Hosts = Mapping[str, Sequence[str]]
"""Component -> paths of the layers to write; text encoders come last."""


@dataclass(frozen=True)
class Dialect:
    """One way of writing files.

    Attributes:
        name: The common name.
        format: The name of the format in the library.
        layers: `(family, models, paths)` -> the file's layers; none if nobody writes this dialect for the family.
        spellings: Name of a tensor in `formulas` -> its name in keys; a tensor without one cannot be written.
        text_spellings: The names in text encoders that differ.
        alpha: Where the alpha of a layer is stored: in a tensor, in the header as PEFT's options, in the header as two
            entries for all layers, or in a config.
        separator: What stands between the names of layer and tensor.
        takes: Further conditions on the content of a layer.
        whole: A file has every layer or none.
        small: The only model of `denoisers.SMALL` that the dialect is for.
        methods: Files have the types that PEFT alone trains, too.
    """

    name: str
    format: str
    layers: Callable[[str, Models, Hosts], list[Layer]]
    spellings: Mapping[str, str]
    text_spellings: Mapping[str, str] = field(default_factory=dict[str, str])
    alpha: Literal["tensor", "metadata", "entries", "config"] | None = "tensor"
    separator: str = "."
    takes: Callable[[Content], bool] = lambda content: True
    whole: bool = False
    small: str | None = None
    methods: bool = False

    def holds(self, content: Content) -> bool:
        """Return whether the dialect can express all of the content."""
        if content.method is not None:
            return self.methods
        number = content.tensors.get("alpha")
        if number is not None and (self.alpha is None or (self.alpha != "tensor" and not number.isfinite())):
            return False
        if self.alpha != "config" and _needs_config(content):
            return False
        if self.alpha == "entries" and number is None:
            return False
        return set(content.tensors) - {"alpha"} <= set(self.spellings) and self.takes(content)

    def spelled(self, layer: Layer, content: Content) -> dict[str, Tensor]:
        """Return the tensors of one layer by key."""
        if content.method is not None:
            return self._spelled_method(layer, content, content.method)
        text = self.text_spellings if layer.component.startswith("text_encoder") else {}
        spellings = {**self.spellings, **text, **({"alpha": "alpha"} if self.alpha == "tensor" else {})}
        # PEFT rotates inputs everywhere, OneTrainer the weight of a convolution, in the opposite direction.
        inverts = self.spellings in (PEFT, PEFT_IN_MEMORY) and content.weight.ndim == 4
        return {
            f"{layer.stem}{self.separator}{spellings[name]}": -tensor if inverts and name == "oft_R.weight" else tensor
            for name, tensor in content.tensors.items()
            if name in spellings
        }

    def _spelled_method(self, layer: Layer, content: Content, method: Method) -> dict[str, Tensor]:
        """Return the tensors of one layer by key, without shared ones: PEFT's names, or those of LyCORIS' layout."""
        if self.alpha == "config":
            tensors = {name: tensor for name, tensor in content.tensors.items() if name != "alpha"}
        else:
            tensors = {_in_lycoris(name): tensor for name, tensor in {**content.tensors, **method.derived}.items()}
        return {f"{layer.stem}{self.separator}{name}": tensor for name, tensor in tensors.items()}


def _in_lycoris(name: str) -> str:
    """Return the name of a tensor of one of PEFT's methods in LyCORIS' layout, where a name has no dots."""
    if name in ("lora_A", "lora_B"):
        return _DOWN_UP[f"{name}.weight"]
    plain = name.removesuffix(".weight").replace("encoders.", "encoder_").replace("decoders.", "decoder_")
    if plain.startswith("osf_svd_params."):
        return f"osf_{plain.removeprefix('osf_svd_params.').removesuffix('_low')}"
    return plain.replace("psoft_R.vector", "psoft_vector").replace(".", "_")


def _needs_config(content: Content) -> bool:
    """Return whether the same tensors mean something else without a PEFT config."""
    return "alpha" in content.config or content.config.get("use_cayley_neumann") is False


# Tensors

_KRONECKER = [f"lokr_w{n}{side}" for n in "12" for side in ("", "_a", "_b")]
_HADAMARD = [f"hada_w{n}_{side}" for n in "12" for side in "ab"]
_FACTORS = {"lora_A.weight": "lora_A.weight", "lora_B.weight": "lora_B.weight"}
_DOWN_UP = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight", "lora_B.bias": "lora_up.bias"}
_LYCORIS = {
    **{name: name for name in (*_KRONECKER, *_HADAMARD)},
    **{name: name for name in ("lora_mid.weight", "dora_scale", "diff", "diff_b", "w_norm", "b_norm", "rescale")},
    **{
        name: name
        for name in ("oft_blocks", "oft_diag", "oft_R.weight", "oft_R.scaled_oft", "initial_norm", "on_input")
    },
    **{f"{name}.weight": f"{name}.weight" for name in ("a1", "a2", "b1", "b2", "q_layer", "p_layer")},
    "lambda_layer": "lambda_layer",
    "ia3_w": "weight",
}
KOHYA = {**_DOWN_UP, **_LYCORIS}
COMFY = {**_FACTORS, "lora_B.bias": "lora_B.bias", **_LYCORIS}
DIFFUSERS = {**_FACTORS, "lora_B.bias": "lora_B.bias", "lora_magnitude_vector": "lora_magnitude_vector"}
PEFT = {
    **DIFFUSERS,
    **{name: name for name in (*_KRONECKER, *_HADAMARD, "boft_R", "boft_s", "ia3_l", "oft_R.weight")},
}
PEFT_IN_MEMORY = {
    name: f"{name.removesuffix('.weight')}.default.weight" if name.endswith(".weight") else f"{name}.default"
    for name in PEFT
    if name != "lora_B.bias"
} | {"lora_magnitude_vector": "lora_magnitude_vector.default.weight"}
OLD = {"lora_A.weight": "lora.down.weight", "lora_B.weight": "lora.up.weight"}
OLD_TEXT = {"lora_A.weight": "lora_linear_layer.down.weight", "lora_B.weight": "lora_linear_layer.up.weight"}
DOWN, UP = {"lora_A.weight": "down.weight"}, {"lora_B.weight": "up.weight"}

# Layers

_UNETS = ("sd", "sd2", "sdxl")
_TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
KOHYA_TEXT = {
    "sd": ("lora_te_",),
    "sd2": ("lora_te_",),
    "sdxl": ("lora_te1_", "lora_te2_"),
    "sd3": ("lora_te1_", "lora_te2_", "lora_te3_"),
    # In sd-scripts T5 is the third, even without a second CLIP.
    "flux": ("lora_te1_", "lora_te3_"),
}
_ONETRAINER_TEXT = {**KOHYA_TEXT, "flux": ("lora_te1_", "lora_te2_")}
COMFY_TEXT = {
    "sd": ("clip_l",),
    "sd2": ("clip_h",),
    "sdxl": ("clip_l", "clip_g"),
    "sd3": ("clip_l", "clip_g", "t5xxl"),
    "flux": ("clip_l", "t5xxl"),
}


@cache
def original_names(model: nn.Module) -> dict[str, tuple[tuple[str, ...], bool]]:
    """Return original name of a layer -> the layers of the model, and whether the halves of its outputs are swapped."""
    targets = Targets(model)
    # The names of a layout that is only read are among the aliases.
    written = {name: tuple(piece for piece, _ in parts) for name, parts in families.layout(targets).items()}
    found = written or families.aliases(targets)
    return {name: (tuple(piece.path for piece in pieces), pieces[0].swapped) for name, pieces in found.items()}


def _own(family: str, model: nn.Module, paths: Sequence[str]) -> list[tuple[str, tuple[str, ...], bool]]:
    return [(path, (path,), False) for path in paths]


def _original(family: str, model: nn.Module, paths: Sequence[str]) -> list[tuple[str, tuple[str, ...], bool]]:
    """Name layers as in the original layout; a fused layer needs all of its parts."""
    wanted, named = set(paths), original_names(model)
    found = [(name, parts, swapped) for name, (parts, swapped) in named.items() if wanted.issuperset(parts)]
    covered = {part for _, parts, _ in found for part in parts}
    return found + _own(family, model, [path for path in paths if path not in covered])


def _numbered(family: str, model: nn.Module, paths: Sequence[str]) -> list[tuple[str, tuple[str, ...], bool]]:
    """Name layers as in the original layout, with the parts of fused layers numbered."""
    return [
        (name if len(parts) == 1 else f"{name}.{number}", (part,), swapped)
        for name, parts, swapped in _original(family, model, paths)
        for number, part in enumerate(parts)
    ]


def _as_sd_scripts(family: str, model: nn.Module, paths: Sequence[str]) -> list[tuple[str, tuple[str, ...], bool]]:
    return (_own if family in _UNETS else _original)(family, model, paths)


def _named(
    naming: Callable[[str, nn.Module, Sequence[str]], list[tuple[str, tuple[str, ...], bool]]],
    prefix: Callable[[str, str], str],
    text: Mapping[str, Sequence[str]] | None = None,
    *,
    flat: bool = False,
    alone: bool = False,
    only: Callable[[str, Models], bool] = lambda family, models: True,
) -> Callable[[str, Models, Hosts], list[Layer]]:
    """Return the `layers` of a dialect that names every layer.

    Args:
        naming: Names the layers of a denoiser.
        prefix: `(family, component)` -> the prefix of the denoiser's names.
        text: Family -> the prefixes of text encoders, in the order of the pipeline; `None` for files without them.
        flat: Underscores instead of dots.
        alone: Files hold the first denoiser only, not the other models that some families have.
        only: Whether such files exist for a family.
    """

    def layers(family: str, models: Models, hosts: Hosts) -> list[Layer]:
        found: list[Layer] = []
        if not only(family, models):
            return found
        for component, paths in hosts.items():
            if component in _TEXT_ENCODERS:
                if text is None or family not in text:
                    continue
                before = text[family][_TEXT_ENCODERS.index(component)]
                # CLIP's paths had a `text_model` level before transformers 5, and files still have it.
                level = "text_model." if any(path.startswith("encoder.layers.") for path in paths) else ""
                named = [(level + path, (path,), False) for path in paths]
            elif alone and found:
                continue
            else:
                before, named = prefix(family, component), naming(family, models[component], paths)
            for name, parts, swapped in named:
                found.append(Layer(before + (name.replace(".", "_") if flat else name), component, parts, swapped))
        return found

    return layers


def _always(prefix: str) -> Callable[[str, str], str]:
    return lambda family, component: prefix


def _kohya_prefix(family: str, component: str) -> str:
    return "lora_prior_unet_" if component == "prior" else "lora_unet_"


def _onetrainer_prefix(family: str, component: str) -> str:
    return "lora_prior_unet_" if component == "prior" else f"lora_{component}_"


def _has_original(family: str, models: Models) -> bool:
    return bool(original_names(next(iter(models.values()))))


def _has_fused(family: str, models: Models) -> bool:
    return any(len(parts) > 1 for parts, _ in original_names(next(iter(models.values()))).values())


def _processors(family: str, models: Models, hosts: Hosts) -> list[Layer]:
    """Name layers as diffusers before 0.17: as parts of the attention processor, without the component."""
    found: list[Layer] = []
    if family in _UNETS:
        for path in hosts.get("unet", ()):
            match = re.fullmatch(r"(.*attn[12])\.(to_[qkv]|to_out)(?:\.0)?", path)
            if match:
                found.append(Layer(f"{match[1]}.processor.{match[2]}_lora", "unet", (path,)))
    return found


def _xlabs(family: str, models: Models, hosts: Hosts) -> list[Layer]:
    found: list[Layer] = []
    if family == "flux":
        for name, parts, _ in _original(family, models["transformer"], hosts.get("transformer", ())):
            match = re.fullmatch(r"(double|single)_blocks\.(\d+)\.(?:(img|txt)_attn\.(qkv|proj)|(linear[12]))", name)
            if match:
                stream = {"img": "1", "txt": "2"}.get(match[3], "")
                projection = match[4] or {"linear1": "qkv", "linear2": "proj"}[match[5]]
                # Of the first layer of a single block, only query, key and value.
                stem = f"{match[1]}_blocks.{match[2]}.processor.{projection}_lora{stream}"
                found.append(Layer(stem, "transformer", parts[:3]))
    return found


def numbered_layers(component: str, paths: Sequence[str]) -> list[str]:
    """Return the layers of a component in the order of cloneofsimo's files, given the paths of all of them.

    It is the order of diffusers 0.11: down, up, middle; within a block attention, feed-forward, cross-attention.
    """
    if component == "text_encoder":
        texts = [path.removesuffix(".k_proj") for path in paths if path.endswith("self_attn.k_proj")]
        return [f"{path}.{layer}_proj" for path in texts for layer in ("k", "v", "q", "out")]
    firsts = [path.removesuffix(".attn1.to_q") for path in paths if path.endswith(".attn1.to_q")]
    blocks = [path for start in ("down", "up", "mid") for path in firsts if path.startswith(start)]
    attention = ("to_q", "to_k", "to_v", "to_out.0")
    inside = (*(f"attn1.{name}" for name in attention), "ff.net.0.proj", *(f"attn2.{name}" for name in attention))
    return [f"{block}.{layer}" for block in blocks for layer in inside]


def _cloneofsimo(family: str, models: Models, hosts: Hosts) -> list[Layer]:
    if family not in ("sd", "sd2"):
        return []
    return [
        Layer(f"{component}:{number}", component, (path,))
        for component in ("unet", "text_encoder")
        for number, path in enumerate(numbered_layers(component, hosts.get(component, ())))
    ]


def _diffusers_text(family: str) -> Sequence[str]:
    return [f"{component}." for component in _TEXT_ENCODERS]


_EVERY_TEXT = {family: _diffusers_text(family) for family in KOHYA_TEXT}
_COMFY_PREFIXES = {
    family: [f"text_encoders.{name}.transformer." for name in names] for family, names in COMFY_TEXT.items()
}


def _component(family: str, component: str) -> str:
    return f"{component}."


def _of_unets(family: str, models: Models) -> bool:
    return family in _UNETS


DIALECTS: tuple[Dialect, ...] = (
    Dialect("kohya", "kohya", _named(_as_sd_scripts, _kohya_prefix, KOHYA_TEXT, flat=True), KOHYA),
    Dialect(
        "kohya, LDM names",
        "kohya",
        _named(_original, _always("lora_unet_"), KOHYA_TEXT, flat=True, only=_of_unets),
        KOHYA,
    ),
    Dialect("LyCORIS", "kohya", _named(_own, _always("lycoris_"), flat=True, alone=True), KOHYA, methods=True),
    Dialect(
        "OneTrainer",
        "kohya",
        _named(_own, _onetrainer_prefix, _ONETRAINER_TEXT, flat=True, alone=True),
        KOHYA,
    ),
    Dialect("OneTrainer, parts", "diffusers", _named(_numbered, _always("transformer."), only=_has_fused), KOHYA),
    Dialect("ComfyUI", "comfy", _named(_original, _always("diffusion_model."), _COMFY_PREFIXES), COMFY),
    Dialect("native", "diffusers", _named(_original, _always(""), only=_has_original), KOHYA),
    Dialect("diffusers", "diffusers", _named(_own, _component, _EVERY_TEXT), DIFFUSERS, alpha="metadata"),
    Dialect("diffusers, alpha tensors", "diffusers", _named(_own, _component, _EVERY_TEXT), DIFFUSERS),
    Dialect(
        "ComfyUI, alpha in header",
        "comfy",
        _named(_original, _always("diffusion_model."), alone=True),
        _FACTORS,
        alpha="metadata",
    ),
    Dialect(
        "diffusers, alpha and rank in header",
        "diffusers",
        _named(_own, _component, alone=True),
        _FACTORS,
        alpha="entries",
        takes=lambda content: (float(content.tensors["alpha"]), len(content.tensors["lora_A.weight"])) == (2.0, 4),
    ),
    Dialect(
        "diffusers, old",
        "diffusers",
        _named(_own, _component, _EVERY_TEXT, only=_of_unets),
        OLD,
        text_spellings=OLD_TEXT,
        alpha=None,
    ),
    Dialect("diffusers, oldest", "diffusers", _processors, {**DOWN, **UP}, alpha=None),
    Dialect(
        "PEFT folder",
        "peft",
        _named(_own, _always("base_model.model."), alone=True),
        PEFT,
        alpha="config",
        methods=True,
    ),
    Dialect("PEFT, bare", "peft", _named(_own, _always("base_model.model."), alone=True), PEFT_IN_MEMORY, alpha=None),
    Dialect("DiffSynth", "diffusers", _named(_own, _always(""), alone=True), PEFT_IN_MEMORY, alpha=None),
    Dialect("XLabs", "xlabs", _xlabs, {**DOWN, **UP}, alpha=None),
    Dialect(
        "cloneofsimo",
        "cloneofsimo",
        _cloneofsimo,
        {"lora_A.weight": "down", "lora_B.weight": "up"},
        alpha=None,
        separator=":",
        whole=True,
    ),
    Dialect(
        "sd-scripts OFT",
        "kohya",
        _named(_own, _always("oft_unet_"), flat=True, only=_of_unets),
        {"oft_blocks": "oft_blocks"},
        # It constrains every rotation; an alpha of 0 allows none.
        takes=lambda content: bool(content.tensors["alpha"] > 0),
    ),
    Dialect(
        "BFL control",
        "bfl-control",
        _named(_original, _always("")),
        {**_FACTORS, "lora_B.bias": "lora_B.bias", "scale": "scale"},
        alpha=None,
        whole=True,
        small="flux control",
    ),
)
