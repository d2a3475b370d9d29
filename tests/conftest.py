"""Fixtures of the longer suites: a tiny random model in both implementations, and the toy's data with its untrained model."""
import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ |= dict(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")  # for subprocesses too
torch.set_num_threads(1)  # matrices this small lose more to a second thread than they gain

from test_smoke import make_tiny, make_toy_folder  # noqa: E402


@pytest.fixture
def tiny_model(tmp_path_factory):
    """Factory: make(seed=0, **changes of the flat config) -> (folder, transformers' model, ours), the same weights in both.
    `vision_config=dict(...)` changes entries of the vision tower's."""
    return lambda **changes: make_tiny(tmp_path_factory.mktemp("tiny"), **changes)


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A folder with the toy's data/ and its untrained model init/. Session-scoped: copy before you change anything in it."""
    return make_toy_folder(tmp_path_factory.mktemp("toy"))
