"""Kills a toy run with SIGKILL at random moments, every other time while it saves, and resumes it each time: the final weights,
rollouts and metrics must be the unbroken run's, bit for bit.

    python benchmarks/kill_and_resume.py --kills 20         # about two minutes; exit code 1 if anything differs
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
STEPS, SAVE_STEPS = 400, 2


def start(out, *flags):
    command = [sys.executable, ROOT / "grpo_video.py", "--toy", "--output_dir", out, "--max_steps", str(STEPS), "--save_steps",
               str(SAVE_STEPS), "--per_device_train_batch_size", "2", "--max_completion_length", "8", *flags]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=open(f"{out}.log", "w"), start_new_session=True,
                            env=os.environ | dict(OMP_NUM_THREADS="1"))


def finish(process, out):
    if process.wait():
        sys.exit(f"exit code {process.returncode}: {Path(f'{out}.log').read_text()[-2000:]}")


def saving(out):
    return list(out.glob("checkpoint-*.tmp"))


def size_of(path):
    return path.stat().st_size if path.exists() else 0


def kill(process, out, rng, n):
    """Kills at a random moment: every fifth time while the run starts, else in its first 1.5 s of steps, every other time while
    it saves -> what stood there then; None if it had ended well."""
    steps, since = out / "metrics.jsonl", time.time()
    before = size_of(steps)
    wait = rng.uniform(0, 6) if n % 5 == 0 else rng.uniform(0, 1.5)
    while process.poll() is None and (time.time() < since + wait or n % 5 and size_of(steps) == before):
        since = time.time() if n % 5 and size_of(steps) == before else since
        time.sleep(0.001)
    while process.poll() is None and n % 2 and not saving(out):
        time.sleep(0.0005)
    time.sleep(rng.uniform(0, 0.03) if n % 2 else 0)
    if process.poll() is not None:
        return finish(process, out)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    at = max((int(p.name[11:]) for p in out.glob("checkpoint-*") if p.name[11:].isdigit()), default=0)
    return f"last checkpoint {at}" + (", killed while saving" if saving(out) else "")


def rows(path):
    return [{k: v for k, v in json.loads(line).items() if not k.startswith(("time_", "peak_"))} for line in open(path)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        whole, broken, hits = Path(folder, "whole"), Path(folder, "broken"), 0
        finish(start(whole), whole)
        for n in range(args.kills):
            at = kill(start(broken, "--resume_from_checkpoint", "auto"), broken, rng, n)
            hits += "saving" in (at or "")
            print(f"kill {n + 1}: {at or 'the run had ended; its last checkpoint is resumed'}", flush=True)
        finish(start(broken, "--resume_from_checkpoint", "auto"), broken)
        same = {name: (whole / name).read_bytes() == (broken / name).read_bytes() for name in ("model.safetensors", "rollouts.jsonl")}
        same["metrics.jsonl, less times"] = rows(whole / "metrics.jsonl") == rows(broken / "metrics.jsonl")
    print(f"{args.kills} kills, {hits} while saving;", ", ".join(f"{name}: {'the same' if ok else 'DIFFERS'}" for name, ok in same.items()))
    sys.exit(not all(same.values()))


if __name__ == "__main__":
    main()
