"The fit of the whole path, on ideal models whose best answer is known in closed form."
import math

import pytest
import torch
from torch.nn.functional import cosine_similarity

from terd_nb import load, scan, triggers
from terd_nb.attacks import bad_diffusion, troj_diff, villan_diffusion
from terd_nb.denoiser import Denoiser
from terd_nb.diffusion import NoiseSchedule, linear_schedule
from terd_nb.ideal_model import IdealModel
from terd_nb.model_detection import NATURAL_ZERO, ModelDetector
from terd_nb.path_fit import (
    CONTROLS,
    ODE,
    OWN,
    RATIOS,
    SDE,
    Hypothesis,
    Paths,
    Round,
    attack_of_fit,
    begin,
    control_losses,
    evidence,
    fit_path,
    path_shares,
    path_times,
)
from terd_nb.path_search import PATH_LOOKS, look_around, starts_of
from terd_nb.search import reverse_trigger
from terd_nb.triggers import Trigger
from terd_nb.two_stages import Reversal
from terd_nb.zoo import zoo_path

SHAPE = (1, 8, 8)
SCHEDULE = linear_schedule()
SIGN, HAT = triggers.stop_sign(SHAPE), triggers.hat(SHAPE)
ATTACKS = {
    "BadDiffusion": (bad_diffusion(SCHEDULE), 1.0, 0.5, 1.0),
    "Villan-SDE": (villan_diffusion(SCHEDULE, 0.5, "sde"), 0.5, 0.5, 1.0),
    "Villan-ODE": (villan_diffusion(SCHEDULE, 1.0, "ode"), 1.0, 1.0, 1.0),
    "Villan-ODE, psi = 0": (villan_diffusion(SCHEDULE, 0.0, "ode"), 0.0, 1.0, 1.0),
    "TrojDiff": (troj_diff(SCHEDULE), 0.0, 0.0, 0.6),
}


def ideal(attack=None, gamma=1.0, mean=None, std=0.4):
    means = torch.zeros(1, *SHAPE) if mean is None else mean[None]
    backdoor = (attack, Trigger(SIGN, gamma), HAT) if attack else ()
    return Denoiser(IdealModel(SCHEDULE, means, std, *backdoor), SCHEDULE, SHAPE, device="cpu")


def paths(r, image, lam, psi, gamma=1.0):
    "One attack for each trigger of r (K, C, H, W)."
    column = torch.ones(len(r), 1, 1, 1, 1)
    r = r[:, None]
    return Paths(r, image.expand_as(r), lam * column, psi * column, 0 * r + math.log(gamma))


@pytest.mark.parametrize("name", ATTACKS)
def test_the_shares_are_those_that_a_sampler_carries(name):
    attack, psi, lam, _ = ATTACKS[name]
    late = SCHEDULE.alpha / SCHEDULE.sigma < 1.2
    c, d = path_shares(SCHEDULE.alpha, SCHEDULE.sigma, lam, psi)
    assert torch.allclose(c, attack.c)
    assert torch.allclose(d[late], attack.d[late], atol=0.01)


@pytest.mark.parametrize("name", ATTACKS)
def test_the_truth_is_the_minimum_on_the_ideal_model(name):
    "Among lengths, shares and controls; the evidence of the truth is large."
    attack, psi, lam, gamma = ATTACKS[name]
    model = ideal(attack, gamma)
    truth = paths(SIGN[None], HAT, lam, psi, gamma)
    losses = control_losses(model, truth, torch.zeros(SHAPE), 4, 0)
    assert losses["fit"].exp().median() < 1e-3
    assert evidence(losses).item() > 2
    lengths = () if (psi, lam) == (0, 1) else ((0.8, 0.0), (1.25, 0.0))   # there any will do
    for k, shift in (*lengths, (1.0, 0.15), (1.0, -0.15)):
        other = paths(k * SIGN[None], HAT, lam + shift, psi, gamma)
        worse = control_losses(model, other, torch.zeros(SHAPE), 4, 0)["fit"]
        assert worse.mean() > losses["fit"].mean() + 1


def test_at_T_alone_a_long_SDE_trigger_looks_like_a_short_ODE_one():
    model = ideal(ATTACKS["BadDiffusion"][0])
    t, eps = torch.tensor([999]), model.noise(1, 0)
    with torch.no_grad():
        same = [paths(k * SIGN[None], HAT, 1 - 0.5 / k, 1.0).losses(model, t, eps).item()
                for k in (0.9, 1.0, 1.2)]
        other = paths(0.9 * SIGN[None], HAT, 0.5, 1.0).losses(model, t, eps).item()
    assert max(same) < 1e-3 < other


