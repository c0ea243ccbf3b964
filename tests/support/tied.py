"""Small models whose layers share weights, made without a download."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5EncoderModel

IDS = torch.tensor([[1, 3, 5, 7, 2]])


def llama(*, tied: bool = True) -> LlamaForCausalLM:
    """Return a language model whose output layer has the weight of its embedding, in evaluation mode."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(20)
    return model


def t5() -> T5EncoderModel:
    """Return a T5 encoder, which has its embedding under two names and calls the inner one."""
    torch.manual_seed(0)
    return T5EncoderModel(T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2)).eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def hidden(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).last_hidden_state


class SeveralTies(nn.Module):
    """Two embeddings with an output layer each, and two linear layers that are one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Embedding(12, 6), nn.Embedding(10, 6)
        self.first_head, self.second_head = nn.Linear(6, 12, bias=False), nn.Linear(6, 10)
        self.first_head.weight, self.second_head.weight = self.first.weight, self.second.weight
        self.up, self.again = nn.Linear(6, 6), nn.Linear(6, 6, bias=False)
        self.again.weight = self.up.weight
        self.alone = nn.Linear(6, 6)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.alone(self.again(torch.tanh(self.up(self.first(ids) + self.second(ids)))))
        return torch.cat([self.first_head(hidden), self.second_head(hidden)], -1)
