"""Train the embedded text-to-image pipeline from scratch, on pictures drawn by `tiny_world`.

No weights can be downloaded where the checks run, so the project carries its own Stable Diffusion in miniature, made of
classes of diffusers and transformers. Without options, this script trains every stage and saves the pipeline. If it is
interrupted, the same command continues from the last checkpoint.

    python scripts/train_tiny_pipeline.py                      # train, about 100 minutes on two CPU cores
    python scripts/train_tiny_pipeline.py --evaluate --grid sheet.png

The stages are `vae` (encoder and decoder together), `decoder` (alone, with the encoder frozen), `unet` (together with
the text encoder, in the latent space of that encoder) and `export`. Once `vae` is done, `decoder` and `unet` may run in
two processes at the same time.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tiny_judge
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from tiny_models import (
    LATENT_FACTOR,
    build_scheduler,
    build_text_encoder,
    build_tokenizer,
    build_unet,
    build_vae,
    seeded,
    write_vocabulary,
)
from tiny_training import Run, train
from tiny_world import (
    COLOURS,
    POSITIONS,
    SHAPES,
    STYLES,
    Scene,
    caption,
    coverage,
    draw,
    draw_doodle,
    sample_scene,
)
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

STAGES = ("vae", "decoder", "unet", "export")
CAPTION_DROPOUT = 0.1


# --- the stages -------------------------------------------------------------------------------------------


def draw_for_vae(count: int, generator: torch.Generator) -> Tensor:
    """Return pictures in -1..1 for the VAE: half scenes in all looks, half doodles.

    The VAE has to keep looks that the base model never learns, so that adapters can produce them.
    """
    looks = [draw, draw, *STYLES.values()]
    pictures = [looks[number % 4](sample_scene(generator)) for number in range(count // 2)]
    pictures += [draw_doodle(generator) for _ in range(count - len(pictures))]
    return torch.stack(pictures) * 2 - 1


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """Return L1 and squared error, for colours, plus the error of differences of neighbours, for sharp edges."""
    error = output.float() - target
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + error.square().mean() + edges


def train_vae(run: Run, steps: int) -> None:
    """Train encoder and decoder together."""
    vae = seeded(build_vae, run.seed).to(run.device)
    vae.set_attn_processor(AttnProcessor())

    def loss_of(_step: int, generator: torch.Generator) -> Tensor:
        pictures = draw_for_vae(run.batch, generator).to(run.device)
        with run.autocast():
            posterior = vae.encode(pictures).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator).to(run.device)
            output = vae.decode(posterior.mean + posterior.std * noise).sample
        mean, log_variance = posterior.mean.float(), posterior.logvar.float()
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        return reconstruction_loss(output, pictures) + 5e-4 * divergence

    train("vae", vae, loss_of, steps, run, learning_rate=2e-3)


def load_vae(run: Run, with_decoder: bool = True) -> AutoencoderKL:
    """Return the trained VAE, by default with the decoder of the stage `decoder` if that has been trained."""
    vae = build_vae().to(run.device)
    path = run.work / "decoder.pt"
    if not (with_decoder and path.exists()):
        path = run.work / "vae.pt"
    vae.load_state_dict(torch.load(path, map_location=run.device)["model"])
    return vae


def train_decoder(run: Run, steps: int) -> None:
    """Train the decoder further. The encoder is frozen, so the latent space stays the one the UNet is trained in."""
    vae = load_vae(run, with_decoder=False)
    vae.set_attn_processor(AttnProcessor())
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)

    def loss_of(_step: int, generator: torch.Generator) -> Tensor:
        pictures = draw_for_vae(run.batch, generator).to(run.device)
        with run.autocast():
            with torch.no_grad():
                latents = vae.encode(pictures).latent_dist.mean
            # A little noise makes the decoder forgiving about latents that a UNet, not the encoder, made.
            latents = latents + 0.05 * torch.randn(latents.shape, generator=generator).to(run.device)
            output = vae.decode(latents).sample
        return reconstruction_loss(output, pictures)

    train("decoder", vae, loss_of, steps, run)


@dataclass(frozen=True)
class LatentSet:
    """Pre-encoded pictures, the easy scenes first.

    Attributes:
        scenes: scene of every picture.
        latents: scaled latents of every picture.
        weights: weight of every latent pixel in the loss.
        easy: number of easy scenes.
    """

    scenes: list[Scene]
    latents: Tensor
    weights: Tensor
    easy: int


def latent_scale(vae: AutoencoderKL, run: Run) -> float:
    """Return the factor that gives latents unit variance, measured on 256 fixed pictures."""
    generator = run.generator(2)
    pictures = torch.stack([draw(sample_scene(generator)) for _ in range(256)]).to(run.device)
    return round(1 / vae.encode(pictures * 2 - 1).latent_dist.mean.std().item(), 4)


@torch.no_grad()
def encode_world(run: Run, count: int) -> LatentSet:
    """Draw and encode the training set. The loss weighs 4x where the shape is, since shapes are learned last."""
    vae = load_vae(run, with_decoder=False)
    generator = run.generator(1)
    easy = count // 2
    scenes = [sample_scene(generator, easy=number < easy) for number in range(count)]
    latents, weights = [], []
    for first in tqdm(range(0, count, 64), "encode", mininterval=10):
        batch = scenes[first : first + 64]
        pictures = torch.stack([draw(scene) for scene in batch]).to(run.device) * 2 - 1
        latents.append(vae.encode(pictures).latent_dist.mean)
        masks = torch.stack([coverage(scene) for scene in batch])
        weights.append(1 + 3 * F.max_pool2d(masks[:, None], LATENT_FACTOR))
    return LatentSet(scenes, torch.cat(latents) * latent_scale(vae, run), torch.cat(weights).to(run.device), easy)


def tokenize(tokenizer: CLIPTokenizer, captions: list[str], device: torch.device) -> Tensor:
    """Return the token ids of captions, padded to the model's maximum length."""
    return tokenizer(captions, padding="max_length", return_tensors="pt").input_ids.to(device)


