"""Does a model look while it answers, and does its thinking lead to its answer?

    python eval_video.py --toy --model runs/toy-grpo
    python tools/analyze.py --toy --model runs/toy-grpo --heatmaps 8

    python tools/analyze.py --model DIR --data_root DATA --reference models/Qwen2-VL-7B-Instruct

It comes after an evaluation and adds to its folder, which it finds by eval_video.py's own flags.
What the questions looked like (max_frames, fps, frame_size, ablate, seed) is not asked again: that
is taken from the folder's settings_<split>.json, whatever the flags say.

Visual attention: the response is put through the forward again. A token's share is what the row
that predicts it (the prompt's last row for the first token) gives to the prompt's video and image
tokens, mean over heads. Think tokens are those up to </think>, that tag included; answer tokens
hold a character between <answer> and </answer> (as `>B` does). Without the tag there are none.

Visual reliance: where the pixels enter. For each token KL(p || q) in nats, at temperature 1: p is
the model's distribution in that place, q its distribution there if the prompt is blinded. Blinded
means every pixel of video and image the mean colour, with grids, tokens and positions as they are;
the response up to there is the same for both. So it is 0 where the words alone decide. Means over
think and answer tokens as above, and over the letter's (of a letter behind a thinking).

Consistency: the prompt and the response up to its letter are given, and the choices' letters are
scored, renormalised among them. p_answer is the probability of the letter given, and the response
is consistent if no other letter has more. With --reference that model judges. Without, the model is
its own judge, twice: as it is (p_answer; greedy, it agrees with itself) and blinded
(p_answer_blind), where only the chain can lead to the letter; there blind decides on `consistent`.

Written: analysis_<split>.jsonl, a line a sample; heatmaps/<split>_<sample_id>.png; the means over a
split as "analysis" in summary.json, and as a table on stdout.

Dimensions: C tokens of a response, N rows of it and its prompt, V visual tokens, L layers, H heads,
K key heads, E a head's width.
"""

import itertools
import json
import math
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from tqdm import tqdm
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import eval_video as e
from grpo_video import gather_rows


@dataclass
class Config(e.Config):
    """eval_video.py's settings, and two more."""

    reference: str = ""  # folder of the model to judge thinking; default: the model itself, blind
    heatmaps: int = 0  # pictures of the attention to draw of each split, at least 0


# What the questions looked like: the evaluation's own.
LOOKS = ("max_frames", "fps", "frame_size", "video_reader", "ablate", "seed")


# ---- The run -------------------------------------------------------------------------------------
def main():
    e.__doc__ = __doc__  # what --help describes
    c = e.parse_config(Config, e.TOY)
    device, dtype = e.set_up(c.toy)

    # What was evaluated: everything is looked at before the first model is loaded.
    source = e.find_model(c.model)
    folder = e.folder_of(c)
    splits = [split for split in c.splits if split != "LVB"]
    if c.longvideobench:
        splits.append("LVB")
    summary = read_summary(folder, splits)
    answers = {split: read_answers(folder, split) for split in splits}
    settings = check_settings(c, folder, splits, source)
    questions = {split: load_questions(c, split, settings[split]) for split in splits}
    tokenizer = e.load_tokenizer(source)
    check_reference(c.reference, tokenizer)
    e.lock(folder)

    # The models.
    model = e.load_model(source, device, dtype)
    reference = None
    if c.reference:
        reference = e.load_model(Path(c.reference), device, dtype)

    # The analysis.
    found = {}
    for split in splits:
        c = replace(c, **{key: settings[split][key] for key in LOOKS})
        records = {record["sample_id"]: record for record in questions[split]}
        rows = [row for row in answers[split] if row["sample_id"] in records]
        found[split] = analyze(c, split, rows, records, model, reference, tokenizer, folder)
        summary[split]["analysis"] = found[split]
    if e.RANK == 0:
        (folder / "summary.json").write_text(json.dumps(summary, indent=1))
        print(table(found))
    dist.destroy_process_group()


def read_summary(folder, splits):
    """-> summary.json of an evaluation that went through all of the splits."""
    path = folder / "summary.json"
    summary = json.loads(path.read_text()) if path.is_file() else {}

    absent = []
    for split in splits:
        files = (folder / f"predictions_{split}.jsonl", folder / f"settings_{split}.json")
        if split not in summary or not all(file.is_file() for file in files):
            absent.append(split)
    if absent:
        e.fail(
            f"--output_dir {folder}: holds no predictions of {', '.join(absent)} "
            "or no summary of them: run eval_video.py first"
        )
    return summary


