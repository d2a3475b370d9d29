"""The toy: a tiny Qwen2-VL and SEED-Bench-R1-shaped data.

With it every script runs in a minute on two CPU cores.

A shape slides left, right, up or down over a textured background; the question asks for the next
action.
    OUT/data    annotations/, videos/, images/ in SEED-Bench-R1's layout, and lvb_val.json in
                LongVideoBench's
    OUT/model   a Hugging Face folder: a base model that answers in the right format, but has not
                learnt to look
The base model comes from running sft_video.py itself on answers drawn without regard to the video,
so whatever accuracy GRPO adds, it adds by looking. Half of these answers have a chain of thought
that was drawn by itself: the base's chains are loose, as a large model's are, and what training
makes of them can be seen (toy/findings.py). The same seed gives the same bytes in OUT/data and in
the untrained model.

    python toy/make_toy.py [--out toy] [--seed 0]
"""

import argparse
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2VLConfig, Qwen2VLForConditionalGeneration

HERE = Path(__file__).resolve().parent

# ---- The world: T frames of S x S pixels, then the observation ----
S, T, FPS = 56, 8, 2
BOX = 21  # pixels, a side of the shape
JITTER = 2  # pixels by which the shape's start is off the middle, at most
TRAVEL = 15  # pixels from the shape's start to the observation
MOVES = {  # (x, y)
    "move left": (-1, 0),
    "move right": (1, 0),
    "move up": (0, -1),
    "move down": (0, 1),
}
CHOICES = list(MOVES)  # A to D, in this order
TEXTURES = {
    "bars": lambda x, y: x // 5 % 2,
    "shelves": lambda x, y: y // 5 % 2,
    "checks": lambda x, y: (x // 7 + y // 7) % 2,
    "diagonal": lambda x, y: (x + y) // 6 % 2,
    "dots": lambda x, y: (x % 9 < 4) & (y % 9 < 4),
    "ripples": lambda x, y: (x * x + y * y) // 200 % 2,
    "bricks": lambda x, y: (y % 8 < 2) | ((x + y // 8 * 7) % 14 < 2),
}
SHAPES = {  # x and y count from the middle of the shape
    "block": lambda x, y: np.ones_like(x, bool),
    "disc": lambda x, y: x * x + y * y <= 105,
    "cross": lambda x, y: np.minimum(abs(x), abs(y)) <= 4,
    "ring": lambda x, y: abs(x * x + y * y - 72) <= 33,
}
# Lighter than any background: a model this small finds what differs in brightness, within a minute.
COLOURS = {
    "red": (255, 90, 90),
    "blue": (100, 140, 255),
    "yellow": (250, 230, 80),
    "white": (250, 250, 250),
    "green": (90, 240, 110),
    "pink": (255, 150, 220),
    "orange": (255, 170, 70),
}
LIGHT = {  # of a background, by source: unseen kitchens are lighter
    "EpicKitchens": (20, 70),
    "Ego4D": (65, 115),
    "": (20, 70),
}

SEEN_TEXTURES = ("bars", "shelves", "checks")
SEEN_GOALS = ("follow the {} block",)
SEEN_COLOURS = ("red", "blue", "yellow", "white")


class Split(NamedTuple):
    size: int
    source: str
    first_id: int
    textures: tuple = SEEN_TEXTURES
    goals: tuple = SEEN_GOALS  # "<verb> the {colour} <shape>"
    colours: tuple = SEEN_COLOURS


SPLITS = {
    "training_6k": Split(240, "EpicKitchens", 0),
    "validation_L1": Split(120, "EpicKitchens", 1000),
    "validation_L2": Split(120, "Ego4D", 2000, textures=("diagonal", "dots")),
    "validation_L3": Split(
        120,
        "Ego4D",
        3000,
        textures=("ripples", "bricks"),
        goals=("chase the {} disc", "catch the {} cross", "trace the {} ring"),
        colours=("green", "pink", "orange"),
    ),
}
L3_DOMAINS = ("Daily life", "Work", "Hobbies", "Recreation")
LVB = Split(24, "", 0, textures=(*SEEN_TEXTURES, "diagonal", "dots"))
LVB_GROUPS = (15, 60, 600, 3600)
LVB_CATEGORIES = ("S2A", "E2O", "T2A", "SAA")

# ---- The words ----
QUESTION = (
    "Considering the progress shown in the video and my current observation shown in the image, "
    "what action should I take next in order to {}?"
)
INSTRUCTION = (
    " Output the thinking process in <think> </think> and final answer in <answer> </answer> "
    "tags, i.e., <think> reasoning process here </think><answer> answer here </answer>. "
)
RESPONSE = "<think>it moves {}</think><answer>{}. move {}</answer>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message.role != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}"
    "{% if part.type == 'text' %}{{ part.text }}"
    "{% else %}<|vision_start|><|{{ part.type }}_pad|><|vision_end|>{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_NAMES = (
    "endoftext im_start im_end object_ref_start object_ref_end box_start box_end quad_start "
    "quad_end vision_start vision_end vision_pad image_pad video_pad"
).split()
SPECIAL_TOKENS = [f"<|{name}|>" for name in SPECIAL_NAMES]
MAX_VOCAB = 512  # enough for every word of L3's goals to be one token, as the seen ones are

# ---- The model ----
ARCHITECTURE = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 192,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
    "initializer_range": 0.06,
    "vision_config": {
        "depth": 2,
        "embed_dim": 48,
        "num_heads": 4,
        "mlp_ratio": 4,
        "in_channels": 3,
        "hidden_size": 64,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "initializer_range": 0.06,
    },
}
# The vendor's values: whoever lets them into its sampling becomes greedy, and every group of
# answers is alike.
SAMPLING = {
    "do_sample": True,
    "temperature": 0.01,
    "top_k": 1,
    "top_p": 0.001,
    "repetition_penalty": 1.0,
}

# ---- The base model's training ----
FORMAT_REPEATS = 8  # format-only rows of one training record: each of the four choices as often
LOOSE = 0.5  # share of them whose thought is drawn anew; by chance a quarter of these agree
BASE_LEARNING_RATE = 5e-3
BASE_BATCH = 16


def write_avi(path: Path, frames: np.ndarray):
    """Uncompressed AVI from (T, H, W, 3) uint8 RGB; W % 4 must be 0.

    No encoder is needed, and every pixel survives.
    """

    def chunk(tag: bytes, body: bytes) -> bytes:
        return tag + struct.pack("<I", len(body)) + body

    n, height, width, _ = frames.shape
    size = height * width * 3

    # AVIMAINHEADER: microseconds a frame, bytes a second, padding, flags (there is an index),
    # frames, initial frames, streams, buffer size, width, height, four reserved.
    timing = (1_000_000 // FPS, size * FPS, 0, 0x10)
    avih = struct.pack("<14I", *timing, n, 0, 1, size, width, height, 0, 0, 0, 0)

    # AVISTREAMHEADER: flags, priority and language, initial frames, scale, rate, start, length,
    # buffer size, quality, sample size, and the rectangle.
    strh = struct.pack("<10I4H", 0, 0, 0, 1, FPS, 0, n, size, 0, 0, 0, 0, width, height)

    # BITMAPINFOHEADER: its own size, width, height, planes, bits a pixel, compression, bytes of
    # the picture, pixels a metre (x, y), colours used, colours that matter.
    strf = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, size, 0, 0, 0, 0)

    stream = chunk(b"strh", b"vidsDIB " + strh) + chunk(b"strf", strf)
    header = chunk(b"avih", avih) + chunk(b"LIST", b"strl" + stream)

    # A BMP's rows go from the bottom up, and its channels from blue to red.
    pictures = np.ascontiguousarray(frames[:, ::-1, :, ::-1])
    movie = b"".join(chunk(b"00db", picture.tobytes()) for picture in pictures)
    index = b"".join(b"00db" + struct.pack("<3I", 0x10, 4 + i * (8 + size), size) for i in range(n))

    lists = chunk(b"LIST", b"hdrl" + header) + chunk(b"LIST", b"movi" + movie)
    path.write_bytes(chunk(b"RIFF", b"AVI " + lists + chunk(b"idx1", index)))


def draw_scene(
    split: Split, shape: str, colour: str, move: str, rng: np.random.Generator
) -> np.ndarray:
    """(T + 1, S, S, 3) uint8 RGB: the video's T frames, then the observation one step later."""
    y, x = np.mgrid[:S, :S] + rng.integers(0, 18, (2, 1, 1))  # a random phase
    pattern = TEXTURES[str(rng.choice(split.textures))](x, y)
    light = rng.integers(*LIGHT[split.source], 3)
    background = (light + 30 * pattern[..., None]).astype(np.uint8)
    frames = np.repeat(background[None], T + 1, axis=0)

    mask = SHAPES[shape](*np.mgrid[:BOX, :BOX] - BOX // 2)
    start = (S - BOX) // 2 + rng.integers(-JITTER, JITTER + 1, 2)
    for t, frame in enumerate(frames):
        left, top = start + t * TRAVEL // T * np.array(MOVES[move])
        frame[top : top + BOX, left : left + BOX][mask] = COLOURS[colour]
    return frames


def draw_golds(size: int, rng: np.random.Generator) -> list[int]:
    """Right choices, 0 to 3; every four rows hold each once: any prefix of a file is balanced."""
    golds = []
    for _ in range(size // 4):
        golds += rng.permutation(4).tolist()
    return golds


def make_split(name: str, split: Split, data: Path, rng: np.random.Generator) -> list[dict]:
    """Draw one of SEED-Bench-R1's splits: write its videos and images, return its records."""
    videos = data / "videos" / split.source
    images = data / "images" / split.source
    videos.mkdir(parents=True, exist_ok=True)
    images.mkdir(parents=True, exist_ok=True)

    unseen = name == "validation_L3"
    records = []
    for i, gold in enumerate(draw_golds(split.size, rng)):
        colour = str(rng.choice(split.colours))
        goal = str(rng.choice(split.goals))
        shape = goal.split()[-1]
        sample_id = split.first_id + i
        if unseen:
            sample_id = f"{uuid.UUID(bytes=rng.bytes(16), version=4)}_{i}"

        # Whole fours, so that the records without a video are balanced too.
        has_video = i // 4 % 12 != 5
        frames = draw_scene(split, shape, colour, CHOICES[gold], rng)
        if has_video:
            write_avi(videos / f"{sample_id}.avi", frames[:T])
        Image.fromarray(frames[T]).save(images / f"{sample_id}.png")

        narrations = [f"see the {colour} {shape} move"] if has_video else []
        record = make_record(split, sample_id, goal.format(colour), gold, narrations)
        if unseen:
            record["domain"] = L3_DOMAINS[i % 4]
            record["scenario"] = f"{shape} in motion"
            record["task_start_frame"] = 0
        records.append(record)
    return records


def make_record(split: Split, sample_id, goal: str, gold: int, narrations: list[str]) -> dict:
    """A row of SEED-Bench-R1's annotations; the narrations tell what its video shows, if any."""
    choices = {f"choice_{letter}": text for letter, text in zip("abcd", CHOICES)}
    progress = [
        {"narration_text": text, "start_frame": 0, "stop_frame": T - 1} for text in narrations
    ]

    return {
        "sample_id": sample_id,
        "video_source": split.source,
        "video_id": f"toy_{sample_id}",
        "task_goal": goal,
        "question": QUESTION.format(goal),
        "answer": CHOICES[gold],
        **choices,
        "golden_choice_idx": "ABCD"[gold],
        "task_progress_metadata": progress,
        "video_basename": f"{sample_id}.avi",
        "current_observation_basename": f"{sample_id}.png",
    }


def make_lvb(data: Path, rng: np.random.Generator) -> list[dict]:
    """LongVideoBench's shape: a question about a video alone, with four or five candidates."""
    records = []
    for i, gold in enumerate(draw_golds(LVB.size, rng)):
        video = f"lvb_{i:02d}"
        colour = str(rng.choice(LVB.colours))
        frames = draw_scene(LVB, "block", colour, CHOICES[gold], rng)
        write_avi(data / "videos" / f"{video}.avi", frames[:T])

        records.append(
            {
                "id": f"{video}_0",
                "video_path": f"{video}.avi",
                "question": f"What does the {colour} block do next?",
                "candidates": CHOICES + ["stand still"] * (i // 4 % 2),
                "correct_choice": gold,
                "duration_group": LVB_GROUPS[i % 4],
                "question_category": LVB_CATEGORIES[(i + i // 4) % 4],
                "topic_category": "toy",
                "level": "L1-Perception",
                "duration": T / FPS,
                "subtitle_path": f"{video}_en.json",
            }
        )
    return records


def user_text(question: str, choices: list[str]) -> str:
    lines = [f"{letter}. {text}" for letter, text in zip("ABCDE", choices)]
    return "\n".join([question, *lines, INSTRUCTION])


def sft_row(record: dict, thought: int, choice: int, sample_id) -> dict:
    """A row of training_with_cot_6k: the chat prompt, and a response.

    It thinks of the choice `thought`, and answers `choice`.
    """
    source = record["video_source"]
    null = {"video": None, "image": None, "text": None}
    content = []
    if record["task_progress_metadata"]:
        video = f"videos/{source}/{record['video_basename']}"
        content.append({"type": "video", **null, "video": video})
    image = f"images/{source}/{record['current_observation_basename']}"
    content.append({"type": "image", **null, "image": image})
    content.append({"type": "text", **null, "text": user_text(record["question"], CHOICES)})

    directions = [move.split()[1] for move in CHOICES]
    return {
        "sample_id": sample_id,
        "prompt": [{"role": "user", "content": content}],
        "response": RESPONSE.format(directions[thought], "ABCD"[choice], directions[choice]),
    }


def make_data(data: Path, seed: int) -> list[str]:
    """Write the whole data root; return the texts in it, for the tokenizer to train on."""
    (data / "annotations").mkdir(parents=True)
    rng = np.random.default_rng(seed)
    rows = {}
    texts = []
    for name, split in SPLITS.items():
        rows[name] = make_split(name, split, data, rng)
        texts += [user_text(record["question"], CHOICES) for record in rows[name]]

    rows["training_with_cot_6k"] = []
    rows["format_only"] = []
    thoughts = np.random.default_rng((seed, 1))  # its own: all other draws are as without it
    for record in rows["training_6k"]:
        gold = "ABCD".index(record["golden_choice_idx"])
        rows["training_with_cot_6k"].append(sft_row(record, gold, gold, record["sample_id"]))
        for k, choice in enumerate(rng.permutation(FORMAT_REPEATS) % 4):
            thought = thoughts.integers(4) if thoughts.random() < LOOSE else choice
            sample_id = record["sample_id"] * FORMAT_REPEATS + k
            rows["format_only"].append(sft_row(record, thought, choice, sample_id))

    for name, records in rows.items():
        lines = [json.dumps(record) + "\n" for record in records]
        (data / f"annotations/{name}.jsonl").write_text("".join(lines))

    lvb = make_lvb(data, rng)
    (data / "lvb_val.json").write_text(json.dumps(lvb, indent=1))
    texts += [user_text(record["question"], record["candidates"]) for record in lvb]
    return texts + [row["response"] for row in rows["training_with_cot_6k"]]


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE. Phrases merge across words; tags, letters and words with meaning do not."""
    meaning = {*COLOURS, *(move.split()[1] for move in CHOICES)}
    for split in SPLITS.values():
        for goal in split.goals:
            meaning |= {*goal.split()} - {"{}"}
    alone = Regex(rf"(</?[a-z]+>)+|\b[A-E]\b|\n| ({'|'.join(sorted(meaning))})\b")

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(alone, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()

    template = ["You are a helpful assistant.", "system\nuser\nassistant"]
    trainer = trainers.BpeTrainer(
        vocab_size=MAX_VOCAB - len(SPECIAL_TOKENS),
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(texts + template * len(texts), trainer)
    bpe.add_special_tokens(SPECIAL_TOKENS)  # after the vocabulary, as in Qwen2-VL
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        chat_template=CHAT_TEMPLATE,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        clean_up_tokenization_spaces=False,
        model_max_length=32768,
    )


def make_untrained_model(folder: Path, tokenizer: PreTrainedTokenizerFast, seed: int):
    """Write the tokenizer, both configurations (config.json flat, as on the hub) and the weights.

    The weights are random, in fp32.
    """
    token_id = dict(zip(SPECIAL_NAMES, tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS)))
    ends = {"bos_token_id": token_id["endoftext"], "pad_token_id": token_id["endoftext"]}
    config = {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "torch_dtype": "float32",
        **ends,
        "eos_token_id": token_id["im_end"],
        "vision_start_token_id": token_id["vision_start"],
        "vision_end_token_id": token_id["vision_end"],
        "vision_token_id": token_id["vision_pad"],
        "image_token_id": token_id["image_pad"],
        "video_token_id": token_id["video_pad"],
        "vocab_size": len(tokenizer),
        **ARCHITECTURE,
    }
    with torch.random.fork_rng(devices=[]):  # the caller's generator is not ours to reseed
        torch.manual_seed(seed)
        model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(**config))

    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    stop_at = [token_id["im_end"], token_id["endoftext"]]
    generation = {**SAMPLING, **ends, "eos_token_id": stop_at}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2))


def train_base(init: Path, data: Path, run: Path, model: Path, seed: int):
    """Teach `init` the answer's format by sft_video.py, as one process.

    `model` becomes `init` with the trained weights.
    """
    flags = {
        "model": init,
        "data_root": data,
        "annotations": data / "annotations/format_only.jsonl",
        "output_dir": run,
        "learning_rate": BASE_LEARNING_RATE,
        "num_train_epochs": 1,
        "per_device_train_batch_size": BASE_BATCH,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": "false",
        "max_frames": T,
        "frame_size": S,
        "seed": seed,
        # Random answers would only teach the vision tower to fall silent.
        "freeze_vision": "true",
        "save_steps": 1000,
    }
    command = [sys.executable, str(HERE.parent / "sft_video.py")]
    for flag, value in flags.items():
        command += [f"--{flag}", str(value)]

    # Under torchrun the child would else wait for the ranks that its environment promises.
    ranks = re.compile("RANK|WORLD_SIZE|MASTER_|TORCHELASTIC")
    env = {name: value for name, value in os.environ.items() if not ranks.search(name)}
    env["OMP_NUM_THREADS"] = "1"  # matrices this small lose more to a second thread than they gain
    subprocess.run(command, env=env, check=True)

    shutil.copytree(init, model, ignore=shutil.ignore_patterns("*.safetensors*"))
    for weights in run.glob("*.safetensors*"):
        shutil.copyfile(weights, model / weights.name)


def make_toy(out: Path, seed: int = 0):
    """Write out/data and out/model, replacing earlier ones.

    Both are built beside their places and renamed when they are complete.
    """
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".building-") as folder:
        building = Path(folder).resolve()
        texts = make_data(building / "data", seed)
        make_untrained_model(building / "init", make_tokenizer(texts), seed)
        train_base(building / "init", building / "data", building / "run", building / "model", seed)

        for name in ("data", "model"):
            if (out / name).exists():
                (out / name).rename(building / f"old_{name}")
            (building / name).rename(out / name)
            sizes = [path.stat().st_size for path in (out / name).rglob("*") if path.is_file()]
            print(f"{out / name}: {len(sizes)} files, {sum(sizes) / 2**20:.1f} MiB")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write to")
    parser.add_argument("--seed", type=int, default=0, help="seed of the data and of the model")
    args = parser.parse_args()
    make_toy(args.out, args.seed)


if __name__ == "__main__":
    main()
