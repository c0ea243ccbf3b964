"""Optimisers by name, their parameter groups, and the learning rate as a function of the step."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from diffadapt.errors import UsageError
from diffadapt.runtime.adapter import Adapter
from diffadapt.training.options import TrainingOptions, default_of

NAMES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "adamw": ("torch.optim", "AdamW", {}),
    "adamw_fused": ("torch.optim", "AdamW", {"fused": True}),
    "adafactor": ("torch.optim", "Adafactor", {}),
    "sgd": ("torch.optim", "SGD", {}),
    "muon": ("torch.optim", "Muon", {}),
    "adamw8bit": ("bitsandbytes.optim", "AdamW8bit", {}),
    "paged_adamw8bit": ("bitsandbytes.optim", "PagedAdamW8bit", {}),
    "lion8bit": ("bitsandbytes.optim", "Lion8bit", {}),
    "torchao_adamw8bit": ("torchao.optim", "AdamW8bit", {}),
    "torchao_adamw4bit": ("torchao.optim", "AdamW4bit", {}),
    "prodigy": ("prodigyopt", "Prodigy", {}),
    "prodigy_schedulefree": ("prodigyplus", "ProdigyPlusScheduleFree", {}),
    "schedulefree": ("schedulefree", "AdamWScheduleFree", {}),
    "dadaptadam": ("dadaptation", "DAdaptAdam", {}),
    "lion": ("lion_pytorch", "Lion", {}),
    "came": ("came_pytorch", "CAME", {}),
}
"""Name -> module, class, and arguments."""

PACKAGES = {
    "bitsandbytes": "bitsandbytes",
    "torchao": "torchao",
    "prodigyopt": "prodigyopt",
    "prodigyplus": "prodigy-plus-schedule-free",
    "schedulefree": "schedulefree",
    "dadaptation": "dadaptation",
    "lion_pytorch": "lion-pytorch",
    "came_pytorch": "came-pytorch",
}
"""Module -> package to install."""

_ADAM = {"adam_beta1": None, "adam_beta2": None, "adam_weight_decay": "weight_decay", "adam_epsilon": "eps"}
_OWN_RATE = ("prodigy", "dadapt")
"""Parts of names of optimisers that find their learning rate, which is told as 1."""


def optimizer_class(name: str) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """Return the class of an optimiser and arguments that its name stands for.

    Args:
        name: a name of `NAMES`, or `module.Class`.

    Raises:
        UsageError: the name is unknown, or its package is missing.
    """
    module, cls, further = NAMES.get(name.lower(), (*name.rpartition(".")[::2], {}))
    if not module:
        raise UsageError(f"--optimizer {name} is unknown; use one of {', '.join(NAMES)}, or module.Class")
    try:
        return getattr(import_module(module), cls), dict(further)
    except ImportError as error:
        package = PACKAGES.get(module.partition(".")[0], module.partition(".")[0])
        raise UsageError(f"--optimizer {name} needs the package {package}: pip install {package} ({error})") from error
    except AttributeError as error:
        raise UsageError(f"--optimizer {name}: {module} has no {cls}") from error


def check_optimizer(options: TrainingOptions) -> None:
    """Raise `UsageError` if the optimiser cannot be used with the other options."""
    name = options.optimizer.lower()
    optimizer_class(options.optimizer)
    changed = [key for key in _ADAM if getattr(options, key) != default_of(key)]
    if changed and "adamw" not in name:
        raise UsageError(
            f"--{changed[0]} has no effect with --optimizer {options.optimizer}; pass its own arguments with "
            "--optimizer_args name=value"
        )
    if any(part in name for part in _OWN_RATE):
        if options.learning_rate < 0.1:
            raise UsageError(
                f"--optimizer {options.optimizer} finds the learning rate itself: pass --learning_rate 1.0, "
                f"not {options.learning_rate:g}"
            )
        for key in ("text_encoder_lr", "loraplus_lr_ratio"):
            if getattr(options, key) is not None:
                raise UsageError(
                    f"--{key} cannot be used with --optimizer {options.optimizer}: it has one rate for all"
                )
    if "schedulefree" in name and options.lr_scheduler not in ("constant", "constant_with_warmup"):
        raise UsageError(f"--optimizer {options.optimizer} needs no schedule: pass --lr_scheduler constant")


def parameter_groups(
    options: TrainingOptions, adapters: Mapping[str, Adapter], words: Sequence[Tensor] = ()
) -> list[dict[str, Any]]:
    """Return the parameters with their learning rates: denoisers, text encoders, up matrices for LoRA+, new words."""
    apart = {id(vector) for vector in words}
    text_rate = options.learning_rate if options.text_encoder_lr is None else options.text_encoder_lr
    ratio = options.loraplus_lr_ratio or 1.0
    groups: list[dict[str, Any]] = []
    for component, adapter in adapters.items():
        rate = text_rate if component.startswith("text_encoder") else options.learning_rate
        ups: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, parameter in adapter.named_parameters():
            if parameter.requires_grad and id(parameter) not in apart:
                (ups if ratio != 1 and name.endswith("lora_up") else others).append(parameter)
        groups += [
            {"params": parameters, "lr": group_rate}
            for parameters, group_rate in ((others, rate), (ups, ratio * rate))
            if parameters
        ]
    if words:
        rate = 10 * options.learning_rate if options.token_lr is None else options.token_lr
        groups.append({"params": list(words), "lr": rate, "weight_decay": 0.0})
    if ratio != 1 and not any(group["lr"] != text_rate and group["lr"] != options.learning_rate for group in groups):
        raise UsageError(
            f"--loraplus_lr_ratio has no effect with --adapter_type {options.adapter_type}: it has no up matrix"
        )
    return groups


def build_optimizer(options: TrainingOptions, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
    """Return the optimiser of `--optimizer` for groups of parameters.

    Raises:
        UsageError: it does not take the arguments.
    """
    kind, arguments = optimizer_class(options.optimizer)
    names = inspect.signature(kind).parameters
    if "adamw" in options.optimizer.lower():
        arguments |= {"betas": (options.adam_beta1, options.adam_beta2)}
        arguments |= {"weight_decay": options.adam_weight_decay, "eps": options.adam_epsilon}
    elif "AdamW" in kind.__name__ and "weight_decay" in names:
        arguments |= {"weight_decay": options.adam_weight_decay}
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in options.optimizer_args.items()}
    try:
        make: Any = kind
        return make([dict(group) for group in groups], **{"lr": groups[0]["lr"], **arguments, **given})
    except (TypeError, ValueError, AssertionError) as error:
        taken = ", ".join(name for name in names if name not in ("params", "lr"))
        raise UsageError(f"--optimizer {options.optimizer}: {error}; it takes {taken}") from error


def rate_factor(options: TrainingOptions, steps: int) -> Callable[[int], float]:
    """Return the function from the number of steps done to the factor of the learning rates.

    The schedules are those of diffusers. As functions they have no state, so a resumed run cannot get another rate.
    """
    from diffusers.optimization import get_scheduler

    stand_in = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=1.0)
    schedule = get_scheduler(
        options.lr_scheduler,
        stand_in,
        num_warmup_steps=options.lr_warmup_steps,
        num_training_steps=steps,
        num_cycles=options.lr_num_cycles,
        power=options.lr_power,
    )
    if options.lr_scheduler == "polynomial":
        # That of diffusers ends at an absolute rate, which is meant for a rate far above it.
        end, warmup, power = 1e-7 / options.learning_rate, options.lr_warmup_steps, options.lr_power
        return lambda step: (
            step / max(1, warmup)
            if step < warmup
            else (1 - end) * max(0.0, 1 - (step - warmup) / max(1, steps - warmup)) ** power + end
        )
    return schedule.lr_lambdas[0]


def learning(optimizer: torch.optim.Optimizer, yes: bool) -> None:
    """Tell optimisers without a schedule whether the weights are for training or for use."""
    switch = getattr(optimizer, "train" if yes else "eval", None)
    if callable(switch):
        switch()
