"""GRPO on video questions: Qwen2-VL learns SEED-Bench-R1 (arXiv 2503.24376) from a reward that says
right or wrong, in plain PyTorch.

    python grpo_video.py --toy                   # a tiny model, tiny videos: a minute on two cores
    torchrun --nproc_per_node=8 grpo_video.py    # the paper's recipe, Qwen2-VL-7B-Instruct
    python grpo_video.py --help                  # all flags

A step (`main` is this list):

    records    -> prompts: sampled frames, the observed image, the question and its choices
    rollout    -> G completions of each prompt from the policy
    reference  -> log-probs of the completions under the frozen starting model
    reward     -> 1 if the answer's letter is right, else 0
    advantage  -> (r - mean) / (std + 1e-4) inside each group of G
    update     -> clipped policy gradient with a k3 KL penalty, AdamW on fp32 master weights

Departures from the released run (why: docs/deviations.md): the prompt is computed once per group;
several letters or an unmarked one score 0; choices are shuffled by (seed, epoch, sample_id);
unreadable videos are reported, never replaced; --kl_clamp is off by default. Not the paper's:
--consistency_weight, GRPO-CARE's reward for answers that follow from their own thinking.

Dimensions: B prompts, G completions of each, P prompt tokens, C completion tokens, N rows (tokens
or patches), H heads, K key-value heads, E head width, D model width, V vocabulary, T frames.

The page from here to the end of `main` is the whole method. What it stands on comes behind, in
blocks that several scripts share: answers, sampling, Qwen2-VL, records and frames, ranks and
checkpoints, start-up. A "trap" is a fault of other implementations that docs/deviations.md lists.
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
import unicodedata
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

    Names are TRL's GRPOConfig's where it has one; defaults are the released run's."""

    # The model and the data
    model: str = "Qwen/Qwen2-VL-7B-Instruct"  # Qwen2-VL checkpoint: a folder, or a hub id to fetch
    data_root: str = "data/SEED-Bench-R1"  # folder with annotations/, videos/ and images/
    annotations: str = ""  # training rows; default: DATA_ROOT/annotations/training_6k.jsonl
    toy: bool = False  # train the tiny model in toy/ on its tiny videos, building them if missing
    max_frames: int = 16  # frames of a video at most, at least 2
    fps: float = 2.0  # frames per second of video; 4 to max_frames in all, above 0
    frame_size: int = 256  # height and width of a frame, rounded to a multiple of 28, at least 1
    video_reader: Literal["pyav", "decord"] = "pyav"  # decord, the released run's, can be wrong
    skip_missing: bool = False  # leave out records whose video or image is missing
    max_prompt_length: int = 16384  # tokens; a longer one is an error, never cut, at least 1

    # Rollout and reward
    num_generations: int = 8  # G: completions of each prompt, at least 2
    max_completion_length: int = 256  # tokens of a completion at most, at least 1
    temperature: float = 1.0  # softmax temperature of the rollouts and of the log-probs, above 0
    format_reward_weight: float = 0.0  # of the form <think>…</think><answer>…</answer>, at least 0
    consistency_weight: float = 0.0  # λ of consistency_bonus (GRPO-CARE); 0: none, at least 0
    consistency_cap: float = 0.95  # what its p_answer is clipped at, above 0, at most 1
    consistency_margin: float = 0.0  # by how much p_answer may miss the mean, at least 0
    scale_rewards: bool = True  # divide the advantages by their group's standard deviation
    mask_truncated_completions: bool = False  # what did not end has no loss, only its reward

    # The loss
    beta: float = 0.1  # weight of the KL penalty; 0: none, at least 0
    kl_clamp: float = 0.0  # bound on the KL's exponent; released run: 11, 0: none, at least 0
    loss_type: Literal["grpo", "dapo", "dr_grpo"] = "grpo"  # what it averages over: token_weights
    epsilon: float = 0.2  # lower clip of the ratio, above 0
    epsilon_high: float | None = None  # upper clip of the ratio; default: epsilon, above 0
    num_iterations: int = 1  # optimizer steps on each batch of rollouts, at least 1

    # The optimizer
    learning_rate: float = 1e-6  # peak learning rate, above 0
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "linear"  # decay after the warm-up
    warmup_ratio: float = 0.0  # share of the steps that warm up, at least 0, at most 1
    weight_decay: float = 0.0  # AdamW's, at least 0
    max_grad_norm: float = 1.0  # gradients are clipped to this norm, above 0
    freeze_vision: bool = False  # do not train the vision tower

    # The run
    num_train_epochs: int = 1  # passes over the annotations, at least 1
    max_steps: int = -1  # steps in all, at least 1; by default what num_train_epochs makes
    per_device_train_batch_size: int = 1  # prompts (TRL counts completions), at least 1
    gradient_accumulation_steps: int = 1  # micro-batches of a step, at least 1
    gradient_checkpointing: bool = True  # recompute layers in the backward pass; rollouts never do
    offload_optimizer: bool = False  # on a GPU: reference, masters and AdamW in host memory
    seed: int = 42  # of the data order, the drawn choices and the rollouts, at least 0
    dataloader_num_workers: int = 2  # processes that decode ahead; 0: none, at least 0
    decode_timeout: float = 60.0  # seconds after which decoding a sample is given up, above 0
    max_bad_samples: int = -1  # more unreadable ones end the run; -1: a hundredth, at least -1

    # What it writes
    output_dir: str = "runs/grpo"  # for config.json, the logs, the checkpoints, the final model
    overwrite_output_dir: bool = False  # start anew in an output_dir that holds a run already
    resume_from_checkpoint: str = ""  # a checkpoint folder, or 'auto': the last one of output_dir
    save_steps: int = 100  # steps between checkpoints; the last step has one, at least 1
    save_total_limit: int = 2  # newest checkpoints kept; 0: all, at least 0
    save_only_model: bool = False  # leave the moments out of checkpoints, so that none resumes
    logging_steps: int = 10  # steps between lines on stdout; metrics.jsonl has all, at least 1
    audit: int = 0  # steps of which audit.jsonl gets all numbers of the update, at least 0


