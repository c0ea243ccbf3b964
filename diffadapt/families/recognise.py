"""Recognise the family of a file by its keys and shapes, before anything else is known about it.

Keys are searched without their numbers, so that blocks with the same layers count once: the 3156 keys of an SDXL file
are reduced to 84, and every expression runs over those only. `~` in an expression matches a dot or an underscore, since
paths in files are dotted or flattened. Families with the same names are told apart by sizes, if at all.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

Shape: TypeAlias = tuple[int, ...]

_DIGITS = str.maketrans("", "", "0123456789")
_BLOCK = re.compile(r"[._](\d+)[._]")
_TENSOR = re.compile(r"\.(?=lora|hada|lokr|oft|diff|dora|alpha|[ab][12]\.weight)|_(?=lora\d?\.(?:down|up)\.)")
_MOST_LAYERS = 8
"""How many layers with matching keys are inspected before their size counts as unknown."""


@dataclass
class Layer:
    """The tensors of a file for one layer.

    Attributes:
        name: the layer's path.
        tensors: name of a tensor -> shape.
    """

    name: str
    tensors: dict[str, Shape] = field(default_factory=dict[str, Shape])

    @property
    def sizes(self) -> tuple[int | None, int | None]:
        """Numbers of outputs and of inputs; `None` for what the tensors do not determine."""
        outputs: int | None = None
        inputs: int | None = None
        for tensor, shape in self.tensors.items():
            if len(shape) < 2:
                continue
            if tensor == "diff":
                outputs, inputs = shape[:2]
            elif tensor == "a1.weight":
                # Of GLoRA, in either orientation.
                inputs = max(shape[:2])
            elif tensor.startswith(_DOWN):
                inputs = shape[1]
            elif tensor.startswith(_UP):
                outputs = shape[0]
            elif tensor.startswith("oft_R"):
                inputs = shape[0] * _rotation(shape[1]) or None
            elif tensor.startswith("oft_blocks") and len(shape) in (3, 4):
                outputs = shape[-3] * shape[-2]
        if any(tensor.startswith("lokr_w") for tensor in self.tensors):
            outputs, inputs = self._kronecker("a", 0), self._kronecker("b", 1)
        return outputs, inputs

    def _kronecker(self, factor: str, side: int) -> int | None:
        """Return a side of LoKr's Kronecker product; `factor` is "a" or "b", the low-rank factor with that side."""
        product = 1
        for whole in ("lokr_w1", "lokr_w2"):
            shape = self.tensors.get(whole) or self.tensors.get(f"{whole}_{factor}")
            if shape is None or len(shape) < 2:
                return None
            product *= shape[side]
        return product

    @property
    def inputs(self) -> int | None:
        """Number of inputs, `None` if the tensors do not determine it."""
        return self.sizes[1]

    @property
    def ratio(self) -> float | None:
        """Number of outputs divided by the number of inputs, `None` if the tensors do not determine it."""
        outputs, inputs = self.sizes
        return outputs / inputs if outputs and inputs else None


_LORA = ("lora", "lora1", "lora2", "lora_linear_layer")
_DOWN = ("lora_A", "lora_down", "hada_w1_b", "hada_w2_b", *(f"{lora}.down" for lora in _LORA))
_UP = ("lora_B", "lora_up", "hada_w1_a", "hada_w2_a", *(f"{lora}.up" for lora in _LORA))


def _rotation(elements: int) -> int:
    """Return the number of rows of a skew-symmetric matrix with this many free elements."""
    return round((1 + (1 + 8 * elements) ** 0.5) / 2)


