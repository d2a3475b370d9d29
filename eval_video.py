"""Tiered evaluation of Qwen2-VL on SEED-Bench-R1, in plain PyTorch: does what it learnt carry to
unseen kitchens and to unseen tasks?

    torchrun --nproc_per_node=8 eval_video.py --model DIR --data_root DATA    # L1, L2, L3, greedy
    python eval_video.py --toy --model runs/toy-grpo                          # the toy's tiers
    python eval_video.py --model DIR --longvideobench ROOT                    # LongVideoBench, too
    python eval_video.py --compare runs/eval-base runs/eval-grpo --paper      # folders, one table

For each split (`main` is this list):

    records     -> prompts: sampled frames, the observed image, the question and its choices
    prediction  -> a response (or K of them), and the letter that it gives
    tally       -> accuracy with its interval, by domain; what failed is counted apart
    comparison  -> the paired difference to another model's answers, with McNemar's p

A row is written as soon as it is answered, by each rank to a file of its own: no rank waits for
another. At the end they become predictions_<split>.jsonl. A run that was killed goes on where it
was, and grades anew what is there. A question that fails (an unreadable video) is in `failed` and
in no denominator. Batch size and ranks change responses by rounding alone.

Dimensions: B prompts, G samples of each (K in the tables), P and C their tokens, N rows (tokens or
patches), H heads, K key-value heads, E head width, D model width, V vocabulary, T frames.

The page from here to the end of `main` is the whole evaluation. What it stands on comes behind, in
blocks that several scripts share: answers, sampling, Qwen2-VL, records and frames, start-up. A
"trap" is a fault of other implementations that docs/deviations.md lists.
"""

import argparse
import collections
import difflib
import fcntl
import hashlib
import inspect
import json
import math
import multiprocessing
import operator
import os
import random
import re
import signal
import subprocess
import sys
import types
import unicodedata
from contextlib import suppress
from dataclasses import dataclass, field, fields
from datetime import timedelta
from functools import cache, partial
from glob import glob
from itertools import chain, groupby
from pathlib import Path
from typing import Literal

import av
import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn as nn
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from pebble import CONSTS, ProcessExpired, ProcessPool
from PIL import Image, ImageOps
from safetensors import SafetensorError
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer, HfArgumentParser

# ------------------------------------------------------------------------------------------------
# Settings
# ------------------------------------------------------------------------------------------------


# === shared: settings — identical in grpo_video.py, sft_video.py, eval_video.py ===
def from_torchrun(name, default=0):
    """torchrun tells each process its place by environment variables."""
    return int(os.environ.get(name, default))


RANK = from_torchrun("RANK")
WORLD = from_torchrun("WORLD_SIZE", 1)
LOCAL_RANK = from_torchrun("LOCAL_RANK")
LOCAL_WORLD = from_torchrun("LOCAL_WORLD_SIZE", WORLD)
RESTARTS = from_torchrun("TORCHELASTIC_RESTART_COUNT")
HERE = Path(__file__).resolve().parent


def fail(*problems):
    """Ends the program with exit code 2 and a line per problem (20 at most), once a machine."""
    lines = list(problems[:20])
    if len(problems) > 20:
        lines.append(f"{len(problems)} problems in all; these were the first 20")

    if LOCAL_RANK == 0:
        for line in lines:
            print(f"{Path(sys.argv[0]).name}: error: {line}", file=sys.stderr)
    sys.exit(2)


# === end shared: settings ===


TIERS = ["validation_L1", "validation_L2", "validation_L3"]
ABLATIONS = ("none", "no_video", "no_image", "shuffle_frames", "text_only")


@dataclass
class Config:
    """All settings. Each is a flag, its comment the flag's help; the limits that it names hold."""

    # The model and the questions
    model: str = "Qwen/Qwen2-VL-7B-Instruct"  # Qwen2-VL checkpoint: a folder, or a hub id to fetch
    data_root: str = "data/SEED-Bench-R1"  # folder with annotations/, videos/ and images/
    splits: list[str] = field(default_factory=lambda: TIERS)  # files of DATA_ROOT/annotations
    longvideobench: str = ""  # its folder: evaluated too, or alone by `--splits LVB`
    limit: int = 0  # questions of each split at most; 0: all, at least 0
    toy: bool = False  # the toy's data, and its base model for --model, built if missing
    max_frames: int = 16  # frames of a video at most, at least 2
    fps: float = 2.0  # frames per second of video; 4 to max_frames in all, above 0
    frame_size: int = 256  # height and width of a frame, rounded to a multiple of 28, at least 1
    video_reader: Literal["pyav", "decord"] = "pyav"  # decord, the released run's, can be wrong
    skip_missing: bool = False  # leave out records whose video or image is missing
    ablate: Literal[*ABLATIONS] = "none"  # what a question lacks

    # The responses
    max_completion_length: int = 256  # tokens of a response at most, at least 1
    do_sample: bool = False  # sample by temperature instead of taking the most likely token
    temperature: float = 1.0  # softmax temperature if do_sample, above 0
    num_samples: int = 1  # K sampled responses: mean accuracy, pass@K, majority vote, at least 1
    seed: int = 42  # of the sampling and of drawn choices, at least 0
    batch_size: int = 8  # questions decoded together on a device, at least 1
    dataloader_num_workers: int = 2  # processes that decode ahead; 0: none, at least 0
    decode_timeout: float = 60.0  # seconds after which decoding a sample is given up, above 0

    # What it writes
    output_dir: str = ""  # default: runs/eval-<the model's folder>, of a checkpoint its run's too
    compare: list[str] = field(default_factory=list)  # evaluated folders to print as one table
    paper: bool = False  # show the paper's and DeepVideo-R1's numbers beside


TOY = dict(
    model=str(HERE / "toy/model"),
    data_root=str(HERE / "toy/data"),
    batch_size=32,
    max_completion_length=24,
    max_frames=8,
    frame_size=56,
    dataloader_num_workers=1,
)

# What a response depends on beside the model and the data.
DECIDING = (
    "do_sample temperature seed num_samples max_completion_length ablate max_frames fps frame_size "
    "video_reader"
).split()

# Accuracy in %: the paper's, arXiv 2503.24376, and DeepVideo-R1's re-runs, arXiv 2506.07464.
COLUMNS = ("L1", "L2", "L3 Daily life", "L3 Hobbies", "L3 Recreation", "L3 Work", "L3")
COLUMNS += ("LVB 15 s", "LVB 60 s", "LVB 600 s", "LVB 3600 s", "LVB")
PAPER = {
    "paper: Qwen2-VL-7B": "34.79 34.02 31.21 32.30 33.33 30.69 31.57",
    "paper: + SFT": "43.79 44.10 38.27 41.02 32.24 38.61 38.15",
    "paper: + GRPO": "46.01 50.16 48.52 45.08 43.72 41.34 44.89",
    "DeepVideo-R1: Qwen2-VL-7B": "- - - - - - - 42.3 44.8 34.0 25.4 32.9",
    "DeepVideo-R1: 7B + SFT": "- - - - - - - 45.0 54.7 36.7 36.4 40.0",
    "DeepVideo-R1: 7B + GRPO": "- - - - - - - 54.5 53.5 42.5 37.2 43.4",
    "DeepVideo-R1: Qwen2-VL-2B": "12.9 16.4 - - - - 13.8",
    "DeepVideo-R1: 2B + SFT": "34.1 36.2 - - - - 33.8",
    "DeepVideo-R1: 2B + GRPO": "38.4 42.0 - - - - 36.8",
}


# ------------------------------------------------------------------------------------------------
# The formulas
# ------------------------------------------------------------------------------------------------


def tally(rows, *keys):
    """Prediction rows -> counts and accuracy, and the same by each of the keys. Failed rows are in
    accuracy_failed_wrong's total alone."""
    seen = answered(rows)
    total = len(seen)
    correct = sum(row["correct"] for row in seen)
    counts = dict(
        accuracy=correct / max(1, total),
        correct=correct,
        total=total,
        failed=len(rows) - total,
        no_answer=sum(row["predicted"] is None for row in seen),
        ci95=wilson(correct, total),
        accuracy_failed_wrong=correct / max(1, len(rows)),
        accuracy_failed_wrong_ci95=wilson(correct, len(rows)),
    )

    hits = [row["answers"].count(row["gold"]) for row in seen if "answers" in row]
    if hits:  # the K samples of a question count as one, so the intervals are its own
        mean = sum(hits) / sum(len(row["answers"]) for row in seen)
        best = sum(count > 0 for count in hits) / total
        counts |= dict(
            mean_accuracy=mean,
            mean_accuracy_ci95=wilson(mean * total, total),
            pass_at_k=best,
            pass_at_k_ci95=wilson(best * total, total),
        )

    for key in keys:
        counts[f"by_{key}"] = {name: tally(group) for name, group in grouped(rows, key).items()}
    return counts


def answered(rows):
    return [row for row in rows if not row["error"]]


def grouped(rows, key):
    """-> {value of the key: its rows}, sorted; rows without the key are left out."""
    groups = {}
    for row in rows:
        if key in row:
            groups.setdefault(row[key], []).append(row)
    return dict(sorted(groups.items()))


