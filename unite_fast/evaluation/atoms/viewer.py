"""Structures on a page: canvases that turn under the mouse, by a script within the page; no network, no library."""

from __future__ import annotations

import html
import json
from typing import Any

from unite_fast.data.atoms.elements import SYMBOLS
from unite_fast.modality.molecule_pictures import BOND, colour, radius

SCRIPT = """
for (const canvas of document.querySelectorAll("canvas.atoms")) {
  const data = JSON.parse(canvas.dataset.atoms), pen = canvas.getContext("2d"), size = canvas.width;
  const middle = [0, 1, 2].map(k => data.positions.reduce((sum, p) => sum + p[k], 0) / data.positions.length);
  const moved = points => points.map(p => p.map((x, k) => x - middle[k]));
  const sets = [moved(data.positions)].concat(data.other ? [moved(data.other)] : []);
  const reach = 0.6 + Math.max(1.5, ...sets.flat().map(p => Math.hypot(...p))), zoom = size / 2 / reach;
  let turn = [[0.87, -0.25, 0.43], [0, 0.87, 0.5], [-0.5, -0.43, 0.75]];
  const times = (a, b) => a.map(row => b[0].map((_, j) => row.reduce((sum, x, k) => sum + x * b[k][j], 0)));
  function draw() {
    pen.fillStyle = "#fff"; pen.fillRect(0, 0, size, size);
    const things = [];
    sets.forEach((points, other) => {
      const at = points.map(p => turn.map(row => row[0] * p[0] + row[1] * p[1] + row[2] * p[2]));
      at.forEach((p, i) => things.push([p[2], other, p, i]));
      for (const [i, j] of data.bonds) things.push([Math.min(at[i][2], at[j][2]) - 0.01, other, at[i], i, at[j]]);
    });
    things.sort((a, b) => a[0] - b[0]);
    for (const [, other, p, i, q] of things) {
      const x = size / 2 + zoom * p[0], y = size / 2 - zoom * p[1];
      pen.globalAlpha = other ? 0.45 : 1;
      if (q) {
        pen.strokeStyle = other ? "#d2691e" : "#8a8a90"; pen.lineWidth = 0.14 * zoom;
        pen.beginPath(); pen.moveTo(x, y); pen.lineTo(size / 2 + zoom * q[0], size / 2 - zoom * q[1]); pen.stroke();
      } else {
        pen.fillStyle = other ? "#d2691e" : data.colours[i]; pen.strokeStyle = "#333"; pen.lineWidth = 1;
        pen.beginPath(); pen.arc(x, y, zoom * data.radii[i], 0, 7); pen.fill(); pen.stroke();
      }
    }
    pen.globalAlpha = 1;
  }
  let from = null;
  canvas.onpointerdown = e => { from = [e.clientX, e.clientY]; canvas.setPointerCapture(e.pointerId); };
  canvas.onpointerup = canvas.onpointercancel = () => { from = null; };
  canvas.onpointermove = e => {
    if (!from) return;
    const a = (e.clientX - from[0]) / 90, b = (e.clientY - from[1]) / 90; from = [e.clientX, e.clientY];
    const yaw = [[Math.cos(a), 0, Math.sin(a)], [0, 1, 0], [-Math.sin(a), 0, Math.cos(a)]];
    const pitch = [[1, 0, 0], [0, Math.cos(b), -Math.sin(b)], [0, Math.sin(b), Math.cos(b)]];
    turn = times(pitch, times(yaw, turn)); draw();
  };
  draw();
}
"""
STYLE = """
.atoms-row { display: flex; flex-wrap: wrap; gap: 10px; } .atoms-row figure { width: 180px; }
canvas.atoms { width: 180px; height: 180px; cursor: grab; touch-action: none; border: 1px solid var(--line); }
.atoms-row svg { background: #fff; width: 180px; } .atoms-row figcaption { overflow-wrap: anywhere; font-size: 12px; }
"""


def _bonds(species: list[int], positions: list[list[float]]) -> list[tuple[int, int]]:
    found = []
    for j in range(len(species)):
        for i in range(j):
            apart = sum((a - b) ** 2 for a, b in zip(positions[i], positions[j], strict=True)) ** 0.5
            if apart < BOND * (radius(species[i]) + radius(species[j])):
                found.append((i, j))
    return found


def figure(entry: dict[str, Any]) -> str:
    """One structure of ``pictures.shown``: a canvas, its formula, its title; what lies over a real one is orange."""
    species, positions = entry["species"], entry["positions"]
    said = {
        "positions": positions,
        "bonds": [] if entry.get("cell") else _bonds(species, positions),
        "colours": ["#%02x%02x%02x" % colour(number) for number in species],  # noqa: UP031
        "radii": [round(0.18 + 0.28 * radius(number), 3) for number in species],
    }
    if entry.get("other"):
        said["other"] = entry["other"]
    data, title = html.escape(json.dumps(said), quote=True), html.escape(entry["title"])
    elements = " ".join(sorted({SYMBOLS[number] for number in species}))
    canvas = f'<canvas class="atoms" width="360" height="360" data-atoms="{data}" title="{elements}"></canvas>'
    return f"<figure>{canvas}{entry.get('svg', '')}<figcaption>{title}</figcaption></figure>"


def section(shown: dict[str, list[dict[str, Any]]]) -> str:
    """All kinds, each under its name, with the style and the script; an empty string where there is nothing."""
    rows = [
        f"<h3>{html.escape(name)}</h3><div class='atoms-row'>{''.join(map(figure, entries))}</div>"
        for name, entries in shown.items()
        if entries
    ]
    return f"<style>{STYLE}</style>{''.join(rows)}<script>{SCRIPT}</script>" if rows else ""
