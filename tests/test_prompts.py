"""From files to prompts: frames, pixels, patches, text, positions, and what cannot be read."""

import ctypes
import itertools
import json
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path
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
# Qwen2-VL's own chat template, which takes a key for an image even if its value is null.
VENDORS_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}"
    "{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}"
    "<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def tokenizer(toy):
    return AutoTokenizer.from_pretrained(toy / "init")


@pytest.fixture
def make_dataset(tokenizer):
    """Factory: records and changes of Config's defaults -> VideoDataset of a Qwen2-VL's shape."""
    config = SimpleNamespace(
        vision_config=VISION,
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
    )

    def make(records, **changes):
        settings = g.Config(**dict(frame_size=56, max_frames=8) | changes)
        return g.VideoDataset(records, tokenizer, config, settings)

    return make


@pytest.fixture
def record(tmp_path):
    """Worked by hand: a video of 16 frames, an image of another size, four fixed choices."""
    make_toy.write_avi(tmp_path / "clip.avi", NOISE)
    Image.fromarray(NOISE[3, :20, :30]).save(tmp_path / "now.png")
    return dict(
        sample_id=7,
        domain="all",
        question="What next?",
        gold="C",
        choices=["grab onion", "open drawer", "wash", "cut"],
        media=[("video", tmp_path / "clip.avi"), ("image", tmp_path / "now.png")],
    )


# ---- Pixels --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "shape, size, mode",
    [
        ((56, 56), 56, "RGB"),
        ((252, 252), 252, "RGB"),
        ((480, 640), 252, "RGB"),
        ((37, 91), 84, "RGB"),
        ((9, 300), 56, "RGB"),
        ((300, 200), 252, "L"),
        ((300, 200), 252, "P"),
        ((300, 200), 252, "RGBA"),
    ],
)
def test_image_is_the_processors(tmp_path, monkeypatch, shape, size, mode):
    """An image is read, resized, cut into patches and normalised as transformers does it.

    The reference is its PIL image processor, asked for this size.
    """
    path = tmp_path / "image.png"
    channels = dict(L=(), P=(), RGB=(3,), RGBA=(4,))[mode]
    pixels = np.random.default_rng(1).integers(0, 256, shape + channels, dtype=np.uint8)
    image = Image.fromarray(pixels)
    if mode == "P":
        image = image.convert("P")
    image.save(path)

    monkeypatch.setattr(oracle, "smart_resize", lambda *args, **kwargs: (size, size))
    theirs = oracle.Qwen2VLImageProcessorPil()(Image.open(path), return_tensors="pt")

    patches, grid = g.to_patches(g.read_media("image", path, size, 2.0, 16))
    positions = torch.zeros(3, 1).long()
    sample = dict(ids=torch.tensor([1]), positions=positions, patches=patches, grids=[grid])
    ours = collate(sample).patches
    assert [list(grid)] == theirs["image_grid_thw"].tolist()
    torch.testing.assert_close(ours, theirs["pixel_values"].float(), atol=1e-5, rtol=0)


def test_patches_of_a_video_by_hand():
    """The order of rows and columns, spelled out patch by patch.

    Rows are (t, h/2, w/2, 2, 2), columns (channel, 2 frames, 14, 14).
    """
    frames = torch.from_numpy(NOISE[:4])

    def row(t, y, x):
        columns = []
        for channel in range(3):
            for frame in (t, t + 1):
                columns.append(frames[frame, y : y + 14, x : x + 14, channel].reshape(-1))
        return torch.cat(columns)

    rows = []
    for t in (0, 2):
        for block_y in (0, 28):
            for block_x in (0, 28):
                for y in (block_y, block_y + 14):
                    for x in (block_x, block_x + 14):
                        rows.append(row(t, y, x))

    patches, grid = g.to_patches(frames)
    assert grid == (2, 4, 4)
    assert torch.equal(patches, torch.stack(rows))


