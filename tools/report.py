"""One self-contained report.html: curves, the table of tiers, every completion.

    python tools/report.py runs/toy-grpo    # writes runs/toy-grpo/report.html
    python tools/report.py runs/grpo runs/sft runs/eval --output all.html --data_root DATA
    python tools/report.py runs/eval-base runs/eval-sft runs/eval-grpo    # side by side

It is about training runs and evaluations. What several evaluations answer to the same question
stands side by side. It reads what the three scripts write (docs/metrics.md)
and recomputes nothing; numbers are cut to 4 digits. The page needs no network. What follows `#` in
its address sets its filters and can be shared: report.html#step=3&answer=wrong&hover=12.
Where a training run's curves show one of six known troubles, a line at the top names it, with its
rule and what to do (VERDICTS).

A model's or a data set's words are never markup: they are JSON with `<`, `>`, `&` and all that is
not ASCII escaped, shown as text nodes, and the page's policy runs the one script written here and
loads nothing.
"""

import argparse
import base64
import contextlib
import hashlib
import io
import itertools
import json
import math
import re
import sys
from pathlib import Path
from types import NoneType

from PIL import Image

CHARTS = {  # title: keys of metrics.jsonl; a key named nowhere gets a chart under "Other metrics"
    "Reward": ["reward"],
    "KL to the reference, nats": ["kl"],
    "Entropy, nats": ["entropy"],
    "Completion length, tokens": ["completion_length"],
    "Zero-variance groups, share": ["frac_reward_zero_std"],
    "Gradient norm": ["grad_norm"],
    "Loss": ["loss"],
    "Held-out loss": ["eval_loss"],
    "Token accuracy": ["token_accuracy"],
    "Truncated, without answer: shares": ["frac_truncated", "frac_no_answer"],
    "Seconds of a step": ["time_data", "time_rollout", "time_ref", "time_update"],
}
SCORES = ("accuracy", "mean_accuracy", "pass_at_k", "accuracy_failed_wrong")  # of summary.json
MAX_PICTURED = 200  # samples of a run or a split whose pictures are embedded, 5 to 40 kB each

# Byte-level BPE, GPT-2's: these bytes are their characters, the others come from 256 on, in order.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = sorted({*range(256)} - {*PRINTABLE})
BYTE = {chr(b): b for b in PRINTABLE} | {chr(256 + i): b for i, b in enumerate(OTHERS)}
CONTINUATION = bytes(range(0x80, 0xC0))  # UTF-8's bytes that begin no character


def fail(problem):
    print(f"report.py: error: {problem}", file=sys.stderr)
    sys.exit(2)


@contextlib.contextmanager
def reading(place):
    """What is not as the scripts write it ends the program with its place."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        problem = f"{place}: {type(error).__name__}: {error}"
        fail(f"{problem}; must be JSON as docs/metrics.md describes it")


def each(path, use):
    """Calls use(object) for each line of a file of JSON objects.

    Half a line at its end, which a kill may leave, is not read.
    """
    with reading(path), open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            with reading(f"{path}:{number}"):
                if line.endswith(b"\n"):
                    use(json.loads(line))


def short(x):
    """A number to 4 significant digits; None for what is not finite, which JSON has not."""
    if x is None or isinstance(x, int):
        return x
    return float(f"{x:.4g}") if math.isfinite(x) else None


def load_tokens(folders):
    """The first tokenizer.json in these folders -> {id: its bytes}; {} where there is none."""
    paths = [folder / "tokenizer.json" for folder in folders]
    path = next(filter(Path.is_file, paths), None)
    if path is None:
        return {}

    tokens = {}
    with reading(path):
        raw = json.loads(path.read_bytes())
        for token, i in raw["model"]["vocab"].items():
            tokens[i] = bytes(BYTE[character] for character in token)
        for token in raw["added_tokens"]:
            tokens[token["id"]] = token["content"].encode()
    return tokens


def pieces(tokens, ids, log_ratio):
    """-> (texts, log-ratios).

    A character whose bytes are spread over tokens goes to the first of them; a token left without a
    character adds its log-ratio to that one's, as their probabilities multiply.
    """
    texts, ratios = [], []
    for i, ratio in zip(ids, log_ratio, strict=True):
        # The embedding has more rows than the tokenizer has tokens.
        token = tokens.get(i, b"[%d]" % i)
        ratio = math.nan if ratio is None else ratio
        begun = token
        if texts:
            begun = token.lstrip(CONTINUATION)
            texts[-1] += token[: len(token) - len(begun)]

        if begun:
            texts.append(begun)
            ratios.append(ratio)
        else:
            ratios[-1] += ratio

    words = [text.decode(errors="replace") for text in texts]
    return words, [short(round(ratio, 3)) for ratio in ratios]


def reliance(row):
    """A row of analysis_<split>.jsonl -> the response's tokens and their visual reliance.

    A token without a character of its own is left out; an older version's row has neither.
    """
    if "visual_reliance" not in row:
        return {}
    found = row["visual_reliance"]
    tokens = [x for x in zip(found["tokens"], found["nats"], strict=True) if x[0]]
    return dict(
        text=[text for text, _ in tokens],
        reliance=[short(round(nats, 3)) for _, nats in tokens],
    )


def question(prompt):
    """The chat text less its template and the instruction that every prompt has."""
    user = prompt.split("<|im_start|>user\n")[-1]
    user = user.split(" Output the thinking process in <think>")[0]
    return re.sub(r"<\|\w+\|>", "", user).strip()


def thumbnail(root, path, size):
    """-> [a data URI] of the picture at root/path.

    [] if it is not there, leaves the root, or is none that Pillow reads.
    """
    full = (root / path).resolve()
    if not (full.is_relative_to(root.resolve()) and full.is_file()):
        return []
    try:
        image = Image.open(full).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return []

    image.thumbnail(size)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    return ["data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()]


def embed(name, value):
    """A value -> a script element of inert JSON, ASCII; no `<` in it ends or begins an element."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return f'<script type="application/json" id="{name}">{text}</script>\n'


