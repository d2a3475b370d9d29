"""One self-contained report.html about training runs and evaluations: curves, the table of tiers, every completion.

    python tools/report.py runs/toy-grpo                                    # writes runs/toy-grpo/report.html
    python tools/report.py runs/grpo runs/sft runs/eval-grpo --output all.html --data_root data/SEED-Bench-R1

Reads what the three scripts write (README.md, section 7) and recomputes nothing; numbers are cut to 4 digits. The page needs no
network. What follows `#` in its address sets its filters and can be shared: report.html#step=3&answer=wrong&hover=12.

A model's or a data set's words are never markup: they are JSON with `<`, `>`, `&` and all that is not ASCII escaped, shown as text
nodes, and the page's policy runs the one script written here and loads nothing.
"""
import argparse, base64, contextlib, hashlib, io, itertools, json, math, re, sys
from pathlib import Path

from PIL import Image

CHARTS = {  # title: keys of metrics.jsonl; a key named nowhere gets a chart under "Other metrics"
    "Reward": ["reward"], "KL to the reference, nats": ["kl"], "Entropy, nats": ["entropy"],
    "Completion length, tokens": ["completion_length"], "Zero-variance groups, share": ["frac_reward_zero_std"],
    "Gradient norm": ["grad_norm"], "Loss": ["loss"], "Held-out loss": ["eval_loss"], "Token accuracy": ["token_accuracy"],
    "Truncated, without answer: shares": ["frac_truncated", "frac_no_answer"],
    "Seconds of a step": ["time_data", "time_rollout", "time_ref", "time_update"]}
MAX_PICTURED = 200  # samples of a run or a split whose pictures are embedded, 5 to 40 kB each
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]  # byte-level BPE, GPT-2's: these bytes are their characters,
BYTE = {chr(b): b for b in PRINTABLE} | {chr(256 + i): b for i, b in enumerate(sorted({*range(256)} - {*PRINTABLE}))}
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
        fail(f"{place}: {type(error).__name__}: {error}; must be JSON as README.md, section 7, describes it")

def each(path, use):
    """Calls use(object) for each line of a file of JSON objects. Half a line at its end, which a kill may leave, is not read."""
    with reading(path), open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            with reading(f"{path}:{number}"):
                if line.endswith(b"\n"):
                    use(json.loads(line))

def short(x):
    """A number to 4 significant digits; None, which JSON has, for NaN and the infinities, which it has not."""
    return x if isinstance(x, int) else float(f"{x:.4g}") if math.isfinite(x) else None

def load_tokens(folders):
    """The first tokenizer.json in these folders -> {id: its bytes}; {} where there is none."""
    for path in (folder / "tokenizer.json" for folder in folders if (folder / "tokenizer.json").is_file()):
        with reading(path):
            raw = json.loads(path.read_bytes())
            tokens = {i: bytes(BYTE[character] for character in token) for token, i in raw["model"]["vocab"].items()}
            return tokens | {token["id"]: token["content"].encode() for token in raw["added_tokens"]}
    return {}

def pieces(tokens, ids, log_ratio):
    """-> (texts, log-ratios). A character whose bytes are spread over tokens goes to the first of them; a token left without a
    character adds its log-ratio to that one's, as their probabilities multiply."""
    texts, ratios = [], []
    for i, ratio in zip(ids, log_ratio, strict=True):
        token = tokens.get(i, b"[%d]" % i)  # the embedding has more rows than the tokenizer has tokens
        begun = token.lstrip(CONTINUATION) if texts else token
        if texts:
            texts[-1] += token[:len(token) - len(begun)]
        if begun:
            texts.append(begun)
            ratios.append(ratio)
        else:
            ratios[-1] += ratio
    return [text.decode(errors="replace") for text in texts], [short(round(ratio, 3)) for ratio in ratios]

def question(prompt):
    """The chat text less its template and the instruction that every prompt has."""
    user = prompt.split("<|im_start|>user\n")[-1].split(" Output the thinking process in <think>")[0]
    return re.sub(r"<\|\w+\|>", "", user).strip()

