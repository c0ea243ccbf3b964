"""Folders as people have them: captions, pictures of every kind, sizes, and the order in which pictures are seen."""

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from diffadapt import UsageError
from diffadapt.training.data.caption_variants import CaptionVariants
from diffadapt.training.data.draws import CLASS, INSTANCE, Draw, Draws
from diffadapt.training.data.folders import Found, read_folder
from diffadapt.training.data.pictures import read_picture
from diffadapt.training.data.report import contact_sheet, covered_share, describe
from diffadapt.training.data.samples import PictureOptions, Samples, Stream
from diffadapt.training.data.shapes import Crop, Shapes
from tests.support.cases import for_each

RED = (255, 0, 0)


def picture(path: Path, colour: Any = "red", size: tuple[int, int] = (16, 16), mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)
    return path


def captions(found: Found) -> dict[str, tuple[str, ...]]:
    return {example.path.name: example.captions for example in found.examples}


def samples(examples: Any, shapes: Shapes, variants: CaptionVariants | None = None, **options: Any) -> Samples:
    streams = {INSTANCE: Stream.of(examples, shapes)}
    return Samples(streams, PictureOptions(**options), variants or CaptionVariants())


# Captions


def test_a_caption_of_the_picture_itself_takes_precedence_over_the_prompt(tmp_path: Path) -> None:
    for name in ("listed", "beside", "table", "none"):
        picture(tmp_path / f"{name}.png")
    picture(tmp_path / "10_sks dog" / "kohya.png")
    picture(tmp_path / "deep" / "er" / "nested.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "./listed.png", "text": "from jsonl"}))
    (tmp_path / "metadata.csv").write_text('file_name,text\ntable.png,"from, csv"\n')
    (tmp_path / "beside.txt").write_text("from txt\n")
    (tmp_path / "deep" / "metadata.jsonl").write_text(json.dumps({"file_name": "er\\nested.png", "text": "nested"}))
    found = read_folder(tmp_path, "x")
    assert captions(found) == {
        "listed.png": ("from jsonl",),
        "beside.png": ("from txt",),
        "table.png": ("from, csv",),
        "none.png": ("x",),
        "kohya.png": ("sks dog",),
        "nested.png": ("nested",),
    }
    assert {example.path.name: example.repeats for example in found.examples}["kohya.png"] == 10
    assert any("1 from text files" in note and "2 from" not in note.split("folder names")[0] for note in found.notes)


def test_captions_in_any_encoding_of_unicode_are_read_as_they_are(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png")
    entry = json.dumps({"file_name": "a.png", "text": "one\u2028two\x85three"}, ensure_ascii=False)
    (tmp_path / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + entry.encode() + b"\r\n\r\n")
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfb\xc3\xa9\r\n")
    assert captions(read_folder(tmp_path, None)) == {"a.png": ("one\u2028two\x85three",), "b.png": ("b\xe9",)}
    (tmp_path / "b.txt").write_bytes(b"b\xe9")
    with pytest.raises(UsageError, match=r"b\.txt is not in UTF-8"):
        read_folder(tmp_path, None)


def test_a_file_name_in_decomposed_unicode_is_found(tmp_path: Path) -> None:
    picture(tmp_path / "e\u0301.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "\xe9.png", "text": "composed"}))
    assert captions(read_folder(tmp_path, None)) == {"e\u0301.png": ("composed",)}


def test_what_is_ambiguous_is_told(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "one"}))
    (tmp_path / "a.txt").write_text("two")
    picture(tmp_path / "b.png")
    (tmp_path / "b.txt").write_text("first\nsecond\n")
    picture(tmp_path / "c.png")
    (tmp_path / "c.txt").write_text("")
    found = read_folder(tmp_path, None)
    assert captions(found) == {"a.png": ("one",), "b.png": ("first", "second"), "c.png": ("",)}
    notes = "\n".join(found.notes)
    assert "metadata is used, and not the text file beside it, for a.png" in notes
    assert "one of several captions is drawn each time for b.png" in notes
    assert "the caption is empty for c.png" in notes


@for_each(
    case=[
        ("{", "line 1: expected"),
        ("[1]", "line 1: expected"),
        ('{"file_name": "a.png", "text": null}', "line 1: expected"),
        ('{"file_name": "a.png", "caption": "b"}', r"'caption'; --caption_column"),
        ('{"file_name": "b.png", "text": "b"}', "there is no file b.png"),
        ('{"file_name": "../a.png", "text": "b"}', "is not inside"),
        ('{"file_name": "a.png", "text": "b"}\n{"file_name": "./a.png", "text": "c"}', "second caption"),
    ]
)
def test_wrong_captions_are_refused(tmp_path: Path, case: tuple[str, str]) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(case[0])
    with pytest.raises(UsageError, match=case[1]):
        read_folder(tmp_path, "a")


def test_every_picture_without_a_caption_and_every_unreadable_one_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a folder"):
        read_folder(tmp_path / "nowhere", "a")
    with pytest.raises(UsageError, match="holds no pictures"):
        read_folder(tmp_path, "a")
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.png")
    content = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "half.png").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.jpg").write_text("not a picture")
    with pytest.raises(UsageError, match=r"half\.png cannot be read as a picture.*\n.*text\.jpg cannot be read"):
        read_folder(tmp_path, "a")
    with pytest.raises(UsageError, match=r"half\.png has no caption.*\n.*text\.jpg has no.*\n.*whole\.png has no"):
        read_folder(tmp_path, None)


