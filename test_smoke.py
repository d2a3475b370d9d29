"""The proof of the scripts: numbers worked by hand, and transformers as the oracle of a tiny model.

    pytest test_smoke.py                          # under a minute on two CPU cores
    python test_smoke.py --sync grpo_video.py     # copy that script's shared blocks into the others

In this order: the algorithm's functions against numbers worked by hand; the forward and its
gradients against transformers; decoding; an update; SFT's supervised tokens; a short run of both
scripts on the toy. Then what these proofs stand on: the tiny model, its prompts, and transformers
run the plain way. Last, the scripts as text: their shared blocks, and whether they can be read.
"""

import ast
import copy
import hashlib
import io
import json
import math
import os
import re
import subprocess
import sys
import tokenize
from itertools import pairwise, zip_longest
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, Qwen2VLConfig, Qwen2VLForConditionalGeneration

from grpo_video import (
    Group,
    Prompts,
    VideoDataset,
    completion_mask,
    consistency_bonus,
    generate,
    global_sums,
    group_advantages,
    k3_kl,
    load_batches,
    load_model,
    load_records,
    mrope_positions,
    policy_loss,
    token_weights,
    update,
)
from sft_video import Config, parse_chat, supervise
from toy import make_toy

ROOT = Path(__file__).resolve().parent
CPU = torch.device("cpu")
torch.set_num_threads(1)  # matrices this small lose more to a second thread than they gain

# Token ids of the tiny model; words are below WORDS.
IMAGE, VIDEO, END, OTHER_END, WORDS = 398, 397, 396, 395, 390


# ---- The algorithm: numbers worked by hand -------------------------------------------------------
def test_completion_mask():
    """True through the first end token of either kind, inclusive; all True where none came."""
    rows = [
        [5, 6, END, END, END],
        [5, OTHER_END, 7, END, 8],
        [1, 2, 3, 4, 5],
        [END, 1, 2, 3, 4],
    ]
    golden = [
        [1, 1, 1, 0, 0],  # through END, the third token
        [1, 1, 0, 0, 0],  # through the other end token
        [1, 1, 1, 1, 1],  # none came
        [1, 0, 0, 0, 0],  # it came first
    ]

    mask = completion_mask(torch.tensor([rows]), [END, OTHER_END])  # [1, 4, 5]
    assert mask.int().tolist() == [golden]


def test_group_advantages():
    """(r - mean) / (std + 1e-4) in each group, with the unbiased std; equal rewards get zeros."""
    rewards = torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 1]])

    # The first group: mean 1/4; squares (9 + 1 + 1 + 1)/16 = 3/4, over G - 1 = 3 is 1/4; std 1/2.
    # So 0.75 / 0.5001 = 1.499700 and -0.25 / 0.5001 = -0.499900.
    golden = torch.tensor([[1.499700, -0.499900, -0.499900, -0.499900], [0, 0, 0, 0]])
    torch.testing.assert_close(group_advantages(rewards, True), golden, atol=1e-6, rtol=0)

    # Without the division by the std: 1 - 1/4 and 0 - 1/4.
    assert group_advantages(rewards, False).tolist() == [[0.75, -0.25, -0.25, -0.25], [0, 0, 0, 0]]


def test_consistency_bonus():
    """λ for the right ones whose clipped p reaches the mean of their group's right ones.

    Or misses it by the margin at most. A wrong one gets nothing, and is in no mean.
    """
    p_answer = torch.tensor([[0.9, 0.5, 0.8, 0.99], [0.96, 0.98, 0.2, 0.1], [0.9, 0.9, 0.9, 0.9]])
    right = torch.tensor([[1, 1, 0, 1], [1, 1, 0, 0], [0, 0, 0, 0]]).bool()

    # 0.9, 0.5 and, clipped, 0.95 have the mean 0.783333; the second group's are a tie at the cap.
    golden = [[0.5, 0, 0, 0.5], [0.5, 0.5, 0, 0], [0, 0, 0, 0]]
    assert consistency_bonus(p_answer, right, 0.5, cap=0.95, margin=0.0).tolist() == golden

    # 0.5 reaches 0.783333 - 0.3.
    golden = [[0.5, 0.5, 0, 0.5], [0.5, 0.5, 0, 0], [0, 0, 0, 0]]
    assert consistency_bonus(p_answer, right, 0.5, cap=0.95, margin=0.3).tolist() == golden

    # Unclipped, the means are 0.796667 and 0.97.
    golden = [[2, 0, 0, 2], [0, 2, 0, 0], [0, 0, 0, 0]]
    assert consistency_bonus(p_answer, right, 2.0, cap=1.0, margin=0.0).tolist() == golden

    # Seven ties at the cap: their mean, in fp32, may lie above them.
    ties = consistency_bonus(torch.full((1, 7), 0.99), torch.ones(1, 7).bool(), 1.0, 0.95, 0.0)
    assert ties.tolist() == [[1.0] * 7]


def test_k3_kl():
    """e^d - d - 1 with d = log π_ref - log π_θ; its gradient in log π_θ is 1 - e^d."""
    d = torch.tensor([0, math.log(2), -math.log(2), 12], dtype=torch.float64)
    logp = torch.full((4,), -1.0, dtype=torch.float64, requires_grad=True)
    ref_logp = -1 + d

    # d = 0:       1   - 0        - 1  =  0
    # d = ln 2:    2   - 0.693147 - 1  =  0.306853
    # d = -ln 2:   0.5 + 0.693147 - 1  =  0.193147
    # d = 12:            e^12 - 13     =  162741.791419
    golden = [0, 0.306853, 0.193147, 162741.791419]
    assert k3_kl(logp, ref_logp).tolist() == pytest.approx(golden, abs=1e-6)

    # With d clamped to 11 (trap 9) the last is e^11 - 12 = 59862.141715.
    kl = k3_kl(logp, ref_logp, clamp=11.0)
    assert kl.tolist() == pytest.approx([0, 0.306853, 0.193147, 59862.141715], abs=1e-6)

    # 1 - e^d is 1 - 1, 1 - 2 and 1 - 0.5; what was clamped has no gradient.
    kl.sum().backward()
    assert logp.grad.tolist() == pytest.approx([0, -1, 0.5, 0], abs=1e-12)


