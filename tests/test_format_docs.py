from __future__ import annotations

from pathlib import Path

from train_scripts.make_format_docs import page, samples
from vislora.registry import ALGORITHMS, FORMATS

DOCS = Path(__file__).resolve().parents[1] / "docs"


def test_the_page_of_formats_is_what_the_code_does():
    written = (DOCS / "formats.md").read_text(encoding="utf-8")
    assert written == page(), "run `python train_scripts/make_format_docs.py`"


def test_every_algorithm_and_format_is_on_it():
    titles = " ".join(sample.title for sample in samples())
    assert all(name in titles for name in ALGORITHMS)
    assert all(f"`{name}`" in page() for name in FORMATS)
