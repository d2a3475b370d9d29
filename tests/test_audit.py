"""--audit: a step's loss, recomputed from audit.jsonl as with a calculator, without torch.

And two tools on what the scripts wrote: the report's frames, and the analysis.
"""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

import grpo_video as g
from tools import frames

ROOT = Path(__file__).resolve().parent.parent

# An untrained model earns nothing: here it is paid by the length of its text. An even one is right,
# and the answer of each is its first token and its last.
REWARDED = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import grpo_video
def reward_of(text, gold, weight, choices):
    return float(len(text) % 3), None if len(text) % 2 else gold
grpo_video.reward_of = reward_of
grpo_video.answer_tokens = lambda ids, text, tokenizer: sorted({0, len(ids) - 1})
grpo_video.main()
"""

# A frame of 60 x 60 is one of 56 x 56, the nearest multiple of 28.
AUDITED_RUN = """
--max_frames 4 --frame_size 60 --dataloader_num_workers 0
--num_generations 4 --max_completion_length 8 --temperature 1.5
--max_steps 3 --per_device_train_batch_size 2 --learning_rate 1e-3 --audit 2
"""

EVALUATED_RUN = """
--max_frames 8 --frame_size 56 --dataloader_num_workers 0
--limit 5 --max_completion_length 8 --splits validation_L1
"""


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def run_python(*arguments):
    """Runs python with these arguments to its good end -> its output."""
    done = subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | dict(OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def step_loss(completions, beta, epsilon, loss_type, max_length):
    """docs/algorithm.md in plain Python: objects of audit.jsonl -> the step's loss."""
    completions = [x for x in completions if any(x["mask"])]
    tokens = sum(sum(x["mask"]) for x in completions)

    loss = 0.0
    for x in completions:
        A = x["advantage"]
        weight = {
            "grpo": 1 / sum(x["mask"]) / len(completions),
            "dapo": 1 / tokens,
            "dr_grpo": 1 / (len(completions) * max_length),
        }[loss_type]
        counting = [t for t, counts in enumerate(x["mask"]) if counts]
        for t in counting:
            ratio = math.exp(x["logp"][t] - x["old_logp"][t])
            clipped = min(max(ratio, 1 - epsilon), 1 + epsilon)
            policy = -min(ratio * A, clipped * A)
            d = x["ref_logp"][t] - x["logp"][t] if beta else 0.0
            kl = math.exp(d) - d - 1
            clip_works = ratio != clipped and (ratio > clipped) == (A > 0) and A != 0
            loss += weight * (policy + beta * kl)

            assert ratio == pytest.approx(x["ratio"][t], abs=1e-6)
            assert policy == pytest.approx(x["loss"][t], abs=1e-6)
            assert weight == pytest.approx(x["weight"][t], abs=1e-9)
            assert not beta or kl == pytest.approx(x["kl"][t], abs=1e-6)
            assert x["clip_ratio"][t] == clip_works
    return loss


def check_against_rollouts(completions, rollouts, beta):
    """A step's completions in audit.jsonl are those of its rows in rollouts.jsonl, each once."""
    names = []
    said = []
    for row in rollouts:
        for i, completion in enumerate(row["completions"]):
            names.append((row["sample_id"], i))
            said.append(completion)
    assert [(x["sample_id"], x["completion"]) for x in completions] == names

    for x, rollout in zip(completions, said):
        length = rollout["length"]
        ids = [i for i, counts in zip(x["ids"], x["mask"]) if counts]
        assert ids == rollout["ids"]
        assert x["advantage"] == rollout["advantage"]
        assert ("log_ratio" in rollout) == (beta > 0)
        assert len(rollout.get("log_ratio", rollout["ids"])) == length
        if beta:
            apart = [a - b for a, b in zip(x["old_logp"], x["ref_logp"])]
            assert rollout["log_ratio"] == pytest.approx(apart[:length], abs=1e-4)