def thumbnail(root, path, size):
    """-> [a data URI] of the picture at root/path; [] if it is not there, leaves the root, or is none that Pillow reads."""
    full = (root / path).resolve()
    if not (full.is_relative_to(root.resolve()) and full.is_file()):
        return []
    try:
        image = Image.open(full).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return []
    image.thumbnail(size)
    image.save(file := io.BytesIO(), "JPEG", quality=80)
    return ["data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()]

class Report:
    """What the page shows, gathered folder by folder. A prompt with its completions is a JSON text of its own, parsed when it is
    shown; `index` holds what the filters ask for, a column each, and in `flags` a hexadecimal digit for each completion."""
    def __init__(self, data_root):
        self.data_root, self.root = data_root, data_root or Path("data/SEED-Bench-R1")  # eval_video.py's default
        self.runs, self.metrics, self.tiers, self.sources, self.notes, self.prompts, self.pictures = [], {}, [], [], [], [], {}
        self.index = {key: [] for key in ("source", "step", "sample_id", "flags")}

    def add_run(self, folder):
        def metrics(row):
            for key, value in row.items():
                if key not in ("step", "epoch") and isinstance(value, (int, float)):
                    series = self.metrics.setdefault(key, {}).setdefault(len(self.runs) - 1, dict(steps=[], values=[]))
                    series["steps"].append(row["step"])
                    series["values"].append(short(value))
        self.runs.append(str(folder))
        each(folder / "metrics.jsonl", metrics)
        if not (folder / "rollouts.jsonl").exists():
            return
        with reading(folder / "config.json"):
            run = json.loads((folder / "config.json").read_bytes())["run"]
            self.root = self.data_root or Path(run["data_root"])  # evaluations, which name none, are looked up here too
            annotations = Path(run["annotations"] or self.root / "annotations/training_6k.jsonl")
            tokens = load_tokens([folder, *folder.glob("checkpoint-*"), Path(run["model"])])  # the same in each
        plain = set() if tokens else {"there is no tokenizer.json"}

        def completion(x):
            shown = {key: short(x[key]) for key in ("reward", "advantage", "kl", "entropy", "length")}
            shown |= dict(answer=x["answer"], text=x["text"])
            if "log_ratio" not in x:
                plain.add("not all completions have a log_ratio")
            elif tokens:
                shown["text"], shown["log_ratio"] = pieces(tokens, x["ids"], x["log_ratio"])
            return shown, x["truncated"], x.get("consistent")
        self.add_source(str(folder), annotations)
        each(folder / "rollouts.jsonl", lambda row: self.add(
            folder, row, [completion(x) for x in row["completions"]], question(row["prompt"]), row["step"]))
        self.notes += [f"{folder}: tokens without colour, as {reason}" for reason in plain]

    def add_evaluation(self, folder):
        cells = {}
        with reading(folder / "summary.json"):
            summary = json.loads((folder / "summary.json").read_bytes())
            for split, counts in summary.items():
                domains = counts["by_domain"] if len(counts["by_domain"]) > 1 else {}
                for name, part in {"": counts, **domains}.items():
                    keys = [key for key in ("accuracy", "mean_accuracy", "pass_at_k", "accuracy_failed_wrong") if key in part]
                    scores = {key: [short(part[key]), *map(short, part.get(f"{key}_ci95", part["ci95"]))] for key in keys}
                    cells[f"{split.removeprefix('validation_')} {name}".strip()] = dict(scores=scores) | {
                        key: part[key] for key in ("correct", "total", "failed", "no_answer")}
        self.tiers.append(dict(name=str(folder), cells=cells))
        for split in summary:
            self.add_answers(folder, split)

    def add_answers(self, folder, split):
        analysis, consistent = folder / f"analysis_{split}.jsonl", {}
        if analysis.exists():
            each(analysis, lambda row: consistent.update({row["sample_id"]: row["consistent"]}))

        def answer(row):
            texts, letters = row.get("responses", [row["response"]]), row.get("answers", [row["predicted"]])
            shown = [(dict(text=text, answer=letter), False, consistent.get(row["sample_id"]))
                     for text, letter in zip(texts, letters, strict=True)]
            asked = self.records.get(row["sample_id"], {})
            options = [f"{letter.upper()}. {asked[f'choice_{letter}']}" for letter in "abcd" if f"choice_{letter}" in asked]
            self.add(folder, row, [] if row["error"] else shown, "\n".join([asked.get("question", ""), *options]))
        self.add_source(f"{folder} {split}", self.root / f"annotations/{split}.jsonl")
        each(folder / f"predictions_{split}.jsonl", answer)

    def add_source(self, name, annotations):
        """A new entry of the filter by source; its annotation rows, by sample_id, are looked up for pictures and questions."""
        self.sources.append(name)
        self.room = MAX_PICTURED
        if annotations.is_file():
            lines = filter(bytes.strip, annotations.read_bytes().split(b"\n"))
            with reading(annotations):
                self.records = {row["sample_id"]: row for row in map(json.loads, lines)}
        else:
            self.records = {}
            self.notes.append(f"{name}: no pictures, as there is no {annotations}; --data_root says where the data is")

    def add(self, folder, row, completions, asked, step=None):
        """completions: (what the page shows of it, truncated, consistent) each."""
        flags = [(x["answer"] == row["gold"]) + 2 * truncated + {True: 4, False: 8}.get(consistent, 0)
                 for x, truncated, consistent in completions]
        self.prompts.append(embed(f"prompt-{len(self.prompts)}", dict(
            question=asked, gold=row["gold"], error=row.get("error"), pictures=self.picture(folder, row["sample_id"]),
            completions=[x for x, _, _ in completions])))
        entry = (len(self.sources) - 1, step, str(row["sample_id"]), "".join(f"{flag:x}" for flag in flags))
        for column, value in zip(self.index.values(), entry, strict=True):
            column.append(value)

    def picture(self, folder, sample_id):
        """-> the number of the sample's embedded pictures: its strip of frames, if tools/frames.py wrote one, and its observation."""
        key, asked = (folder, sample_id), self.records.get(sample_id, {})
        if key not in self.pictures and self.room:
            uris = thumbnail(folder / "frames", f"{sample_id}.png", (1600, 140)) + thumbnail(
                self.root / "images", f"{asked.get('video_source')}/{asked.get('current_observation_basename')}", (200, 140))
            if uris:
                self.pictures[key] = len(self.pictures), embed(f"picture-{len(self.pictures)}", uris)
                self.room -= 1
                self.notes += [] if self.room else [f"{self.sources[-1]}: pictures of the first {MAX_PICTURED} samples alone"]
        return self.pictures.get(key, [None])[0]

    def html(self):
        several = len(self.runs) > 1  # then a chart has one metric, and its lines are the runs
        groups = [(title, keys) for title, keys in CHARTS.items() if not several or len(keys) == 1]
        groups += [(f"{title}: {key}", [key]) for title, keys in CHARTS.items() if several and len(keys) > 1 for key in keys]
        groups += [(key, [key]) for key in self.metrics if key not in itertools.chain(*CHARTS.values())]
        charts = [dict(title=title, other=title in self.metrics, series=[
            dict(label=self.runs[run] if several else key, colour=run if several else k) | series
            for k, key in enumerate(keys) for run, series in self.metrics.get(key, {}).items()]) for title, keys in groups]
        page = embed("page", dict(charts=[chart for chart in charts if chart["series"]], tiers=self.tiers, sources=self.sources,
                                  notes=self.notes, index=self.index))
        digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
        pictures = (text for _, text in self.pictures.values())
        return "".join([HTML.replace("DIGEST", digest), *pictures, *self.prompts, page, f"<script>{SCRIPT}</script>\n"])

def embed(name, value):
    """A value -> a script element of inert JSON, ASCII, in which no `<` can end or begin an element."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return f'<script type="application/json" id="{name}">{text}</script>\n'

HTML = r"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy"
      content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-DIGEST'">
<link rel="icon" href="data:,">
<title>Training and evaluation report</title>
<style>
:root { color-scheme: light dark; --page: #f7f7f5; --card: #fff; --ink: #1d2329; --soft: #656d76; --line: #dcdfe3; --good: #1a7f4b;
  --bad: #b3382c; --more: 37 99 235; --less: 217 95 2; --c0: #2563eb; --c1: #d95f02; --c2: #0f8a6d; --c3: #8e44ad; --c4: #a0761a }
@media (prefers-color-scheme: dark) { :root { --page: #14171a; --card: #1d2226; --ink: #e4e7ea; --soft: #99a2ab; --line: #363d44;
  --good: #4cc38a; --bad: #f0806f; --more: 96 150 255; --less: 245 140 60;
  --c0: #74a7ff; --c1: #ff9d57; --c2: #45c9a5; --c3: #c792ea; --c4: #dcb862 } }
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif }
main { max-width: 1200px; margin: auto; padding: 24px 16px 64px }
h1 { font-size: 24px; margin: 0 } h2 { font-size: 18px; margin: 40px 0 4px }
h3 { font-size: 14px; margin: 0; display: flex; justify-content: space-between; gap: 8px } h3 small { white-space: nowrap }
.soft, small { color: var(--soft); font-size: 13px; margin: 0 }
.grid { display: grid; gap: 12px; margin: 12px 0; grid-template-columns: repeat(auto-fill, minmax(min(100%, 270px), 1fr)) }
.charts { grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)) }
.card, article { background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: 10px 12px; min-width: 0 }
article { margin: 16px 0; padding: 14px 16px } article .card { background: none }
.charts .card > svg { display: block; width: 100%; cursor: crosshair } svg text { fill: var(--soft); font-size: 11px }
.reading, table { font-variant-numeric: tabular-nums }
.reading { display: flex; gap: 6px; font-size: 12px; line-height: 1.4; overflow-wrap: anywhere }
.reading b { margin-left: auto; font-weight: 600 } .reading svg { flex: none; width: 18px; height: 16px }
.scroll { overflow-x: auto } table { border-collapse: collapse; margin: 12px 0 }
th, td { text-align: left; vertical-align: top; padding: 8px 16px 8px 0; border-bottom: 1px solid var(--line); white-space: nowrap }
td small { display: block } td svg { display: block; width: 110px; height: 10px }
form, nav { display: flex; flex-wrap: wrap; gap: 12px; align-items: center; margin: 12px 0 }
nav { position: sticky; top: 0; background: var(--page); padding: 6px 0 } #prompts { scroll-margin-top: 60px }
label { font-size: 13px; color: var(--soft); max-width: 100% } label > * { display: block }
input, select, button { font: inherit; color: var(--ink); background: var(--card); border: 1px solid var(--line);
  border-radius: 4px; padding: 4px 8px; max-width: 100%; height: 34px } input { width: 110px } :disabled { color: var(--soft) }
:focus-visible { outline: 2px solid var(--c0); outline-offset: 1px }
.text { white-space: pre-wrap; overflow-wrap: anywhere; max-height: 26em; overflow-y: auto; margin: 8px 0 0 }
.card .text { font: 13px/1.6 ui-monospace, monospace } .text span { border-radius: 2px }
.asked { display: flex; flex-wrap: wrap; gap: 0 16px } .asked .text { flex: 1 1 400px }
.asked img { height: 120px; margin-top: 12px; max-width: 100%; object-fit: contain }
.right { border-left: 4px solid var(--good) } .wrong { border-left: 4px solid var(--bad) } .pale { opacity: .4 }
.right b { color: var(--good) } .wrong b { color: var(--bad) }
#less { background: rgb(var(--less) / .6); color: var(--ink) } #more { background: rgb(var(--more) / .6); color: var(--ink) }
</style>
<main>
<h1>Training and evaluation report</h1>
<section id="training"><h2>Training</h2>
<p class="soft">Point at a chart, or focus one and press ← or →, to read all of them at a step. Thin: as logged; thick: mean of the
last twentieth of the run. A gap is a value that is not finite.</p>
<div class="grid charts" id="charts"></div>
<details><summary>Other metrics</summary><div class="grid charts" id="others"></div></details></section>
<section id="tiers"><h2>Evaluation</h2>
<p class="soft">Accuracy in % with its 95 % interval, drawn from 0 to 100. Failed questions are in no denominator; no answer counts
as wrong.</p>
<div class="scroll"><table></table></div></section>
<section id="browser"><h2>Completions</h2>
<p class="soft">A token's colour is its log-ratio: <span id="less">less</span> or <span id="more">more</span> likely under the
policy that wrote it than under the reference, in full colour from a factor of e² ≈ 7.4. What a filter does not ask for is pale.</p>
<form>
<label>run or evaluation <select name="source"><option value="">all</select></label>
<label>step, or from-to <input name="step"></label>
<label>sample_id <input name="sample_id"></label>
<label>answer <select name="answer"><option value="">all<option>right<option>wrong</select></label>
<label>fits its thinking <select name="consistent"><option value="">all<option>yes<option>no</select></label>
<label>truncated <select name="truncated"><option value="">all<option>yes<option>no</select></label>
</form>
<nav><button id="previous">← previous</button><button id="next">next →</button><span id="count" aria-live="polite"></span></nav>
<div id="prompts"></div><ul class="soft" id="notes"></ul></section>
</main>
"""

SCRIPT = r"""
"use strict";
const $ = id => document.getElementById(id), data = id => JSON.parse($(id).textContent), page = data("page"), {index} = page;
const digits = (x, n = 4) => x === null ? "not finite" : String(+x.toPrecision(n));
function make(tag, attributes = {}, ...children) {  // strings among the children become text nodes, never markup
  const svg = ["svg", "path", "line", "circle", "text"].includes(tag) && "http://www.w3.org/2000/svg";
  const node = svg ? document.createElementNS(svg, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

// Curves. A drawing is 360 x 140; LEFT, RIGHT, TOP and BOTTOM bound its plot.
const LEFT = 56, RIGHT = 354, TOP = 10, BOTTOM = 118, cursors = [];
const hover = step => { for (const show of cursors) show(step); };
function chart({title, series}) {
  const steps = [...new Set(series.flatMap(s => s.steps))].sort((a, b) => a - b), first = steps[0], last = steps.at(-1);
  const values = series.flatMap(s => s.values).filter(v => v !== null);
  const low = values.reduce((a, b) => Math.min(a, b), Infinity), high = values.reduce((a, b) => Math.max(a, b), -Infinity);
  const x = step => last > first ? LEFT + (RIGHT - LEFT) * (step - first) / (last - first) : (LEFT + RIGHT) / 2;
  const y = value => high > low ? BOTTOM - (BOTTOM - TOP) * (value - low) / (high - low) : (TOP + BOTTOM) / 2;
  const path = (s, values) => values.map((value, i) => value === null ? "" :  // "h0" draws a lone value as a dot
    `${i && values[i - 1] !== null ? "L" : "M"}${x(s.steps[i]).toFixed(1)} ${y(value).toFixed(1)}h0`).join("");
  const smooth = values => values.map((value, i) => {
    const near = values.slice(Math.max(0, i + 1 - Math.ceil(values.length / 20)), i + 1).filter(v => v !== null);
    return value === null ? null : near.reduce((a, b) => a + b) / near.length;
  });
  const text = (x, y, anchor, words) => make("text", {x, y, "text-anchor": anchor}, words);
  const plot = make("svg", {viewBox: "0 0 360 140", role: "img", "aria-label": title, tabindex: 0},
    make("path", {d: `M${LEFT} ${TOP}V${BOTTOM}H${RIGHT}`, fill: "none", stroke: "var(--line)"}),
    text(LEFT, 134, "start", `step ${first}`), text(RIGHT, 134, "end", `${last}`));
  if (values.length) plot.append(text(LEFT - 4, TOP + 8, "end", digits(high, 2)));
  if (high > low) plot.append(text(LEFT - 4, BOTTOM, "end", digits(low, 2)));
  const readings = series.map(s => {
    const line = {fill: "none", stroke: `var(--c${s.colour % 5})`, "stroke-width": 2, "stroke-linecap": "round"}, value = make("b");
    plot.append(make("path", {...line, d: path(s, s.values), "stroke-width": 1, "stroke-opacity": .35}),
                make("path", {...line, d: path(s, smooth(s.values))}));
    const swatch = make("svg", {viewBox: "0 0 18 16"}, make("path", {...line, d: "M1 8H17"}));
    return {s, value, row: make("div", {class: "reading"}, swatch, s.label, value)};
  });
  const rule = plot.appendChild(make("line", {y1: TOP, y2: BOTTOM, stroke: "var(--ink)"})), at = make("small");
  const nearest = step => steps.reduce((a, b) => Math.abs(b - step) < Math.abs(a - step) ? b : a);
  cursors.push(step => {  // null is rest: the last step's values, and no rule
    const shown = nearest(step ?? last), place = steps.indexOf(shown);
    for (const end of ["x1", "x2"]) rule.setAttribute(end, x(shown));
    rule.setAttribute("visibility", step === null ? "hidden" : "visible");
    at.textContent = `step ${shown}`;
    for (const {s, value} of readings) value.textContent = s.steps.includes(shown) ? digits(s.values[s.steps.indexOf(shown)]) : "–";
    plot.onkeydown = event => {
      const move = {ArrowLeft: -1, ArrowRight: 1}[event.key];
      if (move) hover(steps[place + move] ?? shown);
    };
  });
  plot.onpointermove = event => {
    const box = plot.getBoundingClientRect(), place = (event.clientX - box.left) * 360 / box.width;
    hover(nearest(first + (last - first) * (place - LEFT) / (RIGHT - LEFT)));
  };
  plot.onpointerleave = plot.onblur = () => hover(null);
  return make("div", {class: "card"}, make("h3", {}, title, at), plot, ...readings.map(reading => reading.row));
}

// A cell of the table of tiers: summary.json's own numbers.
function tier(cell) {
  if (!cell) return make("td");
  const percent = ([value, low, high]) => `${(100 * value).toFixed(1)} (${(100 * low).toFixed()}–${(100 * high).toFixed()})`;
  const {accuracy, ...others} = cell.scores, [value, low, high] = accuracy.map(share => 5 + 100 * share);
  const differ = Object.entries(others).filter(([, score]) => score[0] !== accuracy[0]);
  return make("td", {}, percent(accuracy), make("svg", {viewBox: "0 0 110 10"},
      make("line", {x1: 5, x2: 105, y1: 5, y2: 5, stroke: "var(--line)"}),
      make("line", {x1: low, x2: high, y1: 5, y2: 5, stroke: "var(--c0)", "stroke-width": 2}),
      make("circle", {cx: value, cy: 5, r: 3.5, fill: "var(--c0)"})),
    ...[`${cell.correct} of ${cell.total} right`, `${cell.failed} failed, ${cell.no_answer} no answer`,
        ...differ.map(([key, score]) => `${key} ${percent(score)}`)].map(words => make("small", {}, words)));
}

// The browser. A completion's flags: 1 right, 2 truncated, 4 consistent, 8 not consistent.
const form = document.forms[0], flags = index.flags.map(row => [...row].map(digit => parseInt(digit, 16))), PAGE = 20;
let chosen, start;
function wanted(flag, {answer, truncated, consistent}) {
  return (!answer || (answer === "right") === !!(flag & 1)) && (!truncated || (truncated === "yes") === !!(flag & 2)) &&
    (!consistent || flag & (consistent === "yes" ? 4 : 8));
}
function completion(x, flag, state) {
  const text = make("div", {class: "text"}), right = flag & 1 ? "right" : "wrong";
  const facts = ["reward", "advantage", "kl", "entropy", "length"].filter(key => key in x).map(key => `${key} ${digits(x[key])}`);
  const found = [[2, "truncated"], [4, "fits its thinking"], [8, "does not fit its thinking"]].filter(([bit]) => flag & bit);
  [x.text].flat().forEach((piece, i) => {
    const ratio = x.log_ratio?.[i], span = text.appendChild(make("span", {}, piece));
    if (ratio === undefined) return;
    span.title = `log-ratio ${digits(ratio)}`;
    span.style.background = `rgb(var(--${ratio < 0 ? "less" : "more"}) / ${Math.min(1, Math.abs(ratio) / 2) * .6})`;
  });
  return make("div", {class: `card ${right} ${wanted(flag, state) ? "" : "pale"}`},
    make("b", {}, `${flag & 1 ? "✓" : "✗"} ${right}: ${x.answer ?? "no answer"}`),
    make("p", {class: "soft"}, [...facts, ...found.map(([, words]) => words)].join(" · ")), text);
}
function prompt(i, state) {
  const row = data(`prompt-${i}`), rights = flags[i].filter(flag => flag & 1).length;
  const pictures = row.pictures === null ? [] : data(`picture-${row.pictures}`);
  const facts = [page.sources[index.source[i]], ...index.step[i] === null ? [] : [`step ${index.step[i]}`],
    `sample_id ${index.sample_id[i]}`, `gold ${row.gold}`, row.error ? "failed" : `${rights} of ${flags[i].length} right`];
  return make("article", {}, make("h3", {}, facts.join(" · ")),
    make("div", {class: "asked"}, ...pictures.map(src => make("img", {src, alt: "frames of the question"})),
      make("div", {class: "text"}, [row.question, row.error].filter(words => words).join("\n"))),
    make("div", {class: "grid"}, ...row.completions.map((x, g) => completion(x, flags[i][g], state))));
}
function show(from) {
  const state = Object.fromEntries(new FormData(form)), end = Math.min(from + PAGE, chosen.length);
  start = from;
  $("prompts").replaceChildren(...chosen.slice(start, end).map(i => prompt(i, state)));
  $("previous").disabled = start === 0;
  $("next").disabled = end === chosen.length;
  $("count").textContent = chosen.length ? `prompts ${start + 1}–${end} of ${chosen.length}` : "no such prompt";
}
function filter() {  // what follows # in the address is the filters' state: the form writes it, this reads it
  const given = new URLSearchParams(location.hash.slice(1));
  for (const control of form.elements) control.value = given.get(control.name) ?? "";
  const state = Object.fromEntries(new FormData(form)), [from, to = from] = state.step.split("-");
  const narrow = state.answer || state.truncated || state.consistent;
  chosen = [...flags.keys()].filter(i => (!state.source || page.sources[index.source[i]] === state.source) &&
    (!from || index.step[i] !== null && index.step[i] >= +from && index.step[i] <= (+to || Infinity)) &&
    (!state.sample_id || index.sample_id[i] === state.sample_id) && (!narrow || flags[i].some(flag => wanted(flag, state))));
  show(0);
  hover(given.has("hover") ? +given.get("hover") : null);
}

for (const c of page.charts) $(c.other ? "others" : "charts").append(chart(c));
const columns = [...new Set(page.tiers.flatMap(row => Object.keys(row.cells)))];
document.querySelector("table").append(make("tr", {}, ...["", ...columns].map(name => make("th", {}, name))),
  ...page.tiers.map(row => make("tr", {}, make("th", {}, row.name), ...columns.map(name => tier(row.cells[name])))));
for (const [id, content] of Object.entries({training: page.charts, tiers: page.tiers, browser: page.sources}))
  $(id).hidden = !content.length;
$("notes").append(...page.notes.map(note => make("li", {}, note)));
form.elements.source.append(...page.sources.map(name => make("option", {}, name)));
form.elements.consistent.disabled = !flags.flat().some(flag => flag & 12);  // nothing says so of any completion
form.onsubmit = event => event.preventDefault();
form.oninput = () => location.replace(`#${new URLSearchParams([...new FormData(form)].filter(([, value]) => value))}`);
for (const [id, pages] of [["previous", -1], ["next", 1]])
  $(id).onclick = () => { show(start + pages * PAGE); $("prompts").scrollIntoView(); };
onhashchange = filter;
filter();
"""

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="a run's or an evaluation's folder")
    parser.add_argument("--output", type=Path, help="the file to write; default: report.html in the first folder")
    parser.add_argument("--data_root", type=Path, help="folder with annotations/ and images/; default: the run's own")
    args = parser.parse_args()
    report = Report(args.data_root)
    for folder in args.folders:
        if not any((folder / file).is_file() for file in ("metrics.jsonl", "summary.json")):
            fail(f"{folder}: no metrics.jsonl, as a training run's folder has, and no summary.json, as an evaluation's has")
    for folder in [folder for folder in args.folders if (folder / "metrics.jsonl").exists()]:
        report.add_run(folder)
    for folder in [folder for folder in args.folders if (folder / "summary.json").exists()]:
        report.add_evaluation(folder)
    output = args.output or args.folders[0] / "report.html"
    try:
        output.write_text(report.html(), encoding="utf-8")
    except OSError as error:
        fail(f"{output}: {error.strerror}; --output names another file")
    print(f"{output}: {len(report.runs)} runs, {len(report.tiers)} evaluations, {len(report.prompts)} prompts, "
          f"{output.stat().st_size / 2 ** 20:.1f} MiB")

if __name__ == "__main__":
    main()
