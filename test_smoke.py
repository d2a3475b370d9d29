"""The proof of the scripts, on a tiny random model: transformers is the oracle, the golden numbers are worked by hand.

    pytest test_smoke.py                          # under a minute on two CPU cores
    python test_smoke.py --sync grpo_video.py     # copy that script's shared blocks into the other scripts

In this order: the forward and its gradients against transformers; decoding; the algorithm's functions against numbers; an
update; SFT's supervised tokens; a short run of both scripts on the toy; the shared blocks and the length of the scripts.
"""
import ast
import copy
import hashlib
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer, Qwen2VLConfig, Qwen2VLForConditionalGeneration

from grpo_video import (Prompts, VideoDataset, completion_mask, generate, global_sums, group_advantages, k3_kl, load_model,
                        load_records, mrope_positions, policy_loss, token_weights, update)
from sft_video import parse_chat, supervise
from toy import make_toy

ROOT = Path(__file__).resolve().parent
torch.set_num_threads(1)  # matrices this small lose more to a second thread than they gain

# ---- Tools: the same tiny random weights in both implementations, and prompts of random words and pixels ----------------
IMAGE, VIDEO, END, OTHER_END, WORDS = 398, 397, 396, 395, 390  # token ids; words are below WORDS
TINY = dict(
    vocab_size=400, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96,
    rope_theta=1000.0, rope_scaling=dict(type="mrope", mrope_section=[2, 3, 3]), tie_word_embeddings=True,
    initializer_range=0.11, image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=394, vision_end_token_id=393,
    eos_token_id=END, pad_token_id=OTHER_END, bos_token_id=OTHER_END, max_position_embeddings=4096)
TINY_VISION = dict(depth=2, embed_dim=32, num_heads=4, mlp_ratio=4, hidden_size=64, initializer_range=0.1)
CPU = torch.device("cpu")


def make_tiny(folder, seed=0, vision_config=None, **changes):
    """-> (folder, transformers' model, ours): random fp32 weights, biases and norms among them, that differ by seed."""
    torch.manual_seed(seed)
    vision = TINY_VISION | dict(hidden_size=changes.get("hidden_size", 64)) | (vision_config or {})
    config = Qwen2VLConfig(**copy.deepcopy(TINY | changes), vision_config=vision)  # which would write into its arguments
    hf = Qwen2VLForConditionalGeneration(config).eval()
    for p in hf.parameters():
        if p.dim() == 1:  # else all biases are 0 and all norms 1, and one that is forgotten would go unseen
            p.data += 0.1 * torch.randn_like(p)
    hf.generation_config.eos_token_id, hf.generation_config.pad_token_id = [END, OTHER_END], OTHER_END
    hf.save_pretrained(folder)
    return folder, hf, load_model(folder, CPU, torch.float32)


