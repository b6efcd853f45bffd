"""A Hugging Face model, as somebody who uses it would write a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from torchord import Recipe

VOCABULARY, LENGTH = 32, 12


class Texts(Dataset[dict[str, Tensor]]):
    """Random tokens with a mask, in the form that tokenizers give; labels are the tokens."""

    def __init__(self, size: int = 24) -> None:
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(VOCABULARY, (size, LENGTH), generator=generator)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = self.tokens[index]
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}


def gpt2() -> nn.Module:
    """A GPT-2 from its config, untrained, with dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=LENGTH,
        n_embd=16,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    model: nn.Module = GPT2LMHeadModel(config)
    return model


def own_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The loss that a Hugging Face model computes itself from `labels`."""
    loss: Tensor = model(**batch).loss
    return loss


def hugging_face() -> Recipe:
    """GPT-2, tied embeddings and all, under AdamW."""
    return Recipe(
        model=gpt2,
        dataset=Texts,
        step=own_loss,
        optimizer=partial(torch.optim.AdamW, lr=1e-2),
        evaluation=Texts,
    )
