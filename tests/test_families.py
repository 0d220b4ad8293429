"""Workshops B3 and C against their oracle.

Every family is saved, opened as a Denoiser, and sampled beside diffusers' own."""

import json
import pickle
import re
import shutil

import diffusers
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    CMStochasticIterativeScheduler,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    LDMPipeline,
    ScoreSdeVeScheduler,
    UNet2DModel,
    VQModel,
)
from safetensors.torch import load_file, save_file

from terd_nb.diffusion import preconditioned
from terd_nb.loading import checkpoints, hub
from terd_nb.loading.contracts import PIPELINE_RUNS, SUPPORTED, VP_SCHEDULERS
from terd_nb.loading.files import CheckpointError
from terd_nb.loading.networks import ClassAverage, NullClass
from terd_nb.loading.schedulers import load, load_folder

INDEX = "model_index.json"
UNET = "unet/config.json"
SCHEDULER = "scheduler/scheduler_config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
# What was compared -> largest difference, relative to the scale of x; `pytest -s` prints it.
MEASURED = {}


@pytest.fixture(scope="module", autouse=True)
def report():
    yield
    rounded = {key: float(f"{value:.1e}") for key, value in MEASURED.items()}
    print("\n" + json.dumps(rounded, indent=1))


def tiny_unet(**changes):
    torch.manual_seed(0)
    arguments = {
        "sample_size": 8,
        "in_channels": 3,
        "out_channels": 3,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    return UNet2DModel(**arguments | changes).eval()


NCSNPP = {
    "block_out_channels": (32, 32),
    "norm_num_groups": None,
    "attention_head_dim": None,
    "norm_eps": 1e-6,
    "mid_block_scale_factor": 2**0.5,
    "time_embedding_type": "fourier",
    "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"),
    "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"),
}


def tiny_dit(**changes):
    torch.manual_seed(0)
    arguments = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 3,
        "num_layers": 2,
        "sample_size": 8,
        "num_embeds_ada_norm": 5,
    }
    return DiTTransformer2DModel(**arguments | changes).eval()


def coder(kind, **changes):
    torch.manual_seed(0)
    arguments = {
        "block_out_channels": (8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "norm_num_groups": 4,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "latent_channels": 3,
    }
    return kind(**arguments | changes).eval()


def save(folder, network, scheduler, **index):
    DDPMPipeline(network, scheduler).save_pretrained(folder)
    edit(folder, INDEX, **index)
    return folder


def edit(folder, name, **changes):
    (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | changes))


def opened(folder):
    return load(folder, device="cpu")


def noise(n=2, seed=0):
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def compare(what, ours, theirs, limit=1e-5):
    "Equal to `limit`, relative to the scale of x where that is large."
    MEASURED[what] = ((ours - theirs).abs().max() / max(1.0, theirs.abs().max().item())).item()
    assert MEASURED[what] <= limit, (what, MEASURED[what])


def as_trained(model, scheduler):
    "What a VP network answers, from the denoiser's noise and image and the scheduler's alphas."

    def answer(x, t):
        assert t == int(t)
        alpha = scheduler.alphas_cumprod[int(t)].sqrt()
        sigma = (1 - scheduler.alphas_cumprod[int(t)]).sqrt()
        eps, x0 = model.predict(x, int(t))
        return {
            "epsilon": (x - alpha * x0) / sigma,
            "sample": (x - sigma * eps) / alpha,
            "v_prediction": alpha * eps - sigma * x0,
        }[model.prediction_type]

    return answer


# ---------------------------------------------------------------- VP

# Those that ask the network at whole times, from noise to image.
OTHERWISE = ("DDIMInverse", "DPMSolverMultistepInverse", "KDPM2Discrete", "KDPM2AncestralDiscrete",
             "SASolver", "LCM", "TCD")
VP = [name for name in VP_SCHEDULERS if name.removesuffix("Scheduler") not in OTHERWISE]
ZERO_SNR = [
    "DDPMScheduler",
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
]


