"The fit of the whole path, on ideal models whose best answer is known in closed form."
import math
from dataclasses import replace

import pytest
import torch
from ideal import (
    ATTACKS,
    DRAWN,
    HAT,
    MEAN,
    OTHERS,
    SCHEDULE,
    SHAPE,
    STD,
    R,
    cosine,
    ideal,
)

from terd_nb import path_fit
from terd_nb.attacks import bad_diffusion
from terd_nb.denoiser import Denoiser
from terd_nb.diffusion import NoiseSchedule
from terd_nb.ideal_model import IdealModel
from terd_nb.path_fit import (
    AT_MOST,
    CONTROLS,
    ODE,
    OWN,
    RATES,
    RATIOS,
    SDE,
    WIDEST,
    Descent,
    Drawn,
    Hypothesis,
    Paths,
    Round,
    attack_of_fit,
    begin,
    control_losses,
    draw_some,
    evidence,
    fit_path,
    path_shares,
    path_times,
    race,
    steering,
)
from terd_nb.search import reverse_trigger
from terd_nb.triggers import Trigger

OWN_ON_OTHERS = [("TrojDiff", kind) for kind in OTHERS]
EVERY = [*((name, "epsilon") for name in ATTACKS), *OWN_ON_OTHERS]


def guess(r, hypothesis, image=HAT):
    "One attack for each trigger of r (K, C, H, W)."
    h, column, r = hypothesis, torch.ones(len(r), 1, 1, 1, 1), r[:, None]
    return Paths(r, image.expand_as(r), h.lam * column, h.psi * column,
                 0 * r + math.log(h.gamma), float(h.own) * column)


# ---------------------------------------------------------------- the loss

@pytest.mark.parametrize("name", ATTACKS)
def test_the_shares_are_those_that_a_sampler_carries(name):
    make, truth = ATTACKS[name]
    attack, late = make(SCHEDULE), SCHEDULE.alpha / SCHEDULE.sigma < 1.2
    c, d = path_shares(SCHEDULE.alpha, SCHEDULE.sigma, truth.lam, truth.psi)
    assert torch.allclose(c, attack.c)
    assert torch.allclose(d[late], attack.d[late], atol=0.01)


@pytest.mark.parametrize("name, kind", EVERY)
def test_the_truth_explains_the_ideal_model_and_its_evidence_is_large(name, kind):
    "Whatever the network says, and the attacker's own sampler reads out of it."
    losses = control_losses(
        ideal(name, kind).standardised(), guess(R[None], ATTACKS[name][1]), DRAWN, 4, 0)
    assert losses["fit"].exp().median() < 1e-3
    assert evidence(losses).item() > 2


@pytest.mark.parametrize("name", ATTACKS)
def test_the_truth_is_the_minimum_among_lengths_and_shares(name):
    model, truth = ideal(name), ATTACKS[name][1]
    least = control_losses(model, guess(R[None], truth), DRAWN, 4, 0)["fit"].mean()
    lengths = () if truth.psi == 0 and truth.lam == 1 else (0.8, 1.25)   # there any will do
    others = [guess(k * R[None], truth) for k in lengths]
    others += [guess(R[None], replace(truth, lam=truth.lam + s)) for s in (0.15, -0.15)]
    for other in others:
        assert control_losses(model, other, DRAWN, 4, 0)["fit"].mean() > least + 1


def test_at_T_alone_a_long_SDE_trigger_looks_like_a_short_ODE_one():
    model = ideal("BadDiffusion")
    t, eps = torch.tensor([999]), model.noise(1, 0)
    with torch.no_grad():
        same = [guess(k * R[None], Hypothesis("", 1 - 0.5 / k)).losses(model, t, eps).item()
                for k in (0.9, 1.0, 1.2)]
        other = guess(0.9 * R[None], SDE).losses(model, t, eps).item()
    assert 10 * max(same) < other


