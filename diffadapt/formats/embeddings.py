"""Learned token embeddings (textual inversions): next to the layers in any adapter file, or in a file of their own.

* `bundle_emb.<token>.<text encoder>`: OneTrainer, one tensor per text encoder. With `_out` at the end, the vectors
  replace the output of the text encoder at the token; its input there is zero unless the file has vectors for it too.
  `bundle_emb.<token>.string_to_param.*`: LyCORIS, kohya and A1111, with the content of the embedding's own file.
* `<token>`: cloneofsimo, and diffusers' `learned_embeds`, whose only key is the token, with or without brackets.
* `clip_l`, `clip_g`, `t5`: ComfyUI and OneTrainer, where the file name is the token; and the pivotal tuning of
  diffusers' advanced scripts, where every row is a token of its own, `<s0>`, `<s1>` and so on. Those scripts called the
  text encoders `text_encoders_0` and `text_encoders_1` at first.
* `emb_params`: A1111; `emp_params`: OneTrainer's older spelling. The file name is the token.

Sources: diffusers 0.42.1 `loaders/textual_inversion.py` and `examples/advanced_diffusion_training`, OneTrainer 23df383
`modules/modelSaver`, LyCORIS f49d30d `tools`, A1111 `modules/textual_inversion`, ComfyUI `comfy/sd1_clip.py`.
"""

import re
from collections.abc import Mapping

import torch
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
_PIVOTAL_ENCODERS = {"clip_l", "clip_g", "t5"}

PIVOTAL_FILE = re.compile(r"embeddings|.*_emb")
"""Names of the file that diffusers' pivotal tuning writes next to the LoRA. Its tokens are `<s0>`, `<s1>` and so on."""

OUTPUT = "_out"
"""Suffix of the name of a text encoder if the vectors replace its output."""


def token_verdict(key: str) -> Vectors | Unused | None:
    """Return the verdict on a key that refers to a token in any kind of file, `None` for any other key."""
    if not key.startswith(("bundle_emb.", "<")):
        return None
    bundled = _BUNDLED.fullmatch(key)
    if bundled is not None:
        return _vectors(bundled[1], bundled[2])
    return Vectors(key, _ANY) if _BRACKETED.fullmatch(key) else None


def bundle(state: AdapterState) -> dict[str, Tensor]:
    """Return the adapter's learned vectors by their keys in a file, as OneTrainer spells them."""
    return {f"bundle_emb.{token}.{written}": vectors for (token, written), vectors in state.embeddings.items()}


def own_file(state: AdapterState) -> dict[str, Tensor]:
    """Return learned vectors as kohya's sd-scripts and A1111 write them, if the file is named after their only token.

    Vectors of several tokens, or in a file of another name, have their token in the keys; see `bundle`.
    """
    tokens = {token for token, _ in state.embeddings}
    if tokens != {state.name} or any(written.endswith(OUTPUT) for _, written in state.embeddings):
        return bundle(state)
    if len(state.embeddings) == 1:
        return {"emb_params": next(iter(state.embeddings.values()))}
    return {written: vectors for (_, written), vectors in state.embeddings.items()}


def diffusers_file(state: AdapterState) -> dict[str, Tensor]:
    """Return learned vectors as diffusers writes them: `learned_embeds`, or the file of its pivotal tuning.

    Raises:
        AdapterError: diffusers has no such file.
    """
    tokens = list(dict.fromkeys(token for token, _ in state.embeddings))
    by_encoder: dict[str, dict[str, Tensor]] = {}
    for (token, written), vectors in state.embeddings.items():
        by_encoder.setdefault(written, {})[token] = vectors
    numbered = [f"<s{number}>" for number in range(len(tokens))]
    is_complete = all(found.keys() == set(tokens) for found in by_encoder.values())
    if sorted(tokens) == sorted(numbered) and is_complete and set(by_encoder) <= _PIVOTAL_ENCODERS:
        rows = {written: [found[token] for token in numbered] for written, found in by_encoder.items()}
        if all(len(vectors) == 1 for found in rows.values() for vectors in found):
            if PIVOTAL_FILE.fullmatch(state.name) is None:
                raise AdapterError(
                    f"the tokens {', '.join(numbered)} are known by the name of the file in diffusers: save them as "
                    f"'..._emb.safetensors' or 'embeddings.safetensors', not as {state.name!r}"
                )
            return {written: torch.cat(found) for written, found in rows.items()}
    if len(state.embeddings) == 1 and OUTPUT not in next(iter(by_encoder)):
        return {tokens[0]: next(iter(state.embeddings.values()))}
    raise AdapterError(
        f"a file of diffusers has one token for one text encoder, or {numbered[0]}, <s1>, ... of one vector each; this "
        f"adapter has {', '.join(tokens)}"
    )


def refuse_embeddings(state: AdapterState, format: str) -> None:
    """Raise `AdapterError` if the adapter has learned vectors, which `format` has no place for."""
    if state.embeddings:
        tokens = ", ".join(dict.fromkeys(token for token, _ in state.embeddings))
        raise AdapterError(
            f"format={format!r} has no place for the learned tokens ({tokens}); use 'kohya', 'onetrainer' or 'comfy'"
        )


def _vectors(token: str | None, written: str) -> Vectors | Unused:
    """Return the verdict on vectors that a file has for `token`, under `written`.

    Source of the output embeddings: Nerogar/OneTrainer `modules/model/BaseModel.py`, `_apply_output_embeddings`.
    """
    if written.startswith("string_to_token"):
        return Unused("bookkeeping of a trainer, without effect", harmless=True)
    return Vectors(token, written, output=written.endswith(OUTPUT))


def _verdict_in_own_file(key: str) -> Verdict | None:
    """Return the verdict on a key of a file that holds only learned vectors, `None` if it is not such a key."""
    if key in _PIVOTAL:
        return Vectors(None, _PIVOTAL[key], apart=True)
    return _vectors(None, key) if _NAMELESS.fullmatch(key) else token_verdict(key)


def _verdicts(header: Header) -> Mapping[str, Verdict | None]:
    found = {key: _verdict_in_own_file(key) for key in header.keys}
    if len(found) == 1:
        # diffusers: the only key is the token, whatever it looks like; A1111 writes "*" for the name of the file.
        key = header.keys[0]
        if found[key] is None and "." not in key and len(header.shapes.get(key, ())) in (1, 2):
            found[key] = Vectors(None if key == "*" else key, _ANY)
    return found


def _matches(header: Header) -> bool:
    found = _verdicts(header)
    return bool(found) and None not in found.values()


def _locate(header: Header, names: Names) -> dict[str, Verdict]:
    return {key: verdict for key, verdict in _verdicts(header).items() if verdict is not None}


EMBEDDINGS = Format("embeddings", _matches, _locate)
