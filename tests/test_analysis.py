"""The analyses: streamed sums against direct formulas in float64 and other libraries, on one process and two."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import atoms_support
import numpy as np
import pytest
import torch
from ranks import on_ranks
from support import TINY, command, command_of
from test_alignment import drawn, features
from torch import Tensor

from unite_fast import analyse, checkpoint, data, report
from unite_fast.analysis import alignment, dynamics, entropy, probe, trajectory
from unite_fast.analysis.walk import Denoised, chosen, denoised, recorded, significant, tokenized, walk
from unite_fast.base.errors import UserError
from unite_fast.config import yaml_text
from unite_fast.data.atoms.source import AtomSource
from unite_fast.evaluation import reconstruction
from unite_fast.flow import interpolate
from unite_fast.modality.images import psnr
from unite_fast.model.unite import UNITE, build
from unite_fast.parallel.distributed import Ranks
from unite_fast.run import assemble
from unite_kernels import philox
from unite_kernels.adaln import adaln

ONE = Ranks(0, 1, torch.device("cpu"))


# --- a trained run ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Of 12 steps, in a folder with another of separate weights."""
    folder = tmp_path_factory.mktemp("analysed")
    (folder / "tiny.yaml").write_text(TINY)
    for name, more in (("shared", []), ("separate", ["model.separate_denoiser=true"])):
        assert command("train.py", *training(folder, name), *more).returncode == 0
    return folder / "shared"


def training(folder: Path, name: str) -> tuple[object, ...]:
    """The words of train.py."""
    words = ("--config", folder / "tiny.yaml", f"run_dir={folder / name}", f"name={name}", "optim.lr=6e-3")
    return (*words, "train.max_steps=12", "train.log_every=4", "train.micro_batch=16", "efficiency.kernels=fused")


@pytest.fixture(scope="module")
def opened(run) -> tuple[UNITE, data.Source]:
    model, config = checkpoint.load_model(run.parent / "separate")
    return model, data.open_source(config.data, config.model, "heldout")


@torch.no_grad()
def test_layers_are_what_the_next_layer_gets(opened):
    """Through the final layer and the LayerNorm the last one becomes the latents, in both passes."""
    model, source = opened
    tile = tokenized(model, source.few(torch.arange(5)), 0.01)
    seen = denoised(tile, 0.4)
    passes = [(model.encoder, tile.layers, tile.latents), (model.denoiser, seen.layers, seen.prediction)]
    for encoder, layers, latents in passes:
        assert [layer.shape for layer in layers] == [(5, 8, 32)] * 3
        t = torch.full((5,), 0.4)
        if encoder is model.encoder:
            t = tokenizer_times(tile)
        c = encoder.t_embedder(t) + encoder.y_embedder(torch.full((5,), model.null_class))
        shift, scale = encoder.final_layer.adaLN_modulation(c).chunk(2, dim=-1)
        normed = adaln(layers[-1], encoder.final_layer.norm_final.weight, shift, scale)
        assert torch.allclose(model.normalise(encoder.final_layer.linear(normed)), latents, atol=1e-6)


def tokenizer_times(tile) -> Tensor:
    from unite_kernels.corruption import draw_tokenizer

    return draw_tokenizer(0, tile.samples, tile.model.latent_shape, 0.01)[1]


@torch.no_grad()
def test_layers_before_the_last_belong_to_the_registers(opened):
    """A register's rows change with its own input more than any other's: rows are neither shifted nor mixed up."""
    model, _ = opened
    x, t, labels = torch.zeros(1, 8, 4), torch.full((1,), 0.5), torch.tensor([model.null_class])
    rows = []
    for bump in (0.0, 3.0):
        x[0, 5] += bump
        with recorded(model.denoiser, 8) as layers:
            model.denoise(x, t, labels)
        rows.append(torch.stack(layers)[:, 0])
    moved = (rows[1] - rows[0]).norm(dim=-1)  # (blocks, registers)
    assert (moved.argmax(1) == 5).all()


