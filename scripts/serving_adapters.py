"""Any number of adapters of five types for the embedded pipeline, for measuring how a pipeline with many is served.

Each is a variation of `ink`, `pixel` or `critter`: the change of every layer, slightly scaled and with a little noise,
written as a LoRA, DoRA, LoHa, LoKr or IA3. So every adapter draws other pictures than the next, and in the style or
with the subject of the original. All have at most the rank of the originals, so they fit the same slots.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

PIPELINE = Path(__file__).resolve().parent.parent / "examples" / "tiny_pipeline"
ORIGINALS = ("ink", "pixel", "critter")
NOISE = 0.05
"""Standard deviation of the noise on the factors, as a share of that of the factors."""
HALF_RANK = 2
"""Rank of each of the two products of a LoHa, so that the LoHa has rank 4."""
BLOCKS = 2
"""Number of blocks per side of a LoKr."""
LOKR_RANK = 4

Tensors = dict[str, Tensor]


def lora(weight: Tensor, down: Tensor, up: Tensor) -> Tensors:
    """Return the factors, (rank, inputs) and (outputs, rank)."""
    kernel = weight.shape[2:]
    shape = (len(down), weight.shape[1], *kernel)
    return {"lora_down.weight": down.reshape(shape), "lora_up.weight": up.reshape(*up.shape, *(1,) * len(kernel))}


def dora(weight: Tensor, down: Tensor, up: Tensor) -> Tensors:
    """Return the factors and the lengths of the rows of the changed weight, a little longer."""
    lengths = 1.02 * (weight.flatten(1) + up @ down).norm(dim=1)
    return {**lora(weight, down, up), "dora_scale": lengths.reshape(-1, *(1,) * (weight.dim() - 1))}


def loha(weight: Tensor, down: Tensor, up: Tensor) -> Tensors:
    """Return the best rank-2 product and one that is almost one everywhere."""
    left, right = factors(up @ down, HALF_RANK)
    ones = torch.zeros_like(left), torch.zeros_like(right)
    ones[0][:, 0], ones[1][0] = 1.0, 1.0
    ones[0][:, 1], ones[1][1] = 0.1 * left[:, 0].sign(), 0.1 * right[0].sign()
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    return dict(zip(names, (left, right, *ones), strict=True)) | {"alpha": torch.tensor(float(HALF_RANK))}


def lokr(weight: Tensor, down: Tensor, up: Tensor) -> Tensors:
    """Return the nearest Kronecker product (Van Loan and Pitsianis, 1993), with a second factor of low rank."""
    outputs, inputs = weight.shape[0] // BLOCKS, weight.shape[1] // BLOCKS
    blocks = (up @ down).reshape(BLOCKS, outputs, BLOCKS, -1).transpose(1, 2).flatten(0, 1).flatten(1)
    small, large = factors(blocks, 1)
    left, right = factors(large.reshape(outputs, -1), LOKR_RANK)
    tensors = {"lokr_w1": small.reshape(BLOCKS, BLOCKS), "lokr_w2_a": left, "lokr_w2_b": right}
    assert right.shape[1] == inputs * weight[0, 0].numel()
    return tensors | {"alpha": torch.tensor(float(right.shape[0]))}


def ia3(weight: Tensor, down: Tensor, up: Tensor) -> Tensors:
    """Return for every output how much its row changes, relative to the row; half of the rows shrink."""
    change = up @ down
    sizes = change.norm(dim=1) / weight.flatten(1).norm(dim=1).clamp(min=1e-6)
    signs = (change.sum(1) < 0).to(sizes.dtype) * -2 + 1
    return {"weight": (sizes * signs).clamp(-0.6, 0.6), "on_input": torch.tensor(False)}


TYPES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensors]] = {
    "lora": lora,
    "dora": dora,
    "loha": loha,
    "lokr": lokr,
    "ia3": ia3,
}
"""Adapter type -> function of a weight and the two factors of its change, which returns the tensors of one layer."""


def factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the best approximation of a matrix by two factors, (rows, rank) and (rank, columns)."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    roots = values[:rank].sqrt()
    return left[:, :rank] * roots, roots[:, None] * right[:rank]


def type_of(number: int) -> str:
    """Return the adapter type of the adapter with this number."""
    return list(TYPES)[number % len(TYPES)]


def name_of(number: int) -> str:
    """Return the name of the adapter with this number."""
    return f"{ORIGINALS[number % len(ORIGINALS)]}-{type_of(number)}-{number}"


def write(folder: Path, count: int) -> tuple[list[str], Path]:
    """Write `count` adapters into `folder`, and into its subfolder `lora` the same changes as LoRAs, for libraries
    that have no other types. Files that exist are kept.

    Returns:
        The names, and the folder with the LoRAs. The file of an adapter is `NAME.safetensors`.
    """
    only_lora = folder / "lora"
    only_lora.mkdir(parents=True, exist_ok=True)
    names = [name_of(number) for number in range(count)]
    missing = [number for number in range(count) if not (only_lora / f"{names[number]}.safetensors").exists()]
    if missing:
        pipe = StableDiffusionPipeline.from_pretrained(PIPELINE, local_files_only=True)
        weights = dict(pipe.unet.named_parameters())
        originals = {name: load_file(PIPELINE / "adapters" / f"{name}.safetensors") for name in ORIGINALS}
        for number in missing:
            original = originals[ORIGINALS[number % len(ORIGINALS)]]
            for target, kind in ((folder, type_of(number)), (only_lora, "lora")):
                tensors = varied(original, weights, number, kind)
                partial = target / f"{names[number]}.partial"
                save_file(tensors, partial, metadata={"variation": json.dumps({"number": number})})
                partial.rename(target / f"{names[number]}.safetensors")
    return names, only_lora


def varied(original: Tensors, weights: Tensors, number: int, kind: str) -> Tensors:
    """Return the tensors of one adapter of type `kind`, in float16, with kohya's names.

    Args:
        original: a LoRA with an alpha equal to its rank, in the layout of diffusers.
        weights: weights of the UNet by name.
        number: number of the adapter, the seed of its variation.
        kind: a key of `TYPES`.
    """
    generator = torch.Generator().manual_seed(number)
    strength = 0.7 + 0.5 * torch.rand((), generator=generator)
    tensors: Tensors = {}
    for key, down in original.items():
        path, is_down, _ = key.removeprefix("unet.").partition(".lora_A")
        if is_down:
            down, up = down.float().flatten(1), original[key.replace("lora_A", "lora_B")].float().flatten(1)
            down += NOISE * down.std() * torch.randn(down.shape, generator=generator)
            up += NOISE * up.std() * torch.randn(up.shape, generator=generator)
            weight = weights[f"{path}.weight"].detach().float()
            for name, tensor in TYPES[kind](weight, down, strength * up).items():
                is_number = tensor.is_floating_point()
                flat = f"lora_unet_{path.replace('.', '_')}.{name}"
                tensors[flat] = (tensor.half() if is_number else tensor).contiguous()
    return tensors