# An hour at 30 frames a second is 108000 frames; 16 of them are 107999/15 = 7199.93 apart.
# fmt: off
AN_HOUR_IN_16 = [
    0, 7200, 14400, 21600, 28800, 36000, 43200, 50400,
    57599, 64799, 71999, 79199, 86399, 93599, 100799, 107999,
]
# fmt: on


@pytest.mark.parametrize(
    "total, video_fps, fps, max_frames, expected",
    [
        # Never under 4 frames: they repeat.
        (1, 30, 2, 16, [0, 0, 0, 0]),
        (2, 30, 2, 16, [0, 0, 1, 1]),  # 0 .33 .67 1
        (3, 30, 2, 16, [0, 1, 1, 2]),  # 0 .67 1.33 2
        (5, 60, 2, 16, [0, 1, 3, 4]),  # 0 1.33 2.67 4
        # 2 frames a second.
        (60, 30, 2, 16, [0, 20, 39, 59]),  # 2 s: 4 frames, 59/3 apart
        (75, 30, 2, 16, [0, 25, 49, 74]),  # 2.5 s: 5, floored to 4
        (90, 30, 2, 16, [0, 18, 36, 53, 71, 89]),  # 3 s: 6, 17.8 apart
        (105, 30, 2, 16, [0, 21, 42, 62, 83, 104]),  # 3.5 s: 7, floored to 6, 20.8 apart
        (8, 2, 2, 16, [0, 1, 2, 3, 4, 5, 6, 7]),  # 4 s: every frame of the toy's
        (150, 29.97, 2, 16, [0, 17, 33, 50, 66, 83, 99, 116, 132, 149]),  # 5.005 s: 10, 16.56 apart
        # 10 s at 1 fps: 10, 33.2 apart.
        (300, 30, 1, 16, [0, 33, 66, 100, 133, 166, 199, 233, 266, 299]),
        (480, 24, 0.5, 16, [0, 53, 106, 160, 213, 266, 319, 373, 426, 479]),
        (50, 25, 4, 16, [0, 7, 14, 21, 28, 35, 42, 49]),  # 2 s at 4 fps: 8
        # An hour.
        (108000, 30, 2, 16, AN_HOUR_IN_16),
        (108000, 30, 2, 8, [0, 15428, 30857, 46285, 61714, 77142, 92571, 107999]),
        (108000, 30, 2, 2, [0, 107999]),  # max_frames wins over the 4
        # An odd maximum is floored too.
        (108000, 30, 2, 7, [0, 21600, 43200, 64799, 86399, 107999]),
    ],
)
def test_frame_indices(total, video_fps, fps, max_frames, expected):
    """fps x duration frames, clamped to [4, max_frames] and floored to even, worked by hand.

    They are linspace(0, T - 1), rounded.
    """
    assert g.frame_indices(total, video_fps, fps, max_frames).tolist() == expected


@pytest.mark.parametrize("low, high, limit", [(64, 192, 1), (0, 256, 32)])
@pytest.mark.parametrize(
    "shape, size", [((120, 200), 56), ((56, 84), 56), ((40, 40), 84), ((36, 240), 112)]
)
def test_frame_resize_is_pillows(tmp_path, shape, size, low, high, limit):
    """Frames are resized bicubic with antialias: Pillow's own resize to a rounding.

    Where it cuts overshoots off between its two passes, the difference is a little more. An
    overshoot never wraps around.
    """
    frames = np.random.default_rng(2).integers(low, high, (4, *shape, 3), dtype=np.uint8)
    make_toy.write_avi(tmp_path / "clip.avi", frames)
    ours = g.read_media("video", tmp_path / "clip.avi", size, 2.0, 16)

    images = [Image.fromarray(frame) for frame in frames]
    resized = [image.resize((size, size), Image.Resampling.BICUBIC) for image in images]
    theirs = np.stack([np.array(image) for image in resized])

    difference = np.abs(ours.numpy().astype(int) - theirs)
    assert ours.dtype == torch.uint8
    assert difference.max() <= limit
    assert difference.mean() < 0.4


