"""`examples/serving/api.py` on one engine, without Ray: what clients send and get."""

import asyncio
import base64
import io
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import diffadapt
from examples.serving.engine import Engine, Request
from tests.support.browser import CHROMIUM, opened
from tests.support.cases import for_each
from tests.support.serving import TINY, OneEngine, folder_of_adapters, served

REASON = "examples/serving needs the extra `serve`"
pytest.importorskip("python_multipart", reason=REASON)
create_app: Any = pytest.importorskip("examples.serving.api", reason=REASON).create_app
ServiceError: Any = pytest.importorskip("examples.serving.errors", reason=REASON).ServiceError
PictureLinks: Any = pytest.importorskip("examples.serving.links", reason=REASON).PictureLinks
TestClient: Any = pytest.importorskip("fastapi.testclient", reason=REASON).TestClient

pytestmark = pytest.mark.slow
PICTURES = "/v1/images/generations"
FAST = {"prompt": "a red circle", "num_inference_steps": 2, "seed": 3}


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OneEngine]:
    engine = Engine(TINY, folder_of_adapters(tmp_path_factory.mktemp("serving")), slots=3, samples=4)
    yield OneEngine(engine)
    engine.close()


@pytest.fixture
def client(studio: OneEngine) -> Any:
    studio.painted.clear()
    studio.failure = None
    app = create_app(studio, studio.engine.folder, upload_bytes=2**20)
    return TestClient(app, raise_server_exceptions=False)


def error_of(response: Any, status: int) -> dict[str, Any]:
    """The error of a response, which has all that clients of OpenAI look for."""
    assert response.status_code == status, response.text
    assert list(response.json()) == ["error"]
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    return response.json()["error"]


def test_pictures_are_those_of_the_engine(client: Any, studio: OneEngine) -> None:
    body = {
        **FAST,
        "prompt": "a red circle, <lora:ink:0.5>",
        "adapters": {"pixel": {"unet.up_blocks": 0.8, "": 0}, "critter": [[0, 1], [1, 0.5]]},
        "n": 2,
        "size": "96x64",
        "guidance_scale": 2.5,
    }
    answer = client.post(PICTURES, json=body).json()
    adapters = {
        "ink": 0.5,
        "pixel": {"unet.up_blocks": 0.8, "": 0.0},
        "critter": diffadapt.Piecewise([(0.0, 1.0), (1.0, 0.5)]),
    }
    expected = [Request("a red circle", adapters, seed, 2, (96, 64), 2.5) for seed in (3, 4)]
    assert studio.painted == expected
    assert (answer["size"], answer["output_format"], answer["model"]) == ("96x64", "png", "tiny")
    for item, picture in zip(answer["data"], studio.engine.draw(expected), strict=True):
        found = Image.open(io.BytesIO(base64.b64decode(item["b64_json"])))
        assert np.array_equal(np.asarray(found), np.asarray(picture))
        assert item["revised_prompt"] == "a red circle"
    assert [item["seed"] for item in answer["data"]] == [3, 4]


def test_fields_of_the_openai_api_are_accepted(client: Any, studio: OneEngine) -> None:
    theirs = {"model": "dall-e-3", "user": "u", "quality": "hd", "style": "vivid", "moderation": "low", "n": None}
    theirs |= {"size": "auto", "background": "opaque", "response_format": "b64_json", "stream": False}
    answer = client.post(PICTURES, json={**FAST, **theirs, "output_format": "webp", "output_compression": 50}).json()
    (request,) = studio.painted
    assert request == Request("a red circle", {}, 3, 2, (64, 64))
    assert Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"]))).format == "WEBP"
    del theirs["n"]
    without_seed = {"prompt": "x", "num_inference_steps": 1}
    first, second = (client.post(PICTURES, json=without_seed).json()["data"][0]["seed"] for _ in range(2))
    assert first != second


