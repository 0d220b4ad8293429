"The command line: exit statuses, one line an error, JSON by the schema, hostile names, killing it."
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import fuzz
import numpy as np
import pytest
import torch
import typer
from bs4 import BeautifulSoup
from diffusers import DDIMPipeline
from jsonschema import ValidationError, validate
from safetensors.torch import load_file, save_file

from terd_nb import __version__, cli, planting, training
from terd_nb import scanning as scan_module
from terd_nb.cli import exit_status, main, printable, problem
from terd_nb.lab import cli as lab_cli
from terd_nb.lab import datasets, model_sets
from terd_nb.loading import files, hub
from terd_nb.loading.files import CheckpointError, data_dir
from terd_nb.model_detection import NATURAL_ZERO
from terd_nb.triggers import Trigger
from terd_nb.zoo import zoo_cards, zoo_names, zoo_path

SCHEMA = json.loads((data_dir() / "schema" / "scan-1.json").read_text(encoding="utf-8"))
# All that a folder's name may hold.
HOSTILE = "[red]x[red]\x1b[2J\u202e\nclean <script>alert(1)<script>"
FAILURES = {
    "refused": ValueError("unet/config.json is not there"),
    "strange": RuntimeError("shapes\n  do not\tfit"),
    "memory": MemoryError(),
    "stopped": KeyboardInterrupt(),
}


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    "Every test starts in a folder of its own."
    monkeypatch.chdir(tmp_path)
    for name in ("FORCE_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERD_DATA", str(tmp_path / "no-data-set-was-fetched"))


@pytest.fixture(scope="module")
def real():
    "One real scan, whose verdict the tests change as they need it."
    return scan_module.scan(zoo_path("baddiffusion-box"), progress=False)


@pytest.fixture
def scanner(real, monkeypatch):
    "A scan whose outcome is written in the model's name: a verdict, or an exception to raise."
    look = files.check_folder

    def fake_look(model, **weights):
        real = "/" in str(model) or str(model) == "missing"
        return look(model, **weights) if real else Path(model)

    def fake(model, progress=True, callback=None, **settings):
        word = str(model).split("-")[0]
        if word in FAILURES:
            raise FAILURES[word]
        callback("done", 1.0, {})
        attack = None if word == "clean" else real.result.attack
        changed = {"verdict": word, "model": str(model), "attack": attack, "notes": []}
        return replace(real, result=real.result.model_copy(update=changed))

    monkeypatch.setattr(files, "check_folder", fake_look)
    monkeypatch.setattr(scan_module, "scan", fake)


def terd(*args, **options):
    "The command in a process of its own, as it is installed."
    env = os.environ.copy()
    env.pop("FORCE_COLOR", None)
    code = "import sys; from terd_nb.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, *args]
    return subprocess.run(command, capture_output=True, env=env, **options)


def read(name):
    return Path(name).read_text(encoding="utf-8")


def lines(text):
    return text.splitlines() if isinstance(text, str) else text.decode().splitlines()


# ---------------------------------------------------------------- the status

@pytest.mark.parametrize("models, status", [
    (["clean"], 0), (["clean-a", "clean-b"], 0),
    (["backdoored"], 1), (["refused", "backdoored"], 1),
    (["backdoored", "inconclusive", "strange"], 1),
    (["inconclusive"], 2), (["refused"], 2), (["clean", "inconclusive"], 2),
    (["clean", "refused"], 2), (["clean", "memory"], 2),
])
def test_exit_status_of_several_models(scanner, capsys, models, status):
    assert main(["scan", *models, "--json", "out.json", "--html", "out.html"]) == status
    document = json.loads(read("out.json"))
    validate(document, SCHEMA)
    words = [name.split("-")[0] for name in models]
    expected = ["error" if word in FAILURES else word for word in words]
    assert [r["verdict"] for r in document["results"]] == expected
    assert [r["source"] for r in document["results"]] == models
    out, err = capsys.readouterr()
    failed = expected.count("error")
    assert len(lines(out)) == len(models) - failed
    assert len(lines(err)) == failed + (len(models) > 1)
    page = read("out.html")
    assert all(name in page for name in models)


