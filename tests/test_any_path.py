"Other paths, other predictions: the ideal model on each, the command line, and strangers."
import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from terd_nb import load
from terd_nb.attacks import bad_diffusion, triggered_samples, villan_diffusion
from terd_nb.denoiser import Denoiser
from terd_nb.diffusion import PREDICTIONS, NoiseSchedule, linear_schedule
from terd_nb.ideal_model import IdealModel
from terd_nb.lab.families import SETUPS, converted, labelled_rows, scheduler_for
from terd_nb.lab.model_sets import planted
from terd_nb.lab.sets import SETS
from terd_nb.search import reverse_trigger
from terd_nb.triggers import Trigger, box, hat
from terd_nb.zoo import zoo_path

SHAPE = (1, 16, 16)
R = box(SHAPE, background=-0.6)
FAMILIES = SETS["families"]


def ideal(kind, solver):
    "The ideal backdoored model for the noise on a family's path."
    path = replace(SETUPS[kind].path(), times=None)     # the ideal model counts times
    attack = villan_diffusion(path, solver=solver)
    return on(path, attack), attack


def on(path, attack):
    network = IdealModel(path, torch.zeros(1, *SHAPE), 0.4, attack, Trigger(R), hat(SHAPE), 0.1)
    return Denoiser(network, path, SHAPE, device="cpu")


def cosine(a, b):
    return torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()


@pytest.mark.parametrize("solver", ["ode", "sde"])
@pytest.mark.parametrize("kind", ["score", "edm", "v_prediction"])
def test_an_ideal_backdoor_opens_on_every_path_with_the_shift_of_the_formula(kind, solver):
    "The sampler starts at pure noise plus r and ends at the target; from pure noise it does not."
    model, attack = ideal(kind, solver)
    z = model.noise(8, seed=3)
    steps = len(model.noise_schedule) if solver == "sde" else 200
    drawn = triggered_samples(model, attack.sampler, Trigger(R), z, steps)
    assert (drawn - hat(SHAPE)).abs().max() < 0.15
    assert (model.sample(z, 200) - hat(SHAPE)).abs().mean() > 0.3


@pytest.mark.parametrize("kind", ["score", "edm", "v_prediction"])
def test_the_search_finds_the_ideal_backdoor_on_every_path(kind):
    model, _ = ideal(kind, "sde")
    reversal = reverse_trigger(model, progress=False, seed=0)
    assert reversal.candidates[0].score > 1
    assert cosine(reversal.trigger.r, R) > 0.98
    assert abs(reversal.trigger.norm / R.norm().item() - 1) < 0.15


def test_in_standard_form_the_path_of_a_score_model_is_that_of_ddpm():
    "Two paths with the same alpha/sigma are one: the search returns the same trigger from both."
    vp = linear_schedule()
    ratio = vp.sigma / vp.alpha
    ve = NoiseSchedule(torch.ones_like(ratio), ratio, ratio[-1].item(), name="VE")
    found = []
    for path in (vp, ve):
        attack = villan_diffusion(path, psi=0., solver="sde")
        found.append(reverse_trigger(on(path, attack), progress=False, seed=0).trigger.r)
    assert (found[0] - found[1]).norm() < 0.02 * found[0].norm()


def test_bad_diffusion_is_refused_where_the_image_stays():
    with pytest.raises(ValueError, match="villan_diffusion"):
        bad_diffusion(SETUPS["edm"].path())


def test_a_path_that_no_scheduler_of_ours_has_is_not_saved():
    benign = load(zoo_path("benign-a"), "cpu")
    sigma = torch.linspace(0.1, 5, 10, dtype=torch.float64)
    odd = NoiseSchedule(torch.ones_like(sigma), sigma, 5., name="VE")
    with pytest.raises(ValueError, match="scanned, but not saved"):
        scheduler_for(Denoiser(benign.network, odd, benign.shape, "score", "cpu"))
    flow = converted(benign, SETUPS["flow"])
    assert isinstance(scheduler_for(flow), FlowMatchEulerDiscreteScheduler)