BAD_FIELDS: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": None}, "prompt", "string"),
    ({"adapters": {"ink": float("nan")}}, "adapters", "'ink'.*nan is no finite number"),
    ({"adapters": {"ink": float("inf")}}, "adapters", "'ink'.*inf is no finite number"),
    ({"adapters": {"ink": "0.8"}}, "adapters", "'ink'.*'0.8' is no finite number"),
    ({"adapters": {"ink": True}}, "adapters", "True is no finite number"),
    ({"adapters": {"ink": None}}, "adapters", "None is no finite number"),
    ({"adapters": {"ink": 10.5}}, "adapters", "too large, expected -10 to 10"),
    ({"adapters": {"ink": {"unet": -11}}}, "adapters", "too large"),
    ({"adapters": {"ink": [[0, 1], [0.5]]}}, "adapters", r"no list of \[position, strength\]"),
    ({"adapters": {"ink": [[0.5, 1], [0, 1]]}}, "adapters", "ascending"),
    ({"adapters": {"ink": {"block_weights": [1, 2]}}}, "adapters", "2 values"),
    ({"adapters": {"ink": {"unet.nowhere": 1}}}, "adapters", "unet.nowhere"),
    ({"adapters": ["ink"]}, "adapters", "no mapping"),
    ({"adapters": {name: 1 for name in ("ink", "pixel", "critter", "copy")}}, "adapters", "at most 3"),
    ({"prompt": "x <lora:ink:1>", "adapters": {"ink": 1}}, "adapters", "name it once"),
    ({"prompt": "x <lora:ink:1e9>"}, "prompt", "too large"),
    ({"prompt": "x <lora:ink:a>"}, "prompt", "no number"),
    ({"adaptors": {"ink": 1}}, "adaptors", "did you mean 'adapters'"),
    ({"seed": -1}, "seed", "greater than or equal to 0"),
    ({"seed": 1.5}, "seed", "integer"),
    ({"n": 0}, "n", "greater than or equal to 1"),
    ({"n": 17}, "n", "less than or equal to 16"),
    ({"size": "large"}, "size", "WIDTHxHEIGHT"),
    ({"size": "65x64"}, "size", "multiples of 8"),
    ({"size": "68x64"}, "size", "multiples of 8"),
    ({"size": "4096x4096"}, "size", "too large"),
    ({"num_inference_steps": 201}, "num_inference_steps", "less than or equal to 200"),
    ({"guidance_scale": float("nan")}, "guidance_scale", "finite"),
    ({"response_format": "file"}, "response_format", "b64_json"),
    ({"adapters": {"ink": {}}}, "adapters", "no prefix"),
    ({"background": "transparent"}, "background", "opaque"),
    ({"stream": True}, "stream", "False"),
    ({"model": "ink"}, "model", "is an adapter"),
]


@for_each(case=BAD_FIELDS)
def test_a_bad_field_is_named_and_said_why(case: tuple[dict[str, Any], str, str], studio: OneEngine) -> None:
    fields, param, words = case
    (studio.engine.folder.folder / "copy.safetensors").write_bytes(studio.engine.folder.path("ink").read_bytes())
    client = TestClient(create_app(studio, studio.engine.folder))
    content = json.dumps({**FAST, **fields})
    found = error_of(client.post(PICTURES, content=content, headers={"Content-Type": "application/json"}), 422)
    studio.engine.folder.remove("copy")
    assert (found["type"], found["param"]) == ("invalid_request_error", param), found
    with pytest.raises(ValueError, match=words):
        raise ValueError(found["message"])


def test_what_does_not_exist_is_not_found(client: Any) -> None:
    for body, param in (({"adapters": {"Inc": 1}}, "adapters"), ({"prompt": "x <lora:inkk>"}, "prompt")):
        found = error_of(client.post(PICTURES, json={**FAST, **body}), 404)
        assert (found["code"], found["param"]) == ("adapter_not_found", param)
        assert "similar names: ink" in found["message"]
    assert error_of(client.get("/v1/adapters/nope"), 404)["code"] == "adapter_not_found"
    assert error_of(client.delete("/v1/adapters/nope"), 404)["code"] == "adapter_not_found"
    error_of(client.get("/v1/nope"), 404)
    error_of(client.get(PICTURES), 405)
    broken = client.post(PICTURES, content="{", headers={"Content-Type": "application/json"})
    assert "no JSON" in error_of(broken, 422)["message"]
    assert error_of(client.post(PICTURES, content="{}"), 422)["type"] == "invalid_request_error"


def test_failures_of_the_service_are_no_fault_of_the_request(client: Any, studio: OneEngine) -> None:
    studio.failure = ServiceError(503, "too many requests wait", code="overloaded", headers={"Retry-After": "2"})
    response = client.post(PICTURES, json={**FAST, "n": 3})
    assert error_of(response, 503)["type"] == "server_error"
    assert response.headers["Retry-After"] == "2"
    studio.failure = ZeroDivisionError("what\nTraceback: File ...")
    assert error_of(client.post(PICTURES, json=FAST), 500)["message"] == "ZeroDivisionError: what"


def test_a_link_leads_to_the_picture_until_it_is_too_old(client: Any, studio: OneEngine) -> None:
    embedded = client.post(PICTURES, json=FAST).json()["data"][0]
    linked = client.post(PICTURES, json={**FAST, "response_format": "url"}).json()["data"][0]
    assert "b64_json" not in linked
    assert linked["url"].startswith("http://testserver/")
    found = client.get(linked["url"])
    assert found.headers["content-type"] == "image/png"
    assert found.content == base64.b64decode(embedded["b64_json"])
    file = next((studio.engine.folder.folder / ".pictures").iterdir())
    for url in (f"{linked['url']}x", linked["url"].replace(file.stem, "0" * 32), f"/v1/pictures/..%2f{file.name}"):
        assert error_of(client.get(url), 404)["type"] == "not_found_error"
    os.utime(file, (1, 1))
    assert "valid for an hour" in error_of(client.get(linked["url"]), 404)["message"]
    shutil.rmtree(file.parent)


