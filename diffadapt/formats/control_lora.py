"""Stability AI's Control-LoRAs: a ControlNet, stored as its difference from the UNet that it was made from.

Names follow the original layout. Layers that the UNet has too are stored as `up` and `down`, at a scale of 1, and
everything that is not low-rank as a new weight or bias. The files are for a `ControlNetModel.from_unet(unet)`. Sources:
ComfyUI `comfy/controlnet.py`, diffusers 0.42.1 `utils/state_dict_utils.py`.
"""

import re

from diffadapt.errors import AdapterError
from diffadapt.formats.format import Format, Header
from diffadapt.formats.names import Names
from diffadapt.formats.verdicts import Unused, Verdict

_MARKER = "lora_controlnet"
_SIGN = re.compile(rf"{_MARKER}$|input_hint_block\.|zero_convs\.")
_TENSORS = {"down": "lora_down", "up": "lora_up", "weight": "set_weight", "bias": "set_bias"}
_ONLY_IN_CONTROLNETS = "controlnet_cond_embedding"


def _matches(header: Header) -> bool:
    return any(map(_SIGN.match, header.keys))


def _locate(header: Header, names: Names) -> dict[str, Verdict]:
    if not any(key.endswith(".down") for key in header.keys):
        raise AdapterError("this is a whole ControlNet; load it with diffusers.ControlNetModel.from_single_file()")
    component = _controlnet(names)
    verdicts: dict[str, Verdict] = {}
    for key in header.keys:
        path, _, last = key.rpartition(".")
        if key == _MARKER:
            verdicts[key] = Unused("it only says what the file is", harmless=True)
        elif not path or last not in _TENSORS:
            verdicts[key] = Unused("not the name of an adapter tensor")
        else:
            verdicts[key] = names.dotted(component, path, _TENSORS[last])
    return verdicts


def _controlnet(names: Names) -> str:
    """Return the name of the component that is a ControlNet. Raise `AdapterError` if there is none."""
    if names.models is None:
        return "controlnet"
    for component, targets in names.models.items():
        if _ONLY_IN_CONTROLNETS in targets.modules:
            return component
    raise AdapterError(
        "this is a Control-LoRA, a ControlNet stored as its difference from the UNet; make one with "
        "controlnet = diffusers.ControlNetModel.from_unet(pipe.unet), load the file into it with "
        "diffadapt.load_adapter(controlnet, file), and pass it to a ControlNet pipeline"
    )


CONTROL_LORA = Format("control-lora", _matches, _locate)
