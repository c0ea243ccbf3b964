"""Malicious files: each is refused with the reason, quickly, in little memory, and nothing is changed."""

import io
import json
import math
import pickle
import re
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor, nn

import diffadapt
from diffadapt import AdapterError
from tests.support import files, loras, models, spellings
from tests.support.cases import for_each
from tests.support.compare import assert_unchanged, snapshot
from tests.support.versions import needs

DOWN, UP = "block.linear.lora_A.weight", "block.linear.lora_B.weight"
FITTING = {DOWN: torch.ones(2, 12), UP: torch.ones(8, 2)}
MILLION = 1_000_000


def net() -> nn.Module:
    torch.manual_seed(0)
    layers = {"linear": nn.Linear(12, 8), "conv": nn.Conv2d(4, 8, 3)}
    return nn.ModuleDict({"block": nn.ModuleDict(layers)})


def entry(shape: tuple[int, ...], start: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": (start, end)}


def raw(header: Mapping[str, Any] | str, size: int = 160, length: int | None = None) -> bytes:
    """Return a safetensors file with this header, `size` zeros, and `length` as the stated length of the header."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(size)


def assert_refused(source: Any, match: str, tmp_path: Path, model: nn.Module | None = None) -> AdapterError:
    """Assert that loading and converting refuse a source with a short message, and attach and write nothing."""
    model = net() if model is None else model
    before = snapshot(model)
    with pytest.raises(AdapterError, match=match) as caught:
        diffadapt.load_adapter(model, source, "hostile")
    assert_unchanged(model, before)
    folder = tmp_path / "converted"
    with pytest.raises(AdapterError):
        diffadapt.convert(source, folder / "a.safetensors", "kohya")
    assert not folder.exists()
    assert len(str(caught.value)) < 10_000
    return caught.value


def test_the_file_that_is_damaged_below_loads_undamaged() -> None:
    assert diffadapt.load_adapter(net(), FITTING).used == 2


# Headers

GOOD = {DOWN: entry((2, 12), 0, 96), UP: entry((8, 2), 96, 160)}
TEXT = json.dumps(GOOD)
LYING: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "not a safetensors file but empty"),
    "less than a length": (b"\x10\0\0", "cut off"),
    "longer than the file": (raw(GOOD, length=10**6), r"should have 1000000 bytes, and \d+ follow; download it again"),
    "longer than any file": (raw(GOOD, length=2**63), "should have 9223372036854775808 bytes"),
    "shorter than it is": (raw(GOOD, length=20), "not a readable safetensors file"),
    "no length at all": (raw(GOOD, length=0), "not a readable safetensors file"),
    "tensors overlap": (raw({**GOOD, UP: entry((8, 2), 64, 128)}, 128), f"invalid offset.*{UP}"),
    "tensors far away": (raw({**GOOD, UP: entry((8, 2), 9096, 9160)}), f"invalid offset.*{UP}"),
    "an end before its start": (raw({**GOOD, DOWN: entry((2, 12), 96, 0)}), "invalid offset"),
    "a hole between tensors": (raw({**GOOD, UP: entry((8, 2), 100, 164)}, 164), "invalid offset"),
    "more bytes than the shape": (raw({**GOOD, DOWN: entry((2, 11), 0, 96)}), "invalid shape, data type, or offset"),
    "fewer bytes than the dtype": (raw({**GOOD, DOWN: entry((2, 12), 0, 96, "F64")}), "invalid shape, data type"),
    "a shape below zero": (raw({**GOOD, DOWN: entry((-2, -12), 0, 96)}), "-2"),
    "a shape that overflows": (raw({**GOOD, DOWN: entry((2**32, 2**32, 4), 0, 96)}), "overflow"),
    "a shape with a fraction": (raw(TEXT.replace("12", "12.5")), "not a readable"),
    "an unknown dtype": (raw(TEXT.replace("F32", "Q99", 1)), "Q99"),
    "numbers of four bits": (
        raw({**GOOD, DOWN: entry((2, 96), 0, 96, "F4")}),
        "has dtype F4, expected one of",
    ),
    "data cut off": (raw(GOOD)[:-1], "not a readable"),
    "data to spare": (raw(GOOD) + b"\0", "not a readable"),
    "a list": (raw("[1, 2]"), "not a readable"),
    "nested JSON": (raw('{"__metadata__":' + '{"a":' * 10_000 + "1" + "}" * 10_001), "not a readable"),
    "metadata of numbers": (raw({"__metadata__": {"a": 1}, **GOOD}), "not a readable"),
    "metadata twice": (raw('{"__metadata__":{},"__metadata__":{"a":"b"},' + TEXT[1:]), "duplicate field"),
    "a shape twice": (raw(TEXT.replace('"shape": [2, 12]', '"shape": [12, 2], "shape": [2, 12]')), "duplicate field"),
    "a pickle": (pickle.dumps({DOWN: 1}), "a pickle; convert it"),
    "a zip file": (b"PK\x03\x04" + bytes(100), "a zip file, as torch.save writes"),
    "a web page": (b"<!DOCTYPE html><html>", "a web page; download"),
    "an index": (b'{"metadata": {}, "weight_map": {}}', "JSON, perhaps the index of several files"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS"),
}


@pytest.mark.parametrize("spare", range(8))
def test_a_header_may_have_any_length(spare: int, tmp_path: Path) -> None:
    """The tensors after it need not be aligned."""
    file = tmp_path / "a.safetensors"
    file.write_bytes(raw(TEXT + " " * spare, 0) + b"".join(t.numpy().tobytes() for t in FITTING.values()))
    model = net()
    diffadapt.load_adapter(model, file, "a")
    for name, tensor in diffadapt.adapters(model)["a"].components["model"].layers["block.linear"].tensors.items():
        assert torch.equal(tensor, FITTING[{"lora_down": DOWN, "lora_up": UP}[name]])


@pytest.mark.parametrize("name", LYING)
def test_a_false_header_is_refused(name: str, tmp_path: Path) -> None:
    content, match = LYING[name]
    file = tmp_path / "a.safetensors"
    file.write_bytes(content)
    assert str(file) in str(assert_refused(file, match, tmp_path))
    with pytest.raises(AdapterError, match=match):
        diffadapt.inspect(file)


@pytest.mark.parametrize(
    "twin",
    [
        TEXT,
        TEXT.replace("data_offsets", "data\\u005foffsets"),
        TEXT.replace("lora_A", "lora\\u005fA").replace("data_offsets", "data\\u005foffsets"),
    ],
    ids=["as it is", "the key escaped", "the name escaped"],
)
def test_two_tensors_of_the_same_name_are_refused(twin: str, tmp_path: Path) -> None:
    """JSON readers keep the last one of equal keys, so another program might show other tensors than are loaded."""
    file = tmp_path / "a.safetensors"
    first = json.dumps({DOWN: entry((12, 2), 0, 96)})[1:-1]
    # A value that looks like the key that every tensor has once.
    file.write_bytes(raw(f'{{"__metadata__": {{"a": "data_offsets"}}, {first}, {twin[1:]}'))
    assert_refused(file, f"'{re.escape(DOWN)}' is there twice", tmp_path)


def test_escapes_in_metadata_are_allowed(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(raw('{"__metadata__": {"a": "\\u4e2d", "data_offsets": "data_offsets"}, ' + TEXT[1:]))
    model = net()
    assert diffadapt.load_adapter(model, file).metadata["a"] == "中"


# Names

PATH = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
CLIP = "encoder.layers.0.self_attn.q_proj"
SPELLINGS = {
    "peft and kohya suffixes": (f"unet.{PATH}.lora_B.weight", f"unet.{PATH}.lora_up.weight"),
    "old and older": (
        f"unet.{PATH}.lora.up.weight",
        f"unet.{PATH.replace('to_q', 'processor.to_q_lora')}.up.weight",
    ),
    "with the name of the adapter": (f"unet.{PATH}.lora_B.weight", f"unet.{PATH}.lora_B.default.weight"),
    "with and without component": (f"unet.{PATH}.lora_B.weight", f"{PATH}.lora_B.weight"),
    "two flat ones": (f"lora_unet_{PATH}.lora_up.weight", f"lora_unet__{PATH}.lora_up.weight"),
    "two programs' prefixes": (f"lora_unet_{PATH}.lora_up.weight", f"lycoris_{PATH}.lora_up.weight"),
    "CLIP's level": (f"text_encoder.{CLIP}.lora_B.weight", f"text_encoder.text_model.{CLIP}.lora_B.weight"),
    "CLIP, flat": (f"lora_te_{CLIP}.lora_up.weight", f"lora_te_text_model_{CLIP}.lora_up.weight"),
}


@pytest.mark.parametrize("name", SPELLINGS)
@for_each(same=[True, False])
def test_one_tensor_under_two_spellings_is_refused(name: str, same: bool) -> None:
    pipe = models.sd15()
    layer = (pipe.text_encoder if "CLIP" in name else pipe.unet).get_submodule(
        models.CLIP_ROOT + CLIP if "CLIP" in name else PATH
    )
    flat = "lora_unet" in SPELLINGS[name][0] or "lora_te" in SPELLINGS[name][0]
    first, second = (key.replace(".", "_", key.count(".") - 2) if flat else key for key in SPELLINGS[name])
    tensors = {
        re.sub(r"up\b", "down", first.replace("lora_B", "lora_A")): torch.ones(2, layer.in_features),
        first: torch.ones(layer.out_features, 2),
        second: torch.full((layer.out_features, 2), 1.0 if same else 5.0),
    }
    alone = {key: tensor for key, tensor in tensors.items() if key != second}
    assert pipe.load_adapter(alone, "alone").unused == []
    pipe.adapters.clear()
    before = snapshot(pipe)
    with pytest.raises(AdapterError) as caught:
        pipe.load_adapter(tensors)
    assert all(key in str(caught.value) for key in (first, second))
    assert_unchanged(pipe, before)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_layer_given_whole_and_in_parts_is_refused_by_conversion(reverse: bool, tmp_path: Path) -> None:
    """Also for a format that would keep the fused layer whole."""
    whole = "lora_unet_double_blocks_0_img_attn_qkv"
    part = "lora_unet_transformer_blocks_0_attn_to_k"
    tensors = {
        # The attention alone could be that of another family.
        "lora_unet_double_blocks_0_img_mod_lin.diff": torch.zeros(18432, 3072),
        f"{whole}.lora_down.weight": torch.ones(2, 3072),
        f"{whole}.lora_up.weight": torch.ones(9216, 2),
        f"{part}.lora_down.weight": torch.ones(2, 3072),
        f"{part}.lora_up.weight": torch.ones(3072, 2),
    }
    tensors = dict(reversed(tensors.items())) if reverse else tensors
    for format in ("kohya", "diffusers"):
        with pytest.raises(AdapterError, match=r"transformer_blocks\.0\.attn\.to_k has tensors under another name"):
            diffadapt.convert(tensors, tmp_path / "a.safetensors", format)
    assert list(tmp_path.iterdir()) == []


def test_a_million_names_are_refused(tmp_path: Path) -> None:
    one = torch.zeros(1)
    tensors = {f"block.linear{index}.lora_A.weight": one for index in range(MILLION)}
    assert_refused(tensors, "1000000 tensors, expected at most 100000", tmp_path)


def test_the_largest_allowed_number_of_wrong_names_is_reported_briefly(tmp_path: Path) -> None:
    one = torch.zeros(1, 1)
    tensors = {f"block.linear{index}.lora_A.weight": one for index in range(100_000)}
    error = assert_refused(tensors, "100000 of 100000 tensors cannot be used", tmp_path)
    assert isinstance(error, diffadapt.LoadError)
    assert len(error.faults) == len(tensors)
    assert len(str(diffadapt.inspect(tensors, {"model": net()}))) < 10_000


def test_a_header_for_a_million_names_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    with file.open("wb") as opened:
        opened.write(struct.pack("<Q", 90 * 2**20))
        opened.truncate(100 * 2**20)
    assert_refused(file, "a header of 94371840 bytes, expected at most", tmp_path)


@pytest.mark.parametrize("name", ["a" * MILLION, "net." * 250_000, "\n" * MILLION])
def test_a_name_of_a_million_letters_is_refused(name: str, tmp_path: Path) -> None:
    tensors = {**FITTING, f"{name}.lora_A.weight": torch.zeros(1)}
    assert_refused(tensors, "has 10000.. characters, expected", tmp_path)
    file = tmp_path / "a.safetensors"
    file.write_bytes(save(tensors))
    assert_refused(file, "has 10000.. characters, expected", tmp_path)


# Shapes

HUGE = 2**40
FACTORS = {"lora_down.weight": (2, 12), "lora_up.weight": (8, 2)}
SHAPES: dict[str, tuple[dict[str, tuple[int, ...]], str]] = {
    "lora": ({"lora_down.weight": (HUGE, 12), "lora_up.weight": (8, HUGE)}, "lora_down has shape .1099511627776, 12."),
    "lora, wide": ({"lora_down.weight": (2, HUGE), "lora_up.weight": (8, 2)}, "expected .2, 12."),
    "lora, core": (
        {"lora_down.weight": (2**20, 12), "lora_mid.weight": (2**20, 2**20), "lora_up.weight": (8, 2**20)},
        "lora_(down|mid) has shape",
    ),
    "loha": (
        {f"hada_w{n}_{s}": (8, HUGE) if s == "a" else (HUGE, 12) for n in "12" for s in "ab"},
        "hada_w1_a has shape .8, 1099511627776., expected at most",
    ),
    "lokr": ({"lokr_w1": (2**20, 2**20), "lokr_w2": (2**20, 2**20)}, "multiply to .1099511627776, 1099511627776."),
    "lokr, factors": (
        {"lokr_w1_a": (HUGE, 1), "lokr_w1_b": (1, HUGE), "lokr_w2_a": (HUGE, 1), "lokr_w2_b": (1, HUGE)},
        r"multiply to \(12089\d+, 12089\d+\), expected \(8, 12\)",
    ),
    "lokr, rank": (
        {"lokr_w1": (2, 3), "lokr_w2_a": (4, HUGE), "lokr_w2_b": (HUGE, 4)},
        "lokr_w2_a has shape .4, 1099511627776., expected at most",
    ),
    "lokr, core": (
        {"lokr_w1": (2, 3), "lokr_t2": (2**20, 2**20), "lokr_w2_a": (2**20, 4), "lokr_w2_b": (2**20, 4)},
        "lokr_t2 has shape .1048576, 1048576., expected at most",
    ),
    "oft": ({"oft_blocks": (1, 2**20, 2**20)}, "oft_blocks has shape"),
    "oft of peft": ({"oft_R": (1, HUGE)}, "oft_R has shape"),
    "boft": ({"oft_blocks": (HUGE, 2, 4, 4)}, "1099511627776 butterfly factors of 2 blocks"),
    "boft of peft": ({"boft_R": (HUGE, 3, 4, 4), "boft_s": (8, 1)}, "1099511627776 butterfly factors of 3 blocks"),
    "glora": (
        {"a1.weight": (12, HUGE), "a2.weight": (HUGE, 12), "b1.weight": (8, HUGE), "b2.weight": (HUGE, 12)},
        "glora_a1 has shape .12, 1099511627776., expected at most",
    ),
    "full": ({"diff": (2**20, 2**20)}, "diff has shape .1048576, 1048576., expected .8, 12."),
    "ia3": ({"ia3_l": (HUGE, 1)}, "expected 12 numbers"),
    "dora": ({**FACTORS, "dora_scale": (HUGE, 1)}, "dora_scale has shape"),
    "bias": ({**FACTORS, "diff_b": (HUGE,)}, "lora_bias has shape .1099511627776,."),
    "sparse rest": (
        {**FACTORS, "bias_indices": (2, HUGE), "bias_values": (HUGE,), "bias_size": (2,)},
        "bias_values has shape .1099511627776,., expected at most",
    ),
    "sparse rest, twice over": (
        {**FACTORS, "bias_indices": (2, 1000), "bias_values": (1000,), "bias_size": (2,)},
        r"expected 1000 places in a matrix of shape \(8, 12\)",
    ),
    "sparse rest, places": (
        {**FACTORS, "bias_indices": (2**20, 2**20), "bias_values": (8,), "bias_size": (2,)},
        "have shape .1048576, 1048576., expected 8 places",
    ),
    "sparse rest, size": (
        {**FACTORS, "bias_indices": (2, 8), "bias_values": (8,), "bias_size": (HUGE,)},
        "bias_size has shape .1099511627776,., expected 2 numbers",
    ),
    "sparse rest, layer": (
        {
            "lora_down.weight": (1, HUGE), "lora_up.weight": (HUGE, 1),
            "bias_indices": (2, 8), "bias_values": (8,), "bias_size": (2,),
        },
        "lora_down has shape",
    ),
    "shape": ({**FACTORS, "reshape_weight": (HUGE,)}, "reshape_weight has shape .1099511627776,., expected 2 numbers"),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_an_absurd_shape_is_refused_by_the_header_alone(name: str) -> None:
    shapes, match = SHAPES[name]
    tensors = {f"block.linear.{key}": torch.empty(shape, device="meta") for key, shape in shapes.items()}
    for target in ({"model": net()}, None):
        report = diffadapt.inspect(tensors, target)
        if target is not None:
            assert (report.used, len(report.unused)) == (0, len(tensors))
            assert any(re.search(match, reason) for _, reason in report.unused), report.unused


def test_an_absurd_new_bias_is_refused_by_the_header_alone() -> None:
    model = nn.ModuleDict({"controlnet_cond_embedding": nn.Identity(), "linear": nn.Linear(12, 8)})
    shapes = {"lora_controlnet": (0,), "linear.down": (2, 12), "linear.up": (8, 2), "linear.bias": (HUGE,)}
    tensors = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    report = diffadapt.inspect(tensors, {"model": model})
    assert (report.format, report.used) == ("control-lora", 0)
    assert any("the new bias has shape (1099511627776,), expected (8,)" in reason for _, reason in report.unused)


@pytest.mark.parametrize("number", ["1", "00", "01", "999", "1000000000000", "²"])
def test_wrong_numbers_of_parts_are_refused(number: str) -> None:
    pipe = models.sd15()
    stem, blocks = "oft_unet_conv_in", torch.ones(2, 4, 4)
    part = f"{stem}.oft_blocks.{number}"
    tensors = {f"{stem}.oft_blocks.0": blocks, f"{stem}.alpha": torch.tensor(0.5)}
    assert pipe.load_adapter(tensors, "a").unused == []
    pipe.adapters.clear()
    before = snapshot(pipe)
    with pytest.raises(diffadapt.LoadError) as caught:
        pipe.load_adapter({**tensors, part: blocks})
    assert part in dict(caught.value.faults)
    assert_unchanged(pipe, before)


VECTORS: dict[str, tuple[dict[str, tuple[int, ...]], str]] = {
    "many": ({"bundle_emb.<a>.clip_l": (HUGE, 32)}, "1099511627776 vectors for .*, expected at most 4096"),
    "many tokens": ({"<a>": (3000, 32), "<b>": (3000, 32)}, "6000 vectors for .*, expected at most 4096"),
    "many without a name": ({"clip_l": (HUGE, 32)}, "1099511627776 vectors for .*, expected at most 4096"),
    "a token for each": ({"text_encoders_0": (HUGE, 32)}, "1099511627776 vectors for .*, expected at most 4096"),
    "wide": ({"<a>": (1, 32), "<b>": (1, HUGE)}, "width 1099511627776 (fit no|beside)"),
    "none": ({"<a>": (0, 32)}, "expected vectors"),
}


@pytest.mark.parametrize("name", VECTORS)
def test_absurd_token_vectors_are_refused_by_the_header_alone(name: str) -> None:
    shapes, match = VECTORS[name]
    tensors = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    for target in (models.sd15(), None):
        report = diffadapt.inspect(tensors, target)
        assert any(re.search(match, reason) for _, reason in report.unused), report.unused


def test_a_number_in_the_name_of_a_token_is_a_part_of_its_name() -> None:
    """A token of several vectors has numbered names. A number in a file must not create that many of them."""
    pipe = models.sd15()
    width = pipe.text_encoder.get_input_embeddings().embedding_dim
    tokens = ("<a>", "<a>_9999999999999", f"<a>_{'9' * 900}")
    report = pipe.load_adapter({f"bundle_emb.{token}.clip_l": torch.ones(1, width) for token in tokens})
    assert report.tokens == dict.fromkeys(tokens, 1)


def test_vectors_in_dtypes_without_a_common_dtype_can_be_inspected() -> None:
    dtypes = {"<a>": torch.float8_e4m3fn, "<b>": torch.float8_e5m2, "<c>": torch.float64}
    tensors = {token: torch.empty(1, 32, dtype=dtype, device="meta") for token, dtype in dtypes.items()}
    assert diffadapt.inspect(tensors).tokens == dict.fromkeys(dtypes, 1)


def test_an_expanded_tensor_is_refused(tmp_path: Path) -> None:
    tensors = {DOWN: torch.ones(1, 12).expand(2**26, 12), UP: torch.ones(8, 1).expand(8, 2**26)}
    assert_refused(tensors, "larger than its memory; pass .*contiguous", tmp_path)


def test_sparse_and_meta_tensors_are_refused(tmp_path: Path) -> None:
    assert_refused({**FITTING, DOWN: FITTING[DOWN].to_sparse()}, "expected an ordinary tensor", tmp_path)
    assert_refused({**FITTING, DOWN: FITTING[DOWN].to("meta")}, "no values", tmp_path)


MEMORY = """
import json, resource, struct, sys
import torch, diffadapt
from torch import nn

FOLDER, MOST = sys.argv[1], 300 * 2**10
CASES = {
    # Sparse files, which have their stated size and take no space on disk.
    "lora": {"lora_A.weight": (2**26, 12), "lora_B.weight": (8, 2**26)},
    "lora, wide": {"lora_A.weight": (1, 2**31), "lora_B.weight": (8, 1)},
    "lokr": {"lokr_w1_a": (2**17, 1), "lokr_w1_b": (1, 2**17), "lokr_w2": (1, 1)},
    "lokr, rank": {"lokr_w1": (2, 3), "lokr_w2_a": (4, 2**28), "lokr_w2_b": (2**28, 4)},
    "loha": {f"hada_w{n}_{s}": (8, 2**26) if s == "a" else (2**26, 12) for n in "12" for s in "ab"},
    "oft": {"oft_blocks": (1, 2**15, 2**15)},
    "boft": {"oft_blocks": (2**26, 2, 4, 4)},
    "full": {"diff": (2**15, 2**15)},
    "sparse rest": {
        "lora_A.weight": (2, 12), "lora_B.weight": (8, 2),
        "bias_indices": (2, 2**30), "bias_values": (2**30,), "bias_size": (2,),
    },
    "sizes": {"lora_A.weight": (2, 12), "lora_B.weight": (8, 2), "reshape_weight": (2**31,)},
}
model = nn.ModuleDict({"block": nn.ModuleDict({"linear": nn.Linear(12, 8)})})

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

def refused(source, *targets):
    for target in targets:
        diffadapt.inspect(source, target)
    try:
        diffadapt.load_adapter(model, source)
    except diffadapt.AdapterError:
        return
    raise SystemExit("loaded")

before = peak()
for name, shapes in CASES.items():
    header, end = {}, 0
    for key, (*shape,) in shapes.items():
        size = 1
        for side in shape:
            size *= side
        header[f"block.linear.{key}"] = {"dtype": "F8_E4M3", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with open(f"{FOLDER}/a.safetensors", "wb") as opened:
        opened.write(struct.pack("<Q", len(text)) + text)
        opened.truncate(8 + len(text) + end)
    refused(f"{FOLDER}/a.safetensors", None, {"model": model})
    assert peak() - before < MOST, (name, peak() - before)

# The longest header that is read, full of names.
entries, size = [], 0
while size < 31 * 2**20:
    entries.append('"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % len(entries))
    size += len(entries[-1]) + 1
text = ("{" + ",".join(entries) + "}").encode()
del entries
with open(f"{FOLDER}/a.safetensors", "wb") as opened:
    opened.write(struct.pack("<Q", len(text)) + text)
del text
before = peak()
refused(f"{FOLDER}/a.safetensors")
assert peak() - before < MOST, ("names", peak() - before)
print("ok")
"""


@pytest.mark.slow
def test_memory_is_bounded(tmp_path: Path) -> None:
    """Nothing of the size that a file states is allocated before it is known to fit."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path)],
        cwd=Path(diffadapt.__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr


# Values

WITH_ALPHA: dict[str, dict[str, tuple[int, ...]]] = {
    "lora": {"lora_A.weight": (2, 12), "lora_B.weight": (8, 2)},
    "loha": {f"hada_w{n}_{s}": (8, 2) if s == "a" else (2, 12) for n in "12" for s in "ab"},
    "lokr": {"lokr_w1": (2, 3), "lokr_w2_a": (4, 1), "lokr_w2_b": (1, 4)},
    "glora": {"a1.weight": (12, 2), "a2.weight": (2, 12), "b1.weight": (8, 2), "b2.weight": (2, 12)},
    "oft": {"oft_blocks": (2, 4, 4)},
    "boft": {"oft_blocks": (2, 2, 4, 4)},
}


@pytest.mark.parametrize("name", WITH_ALPHA)
@for_each(
    alpha=[torch.tensor(math.nan), torch.tensor(math.inf), torch.tensor(-math.inf), torch.tensor(1j), torch.ones(2)]
)
def test_an_alpha_that_is_not_one_finite_number_is_refused(name: str, alpha: Tensor, tmp_path: Path) -> None:
    tensors = {f"block.linear.{key}": torch.rand(shape) for key, shape in WITH_ALPHA[name].items()}
    model = net()
    diffadapt.load_adapter(model, {**tensors, "block.linear.alpha": torch.tensor(0.5)})
    diffadapt.adapters(model).clear()
    assert_refused({**tensors, "block.linear.alpha": alpha}, r"block\.linear.*alpha (is|has)", tmp_path, model)


def test_an_alpha_without_a_meaning_may_be_infinite_but_not_nan(tmp_path: Path) -> None:
    tensors = {"block.linear.lokr_w1": torch.rand(2, 3), "block.linear.lokr_w2": torch.rand(4, 4)}
    diffadapt.load_adapter(net(), {**tensors, "block.linear.alpha": torch.tensor(math.inf)})
    assert_refused({**tensors, "block.linear.alpha": torch.tensor(math.nan)}, "alpha is nan", tmp_path)


@pytest.mark.parametrize("dtype", ["int32", "uint8", "bool", "complex64"])
def test_a_dtype_that_no_weight_has_is_refused_by_the_header_alone(dtype: str, tmp_path: Path) -> None:
    if dtype == "complex64":
        needs("safetensors", "0.7", dtype)
    file = files.write(tmp_path / "a.safetensors", {**FITTING, DOWN: FITTING[DOWN].to(getattr(torch, dtype))})
    assert_refused(file, f"lora_down has dtype torch.{dtype}", tmp_path)
    ((_, reason), *_) = diffadapt.inspect(file, {"model": net()}).unused
    assert f"lora_down has dtype torch.{dtype}" in reason


# Folders and links


def test_names_that_lead_out_of_a_folder_are_refused(tmp_path: Path) -> None:
    outside = files.write(tmp_path / "outside.safetensors", FITTING)
    folder = tmp_path / "adapter"
    (folder / "sub").mkdir(parents=True)
    model = net()
    before = snapshot(model)
    for options in (
        {"weight_name": "../outside.safetensors"},
        {"weight_name": str(outside)},
        {"weight_name": "sub/../../outside.safetensors"},
        {"weight_name": "..\\outside.safetensors"},
        {"subfolder": "..", "weight_name": "outside.safetensors"},
        {"subfolder": str(tmp_path), "weight_name": "outside.safetensors"},
    ):
        for source in (folder, "someone/something"):
            with pytest.raises(AdapterError, match="leads out of it; expected the name of a file or folder inside"):
                diffadapt.load_adapter(model, source, local_files_only=True, **options)
    assert_unchanged(model, before)
    files.write(folder / "sub" / "inside.safetensors", FITTING)
    diffadapt.load_adapter(model, folder, weight_name="sub/inside.safetensors")


def test_links_that_lead_out_of_a_folder_are_refused(tmp_path: Path) -> None:
    outside = files.write(tmp_path / "outside" / "a.safetensors", FITTING)
    folder = tmp_path / "adapter"
    folder.mkdir()
    link = folder / "adapter_model.safetensors"
    link.symlink_to(outside)
    assert_refused(folder, "a link out of the folder, to .*; pass that path itself", tmp_path)
    # A link that is named itself is meant.
    diffadapt.load_adapter(net(), link)
    (folder / "adapter_config.json").symlink_to(tmp_path / "outside" / "secret.json")
    (tmp_path / "outside" / "secret.json").write_text('{"peft_type": "secret"}')
    assert "secret'" not in str(assert_refused(link, "a link out of the folder", tmp_path))
    nested = tmp_path / "nested"
    nested.mkdir()
    (nested / "sub").symlink_to(tmp_path / "outside")
    with pytest.raises(AdapterError, match="a link out of the folder"):
        diffadapt.load_adapter(net(), nested, subfolder="sub")


def test_links_inside_the_hub_cache_are_followed(tmp_path: Path) -> None:
    """Its snapshots consist of links to its blobs."""
    repository = tmp_path / "models--someone--something"
    blob = files.write(repository / "blobs" / "0123.safetensors", FITTING)
    revision = repository / "snapshots" / "main"
    revision.mkdir(parents=True)
    (revision / "pytorch_lora_weights.safetensors").symlink_to(Path("../../blobs") / blob.name)
    assert diffadapt.load_adapter(net(), revision).used == 2
    (revision / "pytorch_lora_weights.safetensors").unlink()
    other = files.write(tmp_path / "other.safetensors", FITTING)
    (revision / "pytorch_lora_weights.safetensors").symlink_to(other)
    assert_refused(revision, "a link out of the folder", tmp_path)


@pytest.mark.parametrize("inside", ["../secret.safetensors", "/etc/passwd", "a.safetensors"])
def test_an_index_is_not_followed(inside: str, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    files.write(tmp_path / "secret.safetensors", FITTING)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {DOWN: inside, UP: inside}}))
    assert_refused(folder, "no .safetensors file there", tmp_path)
    assert_refused(index, "JSON, perhaps the index of several files", tmp_path)


# Pickles


class Mischief:
    """An object whose pickle writes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


def _zipped(content: Any) -> bytes:
    """Return what `torch.save` writes today."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def _zip_of(content: Any) -> bytes:
    """Return a zip file in a zip file."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as opened:
        opened.writestr("adapter_model.safetensors", _zipped(content))
    return buffer.getvalue()


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt", ".pkl", ".safetensors", ""])
@for_each(write=[pickle.dumps, _zipped, _zip_of])
def test_pickles_are_not_read(suffix: str, write: Callable[[Any], bytes], tmp_path: Path) -> None:
    file, trace = tmp_path / f"pixel{suffix}", tmp_path / "trace"
    file.write_bytes(write({DOWN: Mischief(trace)}))
    match = (
        "pickle files can run code"
        if suffix.startswith((".b", ".p", ".c"))
        else "not a safetensors file but a (zip|pick)"
    )
    assert_refused(file, match, tmp_path)
    assert not trace.exists()
    if suffix != ".safetensors":
        with pytest.raises(AdapterError, match=r"pixel.*cannot be unpickled with weights_only=True"):
            diffadapt.read_pickle(file)
        assert not trace.exists()
        file.write_bytes(_zipped({"state_dict": FITTING}))
        assert diffadapt.load_adapter(net(), diffadapt.read_pickle(file)).used == 2


def _rezipped(content: Any, *, level: int = zipfile.ZIP_DEFLATED) -> bytes:
    """Return what `torch.save` writes with compressed entries."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(_zipped(content))) as stored, zipfile.ZipFile(buffer, "w", level) as packed:
        for name in stored.namelist():
            packed.writestr(name, stored.read(name))
    return buffer.getvalue()


def _overlapping(content: Any) -> bytes:
    """Return a zip file whose directory has one entry many times."""
    buffer = io.BytesIO(_zipped(content))
    with zipfile.ZipFile(buffer, "a") as opened:
        largest = max(opened.infolist(), key=lambda entry: entry.file_size)
        opened.filelist.extend([largest] * 100)
        opened._didModify = True  # type: ignore[attr-defined]
    return buffer.getvalue()


@pytest.mark.parametrize("write", [_rezipped, _overlapping])
def test_a_zip_file_that_unpacks_to_more_than_its_size_is_refused(
    write: Callable[[Any], bytes], tmp_path: Path
) -> None:
    file = tmp_path / "bomb.pt"
    file.write_bytes(write({DOWN: torch.zeros(1000, 1000)}))
    with pytest.raises(AdapterError, match=r"bomb.pt: \d+ bytes that unpack to \d{7,}, expected no more"):
        diffadapt.read_pickle(file)
    file.write_bytes(_rezipped(FITTING, level=zipfile.ZIP_STORED))
    assert diffadapt.load_adapter(net(), diffadapt.read_pickle(file)).used == 2


@pytest.mark.parametrize("content", [[FITTING[DOWN]], {"state_dict": [1]}, {"a": 1}, {1: FITTING[DOWN]}], ids=str)
def test_a_pickle_without_a_state_dict_is_refused(content: Any, tmp_path: Path) -> None:
    file = tmp_path / "a.pt"
    torch.save(content, file)
    with pytest.raises(AdapterError, match="state dict"):
        diffadapt.read_pickle(file)


# Metadata and configs

BOMBS = {
    "nested": "[" * 100_000,
    "nested objects": '{"a":' * 100_000,
    "large": json.dumps({"r": 4, "target_modules": ["a" * 100] * 50_000}),
    "a long number": '{"unet.lora_alpha": %s}' % ("9" * 100_000),
    "a number too large": '{"unet.lora_alpha": 1%s}' % ("0" * 400),
    "half a character": '{"unet.lora_alpha": "\\ud800"}',
}


@pytest.mark.parametrize("name", BOMBS)
def test_explosive_json_is_refused(name: str, tmp_path: Path) -> None:
    pipe = models.sd15()
    tensors = spellings.peft_names(loras.parts_for(pipe, ("unet",), "to_q"))
    before = snapshot(pipe)
    file = files.write(tmp_path / "a.safetensors", tensors, {"lora_adapter_metadata": BOMBS[name]})
    with pytest.raises(AdapterError, match=r"lora_adapter_metadata|alpha in the file's metadata") as caught:
        pipe.load_adapter(file)
    assert len(str(caught.value)) < 30_000
    assert_unchanged(pipe, before)
    tensors = {f"base_model.model.{key}": tensor for key, tensor in FITTING.items()}
    files.write(tmp_path / "folder" / "adapter_model.safetensors", tensors)
    config = tmp_path / "folder" / "adapter_config.json"
    config.write_text(BOMBS[name].replace("unet.", ""))
    assert_refused(config.parent, r"adapter_config\.json|alpha in the file's metadata", tmp_path)


def test_metadata_that_is_not_used_may_be_anything(tmp_path: Path) -> None:
    metadata = {"ss_tag_frequency": "[" * 100_000, "lora_adapter_metadat": "}"}
    assert (
        diffadapt.load_adapter(net(), files.write(tmp_path / "a.safetensors", FITTING, metadata)).metadata == metadata
    )


CLASSES = ['{"a": 1}', "[1]", "[" * 100_000, "7", "null"]


@pytest.mark.parametrize("text", CLASSES, ids=[text[:8] for text in CLASSES])
def test_a_list_of_classes_without_names_is_refused(text: str, tmp_path: Path) -> None:
    tensors = {"unet:0:down": torch.ones(2, 8), "unet:0:up": torch.ones(8, 2)}
    file = files.write(tmp_path / "a.safetensors", tensors, {"unet": text})
    with pytest.raises(AdapterError, match="the header's unet is"):
        models.sd15().load_adapter(file)


# Adapter type, its tensors, and an option with invalid values.
LORA = {"lora_A.weight": (2, 12), "lora_B.weight": (8, 2)}
CONFIGS: list[tuple[str, dict[str, tuple[int, ...]], str, list[Any]]] = [
    ("LORA", LORA, "peft_type", [7, None, ["LORA"], {"LORA": 1}, "lora", "VERA"]),
    ("LORA", LORA, "lora_alpha", ["4", [4], {"a": 4}, True, float("nan"), float("inf"), 0, 10**400]),
    ("LORA", LORA, "use_rslora", ["no", 1, []]),
    ("LORA", LORA, "alpha_pattern", [[4], "linear", 7, {"linear": "4"}, {"linear": [4]}, {"(": 4}, {"linear": 0}]),
    ("LORA", LORA, "alpha_pattern", [{f"a{index}": 1 for index in range(100_000)}, {"x" * 100_000 + "(": 4}]),
    ("LOKR", {"lokr_w1": (2, 3), "lokr_w2": (4, 4)}, "r", ["4", -1, 2.5, [4], True, 10**20]),
    ("LOKR", {"lokr_w1": (2, 3), "lokr_w2": (4, 4)}, "rank_pattern", [[4], {"linear": "4"}, {"linear": -4}]),
    ("OFT", {"oft_R.weight": (3, 6)}, "use_cayley_neumann", ["yes", 1, [True]]),
    ("OFT", {"oft_R.weight": (3, 6)}, "num_cayley_neumann_terms", ["5", 5.0, -5, 1, 0, 10**9, None, [5]]),
    ("OFT", {"oft_R.weight": (3, 6)}, "coft", ["yes", 1, [True]]),
    ("OFT", {"oft_R.weight": (3, 6)}, "eps", ["5", None, float("nan"), [5]]),
    ("IA3", {"ia3_l": (8, 1)}, "feedforward_modules", [7, {"linear": 1}, [7], "(", "(a*)*b"]),
]
FINE = {
    "LORA": {"lora_alpha": 4},
    "LOKR": {"r": 4, "alpha": 4},
    "OFT": {"use_cayley_neumann": True, "coft": True, "peft_version": "0.21.2"},
    "IA3": {},
}


@pytest.mark.parametrize(("peft_type", "shapes", "option", "values"), CONFIGS, ids=[f"{c[0]} {c[2]}" for c in CONFIGS])
def test_invalid_options_of_a_config_are_refused(
    peft_type: str, shapes: dict[str, tuple[int, ...]], option: str, values: list[Any], tmp_path: Path
) -> None:
    tensors = {f"base_model.model.block.linear.{key}": torch.rand(shape) for key, shape in shapes.items()}
    files.write(tmp_path / "folder" / "adapter_model.safetensors", tensors)
    config = tmp_path / "folder" / "adapter_config.json"
    config.write_text(json.dumps({"peft_type": peft_type, **FINE[peft_type]}))
    assert diffadapt.load_adapter(net(), config.parent).used == len(tensors)
    for value in values:
        config.write_text(json.dumps({"peft_type": peft_type, **FINE[peft_type], option: value}))
        match = "alpha" if "alpha" in option else f"({option}|r) in the file's metadata|{option}="
        assert_refused(config.parent, match, tmp_path)