def make_sample(config, *parts, seed=0):
    """A sample as VideoDataset gives it. In `parts` a number stands for so many random words, ("video", (t, h, w)) or
    ("image", (1, h, w)) for random pixels; (t, h, w) counts patches, of which 2 x 2 share a placeholder token."""
    rng, ids, patches, grids, kinds = torch.Generator().manual_seed(seed), [], [torch.empty(0, 1176).byte()], [], []
    for part in parts:
        if isinstance(part, int):
            ids += torch.randint(0, WORDS, (part,), generator=rng).tolist()
        else:
            kind, (t, h, w) = part
            ids += [config.image_token_id if kind == "image" else config.video_token_id] * (t * h * w // 4)
            patches.append(torch.randint(0, 256, (t * h * w, 1176), generator=rng).byte())
            grids, kinds = [*grids, (t, h, w)], [*kinds, kind]
    return dict(sample_id=seed, ids=torch.tensor(ids), positions=mrope_positions(ids, grids, config), text="", gold="A",
                patches=torch.cat(patches), grids=grids, kinds=kinds)


def collate(*samples):
    return Prompts.collate(samples, CPU, torch.float32)


def random_completions(B, G, C, seed=0):
    return torch.randint(0, WORDS, (B, G, C), generator=torch.Generator().manual_seed(seed))


def transformers_inputs(config, samples, completions):
    """The plain way: every completion [B, G, C] is a row with its whole prompt and its own pixels, padded on the right."""
    def pad(rows):
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

    rows = [(s, torch.cat((s["ids"], completion))) for s, group in zip(samples, completions) for completion in group]
    inputs = dict(input_ids=pad([ids for _, ids in rows]), attention_mask=pad([torch.ones_like(ids) for _, ids in rows]))
    mean, std = (torch.tensor(z)[:, None] for z in ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]))
    for kind, name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        pieces = [(x, grid) for s, _ in rows for k, grid, x in zip(s["kinds"], s["grids"], s["patches"].split(
            [t * h * w for t, h, w in s["grids"]])) if k == kind]
        if pieces:
            pixels = torch.cat([x for x, _ in pieces]).view(-1, 3, 392) / 255  # columns are (channel, 2 frames, 14, 14)
            inputs |= {name: ((pixels - mean) / std).flatten(1), f"{kind}_grid_thw": torch.tensor([grid for _, grid in pieces])}
            inputs["mm_token_type_ids"] = pad([torch.cat((  # 0 text, 1 image, 2 video; a completion is text, whatever it says
                (s["ids"] == config.image_token_id) + 2 * (s["ids"] == config.video_token_id),
                torch.zeros_like(ids[len(s["ids"]):]))) for s, ids in rows])
    return inputs


def transformers_logits(hf, samples, completions, **more):
    """-> [B, G, C, V], the logits that predict each completion token."""
    hf.model.rope_deltas, (B, G, C) = None, completions.shape  # transformers would keep the last call's
    logits = hf(**transformers_inputs(hf.config, samples, completions), **more).logits
    first = torch.tensor([len(s["ids"]) - 1 for s in samples]).repeat_interleave(G)
    return logits[torch.arange(B * G)[:, None], first[:, None] + torch.arange(C)].view(B, G, C, -1)


def transformers_logp(hf, samples, completions, temperature=1.0, **more):
    """-> [B, G, C], log-probs of the completions' tokens."""
    logits = transformers_logits(hf, samples, completions, **more) / temperature
    return logits.log_softmax(-1).gather(-1, completions[..., None])[..., 0]


def transformers_gradients(hf):
    """{checkpoint name: gradient}; in memory transformers calls the same tensors model.visual… and model.language_model…"""
    return {name.replace("model.visual.", "visual.").replace("model.language_model.", "model."): p.grad
            for name, p in hf.named_parameters()}


def make_toy_folder(folder):
    """-> folder with the toy's data/ and its model before any training, init/."""
    texts = make_toy.make_data(folder / "data", 0)
    make_toy.make_untrained_model(folder / "init", make_toy.make_tokenizer(texts), 0)
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return make_toy_folder(tmp_path_factory.mktemp("toy"))


# ---- The model ----------------------------------------------------------------------------------------------------------
CLIP, STILL = ("video", (2, 4, 6)), ("image", (1, 6, 4))
PROMPTS = {
    "text": [[7]],
    "image": [[3, STILL, 5]],
    "video and image": [[3, CLIP, 2, STILL, 5]],
    "two videos": [[2, CLIP, 1, ("video", (1, 4, 4)), 4]],
    "two prompts, one longer": [[3, CLIP, 2, STILL, 5], [4, STILL, 1]],
}


@pytest.mark.parametrize("prompts", PROMPTS.values(), ids=PROMPTS)
def test_logits_are_transformers(tiny, prompts):
    """One packed forward (the prompt once, its completions beside it) = one row of transformers for every completion."""
    _, hf, model = tiny
    samples = [make_sample(model.config, *parts, seed=i) for i, parts in enumerate(prompts)]
    completions = random_completions(len(samples), 3, 5)
    with torch.no_grad():
        theirs = transformers_logits(hf, samples, completions)
        ours = model.logits(model.completion_states(collate(*samples), completions)).view_as(theirs)
        logp = model(collate(*samples), completions, temperature=0.7)
        assert theirs.std() > 0.5  # of order 1, else equality says little
        assert (ours - theirs).abs().max() <= 1e-5
        assert (logp - transformers_logp(hf, samples, completions, 0.7)).abs().max() <= 1e-5