def wilson(correct, total):
    """95 % Wilson score interval of a proportion -> [low, high]; [0, 1] where none is counted."""
    z2 = 1.959964**2
    variance = correct * (total - correct) / max(1, total)
    half = math.sqrt(z2 * (variance + z2 / 4))
    middle = correct + z2 / 2
    n = total + z2
    return [(middle - half) / n, (middle + half) / n]


def mcnemar(gained, lost):
    """Exact two-sided p-value of a split as uneven as this of the questions that just one of two
    equal models gets right."""
    n = gained + lost
    tail = sum(math.comb(n, k) for k in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2**n)


def table(answers, paper):
    """{folder: {split: rows}} -> Markdown, a line of scores for each folder; all but the first are
    compared to the first."""
    lines = {}
    first = {}
    for folder, splits in answers.items():
        line = dict(failed=0, missing=len(read_rows(Path(folder, "missing.jsonl"))))
        for split, rows in splits.items():
            line["failed"] += len(rows) - len(answered(rows))
            before = first.get(split, [])
            column = split.removeprefix("validation_")
            line[column] = score(rows, before)
            for domain, group in grouped(rows, "domain").items():
                if domain != "all":
                    line[f"{column} {domain}"] = score(group, before)
        lines[folder] = line
        first = first or splits

    columns = set().union(*lines.values())
    if paper:
        for model, values in PAPER.items():
            known = zip(COLUMNS, values.split())
            line = {name: value for name, value in known if name in columns and value != "-"}
            if line:
                lines[model] = line

    # Sorted, "60 s" before "600 s".
    columns = sorted(columns, key=lambda name: re.sub(r"\d+ s", lambda x: x[0].zfill(6), name))
    cells = [["model", *columns], ["---"] * (len(columns) + 1)]
    for model, line in lines.items():
        cells.append([model, *(line.get(name, "") for name in columns)])
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in cells)


def score(rows, first):
    """Accuracy in % (95 % interval), of how many questions, what differs from it, and the paired
    difference to the first model's rows."""
    counts = tally(rows)
    accuracy = counts["accuracy"]
    parts = [percent(accuracy, *counts["ci95"]), f"n = {counts['total']}"]
    for key in ("mean_accuracy", "pass_at_k", "accuracy_failed_wrong"):
        if counts.get(key, accuracy) != accuracy:
            parts.append(f"{key} {percent(counts[key], *counts[f'{key}_ci95'])}")

    before = {row["sample_id"]: row["correct"] for row in answered(first)}
    changes = [  # 1, 0 or -1 each, of the questions that both answered
        row["correct"] - before[row["sample_id"]]
        for row in answered(rows)
        if row["sample_id"] in before
    ]
    if changes:
        difference = 100 * sum(changes) / len(changes)
        p = mcnemar(changes.count(1), changes.count(-1))
        parts.append(f"{difference:+.1f} (p = {p:.2g})")
    return ", ".join(parts)


def percent(share, low, high):
    return f"{100 * share:.1f} ({100 * low:.0f}–{100 * high:.0f})"


# ------------------------------------------------------------------------------------------------
# Prediction
# ------------------------------------------------------------------------------------------------


def answer(split, questions, path, model, tokenizer, c):
    """This rank's batches of a split's questions -> rows behind those of its own file."""
    dataset = VideoDataset(questions, tokenizer, model.config, c, shuffle=False)
    starts = range(RANK * c.batch_size, len(questions), WORLD * c.batch_size)
    batches = [range(len(questions))[start : start + c.batch_size] for start in starts]
    loader = load_batches(dataset, batches, c.dataloader_num_workers)

    for samples in tqdm(loader, desc=split, total=len(batches), disable=RANK > 0):
        if c.ablate == "shuffle_frames":
            samples = [shuffle_frames(sample) for sample in samples]
        rows = predict(model, tokenizer, samples, c)
        write_rows(path.with_suffix(f".rank{RANK}"), rows, "a")
        for row in rows:
            if row["error"]:
                told = f"{split}: sample_id {row['sample_id']} failed: {row['error']}"
                tqdm.write(told, file=sys.stderr)


def predict(model, tokenizer, samples, c):
    """A batch of samples -> rows of predictions_<split>.jsonl; an unreadable sample's has its error
    and no response."""
    good = [s for s in samples if "error" not in s]
    if good:
        weight = model.model.embed_tokens.weight
        end_ids = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
        seeds = [random.Random(repr((c.seed, s["sample_id"]))).getrandbits(63) for s in good]
        completions, _ = generate(
            model,
            Prompts.collate(good, weight.device, weight.dtype),
            c.num_samples,
            c.max_completion_length,
            end_ids,
            seeds,
            c.temperature if c.do_sample else 0.0,
        )  # [B, K, C]

        for sample, ids in zip(good, completions):
            # Behind its end a row is filled up with end tokens, which are skipped.
            sample["texts"] = tokenizer.batch_decode(ids, skip_special_tokens=True)
            sample["first"] = ids[0][completion_mask(ids[0], end_ids)].tolist()
    return [prediction(sample) for sample in samples]


def prediction(sample):
    """A sample with its responses, or its error -> its row."""
    texts = sample.get("texts", [None])
    row = dict(
        sample_id=sample["sample_id"],
        response=texts[0],
        ids=sample.get("first"),
        gold=sample["gold"],
        domain=sample["domain"],
        error=sample.get("error"),
    )

    if len(texts) > 1:
        row["responses"] = texts
    return graded(row, sample["choices"])


def graded(row, choices):
    """A row -> the same with predicted, correct and, of K samples, answers as its responses say."""
    texts = row.get("responses", [row["response"]])
    answers = [extract_answer(text or "", choices) for text in texts]

    # The majority's answer; of equals the first that was sampled.
    predicted = max(filter(None, answers), key=answers.count, default=None)
    row |= dict(predicted=predicted, correct=predicted == row["gold"])
    if "responses" in row:
        row["answers"] = answers
    return row


def ablated(record, ablate):
    """The record less the media that --ablate takes away."""
    media = [m for m in record["media"] if ablate not in (f"no_{m[0]}", "text_only")]
    return record | dict(media=media)


def shuffle_frames(sample):
    """--ablate shuffle_frames: the frames, in pairs as the model takes them in, in an order drawn
    by sample_id."""
    if "error" in sample:
        return sample

    # A slice is a pair of frames, or the image, which comes behind them. All are of one size.
    t, h, w = sample["grids"][0]
    slices = sample["patches"].split(h * w)
    rng = random.Random(repr(sample["sample_id"]))
    shuffled = rng.sample(slices[:t], t)
    return sample | dict(patches=torch.cat([*shuffled, *slices[t:]]))


# ------------------------------------------------------------------------------------------------
# Questions and files
# ------------------------------------------------------------------------------------------------


def folder_of(c):
    """--output_dir, or runs/eval-<the model folder's name>: a checkpoint's behind its run's."""
    name = re.search(r"[^/]+(/checkpoint-\d+)?$", str(Path(c.model).resolve()))[0]
    return Path(c.output_dir or f"runs/eval-{name.replace('/', '-')}")


def open_split(path, settings_path, settings, records):
    """-> ids of the questions that a split's file, or a killed run's ranks, have rows of. These are
    graded anew, as a file has one grader; another model's, or by other settings, are an error."""
    rows = stored_rows(path)
    if rows:
        before = json.loads(settings_path.read_text())
        changed = [key for key in settings if before.get(key) != settings[key]]
        if changed:
            where = f"--output_dir {path.parent} (remove it, or give another): {settings_path.name}"
            fail(
                *(
                    f"{where} has {key} {before.get(key)!r}, not {settings[key]!r}"
                    for key in changed
                )
            )

    barrier()  # all have read
    if RANK == 0:
        settings_path.write_text(json.dumps(settings, indent=1))
        for record in records:
            if record["sample_id"] in rows:
                graded(rows[record["sample_id"]], choose(record, settings["seed"], 0)[0])
        join(path, rows, records)
    barrier()  # the ranks' own files are gone
    return rows.keys()


def stored_rows(path):
    """{sample_id: row} of a split's file, and of what each rank has written beside it since."""
    paths = [path, *path.parent.glob(f"{path.stem}.rank*")]
    return {row["sample_id"]: row for row in chain(*map(read_rows, paths))}


def join(path, rows, records):
    """{sample_id: row} -> a split's file, in its records' order. The ranks' own files go."""
    beside = path.with_suffix(".new")
    in_order = [rows[r["sample_id"]] for r in records if r["sample_id"] in rows]
    write_rows(beside, in_order, "w")
    beside.replace(path)
    for own in path.parent.glob(f"{path.stem}.rank*"):
        own.unlink()


def read_rows(path):
    """A file of one JSON object a line -> the objects of its whole lines; a kill may have left half
    a line behind them."""
    if not path.exists():
        return []
    try:
        return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
    except ValueError as error:
        fail(f"{path}: {error}")


