"Part 0's model of one number, against torch.distributions, scipy, diffusers and plain counting."

import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from scipy.integrate import quad
from scipy.stats import norm
from torch.distributions import Categorical, MixtureSameFamily, Normal

from terd_nb.detector_inside import best_rate, mean_w, responsibility, rev_loss
from terd_nb.toy import (
    Toy,
    branches,
    eps_star,
    hit_rates,
    log_density,
    toy_step,
    walk,
)

PLACES = torch.linspace(-4, 9, 53, dtype=torch.float64)
TOYS = [Toy(), Toy(lam=1.0), Toy(gamma=0.6, lam=0.0), Toy(r=3.0, p=0.05), Toy(p=0.0)]
TIMES = [0, 10, 80, 170, 249]


@pytest.mark.parametrize("t", TIMES)
@pytest.mark.parametrize("toy", TOYS)
def test_density_answer_and_w_agree_with_distributions(toy, t):
    """Tweedie's formula is for a noise of one scale and no shift; with the shift, the answer is
    w*d*r more."""
    a, b, c, d = (values[t] for values in toy.path)
    means = torch.stack([-a, a, 3 * a + c * toy.r])
    stds = torch.stack([b, b, toy.gamma * b])
    shares = torch.tensor([(1 - toy.p) / 2, (1 - toy.p) / 2, toy.p], dtype=torch.float64)
    some = shares > 0  # distributions take no branch without a share
    mixture = MixtureSameFamily(Categorical(shares[some]), Normal(means[some], stds[some]))
    x = PLACES.clone().requires_grad_()
    (score,) = torch.autograd.grad(mixture.log_prob(x).sum(), x)
    assert torch.allclose(log_density(toy, PLACES, t), mixture.log_prob(PLACES))
    joint = Normal(means, stds).log_prob(PLACES[:, None]) + shares.log()
    w = (joint[:, 2] - mixture.log_prob(PLACES)).exp()
    assert torch.allclose(responsibility(toy, PLACES, t), w, atol=1e-9)
    if toy.gamma == 1:
        answer = -b * score + w * d * toy.r
        assert torch.allclose(eps_star(toy, PLACES, t), answer, atol=1e-8)


def test_answer_is_the_mean_of_the_target_over_rows():
    "Counted: rows drawn as the attacker draws them, their targets averaged in bins of x."
    toy, t, n = Toy(r=3.0, gamma=0.6, lam=0.5), 150, 2_000_000
    generator = torch.Generator().manual_seed(0)
    kind = torch.multinomial(
        torch.tensor([0.35, 0.35, 0.3]), n, replacement=True, generator=generator
    )
    eps = torch.randn(n, generator=generator, dtype=torch.float64)
    a, b, c, d = (values[t].item() for values in toy.path)
    bad = (kind == 2).double()
    x0 = torch.tensor([-1.0, 1.0, 3.0], dtype=torch.float64)[kind]
    x = a * x0 + b * (1 - bad + bad * toy.gamma) * eps + c * toy.r * bad
    target = eps + d * toy.r * bad
    for centre in (-1.0, 0.5, 1.5, 2.0, 3.0):
        inside = (x - centre).abs() < 0.01
        found, error = target[inside].mean(), target[inside].std() / inside.sum().sqrt()
        at = eps_star(toy, torch.tensor(centre, dtype=torch.float64), t)
        assert abs(found - at) < 5 * error + 1e-3, centre


def test_score_by_finite_differences():
    toy, t, h = Toy(lam=0.0), 90, 1e-5
    slope = (log_density(toy, PLACES + h, t) - log_density(toy, PLACES - h, t)) / (2 * h)
    assert torch.allclose(eps_star(toy, PLACES, t), -toy.path[1][t] * slope, atol=1e-6)


def test_the_last_time_is_minus_one():
    assert all(map(torch.equal, branches(Toy(), -1), branches(Toy(), 249)))


@pytest.mark.parametrize("kind, eta", [(DDIMScheduler, 0.0), (DDPMScheduler, 1.0)])
def test_a_step_is_that_of_diffusers(kind, eta):
    toy = Toy(lam=1.0)
    scheduler = kind(250, beta_start=4e-4, beta_end=0.08, clip_sample=False)
    scheduler.set_timesteps(250)
    for t in range(0, 250, 13):
        generator = torch.Generator().manual_seed(t)
        guess = eps_star(toy, PLACES, t)[:, None]
        theirs = scheduler.step(guess, t, PLACES[:, None], generator=generator).prev_sample[:, 0]
        noise = torch.randn(PLACES.shape, generator=generator.manual_seed(t), dtype=torch.float64)
        ours = toy_step(toy, PLACES, t, eta, noise if t else 0.0)
        assert torch.allclose(ours, theirs, atol=2e-4), t


