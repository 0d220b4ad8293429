"Searches and detectors on the ideal backdoored model, whose trigger is known (chapter 8)."
import math

import pytest
import torch
from torch.nn.functional import cosine_similarity

from terd_nb import triggers
from terd_nb.attacks import Attack, bad_diffusion, troj_diff, villan_diffusion
from terd_nb.denoiser import Denoiser
from terd_nb.diffusion import linear_schedule
from terd_nb.directions import (
    column,
    follow_agreement,
    follow_jacobian,
    follow_shift,
    gain_curve,
    length,
    quiet_strength,
    random_starts,
    read_ball,
    read_shift,
    time_of,
    true_gamma,
)
from terd_nb.ideal_model import IdealModel
from terd_nb.input_detection import InputDetector, ceiling
from terd_nb.search import USUAL_QUIET, faint_candidate, quiet_candidate
from terd_nb.triggers import Trigger
from terd_nb.two_stages import published

SHAPE = (1, 16, 16)
SCHEDULE = linear_schedule()
SMALL = triggers.box(SHAPE, side=7, value=1.0, background=0.0)
DARK = triggers.box(SHAPE, background=-0.6)


def ideal(attack, r, gamma=1.0, p=0.1):
    data, target = torch.zeros(1, *SHAPE), triggers.hat(SHAPE)
    model = IdealModel(SCHEDULE, data, 0.4, attack, Trigger(r, gamma), target, p)
    return Denoiser(model, SCHEDULE, SHAPE, device="cpu")


def shifted(d):
    "An attack with c = 1 - alpha whose answer is shifted by d at every time."
    c = 1 - SCHEDULE.alpha
    return Attack(f"d={d}", SCHEDULE.alpha, SCHEDULE.sigma, c, torch.full_like(c, d), "ddpm")


def cosines(found, r):
    "Of each of several directions (K, C, H, W) to r."
    return cosine_similarity(found.flatten(1), r.flatten()[None])


def relative_error(found, r):
    "Of the best of several directions of one length."
    return ((found - r).flatten(1).norm(dim=1) / r.norm()).min().item()


@pytest.mark.parametrize("p", [0.02, 0.1, 0.5])
@pytest.mark.parametrize("d", [0.0, 0.5, 0.9])
def test_fixed_point_1_is_the_trigger(d, p):
    denoiser = ideal(shifted(d), SMALL, p=p)
    starts = random_starts(denoiser, 6, 0)
    found = follow_shift(denoiser, starts, [SMALL.norm().item()], [1.0], noises=64)
    # Not quite r: alpha(T) is not 0, and F = alpha*x0 + (c - sigma*d)*r holds a trace of x0.
    alpha, sigma = (v[-1].item() for v in (SCHEDULE.alpha, SCHEDULE.sigma))
    exact = alpha * triggers.hat(SHAPE) + (1 - alpha - sigma * d) * SMALL
    assert relative_error(found["s"], exact * SMALL.norm() / exact.norm()) < 0.01
    trace = alpha * triggers.hat(SHAPE).norm().item() / ((1 - d) * SMALL.norm().item())
    assert relative_error(found["s"], SMALL) < 0.01 + trace


@pytest.mark.parametrize("p", [0.02, 0.5])
@pytest.mark.parametrize("d", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("gamma", [0.2, 0.35, 0.5, 0.7])
def test_fixed_point_1_below_gamma_1(gamma, d, p):
    "A noise scale below the true one is in the basin, and from there one step is enough."
    r = (1 - gamma) * 0.6 * triggers.glasses(SHAPE)
    denoiser = ideal(troj_diff(SCHEDULE, d), r, gamma, p)
    starts = random_starts(denoiser, 6, 0)
    found = follow_shift(denoiser, starts, [0.1 * 16, 0.3 * 16], [0.15], noises=64)
    # At T, F holds a trace alpha/gamma of the target image beside (1/gamma - d)*r.
    of_target = SCHEDULE.alpha[-1].item() * triggers.hat(SHAPE).norm().item()
    trace = of_target / ((1 - gamma * d) * r.norm().item())
    angles = cosines(found["s"], r).clamp(max=1).acos()
    assert angles.min() < 0.01 + trace
    best = int(angles.argmin())
    assert true_gamma(found["gamma"], found["slope"])[best].item() == pytest.approx(gamma, rel=0.02)


def test_a_basin_that_no_start_enters_is_not_found():
    "With gamma = 0.1 it is a ball of radius sqrt(2*gamma^2*D*log(1/gamma)) = 3.4, 8.2 away."
    r = 0.9 * 0.6 * triggers.glasses(SHAPE)
    denoiser = ideal(troj_diff(SCHEDULE), r, 0.1)
    lengths = [f * 16 for f in (0.1, 0.2, 0.3, 0.45, 0.65, 0.9)]
    found = follow_shift(denoiser, random_starts(denoiser, 6, 0), lengths, [0.1])
    assert cosines(found["s"], r).max() < 0.9
    near = r[None] + 0.1 * torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(0))
    inside = follow_shift(denoiser, near, [1.0], [0.1], iterations=0)
    assert inside["slope"].item() == pytest.approx(1.0, rel=0.05)  # tried/gamma


