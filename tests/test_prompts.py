"""From files to prompts: frames, pixels, patches, text, positions, and what comes when they cannot be read."""
import ctypes
import json
import os
import random
import signal
import time
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer
from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as oracle

import grpo_video as g
import sft_video
from test_smoke import collate, make_sample
from toy import make_toy

VISION = SimpleNamespace(patch_size=14, temporal_patch_size=2, spatial_merge_size=2)  # Qwen2-VL's
NOISE = np.random.default_rng(0).integers(0, 256, (16, 56, 56, 3), dtype=np.uint8)
# The chat template of Qwen2-VL's checkpoints, which takes a key for an image even if its value is null.
VENDORS_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}"
    "<|vision_start|><|video_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


@pytest.fixture
def tokenizer(toy):
    return AutoTokenizer.from_pretrained(toy / "init")


@pytest.fixture
def make_dataset(tokenizer):
    """Factory: records and changes of Config's defaults -> VideoDataset in a Qwen2-VL-shaped configuration."""
    ids = {f"{kind}_token_id": tokenizer.convert_tokens_to_ids(f"<|{kind}_pad|>") for kind in ("image", "video")}
    return lambda records, **changes: g.VideoDataset(records, tokenizer, SimpleNamespace(vision_config=VISION, **ids),
                                                     g.Config(**dict(frame_size=56, max_frames=8) | changes))


@pytest.fixture
def record(tmp_path):
    """A record worked by hand: a video of 16 frames, an image of another size, four fixed choices."""
    make_toy.write_avi(tmp_path / "clip.avi", NOISE)
    Image.fromarray(NOISE[3, :20, :30]).save(tmp_path / "now.png")
    return dict(sample_id=7, domain="all", question="What next?", gold="C", choices=["grab onion", "open drawer", "wash", "cut"],
                media=[("video", tmp_path / "clip.avi"), ("image", tmp_path / "now.png")])


# ---- Pixels ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape, size, mode", [
    ((56, 56), 56, "RGB"), ((252, 252), 252, "RGB"), ((480, 640), 252, "RGB"), ((37, 91), 84, "RGB"), ((9, 300), 56, "RGB"),
    ((300, 200), 252, "L"), ((300, 200), 252, "P"), ((300, 200), 252, "RGBA")])
def test_image_is_the_processors(tmp_path, monkeypatch, shape, size, mode):
    """Reading, resizing, patch order and normalisation of an image = transformers' PIL image processor asked for this size."""
    channels = dict(L=(), P=(), RGB=(3,), RGBA=(4,))[mode]
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, shape + channels, dtype=np.uint8))
    image = image.convert("P") if mode == "P" else image
    image.save(tmp_path / "image.png")
    monkeypatch.setattr(oracle, "smart_resize", lambda *args, **kwargs: (size, size))
    theirs = oracle.Qwen2VLImageProcessorPil()(Image.open(tmp_path / "image.png"), return_tensors="pt")
    patches, grid = g.to_patches(g.read_media("image", tmp_path / "image.png", size, 2.0, 16), VISION)
    sample = dict(ids=torch.tensor([1]), positions=torch.zeros(3, 1).long(), patches=patches, grids=[grid])
    assert [list(grid)] == theirs["image_grid_thw"].tolist()
    torch.testing.assert_close(collate(sample).patches, theirs["pixel_values"].float(), atol=1e-5, rtol=0)


def test_patches_of_a_video_by_hand():
    """Rows are ordered (t, h/2, w/2, 2, 2), columns (channel, 2 frames, 14, 14): spelled out patch by patch."""
    frames, rows = torch.from_numpy(NOISE[:4]), []
    for t in (0, 2):
        for block_y in (0, 28):
            for block_x in (0, 28):
                for y in (block_y, block_y + 14):
                    for x in (block_x, block_x + 14):
                        rows.append([frames[f, y:y + 14, x:x + 14, c].reshape(-1) for c in range(3) for f in (t, t + 1)])
    patches, grid = g.to_patches(frames, VISION)
    assert grid == (2, 4, 4) and torch.equal(patches, torch.stack([torch.cat(row) for row in rows]))


