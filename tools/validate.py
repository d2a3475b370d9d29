"""Checks a data root whole before a long run meets it: every record, every file opened, its first and last frame decoded.

    python tools/validate.py data/SEED-Bench-R1                     # all of DATA_ROOT/annotations
    python tools/validate.py data/SEED-Bench-R1 annotations.jsonl   # one file of annotations

The scripts' --validate runs this. It prints a line for each thing that is wrong, then a table; exit code 2 if anything is.
"""

import argparse
import os
import sys
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sft_video as s  # the script that reads both kinds of rows


def parse(raw, root):
    """A chat row or a plain one -> record; ValueError says what is wrong."""
    return (s.parse_chat if "prompt" in raw else s.parse_record)(raw, root)


class Files:
    """Indices -> what is wrong with that file, or None. Its own first and last frame are decoded, in a child with a time limit."""

    def __init__(self, files, seconds):
        self.files, self.decoder = files, s.Decoder(self.decode, seconds)

    def decode(self, kind, path):
        s.read_media(kind, path, size=28, fps=1, max_frames=2)

    def __getitem__(self, i):
        return self.decoder(*self.files[i])[1]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data_root", type=Path)
    parser.add_argument(
        "annotations",
        nargs="?",
        default="",
        help="one file; default: all of DATA_ROOT/annotations/*.jsonl",
    )
    parser.add_argument(
        "--decode_timeout",
        type=float,
        default=60.0,
        help="seconds after which decoding a file is given up",
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that decode")
    args, problems, counts, users = parser.parse_args(), [], [], {}
    paths = (
        [Path(args.annotations)]
        if args.annotations
        else sorted(args.data_root.glob("annotations/*.jsonl"))
    )
    if not paths:
        s.fail(
            f"{args.data_root}/annotations: no *.jsonl there; must be a data root in the benchmark's layout"
        )
    for path in paths:
        wrong = []
        records = s.load_records(
            path, args.data_root, parse, fail=lambda *found: wrong.extend(found)
        )
        counts.append((path, len(records), len(wrong)))
        problems += wrong
        for record in records:
            for file in record["media"]:
                users.setdefault(file, []).append(f"{path.name}: sample_id {record['sample_id']}")
    files = list(users)
    loader = s.load_batches(
        Files(files, args.decode_timeout), [[i] for i in range(len(files))], args.workers
    )
    found = [problem for [problem] in tqdm(loader, desc="files")]
    for (kind, path), problem in zip(files, found):
        if problem:
            problems.append(
                f"{path}: {problem}; of {users[kind, path][0]} and {len(users[kind, path]) - 1} more"
            )
    for name in ("video", "image"):
        counts.append(
            (
                f"{name}s",
                len(of_kind := [p for (kind, _), p in zip(files, found) if kind == name]),
                sum(p is not None for p in of_kind),
            )
        )
    print(
        *problems,
        *(f"{name}: {right} checked, {wrong} wrong" for name, right, wrong in counts),
        sep="\n",
    )
    sys.exit(2 if problems else 0)


if __name__ == "__main__":
    main()
