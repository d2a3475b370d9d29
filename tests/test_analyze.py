"""tools/analyze.py: attention and visual reliance against transformers, a response's parts.

And consistency, heatmaps, a split whole, the command and what it refuses.
"""

import json
import math
import os
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import eval_video as e
from test_smoke import (
    CLIP,
    CPU,
    STILL,
    VIDEO,
    collate,
    make_sample,
    random_completions,
    transformers_inputs,
)
from tools import analyze as a

L1 = "validation_L1"
GOOD = "<think>it moves up</think><answer>C. move up</answer>"


@pytest.fixture
def tokenizer(toy):
    return AutoTokenizer.from_pretrained(toy / "init")


@pytest.fixture
def settings():
    """make(**changes) -> what the Config says, as far as the analysis of a split reads it."""
    defaults = dict(
        seed=42,
        ablate="none",
        heatmaps=0,
        max_frames=8,
        fps=2.0,
        frame_size=56,
        video_reader="pyav",
        decode_timeout=60.0,
        dataloader_num_workers=0,
    )

    return lambda **changes: SimpleNamespace(**defaults | changes)


@pytest.fixture
def alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def split_of(toy, tokenizer, texts, error=None):
    """-> ({sample_id: record}, rows) of L1's first questions, answered by `texts`; None failed."""
    annotations = toy / f"data/annotations/{L1}.jsonl"
    found = e.load_records(annotations, toy / "data")[: len(texts)]
    rows = []
    for record, text in zip(found, texts):
        if text:
            ids = tokenizer(text).input_ids + [tokenizer.eos_token_id]
            rows.append(record | dict(response=text, error=None, ids=ids))
        else:
            rows.append(record | dict(response=None, error="unreadable"))
    return {record["sample_id"]: record for record in found}, rows


def analysis_rows(folder):
    """-> what the analysis wrote of L1."""
    return [json.loads(line) for line in (folder / f"analysis_{L1}.jsonl").read_text().splitlines()]


# ---- Attention -----------------------------------------------------------------------------------
def test_weights_times_values_is_the_layers_output(tiny_model):
    """A mask off by one, a wrong scale or key head, or rows that are not the response's."""
    *_, model = tiny_model(
        num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=2, hidden_size=128
    )
    prompts = collate(make_sample(model.config, 5, CLIP, 2, STILL, 7))
    C = 6
    seen = []

    def watch(_, inputs):
        *states, attend = inputs

        def watched(q, k, v):
            out = attend(q, k, v)
            weights = a.explicit_weights(q, k, C)  # [H, C, N]
            product = torch.einsum("hcn,nhe->che", weights, v.repeat_interleave(4, 1))
            seen.append((product, out[-C:], weights))
            return out

        return *states, watched

    for layer in model.model.layers:
        layer.register_forward_pre_hook(watch)
    with torch.no_grad():
        model.completion_states(prompts, random_completions(1, 1, C))

    assert len(seen) == 3
    for product, out, weights in seen:
        torch.testing.assert_close(product, out, atol=1e-5, rtol=0)
        assert weights.shape == (8, C, prompts.ids.shape[1] + C)
        assert (weights[:, 0, 1 - C :] == 0).all()
        assert (weights[:, -1] > 0).all()


@torch.no_grad()
def test_shares_are_those_of_transformers_attentions(tiny_model):
    """Other keys than the pixels' placeholders are counted.

    Or a token's row is not the one that predicts it.
    """
    _, hf, model = tiny_model()
    hf.set_attn_implementation("eager")
    sample = make_sample(model.config, 5, CLIP, 2, STILL, 7)
    completions = random_completions(1, 1, 6)
    inputs = transformers_inputs(hf.config, [sample], completions)
    full = hf(**inputs, output_attentions=True).attentions
    P = len(sample["ids"])
    # Row P - 1 predicts the first token.
    rows = torch.stack(full)[:, 0, :, P - 1 : P + 5].mean(1)  # [L, C, N]
    video = rows[..., 5 : 5 + 12]  # 2 slices of 2 x 3 merged patches
    image = rows[..., 19 : 19 + 6]  # 3 x 2

    weights = a.visual_attention(model, collate(sample), completions[0, 0].tolist())
    torch.testing.assert_close(weights, torch.cat((video, image), dim=-1), atol=1e-5, rtol=0)
    assert not any(layer._forward_pre_hooks for layer in model.model.layers)

    think = torch.tensor([1, 1, 1, 0, 0, 0]).bool()
    answer = torch.tensor([0, 0, 0, 0, 1, 0]).bool()
    kinds = ["video", "image"]
    shares = a.attention_shares(weights, sample["grids"], kinds, think, answer, 2)
    total = video.sum(-1) + image.sum(-1)  # [L, C]
    assert shares["layers"] == pytest.approx(total.mean(1).tolist(), abs=1e-5)
    assert shares["overall"] == pytest.approx(total.mean().item(), abs=1e-5)
    assert shares["think"] == pytest.approx(total[:, :3].mean().item(), abs=1e-5)
    assert shares["answer"] == pytest.approx(total[:, 4].mean().item(), abs=1e-5)
    frames = [part.sum(-1).mean().item() for part in video.split(6, dim=-1)]
    assert shares["frames"] == pytest.approx(frames, abs=1e-5)
    assert shares["image"] == pytest.approx(image.sum(-1).mean().item(), abs=1e-5)
    assert sum(shares["frames"]) + shares["image"] == pytest.approx(shares["overall"], abs=1e-6)

    nowhere = think & answer
    shares = a.attention_shares(weights, sample["grids"], kinds, nowhere, answer, 2)
    assert shares["think"] is None