TOY = dict(
    model=str(HERE / "toy/model"),
    data_root=str(HERE / "toy/data"),
    output_dir="runs/toy-grpo",
    overwrite_output_dir=True,
    max_steps=150,
    per_device_train_batch_size=16,
    max_completion_length=24,
    learning_rate=5e-4,
    lr_scheduler_type="constant",
    beta=0.01,
    max_frames=8,
    frame_size=56,
    gradient_checkpointing=False,
    dataloader_num_workers=1,
)


# ------------------------------------------------------------------------------------------------
# The formulas
# ------------------------------------------------------------------------------------------------


def reward_of(text, gold, format_reward_weight, choices=()):
    """-> (reward, answer): 1 for the gold letter, else 0; plus the weight if the text is <think>,
    then <answer>, and no more."""
    answer = extract_answer(text, choices)
    reward = float(answer == gold)

    tags = ("<think>", "</think>", "<answer>", "</answer>")
    once = all(text.count(tag) == 1 for tag in tags)
    form = r"\s*<think>.*</think>\s*<answer>.*</answer>\s*"
    if once and re.fullmatch(form, text, re.S):
        reward += format_reward_weight
    return reward, answer


def consistency_bonus(p_answer, right, weight, cap, margin):
    """λ for a right completion whose answer follows from its own thinking, else 0 (GRPO-CARE, arXiv
    2506.16141). p_answer and right [B, G] -> [B, G].

    p_answer is the mean of π_ref(token | prompt, thinking) over the answer's tokens. Clipped at the
    cap, it has to reach the mean of its group's right ones, less the margin; equal ones may round
    apart by 1e-6."""
    p = p_answer.clamp(max=cap).where(right, math.nan)  # NaN is in no mean and reaches none
    return weight * (p >= p.nanmean(1, keepdim=True) - margin - 1e-6)


def group_advantages(rewards, scale_rewards):
    """rewards [B, G] -> Â_g = (r_g - mean r) / (std r + 1e-4) inside each group, std unbiased; only
    centred if not scaled."""
    centred = rewards - rewards.mean(1, keepdim=True)
    if not scale_rewards:
        return centred
    return centred / (rewards.std(1, keepdim=True) + 1e-4)


def k3_kl(logp, ref_logp, clamp=0.0):
    """D_KL[π_θ ‖ π_ref] ≈ e^d - d - 1 with d = log π_ref - log π_θ, per token (the k3 estimator).

    `clamp` bounds d, as the released run did with 11: outside it there is no gradient (trap 9)."""
    d = ref_logp - logp
    if clamp > 0:
        d = d.clamp(-clamp, clamp)
    return torch.exp(d) - d - 1


