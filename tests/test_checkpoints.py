"""Workshops B and B2 against hostile authors.

Every refusal, its bounds in time and memory, and what must still be accepted."""

import json
import math
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors.torch import load_file, save_file

from terd_nb.loading import files, schedulers
from terd_nb.loading.checkpoints import UNET as KIND
from terd_nb.loading.checkpoints import (
    build_network,
    check_runs,
    image_shape,
    load_unet,
)
from terd_nb.loading.files import (
    CheckpointError,
    check_folder,
    network_arguments,
    parse_json,
    read_header,
)
from terd_nb.loading.hub import download_model, wanted_files
from terd_nb.loading.schedulers import load_folder, read_schedule

INDEX = "model_index.json"
UNET = "unet/config.json"
SCHEDULER = "scheduler/scheduler_config.json"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
BIAS = "conv_in.bias"  # a tensor of eight numbers
unix = pytest.mark.skipif(os.name == "nt", reason="links and FIFOs are for Unix")


def tiny_unet(**changes):
    torch.manual_seed(0)
    arguments = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    return UNet2DModel(**arguments | changes)


@pytest.fixture(scope="session")
def honest(tmp_path_factory):
    "A valid model, which no test may change."
    folder = tmp_path_factory.mktemp("checkpoints") / "honest"
    DDPMPipeline(tiny_unet(), DDPMScheduler()).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(honest, tmp_path):
    "A copy of it, to be damaged."
    return shutil.copytree(honest, tmp_path / "model")


def load(folder):
    denoiser = load_folder(folder, "cpu")
    return denoiser.network, denoiser.noise_schedule


def refusal(call, *args):
    "The message with which a call is refused; it must be one short line that a terminal can print."
    with pytest.raises(CheckpointError) as caught:
        call(*args)
    message = str(caught.value)
    assert message.isprintable() and 0 < len(message) <= 400
    return message


# ---------------------------------------------------------------- ways to damage a model


def edit(name, **changes):
    "Change entries of a JSON file."

    def attack(folder):
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | changes))

    return attack


def both(*attacks):
    def attack(folder):
        for one in attacks:
            one(folder)

    return attack


def drop(name, key):
    def attack(folder):
        values = json.loads((folder / name).read_text())
        del values[key]
        (folder / name).write_text(json.dumps(values))

    return attack


def put(name, content):
    "Replace a file."

    def attack(folder):
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return attack


def safetensors(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def forge(change):
    "Rewrite the header of the weights with change(header)."

    def attack(folder):
        data = (folder / WEIGHTS).read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:end])
        change(header)
        (folder / WEIGHTS).write_bytes(safetensors(header, data[end:]))

    return attack


def refit(change):
    "Rewrite the weights with change(tensors)."

    def attack(folder):
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return attack


def only_a_pickle(folder):
    (folder / WEIGHTS).unlink()
    (folder / "unet/diffusion_pytorch_model.bin").write_bytes(pickle.dumps({}))


def only_a_variant(folder):
    (folder / WEIGHTS).rename(folder / "unet/diffusion_pytorch_model.fp16.safetensors")


def elsewhere(name):
    "Move a file or a folder out, and leave a link to it."

    def attack(folder):
        (folder / name).rename(folder.parent / "loot")
        (folder / name).symlink_to(folder.parent / "loot")

    return attack


def link(name, target):
    def attack(folder):
        (folder / name).unlink()
        (folder / name).symlink_to(target)

    return attack


def fifo(name):
    def attack(folder):
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return attack


def folder_in_place_of(name):
    def attack(folder):
        (folder / name).unlink()
        (folder / name).mkdir()

    return attack


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def file_in_place_of_folder(folder):
    shutil.rmtree(folder)
    folder.write_text("not a folder")


def old_and_new_name(tensors):
    layer = "mid_block.attentions.0"
    tensors[f"{layer}.query.bias"] = tensors[f"{layer}.to_q.bias"].clone()


def bytes_left_over(folder):
    with open(folder / WEIGHTS, "ab") as file:
        file.write(b"stowaway")


def cut_weights(folder):
    os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size - 1)


def reverse_offsets(header):
    header[BIAS]["data_offsets"].reverse()


def gap(header):
    last = max(header.values(), key=lambda entry: entry.get("data_offsets", [0, 0]))
    last["data_offsets"] = [offset + 4 for offset in last["data_offsets"]]


SIZES = {
    "block_out_channels": [4096] * 8,
    "layers_per_block": 8,
    "down_block_types": ["AttnDownBlock2D"] * 8,
    "up_block_types": ["AttnUpBlock2D"] * 8,
}
LONG = "x" * 400_000
ESCAPE = "\x1b[2J\nall is well\u202e"
SURROGATE = "\ud800"  # half a character: no file, terminal or UTF-8 can hold it