def write_rows(path, rows, mode):
    with open(path, mode) as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)


def evaluated(folder):
    """An evaluated folder -> {split: rows}"""
    paths = Path(folder).glob("predictions_*.jsonl")
    splits = {path.stem.removeprefix("predictions_"): read_rows(path) for path in paths}
    if not splits:
        fail(f"--compare {folder}: no predictions there; must be an evaluated folder")
    return splits


def weights_hash(source):
    """Of a checkpoint's weights: an evaluation folder belongs to one model."""
    whole = hashlib.sha256()
    for path in sorted(source.glob("*.safetensors")):
        with open(path, "rb") as f:
            whole.update(hashlib.file_digest(f, "sha256").digest())
    return whole.hexdigest()


def questions_hash(records, seed):
    """Of all questions of a split, with the choices as they are asked."""
    asked = [(r["sample_id"], r["question"], choose(r, seed, 0)) for r in records]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


def load_longvideobench(root, fail=fail):
    """A folder's lvb_val.json, one list -> records."""
    path = root / "lvb_val.json"
    try:
        lines = [json.dumps(entry).encode() for entry in json.loads(path.read_text())]
    except (OSError, ValueError, TypeError) as error:
        fail(
            f"{path}: {error!r}; `hf download --repo-type dataset longvideobench/LongVideoBench` "
            "fetches it"
        )
    return load_records(path, root, parse_longvideobench, lines, fail)


def parse_longvideobench(raw, root):
    """An entry of lvb_val.json -> record: 4 or 5 candidates, no image, no subtitles. ValueError
    says what is wrong."""
    texts = raw.get("candidates")
    right = raw.get("correct_choice")
    strings = isinstance(texts, list) and all(isinstance(text, str) for text in texts)
    must(
        strings and len(texts) in (4, 5) and right in range(len(texts)),
        "must have 4 or 5 candidates and the place of the correct_choice among them: "
        f"{texts!r:.60}, {right!r:.60}",
    )
    group = raw.get("duration_group")
    must(isinstance(group, int), f"field 'duration_group' must be an integer, is {group!r:.60}")

    return dict(
        sample_id=text_field(raw, "id"),
        question=text_field(raw, "question"),
        choices=texts,
        gold="ABCDE"[int(right)],
        media=[("video", inside(root, f"videos/{text_field(raw, 'video_path')}"))],
        domain=f"{group} s",
        category=text_field(raw, "question_category"),
    )


# ------------------------------------------------------------------------------------------------
# The run
# ------------------------------------------------------------------------------------------------


def main():
    c = parse_config(Config, TOY)
    if c.compare:
        return print(table({folder: evaluated(folder) for folder in c.compare}, c.paper))

    c.do_sample = c.do_sample or c.num_samples > 1  # K greedy responses would be one
    device, dtype = set_up(c.toy)
    # The ranks meet at the end alone, hours apart perhaps: the default group would give up.
    patient = dist.new_group(timeout=timedelta(days=30), backend="gloo")
    root = Path(c.data_root)

    # The questions and the model.
    tiers = [split for split in c.splits if split != "LVB"]
    there = [path.stem for path in root.glob("annotations/*.jsonl")] or tiers
    for split in {*tiers} - {*there}:
        close = difflib.get_close_matches(split, there) or there
        fail(f"--splits {split}: not in {root}/annotations; did you mean {' or '.join(close)}?")
    splits = {split: load_records(root / f"annotations/{split}.jsonl", root) for split in tiers}
    if c.longvideobench:
        splits["LVB"] = load_longvideobench(Path(c.longvideobench))
    elif not splits:
        fail("--splits LVB: --longvideobench must name its folder")
    missing = []
    for split, records in splits.items():
        splits[split], lost = with_media(records, c.skip_missing)
        missing += [dict(split=split) | row for row in lost]
    source = find_model(c.model)
    tokenizer = load_tokenizer(source)
    model = load_model(source, device, dtype)
    lengths = {}
    for split, records in splits.items():
        dataset = VideoDataset(records, tokenizer, model.config, c)
        lengths[split] = dataset.check_lengths(model.config.text_config.max_position_embeddings)

    # What is there by now, and what is left to be answered.
    folder = folder_of(c)
    lock(folder)
    settings = {key: getattr(c, key) for key in DECIDING}
    settings["model_sha256"] = weights_hash(source)
    paths = {split: folder / f"predictions_{split}.jsonl" for split in splits}
    questions = {}
    todo = {}
    for split, records in splits.items():
        settings["data_sha256"] = questions_hash(records, c.seed)
        settings_path = folder / f"settings_{split}.json"
        done = open_split(paths[split], settings_path, settings, records)

        questions[split] = [ablated(r, c.ablate) for r in records[: c.limit or None]]
        left = [q for q in questions[split] if q["sample_id"] not in done]
        # A batch's prompts are of like lengths. The longest come first, as they need most memory.
        todo[split] = sorted(left, key=lambda q: lengths[split][q["sample_id"]], reverse=True)

    for split in splits:
        answer(split, todo[split], paths[split], model, tokenizer, c)
    dist.barrier(patient)

    # Tally and comparison.
    if RANK == 0:
        write_rows(folder / "missing.jsonl", missing, "w")
        answers = {}
        summary = {}
        short = []
        for split, records in splits.items():
            rows = stored_rows(paths[split])
            join(paths[split], rows, records)
            asked = [q for q in questions[split] if q["sample_id"] in rows]
            answers[split] = [q | rows[q["sample_id"]] for q in asked]
            if len(asked) < len(questions[split]):
                counts = f"{len(asked)} rows of {len(questions[split])} questions"
                short.append(f"{paths[split]}: {counts}; the same command goes on")
            left_out = sum(row["split"] == split for row in missing)
            summary[split] = tally(answers[split], "domain", "category") | dict(missing=left_out)
        text = table({folder: answers}, c.paper)
        (folder / "summary.json").write_text(json.dumps(summary, indent=1))
        (folder / "summary.md").write_text(text + "\n")
        print(text)
        print(f"{folder}/ holds predictions_<split>.jsonl, summary.json and summary.md")
        if short:
            fail(*short)
    dist.destroy_process_group()


# === shared: answer — identical in grpo_video.py, eval_video.py ===
def extract_answer(text, choices=()):
    """The one letter that a response gives inside <answer> tags, or behind the thinking; or None.

    Two different letters are none, and neither is the A of `A knife` (trap 11). `choices` are the
    question's: their letters count; none given means four of unknown text."""
    tagged = re.findall(r"<answer>(.*?)(?=</answer>|<answer>|\Z)", text, re.S)
    forms = answer_forms(choices, bool(tagged))
    letters = {given_letter(part, forms) for part in tagged or [text]}
    return letters.pop() if len(letters) == 1 else None


def given_letter(text, forms):
    """One part of a response -> the letter that the first of the forms in it has, or None."""
    text = text.rpartition("</think>")[2]
    if "<think>" in text:
        return None  # cut off while thinking

    text = plain(text)
    for form in forms:
        found = " ".join(re.findall(form, text, re.X))
        letters = {*re.findall(r"\b[A-E]\b", found.upper())}
        if letters:
            return letters.pop() if len(letters) == 1 else None
    return None


def plain(text):
    r"""Less mark-up, and with plain signs for full-width ones: **B**, \boxed{\text{B}}, Ｂ．"""
    text = unicodedata.normalize("NFKC", text)
    return re.sub(r"\\[a-z]+|[{}$*`]", " ", text).strip()


def answer_forms(choices, tagged):
    """-> verbose regular expressions of the forms of an answer, a clear one before a weaker one."""
    one = f"[{'ABCDE'[: len(choices) or 4]}]"
    more = rf"(?: [^\w,、/&]* (?: \bor\b | \band\b | [,、/&] ) )++ \W* {one}\b"  # `or C`, `, C`
    own = r"\W+".join(re.findall(r"\w+", plain("".join(choices[:1]))))  # the words of choice A
    # Behind `B `, in tags anything; without, one phrase: a second sentence may say no to B.
    rest = "" if tagged else r"(?= [^,.;:!?\n]++ \W*\Z )"

    return (
        # Alone: `B`, `b`, `(B)`; or several, `A or B`
        rf"\A\W* (?: (?i: {one} ) | {one} (?: (?: \W | \bor\b | \band\b )+ {one} )+ ) \W*\Z",
        # Announced: `answer is B`, `Option B`; or marked: `B. text`, `B.text`, `B) text`, `B: text`
        rf"""
          (?i: (?<= answer | option | choice ) (?: [ ]is | : )* ) \W* {one}\b (?: {more} )*
          (?! ' | \s+ (?! or\b | and\b ) [a-z] )
        | (?: \A\W* | [\s(\[] ) {one} (?: [):\]] | \. (?= \s+\S | \w\w | \w\s ) )
        """,
        # In front: `B - text`, `B` on its own line, `B, text`, `B text`; of A, which may be an
        # article, `A text` with choice A's own. No other letter opens a line or stands behind `or`.
        rf"""
        \A (?! [\S\s]* (?: \n [^\w\n]* | \bor\s ) (?! A\s\w ) {one}\b ) \W* (?:
          {one} (?! {more} ) (?: \s*[-–—]\s | \s*\n | 、 | , {rest} )
        | (?! A ) {one} (?! {more} | \s+ (?: or | and )\b ) \s {rest}
        | A \s++ (?= (?i: {own} ) \W*\Z ) )
        """,
    )


