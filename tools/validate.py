"""Checks a whole data root before a long run meets it.

    python tools/validate.py data/SEED-Bench-R1                     # all of DATA_ROOT/annotations
    python tools/validate.py data/SEED-Bench-R1 annotations.jsonl   # one file of annotations

Every record is parsed, every file opened, its first and last frame decoded. It prints a line for
each thing that is wrong, then a table; the exit code is 2 if anything is.
"""

import argparse
import os
import sys
from pathlib import Path

from pebble import ProcessExpired
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sft_video as s  # the script that reads both kinds of rows


def main():
    args = parse_arguments()
    paths = sorted(args.data_root.glob("annotations/*.jsonl"))
    if args.annotations:
        paths = [Path(args.annotations)]
    if not paths:
        s.fail(
            f"{args.data_root}/annotations: no *.jsonl there; must be a data root in the "
            "benchmark's layout"
        )

    # The records, and who uses each file.
    problems = []
    counts = []
    users = {}

    def note(*lines):
        problems.extend(lines)

    for path in paths:
        before = len(problems)
        records = s.load_records(path, args.data_root, parse, fail=note)
        counts.append((path, len(records), len(problems) - before))
        for record in records:
            for file in record["media"]:
                users.setdefault(file, []).append(f"{path.name}: sample_id {record['sample_id']}")

    # The files.
    found = check_files(list(users), args.workers, args.decode_timeout)
    for file, problem in found.items():
        if problem:
            first, *others = users[file]
            problems.append(f"{file[1]}: {problem}; of {first} and {len(others)} more")
    for wanted in ("video", "image"):
        told = [problem for (kind, _), problem in found.items() if kind == wanted]
        counts.append((f"{wanted}s", len(told), len(told) - told.count(None)))

    for problem in problems:
        print(problem)
    for name, checked, wrong in counts:
        print(f"{name}: {checked} checked, {wrong} wrong")
    sys.exit(2 if problems else 0)


def parse_arguments():
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

    return parser.parse_args()


def parse(raw, root):
    """A chat row or a plain one -> record; ValueError says what is wrong."""
    if "prompt" in raw:
        return s.parse_chat(raw, root)
    return s.parse_record(raw, root)


def check_files(files, workers, seconds):
    """Files (kind, path) -> {file: what is wrong with it, or None}.

    Each is decoded in a child process within a time limit: whatever happens there, the rest goes
    on."""
    pool = s.decoding_pool(workers)
    checks = [pool.schedule(check, file, timeout=seconds) for file in files]

    found = {}
    for file, checking in zip(tqdm(files, desc="files"), checks):
        try:
            found[file] = checking.result()
        except TimeoutError:
            found[file] = f"decoding took over {seconds} s"
        except ProcessExpired as error:
            found[file] = f"decoder died with exit code {error.exitcode}"
    pool.stop()
    pool.join()
    return found


def check(kind, path):
    """Decodes a file's first and last frame -> what is wrong with it, or None."""
    try:
        s.read_media(kind, path, size=28, fps=1, max_frames=2)
    except Exception as error:  # whatever a decoder raises is this file's fault
        return f"{type(error).__name__}: {error}".splitlines()[0]


if __name__ == "__main__":
    main()
