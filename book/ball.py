"""Measures what the piece "Drop the ball" shows: the reversed loss and the shift of the answer on a
plane through the trigger, for four models. Run it again when one of them changes:

    python book/ball.py        # three minutes on one core; writes book/assets/drop_the_ball_data.js

The plane is spanned by the trigger's direction and by what is left of an even, dark picture, so it
holds the origin, the trigger, and the middle of the place where TERD's search starts, -1/2 in every
pixel. It goes through the origin, so a point of it is a picture: along*u + across*v.
"""

import json
from pathlib import Path

import torch
from torch import Tensor

from terd_nb import load
from terd_nb.denoiser import Denoiser
from terd_nb.directions import answer_shift, antithetic
from terd_nb.reversed_loss import reversed_loss
from terd_nb.triggers import Trigger

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "book" / "assets" / "drop_the_ball_data.js"
NODES = 27  # along each side of the plane; odd, so that one of them is the origin
NOISES = 8  # of each estimate; the same at every node, so that the map is smooth

# Where the model lies, whose trigger spans the plane, and what the reader is told.
MODELS = [
    ("zoo/baddiffusion-box", "zoo/baddiffusion-box", "dark box, BadDiffusion"),
    ("hard/box5-sde", "hard/box5-sde", "small bright box, BadDiffusion"),
    ("zoo/villan-psi1", "zoo/villan-psi1", "stop sign, Villan for ODE samplers"),
    ("zoo/benign-a", "zoo/baddiffusion-box", "honest model, the dark box's plane"),
]


def plane(r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    "The trigger's direction, the one across it, and TERD's middle start, all (C, H, W)."
    start = torch.full_like(r, -0.5)
    u = r / r.norm()
    across = start - (start * u).sum() * u
    return u, across / across.norm(), start


def losses(denoiser: Denoiser, s: Tensor) -> Tensor:
    "TERD's reversed loss at T of each candidate (K, C, H, W), as a mean over noises: (K,)."
    last = len(denoiser.noise_schedule) - 1
    draws = [denoiser.noise(NOISES, seed) for seed in range(3)]
    found = []
    for row in s.split(NODES):
        noises = [draw.repeat(len(row), 1, 1, 1) for draw in draws]
        loss = reversed_loss(denoiser, row.repeat_interleave(NOISES, 0), 1.0, *noises, last)
        found.append(loss.reshape(-1, NOISES).mean(1))
    return torch.cat(found)


def measure(model: str, owner: str, title: str) -> dict:
    "One model's plane, as the page reads it."
    denoiser = load(ROOT / "data" / model)
    trigger = Trigger.load(ROOT / "data" / owner / "trigger.safetensors")
    u, v, start = (part.to(denoiser.device) for part in plane(trigger.r))
    half = 1.4 * max(trigger.norm, start.norm().item())
    ticks = torch.linspace(-half, half, NODES, device=denoiser.device)
    across, along = torch.meshgrid(ticks, ticks, indexing="ij")  # rows go across
    nodes = along.reshape(-1, 1, 1, 1) * u + across.reshape(-1, 1, 1, 1) * v
    with torch.no_grad():
        loss = losses(denoiser, nodes)
        shift, _ = answer_shift(denoiser, nodes, 1.0, antithetic(denoiser, NOISES, 3))
    on_plane = [(shift * axis).sum((1, 2, 3)) for axis in (u, v)]
    return {
        "title": title,
        "model": model,
        "planted": model == owner,
        "length": round(trigger.norm, 6),
        "half": round(half, 6),
        "start": [round((start * axis).sum().item(), 4) for axis in (u, v)],
        "u": rounded(u, 4),
        "v": rounded(v, 4),
        "log_loss": rounded(loss.log10(), 3),
        "shift_u": rounded(on_plane[0], 2),
        "shift_v": rounded(on_plane[1], 2),
        "shift": rounded(shift.flatten(1).norm(dim=1), 2),
    }


def rounded(values: Tensor, digits: int) -> list[float]:
    return [round(value, digits) for value in values.flatten().tolist()]


def main():
    data = {"nodes": NODES, "planes": [measure(*row) for row in MODELS]}
    text = json.dumps(data, separators=(",", ":"))
    note = "// Made by `python book/ball.py`; change it there."
    TARGET.write_text(f"{note}\nwindow.dropTheBallData = {text};\n", encoding="utf-8")
    print(f"{TARGET.relative_to(ROOT)}: {TARGET.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
