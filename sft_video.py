"""SFT on video questions: Qwen2-VL learns SEED-Bench-R1's chains of thought, in plain PyTorch. The
paper's rival of GRPO.

    torchrun --nproc_per_node=8 sft_video.py              # the paper's recipe, Qwen2-VL-7B-Instruct
    python sft_video.py --toy                             # the tiny model, on the toy's chains
    python sft_video.py --annotations FILE --answer_only  # rows without chains of thought

A step (`main` is this list):

    records     -> prompts and their given responses
    supervised  -> the response's tokens, through <|im_end|>; nothing before, nothing behind
    loss        -> -log-probs, the mean over the supervised tokens of the whole global batch
    update      -> backward, AdamW on fp32 master weights

It is the GRPO script with one completion a prompt, which is given, and without rewards:
`diff sft_video.py grpo_video.py` is the lesson.

Departures from the released run (why: docs/deviations.md): the newline behind <|im_end|> is not
trained; denominators are the whole step's; unreadable videos are reported, never replaced.

Dimensions: B prompts, G = 1 response of each, P and C their tokens, N rows (tokens or patches), H
heads, K key-value heads, E head width, D model width, V vocabulary, T frames.

The page from here to the end of `main` is the whole method. What it stands on comes behind, in
blocks that several scripts share: Qwen2-VL, records and frames, ranks and checkpoints, start-up. A
"trap" is a fault of other implementations that docs/deviations.md lists.
"""

import argparse
import collections
import difflib
import fcntl
import hashlib
import inspect
import json
import math
import multiprocessing
import operator
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import types
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import cache, partial
from glob import glob
from importlib.metadata import distributions
from itertools import chain, groupby
from pathlib import Path
from typing import Literal

import av
import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn as nn
import torch.nn.functional as F
from huggingface_hub import save_torch_state_dict, snapshot_download
from pebble import CONSTS, ProcessExpired, ProcessPool
from PIL import Image, ImageOps
from safetensors import SafetensorError
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer, HfArgumentParser

# ------------------------------------------------------------------------------------------------
# Settings
# ------------------------------------------------------------------------------------------------


# === shared: settings — identical in grpo_video.py, sft_video.py, eval_video.py ===
def from_torchrun(name, default=0):
    """torchrun tells each process its place by environment variables."""
    return int(os.environ.get(name, default))


RANK = from_torchrun("RANK")
WORLD = from_torchrun("WORLD_SIZE", 1)
LOCAL_RANK = from_torchrun("LOCAL_RANK")
LOCAL_WORLD = from_torchrun("LOCAL_WORLD_SIZE", WORLD)
RESTARTS = from_torchrun("TORCHELASTIC_RESTART_COUNT")
HERE = Path(__file__).resolve().parent


def fail(*problems):
    """Ends the program with exit code 2 and a line per problem (20 at most), once a machine."""
    lines = list(problems[:20])
    if len(problems) > 20:
        lines.append(f"{len(problems)} problems in all; these were the first 20")

    if LOCAL_RANK == 0:
        for line in lines:
            print(f"{Path(sys.argv[0]).name}: error: {line}", file=sys.stderr)
    sys.exit(2)


# === end shared: settings ===


@dataclass
class Config:
    """All settings. Each is a flag, its comment the flag's help; the limits that it names hold.

    Names are transformers' TrainingArguments' where it has one; defaults are the paper's."""

    # The model and the data
    model: str = "Qwen/Qwen2-VL-7B-Instruct"  # Qwen2-VL checkpoint: a folder, or a hub id to fetch
    data_root: str = "data/SEED-Bench-R1"  # folder with annotations/, videos/ and images/
    annotations: str = ""  # rows; default: DATA_ROOT/annotations/training_with_cot_6k.jsonl
    answer_only: bool = False  # take plain rows and supervise `<answer>X. text</answer>` alone
    toy: bool = False  # train the tiny model in toy/ on its tiny videos, building them if missing
    max_frames: int = 16  # frames of a video at most, at least 2
    fps: float = 2.0  # frames per second of video; 4 to max_frames in all, above 0
    frame_size: int = 256  # height and width of a frame, rounded to a multiple of 28, at least 1
    video_reader: Literal["pyav", "decord"] = "pyav"  # decord, the released run's, can be wrong
    skip_missing: bool = False  # leave out records whose video or image is missing
    max_length: int = 8192  # of prompt and response; more is an error, never cut, at least 1

    # The optimizer
    learning_rate: float = 2e-5  # peak learning rate, above 0
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "cosine"  # decay after the warm-up
    warmup_ratio: float = 0.1  # share of the steps that warm up, at least 0, at most 1
    weight_decay: float = 0.0  # AdamW's, at least 0
    max_grad_norm: float = 1.0  # gradients are clipped to this norm, above 0
    freeze_vision: bool = False  # do not train the vision tower

    # The run
    num_train_epochs: int = 1  # passes over the annotations, at least 1
    max_steps: int = -1  # steps in all, at least 1; by default what num_train_epochs makes
    per_device_train_batch_size: int = 1  # rows per device and micro-batch, at least 1
    gradient_accumulation_steps: int = 16  # on 8 GPUs the paper's 128 rows a step, at least 1
    gradient_checkpointing: bool = True  # recompute layers in the backward pass
    offload_optimizer: bool = False  # on a GPU: master weights and AdamW in host memory
    seed: int = 42  # of the data order and the drawn choices, at least 0
    dataloader_num_workers: int = 2  # processes that decode ahead; 0: none, at least 0
    decode_timeout: float = 60.0  # seconds after which decoding a sample is given up, above 0
    max_bad_samples: int = -1  # more unreadable ones end the run; -1: a hundredth, at least -1
    eval_every: int = 0  # steps between evaluations of the held-out rows' loss; 0: none, at least 0
    eval_rows: int = 64  # rows at the file's end that eval_every holds out, at least 1

    # What it writes
    output_dir: str = "runs/sft"  # for config.json, the logs, the checkpoints, the final model
    overwrite_output_dir: bool = False  # start anew in an output_dir that holds a run already
    resume_from_checkpoint: str = ""  # a checkpoint folder, or 'auto': the last one of output_dir
    save_steps: int = 10  # steps between checkpoints; the last step has one, at least 1
    save_total_limit: int = 2  # newest checkpoints kept; 0: all, at least 0
    save_only_model: bool = False  # leave the moments out of checkpoints, so that none resumes
    logging_steps: int = 10  # steps between lines on stdout; metrics.jsonl has all, at least 1


TOY = dict(
    model=str(HERE / "toy/model"),
    data_root=str(HERE / "toy/data"),
    output_dir="runs/toy-sft",
    overwrite_output_dir=True,
    max_steps=100,
    save_steps=50,
    per_device_train_batch_size=16,
    gradient_accumulation_steps=1,
    learning_rate=2e-3,
    max_frames=8,
    frame_size=56,
    gradient_checkpointing=False,
    dataloader_num_workers=1,
)


# ------------------------------------------------------------------------------------------------
# The formulas
# ------------------------------------------------------------------------------------------------


def supervise(samples, tokenizer, device, dtype):
    """B samples -> (prompts, responses [B, 1, C] ids, mask [B, 1, C]): the response's own tokens
    and the <|im_end|> behind it are supervised, nothing else.

    Unreadable samples are left out; if none is left, a blank prompt with no supervised token."""
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    samples = [s for s in samples if "error" not in s]
    rows = []
    for sample in samples:
        text = sample.get("response")
        if text is None:  # --answer_only
            place = "ABCD".index(sample["gold"])
            text = f"<answer>{sample['gold']}. {sample['choices'][place]}</answer>"
        ids = tokenizer(text, add_special_tokens=False).input_ids
        rows.append(torch.tensor(ids + [end]))
    lengths = torch.tensor([len(row) for row in rows] or [0])

    rows = rows or [torch.tensor([end])]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=end)[:, None]
    mask = torch.arange(ids.shape[2]) < lengths[:, None, None]
    prompts = Prompts.collate(samples or [BLANK], device, dtype)
    return prompts, ids.to(device), mask.to(device)


def cross_entropy(model, prompts, responses, mask, tokens):
    """-> (loss, right): -Σ log π_θ(token) / `tokens`, the whole step's supervised tokens (trap 15),
    and how many of the supervised tokens are the likeliest."""
    logp, greedy = model(
        prompts, responses, statistic=lambda logits, _, targets: logits.argmax(-1) == targets
    )
    return -(logp * mask).sum() / tokens, (greedy & mask).sum()


