"""A denoiser whose weights are stored in 8 or 4 bits: NF4 and int8 of bitsandbytes, and layerwise casting to float8."""

import re
from typing import Any

import diffusers
import torch
from torch import nn

from diffadapt.errors import UsageError


def quantization_config(precision: str, dtype: torch.dtype) -> Any:
    """Return the config with which diffusers quantises a model while it loads it, on an accelerator."""
    _bitsandbytes(precision)
    if precision == "int8":
        return diffusers.BitsAndBytesConfig(load_in_8bit=True)
    return diffusers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def quantize_linears(model: nn.Module, precision: str, dtype: torch.dtype) -> None:
    """Quantise the linear layers of a model on the CPU, which diffusers refuses to do."""
    library = _bitsandbytes(precision)
    for path, layer in list(model.named_modules()):
        if type(layer) is not nn.Linear:
            continue
        shape, has_bias = (layer.in_features, layer.out_features), layer._parameters["bias"] is not None
        if precision == "int8":
            packed = library.nn.Linear8bitLt(*shape, bias=has_bias, has_fp16_weights=False)
        else:
            packed = library.nn.Linear4bit(*shape, bias=has_bias, compute_dtype=dtype, quant_type="nf4")
            # In evaluation mode it would pack its weight in a form without a backward pass, on CPUs with AVX512-BF16.
            packed.support_avx512bf16_for_cpu = False
        packed.load_state_dict(layer.state_dict())
        parent, _, name = path.rpartition(".")
        # The move to a device quantises.
        setattr(model.get_submodule(parent), name, packed.requires_grad_(False).to("cpu"))
    model.is_quantized = True  # type: ignore[assignment]


def cast_layerwise(model: nn.Module, dtype: torch.dtype) -> None:
    """Store the weights of linear layers in float8, and compute in `dtype`.

    Convolutions are left out: the weight that autograd saves for their backward pass would be replaced.
    """
    from diffusers.hooks.layerwise_casting import DEFAULT_SKIP_MODULES_PATTERN

    convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    kept = [f"^{re.escape(path)}$" for path, layer in model.named_modules() if isinstance(layer, convolutions)]
    own = getattr(model, "_skip_layerwise_casting_patterns", None) or ()
    model.enable_layerwise_casting(  # type: ignore[operator]
        storage_dtype=torch.float8_e4m3fn,
        compute_dtype=dtype,
        skip_modules_pattern=(*DEFAULT_SKIP_MODULES_PATTERN, *own, *kept),
    )


def _bitsandbytes(precision: str) -> Any:
    try:
        import bitsandbytes
    except ImportError as error:
        raise UsageError(f"--base_precision {precision} needs bitsandbytes: pip install bitsandbytes") from error
    return bitsandbytes