# === end shared: answer ===


# === shared: sampling — identical in grpo_video.py, eval_video.py ===
@torch.no_grad()
def generate(model, prompts, G, C, end_ids, seeds, temperature=1.0):
    """-> G completions of each prompt, ids [B, G, c], c <= C, filled up with end_ids[0]; log-probs
    [B, G, c] of the tokens as they were drawn (greedy: at temperature 1).

    A row's random numbers come from its prompt's seed (an int) and its place in the group.
    generation_config.json is never read (trap 1), and the cache is always on (trap 17)."""
    B = len(prompts.ids)
    device = prompts.ids.device
    ends = torch.tensor(end_ids, device=device)
    uniform = [
        torch.rand(G, C, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        for seed in seeds
    ]
    uniform = torch.cat(uniform).to(device)  # [B*G, C]

    # The prompts, once: their keys and values fill the cache.
    cache = KVCache(prompts, G, C)
    model.decoder(model.embed(prompts), prompts.positions.flatten(1), cache)

    # The state of decoding, [B*G] or [B*G, C]. The prompts' last tokens open the completions.
    token = prompts.last.repeat_interleave(G)
    position = prompts.last_position.repeat_interleave(G)
    ended = torch.zeros_like(token, dtype=torch.bool)
    out = torch.full((B * G, C), end_ids[0], device=device)
    logp = torch.zeros(B * G, C, device=device)

    def step():
        """A token of each row. All that it changes keeps its place in memory, as a graph needs."""
        cache.mask.index_fill_(4, cache.column.add_(1) + cache.P, 0)
        positions = (position + cache.column).expand(3, -1)
        x = model.decoder(model.model.embed_tokens(token), positions, cache)
        drawn = uniform.index_select(1, cache.column)[:, 0]
        log_probs = model.logits(x).div_(temperature or 1).log_softmax(-1)
        token.copy_(pick(log_probs, drawn, temperature == 0))
        logp.index_copy_(1, cache.column, log_probs.gather(1, token[:, None]))
        shown = torch.where(ended, ends[0], token)
        out.index_copy_(1, cache.column, shown[:, None])
        ended.logical_or_(torch.isin(token, ends))

    run = step
    for _ in range(C):
        run()
        if ended.all():  # the host waits for the device here and nowhere else
            break
        if token.is_cuda and run is step:
            # All kernels are loaded now: from here on a token is one recorded graph of them.
            # Other threads may go on meanwhile, NCCL's for one.
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                step()
            run = graph.replay
    return [z[:, : int(cache.column) + 1].view(B, G, -1) for z in (out, logp)]


class KVCache:
    """Attention while decoding: each prompt's keys and values, once for its group, and room for C
    tokens of each completion.

    Keys are fp32: scores rounded to bf16 would not be those of the update."""

    def __init__(self, prompts, G, C):
        self.B, self.P = prompts.ids.shape
        self.G = G
        self.C = C
        self.prefill = packed_attention(prompts, G, 0)
        self.kept = {}  # layer -> keys and values, prompts' [B, K, P, E], own [B, G, K, C, E]
        self.column = prompts.lengths.new_full((1,), -1)  # of the token in hand

        # What is added to the scores: 0 where a row may look, else -inf. A step opens a column.
        columns = torch.arange(self.P + C, device=prompts.ids.device)
        mask = torch.where(columns < prompts.lengths[:, None] - 1, 0.0, -math.inf)
        self.mask = mask[:, None, None, None].repeat(1, G, 1, 1, 1)  # [B, G, 1, 1, P+C]

    def __call__(self, layer, q, k, v):
        """First the prompts' rows [B*P, heads, E], which fill the cache; then a token of each
        completion, [B*G, heads, E]."""
        if layer not in self.kept:
            room = (self.B, self.G, k.shape[1], self.C, k.shape[2])
            both = [
                z.unflatten(0, (self.B, self.P)).transpose(1, 2).contiguous()
                for z in (k.float(), v)
            ]
            self.kept[layer] = both + [z.new_zeros(room) for z in both]
            return self.prefill(layer, q, k, v)

        prompt_k, prompt_v, own_k, own_v = self.kept[layer]
        q, k, v = (z.unflatten(0, (self.B, self.G)) for z in (q.float(), k.float(), v))
        own_k.index_copy_(3, self.column, k[:, :, :, None])
        own_v.index_copy_(3, self.column, v[:, :, :, None])

        # R = H / K query heads share a key head; a group shares its prompt.
        q = q.unflatten(2, (k.shape[2], -1)) * q.shape[-1] ** -0.5  # [B, G, K, R, E]
        on_prompt = torch.einsum("bgkre,bkpe->bgkrp", q, prompt_k)
        on_own = torch.einsum("bgkre,bgkce->bgkrc", q, own_k)
        weights = (torch.cat((on_prompt, on_own), dim=-1) + self.mask).softmax(-1).to(v.dtype)

        on_prompt, on_own = weights.split((self.P, self.C), dim=-1)
        out = torch.einsum("bgkrp,bkpe->bgkre", on_prompt, prompt_v)
        out = out + torch.einsum("bgkrc,bgkce->bgkre", on_own, own_v)
        return out.flatten(2, 3).flatten(0, 1)  # [B*G, H, E]


def pick(log_probs, uniform, greedy):
    """log_probs [N, V] fp32, uniform [N] float64 in [0, 1) -> ids [N].

    Unless greedy the cumulative distribution is inverted at `uniform`, so that a row's tokens come
    from its own numbers, whatever shares its batch."""
    if greedy:
        return log_probs.argmax(-1)

    cumulative = log_probs.exp().cumsum(-1, dtype=torch.float64)
    place = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)
    return place[:, 0].clamp(max=log_probs.shape[1] - 1)


def completion_mask(ids, end_ids):
    """ids [..., C] -> bool, True through the first end token, inclusive; all True where none came
    (traps 3 and 4)."""
    ends = torch.isin(ids, torch.tensor(end_ids, device=ids.device)).long()
    return ends.cumsum(-1) - ends == 0


# === end shared: sampling ===


# === shared: qwen2_vl — identical in grpo_video.py, sft_video.py, eval_video.py ===
PATCH, PAIR, MERGE = 14, 2, 2  # a patch is 14 x 14 pixels of 2 frames; 2 x 2 patches make a token