def policy_loss(logp, old_logp, advantages, epsilon, epsilon_high):
    """-min(ρ Â, clip(ρ, 1 - ε, 1 + ε_high) Â), ρ = π_θ / π_old, per token.

    logp, old_logp [B, G, C], advantages [B, G] -> (loss, clipped), [B, G, C] each; clipped marks
    the tokens whose gradient the clip takes away."""
    ratio = torch.exp(logp - old_logp)
    A = advantages[..., None]  # one for all tokens of a completion

    too_low = (ratio < 1 - epsilon) & (A < 0)
    too_high = (ratio > 1 + epsilon_high) & (A > 0)
    clipped_ratio = ratio.clamp(1 - epsilon, 1 + epsilon_high)
    return -torch.min(ratio * A, clipped_ratio * A), too_low | too_high


def token_weights(mask, loss_type, sequences, tokens, max_completion_length):
    """mask [B, G, C] -> weights [B, G, C]; the loss is the weighted sum of the tokens' losses.

    `sequences` and `tokens` are the whole step's, over all micro-batches and ranks, so that the
    loss does not depend on how the step is cut (trap 15)."""
    mask = mask.float()
    if loss_type == "grpo":  # each completion's mean over its tokens, averaged over completions
        return mask / mask.sum(-1, keepdim=True).clamp(min=1) / max(1, sequences)
    if loss_type == "dapo":  # the mean over all tokens
        return mask / max(1, tokens)
    # dr_grpo: each completion's sum over a constant length, averaged
    return mask / max(1, sequences * max_completion_length)


def entropy_of(logits, log_z, targets):
    """-Σ p log p of softmax(logits); logits [N, V], their log-sum-exp log_z [N] -> [N]."""
    p = (logits - log_z[:, None]).exp_()  # in place: as large as all logits
    return log_z - p.mul_(logits).sum(-1)


# ------------------------------------------------------------------------------------------------
# Rollout and update
# ------------------------------------------------------------------------------------------------


@dataclass
class Group:
    """A micro-batch: B prompts with G completions of each, and what a step computes of them."""

    prompts: "Prompts"
    completions: torch.Tensor  # [B, G, C] ids
    said: torch.Tensor  # [B, G, C] bool, through the first end token
    mask: torch.Tensor  # [B, G, C] bool, what of it the loss counts
    samples: list  # one a prompt; a blank prompt has none
    sampled_logp: torch.Tensor = None  # [B, G, C], of the tokens as they were drawn
    ref_logp: torch.Tensor = None  # [B, G, C]
    advantages: torch.Tensor = None  # [B, G]
    p_answer_ref = bonus = None  # [B, G] each, with --consistency_weight
    old_logp: torch.Tensor = None  # [B, G, C]
    # group_loss adds, [B, G, C] each: logp, ratio, clip_ratio, kl, entropy, loss, weight.


def rollout(policy, samples, c, end_ids, step, device, dtype):
    """A micro-batch of samples -> Group of those that are readable, with their completions.

    If none is, a blank prompt with nothing under its mask keeps this rank in step with the rest."""
    samples = [s for s in samples if "error" not in s]
    prompts = Prompts.collate(samples or [BLANK], device, dtype)
    seeds = [random.Random(repr((c.seed, step, s["sample_id"]))).getrandbits(63) for s in samples]

    completions, sampled_logp = generate(
        policy,
        prompts,
        c.num_generations,
        c.max_completion_length,
        end_ids,
        seeds or [0],
        c.temperature,
    )
    said = completion_mask(completions, end_ids) & bool(samples)
    mask = said
    if c.mask_truncated_completions:
        ends = torch.tensor(end_ids, device=device)
        mask = said & torch.isin(completions, ends).any(-1, keepdim=True)
    return Group(prompts, completions, said, mask, samples, sampled_logp)


