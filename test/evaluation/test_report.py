"""The report page: its content, and that it works in a browser."""

from __future__ import annotations

import html
import itertools
import json
import shutil
import subprocess

import cv2
import numpy as np
import pytest
import skimage.data

from kp_frontend.cli import main
from kp_training.evaluation.metrics import METRICS, UNCONSTRAINED
from kp_training.evaluation.page import Page, shown
from kp_training.evaluation.results import command_line


def test_values_are_formatted():
    assert [shown(v) for v in (None, float("nan"), 3, 0.12345, 12.34, 456.8)] == [
        "-", "-", "3", "0.123", "12.3", "457",
    ]  # fmt: skip
    assert shown((0.5, 0.25)) == "0.500 ± 0.250"


def test_a_table_marks_the_best_and_escapes_words(tmp_path):
    page = Page("<b>title</b>")
    rows = [{"method": "a & b", "share": (0.5, 0.1), "error": 2.0}, {"method": "c", "share": 0.7}]
    page.table(rows, best={"share": "max", "error": "min"})
    page.write(tmp_path / "page.html")
    words = (tmp_path / "page.html").read_text()
    assert '<td class="best" data-value="0.7">0.700</td>' in words
    assert '<td class="best" data-value="2.0">2.000</td>' in words
    assert words.count('class="best"') == 2
    assert "a &amp; b" in words and "<b>title" not in words
    assert '<td data-value="">-</td>' in words  # c has no error


def test_a_table_rejects_an_unknown_best():
    with pytest.raises(KeyError):
        Page("").table([{"a": 1}], best={"a": "most"})


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """The folder of `kp evaluate middlebury` on parts of a real pair, one of them broken."""
    folder = tmp_path_factory.mktemp("evaluated")
    left, right, disparity = skimage.data.stereo_motorcycle()
    for name, x, y in (("first", 60, 100), ("second", 300, 180), ("broken", 300, 100)):
        (folder / "data" / name).mkdir(parents=True)
        part = slice(y, y + 240), slice(x, x + 320)
        for file, image in (("im0.png", left), ("im1.png", right)):
            cv2.imwrite(str(folder / "data" / name / file), image[part][..., ::-1])
        values = np.where(np.isfinite(disparity), disparity, np.inf)[part][::-1].astype("<f4")
        (folder / "data" / name / "disp0.pfm").write_bytes(b"Pf\n320 240\n-1\n" + values.tobytes())
    (folder / "data/broken/im1.png").write_bytes(b"not an image")
    words = ["evaluate", "middlebury", str(folder / "data"), "--out", str(folder / "out")]
    words += ["--methods", "tiny,sift,orb", "--max-keypoints", "512", "--disturb", "noise40,dark"]
    assert main(words) == 0
    return folder / "out"


def test_metrics_file_has_the_documented_format(evaluated):
    metrics = json.loads((evaluated / "metrics.json").read_text())
    assert set(metrics) == {"scenes", "protocol", "methods", "disturbed"}
    assert metrics["scenes"] == ["first", "second"]
    assert metrics["protocol"]["skipped"] == ["broken: im1.png cannot be read as an image"]
    assert set(metrics["methods"]) == {"tiny", "sift", "orb"}
    for method in metrics["methods"].values():
        assert set(METRICS) == set(method)
        for metric in method.values():
            assert set(metric) == {"mean", "std", "per_scene"}
            assert set(metric["per_scene"]) == {"first", "second"}
            known = [value for value in metric["per_scene"].values() if value is not None]
            expected = pytest.approx(np.mean(known)) if known else None
            assert metric["mean"] == expected
    # Disturbed images are harder.
    assert list(metrics["disturbed"]) == ["noise40", "dark"]
    for found in metrics["disturbed"].values():
        for name, method in found["methods"].items():
            clean = metrics["methods"][name]["correct_matches"]["mean"]
            assert set(method) == set(UNCONSTRAINED)
            assert method["correct_matches"]["mean"] < 0.9 * clean
    # The maps are sub-pixel, so sigmas are judged; only networks have a confidence.
    for name, method in metrics["methods"].items():
        assert method["sigma_ratio"]["mean"] > 0 and method["sigma_within_2"]["mean"] > 0.5
        assert (method["confidence_error"]["mean"] is None) == (name != "tiny")