@pytest.mark.parametrize("total, video_fps, fps, max_frames, expected", [
    (1, 30, 2, 16, [0, 0, 0, 0]),                                       # never under 4 frames: they repeat
    (2, 30, 2, 16, [0, 0, 1, 1]),                                       # 0 .33 .67 1
    (3, 30, 2, 16, [0, 1, 1, 2]),                                       # 0 .67 1.33 2
    (5, 60, 2, 16, [0, 1, 3, 4]),                                       # 0 1.33 2.67 4
    (60, 30, 2, 16, [0, 20, 39, 59]),                                   # 2 s: 4 frames, 59/3 apart
    (75, 30, 2, 16, [0, 25, 49, 74]),                                   # 2.5 s: 5, floored to 4
    (90, 30, 2, 16, [0, 18, 36, 53, 71, 89]),                           # 3 s: 6, 17.8 apart
    (105, 30, 2, 16, [0, 21, 42, 62, 83, 104]),                         # 3.5 s: 7, floored to 6, 20.8 apart
    (8, 2, 2, 16, [0, 1, 2, 3, 4, 5, 6, 7]),                            # 4 s: every frame of the toy's
    (150, 29.97, 2, 16, [0, 17, 33, 50, 66, 83, 99, 116, 132, 149]),    # 5.005 s: 10, 16.56 apart
    (300, 30, 1, 16, [0, 33, 66, 100, 133, 166, 199, 233, 266, 299]),   # 10 s at 1 fps: 10, 33.2 apart
    (480, 24, 0.5, 16, [0, 53, 106, 160, 213, 266, 319, 373, 426, 479]),
    (50, 25, 4, 16, [0, 7, 14, 21, 28, 35, 42, 49]),                    # 2 s at 4 fps: 8
    (108000, 30, 2, 16, [0, 7200, 14400, 21600, 28800, 36000, 43200, 50400,  # an hour: 16, 107999/15 = 7199.93 apart
                         57599, 64799, 71999, 79199, 86399, 93599, 100799, 107999]),
    (108000, 30, 2, 8, [0, 15428, 30857, 46285, 61714, 77142, 92571, 107999]),
    (108000, 30, 2, 2, [0, 107999]),                                    # max_frames wins over the 4
    (108000, 30, 2, 7, [0, 21600, 43200, 64799, 86399, 107999]),        # an odd maximum is floored too
])
def test_frame_indices(total, video_fps, fps, max_frames, expected):
    """fps x duration frames, clamped to [4, max_frames], floored to even, linspace(0, T - 1) rounded: worked by hand."""
    assert g.frame_indices(total, video_fps, fps, max_frames).tolist() == expected


@pytest.mark.parametrize("low, high, limit", [(64, 192, 1), (0, 256, 32)])
@pytest.mark.parametrize("shape, size", [((120, 200), 56), ((56, 84), 56), ((40, 40), 84), ((36, 240), 112)])
def test_frame_resize_is_pillows(tmp_path, shape, size, low, high, limit):
    """Frames are resized bicubic with antialias: Pillow's own resize to a rounding, or, where it cuts overshoots off between
    its two passes, to a little more; an overshoot never wraps around."""
    frames = np.random.default_rng(2).integers(low, high, (4, *shape, 3), dtype=np.uint8)
    make_toy.write_avi(tmp_path / "clip.avi", frames)
    ours = g.read_media("video", tmp_path / "clip.avi", size, 2.0, 16)
    theirs = [np.array(Image.fromarray(f).resize((size, size), Image.Resampling.BICUBIC)) for f in frames]
    difference = np.abs(ours.numpy().astype(int) - np.stack(theirs))
    assert ours.dtype == torch.uint8 and difference.max() <= limit and difference.mean() < 0.4