@torch.no_grad()
def test_placeholders_in_a_response_are_words(tiny_model):
    """Trap 12: they have no pixels. A prompt without media gives all of its shares as 0."""
    *_, model = tiny_model()
    prompts = collate(make_sample(model.config, 5, STILL, 3))
    assert a.visual_attention(model, prompts, [7, VIDEO, VIDEO, 8]).shape == (2, 4, 6)
    weights = a.visual_attention(model, collate(make_sample(model.config, 9)), [7, 8])
    none = torch.zeros(2).bool()
    shares = a.attention_shares(weights, [], [], none, ~none, 2)
    assert shares == dict(layers=[0, 0], overall=0, think=None, answer=0, frames=[], image=None)


# ---- Visual reliance -----------------------------------------------------------------------------
class Stub:
    """A model of three words whose logits are given, of each token: seeing, or blinded."""

    def __init__(self, seeing, blind):
        self.views = (blind, seeing)

    def completion_states(self, prompts, completions):
        assert completions.tolist() == [[[2, 0, 1]]]
        return self.views[bool(prompts.patches.any())]

    def logits(self, states):
        return states


def test_reliance_by_hand():
    """The KL's direction, its unit, or which token's place a number has; logits are normalised."""
    p = [0.7, 0.2, 0.1]
    q = [0.25, 0.25, 0.5]
    seeing = torch.tensor([p, q, q]).log() + 5
    blind = torch.tensor([q, q, p]).log() - 1

    prompts = e.Prompts(ids=torch.zeros(1, 1).long(), patches=torch.ones(4, 1176))
    found = a.visual_reliance(Stub(seeing, blind), prompts, [2, 0, 1])
    # p to q: .7 ln 2.8 + .2 ln .8 + .1 ln .2 = .72073 - .04463 - .16094
    # q to p: .25 ln .35714 + .25 ln 1.25 + .5 ln 5 = -.25740 + .05579 + .80472
    assert found.tolist() == pytest.approx([0.51516, 0, 0.60310], abs=1e-5)
    assert found.tolist() == pytest.approx([divergence(p, q), 0, divergence(q, p)], abs=1e-6)

    parts = torch.tensor([True, False, True])
    assert a.mean_of(found, parts) == pytest.approx(0.55913, abs=1e-5)
    assert a.mean_of(found, ~parts & parts) is None


def divergence(p, q):
    """KL(p || q) of two lists of probabilities, in nats."""
    return sum(x * math.log(x / y) for x, y in zip(p, q))


@torch.no_grad()
def test_reliance_is_that_of_transformers(tiny_model):
    """A token's number is of another row, or the blinded prompt is another than without pixels.

    Of 70 tokens, so that the pieces come together again.
    """
    _, hf, model = tiny_model()
    sample = make_sample(model.config, 5, CLIP, 2, STILL, 7)
    completions = random_completions(1, 1, 70)
    inputs = transformers_inputs(hf.config, [sample], completions)
    pixels = {key: x for key, x in inputs.items() if key.startswith("pixel_values")}
    assert len(pixels) == 2
    none = {key: torch.zeros_like(x) for key, x in pixels.items()}  # 0 is the mean colour
    P = len(sample["ids"])
    seen, blind = (
        hf(**view).logits[0, P - 1 : -1].log_softmax(-1) for view in (inputs, inputs | none)
    )

    found = a.visual_reliance(model, collate(sample), completions[0, 0].tolist())
    expected = torch.nn.functional.kl_div(blind, seen, log_target=True, reduction="none").sum(-1)
    assert found.shape == (70,)
    assert found.min() > 1e-5
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-3)


