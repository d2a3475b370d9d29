"""--audit: a step's loss, recomputed from audit.jsonl as with a calculator, without torch; and --analyze through the script."""
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tools import frames

ROOT = Path(__file__).resolve().parent.parent


# An untrained model earns nothing: here it is paid by the length of its text.
REWARDED = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import grpo_video
grpo_video.reward_of = lambda text, gold, weight: (float(len(text) % 3), None)
grpo_video.main()
"""


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def step_loss(completions, beta, epsilon, loss_type, max_length):
    """README section 9 in plain Python: objects of audit.jsonl -> the step's loss."""
    completions = [x for x in completions if any(x["mask"])]
    tokens, loss = sum(map(sum, (x["mask"] for x in completions))), 0.0
    for x in completions:
        for t in (t for t, counts in enumerate(x["mask"]) if counts):
            ratio = math.exp(x["logp"][t] - x["old_logp"][t])
            clipped = min(max(ratio, 1 - epsilon), 1 + epsilon)
            policy = -min(ratio * x["advantage"], clipped * x["advantage"])
            d = x["ref_logp"][t] - x["logp"][t] if beta else 0.0
            kl = math.exp(d) - d - 1
            weight = {"grpo": 1 / sum(x["mask"]) / len(completions), "dapo": 1 / tokens,
                      "dr_grpo": 1 / (len(completions) * max_length)}[loss_type]
            assert ratio == pytest.approx(x["ratio"][t], abs=1e-6)
            assert policy == pytest.approx(x["loss"][t], abs=1e-6) and weight == pytest.approx(x["weight"][t], abs=1e-9)
            assert not beta or kl == pytest.approx(x["kl"][t], abs=1e-6)
            assert x["clip_ratio"][t] == (ratio != clipped and (ratio > clipped) == (x["advantage"] > 0) and x["advantage"] != 0)
            loss += weight * (policy + beta * kl)
    return loss


@pytest.mark.parametrize("loss_type, beta, more", [
    ("grpo", 0.5, []), ("dapo", 0.0, ["--num_iterations", "3", "--learning_rate", "3e-2"]),
    ("dr_grpo", 0.2, ["--num_iterations", "2", "--learning_rate", "1e-2", "--gradient_accumulation_steps", "2"])])
