"""Workshops B and B2 against hostile authors.

Every refusal, its bounds in time and memory, and what must still be accepted."""

import hashlib
import json
import math
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    LDMPipeline,
    ScoreSdeVeScheduler,
    UNet2DConditionModel,
    UNet2DModel,
)
from safetensors.torch import load_file, save_file

from terd_nb.ledger import fingerprint
from terd_nb.loading import checkpoints, reading, schedulers
from terd_nb.loading.checkpoints import (
    UNETS,
    OtherWeights,
    build_network,
    check_runs,
    image_shape,
    load_unet,
    other_weights,
)
from terd_nb.loading.files import (
    check_folder,
    model_name,
    network_arguments,
    read_model_files,
)
from terd_nb.loading.hub import check_hub, download_model, left_on_hub, wanted_files
from terd_nb.loading.networks import LOADERS
from terd_nb.loading.reading import CheckpointError, parse_json, read_header
from terd_nb.loading.schedulers import load_folder, read_schedule
from terd_nb.loading.things import find_models, left_over, what_it_is

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


def variant(name):
    "A file of weights of a variant."
    return WEIGHTS.replace(".safetensors", f".{name}.safetensors")


def two_variants(folder):
    shutil.copy(folder / WEIGHTS, folder / variant("ema"))
    (folder / WEIGHTS).rename(folder / variant("fp16"))


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
    "empty": (empty, "folder is empty"),
    "a file as the folder": (file_in_place_of_folder, "a file of another kind"),
    "no unet config": (lambda f: (f / UNET).unlink(), "unet/config.json is not there"),
    "no scheduler": (
        lambda f: shutil.rmtree(f / "scheduler"),
        "scheduler_config.json is not there",
    ),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "no weights that can be opened"),
    "only a pickle": (only_a_pickle, "pickle.*`terd convert FOLDER OUT`"),
    "two variants": (two_variants, "only the variants ema, fp16.*--variant"),
    "an empty index of shards": (put(f"{WEIGHTS}.index.json", "{}"), "'metadata': field required"),
    "an index of the old layout": (
        put(WEIGHTS.replace("safetensors", "safetensors.fp16.index.json"), "{}"),
        "save the model again",
    ),
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
        "'UNet2DModel': input should be 'UNet2DConditionModel'",
    ),
    "other scheduler": (
        edit(INDEX, scheduler=["diffusers", "RePaintScheduler"]),
        "'RePaint.*not among those that can be read.*DDPM",
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
    "quantised weights": (edit(UNET, quantization_config={}), "'quantization_config'"),
    "a type for all weights": (edit(UNET, dtype="float16"), "'dtype'"),
    "a key that hides a method": (edit(UNET, items=1), "'items'"),
    "a key of another class": (edit(UNET, encoder_hid_dim=None), "'encoder_hid_dim'"),
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
    "class embedding": (edit(UNET, class_embed_type="timestep"), "add num_class_embeds"),
    "class identity": (edit(UNET, class_embed_type="identity"), "asks for a vector of numbers"),
    "class projection": (
        edit(UNET, class_embed_type="simple_projection"),
        "asks for a vector of numbers",
    ),
    "class of another kind": (edit(UNET, class_embed_type="magic"), "'class_embed_type' = 'magic'"),
    "classes by the logarithm of 0": (
        edit(UNET, class_embed_type="timestep", num_class_embeds=3, time_embedding_type="fourier"),
        "class 0 has none",
    ),
    "learned variance": (edit(UNET, out_channels=2), r"'conv_out.weight' has shape \(1,.*\(2,"),
    "three times as many answers": (edit(UNET, out_channels=3), "out_channels must be in_channels"),
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
        "CrossAttnUpBlock2D.*asks for a text",
    ),
    "no blocks": (
        edit(UNET, down_block_types=[], up_block_types=[], block_out_channels=[]),
        "at least 1",
    ),
    "1,000 blocks": (edit(UNET, down_block_types=["DownBlock2D"] * 1000), "at most 8"),
    "blocks as a text": (edit(UNET, down_block_types="DownBlock2D"), "valid list"),
    "unequal lists": (edit(UNET, block_out_channels=[8, 16, 16]), "cannot be built"),
    "no sample_size": (drop(UNET, "sample_size"), "--size 32"),
    "null sample_size": (edit(UNET, sample_size=None), "--size 32"),
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
    "a pointer": (put(WEIGHTS, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
                  "Git LFS pointer.*git lfs pull"),
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
    "10^12 steps": (edit(SCHEDULER, num_train_timesteps=10**12), "10000"),
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
    "betas too many": (edit(SCHEDULER, trained_betas=[0.1] * 15_000), "at most 10000"),
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
        edit(SCHEDULER, predict_epsilon="no"),
        "'predict_epsilon' = 'no'",
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
    monkeypatch.setattr(reading, "open", deny, raising=False)
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
    "class-conditional", "learned variance", "three times as many answers", "fourier times",
    "skip blocks on one channel",
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
    network = build_network(arguments, "unet", UNETS["UNet2DModel"], 10**9)
    check_runs(network, "unet", UNETS["UNet2DModel"], image_shape(network.config))
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


# ---------------------------------------------------------------- which weights


def network_of(folder, classes=None, **options):
    "The network of a folder, as a function of an image and a time."
    files = read_model_files(folder, **options).network
    return LOADERS[files.part](files, 10**9, classes)


def asked(network, x=IMAGE, t=TIMES):
    with torch.no_grad():
        out = network(x, t)
    return getattr(out, "sample", out)


SAVED = [{}, {"variant": "fp16"}, {"max_shard_size": "50KB"}]
SAVED.append(SAVED[1] | SAVED[2])


@pytest.mark.parametrize("saved", SAVED, ids=str)
@pytest.mark.parametrize("on_top", [False, True])
def test_weights_are_those_that_diffusers_opens(tmp_path, saved, on_top):
    "Alone, and beside other weights of each other layout."
    torch.manual_seed(1)
    pipeline = DDPMPipeline(tiny_unet(), DDPMScheduler())
    pipeline.save_pretrained(tmp_path, **saved)
    if on_top:
        no_folders(tmp_path)
    options = {name: value for name, value in saved.items() if name == "variant"}
    for given in (options, {}):
        assert torch.equal(asked(network_of(tmp_path, **given)), answer(pipeline.unet))
    if on_top:
        return
    for other in SAVED:
        if other != saved:  # in a folder of its own, since saving clears away shards
            another_unet().save_pretrained(tmp_path / "other", **other)
            shutil.copytree(tmp_path / "other", tmp_path / "unet", dirs_exist_ok=True)
    for given in (options, {}):
        theirs = DDPMPipeline.from_pretrained(tmp_path, **given).unet
        assert torch.equal(asked(network_of(tmp_path, **given)), answer(theirs))


def another_unet(**changes):
    unet = tiny_unet(**changes)
    unet.conv_in.bias.data += 1
    return unet


@pytest.mark.parametrize("name", ["fp32", "../x", "fp 16", "", ESCAPE, "a.b", "/etc/passwd"])
def test_a_variant_that_is_not_there(folder, name):
    refusal(check_folder, folder, 10**9, name)


@pytest.mark.parametrize("name, said", [
    (UNET, "is no file of weights; give a .safetensors"), (INDEX, "is no file of weights"),
    ("../x.safetensors", "lies out of the folder; give a file in it"),
    ("unet/../../x.safetensors", "lies out of"), ("{}/x.safetensors", "lies out of"),
    ("link/x.safetensors", "is a link that leads out"), ("link/../x.safetensors", "is a link"),
])  # fmt: skip
@unix
def test_a_variant_that_is_no_file_of_weights_here(folder, tmp_path, name, said):
    (tmp_path / "x.safetensors").write_bytes(b"x")
    (tmp_path / "there").mkdir()
    shutil.copy(tmp_path / "x.safetensors", tmp_path / "there")
    (folder / "link").symlink_to(tmp_path / "there")
    assert said in refusal(check_folder, folder, 10**9, name.format(tmp_path))


def test_a_latent_model_takes_a_variant_where_it_is(tmp_path):
    coder = AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=4, latent_channels=1, out_channels=1, in_channels=1
    )
    pipeline = LDMPipeline(coder, tiny_unet(), DDIMScheduler())
    edit_index = edit(INDEX, vae=["diffusers", "AutoencoderKL"], vqvae=None)
    pipeline.save_pretrained(tmp_path)
    (tmp_path / "vqvae").rename(tmp_path / "vae")
    edit_index(tmp_path)
    tiny_unet().save_pretrained(tmp_path / "unet", variant="fp16")
    found = read_model_files(tmp_path, variant="fp16")
    assert found.network.weights.names == (variant("fp16"),)
    assert found.coder.weights.names == ("vae/diffusion_pytorch_model.safetensors",)
    # A second decoder counts as well, whether it can be chosen or not.
    torch.manual_seed(3)
    for parameter in coder.parameters():
        parameter.data.add_(1)
    coder.save_pretrained(tmp_path / "vae", variant="ema")
    coder.save_pretrained(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/config.json").unlink()
    found = other_weights(tmp_path, read_model_files(tmp_path))
    assert found.differ == ("vae/diffusion_pytorch_model.ema.safetensors",)
    assert found.unseen == ("elsewhere/diffusion_pytorch_model.safetensors",)
    again = read_model_files(tmp_path, variant=found.differ[0])
    assert again.coder.weights.names == found.differ and again.network.weights.names == (WEIGHTS,)


@pytest.fixture
def sharded(honest, tmp_path):
    "The honest model in shards."
    folder = shutil.copytree(honest, tmp_path / "sharded")
    (folder / WEIGHTS).unlink()
    tiny_unet().save_pretrained(folder / "unet", max_shard_size="50KB")
    return folder


def rewrite(change):
    "Change the index of shards, given its map and the names of its shards."

    def attack(folder):
        path = folder / f"{WEIGHTS}.index.json"
        index = json.loads(path.read_text())
        change(index, sorted(set(index["weight_map"].values())))
        path.write_text(json.dumps(index))

    return attack


def twice(folder):
    shards = sorted((folder / "unet").glob("*.safetensors"))
    tensors = load_file(shards[0])
    save_file(tensors | {BIAS: torch.zeros(8)}, shards[0])
    save_file(load_file(shards[-1]) | {BIAS: torch.ones(8)}, shards[-1])


def shard_elsewhere(folder):
    shard = sorted((folder / "unet").glob("*.safetensors"))[0]
    elsewhere(shard.relative_to(folder))(folder)


def map_to(value, key=BIAS):
    return rewrite(lambda index, names: index["weight_map"].update({key: value}))


INDEX_LIES = {
    "another shard": (rewrite(lambda i, n: i["weight_map"].update({BIAS: n[-1]})), "index"),
    "a shard that is missing": (lambda f: next((f / "unet").glob("*1-of*")).unlink(), "not there"),
    "a path": (map_to("../unet/x.safetensors"), "pattern"),
    "an absolute path": (map_to("/etc/passwd"), "pattern"),
    "a pickle": (map_to("x.bin"), "pattern"),
    "a hidden file": (map_to(".x.safetensors"), "pattern"),
    "no text": (map_to(1), "valid string"),
    "a stowaway": (
        rewrite(lambda i, n: i["weight_map"].update(stowaway=n[0])),
        "'stowaway' is not",
    ),
    "a tensor unnamed": (rewrite(lambda i, n: i["weight_map"].pop(BIAS)), "does not name it"),
    "a tensor in two shards": (twice, "does not name it there"),
    "no tensors": (rewrite(lambda i, n: i.update(weight_map={})), "at least 1"),
    "no metadata": (rewrite(lambda i, n: i.pop("metadata")), "'metadata'"),
    "another size": (rewrite(lambda i, n: i["metadata"].update(total_size=1)), "total_size"),
    "a code": (rewrite(lambda i, n: i.update(auto_map={})), "'auto_map'"),
    "a list": (put(f"{WEIGHTS}.index.json", "[]"), "JSON object"),
    "a shard elsewhere": (shard_elsewhere, "leads out"),
}


@unix
@pytest.mark.parametrize("attack, words", INDEX_LIES.values(), ids=INDEX_LIES)
def test_an_index_of_shards_that_lies(sharded, attack, words):
    check_folder(sharded)
    attack(sharded)
    assert re.search(words, refusal(check_folder, sharded))


def test_shards_share_the_limit_and_the_checksum(sharded, honest):
    files = read_model_files(sharded).network.weights
    assert len(files.paths) > 2 and files.size == sum(p.stat().st_size for p in files.paths)
    check_folder(sharded, files.size)
    assert "at most" in refusal(check_folder, sharded, files.size - 1)
    lines = [f"{files_sha(path)}  {path.name}\n" for path in files.paths]
    assert files.sha256 == hashlib.sha256("".join(lines).encode()).hexdigest()
    one = read_model_files(honest).network.weights
    assert one.sha256 == files_sha(honest / WEIGHTS)


def files_sha(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


# ---------------------------------------------------------------- other weights


def save_state(name, key="conv_in.weight"):
    def attack(folder):
        (folder / name).parent.mkdir(exist_ok=True)
        torch.save({key: torch.zeros(1)}, folder / name)

    return attack


def save_tensors(name, change=dict):
    "The scanned tensors after a change, in another file."

    def attack(folder):
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        tensors = change(load_file(folder / WEIGHTS))
        save_file({key: value.contiguous() for key, value in tensors.items()}, folder / name)

    return attack


def scaled(tensors):
    return tensors | {BIAS: tensors[BIAS] * 1.001}


def cast(dtype):
    return lambda tensors: {key: value.to(dtype) for key, value in tensors.items()}


EMA = "unet_ema/diffusion_pytorch_model.safetensors"
TOP = "diffusion_pytorch_model.safetensors"


def ema_with(**changes):
    "Equal weights, with a config of their own."

    def attack(folder):
        save_tensors(EMA)(folder)
        shutil.copy(folder / UNET, folder / "unet_ema/config.json")
        edit("unet_ema/config.json", **changes)(folder)

    return attack


def in_shards(folder):
    another_unet().save_pretrained(folder / "unet", variant="ema", max_shard_size="50KB")


SHARDS = "unet/diffusion_pytorch_model.safetensors.index.ema.json"
OTHERS = {  # what lies there -> what differs, what cannot be looked at
    "nothing": (lambda folder: None, (), ()),
    "a copy": (save_tensors(variant("copy")), (), ()),
    "float16": (save_tensors(variant("fp16"), cast(torch.float16)), (), ()),
    "bfloat16": (save_tensors(TOP, cast(torch.bfloat16)), (), ()),
    "float64": (save_tensors(TOP, cast(torch.float64)), (), ()),
    "another variant": (save_tensors(variant("fp16"), scaled), (variant("fp16"),), ()),
    "at the top": (save_tensors(TOP, scaled), (TOP,), ()),
    "an average": (save_tensors(EMA, scaled), (EMA,), ()),
    "in shards": (in_shards, (SHARDS,), ()),
    "an average with its config": (ema_with(), (), ()),
    "with its default config": (ema_with(dropout=0.0, _diffusers_version="0.1"), (), ()),
    "with another config": (ema_with(flip_sin_to_cos=False), (), (EMA,)),
    "with a hostile config": (ema_with(auto_map={}), (), (EMA,)),
    "a pickle": (save_state("unet/diffusion_pytorch_model.bin"), (),
                 ("unet/diffusion_pytorch_model.bin",)),
    "a checkpoint": (save_state("model.CKPT"), (), ("model.CKPT",)),
    "flax": (put("unet/diffusion_flax_model.msgpack", b"x"), (),
             ("unet/diffusion_flax_model.msgpack",)),
    "what a trainer keeps": (save_state("optimizer.bin"), (), ()),
    "a trainer's states": (save_state("random_states_0.pkl"), (), ()),
    "a trigger of ours": (save_tensors("trigger.safetensors", lambda w: {"r": w[BIAS]}), (), ()),
    "other tensors": (save_tensors("lora.safetensors", lambda w: {"t": w[BIAS]}), (),
                      ("lora.safetensors",)),
    "integers": (save_tensors("steps.safetensors", lambda w: {"t": torch.arange(3)}), (),
                 ("steps.safetensors",)),
    "of an unknown kind": (put("unet/weights.sft", b"x"), (), ("unet/weights.sft",)),
    "what says nothing": (put("LICENSE", b"x"), (), ()),
    "another shape": (save_tensors(TOP, lambda w: w | {BIAS: torch.zeros(9)}), (), (TOP,)),
    "some of the tensors": (save_tensors(TOP, lambda w: {BIAS: w[BIAS]}), (), (TOP,)),
    "behind a prefix": (
        save_tensors(TOP, lambda w: {f"module.{k}": v for k, v in w.items()}), (), (TOP,)),
    "a part of another network": (
        save_tensors(TOP, lambda w: {f"decoder.{BIAS}": w[BIAS]}), (), (TOP,)),
    "damaged": (put(TOP, b"12345"), (), (TOP,)),
    "an index that lies": (put(f"{TOP}.index.json", "{}"), (), (f"{TOP}.index.json",)),
    "NaN": (save_tensors(TOP, lambda w: w | {BIAS: w[BIAS] * math.nan}), (TOP,), ()),
}  # fmt: skip


@pytest.mark.parametrize("attack, differ, unseen", OTHERS.values(), ids=OTHERS)
def test_other_weights(folder, attack, differ, unseen):
    attack(folder)
    found = other_weights(folder, read_model_files(folder))
    assert found == OtherWeights(differ, unseen)
    for name in differ:
        again = read_model_files(folder, variant=name)
        assert set(again.network.weights.shapes) == set(load_file(folder / WEIGHTS))


@unix
@pytest.mark.parametrize("closed", ["unet/hidden", "hidden.md", "."])
def test_a_folder_that_is_closed_is_named(folder, monkeypatch, closed):
    (folder / closed).mkdir(exist_ok=True)
    before = fingerprint(folder)
    scandir = os.scandir

    def refuse(path):
        if Path(path) == folder / closed:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert other_weights(folder, read_model_files(folder)).unseen == (f"{closed}/",)
    assert fingerprint(folder) != before      # who opens it is scanned anew


def test_other_weights_behind_links(folder, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    shutil.copy(folder / WEIGHTS, outside / "x.safetensors")
    (folder / "unet_ema").symlink_to(outside)
    (folder / "y.safetensors").symlink_to(outside / "x.safetensors")
    found = other_weights(folder, read_model_files(folder))
    assert found == OtherWeights((), ("unet_ema/", "y.safetensors"))


def shrunk(place, factor=1e-8, of="to_v.weight"):
    "Some numbers so small that float16 loses them, and the next layer can restore them."
    def change(tensors):
        for key in [key for key in tensors if of in key]:
            tensors[key][place] *= factor
        return tensors

    return change


TOO_SMALL = {
    "a layer": shrunk(...), "a row": shrunk(3), "a column": shrunk((slice(None), 3)),
    "half lost": shrunk(3, 1e-6), "a norm": shrunk(2, of="group_norm.weight"),
    "a channel": shrunk((slice(None), 2), of="conv1.weight"),
    "all biases": shrunk(..., of="conv_out.bias"),
}  # fmt: skip


@pytest.mark.parametrize("change", TOO_SMALL.values(), ids=TOO_SMALL)
def test_what_half_precision_loses_is_no_rounding(folder, change):
    save_tensors(WEIGHTS, change)(folder)
    save_tensors(variant("fp16"), cast(torch.float16))(folder)
    found = other_weights(folder, read_model_files(folder))
    assert found == OtherWeights((variant("fp16"),), ())
    found = other_weights(folder, read_model_files(folder, variant="fp16"))
    assert found == OtherWeights((WEIGHTS,), ())       # whichever of the two is scanned
    save_tensors(variant("fp16"), cast(torch.bfloat16))(folder)     # it loses nothing there
    assert other_weights(folder, read_model_files(folder)) == OtherWeights((), ())


def test_what_half_precision_would_lose_is_no_copy_in_full_precision(folder):
    "An attention layer whose values are 0 here, and 1e-8 there; its output undoes the scale."
    louder = shrunk(..., 1e8, "to_out.0.weight")
    save_tensors(variant("non_ema"), lambda w: louder(shrunk(..., of="to_v.")(w)))(folder)
    save_tensors(WEIGHTS, lambda w: louder(shrunk(..., 0, "to_v.")(w)))(folder)
    found = other_weights(folder, read_model_files(folder))
    assert found == OtherWeights((variant("non_ema"),), ())
    scanned, other = (network_of(folder, variant=name) for name in (None, "non_ema"))
    assert not torch.allclose(asked(scanned), asked(other), rtol=0.01)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_rounded_copy_with_small_numbers_in_it_is_a_copy(folder, dtype):
    "As training leaves them: a few numbers of each layer are next to nothing."
    def change(tensors):
        for tensor in tensors.values():
            if tensor.ndim > 1:
                tensor.view(-1)[1::37] *= 1e-7
        return tensors

    save_tensors(WEIGHTS, change)(folder)
    save_tensors(variant("half"), cast(dtype))(folder)
    assert other_weights(folder, read_model_files(folder)) == OtherWeights((), ())


def test_old_names_in_shards_are_unknown_to_diffusers(sharded):
    index = json.loads((sharded / f"{WEIGHTS}.index.json").read_text())
    index["weight_map"] = {}
    for shard in (sharded / "unet").glob("*.safetensors"):
        tensors = load_file(shard)
        old_names(tensors)
        save_file(tensors, shard)
        index["weight_map"] |= dict.fromkeys(tensors, shard.name)
    (sharded / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    assert "old name" in refusal(load_unet, sharded)


def test_fuzz_of_other_weights(folder, sharded):
    "Whatever lies beside the scanned weights, it is named or it is a copy; nothing else happens."
    rng = random.Random(3)
    good = (folder / WEIGHTS).read_bytes()
    index = (sharded / f"{WEIGHTS}.index.json").read_bytes()
    for shard in (sharded / "unet").glob("*-of-*"):
        shutil.copy(shard, folder / "unet")
    files = read_model_files(folder)
    head = 8 + int.from_bytes(good[:8], "little")
    for _ in range(60):
        (folder / TOP).write_bytes(mutated(good[:head], rng) + good[head:])
        (folder / f"unet/{TOP}.index.x.json").write_bytes(mutated(index, rng))
        found = other_weights(folder, files)
        assert all(isinstance(name, str) for name in found.differ + found.unseen)
        for options in ({}, {"variant": "x"}, {"variant": TOP}):
            try:
                read_model_files(folder, **options)
            except CheckpointError as error:
                assert str(error).isprintable()


def test_the_plain_weights_are_others_of_a_variant(folder):
    save_tensors(variant("fp16"), scaled)(folder)
    found = other_weights(folder, read_model_files(folder, variant="fp16"))
    assert found == OtherWeights((WEIGHTS,), ())


def test_other_weights_are_bounded_in_time(folder):
    "Thousands of files are named, not opened."
    for number in range(300):
        (folder / f"{number}.safetensors").write_bytes(b"x" * 9)
        (folder / f"{number}.safetensors.index.json").write_text("{}")
    start = time.process_time()
    found = other_weights(folder, read_model_files(folder))
    assert len(found.unseen) == 600 and time.process_time() - start < 2


def test_a_checkpoint_of_the_training_inside_a_model(folder):
    "What the refusal of such a checkpoint proposes."
    save_tensors("checkpoint-500/unet/diffusion_pytorch_model.safetensors", scaled)(folder)
    shutil.copy(folder / UNET, folder / "checkpoint-500/unet")
    name = re.search(r"--variant (\S+)", refusal(check_folder, folder / "checkpoint-500"))[1]
    assert other_weights(folder, read_model_files(folder)).differ == (name,)
    assert read_model_files(folder, variant=name).network.weights.names == (name,)


DIGEST = "0123456789abcdef" * 4
BOOKKEEPING = [   # of git, of git-lfs and of the hub's client
    ".git/HEAD", ".git/config", ".git/index", ".git/packed-refs", ".git/COMMIT_EDITMSG",
    ".git/description", ".git/hooks/pre-push.sample", ".git/info/exclude", ".git/logs/HEAD",
    ".git/logs/refs/remotes/origin/HEAD", f".git/objects/ab/{DIGEST[:38]}",
    f".git/objects/pack/pack-{DIGEST[:40]}.pack", f".git/objects/pack/pack-{DIGEST[:40]}.idx",
    ".git/refs/heads/feature/one", ".git/refs/tags/v1.0", f".git/lfs/objects/01/23/{DIGEST}",
    ".git/modules/part/objects/info/commit-graph", ".cache/huggingface/CACHEDIR.TAG",
    ".cache/huggingface/.gitignore", ".cache/huggingface/download/model_index.json.metadata",
    ".cache/huggingface/download/unet/diffusion_pytorch_model.safetensors.lock",
    ".cache/huggingface/download/unet/diffusion_pytorch_model.safetensors.metadata",
    f".cache/huggingface/download/unet/{DIGEST}.incomplete",
]  # fmt: skip


def keep_books(folder):
    for name in BOOKKEEPING:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    (folder / ".git/refs/empty").mkdir()


@pytest.mark.parametrize("place", [".git", ".cache/huggingface", ".git/objects/ab", ".huggingface"])
def test_nothing_hides_among_what_tools_keep(folder, tmp_path, place):
    keep_books(folder)
    keep_books(tmp_path)
    assert other_weights(folder, read_model_files(folder)) == OtherWeights((), ())
    assert left_over(tmp_path, find_models(tmp_path)) == []
    hidden = tmp_path / place / "hidden"
    shutil.copytree(folder, hidden, ignore=shutil.ignore_patterns(".git", ".cache"))
    assert find_models(tmp_path) == sorted([hidden, folder])
    for name in ("x.safetensors", "x.ckpt", "x.zip", "x.sft", "deep/er/x.bin"):
        (hidden.parent / name).parent.mkdir(parents=True, exist_ok=True)
        (hidden.parent / name).write_bytes(b"x")
        assert left_over(tmp_path, find_models(tmp_path)) == [hidden.parent / name]
        (hidden.parent / name).unlink()
    save_tensors(f"{place}/x.safetensors", scaled)(folder)
    save_state(f"{place}/x.bin")(folder)
    found = other_weights(folder, read_model_files(folder))
    assert found == OtherWeights((f"{place}/x.safetensors",), (f"{place}/x.bin",))


def test_the_root_of_the_hubs_cache_is_a_folder_of_models(folder, tmp_path):
    hub = tmp_path / "hub"
    first = cached(folder, hub)
    other = cached(folder, hub, "org/other")
    repo = first.parents[1]
    (repo / "refs/pr").mkdir(parents=True)
    (repo / "refs/main").write_text(SHA)
    (repo / "refs/pr/1").write_text(SHA)
    (repo / ".no_exist" / SHA).mkdir(parents=True)
    (repo / ".no_exist" / SHA / "unet.safetensors").touch()
    assert find_models(hub) == [first, other]
    assert left_over(hub, [first, other]) == []
    orphan = repo / "blobs" / f"{99:040x}"
    shutil.copy(folder / UNET, orphan)
    hidden = repo / "refs/x"
    shutil.copy(folder / UNET, hidden)
    assert left_over(hub, [first, other]) == sorted([orphan, hidden])
    # A link from another repository, or of somebody else, does not make it a snapshot's.
    (other / "x.safetensors").symlink_to(orphan)
    assert orphan in left_over(hub, [first, other])
    # Nor is a file with a name of its own a blob, or a link a reference, or a circle the end.
    named, link = repo / "blobs/evil.safetensors", repo / "refs/y.safetensors"
    shutil.copy(folder / UNET, named)
    (first / "notes.md").symlink_to("../../blobs/evil.safetensors")
    link.symlink_to(tmp_path / "model" / UNET)
    (repo / "snapshots/a").symlink_to("b")
    (repo / "snapshots/b").symlink_to("a")
    assert {named, link} <= set(left_over(hub, [first, other]))


def test_what_tools_keep_is_looked_through_within_bounds(folder, tmp_path):
    place = tmp_path / "a/b/c/.git/1/2/3/4/5/6"
    shutil.copytree(folder, place / "7")
    assert left_over(tmp_path, find_models(tmp_path)) == [place]
    again = tmp_path / "a/.git/.git/.git/.git/.git/.git/.git"
    again.mkdir(parents=True)
    assert again in left_over(tmp_path, find_models(tmp_path))


def test_a_folder_of_too_many_files(folder, monkeypatch):
    monkeypatch.setattr(checkpoints, "MAX_FILES", 6)
    found = other_weights(folder, read_model_files(folder))
    assert found.unseen == ("what is beyond 6 files",)


# ---------------------------------------------------------------- the hub's cache


@unix
def test_a_snapshot_of_the_hub(honest, tmp_path):
    snapshot = cached(honest, tmp_path)
    assert torch.equal(asked(network_of(snapshot)), answer(load_unet(honest)))
    assert check_folder(snapshot) == snapshot.resolve() and model_name(snapshot) == "org/name"
    (tmp_path / "link").symlink_to(snapshot)
    assert model_name(tmp_path / "link") == "org/name"
    assert find_models(tmp_path / "models--org--name") == [snapshot]
    assert other_weights(snapshot, read_model_files(snapshot)) == OtherWeights((), ())


def blobs_elsewhere(snapshot):
    blobs = snapshot.parents[1] / "blobs"
    blobs.rename(snapshot.parents[2] / "loot")
    blobs.symlink_to(snapshot.parents[2] / "loot")


def relink(target):
    def attack(snapshot):
        (snapshot / UNET).unlink()
        (snapshot / UNET).symlink_to(target(snapshot))

    return attack


SNAPSHOT_LIES = {
    "blobs are elsewhere": blobs_elsewhere,
    "a file of another repository": relink(lambda s: s.parents[2] / "models--a--b/blobs/12"),
    "a file of another revision": relink(lambda s: s.parent / ("b" * 40) / "config.json"),
    "a file of the system": relink(lambda s: Path("/etc/passwd")),
    "the folder of blobs": relink(lambda s: s.parents[1] / "blobs"),
    "no revision": lambda s: s.rename(s.parent / "main") and None,
}


@unix
@pytest.mark.parametrize("attack", SNAPSHOT_LIES.values(), ids=SNAPSHOT_LIES)
def test_a_snapshot_with_links_elsewhere(honest, tmp_path, attack):
    snapshot = cached(honest, tmp_path)
    for place in ("models--a--b/blobs", f"models--org--name/snapshots/{'b' * 40}"):
        (tmp_path / place).mkdir(parents=True)
    shutil.copy(honest / UNET, tmp_path / "models--a--b/blobs/12")
    shutil.copy(honest / UNET, snapshot.parent / ("b" * 40) / "config.json")
    attack(snapshot)
    place = snapshot if snapshot.exists() else snapshot.parent / "main"
    assert "leads out" in refusal(check_folder, place)


@unix
def test_the_cache_when_the_hub_is_out_of_reach(hub, honest, monkeypatch, tmp_path):
    old = cached(honest, tmp_path / "hub", "user/name", "c" * 40)
    os.utime(old.parents[1] / "blobs" / f"{0:040x}", (1, 1))
    new = cached(honest, tmp_path / "hub", "user/name", "d" * 40)
    hub.error = ConnectionError("no network")
    assert download_model("user/name", 10**6) == (new.resolve(), [])  # the newest
    check_hub("user/name")
    (new.parents[1] / "refs").mkdir()
    (new.parents[1] / "refs/main").write_text("c" * 40)
    assert download_model("user/name", 10**6) == (old, [])
    (old / WEIGHTS).unlink()
    assert "no weights" in refusal(check_hub, "user/name")
    assert "ConnectionError" in refusal(check_hub, "user/other")
    assert check_folder("user/name") is None
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "no weights" in refusal(check_folder, "user/name")


def test_an_answer_of_the_hub_is_not_replaced_by_the_cache(hub, honest, tmp_path):
    cached(honest, tmp_path / "hub", "user/name")
    for status, error in ((404, CheckpointError), (503, None)):
        response = SimpleNamespace(status_code=status, headers={}, request=None)
        hub.error = huggingface_hub.errors.HfHubHTTPError("no", response=response)
        if error:
            assert "HfHubHTTPError" in refusal(download_model, "user/name", 10**6)
        else:
            assert download_model("user/name", 10**6)[0].name == SHA


# ---------------------------------------------------------------- networks


def score_unet():
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8, layers_per_block=1, block_out_channels=(32, 32), norm_num_groups=8,
        down_block_types=("SkipDownBlock2D", "AttnSkipDownBlock2D"),
        up_block_types=("AttnSkipUpBlock2D", "SkipUpBlock2D"), time_embedding_type="fourier",
    )  # fmt: skip


@pytest.mark.parametrize("how", ["both", "both, half", "different", "other type", "alone"])
def test_fourier_features_under_two_names(tmp_path, how):
    DDPMPipeline(score_unet(), ScoreSdeVeScheduler()).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    features = tensors["time_proj.weight"]
    if how == "both, half":
        tensors = {key: value.half() for key, value in tensors.items()}
        features = features.half()
    twin = {"different": features + 1e-6, "other type": features.half()}.get(how, features.clone())
    tensors["time_proj.W"] = twin
    if how == "alone":
        del tensors["time_proj.weight"]
    save_file(tensors, tmp_path / WEIGHTS)
    if how in ("different", "other type"):
        assert "the two differ" in refusal(load_unet, tmp_path)
    elif how == "alone":  # diffusers would draw them at random
        assert "time_proj" in refusal(load_unet, tmp_path)
    else:
        theirs = UNet2DModel.from_pretrained(tmp_path / "unet").float()
        x = torch.randn(2, 3, 8, 8)
        t = torch.tensor([0.1, 20.0])
        assert torch.equal(asked(load_unet(tmp_path), x, t), asked(theirs.eval(), x, t))


def conditional_unet(**changes):
    torch.manual_seed(0)
    arguments = {
        "sample_size": 8, "in_channels": 1, "out_channels": 1, "layers_per_block": 1,
        "norm_num_groups": 4, "block_out_channels": (8, 16), "mid_block_type": "UNetMidBlock2D",
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "attention_head_dim": 4,
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }  # fmt: skip
    return UNet2DConditionModel(**arguments | changes)


CLASSES = {"num_class_embeds": 3}
NUMBERED = CLASSES | {"class_embed_type": "timestep"}
BOTH = [{}, {"out_channels": 2}, CLASSES, NUMBERED, NUMBERED | {"out_channels": 2}]


@pytest.mark.parametrize("changes", BOTH, ids=str)
@pytest.mark.parametrize("make", [tiny_unet, conditional_unet])
def test_classes_and_variances(tmp_path, make, changes):
    "Whatever the class, the answer is diffusers' own: for all classes, and without a variance."
    DDPMPipeline(make(**changes), DDPMScheduler()).save_pretrained(tmp_path)
    theirs = make(**changes).eval()
    text = (None,) if make is conditional_unet else ()
    labels = [torch.full((2,), n) for n in range(3)] if "num_class_embeds" in changes else [None]
    with torch.no_grad():
        answers = [theirs(IMAGE, TIMES, *text, class_labels=n).sample[:, :1] for n in labels]
    ours = network_of(tmp_path)
    assert torch.allclose(asked(ours), torch.stack(answers).mean(0), atol=1e-6)
    assert image_shape(ours.config) == (1, 8, 8)
    files = read_model_files(tmp_path).network
    assert asked(LOADERS["unet"](files, 10**9)).shape == IMAGE.shape


def test_a_sample_of_many_classes(tmp_path):
    unet = tiny_unet(num_class_embeds=1001).eval()
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path)
    some = network_of(tmp_path)
    assert some.passes_per_row == 16 and some.asked == ", mean over 16 of 1,001 classes"
    assert torch.equal(some.labels, network_of(tmp_path).labels)
    few = network_of(tmp_path, classes=3)
    with torch.no_grad():
        answers = [unet(IMAGE, TIMES, label.expand(2)).sample for label in few.labels]
    assert torch.allclose(asked(few), torch.stack(answers).mean(0), atol=1e-6)
    every = network_of(tmp_path, classes=5000)
    assert every.asked == ", mean over 1,001 classes"


CONDITIONS = {
    "cross attention": ({"down_block_types": ["CrossAttnDownBlock2D"] * 2}, "asks for a text"),
    "simple cross attention": (
        {"up_block_types": ["SimpleCrossAttnUpBlock2D"] * 2}, "asks for a text"),
    "the default middle": ({"mid_block_type": ...}, "is not given.*asks for a text"),
    "a text encoder": ({"encoder_hid_dim": 8}, "asks for a text or a picture"),
    "added conditions": ({"addition_embed_type": "text_time"}, "asks for a text, a picture"),
    "a guidance": ({"time_cond_proj_dim": 8}, "the strength of a guidance"),
    "a vector": ({"class_embed_type": "projection"}, "a vector of numbers"),
    "boxes": ({"attention_type": "gated"}, "'attention_type' = 'gated'"),
    "fourier times": ({"time_embedding_type": "fourier"}, "'time_embedding_type'"),
}  # fmt: skip


@pytest.mark.parametrize("changes, words", CONDITIONS.values(), ids=CONDITIONS)
def test_a_conditional_unet_with_conditions(tmp_path, changes, words):
    DDPMPipeline(conditional_unet(), DDPMScheduler()).save_pretrained(tmp_path)
    check_folder(tmp_path)
    for key, value in changes.items():
        drop(UNET, key)(tmp_path) if value is ... else edit(UNET, **{key: value})(tmp_path)
    assert re.search(words, refusal(check_folder, tmp_path))


def test_a_size_is_asked_for(folder):
    for change in (edit(UNET, sample_size=None), drop(UNET, "sample_size")):
        change(folder)
        assert "--size" in refusal(check_folder, folder)
        assert check_folder(folder, size=8) == folder.resolve()
        for wrong in (0, 10**6, -1):
            assert "'sample_size'" in refusal(check_folder, folder, 10**9, None, wrong)
        assert image_shape(network_of(folder, size=16).config) == (1, 16, 16)


def test_a_config_with_keys_that_diffusers_ignores(folder):
    plain = answer(load_unet(folder))
    edit(UNET, my_note="from run 7", prediction_type="sample", ema_decay=0.9)(folder)
    files = read_model_files(folder)
    assert files.network.ignored == ("ema_decay", "my_note", "prediction_type")
    assert "ema_decay, my_note, prediction_type" in files.warnings[0]
    assert torch.equal(asked(network_of(folder)), plain)
    theirs = UNet2DModel.from_pretrained(folder / "unet")
    assert torch.equal(answer(theirs), plain)  # the oracle: it is ignored there as well


# ---------------------------------------------------------------- what a thing is


def write(name, content=b"{}"):
    def make(place):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(content)
        return place / name

    return make


def folder_with(name, content=b"{}"):
    return lambda place: write(f"thing/{name}", content)(place) and place / "thing"


def copy_of(honest, *parts):
    def make(place):
        for part in parts:
            shutil.copytree(honest / "unet", place / "thing" / part)
        return place / "thing"

    return make


THINGS = {
    "a pickle": (write("a.bin", b"x"), "a pickle.*`terd convert FILE OUT`"),
    "a checkpoint": (write("a.ckpt", b"x"), "a pickle.*`terd convert FILE OUT`"),
    "a pickle by its bytes": (write("a.weights", b"\x80\x04"), "a pickle"),
    "a zip": (write("a.zip", b"x"), "an archive; unpack it"),
    "a zip by its bytes": (write("a", b"PK\3\4"), "an archive"),
    "a tar": (write("a.tar.gz", b"x"), "an archive"),
    "safetensors": (write("a.safetensors"), "one file of weights"),
    "another format": (write("a.onnx"), r"a format of its own \(.onnx\)"),
    "an index": (write("model_index.json"), "the folder that it lies in"),
    "a picture": (write("a.png"), "a file of another kind"),
    "no suffix": (write("README"), "a file of another kind"),
    "an empty folder": (lambda place: place, "is empty"),
    "a folder of a pickle": (folder_with("a.pth"), "`terd convert FOLDER OUT`"),
    "a folder of an archive": (folder_with("a.zip"), "holds an archive"),
    "a LoRA": (folder_with("pytorch_lora_weights.safetensors"), "adapter.*merge it"),
    "a LoRA of kohya": (folder_with("My-LoRA-v2.safetensors"), "adapter.*merge it"),
    "no LoRA": (folder_with("exploration.txt"), "holds no model_index.json"),
    "a word in a word": (folder_with("flora.safetensors"), "holds no model_index.json"),
    "words on a LoRA": (folder_with("about-lora.md"), "holds no model_index.json"),
    "an adapter": (folder_with("adapter_config.json"), "adapter.*merge it"),
    "transformers": (
        folder_with("config.json", b'{"model_type": "bert"}'), "a model of transformers .'bert'"),
    "a broken config": (folder_with("config.json", b"{"), "no proper JSON"),
    "an autoencoder": (
        folder_with("config.json", b'{"_class_name": "AutoencoderKL"}'),
        "one network alone .'AutoencoderKL'.*scheduler is not there"),
    "a part of a model": (
        lambda place: write("model_index.json")(place) and folder_with("config.json")(place),
        "give its parent folder"),
    "a checkpoint of a training": (folder_with("unet/config.json"), "a checkpoint of a training"),
    "a checkpoint beside its model": (
        lambda place: write("model_index.json")(place) and folder_with("unet/config.json")(place),
        "--variant thing/unet/diffusion_pytorch_model.safetensors"),
    "notes": (folder_with("notes.md"), "no model of diffusers"),
}  # fmt: skip


@pytest.mark.parametrize("make, words", THINGS.values(), ids=THINGS)
def test_what_a_thing_is(tmp_path, make, words):
    path = make(tmp_path)
    message = refusal(check_folder, path)
    assert re.search(words, message) and ("; " in message or "to " in message)
    assert refusal(schedulers.load, path, "cpu") == message


def test_a_folder_of_models(honest, tmp_path):
    names = ["a", "b/c", "b/d/e"]
    for name in names:
        shutil.copytree(honest, tmp_path / name)
    shutil.copytree(honest, tmp_path / "a/checkpoint-500/nested")  # a part of a
    (tmp_path / ".hidden").mkdir()
    assert find_models(tmp_path) == [tmp_path / name for name in names]
    assert "a folder of 3 model(s), a, b/c, b/d/e" in refusal(check_folder, tmp_path)
    assert find_models(honest) == [honest] and find_models(honest / UNET) == []


@unix
def test_a_folder_of_links(honest, tmp_path):
    (tmp_path / "link").symlink_to(honest)
    (tmp_path / "circle").symlink_to(tmp_path)
    assert find_models(tmp_path) == []
    assert find_models(tmp_path / "link") == [tmp_path / "link"]  # it was given by name
    deep = tmp_path / "/".join("abcdefghij")
    shutil.copytree(honest, deep)
    assert find_models(tmp_path) == []


def test_what_is_not_there():
    assert what_it_is("/nowhere").startswith("no such folder: '/nowhere'")


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


def cached(folder, cache, repo_id="org/name", revision=SHA, names=None):
    "The folder as a snapshot in a cache of the hub: each file is a link to a blob."
    repo = cache / f"models--{repo_id.replace('/', '--')}"
    (repo / "blobs").mkdir(parents=True, exist_ok=True)
    snapshot = repo / "snapshots" / revision
    snapshot.mkdir(parents=True)
    for name in sizes(folder) if names is None else names:
        if not (folder / name).is_file():
            continue
        blob = repo / "blobs" / f"{len(list((repo / 'blobs').iterdir())):040x}"
        shutil.copy(folder / name, blob)
        link = snapshot / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


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

    def snapshot_download(repo_id, revision, allow_patterns):
        server.asked = SimpleNamespace(files=set(allow_patterns), revision=revision)
        return str(cached(server.content, tmp_path / "hub", repo_id, revision, allow_patterns))

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return server


def test_hub_gives_a_model(hub, tmp_path):
    hub.files |= {
        "pipeline.py": 1,
        "unet/diffusion_pytorch_model.bin": 10**12,
        "../../evil": 1,
        "unet/*": 1,
    }
    folder, left = download_model("user/name", 10**6)
    load(folder)
    assert left == ["unet/diffusion_pytorch_model.bin"]
    assert hub.asked.files == {INDEX, UNET, WEIGHTS, SCHEDULER} and hub.asked.revision == SHA
    assert folder == tmp_path / "hub/models--user--name/snapshots" / SHA
    assert model_name(folder) == "user/name"


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
    shard = WEIGHTS.replace(".safe", "-00001-of-00002.safe")
    names = [shard, variant("fp16"), WEIGHTS, index]
    stray = ["unet/notes.json", "unet/other.safetensors", "unet_ema/" + WEIGHTS.split("/")[1]]
    found = dict.fromkeys([*names, *stray], 1)
    assert sorted(wanted_files(found)) == sorted(names)
    assert left_on_hub(found | {"unet/a.bin": 1}) == ["unet/a.bin", *stray[1:]]


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
    assert denoiser.name == "user/name" and hub.asked.revision == SHA
    hub.error = ConnectionError("no network")
    assert "ConnectionError" in refusal(schedulers.load, "user/other", "cpu")
    assert schedulers.load("user/name", "cpu").name == "user/name"  # it is in the cache


def test_a_folder_may_have_any_bytes_for_a_name(folder, tmp_path):
    "On Linux; safetensors by itself takes names in UTF-8 alone."
    named = tmp_path / os.fsdecode(b"\xe9\xff")
    try:
        shutil.copytree(folder, named)
    except OSError:
        pytest.skip("this disk takes no such name")
    known, found = (load_folder(one, "cpu").network.state_dict() for one in (folder, named))
    assert found.keys() == known.keys() and all(map(torch.equal, found.values(), known.values()))
