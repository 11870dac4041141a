"""Voice embeddings by a pretrained encoder of three LSTM layers, from the PyPI package Resemblyzer (Wan et al. 2018).

The package's own import needs librosa and webrtcvad, which need a compiler: its weights are read, and the few lines of its
model and of its spectrogram are here. The voices are synthesised, so that nothing has to be downloaded.
"""

import math
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

RATE, WINDOW, HOP, MELS, FRAMES = 16000, 400, 160, 40, 160  # samples a second, a window, between two; channels; of a part
#: A voice: its pitch in Hz, and the length of its vocal tract relative to a man's, by which its formants are divided.
VOICES = [(95.0, 1.05), (120.0, 1.0), (145.0, 0.95), (180.0, 0.88), (215.0, 0.84), (260.0, 0.75)]
#: The first three formants of a, e, i, o, u in Hz
VOWELS = [(730, 1090, 2440), (530, 1840, 2480), (270, 2290, 3010), (570, 840, 2410), (300, 870, 2240)]


def synthesise(pitch: float, tract: float, vowels: list[int]) -> Tensor:
    """Half a second of each vowel: harmonics of a gliding pitch that fall off, raised where the vocal tract resonates."""
    t = torch.arange(len(vowels) * RATE // 2) / RATE
    glide = pitch * (1 + 0.08 * torch.sin(2 * math.pi * 0.7 * t) + 0.01 * torch.sin(2 * math.pi * 5 * t))
    phase = 2 * math.pi * torch.cumsum(glide.double(), 0) / RATE
    formants = torch.tensor(VOWELS)[vowels].repeat_interleave(RATE // 2, 0).float() / tract
    smooth = nn.functional.avg_pool1d(formants.t(), 801, 1, 400, count_include_pad=False).t()  # from vowel to vowel
    wave = torch.zeros(len(t))
    for n in range(1, int(RATE / 2 / (1.1 * pitch))):
        f = n * glide
        gain = sum(1 / (1 + ((f - smooth[:, k]) / (40.0 + 30 * k)) ** 2) / (1 + k) for k in range(3))
        wave += gain * torch.sin(n * phase).float() / n
    return wave / wave.pow(2).mean().sqrt() * 10 ** (-30 / 20)


def _mel_filters() -> Tensor:
    """(channels, frequencies): triangles on Slaney's scale, linear to 1 kHz and logarithmic above, each of area one."""
    step = math.log(6.4) / 27
    top = 15 + math.log(RATE / 2 / 1000) / step
    mels = torch.linspace(0, top, MELS + 2, dtype=torch.float64)
    edges = torch.where(mels < 15, mels * 200 / 3, 1000 * torch.exp(step * (mels - 15)))
    f = torch.linspace(0, RATE / 2, WINDOW // 2 + 1, dtype=torch.float64)
    low, mid, high = (edges[k : k + MELS, None] for k in range(3))
    return (torch.minimum((f - low) / (mid - low), (high - f) / (high - mid)).clamp_min(0) * 2 / (high - low)).float()


def spectrogram(wave: Tensor) -> Tensor:
    """(frames, 40) powers, as Resemblyzer has them from librosa"""
    spectrum = torch.stft(
        wave, WINDOW, HOP, window=torch.hann_window(WINDOW), center=True, pad_mode="constant", return_complex=True
    )
    return (_mel_filters() @ spectrum.abs().square()).t()


class Encoder(nn.Module):
    """Resemblyzer's VoiceEncoder: the last state of three LSTM layers, projected, cut off at zero, of length one."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(MELS, 256, 3, batch_first=True)
        self.linear = nn.Linear(256, 256)
        self.relu = nn.ReLU()

    def forward(self, mels: Tensor) -> Tensor:
        """(parts, frames, 40) → (parts, 256)"""
        embedded = self.relu(self.linear(self.lstm(mels)[1][0][-1]))
        return embedded / embedded.norm(dim=1, keepdim=True)


def encoder() -> Encoder:
    """The pretrained model, in evaluation mode."""
    spec = find_spec("resemblyzer")  # found, not imported
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("the voices need Resemblyzer: pip install --no-deps Resemblyzer")
    state = torch.load(Path(spec.submodule_search_locations[0]) / "pretrained.pt", map_location="cpu")
    model = Encoder().eval()
    model.load_state_dict({name: t for name, t in state["model_state"].items() if not name.startswith("similarity")})
    return model


def utterances() -> Tensor:
    """(12 utterances, 4 parts of 1.6 s, 160 frames, 40): all voices say one thing, then all another."""
    said = [[0, 2, 4, 1, 3, 0, 4, 2], [3, 1, 0, 4, 2, 2, 1, 3]]
    waves = [synthesise(pitch, tract, vowels) for vowels in said for pitch, tract in VOICES]
    return torch.stack([spectrogram(w).unfold(0, FRAMES, FRAMES // 2).mT[:4] for w in waves]).contiguous()


@torch.inference_mode()
def embed(model: Callable[..., Tensor], parts: Tensor) -> Tensor:
    """(utterances, 256): the mean over an utterance's parts, of length one"""
    found = model(parts.flatten(0, 1)).unflatten(0, parts.shape[:2]).mean(1)
    return found / found.norm(dim=1, keepdim=True)