def test_decoding_is_pixel_exact(tmp_path, monkeypatch):
    """PyAV gives back every pixel that the toy's generator drew.

    In the frames that were asked for, and in the image too.
    """
    drawn = {}
    scenes = []
    write_avi = make_toy.write_avi
    draw_scene = make_toy.draw_scene

    def write_and_keep(path, frames):
        drawn[path] = frames
        write_avi(path, frames)

    def draw_and_keep(*args):
        scenes.append(draw_scene(*args))
        return scenes[-1]

    monkeypatch.setattr(make_toy, "write_avi", write_and_keep)
    monkeypatch.setattr(make_toy, "draw_scene", draw_and_keep)
    split = make_toy.SPLITS["validation_L3"]._replace(size=8)
    records = make_toy.make_split("validation_L3", split, tmp_path, np.random.default_rng(3))

    assert len(drawn) == len(records) == 8
    for path, frames in drawn.items():
        assert np.array_equal(g.read_media("video", path, 56, 2.0, 8), frames)
        assert np.array_equal(g.read_media("video", path, 56, 1.0, 8), frames[[0, 2, 5, 7]])
    for raw, scene in zip(records, scenes):
        path = tmp_path / "images/Ego4D" / raw["current_observation_basename"]
        image = g.read_media("image", path, 56, 2.0, 8)
        assert np.array_equal(image, scene[[8, 8]])


# ---- Prompts -------------------------------------------------------------------------------------
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
QUESTION = (
    "What next?\nA. grab onion\nB. open drawer\nC. wash\nD. cut\n"
    " Output the thinking process in <think> </think>"
    " and final answer in <answer> </answer> tags, i.e.,"
    " <think> reasoning process here </think><answer> answer here </answer>. "
)
ASKED = QUESTION + "<|im_end|>\n<|im_start|>assistant\n"


def test_prompt_with_video_and_image(make_dataset, tokenizer, record):
    """The exact text, and the exact number of placeholders, each once.

    At 252 x 252 (asked as 256) there are 648 for 16 frames beside 81 for the image.
    """
    sample = make_dataset([record], frame_size=256, max_frames=16).begin(0)()
    assert sample["text"] == SYSTEM + VIDEO + IMAGE + ASKED
    assert sample["gold"] == "C"
    assert sample["choices"] == record["choices"]
    assert sample["grids"] == [(8, 18, 18), (1, 18, 18)]
    assert sample["patches"].shape == (8 * 324 + 324, 1176)

    before = tokenizer(SYSTEM + "<|vision_start|>").input_ids
    after = tokenizer("<|vision_end|>" + ASKED).input_ids
    names = ["<|video_pad|>", "<|image_pad|>", "<|vision_start|>", "<|vision_end|>"]
    video, image, start, end = tokenizer.convert_tokens_to_ids(names)
    expected = before + [video] * 648 + [end, start] + [image] * 81 + after
    assert sample["ids"].tolist() == expected
    assert sample["positions"].shape == (3, len(sample["ids"]))

    _, clip = record["media"][0]
    frames = g.read_media("video", clip, 252, 2.0, 16)
    patches, _ = g.to_patches(frames)
    assert frames.shape == (16, 252, 252, 3)
    assert torch.equal(sample["patches"][:2592], patches)


def test_prompt_without_video(make_dataset, tmp_path):
    """An empty task_progress_metadata means the image alone, whatever video_basename says."""
    (tmp_path / "images/Ego4D").mkdir(parents=True)
    Image.fromarray(NOISE[0]).save(tmp_path / "images/Ego4D/5.png")
    raw = dict(
        sample_id=5,
        question="What next?",
        golden_choice_idx="A",
        video_source="Ego4D",
        task_progress_metadata=[],
        choice_a="grab onion",
        choice_b="open drawer",
        choice_c="wash",
        choice_d="cut",
        domain="Work",
        video_basename="nowhere.mp4",
        current_observation_basename="5.png",
    )
    (tmp_path / "rows.jsonl").write_text(json.dumps(raw))

    records = g.load_records(tmp_path / "rows.jsonl", tmp_path)
    sample = make_dataset(records).begin(0)()
    assert sample["text"] == SYSTEM + IMAGE + ASKED
    assert sample["grids"] == [(1, 4, 4)]
    assert sample["patches"].shape == (16, 1176)
    assert (sample["sample_id"], sample["domain"], sample["gold"]) == (5, "Work", "A")


