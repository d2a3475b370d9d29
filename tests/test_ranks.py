"""Several ranks, resuming, signals: a user's commands, on CPU with gloo, on the untrained toy."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

import sft_video

ROOT = Path(__file__).resolve().parent.parent
ENV = os.environ | dict(OMP_NUM_THREADS="1")

FLAGS = """
    --max_frames 8 --frame_size 56 --dataloader_num_workers 0
    --learning_rate 1e-3 --lr_scheduler_type constant --warmup_ratio 0
""".split()
SCRIPT_FLAGS = {
    "grpo_video.py": """
        --num_generations 4 --max_completion_length 8 --beta 0.1 --temperature 1.5
    """.split(),
    "sft_video.py": [],
}


def command(toy, script, out, *flags, ranks=1, torchrun=()):
    launch = []
    if ranks > 1:
        torchrun = torchrun or ["--standalone", f"--nproc_per_node={ranks}"]
        launch = ["-m", "torch.distributed.run", *torchrun]
    folders = ["--model", toy / "init", "--data_root", toy / "data", "--output_dir", out]
    words = [*launch, ROOT / script, *folders, *FLAGS, *SCRIPT_FLAGS[script], *flags]
    return [sys.executable, *map(str, words)]


def batch(size, accumulation):
    return [
        f"--per_device_train_batch_size={size}",
        f"--gradient_accumulation_steps={accumulation}",
    ]


def start(*args, ranks=1):
    """-> a function that waits for the run's good end: two runs at a time use both cores."""
    process = subprocess.Popen(
        command(*args, ranks=ranks),
        env=ENV,
        text=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )

    def wait():
        _, error = process.communicate(timeout=200)
        assert process.returncode == 0, error[-3000:]

    return wait


def run(*args, ranks=1):
    start(*args, ranks=ranks)()


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def difference(folder, other):
    """Largest absolute difference of two runs' final weights."""
    a = load_file(folder / "model.safetensors")
    b = load_file(other / "model.safetensors")
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def sampled(folder):
    """(step, sample_id) -> the token ids of its completions."""
    ids = {}
    for row in rows(folder / "rollouts.jsonl"):
        ids[row["step"], row["sample_id"]] = [x["ids"] for x in row["completions"]]
    return ids


