"""Installing the learned tokens of an adapter (textual inversions) into tokenizers and text encoders, and the reverse.

The vectors of a token belong to the adapter, like all its parameters. They are in the bank of the text encoder, next to
the adapter's layers, and the token embedding looks the new ids up there (`Extended`). The weight of the embedding keeps
its rows, so adapters on it, casting, offloading, merging and the model's own state dict are not affected. The result is
the same as with these rows at the end of the weight, where diffusers' `load_textual_inversion` puts them. A token may
also have vectors that replace the output of the text encoder at its position, in all hidden states but the first
(`Bank.after_call`).

Tokens are known as long as their adapter is loaded; neither strengths nor `activate` change them. A token of several
vectors has the names that diffusers gives it (`token`, `token_1`, ...). The tokenizer spells them out in prompts, as
most pipelines do before they call it.
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
    """Install the tokens of adapter `name` into tokenizers and text encoders.

    Args:
        models: the models by component.
        name: the adapter, which must be attached to all text encoders that get tokens.
        learned: text encoder -> the tokens it gets.

    Raises:
        AdapterError: a tokenizer does not accept a token. `uninstall_` removes what has been installed until then.
    """
    for component, tokens in learned.items():
        bank = bank_of(models[component])
        assert bank is not None
        bank.adapters[name]._modules[CHILD] = tokens
        known = vocabulary.added(tokens.tokenizer)
        vocabulary.add_(tokens.tokenizer, (token for token in tokens.names if token not in known))
        rest = {t.name: vocabulary.names_of(t.name, t.rows)[1:] for t in tokens.tokens if t.rows > 1}
        vocabulary.spell_out_(tokens.tokenizer, rest)
        refused = sorted(set(tokens.names) - set(vocabulary.added(tokens.tokenizer)))
        if refused:
            raise AdapterError(f"the tokenizer of {component} does not take {', '.join(map(repr, refused))} as tokens")
        refresh_tokens_(models[component])


def uninstall_(models: Mapping[str, nn.Module], name: str) -> None:
    """Remove the tokens of adapter `name` from tokenizers and text encoders. Tokens of other adapters keep working.

    Raises:
        AdapterError: the ids of tokens that were added without diffadapt would change. Nothing has changed then.
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
        _, removed = removals.setdefault(id(tokens.tokenizer), (tokens.tokenizer, set()))
        removed |= set(tokens.names) - kept
        _refuse_to_move(component, tokens.tokenizer, removed, kept)
    for tokenizer, names in removals.values():
        vocabulary.remove_(tokenizer, names)
    for component in leaving:
        bank = bank_of(models[component])
        assert bank is not None
        del bank.adapters[name]._modules[CHILD]
    for model in models.values():
        refresh_tokens_(model)


def refresh_tokens_(model: nn.Module) -> None:
    """Make the token embedding of `model` look up exactly the tokens of the model's adapters, under their present ids.

    Ids change when tokens are removed, and diffusers' `unload_textual_inversion` replaces the embedding.
    """
    learned = tuple(tokens_by_adapter(model).values())
    bank = bank_of(model)
    if bank is not None:
        bank.replacing = tuple(tokens for tokens in learned if tokens.outputs is not None)
    hosts = embedding_hosts(model) if learned else []
    for tokens in learned:
        tokens.refresh_ids()
    for module in model.modules():
        if isinstance(module, Extended) and all(module is not host for host in hosts):
            extend_(module, ())
    for host in hosts:
        extend_(host, learned)
    if bank is not None:
        paths = {id(host): path for path, host in model.named_modules()} if hosts else {}
        bank.set_embeddings({paths[id(host)]: host for host in hosts})


def is_extended(model: nn.Module) -> bool:
    """Return whether an adapter of this model brings tokens."""
    return bool(tokens_by_adapter(model))


def _refuse_to_move(component: str, tokenizer: Any, removed: Collection[str], kept: Collection[str]) -> None:
    """Raise `AdapterError` if removing tokens would change ids for which the embedding's weight has rows."""
    known = vocabulary.added(tokenizer)
    first = min((index for name, index in known.items() if name in removed), default=len(tokenizer))
    after = [name for name, index in known.items() if index > first and name not in removed and name not in kept]
    if after:
        raise AdapterError(
            f"the tokenizer of {component} has got {', '.join(map(repr, after))} after this adapter's tokens; "
            "remove them first (pipe.unload_textual_inversion)"
        )
