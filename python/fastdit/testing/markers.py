"""Generated blocks in written pages: what stands between `<!-- name: begin -->` and `<!-- name: end -->`."""

from __future__ import annotations


def spliced(text: str, name: str, block: str, *, append: bool = False) -> str:
    """The text with another block of this name; `append` adds one that is missing.

    Raises:
        ValueError: there is no block of this name.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    head, found, rest = text.partition(begin)
    _, closed, tail = rest.partition(end)
    if found and closed:
        return f"{head}{begin}\n{block}\n{end}{tail}"
    if found or not append:
        raise ValueError(f"markers: no block; got a page without {begin} and {end}, expected both; add them.")
    return f"{text.rstrip()}\n\n{begin}\n{block}\n{end}\n"
