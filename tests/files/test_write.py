"""Writing: the same adapter is the same file, byte for byte."""

from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

import diffadapt
from tests.support import loras, models, spellings

METADATA = {f"key {number}": f'value "{number}" ä \u2028 \\ \n \x7f \x01 \U0001f600' for number in range(50)}


@pytest.mark.parametrize("format", ["diffusers", "kohya", "peft", "comfy"])
def test_an_adapter_saved_twice_is_the_same_file(format: str, tmp_path: Path) -> None:
    pipe: Any = models.sd15()
    source = spellings.peft_names(loras.parts_for(pipe, ("unet",), "to_q"))
    pipe.load_adapter(source, "a")
    pipe.adapters["a"].components["unet"].metadata.update(METADATA)
    paths = [
        pipe.adapters.save("a", tmp_path / (str(number) if format == "peft" else f"{number}.safetensors"), format)
        for number in range(3)
    ]
    assert len({path.read_bytes() for path in paths}) == 1
    with safe_open(paths[0], "pt") as opened:
        metadata = opened.metadata()
        assert list(opened.keys())
    assert all(metadata.get(key, value) == value for key, value in METADATA.items())
    assert diffadapt.inspect(paths[0].parent if format == "peft" else paths[0]).unused == []
