"""Caches of diffusers: adapters act in them as weights do, and cached text follows a change of adapters."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import diffadapt
from tests.support import loras, spellings
from tests.support.cases import for_each
from tests.support.compare import assert_differs, assert_same
from tests.support.small_models import flux, predict
from tests.support.versions import diffusers, needs

pytestmark = pytest.mark.slow

hooks = pytest.importorskip("diffusers.hooks")
STEPS = 6

CACHES: dict[str, Callable[[], Any]] = {
    "FirstBlockCache": lambda: hooks.FirstBlockCacheConfig(threshold=1e6),
    "TaylorSeer": lambda: hooks.TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1),
    "MagCache": lambda: hooks.MagCacheConfig(
        num_inference_steps=STEPS, mag_ratios=torch.ones(STEPS), retention_ratio=0.2, threshold=1e6
    ),
    "PyramidAttentionBroadcast": lambda: hooks.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=lambda: 500,
    ),
}


def run(model: Any, cache: str, change: Callable[[int], None] | None = None) -> list[Tensor]:
    """Return the output of every step of a run with a cache, and check that the cache skips some of the work."""
    needs("diffusers", "0.35", "cache_context")
    model.enable_cache(CACHES[cache]())
    called: list[int] = []
    last = model.single_transformer_blocks[-1].attn.to_q
    handle = last.register_forward_hook(lambda *_: called.append(1))
    try:
        with model.cache_context("run"):
            outputs: list[Tensor] = []
            for step in range(STEPS):
                if change is not None:
                    change(step)
                outputs.append(predict(model))
    finally:
        handle.remove()
        model.disable_cache()
    assert 0 < len(called) < STEPS
    return outputs


@torch.no_grad()
@for_each(cache=[name for name in CACHES if hasattr(hooks, f"{name}Config") or name == "TaylorSeer"])
def test_adapters_act_as_weights_do(cache: str) -> None:
    plain, baked, target = flux(), flux(), flux()
    layers = loras.factors_for(loras.layers_of(plain, r"to_[qkv]$|proj_mlp"))
    diffadapt.load_adapter(target, spellings.peft_names({"transformer": layers}), "a", scale=0.5)
    for path, part in layers.items():
        baked.get_submodule(path).get_parameter("weight").data += 0.5 * part.delta.to(torch.float32)
    base, expected = run(plain, cache), run(baked, cache)
    for found, right, without in zip(run(target, cache), expected, base, strict=True):
        assert_same(found, right)
        assert_differs(found, without)


@contextmanager
def text_cached(*models: Any) -> Generator[None, None, None]:
    for model in models:
        model.enable_cache(hooks.TextKVCacheConfig())
    yield
    for model in models:
        model.disable_cache()


class Nucleus:
    """A small model whose text can be cached, and a fixed input."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model: Any = diffusers.NucleusMoEImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(8, 4, 4),
            mlp_ratio=8.0,
            moe_enabled=False,
            capacity_factors=[1.0, 1.0],
        ).eval()
        generator = torch.Generator().manual_seed(1)
        self.input = torch.randn(1, 4, 16, generator=generator)
        self.text = torch.randn(1, 3, 16, generator=generator)
        self.adapters = diffadapt.adapters(self.model)

    def __call__(self, scale: float | None = None) -> Tensor:
        return self.model(
            hidden_states=self.input,
            img_shapes=[(1, 2, 2)],
            encoder_hidden_states=self.text,
            encoder_hidden_states_mask=torch.ones(1, 3, dtype=torch.bool),
            timestep=torch.tensor([0.5]),
            attention_kwargs=None if scale is None else {"scale": scale},
        )[0]


def lora(model: nn.Module, rank: int) -> dict[str, Tensor]:
    return spellings.peft_names({"transformer": loras.factors_for(loras.layers_of(model, "add_[kv]_proj"), rank)})


@pytest.mark.skipif(not hasattr(hooks, "TextKVCacheConfig"), reason="this diffusers has no cache of text")
@torch.no_grad()
def test_cached_text_follows_every_change_of_adapters() -> None:
    cached, plain = Nucleus(), Nucleus()
    base = plain()
    one, two = lora(plain.model, 4), lora(plain.model, 2)
    changes: dict[str, Callable[[Nucleus], Any]] = {
        "load": lambda owner: owner.adapters.load(one, "a"),
        "rescale": lambda owner: owner.adapters.activate({"a": 0.5}),
        "rescale blocks": lambda owner: owner.adapters.activate({"a": {"transformer_blocks.0": 2.0}}),
        "swap": lambda owner: owner.adapters.hotswap("a", two),
        "load another": lambda owner: owner.adapters.load(one, "b", activate=False),
        "activate another": lambda owner: owner.adapters.activate({"b": 1.0}),
        "merge": lambda owner: owner.adapters.merge("b"),
        "swap a merged one": lambda owner: owner.adapters.hotswap("b", two),
        "unmerge": lambda owner: owner.adapters.unmerge(),
        "slots": lambda owner: owner.adapters.prepare_hotswap([one], slots=2),
        "swap in slots": lambda owner: owner.adapters.hotswap("b", one),
        "deactivate": lambda owner: owner.adapters.activate({}),
        "activate again": lambda owner: owner.adapters.activate({"a": 1.0}),
        "clear": lambda owner: (owner.adapters.clear(), owner.adapters.release_slots()),
    }
    with text_cached(cached.model), cached.model.cache_context("run"):
        assert_same(cached(), base)
        before = base
        for name, change in changes.items():
            for owner in (cached, plain):
                change(owner)
            expected = plain()
            assert_same(cached(), expected)
            if name not in ("load another", "merge", "unmerge", "slots"):
                assert_differs(expected, before, 1e-3)
            before = expected
        assert torch.equal(before, base)


@pytest.mark.skipif(not hasattr(hooks, "TextKVCacheConfig"), reason="this diffusers has no cache of text")
@torch.no_grad()
def test_text_is_computed_again_only_after_a_change() -> None:
    cached = Nucleus()
    calls: list[int] = []
    cached.model.transformer_blocks[0].encoder_proj.register_forward_hook(lambda *_: calls.append(1))
    cached.adapters.load(lora(cached.model, 2), "a")
    with text_cached(cached.model):
        outputs = [cached() for _ in range(3)]
        assert len(calls) == 1
        assert torch.equal(outputs[0], outputs[2])
        assert_differs(cached(scale=0.0), outputs[0], 1e-3)
        assert_same(cached(), outputs[0])
        assert len(calls) == 3
