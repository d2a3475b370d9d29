"""The toy: a tiny Qwen2-VL and SEED-Bench-R1-shaped data, so that every script runs in a minute on two CPU cores.

A shape slides left, right, up or down over a textured background; the question asks for the next action.
    OUT/data    annotations/, videos/, images/ in SEED-Bench-R1's layout, and lvb_val.json in LongVideoBench's
    OUT/model   a Hugging Face folder: a base model that answers in the right format, but has not learnt to look
The base model comes from running sft_video.py itself on answers drawn without regard to the video, so whatever
accuracy GRPO adds, it adds by looking. The same seed gives the same bytes in OUT/data and in the untrained model.

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
BOX, JITTER, TRAVEL = 21, 2, 15  # pixels: a side of the shape, the spread of its start, its way to the observation
MOVES = {"move left": (-1, 0), "move right": (1, 0), "move up": (0, -1), "move down": (0, 1)}  # A to D, in this order
TEXTURES = {
    "bars": lambda x, y: x // 5 % 2,
    "shelves": lambda x, y: y // 5 % 2,
    "checks": lambda x, y: (x // 7 + y // 7) % 2,
    "diagonal": lambda x, y: (x + y) // 6 % 2,
    "dots": lambda x, y: (x % 9 < 4) & (y % 9 < 4),
    "ripples": lambda x, y: (x * x + y * y) // 200 % 2,
    "bricks": lambda x, y: (y % 8 < 2) | ((x + y // 8 * 7) % 14 < 2)}
SHAPES = {  # x and y count from the middle of the shape
    "block": lambda x, y: np.ones_like(x, bool),
    "disc": lambda x, y: x * x + y * y <= 105,
    "cross": lambda x, y: np.minimum(abs(x), abs(y)) <= 4,
    "ring": lambda x, y: abs(x * x + y * y - 72) <= 33}
# Lighter than any background: a model this small finds what differs in brightness, within a minute.
COLOURS = {"red": (255, 90, 90), "blue": (100, 140, 255), "yellow": (250, 230, 80), "white": (250, 250, 250),
           "green": (90, 240, 110), "pink": (255, 150, 220), "orange": (255, 170, 70)}
LIGHT = {"EpicKitchens": (20, 70), "Ego4D": (65, 115), "": (20, 70)}  # of a background: unseen kitchens are lighter

class Split(NamedTuple):
    size: int
    source: str
    first_id: int
    textures: tuple
    goals: tuple  # "<verb> the {colour} <shape>"
    colours: tuple

SEEN = (("bars", "shelves", "checks"), ("follow the {} block",), ("red", "blue", "yellow", "white"))
SPLITS = {
    "training_6k": Split(240, "EpicKitchens", 0, *SEEN),
    "validation_L1": Split(120, "EpicKitchens", 1000, *SEEN),
    "validation_L2": Split(120, "Ego4D", 2000, ("diagonal", "dots"), *SEEN[1:]),
    "validation_L3": Split(120, "Ego4D", 3000, ("ripples", "bricks"),
                           ("chase the {} disc", "catch the {} cross", "trace the {} ring"),
                           ("green", "pink", "orange"))}
LVB = Split(24, "", 0, (*SEEN[0], "diagonal", "dots"), *SEEN[1:])
L3_DOMAINS = ("Daily life", "Work", "Hobbies", "Recreation")
LVB_GROUPS, LVB_CATEGORIES = (15, 60, 600, 3600), ("S2A", "E2O", "T2A", "SAA")

# ---- The words ----
QUESTION = ("Considering the progress shown in the video and my current observation shown in the image, "
            "what action should I take next in order to {}?")
INSTRUCTION = (" Output the thinking process in <think> </think> and final answer in <answer> </answer> tags, i.e., "
               "<think> reasoning process here </think><answer> answer here </answer>. ")
RESPONSE = "<think>it moves {}</think><answer>{}. move {}</answer>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message.role != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'text' %}{{ part.text }}"
    "{% else %}<|vision_start|><|{{ part.type }}_pad|><|vision_end|>{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
SPECIAL_TOKENS = [f"<|{name}|>" for name in (
    "endoftext", "im_start", "im_end", "object_ref_start", "object_ref_end", "box_start", "box_end", "quad_start",
    "quad_end", "vision_start", "vision_end", "vision_pad", "image_pad", "video_pad")]
MAX_VOCAB = 512  # enough for every word of L3's goals to be one token, as the seen ones are

# ---- The base model's training ----
FORMAT_REPEATS = 8  # format-only rows made of one training record: each of the four choices equally often
BASE_LEARNING_RATE, BASE_BATCH = 5e-3, 16

def write_avi(path: Path, frames: np.ndarray):
    """Uncompressed AVI from (T, H, W, 3) uint8 RGB: no encoder needed, and every pixel survives. W % 4 must be 0."""
    def chunk(tag: bytes, body: bytes) -> bytes:
        return tag + struct.pack("<I", len(body)) + body

    n, height, width, _ = frames.shape
    size = height * width * 3
    bottom_up_bgr = np.ascontiguousarray(frames[:, ::-1, :, ::-1])  # a BMP's order of rows and channels
    avih = struct.pack("<14I", 1_000_000 // FPS, size * FPS, 0, 0x10, n, 0, 1, size, width, height, 0, 0, 0, 0)
    strh = b"vidsDIB " + struct.pack("<10I4H", 0, 0, 0, 1, FPS, 0, n, size, 0, 0, 0, 0, width, height)
    strf = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, size, 0, 0, 0, 0)
    stream = chunk(b"LIST", b"strl" + chunk(b"strh", strh) + chunk(b"strf", strf))
    header = chunk(b"LIST", b"hdrl" + chunk(b"avih", avih) + stream)
    movie = chunk(b"LIST", b"movi" + b"".join(chunk(b"00db", frame.tobytes()) for frame in bottom_up_bgr))
    index = b"".join(b"00db" + struct.pack("<3I", 0x10, 4 + i * (8 + size), size) for i in range(n))
    path.write_bytes(chunk(b"RIFF", b"AVI " + header + movie + chunk(b"idx1", index)))

def draw_scene(split: Split, shape: str, colour: str, move: str, rng: np.random.Generator) -> np.ndarray:
    """(T + 1, S, S, 3) uint8 RGB: the video's T frames, then the observation one step later."""
    y, x = np.mgrid[:S, :S] + rng.integers(0, 18, (2, 1, 1))  # a random phase
    pattern = TEXTURES[str(rng.choice(split.textures))](x, y)
    background = (rng.integers(*LIGHT[split.source], 3) + 30 * pattern[..., None]).astype(np.uint8)
    mask = SHAPES[shape](*np.mgrid[:BOX, :BOX] - BOX // 2)
    start = (S - BOX) // 2 + rng.integers(-JITTER, JITTER + 1, 2)
    frames = np.repeat(background[None], T + 1, axis=0)
    for t, frame in enumerate(frames):
        left, top = start + t * TRAVEL // T * np.array(MOVES[move])
        frame[top:top + BOX, left:left + BOX][mask] = COLOURS[colour]
    return frames

def draw_golds(size: int, rng: np.random.Generator) -> list[int]:
    """Right choices, 0 to 3; every four rows hold each of them once, so that any prefix of a file is balanced."""
    return [int(gold) for _ in range(size // 4) for gold in rng.permutation(4)]

def make_split(name: str, split: Split, data: Path, rng: np.random.Generator) -> list[dict]:
    """Draw one of SEED-Bench-R1's splits: write its videos and images under `data`, return its records."""
    for folder in ("videos", "images"):
        (data / folder / split.source).mkdir(parents=True, exist_ok=True)
    records = []
    for i, gold in enumerate(draw_golds(split.size, rng)):
        colour, goal = str(rng.choice(split.colours)), str(rng.choice(split.goals))
        shape, goal, move = goal.split()[-1], goal.format(colour), list(MOVES)[gold]
        unseen = name == "validation_L3"
        sample_id = f"{uuid.UUID(bytes=rng.bytes(16), version=4)}_{i}" if unseen else split.first_id + i
        has_video = i // 4 % 12 != 5  # whole fours, so that the records without a video are balanced too
        frames = draw_scene(split, shape, colour, move, rng)
        if has_video:
            write_avi(data / "videos" / split.source / f"{sample_id}.avi", frames[:T])
        Image.fromarray(frames[T]).save(data / "images" / split.source / f"{sample_id}.png")
        progress = {"narration_text": f"see the {colour} {shape} move", "start_frame": 0, "stop_frame": T - 1}
        record = {"sample_id": sample_id, "video_source": split.source, "video_id": f"toy_{sample_id}",
                  "task_goal": goal, "question": QUESTION.format(goal), "answer": move,
                  **{f"choice_{letter}": text for letter, text in zip("abcd", MOVES)},
                  "golden_choice_idx": "ABCD"[gold], "task_progress_metadata": [progress] if has_video else [],
                  "video_basename": f"{sample_id}.avi", "current_observation_basename": f"{sample_id}.png"}
        if unseen:
            record |= {"domain": L3_DOMAINS[i % 4], "scenario": f"{shape} in motion", "task_start_frame": 0}
        records.append(record)
    return records

def make_lvb(data: Path, rng: np.random.Generator) -> list[dict]:
    """LongVideoBench's shape: a question about a video alone, with four or five candidates."""
    records = []
    for i, gold in enumerate(draw_golds(LVB.size, rng)):
        colour, video = str(rng.choice(LVB.colours)), f"lvb_{i:02d}"
        write_avi(data / "videos" / f"{video}.avi", draw_scene(LVB, "block", colour, list(MOVES)[gold], rng)[:T])
        records.append({
            "id": f"{video}_0", "video_path": f"{video}.avi", "question": f"What does the {colour} block do next?",
            "candidates": list(MOVES) + ["stand still"] * (i // 4 % 2), "correct_choice": gold,
            "duration_group": LVB_GROUPS[i % 4], "question_category": LVB_CATEGORIES[(i + i // 4) % 4],
            "topic_category": "toy", "level": "L1-Perception", "duration": T / FPS,
            "subtitle_path": f"{video}_en.json"})
    return records

def user_text(question: str, choices: list[str]) -> str:
    return "\n".join([question, *(f"{letter}. {text}" for letter, text in zip("ABCDE", choices)), INSTRUCTION])

def sft_row(record: dict, choice: int, sample_id) -> dict:
    """A row of training_with_cot_6k: the chat prompt, and a response whose thought and letter both say `choice`."""
    source, null = record["video_source"], {"video": None, "image": None, "text": None}
    content = [{"type": "image", **null, "image": f"images/{source}/{record['current_observation_basename']}"},
               {"type": "text", **null, "text": user_text(record["question"], list(MOVES))}]
    if record["task_progress_metadata"]:
        content.insert(0, {"type": "video", **null, "video": f"videos/{source}/{record['video_basename']}"})
    direction = list(MOVES)[choice].split()[1]
    return {"sample_id": sample_id, "prompt": [{"role": "user", "content": content}],
            "response": RESPONSE.format(direction, "ABCD"[choice], direction)}

def make_data(data: Path, seed: int) -> list[str]:
    """Write the whole data root; return the texts in it, for the tokenizer to train on."""
    rng = np.random.default_rng(seed)
    (data / "annotations").mkdir(parents=True)
    rows = {name: make_split(name, split, data, rng) for name, split in SPLITS.items()}
    texts = [user_text(r["question"], list(MOVES)) for name in SPLITS for r in rows[name]]
    train = rows["training_6k"]
    rows["training_with_cot_6k"] = [sft_row(r, "ABCD".index(r["golden_choice_idx"]), r["sample_id"]) for r in train]
    rows["format_only"] = [sft_row(r, int(choice), r["sample_id"] * FORMAT_REPEATS + k)
                           for r in train for k, choice in enumerate(rng.permutation(FORMAT_REPEATS) % 4)]
    for name, lines in rows.items():
        (data / f"annotations/{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    lvb = make_lvb(data, rng)
    (data / "lvb_val.json").write_text(json.dumps(lvb, indent=1))
    texts += [user_text(r["question"], r["candidates"]) for r in lvb]
    return texts + [row["response"] for row in rows["training_with_cot_6k"]]

def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE. Phrases merge across words; tags, letters and the words that carry the meaning stand alone."""
    meaning = {word for split in SPLITS.values() for goal in split.goals for word in goal.split()} - {"{}"}
    meaning |= {*COLOURS, *(move.split()[1] for move in MOVES)}
    alone = Regex(rf"(</?[a-z]+>)+|\b[A-E]\b|\n| ({'|'.join(sorted(meaning))})\b")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(alone, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=MAX_VOCAB - len(SPECIAL_TOKENS), show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(texts + ["You are a helpful assistant.", "system\nuser\nassistant"] * len(texts), trainer)
    bpe.add_special_tokens(SPECIAL_TOKENS)  # after the vocabulary, as in Qwen2-VL
    return PreTrainedTokenizerFast(tokenizer_object=bpe, chat_template=CHAT_TEMPLATE, pad_token="<|endoftext|>",
                                   eos_token="<|im_end|>", clean_up_tokenization_spaces=False, model_max_length=32768)

def make_untrained_model(folder: Path, tokenizer: PreTrainedTokenizerFast, seed: int):
    """Write tokenizer, config.json (flat, as on the hub), generation_config.json and random fp32 weights."""
    token_id = {token.strip("<|>"): tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    ends = {"bos_token_id": token_id["endoftext"], "pad_token_id": token_id["endoftext"]}
    config = {
        "architectures": ["Qwen2VLForConditionalGeneration"], "model_type": "qwen2_vl", "torch_dtype": "float32",
        **ends, "eos_token_id": token_id["im_end"],
        "vision_start_token_id": token_id["vision_start"], "vision_end_token_id": token_id["vision_end"],
        **{f"{name}_token_id": token_id[f"{name}_pad"] for name in ("vision", "image", "video")},
        "vocab_size": len(tokenizer), "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 192, "hidden_act": "silu", "rms_norm_eps": 1e-6,
        "rope_theta": 1000.0, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "max_position_embeddings": 32768, "tie_word_embeddings": True, "initializer_range": 0.06,
        "vision_config": {
            "depth": 2, "embed_dim": 48, "num_heads": 4, "mlp_ratio": 4, "in_channels": 3, "hidden_size": 64,
            "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "initializer_range": 0.06}}
    with torch.random.fork_rng(devices=[]):  # the caller's generator is not ours to reseed
        torch.manual_seed(seed)
        model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(**config))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    # The vendor's values: whoever lets them into its sampling becomes greedy, and every group of answers is alike.
    generation = {"do_sample": True, "temperature": 0.01, "top_k": 1, "top_p": 0.001, "repetition_penalty": 1.0,
                  **ends, "eos_token_id": [token_id["im_end"], token_id["endoftext"]]}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2))

def train_base(init: Path, data: Path, run: Path, model: Path, seed: int):
    """Teach `init` the answer's format by sft_video.py, as one process; `model`: `init` with the trained weights."""
    command = [sys.executable, HERE.parent / "sft_video.py", "--model", init, "--data_root", data,
               "--annotations", data / "annotations/format_only.jsonl", "--output_dir", run,
               "--learning_rate", BASE_LEARNING_RATE, "--num_train_epochs", 1,
               "--per_device_train_batch_size", BASE_BATCH, "--gradient_accumulation_steps", 1,
               "--gradient_checkpointing", "false", "--max_frames", T, "--frame_size", S, "--seed", seed,
               "--freeze_vision", "true"]  # random answers would only teach the vision tower to fall silent
    # Under torchrun the child would else wait for the ranks that its environment promises.
    env = {k: v for k, v in os.environ.items() if not re.search("RANK|WORLD_SIZE|MASTER_|TORCHELASTIC", k)}
    env["OMP_NUM_THREADS"] = "1"  # matrices this small lose more to a second thread than they gain
    subprocess.run([str(part) for part in command], env=env, check=True)
    shutil.copytree(init, model, ignore=shutil.ignore_patterns("*.safetensors*"))
    for weights in run.glob("*.safetensors*"):
        shutil.copyfile(weights, model / weights.name)

def make_toy(out: Path, seed: int = 0):
    """Write out/data and out/model, replacing earlier ones. Both are built beside and renamed when complete."""
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

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write to")
    parser.add_argument("--seed", type=int, default=0, help="seed of the data and of the model")
    make_toy(**vars(parser.parse_args()))
