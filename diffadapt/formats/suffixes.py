"""How files spell the tensor at the end of a dotted key, in every dotted dialect.

Sources: diffusers 0.42.1 `loaders/` and `utils/state_dict_utils.py`, PEFT 0.21.2, LyCORIS f49d30d, sd-scripts 48d368f.
"""

from diffadapt.types import TYPES

# A type's tensors are spelled as they are called, unless an ecosystem has another name for them.
_SPELLINGS = {
    **{name: name for kind in TYPES for name in kind.tensors if not name.startswith("lora_") or "magnitude" in name},
    "lora_A.weight": "lora_down",
    "lora_B.weight": "lora_up",
    "lora_B.bias": "lora_bias",
    "lora_embedding_A": "lora_down",
    "lora_embedding_B": "lora_up",
    "lora_down.weight": "lora_down",
    "lora_up.weight": "lora_up",
    "lora_up.bias": "lora_bias",
    "lora_mid.weight": "lora_mid",
    "lora.down.weight": "lora_down",
    "lora.up.weight": "lora_up",
    "lora_linear_layer.down.weight": "lora_down",
    "lora_linear_layer.up.weight": "lora_up",
    "alpha": "alpha",
    "lora_magnitude_vector.weight": "lora_magnitude_vector",
    "magnitude": "lora_magnitude_vector",
    "oft_R.weight": "oft_R",
    "oft_embedding_R.weight": "oft_R",
    "a1.weight": "glora_a1",
    "a2.weight": "glora_a2",
    "b1.weight": "glora_b1",
    "b2.weight": "glora_b2",
    "w_norm": "diff",
    "b_norm": "diff_b",
}

_PROCESSORS = {"to_q_lora": "to_q", "to_k_lora": "to_k", "to_v_lora": "to_v", "to_out_lora": "to_out.0"}
_TEXT_PROJECTIONS = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out.0": "out_proj"}


def canonical(suffix: str) -> str | None:
    """Canonical name of a tensor's spelling, or `None` for an unknown one."""
    return _SPELLINGS.get(suffix)


def split(key: str) -> tuple[str, str] | None:
    """Module path and canonical tensor name of a dotted key, or `None` if no adapter type spells a tensor so."""
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
        # PEFT's in-memory names carry the adapter's name: `lora_A.default.weight`.
        name = _SPELLINGS.get(f"{stem}.{parts[-1]}")
        if name is not None:
            return ".".join(parts[:-3]), name
    if len(parts) > 2 and parts[-2].startswith("lora_embedding_") and parts[-2] in _SPELLINGS:
        return ".".join(parts[:-2]), _SPELLINGS[parts[-2]]
    return None


def _processor_layer(parents: list[str], layer: str) -> str:
    """Old files put factors on the attention processor; they belong to the projections of the attention itself."""
    if parents[-1:] == ["processor"]:
        parents = parents[:-1]
    if parents[-1:] == ["self_attn"]:
        layer = _TEXT_PROJECTIONS[layer]
    return ".".join((*parents, layer))
