"""out/demo/report.html (one file, nothing beside it) and report.json."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastdit.testing import page

from . import layers

HEADER = ("model", "dtype", "as it is, s", "accelerated, s", "speed-up", "max error (its own)", "rms error (its own)")


def plain(entry: dict[str, Any]) -> dict[str, Any]:
    """A comparison without its tensors: what goes into report.json."""
    kept = {key: value for key, value in entry.items() if key != "outputs"}
    return {**kept, "layers": layers.plain(entry["layers"])}


def write(out: Path, result: dict[str, Any], shown: dict[str, Any]) -> None:
    """`shown` holds the pictures: frames of the clip, and of both decodes."""
    (out / "report.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    page.write(out / "report.html", "fastdit demo", *_body(result, shown, out))


def _body(result: dict[str, Any], shown: dict[str, Any], out: Path) -> list[object]:
    machine, clip = result["machine"], result["clip"]
    device = machine.get("gpu", machine["cpu"])
    where = f"{device}, {machine['threads']} threads, {machine['isa']}, torch {machine['torch']}"
    verdict = (
        page.tag("span", "the outputs agree", class_="ok")
        if result["agree"]
        else page.tag("span", "the outputs do NOT agree", class_="bad")
    )
    parts: list[object] = [
        page.tag("h1", "fastdit.accelerate(model), measured"),
        page.tag("p", where, class_="note"),
        page.tag(
            "p",
            "Real architectures with seeded random weights, as they are and after one line, timed in turns: ",
            verdict,
            ".",
        ),
        summary(result["models"]),
        page.png(_plot(result["models"]), "time before and after"),
    ]
    for entry in result["models"]:
        parts += _model(entry)
    parts += [
        page.tag("h2", "The clip"),
        page.tag(
            "p",
            f"\u201c{clip['caption']}\u201d: {clip['frames']} frames of {clip['size'][0]}x{clip['size'][1]}, "
            f"written as MP4 ({clip['bytes']:,} bytes), read back at {clip['psnr_db']:.1f} dB PSNR.",
        ),
        page.tag("p", page.mp4((out / clip["file"]).read_bytes())),
        _strip(shown["clip"], 6, 150),
    ]
    if "eager" in shown:
        parts += [
            page.tag("h2", "The clip, encoded and decoded by the video VAE"),
            page.tag(
                "p",
                "The weights are random, so the pictures mean nothing by themselves: both rows have to be the same. "
                f"Largest difference of a pixel in [-1, 1]: {shown['difference']:.1e}.",
            ),
            page.tag("p", "as it is", class_="note"),
            _strip(shown["eager"], 6, 150),
            page.tag("p", "accelerated", class_="note"),
            _strip(shown["fastdit"], 6, 150),
        ]
    made = result["generation"]
    parts += [
        page.tag("h2", "A generated clip"),
        page.tag("p", generation(made)),
        page.tag("p", f"Expanded: \u201c{made['expanded']}\u201d", class_="note"),
        page.tag("p", page.mp4((out / made["file"]).read_bytes())),
        _strip(shown["generated"], 6, 150),
    ]
    return parts


def summary(entries: list[dict[str, Any]]) -> page.Html:
    return page.table(HEADER, [(e["name"], e["dtype"], *figures(e)) for e in entries], text=(0, 1))


def figures(entry: dict[str, Any]) -> tuple[str, ...]:
    """The numbers of one row of the summary, as text."""
    ours, own = (entry["errors"][side] for side in ("fastdit", "eager"))
    return (
        f"{entry['eager_s']['p50']:.3f}",
        f"{entry['fastdit_s']['p50']:.3f}",
        f"{entry['speedup']:.2f}x",
        f"{ours['max']:.1e} ({own['max']:.1e})",
        f"{ours['rms']:.1e} ({own['rms']:.1e})",
    )


def agreement(entry: dict[str, Any]) -> str:
    """One honest sentence about the errors."""
    errors = entry["errors"]
    return (
        f"Errors are against the {errors['truth']} (rms of its output {errors['truth_rms']:.2f}); "
        f"the accelerated model uses {100 * errors['share_of_allowed']:.0f} % of what is allowed "
        f"(twice the maximum, 1.5 times the rms of the model as it is). "
        f"Accelerated and as it is differ by at most {errors['eager_to_fastdit_max']:.1e}. "
        f"After fastdit.restore the model gives {'bitwise its old' if entry['restored_bitwise'] else 'ANOTHER'} result."
    )


def generation(made: dict[str, Any]) -> str:
    """What was asked for and what a detector sees."""
    seen = made["shows"]
    return (
        f"generated \u201c{made['prompt']}\u201d with the shipped checkpoint, seed {made['seed']}: "
        f"{made['frames']} frames of {made['size'][0]}x{made['size'][1]} in {made['seconds']:.1f} s; the detector sees "
        f"a {seen['size']} {seen['colour']} {seen['shape']}, motion {seen['motion']}, on {seen['background']}"
    )


def _model(entry: dict[str, Any]) -> list[object]:
    groups = [
        (g["group"], f"{g['eager_ms']:.1f}", f"{g['fastdit_ms']:.1f}", f"{g['speedup']:.2f}x" if g["speedup"] else "")
        for g in entry["groups"]
    ]
    operators = [
        page.tag(
            "details",
            page.tag("summary", f"operators, {title}"),
            page.table(
                ("operator", "calls", "ms"),
                [(o["operator"], o["calls"], f"{o['ms']:.1f}") for o in entry["operators"][side]],
            ),
        )
        for side, title in (("eager", "as it is"), ("fastdit", "accelerated"))
    ]
    return [
        page.tag("h2", f"{entry['name']}, {entry['dtype']}"),
        page.tag("p", f"{entry['detail']}; {entry['parameters'] / 1e6:.0f} M parameters, {entry['rounds']} rounds."),
        page.tag("p", agreement(entry)),
        page.table(("where the time goes, ms", "as it is", "accelerated", "speed-up"), groups),
        page.table(("layer", "count", "what became of it"), layers.rows(entry["layers"]), text=(0, 2)),
        *operators,
    ]


def _plot(entries: list[dict[str, Any]]) -> Any:
    pyplot = page.plots()
    figure, axes = pyplot.subplots(1, len(entries), figsize=(3.6 * len(entries), 3.4), squeeze=False)
    for ax, entry in zip(axes[0], entries, strict=True):
        base = {"eager_ms": 0.0, "fastdit_ms": 0.0}
        for i, group in enumerate(entry["groups"]):
            values = [group[side] for side in base]
            ax.bar(["as it is", "accelerated"], values, bottom=list(base.values()), color=f"C{i}", label=group["group"])
            base = {side: base[side] + value for side, value in zip(base, values, strict=True)}
        ax.set_title(f"{entry['name']}\n{entry['dtype']}: {entry['speedup']:.2f}x", fontsize=10)
        ax.set_ylabel("ms, by operator")
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(fontsize=6, loc="upper center", bbox_to_anchor=(0.5, -0.1), frameon=False)
    figure.tight_layout()
    return figure


def _strip(frames: np.ndarray, count: int, width: int) -> page.Html:
    chosen = np.linspace(0, len(frames) - 1, min(count, len(frames))).round().astype(int)
    figures = []
    for t in chosen:
        picture = Image.fromarray(frames[t])
        stream = io.BytesIO()
        picture.resize((width, width * picture.height // picture.width)).save(stream, format="PNG")
        name = f"frame {t}"
        figures.append(page.tag("figure", page.picture(stream.getvalue(), name), page.tag("figcaption", name)))
    return page.tag("div", *figures, class_="frames")