def check_the_reference(toy, audit):
    """ref_logp is the starting model's, here loaded and asked again, and the policy's is not."""
    c = g.Config(model=str(toy / "init"), data_root=str(toy / "data"), max_frames=4, frame_size=60)
    model = g.load_model(toy / "init", torch.device("cpu"), torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(toy / "init")
    records = g.load_records(toy / "data/annotations/training_6k.jsonl", toy / "data")
    dataset = g.VideoDataset(records, tokenizer, model.config, c)

    samples = {}
    for position in range(6):
        sample = dataset.begin(position)()
        samples[sample["sample_id"]] = sample
    for x in audit:
        prompts = g.Prompts.collate([samples[x["sample_id"]]], torch.device("cpu"), torch.float32)
        with torch.no_grad():
            logp = model(prompts, torch.tensor([[x["ids"]]]), 1.5)[0, 0]
        torch.testing.assert_close(torch.tensor(x["ref_logp"]), logp, atol=1e-5, rtol=0)
        apart = (torch.tensor(x["logp"]) - logp).abs().max()
        assert (apart > 1e-3) == (x["step"] > 1)


def check_the_bonus(audit, rollouts, weight):
    """Bonus, p and advantage of each completion, from log π_ref and the rewards alone."""
    columns = iter(audit)
    given = 0
    for row in rollouts:
        xs = row["completions"]
        p = []
        for x in xs:
            audited = next(columns)
            ref_logp = audited["ref_logp"][: x["length"]]
            answer = {0, x["length"] - 1}
            p.append(sum(math.exp(ref_logp[t]) for t in answer) / len(answer))
            for key in ("bonus", "p_answer_ref"):
                assert audited[key] == x[key]
        of_right = [min(z, 0.95) for z, x in zip(p, xs) if x["answer"] == row["gold"]]

        rewards = []
        for z, x in zip(p, xs):
            right = x["answer"] == row["gold"]
            bonus = weight if right and min(z, 0.95) >= sum(of_right) / len(of_right) else 0
            assert x["bonus"] == pytest.approx(bonus)
            assert x["p_answer_ref"] == pytest.approx(z, abs=1e-6)
            rewards.append(x["reward"] + bonus)
            given += bonus > 0
        mean = sum(rewards) / len(xs)
        std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / (len(xs) - 1))
        golden = [(r - mean) / (std + 1e-4) for r in rewards]
        assert [x["advantage"] for x in xs] == pytest.approx(golden, abs=1e-5)
    assert 0 < given < len(audit)


LONG = "--num_iterations 2 --learning_rate 1e-2 --gradient_accumulation_steps 2"


@pytest.mark.parametrize(
    "loss_type, beta, more",
    [
        ("grpo", 0.5, "--consistency_weight 0.7"),
        ("dapo", 0.0, "--num_iterations 3 --learning_rate 3e-2"),
        pytest.param("dr_grpo", 0.2, LONG, marks=pytest.mark.slow),
    ],
)
def test_a_loss_by_calculator(toy, tmp_path, monkeypatch, loss_type, beta, more):
    """audit.jsonl tells the loss of metrics.jsonl to 1e-6, of no more steps than asked for.

    Each completion once; its mask, ratios, clips, KL, advantage and weights. Trap 21: what judges
    the consistency of answers is the starting model, in every step.
    """
    out = tmp_path / "run"
    folders = ["--model", toy / "init", "--data_root", toy / "data", "--output_dir", out]
    flags = f"{AUDITED_RUN} --loss_type {loss_type} --beta {beta} {more}".split()
    run_python("-c", REWARDED, ROOT, *folders, *flags)
    audit = rows(out / "audit.jsonl")
    log = rows(out / "metrics.jsonl")
    rollouts = rows(out / "rollouts.jsonl")

    assert {x["step"] for x in audit} == {1, 2}
    if "consistency" in more:
        check_the_reference(toy, audit)
        check_the_bonus(audit, [row for row in rollouts if row["step"] < 3], 0.7)
    assert ("bonus" in audit[0]) == ("bonus" in log[0]) == ("consistency" in more)
    for step in (1, 2):
        mine = [x for x in audit if x["step"] == step]
        check_against_rollouts(mine, [row for row in rollouts if row["step"] == step], beta)
        assert len({x["advantage"] for x in mine}) > 3
        loss = step_loss(mine, beta, 0.2, loss_type, 8)
        assert loss == pytest.approx(log[step - 1]["loss"], abs=1e-6)
    assert any(any(x["clip_ratio"]) for x in audit) == ("--num_iterations" in more)

    # The report's strips: four frames side by side, of the run's own samples that have a video.
    monkeypatch.setattr(sys, "argv", ["frames.py", str(out), "--samples", "3"])
    frames.main()
    strips = {path.stem: Image.open(path).size for path in (out / "frames").iterdir()}
    assert strips
    assert set(strips) <= {str(row["sample_id"]) for row in rollouts}
    assert set(strips.values()) == {(4 * 56, 56)}