@torch.no_grad()
def test_trajectory_is_the_direct_formula(opened):
    model, source = opened
    batch = source.few(chosen(source, 50))
    found = trajectory.Trajectory(ONE.device, model.latent_shape, True, (0.0, 0.7))
    walk(model, source, chosen(source, 50), yaml_text.from_dict({}).data, [found], ONE, 0.01)
    tile = tokenized(model, batch, 0.01)
    z = tile.latents
    noise = philox.normal(0, 1 << 19, batch.samples, model.latent_shape)
    result = found.result()
    for i, t in enumerate((0.0, 0.7)):
        times = torch.full((50,), t)
        x0 = model.denoise(interpolate(z, noise, times), times, torch.full((50,), model.null_class))
        expected = {
            "cosine": torch.nn.functional.cosine_similarity(z, x0, dim=-1).mean(),
            "velocity_loss": ((x0 - z) / (1 - t)).square().mean(),
            "x0_loss": (x0 - z).square().mean(),
            "explained": 1 - np.square((x0 - z).numpy()).sum() / np.square((z - z.mean(0)).numpy()).sum(),
            "psnr": psnr(batch.images.float(), model.decode(x0).clamp(0, 1)).mean(),
        }
        for name, value in expected.items():
            assert result[name][i] == pytest.approx(float(value), rel=1e-4), (name, t)
    clean = psnr(batch.images.float(), model.decode(z).clamp(0, 1)).mean()
    assert result["psnr_clean"] == pytest.approx(float(clean), rel=1e-5)
    constant = torch.nn.functional.cosine_similarity(z, z.mean(0), dim=-1).mean()
    assert result["cosine_mean"] == pytest.approx(float(constant), rel=1e-5)
    assert result["latent_std"] == pytest.approx(float(z.std(0, correction=0).mean()), rel=1e-5)
    used = [np.linalg.eigvalsh(np.cov(z[:, k].double().numpy(), rowvar=False, bias=True)) for k in range(8)]
    assert result["latent_spectrum"] == pytest.approx(np.mean(used, axis=0)[::-1], rel=1e-4, abs=1e-6)
    assert result["latent_dimensions"] == np.mean([(values > 0.01 * values.max()).sum() for values in used])
    assert 0 < result["latent_dimensions"] < 4  # of 4: the LayerNorm takes one


@torch.no_grad()
def test_a_constant_explains_nothing(opened):
    """Its cosine may be near 1 all the same; of latents that are constant themselves there is nothing to explain."""
    model, source = opened
    tile = tokenized(model, source.few(chosen(source, 50)), 0.01)
    far = replace(tile, latents=tile.latents + 20)
    for seen, says in ((far, 0.0), (replace(tile, latents=torch.ones_like(tile.latents)), math.nan)):
        found = trajectory.Trajectory(ONE.device, model.latent_shape, False, (0.5,))
        found.begin(seen)
        found.add(seen, Denoised(0.5, seen.latents.mean(0).expand_as(seen.latents), []))
        result = found.result()
        assert result["cosine"][0] == pytest.approx(result["cosine_mean"], rel=1e-6)
        assert result["cosine_mean"] > 0.99
        assert result["explained"][0] == pytest.approx(says, abs=1e-5, nan_ok=True)


def test_probes_are_scikit_learns(opened):
    from sklearn.linear_model import RidgeClassifier
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.preprocessing import StandardScaler

    model, held = opened
    train = held  # any samples do; the held-out ones are asked about others than they are fitted to
    config = yaml_text.from_dict({}).data
    fitted, asked = torch.arange(0, 200), torch.arange(200, 300)
    fitting = probe.Training(fitted, model.latent_shape, 10, ONE.device)
    walk(model, train, fitted, config, [fitting], ONE, 0.01)
    asking = probe.HeldOut(fitting)
    walk(model, held, asked, config, [asking], ONE, 0.01)
    result = fitting.result() | asking.result()
    parts = {}
    for name, places in (("train", fitted), ("held", asked)):
        with torch.no_grad():
            tile = tokenized(model, held.few(places), 0.01)
        parts[name] = {k: v.numpy() for k, v in probe.features(tile).items()}, tile.labels.numpy()
    (x, y), (a, b) = parts["train"], parts["held"]
    assert (result["samples"], result["held_out"]) == (200, 100)
    for kind in ("flat", "mean"):
        scaler = StandardScaler().fit(x[kind])
        linear = RidgeClassifier(alpha=1e-3 * 200, solver="cholesky").fit(scaler.transform(x[kind]), y)
        assert result["linear"][kind] == pytest.approx(linear.score(scaler.transform(a[kind]), b), abs=0.011)
        centre = x[kind].mean(0)
        knn = KNeighborsClassifier(10, metric="cosine", algorithm="brute").fit(x[kind] - centre, y)
        assert result["knn"][kind] == pytest.approx(knn.score(a[kind] - centre, b), abs=0.011)
    assert result["chance"] == pytest.approx(np.mean(b == np.bincount(y).argmax()))


