"""Adapters of every type on quantised convolutions and embeddings, and on cast weights: right, or refused."""

import pytest
import torch
from torch import Tensor, nn

from tests.support.base_judge import KINDS, STEPS, judge
from tests.support.bases import CAST, CONVOLUTIONS, EMBEDDINGS, PLAIN, Base, float_layer, silenced
from tests.support.cases import for_each

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("base", [*CONVOLUTIONS, *EMBEDDINGS, *CAST], ids=lambda base: base.name)
def test_no_step_is_silently_wrong(base: Base) -> None:
    base.layer()  # skips if the backend is not installed

    @for_each(kind=KINDS)
    def check(kind: str) -> None:
        with silenced():
            ours = judge(base, kind, peer=False).ours
        # Whether a cast convolution raises an error in its backward pass depends on the kernels of torch.
        raised = ours["train"].startswith("warns") and "layerwise casting" in ours["train"]
        cells = [ours[step] for step in STEPS if not (raised and step == "train")]
        assert not [cell for cell in cells if cell.startswith(("wrong", "warns"))], ours
        if ours["load"] == "-":
            assert base.kind == "embedding"
        elif base.kind == "embedding" and kind == "GLoRA":
            assert "an embedding has no inputs" in ours["load"]
        else:
            assert [ours[step] for step in STEPS[:3]] == ["yes"] * 3
            assert (ours["merge"] == "yes") == (base.merges or kind == "bias"), ours["merge"]
            assert ours["train"] == "yes" or "gradient" in ours["train"]

    check()


class Tripled(nn.Linear):
    """A layer whose output does not follow its weight."""

    calls = 0

    def forward(self, input: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(input) * self.calls


def _tripled(weight: Tensor, bias: Tensor) -> nn.Module:
    layer = Tripled(*weight.shape[::-1])
    layer.load_state_dict({"weight": weight, "bias": bias})
    return layer.requires_grad_(False)


def test_the_judge_sees_what_is_wrong() -> None:
    with silenced(), torch.random.fork_rng():
        assert set(judge(PLAIN[0], "LoRA", peer=False).ours.values()) == {"yes"}
        odd = judge(Base("odd", "", _tripled, 1e-6), "LoRA", peer=False).ours
    assert odd["load"] == "yes"
    assert odd["run"].startswith("wrong")


def test_plain_diffusers_is_judged_by_the_same_measure() -> None:
    found = judge(Base("float32", "", float_layer, 1e-6), "LoRA").diffusers
    assert (found["load"], found["run"], found["train"]) == ("yes", "yes", "yes")
    # It takes the change out again by subtraction.
    assert "does not restore every bit" in found["merge"]
