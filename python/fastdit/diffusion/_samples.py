"""What diffusion works on: a batch, or a list of samples of different sizes.

    Samples = Tensor (S, C, ...)  or  list of S tensors (C, ...)

A video is (C, T, H, W), an image (C, H, W). Formulas are written once, for batches; `each` gives them a list sample by
sample. Math is in promote(dtype, fp32), results have the dtype of their first tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

Samples = Tensor | list[Tensor]
Coefficient = Tensor | float  # (S,) one per sample, or one for all
ModelFn = Callable[[Samples, Tensor], Samples]  # (x_t, t (S,) in [0, TIME]) -> output
Progress = Callable[[int, int], None]  # steps done, steps in all
Generators = torch.Generator | Sequence[torch.Generator] | None  # one for all samples, or one each


class Process(Protocol):
    """A diffusion, as far as its loss is drawn."""

    def sample_times(
        self, count: int, *, generator: torch.Generator | None = None, device: torch.device | str | None = None
    ) -> Tensor: ...

    def add_noise(self, x0: Samples, noise: Samples, t: Tensor) -> Samples: ...


TIME = 1000.0  # models are told times in [0, TIME]


def as_samples(name: str, what: str, x: Samples | Sequence[Tensor]) -> Samples:
    """`x` as a batch or a list of at least one sample; a ValueError or TypeError otherwise."""
    if isinstance(x, Tensor):
        if x.dim() < 2:
            raise ValueError(f"{name}: {what} must be a batch (S, C, ...); got {list(x.shape)}; add the batch axis.")
    else:
        x = list(x)
        if not x or not all(isinstance(v, Tensor) for v in x):
            got = [type(v).__name__ for v in x[:3]]
            raise TypeError(f"{name}: {what} must be a batch or a list of at least one tensor (C, ...); got {got}.")
    if not all(v.is_floating_point() for v in ([x] if isinstance(x, Tensor) else x)):
        raise TypeError(f"{name}: {what} must hold floating-point numbers; convert pixels or labels first.")
    return x


def same_sizes(name: str, what: str, x: Samples, expected: Samples) -> None:
    """Raises unless `x` is a batch or list just as `expected` is, with its sizes."""
    if sizes(x) != sizes(expected):
        raise ValueError(f"{name}: {what} has the wrong size; got {sizes(x)}, expected {sizes(expected)}.")


def sizes(x: Samples) -> list:
    return list(x.shape) if isinstance(x, Tensor) else [list(v.shape) for v in x]


def per_sample(name: str, t: Tensor, x: Samples) -> Tensor:
    """`t` as given, checked to be one number per sample."""
    if t.dim() != 1 or len(t) != len(x):
        raise ValueError(f"{name}: t must be one time per sample; got {list(t.shape)}, expected [{len(x)}].")
    return t


def first(x: Samples) -> Tensor:
    """The batch, or the first sample: it tells dtype and device."""
    return x if isinstance(x, Tensor) else x[0]


def each(f: Callable[..., Tensor], *args: Samples) -> Samples:
    """f(*args) over batches; over a list sample by sample, as batches of one. Tensors among lists are cut with them."""
    listed = [a for a in args if not isinstance(a, Tensor)]
    if not listed:
        return f(*args)
    return [f(*(a[i : i + 1] if isinstance(a, Tensor) else a[i][None] for a in args))[0] for i in range(len(listed[0]))]


def wide(x: Tensor) -> Tensor:
    """`x` in the dtype that math is done in: fp32 or wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def spread(a: Tensor, x: Tensor) -> Tensor:
    """Coefficients (S,) shaped to multiply a batch x (S, ...), in x's dtype."""
    return a.to(x).view(-1, *(1,) * (x.dim() - 1))


def combine(a: Coefficient, x: Samples, b: Coefficient, y: Samples) -> Samples:
    """a * x + b * y, in the dtype of x."""

    def batch(x: Tensor, y: Tensor, *ab: Tensor) -> Tensor:
        u, v = wide(x), wide(y)
        left = spread(ab[0], u) if isinstance(a, Tensor) else a
        right = spread(ab[-1], v) if isinstance(b, Tensor) else b
        return (left * u + right * v).to(x.dtype)

    return each(batch, x, y, *(c for c in (a, b) if isinstance(c, Tensor)))


def per_sample_value(value: float, x: Samples) -> Tensor:
    """One value for all samples, such as a time: (S,) in fp32, for fp64 samples in fp64."""
    like = first(x)
    return torch.full((len(x),), value, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)


