"""Add new words to the text encoders of an owner, as an adapter whose parameters are their vectors."""

from collections.abc import Iterable, Mapping

import torch

from diffadapt.errors import AdapterError
from diffadapt.management.owner import Owner
from diffadapt.management.snapshot import check_name
from diffadapt.runtime.adapter import Adapter
from diffadapt.runtime.attach import attach_, detach_, refresh_
from diffadapt.runtime.bank import bank_of
from diffadapt.runtime.components import is_text_encoder
from diffadapt.runtime.inference_mode import ordinary_tensors
from diffadapt.tokens.encoders import names_in_files
from diffadapt.tokens.installation import install_, uninstall_
from diffadapt.tokens.learned_tokens import learned_tokens_of
from diffadapt.tokens.new_words import Start, new_words


def add_words_(
    owner: Owner,
    words: Mapping[str, Start],
    name: str,
    components: Iterable[str] | None,
    generator: torch.Generator | None,
) -> dict[str, Adapter]:
    """Add new words to text encoders and return component -> adapter; see `pipelines.entry.add_tokens`."""
    check_name(name)
    if not isinstance(words, Mapping) or not words:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise AdapterError(f"add_tokens: the words are {words!r}, expected new word -> what it starts from")
    models = {component: model for component, model in owner.models().items() if is_text_encoder(component)}
    wanted = list(models) if components is None else [components] if isinstance(components, str) else list(components)
    unknown = [component for component in wanted if component not in models]
    if unknown or not wanted:
        raise AdapterError(f"add_tokens: no text encoder {', '.join(unknown)}; there are {', '.join(models) or 'none'}")
    tokenizers = owner.tokenizers()
    for component in wanted:
        if component not in tokenizers:
            raise AdapterError(f"{component} has no tokenizer to know the words; pass the pipeline, or tokenizer=")
        bank = bank_of(models[component])
        present = None if bank is None else bank.adapters.get(name)
        if bank is not None and bank.merged:
            raise AdapterError(f"{', '.join(bank.merged)} is merged into {component}; unmerge() before adding words")
        if present is not None and learned_tokens_of(present) is not None:
            raise AdapterError(f"adapter {name!r} has words already; remove it first or pass another name")
    generator = generator or torch.Generator().manual_seed(0)
    written = names_in_files(models)
    with ordinary_tensors():
        learned = {
            component: new_words(
                component, models[component], tokenizers[component], words, written[component], generator
            )
            for component in wanted
        }
    new: list[str] = []
    try:
        for component in wanted:
            bank = bank_of(models[component])
            if bank is None or name not in bank.adapters:
                attach_(models[component], name, Adapter({}), {})
                new.append(component)
        install_(models, name, learned)
    except BaseException:
        uninstall_({component: models[component] for component in wanted}, name)
        for component in new:
            detach_(models[component], name)
        raise
    found: dict[str, Adapter] = {}
    for component in wanted:
        bank = bank_of(models[component])
        assert bank is not None
        found[component] = bank.adapters[name]
        found[component].active = found[component].outside_slots = True
        refresh_(models[component])
    owner.changed()
    return found