def test_gradients_are_transformers(tiny):
    """Computing the prompt once for its group changes no parameter's gradient: all G paths into it add up."""
    _, hf, model = tiny
    samples = [make_sample(model.config, *parts, seed=i) for i, parts in enumerate(PROMPTS["two prompts, one longer"])]
    completions, noise = random_completions(2, 3, 5), 0.3 * torch.randn(2, 2, 3, 5, generator=torch.Generator().manual_seed(1))
    mask = torch.arange(5) < torch.tensor([[5, 2, 3], [1, 5, 4]])[..., None]
    advantages = group_advantages(torch.tensor([[1.0, 0, 0], [0, 1, 1]]), True)
    hf.zero_grad(), model.zero_grad()
    for logp in (transformers_logp(hf, samples, completions), model(collate(*samples), completions)):
        old_logp, ref_logp = logp.detach() + noise
        per_token, _ = policy_loss(logp, old_logp, advantages, 0.2, 0.2)
        (token_weights(mask, "grpo", 6, 20, 5) * (per_token + 0.1 * k3_kl(logp, ref_logp))).sum().backward()
    theirs = transformers_gradients(hf)
    assert {name for name, _ in model.named_parameters()} == set(theirs)
    for name, p in model.named_parameters():
        assert (p.grad - theirs[name]).norm() <= 1e-4 * theirs[name].norm() and theirs[name].norm() > 0, name


# ---- Decoding -----------------------------------------------------------------------------------------------------------
def test_greedy_decoding(tiny):
    """Static cache = computing everything anew for each token = transformers' generate, token for token."""
    _, hf, model = tiny
    samples = [make_sample(model.config, *parts, seed=i) for i, parts in enumerate(PROMPTS["two prompts, one longer"])]
    ours = generate(model, collate(*samples), 2, 12, [END, OTHER_END], [0, 0], temperature=0)
    assert ours.shape == (2, 2, 12) and (ours[:, 0] == ours[:, 1]).all() and len(ours[:, 0].unique()) > 8
    anew = torch.zeros(2, 1, 0, dtype=torch.long)
    for _ in range(12):  # the placeholder 0 stands where the next token comes
        with torch.no_grad():
            states = model.completion_states(collate(*samples), torch.cat((anew, torch.zeros(2, 1, 1).long()), 2))
            anew = torch.cat((anew, model.logits(states.view(2, -1, 64)[:, -1]).argmax(-1).view(2, 1, 1)), 2)
    assert ours[:, :1].tolist() == anew.tolist()
    for s, row in zip(samples, ours[:, 0].tolist()):
        hf.model.rope_deltas, nothing = None, torch.zeros(1, 1, 0, dtype=torch.long)
        theirs = hf.generate(**transformers_inputs(hf.config, [s], nothing), max_new_tokens=12, do_sample=False)
        assert row == theirs[0, len(s["ids"]):].tolist()


@pytest.mark.parametrize("which", [0, 1])
def test_decoding_stops_at_either_end_token(tiny, which):
    """A row ends behind the first of either end token and is filled up; decoding ends when all rows have ended."""
    model = tiny[2]
    prompts = collate(*(make_sample(model.config, 5, seed=seed) for seed in (0, 1)))
    free = generate(model, prompts, 1, 8, [END, OTHER_END], [1, 2])[:, 0].tolist()
    ends = [END, OTHER_END]
    ends[which] = next(token for token in free[0] if free[0].index(token) >= 2 and token not in free[1])
    n = free[0].index(ends[which]) + 1
    stopped = generate(model, prompts, 1, 8, ends, [1, 2])[:, 0].tolist()
    assert stopped == [free[0][:n] + [ends[0]] * (8 - n), free[1]]
    alone = generate(model, collate(make_sample(model.config, 5)), 1, 8, ends, [1])
    assert alone.tolist() == [[free[0][:n]]]