def test_template_is_the_tokenizers(make_dataset, tokenizer, record):
    """The chat template comes from the checkpoint.

    With the vendor's the text is the vendor's, with another it is the other's.
    """
    tokenizer.chat_template = VENDORS_TEMPLATE
    assert make_dataset([record]).begin(0)()["text"] == SYSTEM + VIDEO + IMAGE + ASKED
    tokenizer.chat_template = "{% for part in messages[0].content %}({{ part.type }}){% endfor %}"
    assert make_dataset([record]).encode(record, record["choices"], [])[0] == "(video)(image)(text)"


def test_null_keys_of_chat_rows_are_dropped(make_dataset, tokenizer, record, tmp_path):
    """The released CoT rows carry null-valued keys.

    The vendor's template would take each for an image or a video.
    """
    null = dict(video=None, image=None, text=None)
    content = [
        dict(null, type="video", video="clip.avi"),
        dict(null, type="image", image="now.png"),
        dict(null, type="text", text=QUESTION),
    ]
    raw = dict(
        sample_id=7,
        prompt=[dict(role="user", content=content)],
        response="<think>so</think><answer>C. wash</answer>",
    )

    # The trap is real: with the null keys, everything is an image.
    tokenizer.chat_template = VENDORS_TEMPLATE
    kept = tokenizer.apply_chat_template(raw["prompt"], tokenize=False)
    assert kept.count("<|image_pad|>") == 3

    (tmp_path / "rows.jsonl").write_text(json.dumps(raw))
    records = g.load_records(tmp_path / "rows.jsonl", tmp_path, sft_video.parse_chat)
    sample = make_dataset(records).begin(0)()
    assert sample["text"] == SYSTEM + VIDEO + IMAGE + ASKED
    assert sample["response"] == raw["response"]
    assert sample["grids"] == make_dataset([record]).begin(0)()["grids"]


def test_too_long_prompt_is_an_error(make_dataset, record, capsys):
    """Trap 5: a prompt over the limit ends the program naming sample and both numbers.

    One at the limit passes uncut.
    """
    thought = "<think>so</think>"
    dataset = make_dataset([record | dict(response=thought), record | dict(sample_id="uuid_8")])
    length = len(dataset.begin(0)()["ids"])
    response = len(dataset.tokenizer(thought).input_ids)
    dataset.check_lengths(length + response)
    with pytest.raises(SystemExit) as end:
        dataset.check_lengths(length - 1)

    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == 2
    assert len(lines) == 2
    for line, name, n in zip(lines, (7, "uuid_8"), (length + response, length)):
        assert f"sample_id {name}:" in line
        assert f" {n} " in line
        assert line.endswith(f" {length - 1}")


@pytest.mark.parametrize("written, word", [(0, "fewer"), (1, "fewer"), (3, "more")])
def test_placeholders_that_do_not_fit(make_dataset, record, monkeypatch, capsys, written, word):
    """A template that writes other placeholders than there are media: an error of that record.

    It is told before any work, by sample_id; no exception of an iterator ends a loop early.
    """
    dataset = make_dataset([record, record | dict(sample_id="uuid_8")])
    monkeypatch.setattr(dataset.tokenizer, "chat_template", "<|image_pad|>" * written)
    words = f"its prompt has {word} placeholders than its 2 media"
    with pytest.raises(ValueError, match=words):
        dataset.encode(record, record["choices"], [(2, 4, 4), (1, 4, 4)])
    with pytest.raises(SystemExit) as end:
        dataset.check_lengths(1000)
    assert end.value.code == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.endswith(f"sample_id 7: {words}")
    assert second.endswith(f"sample_id uuid_8: {words}")