def judge(group, c, tokenizer, end_ids, step):
    """Reads and rewards a group's completions: adds its advantages, and its rows of rollouts.jsonl.

    The reference has scored them before, as the consistency bonus needs."""
    rewards = 0.0 * group.said.any(-1)  # [B, G]; a blank prompt's stay 0
    p_answer = rewards.clone()
    right = rewards > 0
    group.rows = []

    for b, sample in enumerate(group.samples):
        completions = []
        for g, keep in enumerate(group.said[b]):
            x = read(group.completions[b, g, keep].tolist(), sample, c, tokenizer, end_ids)
            completions.append(x)
            rewards[b, g] = x["reward"]
            right[b, g] = x["answer"] == sample["gold"]
            if c.consistency_weight:
                p = group.ref_logp[b, g, answer_tokens(x["ids"], x["text"], tokenizer)].exp()
                p_answer[b, g] = p.mean().nan_to_num()  # 0 without an answer

        group.rows.append(
            dict(
                step=step + 1,
                sample_id=sample["sample_id"],
                prompt=sample["text"],
                prompt_ids_len=len(sample["ids"]),
                gold=sample["gold"],
                completions=completions,
            )
        )

    if c.consistency_weight:
        group.p_answer_ref = p_answer
        group.bonus = consistency_bonus(
            p_answer, right, c.consistency_weight, c.consistency_cap, c.consistency_margin
        )
        rewards += group.bonus
    group.advantages = group_advantages(rewards, c.scale_rewards)


def read(ids, sample, c, tokenizer, end_ids):
    """A completion's ids, through its end -> what rollouts.jsonl says of it."""
    text = tokenizer.decode(ids, skip_special_tokens=True)
    reward, answer = reward_of(text, sample["gold"], c.format_reward_weight, sample["choices"])
    return dict(
        ids=ids,
        length=len(ids),
        truncated=ids[-1] not in end_ids,
        text=text,
        reward=reward,
        answer=answer,
    )


def answer_tokens(ids, text, tokenizer):
    """A completion's ids and text -> the places of the tokens with a character of its answer: what
    stands behind the thinking between <answer> and </answer>, or the end where it is cut off."""
    answer = re.search(r"(?s)<answer>(?!.*</think>)(.*?)(</answer>|\Z)|\Z", text)
    ends = [len(tokenizer.decode(ids[: t + 1], skip_special_tokens=True)) for t in range(len(ids))]
    # A character is of the first token that ends behind it. No answer has none: (-1, -1).
    return np.unique(np.searchsorted(ends, range(*answer.span(1)), side="right"))


def rollout_model(model, dtype):
    """The policy to roll out: itself, or where FSDP2 shards it a plain copy of the gathered
    weights, made once a step."""
    if not isinstance(model.model.norm.weight, DTensor):
        return model

    with torch.device("meta"):
        plain = Qwen2VL(model.config)
    weights = {name: gathered(p, dtype) for name, p in model.state_dict().items()}
    plain.load_state_dict(weights, assign=True)
    return plain


def update(model, optimizer, groups, c, totals, learning_rate):
    """num_iterations optimizer steps on the groups -> the last one's loss and gradient norm."""
    for _ in range(c.num_iterations):
        loss = 0.0
        for group in groups:
            # Without a KL, and without an advantage on any rank, there is no gradient to compute.
            learns = c.beta > 0 or global_sums(signal=group.advantages.any())["signal"] > 0
            with torch.set_grad_enabled(learns):
                part = group_loss(model, group, c, totals)
            if learns:
                # FSDP2 averages over the ranks, which the denominators count already.
                (part * WORLD).backward()
            loss += float(part.detach())

        loss = global_sums(loss=loss)["loss"]
        grad_norm = optimizer_step(model, optimizer, learning_rate, c.max_grad_norm, loss)
    return loss, grad_norm


def group_loss(model, group, c, totals):
    """A micro-batch's share of the step's loss, a scalar. What the logs want stays in the group."""
    logp, group.entropy = model(
        group.prompts, group.completions, c.temperature, statistic=entropy_of
    )
    group.logp = logp.detach()
    if group.old_logp is None:  # the first pass is π_old: its ratio is exactly 1
        group.old_logp = group.logp
    group.ratio = torch.exp(group.logp - group.old_logp)

    per_token, group.clip_ratio = policy_loss(
        logp, group.old_logp, group.advantages, c.epsilon, c.epsilon_high or c.epsilon
    )
    group.loss = per_token.detach()

    kl = torch.zeros_like(logp)
    if c.beta > 0:
        kl = k3_kl(logp, group.ref_logp, c.kl_clamp)
    group.kl = kl.detach()

    group.weight = token_weights(
        group.mask, c.loss_type, totals["sequences"], totals["tokens"], c.max_completion_length
    )
    return (group.weight * (per_token + c.beta * kl)).sum()


