"""The adapters of a batch whose samples have mixes of their own: every row meets only what its own adapters have there.

Side by side in one product, the factors of all adapters cost every row the ranks of all of them, and every adapter of
the batch costs some operations of its own in every layer. Here the adapter layers on one host are put together once:
low-rank factors in one tensor, output scales in another. A call picks those of each row, so a batch of mixed adapters
costs about as much as one with a single adapter.

This is for calls without slots, outside compiled graphs, of adapters that are not being trained.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from diffadapt.runtime.adapter_layer import AdapterLayer
from diffadapt.types.adapter_type import UNTIL, Tensors

Factors = tuple[Tensor, Tensor]


def row_factors(layers: tuple[AdapterLayer, ...], device: torch.device) -> "RowFactors | None":
    """Return what the rows of a batch pick from `layers`, which act on one host; `None` if there is nothing to pick.

    It is kept until a tensor, a device or the samples of an adapter change.
    """
    # Asked first, so that graphs do not depend on the number of samples.
    if torch.compiler.is_compiling():
        return None
    call = layers[0].call
    if not call.samples or len(layers) < 2:
        return None
    known = call.row_factors.get(layers)
    if not isinstance(known, RowFactors) or not known.is_current(device):
        known = call.row_factors[layers] = RowFactors(layers, device)
    return known if known.adding or known.scaling else None


class RowFactors:
    """What the rows of a batch pick from the adapter layers on one host.

    Attributes:
        adding: the layers whose additive change `add` computes.
        scaling: the layers whose output scale is in `gains`: all that have one, or none.
        spec: the geometry of the host.
        others: the layers that do something else on their host, too.
    """

    def __init__(self, layers: tuple[AdapterLayer, ...], device: torch.device) -> None:
        self.adding: frozenset[AdapterLayer] = frozenset()
        self.scaling: frozenset[AdapterLayer] = frozenset()
        self._call = layers[0].call
        self.spec = layers[0].spec
        self._device = device
        self._count = self._call.samples
        self._samples = [(layer, layer.samples, layer.training) for layer in layers]
        self._prepared: list[tuple[AdapterLayer, Tensors]] = []
        self._sources = [
            (owner, name, tensor, tensor._version, tensor.data_ptr(), tensor.requires_grad)
            for layer in layers
            for owner in (layer._parameters, layer._buffers)
            for name, tensor in owner.items()
            if tensor is not None and not tensor.is_inference()
        ]
        self._rows: Tensor | None = None
        self._gate_sources: list[tuple[AdapterLayer, Tensor, int]] = []
        self._value: Tensor | None = None
        if all(map(self._can_pick, layers)):
            with torch.inference_mode(False), torch.no_grad():
                self._gather(layers)
        self.others = tuple(layer for layer in layers if not self._covers(layer))

    def is_current(self, device: torch.device) -> bool:
        """Return whether nothing has changed that this was made from."""
        return (
            device == self._device
            and self._count == self._call.samples
            and all(layer.samples is samples and layer.training == was for layer, samples, was in self._samples)
            and all(
                owner.get(name) is tensor
                and tensor._version == version
                and tensor.data_ptr() == pointer
                and tensor.requires_grad == trained
                for owner, name, tensor, version, pointer, trained in self._sources
            )
            and all(layer.prepared_tensors() is tensors for layer, tensors in self._prepared)
        )

    def gains(self, rows: int, dimensions: int, bias: Callable[[], Tensor | None]) -> tuple[Tensor, Tensor | None]:
        """Return the output scales `sum m (s - 1)` of every row, and what takes them back from the bias, if anything.

        Both broadcast over the output of the host.

        Args:
            rows: the number of rows of the layer's input.
            dimensions: the number of dimensions of the output.
            bias: returns the bias of the host, or `None` if it has none.
        """
        self._pick(rows)
        total = self.spec.along_channels(self._row_gains, dimensions)
        own = bias() if self._bias_gains is not None else None
        if own is None or self._bias_gains is None:
            return total, None
        unscaled = self.spec.along_channels(self._bias_gains.index_select(0, self._index), dimensions)
        return total, unscaled * -self.spec.along_channels(own, dimensions)

    def add(self, input: Tensor, output: Tensor) -> Tensor:
        """Return `output` plus the low-rank changes of every row; `output` may be overwritten."""
        self._pick(len(input))
        input = input.to(self._dtype)
        # (rows, adapters of a row x rank, columns)
        down = self._downs.index_select(0, self._chosen).view(len(input), -1, self._downs.shape[-1])
        up = self._ups.index_select(0, self._chosen).view(len(input), -1, self._ups.shape[-1])
        return self.spec.low_rank_by_row(input, down, up, self._row_gates, output)

    def _can_pick(self, layer: AdapterLayer) -> bool:
        tensors = layer.tensors.values()
        return (
            layer.samples is not None
            and "parameter" not in layer.stages
            and layer.gate.ndim == 1
            and not layer.training
            and all(tensor.device == self._device and not tensor.is_inference() for tensor in tensors)
            and not any(tensor.requires_grad for part in (layer, *layer.siblings) for tensor in part.tensors.values())
        )

    def _covers(self, layer: AdapterLayer) -> bool:
        """Return whether a layer does nothing on its host but what is picked here."""
        return all(
            layer in self.adding if stage == "add" else stage == "gain" and layer in self.scaling
            for stage in layer.stages
        )

    def _gather(self, layers: Sequence[AdapterLayer]) -> None:
        """Put the factors and the output scales of `layers` together."""
        factors: list[tuple[AdapterLayer, Factors]] = []
        gains: list[tuple[AdapterLayer, Tensor]] = []
        # Output maps act on the bias, too, so output scales next to them need more than their sum.
        scales = not any("output" in layer.stages for layer in layers)
        adds = self.spec.kind in ("linear", "conv") and self.spec.groups == 1
        for layer in layers:
            if "add" not in layer.stages and "gain" not in layer.stages:
                continue
            tensors = layer.prepared_tensors()
            if UNTIL in tensors:
                # What acts depends on the timestep of every call.
                continue
            if layer.is_prepared:
                self._prepared.append((layer, tensors))
            low = layer.as_low_rank(tensors) if adds else None
            if low is not None and (not factors or layer.dtype == factors[0][0].dtype):
                factors.append((layer, low))
            if scales and "gain" in layer.stages:
                gain = layer.adapter_type.gain(tensors)
                gains.append((layer, gain.to(torch.promote_types(gain.dtype, torch.float32))))
        self._factor_layers = [layer for layer, _ in factors]
        picks = _picks(tuple(layer.samples or frozenset() for layer, _ in factors), self._count)
        if picks is not None:
            self.adding = frozenset(self._factor_layers)
            self._dtype = factors[0][0].dtype
            self._picks = torch.tensor(picks, device=self._device)
            self._rank = max(len(down) for _, (down, _) in factors)
            self._downs = torch.stack([_padded(down.flatten(1), self._rank) for _, (down, _) in factors])
            self._ups = torch.stack([_padded(up.t(), self._rank) for _, (_, up) in factors])
        if gains:
            self.scaling = frozenset(layer for layer, _ in gains)
            self._gains = gains
        self._gated = [layer for layer in layers if layer in self.adding or layer in self.scaling]

    def _pick(self, rows: int) -> None:
        """Set the gates, scales and numbers of factors of every row of a call, if they are not those of the last."""
        call = self._call
        value = None if call.value is call.neutral else call.value
        is_same = value is self._value and all(
            layer.gate is gate and not gate.is_inference() and gate._version == version
            for layer, gate, version in self._gate_sources
        )
        index = call.samples_of_rows(self._count, rows, self._device)
        assert index is not None
        if is_same and index is self._rows and self._gate_sources:
            return
        with torch.inference_mode(False), torch.no_grad():
            self._read_gates(value, index)
        self._value, self._rows, self._index = value, index, index
        self._gate_sources = [
            (layer, layer.gate, 0 if layer.gate.is_inference() else layer.gate._version) for layer in self._gated
        ]

    def _read_gates(self, value: Tensor | None, index: Tensor) -> None:
        gates = {layer: layer.gate.to(self._device) for layer in self._gated}
        if value is not None:
            gates = {layer: gate * value.to(self._device) for layer, gate in gates.items()}
        if self.adding:
            own = torch.stack([gates[layer] for layer in self._factor_layers], 1).gather(1, self._picks)
            self._row_gates = own.index_select(0, index).repeat_interleave(self._rank, 1)
            self._chosen = self._picks.index_select(0, index).flatten()
        if self.scaling:
            scales = [(layer, gain * gates[layer].unsqueeze(-1)) for layer, gain in self._gains]
            self._row_gains = _sum([scale for _, scale in scales]).index_select(0, index)
            unscaled = [scale for layer, scale in scales if not layer.adapter_type.gains_bias]
            self._bias_gains = _sum(unscaled) if unscaled else None


def _sum(values: Sequence[Tensor]) -> Tensor:
    """Return the sum in the order of the values."""
    total = values[0]
    for value in values[1:]:
        total = total + value
    return total


def _padded(factor: Tensor, rank: int) -> Tensor:
    """Return a factor (rank, columns) with rows of zeros up to `rank`."""
    return factor if len(factor) == rank else F.pad(factor, (0, 0, 0, rank - len(factor)))


@lru_cache(maxsize=256)
def _picks(samples: tuple[frozenset[int], ...], count: int) -> list[list[int]] | None:
    """Return the numbers of the adapters of every sample, equally many for each; `None` if they are more than half.

    A sample with fewer adapters than others gets some that are not its own, whose gate is 0 there.

    Args:
        samples: for every adapter, the samples that have it in their mix.
        count: the number of samples.
    """
    own = [[number for number, having in enumerate(samples) if sample in having] for sample in range(count)]
    most = max(1, *map(len, own))
    if 2 * most > len(samples):
        return None
    others = ([number for number in range(len(samples)) if number not in numbers] for numbers in own)
    return [(numbers + rest)[:most] for numbers, rest in zip(own, others, strict=True)]