def test_report_has_study_figures_skipped_scenes_and_pictures(evaluated):
    words = (evaluated / "report.html").read_text()
    metrics = json.loads((evaluated / "metrics.json").read_text())
    disturbed = [d["methods"].values() for d in metrics["disturbed"].values()]
    for method in itertools.chain(metrics["methods"].values(), *disturbed):
        for metric in method.values():
            assert metric["mean"] is None or f'data-value="{metric["mean"]!r}"' in words
    for text in (
        "study: network", "0.469", "1863",  # the study's own figures
        "broken: im1.png cannot be read as an image",
        "Disturbed images", "noise40: both images with noise 40",
        "Standard deviations and confidence", "share of right matches by confidence",
        "Predicted keypoints and SIFT labels", "True and false positives",
        "Similarity of one descriptor to the image",
        "Predicted keypoint heatmap", "opencv-python-headless", html.escape(command_line()),
    ):  # fmt: skip
        assert text in words, text
    assert "://" not in words  # self-contained; base64 has no colon


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")

# Runs in the page: clicks the headers of the per-scene table and records the result.
PROBE = """
<script>
const tables = [...document.querySelectorAll("table")];
const column = (table, i) => [...table.tBodies[0].rows].map(row => row.cells[i].dataset.value);
const table = tables.find(t => t.tHead.textContent.includes("scene"));
const head = i => table.tHead.rows[0].cells[i];
const names = [...table.tHead.rows[0].cells].map(cell => cell.textContent);
const number = names.indexOf("matches"), before = column(table, number);
head(number).querySelector("button").click();
const falling = column(table, number), falls = head(number).getAttribute("aria-sort");
head(number).querySelector("button").click();
const rising = column(table, number);
head(1).querySelector("button").click();
const methods = column(table, 1);
const images = [...document.images].map(image => image.complete && image.naturalWidth > 100);
window.addEventListener("load", () => {
  document.body.innerHTML = "";
  document.title = JSON.stringify({
    tables: tables.length, before, falling, falls, rising, methods,
    images: [...images], wide: document.documentElement.scrollWidth > window.innerWidth,
  });
});
</script></body>
"""


def browse(page, folder) -> tuple[str, list[str]]:
    """The title of a page and the browser's console output."""
    options = [
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--enable-logging=stderr", "--window-size=400,800", f"--user-data-dir={folder}",
        "--dump-dom",
    ]  # fmt: skip
    ended = subprocess.run(
        [CHROMIUM, *options, page.as_uri()], capture_output=True, text=True, timeout=120
    )
    title = ended.stdout.partition("<title>")[2].partition("</title>")[0]
    return html.unescape(title), [line for line in ended.stderr.splitlines() if "CONSOLE" in line]


@in_browser
def test_the_report_works_in_a_browser(evaluated, tmp_path):
    page = tmp_path / "probed.html"
    words = (evaluated / "report.html").read_text()
    page.write_text(words.replace("</body>", PROBE))
    title, console = browse(page, tmp_path / "profile")
    assert console == []
    seen = json.loads(title)
    assert seen["tables"] == 11
    assert len(seen["images"]) == 13 and all(seen["images"])
    numbers = [float(value) for value in seen["falling"]]
    assert len(numbers) == 6 and numbers == sorted(numbers, reverse=True)
    assert seen["falls"] == "descending" and seen["falling"] != seen["before"]
    assert [float(value) for value in seen["rising"]] == sorted(numbers)
    assert seen["methods"] == ["orb", "orb", "sift", "sift", "tiny", "tiny"]
    assert not seen["wide"]  # the page fits a phone screen: tables scroll separately


@in_browser
def test_browser_errors_are_detected(tmp_path):
    page = tmp_path / "bad.html"
    page.write_text("<title>bad</title><script>nothing()</script>")
    title, console = browse(page, tmp_path / "profile")
    assert title == "bad" and "nothing is not defined" in console[0]
