"""The first stage of TERD's released code beside ours, on one model with the same random numbers.

    python tests/against_released.py CHECKOUT --csv data/results/released.csv

CHECKOUT is a clone of https://github.com/PKU-ML/TERD. Its `BadDiffusion/reverse.py` cannot be
imported (it parses a command line and wants a GPU), so the statements of its function `reverse` up
to the end of the first stage are taken out of it and run as they are, on the CPU. It runs code of
that clone: look at it first. Ends with 1 if the two triggers are more than 1% apart."""

import argparse
import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Union
from unittest.mock import patch

import torch
import tqdm
from diffusers import DDPMScheduler

from terd_nb import load
from terd_nb.lab.measure import circumstances, write_rows
from terd_nb.triggers import Trigger
from terd_nb.two_stages import search_steps
from terd_nb.zoo import zoo_path

BATCH, LR, WEIGHT = 16, 0.5, 5e-5  # its defaults


def first_stage(checkout):
    "The released function, cut after its first loop; it returns its `mu`."
    path = checkout / "BadDiffusion" / "reverse.py"
    module = ast.parse(path.read_text(encoding="utf-8"))
    (function,) = [
        one for one in module.body if isinstance(one, ast.FunctionDef) and one.name == "reverse"
    ]
    loop = next(k for k, one in enumerate(function.body) if isinstance(one, ast.For))
    function.body = [*function.body[: loop + 1], *ast.parse("return mu").body]
    spec = importlib.util.spec_from_file_location("reverse_loss", path.with_name("reverse_loss.py"))
    losses = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(losses)
    names = {
        "torch": torch, "os": os, "Union": Union, "TrainingConfig": object, "tqdm1": tqdm,
        "Variable": torch.autograd.Variable, "p_losses_diffuser": losses.p_losses_diffuser,
    }
    cut = ast.fix_missing_locations(ast.Module([function], []))
    exec(compile(cut, str(path), "exec"), names)
    return names["reverse"], names


def released(checkout, model, steps, seed):
    "The r (C, H, W) of the released code."
    reverse, names = first_stage(checkout)
    denoiser = load(zoo_path(model), "cpu")
    scheduler = DDPMScheduler.from_pretrained(zoo_path(model), subfolder="scheduler")
    names["noise_sched"] = SimpleNamespace(num_train_timesteps=len(denoiser.noise_schedule))
    channels, _, size = denoiser.shape
    pipeline = SimpleNamespace(unet=SimpleNamespace(in_channels=channels, sample_size=size))
    randint = torch.randint

    def drawn_twice(low, high, shape):
        "Ours draws the times of both stages at each step."
        times = randint(low, high, shape)
        randint(0, 10, shape)
        return times

    with TemporaryDirectory() as folder:
        args = SimpleNamespace(
            lr=LR, iteration=steps, batch_size=BATCH, out_dir=f"{folder}/", project="",
            weight_decay=WEIGHT, num_steps=10)
        config = SimpleNamespace(output_dir=folder, sample_ep=None)
        torch.manual_seed(seed)
        with (
            patch.object(torch.Tensor, "cuda", lambda self: self),
            patch.object(torch, "randint", drawn_twice),
            patch.object(torch, "save", lambda *_: None),
        ):
            mu = reverse(denoiser.network, None, scheduler, config, "", pipeline, args)
    return mu.detach()


def ours(model, steps, seed):
    "The r (C, H, W) of this package."
    denoiser = load(zoo_path(model), "cpu")
    settings = {"batch": BATCH, "lr": LR, "weight": WEIGHT}
    *_, last = search_steps(denoiser, seed, (steps, 0), "BadDiffusion", **settings)
    return last.r.detach()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--model", default="villan-psi1")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--csv", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    theirs = released(asked.checkout, asked.model, asked.steps, 0)
    own = ours(asked.model, asked.steps, 0)
    planted = Trigger.load(zoo_path(asked.model) / "trigger.safetensors").r
    head = ["git", "-C", asked.checkout, "rev-parse", "HEAD"]
    commit = subprocess.run(head, capture_output=True, text=True).stdout.strip()
    apart = ((own - theirs).norm() / theirs.norm()).item()
    row = {
        "model": asked.model, "steps": asked.steps, "batch": BATCH, "seed": 0,
        "released_commit": commit, "released_l2": (theirs - planted).norm().item(),
        "our_l2": (own - planted).norm().item(), "apart": apart,
        "moved": ((own + torch.rand(own.shape, generator=torch.Generator().manual_seed(0))).norm()
                  / own.norm()).item(),
    }
    print(", ".join(f"{name} {value}" for name, value in row.items()))
    if asked.csv:
        write_rows(asked.csv, [row | circumstances()])
    return int(not apart < 0.01)


if __name__ == "__main__":
    sys.exit(main())