class Keys:
    """The keys and shapes of a file, grouped by the keys without their digits."""

    def __init__(self, shapes: Iterable[tuple[str, Shape]]) -> None:
        pairs = list(shapes)
        bare = "\n".join(key for key, _ in pairs).translate(_DIGITS).split("\n")
        if len(bare) != len(pairs):
            # Some key contains a line break.
            bare = [key.translate(_DIGITS).replace("\n", " ") for key, _ in pairs]
        self._groups: dict[str, list[tuple[str, Shape]]] = {}
        for name, pair in zip(bare, pairs, strict=True):
            self._groups.setdefault(name, []).append(pair)
        self._text = "\n".join(self._groups)

    def has(self, expression: re.Pattern[str]) -> bool:
        """Return whether any key matches."""
        return expression.search(self._text) is not None

    def like(self, expression: re.Pattern[str]) -> Iterator[tuple[str, Shape]]:
        """Yield every key that matches, with its shape."""
        if self.has(expression):
            for name, pairs in self._groups.items():
                if expression.search(name):
                    yield from pairs

    def layers(self, expression: re.Pattern[str], accepts: Callable[[str], bool] = lambda key: True) -> list[Layer]:
        """Return the first layers with keys that match and that `accepts` accepts."""
        found: dict[str, Layer] = {}
        for key, shape in self.like(expression):
            if accepts(key):
                path, tensor = _split(key)
                if path in found or len(found) < _MOST_LAYERS:
                    found.setdefault(path, Layer(path)).tensors[tensor] = shape
        return list(found.values())

    def blocks(self, expression: re.Pattern[str]) -> int:
        """Return the highest number of a block with keys that match, or -1."""
        numbers = (_BLOCK.search(key) for key, _ in self.like(expression))
        return max((int(number[1][:6]) for number in numbers if number), default=-1)


def pattern(text: str) -> re.Pattern[str]:
    """Return the regular expression for `text`, in which `~` stands for a dot or an underscore."""
    return re.compile(text.replace("~", "[._]"), re.MULTILINE)


def recognise(shapes: Iterable[tuple[str, Shape]], signs: Sequence[tuple[str, re.Pattern[str]]]) -> str | None:
    """Return the family of a file, or `None` if its keys and shapes do not identify one.

    Args:
        shapes: the `(key, shape)` pairs of the file.
        signs: pairs of a family's name and an expression that matches only keys which no later family has.
    """
    keys = Keys(shapes)
    if keys.has(_UNET):
        return _unet(keys)
    for name, expression in signs:
        if keys.has(expression):
            return name
    return next((decide(keys) for expression, decide in _SHARED if keys.has(expression)), None)


def _split(key: str) -> tuple[str, str]:
    """Return the layer and the tensor that a key names, precisely enough to determine sizes."""
    match = _TENSOR.search(key)
    return (key[: match.start()], key[match.end() :]) if match else (key, "")


def _by_inputs(layers: Iterable[Layer], families: Mapping[int, str]) -> str | None:
    """Return the family of the first layer with a number of inputs in `families`, or `None`."""
    return next((families[size] for layer in layers if (size := layer.inputs or 0) in families), None)


def _by_ratio(layers: Iterable[Layer], families: Mapping[float, str]) -> str | None:
    """Return the family of the first layer with a ratio of outputs to inputs in `families`, or `None`."""
    for layer in layers:
        ratio = layer.ratio
        for known, family in families.items():
            if ratio is not None and abs(ratio - known) < 1e-6:
                return family
    return None


# UNets

_UNET = pattern(
    "attentions~~transformer_blocks|put_blocks~~~transformer_blocks|middle_block~~transformer_blocks"
    "|resnets~~(?:conv|time_emb_proj)|put_blocks~~~(?:in|out|emb)_layers|^unet::"
)
_READING = pattern("transformer_blocks~~attn~(?:processor~)?to_[kv]")
_NUMBERED = pattern("^unet::")
_DEEP = re.compile(r"transformer_blocks[._][1-9]")
_TEXT = pattern("^(?:lora_te_|text_encoder.)")
_TEXT_SIZES = {768: "sd", 1024: "sd2", 2048: "sdxl"}