def read_answers(folder, split):
    """-> a split's rows of predictions. Those of an older version lack what is needed here."""
    path = folder / f"predictions_{split}.jsonl"
    rows = e.read_rows(path)
    if any("ids" not in row for row in rows if not row["error"]):
        e.fail(
            f"{path} is an older version's and lacks the responses' token ids: delete that folder "
            "or give another --output_dir, and run eval_video.py again"
        )
    return rows


def check_settings(c, folder, splits, source):
    """-> {split: its settings}, all of them an evaluation's of these weights."""
    weights = e.weights_hash(source)

    settings = {}
    for split in splits:
        text = (folder / f"settings_{split}.json").read_text()
        settings[split] = dict(video_reader="decord") | json.loads(text)  # an older version's
        if settings[split]["model_sha256"] != weights:
            e.fail(
                f"--output_dir {folder}: its {split} was answered by another model's weights than "
                f"those in --model {c.model}"
            )
    return settings


def load_questions(c, split, settings):
    """-> a split's records, the first --limit, less what --ablate took away. They must be those
    that were asked."""
    place = f"--data_root {c.data_root}"
    if split == "LVB":
        place = f"--longvideobench {c.longvideobench}"
        records = e.load_longvideobench(Path(c.longvideobench))
    else:
        root = Path(c.data_root)
        records = e.load_records(root / f"annotations/{split}.jsonl", root)

    records, _ = e.with_media(records, c.skip_missing)
    if settings["data_sha256"] != e.questions_hash(records, settings["seed"]):
        e.fail(f"{place}: its {split} has other questions than those that were answered")
    return [e.ablated(record, settings["ablate"]) for record in records[: c.limit or None]]


def check_reference(folder, tokenizer):
    """--reference must be a checkpoint that reads the same tokens."""
    if not folder:
        return
    if not Path(folder, "config.json").is_file():
        e.fail(f"--reference {folder}: holds no config.json, as a Qwen2-VL checkpoint does")
    if AutoTokenizer.from_pretrained(folder).get_vocab() != tokenizer.get_vocab():
        e.fail(f"--reference {folder}: its vocabulary is not --model's, must be the same")


# ---- A split -------------------------------------------------------------------------------------
@torch.no_grad()
def analyze(c, split, rows, records, model, reference, tokenizer, folder):
    """A split's rows of predictions and {sample_id: record} -> its summary; called on every rank.

    Samples that failed, then or now, are counted as skipped."""
    answered = [row for row in rows if not row["error"]]
    mine = list(enumerate(answered))[e.RANK :: e.WORLD]
    my_records = [records[row["sample_id"]] for _, row in mine]
    pictures = folder / "heatmaps"
    if c.heatmaps:
        pictures.mkdir(exist_ok=True)

    dataset = e.VideoDataset(my_records, tokenizer, model.config, c, shuffle=False)
    batches = [[position] for position in range(len(mine))]
    loader = e.load_batches(dataset, batches, c.dataloader_num_workers)
    bar = tqdm(loader, desc=f"{split}, analysed", total=len(mine), disable=e.RANK > 0)
    found = []
    for [sample], (place, row), record in zip(bar, mine, my_records):
        if "error" in sample:
            continue
        if c.ablate == "shuffle_frames":
            sample = e.shuffle_frames(sample)
        name = re.sub(r"[^\w.-]", "_", f"{split}_{row['sample_id']}")  # an id may hold a slash
        picture = pictures / f"{name}.png" if place < c.heatmaps else None
        kinds = [kind for kind, _ in record["media"]]
        analysed = analyze_sample(model, reference, tokenizer, row, sample, kinds, picture)
        found.append((place, analysed))

    in_order = sorted(gather_rows([found]), key=lambda pair: pair[0])
    found = [row for _, row in in_order]
    if e.RANK == 0:
        lines = [json.dumps(row) + "\n" for row in found]
        (folder / f"analysis_{split}.jsonl").write_text("".join(lines))
    return sum_up(found, len(rows) - len(found))


