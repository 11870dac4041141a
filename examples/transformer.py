"""Transformers at work: numbers spelled by beam search, a GPT of characters, and digits seen by a vision transformer.

    python examples/transformer.py           # all three; about three minutes, pictures in report/
    python examples/transformer.py words     # one of: words, gpt, digits
"""

import copy
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastnn
from digits import Digits, digits
from rnn import train

REPORT = Path("report")
Batches = Callable[[], Iterator[tuple[Any, Tensor]]]


class Attention(nn.Module):
    """Multi-head attention to itself or to a memory, with a cache where it goes step by step."""

    # What replace() cannot switch, as it is no layer: `both` does. (Around a model that cannot be edited, fastnn.use() would do
    # the same, but goes through Python at every call of torch's, which models as small as these feel.)
    attend = staticmethod(nn.functional.scaled_dot_product_attention)

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key_value = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(
        self, x: Tensor, memory: Tensor | None = None, causal: bool = False, cache: fastnn.KVCache | None = None
    ) -> Tensor:
        """x (batch, positions, width)"""
        q = self.query(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
        k, v = self.key_value(x if memory is None else memory).unflatten(2, (2, self.heads, -1)).transpose(1, 3).unbind(2)
        if cache is not None:
            k, v = cache.append(k, v)
            causal = causal and len(cache) == x.shape[1]  # a single new position sees all that are there
        y = self.attend(q, k, v, is_causal=causal)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention, attention to a memory if there is one, and a feed-forward layer; each after a norm and beside a residual."""

    def __init__(self, width: int, heads: int, causal: bool, crosses: bool = False) -> None:
        super().__init__()
        self.causal = causal
        self.norm, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.cross_norm = nn.LayerNorm(width) if crosses else None
        self.cross = Attention(width, heads) if crosses else None
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor, memory: Tensor | None = None, cache: fastnn.KVCache | None = None) -> Tensor:
        x = x + self.attention(self.norm(x), causal=self.causal, cache=cache)
        if self.cross is not None and self.cross_norm is not None:
            x = x + self.cross(self.cross_norm(x), memory)
        return x + self.feed_forward(x)


class Decoder(nn.Module):
    """Logits of the next token at every position: a GPT, or with ``crosses`` the half of a translator that writes."""

    def __init__(self, tokens: int, positions: int, width: int, heads: int, layers: int, crosses: bool = False) -> None:
        super().__init__()
        self.embedding, self.place = nn.Embedding(tokens, width), nn.Embedding(positions, width)
        self.blocks = nn.ModuleList(Block(width, heads, True, crosses) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, tokens)
        self.shape = (heads, positions, width // heads)

    def caches(self, batch: int) -> list[fastnn.KVCache]:
        return [fastnn.KVCache(batch, *self.shape) for _ in self.blocks]

    def forward(self, tokens: Tensor, memory: Tensor | None = None, caches: list[fastnn.KVCache] | None = None) -> Tensor:
        """tokens (batch, positions); with caches, those that follow what the caches hold"""
        start = len(caches[0]) if caches else 0
        x = self.embedding(tokens) + self.place(torch.arange(start, start + tokens.shape[1]))
        for n, block in enumerate(self.blocks):
            x = block(x, memory, caches[n] if caches else None)
        return self.head(self.norm(x))


def both(make: Callable[[], nn.Module]) -> Iterator[tuple[str, Any]]:
    """The same model twice, as torch's and as fastnn's."""
    torch.manual_seed(0)
    model = make()
    yield "torch", copy.deepcopy(model)
    fastnn.replace(model)
    for layer in model.modules():
        if isinstance(layer, Attention):
            layer.attend = fastnn.functional.scaled_dot_product_attention
    yield "fastnn", model


def fit(title: str, make: Callable[[], nn.Module], batches: Batches, loss: Callable[..., Tensor]) -> dict[str, Any]:
    """Train both; their models by name."""
    print(f"\n{title}: first and last loss, seconds")
    models = {}
    for who, model in both(make):
        x, y = next(batches())
        loss(model(x), y).backward()  # kernels are compiled, or loaded
        losses, seconds = train(model, batches(), loss)
        print(f"  {who:<7} {losses[0]:.4f} → {losses[-1]:.4f}   {seconds:.2f} s")
        models[who] = model.eval()
    return models


# Numbers to words -----------------------------------------------------------------------------------------------------

ONES = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen",
    "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
]  # fmt: skip
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
WORDS = ["<end>", *ONES, *TENS, "hundred", "thousand", "and"]
END, LONGEST = 0, 12


def spell(n: int) -> list[str]:
    """The words of 0 to 9999: 1042 is one thousand and forty two."""
    if n < 20:
        return [ONES[n]]
    if n < 100:
        return [TENS[n // 10 - 2], *(spell(n % 10) if n % 10 else [])]
    unit, name = (1000, "thousand") if n >= 1000 else (100, "hundred")
    rest = n % unit
    return [*spell(n // unit), name, *(["and"] if 0 < rest < 100 else []), *(spell(rest) if rest else [])]


def spelled(numbers: list[int]) -> tuple[Tensor, Tensor]:
    """Four digits each, and the words with ends around them."""
    source = torch.tensor([[int(c) for c in f"{n:04}"] for n in numbers])
    target = torch.full((len(numbers), LONGEST + 2), END)
    for row, n in zip(target, numbers):
        words = [WORDS.index(word) for word in spell(n)]
        row[1 : 1 + len(words)] = torch.tensor(words)
    return source, target


class Translator(nn.Module):
    """An encoder of digits and a decoder of words (Vaswani et al. 2017, norms first)."""

    def __init__(self, width: int = 64, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.digits, self.place = nn.Embedding(10, width), nn.Embedding(4, width)
        self.encoder = nn.Sequential(*(Block(width, heads, False) for _ in range(layers)), nn.LayerNorm(width))
        self.decoder = Decoder(len(WORDS), LONGEST + 2, width, heads, layers, crosses=True)

    def encode(self, source: Tensor) -> Tensor:
        return self.encoder(self.digits(source) + self.place.weight)

    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        source, written = pair
        return self.decoder(written, self.encode(source))


@torch.no_grad()
def beam_search(model: Translator, source: Tensor, beams: int = 4) -> list[str]:
    """The likeliest words for one number's digits (1, 4): of all beginnings the best few are kept, keys and values cached."""
    memory = model.encode(source).expand(beams, -1, -1)
    caches = model.decoder.caches(beams)
    written = torch.full((beams, 1), END)
    scores = torch.full((beams,), -torch.inf)
    scores[0] = 0.0  # all beginnings are alike at first
    done = torch.zeros(beams, dtype=torch.bool)
    for _ in range(LONGEST + 1):
        following = model.decoder(written[:, -1:], memory, caches)[:, -1].log_softmax(1)
        following[done] = -torch.inf
        following[done, END] = 0.0  # what has ended stays as it is
        scores, best = (scores.unsqueeze(1) + following).flatten().topk(beams)
        beam, word = best // len(WORDS), best % len(WORDS)
        for cache in caches:
            cache.reorder(beam)
        written, done = torch.cat([written[beam], word.unsqueeze(1)], 1), done[beam] | (word == END)
        if done.all():
            break
    return [WORDS[n] for n in written[0, 1:].tolist() if n != END]


def word_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Of every word and the first end after them."""
    counted = torch.cat([torch.ones_like(target[:, :1]), target[:, :-1]], 1) != END
    return nn.functional.cross_entropy(logits.flatten(0, 1), target.masked_fill(~counted, -100).flatten())


def number_batches(steps: int = 400, batch: int = 64) -> Iterator[tuple[tuple[Tensor, Tensor], Tensor]]:
    """Numbers that are no multiples of 17: those are for the test."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        numbers = torch.randint(10_000, (batch,), generator=generator)
        source, target = spelled([n for n in numbers.tolist() if n % 17])
        yield (source, target[:, :-1]), target[:, 1:]


def words() -> None:
    models = fit("Numbers to words, an encoder and a decoder", Translator, number_batches, word_loss)
    asked = list(range(0, 10_000, 17 * 12))
    for who, model in models.items():
        start = time.perf_counter()
        found = [beam_search(model, spelled([n])[0]) for n in asked]
        seconds = time.perf_counter() - start
        right = sum(one == spell(n) for n, one in zip(asked, found))
        print(f"  {who:<7} {right} of {len(asked)} unseen numbers right, {seconds / len(asked) * 1e3:.1f} ms each")
    print(f"  {asked[-1]}: {' '.join(found[-1])}")


# A GPT of characters --------------------------------------------------------------------------------------------------


def manual() -> tuple[Tensor, list[str]]:
    """Characters of the help that ships with every Python, as numbers, and the alphabet."""
    from pydoc_data.topics import topics

    text = "".join(topics[name] for name in sorted(topics))[:200_000].encode("ascii", "ignore").decode()
    alphabet = sorted(set(text))
    place = {c: n for n, c in enumerate(alphabet)}
    return torch.tensor([place[c] for c in text]), alphabet


@torch.no_grad()
def generate(model: Decoder, prompt: Tensor, count: int, cached: bool = True) -> Tensor:
    """prompt (batch, positions) and the ``count`` likeliest tokens after it, one by one."""
    caches = model.caches(len(prompt)) if cached else None
    tokens = prompt
    for n in range(count):
        logits = model(tokens[:, -1:] if caches and n else tokens, None, caches)
        tokens = torch.cat([tokens, logits[:, -1:].argmax(2)], 1)
    return tokens


def timed(model: Decoder, prompt: Tensor, count: int, cached: bool) -> tuple[float, Tensor]:
    """Tokens a second, and what is written."""
    generate(model, prompt, 8, cached)
    start = time.perf_counter()
    tokens = generate(model, prompt, count, cached)
    return count / (time.perf_counter() - start), tokens


def gpt() -> None:
    data, alphabet = manual()

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(1)
        for _ in range(120):
            at = torch.randint(0, len(data) - 129, (16,), generator=generator)
            rows = torch.stack([data[i : i + 129] for i in at.tolist()])
            yield rows[:, :-1], rows[:, 1:]

    models = fit(
        f"A GPT of {len(data)} characters of text", lambda: Decoder(len(alphabet), 512, 192, 6, 4), batches,
        lambda logits, y: nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten()),
    )  # fmt: skip
    written = {}
    for who, model in models.items():
        slow, _ = timed(model, data[None, :64], 400, cached=False)
        fast, written[who] = timed(model, data[None, :64], 400, cached=True)
        print(f"  {who:<7} writes {fast:.0f} characters a second with the cache of keys and values, {slow:.0f} without")
    told = "".join(alphabet[n] for n in written["fastnn"][0, 64:144].tolist())
    print(f"  it writes: {told!r}")


