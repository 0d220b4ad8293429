"""The guard at the door of every pipeline that is opened.

A noise that carries a trigger does not get in, by a generator or as latents, and clean noise passes
untouched. The oracle is diffusers: what a guarded pipeline draws from clean noise is what the bare
one draws."""

import copy
import inspect
import logging
import pickle
import threading

import diffusers
import pytest
import torch
from diffusers.schedulers.deprecated.scheduling_karras_ve import KarrasVeScheduler
from scipy.stats import ncx2
from scipy.stats import norm as normal

from terd_nb.guard import Guard, TriggeredInput, false_alarm_rate, threshold_for
from terd_nb.input_detection import InputDetector
from terd_nb.lab.decisions import crafted_generator
from terd_nb.loading.contracts import PIPELINE_RUNS
from terd_nb.triggers import Trigger, box

SHAPE = (3, 8, 8)
TRIGGER = Trigger(box(SHAPE, side=4))
GUARDED = [name for name in PIPELINE_RUNS if name != "DiffusionPipeline"]


def unet():
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, norm_num_groups=4,
        block_out_channels=(8, 8), down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2, add_attention=False,
    )  # fmt: skip


def coder(kind, **more):
    return getattr(diffusers, kind)(
        latent_channels=3, block_out_channels=(8,), norm_num_groups=4, **more
    )


def transformer():
    torch.manual_seed(0)
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=3, out_channels=3, num_layers=1,
        sample_size=8, patch_size=2, norm_num_groups=2, num_embeds_ada_norm=1000,
    )  # fmt: skip


def pipeline_of(name):
    "A small pipeline of the class, with weights that nobody has trained."
    kind = getattr(diffusers, name)
    ddim = diffusers.DDIMScheduler()
    parts = {
        "PNDMPipeline": lambda: (unet(), diffusers.PNDMScheduler()),
        "ScoreSdeVePipeline": lambda: (unet(), diffusers.ScoreSdeVeScheduler()),
        "KarrasVePipeline": lambda: (unet(), KarrasVeScheduler()),
        "LDMPipeline": lambda: (coder("VQModel"), unet(), ddim),
        "DiTPipeline": lambda: (transformer(), coder("AutoencoderKL"), ddim),
        "ConsistencyModelPipeline": lambda: (unet(), diffusers.CMStochasticIterativeScheduler()),
    }
    made = kind(*parts.get(name, lambda: (unet(), ddim))())
    made.set_progress_bar_config(disable=True)
    return made


def drawn(pipeline, generator):
    "One picture, in a few steps."
    name = type(pipeline).__name__
    asked = {"class_labels": [1]} if name == "DiTPipeline" else {"batch_size": 1}
    steps = {"ConsistencyModelPipeline": 1, "PNDMPipeline": 4}.get(name, 2)
    torch.manual_seed(3)  # what is drawn on the way without the generator
    images = pipeline(
        generator=generator, num_inference_steps=steps, output_type="np", **asked
    ).images
    return torch.as_tensor(images)


def noise(seed=1):
    return torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", GUARDED)
def test_a_crafted_generator_is_stopped_and_a_plain_one_is_not(name):
    bare = pipeline_of(name)
    detector = InputDetector(TRIGGER)
    guarded = Guard(detector).wrap(bare)
    assert isinstance(guarded, type(bare)) and guarded.to("cpu") is guarded
    assert torch.equal(
        drawn(guarded, torch.Generator().manual_seed(2)),
        drawn(bare, torch.Generator().manual_seed(2)),
    )
    with pytest.raises(TriggeredInput) as caught:
        drawn(guarded, crafted_generator(TRIGGER.stamp(noise())))
    assert caught.value.rows == [0]
    replacing = Guard(detector, "replace", torch.Generator().manual_seed(5)).wrap(bare)
    triggered, replaced = (
        drawn(one, crafted_generator(TRIGGER.stamp(noise()))) for one in (bare, replacing)
    )
    assert not torch.equal(triggered, replaced)


def test_every_pipeline_is_guarded_and_the_container_is_refused():
    assert set(GUARDED) | {"DiffusionPipeline"} == set(PIPELINE_RUNS)
    container = diffusers.DDIMPipeline(unet(), diffusers.DDIMScheduler())
    container.__class__ = diffusers.DiffusionPipeline
    with pytest.raises(TypeError, match="no sampler to guard"):
        Guard(InputDetector(TRIGGER)).wrap(container)


