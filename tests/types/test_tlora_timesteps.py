"""T-LoRA: how many components of the rank act depends on the timestep of a call."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import diffadapt
from diffadapt import AdapterError, LoadError
from diffadapt.runtime.call_arguments import _BY_SHARES, _BY_SHARES_LEFT, _BY_THOUSANDS, Clock
from diffadapt.training.block_checkpointing import checkpoint_blocks
from diffadapt.types.adapter_type import UNTIL
from diffadapt.types.singular import acts_until
from tests.support import small_models
from tests.support.calls import CALLS, output
from tests.support.cases import for_each
from tests.support.denoisers import SMALL
from tests.support.versions import diffusers

tlora = pytest.importorskip("lycoris.modules.tlora")

RANK, LEAST, SCALE = 4, 1, 0.7

# How a family of every kind is called, and the timestep from 0 to 1000 that this means.
FAMILIES: Mapping[str, tuple[str, str]] = {
    "sd": ("timestep", "t"),
    "flux": ("timestep", "1000 t"),
    "lumina2": ("timestep", "1000 - 1000 t"),
    "hidream": ("timesteps", "t"),
    "cascade": ("timestep_ratio", "1000 t"),
    "zimage": ("t", "1000 - 1000 t"),
}


def adapted(model: nn.Module, **options: Any) -> nn.Module:
    """Return the model with a T-LoRA that has a large effect, always with the same values."""
    torch.manual_seed(7)
    config = diffadapt.TLoRAConfig(rank=RANK, target_modules=r".*\.(to_q|to_v|qkv|to_qkv)", init=False, **options)
    diffadapt.add_adapter(model, config, "a")
    return model


def layers_of(model: nn.Module) -> Mapping[str, Any]:
    return next(iter(diffadapt.adapters(model)["a"].components.values())).layers


def masked(model: nn.Module, timestep: float) -> nn.Module:
    """Return the model with an adapter of which only those components are left that act at a timestep in LyCORIS."""
    mask = tlora.compute_timestep_mask(int(timestep), 1000, RANK, LEAST, SCALE)
    with torch.no_grad():
        for layer in layers_of(model).values():
            for name in ("lambda_layer", "lambda_start"):
                layer.tensors[name].mul_(mask)
    return model


def test_the_components_at_every_timestep_are_those_of_lycoris() -> None:
    for rank, least, scale in ((8, 1, 1.0), (100, 0, 1.0), (64, 7, 2.0), (5, 5, 1.0), (33, 2, 0.5)):
        until = acts_until(rank, least, scale)
        found = torch.stack([(timestep <= until).float() for timestep in range(1001)])
        expected = [tlora.compute_timestep_mask(timestep, 1000, rank, least, scale)[0] for timestep in range(1001)]
        assert torch.equal(found, torch.stack(expected))
    assert not torch.equal(acts_until(8, 1, 1.0), acts_until(8, 1, 1.1))


def test_all_models_of_the_tables_are_told_the_timestep() -> None:
    for unit, names in ((1.0, _BY_THOUSANDS), (1000.0, _BY_SHARES), (1000.0, _BY_SHARES_LEFT)):
        for name in names:
            if hasattr(diffusers, name):
                model = object.__new__(getattr(diffusers, name))
                clock = Clock.of(model)
                assert clock is not None
                assert clock[2:] == (unit, names is _BY_SHARES_LEFT), name
                value = torch.tensor(200.0 / unit)
                expected = 800 if names is _BY_SHARES_LEFT else 200
                for args, kwargs in (((), {clock.name: value}), ((None,) * clock.position + (value,), {})):
                    assert float(clock.read(args, kwargs)) == pytest.approx(expected)


@for_each(family=[name for name in FAMILIES if name in SMALL])
def test_every_row_of_a_batch_has_the_components_of_its_timestep(family: str) -> None:
    argument, counted = FAMILIES[family]

    def built() -> nn.Module:
        torch.manual_seed(0)
        return next(iter(SMALL[family].components.values()))().eval().requires_grad_(False).double()

    call = CALLS[family](2)
    shares = torch.tensor([0.25, 0.7], dtype=torch.float64)
    call[argument] = shares * (1000 if counted == "t" else 1)
    found = output(adapted(built(), min_rank=LEAST, alpha_rank_scale=SCALE), call)
    everything = output(adapted(built()), call)
    scale = (everything - output(built(), call)).abs().max()
    timesteps = (1000 * (1 - shares if counted.startswith("1000 -") else shares)).tolist()
    for row, timestep in enumerate(timesteps):
        expected = output(masked(adapted(built()), round(timestep, 6)), call)[row]
        torch.testing.assert_close(found[row], expected, rtol=1e-5, atol=float(1e-5 * scale))
        assert (found[row] - everything[row]).abs().max() > 1e-3 * scale


def loss_of(model: nn.Module, call: Mapping[str, Any]) -> Tensor:
    return model(**call, return_dict=False)[0].pow(2).mean()


def test_the_gradients_of_a_batch_are_those_of_its_timesteps_also_with_checkpointing() -> None:
    call = {name: value.float() for name, value in CALLS["sd"](2).items()} | {"timestep": torch.tensor([100, 900])}
    gradients: list[list[Tensor]] = []
    for checkpointing in ("", "of the model", "of the trainer"):
        model = adapted(small_models.unet(), min_rank=LEAST)
        if checkpointing == "of the model":
            model.enable_gradient_checkpointing()
        elif checkpointing:
            assert checkpoint_blocks(model) > 0
        loss = loss_of(model.train(), call)
        # A later call must not change the timesteps of this one.
        with torch.no_grad():
            loss_of(model, call | {"timestep": 0})
        loss.backward()
        gradients.append([layer.tensors["lambda_layer"].grad for layer in layers_of(model).values()])
    for plain, *recomputed in zip(*gradients, strict=True):
        for other in recomputed:
            torch.testing.assert_close(plain, other)
    rows: list[list[Tensor]] = []
    for row, timestep in enumerate((100, 900)):
        model = adapted(small_models.unet(), min_rank=LEAST)
        one = {name: value[row : row + 1] for name, value in call.items()}
        loss_of(model.train(), one | {"timestep": timestep}).backward()
        rows.append([layer.tensors["lambda_layer"].grad for layer in layers_of(model).values()])
    assert all(float(grad[0, 1:].abs().max()) == 0 for grad in rows[1])
    for both, first, second in zip(gradients[0], *rows, strict=True):
        torch.testing.assert_close(both, (first + second) / 2, rtol=1e-4, atol=1e-7)


def test_a_layer_outside_a_call_of_its_model_is_refused() -> None:
    model = adapted(small_models.unet(), min_rank=LEAST)
    path = next(iter(layers_of(model)))
    layer = model.get_submodule(path)
    with pytest.raises(AdapterError, match="call of the whole model"):
        layer(torch.randn(2, layer.in_features))


def test_per_sample_and_strengths_multiply_the_components() -> None:
    call = CALLS["sd"](2) | {"timestep": torch.tensor([900, 100])}
    model = adapted(small_models.unet().double(), min_rank=LEAST)
    base, full = output(small_models.unet().double(), call), output(model, call)
    manager = diffadapt.adapters(model)
    with manager.per_sample([{}, {"a": 1.0}]):
        found = output(model, call)
    torch.testing.assert_close(found[0], base[0])
    torch.testing.assert_close(found[1], full[1])
    assert (found[1] - base[1]).abs().max() > 1e-2


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_model_with_slots_follows_the_timestep_without_recompiling(tmp_path: Path) -> None:
    call = {name: value.float() for name, value in CALLS["sd"](2).items()}
    calls = [call | {"timestep": torch.tensor([first, second])} for first, second in ((50, 950), (949, 400), (0, 0))]
    model = adapted(small_models.unet(), min_rank=LEAST)
    expected = [output(model, each) for each in calls]
    assert (expected[0] - expected[1]).abs().max() > 1e-3
    file = diffadapt.adapters(model).save("a", tmp_path / "a.safetensors", format="kohya")
    manager, counter = diffadapt.adapters(compiled := small_models.unet()), CompileCounterWithBackend("eager")
    manager.prepare_hotswap([file])
    compiled.compile(backend=counter, fullgraph=True)
    diffadapt.load_adapter(compiled, file, "a", component="unet")
    for each, value in zip(calls, expected, strict=True):
        torch.testing.assert_close(output(compiled, each), value, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1


def test_neither_merged_nor_converted(tmp_path: Path) -> None:
    model = adapted(small_models.unet(), min_rank=LEAST)
    call = CALLS["sd"](2)
    call = {name: value.float() for name, value in call.items()}
    before = output(model, call)
    manager = diffadapt.adapters(model)
    for attempt in (manager.merge, lambda: manager.to_lora("a", "b")):
        with pytest.raises(AdapterError, match="depends on the timestep"):
            attempt()
    assert torch.equal(output(model, call), before)


def test_files_say_when_components_act(tmp_path: Path) -> None:
    call = {name: value.float() for name, value in CALLS["sd"](2).items()}
    model = adapted(small_models.unet(), min_rank=LEAST, alpha_rank_scale=SCALE)
    expected = output(model, call)
    file = diffadapt.adapters(model).save("a", tmp_path / "a.safetensors", format="kohya")
    again = small_models.unet()
    assert diffadapt.load_adapter(again, file, component="unet").unused == []
    torch.testing.assert_close(output(again, call), expected)
    # A header of a trainer says the same by numbers.
    for names in (("min_rank", "alpha_rank_scale"), ("tlora_min_rank", "tlora_alpha")):
        arguments = {"algo": "tlora", names[0]: str(LEAST), names[1]: str(SCALE)}
        header = {"ss_network_module": "lycoris.kohya", "ss_network_args": json.dumps(arguments)}
        tensors = {key: tensor for key, tensor in load_file(file).items() if not key.endswith(UNTIL)}
        save_file(tensors, tmp_path / "b.safetensors", header)
        other = small_models.unet()
        diffadapt.load_adapter(other, tmp_path / "b.safetensors", "a", component="unet")
        torch.testing.assert_close(output(other, call), expected)
    save_file(tensors, tmp_path / "c.safetensors", {**header, "ss_network_args": '{"algo": "tlora", "min_rank": "x"}'})
    with pytest.raises(LoadError, match="min_rank='x'"):
        diffadapt.load_adapter(small_models.unet(), tmp_path / "c.safetensors", component="unet")


def test_a_model_that_is_not_told_the_timestep_has_all_components() -> None:
    outputs: list[Tensor] = []
    for options in ({}, {"min_rank": LEAST}):
        torch.manual_seed(7)
        model = small_models.clip()
        config = diffadapt.TLoRAConfig(rank=RANK, target_modules=["q_proj"], init=False, **options)  # type: ignore[arg-type]
        diffadapt.add_adapter(model, config, "a")
        outputs.append(small_models.predict(model))
    assert torch.equal(*outputs)


def test_a_denoiser_that_counts_timesteps_in_an_unknown_way_is_refused() -> None:
    class Denoiser(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Module()
            self.a.to_q = nn.Linear(8, 8)

        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
            return self.a.to_q(x)

    model = Denoiser()
    with pytest.raises(AdapterError, match="not known how Denoiser counts timesteps"):
        adapted(model, min_rank=LEAST)
    assert not hasattr(model, "diffadapt")
    adapted(model)


def test_settings_that_mean_nothing_are_refused() -> None:
    with pytest.raises(AdapterError, match="alpha_rank_scale is 2"):
        diffadapt.TLoRAConfig(rank=4, alpha_rank_scale=2.0, target_modules=["to_q"])
    with pytest.raises(AdapterError, match="expected at most 4, the rank"):
        adapted(small_models.unet(), min_rank=5)
