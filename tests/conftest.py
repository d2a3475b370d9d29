"""Fixtures of the longer suites.

A tiny random model in both implementations, and the toy's data with its untrained model.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pebble import ProcessPool

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# Matrices this small lose more to a second thread than they gain, in subprocesses too. A model that
# is no folder is not looked for on the hub, which would be asked again and again without a network.
os.environ |= dict(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
torch.set_num_threads(1)

from test_smoke import make_tiny, make_toy_folder  # noqa: E402


@pytest.fixture
def tiny_model(tmp_path_factory):
    """make(seed=0, **changes) -> (folder, transformers' model, ours), the same weights in both.

    The changes are of the flat config; `vision_config=dict(...)` changes the vision tower's.
    """

    def make(**changes):
        return make_tiny(tmp_path_factory.mktemp("tiny"), **changes)

    return make


@pytest.fixture(autouse=True)
def no_decoder_outlives_its_test(monkeypatch):
    """Stops the processes of datasets that a test took single samples from, as load_batches does.

    Left running, they would pile up, and hold each other's pipes open when pytest is killed.
    """
    pools = []
    make_pool = ProcessPool.__init__

    def make_and_note(pool, *args, **options):
        make_pool(pool, *args, **options)
        pools.append(pool)

    monkeypatch.setattr(ProcessPool, "__init__", make_and_note)
    yield
    for pool in pools:
        pool.stop()
        pool.join()


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A folder with the toy's data/ and its untrained model init/.

    All tests of a session share it: copy before you change anything in it.
    """
    return make_toy_folder(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="session")
def base():
    """The toy's base model, which is trained here if it is missing."""
    if not (ROOT / "toy/model").exists():
        subprocess.run([sys.executable, ROOT / "toy/make_toy.py"], check=True, timeout=1200)
    return ROOT / "toy/model"