# ---- What the curves say -------------------------------------------------------------------------
# A rule is a function of a run's rows of metrics.jsonl -> what it has found, or None. Its docstring
# is the rule as the page states it. What it judges are means over the first and the last fifth.
def reward_is_flat(rows):
    """Over 20 steps or more, a rise below 0.05 and a share of 0.7 or more."""
    first, last = fifths(rows, "reward")
    silent = fifths(rows, "frac_reward_zero_std")[1]
    if len(rows) >= 20 and last - first < 0.05 and silent >= 0.7:
        share = f"{silent:.2f} of the groups have zero variance"
        return f"The reward does not rise: {first:.2f}, then {last:.2f}; {share}"


def entropy_is_gone(rows):
    """Below 0.01 or, over 20 steps or more, below a tenth of the first."""
    first, last = fifths(rows, "entropy")
    if last < 0.01 or len(rows) >= 20 and last < first / 10:
        return f"The entropy is gone: {first:.2g} nats, then {last:.2g}"


def completions_do_not_end(rows):
    """0.5 or more."""
    last = fifths(rows, "frac_truncated")[1]
    if last >= 0.5:
        return f"Completions do not end: {last:.2f} are truncated"


def kl_runs_away(rows):
    """1 or more."""
    first, last = fifths(rows, "kl")
    if last >= 1:
        return f"The KL runs away: {first:.2g} nats a token, then {last:.2g}"


def answers_are_unreadable(rows):
    """0.5 or more."""
    last = fifths(rows, "frac_no_answer")[1]
    if last >= 0.5:
        return f"Answers are unreadable: {last:.2f} give no single letter"


def policies_are_apart(rows):
    """0.05 or more in a step's mean, or 5 or more in its maximum."""
    mean = fifths(rows, "logprob_gap_mean")[1]
    most = fifths(rows, "logprob_gap_max")[1]
    apart = "The scored policy is not the one that sampled: its log-probs are"
    if mean >= 0.05:
        return f"{apart} {mean:.2g} nats apart"
    if most >= 5:
        return f"{apart} up to {most:.2g} nats apart"


VERDICTS = {  # rule: what to do, as the page states it
    reward_is_flat: "Train on records of a middling pass rate: tools/select_records.py.",
    entropy_is_gone: "Go back to an earlier checkpoint; lower --learning_rate or raise --beta.",
    completions_do_not_end: "Raise --max_completion_length, if they come to an answer at all.",
    kl_runs_away: "Lower --learning_rate or raise --beta; colours below show at which tokens.",
    answers_are_unreadable: "Read them below: cut off, or without tags? sft_video.py teaches tags.",
    policies_are_apart: "Usual are 1e-6 in fp32, 0.01 in bf16; see tests/test_sampling.py.",
}


def fifths(rows, key):
    """-> means of a key's finite values over the first and the last fifth of the rows that have
    one. Where none has, NaN: then no rule holds."""
    values = [row[key] for row in rows if isinstance(row.get(key), (int, float))]
    values = [value for value in values if math.isfinite(value)]
    if not values:
        return math.nan, math.nan
    count = math.ceil(len(values) / 5)
    return sum(values[:count]) / count, sum(values[-count:]) / count


def verdicts(rows):
    """A run's rows of metrics.jsonl -> what its curves show: found, rule, advice."""
    shown = []
    for rule, advice in VERDICTS.items():
        found = rule(rows)
        if found:
            shown.append(dict(found=found, rule=rule.__doc__, advice=advice))
    return shown


