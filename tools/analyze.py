"""Does a model look while it answers, and does its thinking lead to its answer? eval_video.py's --analyze runs this.

    python eval_video.py --toy --model runs/toy-grpo --analyze --heatmaps 8 --output_dir runs/looked
    python eval_video.py --model DIR --analyze --reference models/Qwen2-VL-7B-Instruct

Visual attention: the response is put through the forward again. A token's share is what the row that predicts it (the prompt's last
row for the first token) gives to the prompt's video and image tokens, mean over heads. Think tokens are those up to </think>, that
tag included; answer tokens hold a character between <answer> and </answer> (as `>B` does). Without the tag there are none.

Consistency: the prompt and the response up to its letter are given, and the choices' letters are scored, renormalised among them.
p_answer is the probability of the letter given, and the response is consistent if no other letter has more. With --reference that
model judges. Without, the model is its own judge, twice: as it is (p_answer; greedy, it agrees with itself) and blind
(p_answer_blind, every pixel the mean colour), where only the chain can lead to the letter; there blind decides on `consistent`.

Written: analysis_<split>.jsonl, a line a sample; heatmaps/<split>_<sample_id>.png; the means over a split in summary.json.
Dimensions: C tokens of a response, N rows of it and its prompt, V visual tokens, L layers, H heads, K key heads, E a head's width.
"""

import itertools
import json
import math
import re
from functools import cache
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from tqdm import tqdm
from transformers import AutoTokenizer

import eval_video as e


# ---- Visual attention ------------------------------------------------------------------------------------------------------
def explicit_weights(q, k, C):
    """q [N, H, E], k [N, K, E], the last C rows a completion's -> its rows' softmax(q k^T / sqrt(E)), [H, C, N] fp32, causal."""
    k = k.repeat_interleave(
        q.shape[1] // k.shape[1], dim=1
    )  # [N, H, E]: a key head serves H / K heads
    scores = torch.einsum("che,nhe->hcn", q[-C:].float(), k.float()) / math.sqrt(q.shape[2])
    seen = torch.ones(C, len(k), dtype=torch.bool, device=k.device).tril(
        len(k) - C
    )  # row c: the prompt, itself up to c
    return scores.masked_fill(~seen, -math.inf).softmax(-1)


def visual_attention(model, prompts, ids):
    """One prompt and the ids of a response -> [L, C, V] fp32: what each token, in the row that predicts it, gives to the prompt's
    visual tokens, mean over heads. Each layer's weights are cut to these at once, and its output is the one it always has."""
    config, layers = model.config, []
    own = torch.isin(
        prompts.ids[0],
        torch.tensor([config.image_token_id, config.video_token_id], device=prompts.ids.device),
    )
    visual = own.nonzero()[
        :, 0
    ]  # in the prompt alone: a placeholder that the model writes has no pixels

    def watch(_, inputs):
        *states, attend = inputs

        def watched(q, k, v):
            layers.append(explicit_weights(q, k, len(ids))[:, :, visual].mean(0))
            return attend(q, k, v)

        return *states, watched

    hooks = [layer.register_forward_pre_hook(watch) for layer in model.model.layers]
    model.completion_states(prompts, torch.tensor([[ids]], device=prompts.ids.device))
    for hook in hooks:
        hook.remove()
    return torch.stack(layers)


