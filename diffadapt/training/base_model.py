"""Load the frozen base pipeline: its encoders first, the denoiser when it is needed."""

import inspect
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import deprecation_utils
from torch import nn

from diffadapt.errors import UsageError
from diffadapt.training.families import Pipeline, TrainingFamily
from diffadapt.training.options import TrainingOptions
from diffadapt.training.quantised_base import cast_layerwise, quantization_config, quantize_linears

PRECISIONS = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
DENOISERS = ("unet", "transformer", "transformer_2", "prior")
_SINGLE_FILES = (".safetensors", ".ckpt")


class BaseModel:
    """The base pipeline. Its denoiser may be without weights until `load_denoisers` is called.

    Attributes:
        pipe: the pipeline. Everything in it is frozen and in evaluation mode.
        is_own: whether it was loaded here.
    """

    def __init__(
        self, options: TrainingOptions, dtype: torch.dtype, device: torch.device, pipe: Pipeline | None = None
    ) -> None:
        """Load the pipeline without its denoisers, or take `pipe`, which is loaded already.

        The VAE is float32, since in float16 that of SDXL overflows.

        Raises:
            UsageError: there is no such pipeline.
        """
        self.options = options
        self.dtype = dtype
        self.device = device
        self.source = options.pretrained_model_name_or_path
        self._missing: dict[str, type[nn.Module]] = {}
        try:
            self.is_own = pipe is None
            self.pipe = pipe if pipe is not None else self._single_file() if self._is_single_file else self._folder()
        except UsageError:
            raise
        except (OSError, ValueError, KeyError) as error:
            raise UsageError(f"{self.source} cannot be loaded as a pipeline: {error}") from error
        if self.is_own and "safety_checker" in self.pipe.components:
            self.pipe.register_modules(safety_checker=None)
        self.pipe.set_progress_bar_config(disable=True)
        for name, part in self.pipe.components.items():
            if isinstance(part, nn.Module) and name not in self._missing:
                self._settle(name, part)

    @property
    def _is_single_file(self) -> bool:
        return Path(self.source).suffix in _SINGLE_FILES

    def _folder(self) -> Pipeline:
        where: dict[str, Any] = {"revision": self.options.revision}
        index: Any = DiffusionPipeline.load_config(self.source, **where)
        placeholders: dict[str, nn.Module] = {}
        for name in DENOISERS:
            library, kind = index.get(name) or ("", "")
            if library == "diffusers":
                self._missing[name] = getattr(diffusers, kind)
                config = self._missing[name].load_config(self.source, subfolder=name, **where)  # type: ignore[attr-defined]
                with torch.device("meta"):
                    placeholders[name] = self._missing[name].from_config(config)  # type: ignore[attr-defined]
                # Not by the method of diffusers' models, which warns of modules that are kept in float32.
                nn.Module.to(placeholders[name], self.dtype)
        dtypes = _in_dtype({"default": self.dtype, "vae": torch.float32}) if self.dtype != torch.float32 else {}
        return DiffusionPipeline.from_pretrained(
            self.source, variant=self.options.variant, **where, **dtypes, **placeholders
        )

    def _single_file(self) -> Pipeline:
        """Load a file with all weights of a pipeline, by the pipeline class that its keys belong to."""
        from diffusers.loaders.single_file_utils import infer_diffusers_model_type, load_single_file_checkpoint

        if self.options.base_precision in ("int8", "nf4"):
            raise UsageError(
                f"--base_precision {self.options.base_precision} needs a saved pipeline; {self.source} is a single file"
            )
        kind = infer_diffusers_model_type(load_single_file_checkpoint(self.source))
        name = _SINGLE_FILE_PIPELINES.get(kind)
        if name is not None:
            config = {} if self.options.single_file_config is None else {"config": self.options.single_file_config}
            return getattr(diffusers, name).from_single_file(self.source, **_in_dtype(self.dtype), **config)
        raise UsageError(f"{self.source} is a single file of the kind {kind}; load it and save it as a pipeline first")

    def load_denoisers(self) -> None:
        """Load the weights of the denoisers, in the precision of the options. Once is enough."""
        for name, kind in list(self._missing.items()):
            further: dict[str, Any] = {}
            packed = self.options.base_precision in ("int8", "nf4")
            if packed and self.device.type != "cpu":
                further["quantization_config"] = quantization_config(self.options.base_precision, self.dtype)
            model = kind.from_pretrained(  # type: ignore[attr-defined]
                self.source,
                subfolder=name,
                revision=self.options.revision,
                variant=self.options.variant,
                **_in_dtype(self.dtype),
                **further,
            )
            if packed and not further:
                quantize_linears(model, self.options.base_precision, self.dtype)
            self.pipe.register_modules(**{name: model})
            self._settle(name, model)
            del self._missing[name]
        if self.options.base_precision == "fp8":
            for name in DENOISERS:
                model = self.pipe.components.get(name)
                if isinstance(model, nn.Module):
                    cast_layerwise(model, self.dtype)

    def _settle(self, name: str, part: nn.Module) -> None:
        part.requires_grad_(False).eval()
        if getattr(part, "is_quantized", False) or getattr(part, "hf_quantizer", None) is not None:
            return
        part.to(self.device)
        dtype = torch.float32 if name == "vae" else self.dtype
        # Some models keep a few of their parameters in float32.
        if all(parameter.dtype != dtype for parameter in part.parameters()):
            part.to(dtype)

    def release(self, names: list[str], *, keep: bool) -> None:
        """Free the memory of components that are not needed any more: move them to the CPU, or drop their weights.

        The weights of a pipeline that was given are kept in any case.
        """
        for name in names:
            part = self.pipe.components.get(name)
            if not isinstance(part, nn.Module) or getattr(part, "is_quantized", False):
                continue
            part.to("cpu" if keep or not self.is_own else "meta")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


_SINGLE_FILE_PIPELINES = {
    "v1": "StableDiffusionPipeline",
    "v2": "StableDiffusionPipeline",
    "xl_base": "StableDiffusionXLPipeline",
    "playground-v2-5": "StableDiffusionXLPipeline",
    "sd3": "StableDiffusion3Pipeline",
    "sd35_large": "StableDiffusion3Pipeline",
    "sd35_medium": "StableDiffusion3Pipeline",
    "flux-dev": "FluxPipeline",
    "flux-schnell": "FluxPipeline",
}
"""diffusers' name for the kind of a single file -> pipeline class."""


def _in_dtype(dtype: object) -> dict[str, object]:
    """Return the argument that makes `from_pretrained` load in a dtype; diffusers has renamed it."""
    return {"dtype" if hasattr(deprecation_utils, "_resolve_dtype") else "torch_dtype": dtype}


def default_resolution(pipe: Pipeline, family: TrainingFamily) -> int:
    """Return the resolution in which the pipeline draws by default, rounded down to what the family can train."""
    divisor = family.divisor(pipe)
    denoiser = next(getattr(pipe, name) for name in family.experts(pipe))
    own = getattr(denoiser.config, "sample_size", None)
    size = max(own) if isinstance(own, (list, tuple)) else own
    size = size or getattr(pipe, "default_sample_size", None)
    pixels = size * getattr(pipe, "vae_scale_factor", 8) if size else 1024
    return max(divisor, pixels // divisor * divisor)


def takes(function: Any, name: str) -> bool:
    """Return whether a function has a parameter of this name."""
    return name in inspect.signature(function).parameters
