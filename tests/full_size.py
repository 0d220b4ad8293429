"""What models of full size cost: to open, in memory for a row, in seconds for a pass and a scan.

    python tests/full_size.py                    a table; `make full-size` runs this
    python tests/full_size.py cifar10 --csv FILE   some of them; the table as CSV, too

The networks have the published shapes and random weights, since cost does not depend on what is
learned. Each is measured in a process of its own, which a folder in the temporary directory feeds.
"""

import argparse
import csv
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def unet(size, widths, down, up, **more):
    "The arguments of a U-Net; d and u are plain blocks, a those with attention."
    names = {"d": "DownBlock2D", "u": "UpBlock2D"}
    downs = [names.get(c, "AttnDownBlock2D") for c in down]
    ups = [names.get(c, "AttnUpBlock2D") for c in up]
    return "UNet2DModel", {
        "sample_size": size, "in_channels": 3, "out_channels": 3, "layers_per_block": 2,
        "block_out_channels": widths, "down_block_types": downs, "up_block_types": ups,
    } | more  # fmt: skip


EARLY = {"downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1, "norm_eps": 1e-6,
         "attention_head_dim": None}  # fmt: skip
MODELS = {  # as the named repositories' configs have them
    "cifar10": ("google/ddpm-cifar10-32", *unet(32, [128, 256, 256, 256], "dadd", "uuau", **EARLY)),
    "celebahq": ("google/ddpm-celebahq-256",
                 *unet(256, [128, 128, 256, 256, 512, 512], "ddddad", "uauuuu", **EARLY)),
    "ldm": ("CompVis/ldm-celebahq-256, its U-Net",
            *unet(64, [224, 448, 672, 896], "daaa", "aaau", attention_head_dim=32)),
    "dit": ("facebook/DiT-XL-2-256, its transformer", "DiTTransformer2DModel", {
        "sample_size": 32, "in_channels": 4, "out_channels": 8, "patch_size": 2, "num_layers": 28,
        "num_attention_heads": 16, "attention_head_dim": 72, "num_embeds_ada_norm": 1000,
        "norm_type": "ada_norm_zero", "activation_fn": "gelu-approximate"}),
}  # fmt: skip


def write_folder(kind, arguments, folder):
    "A pipeline with random weights; how many they are."
    import diffusers
    import torch

    torch.manual_seed(0)
    network = getattr(diffusers, kind)(**arguments)
    part = "unet" if kind == "UNet2DModel" else "transformer"
    network.save_pretrained(folder / part)
    diffusers.DDPMScheduler().save_pretrained(folder / "scheduler")
    index = {"_class_name": "DDPMPipeline", part: ["diffusers", kind],
             "scheduler": ["diffusers", "DDPMScheduler"]}  # fmt: skip
    (folder / "model_index.json").write_text(json.dumps(index))
    return sum(p.numel() for p in network.parameters())


def memory(key):
    "A number of /proc/self/status in bytes."
    return 1024 * int(re.search(rf"{key}:\s*(\d+)", Path("/proc/self/status").read_text())[1])


def measure(name):
    "One row of the table, from the model in a folder."
    import torch

    from terd_nb import load
    from terd_nb.denoiser import FAST_EVALS, estimate_seconds, memory_of_row

    folder = Path(tempfile.gettempdir()) / name
    start = time.perf_counter()
    denoiser = load(folder, "cpu")
    opened = time.perf_counter() - start
    _, told = memory_of_row(denoiser.network, denoiser.shape)
    with torch.no_grad():
        denoiser.eps(denoiser.noise(1), 500)  # the first pass sets things up
        start = time.perf_counter()
        denoiser.eps(denoiser.noise(1), 500)
        seconds = time.perf_counter() - start
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    x = denoiser.noise(1).requires_grad_()
    torch.autograd.grad(denoiser.eps(x, 500).sum(), x)
    peak = memory("VmHWM") - before
    scan = estimate_seconds(denoiser, FAST_EVALS, rows=2)
    return {
        "model": MODELS[name][0], "shape": "x".join(map(str, denoiser.shape)),
        "million weights": round(sum(p.numel() for p in denoiser.network.parameters()) / 1e6, 1),
        "load s": round(opened, 1), "weights GB": round(before / 1e9, 2),
        "row GB, told": round(told / 1e9, 2), "row GB, measured": round(peak / 1e9, 2),
        "s a pass": round(seconds, 2), "scan h": round(scan / 3600, 1),
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", help=f"of {', '.join(MODELS)}; all if none")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--step", choices=["write", "measure"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step == "write":
        name = args.models[0]
        write_folder(*MODELS[name][1:], Path(tempfile.gettempdir()) / name)
        return
    if args.step == "measure":
        print(json.dumps(measure(args.models[0])))
        return
    rows = []
    for name in args.models or MODELS:
        with tempfile.TemporaryDirectory() as home:
            environment = os.environ | {"TMPDIR": home, "PYTHONPATH": str(ROOT)}
            for step in ("write", "measure"):
                command = [sys.executable, __file__, name, "--step", step]
                run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
        rows.append(json.loads(run.stdout.splitlines()[-1]))
        print(rows[-1], file=sys.stderr)
    import torch

    machine = (f"{platform.machine()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads, "
               f"torch {torch.__version__}")  # fmt: skip
    date = f"{datetime.now(UTC):%Y-%m-%d}"
    print(f"{date}, {machine}\n")
    print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(map(str, row.values())) + " |")
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*rows[0], "machine", "date"])
            writer.writeheader()
            writer.writerows(row | {"machine": machine, "date": date} for row in rows)


if __name__ == "__main__":
    main()