REFUSALS = {
    # the folder
    "empty": (empty, "model_index.json is not there"),
    "a file as the folder": (file_in_place_of_folder, "model_index.json is not there"),
    "no unet config": (lambda f: (f / UNET).unlink(), "unet/config.json is not there"),
    "no scheduler": (
        lambda f: shutil.rmtree(f / "scheduler"),
        "scheduler_config.json is not there",
    ),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "safetensors is not there"),
    "only a pickle": (only_a_pickle, "pickle.*convert it"),
    "only a variant": (only_a_variant, "safetensors is not there"),
    "shards as well": (put(f"{WEIGHTS}.index.json", "{}"), "shards"),
    "a folder as the config": (folder_in_place_of(UNET), "no plain file"),
    "a folder as the weights": (folder_in_place_of(WEIGHTS), "no plain file"),
    # the index
    "custom pipeline": (
        edit(INDEX, _class_name=["pipeline", "Mine"]),
        "'pipeline', 'Mine'.*DDPMPipeline",
    ),
    "other pipeline": (
        edit(INDEX, _class_name="StableDiffusionPipeline"),
        "'StableDiffusionPipeline'",
    ),
    "other library": (edit(INDEX, unet=["evil", "UNet2DModel"]), "'evil'.*UNet2DModel"),
    "other network": (
        edit(INDEX, unet=["diffusers", "UNet2DConditionModel"]),
        "'UNet2DConditionModel'",
    ),
    "other scheduler": (
        edit(INDEX, scheduler=["diffusers", "KDPM2DiscreteScheduler"]),
        "'KDPM2Discrete.*DDPM",
    ),
    "a hostile scheduler": (
        edit(INDEX, scheduler=[["diffusers"], {"DDPMScheduler": 1}]),
        "scheduler is .*DDPM",
    ),
    "no network": (drop(INDEX, "unet"), "names no unet"),
    "a null network": (edit(INDEX, unet=None), "names no unet"),
    "no scheduler named": (drop(INDEX, "scheduler"), "names no scheduler"),
    "10^5 classes": (
        edit(INDEX, id2label={str(i): "x" for i in range(50_000)}),
        "id2label.*at most 10000",
    ),
    "classes in a list": (edit(INDEX, id2label=["x"]), "id2label"),
    "one part more": (edit(INDEX, helper=["evil", "Helper"]), "'helper'"),
    "a part for texts": (edit(INDEX, text_encoder=["transformers", "CLIP"]), "out of scope"),
    # JSON
    "cut JSON": (put(UNET, '{"a": '), "no proper JSON"),
    "no JSON": (put(UNET, b""), "no proper JSON"),
    "not UTF-8": (put(UNET, b'{"a": "\xff"}'), "no proper JSON"),
    "a list": (put(UNET, "[]"), "must hold a JSON object"),
    "a null": (put(SCHEDULER, "null"), "must hold a JSON object"),
    "a key twice": (put(UNET, '{"in_channels": 1, "in_channels": 2}'), "appears twice"),
    "a key twice, inside": (put(UNET, '{"a": [{"b": 1, "b": 2}]}'), "appears twice"),
    "NaN": (put(SCHEDULER, '{"beta_start": NaN}'), "NaN is no finite number"),
    "Infinity": (put(SCHEDULER, '{"beta_start": -Infinity}'), "-Infinity is no finite number"),
    "an infinity too many": (
        put(SCHEDULER, '{"lambda_min_clipped": Infinity}'),
        "Infinity is no finite number",
    ),
    "1e999": (put(SCHEDULER, '{"beta_start": 1e999}'), "1e999 is no finite number"),
    "deep lists": (put(UNET, "[" * 400_000), "no proper JSON"),
    "deep objects": (put(UNET, '{"a":' * 100_000), "no proper JSON"),
    "a number of 100,000 digits": (
        put(UNET, '{"in_channels": ' + "9" * 100_000 + "}"),
        "no proper JSON",
    ),
    "more than 1 MB": (put(UNET, "{}" + " " * 1_000_000), "at most 1,000,000"),
    "hidden entries": (
        edit(SCHEDULER, _use_default_values=["prediction_type"]),
        "_use_default_values",
    ),
    "a hostile key": (edit(UNET, **{ESCAPE: ESCAPE}), "extra inputs"),
    "half a character as a key": (edit(UNET, **{SURROGATE: 1}), "ud800"),
    "half a character as a class": (edit(UNET, _class_name=SURROGATE), "'_class_name' = .*ud800"),
    "half a character in the index": (edit(INDEX, unet=["diffusers", SURROGATE]), "ud800"),
    "half a character as a type": (
        forge(lambda h: h[BIAS].update(dtype=SURROGATE)),
        "'dtype' = .*ud800",
    ),
    "half a character as a tensor": (
        forge(lambda h: h.update({SURROGATE: h.pop(BIAS)})),
        "in the network, but not",
    ),
    "a long key": (edit(UNET, **{LONG: LONG}), "xxx"),
    # the network's config
    "unet class": (edit(UNET, _class_name="UNet1DModel"), "'UNet1DModel'.*'UNet2DModel'"),
    "unet class, a list": (edit(UNET, _class_name=["UNet2DModel"]), "'UNet2DModel'"),
    "no unet class": (drop(UNET, "_class_name"), "'_class_name': field required"),
    "auto_map": (edit(UNET, auto_map={"AutoModel": "net.Evil"}), "'auto_map'"),
    "class-conditional": (
        edit(UNET, num_class_embeds=10),
        "'class_embedding.weight' is in the network, but not",
    ),
    "no classes": (edit(UNET, num_class_embeds=0), "'num_class_embeds' = 0"),
    "10^12 classes": (edit(UNET, num_class_embeds=10**12), "'num_class_embeds' = 1000000000000"),
    "class embedding": (edit(UNET, class_embed_type="timestep"), "'class_embed_type' = 'timestep'"),
    "class identity": (edit(UNET, class_embed_type="identity"), "'class_embed_type' = 'identity'"),
    "learned variance": (edit(UNET, out_channels=2), r"the answer's shape is \(2, 8, 8\)"),
    "fourier times": (
        edit(UNET, time_embedding_type="fourier"),
        "'time_proj.weight' is in the network, but not",
    ),
    "learned times": (edit(UNET, time_embedding_type="learned"), "'learned'.*'positional'"),
    "skip blocks on one channel": (
        edit(UNET, down_block_types=["SkipDownBlock2D"] * 2),
        "fails on 1x8x8",
    ),
    "cross attention": (
        edit(UNET, up_block_types=["CrossAttnUpBlock2D"] * 2),
        "'CrossAttnUpBlock2D'",
    ),
    "no blocks": (
        edit(UNET, down_block_types=[], up_block_types=[], block_out_channels=[]),
        "at least 1",
    ),
    "1,000 blocks": (edit(UNET, down_block_types=["DownBlock2D"] * 1000), "at most 8"),
    "blocks as a text": (edit(UNET, down_block_types="DownBlock2D"), "valid list"),
    "unequal lists": (edit(UNET, block_out_channels=[8, 16, 16]), "cannot be built"),
    "no sample_size": (drop(UNET, "sample_size"), "'sample_size': field required"),
    "null sample_size": (edit(UNET, sample_size=None), "'sample_size' = None"),
    "three sample sizes": (edit(UNET, sample_size=[8, 8, 8]), "'sample_size'"),
    "huge sample_size": (edit(UNET, sample_size=10**9), "'sample_size' = 1000000000"),
    "odd sample_size": (edit(UNET, sample_size=7), "7x7"),
    "negative channels": (edit(UNET, block_out_channels=[-8, 16]), "= -8"),
    "huge channels": (edit(UNET, block_out_channels=[8, 10**30]), "'block_out_channels'"),
    "float channels": (
        edit(UNET, block_out_channels=[8.0, 16]),
        "= 8.0: input should be a valid integer",
    ),
    "bool layers": (edit(UNET, layers_per_block=True), "= True"),
    "text layers": (edit(UNET, layers_per_block="1"), "= '1'"),
    "many layers": (edit(UNET, layers_per_block=10**6), "'layers_per_block'"),
    "no heads": (edit(UNET, attention_head_dim=0), "'attention_head_dim' = 0"),
    "heads that do not fit": (
        edit(UNET, attention_head_dim=4096),
        "shape|cannot be built|fails on",
    ),
    "groups that do not fit": (edit(UNET, norm_num_groups=7), "cannot be built"),
    "division by zero": (edit(UNET, mid_block_scale_factor=0), "'mid_block_scale_factor' = 0"),
    "frequency shift": (edit(UNET, freq_shift=4), "'freq_shift' = 4"),
    "negative norm_eps": (edit(UNET, norm_eps=-1), "'norm_eps' = -1"),
    "huge padding": (edit(UNET, downsample_padding=10**6), "'downsample_padding'"),
    "terabytes": (edit(UNET, **SIZES), "asks for a network of [0-9,]{15}"),
    # the header
    "a pickle named safetensors": (
        put(WEIGHTS, pickle.dumps({"a": LONG})),
        "no safetensors file.*pickle",
    ),
    "empty weights": (put(WEIGHTS, b""), "no safetensors file"),
    "five bytes": (put(WEIGHTS, b"12345"), "no safetensors file"),
    "header of 2^60 bytes": (
        put(WEIGHTS, (2**60).to_bytes(8, "little") + b"{}"),
        "no safetensors file",
    ),
    "header longer than the file": (
        put(WEIGHTS, (100).to_bytes(8, "little") + b"{}"),
        "no safetensors file",
    ),
    "header of 2 MB": (put(WEIGHTS, safetensors(b"{}" + b" " * 2_000_000)), "no safetensors file"),
    "header no JSON": (put(WEIGHTS, safetensors(b"{'a': 1}")), "header of .* no proper JSON"),
    "header a list": (put(WEIGHTS, safetensors(b"[]")), "must hold a JSON object"),
    "a tensor twice": (put(WEIGHTS, safetensors(b'{"a": {}, "a": {}}')), "appears twice"),
    "no tensors": (put(WEIGHTS, safetensors({})), "not in the weights"),
    "entry a number": (forge(lambda h: h.update(a=1)), "tensor 'a' = 1"),
    "entry without shape": (forge(lambda h: h[BIAS].pop("shape")), "'shape': field required"),
    "entry with more": (forge(lambda h: h[BIAS].update(code="x")), "'code'"),
    "integer weights": (forge(lambda h: h[BIAS].update(dtype="I32")), "'dtype' = 'I32'.*'F16'"),
    "negative shape": (forge(lambda h: h[BIAS].update(shape=[-8])), "'shape' = -8"),
    "float shape": (forge(lambda h: h[BIAS].update(shape=[8.0])), "'shape' = 8.0"),
    "bool shape": (forge(lambda h: h[BIAS].update(shape=[8, True])), "'shape' = True"),
    "a shape of many sizes": (forge(lambda h: h[BIAS].update(shape=[1] * 1000)), "at most 8"),
    "a shape of 2^60": (forge(lambda h: h[BIAS].update(shape=[2**60])), "wrong length"),
    "overflow": (forge(lambda h: h[BIAS].update(shape=[2**32, 2**32])), "wrong length"),
    "three offsets": (forge(lambda h: h[BIAS].update(data_offsets=[0, 0, 0])), "at most 2"),
    "overlap": (forge(lambda h: h[BIAS].update(h["conv_in.weight"])), "overlaps"),
    "gap": (forge(gap), "gap"),
    "offsets past the end": (
        forge(lambda h: h[BIAS].update(data_offsets=[2**50, 2**50 + 32])),
        "gap",
    ),
    "reversed offsets": (forge(reverse_offsets), "wrong length"),
    "bytes left over": (bytes_left_over, "accounts for"),
    "cut weights": (cut_weights, "accounts for"),
    "metadata no text": (forge(lambda h: h.update(__metadata__={"a": [1]})), "cannot be read"),
    # the tensors
    "a tensor too many": (
        refit(lambda w: w.update(stowaway=torch.zeros(3))),
        "'stowaway' is in the weights, but not",
    ),
    "a hostile tensor name": (
        refit(lambda w: w.update({ESCAPE: torch.zeros(3)})),
        "in the weights, but not",
    ),
    "a tensor too few": (refit(lambda w: w.pop(BIAS)), f"'{BIAS}' is in the network, but not"),
    "another shape": (refit(lambda w: w.update({BIAS: torch.zeros(9)})), r"shape \(9,\).*\(8,\)"),
    "an empty tensor": (refit(lambda w: w.update({BIAS: torch.zeros(0)})), r"shape \(0,\)"),
    "int64 weights": (
        refit(lambda w: w.update({BIAS: torch.zeros(8, dtype=torch.int64)})),
        "'dtype' = 'I64'",
    ),
    "an attention twice": (refit(old_and_new_name), "twice"),
    "NaN weight": (refit(lambda w: w[BIAS].fill_(math.nan)), f"'{BIAS}' holds NaN"),
    "infinite weight": (refit(lambda w: w[BIAS].fill_(math.inf)), "infinite"),
    "float16 overflow": (
        refit(lambda w: w.update({BIAS: torch.full((8,), 1e5).half()})),
        "infinite",
    ),
    "float64 overflow": (
        refit(lambda w: w.update({BIAS: torch.full((8,), 1e300, dtype=torch.float64)})),
        "infinite",
    ),
    # the schedule
    "scheduler class": (
        edit(SCHEDULER, _class_name="EDMEulerScheduler"),
        "'EDMEulerScheduler'.*DDPMScheduler.*agree",
    ),
    "scheduler class, a list": (edit(SCHEDULER, _class_name=["DDPMScheduler"]), "'DDPMScheduler'"),
    "no scheduler class": (drop(SCHEDULER, "_class_name"), "_class_name is None"),
    "no steps": (edit(SCHEDULER, num_train_timesteps=0), "'num_train_timesteps' = 0"),
    "negative steps": (edit(SCHEDULER, num_train_timesteps=-1), "'num_train_timesteps' = -1"),
    "bool steps": (edit(SCHEDULER, num_train_timesteps=True), "= True"),
    "float steps": (edit(SCHEDULER, num_train_timesteps=1000.0), "= 1000.0"),
    "10^12 steps": (edit(SCHEDULER, num_train_timesteps=10**12), "100000"),
    "null steps": (edit(SCHEDULER, num_train_timesteps=None), "= None"),
    "no noise": (edit(SCHEDULER, beta_start=0, beta_end=0), "'beta_start' = 0"),
    "negative beta": (edit(SCHEDULER, beta_start=-0.1), "'beta_start' = -0.1"),
    "beta of 1": (edit(SCHEDULER, beta_end=1), "'beta_end' = 1"),
    "beta a text": (edit(SCHEDULER, beta_end="0.02"), "'beta_end' = '0.02'"),
    "beta vanishes": (edit(SCHEDULER, beta_start=1e-30, beta_end=1e-30), "at time 0"),
    "image vanishes": (edit(SCHEDULER, beta_start=0.5, beta_end=0.5), "at time 150"),
    "unknown schedule": (edit(SCHEDULER, beta_schedule="magic"), "'magic'"),
    "schedule the class lacks": (
        both(
            edit(INDEX, scheduler=["diffusers", "DDIMScheduler"]),
            edit(SCHEDULER, beta_schedule="sigmoid"),
        ),
        "DDIMScheduler has no schedule 'sigmoid'",
    ),
    "betas a text": (edit(SCHEDULER, trained_betas="0.1"), "valid list"),
    "betas in betas": (edit(SCHEDULER, trained_betas=[[0.1]] * 1000), "valid number"),
    "betas too few": (edit(SCHEDULER, trained_betas=[0.1] * 3), "3 trained_betas for 1,000"),
    "betas too many": (edit(SCHEDULER, trained_betas=[0.1] * 150_000), "at most 100000"),
    "betas none": (edit(SCHEDULER, trained_betas=[]), "0 trained_betas"),
    "betas with a 1": (
        edit(SCHEDULER, num_train_timesteps=2, trained_betas=[0.5, 1]),
        "'trained_betas' = 1",
    ),
    "betas with a null": (
        edit(SCHEDULER, num_train_timesteps=2, trained_betas=[0.5, None]),
        "'trained_betas' = None",
    ),
    "zero terminal SNR": (
        edit(SCHEDULER, rescale_betas_zero_snr=True),
        "last alpha is zero.*rescale_betas_zero_snr",
    ),
    "prediction type": (edit(SCHEDULER, prediction_type="flow"), "'flow'.*'epsilon'"),
    "prediction type, a list": (edit(SCHEDULER, prediction_type=["epsilon"]), "'prediction_type'"),
    "obsolete prediction type": (
        edit(SCHEDULER, predict_epsilon=False),
        "'predict_epsilon' = False",
    ),
}
LINKS = {
    "unet elsewhere": (elsewhere("unet"), "leads out"),
    "weights elsewhere": (elsewhere(WEIGHTS), "leads out"),
    "index elsewhere": (elsewhere(INDEX), "leads out"),
    "link by dots": (link(UNET, "../../loot"), "not there"),
    "link to a device": (link(UNET, "/dev/zero"), "leads out"),
    "link in a circle": (link(UNET, "config.json"), "not there"),
    "FIFO as the index": (fifo(INDEX), "no plain file"),
    "FIFO as the weights": (fifo(WEIGHTS), "no plain file"),
}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("attack, words", REFUSALS.values(), ids=REFUSALS)
def test_refused(folder, attack, words):
    attack(folder)
    assert re.search(words, refusal(load, folder))


