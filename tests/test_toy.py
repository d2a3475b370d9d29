"""The toy, whole, by the README's commands: the base model, SFT and GRPO on L1, L2 and L3, as one table."""
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_the_comparison(tmp_path):
    """GRPO no longer learns to look, the base model is not blind, or the tiers have lost their order."""
    def run(script, *flags):
        done = subprocess.run([sys.executable, ROOT / script, *map(str, flags)], capture_output=True, text=True, timeout=280,
                              env=os.environ | dict(OMP_NUM_THREADS="1"))
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    if not (ROOT / "toy/model").exists():
        run("toy/make_toy.py")
    models = dict(grpo=tmp_path / "grpo", sft=tmp_path / "sft", base=ROOT / "toy/model")
    evaluate = [("eval_video.py", "--toy", "--model", model, "--output_dir", tmp_path / f"eval-{n}") for n, model in models.items()]
    train = [(f"{name}_video.py", "--toy", "--output_dir", models[name]) for name in ("grpo", "sft")]
    with ThreadPoolExecutor(2) as pool:  # one thread each: two at a time
        list(pool.map(lambda command: run(*command), train))
        list(pool.map(lambda command: run(*command), evaluate))
    print(table := run("eval_video.py", "--compare", *(tmp_path / f"eval-{name}" for name in ("base", "sft", "grpo"))))

    reward = [json.loads(line)["reward"] for line in open(tmp_path / "grpo/metrics.jsonl")]
    assert sum(reward[:10]) / 10 < 0.4 and sum(reward[-10:]) / 10 >= 0.75
    accuracy = {name: {split.removeprefix("validation_"): counts["accuracy"] for split, counts in
                       json.loads((tmp_path / f"eval-{name}/summary.json").read_text()).items()} for name in models}
    assert all(abs(value - 0.25) <= 0.08 for value in accuracy["base"].values()), accuracy
    assert accuracy["grpo"]["L1"] >= 0.75 and 0.35 < accuracy["grpo"]["L2"] < accuracy["grpo"]["L1"], accuracy
    assert all(f"eval-{name}" in table for name in models)
