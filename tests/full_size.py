"""What models of full size cost: to open, and in memory and seconds of the CPU for a row, which is
one image forward and backward.

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


PAPER = {"cifar10": 32, "celeba": 64, "celebahq": 256}  # the settings of chapter 23
MODELS = {  # others, as the named repositories' configs have them
    "ldm": ("CompVis/ldm-celebahq-256, its U-Net",
            *unet(64, [224, 448, 672, 896], "daaa", "aaau", attention_head_dim=32)),
    "dit": ("facebook/DiT-XL-2-256, its transformer", "DiTTransformer2DModel", {
        "sample_size": 32, "in_channels": 4, "out_channels": 8, "patch_size": 2, "num_layers": 28,
        "num_attention_heads": 16, "attention_head_dim": 72, "num_embeds_ada_norm": 1000,
        "norm_type": "ada_norm_zero", "activation_fn": "gelu-approximate"}),
}  # fmt: skip
ALL = [*PAPER, *MODELS]


def network_of(name):
    "What a model is called, and its network with random weights."
    import diffusers
    import torch

    from terd_nb.lab.full_size import paper_network, paper_settings

    if name in PAPER:
        settings = paper_settings(PAPER[name])
        return settings.network, paper_network(settings)
    title, kind, arguments = MODELS[name]
    torch.manual_seed(0)
    return title, getattr(diffusers, kind)(**arguments)


def write_folder(name, folder):
    "A pipeline with random weights."
    import diffusers

    title, network = network_of(name)
    kind = type(network).__name__
    part = "unet" if kind == "UNet2DModel" else "transformer"
    network.save_pretrained(folder / part)
    diffusers.DDPMScheduler().save_pretrained(folder / "scheduler")
    index = {"_class_name": "DDPMPipeline", part: ["diffusers", kind],
             "scheduler": ["diffusers", "DDPMScheduler"]}  # fmt: skip
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "title.txt").write_text(title)


def memory(key):
    "A number of /proc/self/status in bytes."
    return 1024 * int(re.search(rf"{key}:\s*(\d+)", Path("/proc/self/status").read_text())[1])


def measure(name):
    "One row of the table, from the model in a folder."
    import torch

    from terd_nb import load
    from terd_nb.denoiser import memory_of_row

    folder = Path(tempfile.gettempdir()) / name
    start = time.process_time()
    denoiser = load(folder, "cpu")
    opened = time.process_time() - start
    _, told = memory_of_row(denoiser.network, denoiser.shape)
    with torch.no_grad():
        denoiser.eps(denoiser.noise(1), 500)  # the first pass sets things up
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    x = denoiser.noise(1).requires_grad_()
    start = time.process_time()
    torch.autograd.grad(denoiser.eps(x, 500).sum(), x)
    seconds = time.process_time() - start
    peak = memory("VmHWM") - before
    return {
        "model": (folder / "title.txt").read_text(),
        "shape": "x".join(map(str, denoiser.shape)),
        "million weights": round(sum(p.numel() for p in denoiser.network.parameters()) / 1e6, 1),
        "load CPU s": round(opened, 1), "weights GB": round(before / 1e9, 2),
        "row GB, told": round(told / 1e9, 2), "row GB, measured": round(peak / 1e9, 2),
        "CPU s a row": round(seconds, 2),
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", help=f"of {', '.join(ALL)}; all if none")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--step", choices=["write", "measure"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step == "write":
        name = args.models[0]
        write_folder(name, Path(tempfile.gettempdir()) / name)
        return
    if args.step == "measure":
        print(json.dumps(measure(args.models[0])))
        return
    rows = []
    for name in args.models or ALL:
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
            writer = csv.DictWriter(file, [*rows[0], "machine", "date"], lineterminator="\n")
            writer.writeheader()
            writer.writerows(row | {"machine": machine, "date": date} for row in rows)


if __name__ == "__main__":
    main()
