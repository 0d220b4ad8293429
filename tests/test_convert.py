"""Workshops B5 and B7: pickles that are hostile or damaged, and networks of other code bases.

The originals are written here once more, in plain PyTorch and from their description, so that a
converted network has something to agree with."""

import json
import math
import os
import pickle
import signal
import subprocess
import sys
import time
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, ScoreSdeVeScheduler, UNet2DModel
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from terd_nb.loading.convert import (
    MAX_PICKLE,
    check_pickle,
    convert,
    pickled_weights,
    pickles_of,
    read_pickles,
    write_folder,
)
from terd_nb.loading.files import CheckpointError
from terd_nb.loading.schedulers import load
from terd_nb.loading.translate import translate

BIN = "unet/diffusion_pytorch_model.bin"
SAFE = "unet/diffusion_pytorch_model.safetensors"
unix = pytest.mark.skipif(os.name == "nt", reason="signals and limits are Unix's")


# ---------------------------------------------------------------- the originals, once more


def sines(t, channels):
    "Sines, then cosines of the times (N,) at channels / 2 frequencies from 1 to 1/10,000."
    half = channels // 2
    angles = t[:, None].float() * 10_000 ** (-torch.arange(half) / (half - 1))
    return torch.cat([angles.sin(), angles.cos()], 1)


class Pixelwise(nn.Module):
    "Score-SDE's NIN: a matrix (in, out) for each pixel."

    def __init__(self, wide, narrow):
        super().__init__()
        self.W, self.b = nn.Parameter(torch.empty(wide, narrow)), nn.Parameter(torch.empty(narrow))

    def forward(self, x):
        return (x.movedim(1, -1) @ self.W + self.b).movedim(-1, 1)