def analyze_sample(model, reference, tokenizer, row, sample, kinds, picture):
    """A row of predictions with its ids and its sample, whose media are of these kinds -> a row of
    analysis_<split>.jsonl. picture: path of a heatmap, or None."""
    weight = model.model.embed_tokens.weight
    vision = model.config.vision_config
    prompts = e.Prompts.collate([sample], weight.device, weight.dtype)
    letters = "ABCDE"[: len(sample["choices"])]

    # The response's parts.
    ids = row["ids"]
    text, places = token_places(tokenizer, ids)
    letter = e.extract_answer(text, sample["choices"])
    think, answer, spot = sections(text, letter)
    think = touching(places, think)
    answer = touching(places, answer)

    weights = visual_attention(model, prompts, ids).cpu()
    reliance = visual_reliance(model, prompts, ids).cpu()
    if picture and sample["grids"]:
        shown = weights[:, answer] if answer.any() else weights  # without an answer: by all tokens
        caption = f"{picture.stem}   gold {sample['gold']}   predicted {letter or 'none'}"
        heat = shown.mean((0, 1))
        heatmap(sample["patches"], sample["grids"], heat, vision, caption).save(picture)
    return dict(
        sample_id=row["sample_id"],
        correct=letter == sample["gold"],
        **consistency(
            model, reference, tokenizer, prompts, ids, places, text, spot, letter, letters
        ),
        attention=attention_shares(
            weights, sample["grids"], kinds, think, answer, vision.spatial_merge_size
        ),
        visual_reliance=dict(
            overall=reliance.mean().item(),
            think=mean_of(reliance, think),
            answer=mean_of(reliance, answer),
            letter=mean_of(reliance, touching(places, spot)),
            tokens=[text[begin:end] for begin, end in places],
            nats=reliance.tolist(),
        ),
    )


def sum_up(found, skipped):
    """Rows of analysis_<split>.jsonl -> their means over samples, and the accuracy of the
    consistent and of the others."""
    shares = [row["attention"] for row in found]
    attention = {}
    for key in ("overall", "think", "answer", "image"):
        attention[key] = mean(x[key] for x in shares)
    for key in ("layers", "frames"):  # a mean for each layer, and for each pair of frames
        columns = itertools.zip_longest(*(x[key] for x in shares))
        attention[key] = [mean(column) for column in columns]

    reliance = {}
    for key in ("overall", "think", "answer", "letter"):
        reliance[key] = mean(row["visual_reliance"][key] for row in found)

    summary = dict(
        samples=len(found), skipped=skipped, attention=attention, visual_reliance=reliance
    )
    for key in ("consistent", "p_answer", "p_answer_blind"):
        summary[key] = mean(row.get(key) for row in found)
    for name, wanted in (("consistent", True), ("inconsistent", False)):
        rights = [row["correct"] for row in found if row["consistent"] is wanted]
        summary[f"if_{name}"] = dict(
            accuracy=mean(rights),
            correct=sum(rights),
            total=len(rights),
            ci95=e.wilson(sum(rights), len(rights)),
        )
    return summary


def mean(values):
    """Of those that are there; None if none is."""
    values = [value for value in values if value is not None]
    return sum(values) / len(values) if values else None


# ---- Visual attention ----------------------------------------------------------------------------
def visual_attention(model, prompts, ids):
    """One prompt and the ids of a response -> [L, C, V] fp32: what each token, in the row that
    predicts it, gives to the prompt's visual tokens, mean over heads.

    Each layer's weights are cut to these at once, and its output is the one it always has."""
    # In the prompt alone: a placeholder that the model writes has no pixels.
    placeholders = [model.config.image_token_id, model.config.video_token_id]
    placeholders = torch.tensor(placeholders, device=prompts.ids.device)
    visual = torch.isin(prompts.ids[0], placeholders).nonzero()[:, 0]  # [V]
    layers = []

    def watch(_, inputs):
        *states, attend = inputs

        def watched(q, k, v):
            weights = explicit_weights(q, k, len(ids))  # [H, C, N]
            layers.append(weights[:, :, visual].mean(0))
            return attend(q, k, v)

        return *states, watched

    hooks = [layer.register_forward_pre_hook(watch) for layer in model.model.layers]
    model.completion_states(prompts, torch.tensor([[ids]], device=prompts.ids.device))
    for hook in hooks:
        hook.remove()
    return torch.stack(layers)