class Qwen2VL(nn.Module):
    """Calling it scores completions; decoding uses its parts. Module names are the checkpoint's."""

    def __init__(self, config):
        super().__init__()
        c = config.text_config
        self.config = config
        self.gradient_checkpointing = False
        self.visual = VisionTower(config.vision_config)
        self.model = modules(
            embed_tokens=nn.Embedding(c.vocab_size, c.hidden_size),
            layers=nn.ModuleList(DecoderLayer(c) for _ in range(c.num_hidden_layers)),
            norm=nn.RMSNorm(c.hidden_size, eps=c.rms_norm_eps),
        )
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)

    def forward(self, prompts, completions, temperature=1.0, statistic=None):
        """completions [B, G, C] ids -> log softmax(logits / temperature) of their tokens, [B, G, C]
        fp32, and, if given, a statistic(logits [N, V], log_z [N], targets [N]) -> [N], likewise."""
        states = self.completion_states(prompts, completions)
        targets = completions.flatten()
        score = self.score

        # Logits at the completions' positions alone, 2^27 (512 MB) at a time; none of several
        # pieces is kept for the backward pass.
        rows = max(1, 2**27 // self.config.text_config.vocab_size)
        if len(targets) > rows and torch.is_grad_enabled():
            score = partial(checkpoint, score, use_reentrant=False)
        parts = zip(states.split(rows), targets.split(rows))
        pieces = [score(*part, temperature, statistic) for part in parts]

        # FSDP2's hooks want no view of what they return.
        scores = [torch.cat(piece).view(completions.shape).clone() for piece in zip(*pieces)]
        return scores if statistic else scores[0]

    def score(self, states, targets, temperature, statistic):
        """states [N, D], targets [N] -> (log-probs [N],) or (log-probs, statistic)."""
        logits = self.logits(states)
        if temperature != 1:
            logits = logits / temperature
        logp = -F.cross_entropy(logits, targets, reduction="none")
        if statistic is None:
            return (logp,)

        with torch.no_grad():
            log_z = logits.gather(1, targets[:, None])[:, 0] - logp
            return logp, statistic(logits, log_z, targets)

    def logits(self, x):
        """[N, D] -> [N, V] fp32: a log-softmax in bf16 would quantise the KL (trap 8)."""
        head = self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        x = self.model.norm(x)
        if len(x) <= 32:  # the same product in the order that takes half the time on a CPU
            return (head.weight @ x.T).T.float()
        return F.linear(x, head.weight).float()

    def completion_states(self, prompts, completions):
        """completions [B, G, C] ids -> [B*G*C, D], where row c predicts token c of its completion.

        The shift by one is here and nowhere else: the first row is the prompt's last token's, and
        the completion's own last token predicts nothing."""
        G, C = completions.shape[1:]
        first = prompts.last[:, None, None].expand(-1, G, 1)
        inputs = torch.cat((first, completions[:, :, :-1]), dim=2)  # [B, G, C]
        x = self.embed(prompts, inputs)  # [B*P + B*G*C, D]

        after = prompts.last_position[:, None] + torch.arange(C, device=inputs.device)
        after = after.repeat_interleave(G, 0).flatten().expand(3, -1)
        positions = torch.cat((prompts.positions.flatten(1), after), dim=1)
        return self.decoder(x, positions, packed_attention(prompts, G, C))

    def embed(self, prompts, *completions):
        """-> [B*P + the completions' tokens, D]. Vision features go only to the prompts' own
        placeholders (trap 12)."""
        ids = torch.cat([z.flatten() for z in (prompts.ids, *completions)])
        x = self.model.embed_tokens(ids)
        features = self.visual(prompts.patches, prompts.grids, self.run)
        images = prompts.ids == self.config.image_token_id
        media = images | (prompts.ids == self.config.video_token_id)
        media = F.pad(media.flatten(), (0, len(ids) - prompts.ids.numel()))
        return x.masked_scatter(media[:, None], features.to(x.dtype))

    def decoder(self, x, positions, attend):
        """Rows x [N, D] at positions [3, N] -> those that attend(layer, q, k, v) lets go on; the
        last layer is -1."""
        rope = self.config.text_config.rope_parameters
        E = self.model.layers[0].E
        inv_freq = rope["rope_theta"] ** (-torch.arange(0, E, 2, device=x.device) / E)
        sections = (positions[..., None] * inv_freq).split(rope["mrope_section"], dim=-1)
        angles = [section[axis] for axis, section in enumerate(sections)]  # of t | h | w
        angles = torch.cat(angles, dim=-1).repeat(1, 2)  # [N, E]
        cos = angles.cos().to(x.dtype)
        sin = angles.sin().to(x.dtype)

        for i, layer in enumerate(self.model.layers, -len(self.model.layers)):
            x = self.run(layer, x, cos, sin, partial(attend, i))
        return x

    def run(self, layer, *inputs):
        """layer(*inputs), recomputed in the backward pass if gradient_checkpointing says so and
        there will be one."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(layer, *inputs, use_reentrant=False)
        return layer(*inputs)


class DecoderLayer(nn.Module):
    def __init__(self, c):
        super().__init__()
        D = c.hidden_size
        self.E = D // c.num_attention_heads
        KE = c.num_key_value_heads * self.E

        self.input_layernorm = nn.RMSNorm(D, eps=c.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(D, eps=c.rms_norm_eps)
        self.self_attn = modules(
            q_proj=nn.Linear(D, D),
            k_proj=nn.Linear(D, KE),
            v_proj=nn.Linear(D, KE),
            o_proj=nn.Linear(D, D, bias=False),
        )
        self.mlp = modules(
            gate_proj=nn.Linear(D, c.intermediate_size, bias=False),
            up_proj=nn.Linear(D, c.intermediate_size, bias=False),
            down_proj=nn.Linear(c.intermediate_size, D, bias=False),
        )

    def forward(self, x, cos, sin, attend):
        """x [N, D]; attend(q [N, H, E], k [N, K, E], v [N, K, E]) -> [n, H, E] decides who sees
        whom; the last n rows go on."""
        h = self.input_layernorm(x)
        attn = self.self_attn
        qkv = (attn.q_proj(h), attn.k_proj(h), attn.v_proj(h))
        q, k, v = (z.unflatten(1, (-1, self.E)) for z in qkv)
        out = attend(rotate(q, cos, sin), rotate(k, cos, sin), v).flatten(1)
        x = x[len(x) - len(out) :] + attn.o_proj(out)

        h = self.post_attention_layernorm(x)
        return x + self.mlp.down_proj(F.silu(self.mlp.gate_proj(h)) * self.mlp.up_proj(h))


def packed_attention(prompts, G, C):
    """-> attend(layer, q, k, v) of rows [B*P | B*G*C]: a prompt is causal over itself; a completion
    sees its prompt and, causally, itself.

    Behind the last layer, -1, only the completions' rows are needed: there a prompt is keys and
    values alone."""
    B, P = prompts.ids.shape
    counts = [count for count, _ in prompts.runs]
    rows = [count * G for count in counts]
    runs = prompts.runs if C > 0 else []

    def split(z):
        """[B*P + B*G*C, heads, E] -> [B, heads, P, E] and [B*G, heads, C, E]"""
        prompt, own = z.split((B * P, B * G * C))
        prompt = prompt.unflatten(0, (B, P)).transpose(1, 2)
        return prompt, own.unflatten(0, (B * G, C)).transpose(1, 2)

    def attend(layer, q, k, v):
        q, q_own = split(q)
        k, k_own = split(k)
        v, v_own = split(v)
        if layer == -1:
            out = [q[:, :, :0]]
        else:
            out = [F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)]

        # Prompts of one length at a time: without padding no kernel needs a dense mask.
        prompts = (k.split(counts), v.split(counts))
        completions = (q_own.split(rows), k_own.split(rows), v_own.split(rows))
        for (_, length), k, v, q, k_own, v_own in zip(runs, *prompts, *completions):
            k = torch.cat((k[:, :, :length].repeat_interleave(G, 0), k_own), dim=2)
            v = torch.cat((v[:, :, :length].repeat_interleave(G, 0), v_own), dim=2)
            seen = causal_lower_right(C, length + C)
            out.append(
                F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
            )  # [count*G, H, C, E]
        return torch.cat([z.transpose(1, 2).flatten(0, 1) for z in out])

    return attend


class VisionTower(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.E = c.embed_dim // c.num_heads
        patch = (PAIR, PATCH, PATCH)
        merged = c.embed_dim * MERGE**2
        embed = nn.Conv3d(3, c.embed_dim, patch, stride=patch, bias=False)
        self.patch_embed = modules(proj=embed)
        self.blocks = nn.ModuleList(VisionBlock(c) for _ in range(c.depth))
        mlp = nn.Sequential(nn.Linear(merged, merged), nn.GELU(), nn.Linear(merged, c.hidden_size))
        self.merger = modules(ln_q=nn.LayerNorm(c.embed_dim, eps=1e-6), mlp=mlp)

    def forward(self, patches, grids, run):
        """patches [N, 1176], N the sum of t*h*w over the grids -> features [N/4, D];
        run(layer, ...) as Qwen2VL.run."""
        x = F.linear(patches, self.patch_embed.proj.weight.flatten(1))  # the stride is the kernel
        cos, sin = self.rotary(grids, x.device)

        # Each temporal slice attends to itself alone; slices of one size go together.
        slices = run_lengths(chain(*([h * w] * t for t, h, w in grids)))
        for block in self.blocks:
            x = run(block, x, cos, sin, slices)
        return self.merger.mlp(self.merger.ln_q(x).view(len(x) // MERGE**2, -1))

    def rotary(self, grids, device):
        """-> cos and sin [N, E], half of the frequencies for a patch's row, half for its column;
        patches come in 2x2 blocks."""
        m = MERGE
        places = []
        for t, h, w in grids:
            order = torch.arange(h * w).view(h // m, m, w // m, m).transpose(1, 2).flatten()
            places.append(torch.stack((order // w, order % w), dim=1).repeat(t, 1))  # [t*h*w, 2]

        half = self.E // 2
        inv_freq = 10000.0 ** (-torch.arange(0, half, 2) / half)
        angles = (torch.cat(places)[..., None] * inv_freq).flatten(1).repeat(1, 2)  # [N, E]
        return angles.cos().to(device), angles.sin().to(device)


class VisionBlock(nn.Module):
    def __init__(self, c):
        super().__init__()
        D = c.embed_dim
        hidden = int(D * c.mlp_ratio)
        self.heads = c.num_heads
        self.norm1 = nn.LayerNorm(D, eps=1e-6)
        self.norm2 = nn.LayerNorm(D, eps=1e-6)
        self.attn = modules(qkv=nn.Linear(D, 3 * D), proj=nn.Linear(D, D))
        self.mlp = modules(fc1=nn.Linear(D, hidden), fc2=nn.Linear(hidden, D))

    def forward(self, x, cos, sin, slices):
        """x [N, D]; slices: (count, size) of runs of temporal slices."""
        qkv = self.attn.qkv(self.norm1(x)).unflatten(1, (3, self.heads, -1))
        q, k, v = qkv.unbind(1)  # [N, H, E] each
        q, k = (rotate(z.float(), cos, sin).to(v.dtype) for z in (q, k))

        out = []
        rows = [count * size for count, size in slices]
        for shape, *qkv in zip(slices, q.split(rows), k.split(rows), v.split(rows)):
            qkv = [z.unflatten(0, shape).transpose(1, 2) for z in qkv]  # [count, H, size, E]
            out.append(F.scaled_dot_product_attention(*qkv).transpose(1, 2).flatten(0, 1))
        x = x + self.attn.proj(torch.cat(out).flatten(1))

        h = self.mlp.fc1(self.norm2(x))
        return x + self.mlp.fc2(h * torch.sigmoid(1.702 * h))  # quick_gelu


def modules(**named):
    """{name: module} -> one module with these attributes."""
    return nn.ModuleDict(named)


def rotate(x, cos, sin):
    """Rotary embedding of x [N, heads, E] by cos and sin [N, E]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]


