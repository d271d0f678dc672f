"""Classifier-free guidance (Ho and Salimans, 2207.12598): follow the condition harder than the model was taught.

    out = null + scale * (conditional - null)        scale 1: the model as it is; 0: without the condition

Both come from one call of the model on a batch of twice the samples. The same for eps, x_0 and v: all are linear in the
model's mean. Two refinements, both off by default:

    interval   guidance only at times t in [lo, hi] (2404.07724): the noisiest and the cleanest steps gain nothing
    rescale    out * std(conditional) / std(out), mixed in by this factor (2305.08891, 3.4): large scales overexpose
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._samples import TIME, ModelFn, Samples, each, per_sample_value, sizes, spread, wide


def guided(
    model_fn: Callable[[Samples, Tensor, Any], Samples],
    text: Any,
    null: Any,
    scale: float,
    *,
    interval: tuple[float, float] = (0.0, TIME),
    rescale: float = 0.0,
) -> ModelFn:
    """A model_fn(x_t, t) with classifier-free guidance, for the samplers.

    Args:
        model_fn: (x_t, t (S,), condition of S samples) -> output, called with twice the samples, null last.
            Whatever else it closes over must fit that.
        text, null: the condition of the S samples, and of the S samples without it; what `joined` takes.
        scale (float): 1 calls the model once, without `null`.
        interval ((lo, hi)): times t in [0, 1000] at which to guide; elsewhere scale is 1.
        rescale (float in [0, 1]): 0.7 is the paper's.
    Returns:
        (x_t, t) -> output. A learned variance (twice as many channels as x_t) is the conditional one.
    """
    lo, hi = interval
    if not lo <= hi:
        raise ValueError(
            f"guided: interval must be (lo, hi) with lo <= hi; got {tuple(interval)}, expected e.g. (0, 1000)."
        )
    if not 0 <= rescale <= 1:
        raise ValueError(f"guided: rescale must lie in [0, 1]; got {rescale}; 0 is off, 0.7 the paper's.")
    if scale == 1:
        return lambda x, t: model_fn(x, t, text)
    both = joined(text, null)

    def guided_model_fn(x: Samples, t: Tensor) -> Samples:
        inside = (t >= lo) & (t <= hi)
        if (lo, hi) != (0.0, TIME) and not bool(inside.any()):
            return model_fn(x, t, text)
        out = model_fn(torch.cat([x, x]) if isinstance(x, Tensor) else x + x, torch.cat([t, t]), both)
        if len(out) != 2 * len(x):
            raise ValueError(
                f"guided: the model must return one output per sample; got {sizes(out)} for {2 * len(x)} samples."
            )
        conditional, unconditional = out[: len(x)], out[len(x) :]
        factor = torch.where(inside, per_sample_value(scale, x), 1.0)
        return each(lambda x, c, u, f: _guide(x, c, u, f, rescale), x, conditional, unconditional, factor)

    return guided_model_fn


def _guide(x: Tensor, conditional: Tensor, null: Tensor, scale: Tensor, rescale: float) -> Tensor:
    """A batch of guided outputs; scale (S,). Channels beyond x's are the conditional ones."""
    channels = x.shape[1]
    c, u = wide(conditional[:, :channels]), wide(null[:, :channels])
    out = u + spread(scale, u) * (c - u)
    if rescale:
        c_std, out_std = (v.flatten(1).std(1, correction=0) for v in (c, out))
        ratio = c_std / out_std.clamp(min=torch.finfo(out.dtype).tiny)  # an output of zeros stays
        out = out * spread(1 - rescale + rescale * ratio, out)
    return torch.cat([out.to(conditional.dtype), conditional[:, channels:]], dim=1)


def joined(text: Any, null: Any) -> Any:
    """The conditions of two sets of samples as one.

    Tensors (S, ...), lists of S, tuples and dicts of such, or a class with cat([text, null]), as `models.Text`.
    """
    if text is None and null is None:
        return None
    if type(text) is not type(null):
        raise TypeError(
            f"guided: text and null must be of one type; got {type(text).__name__} and {type(null).__name__}; "
            'encode both with the same encoder, null from as many "".'
        )
    if not isinstance(text, (tuple, dict)) and hasattr(text, "__len__") and len(text) != len(null):
        raise ValueError(
            f"guided: text and null must condition as many samples; got {len(text)} and {len(null)}; "
            "repeat the null condition."
        )
    if isinstance(text, Tensor):
        return torch.cat([text, null])
    if isinstance(text, list):
        return text + null
    if isinstance(text, tuple) and len(text) == len(null):
        parts = [joined(a, b) for a, b in zip(text, null, strict=True)]
        return type(text)(*parts) if hasattr(text, "_fields") else tuple(parts)
    if isinstance(text, dict) and text.keys() == null.keys():
        return {key: joined(value, null[key]) for key, value in text.items()}
    if hasattr(type(text), "cat"):
        return type(text).cat([text, null])
    raise TypeError(
        f"guided: cannot join conditions; got {type(text).__name__}, expected tensors, lists, tuples or dicts of such, "
        "or a class with cat([text, null])."
    )