def test_a_loss_by_calculator(toy, tmp_path, monkeypatch, loss_type, beta, more):
    """audit.jsonl tells the loss of metrics.jsonl to 1e-6: each completion once, masks, ratios, clips, KL, advantages, weights; and
    no more steps than asked for."""
    done = subprocess.run([
        sys.executable, "-c", REWARDED, ROOT, "--model", toy / "init", "--data_root", toy / "data", "--output_dir", tmp_path / "run",
        "--max_frames", "4", "--frame_size", "56", "--num_generations", "4", "--max_completion_length", "8", "--max_steps", "3",
        "--per_device_train_batch_size", "2", "--temperature", "1.5", "--loss_type", loss_type,
        "--beta", str(beta), "--audit", "2", "--dataloader_num_workers", "0", "--learning_rate", "1e-3", *more],
        env=os.environ | dict(OMP_NUM_THREADS="1"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    audit, log, rollouts = (rows(tmp_path / f"run/{name}.jsonl") for name in ("audit", "metrics", "rollouts"))
    assert {x["step"] for x in audit} == {1, 2}
    for step in (1, 2):
        mine = [x for x in audit if x["step"] == step]
        said = [(row["sample_id"], i, x) for row in rollouts if row["step"] == step for i, x in enumerate(row["completions"])]
        assert [(x["sample_id"], x["completion"]) for x in mine] == [(name, i) for name, i, _ in said]
        for x, (_, _, rollout) in zip(mine, said):
            assert [i for i, counts in zip(x["ids"], x["mask"]) if counts] == rollout["ids"] and x["advantage"] == rollout["advantage"]
            assert ("log_ratio" in rollout) == (beta > 0) and len(rollout.get("log_ratio", rollout["ids"])) == rollout["length"]
            if beta:
                apart = [a - b for a, b in zip(x["old_logp"], x["ref_logp"])][:rollout["length"]]
                assert rollout["log_ratio"] == pytest.approx(apart, abs=1e-4)
        assert len({x["advantage"] for x in mine}) > 3
        assert step_loss(mine, beta, 0.2, loss_type, 8) == pytest.approx(log[step - 1]["loss"], abs=1e-6)
    assert any(any(x["clip_ratio"]) for x in audit) == ("--num_iterations" in more)
    monkeypatch.setattr(sys, "argv", ["frames.py", str(tmp_path / "run"), "--samples", "3"])
    frames.main()  # the report's strips: four frames side by side, of the run's own samples that have a video
    strips = {p.stem: Image.open(p).size for p in (tmp_path / "run/frames").iterdir()}
    assert strips and set(strips) <= {str(row["sample_id"]) for row in rollouts} and set(strips.values()) == {(4 * 56, 56)}


def test_the_readmes_step(tmp_path):
    """README section 10's numbers are those of a fresh run of its command."""
    text = (ROOT / "README.md").read_text().partition("## 10. Auditing a step")[2]
    flags = re.search(r"python grpo_video.py (--toy .*) --output_dir", text)[1].split()
    done = subprocess.run([sys.executable, ROOT / "grpo_video.py", *flags, "--output_dir", tmp_path / "run"],
                          env=os.environ | dict(OMP_NUM_THREADS="1"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    audit, log = (rows(tmp_path / f"run/{name}.jsonl") for name in ("audit", "metrics"))
    step, sample = map(int, re.search(r"In step (\d+), sample (\d+)", text).groups())
    rewards = [float(z) for z in re.search(r"has rewards ([\d, ]+):", text)[1].split(", ")]
    group = [x for x in audit if x["step"] == step and x["sample_id"] == sample]
    right, wrong = max(x["advantage"] for x in group), min(x["advantage"] for x in group)
    assert [x["advantage"] == right for x in group] == [bool(reward) for reward in rewards]
    assert f"advantage is (1 − 0.375) / (0.5175 + 0.0001) = {right:.4f}, a wrong one's −{-wrong:.4f}." in text
    x = group[int(re.search(r"Its completion (\d+) is right", text)[1])]
    cells = [[z.strip() for z in line.split(" | ")[2:]] for line in re.findall(r"^\| \d+ \| `.*(?= \|$)", text, re.M)]
    assert len(cells) == sum(x["mask"]) == 9 and x["advantage"] == right
    for t, row in enumerate(cells):
        logp, ref_logp, d, kl, loss, weight = map(float, row)
        said = dict(logp=logp, ref_logp=ref_logp, kl=kl, loss=loss, weight=weight)
        assert {key: x[key][t] for key in said} == pytest.approx(said, abs=2e-3) and weight == pytest.approx(x["weight"][t], abs=1e-6)
        assert x["ref_logp"][t] - x["logp"][t] == pytest.approx(d, abs=2e-3)
    mine = [x for x in audit if x["step"] == step]
    kl = sum(w * k for x in mine for w, k, counts in zip(x["weight"], x["kl"], x["mask"]) if counts)
    assert len(mine) == 128 and f"Σ weight × KL = {kl:.5f}" in text and f"= {log[step - 1]['loss']:.7f}, the `loss`" in text
    assert step_loss(mine, 0.01, 0.2, "grpo", 24) == pytest.approx(log[step - 1]["loss"], abs=1e-6)


def test_analyze_through_the_script(toy, tmp_path):
    """eval_video.py --analyze writes rows, pictures and a summary that holds everything it held without."""
    done = subprocess.run([
        sys.executable, ROOT / "eval_video.py", "--model", toy / "init", "--data_root", toy / "data", "--output_dir", tmp_path / "out",
        "--max_frames", "8", "--frame_size", "56", "--limit", "5", "--max_completion_length", "8", "--splits", "validation_L1",
        "--dataloader_num_workers", "0", "--analyze", "--heatmaps", "2"], env=os.environ | dict(OMP_NUM_THREADS="1"),
        capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = rows(tmp_path / "out/analysis_validation_L1.jsonl")
    assert [x["sample_id"] for x in found] == [x["sample_id"] for x in rows(tmp_path / "out/predictions_validation_L1.jsonl")]
    summary = json.loads((tmp_path / "out/summary.json").read_text())["validation_L1"]
    assert summary["total"] == summary["analysis"]["samples"] == 5 and 0 < summary["analysis"]["attention"]["overall"] < 1
    assert len(list((tmp_path / "out/heatmaps").glob("*.png"))) == 2 and "| attention on vision |" in done.stdout
