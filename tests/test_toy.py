"""The toy, whole, by the README's commands: base model, SFT and GRPO on L1 to L3, as one table."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run(script, *flags):
    done = subprocess.run(
        [sys.executable, ROOT / script, *map(str, flags)],
        capture_output=True,
        text=True,
        timeout=280,
        env=os.environ | dict(OMP_NUM_THREADS="1"),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def accuracies(folder):
    """Of one evaluation: the tier's name -> its accuracy."""
    summary = json.loads((folder / "summary.json").read_text())
    return {
        split.removeprefix("validation_"): counts["accuracy"] for split, counts in summary.items()
    }


def test_the_comparison(tmp_path):
    """GRPO no longer learns to look, the base model is not blind, or the tiers lost their order."""
    if not (ROOT / "toy/model").exists():
        run("toy/make_toy.py")
    models = dict(base=ROOT / "toy/model", sft=tmp_path / "sft", grpo=tmp_path / "grpo")
    folders = {name: tmp_path / f"eval-{name}" for name in models}

    def train(name):
        run(f"{name}_video.py", "--toy", "--output_dir", models[name])

    def evaluate(name):
        run("eval_video.py", "--toy", "--model", models[name], "--output_dir", folders[name])

    with ThreadPoolExecutor(2) as pool:  # one thread each: two at a time
        list(pool.map(train, ("grpo", "sft")))
        list(pool.map(evaluate, ("grpo", "sft", "base")))
    table = run("eval_video.py", "--compare", *folders.values())
    print(table)

    reward = [json.loads(line)["reward"] for line in open(tmp_path / "grpo/metrics.jsonl")]
    assert sum(reward[:10]) / 10 < 0.4
    assert sum(reward[-10:]) / 10 >= 0.75

    accuracy = {name: accuracies(folder) for name, folder in folders.items()}
    assert all(abs(value - 0.25) <= 0.08 for value in accuracy["base"].values()), accuracy
    assert accuracy["grpo"]["L1"] >= 0.75, accuracy
    assert 0.35 < accuracy["grpo"]["L2"] < accuracy["grpo"]["L1"], accuracy
    assert all(f"eval-{name}" in table for name in models)
