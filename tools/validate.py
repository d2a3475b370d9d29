"""Checks a whole data root before a long run meets it.

    python tools/validate.py data/SEED-Bench-R1                     # all of DATA_ROOT/annotations
    python tools/validate.py data/SEED-Bench-R1 annotations.jsonl   # one file of annotations
    python tools/validate.py data/LongVideoBench                    # lvb_val.json and its videos

Every record is parsed, and of every file just the frames are decoded that a run will ask for: give
the run's --fps, --max_frames and --video_reader if they are not the defaults. It prints a line for
each thing that is wrong, then a table; the exit code is 2 if anything is.
"""

import argparse
import collections
import os
import sys
from functools import partial
from pathlib import Path

from pebble import ProcessExpired
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import eval_video as e
import sft_video as s  # the script that reads both kinds of rows


def main():
    args = parse_arguments()
    paths = sorted(args.data_root.glob("annotations/*.jsonl"))
    paths += sorted(args.data_root.glob("lvb_val.json"))
    if args.annotations:
        paths = [Path(args.annotations)]
    if not paths:
        s.fail(
            f"{args.data_root}/annotations: no *.jsonl there, nor a lvb_val.json in the folder; "
            "must be a data root in the benchmark's layout"
        )

    # The records, and who uses each file.
    problems = []
    counts = []
    users = {}

    def note(*lines):
        problems.extend(lines)

    for path in paths:
        before = len(problems)
        if path.name == "lvb_val.json":
            records = e.load_longvideobench(path.parent, note)
        else:
            records = s.load_records(path, args.data_root, parse, fail=note)
        counts.append((path, len(records), len(problems) - before))
        for record in records:
            for file in record["media"]:
                users.setdefault(file, []).append(f"{path.name}: sample_id {record['sample_id']}")

    # The files: those that are missing, and what decoding says of the others.
    problems += count_missing(users)
    there = [file for file in users if file[1].is_file()]
    found = dict.fromkeys(users, "is missing") | check_files(there, args)
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
    run = s.Config()
    add = partial(parser.add_argument, help="as in the run that is to come")
    parser.add_argument("data_root", type=Path)
    parser.add_argument(
        "annotations",
        nargs="?",
        default="",
        help="one file; default: all of DATA_ROOT/annotations/*.jsonl",
    )
    add("--fps", type=float, default=run.fps)
    add("--max_frames", type=int, default=run.max_frames)
    add("--frame_size", type=int, default=run.frame_size)
    add("--video_reader", choices=["pyav", "decord"], default=run.video_reader)
    add("--decode_timeout", type=float, default=run.decode_timeout)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that decode")

    return parser.parse_args()


def parse(raw, root):
    """A chat row or a plain one -> record; ValueError says what is wrong."""
    if "prompt" in raw:
        return s.parse_chat(raw, root)
    return s.parse_record(raw, root)


def count_missing(users):
    """Files (kind, path) -> a line for each folder that lacks some of its files."""
    wanted = collections.Counter(path.parent for _, path in users)
    lacks = collections.Counter(path.parent for _, path in users if not path.is_file())
    return [
        f"{folder}: {count} of {wanted[folder]} files are missing, {s.nearby(folder)} is there"
        for folder, count in lacks.items()
    ]


def check_files(files, args):
    """Files (kind, path) -> {file: what is wrong with it, or None}.

    Each is decoded in a child process within a time limit: whatever happens there, the rest goes
    on."""
    pool = s.decoding_pool(args.workers)
    how = (args.frame_size, args.fps, args.max_frames, args.video_reader)
    checks = [pool.schedule(check, (*file, *how), timeout=args.decode_timeout) for file in files]

    found = {}
    for file, checking in zip(tqdm(files, desc="files"), checks):
        try:
            found[file] = checking.result()
        except TimeoutError:
            found[file] = f"decoding took over {args.decode_timeout} s"
        except ProcessExpired as error:
            found[file] = f"decoder died with exit code {error.exitcode}"
    pool.stop()
    pool.join()
    return found


def check(kind, path, *how):
    """Decodes the frames that a run asks for -> what is wrong with the file, or None.

    What FFmpeg says on its way is kept off stderr: it does not name the file."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    try:
        s.read_media(kind, path, *how)
    except Exception as error:  # whatever a decoder raises is this file's fault
        return f"{type(error).__name__}: {error}".splitlines()[0]


if __name__ == "__main__":
    main()