def test_decoding_is_pixel_exact(tmp_path, monkeypatch):
    """decord gives back every pixel that the toy's generator drew, in the frames that were asked for, and the image too."""
    drawn, write, draw = {}, make_toy.write_avi, make_toy.draw_scene
    scenes = []
    monkeypatch.setattr(make_toy, "write_avi", lambda path, frames: (drawn.update({path: frames}), write(path, frames)))
    monkeypatch.setattr(make_toy, "draw_scene", lambda *args: scenes.append(draw(*args)) or scenes[-1])
    split = make_toy.SPLITS["validation_L3"]._replace(size=8)
    records = make_toy.make_split("validation_L3", split, tmp_path, np.random.default_rng(3))
    assert len(drawn) == len(records) == 8
    for path, frames in drawn.items():
        assert np.array_equal(g.read_media("video", path, 56, 2.0, 8), frames)
        assert np.array_equal(g.read_media("video", path, 56, 1.0, 8), frames[[0, 2, 5, 7]])
    for raw, scene in zip(records, scenes):
        image = g.read_media("image", tmp_path / "images/Ego4D" / raw["current_observation_basename"], 56, 2.0, 8)
        assert np.array_equal(image, scene[[8, 8]])


# ---- Prompts --------------------------------------------------------------------------------------------------------
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
VIDEO, IMAGE = (f"<|vision_start|><|{kind}_pad|><|vision_end|>" for kind in ("video", "image"))
ASKED = ("What next?\nA. grab onion\nB. open drawer\nC. wash\nD. cut\n Output the thinking process in <think> </think> and final "
         "answer in <answer> </answer> tags, i.e., <think> reasoning process here </think><answer> answer here </answer>. "
         "<|im_end|>\n<|im_start|>assistant\n")


def test_prompt_with_video_and_image(make_dataset, tokenizer, record):
    """The exact text, and at 252 x 252 (asked as 256) 648 placeholders for 16 frames beside 81 for the image, each once."""
    sample = make_dataset([record], frame_size=256, max_frames=16)[0]
    assert sample["text"] == SYSTEM + VIDEO + IMAGE + ASKED and sample["gold"] == "C" and sample["choices"] == record["choices"]
    assert sample["grids"] == [(8, 18, 18), (1, 18, 18)] and sample["patches"].shape == (8 * 324 + 324, 1176)
    before, after = (tokenizer(part).input_ids for part in (SYSTEM + "<|vision_start|>", "<|vision_end|>" + ASKED))
    video, image, start, end = (tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in (
        "video_pad", "image_pad", "vision_start", "vision_end"))
    assert sample["ids"].tolist() == before + [video] * 648 + [end, start] + [image] * 81 + after
    assert sample["positions"].shape == (3, len(sample["ids"]))
    frames = g.read_media("video", record["media"][0][1], 252, 2.0, 16)
    assert frames.shape == (16, 252, 252, 3) and torch.equal(sample["patches"][:2592], g.to_patches(frames, VISION)[0])


def test_prompt_without_video(make_dataset, tmp_path):
    """An empty task_progress_metadata means no video: the image alone, whatever video_basename says."""
    (tmp_path / "images/Ego4D").mkdir(parents=True)
    Image.fromarray(NOISE[0]).save(tmp_path / "images/Ego4D/5.png")
    raw = dict(sample_id=5, question="What next?", golden_choice_idx="A", video_source="Ego4D", task_progress_metadata=[],
               choice_a="grab onion", choice_b="open drawer", choice_c="wash", choice_d="cut", domain="Work",
               video_basename="nowhere.mp4", current_observation_basename="5.png")
    (tmp_path / "rows.jsonl").write_text(json.dumps(raw))
    sample = make_dataset(g.load_records(tmp_path / "rows.jsonl", tmp_path))[0]
    assert sample["text"] == SYSTEM + IMAGE + ASKED and sample["grids"] == [(1, 4, 4)] and sample["patches"].shape == (16, 1176)
    assert (sample["sample_id"], sample["domain"], sample["gold"]) == (5, "Work", "A")


