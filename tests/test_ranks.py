"""Several ranks, resuming and signals: the same commands as a user's, on CPU with gloo, on the untrained toy."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent


def command(toy, script, out, *flags, ranks=1):
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    batch = {"grpo_video.py": ["--num_generations", "4", "--max_completion_length", "8", "--beta", "0.1", "--temperature", "1.5"],
             "sft_video.py": []}[script]
    return [sys.executable, *launch, str(ROOT / script), "--model", str(toy / "init"), "--data_root", str(toy / "data"),
            "--output_dir", str(out), "--max_frames", "8", "--frame_size", "56", "--dataloader_num_workers", "0",
            "--learning_rate", "1e-3", "--lr_scheduler_type", "constant", "--warmup_ratio", "0", *batch, *flags]


def start(*args, ranks=1):
    """-> a function that waits for the run's good end: two runs at a time use both cores."""
    process = subprocess.Popen(command(*args, ranks=ranks), env=os.environ | dict(OMP_NUM_THREADS="1"), text=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    def wait():
        _, error = process.communicate(timeout=200)
        assert process.returncode == 0, error[-3000:]

    return wait


def run(*args, ranks=1):
    start(*args, ranks=ranks)()


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def difference(a, b):
    """Largest absolute difference of two runs' final weights."""
    a, b = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.mark.parametrize("script, loss_type, ranks, more", [
    ("grpo_video.py", "grpo", 2, []), ("grpo_video.py", "dapo", 4, []), ("grpo_video.py", "dr_grpo", 2, ["--beta", "0"]),
    ("sft_video.py", None, 2, ["--learning_rate", "2e-4"])])
def test_ranks_change_nothing(toy, tmp_path, script, loss_type, ranks, more):
    """Trap 16: gradients that are not synchronised, or a denominator of one rank, make the step depend on the ranks. The same
    global batch of 4 must give the same rollouts, and loss, gradient norm and weights after 3 steps to 1e-5; with beta 0, where
    a micro-batch of equal rewards has a forward without a backward, too."""
    flags = ["--max_steps", "3", *(["--loss_type", loss_type] if loss_type else []), *more]
    one = start(toy, script, tmp_path / "one", *flags, "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2")
    run(toy, script, tmp_path / "many", *flags, "--per_device_train_batch_size", "1",
        "--gradient_accumulation_steps", str(4 // ranks), ranks=ranks)
    one()
    one, many = rows(tmp_path / "one/metrics.jsonl"), rows(tmp_path / "many/metrics.jsonl")
    assert len(one) == len(many) == 3
    for a, b in zip(one, many):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5) and a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
        assert a["tokens"] == b["tokens"]
    if loss_type:
        one, many = ({(row["step"], row["sample_id"]): [x["ids"] for x in row["completions"]]
                      for row in rows(tmp_path / name / "rollouts.jsonl")} for name in ("one", "many"))
        assert len(one) == 12 and one == many
    assert difference(tmp_path / "one", tmp_path / "many") < 1e-5


@pytest.mark.parametrize("script", ["grpo_video.py", "sft_video.py"])
def test_resumed_run_is_the_unbroken_one(toy, tmp_path, script):
    """Trap 20: without the optimizer's moments, step counts, the data's position or the rollouts' seeds, 3 + 3 steps are not
    6. Here they are, bit for bit, logs included, although the logs went on past the checkpoint; another number of ranks goes
    on from the same checkpoint to the same weights to 1e-5."""
    whole, broken, other = tmp_path / "whole", tmp_path / "broken", tmp_path / "other"
    flags = ["--max_steps", "6", "--save_steps", "3", "--save_total_limit", "0"]
    size = ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1"]
    run(toy, script, whole, *flags, *size)
    shutil.copytree(whole, broken)
    shutil.rmtree(broken / "checkpoint-6")
    (broken / "model.safetensors").unlink()
    (broken / "notes.jsonl").write_text('{"mine": 1}\n')
    shutil.copytree(broken, other)
    resumed = start(toy, script, broken, *flags, *size, "--resume_from_checkpoint", "auto")
    run(toy, script, other, *flags, "--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "1",
        "--resume_from_checkpoint", "auto", ranks=2)
    resumed()
    assert (broken / "notes.jsonl").read_text() == '{"mine": 1}\n'  # no log of the run's
    assert difference(whole, broken) == 0 and difference(whole, other) < 1e-5

    def kept(folder, name):  # all but the times
        return [{k: v for k, v in row.items() if not k.startswith(("time_", "peak_"))} for row in rows(folder / name)]

    assert kept(whole, "metrics.jsonl") == kept(broken, "metrics.jsonl") and len(kept(other, "metrics.jsonl")) == 6
    if script == "grpo_video.py":
        assert kept(whole, "rollouts.jsonl") == kept(broken, "rollouts.jsonl")
        assert [row["sample_id"] for row in rows(whole / "rollouts.jsonl")] == [r["sample_id"] for r in rows(other / "rollouts.jsonl")]


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_leaves(toy, tmp_path, number, code):
    """SIGTERM or Ctrl-C, which reach the decoding workers too, lose the steps since the last checkpoint or break one."""
    out = tmp_path / "run"
    flags = ["--max_steps", "500", "--dataloader_num_workers", "2"]
    started = subprocess.Popen(command(toy, "grpo_video.py", out, *flags), stderr=subprocess.PIPE, text=True,
                               env=os.environ | dict(OMP_NUM_THREADS="1"), start_new_session=True)
    while not (out / "metrics.jsonl").exists() and started.poll() is None:
        time.sleep(0.1)
    os.killpg(started.pid, number)
    _, error = started.communicate(timeout=100)
    steps = rows(out / "metrics.jsonl")[-1]["step"]
    assert started.returncode == code and "--resume_from_checkpoint auto goes on" in error
    assert [p.name for p in out.glob("checkpoint-*")] == [f"checkpoint-{steps}"]
    run(toy, "grpo_video.py", out, "--max_steps", str(steps + 1), "--resume_from_checkpoint", "auto")
    assert [row["step"] for row in rows(out / "metrics.jsonl")] == list(range(1, steps + 2))


def test_a_rank_that_dies_is_restarted(toy, tmp_path):
    """Under torchrun --max_restarts a killed rank brings the run back from its last checkpoint by itself: the weights are the
    unbroken run's. torchrun keeps its store through a restart, so without a prefix of its own the new try could read the dead
    ranks' addresses there and wait for them for ever, about one time in three."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    flags = ["--max_steps", "12", "--save_steps", "2"]
    unbroken = start(toy, "grpo_video.py", whole, *flags, ranks=2)
    line = command(toy, "grpo_video.py", broken, *flags, ranks=2)
    line.insert(line.index("--standalone"), "--max_restarts=2")
    started = subprocess.Popen(line, env=os.environ | dict(OMP_NUM_THREADS="1"), stderr=subprocess.PIPE, text=True)
    while not (broken / "checkpoint-2").exists() and started.poll() is None:
        time.sleep(0.01)
    children = Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split()
    [rank] = [int(pid) for pid in children if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()]
    os.kill(rank, signal.SIGKILL)
    _, error = started.communicate(timeout=200)
    unbroken()
    assert started.returncode == 0 and "Connection reset by peer" in error, error[-3000:]
    assert json.loads((broken / "config.json").read_text())["run"]["world_size"] == 2 and len(rows(broken / "metrics.jsonl")) == 12
    assert difference(whole, broken) == 0
