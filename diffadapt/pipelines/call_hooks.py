"""Objects that replace methods of a pipeline while it has adapters, to notice its calls."""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from diffadapt.errors import AdapterError
from diffadapt.management.activation import follow_schedules
from diffadapt.management.owner import Owner
from diffadapt.pipelines.components import components_of
from diffadapt.runtime.bank import Bank, bank_of
from diffadapt.runtime.call_state import CallState
from diffadapt.runtime.components import is_text_encoder
from diffadapt.runtime.foreign_hooks import diffusers_scales_with_peft
from diffadapt.strengths.scheduler_clock import Listener, follow, is_scheduler
from diffadapt.tokens.installation import is_extended, refresh_tokens_

_IMAGES = ("num_images_per_prompt", "num_videos_per_prompt")


class EncodePromptHook:
    """A replacement for an `encode_prompt` of diffusers. It passes `lora_scale` on to the adapters of text encoders,
    and the number of images per prompt to all other adapters. If every prompt has its own mix of adapters, it also
    checks that there are as many prompts as mixes.

    diffusers uses that scale with peft only, and without peft it crashes on the text encoders of transformers 5. The
    ids of learned tokens are read again here, since textual inversions of diffusers may have changed the tokenizers.
    """

    def __init__(self, pipe: Any, owner: Any) -> None:
        """
        Args:
            pipe: the pipeline.
            owner: the object whose `encode_prompt` is replaced: the pipeline, or one of its modular blocks.
        """
        self.pipe = pipe
        self.owner = owner

    @classmethod
    def install(cls, pipe: Any) -> None:
        """Replace the `encode_prompt` methods of `pipe` while one of its models carries adapters, else restore them."""
        models = components_of(pipe).values()
        adapted = any(bank_of(model) is not None for model in models)
        for owner in _prompt_encoders(pipe):
            present = owner.__dict__.get("encode_prompt")
            if not adapted and isinstance(present, cls):
                del owner.__dict__["encode_prompt"]
            elif adapted and present is None:
                owner.__dict__["encode_prompt"] = cls(pipe, owner)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        owner_class = type(self.owner)
        # It is a method of pipelines, but a static method of modular blocks.
        encode = inspect.getattr_static(owner_class, "encode_prompt").__get__(self.owner, owner_class)
        bound = inspect.signature(encode).bind(*args, **kwargs)
        scale = bound.arguments.get("lora_scale")
        if scale is not None and not diffusers_scales_with_peft():
            bound.arguments["lora_scale"] = None
        models = components_of(self.pipe).items()
        for _, model in models:
            if is_extended(model):
                refresh_tokens_(model)
        banks: list[Bank] = []
        for name, model in models:
            bank = bank_of(model)
            if bank is None:
                continue
            if is_text_encoder(name):
                banks.append(bank)
            if bank.call.expected:
                _count_prompts(bank.call, bound)
            bank.call.by_rows = False
            if not is_text_encoder(name):
                _count_images(bank.call, bound)
                if bank.call.expected and not bank.call.images and _is_compiled(self.pipe.components[name]):
                    raise AdapterError(
                        "per_sample: this pipeline does not say how many images it draws of each prompt; pass images="
                    )
        for bank in banks:
            bank.call.outer = bank.call.value = bank.call.scale(scale)
        try:
            found = encode(*bound.args, **bound.kwargs)
        finally:
            for bank in banks:
                bank.call.outer = bank.call.value = bank.call.neutral
        if any(bank.call.expected for _, model in models if (bank := bank_of(model)) is not None):
            _check_order(found, bound)
        return found


class ProgressBarHook:
    """A replacement for the `progress_bar` of a pipeline. Pipelines call it right before their loop, and by then may
    have another scheduler than when the adapters were activated.
    """

    def __init__(self, pipe: Any, listener: Listener | None, owner_of: Callable[[Any], Owner]) -> None:
        """
        Args:
            pipe: the pipeline.
            listener: the listener to its steps; `None` for that of a copied pipeline, which is not known yet.
            owner_of: returns what owns the adapters of a pipeline.
        """
        self.pipe = pipe
        self.listener = listener
        self.owner_of = owner_of

    def __deepcopy__(self, memo: dict[int, Any]) -> "ProgressBarHook":
        # The listener belongs to the models of the original.
        return ProgressBarHook(copy.deepcopy(self.pipe, memo), None, self.owner_of)

    @classmethod
    def install(cls, pipe: Any, listener: Listener | None, owner_of: Callable[[Any], Owner]) -> None:
        """Make the schedulers of `pipe` report every step to `listener`; `None` ends that."""
        for scheduler in filter(is_scheduler, pipe.components.values()):
            follow(scheduler, pipe, listener)
        present = pipe.__dict__.get("progress_bar")
        if listener is None and isinstance(present, cls):
            del pipe.__dict__["progress_bar"]
        elif listener is not None and present is None and hasattr(type(pipe), "progress_bar"):
            pipe.__dict__["progress_bar"] = cls(pipe, listener, owner_of)

    @classmethod
    def is_on(cls, pipe: Any) -> bool:
        """Return whether `pipe` notices its runs already."""
        return isinstance(pipe.__dict__.get("progress_bar"), cls)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.listener is None:
            self._find_listener()
        for scheduler in filter(is_scheduler, self.pipe.components.values()):
            follow(scheduler, self.pipe, self.listener, running=True)
        return type(self.pipe).progress_bar(self.pipe, *args, **kwargs)

    def _find_listener(self) -> None:
        """Let a copied pipeline listen to its own steps, for its own models, from the run on that begins now."""
        del self.pipe.__dict__["progress_bar"]
        owner = self.owner_of(self.pipe)
        follow_schedules(owner, owner.follow)
        hook = self.pipe.__dict__.get("progress_bar")
        if isinstance(hook, ProgressBarHook):
            self.listener = hook.listener
            for scheduler in filter(is_scheduler, self.pipe.components.values()):
                follow(scheduler, self.pipe, None)


