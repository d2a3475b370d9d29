"""benchmarks/memory.py counts what a run takes: worked by hand, and on this machine's CPU."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from torch._subclasses.fake_tensor import FakeTensorMode

sys.path.insert(0, str(ROOT / "benchmarks"))
import memory

SCRIPT = ROOT / "benchmarks/memory.py"
MIB = 2**20


def rows(text):
    """A table's lines -> [{column: cell}], less what is no row."""
    lines = [line.strip("| \n").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return [dict(zip(memory.COLUMNS, cells)) for cells in lines[1:]]


def run(*flags, launch=()):
    words = [sys.executable, *launch, SCRIPT, *flags]
    environment = os.environ | dict(OMP_NUM_THREADS="1")
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("fake", [True, False])
def test_live_bytes(fake):
    """Storages are counted once, whatever looks at them, until they are freed or resized."""
    counter = memory.LiveBytes()
    mode = FakeTensorMode() if fake else torch.no_grad()
    with mode, counter:
        x = torch.empty(MIB)  # 4 MiB
        view = x.view(2, -1)[1]
        assert counter.live["cpu"] == 4 * MIB

        y = x.double() + 1  # 8 MiB for x in double, 8 for the sum
        assert counter.live["cpu"] == 12 * MIB
        assert counter.peak["cpu"] == 20 * MIB

        del x
        assert counter.live["cpu"] == 12 * MIB
        del view
        assert counter.live["cpu"] == 8 * MIB
        y.untyped_storage().resize_(0)
        assert counter.live["cpu"] == 0
        y.untyped_storage().resize_(MIB)
        assert counter.live["cpu"] == MIB
    del y
    assert counter.live["cpu"] == 0
    assert counter.sizes == {}


def test_flags_that_make_it_fit(monkeypatch, capsys):
    """Flags are added one by one until the run fits, those that train something else last."""
    peaks = []

    def forecast(c):
        tried.append(c)
        return dict.fromkeys((*memory.PHASES, "host"), peaks.pop(0) * 2**30)

    monkeypatch.setattr(memory, "forecast", forecast)
    c = memory.Config(gib=40, per_device_train_batch_size=2, gradient_accumulation_steps=3)

    # 38 GiB and the 2 beyond them fit.
    tried = []
    peaks = [70, 50, 38]
    assert memory.make_fit(c)
    flags = [row["flags"] for row in rows("| head\n" + capsys.readouterr().out)]
    batch = "`--per_device_train_batch_size 2` `--gradient_accumulation_steps 3`"
    assert flags == [
        batch,
        "`--gradient_accumulation_steps 6`",
        "`--gradient_accumulation_steps 6` `--offload_optimizer`",
    ]

    tried = []
    peaks = [70, 60, 55, 50, 38.5]
    assert not memory.make_fit(c)
    last = tried[-1]
    assert last.freeze_vision and last.offload_optimizer and last.beta == 0
    assert last.per_device_train_batch_size == 1


@pytest.mark.parametrize("peak, card", [(5, "8 GB"), (38, "40 GB"), (38.1, "48 GB")])
def test_smallest_card(peak, card):
    found = dict.fromkeys(memory.PHASES, 2**30) | dict(rollout=peak * 2**30)
    assert memory.smallest_card(found) == card


@pytest.mark.slow
def test_the_page_has_the_forecast():
    """docs/performance.md's row of 8 x 7B is what benchmarks/memory.py prints."""
    [row] = rows(run("--gpus", 8))
    page = (ROOT / "docs/performance.md").read_text()
    assert f"| {' | '.join(row.values())} |" in page


# Where logits of the large vocabulary and AdamW's moments make 1.2 GiB and more.
MID = "--size mid --max_completion_length 16 --no_gradient_checkpointing --measure".split()


def check_forecast(ranks):
    """The forecast of each phase and what it took, on this machine, agree to within 10 %."""
    launch = []
    if ranks > 1:
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    expected, found = rows(run(*MID, "--gpus", ranks, launch=launch))
    assert found["a card of"] == "measured"
    assert float(found["peak"]) > 1

    for phase in (*memory.PHASES, "peak"):
        # Among CPUs gloo gathers the rollout's copy through a buffer.
        if (ranks, phase) != (2, "rollout"):
            # Each number is rounded to 0.01.
            assert float(found[phase]) == pytest.approx(float(expected[phase]), rel=0.1, abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_forecast_is_what_the_process_takes(ranks):
    """The forecast's peak is that of the resident memory, on CPU.

    Of one process, and of the first of two that FSDP2 shards the model over.
    """
    check_forecast(ranks)