# ---- The page's data -----------------------------------------------------------------------------
class Report:
    """What the page shows, gathered folder by folder.

    A prompt with its completions is a JSON text of its own, parsed when it is shown; `index` holds
    what the filters ask for, a column each, and in `flags` a hexadecimal digit for each completion.
    """

    def __init__(self, data_root):
        self.data_root = data_root
        self.root = data_root or Path("data/SEED-Bench-R1")  # eval_video.py's default
        self.runs = []  # their folders
        self.metrics = {}  # key: {a run's number: its steps and values}
        self.verdicts = []
        self.tiers = []  # the table's rows
        self.evaluated = {}  # (split, the hash of its questions): the folders that answer them
        self.sources = []  # what the filter by source names
        self.notes = []
        self.prompts = []  # embedded
        self.pictures = {}  # (folder, sample_id): (number, embedded)
        self.index = {key: [] for key in ("source", "step", "sample_id", "flags")}

    def add_run(self, folder):
        self.runs.append(str(folder))
        self.rows = []
        each(folder / "metrics.jsonl", self.add_metrics)
        self.verdicts += [dict(run=str(folder)) | verdict for verdict in verdicts(self.rows)]
        if (folder / "rollouts.jsonl").exists():
            self.add_rollouts(folder)

    def add_metrics(self, row):
        """A row of the last run's metrics.jsonl."""
        run = len(self.runs) - 1
        self.rows.append(row)
        for key, value in row.items():
            if key not in ("step", "epoch") and isinstance(value, (int, float, NoneType)):
                of_runs = self.metrics.setdefault(key, {})
                series = of_runs.setdefault(run, dict(steps=[], values=[]))
                series["steps"].append(row["step"])
                series["values"].append(short(value))

    def add_rollouts(self, folder):
        with reading(folder / "config.json"):
            run = json.loads((folder / "config.json").read_bytes())["run"]
            # Evaluations, which name none, are looked up here too.
            self.root = self.data_root or Path(run["data_root"])
            annotations = Path(run["annotations"] or self.root / "annotations/training_6k.jsonl")
            checkpoints = folder.glob("checkpoint-*")  # the tokenizer is the same in each
            tokens = load_tokens([folder, *checkpoints, Path(run["model"])])
        plain = set() if tokens else {"there is no tokenizer.json"}  # why tokens have no colour

        def completion(x):
            keys = ("reward", "advantage", "kl", "entropy", "length")
            shown = {key: short(x[key]) for key in keys}
            shown |= dict(answer=x["answer"], text=x["text"])
            if "log_ratio" not in x:
                plain.add("not all completions have a log_ratio")
            elif tokens:
                shown["text"], shown["log_ratio"] = pieces(tokens, x["ids"], x["log_ratio"])
            return shown, x["truncated"], x.get("consistent")

        def rollout(row):
            completions = [completion(x) for x in row["completions"]]
            self.add(folder, row, completions, question(row["prompt"]), row["step"])

        self.add_source(str(folder), annotations)
        each(folder / "rollouts.jsonl", rollout)
        for reason in sorted(plain):
            self.notes.append(f"{folder}: tokens without colour, as {reason}")

    def add_evaluation(self, folder):
        cells = {}
        with reading(folder / "summary.json"):
            summary = json.loads((folder / "summary.json").read_bytes())
            for split, counts in summary.items():
                tier = split.removeprefix("validation_")
                parts = {"": counts}
                if len(counts["by_domain"]) > 1:
                    parts |= counts["by_domain"]
                for name, part in parts.items():
                    cells[f"{tier} {name}".strip()] = self.cell(part)

        self.tiers.append(dict(name=str(folder), cells=cells))
        for split in summary:
            path = folder / f"settings_{split}.json"
            asked = None
            if path.exists():
                with reading(path):
                    asked = json.loads(path.read_bytes())["data_sha256"]
            self.evaluated.setdefault((split, asked), []).append(folder)

    @staticmethod
    def cell(part):
        """Counts of summary.json -> a cell of the table: each score has its value and interval."""
        scores = {}
        for key in SCORES:
            if key in part:
                interval = part.get(f"{key}_ci95", part["ci95"])
                scores[key] = [short(x) for x in (part[key], *interval)]
        counts = {key: part[key] for key in ("correct", "total", "failed", "no_answer")}
        return dict(scores=scores) | counts

    def add_answers(self, split, folders):
        """What these evaluations of a split say: each question once, their responses in turn."""
        several = len(folders) > 1
        name = f"{split}, {len(folders)} models" if several else f"{folders[0]} {split}"
        self.add_source(name, self.root / f"annotations/{split}.jsonl")

        found = {}  # (sample_id, gold letter): each folder's
        for folder in folders:
            for row in self.answers_of(folder, split):
                if several:
                    for shown, *_ in row["completions"]:
                        shown["model"] = str(folder)
                    row["error"] = row["error"] and f"{folder}: {row['error']}"
                found.setdefault((row["sample_id"], row["gold"]), []).append(row)

        for (sample_id, gold), rows in found.items():
            errors = [row["error"] for row in rows if row["error"]]
            question = dict(sample_id=sample_id, gold=gold, error="\n".join(errors) or None)
            completions = itertools.chain(*(row["completions"] for row in rows))
            self.add(folders[0], question, list(completions), self.asked(sample_id))

    @staticmethod
    def answers_of(folder, split):
        """An evaluation's predictions -> sample_id, gold, error and completions of each.

        Of a question's first response tools/analyze.py says whether it fits its thinking, and
        where the video enters.
        """
        path = folder / f"analysis_{split}.jsonl"
        analysis = {}
        if path.exists():
            each(path, lambda row: analysis.update({row["sample_id"]: row}))
        found = []

        def answer(row):
            texts = row.get("responses", [row["response"]])
            letters = row.get("answers", [row["predicted"]])
            shown = []
            for text, letter in zip(texts, letters, strict=True):
                shown.append((dict(text=text, answer=letter), False, None))

            looked_into = analysis.get(row["sample_id"])
            if looked_into:
                first = shown[0][0] | reliance(looked_into)
                shown[0] = (first, False, looked_into["consistent"])
            kept = {key: row[key] for key in ("sample_id", "gold", "error")}
            found.append(kept | dict(completions=[] if row["error"] else shown))

        each(folder / f"predictions_{split}.jsonl", answer)
        return found

    def asked(self, sample_id):
        """The question and its choices, where the annotations have them."""
        record = self.records.get(sample_id, {})
        lines = [record.get("question", "")]
        for letter in "abcd":
            if f"choice_{letter}" in record:
                lines.append(f"{letter.upper()}. {record[f'choice_{letter}']}")
        return "\n".join(lines)

    def add_source(self, name, annotations):
        """A new entry of the filter by source.

        Its annotation rows, by sample_id, are looked up for pictures and questions.
        """
        self.sources.append(name)
        self.room = MAX_PICTURED
        self.records = {}
        if not annotations.is_file():
            problem = f"no pictures, as there is no {annotations}"
            self.notes.append(f"{name}: {problem}; --data_root says where the data is")
            return
        with reading(annotations):
            for line in annotations.read_bytes().split(b"\n"):
                if line.strip():
                    row = json.loads(line)
                    self.records[row["sample_id"]] = row

    def add(self, folder, row, completions, asked, step=None):
        """completions: (what the page shows of it, truncated, consistent) each."""
        flags = ""
        for shown, truncated, consistent in completions:
            right = shown["answer"] == row["gold"]
            fits = {True: 4, False: 8}.get(consistent, 0)
            flags += f"{right + 2 * truncated + fits:x}"

        prompt = dict(
            question=asked,
            gold=row["gold"],
            error=row.get("error"),
            pictures=self.picture(folder, row["sample_id"]),
            completions=[shown for shown, _, _ in completions],
        )
        self.prompts.append(embed(f"prompt-{len(self.prompts)}", prompt))
        self.index["source"].append(len(self.sources) - 1)
        self.index["step"].append(step)
        self.index["sample_id"].append(str(row["sample_id"]))
        self.index["flags"].append(flags)

    def picture(self, folder, sample_id):
        """-> the number of the sample's embedded pictures.

        They are its strip of frames, if tools/frames.py wrote one, and its observation.
        """
        key = (folder, sample_id)
        if key not in self.pictures and self.room:
            record = self.records.get(sample_id, {})
            source = record.get("video_source")
            observation = f"{source}/{record.get('current_observation_basename')}"
            uris = thumbnail(folder / "frames", f"{sample_id}.png", (1600, 140))
            uris += thumbnail(self.root / "images", observation, (200, 140))
            if uris:
                number = len(self.pictures)
                self.pictures[key] = (number, embed(f"picture-{number}", uris))
                self.room -= 1
                if not self.room:
                    only = f"pictures of the first {MAX_PICTURED} samples alone"
                    self.notes.append(f"{self.sources[-1]}: {only}")
        return self.pictures.get(key, [None])[0]

    def charts(self):
        """-> the page's charts: title, whether it is one of the other metrics, and series.

        With several runs a chart has one metric, and its lines are the runs.
        """
        several = len(self.runs) > 1
        groups = []
        if several:
            groups += [(title, keys) for title, keys in CHARTS.items() if len(keys) == 1]
            for title, keys in CHARTS.items():
                if len(keys) > 1:
                    groups += [(f"{title}: {key}", [key]) for key in keys]
        else:
            groups += CHARTS.items()
        named = {*itertools.chain(*CHARTS.values())}
        groups += [(key, [key]) for key in self.metrics if key not in named]

        charts = []
        for title, keys in groups:
            lines = []
            for k, key in enumerate(keys):
                for run, series in self.metrics.get(key, {}).items():
                    label = self.runs[run] if several else key
                    lines.append(dict(label=label, colour=run if several else k) | series)
            if lines:
                charts.append(dict(title=title, other=title in self.metrics, series=lines))
        return charts

    def html(self):
        page = dict(
            verdicts=self.verdicts,
            charts=self.charts(),
            tiers=self.tiers,
            sources=self.sources,
            notes=self.notes,
            index=self.index,
        )

        digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
        parts = [HTML.replace("DIGEST", digest)]
        parts += [embedded for _, embedded in self.pictures.values()]
        parts += self.prompts
        parts.append(embed("page", page))
        parts.append(f"<script>{SCRIPT}</script>\n")
        return "".join(parts)


