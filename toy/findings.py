"""The paper's findings, seen in miniature: what becomes of a loose chain of thought.

    python toy/findings.py                                    # one seed: minutes on two cores
    python toy/findings.py --seeds 42 43 44 --all --write     # the numbers of docs/findings.md

The toy's base model sees nothing, and half of its thoughts are unrelated to its letter. Models are
trained from it, evaluated and analysed by the scripts' own commands, which are printed. The table:

    accuracy             share of right letters
    word_matches_letter  share of responses whose thought is the letter's move ("it moves up", C)
    chain right          share of responses whose thought is what the video shows
    visual attention     tools/analyze.py's: share of attention that goes to the pictures' tokens
    visual reliance      tools/analyze.py's, in nats, at the thought's word and at the letter: is it
                         the video that decides there? 0: no

Answers are greedy, 120 a tier, but for the base model: it is sampled, as its likeliest letter is
the same for all videos. With --all the table goes on with a tenth of the records, and with wrong
gold letters. --write puts it into docs/findings.md, and its picture into docs/findings.svg.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from toy.make_toy import CHOICES, sft_row  # noqa: E402

DIRECTIONS = dict(zip("ABCD", (move.split()[1] for move in CHOICES)))
TIERS = ("L1", "L2", "L3")

MODELS = {  # run: its name, and the command that trains it
    "base": ("base model", ""),
    "sft": ("+ SFT", "sft_video.py --toy"),
    "grpo": ("+ GRPO", "grpo_video.py --toy"),
    "care": (
        "+ GRPO with the consistency reward",
        "grpo_video.py --toy --beta 0 --consistency_weight 0.5",
    ),
}
FEW = 24  # records, of 240
NOISE = (20, 40)  # % of the gold letters that are wrong
for name in ("sft", "grpo"):
    title, command = MODELS[name]
    MODELS[f"{name}-few"] = (
        f"{title}, {FEW} records",
        f"{command} --annotations {{folder}}/{name}-few.jsonl",
    )
    for share in NOISE:
        MODELS[f"{name}-noise-{share}"] = (
            f"{title}, {share} % wrong letters",
            f"{command} --annotations {{folder}}/{name}-noise-{share}.jsonl",
        )
MAIN = ("base", "sft", "grpo", "care")

HEADS = (
    *(f"accuracy {tier}" for tier in TIERS),
    *(f"word_matches_letter {tier}" for tier in TIERS),
    "chain right L1",
    "visual attention L1",
    "visual reliance L1: word",
    "letter",
)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[42], help="of the runs")
    parser.add_argument("--all", action="store_true", help="few records and wrong letters, too")
    parser.add_argument("--write", action="store_true", help="to docs/findings.md and .svg")
    parser.add_argument("--output_dir", default="runs/findings", help="for runs and evaluations")
    args = parser.parse_args()

    start = time.perf_counter()
    folder = ROOT / args.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    if not (ROOT / "toy/model").exists():
        run("toy/make_toy.py")
    write_annotations(folder)

    # Two at a time: a process has one thread.
    names = list(MODELS) if args.all else MAIN
    jobs = [(name, seed) for seed in args.seeds for name in names]
    with ThreadPoolExecutor(2) as pool:
        measured = list(pool.map(lambda job: measure(folder, *job), jobs))
    found = {name: [] for name in names}
    for (name, _), values in zip(jobs, measured):
        found[name].append(values)

    lines = table(found)
    print(*lines, f"\n{time.perf_counter() - start:.0f} s", sep="\n")
    if args.write:
        page = ROOT / "docs/findings.md"
        page.write_text(with_table(page.read_text(), lines))
        (ROOT / "docs/findings.svg").write_text(picture(found))


# ---- The runs ------------------------------------------------------------------------------------
def run(command):
    """A command of the repository, printed and run to its end."""
    print(f"python {command}", flush=True)
    done = subprocess.run(
        [sys.executable, *shlex.split(command)],
        cwd=ROOT,
        env=os.environ | dict(OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        sys.exit(f"python {command}\n{done.stderr[-3000:]}")


def measure(folder, name, seed):
    """Trains a model, evaluates and analyses it -> what table's columns say of it."""
    model = folder / f"{name}-{seed}"
    evaluation = folder / f"eval-{name}-{seed}"
    for earlier in (model, evaluation):  # an evaluation's folder is one model's
        if earlier.exists():
            shutil.rmtree(earlier)

    _, command = MODELS[name]
    if command:
        command = command.format(folder=quoted(folder))
        run(f"{command} --seed {seed} --output_dir {quoted(model)}")
    else:
        model = ROOT / "toy/model"

    sampled = "" if command else " --do_sample"
    places = f"--toy --model {quoted(model)} --output_dir {quoted(evaluation)}"
    run(f"eval_video.py {places} --seed {seed}{sampled}")
    run(f"tools/analyze.py {places} --splits validation_L1")
    return read_measures(evaluation)


def quoted(path):
    """A path, from the repository if it lies there, as a word of a command."""
    if path.is_relative_to(ROOT):
        path = path.relative_to(ROOT)
    return shlex.quote(str(path))


