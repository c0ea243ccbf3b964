"""The part of an adapter that acts on one layer: its parameters. `PreparedLayer` is what one call needs of them."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from diffadapt.runtime.base_weight import BaseWeight, bias_of
from diffadapt.runtime.cached import Cached, sum_of_terms
from diffadapt.runtime.call_state import CallState
from diffadapt.runtime.dropout import Dropout
from diffadapt.runtime.quick_module import QuickModule
from diffadapt.runtime.regions.fields import Region
from diffadapt.types.adapter_type import AdapterType, Stage, Surroundings, Tensors
from diffadapt.types.layer_spec import LayerSpec
from diffadapt.types.layer_state import LayerState, scale_of
from diffadapt.types.tensor_ops import converted, whole

BANK = "diffadapt"
"""Name of the child module that holds a model's adapters."""

PATCH_DELTA = "patch_delta"
"""Name of the prepared tensor that a type runs as at the stage "patch": `W (T - I)`, in the shape of the weight."""

_NO_DROPOUT = Dropout()

TermOf: TypeAlias = Callable[["AdapterLayer"], Tensor]
"""Returns `AdapterLayer.joint_term` of an adapter layer."""


class AdapterLayer(QuickModule):
    """The part of an adapter that acts on one layer of the model, its host. The parameters are the type's tensors.

    Attributes:
        adapter_type: the formula.
        spec: the geometry of the host; `in_features` follows the host's when that changes (`input_width.py`).
        alpha: the numerator of the scale; `None` if there is none.
        dropout: dropout probabilities.
        settings: the numbers of the type that are not tensors.
        stages: where the type acts on the host.
        inputs: the input features that its own tensors cover; fewer than the host has if another adapter needs more.
        widens: whether `inputs` is more than the host has without adapters.
        gates_ranks: whether the gate has one element per rank; true for some slots only.
        picks: (samples, n) the ranks of every sample whose gates are not zero, if every sample has at most n of them;
            for some slots only.
        parameter: the parameter of the host that the layer changes.
        twin_of: the path of the layer whose tensors this one has, because both share a weight; see `ties.py`.
        gate: scale x strength, 0-d or (samples,): a view of the adapter's float32 tensor, which the adapter sets.
        call: the state of the current call of the model; set when the adapter is attached.
        host: the layer of the model; set when the adapter is attached.
        siblings: the other parts of the same layer of a file, if the type is `joint`; empty by default.
        region: where in the picture the layer acts, while the adapter has a mask.
        samples: the samples in which the gate is not zero; `None` if samples have no gates of their own.
    """

    gates_ranks = False
    picks: Tensor | None = None
    region: Region | None = None
    samples: frozenset[int] | None = None
    twin_of: str | None = None
    parameter: str = "weight"
    adapter_type: AdapterType
    spec: LayerSpec
    alpha: float | None
    dropout: Dropout
    settings: Mapping[str, float]
    stages: tuple[Stage, ...]
    inputs: int
    widens: bool
    gate: Tensor
    call: CallState
    host: nn.Module
    siblings: tuple["AdapterLayer", ...]
    _cache: Cached[Tensors] | None
    _term: Cached[Tensor] | None

    def __init__(
        self,
        adapter_type: AdapterType,
        spec: LayerSpec,
        tensors: Tensors,
        alpha: float | None = None,
        *,
        settings: Mapping[str, float] | None = None,
        trainable: bool = False,
        dropout: Dropout = _NO_DROPOUT,
        widens: bool = False,
        stages: tuple[Stage, ...] | None = None,
    ) -> None:
        """Make an adapter layer for a host of geometry `spec`.

        Args:
            tensors: the tensors that the type's `fit` or `init` returned. They become parameters without a copy; a
                parameter, which other layers share, stays the same.
            alpha: `None` makes the scale 1.
            settings: the numbers of the type that are not tensors; those left out have the type's defaults.
            trainable: whether the parameters require gradients.
            dropout: dropout probabilities; defaults to no dropout.
            widens: whether the tensors have more inputs than the host has without adapters.
            stages: where the layer acts; defaults to the stages of the type for these tensors.
        """
        super().__init__()
        # Plain attributes, bypassing `nn.Module.__setattr__`, whose checks took a fifth of the time of loading a file.
        self.__dict__.update(
            adapter_type=adapter_type,
            spec=spec,
            alpha=alpha,
            dropout=dropout,
            settings={**adapter_type.settings, **(settings or {})},
            stages=adapter_type.stages(tensors, spec) if stages is None else stages,
            inputs=spec.in_features,
            widens=widens,
            siblings=(),
            _cache=None,
            _term=None,
        )
        for name, tensor in tensors.items():
            if not tensor.is_floating_point():
                # Positions are no parameters, which optimisers and counts of parameters go by.
                self._buffers[name] = tensor
                continue
            if type(tensor) is Tensor:
                # What `nn.Parameter` does with a plain tensor, after checks that take as long.
                tensor = Tensor._make_subclass(nn.Parameter, tensor, trainable and name not in adapter_type.fixed)
            elif not isinstance(tensor, nn.Parameter):
                tensor = nn.Parameter(tensor, requires_grad=trainable and name not in adapter_type.fixed)
            self._parameters[name] = tensor

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The parameters and positions, by the names that the type uses."""
        found = {name: tensor for name, tensor in self._parameters.items() if tensor is not None}
        return {**found, **self._buffers} if self._buffers else found  # type: ignore[dict-item]

    @property
    def own_tensors(self) -> dict[str, Tensor]:
        """The parameters without the columns of zeros that were appended for a host with more inputs."""
        if self.inputs == self.spec.in_features:
            return self.tensors
        columns = self.adapter_type.columns
        return {n: t.narrow(columns[n], 0, self.inputs) if n in columns else t for n, t in self.tensors.items()}

    @property
    def rank(self) -> int | None:
        """The rank according to the shapes of the tensors, or `None` if the type has none."""
        return self.adapter_type.rank(self.tensors)

    @property
    def scale(self) -> float:
        """`alpha / rank`; see `scale_of`."""
        return 1.0 if self.alpha is None else scale_of(self.alpha, self.rank, self.settings)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the layer computes in."""
        return next(tensor.dtype for tensor in self._parameters.values() if tensor is not None)

    @property
    def reads_weight(self) -> bool:
        """Whether the layer's host must have a weight that can be decoded, for this layer to run."""
        return "patch" in self.stages or self.adapter_type.reads_weight(self.tensors)

    @property
    def is_additive(self) -> bool:
        """Whether the layer only adds to the output of its host."""
        return "add" in self.stages and len(self.stages) == 1

    @property
    def state(self) -> LayerState:
        """The content that a file stores for this layer."""
        state = LayerState(
            type=self.adapter_type.name,
            tensors={name: whole(tensor) for name, tensor in self.own_tensors.items()},
            alpha=self.alpha,
            rank=self.rank,
            kernel=self.spec.kernel,
            is_embedding=self.spec.kind == "embedding",
            settings=self.settings,
            inputs=self.spec.fan_in,
            outputs=self.spec.out_features,
            groups=self.spec.groups,
            widens=self.widens,
            group=frozenset(map(id, (self, *self.siblings))) if self.siblings else frozenset(),
        )
        return self.adapter_type.stored_as(state)

    def as_low_rank(self, prepared: Tensors) -> tuple[Tensor, Tensor] | None:
        """Return `PreparedLayer.as_low_rank` for prepared tensors of this layer."""
        if "add" not in self.stages or (self.training and self.dropout.input):
            return None
        if self.adapter_type.delta_bias(prepared) is not None:
            return None
        return self.adapter_type.as_low_rank(prepared, self.spec)

    def prepare(
        self,
        weight: Callable[[], Tensor],
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        *,
        term_of: TermOf | None = None,
    ) -> Tensors:
        """Return the prepared tensors for a host with the given weight.

        Args:
            weight: returns the canonical base weight; called only if the type needs it.
            dtype: the dtype to convert the parameters to first; defaults to their own.
            device: the device to move the parameters to first; defaults to their own.
            term_of: returns the `joint_term` of a sibling; defaults to that for the weight of its host.
        """
        tensors: Tensors = self.tensors
        if dtype is not None or device is not None:
            tensors = {name: converted(tensor, dtype, device) for name, tensor in tensors.items()}
        prepared = self.adapter_type.prepare(tensors, self.spec, self.surroundings(weight, term_of))
        if "patch" not in self.stages:
            return prepared
        # Patches overlap, so the input cannot be mapped before the convolution: map the weight instead.
        rows = weight().to(next(t for t in tensors.values() if t.is_floating_point())).flatten(1)
        unit = one(rows)
        delta = self.adapter_type.apply_map(prepared, self.spec, vectors=rows, axis=1, gate=unit, transposed=True)
        return {**prepared, PATCH_DELTA: delta.view(self.spec.weight_shape)}

    def surroundings(self, weight: Callable[[], Tensor], term_of: TermOf | None = None) -> Surroundings:
        """Return what `AdapterType.prepare` may use besides tensors; see `prepare` for the arguments."""
        find = term_of or (lambda sibling: sibling.joint_term(sibling.base_weight()))
        others = (lambda: sum_of_terms(map(find, self.siblings))) if self.siblings else None
        return Surroundings(self.settings, self.scale, weight, others, partial(bias_of, self.__dict__.get("host")))

    def joint_term(self, weight: Tensor) -> Tensor:
        """Return what this part of a layer contributes to `prepare` of the others, for the canonical base `weight`."""
        tensors = {name: converted(tensor, weight.dtype, weight.device) for name, tensor in self.tensors.items()}
        return self.adapter_type.joint_term(tensors, self.spec, self.surroundings(lambda: weight))

    @property
    def base_weight(self) -> BaseWeight:
        """The host's own weight, canonical and decoded when it is called."""
        return BaseWeight(self.host, self.spec, self.__dict__)

    @property
    def is_prepared(self) -> bool:
        """Whether the prepared tensors are others than the layer's own."""
        return self.adapter_type.is_prepared or "patch" in self.stages

    def prepared_tensors(self) -> Tensors:
        """Return the prepared tensors for the current weight of the host; those of the last call if nothing changed."""
        if not self.is_prepared:
            return self.tensors
        # In training, tensors may be written without a new autograd version (`.data` of an averaged model), and in a
        # compiled graph there are no versions to compare. So neither uses the cache.
        tensors = (tensor for layer in (self, *self.siblings) for tensor in layer.tensors.values())
        if torch.compiler.is_compiling() or any(t.requires_grad or t.is_inference() for t in tensors):
            return self.prepare(self.base_weight)
        if self._cache is None or not self._cache.is_current():
            self.__dict__["_cache"] = Cached.of((self, *self.siblings), self._prepared_beside_siblings)
        assert self._cache is not None
        return self._cache.value

    def _prepared_beside_siblings(self) -> Tensors:
        return self.prepare(self.base_weight, term_of=AdapterLayer._cached_term)

    def _cached_term(self) -> Tensor:
        if self._term is None or not self._term.is_current():
            self.__dict__["_term"] = Cached.of((self,), lambda: self.joint_term(self.base_weight()))
        assert self._term is not None
        return self._term.value

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # The state dict of an adapted model is the base model's, so loading one must not ask for adapter parameters.
        if BANK not in prefix.split("."):
            super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        """Return the type, shapes and scale for `repr`."""
        shapes = ", ".join(f"{name}={tuple(tensor.shape)}" for name, tensor in self.tensors.items())
        return f"{self.adapter_type.name}, {shapes}, scale={self.scale:g}"


def one(like: Tensor) -> Tensor:
    """Return a gate of 1 on the device of `like`."""
    return torch.ones((), dtype=torch.float32, device=like.device)