@pytest.mark.parametrize("d", [0.0, 0.25, 0.5, 0.75])
@pytest.mark.parametrize("r", [SMALL, DARK], ids=["small", "dark"])
def test_the_gain_curve_gives_length_and_d(r, d):
    trigger, read, _ = read_shift(ideal(shifted(d), r), r, 1.0, 1.0, noises=64)
    # Where d is not an ancestral sampler's, |r| is read off the edge between two lengths.
    assert read["norm"] == pytest.approx(r.norm().item(), rel=0.12)
    assert (1 - read["d"]) * read["norm"] == pytest.approx((1 - d) * r.norm().item(), rel=0.05)
    assert cosine_similarity(trigger.r.flatten(), r.flatten(), dim=0) > 0.999


def test_read_shift_reads_gamma_and_length_of_trojdiff():
    r = 0.4 * triggers.glasses(SHAPE)
    denoiser = ideal(troj_diff(SCHEDULE), r, 0.6)
    found = follow_shift(denoiser, random_starts(denoiser, 6, 0), [0.3 * 16], [0.3], noises=32)
    k = int(found["slope"].argmax())
    trigger, *_ = read_shift(denoiser, found["s"][k], 0.3, found["slope"][k].item(), noises=64)
    assert trigger.gamma == pytest.approx(0.6, rel=0.02)
    assert (trigger.r - r).norm() / r.norm() < 0.05


@pytest.mark.parametrize("d", [0.0, 0.5, 0.9, 1.0, 1.2])
def test_fixed_point_3_needs_no_d(d):
    c = SCHEDULE.sigma
    attack = Attack("", SCHEDULE.alpha, SCHEDULE.sigma, c, torch.full_like(c, d), "")
    denoiser = ideal(attack, DARK, p=0.3)
    starts = random_starts(denoiser, 6, 0)
    half = DARK.norm().item() / 2
    t = time_of(denoiser, 0.17)
    directions = follow_jacobian(denoiser, starts, [half], t, noises=16, iterations=6)
    assert (directions * DARK / DARK.norm()).sum((1, 2, 3)).max() > 0.98


@pytest.mark.parametrize("psi", [1.0, 0.5])
def test_fixed_points_3_and_2_find_an_ode_attack(psi):
    denoiser = ideal(villan_diffusion(SCHEDULE, psi), DARK, p=0.3)
    starts = random_starts(denoiser, 4, 0)
    norm = DARK.norm().item()
    t3, t2 = (time_of(denoiser, ratio) for ratio in (0.17, 0.3))
    directions = follow_jacobian(denoiser, starts, [norm / 2], t3, noises=16, iterations=6)
    near = norm * directions
    found = follow_agreement(denoiser, near, t2, noises=32, iterations=4, steps=12)
    k = int(found["spread"].argmin())
    assert relative_error(found["s"][k : k + 1], DARK) < 0.05
    # A short trigger: at this t both paths still overlap.
    assert found["pull"][k] == pytest.approx(psi, rel=0.15)


def test_the_shift_is_measured_in_units_of_the_noise():
    "Along r the shift at t is (alpha*x0 + (c - sigma*d)*r)/sigma beyond the honest one."
    attack = villan_diffusion(SCHEDULE)
    denoiser = ideal(attack, DARK, p=0.3)
    t = time_of(denoiser, 0.1)
    alpha, sigma, c, d = (v[t].item() for v in (SCHEDULE.alpha, SCHEDULE.sigma, attack.c, attack.d))
    expected = (alpha * triggers.hat(SHAPE) + (c - sigma * d) * DARK) / sigma
    curve = gain_curve(denoiser, DARK / DARK.norm(), t=t, noises=64)
    k = int((curve["length"] - DARK.norm()).abs().argmin())
    assert curve["gain"][k] * curve["length"][k] == pytest.approx(expected.norm().item(), rel=0.05)


def test_fixed_point_1_sees_nothing_when_d_is_1():
    denoiser = ideal(villan_diffusion(SCHEDULE), SMALL)
    found = follow_shift(denoiser, random_starts(denoiser, 4, 0), [SMALL.norm().item()], [1.0])
    assert (length(found["F"]) / SMALL.norm()).max() < 0.02


def silent(*report):
    pass


FLAT = "in the basin of an ideal backdoor the reversed loss is flat and fixes no point"


@pytest.mark.xfail(strict=True, reason=FLAT)
def test_the_published_search_returns_the_trigger():
    denoiser = ideal(bad_diffusion(SCHEDULE), DARK)
    (found,), _ = published(denoiser, 0, silent, iterations=(300, 0))
    assert (found.trigger.r - DARK).norm() / DARK.norm() < 0.01


