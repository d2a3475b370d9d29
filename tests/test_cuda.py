"""What only a GPU can show: its numbers are the CPU's and transformers', and a recorded graph's.

python -m pytest -q tests/test_cuda.py            # minutes on a GPU, skipped without one
python -m pytest -q tests/test_cuda.py -m slow    # the checks themselves, on the CPU
"""

import copy
import json
import math
import os
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file
from test_memory import check_forecast
from test_sampling import prompts_of
from test_toy import rewards, run
from torch.nn.attention import SDPBackend, sdpa_kernel

import grpo_video as g
from test_smoke import (
    CPU,
    make_group,
    random_completions,
    run_update,
    transformers_gradients,
    transformers_logp,
)

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
ON_CUDA = pytest.param(torch.device("cuda", 0), marks=NO_GPU, id="cuda")
ON_CPU = pytest.param(CPU, marks=pytest.mark.slow, id="cpu")
on_each_device = pytest.mark.parametrize("device", [ON_CUDA, ON_CPU])
in_each_type = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@pytest.fixture(scope="module", autouse=True)
def set_up():
    """As a script starts; and transformers' convolution must not round fp32 to TF32."""
    g.set_up(False)
    torch.backends.cudnn.allow_tf32 = False
    yield
    dist.destroy_process_group()


def moved(thing, device):
    """A copy of a group or of prompts, with all tensors on the device."""
    there = copy.copy(thing)
    for name, value in vars(thing).items():
        if isinstance(value, torch.Tensor):
            setattr(there, name, value.to(device))
        if isinstance(value, g.Prompts):
            setattr(there, name, moved(value, device))
    return there


def weights(model):
    """{name: a copy of the whole fp32 weight, on the host}."""
    found = {}
    for name, p in model.named_parameters():
        found[name] = g.gathered(p, torch.float32).cpu().clone()
    return found


# ---- Against transformers ------------------------------------------------------------------------
def numbers(model, logp):
    """-> log-probs, and gradients of a weighted sum of them, as fp32 on the host."""
    noise = torch.randn(logp.shape, generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    (logp.cpu() * noise).sum().backward()
    if isinstance(model, g.Qwen2VL):
        gradients = {name: p.grad for name, p in model.named_parameters()}
    else:
        gradients = transformers_gradients(model)
    return logp.detach().cpu(), {name: p.float().cpu() for name, p in gradients.items()}


def error(found, exact):
    """-> the largest difference of a log-prob, and of a gradient as a share of its norm."""
    shares = []
    for name, gradient in exact[1].items():
        shares.append(float((found[1][name] - gradient).norm() / gradient.norm()))
    return float((found[0] - exact[0]).abs().max()), max(shares)


@on_each_device
@in_each_type
def test_log_probs_and_gradients_are_transformers(tiny_model, device, dtype):
    """In fp32 those of transformers on CPU; in bf16 as near to them as transformers comes there."""
    folder, hf, _ = tiny_model()
    samples = prompts_of(hf)
    completions = random_completions(len(samples), 3, 5)
    exact = numbers(hf, transformers_logp(hf, samples, completions))

    model = g.load_model(folder, device, dtype)
    prompts = g.Prompts.collate(samples, device, dtype)
    ours = error(numbers(model, model(prompts, completions.to(device))), exact)
    if dtype == torch.float32:
        assert ours[0] < 1e-4 and ours[1] < 1e-3
        return

    hf.to(device, dtype)
    theirs = error(numbers(hf, transformers_logp(hf, samples, completions)), exact)
    assert ours[0] < 2 * theirs[0] < 0.5
    assert ours[1] < 2 * theirs[1] < 0.5
    assert ours[0] > 1e-4  # it did compute in bf16


# ---- Decoding ------------------------------------------------------------------------------------
@on_each_device
@in_each_type
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_the_recorded_graph_is_the_eager_step(tiny_model, monkeypatch, device, dtype, temperature):
    """A graph replays old numbers, or reads memory that is another's by now.

    Prompts of different length together and alone, twice each; rows end at different times.
    """
    folder, _, _ = tiny_model()
    model = g.load_model(folder, device, dtype)
    graphs = []
    make_graph = torch.cuda.CUDAGraph

    def make_and_count():
        graphs.append(make_graph())
        return graphs[-1]

    monkeypatch.setattr(torch.cuda, "CUDAGraph", make_and_count)
    samples = prompts_of(model)
    calls = 0
    drawn = []
    for batch, seed in ((samples, 0), (samples[:1], 3), (samples[1:], 3), (samples, 6)):
        prompts = g.Prompts.collate(batch, device, dtype)
        seeds = [seed + i for i in range(len(batch))]
        decode = partial(g.generate, model, prompts, 4, 30, list(range(40)), seeds, temperature)

        with monkeypatch.context() as eager:
            eager.setattr(torch.Tensor, "is_cuda", False)
            expected = decode()
        assert len(graphs) == calls
        for _ in range(2):
            assert torch.equal(decode(), expected)
            calls += device.type == "cuda"
            assert len(graphs) == calls
        drawn.append(expected.flatten().tolist())

    assert all(len(rows) > 4 * 4 for rows in drawn)
    assert (drawn[0] == drawn[3]) == (temperature == 0)


# As the true models: heads of 128 numbers in the text, of 80 in the vision tower.
TRUE_HEADS = dict(
    hidden_size=512,
    num_attention_heads=4,
    rope_scaling=dict(type="mrope", mrope_section=[16, 24, 24]),
    vision_config=dict(embed_dim=160, num_heads=2),
)


@on_each_device
@pytest.mark.parametrize("changes", [{}, TRUE_HEADS], ids=["tiny", "true heads"])
def test_flash_kernels_suffice(tiny_model, device, changes):
    """An attention of the hot path needs a kernel that writes all its scores out."""
    folder, _, _ = tiny_model(**changes)
    model = g.load_model(folder, device, torch.bfloat16)
    model.gradient_checkpointing = True
    samples = prompts_of(model)
    prompts = g.Prompts.collate(samples, device, torch.bfloat16)

    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        completions = g.generate(model, prompts, 4, 6, [399], range(len(samples)))
        logp, entropy = model(prompts, completions, statistic=g.entropy_of)
        logp.sum().backward()
        assert torch.isfinite(logp).all() and torch.isfinite(entropy).all()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters())

        # On CUDA a dense mask does need another; so the kernels were those asked for.
        if device.type == "cuda":
            q = torch.zeros(1, 2, 8, 64, device=device, dtype=torch.bfloat16)
            mask = torch.zeros(8, 8, device=device, dtype=torch.bfloat16)
            with pytest.raises(RuntimeError):
                F.scaled_dot_product_attention(q, q, q, attn_mask=mask)