def sampled(scheduler, answer, steps=10):
    "One run of diffusers' sampler, with answer(x, t) in the place of the network."
    scheduler.set_timesteps(steps)
    x = noise() * scheduler.init_noise_sigma
    generator = torch.Generator().manual_seed(0)
    random = {"generator": generator} if "generator" in scheduler.step.__code__.co_varnames else {}
    with torch.no_grad():
        for t in scheduler.timesteps:
            out = answer(scheduler.scale_model_input(x, t), t)
            x = scheduler.step(out, t, x, **random).prev_sample
    return x


@pytest.mark.parametrize("kind", VP)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_vp(tmp_path, kind, prediction_type):
    "Every sampler's own steps; ours says what the network sees, in the words it was trained in."
    if kind in ("PNDMScheduler", "EulerAncestralDiscreteScheduler") and prediction_type == "sample":
        pytest.skip("this sampler has no such prediction")
    settings = {
        "prediction_type": prediction_type,
        "num_train_timesteps": 240,
        "timestep_spacing": "trailing",
    }
    if kind == "DPMSolverSinglestepScheduler":
        del settings["timestep_spacing"]  # it has only one
    if kind in ("DDIMScheduler", "DDPMScheduler"):
        settings |= {"clip_sample": False}
    if kind == "PNDMScheduler":
        settings |= {"skip_prk_steps": True}
    scheduler = getattr(diffusers, kind)(**settings)
    network = tiny_unet()
    model = opened(save(tmp_path, network, scheduler))
    assert model.noise_schedule.name == "VP" and model.prediction_type == prediction_type
    theirs = sampled(scheduler, lambda x, t: network(x, t).sample)
    scheduler = getattr(diffusers, kind)(**settings)
    ours = sampled(scheduler, as_trained(model, scheduler))
    compare(f"VP {kind.removesuffix('Scheduler')} {prediction_type}", ours, theirs)


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_vp_ddim_sample(tmp_path, beta_schedule, prediction_type):
    "DDIM's whole run against `Denoiser.sample` on the same times."
    scheduler = DDIMScheduler(
        beta_schedule=beta_schedule,
        prediction_type=prediction_type,
        clip_sample=False,
        timestep_spacing="trailing",
        num_train_timesteps=500,
        beta_end=0.012,
    )
    network = tiny_unet()
    model = opened(save(tmp_path, network, scheduler))
    theirs = sampled(scheduler, lambda x, t: network(x, t).sample)
    ours = model.sample(noise(), scheduler.timesteps.tolist())
    compare(f"VP DDIM sample() {beta_schedule} {prediction_type}", ours, theirs)


@pytest.mark.parametrize("kind", ZERO_SNR)
def test_vp_zero_snr(tmp_path, kind):
    "The schedule ends at alpha = 0 (Euler and others write 2**-12), and v says what the image is."
    settings = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "timestep_spacing": "trailing",
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
    }
    if kind in ("DDIMScheduler", "DDPMScheduler"):
        settings |= {"clip_sample": False}
    scheduler = getattr(diffusers, kind)(**settings)
    network = tiny_unet()
    folder = save(tmp_path, network, scheduler)
    model = opened(folder)
    assert model.noise_schedule.alpha[-1] <= 2**-12
    if kind == "DDIMScheduler":
        assert model.noise_schedule.alpha[-1] == 0
        theirs = sampled(scheduler, lambda x, t: network(x, t).sample)
        ours = model.sample(noise(), scheduler.timesteps.tolist())
        compare("VP zero SNR, DDIM sample()", ours, theirs)
    theirs = sampled(getattr(diffusers, kind)(**settings), lambda x, t: network(x, t).sample)
    scheduler = getattr(diffusers, kind)(**settings)
    ours = sampled(scheduler, as_trained(model, scheduler))
    compare(f"VP zero SNR {kind.removesuffix('Scheduler')}", ours, theirs)
    edit(folder, SCHEDULER, prediction_type="epsilon")
    assert re.search("last alpha is zero.*epsilon", refusal(folder))


def test_vp_zero_snr_that_would_rise(tmp_path):
    "2**-24 is more than the cumulative alpha before it, on DDPM's betas: then it stands for 0."
    scheduler = EulerDiscreteScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    assert scheduler.alphas_cumprod[-1] > scheduler.alphas_cumprod[-2]
    assert opened(save(tmp_path, tiny_unet(), scheduler)).noise_schedule.alpha[-1] == 0


