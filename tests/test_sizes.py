"The models of 32, 64 and 128 pixels: how their networks begin, and how their loss is weighed."
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from terd_nb.lab import making
from terd_nb.lab.making import train
from terd_nb.lab.model_sets import is_made, read_card, works
from terd_nb.lab.sets import SETS
from terd_nb.training import fit, unet

SIZES = SETS["sizes"]


def cards_of(size, split="test"):
    "The cards of the models of a size; every one of them must have been trained."
    names = [recipe.name for recipe in SIZES.recipes.values()
             if recipe.size == size and recipe.split == split]
    return [read_card(SIZES.folder / name) for name in names]


# ---------------------------------------------------------------- it begins with the identity

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
            means = answer.mean((2, 3)) - size * noise.mean((2, 3))
            assert (along - 1).abs().max() < 0.05            # neither the length
            assert means.abs().max() < 0.02                  # nor the mean is lost
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

    def no_pictures(recipe):
        return torch.zeros(4, *recipe.shape), torch.zeros(4)

    monkeypatch.setattr(making, "fit", look)
    monkeypatch.setattr(making, "training_set", no_pictures)
    train(SIZES.recipes["fashion32-a"], [], progress=False)
    snr = compute_snr(DDPMScheduler(1000), torch.arange(1000))
    expected = torch.minimum(snr, torch.full_like(snr, 5.)) / snr
    torch.testing.assert_close(seen["weights"].float(), expected, rtol=1e-4, atol=0)
    assert seen["precision"] == "bfloat16" and not seen["relative"]


def test_a_time_of_weight_0_teaches_nothing():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 8, 1, 8, 8, generator=generator)
    t = torch.tensor([10] * 4 + [20] * 4)
    weights = torch.ones(1000)
    weights[20] = 0

    def taught(y, **how):
        network = unet((1, 8, 8), (8, 16), seed=1)
        return fit(network, lambda generator: (x, t, y), 3, progress=False, **how).conv_in.weight

    other = torch.cat([y[:4], -y[4:]])
    assert torch.equal(taught(y, weights=weights), taught(other, weights=weights))
    assert not torch.equal(taught(y), taught(other))
    assert torch.equal(taught(y), taught(y, weights=torch.ones(1000)))


# ---------------------------------------------------------------- what there is

@pytest.mark.parametrize("size, honest, working", [(32, 6, 10), (64, 6, 10), (128, 3, 4)])
def test_enough_models_of_each_size_can_be_counted(size, honest, working):
    cards = cards_of(size)
    assert sum(not card.backdoors for card in cards) >= honest
    assert sum(bool(card.backdoors) and works(card) for card in cards) >= working


def test_only_small_models_may_be_tuned_on():
    assert {r.size for r in SIZES.recipes.values() if r.split != "test"} == {32}


def test_the_bases_are_here_with_their_weights():
    "Up to 64 pixels: the base of 128 would be the largest file of all."
    bases = {recipe.base for recipe in SIZES.recipes.values() if recipe.base and recipe.size < 128}
    assert bases and all(is_made(SIZES.folder / name) for name in bases)


@pytest.mark.parametrize("name", SIZES.recipes)
def test_pictures_lie_beside_every_card(name):
    folder = SIZES.folder / name
    assert (folder / "preview.png").is_file() and (folder / "README.md").is_file()