def _unet(keys: Keys) -> str | None:
    """Return which Stable Diffusion it is, by the size of the text embeddings that its cross-attention reads."""
    read = keys.layers(_READING, lambda key: "attn2" in key)
    found = _by_inputs(read, _TEXT_SIZES)
    if found is None:
        # In files with numbers instead of names all layers are inspected: no other layer has an input of these sizes.
        numbered = (shape for key, shape in keys.like(_NUMBERED) if key.endswith("down") and len(shape) > 1)
        found = next((_TEXT_SIZES[shape[1]] for shape in numbered if shape[1] in _TEXT_SIZES), None)
    if found is None and any(_DEEP.search(key) for key, _ in keys.like(_UNET)):
        found = "sdxl"
    if found is None:
        text = list(keys.like(_TEXT))
        if any(key.startswith(("lora_te1_", "lora_te2_", "text_encoder_2")) for key, _ in text):
            found = "sdxl"
        else:
            layers = keys.layers(_TEXT, lambda key: "self_attn" in key)
            sizes = (size for layer in layers for size in layer.sizes if size in (768, 1024))
            found = next((_TEXT_SIZES[size] for size in sizes), None)
    return found


# Names that several families have

_DOUBLE = pattern("double_blocks~~|(?<!single_)(?<!joint_)transformer_blocks~~")
_SINGLE = pattern("single_(?:transformer_)?blocks~~")

_HUNYUAN = pattern(
    r"individual_token_refiner|token_refiner~refiner_blocks|single_blocks~~modulation~linear|byt_in~"
    r"|double_blocks~~(?:img|txt)_(?:mlp~fc|mod~linear|attn_[qkv]\.)|blocks\.\.(?:img|txt)_attn_(?:qkv|proj)"
)
_HUNYUAN_LAYERS = pattern(
    "(?:double|single|transformer|refiner)_blocks~~(?:(?:img|txt)_(?:attn|mod|mlp)|attn|norm|ff|modulation|linear)"
    "|token_refiner~blocks~~"
)
_HUNYUAN_SIZES = {
    size * factor: family
    for size, family in {3072: "hunyuan-video", 3584: "hunyuan-image", 2048: "hunyuan-video15"}.items()
    for factor in (1, 4)
}


def _of_hunyuan(keys: Keys) -> str | None:
    return _by_inputs(keys.layers(_HUNYUAN_LAYERS), _HUNYUAN_SIZES)


_NATIVE = pattern("double_blocks~~|single_blocks~~linear")
_NATIVE_ATTENTION = pattern("double_blocks~~(?:img|txt)_attn")
_NATIVE_MLP = pattern("double_blocks~~(?:img|txt)_mlp")
_NATIVE_LINEAR = pattern("single_blocks~~linear")


def _of_flux(keys: Keys) -> str | None:
    """Return the family of a file with names of Flux's original layout.

    Chroma counts as Flux.1, since it differs in layers that files seldom have.
    """
    attention, mlp, linear = (keys.layers(kind) for kind in (_NATIVE_ATTENTION, _NATIVE_MLP, _NATIVE_LINEAR))
    double, single = keys.blocks(_DOUBLE), keys.blocks(_SINGLE)
    found = _by_ratio(linear, {9: "flux2", 1 / 4: "flux2"}) or _by_ratio(mlp, {6: "flux2", 1 / 3: "flux2"})
    found = found or _by_inputs(attention, {6144: "flux2", 4096: "flux2"})
    found = found or _by_inputs([*attention, *linear], {3584: "hunyuan-image"})
    if found is None and (double >= 19 or single >= 38):
        found = "hunyuan-video"
    found = found or _by_ratio(linear, {7: "flux", 1 / 5: "flux"}) or _by_ratio(mlp, {4: "flux", 1 / 4: "flux"})
    # The smallest Flux.2 has as many inputs as Flux.1 but fewer blocks.
    return "flux" if found is None and (double >= 8 or single >= 24) else found


_SINGLE_DIFFUSERS = pattern("single_transformer_blocks~~")
_SINGLE_LAYERS = pattern("single_transformer_blocks~~(?:attn~to_|proj_mlp|norm~linear)")


def _of_flux_in_diffusers(keys: Keys) -> str | None:
    found = _by_inputs(keys.layers(_SINGLE_LAYERS), {3584: "hunyuan-image"})
    if found is None and (keys.blocks(_DOUBLE) >= 19 or keys.blocks(_SINGLE) >= 38):
        found = "hunyuan-video"
    return found or "flux"


