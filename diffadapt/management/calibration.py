"""Compute the starts of a new LoRA from data: EVA, CorDA, LoRA-GA and LoftQ."""

import math
import os
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn

from diffadapt.errors import AdapterError, naming
from diffadapt.files.safetensors_file import OpenFile
from diffadapt.runtime.components import unwrapped
from diffadapt.runtime.targets import Targets
from diffadapt.types.data_starts import FROM_DATA, Spectrum, corda, loftq, lora_ga, ranks_by_variance
from diffadapt.types.layer_spec import LayerSpec
from diffadapt.types.lora import LORA, LoraConfig
from diffadapt.weights import decoded

Run: TypeAlias = Callable[[nn.Module, Any], Any]
"""`(model, batch) -> output`, or the loss for "lora_ga"."""

_MOST_RANK = 2.0
"""The largest rank of a layer in EVA, relative to the mean, as in PEFT."""


@torch.no_grad()
def calibrated(
    model: nn.Module,
    config: LoraConfig,
    batches: Iterable[Any] = (),
    *,
    run: Run | None = None,
    originals: str | os.PathLike[str] | Mapping[str, Tensor] | nn.Module | None = None,
) -> LoraConfig:
    """Return settings with the starts that `config.init` computes from data, for `add_adapter`.

    | `init` | needs |
    |---|---|
    | "eva" | batches; also moves the rank to the layers whose inputs vary in most directions |
    | "corda", "corda_kpm" | batches; keeps the covariance of every layer's inputs, (in, in) float32 |
    | "lora_ga" | batches, and a `run` that returns the loss; keeps the gradient of every weight |
    | "loftq" | originals |

    The model is left as it is. With `torch.distributed`, every process passes its own batches, and all get the same
    starts.

    Args:
        model: the model that the adapter is for, in the state and on the device to run in.
        config: settings with one of these inits.
        batches: what `run` is called with, one after the other. 50 to 200 batches are usual.
        run: calls the model. Defaults to `model(**batch)` for dicts, `model(*batch)` for tuples and lists, and
            `model(batch)` for anything else.
        originals: for "loftq", the weights before quantisation: a safetensors file or a folder of such files, a state
            dict or a model.

    Raises:
        AdapterError: the init takes nothing from data, what it needs is missing, a layer is no linear layer or
            ungrouped 2-d convolution, or a layer was not called.
    """
    if config.init not in FROM_DATA:
        raise AdapterError(f"init is {config.init!r}, which takes nothing from data; use one of {', '.join(FROM_DATA)}")
    model = unwrapped(model)
    targets = Targets(model)
    chosen = targets.select(
        config.target_modules,
        config.exclude_modules,
        LORA.layers,
        blocks=config.block_numbers,
        block_lists=config.layers_pattern,
    )
    specs = {path: targets.spec(path, LORA.layers) for path in sorted(chosen)}
    for path, spec in specs.items():
        if spec.kind not in ("linear", "conv") or spec.groups > 1 or len(spec.kernel) not in (0, 2):
            raise AdapterError(f"{path}: init={config.init!r} has no meaning for this kind of layer; exclude it")
    if config.init == "loftq":
        return replace(config, starts=_by_loftq(config, chosen, specs, originals))
    if originals is not None:
        raise AdapterError(f"originals has no effect with init={config.init!r}")
    run = run or _call
    if config.init == "lora_ga":
        return replace(config, starts=_by_gradient(model, config, chosen, specs, batches, run))
    observe = _Spectra(config, specs) if config.init == "eva" else _Covariances(specs)
    with _watching(chosen, observe.add):
        for batch in batches:
            run(model, batch)
    return observe.settings(config, chosen)


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