def test_length_is_checked_for_every_epoch(make_dataset, record, capsys):
    """Trap 5: the check covers the longest choices that any epoch may draw, not just the first."""
    negatives = ["cut", "grab", "peel", "a very long negative answer " * 30]
    drawn = record | dict(answer="wash", negatives=negatives)
    del drawn["choices"]
    del drawn["gold"]
    dataset = make_dataset([drawn])

    def longest(seed):
        choices, _ = g.choose(dataset.records[0], seed, 0)
        return max(map(len, choices))

    # The first epoch draws short ones.
    dataset.c.seed = next(seed for seed in range(99) if longest(seed) < 9)
    first = len(dataset.begin(0)()["ids"])
    assert max(len(dataset.begin(epoch)()["ids"]) for epoch in range(9)) > first + 30
    with pytest.raises(SystemExit):
        dataset.check_lengths(first + 9)


# ---- Choices and order ---------------------------------------------------------------------------
DRAWN = dict(
    sample_id=7,
    answer="grab onion",
    negatives=["open drawer", "grab knife", "close drawer", "slice onion", "peel onion"],
)


def test_choices_depend_on_seed_epoch_and_sample_alone():
    """Trap 10: the same (seed, epoch, sample_id) draws the same in any process and order.

    Another of the three draws anew.
    """
    golden = (["grab knife", "grab onion", "peel onion", "close drawer"], "B")
    for state in (1, 2):
        random.seed(state)
        torch.manual_seed(state)
        np.random.seed(state)
        g.choose(DRAWN, 1, state)
        assert g.choose(DRAWN, 42, 0) == golden

    assert g.choose(DRAWN, 43, 0) != golden
    assert g.choose(DRAWN, 42, 1) != golden
    assert g.choose(DRAWN | dict(sample_id=8), 42, 0) != golden
    assert g.choose(DRAWN | dict(sample_id="7"), 42, 0) != golden


def test_drawn_choices_are_fair():
    """Trap 10: the answer is among four different choices at the gold letter.

    Letters and negatives come equally often.
    """
    letters = Counter()
    negatives = Counter()
    for i in range(2000):
        choices, gold = g.choose(DRAWN | dict(sample_id=i), 42, 0)
        assert len(set(choices)) == 4
        assert choices["ABCD".index(gold)] == "grab onion"
        letters[gold] += 1
        negatives.update(set(choices) - {"grab onion"})

    # 4 standard deviations.
    assert set(letters) == set("ABCD")
    assert all(abs(n - 500) < 80 for n in letters.values())
    assert set(negatives) == set(DRAWN["negatives"])
    assert all(abs(n - 1200) < 90 for n in negatives.values())


def test_fixed_choices_are_never_shuffled(record):
    """A record with golden_choice_idx keeps its order in every epoch and under every seed.

    A chat row has no choices.
    """
    for seed in range(9):
        for epoch in range(9):
            assert g.choose(record, seed, epoch) == (record["choices"], "C")
    assert g.choose(dict(sample_id=1, messages=[]), 42, 0) == ([], None)


def test_epochs_are_permutations(make_dataset, record):
    """Each epoch runs through all records once, in an order of its own, by (seed, epoch)."""
    records = [record | dict(sample_id=i, media=[]) for i in range(20)]

    def orders(seed):
        dataset = make_dataset(records, seed=seed)
        stream = [dataset.begin(position)()["sample_id"] for position in range(60)]
        return [tuple(stream[start : start + 20]) for start in (0, 20, 40)]

    all_orders = orders(42) + orders(43)
    assert all(sorted(order) == list(range(20)) for order in all_orders)
    assert len(set(all_orders)) == 6
    assert orders(42) == orders(42)


