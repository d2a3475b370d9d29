"""The algorithm and the model at length, with a test for each trap of docs/deviations.md.

transformers run the plain way and float64 loops are the oracles. test_smoke.py has the golden
numbers and the short version.
"""

import json
import math
import os
import random
import re
import shutil
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file
from torch.nn.attention.bias import CausalBias
from transformers import AutoConfig, AutoTokenizer, Qwen2VLForConditionalGeneration, get_scheduler

import grpo_video
from grpo_video import (
    Config,
    Group,
    answer_tokens,
    completion_mask,
    entropy_of,
    finished_rows,
    generate,
    group_advantages,
    judge,
    k3_kl,
    learning_rate_at,
    load_model,
    make_optimizer,
    mrope_positions,
    open_run,
    optimizer_step,
    policy_loss,
    reward_of,
    rollout,
    rollout_metrics,
    save_model,
    set_up,
)
from test_smoke import (
    CLIP,
    CPU,
    END,
    IMAGE,
    OTHER_END,
    STILL,
    TINY,
    TINY_VISION,
    VIDEO,
    collate,
    make_group,
    make_sample,
    random_completions,
    run_update,
    transformers_gradients,
    transformers_logits,
    transformers_logp,
)
from tools import analyze

ENDS = [END, OTHER_END]
LONG = (3, CLIP, 2, STILL, 5)  # the parts of a prompt, as make_sample takes them
SHORT = (4, STILL, 1)
SETTINGS = dict(
    num_generations=4,
    max_completion_length=6,
    temperature=1.0,
    seed=5,
    format_reward_weight=0.0,
    consistency_weight=0.0,
    consistency_cap=0.95,
    consistency_margin=0.0,
    scale_rewards=True,
    mask_truncated_completions=False,
)


def relative(ours, theirs):
    return float((ours - theirs).norm() / theirs.norm())


# ---- The forward ---------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "changes",
    [
        dict(tie_word_embeddings=False),
        dict(num_key_value_heads=1),
        dict(num_key_value_heads=4),
        dict(hidden_size=32, rope_scaling=dict(type="mrope", mrope_section=[2, 1, 1])),
        dict(rope_theta=1e6),
        dict(rope_scaling=dict(type="mrope", mrope_section=[4, 2, 2])),
        dict(num_hidden_layers=3, rms_norm_eps=1e-2),
        dict(vision_config=dict(embed_dim=48, num_heads=2, mlp_ratio=2, depth=3)),
    ],
    ids=str,
)
def test_parity_over_configs(tiny_model, changes):
    """A size, a head count, a rope setting or the untied head does not come from the config."""
    _, hf, model = tiny_model(**changes)
    samples = [make_sample(model.config, *parts) for parts in (LONG, SHORT)]
    completions = random_completions(2, 2, 4)
    with torch.no_grad():
        theirs = transformers_logits(hf, samples, completions)
        states = model.completion_states(collate(*samples), completions)
        ours = model.logits(states).view_as(theirs)
    assert (ours - theirs).abs().max() <= 1e-5


@pytest.mark.parametrize(
    "media",
    [
        [("image", (1, 2, 2))],
        [("image", (1, 12, 2))],
        [("video", (4, 2, 8))],
        [("video", (1, 8, 8)), ("image", (1, 2, 10))],
        [("image", (1, 4, 4)), ("video", (2, 6, 4)), ("image", (1, 2, 4)), ("video", (1, 2, 2))],
    ],
    ids=str,
)
@pytest.mark.parametrize("G, C", [(1, 1), (1, 6), (4, 1), (3, 4)])
def test_parity_over_grids(tiny_model, media, G, C):
    """A vision grid's shape, an order of media, one completion or one token is a special case."""
    _, hf, model = tiny_model()
    parts = [2]
    for medium in media:
        parts += [medium, 1]
    sample = make_sample(model.config, *parts, 3)
    completions = random_completions(1, G, C)
    with torch.no_grad():
        ours = model(collate(sample), completions)
        theirs = transformers_logp(hf, [sample], completions)
    assert (ours - theirs).abs().max() <= 1e-5


def test_text_beside_video_in_a_batch(tiny_model):
    """A prompt without any media takes the features of its neighbour in the batch."""
    _, hf, model = tiny_model()
    samples = [make_sample(model.config, *parts) for parts in ((20,), LONG, (1,))]
    completions = random_completions(3, 2, 4)
    with torch.no_grad():
        ours = model(collate(*samples), completions)
        theirs = transformers_logp(hf, samples, completions)
    assert (ours - theirs).abs().max() <= 1e-5


def test_parity_of_small_activations(tiny_model):
    """A norm of the vision tower has another eps, which only small activations show."""
    _, hf, model = tiny_model()
    for visual in (hf.model.visual, model.visual):
        for name, p in visual.named_parameters():
            if re.search("patch_embed|attn.proj|fc2", name):
                p.data *= 0.02

    sample = make_sample(model.config, *LONG)
    completions = random_completions(1, 2, 4)
    with torch.no_grad():
        ours = model(collate(sample), completions)
        theirs = transformers_logp(hf, [sample], completions)
    assert (ours - theirs).abs().max() <= 1e-5


# A grid (t, h, w) in patches; the (t, h, w) positions of its placeholders, after one word at 0; the
# position of the next word; whether transformers' rule gives the same.
# fmt: off
MROPE = [
    ((2, 4, 4), [(1, 1, 1), (1, 1, 2), (1, 2, 1), (1, 2, 2),
                 (2, 1, 1), (2, 1, 2), (2, 2, 1), (2, 2, 2)], 3, True),
    ((1, 2, 6), [(1, 1, 1), (1, 1, 2), (1, 1, 3)],            4, True),
    ((2, 4, 2), [(1, 1, 1), (1, 2, 1),
                 (2, 1, 1), (2, 2, 1)],                       3, True),
    ((3, 2, 2), [(1, 1, 1), (2, 1, 1), (3, 1, 1)],            4, False),  # transformers: 2
    ((3, 4, 2), [(1, 1, 1), (1, 2, 1),
                 (2, 1, 1), (2, 2, 1),
                 (3, 1, 1), (3, 2, 1)],                       4, False),  # transformers: 3
]
# fmt: on