def test_ridge_weights_are_scikit_learns():
    from sklearn.linear_model import Ridge
    from sklearn.preprocessing import StandardScaler

    x, labels = features(60, 5)[1], torch.arange(60) % 3
    sums = probe.Sums(5, 3, torch.device("cpu"))
    for part in (slice(0, 11), slice(11, 60)):
        sums.add(x[part], labels[part])
    weights, bias = sums.fit()
    scaler = StandardScaler().fit(x.numpy())
    indicators = 2 * torch.nn.functional.one_hot(labels, 3).double().numpy() - 1
    ridge = Ridge(alpha=1e-3 * 60, solver="cholesky").fit(scaler.transform(x.numpy()), indicators)
    assert np.allclose((x @ weights + bias).numpy(), ridge.predict(scaler.transform(x.numpy())), atol=1e-10)


def on_each(ranks: Ranks, checkpoints: str, count: int) -> dict:
    model, config = checkpoint.load_model(checkpoints)
    source = data.open_source(config.data, config.model, "heldout")
    places, m = chosen(source, count), config.model
    analyses = [
        alignment.Alignment(places, m.encoder.depth, m.encoder.width, ranks.device, k=3, paired=60),
        trajectory.Trajectory(ranks.device, model.latent_shape, True, alignment.TIMES),
        fitting := probe.Training(places, model.latent_shape, 10, ranks.device),
    ]
    walk(model, source, places, config.data, analyses, ranks, 0.01)
    asking = probe.HeldOut(fitting)
    walk(model, source, chosen(source, 70), config.data, [asking], ranks, 0.01)
    return significant({str(i): analysis.result() for i, analysis in enumerate([*analyses, asking])})


def test_two_processes_give_the_numbers_of_one(run):
    """Three tiles on two ranks, so one of them has two."""
    alone = on_each(ONE, str(run), 70)
    assert on_ranks(2, on_each, str(run), 70) == [alone, alone]
    assert len(alone["0"]["cknna"][0]) == 3


def test_of_molecules_and_crystals_what_is_there_counts():
    """Absent registers hold numbers as well, which must not enter."""
    settings = atoms_support.config()
    model, generator = build(settings.model).eval(), torch.Generator().manual_seed(0)
    source = AtomSource(atoms_support.structures(), atoms_support.SLOTS, ("molecules", "crystals"))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    model.modality.prepare(model, source)
    places, m = torch.arange(24), settings.model
    like = alignment.Alignment(places, m.encoder.depth, m.encoder.width, ONE.device, (0.5,), k=3, paired=24)
    back = trajectory.Trajectory(ONE.device, model.latent_shape, False, (0.5,))
    walk(model, source, places, settings.data, [like, back], ONE, 0.01)
    with torch.no_grad():
        tile = tokenized(model, source.few(places), 0.01)
        seen = denoised(tile, 0.5)
    there, result = tile.taken, like.result()
    assert result["examples"] == {"registers": int(tile.sizes.sum()), "mean": 24, "cknna": 24}
    assert int(there.sum()) < there.numel()
    for i, (x, y) in enumerate(zip(tile.layers, seen.layers, strict=True)):
        direct = alignment.PairSums(m.encoder.width, ONE.device)
        direct.add(x[there], y[there])
        assert result["cka_registers"][0][i] == pytest.approx(direct.cka()["cka"], rel=1e-5)
        means = [torch.stack([v[k, there[k]].double().mean(0) for k in range(24)]) for v in (x, y)]
        assert result["cknna"][0][i] == pytest.approx(alignment.cknna(*means, 3), rel=1e-4)
    cosine = torch.nn.functional.cosine_similarity(tile.latents[there], seen.prediction[there], dim=-1).mean()
    assert back.result()["cosine"][0] == pytest.approx(float(cosine), rel=1e-5)
    z, x0, rows = tile.latents.double().numpy(), seen.prediction.double().numpy(), there.numpy()
    errors = deviations = cosines = 0.0
    for k in range(z.shape[1]):
        own, made = z[rows[:, k], k], x0[rows[:, k], k]
        if len(own):
            mean = own.mean(0)
            errors, deviations = errors + np.square(made - own).sum(), deviations + np.square(own - mean).sum()
            cosines += (own @ mean / np.linalg.norm(own, axis=1) / np.linalg.norm(mean)).sum()
    assert back.result()["explained"][0] == pytest.approx(1 - errors / deviations, rel=1e-6)
    assert back.result()["cosine_mean"] == pytest.approx(cosines / rows.sum(), rel=1e-6)
    assert "psnr" not in back.result()