def test_stream_of_positions(make_dataset, record):
    """Trap 10: a position's sample, with its choices, depends on seed and position alone.

    In whatever process and sequence it is read. The same record has other choices in another
    epoch.
    """
    records = [DRAWN | dict(sample_id=i, question="?", media=record["media"]) for i in range(5)]
    dataset = make_dataset(records)
    plain = [dataset.begin(position)() for position in range(15)]
    for position, sample in enumerate(plain):
        expected = g.choose(records[sample["sample_id"]], 42, position // 5)
        assert (sample["choices"], sample["gold"]) == expected
    assert len({tuple(s["choices"]) for s in plain if s["sample_id"] == 3}) > 1

    first, second = g.load_batches(make_dataset(records), [[7, 2], [9]], 1)
    for sample, position in zip(first + second, (7, 2, 9), strict=True):
        assert sample["text"] == plain[position]["text"]
        assert torch.equal(sample["patches"], plain[position]["patches"])

    dataset.shuffle = False
    assert [dataset.begin(position)()["sample_id"] for position in range(5)] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "world, expected",
    [
        (1, [[[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10], [], []]]),
        (2, [[[0, 1], [4, 5], [8, 9], []], [[2, 3], [6, 7], [10], []]]),
        (4, [[[0, 1], [8, 9]], [[2, 3], [10]], [[4, 5], []], [[6, 7], []]]),
    ],
)
def test_rank_batches(monkeypatch, world, expected):
    """11 samples, 8 a step, 2 a micro-batch: the exact lists of each rank.

    The tail is not lost, and nobody starves.
    """
    monkeypatch.setattr(g, "WORLD", world)
    accumulation = 4 // world
    lists = []
    for rank in range(world):
        monkeypatch.setattr(g, "RANK", rank)
        batches = g.rank_batches(11, range(2), 2, accumulation)
        resumed = g.rank_batches(11, range(1, 2), 2, accumulation)
        assert resumed == batches[accumulation:]
        lists.append([list(batch) for batch in batches])
    assert lists == expected