# ---- The algorithm: numbers worked by hand ------------------------------------------------------------------------------
def test_completion_mask():
    """True through the first end token of either kind, inclusive; all True where none came; one True where it came first."""
    ids = torch.tensor([[[5, 6, END, END, END], [5, OTHER_END, 7, END, 8], [1, 2, 3, 4, 5], [END, 1, 2, 3, 4]]])
    mask = completion_mask(ids, [END, OTHER_END])
    assert mask.int().tolist() == [[[1, 1, 1, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]]]


def test_group_advantages():
    """(r - mean) / (std + 1e-4) inside each group, with the unbiased std; a group of equal rewards gets zeros."""
    rewards = torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 1]])
    # The first group: mean 1/4; squares (9 + 1 + 1 + 1)/16 = 3/4, over G - 1 = 3 is 1/4; std 1/2.
    # So 0.75 / 0.5001 = 1.499700 and -0.25 / 0.5001 = -0.499900.
    golden = torch.tensor([[1.499700, -0.499900, -0.499900, -0.499900], [0, 0, 0, 0]])
    torch.testing.assert_close(group_advantages(rewards, True), golden, atol=1e-6, rtol=0)
    assert group_advantages(rewards, False).tolist() == [[0.75, -0.25, -0.25, -0.25], [0, 0, 0, 0]]


def test_k3_kl():
    """e^d - d - 1 with d = log π_ref - log π_θ; its gradient in log π_θ is 1 - e^d."""
    logp = torch.full((4,), -1.0, dtype=torch.float64, requires_grad=True)
    ref_logp = -1 + torch.tensor([0, math.log(2), -math.log(2), 12], dtype=torch.float64)
    # d = 0: 1 - 0 - 1 = 0.   d = ln 2: 2 - 0.693147 - 1 = 0.306853.   d = -ln 2: 0.5 + 0.693147 - 1 = 0.193147.
    # d = 12: e^12 - 13 = 162741.791419; clamped to 11: e^11 - 12 = 59862.141715, without a gradient (trap 9).
    assert k3_kl(logp, ref_logp).tolist() == pytest.approx([0, 0.306853, 0.193147, 162741.791419], abs=1e-6)
    kl = k3_kl(logp, ref_logp, clamp=11.0)
    assert kl.tolist() == pytest.approx([0, 0.306853, 0.193147, 59862.141715], abs=1e-6)
    kl.sum().backward()
    assert logp.grad.tolist() == pytest.approx([0, -1, 0.5, 0], abs=1e-12)


def test_policy_loss():
    """-min(ρ Â, clip(ρ, 1 - ε, 1 + ε_high) Â): the clip ends the gradient only where going on would pay."""
    ratio = torch.tensor([0.5, 0.9, 1.0, 1.5])
    logp = torch.stack((ratio, ratio, ratio)).log()[None].requires_grad_()  # [1, 3, 4]
    loss, clipped = policy_loss(logp, torch.zeros(1, 3, 4), torch.tensor([[2.0, -1.0, 0.0]]), epsilon=0.2, epsilon_high=0.28)
    # Â = 2:  ρ Â = 1, 1.8, 2, 3;         clipped ρ Â = 1.6, 1.8, 2, 2.56;        min = 1, 1.8, 2, 2.56
    # Â = -1: ρ Â = -.5, -.9, -1, -1.5;   clipped ρ Â = -.8, -.9, -1, -1.28;      min = -.8, -.9, -1, -1.5
    golden = [[-1, -1.8, -2, -2.56], [0.8, 0.9, 1, 1.5], [0, 0, 0, 0]]
    torch.testing.assert_close(loss[0], torch.tensor(golden))
    assert clipped[0].int().tolist() == [[0, 0, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]]
    loss.sum().backward()  # d loss / d log π = -ρ Â where it is not clipped
    torch.testing.assert_close(logp.grad[0], torch.tensor([[-1, -1.8, -2, 0], [0, 0.9, 1, 1.5], [0, 0, 0, 0]]))


