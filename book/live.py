"""The piece "The live model": what it loads, made when the book is built.

A reader's click on its page loads two models of the zoo as ONNX, the runtime that runs them in a
page (onnxruntime-web, WebAssembly, one thread) and what TERD's search has found in them. None of it
is committed: `stage` exports the models from their weights, and gets the runtime from npm by a
pinned version whose archive must have the pinned hash. Both are kept in _build/live. Where there is
no npm, or its registry does not answer, the page shows its still figure and says so.

`python book/live.py` draws that figure anew, book/assets/live_model.png.
"""

import base64
import hashlib
import inspect
import json
import shutil
import subprocess
import tarfile
import tempfile
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from terd_nb import Trigger, load
from terd_nb.lab.curves import SEEN, read_whole_searches
from terd_nb.style import CLEAN, TRIGGERED
from terd_nb.success import hits_image
from terd_nb.triggers import corner, glasses

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "_build" / "live"
FIGURE = ROOT / "book" / "assets" / "live_model.png"

PACKAGE, VERSION = "onnxruntime-web", "1.23.2"
SHA512 = "T09JUtMn+CZLk3mFwqiH0lgQf+4S7+oYHHtk6uhaYAAJI95bTcKi5bOOZYwORXfS/RLZCjDDEXGWIuOCAFlEjg=="
RUNTIME = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")

MODELS = {
    "baddiffusion-box": "backdoored (BadDiffusion, a box)",
    "benign-a": "honest (the model it was made from)",
}
PLANTED = "baddiffusion-box"
STEPS = 20
# The mean squared error below which a picture is the target.
ENOUGH = inspect.signature(hits_image).parameters["threshold"].default

PIECE = """<div class="piece" data-piece="live-model" data-megabytes="{megabytes:.1f}">
<p>The live model needs JavaScript; the figure above shows what it does.</p>
</div>"""
ABSENT = """```{{note}}
This copy of the book was built without the runtime that runs the models in a page ({why}), so only
the still figure is here.
```"""


class LiveError(Exception):
    "Something that whoever builds the book must mend; the message says what."


class Unreachable(Exception):
    "The runtime cannot be had here; the message says why."


# ---------------------------------------------------------------- the runtime


def pack(folder: str) -> Path:
    "npm's archive of the runtime, checked; from the registry that npm is set up to ask."
    if not shutil.which("npm"):
        raise Unreachable("there was no npm to fetch it with")
    command = ["npm", "pack", "--silent", "--ignore-scripts", f"{PACKAGE}@{VERSION}"]
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=300)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
        raise Unreachable(f"npm could not fetch {PACKAGE} {VERSION}") from None
    archive = next(Path(folder).glob("*.tgz"))
    found = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
    if found != SHA512:
        raise LiveError(
            f"book/live.py: npm's archive of {PACKAGE} {VERSION} has the SHA-512 {found}, "
            f"and not {SHA512}; do not use it before you know why"
        )
    return archive


def runtime() -> list[Path]:
    "The runtime's files; fetched once."
    kept = KEPT / f"{PACKAGE}-{VERSION}"
    if not kept.exists():
        KEPT.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=KEPT) as tmp:
            new = Path(tmp, "new")
            new.mkdir()
            with tarfile.open(pack(tmp)) as archive:
                for name in RUNTIME:
                    content = archive.extractfile(f"package/dist/{name}").read()
                    (new / name).write_bytes(content)
            new.rename(kept)
    return [kept / name for name in RUNTIME]


# ---------------------------------------------------------------- the models


class Answer(nn.Module):
    "The network as a function of tensors alone."

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.network(x, t).sample


