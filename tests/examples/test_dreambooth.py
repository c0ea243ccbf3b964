"""`examples/dreambooth`: what it trains, what it writes, how it resumes, and what it refuses."""

import importlib
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DDPMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from tests.support import models

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "dreambooth"

sys.path.append(str(EXAMPLE))
script = importlib.import_module("train_dreambooth")
args_module = importlib.import_module("dreambooth_args")
data = importlib.import_module("dreambooth_data")

WEIGHTS = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sd15")
    models.sd15().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three pictures, two of which have their own captions."""
    folder = tmp_path_factory.mktemp("pictures")
    for number, colour in enumerate(("red", "green", "blue")):
        picture = Image.new("RGB", (20, 16), colour)
        picture.paste("white", (0, 0, 4, 4))
        picture.save(folder / f"{number}.png")
    lines = [json.dumps({"file_name": f"{number}.png", "text": f"a {number}"}) for number in range(2)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> Iterator[None]:
    """Reset accelerate's settings, which are per process: each run here has to look like the first one."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def arguments(base: Path, pictures: Path, output: Path, **options: Any) -> Any:
    required = {
        "pretrained_model_name_or_path": str(base),
        "instance_data_dir": str(pictures),
        "output_dir": str(output),
    }
    small = {"instance_prompt": "a sks", "max_train_steps": 2, "train_batch_size": 2, "resolution": 16}
    return args_module.Arguments(**{**required, **small, **options})


def layers(file: Path) -> set[str]:
    """Return the paths of the layers for which a file in diffusers' format has tensors."""
    return {key.rsplit(".lora_", 1)[0] for key in load_file(file)}


def same_tensors(one: Path, other: Path) -> bool:
    """Return whether two files contain the same tensors; the order of the metadata in their headers is random."""
    ours, theirs = load_file(one), load_file(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_training_writes_a_file_that_changes_the_pipeline(base: Path, pictures: Path, tmp_path: Path) -> None:
    file = script.train(arguments(base, pictures, tmp_path, learning_rate=1e-2, save_precision="fp16"))
    assert file == tmp_path / WEIGHTS
    pipe = models.sd15()
    before = models.draw(pipe)
    report = pipe.load_adapter(file)
    assert report.unused == []
    assert report.types == {"lora": len(layers(file))}
    assert not torch.equal(models.draw(pipe), before)
    pipe.adapters.clear()
    assert torch.equal(models.draw(pipe), before)
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float16}
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata()["modelspec.trigger_phrase"] == "a sks"


@pytest.mark.parametrize("name", ["dora", "loha", "lokr", "oft", "boft"])
def test_other_adapter_types_are_trained(base: Path, pictures: Path, tmp_path: Path, name: str) -> None:
    options = {"learning_rate": 1e-1, "lora_layers": "all", "rank": 1, "block_size": 2}
    file = script.train(arguments(base, pictures, tmp_path, adapter_type=name, **options))
    pipe = models.sd15()
    before = models.draw(pipe)
    report = pipe.load_adapter(file)
    assert set(report.types) == {name}
    assert report.unused == []
    assert report.format == ("diffusers" if name == "dora" else "kohya")
    assert not torch.equal(models.draw(pipe), before)


def test_the_default_layers_are_those_of_attention(base: Path, pictures: Path, tmp_path: Path) -> None:
    found = layers(script.train(arguments(base, pictures, tmp_path, max_train_steps=1)))
    assert found
    assert all(path.startswith("unet.") for path in found)
    assert {path.rsplit(".attn", 1)[1][2:] for path in found} == {"to_q", "to_k", "to_v", "to_out.0"}


@pytest.mark.parametrize(
    ("wanted", "endings"),
    [("to_k, ff.net.2", {"to_k", "2"}), ("all-conv", {"conv", "conv1", "conv2", "conv_in", "conv_out"})],
)
def test_lora_layers_restricts_the_layers(
    base: Path, pictures: Path, tmp_path: Path, wanted: str, endings: set[str]
) -> None:
    found = layers(script.train(arguments(base, pictures, tmp_path, max_train_steps=1, lora_layers=wanted)))
    assert {path.rsplit(".", 1)[1] for path in found} >= endings
    assert any(path.endswith("to_q") for path in found) is False


def test_a_text_encoder_is_trained_and_saved_in_kohyas_format(base: Path, pictures: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"train_text_encoder": True, "text_encoder_lr": 1e-2, "save_format": "kohya"}
    file = script.train(arguments(base, pictures, tmp_path, lora_layers="all", **options))
    assert {key.split("_")[1] for key in load_file(file)} == {"unet", "te"}
    report = models.sd15().load_adapter(file)
    assert report.format == "kohya"
    assert report.unused == []
    trained = [tensor for key, tensor in load_file(file).items() if key.startswith("lora_te") and "up" in key]
    assert all(tensor.any() for tensor in trained)


