"""The toy, whole, by the README's commands: base model, SFT and GRPO on L1 to L3, as one table."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tools import report
from toy import findings

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
    assert {(letter, word) for _, letter, word in said} == {*findings.DIRECTIONS.items()}

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
def test_the_findings(base, tmp_path):
    """The README's table no longer holds: who learns to look, and whose chain comes apart.

    Or the base model is not blind, or the tiers lost their order.
    """
    print(run("toy/findings.py", "--output_dir", tmp_path, limit=1200))
    found = {name: findings.read_measures(tmp_path / f"eval-{name}-42") for name in findings.MAIN}
    folders = [tmp_path / f"eval-{name}-42" for name in findings.MAIN]
    compared = run("eval_video.py", "--compare", *folders)
    assert all(str(folder) in compared for folder in folders)

    reward = rewards(tmp_path / "grpo-42")
    assert sum(reward[:10]) / 10 < 0.4
    assert sum(reward[-10:]) / 10 >= 0.75

    accuracy = {
        name: [x[f"accuracy {tier}"] for tier in findings.TIERS] for name, x in found.items()
    }
    assert all(abs(value - 0.25) <= 0.1 for value in accuracy.pop("base")), accuracy
    assert all(0.75 <= of_l1 and 0.35 < of_l2 < of_l1 for of_l1, of_l2, _ in accuracy.values())

    # The chain and its letter, on each tier; and where the video enters, on L1.
    for tier in findings.TIERS:
        matching = {name: x[f"word_matches_letter {tier}"] for name, x in found.items()}
        assert 0.4 < matching["base"] < 0.75, matching
        assert matching["sft"] >= 0.95, matching
        assert matching["grpo"] < 0.5, matching
        assert matching["care"] > matching["grpo"] + 0.2, matching
    at_the_word, at_the_letter = (
        {name: x[head] for name, x in found.items()} for head in findings.HEADS[-2:]
    )
    assert max(at_the_word["base"], at_the_letter["base"], at_the_letter["sft"]) < 0.2
    assert at_the_word["grpo"] < 0.3 < at_the_word["care"]
    assert at_the_letter["grpo"] > 1.5 > at_the_letter["care"]
    assert at_the_word["sft"] > 1.5
