"""Train a small GPT, byte by byte, on the source code of Python's standard library.

    python -m examples.char_gpt                                      on a cluster of its own
    python -m examples.char_gpt --url redis://localhost:6379/0       on workers that are up

Every machine with Python has this text, so nothing is downloaded; but another version of Python has
another one. So the text's digest is part of the recipe, and a worker that finds a different text
refuses the run instead of training on it: give all workers the same Python, or smaller `--corpus`.
"""

from __future__ import annotations

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from examples.launch import run_as

    raise SystemExit(run_as("examples.char_gpt"))

import hashlib
import math
import platform
import sys
import sysconfig
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from examples import launch
from torchord import Recipe, TrainingConfig

VOCABULARY = 256  # bytes
CONTEXT = 64
BATCH = 64
HELD_OUT = 20  # every 20th window
PROMPT = "def "


class Block(nn.Module):
    """Causal self-attention and a two-layer perceptron, each behind a layer norm and added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, width) -> (N, T, width)."""
        batch, length, width = x.shape
        parts = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        x = x + self.mlp(self.norm2(x))
        return x


class GPT(nn.Module):
    """A decoder-only transformer over bytes: int64 (N, T) -> logits (N, T, 256).

    Args:
        layers: number of blocks.
        width: size of the embedding, a multiple of `heads`.
        heads: attention heads.
        context: longest input.
        tied: whether the output layer uses the embedding's weights.
    """

    def __init__(
        self, layers: int = 3, width: int = 96, heads: int = 4, context: int = CONTEXT, tied: bool = True
    ) -> None:
        super().__init__()
        self.context = context
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.positions.weight, std=0.02)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the byte after each byte."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        logits: Tensor = self.head(self.norm(self.blocks(self.tokens(tokens) + self.positions(places))))
        return logits


@cache
def standard_library(nbytes: int) -> bytes:
    """The first `nbytes` of the standard library's modules and packages, in the order of their paths.

    Left out are tests, what is installed beside it, and what is made for one machine. Each file is
    preceded by its path.
    """
    root = Path(sysconfig.get_path("stdlib"))
    paths = []
    for file in root.rglob("*.py"):
        parts = file.relative_to(root).parts
        ours = parts[0].removesuffix(".py") in sys.stdlib_module_names
        if ours and not {"test", "tests", "site-packages", "__pycache__"} & set(parts):
            paths.append("/".join(parts))
    text = bytearray()
    for path in sorted(paths):
        text += f"# {path}\n".encode() + (root / path).read_bytes() + b"\n"
        if len(text) >= nbytes:
            break
    return bytes(text[:nbytes])


def digest(text: bytes) -> str:
    """What identifies a corpus."""
    return hashlib.blake2b(text, digest_size=8).hexdigest()


