"""What a folder says is what diffusers runs.

The oracle is diffusers itself, with a network that knows one picture and answers, at every time, as
the loader says that a network of this folder answers (workshop C4). If the loader reads the folder
as the pipeline runs it, the pipeline draws that picture, from noise of the path's own scale.
"""
import inspect
import json
import re
import shutil
from dataclasses import replace
from itertools import product

import diffusers
import pytest
import torch
from diffusers import DDPMPipeline, DiffusionPipeline, UNet2DModel
from diffusers.schedulers.deprecated.scheduling_karras_ve import KarrasVeScheduler

from terd_nb.loading.contracts import PIPELINE_RUNS, SCHEDULERS, VP_SCHEDULERS
from terd_nb.loading.files import CheckpointError, data_dir, read_model_files, read_settings
from terd_nb.loading.rehearsal import (
    PICTURE,
    OnePicture,
    not_as_read,
    out_of_bounds,
    quietly,
    try_out,
    without_a_class,
)
from terd_nb.loading.schedulers import schedule_of
from terd_nb.zoo import zoo_path

SETTINGS = "scheduler/scheduler_config.json"
CONVERTING = {"DDIMPipeline", "PNDMPipeline"}


def class_of(scheduler):
    "Diffusers shows one of its schedulers no longer, but runs it in its pipeline."
    if scheduler == "KarrasVeScheduler":
        return KarrasVeScheduler
    return getattr(diffusers, scheduler)


def written(folder, scheduler, bare, settings):
    "A scheduler as an author might write it: with all its settings, or those that are no default."
    (folder / "scheduler").mkdir(parents=True)
    config = {"_class_name": scheduler} | settings
    if not bare:
        config = json.loads(class_of(scheduler)(**settings).to_json_string())
    (folder / SETTINGS).write_text(json.dumps(config))
    return config


SLOW = {"KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"}    # to make, a time at a time


def settings_of(scheduler):
    "Each prediction type that a scheduler's class knows."
    if scheduler not in VP_SCHEDULERS:
        return [{}]
    assert "prediction_type" in inspect.signature(class_of(scheduler)).parameters
    kinds = ("epsilon",) if scheduler in SLOW else ("epsilon", "sample", "v_prediction")
    return [{"prediction_type": kind} for kind in kinds]


OTHER_BETAS = {"HeunDiscreteScheduler", "LCMScheduler", "TCDScheduler", *SLOW}    # not DDIM's
UPWARDS = {"DDIMInverseScheduler", "DPMSolverMultistepInverseScheduler"}
# They ask for more noise, and two pipelines do not give it.
WIDE_START = {
    "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler",
    "LMSDiscreteScheduler", "EDMEulerScheduler", "EDMDPMSolverMultistepScheduler",
    "CMStochasticIterativeScheduler", *SLOW,
}
PLAIN_START = {"DDPMPipeline", "DiTPipeline"}
OWN_LOOP = {"ScoreSdeVePipeline": "ScoreSdeVeScheduler", "KarrasVePipeline": "KarrasVeScheduler"}
# Steps that do not take the generator that these two hand over.
NO_GENERATOR = {
    "DDIMInverseScheduler", "PNDMScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler",
    "HeunDiscreteScheduler", "LMSDiscreteScheduler", "KDPM2DiscreteScheduler", "IPNDMScheduler",
    *OWN_LOOP.values(),
}
GENERATOR = {"DDPMPipeline", "ConsistencyModelPipeline"}
FLOWS = {name for name in SCHEDULERS if name.startswith("FlowMatch")}


def expected(pipeline, scheduler, kind):
    "What diffusers does with a pair that is not refused, found by looking once."
    runs = PIPELINE_RUNS[pipeline] or scheduler
    cannot = (
        kind == "sample" and runs in ("PNDMScheduler", "EulerAncestralDiscreteScheduler")
        or (pipeline in OWN_LOOP or scheduler in OWN_LOOP.values())
        and OWN_LOOP.get(pipeline) != scheduler
        or pipeline in GENERATOR and scheduler in NO_GENERATOR
        or pipeline in ("LDMPipeline", "DiTPipeline", "ConsistencyModelPipeline")
        and scheduler in FLOWS)
    if cannot:     # what has a loop of its own, the owner of a container must bring
        own = pipeline == "DiffusionPipeline" and scheduler in OWN_LOOP.values()
        return None if own else "cannot be run"
    otherwise = (runs in UPWARDS or pipeline == "KarrasVePipeline"
                 or pipeline in PLAIN_START and scheduler in WIDE_START)
    return "the noise that the network is shown" if otherwise else None


