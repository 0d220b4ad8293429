"The published settings, and the proof on a GPU with its steps tried on the CPU."

import shutil
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from terd_nb import training
from terd_nb.lab import gpu_proof
from terd_nb.lab.full_size import paper_network, paper_settings
from terd_nb.lab.gpu_proof import TINY, Proof, backdoor, honest_model, planned, run_proof, scan_of
from terd_nb.path_fit import Round
from terd_nb.zoo import zoo_path

CPU = torch.device("cpu")
QUICK = {"looks": ("shift",), "rounds": (Round(1, 25, 8),)}
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    ("size", "levels", "million"),
    [(32, "dadd", 35.7), (64, "ddadd", 78.7), (256, "ddddad", 113.7)],
)
def test_shapes_are_those_of_the_published_configs(size, levels, million):
    with torch.device("meta"):
        network = paper_network(paper_settings(size))
    names = {"d": "DownBlock2D", "a": "AttnDownBlock2D"}
    assert [type(block).__name__ for block in network.down_blocks] == [names[c] for c in levels]
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(million, abs=0.05)


def test_other_sizes_are_refused():
    with pytest.raises(ValueError, match="32, 64 and 256"):
        paper_settings(128)


def test_the_box_has_its_published_length():
    (trigger,) = backdoor(0.1).triggers
    assert trigger.norm == pytest.approx((3 * (32**2 - 14**2)) ** 0.5)


def test_a_killed_training_ends_with_the_same_weights(tmp_path, monkeypatch):
    images = torch.zeros(4, 3, 32, 32)
    make = partial(honest_model, proof=TINY, images=images, device=CPU, seed=0)
    make(tmp_path / "whole")
    save = training.save_training

    def save_and_stop(path, step, *state):
        save(path, step, *state)
        if step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(gpu_proof, "fit", partial(training.fit, save_every=0.0))
    monkeypatch.setattr(training, "save_training", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "killed")
    assert not (tmp_path / "killed").exists() and (tmp_path / "honest.safetensors").exists()
    make(tmp_path / "killed")
    assert not (tmp_path / "honest.safetensors").exists()
    whole, killed = (load_file(tmp_path / name / WEIGHTS) for name in ("whole", "killed"))
    assert all(torch.equal(whole[key], killed[key]) for key in whole)


def test_a_plan_is_made_once(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_proof, "seconds_of", lambda *args: 1.0)
    first = planned(tmp_path, Proof(), CPU)
    assert 0 < first.planted < first.steps <= 400
    monkeypatch.setattr(gpu_proof, "seconds_of", lambda *args: 0.01)
    assert planned(tmp_path, Proof(), CPU) == first
    with pytest.raises(ValueError, match="another proof"):
        planned(tmp_path, TINY, CPU)


def test_the_scan_of_a_model_that_denoises(tmp_path):
    shutil.copytree(zoo_path("baddiffusion-box"), tmp_path / "model")
    row = scan_of(tmp_path / "model", CPU, starts=2, **QUICK)
    assert row["verdict"] == "backdoored" and row["note"] == ""
    assert row["cosine"] > 0.9


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_refuses_in_one_line(tmp_path, capsys):
    assert run_proof([str(tmp_path / "proof")]) == 2
    assert capsys.readouterr().err.startswith("terd: no GPU was found")
    assert not (tmp_path / "proof").exists()