@pytest.mark.parametrize("k", [0.9, 1.2, 1.5])
def test_of_an_ODE_attack_the_loss_fixes_psi_times_the_length(k):
    "Chapter 15: inside the basin (k, psi/k) fits as well as the truth."
    psi = min(1.0, 1 / k)
    losses = control_losses(
        ideal("Villan-ODE"), guess(R[None] / psi, replace(ODE, psi=psi)), DRAWN, 4, 0)
    assert losses["fit"].exp().median() < 1e-3


@pytest.mark.parametrize("kind, fits", [("sample", True), ("v_prediction", False)])
def test_a_network_that_says_the_picture_does_not_say_gamma(kind, fits):
    "Inside the ball it says the target whatever r and gamma are; a velocity holds the noise, too."
    wrong = guess(0.9 * R[None], replace(ATTACKS["TrojDiff"][1], gamma=0.5))
    losses = control_losses(ideal("TrojDiff", kind), wrong, DRAWN, 4, 0)
    assert (losses["fit"].exp().max() < 1e-3) == fits


@pytest.mark.parametrize("name, kind", [("Villan-SDE", "epsilon"), ("TrojDiff", "v_prediction")])
def test_the_loss_has_the_gradient_that_finite_differences_give(name, kind):
    model, truth = ideal(name, kind), ATTACKS[name][1]
    off = guess(0.9 * R[None], replace(truth, lam=truth.lam + 0.1, psi=0.7), 0.5 * HAT)
    own, t, eps = off.own.double(), torch.tensor([500, 800]), model.noise(2, 3).double()

    def loss(*unknowns):
        return Paths(*unknowns, own).losses(model, t, eps).sum()

    unknowns = [v.double().requires_grad_() for v in off.unknowns.values()]
    assert torch.autograd.gradcheck(
        loss, unknowns, eps=1e-4, atol=1e-4, rtol=1e-3, nondet_tol=1e-6)


@pytest.mark.parametrize("name, kind", [("BadDiffusion", "epsilon"), ("TrojDiff", "sample")])
def test_in_parts_everything_is_as_in_one(monkeypatch, name, kind):
    "One image at a time, or all at once: the start, its losses and the gradient of a step."
    def computed():
        start = begin(model, r, [hypothesis] * 3, 1.0, seed=0)
        losses = control_losses(model, start, DRAWN, 2, 1)
        descent = Descent(start, [hypothesis] * 3, 1.0)
        descent.go(model, [0, 2], [0.0], 5, torch.Generator().manual_seed(2))
        gradients = [v.grad for v in descent.paths.unknowns.values()]
        return [start.image.detach(), *losses.values(), *gradients]

    model, hypothesis = ideal(name, kind), OWN if name == "TrojDiff" else SDE
    r = torch.stack([f * R for f in (0.5, 0.8, 1.1)])
    whole = computed()
    for pixels in (1, 3 * 64):
        monkeypatch.setattr(path_fit, "PIXELS", pixels)
        assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-5)
                   for a, b in zip(whole, computed(), strict=True))
    assert len(whole) == 1 + 3 + len(RATES) and all(v[1].abs().max() == 0 for v in whole[4:])


# ---------------------------------------------------------------- what an honest model can fit

HONEST = [("epsilon", False), ("epsilon", True), *((kind, True) for kind in OTHERS)]


@pytest.mark.parametrize("kind, own", HONEST)
def test_no_guess_has_evidence_on_an_honest_gaussian_model(kind, own):
    "The theorem of chapter 15: S <= 0 for every r, x0*, lambda, psi, and gamma of all pixels."
    generator = torch.Generator().manual_seed(1)
    mean = 0.5 * torch.randn(SHAPE, generator=generator)
    size = torch.rand(400, 1, 1, 1, 1, generator=generator)
    r = 2 * size * torch.randn(400, 1, *SHAPE, generator=generator)
    image = mean + size.flip(0) * torch.randn(r.shape, generator=generator)
    lam, psi, gamma = torch.rand(3, 400, 1, 1, 1, 1, generator=generator)
    gamma = (0.05 + 0.95 * gamma).log() + 0 * r
    if own:
        lam, psi = 0 * lam, 0 * psi
    guesses = Paths(r, image, 1.5 * lam, psi, gamma, own + 0 * lam)
    losses = control_losses(
        ideal(kind=kind, mean=mean).standardised(), guesses, Drawn(mean, 1.0), 8, 0)
    assert evidence(losses).max() < 0.02
    assert evidence(losses, ["ray"]).max() < 0.02      # it needs no other control