def test_masks_hidden_files_and_pictures_to_edit_are_not_trained(tmp_path: Path) -> None:
    for name in ("a.png", "a-masklabel.png", "a-condlabel.png", "._a.png", ".hidden/b.png", "__MACOSX/c.png"):
        picture(tmp_path / name)
    (example,) = read_folder(tmp_path, "a").examples
    assert (example.path.name, example.mask, example.control) == (
        "a.png",
        tmp_path / "a-masklabel.png",
        tmp_path / "a-condlabel.png",
    )
    with pytest.raises(UsageError, match=r"a\.png has no picture to edit"):
        read_folder(tmp_path, "a", control=tmp_path / ".hidden")
    picture(tmp_path / "a-masklabel.png", size=(16, 64))
    with pytest.raises(UsageError, match="expected the aspect ratio"):
        read_folder(tmp_path, "a")


# Pictures


def test_every_kind_of_picture_becomes_what_a_viewer_shows(tmp_path: Path) -> None:
    def first(path: Path, background: str = "white") -> Any:
        return read_picture(path, background).image.getpixel((0, 0))

    hidden = picture(tmp_path / "hidden.png", (255, 0, 0, 0), mode="RGBA")
    assert first(hidden) == (255, 255, 255)
    assert first(hidden, "#102030") == (16, 32, 48)
    assert read_picture(hidden).alpha is not None
    assert first(picture(tmp_path / "half.png", (0, 128), mode="LA")) == (127, 127, 127)
    assert first(picture(tmp_path / "cmyk.jpg", (0, 255, 255, 0), mode="CMYK"))[0] > 200
    assert first(picture(tmp_path / "bits.png", 1, mode="1")) == (255, 255, 255)

    Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(tmp_path / "grey16.png")
    assert first(tmp_path / "grey16.png") == (156, 156, 156)  # 40000 / 257
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(UsageError, match=r"float\.tif.*floating-point"):
        read_picture(tmp_path / "float.tif")

    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 9, 200, 30])
    palette.save(tmp_path / "palette.gif")
    assert first(tmp_path / "palette.gif") == (9, 200, 30)
    palette.save(tmp_path / "clear.png", transparency=1)
    assert first(tmp_path / "clear.png") == (255, 255, 255)

    upright = Image.new("RGB", (20, 10), "blue")
    upright.putpixel((0, 0), RED)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    upright.save(tmp_path / "turned.png", exif=exif)
    turned = read_picture(tmp_path / "turned.png").image
    assert turned.size == (10, 20)
    assert turned.getpixel((9, 0)) == RED


def test_colours_are_converted_from_the_icc_profile(tmp_path: Path) -> None:
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image = Image.new("RGB", (8, 8), (200, 100, 50))
    # An sRGB profile with the primaries of red and green exchanged: what such a file calls red is green.
    red, green = srgb.index(b"rXYZ"), srgb.index(b"gXYZ")
    exchanged = bytearray(srgb)
    exchanged[red + 4 : red + 12], exchanged[green + 4 : green + 12] = (
        srgb[green + 4 : green + 12],
        srgb[red + 4 : red + 12],
    )
    image.save(tmp_path / "exchanged.png", icc_profile=bytes(exchanged))
    found = read_picture(tmp_path / "exchanged.png")
    assert max(abs(a - b) for a, b in zip(found.image.getpixel((0, 0)), (100, 200, 50), strict=True)) <= 2
    assert found.notes == ()
    image.save(tmp_path / "same.png", icc_profile=srgb)
    assert (
        max(
            abs(a - b)
            for a, b in zip(read_picture(tmp_path / "same.png").image.getpixel((0, 0)), (200, 100, 50), strict=True)
        )
        <= 1
    )
    image.save(tmp_path / "unfit.png", icc_profile=lab)
    unfit = read_picture(tmp_path / "unfit.png")
    assert unfit.image.getpixel((0, 0)) == (200, 100, 50)
    assert "ICC profile" in unfit.notes[0]


