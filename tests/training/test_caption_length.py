"""--max_sequence_length, the number of tokens that a caption is encoded to."""

from pathlib import Path

import pytest
from PIL import Image

from diffadapt.cli import main
from diffadapt.errors import UsageError
from diffadapt.training.caches import Store
from diffadapt.training.caption_length import note_on_long_captions
from diffadapt.training.encodings import Captions
from diffadapt.training.families import family_of
from diffadapt.training.options import TrainingOptions
from diffadapt.training.run import train
from tests.support.tiny_pipelines import shared, tiny

TINY = Path(__file__).parents[2] / "examples" / "tiny_pipeline"


def test_captions_have_as_many_tokens_as_asked_for_and_caches_do_not_mix_them_up(tmp_path: Path) -> None:
    pipe = shared("flux")
    family = family_of(pipe)
    lengths = {}
    for given in (None, 16, 24):
        captions = Captions(pipe, family, Store(tmp_path), max_tokens=given)
        lengths[given] = [len(captions.row(caption)["hidden"]) for caption in ("a dog", None)]
        assert captions.key("a dog", None) not in [each.stem for each in tmp_path.iterdir()]
        captions.store.put(captions.key("a dog", None), captions.row("a dog"))  # type: ignore[union-attr]
    assert lengths == {None: [512, 512], 16: [16, 16], 24: [24, 24]}


@pytest.mark.parametrize(("family", "given", "most"), [("sd", None, 16), ("flux", None, 512), ("flux", 24, 24)])
def test_captions_that_are_cut_off_are_reported(family: str, given: int | None, most: int) -> None:
    pipe = shared(family)
    limit = given or family_of(pipe).max_tokens
    short, long = "a dog", "a dog " * (most // 2)
    assert note_on_long_captions(pipe, [short], limit) is None
    note = note_on_long_captions(pipe, [short, long, long], limit)
    assert note is not None
    assert note.startswith(f"1 of 2 captions are cut off, because the text encoder reads {most} tokens: 'a dog a dog")
    assert ("--max_sequence_length" in note) == (family == "flux")


def test_the_command_line_says_that_a_caption_is_cut_off(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    command = ["train", "--pretrained_model_name_or_path", str(TINY), "--instance_data_dir", str(tmp_path), "--dry_run"]
    prompt = ["--instance_prompt", "a red circle on a white background " * 20, "--output_dir", str(tmp_path / "out")]
    assert main([*command, *prompt]) == 0
    assert "1 of 1 captions are cut off" in capsys.readouterr().out


def test_a_model_with_captions_of_a_fixed_length_refuses_another(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    options = TrainingOptions(
        instance_data_dir=str(tmp_path),
        instance_prompt="a dog",
        output_dir=str(tmp_path / "out"),
        max_sequence_length=16,
        report_to="none",
    )
    with pytest.raises(UsageError, match=r"max_sequence_length has no effect on a StableDiffusionPipeline"):
        train(options, tiny("sd"))