HTML = r"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy"
      content="default-src 'none'; img-src data:; style-src 'unsafe-inline';
               script-src 'sha256-DIGEST'">
<link rel="icon" href="data:,">
<title>Training and evaluation report</title>
<style>
:root {
  color-scheme: light dark;
  --page: #f7f7f5; --card: #fff; --ink: #1d2329; --soft: #656d76; --line: #dcdfe3;
  --good: #1a7f4b; --bad: #b3382c; --more: 37 99 235; --less: 217 95 2;
  --enters: 190 24 120;
  --c0: #2563eb; --c1: #d95f02; --c2: #0f8a6d; --c3: #8e44ad; --c4: #a0761a
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171a; --card: #1d2226; --ink: #e4e7ea; --soft: #99a2ab; --line: #363d44;
    --good: #4cc38a; --bad: #f0806f; --more: 96 150 255; --less: 245 140 60;
    --enters: 245 110 190;
    --c0: #74a7ff; --c1: #ff9d57; --c2: #45c9a5; --c3: #c792ea; --c4: #dcb862
  }
}

* { box-sizing: border-box }
body {
  margin: 0;
  background: var(--page);
  color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif
}
main { max-width: 1200px; margin: auto; padding: 24px 16px 64px }
h1 { font-size: 24px; margin: 0 }
h2 { font-size: 18px; margin: 40px 0 4px }
h3 { font-size: 14px; margin: 0; display: flex; justify-content: space-between; gap: 8px }
h3 small { white-space: nowrap }
.soft, small { color: var(--soft); font-size: 13px; margin: 0 }