def test_each_class_has_its_own_defaults(tmp_path):
    for kind in VP:
        scheduler = getattr(diffusers, kind)()
        folder = save(tmp_path / kind, tiny_unet(), scheduler)
        config = json.loads((folder / SCHEDULER).read_text())
        (folder / SCHEDULER).write_text(json.dumps({"_class_name": config["_class_name"]}))
        alpha = scheduler.alphas_cumprod.double().sqrt()
        assert torch.equal(opened(folder).noise_schedule.alpha, alpha)


# ---------------------------------------------------------------- VE


@pytest.mark.parametrize(
    "name, network",
    [("ncsnpp", NCSNPP), ("fourier", {"time_embedding_type": "fourier"}), ("plain", {})],
)
def test_ve(tmp_path, name, network):
    "The pipeline's predictor and corrector steps; ours says the score."
    network = tiny_unet(**network)
    scheduler = ScoreSdeVeScheduler(
        num_train_timesteps=20, sigma_min=0.01, sigma_max=50.0, sampling_eps=1e-7
    )
    model = opened(save(tmp_path, network, scheduler, _class_name="ScoreSdeVePipeline"))
    assert model.noise_schedule.name == "VE" and model.prediction_type == "score"
    scheduler.set_timesteps(20)
    scheduler.set_sigmas(20)
    numbers = (scheduler.timesteps * 19).round().long()

    def run(score):
        x = noise() * scheduler.init_noise_sigma
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for i, t in enumerate(scheduler.timesteps):
                x = scheduler.step_correct(score(x, i), x, generator=generator).prev_sample
                step = scheduler.step_pred(score(x, i), t, x, generator=generator)
                x = step.prev_sample
        return step.prev_sample_mean

    theirs = run(lambda x, i: network(x, scheduler.sigmas[i] * torch.ones(len(x))).sample)
    ours = run(lambda x, i: -model.eps(x, int(numbers[i])) / scheduler.sigmas[i])
    compare(f"VE {name}", ours, theirs)


# ---------------------------------------------------------------- EDM


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"prediction_type": "v_prediction"},
        {"sigma_schedule": "exponential"},
        {"sigma_data": 1.0, "rho": 5.0},
    ],
    ids=str,
)
def test_edm_euler(tmp_path, settings):
    scheduler = EDMEulerScheduler(num_train_timesteps=25, **settings)
    network = tiny_unet()
    model = opened(save(tmp_path, network, scheduler, _class_name="DiffusionPipeline"))
    assert model.noise_schedule.name == "EDM" and model.prediction_type == "edm"
    theirs = sampled(scheduler, lambda x, t: network(x, t).sample, steps=25)
    # They start at sqrt(sigma_max^2 + 1).
    z = noise() * scheduler.init_noise_sigma / model.noise_schedule.prior_scale
    compare(f"EDM Euler {settings}", model.sample(z, 25), theirs)


def test_edm_dpm_solver(tmp_path):
    "A solver of second order asks for the denoised image."
    scheduler = EDMDPMSolverMultistepScheduler(num_train_timesteps=25)
    network = tiny_unet()
    model = opened(save(tmp_path, network, scheduler))
    theirs = sampled(scheduler, lambda x, t: network(x, t).sample, steps=25)
    scheduler = EDMDPMSolverMultistepScheduler(num_train_timesteps=25)

    def denoised(x, out, sigma):
        return model.x0(x, 24 - scheduler.step_index)

    scheduler.precondition_outputs = denoised
    compare("EDM DPMSolver", sampled(scheduler, lambda x, t: x, steps=25), theirs)


# ---------------------------------------------------------------- flow


def flow(scheduler, answer, **steps):
    scheduler.set_timesteps(**steps)
    x = noise()
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(answer(x, t), t, x).prev_sample
    return x


@pytest.mark.parametrize("shift, T", [(1.0, 1000), (3.0, 1000), (3.0, 200)])
def test_flow_euler(tmp_path, shift, T):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift, num_train_timesteps=T)
    network = tiny_unet()
    model = opened(save(tmp_path, network, scheduler))
    assert model.noise_schedule.name == "flow" and model.noise_schedule.alpha[-1] == 0
    times = model.noise_schedule.timesteps(20)
    unshifted = [(t + 1) / T for t in times]  # the scheduler shifts them
    theirs = flow(scheduler, lambda x, t: network(x, t.expand(len(x))).sample, sigmas=unshifted)
    compare(f"flow Euler shift {shift:g} T {T}", model.sample(noise(), times), theirs)


