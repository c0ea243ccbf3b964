"""Files with random adapters of every type for the layers of one model, to be swapped and merged."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import diffadapt
from diffadapt import AdapterConfig
from tests.support.small_models import flux

ATTENTION = r".*\.(to_[qkv]|q_proj|v_proj)"
LINEAR = r".*\.(to_[qkv]|to_out\.0|q_proj|v_proj|fc1|linear_1|proj_mlp|net\.2)"
SPATIAL = r".*\.conv1"

LORA = diffadapt.LoraConfig
CONFIGS: dict[str, AdapterConfig] = {
    "lora": LORA(rank=4, alpha=2, target_modules=ATTENTION, init=False),
    "lora of a higher rank on more layers": LORA(rank=8, alpha=4, target_modules=LINEAR, init=False),
    "lora of a lower rank on fewer": LORA(rank=2, target_modules=r".*\.(to_q|q_proj)", init=False),
    "lora elsewhere": LORA(rank=3, target_modules=r".*\.(to_out\.0|fc1)", init=False),
    "lora with a bias": LORA(rank=2, target_modules=LINEAR, bias=True, init=False),
    "dora": LORA(rank=2, target_modules=LINEAR, use_dora=True, init=False),
    "dora by input": LORA(rank=2, target_modules=LINEAR, use_dora=True, dora_axis="input", init=False),
    "loha": diffadapt.LoHaConfig(rank=2, alpha=1, target_modules=LINEAR, init=False),
    "lokr": diffadapt.LoKrConfig(rank=1, factor=2, target_modules=LINEAR, init=False),
    "lokr whole": diffadapt.LoKrConfig(full_matrix=True, target_modules=LINEAR, init=False),
    "oft": diffadapt.OFTConfig(block_size=4, target_modules=LINEAR, init=False),
    "oft on outputs": diffadapt.OFTConfig(block_size=4, side="output", rescale=True, target_modules=LINEAR, init=False),
    "boft": diffadapt.BOFTConfig(block_size=4, target_modules=LINEAR, init=False),
    "boft on outputs": diffadapt.BOFTConfig(block_size=4, side="output", target_modules=LINEAR, init=False),
    "ia3": diffadapt.IA3Config(target_modules=LINEAR, init=False),
    "glora": diffadapt.GLoRAConfig(rank=2, target_modules=LINEAR, init=False),
    "full": diffadapt.FullConfig(bias=True, target_modules=LINEAR, init=False),
}
ON_CONVOLUTIONS: dict[str, AdapterConfig] = {
    "locon": LORA(rank=4, target_modules=SPATIAL, init=False),
    "locon with a core": LORA(rank=2, target_modules=SPATIAL, use_tucker=True, init=False),
    "conv loha": diffadapt.LoHaConfig(rank=2, target_modules=SPATIAL, init=False),
    "conv dora": LORA(rank=2, target_modules=SPATIAL, use_dora=True, init=False),
    "conv oft": diffadapt.OFTConfig(block_size=4, target_modules=SPATIAL, init=False),
    "conv boft": diffadapt.BOFTConfig(block_size=4, side="output", target_modules=SPATIAL, init=False),
}


def make(build: Callable[[], nn.Module], config: AdapterConfig, path: Path, format: str = "") -> Path:
    """Write a file with a random adapter, and return its path.

    Args:
        format: Defaults to one that can express the adapter.
    """
    model = build()
    adapter = diffadapt.add_adapter(model, config)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.mul_(0.5)
    on_inputs = getattr(config, "side", "") == "input" and not isinstance(config, diffadapt.IA3Config)
    format = format or ("peft" if on_inputs or build is flux else "kohya")
    diffadapt.adapters(model).save("default", path, format=format)
    return path