# Digits ---------------------------------------------------------------------------------------------------------------


class Vision(nn.Module):
    """A vision transformer (Dosovitskiy et al. 2021) of 16 patches; with ``convolutions``, of what a small CNN sees there."""

    def __init__(self, convolutions: bool = False, width: int = 64, heads: int = 4, layers: int = 3) -> None:
        super().__init__()
        self.stem: nn.Module = nn.Conv2d(1, width, 2, stride=2)
        if convolutions:
            self.stem = nn.Sequential(
                nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)
            )
        self.place = nn.Parameter(torch.randn(17, width) * 0.02)
        layer = nn.TransformerEncoderLayer(width, heads, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def tokens(self, x: Tensor) -> Tensor:
        """x (batch, 64) → (batch, 17, width): a token that is asked for the answer, then the patches"""
        patches = self.stem(x.unflatten(1, (1, 8, 8))).flatten(2).transpose(1, 2)
        return torch.cat([patches.new_zeros(len(x), 1, patches.shape[2]), patches], 1) + self.place

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.tokens(x))[:, 0])

    @torch.no_grad()
    def looks_at(self, x: Tensor) -> Tensor:
        """How much the answer of the last layer takes from each patch, the mean of its heads: (batch, 4, 4)"""
        h = self.tokens(x)
        *before, last = self.encoder.layers
        for layer in before:
            h = layer(h)
        h = last.norm1(h)
        return last.self_attn(h, h, h, need_weights=True)[1][:, 0, 1:].unflatten(1, (4, 4))