def test_policy_loss():
    """-min(ρ Â, clip(ρ, 1 - ε, 1 + ε_high) Â).

    The clip ends the gradient only where going on would pay.
    """
    ratio = torch.tensor([0.5, 0.9, 1.0, 1.5])
    logp = torch.stack((ratio, ratio, ratio)).log()[None].requires_grad_()  # [1, 3, 4]
    old_logp = torch.zeros(1, 3, 4)
    advantages = torch.tensor([[2.0, -1.0, 0.0]])  # [1, 3]
    loss, clipped = policy_loss(logp, old_logp, advantages, epsilon=0.2, epsilon_high=0.28)

    # ρ                        0.5    0.9    1      1.5
    # clipped ρ                0.8    0.9    1      1.28
    #
    # Â = 2:    ρ Â            1      1.8    2      3
    #           clipped ρ Â    1.6    1.8    2      2.56
    #           their min      1      1.8    2      2.56
    #
    # Â = -1:   ρ Â           -0.5   -0.9   -1     -1.5
    #           clipped ρ Â   -0.8   -0.9   -1     -1.28
    #           their min     -0.8   -0.9   -1     -1.5
    # fmt: off
    golden_loss = [
        [-1.0, -1.8, -2.0, -2.56],  # Â = 2
        [ 0.8,  0.9,  1.0,  1.5 ],  # Â = -1
        [ 0.0,  0.0,  0.0,  0.0 ],  # Â = 0
    ]
    torch.testing.assert_close(loss[0], torch.tensor(golden_loss))

    # Clipped is where the clipped product is the smaller one.
    golden_clipped = [
        [0, 0, 0, 1],
        [1, 0, 0, 0],
        [0, 0, 0, 0],
    ]
    assert clipped[0].int().tolist() == golden_clipped

    # d loss / d log π = -ρ Â where it is not clipped.
    golden_gradient = [
        [-1.0, -1.8, -2.0,  0.0],
        [ 0.0,  0.9,  1.0,  1.5],
        [ 0.0,  0.0,  0.0,  0.0],
    ]
    loss.sum().backward()
    torch.testing.assert_close(logp.grad[0], torch.tensor(golden_gradient))
    # fmt: on


@pytest.mark.parametrize(
    "loss_type, golden",
    [
        # each of 2 sequences has 1/2, over its 2 or 4 tokens
        ("grpo", [[1 / 4, 1 / 4, 0, 0], [1 / 8, 1 / 8, 1 / 8, 1 / 8]]),
        # 1 over all 2 + 4 tokens
        ("dapo", [[1 / 6, 1 / 6, 0, 0], [1 / 6, 1 / 6, 1 / 6, 1 / 6]]),
        # 1 over 2 sequences x max length 8
        ("dr_grpo", [[1 / 16, 1 / 16, 0, 0], [1 / 16, 1 / 16, 1 / 16, 1 / 16]]),
    ],
)
def test_token_weights(loss_type, golden):
    """What each loss averages over, for a step of two completions of 2 and 4 tokens."""
    mask = torch.tensor([[[1, 1, 0, 0], [1, 1, 1, 1]]]).bool()
    weights = token_weights(mask, loss_type, sequences=2, tokens=6, max_completion_length=8)
    torch.testing.assert_close(weights[0], torch.tensor(golden))


# ---- The model: transformers' logits and gradients -----------------------------------------------
CLIP = ("video", (2, 4, 6))
STILL = ("image", (1, 6, 4))
PROMPTS = {  # in make_sample's terms
    "text": [[7]],
    "image": [[3, STILL, 5]],
    "video and image": [[3, CLIP, 2, STILL, 5]],
    "two videos": [[2, CLIP, 1, ("video", (1, 4, 4)), 4]],
    "two prompts, one longer": [[3, CLIP, 2, STILL, 5], [4, STILL, 1]],
}


@pytest.mark.parametrize("prompts", PROMPTS.values(), ids=PROMPTS)
def test_logits_are_transformers(tiny, prompts):
    """One packed forward = one row of transformers for every completion.

    Packed is the prompt once, its completions beside it.
    """
    _, hf, model = tiny
    samples = make_samples(model.config, prompts)
    completions = random_completions(len(samples), 3, 5)

    with torch.no_grad():
        theirs = transformers_logits(hf, samples, completions)
        states = model.completion_states(collate(*samples), completions)
        ours = model.logits(states).view_as(theirs)
    assert theirs.std() > 0.5  # of order 1, else equality says little
    assert (ours - theirs).abs().max() <= 1e-5

    with torch.no_grad():
        logp = model(collate(*samples), completions, temperature=0.7)
        their_logp = transformers_logp(hf, samples, completions, 0.7)
    assert (logp - their_logp).abs().max() <= 1e-5


def test_gradients_are_transformers(tiny):
    """Computing the prompt once for its group changes no parameter's gradient: G paths add up."""
    _, hf, model = tiny
    samples = make_samples(model.config, PROMPTS["two prompts, one longer"])
    completions = random_completions(2, 3, 5)

    # The whole loss of a step: 6 completions, of 5 tokens at most and 20 in all.
    lengths = torch.tensor([[5, 2, 3], [1, 5, 4]])
    mask = torch.arange(5) < lengths[..., None]
    weights = token_weights(mask, "grpo", 6, 20, 5)
    rewards = torch.tensor([[1.0, 0, 0], [0, 1, 1]])
    advantages = group_advantages(rewards, True)
    noise = 0.3 * torch.randn(2, 2, 3, 5, generator=torch.Generator().manual_seed(1))

    hf.zero_grad()
    model.zero_grad()
    theirs = transformers_logp(hf, samples, completions)
    ours = model(collate(*samples), completions)
    for logp in (theirs, ours):
        old_logp, ref_logp = logp.detach() + noise  # π_old and π_ref, a little off π_θ
        per_token, _ = policy_loss(logp, old_logp, advantages, 0.2, 0.2)
        kl = k3_kl(logp, ref_logp)
        (weights * (per_token + 0.1 * kl)).sum().backward()

    expected = transformers_gradients(hf)
    assert {name for name, _ in model.named_parameters()} == set(expected)
    for name, p in model.named_parameters():
        size = expected[name].norm()
        assert size > 0, name
        assert (p.grad - expected[name]).norm() <= 1e-4 * size, name


