"""How files spell the tensor at the end of a key, in every dialect, and what else is in files.

Sources: diffusers 0.42.1 `loaders/` and `utils/state_dict_utils.py`, PEFT 0.21.2, LyCORIS f49d30d, sd-scripts 48d368f,
OneTrainer 23df383, ComfyUI `comfy/weight_adapter/`.
"""

import re
from collections.abc import Callable, Collection

from diffadapt.formats.embeddings import embedded
from diffadapt.formats.verdicts import BESIDE, Place, Unused, Verdict
from diffadapt.types import TYPES

# A type's tensors are spelled as they are called, unless an ecosystem has another name for them.
_SPELLINGS = {
    **{
        name: name
        for adapter_type in TYPES
        for name in adapter_type.tensors
        if not name.startswith("lora_") or "magnitude" in name
    },
    "lora_A.weight": "lora_down",
    "lora_B.weight": "lora_up",
    "lora_B.bias": "lora_bias",
    "lora_A": "lora_down",
    "lora_B": "lora_up",
    "lora_a.weight": "lora_down",
    "lora_b.weight": "lora_up",
    "lora_embedding_A": "lora_down",
    "lora_embedding_B": "lora_up",
    "lora_down.weight": "lora_down",
    "lora_up.weight": "lora_up",
    "lora_up.bias": "lora_bias",
    "lora_mid.weight": "lora_mid",
    "lora_down": "lora_down",
    "lora_up": "lora_up",
    "lora_mid": "lora_mid",
    "lora.down": "lora_down",
    "lora.up": "lora_up",
    "lora.down.weight": "lora_down",
    "lora.up.weight": "lora_up",
    "lora_linear_layer.down.weight": "lora_down",
    "lora_linear_layer.up.weight": "lora_up",
    "alpha": "alpha",
    "lora_magnitude_vector.weight": "lora_magnitude_vector",
    "dora_scale.weight": "dora_scale",
    "magnitude": "lora_magnitude_vector",
    "oft_R.weight": "oft_R",
    "oft_embedding_R.weight": "oft_R",
    "a1.weight": "glora_a1",
    "a2.weight": "glora_a2",
    "b1.weight": "glora_b1",
    "b2.weight": "glora_b2",
    "w_norm": "diff",
    "b_norm": "diff_b",
    "oft_R.scaled_oft": "scaled_oft",
    **{name: name for name in BESIDE if name not in ("alpha", "set_bias", "scaled_oft")},
}

_PARAMETERS = frozenset(
    name
    for name in _SPELLINGS
    if name.startswith(("lora_embedding_", "lora_magnitude_vector", "hada_", "lokr_", "oft_", "boft_", "ia3_l"))
)
_PROCESSORS = {"to_q_lora": "to_q", "to_k_lora": "to_k", "to_v_lora": "to_v", "to_out_lora": "to_out.0"}
_TEXT_PROJECTIONS = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out.0": "out_proj"}


_MODULATION = "a change of the block's own modulation (lightx2v), which is a parameter of no layer; pass strict=False"
_BOOKKEEPING = re.compile(r"_aux\.|sshs_|ss_|modelspec\.")


def located(keys: Collection[str], place: Callable[[str, str], Verdict]) -> dict[str, Verdict]:
    """A verdict for every key: that of `place(path, name)` for those that name a tensor of an adapter.

    The tensors of one path have one place, which is looked up once: it must not depend on the name.
    """
    flagged = {key.removesuffix(".on_input") for key in keys if key.endswith(".on_input")}
    places: dict[str, Place] = {}
    verdicts: dict[str, Verdict] = {}
    for key in keys:
        found = split(key)
        if flagged and found is None and key.endswith(".weight") and (path := key.removesuffix(".weight")) in flagged:
            # Of all bare weights only those with LyCORIS' flag beside them are an adapter's.
            found = path, "ia3_w"
        known = None if found is None else places.get(found[0])
        if found is not None and known is not None:
            verdicts[key] = Place(known.component, known.path, found[1], known.written, known.parts)
            continue
        aside = _aside(key)
        if aside is not None:
            verdicts[key] = aside
        elif found is None:
            verdicts[key] = Unused("not the name of an adapter tensor")
        else:
            verdict = verdicts[key] = place(*found)
            if isinstance(verdict, Place) and verdict.name == found[1]:
                places[found[0]] = verdict
    return verdicts


def _aside(key: str) -> Verdict | None:
    """The verdict on what is in adapter files and is no tensor of a layer."""
    if _BOOKKEEPING.match(key):
        return Unused("bookkeeping of a trainer, without effect", harmless=True)
    if key.endswith(".diff_m"):
        return Unused(_MODULATION)
    return embedded(key)


def split(key: str) -> tuple[str, str] | None:
    """Module path and canonical tensor name of a dotted key, or `None` if no adapter type spells a tensor so."""
    path, _, rest = key.partition(".")
    name = _SPELLINGS.get(rest)
    if name is not None:
        # A flattened path, as most files have.
        return path, name
    stem, _, last = key.rpartition(".")
    path, _, second = stem.rpartition(".")
    name = _SPELLINGS.get(f"{second}.{last}")
    if name is not None and path:
        # No spelling of three parts ends in one of two.
        return path, name
    parts = key.split(".")
    for length in (3, 2, 1):
        if len(parts) <= length:
            continue
        name = _SPELLINGS.get(".".join(parts[-length:]))
        if name is not None:
            return ".".join(parts[:-length]), name
    if len(parts) > 3:
        stem, last = parts[-3], ".".join(parts[-2:])
        if stem in _PROCESSORS and last in ("down.weight", "up.weight"):
            return _processor_layer(parts[:-3], _PROCESSORS[stem]), f"lora_{last.removesuffix('.weight')}"
        # PEFT's in-memory names carry the adapter's name: `lora_A.default.weight`, `hada_w1_a.default`.
        name = _SPELLINGS.get(f"{stem}.{parts[-1]}")
        if name is not None:
            return ".".join(parts[:-3]), name
    if len(parts) > 2 and parts[-2] in _PARAMETERS and parts[-1] not in ("weight", "bias"):
        return ".".join(parts[:-2]), _SPELLINGS[parts[-2]]
    return None


def _processor_layer(parents: list[str], layer: str) -> str:
    """Old files put factors on the attention processor; they belong to the projections of the attention itself."""
    if parents[-1:] == ["processor"]:
        parents = parents[:-1]
    if parents[-1:] == ["self_attn"]:
        layer = _TEXT_PROJECTIONS[layer]
    return ".".join((*parents, layer))