@torch.no_grad()
def evaluate(model, batches):
    """-> mean loss per supervised token over the held-out batches."""
    loss = 0.0
    tokens = 0
    for prompts, responses, mask in batches:
        loss += cross_entropy(model, prompts, responses, mask, 1)[0]
        tokens += mask.sum()
    sums = global_sums(loss=loss, tokens=tokens)
    return sums["loss"] / sums["tokens"]


def parse_chat(raw, root):
    """A row with its own messages (`prompt`) and `response` -> record: sample_id, domain, media,
    messages, response. ValueError says what is wrong."""
    messages = raw.get("prompt")
    chat = isinstance(messages, list) and messages
    must(chat, "field 'prompt' must be a list of chat messages; --answer_only takes plain rows")

    media = []
    for message in messages:
        roles = ("system", "user", "assistant")
        whole = isinstance(message, dict) and message.get("role") in roles
        must(whole, f"a message must be an object with a role of {roles}, is {message!r:.60}")
        content = message.get("content")
        if not isinstance(content, list) or not content:
            text_field(message, "content")
            continue

        entries = []
        for entry in content:
            kinds = ("video", "image", "text")
            whole = isinstance(entry, dict) and entry.get("type") in kinds
            must(whole, f"an entry must be an object with a type of {kinds}, is {entry!r:.60}")
            kind = entry["type"]
            entries.append({kind: text_field(entry, kind), "type": kind})
            if kind != "text":
                media.append((kind, entry[kind]))
        message["content"] = entries

    return dict(
        sample_id=raw["sample_id"],
        domain=str(raw.get("domain") or "all"),
        messages=messages,
        response=text_field(raw, "response"),
        media=[(kind, inside(root, path)) for kind, path in media],
    )


# ------------------------------------------------------------------------------------------------
# The run
# ------------------------------------------------------------------------------------------------


def main():
    c = parse_config(Config, TOY)
    device, dtype = set_up(c.toy)

    # The records and the model.
    root = Path(c.data_root)
    name = "training_6k" if c.answer_only else "training_with_cot_6k"
    parse = parse_record if c.answer_only else parse_chat
    annotations = Path(c.annotations or root / f"annotations/{name}.jsonl")
    records, missing = with_media(load_records(annotations, root, parse), c.skip_missing)
    source = find_model(c.model)
    tokenizer = load_tokenizer(source)
    model = load_sharded(c, source, device, dtype)
    dataset = VideoDataset(records, tokenizer, model.config, c)
    dataset.check_lengths(c.max_length)
    prepare = partial(supervise, tokenizer=tokenizer, device=device, dtype=dtype)

    # The file's last rows are held out, if eval_every asks for them.
    held_out = c.eval_rows if c.eval_every else 0
    rows = len(records) - held_out
    if rows < 1:
        fail(f"--eval_rows {c.eval_rows}: must be below the {len(records)} rows of the annotations")
    dataset.records = records[:rows]
    eval_dataset = VideoDataset(records[rows:], tokenizer, model.config, c)
    B = c.per_device_train_batch_size
    eval_steps = range(math.ceil(held_out / B / WORLD))
    eval_batches = list(load_batches(eval_dataset, rank_batches(held_out, eval_steps, B, 1), 0))
    unreadable = [
        f"--eval_rows: sample_id {s['sample_id']}: {s['error']}"
        for s in chain(*eval_batches)
        if "error" in s
    ]
    if unreadable:
        fail(*unreadable)

    # The length of the run, and where it begins.
    per_step = B * c.gradient_accumulation_steps * WORLD
    total = c.max_steps * per_step if c.max_steps > 0 else rows * c.num_train_epochs
    steps = math.ceil(total / per_step)
    optimizer = make_optimizer(c, model)
    start = open_run(c, model, optimizer, source, dataset.records, missing, per_step, steps)
    batches = rank_batches(total, range(start, steps), B, c.gradient_accumulation_steps)
    loader = load_batches(dataset, batches, c.dataloader_num_workers)
    faults = collections.Counter()
    caught = catch_signals()
    # Without a terminal, None, there is no bar.
    for step in tqdm(range(start, steps), "SFT", initial=start, total=steps, disable=RANK or None):
        # Records: rows were read ahead. What cannot be read is reported and left out.
        done = step + 1
        epoch = min(total, done * per_step) / rows
        log = dict(step=done, epoch=epoch, clock=time.perf_counter())
        micro_batches = [next(loader) for _ in range(c.gradient_accumulation_steps)]
        failed = [s for s in chain(*micro_batches) if "error" in s]
        micro_batches = [prepare(samples) for samples in micro_batches]
        lap(log, "time_data")

        # Loss: its denominator is global. Backward.
        totals = global_sums(
            tokens=sum(mask.sum() for _, _, mask in micro_batches),
            prompt_tokens=sum(prompts.lengths.sum() for prompts, _, _ in micro_batches),
            bad=len(failed),
            stop=len(caught),
        )
        loss = 0.0
        right = 0.0
        for prompts, responses, mask in micro_batches:
            part, greedy = cross_entropy(model, prompts, responses, mask, max(1, totals["tokens"]))
            # FSDP2 averages over the ranks, which the denominator counts already.
            (part * WORLD).backward()
            loss += float(part.detach())
            right += float(greedy)
        sums = global_sums(loss=loss, right=right)

        # Update.
        log["learning_rate"] = learning_rate_at(c, step, steps)
        log["loss"] = sums["loss"]
        log["token_accuracy"] = sums["right"] / max(1, totals["tokens"])
        log["grad_norm"] = optimizer_step(
            model, optimizer, log["learning_rate"], c.max_grad_norm, log["loss"]
        )
        lap(log, "time_update")

        # Log, and stop where going on makes no sense.
        if c.eval_every and done % c.eval_every == 0:
            log["eval_loss"] = evaluate(model, map(prepare, eval_batches))
        log["tokens"] = int(totals["tokens"] + totals["prompt_tokens"])
        log["bad_samples"] = int(totals["bad"])
        log_step(c, log, steps, ("loss", "token_accuracy"))
        count_faults(c, total, faults, log, failed)
        if done % c.save_steps == 0 or done == steps or totals["stop"]:
            save_checkpoint(c, done, model, optimizer)
        if totals["stop"]:
            leave(done, caught)

    save_model(model, Path(c.output_dir))
    if RANK == 0:
        print(f"{c.output_dir}/ holds the trained model, config.json and metrics.jsonl")
    dist.destroy_process_group()


# === shared: qwen2_vl — identical in grpo_video.py, sft_video.py, eval_video.py ===
PATCH, PAIR, MERGE = 14, 2, 2  # a patch is 14 x 14 pixels of 2 frames; 2 x 2 patches make a token


