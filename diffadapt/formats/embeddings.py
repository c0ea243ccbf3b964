"""Learned token embeddings (textual inversions): beside the layers in any adapter file, or a file of nothing else.

* `bundle_emb.<token>.<text encoder>`: OneTrainer, one tensor for each text encoder, and with `_out` behind it one that
  replaces what the text encoder gives where the token is, and not what it reads, which then is zero;
  `bundle_emb.<token>.string_to_param.*`: LyCORIS, kohya and A1111, whatever was in the embedding's own file.
* `<token>`: cloneofsimo, and diffusers' `learned_embeds`, where the one key is the token, with or without brackets.
* `clip_l`, `clip_g`, `t5`: ComfyUI and OneTrainer, the file's name is the token; and the pivotal tuning of diffusers'
  advanced scripts, where every row is a token of its own, `<s0>`, `<s1>` and so on. Those called the text encoders
  `text_encoders_0` and `text_encoders_1` at first.
* `emb_params`: A1111; `emp_params`: OneTrainer's older spelling. The file's name is the token.

Sources: diffusers 0.42.1 `loaders/textual_inversion.py` and `examples/advanced_diffusion_training`, OneTrainer 23df383
`modules/modelSaver`, LyCORIS f49d30d `tools`, A1111 `modules/textual_inversion`, ComfyUI `comfy/sd1_clip.py`.
"""

import re
from collections.abc import Mapping

from torch import Tensor

from diffadapt.errors import AdapterError
from diffadapt.formats.document import AdapterState
from diffadapt.formats.format import Format, Header
from diffadapt.formats.names import Names
from diffadapt.formats.verdicts import Unused, Vectors, Verdict

_BUNDLED = re.compile(r"bundle_emb\.(.+?)\.(string_to_(?:param|token)\..+|[^.]+)")
_BRACKETED = re.compile(r"<[^<>]+>")
_NAMELESS = re.compile(r"(?:clip_[lgh]|t5(?:xxl)?|llama|gemma|qwen)(?:_out)?|em[bp]_params(?:_out)?|string_to_.+")
_PIVOTAL = {"text_encoders_0": "clip_l", "text_encoders_1": "clip_g"}
_ANY = "string_to_param.*"
OUTPUT = "_out"
"""What is behind the name of a text encoder whose output the vectors are."""


def embedded(key: str) -> Vectors | Unused | None:
    """The verdict on a key that speaks of a token wherever it stands, `None` for any other."""
    if not key.startswith(("bundle_emb.", "<")):
        return None
    bundled = _BUNDLED.fullmatch(key)
    if bundled is not None:
        return _vectors(bundled[1], bundled[2])
    return Vectors(key, _ANY) if _BRACKETED.fullmatch(key) else None


def bundled(state: AdapterState) -> dict[str, Tensor]:
    """The adapter's learned vectors, by their keys in a file."""
    return {f"bundle_emb.{token}.{written}": vectors for (token, written), vectors in state.embeddings.items()}


def refuse(state: AdapterState, format: str) -> None:
    """Raise `AdapterError` if there are learned vectors, for which `format` has no place."""
    if state.embeddings:
        tokens = ", ".join(dict.fromkeys(token for token, _ in state.embeddings))
        raise AdapterError(
            f"format={format!r} has no place for the learned tokens ({tokens}); use 'kohya', 'onetrainer' or 'comfy'"
        )


def _vectors(token: str | None, written: str) -> Vectors | Unused:
    """OneTrainer's output embeddings: Nerogar/OneTrainer `modules/model/BaseModel.py`, `_apply_output_embeddings`."""
    if written.startswith("string_to_token"):
        return Unused("bookkeeping of a trainer, without effect", harmless=True)
    return Vectors(token, written, output=written.endswith(OUTPUT))


def _alone(key: str) -> Verdict | None:
    """The verdict on a key in a file that holds nothing but learned vectors."""
    if key in _PIVOTAL:
        return Vectors(None, _PIVOTAL[key], apart=True)
    return _vectors(None, key) if _NAMELESS.fullmatch(key) else embedded(key)


def _verdicts(header: Header) -> Mapping[str, Verdict | None]:
    found = {key: _alone(key) for key in header.keys}
    if len(found) == 1:
        # diffusers: the one key is the token, whatever it looks like; "*" is A1111's for the file's name.
        key = header.keys[0]
        if found[key] is None and "." not in key and len(header.shapes.get(key, ())) in (1, 2):
            found[key] = Vectors(None if key == "*" else key, _ANY)
    return found


def _matches(header: Header) -> bool:
    found = _verdicts(header)
    return bool(found) and None not in found.values()


def _locate(header: Header, names: Names) -> dict[str, Verdict]:
    return {key: verdict for key, verdict in _verdicts(header).items() if verdict is not None}


EMBEDDINGS = Format("embeddings", _matches, _locate, lambda header: lambda component, path, rank: None, None)
