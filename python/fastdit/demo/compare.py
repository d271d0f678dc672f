"""One model as it is beside the same model accelerated: time, errors, where the time went, which layers changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdit.integrations import accelerate, restore
from fastdit.testing import close, timing
from fastdit.testing.models import twin

from . import opclock

Call = Callable[[Any], Tensor]
Step = Callable[[str], None]


@dataclass(frozen=True)
class Subject:
    """A model, the call that is timed, and the call whose result is judged against `truth`.

    truth: the wider result of `probe` from the model as it is; truth_name says which ("fp32 run", ...).
    groups: printed name -> kinds of operators (opclock.kind) that it holds; the last takes the rest.
    """

    name: str
    detail: str
    model: Any
    call: Call
    probe: Call
    truth: Tensor
    truth_name: str
    rounds: int
    device: str
    groups: dict[str, tuple[str, ...]]


def compare(subject: Subject, step: Step) -> dict[str, Any]:
    """Runs the subject eager and accelerated in turns; `step` is told what happens (one call per progress step)."""
    dtype = str(next(subject.model.parameters()).dtype).removeprefix("torch.")
    label = f"{subject.name} {dtype}"
    eager_model, fast_model = subject.model, twin(subject.model)

    with torch.no_grad():
        step(f"{label}: as it is")
        eager_out = subject.call(eager_model)
        layers = accelerate(fast_model)
        step(f"{label}: accelerated")
        fast_out = subject.call(fast_model)
        whole = subject.probe is subject.call  # then the outputs at hand are the probe's
        eager_probe, fast_probe = (
            (eager_out, fast_out) if whole else (subject.probe(eager_model), subject.probe(fast_model))
        )
        errors = _judge(subject, eager_probe, fast_probe)

        step(f"{label}: timing, in turns")
        times = timing.interleaved(
            {"eager": lambda: subject.call(eager_model), "fastdit": lambda: subject.call(fast_model)},
            device=subject.device,
            rounds=subject.rounds,
            repeats=1,
            after_round=lambda done: step(f"{label}: round {done} of {subject.rounds}"),
        )
        step(f"{label}: time per operator")
        eager_clock, fast_clock = _clock(subject, eager_model), _clock(subject, fast_model)
        restore(fast_model)
        step(f"{label}: restored")
        restored = bool(torch.equal(subject.probe(fast_model), eager_probe))

    difference = (fast_out.double() - eager_out.double()).abs()
    return {
        "name": subject.name,
        "detail": subject.detail,
        "dtype": dtype,
        "parameters": sum(p.numel() for p in subject.model.parameters()),
        "rounds": subject.rounds,
        "eager_s": _seconds(times["eager"]),
        "fastdit_s": _seconds(times["fastdit"]),
        "speedup": times["eager"].p50 / times["fastdit"].p50,
        "errors": {**errors, "eager_to_fastdit_max": float(difference.max())},
        "restored_bitwise": restored,
        "groups": _groups(subject, eager_clock, fast_clock),
        "operators": {"eager": _operators(eager_clock), "fastdit": _operators(fast_clock)},
        "layers": layers,
        "outputs": (eager_out, fast_out),
    }


def _judge(subject: Subject, eager: Tensor, fast: Tensor) -> dict[str, Any]:
    """The tolerance policy of fastdit.testing.close with the model as it is as the baseline."""
    found = close.errors(fast, subject.truth, eager)
    return {
        "truth": subject.truth_name,
        "truth_rms": float(subject.truth.double().pow(2).mean().sqrt()),
        "eager": {"max": found.max_base, "rms": found.rms_base},
        "fastdit": {"max": found.max, "rms": found.rms},
        "share_of_allowed": found.ratio,
        "agree": found.ok,
    }


def _clock(subject: Subject, model: Any) -> opclock.OpClock:
    with opclock.OpClock(subject.device) as clock:
        subject.call(model)
    return clock


def _groups(subject: Subject, eager: opclock.OpClock, fast: opclock.OpClock) -> list[dict[str, Any]]:
    before, after = (opclock.by_group(clock, subject.groups) for clock in (eager, fast))
    return [
        {"group": name, "eager_ms": 1e3 * before[name], "fastdit_ms": 1e3 * after[name],
         "speedup": before[name] / after[name] if after[name] else None}
        for name in subject.groups
    ]  # fmt: skip


def _operators(clock: opclock.OpClock, most: int = 12) -> list[dict[str, Any]]:
    ranked = sorted(clock.seconds, key=lambda name: -clock.seconds[name])[:most]
    return [{"operator": n, "calls": clock.calls[n], "ms": 1e3 * clock.seconds[n]} for n in ranked]


def _seconds(taken: timing.Timing) -> dict[str, float]:
    return {"p20": taken.p20, "p50": taken.p50, "p80": taken.p80}