def test_flow_with_a_shift_that_depends_on_the_size(tmp_path):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    model = opened(save(tmp_path, tiny_unet(), scheduler))
    assert torch.allclose(model.noise_schedule.sigma.flip(0), scheduler.sigmas.double())


def test_flow_heun(tmp_path):
    network = tiny_unet()
    model = opened(save(tmp_path, network, FlowMatchHeunDiscreteScheduler(num_train_timesteps=20)))

    def run(answer):
        scheduler = FlowMatchHeunDiscreteScheduler(num_train_timesteps=20)
        return flow(scheduler, answer, num_inference_steps=20)

    def theirs(x, t):
        return network(x, t.expand(len(x))).sample

    def ours(x, t):
        return (x - model.x0(x, round(t.item()) - 1)) / (t / 20)

    compare("flow Heun", run(ours), run(theirs))


# ---------------------------------------------------------------- consistency


@pytest.mark.parametrize("steps", [1, 4, 40])
def test_consistency(tmp_path, steps):
    "The denoised image, noised again in each step; at the smallest sigma the answer is x itself."
    scheduler = CMStochasticIterativeScheduler()
    network = tiny_unet(num_class_embeds=3)
    folder = save(tmp_path, network, scheduler, _class_name="ConsistencyModelPipeline")
    model = opened(folder)
    mean = ClassAverage(network)
    assert model.noise_schedule.name == model.prediction_type == "consistency"
    assert len(model.noise_schedule) == 40
    scheduler.set_timesteps(steps)

    def run(denoise):
        x = noise() * scheduler.init_noise_sigma
        generator = torch.Generator().manual_seed(0)
        scheduler.set_timesteps(steps)
        with torch.no_grad():
            for i, t in enumerate(scheduler.timesteps):
                scaled = scheduler.scale_model_input(x, t)
                x = denoise(x, scaled, i, t, generator)
        return x

    def ours(x, scaled, i, t, generator):
        sigma = scheduler.sigmas[i + 1] if i + 1 < 40 else scheduler.sigmas[-1]
        number = int((model.noise_schedule.sigma - scheduler.sigmas[i]).abs().argmin())
        z = torch.randn(x.shape, generator=generator) if steps > 1 else torch.zeros_like(x)
        scheduler._step_index += 1
        spread = (sigma.clamp(0.002, 80) ** 2 - 0.002**2) ** 0.5
        return model.x0(x, number).clamp(-1, 1) + z * spread

    def theirs(x, scaled, i, t, generator):
        return scheduler.step(mean(scaled, t), t, x, generator).prev_sample

    compare(f"consistency {steps} steps", run(ours), run(theirs))
    with torch.no_grad():
        assert torch.allclose(model.x0(noise(), 0), noise(), atol=1e-6)


