"""Rewrites the kernel table of README.md from the JSON of `fastdit bench`.

fastdit bench --json benchmarks/results/<machine>/<date>.json
python benchmarks/report.py --write benchmarks/results/<machine>/<date>.json
python benchmarks/report.py --check benchmarks/results/<machine>/<date>.json      (exit 1 when the table is stale)
"""

import argparse
import json
import sys
from pathlib import Path

from fastdit.testing.markers import spliced

README = Path(__file__).resolve().parent.parent / "README.md"
BLOCK = "kernel table"
PEERS = ("eager", "compile")
IDEAL = ("copy", "gemm")
WHOLE = "model"


def table(document: dict) -> str:
    """One line per op, dtype and pass, at the last model of its op, and every whole model: the file has all rows."""
    groups: dict[tuple, list[dict]] = {}
    largest = {row["op"]: row["model"] for row in document["rows"]}  # workloads go from small to large
    for row in document["rows"]:
        if row["op"] == WHOLE or largest[row["op"]] == row["model"]:
            key = (row["op"], row["model"], row["shape"], row["dtype"], row["pass"])
            groups.setdefault(key, []).append(row)
    machine = document["machine"]
    device = machine.get("gpu", machine["cpu"])
    where = f"{device}, {machine['isa']}, {machine['threads']} threads, torch {machine['torch']}"
    lines = [
        f"Measured on: {where}. Ratios are the peer's time over fastdit's, interleaved in one run: above 1 is faster.",
        "",
        "| op | model | dtype | pass | backend | ms | % of ceiling | x eager | x compile | x best other |",
        "|---|---|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for (op, model, shape, dtype, pass_), rows in groups.items():
        ratio = {row["peer"]: row["ratio"] for row in rows}
        others = {peer: r for peer, r in ratio.items() if peer not in PEERS + IDEAL}
        best = min(others, key=lambda peer: others[peer], default=None)
        cells = [f"{ratio[p]:.2f}" if p in ratio else "" for p in PEERS]
        cells.append(f"{others[best]:.2f} {best}" if best else "")
        ideal = next((p for p in IDEAL if p in ratio), "")
        lines.append(
            f"| `{op}` | {model} ({shape}) | {dtype} | {pass_} | {rows[0]['backend']} | {rows[0]['time_ms']:.3g} | "
            f"{rows[0]['pct_ceiling']:.0f} {ideal} | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--write", metavar="JSON", type=Path)
    mode.add_argument("--check", metavar="JSON", type=Path)
    chosen = parser.parse_args()
    before = README.read_text(encoding="utf-8")
    after = spliced(before, BLOCK, table(json.loads((chosen.write or chosen.check).read_text(encoding="utf-8"))))
    if chosen.write:
        README.write_text(after, encoding="utf-8")
    elif before != after:
        print("README.md: the kernel table is not what this file gives; run benchmarks/report.py --write")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