@torch.no_grad()
def test_reliance_is_0_where_pixels_say_nothing(tiny_model):
    """Exactly 0: without media, and with a vision tower that says the same of all pixels."""
    *_, model = tiny_model()
    sighted = collate(make_sample(model.config, 5, CLIP, 2, STILL, 7))
    ids = [7, 8, 9]
    assert (a.visual_reliance(model, sighted, ids) > 0).all()
    words = collate(make_sample(model.config, 9))
    assert a.visual_reliance(model, words, ids).tolist() == [0, 0, 0]

    last = model.visual.merger.mlp[2]
    last.weight.zero_()
    last.bias.normal_(generator=torch.Generator().manual_seed(0))
    assert a.visual_reliance(model, sighted, ids).tolist() == [0, 0, 0]


# ---- The response's parts ------------------------------------------------------------------------
# Pieces as byte-level BPE may cut: "><" is one token, and so is ">C". How many pieces are thinking;
# which are the answer; the letter, and which piece has it.
# fmt: off
PIECES = {
    "both": (
        ["<", "think", ">", "up", "</", "think", "><", "answer", ">C", ".", " u",
         "</", "answer", ">"],
        7, [8, 9, 10], "C", 8,
    ),
    "cut off": (
        ["<think>", "up", "</think>", "<answer>", "C", ".", " u"],
        3, [4, 5, 6], "C", 4,
    ),
    "empty": (
        ["<think>", "</think>", "<answer>", "</answer>"],
        2, [], None, None,
    ),
    "no answer tag": (
        ["<think>", "A", "</think>", "It", " is", " A"],
        3, [], "A", 5,
    ),
    "still thinking": (
        ["<think>", "so", " B"],
        0, [], None, None,
    ),
    "no thinking": (
        ["<answer>", "B", "</answer>"],
        0, [1], "B", None,
    ),
    "tags in the thinking": (
        ["<answer>", "A", "</answer>", "</think>", "<answer>", " a wall: ", "A"],
        4, [5, 6], "A", 6,
    ),
    "small": (
        ["x", "</think>", "<answer>", "b", "</answer>"],
        2, [3], "B", 3,
    ),
    "twice": (
        ["</think>", "a", "</think>", "<answer>", "B", "</answer>", "<answer>", "B", "</answer>"],
        3, [4], "B", 4,
    ),
}
# fmt: on


@pytest.mark.parametrize("pieces, think, answer, letter, place", PIECES.values(), ids=PIECES)
def test_parts_of_a_response(pieces, think, answer, letter, place):
    """A tag's token counts on the wrong side, or an absent tag makes a part of the rest.

    The end token is in no part.
    """
    pieces = [*pieces, ""]  # the end token
    words = SimpleNamespace(decode=lambda ids, skip_special_tokens: "".join(pieces[i] for i in ids))
    text, places = a.token_places(words, list(range(len(pieces))))
    assert text == "".join(pieces)
    assert [text[begin:end] for begin, end in places] == pieces
    found = [a.touching(places, part).nonzero()[:, 0].tolist() for part in a.sections(text, letter)]
    assert found == [list(range(think)), answer, [] if place is None else [place]]


def test_tokens_that_share_a_character(tokenizer):
    """Bytes of one character in several tokens: the places stay in order, and the text is whole."""
    text = "<think>é 🍳</think><answer>B. 🍳</answer>"
    whole, places = a.token_places(tokenizer, tokenizer(text).input_ids + [tokenizer.eos_token_id])
    assert whole == text
    assert all(begin <= end for begin, end in places)
    assert places[-1] == (len(text), len(text))
    [token] = a.touching(places, a.sections(text, "B")[2]).nonzero()[:, 0].tolist()
    assert text[slice(*places[token])] == "B"


# ---- Consistency ---------------------------------------------------------------------------------
class Judge:
    """A model that prefers one letter, and another if it is blind.

    Those letters' tokens have p 0.6, all others 0.1.
    """

    def __init__(self, tokenizer, sighted, blind):
        self.tokenizer = tokenizer
        self.letters = (blind, sighted)

    def __call__(self, prompts, rows):
        liked = self.tokenizer(self.letters[bool(prompts.patches.any())]).input_ids
        return torch.where(torch.isin(rows, torch.tensor(liked)), 0.6, 0.1).log()


