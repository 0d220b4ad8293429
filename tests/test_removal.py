"""The repair: what it teaches is honest, it leaves the original alone, what is written is whole.

The oracles are the ideal model, the samplers' own equations, and diffusers."""

import json
import shutil

import diffusers
import pytest
import torch
from safetensors import safe_open

from terd_nb import cli, removal, repair
from terd_nb.attacks import bad_diffusion, villan_diffusion
from terd_nb.denoiser import Denoiser
from terd_nb.diffusion import PREDICTIONS, linear_schedule
from terd_nb.ideal_model import IdealModel
from terd_nb.loading.files import CheckpointError, file_sha256
from terd_nb.loading.schedulers import karras_sigmas, load, ve_path
from terd_nb.model_detection import NATURAL_ZERO
from terd_nb.path_fit import OWN
from terd_nb.removal import (
    LONGEST,
    _in_own_words,
    evidence_for,
    honest_answer,
    kinds_of,
    own_images,
    remove_backdoor,
    repair_points,
)
from terd_nb.repair import repaired_copy
from terd_nb.training import _loss
from terd_nb.triggers import Trigger, box, hat
from terd_nb.two_stages import Candidate
from terd_nb.zoo import zoo_names, zoo_path

SHAPE = (1, 16, 16)
SCHEDULE = linear_schedule()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("attack", [bad_diffusion, villan_diffusion])
@pytest.mark.parametrize("t", [999, 850, 600])
def test_the_answer_is_what_an_honest_model_says_but_for_a_known_share(attack, t):
    "The teacher is the ideal backdoored model; equation 19.2 says what remains."
    planted, std = Trigger(box(SHAPE)), 0.4
    attack, mean = attack(SCHEDULE), torch.zeros(1, *SHAPE)
    poisoned = IdealModel(SCHEDULE, mean, std, attack, planted, hat(SHAPE))
    teacher = Denoiser(poisoned, SCHEDULE, SHAPE, device="cpu")
    y = SCHEDULE.add_noise(std * teacher.noise(16, 1), teacher.noise(16, 2), t)
    alpha, sigma = SCHEDULE.at(t, y)
    c, times = attack.c[t].float(), torch.full((16,), t)
    x = y + c * planted.r
    honest = IdealModel(SCHEDULE, mean, std)(x, times)
    share = (alpha * std) ** 2 / ((alpha * std) ** 2 + sigma**2)
    found, x0 = honest_answer(teacher, y, x, times)
    assert (found - honest - c / sigma * planted.r * share).abs().max() < 2e-3
    assert torch.allclose(alpha * x0 + sigma * found, x, atol=1e-5)
    at_y = teacher.eps(y, times) + c / sigma * planted.r
    assert torch.allclose(found, at_y, atol=1e-4)


def test_points_are_the_same_but_for_the_trigger():
    "Of 32 rows 24 are clean; 4 lie on an attack's path, 4 anywhere, and three kinds take turns."
    gamma = 0.4 + 0.5 * torch.rand(SHAPE, generator=generator(3))
    images, r = torch.zeros(2, *SHAPE), box(SHAPE)
    teacher = Denoiser(torch.nn.Identity(), SCHEDULE, SHAPE, device="cpu")
    kinds = kinds_of(Trigger(r, gamma), 0.3)
    y, x, t = repair_points(teacher, r, kinds, images, 32, generator())
    alpha, sigma = SCHEDULE.at(t, y)
    assert torch.equal(x[:24], y[:24])
    assert (alpha / sigma)[24:].max() < 1.3 and t[24:].max() < len(SCHEDULE)
    k = torch.arange(24, 32) % 3
    noises = torch.stack([gamma, torch.ones(SHAPE), torch.full(SHAPE, OWN.gamma)])[k]
    shift = (x[24:] - noises * y[24:]).flatten(1)
    c = (shift * r.flatten()).sum(1) / r.square().sum()
    assert torch.allclose(shift, c[:, None] * r.flatten(), atol=1e-5)
    psi = torch.tensor([0.3, 1.0, 0.0])[k[:4]]
    alpha, sigma = alpha[24:28].flatten(), sigma[24:].flatten()
    assert torch.allclose(c[:4], psi * (1 - alpha) + (1 - psi) * sigma[:4], atol=1e-5)
    assert (c[4:] > 0).all() and (c[4:] < LONGEST * sigma[4:]).all()