# Sizes


@for_each(case=[(8, 512), (8, 1024), (16, 1024), (32, 1024), (8, 64)])
def test_buckets_keep_the_aspect_ratio_and_suit_the_family(case: tuple[int, int]) -> None:
    divisor, resolution = case
    shapes = Shapes(resolution, divisor, buckets=True)
    sizes = shapes.sizes()
    assert (resolution, resolution) in sizes
    for width, height in sizes:
        assert width % divisor == height % divisor == 0
        assert width * height <= resolution**2
        assert (height, width) in sizes
    for picture_size in ((4000, 3000), (3000, 4000), (6000, 2000), (2000, 2000)):
        width, height = shapes.size_for(picture_size)
        assert abs(np.log(width / height) - np.log(picture_size[0] / picture_size[1])) < 0.2


def test_small_pictures_are_not_enlarged_unless_asked(tmp_path: Path) -> None:
    assert Shapes(512, 8, buckets=True).size_for((300, 211)) == (296, 208)
    assert Shapes(512, 8, buckets=True, upscale=True).size_for((300, 211)) == (576, 448)
    assert Shapes(512, 8).size_for((300, 211)) == (512, 512)
    (example,) = read_folder(picture(tmp_path / "a.png", size=(6, 300)).parent, "a").examples
    with pytest.raises(UsageError, match=r"a\.png: it has 6 x 300 pixels.*--allow_upscaling"):
        Stream.of([example], Shapes(512, 8, buckets=True))
    with pytest.raises(UsageError, match=r"--resolution must be a multiple of 16.*not 100; take 96 or 112"):
        Shapes(100, 16)


def test_a_crop_shows_what_the_size_conditions_say(tmp_path: Path) -> None:
    """Decode the crop's corner from the pixels: the picture's red is its column, green its row."""
    rows, columns = np.mgrid[0:64, 0:128]
    Image.fromarray(np.stack([columns, rows, 0 * rows], -1).astype(np.uint8)).save(tmp_path / "a.png")
    found = read_folder(tmp_path, "a").examples
    everything = samples(found, Shapes(64, 8), random_crop=True, random_flip=True)
    seen: set[int] = set()
    for number in range(8):
        draw = Draw(INSTANCE, number, 0)
        sample = everything[draw]
        assert sample.pixels is not None
        height, width, top, left, *target = sample.sizes
        assert (height, width, target) == (64, 128, [64, 64])
        levels = (sample.pixels + 1) * 127.5
        column = levels[0, 0].min()
        if everything.view(draw)[1]:  # seen mirrored, columns count from the other side
            column = 127 - levels[0, 0].max()
        assert abs(float(column) - left) <= 1.5
        assert top == 0
        seen.add(left)
    assert len(seen) > 4


# Order


def test_every_picture_is_seen_once_per_epoch_in_batches_of_one_size() -> None:
    sizes = [(8, 8)] * 5 + [(8, 16)] * 3 + [(16, 8)]
    draws = Draws(sizes, 2, seed=1, stream=INSTANCE)
    batches = list(itertools.islice(draws.batches(), 45))
    assert all(len(batch) == 2 and len({sizes[draw.picture] for draw in batch}) == 1 for batch in batches)
    by_number = sorted((draw for batch in batches for draw in batch), key=lambda draw: draw.number)
    for epoch in range(9):
        numbers = range(9 * epoch, 9 * (epoch + 1))
        assert sorted(draw.picture for draw in by_number if draw.number in numbers) == list(range(9))
    assert [draw.picture for draw in by_number[:9]] != [draw.picture for draw in by_number[9:18]]


def test_repeats_count_within_an_epoch() -> None:
    draws = itertools.islice(Draws([(8, 8)] * 2, 1, seed=0, stream=INSTANCE, repeats=[3, 1]).draws(), 8)
    assert Counter(draw.picture for draw in draws) == {0: 6, 1: 2}