# ---- Decoding ------------------------------------------------------------------------------------
def test_greedy_decoding(tiny):
    """The static cache = everything computed anew for each token = transformers' generate."""
    _, hf, model = tiny
    samples = make_samples(model.config, PROMPTS["two prompts, one longer"])
    ends = [END, OTHER_END]
    ours, logp = generate(model, collate(*samples), 2, 12, ends, [0, 0], temperature=0)
    assert ours.shape == (2, 2, 12)
    assert (ours[:, 0] == ours[:, 1]).all()  # greedy: a group's completions are the same
    assert len(ours[:, 0].unique()) > 8  # many different words, else equality says little
    with torch.no_grad():
        torch.testing.assert_close(logp, model(collate(*samples), ours), atol=1e-5, rtol=0)

    anew = torch.zeros(2, 1, 0, dtype=torch.long)
    placeholder = torch.zeros(2, 1, 1, dtype=torch.long)  # stands where the next token comes
    for _ in range(12):
        with torch.no_grad():
            states = model.completion_states(collate(*samples), torch.cat((anew, placeholder), 2))
            logits = model.logits(states.view(2, -1, 64)[:, -1])
        token = logits.argmax(-1).view(2, 1, 1)
        anew = torch.cat((anew, token), 2)
    assert ours[:, :1].tolist() == anew.tolist()

    nothing = torch.zeros(1, 1, 0, dtype=torch.long)
    for sample, row in zip(samples, ours[:, 0].tolist()):
        hf.model.rope_deltas = None  # transformers would keep the last call's
        inputs = transformers_inputs(hf.config, [sample], nothing)
        theirs = hf.generate(**inputs, max_new_tokens=12, do_sample=False)
        assert row == theirs[0, len(sample["ids"]) :].tolist()


@pytest.mark.parametrize("which", [0, 1])
def test_decoding_stops_at_either_end_token(tiny, which):
    """A row ends behind the first of either end token and is filled up.

    Decoding ends when all rows have ended.
    """
    model = tiny[2]
    sample = make_sample(model.config, 5)
    prompts = collate(sample, make_sample(model.config, 5, seed=1))
    ends = [END, OTHER_END]
    first, second = generate(model, prompts, 1, 8, ends, [1, 2])[0][:, 0].tolist()

    # Now a word is an end token: one that the first row says, its third at the earliest, and the
    # second row never.
    ends[which] = next(token for token in first if first.index(token) >= 2 and token not in second)
    n = first.index(ends[which]) + 1
    stopped = generate(model, prompts, 1, 8, ends, [1, 2])[0][:, 0].tolist()
    assert stopped == [first[:n] + [ends[0]] * (8 - n), second]

    # Alone, the first row is not filled up: decoding ends with it.
    alone, _ = generate(model, collate(sample), 1, 8, ends, [1])
    assert alone.tolist() == [[first[:n]]]


# ---- An update -----------------------------------------------------------------------------------
def test_first_loss(tmp_path):
    """At the first update the ratio is 1, so the loss is -mean Â + β·KL.

    That is about 0, as group advantages are centred (trap 19). Here they are not.
    """
    model = make_tiny(tmp_path / "0", 0)[2]
    reference = make_tiny(tmp_path / "1", 1)[2]
    group = make_group(model, [1.5, -0.5, 0.25])

    with torch.no_grad():
        group.ref_logp = reference(group.prompts, group.completions)
        d = group.ref_logp - model(group.prompts, group.completions)
    kl = d.exp() - d - 1  # [1, 3, 4]
    first, second, third = kl[0]  # of 4, 2 and 3 tokens
    mean_kl = (first[:4].mean() + second[:2].mean() + third[:3].mean()) / 3
    assert mean_kl > 0.1

    loss, norm = run_update(model, [group], lr=0.0, beta=0.1)
    assert loss == pytest.approx(-(1.5 - 0.5 + 0.25) / 3 + 0.1 * float(mean_kl), abs=1e-6)
    assert norm > 0
    assert not group.clip_ratio.any()
    torch.testing.assert_close(group.kl, kl, atol=1e-5, rtol=1e-4)


def test_update_moves_probability_to_the_rewarded_completion(tmp_path):
    """One small step: the rewarded completion becomes likelier, the other two less likely.

    With rewards turned, the reverse.
    """
    for sign in (1, -1):
        model = make_tiny(tmp_path / str(sign))[2]
        group = make_group(model, [sign * 1.15, sign * -0.58, sign * -0.58])
        run_update(model, [group], lr=1e-2)

        with torch.no_grad():
            logp = model(group.prompts, group.completions)
        change = ((logp - group.old_logp) * group.mask).sum(-1)[0]
        assert (change * sign > 0).tolist() == [True, False, False], change


def make_group(model, advantages, ref_logp=None):
    """What judge leaves for update: a prompt with a video, completions of 4, 2 and 3 tokens."""
    sample = make_sample(model.config, 3, CLIP, 4)
    lengths = torch.tensor([4, 2, 3])
    mask = (torch.arange(4) < lengths[:, None])[None]  # [1, 3, 4]

    return Group(
        prompts=collate(sample),
        completions=random_completions(1, 3, 4),
        said=mask,
        mask=mask,
        samples=[],
        advantages=torch.tensor([advantages]),
        ref_logp=ref_logp,
    )


def run_update(model, groups, lr, optimizer=torch.optim.SGD, **changes):
    """grpo_video.update with the totals that main computes -> (loss, gradient norm)."""
    settings = dict(
        num_iterations=1,
        loss_type="grpo",
        max_completion_length=4,
        temperature=1.0,
        epsilon=0.2,
        epsilon_high=None,
        beta=0.0,
        kl_clamp=0.0,
        max_grad_norm=1e9,
    )
    c = SimpleNamespace(**settings | changes)

    totals = global_sums(
        sequences=sum(group.mask.any(-1).sum() for group in groups),
        tokens=sum(group.mask.sum() for group in groups),
    )
    return update(model, optimizer(model.parameters(), 1e3), groups, c, totals, lr)


