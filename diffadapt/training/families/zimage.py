"""Z-Image."""

from typing import Any

import torch
from torch import Tensor

from diffadapt.training.families.family import Caption, Pipeline, Step, Tensors, TrainingFamily
from diffadapt.training.families.packing import encode_prompt, pixels
from diffadapt.training.families.pictures import most_likely
from diffadapt.training.families.schedules import packed_shift, refuse_distilled

_TURBO_SHIFT = 3.0


def _refusal(pipe: Pipeline) -> str | None:
    turbo = pipe.scheduler.config.get("shift") == _TURBO_SHIFT
    return refuse_distilled(pipe, sign="the shift 3 of Z-Image-Turbo; Z-Image has 6" if turbo else None)


def _encode(pipe: Pipeline, caption: Caption) -> Tensors:
    hidden, _ = encode_prompt(pipe, caption, do_classifier_free_guidance=False)
    return {"hidden": hidden[0]}


def _inputs(step: Step) -> dict[str, Any]:
    # Captions are a list, which the model pads itself, with a learned token.
    lengths = step.mask("hidden").sum(dim=1).tolist()
    captions = [hidden[:length] for hidden, length in zip(step["hidden"], lengths, strict=True)]
    return {"x": list(step.x.unsqueeze(2)), "t": 1 - step.level, "cap_feats": captions}


def _read(step: Step, output: Any) -> Tensor:
    return -torch.stack(list(output)).squeeze(2)


ZIMAGE = TrainingFamily(
    name="z-image",
    pipelines=("ZImagePipeline",),
    encode=_encode,
    encode_pictures=most_likely,
    inputs=_inputs,
    read=_read,
    divisor=pixels(2),
    # Not the refiners at the start of the model.
    targets=r"layers\.\d+\.(attention\.to_(q|k|v|out\.0)|feed_forward\.w[123])",
    shift=packed_shift,
    tokens=("hidden",),
    max_tokens=512,
    refusal=_refusal,
)
