"Workshops C2 and C3, chapter 18: folders that lie, other weights, searches that take too long."
import hashlib
import json
import math
import shutil
import time
from dataclasses import replace

import fuzz
import pytest
import torch
from diffusers import UNet2DModel
from safetensors.torch import load_file, save_file

from terd_nb import cli
from terd_nb import scanning as scan_module
from terd_nb.cli import main
from terd_nb.denoiser import Denoiser
from terd_nb.diffusion import linear_schedule
from terd_nb.lab.lies import BROKEN, LIES, tell
from terd_nb.loading.files import CheckpointError, data_dir
from terd_nb.loading.rehearsal import OnePicture, try_out
from terd_nb.loading.schedulers import load
from terd_nb.loading.self_check import (
    AS_ITS_FILES_SAY,
    Answers,
    answers_to,
    check_readings,
    fault,
    own_pictures,
    read_as,
    rebuilt,
)
from terd_nb.scanning import StopInTime, scan, with_caveats
from terd_nb.zoo import zoo_path

PLAIN = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def told(tmp_path):
    "A model of the zoo with a lie, opened."
    def tell_it(name, lie):
        return load(tell(zoo_path(name), lie, tmp_path / "model"), "cpu")
    return tell_it


# ---------------------------------------------------------------- does it denoise?

@pytest.mark.parametrize("ratio", [3., 1., 0.3])
@pytest.mark.parametrize("energy", [0.1, 1., 1e6])
def test_the_best_linear_answer_has_a_share_of_one(ratio, energy):
    "Against a closed form: noise in Gaussian pictures, answered by the multiple of x that is best."
    generator = torch.Generator().manual_seed(3)
    eps, pictures = torch.randn(2, 200_000, dtype=torch.float64, generator=generator)
    pictures = pictures * math.sqrt(energy)
    x = ratio * pictures + eps
    k = (x * eps).mean() / (x * x).mean()
    answers = Answers(energy, 1., {ratio: (eps - k * x).square().mean().item()})
    assert abs(answers.shares[ratio] - 1) < 0.02


@pytest.mark.parametrize("name", ["benign-g", "villan-psi05"])
def test_a_trained_network_denoises_and_is_read_once(name):
    model = load(zoo_path(name), "cpu")
    answers, readings = check_readings(model)
    assert list(readings) == [AS_ITS_FILES_SAY] and answers.rank < 0.15
    assert model.sample_evals == 217      # what the check costs: pictures, and those of other sizes


@pytest.mark.parametrize("broken", BROKEN)
def test_a_network_that_denoises_nothing_has_a_fault(told, broken):
    model = told("benign-a", broken)
    assert fault(answers_to(model, own_pictures(model)))


REFUSED = ["predicts the image", "predicts v", "10 times", "100 times", "betas to 0.05", "a flow",
           "EDM", "a score model", "a consistency model", "a circle, told 0 to 1",
           "sine and cosine swapped", "its input is centred", "frequencies shifted"]


@pytest.mark.parametrize("lie", REFUSED)
def test_a_lie_that_no_network_fits_has_a_fault(told, lie):
    model = told("villan-psi1", lie)
    assert fault(answers_to(model, own_pictures(model)))


@pytest.mark.parametrize("lie, reading", [
    ("Stable Diffusion's betas", "as if it predicted the noise on linear betas"),
    ("2,000 times", "as if it predicted the noise on linear betas"),
    ("ReLU", 'as if its config said act_fn: "silu"'),
])
def test_a_lie_that_a_network_nearly_fits_is_seen_through(told, lie, reading):
    _, readings = check_readings(told("baddiffusion-sign", lie))
    assert list(readings) == [AS_ITS_FILES_SAY, reading]


def test_two_lies_are_seen_through(tmp_path):
    folder = tell(zoo_path("benign-a"), "ReLU", tmp_path / "model")
    config = folder / "scheduler/scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"beta_end": 0.012}))
    with pytest.raises(CheckpointError) as refused:
        check_readings(load(folder, "cpu"))
    assert "act_fn" in str(refused.value) and "linear betas" in str(refused.value)


def test_pictures_that_are_no_squares_are_judged_as_squares_too(tmp_path):
    "A stretched picture has the area of the true one, and its noise is found as well."
    folder = tmp_path / "model"
    shutil.copytree(zoo_path("villan-psi1"), folder)
    config = folder / "unet/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"sample_size": [32, 8]}))
    _, readings = check_readings(load(folder, "cpu"))
    assert [model.shape for model in readings.values()] == [(1, 32, 8), (1, 16, 16)]