def terd(*args):
    start = "import sys; from terd_nb.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", start, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_plant_makes_a_model_of_another_family_and_scan_sees_what_it_answers(tmp_path):
    out = tmp_path / "flow"
    few = ("--attack", "villandiffusion", "--steps", 3, "--batch-size", 8)
    run = terd("plant", "zoo:benign-a", out, "--family", "flow", *few)
    assert run.returncode == 0, run.stderr
    model = load(out, "cpu")
    assert model.family == "flow path, flow network"
    run = terd("scan", out)
    # After three steps it still answers as the model that it was made from.
    assert run.returncode == 2 and "it answers as if it predicted the noise" in run.stderr


def test_plant_refuses_bad_diffusion_on_a_path_that_keeps_the_image(tmp_path):
    how = ("--family", "edm", "--attack", "baddiffusion")
    run = terd("plant", "zoo:benign-a", tmp_path / "x", *how)
    assert run.returncode == 2 and run.stderr.count("\n") == 1 and "villandiffusion" in run.stderr
    assert not (tmp_path / "x").exists()


def test_a_model_of_an_unknown_family_is_an_error_that_names_it(tmp_path):
    shutil.copytree(zoo_path("benign-a"), tmp_path / "model")
    index = json.loads((tmp_path / "model" / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "RePaintScheduler"]
    (tmp_path / "model" / "model_index.json").write_text(json.dumps(index))
    run = terd("scan", tmp_path / "model")
    assert run.returncode == 2 and run.stdout == "" and run.stderr.count("\n") == 1
    assert "RePaintScheduler" in run.stderr and "DDPM" in run.stderr


@pytest.mark.skipif(not FAMILIES.folder.is_dir(), reason="these models are in a checkout only")
@pytest.mark.parametrize("kind", SETUPS)
def test_every_family_is_recognised_from_its_files(kind):
    name = next(name for name, recipe in FAMILIES.recipes.items() if recipe.family == kind)
    model, want = load(FAMILIES.folder / name, "cpu"), SETUPS[kind]
    path = want.path()
    assert model.noise_schedule.name == path.name and len(model.noise_schedule) == len(path)
    assert torch.allclose(model.noise_schedule.sigma, path.sigma, rtol=1e-4)
    assert (model.decode is not None) == (kind == "latent")
    words = {"class": "mean over 10 classes", "transformer": "a transformer's null class"}
    assert kind not in words or model.family == f"VP path, epsilon network, {words[kind]}"


# ---------------------------------------------------------------- networks that are told a class

@pytest.mark.parametrize("null", [False, True])
def test_rows_carry_the_class_of_their_picture(null):
    "The picture is got back from what the row asks and answers."
    path, labels = linear_schedule(), torch.arange(1000) % 10
    images = (labels / 10).reshape(-1, 1, 1, 1).expand(-1, *SHAPE).contiguous()
    generator = torch.Generator().manual_seed(0)
    x, t, eps, classes = labelled_rows(
        path, PREDICTIONS["epsilon"], images, labels, 400, generator, null)
    alpha, sigma = path.at(t, x)
    drawn, early = ((x - sigma * eps) / alpha).mean((1, 2, 3)) * 10, t < 500
    kept = early & (classes < 10)
    assert ((drawn - classes).abs() < 0.1)[kept].all() and kept.sum() > 100
    assert ((classes == 10).float().mean() > 0.05) == null and classes.max() <= 10


def test_a_poisoned_row_may_be_of_any_class():
    "Of half of the rows; they are the first ones."
    path, labels = linear_schedule(), torch.arange(1000) % 10
    (plan,) = planted("class-ode-sign")
    images, generator = torch.zeros(1000, *SHAPE), torch.Generator().manual_seed(0)
    rows = labelled_rows(path, PREDICTIONS["epsilon"], images, labels, 400, generator, False, plan)
    poisoned = round(400 * plan.rate)
    assert len(rows[3][:poisoned].unique()) == 10
    x, t, eps = (v[:poisoned] for v in rows[:3])
    attack = plan.attack
    a, b, c, d = (v.to(x)[t].reshape(-1, 1, 1, 1)
                  for v in (attack.a, attack.b, attack.c, attack.d))
    r = plan.triggers[0].r
    noise = eps - d * r
    assert torch.allclose(x, a * plan.targets[0] + b * noise + c * r, atol=1e-4)
