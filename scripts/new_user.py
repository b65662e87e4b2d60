"""The way of a new user, command by command, on real photographs: own folder, training, page, samples by name,
fine-tuning to three classes, export, use in a program.

    python scripts/new_user.py PLACE [SECTION.KEY=VALUE ...]     # PLACE: a new folder; keys: of both trainings
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from unite_fast import export, load, report  # noqa: E402
from unite_fast.__main__ import program  # noqa: E402
from unite_fast.base import command  # noqa: E402
from unite_fast.report import gallery  # noqa: E402

CROP, STRIDE = 48, 24


def own_folder(place: Path) -> None:
    """Crops of scikit-learn's two photographs as PNGs: pets/CLASS, and every tenth of them in heldout/CLASS."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    names = (("sky", "temple"), ("leaves", "petals"))  # upper and lower half of each photograph
    for pixels, halves in zip(load_sample_images().images, names, strict=True):
        photograph = Image.fromarray(pixels)
        width, height = photograph.size
        for half, name in enumerate(halves):
            top, bottom = half * height // 2, (half + 1) * height // 2
            corners = [(x, y) for y in range(top, bottom - CROP, STRIDE) for x in range(0, width - CROP, STRIDE)]
            for number, (x, y) in enumerate(corners):
                folder = place / ("heldout" if number % 10 == 0 else "photos") / name
                folder.mkdir(parents=True, exist_ok=True)
                photograph.crop((x, y, x + CROP, y + CROP)).save(folder / f"{number:04d}.png")


def call(name: str, main: Callable[[list[str]], int | None], *words: object) -> None:
    """One command, printed as a user types it. Ends the program where it fails."""
    print(f"\n$ python -m unite_fast {name} {' '.join(map(str, words))}", flush=True)
    if code := command.run(main, [str(word) for word in words]):
        sys.exit(f"{name} ended with code {code}")


def main(argv: list[str]) -> None:
    place, keys = Path(argv[0]), argv[1:]
    own_folder(place)
    train, sample = program("train").main, program("sample").main
    config = ("--config", ROOT / "configs" / "images_32.yaml")
    run, tuned, shared = place / "runs" / "photos", place / "runs" / "tuned", place / "shared"
    images = (f"data.path={place / 'photos'}", f"data.heldout_path={place / 'heldout'}", "evaluation.heldout_epoch=10")
    call("train", train, *config, *images, "model.num_classes=4", "name=photos", f"run_dir={run}", *keys)
    call("report", report.main, run)
    call(
        "sample",
        sample,
        "--checkpoint",
        run,
        "--labels",
        "sky,petals",
        "--seeds",
        "0-7",
        "--out",
        place / "by_name.png",
    )
    call("gallery", gallery.main, "guidance", run, "--scales", "1,2")
    # Three classes: one of them new, two with the weights that they have.
    three = place / "three"
    for name in ("sky", "petals", "temple"):
        target = three / ("flowers" if name == "petals" else name)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to((place / "photos" / name).absolute(), target_is_directory=True)
    few = (f"data.path={three}", "model.num_classes=3", f"init_from={run}", "evaluation.heldout_epoch=0")
    call("train", train, *config, *keys, *few, "name=tuned", f"run_dir={tuned}")
    call("export", export.main, tuned, "--out", shared)
    model = load(shared)
    latents = model.encode(place / "photos" / "sky" / "0001.png")
    picture = model.decode(latents)[0]
    made = model.sample("flowers")[0]
    print(
        f"\nfrom the export: latents {tuple(latents.shape)}, a picture {picture.size}, a sample of flowers {made.size}"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