def _count_prompts(call: CallState, bound: inspect.BoundArguments) -> None:
    """Raise `AdapterError` if an `encode_prompt` is not called with as many prompts as there are mixes or masks."""
    prompts = _number_of_prompts(bound.arguments)
    for count, what in call.expected:
        if prompts is not None and prompts != count:
            raise AdapterError(
                f"{what}, but the pipeline encodes {prompts} prompts; pass as many prompts and negative prompts as "
                "samples"
            )
    call.counted = call.counted or prompts is not None


def _count_images(call: CallState, bound: inspect.BoundArguments) -> None:
    """Note how many images of each prompt an `encode_prompt` is called for.

    Raises:
        AdapterError: `per_sample` was told another number.
    """
    given = _images_per_prompt(bound)
    images = given[0] if given and isinstance(given[0], int) else 1
    if call.asks_images:
        call.images = images if given or not call.expected else 0
    elif given and images != call.images:
        raise AdapterError(
            f"per_sample: images is {call.images}, but the pipeline draws {images} images of each prompt; leave images "
            "out, or pass the same number"
        )


def _images_per_prompt(bound: inspect.BoundArguments) -> list[Any]:
    """Return the number of images of each prompt as one element; none if `encode_prompt` is not told."""
    parameters = bound.signature.parameters
    return [bound.arguments.get(name, parameters[name].default) for name in _IMAGES if name in parameters]


def _check_order(found: Any, bound: inspect.BoundArguments) -> None:
    """Raise `AdapterError` if an `encode_prompt` gave the pictures of one prompt different embeddings.

    That of Stable Diffusion 3 repeats the pooled embeddings of all prompts one after the other, before diffusers 0.36.
    """
    prompts, images = _number_of_prompts(bound.arguments), next(iter(_images_per_prompt(bound)), 1)
    if prompts is None or prompts < 2 or not isinstance(images, int) or images < 2:
        return
    for tensor in found if isinstance(found, (list, tuple)) else (found,):
        if not isinstance(tensor, torch.Tensor) or tensor.shape[:1] != (prompts * images,):
            continue
        groups = tensor.unflatten(0, (prompts, images))
        if not torch.equal(groups, groups[:, :1].expand_as(groups)):
            raise AdapterError(
                f"with {prompts} prompts and {images} images of each, this version of diffusers gives some "
                "images the embedding of another prompt; update diffusers (0.36 for Stable Diffusion 3), or draw one "
                "image of each prompt"
            )


def _is_compiled(model: Any) -> bool:
    """Return whether calls of a whole model are compiled, its hooks included."""
    return hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None


def _number_of_prompts(arguments: Mapping[str, Any]) -> int | None:
    """Return how many prompts the arguments of an `encode_prompt` are for, or `None` if they do not say."""
    prompt = arguments.get("prompt")
    if isinstance(prompt, str):
        return 1
    # Pipelines with several text encoders of different kinds have embeddings named after each.
    embeddings = (value for name, value in arguments.items() if name.startswith("prompt_embeds"))
    found = next((value for value in (prompt, *embeddings) if value is not None), None)
    return len(found) if isinstance(found, (list, tuple, torch.Tensor)) else None


def _prompt_encoders(pipe: Any) -> Iterator[Any]:
    """Yield the pipeline and, if it is modular, its blocks, where they have an `encode_prompt`."""
    waiting = [pipe, getattr(pipe, "_blocks", None)]
    while waiting:
        owner = waiting.pop()
        if hasattr(type(owner), "encode_prompt"):
            yield owner
        if owner is not pipe:
            waiting.extend((getattr(owner, "sub_blocks", None) or {}).values())
