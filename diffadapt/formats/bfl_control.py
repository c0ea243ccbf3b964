"""Black Forest Labs' control LoRAs for Flux.1 (canny, depth): bare names of the original layout, at a scale of 1.

The query and key norms are stored as new weights, not as changes (`norm.query_norm.scale`). `img_in` is for a model
that reads the control image next to the latents and so has twice as many input channels; see `runtime/input_width.py`.
Source: black-forest-labs/flux 802fb47 `src/flux/util.py`.
"""

import re

from diffadapt.formats import suffixes
from diffadapt.formats.format import Format, Header
from diffadapt.formats.names import Names
from diffadapt.formats.verdicts import Verdict

_NORM = re.compile(r"((?:double|single)_blocks\.\d+\.(?:(?:img|txt)_attn\.)?norm\.(?:query|key)_norm)\.scale")


def _matches(header: Header) -> bool:
    return any(map(_NORM.fullmatch, header.keys))


def _locate(header: Header, names: Names) -> dict[str, Verdict]:
    denoiser = names.denoiser
    verdicts = suffixes.locate_keys(header.keys, lambda path, name: names.dotted(denoiser, path, name))
    for key in header.keys:
        norm = _NORM.fullmatch(key)
        if norm:
            verdicts[key] = names.dotted(denoiser, norm[1], "set_weight")
    return verdicts


BFL_CONTROL = Format("bfl-control", _matches, _locate)
