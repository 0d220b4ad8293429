"What cells do not test: whole runs against diffusers, published samplers, what a seed decides."
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMScheduler

from terd_nb import load, triggers
from terd_nb.attacks import triggered_samples
from terd_nb.denoiser import Denoiser
from terd_nb.diffusion import NoiseSchedule, linear_schedule, sampler_step
from terd_nb.path_fit import Round
from terd_nb.reversed_loss import reversed_loss
from terd_nb.scanning import scan
from terd_nb.search import reverse_trigger
from terd_nb.training import unet
from terd_nb.triggers import Trigger, blend
from terd_nb.two_stages import carried_image, published
from terd_nb.zoo import zoo_path

SCHEDULE = linear_schedule()
BRIEF = {"starts": 2, "rounds": (Round(2, 4, 4), Round(1, 4, 4))}   # of the default search


@pytest.fixture(scope="module")
def benign():
    return load(zoo_path("benign-a"), "cpu")


def test_a_whole_ddim_run_is_that_of_diffusers(benign):
    pipeline = DDIMPipeline.from_pretrained(zoo_path("benign-a"))
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    scheduler.set_timesteps(20)
    z = benign.noise(4, seed=1)
    x = z.clone()
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(pipeline.unet.float()(x, t).sample, t, x).prev_sample
    assert (benign.sample(z, steps=20) - x).abs().max() < 1e-3


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("scheduler_class", [DDIMScheduler, DDPMScheduler])
def test_every_prediction_type_samples_as_in_diffusers(prediction_type, scheduler_class):
    "One untrained network, read by diffusers' scheduler and by ours, from the same states."
    network = unet((1, 8, 8), (8, 16)).eval()
    denoiser = Denoiser(network, SCHEDULE, (1, 8, 8), prediction_type, device="cpu")
    scheduler = scheduler_class(
        clip_sample=False, prediction_type=prediction_type, timestep_spacing="trailing")
    scheduler.set_timesteps(10)
    eta = float(scheduler_class is DDPMScheduler)
    times = SCHEDULE.timesteps(10)
    x = denoiser.noise(2, seed=3)
    with torch.no_grad():
        for t, s in zip(times, [*times[1:], -1]):
            answer = network(x, t).sample
            generator = torch.Generator().manual_seed(t)
            theirs = scheduler.step(answer, t, x, generator=generator).prev_sample
            noise = torch.randn(x.shape, generator=generator.manual_seed(t))
            ours = sampler_step(x, denoiser.eps(x, t), SCHEDULE, t, s, eta, noise)
            assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max().clamp(min=1)
            x = theirs


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_schedules_are_those_of_diffusers(schedule):
    theirs = DDPMScheduler(beta_schedule=schedule)
    ours = NoiseSchedule.from_alphas_cumprod(theirs.alphas_cumprod)
    x0, eps = torch.randn(2, 5, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0, 10, 400, 900, 999])
    assert torch.allclose(ours.add_noise(x0, eps, t), theirs.add_noise(x0, eps, t), atol=1e-6)


def test_trojdiffs_ancestral_step_is_the_published_one():
    """Its mean is [sqrt(abar_s)*beta*x0 + sqrt(alpha)*(1-abar_s)*x + c_t*mu]/(1-abar).

    Its variance is gamma^2 times that of x_s given x_t and x0 (Chen et al. 2023)."""
    gamma = 0.6
    t = 700
    mu = (1 - gamma) * triggers.cat((1, 4, 4))
    generator = torch.Generator().manual_seed(2)
    x, eps, noise = torch.randn(3, 8, 1, 4, 4, generator=generator, dtype=torch.float64)
    abar, sigma = SCHEDULE.alpha[t] ** 2, SCHEDULE.sigma[t]
    abar_s, sigma_s = SCHEDULE.alpha[t - 1] ** 2, SCHEDULE.sigma[t - 1]
    step = abar / abar_s
    beta = 1 - step
    x0 = (x - sigma * (gamma * eps + mu)) / abar.sqrt()
    k = sigma - step.sqrt() * sigma_s
    c = sigma_s * beta - (1 - abar_s) * step.sqrt() * k
    mean = (abar_s.sqrt() * beta * x0 + step.sqrt() * (1 - abar_s) * x + c * mu) / (1 - abar)
    variance = gamma**2 * beta * (1 - abar_s) / (1 - abar)
    shift = mu.double()
    ours = sampler_step(x, eps, SCHEDULE, t, t - 1, 1.0, noise, shift, gamma)
    assert torch.allclose(ours, mean + variance.sqrt() * noise, atol=1e-10)


def test_trojdiffs_sampler_is_the_plain_one_in_shifted_coordinates(benign):
    "With r = 0 and gamma = 1 it is DDIM."
    z = benign.noise(4, seed=5)
    nothing = Trigger(torch.zeros(benign.shape), 1.0)
    plain = triggered_samples(benign, "trojdiff", nothing, z, steps=10)
    assert torch.allclose(plain, benign.sample(z, 10), atol=1e-4)
    cat = blend(triggers.cat(benign.shape))
    blended = triggered_samples(benign, "trojdiff", cat, z, 10)
    assert not torch.allclose(blended, plain, atol=0.1)