def test_ddpm_stays_on_the_poisoned_path():
    "With everything poisoned the walkers have the mean a*target + c*r, and end at the target."
    toy = Toy(p=1.0)
    z = torch.randn(10_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    states = walk(toy, z + toy.r, eta=1.0, seed=1)
    a, b, c, _ = toy.path
    middle, spread = (3 * a + c * toy.r).flip(0), b.flip(0)
    assert ((states[1:-1].mean(1) - middle[1:]).abs() < 0.05).all()
    assert ((states[1:-1].std(1) - spread[1:]).abs() < 0.04).all()
    assert torch.allclose(states[-1], torch.full_like(z, 3.0), atol=1e-6)


@pytest.mark.parametrize("toy", TOYS)
@pytest.mark.parametrize("s", [0.0, 2.5, 6.0])
def test_reversed_loss_and_mean_w_by_quadrature(toy, s):
    def mean(f):
        values = quad(lambda e: f(e) * norm.pdf(e), -9, 9, limit=400, points=[0.0, 3.0 - s])
        return values[0]

    def answer(x):
        return eps_star(toy, torch.tensor(x, dtype=torch.float64), -1).item()

    first = mean(lambda e: e - answer(toy.gamma * e + s))
    second = mean(lambda e: (e - answer(toy.gamma * e + s)) ** 2)
    place = torch.tensor([s], dtype=torch.float64)
    found = rev_loss(lambda x: eps_star(toy, x, -1), place, toy.gamma).item()
    assert abs(found - (second - first**2)) < 1e-6
    w = mean(lambda e: responsibility(toy, torch.tensor(toy.gamma * e + s).double()).item())
    assert abs(mean_w(toy, place, toy.gamma).item() - w) < 1e-6


def test_reversed_loss_has_a_ridge_and_is_flat_beyond():
    "Near r/2, and to the height that (1-d)^2 r^2 Var(w) allows."
    toy = Toy()
    s = torch.linspace(-3, 12, 301, dtype=torch.float64)
    loss = rev_loss(lambda x: eps_star(toy, x, -1), s)
    edge = toy.r / 2 + math.log(0.7 / 0.3) / toy.r
    assert abs(s[loss.argmax()] - edge) < 0.1
    assert loss.max() < ((1 - toy.path[3][-1]) * toy.r) ** 2 / 4
    assert max(loss[(s - place).abs().argmin()] for place in (-2, 0, 6, 9)) < 0.02 * loss.max()
    assert (loss[s > 3.5].diff() < 0).all()  # downhill through r: no valley


@pytest.mark.parametrize("r", [0.5, 2.0, 6.0, -4.0])
def test_best_rate_of_one_scale_is_phi(r):
    assert abs(best_rate(Toy(r=r)) - norm.cdf(abs(r) / 2)) < 1e-6


@pytest.mark.parametrize("gamma", [0.3, 0.6, 1.4])
def test_best_rate_of_another_scale(gamma):
    "Half of the area under the higher bell, which scipy integrates."
    toy = Toy(r=2.0, gamma=gamma)
    area, _ = quad(
        lambda x: max(norm.pdf(x), norm.pdf(x, toy.r, gamma)), -12, 16, limit=500, points=[0, 1, 2]
    )
    assert abs(best_rate(toy) - area / 2) < 1e-6


def test_rates_that_the_chapter_speaks_of():
    "BadDiffusion, 250 steps of DDPM: 0.88 and 0.05; Villan-ODE with DDIM: 0.99 and 0."
    asr, leak = hit_rates(Toy(lam=0.5), eta=1.0, n=8_000)
    assert abs(asr - 0.885) < 0.015 and abs(leak - 0.048) < 0.01
    asr, leak = hit_rates(Toy(lam=1.0), eta=0.0, n=8_000)
    assert abs(asr - 0.99) < 0.006 and leak < 1e-3
    honest = hit_rates(Toy(p=0.0), eta=1.0, n=1_000)
    assert honest == (0.0, 0.0)  # it has no third number
