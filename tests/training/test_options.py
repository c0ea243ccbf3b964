"""One set of options: config files, the command line and Python; and what is refused before a model is loaded."""

import argparse
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import diffadapt
from diffadapt import TrainingOptions, UsageError
from diffadapt.training import run
from diffadapt.training.option_sources import add_options, options_from
from diffadapt.training.options import FolderOptions
from tests.support.cases import for_each


def parsed(*argv: str, config: Path | None = None) -> TrainingOptions:
    parser = argparse.ArgumentParser()
    add_options(parser)
    return options_from(config, vars(parser.parse_args(argv)))


CONFIG = """
pretrained_model_name_or_path = "org/model"
rank = 8
[data]
instance_data_dir = "pictures"
random_flip = true
[[folders]]
path = "more"
repeats = 3
[optimizer_args]
betas = [0.9, 0.99]
[output]
output_dir = "out"
learning_rate = 1
"""


def test_a_config_file_and_the_command_line_make_the_same_options(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text(CONFIG)
    options = parsed("--rank", "16", "--random_flip", "false", "--min_snr_gamma", "5", config=config)
    assert (options.rank, options.random_flip, options.snr_gamma, options.learning_rate) == (16, False, 5.0, 1.0)
    assert options.pretrained_model_name_or_path == "org/model"
    # Paths in a file are relative to its folder.
    assert (options.instance_data_dir, options.output_dir) == (str(tmp_path / "pictures"), str(tmp_path / "out"))
    assert [folder.path for folder in options.folder_options] == [str(tmp_path / "pictures"), str(tmp_path / "more")]
    assert options.optimizer_args == {"betas": [0.9, 0.99]}
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert parsed(config=config).pretrained_model_name_or_path == str(tmp_path / "org" / "model")


def test_folders_in_python_are_paths_tables_or_objects() -> None:
    given: list[Any] = [Path("a"), "b", {"path": "c", "repeats": 2}, FolderOptions(path="d")]
    options = TrainingOptions(folders=given)
    assert [(folder.path, folder.repeats) for folder in options.folders] == [
        ("a", 1),
        ("b", 1),
        ("c", 2),
        ("d", 1),
    ]


def test_lists_and_tables_can_be_given_on_the_command_line() -> None:
    options = parsed(
        *("--folders", '{path = "a", repeats = 2}', "b"),
        *("--optimizer_args", "betas=0.9,0.99", "decouple=True", "name=x", "eps=1e-5"),
        *("--accept_changes", "seed", "rank"),
    )
    assert [(folder.path, folder.repeats) for folder in options.folders] == [("a", 2), ("b", 1)]
    assert options.optimizer_args == {"betas": [0.9, 0.99], "decouple": True, "name": "x", "eps": 1e-5}
    assert options.accept_changes == ["seed", "rank"]
    assert TrainingOptions() == parsed()


@for_each(
    case=[
        ("ranks = 8", r"there is no option ranks; did you mean rank\?"),
        ("rank = 'a'", "rank is 'a', expected a whole number"),
        ("rank = true", "rank is True, expected a whole number"),
        ("random_flip = 1", "random_flip is 1, expected true or false"),
        ("lr_scheduler = 'sine'", "lr_scheduler is 'sine', expected one of constant,"),
        ("folders = ['a']", "folders has to be a list of tables, each with a path"),
        ("[[folders]]\npath = 'a'\nrepeat = 2", "a folder has no option repeat"),
        ("rank = 1\n[adapter]\nrank = 2", "sets rank twice"),
        ("rank =", "is not a TOML file"),
    ]
)
def test_mistakes_in_a_config_file_are_named(tmp_path: Path, case: tuple[str, str]) -> None:
    config = tmp_path / "config.toml"
    config.write_text(case[0])
    with pytest.raises(UsageError, match=case[1]):
        parsed(config=config)


def test_a_missing_config_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere\.toml: the config file cannot be read"):
        parsed(config=tmp_path / "nowhere.toml")


@for_each(
    case=[
        ({"pretrained_model_name_or_path": ""}, "--pretrained_model_name_or_path is missing"),
        ({"instance_data_dir": None}, "--instance_data_dir is missing"),
        ({"instance_data_dir": "nowhere"}, "nowhere is not a folder"),
        ({"instance_prompt": None}, "0.png has no caption"),
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
        ({"with_prior_preservation": True, "prior_source": "base"}, "needs --class_prompt"),
        ({"class_prompt": "a dog"}, "no effect without --with_prior_preservation"),
        ({"text_encoder_lr": 1e-4}, "no effect without --train_text_encoder"),
        ({"checkpoints_total_limit": 0}, "leave it out"),
        ({"resume_from_checkpoint": "checkpoint-3"}, "checkpoint-3 is not a checkpoint"),
        ({"pretrained_model_name_or_path": "."}, "no model_index.json"),
        ({"adapter_type": "lorra"}, "--adapter_type lorra is unknown; use one of .*lora"),
        ({"adapter_args": {"ranks": 2}}, "lora has no ranks; it takes"),
        ({"adapter_type": "oft", "lora_alpha": 1.0}, "--lora_alpha has no effect with --adapter_type oft"),
        ({"adapter_type": "loha", "save_format": "diffusers"}, "cannot hold --adapter_type loha"),
        ({"optimizer": "adamww"}, "--optimizer adamww is unknown"),
        ({"optimizer": "nowhere.Adam"}, "needs the package nowhere: pip install nowhere"),
        ({"optimizer": "lion", "adam_beta1": 0.5}, "--adam_beta1 has no effect with --optimizer lion"),
        ({"optimizer": "prodigy"}, "pass --learning_rate 1.0, not 0.0001"),
        ({"optimizer": "schedulefree", "lr_scheduler": "cosine"}, "pass --lr_scheduler constant"),
        ({"random_crop": True, "cache_latents": True}, "every crop has other latents"),
        ({"masked_loss": True}, "no picture has an alpha channel, or a mask"),
        ({"keep_tags": 1}, "no effect without --shuffle_tags"),
        ({"logit_mean": 1.0}, "no effect without --timestep_sampling logit_normal"),
        ({"min_noise": 0.5, "max_noise": 0.5}, "must be below --max_noise"),
        ({"background": "reddish"}, "'reddish' is no colour"),
        ({"held_out_pictures": 2}, "there are only 2 pictures"),
        ({"report_to": "nowhere"}, "needs the package nowhere"),
        ({"init_adapter": "nowhere.safetensors"}, "there is no file nowhere.safetensors"),
        ({"rank": "8"}, "rank is '8', expected a whole number"),
        ({"rank": None}, "rank is None, expected a whole number"),
        ({"learning_rate": "1e-4"}, "learning_rate is '1e-4', expected a number"),
        ({"random_flip": 1}, "random_flip is 1, expected true or false"),
        ({"lr_scheduler": "sine"}, "lr_scheduler is 'sine', expected one of constant,"),
        ({"base_precision": "fp9"}, "base_precision is 'fp9', expected one of full,"),
        ({"folders": ["nowhere"], "instance_data_dir": None}, "nowhere is not a folder"),
        ({"output_dir": ""}, "--output_dir is missing"),
        (
            {"output_dir": "pictures/0.png/out"},
            r"--output_dir pictures/0.png/out cannot be a folder: .*0\.png is a file",
        ),
        ({"cache_dir": "pictures/0.png"}, "--cache_dir .* cannot be a folder"),
        ({"lora_layers": " , "}, "--lora_layers names no layers"),
        ({"lr_num_cycles": 3}, "no effect without --lr_scheduler cosine_with_restarts"),
        ({"lr_power": 2.0}, "no effect without --lr_scheduler polynomial"),
        ({"snr_gamma": 5.0, "loss_weighting": "debiased"}, "no effect with --loss_weighting debiased"),
        ({"prior_source": "base"}, "--prior_source has no effect without --with_prior_preservation"),
        ({"num_class_images": 5}, "--num_class_images has no effect without --with_prior_preservation"),
    ]
)
def test_mistakes_are_found_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: tuple[dict[str, Any], str]
) -> None:
    monkeypatch.setattr(run, "BaseModel", lambda *_: pytest.fail("a model was loaded"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    for number in range(2):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / "pictures" / f"{number}.png")
    usual = {"pretrained_model_name_or_path": "org/model", "instance_data_dir": "pictures", "instance_prompt": "a"}
    with pytest.raises(UsageError, match=case[1]):
        diffadapt.train(TrainingOptions(**{**usual, **case[0]}))
