"""Train a Hugging Face model to tell topics of sentences apart: its tokenizer, its collator, its schedule.

    pip install 'torchord[demo,models]'
    python -m examples.text_topics                                    on a cluster of its own
    python -m examples.text_topics --lora                             adapters (LoRA) of PEFT alone
    python -m examples.text_topics --url redis://localhost:6379/0     on workers that are up

Sentences, tokenizer and model are made here, so that nothing is downloaded; `from_pretrained` in their
places, and all else stays. With `--lora` the model is frozen but for its adapters and the classifier: nothing
else travels from step to step, and the bytes of a step say so.
"""

from __future__ import annotations

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from examples.launch import run_as

    raise SystemExit(run_as("examples.text_topics"))

from collections.abc import Mapping, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from examples import launch
from torchord import Recipe, TrainingConfig

with launch.needed("Hugging Face transformers and PEFT", extras="demo,models"):
    import peft
    import transformers
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

BATCH = 32
SIZES = {"train": 384, "test": 128}
WORDS = {
    "": "the a one this and then we they it was is had some very more often before after while",
    "kitchen": "salt pan oven dough butter onion soup knife boil roast flour taste spice bread plate",
    "harbour": "ship anchor tide sail deck rope captain wave crane cargo gull mast dock storm buoy",
    "garden": "seed soil rose spade hedge weed bloom water pot prune bee leaf shade grow root",
    "concert": "violin stage choir tune drum hall note piano solo rhythm tenor score bow hear",
}
COMMON, *TOPICS = (words.split() for words in WORDS.values())


def sentences(split: str) -> list[tuple[str, int]]:
    """(sentence of 5 to 24 words, number of its topic); a third of the words belong to the topic."""
    draw = np.random.RandomState(("train", "test").index(split))
    found = []
    for number in range(SIZES[split]):
        topic = number % len(TOPICS)
        words = [
            draw.choice(TOPICS[topic] if draw.random_sample() < 0.33 else COMMON)
            for _ in range(draw.randint(5, 25))
        ]
        found.append((" ".join(words), topic))
    return found


@cache
def tokenizer() -> Any:
    """A tokenizer of whole words; of a trained one, `AutoTokenizer.from_pretrained(...)`."""
    words = sorted({*COMMON, *(word for topic in TOPICS for word in topic)})
    inner = Tokenizer(WordLevel({word: n for n, word in enumerate(["[PAD]", "[UNK]", *words])}, "[UNK]"))
    inner.pre_tokenizer = Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]")


class Sentences(Dataset[dict[str, Any]]):
    """The sentences as a tokenizer has them, each as long as it is."""

    def __init__(self, split: str = "train") -> None:
        texts, self.labels = zip(*sentences(split), strict=True)
        self.encoded = tokenizer()(list(texts))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        one = {name: values[index] for name, values in self.encoded.items()}
        return {
            "input_ids": one["input_ids"],
            "attention_mask": one["attention_mask"],
            "labels": self.labels[index],
        }


def collate(samples: list[dict[str, Any]]) -> Mapping[str, Tensor]:
    """Pad to the longest of the batch, with Hugging Face's own collator."""
    found: Mapping[str, Tensor] = transformers.DataCollatorWithPadding(tokenizer())(samples)
    return found


def classifier(dropout: float = 0.1, width: int = 96) -> nn.Module:
    """A small BERT; of a trained one, `AutoModelForSequenceClassification.from_pretrained(...)`."""
    config = transformers.BertConfig(
        vocab_size=len(tokenizer()),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        num_labels=len(TOPICS),
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    model: nn.Module = transformers.BertForSequenceClassification(config)
    return model


def adapted(dropout: float = 0.1, rank: int = 4) -> nn.Module:
    """The same, frozen but for adapters of PEFT and the classifier."""
    lora = peft.LoraConfig(
        task_type="SEQ_CLS", r=rank, lora_alpha=8 * rank, target_modules=["query", "value", "dense"]
    )
    model: nn.Module = peft.get_peft_model(classifier(dropout), lora)  # type: ignore[arg-type]
    return model


def step(model: nn.Module, batch: Mapping[str, Tensor]) -> Any:
    """The loss that the model computes itself from the labels, and the share of right answers."""
    outputs = model(**batch)
    right = (outputs.logits.argmax(1) == batch["labels"]).float().mean()
    return outputs.loss, {"accuracy": right}


def groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """As `transformers.Trainer` has them: no decay of norms and biases."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]


def schedule(optimizer: Any, lr_scheduler_type: str, warmup_steps: int, steps: int) -> Any:
    """Any schedule of `transformers.get_scheduler`, by its name among `TrainingArguments`."""
    return transformers.get_scheduler(
        lr_scheduler_type, optimizer, num_warmup_steps=warmup_steps, num_training_steps=steps
    )


def recipe(epochs: int, *, lora: bool = False, dropout: float = 0.1) -> Recipe:
    """The model and its data, with what `TrainingArguments` would say by the same names."""
    steps = epochs * -(-SIZES["train"] // BATCH)
    return Recipe(
        model=partial(adapted if lora else classifier, dropout=dropout),
        dataset=Sentences,
        collate=collate,
        step=step,
        parameter_groups=partial(groups, weight_decay=0.01),
        optimizer=partial(torch.optim.AdamW, lr=1e-2 if lora else 2e-3),
        scheduler=partial(schedule, lr_scheduler_type="cosine", warmup_steps=6, steps=steps),
        evaluation=partial(Sentences, split="test"),
    )


def config(epochs: int) -> TrainingConfig:
    """`max_grad_norm`, `num_train_epochs` and the batch size of `TrainingArguments`."""
    return TrainingConfig(epochs=epochs, batch_size=BATCH, shards=4, clip_norm=1.0, checkpoint_every=48)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train and audit."""
    made = launch.parser("Train a Hugging Face model.", name="text_topics", epochs=8)
    made.add_argument("--lora", action="store_true", help="train adapters of PEFT alone")
    chosen = launch.options(made, arguments)
    given = recipe(chosen.epochs, lora=chosen.arguments.lora)
    return launch.train(chosen, given, config(chosen.epochs), show=("accuracy",))