# ---- SFT -----------------------------------------------------------------------------------------
def test_supervised_tokens(toy):
    """SFT's loss is on the response and its <|im_end|>: none of the prompt, none of the padding."""
    tokenizer = AutoTokenizer.from_pretrained(toy / "init")
    config = load_model(toy / "init", CPU, torch.float32).config
    annotations = toy / "data/annotations/training_with_cot_6k.jsonl"
    records = load_records(annotations, toy / "data", parse_chat)[:2]
    settings = Config(frame_size=56, max_frames=8)
    dataset = VideoDataset(records, tokenizer, config, settings, shuffle=False)
    [samples] = load_batches(dataset, [[0, 1]], 0)
    samples[1]["response"] = "<answer>B"

    prompts, responses, mask = supervise(samples, tokenizer, CPU, torch.float32)
    supervised = []
    for row, keep in zip(responses[:, 0], mask[:, 0]):
        supervised.append([tokenizer.decode(token) for token in row[keep]])
    thought = ["<think>", "it moves", " up"]
    answer = ["</think><answer>", "C", ". move", " up", "</answer>"]
    assert supervised == [[*thought, *answer, "<|im_end|>"], ["<answer>", "B", "<|im_end|>"]]

    # What stands before the response; a prompt's last token opens the completion, so it is apart.
    prompt = prompts.ids[0, : prompts.lengths[0] - 1].tolist() + [int(prompts.last[0])]
    assert tokenizer.decode(prompt).endswith("</answer>. <|im_end|>\n<|im_start|>assistant\n")


# ---- Both scripts on the toy ---------------------------------------------------------------------
COMMON = set(
    "step epoch loss grad_norm learning_rate tokens bad_samples "
    "time_data time_update peak_memory_gb".split()
)
OF_GRPO = set(
    "reward reward_std frac_reward_zero_std advantage_abs_mean kl entropy clip_ratio "
    "logprob_gap_mean logprob_gap_max completion_length frac_truncated frac_no_answer "
    "time_rollout time_ref".split()
)
OF_ROLLOUT = set("step sample_id prompt prompt_ids_len gold completions".split())
OF_COMPLETION = set("text ids reward answer advantage length kl logprob_sum".split())


@pytest.fixture(scope="module")
def runs(toy, tmp_path_factory):
    """SFT teaches the answer's format, GRPO goes on from there -> each one's folder and log."""
    sft = tmp_path_factory.mktemp("sft")
    sft_log = run_script(
        "sft_video.py",
        toy,
        sft,
        model=toy / "init",
        max_steps=40,
        learning_rate=5e-3,
        warmup_ratio=0.1,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=1,
        gradient_checkpointing=False,
    )

    grpo = tmp_path_factory.mktemp("grpo")
    grpo_log = run_script(
        "grpo_video.py",
        toy,
        grpo,
        model=sft,
        max_steps=3,
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=16,
        learning_rate=1e-3,
        save_steps=2,
    )
    return SimpleNamespace(sft=sft, sft_log=sft_log, grpo=grpo, grpo_log=grpo_log)


def test_sft_on_the_toy(runs):
    """The loss falls, the accuracy rises, and metrics.jsonl has the promised keys."""
    log = runs.sft_log
    assert log[-1]["loss"] < 0.8 < 5 < log[0]["loss"]
    assert log[-1]["token_accuracy"] > 0.7
    assert set(log[0]) == COMMON | {"token_accuracy"}


def test_grpo_on_the_toy(runs):
    """The first step is at the reference: no KL, nothing clipped. Then the policy moves."""
    log = runs.grpo_log
    assert set(log[0]) == COMMON | OF_GRPO
    assert [m["step"] for m in log] == [1, 2, 3]
    assert log[0]["kl"] == 0 == log[0]["clip_ratio"]
    assert log[2]["kl"] > 0
    assert 0 < log[0]["reward"] < 1
    assert log[0]["grad_norm"] > 0
    # The scored policy is the sampled one, to the rounding of fp32.
    assert all(0 < m["logprob_gap_mean"] < m["logprob_gap_max"] < 1e-4 for m in log)
    # Not greedy, whatever the folder's generation_config.json says (trap 1).
    assert log[0]["entropy"] > 0.1


def test_rollouts_on_the_toy(runs):
    """rollouts.jsonl has 3 steps of 4 prompts, with 4 completions each, as in the metrics."""
    rows = read_rows(runs.grpo / "rollouts.jsonl")
    assert len(rows) == 12
    assert set(rows[0]) == OF_ROLLOUT

    rewards = []
    for row in rows:
        group = row["completions"]
        assert len(group) == 4
        assert sum(x["advantage"] for x in group) == pytest.approx(0, abs=1e-5)
        for x in group:
            assert set(x) >= OF_COMPLETION
            assert x["reward"] == (x["answer"] == row["gold"])
            assert len(x["ids"]) == x["length"]
            assert x["logprob_sum"] < 0
            rewards.append(x["reward"])
    assert runs.grpo_log[0]["reward"] == pytest.approx(sum(rewards[:16]) / 16)