def gaussian_noise(
    shape: Sequence[int] | Sequence[Sequence[int]],
    *,
    generator: Generators = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Samples:
    """Standard normal noise: the start of sampling.

    Args:
        shape: (S, C, ...) gives a batch, a list of (C, ...) gives a list.
        generator (torch.Generator, or one per sample): draws on its own device, so a CPU generator gives the same noise
            on every device. One per sample makes each sample's noise independent of what else is drawn.
        device, dtype: of the result.
    """

    def draw(size: Sequence[int], g: torch.Generator | None) -> Tensor:
        return torch.randn(tuple(size), generator=g, device=g.device if g else device, dtype=dtype).to(device=device)

    if len(shape) == 0:
        raise ValueError("gaussian_noise: no samples; got an empty shape, expected (S, C, ...) or a list of (C, ...).")
    batch = isinstance(shape[0], int)
    single = generator is None or isinstance(generator, torch.Generator)
    if batch and single:
        return draw(shape, generator)  # type: ignore[arg-type]
    shapes: list = [shape[1:]] * shape[0] if batch else list(shape)  # type: ignore[operator]
    generators = [generator] * len(shapes) if single else list(generator)  # type: ignore[arg-type]
    if len(generators) != len(shapes):
        raise ValueError(
            f"gaussian_noise: one generator in all or one per sample; got {len(generators)}, expected {len(shapes)}."
        )
    drawn = [draw(size, g) for size, g in zip(shapes, generators, strict=True)]  # type: ignore[arg-type]
    return torch.stack(drawn) if batch else drawn


def noise_like(x: Samples, generator: Generators = None) -> Samples:
    """Noise of the sizes, dtype and device of `x`."""
    shape = list(x.shape) if isinstance(x, Tensor) else [v.shape for v in x]
    like = first(x)
    return gaussian_noise(shape, generator=generator, device=like.device, dtype=like.dtype)


def first_generator(generator: Generators) -> torch.Generator | None:
    """The one that draws what the samples share."""
    return generator if generator is None or isinstance(generator, torch.Generator) else generator[0]


# Known frames: the first frames of a video are given (image to video), and stay as they are.


def known_counts(name: str, known_frames: int | Sequence[int], x: Samples) -> list[int]:
    """Given frames of each sample, checked to leave one to make."""
    counts = [known_frames] * len(x) if isinstance(known_frames, int) else list(known_frames)
    lengths = [v.shape[1] if v.dim() == 4 else 1 for v in x]
    if len(counts) != len(x) or not all(0 <= k < n for k, n in zip(counts, lengths, strict=True)):
        raise ValueError(
            f"{name}: known_frames must be from 0 to T - 1 of a video (C, T, H, W), one count for all samples or one "
            f"each; got {known_frames}, lengths {lengths}; leave at least one frame to make."
        )
    return counts


def known_frames_of(name: str, known: Samples | Sequence[Tensor] | None, x: Samples) -> Samples | None:
    """Given frames, checked to fit before the rest of `x`, in its dtype and on its device."""
    if known is None:
        return None
    known = as_samples(name, "known", known)
    fits = isinstance(known, Tensor) == isinstance(x, Tensor) and len(known) == len(x)
    if not fits or not all(_begins(k, v) for k, v in zip(known, x, strict=True)):
        raise ValueError(
            f"{name}: known must be the first frames (C, k, H, W), 0 <= k < T, of every video (C, T, H, W); "
            f"got {sizes(known)}, videos {sizes(x)}; resize the frames, encode them, then give them as the videos are."
        )
    return known.to(x) if isinstance(known, Tensor) else [k.to(v) for k, v in zip(known, x, strict=True)]  # type: ignore[arg-type]


def _begins(k: Tensor, v: Tensor) -> bool:
    same = k.dim() == v.dim() == 4 and (k.shape[0], *k.shape[2:]) == (v.shape[0], *v.shape[2:])
    return same and k.shape[1] < v.shape[1]


def put_known(x: Samples, known: Samples | None) -> Samples:
    """`x` with its first frames replaced by the given ones."""
    if known is None:
        return x
    return each(lambda k, v: torch.cat([k, v[:, :, k.shape[2] :]], dim=2), known, x)


def keep_known(x: Samples, given: Samples, made: Samples) -> Samples:
    """`x` where `made` is 1, `given` elsewhere."""
    return each(lambda v, g, m: torch.where(m.bool(), v, g), x, given, made)


def unknown(counts: Sequence[int], x: Samples) -> Samples:
    """1 on the frames to make, 0 on the given ones: (S, 1, T, 1, 1) or a list of (1, T, 1, 1), fp32."""
    like = first(x)

    def batch(count: Tensor, v: Tensor) -> Tensor:
        return (torch.arange(v.shape[2], device=v.device) >= count[:, None]).float()[:, None, :, None, None]

    return each(batch, torch.tensor(counts, device=like.device), x)


class Noised(NamedTuple):
    """What a loss is made of: clean samples, noise, times (S,), what the model is given, and weights of the loss."""

    x0: Samples
    noise: Samples
    t: Tensor
    x_t: Samples
    weights: list[Samples]


def noised(
    name: str,
    process: Process,
    x0: Samples,
    t: Tensor | None,
    noise: Samples | None,
    known_frames: int | Sequence[int],
    weight: Samples | None,
    generator: Generators,
) -> Noised:
    """Draws t and noise where they are not given, and leaves known frames clean and out of the loss."""
    x0 = as_samples(name, "x0", x0)
    counts = known_counts(name, known_frames, x0)
    if t is None:
        t = process.sample_times(len(x0), generator=first_generator(generator), device=first(x0).device)
    noise = noise_like(x0, generator) if noise is None else noise
    x_t = process.add_noise(x0, noise, t)
    weights = [] if weight is None else [weight]
    if any(counts):
        made = unknown(counts, x0)
        weights.append(made)
        x_t = keep_known(x_t, x0, made)
    return Noised(x0, noise, t, x_t, weights)


def weighted_mean(x: Samples, *weights: Samples) -> Tensor:
    """The mean of each sample, (S,), weighted by the product of `weights`, broadcastable to x."""

    def batch(x: Tensor, *ws: Tensor) -> Tensor:
        if not ws:
            return x.flatten(1).mean(1)
        weight = torch.ones_like(x)
        for w in ws:
            weight = weight * w
        total = weight.flatten(1).sum(1).clamp(min=torch.finfo(x.dtype).tiny)  # nothing counts: 0
        return (x * weight).flatten(1).sum(1) / total

    found = each(batch, x, *weights)
    return found if isinstance(found, Tensor) else torch.stack(found)


def mean_square(x: Samples, y: Samples, *weights: Samples) -> Tensor:
    """The weighted mean of (x - y)^2 over each sample, (S,), in fp32 at least."""
    return weighted_mean(each(lambda x, y: (wide(x) - wide(y)).square(), x, y), *weights)