@unix
@pytest.mark.timeout(60)  # a reader would wait at a FIFO forever
@pytest.mark.parametrize("attack, words", LINKS.values(), ids=LINKS)
def test_refused_by_kind_of_file(folder, attack, words):
    attack(folder)
    assert re.search(words, refusal(load, folder))


def test_unreadable(folder, monkeypatch):
    def deny(path, mode):
        raise PermissionError(13, "Permission denied")

    # Root may read everything, whatever chmod says.
    monkeypatch.setattr(files, "open", deny, raising=False)
    assert "permissions" in refusal(load, folder)


@pytest.mark.parametrize("name", ["a\0b", "x" * 100_000, SURROGATE, "con\n\x1b[2J", ""])
def test_folder_with_an_impossible_name(tmp_path, name):
    refusal(load, tmp_path / name)


def test_limit_on_bytes(folder):
    size = (folder / WEIGHTS).stat().st_size
    load_unet(folder, size)
    assert "at most" in refusal(load_unet, folder, size - 1)
    # The limit holds in float32 too.
    refit(lambda w: w.update({key: value.half() for key, value in w.items()}))(folder)
    half = (folder / WEIGHTS).stat().st_size
    assert "asks for a network" in refusal(load_unet, folder, half)


def test_error_survives_a_worker_process():
    error = CheckpointError(ESCAPE + LONG)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


