"""The adapter types that PEFT alone trains, as plain formulas in float64, like those of `formulas`.

Tensors have the names of PEFT's folders. Formulas, names and options: PEFT 0.21.2 `tuners/*/layer.py` and `config.py`.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support.formulas import Content, Method, Variant, cayley, normal, triangles


def _content(
    weight: Tensor,
    bias: Tensor | None,
    tensors: dict[str, Tensor],
    peft_type: str,
    config: Mapping[str, Any],
    *,
    name: str | None = None,
    **method: Any,
) -> Content:
    """Return the content of one layer; `name` is the library's name of the type, and `method` as in `Method`."""
    return Content(tensors, weight, bias, config, Method(peft_type, name or peft_type.lower(), **method))


def common(name: str, *shape: int) -> Tensor:
    """Return a tensor that all layers share. One of another shape has the same values where both have elements."""
    place = torch.tensor(float(sum(map(ord, name))), dtype=torch.float64)
    for axis, size in enumerate(shape):
        steps = torch.arange(size, dtype=torch.float64) * (12.9898, 78.233, 37.719)[axis]
        place = place + steps.view(-1, *(1 for _ in shape[axis + 1 :]))
    return ((place.sin() * 43758.5453) % 1 - 0.5).float().double()


def places(weight: Tensor, count: int, seed: int) -> Tensor:
    """Return the places that PEFT draws from a seed: rows and columns of the flattened weight."""
    drawn = torch.randperm(weight.numel(), generator=torch.Generator().manual_seed(seed))[:count]
    columns = weight[0].numel()
    return torch.stack([drawn // columns, drawn % columns])


def at_places(weight: Tensor, where: Tensor, values: Tensor) -> Tensor:
    return torch.zeros_like(weight.flatten(1)).index_put((where[0].long(), where[1].long()), values)


# One matrix or two factors


def miss(weight: Tensor, bias: Tensor | None) -> Content:
    rank = min(4, weight.shape[1])
    block = normal(rank, len(weight))
    change = torch.stack([block[column % rank] for column in range(weight.shape[1])], dim=1)
    return _content(weight + change, bias, {"miss_block": block}, "MISS", {"r": rank, "init_weights": True})


def miss_bat(weight: Tensor, bias: Tensor | None) -> Content | None:
    out, columns = weight.shape
    if out % 4 or columns % 4:
        return None
    block, changed = normal(out // 4, 4, 4), weight.clone()
    for row in range(out // 4):
        for column in range(columns // 4):
            at = slice(4 * row, 4 * row + 4), slice(4 * column, 4 * column + 4)
            changed[at] += weight[at] @ block[row] + block[row]
    return _content(changed, bias, {"miss_block": block}, "MISS", {"r": 4, "init_weights": "bat"})


def gralora(weight: Tensor, bias: Tensor | None) -> Content | None:
    out, columns = weight.shape
    k, rank, hybrid = 2, 4, 2
    if out % k or columns % k:
        return None
    a, b, share = normal(k, columns // k, rank), normal(k, rank, out // k), rank // k
    general_a, general_b = normal(hybrid, columns), normal(out, hybrid)
    change = general_b @ general_a
    for row in range(k):
        for column in range(k):
            up = b[row, column * share : (column + 1) * share].T
            down = a[column, :, row * share : (row + 1) * share].T
            rows, cells = slice(row * out // k, (row + 1) * out // k), columns // k
            change[rows, column * cells : (column + 1) * cells] += up @ down
    tensors = {
        "gralora_A": a,
        "gralora_B": b,
        "gralora_A_general.weight": general_a,
        "gralora_B_general.weight": general_b,
        "alpha": torch.tensor(3.0),
    }
    config = {"r": rank, "gralora_k": k, "hybrid_r": hybrid, "alpha": 3}
    return _content(weight + 3 / (rank + hybrid) * change, bias, tensors, "GRALORA", config)


def delora(weight: Tensor, bias: Tensor | None) -> Content:
    a, b, strength = normal(3, weight.shape[1]), normal(len(weight), 3), torch.tensor([9.0]).double()
    norm = weight.norm(dim=0).float().double()
    change = sum(torch.outer(b[:, i], a[i]) / (a[i].norm() * b[:, i].norm()) for i in range(3))
    tensors = {"delora_A": a, "delora_B": b, "delora_lambda": strength, "delora_w_norm": norm}
    return _content(weight + strength / 3 * change * norm, bias, tensors, "DELORA", {"r": 3})


def hira(weight: Tensor, bias: Tensor | None) -> Content:
    a, b = normal(3, *weight.shape[1:]), normal(len(weight), 3)
    changed = weight * (1 + (b @ a.flatten(1)).view_as(weight))
    stored = b.view(*b.shape, *(1 for _ in weight.shape[2:]))
    return _content(changed, bias, {"hira_A": a, "hira_B": stored}, "HIRA", {"r": 3})


def deft(weight: Tensor, bias: Tensor | None) -> Content:
    p, r = normal(len(weight), 3), normal(3, weight.shape[1])
    changed = weight - p @ p.clamp_min(0).T @ weight + 2 / 3 * p @ r
    config = {"r": 3, "alpha": 2, "decomposition_method": "relu", "para": False}
    return _content(changed, bias, {"deft_P": p, "deft_R": r, "alpha": torch.tensor(2.0)}, "DEFT", config)


def c3a(weight: Tensor, bias: Tensor | None) -> Content | None:
    (out, columns), size = weight.shape, 4
    if out % size or columns % size:
        return None
    kernel = normal(out // size, columns // size, size)
    t, s = torch.meshgrid(torch.arange(out), torch.arange(columns), indexing="ij")
    change = kernel[t // size, s // size, (s - t) % size] / columns
    return _content(weight + change, bias, {"c3a_kernel": kernel}, "C3A", {"block_size": size})


def fourierft(weight: Tensor, bias: Tensor | None) -> Content | None:
    if weight.numel() < 20:
        return None
    # The inverse transform divides by the number of elements, and the change of a large weight would drown in rounding.
    where, spectrum = places(weight, 20, 5), normal(20) * max(1.0, weight.numel() / 2**14)
    change = 90.0 * torch.fft.ifft2(at_places(weight, where, spectrum)).real
    config = {"n_frequency": 20, "scaling": 90.0, "random_loc_seed": 5}
    return _content(
        weight + change,
        bias,
        {"fourierft_spectrum": spectrum},
        "FOURIERFT",
        config,
        settings={"scaling": 90.0, "seed": 5.0},
        derived={"fourierft_indices": where},
    )


def waveft(weight: Tensor, bias: Tensor | None) -> Content | None:
    """Use Haar's wavelet, whose functions are two elements wide."""
    out, columns = weight.shape
    if out % 2 or columns % 2 or weight.numel() < 24:
        return None
    where, spectrum, change = places(weight, 24, 777), normal(24), torch.zeros_like(weight)
    for (row, column), value in zip(where.T.tolist(), spectrum, strict=True):
        along_outputs = torch.tensor([1.0, -1.0 if column >= columns // 2 else 1.0]).double() / 2**0.5
        along_inputs = torch.tensor([1.0, -1.0 if row >= out // 2 else 1.0]).double() / 2**0.5
        top, left = 2 * (row % (out // 2)), 2 * (column % (columns // 2))
        change[top : top + 2, left : left + 2] += value * torch.outer(along_outputs, along_inputs)
    config = {"n_frequency": 24, "scaling": 25.0, "wavelet_family": "db1", "use_idwt": True}
    return _content(
        weight + 25 * change,
        bias,
        {"waveft_spectrum": spectrum},
        "WAVEFT",
        config,
        derived={"waveft_indices": where},
    )


def shira(weight: Tensor, bias: Tensor | None) -> Content | None:
    count = sum(weight.shape)
    if count > weight.numel():
        return None
    where, values = torch.randperm(weight.numel())[:count].sort().values, normal(count)
    where = torch.stack([where // weight.shape[1], where % weight.shape[1]]).int()
    tensors = {"shira_weight": values, "shira_indices": where}
    return _content(weight + at_places(weight, where, values), bias, tensors, "SHIRA", {"r": 1, "mask_type": "random"})


def supertuning(weight: Tensor, bias: Tensor | None) -> Content | None:
    count = int(weight.numel() * (1 - 0.9))
    if count == 0:
        return None
    where, values = torch.randperm(weight.numel())[:count], normal(count)
    a, b = normal(2, weight.shape[1]), normal(len(weight), 2)
    change = torch.zeros(weight.numel(), dtype=torch.float64).index_put((where,), values).view_as(weight)
    tensors = {
        "supertuning_values": values,
        "supertuning_indices": where.int(),
        "supertuning_lora_A.weight": a,
        "supertuning_lora_B.weight": b,
    }
    config = {"sparsity": 0.9, "select_top": True, "r": 2, "lora_alpha": 3}
    changed = weight + change + 1.5 * b @ a
    return _content(changed, bias, tensors, "SUPERTUNING", config, settings={"lora_scale": 1.5})


def peanut(weight: Tensor, bias: Tensor | None) -> Content:
    a, b, encoder, decoder = normal(3, len(weight)), normal(len(weight), 3), normal(3, 3), normal(3, 3)
    hidden = F.silu(weight.T @ a.T)
    hidden = F.silu(F.silu(hidden @ encoder.T) @ decoder.T) + hidden
    tensors = {
        "peanut_A.weight": a,
        "peanut_B.weight": b,
        "peanut_encoders.0.weight": encoder,
        "peanut_decoders.0.weight": decoder,
    }
    config = {"r": 3, "depth": 1, "act_fn": "silu", "scaling": 0.5}
    settings = {"scaling": 0.5, "activation": 2.0}
    return _content(weight + 0.5 * b @ hidden.T, bias, tensors, "PEANUT", config, settings=settings)


def adalora(weight: Tensor, bias: Tensor | None) -> Content:
    a, b, e = normal(4, weight[0].numel()), normal(len(weight), 4), normal(4, 1)
    change = (b @ (e * a)).view_as(weight)
    tensors = {"lora_A": a, "lora_B": b, "lora_E": e, "alpha": torch.tensor(6.0)}
    config = {"init_r": 4, "target_r": 4, "total_step": 1, "lora_alpha": 6}
    settings = {"rank": 4 + 1e-5}
    return _content(weight + 6 / (4 + 1e-5) * change, bias, tensors, "ADALORA", config, settings=settings)


def glora(weight: Tensor, bias: Tensor | None) -> Content | None:
    if bias is None:
        return None
    out, columns = weight.shape
    tensors = {
        **{f"glora_{path}.Xd": normal(columns if path == "C" else out, 3) for path in "ABC"},
        **{f"glora_{path}.Xu": normal(3, 1 if path == "C" else columns) for path in "ABC"},
        **{f"glora_{path}.X": normal(out) for path in "DE"},
    }
    a, b, c = (tensors[f"glora_{path}.Xd"] @ tensors[f"glora_{path}.Xu"] for path in "ABC")
    config = {"r": 3, "config_A_B": "lora", "config_C": "lora", "config_D_E": "vector"}
    shift = bias + bias * tensors["glora_D.X"] + tensors["glora_E.X"] + (weight @ c).flatten()
    return _content(weight + weight * a + b, shift, tensors, "GLORA", config, name="glora-peft")


# Maps of inputs or outputs


def road(weight: Tensor, bias: Tensor | None) -> Content | None:
    out, size = len(weight), 4
    if out % size:
        return None
    theta, scale = normal(out // 2), normal(out // 2, mean=1.0)
    turn = torch.zeros(out, out, dtype=torch.float64)
    for pair in range(out // 2):
        first = pair // (size // 2) * size + pair % (size // 2)
        second = first + size // 2
        cosine, sine = scale[pair] * theta[pair].cos(), scale[pair] * theta[pair].sin()
        turn[first, first], turn[first, second], turn[second, second], turn[second, first] = cosine, -sine, cosine, sine
    config = {"variant": "road_1", "group_size": size}
    shift = None if bias is None else turn @ bias
    tensors = {"road_theta": theta, "road_alpha": scale}
    return _content(turn @ weight, shift, tensors, "ROAD", config, settings={"group_size": float(size)})


def hra(weight: Tensor, bias: Tensor | None) -> Content:
    vectors, rotated = normal(weight[0].numel(), 3), weight.flatten(1)
    for vector in vectors.T:
        unit = vector / vector.norm()
        rotated = rotated - 2 * torch.outer(rotated @ unit, unit)
    return _content(rotated.view_as(weight), bias, {"hra_u": vectors}, "HRA", {"r": 3, "apply_GS": False})


def psoft(weight: Tensor, bias: Tensor | None) -> Content | None:
    rank = 4
    if min(weight.shape) < rank:
        return None
    # PEFT decomposes in float32, and the signs of the vectors matter.
    u, s, vh = (t.double() for t in torch.linalg.svd(weight.float(), full_matrices=False))
    down, up = vh[:rank], (u[:, :rank].float() * s[:rank].float()).double()
    triangle, left, right = normal(rank * (rank - 1) // 2), normal(rank, mean=1.0), normal(rank, mean=1.0)
    rotation = torch.diag(right) @ cayley(triangles(triangle.unsqueeze(0), rank)[0]) @ torch.diag(left)
    tensors = {"psoft_R.weight": triangle, "psoft_R.vector_a": left, "psoft_R.vector_b": right}
    config = {"r": rank, "psoft_alpha": rank, "psoft_orth": True, "psoft_mag_a": True, "psoft_mag_b": True}
    changed = weight + up @ (rotation - torch.eye(rank, dtype=torch.float64)) @ down
    return _content(changed, bias, tensors, "PSOFT", config, derived={"psoft_A": down, "psoft_B": up})


def osf(weight: Tensor, bias: Tensor | None) -> Content | None:
    kept = min(weight.shape) // 2
    if not kept:
        return None
    u, s, vh = (t.double() for t in torch.linalg.svd(weight.float(), full_matrices=False))
    rank = len(s) - kept
    own_u, own_s, own_v = normal(len(weight), rank), normal(rank), normal(rank, weight.shape[1])
    tensors = {f"osf_svd_params.{name}_low": tensor for name, tensor in zip("USV", (own_u, own_s, own_v), strict=True)}
    start = {"osf_U_start": u[:, kept:], "osf_S_start": s[kept:], "osf_V_start": vh[kept:]}
    further = {"osf_U_kept": u[:, :kept]} if len(u) > len(s) else {"osf_V_kept": vh[:kept]}
    change = own_u * own_s @ own_v - u[:, kept:] * s[kept:] @ vh[kept:]
    derived = {**start, **(further if weight.shape[0] != weight.shape[1] else {})}
    return _content(weight + change, bias, tensors, "OSF", {"effective_rank": 0.5}, derived=derived)


def adamss(weight: Tensor, bias: Tensor | None) -> Content | None:
    """Use one cluster, which has all outputs in their order."""
    out, rank = len(weight), 3
    if min(weight.shape) <= rank:
        return None
    matrix = weight.float() if bias is None else torch.cat([weight, bias.unsqueeze(1)], 1).float()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vectors = torch.svd_lowrank(matrix, q=rank, niter=2)[2].T.double()
    a, b = normal(2, rank), normal(out, 2)
    change = b @ a @ vectors
    shift = None if bias is None else bias + change[:, -1]
    tensors = {"adamss_A.0": a, "adamss_B.0": b, "adamss_newB": vectors}
    config = {"r": rank, "num_subspaces": 1, "subspace_rank": 2, "random_seed": 0}
    derived = {"adamss_places": torch.arange(out)}
    return _content(weight + change[:, : weight.shape[1]], shift, tensors, "ADAMSS", config, derived=derived)


# Tensors that all layers share


def tinylora(weight: Tensor, bias: Tensor | None) -> Content:
    """Use one group of layers."""
    rank, length = 2, 5
    a, b, p = normal(rank, weight.shape[1]), normal(len(weight), rank), normal(length, rank, rank)
    numbers = common("tinylora_v", length)
    change = b @ torch.einsum("i, ijk -> jk", numbers, p) @ a
    return _content(
        weight + change,
        bias,
        {"tinylora_A": a, "tinylora_B": b, "tinylora_P": p},
        "TINYLORA",
        {"r": rank, "u": length, "weight_tying": 1.0, "projection_seed": 42, "save_projection": True},
        settings={"tying": 1.0},
        shared=lambda rows, columns: {"tinylora_v.0": numbers},
    )


def vera(weight: Tensor, bias: Tensor | None) -> Content:
    (out, columns), rank = weight.shape, 6
    b, d = normal(out, mean=1.0), normal(rank)
    change = torch.diag(b) @ common("vera_B", out, rank) @ torch.diag(d) @ common("vera_A", rank, columns)
    return _content(
        weight + change,
        bias,
        {"vera_lambda_b": b, "vera_lambda_d": d},
        "VERA",
        {"r": rank, "projection_prng_key": 0, "save_projection": True},
        shared=lambda rows, columns: {
            "vera_A": common("vera_A", rank, columns),
            "vera_B": common("vera_B", rows, rank),
        },
    )


def pvera(weight: Tensor, bias: Tensor | None) -> Content:
    """Outside training, the first half of the rows of A counts."""
    (out, columns), rank = weight.shape, 3
    b, d = normal(out, mean=1.0), normal(2 * rank)
    down = torch.diag(d[:rank]) @ common("pvera_A", 2 * rank, columns)[:rank]
    return _content(
        weight + torch.diag(b) @ common("pvera_B", out, rank) @ down,
        bias,
        {"pvera_lambda_b": b, "pvera_lambda_d": d},
        "PVERA",
        {"r": rank, "projection_prng_key": 0, "save_projection": True},
        shared=lambda rows, columns: {
            "pvera_A": common("pvera_A", 2 * rank, columns),
            "pvera_B": common("pvera_B", rows, rank),
        },
    )


def randlora(weight: Tensor, bias: Tensor | None) -> Content:
    (out, columns), rank = weight.shape, 4
    least, most = sorted((out, columns))
    count = math.ceil(least / rank)
    factor, gamma = normal(rank, count), normal(count, least)
    a, b = common("randlora_A", rank, 1, least), common("randlora_B", most, count, rank)
    change = torch.zeros(most, least, dtype=torch.float64)
    # As in PEFT, the rows of one side are in the order of the bases, the columns of the other in that of their ranks.
    rows = [factor[i, j] * gamma[j] * a[i, 0] for i in range(rank) for j in range(count)]
    sides = [b[:, j, i] for j in range(count) for i in range(rank)]
    for row, side in zip(rows, sides, strict=True):
        change += torch.outer(side, row)
    change = 8 / rank * (change if least == columns else change.T)
    tensors = {"randlora_lambda": factor, "randlora_gamma": gamma, "alpha": torch.tensor(8.0)}

    def shared(rows: int, columns: int) -> dict[str, Tensor]:
        low, high = sorted((rows, columns))
        bases = common("randlora_B", high, math.ceil(low / rank), rank)
        return {"randlora_A": common("randlora_A", rank, 1, low), "randlora_B": bases}

    config = {"r": rank, "randlora_alpha": 8, "projection_prng_key": 0, "save_projection": True}
    return _content(weight + change, bias, tensors, "RANDLORA", config, shared=shared, repeats=True)


def vblora(weight: Tensor, bias: Tensor | None) -> Content | None:
    (out, columns), rank, vectors, length = weight.shape, 3, 12, 4
    if out % length or columns % length:
        return None
    bank = common("vblora_vector_bank", vectors, length)
    logits = {
        "vblora_logits_A": normal(rank, columns // length, vectors),
        "vblora_logits_B": normal(out // length, rank, vectors),
    }

    def composed(values: Tensor) -> Tensor:
        largest, chosen = values.topk(2)
        return torch.einsum("...k, ...kl -> ...l", largest.softmax(-1), bank[chosen])

    down = composed(logits["vblora_logits_A"]).flatten(1)
    up = composed(logits["vblora_logits_B"]).transpose(1, 2).reshape(out, rank)
    config = {"r": rank, "num_vectors": vectors, "vector_length": length, "topk": 2, "save_only_topk_weights": False}
    shared = lambda rows, columns: {"vblora_vector_bank": bank}  # noqa: E731
    return _content(weight + up @ down, bias, logits, "VBLORA", config, shared=shared)


def unilora(weight: Tensor, bias: Tensor | None) -> Content:
    (out, columns), rank, length = weight.shape, 3, 50
    theta = common("unilora_theta_d", length)
    tensors: dict[str, Tensor] = {}
    factors: list[Tensor] = []
    for side, shape in (("A", (rank, columns)), ("B", (out, rank))):
        chosen, scales = torch.randint(length, shape), normal(*shape)
        tensors |= {f"unilora_indices_{side}": chosen, f"unilora_scales_{side}": scales}
        factors.append(theta[chosen] * scales)
    config = {"r": rank, "theta_d_length": length, "proj_seed": 42, "save_indices": True}
    shared = lambda rows, columns: {"unilora_theta_d": theta}  # noqa: E731
    changed = weight + factors[1] @ factors[0]
    return _content(changed, bias, tensors, "UNILORA", config, settings={"rank": 3.0}, shared=shared)


METHODS: dict[str, Variant] = {
    "MiSS": miss,
    "MiSS, bat": miss_bat,
    "GraLoRA": gralora,
    "DeLoRA": delora,
    "HiRA": hira,
    "DEFT": deft,
    "C3A": c3a,
    "FourierFT": fourierft,
    "WaveFT": waveft,
    "SHiRA": shira,
    "SuperTuning": supertuning,
    "PEANuT": peanut,
    "AdaLoRA": adalora,
    "GLoRA of PEFT": glora,
    "RoAd": road,
    "HRA": hra,
    "PSOFT": psoft,
    "OSF": osf,
    "AdaMSS": adamss,
    "TinyLoRA": tinylora,
    "VeRA": vera,
    "PVeRA": pvera,
    "RandLora": randlora,
    "VB-LoRA": vblora,
    "UniLora": unilora,
}
"""Name -> the formula."""

ON_CONVOLUTIONS = frozenset({"HiRA", "HRA", "AdaLoRA"})
"""Methods that PEFT has for convolutions, too."""