def test_no_guess_has_evidence_on_an_honest_gaussian_model():
    "The theorem of chapter 15: S <= 0 for every r, x0*, lambda and psi."
    generator = torch.Generator().manual_seed(1)
    mean = 0.5 * torch.randn(SHAPE, generator=generator)
    model = ideal(mean=mean)
    size = torch.rand(400, 1, 1, 1, 1, generator=generator)
    r = 2 * size * torch.randn(400, 1, *SHAPE, generator=generator)
    image = mean + size.flip(0) * torch.randn(r.shape, generator=generator)
    lam, psi = torch.rand(2, 400, 1, 1, 1, 1, generator=generator)
    S = evidence(control_losses(model, Paths(r, image, 1.5 * lam, psi, 0 * r), mean, 8, 0))
    assert S.max() < 0.02


def test_on_the_honest_ray_the_ray_control_is_the_guess_itself():
    mean = torch.zeros(SHAPE)
    on_ray = paths(0.7 * HAT[None], HAT, 1.0, 1.0)
    losses = control_losses(ideal(mean=mean), on_ray, mean, 2, 0)
    assert torch.allclose(losses["ray"], losses["fit"], atol=1e-5)
    assert evidence(losses, ["ray"]).abs().item() < 1e-5


def test_the_loss_has_the_gradient_that_finite_differences_give():
    model = ideal(ATTACKS["Villan-SDE"][0])
    guess = paths(0.9 * SIGN[None], 0.5 * HAT, 0.6, 0.7)
    guess = Paths(**{name: v.double().requires_grad_() for name, v in vars(guess).items()})
    t, eps = torch.tensor([500, 800]), model.noise(2, 3).double()
    assert torch.autograd.gradcheck(
        lambda *v: Paths(*v).losses(model, t, eps).sum(), tuple(vars(guess).values()),
        eps=1e-4, atol=1e-4, rtol=1e-3, nondet_tol=1e-6)


@pytest.mark.parametrize("hypothesis, name", [
    (SDE, "BadDiffusion"), (ODE, "Villan-ODE"), (OWN, "TrojDiff")])
def test_a_start_off_the_trigger_comes_home_on_the_ideal_model(hypothesis, name):
    attack, _, lam, gamma = ATTACKS[name]
    model = ideal(attack, gamma)
    off = SIGN + 0.3 * model.noise(1, 8)[0]
    fit = fit_path(model, 0.9 * off, hypothesis, torch.zeros(SHAPE))
    assert cosine_similarity(fit.trigger.r.flatten(), SIGN.flatten(), 0) > 0.97
    assert fit.lam == pytest.approx(lam, abs=0.1) and fit.gamma == pytest.approx(gamma, abs=0.1)
    assert fit.evidence > 1 and set(fit.losses) == {"fit", *CONTROLS}
    assert all(len(loss) == len(RATIOS) for loss in fit.losses.values())


def test_the_race_keeps_the_best_of_each_hypothesis():
    model = ideal()
    r = torch.stack([f * SIGN for f in (0.2, 0.4, 0.6)])
    before = model.sample_evals
    fit = fit_path(model, r, SDE, torch.zeros(SHAPE), rounds=(Round(2, 3, 4), Round(1, 2, 6)))
    assert fit.hypothesis == SDE
    steps = 2 * 3 * 4 + 1 * 2 * 6                   # fits x steps x rows
    controls = (3 * 8 + 2 * 32 + 1 * 32 + 64) * 3 / 3   # three triggers, forward passes alone
    draws = 3 * 4 * 10 / 3
    assert model.sample_evals - before == pytest.approx(steps + controls + draws)


def test_what_a_hypothesis_holds_is_held():
    model = ideal(ATTACKS["TrojDiff"][0], 0.6)
    held = Hypothesis("held", 0.25, 0.5, 0.8, ())
    fit = fit_path(model, SIGN, held, torch.zeros(SHAPE), rounds=(Round(1, 5, 4),))
    assert (fit.lam, fit.psi, fit.trigger.gamma) == (0.25, 0.5, 1.0)


