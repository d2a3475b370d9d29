"""Fixtures of the longer suites.

A tiny random model in both implementations, and the toy's data with its untrained model.
"""

import multiprocessing
import os
import socket
import subprocess
import sys
import traceback
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


@pytest.fixture(scope="session")
def on_ranks(tmp_path_factory):
    """on_ranks(script, words, ranks=2, **more) -> [(exit code, stdout, stderr)], one a rank.

    The main() of a script in so many processes, as torchrun starts them, with `more` in their
    environment. They are forked, so none imports torch anew: a second in place of eight.
    """

    def run(script, words, ranks=2, **more):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        folder = tmp_path_factory.mktemp("ranks")
        context = multiprocessing.get_context("fork")
        processes = []
        for rank in range(ranks):
            environment = dict(RANK=rank, WORLD_SIZE=ranks, LOCAL_RANK=rank)
            environment |= dict(MASTER_ADDR="localhost", MASTER_PORT=port) | more
            arguments = (script, words, environment, folder / str(rank))
            processes.append(context.Process(target=be_a_rank, args=arguments))
            processes[-1].start()

        ends = []
        for rank, process in enumerate(processes):
            process.join(timeout=100)
            process.kill()  # where it hangs
            out, err = ((folder / f"{rank}.{name}").read_text() for name in ("out", "err"))
            ends.append((process.exitcode, out, err))
        return ends

    return run


def be_a_rank(script, words, environment, output):
    """In a forked process: sets what a script reads at its import, and runs its main()."""
    os.environ |= {name: str(value) for name, value in environment.items()}
    script.RANK = environment["RANK"]
    script.LOCAL_RANK = environment["LOCAL_RANK"]
    script.WORLD = script.LOCAL_WORLD = environment["WORLD_SIZE"]
    script.RESTARTS = environment.get("TORCHELASTIC_RESTART_COUNT", 0)

    sys.argv = [script.__file__, *map(str, words)]
    sys.stdout = open(f"{output}.out", "w", buffering=1)
    sys.stderr = open(f"{output}.err", "w", buffering=1)
    code = 1
    try:
        script.main()
        code = 0
    except SystemExit as end:
        code = end.code
    except Exception:
        traceback.print_exc()
    os._exit(code)  # without what pytest has registered to be done at its own end