def test_clean_needs_every_model():
    assert exit_status(["clean", "clean"]) == 0
    for word in ("error", "inconclusive", "something new"):
        assert exit_status(["clean", word]) == 2


def test_an_unexpected_failure_is_one_line_and_the_next_model_is_scanned(scanner, capsys):
    assert main(["scan", "strange", "memory", "clean"]) == 2
    out, err = capsys.readouterr()
    assert out.startswith("clean ") and "clean:" in lines(out)[0].split()
    assert lines(err)[:2] == [
        "terd: strange: RuntimeError: shapes do not fit (--debug shows where)",
        "terd: memory: MemoryError: MemoryError (--debug shows where)",
    ]


def test_a_model_that_its_files_rule_out_stops_no_other(scanner, capsys):
    assert main(["scan", "no/such/folder", "clean", "zoo:tiger", "--json", "out.json"]) == 2
    results = json.loads(read("out.json"))["results"]
    assert [r["verdict"] for r in results] == ["error", "clean", "error"]
    out, err = capsys.readouterr()
    assert out.startswith("clean ") and len(lines(out)) == 1
    assert lines(err)[0].startswith("terd: no/such/folder: ") and len(lines(err)) == 3


def test_an_id_is_asked_for_on_the_hub(scanner, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(files, "check_folder", lambda model, **weights: None)
    monkeypatch.setattr(hub, "check_hub", lambda model, **weights: asked.append(model))
    assert main(["scan", "clean"]) == 0 and asked == ["clean"]
    assert capsys.readouterr().err == ""
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="is no folder, and the Hugging Face hub did not"):
        cli.check_model("user/nowhere")   # the tests are offline