def test_old_and_too_many_pictures_are_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    links = PictureLinks(tmp_path / "pictures")
    monkeypatch.setattr("examples.serving.links.MOST_BYTES", 250)
    names = [links.keep(b"x" * 100, "png") for _ in range(4)]
    for age, name in enumerate(names):
        os.utime(links.folder / name, (time.time() - 60 * age,) * 2)
    (links.folder / "mine.txt").touch()
    assert all(links.find(name) for name in names)
    monkeypatch.setattr("examples.serving.links._SWEEP_S", 0.0)
    links.keep(b"", "png")
    assert [links.find(name) is not None for name in names] == [True, True, False, False]
    os.utime(links.folder / names[0], (1, 1))
    links.keep(b"", "png")
    assert [(links.folder / name).exists() for name in names[:2]] == [False, True]
    assert (links.folder / "mine.txt").exists()


def test_a_body_that_is_too_large_is_refused_before_it_is_read(client: Any) -> None:
    headers = {"Content-Type": "application/json"}
    response = client.post(PICTURES, content=b" " * (2**20 + 1), headers=headers)
    assert "at most 1 MiB" in error_of(response, 413)["message"]

    # Without a length, it is refused while it arrives.
    sent: list[dict[str, Any]] = []
    arrived: list[int] = []

    async def receive() -> dict[str, Any]:
        arrived.append(2**18)
        return {"type": "http.request", "body": b" " * 2**18, "more_body": True}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": PICTURES, "query_string": b"", "root_path": ""}
    raw_headers = [(b"content-type", b"application/json"), (b"transfer-encoding", b"chunked")]
    asyncio.run(client.app({**scope, "headers": raw_headers}, receive, send))
    assert sum(arrived) == 2**20 + 2**18
    assert sent[0]["status"] == 413
    fits = json.dumps({**FAST, "prompt": "x" * 32_000}) + " " * 2**19
    assert client.post(PICTURES, content=fits, headers=headers).status_code == 200
    assert error_of(client.post("/v1/adapters", content=b" " * 2**21), 413)["code"] == "file_too_large"


def test_adapters_in_the_folder_that_cannot_be_used_say_why(client: Any, studio: OneEngine, tmp_path: Path) -> None:
    folder = studio.engine.folder.folder
    save_file({"lora_te_x.lora_down.weight": torch.ones(4, 8)}, folder / "other.safetensors")
    (folder / "cut.safetensors").write_bytes((TINY / "adapters" / "ink.safetensors").read_bytes()[:3000])
    for name, words in (("other", "1 of 1 tensors cannot be used"), ("cut", "cut off")):
        found = error_of(client.post(PICTURES, json={**FAST, "adapters": {name: 1}}), 422)
        assert (found["code"], found["param"]) == ("unusable_adapter", "adapters")
        assert found["message"].startswith(f"{name}.safetensors: ")
        assert words in found["message"]
    assert error_of(client.get("/v1/adapters/cut"), 422)["message"].startswith("cut.safetensors: ")
    for name in ("other", "cut"):
        studio.engine.folder.remove(name)


def test_what_is_there(client: Any) -> None:
    cards = {card["id"]: card for card in client.get("/v1/adapters").json()["data"]}
    assert list(cards) == ["critter", "ink", "pixel"]
    critter = cards["critter"]
    assert critter == client.get("/v1/adapters/critter").json()
    assert critter["types"] == {"lora": 119}
    assert critter["components"] == {"unet": 119}
    assert critter["ranks"] == [8]
    assert critter["bytes"] == (TINY / "adapters" / "critter.safetensors").stat().st_size
    assert critter["trigger_words"] == ["a sks critter"]
    assert critter["metadata"]["format"] == "pt"
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["tiny"]
    assert client.get("/health").json() == {"status": "ok", "replicas": {"RUNNING": 1}, "adapters": 3}
    assert client.get("/metrics").text == "pictures 0\n"
    assert "<title>diffadapt</title>" in client.get("/").text


