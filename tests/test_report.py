"""The report page: everything inside one file, odd values survived, and drawn by a real browser where there is one."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import command_of

from unite_fast import report
from unite_fast.evaluation.features import INCEPTION
from unite_fast.report import charts, parts, scores

OFFICIAL = {"name": "inception-v3-compat", "sha256": INCEPTION}
DIGITS = {"name": "digits 64", "sha256": "0" * 64}
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run folder with 900 log lines, nine pictures, a score and a search; one loss is not finite."""
    run = tmp_path / "run <b>"
    for part in ("samples", "scores"):
        (run / part).mkdir(parents=True)
    rows = [
        {"step": s, "images_seen": 32 * s, "total": 1 / s, "l1": 0.5, "flow": 0.2, "images_per_second": 100.0 + s % 7}
        for s in range(1, 901)
    ]
    rows[10]["total"] = float("nan")
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 901, "tot')
    for step in range(9):
        Image.new("RGB", (64, 32), (200, 30, 30)).save(run / "samples" / f"step_{step:07d}.png")
    (run / "config.resolved.yaml").write_text("name: <script>alert(1)</script>\n")
    (run / "status.json").write_text(json.dumps({"state": "finished", "step": 900}))
    about = {"parameters": 1234567, "images": 2552, "class_names": ["cat", "<dog>"], "device": "x86_64"}
    (run / "provenance.json").write_text(json.dumps(about))
    (run / "starts.jsonl").write_text('{"step": 0}\n{"step": 400, "tor\n{"step": 500}\n')
    result = {"fid": 12.345678, "is": 3.0, "evaluations": 32}
    (run / "scores" / "fid.json").write_text(
        json.dumps({"protocol": {"seeds": "0-99", "extractor": DIGITS}, "result": result})
    )
    searched = [
        {"settings": {"cfg_scale": w, "cfg_interval": [0, 1], "cfg_order": "both"}, "result": result | {"fid": w}}
        for w in (1.8, 2.0)
    ]
    (run / "scores" / "search.json").write_text(json.dumps({"best": {}, "rows": searched}))
    (run / "scores" / "broken.json").write_text("{")
    training = run / "scores" / "training"
    training.mkdir()
    for step, scale in ((300, 2.0), (600, 1.8)):
        rows = [{"settings": row["settings"] | {"count": 1000}, "result": row["result"]} for row in searched]
        content = {
            "kind": "search",
            "step": step,
            "protocol": {"run": "x", "extractor": OFFICIAL},
            "rows": rows,
            "best": {"cfg_scale": scale},
        }
        (training / f"step_{step:07d}_search.json").write_text(json.dumps(content | {"result": result}))
    content = {"kind": "rfid", "step": 600, "protocol": {}, "result": {"rfid": 0.7, "psnr": 30.0}}
    (training / "step_0000600_rfid.json").write_text(json.dumps(content))
    (training / "step_0000900_search.jsonl").write_text("{}")  # unfinished
    return run


class Parsed(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "line", "circle", "polyline"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_everything_is_in_one_file(folder):
    said = command_of(report.main, folder)
    assert said.returncode == 0, said.stderr
    text = (folder / "report" / "index.html").read_text()
    parsed = Parsed(text)
    assert not parsed.open
    sources = [a["src"] for _, a in parsed.found if "src" in a]
    assert len(sources) == report.MOST_PICTURES
    assert all(s is not None and s.startswith("data:image/png;base64,") for s in sources)
    assert not [t for t, a in parsed.found if t in ("script", "link", "iframe") or "href" in a]
    assert not re.search(r"https?://|@import|url\(", text)
    assert "&lt;script&gt;" in text
    assert "12.35" in text
    assert "w 1.8 in [0, 1]" in text
    assert "FID over the guidance scale" in text
    assert "<th>Fréchet distance (digits 64)</th>" in text
    assert "<figcaption>step 8</figcaption>" in text  # the newest picture is among the chosen
    assert "1,234,567" in text
    assert "2,552 samples in 2 classes: cat, &lt;dog&gt;" in text
    assert "<dd>30.0 dB at step 600</dd>" in text
    assert "<dd>0:04:39</dd>" in text  # 28,800 images at about 103 a second
    assert "sample.py --checkpoint" in text
    assert text.count('class="mark"') == text.count("<polyline") - 7  # one restart, in each curve over the run's steps
    assert "loss (1 not finite, log)" in text
    assert "Scores while training" in text
    assert "FID at the best guidance</text>" in text
    assert "rFID of held-out images</text>" in text
    assert "search at step 600, 1,000 images: w 1.8 in [0, 1]" in text
    assert "LPIPS</text>" not in text  # never measured in this run


def test_curve_is_drawn_to_scale():
    text = charts.curve("loss", [0.0, 50.0, 100.0], [1.0, 3.0, 2.0], marks=[50.0, 100.0])
    points = [tuple(map(float, p.split(","))) for p in re.findall(r'points="([^"]+)"', text)[0].split()]
    (x0, y0), (x1, y1), (x2, y2) = points
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11)
    assert (y0 - y1) / (y0 - y2) == pytest.approx(2, abs=0.01)  # up is smaller y
    assert re.findall(r'class="mark" x1="([\d.]+)"', text) == [f"{x1:.1f}"]  # the end of the run is no restart
    assert ">2</text>" in text  # the last value
    assert charts.ticks(0.0, 1.0) == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    shown = [charts.label(v, 0.0005) for v in (6.3125, 6.313)]
    assert shown == ["6.3125", "6.3130"]
    labels = [charts.label(v, w) for v, w in ((0.0, 1e4), (54000.0, 200.0), (2e-5, 5e-6), (0.2, 0.2), (3.0, 0.0))]
    assert labels == ["0", "54k", "2.0e-5", "0.2", "3"]
    assert charts.log_ticks(0.9, 1100) == pytest.approx([1, 10, 100, 1000])
    assert charts.log_ticks(0.02, 0.3) == pytest.approx([0.02, 0.05, 0.1, 0.2])
    assert "<polyline" in charts.curve("flat", [1.0, 2.0], [0.0, 0.0])
    assert "<polyline" in charts.curve("one", [1.0], [5.0])


