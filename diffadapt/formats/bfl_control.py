"""Black Forest Labs' control LoRAs for Flux.1 (canny, depth): bare original names, at a scale of 1.

Two things in them are no adapter: the query and key norms are there as new weights (`norm.query_norm.scale`), and
`img_in` is for a model that reads the control image beside the latents, twice as many channels. Source:
black-forest-labs/flux 802fb47 `src/flux/util.py`.
"""

import re

from diffadapt.formats import suffixes
from diffadapt.formats.format import Format, Header, Names, Unused, Verdict
from diffadapt.layer import LayerSpec

_NORM = re.compile(r"(?:double|single)_blocks\.\d+\.(?:(?:img|txt)_attn\.)?norm\.(?:query|key)_norm\.scale")
_INPUT = "img_in"


def _matches(header: Header) -> bool:
    return any(_NORM.fullmatch(key) for key in header.keys)


def _locate(header: Header, names: Names) -> dict[str, Verdict]:
    narrow = _reads_latents_only(names)

    def place(path: str, name: str) -> Verdict:
        if path == _INPUT and narrow:
            return Unused(
                "this control LoRA is for a model that reads a control image too; load it with diffusers "
                "(FluxControlPipeline, pipe.load_lora_weights), or give x_embedder twice as many inputs first",
                names.denoiser(),
            )
        return names.dotted(names.denoiser(), path, name)

    verdicts = suffixes.located(header.keys, place)
    for key in header.keys:
        if _NORM.fullmatch(key):
            verdicts[key] = Unused(
                "it is the new weight of a norm and not a change of it; load this control LoRA with diffusers "
                "(FluxControlPipeline, pipe.load_lora_weights)",
                names.denoiser(),
            )
    return verdicts


def _reads_latents_only(names: Names) -> bool:
    """Whether the model takes in no more channels than it puts out."""
    targets = (names.models or {}).get(names.denoiser())
    if targets is None or not {"x_embedder", "proj_out"} <= targets.modules.keys():
        return False
    read, written = LayerSpec.of(targets.modules["x_embedder"]), LayerSpec.of(targets.modules["proj_out"])
    return read is not None and written is not None and read.in_features <= written.out_features


BFL_CONTROL = Format("bfl-control", _matches, _locate, lambda header: lambda component, path, rank: None, None)
