"""Every adapter type as a plain formula in float64: random tensors for one layer, and the resulting weight.

The library is not used here. Tensors have the names of files, LoRA's factors those of PEFT. The weight of a layer has
the shape (out, in, *kernel), that of a norm (channels,). Formulas and layouts: PEFT 0.21.2 `tuners/`, LyCORIS f49d30d
`lycoris/modules/` and `functional/`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Method:
    """What files have besides the tensors of a layer if PEFT alone trains the type.

    Attributes:
        peft_type: Its name in the config of a PEFT folder.
        type: The library's name.
        settings: The settings that differ from the defaults. A file of LyCORIS' layout has them in its header.
        derived: Tensors that PEFT computes again, and that files of LyCORIS' layout have.
        shared: `(most outputs, most columns)` of the layers -> tensors that all of them share.
        repeats: PEFT stores the shared tensors for every layer, too.
    """

    peft_type: str
    type: str
    settings: Mapping[str, float] = field(default_factory=dict[str, float])
    derived: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    shared: Callable[[int, int], Mapping[str, Tensor]] = lambda rows, columns: {}
    repeats: bool = False


@dataclass(frozen=True)
class Content:
    """The tensors of a file for one layer, and the weight and bias that the layer has with them.

    Attributes:
        tensors: Name in files -> tensor.
        weight: The resulting weight.
        bias: The resulting bias.
        config: Settings in the `adapter_config.json` of a PEFT folder.
        method: What else the file has; `None` for types that other programs have, too.
    """

    tensors: dict[str, Tensor]
    weight: Tensor
    bias: Tensor | None
    config: Mapping[str, Any] = field(default_factory=dict[str, Any])
    method: Method | None = None


Variant = Callable[[Tensor, Tensor | None], Content | None]
"""`(weight, bias) -> Content`; `None` for a layer on which the type has no meaning."""

Factors = Callable[..., tuple[dict[str, Tensor], Tensor]]
"""`(out, in, *kernel) -> (tensors, their product)`."""


def normal(*shape: int, mean: float = 0.0) -> Tensor:
    """Return random numbers that float32 holds exactly."""
    return (mean + 0.3 * torch.randn(*shape)).double()


def alpha(value: float) -> dict[str, Tensor]:
    return {"alpha": torch.tensor(value)}


def eight(size: int) -> int:
    """Return a size for a factor or block that divides that of every layer here: 8, or less in very small layers."""
    return math.gcd(8, size)


# Additive changes: tensors, and their change at scale 1


def lora_factors(out: int, *fan_in: int, rank: int = 4) -> tuple[dict[str, Tensor], Tensor]:
    down, up = normal(rank, *fan_in), normal(out, rank, *(1 for _ in fan_in[1:]))
    return {"lora_A.weight": down, "lora_B.weight": up}, (up.flatten(1) @ down.flatten(1)).view(out, *fan_in)


def tucker_factors(out: int, columns: int, *kernel: int) -> tuple[dict[str, Tensor], Tensor]:
    if not kernel:
        return lora_factors(out, columns)
    ones = (1,) * len(kernel)
    down, mid, up = normal(4, columns, *ones), normal(4, 4, *kernel), normal(out, 4, *ones)
    tensors = {"lora_A.weight": down, "lora_mid.weight": mid, "lora_B.weight": up}
    return tensors, torch.einsum("mn..., im, nj -> ij...", mid, up.flatten(1), down.flatten(1))


def loha_factors(out: int, *fan_in: int) -> tuple[dict[str, Tensor], Tensor]:
    columns = math.prod(fan_in)
    t = {f"hada_w{n}_{side}": normal(*((out, 4) if side == "a" else (4, columns))) for n in "12" for side in "ab"}
    change = (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"])
    return t, change.view(out, *fan_in)


def lokr_factors(
    out: int, columns: int, *kernel: int, o2: int | None = None, low_rank: str = ""
) -> tuple[dict[str, Tensor], Tensor]:
    o2, i1 = o2 or eight(out), math.gcd(4, columns)
    shapes = {"1": (out // o2, i1, *(1 for _ in kernel)), "2": (o2, columns // i1, *kernel)}
    tensors: dict[str, Tensor] = {}
    whole: list[Tensor] = []
    for n, (rows, *fan_in) in shapes.items():
        if n in low_rank:
            a, b = 2 * normal(rows, 2), 2 * normal(2, math.prod(fan_in))
            tensors |= {f"lokr_w{n}_a": a, f"lokr_w{n}_b": b}
            whole.append((a @ b).view(rows, *fan_in))
        else:
            whole.append(normal(rows, *fan_in))
            tensors[f"lokr_w{n}"] = whole[-1].flatten(1) if n == "1" else whole[-1]
    return tensors, torch.kron(*whole)


def lokr(low_rank: str, o2: Callable[[int], int] = eight) -> Factors:
    return lambda out, *fan_in: lokr_factors(out, *fan_in, o2=o2(out), low_rank=low_rank)


def added(factors: Factors, scale: float, config: Mapping[str, Any] | None = None, **extra: Tensor) -> Variant:
    def make(weight: Tensor, bias: Tensor | None) -> Content:
        tensors, change = factors(*weight.shape)
        return Content({**tensors, **extra}, weight + scale * change, bias, config or {})

    return make


def lora_of_any_scale(weight: Tensor, bias: Tensor | None) -> Content:
    """Choose a random rank and alpha for every layer."""
    rank, number = int(torch.randint(2, 5, ())), float(torch.randint(1, 7, ()))
    tensors, change = lora_factors(*weight.shape, rank=rank)
    return Content({**tensors, **alpha(number)}, weight + number / rank * change, bias)


def lora_with_bias(weight: Tensor, bias: Tensor | None) -> Content | None:
    if bias is None:
        return None
    tensors, change = lora_factors(*weight.shape)
    shift = normal(len(bias))
    return Content({**tensors, "lora_B.bias": shift, **alpha(2.0)}, weight + change / 2, bias + shift / 2)


def tlora(weight: Tensor, bias: Tensor | None) -> Content | None:
    """Follow LyCORIS: the largest components of the weight are trained, and taken out as they were."""
    out, columns = weight.shape
    rank = min(3, out, columns)
    down, up, values = normal(rank, columns), normal(out, rank), normal(1, rank, mean=1.0)
    left, start, right = torch.linalg.svd(weight.double(), full_matrices=False)
    change = up * values @ down - left[:, :rank] * start[:rank] @ right[:rank]
    tensors = {"q_layer.weight": down, "p_layer.weight": up, "lambda_layer": values, **alpha(2.0)}
    return Content(tensors, weight + 2.0 / rank * change, bias)


def control(weight: Tensor, bias: Tensor | None) -> Content | None:
    """Follow Black Forest Labs' control LoRAs: factors and a bias, and new weights of norms."""
    if weight.ndim == 1:
        new = normal(len(weight), mean=1.0)
        return Content({"scale": new}, new, bias)
    if bias is None:
        return None
    tensors, change = lora_factors(*weight.shape)
    shift = normal(len(bias))
    return Content({**tensors, "lora_B.bias": shift}, weight + change, bias + shift)