# A response; the letters that the model prefers sighted and blind, and those of a reference; what
# is found. A liked letter has 0.6 / (0.6 + 3 * 0.1) = 2/3, another 0.1 / (0.6 + 3 * 0.1) = 1/9.
JUDGED = [
    (GOOD, "CC", None, dict(consistent=True, p_answer=2 / 3, p_answer_blind=2 / 3)),
    # It looked, and thought something else.
    (GOOD, "CA", None, dict(consistent=False, p_answer=2 / 3, p_answer_blind=1 / 9)),
    # A reference judges alone, and sees.
    (GOOD, "AA", "CA", dict(consistent=True, p_answer=2 / 3)),
    (GOOD, "CC", "BC", dict(consistent=False, p_answer=1 / 9)),
    (
        "<think>it moves up</think><answer>c</answer>",
        "aa",
        None,
        dict(consistent=False, p_answer=1 / 9, p_answer_blind=1 / 9),
    ),
    ("<think>it moves up", "CC", None, dict(consistent=None, p_answer=None, p_answer_blind=None)),
    # No thinking.
    ("<answer>C. move up</answer>", "CC", "CC", dict(consistent=None, p_answer=None)),
    # A fifth letter, of four choices.
    (
        "<think>it moves up</think><answer>E</answer>",
        "CC",
        "CC",
        dict(consistent=None, p_answer=None),
    ),
]


@pytest.mark.parametrize("text, model, reference, expected", JUDGED)
def test_consistency(tokenizer, text, model, reference, expected):
    """Another's letter is scored, the wrong judge or view decides, or an absent chain is judged."""
    prompts = e.Prompts(ids=torch.zeros(1, 1).long(), patches=torch.ones(4, 1176))
    model = Judge(tokenizer, *model)
    if reference:
        reference = Judge(tokenizer, *reference)
    ids = tokenizer(text).input_ids
    letter = e.extract_answer(text)
    text, places = a.token_places(tokenizer, ids)
    spot = a.sections(text, letter)[2]

    found = a.consistency(
        model, reference, tokenizer, prompts, ids, places, text, spot, letter, "ABCD"
    )
    assert found == pytest.approx(expected)


