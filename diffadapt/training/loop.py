"""The training loop: optimizer steps, with checkpoints, measurements and preview pictures in between."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from diffadapt.errors import Diverged
from diffadapt.runtime.adapter import Adapter
from diffadapt.training import checkpoint
from diffadapt.training.data.draws import INSTANCE, Draw
from diffadapt.training.data.samples import Sample, Samples, Stream
from diffadapt.training.data.sheets import labelled_sheet
from diffadapt.training.ema import Average, write_values
from diffadapt.training.history import Bands, History, Smoothed
from diffadapt.training.objective import Objective
from diffadapt.training.optimisers import build_optimizer, learning, parameter_groups, rate_factor
from diffadapt.training.options import TrainingOptions
from diffadapt.training.processes import mean_of, sum_gradients
from diffadapt.training.randomness import seed_of

DIVERGED_ADVICE = "lower --learning_rate, or train with --mixed_precision bf16 or no instead of fp16"
_HELD_OUT_SHARES = (0.25, 0.5, 0.75)


class Setup(Protocol):
    """What the loop needs of a run; see `run.py`."""

    options: TrainingOptions
    accelerator: Accelerator
    device: torch.device
    dtype: torch.dtype
    turn: tuple[int, int]
    samples: Samples
    held_out: Stream
    prompts: list[str]

    @property
    def steps(self) -> int:
        """The number of optimizer steps."""
        ...

    def say(self, text: str) -> None:
        """Print a text, once for all processes."""
        ...

    def fingerprint(self) -> dict[str, Any]:
        """Return what a resumed run must have in common with this one."""
        ...

    def draw(self, prompts: list[str], seeds: list[int], *, guidance: float | None) -> list[Image.Image]:
        """Draw one picture per prompt and seed."""
        ...

    def save(self, folder: Path) -> Path:
        """Write the adapter to a folder."""
        ...


class Loop:
    """The loop of a run.

    Attributes:
        adapters: the adapters by component name.
        history: what happened.
        last_preview: the first picture of the last preview sheet.
    """

    def __init__(
        self,
        run: Setup,
        objective: Objective,
        adapters: Mapping[str, Adapter],
        words: Sequence[Tensor],
        history: History,
    ) -> None:
        """Make the loop; `words` are the parameters of new words, which have a learning rate of their own."""
        self.setup = run
        self.options = run.options
        self.objective = objective
        self.adapters = dict(adapters)
        self.history = history
        self.last_preview: Image.Image | None = None
        self.step = 0
        groups = parameter_groups(self.options, self.adapters, words)
        self.parameters: list[Tensor] = [parameter for group in groups for parameter in group["params"]]
        self.optimizer = build_optimizer(self.options, groups)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.factor = rate_factor(self.options, run.steps)
        decay = self.options.ema_decay
        self.average = None if decay is None else Average(self.parameters, decay)
        self.scaler = torch.amp.GradScaler(run.device.type, enabled=run.dtype == torch.float16)
        self._fresh = [
            {name: value for name, value in group.items() if name != "params"} for group in self.optimizer.param_groups
        ]
        self._unused = {
            f"{component}.{path}": layer
            for component, adapter in self.adapters.items()
            for path, layer in adapter.layers.items()
        }

    def resume(self, folder: Path, changed: Sequence[str]) -> None:
        """Continue from a checkpoint.

        Args:
            folder: the checkpoint.
            changed: the options that differ from those of the checkpoint, which the user has accepted.

        Raises:
            UsageError: it was made with other layers, or is damaged.
        """
        state, run = checkpoint.load(folder, self.adapters)
        self.optimizer.load_state_dict(state["optimizer"])
        if changed:
            # The state has the settings of the run before, which would silently outlive the accepted changes.
            for group, fresh in zip(self.optimizer.param_groups, self._fresh, strict=True):
                group.update({name: value for name, value in fresh.items() if name in _SETTINGS})
            self.setup.say(f"continuing with other options than before: {', '.join(changed)}")
        self.scaler.load_state_dict(state["scaler"])
        if self.average is not None and state["average"] is not None:
            self.average.load_state_dict(state["average"])
        self.history = History.of(run["history"])
        self.step = checkpoint.step_of(folder)
        self.setup.say(f"resuming from {folder}")

    def run(self) -> None:
        """Train until the last step."""
        options, setup = self.options, self.setup
        total, accumulation = setup.steps, options.gradient_accumulation_steps
        rank, processes = setup.turn
        first = self.step * accumulation * processes + rank
        batches = setup.samples.batches(options.train_batch_size, first, processes, options.dataloader_num_workers)
        quiet = not setup.accelerator.is_local_main_process
        self._training(True)
        smoothed = Smoothed()
        if self.step == 0 and options.validation_prompt:
            self._preview()
        with tqdm(initial=self.step, total=total, desc="train", disable=quiet) as progress:
            while self.step < total:
                loss = self._step([next(batches) for _ in range(accumulation)])
                progress.set_postfix(loss=f"{smoothed.add(loss):.4f}", lr=f"{self._rate(self.step - 1):.2e}")
                progress.update()
                self._after_step(self.step == total)
        self._training(False)
        self._tell_unused()
        if self.average is not None:
            self.average.write()

    def _step(self, batches: Sequence[Sequence[Sample]]) -> float:
        """Take one optimizer step and return the loss."""
        factor = self.factor(self.step)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        share = 1 / (len(batches) * self.setup.turn[1])
        bands = Bands(self.setup.device)
        total, prior = torch.zeros(()), torch.zeros(())
        for samples in batches:
            first = samples[0].draw
            # Dropout inside the adapter draws from the global generators.
            torch.manual_seed(seed_of(self.options.seed, first.stream, first.number, "dropout"))
            losses = self.objective(samples)
            self.scaler.scale(losses.total * share).backward()
            total = total + losses.total.detach().float().cpu() / len(batches)
            prior = prior + (0 if losses.prior is None else losses.prior.float().cpu() / len(batches))
            bands.add(losses.levels, losses.samples)
        loss = float(mean_of(total.to(self.setup.device)))
        if not math.isfinite(loss):
            self._diverged(loss)
        sum_gradients(self.parameters)
        self._note_used()
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.options.max_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update()
        self.step += 1
        entry = {"step": self.step, "loss": loss, "lr": self._rate(self.step - 1), "gradient_norm": float(norm)}
        entry |= bands.means() | ({"prior": float(mean_of(prior.to(self.setup.device)))} if self.setup.prompts else {})
        self.history.steps.append(entry)
        self.setup.accelerator.log({k: v for k, v in entry.items() if k != "step"}, step=self.step)
        return loss

    def _after_step(self, last: bool) -> None:
        options = self.options
        shown = self.step % options.validation_steps == 0 or last
        if self.setup.held_out.examples and shown:
            self._measure()
        if options.validation_prompt and shown:
            self._preview()
        if self.step % options.checkpointing_steps == 0:
            self._checkpoint()

    def _checkpoint(self) -> None:
        self.setup.accelerator.wait_for_everyone()
        if self.setup.accelerator.is_main_process:
            learning(self.optimizer, True)
            average = None if self.average is None else self.average.state_dict()
            state = {
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "average": average,
            }
            checkpoint.save(
                Path(self.options.output_dir),
                self.step,
                adapters=self.adapters,
                state=state,
                run={"options": self.setup.fingerprint(), "history": self.history.state()},
                write_file=self._write_file,
                limit=self.options.checkpoints_total_limit,
            )
        self.setup.accelerator.wait_for_everyone()

    def _write_file(self, folder: Path) -> None:
        with self._for_use():
            self.setup.save(folder)

    def _preview(self) -> None:
        """Draw the validation prompt with the same seeds every time, so that steps can be compared."""
        options = self.options
        assert options.validation_prompt is not None
        if self.setup.accelerator.is_main_process:
            seeds = [options.seed + number for number in range(options.num_validation_images)]
            with self._for_use():
                images = [
                    self.setup.draw([options.validation_prompt], [seed], guidance=options.validation_guidance_scale)[0]
                    for seed in seeds
                ]
            labels = [f"seed {seed}" for seed in seeds]
            sheet = labelled_sheet(images, labels, f"step {self.step}: {options.validation_prompt}")
            name = f"validation-{self.step:06d}.png"
            sheet.save(Path(options.output_dir) / name)
            self.last_preview = images[0]
            self.history.previews = [entry for entry in self.history.previews if entry["step"] != self.step]
            self.history.previews.append({"step": self.step, "file": name})
        self.setup.accelerator.wait_for_everyone()

    @torch.no_grad()
    def _measure(self) -> None:
        """Measure the loss of held-out pictures at fixed noise, which shows when a run begins to overfit."""
        samples = self._held_out_samples()
        entry: dict[str, float] = {"step": self.step}
        with self._for_use():
            for share in _HELD_OUT_SHARES:
                errors: list[float] = []
                for number in range(len(self.setup.held_out.examples)):
                    sample = samples[Draw(INSTANCE, -1 - number, number)]
                    noised = self.objective.noised(sample, share)
                    error = self.objective.errors(
                        [noised],
                        [samples.variants.with_trigger(samples.streams[INSTANCE].examples[number].caption)],
                        [noised.target],
                    )
                    errors.append(float(error.mean()))
                entry[f"held_out_{share}"] = sum(errors) / len(errors)
        self.history.held_out.append(entry)
        self.setup.accelerator.log({k: v for k, v in entry.items() if k != "step"}, step=self.step)

    def _held_out_samples(self) -> Samples:
        held_out = self.setup.held_out
        return Samples({INSTANCE: held_out}, self.setup.samples.options, self.setup.samples.variants)

    def _for_use(self) -> Any:
        """Return a context in which the adapters are as they would be saved: averaged, without dropout."""
        return _ForUse(self)

    def _training(self, yes: bool) -> None:
        """Switch the adapters between training and use. The base model always stays in evaluation mode."""
        for adapter in self.adapters.values():
            adapter.train(yes)
        learning(self.optimizer, yes)

    def _rate(self, step: int) -> float:
        return self.rates[0] * self.factor(step)

    def _diverged(self, loss: float) -> None:
        last = next(reversed(checkpoint.list_checkpoints(Path(self.options.output_dir))), None)
        from_here = f"; the last checkpoint is {last}" if last else ""
        raise Diverged(f"the loss is {loss} in step {self.step + 1}: {DIVERGED_ADVICE}{from_here}")

    def _note_used(self) -> None:
        """Take note of the layers that have a part in the loss."""
        if self._unused:
            self._unused = {
                path: layer
                for path, layer in self._unused.items()
                if all(p.grad is None for p in layer.parameters() if p.requires_grad)
            }

    def _tell_unused(self) -> None:
        """Say which layers had no part in the loss in any step: they are as they were."""
        names = list(self._unused)
        if names and self.step:
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            self.setup.say(f"note: these layers have no part in the loss and stayed unchanged: {shown}")


class _ForUse:
    """The adapters as they would be saved, inside a `with` block. Afterwards every bit is as before."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.kept: list[Tensor] = []

    def __enter__(self) -> None:
        self.kept = [parameter.detach().clone() for parameter in self.loop.parameters]
        self.loop._training(False)
        if self.loop.average is not None:
            self.loop.average.write()

    def __exit__(self, *error: Any) -> None:
        self.loop._training(True)
        write_values(self.loop.parameters, self.kept)


_SETTINGS = ("lr", "betas", "eps", "weight_decay", "momentum")
