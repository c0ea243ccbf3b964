"""What messages advise to do if a format cannot express an adapter: followed to the letter, it works."""

import re
from pathlib import Path

import pytest

from diffadapt import AdapterError
from tests.support.dialects import DIALECTS
from tests.support.judge import WRITERS
from tests.support.matrix import KINDS, Workbench, file_of

ONE_OF_EACH = ["kohya", "OneTrainer", "diffusers", "PEFT", "BFL control"]


@pytest.mark.parametrize("family", ["flux", "lumina2", "qwen", "cascade", "sana"])
def test_every_advice_can_be_followed(family: str, tmp_path: Path) -> None:
    bench, followed = Workbench(family), 0
    dialects = sorted(DIALECTS, key=lambda dialect: (dialect.name not in ONE_OF_EACH, dialect.name))
    for kind in KINDS:
        file = next((found for dialect in dialects if (found := file_of(bench, dialect, kind, most=1))), None)
        if file is None or KINDS[kind].dialect is not None:
            continue
        manager = bench.manager
        manager.load(file.write(tmp_path / "file"), "a")
        for format in WRITERS:
            try:
                manager.save("a", tmp_path / format / ("" if format == "peft" else "saved.safetensors"), format)
            except AdapterError as error:
                message = str(error)
            else:
                continue
            advice = message.rpartition("; ")[2]
            named = re.findall(r"'(\w+)'", advice)
            assert named or "to_lora()" in advice, message
            for other in named:
                manager.save("a", tmp_path / other / ("" if other == "peft" else "saved.safetensors"), other)
                followed += 1
            if "to_lora()" in advice:
                manager.to_lora("a", "lora", rank=64)
                manager.save("lora", tmp_path / format / ("" if format == "peft" else "saved.safetensors"), format)
                manager.remove("lora")
                followed += 1
    assert followed > 20