def test_an_adapter_is_uploaded_drawn_with_and_deleted(client: Any, studio: OneEngine) -> None:
    lokr = (TINY.parent / "hotswap" / "ink_lokr.safetensors").read_bytes()
    response = client.post("/v1/adapters", files={"file": ("ink_lokr.safetensors", lokr)}, data={"name": "new.1"})
    assert response.status_code == 201, response.text
    assert response.json()["types"] == {"lokr": 119}
    plain, styled = (
        client.post(PICTURES, json={**FAST, "adapters": adapters}).json()["data"][0]["b64_json"]
        for adapters in ({}, {"new.1": 1.0})
    )
    assert plain != styled
    again = client.post("/v1/adapters", files={"file": ("new.1.safetensors", lokr)})
    assert error_of(again, 409)["code"] == "name_taken"
    assert client.delete("/v1/adapters/new.1").json()["deleted"]
    error_of(client.post(PICTURES, json={**FAST, "adapters": {"new.1": 1.0}}), 404)
    assert [file.name for file in studio.engine.folder.folder.iterdir() if file.name.startswith(".")] == []


def test_uploads_that_are_refused_leave_nothing(client: Any, studio: OneEngine, tmp_path: Path) -> None:
    ink = TINY / "adapters" / "ink.safetensors"
    tensors = load_file(ink)
    key = next(key for key in tensors if key.endswith("lora_A.weight"))
    save_file({**tensors, key: tensors[key][:, :-1].contiguous()}, tmp_path / "wrong.safetensors")
    save_file({"lora_te_x.lora_down.weight": tensors[key]}, tmp_path / "other.safetensors")
    wrong, other = ((tmp_path / f"{name}.safetensors").read_bytes() for name in ("wrong", "other"))
    good = ink.read_bytes()
    refused: list[tuple[int, str, str, bytes, str]] = [
        (422, "a.safetensors", "", wrong, key.rsplit(".", 2)[0].removeprefix("unet.")),
        (422, "a.safetensors", "", other, "lora_te_x"),
        (422, "a.safetensors", "", good[: len(good) // 2], "a.safetensors"),
        (422, "a.safetensors", "", b"", "a.safetensors"),
        (422, "a.safetensors", "", b"PK\x03\x04 a zip", "Pickles"),
        (422, "a.bin", "", b"\x80\x02}q\x00.", "Pickles"),
        (422, "a.ckpt", "", good, "no safetensors file"),
        (422, "a.safetensors", "../a", good, "no name for an adapter"),
        (422, "a b.safetensors", "", good, "no name for an adapter"),
        (413, "a.safetensors", "", b"x" * (2**20 + 1), "at most 1 MiB"),
        (413, "a.safetensors", "", b"x" * 2**22, "at most 1 MiB"),
    ]
    before = sorted(studio.engine.folder.folder.iterdir())
    for status, file, name, content, words in refused:
        form = {"name": name} if name else {}
        response = client.post("/v1/adapters", files={"file": (file, content)}, data=form)
        assert words in error_of(response, status)["message"], (file, words, response.text)
    for form in ({"data": {"name": "a"}}, {"content": good}, {"json": {}}, {"files": {"name": "a"}}):
        assert "with a file expected" in error_of(client.post("/v1/adapters", **form), 422)["message"]
    assert sorted(studio.engine.folder.folder.iterdir()) == before


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH")
def test_the_page_draws_with_sliders_and_compares(studio: OneEngine, tmp_path: Path) -> None:
    studio.painted.clear()
    studio.failure = None
    with served(create_app(studio, studio.engine.folder)) as url, opened(url, tmp_path / "profile") as page:
        page.wait_for("document.body && document.body.dataset.ready")
        assert page.run("[...styles.keys()]") == ["critter", "ink", "pixel"]
        page.run("find('steps').value = 2")
        page.run("styles.get('ink').querySelector('input[type=checkbox]').click()")
        slider = "styles.get('ink').querySelector('input[type=range]')"
        page.run(f"Object.assign({slider}, {{value: 0.5}}).dispatchEvent(new Event('input'))")
        assert page.run("styles.get('ink').querySelector('output').textContent") == "0.50"
        page.run("document.querySelector('button.first').click()")
        page.wait_for("document.querySelector('#pictures img')")
        request = Request("a red circle on a blue background", {"ink": 0.5}, 1, 2, (64, 64))
        assert studio.painted == [request]
        source = page.run("document.querySelector('#pictures img').src")
        found = Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))
        assert np.array_equal(np.asarray(found), np.asarray(studio.engine.draw([request])[0]))
        page.run("find('compare').click()")
        page.wait_for("document.querySelectorAll('#grid img').length === 5 && !find('compare').disabled")
        assert {request.adapters["ink"] for request in studio.painted[1:]} == {0, 0.25, 0.5, 0.75, 1}
        assert page.problems == []
        page.run("find('seed').value = -1")
        page.run("find('form').noValidate = true")
        page.run("document.querySelector('button.first').click()")
        page.wait_for("/seed: Input should be greater/.test(find('pictures').textContent)")
        page.screenshot(tmp_path / "page.png")
        with Image.open(tmp_path / "page.png") as shot:
            assert shot.size[0] == 1200