# What the logs have of a completion's tokens as a mean.
TOKEN_MEANS = ("kl", "entropy", "clip_ratio", "logprob_gap_mean")


def finished_rows(group):
    """The group's rows of rollouts.jsonl with what the update computed, per completion: means over
    its tokens, and each token's log-ratio to the reference."""
    group.logprob_gap_mean = (group.old_logp - group.sampled_logp).abs() * group.said
    values = dict(
        logprob_gap_max=group.logprob_gap_mean.amax(-1),
        advantage=group.advantages,
        bonus=group.bonus,
        p_answer_ref=group.p_answer_ref,
        logprob_sum=(group.old_logp * group.said).sum(-1),
    )
    for key in TOKEN_MEANS:
        values[key] = (getattr(group, key) * group.said).sum(-1) / group.said.sum(-1)

    for b, row in enumerate(group.rows):
        for g, x in enumerate(row["completions"]):
            x |= {key: z[b, g].item() for key, z in values.items() if z is not None}
            if group.ref_logp is not None:
                log_ratio = (group.old_logp - group.ref_logp)[b, g, : x["length"]]
                x["log_ratio"] = [round(z, 4) for z in log_ratio.tolist()]
    return group.rows


def audit_rows(group):
    """The group's rows of audit.jsonl, one a completion: lists over its C tokens, those behind its
    end too, where mask is false."""
    keys = "p_answer_ref bonus mask logp old_logp ref_logp ratio clip_ratio kl loss weight".split()

    for b, row in enumerate(group.rows):
        for g, x in enumerate(row["completions"]):
            audit = dict(
                step=row["step"],
                sample_id=row["sample_id"],
                completion=g,
                advantage=x["advantage"],
                ids=group.completions[b, g].tolist(),
            )
            for key in keys:
                if getattr(group, key) is not None:
                    audit[key] = getattr(group, key)[b, g].tolist()
            yield audit


def gather_rows(lists):
    """Every rank's lists of rows -> all rows, in rank order."""
    parts = [None] * WORLD
    dist.all_gather_object(parts, list(chain(*lists)))
    return list(chain(*parts))


def rollout_metrics(rows):
    """A step's rows, of all ranks -> their means over prompts, completions or completion tokens,
    for metrics.jsonl."""
    xs = list(chain(*(row["completions"] for row in rows)))

    def column(key):
        return [x[key] for x in xs]

    stds = [np.std([x["reward"] for x in row["completions"]], ddof=1) for row in rows]
    lengths = np.array(column("length"), int)
    columns = dict(
        reward=column("reward"),
        reward_std=stds,
        frac_reward_zero_std=np.equal(stds, 0),
        advantage_abs_mean=np.abs(column("advantage")),
        completion_length=lengths,
        frac_truncated=column("truncated"),
        frac_no_answer=[x["answer"] is None for x in xs],
        logprob_gap_max=max(column("logprob_gap_max"), default=0),
    )
    for key in TOKEN_MEANS:
        columns[key] = np.repeat(column(key), lengths)  # of each token, its completion's mean
    for key in ("bonus", "p_answer_ref"):
        if key in chain(*xs):
            columns[key] = column(key)

    # Without a readable sample on any rank there is no mean.
    means = {key: float(np.mean(values)) if rows else math.nan for key, values in columns.items()}
    return means | dict(tokens=int(lengths.sum()) + sum(row["prompt_ids_len"] for row in rows))


# ------------------------------------------------------------------------------------------------
# The run
# ------------------------------------------------------------------------------------------------