def test_on_the_honest_ray_the_ray_control_is_the_guess_itself():
    losses = control_losses(ideal(), guess(0.7 * HAT[None], ODE), DRAWN, 2, 0)
    assert torch.allclose(losses["ray"], losses["fit"], atol=1e-5)
    assert evidence(losses, ["ray"]).abs().item() < 1e-5


def test_what_a_model_draws_has_the_mean_of_its_data():
    mean = 0.5 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    model = ideal(mean=mean)
    drawn = draw_some(model, 0)
    assert drawn.limit == 1.0
    assert (drawn.mean - mean).abs().mean() < STD / 96**0.5 + 0.03   # clamped, and in ten steps
    assert draw_some(model, 1).mean.ne(drawn.mean).any()


def test_of_latents_the_largest_that_is_drawn_is_the_limit():
    model = ideal(std=3.0)
    assert draw_some(model, 0).limit == 1.0
    model.decode = lambda x: x
    drawn = draw_some(model, 0)
    assert 3 < drawn.limit < 20 and 1 < drawn.mean.abs().max() + 1 < 3


class Tired(IdealModel):
    "Honest, but it takes no notice of a mean brightness beyond 1."

    def forward(self, x, t):
        bright = x.mean((1, 2, 3), keepdim=True)
        return super().forward(x - bright + bright.clamp(-1, 1), t)


def test_what_tires_has_a_threshold_and_yet_no_trigger():
    "It tires of a mirror image as soon; that excuses a little, and not a threshold of any size."
    model = Denoiser(Tired(SCHEDULE, MEAN[None], STD), SCHEDULE, SHAPE, device="cpu")
    near, far = (control_losses(model, guess(torch.full((1, *SHAPE), k), SDE, MEAN), DRAWN, 4, 0)
                 for k in (1.7, 2.0))
    assert list(near) == ["fit", *CONTROLS]
    assert AT_MOST > evidence(near, ["ray"]) > 0.25 and evidence(near) < 1e-5
    assert evidence(far).item() == pytest.approx(evidence(far, ["ray"]).item() - AT_MOST)
    assert evidence(far) > 0.5


@pytest.mark.parametrize("name, kind", EVERY)
def test_a_planted_trigger_is_known_better_than_its_mirror_images(name, kind):
    losses = control_losses(
        ideal(name, kind).standardised(), guess(R[None], ATTACKS[name][1]), DRAWN, 4, 0)
    assert evidence(losses, ["turned"]).item() > 2


def test_turned_is_the_mean_over_three_mirror_images():
    "Of trigger, picture and noise scale; by hand, one by one."
    model, one = ideal("TrojDiff"), guess(0.9 * R[None], ATTACKS["TrojDiff"][1])
    one = replace(one, log_gamma=one.log_gamma + 0.1 * HAT)
    turned = control_losses(model, one, DRAWN, 2, 0, ["turned"])["turned"]
    by_hand = [control_losses(model, replace(
        one, r=one.r.flip(dims), image=one.image.flip(dims), log_gamma=one.log_gamma.flip(dims)),
        DRAWN, 2, 0, ())["fit"] for dims in ([4], [3], [3, 4])]
    assert torch.allclose(turned, torch.stack(by_hand).mean(0), atol=1e-5)


