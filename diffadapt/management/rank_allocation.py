"""The rank allocator of AdaLoRA, which takes components from layers that need few of them while they are trained.

Zhang et al., "Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", arXiv 2303.10512, sections 3.1 to 3.3,
as in PEFT 0.21.2 `tuners/adalora/layer.py`.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from diffadapt.errors import AdapterError
from diffadapt.runtime.adapter import Adapter
from diffadapt.runtime.adapter_layer import AdapterLayer
from diffadapt.types.adalora import ADALORA


class RankAllocator:
    """Masks the least important components of an AdaLoRA until its layers have `target_rank` on average.

    Call `step` after every backward pass, before the gradients are cleared.
    """

    def __init__(
        self,
        adapter: Adapter,
        target_rank: int,
        total_steps: int,
        *,
        warmup_steps: int = 0,
        final_steps: int = 0,
        interval: int = 1,
        beta1: float = 0.85,
        beta2: float = 0.85,
    ) -> None:
        """
        Args:
            adapter: the adapter in training.
            target_rank: the average rank at the end; at least 1.
            total_steps: the number of steps of the whole training.
            warmup_steps: the first steps, in which all components stay (`tinit` in PEFT).
            final_steps: the last steps, in which the choice stays (`tfinal` in PEFT).
            interval: the number of steps between two choices (`deltaT` in PEFT).
            beta1, beta2: the decay of the running averages of importance and of its uncertainty.

        Raises:
            AdapterError: the adapter has no layer of AdaLoRA, or a number is out of range.
        """
        self._layers = [layer for layer in adapter.layers.values() if layer.adapter_type is ADALORA]
        if not self._layers:
            raise AdapterError("the adapter has no layer of type adalora; make it with AdaLoraConfig")
        if warmup_steps + final_steps >= total_steps or min(warmup_steps, final_steps) < 0 or interval < 1:
            raise AdapterError(
                f"warmup_steps is {warmup_steps}, final_steps {final_steps} and total_steps {total_steps}, expected "
                "fewer of the first two together; and an interval of at least 1"
            )
        if not 0 < beta1 < 1 or not 0 < beta2 < 1:
            raise AdapterError(f"beta1 is {beta1} and beta2 is {beta2}, expected numbers between 0 and 1")
        self._first = sum(layer.tensors["lora_E"].shape[0] for layer in self._layers)
        self._last = target_rank * len(self._layers)
        if not 0 < self._last <= self._first:
            raise AdapterError(f"target_rank is {target_rank}, expected at least 1 and at most the rank of the layers")
        self._total, self._warmup, self._final, self._interval = total_steps, warmup_steps, final_steps, interval
        self._beta1, self._beta2 = beta1, beta2
        self._importance: dict[tuple[int, str], Tensor] = {}
        self._uncertainty: dict[tuple[int, str], Tensor] = {}
        self._kept: list[Tensor] | None = None

    @property
    def ranks(self) -> list[int]:
        """The number of components of every layer that have not been masked, in the order of the adapter's layers."""
        return [int(layer.tensors["lora_E"].count_nonzero()) for layer in self._layers]

    def budget(self, step: int) -> int:
        """Return the number of components that all layers have together at a step, from 1."""
        if step <= self._warmup:
            return self._first
        if step > self._total - self._final:
            return self._last
        share = 1 - (step - self._warmup) / (self._total - self._final - self._warmup)
        return int((self._first - self._last) * share**3 + self._last)

    @torch.no_grad()
    def step(self, step: int) -> None:
        """Take the gradients of a step, from 1, into account, and mask components if it is time to.

        Raises:
            AdapterError: a tensor has no gradient.
        """
        end = self._total - self._final
        if step < end:
            self._measure()
        if step > end and self._kept is not None:
            for layer, kept in zip(self._layers, self._kept, strict=True):
                layer.tensors["lora_E"].masked_fill_(~kept, 0.0)
        elif step == end or (step > self._warmup and step % self._interval == 0):
            self._mask(self.budget(step))

    def penalty(self) -> Tensor:
        """Return the mean over all factors of the Frobenius norm of what they lack to be orthogonal, a 0-d tensor.

        Add it to the loss, multiplied by `AdaLoraConfig.orthogonality`.
        """
        norms: list[Tensor] = []
        for layer in self._layers:
            down, up = layer.tensors["lora_down"].flatten(1), layer.tensors["lora_up"]
            norms += [(m - torch.eye(len(m)).to(m)).norm() for m in (down @ down.t(), up.t() @ up)]
        return torch.stack(norms).mean()

    def _measure(self) -> None:
        """Update the running averages of `|value * gradient|` and of its deviation."""
        for number, layer in enumerate(self._layers):
            for name, tensor in layer.tensors.items():
                if tensor.grad is None:
                    raise AdapterError(f"{name} has no gradient; call step() after backward() and before zero_grad()")
                key, value = (number, name), (tensor * tensor.grad).abs()
                mean = self._importance.get(key, torch.zeros_like(value))
                mean = self._beta1 * mean + (1 - self._beta1) * value
                deviation = self._uncertainty.get(key, torch.zeros_like(value))
                self._importance[key] = mean
                self._uncertainty[key] = self._beta2 * deviation + (1 - self._beta2) * (value - mean).abs()

    def _mask(self, budget: int) -> None:
        """Set the singular values of all but the `budget` most important components to zero."""
        scores = list(self._scores())
        removed = self._first - budget
        if not removed:
            return
        threshold = torch.kthvalue(torch.cat(scores), removed).values
        self._kept = [(score > threshold).unsqueeze(1) for score in scores]
        for layer, kept in zip(self._layers, self._kept, strict=True):
            layer.tensors["lora_E"].masked_fill_(~kept, 0.0)

    def _scores(self) -> Iterator[Tensor]:
        """Yield the importance of every component of every layer: that of its singular value, and of its vectors."""
        for number, layer in enumerate(self._layers):
            value = self._score(number, layer, "lora_E").view(-1)
            down = self._score(number, layer, "lora_down").flatten(1).mean(1)
            yield value + down + self._score(number, layer, "lora_up").mean(0)

    def _score(self, number: int, layer: AdapterLayer, name: str) -> Tensor:
        zeros = torch.zeros_like(layer.tensors[name])
        return self._importance.get((number, name), zeros) * self._uncertainty.get((number, name), zeros)
