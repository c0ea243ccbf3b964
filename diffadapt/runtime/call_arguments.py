"""What the arguments of a model's call say: how many rows its batch has, and how noisy they are."""

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffadapt.errors import AdapterError
from diffadapt.types.adapter_type import MOST_NOISE

_INPUT_NAMES = ("sample", "hidden_states", "x", "input_ids", "inputs_embeds")
_TIMESTEP_NAMES = ("timestep", "timesteps", "timestep_ratio", "t")
_BY_THOUSANDS = (
    "UNet2DConditionModel UNetMotionModel SD3Transformer2DModel PixArtTransformer2DModel HunyuanDiT2DModel "
    "SanaTransformer2DModel HunyuanImageTransformer2DModel HunyuanVideoTransformer3DModel WanTransformer3DModel "
    "HunyuanVideo15Transformer3DModel CogView3PlusTransformer2DModel CogView4Transformer2DModel "
    "HiDreamImageTransformer2DModel CogVideoXTransformer3DModel AllegroTransformer3DModel LatteTransformer3DModel "
    "LTXVideoTransformer3DModel Kandinsky5Transformer3DModel BriaTransformer2DModel BriaFiboTransformer2DModel "
    "ErnieImageTransformer2DModel"
).split()
_BY_SHARES = (
    "FluxTransformer2DModel Flux2Transformer2DModel ChromaTransformer2DModel QwenImageTransformer2DModel "
    "AuraFlowTransformer2DModel Krea2Transformer2DModel OvisImageTransformer2DModel LongCatImageTransformer2DModel "
    "PRXTransformer2DModel NucleusMoEImageTransformer2DModel StableCascadeUNet"
).split()
_BY_SHARES_LEFT = (
    "Lumina2Transformer2DModel LuminaNextDiT2DModel ZImageTransformer2DModel Ideogram4Transformer2DModel"
).split()


class Clock(NamedTuple):
    """How a class of denoisers is told the timestep; read from the pipelines of diffusers 0.42.1.

    Attributes:
        name: the argument.
        position: its position among the arguments.
        unit: what the argument is multiplied by, so that pure noise is `MOST_NOISE`.
        counts_left: whether the argument is 0 for pure noise, and grows as noise is taken away.
    """

    name: str
    position: int
    unit: float
    counts_left: bool

    @classmethod
    def of(cls, model: nn.Module) -> "Clock | None":
        """Return how a model is told the timestep; `None` if it has no argument for one, as text encoders.

        Raises:
            AdapterError: it has one, and how it counts timesteps is not known.
        """
        names = list(inspect.signature(type(model).forward).parameters)[1:]
        found = next((name for name in _TIMESTEP_NAMES if name in names), None)
        if found is None:
            return None
        for each in type(model).__mro__:
            for unit, counts_left, known in (
                (1.0, False, _BY_THOUSANDS),
                (float(MOST_NOISE), False, _BY_SHARES),
                (float(MOST_NOISE), True, _BY_SHARES_LEFT),
            ):
                if each.__name__ in known:
                    # Sana multiplies the timestep by a number of its config.
                    unit /= getattr(getattr(model, "config", None), "timestep_scale", None) or 1.0
                    return cls(found, names.index(found), unit, counts_left)
        raise AdapterError(
            f"the adapter depends on the timestep, and it is not known how {type(model).__name__} counts timesteps; "
            "train it without min_rank, or use another type"
        )

    def read(self, args: Any, kwargs: Mapping[str, Any]) -> Tensor:
        """Return the timesteps of a call in float32, from 0 to `MOST_NOISE`: 0-d, or one for every row of the batch.

        Where a row has several, as a video whose first frame is given, it is the largest.

        Raises:
            AdapterError: the call has no timestep.
        """
        given = kwargs.get(self.name, args[self.position] if len(args) > self.position else None)
        if given is None:
            raise AdapterError(f"the adapter depends on the timestep, and the model was called without {self.name}")
        value = torch.as_tensor(given).detach().to(torch.float32) * self.unit
        value = MOST_NOISE - value if self.counts_left else value
        if value.numel() == 1:
            return value.reshape(())
        return value.flatten(1).amax(1) if value.ndim > 1 else value


def batch_of(args: Any, kwargs: Mapping[str, Any]) -> int:
    """Return the number of rows in the batch that a model is called with, or 0 if no argument has rows.

    Some models take the batch as a list.
    """
    named = (kwargs.get(name) for name in _INPUT_NAMES)
    for value in (*args, *named, *kwargs.values()):
        if isinstance(value, list) or (isinstance(value, Tensor) and value.ndim):
            return len(value)
    return 0


def is_ragged(argument: Any) -> bool:
    """Return whether an argument is a list of tensors of different lengths.

    Z-Image, the model that takes such lists, pads them to multiples of 32.
    """
    if not isinstance(argument, list):
        return False
    rows: list[Any] = argument  # type: ignore[assignment]
    return len({-(-len(row) // 32) for row in rows if isinstance(row, Tensor) and row.ndim}) > 1
