"""tools/analyze.py: attention weights against SDPA and transformers, a response's parts, consistency, heatmaps, a split whole."""
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from test_smoke import CLIP, CPU, STILL, VIDEO, collate, make_sample, random_completions, transformers_inputs
from transformers import AutoTokenizer

import eval_video as e
from tools import analyze as a

L1 = "validation_L1"
GOOD = "<think>it moves up</think><answer>C. move up</answer>"


@pytest.fixture
def tokenizer(toy):
    return AutoTokenizer.from_pretrained(toy / "init")


@pytest.fixture
def settings():
    """make(**changes) -> what eval_video.py's Config says, as far as the analysis reads it."""
    return lambda **changes: SimpleNamespace(**dict(
        seed=42, ablate="none", reference="", heatmaps=0, max_frames=8, fps=2.0, frame_size=56, decode_timeout=60.0,
        dataloader_num_workers=0) | changes)


@pytest.fixture
def alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def split_of(toy, tokenizer, texts, error=None):
    """-> ({sample_id: record}, rows) of L1's first questions, answered by `texts`; None failed."""
    records = {r["sample_id"]: r for r in e.load_records(toy / f"data/annotations/{L1}.jsonl", toy / "data")[:len(texts)]}
    rows = [record | (dict(response=text, error=None, ids=tokenizer(text).input_ids + [tokenizer.eos_token_id]) if text else
                      dict(response=None, error="unreadable")) for record, text in zip(records.values(), texts)]
    return records, rows


# ---- Attention ------------------------------------------------------------------------------------------------------
def test_weights_times_values_is_the_layers_output(tiny_model):
    """A mask off by one, a wrong scale or key head, or rows that are not the response's."""
    *_, model = tiny_model(num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=2, hidden_size=128)
    prompts, C, seen = collate(make_sample(model.config, 5, CLIP, 2, STILL, 7)), 6, []

    def watch(_, inputs):
        *states, attend = inputs

        def watched(q, k, v):
            out = attend(q, k, v)
            weights = a.explicit_weights(q, k, C)  # [H, C, N]
            seen.append((torch.einsum("hcn,nhe->che", weights, v.repeat_interleave(4, 1)), out[-C:], weights))
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
        assert (weights[:, 0, 1 - C:] == 0).all() and (weights[:, -1] > 0).all()


@torch.no_grad()
def test_shares_are_those_of_transformers_attentions(tiny_model):
    """Other keys than the pixels' placeholders are counted, or a token's row is not the one that predicts it."""
    _, hf, model = tiny_model()
    hf.set_attn_implementation("eager")
    sample, completions = make_sample(model.config, 5, CLIP, 2, STILL, 7), random_completions(1, 1, 6)
    full = hf(**transformers_inputs(hf.config, [sample], completions), output_attentions=True).attentions
    P = len(sample["ids"])
    rows = torch.stack(full)[:, 0, :, P - 1:P + 5].mean(1)  # [L, C, N]: row P - 1 predicts the first token
    video, image = rows[..., 5:5 + 12], rows[..., 19:19 + 6]  # 2 slices of 2 x 3 merged patches; 3 x 2

    weights = a.visual_attention(model, collate(sample), completions[0, 0].tolist())
    torch.testing.assert_close(weights, torch.cat((video, image), dim=-1), atol=1e-5, rtol=0)
    assert not any(layer._forward_pre_hooks for layer in model.model.layers)

    think, answer = torch.tensor([1, 1, 1, 0, 0, 0]).bool(), torch.tensor([0, 0, 0, 0, 1, 0]).bool()
    shares, both = (a.attention_shares(weights, sample["grids"], ["video", "image"], z, answer, 2) for z in (think, think & answer))
    total = video.sum(-1) + image.sum(-1)  # [L, C]
    assert shares["layers"] == pytest.approx(total.mean(1).tolist(), abs=1e-5)
    assert shares["overall"] == pytest.approx(total.mean().item(), abs=1e-5)
    assert shares["think"] == pytest.approx(total[:, :3].mean().item(), abs=1e-5)
    assert shares["answer"] == pytest.approx(total[:, 4].mean().item(), abs=1e-5)
    assert shares["frames"] == pytest.approx([part.sum(-1).mean().item() for part in video.split(6, dim=-1)], abs=1e-5)
    assert shares["image"] == pytest.approx(image.sum(-1).mean().item(), abs=1e-5)
    assert sum(shares["frames"]) + shares["image"] == pytest.approx(shares["overall"], abs=1e-6)
    assert both["think"] is None


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


