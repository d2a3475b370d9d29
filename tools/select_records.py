"""The records from which GRPO can learn: those that a model gets right now and then.

    python eval_video.py --model DIR --splits training_6k --num_samples 8 --output_dir runs/passes
    python tools/select_records.py runs/passes --pass_rate 0.1 0.9 \\
        --annotations DATA_ROOT/annotations/training_6k.jsonl --output kept.jsonl
    python grpo_video.py --model DIR --annotations kept.jsonl

If all completions of a prompt are right, or all wrong, every advantage is 0. A record's pass rate
is the share of its sampled responses that give the gold letter. It is kept if that lies within
--pass_rate, both bounds included. Kept rows stand in their order, each with the bytes that it had.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import eval_video as e


def main():
    args = parse_arguments()
    low, high = args.pass_rate
    if not 0 <= low <= high <= 1:
        e.fail(f"--pass_rate {low} {high}: must be two shares from 0 to 1, the lower one first")
    if args.output.exists():
        e.fail(f"--output {args.output}: exists already; must be a new file")

    rows = read_annotations(args.annotations)
    predictions = args.evaluation / f"predictions_{args.annotations.stem}.jsonl"
    rates, failed = read_pass_rates(predictions)
    strange = [name for name in (*rates, *failed) if name not in rows]
    if strange:
        e.fail(
            f"{args.annotations}: lacks {len(strange)} sample_ids of {predictions}, {strange[0]!r} "
            "first; must be the annotations that were evaluated"
        )

    # Each record is in one of these, the failed or those that were not asked.
    below = [name for name, rate in rates.items() if rate < low]
    above = [name for name, rate in rates.items() if rate > high]
    within = {name for name, rate in rates.items() if low <= rate <= high}
    counts = f"below {low}: {len(below)}, within: {len(within)}, above {high}: {len(above)}"
    if not within:
        e.fail(f"{predictions}: --pass_rate {low} {high} leaves no record: {counts}")

    kept = [line + b"\n" for name, line in rows.items() if name in within]
    try:
        args.output.write_bytes(b"".join(kept))
    except OSError as error:
        e.fail(f"--output {args.output}: {error.strerror}; must be a file that can be written")
    others = len(rows) - len(rates) - len(failed)
    print(f"pass rates {counts}; failed: {len(failed)}, not asked: {others}")
    print(f"{args.output} holds the {len(kept)} records within")


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument

    add(
        "evaluation", type=Path, metavar="EVAL_DIR", help="folder of an evaluation, --num_samples K"
    )
    add(
        "--pass_rate",
        type=float,
        nargs=2,
        default=(0.1, 0.9),
        metavar=("LOW", "HIGH"),
        help="shares of right responses, both included; default: 0.1 0.9",
    )
    add("--annotations", type=Path, required=True, help="the split's file, as it was evaluated")
    add("--output", type=Path, required=True, help="the file to write: the rows that are kept")
    return parser.parse_args()


def read_annotations(path):
    """A file of one JSON object a line -> {sample_id: the line's bytes}, in their order."""
    if not path.is_file():
        e.fail(f"--annotations {path}: no such file; must be the annotations that were evaluated")

    rows = {}
    text = path.read_bytes().removeprefix(b"\xef\xbb\xbf")  # less a byte-order mark
    for number, line in enumerate(text.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            name = json.loads(line)["sample_id"]
            e.must(isinstance(name, (int, str)), f"sample_id {name!r:.60}")
            e.must(name not in rows, f"sample_id {name!r:.60} a second time")
        except (ValueError, LookupError, TypeError) as error:  # bad UTF-8, bad JSON among them
            e.fail(f"{path}:{number}: {error}; must be an object with a sample_id of its own")
        rows[name] = line
    return rows


def read_pass_rates(path):
    """predictions_<split>.jsonl -> {sample_id: share of right responses} and the sample_ids that
    failed."""
    if not path.is_file():
        e.fail(
            f"{path}: no such file; the evaluation must be of the split that --annotations holds"
        )

    predictions = e.read_rows(path)
    answered = e.answered(predictions)
    if any("answers" not in row for row in answered):
        e.fail(
            f"{path}: holds no `answers`; must come from eval_video.py with --num_samples 2 or more"
        )
    rates = {}
    for row in answered:
        rates[row["sample_id"]] = row["answers"].count(row["gold"]) / len(row["answers"])
    return rates, [row["sample_id"] for row in predictions if row["error"]]


if __name__ == "__main__":
    main()