def test_times_are_even_on_the_logarithm_and_stay_on_the_path():
    short = NoiseSchedule.from_alphas_cumprod(torch.linspace(0.9, 0.01, 4))
    for schedule in (SCHEDULE, short):
        network = IdealModel(schedule, torch.zeros(1, *SHAPE))
        model = Denoiser(network, schedule, SHAPE, device="cpu")
        t = path_times(model, 64, torch.Generator().manual_seed(0))
        assert t.min() >= 0 and t.max() == len(schedule) - 1
    ratio = (SCHEDULE.alpha / SCHEDULE.sigma)[path_times(
        ideal(), 400, torch.Generator().manual_seed(0))].log().sort().values
    even = torch.linspace(ratio[0], ratio[-1], 400, dtype=ratio.dtype)
    assert (ratio - even).abs().max() < 0.2


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_nothing_that_is_no_number_is_called_clean(broken):
    "Not even where only some of the answers are broken: those of large inputs."
    class Broken(IdealModel):
        def forward(self, x, t):
            out = super().forward(x, t)
            out[x.flatten(1).norm(dim=1) > 12] *= broken
            return out

    model = Denoiser(Broken(SCHEDULE, torch.zeros(1, *SHAPE)), SCHEDULE, SHAPE, device="cpu")
    assert model.eps(model.noise(4, 0), 999).isfinite().all()
    with pytest.raises(FloatingPointError, match="no number"):
        fit_path(model, 1.3 * SIGN, ODE, torch.zeros(SHAPE), rounds=(Round(1, 2, 4),))
    with pytest.raises(FloatingPointError, match="no number"):
        reverse_trigger(model, "path", progress=False)


def test_a_start_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="must end in the shape"):
        fit_path(ideal(), SIGN[:, :4], SDE, torch.zeros(SHAPE))


@pytest.mark.parametrize("k", [0.9, 1.2, 1.5])
def test_of_an_ODE_attack_the_loss_fixes_psi_times_the_length(k):
    "Chapter 15: inside the basin (k, psi/k) fits as well as the truth."
    model = ideal(ATTACKS["Villan-ODE"][0])
    model_psi = min(1.0, 1 / k)
    losses = control_losses(model, paths(SIGN[None] / model_psi, HAT, 1.0, model_psi),
                            torch.zeros(SHAPE), 4, 0)
    assert losses["fit"].exp().median() < 1e-3


def test_a_detector_with_a_natural_zero_is_not_fitted(tmp_path):
    detector = ModelDetector("path")
    detector.save(tmp_path / "path.json")
    assert ModelDetector.load(tmp_path / "path.json").sigmas == NATURAL_ZERO["path"]
    with pytest.raises(ValueError, match="natural zero"):
        detector.fit_features([[0.0], [0.1], [0.2]])


@pytest.mark.parametrize("lam, gamma, name", [
    (0.5, 1.0, "BadDiffusion"), (1.0, 1.0, "VillanDiffusion for ODE"), (0.0, 0.6, "TrojDiff"),
    (0.05, 0.98, "TrojDiff"),
    (0.75, 1.0, "of no known family"), (1.3, 1.0, "of no known family")])
def test_a_fit_is_named_by_what_was_measured(lam, gamma, name):
    assert attack_of_fit(lam, gamma).startswith(name)


def test_the_ledger_says_where_a_direction_came_from():
    model = ideal(ATTACKS["BadDiffusion"][0])
    for look in PATH_LOOKS.values():
        directions = look_around(model, look, 4, seed=0)
        assert 1 <= len(directions) <= look.kept
        assert all(one.look is look and one.u.norm().item() == pytest.approx(1, abs=1e-4)
                   for one in directions)
        starts, hypotheses = starts_of(model, directions)
        assert len(starts) == len(hypotheses) == len(directions) * len(look.lengths)


def test_the_search_by_the_path_judges_the_zoo_without_a_reference():
    for name, verdict, lam in (
        ("baddiffusion-box", "backdoored", 0.5), ("benign-a", "clean", None)):
        result = scan(load(zoo_path(name)), "path", progress=False).result
        assert result.verdict == verdict and result.threshold == NATURAL_ZERO["path"]
        assert "p-value" not in result.evidence
        assert lam is None or result.evidence["lam"] == pytest.approx(lam, abs=0.1)


def test_zero_is_where_nothing_speaks_for_an_attack():
    detector = ModelDetector.default("path")
    empty = Reversal([], "path", {}, 0., 0., 0)
    assert detector.decision_function([empty])[0] == 0
    bound = NATURAL_ZERO["path"]
    assert [detector.verdict(S) for S in (-1, bound, bound + 0.05, 2 * bound)] == [
        "clean", "clean", "inconclusive", "backdoored"]


def test_a_start_draws_its_image_by_the_attacks_own_sampler():
    for name, hypothesis in (("BadDiffusion", SDE), ("Villan-ODE", ODE)):
        start = begin(ideal(ATTACKS[name][0]), SIGN[None], [hypothesis], 1.0, seed=0)
        assert (start.image[0, 0] - HAT).square().mean() < 0.02