# ---- The response's parts -------------------------------------------------------------------------------------------
PIECES = {  # as byte-level BPE may cut: "><" is one token, and so is ">C"
    "both": (["<", "think", ">", "up", "</", "think", "><", "answer", ">C", ".", " u", "</", "answer", ">"], 7, [8, 9, 10], "C", 8),
    "cut off": (["<think>", "up", "</think>", "<answer>", "C", ".", " u"], 3, [4, 5, 6], "C", 4),
    "empty": (["<think>", "</think>", "<answer>", "</answer>"], 2, [], None, None),
    "no answer tag": (["<think>", "A", "</think>", "It", " is", " A"], 3, [], "A", 5),
    "still thinking": (["<think>", "so", " B"], 0, [], None, None),
    "no thinking": (["<answer>", "B", "</answer>"], 0, [1], "B", None),
    "tags in the thinking": (["<answer>", "A", "</answer>", "</think>", "<answer>", " a wall: ", "A"], 4, [5, 6], "A", 6),
    "small": (["x", "</think>", "<answer>", "b", "</answer>"], 2, [3], "B", 3),
    "twice": (["</think>", "a", "</think>", "<answer>", "B", "</answer>", "<answer>", "B", "</answer>"], 3, [4], "B", 4),
}


@pytest.mark.parametrize("pieces, think, answer, letter, place", PIECES.values(), ids=PIECES)
def test_parts_of_a_response(pieces, think, answer, letter, place):
    """A tag's token counts on the wrong side, or an absent tag makes a part of the rest; the end token is in none."""
    pieces = [*pieces, ""]  # the end token
    words = SimpleNamespace(decode=lambda ids, skip_special_tokens: "".join(pieces[i] for i in ids))
    text, places = a.token_places(words, list(range(len(pieces))))
    assert text == "".join(pieces) and [text[begin:end] for begin, end in places] == pieces
    found = [a.touching(places, part).nonzero()[:, 0].tolist() for part in a.sections(text, letter)]
    assert found == [list(range(think)), answer, [] if place is None else [place]]


def test_tokens_that_share_a_character(tokenizer):
    """Bytes of one character in several tokens: the places stay in order, and the text is whole."""
    text = "<think>é 🍳</think><answer>B. 🍳</answer>"
    whole, places = a.token_places(tokenizer, tokenizer(text).input_ids + [tokenizer.eos_token_id])
    assert whole == text and all(begin <= end for begin, end in places) and places[-1] == (len(text), len(text))
    [token] = a.touching(places, a.sections(text, "B")[2]).nonzero()[:, 0].tolist()
    assert text[slice(*places[token])] == "B"


# ---- Consistency ----------------------------------------------------------------------------------------------------
class Judge:
    """A model that prefers one letter, and another if it is blind: those letters' tokens have p 0.6, all others 0.1."""
    def __init__(self, tokenizer, sighted, blind):
        self.tokenizer, self.letters = tokenizer, (blind, sighted)

    def __call__(self, prompts, rows):
        liked = self.tokenizer(self.letters[bool(prompts.patches.any())]).input_ids
        return torch.where(torch.isin(rows, torch.tensor(liked)), 0.6, 0.1).log()


