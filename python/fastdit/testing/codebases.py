"""Writes the generated tables of docs/codebases: which layers of which class are replaced, and how fast that is.

python -m fastdit.testing.codebases                      layers, from the zoo (its tests hold the reports against them)
python -m fastdit.testing.codebases --json FILE          speed too, from `fastdit bench --suite models --json FILE`
python -m fastdit.testing.codebases --check              exit status 1 when the layers of a page are not current

Each page of `zoo.Model.page` and docs/codebases/README.md get a block "layers"; "speed" is written from a JSON only.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from fastdit.integrations import KINDS
from fastdit.testing import zoo
from fastdit.testing.markers import spliced

PAGES = Path("docs/codebases")
INDEX = "README"
MEASURED = {"DiT-": "dit", "Wan2.1": "wan", "AutoencoderKLWan": "wan"}  # rows of `whole.ROWS`, by how they begin


def classes(models: list[zoo.Model]) -> dict[str, list[zoo.Model]]:
    """The models by class: a name is the class, the method of a VAE, then what is special about the variant."""
    found: dict[str, list[zoo.Model]] = {}
    for model in models:
        name = model.name.partition(",")[0]
        found.setdefault(name.removesuffix(" encode").removesuffix(" decode"), []).append(model)
    return found


def layers_of(variants: list[zoo.Model]) -> list[str]:
    return list(dict.fromkeys(layer for model in variants for layer in model.layers))


def index_table(models: list[zoo.Model]) -> str:
    lines = ["| class | page | replaced |", "|---|---|---|"]
    for name, variants in sorted(classes(models).items()):
        page = variants[0].page
        lines.append(f"| `{name}` | [{page}]({page}.md) | {', '.join(layers_of(variants))} |")
    return "\n".join(lines)


def page_table(models: list[zoo.Model]) -> str:
    ops = {kind.name: kind.ops for kind in KINDS}
    lines = ["| class | replaced | by | variants tested |", "|---|---|---|---|"]
    for name, variants in sorted(classes(models).items()):
        tested = [model.name.removeprefix(name).lstrip(", ") or "as it is" for model in variants]
        for layer in layers_of(variants):
            lines.append(f"| `{name}` | {layer} | {', '.join(f'`{op}`' for op in ops[layer])} | {'; '.join(tested)} |")
            name, tested = "", []
    return "\n".join(lines).replace("| `` |", "| |")


def page_of(row: str) -> str | None:
    """The page that a benchmark row belongs to: that of the zoo's file it stands in."""
    for pages, rows in zoo.groups():
        if row in rows:
            return pages[0]
    return next((page for begin, page in MEASURED.items() if row.startswith(begin)), None)


def speed_table(document: dict[str, Any], page: str | None = None) -> str | None:
    """The rows of whole models, of one page or all; None when there are none."""
    rows: dict[tuple[str, ...], dict[str, dict]] = {}
    for row in document["rows"]:
        if row["op"] == "model" and page in (None, page_of(row["model"])):
            rows.setdefault((row["model"], row["shape"], row["dtype"], row["pass"]), {})[row["peer"]] = row
    if not rows:
        return None
    facts = document["machine"]
    device = facts.get("gpu") or f"{facts['cpu']}, {facts['isa']}, {facts['threads']} threads"
    lines = [
        f"Measured on {device}, torch {facts['torch']}; eager and compiled in turns with ours: above 1 is faster.",
        "",
        "| model | shape | dtype | pass | ms | x eager | x compile |",
        "|---|---|---|---|---:|---:|---:|",
    ]
    for key, peers in rows.items():
        ratios = [f"{peers[peer]['ratio']:.2f}" if peer in peers else "" for peer in ("eager", "compile")]
        time = f"{next(iter(peers.values()))['time_ms']:.4g}"
        lines.append(f"| {' | '.join([*key, time, *ratios])} |")
    return "\n".join(lines)


def written(folder: Path, document: dict[str, Any] | None) -> dict[Path, str]:
    """Every page as it should be. Raises FileNotFoundError for a page of the zoo that nobody wrote."""
    models = zoo.models()
    pages: dict[Path, str] = {}
    for page in (INDEX, *sorted({model.page for model in models})):
        path = folder / f"{page}.md"
        table = index_table(models) if page == INDEX else page_table([m for m in models if m.page == page])
        text = spliced(path.read_text("utf-8"), "layers", table, append=True)
        speed = speed_table(document, None if page == INDEX else page) if document else None
        pages[path] = text if speed is None else spliced(text, "speed", speed, append=True)
    return pages


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="what `fastdit bench --suite models --json` wrote")
    parser.add_argument("--check", action="store_true", help="write nothing; tell which pages are stale")
    parser.add_argument("--docs", type=Path, default=PAGES)
    chosen = parser.parse_args(arguments)
    document = None if chosen.json is None else json.loads(chosen.json.read_text("utf-8"))
    stale = {path: text for path, text in written(chosen.docs, document).items() if path.read_text("utf-8") != text}
    for path, text in stale.items():
        if chosen.check:
            print(f"{path}: not current; run python -m fastdit.testing.codebases")
        else:
            path.write_text(text, encoding="utf-8")
            print(f"wrote {path}")
    return 1 if chosen.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
