"""What formats there are, in a table for people. Torch-free."""

from __future__ import annotations

import textwrap

from vislora.formats.contract import Format
from vislora.formats.names import FAMILY_NAMES
from vislora.registry import FORMATS

_NO_LAYER = "no.layer.of.any.model"


def overview() -> str:
    """Return a table of all formats: name, other names, read or written, families, what makes and reads them."""
    rows = [("format", "", "families", "about")]
    for name in FORMATS:
        form: Format = FORMATS[name]
        also = FORMATS.aliases_of(name)
        about = f"{form.about} (also: {', '.join(also)})" if also else form.about
        rows.append((name, "read, write" if form.writable else "read", families(form), about))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = ["  ".join([*map(str.ljust, row[:3], widths), row[3]]).rstrip() for row in rows]
    return "\n".join([*lines, "", *textwrap.wrap(f"families: {', '.join(FAMILY_NAMES)}", 100)])


def families(form: Format) -> str:
    """Return how many families' layers a format can store: `any` when it takes every name, `-` when it is only read."""
    if not form.writable:
        return "-"
    if form.place("denoiser", _NO_LAYER, None) is not None:
        return "any"
    known = [name for name, names in FAMILY_NAMES.items() if form.place("denoiser", names.an_example, name)]
    return f"{len(known)}, see below"