def test_sdxl_is_trained_with_text_encoders_in_bfloat16(pictures: Path, tmp_path: Path) -> None:
    models.sdxl().save_pretrained(tmp_path / "sdxl")
    options: dict[str, Any] = {"train_text_encoder": True, "mixed_precision": "bf16", "caption_dropout": 0.5}
    options |= {"gradient_checkpointing": True, "validation_prompt": "a sks", "num_validation_images": 1}
    file = script.train(arguments(tmp_path / "sdxl", pictures, tmp_path / "out", **options))
    report = models.sdxl().load_adapter(file)
    assert set(report.components) == {"unet", "text_encoder", "text_encoder_2"}
    # Adapters are trained in float32, although the base computes in bfloat16.
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float32}
    assert (tmp_path / "out" / "validation-000002.png").is_file()


def test_checkpoints_are_kept_up_to_the_limit(base: Path, pictures: Path, tmp_path: Path) -> None:
    options = {"max_train_steps": 6, "checkpointing_steps": 2, "checkpoints_total_limit": 2}
    script.train(arguments(base, pictures, tmp_path, **options))
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-4", "checkpoint-6", WEIGHTS}
    contents = {path.name for path in (tmp_path / "checkpoint-6").iterdir()}
    assert "model.safetensors" not in contents
    models.sd15().load_adapter(tmp_path / "checkpoint-6", weight_name=WEIGHTS)
    models.sd15().load_adapter(tmp_path)


@pytest.mark.parametrize("explicit", [False, True])
def test_resuming_is_exact(base: Path, pictures: Path, tmp_path: Path, explicit: bool) -> None:
    # Use everything that draws random numbers or has a state, and a number of batches at which no epoch ends.
    options: dict[str, Any] = {
        "max_train_steps": 6,
        "checkpointing_steps": 3,
        "gradient_accumulation_steps": 2,
        "lora_dropout": 0.2,
        "random_flip": True,
        "caption_dropout": 0.3,
        "learning_rate": 1e-2,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 2,
        "train_text_encoder": explicit,
    }
    whole = script.train(arguments(base, pictures, tmp_path / "whole", **options))
    AcceleratorState._reset_state(reset_partial_state=True)
    resumed_dir = tmp_path / "resumed"
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", resumed_dir / "checkpoint-3")
    torch.manual_seed(99)
    source = str(resumed_dir / "checkpoint-3") if explicit else "latest"
    resumed = script.train(arguments(base, pictures, resumed_dir, resume_from_checkpoint=source, **options))
    assert same_tensors(resumed, whole)
    states = [
        {
            name: torch.load(folder / "checkpoint-6" / name, weights_only=False)
            for name in ("optimizer.bin", "scheduler.bin", "random_states_0.pkl")
        }
        for folder in (tmp_path / "whole", resumed_dir)
    ]
    assert flat(states[0]) == flat(states[1])


