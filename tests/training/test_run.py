"""Whole runs on small pipelines: what is trained and written, and what makes no difference."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import diffadapt
from diffadapt import UsageError
from diffadapt.cli import main
from diffadapt.training import loop, objective, run
from tests.support import models
from tests.support.cases import for_each
from tests.support.tiny_pipelines import tiny
from tests.support.training import WEIGHTS, largest_difference, options, same_tensors, train, write_pictures
from tests.support.versions import imported

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sd15")
    models.sd15().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"))


def layers(file: Path) -> set[str]:
    """Return the paths of the layers for which a file in diffusers' format has tensors."""
    return {key.rsplit(".lora_", 1)[0] for key in load_file(file)}


def test_a_run_writes_a_file_that_changes_the_pipeline(base: Path, pictures: Path, tmp_path: Path) -> None:
    further = {
        "save_precision": "fp16",
        "trigger_word": "sks",
        "validation_prompt": "a sks",
        "num_validation_images": 2,
    }
    torch.manual_seed(7)
    state = torch.get_rng_state()
    file = train(base, pictures, tmp_path, held_out_pictures=1, validation_steps=2, max_train_steps=3, **further)
    assert torch.equal(torch.get_rng_state(), state)
    assert file == tmp_path / WEIGHTS
    pipe = models.sd15()
    before = models.draw(pipe)
    report = pipe.load_adapter(file)
    assert report.unused == []
    assert report.types == {"lora": len(layers(file))}
    # The default layers are those of attention.
    assert {path.rsplit(".attn", 1)[1][2:] for path in layers(file)} == {"to_q", "to_k", "to_v", "to_out.0"}
    assert not torch.equal(models.draw(pipe), before)
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float16}
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    assert metadata["modelspec.trigger_phrase"] == "sks"
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert metadata["modelspec.thumbnail"].startswith("data:image/jpeg;base64,")
    assert (metadata["ss_steps"], metadata["ss_network_dim"], metadata["ss_base_model_version"]) == ("3", "4", "sd_v1")
    assert json.loads(metadata["ss_tag_frequency"]) == {f"1_{pictures.name}": {"a sks": 2}}
    assert (
        'load_adapter("' in (tmp_path / "README.md").read_text()
        or "load_adapter('" in (tmp_path / "README.md").read_text()
    )
    sheets = sorted(path.name for path in tmp_path.glob("validation-*.png"))
    assert sheets == ["validation-000000.png", "validation-000002.png", "validation-000003.png"]


def test_caches_workers_and_the_text_cache_make_no_difference(
    base: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "time", SimpleNamespace(time=lambda: 1.6e9))
    usual: dict[str, Any] = {"random_flip": True, "caption_dropout": 0.3, "max_train_steps": 3}
    whole = train(base, pictures, tmp_path / "whole", **usual)
    for name, further in {
        "cached": {"cache_latents": True},
        "warm": {"cache_latents": True, "cache_dir": str(tmp_path / "cached" / "cache"), "cache_text": False},
        "workers": {"dataloader_num_workers": 2},
        "recomputed": {"gradient_checkpointing": True},
    }.items():
        assert same_tensors(train(base, pictures, tmp_path / name, **usual, **further), whole), name
    # A file has the name of its folder, and the time when its run began.
    again = train(base, pictures, tmp_path / "again" / "whole", **usual)
    assert again.read_bytes() == whole.read_bytes()
    accumulated = {"train_batch_size": 1, "gradient_accumulation_steps": 2}
    assert largest_difference(train(base, pictures, tmp_path / "accumulated", **{**usual, **accumulated}), whole) < 5e-5
    assert not same_tensors(train(base, pictures, tmp_path / "other", **usual, seed=1), whole)


def test_a_cache_is_not_used_for_another_picture_or_vae(base: Path, tmp_path: Path) -> None:
    pictures = write_pictures(tmp_path / "pictures")
    cache = {"cache_latents": True, "cache_dir": str(tmp_path / "cache")}
    first = train(base, pictures, tmp_path / "first", **cache)
    Image.new("RGB", (16, 16), "yellow").save(pictures / "0.png")
    stale = train(base, pictures, tmp_path / "second", **cache)
    assert same_tensors(stale, train(base, pictures, tmp_path / "third"))
    assert not same_tensors(stale, first)
    pipe = models.sd15()
    with torch.no_grad():
        pipe.vae.encoder.conv_in.weight[0, 0, 0, 0] += 0.5
        pipe.text_encoder.get_input_embeddings().weight[0] += 0.5
    pipe.save_pretrained(tmp_path / "other")
    changed = train(tmp_path / "other", pictures, tmp_path / "fourth", **cache)
    assert same_tensors(changed, train(tmp_path / "other", pictures, tmp_path / "fifth", cache_text=False))
    # A damaged file is made again.
    for file in (tmp_path / "cache" / "latents").iterdir():
        file.write_bytes(file.read_bytes()[:50])
    assert same_tensors(train(base, pictures, tmp_path / "sixth", **cache), stale)