def main():
    c = parse_config(Config, TOY)
    device, dtype = set_up(c.toy)

    # The records, the policy and its frozen start, the reference.
    root = Path(c.data_root)
    output_dir = Path(c.output_dir)
    records = load_records(Path(c.annotations or root / "annotations/training_6k.jsonl"), root)
    records, missing = with_media(records, c.skip_missing)
    source = find_model(c.model)
    tokenizer = load_tokenizer(source)
    end_ids = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    model = load_sharded(c, source, device, dtype)
    reference = None
    if c.beta or c.consistency_weight:
        reference = load_sharded(c, source, device, dtype, weights_dtype=dtype)
        reference.requires_grad_(False)
    dataset = VideoDataset(records, tokenizer, model.config, c)
    dataset.check_lengths(c.max_prompt_length)

    # The length of the run, and where it begins.
    B = c.per_device_train_batch_size
    per_step = B * c.gradient_accumulation_steps * WORLD
    total = c.max_steps * per_step if c.max_steps > 0 else len(records) * c.num_train_epochs
    steps = math.ceil(total / per_step)
    optimizer = make_optimizer(c, model)
    start = open_run(c, model, optimizer, source, records, missing, per_step, steps)
    batches = rank_batches(total, range(start, steps), B, c.gradient_accumulation_steps)
    loader = load_batches(dataset, batches, c.dataloader_num_workers)
    faults = collections.Counter()
    caught = catch_signals()
    # Without a terminal, None, there is no bar.
    for step in tqdm(range(start, steps), "GRPO", initial=start, total=steps, disable=RANK or None):
        # Records: prompts were decoded ahead. What cannot be read is reported and left out.
        done = step + 1
        epoch = min(total, done * per_step) / len(records)
        log = dict(step=done, epoch=epoch, clock=time.perf_counter())
        micro_batches = [next(loader) for _ in range(c.gradient_accumulation_steps)]
        failed = [s for s in chain(*micro_batches) if "error" in s]
        lap(log, "time_data")

        # Rollout: G completions of each prompt at temperature T.
        sampler = rollout_model(model, dtype)
        groups = [
            rollout(sampler, samples, c, end_ids, step, device, dtype) for samples in micro_batches
        ]
        del sampler  # under FSDP2 a copy of all weights
        lap(log, "time_rollout")

        # Reference, reward, advantage: log π_ref of the completions, then what they earn.
        for group in groups:
            if reference:
                with torch.no_grad():
                    group.ref_logp = reference(group.prompts, group.completions, c.temperature)
            judge(group, c, tokenizer, end_ids, step)
        lap(log, "time_ref")

        # Update: ratio, clip, KL, loss, backward, optimizer step. Its denominators are global.
        totals = global_sums(
            sequences=sum(group.mask.any(-1).sum() for group in groups),
            tokens=sum(group.mask.sum() for group in groups),
            bad=len(failed),
            stop=len(caught),
        )
        log["learning_rate"] = learning_rate_at(c, step, steps)
        log["loss"], log["grad_norm"] = update(
            model, optimizer, groups, c, totals, log["learning_rate"]
        )
        lap(log, "time_update")

        # Log, and stop where going on makes no sense.
        rows = gather_rows(map(finished_rows, groups))
        append_rows(output_dir / "rollouts.jsonl", rows)
        if step < c.audit:
            append_rows(output_dir / "audit.jsonl", gather_rows(map(audit_rows, groups)))
        log |= rollout_metrics(rows) | dict(bad_samples=int(totals["bad"]))
        log_step(c, log, steps, ("reward", "kl", "completion_length"))
        count_faults(c, total, faults, log, failed)
        if done % c.save_steps == 0 or done == steps or totals["stop"]:
            save_checkpoint(c, done, model, optimizer)
        if totals["stop"]:
            leave(done, caught)

    save_model(model, output_dir)
    if RANK == 0:
        # A step without a readable sample has no reward.
        log = [json.loads(line) for line in open(output_dir / "metrics.jsonl")]
        rewards = np.array([row["reward"] for row in log], float)
        print(
            f"mean reward of the first 10 steps {np.nanmean(rewards[:10]):.3f}, "
            f"of the last 10 {np.nanmean(rewards[-10:]):.3f}\n"
            f"{output_dir}/ holds the trained model, config.json, metrics.jsonl, rollouts.jsonl"
        )
    dist.destroy_process_group()


# === shared: answer — identical in grpo_video.py, eval_video.py ===
def extract_answer(text, choices=()):
    """The one letter that a response gives inside <answer> tags, or behind the thinking; or None.

    Two different letters are none, and neither is the A of `A knife` (trap 11). `choices` are the
    question's: their letters count; none given means four of unknown text."""
    tagged = re.findall(r"<answer>(.*?)(?=</answer>|<answer>|\Z)", text, re.S)
    forms = answer_forms(choices, bool(tagged))
    letters = {given_letter(part, forms) for part in tagged or [text]}
    return letters.pop() if len(letters) == 1 else None