class Qwen2VL(nn.Module):
    """Calling it scores completions; decoding uses its parts. Module names are the checkpoint's."""

    def __init__(self, config):
        super().__init__()
        c = config.text_config
        self.config = config
        self.gradient_checkpointing = False
        self.visual = VisionTower(config.vision_config)
        self.model = modules(
            embed_tokens=nn.Embedding(c.vocab_size, c.hidden_size),
            layers=nn.ModuleList(DecoderLayer(c) for _ in range(c.num_hidden_layers)),
            norm=nn.RMSNorm(c.hidden_size, eps=c.rms_norm_eps),
        )
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)

    def forward(self, prompts, completions, temperature=1.0, statistic=None):
        """completions [B, G, C] ids -> log softmax(logits / temperature) of their tokens, [B, G, C]
        fp32, and, if given, a statistic(logits [N, V], log_z [N], targets [N]) -> [N], likewise."""
        states = self.completion_states(prompts, completions)
        targets = completions.flatten()
        score = self.score

        # Logits at the completions' positions alone, 2^27 (512 MB) at a time; none of several
        # pieces is kept for the backward pass.
        rows = max(1, 2**27 // self.config.text_config.vocab_size)
        if len(targets) > rows and torch.is_grad_enabled():
            score = partial(checkpoint, score, use_reentrant=False)
        parts = zip(states.split(rows), targets.split(rows))
        pieces = [score(*part, temperature, statistic) for part in parts]

        # FSDP2's hooks want no view of what they return.
        scores = [torch.cat(piece).view(completions.shape).clone() for piece in zip(*pieces)]
        return scores if statistic else scores[0]

    def score(self, states, targets, temperature, statistic):
        """states [N, D], targets [N] -> (log-probs [N],) or (log-probs, statistic)."""
        logits = self.logits(states)
        if temperature != 1:
            logits = logits / temperature
        logp = -F.cross_entropy(logits, targets, reduction="none")
        if statistic is None:
            return (logp,)

        with torch.no_grad():
            log_z = logits.gather(1, targets[:, None])[:, 0] - logp
            return logp, statistic(logits, log_z, targets)

    def logits(self, x):
        """[N, D] -> [N, V] fp32: a log-softmax in bf16 would quantise the KL (trap 8)."""
        head = self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        x = self.model.norm(x)
        if len(x) <= 32:  # the same product in the order that takes half the time on a CPU
            return (head.weight @ x.T).T.float()
        return F.linear(x, head.weight).float()

    def completion_states(self, prompts, completions):
        """completions [B, G, C] ids -> [B*G*C, D], where row c predicts token c of its completion.

        The shift by one is here and nowhere else: the first row is the prompt's last token's, and
        the completion's own last token predicts nothing."""
        G, C = completions.shape[1:]
        first = prompts.last[:, None, None].expand(-1, G, 1)
        inputs = torch.cat((first, completions[:, :, :-1]), dim=2)  # [B, G, C]
        x = self.embed(prompts, inputs)  # [B*P + B*G*C, D]

        after = prompts.last_position[:, None] + torch.arange(C, device=inputs.device)
        after = after.repeat_interleave(G, 0).flatten().expand(3, -1)
        positions = torch.cat((prompts.positions.flatten(1), after), dim=1)
        return self.decoder(x, positions, packed_attention(prompts, G, C))

    def embed(self, prompts, *completions):
        """-> [B*P + the completions' tokens, D]. Vision features go only to the prompts' own
        placeholders (trap 12)."""
        ids = torch.cat([z.flatten() for z in (prompts.ids, *completions)])
        x = self.model.embed_tokens(ids)
        features = self.visual(prompts.patches, prompts.grids, self.run)
        images = prompts.ids == self.config.image_token_id
        media = images | (prompts.ids == self.config.video_token_id)
        media = F.pad(media.flatten(), (0, len(ids) - prompts.ids.numel()))
        return x.masked_scatter(media[:, None], features.to(x.dtype))

    def decoder(self, x, positions, attend):
        """Rows x [N, D] at positions [3, N] -> those that attend(layer, q, k, v) lets go on; the
        last layer is -1."""
        rope = self.config.text_config.rope_parameters
        E = self.model.layers[0].E
        inv_freq = rope["rope_theta"] ** (-torch.arange(0, E, 2, device=x.device) / E)
        sections = (positions[..., None] * inv_freq).split(rope["mrope_section"], dim=-1)
        angles = [section[axis] for axis, section in enumerate(sections)]  # of t | h | w
        angles = torch.cat(angles, dim=-1).repeat(1, 2)  # [N, E]
        cos = angles.cos().to(x.dtype)
        sin = angles.sin().to(x.dtype)

        for i, layer in enumerate(self.model.layers, -len(self.model.layers)):
            x = self.run(layer, x, cos, sin, partial(attend, i))
        return x

    def run(self, layer, *inputs):
        """layer(*inputs), recomputed in the backward pass if gradient_checkpointing says so and
        there will be one."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(layer, *inputs, use_reentrant=False)
        return layer(*inputs)


class DecoderLayer(nn.Module):
    def __init__(self, c):
        super().__init__()
        D = c.hidden_size
        self.E = D // c.num_attention_heads
        KE = c.num_key_value_heads * self.E

        self.input_layernorm = nn.RMSNorm(D, eps=c.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(D, eps=c.rms_norm_eps)
        self.self_attn = modules(
            q_proj=nn.Linear(D, D),
            k_proj=nn.Linear(D, KE),
            v_proj=nn.Linear(D, KE),
            o_proj=nn.Linear(D, D, bias=False),
        )
        self.mlp = modules(
            gate_proj=nn.Linear(D, c.intermediate_size, bias=False),
            up_proj=nn.Linear(D, c.intermediate_size, bias=False),
            down_proj=nn.Linear(c.intermediate_size, D, bias=False),
        )

    def forward(self, x, cos, sin, attend):
        """x [N, D]; attend(q [N, H, E], k [N, K, E], v [N, K, E]) -> [n, H, E] decides who sees
        whom; the last n rows go on."""
        h = self.input_layernorm(x)
        attn = self.self_attn
        qkv = (attn.q_proj(h), attn.k_proj(h), attn.v_proj(h))
        q, k, v = (z.unflatten(1, (-1, self.E)) for z in qkv)
        out = attend(rotate(q, cos, sin), rotate(k, cos, sin), v).flatten(1)
        x = x[len(x) - len(out) :] + attn.o_proj(out)

        h = self.post_attention_layernorm(x)
        return x + self.mlp.down_proj(F.silu(self.mlp.gate_proj(h)) * self.mlp.up_proj(h))


def packed_attention(prompts, G, C):
    """-> attend(layer, q, k, v) of rows [B*P | B*G*C]: a prompt is causal over itself; a completion
    sees its prompt and, causally, itself.

    Behind the last layer, -1, only the completions' rows are needed: there a prompt is keys and
    values alone."""
    B, P = prompts.ids.shape
    counts = [count for count, _ in prompts.runs]
    rows = [count * G for count in counts]
    runs = prompts.runs if C > 0 else []

    def split(z):
        """[B*P + B*G*C, heads, E] -> [B, heads, P, E] and [B*G, heads, C, E]"""
        prompt, own = z.split((B * P, B * G * C))
        prompt = prompt.unflatten(0, (B, P)).transpose(1, 2)
        return prompt, own.unflatten(0, (B * G, C)).transpose(1, 2)

    def attend(layer, q, k, v):
        q, q_own = split(q)
        k, k_own = split(k)
        v, v_own = split(v)
        if layer == -1:
            out = [q[:, :, :0]]
        else:
            out = [F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)]

        # Prompts of one length at a time: without padding no kernel needs a dense mask.
        prompts = (k.split(counts), v.split(counts))
        completions = (q_own.split(rows), k_own.split(rows), v_own.split(rows))
        for (_, length), k, v, q, k_own, v_own in zip(runs, *prompts, *completions):
            k = torch.cat((k[:, :, :length].repeat_interleave(G, 0), k_own), dim=2)
            v = torch.cat((v[:, :, :length].repeat_interleave(G, 0), v_own), dim=2)
            seen = causal_lower_right(C, length + C)
            out.append(
                F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
            )  # [count*G, H, C, E]
        return torch.cat([z.transpose(1, 2).flatten(0, 1) for z in out])

    return attend


class VisionTower(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.E = c.embed_dim // c.num_heads
        patch = (PAIR, PATCH, PATCH)
        merged = c.embed_dim * MERGE**2
        embed = nn.Conv3d(3, c.embed_dim, patch, stride=patch, bias=False)
        self.patch_embed = modules(proj=embed)
        self.blocks = nn.ModuleList(VisionBlock(c) for _ in range(c.depth))
        mlp = nn.Sequential(nn.Linear(merged, merged), nn.GELU(), nn.Linear(merged, c.hidden_size))
        self.merger = modules(ln_q=nn.LayerNorm(c.embed_dim, eps=1e-6), mlp=mlp)

    def forward(self, patches, grids, run):
        """patches [N, 1176], N the sum of t*h*w over the grids -> features [N/4, D];
        run(layer, ...) as Qwen2VL.run."""
        x = F.linear(patches, self.patch_embed.proj.weight.flatten(1))  # the stride is the kernel
        cos, sin = self.rotary(grids, x.device)

        # Each temporal slice attends to itself alone; slices of one size go together.
        slices = run_lengths(chain(*([h * w] * t for t, h, w in grids)))
        for block in self.blocks:
            x = run(block, x, cos, sin, slices)
        return self.merger.mlp(self.merger.ln_q(x).view(len(x) // MERGE**2, -1))

    def rotary(self, grids, device):
        """-> cos and sin [N, E], half of the frequencies for a patch's row, half for its column;
        patches come in 2x2 blocks."""
        m = MERGE
        places = []
        for t, h, w in grids:
            order = torch.arange(h * w).view(h // m, m, w // m, m).transpose(1, 2).flatten()
            places.append(torch.stack((order // w, order % w), dim=1).repeat(t, 1))  # [t*h*w, 2]

        half = self.E // 2
        inv_freq = 10000.0 ** (-torch.arange(0, half, 2) / half)
        angles = (torch.cat(places)[..., None] * inv_freq).flatten(1).repeat(1, 2)  # [N, E]
        return angles.cos().to(device), angles.sin().to(device)


class VisionBlock(nn.Module):
    def __init__(self, c):
        super().__init__()
        D = c.embed_dim
        hidden = int(D * c.mlp_ratio)
        self.heads = c.num_heads
        self.norm1 = nn.LayerNorm(D, eps=1e-6)
        self.norm2 = nn.LayerNorm(D, eps=1e-6)
        self.attn = modules(qkv=nn.Linear(D, 3 * D), proj=nn.Linear(D, D))
        self.mlp = modules(fc1=nn.Linear(D, hidden), fc2=nn.Linear(hidden, D))

    def forward(self, x, cos, sin, slices):
        """x [N, D]; slices: (count, size) of runs of temporal slices."""
        qkv = self.attn.qkv(self.norm1(x)).unflatten(1, (3, self.heads, -1))
        q, k, v = qkv.unbind(1)  # [N, H, E] each
        q, k = (rotate(z.float(), cos, sin).to(v.dtype) for z in (q, k))

        out = []
        rows = [count * size for count, size in slices]
        for shape, *qkv in zip(slices, q.split(rows), k.split(rows), v.split(rows)):
            qkv = [z.unflatten(0, shape).transpose(1, 2) for z in qkv]  # [count, H, size, E]
            out.append(F.scaled_dot_product_attention(*qkv).transpose(1, 2).flatten(0, 1))
        x = x + self.attn.proj(torch.cat(out).flatten(1))

        h = self.mlp.fc1(self.norm2(x))
        return x + self.mlp.fc2(h * torch.sigmoid(1.702 * h))  # quick_gelu


def modules(**named):
    """{name: module} -> one module with these attributes."""
    return nn.ModuleDict(named)


def rotate(x, cos, sin):
    """Rotary embedding of x [N, heads, E] by cos and sin [N, E]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]