@pytest.mark.parametrize("grid, placeholders, after, agrees", MROPE)
def test_mrope_rule(tiny_model, grid, placeholders, after, agrees):
    """After a vision block the text goes on at the maximum over t, h and w, plus 1.

    transformers leaves t out (docs/deviations.md).
    """
    _, hf, model = tiny_model()
    ids = torch.tensor([5] + [VIDEO] * len(placeholders) + [6, 7])
    ours = mrope_positions(ids.tolist(), [grid], model.config)
    assert ours.T.tolist() == [[0] * 3, *map(list, placeholders), [after] * 3, [after + 1] * 3]

    kinds = 2 * (ids == VIDEO).long()  # 0 text, 2 video
    grids = torch.tensor([grid])
    theirs, _ = hf.model.get_rope_index(ids[None], kinds[None], video_grid_thw=grids)
    assert torch.equal(theirs[:, 0], ours) == agrees


def test_mrope_of_adjacent_videos(tiny_model):
    """Two videos with no token between them are taken for one.

    Right is (1, 2, 4) at 0..1, then (1, 2, 2) at 2, then text at 3.
    """
    config = tiny_model()[2].config
    ours = mrope_positions([VIDEO, VIDEO, IMAGE, 5], [(1, 2, 4), (1, 2, 2)], config)
    assert ours.T.tolist() == [[0, 0, 0], [0, 0, 1], [2, 2, 2], [3, 3, 3]]


def test_parity_where_the_mrope_rules_differ(tiny_model):
    """Given the trained rule's positions, transformers agrees on a long video; else it does not."""
    _, hf, model = tiny_model()
    sample = make_sample(model.config, 2, ("video", (5, 4, 2)), 3)
    completions = random_completions(1, 2, 4)
    after = sample["positions"].max() + 1 + torch.arange(4).expand(3, -1)
    positions = torch.cat((sample["positions"], after), 1)[:, None].expand(-1, 2, -1)
    with torch.no_grad():
        ours = model(collate(sample), completions)
        given = transformers_logp(hf, [sample], completions, position_ids=positions)
        own = transformers_logp(hf, [sample], completions)
    assert (ours - given).abs().max() <= 1e-5
    assert (ours - own).abs().max() > 1e-3


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_chunked_logits(tiny_model, temperature):
    """Log-probs, entropies or gradients change when the logits are made a few rows at a time."""
    _, _, model = tiny_model()
    prompts = collate(make_sample(model.config, *SHORT))
    completions = random_completions(1, 5, 6)
    pieces = []  # rows of each call
    make_logits = model.logits

    def watch(states):
        pieces.append(len(states))
        return make_logits(states)

    def run():
        model.zero_grad()
        logp, entropy = model(prompts, completions, temperature, statistic=entropy_of)
        (logp * torch.linspace(-1, 1, 30).view(1, 5, 6)).sum().backward()
        return logp.detach(), entropy, *(p.grad for p in model.parameters())

    model.logits = watch
    whole = run()
    assert pieces == [30]

    model.config.text_config.vocab_size = 2**27 // 7  # what forward sizes its pieces by
    chunked = run()
    assert pieces[1:6] == [7, 7, 7, 7, 2]
    assert sum(pieces[1:]) == 60  # the backward pass makes each again
    for a, b in zip(chunked, whole):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


# ---- Checkpoints ---------------------------------------------------------------------------------
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("layout", ["flat config", "nested config", "shards"])
def test_checkpoint_layouts(tiny_model, tmp_path, layout, tied):
    """A folder of the hub or of transformers' loads with other weights or settings.

    The hub's has a flat config.json, and shards with an index.
    """
    folder, hf, _ = tiny_model(tie_word_embeddings=tied)
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    assert ("lm_head.weight" in tensors) != tied

    if layout == "flat config":
        config = TINY | dict(
            tie_word_embeddings=tied, model_type="qwen2_vl", vision_config=TINY_VISION
        )
    assert ("text_config" in config) == (layout != "flat config")
    (tmp_path / "config.json").write_text(json.dumps(config))

    sharded = layout == "shards"
    save_torch_state_dict(tensors, tmp_path, max_shard_size="100KB" if sharded else "1GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == sharded
    assert (len([*tmp_path.iterdir()]) > 2) == sharded

    model = load_model(tmp_path, CPU, torch.float32)
    sample = make_sample(model.config, *LONG)
    completions = random_completions(1, 2, 4)
    with torch.no_grad():
        ours = model(collate(sample), completions)
        theirs = transformers_logp(hf, [sample], completions)
    assert (ours - theirs).abs().max() <= 1e-5


@pytest.mark.parametrize(
    "edit, words",
    [
        (lambda t: t.pop("model.norm.weight"), ["model.norm.weight", "missing"]),
        (lambda t: t.update(surplus=torch.zeros(2)), ["surplus", "absent"]),
        (
            lambda t: t.update({"visual.merger.ln_q.bias": torch.zeros(7)}),
            ["visual.merger.ln_q.bias", "7", "32"],
        ),
    ],
    ids=["missing", "extra", "misshapen"],
)
@pytest.mark.parametrize("size, files", [("1GB", 1), ("100KB", 5)], ids=["one file", "shards"])
def test_a_wrong_tensor_is_named(tiny_model, capsys, size, files, edit, words):
    """A checkpoint that does not fit loads in part, or fails without saying which tensor."""
    folder, _, _ = tiny_model()
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    (folder / "model.safetensors").unlink()
    save_torch_state_dict(tensors, folder, max_shard_size=size)
    assert len([*folder.glob("*.safetensors")]) >= files

    capsys.readouterr()  # transformers' progress bar
    with pytest.raises(SystemExit) as end:
        load_model(folder, CPU, torch.float32)
    error = capsys.readouterr().err
    assert end.value.code == 2, error
    assert error.count("\n") == 1, error
    assert all(word in error for word in [str(folder), *words]), error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["the hub's", "version 5's"])
