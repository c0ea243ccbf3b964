"""An objective judge of the embedded pipeline: does a picture show what its prompt says?

A small CNN learns to read shape, colour, background, size and position from drawn pictures, and then reads them from
generated ones. The content of drawn pictures is known, so no labelling is needed, and training takes a minute or two.
"""

from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageDraw
from tiny_world import COLOURS, POSITIONS, RADII, SHAPES, SIZE, Scene, caption, draw, sample_scene, to_image
from torch import Tensor, nn
from tqdm import tqdm

ATTRIBUTES: dict[str, list[str]] = {
    "colour": list(COLOURS),
    "shape": list(SHAPES),
    "background": list(COLOURS),
    "size": list(RADII),
    "position": list(POSITIONS),
}
REQUIRED = ("colour", "shape", "background")
PASS = 0.9
STEPS = 20
GUIDANCE = 2.5


class Judge(nn.Module):
    """A plain CNN with one linear head per attribute. Its last feature map is 4 x 4, which keeps coarse positions."""

    def __init__(self) -> None:
        super().__init__()
        channels = (3, 24, 48, 64, 64)
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(channels):
            layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
        self.features = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 16, 128), nn.ReLU())
        self.heads = nn.ModuleDict({key: nn.Linear(128, len(values)) for key, values in ATTRIBUTES.items()})

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        features = self.features(pictures * 2 - 1)
        return {key: head(features) for key, head in self.heads.items()}


def _roughen(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Return pictures with blur, noise and colour casts, so that the judge does not rely on exact edges."""
    blurred = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    amount = torch.rand((len(pictures), 1, 1, 1), generator=generator)
    noise = torch.randn(pictures.shape, generator=generator) * 0.06
    cast = torch.randn((len(pictures), 3, 1, 1), generator=generator) * 0.03
    return torch.lerp(pictures, blurred, amount) + noise + cast


def train_judge(steps: int, seed: int, batch: int = 64) -> Judge:
    """Train a judge on drawn pictures."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge = Judge()
    optimizer = torch.optim.AdamW(judge.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in tqdm(range(steps), "judge", mininterval=5):
        scenes = [sample_scene(generator) for _ in range(batch)]
        answers = judge(_roughen(torch.stack([draw(scene) for scene in scenes]), generator))
        losses = [F.cross_entropy(answers[key], _labels(scenes, key)) for key in ATTRIBUTES]
        torch.stack(losses).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return judge.eval()


def _labels(scenes: list[Scene], attribute: str) -> Tensor:
    """Return the class index of an attribute for every scene, (N,)."""
    return torch.tensor([ATTRIBUTES[attribute].index(getattr(scene, attribute)) for scene in scenes])


def load_judge(work: Path, seed: int = 0, steps: int = 800) -> Judge:
    """Return the judge saved in folder `work`; train and save it first if there is none."""
    path = work / "judge.pt"
    if path.exists():
        judge = Judge()
        judge.load_state_dict(torch.load(path))
        return judge.eval()
    judge = train_judge(steps, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(judge.state_dict(), path)
    return judge


def _prompts(count: int, seed: int) -> tuple[list[Scene], list[str]]:
    """Return random scenes and a caption for each."""
    generator = torch.Generator().manual_seed(seed + 1000)
    scenes = [sample_scene(generator) for _ in range(count)]
    return scenes, [caption(scene, generator) for scene in scenes]


@torch.no_grad()
def _generate(pipeline: StableDiffusionPipeline, prompts: list[str], seed: int, batch: int = 10) -> Tensor:
    """Generate one picture per prompt, (N, 3, 64, 64). Picture i has the seed `seed + i` for every batch size."""
    pictures = []
    for first in tqdm(range(0, len(prompts), batch), "generate"):
        chunk = prompts[first : first + batch]
        generators = [torch.Generator().manual_seed(seed + first + number) for number in range(len(chunk))]
        images = pipeline(
            chunk,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            generator=generators,
            output_type="pt",
        ).images
        pictures.append(images.cpu())
    return torch.cat(pictures)


def _load_pipeline(folder: Path, device: torch.device) -> StableDiffusionPipeline:
    """Load a pipeline from a folder, without progress bars."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True).to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _is_mentioned(scene: Scene, attribute: str, prompt: str) -> bool:
    """Return whether a prompt mentions an attribute. The picture is free to choose those it does not mention."""
    if attribute == "size":
        return scene.size in prompt
    if attribute == "position":
        return any(phrase in prompt for phrase in POSITIONS[scene.position][1])
    return True


@torch.no_grad()
def accuracies(judge: Judge, pictures: Tensor, scenes: list[Scene], prompts: list[str]) -> dict[str, float]:
    """Return, per attribute, the share of pictures that show what their prompt says, of those that mention it."""
    answers = judge(pictures)
    result = {}
    for key in ATTRIBUTES:
        right = answers[key].argmax(1) == _labels(scenes, key)
        asked = [_is_mentioned(scene, key, prompt) for scene, prompt in zip(scenes, prompts, strict=True)]
        result[key] = right[torch.tensor(asked)].float().mean().item()
    return result


def evaluate(folder: Path, work: Path, device: torch.device, seed: int, count: int = 100) -> int:
    """Print the accuracies on drawn and generated pictures. Return 1 if a required one is below `PASS`, else 0."""
    judge = load_judge(work)
    scenes, prompts = _prompts(count, seed)
    drawn = accuracies(judge, torch.stack([draw(scene) for scene in scenes]), scenes, prompts)
    made = accuracies(judge, _generate(_load_pipeline(folder, device), prompts, seed), scenes, prompts)
    print(f"{'attribute':<12}{'drawn':>8}{'generated':>12}{'required':>11}")
    for key in ATTRIBUTES:
        required = f"{PASS:>11.0%}" if key in REQUIRED else ""
        print(f"{key:<12}{drawn[key]:>8.0%}{made[key]:>12.0%}{required}")
    return int(any(made[key] < PASS for key in REQUIRED))


def write_contact_sheet(folder: Path, path: Path, device: torch.device, seed: int, columns: int = 6) -> None:
    """Generate pictures and save them as one sheet, each above its prompt."""
    _, prompts = _prompts(columns * 6, seed)
    pictures = _generate(_load_pipeline(folder, device), prompts, seed)
    side, text_height = 2 * SIZE, 40
    sheet = Image.new("RGB", ((side + 8) * columns, (side + text_height) * len(prompts) // columns), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (picture, prompt) in enumerate(zip(pictures, prompts, strict=True)):
        left, top = number % columns * (side + 8) + 4, number // columns * (side + text_height)
        image = to_image(picture)
        sheet.paste(image.resize((side, side), Image.Resampling.NEAREST), (left, top))
        pen.multiline_text((left, top + side + 2), _wrap(prompt), fill="black", font_size=10, spacing=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def _wrap(text: str, width: int = 24) -> str:
    """Break a text into lines of at most `width` characters."""
    lines = [""]
    for word in text.split():
        lines[-1:] = [lines[-1] + " " + word] if len(lines[-1] + word) < width else [lines[-1], word]
    return "\n".join(line.strip() for line in lines)
