"""Noise levels, targets, weights and masks of the loss, against their formulas."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from diffadapt import UsageError
from diffadapt.training.families import LevelSampling
from diffadapt.training.loss import cover_of, squared_errors, weighting
from diffadapt.training.noise_levels import Levels, Noising, levels_of
from diffadapt.training.randomness import generator, normal, seed_of
from tests.support.cases import for_each

FLOW_LEVELS = torch.tensor([0.05, 0.3, 0.5, 0.9, 1.0])
STEPS = torch.tensor([0, 10, 500, 998])


def noising(process: str, levels: Levels | None = None, shift: float = 1.0, **config: Any) -> Noising:
    scheduler = DDIMScheduler(**config)
    family: Any = SimpleNamespace(process=lambda pipe: process, shift=lambda pipe, latents: shift)
    return Noising(SimpleNamespace(scheduler=scheduler), family, levels or Levels())


@for_each(process=["flow", "epsilon", "v"])
def test_the_prediction_of_the_target_gives_the_latents_back(process: str) -> None:
    noise_process = noising(process)
    clean, noise = normal((4, 4, 2, 2), "clean"), normal((4, 4, 2, 2), "noise")
    level = FLOW_LEVELS[:4] if process == "flow" else STEPS
    mixed, target = noise_process.mix(clean, noise, level)
    if process == "flow":
        back = mixed - level.view(-1, 1, 1, 1) * target
    else:
        assert noise_process.alphas is not None
        alpha = noise_process.alphas[level].float().view(-1, 1, 1, 1)
        a, b = alpha.sqrt(), (1 - alpha).sqrt()
        back = (mixed - b * target) / a if process == "epsilon" else a * mixed - b * target
    torch.testing.assert_close(back, clean, rtol=1e-3, atol=1e-3)


@for_each(process=["flow", "epsilon", "v"], gamma=[1.0, 5.0])
def test_min_snr_weights_the_error_of_the_latents(process: str, gamma: float) -> None:
    """An error d of the prediction is an error of x0; min-SNR weights the square of that with min(SNR, gamma)."""
    noise_process = noising(process)
    level = FLOW_LEVELS if process == "flow" else STEPS
    found = weighting(None, gamma, process)(noise_process, level)
    snr = ((1 - level.double()) / level.double()) ** 2 if process == "flow" else noise_process.snr(level)
    of_x0 = {"flow": level.double() ** 2, "epsilon": 1 / snr, "v": 1 / (1 + snr)}[process]
    torch.testing.assert_close(found, snr.clamp(max=gamma) * of_x0)


@for_each(process=["flow", "epsilon", "v"])
def test_debiased_weights_epsilon_by_the_root_of_the_snr(process: str) -> None:
    """The error of epsilon is that of x0 times sqrt(SNR)."""
    noise_process = noising(process)
    level = FLOW_LEVELS[:4] if process == "flow" else STEPS[1:]
    snr = noise_process.snr(level)
    of_epsilon = {"flow": (1 - level.double()) ** 2, "epsilon": torch.ones(()), "v": snr / (1 + snr)}[process]
    found = weighting("debiased", None, process)(noise_process, level)
    torch.testing.assert_close(found, of_epsilon / snr.clamp(max=1000).sqrt())


def test_weights_at_zero_terminal_snr_are_finite() -> None:
    noise_process = noising("epsilon", rescale_betas_zero_snr=True)
    last = torch.tensor([999])
    assert noise_process.snr(last) < 1e-7
    for name in ("min_snr", "debiased"):
        assert weighting(name, None, "epsilon")(noise_process, last).isfinite().all()


def test_weights_that_are_not_defined_are_refused() -> None:
    with pytest.raises(UsageError, match="cosmap is for flow matching; this model predicts epsilon"):
        weighting("cosmap", None, "epsilon")
    with pytest.raises(UsageError, match="--snr_gamma has no effect with --loss_weighting none"):
        weighting("none", 5.0, "flow")
    s = torch.tensor([0.25])
    cosmap = weighting("cosmap", None, "flow")(noising("flow"), s)
    torch.testing.assert_close(cosmap, torch.tensor([2 / (math.pi * (1 - 0.5 + 0.125))], dtype=torch.float64))


def test_noise_levels_have_their_distribution_and_range() -> None:
    latents = torch.zeros(1, 4, 2, 2)

    def drawn(levels: Levels, process: str = "flow", shift: float = 1.0) -> Tensor:
        noise_process = noising(process, levels, shift)
        return torch.stack([noise_process.draw(latents, "level", number) for number in range(2000)])

    uniform = drawn(Levels())
    assert abs(uniform.mean() - 0.5) < 0.02
    assert uniform.dtype == torch.float32
    # The shift of the family; the median u of a distribution moves to k u / (1 + (k - 1) u).
    assert abs(drawn(Levels(), shift=3.0).median() - 0.75) < 0.02
    assert abs(drawn(Levels(shift=1.0), shift=3.0).median() - 0.5) < 0.03
    noisy = drawn(levels_of("logit_normal", LevelSampling(), 1.0, 0.5))
    assert abs(noisy.logit().mean() - 1.0) < 0.05
    assert abs(noisy.logit().std() - 0.5) < 0.05
    limited = drawn(Levels(low=0.2, high=0.4))
    assert 0.2 <= limited.min() < 0.21 < 0.39 < limited.max() <= 0.4
    steps = drawn(Levels(), "epsilon")
    assert (steps.dtype, int(steps.min()) < 5, int(steps.max()) > 994) == (torch.int64, True, True)
    assert drawn(Levels(low=0.5), "epsilon").min() >= 499
    family = LevelSampling("logit-normal", 0.3, 2.0)
    assert levels_of("family", family, 0.0, 1.0) == Levels("logit-normal", 0.3, 2.0)


def test_masked_out_pixels_have_no_gradient_and_the_others_the_usual_one() -> None:
    mask = torch.zeros(1, 16, 16)
    mask[:, :8, :12] = 1
    cover = cover_of(mask, torch.Size((1, 4, 2, 4)), 0.0)
    assert torch.equal(cover, torch.tensor([[[[1.0, 1, 1, 0], [0, 0, 0, 0]]]]))
    prediction = normal((1, 4, 2, 4), 1).requires_grad_()
    target = normal((1, 4, 2, 4), 2)
    squared_errors(prediction, target, cover).sum().backward()
    assert prediction.grad is not None
    covered = cover.bool().expand_as(prediction)
    assert (prediction.grad[~covered] == 0).all()
    torch.testing.assert_close(prediction.grad[covered], (2 * (prediction - target) / 12).detach()[covered])
    # A mean over what is covered: of equal errors it is their square, however small the mask.
    assert squared_errors(target + 3, target, cover).item() == pytest.approx(9)
    # What is not covered may even be infinite.
    infinite = torch.where(covered, target, torch.inf)
    assert squared_errors(infinite, target, cover).item() == 0
    half = cover_of(mask, torch.Size((1, 4, 2, 4)), 0.25)
    assert set(half.unique().tolist()) == {0.25, 1.0}
    # Without any cover there is nothing to learn.
    assert squared_errors(target + 1, target, torch.zeros(1, 1, 2, 4)).item() == 0


def test_random_numbers_depend_on_their_key_alone() -> None:
    assert torch.equal(normal((2, 3), 0, "a", 1), normal((2, 3), 0, "a", 1))
    keys = [(seed, stream, number, what) for seed in (0, 1) for stream in "ab" for number in range(3) for what in "xy"]
    assert len({seed_of(*key) for key in keys}) == len(keys)
    assert 0 <= seed_of("x") < 2**63
    torch.manual_seed(0)
    before = torch.get_rng_state()
    torch.randn(3, generator=generator(1))
    assert torch.equal(before, torch.get_rng_state())
