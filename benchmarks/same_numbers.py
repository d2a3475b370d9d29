"""Does this working tree compute what another revision computes, to the last bit?

    python benchmarks/same_numbers.py REVISION [--keep DIR]

Short runs of the three scripts on the toy, at REVISION and here: GRPO in three variants, two ranks
with a resume among them, SFT, and an evaluation. Weights, rollouts, audits, predictions and
metrics (less times and memory) must be the same bytes. With --keep, REVISION's runs stay in DIR,
and a later call compares against them. Exit code 1 where anything differs.
"""

import argparse
import filecmp
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
TWO_RANKS = "-m torch.distributed.run --standalone --nproc_per_node=2"
GRPO = "grpo_video.py --toy --max_steps 6 --per_device_train_batch_size 8"
RUNS = {
    "grpo": f"{GRPO} --max_steps 8 --audit 8 --save_steps 4",
    "dapo": f"{GRPO} --audit 6 --loss_type dapo --num_iterations 2 --epsilon_high 0.3 --beta 0 "
    "--gradient_accumulation_steps 2 --lr_scheduler_type cosine --warmup_ratio 0.4",
    "ranks": f"{TWO_RANKS} {GRPO} --audit 6 --save_steps 3 --kl_clamp 1 --format_reward_weight 0.2 "
    "--gradient_checkpointing --lr_scheduler_type linear",
    "sft": "sft_video.py --toy --max_steps 8 --eval_every 4",
    "evaluation": "eval_video.py --toy --limit 48 --num_samples 3 --longvideobench toy/data",
}


def run(tree, command, folder):
    """One of RUNS in the source tree, with its outputs in `folder`."""
    command = [sys.executable, *command.split(), "--output_dir", str(folder)]
    environment = os.environ | dict(OMP_NUM_THREADS="1")
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{tree}: {' '.join(command)}\n{done.stderr[-3000:]}")


def run_all(tree, folder):
    for name, command in RUNS.items():
        run(tree, command, folder / name)

    # A resumed run: from the checkpoint in the middle, with the last one gone.
    shutil.copytree(folder / "ranks", folder / "resumed")
    shutil.rmtree(folder / "resumed/checkpoint-6")
    run(tree, f"{RUNS['ranks']} --resume_from_checkpoint auto", folder / "resumed")


def metrics(path):
    """Rows of a metrics.jsonl, less what depends on the machine; NaN stands there as null."""
    lines = path.read_text().splitlines()
    rows = [json.loads(line, parse_constant=lambda name: None) for line in lines]
    return [
        str({key: value for key, value in row.items() if not key.startswith(("time_", "peak_"))})
        for row in rows
    ]


def same_tensors(path, other):
    """Of a checkpoint's shards, whose headers come in any order."""
    before = load_file(path)
    after = load_file(other)
    if before.keys() != after.keys():
        return False
    return all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def differences(before, after):
    """Files of the folder `before` that are not the same in `after`, relative."""
    different = []
    compared = [*before.rglob("*.safetensors"), *before.rglob("*.jsonl")]

    for path in sorted(compared):
        other = after / path.relative_to(before)
        if not other.exists():
            same = False
        elif path.name == "metrics.jsonl":
            same = metrics(path) == metrics(other)
        elif path.parent.name == "resume":
            same = same_tensors(path, other)
        else:
            same = filecmp.cmp(path, other, shallow=False)
        if not same:
            different.append(str(path.relative_to(before)))
    return len(compared), different


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("revision")
    parser.add_argument("--keep", type=Path, help="folder for the revision's runs")
    args = parser.parse_args()

    if not (ROOT / "toy/model").exists():
        subprocess.run([sys.executable, ROOT / "toy/make_toy.py"], check=True)

    with tempfile.TemporaryDirectory() as scratch:
        before = args.keep or Path(scratch, "before")
        if not before.exists():
            tree = Path(scratch, "tree")
            subprocess.run(["git", "clone", "-q", ROOT, tree], check=True)
            subprocess.run(["git", "checkout", "-q", args.revision], cwd=tree, check=True)
            for name in ("model", "data"):
                (tree / "toy" / name).symlink_to(ROOT / "toy" / name)
            run_all(tree, before)

        run_all(ROOT, Path(scratch, "after"))
        count, different = differences(before, Path(scratch, "after"))

    print(f"{count} files compared, {len(different)} differ", *different, sep="\n")
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
