"""Where a token stands: sinusoidal, learned, rotary and relative positions, in plain PyTorch: they cost little."""

import math

import torch
from torch import Tensor


def _need(op: str, name: str, value: object, condition: bool, allowed: str) -> None:
    if not condition:
        raise RuntimeError(f"{op}(): {name} must be {allowed}, got {value}")


def sinusoidal_positions(
    length: int,
    size: int,
    *,
    offset: int = 0,
    base: float = 10000.0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """(length, size): sin(p / base^(2i / size)) in column 2i and the cosine in column 2i + 1, for p = offset, offset + 1, …

    Vaswani et al. 2017 (arXiv:1706.03762), section 3.5. Computed in float64. RuntimeError for an odd size.
    """
    _need("sinusoidal_positions", "size", size, size % 2 == 0, "even")
    angles = rotary_angles(length, size, offset=offset, base=base, dtype=torch.float64, device=device)
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(1).to(dtype)


def learned_positions(input: Tensor, weight: Tensor, *, offset: int = 0) -> Tensor:
    """input (…, L, E) plus rows offset … offset + L - 1 of weight (positions, E): Gehring et al. 2017 (arXiv:1705.03122), 3.1.

    RuntimeError where weight has no row for a position.
    """
    length = input.shape[-2]
    _need("learned_positions", "weight", tuple(weight.shape), weight.dim() == 2 and weight.shape[1] == input.shape[-1],
          f"(positions, {input.shape[-1]})")  # fmt: skip
    _need("learned_positions", "offset + L", offset + length, 0 <= offset <= weight.shape[0] - length,
          f"in [0, {weight.shape[0]}], as weight has so many rows")  # fmt: skip
    return input + weight[offset : offset + length]


def rotary_angles(
    length: int,
    size: int,
    *,
    offset: int = 0,
    base: float = 10000.0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """(length, size / 2): p · base^(-2i / size), for p = offset, offset + 1, …: Su et al. 2021 (arXiv:2104.09864), equation 15.

    Computed in float64. RuntimeError for an odd size.
    """
    _need("rotary_angles", "size", size, size % 2 == 0, "even")
    frequencies = base ** (-torch.arange(0, size, 2, dtype=torch.float64, device=device) / size)
    positions = torch.arange(offset, offset + length, dtype=torch.float64, device=device)
    return torch.outer(positions, frequencies).to(dtype)


def rotary(input: Tensor, angles: Tensor, *, interleaved: bool = False) -> Tensor:
    """Each pair of numbers of input (…, L, E), turned by its angle (…, L, R / 2); numbers beyond R stay.

    Pairs are (i, i + R / 2), as in GPT-NeoX and Llama, or ``interleaved`` (2i, 2i + 1), as in RoFormer and GPT-J: Su et al. 2021
    (arXiv:2104.09864), equation 34. RuntimeError where the shapes do not match.
    """
    turned = 2 * angles.shape[-1]
    _need("rotary", "angles", tuple(angles.shape), turned <= input.shape[-1] and angles.shape[-2] == input.shape[-2],
          f"(…, {input.shape[-2]}, at most {input.shape[-1] // 2})")  # fmt: skip
    cos, sin = angles.cos().to(input.dtype), angles.sin().to(input.dtype)
    x, rest = input[..., :turned], input[..., turned:]
    a, b = (x[..., ::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
    pairs = (a * cos - b * sin, b * cos + a * sin)
    y = torch.stack(pairs, -1).flatten(-2) if interleaved else torch.cat(pairs, -1)
    return torch.cat([y, rest], -1) if rest.shape[-1] else y


def relative_shift(scores: Tensor) -> Tensor:
    """Scores by distance, (…, L, K) with distance 0 in the last column, as scores by key: row i is moved left by L - 1 - i.

    Dai et al. 2019 (arXiv:1901.02860), appendix B. What comes in from the right belongs to keys behind the query, which a causal
    mask hides.
    """
    *batch, length, keys = scores.shape
    padded = torch.cat([scores.new_zeros(*batch, length, 1), scores], -1)
    return padded.reshape(*batch, keys + 1, length)[..., 1:, :].reshape(scores.shape)


def t5_buckets(distance: Tensor, *, bidirectional: bool = True, buckets: int = 32, max_distance: int = 128) -> Tensor:
    """The bucket of each distance (key's position - query's, integers): Raffel et al. 2020 (arXiv:1910.10683), section 2.1.

    Half of the buckets are for one distance each, the others for ranges that grow geometrically up to max_distance, beyond which
    all share the last. ``bidirectional``: half of all are for keys behind the query; else those share bucket 0.
    """
    if bidirectional:
        buckets //= 2
        first, distance = (distance > 0) * buckets, distance.abs()
    else:
        first, distance = torch.zeros_like(distance), (-distance).clamp(min=0)
    exact = buckets // 2
    # in float32, as the models were trained: at a border, float64 may choose the other bucket
    scaled = torch.log(distance.float() / exact) / math.log(max_distance / exact) * (buckets - exact)
    far = exact + scaled.clamp(min=0).to(torch.long)  # log(0) is of no consequence, but not a long
    return first + torch.where(distance < exact, distance, far.clamp(max=buckets - 1))


def t5_bias(
    weight: Tensor, queries: int, keys: int, *, offset: int = 0, bidirectional: bool = True, max_distance: int = 128
) -> Tensor:
    """weight (buckets, H) by the bucket of each query and key: (H, queries, keys), to be added to the scores (Raffel et al. 2020,
    section 2.1). The first query has position ``offset``."""
    positions = torch.arange(max(queries + offset, keys), device=weight.device)
    distance = positions[:keys] - positions[offset : offset + queries, None]
    buckets = t5_buckets(distance, bidirectional=bidirectional, buckets=weight.shape[0], max_distance=max_distance)
    return weight[buckets].permute(2, 0, 1)