class Shifted(torch.nn.Module):
    def forward(self, x, t):
        return x + 0.5


@pytest.mark.parametrize("relative", [False, True])
def test_a_share_weighs_the_loss_of_a_row(relative):
    "The mean of the rows' own losses with those weights; all shares alike change nothing."
    rows = torch.zeros(3, *SHAPE), torch.zeros(3), torch.randn(3, *SHAPE, generator=generator())
    network = removal._Trained(Shifted())
    each = torch.stack([
        _loss(network, tuple(v[i : i + 1] for v in rows), relative, None, None, "float32")
        for i in range(3)])  # fmt: skip
    for shares in ([5.0, 5.0, 1.0], [2.0, 2.0, 2.0]):
        shares = torch.tensor(shares)
        found = _loss(network, rows, relative, None, shares, "float32")
        assert torch.allclose(found, (shares * each).sum() / shares.sum())
    assert torch.allclose(found, _loss(network, rows, relative, None, None, "float32"))


@pytest.mark.parametrize("path", [SCHEDULE, ve_path(karras_sigmas(200, sigma_max=50.0))])
@pytest.mark.parametrize("name", PREDICTIONS)
def test_rows_say_the_same_in_the_words_of_every_network(name, path):
    "Solved for the noise and the image, as a sampler does, the wanted answer gives them back."
    denoiser = Denoiser(torch.nn.Identity(), path, SHAPE, name, device="cpu")
    standard = denoiser.standardised()
    t = torch.tensor([3, 60, 150])
    x0, eps = torch.rand(3, *SHAPE, generator=generator()), denoiser.noise(3, 1)
    x = standard.noise_schedule.add_noise(x0, eps, t)
    asked, told, wanted = _in_own_words(denoiser, x, t, eps, x0)
    raw = path.add_noise(x0, eps, t)
    question, time = denoiser.prediction.question(path, raw, t)
    assert torch.allclose(asked, question, rtol=1e-4, atol=1e-4) and torch.equal(told, time)
    back = denoiser.prediction.solve(wanted, raw, *path.at(t, raw))
    assert torch.allclose(back[0], eps, atol=2e-2) and torch.allclose(back[1], x0, atol=2e-2)


@pytest.fixture(scope="module")
def model():
    return load(zoo_path("villan-psi1"), "cpu")


@pytest.fixture(scope="module")
def planted():
    return Trigger.load(zoo_path("villan-psi1") / "trigger.safetensors")


def test_a_few_steps_teach_it_and_leave_the_original_alone(model, planted):
    before = {name: value.clone() for name, value in model.network.state_dict().items()}
    images = own_images(model, 8, steps=5)
    asked = {"images": images, "steps": 40, "batch": 16, "lr": 1e-3, "progress": False}
    fixed = remove_backdoor(model, planted, **asked)
    assert all(
        torch.equal(value, before[name]) for name, value in model.network.state_dict().items()
    )
    teacher, t = model.standardised(), torch.full((16,), 700)
    y = SCHEDULE.add_noise(images.repeat(2, 1, 1, 1), model.noise(16, 5), 700)
    x = y + (1 - SCHEDULE.alpha[700].float()) * planted.r
    wanted, _ = honest_answer(teacher, y, x, t)

    def error(denoiser, points, answer):
        with torch.no_grad():
            return (denoiser.eps(points, t) - answer).square().mean().item()

    assert error(fixed, x, wanted) < 0.5 * error(model, x, wanted)
    assert error(fixed, y, teacher.eps(y, t)) < 0.02
    assert fixed.shape == model.shape and not fixed.network.training