def test_one_door_has_one_guard():
    guard = Guard(InputDetector(TRIGGER))
    with pytest.raises(TypeError, match="has a guard already"):
        guard.wrap(guard.wrap(pipeline_of("DDIMPipeline")))


def test_which_pipelines_take_noise_as_an_argument():
    "Chapter 18b's table: one takes latents; all others draw by themselves."
    takes = {
        name: [arg for arg in inspect.signature(getattr(diffusers, name).__call__).parameters
               if arg in ("latents", "image")]
        for name in GUARDED
    }  # fmt: skip
    assert {name for name, args in takes.items() if args} == {"ConsistencyModelPipeline"}
    assert takes["ConsistencyModelPipeline"] == ["latents"]


def test_latents_are_judged_row_by_row():
    bare = pipeline_of("ConsistencyModelPipeline")
    x = torch.cat([noise(1), TRIGGER.stamp(noise(2)), noise(3)])
    kept, more = x.clone(), {"batch_size": 3, "num_inference_steps": 1, "output_type": "np"}
    with pytest.raises(TriggeredInput, match=r"1 of 3 .* \(rows 1\)") as caught:
        Guard(InputDetector(TRIGGER)).wrap(bare)(latents=x, **more)
    assert caught.value.rows == [1]
    replacing = Guard(InputDetector(TRIGGER), "replace", torch.Generator().manual_seed(7))
    fresh = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(7))
    found = replacing.wrap(bare)(latents=x, **more).images
    expected = bare(latents=torch.cat([x[:1], fresh, x[2:]]), **more).images
    assert (found == expected).all() and torch.equal(x, kept)


def test_log_says_it_and_lets_pass(caplog):
    guard = Guard(InputDetector(TRIGGER), "log")
    x = TRIGGER.stamp(noise())
    with caplog.at_level(logging.WARNING, "terd_nb.guard"):
        assert torch.equal(guard.admit(x), x)
    assert "1 of 1 starting noises look triggered" in caplog.text


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_is_not_innocent(value):
    x = noise()
    x[0, 0, 0, 0] = value
    assert Guard(InputDetector(TRIGGER)).flagged(x).tolist() == [True]


def test_what_is_wrong_is_said():
    with pytest.raises(ValueError, match="action must be one of raise, replace, log"):
        Guard(InputDetector(TRIGGER), "drop")
    with pytest.raises(TypeError, match="not of torch.int64"):
        Guard(InputDetector(TRIGGER), "replace").admit(torch.ones(1, *SHAPE).long())
    with pytest.raises(ValueError, match="do not fit the trigger's"):
        Guard(InputDetector(TRIGGER)).admit(torch.zeros(1, 3, 16, 16))


class OwnStart(diffusers.DDPMPipeline):
    "A pipeline that starts from what it is given under a name of its own."

    @torch.no_grad()
    def __call__(self, init, num_inference_steps=2, image=None):
        init = init[0] if isinstance(init, list) else init
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            init = self.scheduler.step(self.unet(init, t).sample, t, init).prev_sample
        return init


def test_noise_that_the_guard_has_not_seen_reaches_no_network():
    bare = OwnStart(unet(), diffusers.DDPMScheduler())
    guarded = Guard(InputDetector(TRIGGER)).wrap(bare)
    with pytest.raises(RuntimeError, match="has not seen"):
        guarded([noise()])
    bare([noise()])  # outside of a guarded call nothing is asked


def test_noise_is_judged_under_whatever_name_it_comes():
    guarded = Guard(InputDetector(TRIGGER)).wrap(OwnStart(unet(), diffusers.DDPMScheduler()))
    guarded(noise(), image=noise(2))
    for names in ({}, {"image": noise()}, {"image": None}):
        with pytest.raises(TriggeredInput):
            guarded(TRIGGER.stamp(noise()), **names)
        with pytest.raises(TriggeredInput):
            guarded(init=TRIGGER.stamp(noise()), **names)