@pytest.mark.parametrize("command", [
    "scna model", "scan", "scan clean --colour", "scan clean --method other",
    "scan clean --seed x", "scan clean --seed -1", "scan clean --device abacus",
    "scan clean --json no/folder.json", "scan clean --html .",
    "inputs zoo:baddiffusion-box missing.npy", "inputs missing noise.npy",
    "zoo show tiger", "zoo verify tiger", "zoo build tiger", "zoo build --size 48",
    "zoo bild", "data lst", "bench --hard --sizes", "bench --quickly", "bench --size 32",
    "bench --hard --held-out", "bench --held-out --size 64", "zoo build --families --held-out",
    "bench --sizes --size 48", "bench --report --hard", "zoo build --hard --families",
    "zoo build --families --size 32",
    "plant zoo:benign-a .", "plant zoo:tiger out", "plant missing out",
    "plant zoo:benign-a out --attack other", "plant zoo:benign-a out --trigger nothing",
    "plant zoo:benign-a out --target 12", "plant zoo:benign-a out --images nowhere",
    "plant zoo:benign-a out --images emoji", "plant zoo:benign-a out --images fashion-mnist",
    "demo --html no/such/folder.html",
])
def test_wrong_use_is_one_line_and_2(scanner, capsys, command):
    assert main(command.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(lines(err)) == 1
    assert err.startswith("terd: ") and "Traceback" not in err
    assert not os.listdir()


def test_debug_shows_the_traceback_and_keeps_the_status(scanner, capsys):
    assert main(["scan", "strange", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err
    assert main(["--debug", "zoo", "show", "tiger"]) == 2   # not 1, with which Python ends
    err = capsys.readouterr().err
    assert "Traceback" in err and lines(err)[-1].startswith("terd: ")


def test_interrupted_is_130_and_one_line(scanner, capsys):
    assert main(["scan", "stopped", "clean", "--json", "out.json", "--html", "out.html"]) == 130
    assert capsys.readouterr().err == "terd: interrupted\n"
    assert not os.listdir()


def test_quiet_says_nothing_but_errors(scanner, capsys):
    assert main(["scan", "clean", "backdoored", "--quiet"]) == 1
    assert capsys.readouterr() == ("", "")
    assert main(["scan", "refused", "-q"]) == 2
    assert capsys.readouterr() == ("", "terd: refused: unet/config.json is not there\n")


def test_json_on_stdout_is_nothing_but_json(scanner, capsys):
    assert main(["scan", "clean", "refused", "--json", "-"]) == 2
    out, err = capsys.readouterr()
    validate(json.loads(out), SCHEMA)
    assert len(lines(err)) == 3


# ---------------------------------------------------------------- in processes of their own

LIGHT = """
import sys
from terd_nb.cli import main

status = main(sys.argv[1:]) if sys.argv[1:] else 0
heavy = {"torch", "diffusers", "numpy", "matplotlib", "pandas", "sklearn"} & set(sys.modules)
assert not heavy, heavy
sys.exit(status)
"""


def run_light(*args):
    "The command in a process that fails when something heavy was imported."
    command = [sys.executable, "-c", LIGHT, *args]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "AssertionError" not in done.stderr, done.stderr
    return done


def test_importing_the_command_imports_nothing_heavy():
    assert run_light().returncode == 0


@pytest.mark.parametrize("line", [
    "--help", "--version", "scan --help", "bench --help", "plant --help", "zoo", "zoo list",
    "zoo show benign-a", "data", "data fetch --help", "zoo verify --help",
])
def test_help_and_lists_are_light(line):
    done = run_light(*line.split())
    assert (done.returncode, done.stderr) == (0, "")
    if line == "--version":
        assert done.stdout == f"terd_nb {__version__}\n"
    if line == "scan --help":
        assert "Exit status 0" in done.stdout
    if line == "--help":
        named = ("scan", "inputs", "convert", "demo", "plant", "zoo", "data", "course", "bench",
                 "schema")
        assert all(f" {name} " in done.stdout for name in named)


def refused_folder(kind):
    "A model that its files rule out."
    folder = Path(kind)
    if kind == "missing":
        return folder
    if kind == "pickle":
        shutil.copytree(zoo_path("benign-a"), folder)
        weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
        weights.rename(weights.with_suffix(".bin"))
        return folder
    folder.mkdir()
    if kind == "pipeline":
        index = {"_class_name": "StableDiffusionPipeline"}
        (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("kind, reason", [
    ("missing", "is no folder"), ("empty", "is empty"),
    ("pipeline", "_class_name is 'StableDiffusionPipeline'"), ("pickle", "only a pickle"),
])
@pytest.mark.parametrize("command", ["scan", "inputs", "plant"])
def test_a_refusal_is_light_and_one_line(command, kind, reason):
    model = str(refused_folder(kind))
    more = {"scan": [], "inputs": ["noise.npy"], "plant": ["out"]}[command]
    done = run_light(command, model, *more)
    assert (done.returncode, done.stdout, len(lines(done.stderr))) == (2, "", 1)
    assert done.stderr.startswith("terd: ") and reason in done.stderr


@pytest.mark.parametrize("option", ["nowhere.npy", "noise.npy --trigger nowhere.safetensors"])
def test_a_missing_noise_or_trigger_is_told_before_anything_heavy_is_loaded(tmp_path, option):
    (tmp_path / "noise.npy").write_bytes(b"")
    words = option.replace("noise.npy", str(tmp_path / "noise.npy")).split()
    done = run_light("inputs", str(zoo_path("benign-a")), *words)
    assert (done.returncode, done.stdout, len(lines(done.stderr))) == (2, "", 1)
    assert "nowhere" in done.stderr and "is no file" in done.stderr


def commands_of(app):
    "A Typer's commands by their names, groups among them."
    return typer.main.get_command(app).commands


def test_help_says_of_the_evidence_what_its_commands_say():
    listed = commands_of(cli._app)
    real = commands_of(lab_cli.evidence_app)
    names = {"plant", "bench", "data", "zoo", "course"}
    assert names == set(real) and names < set(listed)
    listed |= {f"zoo {name}": found for name, found in listed.pop("zoo").commands.items()}
    real |= {f"zoo {name}": found for name, found in real.pop("zoo").commands.items()}
    assert len(real) == 6
    for name, command in real.items():
        assert listed[name].help == command.help.split("\n\n")[0]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "A real run: a backdoored model, and folders with hostile names."
    folder = tmp_path_factory.mktemp("whole")
    names = [HOSTILE, os.fsdecode(b"latin\xe9")]
    for name in names:
        (folder / name).mkdir()
    models = ["zoo:baddiffusion-box", *names]
    done = terd("scan", *models, "--json", "out.json", "--html", "out.html", cwd=folder)
    return done, json.loads(read(folder / "out.json")), read(folder / "out.html")


def test_a_whole_run(whole):
    done, document, page = whole
    assert done.returncode == 1, done.stderr
    validate(document, SCHEMA)
    assert [r["verdict"] for r in document["results"]] == ["backdoored", "error", "error"]
    assert document["schema_version"] == 1
    result = document["results"][0]
    assert result["sample_evals"] > 0 and result["seconds"] > 0
    assert result["evidence"]["lam"] == pytest.approx(0.5, abs=0.1)
    assert result["threshold"] == NATURAL_ZERO["fast"] and "p-value" not in result["evidence"]
    # which file was judged, as sha256sum says it
    weights = zoo_path(result["model"]) / "unet" / "diffusion_pytorch_model.safetensors"
    assert result["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert result["sha256"] in page
    assert [line.split()[0] for line in lines(done.stdout)] == ["backdoored"]
    assert "zoo:baddiffusion-box" in page and "1 of 3 models is backdoored" in page


def test_hostile_names_are_printed_and_not_obeyed(whole):
    done, document, page = whole
    text = (done.stdout + done.stderr).decode()
    assert all(c.isprintable() or c == "\n" for c in text)
    assert len(lines(done.stderr)) == 3   # two errors and the summary
    assert r"[red]x[red]\x1b[2J\u202e\nclean" in text and "latin\\udce9" in text
    assert "\x1b" not in json.dumps(document, ensure_ascii=False)
    soup = BeautifulSoup(page, "html.parser")
    assert not soup.find_all("script") and "<script>alert(1)<script>" in soup.get_text()


def test_same_seed_same_result(whole, real):
    again = whole[1]["results"][0]
    ours = json.loads(real.result.model_dump_json())
    assert again["evidence"] == pytest.approx(ours["evidence"], rel=1e-4)
    for key in ("verdict", "attack", "sample_evals", "seed", "shape", "method"):
        assert again[key] == ours[key]


def test_output_to_a_pipe_that_closes():
    code = "import sys; from terd_nb.cli import main; sys.exit(main(['zoo', 'show', 'benign-a']))"
    command = [sys.executable, "-c", code]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.wait(60) != 1   # 1 would be a verdict


# ---------------------------------------------------------------- stopped and killed

CHILD = """
import signal, sys, time
sys.path.insert(0, {tests!r})
import fuzz, terd_nb.scanning
from terd_nb.cli import main

fuzz.short_search()

def hang(*args, **settings):
    print("now", flush=True)
    time.sleep(100)

# What a shell runs in the background ignores the signal.
signal.signal(signal.SIGINT, signal.default_int_handler)
{patch}
sys.exit(main(["scan", "zoo:benign-a", "--json", "out.json"]))
"""
IN_THE_SCAN = "terd_nb.scanning.scan = hang"
IN_THE_WRITING = "terd_nb.scanning.os.replace = hang"


@pytest.mark.parametrize("patch, sent, status", [
    (IN_THE_SCAN, signal.SIGINT, 130), (IN_THE_SCAN, signal.SIGKILL, -9),
    (IN_THE_WRITING, signal.SIGKILL, -9),
], ids=["stopped", "killed", "killed while writing"])
def test_the_old_report_stays_until_the_new_one_is_whole(tmp_path, patch, sent, status):
    (tmp_path / "out.json").write_text("old")
    command = [sys.executable, "-c", CHILD.format(patch=patch, tests=str(Path(__file__).parent))]
    process = subprocess.Popen(command, cwd=tmp_path, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    while process.stdout.readline() not in ("now\n", ""):   # "": it ended before it came so far
        pass
    process.send_signal(sent)
    out, err = process.communicate(timeout=60)
    assert process.returncode == status, err
    assert (tmp_path / "out.json").read_text() == "old"
    if sent == signal.SIGINT:
        assert err == "terd: interrupted\n" and os.listdir(tmp_path) == ["out.json"]


def test_reports_go_through_links_and_into_pipes(scanner, tmp_path):
    (tmp_path / "target.json").write_text("old")
    (tmp_path / "link.json").symlink_to("target.json")
    assert main(["scan", "clean", "--json", "link.json"]) == 0
    assert (tmp_path / "link.json").is_symlink()
    assert "clean" in (tmp_path / "target.json").read_text()
    assert main(["scan", "clean", "--json", os.devnull]) == 0
    assert not os.path.isfile(os.devnull)


# ---------------------------------------------------------------- the schema

def test_shipped_schema_is_up_to_date(capsys):
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == SCHEMA


def test_schema_refuses_what_lacks_a_verdict(real):
    good = json.loads(scan_module.ScanDocument(results=[real.result]).model_dump_json())
    validate(good, SCHEMA)
    nameless = {"schema_version": 1, "results": [{"model": "x"}]}
    for broken in ({"results": []}, {"schema_version": 2, "results": []}, nameless):
        with pytest.raises(ValidationError):
            validate(broken, SCHEMA)


# ---------------------------------------------------------------- terd demo

def test_demo_compares_with_the_truth(scanner, real, monkeypatch, capsys):
    expected = {"benign": "clean", "backdoored": "backdoored"}
    cards = zoo_cards()
    verdicts = {name: expected[card["label"]] for name, card in cards.items()}

    def fake(model, callback=None, **settings):
        changed = {"verdict": verdicts[model.name], "model": model.name}
        return replace(real, result=real.result.model_copy(update=changed))

    monkeypatch.setattr(scan_module, "scan", fake)
    assert main(["demo"]) == 0
    out = capsys.readouterr().out
    assert f"{len(cards)} of {len(cards)} verdicts are right" in out and "terd scan MODEL" in out
    test = [name for name, card in cards.items() if card["recipe"]["split"] == "test"]
    assert all(name + (" *" if name in test else " ") in out for name in cards)
    page = read("terd-demo.html")
    assert page.count('<section class="model') == len(cards)
    assert page.count("set aside for the test") == len(test)

    verdicts[next(iter(cards))] = "inconclusive"   # not right, either
    assert main(["demo", "--html", "second.html"]) == 1
    assert f"{len(cards) - 1} of {len(cards)} verdicts are right" in capsys.readouterr().out


# ---------------------------------------------------------------- terd inputs

@pytest.fixture(scope="module")
def noises():
    "Three clean and two triggered inputs."
    trigger = Trigger.load(zoo_path("baddiffusion-box") / "trigger.safetensors")
    z = torch.randn(5, 1, 16, 16, generator=torch.Generator().manual_seed(3))
    return torch.cat([z[:3], trigger.stamp(z[3:])])


TRIGGER = str(zoo_path("baddiffusion-box") / "trigger.safetensors")
INPUTS = ["inputs", "zoo:baddiffusion-box"]


def test_inputs_with_the_trigger_found_by_itself(noises, capsys):
    np.save("noise.npy", noises.numpy())
    assert main([*INPUTS, "noise.npy", "--save-trigger", "found.safetensors"]) == 1
    rows = [line.split("\t") for line in lines(capsys.readouterr().out)]
    assert [row[0] for row in rows] == list("01234")
    assert [row[2] for row in rows] == ["clean"] * 3 + ["triggered"] * 2
    assert set(load_file("found.safetensors")) == {"r", "gamma"}
    assert main([*INPUTS, "noise.npy", "--trigger", "found.safetensors"]) == 1
    assert [line.split("\t") for line in lines(capsys.readouterr().out)] == rows


def test_inputs_in_every_form(noises, capsys):
    np.save("clean.npy", noises[:3].double().numpy())
    np.save("one.npy", noises[4].numpy().astype(">f4"))
    save_file({"anything": noises[:3].half()}, "clean.safetensors")
    for name, status in (("clean.npy", 0), ("one.npy", 1), ("clean.safetensors", 0)):
        assert main([*INPUTS, name, "--trigger", TRIGGER]) == status
    assert main([*INPUTS, "one.npy", "--trigger", TRIGGER, "--threshold", "1e9", "--quiet"]) == 0


@pytest.mark.parametrize("number", ["nan", "inf", "-inf"])
def test_a_threshold_that_nothing_passes_is_refused_at_once(noises, capsys, number):
    np.save("noise.npy", noises.numpy())
    assert main([*INPUTS, "noise.npy", "--threshold", number]) == 2   # before any search
    assert "--threshold" in capsys.readouterr().err


@pytest.mark.parametrize(("length", "gamma"), [(1e30, 1.), (1., 1e30), (1., 1e-30), (1., 1.1),
                                               (0., 1.), (float("nan"), 1.), (1., float("nan"))])
def test_a_trigger_that_no_noise_carries_is_refused(noises, capsys, length, gamma):
    "Else each input would be called clean, or a repair would end in NaN."
    np.save("noise.npy", noises.numpy())
    r, gamma = torch.full((1, 16, 16), length), torch.tensor(gamma)
    save_file({"r": r, "gamma": gamma}, "t.safetensors")
    assert main([*INPUTS, "noise.npy", "--trigger", "t.safetensors"]) == 2
    assert "t.safetensors is no trigger" in capsys.readouterr().err


def test_inputs_opens_what_a_scan_opens(noises, tmp_path, capsys):
    shutil.copytree(zoo_path("baddiffusion-box"), tmp_path / "model")
    place = tmp_path / "model" / "unet" / "config.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | {"sample_size": None}))
    np.save("noise.npy", noises.numpy())
    run = ["inputs", "model", "noise.npy", "--trigger", TRIGGER]
    assert main(run) == 2 and "--size" in capsys.readouterr().err
    assert main([*run, "--size", "16", "--classes", "2"]) == 1


def test_a_clean_model_is_mentioned(noises, capsys, monkeypatch):
    fuzz.shorten(monkeypatch)
    np.save("clean.npy", noises[:3].numpy())
    assert main(["inputs", "zoo:benign-a", "clean.npy"]) == 0
    assert "looks clean" in capsys.readouterr().err


def save_header(name, shape):
    "A .npy file whose header promises more than there is."
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    length = len(header).to_bytes(2, "little")
    Path(name).write_bytes(b"\x93NUMPY\x01\x00" + length + header.encode() + b"0" * 64)


BROKEN = {
    "NaN": lambda: np.save("x.npy", np.full((1, 1, 16, 16), np.nan)),
    "too large for float32": lambda: np.save("x.npy", np.full((1, 1, 16, 16), 1e300)),
    "another model's": lambda: np.save("x.npy", np.zeros((2, 3, 16, 16))),
    "two dimensions": lambda: np.save("x.npy", np.zeros((16, 16))),
    "none": lambda: np.save("x.npy", np.zeros((0, 1, 16, 16))),
    "integers": lambda: np.save("x.npy", np.zeros((1, 1, 16, 16), dtype=int)),
    "a pickle": lambda: np.save("x.npy", np.array([{}], dtype=object)),
    "an archive": lambda: os.rename((np.savez("x.npz", a=np.zeros(3)), "x.npz")[1], "x.npy"),
    "empty": lambda: Path("x.npy").touch(),
    "text": lambda: Path("x.npy").write_text("hello"),
    "a header that lies": lambda: save_header("x.npy", (10**10, 1, 16, 16)),
    "a folder": lambda: os.mkdir("x.npy"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_inputs_refuses(name, capsys):
    BROKEN[name]()
    assert main([*INPUTS, "x.npy", "--trigger", TRIGGER]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(lines(err)) == 1 and err.startswith("terd: x.npy")


def test_inputs_refuses_safetensors(noises, capsys):
    save_file({"a": noises, "b": noises + 1}, "two.safetensors")
    save_file({"r": noises[0], "gamma": torch.tensor(0.0)}, "zero.safetensors")
    save_file({"r": noises[0] * torch.nan, "gamma": torch.tensor(1.0)}, "nan.safetensors")
    Path("cut.safetensors").write_bytes(Path(TRIGGER).read_bytes()[:-1])
    np.save("x.npy", noises.numpy())
    assert main([*INPUTS, "two.safetensors", "--trigger", TRIGGER]) == 2
    for name in ("two", "zero", "nan", "cut", "missing"):
        assert main([*INPUTS, "x.npy", "--trigger", f"{name}.safetensors"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(lines(err)) == 6 and "Traceback" not in err


# ---------------------------------------------------------------- terd plant

PLANT = [
    "plant", "zoo:benign-a", "out", "--attack", "villandiffusion", "--trigger", "glasses",
    "--target", "hat", "--steps", "6", "--device", "cpu",
]
PLANTED = {"README.md", "trigger.safetensors", "target.png", "preview.png"}


def test_plant_makes_a_model_and_goes_on_where_it_was_killed(tmp_path, monkeypatch, capsys):
    assert main([*PLANT[:2], "whole", *PLANT[3:]]) == 0
    DDIMPipeline.from_pretrained("whole", use_safetensors=True)
    assert set(os.listdir("whole")) > PLANTED
    assert "backdoored on purpose" in read("whole/README.md")
    assert re.search(r"whole: attack success rate .*/64", capsys.readouterr().out)

    save = training.save_training

    def save_and_stop(path, step, *state):
        save(path, step, *state)
        if step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(planting, "fit", partial(planting.fit, save_every=0.0))
    monkeypatch.setattr(training, "save_training", save_and_stop)
    assert main(PLANT) == 130
    (kept,) = tmp_path.glob(".out.*.training.safetensors")
    assert not (tmp_path / "out").exists()
    assert main(PLANT) == 0
    assert "going on" in capsys.readouterr().err and not kept.exists()
    resumed = load_file("out/unet/diffusion_pytorch_model.safetensors")
    at_once = load_file("whole/unet/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(resumed[key], at_once[key]) for key in at_once)

    before = (tmp_path / "out" / "model_index.json").stat().st_mtime_ns
    assert main(PLANT) == 2   # it is there already
    assert (tmp_path / "out" / "model_index.json").stat().st_mtime_ns == before


def test_plant_on_a_data_set(monkeypatch, capsys):
    pictures = torch.rand(20, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    asked = []

    def load(*args):
        asked.append(args)
        return pictures, torch.arange(20) % 2

    monkeypatch.setattr(datasets, "load_dataset", load)
    data = ["--images", "fashion-mnist", "--target"]
    assert main([*PLANT[:-6], *data, "1", "--steps", "2", "--quiet"]) == 0
    assert asked == [("fashion-mnist", 16)] and "VillanDiffusion" in read("out/README.md")
    assert main(["plant", "zoo:benign-a", "other", *data, "2"]) == 2
    assert "there is no class 2" in capsys.readouterr().err and not os.path.exists("other")


# ---------------------------------------------------------------- terd zoo

def test_zoo_list_and_show(capsys):
    assert main(["zoo", "list"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in zoo_names()) and "\x1b" not in listed
    assert main(["zoo", "show", "baddiffusion-box"]) == 0
    shown = lines(capsys.readouterr().out)
    assert shown[0] == str(zoo_path("baddiffusion-box"))
    assert any("backdoored on purpose" in line for line in shown)


def test_zoo_verify(monkeypatch, capsys):
    found = {"benign-a": [], "benign-b": ["the checksum differs"]}
    monkeypatch.setattr(model_sets, "verify", lambda name, n: found[name])
    assert main(["zoo", "verify", "benign-a"]) == 0
    assert main(["zoo", "verify", "benign-a", "benign-b"]) == 1
    assert lines(capsys.readouterr().out)[-1] == "benign-b: the checksum differs"


def test_zoo_build(monkeypatch, tmp_path):
    called = []
    monkeypatch.setattr(model_sets, "build", lambda *args: called.append(args))
    assert main(["zoo", "build", "benign-a", "--jobs", "1", "--out", str(tmp_path)]) == 0
    assert main(["zoo", "build"]) == 0
    assert main(["zoo", "build", "--size", "64"]) == 0
    assert called == [("zoo", tmp_path, 1, ["benign-a"], None), ("zoo", None, 2, None, None),
                      ("sizes", None, 2, None, 64)]


# ---------------------------------------------------------------- words

def test_whatever_is_printed_is_one_printable_line():
    assert printable("a\x1b[31m\r\nb\u2028\udcff") == r"a\x1b[31m\r\nb\u2028\udcff"
    assert problem(KeyError("there is no such model")) == "there is no such model"
    assert problem(ValueError()) == "ValueError"
    assert len(problem(OSError("x" * 1000))) == 400 and "\n" not in problem(OSError("a\nb"))