def attention_shares(weights, grids, kinds, think, answer, merge):
    """weights [L, C, V], the kinds ("video", "image") of the grids, tokens' masks think and answer [C] -> a row's `attention`."""
    shares = weights.sum(2)  # [L, C]
    sizes = [h * w // merge**2 for t, h, w in grids for _ in range(t)]
    parts = [
        part.sum().item() for part in weights.mean((0, 1)).split(sizes)
    ]  # of each pair of frames
    of_kind = [kind for kind, (t, _, _) in zip(kinds, grids) for _ in range(t)]
    frames, image = (
        [part for part, found in zip(parts, of_kind) if found == kind]
        for kind in ("video", "image")
    )
    think, answer = (
        shares[:, mask].mean().item() if mask.any() else None for mask in (think, answer)
    )
    return dict(
        layers=shares.mean(1).tolist(),
        overall=shares.mean().item(),
        think=think,
        answer=answer,
        frames=frames,
        image=sum(image) if image else None,
    )


# ---- The response's parts --------------------------------------------------------------------------------------------------
def token_places(tokenizer, ids):
    """ids -> (text without special tokens, the characters [begin, end) of each token); a special token has none."""
    texts = [tokenizer.decode(ids[:n], skip_special_tokens=True) for n in range(len(ids) + 1)]
    return texts[-1], list(itertools.pairwise(map(len, texts)))


def sections(text, letter):
    """A response and its letter -> the characters [begin, end) of its thinking, its answer and, where both a letter and a thinking
    are there, that letter behind the thinking. What is absent is empty. An answer that is cut off goes to the end."""
    thought, tag, rest = text.rpartition("</think>")
    think = len(thought + tag)
    before, opened, answer = rest.partition("<answer>")
    start = think + len(before + opened)
    stop = start + len(answer.partition("</answer>")[0])
    begin, end = (start, stop) if opened else (think, len(text))
    standing = rf"(?<!\w){letter}(?!\w)"  # as it is written, else as small: "is a wall: A"
    found = (
        re.search(standing, text[begin:end]) or re.search(standing, text[begin:end], re.I)
        if letter and tag
        else None
    )
    return (
        (0, think),
        (start, stop),
        (begin + found.start(), begin + found.end()) if found else (0, 0),
    )


def touching(places, section):
    """-> [C] bool, the tokens with a character in the section."""
    return torch.tensor([max(begin, section[0]) < min(end, section[1]) for begin, end in places])


# ---- Consistency -----------------------------------------------------------------------------------------------------------
def letter_probs(model, tokenizer, prompts, ids, place, pieces):
    """p of each letter at token `place` of a response, [letters]. pieces: that token's text with each letter in turn; None stands
    for the token itself. Other letters may take several tokens there (`>E` where `>B` is one), whose probabilities multiply."""
    tails = [
        ids[place : place + 1]
        if piece is None
        else tokenizer(piece, add_special_tokens=False).input_ids
        for piece in pieces
    ]
    rows = [torch.tensor(ids[:place] + tail, device=prompts.ids.device) for tail in tails]
    logp = model(prompts, torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)[None])[
        0, :, place:
    ]  # [letters, tokens]
    return torch.stack([row[: len(tail)].sum() for row, tail in zip(logp, tails)]).softmax(0)


def blinded(prompts):
    """The same prompt with every pixel the mean colour: its tokens and their positions stay."""
    return e.Prompts(**vars(prompts) | dict(patches=torch.zeros_like(prompts.patches)))


def consistency(model, reference, tokenizer, prompts, ids, places, text, spot, letter, letters):
    """-> consistent, p_answer and, without a reference, p_answer_blind, as the module's docstring defines them. All None where
    `spot`, the letter's characters, is empty."""
    place = next(iter(touching(places, spot).nonzero()[:, 0].tolist()), None)
    if place is None:
        return dict(
            consistent=None, p_answer=None, **{} if reference else dict(p_answer_blind=None)
        )
    (begin, end), small = places[place], text[spot[0]].islower()
    pieces = [
        None
        if other == letter
        else text[begin : spot[0]] + (other.lower() if small else other) + text[spot[1] : end]
        for other in letters
    ]
    views = (
        dict(p_answer=prompts)
        if reference
        else dict(p_answer=prompts, p_answer_blind=blinded(prompts))
    )
    probs = {
        name: letter_probs(reference or model, tokenizer, view, ids, place, pieces)
        for name, view in views.items()
    }
    given, judge = letters.index(letter), [*probs.values()][-1]
    return dict(
        consistent=bool(judge[given] == judge.max()),
        **{name: p[given].item() for name, p in probs.items()},
    )


