"""The weight of a model's own layer, as formulas use it."""

from torch import Tensor, nn

from diffadapt.types.layer_spec import LayerSpec
from diffadapt.weights import decoded


def weight_of(host: nn.Module, spec: LayerSpec) -> Tensor:
    """Return the weight of `host`, canonical and decoded: float32, or float64 if the layer has that."""
    return spec.to_stored(decoded(host, "weight"))