@pytest.mark.parametrize("loss_type, golden", [
    ("grpo", [[1 / 4, 1 / 4, 0, 0], [1 / 8, 1 / 8, 1 / 8, 1 / 8]]),  # 1/2 sequence each, over its 2 or 4 tokens
    ("dapo", [[1 / 6, 1 / 6, 0, 0], [1 / 6, 1 / 6, 1 / 6, 1 / 6]]),  # 2 + 4 tokens
    ("dr_grpo", [[1 / 16, 1 / 16, 0, 0], [1 / 16, 1 / 16, 1 / 16, 1 / 16]]),  # 2 sequences x max length 8
])
def test_token_weights(loss_type, golden):
    """What each loss averages over, for a step of two completions of 2 and 4 tokens."""
    mask = torch.tensor([[[1, 1, 0, 0], [1, 1, 1, 1]]]).bool()
    weights = token_weights(mask, loss_type, sequences=2, tokens=6, max_completion_length=8)
    torch.testing.assert_close(weights[0], torch.tensor(golden))


# ---- An update ----------------------------------------------------------------------------------------------------------
def make_group(model, advantages, ref_logp=None):
    """What rollout leaves for update: a prompt with a video, three completions of 4, 2 and 3 tokens."""
    sample, completions = make_sample(model.config, 3, CLIP, 4), random_completions(1, 3, 4)
    mask = (torch.arange(4) < torch.tensor([4, 2, 3])[:, None])[None]
    return dict(prompts=collate(sample), completions=completions, mask=mask, rows=[], ref_logp=ref_logp,
                advantages=torch.tensor([advantages]))


def run_update(model, groups, lr, optimizer=torch.optim.SGD, **changes):
    """grpo_video.update with the totals that main computes -> (loss, gradient norm)."""
    c = dict(num_iterations=1, loss_type="grpo", max_completion_length=4, temperature=1.0, epsilon=0.2, epsilon_high=None,
             beta=0.0, kl_clamp=0.0, max_grad_norm=1e9)
    totals = global_sums(CPU, sequences=sum(g["mask"].any(-1).sum() for g in groups),
                         tokens=sum(g["mask"].sum() for g in groups),
                         **{f"signal {i}": g["advantages"].abs().sum() for i, g in enumerate(groups)})
    return update(model, optimizer(model.parameters(), 1e3), groups, SimpleNamespace(**c | changes), totals, lr)


def test_first_loss(tmp_path):
    """At the first update the ratio is 1, so the loss is -mean Â + β·KL: about 0, as group advantages are centred (trap 19)."""
    model, reference = (make_tiny(tmp_path / str(seed), seed)[2] for seed in (0, 1))
    g = make_group(model, [1.5, -0.5, 0.25])
    with torch.no_grad():
        g["ref_logp"] = reference(g["prompts"], g["completions"])
        d = g["ref_logp"] - model(g["prompts"], g["completions"])
    kl = d.exp() - d - 1  # [1, 3, 4]
    mean_kl = (kl[0, 0, :4].mean() + kl[0, 1, :2].mean() + kl[0, 2, :3].mean()) / 3
    loss, norm = run_update(model, [g], lr=0.0, beta=0.1)
    assert loss == pytest.approx(-(1.5 - 0.5 + 0.25) / 3 + 0.1 * float(mean_kl), abs=1e-6) and mean_kl > 0.1 and norm > 0
    assert not g["clip_ratio"].any()
    torch.testing.assert_close(g["kl"], kl, atol=1e-5, rtol=1e-4)


def test_update_moves_probability_to_the_rewarded_completion(tmp_path):
    """One small step: the rewarded completion becomes likelier, the other two less likely; with rewards turned, the reverse."""
    for sign in (1, -1):
        model = make_tiny(tmp_path / str(sign))[2]
        g = make_group(model, [sign * 1.15, sign * -0.58, sign * -0.58])
        run_update(model, [g], lr=1e-2)
        with torch.no_grad():
            change = ((model(g["prompts"], g["completions"]) - g["old_logp"]) * g["mask"]).sum(-1)[0]
        assert (change * sign > 0).tolist() == [True, False, False], change


