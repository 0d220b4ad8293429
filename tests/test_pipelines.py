"""What a folder says is what diffusers runs.

The oracle is a network that knows one picture and answers, at every time, as the loader says that a
network of this folder answers. If the loader reads the folder as the pipeline runs it, the pipeline
draws that picture.
"""
import inspect
import json
import re
from copy import deepcopy
from functools import cache
from itertools import product
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from diffusers.schedulers.deprecated.scheduling_karras_ve import KarrasVeScheduler

from terd_nb.loading.contracts import (
    PIPELINE_RUNS,
    SCHEDULERS,
    VP_SCHEDULERS,
    WIDE_START,
)
from terd_nb.loading.files import CheckpointError, read_settings
from terd_nb.loading.schedulers import schedule_of

PICTURE = torch.linspace(-0.6, 0.6, 64, dtype=torch.float64).reshape(1, 1, 8, 8).repeat(1, 3, 1, 1)
CONVERTING = {"DDIMPipeline", "PNDMPipeline"}
# A container without a loop, two with other networks, and one whose loop is not its path's.
UNCALLED = {"DiffusionPipeline", "LDMPipeline", "DiTPipeline", "KarrasVePipeline"}


class KnowsOnePicture(torch.nn.Module):
    "It answers as a network of this path and prediction that was trained on one picture."
    dtype = torch.float32
    device = torch.device("cpu")

    def __init__(self, path, prediction):
        super().__init__()
        self.config = SimpleNamespace(sample_size=8, in_channels=3, num_class_embeds=None)
        self.path = path
        self.answers = prediction
        self.told = path.told(torch.arange(len(path)), len(path)).double()
        self.noises = []     # the standard deviation of what it saw as noise in each input

    def forward(self, x, told, class_labels=None, return_dict=True):
        told = torch.as_tensor(told).double().reshape(-1)[0]
        low = int((self.told <= told).sum().clamp(1, len(self.told) - 1)) - 1
        share = ((told - self.told[low]) / (self.told[low + 1] - self.told[low])).clamp(0, 1)
        alpha = torch.lerp(*self.path.alpha[low:low + 2], share)
        sigma = torch.lerp(*self.path.sigma[low:low + 2].log(), share).exp()
        x = x.double() / self.answers.scale_input(alpha, sigma)
        eps = (x - alpha * PICTURE) / sigma
        self.noises.append(eps.std().item())
        out = self.answers.answer(eps, PICTURE.expand_as(x), alpha, sigma).float()
        return SimpleNamespace(sample=out) if return_dict else (out,)


def class_of(scheduler):
    "Diffusers shows one of its schedulers no longer, but runs it in its pipeline."
    if scheduler == "KarrasVeScheduler":
        return KarrasVeScheduler
    return getattr(diffusers, scheduler)


def written(folder, scheduler, bare, settings):
    "A scheduler as an author might write it: with all its settings, or those that are no default."
    (folder / "scheduler").mkdir(parents=True)
    config = folder / "scheduler/scheduler_config.json"
    if bare:
        config.write_text(json.dumps({"_class_name": scheduler} | settings))
    else:
        config.write_text(all_settings(scheduler, json.dumps(settings)))
    return folder


@cache
def all_settings(scheduler, settings):
    return class_of(scheduler)(**json.loads(settings)).to_json_string()


@cache
def read_by_diffusers(scheduler, config):
    "The scheduler of a config's text; some classes take seconds to make."
    return class_of(scheduler).from_config(json.loads(config))


@cache
def read_by_us(settings):
    return schedule_of(json.loads(settings))


def drawn(folder, pipeline, scheduler, path, prediction):
    """What diffusers draws with the network that knows one picture, and how far off its noise was.

    A sampler that runs on the network's own path shows it noise of scale 1 at every time. None
    where the pipeline cannot run this scheduler: then nothing is run."""
    network = KnowsOnePicture(path, prediction)
    config = (folder / "scheduler/scheduler_config.json").read_text()
    named = deepcopy(read_by_diffusers(scheduler, config))
    run = getattr(diffusers, pipeline)(unet=network, scheduler=named)
    run.set_progress_bar_config(disable=True)
    try:
        steps = 200 if pipeline == "ScoreSdeVePipeline" else 20
        images = run(batch_size=8, num_inference_steps=steps, output_type="np",
                     generator=torch.Generator().manual_seed(0)).images
    except (TypeError, ValueError, AttributeError, RuntimeError):
        return None
    return images, float(np.quantile(np.abs(np.log(network.noises)), 0.75))


OWN_LOOP = {"ScoreSdeVeScheduler", "KarrasVeScheduler"}    # no other pipeline can run them
SLOW = {"KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"}    # to make, a time at a time


def settings_of(scheduler):
    "Each prediction type that a scheduler's class knows."
    if scheduler not in VP_SCHEDULERS:
        return [{}]
    assert "prediction_type" in inspect.signature(class_of(scheduler)).parameters
    kinds = ("epsilon",) if scheduler in SLOW else ("epsilon", "sample", "v_prediction")
    return [{"prediction_type": kind} for kind in kinds]


