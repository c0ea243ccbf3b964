"""cloneofsimo/lora: `unet:<n>:up` and `text_encoder:<n>:down`, with layers identified by number, at a scale of 1.

The number counts the linear layers (in the extended variant also the convolutions) inside modules of certain classes,
in the order of the model that the trainer used. The classes are in the safetensors metadata. Source: cloneofsimo/lora
d84074b `lora_diffusion/lora.py`.
"""

import re
from collections.abc import Sequence

from diffadapt.errors import AdapterError
from diffadapt.formats import suffixes
from diffadapt.formats.format import Format, Header
from diffadapt.formats.metadata import parse_json
from diffadapt.formats.names import Names
from diffadapt.formats.verdicts import Unused, Verdict
from diffadapt.runtime.targets import Targets
from diffadapt.types.layer_spec import LayerSpec

_KEY = re.compile(r"(\w+):(\d{1,6}):(up|down)")
# The classes of attention in old versions of diffusers and transformers -> the one that newer versions have. A file may
# have been written with a version of another age than the one that is installed.
_RENAMED = {
    "CrossAttention": "Attention",
    "CLIPSdpaAttention": "CLIPAttention",
    "CLIPFlashAttention2": "CLIPAttention",
}
_CLASSES = {"unet": ("CrossAttention", "Attention", "GEGLU"), "text_encoder": ("CLIPAttention",)}
_STAGE = re.compile(r"(.*)\.(attn1|ff|attn2)(?:\.|$)")
_UNLIKE = "the layers of this model are not those that the file was made for; it identifies them by number only"


def _matches(header: Header) -> bool:
    return any(_KEY.fullmatch(key) for key in header.keys if ":" in key)


def _locate(header: Header, names: Names) -> dict[str, Verdict]:
    verdicts = suffixes.locate_keys(header.keys, lambda path, name: Unused("a name unlike the others in this file"))
    numbered: dict[str, dict[int, dict[str, str]]] = {}
    for key in header.keys:
        match = _KEY.fullmatch(key)
        if match:
            numbered.setdefault(match[1], {}).setdefault(int(match[2]), {})[match[3]] = key
    for component, layers in numbered.items():
        paths: Sequence[str] | None = None
        if names.models is not None and component in names.models:
            paths = _paths(names.models[component], _classes(header, component), layers, header)
        for number, keys in layers.items():
            for side, key in keys.items():
                if names.has(component) and names.models is not None and paths is None:
                    verdicts[key] = Unused(_UNLIKE, component)
                else:
                    path = str(number) if paths is None else paths[number]
                    verdicts[key] = names.dotted(component, path, f"lora_{side}")
    return verdicts


def _classes(header: Header, component: str) -> set[str]:
    """Return the names of the classes whose inner layers count, with those that they have today."""
    text = header.metadata.get(component)
    found = _CLASSES.get(component, ()) if text is None else parse_json(text, f"the header's {component}")
    if not isinstance(found, (list, tuple)) or not all(isinstance(name, str) for name in found):
        raise AdapterError(f"the header's {component} is {text!r}, expected a list of class names")
    return {_today(str(name)) for name in found}


def _today(name: str) -> str:
    return _RENAMED.get(name, name)


def _paths(
    targets: Targets, classes: set[str], layers: dict[int, dict[str, str]], header: Header
) -> Sequence[str] | None:
    """Return the paths of the model's layers in the file's order, or `None` if the layers do not fit the file.

    Args:
        targets: the paths of the model.
        classes: names of the classes whose inner layers count.
        layers: number of a layer -> "up" or "down" -> key.
        header: the header of the file.
    """
    owners = [path for path, module in targets.model.named_modules() if _today(type(module).__name__) in classes]
    for ordered in (_as_until_2023(owners), owners):
        paths = [
            path
            for owner in ordered
            for path in (f"{owner}.{name}" for name, _ in targets.modules[owner].named_modules() if name)
            if (spec := LayerSpec.of(targets.modules[path])) is not None and spec.kind in ("linear", "conv")
        ]
        if len(paths) == len(layers) and max(layers) < len(paths) and _fits(targets, paths, layers, header):
            return paths
    return None


def _as_until_2023(owners: Sequence[str]) -> Sequence[str]:
    """Return the paths with the feed-forward between the two attentions of a block, as in diffusers before 0.17."""
    first: dict[str, int] = {}
    keys: list[tuple[int, int]] = []
    for position, owner in enumerate(owners):
        stage = _STAGE.match(owner)
        block = stage[1] if stage else owner
        keys.append((first.setdefault(block, position), ("attn1", "ff", "attn2").index(stage[2]) if stage else 0))
    return [owner for _, owner in sorted(zip(keys, owners, strict=True))]


def _fits(targets: Targets, paths: Sequence[str], layers: dict[int, dict[str, str]], header: Header) -> bool:
    """Return whether the factors have the sizes of these layers; factors of unknown shape fit any layer."""
    for number, keys in layers.items():
        spec = LayerSpec.of(targets.modules[paths[number]])
        assert spec is not None
        down, up = (header.shapes.get(keys.get(side, ""), ()) for side in ("down", "up"))
        if (len(down) > 1 and down[1] != spec.in_features) or (len(up) > 1 and up[0] != spec.out_features):
            return False
    return True


CLONEOFSIMO = Format("cloneofsimo", _matches, _locate)