def test_the_run_on_the_toy_is_recorded(runs):
    """config.json has the script's hash, the settings and versions.

    Checkpoints come when they are due, and at the end.
    """
    settings = json.loads((runs.grpo / "config.json").read_text())["run"]
    script = (ROOT / "grpo_video.py").read_bytes()
    assert settings["script_sha256"] == hashlib.sha256(script).hexdigest()
    assert settings["beta"] == 0.1
    assert torch.__version__.startswith(settings["versions"]["torch"])
    assert {p.name for p in runs.grpo.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-3"}


def test_the_model_trained_on_the_toy(runs):
    """The saved model gives transformers the same log-probs, and training has changed them."""
    ours = load_model(runs.grpo, CPU, torch.float32)
    before = load_model(runs.sft, CPU, torch.float32)
    hf = Qwen2VLForConditionalGeneration.from_pretrained(runs.grpo)
    tokenizer = AutoTokenizer.from_pretrained(runs.grpo)
    sample = make_sample(ours.config, 3, CLIP, 2, STILL, 2)
    completions = torch.tensor([[tokenizer("it moves up").input_ids]])

    with torch.no_grad():
        new = ours(collate(sample), completions)
        old = before(collate(sample), completions)
        theirs = transformers_logp(hf, [sample], completions)
    assert (new - theirs).abs().max() <= 1e-5 < (new - old).abs().max()


def run_script(script, toy, output_dir, **flags):
    """Runs a script on the toy -> the rows of its metrics.jsonl."""
    defaults = dict(
        data_root=toy / "data",
        output_dir=output_dir,
        max_frames=8,
        frame_size=56,
        dataloader_num_workers=1,
    )
    arguments = [f"--{name}={value}" for name, value in (defaults | flags).items()]
    command = [sys.executable, str(ROOT / script), *arguments]
    environment = os.environ | dict(OMP_NUM_THREADS="1")
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]

    return read_rows(output_dir / "metrics.jsonl")


