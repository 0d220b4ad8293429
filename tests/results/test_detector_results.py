"The detectors' files, and what each row's threshold was fitted on."
import json

import numpy as np
import pytest

from terd_nb.lab.measure import detector_for, honest_rows
from terd_nb.lab.results import HUNDREDTH, read_benchmark, usual
from terd_nb.loading.files import data_dir
from terd_nb.model_detection import METHOD_FEATURES, NATURAL_ZERO, ModelDetector


@pytest.mark.parametrize("method", sorted({*METHOD_FEATURES} - {*NATURAL_ZERO}))
def test_a_detector_file_says_what_it_was_fitted_on(method):
    path = data_dir() / "detectors" / f"{method}.json"
    state = json.loads(path.read_text(encoding="utf-8"))
    detector = ModelDetector.default(method)
    assert detector.method == method and np.allclose(detector.mean_, np.mean(state["benign"], 0))


def test_every_threshold_comes_from_honest_models_that_were_searched_in_the_same_way():
    kinds = usual(read_benchmark()).groupby(["method", "settings", "resolution"])
    for (method, settings, size), _ in kinds:
        fitted_on = honest_rows(method, settings, size=size)
        assert method in NATURAL_ZERO or len(fitted_on) >= 3, (method, settings, size)


@pytest.mark.parametrize("size, expected", [(16, {16}), (32, {32}), (128, {32})])
def test_thresholds_come_from_small_models_alone(size, expected):
    rows = honest_rows("elijah", size=size)
    assert set(rows["resolution"]) == expected and not (rows["split"] == "test").any()
    detector = detector_for("elijah", "", size)
    assert len(detector.benign_) == len(rows) >= 3
    if size == 16:
        assert np.allclose(detector.mean_, ModelDetector.default("elijah").mean_)


@pytest.mark.parametrize("method", NATURAL_ZERO)
def test_one_threshold_without_honest_models_serves_all_sizes(method):
    assert not (data_dir() / "detectors" / f"{method}.json").exists()
    for size in (16, 128):
        detector = detector_for(method, "", size)
        assert detector.sigmas == NATURAL_ZERO[method] and len(detector.benign_) == 0


def test_a_shortened_search_is_judged_by_shortened_searches():
    brief = detector_for("published", HUNDREDTH, 32)
    assert len(brief.benign_) == len(honest_rows("published", HUNDREDTH, size=32)) >= 3
    assert not np.allclose(ModelDetector.default("published").mean_, brief.mean_)