def test_the_base_is_never_in_training_mode(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = models.sd15()
    seen: list[tuple[set[bool], set[bool]]] = []
    step = loop.Loop._step

    def spy(self: Any, batches: Any) -> float:
        parts = (pipe.unet, pipe.text_encoder, pipe.vae)
        adapters = [module for adapter in self.adapters.values() for module in adapter.modules()]
        own = {id(module) for module in adapters}
        base = {
            module.training
            for part in parts
            for module in part.modules()
            if id(module) not in own and module._modules.keys() != {"dreambooth"}
        }
        seen.append((base, {module.training for module in adapters}))
        return step(self, batches)

    monkeypatch.setattr(loop.Loop, "_step", spy)
    pipe.unet.train()
    train(
        "unused",
        pictures,
        tmp_path,
        pipe,
        lora_dropout=0.1,
        train_text_encoder=True,
        validation_prompt="a sks",
        validation_steps=1,
    )
    assert seen == [({False}, {True})] * 2
    assert pipe.adapters.names == ["dreambooth"]


@for_each(kind=["dora", "lokr", "oft", "ia3", "full", "hra"])
def test_every_adapter_type_is_trained_and_saved(base: Path, pictures: Path, tmp_path: Path, kind: str) -> None:
    further = {"learning_rate": 1e-1, "rank": 2, "block_size": 2, "lora_layers": "attention"}
    file = train(base, pictures, tmp_path, adapter_type=kind, **further)
    pipe = models.sd15()
    before = models.draw(pipe)
    report = pipe.load_adapter(file.parent if file.name.startswith("adapter") else file)
    assert set(report.types) == {kind}
    assert report.unused == []
    assert not torch.equal(models.draw(pipe), before)


def test_a_run_can_continue_any_adapter_file(base: Path, pictures: Path, tmp_path: Path) -> None:
    first = train(base, pictures, tmp_path / "first", save_format="kohya", train_text_encoder=True)
    further: dict[str, Any] = {"train_text_encoder": True, "save_format": "kohya", "init_adapter": str(first)}
    still = train(base, pictures, tmp_path / "still", **further, learning_rate=1e-30, adam_weight_decay=0.0)
    assert same_tensors(still, first)
    moved = train(base, pictures, tmp_path / "moved", **further, adam_weight_decay=0.0)
    assert not same_tensors(moved, first)
    with pytest.raises(UsageError, match="has layers of text_encoder, which would be lost: pass --train_text_encoder"):
        train(base, pictures, tmp_path / "lost", init_adapter=str(first))


def test_a_distilled_model_is_trained_with_a_helper_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = write_pictures(tmp_path / "pictures", side=32)
    further: dict[str, Any] = {"resolution": 32, "validation_prompt": "a sks", "num_validation_images": 1}
    with pytest.raises(UsageError, match=r"distilled.*--helper_adapter"):
        train("unused", pictures, tmp_path / "refused", tiny("flux-schnell"), **further)
    pipe = tiny("flux-schnell")
    settings = diffadapt.LoraConfig(rank=2, target_modules=["to_q", "to_v"], init=False)
    diffadapt.add_adapter(pipe.transformer, settings, "own")
    helper = pipe.adapters.save("own", tmp_path / "helper.safetensors")
    pipe.adapters.clear()
    seen: list[list[str]] = []
    errors = objective.Objective.errors

    def spy(self: Any, *arguments: Any) -> Any:
        seen.append(list(pipe.adapters.active))
        return errors(self, *arguments)

    monkeypatch.setattr(objective.Objective, "errors", spy)
    file = train("unused", pictures, tmp_path / "out", pipe, **further, helper_adapter=str(helper))
    assert all(set(active) == {"dreambooth", "training-helper"} for active in seen)
    assert len(seen) == 2
    # The result is without the helper: another pipeline draws with the file as this one, which has only the adapter.
    assert pipe.adapters.names == ["dreambooth"]
    again = tiny("flux-schnell")
    assert again.load_adapter(file).unused == []
    tensors = [dict(p.adapters["dreambooth" if p is pipe else file.stem].components) for p in (pipe, again)]
    assert [set(found) for found in tensors] == [{"transformer"}] * 2


def test_new_words_are_learned_and_loaded_again(base: Path, pictures: Path, tmp_path: Path) -> None:
    words: dict[str, Any] = {"new_words": {"<dog>": 2}, "instance_prompt": "a <dog>", "token_lr": 0.1}
    file = train(base, pictures, tmp_path, **words, save_format="kohya")
    pipe = models.sd15()
    report = pipe.load_adapter(file)
    assert report.unused == []
    assert "<dog>" in str(report.tokens)
    learned = [tensor for name, tensor in load_file(file).items() if "<dog>" in name]
    assert learned
    assert all(tensor.isfinite().all() for tensor in learned)


def test_the_class_is_preserved_by_pictures_or_by_the_base(base: Path, pictures: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a dog\n\na cat\n")
    folder = tmp_path / "class"
    folder.mkdir()
    Image.new("RGB", (16, 16)).save(folder / "own.png")
    usual = {"with_prior_preservation": True, "class_prompt": str(prompts)}
    by_pictures = {"class_data_dir": str(folder), "num_class_images": 4, "cache_latents": True}
    file = train(base, pictures, tmp_path / "out", **usual, **by_pictures)
    drawn = sorted(folder.glob("class-*.png"))
    assert [path.name for path in drawn] == ["class-00000.png", "class-00001.png", "class-00002.png"]
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert [entry["text"] for entry in lines] == ["a dog", "a cat", "a dog"]
    times = [path.stat().st_mtime_ns for path in drawn]
    assert same_tensors(train(base, pictures, tmp_path / "again", **usual, **by_pictures), file)
    assert [path.stat().st_mtime_ns for path in drawn] == times
    kept = train(base, pictures, tmp_path / "kept", **usual, prior_source="base", prior_loss_weight=5.0)
    plain = train(base, pictures, tmp_path / "plain")
    assert not same_tensors(kept, plain)
    # An adapter that is only held to the base stays without effect.
    idle = train(
        base, pictures, tmp_path / "idle", **usual, prior_source="base", instance_data_dir=None,
        folders=[{"path": str(pictures), "weight": 0.0}], adam_weight_decay=0.0,
    )  # fmt: skip
    assert all(not tensor.any() for name, tensor in load_file(idle).items() if name.endswith("lora_B.weight"))


def test_pictures_of_several_sizes_are_trained_in_buckets(base: Path, tmp_path: Path) -> None:
    pictures = write_pictures(tmp_path / "pictures", side=16)
    Image.new("RGB", (64, 16), "red").save(pictures / "wide.png")
    Image.new("RGB", (16, 64), "blue").save(pictures / "high.png")
    buckets = {"aspect_ratio_buckets": True, "max_train_steps": 4}
    one = train(base, pictures, tmp_path / "one", **buckets, resolution=32)
    assert same_tensors(train(base, pictures, tmp_path / "two", **buckets, resolution=32, cache_latents=True), one)


def test_a_dry_run_reports_and_trains_nothing(base: Path, pictures: Path, tmp_path: Path) -> None:
    sheet = train(base, pictures, tmp_path, dry_run=True)
    assert {path.name for path in tmp_path.iterdir()} == {"data.txt", "contact-sheet.png"}
    with Image.open(sheet) as opened:
        assert opened.width > 3 * 160
    assert "3 pictures" in (tmp_path / "data.txt").read_text()


def test_the_command_trains_from_a_config(
    base: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = train(base, pictures, tmp_path / "whole", rank=2)
    config = tmp_path / "config.toml"
    chosen = options(base, pictures, tmp_path / "command", rank=3)
    lines = [
        f"{name} = {json.dumps(value)}"
        for name, value in vars(chosen).items()
        if value is not None and value not in ([], {})
    ]
    config.write_text("\n".join(lines))
    assert main(["train", str(config), "--rank", "2"]) == 0
    assert same_tensors(tmp_path / "command" / WEIGHTS, whole)
    assert main(["train", str(config), "--instance_data_dir", str(tmp_path / "nowhere")]) == 1
    assert "nowhere is not a folder" in capsys.readouterr().err


@for_each(
    case=[
        ("nf4", {"adapter_type": "lora"}),
        ("int8", {"adapter_type": "dora"}),
        ("fp8", {"adapter_type": "lora", "gradient_checkpointing": True}),
    ]
)
def test_a_quantised_base_is_trained(
    base: Path, pictures: Path, tmp_path: Path, case: tuple[str, dict[str, Any]]
) -> None:
    precision, further = case
    if precision != "fp8":
        imported("bitsandbytes")
    file = train(base, pictures, tmp_path, base_precision=precision, mixed_precision="bf16", **further)
    tensors = load_file(file)
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert any(tensor.any() for name, tensor in tensors.items() if name.endswith("lora_B.weight"))
    pipe = models.sd15()
    assert isinstance(pipe, StableDiffusionPipeline)
    assert pipe.load_adapter(file).unused == []


def test_sdxl_is_trained_with_its_text_encoders_in_bfloat16(pictures: Path, tmp_path: Path) -> None:
    models.sdxl().save_pretrained(tmp_path / "sdxl")
    further: dict[str, Any] = {"train_text_encoder": True, "mixed_precision": "bf16", "caption_dropout": 0.5}
    further |= {"gradient_checkpointing": True, "validation_prompt": "a sks", "num_validation_images": 1}
    file = train(tmp_path / "sdxl", pictures, tmp_path / "out", **further)
    assert set(models.sdxl().load_adapter(file).components) == {"unet", "text_encoder", "text_encoder_2"}
    # Adapters are trained in float32, although the base computes in bfloat16.
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float32}
    assert (tmp_path / "out" / "validation-000002.png").is_file()


def test_layers_that_do_not_exist_are_named(base: Path, pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"unet: .*to_nothing"):
        train(base, pictures, tmp_path, lora_layers="to_q, to_nothing")
    with pytest.raises(diffadapt.AdapterError, match=r"cannot be loaded as a pipeline|is not a saved pipeline"):
        train(tmp_path / "nowhere", pictures, tmp_path)