def pretrain_text_encoder(tokenizer: CLIPTokenizer, run: Run, steps: int) -> CLIPTextModel:
    """Train the text encoder to tell captions apart: it takes a minute, and the UNet learns faster from then on."""
    encoder = seeded(lambda: build_text_encoder(tokenizer), run.seed)
    names = {"shape": list(SHAPES), "colour": list(COLOURS), "background": list(COLOURS), "position": list(POSITIONS)}
    heads = seeded(lambda: nn.ModuleDict({key: nn.Linear(64, len(value)) for key, value in names.items()}), run.seed)
    model = nn.ModuleDict({"encoder": encoder, "heads": heads}).to(run.device)

    def loss_of(_step: int, generator: torch.Generator) -> Tensor:
        scenes = [sample_scene(generator) for _ in range(run.batch * 2)]
        tokens = tokenize(tokenizer, [caption(scene, generator) for scene in scenes], run.device)
        hidden = encoder(tokens).last_hidden_state.mean(1)
        losses = []
        for key, values in names.items():
            target = torch.tensor([values.index(getattr(scene, key)) for scene in scenes], device=run.device)
            losses.append(F.cross_entropy(heads[key](hidden), target))
        return torch.stack(losses).sum()

    train("text", model, loss_of, steps, run)
    return encoder


def train_unet(run: Run, steps: int, count: int, text_steps: int) -> None:
    """Train the UNet and the text encoder together. Hard scenes are mixed in after the first third."""
    tokenizer = build_tokenizer()
    text_encoder = pretrain_text_encoder(tokenizer, run, text_steps)
    unet = seeded(build_unet, run.seed).to(run.device)
    unet.set_attn_processor(AttnProcessor())  # on a CPU this is a third faster to train than SDPA
    model = nn.ModuleDict({"unet": unet, "text_encoder": text_encoder})
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.998))
    scheduler = build_scheduler()
    data = encode_world(run, count)

    def loss_of(step: int, generator: torch.Generator) -> Tensor:
        chosen = _choose_pictures(data, run.batch, step / steps, generator)
        captions = [_caption_or_nothing(data.scenes[number], generator) for number in chosen.tolist()]
        latents = data.latents[chosen.to(run.device)]
        noise = torch.randn(latents.shape, generator=generator).to(run.device)
        # Noisy timesteps are drawn more often than clean ones: they decide what the picture shows.
        times = (1000 * torch.rand(run.batch, generator=generator) ** 0.7).long().to(run.device)
        with run.autocast():
            hidden = text_encoder(tokenize(tokenizer, captions, run.device)).last_hidden_state
            velocity = unet(scheduler.add_noise(latents, noise, times), times, hidden).sample
        error = velocity.float() - scheduler.get_velocity(latents, noise, times)
        weights = data.weights[chosen.to(run.device)]
        return (weights * error.square()).mean() / weights.mean()

    train("unet", model, loss_of, steps, run, average=average)