# ---- SFT ----------------------------------------------------------------------------------------------------------------
def test_supervised_tokens(toy):
    """SFT's loss is on the response and its <|im_end|>: these tokens, none of the prompt, none of the padding."""
    tokenizer = AutoTokenizer.from_pretrained(toy / "init")
    config = load_model(toy / "init", CPU, torch.float32).config
    records = load_records(toy / "data/annotations/training_with_cot_6k.jsonl", toy / "data", parse_chat)[:2]
    settings = SimpleNamespace(frame_size=56, decode_timeout=60.0, fps=2.0, max_frames=8, seed=0)
    samples = [VideoDataset(records, tokenizer, config, settings, shuffle=False)[i] for i in range(2)]
    samples[1]["response"] = "<answer>B"
    prompts, responses, mask = supervise(samples, tokenizer, config, CPU, torch.float32)
    supervised = [[tokenizer.decode(token) for token in row[keep]] for row, keep in zip(responses[:, 0], mask[:, 0])]
    assert supervised == [
        ["<think>", "it moves", " up", "</think><answer>", "C", ". move", " up", "</answer>", "<|im_end|>"],
        ["<answer>", "B", "<|im_end|>"]]
    prompt = prompts.ids[0, :prompts.lengths[0] - 1].tolist() + [int(prompts.last[0])]
    assert tokenizer.decode(prompt).endswith("</answer>. <|im_end|>\n<|im_start|>assistant\n")


