"""Every command that the documents show: all are read by their real programs, and those of the README run, small."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import written
from photographs import crop
from support import ROOT, TINY, command, command_of

from unite_fast import __main__ as verbs

COMMANDS = written.all_commands()
SHRINK = (
    "model.patch_size=8", "model.num_latents=16", "train.max_steps=2", "train.global_batch=8", "data.workers=0",
    "model.encoder={depth: 2, width: 32, heads: 2, in_context_start: 1, in_context_len: 1}",
    "model.decoder={depth: 1, width: 32, heads: 2, mlp_hidden: 64, in_features: 32}",
)  # fmt: skip
# The beginning of a command of the README: what is added to it to make it small.
RUN: dict[str, tuple[str, ...]] = {
    "python train.py --config configs/images_32.yaml": SHRINK,
    "python -m unite_fast report": (),
    "python sample.py --checkpoint runs/pets": (),
    "python sample.py --checkpoint runs/digits": (),
    "python -m unite_fast gallery": ("--seeds", "0-1", "--scales", "1,2"),
    "python -m unite_fast export": (),
    "python -m unite_fast evaluate heldout": ("--data", "heldout"),
    "python -m unite_fast sweep configs/paper/paper.yaml": (),
}
# Those that cannot run here, and why. Their words, files and configurations are checked all the same.
NOT_RUN = {
    "make": "what each target runs is checked (make -n); tests, demos and the GPU's minutes take too long",
    "pip": "installs over a network; its files and extras are checked",
    "torchrun --standalone --nproc_per_node=8": "eight processes, each on a GPU",
    "torchrun --nnodes=2": "two nodes; tests/faults/test_nodes.py",
    "sbatch": "a cluster; tests/test_slurm.py runs the script",
    "python -m unite_fast fetch": "fetches over a network; tests/faults/test_fetch.py has a server of its own",
    "python -m unite_fast.doctor --config configs/imagenet_b.yaml": "ImageNet; tests/test_doctor.py",
    "python train.py --config configs/imagenet_b.yaml": "ImageNet; tests/test_sizes.py plans it",
    "python -m unite_fast.evaluation.statistics": "ImageNet and Inception's weights; tests/test_evaluate.py",
    "python -m unite_fast analyse": "two trained runs and ImageNet; tests/test_analysis.py",
    "python -m unite_fast sweep configs/claims/claims.yaml": "trains 60 models; tests/test_sweep.py",
    "python train.py --config configs/qm9.yaml": "QM9 takes half a minute; tests/test_atoms_run.py",
    "python sample.py --checkpoint runs/molecules": "a trained model of molecules; tests/test_atoms_run.py",
    "python -m unite_fast evaluate atoms": "the same",
    "python -m unite_fast.data.atoms": "QM9 and MP20; tests/test_atoms_data.py and test_atoms_files.py",
    "python -m unite_fast.evaluation.atoms": "the same; tests/test_atoms_scores.py",
    "python scripts/new_user.py": "tests/test_new_user.py",
    "python train.py --help": "tests/test_keys.py",
    "python -m unite_fast pack": "named, not shown; tests/test_data_packing.py",
}


def of_readme() -> list[str]:
    return [c.text for c in COMMANDS if c.where == "README.md"]


def rows(text: str) -> list[str]:
    return [start for start in (*RUN, *NOT_RUN) if re.match(rf"{re.escape(start)}(?![\w-])", text)]


@pytest.mark.parametrize("where", sorted({c.where for c in COMMANDS}))
def test_commands_are_what_their_programs_take(where):
    for one in COMMANDS:
        if one.where == where:
            written.check(one.text, one.shown)


def test_there_is_something_to_check():
    assert len([c for c in COMMANDS if c.shown]) > 80
    assert {
        "README.md",
        "docs/PAPER.md",
        "benchmarks/GPU_BACKLOG.md",
        "configs/digits.yaml",
        "unite_fast/sweep.py",
    } <= {c.where for c in COMMANDS}


@pytest.mark.parametrize(
    "wrong",
    [
        "python train.py --config configs/images_32.yaml model.num_class=2",
        "python train.py --config configs/images_33.yaml",
        "python train.py --config configs/digits.yaml train.global_batch=33",
        "python sample.py --checkpoint runs/digits --seed 3 --outt x.png",
        "python -m unite_fast reprot runs/digits",
        "python -m unite_fast gallery guidence runs/digits",
        "python -m unite_fast.no_such_module",
        "python scripts/gone.py",
        "torchrun --standalone --nprocs=8 train.py",
        "torchrun --standalone --nproc_per_node=8 train.py optim.lrr=1",
        "make no-such-target",
        "pip install 'unite-fast[log]'",
        "pip install -e '.[logs]'",
        "pip install --constraint constraint.txt torch",
    ],
)
def test_a_wrong_command_is_found(wrong):
    with pytest.raises(AssertionError):
        written.check(wrong)


def test_every_command_of_the_readme_runs_or_is_said_not_to():
    matches = {text: rows(text) for text in of_readme()}
    assert not {text: found for text, found in matches.items() if len(found) != 1}
    unused = {*RUN, *NOT_RUN} - {found for (found,) in matches.values()}
    assert not unused, f"no command of the README begins so any more: {unused}"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the README takes for granted: own images, a photograph, the run of the digits."""
    for number in range(16):
        for folder, names in {
            "pets": ("cat", "dog"),
            "birds": ("dog", "jay", "owl"),
            "heldout": ("cat", "dog"),
        }.items():
            target = tmp_path / folder / names[number % len(names)]
            target.mkdir(parents=True, exist_ok=True)
            crop(number).save(target / f"{number}.png")
    (tmp_path / "photos").mkdir()
    for path in (tmp_path / "photo.jpg", tmp_path / "photos" / "a.png"):
        crop(1).save(path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "imagenet" / "train").mkdir(parents=True)
    (tmp_path / "tiny.yaml").write_text(TINY)
    monkeypatch.chdir(tmp_path)
    done = command("train.py", "--config", "tiny.yaml", "name=digits", "train.max_steps=1")
    assert done.returncode == 0, done.stderr
    return tmp_path


def test_the_commands_of_the_readme_run(place):
    for text in of_readme():
        (start,) = rows(text)
        if start not in RUN:
            continue
        _, *words = shlex.split(text)
        words += RUN[start]
        if words[0] == "-m":
            done = command_of(verbs.main, *words[2:])
        else:
            done = command(words[0], *words[1:])
        assert done.returncode == 0, f"{text}\n{done.stdout}{done.stderr}"
    made = ("samples.png", "again/photo.png", "runs/pets/report/index.html", "shared/model.safetensors", "grid.png",
            "runs/pets/report/gallery_guidance.png", "reconstructed/a.png", "array.sh")  # fmt: skip
    assert not [name for name in made if not (place / name).is_file()]