# --- without samples -------------------------------------------------------------------------------------------------


def test_entropy_is_that_of_the_histogram():
    from scipy.stats import entropy as of_shares

    w = drawn(400) * 0.01
    for width in entropy.WIDTHS:
        edges = (np.arange(-4000, 4001) - 0.5) * width
        shares = np.histogram(w.numpy(), edges)[0] / 400
        assert entropy.bits(w, width) == pytest.approx(400 * of_shares(shares, base=2), rel=1e-12)
    assert entropy.bits(torch.zeros(7), 1e-3) == 0


def test_the_start_is_that_of_training(run, monkeypatch):
    """The weights that a run's seed gives it before its first step, bit for bit; with init_from they are not known."""
    asked = []
    monkeypatch.setattr(entropy, "of_model", lambda model, start: asked.append(start))
    model, config = checkpoint.load_model(run)
    first = assemble.fresh_state(config := replace(config, seed=5), ONE).model
    for of in (config, replace(config, init_from=str(run))):
        subject = analyse.Subject("a", checkpoint.locate(run), model, of)
        analyse.of_weights(SimpleNamespace(subjects=[subject]))  # pyright: ignore[reportArgumentType]
    found, none = asked
    assert none is None
    ours, expected = dict(found.named_parameters()), dict(first.named_parameters())
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in expected.items())


def test_every_weight_has_a_group(opened):
    model, _ = opened
    found = entropy.of_model(model, None)["trained"]
    assert sum(g["elements"] for part in found.values() for g in part.values()) == model.trainable_parameters()
    assert {"encoder", "denoiser", "decoder", "rest"} == set(found)
    assert entropy.group_of("encoder.blocks.0.attn.q_norm.weight") == "normalisation"
    assert entropy.group_of("encoder.blocks.0.attn.qkv.weight") == "functional"
    assert entropy.group_of("decoder.decoder_layers.0.ffn_up.weight") == "functional"


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_compares_and_the_report_shows(run):
    other = run.parent / "separate"
    said = command_of(analyse.main, run, "--against", other, "--count", 64, "--pairs", 40, "--neighbours", 3,
                      "--times", 0.5)  # fmt: skip
    assert said.returncode == 0, said.stderr
    for name in analyse.DEFINITIONS:
        content = json.loads((run / "analysis" / f"{name}.json").read_text())
        assert list(content["models"]) == ["shared", "separate"], name
        assert {"definition", "checkpoints", "environment"} <= content["protocol"].keys()
        assert (run / "analysis" / f"{name}.png").stat().st_size > 2000
    seen = json.loads((run / "analysis" / "trajectory.json").read_text())["models"]["shared"]
    assert seen["live"] == sum(gain >= 0.5 for gain in seen["gains"])
    assert len(seen["gains"]) == 4
    found = json.loads((run / "analysis" / "alignment.json").read_text())["models"]["shared"]
    assert found["examples"] == {"registers": 64 * 8, "mean": 64, "cknna": 40}
    assert all(0 < v <= 1 for row in found["cka_registers"] for v in row)
    start = json.loads((run / "analysis" / "entropy.json").read_text())["models"]["shared"]["start"]
    assert start["encoder"]["normalisation"]["mb"][0] < start["encoder"]["functional"]["mb"][0]
    assert "CKNNA" not in said.stdout
    page = report.page(run)
    assert "<h2>Analyses</h2>" in page
    assert "protocol of alignment" in page
    again = command_of(analyse.main, run, "--only", "entropy")
    assert again.returncode == 0, again.stderr