#verdicts li { font-size: 13px; margin-bottom: 4px }
.grid {
  display: grid;
  gap: 12px;
  margin: 12px 0;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 270px), 1fr))
}
.charts { grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)) }
.card, article {
  background: var(--card);
  border: 1px solid var(--line);
  border-radius: 6px;
  padding: 10px 12px;
  min-width: 0
}
article { margin: 16px 0; padding: 14px 16px }
article .card { background: none }

.charts .card > svg { display: block; width: 100%; cursor: crosshair }
svg text { fill: var(--soft); font-size: 11px }
.reading, table { font-variant-numeric: tabular-nums }
.reading { display: flex; gap: 6px; font-size: 12px; line-height: 1.4; overflow-wrap: anywhere }
.reading b { margin-left: auto; font-weight: 600 }
.reading svg { flex: none; width: 18px; height: 16px }

.scroll { overflow-x: auto }
table { border-collapse: collapse; margin: 12px 0 }
th, td {
  text-align: left;
  vertical-align: top;
  padding: 8px 16px 8px 0;
  border-bottom: 1px solid var(--line);
  white-space: nowrap
}
td small { display: block }
td svg { display: block; width: 110px; height: 10px }

form, nav { display: flex; flex-wrap: wrap; gap: 12px; align-items: center; margin: 12px 0 }
nav { position: sticky; top: 0; background: var(--page); padding: 6px 0 }
#prompts { scroll-margin-top: 60px }
label { font-size: 13px; color: var(--soft); max-width: 100% }
label > * { display: block }
input, select, button {
  font: inherit;
  color: var(--ink);
  background: var(--card);
  border: 1px solid var(--line);
  border-radius: 4px;
  padding: 4px 8px;
  max-width: 100%;
  height: 34px
}
input { width: 110px }
:disabled { color: var(--soft) }
:focus-visible { outline: 2px solid var(--c0); outline-offset: 1px }

.text {
  white-space: pre-wrap;
  overflow-wrap: anywhere;
  max-height: 26em;
  overflow-y: auto;
  margin: 8px 0 0
}
.card .text { font: 13px/1.6 ui-monospace, monospace }
.text span { border-radius: 2px }
.asked { display: flex; flex-wrap: wrap; gap: 0 16px }
.asked .text { flex: 1 1 400px }
.asked img { height: 120px; margin-top: 12px; max-width: 100%; object-fit: contain }
.right { border-left: 4px solid var(--good) }
.wrong { border-left: 4px solid var(--bad) }
.pale { opacity: .4 }
.right b { color: var(--good) }
.wrong b { color: var(--bad) }
#less { background: rgb(var(--less) / .6); color: var(--ink) }
#more { background: rgb(var(--more) / .6); color: var(--ink) }
#enters { background: rgb(var(--enters) / .6); color: var(--ink) }
</style>
<main>
<h1>Training and evaluation report</h1>

<section id="verdicts">
<h2>What the curves say</h2>
<p class="soft">Numbers are means over the last fifth of the run; of two, the first is over its
first fifth.</p>
<ul></ul>
</section>

<section id="training">
<h2>Training</h2>
<p class="soft">Point at a chart, or focus one and press ← or →, to read all of them at a step.
Thin: as logged; thick: mean of the last twentieth of the run. A gap is a value that is not
finite.</p>
<div class="grid charts" id="charts"></div>
<details>
<summary>Other metrics</summary>
<div class="grid charts" id="others"></div>
</details>
</section>

<section id="tiers">
<h2>Evaluation</h2>
<p class="soft">Accuracy in % with its 95 % interval, drawn from 0 to 100. Failed questions are in
no denominator; no answer counts as wrong.</p>
<div class="scroll"><table></table></div>
</section>

<section id="browser">
<h2>Completions</h2>
<p class="soft">A token's colour in a training run is its log-ratio: <span id="less">less</span> or
<span id="more">more</span> likely under the policy that wrote it than under the reference, in full
colour from a factor of e² ≈ 7.4. In an evaluation that tools/analyze.py has looked into, it is
<span id="enters">where the video enters</span>: the visual reliance, in full colour from 2 nats.
Evaluations of the same questions stand side by side. What a filter does not ask for is pale; an
answer is mixed if some of a question's are right and some wrong.</p>
<form>
<label>run or evaluation <select name="source"><option value="">all</select></label>
<label>step, or from-to <input name="step"></label>
<label>sample_id <input name="sample_id"></label>
<label>answer
<select name="answer"><option value="">all<option>right<option>wrong<option>mixed</select></label>
<label>fits its thinking
<select name="consistent"><option value="">all<option>yes<option>no</select></label>
<label>truncated
<select name="truncated"><option value="">all<option>yes<option>no</select></label>
</form>
<nav>
<button id="previous">← previous</button>
<button id="next">next →</button>
<span id="count" aria-live="polite"></span>
</nav>
<div id="prompts"></div>
<ul class="soft" id="notes"></ul>
</section>
</main>
"""

SCRIPT = r"""
"use strict";
const $ = id => document.getElementById(id);
const data = id => JSON.parse($(id).textContent);
const page = data("page");
const {index} = page;
const digits = (x, n = 4) => x === null ? "not finite" : String(+x.toPrecision(n));