@cache  # one for all splits
def load_reference(folder, device, dtype):
    """--reference DIR -> (model, vocabulary)."""
    if not Path(folder, "config.json").is_file():
        e.fail(f"--reference {folder}: holds no config.json, as a Qwen2-VL checkpoint does")
    return e.load_model(Path(folder), device, dtype), AutoTokenizer.from_pretrained(
        folder
    ).get_vocab()


# ---- Heatmaps --------------------------------------------------------------------------------------------------------------
def heatmap(patches, grids, heat, vision, caption):
    """patches [N, 1176] uint8 and heat [V] -> image: a column for each pair of frames (its first one) in the prompt's order, the
    still image last, each merged patch the redder the more heat it has, 70 % at the maximum; the caption is below."""
    tp, p, m, columns = vision.temporal_patch_size, vision.patch_size, vision.spatial_merge_size, []
    sizes = [math.prod(grid) for grid in grids]
    for (t, h, w), x, part in zip(
        grids, patches.split(sizes), heat.split([size // m**2 for size in sizes])
    ):
        x = x.view(t, h // m, w // m, m, m, 3, tp, p, p).permute(
            0, 6, 1, 3, 7, 2, 4, 8, 5
        )  # to_patches, backwards
        frames = x.reshape(t, tp, h * p, w * p, 3)[:, 0].float()
        weight = 0.7 * (part / heat.max()).view(t, h // m, w // m, 1).repeat_interleave(
            m * p, 1
        ).repeat_interleave(m * p, 2)
        columns += frames * (1 - weight) + weight * torch.tensor([255.0, 0.0, 0.0])
    strip = Image.fromarray(torch.cat(columns, dim=1).round().byte().numpy())
    width = (
        math.ceil(ImageDraw.Draw(strip).textlength(caption)) + 8
    )  # a small image may be narrower than its caption
    picture = Image.new("RGB", (max(strip.width, width), strip.height + 16), "white")
    picture.paste(strip)
    ImageDraw.Draw(picture).text((4, strip.height + 2), caption, fill="black")
    return picture


# ---- A split ---------------------------------------------------------------------------------------------------------------
def analyze_sample(model, reference, tokenizer, row, sample, kinds, picture):
    """A row of predictions with its ids and its sample -> a row of analysis_<split>.jsonl. picture: path of a heatmap, or None."""
    weight, vision, letters = (
        model.model.embed_tokens.weight,
        model.config.vision_config,
        "ABCDE"[: len(sample["choices"])],
    )
    prompts, ids = e.Prompts.collate([sample], weight.device, weight.dtype), row["ids"]
    text, places = token_places(tokenizer, ids)
    letter = e.extract_answer(text, letters)
    *parts, spot = sections(text, letter)
    think, answer = (touching(places, part) for part in parts)
    weights = visual_attention(model, prompts, ids).cpu()
    if picture and sample["grids"]:  # without an answer: by all tokens
        heat = (weights[:, answer] if answer.any() else weights).mean((0, 1))
        caption = f"{picture.stem}   gold {sample['gold']}   predicted {letter or 'none'}"
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
    )


def mean(values):
    """Of those that are there; None if none is."""
    values = [value for value in values if value is not None]
    return sum(values) / len(values) if values else None


def sum_up(found, skipped):
    """Rows of analysis_<split>.jsonl -> their means over samples, and the accuracy of the consistent and of the others."""
    shares = [row["attention"] for row in found]
    attention = {
        key: mean(x[key] for x in shares) for key in ("overall", "think", "answer", "image")
    }
    attention |= {
        key: [*map(mean, itertools.zip_longest(*(x[key] for x in shares)))]
        for key in ("layers", "frames")
    }
    summary = {
        key: mean(row.get(key) for row in found)
        for key in ("consistent", "p_answer", "p_answer_blind")
    }
    for name, wanted in (("consistent", True), ("inconsistent", False)):
        rights = [row["correct"] for row in found if row["consistent"] is wanted]
        summary[f"if_{name}"] = dict(
            accuracy=mean(rights),
            correct=sum(rights),
            total=len(rights),
            ci95=e.wilson(sum(rights), len(rights)),
        )
    return dict(samples=len(found), skipped=skipped, attention=attention) | summary


@torch.no_grad()
def analyze(c, split, rows, records, model, tokenizer, folder):
    """A split's rows of predictions and {sample_id: record} -> its summary; called on every rank. Samples that failed, then or
    now, are counted as skipped."""
    answered = [row for row in rows if not row["error"]]
    if any("ids" not in row for row in answered):
        e.fail(
            f"--analyze: {folder}/predictions_{split}.jsonl is an older version's and lacks the responses' token ids: "
            "delete that folder or give another --output_dir"
        )
    weight, reference, pictures = model.model.embed_tokens.weight, None, folder / "heatmaps"
    if c.reference:
        reference, vocabulary = load_reference(c.reference, weight.device, weight.dtype)
        if vocabulary != tokenizer.get_vocab():
            e.fail(f"--reference {c.reference}: its vocabulary is not --model's, must be the same")
    if c.heatmaps:
        pictures.mkdir(exist_ok=True)
    mine = list(enumerate(answered))[e.RANK :: e.WORLD]
    dataset = (e.ShuffledFrames if c.ablate == "shuffle_frames" else e.VideoDataset)(
        [records[row["sample_id"]] for _, row in mine], tokenizer, model.config, c, False
    )
    samples, found = (
        e.load_batches(dataset, [[i] for i in range(len(mine))], c.dataloader_num_workers),
        [],
    )
    for [sample], (place, row) in zip(
        tqdm(samples, desc=f"{split}, analysed", disable=e.RANK > 0), mine
    ):
        if "error" not in sample:
            name = re.sub(r"[^\w.-]", "_", f"{split}_{row['sample_id']}")  # an id may hold a slash
            kinds = [kind for kind, _ in records[row["sample_id"]]["media"]]
            picture = pictures / f"{name}.png" if place < c.heatmaps else None
            found.append(
                (place, analyze_sample(model, reference, tokenizer, row, sample, kinds, picture))
            )
    found = [row for _, row in sorted(e.gather_rows(found), key=lambda pair: pair[0])]
    if e.RANK == 0:
        (folder / f"analysis_{split}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in found)
        )
    return sum_up(found, len(rows) - len(found))


def analyze_all(c, answers, model, tokenizer, folder):
    """eval_video.py's {split: rows, each with its record} -> "analysis" in each split of summary.json, and a table on stdout."""
    summaries = {}
    for split, rows in answers.items():
        rows = e.gather_rows(
            rows if e.RANK == 0 else []
        )  # another rank may have read the file before its last rows were there
        summaries[split] = analyze(
            c, split, rows, {row["sample_id"]: row for row in rows}, model, tokenizer, folder
        )
    if e.RANK == 0:
        summary = json.loads((folder / "summary.json").read_text())
        summary = {split: x | dict(analysis=summaries[split]) for split, x in summary.items()}
        (folder / "summary.json").write_text(json.dumps(summary, indent=1))
        print(table(summaries))


def table(summaries):
    """{split: what analyze returned} -> Markdown; shares and accuracies in %, with 95 % intervals."""

    def percent(value):
        return "" if value is None else f"{100 * value:.1f}"

    heads = [
        "split",
        "samples",
        "attention on vision",
        "think",
        "answer",
        "consistent",
        "accuracy if consistent",
        "if inconsistent",
        "p_answer",
        "p_answer_blind",
    ]
    lines = [heads, ["---"] * len(heads)]
    for split, x in summaries.items():
        groups = [
            f"{percent(part['accuracy'])} ({100 * low:.0f}–{100 * high:.0f}, n = {part['total']})"
            if part["total"]
            else ""
            for part in (x["if_consistent"], x["if_inconsistent"])
            for low, high in [part["ci95"]]
        ]
        lines.append(
            [
                split,
                str(x["samples"]),
                *(percent(x["attention"][key]) for key in ("overall", "think", "answer")),
                percent(x["consistent"]),
                *groups,
                percent(x["p_answer"]),
                percent(x["p_answer_blind"]),
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