def test_what_few_samples_do_not_say_is_null(run, tmp_path, monkeypatch):
    """JSON that every reader takes; a line says what is missing, and of what was left out, why."""
    monkeypatch.setattr(analyse.data, "open_heldout", lambda *a: (data.open_source(*a, "heldout"), "train"))
    said = command_of(analyse.main, run, "--count", 3, "--neighbours", 7, "--out", tmp_path)
    assert said.returncode == 0, said.stderr

    def refuse(word: str) -> None:
        raise AssertionError(word)

    found = {path.stem: json.loads(path.read_text(), parse_constant=refuse) for path in tmp_path.glob("*.json")}
    like = found["alignment"]["models"]["shared"]
    assert like["debiased_mean"] == [[None] * 3] * 3
    assert all(isinstance(value, float) for row in like["cka_mean"] for value in row)
    assert "alignment: 9 numbers are not defined for these samples; null in alignment.json" in said.stdout
    assert "no CKNNA, which needs more samples than --neighbours 7; 3 are compared" in said.stdout
    assert "no probes: the probes need labelled held-out images; name some with --data" in said.stdout
    assert "probes" not in found
    assert (tmp_path / "alignment.png").stat().st_size > 2000


def test_probes_without_training_images_are_refused_before_the_walk(run, monkeypatch):
    there = data.open_source

    def gone(reading, model, split):
        if split == "train":
            raise UserError("x/train is not there")
        return there(reading, model, split)

    monkeypatch.setattr(analyse.data, "open_source", gone)
    said = command_of(analyse.main, run, "--only", "probes")
    assert said.returncode == 2
    assert "--only probes: the probes are fitted to the training images (x/train is not there)" in said.stderr


def test_losses_of_held_out_samples_while_training(run):
    """They are those of the analysis on the checkpoint of then, and the run is the same with and without."""
    every = ("evaluation.heldout_count=40", f"evaluation.heldout_epoch={4 * 16 / 1497}")
    said = command("train.py", *training(run.parent, "seen"), *every)
    assert said.returncode == 0, said.stderr
    assert said.stdout.count("the score of held-out samples at step") == 3
    found = json.loads((run.parent / "seen" / "scores" / "training" / "step_0000012_heldout.json").read_text())
    model, config = checkpoint.load_model(run.parent / "seen")
    source = data.open_source(config.data, config.model, "heldout")
    direct = trajectory.Trajectory(ONE.device, model.latent_shape, False)
    walk(model, source, chosen(source, 40), config.data, [direct], ONE, 0.01)
    expected = direct.result()
    assert found["result"]["flow_t0.3"] == pytest.approx(expected["velocity_loss"][3], rel=1e-6)
    assert found["result"]["flow"] == pytest.approx(np.mean(expected["velocity_loss"]), rel=1e-6)
    settings = reconstruction.of_run(config.objective, config.evaluation, config.efficiency)
    again = reconstruction.score(model, settings, source, config.data, None, ONE)
    assert found["result"]["psnr"] == pytest.approx(again["psnr"], rel=1e-6)
    assert command_of(analyse.main, run.parent / "seen", "--only", "dynamics").returncode == 0
    of = json.loads((run.parent / "seen" / "analysis" / "dynamics.json").read_text())["models"]["seen"]
    for name, value in found["result"].items():
        if name not in dynamics.WORK:
            steps, values = of["curves"][f"heldout {name}"]
            assert (steps, values[-1]) == ([4, 8, 12], pytest.approx(value, rel=1e-5)), name
            assert of["summary"][f"heldout {name}"]["end"] == values[-1]
    assert of["curves"]["flow"][0] == [4, 8, 12]
    assert set(of["scored"].values()) == {"ema"}
    assert set(of["scored"]) == {name for name in of["curves"] if " " in name}
    without, _ = checkpoint.load_weights(run, "model")
    assert all(torch.equal(v, without[k]) for k, v in checkpoint.load_weights(run.parent / "seen", "model")[0].items())


@pytest.mark.parametrize(
    ("words", "mistake"),
    [
        (("--only", "colours"), "--only colours: choose from"),
        (("--times", "0.5,2"), "--times 0.5,2.0: different numbers"),
        (("--times", "x"), "--times x: write numbers"),
        (("--count", "0"), "--count 0: give at least 1"),
        (("--only", "entropy", "--pairs", "7"), "--pairs"),
        (("--only", "entropy", "--data", "x"), "--data"),
        (("--data", "x"), "--data"),
        (("--names", "a,b"), "--names a,b: give 1 different names"),
        (("--out", "tiny.yaml"), "--out tiny.yaml is a file"),
    ],
)
def test_mistakes_are_one_line(run, monkeypatch, words, mistake):
    monkeypatch.chdir(run.parent)
    said = command_of(analyse.main, run, *words)
    assert said.returncode == 2
    assert said.stderr.count("\n") == 1
    assert mistake in said.stderr