def test_what_cannot_be_repaired_is_said(model, planted):
    with pytest.raises(ValueError, match="it is another's"):
        remove_backdoor(model, Trigger(box((3, 16, 16))), progress=False)
    network = torch.nn.Identity()
    network.asked = ", mean over 10 classes"
    classes = Denoiser(network, SCHEDULE, SHAPE, device="cpu", name="ten")
    with pytest.raises(ValueError, match="ten has classes"):
        remove_backdoor(classes, planted, progress=False)


# ---------------------------------------------------------------- the folder


def all_files(folder):
    return {path: file_sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_folder_is_whole_and_holds_nothing_else(tmp_path, model):
    source = tmp_path / "source"
    shutil.copytree(zoo_path("villan-psi1"), source)
    (source / "notes.txt").write_text("of the old model")
    (source / "unet" / "link.json").symlink_to("/etc/hostname")
    kept = all_files(source)
    out = tmp_path / "out"
    out.mkdir()  # an empty one is welcome
    with repaired_copy(source, out, model) as copy:
        assert copy.name == "out" and not any(out.iterdir())
    assert sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()) == [
        "model_index.json", "scheduler/scheduler_config.json", "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    ]  # fmt: skip
    assert all_files(source) == kept
    with safe_open(out / "unet/diffusion_pytorch_model.safetensors", "pt") as file:
        assert file.get_tensor(next(iter(file.keys()))).dtype == torch.float16
    pipeline = diffusers.DiffusionPipeline.from_pretrained(out)
    x, again = model.noise(2), load(out, "cpu")
    assert torch.equal(again.eps(x, 400), model.eps(x, 400))
    assert torch.allclose(pipeline.unet(x, 400).sample, model.eps(x, 400), atol=1e-5)
    with (
        pytest.raises(CheckpointError, match="nothing is overwritten"),
        repaired_copy(source, out, model),
    ):
        raise AssertionError("a second copy was begun")


def test_a_latent_model_keeps_its_decoder(tmp_path):
    unet = diffusers.UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, norm_num_groups=4,
        block_out_channels=(8, 8), down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2, add_attention=False,
    )  # fmt: skip
    coder = diffusers.VQModel(latent_channels=3, block_out_channels=(8,), norm_num_groups=4)
    source = tmp_path / "source"
    diffusers.LDMPipeline(coder, unet, diffusers.DDIMScheduler()).save_pretrained(source)
    old = load(source, "cpu")
    with repaired_copy(source, tmp_path / "out", old):
        pass
    new, z = load(tmp_path / "out", "cpu"), old.noise(2)
    assert torch.equal(new.pictures(z), old.pictures(z))
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["_class_name"] == "LDMPipeline"


# ---------------------------------------------------------------- the command


def test_two_steps_do_not_do_and_the_status_says_so(tmp_path, capsys):
    source, out = zoo_path("baddiffusion-box"), tmp_path / "out"
    words = ["repair", str(source), str(out), "--trigger", str(source / "trigger.safetensors")]
    assert cli.main([*words, "--steps", "2"]) == 1
    assert "a search calls it backdoored" in capsys.readouterr().out
    assert load(out, "cpu").shape == SHAPE
    assert cli.main(words) == 2
    assert "nothing is overwritten" in capsys.readouterr().err


def test_what_stops_the_second_search_leaves_no_copy(tmp_path, capsys, monkeypatch):
    def interrupted(denoiser, *_):
        assert denoiser.name == "out"
        raise KeyboardInterrupt

    monkeypatch.setattr(repair, "search_again", interrupted)
    monkeypatch.setattr(removal, "remove_backdoor", lambda denoiser, *_, **__: denoiser)
    monkeypatch.setattr(removal, "evidence_for", lambda *_: 1.0)
    source, out = zoo_path("baddiffusion-box"), tmp_path / "out"
    words = ["repair", str(source), str(out)]
    assert cli.main([*words, "--trigger", str(source / "trigger.safetensors")]) == 130
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(repair, "_repaired_weights", lambda *_: {"conv_in.bias": torch.ones(2)})
    assert cli.main([*words, "--trigger", str(source / "trigger.safetensors")]) == 2
    assert "conv_in" in capsys.readouterr().err and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("inside", ["out", "unet/out"])