def given_letter(text, forms):
    """One part of a response -> the letter that the first of the forms in it has, or None."""
    text = text.rpartition("</think>")[2]
    if "<think>" in text:
        return None  # cut off while thinking

    text = plain(text)
    for form in forms:
        found = " ".join(re.findall(form, text, re.X))
        letters = {*re.findall(r"\b[A-E]\b", found.upper())}
        if letters:
            return letters.pop() if len(letters) == 1 else None
    return None


def plain(text):
    r"""Less mark-up, and with plain signs for full-width ones: **B**, \boxed{\text{B}}, Ｂ．"""
    text = unicodedata.normalize("NFKC", text)
    return re.sub(r"\\[a-z]+|[{}$*`]", " ", text).strip()


def answer_forms(choices, tagged):
    """-> verbose regular expressions of the forms of an answer, a clear one before a weaker one."""
    one = f"[{'ABCDE'[: len(choices) or 4]}]"
    more = rf"(?: [^\w,、/&]* (?: \bor\b | \band\b | [,、/&] ) )++ \W* {one}\b"  # `or C`, `, C`
    own = r"\W+".join(re.findall(r"\w+", plain("".join(choices[:1]))))  # the words of choice A
    # Behind `B `, in tags anything; without, one phrase: a second sentence may say no to B.
    rest = "" if tagged else r"(?= [^,.;:!?\n]++ \W*\Z )"

    return (
        # Alone: `B`, `b`, `(B)`; or several, `A or B`
        rf"\A\W* (?: (?i: {one} ) | {one} (?: (?: \W | \bor\b | \band\b )+ {one} )+ ) \W*\Z",
        # Announced: `answer is B`, `Option B`; or marked: `B. text`, `B.text`, `B) text`, `B: text`
        rf"""
          (?i: (?<= answer | option | choice ) (?: [ ]is | : )* ) \W* {one}\b (?: {more} )*
          (?! ' | \s+ (?! or\b | and\b ) [a-z] )
        | (?: \A\W* | [\s(\[] ) {one} (?: [):\]] | \. (?= \s+\S | \w\w | \w\s ) )
        """,
        # In front: `B - text`, `B` on its own line, `B, text`, `B text`; of A, which may be an
        # article, `A text` with choice A's own. No other letter opens a line or stands behind `or`.
        rf"""
        \A (?! [\S\s]* (?: \n [^\w\n]* | \bor\s ) (?! A\s\w ) {one}\b ) \W* (?:
          {one} (?! {more} ) (?: \s*[-–—]\s | \s*\n | 、 | , {rest} )
        | (?! A ) {one} (?! {more} | \s+ (?: or | and )\b ) \s {rest}
        | A \s++ (?= (?i: {own} ) \W*\Z ) )
        """,
    )


# === end shared: answer ===