@torch.no_grad()
def test_a_letters_tokens_multiply(tiny_model):
    """A letter of several tokens is scored by its first alone, or by another's padding."""
    *_, model = tiny_model()
    prompts = collate(make_sample(model.config, 5, STILL, 3))
    ids = [11, 12, 13, 14, 15]
    tails = {">B": [21], ">C": [22, 23, 24], ">D": [22, 25]}

    def words(piece, add_special_tokens):
        return SimpleNamespace(input_ids=tails[piece])

    found = a.letter_probs(model, words, prompts, ids, 2, [">B", None, ">C", ">D"])
    scores = []
    for tail in ([21], [13], [22, 23, 24], [22, 25]):
        logp = model(prompts, torch.tensor([[ids[:2] + tail]]))[0, 0, 2:]
        scores.append(logp.sum())
    torch.testing.assert_close(found, torch.stack(scores).softmax(0), atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_blind_see_no_pixels(tiny_model):
    """Blanking leaves something of the pictures, or changes the sighted prompt."""
    *_, model = tiny_model()
    samples = [make_sample(model.config, 5, CLIP, 2, STILL, 7) for _ in range(2)]
    samples[1]["patches"] = 255 - samples[1]["patches"]
    views = [collate(sample) for sample in samples]

    def words(piece, add_special_tokens):
        return SimpleNamespace(input_ids=[ord(piece)])

    def probs(view):
        return a.letter_probs(model, words, view, [9, ord("B"), 8], 1, "ABCD")

    sighted = [probs(view) for view in views]
    blind = [probs(a.blinded(view)) for view in views]
    assert torch.equal(*blind)
    assert all(view.patches.any() for view in views)
    assert (sighted[0] - sighted[1]).abs().max() > 1e-3
    assert (sighted[0] - blind[0]).abs().max() > 1e-3


# ---- Heatmaps ------------------------------------------------------------------------------------
def test_heatmap(tiny_model):
    """The frames come back scrambled, or the colour lies over another patch than was looked at."""
    config = tiny_model()[1].config.vision_config
    rng = np.random.default_rng(0)
    video = torch.from_numpy(rng.integers(0, 256, (4, 56, 84, 3), dtype=np.uint8))
    still = torch.from_numpy(rng.integers(0, 256, (1, 56, 84, 3), dtype=np.uint8))
    x, grid = e.to_patches(video)
    y, still_grid = e.to_patches(still.expand(2, -1, -1, -1))
    heat = torch.zeros(18)  # 3 columns of 2 x 3 merged patches
    heat[6 + 2] = 1.0  # the second pair's upper right
    heat[12 + 3] = 0.5  # the image's lower left
    caption = "7   gold A   predicted none"
    picture = a.heatmap(torch.cat((x, y)), [grid, still_grid], heat, config, caption)
    assert picture.height == 56 + 16
    assert picture.width == 3 * 84

    red = np.array([255, 0, 0])
    strip = np.asarray(picture)[:56]
    plain = torch.cat((video[0], video[2], still[0]), dim=1).numpy()
    changed = np.zeros((56, 252), bool)
    upper_right = np.s_[0:28, 84 + 56 : 84 + 84]
    lower_left = np.s_[28:56, 168 : 168 + 28]
    for block, weight in ((upper_right, 0.7), (lower_left, 0.35)):
        expected = plain[block] * (1 - weight) + weight * red
        assert np.abs(strip[block] - expected).max() <= 0.5001
        changed[block] = True
    assert np.array_equal(strip[~changed], plain[~changed])
    assert (np.asarray(picture)[56:] < 128).any()  # the caption


# ---- A split -------------------------------------------------------------------------------------
def test_a_split(toy, tokenizer, settings, alone, tmp_path, monkeypatch):
    """A sample lacks its numbers, has another's, or is counted though it failed.

    Or files or table are not what they say.
    """
    texts = [
        GOOD,
        None,
        "<think>it moves up",
        GOOD.replace("C.", "B."),
        GOOD,
        "<think>it moves left</think>The answer is D",
    ]
    records, rows = split_of(toy, tokenizer, texts)
    # As a file's name it must not leave its folder.
    rows[4] |= dict(sample_id="../4")
    records["../4"] = records[1004] | dict(sample_id="../4", media=[("video", toy / "gone.mp4")])
    rows[3] |= dict(sample_id="a/3")
    records["a/3"] = records[1003] | dict(sample_id="a/3")

    heats = []
    heatmap = a.heatmap

    def watch(*given):
        heats.append(given[2].sum().item())
        return heatmap(*given)

    monkeypatch.setattr(a, "heatmap", watch)
    model = e.load_model(toy / "init", CPU, torch.float32)
    c = settings(heatmaps=3)
    summary = a.analyze(c, L1, rows, records, model, None, tokenizer, tmp_path)
    found = analysis_rows(tmp_path)
    check_rows(found, rows, records)
    check_summary(summary, found)

    pictures = sorted(path.name for path in (tmp_path / "heatmaps").iterdir())
    assert pictures == [f"{L1}_{name}.png" for name in (1000, 1002, "a_3")]
    assert Image.open(tmp_path / f"heatmaps/{L1}_1000.png").height == 56 + 16
    parts = ("answer", "overall", "answer")
    shown = [row["attention"][key] for row, key in zip(found, parts)]
    assert heats == pytest.approx(shown)


def check_rows(found, rows, records):
    """The analysis' rows of test_a_split: two of six cannot be read."""
    assert [row["sample_id"] for row in found] == [1000, 1002, "a/3", 1005]
    given = {0: "C", 2: None, 3: "B", 5: "D"}
    right = [rows[i]["gold"] == letter for i, letter in given.items()]
    assert [row["correct"] for row in found] == right
    assert [row["consistent"] is None for row in found] == [False, True, False, False]
    assert found[1]["attention"]["think"] is None
    assert found[3]["attention"]["answer"] is None
    assert found[3]["attention"]["think"] > 0
    for key, absent in (("think", [1]), ("answer", [1, 3]), ("letter", [1])):
        reliance = [row["visual_reliance"][key] for row in found]
        assert [i for i, nats in enumerate(reliance) if nats is None] == absent

    for row in found:
        shares = row["attention"]
        assert len(shares["layers"]) == 2
        assert 0 < shares["overall"] < 1
        kinds = [kind for kind, _ in records[row["sample_id"]]["media"]]
        assert bool(shares["frames"]) == ("video" in kinds)
        assert (shares["image"] is not None) == ("image" in kinds)
        reliance = row["visual_reliance"]
        [answer] = [x for x in rows if x["sample_id"] == row["sample_id"]]
        assert "".join(reliance["tokens"]) == answer["response"]
        assert len(reliance["nats"]) == len(reliance["tokens"]) == len(answer["ids"])
        assert reliance["overall"] == pytest.approx(np.mean(reliance["nats"]))


def check_summary(summary, found):
    """The means and the table of test_a_split, from its rows."""
    assert summary["samples"] == 4
    assert summary["skipped"] == 2

    attention = [row["attention"] for row in found]
    layers = np.mean([shares["layers"] for shares in attention], axis=0)
    answer = np.mean([attention[i]["answer"] for i in (0, 2)])
    assert summary["attention"]["layers"] == pytest.approx(layers)
    assert summary["attention"]["answer"] == pytest.approx(answer)

    letters = [found[i]["visual_reliance"]["letter"] for i in (0, 2, 3)]
    assert summary["visual_reliance"]["letter"] == pytest.approx(np.mean(letters))

    judged = [row for row in found if row["consistent"] is not None]
    consistent = np.mean([row["consistent"] for row in judged])
    blind = np.mean([row["p_answer_blind"] for row in judged])
    assert summary["consistent"] == pytest.approx(consistent)
    assert summary["p_answer_blind"] == pytest.approx(blind)
    assert summary["if_consistent"]["total"] + summary["if_inconsistent"]["total"] == 3

    first, _, line = a.table({L1: summary}).splitlines()
    assert first.count("|") == line.count("|")
    assert f"| {L1} | 4 | {100 * summary['attention']['overall']:.1f} |" in line


def test_sums_by_hand():
    """Means over other samples than those that have the number; a split without any sample."""

    def row(consistent, correct, frames, answer):
        shares = dict(layers=[0.1, 0.3], overall=0.2, think=None, answer=answer, image=None)
        return dict(
            consistent=consistent,
            correct=correct,
            p_answer=None if consistent is None else 0.5,
            attention=shares | dict(frames=frames),
            visual_reliance=dict(overall=0.5, think=None, answer=answer, letter=0.25),
        )

    rows = [
        row(True, True, [0.1, 0.2], 0.5),
        row(True, False, [0.3], None),
        row(False, True, [], 0.7),
        row(None, False, [], None),
    ]
    summary = a.sum_up(rows, 1)
    assert summary["attention"] == dict(
        overall=0.2,
        think=None,
        answer=pytest.approx(0.6),
        image=None,
        layers=pytest.approx([0.1, 0.3]),
        frames=pytest.approx([0.2, 0.2]),
    )
    assert summary["visual_reliance"] == dict(
        overall=0.5, think=None, answer=pytest.approx(0.6), letter=0.25
    )
    assert summary["consistent"] == pytest.approx(2 / 3)
    assert summary["p_answer"] == 0.5
    assert summary["p_answer_blind"] is None
    assert summary["if_consistent"]["accuracy"] == 0.5
    assert summary["if_inconsistent"]["accuracy"] == 1.0
    assert summary["skipped"] == 1
    assert summary["if_consistent"]["ci95"] == e.wilson(1, 2)

    *_, full, empty = a.table(dict(L1=summary, L2=a.sum_up([], 3))).splitlines()
    means = "| L1 | 4 | 20.0 |  | 60.0 |  | 0.60 | 0.25 | 66.7 "
    assert full == f"{means}| 50.0 (9–91, n = 2) | 100.0 (21–100, n = 1) | 50.0 |  |"
    assert empty == "| L2 | 0 |" + 11 * "  |"


def test_a_reference_sees(toy, tokenizer, settings, alone, tmp_path):
    """The reference is not the one that judges."""
    records, rows = split_of(toy, tokenizer, [GOOD])
    model = e.load_model(toy / "init", CPU, torch.float32)
    reference = e.load_model(toy / "init", CPU, torch.float32)
    own = a.analyze(settings(), L1, rows, records, model, None, tokenizer, tmp_path)
    same = a.analyze(settings(), L1, rows, records, model, reference, tokenizer, tmp_path)
    assert same["p_answer"] == pytest.approx(own["p_answer"])
    assert same["p_answer_blind"] is None
    assert own["p_answer_blind"] is not None


def test_shuffled_frames_stay_shuffled(toy, tokenizer, settings, alone, tmp_path, monkeypatch):
    """What --ablate shuffle_frames asked is analysed with the frames in their own order."""
    records, rows = split_of(toy, tokenizer, [GOOD] * 6)
    model = e.load_model(toy / "init", CPU, torch.float32)
    seen = {}

    def watch(model, reference, tokenizer, row, sample, kinds, picture):
        seen[row["sample_id"]] = sample["patches"]
        return analyze_sample(model, reference, tokenizer, row, sample, kinds, picture)

    analyze_sample = a.analyze_sample
    monkeypatch.setattr(a, "analyze_sample", watch)
    c = settings(ablate="shuffle_frames")
    a.analyze(c, L1, rows, records, model, None, tokenizer, tmp_path)

    dataset = e.VideoDataset([*records.values()], tokenizer, model.config, c, shuffle=False)
    changed = 0
    for position, name in enumerate(records):
        plain = dataset.begin(position)()
        assert torch.equal(seen[name], e.shuffle_frames(plain)["patches"])
        changed += not torch.equal(seen[name], plain["patches"])
    dataset.pool.stop()
    dataset.pool.join()
    assert len(seen) == 6
    assert changed > 0


def test_ranks_share_a_split(toy, tokenizer, settings, tmp_path, monkeypatch):
    """A row is done by one rank; the file's order is that of the rows."""
    records, rows = split_of(toy, tokenizer, [GOOD, GOOD, None, GOOD, GOOD, GOOD])
    model = e.load_model(toy / "init", CPU, torch.float32)
    parts = []

    def gather(lists):
        """Stands in for gather_rows: rank 1's rows come first, and lie behind rank 0's."""
        parts.extend(lists)
        return sum(reversed(parts), [])

    monkeypatch.setattr(e, "WORLD", 2)
    monkeypatch.setattr(a, "gather_rows", gather)
    for rank in (1, 0):
        monkeypatch.setattr(e, "RANK", rank)
        summary = a.analyze(settings(), L1, rows, records, model, None, tokenizer, tmp_path)

    assert [len(part) for part in parts] == [2, 3]
    assert summary["samples"] == 5
    assert math.isfinite(summary["p_answer"])
    found = [row["sample_id"] for row in analysis_rows(tmp_path)]
    assert found == [1000, 1001, 1003, 1004, 1005]


# ---- The command ---------------------------------------------------------------------------------
EVALUATED = """
--splits validation_L1 validation_L2 --limit 3 --max_completion_length 8 --batch_size 3
--max_frames 4 --fps 1 --frame_size 84 --ablate no_video --seed 7 --dataloader_num_workers 0
"""


def run_main(module, *flags):
    """Runs a module's main() in this process, as its command with these flags would."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, flags)])
        try:
            module.main()
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


@pytest.fixture(scope="module")
def evaluated(toy):
    """What eval_video.py wrote of three questions each of L1, L2 and LongVideoBench."""
    folder = toy / "evaluated"
    places = ["--model", toy / "init", "--data_root", toy / "data", "--output_dir", folder]
    run_main(e, *places, "--longvideobench", toy / "data", *EVALUATED.split())
    return folder


@pytest.fixture
def look(toy, evaluated, tmp_path):
    """look(*flags): tools/analyze.py on L1 of look.folder, a copy of the evaluation.

    A flag that is given twice counts as the second time.
    """
    folder = tmp_path / "looked"
    shutil.copytree(evaluated, folder)

    def run(*flags):
        places = ["--model", toy / "init", "--data_root", toy / "data", "--output_dir", folder]
        run_main(a, *places, "--splits", L1, *flags)

    run.folder = folder
    return run


def test_the_command_adds_to_an_evaluation(toy, evaluated, look, monkeypatch, capsys):
    """Something is lost of the summary or added unasked; or a model is read for each split."""
    opened = []
    load_model = e.load_model

    def watch(folder, *more):
        opened.append(folder)
        return load_model(folder, *more)

    monkeypatch.setattr(e, "load_model", watch)
    reference = shutil.copytree(toy / "init", look.folder.parent / "reference")
    capsys.readouterr()
    look("--longvideobench", toy / "data", "--reference", reference, "--heatmaps", 2)
    assert opened == [toy / "init", reference]

    before = json.loads((evaluated / "summary.json").read_text())
    after = json.loads((look.folder / "summary.json").read_text())
    found = {split: after[split].pop("analysis") for split in (L1, "LVB")}
    assert after == before
    assert capsys.readouterr().out == a.table(found) + "\n"
    for split, analysis in found.items():
        rows = (look.folder / f"analysis_{split}.jsonl").read_text().splitlines()
        assert analysis["samples"] == len(rows) == 3
    # LongVideoBench's questions are a video alone, which was taken away: nothing to draw.
    drawn = [path.name for path in (look.folder / "heatmaps").iterdir()]
    assert len(drawn) == 2
    assert all(name.startswith(L1) for name in drawn)


def test_settings_are_the_evaluations(evaluated, look, monkeypatch):
    """The questions look other than they did when they were answered: by flags or by defaults."""
    asked = []
    analyze = a.analyze

    def watch(c, *more):
        asked.append({key: getattr(c, key) for key in a.LOOKS})
        return analyze(c, *more)

    monkeypatch.setattr(a, "analyze", watch)
    look()
    first = analysis_rows(look.folder)
    look("--max_frames", 8, "--frame_size", 28, "--ablate", "text_only", "--seed", 1)

    expected = dict(max_frames=4, fps=1.0, frame_size=84, video_reader="pyav")
    expected |= dict(ablate="no_video", seed=7)
    assert asked == [expected, expected]
    assert analysis_rows(look.folder) == first
    assert [row["attention"]["frames"] for row in first] == [[], [], []]
    assert all(row["attention"]["image"] > 0 for row in first)


def test_fewer_questions_than_were_answered(look):
    """--limit leaves out answers, and does not count them as skipped."""
    look("--limit", 2)
    assert [row["sample_id"] for row in analysis_rows(look.folder)] == [1000, 1001]
    analysis = json.loads((look.folder / "summary.json").read_text())[L1]["analysis"]
    assert analysis["samples"] == 2
    assert analysis["skipped"] == 0


def other_weights(toy, folder):
    """-> the toy's untrained model, but for one number."""
    shutil.copytree(toy / "init", folder)
    weights = load_file(folder / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] += 1
    save_file(weights, folder / "model.safetensors")
    return folder


def other_words(toy, folder):
    """-> the toy's untrained model, but for one word more."""
    shutil.copytree(toy / "init", folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<|more|>"])
    tokenizer.save_pretrained(folder)
    return folder


def other_questions(toy, folder):
    """-> the toy's data, but for one word of a question."""
    shutil.copytree(toy / "data", folder, copy_function=os.link)
    path = folder / f"annotations/{L1}.jsonl"
    text = path.read_text()
    path.unlink()  # it is the same file as the toy's
    first = json.loads(text.partition("\n")[0])["question"]
    path.write_text(text.replace(first, f"{first} Now?", 1))
    return folder


REFUSED = {
    "no folder": (
        lambda toy, tmp_path: ["--output_dir", tmp_path / "none"],
        "none: holds no predictions of validation_L1 or no summary of them: run eval_video.py",
    ),
    "not asked": (
        lambda toy, tmp_path: ["--splits", L1, "validation_L3"],
        "looked: holds no predictions of validation_L3 or no summary of them: run eval_video.py",
    ),
    "other weights": (
        lambda toy, tmp_path: ["--model", other_weights(toy, tmp_path / "other")],
        "looked: its validation_L1 was answered by another model's weights than those in --model",
    ),
    "other questions": (
        lambda toy, tmp_path: ["--data_root", other_questions(toy, tmp_path / "other")],
        "other: its validation_L1 has other questions than those that were answered",
    ),
    "no reference": (
        lambda toy, tmp_path: ["--reference", toy / "data"],
        "data: holds no config.json",
    ),
    "other words": (
        lambda toy, tmp_path: ["--reference", other_words(toy, tmp_path / "other")],
        "other: its vocabulary is not --model's",
    ),
}


@pytest.mark.parametrize("flags, problem", REFUSED.values(), ids=REFUSED)
def test_what_is_refused(toy, look, tmp_path, monkeypatch, capsys, flags, problem):
    """Something else than this model's answers to these questions is analysed.

    Or there is more than a line about it, or it comes after the work.
    """
    check_refusal(look, flags(toy, tmp_path), problem, monkeypatch, capsys)


def check_refusal(look, flags, problem, monkeypatch, capsys):
    """look(*flags) says one line, with exit code 2, before a model is read and without a trace."""

    def no_work(*given):
        raise AssertionError("a model is read")

    monkeypatch.setattr(e, "load_model", no_work)
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        look(*flags)
    assert end.value.code == 2

    [line] = capsys.readouterr().err.splitlines()
    assert problem in line
    assert not list(look.folder.glob("analysis_*"))
    assert "analysis" not in (look.folder / "summary.json").read_text()


def test_unfinished_evaluations_are_refused(look, monkeypatch, capsys):
    """An evaluation that was killed has predictions, but no summary that could be added to."""
    (look.folder / "summary.json").write_text("{}")
    problem = "holds no predictions of validation_L1 or no summary of them: run eval_video.py first"
    check_refusal(look, [], problem, monkeypatch, capsys)


def test_rows_without_ids_are_refused(look, monkeypatch, capsys):
    """Rows of before responses' ids were kept: an error that says what to do, not a KeyError."""
    path = look.folder / f"predictions_{L1}.jsonl"
    rows = e.read_rows(path)
    del rows[1]["ids"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    check_refusal(look, [], "delete that folder", monkeypatch, capsys)