def check_the_readmes_table(text, x):
    """The rows of docs/auditing.md's table are the tokens of this completion in audit.jsonl."""
    table = re.findall(r"^\| \d+ \| `.*(?= \|$)", text, re.M)
    assert len(table) == sum(x["mask"]) == 9
    for t, line in enumerate(table):
        cells = [float(cell) for cell in line.split(" | ")[2:]]
        logp, ref_logp, d, kl, loss, weight = cells
        said = dict(logp=logp, ref_logp=ref_logp, kl=kl, loss=loss, weight=weight)
        assert {key: x[key][t] for key in said} == pytest.approx(said, abs=2e-3)
        assert weight == pytest.approx(x["weight"][t], abs=1e-6)
        assert x["ref_logp"][t] - x["logp"][t] == pytest.approx(d, abs=2e-3)


def test_the_readmes_step(tmp_path):
    """docs/auditing.md's numbers are those of a fresh run of its command."""
    text = (ROOT / "docs/auditing.md").read_text().partition("## Auditing a step")[2]
    flags = re.search(r"python grpo_video.py (--toy .*) --output_dir", text)[1].split()
    run_python(ROOT / "grpo_video.py", *flags, "--output_dir", tmp_path / "run")
    audit = rows(tmp_path / "run/audit.jsonl")
    log = rows(tmp_path / "run/metrics.jsonl")

    # The group's advantages.
    step, sample = map(int, re.search(r"In step (\d+), sample (\d+)", text).groups())
    rewards = re.search(r"has rewards ([\d, ]+):", text)[1].split(", ")
    mine = [x for x in audit if x["step"] == step]
    group = [x for x in mine if x["sample_id"] == sample]
    right = max(x["advantage"] for x in group)
    wrong = min(x["advantage"] for x in group)
    assert [x["advantage"] == right for x in group] == [bool(float(z)) for z in rewards]
    formula = f"advantage is (1 − 0.375) / (0.5175 + 0.0001) = {right:.4f}"
    assert f"{formula}, a wrong one's −{-wrong:.4f}." in text

    # A completion's tokens.
    x = group[int(re.search(r"Its completion (\d+) is right", text)[1])]
    assert x["advantage"] == right
    check_the_readmes_table(text, x)

    # The step's loss.
    kl = 0.0
    for x in mine:
        columns = zip(x["weight"], x["kl"], x["mask"])
        kl += sum(w * k for w, k, counts in columns if counts)
    assert len(mine) == 128
    assert f"Σ weight × KL = {kl:.5f}" in text
    assert f"= {log[step - 1]['loss']:.7f}, the `loss`" in text
    loss = step_loss(mine, 0.01, 0.2, "grpo", 24)
    assert loss == pytest.approx(log[step - 1]["loss"], abs=1e-6)


@pytest.mark.slow
def test_analyze_through_the_script(toy, tmp_path):
    """tools/analyze.py writes rows and pictures, and keeps all that the summary held without."""
    out = tmp_path / "out"
    folders = ["--model", toy / "init", "--data_root", toy / "data", "--output_dir", out]
    run_python(ROOT / "eval_video.py", *folders, *EVALUATED_RUN.split())
    before = json.loads((out / "summary.json").read_text())
    flags = "--splits validation_L1 --heatmaps 2".split()
    output = run_python(ROOT / "tools/analyze.py", *folders, *flags)

    found = rows(out / "analysis_validation_L1.jsonl")
    predictions = rows(out / "predictions_validation_L1.jsonl")
    assert [x["sample_id"] for x in found] == [x["sample_id"] for x in predictions]

    summary = json.loads((out / "summary.json").read_text())["validation_L1"]
    assert summary["total"] == summary["analysis"]["samples"] == 5
    assert 0 < summary["analysis"]["attention"]["overall"] < 1
    assert summary == before["validation_L1"] | dict(analysis=summary["analysis"])
    assert len(list((out / "heatmaps").glob("*.png"))) == 2
    assert "| attention on vision |" in output