def _choose_pictures(data: LatentSet, count: int, progress: float, generator: torch.Generator) -> Tensor:
    """Return random indices of training pictures, (count,)."""
    hard_share = 0.5 if progress > 1 / 3 else 0.0
    easy = torch.randint(data.easy, (count,), generator=generator)
    hard = torch.randint(data.easy, len(data.scenes), (count,), generator=generator)
    return torch.where(torch.rand(count, generator=generator) < hard_share, hard, easy)


def _caption_or_nothing(scene: Scene, generator: torch.Generator) -> str:
    """Return a caption, or at times an empty one: classifier-free guidance needs an unconditional prediction."""
    words = caption(scene, generator)
    return "" if torch.rand((), generator=generator) < CAPTION_DROPOUT else words


@torch.no_grad()
def export(run: Run, output: Path) -> None:
    """Assemble the pipeline from the checkpoints, with averaged weights, and save it in half precision."""
    tokenizer = build_tokenizer()
    unet, text_encoder = build_unet(), build_text_encoder(tokenizer)
    model = nn.ModuleDict({"unet": unet, "text_encoder": text_encoder})
    average = AveragedModel(model)
    state = torch.load(run.work / "unet.pt", map_location="cpu")
    average.load_state_dict(state["average"])
    model.load_state_dict(average.module.state_dict())
    vae = load_vae(run)
    vae.register_to_config(scaling_factor=latent_scale(vae, run))
    # The text encoder stays in float32: unlike diffusers, transformers loads weights in their saved dtype by default,
    # so a pipeline loaded without a dtype would mix float32 and float16.
    pipeline = StableDiffusionPipeline(
        vae=vae.half(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet.half(),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(output)
    write_vocabulary(output / "tokenizer")


# --- command line -----------------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("examples/tiny_pipeline"), help="folder of the pipeline")
    parser.add_argument("--work", type=Path, default=Path(".cache/tiny"), help="folder of checkpoints and of the judge")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="stages to run")
    parser.add_argument("--evaluate", action="store_true", help="judge the saved pipeline instead of training")
    parser.add_argument("--grid", type=Path, help="write a labelled contact sheet of the saved pipeline")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, pictures and noise")
    parser.add_argument("--device", default="auto", help="device to train on (default: CUDA if there is one)")
    parser.add_argument("--threads", type=int, help="CPU threads (on a busy machine 1 can be faster than 2)")
    parser.add_argument("--float32", action="store_true", help="train without bfloat16 autocast")
    parser.add_argument("--batch", type=int, default=16, help="pictures per step")
    parser.add_argument("--pictures", type=int, default=6000, help="pre-encoded pictures to train the UNet on")
    parser.add_argument("--vae-steps", type=int, default=1200, help="training steps of the VAE")
    parser.add_argument("--decoder-steps", type=int, default=1800, help="training steps of the decoder alone")
    parser.add_argument("--text-steps", type=int, default=600, help="training steps of the text encoder alone")
    parser.add_argument("--unet-steps", type=int, default=8000, help="training steps of UNet and text encoder")
    return parser.parse_args()


def run_stages(arguments: argparse.Namespace, run: Run) -> None:
    """Run the chosen stages in their order."""
    run.work.mkdir(parents=True, exist_ok=True)
    stages: dict[str, Callable[[], None]] = {
        "vae": lambda: train_vae(run, arguments.vae_steps),
        "decoder": lambda: train_decoder(run, arguments.decoder_steps),
        "unet": lambda: train_unet(run, arguments.unet_steps, arguments.pictures, arguments.text_steps),
        "export": lambda: export(run, arguments.output),
    }
    for stage in STAGES:
        if stage in arguments.stages:
            stages[stage]()


def main() -> int:
    """Train, or evaluate and draw the saved pipeline; return the exit status."""
    arguments = parse_arguments()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    automatic = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(automatic if arguments.device == "auto" else arguments.device)
    precision = torch.float32 if arguments.float32 else torch.bfloat16
    run = Run(arguments.work, device, precision, arguments.seed, arguments.batch)
    if not (arguments.evaluate or arguments.grid):
        run_stages(arguments, run)
        return 0
    if arguments.grid:
        tiny_judge.write_contact_sheet(arguments.output, arguments.grid, device, arguments.seed)
    if arguments.evaluate:
        return tiny_judge.evaluate(arguments.output, arguments.work, device, arguments.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
