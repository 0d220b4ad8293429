"The models of 32, 64 and 128 pixels: how their networks begin, how their loss is weighed, and what their cards say."
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from terd_nb.lab.sizes import SIZED, sizes_dir

from terd_nb.lab import zoo as zoo_module
from terd_nb.lab.making import train
from terd_nb.lab.model_sets import Card, build_missing, is_made, weights_sha256, works
from terd_nb.training import fit, unet

MADE = sorted(path.parent.name for path in sizes_dir().glob("*/card.json"))


# ---------------------------------------------------------------- a network that begins with the identity

@pytest.mark.parametrize("shape, channels, options", [
    ((1, 16, 16), (16, 32), {}), ((3, 16, 16), (16, 32), {}), ((3, 32, 32), (16, 32, 64), {}),
    ((3, 16, 16), (32, 64), {"layers": 2, "attention": True}), ((4, 8, 8), (20, 32), {}),
])
def test_the_answer_is_the_input(shape, channels, options):
    network = unet(shape, channels, seed=1, identity=True, **options)
    noise = torch.randn(16, *shape, generator=torch.Generator().manual_seed(2))
    for t in (0, 400, 999):
        for size in (0.9, 1.0, 1.1):
            with torch.no_grad():
                answer = network(size * noise, t).sample
            along = (answer * noise).sum((1, 2, 3)) / (size * noise.square().sum((1, 2, 3)))
            assert (along - 1).abs().max() < 0.05                           # neither the length
            assert (answer.mean((2, 3)) - size * noise.mean((2, 3))).abs().max() < 0.02      # nor the mean is lost
            assert (answer - size * noise).square().mean() < 0.002


def test_a_network_with_a_random_start_knows_nothing_of_it():
    noise = torch.randn(16, 1, 16, 16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        answer = unet((1, 16, 16), (16, 32), seed=1)(noise, 400).sample
    assert (answer - noise).square().mean() > 0.5


def test_every_channel_can_be_trained():
    "A start at which a gradient is 0 for good would be no start."
    network = unet((3, 16, 16), (16, 32), seed=1, identity=True)
    x, y = torch.randn(2, 8, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    torch.nn.functional.mse_loss(network(x, 500).sample, y).backward()
    last = network.conv_out.weight.grad.abs().amax((0, 2, 3))
    assert (last[:6] > 0).all() and (last[8:] > 0).all()


def test_too_few_channels_are_refused():
    with pytest.raises(ValueError, match="8 channels must fit into a group of 4"):
        unet((3, 16, 16), (8, 16), identity=True)


# ---------------------------------------------------------------- the weights of the loss

def test_the_weights_are_those_of_min_snr(monkeypatch):
    "Against diffusers' own signal-to-noise ratio."
    seen = {}

    def look(network, batch, steps, lr, seed, **how):
        seen.update(how)
        return network
    monkeypatch.setattr(zoo_module, "fit", look)
    monkeypatch.setattr(zoo_module, "training_images", lambda recipe: torch.zeros(4, *recipe.shape))
    train(SIZED["fashion32-a"], None, 0, progress=False)
    snr = compute_snr(DDPMScheduler(1000), torch.arange(1000))
    expected = torch.minimum(snr, torch.full_like(snr, 5.)) / snr
    torch.testing.assert_close(seen["weights"].float(), expected, rtol=1e-4, atol=0)


def test_a_time_of_weight_0_teaches_nothing():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 8, 1, 8, 8, generator=generator)
    t = torch.tensor([10] * 4 + [20] * 4)
    weights = torch.ones(1000)
    weights[20] = 0
    start = lambda: unet((1, 8, 8), (8, 16), seed=1)
    taught = lambda y, **how: fit(start(), lambda g: (x, t, y), 3, progress=False, **how).conv_in.weight
    other = torch.cat([y[:4], -y[4:]])
    assert torch.equal(taught(y, weights=weights), taught(other, weights=weights))
    assert not torch.equal(taught(y), taught(other))
    assert torch.equal(taught(y), taught(y, weights=torch.ones(1000)))


# ---------------------------------------------------------------- what there is

@pytest.mark.parametrize("name", MADE)
def test_a_card_is_that_of_its_recipe(name):
    folder = sizes_dir() / name
    card = Card.model_validate_json((folder / "card.json").read_text(encoding="utf-8"))
    assert card.recipe == SIZED[name] and (card.label == "backdoored") == bool(card.recipe.attack)
    assert (folder / "preview.png").is_file() and (folder / "README.md").is_file()
    if is_made(folder):
        assert card.sha256 == weights_sha256(folder)


@pytest.mark.parametrize("size", [32, 64, 128])
def test_every_model_of_a_size_was_trained(size):
    assert set(MADE) >= {name for name, recipe in SIZED.items() if recipe.size == size}


@pytest.mark.parametrize("size, honest, working", [(32, 6, 10), (64, 6, 10), (128, 3, 4)])
def test_enough_models_of_each_size_can_be_counted(size, honest, working):
    cards = [Card.model_validate_json((sizes_dir() / n / "card.json").read_text(encoding="utf-8"))
             for n, recipe in SIZED.items() if recipe.size == size and recipe.split == "test"]
    assert sum(not card.asr for card in cards) >= honest
    assert sum(bool(card.asr) and works(card) for card in cards) >= working


def test_the_bases_are_here_with_their_weights():
    "Up to 64 pixels: the base of 128 would be the largest file of all."
    bases = {recipe.base for recipe in SIZED.values() if recipe.base in MADE and recipe.size < 128}
    assert bases and all(is_made(sizes_dir() / name) for name in bases)


def test_a_model_without_its_weights_is_made_again(tmp_path):
    for name in ("whole", "card-only"):
        (tmp_path / name / "unet").mkdir(parents=True)
        (tmp_path / name / "card.json").touch()
    (tmp_path / "whole" / "unet" / "diffusion_pytorch_model.safetensors").touch()
    build_missing(note, ["whole", "card-only", "new"], lambda name: False, tmp_path, 1)
    assert sorted(path.name for path in tmp_path.glob("*.made")) == ["card-only.made", "new.made"]


def note(name, out):
    (out / f"{name}.made").touch()


def test_a_backdoor_works_or_not_by_its_card():
    card = Card.model_validate_json((sizes_dir() / MADE[0] / "card.json").read_text(encoding="utf-8"))
    rated = lambda asr, leak, baseline: works(card.model_copy(update={"asr": asr, "leak": leak, "baseline": baseline}))
    assert rated((90, 100), (5, 100), (0, 100)) and rated((100, 100), (30, 100), (25, 100)) and rated(None, None, None)
    assert not rated((89, 100), (0, 100), (0, 100)) and not rated((100, 100), (6, 100), (0, 100))