def test_calls_in_other_threads_keep_their_own_guard():
    bare = pipeline_of("DDIMPipeline")
    guarded = Guard(InputDetector(TRIGGER)).wrap(bare)
    outcomes = {}

    def call(name, pipeline):
        try:
            outcomes[name] = drawn(pipeline, crafted_generator(TRIGGER.stamp(noise())))
        except TriggeredInput as error:
            outcomes[name] = error

    pairs = [(f"{kind} {i}", one) for i in range(4) for kind, one in
             (("guarded", guarded), ("bare", bare))]  # fmt: skip
    threads = [threading.Thread(target=call, args=pair) for pair in pairs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, outcome in outcomes.items():
        assert isinstance(outcome, TriggeredInput) == name.startswith("guarded")


def test_a_guarded_pipeline_is_saved_as_what_it_was(tmp_path):
    bare = pipeline_of("DDIMPipeline")
    Guard(InputDetector(TRIGGER)).wrap(bare).save_pretrained(tmp_path)
    assert '"_class_name": "DDIMPipeline"' in (tmp_path / "model_index.json").read_text()


def pickled(pipeline):
    return pickle.loads(pickle.dumps(pipeline))


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, pickled])
def test_a_copy_of_a_guarded_pipeline_is_guarded(again):
    guarded = again(Guard(InputDetector(TRIGGER)).wrap(pipeline_of("DDIMPipeline")))
    assert isinstance(guarded, diffusers.DDIMPipeline)
    with pytest.raises(TriggeredInput):
        drawn(guarded, crafted_generator(TRIGGER.stamp(noise())))


# ---------------------------------------------------------------- false alarms


@pytest.mark.parametrize("threshold", [-3.0, 0.0, 5.0])
def test_the_rate_is_exact_for_gamma_1(threshold):
    r = 0.3 * box(SHAPE)
    length = r.norm().item()
    expected = normal.sf((threshold + length**2 / 2) / length)
    found = false_alarm_rate(InputDetector(Trigger(r), threshold))
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("rate", [0, -1, 0.4, 0.6, float("nan")])
def test_a_rate_that_no_threshold_has_is_refused(rate):
    with pytest.raises(ValueError, match=r"between 0 and 0\.4"):
        threshold_for(InputDetector(TRIGGER), rate)


def test_what_no_guard_can_ask_is_refused_at_once():
    with pytest.raises(TypeError, match="InputDetector"):
        Guard(None)
    with pytest.raises(TypeError, match="ndarray"):
        Guard(InputDetector(TRIGGER)).admit(noise().numpy())
    for threshold in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite"):
            InputDetector(TRIGGER, threshold)
    assert InputDetector(TRIGGER).predict(noise() * float("nan")).all()


@pytest.mark.parametrize("gamma", [0.6, 0.9])
@pytest.mark.parametrize("target", [1e-2, 1e-5, 1e-12])
def test_the_rate_against_a_noncentral_chi_square(gamma, target):
    "For one gamma the score is a constant less a scaled noncentral chi-square."
    r = 0.1 * box(SHAPE)
    detector = InputDetector(Trigger(r, gamma))
    detector.threshold = threshold_for(detector, target)
    k, size = 1 / gamma**2 - 1, r.norm().item() ** 2
    top = size / (2 * (1 - gamma**2)) - r.numel() * torch.tensor(gamma).log().item()
    expected = ncx2.cdf(2 * (top - detector.threshold) / k, r.numel(), size / (1 - gamma**2) ** 2)
    assert false_alarm_rate(detector) == pytest.approx(target, rel=1e-6)
    assert expected == pytest.approx(target, rel=0.03)


def test_the_rate_with_a_gamma_for_each_pixel_against_a_count():
    generator = torch.Generator().manual_seed(0)
    gamma = 0.7 + 0.3 * torch.rand(SHAPE, generator=generator)
    detector = InputDetector(Trigger(0.1 * box(SHAPE), gamma))
    detector.threshold = threshold_for(detector, 0.01)
    x = torch.randn(40_000, *SHAPE, generator=generator)
    hits = detector.predict(x).sum().item()
    assert abs(hits - 400) < 4 * 20


def test_rates_that_cannot_be_told():
    with pytest.raises(ValueError, match="gamma must not exceed 1"):
        false_alarm_rate(InputDetector(Trigger(box(SHAPE), 1.1)))
    with pytest.raises(ValueError, match="most clean noises are flagged"):
        false_alarm_rate(InputDetector(TRIGGER, -1e6))
