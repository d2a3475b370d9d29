"""How much of an evaluation does a rank wait for the others?

    python benchmarks/evaluation_ranks.py                    # this working tree, 2 ranks, the toy
    python benchmarks/evaluation_ranks.py --before REVISION  # in turn with another revision's

The toy's base model answers 120 questions of each tier in batches of 8, sampled at a temperature at
which some responses end after a few tokens and others go on to the limit. A rank's time is that
from its first batch to the end of its last collective call, behind which all rows are one file's;
it waits while it is in one. One thread a rank; medians of the repetitions.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RANKS = 2
FLAGS = "--toy --do_sample --temperature 2.5 --max_completion_length 256 --batch_size 8"


def time_a_rank(tree, folder):
    """One rank of an evaluation by a tree's eval_video.py; writes {waited, whole} in seconds."""
    sys.path.insert(0, tree)
    import torch.distributed as dist

    import eval_video as e

    clock = dict(waited=0.0)

    def timed(call):
        def wrapper(*args, **options):
            start = time.perf_counter()
            result = call(*args, **options)
            clock["end"] = time.perf_counter()
            if "start" in clock:
                clock["waited"] += clock["end"] - start
            return result

        return wrapper

    def predict(*args):
        clock.setdefault("start", time.perf_counter())
        return first_predict(*args)

    first_predict, e.predict = e.predict, predict
    dist.barrier = timed(dist.barrier)
    dist.all_gather_object = timed(dist.all_gather_object)
    sys.argv = ["eval_video.py", *FLAGS.split(), "--output_dir", folder]
    e.main()

    times = dict(waited=clock["waited"], whole=clock["end"] - clock["start"])
    Path(folder, f"times-{e.RANK}.json").write_text(json.dumps(times))


def evaluate(tree):
    """-> (mean seconds of a rank, the share of it that it waits)"""
    with tempfile.TemporaryDirectory() as folder:
        torchrun = f"-m torch.distributed.run --standalone --nproc_per_node={RANKS}"
        command = [sys.executable, *torchrun.split(), __file__, "--rank_of", tree, folder]
        environment = os.environ | dict(OMP_NUM_THREADS="1")
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"{tree}: {done.stderr[-3000:]}")
        times = [json.loads(path.read_text()) for path in Path(folder).glob("times-*.json")]

    whole = statistics.fmean(x["whole"] for x in times)
    waited = statistics.fmean(x["waited"] for x in times)
    return whole, waited / whole


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", help="a revision to be measured in turn with this tree")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--rank_of", nargs=2, help=argparse.SUPPRESS)  # the program's own ranks
    args = parser.parse_args()
    if args.rank_of:
        return time_a_rank(*args.rank_of)

    with tempfile.TemporaryDirectory() as folder:
        trees = {"this tree": str(ROOT)}
        if args.before:
            other = Path(folder, "tree")
            subprocess.run(["git", "clone", "-q", ROOT, other], check=True)
            subprocess.run(["git", "checkout", "-q", args.before], cwd=other, check=True)
            for built in ("model", "data"):
                (other / "toy" / built).symlink_to(ROOT / "toy" / built)
            trees = {args.before: str(other)} | trees

        found = {name: [] for name in trees}
        for _ in range(args.repetitions):
            for name, tree in trees.items():
                found[name].append(evaluate(tree))

    print("| | seconds of a rank | of which it waits |\n|---|---|---|")
    for name, values in found.items():
        seconds, share = map(statistics.median, zip(*values))
        print(f"| {name} | {seconds:.1f} | {share:.1%} |")


if __name__ == "__main__":
    main()
