"What every test shares: one thread a worker, no screen, no hub."

import os
from pathlib import Path

import pytest

if (
    "PYTEST_XDIST_WORKER" in os.environ
):  # two workers of one thread are faster than two that fight over the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["MPLBACKEND"] = "Agg"
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session")
def root():
    "The checkout."
    return Path(__file__).resolve().parents[1]
