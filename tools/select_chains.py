"""A model's right chains of thought, as chat rows for SFT: rejection sampling.

    python eval_video.py --model DIR --splits training_6k --num_samples 8 --output_dir runs/chains
    python tools/select_chains.py runs/chains --output chains.jsonl \\
        --annotations DATA_ROOT/annotations/training_6k.jsonl
    python sft_video.py --model DIR --annotations chains.jsonl

Of each question those different responses are kept that show their thinking (they have a </think>)
and give the gold letter: the shortest, --per_question of them. A row has the prompt that was
answered, with its choices as they were asked.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import eval_video as e


def main():
    args = parse_arguments()
    split = args.annotations.stem
    predictions = args.evaluation / f"predictions_{split}.jsonl"
    settings_path = args.evaluation / f"settings_{split}.json"
    if args.output.exists():
        e.fail(f"--output {args.output}: exists already; must be a new file")
    if args.per_question < 1:
        e.fail(f"--per_question {args.per_question}: must be a number at least 1")
    for path in (predictions, settings_path):
        if not path.is_file():
            e.fail(f"{path}: no such file; --annotations must be of a split that was evaluated")

    settings = json.loads(settings_path.read_text())
    records = {r["sample_id"]: r for r in e.load_records(args.annotations, Path())}
    rows = []
    for row in e.answered(e.read_rows(predictions)):
        record = records.get(row["sample_id"])
        if record is None or e.choose(record, settings["seed"], 0)[1] != row["gold"]:
            e.fail(
                f"{args.annotations}: has no sample_id {row['sample_id']!r} with the gold letter "
                f"of {predictions}; must be the annotations that were evaluated"
            )
        rows += chat_rows(split, e.ablated(record, settings["ablate"]), row, settings, args)

    if not rows:
        e.fail(f"{predictions}: no right response has a </think> to learn from")
    try:
        e.write_rows(args.output, rows, "x")
    except OSError as error:
        e.fail(f"--output {args.output}: {error.strerror}; must be a file that can be written")
    print(f"{args.output} holds {len(rows)} chains")


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("evaluation", type=Path, metavar="EVAL_DIR", help="folder of an evaluation")
    add("--annotations", type=Path, required=True, help="the split's file, as it was evaluated")
    add("--per_question", type=int, default=1, help="chains of a question that are kept at most")
    add("--output", type=Path, required=True, help="the file to write: rows for sft_video.py")
    return parser.parse_args()


def chat_rows(split, record, row, settings, args):
    """A record (media relative to the data root) and its row of predictions -> its chat rows."""
    choices, gold = e.choose(record, settings["seed"], 0)
    prompt = e.build_messages(record, choices)
    for part, (kind, path) in zip(prompt[0]["content"], record["media"]):
        part[kind] = str(path)

    right = set()
    for text in row.get("responses", [row["response"]]):
        if "</think>" in text and e.extract_answer(text, choices) == gold:
            right.add(text.strip())

    shortest = sorted(sorted(right), key=len)[: args.per_question]
    return [
        dict(sample_id=f"{split}_{row['sample_id']}_{i}", prompt=prompt, response=text)
        for i, text in enumerate(shortest)
    ]


if __name__ == "__main__":
    main()