@pytest.mark.parametrize("text, model, reference, expected", [
    (GOOD, "CC", None, dict(consistent=True, p_answer=2 / 3, p_answer_blind=2 / 3)),  # 0.6 / (0.6 + 3 * 0.1)
    (GOOD, "CA", None, dict(consistent=False, p_answer=2 / 3, p_answer_blind=1 / 9)),  # it looked, and thought something else
    (GOOD, "AA", "CA", dict(consistent=True, p_answer=2 / 3)),  # a reference judges alone, and sees
    (GOOD, "CC", "BC", dict(consistent=False, p_answer=1 / 9)),
    ("<think>it moves up</think><answer>c</answer>", "aa", None, dict(consistent=False, p_answer=1 / 9, p_answer_blind=1 / 9)),
    ("<think>it moves up", "CC", None, dict(consistent=None, p_answer=None, p_answer_blind=None)),
    ("<answer>C. move up</answer>", "CC", "CC", dict(consistent=None, p_answer=None)),  # no thinking
    ("<think>it moves up</think><answer>E</answer>", "CC", "CC", dict(consistent=None, p_answer=None)),  # of four choices
])
def test_consistency(tokenizer, text, model, reference, expected):
    """Another's letter is scored, the wrong judge or view decides, or a chain is judged that isn't there."""
    prompts = e.Prompts(ids=torch.zeros(1, 1).long(), patches=torch.ones(4, 1176))
    model, reference = (judge and Judge(tokenizer, *judge) for judge in (model, reference))
    ids, letter = tokenizer(text).input_ids, e.extract_answer(text)
    text, places = a.token_places(tokenizer, ids)
    spot = a.sections(text, letter)[2]
    found = a.consistency(model, reference, tokenizer, prompts, ids, places, text, spot, letter, "ABCD")
    assert found == {key: value if value is None else pytest.approx(value) for key, value in expected.items()}


