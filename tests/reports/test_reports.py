from __future__ import annotations

import base64
import io
import re

import pytest
from PIL import Image

from vislora.reports.page import Part, data_url, polyline, write_page
from vislora.reports.sheet import contact_sheet


def image(width, height, colour=(10, 20, 30), mode="RGB"):
    return Image.new(mode, (width, height), colour)


def test_a_sheet_has_a_cell_for_every_image():
    rows = [[image(10, 10), image(40, 20)], [image(200, 400)]]
    sheet = contact_sheet(rows, ["one", "two"], ["a", "b"], cell=96)
    head = round(11 * 1.4) + 2 * 4
    assert sheet.size == (120 + 2 * 100 + 4, head + 2 * 100 + 4)
    wordy = contact_sheet(rows, ["one", "two"], ["a", "a label that takes two lines"], cell=96)
    assert wordy.height > sheet.height
    found = sheet.getcolors(1 << 20)
    assert sum(number for number, colour in found if colour == (10, 20, 30)) == pytest.approx(
        96 * 96 + 96 * 48 * 2, abs=300
    )


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1"])
def test_images_of_every_mode(mode):
    assert contact_sheet([[Image.new(mode, (5, 5))]], ["x"], ["y"]).mode == "RGB"


def test_odd_labels_do_not_break_a_sheet():
    for label in ("", " ", "x" * 500, "多言語 \U0001f600 é", "a\nb", "<script>"):
        contact_sheet([[image(3, 1)]], [label], [label], cell=20)
    contact_sheet([], [], [])
    contact_sheet([[]], ["row"], ["column"])


def test_thin_images_keep_a_pixel():
    contact_sheet([[image(1000, 1), image(1, 1000)]], ["x"], ["a", "b"], cell=32)


def test_everything_in_a_page_is_escaped(tmp_path):
    bad = "<script>alert('x')</script>&\""
    part = Part(bad, bad, image(2, 2), [[bad, bad], [bad, bad]], bad, "0,0 1,1")
    write_page(tmp_path / "page.html", bad, bad, [part])
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<script" not in text
    assert text.count("&lt;script&gt;") >= 8
    assert not re.search(r"(src|href)=.?https?:", text)


def test_a_page_without_parts(tmp_path):
    write_page(tmp_path / "page.html", "title", "lead", [])
    assert "title" in (tmp_path / "page.html").read_text()


def test_an_image_is_a_png_inside_its_address():
    kind, data = data_url(image(3, 2)).split(",")
    assert kind == "data:image/png;base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (3, 2)


def test_lines():
    assert polyline([]) == ""
    assert polyline([5.0]) == "0.0,0.0"
    assert polyline([2.0, 2.0, 2.0]) == "0.0,0.0 400.0,0.0 800.0,0.0"
    assert polyline([1.0, 0.0], width=10, height=10, window=1) == "0.0,0.0 10.0,10.0"


def test_lines_stay_inside():
    points = [tuple(map(float, point.split(","))) for point in polyline([3.0, -1.0, 7.0, 2.0] * 30).split()]
    assert len(points) == 120
    assert all(0 <= x <= 800 and 0 <= y <= 160 for x, y in points)