def test_saved_model_loads_in_transformers(toy, tmp_path, dtype, form):
    """What save_model writes lacks something, has other names, or is rounded.

    It would be rounded where config.json tells a wrong type. The file is the source's own, with the
    run and the type: what transformers 5 would make of it, version 4 can't read.
    """
    source = toy / "init"
    name = str(dtype).removeprefix("torch.")
    told = json.loads((source / "config.json").read_text())
    if form == "the hub's":
        expected = told | dict(torch_dtype=name)
    else:
        source = shutil.copytree(source, tmp_path / "source")
        AutoConfig.from_pretrained(source).save_pretrained(source)
        told = json.loads((source / "config.json").read_text())
        told["text_config"]["dtype"] = told["dtype"] = "bfloat16"
        (source / "config.json").write_text(json.dumps(told))
        told["text_config"]["dtype"] = told["dtype"] = name
        expected = told

    model = load_model(source, CPU, torch.float32)
    model.config.dtype = dtype
    with torch.no_grad():
        for p in model.parameters():
            p += 0.01 * torch.randn_like(p)
    out = tmp_path / "out"
    settings = Config(output_dir=str(out), seed=3)
    set_up(False)
    try:
        optimizer = make_optimizer(settings, model)
        assert open_run(settings, model, optimizer, source, [], [], 1, 1) == 0
        save_model(model, out)
    finally:
        torch.distributed.destroy_process_group()

    # The settings and the weights.
    hf = Qwen2VLForConditionalGeneration.from_pretrained(out)
    assert hf.dtype == dtype
    config = json.loads((out / "config.json").read_text())
    assert config.pop("run")["seed"] == 3
    assert config == expected
    saved = load_file(out / "model.safetensors")
    expected = {name: p.to(dtype).tolist() for name, p in model.state_dict().items()}
    assert {name: p.tolist() for name, p in saved.items()} == expected

    # The tokenizer.
    tokenizer = AutoTokenizer.from_pretrained(out)
    old = AutoTokenizer.from_pretrained(toy / "init")
    chat = [dict(role="user", content=[dict(type="video"), dict(type="text", text="what next?")])]
    options = dict(tokenize=False, add_generation_prompt=True)
    text = tokenizer.apply_chat_template(chat, **options)
    assert text == old.apply_chat_template(chat, **options)
    assert "<|video_pad|>" in text
    assert tokenizer(text).input_ids == old(text).input_ids

    # What they compute.
    again = load_model(out, CPU, dtype).float()
    sample = make_sample(model.config, *LONG)
    completions = random_completions(1, 2, 4)
    with torch.no_grad():
        before = model(collate(sample), completions)
        ours = again(collate(sample), completions)
        theirs = transformers_logp(hf.float(), [sample], completions)
    assert (ours - theirs).abs().max() <= 1e-5
    assert torch.equal(ours, before) == (dtype == torch.float32)