def mrope_positions(ids, grids, config):
    """ids (P numbers, a placeholder per merged patch), grids -> M-RoPE positions [3, P].

    A text token's t = h = w is the maximum before it plus 1, as the weights were trained
    (transformers leaves t out); a vision block starts there with its (t, h, w)."""
    placeholders = (config.image_token_id, config.video_token_id)
    grids = iter(grids)
    blocks = []
    start = 0
    for left, vision in run_lengths(i in placeholders for i in ids):
        while left > 0:  # two videos may follow each other without a token between them
            block = torch.arange(left).expand(3, -1)
            if vision:
                t, h, w = next(grids)
                block = torch.cartesian_prod(*map(torch.arange, (t, h // MERGE, w // MERGE))).T
            blocks.append(start + block)
            start = int(blocks[-1].max()) + 1
            left -= block.shape[1]
    return torch.cat(blocks, dim=1)


def run_lengths(values):
    """-> [(count, value)] of equal neighbours."""
    return [(len(list(same)), value) for value, same in groupby(values)]


class Prompts(types.SimpleNamespace):
    """B prompts less their last tokens, which open the completions, padded on the right to P.

    ids [B, P], positions [3, B, P] (M-RoPE's t, h, w), last and last_position [B], lengths [B] (of
    the whole prompts), runs: (count, P) of neighbours of equal length, patches [N, 1176] of all
    videos and images, grids: their (t, h, w)."""

    @classmethod
    def collate(cls, samples, device, dtype):
        """Samples with ids [P+1] (the last is a word's), positions [3, P+1], patches [N, 1176]
        uint8 and grids -> one batch."""
        tokens = [torch.cat((s["ids"][None], s["positions"])).T for s in samples]  # id, t, h, w
        padded = nn.utils.rnn.pad_sequence([z[:-1] for z in tokens], batch_first=True)
        ids, *positions = padded.to(device).unbind(-1)  # [B, P] each
        last, last_position = torch.stack([z[-1, :2] for z in tokens]).to(device).T

        mean = torch.tensor([[0.48145466], [0.4578275], [0.40821073]], device=device)
        std = torch.tensor([[0.26862954], [0.26130258], [0.27577711]], device=device)
        # All ranks gather the vision tower's shards: a batch of text alone sends it a blank, which
        # no placeholder takes.
        grids = list(chain(*(s["grids"] for s in samples))) or [(1, MERGE, MERGE)]
        blank = torch.zeros(MERGE**2, 3 * PAIR * PATCH**2)
        patches = torch.cat([s["patches"] for s in samples if s["grids"]] or [blank]).to(device)
        patches = patches.unflatten(1, (3, -1)) / 255  # [N, channel, 2 frames * 14 * 14]
        patches = ((patches - mean) / std).flatten(1).to(dtype)

        return cls(
            ids=ids,
            positions=torch.stack(positions),
            last=last,
            last_position=last_position,
            lengths=torch.tensor([len(z) for z in tokens], device=device),
            runs=run_lengths(len(z) - 1 for z in tokens),
            patches=patches,
            grids=grids,
        )


def load_model(folder, device, dtype, wrap=lambda model: model):
    """A folder of the hub's shape, one file or shards -> Qwen2VL. A missing, extra or misshapen
    tensor ends the program, by name.

    `wrap` may shard the empty model; each rank then reads its own slices of every tensor."""
    reader = dcp.HuggingFaceStorageReader(str(folder))
    try:
        config = AutoConfig.from_pretrained(folder)
        found = reader.read_metadata().state_dict_metadata
        must(
            config.model_type == "qwen2_vl",
            f"model_type {config.model_type!r} in config.json, must be 'qwen2_vl'",
        )
        must(found, "it holds no model.safetensors, nor shards of it")
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        fail(f"--model {folder}: no readable checkpoint: {str(error).splitlines()[0]}")

    with torch.device("meta"):
        model = wrap(Qwen2VL(config).to(dtype))
    model.to_empty(device=device)
    state = model.state_dict()

    problems = []
    for name in sorted({*found, *state}):
        shape = list(found[name].size) if name in found else "missing"
        wanted = list(state[name].shape) if name in state else "absent"
        if shape != wanted:
            problems.append(f"--model {folder}: tensor {name} is {shape}, must be {wanted}")
    if problems:
        fail(*problems)
    dcp.load(state, storage_reader=reader)
    return model


# === end shared: qwen2_vl ===

# === shared: video_prompt — identical in grpo_video.py, sft_video.py, eval_video.py ===
INSTRUCTION = (
    " Output the thinking process in <think> </think> and final answer in <answer> </answer> tags, "
    "i.e., <think> reasoning process here </think><answer> answer here </answer>. "
)


def load_records(path, root, parse=None, lines=None, fail=fail):
    """Annotations, one JSON object a line -> records. All bad ones are reported, by file:line and
    sample_id; exit code 2."""
    records = []
    problems = []
    seen = {}  # sample_id -> its line
    for number, line in enumerate(lines or read_lines(path), 1):
        if not line.strip():
            continue
        name = "?"
        try:
            raw = json.loads(line.decode(), parse_constant=lambda name: None)  # NaN is no value
            name = raw.get("sample_id", raw.get("id")) if isinstance(raw, dict) else None
            must(
                isinstance(name, (int, str)),
                "must be an object with a sample_id, an integer or a string",
            )
            must(
                not re.search(rb"<\|\w+\|>", json.dumps(raw, ensure_ascii=False).encode()),
                "holds a special token, which only the chat template may write",
            )
            first = seen.setdefault(str(name), number)
            # A question may have several chains of thought.
            must(first == number or "prompt" in raw, f"its sample_id is line {first}'s already")
            records.append((parse or parse_record)(raw, root))
        except (ValueError, OSError, RecursionError) as error:  # bad UTF-8, bad JSON among them
            problems.append(f"{path}:{number}: sample_id {name!s:.60}: {error}")

    if problems or not records:
        fail(*problems or [f"{path}: holds no records"])
    return records


def read_lines(path):
    """-> a file's lines, less a byte-order mark."""
    text = path.read_bytes() if path.is_file() else b""
    if not path.is_file() or text.startswith(b"version https://git-lfs"):
        fail(
            f"{path}: no such annotation file, or a Git LFS pointer in its place (`git lfs pull` "
            "fetches it); for --data_root, `hf download TencentARC/SEED-Bench-R1 --repo-type "
            "dataset --local-dir DIR`; for --model, `hf download Qwen/Qwen2-VL-7B-Instruct "
            "--local-dir DIR`; `grpo_video.py --toy` needs neither"
        )
    return text.removeprefix(b"\xef\xbb\xbf").split(b"\n")


def parse_record(raw, root):
    """A benchmark row -> record: sample_id, domain, media [(kind, Path)], question, and choices
    with the gold letter or, where golden_choice_idx is absent, the answer and the negatives to
    draw from. ValueError says what is wrong."""
    record = dict(sample_id=raw["sample_id"], domain=str(raw.get("domain") or "all"))
    record["question"] = text_field(raw, "question")

    gold = raw.get("golden_choice_idx")
    if gold is not None:
        choices = [text_field(raw, f"choice_{letter}") for letter in "abcd"]
        record |= dict(choices=choices, gold=gold)
        must(gold in list("ABCD"), f"golden_choice_idx {gold!r:.60} must be A, B, C or D")
    else:
        answer = text_field(raw, "answer")
        given = raw.get("negative_answers")
        negatives = []
        if isinstance(given, list) and all(isinstance(n, str) and n.strip() for n in given):
            negatives = [n for n in dict.fromkeys(given) if n != answer]
        record |= dict(answer=answer, negatives=negatives)
        must(
            len(negatives) >= 3,
            "without golden_choice_idx, negative_answers must be at least 3 different strings "
            "beside the answer",
        )

    source = text_field(raw, "video_source")
    progress = raw.get("task_progress_metadata")
    must(
        isinstance(progress, list),
        "field 'task_progress_metadata' must be a list (an empty one means: no video)",
    )
    media = [("image", f"images/{source}/{text_field(raw, 'current_observation_basename')}")]
    if progress:
        media.insert(0, ("video", f"videos/{source}/{text_field(raw, 'video_basename')}"))
    return record | dict(media=[(kind, inside(root, path)) for kind, path in media])


def text_field(raw, key):
    value = raw.get(key)
    must(
        isinstance(value, str) and value.strip(),
        f"field {key!r} must be a non-empty string, is {value!r:.60}",
    )
    return value


def must(holds, message):
    if not holds:
        raise ValueError(message)


def inside(root, path):
    """A path relative to the data root -> Path, which may lead over links, but not upwards."""
    parts = Path(path).parts
    must(".." not in parts and "/" not in parts, f"{path!r} leaves the data root {root}")
    return root / path


def with_media(records, skip_missing):
    """-> (records whose media are there, rows of missing.jsonl: the others, which skip_missing
    leaves out). Without it, or if nothing is left, the program ends with exit code 2."""
    there = []
    missing = []
    for record in records:
        lost = [str(path) for _, path in record["media"] if not os.path.isfile(path)]
        if lost:
            missing.append(dict(sample_id=record["sample_id"], file=lost[0]))
        else:
            there.append(record)

    folders = collections.Counter(os.path.dirname(row["file"]) for row in missing)
    problems = [
        f"{folder}: {count} files are missing, {nearby(folder)} is there; --skip_missing leaves "
        "their records out"
        for folder, count in folders.items()
    ]
    if missing and not (skip_missing and there):
        fail(*problems, *(f"missing: {row}" for row in missing))
    if missing and RANK == 0:
        print(f"{len(missing)} records are left out: missing.jsonl names the files that they lack")
    return there, missing


def nearby(folder):
    """What may hold a folder's missing files: an archive, or a folder of its own."""
    patterns = (f"{folder}/*.tar*", f"{folder}/*.zip", f"{folder}.*", f"{folder}/*/*")
    return next(chain(*map(glob, patterns)), "no archive of them")


def load_batches(dataset, batches, workers):
    """Lists of positions -> lists of samples, whose media `workers` processes decode ahead."""
    ahead = collections.deque()
    for batch in batches:
        ahead.append([dataset.begin(position) for position in batch])
        if len(ahead) > 2 * workers:
            yield [finish() for finish in ahead.popleft()]
    while ahead:
        yield [finish() for finish in ahead.popleft()]
    dataset.pool.stop()
    dataset.pool.join()


class VideoDataset:
    """Positions in the stream of epochs -> samples; epoch e is a permutation by (seed, e), or the
    records' own order.

    A sample whose media cannot be read becomes {sample_id, error}: it is reported, and no other
    takes its place (trap 13)."""

    def __init__(self, records, tokenizer, config, c, shuffle=True):
        self.records = records
        self.tokenizer = tokenizer
        self.config = config
        self.c = c
        self.shuffle = shuffle
        unit = PATCH * MERGE
        self.size = max(1, round(c.frame_size / unit)) * unit  # 252 for 256: a multiple of 28
        self.pool = decoding_pool(c.dataloader_num_workers)

    def begin(self, position):
        """Sends a sample's media to be decoded -> a function that waits for them and returns it."""
        c = self.c
        epoch, place = divmod(position, len(self.records))
        if self.shuffle:
            place = permutation(len(self.records), c.seed, epoch)[place]
        record = self.records[place]
        args = (record["media"], self.size, c.fps, c.max_frames, c.video_reader)
        decoding = self.pool.schedule(decode, args, timeout=c.decode_timeout)
        return partial(self.finish, record, epoch, decoding)

    def finish(self, record, epoch, decoding):
        """-> the sample: the record with its choices and gold letter of this epoch, and text, ids,
        positions, patches, grids; or error."""
        choices, gold = choose(record, self.c.seed, epoch)
        sample = record | dict(choices=choices, gold=gold)

        try:
            media, problem = decoding.result()
        except TimeoutError:
            problem = f"decoding took over {self.c.decode_timeout} s"
        except ProcessExpired as error:
            problem = f"decoder died with exit code {error.exitcode}"
        if problem:
            paths = ", ".join(str(path) for _, path in record["media"])
            return sample | dict(error=f"{paths}: {problem}")

        grids = [grid for _, grid in media]
        none = np.empty((0, 3 * PAIR * PATCH**2), np.uint8)
        patches = np.concatenate([none, *(patches for patches, _ in media)])
        text, ids = self.encode(record, choices, grids)
        return sample | dict(
            text=text,
            ids=torch.tensor(ids),
            positions=mrope_positions(ids, grids, self.config),
            patches=torch.from_numpy(patches),
            grids=grids,
        )

    def encode(self, record, choices, grids):
        """-> (prompt text, ids with as many placeholders as each grid has merged patches);
        ValueError if the template wrote another number of them."""
        messages = record.get("messages") or build_messages(record, choices)
        text = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )

        left = list(grids)
        ids = []
        for token in self.tokenizer(text, add_special_tokens=False).input_ids:
            count = 1
            if token in (self.config.image_token_id, self.config.video_token_id):
                must(left, f"its prompt has more placeholders than its {len(grids)} media")
                count = math.prod(left.pop(0)) // MERGE**2
            ids += [token] * count
        must(not left, f"its prompt has fewer placeholders than its {len(grids)} media")
        return text, ids

    def check_lengths(self, limit):
        """-> {sample_id: tokens of its prompt and response at most}, its video at max_frames. Over
        `limit` is an error: none is cut (trap 5)."""
        side = self.size // PATCH
        t = dict(video=self.c.max_frames // PAIR, image=1)
        problems = []
        lengths = {}
        for record in self.records:
            negatives = sorted(record.get("negatives", []), key=len)
            drawn = [record.get("answer"), *negatives[-3:]]  # the longest that can be
            grids = [(t[kind], side, side) for kind, _ in record["media"]]
            response = self.tokenizer(record.get("response", ""), add_special_tokens=False)
            try:
                _, ids = self.encode(record, record.get("choices") or drawn, grids)
                length = lengths[record["sample_id"]] = len(ids) + len(response.input_ids)
                must(length <= limit, f"up to {length} tokens, over the limit of {limit}")
            except ValueError as error:
                problems.append(f"sample_id {record['sample_id']}: {error}")

        if problems:
            fail(*problems)
        return lengths


@cache
def permutation(count, seed, epoch):
    return random.Random(repr((seed, epoch))).sample(range(count), count)


def choose(record, seed, epoch):
    """-> (choices, gold letter); ([], None) for a chat row. What is drawn depends on (seed, epoch,
    sample_id) alone (trap 10)."""
    if "negatives" not in record:
        return record.get("choices", []), record.get("gold")

    rng = random.Random(repr((seed, epoch, record["sample_id"])))
    negatives = rng.sample(record["negatives"], 3)
    choices = rng.sample([record["answer"], *negatives], 4)
    return choices, "ABCD"[choices.index(record["answer"])]


def build_messages(record, choices):
    """The benchmark's one user turn: video if there is progress, image, then question, choices and
    instruction."""
    options = "".join(f"{letter}. {choice}\n" for letter, choice in zip("ABCDE", choices))
    content = [dict(type=kind) for kind, _ in record["media"]]
    content.append(dict(type="text", text=f"{record['question']}\n{options}{INSTRUCTION}"))
    return [dict(role="user", content=content)]


def decoding_pool(workers):
    """Processes that decode a sample at a time, each within a time limit: a decoder can crash, or
    hang for ever holding the GIL (trap 14). A new process takes the place of one that is ended."""
    CONSTS.term_timeout = 0  # who hangs would not hear a request to leave
    fork = multiprocessing.get_context("fork")
    return ProcessPool(max(1, workers), initializer=start_decoding, context=fork)


def start_decoding():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it is for the loop, which ends its step first
    torch.set_num_threads(1)  # the parent's thread pool was not forked


def decode(media, *how):
    """A record's [(kind, path)], to be read as `how` says -> ([(patches, grid)], None), or (None,
    what went wrong)."""
    found = []
    try:
        for kind, path in media:
            patches, grid = to_patches(read_media(kind, path, *how))
            found.append((patches.numpy(), grid))
    except Exception as error:  # whatever a decoder raises is this sample's failure
        return None, f"{type(error).__name__}: {error}".splitlines()[0]
    return found, None


def read_media(kind, path, size, fps, max_frames, video_reader="pyav"):
    """-> uint8 frames [T, size, size, 3]; an image is its frame twice. Raises ValueError, and what
    PyAV, decord and Pillow raise."""
    if kind == "image":
        image = read_image(path).resize((size, size), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(image)).expand(2, -1, -1, -1)

    if video_reader == "decord":  # the released run's; it has no build for aarch64
        import decord

        reader = decord.VideoReader(str(path), num_threads=1)
        indices = frame_indices(len(reader), reader.get_avg_fps(), fps, max_frames)
        frames = reader.get_batch(indices).asnumpy()
    else:
        frames = read_video(path, fps, max_frames)

    frames = torch.from_numpy(frames).permute(0, 3, 1, 2)
    resize = partial(F.interpolate, size=(size, size), mode="bicubic", antialias=True)
    # One by one: less memory.
    resized = [resize(frame.float()).round().clamp(0, 255).byte() for frame in frames.split(1)]
    return torch.cat(resized).permute(0, 2, 3, 1)


def read_image(path):
    """-> an RGB image, turned as its EXIF says, on white where it is transparent."""
    Image.open(path).verify()  # by its checksums: what is damaged would be black
    image = ImageOps.exif_transpose(Image.open(path))
    if image.mode == "I;16":  # convert() would clip its grey at 255
        image = Image.fromarray((np.array(image) >> 8).astype(np.uint8))

    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def read_video(path, fps, max_frames):
    """-> the sampled frames, uint8 [T, height, width, 3], each by its place in the order of display
    and turned as the file says (trap 22)."""
    times, keys, rate, length = timeline(path)
    indices = frame_indices(len(times), rate, fps, max_frames)

    # A long video, with key frames between those that are wanted, is sought; any other is counted,
    # and so is one whose frames come at other times than its packets promise.
    frames = [None]
    if len(times) > 1000 and keys > max_frames:
        frames = [seek_frame(path, times, index) for index in indices]
    if None in frames:
        shown = count_frames(path, indices)
        must(shown, "no frame of it decodes")
        if len(shown) != len(times):
            indices = frame_indices(len(shown), rate, fps, max_frames)
            shown = count_frames(path, indices)
        frames = [shown[index] for index in indices]

    last = frames[-1]
    shown_for = max(1 / rate, (last.duration or 0) * last.time_base)
    seconds = float((last.time or 0) - (frames[0].time or 0) + shown_for)
    must(1.1 * seconds >= length, f"cut off: {seconds:.1f} of about {length:.1f} s decode")
    turned = [np.rot90(f.to_ndarray(format="rgb24"), f.rotation // 90) for f in frames]
    must(len({frame.shape for frame in turned}) == 1, "its frames change their size")
    return np.stack(turned)


def timeline(path):
    """What a video's packets promise: its frames' times in the order of display, how many of them
    are key frames, frames a second; and the seconds that the file promises."""
    times = []
    keys = 0
    with av.open(str(path)) as container:
        stream = container.streams.best("video")
        must(stream, "holds no video")
        for packet in container.demux(stream):
            if packet.size and not packet.is_discard:  # an edit list discards what is not shown
                times.append(packet.pts or 0)
                keys += packet.is_keyframe

        length = (container.duration or 0) / av.time_base
        if stream.duration:
            length = float(stream.duration * stream.time_base)
        rate = stream.average_rate or stream.guessed_rate
    must(times and rate, "holds no frames, or not how many a second")
    return sorted(times), keys, float(rate), length


def seek_frame(path, times, index):
    """-> a frame, decoded from the key frame before it; None if the times on the way there are not
    the promised ones."""
    way = []
    frame = None
    # In an open group of pictures up to 16 frames are shown before the key frame that they follow.
    for frame in decoded(path, times[max(0, index - 16)]):
        way.append(frame.pts)
        if frame.pts is None or frame.pts >= times[index]:
            break
    return frame if way == times[index + 1 - len(way) : index + 1] else None


def count_frames(path, indices):
    """-> all frames that are shown, in their order; those at no place of `indices` as None."""
    return [frame if place in indices else None for place, frame in enumerate(decoded(path))]


def decoded(path, start=None):
    """Yields a video's frames in the order of display, from the key frame before the time `start`,
    up to where the file is damaged."""
    with av.open(str(path)) as container, suppress(av.InvalidDataError):
        stream = container.streams.best("video")
        stream.codec_context.thread_count = 1
        if start is not None:
            container.seek(start, stream=stream)
        yield from container.decode(stream)


def frame_indices(total, video_fps, fps, max_frames):
    """-> frames to decode: fps x duration, clamped to [4, max_frames], floored to even, evenly
    spread; a short video repeats some."""
    count = int(min(max(total / video_fps * fps, 4), max_frames)) // 2 * 2
    return np.linspace(0, total - 1, count).round().astype(int)


def to_patches(frames):
    """uint8 frames [T, height, width, 3] -> (patches [t*h*w, 1176] uint8, grid (t, h, w)); rows are
    ordered (t, h/2, w/2, 2, 2), columns (channel, 2 frames, 14, 14)."""
    t = len(frames) // PAIR
    h = frames.shape[1] // PATCH
    w = frames.shape[2] // PATCH
    blocks = (t, PAIR, h // MERGE, MERGE, PATCH, w // MERGE, MERGE, PATCH, 3)
    patches = frames.reshape(blocks).permute(0, 2, 5, 3, 6, 8, 1, 4, 7)
    return patches.reshape(t * h * w, 3 * PAIR * PATCH**2), (t, h, w)


# === end shared: video_prompt ===


# === shared: training — identical in grpo_video.py, sft_video.py ===
def rank_batches(total, steps, B, accumulation):
    """-> this rank's B positions, in a stream of `total` samples, for each micro-batch; a step's do
    not depend on its division."""
    batches = []
    for micro_batch in range(steps.start * accumulation, steps.stop * accumulation):
        start = (micro_batch * WORLD + RANK) * B
        batches.append(range(total)[start : start + B])
    return batches


def load_sharded(c, source, device, dtype, weights_dtype=torch.float32):
    """A model sharded over the ranks; to train it, its weights are fp32 masters. They stay in host
    memory with --offload_optimizer, and the optimizer steps there."""
    if source.resolve().is_relative_to(Path(c.output_dir).resolve()):
        fail(f"--output_dir {c.output_dir} holds --model {source}, which a run would overwrite")

    weights_device = torch.device("cpu") if c.offload_optimizer else device
    wrap = partial(shard, device=device, dtype=dtype, offload=c.offload_optimizer)
    model = load_model(source, weights_device, weights_dtype, wrap)
    model.gradient_checkpointing = c.gradient_checkpointing
    model.visual.requires_grad_(not c.freeze_vision)
    model.config.dtype = dtype
    return model


def shard(model, device, dtype, offload=False):
    """FSDP2 over the ranks (HSDP over nodes): fp32 shards, gathered as `dtype` to compute; fp32
    gradients. `offload` keeps all that in host memory. One CPU process needs no wrapper.

    The shards are the master weights: at lr 1e-6 an update of bf16 weights would round away."""
    if WORLD == 1 and device.type == "cpu":
        return model

    shape = (WORLD // LOCAL_WORLD, LOCAL_WORLD)
    mesh = dist.init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))
    if LOCAL_WORLD == WORLD:
        mesh = mesh["shard"]
    # Pinned, a tensor would take the next power of two of host memory.
    place = CPUOffloadPolicy(pin_memory=False) if offload else OffloadPolicy()
    policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    # A root left whole after its forward would go stale.
    for part in (*model.visual.blocks, *model.model.layers, model):
        fully_shard(
            part, mesh=mesh, mp_policy=policy, offload_policy=place, reshard_after_forward=True
        )
    return model


# Two words: what a rank without a sample computes, with weight zero, so that no other waits for it.
BLANK = dict(ids=torch.zeros(2).long(), positions=torch.zeros(3, 2).long(), grids=[])


def gathered(tensor, dtype):
    """A sharded tensor whole, and on the device that computes, even if its shards are not."""
    tensor = tensor.detach().to(dtype)
    if not isinstance(tensor, DTensor):
        return tensor
    return tensor.to(tensor.device_mesh.device_type).full_tensor()


def global_sums(**values):
    """{name: number} -> {name: its sum over the ranks}"""
    total = torch.tensor([float(value) for value in values.values()], dtype=torch.float64)
    if WORLD > 1:
        dist.all_reduce(total)
    return dict(zip(values, total.tolist()))


def learning_rate_at(c, step, steps):
    """Of a step, counted from 0, of `steps`: a linear warm-up, then the decay to 0."""
    warmup = min(math.ceil(steps * c.warmup_ratio), steps - 1)
    share = (steps - step) / (steps - warmup)
    if c.lr_scheduler_type == "cosine":
        share = 0.5 * (1 + math.cos(math.pi * ((step - warmup) / (steps - warmup))))
    if step < warmup:
        share = step / warmup
    if c.lr_scheduler_type == "constant":
        share = 1
    return c.learning_rate * share


def make_optimizer(c, model):
    """AdamW on the master weights. All moments exist from the start, as torch would make them at a
    parameter's first gradient: a checkpoint has them even if none has come yet, as to a vision
    tower that is frozen."""
    optimizer = torch.optim.AdamW(
        model.parameters(),
        c.learning_rate,
        weight_decay=c.weight_decay,
        fused=torch.cuda.is_available(),
    )

    for p in model.parameters():
        optimizer.state[p] = dict(
            step=torch.zeros(1, device=p.device),
            exp_avg=torch.zeros_like(p),
            exp_avg_sq=torch.zeros_like(p),
        )
    return optimizer


def optimizer_step(model, optimizer, learning_rate, max_grad_norm, loss):
    """Clips and applies the gradients -> their norm before. If it or the loss is not finite,
    nothing is applied."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    norm = gathered(norm, torch.float32).item()
    if math.isfinite(norm + loss):
        optimizer.param_groups[0]["lr"] = learning_rate
        optimizer.step()
    optimizer.zero_grad()
    return norm


def lap(log, name):
    """Logs the seconds since the last lap (CUDA's queue is emptied first) and the peak memory,
    allocated or, on CPU, resident."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    now = time.perf_counter()
    log[name] = now - log["clock"]
    log["clock"] = now
    log["peak_memory_gb"] = peak / 2**30


def count_faults(c, total, faults, log, failed):
    """Tells of a step's faults, and ends the run where going on makes no sense. `failed` are this
    rank's unreadable samples; `faults` counts the run's, and the steps in a row that were not
    applied."""
    for s in failed:
        tqdm.write(
            f"step {log['step']}: sample_id {s['sample_id']} left out: {s['error']}",
            file=sys.stderr,
        )
    faults["samples"] += log["bad_samples"]
    faults["steps"] += 1
    if math.isfinite(log["loss"] + log["grad_norm"]):
        faults["steps"] = 0
    else:
        tell(
            f"step {log['step']}: not applied: loss {log['loss']}, gradient norm {log['grad_norm']}"
        )

    limit = total // 100 if c.max_bad_samples < 0 else c.max_bad_samples
    if faults["samples"] > limit or faults["steps"] == 3:
        fail(
            f"{faults['samples']} samples could not be read (--max_bad_samples {limit}), "
            f"{faults['steps']} steps in a row (at most 2) had no finite loss and gradient: see "
            "the lines above and the logs in --output_dir"
        )


def catch_signals():
    """-> a list that receives SIGTERM or SIGINT: the loop ends its step, saves and leaves. A second
    one kills at once."""
    caught = []

    def catch(number, frame):
        caught.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, catch)
    return caught


def append_rows(path, rows):
    """Rank 0 appends JSON lines; a number that is not finite stands as null."""
    if RANK == 0:
        with open(path, "a") as f:
            for row in json.loads(json.dumps(rows), parse_constant=lambda name: None):
                f.write(json.dumps(row, ensure_ascii=False) + "\n")


def log_step(c, log, steps, shown):
    """A step's row for metrics.jsonl; each logging_steps a line on stdout with the `shown` numbers,
    this step's seconds, and what the rest takes at this pace."""
    del log["clock"]
    append_rows(Path(c.output_dir, "metrics.jsonl"), [log])
    if RANK == 0 and log["step"] % c.logging_steps == 0:
        seconds = sum(log[key] for key in log if key.startswith("time_"))
        tqdm.write(
            f"step {log['step']} of {steps}: "
            f"{', '.join(f'{key} {log[key]:.3f}' for key in shown)}, {seconds:.2f} s a step, "
            f"{tqdm.format_interval(seconds * (steps - log['step']))} left"
        )
        sys.stdout.flush()  # into a file, too


def leave(step, caught):
    tell(
        f"stopped after step {step}; --resume_from_checkpoint auto goes on from its checkpoint, "
        "unless --save_only_model left the moments out"
    )
    sys.exit(128 + (caught or [signal.SIGTERM])[0])


def tell(line):
    """Rank 0 says it on stderr, above the bar."""
    if RANK == 0:
        tqdm.write(line, file=sys.stderr)


def open_run(c, model, optimizer, source, records, missing, per_step, steps):
    """Makes output_dir and its config.json: the model's, and an entry "run" with all settings,
    versions and hashes -> the step that the run goes on from, or 0. Weights and moments become that
    step's, and what a run wrote behind it is removed."""
    output_dir = Path(c.output_dir)
    rows = [r | dict(media=None) for r in records]  # the data root may move
    left_out = json.dumps([row["sample_id"] for row in missing])
    packages = "torch transformers av decord numpy pillow".split()
    run = vars(c) | dict(
        versions={d.name: d.version for d in distributions() if d.name in packages},
        missing=len(missing),
        missing_sha256=hashlib.sha256(left_out.encode()).hexdigest(),
        script_sha256=hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
        world_size=WORLD,
        # What the order of the data and the schedule follow from.
        must_stay=f"{Path(__file__).name}, {per_step} prompts a step, seed {c.seed}, "
        f"{'any' if c.lr_scheduler_type == 'constant' else steps} steps, "
        f"records {hashlib.sha256(repr(rows).encode()).hexdigest()}",
    )

    start = resume(c, output_dir, run, training_state(model, optimizer))
    tell(f"{output_dir}: {start} of {steps} steps done{', finished' if start == steps else ''}")
    barrier()  # rank 0 removes nothing before all have looked
    if RANK == 0:
        cut_back(output_dir, start)
        (output_dir / "missing.jsonl").unlink(missing_ok=True)
        append_rows(output_dir / "missing.jsonl", missing)
        copy_texts(source, output_dir)
        # The source's own file, with the type of what is saved: transformers 5 would write a form
        # of it that 4 can't read.
        dtype = f'dtype": "{str(model.config.dtype).removeprefix("torch.")}"'
        settings = json.loads(re.sub(r'dtype": "\w+"', dtype, (source / "config.json").read_text()))
        (output_dir / "config.json").write_text(json.dumps(settings | dict(run=run), indent=2))

        # What is kept, and one more, which is written before the oldest goes; 12 bytes of 16 are
        # those of resume/.
        kept = 1 + min(c.save_total_limit or steps, steps // c.save_steps)
        size = kept * sum(map(torch.numel, model.parameters())) * (4 if c.save_only_model else 16)
        free = shutil.disk_usage(output_dir).free
        if size > free:
            tell(
                f"warning: {kept} checkpoints at once take up to {size / 2**30:.1f} GiB, and "
                f"--output_dir {output_dir} has {free / 2**30:.1f} GiB free: see --save_total_limit"
            )
    return start


def resume(c, output_dir, run, state):
    """Takes output_dir, and loads the checkpoint that the flags ask for -> its step, or 0.

    "auto" is the newest whole one, which a restart by torchrun goes on from by itself."""
    own = checkpoints(output_dir)
    candidates = []
    if c.resume_from_checkpoint == "auto" or RESTARTS and own:
        candidates = own[::-1]
        complain = tell
    elif c.resume_from_checkpoint:
        candidates = [Path(c.resume_from_checkpoint)]
        complain = fail

    for folder in candidates:
        try:
            compare_runs(folder, run)
            lock(output_dir)
            dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(str(folder / "resume")))
            return step_of(folder)
        except (OSError, ValueError, KeyError, dcp.CheckpointException) as error:
            complain(f"--resume_from_checkpoint {folder}: {str(error).rstrip().splitlines()[-1]}")

    holds_run = own or (output_dir / "metrics.jsonl").exists()
    if candidates or holds_run and not (c.overwrite_output_dir or RESTARTS):
        fail(
            f"--output_dir {output_dir} holds a run and {len(own)} checkpoints: "
            "--resume_from_checkpoint auto goes on from the newest whole one, "
            "--overwrite_output_dir begins anew"
        )
    lock(output_dir)
    return 0


def compare_runs(folder, run):
    """Ends the program where the run would go on from a checkpoint with other data, or in another
    order; tells of what else has changed. ValueError if the checkpoint is not whole."""
    before = json.loads((folder / "config.json").read_text())["run"]
    shards = [*(folder / "resume").glob("*.safetensors")]
    must(
        len(shards) == before["world_size"],
        f"resume/ holds {len(shards)} of {before['world_size']} shards (--save_only_model: none)",
    )

    for key, value in run.items():
        if before.get(key, value) != value and key != "resume_from_checkpoint":
            say = fail if key == "must_stay" else tell
            say(f"changed since {folder}: {key} was {before[key]!r}, is {value!r}")


def cut_back(output_dir, start):
    """Removes what a run wrote after step `start`, and what a kill left half written."""
    for folder in output_dir.glob("checkpoint-*"):
        if folder.suffix == ".tmp" or step_of(folder) > start:
            shutil.rmtree(folder)

    for name in ("metrics.jsonl", "rollouts.jsonl", "audit.jsonl"):
        log = output_dir / name
        if log.exists():
            kept = 0
            for line in open(log, "rb"):
                if line.endswith(b"\n") and json.loads(line)["step"] <= start:
                    kept += len(line)
            os.truncate(log, kept)


def checkpoints(output_dir):
    """A run's checkpoints, oldest first."""
    return sorted(output_dir.glob("checkpoint-*[0-9]"), key=step_of)


def step_of(checkpoint):
    return int(checkpoint.name.removeprefix("checkpoint-"))


def save_checkpoint(c, step, model, optimizer):
    """output_dir/checkpoint-<step>: a model folder, and in resume/ the shards of training_state.

    Written beside, synced, then renamed: a kill at any moment leaves the last complete one. The
    newest save_total_limit are kept."""
    final = Path(c.output_dir, f"checkpoint-{step}")
    beside = Path(f"{final}.tmp")
    save_model(model, beside)
    if RANK == 0:
        copy_texts(final.parent, beside)
    if not c.save_only_model:
        writer = dcp.HuggingFaceStorageWriter(str(beside / "resume"), save_distributed=True)
        dcp.save(training_state(model, optimizer), storage_writer=writer)
    os.sync()
    barrier()

    if RANK == 0:
        beside.rename(final)
        for old in checkpoints(final.parent)[: -c.save_total_limit]:  # of all if it is 0, none
            shutil.rmtree(old)
    barrier()


def training_state(model, optimizer):
    """{name: tensor}: weights, moments and step counts, all that training goes on from."""
    state = model.state_dict()
    for name, p in model.named_parameters():
        state |= {f"state.{name}.{key}": z for key, z in optimizer.state[p].items()}
    return state


def save_model(model, folder):
    """Writes the weights as transformers loads them: safetensors, sharded above 5 GB. Rank 0 writes
    what all ranks gather."""
    state = {}
    for name, p in model.state_dict().items():
        whole = gathered(p, model.config.dtype)
        if RANK == 0:
            state[name] = whole.cpu()

    if RANK == 0:
        folder.mkdir(exist_ok=True)
        save_torch_state_dict(state, folder)
    barrier()


def copy_texts(source, folder):
    """What makes weights a model folder: the configuration's, tokenizer's and processor's files,
    but not a model.safetensors.index.json."""
    for file in source.iterdir():
        if re.fullmatch(r"[^.]+\.(json|txt|jinja)", file.name):
            shutil.copyfile(file, folder / file.name)


# === end shared: training ===


# === shared: start_up — identical in grpo_video.py, sft_video.py, eval_video.py ===
def parse_config(config_class, toy_presets, argv=None):
    """argv -> config_class; --toy makes its presets the defaults. An unknown flag or an impossible
    value ends the program."""
    source = "".join(map(inspect.getsource, config_class.__mro__[:-1]))
    comments = dict(re.findall(r"^    (\w+): .+  # (.+)$", source, re.M))
    for f in fields(config_class):
        f.metadata = dict(help=comments[f.name])

    parser = HfArgumentParser(
        config_class,
        allow_abbrev=False,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.error = fail
    if "--toy" in (argv or sys.argv):
        parser.set_defaults(**toy_presets)
    known, unknown = parser.parse_known_args(argv)
    if unknown:
        close = difflib.get_close_matches(unknown[0], comments) or ["help"]
        fail(f"no such flag: {' '.join(unknown)}; did you mean --{' or --'.join(close)}?")
    config = config_class(**vars(known))

    problems = []
    holds = {"above": operator.gt, "at least": operator.ge, "at most": operator.le}
    for name, comment in comments.items():
        value = getattr(config, name)
        if value == getattr(config_class, name, None):
            continue  # a default need not hold them
        for word, limit in re.findall(r"(above|at least|at most) (-?\d+)", comment):
            if not (holds[word](value, int(limit)) and value < math.inf):
                problems.append(f"--{name} {value}: must be a number {word} {limit}")
    if problems:
        fail(*problems)
    return config


def set_up(toy):
    """-> this rank's device and the type to compute in. Makes the process group; with --toy, rank 0
    builds a missing toy."""
    device = torch.device("cpu")
    dtype = torch.float32
    backend = "gloo"
    if torch.cuda.is_available():
        device = torch.device("cuda", LOCAL_RANK)
        dtype = torch.bfloat16
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
        torch.backends.cuda.enable_cudnn_sdp(False)  # it would plan anew for every length

    store = dist.HashStore() if WORLD == 1 else next(dist.rendezvous("env://"))[0]
    # After a restart torchrun's store still holds the dead ranks' addresses: each try has its own.
    store = dist.PrefixStore(str(RESTARTS), store)
    dist.init_process_group(backend, rank=RANK, world_size=WORLD, store=store)

    if toy:
        torch.set_num_threads(1)  # its matrices are too small to share
        maker = HERE / "toy/make_toy.py"
        missing = RANK == 0 and not (HERE / "toy/model").exists()
        if missing and subprocess.call([sys.executable, maker]):
            fail(
                f"--toy: {maker}, which stands beside this script in its repository, did not build "
                "the toy"
            )
    barrier()
    return device, dtype


def lock(folder):
    """Makes the folder, and takes it for this run until its process ends, however it does."""
    problem = [None]
    if RANK == 0:
        try:
            os.makedirs(folder, exist_ok=True)
            lock.file = open(folder / ".lock", "a")
            fcntl.lockf(lock.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            problem = ["another run is writing there"]
        except OSError as error:
            if error.filename:  # without a name it is a file system that has no locks
                problem = [f"{error}"]

    dist.broadcast_object_list(problem)
    if problem[0]:
        fail(f"--output_dir {folder}: {problem[0]}")


def barrier():
    if WORLD > 1:
        dist.barrier()


def find_model(name):
    """A folder, or a hub id, whose checkpoint is fetched into the hub's cache (it locks: ranks may
    ask at once) -> the folder."""
    try:
        if not Path(name).is_dir():
            family = AutoConfig.from_pretrained(name).model_type  # asked before 16 GB are fetched
            must(family == "qwen2_vl", f"model_type {family!r} in config.json, must be 'qwen2_vl'")
            name = snapshot_download(name, ignore_patterns=["*.bin"])
    except (OSError, ValueError) as error:
        fail(
            f"--model {name}: no such folder, and nothing from the hub "
            f"({str(error).splitlines()[0]}); `hf download Qwen/Qwen2-VL-7B-Instruct --local-dir "
            "DIR` fetches the paper's model; `grpo_video.py --toy` needs no download"
        )

    for file in ("config.json", "tokenizer_config.json"):
        if not Path(name, file).is_file():
            fail(f"--model {name}: holds no {file}, as a Qwen2-VL checkpoint does")
    return Path(name)


def load_tokenizer(folder):
    """A model folder's tokenizer; its chat template may stand in a file of its own."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    template = folder / "chat_template.json"
    if not tokenizer.chat_template and template.is_file():
        tokenizer.chat_template = json.loads(template.read_text())["chat_template"]
    return tokenizer


# === end shared: start_up ===

if __name__ == "__main__":
    try:
        main()
    except (OSError, SafetensorError, dcp.CheckpointException) as error:
        # A full disk, for one; the last checkpoint is whole.
        sys.exit(f"rank {RANK}: {type(error).__name__}: {str(error).rstrip().splitlines()[-1]}")