@pytest.mark.parametrize("pipeline", PIPELINE_RUNS)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_what_is_read_is_what_is_run(tmp_path, pipeline, scheduler):
    ways = (True,) if scheduler in SLOW else (False, True)
    for settings, bare in product(settings_of(scheduler), ways):
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        config = written(folder, scheduler, bare, settings)
        if pipeline in CONVERTING and scheduler not in VP_SCHEDULERS:
            with pytest.raises(CheckpointError, match="stands for another path"):
                read_settings(folder, scheduler, pipeline)      # without torch
            continue
        read = read_settings(folder, scheduler, pipeline)
        if pipeline in CONVERTING and scheduler in OTHER_BETAS and bare:
            with pytest.raises(CheckpointError, match="the two add different noise"):
                schedule_of(read)
            continue
        with quietly():
            network = OnePicture(*schedule_of(read))
            said = try_out((pipeline, scheduler), config, network, lengths=(20,))
        awaited = expected(pipeline, scheduler, settings.get("prediction_type"))
        assert (said is None) == (awaited is None) and (awaited or "") in (said or ""), said


def test_every_pipeline_that_converts_is_known():
    "A pipeline whose constructor makes a scheduler of its own stands in the table with it."
    for name, runs in PIPELINE_RUNS.items():
        source = inspect.getsource(getattr(diffusers, name))
        made = re.findall(
            r"\n        scheduler = (\w+)\.from_config\(scheduler\.config\)", source)
        assert made == ([runs] if runs else []), name


# ---------------------------------------------------------------- settings


@pytest.fixture
def said(tmp_path):
    "What is said of a zoo model whose classes and scheduler's settings are changed."

    def tried(pipeline, scheduler, **changes):
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        config = json.loads((zoo_path("benign-a") / SETTINGS).read_text())
        config |= {"_class_name": scheduler} | changes
        config = {name: value for name, value in config.items() if value is not ...}
        (folder / "scheduler").mkdir(parents=True)
        (folder / SETTINGS).write_text(json.dumps(config))
        read = schedule_of(read_settings(folder, scheduler, pipeline))
        with quietly():
            return try_out((pipeline, scheduler), config, OnePicture(*read))

    return tried


EULER = {"timestep_spacing": "linspace"}


@pytest.mark.parametrize("pipeline, scheduler, changes", [
    ("LDMPipeline", "EulerDiscreteScheduler", {"timestep_spacing": "leading"}),
    ("ConsistencyModelPipeline", "EulerDiscreteScheduler",
     EULER | {"use_karras_sigmas": True, "sigma_max": 2.}),
    ("DiffusionPipeline", "DDIMInverseScheduler", {}),
    ("DDIMPipeline", "DDIMScheduler", {"clip_sample": True, "clip_sample_range": 0.3}),
    ("DDPMPipeline", "DDPMScheduler", {"thresholding": True, "sample_max_value": 0.5}),
    ("DDPMPipeline", "DDPMScheduler", {"predict_epsilon": False, "prediction_type": ...}),
    ("DiffusionPipeline", "DDPMScheduler", {"predict_epsilon": False, "prediction_type": ...}),
    ("DDIMPipeline", "DDIMScheduler", {"beta_schedule": "linear", "num_train_timesteps": 50}),
    # a range that is nearly enough; the default call of one step, from another time;
    # the default call of 50 of 99 steps, which are the first 50
    ("DDIMPipeline", "DDIMScheduler", {"clip_sample": True, "clip_sample_range": 0.65}),
    ("ConsistencyModelPipeline", "DDIMScheduler", {}),
    ("DDIMPipeline", "DDIMScheduler",
     {"num_train_timesteps": 99, "beta_schedule": "squaredcos_cap_v2"}),
    ("DiffusionPipeline", "DPMSolverMultistepInverseScheduler",
     {"lambda_min_clipped": float("-inf")}),
    # it cannot be tried out
    ("DiffusionPipeline", "LCMScheduler", {"original_inference_steps": 3, "clip_sample": True,
                                           "clip_sample_range": 0.3}),
    ("ScoreSdeVePipeline", "ScoreSdeVeScheduler", {"correct_steps": 100_000}),
])
def test_settings_that_draw_something_else_are_noticed(said, pipeline, scheduler, changes):
    assert "does not run what was searched" in said(pipeline, scheduler, **changes)