def test_consistency_preconditioning():
    scheduler = CMStochasticIterativeScheduler()
    sigma = torch.logspace(-2.6, 1.9, 30).reshape(-1, 1, 1, 1)
    alpha = torch.ones_like(sigma)
    prediction = preconditioned(0.5, 0.002, name="consistency")
    x, out = torch.randn(2, 30, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    c_skip, c_out = scheduler.get_scalings_for_boundary_condition(sigma)
    _, x0 = prediction.solve(out, x, alpha, sigma)
    compare("consistency scalings", x0, c_skip * x + c_out * out)


# ---------------------------------------------------------------- latents


@pytest.mark.parametrize("kind", [VQModel, AutoencoderKL])
def test_latent(tmp_path, kind):
    "The whole pipeline, picture for picture."
    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    changes = {"num_vq_embeddings": 8} if kind is VQModel else {}
    pipeline = LDMPipeline(coder(kind, **changes), tiny_unet(), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(tmp_path)
    model = opened(tmp_path)
    assert model.shape == (3, 8, 8) and model.family == "latent VP path, epsilon network"
    generator = torch.Generator().manual_seed(0)
    theirs = pipeline(2, generator, num_inference_steps=10, output_type="np").images
    latents = model.sample(noise(), 10)
    ours = (model.pictures(latents) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    assert ours.shape == (2, 16, 16, 3)
    compare(f"latent {kind.__name__}", ours, torch.from_numpy(theirs))


def test_latent_with_a_shift_and_in_parts(tmp_path, monkeypatch):
    autoencoder = coder(AutoencoderKL, shift_factor=0.3, scaling_factor=0.5)
    vae = ["diffusers", "AutoencoderKL"]
    save(tmp_path, tiny_unet(), FlowMatchEulerDiscreteScheduler(), vae=vae)
    autoencoder.save_pretrained(tmp_path / "vae")
    model = opened(tmp_path)
    z = noise(20)
    with torch.no_grad():
        theirs = autoencoder.decode(z / 0.5 + 0.3).sample
    compare("latent shift", model.pictures(z), theirs)
    rows = []
    decode = type(autoencoder).decode

    def counted(self, z):
        rows.append(len(z))
        return decode(self, z)

    monkeypatch.setattr(model.decode, "rows", lambda latents: 4)  # as if the pictures were large
    monkeypatch.setattr(type(autoencoder), "decode", counted)
    compare("latent in parts", model.pictures(z), theirs)
    assert rows == [4] * 5


# ---------------------------------------------------------------- classes


def test_class_average(tmp_path):
    network = tiny_unet(num_class_embeds=70)
    model = load_folder(save(tmp_path, network, DDPMScheduler()), "cpu", classes=70)
    assert isinstance(model.network, ClassAverage) and model.network.passes_per_row == 70
    t = torch.tensor([3, 700])
    x = noise()
    answers = []
    with torch.no_grad():
        for label in range(70):
            answers.append(network(x, t, class_labels=torch.tensor([label, label])).sample)
        compare("class average", model.network(x, t), torch.stack(answers).mean(0))
    rows = []
    model.network.network.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    with torch.no_grad():
        model.network(noise(3), 5)
    assert max(rows) <= 64 and sum(rows) == 210


def test_class_average_is_differentiable_in_parts(tmp_path):
    "Each part is run again on the way back, so that memory does not grow with the classes."
    network = tiny_unet(num_class_embeds=9).requires_grad_(False)
    grads = []
    for batch in (4, 100):
        x = noise().requires_grad_()
        ClassAverage(network, batch)(x, 5).square().sum().backward()
        grads.append(x.grad)
    compare("class average, gradient", *grads)


@pytest.mark.parametrize("changes", [{}, {"out_channels": 6}, {"patch_size": 4}], ids=str)
def test_dit(tmp_path, changes):
    "A pixel transformer against its own forward with the null class, without its variance."
    network = tiny_dit(**changes)
    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    pipeline = DiTPipeline(network, None, scheduler)
    pipeline.save_pretrained(tmp_path)
    model = opened(tmp_path)
    assert isinstance(model.network, NullClass)
    assert model.shape == (3, 8, 8) and model.decode is None

    def theirs(x, t):
        null = torch.full((len(x),), 5)
        return network(x, timestep=t.expand(len(x)), class_labels=null).sample[:, :3]

    scheduler = pipeline.scheduler
    final = sampled(scheduler, theirs)
    compare(f"DiT {changes}", model.sample(noise(), scheduler.timesteps.tolist()), final)


def test_dit_with_a_vae(tmp_path):
    "The whole pipeline, asked about the null class, which it hard-codes as 1000."
    network = tiny_dit(num_embeds_ada_norm=1000, out_channels=6)
    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    labels = {i: f"class {i}" for i in range(1000)}
    pipeline = DiTPipeline(network, coder(AutoencoderKL), scheduler, id2label=labels)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(tmp_path)
    model = opened(tmp_path)
    settings = {"guidance_scale": 1.0, "num_inference_steps": 10, "output_type": "np"}
    theirs = pipeline([1000, 1000], generator=torch.Generator().manual_seed(0), **settings).images
    ours = (model.pictures(model.sample(noise(), 10)) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    compare("DiT pipeline with vae", ours, torch.from_numpy(theirs))


def test_dit_of_an_older_version(tmp_path):
    "Its class was called Transformer2DModel, with settings that are off."
    DiTPipeline(tiny_dit(), None, DDIMScheduler()).save_pretrained(tmp_path)
    new = opened(tmp_path)
    edit(tmp_path, INDEX, transformer=["diffusers", "Transformer2DModel"])
    edit(
        tmp_path,
        "transformer/config.json",
        _class_name="Transformer2DModel",
        cross_attention_dim=None,
        num_vector_embeds=None,
        only_cross_attention=False,
        use_linear_projection=False,
    )
    with torch.no_grad():
        assert torch.equal(opened(tmp_path).eps(noise(), 500), new.eps(noise(), 500))
    edit(tmp_path, "transformer/config.json", cross_attention_dim=8)
    assert "'cross_attention_dim' = 8" in refusal(tmp_path)


def test_opening_draws_no_random_numbers(tmp_path):
    DiTPipeline(tiny_dit(), coder(AutoencoderKL), DDIMScheduler()).save_pretrained(tmp_path)
    before = torch.get_rng_state()
    network = opened(tmp_path).network
    assert torch.equal(torch.get_rng_state(), before)
    for tensor in [*network.parameters(), *network.buffers()]:
        assert not tensor.is_meta and not tensor.requires_grad


# ---------------------------------------------------------------- refusals


def refusal(folder, max_bytes=10**8):
    "The message with which a model is refused: one short line that a terminal can print."
    with pytest.raises(CheckpointError) as caught:
        load_folder(folder, "cpu", max_bytes)
    message = str(caught.value)
    assert message.isprintable() and 0 < len(message) <= 400
    return message


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    "Valid models, which no test may change."
    root = tmp_path_factory.mktemp("families")
    LDMPipeline(coder(VQModel), tiny_unet(), DDIMScheduler()).save_pretrained(root / "vq")
    DiTPipeline(tiny_dit(), coder(AutoencoderKL), DDIMScheduler()).save_pretrained(root / "dit")
    for kind in (
        ScoreSdeVeScheduler,
        EDMEulerScheduler,
        CMStochasticIterativeScheduler,
        FlowMatchEulerDiscreteScheduler,
        EulerDiscreteScheduler,
    ):
        save(root / kind.__name__, tiny_unet(), kind())
    return root


VAE = "vae/config.json"
VQ = "vqvae/config.json"
DIT = "transformer/config.json"
WIDE = {"block_out_channels": [4096] * 2, "layers_per_block": 8}
VE = "ScoreSdeVeScheduler"
EDM = "EDMEulerScheduler"
CM = "CMStochasticIterativeScheduler"
FM = "FlowMatchEulerDiscreteScheduler"
EULER = "EulerDiscreteScheduler"
REFUSALS = [
    # what is out of scope, or unknown
    (
        VE,
        INDEX,
        {"text_encoder": ["transformers", "CLIPTextModel"]},
        "'text_encoder'.*out of scope",
    ),
    (VE, INDEX, {"tokenizer_2": ["transformers", "CLIPTokenizer"]}, "'tokenizer_2'.*out of scope"),
    (
        VE,
        INDEX,
        {"unet": ["diffusers", "UNet2DConditionModel"]},
        "'UNet2DModel': input should be 'UNet2DConditionModel'",
    ),
    (VE, INDEX, {"_class_name": "FluxPipeline"}, "'FluxPipeline'.*DDPMPipeline.*DiTPipeline"),
    (
        VE,
        INDEX,
        {"scheduler": ["diffusers", "RePaintScheduler"]},
        "RePaintScheduler.*DDPM, ",
    ),
    (VE, INDEX, {"scheduler": ["evil", "ScoreSdeVeScheduler"]}, "'evil'"),
    (VE, INDEX, {"scheduler": ["diffusers", "EDMEulerScheduler"]}, "agree"),
    (
        VE,
        INDEX,
        {"vae": ["diffusers", "AutoencoderTiny"]},
        "'AutoencoderTiny'.*AutoencoderKL, VQModel",
    ),
    (
        VE,
        INDEX,
        {"vae": ["diffusers", "VQModel"], "vqvae": ["diffusers", "VQModel"]},
        "both vae and vqvae",
    ),
    ("dit", INDEX, {"unet": ["diffusers", "UNet2DModel"]}, "both unet and transformer"),
    ("vq", INDEX, {"vqvae": ["diffusers", "AutoencoderKL"]}, "'_class_name' = 'VQModel'"),
    ("dit", INDEX, {"vae": ["diffusers", "VQModel"]}, "vae.*'AutoencoderKL'"),
    # paths
    (VE, SCHEDULER, {"sigma_min": 0}, "'sigma_min' = 0"),
    (VE, SCHEDULER, {"sigma_min": 2.0, "sigma_max": 1.0}, "at time 1"),
    (VE, SCHEDULER, {"sigma_max": 1e300}, "'sigma_max' = 1e\\+300"),
    (VE, SCHEDULER, {"num_train_timesteps": 10**12}, "100000"),
    (EDM, SCHEDULER, {"num_train_timesteps": 10**12}, "100000"),
    (EDM, SCHEDULER, {"rho": 0}, "'rho' = 0"),
    (EDM, SCHEDULER, {"sigma_data": "0.5"}, "'sigma_data' = '0.5'"),
    (EDM, SCHEDULER, {"sigma_schedule": "linear"}, "'sigma_schedule' = 'linear'"),
    (EDM, SCHEDULER, {"prediction_type": "sample"}, "'prediction_type' = 'sample'"),
    (CM, SCHEDULER, {"num_train_timesteps": 10**6}, "100000"),
    (CM, SCHEDULER, {"sigma_min": 80.0}, "at time 1"),
    (FM, SCHEDULER, {"invert_sigmas": True}, "'invert_sigmas' = True"),
    (FM, SCHEDULER, {"shift": -1.0}, "'shift' = -1.0"),
    (FM, SCHEDULER, {"shift": 1e9}, "'shift' = 1000000000.0"),
    (FM, SCHEDULER, {"num_train_timesteps": 10**6}, "100000"),
    (EULER, SCHEDULER, {"timestep_type": "continuous"}, "'timestep_type' = 'continuous'"),
    (EULER, SCHEDULER, {"use_flow_sigmas": True}, "'use_flow_sigmas' = True"),
    (EULER, SCHEDULER, {"rescale_betas_zero_snr": True}, "last alpha is zero"),
    # networks
    (VE, UNET, {"num_class_embeds": 10**9}, "'num_class_embeds' = 1000000000: .*1000"),
    ("dit", DIT, {"num_embeds_ada_norm": 10**9}, "'num_embeds_ada_norm'"),
    ("dit", DIT, {"num_layers": 10**9}, "'num_layers'"),
    (
        "dit",
        DIT,
        {"num_attention_heads": 256, "attention_head_dim": 4096},
        "asks for a network of [0-9,]{15}",
    ),
    (
        "dit",
        DIT,
        {"sample_size": 1024, "patch_size": 1, "attention_head_dim": 64},
        "asks for a network of",
    ),
    ("dit", DIT, {"patch_size": 3}, "fails on 3x8x8|shape"),
    ("dit", DIT, {"out_channels": 5}, "out_channels"),
    ("dit", DIT, {"norm_type": "layer_norm"}, "'norm_type'"),
    ("dit", DIT, {"num_embeds_ada_norm": None}, "'num_embeds_ada_norm' = None"),
    ("dit", DIT, {"activation_fn": "evil"}, "'activation_fn'"),
    ("dit", DIT, {"attention_head_dim": 3}, "cannot be built|shape|fails"),
    ("dit", DIT, {"auto_map": "evil"}, "'auto_map'"),
    # autoencoders
    ("dit", VAE, WIDE, "the vae's config.json asks for a network of"),
    ("vq", VQ, WIDE, "the vqvae's config.json asks for a network of"),
    ("vq", VQ, {"block_out_channels": [8] * 9}, "at most 8"),
    ("vq", VQ, {"block_out_channels": [8] * 3}, "cannot be built|tensor|fails"),
    ("vq", VQ, {"num_vq_embeddings": 10**9}, "'num_vq_embeddings'"),
    ("vq", VQ, {"vq_embed_dim": 10**9}, "'vq_embed_dim'"),
    ("vq", VQ, {"lookup_from_codebook": True}, "'lookup_from_codebook' = True"),
    ("vq", VQ, {"norm_type": "spatial"}, "'norm_type' = 'spatial'"),
    ("vq", VQ, {"scaling_factor": 0}, "'scaling_factor' = 0"),
    ("dit", VAE, {"latent_channels": 4}, "fails on 3x8x8"),
    ("dit", VAE, {"latents_mean": [0.0]}, "'latents_mean'"),
    ("dit", VAE, {"shift_factor": 1e300}, "'shift_factor'"),
]


IDS = [f"{model}-{str(changes)[:50]}" for model, _, changes, _ in REFUSALS]


@pytest.mark.parametrize("model, name, changes, words", REFUSALS, ids=IDS)
def test_refused(honest, tmp_path, model, name, changes, words):
    folder = shutil.copytree(honest / model, tmp_path / "model")
    load_folder(folder, "cpu", 10**8)
    edit(folder, name, **changes)
    assert re.search(words, refusal(folder)), refusal(folder)


def test_pictures_and_codebooks_that_are_too_large(honest, tmp_path):
    folder = shutil.copytree(honest / "vq", tmp_path / "model")
    edit(folder, UNET, sample_size=1024)
    edit(folder, VQ, num_vq_embeddings=65_536)
    assert "codebook is too large" in refusal(folder)
    edit(folder, VQ, num_vq_embeddings=256, block_out_channels=[8] * 8)
    edit(folder, VQ, down_block_types=["DownEncoderBlock2D"] * 8)
    edit(folder, VQ, up_block_types=["UpDecoderBlock2D"] * 8)
    edit(folder, UNET, sample_size=64)
    assert "8192x8192 pixels" in refusal(folder)


@pytest.mark.parametrize("model, part", [("dit", "vae"), ("vq", "vqvae"), ("dit", "transformer")])
def test_the_weights_of_every_part_are_checked(honest, tmp_path, model, part):
    folder = shutil.copytree(honest / model, tmp_path / "model")
    weights = folder / part / WEIGHTS
    good = load_file(weights)
    key = sorted(good)[0]
    save_file(good | {key: torch.full_like(good[key], float("nan"))}, weights)
    assert "NaN" in refusal(folder)
    save_file(good | {"stowaway": torch.zeros(3)}, weights)
    assert re.search(f"'stowaway' is in the weights, but not.*the {part}'s", refusal(folder))
    weights.write_bytes(pickle.dumps(1))
    assert "no safetensors file" in refusal(folder)
    weights.rename(weights.with_suffix(".bin"))
    assert "only a pickle" in refusal(folder)
    shutil.rmtree(folder / part)
    assert f"{part}/config.json is not there" in refusal(folder)


def test_all_parts_share_the_limit(honest):
    parts = load_folder(honest / "dit", "cpu", 10**8)
    first = checkpoints.network_bytes(parts.network)
    whole = first + checkpoints.network_bytes(parts.decode.autoencoder)
    # The headers of the files need some room too.
    load_folder(honest / "dit", "cpu", whole + 20_000)
    assert "vae" in refusal(honest / "dit", whole - 1)


def test_fourier_times_need_positive_times(tmp_path):
    network = tiny_unet(time_embedding_type="fourier")
    for kind in (DDPMScheduler, EDMEulerScheduler):
        assert "logarithm" in refusal(save(tmp_path / kind.__name__, network, kind()))


def test_the_hub_gives_every_part(honest):
    for model in ("dit", "vq"):
        folder = honest / model
        files = {}
        for path in folder.rglob("*"):
            if path.is_file():
                files[path.relative_to(folder).as_posix()] = path.stat().st_size
        more = {"vae/code.py": 1, "vae/model.bin": 1}
        assert set(hub.wanted_files(files | more)) == set(files)


def test_what_is_supported_exists():
    for names in [PIPELINE_RUNS, *SUPPORTED.values()]:
        for name in names:
            assert getattr(diffusers, name)
    assert len(set(SUPPORTED["scheduler"])) == len(SUPPORTED["scheduler"]) == 29