# How two code bases name the layers of a residual block and of an attention, and which kind of
# layer mixes channels pixel by pixel.
DDIM = {
    "block": ("norm1", "conv1", "temb_proj", "norm2", "conv2", "nin_shortcut"),
    "attention": ("norm", "q", "k", "v", "proj_out"),
    "pixelwise": lambda wide, narrow: nn.Conv2d(wide, narrow, 1),
    "conv": "conv",
    "groups": lambda channels: 32,
}
SDE = {
    "block": ("GroupNorm_0", "Conv_0", "Dense_0", "GroupNorm_1", "Conv_1", "NIN_0"),
    "attention": ("GroupNorm_0", "NIN_0", "NIN_1", "NIN_2", "NIN_3"),
    "pixelwise": Pixelwise,
    "conv": "Conv_0",
    "groups": lambda channels: 32,
}
NCSNPP = SDE | {"groups": lambda channels: min(channels // 4, 32)}


def norm(style, channels):
    return nn.GroupNorm(style["groups"](channels), channels, eps=1e-6)


def fir(x, up=False):
    "Half or twice the pixels, blurred by 1, 3, 3, 1 along both axes."
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
    kernel = (taps[:, None] * taps).expand(x.shape[1], 1, 4, 4)
    if not up:
        return F.conv2d(F.pad(x, (1, 1, 1, 1)), kernel, stride=2, groups=x.shape[1])
    return 4 * F.conv_transpose2d(x, kernel, stride=2, padding=1, groups=x.shape[1])


class Residual(nn.Module):
    def __init__(self, style, wide, narrow, times, way=None, scale=1.0):
        super().__init__()
        self.names, self.way, self.scale = style["block"], way, scale
        layers = [
            norm(style, wide),
            nn.Conv2d(wide, narrow, 3, padding=1),
            nn.Linear(times, narrow),
            norm(style, narrow),
            nn.Conv2d(narrow, narrow, 3, padding=1),
        ]
        for name, layer in zip(self.names, layers):
            self.add_module(name, layer)
        self.shortcut = None
        if scale != 1 and (way or wide != narrow):  # as in BigGAN
            self.shortcut = "Conv_2"
            self.add_module("Conv_2", nn.Conv2d(wide, narrow, 1))
        elif wide != narrow:
            self.shortcut = self.names[5]
            self.add_module(self.names[5], style["pixelwise"](wide, narrow))

    def forward(self, x, temb):
        norm1, conv1, dense, norm2, conv2 = (self.get_submodule(name) for name in self.names[:5])
        h = F.silu(norm1(x))
        if self.way:
            h, x = fir(h, self.way == "up"), fir(x, self.way == "up")
        h = conv1(h) + dense(F.silu(temb))[:, :, None, None]
        h = conv2(F.silu(norm2(h)))
        return (h + (self.get_submodule(self.shortcut)(x) if self.shortcut else x)) / self.scale


class Attention(nn.Module):
    def __init__(self, style, channels, scale=1.0):
        super().__init__()
        self.names, self.scale = style["attention"], scale
        self.add_module(self.names[0], norm(style, channels))
        for name in self.names[1:]:
            self.add_module(name, style["pixelwise"](channels, channels))

    def forward(self, x):
        group, q, k, v, out = (self.get_submodule(name) for name in self.names)
        h = group(x)
        q, k, v = (part(h).flatten(2) for part in (q, k, v))
        shares = torch.einsum("ncp,ncs->nps", q, k).div(math.sqrt(x.shape[1])).softmax(-1)
        return (x + out(torch.einsum("nps,ncs->ncp", shares, v).view_as(x))) / self.scale


class Resample(nn.Module):
    "By a factor of two, with a convolution or without weights."

    def __init__(self, style, channels, up, with_conv):
        super().__init__()
        self.up, self.name = up, style["conv"] if with_conv else None
        if with_conv:
            conv = nn.Conv2d(channels, channels, 3, 1 if up else 2, padding=int(up))
            self.add_module(self.name, conv)

    def forward(self, x):
        if self.up:
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        elif self.name:
            x = F.pad(x, (0, 1, 0, 1))
        else:
            return F.avg_pool2d(x, 2)
        return self.get_submodule(self.name)(x) if self.name else x


def drawn(network, seed=0):
    "The network with random weights and biases that keep its numbers near 1."
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            spread = 1 / math.sqrt(max(1, parameter[0].numel())) if parameter.ndim > 1 else 0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
    return network.eval()


class DdimNetwork(nn.Module):
    "The U-Net of DDIM's and TrojDiff's code."

    skip = False

    def __init__(self, ch=32, mult=(1, 2), blocks=1, attention=(1,), with_conv=True, colours=3):
        super().__init__()
        self.ch, self.levels = ch, len(mult)
        self.blocks, self.attention = blocks, attention
        widths = [ch * m for m in mult]
        self.temb = nn.Module()
        self.temb.dense = nn.ModuleList([nn.Linear(ch, 4 * ch), nn.Linear(4 * ch, 4 * ch)])
        self.conv_in = nn.Conv2d(colours, ch, 3, padding=1)
        self.down, self.mid, self.up = nn.ModuleList(), nn.Module(), nn.ModuleList()
        skips, now = [ch], ch
        for i, width in enumerate(widths):
            level = nn.Module()
            level.block, level.attn = nn.ModuleList(), nn.ModuleList()
            for _ in range(blocks):
                level.block.append(Residual(DDIM, now, width, 4 * ch))
                now = width
                skips.append(now)
                if i in attention:
                    level.attn.append(Attention(DDIM, now))
            if i < self.levels - 1:
                level.downsample = Resample(DDIM, now, False, with_conv)
                skips.append(now)
            self.down.append(level)
        self.mid.block_1 = Residual(DDIM, now, now, 4 * ch)
        self.mid.attn_1 = Attention(DDIM, now)
        self.mid.block_2 = Residual(DDIM, now, now, 4 * ch)
        for i in reversed(range(self.levels)):
            level = nn.Module()
            level.block, level.attn = nn.ModuleList(), nn.ModuleList()
            for _ in range(blocks + 1):
                level.block.append(Residual(DDIM, now + skips.pop(), widths[i], 4 * ch))
                now = widths[i]
                if i in attention:
                    level.attn.append(Attention(DDIM, now))
            if i:
                level.upsample = Resample(DDIM, now, True, with_conv)
            self.up.insert(0, level)
        self.norm_out = norm(DDIM, now)
        self.conv_out = nn.Conv2d(now, colours, 3, padding=1)

    def forward(self, x, t):
        first, second = self.temb.dense
        temb = second(F.silu(first(sines(t, self.ch))))
        skips = [self.conv_in(x)]
        for i, level in enumerate(self.down):
            for j, block in enumerate(level.block):
                h = block(skips[-1], temb)
                skips.append(level.attn[j](h) if i in self.attention else h)
            if i < self.levels - 1:
                skips.append(level.downsample(skips[-1]))
        h = self.mid.attn_1(self.mid.block_1(skips[-1], temb))
        h = self.mid.block_2(h, temb)
        for i in reversed(range(self.levels)):
            level = self.up[i]
            for j, block in enumerate(level.block):
                h = block(torch.cat([h, skips.pop()], 1), temb)
                h = level.attn[j](h) if i in self.attention else h
            h = level.upsample(h) if i else h
        return self.conv_out(F.silu(self.norm_out(h)))


class Frequencies(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.W = nn.Parameter(16 * torch.randn(channels), requires_grad=False)

    def forward(self, sigma):
        angles = 2 * math.pi * sigma.log()[:, None] * self.W
        return torch.cat([angles.sin(), angles.cos()], 1)


class Weightless(nn.Module):
    "Keeps a number in the list, as a pyramid's FIR filter does."


class SdeNetwork(nn.Module):
    """Score-SDE's DDPM, or its NCSN++ with pyramids of pictures (`skip`): each step of `plan` is
    what is done, and the module that does it."""

    def __init__(self, ch=32, mult=(1, 2), blocks=1, attention=(1,), skip=False, colours=3):
        super().__init__()
        self.ch, self.skip, self.plan, modules = ch, skip, [], []
        widths, scale = [ch * m for m in mult], math.sqrt(2) if skip else 1.0
        style = NCSNPP if skip else SDE

        def add(what, module):
            self.plan.append((what, module))
            modules.append(module)

        def block(wide, narrow, way=None):
            return Residual(style, wide, narrow, 4 * ch, way, scale)

        if skip:
            add("times", Frequencies(ch))
        add("linear", nn.Linear(2 * ch if skip else ch, 4 * ch))
        add("linear", nn.Linear(4 * ch, 4 * ch))
        add("in", nn.Conv2d(colours, ch, 3, padding=1))
        skips, now = [ch], ch
        for i, width in enumerate(widths):
            for _ in range(blocks):
                add("block", block(now, width))
                now = width
                if i in attention:
                    add("attention", Attention(style, now, scale))
                self.plan.append(("keep", None))
                skips.append(now)
            if i < len(mult) - 1:
                if skip:
                    add("block", block(now, now, "down"))
                    add("smaller picture", Weightless())
                    combine = nn.Module()
                    combine.Conv_0 = nn.Conv2d(colours, now, 1)
                    add("add picture", combine)
                else:
                    add("resample", Resample(style, now, False, True))
                self.plan.append(("keep", None))
                skips.append(now)
        add("block", block(now, now))
        add("attention", Attention(style, now, scale))
        add("block", block(now, now))
        for i in reversed(range(len(mult))):
            for _ in range(blocks + 1):
                self.plan.append(("join", None))
                add("block", block(now + skips.pop(), widths[i]))
                now = widths[i]
            if i in attention:
                add("attention", Attention(style, now, scale))
            if skip and i < len(mult) - 1:
                add("larger picture", Weightless())
            if skip:
                add("norm", norm(style, now))
                add("draw", nn.Conv2d(now, colours, 3, padding=1))
            if i and skip:
                add("block", block(now, now, "up"))
            elif i:
                add("resample", Resample(style, now, True, True))
        if not skip:
            add("norm", norm(style, now))
            add("draw", nn.Conv2d(now, colours, 3, padding=1))
        self.all_modules = nn.ModuleList(modules)
        self.register_buffer("sigmas", torch.logspace(1.7, -2, 100, dtype=torch.float64))

    def forward(self, x, t):
        temb, skips = (t if self.skip else sines(t, self.ch)), []
        x = 2 * x - 1 if self.skip else x
        picture, drawing, h = x, None, None
        for what, module in self.plan:
            if what == "times":
                temb = module(temb)
            elif what == "linear":
                temb = module(F.silu(temb)) if temb.shape[1] == 4 * self.ch else module(temb)
            elif what == "in":
                h = module(x)
                skips.append(h)
            elif what == "block":
                h = module(h, temb)
            elif what in ("attention", "resample"):
                h = module(h)
            elif what == "keep":
                skips.append(h)
            elif what == "join":
                h = torch.cat([h, skips.pop()], 1)
            elif what == "smaller picture":
                picture = fir(picture)
            elif what == "add picture":
                h = module.Conv_0(picture) + h
            elif what == "larger picture":
                drawing = fir(drawing, up=True)
            elif what == "norm":
                normed = F.silu(module(h))
            elif what == "draw":
                new = module(normed)
                drawing = new if drawing is None else drawing + new
        return drawing / t[:, None, None, None] if self.skip else drawing


# ---------------------------------------------------------------- the same answer


def difference(folder, original, times=(1, 500, 999), colours=3):
    "The largest difference of a folder's answers to the original's, of the largest answer."
    network = load(folder, "cpu").network
    x = torch.randn(3, colours, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = original(x, torch.tensor(times))
        errors = network(x, torch.tensor(times)).sample - theirs
    assert (theirs.flatten(1).std(1) * (torch.tensor(times) if original.skip else 1) > 0.05).all()
    return (errors.flatten(1).abs().amax(1) / theirs.flatten(1).abs().amax(1)).max().item()


def translated(weights, folder, size):
    folder.mkdir()
    write_folder(folder, translate(weights, size))
    return folder


DDIM_SHAPES = {
    "two levels": {},
    "like CIFAR-10's": {"mult": (1, 2, 2, 2), "blocks": 2, "attention": (1,)},
    "like CelebA's": {"mult": (1, 2, 2, 2, 4), "blocks": 2, "attention": (2,)},
    "no attention": {"attention": ()},
    "attention everywhere": {"attention": (0, 1)},
    "resampled without weights": {"mult": (1, 2, 2), "attention": (1,), "with_conv": False},
    "one level": {"mult": (1,), "attention": (0,)},
    "grey": {"colours": 1},
    "three blocks, narrower below": {"blocks": 3, "mult": (1, 3, 1), "attention": (1,)},
}


@pytest.mark.parametrize("shape", DDIM_SHAPES.values(), ids=DDIM_SHAPES)
def test_a_ddim_network_answers_like_the_original(shape, tmp_path):
    original = drawn(DdimNetwork(**shape))
    attention = shape.get("attention", (1,))
    size = None if len(attention) == 1 else 16
    out = translated(original.state_dict(), tmp_path / "out", size)
    assert difference(out, original, colours=shape.get("colours", 3)) < 1e-5
    side = json.loads((out / "unet/config.json").read_text())["sample_size"]
    assert side == (size or 16 * 2 ** attention[0])


def as_score_sde(network, ema=None):
    "What Score-SDE's code saves: the EMA copy is a list, of what is trained."
    shadow = [p.detach() for p in (ema or network).parameters() if p.requires_grad]
    state = {f"module.{name}": tensor for name, tensor in network.state_dict().items()}
    return {
        "optimizer": {"state": {}, "param_groups": []},
        "model": OrderedDict(state),
        "ema": {"decay": 0.999, "num_updates": 7, "shadow_params": shadow},
        "step": 1000,
    }


SDE_SHAPES = {
    "DDPM": {},
    "DDPM like CIFAR-10's": {"mult": (1, 2, 2, 2), "blocks": 2},
    "DDPM with much attention": {"mult": (1, 2, 2), "attention": (0, 2)},
    "DDPM, attention below": {"ch": 64, "mult": (1, 1), "attention": (1,), "blocks": 3},
    "NCSN++": {"ch": 64, "skip": True},
    "NCSN++, narrow above": {"mult": (1, 4), "skip": True},
    "NCSN++ with more levels": {"ch": 64, "mult": (1, 2, 2), "blocks": 2, "skip": True},
    "NCSN++ without attention": {"mult": (1, 2, 2), "attention": (), "skip": True},
}


@pytest.mark.parametrize("shape", SDE_SHAPES.values(), ids=SDE_SHAPES)
def test_a_score_sde_network_answers_like_the_original(shape, tmp_path):
    original = drawn(SdeNetwork(**shape))
    size = None if len(shape.get("attention", (1,))) == 1 else 16
    out = translated(original.state_dict(), tmp_path / "out", size)
    skip = shape.get("skip", False)
    assert difference(out, original, (0.01, 1.0, 50.0) if skip else (0, 500, 999)) < 1e-5
    scheduler = json.loads((out / "scheduler/scheduler_config.json").read_text())
    if skip:
        assert scheduler["sigma_min"] == 0.01 and scheduler["sigma_max"] == 50.1187
        assert scheduler["num_train_timesteps"] == 100
        ScoreSdeVeScheduler.from_pretrained(out / "scheduler")
    else:
        assert scheduler["_class_name"] == "DDPMScheduler"


def as_ddim(network, ema):
    "What DDIM's and TrojDiff's code saves."
    last = {f"module.{name}": tensor for name, tensor in network.state_dict().items()}
    optimizer = {"state": {0: {"step": 7, "exp_avg": torch.ones(9)}}, "param_groups": [{}]}
    return [OrderedDict(last), optimizer, 3, 100, ema.state_dict()]


@pytest.mark.parametrize("ema", [True, False])
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("save, kind", [(as_ddim, DdimNetwork), (as_score_sde, SdeNetwork)])
def test_a_training_is_converted_with_its_ema_copy_or_without(save, kind, legacy, ema, tmp_path):
    last, mean = drawn(kind(), seed=1), drawn(kind())
    source = tmp_path / "ckpt.pth"
    torch.save(save(last, mean), source, _use_new_zipfile_serialization=not legacy)
    notes = convert(source, tmp_path / "out", ema=ema)
    assert notes[0].startswith("the EMA copy" if ema else "the last weights")
    assert difference(tmp_path / "out", mean if ema else last) < 1e-5


REFUSED_NETWORKS = {
    "is a DDPM++": lambda: (
        SdeNetwork().state_dict() | {"all_modules.3.Conv_2.weight": torch.ones(32, 32, 1, 1)}
    ),
    "learned FIR convolution": lambda: (
        SdeNetwork(skip=True).state_dict()
        | {"all_modules.7.Conv2d_0.weight": torch.ones(32, 3, 3, 3)}
    ),
    "NCSN++ without input_skip": lambda: {
        name: tensor
        for name, tensor in SdeNetwork(skip=True).state_dict().items()
        if "all_modules.7." not in name
    },
    "NCSN++ with attention over 64": lambda: SdeNetwork(skip=True).state_dict(),
    "without three colours": lambda: SdeNetwork(ch=64, skip=True, colours=1).state_dict(),
    "no table of noise scales": lambda: {
        name: tensor
        for name, tensor in SdeNetwork(ch=64, skip=True).state_dict().items()
        if name != "sigmas"
    },
    "is of the kind 'attention', where": lambda: {
        name: tensor
        for name, tensor in SdeNetwork(attention=(0,)).state_dict().items()
        if "all_modules.4." not in name
    },
    "first convolution makes 32": lambda: DdimNetwork(mult=(2, 1)).state_dict(),
    "'down.0.block.0.conv_shortcut.weight' belongs to no layer": lambda: (
        DdimNetwork().state_dict() | {"down.0.block.0.conv_shortcut.weight": torch.ones(1)}
    ),
    "--size": lambda: DdimNetwork(attention=()).state_dict(),
    "a layer of the network is missing": lambda: {"temb.dense.0.weight": torch.ones(1)},
    "nothing in it tells its levels": lambda: {"all_modules.0.weight": torch.ones(3, 3)},
    "no network that can be converted": lambda: {"input_blocks.0.0.weight": torch.ones(1)},
    "give the folder with model_index.json": lambda: {
        "time_embedding.linear_1.weight": torch.ones(1)
    },
    "no part of a Score-SDE": lambda: SdeNetwork().state_dict() | {"logvar": torch.ones(1)},
}


@pytest.mark.parametrize("words, make", REFUSED_NETWORKS.items(), ids=REFUSED_NETWORKS)
def test_a_network_without_counterpart_is_refused_with_the_reason(words, make):
    with pytest.raises(CheckpointError) as refused:
        translate(make())
    assert words in str(refused.value)


def test_a_variance_that_ddims_network_does_not_use_is_left_out():
    weights = DdimNetwork().state_dict()
    assert translate(weights | {"logvar": torch.ones(9)}).weights.keys() == (
        translate(weights).weights.keys()
    )


# ---------------------------------------------------------------- hostile pickles


class Calls:
    "Pickles as a call."

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def saved(value, path, **options):
    torch.save(value, path, **options)
    return path


def rewritten(source, path, change=None, records=(), **options):
    "A copy of an archive whose pickle is changed, and with more records."
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w", **options) as new:
        for entry in old.infolist():
            data = old.read(entry)
            is_pickle = entry.filename.endswith("data.pkl")
            new.writestr(entry.filename, change(data) if change and is_pickle else data)
        for name, data in records:
            new.writestr(name, data)
    return path


def declaring(count):
    "Changes the numbers that a pickle declares for its storage of 72."
    number = b"\x8a\x09" + count.to_bytes(9, "little", signed=True)

    def change(data):
        assert data.count(b"cpuq\x06KHtq") == 1
        return data.replace(b"cpuq\x06KHtq", b"cpuq\x06" + number + b"tq")

    return change


def plain(path):
    return saved({"w": torch.arange(72.0)}, path)


def cut(share, **options):
    def make(path):
        data = saved({"w": torch.randn(999)}, path, **options).read_bytes()
        path.write_bytes(data[: int(share * len(data))])
        return path

    return make


OLD = {"_use_new_zipfile_serialization": False}
HARMFUL = {
    "system": (lambda p: saved({"w": Calls(os.system, "true")}, p), "calls for"),
    "eval": (lambda p: saved([{"w": 1}, [Calls(eval, "1")]], p), "__builtin__.eval"),
    "getattr": (lambda p: saved({"w": Calls(getattr, [], "append")}, p), "__builtin__.getattr"),
    "import": (lambda p: saved(Calls(__import__, "os"), p, **OLD), "__builtin__.__import__"),
    "protocol 4": (lambda p: saved(Calls(os.getcwd), p, pickle_protocol=4), "calls for"),
    "a module": (lambda p: saved(nn.Linear(2, 2), p), "torch.nn.modules.linear.Linear"),
    "sparse": (lambda p: saved({"w": torch.eye(3).to_sparse()}, p), "_rebuild_sparse_tensor"),
    "zip bomb": (
        lambda p: rewritten(
            plain(p.with_suffix(".a")),
            p,
            records=[("a/data/9", bytes(10**7))],
            compression=zipfile.ZIP_DEFLATED,
        ),
        "is compressed to",
    ),
    "huge storage": (
        lambda p: rewritten(plain(p.with_suffix(".a")), p, declaring(10**15)),
        "declares 4,000,000,000,000,000 bytes for storage '0', and there are 288",
    ),
    "a little more": (
        lambda p: rewritten(plain(p.with_suffix(".a")), p, declaring(73)),
        "declares 292 bytes",
    ),
    "less than nothing": (
        lambda p: rewritten(plain(p.with_suffix(".a")), p, declaring(-1)),
        "declares a storage as",
    ),
    "twice": (
        lambda p: rewritten(
            plain(p.with_suffix(".a")), p, records=[("x/data/0", b""), ("x/data/0", b"")]
        ),
        "is there twice",
    ),
    "code": (
        lambda p: rewritten(plain(p.with_suffix(".a")), p, records=[("x/constants.pkl", b"")]),
        "TorchScript",
    ),
    "two pickles": (
        lambda p: rewritten(plain(p.with_suffix(".a")), p, records=[("b/data.pkl", b"")]),
        "not of torch.save",
    ),
    "a large pickle": (
        lambda p: rewritten(plain(p.with_suffix(".a")), p, lambda data: data + bytes(MAX_PICKLE)),
        "its pickle alone has 5,000,",
    ),
    "cut archive": (cut(0.7), "cut off or damaged"),
    "cut old file": (cut(0.7, **OLD), "bytes of numbers, and there are"),
    "cut old pickle": (cut(0.02, **OLD), "cut off or damaged"),
    "old, huge": (
        lambda p: Path(
            p.write_bytes(
                saved({"w": torch.arange(72.0)}, p, **OLD)
                .read_bytes()
                .replace(b"KHNtq", b"\x8a\x06\x00\x00\x00\x00\x00\x40NtQ"[:-1] + b"q")
            )
            and p
        ),
        "bytes of numbers, and there are",
    ),
}


@pytest.mark.parametrize("make, words", HARMFUL.values(), ids=HARMFUL)
def test_a_pickle_is_refused_before_torch_loads_it(make, words, tmp_path):
    path = make(tmp_path / "a.bin")
    with pytest.raises(CheckpointError) as refused:
        check_pickle(path)
    assert words in str(refused.value)


def test_a_call_in_a_pickle_is_refused_and_not_done(tmp_path):
    source = saved({"w": Calls(os.mkdir, str(tmp_path / "made"))}, tmp_path / "a.bin")
    with pytest.raises(CheckpointError, match="a.bin: its pickle calls for '(posix|nt).mkdir'"):
        convert(source, tmp_path / "out")
    assert os.listdir(tmp_path) == ["a.bin"]


endless = []
endless.append(endless)
laughs = "ha"
for _ in range(40):
    laughs = [laughs, laughs]
WRONG = {
    "endless": (endless, "it holds a list of list, and"),
    "laughs": (laughs, "it holds a list of list, list, and"),
    "a number": (7, "it holds one int, and"),
    "no tensors": ({"w": 1.0}, "it holds a dict of 'w'"),
    "nothing": ({}, "it holds a dict of nothing"),
    "numbered": ({1: torch.ones(1)}, "it holds a dict of 1"),
    "nested": ({"state_dict": {"w": torch.ones(1)}}, "it holds a dict of 'state_dict'"),
    "integers": ({"bn.num_batches_tracked": torch.tensor(3)}, "is torch.int64 on cpu"),
    "expanded": ({"w": torch.ones(1).expand(10**9)}, "4,000,000,000 bytes, and at most"),
    "no EMA": ([{"w": torch.ones(2)}, 0, 0, 0, {"v": torch.ones(2)}], "say --no-ema"),
    "short EMA": (
        {"model": {"w": torch.ones(2)}, "ema": {"shadow_params": []}},
        "say --no-ema",
    ),
    "wrong EMA": (
        {"model": {"w": torch.ones(2)}, "ema": {"shadow_params": [torch.ones(3)]}},
        "say --no-ema",
    ),
    "odd EMA": (
        {"model": {"w": torch.ones(2)}, "ema": {"shadow_params": [None]}},
        "say --no-ema",
    ),
}


@pytest.mark.parametrize("value, words", WRONG.values(), ids=WRONG)
def test_what_holds_no_weights_is_refused_in_one_line(value, words, tmp_path):
    path = saved(value, tmp_path / "a.bin")
    check_pickle(path)
    with pytest.raises(CheckpointError) as refused:
        pickled_weights([str(path)], True, 10**6)
    assert words in str(refused.value)


def test_every_honest_form_of_a_tensor_is_read(tmp_path):
    torch.manual_seed(0)
    whole = torch.randn(6, 4)
    tied = nn.Parameter(torch.randn(5))
    state = {
        "turned": whole.T,
        "every second": whole[::2],
        "row": whole[3],
        "one": torch.tensor(1.0),
        "none": torch.ones(0, 3),
        "half": whole.half(),
        "brain": whole.bfloat16(),
        "double": whole.double(),
        "a": tied,
        "b": tied,
    }
    for name, options in {"new": {}, "old": OLD}.items():
        path = saved(state, tmp_path / f"{name}.bin", **options)
        place = tmp_path / name
        place.mkdir()
        found = load_file(read_pickles([path], place)[0])
        assert found.keys() == state.keys()
        for key, tensor in found.items():
            assert tensor.dtype == state[key].dtype and torch.equal(tensor, state[key]), key


def test_tensors_of_a_gpu_are_read_without_one(tmp_path):
    def moved(data):
        return data.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")

    path = rewritten(plain(tmp_path / "a.bin"), tmp_path / "b.bin", moved)
    assert b"cuda:0" in path.read_bytes()
    found = load_file(read_pickles([path], tmp_path)[0])
    assert torch.equal(found["w"], torch.arange(72.0))


FOREIGN = {
    "edm.pkl": (b"\x80\x04\x95_reconstruct_persistent_obj", "EDM or StyleGAN"),
    "plain.pkl": (pickle.dumps([1]), "torch.save did not write"),
    "lfs.pth": (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
    "page.pth": (b"<!DOCTYPE html>", "web page"),
    "zipped.pth": (b"\x1f\x8b\x08", "gzip"),
    "empty.pth": (b"", "is empty"),
    "w.safetensors": (b"\x08\0\0\0\0\0\0\0{      }", "looks like safetensors"),
    "text.pth": (b"hello world", "starts with b'hello wo'"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_other_files_are_refused_unread_by_what_they_are(name, tmp_path):
    data, words = FOREIGN[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(CheckpointError) as refused:
        convert(tmp_path / name, tmp_path / "out")
    assert name in str(refused.value) and words in str(refused.value)
    assert os.listdir(tmp_path) == [name]


# ---------------------------------------------------------------- the child process


BOUND = """
import os, socket, subprocess, sys, shutil
from terd_nb.loading.convert import bound_process, leave_network
leave_network()
bound_process(memory=200_000_000, seconds=1, files=1000)
"""
ATTEMPTS = {
    "socket.socket()": "PermissionError",
    "os.system('true')": "PermissionError",
    "subprocess.run([sys.executable, '-c', ''])": "PermissionError",
    "os.fork()": "PermissionError",
    "open('new', 'w')": "PermissionError",
    "open(sys.executable, 'ab')": "PermissionError",
    "os.remove('new')": "PermissionError",
    "shutil.rmtree('.')": "PermissionError",
    "os.kill(os.getppid(), 9)": "PermissionError",
    "bytearray(10**9)": "MemoryError",
    "exec('while True: pass')": "",
}


@unix
@pytest.mark.parametrize("code", ATTEMPTS)
def test_the_child_can_do_nothing_but_read(code, tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", BOUND + code], cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode and ATTEMPTS[code] in run.stderr
    assert os.listdir(tmp_path) == []


@unix
def test_a_child_that_breaks_down_is_a_refusal(tmp_path, monkeypatch):
    path = plain(tmp_path / "a.bin")
    for code, words in {
        "import os; os.kill(os.getpid(), 11)": "status -11",
        "import os; os.kill(os.getpid(), 9)": "was not read within",
        "raise SystemExit(3)": "status 3",
        "pass": "answer.json",
        "open('answer.json', 'w').write('{\"error\": 1}')": "the answer: 'error' = 1",
        "open('answer.json', 'w').write('{}')": "weights.safetensors",
        "import os; os.symlink(sys.executable, 'answer.json')": "a link that leads out",
    }.items():
        place = tmp_path / "place"
        place.mkdir()
        monkeypatch.setattr("terd_nb.loading.convert._CHILD", f"import sys\n{code}")
        with pytest.raises(CheckpointError) as refused:
            read_pickles([path], place)
        assert words in str(refused.value)
        for left in place.iterdir():
            left.unlink()
        place.rmdir()


@unix
def test_the_child_knows_no_secrets(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    code = "import os, json; open('answer.json', 'w').write(json.dumps({'error': str(os.environ)}))"
    monkeypatch.setattr("terd_nb.loading.convert._CHILD", code)
    with pytest.raises(CheckpointError) as refused:
        read_pickles([plain(tmp_path / "a.bin")], tmp_path)
    assert "environ" in str(refused.value) and "HF_TOKEN" not in str(refused.value)


# ---------------------------------------------------------------- folders


def pipeline(**changes):
    torch.manual_seed(0)
    network = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        **changes,
    )
    return DDPMPipeline(network, DDPMScheduler())


def same_network(folder, original):
    x, t = torch.randn(2, 3, 8, 8), 10
    with torch.no_grad():
        ours = load(folder, "cpu").network(x, t).sample
        return torch.equal(ours, original.unet.eval()(x, t).sample)


def test_a_folder_of_pickles_becomes_one_of_safetensors(tmp_path):
    original = pipeline()
    original.save_pretrained(tmp_path / "a", safe_serialization=False)
    (tmp_path / "a/run.py").write_text("print(1)")
    (tmp_path / "a/unet/optimizer.bin").write_bytes(b"x")
    notes = convert(tmp_path / "a", tmp_path / "out")
    assert notes[0] == f"{SAFE} from {BIN}"
    assert "run.py" in notes[1] and "unet/optimizer.bin" in notes[1]
    files = [
        path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*")
    ]
    assert sorted(files) == [
        "model_index.json",
        "scheduler",
        "scheduler/scheduler_config.json",
        "unet",
        "unet/config.json",
        SAFE,
    ]
    assert same_network(tmp_path / "out", original)
    theirs = DDPMPipeline.from_pretrained(tmp_path / "out")
    assert same_network(tmp_path / "out", theirs)
    assert sorted(os.listdir(tmp_path)) == ["a", "out"]
    if os.name != "nt":
        assert os.stat(tmp_path / "out" / SAFE).st_mode & 0o111 == 0
        assert os.stat(tmp_path / "out").st_mode & 0o777 == os.stat(tmp_path / "a").st_mode & 0o777


def test_parts_become_one_file(tmp_path):
    original = pipeline()
    original.save_pretrained(tmp_path / "a", safe_serialization=False, max_shard_size="30KB")
    parts = sorted(path.name for path in (tmp_path / "a/unet").glob("*.bin"))
    assert len(parts) > 2
    convert(tmp_path / "a", tmp_path / "out")
    assert same_network(tmp_path / "out", original)
    (tmp_path / "a/unet" / parts[1]).unlink()
    with pytest.raises(CheckpointError, match="not all parts are there"):
        convert(tmp_path / "a", tmp_path / "again")


def test_which_pickles_make_which_file():
    stem = "unet/diffusion_pytorch_model"
    assert pickles_of([f"{stem}.bin", f"{stem}.fp16.bin", "optimizer.bin"]) == {
        f"{stem}.safetensors": [f"{stem}.bin"],
        f"{stem}.fp16.safetensors": [f"{stem}.fp16.bin"],
    }
    assert pickles_of([f"{stem}.bin", f"{stem}.safetensors"]) == {}
    two = [f"{stem}.fp16-00001-of-00002.bin", f"{stem}.fp16-00002-of-00002.bin"]
    assert pickles_of(two) == {f"{stem}.fp16.safetensors": two}
    for bad in (two[:1], [f"{stem}.bin", f"{stem}-00001-of-00001.bin"]):
        with pytest.raises(CheckpointError, match="not all parts are there"):
            pickles_of(bad)


def hostile_folder(tmp_path, make):
    pipeline().save_pretrained(tmp_path / "a", safe_serialization=False)
    make(tmp_path / "a")
    return tmp_path / "a"


FOLDERS = {
    "a call": (
        lambda a: saved({"w": Calls(os.getcwd)}, a / BIN),
        "diffusion_pytorch_model.bin: its pickle calls for",
    ),
    "another network": (
        lambda a: saved({"w": torch.ones(3)}, a / BIN),
        "is in the network, but not in the weights",
    ),
    "no pickle": (lambda a: (a / BIN).unlink(), "there is nothing to convert"),
    "a link": (
        lambda a: ((a / BIN).unlink(), (a / BIN).symlink_to(sys.executable)),
        "a link that leads out of the folder",
    ),
    "no index": (lambda a: (a / "model_index.json").unlink(), "model_index.json is not there"),
    "a text's model": (
        lambda a: (a / "model_index.json").write_text(
            json.dumps({"_class_name": "DDPMPipeline", "text_encoder": ["a", "B"]})
        ),
        "out of scope",
    ),
}


@unix
@pytest.mark.parametrize("make, words", FOLDERS.values(), ids=FOLDERS)
def test_a_folder_that_cannot_be_converted_leaves_nothing(make, words, tmp_path):
    folder = hostile_folder(tmp_path, make)
    with pytest.raises(CheckpointError) as refused:
        convert(folder, tmp_path / "out")
    assert words in str(refused.value) and "\n" not in str(refused.value)
    assert os.listdir(tmp_path) == ["a"]


def test_nothing_is_overwritten(tmp_path):
    source = plain(tmp_path / "a.bin")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("mine")
    for out, words in {
        "full": "nothing is overwritten",
        "a.bin": "nothing is overwritten",
        "missing/out": "cannot be made",
    }.items():
        with pytest.raises(CheckpointError, match=words):
            convert(source, tmp_path / out)
    with pytest.raises(CheckpointError, match="no such file or folder: 'nowhere'"):
        convert("nowhere", tmp_path / "out")
    assert (tmp_path / "full/file").read_text() == "mine"
    torch.save(drawn(DdimNetwork()).state_dict(), source)
    (tmp_path / "empty").mkdir()
    assert convert(source, tmp_path / "empty")[0] == "the file holds no EMA copy of the weights"
    assert (tmp_path / "empty" / SAFE).is_file()


@unix
def test_what_is_no_plain_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.pth")
    for source in (tmp_path / "pipe.pth", "/dev/zero"):
        with pytest.raises(CheckpointError, match="is no plain file"):
            convert(source, tmp_path / "out")
    assert os.listdir(tmp_path) == ["pipe.pth"]


@unix
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_run_leaves_nothing(number, tmp_path):
    source = saved(drawn(DdimNetwork()).state_dict(), tmp_path / "a.pth")
    code = (
        "import sys, time\nfrom terd_nb.loading import schedulers\n"
        "from terd_nb.loading.convert import convert\n"
        "schedulers.load = lambda *_: time.sleep(60)    # it cannot end before the signal\n"
        "convert(*sys.argv[1:])"
    )
    run = subprocess.Popen(
        [sys.executable, "-c", code, str(source), str(tmp_path / "out")], stderr=subprocess.DEVNULL
    )
    late = time.monotonic() + 120
    while not list(tmp_path.glob(".terd*/*/answer.json")) and time.monotonic() < late:
        time.sleep(0.01)
    run.send_signal(number)
    assert run.wait(60)
    assert os.listdir(tmp_path) == ["a.pth"]


def test_a_refusal_needs_no_torch(tmp_path):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps([1]))
    code = (
        "import sys\nfrom terd_nb.loading.convert import refuse_other_files\n"
        "from pathlib import Path\ntry: refuse_other_files(Path(sys.argv[1]))\n"
        "except ValueError: print('torch' in sys.modules)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a.pkl")], capture_output=True, text=True
    )
    assert run.stdout == "False\n"
