"""Whether gradients reach the adapters that are trained, through the layers of the model above them."""

import warnings
from collections.abc import Mapping

from torch import nn

from diffadapt.errors import AdapterError
from diffadapt.runtime.adapter_layer import AdapterLayer
from diffadapt.runtime.targets import walk
from diffadapt.weights.gradients import GradientProblem, gradient_problem, is_rewritten_in_use, needs_probe

_CAST = (
    "keep these layers out of layerwise casting (skip_modules_pattern), or train without it if the error comes up in "
    "the backward pass"
)
_OTHER = "load the model unquantised, or quantise the weights alone and leave what the layers compute in float"


class GradientFlow:
    """The layers of a model that may drop a gradient or get it wrong: those without ordinary floating-point weights.

    In which order a model calls its layers is not known. So each of them may be above any other, and only a layer that
    is adapted alone does not need the gradient to its own input.

    Attributes:
        layers: module path -> layer.
    """

    def __init__(self, model: nn.Module) -> None:
        """Find these layers. None of them is run yet."""
        self.layers = {path: module for path, module in walk(model) if needs_probe(module)}
        # Those that were right, with the address of the weight where its backend may rewrite it.
        self._right: dict[str, int | None] = {}

    def refuse_wrong(self, adapted: Mapping[str, AdapterLayer]) -> None:
        """Raise `AdapterError` if adapter layers would be trained with wrong gradients, or without any.

        Warns if a layer that is only stored in fewer bits (layerwise casting) raises an error in its backward pass,
        which depends on the size of the input.

        Args:
            adapted: module path -> adapter layer that is trained.
        """
        wrong: dict[str, GradientProblem] = {}
        for path, module in self.layers.items():
            layer = adapted.get(path)
            above_others = len(adapted) > (layer is not None)
            if not above_others and (layer is None or "input" not in layer.stages):
                continue
            if path in self._right and (self._right[path] is None or self._right[path] == _address(module)):
                continue
            problem = gradient_problem(module)
            if problem is None:
                self._right[path] = _address(module) if is_rewritten_in_use(module) else None
            else:
                wrong[path] = problem
        for silent in (False, True):
            found = {path: problem for path, problem in wrong.items() if problem.silent is silent}
            if not found:
                continue
            message = self._described(found)
            if silent:
                raise AdapterError(message)
            warnings.warn(message, stacklevel=4)

    def _described(self, wrong: Mapping[str, GradientProblem]) -> str:
        path, problem = next(iter(wrong.items()))
        more = f" and {len(wrong) - 1} more layers" if len(wrong) > 1 else ""
        kind = f"{type(self.layers[path]).__name__}, {problem.codec.name}"
        remedy = (problem.codec.remedy or _OTHER) if problem.silent else _CAST
        return (
            f"{path}{more} ({kind}) {problem.text}, so adapters on layers below would be trained without the right "
            f"gradient; {remedy}"
        )


def _address(module: nn.Module) -> int:
    weight = module._parameters["weight"]
    assert weight is not None
    return weight.data_ptr()