def digit_batches(data: Digits, epochs: int = 8, batch: int = 64) -> Iterator[tuple[Tensor, Tensor]]:
    shuffle = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for rows in torch.randperm(len(data.train_x), generator=shuffle).split(batch):
            yield data.train_x[rows], data.train_y[rows]


def draw(model: Vision, data: Digits, file: Path) -> None:
    """Test images, and below them where the model looks."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    x = data.test_x[:8]
    seen = model.looks_at(x)
    figure, axes = plt.subplots(2, len(x), figsize=(1.5 * len(x), 3))
    for column, image, where in zip(axes.T, x, seen):
        column[0].imshow(image.view(8, 8), cmap="gray")
        column[1].imshow(where, cmap="magma")
        for one in column:
            one.set_axis_off()
    file.parent.mkdir(exist_ok=True)
    figure.savefig(file, dpi=110, bbox_inches="tight")
    plt.close(figure)


def see() -> None:
    data = digits()
    for title, convolutions in (("A vision transformer", False), ("Convolutions and a transformer", True)):
        make = partial(Vision, convolutions)
        models = fit(f"{title} on digits", make, partial(digit_batches, data), nn.functional.cross_entropy)
        for who, model in models.items():
            with torch.no_grad():
                right = (model(data.test_x).argmax(1) == data.test_y).float().mean().item()
            print(f"  {who:<7} {right:.1%} of the test images")
        if not convolutions:
            draw(models["fastnn"], data, REPORT / "transformer_attention.png")
            print(f"  picture: {REPORT / 'transformer_attention.png'}")


if __name__ == "__main__":
    parts = {"words": words, "gpt": gpt, "digits": see}
    for part in sys.argv[1:] or parts:
        parts[part]()