def test_template_is_the_tokenizers(make_dataset, tokenizer, record):
    """The chat template comes from the checkpoint: with the vendor's the text is the vendor's, with another it is the other's."""
    tokenizer.chat_template = VENDORS_TEMPLATE
    assert make_dataset([record])[0]["text"] == SYSTEM + VIDEO + IMAGE + ASKED
    tokenizer.chat_template = "{% for part in messages[0].content %}({{ part.type }}){% endfor %}"
    assert make_dataset([record]).encode(record, record["choices"], [])[0] == "(video)(image)(text)"


def test_null_keys_of_chat_rows_are_dropped(make_dataset, tokenizer, record, tmp_path):
    """The released CoT rows carry null-valued keys; the vendor's template would take each for an image or a video."""
    null = dict(video=None, image=None, text=None)
    content = [dict(null, type="video", video="clip.avi"), dict(null, type="image", image="now.png"),
               dict(null, type="text", text=ASKED.split("<|im_end|>")[0])]
    raw = dict(sample_id=7, prompt=[dict(role="user", content=content)], response="<think>so</think><answer>C. wash</answer>")
    tokenizer.chat_template = VENDORS_TEMPLATE
    kept = tokenizer.apply_chat_template(raw["prompt"], tokenize=False)
    assert kept.count("<|image_pad|>") == 3  # the trap is real: with the null keys, everything is an image
    (tmp_path / "rows.jsonl").write_text(json.dumps(raw))
    sample = make_dataset(g.load_records(tmp_path / "rows.jsonl", tmp_path, sft_video.parse_chat))[0]
    assert sample["text"] == SYSTEM + VIDEO + IMAGE + ASKED and sample["response"] == raw["response"]
    assert sample["grids"] == make_dataset([record])[0]["grids"]


def test_too_long_prompt_is_an_error(make_dataset, record, capsys):
    """Trap 5: a prompt over the limit ends the program naming sample and both numbers, and one at the limit passes uncut."""
    dataset = make_dataset([record | dict(response="<think>so</think>"), record | dict(sample_id="uuid_8")])
    length = len(dataset[0]["ids"])
    response = len(dataset.tokenizer("<think>so</think>").input_ids)
    dataset.check_lengths(length + response)
    with pytest.raises(SystemExit) as end:
        dataset.check_lengths(length - 1)
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and len(lines) == 2
    for line, name, n in zip(lines, (7, "uuid_8"), (length + response, length)):
        assert f"sample_id {name}:" in line and f" {n} " in line and line.endswith(f" {length - 1}")


def test_length_is_checked_for_every_epoch(make_dataset, record, capsys):
    """Trap 5: the check covers the longest choices that any epoch may draw, not those of the first epoch alone."""
    drawn = dict(record, answer="wash", negatives=["cut", "grab", "peel", "a very long negative answer " * 30])
    dataset = make_dataset([{k: v for k, v in drawn.items() if k not in ("choices", "gold")}])
    seed = next(s for s in range(99) if max(map(len, g.choose(dataset.records[0], s, 0)[0])) < 9)  # the first epoch draws short ones
    dataset.c.seed = seed
    assert max(len(dataset[epoch]["ids"]) for epoch in range(9)) > len(dataset[0]["ids"]) + 30
    with pytest.raises(SystemExit):
        dataset.check_lengths(len(dataset[0]["ids"]) + 9)


# ---- Choices and order ----------------------------------------------------------------------------------------------
DRAWN = dict(sample_id=7, answer="grab onion", negatives=["open drawer", "grab knife", "close drawer", "slice onion", "peel onion"])


def test_choices_depend_on_seed_epoch_and_sample_alone():
    """Trap 10: the same (seed, epoch, sample_id) draws the same in any process and order; another of the three draws anew."""
    golden = (["grab knife", "grab onion", "peel onion", "close drawer"], "B")
    for state in (1, 2):
        random.seed(state), torch.manual_seed(state), np.random.seed(state)
        g.choose(DRAWN, 1, state)
        assert g.choose(DRAWN, 42, 0) == golden
    for other in (g.choose(DRAWN, 43, 0), g.choose(DRAWN, 42, 1), g.choose(DRAWN | dict(sample_id=8), 42, 0),
                  g.choose(DRAWN | dict(sample_id="7"), 42, 0)):
        assert other != golden