def windows(nbytes: int, expected: str, split: str = "train") -> TensorDataset:
    """The corpus as uint8 windows of shape (CONTEXT + 1,): inputs and, shifted by one, targets.

    Args:
        nbytes: size of the corpus.
        expected: its digest, as the submitter computed it.
        split: "train", or "test" for every twentieth window.

    Raises:
        RuntimeError: this machine's standard library is another one.
    """
    text = standard_library(nbytes)
    if digest(text) != expected:
        raise RuntimeError(
            f"the first {nbytes:,} bytes of the standard library are others on this machine (Python "
            f"{platform.python_version()}, digest {digest(text)}) than on the submitter's ({expected}): "
            "start the worker with the same version of Python"
        )
    size = CONTEXT + 1
    whole = torch.frombuffer(bytearray(text), dtype=torch.uint8)[: len(text) // size * size].view(-1, size)
    held_out = torch.arange(len(whole)) % HELD_OUT == 0
    return TensorDataset(whole[held_out] if split == "test" else whole[~held_out])


def next_byte_loss(model: nn.Module, batch: list[Tensor]) -> Tensor:
    """Mean cross-entropy (nats) of each next byte, over the shard."""
    tokens = batch[0].long()
    logits = model(tokens[:, :-1])
    return functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def decayed(model: nn.Module) -> list[dict[str, object]]:
    """Parameter groups: matrices get weight decay, vectors (biases, norms) none."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    return [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]


def recipe(nbytes: int, steps: int, *, layers: int, width: int, tied: bool) -> Recipe:
    """What is trained; size and digest of the corpus are arguments that travel to the workers."""
    corpus = partial(windows, nbytes, digest(standard_library(nbytes)))
    rate = 3e-3
    return Recipe(
        model=partial(GPT, layers=layers, width=width, tied=tied),
        dataset=corpus,
        step=next_byte_loss,
        optimizer=partial(torch.optim.AdamW, lr=rate, betas=(0.9, 0.95)),
        parameter_groups=decayed,
        scheduler=partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=rate, total_steps=steps, pct_start=0.1),
        evaluation=partial(corpus, split="test"),
    )


@torch.no_grad()
def sample(model: nn.Module, prompt: str, length: int, *, temperature: float = 0.7, seed: int = 0) -> str:
    """Continue a prompt by `length` bytes, drawn from the model."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.tensor([list(prompt.encode())])
    for _ in range(length):
        logits = model(tokens[:, -CONTEXT:])[0, -1]
        chosen = torch.multinomial(torch.softmax(logits / temperature, 0), 1, generator=generator)
        tokens = torch.cat([tokens, chosen[None]], dim=1)
    return bytes(tokens[0].tolist()).decode(errors="replace")


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, audit, draw, and let the model write a few lines."""
    made = launch.parser(
        "Train a small GPT on the source code of Python's standard library.", name="char_gpt", epochs=1
    )
    made.add_argument("--corpus", type=int, default=2_000_000, help="bytes of source code (default: 2000000)")
    made.add_argument("--layers", type=int, default=3, help="transformer blocks (default: 3)")
    made.add_argument("--width", type=int, default=96, help="size of the embedding (default: 96)")
    made.add_argument("--untied", action="store_true", help="give the output layer weights of its own")
    chosen = launch.options(made, arguments)
    wanted = chosen.arguments
    nbytes = min(wanted.corpus, len(standard_library(wanted.corpus)))
    if nbytes < 40 * (CONTEXT + 1) or wanted.layers < 1 or wanted.width < 4 or wanted.width % 4:
        made.error(f"--corpus must be at least {40 * (CONTEXT + 1)}, --layers 1, and --width a multiple of 4")
    examples = len(windows(nbytes, digest(standard_library(nbytes))))
    every = -(-examples // BATCH)
    config = TrainingConfig(
        epochs=chosen.epochs,
        batch_size=BATCH,
        shards=4,
        clip_norm=1.0,
        evaluate_every=-(-every // 4),
        checkpoint_every=-(-every // 2),
    )
    described = recipe(
        nbytes, every * chosen.epochs, layers=wanted.layers, width=wanted.width, tied=not wanted.untied
    )
    with launch.cluster(chosen) as master:
        run = master.submit(described, config, name=chosen.name)
        trained = run.wait(progress=True)
        bits = trained.metrics["loss"] / math.log(2)
        print(f"Held-out loss: {trained.metrics['loss']:.3f} nats, {bits:.2f} bits a byte")
        clean = launch.report(chosen, run, trained)

        from examples.plots import save_curve

        picture = save_curve(
            chosen.folder / "loss.png", trained, title=f"{chosen.name}: {bits:.2f} bits a byte, held out"
        )
        print(f"Picture:     {picture}")
        print(f"\nThe model goes on from {PROMPT!r}:\n")
        written = sample(run.model(), PROMPT, 240)
        print("\n".join(f"    {line}" for line in written.splitlines()))
        launch.what_next(chosen, "examples.char_gpt")
    return 0 if clean else 1
