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
    result = {"fid": 12.345678, "is": 3.0, "evaluations": 32}
    (run / "scores" / "fid.json").write_text(json.dumps({"protocol": {"seeds": "0-99"}, "result": result}))
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
        content = {"kind": "search", "step": step, "protocol": {"run": "x"}, "rows": rows, "best": {"cfg_scale": scale}}
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
    assert "12.346" in text
    assert "w 1.8 in [0, 1]" in text
    assert "(1 not finite)" in text
    assert "FID over the guidance scale" in text
    assert "step 8: real" in text  # the newest picture is among the chosen
    assert "Scores while training" in text
    assert "FID at the best guidance</text>" in text
    assert "rFID of held-out images</text>" in text
    assert "search at step 600, 1,000 images: w 1.8 in [0, 1]" in text
    assert "LPIPS</text>" not in text  # never measured in this run


def test_curve_is_drawn_to_scale():
    text = report.curve("loss", [0.0, 50.0, 100.0], [1.0, 3.0, 2.0])
    points = [tuple(map(float, p.split(","))) for p in re.findall(r'points="([^"]+)"', text)[0].split()]
    (x0, y0), (x1, y1), (x2, y2) = points
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11)
    assert (y0 - y1) / (y0 - y2) == pytest.approx(2, abs=0.01)  # up is smaller y
    assert report.ticks(0.0, 1.0) == pytest.approx([0.0, 0.5, 1.0])
    assert "<polyline" in report.curve("flat", [1.0, 2.0], [0.0, 0.0])
    assert "<polyline" in report.curve("one", [1.0], [5.0])


def test_no_run_folder(tmp_path):
    said = command_of(report.main, tmp_path)
    assert said.returncode == 2
    assert "not a run folder" in said.stderr
    assert not (tmp_path / "report").exists()


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
    assert red > 20_000, red
    assert (pixels.max(-1) < 70).sum() > 500  # dark text
