"""Kills a toy run with SIGKILL at random moments and resumes it each time.

Every other time it is killed while it saves. The final weights, rollouts and metrics must be the
unbroken run's, bit for bit.

    python benchmarks/kill_and_resume.py --kills 20   # five minutes; exit code 1: something differs
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FLAGS = {
    "max_steps": 400,
    "save_steps": 2,
    "per_device_train_batch_size": 2,
    "max_completion_length": 8,
}


def start(out):
    """The run, from its last checkpoint, or anew where it was killed before the first."""
    command = [sys.executable, ROOT / "grpo_video.py", "--toy", "--output_dir", out]
    for flag, value in FLAGS.items():
        command += [f"--{flag}", str(value)]
    resume = ["--resume_from_checkpoint", "auto"]
    return subprocess.Popen(
        command + (resume if last_checkpoint(out) else ["--overwrite_output_dir"]),
        stdout=subprocess.DEVNULL,
        stderr=open(f"{out}.log", "w"),
        start_new_session=True,
        env=os.environ | dict(OMP_NUM_THREADS="1"),
    )


def finish(process, out):
    if process.wait():
        sys.exit(f"exit code {process.returncode}: {Path(f'{out}.log').read_text()[-2000:]}")


def saving(out):
    return list(out.glob("checkpoint-*.tmp"))


def size_of(path):
    return path.stat().st_size if path.exists() else 0


def last_checkpoint(out):
    """-> the step of the run's last whole checkpoint, or 0."""
    steps = [path.name.removeprefix("checkpoint-") for path in out.glob("checkpoint-*")]
    return max((int(step) for step in steps if step.isdigit()), default=0)


def wait_for_moment(process, out, rng, n):
    """Returns at a random moment of the run, or when it has ended.

    Every fifth time that is while the run starts, else in its first 1.5 s of steps; every other
    time it is while the run saves.
    """
    while_starting = n % 5 == 0
    while_saving = n % 2 == 1
    steps = out / "metrics.jsonl"
    size = size_of(steps)
    wait = rng.uniform(0, 6) if while_starting else rng.uniform(0, 1.5)

    if not while_starting:
        while process.poll() is None and size_of(steps) == size:
            time.sleep(0.001)
    since = time.time()
    while process.poll() is None and time.time() < since + wait:
        time.sleep(0.001)

    if while_saving:
        while process.poll() is None and not saving(out):
            time.sleep(0.0005)
        time.sleep(rng.uniform(0, 0.03))


def kill(process, out, rng, n):
    """Kills the run at a moment of wait_for_moment's -> what stood there then; None if it ended."""
    wait_for_moment(process, out, rng, n)
    if process.poll() is not None:
        return finish(process, out)

    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return f"last checkpoint {last_checkpoint(out)}" + (
        ", killed while saving" if saving(out) else ""
    )


def rows(path):
    """The rows of a metrics.jsonl without what differs from run to run: times and memory."""
    kept = []
    for line in open(path):
        row = json.loads(line)
        kept.append({k: v for k, v in row.items() if not k.startswith(("time_", "peak_"))})
    return kept


def same_files(whole, broken):
    """-> {what is compared: whether it is the same in both runs}."""
    same = {}
    for name in ("model.safetensors", "rollouts.jsonl"):
        same[name] = (whole / name).read_bytes() == (broken / name).read_bytes()
    metrics = rows(whole / "metrics.jsonl")
    same["metrics.jsonl, less times"] = metrics == rows(broken / "metrics.jsonl")
    return same


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)

    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder, "whole")
        finish(start(whole), whole)

        broken = Path(folder, "broken")
        hits = 0
        for n in range(args.kills):
            at = kill(start(broken), broken, rng, n)
            hits += "saving" in (at or "")
            what = at or "the run had ended; its last checkpoint is resumed"
            print(f"kill {n + 1}: {what}", flush=True)
        finish(start(broken), broken)
        same = same_files(whole, broken)

    verdicts = [f"{name}: {'the same' if ok else 'DIFFERS'}" for name, ok in same.items()]
    print(f"{args.kills} kills, {hits} while saving;", ", ".join(verdicts))
    sys.exit(not all(same.values()))


if __name__ == "__main__":
    main()