def write_annotations(folder):
    """Files for --annotations, of SFT and of GRPO: the first records, and wrong gold letters."""
    lines = (ROOT / "toy/data/annotations/training_6k.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]

    def write(name, records):
        chats = []
        for record in records:
            choice = "ABCD".index(record["golden_choice_idx"])
            chats.append(sft_row(record, choice, choice, record["sample_id"]))
        for kind, rows in (("grpo", records), ("sft", chats)):
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / f"{kind}-{name}.jsonl").write_text(text)

    write("few", records[:FEW])
    for share in NOISE:
        rng = np.random.default_rng(share)
        wrong = rng.permutation(len(records))[: len(records) * share // 100]
        noisy = [dict(record) for record in records]
        for place in wrong:
            others = sorted({*"ABCD"} - {noisy[place]["golden_choice_idx"]})
            noisy[place]["golden_choice_idx"] = str(rng.choice(others))
        write(f"noise-{share}", noisy)


# ---- What is measured ----------------------------------------------------------------------------
def read_measures(evaluation):
    """An evaluation's folder, analysed -> {column of the table: share or nats}."""
    found = {}
    for tier in TIERS:
        rows = read_rows(evaluation / f"predictions_validation_{tier}.jsonl")
        words = [thought(row["response"]) for row in rows]
        found[f"accuracy {tier}"] = mean(row["correct"] for row in rows)
        found[f"word_matches_letter {tier}"] = mean(
            word_matches_letter(word, row["predicted"]) for word, row in zip(words, rows)
        )
        found[f"chain right {tier}"] = mean(
            word_matches_letter(word, row["gold"]) for word, row in zip(words, rows)
        )

    looked = read_rows(evaluation / "analysis_validation_L1.jsonl")
    found["visual attention L1"] = mean(x["attention"]["overall"] for x in looked)
    looked = [x["visual_reliance"] for x in looked]
    found["visual reliance L1: word"] = mean(map(reliance_at_the_word, looked))
    found["letter"] = mean(x["letter"] for x in looked)
    return found


def thought(response):
    """The direction that a response's thinking names first, or None."""
    form = rf"\b({'|'.join(DIRECTIONS.values())})\b"
    found = re.search(form, response.partition("</think>")[0])
    return found[1] if found else None


def word_matches_letter(word, letter):
    """Is there a direction, and is it the letter's move?"""
    return word is not None and word == DIRECTIONS.get(letter)


def reliance_at_the_word(reliance):
    """A row's visual_reliance -> its nats at the thinking's first direction, or None."""
    for token, nats in zip(reliance["tokens"], reliance["nats"]):
        if "</think>" in token:
            return None
        if token.strip() in DIRECTIONS.values():
            return nats
    return None


def mean(values):
    """Of those that are there."""
    return statistics.fmean(value for value in values if value is not None)


def read_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- The table and the picture -------------------------------------------------------------------
def table(found):
    """{run: its measures, a dict a seed} -> lines of Markdown; %, nats; over seeds the mean, and
    the range in brackets."""
    lines = ["| model | " + " | ".join(HEADS) + " |", "|---" * (1 + len(HEADS)) + "|"]
    for name, measures in found.items():
        cells = [MODELS[name][0]]
        for head in HEADS:
            values = [x[head] for x in measures]
            form = "{:.1f}" if head in HEADS[-2:] else "{:.0%}"
            shown = [form.format(z).rstrip("%") for z in (mean(values), min(values), max(values))]
            cells.append(f"{shown[0]} ({shown[1]}–{shown[2]})" if len(values) > 1 else shown[0])
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def with_table(text, lines):
    """A page with its table of this head, and that alone, replaced by these lines."""
    head = re.escape(lines[0])
    new, count = re.subn(rf"^{head}\n(\|.*\n)*", "\n".join(lines) + "\n", text, flags=re.M)
    if count != 1:
        sys.exit(f"docs/findings.md has {count} tables with the head {lines[0]}, must have one")
    return new


def picture(found):
    """-> SVG: accuracy against word_matches_letter, both of L1 in %, a point a model of the main
    ones, and an arrow from the base model to each."""
    points = {}
    for name in MAIN:
        x = mean(values["word_matches_letter L1"] for values in found[name])
        y = mean(values["accuracy L1"] for values in found[name])
        points[name] = (70 + 500 * x, 340 - 300 * y)

    lines = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 660 400" font-family="sans-serif" '
        'font-size="13" fill="#808080">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="14" refY="4" markerWidth="8" '
        'markerHeight="8" orient="auto"><path d="M0 0L8 4L0 8z"/></marker></defs>',
        '<path d="M70 340V30M70 340H580" stroke="#808080" fill="none"/>',
        '<text x="10" y="20" font-weight="bold">Accuracy on L1, %</text>',
        '<text x="570" y="385" text-anchor="end" font-weight="bold">'
        "word_matches_letter on L1, %</text>",
    ]
    for percent in (25, 50, 75, 100):
        x = 70 + 5 * percent
        y = 340 - 3 * percent
        lines += [
            f'<text x="60" y="{y + 4}" text-anchor="end">{percent}</text>',
            f'<text x="{x}" y="360" text-anchor="middle">{percent}</text>',
            f'<path d="M70 {y}H580M{x} 340V30" stroke="#808080" opacity="0.2"/>',
        ]

    marks = {  # colour, and where the name stands: right, below, its anchor
        "base": ("#808080", 0, 24, "middle"),
        "sft": ("#2da44e", 12, 5, "start"),
        "grpo": ("#cf222e", 0, -14, "middle"),
        "care": ("#2f81f7", 0, -14, "middle"),
    }
    x0, y0 = points["base"]
    for name, (colour, right, below, anchor) in marks.items():
        x, y = points[name]
        if name != "base":
            lines.append(
                f'<path d="M{x0:.0f} {y0:.0f}L{x:.0f} {y:.0f}" stroke="#808080" '
                'marker-end="url(#tip)"/>'
            )
        lines += [
            f'<circle cx="{x:.0f}" cy="{y:.0f}" r="6" fill="{colour}"/>',
            f'<text x="{x + right:.0f}" y="{y + below:.0f}" text-anchor="{anchor}">'
            f"{MODELS[name][0]}</text>",
        ]
    return "\n".join([*lines, "</svg>"]) + "\n"


if __name__ == "__main__":
    main()