// Strings among the children become text nodes, never markup.
function make(tag, attributes = {}, ...children) {
  const svg = ["svg", "path", "line", "circle", "text"].includes(tag);
  const node = svg
    ? document.createElementNS("http://www.w3.org/2000/svg", tag)
    : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

// ---- What the curves say ----

function verdict({run, found, rule, advice}) {
  const reason = make("small", {}, ` Rule: ${rule}`);
  return make("li", {}, make("small", {}, `${run} `), make("b", {}, `${found}. `), advice, reason);
}

// ---- Curves. A drawing is 360 x 140; LEFT, RIGHT, TOP and BOTTOM bound its plot. ----

const LEFT = 56, RIGHT = 354, TOP = 10, BOTTOM = 118;
const cursors = [];  // for each chart a function that reads it at a step

function hover(step) {
  for (const read of cursors) read(step);
}

// What a chart's lines have in common: its steps, its values' bounds, and places in the drawing.
function scales(series) {
  const steps = [...new Set(series.flatMap(s => s.steps))].sort((a, b) => a - b);
  const first = steps[0];
  const last = steps.at(-1);
  const values = series.flatMap(s => s.values).filter(v => v !== null);
  const low = values.reduce((a, b) => Math.min(a, b), Infinity);
  const high = values.reduce((a, b) => Math.max(a, b), -Infinity);

  function x(step) {
    if (first === last) return (LEFT + RIGHT) / 2;
    return LEFT + (RIGHT - LEFT) * (step - first) / (last - first);
  }
  function y(value) {
    if (low === high) return (TOP + BOTTOM) / 2;
    return BOTTOM - (BOTTOM - TOP) * (value - low) / (high - low);
  }
  return {steps, first, last, low, high, x, y};
}

// An SVG path, with a gap at null; "h0" draws a lone value as a dot.
function curve(steps, values, {x, y}) {
  const points = values.map((value, i) => {
    if (value === null) return "";
    const command = i && values[i - 1] !== null ? "L" : "M";
    return `${command}${x(steps[i]).toFixed(1)} ${y(value).toFixed(1)}h0`;
  });
  return points.join("");
}

// At each value the mean of the last twentieth of the run.
function smooth(values) {
  const count = Math.ceil(values.length / 20);
  return values.map((value, i) => {
    if (value === null) return null;
    const near = values.slice(Math.max(0, i + 1 - count), i + 1).filter(v => v !== null);
    return near.reduce((a, b) => a + b) / near.length;
  });
}

function axes(title, {first, last, low, high}) {
  const text = (x, y, anchor, words) => make("text", {x, y, "text-anchor": anchor}, words);
  const lines = {d: `M${LEFT} ${TOP}V${BOTTOM}H${RIGHT}`, fill: "none", stroke: "var(--line)"};
  const plot = make(
    "svg",
    {viewBox: "0 0 360 140", role: "img", "aria-label": title, tabindex: 0},
    make("path", lines),
    text(LEFT, 134, "start", `step ${first}`),
    text(RIGHT, 134, "end", `${last}`));
  if (high >= low) plot.append(text(LEFT - 4, TOP + 8, "end", digits(high, 2)));
  if (high > low) plot.append(text(LEFT - 4, BOTTOM, "end", digits(low, 2)));
  return plot;
}

// Draws a series; its row below the plot names it and has the value at the cursor's step.
function draw(plot, s, scale) {
  const line = {
    fill: "none",
    stroke: `var(--c${s.colour % 5})`,
    "stroke-width": 2,
    "stroke-linecap": "round",
  };
  const thin = {d: curve(s.steps, s.values, scale), "stroke-width": 1, "stroke-opacity": .35};
  const thick = {d: curve(s.steps, smooth(s.values), scale)};
  plot.append(make("path", {...line, ...thin}), make("path", {...line, ...thick}));

  const swatch = make("svg", {viewBox: "0 0 18 16"}, make("path", {...line, d: "M1 8H17"}));
  const value = make("b");
  return {s, value, row: make("div", {class: "reading"}, swatch, s.label, value)};
}

function chart({title, series}) {
  const scale = scales(series);
  const {steps, first, last} = scale;
  const plot = axes(title, scale);
  const readings = series.map(s => draw(plot, s, scale));
  const rule = make("line", {y1: TOP, y2: BOTTOM, stroke: "var(--ink)"});
  const at = make("small");
  plot.append(rule);

  function nearest(step) {
    return steps.reduce((a, b) => Math.abs(b - step) < Math.abs(a - step) ? b : a);
  }

  // null is rest: the last step's values, and no rule.
  function read(step) {
    const shown = nearest(step ?? last);
    for (const end of ["x1", "x2"]) rule.setAttribute(end, scale.x(shown));
    rule.setAttribute("visibility", step === null ? "hidden" : "visible");
    at.textContent = `step ${shown}`;
    for (const {s, value} of readings) {
      const place = s.steps.indexOf(shown);
      value.textContent = place < 0 ? "–" : digits(s.values[place]);
    }
    plot.onkeydown = event => {
      const move = {ArrowLeft: -1, ArrowRight: 1}[event.key];
      if (move) hover(steps[steps.indexOf(shown) + move] ?? shown);
    };
  }
  cursors.push(read);

  plot.onpointermove = event => {
    const box = plot.getBoundingClientRect();
    const x = (event.clientX - box.left) * 360 / box.width;
    hover(nearest(first + (last - first) * (x - LEFT) / (RIGHT - LEFT)));
  };
  plot.onpointerleave = plot.onblur = () => hover(null);
  const rows = readings.map(reading => reading.row);
  return make("div", {class: "card"}, make("h3", {}, title, at), plot, ...rows);
}

// ---- The table of tiers: summary.json's own numbers ----

function percent([value, low, high]) {
  const [mean, from, to] = [value, low, high].map(share => 100 * share);
  return `${mean.toFixed(1)} (${from.toFixed()}–${to.toFixed()})`;
}

function tier(cell) {
  if (!cell) return make("td");
  const {accuracy, ...others} = cell.scores;
  const [value, low, high] = accuracy.map(share => 5 + 100 * share);
  const bar = make(
    "svg",
    {viewBox: "0 0 110 10"},
    make("line", {x1: 5, x2: 105, y1: 5, y2: 5, stroke: "var(--line)"}),
    make("line", {x1: low, x2: high, y1: 5, y2: 5, stroke: "var(--c0)", "stroke-width": 2}),
    make("circle", {cx: value, cy: 5, r: 3.5, fill: "var(--c0)"}));

  const facts = [
    `${cell.correct} of ${cell.total} right`,
    `${cell.failed} failed, ${cell.no_answer} no answer`,
  ];
  for (const [key, score] of Object.entries(others))
    if (score[0] !== accuracy[0]) facts.push(`${key} ${percent(score)}`);
  return make("td", {}, percent(accuracy), bar, ...facts.map(fact => make("small", {}, fact)));
}

function table(rows) {
  const columns = [...new Set(rows.flatMap(row => Object.keys(row.cells)))];
  const heads = ["", ...columns].map(name => make("th", {}, name));
  const lines = rows.map(row => {
    const cells = columns.map(name => tier(row.cells[name]));
    return make("tr", {}, make("th", {}, row.name), ...cells);
  });
  return [make("tr", {}, ...heads), ...lines];
}

// ---- The browser of completions ----

const RIGHT_ANSWER = 1, TRUNCATED = 2, CONSISTENT = 4, NOT_CONSISTENT = 8;  // a completion's flags
const PAGE = 20;  // prompts shown at once
const form = document.forms[0];
const flags = index.flags.map(row => [...row].map(digit => parseInt(digit, 16)));
let chosen;  // the numbers of the prompts that meet the filters
let start;  // the first of them on the page

// Whether a completion meets what the form asks of it.
function wanted(flag, {answer, truncated, consistent}) {
  if (answer === "right" && !(flag & RIGHT_ANSWER)) return false;
  if (answer === "wrong" && flag & RIGHT_ANSWER) return false;
  if (truncated && (truncated === "yes") !== !!(flag & TRUNCATED)) return false;
  return !consistent || !!(flag & (consistent === "yes" ? CONSISTENT : NOT_CONSISTENT));
}

function paint(span, name, value, colour) {
  const strength = Math.min(1, Math.abs(value) / 2) * .6;
  span.title = `${name} ${digits(value)}`;
  span.style.background = `rgb(var(--${colour}) / ${strength})`;
}

// Tokens are spans, coloured by log-ratio or visual reliance; a text without either is one span.
function colouredText(x) {
  const text = make("div", {class: "text"});
  [x.text].flat().forEach((piece, i) => {
    const span = text.appendChild(make("span", {}, piece));
    const ratio = x.log_ratio?.[i];
    const nats = x.reliance?.[i];
    if (ratio !== undefined) paint(span, "log-ratio", ratio, ratio < 0 ? "less" : "more");
    if (nats !== undefined) paint(span, "visual reliance", nats, "enters");
  });
  return text;
}

function completion(x, flag, state) {
  const facts = x.model ? [x.model] : [];
  for (const key of ["reward", "advantage", "kl", "entropy", "length"])
    if (key in x) facts.push(`${key} ${digits(x[key])}`);
  if (flag & TRUNCATED) facts.push("truncated");
  if (flag & CONSISTENT) facts.push("fits its thinking");
  if (flag & NOT_CONSISTENT) facts.push("does not fit its thinking");

  const right = flag & RIGHT_ANSWER ? "right" : "wrong";
  const mark = flag & RIGHT_ANSWER ? "✓" : "✗";
  return make(
    "div",
    {class: `card ${right} ${wanted(flag, state) ? "" : "pale"}`},
    make("b", {}, `${mark} ${right}: ${x.answer ?? "no answer"}`),
    make("p", {class: "soft"}, facts.join(" · ")),
    colouredText(x));
}

function prompt(i, state) {
  const row = data(`prompt-${i}`);
  const rights = flags[i].filter(flag => flag & RIGHT_ANSWER).length;
  const facts = [page.sources[index.source[i]]];
  if (index.step[i] !== null) facts.push(`step ${index.step[i]}`);
  facts.push(`sample_id ${index.sample_id[i]}`, `gold ${row.gold}`);
  if (row.error) facts.push("failed");
  if (flags[i].length) facts.push(`${rights} of ${flags[i].length} right`);

  const uris = row.pictures === null ? [] : data(`picture-${row.pictures}`);
  const pictures = uris.map(src => make("img", {src, alt: "frames of the question"}));
  const words = [row.question, row.error].filter(part => part).join("\n");
  const completions = row.completions.map((x, g) => completion(x, flags[i][g], state));
  return make(
    "article",
    {},
    make("h3", {}, facts.join(" · ")),
    make("div", {class: "asked"}, ...pictures, make("div", {class: "text"}, words)),
    make("div", {class: "grid"}, ...completions));
}

function formState() {
  return Object.fromEntries(new FormData(form));
}

function show(from) {
  const state = formState();
  const end = Math.min(from + PAGE, chosen.length);
  const count = chosen.length ? `prompts ${from + 1}–${end} of ${chosen.length}` : "no such prompt";
  start = from;
  $("prompts").replaceChildren(...chosen.slice(start, end).map(i => prompt(i, state)));
  $("previous").disabled = start === 0;
  $("next").disabled = end === chosen.length;
  $("count").textContent = count;
}

// What follows # in the address is the filters' state: the form writes it, this reads it.
function filter() {
  const given = new URLSearchParams(location.hash.slice(1));
  for (const control of form.elements) control.value = given.get(control.name) ?? "";
  const state = formState();
  const [from, to = from] = state.step.split("-");
  const narrow = state.answer || state.truncated || state.consistent;

  function meets(i) {
    const step = index.step[i];
    if (state.source && page.sources[index.source[i]] !== state.source) return false;
    if (from && (step === null || !(step >= +from && step <= (+to || Infinity)))) return false;
    if (state.sample_id && index.sample_id[i] !== state.sample_id) return false;
    const kinds = new Set(flags[i].map(flag => flag & RIGHT_ANSWER));
    if (state.answer === "mixed" && kinds.size < 2) return false;
    return !narrow || flags[i].some(flag => wanted(flag, state));
  }
  chosen = [...flags.keys()].filter(meets);
  show(0);
  hover(given.has("hover") ? +given.get("hover") : null);
}

// ---- Fill the page ----

$("verdicts").lastElementChild.append(...page.verdicts.map(verdict));
$("verdicts").hidden = !page.verdicts.length;
for (const c of page.charts) $(c.other ? "others" : "charts").append(chart(c));
document.querySelector("table").append(...table(page.tiers));
$("training").hidden = !page.charts.length;
$("tiers").hidden = !page.tiers.length;
$("browser").hidden = !page.sources.length;
$("notes").append(...page.notes.map(note => make("li", {}, note)));
form.elements.source.append(...page.sources.map(name => make("option", {}, name)));

// Off where nothing says so of any completion.
const analyzed = CONSISTENT | NOT_CONSISTENT;
form.elements.consistent.disabled = !flags.flat().some(flag => flag & analyzed);

function turn(pages) {
  show(start + pages * PAGE);
  $("prompts").scrollIntoView();
}
$("previous").onclick = () => turn(-1);
$("next").onclick = () => turn(1);
form.onsubmit = event => event.preventDefault();
form.oninput = () => {
  const asked = [...new FormData(form)].filter(([, value]) => value);
  location.replace(`#${new URLSearchParams(asked)}`);
};
onhashchange = filter;
filter();
"""


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("folders", nargs="+", type=Path, metavar="DIR", help="a run's or an evaluation's folder")
    add("--output", type=Path, help="the file to write; default: report.html in the first folder")
    add(
        "--data_root",
        type=Path,
        help="folder with annotations/ and images/; default: the run's own",
    )
    args = parser.parse_args()

    for folder in args.folders:
        if not any((folder / file).is_file() for file in ("metrics.jsonl", "summary.json")):
            fail(
                f"{folder}: no metrics.jsonl, as a training run's folder has, "
                "and no summary.json, as an evaluation's has"
            )

    # The runs first: evaluations are looked up in their data root.
    report = Report(args.data_root)
    for folder in args.folders:
        if (folder / "metrics.jsonl").exists():
            report.add_run(folder)
    for folder in args.folders:
        if (folder / "summary.json").exists():
            report.add_evaluation(folder)
    for (split, _), folders in report.evaluated.items():
        report.add_answers(split, folders)

    output = args.output or args.folders[0] / "report.html"
    try:
        output.write_text(report.html(), encoding="utf-8")
    except OSError as error:
        fail(f"{output}: {error.strerror}; --output names another file")
    print(
        f"{output}: {len(report.runs)} runs, {len(report.tiers)} evaluations, "
        f"{len(report.prompts)} prompts, {output.stat().st_size / 2**20:.1f} MiB"
    )


if __name__ == "__main__":
    main()
