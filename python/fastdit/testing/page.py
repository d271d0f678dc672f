"""Self-contained HTML pages with tables and inline pictures, for `fastdit bench --html` and the demo's report."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:1080px;margin:2rem auto;padding:0 1rem;color:#1c1c22;background:#fff}
h1{font-size:1.7rem;margin-bottom:.2rem}h2{font-size:1.2rem;margin-top:2.2rem}
p.note{color:#555}table{border-collapse:collapse;margin:.6rem 0;font-size:14px}
th,td{padding:.3rem .7rem;border-bottom:1px solid #ddd;text-align:right}
th:first-child,td:first-child{text-align:left}th{background:#f4f4f6}
th.text,td.text{text-align:left}img,video{max-width:100%}.frames{display:flex;flex-wrap:wrap;gap:6px}
.frames figure{margin:0;text-align:center;font-size:12px;color:#555}code{background:#f4f4f6;padding:0 .25rem}
.ok{color:#14733b;font-weight:600}.bad{color:#b3261e;font-weight:600}
"""


class Html(str):
    """Text that is markup already and is not escaped again."""


def escape(value: object) -> str:
    return value if isinstance(value, Html) else html.escape(str(value))


def tag(name: str, *content: object, **attributes: str) -> Html:
    written = "".join(f' {key.rstrip("_")}="{html.escape(text)}"' for key, text in attributes.items())
    return Html(f"<{name}{written}>{''.join(escape(c) for c in content)}</{name}>")


def table(header: Sequence[object], rows: Sequence[Sequence[object]], text: Sequence[int] = (0,)) -> Html:
    """`text`: the columns that hold words and stand left."""

    def line(name: str, values: Sequence[object]) -> Html:
        return tag("tr", *(tag(name, v, class_="text") if i in text else tag(name, v) for i, v in enumerate(values)))

    head = line("th", header)
    body = (line("td", row) for row in rows)
    return tag("table", tag("thead", head), tag("tbody", *body))


def png(figure: Any, alt: str) -> Html:
    """A matplotlib figure as an inline picture; the figure is closed."""
    from matplotlib import pyplot

    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110, bbox_inches="tight")
    pyplot.close(figure)
    return picture(stream.getvalue(), alt)


def picture(data: bytes, alt: str) -> Html:
    return Html(f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{base64.b64encode(data).decode()}">')


def mp4(data: bytes) -> Html:
    source = f"data:video/mp4;base64,{base64.b64encode(data).decode()}"
    return Html(f'<video controls loop muted src="{source}"></video>')


def write(path: Path, title: str, *body: object) -> None:
    """One file that needs nothing beside it: no script, no network."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = "".join(escape(b) for b in body)
    path.write_text(
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width,initial-scale=1'>"
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>{content}</body></html>\n",
        encoding="utf-8",
    )


def plots() -> Any:
    """pyplot with the file backend; raises with what to install where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("plots need matplotlib; got none, expected fastdit[bench]; pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