def test_a_steps_samples_do_not_depend_on_the_ranks(monkeypatch):
    """Each step has the same set of samples, however its global batch of 12 is cut.

    It is cut into ranks, micro-batches and prompts.
    """
    expected = [list(range(0, 12)), list(range(12, 24)), list(range(24, 36)), list(range(36, 40))]
    cuts = [(1, 1, 12), (1, 12, 1), (2, 3, 2), (4, 1, 3), (4, 3, 1), (3, 2, 2)]
    for world, accumulation, B in cuts:
        monkeypatch.setattr(g, "WORLD", world)
        steps = [[], [], [], []]
        for rank in range(world):
            monkeypatch.setattr(g, "RANK", rank)
            for i, batch in enumerate(g.rank_batches(40, range(4), B, accumulation)):
                steps[i // accumulation] += batch
        assert [sorted(step) for step in steps] == expected


# ---- Positions and placeholders ------------------------------------------------------------------
ROPE_CONFIG = SimpleNamespace(vision_config=VISION, image_token_id=98, video_token_id=99)


def test_mrope_positions():
    """Text, a 2 x (4 x 4) video, text, a 1 x (4 x 6) image, text: every (t, h, w) by hand."""
    ids = [1, 2, 3] + [99] * 8 + [4, 5] + [98] * 6 + [6, 7]
    # Text 0-2; the video starts at 3 and ends at 4; text 5-6; the image starts at 7,
    # its widest is 9; text 10-11.
    expected = [
        [0, 1, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 6, 7, 7, 7, 7, 7, 7, 10, 11],
        [0, 1, 2, 3, 3, 4, 4, 3, 3, 4, 4, 5, 6, 7, 7, 7, 8, 8, 8, 10, 11],
        [0, 1, 2, 3, 4, 3, 4, 3, 4, 3, 4, 5, 6, 7, 8, 9, 7, 8, 9, 10, 11],
    ]
    assert g.mrope_positions(ids, [(2, 4, 4), (1, 4, 6)], ROPE_CONFIG).tolist() == expected

    sample = dict(
        ids=torch.tensor(ids),
        positions=torch.tensor(expected),
        patches=torch.zeros(0, 1176).byte(),
        grids=[],
    )
    assert int(collate(sample).last_position) == 11


@pytest.mark.parametrize(
    "grid, after", [((2, 4, 4), 3), ((1, 4, 8), 5), ((1, 8, 4), 5), ((4, 4, 4), 5), ((9, 4, 4), 10)]
)
def test_position_after_a_vision_block(grid, after):
    """The trained rule: the maximum over t, h and w of the merged grid, plus 1.

    Also where t is the largest.
    """
    t, h, w = grid
    ids = [1] + [99] * (t * h * w // 4) + [2]
    positions = g.mrope_positions(ids, [grid], ROPE_CONFIG)
    assert positions[:, 0].tolist() == [0, 0, 0]
    assert positions[:, -1].tolist() == [after] * 3


@torch.no_grad()
def test_vision_features_only_in_the_prompts_placeholders(tiny_model, monkeypatch):
    """Trap 12: a policy that says <|video_pad|> or <|image_pad|> has said a word.

    The features stay in the prompt.
    """
    _, _, model = tiny_model()
    c = model.config
    both = make_sample(c, 2, ("video", (2, 4, 4)), 3, ("image", (1, 4, 4)), 1)
    text = make_sample(c, 4, seed=1)
    prompts = collate(both, text)

    x = model.embed(prompts).view(2, -1, 64)
    features = model.visual(prompts.patches, prompts.grids, model.run)
    vision = torch.isin(prompts.ids, torch.tensor([c.image_token_id, c.video_token_id]))
    assert vision.sum() == len(features) == 12
    assert torch.equal(x[vision], features)
    assert torch.equal(x[~vision], model.model.embed_tokens(prompts.ids[~vision]))

    def pick(log_probs, uniform, greedy):
        """One row says <|video_pad|>, the next <|image_pad|>."""
        return torch.tensor([c.video_token_id, c.image_token_id]).repeat(len(log_probs) // 2)

    monkeypatch.setattr(g, "pick", pick)
    said, _ = g.generate(model, prompts, 2, 4, [396, 395], [0, 1])
    assert said.tolist() == [[[c.video_token_id] * 4, [c.image_token_id] * 4]] * 2
    assert model(prompts, said).isfinite().all()
    assert torch.equal(model.embed(prompts).view(2, -1, 64), x)

    # With a word's embedding, it is that word.
    embeddings = model.model.embed_tokens.weight
    embeddings[[c.video_token_id, c.image_token_id]] = embeddings[[5]]
    word = torch.full_like(said, 5)
    torch.testing.assert_close(model(prompts, said), model(prompts, word))


# ---- Faults --------------------------------------------------------------------------------------
def test_unreadable_video_is_reported_not_replaced(make_dataset, record, tmp_path):
    """Trap 13: an unreadable video gives {sample_id, error} with path and cause, no pixels.

    The sample beside it is untouched.
    """
    broken = tmp_path / "broken.avi"
    broken.write_text("no video\n" * 99)
    bad = record | dict(sample_id="bad_1", media=[("video", broken), record["media"][1]])
    dataset = make_dataset([bad, record])
    samples = {s["sample_id"]: s for s in (dataset.begin(0)(), dataset.begin(1)())}

    assert "broken.avi" in samples["bad_1"]["error"]
    assert "Error" in samples["bad_1"]["error"]
    assert not {"patches", "grids", "ids", "text"} & set(samples["bad_1"])
    assert "error" not in samples[7]
    assert samples[7]["grids"] == [(4, 4, 4), (1, 4, 4)]


def children():
    """The processes that this one has started and that still run."""
    tasks = Path("/proc/self/task").iterdir()
    return set(" ".join((task / "children").read_text() for task in tasks).split())


@pytest.fixture
def numbered(make_dataset, record, monkeypatch):
    """numbered(decode, count, **changes) -> VideoDataset of that many records, in their order.

    Record n has one video, named n, of which decode(n) gives the value of all pixels.
    """

    def make(decode, count, **changes):
        def read_media(kind, path, *_):
            return torch.full((2, 56, 56, 3), decode(int(path.name)), dtype=torch.uint8)

        # What is patched before the first sample, the decoding processes inherit.
        monkeypatch.setattr(g, "read_media", read_media)
        records = []
        for n in range(count):
            records.append(record | dict(sample_id=n, media=[("video", Path(f"/videos/{n}"))]))
        dataset = make_dataset(records, **changes)
        dataset.shuffle = False
        return dataset

    return make


def value(sample):
    """What all of a numbered sample's pixels are."""
    [pixel] = sample["patches"].unique().tolist()
    return pixel


def hang():
    time.sleep(20)


def hang_with_the_gil():
    ctypes.PyDLL(None).sleep(20)


def loop():
    end = time.perf_counter() + 20
    while time.perf_counter() < end:
        pass


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "job, message",
    [
        (hang, "decoding took over 1.0 s"),
        (hang_with_the_gil, "decoding took over 1.0 s"),
        (loop, "decoding took over 1.0 s"),
        (lambda: os._exit(3), "decoder died with exit code 3"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "decoder died with exit code -9"),
        (lambda: int("four\nlines"), "ValueError: invalid literal"),
        (lambda: [][1], "IndexError"),
    ],
    ids=["hang", "hang with the GIL", "loop", "exit", "killed", "raise with a newline", "raise"],
)
def test_a_decoder_that_fails(numbered, job, message, workers):
    """Trap 14: a decoder that hangs, crashes or raises loses its own sample in time.

    The next samples decode, and no process is left when all are through.
    """

    def decode(n):
        if n == 2:
            return job()
        return 10 + n

    before = children()
    dataset = numbered(decode, 6, decode_timeout=1.0, dataloader_num_workers=workers)
    start = time.perf_counter()
    samples = []
    for batch in g.load_batches(dataset, [[0], [1, 2], [3], [4, 5]], workers):
        samples += batch
    assert time.perf_counter() - start < 15
    assert children() == before

    assert [sample["sample_id"] for sample in samples] == list(range(6))
    for n, sample in enumerate(samples):
        if n == 2:
            assert "patches" not in sample
            assert sample["error"].startswith(f"/videos/2: {message}")
            assert "\n" not in sample["error"]
        else:
            assert "error" not in sample
            assert value(sample) == 10 + n


def test_each_dataset_has_its_own_decoders(numbered, monkeypatch):
    """Two datasets decode at the same time, in two processes each, whatever came before.

    Samples would be mixed up among those that talk to one process, or that overtake each other.
    """

    def decode(n):
        time.sleep(0.02 * (n % 3))
        return n

    def decode_others(n):
        time.sleep(0.02 * (n % 2))
        return 100 + n

    first = numbered(decode, 40)
    assert value(first.begin(3)()) == 3
    second = numbered(decode_others, 40)
    positions = [[n] for n in range(40)]
    pairs = zip(g.load_batches(first, positions, 2), g.load_batches(second, positions, 2))
    for n, ([one], [other]) in enumerate(pairs):
        assert value(one) == n
        assert value(other) == 100 + n
        if n == 20:
            assert value(first.begin(4)()) == 4


def test_the_time_limit_is_for_one_sample(numbered, tmp_path):
    """Trap 14: the clock starts anew with each sample and stands still between them.

    So a long run of good samples goes on, in the same process. Nor does it run for a sample that
    waits for its turn.
    """

    def decode(n):
        time.sleep(0.4)
        (tmp_path / str(n)).write_text(str(os.getpid()))
        return n

    dataset = numbered(decode, 9, decode_timeout=1.0, dataloader_num_workers=1)
    for n in range(3):
        assert value(dataset.begin(n)()) == n
        if n == 0:
            time.sleep(1.2)

    waiting = [[3, 4, 5, 6], [7, 8]]
    for n, sample in enumerate(itertools.chain(*g.load_batches(dataset, waiting, 1)), 3):
        assert value(sample) == n
    assert len({(tmp_path / str(n)).read_text() for n in range(9)}) == 1