@contextmanager
def _watching(hosts: Mapping[str, nn.Module], add: Callable[[str, Tensor], None]) -> Generator[None, None, None]:
    """Pass the input of every call of the layers to `add` inside the `with` block."""

    def hook(path: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda module, args, kwargs: add(path, args[0] if args else next(iter(kwargs.values())))

    handles = [host.register_forward_pre_hook(hook(path), with_kwargs=True) for path, host in hosts.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _rows(input: Tensor, spec: LayerSpec) -> Tensor:
    """Return the vectors that the weight, as a matrix, multiplies: (rows, in x kernel)."""
    input = input.detach().float()
    if spec.kind == "linear":
        return input.reshape(-1, input.shape[-1])
    if spec.padding_mode != "zeros":
        input = F.pad(input, spec._pad_widths(), mode=spec.padding_mode)
    elif spec.padding != "valid":
        input = F.pad(input, spec._pad_widths())
    patches = F.unfold(input, spec.kernel, spec.dilation, 0, spec.stride)
    return patches.transpose(1, 2).reshape(-1, patches.shape[1])


class _Spectra:
    """The principal components of the inputs of every layer, for EVA."""

    def __init__(self, config: LoraConfig, specs: Mapping[str, LayerSpec]) -> None:
        self._specs = specs
        self._most = math.ceil(_MOST_RANK * config.rank)
        self._found = {path: Spectrum(min(self._most, spec.fan_in)) for path, spec in specs.items()}

    def add(self, path: str, input: Tensor) -> None:
        self._found[path].add(_rows(input, self._specs[path]))

    def settings(self, config: LoraConfig, hosts: Mapping[str, nn.Module]) -> LoraConfig:
        """Return the settings with a rank for every layer, and its first components as the start."""
        if config.rank_pattern or config.alpha_pattern:
            raise AdapterError(
                "rank_pattern and alpha_pattern have no meaning with init='eva', which decides the ranks"
            )
        for path, spectrum in self._found.items():
            states = _from_all_processes(spectrum.state)
            if len(states) > 1:
                spectrum = self._found[path] = Spectrum(spectrum._most)
                for state in states:
                    spectrum.include(state)
            _refuse_uncalled(path, spectrum.count)
        ranks = ranks_by_variance(
            {path: spectrum.explained for path, spectrum in self._found.items()}, config.rank, self._most
        )
        kept = {path: rank for path, rank in ranks.items() if rank}
        scale = (config.alpha_of() or config.rank) / config.rank
        starts = {
            path: (_as_down(self._found[path].directions[:rank], self._specs[path]), _zeros(self._specs[path], rank))
            for path, rank in kept.items()
        }
        return replace(
            config,
            target_modules=sorted(kept),
            exclude_modules=(),
            layers_to_transform=None,
            layers_pattern=(),
            rank_stabilized=False,
            rank_pattern={f"^{path}": rank for path, rank in kept.items()},
            alpha_pattern={f"^{path}": scale * rank for path, rank in kept.items()},
            starts=starts,
        )


class _Covariances:
    """The mean outer products of the inputs of every layer, for CorDA."""

    def __init__(self, specs: Mapping[str, LayerSpec]) -> None:
        self._specs = specs
        self._sums: dict[str, Tensor] = {}
        self._counts = dict.fromkeys(specs, 0)

    def add(self, path: str, input: Tensor) -> None:
        rows = _rows(input, self._specs[path])
        product = rows.mT @ rows
        self._sums[path] = product if path not in self._sums else self._sums[path].add_(product)
        self._counts[path] += len(rows)

    def settings(self, config: LoraConfig, hosts: Mapping[str, nn.Module]) -> LoraConfig:
        """Return the settings with the start of every layer."""
        starts: dict[str, tuple[Tensor, Tensor]] = {}
        for path, spec in self._specs.items():
            count = sum(_from_all_processes(self._counts[path]))
            _refuse_uncalled(path, count)
            covariance = _sum_over_processes(self._sums.get(path, torch.zeros(spec.fan_in, spec.fan_in))) / count
            settings = _settings(config, path, spec)
            with naming(path):
                weight = _matrix(decoded(hosts[path], "weight"), spec)
            scale = _scale(settings)
            down, up = corda(weight, covariance, settings.rank, scale, smallest=config.init == "corda_kpm")
            starts[path] = _as_down(down, spec), up.float()
        return replace(config, starts=starts)


def _by_gradient(
    model: nn.Module,
    config: LoraConfig,
    hosts: Mapping[str, nn.Module],
    specs: Mapping[str, LayerSpec],
    batches: Iterable[Any],
    run: Run,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the starts of LoRA-GA. No gradient of the caller's is touched."""
    weights: dict[str, nn.Parameter] = {}
    for path, host in hosts.items():
        weight = host._parameters.get("weight")
        if weight is None or not weight.is_floating_point() or type(weight) is not nn.Parameter:
            raise AdapterError(
                f"{path}: its weight is quantised and has no gradient; init='lora_ga' needs a float model"
            )
        if 2 * _settings(config, path, specs[path]).rank > min(specs[path].out_features, specs[path].fan_in):
            raise AdapterError(
                f"{path}: init='lora_ga' takes twice the rank of singular vectors, and the weight of shape "
                f"{specs[path].weight_shape} has fewer; use a smaller rank, or exclude the layer"
            )
        weights[path] = weight
    before = {path: weight.requires_grad for path, weight in weights.items()}
    sums: dict[str, Tensor] = {}
    try:
        for weight in weights.values():
            weight.requires_grad_(True)
        for batch in batches:
            with torch.enable_grad():
                loss = run(model, batch)
                if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
                    raise AdapterError(
                        "init='lora_ga' needs run=, a function of (model, batch) that returns the loss, one number "
                        f"that depends on the model; it returned {_described(loss)}"
                    )
                found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
            # A layer that the loss does not depend on has no gradient.
            for path, gradient in zip(weights, cast("tuple[Tensor | None, ...]", found), strict=True):
                if gradient is not None:
                    sums[path] = gradient.float() if path not in sums else sums[path].add_(gradient)
    finally:
        for path, weight in weights.items():
            weight.requires_grad_(before[path])
    starts: dict[str, tuple[Tensor, Tensor]] = {}
    for path, spec in specs.items():
        total = _sum_over_processes(sums.get(path, torch.zeros_like(weights[path], dtype=torch.float32)))
        _refuse_uncalled(path, int(total.any()))
        down, up = lora_ga(_matrix(total, spec), _settings(config, path, spec).rank)
        starts[path] = _as_down(down, spec), up.float()
    return starts


def _by_loftq(
    config: LoraConfig, hosts: Mapping[str, nn.Module], specs: Mapping[str, LayerSpec], originals: Any
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the starts of LoftQ."""
    if originals is None:
        raise AdapterError(
            "init='loftq' needs originals=, the weights before quantisation: a file, a folder, a state dict or a model"
        )
    find = _finder(originals)
    starts: dict[str, tuple[Tensor, Tensor]] = {}
    for path, spec in specs.items():
        with naming(path):
            quantised = decoded(hosts[path], "weight")
            original = find(f"{path}.weight")
            if original.shape != quantised.shape:
                raise AdapterError(
                    f"the original weight has shape {tuple(original.shape)}, and the layer {tuple(quantised.shape)}"
                )
        settings = _settings(config, path, spec)
        pair = _matrix(original.to(quantised), spec), _matrix(quantised, spec)
        down, up = loftq(*pair, settings.rank, _scale(settings))
        starts[path] = _as_down(down, spec), up.float()
    return starts


def _finder(originals: Any) -> Callable[[str], Tensor]:
    """Return a function from the name of a parameter to its original."""
    if isinstance(originals, nn.Module):
        originals = {name: parameter.detach() for name, parameter in unwrapped(originals).named_parameters()}
    if isinstance(originals, Mapping):
        tensors: Mapping[str, Tensor] = originals  # type: ignore[assignment]
    else:
        path = Path(os.fspath(originals)).expanduser()
        files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        tensors = {key: tensor for file in files for key, tensor in OpenFile(file).tensors.items()}

    def find(name: str) -> Tensor:
        if name not in tensors:
            raise AdapterError(f"originals has no {name}")
        return tensors[name]

    return find


def _settings(config: LoraConfig, path: str, spec: LayerSpec) -> LoraConfig:
    settings = config.at(path)
    assert isinstance(settings, LoraConfig)
    most = min(spec.out_features, spec.fan_in)
    if settings.rank > most:
        raise AdapterError(f"{path}: rank is {settings.rank}, expected at most {most}, with init={config.init!r}")
    return settings


def _scale(settings: LoraConfig) -> float:
    scale = (settings.alpha_of() or float(settings.rank)) / settings.rank
    if scale <= 0:
        raise AdapterError(f"alpha is {settings.alpha}, expected a positive number with init={settings.init!r}")
    return scale


def _matrix(weight: Tensor, spec: LayerSpec) -> Tensor:
    """Return a stored weight as a matrix, (out, in x kernel)."""
    return spec.to_stored(weight).flatten(1)


def _as_down(rows: Tensor, spec: LayerSpec) -> Tensor:
    return rows.float().reshape(len(rows), *spec.weight_shape[1:]).contiguous()


def _zeros(spec: LayerSpec, rank: int) -> Tensor:
    return torch.zeros(spec.out_features, rank)


def _described(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _refuse_uncalled(path: str, count: int) -> None:
    if not count:
        raise AdapterError(f"{path}: no batch reached it; pass batches that use all layers, or exclude it")


def _from_all_processes(value: Any) -> list[Any]:
    """Return the value of every process, in the order of ranks."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [value]
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, value)
    return found


def _sum_over_processes(tensor: Tensor) -> Tensor:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        tensor = tensor.contiguous()
        torch.distributed.all_reduce(tensor)
    return tensor