# === shared: sampling — identical in grpo_video.py, eval_video.py ===
@torch.no_grad()
def generate(model, prompts, G, C, end_ids, seeds, temperature=1.0):
    """-> G completions of each prompt, ids [B, G, c], c <= C, filled up with end_ids[0]; log-probs
    [B, G, c] of the tokens as they were drawn (greedy: at temperature 1).

    A row's random numbers come from its prompt's seed (an int) and its place in the group.
    generation_config.json is never read (trap 1), and the cache is always on (trap 17)."""
    B = len(prompts.ids)
    device = prompts.ids.device
    ends = torch.tensor(end_ids, device=device)
    uniform = [
        torch.rand(G, C, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        for seed in seeds
    ]
    uniform = torch.cat(uniform).to(device)  # [B*G, C]

    # The prompts, once: their keys and values fill the cache.
    cache = KVCache(prompts, G, C)
    model.decoder(model.embed(prompts), prompts.positions.flatten(1), cache)

    # The state of decoding, [B*G] or [B*G, C]. The prompts' last tokens open the completions.
    token = prompts.last.repeat_interleave(G)
    position = prompts.last_position.repeat_interleave(G)
    ended = torch.zeros_like(token, dtype=torch.bool)
    out = torch.full((B * G, C), end_ids[0], device=device)
    logp = torch.zeros(B * G, C, device=device)

    def step():
        """A token of each row. All that it changes keeps its place in memory, as a graph needs."""
        cache.mask.index_fill_(4, cache.column.add_(1) + cache.P, 0)
        positions = (position + cache.column).expand(3, -1)
        x = model.decoder(model.model.embed_tokens(token), positions, cache)
        drawn = uniform.index_select(1, cache.column)[:, 0]
        log_probs = model.logits(x).div_(temperature or 1).log_softmax(-1)
        token.copy_(pick(log_probs, drawn, temperature == 0))
        logp.index_copy_(1, cache.column, log_probs.gather(1, token[:, None]))
        shown = torch.where(ended, ends[0], token)
        out.index_copy_(1, cache.column, shown[:, None])
        ended.logical_or_(torch.isin(token, ends))

    run = step
    for _ in range(C):
        run()
        if ended.all():  # the host waits for the device here and nowhere else
            break
        if token.is_cuda and run is step:
            # All kernels are loaded now: from here on a token is one recorded graph of them.
            # Other threads may go on meanwhile, NCCL's for one.
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                step()
            run = graph.replay
    return [z[:, : int(cache.column) + 1].view(B, G, -1) for z in (out, logp)]


class KVCache:
    """Attention while decoding: each prompt's keys and values, once for its group, and room for C
    tokens of each completion.

    Keys are fp32: scores rounded to bf16 would not be those of the update."""

    def __init__(self, prompts, G, C):
        self.B, self.P = prompts.ids.shape
        self.G = G
        self.C = C
        self.prefill = packed_attention(prompts, G, 0)
        self.kept = {}  # layer -> keys and values, prompts' [B, K, P, E], own [B, G, K, C, E]
        self.column = prompts.lengths.new_full((1,), -1)  # of the token in hand

        # What is added to the scores: 0 where a row may look, else -inf. A step opens a column.
        columns = torch.arange(self.P + C, device=prompts.ids.device)
        mask = torch.where(columns < prompts.lengths[:, None] - 1, 0.0, -math.inf)
        self.mask = mask[:, None, None, None].repeat(1, G, 1, 1, 1)  # [B, G, 1, 1, P+C]

    def __call__(self, layer, q, k, v):
        """First the prompts' rows [B*P, heads, E], which fill the cache; then a token of each
        completion, [B*G, heads, E]."""
        if layer not in self.kept:
            room = (self.B, self.G, k.shape[1], self.C, k.shape[2])
            both = [
                z.unflatten(0, (self.B, self.P)).transpose(1, 2).contiguous()
                for z in (k.float(), v)
            ]
            self.kept[layer] = both + [z.new_zeros(room) for z in both]
            return self.prefill(layer, q, k, v)

        prompt_k, prompt_v, own_k, own_v = self.kept[layer]
        q, k, v = (z.unflatten(0, (self.B, self.G)) for z in (q.float(), k.float(), v))
        own_k.index_copy_(3, self.column, k[:, :, :, None])
        own_v.index_copy_(3, self.column, v[:, :, :, None])

        # R = H / K query heads share a key head; a group shares its prompt.
        q = q.unflatten(2, (k.shape[2], -1)) * q.shape[-1] ** -0.5  # [B, G, K, R, E]
        on_prompt = torch.einsum("bgkre,bkpe->bgkrp", q, prompt_k)
        on_own = torch.einsum("bgkre,bgkce->bgkrc", q, own_k)
        weights = (torch.cat((on_prompt, on_own), dim=-1) + self.mask).softmax(-1).to(v.dtype)

        on_prompt, on_own = weights.split((self.P, self.C), dim=-1)
        out = torch.einsum("bgkrp,bkpe->bgkre", on_prompt, prompt_v)
        out = out + torch.einsum("bgkrc,bgkce->bgkre", on_own, own_v)
        return out.flatten(2, 3).flatten(0, 1)  # [B*G, H, E]


def pick(log_probs, uniform, greedy):
    """log_probs [N, V] fp32, uniform [N] float64 in [0, 1) -> ids [N].

    Unless greedy the cumulative distribution is inverted at `uniform`, so that a row's tokens come
    from its own numbers, whatever shares its batch."""
    if greedy:
        return log_probs.argmax(-1)

    cumulative = log_probs.exp().cumsum(-1, dtype=torch.float64)
    place = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)
    return place[:, 0].clamp(max=log_probs.shape[1] - 1)


def completion_mask(ids, end_ids):
    """ids [..., C] -> bool, True through the first end token, inclusive; all True where none came
    (traps 3 and 4)."""
    ends = torch.isin(ids, torch.tensor(end_ids, device=ids.device)).long()
    return ends.cumsum(-1) - ends == 0


# === end shared: sampling ===


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
