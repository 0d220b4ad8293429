"What a row takes by `memory_of_row`, held against what a process really grew by."

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DiTTransformer2DModel, UNet2DModel
from torch import nn

from terd_nb.denoiser import AT_ONCE, Denoiser, free_memory, memory_of_row
from terd_nb.diffusion import linear_schedule
from terd_nb.loading.networks import ClassAverage, NullClass

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")


def unet(size, widths=(32, 64), down="dd", up="uu", **more):
    names = {"d": "DownBlock2D", "D": "AttnDownBlock2D", "u": "UpBlock2D", "U": "AttnUpBlock2D"}
    return UNet2DModel(
        sample_size=size, block_out_channels=widths, norm_num_groups=8, layers_per_block=1,
        down_block_types=[names[c] for c in down], up_block_types=[names[c] for c in up],
        attention_head_dim=32, add_attention="D" in down, **more)  # fmt: skip


def transformer():
    return NullClass(DiTTransformer2DModel(
        sample_size=96, patch_size=2, num_attention_heads=4, attention_head_dim=64, num_layers=6,
        in_channels=4))  # fmt: skip


def decoder():
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "block_out_channels": [32, 64],
              "up_block_types": ["UpDecoderBlock2D"] * 2, "norm_num_groups": 8}  # fmt: skip
    return AutoencoderKL(latent_channels=4, **blocks)


def decoded(network, z):
    return network.decode(z).sample


SHAPES = {
    "large images": lambda: (unet(128, in_channels=1, out_channels=1), (1, 128, 128)),
    "attention": lambda: (unet(96, down="Dd", up="uU"), (3, 96, 96)),
    "wide": lambda: (unet(64, (128, 256)), (3, 64, 64)),
    "transformer": lambda: (transformer(), (4, 96, 96)),
    "classes": lambda: (ClassAverage(unet(64, num_class_embeds=10)), (3, 64, 64)),
    "decoder": lambda: (decoder(), (4, 96, 96), decoded),
}


def status(key):
    return 1024 * int(re.search(rf"{key}:\s*(\d+)", Path("/proc/self/status").read_text())[1])


def measure(name):
    "What is told and what a process grows by, forward alone and forward and backward."
    network, shape, *ask = SHAPES[name]()
    network.eval().requires_grad_(False)
    told, found = memory_of_row(network, shape, *ask), []
    for gradient in (False, True):
        x = torch.randn(1, *shape, requires_grad=gradient)
        Path("/proc/self/clear_refs").write_text("5")   # the peak starts anew
        before = status("VmRSS")
        with torch.set_grad_enabled(gradient):
            out = ask[0](network, x) if ask else network(x, torch.ones(1))
            out = getattr(out, "sample", out)
            if gradient:
                torch.autograd.grad(out.sum(), x)
        del out
        found.append(status("VmHWM") - before)
    return told, found


@pytest.fixture(scope="module")
def measured(root):
    # What glibc keeps of freed memory, up to half as much again, is not what is told.
    environment = os.environ | {
        "PYTHONPATH": str(root), "MALLOC_MMAP_THRESHOLD_": "100000", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, __file__]
    run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    return json.loads(run.stdout)


@pytest.mark.parametrize("name", SHAPES)
def test_what_is_told_is_what_is_taken(measured, name):
    for told, found in zip(*measured[name]):
        assert 1 / 1.5 < told / found < 1.5


class Counts(nn.Module):
    "A network that remembers how many rows it was asked about at a time."

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(1, 1, 3, padding=1)
        self.rows = []

    def forward(self, x, t):
        assert t.shape == (len(x),)
        self.rows.append(len(x))
        return self.layer(x) * t.reshape(-1, 1, 1, 1)


def counting(rows):
    "A denoiser whose network may see so many rows at a time."
    torch.manual_seed(0)
    denoiser = Denoiser(Counts(), linear_schedule(), (1, 8, 8))
    denoiser.row_bytes = (AT_ONCE // rows,) * 2
    return denoiser


def test_a_batch_goes_in_parts_and_costs_the_same():
    t = torch.arange(10) * 50
    for gradient in (False, True):
        answers, pulls = [], []
        for denoiser in (counting(10), counting(4)):
            x = denoiser.noise(10).requires_grad_(gradient)
            eps = denoiser.eps(x, t)
            if gradient:
                pulls.append(torch.autograd.grad(eps.square().sum(), x)[0])
            answers.append(eps.detach())
            assert denoiser.passes == (30 if gradient else 10)
        assert sorted(denoiser.network.rows) == ([2, 2, 4, 4, 4, 4] if gradient else [2, 4, 4])
        assert torch.allclose(*answers, atol=1e-6)
        assert not gradient or torch.allclose(*pulls, atol=1e-5)


def test_a_batch_that_fits_is_one_call():
    denoiser = counting(10)
    denoiser.eps(denoiser.noise(10).requires_grad_(), 3)
    assert denoiser.network.rows == [10]


def test_a_chain_keeps_one_step_at_a_time():
    "Ten steps of four rows would keep forty; each step is computed again on the way back."
    denoiser = counting(10)
    z = denoiser.noise(4).requires_grad_()
    torch.autograd.grad(denoiser.sample(z, 10, grad=True).sum(), z)
    assert denoiser.network.rows == [4] * 20 and denoiser.passes == 3 * 4 * 10


def test_a_network_that_cannot_be_tried_is_asked_as_it_is():
    class Constant(nn.Module):
        def forward(self, x, t):
            return x * torch.ones(1)   # which is on no meta device

    denoiser = Denoiser(Constant(), linear_schedule(), (1, 8, 8))
    assert denoiser.eps(denoiser.noise(5), 3).shape == (5, 1, 8, 8)


def test_free_memory_is_some():
    assert 10**8 < free_memory() < 10**14


if __name__ == "__main__":
    print(json.dumps({name: measure(name) for name in SHAPES}))