# ---- Advantage, KL and loss against loops in float64 ---------------------------------------------
def test_advantages_against_a_loop():
    """The vectorised advantage takes a mean or a standard deviation over a wrong dimension."""
    rewards = torch.rand(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scaled = group_advantages(rewards, True).tolist()
    centred = group_advantages(rewards, False).tolist()
    for i, group in enumerate(rewards.tolist()):
        mean = sum(group) / 7
        std = math.sqrt(sum((r - mean) ** 2 for r in group) / 6)
        assert scaled[i] == pytest.approx([(r - mean) / (std + 1e-4) for r in group], abs=1e-12)
        assert centred[i] == pytest.approx([r - mean for r in group], abs=1e-12)


def plain_loss(
    logp,
    old_logp,
    ref_logp,
    lengths,
    advantages,
    loss_type,
    max_length,
    epsilon,
    epsilon_high,
    beta,
):
    """The step's loss, token by token as docs/algorithm.md has it.

    The log-probs are nested lists or tensors [B][G][C], lengths and advantages [B][G].
    """
    sequences = sum(len(group) for group in lengths)
    tokens = sum(map(sum, lengths))
    total = 0.0
    for b, group in enumerate(lengths):
        for g, length in enumerate(group):
            A = advantages[b][g]
            shares = dict(grpo=length * sequences, dapo=tokens, dr_grpo=sequences * max_length)
            for t in range(length):
                ratio = torch.exp(logp[b][g][t] - old_logp[b][g][t])
                clipped = min(max(ratio, 1 - epsilon), 1 + epsilon_high)
                surrogate = min(ratio * A, clipped * A)
                d = ref_logp[b][g][t] - logp[b][g][t]
                kl = torch.exp(d) - d - 1
                total = total - (surrogate - beta * kl) / shares[loss_type]
    return total


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_loss_against_a_loop(loss_type):
    """Advantage, ratio, clip, KL or weight of a token meets another token's."""
    rng = torch.Generator().manual_seed(0)
    logp, old_logp, ref_logp = torch.randn(3, 2, 4, 5, dtype=torch.float64, generator=rng)
    advantages = torch.randn(2, 4, dtype=torch.float64, generator=rng)
    lengths = [[5, 1, 3, 2], [4, 5, 2, 1]]
    mask = torch.arange(5) < torch.tensor(lengths)[..., None]

    weights = grpo_video.token_weights(mask, loss_type, 8, 23, 9)
    per_token, clipped = policy_loss(logp, old_logp, advantages, 0.1, 0.3)
    ours = (weights * (per_token + 0.04 * k3_kl(logp, ref_logp))).sum()
    theirs = plain_loss(logp, old_logp, ref_logp, lengths, advantages, loss_type, 9, 0.1, 0.3, 0.04)
    assert float(ours) == pytest.approx(float(theirs), rel=1e-6)
    assert 0 < clipped.float().mean() < 1


def test_entropy_against_a_loop():
    """The logged entropy is not -Σ p log p at the sampling temperature."""
    logits = torch.randn(4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours = entropy_of(logits, logits.logsumexp(-1), None).tolist()
    for entropy, probs in zip(ours, logits.softmax(-1).tolist(), strict=True):
        assert entropy == pytest.approx(-sum(p * math.log(p) for p in probs), abs=1e-12)


# ---- The update against transformers run the plain way -------------------------------------------
def step_inputs(model, G=3, C=5):
    """Two prompts of different lengths, completions that end at different places, advantages."""
    samples = [make_sample(model.config, *parts, seed=i) for i, parts in enumerate((LONG, SHORT))]
    completions = random_completions(2, G, C)
    lengths = [[5, 2, 3], [1, 5, 4]]
    advantages = torch.tensor([[1.1, -0.4, -0.7], [-1.2, 0.5, 0.9]])
    ref_logp = -6 + 0.5 * torch.randn(2, G, C, generator=torch.Generator().manual_seed(1))
    return samples, completions, lengths, advantages, ref_logp


def groups_of(parts, samples, completions, lengths, advantages, ref_logp):
    """The step cut into micro-batches: `parts` are lists of prompt numbers."""
    mask = torch.arange(completions.shape[2]) < torch.tensor(lengths)[..., None]

    groups = []
    for part in parts:
        group = Group(
            prompts=collate(*(samples[b] for b in part)),
            completions=completions[part],
            said=mask[part],
            mask=mask[part],
            samples=[],
            advantages=advantages[part],
            ref_logp=ref_logp[part],
        )
        groups.append(group)
    return groups


def plain_update(hf, inputs, loss_type, num_iterations, rate):
    """Plain gradient descent on transformers' model -> (the last loss, {name: Σ of gradients})."""
    samples, completions, lengths, advantages, ref_logp = inputs
    old_logp = None
    summed = {}

    for _ in range(num_iterations):
        logp = transformers_logp(hf, samples, completions)
        if old_logp is None:
            old_logp = logp.detach()
        loss = plain_loss(
            logp, old_logp, ref_logp, lengths, advantages, loss_type, 7, 0.02, 0.03, 0.1
        )
        hf.zero_grad()
        loss.backward()

        for name, grad in transformers_gradients(hf).items():
            summed[name] = summed.get(name, 0) + grad
        with torch.no_grad():
            for p in hf.parameters():
                p -= rate * p.grad
    return float(loss.detach()), summed


@pytest.mark.parametrize("num_iterations", [1, 2])
@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_update_is_the_plain_one(tiny_model, loss_type, num_iterations):
    """Trap 15: a loss averaged per micro-batch depends on how the step is cut.

    All cuts must move every parameter as transformers does with one row per completion and a loss
    written token by token; the second pass has ratios other than 1.
    """
    folder, hf, model = tiny_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    inputs = step_inputs(model)
    rate = 0.05
    expected, theirs = plain_update(hf, inputs, loss_type, num_iterations, rate)

    for parts in ([[0, 1]], [[0], [1]], [[1], [0]]):
        model = load_model(folder, CPU, torch.float32)
        groups = groups_of(parts, *inputs)
        loss, _ = run_update(
            model,
            groups,
            rate,
            beta=0.1,
            loss_type=loss_type,
            max_completion_length=7,
            epsilon=0.02,
            epsilon_high=0.03,
            num_iterations=num_iterations,
        )
        assert loss == pytest.approx(expected, abs=1e-5)
        assert any(group.clip_ratio.any() for group in groups) == (num_iterations == 2)
        for name, p in model.named_parameters():
            moved = (before[name] - p.detach()) / rate
            assert relative(moved, theirs[name]) < 2e-3, (parts, name)


def test_gradient_checkpointing_changes_nothing(tiny_model):
    """A recomputed layer gives other gradients, or checkpointing is not on at all."""
    folder, _, _ = tiny_model()
    gradients = []
    calls = []
    for on in (False, True):
        model = load_model(folder, CPU, torch.float32)
        model.gradient_checkpointing = on
        for layer in (*model.model.layers, *model.visual.blocks):
            layer.register_forward_pre_hook(lambda *_, on=on: calls.append(on))
        prompts = collate(*(make_sample(model.config, *parts) for parts in (LONG, SHORT)))
        model(prompts, random_completions(2, 3, 4)).sum().backward()
        gradients.append([p.grad for p in model.parameters()])

    assert calls.count(False) == 4
    assert calls.count(True) == 8
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_equal_rewards(tiny_model, beta):
    """Without any advantage and KL term a step runs a backward pass, or moves the weights.

    With a KL term it does not learn.
    """
    _, _, model = tiny_model()
    group = make_group(model, [0.0, 0.0, 0.0], torch.full((1, 3, 4), -5.0))
    before = [p.detach().clone() for p in model.parameters()]
    backward = []
    model.model.norm.weight.register_hook(backward.append)
    loss, norm = run_update(model, [group], 0.1, beta=beta)

    moved = [not torch.equal(a, b) for a, b in zip(before, model.parameters())]
    assert math.isfinite(loss)
    assert (norm > 0) == any(moved) == bool(backward) == (beta > 0)
    assert not (beta == 0 and loss != 0)


def test_an_empty_place_has_no_weight(tiny_model):
    """An unreadable sample's empty micro-batch adds to the loss or a denominator, or gives NaN."""
    folder, _, _ = tiny_model()
    settings = SimpleNamespace(**SETTINGS)
    updated = []
    for empty in (False, True):
        model = load_model(folder, CPU, torch.float32)
        groups = groups_of([[0], [1]], *step_inputs(model))
        if empty:
            nothing = rollout(model, [], settings, ENDS, 0, CPU, torch.float32)
            judge(nothing, settings, None, ENDS, 0)
            nothing.ref_logp = torch.zeros(nothing.completions.shape)
            groups.insert(1, nothing)
        loss, norm = run_update(model, groups, 0.1, beta=0.1, loss_type="dapo")
        if empty:
            assert finished_rows(nothing) == []
        updated.append([loss, norm, *model.parameters()])
    torch.testing.assert_close(*updated, atol=1e-7, rtol=1e-6)

    loss, norm = run_update(model, groups[1:2], 0.1, beta=0.1)
    assert loss == 0
    assert norm == 0


@pytest.mark.parametrize(
    "loss_type, golden",
    [
        # Two completions have ended, of 3 and 1 tokens: each has 1/2, over its tokens.
        ("grpo", [[1 / 6, 1 / 6, 1 / 6, 0], [0] * 4, [1 / 2, 0, 0, 0], [0] * 4]),
        # 1 over all 3 + 1 tokens
        ("dapo", [[1 / 4, 1 / 4, 1 / 4, 0], [0] * 4, [1 / 4, 0, 0, 0], [0] * 4]),
        # 1 over 2 completions x the length of 4
        ("dr_grpo", [[1 / 8, 1 / 8, 1 / 8, 0], [0] * 4, [1 / 8, 0, 0, 0], [0] * 4]),
    ],
)
def test_truncated_completions_are_masked(tiny_model, monkeypatch, loss_type, golden):
    """A truncated completion has a loss, or a place in a denominator.

    Or it has none in its group's mean and deviation, or in the logs.
    """
    _, _, model = tiny_model()
    completions = torch.tensor([[[1, 5, END, END], [2, 6, 7, 8], [OTHER_END, 9, 9, 9], [3] * 4]])
    drawn = (completions, torch.zeros(completions.shape))
    monkeypatch.setattr(grpo_video, "generate", lambda *args: drawn)
    samples = [make_sample(model.config, *SHORT) | dict(gold="B")]  # the letter of token 1

    plain, masked = (sampled(model, samples, mask_truncated_completions=on) for on in (False, True))
    run_update(model, [masked], 0.0, loss_type=loss_type)
    torch.testing.assert_close(masked.weight[0], torch.tensor(golden))
    assert torch.equal(masked.advantages, plain.advantages)
    assert torch.equal(masked.said, plain.mask)

    run_update(model, [plain], 0.0, loss_type=loss_type)
    assert finished_rows(masked) == finished_rows(plain)
    assert [x["truncated"] for x in masked.rows[0]["completions"]] == [False, True, False, True]
    assert [x["length"] for x in masked.rows[0]["completions"]] == [3, 4, 1, 4]


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_not_applied(tiny_model, bad):
    """NaN reaches the weights or the moments, or stays in the gradients for the next step."""
    _, _, model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    before = [p.detach().clone() for p in model.parameters()]
    for value in (math.nan, math.inf):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        if bad == "gradient":
            model.model.norm.weight.grad[3] = value
        norm = optimizer_step(model, optimizer, 1e-3, 1.0, value if bad == "loss" else 0.5)
        assert math.isfinite(norm) == (bad == "loss")
        assert not any(optimizer.state.values())
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
        assert all(p.grad is None or not p.grad.any() for p in model.parameters())

    # The next step, a good one, is applied.
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    count = sum(p.numel() for p in model.parameters())
    norm = optimizer_step(model, optimizer, 1e-3, 1.0, 0.5)
    assert norm == pytest.approx(math.sqrt(count), rel=1e-4)
    assert all((b - a).abs().max() > 5e-4 for a, b in zip(before, model.parameters()))


# Of 20 steps; main takes the schedule at steps 0, 5, 10, 15, 19.
RATES = [
    # (20 - s) / 20
    ("linear", 0.0, {0: 1, 5: 0.75, 10: 0.5, 15: 0.25, 19: 0.05}),
    # s / 4, then (20 - s) / 16
    ("linear", 0.2, {0: 0, 3: 0.75, 4: 1, 12: 0.5, 19: 0.0625}),
    # (1 + cos(π s / 20)) / 2
    ("cosine", 0.0, {0: 1, 5: 0.853553, 10: 0.5, 15: 0.146447, 19: 0.006156}),
    # s / 4, then (1 + cos(π (s - 4) / 16)) / 2
    ("cosine", 0.2, {0: 0, 2: 0.5, 4: 1, 12: 0.5, 16: 0.146447}),
    ("constant", 0.2, {0: 1, 3: 1, 4: 1, 12: 1, 19: 1}),
]


def rates(name, warmup, steps, peak=1.0):
    """learning_rate_at of all steps of a run."""
    c = Config(learning_rate=peak, lr_scheduler_type=name, warmup_ratio=warmup)
    return [learning_rate_at(c, step, steps) for step in range(steps)]


@pytest.mark.parametrize("name, warmup, golden", RATES)
def test_learning_rates(name, warmup, golden):
    """The schedule that main asks for warms up or decays otherwise than its flags say."""
    ours = rates(name, warmup, 20)
    assert {step: ours[step] for step in golden} == pytest.approx(golden, abs=1e-6)


@pytest.mark.parametrize("warmup", [0.0, 0.03, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("name", ["linear", "cosine", "constant"])
def test_learning_rates_are_transformers(name, warmup):
    """A rate differs from transformers' schedule in its last bit, somewhere in a whole run."""
    for steps in (2, 7, 20, 150, 1001):
        warm = math.ceil(steps * warmup)
        if warm == steps:  # there ours has its peak, which transformers never reaches
            continue
        for peak in (1.0, 1e-6, 2e-5):
            optimizer = torch.optim.AdamW([torch.zeros(1)], peak)
            schedule = get_scheduler(name, optimizer, warm, steps)
            theirs = [peak * schedule.lr_lambdas[0](step) for step in range(steps)]
            assert rates(name, warmup, steps, peak) == theirs, (steps, peak)


@pytest.mark.parametrize("name", ["linear", "cosine", "constant"])
def test_the_warm_up_never_fills_the_run(name):
    """A warm-up that fills the run never gets to the peak, and a run of one step learns nothing.

    With --max_steps 1 and --warmup_ratio 0.1 the rate is the peak.
    """
    for warmup in (0.0, 0.1, 1.0):
        assert rates(name, warmup, 1) == [1.0]
    warming = [1.0, 1.0, 1.0] if name == "constant" else [0.0, 0.5, 1.0]
    assert rates(name, 1.0, 3) == warming


# ---- The rollouts and what is logged of them -----------------------------------------------------
class LetterTokenizer:
    """Decodes a completion into an answer that its first token decides."""

    def decode(self, ids, skip_special_tokens=True):
        return f"<think>hm</think><answer>{'ABCD'[ids[0] % 4]}</answer>"


def sampled(model, samples, step=0, **changes):
    """rollout() of these samples, read by LetterTokenizer and judged."""
    c = SimpleNamespace(**SETTINGS | changes)
    group = rollout(model, samples, c, ENDS, step, CPU, torch.float32)
    judge(group, c, LetterTokenizer(), ENDS, step)
    return group


def test_rewards_and_log_probs_stay_with_their_prompt(tiny_model):
    """Trap 6: completions stacked generation-major while rewards assume prompt-major.

    With more than one prompt a completion gets another's reward, advantage or log-probs.
    """
    _, hf, model = tiny_model()
    samples = []
    for i, (parts, gold) in enumerate([(LONG, "A"), (SHORT, "B"), ((6,), "C")]):
        samples.append(make_sample(model.config, *parts, seed=i) | dict(gold=gold))
    group = sampled(model, samples, step=3)
    run_update(model, [group], 0.0)
    rows = finished_rows(group)
    assert [row["sample_id"] for row in rows] == [0, 1, 2]
    assert {row["step"] for row in rows} == {4}

    drawn = []
    for b, (sample, row) in enumerate(zip(samples, rows)):
        rewards = []
        for i, x in enumerate(row["completions"]):
            assert group.completions[b, i, : x["length"]].tolist() == x["ids"]
            with torch.no_grad():
                logp = transformers_logp(hf, [sample], torch.tensor([[x["ids"]]]))
            assert x["logprob_sum"] == pytest.approx(float(logp.sum()), abs=1e-4)
            rewards.append(float("ABCD"[x["ids"][0] % 4] == sample["gold"]))
            drawn.append(tuple(x["ids"]))
        assert [x["reward"] for x in row["completions"]] == rewards
        expected = group_advantages(torch.tensor([rewards]), True)[0].tolist()
        assert group.advantages[b].tolist() == expected
        assert [x["advantage"] for x in row["completions"]] == expected
    assert len(set(drawn)) == 12  # all different


def test_rollouts_depend_on_seed_step_and_sample(tiny_model):
    """A prompt's completions change with its place in the batch or with its neighbours.

    Or they stay the same from step to step.
    """
    _, _, model = tiny_model()
    samples = [make_sample(model.config, *parts, seed=i) for i, parts in enumerate((LONG, SHORT))]

    def ids(samples, **changes):
        found = {}
        for row in sampled(model, samples, **changes).rows:
            found[row["sample_id"]] = [x["ids"] for x in row["completions"]]
        return found

    both = ids(samples)
    assert both == ids(samples[::-1])
    assert both == ids(samples[:1]) | ids(samples[1:])
    assert ids(samples, step=1)[0] != both[0]
    assert ids(samples, seed=6)[0] != both[0]


def test_the_gap_between_drawn_and_scored(tiny_model):
    """A token's log-prob when it was drawn is compared with another token's, or padding counts.

    Of the policy that sampled the gap is rounding alone; what is put there by hand is found.
    """
    _, _, model = tiny_model()
    samples = [make_sample(model.config, *parts, seed=i) for i, parts in enumerate((LONG, SHORT))]
    group = sampled(model, samples)
    run_update(model, [group], 0.0)
    for row in finished_rows(group):
        assert all(0 <= x["logprob_gap_max"] < 1e-5 for x in row["completions"])

    group.mask[0, 1, 2:] = False  # a completion of 2 tokens
    group.sampled_logp[0, 1] = group.old_logp[0, 1] + torch.tensor([0.5, -0.25, 9, 9, 9, 9])
    x = finished_rows(group)[0]["completions"][1]
    assert x["logprob_gap_max"] == pytest.approx(0.5, abs=1e-6)
    assert x["logprob_gap_mean"] == pytest.approx(0.375, abs=1e-6)


def test_rollout_metrics():
    """A mean is taken over prompts where it should be over tokens, or the reverse.

    The numbers are worked by hand.
    """

    def completion(reward, length, kl, **more):
        plain = dict(
            reward=reward,
            length=length,
            ids=[5] * length,
            advantage=reward - 0.5,
            kl=kl,
            entropy=2 * kl,
            clip_ratio=0.0,
            logprob_gap_mean=kl / 10,
            logprob_gap_max=kl,
            answer="A",
            truncated=False,
        )
        return plain | more

    first = [completion(1.0, 3, 0.1), completion(0.0, 1, 0.5, truncated=True)]
    second = [completion(0.0, 2, 0.0, answer=None), completion(0.0, 4, 0.2)]
    rows = [
        dict(prompt_ids_len=10, completions=first),
        dict(prompt_ids_len=20, completions=second),
    ]
    assert rollout_metrics(rows) == pytest.approx(
        dict(
            reward=0.25,
            reward_std=math.sqrt(0.5) / 2,  # the first group's is sqrt(2 x 0.25), the second's 0
            frac_reward_zero_std=0.5,
            advantage_abs_mean=0.5,
            kl=(0.3 + 0.5 + 0 + 0.8) / 10,
            entropy=2 * 1.6 / 10,
            clip_ratio=0,
            logprob_gap_mean=0.16 / 10,
            logprob_gap_max=0.5,
            completion_length=2.5,
            frac_truncated=0.25,
            frac_no_answer=0.25,
            tokens=40,
        )
    )


@pytest.mark.parametrize(
    "text, reward, answer",
    [
        ("<think>x</think><answer>B. up</answer>", 1.5, "B"),
        (" <think>\n</think>\n<answer>B</answer>\n", 1.5, "B"),
        ("<think>x</think><answer>A. up</answer>", 0.5, "A"),
        ("<answer>B</answer>", 1.0, "B"),
        ("so <think>x</think><answer>B</answer>", 1.0, "B"),
        ("<think>x</think><answer>up</answer>", 0.5, None),
        ("up", 0.0, None),
    ],
)
def test_reward(text, reward, answer):
    """The format's reward comes without the form, or the letter's without the letter."""
    assert reward_of(text, "B", 0.5) == (reward, answer)


# ---- The consistency reward ----------------------------------------------------------------------
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
SAID = [
    "<think>it moves up</think><answer>C. move up</answer>",
    "<think>it moves up</think><answer>C. mo",
    "<think>up</think>\n<answer>\nC\n</answer>\n",
    "<answer>A</answer><think>no</think><answer>B</answer> <answer>C</answer>",
    "<answer>A</answer></think>",
    "<think>up</think>C",
    "<think>up</think><answer></answer>",
    "<think><answer>B",
    "<think>é</think><answer>B é 😀.</answer>",
    "",
]


def test_the_answers_tokens_are_the_analysis(toy):
    """Training and tools/analyze.py take different tokens for the answer.

    Among the texts are tags that share a token with what they enclose, an answer that is cut off,
    several of them, none, and characters of several tokens.
    """
    tokenizer = AutoTokenizer.from_pretrained(toy / "init")
    rng = random.Random(0)
    mixed = ["".join(rng.choices([*TAGS, "B", " move up", "é", "\n"], k=8)) for _ in range(40)]
    found = set()
    for text in SAID + mixed:
        ids = tokenizer(text).input_ids + [tokenizer.eos_token_id]
        for stop in {len(ids), len(ids) - 2} - {-1, 0}:  # a whole one, and one cut off
            text, places = analyze.token_places(tokenizer, ids[:stop])
            _, section, _ = analyze.sections(text, None)
            theirs = analyze.touching(places, section).nonzero()[:, 0].tolist()
            assert answer_tokens(ids[:stop], text, tokenizer).tolist() == theirs, text
            found.add(len(theirs))
    assert len(found) > 5


def test_the_bonus_by_hand(tiny_model, toy):
    """The bonus goes to the wrong completions, into the logged reward, or misses the advantage.

    p is the mean of π_ref over the answer's three tokens, of the whole group.
    """
    _, _, model = tiny_model()
    tokenizer = AutoTokenizer.from_pretrained(toy / "init")
    form = "<think>it moves {}</think><answer>{}. move {}</answer><|im_end|>"
    said = [("up", "C", "up"), ("down", "C", "up"), ("up", "C", "up"), ("up", "B", "right")]
    ids = torch.tensor([[tokenizer(form.format(*words)).input_ids for words in said]])
    assert ids.shape == (1, 4, 9)

    p_ref = torch.full((1, 4, 9), 0.5)
    p_ref[0, :, 4:7] = torch.tensor([[0.9, 1, 1], [0.1, 1, 1], [0.75, 1, 1], [0.3, 0.9, 0.9]])
    sample = make_sample(model.config, 4) | dict(gold="C")
    mask = torch.ones(1, 4, 9, dtype=torch.bool)
    group = Group(collate(sample), ids, mask, mask, [sample], ref_logp=p_ref.log())
    group.sampled_logp = group.old_logp = group.kl = group.entropy = torch.zeros(1, 4, 9)
    group.clip_ratio = mask
    c = SimpleNamespace(**SETTINGS | dict(consistency_weight=0.5, format_reward_weight=0.25))
    judge(group, c, tokenizer, [tokenizer.eos_token_id], 0)

    # Of the right ones p is 2.9/3, at the cap 0.95; 2.1/3 = 0.7; 2.75/3 = 0.916667: the mean is
    # 0.855556. With the format's 0.25 the rewards are 1.75, 1.25, 1.75, 0.25: mean 1.25; squares of
    # 0.25 + 0 + 0.25 + 1, over 3, make a standard deviation of 0.707107.
    [row] = finished_rows(group)
    xs = row["completions"]
    assert [x["bonus"] for x in xs] == [0.5, 0, 0.5, 0]
    assert [x["p_answer_ref"] for x in xs] == pytest.approx([2.9 / 3, 0.7, 2.75 / 3, 0.7])
    assert [x["reward"] for x in xs] == [1.25, 1.25, 1.25, 0.25]
    golden = [0.5 / 0.707207, 0, 0.5 / 0.707207, -1 / 0.707207]
    assert [x["advantage"] for x in xs] == pytest.approx(golden, abs=1e-5)

    means = rollout_metrics([row])
    assert means["bonus"] == 0.25
    assert means["p_answer_ref"] == pytest.approx((2.9 + 2.1 + 2.75 + 2.1) / 12)
    assert means["reward"] == 1.0


# ---- The other traps -----------------------------------------------------------------------------
def test_the_scored_policy_is_the_sampled_one(tiny_model):
    """Trap 2: sampled with top-k or at T, scored with the full softmax at 1.

    Tokens sampled from p have a mean of log p + H(p) of zero only if p is what scores them.
    """
    _, _, model = tiny_model(initializer_range=0.2)
    prompts = collate(make_sample(model.config, *SHORT))
    completions, _ = generate(model, prompts, 1500, 3, ENDS, [0], temperature=1.3)
    mask = completion_mask(completions, ENDS)

    def standard_errors(temperature):
        logp, entropy = model(prompts, completions, temperature, statistic=entropy_of)
        surplus = (logp + entropy)[mask]
        return float(surplus.mean() / surplus.std() * len(surplus) ** 0.5)

    with torch.no_grad():
        assert abs(standard_errors(1.3)) < 3.5
        assert abs(standard_errors(1.0)) > 10
        assert abs(standard_errors(1.6)) > 10


def test_the_mask_ends_where_decoding_stopped(tiny_model):
    """Trap 3: decoding stops at two end tokens, the mask only after one of them.

    All the padding would count as completion.
    """
    _, _, model = tiny_model()
    ends = [7, *range(100, 160)]  # so many that rows end at every place
    completions, _ = generate(model, collate(make_sample(model.config, 5)), 40, 8, ends, [0])
    mask = completion_mask(completions, ends)

    lengths = set()
    for row, keep in zip(completions[0].tolist(), mask[0].tolist()):
        n = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
        assert keep == [i < n for i in range(len(row))]
        assert row[n:] == [ends[0]] * (len(row) - n)
        lengths.add(n)
    assert len(lengths) > 4


def test_the_end_token_learns(tiny_model):
    """Trap 4: pad = end token and a mask `ids != pad`, so that ending is never rewarded.

    Here the filler is the end token too. Rewarding a completion must make its end likelier.
    """
    _, _, model = tiny_model()
    group = make_group(model, [1.0, 1.0, 1.0])
    group.completions = torch.tensor([[[END] * 4, [3, END, END, END], [3, 4, END, END]]])
    group.mask = completion_mask(group.completions, ENDS)
    assert group.mask.int().tolist() == [[[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]]]

    run_update(model, [group], 1e-2)
    with torch.no_grad():
        change = (model(group.prompts, group.completions) - group.old_logp)[0]
    assert change[0, 0] > 0
    assert change[1, 1] > 0
    assert change[2, 2] > 0


def test_padding_is_not_seen(tiny_model):
    """Trap 7: without the padding mask, log-probs and samples depend on the neighbours' length."""
    _, _, model = tiny_model()
    samples = [make_sample(model.config, *parts) for parts in (SHORT, LONG, (1,))]
    completions = random_completions(3, 3, 5)
    scored = model(collate(*samples), completions)
    drawn, _ = generate(model, collate(*samples), 3, 6, ENDS, [1, 2, 3])
    for i, sample in enumerate(samples):
        logp = model(collate(sample), completions[i : i + 1])[0]
        torch.testing.assert_close(logp, scored[i], atol=2e-6, rtol=0)
        alone = generate(model, collate(sample), 3, 6, ENDS, [i + 1])[0][0]
        assert torch.equal(alone, drawn[i, :, : alone.shape[1]])


def test_no_attention_needs_a_dense_mask(tiny_model, monkeypatch):
    """Flash kernels take causal masks alone.

    So prompts of different length meet their completions a length at a time.
    """
    _, _, model = tiny_model()
    samples = [make_sample(model.config, *parts) for parts in (SHORT, LONG, LONG, SHORT)]
    completions = random_completions(4, 3, 5)
    alone = [model(collate(s), group[None]) for s, group in zip(samples, completions)]
    seen = []
    attention = F.scaled_dot_product_attention

    def watch(q, k, v, attn_mask=None, **options):
        seen.append((attn_mask, len(q), k.shape[2]))
        # A CPU has no flash kernel for CausalBias, which makes itself a mask for it.
        with monkeypatch.context() as inside:
            inside.setattr(F, "scaled_dot_product_attention", attention)
            return attention(q, k, v, attn_mask=attn_mask, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watch)
    model(collate(*samples), completions).sum().backward()
    assert all(mask is None or isinstance(mask, CausalBias) for mask, *_ in seen)
    lengths = [len(sample["ids"]) - 1 for sample in samples]
    assert [pair for mask, *pair in seen if mask is not None][:3] == [
        [3, lengths[0] + 5],
        [6, lengths[1] + 5],
        [3, lengths[3] + 5],
    ]

    together = model(collate(*samples), completions)
    torch.testing.assert_close(together, torch.cat(alone), atol=2e-6, rtol=0)


def test_log_softmax_is_fp32(tiny_model):
    """Trap 8: a log-softmax in bf16 has steps of 0.03 at -6: the KL of near policies is noise."""
    folder, _, _ = tiny_model()
    model = load_model(folder, CPU, torch.bfloat16)
    prompts = collate(make_sample(model.config, *LONG))
    prompts.patches = prompts.patches.bfloat16()
    completions = random_completions(1, 4, 6)
    with torch.no_grad():
        logits = model.logits(model.completion_states(prompts, completions))
        logp = model(prompts, completions)
    assert logits.dtype == logp.dtype == torch.float32
    exact = logits.double().log_softmax(-1).gather(1, completions.view(-1, 1)).view_as(logp)
    assert (logp - exact).abs().max() < 1e-5 < 1e-3 < (logp - logp.bfloat16()).abs().max()


def test_kl_clamp_is_an_option():
    """Trap 9: the ±11 clamp, on by default, would not pull a policy far from its reference."""
    defaults = {field.name: field.default for field in grpo_video.fields(Config)}
    assert defaults["kl_clamp"] == 0
    for clamp, pull in ((0.0, 1 - math.exp(12)), (11.0, 0)):
        logp = torch.tensor([-13.0], dtype=torch.float64, requires_grad=True)
        k3_kl(logp, torch.tensor([-1.0], dtype=torch.float64), clamp).backward()
        assert logp.grad.item() == pytest.approx(pull)


def test_a_placeholder_in_a_completion_is_a_word(tiny_model):
    """Trap 12: a policy that emits <|video_pad|> crashes, or takes a frame's feature for it.

    The crash says "features and tokens do not match". Here word 7 has the same embedding, so the
    log-probs of the other tokens must be the same with either.
    """
    folder, hf, model = tiny_model()
    sample = make_sample(model.config, *LONG)
    completions = random_completions(1, 2, 6)
    for pad, column in ((VIDEO, 1), (IMAGE, 3)):
        for embedding in (model.model.embed_tokens, hf.get_input_embeddings()):
            embedding.weight.data[7] = embedding.weight.data[pad]
        written = completions.clone()
        written[:, :, column] = pad
        completions[:, :, column] = 7
        with torch.no_grad():
            ours = model(collate(sample), written)
            theirs = transformers_logp(hf, [sample], completions)
        assert (ours - theirs).abs().max() <= 1e-5

    # With all other tokens as ends, sampling goes on only after a placeholder.
    ends = [token for token in range(400) if token not in (VIDEO, IMAGE)]
    model.model.embed_tokens.weight.data[[VIDEO, IMAGE]] *= 3
    out, _ = generate(model, collate(sample), 200, 6, ends, [0], temperature=2.0)
    emitted = ((out == VIDEO) | (out == IMAGE))[:, :, :-1]
    assert emitted.any()
    assert out.shape[2] > 1
    assert (out[:, :, 1:][~emitted] == ends[0]).all()


def test_decoding_uses_the_cache_under_gradient_checkpointing(tiny_model):
    """Trap 17: gradient checkpointing silently disables the KV cache.

    Each token would recompute everything.
    """
    _, _, model = tiny_model()
    prompts = collate(make_sample(model.config, *LONG))
    free, _ = generate(model, prompts, 3, 5, ENDS, [0])
    rows = []
    decoder = model.decoder

    def watch(x, *rest):
        rows.append(len(x))
        return decoder(x, *rest)

    model.gradient_checkpointing = True
    model.decoder = watch
    assert torch.equal(generate(model, prompts, 3, 5, ENDS, [0])[0], free)
    # The prompt once, then one row a completion, its last token first.
    assert rows == [prompts.ids.shape[1]] + [3] * 5


# What each of two ranks runs, with bf16 weights under FSDP2.
MASTER_WEIGHTS = """
import sys
from functools import partial
from pathlib import Path

import torch

import grpo_video as g
from test_smoke import make_group, run_update

device, _ = g.set_up(False)
shard = partial(g.shard, device=device, dtype=torch.bfloat16)
model = g.load_model(Path(sys.argv[1]), device, torch.float32, shard)
before = {name: g.gathered(p, torch.float32).clone() for name, p in model.state_dict().items()}
group = make_group(model, [[1.0, -0.5, -0.25], [-0.3, 0.7, 0.2]][g.RANK])
group.prompts.patches = group.prompts.patches.bfloat16()

# The gradients are the ranks' mean, not rounded to bf16.
gradients = []
step = g.optimizer_step

def keep_gradients(model, *more):
    gradients.extend(g.gathered(p.grad, torch.float32) for p in model.parameters())
    return step(model, *more)

g.optimizer_step = keep_gradients
loss, norm = run_update(model, [group], 1e-6, torch.optim.AdamW)
assert all((z != z.bfloat16()).any() for z in gradients)
assert norm > 0 and group.old_logp.dtype == torch.float32

# AdamW's first step is the learning rate: bf16 weights would have lost nearly all of it.
kept = 0
count = sum(p.numel() for p in model.parameters())
for name, p in model.named_parameters():
    assert isinstance(p, g.DTensor) and p.dtype == torch.float32, name
    after = g.gathered(p, torch.float32)
    change = (after - before[name]).abs()
    assert 0 < change.max() < 2e-6, (name, change.max())
    kept += int((after.bfloat16() != before[name].bfloat16()).sum())
assert kept < 0.05 * count, (kept, count)
plain = g.rollout_model(model, torch.bfloat16)
assert {p.dtype for p in plain.parameters()} == {torch.bfloat16}

# As where all rewards are equal: no backward pass follows.
g.optimizer_step = step
with torch.no_grad():
    model(group.prompts, group.completions)
sharded = all(isinstance(p, g.DTensor) for p in model.parameters())
assert sharded, "a weight stays gathered, and would outlive an update"

run_update(model, [group], 1.0)
plain = g.rollout_model(model, torch.bfloat16)
with torch.no_grad():
    ours = model(group.prompts, group.completions)
    theirs = plain(group.prompts, group.completions)
assert (ours - theirs).abs().max() < 0.02 < 0.2 < (ours - group.old_logp).abs().max()
print("rank", g.RANK, "kept its small update")
"""


@pytest.mark.slow
def test_small_updates_are_kept(tiny_model, tmp_path):
    """bf16 weights under FSDP2 at learning rate 1e-6 lose their updates to rounding.

    fp32 master weights keep them. Nor may the gradients be reduced in bf16, or a gathered weight
    outlive the update.
    """
    folder, _, _ = tiny_model()
    (tmp_path / "ranks.py").write_text(MASTER_WEIGHTS)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = os.environ | dict(
        PYTHONPATH=str(ROOT), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2"
    )
    ranks = []
    for rank in "01":
        process = subprocess.Popen(
            [sys.executable, tmp_path / "ranks.py", folder],
            env=env | dict(RANK=rank, LOCAL_RANK=rank),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        ranks.append(process)
    for rank, process in enumerate(ranks):
        output, _ = process.communicate()
        assert process.returncode == 0, output
        assert f"rank {rank} kept its small update" in output, output