def block_diagonal(weight: Tensor, bias: Tensor | None) -> Content:
    """Follow `split_qkv` of sd-scripts: a LoRA for every 32 rows, together block-diagonal, with the alpha of one."""
    parts = [(normal(4, weight.shape[1]), normal(32, 4)) for _ in range(len(weight) // 32)]
    down, up = torch.cat([down for down, _ in parts]), torch.block_diag(*(up for _, up in parts))
    tensors = {"lora_A.weight": down, "lora_B.weight": up, **alpha(4.0)}
    return Content(tensors, weight + 4.0 / len(down) * up @ down, bias)


def dora(of: Variant, by_input: bool = False) -> Variant:
    """Add a magnitude for every output, or for every input, to an additive change."""

    def make(weight: Tensor, bias: Tensor | None) -> Content | None:
        base = of(weight, bias)
        if base is None:
            return None
        kept = 1 if by_input else 0
        others = [dim for dim in range(weight.ndim) if dim != kept]
        norm = torch.linalg.vector_norm(base.weight, dim=others, keepdim=True)
        magnitude = norm * normal(*norm.shape, mean=1.0)
        return Content({**base.tensors, "dora_scale": magnitude}, magnitude * base.weight / norm, bias)

    return make


def dora_of_peft(of: Variant) -> Variant:
    def make(weight: Tensor, bias: Tensor | None) -> Content | None:
        content = dora(of)(weight, bias)
        if content is not None:
            magnitude = content.tensors.pop("dora_scale").flatten()
            shape = (1, -1, *(1 for _ in weight.shape[2:])) if weight.ndim > 2 else (-1,)
            content.tensors["lora_magnitude_vector"] = magnitude.view(shape)
        return content

    return make


def full(weight: Tensor, bias: Tensor | None) -> Content:
    diff = normal(*weight.shape)
    if bias is None:
        return Content({"diff": diff}, weight + diff, None)
    shift = normal(len(bias))
    return Content({"diff": diff, "diff_b": shift}, weight + diff, bias + shift)


def full_bias_alone(weight: Tensor, bias: Tensor | None) -> Content | None:
    if bias is None:
        return None
    shift = normal(len(bias))
    return Content({"diff_b": shift}, weight, bias + shift)


def norm(weight: Tensor, bias: Tensor | None) -> Content:
    """Make a full change under the names that LyCORIS has for norm layers."""
    changed = full(weight, bias)
    names = {"diff": "w_norm", "diff_b": "b_norm"}
    return Content({names[name]: t for name, t in changed.tensors.items()}, changed.weight, changed.bias)


def glora(weight: Tensor, bias: Tensor | None) -> Content:
    out, columns, *kernel = weight.shape
    ones = [1 for _ in kernel]
    a1, a2, b1, b2 = normal(columns, 4), normal(4, columns), normal(out, 4), normal(4, columns, *kernel)
    change = (b1 @ b2.flatten(1)).view_as(weight) + torch.einsum("oi..., ij -> oj...", weight, a1 @ a2)
    small = {name: t.view(*t.shape, *ones) for name, t in (("a1", a1), ("a2", a2), ("b1", b1))}
    tensors = {f"{name}.weight": t for name, t in {**small, "b2": b2}.items()}
    return Content({**tensors, **alpha(2.0)}, weight + change / 2, bias)


# Factors


def per_output(factors: Tensor, weight: Tensor) -> Tensor:
    return factors.view(-1, *(1 for _ in weight.shape[1:]))


def per_input(factors: Tensor, weight: Tensor) -> Tensor:
    return factors.view(1, -1, *(1 for _ in weight.shape[2:]))


def ia3_of_peft(weight: Tensor, bias: Tensor | None) -> Content:
    factors = normal(len(weight), mean=1.0)
    stored = per_input(factors, weight) if weight.ndim > 2 else factors.view(-1, 1)
    return Content({"ia3_l": stored}, weight * per_output(factors, weight), None if bias is None else bias * factors)


def ia3_of_peft_on_input(weight: Tensor, bias: Tensor | None) -> Content | None:
    if weight.ndim > 2:
        # Its shape would not distinguish it from factors for outputs.
        return None
    factors = normal(1, weight.shape[1], mean=1.0)
    return Content({"ia3_l": factors}, weight * factors, bias)


def ia3_of_lycoris(weight: Tensor, bias: Tensor | None) -> Content:
    change = normal(len(weight))
    stored = per_input(change, weight) if weight.ndim > 2 else change
    changed = weight * (1 + per_output(change, weight))
    return Content({"ia3_w": stored, "on_input": torch.tensor(0)}, changed, bias)


def ia3_of_lycoris_on_input(weight: Tensor, bias: Tensor | None) -> Content:
    change = normal(weight.shape[1])
    stored = per_input(change, weight) if weight.ndim > 2 else change
    return Content({"ia3_w": stored, "on_input": torch.tensor(1)}, weight * (1 + per_input(change, weight)), bias)


# Rotations


def cayley(skew: Tensor) -> Tensor:
    identity = torch.eye(skew.shape[-1], dtype=torch.float64)
    return (identity + skew) @ torch.linalg.inv(identity - skew)


def triangles(triangle: Tensor, size: int) -> Tensor:
    """Return skew-symmetric matrices, given the elements above their diagonals."""
    upper = torch.zeros(len(triangle), size, size, dtype=torch.float64)
    rows, columns = torch.triu_indices(size, size, 1)
    upper[:, rows, columns] = triangle
    return upper - upper.mT


def oft_of_peft(shared: bool = False, exact: bool = False, scaled: bool = False, **extra: Tensor) -> Variant:
    """Rotate the inputs, in a convolution those of the whole patch. Without a config, PEFT uses the Neumann series.

    In a 2-d convolution, the rotation has the direction of OneTrainer; PEFT's files have tensors of the opposite sign
    there (`dialects.Dialect.spelled`).
    """

    def make(weight: Tensor, bias: Tensor | None) -> Content | None:
        columns, size = weight[0].numel(), 8
        if columns % size:
            # PEFT has one block size for all layers.
            return None
        number = columns // size
        triangle = normal(1 if shared else number, size * (size - 1) // 2) / 3
        q = triangles(triangle / (2 * (size - 1) ** 0.5 if scaled else 1), size)
        if exact:
            # It rotates in the opposite direction.
            rotation = cayley(-q)
        else:
            rotation = torch.eye(size, dtype=torch.float64) + 2 * q + 2 * q @ q + 2 * q @ q @ q + q @ q @ q @ q
        rotation = torch.block_diag(*rotation.expand(number, size, size))
        config = {"r": 0, "oft_block_size": size, "block_share": shared, "use_cayley_neumann": not exact}
        rotated = (weight.flatten(1) @ (rotation if weight.ndim == 4 else rotation.T)).view_as(weight)
        return Content({"oft_R.weight": triangle, **extra}, rotated, bias, config)

    return make


def oft_of_onetrainer(lengths: bool = False) -> Variant:
    """Make its scaled OFT, which has a tensor as a flag; with `lengths` it is a DoRA of a rotation, as in forks."""
    rotated = oft_of_peft(scaled=True, **{"oft_R.scaled_oft": torch.tensor(True)})

    def make(weight: Tensor, bias: Tensor | None) -> Content | None:
        content = rotated(weight, bias)
        if content is None or not lengths:
            return content
        norm, wanted = normal(len(weight), mean=2.0), normal(len(weight), mean=2.0)
        stored = {"dora_scale": per_output(wanted, weight), "initial_norm": per_output(norm, weight)}
        return Content({**content.tensors, **stored}, content.weight * per_output(wanted / norm, weight), bias)

    return make


def oft_of_lycoris(size: Callable[[int], int], rescaled: bool = False, constraint: float = 0.0) -> Variant:
    def make(weight: Tensor, bias: Tensor | None) -> Content | None:
        out, width = len(weight), size(len(weight))
        if width < 2:
            return None
        blocks = normal(out // width, width, width)
        skew = blocks - blocks.mT
        if constraint:
            # The constraint is on all blocks together, and small enough to have an effect.
            assert skew.norm() > constraint * out
            skew = skew * constraint * out / skew.norm()
        rotated = (torch.block_diag(*cayley(skew)).T @ weight.flatten(1)).view_as(weight)
        return _rescaled({"oft_blocks": blocks, **alpha(constraint)}, rotated, bias, rescaled)

    return make


def oft_of_old_lycoris(weight: Tensor, bias: Tensor | None) -> Content | None:
    size = eight(len(weight))
    if size < 2:
        return None
    skew = normal(len(weight) // size, size, size)
    rotation = cayley(skew - skew.mT)
    rotated = (torch.block_diag(*rotation).T @ weight.flatten(1)).view_as(weight)
    return Content({"oft_diag": rotation}, rotated, bias)


def boft_of_lycoris(size: Callable[[int], int], factors: int, rescaled: bool = False) -> Variant:
    def make(weight: Tensor, bias: Tensor | None) -> Content | None:
        out, width = len(weight), size(len(weight))
        if width < 2 or out % (2 ** (factors - 1) * width):
            return None
        blocks = normal(factors, out // width, width, width)
        rotated = weight.flatten(1)
        for i in range(factors):
            order = torch.arange(out).view(-1, 2, 2**i * width // 2).transpose(1, 2).flatten()
            step = torch.block_diag(*cayley(blocks[i] - blocks[i].mT)) @ rotated[order]
            rotated = torch.empty_like(rotated).index_copy(0, order, step)
        return _rescaled({"oft_blocks": blocks, **alpha(0.0)}, rotated.view_as(weight), bias, rescaled)

    return make


def _rescaled(tensors: dict[str, Tensor], weight: Tensor, bias: Tensor | None, wanted: bool) -> Content:
    """Add LyCORIS' optional factor for every output."""
    if wanted:
        tensors["rescale"] = per_output(normal(len(weight), mean=1.0), weight)
        weight = weight * tensors["rescale"]
    return Content(tensors, weight, bias)


def boft_of_peft(weight: Tensor, bias: Tensor | None) -> Content | None:
    columns, size = weight[0].numel(), 8
    if columns % (2 * size):
        return None
    blocks, factors = normal(2, columns // size, size, size), normal(len(weight), mean=1.0)
    total = torch.eye(columns, dtype=torch.float64)
    for i in range(2):
        order = torch.arange(columns).view(-1, 2, 2**i, size // 2).transpose(1, 2).flatten()
        to_pairs = torch.eye(columns, dtype=torch.float64)[order]
        rotation = cayley((blocks[i].mT - blocks[i]) / 2)
        total = to_pairs.T @ torch.block_diag(*rotation) @ to_pairs @ total
    rotated = per_output(factors, weight) * (weight.flatten(1) @ total.T).view_as(weight)
    config = {"boft_block_size": size, "boft_n_butterfly_factor": 2}
    stored = factors.view(1, -1) if weight.ndim > 2 else factors.view(-1, 1)
    return Content({"boft_R": blocks, "boft_s": stored}, rotated, bias, config)


VARIANTS: dict[str, tuple[str, Variant]] = {
    "lora": ("lora", added(lora_factors, 1.0)),
    "lora-alpha": ("lora", added(lora_factors, 0.25, **alpha(1.0))),
    "lora-bias": ("lora", lora_with_bias),
    "lora-block-diagonal": ("lora", block_diagonal),
    "loha": ("loha", added(loha_factors, 1.0)),
    "loha-alpha": ("loha", added(loha_factors, 0.5, **alpha(2.0))),
    "lokr-whole": ("lokr", added(lokr(""), 1.0, **alpha(float("inf")))),
    "lokr-low-rank": ("lokr", added(lokr("2"), 0.5, **alpha(1.0))),
    "lokr-low-rank-both": ("lokr", added(lokr("12"), 2.0, **alpha(4.0))),
    "full": ("full", full),
    "full-bias-alone": ("full", full_bias_alone),
    "glora": ("glora", glora),
    "dora": ("dora", dora(added(lora_factors, 1.0))),
    "dora-alpha": ("dora", dora(added(lora_factors, 0.25, **alpha(1.0)))),
    "dora-block-diagonal": ("dora", dora(block_diagonal)),
    "dora-peft": ("dora", dora_of_peft(added(lora_factors, 1.0))),
    "dora-loha": ("dora-loha", dora(added(loha_factors, 0.5, **alpha(2.0)))),
    "dora-lokr": ("dora-lokr", dora(added(lokr("2"), 0.5, **alpha(1.0)))),
    "ia3": ("ia3", ia3_of_peft),
    "ia3-input": ("ia3", ia3_of_peft_on_input),
    "ia3-lycoris": ("ia3-lycoris", ia3_of_lycoris),
    "ia3-lycoris-input": ("ia3-lycoris", ia3_of_lycoris_on_input),
    "oft-peft": ("oft", oft_of_peft()),
    # OneTrainer writes an alpha that has no meaning here.
    "oft-peft-shared": ("oft", oft_of_peft(shared=True, **alpha(1.0))),
    "oft-scaled": ("oft", oft_of_onetrainer()),
    "oft-scaled-lengths": ("oft", oft_of_onetrainer(lengths=True)),
    "oft": ("oft", oft_of_lycoris(eight)),
    "oft-rescaled": ("oft", oft_of_lycoris(eight, rescaled=True)),
    "oft-old": ("oft", oft_of_old_lycoris),
    "boft": ("boft", boft_of_lycoris(eight, 1)),
    "boft-rescaled": ("boft", boft_of_lycoris(eight, 1, rescaled=True)),
    "boft-three-factors": ("boft", boft_of_lycoris(eight, 3)),
    "boft-peft": ("boft", boft_of_peft),
}
"""Name -> the library's name of the adapter type, and the formula. All of them are exact on parts of a layer, too."""