def test_what_is_its_own_mirror_image_keeps_all_but_a_half_of_its_evidence():
    box, ring = torch.zeros(SHAPE), torch.ones(SHAPE)
    box[:, 1:7, 1:7], ring[:, 2:6, 2:6] = 1.0, -1.0
    network = IdealModel(
        SCHEDULE, MEAN[None], STD, bad_diffusion(SCHEDULE), Trigger(box), ring, 0.3)
    model = Denoiser(network, SCHEDULE, SHAPE, device="cpu")
    losses = control_losses(model, guess(box[None], SDE, ring), DRAWN, 2, 0)
    ray, turned, both = (evidence(losses, some).item() for some in (["ray"], ["turned"], CONTROLS))
    assert abs(turned) < 1e-5 and both == pytest.approx(ray - AT_MOST) and both > 1


@pytest.mark.parametrize("ray, turned, S", [
    (2.0, 3.0, 2.0), (2.0, 1.7, 1.7), (2.0, 0.1, 1.5), (0.4, 0.1, 0.1), (0.4, -3.0, -0.1),
    (-1.0, 5.0, -1.0)])
def test_the_evidence_by_hand(ray, turned, S):
    losses = {"fit": torch.zeros(1, 8), "ray": torch.full((1, 8), ray),
              "turned": torch.full((1, 8), turned)}
    assert evidence(losses).item() == pytest.approx(S)
    assert evidence(losses, ["turned"]).item() == pytest.approx(turned)


# ---------------------------------------------------------------- fits

COMING_HOME = [(SDE, "BadDiffusion", "epsilon"), (ODE, "Villan-ODE", "epsilon"),
               (OWN, "TrojDiff", "epsilon"), *((OWN, *one) for one in OWN_ON_OTHERS)]


@pytest.mark.parametrize("hypothesis, name, kind", COMING_HOME)
def test_a_start_off_the_trigger_comes_home_on_the_ideal_model(hypothesis, name, kind):
    model, truth = ideal(name, kind), ATTACKS[name][1]
    off = R + 0.3 * model.noise(1, 8)[0]
    fit = fit_path(model, 0.9 * off, hypothesis, DRAWN)
    assert cosine(fit.trigger.r, R) > cosine(off, R)
    assert cosine(fit.trigger.r, R) > 0.95 or kind != "epsilon"   # others hardly tell r near T
    assert fit.lam == pytest.approx(truth.lam, abs=0.1)
    assert fit.gamma == pytest.approx(truth.gamma, abs=0.15 if kind == "sample" else 0.05)
    assert fit.evidence > 1 and set(fit.losses) == {"fit", *CONTROLS}
    assert all(len(loss) == len(RATIOS) for loss in fit.losses.values())


@pytest.mark.parametrize("name, kind", EVERY)
def test_a_start_draws_its_image_by_the_attacks_own_sampler(name, kind):
    "Also where gamma is not known yet: the fit of OWN starts below, and draws with louder noise."
    hypothesis = OWN if name == "TrojDiff" else ATTACKS[name][1]
    start = begin(ideal(name, kind).standardised(), R[None], [hypothesis], 1.0, seed=0)
    assert (start.image[0, 0] - HAT).square().mean() < 0.02
    assert start.own.item() == hypothesis.own


def test_the_race_keeps_the_best_of_each_hypothesis():
    model = ideal()
    r = torch.stack([f * R for f in (0.2, 0.4, 0.6)])
    before = model.sample_evals
    fit = fit_path(model, r, SDE, DRAWN, rounds=(Round(2, 3, 4), Round(1, 2, 6)))
    assert fit.hypothesis == SDE
    steps = 2 * 3 * 4 + 1 * 2 * 6                   # fits x steps x rows
    controls = ((3 * 8 + 2 * 32 + 1 * 32) * 2 + 64 * 5) / 3   # forward passes alone
    draws = 3 * 4 * 10 / 3
    assert model.sample_evals - before == pytest.approx(steps + controls + draws)