def test_batches_split_over_processes_and_batch_sizes_without_a_change() -> None:
    def batches(size: int, first: int = 0, stride: int = 1) -> Any:
        return Draws([(8, 8)] * 5, size, seed=3, stream=INSTANCE).share(first, stride)

    whole = list(itertools.islice(batches(2), 12))
    assert [list(itertools.islice(batches(2, first, 2), 4)) for first in (4, 5)] == [whole[4:12:2], whole[5:12:2]]
    double = list(itertools.islice(batches(4), 6))
    assert [draw for batch in double for draw in batch] == [draw for batch in whole for draw in batch]


# Captions and views of a draw


def test_class_pictures_keep_their_captions_and_are_not_mirrored(tmp_path: Path) -> None:
    found = read_folder(picture(tmp_path / "a.png").parent, "a, b, c").examples
    everything = samples(
        found,
        Shapes(16, 8),
        CaptionVariants(trigger_word="sks", shuffle_tags=True, tag_dropout=0.3, caption_dropout=0.5),
        random_flip=True,
        random_crop=True,
    )
    everything.streams = {**everything.streams, CLASS: everything.streams[INSTANCE]}
    own = [Draw(INSTANCE, number, 0) for number in range(40)]
    kept = [Draw(CLASS, number, 0) for number in range(40)]
    assert {everything.view(draw)[1] for draw in own} == {False, True}
    assert None in {everything[draw].caption for draw in own}
    assert {everything.view(draw) for draw in kept} == {(Crop((16, 16)), False)}
    assert {everything[draw].caption for draw in kept} == {"a, b, c"}


def test_tags_are_shuffled_kept_and_dropped() -> None:
    variants = CaptionVariants(shuffle_tags=True, keep_tags=1, tag_dropout=0.5)
    found = {variants.caption(["sks, a, b, c"], Draw(INSTANCE, number, 0)) for number in range(60)}
    assert all(caption is not None and caption.split(", ")[0] == "sks" for caption in found)
    assert {"sks", "sks, a, b, c", "sks, c, a"} <= found or len(found) > 10
    assert variants.all_of(["a, b"]) is None
    plain = CaptionVariants(trigger_word="sks")
    assert plain.all_of(["a [trigger] dog", "a SKS dog", "a dog", ""]) == [
        "a sks dog",
        "a SKS dog",
        "sks, a dog",
        "sks",
    ]


def test_masks_cover_the_same_pixels_as_in_the_picture(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", size=(16, 16))
    mask = Image.new("L", (32, 32), 0)
    mask.paste(255, (0, 0, 16, 32))
    mask.save(tmp_path / "a-masklabel.png")
    shown = Image.new("RGBA", (16, 16), (255, 0, 0, 255))
    shown.paste((0, 255, 0, 0), (0, 0, 4, 16))
    shown.save(tmp_path / "b.png")
    found = read_folder(tmp_path, "a").examples
    everything = samples(found, Shapes(16, 8), masked_loss=True)
    by_file, by_alpha = (everything.load(INSTANCE, index, (Crop((16, 16)), False))[1] for index in (0, 1))
    mirrored = everything.load(INSTANCE, 0, (Crop((16, 16)), True))[1]
    assert by_file is not None
    assert by_alpha is not None
    assert mirrored is not None
    assert torch.equal(by_file, torch.cat([torch.ones(1, 16, 8), torch.zeros(1, 16, 8)], -1))
    assert torch.equal(mirrored, by_file.flip(-1))
    assert torch.equal(by_alpha, torch.cat([torch.zeros(1, 16, 4), torch.ones(1, 16, 12)], -1))
    assert covered_share(everything) == pytest.approx((0.5 + 0.75) / 2)
    assert "masks cover 62% of the pictures" in describe(everything, [])


def test_the_report_tells_what_is_enlarged_cropped_and_doubled(tmp_path: Path) -> None:
    picture(tmp_path / "small.png", size=(8, 8))
    picture(tmp_path / "wide.png", size=(64, 16))
    picture(tmp_path / "one.png", "blue")
    picture(tmp_path / "two.png", "blue")
    everything = samples(read_folder(tmp_path, "a").examples, Shapes(16, 8))
    text = describe(everything, ["something"])
    assert "4 pictures; trained sizes: 16 x 16: 4" in text
    assert "small.png is enlarged" in text
    assert "wide.png is cropped by more than 25%" in text
    assert "the same picture 2 times: one.png, two.png" in text
    assert "note: something" in text
    sheet = contact_sheet(everything)
    assert sheet.width > 4 * 160
    assert RED in {colour for _, colour in sheet.getcolors(1 << 16) or ()}