@pytest.mark.parametrize("pipeline, scheduler, changes", [
    ("DDIMPipeline", "DDIMScheduler", {"clip_sample": True}),
    ("DDIMPipeline", "DDIMScheduler", {"set_alpha_to_one": False, "timestep_spacing": "trailing"}),
    ("DDPMPipeline", "DDPMScheduler", {"variance_type": "fixed_large", "thresholding": True}),
    ("DDPMPipeline", "DDPMScheduler", {"prediction_type": "epsilon", "predict_epsilon": True}),
    ("LDMPipeline", "EulerDiscreteScheduler", EULER | {"use_karras_sigmas": True}),
    ("DDPMPipeline", "DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    ("DDPMPipeline", "DDPMScheduler", {"num_train_timesteps": 4000}),
    ("DDPMPipeline", "DDPMScheduler", {"num_train_timesteps": 10, "beta_end": 0.9}),
    ("DDPMPipeline", "DPMSolverMultistepScheduler", {"lambda_min_clipped": float("-inf")}),
    ("DiffusionPipeline", "FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}),
    ("ScoreSdeVePipeline", "ScoreSdeVeScheduler", {}),
    ("DDPMPipeline", "DDPMScheduler", {"a_note": {"of": ["the author"]}}),
])
def test_settings_that_draw_the_same_are_let_be(said, pipeline, scheduler, changes):
    assert said(pipeline, scheduler, **changes) is None


def test_a_network_that_answers_with_variances_is_run_so():
    folder = zoo_path("benign-a")
    read = schedule_of(read_settings(folder, "DDIMScheduler"))
    config = json.loads((folder / SETTINGS).read_text())
    learned = config | {"variance_type": "learned_range"}
    for classes in (("DDPMPipeline", "DDPMScheduler"), ("DiTPipeline", "DDPMScheduler")):
        with quietly():
            network = OnePicture(*read, variances=True)
            assert try_out(classes, learned, network) is None or classes[0] == "DiTPipeline"
    with quietly():
        assert try_out(("DiTPipeline", "DDIMScheduler"), config, network) is None
        assert "cannot be run" in try_out(
            ("DDPMPipeline", "DDPMScheduler"), learned, OnePicture(*read))


@pytest.mark.parametrize("value", [10**12, -10**12, "x" * 101, [0.] * 100_001, ["a"], {"a": 1}])
def test_a_setting_that_may_cost_too_much_is_not_tried_out(said, value):
    assert out_of_bounds({"solver_order": value}) == ["solver_order"]
    assert "is out of all bounds" in said(
        "DDPMPipeline", "DPMSolverMultistepScheduler", solver_order=value)


# ---------------------------------------------------------------- parts


def renamed(folder, pipeline, **parts):
    "A zoo model whose index names another pipeline, and more parts."
    shutil.copytree(zoo_path("benign-a"), folder)
    file = folder / "model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | parts | {"_class_name": pipeline}))
    files = read_model_files(folder)
    return not_as_read(folder, files, *schedule_of(files.settings))


@pytest.mark.parametrize("pipeline, misses", [
    ("DDIMPipeline", None), ("DDPMPipeline", None), ("DiffusionPipeline", None),
    ("LDMPipeline", "it misses vqvae"),
    ("DiTPipeline", "it misses transformer; it misses vae; it ignores unet")])
def test_a_pipeline_without_its_parts_runs_nothing(tmp_path, pipeline, misses):
    said = renamed(tmp_path / "model", pipeline)
    assert said is None if misses is None else misses in said
    folder = tmp_path / "model"
    if misses:
        with pytest.raises((ValueError, TypeError)):
            DiffusionPipeline.from_pretrained(folder)
    elif pipeline != "DiffusionPipeline":     # of this one its owner takes the parts
        DiffusionPipeline.from_pretrained(folder)


def test_a_decoder_that_a_pipeline_ignores_is_told(tmp_path):
    "`DDIMPipeline` draws the latents as if they were pictures."
    folder = tmp_path / "model"
    latent = data_dir() / "families" / "latent-benign-a"
    shutil.copytree(latent, folder)
    file = folder / "model_index.json"
    index = json.loads(file.read_text())
    (coder,) = {"vae", "vqvae"} & set(index)
    file.write_text(json.dumps(index | {"_class_name": "DDIMPipeline"}))
    files = read_model_files(folder)
    said = not_as_read(folder, files, *schedule_of(files.settings))
    assert f"it ignores {coder}" in said


def test_a_network_of_one_channel_is_not_run_by_a_loop_of_three():
    config = json.loads((zoo_path("benign-a") / SETTINGS).read_text())
    read = schedule_of(read_settings(zoo_path("benign-a"), "DDIMScheduler"))
    for pipeline, scheduler in (("DDIMPipeline", "DDIMScheduler"),
                                ("DiffusionPipeline", "DDIMScheduler")):
        with quietly():
            assert try_out((pipeline, scheduler), config, OnePicture(*read, channels=1)) is None
            assert try_out((pipeline, scheduler), config, OnePicture(*read, channels=4)) is None
    network = OnePicture(*read, channels=1)
    with pytest.raises(RuntimeError, match="3 channels"):
        network(torch.zeros(2, 3, 8, 8), 5)


def test_a_class_that_nobody_asks_for_is_told(tmp_path):
    "diffusers' own loops of pixels call such a network without one, and it refuses."
    files = read_model_files(data_dir() / "families" / "class-benign-a")
    about = {"pipeline": "DDPMPipeline"}
    said = without_a_class(replace(files, settings=files.settings | about))
    assert "asks for no class" in said
    about = {"pipeline": "DiffusionPipeline"}
    assert without_a_class(replace(files, settings=files.settings | about)) is None
    assert without_a_class(read_model_files(zoo_path("benign-a"))) is None
    network = UNet2DModel(8, block_out_channels=(32, 32), layers_per_block=1, num_class_embeds=3,
                          down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
    with pytest.raises(ValueError, match="class_labels"):
        DDPMPipeline(network, diffusers.DDPMScheduler())(num_inference_steps=1)


def test_a_rehearsal_leaves_no_trace(said, capsys):
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    assert said("DDPMPipeline", "DDPMScheduler") is None
    assert torch.equal(before, torch.random.get_rng_state())
    assert capsys.readouterr() == ("", "")


def test_an_author_may_say_predict_epsilon(tmp_path):
    "Of 2022; today's diffusers does not read it, and such a network predicts the image."
    cases = {
        "sample": {"predict_epsilon": False}, "epsilon": {"predict_epsilon": True},
        "v_prediction": {"predict_epsilon": False, "prediction_type": "v_prediction"}}
    for kind, given in cases.items():
        written(tmp_path / kind, "DDPMScheduler", True, given)
        assert schedule_of(read_settings(tmp_path / kind, "DDPMScheduler"))[1].name == kind


@pytest.mark.parametrize("given", [{"steps_offset": -1000}, {"steps_offset": 5000},
                                   {"interpolation_type": "log_linear"}])
def test_a_setting_that_asks_at_other_times_is_refused(tmp_path, given):
    "Diffusers runs them: at times, or with noises, that no reading of the path has."
    written(tmp_path, "EulerDiscreteScheduler", True, given)
    with pytest.raises(CheckpointError, match=next(iter(given))):
        read_settings(tmp_path, "EulerDiscreteScheduler", "ConsistencyModelPipeline")


def test_the_steps_of_karras_stand_on_the_path_that_is_read(tmp_path):
    "Its loop cannot show it: it squares its noise scales, and starts from too little noise."
    written(tmp_path, "KarrasVeScheduler", False, {"sigma_max": 80.})
    path, prediction = schedule_of(
        read_settings(tmp_path, "KarrasVeScheduler", "KarrasVePipeline"))
    network = OnePicture(path, prediction)
    picture = 2 * PICTURE - 1       # as the pipeline has it
    noise = torch.randn(8, 3, 8, 8, dtype=torch.float64)
    for sigma in (0.1, 1., 10., 79.):
        x = picture + sigma * noise
        out = sigma / 2 * network((x + 1) / 2, sigma / 2).sample
        step = KarrasVeScheduler().step(out, sigma, sigma / 2, x)
        assert torch.allclose(step.pred_original_sample, picture.expand_as(x), atol=1e-3 * sigma)
        assert network.noises[-1].item() == pytest.approx(noise.std().item(), rel=1e-3)