OTHER_BETAS = {"HeunDiscreteScheduler", "LCMScheduler", "TCDScheduler", "KDPM2DiscreteScheduler",
               "KDPM2AncestralDiscreteScheduler"}     # defaults that are not DDIM's
UP_AND_DOWN = {"TCDScheduler"}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("pipeline", [name for name in PIPELINE_RUNS if name not in UNCALLED])
def test_what_is_read_is_what_is_run(tmp_path, pipeline, scheduler):
    expected = PICTURE.clamp(0, 1) if pipeline == "ScoreSdeVePipeline" else PICTURE / 2 + 0.5
    expected = expected[0].permute(1, 2, 0).numpy()
    for settings, bare in product(settings_of(scheduler), (False, True)):
        folder = written(tmp_path / f"{len(list(tmp_path.iterdir()))}", scheduler, bare, settings)
        if pipeline in CONVERTING and scheduler not in VP_SCHEDULERS:
            with pytest.raises(CheckpointError, match="stands for another path"):
                read_settings(folder, scheduler, pipeline)      # without torch
            continue
        read = read_settings(folder, scheduler, pipeline)
        if pipeline in CONVERTING and scheduler in OTHER_BETAS and bare:
            with pytest.raises(CheckpointError, match="the two add different noise"):
                schedule_of(read)
            continue
        found = drawn(folder, pipeline, scheduler, *read_by_us(json.dumps(read)))
        if found is None or (pipeline not in CONVERTING and scheduler in UP_AND_DOWN):
            continue
        images, off = found
        drawn_so = off < 0.12 and np.abs(images - expected).max() < 0.15
        assert drawn_so == read["as_run"], (settings, bare, off)


def test_a_scheduler_that_asks_for_more_noise_is_known():
    for name in set(SCHEDULERS) - OWN_LOOP:
        start = float(getattr(class_of(name)(), "init_noise_sigma", 1))   # a flow starts from 1
        asks = abs(start - 1) > 1e-6
        assert asks == (name in WIDE_START), name


def test_the_oracle_sees_a_path_that_is_read_wrongly(tmp_path):
    folder = written(tmp_path / "true", "DDPMScheduler", False, {"beta_end": 0.05})
    path, prediction = schedule_of(read_settings(folder, "DDPMScheduler"))
    other = written(tmp_path / "other", "DDPMScheduler", False, {})
    wrong, _ = schedule_of(read_settings(other, "DDPMScheduler"))
    for pipeline in ("DDPMPipeline", "DDIMPipeline"):
        assert drawn(folder, pipeline, "DDPMScheduler", path, prediction)[1] < 0.1
        assert drawn(folder, pipeline, "DDPMScheduler", wrong, prediction)[1] > 0.12


def test_every_pipeline_that_converts_is_known():
    "A pipeline whose constructor makes a scheduler of its own stands in the table with it."
    for name, runs in PIPELINE_RUNS.items():
        source = inspect.getsource(getattr(diffusers, name))
        made = re.findall(
            r"\n        scheduler = (\w+)\.from_config\(scheduler\.config\)", source)
        assert made == ([runs] if runs else []), name


def test_an_author_may_say_predict_epsilon(tmp_path):
    "Of 2022; today's diffusers does not read it, and such a network predicts the image."
    cases = {
        "sample": {"predict_epsilon": False}, "epsilon": {"predict_epsilon": True},
        "v_prediction": {"predict_epsilon": False, "prediction_type": "v_prediction"}}
    for kind, given in cases.items():
        folder = written(tmp_path / kind, "DDPMScheduler", True, given)
        read = read_settings(folder, "DDPMScheduler")
        assert schedule_of(read)[1].name == kind
        assert read["as_run"] == (kind != "sample")    # for today's diffusers it is epsilon


@pytest.mark.parametrize("given", [{"steps_offset": -1000}, {"steps_offset": 5000},
                                   {"interpolation_type": "log_linear"}])
def test_a_setting_that_asks_at_other_times_is_refused(tmp_path, given):
    "Diffusers runs them: at times, or with noises, that no reading of the path has."
    folder = written(tmp_path, "EulerDiscreteScheduler", True, given)
    with pytest.raises(CheckpointError, match=next(iter(given))):
        read_settings(folder, "EulerDiscreteScheduler", "ConsistencyModelPipeline")


def test_the_steps_of_karras_stand_on_the_path_that_is_read(tmp_path):
    "Its loop cannot show it: it squares its noise scales, and starts from too little noise."
    folder = written(tmp_path, "KarrasVeScheduler", False, {"sigma_max": 80.})
    path, prediction = schedule_of(
        read_settings(folder, "KarrasVeScheduler", "KarrasVePipeline"))
    network = KnowsOnePicture(path, prediction)
    picture = 2 * PICTURE - 1       # as the pipeline has it
    noise = torch.randn(8, 3, 8, 8, dtype=torch.float64)
    for sigma in (0.1, 1., 10., 79.):
        x = picture + sigma * noise
        out = sigma / 2 * network((x + 1) / 2, sigma / 2).sample
        step = KarrasVeScheduler().step(out, sigma, sigma / 2, x)
        assert torch.allclose(step.pred_original_sample, picture.expand_as(x), atol=1e-3 * sigma)
        assert network.noises[-1] == pytest.approx(noise.std().item(), rel=1e-3)