def mrope_positions(ids, grids, config):
    """ids (P numbers, a placeholder per merged patch), grids -> M-RoPE positions [3, P].

    A text token's t = h = w is the maximum before it plus 1, as the weights were trained
    (transformers leaves t out); a vision block starts there with its (t, h, w)."""
    placeholders = (config.image_token_id, config.video_token_id)
    grids = iter(grids)
    blocks = []
    start = 0
    for left, vision in run_lengths(i in placeholders for i in ids):
        while left > 0:  # two videos may follow each other without a token between them
            block = torch.arange(left).expand(3, -1)
            if vision:
                t, h, w = next(grids)
                block = torch.cartesian_prod(*map(torch.arange, (t, h // MERGE, w // MERGE))).T
            blocks.append(start + block)
            start = int(blocks[-1].max()) + 1
            left -= block.shape[1]
    return torch.cat(blocks, dim=1)


def run_lengths(values):
    """-> [(count, value)] of equal neighbours."""
    return [(len(list(same)), value) for value, same in groupby(values)]


class Prompts(types.SimpleNamespace):
    """B prompts less their last tokens, which open the completions, padded on the right to P.

    ids [B, P], positions [3, B, P] (M-RoPE's t, h, w), last and last_position [B], lengths [B] (of
    the whole prompts), runs: (count, P) of neighbours of equal length, patches [N, 1176] of all
    videos and images, grids: their (t, h, w)."""

    @classmethod
    def collate(cls, samples, device, dtype):
        """Samples with ids [P+1] (the last is a word's), positions [3, P+1], patches [N, 1176]
        uint8 and grids -> one batch."""
        tokens = [torch.cat((s["ids"][None], s["positions"])).T for s in samples]  # id, t, h, w
        padded = nn.utils.rnn.pad_sequence([z[:-1] for z in tokens], batch_first=True)
        ids, *positions = padded.to(device).unbind(-1)  # [B, P] each
        last, last_position = torch.stack([z[-1, :2] for z in tokens]).to(device).T

        mean = torch.tensor([[0.48145466], [0.4578275], [0.40821073]], device=device)
        std = torch.tensor([[0.26862954], [0.26130258], [0.27577711]], device=device)
        # All ranks gather the vision tower's shards: a batch of text alone sends it a blank, which
        # no placeholder takes.
        grids = list(chain(*(s["grids"] for s in samples))) or [(1, MERGE, MERGE)]
        blank = torch.zeros(MERGE**2, 3 * PAIR * PATCH**2)
        patches = torch.cat([s["patches"] for s in samples if s["grids"]] or [blank]).to(device)
        patches = patches.unflatten(1, (3, -1)) / 255  # [N, channel, 2 frames * 14 * 14]
        patches = ((patches - mean) / std).flatten(1).to(dtype)

        return cls(
            ids=ids,
            positions=torch.stack(positions),
            last=last,
            last_position=last_position,
            lengths=torch.tensor([len(z) for z in tokens], device=device),
            runs=run_lengths(len(z) - 1 for z in tokens),
            patches=patches,
            grids=grids,
        )


def load_model(folder, device, dtype, wrap=lambda model: model):
    """A folder of the hub's shape, one file or shards -> Qwen2VL. A missing, extra or misshapen
    tensor ends the program, by name.

    `wrap` may shard the empty model; each rank then reads its own slices of every tensor."""
    reader = dcp.HuggingFaceStorageReader(str(folder))
    try:
        config = AutoConfig.from_pretrained(folder)
        found = reader.read_metadata().state_dict_metadata
        must(
            config.model_type == "qwen2_vl",
            f"model_type {config.model_type!r} in config.json, must be 'qwen2_vl'",
        )
        must(found, "it holds no model.safetensors, nor shards of it")
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        fail(f"--model {folder}: no readable checkpoint: {str(error).splitlines()[0]}")

    with torch.device("meta"):
        model = wrap(Qwen2VL(config).to(dtype))
    model.to_empty(device=device)
    state = model.state_dict()

    problems = []
    for name in sorted({*found, *state}):
        shape = list(found[name].size) if name in found else "missing"
        wanted = list(state[name].shape) if name in state else "absent"
        if shape != wanted:
            problems.append(f"--model {folder}: tensor {name} is {shape}, must be {wanted}")
    if problems:
        fail(*problems)
    dcp.load(state, storage_reader=reader)
    return model


# === end shared: qwen2_vl ===

# === shared: video_prompt — identical in grpo_video.py, sft_video.py, eval_video.py ===
INSTRUCTION = (
    " Output the thinking process in <think> </think> and final answer in <answer> </answer> tags, "
    "i.e., <think> reasoning process here </think><answer> answer here </answer>. "
)


def load_records(path, root, parse=None, lines=None, fail=fail):
    """Annotations, one JSON object a line -> records. All bad ones are reported, by file:line and
    sample_id; exit code 2."""
    records = []
    problems = []
    seen = {}  # sample_id -> its line
    for number, line in enumerate(lines or read_lines(path), 1):
        if not line.strip():
            continue
        name = "?"
        try:
            raw = json.loads(line.decode(), parse_constant=lambda name: None)  # NaN is no value
            name = raw.get("sample_id", raw.get("id")) if isinstance(raw, dict) else None
            must(
                isinstance(name, (int, str)),
                "must be an object with a sample_id, an integer or a string",
            )
            must(
                not re.search(rb"<\|\w+\|>", json.dumps(raw, ensure_ascii=False).encode()),
                "holds a special token, which only the chat template may write",
            )
            first = seen.setdefault(str(name), number)
            # A question may have several chains of thought.
            must(first == number or "prompt" in raw, f"its sample_id is line {first}'s already")
            records.append((parse or parse_record)(raw, root))
        except (ValueError, OSError, RecursionError) as error:  # bad UTF-8, bad JSON among them
            problems.append(f"{path}:{number}: sample_id {name!s:.60}: {error}")

    if problems or not records:
        fail(*problems or [f"{path}: holds no records"])
    return records


def read_lines(path):
    """-> a file's lines, less a byte-order mark."""
    text = path.read_bytes() if path.is_file() else b""
    if not path.is_file() or text.startswith(b"version https://git-lfs"):
        fail(
            f"{path}: no such annotation file, or a Git LFS pointer in its place (`git lfs pull` "
            "fetches it); for --data_root, `hf download TencentARC/SEED-Bench-R1 --repo-type "
            "dataset --local-dir DIR`; for --model, `hf download Qwen/Qwen2-VL-7B-Instruct "
            "--local-dir DIR`; `grpo_video.py --toy` needs neither"
        )
    return text.removeprefix(b"\xef\xbb\xbf").split(b"\n")


def parse_record(raw, root):
    """A benchmark row -> record: sample_id, domain, media [(kind, Path)], question, and choices
    with the gold letter or, where golden_choice_idx is absent, the answer and the negatives to
    draw from. ValueError says what is wrong."""
    record = dict(sample_id=raw["sample_id"], domain=str(raw.get("domain") or "all"))
    record["question"] = text_field(raw, "question")

    gold = raw.get("golden_choice_idx")
    if gold is not None:
        choices = [text_field(raw, f"choice_{letter}") for letter in "abcd"]
        record |= dict(choices=choices, gold=gold)
        must(gold in list("ABCD"), f"golden_choice_idx {gold!r:.60} must be A, B, C or D")
    else:
        answer = text_field(raw, "answer")
        given = raw.get("negative_answers")
        negatives = []
        if isinstance(given, list) and all(isinstance(n, str) and n.strip() for n in given):
            negatives = [n for n in dict.fromkeys(given) if n != answer]
        record |= dict(answer=answer, negatives=negatives)
        must(
            len(negatives) >= 3,
            "without golden_choice_idx, negative_answers must be at least 3 different strings "
            "beside the answer",
        )

    source = text_field(raw, "video_source")
    progress = raw.get("task_progress_metadata")
    must(
        isinstance(progress, list),
        "field 'task_progress_metadata' must be a list (an empty one means: no video)",
    )
    media = [("image", f"images/{source}/{text_field(raw, 'current_observation_basename')}")]
    if progress:
        media.insert(0, ("video", f"videos/{source}/{text_field(raw, 'video_basename')}"))
    return record | dict(media=[(kind, inside(root, path)) for kind, path in media])


def text_field(raw, key):
    value = raw.get(key)
    must(
        isinstance(value, str) and value.strip(),
        f"field {key!r} must be a non-empty string, is {value!r:.60}",
    )
    return value


def must(holds, message):
    if not holds:
        raise ValueError(message)


def inside(root, path):
    """A path relative to the data root -> Path, which may lead over links, but not upwards."""
    parts = Path(path).parts
    must(".." not in parts and "/" not in parts, f"{path!r} leaves the data root {root}")
    return root / path


def with_media(records, skip_missing):
    """-> (records whose media are there, rows of missing.jsonl: the others, which skip_missing
    leaves out). Without it, or if nothing is left, the program ends with exit code 2."""
    there = []
    missing = []
    for record in records:
        lost = [str(path) for _, path in record["media"] if not os.path.isfile(path)]
        if lost:
            missing.append(dict(sample_id=record["sample_id"], file=lost[0]))
        else:
            there.append(record)

    folders = collections.Counter(os.path.dirname(row["file"]) for row in missing)
    problems = [
        f"{folder}: {count} files are missing, {nearby(folder)} is there; --skip_missing leaves "
        "their records out"
        for folder, count in folders.items()
    ]
    if missing and not (skip_missing and there):
        fail(*problems, *(f"missing: {row}" for row in missing))
    if missing and RANK == 0:
        print(f"{len(missing)} records are left out: missing.jsonl names the files that they lack")
    return there, missing


def nearby(folder):
    """What may hold a folder's missing files: an archive, or a folder of its own."""
    patterns = (f"{folder}/*.tar*", f"{folder}/*.zip", f"{folder}.*", f"{folder}/*/*")
    return next(chain(*map(glob, patterns)), "no archive of them")


def load_batches(dataset, batches, workers):
    """Lists of positions -> lists of samples, whose media `workers` processes decode ahead."""
    ahead = collections.deque()
    for batch in batches:
        ahead.append([dataset.begin(position) for position in batch])
        if len(ahead) > 2 * workers:
            yield [finish() for finish in ahead.popleft()]
    while ahead:
        yield [finish() for finish in ahead.popleft()]
    dataset.pool.stop()
    dataset.pool.join()


class VideoDataset:
    """Positions in the stream of epochs -> samples; epoch e is a permutation by (seed, e), or the
    records' own order.

    A sample whose media cannot be read becomes {sample_id, error}: it is reported, and no other
    takes its place (trap 13)."""

    def __init__(self, records, tokenizer, config, c, shuffle=True):
        self.records = records
        self.tokenizer = tokenizer
        self.config = config
        self.c = c
        self.shuffle = shuffle
        unit = PATCH * MERGE
        self.size = max(1, round(c.frame_size / unit)) * unit  # 252 for 256: a multiple of 28
        self.pool = decoding_pool(c.dataloader_num_workers)

    def begin(self, position):
        """Sends a sample's media to be decoded -> a function that waits for them and returns it."""
        c = self.c
        epoch, place = divmod(position, len(self.records))
        if self.shuffle:
            place = permutation(len(self.records), c.seed, epoch)[place]
        record = self.records[place]
        args = (record["media"], self.size, c.fps, c.max_frames, c.video_reader)
        decoding = self.pool.schedule(decode, args, timeout=c.decode_timeout)
        return partial(self.finish, record, epoch, decoding)

    def finish(self, record, epoch, decoding):
        """-> the sample: the record with its choices and gold letter of this epoch, and text, ids,
        positions, patches, grids; or error."""
        choices, gold = choose(record, self.c.seed, epoch)
        sample = record | dict(choices=choices, gold=gold)

        try:
            media, problem = decoding.result()
        except TimeoutError:
            problem = f"decoding took over {self.c.decode_timeout} s"
        except ProcessExpired as error:
            problem = f"decoder died with exit code {error.exitcode}"
        if problem:
            paths = ", ".join(str(path) for _, path in record["media"])
            return sample | dict(error=f"{paths}: {problem}")

        grids = [grid for _, grid in media]
        none = np.empty((0, 3 * PAIR * PATCH**2), np.uint8)
        patches = np.concatenate([none, *(patches for patches, _ in media)])
        text, ids = self.encode(record, choices, grids)
        return sample | dict(
            text=text,
            ids=torch.tensor(ids),
            positions=mrope_positions(ids, grids, self.config),
            patches=torch.from_numpy(patches),
            grids=grids,
        )

    def encode(self, record, choices, grids):
        """-> (prompt text, ids with as many placeholders as each grid has merged patches);
        ValueError if the template wrote another number of them."""
        messages = record.get("messages") or build_messages(record, choices)
        text = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )

        left = list(grids)
        ids = []
        for token in self.tokenizer(text, add_special_tokens=False).input_ids:
            count = 1
            if token in (self.config.image_token_id, self.config.video_token_id):
                must(left, f"its prompt has more placeholders than its {len(grids)} media")
                count = math.prod(left.pop(0)) // MERGE**2
            ids += [token] * count
        must(not left, f"its prompt has fewer placeholders than its {len(grids)} media")
        return text, ids

    def check_lengths(self, limit):
        """-> {sample_id: tokens of its prompt and response at most}, its video at max_frames. Over
        `limit` is an error: none is cut (trap 5)."""
        side = self.size // PATCH
        t = dict(video=self.c.max_frames // PAIR, image=1)
        problems = []
        lengths = {}
        for record in self.records:
            negatives = sorted(record.get("negatives", []), key=len)
            drawn = [record.get("answer"), *negatives[-3:]]  # the longest that can be
            grids = [(t[kind], side, side) for kind, _ in record["media"]]
            response = self.tokenizer(record.get("response", ""), add_special_tokens=False)
            try:
                _, ids = self.encode(record, record.get("choices") or drawn, grids)
                length = lengths[record["sample_id"]] = len(ids) + len(response.input_ids)
                must(length <= limit, f"up to {length} tokens, over the limit of {limit}")
            except ValueError as error:
                problems.append(f"sample_id {record['sample_id']}: {error}")

        if problems:
            fail(*problems)
        return lengths


@cache
def permutation(count, seed, epoch):
    return random.Random(repr((seed, epoch))).sample(range(count), count)


def choose(record, seed, epoch):
    """-> (choices, gold letter); ([], None) for a chat row. What is drawn depends on (seed, epoch,
    sample_id) alone (trap 10)."""
    if "negatives" not in record:
        return record.get("choices", []), record.get("gold")

    rng = random.Random(repr((seed, epoch, record["sample_id"])))
    negatives = rng.sample(record["negatives"], 3)
    choices = rng.sample([record["answer"], *negatives], 4)
    return choices, "ABCD"[choices.index(record["answer"])]


def build_messages(record, choices):
    """The benchmark's one user turn: video if there is progress, image, then question, choices and
    instruction."""
    options = "".join(f"{letter}. {choice}\n" for letter, choice in zip("ABCDE", choices))
    content = [dict(type=kind) for kind, _ in record["media"]]
    content.append(dict(type="text", text=f"{record['question']}\n{options}{INSTRUCTION}"))
    return [dict(role="user", content=content)]


def decoding_pool(workers):
    """Processes that decode a sample at a time, each within a time limit: a decoder can crash, or
    hang for ever holding the GIL (trap 14). A new process takes the place of one that is ended."""
    CONSTS.term_timeout = 0  # who hangs would not hear a request to leave
    fork = multiprocessing.get_context("fork")
    return ProcessPool(max(1, workers), initializer=start_decoding, context=fork)


def start_decoding():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it is for the loop, which ends its step first
    torch.set_num_threads(1)  # the parent's thread pool was not forked


def decode(media, *how):
    """A record's [(kind, path)], to be read as `how` says -> ([(patches, grid)], None), or (None,
    what went wrong)."""
    found = []
    try:
        for kind, path in media:
            patches, grid = to_patches(read_media(kind, path, *how))
            found.append((patches.numpy(), grid))
    except Exception as error:  # whatever a decoder raises is this sample's failure
        return None, f"{type(error).__name__}: {error}".splitlines()[0]
    return found, None


def read_media(kind, path, size, fps, max_frames, video_reader="pyav"):
    """-> uint8 frames [T, size, size, 3]; an image is its frame twice. Raises ValueError, and what
    PyAV, decord and Pillow raise."""
    if kind == "image":
        image = read_image(path).resize((size, size), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(image)).expand(2, -1, -1, -1)

    if video_reader == "decord":  # the released run's; it has no build for aarch64
        import decord

        reader = decord.VideoReader(str(path), num_threads=1)
        indices = frame_indices(len(reader), reader.get_avg_fps(), fps, max_frames)
        frames = reader.get_batch(indices).asnumpy()
    else:
        frames = read_video(path, fps, max_frames)

    frames = torch.from_numpy(frames).permute(0, 3, 1, 2)
    resize = partial(F.interpolate, size=(size, size), mode="bicubic", antialias=True)
    # One by one: less memory.
    resized = [resize(frame.float()).round().clamp(0, 255).byte() for frame in frames.split(1)]
    return torch.cat(resized).permute(0, 2, 3, 1)


def read_image(path):
    """-> an RGB image, turned as its EXIF says, on white where it is transparent."""
    Image.open(path).verify()  # by its checksums: what is damaged would be black
    image = ImageOps.exif_transpose(Image.open(path))
    if image.mode == "I;16":  # convert() would clip its grey at 255
        image = Image.fromarray((np.array(image) >> 8).astype(np.uint8))

    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def read_video(path, fps, max_frames):
    """-> the sampled frames, uint8 [T, height, width, 3], each by its place in the order of display
    and turned as the file says (trap 22)."""
    times, keys, rate, length = timeline(path)
    indices = frame_indices(len(times), rate, fps, max_frames)

    # A long video, with key frames between those that are wanted, is sought; any other is counted,
    # and so is one whose frames come at other times than its packets promise.
    frames = [None]
    if len(times) > 1000 and keys > max_frames:
        frames = [seek_frame(path, times, index) for index in indices]
    if None in frames:
        shown = count_frames(path, indices)
        must(shown, "no frame of it decodes")
        if len(shown) != len(times):
            indices = frame_indices(len(shown), rate, fps, max_frames)
            shown = count_frames(path, indices)
        frames = [shown[index] for index in indices]

    last = frames[-1]
    shown_for = max(1 / rate, (last.duration or 0) * last.time_base)
    seconds = float((last.time or 0) - (frames[0].time or 0) + shown_for)
    must(1.1 * seconds >= length, f"cut off: {seconds:.1f} of about {length:.1f} s decode")
    turned = [np.rot90(f.to_ndarray(format="rgb24"), f.rotation // 90) for f in frames]
    must(len({frame.shape for frame in turned}) == 1, "its frames change their size")
    return np.stack(turned)


def timeline(path):
    """What a video's packets promise: its frames' times in the order of display, how many of them
    are key frames, frames a second; and the seconds that the file promises."""
    times = []
    keys = 0
    with av.open(str(path)) as container:
        stream = container.streams.best("video")
        must(stream, "holds no video")
        for packet in container.demux(stream):
            if packet.size and not packet.is_discard:  # an edit list discards what is not shown
                times.append(packet.pts or 0)
                keys += packet.is_keyframe

        length = (container.duration or 0) / av.time_base
        if stream.duration:
            length = float(stream.duration * stream.time_base)
        rate = stream.average_rate or stream.guessed_rate
    must(times and rate, "holds no frames, or not how many a second")
    return sorted(times), keys, float(rate), length


def seek_frame(path, times, index):
    """-> a frame, decoded from the key frame before it; None if the times on the way there are not
    the promised ones."""
    way = []
    frame = None
    # In an open group of pictures up to 16 frames are shown before the key frame that they follow.
    for frame in decoded(path, times[max(0, index - 16)]):
        way.append(frame.pts)
        if frame.pts is None or frame.pts >= times[index]:
            break
    return frame if way == times[index + 1 - len(way) : index + 1] else None


def count_frames(path, indices):
    """-> all frames that are shown, in their order; those at no place of `indices` as None."""
    return [frame if place in indices else None for place, frame in enumerate(decoded(path))]


def decoded(path, start=None):
    """Yields a video's frames in the order of display, from the key frame before the time `start`,
    up to where the file is damaged."""
    with av.open(str(path)) as container, suppress(av.InvalidDataError):
        stream = container.streams.best("video")
        stream.codec_context.thread_count = 1
        if start is not None:
            container.seek(start, stream=stream)
        yield from container.decode(stream)


def frame_indices(total, video_fps, fps, max_frames):
    """-> frames to decode: fps x duration, clamped to [4, max_frames], floored to even, evenly
    spread; a short video repeats some."""
    count = int(min(max(total / video_fps * fps, 4), max_frames)) // 2 * 2
    return np.linspace(0, total - 1, count).round().astype(int)


def to_patches(frames):
    """uint8 frames [T, height, width, 3] -> (patches [t*h*w, 1176] uint8, grid (t, h, w)); rows are
    ordered (t, h/2, w/2, 2, 2), columns (channel, 2 frames, 14, 14)."""
    t = len(frames) // PAIR
    h = frames.shape[1] // PATCH
    w = frames.shape[2] // PATCH
    blocks = (t, PAIR, h // MERGE, MERGE, PATCH, w // MERGE, MERGE, PATCH, 3)
    patches = frames.reshape(blocks).permute(0, 2, 5, 3, 6, 8, 1, 4, 7)
    return patches.reshape(t * h * w, 3 * PAIR * PATCH**2), (t, h, w)


# === end shared: video_prompt ===


# === shared: start_up — identical in grpo_video.py, sft_video.py, eval_video.py ===
def parse_config(config_class, toy_presets, argv=None):
    """argv -> config_class; --toy makes its presets the defaults. An unknown flag or an impossible
    value ends the program."""
    source = "".join(map(inspect.getsource, config_class.__mro__[:-1]))
    comments = dict(re.findall(r"^    (\w+): .+  # (.+)$", source, re.M))
    for f in fields(config_class):
        f.metadata = dict(help=comments[f.name])

    parser = HfArgumentParser(
        config_class,
        allow_abbrev=False,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.error = fail
    if "--toy" in (argv or sys.argv):
        parser.set_defaults(**toy_presets)
    known, unknown = parser.parse_known_args(argv)
    if unknown:
        close = difflib.get_close_matches(unknown[0], comments) or ["help"]
        fail(f"no such flag: {' '.join(unknown)}; did you mean --{' or --'.join(close)}?")
    config = config_class(**vars(known))

    problems = []
    holds = {"above": operator.gt, "at least": operator.ge, "at most": operator.le}
    for name, comment in comments.items():
        value = getattr(config, name)
        if value == getattr(config_class, name, None):
            continue  # a default need not hold them
        for word, limit in re.findall(r"(above|at least|at most) (-?\d+)", comment):
            if not (holds[word](value, int(limit)) and value < math.inf):
                problems.append(f"--{name} {value}: must be a number {word} {limit}")
    if problems:
        fail(*problems)
    return config


def set_up(toy):
    """-> this rank's device and the type to compute in. Makes the process group; with --toy, rank 0
    builds a missing toy."""
    device = torch.device("cpu")
    dtype = torch.float32
    backend = "gloo"
    if torch.cuda.is_available():
        device = torch.device("cuda", LOCAL_RANK)
        dtype = torch.bfloat16
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
        torch.backends.cuda.enable_cudnn_sdp(False)  # it would plan anew for every length

    store = dist.HashStore() if WORLD == 1 else next(dist.rendezvous("env://"))[0]
    # After a restart torchrun's store still holds the dead ranks' addresses: each try has its own.
    store = dist.PrefixStore(str(RESTARTS), store)
    dist.init_process_group(backend, rank=RANK, world_size=WORLD, store=store)

    if toy:
        torch.set_num_threads(1)  # its matrices are too small to share
        maker = HERE / "toy/make_toy.py"
        missing = RANK == 0 and not (HERE / "toy/model").exists()
        if missing and subprocess.call([sys.executable, maker]):
            fail(
                f"--toy: {maker}, which stands beside this script in its repository, did not build "
                "the toy"
            )
    barrier()
    return device, dtype


def lock(folder):
    """Makes the folder, and takes it for this run until its process ends, however it does."""
    problem = [None]
    if RANK == 0:
        try:
            os.makedirs(folder, exist_ok=True)
            lock.file = open(folder / ".lock", "a")
            fcntl.lockf(lock.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            problem = ["another run is writing there"]
        except OSError as error:
            if error.filename:  # without a name it is a file system that has no locks
                problem = [f"{error}"]

    dist.broadcast_object_list(problem)
    if problem[0]:
        fail(f"--output_dir {folder}: {problem[0]}")


def barrier():
    if WORLD > 1:
        dist.barrier()


def find_model(name):
    """A folder, or a hub id, whose checkpoint is fetched into the hub's cache (it locks: ranks may
    ask at once) -> the folder."""
    try:
        if not Path(name).is_dir():
            family = AutoConfig.from_pretrained(name).model_type  # asked before 16 GB are fetched
            must(family == "qwen2_vl", f"model_type {family!r} in config.json, must be 'qwen2_vl'")
            name = snapshot_download(name, ignore_patterns=["*.bin"])
    except (OSError, ValueError) as error:
        fail(
            f"--model {name}: no such folder, and nothing from the hub "
            f"({str(error).splitlines()[0]}); `hf download Qwen/Qwen2-VL-7B-Instruct --local-dir "
            "DIR` fetches the paper's model; `grpo_video.py --toy` needs no download"
        )

    for file in ("config.json", "tokenizer_config.json"):
        if not Path(name, file).is_file():
            fail(f"--model {name}: holds no {file}, as a Qwen2-VL checkpoint does")
    return Path(name)


def load_tokenizer(folder):
    """A model folder's tokenizer; its chat template may stand in a file of its own."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    template = folder / "chat_template.json"
    if not tokenizer.chat_template and template.is_file():
        tokenizer.chat_template = json.loads(template.read_text())["chat_template"]
    return tokenizer


# === end shared: start_up ===

if __name__ == "__main__":
    main()