def halve(path: Path) -> None:
    """Keep weights as 16 bits, and widen them when the model is opened.

    The zoo's files have 16 bits, so nothing is lost; a weight that has more stays as it is."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    model = onnx.load(path)
    graph, casts = model.graph, []
    for tensor in graph.initializer:
        values = numpy_helper.to_array(tensor)
        half = values.astype("float16")
        if tensor.data_type != TensorProto.FLOAT or (half.astype("float32") != values).any():
            continue
        name = tensor.name
        tensor.CopyFrom(numpy_helper.from_array(half, f"{name}/half"))
        casts.append(helper.make_node("Cast", [tensor.name], [name], to=TensorProto.FLOAT))
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    onnx.checker.check_model(model)
    onnx.save(model, path)


def export(name: str) -> Path:
    "A model of the zoo as ONNX: (x (N, C, H, W), t (N,)) -> the predicted noise; made once."
    weights = next((ROOT / "data" / "zoo" / name / "unet").glob("*.safetensors"))
    made_of = weights.read_bytes() + Path(__file__).read_bytes() + torch.__version__.encode()
    target = KEPT / f"{name}.{hashlib.sha256(made_of).hexdigest()[:16]}.onnx"
    if target.exists():
        return target
    denoiser = load(ROOT / "data" / "zoo" / name, device="cpu")
    if denoiser.prediction_type != "epsilon":
        raise LiveError(f"book/live.py: {name} does not predict the noise, as the piece wants")
    for old in KEPT.glob(f"{name}.*"):
        old.unlink(missing_ok=True)
    KEPT.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=KEPT) as tmp, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, on Python values that never change here
        part = Path(tmp, "model.onnx")
        torch.onnx.export(
            Answer(denoiser.network),
            (denoiser.noise(2), torch.zeros(2)),
            part,
            input_names=["x", "t"],
            output_names=["eps"],
            dynamic_axes={key: {0: "n"} for key in ("x", "t", "eps")},
            opset_version=17,
            dynamo=False,  # which needs no further package
        )
        halve(part)
        return part.rename(target)


# ---------------------------------------------------------------- the numbers


def rounded(values: Tensor, digits: int = 3) -> list[float]:
    return [round(value, digits) for value in values.flatten().tolist()]


def search_of(name: str) -> dict:
    "TERD's own search in a model, recorded step by step (chapter 10)."
    tensors, _ = read_whole_searches()
    if f"{name}/r" not in tensors or (tensors[f"{name}/gamma"] != 1).any():
        raise LiveError(f"book/live.py: no search with gamma = 1 is recorded of {name}")
    r, loss = tensors[f"{name}/r"], tensors[f"{name}/loss"]
    return {
        "steps": list(SEEN[: len(r)]),
        "r": [rounded(each) for each in r],
        "loss": [float(f"{value:.3g}") for value in loss.tolist()],
    }


def numbers() -> dict:
    "The sampler's path, the triggers, the target, and both searches."
    denoiser = load(ROOT / "data" / "zoo" / PLANTED, device="cpu")
    times = denoiser.noise_schedule.timesteps(STEPS)
    planted = Trigger.load(ROOT / "data" / "zoo" / PLANTED / "trigger.safetensors")
    return {
        "times": times,
        "alpha": [*denoiser.noise_schedule.alpha[times].tolist(), 1.0],
        "sigma": [*denoiser.noise_schedule.sigma[times].tolist(), 0.0],
        "planted": rounded(planted.r, 6),
        "other": rounded(glasses(denoiser.shape), 6),
        "target": rounded(corner(denoiser.shape), 6),
        "enough": ENOUGH,
        "models": [
            {"name": name, "title": title, "planted": name == PLANTED, "search": search_of(name)}
            for name, title in MODELS.items()
        ],
    }


# ---------------------------------------------------------------- the page


def stage(folder: Path) -> str:
    "Put all that the piece loads into folder/live; what its page says, in MyST."
    target = folder / "live"
    try:
        files = {path.name: path for path in runtime()}
    except Unreachable as error:
        print(f"the live model is left out: {error}", flush=True)
        return ABSENT.format(why=error)
    files |= {f"{name}.onnx": export(name) for name in MODELS}
    target.mkdir(parents=True, exist_ok=True)
    for name, path in files.items():
        shutil.copyfile(path, target / name)
    text = json.dumps(numbers(), separators=(",", ":"))
    (target / "numbers.json").write_text(text, encoding="utf-8")
    total = sum(path.stat().st_size for path in target.iterdir())
    return PIECE.format(megabytes=total / 1e6)


# ---------------------------------------------------------------- the still figure


def still(path: Path = FIGURE) -> None:
    "What the piece shows of the planted trigger at full strength, for those who cannot run it."
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from terd_nb.input_detection import InputDetector

    models = {name: load(ROOT / "data" / "zoo" / name, device="cpu") for name in MODELS}
    planted = Trigger.load(ROOT / "data" / "zoo" / PLANTED / "trigger.safetensors")
    found = Trigger(read_whole_searches()[0][f"{PLANTED}/r"][-1])
    z = models[PLANTED].noise(4, seed=1)
    rows = {
        "backdoored,\nclean": models[PLANTED].sample(z, STEPS, 1.0),
        "backdoored,\ntriggered": models[PLANTED].sample(planted.stamp(z), STEPS, 1.0),
        "honest,\ntriggered": models["benign-a"].sample(planted.stamp(z), STEPS, 1.0),
    }
    figure = plt.figure(figsize=(9, 3.3), dpi=100, layout="constrained")
    left, middle, right = figure.subfigures(1, 3, width_ratios=[1, 3, 3])
    grey = {"cmap": "gray", "vmin": -1, "vmax": 1}
    for axis, (title, r) in zip(
        left.subplots(2, 1), {"trigger $r$": planted.r, r"found, $\hat{r}$": found.r}.items()
    ):
        axis.imshow(r[0], **grey)
        axis.set_title(title, fontsize=10)
        axis.axis("off")
    for line, (title, images) in zip(middle.subplots(3, 4), rows.items()):
        for axis, image in zip(line, images):
            axis.imshow(image[0], **grey)
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(title, fontsize=9)
    axis, detector = right.subplots(), InputDetector(found)
    noise = models[PLANTED].noise(500, seed=2)
    scores = {"clean": detector.score(noise), "triggered": detector.score(planted.stamp(noise))}
    bins = torch.linspace(-130, 150, 57).tolist()
    for (title, score), colour in zip(scores.items(), (CLEAN, TRIGGERED)):
        axis.hist(score, bins=bins, alpha=0.6, color=colour, label=title)
    axis.axvline(0, color="black", linestyle="--", linewidth=1)
    axis.set(xlabel=r"score by $\hat{r}$", ylabel="inputs of 500")
    axis.legend(loc="upper center")
    figure.savefig(path)
    plt.close(figure)


if __name__ == "__main__":
    still()
    print(f"{FIGURE.relative_to(ROOT)}: {FIGURE.stat().st_size:,} bytes")