def flat(state: Any) -> Any:
    """Return a state with tensors and arrays as lists, which can be compared with ==."""
    if isinstance(state, dict):
        return {key: flat(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [flat(value) for value in state]
    return state.tolist() if hasattr(state, "tolist") else state


def test_resuming_from_latest_without_a_checkpoint_starts_over(base: Path, pictures: Path, tmp_path: Path) -> None:
    assert script.train(arguments(base, pictures, tmp_path, resume_from_checkpoint="latest")).is_file()


def test_resuming_with_another_rank_is_refused(base: Path, pictures: Path, tmp_path: Path) -> None:
    script.train(arguments(base, pictures, tmp_path, checkpointing_steps=1))
    AcceleratorState._reset_state(reset_partial_state=True)
    again = arguments(base, pictures, tmp_path, rank=8, resume_from_checkpoint="latest")
    with pytest.raises(data.UsageError, match="another rank"):
        script.train(again)


def test_prior_preservation_draws_the_missing_pictures(base: Path, pictures: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a dog\n\na cat\n")
    folder = tmp_path / "class"
    folder.mkdir()
    Image.new("RGB", (16, 16)).save(folder / "own.png")
    options: dict[str, Any] = {
        "with_prior_preservation": True,
        "class_data_dir": str(folder),
        "class_prompt": str(prompts),
        "num_class_images": 4,
        "cache_latents": True,
        "max_train_steps": 1,
    }
    script.train(arguments(base, pictures, tmp_path / "out", **options))
    drawn = sorted(folder.glob("class-*.png"))
    assert [path.name for path in drawn] == ["class-00000.png", "class-00001.png", "class-00002.png"]
    captions = {path.name: text for path, text in zip(drawn, ("a dog", "a cat", "a dog"), strict=True)}
    assert data.read_captions(folder) == captions
    times = [path.stat().st_mtime_ns for path in drawn]
    AcceleratorState._reset_state(reset_partial_state=True)
    script.train(arguments(base, pictures, tmp_path / "again", **options))
    assert [path.stat().st_mtime_ns for path in drawn] == times
    assert same_tensors(tmp_path / "out" / WEIGHTS, tmp_path / "again" / WEIGHTS)


def test_validation_writes_labelled_sheets(
    base: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[list[int]] = []

    def draw(_pipe: Any, _prompts: list[str], seeds: list[int], **_: Any) -> list[Image.Image]:
        drawn.append(seeds)
        return [Image.new("RGB", (16, 16), "red")]

    monkeypatch.setattr(script, "draw", draw)
    options: dict[str, Any] = {"validation_prompt": "a sks", "num_validation_images": 2, "validation_steps": 2}
    script.train(arguments(base, pictures, tmp_path, max_train_steps=3, **options))
    sheets = sorted(path.name for path in tmp_path.glob("*.png"))
    assert sheets == ["validation-000002.png", "validation-000003.png"]
    assert drawn == [[0], [1], [0], [1]]
    with Image.open(tmp_path / sheets[0]) as sheet:
        assert sheet.width > 2 * 160
        assert len({colour for _, colour in sheet.getcolors() or ()}) > 2


def test_a_diverged_run_stops_and_says_so(
    base: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = f"--instance_prompt sks --resolution 16 --learning_rate 1e30 --output_dir {tmp_path}"
    model = f"--pretrained_model_name_or_path {base} --instance_data_dir {pictures}"
    assert script.main([*model.split(), *options.split()]) == 1
    assert "--learning_rate" in capsys.readouterr().err
    assert not (tmp_path / WEIGHTS).exists()


def test_several_processes_train_one_adapter_together(base: Path, pictures: Path, tmp_path: Path) -> None:
    options = (
        f"--instance_prompt sks --resolution 16 --max_train_steps 2 --checkpointing_steps 2 --output_dir {tmp_path}"
    )
    model = f"--pretrained_model_name_or_path {base} --instance_data_dir {pictures} --train_text_encoder"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [*launch, str(EXAMPLE / "train_dreambooth.py"), *model.split(), *options.split()]
    subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=120)
    states = {path.name for path in (tmp_path / "checkpoint-2").glob("random_states_*")}
    assert states == {"random_states_0.pkl", "random_states_1.pkl"}
    assert set(models.sd15().load_adapter(tmp_path / WEIGHTS).components) == {"unet", "text_encoder"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"instance_data_dir": "nowhere"}, "nowhere is not a folder"),
        ({"instance_prompt": None}, "2.png has no caption"),
        ({"rank": 0}, "--rank must be at least 1"),
        ({"lora_dropout": 1.0}, "--lora_dropout must be in"),
        ({"snr_gamma": -1.0}, "--snr_gamma must be above 0, not -1.0"),
        ({"learning_rate": -1.0}, "--learning_rate must be above 0, not -1.0"),
        ({"learning_rate": float("nan")}, "--learning_rate must be above 0"),
        ({"resolution": 4}, "--resolution must be at least 8, not 4"),
        ({"adam_beta2": 1.0}, "--adam_beta2 must be in"),
        ({"prior_loss_weight": -0.5}, "--prior_loss_weight must be at least 0"),
        ({"lokr_factor": 0}, "--lokr_factor must be at least 1, or -1"),
        ({"with_prior_preservation": True}, "--class_data_dir and --class_prompt"),
        ({"class_prompt": "a dog"}, "no effect without --with_prior_preservation"),
        ({"text_encoder_lr": 1e-4}, "no effect without --train_text_encoder"),
        ({"checkpoints_total_limit": 0}, "leave it out"),
        ({"resume_from_checkpoint": "checkpoint-3"}, "checkpoint-3 is not a checkpoint"),
        ({"pretrained_model_name_or_path": "."}, "no model_index.json"),
    ],
)
def test_mistakes_are_found_before_a_model_is_loaded(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(script, "load_pipeline", lambda *_: pytest.fail("a model was loaded"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(data.UsageError, match=message):
        script.train(arguments(Path("org/model"), pictures, tmp_path, **options))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "line 1: expected"),
        ('{"file_name": "a.png", "text": null}', "line 1: expected"),
        ('{"file_name": "b.png", "text": "b"}', "there is no file b.png"),
    ],
)
def test_invalid_captions_are_refused(tmp_path: Path, content: str, message: str) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(content)
    with pytest.raises(data.UsageError, match=message):
        data.read_folder(tmp_path, "a")


def test_unreadable_pictures_and_empty_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(data.UsageError, match="holds no pictures"):
        data.read_folder(tmp_path, "a")
    (tmp_path / "a.png").write_text("not a picture")
    with pytest.raises(data.UsageError, match="cannot be read"):
        data.read_folder(tmp_path, "a")


def test_batches_show_every_picture_once_per_epoch_and_split_over_processes() -> None:
    sizes = (3, 5)
    everything = data.EndlessBatches(sizes, 2, seed=1, flip=True, caption_dropout=0.5)
    batches = list(itertools.islice(everything, 15))
    own = [draw.picture for batch in batches for draw in batch if draw.picture < 3]
    assert all(sorted(own[first : first + 3]) == [0, 1, 2] for first in range(0, 30, 3))
    prior = [draw.picture for batch in batches for draw in batch if draw.picture >= 3]
    assert all(sorted(prior[first : first + 5]) == [3, 4, 5, 6, 7] for first in range(0, 30, 5))
    assert {draw.flip for batch in batches for draw in batch} == {False, True}
    assert {draw.drop_caption for batch in batches for draw in batch} == {False, True}
    shares = [
        list(itertools.islice(data.EndlessBatches(sizes, 2, seed=1, flip=True, caption_dropout=0.5, **turn), 5))
        for turn in ({"first": 5, "stride": 2}, {"first": 6, "stride": 2})
    ]
    assert shares == [batches[5:15:2], batches[6:15:2]]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("gamma", [None, 5.0])
def test_the_loss_is_that_of_the_prediction_type(
    base: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch, prediction_type: str, gamma: float | None
) -> None:
    """A prediction that is off by 1 everywhere costs its weight, and nothing else."""
    pipe = models.sd15()
    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config, prediction_type=prediction_type)
    args = arguments(base, pictures, Path("unused"), snr_gamma=gamma)
    objective = script.Objective(args, pipe, script.add_adapters(args, pipe), 16)
    clean = torch.randn(4, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    moments = torch.cat([clean, torch.full_like(clean, -30)], dim=1)  # Almost no variance.
    weights: list[Tensor] = []

    def predict(noisy: Tensor, timesteps: Tensor, _captions: list[str]) -> Tensor:
        alpha = objective.schedule.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        latents = clean * pipe.vae.config.scaling_factor
        noise = (noisy - alpha.sqrt() * latents) / (1 - alpha).sqrt()
        snr = (alpha / (1 - alpha)).flatten()
        capped = snr if gamma is None else snr.clamp(max=gamma)
        if prediction_type == "epsilon":
            weights.append(capped / snr)
            return noise + 1
        weights.append(torch.ones(4) if gamma is None else capped / (snr + 1))
        return alpha.sqrt() * noise - (1 - alpha).sqrt() * latents + 1

    monkeypatch.setattr(objective, "_predict", predict)
    loss = objective(moments, ["a"] * 4)
    torch.testing.assert_close(loss, weights[0].mean(), rtol=1e-3, atol=1e-3)


def test_the_second_half_of_a_batch_is_weighted_as_prior(
    base: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = models.sd15()
    options: dict[str, Any] = {"with_prior_preservation": True, "prior_loss_weight": 0.25}
    args = arguments(base, pictures, Path("unused"), **options)
    objective = script.Objective(args, pipe, script.add_adapters(args, pipe), 16)
    moments = torch.cat([torch.zeros(4, 4, 2, 2), torch.full((4, 4, 2, 2), -30.0)], dim=1)
    noises: list[Tensor] = []

    def predict(noisy: Tensor, timesteps: Tensor, _captions: list[str]) -> Tensor:
        noise = noisy / (1 - objective.schedule.alphas_cumprod[timesteps]).sqrt().view(-1, 1, 1, 1)
        noises.append(noise)
        return noise + torch.tensor([1.0, 1.0, 2.0, 2.0]).view(-1, 1, 1, 1)

    monkeypatch.setattr(objective, "_predict", predict)
    torch.testing.assert_close(objective(moments, ["a"] * 4), torch.tensor(1 + 0.25 * 4), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_an_empty_caption_is_encoded_as_the_pipeline_does_without_a_prompt(family: str) -> None:
    pipe = models.FAMILIES[family]()
    assert isinstance(pipe, (StableDiffusionPipeline, StableDiffusionXLPipeline))
    with torch.no_grad():
        hidden, _ = script.encode_captions(pipe, ["", "a photo"], torch.device("cpu"))
        prompt, negative, *_ = pipe.encode_prompt(
            "a photo", device=torch.device("cpu"), num_images_per_prompt=1, do_classifier_free_guidance=True
        )
    torch.testing.assert_close(hidden, torch.cat([negative, prompt]))