def test_drawn_choices_are_fair():
    """Trap 10: the answer is among four different choices at the gold letter; letters and negatives come equally often."""
    letters, negatives = Counter(), Counter()
    for i in range(2000):
        choices, gold = g.choose(DRAWN | dict(sample_id=i), 42, 0)
        assert len(set(choices)) == 4 and choices["ABCD".index(gold)] == "grab onion"
        letters[gold] += 1
        negatives.update(set(choices) - {"grab onion"})
    assert set(letters) == set("ABCD") and all(abs(n - 500) < 80 for n in letters.values())  # 4 standard deviations
    assert set(negatives) == set(DRAWN["negatives"]) and all(abs(n - 1200) < 90 for n in negatives.values())


def test_fixed_choices_are_never_shuffled(record):
    """A record with golden_choice_idx keeps its order in every epoch and under every seed; a chat row has no choices."""
    assert all(g.choose(record, seed, epoch) == (record["choices"], "C") for seed in range(9) for epoch in range(9))
    assert g.choose(dict(sample_id=1, messages=[]), 42, 0) == ([], None)


def test_epochs_are_permutations(make_dataset, record):
    """Each epoch runs through all records once, in an order of its own, by (seed, epoch)."""
    records = [record | dict(sample_id=i, media=[]) for i in range(20)]

    def orders(seed):
        dataset = make_dataset(records, seed=seed)
        return [tuple(dataset[position]["sample_id"] for position in range(20 * epoch, 20 * epoch + 20)) for epoch in range(3)]

    assert all(sorted(order) == list(range(20)) for order in orders(42) + orders(43))
    assert len(set(orders(42) + orders(43))) == 6 and orders(42) == orders(42)