def test_only_finished_fits_are_turned():
    model, cost = ideal(), []
    for controls in (["ray"], CONTROLS):
        paths = begin(model, R[None].repeat(3, 1, 1, 1), [SDE] * 3, 1.0, seed=0)
        before = model.sample_evals
        fit = race(model, paths, [SDE] * 3, torch.arange(3.0), DRAWN,
                   (Round(2, 1, 4), Round(1, 1, 4)), controls=controls)[0]
        assert set(fit.losses) == {"fit", *controls}
        assert fit.evidence == pytest.approx(fit.against(controls), abs=1e-5)
        cost.append(model.sample_evals - before)
    assert cost[1] - cost[0] == pytest.approx(3 * 64 / 3)    # 8 noises at 8 ratios, once


def test_what_steers_is_asked_of_every_fit():
    assert steering(CONTROLS) == ("ray",) == steering(["ray"])
    assert steering(["turned"]) == ("turned",)     # where there is no other


def test_what_a_hypothesis_holds_is_held():
    held = Hypothesis("held", 0.25, 0.5, 0.8, ())
    fit = fit_path(ideal("TrojDiff"), R, held, DRAWN, rounds=(Round(1, 5, 4),))
    assert (fit.lam, fit.psi, fit.trigger.gamma) == (0.25, 0.5, 1.0)


def test_a_fit_stays_between_pictures():
    "A trigger is the difference of two; a noise scale is no more than 1."
    for hypothesis in (SDE, OWN):
        fit = fit_path(ideal(), 20 * R, hypothesis, DRAWN, rounds=(Round(1, 5, 4),))
        assert fit.trigger.r.abs().max() <= WIDEST < 20 * R.abs().max()
        assert fit.image.abs().max() <= 1 and 0 < fit.gamma <= 1


def test_times_are_even_on_the_logarithm_and_stay_on_the_path():
    short = NoiseSchedule.from_alphas_cumprod(torch.linspace(0.9, 0.01, 4))
    for schedule in (SCHEDULE, short):
        t = path_times(ideal(path=schedule), 64, torch.Generator().manual_seed(0))
        assert t.min() >= 0 and t.max() == len(schedule) - 1
    ratio = (SCHEDULE.alpha / SCHEDULE.sigma)[path_times(
        ideal(), 400, torch.Generator().manual_seed(0))].log().sort().values
    even = torch.linspace(ratio[0], ratio[-1], 400, dtype=ratio.dtype)
    assert (ratio - even).abs().max() < 0.2


@pytest.mark.parametrize("lam, gamma, name", [
    (0.5, 1.0, "BadDiffusion"), (1.0, 1.0, "VillanDiffusion for ODE"), (0.0, 0.6, "TrojDiff"),
    (0.05, 0.98, "TrojDiff"),
    (0.75, 1.0, "of no known family"), (1.3, 1.0, "of no known family")])
def test_a_fit_is_named_by_what_was_measured(lam, gamma, name):
    assert attack_of_fit(lam, gamma).startswith(name)


# ---------------------------------------------------------------- refusals

class Broken(IdealModel):
    "Some of its answers are no numbers: those to large inputs."
    by = math.nan

    def forward(self, x, t):
        out = super().forward(x, t)
        out[x.flatten(1).norm(dim=1) > 12] *= self.by
        return out


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_nothing_that_is_no_number_is_called_clean(monkeypatch, broken):
    monkeypatch.setattr(Broken, "by", broken)
    model = Denoiser(Broken(SCHEDULE, MEAN[None]), SCHEDULE, SHAPE, device="cpu")
    assert model.eps(model.noise(4, 0), 999).isfinite().all()
    with pytest.raises(FloatingPointError, match="no number"):
        fit_path(model, 2 * R, ODE, DRAWN, rounds=(Round(1, 2, 4),))
    with pytest.raises(FloatingPointError, match="no number"):
        reverse_trigger(model, progress=False)


def test_a_start_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="must end in the shape"):
        fit_path(ideal(), R[:, :4], SDE, DRAWN)