def test_the_number_of_the_last_step_is_whole():
    text = charts.curve("loss", [0.0, 500.0, 1500.0], [1.0, 3.0, 2.0])
    (x,) = re.findall(r'<text x="([\d.]+)" y="\d+" text-anchor="end">1,500</text>', text)
    assert float(x) == charts.WIDTH


def test_one_odd_value_does_not_flatten_a_curve():
    values = [30.0] + [1.0 + 0.1 * (k % 5) for k in range(99)]
    low, high, logarithmic = charts.limits(values)
    assert not logarithmic
    assert (low, high) == pytest.approx((1.0, 1.44))
    assert "loss (1 beyond)" in charts.curve("loss", list(range(100)), values)
    assert charts.limits(values[::-1])[1] == 30.0  # the last one always shows
    assert charts.limits([10.0**-k for k in range(5)])[2]
    beginning = [14.9, 4.5, 2.7, 1.8, 1.5] + [1.0 + 0.01 * (k % 5) for k in range(25)]  # of the clothes' loss
    assert charts.limits(beginning)[1] < 5


def test_a_distance_is_called_after_its_network():
    assert scores.distance({"extractor": OFFICIAL}) == "FID"
    spatial = {"extractor": OFFICIAL | {"layers": ["spatial", "logits_unbiased"]}}
    assert [scores.heading(column, spatial) for column in ("sfid", "rsfid", "is")] == ["sFID", "rsFID", "IS"]
    assert scores.distance({"extractor": DIGITS}) == "Fréchet distance (digits 64)"
    assert "other weights" in scores.distance({"extractor": OFFICIAL | {"sha256": "1" * 64}})
    assert scores.distance({}) == "Fréchet distance"


def test_scores_by_a_classifier_stand_beside_those_of_real_images(tmp_path):
    """And its kernel distance is not called KID."""
    content = {"protocol": {"classifier": {"sha256": "ab"}}, "result": {"psnr": 21.0, "recognised": 0.8125, "kid": 5.5},
               "real": {"recognised": 0.89, "kid": 0.25}}  # fmt: skip
    (tmp_path / "scores").mkdir()
    (tmp_path / "scores" / "small.json").write_text(json.dumps(content))
    text = scores.scores(tmp_path)
    assert "<td>the run</td><td>21</td><td>0.8125</td><td>5.5</td>" in text
    assert "<td>real images</td><td></td><td>0.89</td><td>0.25</td>" in text
    assert ">KID<" not in text


def test_the_digits_own_scores(folder):
    (folder / "report").mkdir()
    row = {"recognised": 0.987, "spread": 0.91, "frechet": 0.0652, "nearest": 1.5, "images_per_second": 9.0}
    figures = {"held_out_pooled_psnr": 34.1, "classifier_accuracy": 0.997, "samples": {"1": row}}
    (folder / "report" / "figures.json").write_text(
        json.dumps(figures | {"real": {"frechet_halves": 0.056, "nearest": 1.6}})
    )
    text = report.page(folder)
    assert "34.1 dB (pooled PSNR)" in text
    assert "<td>98.7%</td><td>0.91</td><td>0.065</td>" in text


def test_no_run_folder(tmp_path):
    said = command_of(report.main, tmp_path)
    assert said.returncode == 2
    assert "not a run folder" in said.stderr
    assert not (tmp_path / "report").exists()


def test_a_broad_picture_takes_the_whole_width(tmp_path):
    for width in (parts.BROAD, parts.BROAD + 1):
        Image.new("L", (width, 9)).save(tmp_path / f"{width}.png")
    shown = [parts.picture(tmp_path / f"{parts.BROAD + k}.png", "words") for k in (0, 1)]
    assert ["<figure class='broad'>" in one for one in shown] == [False, True]


@pytest.mark.skipif(BROWSER is None, reason="no chromium here; install one to draw the page")
def test_a_browser_draws_it(folder, tmp_path):
    """Offline: the ink of a curve, the red of a picture, and text are on the screenshot."""
    assert command_of(report.main, folder).returncode == 0
    shot = tmp_path / "page.png"
    words = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1200,1700"]
    words += [f"--user-data-dir={tmp_path / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND"]
    page = (folder / "report" / "index.html").as_uri()
    subprocess.run([*map(str, words), f"--screenshot={shot}", page], check=True, capture_output=True, timeout=120)
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    blue = (pixels == [0x1F, 0x6F, 0xB2]).all(-1).sum()
    red = (np.abs(pixels - [200, 30, 30]).max(-1) < 8).sum()
    assert blue > 300, blue
    assert red > 10_000, red  # 64 x 32 pixels each, as they are
    assert (pixels.max(-1) < 70).sum() > 500  # dark text