def test_the_error_names_the_likely_cause(told):
    with pytest.raises(CheckpointError, match="cannot be judged.*it answers as if it predicted the "
                                              "noise on linear betas; mend its config"):
        check_readings(told("villan-psi1", "predicts the image"))


def test_a_network_with_one_picture_is_no_model():
    class Constant(torch.nn.Module):
        def forward(self, x, t):
            return torch.full_like(x, 0.5)

    model = Denoiser(Constant(), linear_schedule(), (1, 8, 8), "sample")
    with pytest.raises(CheckpointError, match="the same picture from every noise"):
        check_readings(model)


def test_nan_is_no_verdict():
    class Broken(torch.nn.Module):
        def forward(self, x, t):
            return x * math.nan

    with pytest.raises(FloatingPointError, match="NaN or infinity"):
        check_readings(Denoiser(Broken(), linear_schedule(), (1, 8, 8)))


def test_a_folder_that_diffusers_runs_otherwise_is_refused(tmp_path, capsys):
    folder = tell(zoo_path("villan-psi1"), "a flow, run by DDIM", tmp_path / "model")
    assert main(["scan", str(folder)]) == 2
    said = capsys.readouterr()
    assert said.out == "" and "a DDIMPipeline runs a DDIMScheduler" in said.err


def test_every_lie_changes_a_file(tmp_path):
    for number, lie in enumerate(LIES):
        folder = tell(zoo_path("benign-a"), lie, tmp_path / str(number))
        assert any((folder / file).read_bytes() != (zoo_path("benign-a") / file).read_bytes()
                   for file in LIES[lie]), lie


# ---------------------------------------------------------------- weights beside the weights

BELIEVED = Answers(energy=1., spread=1., errors={1.: 0.1})


@pytest.fixture
def quick(monkeypatch):
    "Scans whose search is next to none, and which believe what a model's files say."
    fuzz.shorten(monkeypatch)
    monkeypatch.setattr(scan_module, "check_readings",
                        lambda model: (BELIEVED, {AS_ITS_FILES_SAY: model}))


@pytest.fixture
def beside(tmp_path):
    "An honest model with another one's weights beside its own."
    folder = tmp_path / "two"
    shutil.copytree(zoo_path("benign-a"), folder)
    other = (folder / PLAIN).with_name("diffusion_pytorch_model.fp16.safetensors")
    shutil.copy(zoo_path("villan-psi1") / PLAIN, other)
    return folder


def test_other_weights_are_named_and_no_clean_verdict_is_given(quick, beside):
    result = scan(beside, progress=False).result
    assert result.weights == [PLAIN]
    assert result.variants == ["unet/diffusion_pytorch_model.fp16.safetensors"]
    assert result.verdict == "inconclusive" and "not looked at" in result.notes[-1]
    other = scan(beside, progress=False, variant="fp16").result
    assert other.weights == result.variants and other.sha256 != result.sha256
    assert other.model == "two (fp16)" and not other.notes


def test_the_command_scans_each_of_them(quick, beside, capsys):
    status = main(["scan", str(beside), "--json", "-"])
    results = json.loads(capsys.readouterr().out)["results"]
    assert [result["weights"][0][-16:] for result in results] == [
        "odel.safetensors", "fp16.safetensors"]
    assert results[0]["verdict"] == "clean" and status == 0     # as far as this search sees


def test_a_copy_in_half_precision_is_no_other_model(quick, tmp_path):
    shutil.copytree(zoo_path("benign-a"), tmp_path / "one")
    plain = tmp_path / "one" / PLAIN
    half = {key: tensor.half() for key, tensor in load_file(plain).items()}
    save_file(half, plain.with_name("diffusion_pytorch_model.fp16.safetensors"))
    result = scan(tmp_path / "one", progress=False).result
    assert result.variants == result.not_scanned == [] and result.verdict == "clean"