def explicit_weights(q, k, C):
    """q [N, H, E], k [N, K, E] -> softmax(q k^T / sqrt(E)), [H, C, N] fp32, of the last C rows, a
    completion's; causal."""
    N, K, E = k.shape
    k = k.repeat_interleave(q.shape[1] // K, dim=1)  # [N, H, E]: a key head serves H / K heads
    scores = torch.einsum("che,nhe->hcn", q[-C:].float(), k.float()) / math.sqrt(E)
    # Row c sees the prompt, and its completion up to itself.
    seen = torch.ones(C, N, dtype=torch.bool, device=k.device).tril(N - C)
    return scores.masked_fill(~seen, -math.inf).softmax(-1)


def attention_shares(weights, grids, kinds, think, answer, merge):
    """weights [L, C, V], the kinds ("video", "image") of the grids, tokens' masks think and answer
    [C] -> a row's `attention`."""
    sizes = []
    slice_kinds = []
    for kind, (t, h, w) in zip(kinds, grids):  # a slice is a pair of frames, or an image
        sizes += [h * w // merge**2] * t
        slice_kinds += [kind] * t
    slices = [part.sum().item() for part in weights.mean((0, 1)).split(sizes)]
    image = [share for share, kind in zip(slices, slice_kinds) if kind == "image"]

    shares = weights.sum(2)  # [L, C]
    return dict(
        layers=shares.mean(1).tolist(),
        overall=shares.mean().item(),
        think=mean_of(shares, think),
        answer=mean_of(shares, answer),
        frames=[share for share, kind in zip(slices, slice_kinds) if kind == "video"],
        image=sum(image) if image else None,
    )


def mean_of(values, part):
    """values [..., C] -> their mean over the tokens of a part, [C] bool; None if it has none."""
    return values[..., part].mean().item() if part.any() else None


# ---- Visual reliance -----------------------------------------------------------------------------
def visual_reliance(model, prompts, ids):
    """One prompt and the ids of a response -> [C] fp32: of each token KL(p || q) in nats, where p
    is the model's distribution over the vocabulary and q the blinded one.

    Both have read the same words, so what parts them comes from the pixels."""
    completion = torch.tensor([[ids]], device=prompts.ids.device)
    seen = model.completion_states(prompts, completion)
    blind = model.completion_states(blinded(prompts), completion)

    # 64 rows at a time: those of a long response would be 300 MB of logits each way.
    found = []
    for seen_rows, blind_rows in zip(seen.split(64), blind.split(64)):
        log_p = model.logits(seen_rows).log_softmax(-1)  # [64, vocabulary]
        log_q = model.logits(blind_rows).log_softmax(-1)
        found.append((log_p.exp() * (log_p - log_q)).sum(-1))
    return torch.cat(found)


# ---- The response's parts ------------------------------------------------------------------------
def token_places(tokenizer, ids):
    """ids -> (text without special tokens, the characters [begin, end) of each token); a special
    token has none."""
    texts = [tokenizer.decode(ids[:n], skip_special_tokens=True) for n in range(len(ids) + 1)]
    ends = [len(text) for text in texts]
    return texts[-1], list(itertools.pairwise(ends))


def sections(text, letter):
    """A response and its letter -> the characters [begin, end) of its thinking, its answer and,
    where both a letter and a thinking are there, that letter behind the thinking.

    What is absent is empty. An answer that is cut off goes to the end."""
    thought, tag, rest = text.rpartition("</think>")
    think = len(thought + tag)
    before, opened, answer = rest.partition("<answer>")
    start = think + len(before + opened)
    stop = start + len(answer.partition("</answer>")[0])

    spot = (0, 0)
    if letter and tag:
        begin, end = (start, stop) if opened else (think, len(text))
        part = text[begin:end]
        standing = rf"(?<!\w){letter}(?!\w)"
        # As it is written, else as small: "is a wall: A".
        found = re.search(standing, part) or re.search(standing, part, re.I)
        if found:
            spot = (begin + found.start(), begin + found.end())
    return (0, think), (start, stop), spot


def touching(places, section):
    """-> [C] bool, the tokens with a character in the section."""
    first, last = section
    return torch.tensor([max(begin, first) < min(end, last) for begin, end in places])


# ---- Consistency ---------------------------------------------------------------------------------
def consistency(model, reference, tokenizer, prompts, ids, places, text, spot, letter, letters):
    """-> consistent, p_answer and, without a reference, p_answer_blind, as the module's docstring
    defines them. All None where `spot`, the letter's characters, is empty."""
    judge = reference or model
    views = dict(p_answer=prompts)
    if not reference:
        views["p_answer_blind"] = blinded(prompts)
    holding = touching(places, spot).nonzero()[:, 0].tolist()
    if not holding:
        return dict(consistent=None) | dict.fromkeys(views)

    # The letter's token, with each letter in turn.
    begin, end = places[holding[0]]
    small = text[spot[0]].islower()
    pieces = []
    for other in letters:
        written = other.lower() if small else other
        piece = text[begin : spot[0]] + written + text[spot[1] : end]
        pieces.append(None if other == letter else piece)

    given = letters.index(letter)
    found = {}
    for name, view in views.items():
        probs = letter_probs(judge, tokenizer, view, ids, holding[0], pieces)
        found[name] = probs[given].item()
        consistent = bool(probs[given] == probs.max())  # the last view decides
    return dict(consistent=consistent) | found


def blinded(prompts):
    """The same prompt with every pixel the mean colour: its tokens and their positions stay."""
    return e.Prompts(**vars(prompts) | dict(patches=torch.zeros_like(prompts.patches)))


def letter_probs(model, tokenizer, prompts, ids, place, pieces):
    """p of each letter at token `place` of a response, [letters]. pieces: that token's text with
    each letter in turn; None stands for the token itself.

    Other letters may take several tokens there (`>E` where `>B` is one), whose probabilities
    multiply."""
    tails = []
    for piece in pieces:
        if piece is None:
            tails.append(ids[place : place + 1])
        else:
            tails.append(tokenizer(piece, add_special_tokens=False).input_ids)

    rows = [torch.tensor(ids[:place] + tail, device=prompts.ids.device) for tail in tails]
    rows = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    logp = model(prompts, rows[None])[0, :, place:]  # [letters, tokens]
    scores = [row[: len(tail)].sum() for row, tail in zip(logp, tails)]
    return torch.stack(scores).softmax(0)


# ---- Heatmaps ------------------------------------------------------------------------------------
def heatmap(patches, grids, heat, vision, caption):
    """patches [N, 1176] uint8 and heat [V] -> image: a column for each pair of frames (its first
    one) in the prompt's order, the still image last, the caption below.

    Each merged patch is the redder the more heat it has, 70 % at the maximum."""
    tp = vision.temporal_patch_size
    p = vision.patch_size
    m = vision.spatial_merge_size
    sizes = [math.prod(grid) for grid in grids]
    merged = [size // m**2 for size in sizes]
    red = torch.tensor([255.0, 0.0, 0.0])
    columns = []
    for (t, h, w), x, part in zip(grids, patches.split(sizes), heat.split(merged)):
        x = x.view(t, h // m, w // m, m, m, 3, tp, p, p)
        x = x.permute(0, 6, 1, 3, 7, 2, 4, 8, 5)  # to_patches, backwards
        frames = x.reshape(t, tp, h * p, w * p, 3)[:, 0].float()
        weight = 0.7 * (part / heat.max()).view(t, h // m, w // m, 1)
        weight = weight.repeat_interleave(m * p, 1).repeat_interleave(m * p, 2)  # of each pixel
        columns.extend(frames * (1 - weight) + weight * red)

    strip = Image.fromarray(torch.cat(columns, dim=1).round().byte().numpy())
    # A small image may be narrower than its caption.
    width = math.ceil(ImageDraw.Draw(strip).textlength(caption)) + 8
    picture = Image.new("RGB", (max(strip.width, width), strip.height + 16), "white")
    picture.paste(strip)
    ImageDraw.Draw(picture).text((4, strip.height + 2), caption, fill="black")
    return picture


# ---- The table -----------------------------------------------------------------------------------
HEADS = [
    "split",
    "samples",
    "attention on vision",
    "think",
    "answer",
    "reliance on vision, nats: think",
    "answer",
    "letter",
    "consistent",
    "accuracy if consistent",
    "if inconsistent",
    "p_answer",
    "p_answer_blind",
]


def table(summaries):
    """{split: what analyze returned} -> Markdown; shares and accuracies in %, with 95 %
    intervals."""
    lines = [HEADS, ["---"] * len(HEADS)]
    for split, x in summaries.items():
        line = [split, str(x["samples"])]
        line += [percent(x["attention"][key]) for key in ("overall", "think", "answer")]
        line += [nats(x["visual_reliance"][key]) for key in ("think", "answer", "letter")]
        line.append(percent(x["consistent"]))
        line += [accuracy(x[key]) for key in ("if_consistent", "if_inconsistent")]
        line += [percent(x[key]) for key in ("p_answer", "p_answer_blind")]
        lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def percent(value):
    return "" if value is None else f"{100 * value:.1f}"


def nats(value):
    return "" if value is None else f"{value:.2f}"


def accuracy(group):
    """A summary's if_consistent or if_inconsistent -> a cell."""
    if not group["total"]:
        return ""
    low, high = group["ci95"]
    interval = f"{100 * low:.0f}–{100 * high:.0f}"
    return f"{percent(group['accuracy'])} ({interval}, n = {group['total']})"


if __name__ == "__main__":
    main()
