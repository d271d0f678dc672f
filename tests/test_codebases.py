"""docs/codebases: what is generated is current, and what it is generated from is there."""

import json
from pathlib import Path

import pytest

from fastdit.testing import codebases, zoo
from fastdit.testing.markers import spliced

DOCS = Path(__file__).resolve().parent.parent / "docs" / "codebases"
MACHINE = {"cpu": "CPU", "isa": "avx2", "threads": 2, "torch": "2.13.0"}


def row(model, peer, ratio, op="model"):
    facts = dict(shape="1x2048x64", dtype="bfloat16", time_ms=12.345, ratio=ratio)
    return {"op": op, "model": model, "pass": "fwd", "peer": peer, **facts}


def test_the_layers_of_every_page_are_current(capsys):
    assert codebases.main(["--check", "--docs", str(DOCS)]) == 0, capsys.readouterr().out


def test_a_stale_page_is_told_and_written(tmp_path, capsys):
    for page in DOCS.glob("*.md"):
        (tmp_path / page.name).write_text(page.read_text("utf-8"), "utf-8")
    index, page = tmp_path / "README.md", tmp_path / f"{zoo.models()[0].page}.md"
    index.write_text(spliced(index.read_text("utf-8"), "layers", "old"), "utf-8")
    page.write_text("# a page without blocks\n", "utf-8")
    arguments = ["--docs", str(tmp_path)]
    assert codebases.main(["--check", *arguments]) == 1
    assert index.name in (told := capsys.readouterr().out) and page.name in told
    assert codebases.main(arguments) == 0 and codebases.main(["--check", *arguments]) == 0
    assert page.read_text("utf-8").startswith("# a page without blocks\n\n<!-- layers: begin -->\n| class |")
    assert index.read_text("utf-8") == (DOCS / "README.md").read_text("utf-8")


def test_speed_stands_on_its_page(tmp_path):
    """Rows of a page's own file of the zoo, beside all of them in the index; other ops' rows nowhere."""
    pages, rows = next((pages, rows) for pages, rows in zoo.groups() if rows)
    document = {"machine": MACHINE, "rows": [row(rows[0], "eager", 1.5), row(rows[0], "compile", 1.25)]}
    document["rows"] += [row("Wan2.1-1.3B block", "eager", 2.0), row("some op", "eager", 9.0, op="attention")]
    for page in DOCS.glob("*.md"):
        (tmp_path / page.name).write_text(page.read_text("utf-8"), "utf-8")
    (tmp_path / "rows.json").write_text(json.dumps(document), "utf-8")
    codebases.main(["--docs", str(tmp_path), "--json", str(tmp_path / "rows.json")])
    line = f"| {rows[0]} | 1x2048x64 | bfloat16 | fwd | 12.35 | 1.50 | 1.25 |"
    texts = {page.stem: page.read_text("utf-8") for page in tmp_path.glob("*.md")}
    assert {stem for stem, text in texts.items() if line in text} == {"README", pages[0]}
    assert {stem for stem, text in texts.items() if "| 2.00 |  |" in text} == {"README", "wan"}
    assert not any("9.00" in text for text in texts.values())
    assert "CPU, avx2, 2 threads, torch 2.13.0" in texts["README"]
    codebases.main(["--docs", str(tmp_path)])  # without figures the old ones stay
    assert line in (tmp_path / "README.md").read_text("utf-8")


def test_every_row_has_a_page():
    assert all(len(pages) == 1 for pages, _ in zoo.groups())
    assert all(codebases.page_of(name) for _, rows in zoo.groups() for name in rows)


def test_blocks_need_their_markers():
    with pytest.raises(ValueError, match="expected both"):
        spliced("<!-- layers: begin -->", "layers", "new")
    with pytest.raises(ValueError, match="no block"):
        spliced("text", "layers", "new")
