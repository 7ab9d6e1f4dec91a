"""The demonstration, whole: it trains for minutes, so `make test-slow` runs it."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SCRIPT = Path(__file__).resolve().parent.parent / "train_scripts" / "demo.py"


def colourfulness(folder: Path) -> float:
    """Mean distance of the strongest from the weakest of red, green and blue, where anything is drawn; 0 to 1."""
    files = sorted(folder.glob("*.png"))
    pixels = np.concatenate([np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3) for path in files]).astype(int)
    drawn = pixels[pixels.min(axis=1) < 200]
    return float((drawn.max(axis=1) - drawn.min(axis=1)).mean()) / 255


@pytest.mark.slow
def test_the_demo_leaves_a_page_a_sheet_three_files_and_black_ink(tmp_path):
    subprocess.run([sys.executable, str(SCRIPT)], cwd=tmp_path, check=True)
    demo = tmp_path / "demo"
    page = (demo / "index.html").read_text(encoding="utf-8")
    assert page.count("proven: 129 of 129 modules equal (max difference 0)") == 3
    assert Image.open(demo / "sheet.png").width > 1000
    base, ink = colourfulness(demo / "images" / "base"), colourfulness(demo / "images" / "ink")
    assert ink < 0.5 * base
