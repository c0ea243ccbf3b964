"""Forms of the base model: a single file instead of a folder, compiled blocks; and set-ups that are refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import save_file
from torch._dynamo.testing import CompileCounterWithBackend

from diffadapt import UsageError
from tests.support import models
from tests.support.original_layout import single_file_of
from tests.support.training import largest_difference, same_tensors, train, write_pictures

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sd15") / "base"
    pipe = models.sd15()
    pipe.save_pretrained(folder)
    save_file(single_file_of(pipe), folder.parent / "base.safetensors")
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"))


def test_a_single_file_trains_as_the_folder_with_the_same_weights(base: Path, pictures: Path, tmp_path: Path) -> None:
    expected = train(base, pictures, tmp_path / "folder")
    file = base.with_suffix(".safetensors")
    found = train(file, pictures, tmp_path / "file", single_file_config=str(base), cache_latents=True)
    # Tensors of the file lie elsewhere in memory, which changes the last bit of a product.
    assert largest_difference(expected, found) < 1e-5
    assert not same_tensors(found, train(base, pictures, tmp_path / "other", learning_rate=1e-3))


def test_a_single_file_that_is_no_base_is_refused_with_its_name(base: Path, pictures: Path, tmp_path: Path) -> None:
    file = base.with_suffix(".safetensors")
    with pytest.raises(UsageError, match=r"base\.safetensors is a single file.*--base_precision nf4 needs a saved|nf4"):
        train(file, pictures, tmp_path, single_file_config=str(base), base_precision="nf4")
    (tmp_path / "text.safetensors").write_text("a text of several words")
    with pytest.raises(UsageError, match=r"text\.safetensors cannot be loaded as a pipeline"):
        train(tmp_path / "text.safetensors", pictures, tmp_path / "out", single_file_config=str(base))
    with pytest.raises(UsageError, match=r"nothing\.safetensors"):
        train(tmp_path / "nothing.safetensors", pictures, tmp_path / "out", single_file_config=str(base))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo's own
def test_compiled_blocks_train_the_same_and_compile_once_for_all_buckets_and_steps(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block is compiled for its first shape and once more for any shape; further buckets and steps add nothing."""
    for number, size in enumerate([(32, 32), (48, 24), (24, 48), (64, 16), (16, 64)]):
        Image.new("RGB", size, (40 * number, 90, 160)).save(tmp_path / f"{number}.png")
    counter = CompileCounterWithBackend("aot_eager")
    compile_blocks = UNet2DConditionModel.compile_repeated_blocks

    def counted(model: Any, **options: Any) -> None:
        compile_blocks(model, **options, backend=counter)

    monkeypatch.setattr(UNet2DConditionModel, "compile_repeated_blocks", counted)
    further = {"aspect_ratio_buckets": True, "allow_upscaling": True, "train_batch_size": 1, "resolution": 32}
    few = train(base, tmp_path, tmp_path / "few", compile=True, max_train_steps=5, **further)
    graphs = counter.frame_count
    assert graphs > 0
    assert largest_difference(few, train(base, tmp_path, tmp_path / "plain", max_train_steps=5, **further)) < 1e-4
    torch._dynamo.reset()
    counter.frame_count = 0
    train(base, tmp_path, tmp_path / "many", compile=True, max_train_steps=15, rank=8, **further)
    assert counter.frame_count == graphs


def test_deepspeed_is_refused_with_the_reason(
    base: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UsageError, match=r"DeepSpeed.*hardly any optimiser state.*FSDP"):
        train(base, pictures, tmp_path / "out")
    assert not (tmp_path / "out").exists()
