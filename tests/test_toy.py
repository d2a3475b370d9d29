"""The toy, whole, by the README's commands: base model, SFT and GRPO on L1 to L3, as one table."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tools import report
from toy.make_toy import CHOICES

DIRECTIONS = [move.split()[1] for move in CHOICES]
ROOT = Path(__file__).resolve().parent.parent


def run(script, *flags, limit=280):
    """What a script prints; it has so many seconds."""
    done = subprocess.run(
        [sys.executable, ROOT / script, *map(str, flags)],
        capture_output=True,
        text=True,
        timeout=limit,
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


def metrics(folder):
    return [json.loads(line) for line in open(folder / "metrics.jsonl")]


def rewards(folder):
    return [row["reward"] for row in metrics(folder)]


def test_the_bases_chains_are_loose(toy):
    """Half of the thoughts that the base learns are drawn anew: 1/2 + 1/8 agree with their letter.

    What stands behind the letter always does; the others think of each choice equally often.
    """
    form = r"<think>it moves (\w+)</think><answer>([A-D])\. move (\w+)</answer>"
    said = []
    for line in open(toy / "data/annotations/format_only.jsonl"):
        said.append(re.fullmatch(form, json.loads(line)["response"]).groups())
    assert {(letter, word) for _, letter, word in said} == {*zip("ABCD", DIRECTIONS)}

    loose = [(letter, thought) for thought, letter, word in said if thought != word]
    assert len(loose) / len(said) == pytest.approx(3 / 8, abs=0.03)
    counts = Counter(loose)
    assert len(counts) == 12
    assert min(counts.values()) > 0.7 * max(counts.values())


def test_grpo_learns_to_look(base, tmp_path):
    """From a blind base model the reward rises within half of the toy's steps.

    The report's rules find nothing wrong with such a run.
    """
    run("grpo_video.py", "--toy", "--max_steps", 75, "--output_dir", tmp_path)
    reward = rewards(tmp_path)
    assert sum(reward[:10]) / 10 < 0.4
    assert sum(reward[-10:]) / 10 >= 0.55
    assert report.verdicts(metrics(tmp_path)) == []


@pytest.mark.slow
def test_the_comparison(base, tmp_path):
    """GRPO no longer learns to look, the base model is not blind, or the tiers lost their order."""
    models = dict(base=base, sft=tmp_path / "sft", grpo=tmp_path / "grpo")
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

    reward = rewards(tmp_path / "grpo")
    assert sum(reward[:10]) / 10 < 0.4
    assert sum(reward[-10:]) / 10 >= 0.75

    accuracy = {name: accuracies(folder) for name, folder in folders.items()}
    assert all(abs(value - 0.25) <= 0.08 for value in accuracy["base"].values()), accuracy
    assert accuracy["grpo"]["L1"] >= 0.75, accuracy
    assert 0.35 < accuracy["grpo"]["L2"] < accuracy["grpo"]["L1"], accuracy
    assert all(f"eval-{name}" in table for name in models)