def test_the_published_search_reaches_the_basin_of_a_dark_trigger():
    denoiser = ideal(bad_diffusion(SCHEDULE), DARK)
    (found,), curves = published(denoiser, 0, silent, iterations=(300, 0))
    assert curves["reversed loss"][-1] < 0.01 * max(curves["reversed loss"])
    x = found.trigger.stamp(denoiser.noise(256, 3))
    assert denoiser.network.posterior(x, torch.full((256,), 999))[:, -1].mean() > 0.99


@pytest.mark.parametrize("strength", [0.1, 0.2, 0.4])
def test_the_input_detector_meets_its_ceiling_on_what_was_found(strength):
    r = strength * triggers.box(SHAPE)
    denoiser = ideal(bad_diffusion(SCHEDULE), r, p=0.3)
    start = column([1.0], r) * r
    norm = r.norm().item()
    found = follow_shift(denoiser, start, [norm], [1.0], noises=512, iterations=2)
    detector = InputDetector(Trigger(found["s"][0]))
    z = denoiser.noise(20_000, 5)
    found_out = detector.predict(Trigger(r).stamp(z)).float().mean()
    let_through = (~detector.predict(z)).float().mean()
    assert min(found_out, let_through) == pytest.approx(ceiling(norm), abs=0.01)


# ------------------------------------------------ the ball, quiet noise, faint jumps

class SaysPicture(torch.nn.Module):
    "The ideal network that answers with the picture: the target if x seems triggered, else 0."

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, t):
        return self.model.posterior(x, t)[:, -1].reshape(-1, 1, 1, 1) * self.model.target.to(x)


def bounded(attack, r, gamma=1.0, p=0.3):
    network = SaysPicture(ideal(attack, r, gamma, p).network)
    return Denoiser(network, SCHEDULE, SHAPE, "sample", device="cpu")


LONG = [(share, gamma) for share in (0.3, 0.45) for gamma in (0.5, 0.6, 0.8, 0.9)]


@pytest.mark.parametrize("share, gamma", [(0.15, 0.5), (0.15, 0.6), *LONG])
def test_the_ball_gives_length_and_noise_scale(gamma, share):
    "For lengths, in units of that of noise, that can be told from clean noise at all."
    r = share * 16 * DARK / DARK.norm()
    model = bounded(troj_diff(SCHEDULE), r, gamma)
    norm, found, error = read_ball(model, r / r.norm(), time_of(model, 0.03), noises=16)
    assert abs(norm - r.norm()) < 1 and abs(found - gamma) < 0.06 and error < 0.005
    z = torch.randn(500, *SHAPE, generator=torch.Generator().manual_seed(1))
    detector = InputDetector(Trigger(norm * r / r.norm(), found))
    assert detector.predict(Trigger(r, gamma).stamp(z)).float().mean() > 0.99
    assert detector.predict(z).float().mean() < 0.01


@pytest.mark.parametrize("gamma", [0.5, 0.6, 0.8])
@pytest.mark.parametrize("factor", [0.8, 1.2])
def test_quiet_noise_opens_a_backdoor_whose_trigger_is_short(gamma, factor):
    "The bound is gamma * sqrt(-2 D log gamma), but for the prior odds."
    r = factor * gamma * (-2 * torch.tensor(gamma).log()).sqrt() * 16 * DARK / DARK.norm()
    model = bounded(troj_diff(SCHEDULE), r, gamma)
    assert (quiet_strength(model, time_of(model, 0.03)).max() > 1) == (factor < 1)


def test_what_quiet_noise_opens_is_read_from_quiet_noise():
    r = 0.4 * triggers.glasses(SHAPE)
    model = bounded(troj_diff(SCHEDULE), r, 0.6, p=0.02)
    (found, curves), = quiet_candidate(model, random_starts(model, 2, 0), 8, 4, 60)
    assert found.score > 1 and len(curves["quiet"]) == len(curves["noise scale"])
    assert found.evidence["strength"] == max(curves["quiet"]) > USUAL_QUIET


def test_neither_look_accuses_an_honest_model():
    constant = Denoiser(Constant(), SCHEDULE, SHAPE, "sample", device="cpu")
    for model in (ideal(None, SMALL), constant):
        assert quiet_candidate(model, random_starts(model, 2, 0), 4, 2, 60) == []
        for u in random_starts(model, 4, 1):
            assert faint_candidate(model, u, 60) == []
            assert all(map(math.isfinite, read_ball(model, u, 700)))


class Constant(torch.nn.Module):
    "A network that says one picture to anything: nothing varies, so nothing is divided by it."

    def forward(self, x, t):
        return torch.full_like(x, 0.25)


@pytest.mark.parametrize("psi", [1.0, 0.0])
def test_a_faint_jump_is_seen_early(psi):
    "Fixed point 4's place is where alpha/sigma is 0.17; the look is at 0.3."
    model = ideal(villan_diffusion(SCHEDULE, psi), DARK, p=0.3)
    found = faint_candidate(model, DARK / DARK.norm(), 60)
    # With psi = 0 an exact picture does not move against the shift.
    assert len(found) == (psi == 1.0)
    for c, _ in found:
        assert c.score > 1 and c.evidence["response"] < 0