# ---- Both scripts on the toy --------------------------------------------------------------------------------------------
def run_script(script, toy, output_dir, **flags):
    flags = dict(data_root=toy / "data", output_dir=output_dir, max_frames=8, frame_size=56, dataloader_num_workers=1) | flags
    command = [sys.executable, str(ROOT / script), *(f"--{name}={value}" for name, value in flags.items())]
    done = subprocess.run(command, env=os.environ | dict(OMP_NUM_THREADS="1"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


COMMON = set("step epoch loss grad_norm learning_rate tokens bad_samples time_data time_update peak_memory_gb".split())
OF_GRPO = set("reward reward_std frac_reward_zero_std advantage_abs_mean kl entropy clip_ratio completion_length "
              "frac_truncated frac_no_answer time_rollout time_ref".split())


def test_scripts_on_the_toy(toy, tmp_path):
    """SFT teaches the answer's format, GRPO goes on from there; what they write is what DESIGN.md, section 5, promises."""
    sft, grpo = tmp_path / "sft", tmp_path / "grpo"
    log = run_script("sft_video.py", toy, sft, model=toy / "init", max_steps=40, learning_rate=5e-3, warmup_ratio=0.1,
                     per_device_train_batch_size=8, gradient_accumulation_steps=1, gradient_checkpointing=False)
    assert log[-1]["loss"] < 0.8 < 5 < log[0]["loss"] and log[-1]["token_accuracy"] > 0.7
    assert set(log[0]) == COMMON | {"token_accuracy"}
    log = run_script("grpo_video.py", toy, grpo, model=sft, max_steps=3, per_device_train_batch_size=4, num_generations=4,
                     max_completion_length=16, learning_rate=1e-3, save_steps=2)
    assert set(log[0]) == COMMON | OF_GRPO and [m["step"] for m in log] == [1, 2, 3]
    assert log[0]["kl"] == 0 == log[0]["clip_ratio"] and log[2]["kl"] > 0
    assert 0 < log[0]["reward"] < 1 and log[0]["grad_norm"] > 0
    assert log[0]["entropy"] > 0.1  # not greedy, whatever the folder's generation_config.json says (trap 1)

    rows = [json.loads(line) for line in (grpo / "rollouts.jsonl").read_text().splitlines()]
    assert len(rows) == 12 and set(rows[0]) == {"step", "sample_id", "prompt", "prompt_ids_len", "gold", "completions"}
    for row in rows:
        assert len(row["completions"]) == 4 and sum(x["advantage"] for x in row["completions"]) == pytest.approx(0, abs=1e-5)
        for x in row["completions"]:
            assert set(x) >= {"text", "ids", "reward", "answer", "advantage", "length", "kl", "logprob_sum"}
            assert x["reward"] == (x["answer"] == row["gold"]) and len(x["ids"]) == x["length"] and x["logprob_sum"] < 0
    assert log[0]["reward"] == pytest.approx(sum(x["reward"] for row in rows[:4] for x in row["completions"]) / 16)

    settings = json.loads((grpo / "config.json").read_text())["run"]
    assert settings["script_sha256"] == hashlib.sha256((ROOT / "grpo_video.py").read_bytes()).hexdigest()
    assert settings["beta"] == 0.1 and torch.__version__.startswith(settings["versions"]["torch"])
    assert [p.name for p in grpo.glob("checkpoint-*")] == ["checkpoint-2"]
    ours, before = (load_model(folder, CPU, torch.float32) for folder in (grpo, sft))
    hf, tokenizer = Qwen2VLForConditionalGeneration.from_pretrained(grpo), AutoTokenizer.from_pretrained(grpo)
    sample, completions = make_sample(ours.config, 3, CLIP, 2, STILL, 2), torch.tensor([[tokenizer("it moves up").input_ids]])
    with torch.no_grad():
        new, old = (model(collate(sample), completions) for model in (ours, before))
        assert (new - transformers_logp(hf, [sample], completions)).abs().max() <= 1e-5 < (new - old).abs().max()


# ---- The scripts as text ------------------------------------------------------------------------------------------------
SCRIPTS = ["grpo_video.py", "sft_video.py", "eval_video.py"]
MARKER = re.compile(r"# === shared: (\w+) — identical in ([\w., ]+) \(checked by test_smoke\.py\) ===")


def find_blocks(script, text):
    """-> ({name: (line number, scripts named, lines with both markers)}, problems with the markers)."""
    blocks, problems, name = {}, [], None
    for number, line in enumerate(text.splitlines(), 1):
        begin = MARKER.fullmatch(line)
        if begin and name is None:
            name = begin[1]
            blocks[name] = (number, begin[2].split(", "), [])
        if name:
            blocks[name][2].append(line)
        if name and line == f"# === end shared: {name} ===":
            name = None
        elif line.startswith("# ===") and not (begin and blocks[name][0] == number):
            problems.append(f"{script}:{number}: a marker out of place: {line}")
    return blocks, problems + ([f"{script}: no end of the shared block {name}"] if name else [])


def top_level_names(statement):
    """Names that a top-level statement defines."""
    targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
    defined = {n.id for target in targets if target for n in ast.walk(target) if isinstance(n, ast.Name)}
    return defined | ({statement.name} if isinstance(statement, (ast.FunctionDef, ast.ClassDef)) else set())


def block_problems(texts):
    """{script: its text} -> everything that is wrong with the shared blocks."""
    found, problems = {}, []
    for script, text in texts.items():
        found[script], wrong = find_blocks(script, text)
        problems += wrong
    for script, blocks in found.items():
        inside, outside = {}, set()
        for statement in ast.parse(texts[script]).body:
            block = next((name for name, (n, _, lines) in blocks.items() if n <= statement.lineno < n + len(lines)), None)
            for name in sorted(top_level_names(statement)):
                if inside.setdefault(name, block) != block:
                    problems.append(f"{script}:{statement.lineno}: {name} is defined in two places, one in a shared block")
            outside |= set() if block else top_level_names(statement)
        for statement in ast.parse(texts[script]).body:
            if any(n <= statement.lineno < n + len(lines) for n, _, lines in blocks.values()):
                names = [n for n in ast.walk(statement) if isinstance(n, ast.Name)]
                own = {n.id for n in names if isinstance(n.ctx, ast.Store)} | {
                    a.arg for a in ast.walk(statement) if isinstance(a, ast.arg)}  # local variables and arguments
                problems += [f"{script}:{n.lineno}: a shared block uses the script's own {n.id}" for n in names
                             if n.id in outside - own]
        for name, (number, named, lines) in blocks.items():
            if script not in named:
                problems.append(f"{script}:{number}: the block {name} does not name {script} itself")
            for other in set(named) & set(texts) - {script}:
                if name not in found[other]:
                    problems.append(f"{other}: lacks the block {name}, which {script}:{number} says it has")
                elif script < other and lines != found[other][name][2]:
                    theirs = found[other][name][2]
                    i = next((i for i, (a, b) in enumerate(zip(lines, theirs)) if a != b), min(len(lines), len(theirs)))
                    problems.append(f"{other}:{found[other][name][0] + i}: differs from {script}:{number + i} (block {name})")
    return problems


def sync(source):
    """Copies the blocks of `source` into the other scripts, over theirs."""
    blocks, problems = find_blocks(source, (ROOT / source).read_text())
    for other in [name for name in SCRIPTS if name != source]:
        text, changed = (ROOT / other).read_text(), []
        for name, (_, named, lines) in blocks.items() if not problems else []:
            theirs, wrong = find_blocks(other, text)
            if other in named and name in theirs and not wrong and theirs[name][2] != lines:
                text, changed = text.replace("\n".join(theirs[name][2]), "\n".join(lines)), [*changed, name]
            elif other in named and (name not in theirs or wrong):
                problems += wrong or [f"{other}: no block {name}; write its two marker lines where it belongs"]
        if changed:
            (ROOT / other).write_text(text)
            print(f"{other}: replaced {', '.join(changed)}")
    return problems


def test_shared_blocks_are_identical():
    """What several scripts carry is the same in each, byte for byte; a variant is a parameter, never an edit."""
    texts = {name: (ROOT / name).read_text() for name in SCRIPTS}
    assert {"qwen2_vl", "video_prompt", "answer", "sampling", "training"} <= set(find_blocks("", texts["grpo_video.py"])[0])
    assert block_problems(texts) == []


SHARED_X = "# === shared: x — identical in a.py, b.py (checked by test_smoke.py) ===\n"


@pytest.mark.parametrize("old, new, problem", [
    ("    return 1", "    return 2", "b.py:4: differs from a.py:3 (block x)"),
    ("# === end shared: x ===\n", "", "b.py: no end of the shared block x"),
    (SHARED_X, "", "b.py: lacks the block x, which a.py:1 says it has"),
    ("C = 1", "def f(): pass", "b.py:6: f is defined in two places, one in a shared block"),
    ("C = 1", "g = 1", "b.py:4: a shared block uses the script's own g"),
    ("a.py, b.py", "a.py", "b.py:2: the block x does not name b.py itself"),
])
def test_the_block_check_sees(old, new, problem):
    """Each way in which blocks come apart is reported, with the file and the line."""
    a = SHARED_X + "def f():\n    return 1\n# === end shared: x ===\n"
    b = "import os\n" + a + "C = 1\n"
    if new == "g = 1":
        a, b = (text.replace("return 1", "return g") for text in (a, b))
    assert block_problems({"a.py": a, "b.py": b}) == []
    assert problem in block_problems({"a.py": a, "b.py": b.replace(old, new)})


def test_sync(tmp_path, monkeypatch, capsys):
    """--sync writes one script's blocks over the others', says so, and touches nothing else; a lost marker is reported."""
    a = SHARED_X + "def f():\n    return 1\n# === end shared: x ===\n"
    (tmp_path / "a.py").write_text(a)
    (tmp_path / "b.py").write_text("B = 1\n" + a.replace("return 1", "return 2\n\n") + "C = 2\n")
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    monkeypatch.setitem(globals(), "SCRIPTS", ["a.py", "b.py"])
    assert sync("a.py") == [] and (tmp_path / "b.py").read_text() == "B = 1\n" + a + "C = 2\n"
    assert capsys.readouterr().out == "b.py: replaced x\n"
    (tmp_path / "b.py").write_text("C = 2\n")
    assert sync("a.py") == ["b.py: no block x; write its two marker lines where it belongs"]


@pytest.mark.parametrize("name, limit", [
    ("grpo_video.py", 1000), ("sft_video.py", 800), ("eval_video.py", 800), ("test_smoke.py", 600)])
def test_scripts_are_short(name, limit):
    """A script is read in one sitting."""
    lines = (ROOT / name).read_text().splitlines()
    assert len(lines) < limit and [f"{name}:{i}" for i, line in enumerate(lines, 1) if len(line) > 132] == []


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] != "--sync" or sys.argv[2] not in SCRIPTS:
        sys.exit(__doc__)
    sys.exit("\n".join(sync(sys.argv[2])) or 0)
