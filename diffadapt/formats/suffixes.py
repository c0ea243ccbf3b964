"""How files spell the tensor name at the end of a key, in every dialect, and which keys are not tensors of a layer.

Sources: diffusers 0.42.1 `loaders/` and `utils/state_dict_utils.py`, PEFT 0.21.2, LyCORIS f49d30d, sd-scripts 48d368f,
OneTrainer 23df383, ComfyUI `comfy/weight_adapter/`.
"""

import re
from collections.abc import Callable, Collection

from diffadapt.formats import peft_methods, prefixes
from diffadapt.formats.embeddings import token_verdict
from diffadapt.formats.format import Header
from diffadapt.formats.header_alpha import METADATA
from diffadapt.formats.verdicts import BESIDE, Place, Unused, Verdict
from diffadapt.types import TYPES

# Tensors are spelled by their canonical names, unless an ecosystem has other names for them.
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
    "q_layer.weight": "q_layer",
    "p_layer.weight": "p_layer",
    "oft_R.scaled_oft": "scaled_oft",
    "trainable_tokens_delta": "token_rows",
    "token_adapter.trainable_tokens_delta": "token_rows",
    **{
        spelling: name
        for method in peft_methods.BY_NAME.values()
        for names in (method.names, method.embedding_names, method.other_names)
        for name, spelling in names.items()
    },
    **{name: name for name in BESIDE if name not in ("alpha", "set_bias", "scaled_oft")},
}

_PARAMETERS = frozenset(
    name
    for name in _SPELLINGS
    if name.startswith(("lora_embedding_", "lora_magnitude_vector", "hada_", "lokr_", "oft_", "boft_", "ia3_l"))
)
_PROCESSORS = {"to_q_lora": "to_q", "to_k_lora": "to_k", "to_v_lora": "to_v", "to_out_lora": "to_out.0"}
_TEXT_PROJECTIONS = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out.0": "out_proj"}

_OF_MODULATION = ".diff_m"
"""The end of keys for the table of a block's modulation (lightx2v), a parameter of no layer."""
_LEFT_OUT = Unused(
    "a change of the block's own modulation (lightx2v), a parameter that this model does not have; it is left out",
    harmless=True,
    lost=True,
)
_PEFT_OFT = re.compile(r"\.oft_R\.[^.]+\.weight$")
"""A key that contains the name of an adapter, as PEFT has it in memory."""
_BOOKKEEPING = re.compile(r"_aux\.|sshs_|ss_|modelspec\.")


def locate_keys(keys: Collection[str], place: Callable[[str, str], Verdict]) -> dict[str, Verdict]:
    """Return a verdict for every key.

    Args:
        keys: all keys of a file.
        place: `(path, canonical tensor name) -> verdict`, for keys that name a tensor of an adapter. All tensors of a
            path get the same place, which is looked up once, so it must not depend on the name.
    """
    flagged = {key.removesuffix(".on_input") for key in keys if key.endswith(".on_input")}
    places: dict[str, Place] = {}
    verdicts: dict[str, Verdict] = {}
    for key in keys:
        found = split_key(key)
        if flagged and found is None and key.endswith(".weight") and (path := key.removesuffix(".weight")) in flagged:
            # A bare weight belongs to an adapter only if LyCORIS' flag is next to it.
            found = path, "ia3_w"
        known = None if found is None else places.get(found[0])
        if found is not None and known is not None:
            verdicts[key] = Place(known.component, known.path, found[1], known.written, known.parts)
            continue
        if key.endswith(_OF_MODULATION):
            verdict = place(f"{key.removesuffix(_OF_MODULATION)}.modulation", "diff")
            verdicts[key] = verdict if isinstance(verdict, Place) else _LEFT_OUT
            continue
        other = _other_verdict(key)
        if other is not None:
            verdicts[key] = other
        elif found is None:
            verdicts[key] = Unused("not the name of an adapter tensor")
        else:
            verdict = verdicts[key] = place(*found)
            if isinstance(verdict, Place) and verdict.name == found[1]:
                places[found[0]] = verdict
    return verdicts


def is_oft_of_peft(header: Header) -> bool:
    """Return whether the file is PEFT's, if it is an OFT. OneTrainer rotates convolutions in the opposite direction."""
    return (
        header.config is not None
        or "oft_" in header.metadata.get(METADATA, "")
        or any(key.startswith(prefixes.PEFT) or _PEFT_OFT.search(key) for key in header.keys if "oft_R" in key)
    )


def is_by_head(keys: Collection[str]) -> bool:
    """Return whether a file has the rows of fused layers as in a checkpoint that stores them head by head.

    That is a mark of DiffSynth-Studio, which writes PEFT's names in memory; see `Family.by_head`.
    """
    return any(".lora_A.default.weight" in key or ".lora_B.default.weight" in key for key in keys)


def _other_verdict(key: str) -> Verdict | None:
    """Return the verdict on a known key that is not a tensor of a layer, `None` for any other key."""
    if _BOOKKEEPING.match(key):
        return Unused("bookkeeping of a trainer, without effect", harmless=True)
    return token_verdict(key)


def split_key(key: str) -> tuple[str, str] | None:
    """Return the module path and the canonical tensor name of a key, or `None` if it names no tensor of a type."""
    path, _, rest = key.partition(".")
    name = _SPELLINGS.get(rest)
    if name is not None:
        # A flattened path, as in most files.
        return path, name
    stem, _, last = key.rpartition(".")
    path, _, second = stem.rpartition(".")
    name = _SPELLINGS.get(f"{second}.{last}")
    if name is not None and path:
        # No spelling of three words ends in one of two.
        return path, name
    words = key.split(".")
    for length in (3, 2, 1):
        if len(words) <= length:
            continue
        name = _SPELLINGS.get(".".join(words[-length:]))
        if name is not None:
            return ".".join(words[:-length]), name
    if len(words) > 3:
        stem, last = words[-3], ".".join(words[-2:])
        if stem in _PROCESSORS and last in ("down.weight", "up.weight"):
            return _processor_layer(words[:-3], _PROCESSORS[stem]), f"lora_{last.removesuffix('.weight')}"
        # PEFT's in-memory names contain the name of the adapter: `lora_A.default.weight`, `hada_w1_a.default`.
        name = _SPELLINGS.get(f"{stem}.{words[-1]}")
        if name is not None:
            return ".".join(words[:-3]), name
    if len(words) > 2 and words[-2] == "oft_R" and words[-1].endswith("_oft"):
        return ".".join(words[:-2]), words[-1]
    if len(words) > 2 and words[-2] in _PARAMETERS and words[-1] not in ("weight", "bias"):
        return ".".join(words[:-2]), _SPELLINGS[words[-2]]
    return None


def _processor_layer(parents: list[str], layer: str) -> str:
    """Return the path of the projection for factors that old files have on the attention processor.

    Args:
        parents: the words of the path before the name of the factors.
        layer: name of the projection in diffusers' own attention.
    """
    if parents[-1:] == ["processor"]:
        parents = parents[:-1]
    if parents[-1:] == ["self_attn"]:
        layer = _TEXT_PROJECTIONS[layer]
    return ".".join((*parents, layer))