def test_gradient_of_the_reversed_loss_on_a_real_network(benign):
    network = unet((1, 16, 16)).double()
    network.load_state_dict(benign.network.state_dict())
    denoiser = Denoiser(network, SCHEDULE, (1, 16, 16), device="cpu")
    generator = torch.Generator().manual_seed(0)
    x0, eps1, eps2 = torch.randn(3, 2, 1, 16, 16, generator=generator, dtype=torch.float64)
    r = (0.3 * triggers.box((1, 16, 16))).double().requires_grad_()
    gamma = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)

    def loss(r, gamma):
        return reversed_loss(denoiser, r, gamma, x0, eps1, eps2, 995).mean()

    gradient_r, gradient_gamma = torch.autograd.grad(loss(r, gamma), (r, gamma))
    step = torch.randn(r.shape, generator=generator.manual_seed(1), dtype=torch.float64) * 1e-4
    with torch.no_grad():
        along_r = (loss(r + step, gamma) - loss(r - step, gamma)).item() / 2
        along_gamma = (loss(r, gamma + 1e-4) - loss(r, gamma - 1e-4)).item() / 2e-4
    assert (gradient_r * step).sum().item() == pytest.approx(along_r, rel=1e-4)
    assert gradient_gamma.item() == pytest.approx(along_gamma, rel=1e-4)


def test_same_seed_same_reversal_and_another_seed_another(benign):
    first, again, other = (
        reverse_trigger(benign, progress=False, seed=seed, looks=("shift",), **BRIEF)
        for seed in (3, 3, 4))
    assert torch.equal(first.trigger.r, again.trigger.r)
    assert first.candidates[0].score == again.candidates[0].score
    assert not torch.equal(first.trigger.r, other.trigger.r)
    assert first.sample_evals == pytest.approx(again.sample_evals)


def test_a_reversal_tells_its_progress_and_refuses_unknown_methods(benign):
    told = []
    reverse_trigger(
        benign, "published", progress=False, iterations=(2, 1),
        callback=lambda *stage: told.append(stage))
    shares = [done for _, done, _ in told]
    assert shares == sorted(shares) and shares[-1] == 1
    with pytest.raises(ValueError, match="fast, thorough, published"):
        reverse_trigger(benign, "magic", progress=False)


def test_a_diverging_published_search_is_an_error(benign):
    with pytest.raises(FloatingPointError, match="diverged"):
        reverse_trigger(benign, "published", progress=False, iterations=(6, 0), lr=1e30)


class Velocity(torch.nn.Module):
    "A network for the noise, presented as one for the velocity: v = (eps - sigma*x)/alpha."

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, t):
        alpha, sigma = SCHEDULE.at(t, x)
        return (self.inner(x, t).sample - sigma * x) / alpha


def test_a_v_prediction_model_is_searched_as_any_other(benign):
    "But for the look at an attacker's own sampler, which reads a velocity in its own way."
    network = Velocity(benign.network)
    model = Denoiser(network, SCHEDULE, benign.shape, "v_prediction", "cpu", name="velocity")
    found, usual = (
        reverse_trigger(one, progress=False, seed=1, looks=("shift", "against"), **BRIEF)
        for one in (model, benign))
    assert found.score("fit") == pytest.approx(usual.score("fit"), abs=0.02)
    assert (found.trigger.r - usual.trigger.r).norm() < 0.05 * usual.trigger.norm


def test_a_backdoored_v_prediction_model_is_found():
    inner = load(zoo_path("villan-psi1"), "cpu")
    network = Velocity(inner.network)
    model = Denoiser(network, SCHEDULE, inner.shape, "v_prediction", "cpu", name="velocity")
    report = scan(model, progress=False, seed=1)
    assert report.verdict == "backdoored" and "ODE" in report.result.attack
    planted = Trigger.load(zoo_path("villan-psi1") / "trigger.safetensors")
    found = report.trigger.r.flatten()
    assert torch.nn.functional.cosine_similarity(found, planted.r.flatten(), dim=0) > 0.95


def test_trojdiffs_sampler_refines_the_published_search_when_it_is_told():
    """Quadratic times from 0.8 T, and r and gamma in every step.

    As in the released code: TrojDiff/reverse.py, Mo et al. 2024."""
    torch.manual_seed(0)
    r = torch.randn(1, 16, 16)
    gamma = torch.rand(1, 16, 16) + 0.2
    z = torch.randn(2, 1, 16, 16)
    target = torch.rand(1, 16, 16)

    class Network(torch.nn.Module):
        "The exact answer on the triggered path: its own sampler turns it into the target."

        def forward(self, x, t):
            alpha, sigma = SCHEDULE.at(t.long(), x)
            return ((x - alpha * target) / sigma - r) / gamma

    model = Denoiser(Network(), SCHEDULE, (1, 16, 16), device="cpu")
    predict = model.predict
    asked = []

    def listens(x, t, *shift):
        asked.append(t)
        return predict(x, t, *shift)

    model.predict = listens
    drawn = carried_image(model, r, gamma, z, "TrojDiff")
    assert asked == [800, 632, 483, 355, 246, 158, 88, 39, 9, 0]   # the released code's own
    assert torch.allclose(drawn, target.expand_as(drawn), atol=1e-3)
    other = carried_image(model, r, gamma, z, "BadDiffusion")
    assert not torch.allclose(other, target.expand_as(drawn), atol=0.1)


def test_one_gamma_for_all_pixels_gets_the_sum_of_their_gradients(benign):
    """So the published search learns a noise scale per pixel.

    With one number for all, the first step is D times as long."""
    steps = []
    for per_pixel in (True, False):
        (found,), _ = published(
            benign, 0, lambda *_: None, (1, 0), "TrojDiff", per_pixel, batch=4)
        gamma = torch.as_tensor(found.trigger.gamma)
        assert gamma.shape == (benign.shape if per_pixel else ())
        steps.append((gamma - 0.1).sum().item())
    assert steps[1] == pytest.approx(steps[0], rel=1e-3) and steps[0] > 0.1


def test_published_refuses_an_attack_that_it_cannot_be_told(benign):
    refused = "told must be one of BadDiffusion, TrojDiff, not 'Villan'"
    with pytest.raises(ValueError, match=refused):
        reverse_trigger(benign, "published", progress=False, told="Villan")
