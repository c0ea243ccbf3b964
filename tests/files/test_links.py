"""Links to the hub and paths of files in repositories, and links that lead elsewhere."""

from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import errors as hub_errors
from torch import nn

import diffadapt
import diffadapt.files.hub
from diffadapt import AdapterError
from diffadapt.files.checkpoint import Location
from diffadapt.files.links import taken_apart
from diffadapt.files.read import read
from tests.support import files, loras, models, spellings

HUB = "https://huggingface.co/someone/styles"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("someone/styles", (None, None, None)),
        ("someone/styles/ink.safetensors", ("ink.safetensors", None, None)),
        ("someone/styles/v1.5/sub/ink.safetensors", ("ink.safetensors", "v1.5/sub", None)),
        (HUB, (None, None, None)),
        (f"{HUB}/", (None, None, None)),
        (f"{HUB}/tree/main", (None, None, "main")),
        (f"{HUB}/tree/main/sub", (None, "sub", "main")),
        (f"{HUB}/blob/main/ink.safetensors", ("ink.safetensors", None, "main")),
        (f"{HUB}/resolve/v2/sub/my%20ink.safetensors?download=true", ("my ink.safetensors", "sub", "v2")),
        (f"{HUB}/blob/refs/pr/3/ink.safetensors", ("ink.safetensors", None, "refs/pr/3")),
        ("huggingface.co/someone/styles/blob/main/ink.safetensors", ("ink.safetensors", None, "main")),
        ("https://hf.co/someone/styles/blob/main/ink.safetensors", ("ink.safetensors", None, "main")),
        ("hf://someone/styles@v2/ink.safetensors", ("ink.safetensors", None, "v2")),
    ],
)
def test_a_link_is_taken_apart(text: str, expected: tuple[str | None, ...]) -> None:
    repo, location = taken_apart(text, Location(token="secret"))
    assert (repo, location) == ("someone/styles", Location(*expected, token="secret"))


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("https://civitai.com/api/download/models/1", {}, r"a link, expected .* download it first"),
        ("https://example.com/ink.safetensors", {}, "download it first"),
        ("https://huggingface.co/someone", {}, "leads to no model repository"),
        ("https://huggingface.co/datasets/someone/styles", {}, "leads to no model repository"),
        (f"{HUB}/discussions/3", {}, "leads to no file"),
        (f"{HUB}/blob/main/ink.safetensors", {"revision": "v2"}, "contradicts revision='v2'|says revision 'main'"),
        (f"{HUB}/blob/main/ink.safetensors", {"weight_name": "other.safetensors"}, "contradicts .*other.safetensors"),
        (f"{HUB}/blob/main/a/ink.safetensors", {"subfolder": "b"}, "contradicts subfolder='b'"),
    ],
)
def test_other_links_are_refused(text: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        read(text, Location(**options))


def test_the_name_of_a_missing_file_is_not_looked_up_on_the_hub(tmp_path: Path, monkeypatch: Any) -> None:
    def download(*args: Any, **options: Any) -> str:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(diffadapt.files.hub, "_download", download)
    monkeypatch.chdir(tmp_path)
    Path("loras/a").mkdir(parents=True)
    for name in ("ink.safetensors", "loras/pixel.safetensors"):
        Path(name).touch()
    for text, message in {
        "ikn.safetensors": "ikn.safetensors: no such file; did you mean ink.safetensors",
        "loras/pixle.safetensors": "no such file; did you mean loras/pixel.safetensors",
        str(tmp_path / "ikn.safetensors"): "no such file; did you mean .*/ink.safetensors",
        "loras/a/ink.safetensors": "no such file; .*loras/a has no file of that name",
        "nowhere/ink.safetensors": "no such file; there is no folder nowhere either",
    }.items():
        with pytest.raises(AdapterError, match=message):
            read(text)


@pytest.mark.parametrize("config", [True, False])
def test_a_file_of_peft_comes_with_its_config(config: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {"": {"0": loras.factors_for({"0": nn.Linear(8, 8)})["0"]}}
    file = files.write(tmp_path / "adapter_model.safetensors", spellings.peft_names(parts))
    asked: list[str] = []

    def download(repo: str, filename: str, **options: Any) -> str:
        asked.append(filename)
        if filename.endswith("json"):
            if not config:
                raise hub_errors.EntryNotFoundError("404")
            (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 16, "r": 4}')
        return str(tmp_path / Path(filename).name)

    monkeypatch.setattr(diffadapt.files.hub, "hf_hub_download", download)
    found = read("someone/my.styles/sub/adapter_model.safetensors")
    assert asked == ["sub/adapter_config.json", "sub/adapter_model.safetensors"]
    assert (found.header.config is not None) == config
    assert (found.name, Path(found.origin).name) == ("my.styles", file.name)


# Names of adapters


@pytest.mark.parametrize("name", ["style_v1.5", "a b.c", "50%.2E", "Ünï 画.風", "reserved.slots", "v1..2."])
def test_an_adapter_has_the_name_of_its_file(name: str, tmp_path: Path) -> None:
    pipe = models.sd15()
    file = files.write(tmp_path / f"{name}.safetensors", spellings.peft_names(loras.parts_for(pipe)))
    assert pipe.load_adapter(file).name == name
    pipe.load_adapter(file, "other", activate=False)
    assert pipe.adapters.names == [name, "other"]
    pipe.adapters.prepare_hotswap(slots=2)
    prompt, strengths = diffadapt.parse_prompt(f"a fox <lora:{name}:0.4>")
    pipe.adapters.activate(strengths)
    assert (prompt, pipe.adapters.active) == ("a fox", {name: 0.4})
    pipe.adapters.hotswap(name, file)
    pipe.adapters.release_slots()
    pipe.adapters.merge(name)
    pipe.adapters.unmerge()
    keys = pipe.unet.state_dict().keys()
    assert not any(key.startswith("diffadapt") or "lora" in key for key in keys)
    pipe.adapters.remove(name)
    assert pipe.adapters.names == ["other"]


@pytest.mark.parametrize("name", ["", " ", "a/b", "a\\b", "a\nb"])
def test_names_that_are_no_names_are_refused(name: str) -> None:
    pipe = models.sd15()
    tensors = spellings.peft_names(loras.parts_for(pipe))
    with pytest.raises(AdapterError, match="is no name for an adapter: expected printable"):
        pipe.load_adapter(tensors, name)


def test_a_file_whose_name_is_not_printable_is_loaded(tmp_path: Path) -> None:
    pipe = models.sd15()
    file = files.write(tmp_path / "in\nk .safetensors", spellings.peft_names(loras.parts_for(pipe)))
    assert pipe.load_adapter(file).name == "in_k"


def test_paths_are_never_looked_up_on_the_hub(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(diffadapt.files.hub, "_download", lambda *_: pytest.fail("the hub was asked"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    files.write(tmp_path / "my ink.safetensors", {"transformer.x.lora_A.weight": torch.ones(1, 4)})
    for text in ("~/my ink.safetensors", (tmp_path / "my ink.safetensors").as_uri(), "./my ink.safetensors"):
        assert read(text).name == "my ink"
    (tmp_path / "text.safetensors").write_text("A text of several words, which is no adapter.")
    (tmp_path / "empty.safetensors").touch()
    for text, message in {
        "./adapters": "no such file or folder",
        str(tmp_path / "adapters"): "no such file or folder",
        "~/ink.pt": "no such file",
        r"loras\\ink.safetensors": "no such file",
        (tmp_path / "my inc.safetensors").as_uri(): "did you mean .*my ink.safetensors",
        "text.safetensors": "not a safetensors file but text",
        "empty.safetensors": "not a safetensors file but empty",
        "loras/sd/my inkk": "not a hub id either; there is no folder loras/sd",
        "./my in": r"did you mean my ink\.safetensors",
    }.items():
        with pytest.raises(AdapterError, match=message):
            read(text)