@pytest.mark.parametrize(
    "script, loss_type, ranks, more",
    [
        ("grpo_video.py", "grpo", 2, []),
        pytest.param("grpo_video.py", "dapo", 4, [], marks=pytest.mark.slow),
        pytest.param("grpo_video.py", "grpo", 8, [], marks=pytest.mark.slow),
        pytest.param("grpo_video.py", "dr_grpo", 2, ["--beta", "0"], marks=pytest.mark.slow),
        pytest.param("sft_video.py", None, 2, ["--learning_rate", "2e-4"], marks=pytest.mark.slow),
    ],
)
def test_ranks_change_nothing(toy, tmp_path, script, loss_type, ranks, more):
    """Trap 16: a step must not depend on the number of ranks.

    It would, if gradients were not synchronised or a denominator were one rank's. The same global
    batch of 4 (8 on 8 ranks) must give the same rollouts, and loss, gradient norm and weights after
    3 steps to 1e-5; with beta 0, where a micro-batch of equal rewards has a forward without a
    backward, too.
    """
    one = tmp_path / "one"
    many = tmp_path / "many"
    flags = ["--max_steps", "3", *more]
    if loss_type:
        flags += ["--loss_type", loss_type]

    size = max(4, ranks)
    wait_for_one = start(toy, script, one, *flags, *batch(size // 2, 2))
    run(toy, script, many, *flags, *batch(1, size // ranks), ranks=ranks)
    wait_for_one()
    check_equal(one, many, loss_type, size)


def check_equal(one, many, sampling=True, size=4):
    """Two runs of 3 steps of `size` prompts are the same, to 1e-5."""
    log = rows(one / "metrics.jsonl")
    log_of_many = rows(many / "metrics.jsonl")
    assert len(log) == len(log_of_many) == 3
    for a, b in zip(log, log_of_many):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
        assert a["tokens"] == b["tokens"]
    if sampling:
        assert len(sampled(one)) == 3 * size
        assert sampled(one) == sampled(many)
    assert difference(one, many) < 1e-5


@pytest.mark.slow
def test_ranks_change_no_bonus(toy, base, tmp_path):
    """A sharded reference judges the consistency of answers as a whole one does.

    The toy's base model has chains of thought to be judged. Same rollouts, bonuses and weights.
    """
    one = tmp_path / "one"
    many = tmp_path / "many"
    more = "--max_steps 3 --beta 0 --consistency_weight 0.5 --max_completion_length 12".split()
    flags = [*more, "--model", base, "--learning_rate", "2e-4"]

    wait_for_one = start(toy, "grpo_video.py", one, *flags, *batch(2, 2))
    run(toy, "grpo_video.py", many, *flags, *batch(1, 2), ranks=2)
    wait_for_one()

    found = {}
    for folder in (one, many):
        found[folder] = {}
        for row in rows(folder / "rollouts.jsonl"):
            for i, x in enumerate(row["completions"]):
                found[folder][row["step"], row["sample_id"], i] = x
    assert len(found[one]) == 3 * 4 * 4
    assert found[one].keys() == found[many].keys()
    for place, x in found[one].items():
        y = found[many][place]
        assert (x["ids"], x["bonus"]) == (y["ids"], y["bonus"])
        assert x["p_answer_ref"] == pytest.approx(y["p_answer_ref"], abs=1e-5)
    assert {x["bonus"] for x in found[one].values()} == {0, 0.5}
    assert difference(one, many) < 1e-5


@pytest.mark.slow
def test_two_nodes(toy, tmp_path):
    """Two torchrun agents, as on two machines: weights are replicated over them, not sharded.

    They meet at a rendezvous, and give what one rank gives.
    """
    one = tmp_path / "one"
    two = tmp_path / "two"
    flags = ["--max_steps", "3"]
    wait_for_one = start(toy, "grpo_video.py", one, *flags, *batch(2, 2))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    torchrun = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d"]
    torchrun.append(f"--rdzv_endpoint=localhost:{port}")
    flags += batch(1, 2)
    line = command(toy, "grpo_video.py", two, *flags, ranks=2, torchrun=torchrun)
    agents = [subprocess.Popen(line, env=ENV, stderr=subprocess.PIPE, text=True) for _ in "ab"]
    for agent in agents:
        _, error = agent.communicate(timeout=300)
        assert agent.returncode == 0, error[-3000:]
    wait_for_one()
    check_equal(one, two)


def rows_without_media(toy, path):
    """Writes 16 chat rows: two with video and image, two with an image, twelve of text alone."""
    lines = (toy / "data/annotations/training_with_cot_6k.jsonl").read_text().splitlines()
    with open(path, "w") as f:
        for n, row in enumerate(map(json.loads, lines[:16])):
            content = row["prompt"][0]["content"]
            kept = ("video", "image", "text")[min(n // 2, 2) :]
            row["prompt"][0]["content"] = [x for x in content if x["type"] in kept]
            f.write(json.dumps(row) + "\n")
    return path


def test_rows_without_media(toy, tmp_path, on_ranks):
    """A rank whose rows are text alone skips the vision tower, and the others wait for it.

    Its shards are gathered by all ranks. Two ranks must give what one gives, with micro-batches and
    a whole step without any picture among them.
    """
    annotations = rows_without_media(toy, tmp_path / "rows.jsonl")
    common = ["--model", toy / "init", "--data_root", toy / "data", "--annotations", annotations]
    common += [*FLAGS, "--learning_rate", "2e-4"]
    for ranks, out in ((1, tmp_path / "one"), (2, tmp_path / "two")):
        flags = ["--output_dir", out, *batch(1, 4 // ranks)]
        for code, _, err in on_ranks(sft_video, [*common, *flags], ranks):
            assert code == 0, err

    log = rows(tmp_path / "one/metrics.jsonl")
    log_of_two = rows(tmp_path / "two/metrics.jsonl")
    assert len(log) == len(log_of_two) == 4
    for a, b in zip(log, log_of_two):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a["tokens"] == b["tokens"]
    assert difference(tmp_path / "one", tmp_path / "two") < 1e-5


@pytest.mark.parametrize(
    "script", ["grpo_video.py", pytest.param("sft_video.py", marks=pytest.mark.slow)]
)
def test_resumed_run_is_the_unbroken_one(toy, tmp_path, script):
    """Trap 20: 3 + 3 steps are 6, bit for bit, logs included.

    They are not without the optimizer's moments, step counts, the data's position or the rollouts'
    seeds. Here the logs went on past the checkpoint. Another number of ranks goes on from the same
    checkpoint to the same weights to 1e-5.
    """
    whole = tmp_path / "whole"
    broken = tmp_path / "broken"
    other = tmp_path / "other"
    flags = ["--max_steps", "6", "--save_steps", "3", "--save_total_limit", "0"]
    resume = ["--resume_from_checkpoint", "auto"]

    run(toy, script, whole, *flags, *batch(2, 1))
    shutil.copytree(whole, broken)
    shutil.rmtree(broken / "checkpoint-6")
    (broken / "model.safetensors").unlink()
    (broken / "notes.jsonl").write_text('{"mine": 1}\n')
    shutil.copytree(broken, other)

    wait_for_resumed = start(toy, script, broken, *flags, *batch(2, 1), *resume)
    run(toy, script, other, *flags, *batch(1, 1), *resume, ranks=2)
    wait_for_resumed()
    assert (broken / "notes.jsonl").read_text() == '{"mine": 1}\n'  # no log of the run's
    assert difference(whole, broken) == 0
    assert difference(whole, other) < 1e-5

    def without_times(row):
        return {k: v for k, v in row.items() if not k.startswith(("time_", "peak_"))}

    def kept(folder, name):
        return [without_times(row) for row in rows(folder / name)]

    def sample_ids(folder):
        return [row["sample_id"] for row in rows(folder / "rollouts.jsonl")]

    assert kept(whole, "metrics.jsonl") == kept(broken, "metrics.jsonl")
    assert len(kept(other, "metrics.jsonl")) == 6
    if script == "grpo_video.py":
        assert kept(whole, "rollouts.jsonl") == kept(broken, "rollouts.jsonl")
        assert sample_ids(whole) == sample_ids(other)


@pytest.mark.slow
@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_leaves(toy, tmp_path, number, code):
    """SIGTERM or Ctrl-C, which reach the decoding workers too, lose steps or break a checkpoint."""
    out = tmp_path / "run"
    flags = ["--max_steps", "500", "--dataloader_num_workers", "2"]
    started = subprocess.Popen(
        command(toy, "grpo_video.py", out, *flags),
        stderr=subprocess.PIPE,
        text=True,
        env=ENV,
        start_new_session=True,
    )
    while not (out / "metrics.jsonl").exists() and started.poll() is None:
        time.sleep(0.1)
    os.killpg(started.pid, number)
    _, error = started.communicate(timeout=100)

    steps = rows(out / "metrics.jsonl")[-1]["step"]
    assert started.returncode == code
    assert "--resume_from_checkpoint auto goes on" in error
    assert [p.name for p in out.glob("checkpoint-*")] == [f"checkpoint-{steps}"]

    resume = ["--resume_from_checkpoint", "auto"]
    run(toy, "grpo_video.py", out, "--max_steps", steps + 1, *resume)
    assert [row["step"] for row in rows(out / "metrics.jsonl")] == list(range(1, steps + 2))


def running(pid):
    """Whether a process still runs; one that has ended may wait for somebody to ask how."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rpartition(") ")[2][0] != "Z"


@pytest.mark.slow
def test_no_decoder_outlives_a_killed_run(toy, tmp_path):
    """A run that is killed by SIGKILL, and so can end nothing itself, leaves decoders behind."""
    out = tmp_path / "run"
    flags = ["--max_steps", "500", "--dataloader_num_workers", "2"]
    line = command(toy, "grpo_video.py", out, *flags)
    started = subprocess.Popen(line, env=ENV, stderr=subprocess.DEVNULL)
    while not (out / "metrics.jsonl").exists() and started.poll() is None:
        time.sleep(0.1)

    decoders = []
    for task in Path(f"/proc/{started.pid}/task").iterdir():
        decoders += (task / "children").read_text().split()
    assert len(decoders) == 2
    assert all(running(pid) for pid in decoders)

    started.kill()
    assert started.wait() == -signal.SIGKILL
    deadline = time.monotonic() + 10
    while any(running(pid) for pid in decoders) and time.monotonic() < deadline:
        time.sleep(0.05)
    left = [pid for pid in decoders if running(pid)]
    for pid in left:
        os.kill(int(pid), signal.SIGKILL)
    assert left == []


@pytest.mark.slow
def test_a_rank_that_dies_is_restarted(toy, tmp_path):
    """Under torchrun --max_restarts a killed rank brings the run back from its last checkpoint.

    The weights are the unbroken run's. torchrun keeps its store through a restart, so without a
    prefix of its own the new try could read the dead ranks' addresses there and wait for them for
    ever, about one time in three.
    """
    whole = tmp_path / "whole"
    broken = tmp_path / "broken"
    flags = ["--max_steps", "12", "--save_steps", "2"]
    wait_for_whole = start(toy, "grpo_video.py", whole, *flags, ranks=2)

    line = command(toy, "grpo_video.py", broken, *flags, ranks=2)
    line.insert(line.index("--standalone"), "--max_restarts=2")
    started = subprocess.Popen(line, env=ENV, stderr=subprocess.PIPE, text=True)
    while not (broken / "checkpoint-2").exists() and started.poll() is None:
        time.sleep(0.01)

    children = Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split()
    [rank] = [
        int(pid) for pid in children if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()
    ]
    os.kill(rank, signal.SIGKILL)
    _, error = started.communicate(timeout=200)
    wait_for_whole()

    assert started.returncode == 0, error[-3000:]
    assert "Connection reset by peer" in error, error[-3000:]
    settings = json.loads((broken / "config.json").read_text())["run"]
    assert settings["world_size"] == 2
    assert len(rows(broken / "metrics.jsonl")) == 12
    assert difference(whole, broken) == 0
