"The app of workshop D2: each knob moves what is seen, and what goes wrong is told in the app."

import io
import re

import numpy as np
import pytest
from PIL import Image

from terd_nb import load
from terd_nb.explorer import ITS_OWN, Explorer
from terd_nb.triggers import Trigger
from terd_nb.zoo import zoo_path

NAMES = ("villan-psi1", "baddiffusion-box", "benign-a")
START = {"model": "villan-psi1", "trigger": ITS_OWN, "strength": 1.0, "steps": 10}


@pytest.fixture(scope="module")
def explorer():
    return Explorer({name: zoo_path(name) for name in NAMES})


def moved(explorer, **values):
    "The picture's pixels and the words, with these knobs moved from where all begin."
    for name, value in (START | values).items():
        getattr(explorer, name).value = value
    assert explorer.picture.layout.display == ""
    with Image.open(io.BytesIO(explorer.picture.value)) as image:
        return np.asarray(image, dtype=int), explorer.words.value


@pytest.mark.parametrize(
    "values",
    [{"model": "baddiffusion-box"}, {"trigger": "checkerboard"}, {"strength": 0.5}, {"steps": 4}],
    ids=lambda values: next(iter(values)),
)
def test_every_knob_moves_the_picture(explorer, values):
    pixels, words = moved(explorer)
    others, other_words = moved(explorer, **values)
    assert (abs(pixels - others) > 20).mean() > 0.01
    assert (words == other_words) == (list(values) == ["steps"])  # the detector sees no picture


def test_without_strength_there_is_no_trigger(explorer):
    pixels, words = moved(explorer, strength=0.0)
    above, below = np.split(pixels, 2)
    assert abs(above - below).max() <= 1
    assert words.count("<b>0 of 4") == 2


def test_the_scores_are_those_of_a_shift(explorer):
    "log N(x; r, 1) - log N(x; 0, 1) is <x, r> - |r|^2/2."
    _, words = moved(explorer)
    r = Trigger.load(zoo_path(START["model"]) / "trigger.safetensors").r
    z = load(zoo_path(START["model"])).noise(4, 0)
    wanted = (z * r).sum((1, 2, 3)) - r.square().sum() / 2
    lines = words.split("<br>")[1:]
    clean, triggered = ([float(x) for x in re.findall(r"-?\d+\.\d", line)] for line in lines)
    assert clean == pytest.approx(wanted.tolist(), abs=0.06)
    assert triggered == pytest.approx((wanted + r.square().sum()).tolist(), abs=0.06)
    assert "0 of 4" in lines[0] and "4 of 4" in lines[1]


def test_errors_are_told_in_the_app(explorer, tmp_path):
    moved(explorer)
    explorer.model.value = "benign-a"
    assert "no trigger of its own" in explorer.words.value
    assert explorer.picture.layout.display == "none"
    moved(explorer)  # and it recovers
    (tmp_path / "<b>").mkdir()
    broken = Explorer({"broken": tmp_path / "<b>"})
    assert "cannot be shown" in broken.words.value
    assert "&lt;b&gt;" in broken.words.value and broken.words.value.count("<b>") == 1