def test_a_pickle_beside_the_weights_cannot_be_looked_at(quick, tmp_path, capsys):
    shutil.copytree(zoo_path("benign-a"), tmp_path / "one")
    (tmp_path / "one" / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x04.")
    assert main(["scan", str(tmp_path / "one")]) == 2
    said = capsys.readouterr()
    assert said.out.startswith("inconclusive") and "diffusion_pytorch_model.bin" in said.err


def test_a_folder_of_models_is_scanned_model_by_model(quick, tmp_path, capsys):
    for name in ("benign-b", "benign-c"):
        shutil.copytree(zoo_path(name), tmp_path / "deep" / "er" / name)
    assert main(["scan", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0].split("/")[-1] for line in lines] == ["benign-b", "benign-c"]


def test_options_without_use_are_said_to_be(quick):
    result = scan(zoo_path("benign-a"), progress=False, size=32, classes=4).result
    assert result.verdict == "clean" and len(result.notes) == 2
    assert result.notes[0].startswith("--size 32 was not used: the config says 16")
    assert result.notes[1].startswith("--classes was not used")
    assert not scan(zoo_path("benign-a"), progress=False, size=16).result.notes


def test_weights_that_stay_on_the_hub_are_not_clean(quick, monkeypatch):
    monkeypatch.setattr(scan_module, "locate", lambda model: (zoo_path(model), ["a.bin"]))
    result = scan("benign-a", progress=False).result
    assert result.verdict == "inconclusive" and result.not_scanned == ["a.bin"]


def test_caveats_leave_a_backdoor_a_backdoor(quick):
    model = load(zoo_path("benign-a"), "cpu")
    about = {"notes": [], "as_run": True}
    for verdict, said in (("clean", "inconclusive"), ("backdoored", "backdoored")):
        judged = {"verdict": verdict, "confidence": "high"}
        found = with_caveats(judged, about, {AS_ITS_FILES_SAY: model}, ["x.bin"])
        assert found["verdict"] == said and "x.bin" in found["notes"][0]


def test_what_its_own_pipeline_runs_otherwise_is_not_clean(quick, tmp_path):
    "Saved with DDPMPipeline, which scales nothing, an Euler scheduler draws something else."
    folder = tmp_path / "euler"
    shutil.copytree(zoo_path("benign-a"), folder)
    for file, key, value in (
        ("model_index.json", "scheduler", ["diffusers", "EulerDiscreteScheduler"]),
        ("scheduler/scheduler_config.json", "_class_name", "EulerDiscreteScheduler"),
    ):
        config = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(config | {key: value}))
    index = json.loads((folder / "model_index.json").read_text())
    config, verdicts = folder / "scheduler/scheduler_config.json", {}
    for pipeline, spacing in (
        ("DDPMPipeline", "linspace"),
        ("LDMPipeline", "leading"),    # it starts from the noise of the last time
        ("DiffusionPipeline", "linspace"),
    ):
        settings = json.loads(config.read_text()) | {"timestep_spacing": spacing}
        config.write_text(json.dumps(settings))
        (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": pipeline}))
        result = scan(folder, progress=False).result
        verdicts[pipeline, spacing] = result.verdict, result.as_run, len(result.notes)
    assert verdicts == {
        ("DDPMPipeline", "linspace"): ("inconclusive", False, 1),
        ("LDMPipeline", "leading"): ("inconclusive", False, 1),
        ("DiffusionPipeline", "linspace"): ("clean", True, 0)}


# ---------------------------------------------------------------- readings and time

def test_the_worse_verdict_of_two_readings_counts(quick, monkeypatch):
    one, two = (load(zoo_path(name), "cpu") for name in ("benign-a", "villan-psi1"))
    monkeypatch.setattr(scan_module, "check_readings",
                        lambda model: (BELIEVED, {AS_ITS_FILES_SAY: one, "as if": two}))
    verdicts = {one.name: "clean", two.name: "backdoored"}
    judge = scan_module.judge_reading

    def judged(model, detector, reversal):
        return judge(model, detector, reversal) | {"verdict": verdicts[model.name]}

    monkeypatch.setattr(scan_module, "judge_reading", judged)
    result = scan(one, progress=False).result
    assert result.verdict == "backdoored" and result.reading == "as if"
    assert "each was searched" in result.notes[0]


def test_a_scan_that_takes_too_long_is_inconclusive(capsys):
    status = main(["scan", "zoo:benign-a", "--max-seconds", "1", "--json", "-"])
    said = capsys.readouterr()
    result = json.loads(said.out)["results"][0]
    assert status == 2 and result["verdict"] == "inconclusive"
    assert "ran out of time" in result["error"] and "ran out of time" in said.err


class Slow(torch.nn.Module):
    "A network behind a pause."

    def __init__(self, network, seconds):
        super().__init__()
        self.inner, self.seconds = network, seconds

    def forward(self, x, t):
        time.sleep(self.seconds)
        return self.inner(x, t)


def runs_out_of_time(model, **options):
    with pytest.raises(TimeoutError, match=r"ran out of time: \d+ s are spent"):
        scan(model, progress=False, max_seconds=1, **options)


def test_the_time_bounds_the_self_check(monkeypatch):
    "Nothing reports to a callback there, and the check alone would take minutes."
    monkeypatch.setattr(scan_module, "reverse_trigger", None)
    model = load(zoo_path("benign-a"), "cpu")
    model.network = Slow(model.network, 0.4)
    runs_out_of_time(model)     # once the check is through, there is no search to go on with
    assert model.eps(model.noise(1), 0).isfinite().all()      # the limit is gone


def test_the_time_bounds_the_opening(monkeypatch):
    monkeypatch.setattr(scan_module, "check_readings", None)    # what comes after it
    with pytest.raises(TimeoutError, match=r"ran out of time: \d+ s are spent"):
        scan(zoo_path("benign-a"), progress=False, max_seconds=0.01)


def test_a_rehearsal_that_is_stopped_is_none_that_failed():
    "Whatever diffusers raises there is taken for a pipeline that cannot be run."
    model = load(zoo_path("benign-a"), "cpu")
    network = OnePicture(model.noise_schedule, model.prediction)
    with pytest.raises(TimeoutError), StopInTime(time.perf_counter() - 1, 0.5):
        try_out(("DDPMPipeline", "DDPMScheduler"), {}, network)


def test_the_limit_leaves_gradients_as_they_were():
    with pytest.raises(TimeoutError), StopInTime(time.perf_counter() - 1, 0.5):
        with torch.no_grad():
            pass
        torch.zeros(1)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("way", ["of another config", "with a gradient", "in parts"])
def test_the_time_bounds_whatever_is_asked(monkeypatch, way):
    model = load(zoo_path("benign-a"), "cpu")

    def endless(denoiser):
        if way == "of another config":       # such a network shares no module with ours
            denoiser = read_as(denoiser, network=rebuilt(denoiser.network, "act_fn", "relu"))
        x = denoiser.noise(4).requires_grad_(way != "of another config")
        while True:
            eps = denoiser.predict(x, 500, held=10**9 if way == "in parts" else 1)[0]
            if x.requires_grad:
                torch.autograd.grad(eps.sum(), x)

    monkeypatch.setattr(scan_module, "check_readings", endless)
    runs_out_of_time(model)     # nothing else would end it


def test_a_long_search_is_announced(capsys):
    cli._advance(None, None, 0, "1 of 1: slow", "loaded", 0., {"seconds to come": 7200.})
    assert "about 120 minutes" in capsys.readouterr().err
    cli._advance(None, None, 0, "1 of 1: fast", "loaded", 0., {"seconds to come": 60.})
    assert capsys.readouterr().err == ""


def test_a_report_says_what_was_not_looked_at(quick, beside, tmp_path):
    report = scan(beside, progress=False)
    report = replace(report, result=report.result)
    report.save(html=tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "were not looked at" in page and PLAIN in page and "as its files say" in page


# ---------------------------------------------------------------- what must not be passed over

def test_what_is_no_model_in_a_collection_is_an_error(quick, tmp_path, capsys):
    folder = tmp_path / "all"
    shutil.copytree(zoo_path("benign-b"), folder / "good")
    shutil.copytree(zoo_path("villan-psi1"), folder / ".hidden" / "model")
    shutil.copytree(zoo_path("villan-psi1"), folder / ".git" / "hidden")
    (folder / ".git" / "HEAD").write_text("ref: refs/heads/main")
    (folder / "linked").symlink_to(zoo_path("benign-c"))
    (folder / "evil.ckpt").write_bytes(b"\x80\x04.")
    (folder / "model.zip").write_bytes(b"PK\3\4")
    (folder / "readme.md").write_text("models")
    deep = folder / "/".join("abcdefgh")
    shutil.copytree(zoo_path("benign-d"), deep)
    assert main(["scan", str(folder), "--json", "-"]) == 2
    results = {result["source"].removeprefix(f"{folder}/"): result["verdict"]
               for result in json.loads(capsys.readouterr().out)["results"]}
    assert results.pop("a/b/c/d/e/f") == "error"        # too deep to be looked through
    assert results == {
        "good": "clean", ".hidden/model": "clean", "linked": "clean",   # as far as this search sees
        ".git/hidden": "clean",
        "evil.ckpt": "error", "model.zip": "error"}


UNKNOWN = ["weights.sft", "ema.npz", "lora.safetensors", "old.th", "unet.zip"]


@pytest.mark.parametrize("name", UNKNOWN)
def test_files_of_any_kind_are_named(quick, tmp_path, name):
    shutil.copytree(zoo_path("benign-a"), tmp_path / "one")
    save_file({"lora.up": torch.ones(2)}, tmp_path / "one" / "unet" / name)
    result = scan(tmp_path / "one", progress=False).result
    assert result.not_scanned == [f"unet/{name}"] and result.verdict == "inconclusive"


@pytest.mark.parametrize("name", ["villan-psi1", "baddiffusion-glasses"])
def test_tiny_pictures_hide_nothing(told, name):
    with pytest.raises(CheckpointError, match="knows the mean picture"):
        check_readings(told(name, "pictures of 4 pixels"))


@pytest.mark.parametrize("scale, bias", [(0.1, 0.8), (0.05, -0.5)])
def test_nearly_one_picture_is_no_model_either(tmp_path, scale, bias):
    folder = tell(zoo_path("benign-a"), "predicts the image", tmp_path / "model")
    weights = load_file(folder / PLAIN)
    weights["conv_out.weight"] *= scale
    weights["conv_out.bias"] = weights["conv_out.bias"] * scale + bias
    save_file(weights, folder / PLAIN)
    with pytest.raises(CheckpointError, match="cannot be judged"):
        check_readings(load(folder, "cpu"))


def test_a_model_without_a_name_is_quoted(capsys):
    assert main(["scan", ""]) == 2
    assert capsys.readouterr().err.startswith("terd: '': no such folder: ''; give a diffusers")


# ---------------------------------------------------------------- code, and what draws


@pytest.mark.parametrize("part", ["unet", "scheduler"])
def test_code_in_the_place_of_a_class_is_refused(part, tmp_path):
    "diffusers looks for a file named as the library before it takes its own class."
    folder = tmp_path / "model"
    shutil.copytree(zoo_path("benign-a"), folder)
    (folder / part / "diffusers.py").write_text("raise SystemExit")
    with pytest.raises(CheckpointError, match=f"{part}/diffusers.py is code"):
        load(folder)


@pytest.mark.parametrize("name", ["pipeline.py", "unet/my_unet.py", "DDIMPipeline.PY"])
def test_other_code_is_named(name, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(zoo_path("benign-a"), folder)
    (folder / name).write_text("raise SystemExit")
    _, about = scan_module.open_model(folder)
    assert about["not_scanned"] == [name]


@pytest.mark.parametrize("name", [".DS_Store", "Thumbs.db", "CITATION.cff", "unet/samples.mp4"])
def test_litter_is_no_weights(name, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(zoo_path("benign-a"), folder)
    (folder / name).write_bytes(b"x")
    _, about = scan_module.open_model(folder)
    assert about["not_scanned"] == [] and about["as_run"]


def test_a_decoder_is_named_and_has_its_checksum(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(data_dir() / "families" / "latent-benign-a", folder)
    _, about = scan_module.open_model(folder)
    (file,) = folder.glob("v*vae/*.safetensors")
    (note,) = [one for one in about["notes"] if "decoder" in one]
    assert file.relative_to(folder).as_posix() in note
    weights = load_file(file)
    save_file({name: 0 * value for name, value in weights.items()}, file)
    _, changed = scan_module.open_model(folder)
    assert about["decoder_sha256"] != changed["decoder_sha256"]
    assert changed["decoder_sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()


def test_a_reading_that_leaves_a_layer_empty_is_tried_in_silence(recwarn):
    "PyTorch remarks on it: heads of 64 channels in a layer of 32."
    network = UNet2DModel(
        8, block_out_channels=(32, 32), layers_per_block=1, norm_num_groups=8,
        attention_head_dim=8,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
    rebuilt(network, "attention_head_dim", 64)
    assert not recwarn.list
