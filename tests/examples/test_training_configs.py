"""The example configs of the trainer."""

from pathlib import Path

import pytest

from diffadapt.training.families import FAMILIES
from diffadapt.training.option_checks import check_options
from diffadapt.training.option_sources import options_from

CONFIGS = Path(__file__).parents[2] / "examples/dreambooth/configs"
# The variants of these families are trained with the config of the family.
VARIANTS = {"flux-fill", "flux-control", "qwen-image-edit-plus", "qwen-image-2.1", "pixart-alpha"}


def test_every_family_has_a_config_whose_options_work(tmp_path: Path) -> None:
    names = {path.stem for path in CONFIGS.glob("*.toml")}
    assert {name for name in names if not name.startswith("tiny-")} == {family.name for family in FAMILIES} - VARIANTS
    for name in sorted(names):
        given = {} if name.startswith("tiny-") else {"instance_data_dir": str(tmp_path)}
        options = options_from(CONFIGS / f"{name}.toml", given)
        check_options(options)
        assert options.pretrained_model_name_or_path
        assert f"diffadapt train {name}.toml" in (CONFIGS / f"{name}.toml").read_text()


@pytest.mark.parametrize("name", ["critter", "ink", "pixel"])
def test_the_configs_of_the_embedded_pipeline_find_their_files(name: str) -> None:
    options = options_from(CONFIGS / f"tiny-{name}.toml", {})
    assert Path(options.pretrained_model_name_or_path, "model_index.json").is_file()
    assert Path(options.instance_data_dir or "").resolve().parent == CONFIGS.parent / "data"
    assert options.class_prompt is None or Path(options.class_prompt).is_file()