# ---- Training ------------------------------------------------------------------------------------
def updated(model, device, lr, optimizer=torch.optim.SGD):
    """One update of a model on the device -> (loss, gradient norm, log-probs), its weights."""
    ref_logp = torch.full((1, 3, 4), -6.0)
    group = moved(make_group(model, [1.0, -0.6, -0.4], ref_logp), device)
    loss, norm = run_update(model, [group], lr, optimizer, beta=0.1)
    return (loss, norm, *group.logp.flatten().tolist()), weights(model)


@on_each_device
def test_a_sharded_step_is_the_cpus(tiny_model, device):
    """FSDP2 on one GPU: loss, gradient norm and weights of a step as without it on CPU."""
    folder, _, plain = tiny_model()
    before = weights(plain)
    expected, after = updated(plain, CPU, 0.05)

    wrap = partial(g.shard, device=device, dtype=torch.float32)
    sharded = g.load_model(folder, device, torch.float32, wrap)
    assert isinstance(next(sharded.parameters()), g.DTensor) == (device.type == "cuda")
    found, weights_there = updated(sharded, device, 0.05)
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-4)
    for name, p in after.items():
        moved_by = (p - before[name]).norm()
        assert moved_by > 0
        assert (weights_there[name] - p).norm() < 1e-3 * moved_by, name

    # And the copy that rolls out is those weights.
    copied = weights(g.rollout_model(sharded, torch.float32))
    assert all(torch.equal(p, weights_there[name]) for name, p in copied.items())


@on_each_device
def test_offloading_changes_no_number(tiny_model, device):
    """--offload_optimizer computes as without it: AdamW on the host, all else on the GPU."""
    folder, _, _ = tiny_model()
    results = []
    for offload in (False, True):
        c = g.Config(offload_optimizer=offload)
        model = g.load_sharded(c, folder, device, torch.float32)
        optimizer = g.make_optimizer(c, model)
        home = "cpu" if offload else device.type
        assert {p.device.type for p in model.parameters()} == {home}
        results.append(updated(model, device, 1e-3, lambda *_, made=optimizer: made))

    (found, there), (expected, here) = results
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)
    # AdamW's first step is the learning rate, 1e-3, whatever the gradient; but where that is noise,
    # so is its sign.
    apart = torch.cat([(p - here[name]).abs().flatten() for name, p in there.items()])
    assert apart.max() < 2.1e-3
    assert (apart > 1e-5).float().mean() < 1e-3


@pytest.mark.parametrize("device", [ON_CUDA])
def test_the_toy_learns(base, tmp_path, device):
    """From a blind base model the reward rises, in bf16 on the GPU."""
    run("grpo_video.py", "--toy", "--output_dir", tmp_path)
    reward = rewards(tmp_path)
    assert sum(reward[:10]) / 10 < 0.4
    assert sum(reward[-10:]) / 10 >= 0.75


@on_each_device
def test_a_checkpoint_resumes_on_cpu(base, tmp_path, monkeypatch, device):
    """A checkpoint made on a GPU: the CPU goes on from its weights, and from its moments."""
    flags = ["--toy", "--output_dir", tmp_path, "--save_steps", 2]
    flags += ["--lr_scheduler_type", "constant"]  # whose runs may go on beyond their end
    run("grpo_video.py", *flags, "--max_steps", 4)
    there = load_file(tmp_path / "model.safetensors")
    expected = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    assert {p.dtype for p in there.values()} == {expected}

    # No step more, then two.
    monkeypatch.setitem(os.environ, "CUDA_VISIBLE_DEVICES", "")
    resume = [*flags, "--resume_from_checkpoint", "auto"]
    run("grpo_video.py", *resume, "--max_steps", 4)
    here = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(p.to(expected), there[name]) for name, p in here.items())

    run("grpo_video.py", *resume, "--max_steps", 6)
    rows = [json.loads(line) for line in open(tmp_path / "metrics.jsonl")]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)


@pytest.mark.parametrize("device", [ON_CUDA])
def test_the_forecast_of_memory_holds(device):
    """benchmarks/memory.py's forecast against what is allocated on the GPU."""
    check_forecast(1)