# ---------------------------------------------------------------- what the files alone tell

NEED_TORCH = {
    # a network that is built
    "class-conditional", "learned variance", "fourier times", "skip blocks on one channel",
    "unequal lists", "odd sample_size", "heads that do not fit", "groups that do not fit",
    "terabytes",
    # names and shapes to compare with
    "no tensors", "half a character as a tensor", "a tensor too many", "a hostile tensor name",
    "a tensor too few", "another shape", "an empty tensor", "an attention twice",
    # numbers that are read
    "metadata no text", "NaN weight", "infinite weight", "float16 overflow", "float64 overflow",
    # a schedule that is computed
    "beta vanishes", "image vanishes", "schedule the class lacks",
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_refused_by_the_files_alone(folder, name):
    attack, words = REFUSALS[name]
    attack(folder)
    if name in NEED_TORCH:
        assert check_folder(folder) == folder.resolve()
    else:
        assert re.search(words, refusal(check_folder, folder))


def test_files_alone_share_the_limit(folder):
    size = (folder / WEIGHTS).stat().st_size
    assert check_folder(folder, size) == folder.resolve()
    assert "at most" in refusal(check_folder, folder, size - 1)


def test_a_relative_path_is_resolved(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    for model in (folder.name, f"./{folder.name}", Path(folder.name)):
        assert check_folder(model) == folder.resolve()


ALONE = """
import sys
import terd_nb.loading.files
heavy = {"torch", "diffusers", "safetensors", "huggingface_hub", "numpy"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
assert terd_nb.loading.files.check_folder(sys.argv[1])
assert not heavy & set(sys.modules), heavy & set(sys.modules)
assert terd_nb.CheckpointError is terd_nb.loading.files.CheckpointError
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""


def test_files_are_checked_without_torch(honest):
    command = [sys.executable, "-c", ALONE, honest]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]


NO_FOLDERS = [
    "/nowhere",
    "./model",
    "../model",
    "~/model",
    "C:\\model",
    "a/b/c",
    "models/",
    "a--b",
    "a\0b",
    "x" * 100_000,
    SURROGATE,
    ESCAPE,
    "",
    Path("/nowhere"),
]


@pytest.mark.parametrize("model", NO_FOLDERS, ids=range(len(NO_FOLDERS)))
def test_a_missing_path(model, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    message = refusal(check_folder, model)
    assert message.startswith("no such folder: ")
    assert message.endswith(
        "; give a diffusers folder, or the id of a model on the Hugging Face hub"
    )
    assert refusal(schedulers.load, model, "cpu") == message


# ---------------------------------------------------------------- what is legitimate

IMAGE = torch.linspace(-1, 1, 128).reshape(2, 1, 8, 8)
TIMES = torch.tensor([3, 700])


def answer(network):
    with torch.no_grad():
        return network.eval()(IMAGE, TIMES).sample


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_weights_of_each_kind(folder, dtype):
    "The oracle is diffusers' own loader, cast to float32."
    refit(lambda w: w.update({key: value.to(dtype) for key, value in w.items()}))(folder)
    network = load_unet(folder)
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    for tensor in [*network.parameters(), *network.buffers()]:
        assert not tensor.is_meta and not tensor.requires_grad
    theirs = UNet2DModel.from_pretrained(folder / "unet").float()
    assert torch.equal(answer(network), answer(theirs))


@pytest.mark.parametrize(
    "changes",
    [
        {"sample_size": (8, 4)},
        {"attention_head_dim": None},
        {"mid_block_type": None},
        {"add_attention": False},
        {"resnet_time_scale_shift": "scale_shift"},
        {"act_fn": "gelu", "dropout": 0.1},
        {"time_embedding_dim": 12},
        {
            "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        },
        {"downsample_type": "resnet", "upsample_type": "resnet"},
        {"downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1},
    ],
    ids=str,
)
def test_networks_of_each_kind(tmp_path, changes):
    DDIMPipeline(tiny_unet(**changes), DDIMScheduler()).save_pretrained(tmp_path)
    network, _ = load(tmp_path)
    assert torch.equal(answer(network), answer(tiny_unet(**changes)))


def alphas(scheduler):
    return scheduler.alphas_cumprod.double().sqrt()


BETA_SCHEDULES = {
    DDPMScheduler: ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"],
    DDIMScheduler: ["linear", "scaled_linear", "squaredcos_cap_v2"],
}
EACH = [(kind, name) for kind, names in BETA_SCHEDULES.items() for name in names]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("kind, beta_schedule", EACH)
def test_schedules_of_each_kind(tmp_path, kind, beta_schedule, prediction_type):
    scheduler = kind(beta_schedule=beta_schedule, prediction_type=prediction_type)
    scheduler.save_pretrained(tmp_path / "scheduler")
    path, prediction = read_schedule(tmp_path, kind.__name__)
    assert prediction.name == prediction_type and torch.equal(path.alpha, alphas(scheduler))


def test_trained_betas_and_a_single_step(tmp_path):
    for betas in ([0.1, 0.2, 0.3], [0.5]):
        scheduler = DDPMScheduler(num_train_timesteps=len(betas), trained_betas=betas)
        scheduler.save_pretrained(tmp_path / "scheduler")
        assert torch.equal(read_schedule(tmp_path, "DDPMScheduler")[0].alpha, alphas(scheduler))


OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
ATTENTION = re.compile(r"(.*attentions\.\d+)\.(to_q|to_k|to_v|to_out\.0)\.(weight|bias)")


def old_names(tensors):
    for key in list(tensors):
        if match := ATTENTION.fullmatch(key):
            tensors[f"{match[1]}.{OLD[match[2]]}.{match[3]}"] = tensors.pop(key)


def no_folders(folder):
    for part in ("unet", "scheduler"):
        for path in (folder / part).iterdir():
            path.rename(folder / path.name)
        (folder / part).rmdir()


def test_an_early_model(folder):
    "Like the first ones on the hub: no folders, old names in attention layers, old entries."
    modern = load_unet(folder)
    refit(old_names)(folder)
    assert any(".proj_attn." in key for key in load_file(folder / WEIGHTS))
    no_folders(folder)
    edit("config.json", _name_or_path="../ddpm-cifar10", _diffusers_version="0.0.4")(folder)
    edit("scheduler_config.json", timestep_values=None, variance_type="fixed_large")(folder)
    edit("scheduler_config.json", predict_epsilon=True)(folder)
    network, _ = load(folder)
    assert torch.equal(answer(network), answer(modern))
    assert torch.equal(answer(network), answer(DDPMPipeline.from_pretrained(folder).unet))


CIFAR10 = {
    "_class_name": "UNet2DModel",
    "_diffusers_version": "0.0.4",
    "act_fn": "silu",
    "attention_head_dim": None,
    "block_out_channels": [128, 256, 256, 256],
    "center_input_sample": False,
    "downsample_padding": 0,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "in_channels": 3,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-06,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 32,
    "time_embedding_type": "positional",
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}


def test_the_network_of_the_ddpm_paper():
    "Its size is known: 35.7 million weights for CIFAR10 (Ho et al. 2020, workshop B)."
    arguments = network_arguments(CIFAR10, "unet", "UNet2DModel")
    network = build_network(arguments, "unet", KIND, 10**9)
    check_runs(network, "unet", KIND, image_shape(network.config))
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 1) == 35.7


@unix
def test_links_inside_the_folder(folder):
    for name in (UNET, WEIGHTS):
        (folder / name).rename(folder / "real")
        (folder / name).symlink_to("../real")
        load(folder)
        (folder / name).unlink()
        (folder / "real").rename(folder / name)


def test_loading_draws_no_random_numbers(honest):
    before = torch.get_rng_state()
    load(honest)
    assert torch.equal(torch.get_rng_state(), before)


# ---------------------------------------------------------------- bounds in time and memory

BOUNDED = """
import json, resource, sys, time
from pathlib import Path
from terd_nb.loading.files import CheckpointError
from terd_nb.loading.schedulers import load_folder

honest, *hostile = map(Path, sys.argv[1:])
load_folder(honest, "cpu")  # takes what the first use of a library reserves
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + 200_000_000
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for folder in hostile:
    start = time.process_time()
    try:
        load_folder(folder, "cpu")
        message = None
    except CheckpointError as error:
        message = str(error)
    print(json.dumps([folder.name, time.process_time() - start, message]))
"""


def sparse(folder):
    "A file that claims 2^40 bytes and uses none of the disk."
    entry = {"dtype": "F32", "shape": [2**38], "data_offsets": [0, 2**40]}
    header = json.dumps({BIAS: entry}).encode()
    (folder / WEIGHTS).write_bytes(safetensors(header))
    os.truncate(folder / WEIGHTS, 8 + len(header) + 2**40)


def many_tensors(folder):
    entry = {"dtype": "F32", "shape": [], "data_offsets": [0, 0]}
    (folder / WEIGHTS).write_bytes(safetensors({f"{i}": entry for i in range(16_000)}))


GREEDY = {
    "terabytes in the config": edit(UNET, **SIZES),
    "terabytes in the header": forge(
        lambda h: h[BIAS].update(shape=[2**42], data_offsets=[0, 2**44])
    ),
    "terabytes in the file": sparse,
    "a header of 2^60 bytes": put(WEIGHTS, (2**60).to_bytes(8, "little") + b"{}"),
    "10^12 steps": edit(SCHEDULER, num_train_timesteps=10**12),
    "as many steps as there may be": edit(SCHEDULER, num_train_timesteps=100_000),
    "many betas": edit(SCHEDULER, trained_betas=["x"] * 99_000),
    "many keys": edit(UNET, **{f"{i}": 1 for i in range(80_000)}),
    "many lists": put(UNET, '{"a":[' + "[]," * 330_000 + "[]]}"),
    "many objects": put(UNET, '{"a":[' + "{}," * 330_000 + "{}]}"),
    "many tensors": many_tensors,
    "one long shape": forge(lambda h: h[BIAS].update(shape=[2**60] * 30_000)),
}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit on memory is Linux's")
def test_refused_in_two_seconds_and_200_megabytes(honest, tmp_path):
    folders = []
    for number, attack in enumerate(GREEDY.values()):
        folders.append(shutil.copytree(honest, tmp_path / str(number)))
        attack(folders[-1])
    command = [sys.executable, "-c", BOUNDED, honest, *folders]
    run = subprocess.run(command, capture_output=True, text=True)
    results = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(results) == len(GREEDY), run.stderr[-2000:]
    for what, (_, seconds, message) in zip(GREEDY, results, strict=True):
        assert message, what
        assert "cannot be read" not in message and "memory" not in message, (what, message)
        assert seconds < 2, what


# ---------------------------------------------------------------- fuzz

NUMBERS = [b"0", b"-1", b"1e9", b"99999999999", b"null", b"[]", b"true", b"1.5"]


def mutated(data, rng):
    "Bytes with one to three faults: a byte, a bit, a cut, a hole, a repetition, another number."
    for _ in range(rng.randint(1, 3)):
        i = rng.randrange(len(data))
        j = min(len(data), i + rng.randrange(1, 40))
        number = rng.choice(list(re.finditer(rb"\d+", data)) or [re.match(b"", data)])
        faults = [
            data[:i] + bytes([rng.randrange(256)]) + data[i + 1 :],
            data[:i] + bytes([data[i] ^ 1 << rng.randrange(8)]) + data[i + 1 :],
            data[:i],
            data[:i] + data[j:],
            data[:j] + data[i:],
            data[: number.start()] + rng.choice(NUMBERS) + data[number.end() :],
        ]
        data = rng.choice(faults) or b"{"
    return data


@pytest.mark.parametrize("name", [INDEX, UNET, SCHEDULER, WEIGHTS])
def test_fuzz(folder, name):
    "Whatever is done to a file, it is loaded or refused; nothing else happens."
    rng = random.Random(0)
    good = (folder / name).read_bytes()
    head = 8 + int.from_bytes(good[:8], "little") if name == WEIGHTS else len(good)
    refused = 0
    for _ in range(100):
        (folder / name).write_bytes(mutated(good[:head], rng) + good[head:])
        try:
            load(folder)
        except CheckpointError as error:
            refused += 1
            assert str(error).isprintable() and len(str(error)) <= 400
    assert refused > 50


def test_fuzz_of_headers_alone(folder):
    rng = random.Random(1)
    good = (folder / WEIGHTS).read_bytes()
    head = 8 + int.from_bytes(good[:8], "little")
    shapes = read_header(folder / WEIGHTS)
    for _ in range(1000):
        (folder / WEIGHTS).write_bytes(mutated(good[:head], rng) + good[head:])
        try:
            found = read_header(folder / WEIGHTS)
        except CheckpointError:
            continue
        assert len(found) <= len(shapes)  # no room for one more: the data are the same


LETTERS = b'{}[]":,0123456789.eE-+ \\u\xffNaInftyrulse'


def test_fuzz_of_json_alone():
    rng = random.Random(2)
    for _ in range(1000):
        text = bytes(rng.choice(LETTERS) for _ in range(rng.randrange(30)))
        try:
            assert isinstance(parse_json(b'{"a":' + text + b"}", "a.json"), dict)
        except CheckpointError as error:
            assert str(error).isprintable()


# ---------------------------------------------------------------- the hub, without a network

SHA = "0123456789abcdef" * 2 + "01234567"


def sizes(folder):
    "The listing of a folder: file -> bytes."
    found = {}
    for path in folder.rglob("*"):
        if path.is_file():
            found[path.relative_to(folder).as_posix()] = path.stat().st_size
    return found


@pytest.fixture
def hub(monkeypatch, tmp_path, honest):
    """A hub with one repository.

    `files` are its listing, `content` what it delivers; `asked` keeps what was asked for."""
    server = SimpleNamespace(content=honest, sha=SHA, asked=None, error=None)
    server.files = sizes(honest)

    def model_info(self, repo_id, files_metadata):
        if server.error:
            raise server.error
        siblings = [SimpleNamespace(rfilename=name, size=n) for name, n in server.files.items()]
        return SimpleNamespace(sha=server.sha, siblings=siblings)

    def snapshot_download(repo_id, revision, allow_patterns, local_dir):
        files = set(allow_patterns)
        server.asked = SimpleNamespace(files=files, revision=revision, folder=local_dir)
        shutil.copytree(server.content, local_dir, dirs_exist_ok=True)
        return str(local_dir)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return server


def test_hub_gives_a_model(hub, tmp_path):
    hub.files |= {
        "pipeline.py": 1,
        "unet/diffusion_pytorch_model.bin": 10**12,
        "../../evil": 1,
        "unet/*": 1,
    }
    folder = download_model("user/name", 10**6)
    load(folder)
    assert hub.asked.files == {INDEX, UNET, WEIGHTS, SCHEDULER} and hub.asked.revision == SHA
    assert folder == tmp_path / "cache/terd_nb/user--name" / SHA


def test_hub_gives_an_early_model(hub):
    hub.files = {name.split("/")[-1]: size for name, size in hub.files.items()}
    for name in (UNET, WEIGHTS, SCHEDULER):
        shutil.copy(hub.content / name, hub.content.parent / name.split("/")[-1])
    shutil.copy(hub.content / INDEX, hub.content.parent)
    hub.content = hub.content.parent
    download_model("name", 10**6)
    assert hub.asked.files == {name.split("/")[-1] for name in (INDEX, UNET, WEIGHTS, SCHEDULER)}


def test_hub_shows_the_weights_that_diffusers_would_open(hub):
    "Clean weights at the top do not hide a unet/ of pickles, nor the index of shards."
    hub.files = {WEIGHTS.split("/")[1]: 10, "unet/diffusion_pytorch_model.bin": 10, INDEX: 10}
    assert "pickles" in refusal(download_model, "user/name", 10**6)
    index = f"{WEIGHTS}.index.json"
    assert wanted_files({index: 1, WEIGHTS: 1}) == [WEIGHTS, index]


@pytest.mark.parametrize(
    "change, words",
    [
        ({"files": {INDEX: 1, WEIGHTS: 10**12}}, "at most 1,000,000"),
        ({"files": {INDEX: 1, WEIGHTS: None}}, "sizes"),
        ({"files": {INDEX: 1, WEIGHTS: -(10**12)}}, "sizes"),
        ({"files": {INDEX: 1, "model.bin": 1}}, "pickles"),
        ({"files": {}}, "pickles"),
        (
            {"files": {INDEX: 1, WEIGHTS: 10, "text_encoder/config.json": 1}},
            "'text_encoder/config.json'.*out of scope",
        ),
        ({"sha": None}, "revision"),
        ({"sha": "../../../evil"}, "revision"),
        (
            {"error": ConnectionError("no network")},
            "ConnectionError.*check the name, or the network",
        ),
        ({"error": huggingface_hub.errors.OfflineModeIsEnabled("off")}, "OfflineModeIsEnabled"),
        ({"error": KeyError(ESCAPE)}, "KeyError"),
    ],
    ids=str,
)
def test_hub_refused_before_anything_is_fetched(hub, change, words):
    for name, value in change.items():
        setattr(hub, name, value)
    assert re.search(words, refusal(download_model, "user/name", 10**6))
    assert hub.asked is None


def test_hub_that_lies_about_a_size(hub):
    hub.files[WEIGHTS] -= 1
    assert "another size" in refusal(download_model, "user/name", 10**6)


def test_hub_that_does_not_deliver(hub, tmp_path):
    hub.content = tmp_path / "empty"
    hub.content.mkdir()
    assert "did not give it" in refusal(download_model, "user/name", 10**6)


NO_NAMES = [
    "../../etc",
    "..",
    "a/b/c",
    "/etc",
    "a\0b",
    "x" * 100_000,
    SURROGATE,
    ESCAPE,
    "",
    "a--b",
]


@pytest.mark.parametrize("name", NO_NAMES, ids=range(len(NO_NAMES)))
def test_hub_is_not_asked_for_what_is_no_name(hub, name):
    assert "HFValidationError" in refusal(download_model, name, 10**6)
    assert hub.asked is None


@pytest.mark.parametrize("model", ["model", "user/name", Path("user/name")])
def test_what_may_be_on_the_hub_is_not_asked_for_by_check_folder(hub, model):
    hub.error = AssertionError("the hub was asked")
    assert check_folder(model) is None


def test_load_asks_the_hub_for_what_is_no_folder(hub):
    denoiser = schedulers.load("user/name", "cpu")
    assert denoiser.name == "name" and hub.asked.revision == SHA
    hub.error = ConnectionError("no network")
    assert "ConnectionError" in refusal(schedulers.load, "user/name", "cpu")