def test_stream_of_positions(make_dataset, record):
    """Trap 10: a position's sample, its choices among it, depends on seed and position alone, in whatever process and sequence it is
    read; the same record has other choices in another epoch."""
    records = [DRAWN | dict(sample_id=i, question="?", media=record["media"]) for i in range(5)]
    dataset = make_dataset(records)
    plain = [dataset[p] for p in range(15)]
    for sample, epoch in zip(plain, [0] * 5 + [1] * 5 + [2] * 5):
        assert (sample["choices"], sample["gold"]) == g.choose(records[sample["sample_id"]], 42, epoch)
    assert len({tuple(s["choices"]) for s in plain if s["sample_id"] == 3}) > 1
    worked = [s for samples in g.load_batches(make_dataset(records), [[7, 2], [9]], 1) for s in samples]
    for sample, p in zip(worked, (7, 2, 9), strict=True):
        assert sample["text"] == plain[p]["text"] and torch.equal(sample["patches"], plain[p]["patches"])
    dataset.shuffle = False
    assert [dataset[p]["sample_id"] for p in range(5)] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("world, expected", [
    (1, [[[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10], [], []]]),
    (2, [[[0, 1], [4, 5], [8, 9], []], [[2, 3], [6, 7], [10], []]]),
    (4, [[[0, 1], [8, 9]], [[2, 3], [10]], [[4, 5], []], [[6, 7], []]]),
])
def test_rank_batches(monkeypatch, world, expected):
    """11 samples, 8 a step, 2 a micro-batch: the exact lists of each rank. The tail is not lost, and nobody starves."""
    monkeypatch.setattr(g, "WORLD", world)
    lists = []
    for rank in range(world):
        monkeypatch.setattr(g, "RANK", rank)
        lists.append(g.rank_batches(11, range(2), 2, 4 // world))
        assert g.rank_batches(11, range(1, 2), 2, 4 // world) == lists[-1][4 // world:]  # what a resumed run sees
    assert lists == expected


def test_a_steps_samples_do_not_depend_on_the_ranks(monkeypatch):
    """However a global batch of 12 is cut into ranks, micro-batches and prompts, each step has the same set of samples."""
    for world, accumulation, B in ((1, 1, 12), (1, 12, 1), (2, 3, 2), (4, 1, 3), (4, 3, 1), (3, 2, 2)):
        monkeypatch.setattr(g, "WORLD", world)
        steps = [[] for _ in range(4)]
        for rank in range(world):
            monkeypatch.setattr(g, "RANK", rank)
            for i, batch in enumerate(g.rank_batches(40, range(4), B, accumulation)):
                steps[i // accumulation] += batch
        assert [sorted(step) for step in steps] == [list(range(k, min(k + 12, 40))) for k in (0, 12, 24, 36)]


# ---- Positions and placeholders -------------------------------------------------------------------------------------
def test_mrope_positions():
    """Text, a 2 x (4 x 4) video, text, a 1 x (4 x 6) image, text: every (t, h, w) worked by hand."""
    config = SimpleNamespace(vision_config=VISION, image_token_id=98, video_token_id=99)
    ids = [1, 2, 3] + [99] * 8 + [4, 5] + [98] * 6 + [6, 7]
    expected = [  # text 0-2; the video starts at 3 and ends at 4; text 5-6; the image starts at 7, its widest is 9; text 10-11
        [0, 1, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 6, 7, 7, 7, 7, 7, 7, 10, 11],
        [0, 1, 2, 3, 3, 4, 4, 3, 3, 4, 4, 5, 6, 7, 7, 7, 8, 8, 8, 10, 11],
        [0, 1, 2, 3, 4, 3, 4, 3, 4, 3, 4, 5, 6, 7, 8, 9, 7, 8, 9, 10, 11]]
    assert g.mrope_positions(ids, [(2, 4, 4), (1, 4, 6)], config).tolist() == expected
    assert int(collate(dict(ids=torch.tensor(ids), positions=torch.tensor(expected), patches=torch.zeros(0, 1176).byte(),
                            grids=[])).last_position) == 11


@pytest.mark.parametrize("grid, after", [((2, 4, 4), 3), ((1, 4, 8), 5), ((1, 8, 4), 5), ((4, 4, 4), 5), ((9, 4, 4), 10)])
def test_position_after_a_vision_block(grid, after):
    """The trained rule: the maximum over t, h and w of the merged grid, plus 1; also where t is the largest."""
    config, (t, h, w) = SimpleNamespace(vision_config=VISION, image_token_id=98, video_token_id=99), grid
    positions = g.mrope_positions([1] + [99] * (t * h * w // 4) + [2], [grid], config)
    assert positions[:, 0].tolist() == [0, 0, 0] and positions[:, -1].tolist() == [after] * 3


def test_vision_features_only_in_the_prompts_placeholders(tiny_model, monkeypatch):
    """Trap 12: a policy that says <|video_pad|> or <|image_pad|> has said a word; the features stay in the prompt."""
    _, _, model = tiny_model()
    c = model.config
    samples = [make_sample(c, 2, ("video", (2, 4, 4)), 3, ("image", (1, 4, 4)), 1), make_sample(c, 4, seed=1)]
    prompts = collate(*samples)
    with torch.no_grad():
        x, features = model.embed_prompts(prompts).view(2, -1, 64), model.visual(prompts.patches, prompts.grids, model.run)
        vision = torch.isin(prompts.ids, torch.tensor([c.image_token_id, c.video_token_id]))
        assert vision.sum() == len(features) == 12 and torch.equal(x[vision], features)
        assert torch.equal(x[~vision], model.model.embed_tokens(prompts.ids[~vision]))
        monkeypatch.setattr(g, "pick", lambda logits, *_: torch.tensor([c.video_token_id, c.image_token_id]).repeat(len(logits) // 2))
        said = g.generate(model, prompts, 2, 4, [396, 395], [0, 1])
        assert said.tolist() == [[[c.video_token_id] * 4, [c.image_token_id] * 4]] * 2
        logp, word = model(prompts, said), torch.tensor([[[5] * 4, [5] * 4]] * 2)
        assert logp.isfinite().all() and torch.equal(model.embed_prompts(prompts).view(2, -1, 64), x)
        model.model.embed_tokens.weight[[c.video_token_id, c.image_token_id]] = model.model.embed_tokens.weight[[5]]
        torch.testing.assert_close(model(prompts, said), model(prompts, word))  # with a word's embedding, it is that word


# ---- Faults ---------------------------------------------------------------------------------------------------------
def test_unreadable_video_is_reported_not_replaced(make_dataset, record, tmp_path):
    """Trap 13: an unreadable video gives {sample_id, error} with path and cause, no pixels; the sample beside it is untouched."""
    (tmp_path / "broken.avi").write_text("no video\n" * 99)
    bad = record | dict(sample_id="bad_1", media=[("video", tmp_path / "broken.avi"), record["media"][1]])
    dataset = make_dataset([bad, record])
    samples = {s["sample_id"]: s for s in (dataset[0], dataset[1])}
    assert "broken.avi" in samples["bad_1"]["error"] and "Error" in samples["bad_1"]["error"]
    assert not {"patches", "grids", "ids", "text"} & set(samples["bad_1"])
    assert "error" not in samples[7] and samples[7]["grids"] == [(4, 4, 4), (1, 4, 4)]


def hang():
    time.sleep(20)


def hang_with_the_gil():
    ctypes.PyDLL(None).sleep(20)


def loop():
    end = time.perf_counter() + 20
    while time.perf_counter() < end:
        pass


@pytest.mark.parametrize("job, message", [
    (hang, "decoding took over 1.0 s"),
    (hang_with_the_gil, "decoding took over 1.0 s"),
    (loop, "decoding took over 1.0 s"),
    (lambda: os._exit(3), "decoder died with exit code 3"),
    (lambda: os.kill(os.getpid(), signal.SIGKILL), "decoder died with exit code -9"),
    (lambda: int("four\nlines"), "ValueError: invalid literal"),
    (lambda: [][1], "IndexError"),
], ids=["hang", "hang with the GIL", "loop", "exit", "killed", "raise with a newline", "raise"])
def test_a_decoder_that_fails(job, message):
    """Trap 14: a decoder that hangs, crashes or raises loses its own sample in time; the next sample decodes."""
    decoder, start = g.Decoder(lambda n: job() if n == 2 else np.arange(10 ** 6) + n, 1.0), time.perf_counter()
    for n in range(4):
        result, problem = decoder(n)
        if n == 2:
            assert result is None and problem.startswith(message) and "\n" not in problem
        else:
            assert problem is None and result[-1] == 10 ** 6 - 1 + n
    assert time.perf_counter() - start < 15
    child = decoder.child
    decoder.pipe.close()
    assert os.waitpid(child, 0) == (child, 0)  # the last child leaves when its parent does


def test_a_forked_worker_has_its_own_decoder():
    """A data set that has decoded in the main process is forked into workers: two that talked to one child would mix up samples."""
    class Squares(g.Decoder):
        def __getitem__(self, n):
            return self(n)

    squares = Squares(lambda n: n * n, 5.0)
    assert squares[3] == (9, None)
    found = list(g.load_batches(squares, [[n] for n in range(40)], 2))
    assert found == [[(n * n, None)] for n in range(40)] and squares[4] == (16, None)
    squares.pipe.close()
    os.waitpid(squares.child, 0)


def test_the_time_limit_is_for_one_sample():
    """Trap 14: the clock starts anew with each sample and stands still between them, so a long run of good samples goes on."""
    decoder, children = g.Decoder(lambda n: time.sleep(0.4) or os.getpid(), 1.0), set()
    for n in range(3):
        children.add(decoder(n)[0])
        time.sleep(1.2 if n == 0 else 0)
    assert children == {decoder.child}
    decoder.pipe.close()
    os.waitpid(decoder.child, 0)