def read_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- What the proofs stand on: a tiny model, random prompts --------------------------------------
TINY = dict(
    vocab_size=400,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=96,
    rope_theta=1000.0,
    rope_scaling=dict(type="mrope", mrope_section=[2, 3, 3]),
    tie_word_embeddings=True,
    initializer_range=0.11,
    image_token_id=IMAGE,
    video_token_id=VIDEO,
    vision_start_token_id=394,
    vision_end_token_id=393,
    eos_token_id=END,
    pad_token_id=OTHER_END,
    bos_token_id=OTHER_END,
    max_position_embeddings=4096,
)
TINY_VISION = dict(
    depth=2,
    embed_dim=32,
    num_heads=4,
    mlp_ratio=4,
    hidden_size=64,
    initializer_range=0.1,
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny"))


def make_tiny(folder, seed=0, vision_config=None, **changes):
    """-> (folder, transformers' model, ours), with the same random fp32 weights, drawn by seed."""
    torch.manual_seed(seed)
    vision = TINY_VISION | dict(hidden_size=changes.get("hidden_size", 64)) | (vision_config or {})
    text = copy.deepcopy(TINY | changes)  # as the config writes into its arguments
    hf = Qwen2VLForConditionalGeneration(Qwen2VLConfig(**text, vision_config=vision)).eval()

    # Else all biases are 0 and all norms 1, and one that is forgotten would go unseen.
    for p in hf.parameters():
        if p.dim() == 1:
            p.data += 0.1 * torch.randn_like(p)

    hf.generation_config.eos_token_id = [END, OTHER_END]
    hf.generation_config.pad_token_id = OTHER_END
    hf.save_pretrained(folder)
    return folder, hf, load_model(folder, CPU, torch.float32)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return make_toy_folder(tmp_path_factory.mktemp("toy"))


def make_toy_folder(folder):
    """-> folder with the toy's data/ and its model before any training, init/."""
    texts = make_toy.make_data(folder / "data", 0)
    make_toy.make_untrained_model(folder / "init", make_toy.make_tokenizer(texts), 0)
    return folder


def make_sample(config, *parts, seed=0):
    """A sample as VideoDataset gives it.

    In `parts` a number stands for so many random words, ("video", (t, h, w)) or
    ("image", (1, h, w)) for random pixels; (t, h, w) counts patches, of which 2 x 2 share a
    placeholder token.
    """
    rng = torch.Generator().manual_seed(seed)
    ids, grids, kinds = [], [], []
    patches = [torch.empty(0, 1176).byte()]
    for part in parts:
        if isinstance(part, int):
            ids += torch.randint(0, WORDS, (part,), generator=rng).tolist()
        else:
            kind, grid = part
            size = math.prod(grid)
            placeholder = config.image_token_id if kind == "image" else config.video_token_id
            ids += [placeholder] * (size // 4)
            patches.append(torch.randint(0, 256, (size, 1176), generator=rng).byte())
            grids.append(grid)
            kinds.append(kind)

    return dict(
        sample_id=seed,
        ids=torch.tensor(ids),
        positions=mrope_positions(ids, grids, config),
        text="",
        choices=["up", "down", "left", "right"],
        gold="A",
        patches=torch.cat(patches),
        grids=grids,
        kinds=kinds,
    )


def make_samples(config, prompts):
    """The parts of several prompts -> their samples."""
    return [make_sample(config, *parts, seed=i) for i, parts in enumerate(prompts)]


def collate(*samples):
    return Prompts.collate(samples, CPU, torch.float32)


def random_completions(B, G, C, seed=0):
    return torch.randint(0, WORDS, (B, G, C), generator=torch.Generator().manual_seed(seed))


# ---- What the proofs stand on: transformers, run the plain way -----------------------------------
PIXEL_MEAN = [0.48145466, 0.4578275, 0.40821073]
PIXEL_STD = [0.26862954, 0.26130258, 0.27577711]


def transformers_inputs(config, samples, completions):
    """Every completion [B, G, C] is a row with its whole prompt and its own pixels.

    Rows are padded on the right.
    """
    ids, kinds = [], []
    grids = dict(image=[], video=[])
    patches = dict(image=[], video=[])
    for sample, group in zip(samples, completions):
        prompt = sample["ids"]
        prompt_kinds = (prompt == config.image_token_id) + 2 * (prompt == config.video_token_id)
        sizes = [math.prod(grid) for grid in sample["grids"]]
        media = list(zip(sample["kinds"], sample["grids"], sample["patches"].split(sizes)))
        for completion in group:
            ids.append(torch.cat((prompt, completion)))
            kinds.append(torch.cat((prompt_kinds, torch.zeros_like(completion))))
            for kind, grid, piece in media:
                grids[kind].append(grid)
                patches[kind].append(piece)

    inputs = dict(
        input_ids=pad_sequence(ids, batch_first=True),
        attention_mask=pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
    )
    if grids["image"] or grids["video"]:
        # 0 text, 1 image, 2 video; a completion is text, whatever it says.
        inputs["mm_token_type_ids"] = pad_sequence(kinds, batch_first=True)
    for kind, name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        if grids[kind]:
            inputs[name] = transformers_pixels(torch.cat(patches[kind]))
            inputs[f"{kind}_grid_thw"] = torch.tensor(grids[kind])
    return inputs


def transformers_pixels(patches):
    """Bytes [N, 1176] -> normalised; the columns are (channel, 2 frames, 14, 14)."""
    mean = torch.tensor(PIXEL_MEAN)[:, None]
    std = torch.tensor(PIXEL_STD)[:, None]
    pixels = patches.view(-1, 3, 392) / 255
    return ((pixels - mean) / std).flatten(1)


def transformers_logits(hf, samples, completions, **more):
    """-> [B, G, C, V], the logits that predict each completion token, fp32 on the host."""
    B, G, C = completions.shape
    hf.model.rope_deltas = None  # transformers would keep the last call's
    inputs = transformers_inputs(hf.config, samples, completions)
    inputs = {name: z.to(hf.device) for name, z in inputs.items()}
    logits = hf(**inputs, **more).logits.float().cpu()

    # A token is predicted by the one before it, the first by the prompt's last.
    last = torch.tensor([len(s["ids"]) - 1 for s in samples]).repeat_interleave(G)
    columns = last[:, None] + torch.arange(C)  # [B*G, C]
    return logits[torch.arange(B * G)[:, None], columns].view(B, G, C, -1)


def transformers_logp(hf, samples, completions, temperature=1.0, **more):
    """-> [B, G, C], log-probs of the completions' tokens."""
    logits = transformers_logits(hf, samples, completions, **more) / temperature
    return logits.log_softmax(-1).gather(-1, completions[..., None])[..., 0]


def transformers_gradients(hf):
    """{checkpoint name: gradient}; in memory transformers calls the same tensors otherwise."""
    gradients = {}
    for name, p in hf.named_parameters():
        name = name.replace("model.visual.", "visual.")
        name = name.replace("model.language_model.", "model.")
        gradients[name] = p.grad
    return gradients


# ---- The scripts as text: the shared blocks ------------------------------------------------------
SCRIPTS = ["grpo_video.py", "sft_video.py", "eval_video.py"]
MARKER = re.compile(r"# === shared: (\w+) — identical in ([\w., ]+) ===")


def test_shared_blocks_are_identical():
    """What several scripts carry is the same in each, byte for byte.

    A variant is a parameter, never an edit.
    """
    texts = {name: (ROOT / name).read_text() for name in SCRIPTS}
    blocks, _ = find_blocks("grpo_video.py", texts["grpo_video.py"])
    assert {"qwen2_vl", "video_prompt", "answer", "sampling", "training"} <= set(blocks)
    assert block_problems(texts) == []


SHARED_X = "# === shared: x — identical in a.py, b.py ===\n"
BLOCK_X = SHARED_X + "def f():\n    return g\n# === end shared: x ===\n"


@pytest.mark.parametrize(
    "old, new, problem",
    [
        ("    return g", "    return 2", "b.py:4: differs from a.py:3 (block x)"),
        ("# === end shared: x ===\n", "", "b.py: no end of the shared block x"),
        (SHARED_X, "", "b.py: lacks the block x, which a.py:1 says it has"),
        ("C = 1", "def f(): pass", "b.py:6: f is defined in two places, one in a shared block"),
        ("C = 1", "g = 1", "b.py:4: a shared block uses the script's own g"),
        ("a.py, b.py", "a.py", "b.py:2: the block x does not name b.py itself"),
    ],
)
def test_the_block_check_sees(old, new, problem):
    """Each way in which blocks come apart is reported, with the file and the line."""
    b = "import os\n" + BLOCK_X + "C = 1\n"
    assert block_problems({"a.py": BLOCK_X, "b.py": b}) == []
    assert problem in block_problems({"a.py": BLOCK_X, "b.py": b.replace(old, new)})


def test_sync(tmp_path, monkeypatch, capsys):
    """--sync writes one script's blocks over the others', says so, and touches nothing else.

    A lost marker is reported.
    """
    a = tmp_path / "a.py"
    b = tmp_path / "b.py"
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    monkeypatch.setitem(globals(), "SCRIPTS", ["a.py", "b.py"])

    a.write_text(BLOCK_X)
    b.write_text("B = 1\n" + BLOCK_X.replace("return g", "return 2\n\n") + "C = 2\n")
    assert sync("a.py") == []
    assert b.read_text() == "B = 1\n" + BLOCK_X + "C = 2\n"
    assert capsys.readouterr().out == "b.py: replaced x\n"

    b.write_text("C = 2\n")
    assert sync("a.py") == ["b.py: no block x; write its two marker lines where it belongs"]


class Block(NamedTuple):
    """A shared block as one script has it."""

    first: int  # the number of its first line
    scripts: list  # those that its marker names
    lines: list  # with both markers


def find_blocks(script, text):
    """-> ({name: Block}, problems with the markers)."""
    blocks, problems = {}, []
    name = None  # of the block that is open
    for number, line in enumerate(text.splitlines(), 1):
        begin = MARKER.fullmatch(line)
        if begin and name is None:
            name = begin[1]
            blocks[name] = Block(number, begin[2].split(", "), [line])
        elif name and line == f"# === end shared: {name} ===":
            blocks[name].lines.append(line)
            name = None
        else:
            if line.startswith("# ==="):
                problems.append(f"{script}:{number}: a marker out of place: {line}")
            if name:
                blocks[name].lines.append(line)

    if name:
        problems.append(f"{script}: no end of the shared block {name}")
    return blocks, problems


def block_problems(texts):
    """{script: its text} -> everything that is wrong with the shared blocks."""
    found, problems = {}, []
    for script, text in texts.items():
        found[script], wrong = find_blocks(script, text)
        problems += wrong

    for script, text in texts.items():
        statements = ast.parse(text).body
        problems += defined_twice(script, statements, found[script])
        problems += own_names_used(script, statements, found[script])
        problems += copies_that_differ(script, found)
    return problems


def defined_twice(script, statements, blocks):
    """A name of a block is defined there and nowhere else in the script."""
    problems = []
    places = {}  # name: the block that defines it, or None
    for statement in statements:
        block = block_of(statement, blocks)
        for name in sorted(top_level_names(statement)):
            if places.setdefault(name, block) != block:
                where = f"{script}:{statement.lineno}"
                problems.append(f"{where}: {name} is defined in two places, one in a shared block")
    return problems


def own_names_used(script, statements, blocks):
    """A block uses nothing that a script defines for itself."""
    outside = set()
    for statement in statements:
        if block_of(statement, blocks) is None:
            outside |= top_level_names(statement)

    problems = []
    for statement in statements:
        if block_of(statement, blocks) is None:
            continue
        names = names_in(statement)
        local = {n.id for n in names if isinstance(n.ctx, ast.Store)}
        local |= {n.arg for n in ast.walk(statement) if isinstance(n, ast.arg)}
        for n in names:
            if n.id in outside - local:
                where = f"{script}:{n.lineno}"
                problems.append(f"{where}: a shared block uses the script's own {n.id}")
    return problems


def copies_that_differ(script, found):
    """Every script that a block names has it, line for line; each two scripts are compared once."""
    problems = []
    for name, ours in found[script].items():
        where = f"{script}:{ours.first}"
        if script not in ours.scripts:
            problems.append(f"{where}: the block {name} does not name {script} itself")

        for other in set(ours.scripts) & set(found) - {script}:
            theirs = found[other].get(name)
            if theirs is None:
                problems.append(f"{other}: lacks the block {name}, which {where} says it has")
            elif script < other and ours.lines != theirs.lines:
                pairs = enumerate(zip_longest(ours.lines, theirs.lines))
                i = next(i for i, (our_line, their_line) in pairs if our_line != their_line)
                here = f"{script}:{ours.first + i}"
                there = f"{other}:{theirs.first + i}"
                problems.append(f"{there}: differs from {here} (block {name})")
    return problems


def block_of(statement, blocks):
    """-> the name of the block that a top-level statement stands in, or None."""
    for name, block in blocks.items():
        if block.first <= statement.lineno < block.first + len(block.lines):
            return name
    return None


def top_level_names(statement):
    """-> the names that a top-level statement defines."""
    if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
        return {statement.name}
    if isinstance(statement, ast.Assign):
        targets = statement.targets
    elif hasattr(statement, "target"):  # `a: int = 1`, `a += 1`, `for a in b`
        targets = [statement.target]
    else:
        targets = []

    names = set()
    for target in targets:
        names |= {n.id for n in names_in(target)}
    return names


def names_in(node):
    return [n for n in ast.walk(node) if isinstance(n, ast.Name)]


def sync(source):
    """Copies the blocks of the script `source` into the others, over theirs -> problems."""
    blocks, problems = find_blocks(source, (ROOT / source).read_text())
    for other in SCRIPTS:
        if other != source and not problems:
            problems += copy_blocks(blocks, other)
    return problems


def copy_blocks(blocks, other):
    """Writes blocks over those of the script `other` -> problems."""
    text = (ROOT / other).read_text()
    theirs, problems = find_blocks(other, text)
    if problems:
        return problems

    changed = []
    for name, block in blocks.items():
        if other not in block.scripts:
            continue
        if name not in theirs:
            missing = f"no block {name}; write its two marker lines where it belongs"
            problems.append(f"{other}: {missing}")
        elif theirs[name].lines != block.lines:
            text = text.replace("\n".join(theirs[name].lines), "\n".join(block.lines))
            changed.append(name)

    if changed:
        (ROOT / other).write_text(text)
        print(f"{other}: replaced {', '.join(changed)}")
    return problems


# ---- The scripts as text: can they be read? ------------------------------------------------------
LARGEST = {"grpo_video.py": 14_500, "sft_video.py": 11_490, "eval_video.py": 12_360}  # tokens
ALLOWED = {"nested comprehensions": 2, "two ideas in a pair": 3}  # of the rest none
LAYOUT = {"COMMENT", "NL", "NEWLINE", "INDENT", "DEDENT", "ENDMARKER"}
COMPREHENSION = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


@pytest.mark.parametrize("name", [*LARGEST, "test_smoke.py"])
def test_scripts_can_be_read(name):
    """One idea a statement, short functions, and what is a script's own first.

    Its size is counted in tokens, which long lines can't hide.
    """
    source = (ROOT / name).read_text()
    problems = page_problems(source)
    if name in LARGEST:
        problems += script_problems(name, source, LARGEST[name])
    assert problems == [], "\n".join([name, *problems])


@pytest.mark.parametrize("command", ["format --check", "check"])
def test_layout(command):
    """`ruff format` would change nothing in this repository, and `ruff check` has no complaint."""
    line = [sys.executable, "-m", "ruff", *command.split(), str(ROOT)]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def function(lines, name="f"):
    return f"def {name}():\n" + "    x\n" * (lines - 1)


@pytest.mark.parametrize(
    "problem, good, bad",
    [
        ("over 100 columns", "x" * 100, "x" * 101),
        ("12.0 tokens a line", "f(a, b, c, -d,)", "f(a, b, c, d, e)"),
        ("a long function", function(60), function(61)),
        ("a long function", function(129, "main"), function(130, "main")),
        ("no blank line", function(13), function(14)),
        ("no blank line", function(14).replace("x\n", "x\n\n", 1), function(14)),
        ("an expression for its effect", "x = f() if y else g()", "f() if y else g()"),
        ("an expression for its effect", "x = y and f()", "y and f()"),
        ("an expression for its effect", "x = [f(y) for y in z]", "[f(y) for y in z]"),
        ("an expression for its effect", "lambda: f()", "lambda: (f(), g())"),
        ("two ideas in a pair", "a, b = f(), 1\n" * 3, "a, b = f(), 1\n" * 4),
        ("two ideas in a pair", "a, b = b, a\n" * 4, "a, b = (x if y else z), 1\n" * 4),
        ("nested comprehensions", "[{x} for x in y]\n" * 3, "[x for y in z for x in y]\n" * 3),
        (
            "nested comprehensions",
            "[{x for x in y} for y in z]\n" * 2,
            "[{x for x in y} for y in z]\n" * 3,
        ),
    ],
)
def test_the_page_check_sees(problem, good, bad):
    """Each measure fires, and not before its limit."""
    assert problem not in str(page_problems(good))
    assert problem in str(page_problems(bad))


def test_the_script_check_sees():
    """A script that is too large, whose `main` is late, or that defines something behind it."""
    start = "if __name__ == '__main__':\n    main()\n"
    main = "def main():\n    f()\n\n\n"
    script = main + "# A banner\n" + BLOCK_X + start  # 8 tokens, 7 in the block, and 8
    assert script_problems("a.py", script, 23) == []
    assert script_problems("a.py", script, 22) == ["23 tokens of code, more than 22"]

    late = "\n" * 20 + script
    assert script_problems("a.py", late, 23) == ["line 22: main ends in the second half"]
    astray = script.replace(start, "C = 1\n" + start)
    assert script_problems("a.py", astray, 26) == ["line 10: behind main, in no shared block"]


def test_code_tokens():
    """The line of each token: docstrings, comments and last commas apart; an f-string is one."""
    source = '"""What."""\nx = f(  # why\n    1,\n    f"{y + 1} z",\n)\n'
    # x = f (   and   1 ,   and   f"{y + 1} z"   and   )
    assert code_tokens(source) == [2, 2, 2, 2, 3, 3, 4, 5]


def page_problems(source):
    """-> what makes any source hard to read."""
    problems = []
    for what, lines in hard_places(source).items():
        if len(lines) > ALLOWED.get(what, 0):
            problems.append(f"{what}: lines {sorted(lines)}")

    tokens = code_tokens(source)
    density = round(len(tokens) / len(set(tokens)), 1)
    if density > 11.5:
        problems.append(f"{density} tokens a line")
    return problems


def hard_places(source):
    """-> {what is hard to read: the numbers of the lines where it is}."""
    lines = source.splitlines()
    nodes = list(ast.walk(ast.parse(source)))
    functions = [n for n in nodes if isinstance(n, ast.FunctionDef)]
    comprehensions = {n for n in nodes if isinstance(n, COMPREHENSION)}
    nested = {n for n in comprehensions if len(n.generators) > 1}
    for outer in comprehensions:
        nested |= comprehensions & set(ast.walk(outer)) - {outer}

    return {
        "over 100 columns": [i for i, line in enumerate(lines, 1) if len(line) > 100],
        "a long function": [f.lineno for f in functions if is_long(f)],
        "no blank line": [f.lineno for f in functions if is_solid(f, lines)],
        "an expression for its effect": [n.lineno for n in nodes if is_effect(n)],
        "two ideas in a pair": [n.lineno for n in nodes if is_pair(n)],
        "nested comprehensions": [n.lineno for n in nested],
    }


def is_long(f):
    """Over 60 lines; `main` may have 129."""
    limit = 129 if f.name == "main" else 60
    return f.end_lineno - f.lineno + 1 > limit


def is_solid(f, lines):
    """Over 12 lines without a blank one."""
    inside = lines[f.lineno : f.end_lineno]
    return len(inside) > 12 and all(line.strip() for line in inside)


def is_effect(node):
    """A choice or a comprehension that stands as a statement, or a lambda of several parts."""
    if isinstance(node, ast.Lambda):
        return isinstance(node.body, (ast.Tuple, ast.ListComp))
    effects = (ast.IfExp, ast.BoolOp, *COMPREHENSION)
    return isinstance(node, ast.Expr) and isinstance(node.value, effects)


def is_pair(node):
    """`a, b = f(x), y`: a tuple on both sides, with a call or a choice on the right."""
    match node:
        case ast.Assign(targets=[ast.Tuple(), *_], value=ast.Tuple(elts=parts)):
            ideas = (ast.Call, ast.IfExp, *COMPREHENSION)
            return any(isinstance(part, ideas) for part in parts)
    return False


def script_problems(script, source, largest):
    """-> what is wrong with a script's size, with the place of `main`, and with what follows it."""
    problems = []
    size = len(code_tokens(source))
    if size > largest:
        problems.append(f"{size} tokens of code, more than {largest}")

    statements = ast.parse(source).body
    blocks, _ = find_blocks(script, source)
    main = next(s for s in statements if getattr(s, "name", "") == "main")
    if main.end_lineno >= len(source.splitlines()) / 2:
        problems.append(f"line {main.end_lineno}: main ends in the second half")

    for statement in statements[statements.index(main) + 1 :]:
        start = ast.unparse(statement).startswith("if __name__ == ")
        if not start and block_of(statement, blocks) is None:
            problems.append(f"line {statement.lineno}: behind main, in no shared block")
    return problems


def code_tokens(source):
    """-> the line of each token of code; comments, docstrings and last commas are none."""
    tokens = []
    inside = 0  # an f-string, which Python 3.12 cuts into its parts
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        kind = tokenize.tok_name[token.type]
        if kind not in LAYOUT and not inside:
            tokens.append(token)
        if kind == "FSTRING_START":
            inside += 1
        if kind == "FSTRING_END":
            inside -= 1

    # A formatter puts a comma before a bracket that it moves to a line of its own.
    ends = (")", "]", "}")
    skipped = {a.start for a, b in pairwise(tokens) if a.string == "," and b.string in ends}

    prose = set()
    for node in ast.walk(ast.parse(source)):
        is_documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        if is_documented and ast.get_docstring(node) is not None:
            docstring = node.body[0]
            prose |= set(range(docstring.lineno, docstring.end_lineno + 1))
    lines = [token.start[0] for token in tokens if token.start not in skipped]
    return [line for line in lines if line not in prose]


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] != "--sync" or sys.argv[2] not in SCRIPTS:
        sys.exit(__doc__)
    sys.exit("\n".join(sync(sys.argv[2])) or 0)