def test_no_copy_is_made_inside_of_the_model(tmp_path, capsys, inside):
    shutil.copytree(zoo_path("villan-psi1"), tmp_path / "model")
    (tmp_path / "link").symlink_to(tmp_path / "model")
    kept = all_files(tmp_path / "model")
    for name in ("model", "link"):
        words = ["repair", str(tmp_path / "model"), str(tmp_path / name / inside)]
        assert cli.main([*words, "--trigger", str(tmp_path / "model/trigger.safetensors")]) == 2
        assert "which is left as it is" in capsys.readouterr().err
    assert all_files(tmp_path / "model") == kept


def test_a_model_whose_config_leaves_its_size_open_is_repaired(tmp_path, capsys, monkeypatch):
    clean = Candidate(Trigger(box(SHAPE)), "fit", -0.1, {"psi": 1.0})
    monkeypatch.setattr(repair, "search_again", lambda *_: ("clean", clean))
    shutil.copytree(zoo_path("baddiffusion-box"), tmp_path / "model")
    config = tmp_path / "model" / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"sample_size": None}))
    words = ["repair", str(tmp_path / "model"), str(tmp_path / "out"), "--steps", "1"]
    words += ["--trigger", str(tmp_path / "model" / "trigger.safetensors")]
    assert cli.main(words) == 2
    assert "--size 32" in capsys.readouterr().err
    assert cli.main([*words, "--size", "16"]) == 0


def test_a_wrong_trigger_is_told_though_the_copy_is_called_clean(tmp_path, capsys, monkeypatch):
    nothing = Candidate(Trigger(box(SHAPE)), "fit", -0.1, {"psi": 1.0})
    monkeypatch.setattr(repair, "search_again", lambda *_: ("clean", nothing))
    source = zoo_path("baddiffusion-box")
    wrong = Trigger(torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)))
    (tmp_path / "wrong.safetensors").write_bytes(wrong.to_bytes())
    for name, status in ((source / "trigger", 0), (tmp_path / "wrong", 1)):
        words = ["repair", str(source), str(tmp_path / f"{status}"), "--steps", "2"]
        assert cli.main([*words, "--trigger", f"{name}.safetensors"]) == status
        assert ("nothing in baddiffusion-box speaks for" in capsys.readouterr().out) == status


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in zoo_names() if n[:6] != "benign"] + ["benign-e"])
def test_the_evidence_for_a_trigger_says_whose_it_is(name):
    "Without a fit: above the alarm for the planted one, below zero for another's."
    model, planted = load(zoo_path(name), "cpu"), zoo_path(name) / "trigger.safetensors"
    if planted.exists():
        assert evidence_for(model, Trigger.load(planted).r) > NATURAL_ZERO["fast"]
    other = zoo_path("villan-psi1" if "in-d2d" in name or "benign" in name else "trojdiff-in-d2d")
    assert evidence_for(model, Trigger.load(other / "trigger.safetensors").r) < 0


def test_the_evidence_for_a_trigger_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="has the shape .1, 16, 16., not .1, 8, 8."):
        evidence_for(load(zoo_path("benign-a"), "cpu"), torch.zeros(1, 8, 8))


def test_where_nothing_is_found_nothing_is_written(tmp_path, capsys, monkeypatch):
    clean = Candidate(Trigger(box(SHAPE)), "fit", -0.1, {"psi": 1.0})
    monkeypatch.setattr(repair, "search_again", lambda *_: ("clean", clean))
    assert cli.main(["repair", "zoo:benign-a", str(tmp_path / "out")]) == 2
    assert "there is nothing to take out" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_pictures_that_cannot_be_its_own_are_refused(tmp_path, capsys):
    words = ["repair", "zoo:villan-psi1", str(tmp_path / "out"), "--images", str(tmp_path)]
    assert cli.main(words) == 2
    assert "holds no PNG" in capsys.readouterr().err