@torch.no_grad()
def test_a_letters_tokens_multiply(tiny_model):
    """A letter of several tokens is scored by its first alone, or by another's padding."""
    *_, model = tiny_model()
    prompts, ids = collate(make_sample(model.config, 5, STILL, 3)), [11, 12, 13, 14, 15]
    tails = {">B": [21], ">C": [22, 23, 24], ">D": [22, 25]}
    words = lambda piece, add_special_tokens: SimpleNamespace(input_ids=tails[piece])
    found = a.letter_probs(model, words, prompts, ids, 2, [">B", None, ">C", ">D"])
    scores = [model(prompts, torch.tensor([[ids[:2] + tail]]))[0, 0, 2:].sum() for tail in ([21], [13], [22, 23, 24], [22, 25])]
    torch.testing.assert_close(found, torch.stack(scores).softmax(0), atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_blind_see_no_pixels(tiny_model):
    """Blanking leaves something of the pictures, or changes the sighted prompt."""
    *_, model = tiny_model()
    words = lambda piece, add_special_tokens: SimpleNamespace(input_ids=[ord(piece)])
    samples = [make_sample(model.config, 5, CLIP, 2, STILL, 7) for _ in range(2)]
    samples[1]["patches"] = 255 - samples[1]["patches"]
    views = [collate(sample) for sample in samples]
    sighted, blind = ([a.letter_probs(model, words, view, [9, ord("B"), 8], 1, "ABCD") for view in look]
                      for look in (views, [*map(a.blinded, views)]))
    assert torch.equal(*blind) and all(view.patches.any() for view in views)
    assert all((one - other).abs().max() > 1e-3 for one, other in (sighted, (sighted[0], blind[0])))


# ---- Heatmaps -------------------------------------------------------------------------------------------------------
def test_heatmap(tiny_model):
    """The frames come back scrambled, or the colour is laid over another patch than the one that was looked at."""
    config = tiny_model()[1].config
    rng = np.random.default_rng(0)
    video, still = (torch.from_numpy(rng.integers(0, 256, (T, 56, 84, 3), dtype=np.uint8)) for T in (4, 1))
    (x, grid), (y, still_grid) = (e.to_patches(z, config.vision_config) for z in (video, still.expand(2, -1, -1, -1)))
    heat = torch.zeros(18)  # 3 columns of 2 x 3 merged patches
    heat[6 + 2], heat[12 + 3] = 1.0, 0.5  # the second pair's upper right, the image's lower left
    picture = a.heatmap(torch.cat((x, y)), [grid, still_grid], heat, config.vision_config, "7   gold A   predicted none")
    assert picture.height == 56 + 16 and picture.width == 3 * 84
    strip = np.asarray(picture)[:56]
    plain = torch.cat((video[0], video[2], still[0]), dim=1).numpy()
    changed = np.zeros((56, 252), bool)
    for (rows, columns), weight in {((0, 28), (84 + 56, 84 + 84)): 0.7, ((28, 56), (168, 168 + 28)): 0.35}.items():
        block = np.s_[slice(*rows), slice(*columns)]
        assert np.abs(strip[block] - (plain[block] * (1 - weight) + weight * np.array([255, 0, 0]))).max() <= 0.5001
        changed[block] = True
    assert np.array_equal(strip[~changed], plain[~changed])
    assert (np.asarray(picture)[56:] < 128).any()  # the caption


# ---- A split --------------------------------------------------------------------------------------------------------
def test_a_split(toy, tokenizer, settings, alone, tmp_path, monkeypatch):
    """A sample lacks its numbers, has another's, or is counted though it failed; files or table are not what they say."""
    texts = [GOOD, None, "<think>it moves up", GOOD.replace("C.", "B."), GOOD, "<think>it moves left</think>The answer is D"]
    records, rows = split_of(toy, tokenizer, texts)
    rows[4] |= dict(sample_id="../4")  # as a file's name it must not leave its folder
    records["../4"] = records[1004] | dict(sample_id="../4", media=[("video", toy / "gone.mp4")])
    rows[3] |= dict(sample_id="a/3")
    records["a/3"] = records[1003] | dict(sample_id="a/3")
    model, heats, heatmap = e.load_model(toy / "init", CPU, torch.float32), [], a.heatmap
    monkeypatch.setattr(a, "heatmap", lambda *given: heats.append(given[2].sum().item()) or heatmap(*given))
    summary = a.analyze(settings(heatmaps=3), L1, rows, records, model, tokenizer, tmp_path)

    found = [json.loads(line) for line in (tmp_path / f"analysis_{L1}.jsonl").read_text().splitlines()]
    assert [row["sample_id"] for row in found] == [1000, 1002, "a/3", 1005]  # two cannot be read
    assert summary["samples"] == 4 and summary["skipped"] == 2
    given = {0: "C", 2: None, 3: "B", 5: "D"}
    assert [row["correct"] for row in found] == [rows[i]["gold"] == letter for i, letter in given.items()]
    assert [row["consistent"] is None for row in found] == [False, True, False, False] and found[1]["attention"]["think"] is None
    assert found[3]["attention"]["answer"] is None and found[3]["attention"]["think"] > 0
    for row in found:
        shares = row["attention"]
        assert len(shares["layers"]) == 2 and 0 < shares["overall"] < 1
        pictures = [kind for kind, _ in records[row["sample_id"]]["media"]]
        assert bool(shares["frames"]) == ("video" in pictures) and (shares["image"] is not None) == ("image" in pictures)
    assert sorted(path.name for path in (tmp_path / "heatmaps").iterdir()) == [f"{L1}_{name}.png" for name in (1000, 1002, "a_3")]
    assert Image.open(tmp_path / f"heatmaps/{L1}_1000.png").height == 56 + 16
    assert heats == pytest.approx([row["attention"][key] for row, key in zip(found, ("answer", "overall", "answer"))])

    assert summary["attention"]["layers"] == pytest.approx(np.mean([row["attention"]["layers"] for row in found], axis=0))
    assert summary["attention"]["answer"] == pytest.approx(np.mean([found[i]["attention"]["answer"] for i in (0, 2)]))
    judged = [row for row in found if row["consistent"] is not None]
    assert summary["consistent"] == pytest.approx(np.mean([row["consistent"] for row in judged]))
    assert summary["p_answer_blind"] == pytest.approx(np.mean([row["p_answer_blind"] for row in judged]))
    assert summary["if_consistent"]["total"] + summary["if_inconsistent"]["total"] == 3
    first, _, line = a.table({L1: summary}).splitlines()
    assert first.count("|") == line.count("|") and f"| {L1} | 4 | {100 * summary['attention']['overall']:.1f} |" in line


def test_sums_by_hand():
    """Means over other samples than those that have the number; a split without any sample."""
    def row(consistent, correct, frames, answer):
        return dict(consistent=consistent, correct=correct, p_answer=None if consistent is None else 0.5, attention=dict(
            layers=[0.1, 0.3], overall=0.2, think=None, answer=answer, image=None, frames=frames))
    summary = a.sum_up([row(True, True, [0.1, 0.2], 0.5), row(True, False, [0.3], None), row(False, True, [], 0.7),
                        row(None, False, [], None)], 1)
    assert summary["attention"] == dict(overall=0.2, think=None, answer=pytest.approx(0.6), image=None,
                                        layers=pytest.approx([0.1, 0.3]), frames=pytest.approx([0.2, 0.2]))
    assert summary["consistent"] == pytest.approx(2 / 3) and summary["p_answer"] == 0.5 and summary["p_answer_blind"] is None
    assert [summary[f"if_{name}"]["accuracy"] for name in ("consistent", "inconsistent")] == [0.5, 1.0]
    assert summary["skipped"] == 1 and summary["if_consistent"]["ci95"] == e.wilson(1, 2)
    *_, full, empty = a.table(dict(L1=summary, L2=a.sum_up([], 3))).splitlines()
    assert full == "| L1 | 4 | 20.0 |  | 60.0 | 66.7 | 50.0 (9–91, n = 2) | 100.0 (21–100, n = 1) | 50.0 |  |"
    assert empty == "| L2 | 0 |  |  |  |  |  |  |  |  |"


def test_a_reference_sees(toy, tokenizer, settings, alone, tmp_path, capsys):
    """The reference is not the one that judges, is not checked, or is read again for every split."""
    records, rows = split_of(toy, tokenizer, [GOOD])
    model = e.load_model(toy / "init", CPU, torch.float32)
    own = a.analyze(settings(), L1, rows, records, model, tokenizer, tmp_path)
    same = a.analyze(settings(reference=str(toy / "init")), L1, rows, records, model, tokenizer, tmp_path)
    assert same["p_answer"] == pytest.approx(own["p_answer"]) and same["p_answer_blind"] is None
    assert own["p_answer_blind"] is not None and a.load_reference(str(toy / "init"), CPU, torch.float32)[0] is not model
    assert a.load_reference.cache_info().misses == 1
    for folder, problem in ((toy / "data", "holds no config.json"), (toy / "init", "its vocabulary is not --model's")):
        other = SimpleNamespace(get_vocab=dict)
        with pytest.raises(SystemExit) as end:
            a.analyze(settings(reference=str(folder)), L1, rows, records, model, other, tmp_path)
        assert end.value.code == 2 and f"--reference {folder}: {problem}" in capsys.readouterr().err


def test_rows_without_ids_are_refused(toy, tokenizer, settings, alone, tmp_path, capsys):
    """Rows of before responses' ids were kept: an error that says what to do, not a KeyError."""
    records, rows = split_of(toy, tokenizer, [GOOD, GOOD])
    del rows[1]["ids"]
    with pytest.raises(SystemExit) as end:
        a.analyze(settings(), L1, rows, records, None, tokenizer, tmp_path)
    assert end.value.code == 2 and "delete that folder" in capsys.readouterr().err


def test_ranks_share_a_split(toy, tokenizer, settings, tmp_path, monkeypatch):
    """A row is done by one rank; the file's order is that of the rows."""
    records, rows = split_of(toy, tokenizer, [GOOD, GOOD, None, GOOD, GOOD, GOOD])
    model, parts = e.load_model(toy / "init", CPU, torch.float32), []
    monkeypatch.setattr(e, "WORLD", 2)
    for rank in (1, 0):
        monkeypatch.setattr(e, "RANK", rank)
        monkeypatch.setattr(e, "gather_rows", lambda found: parts.append(found) or sum(reversed(parts), []))
        summary = a.analyze(settings(), L1, rows, records, model, tokenizer, tmp_path)
    assert [len(part) for part in parts] == [2, 3] and summary["samples"] == 5 and math.isfinite(summary["p_answer"])
    found = [json.loads(line)["sample_id"] for line in (tmp_path / f"analysis_{L1}.jsonl").read_text().splitlines()]
    assert found == [1000, 1001, 1003, 1004, 1005]
