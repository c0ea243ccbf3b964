"""Learned tokens of an adapter (textual inversions): installed into tokenizers and text encoders, and removed again.

A token's vectors belong to the adapter, like all its parameters: they hang beside its layers in the bank of the text
encoder, and the token embedding looks the new ids up there (`attach.Extended`). The weight of the embedding keeps its
rows, so adapters on it, casting, offloading, merging and the model's own state dict see nothing of them. The result is
that of a weight with these rows at its end, which is what diffusers' `load_textual_inversion` makes. A token may also
have vectors that replace what the text encoder gives where it stands, in all its hidden states but the first
(`Bank.after_call`).

Tokens are known as long as their adapter is loaded; no strength and no `activate` changes them. A token of several
vectors has the names diffusers gives it (`token`, `token_1`, ...), to which the tokenizer spells a prompt out, as most
pipelines do before.
"""

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from diffadapt.errors import AdapterError
from diffadapt.runtime.adapted_layers import Extended
from diffadapt.runtime.attach import extend_
from diffadapt.runtime.bank import bank_of
from diffadapt.tokens import vocabulary
from diffadapt.tokens.encoders import embedding_hosts
from diffadapt.tokens.learned_tokens import CHILD, LearnedTokens, tokens_by_adapter


def install_(models: Mapping[str, nn.Module], name: str, learned: Mapping[str, LearnedTokens]) -> None:
    """Make tokenizers and text encoders know the tokens of adapter `name`, which has to be attached to the latter.

    Raises:
        AdapterError: a tokenizer does not take a token. `uninstall_` takes out what has been installed until then.
    """
    for component, tokens in learned.items():
        bank = bank_of(models[component])
        assert bank is not None
        bank.adapters[name]._modules[CHILD] = tokens
        known = vocabulary.added(tokens.tokenizer)
        vocabulary.add_(tokens.tokenizer, (token for token in tokens.names if token not in known))
        spelled = {t.name: vocabulary.names_of(t.name, t.rows)[1:] for t in tokens.tokens if t.rows > 1}
        vocabulary.spell_out_(tokens.tokenizer, spelled)
        refused = sorted(set(tokens.names) - set(vocabulary.added(tokens.tokenizer)))
        if refused:
            raise AdapterError(f"the tokenizer of {component} does not take {', '.join(map(repr, refused))} as tokens")
        refresh_tokens_(models[component])


def uninstall_(models: Mapping[str, nn.Module], name: str) -> None:
    """Take the tokens of adapter `name` out of tokenizers and text encoders; those of others keep their vectors.

    Raises:
        AdapterError: someone else has added tokens since, whose ids would change. Nothing has changed then.
    """
    owners = {(component, owner): t for component, m in models.items() for owner, t in tokens_by_adapter(m).items()}
    leaving = {component: tokens for (component, owner), tokens in owners.items() if owner == name}
    if not leaving:
        return
    staying = [tokens for (_, owner), tokens in owners.items() if owner != name]
    removals: dict[int, tuple[Any, set[str]]] = {}
    for component, tokens in leaving.items():
        kept = {other for t in staying if t.tokenizer is tokens.tokenizer for other in t.names}
        # Two text encoders may share a tokenizer.
        _, gone = removals.setdefault(id(tokens.tokenizer), (tokens.tokenizer, set()))
        gone |= set(tokens.names) - kept
        _refuse_to_move(component, tokens.tokenizer, gone, kept)
    for tokenizer, names in removals.values():
        vocabulary.remove_(tokenizer, names)
    for component in leaving:
        bank = bank_of(models[component])
        assert bank is not None
        del bank.adapters[name]._modules[CHILD]
    for model in models.values():
        refresh_tokens_(model)


def refresh_tokens_(model: nn.Module) -> None:
    """Make the token embedding of `model` look up exactly the tokens of its adapters, under their present ids.

    Ids change when tokens are removed, and diffusers' `unload_textual_inversion` puts another embedding in place.
    """
    held = tuple(tokens_by_adapter(model).values())
    bank = bank_of(model)
    if bank is not None:
        bank.replacing = tuple(tokens for tokens in held if tokens.outputs is not None)
    hosts = embedding_hosts(model) if held else []
    for tokens in held:
        tokens.number()
    for module in model.modules():
        if isinstance(module, Extended) and all(module is not host for host in hosts):
            extend_(module, ())
    for host in hosts:
        extend_(host, held)


def is_extended(model: nn.Module) -> bool:
    """Whether an adapter has brought tokens to this model."""
    return bool(tokens_by_adapter(model))


def _refuse_to_move(component: str, tokenizer: Any, gone: Collection[str], kept: Collection[str]) -> None:
    """Raise `AdapterError` if without `gone` tokens of others would move, whose vectors are rows of the weight."""
    known = vocabulary.added(tokenizer)
    first = min((index for name, index in known.items() if name in gone), default=len(tokenizer))
    after = [name for name, index in known.items() if index > first and name not in gone and name not in kept]
    if after:
        raise AdapterError(
            f"the tokenizer of {component} has got {', '.join(map(repr, after))} after this adapter's tokens; "
            "take them out first (pipe.unload_textual_inversion)"
        )