_TRANSFORMER = "(?<!single_)(?<!joint_)transformer_blocks~~"
_ATTENTION = pattern(f"{_TRANSFORMER}attn~")
_KEY = pattern(f"{_TRANSFORMER}attn~to_[kv]")
_ADDED = pattern(f"{_TRANSFORMER}attn~add_")
_FEED_FORWARD = pattern(f"{_TRANSFORMER}(?:ff|norm)")


def _of_attention(keys: Keys) -> str | None:
    """Return the family of a file with the names of diffusers' attention.

    `attn1` is self-attention of the image, `attn2` its cross-attention to the text, and `attn` joint attention of both.
    """
    own = _inputs(keys.layers(_ATTENTION, lambda key: "attn1" in key))
    if own is not None:
        return _of_cross_attention(keys, own)
    joint = _inputs(keys.layers(_ATTENTION, lambda key: re.search("attn[12]", key) is None))
    return None if joint is None else _of_joint_attention(keys, joint)


def _of_cross_attention(keys: Keys, size: int) -> str | None:
    read = _inputs(keys.layers(_KEY, lambda key: "attn2" in key))
    if size == 1152:
        # The smallest Sana has this size, too.
        return "pixart" if keys.has(_FEED_FORWARD) else None
    if size == 2048:
        return {1024: "anima", 2048: "ltx"}.get(read or 0)
    if size == 4096:
        return "ltx2" if read is not None or keys.blocks(_ATTENTION) >= 28 else "cogview4"
    return "sana" if size == 2240 else None


def _of_joint_attention(keys: Keys, size: int) -> str | None:
    if size == 3072:
        return "flux" if keys.has(_FEED_FORWARD) else "qwen"
    if size == 6144:
        outputs = {layer.sizes[0] for layer in keys.layers(_KEY)}
        return "krea2" if 1536 in outputs else "flux2" if 6144 in outputs or keys.has(_ADDED) else None
    if size == 4096:
        return "flux2" if keys.has(_ADDED) else "qwen21" if keys.blocks(_ATTENTION) >= 8 else None
    sizes = {1536: "sd3", 2432: "sd3", 2048: "hunyuan-video15", 3584: "hunyuan-image", 5376: "minimax-h3"}
    return sizes.get(size)


def _inputs(layers: Iterable[Layer]) -> int | None:
    return next((size for layer in layers if (size := layer.inputs)), None)


_LAYERS = pattern("(?:layers|_refiner)~~(?:attention|feed_forward|adaLN_modulation)~")
_LAYER_SIZES = {
    3840: "zimage",
    10240: "zimage",
    256: "zimage",
    4608: "ideogram4",
    12288: "ideogram4",
    2304: "lumina2",
    9216: "lumina2",
    1024: "lumina2",
}


def _of_layers(keys: Keys) -> str | None:
    return _by_inputs(keys.layers(_LAYERS), _LAYER_SIZES)


_PIXART = pattern("(?<!refiner[._])blocks~~(?:attn~(?:qkv|proj)|cross_attn~(?:q_linear|kv_linear|proj)|mlp~fc)")
_PIXART_SIZES = {1152: "pixart", 4608: "pixart", 2240: "sana", 5376: "minimax-h3", 14336: "minimax-h3"}


def _of_pixart(keys: Keys) -> str | None:
    return _by_inputs(keys.layers(_PIXART), _PIXART_SIZES)


_SHARED: tuple[tuple[re.Pattern[str], Callable[[Keys], str | None]], ...] = (
    (_HUNYUAN, _of_hunyuan),
    (_NATIVE, _of_flux),
    (_SINGLE_DIFFUSERS, _of_flux_in_diffusers),
    (_ATTENTION, _of_attention),
    (_LAYERS, _of_layers),
    (_PIXART, _of_pixart),
)
"""Names that several families have, and the functions that tell those apart, in the order they are tried."""
