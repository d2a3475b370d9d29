"""A GRPO step of grpo_video.py beside the three ways it is otherwise done.

All have the same random weights, tokens and loss.

    python benchmarks/grpo_step.py       # 47M parameters, CPU: under 5 minutes on two cores
    python benchmarks/grpo_step.py --sweep --repetitions 1   # how the cost grows with P, G and C
    python benchmarks/grpo_step.py --peer trl                # and TRL's GRPOTrainer, if installed
    python benchmarks/grpo_step.py --size tiny --prompts 16  # 16 prompts together, and one by one
    python benchmarks/grpo_step.py --device cuda --size 2b --gradient_checkpointing

ours                 grpo_video.py: the prompt once for its group of G, logits at the completions
                     alone, entropies too.
released             as the released code does it, with transformers: G calls of `generate`, one row
                     each; then G rows of prompt and completion, the pixels G times, logits at every
                     position, log_softmax row by row.
repeated rows        one `generate` over G equal rows; then released's forward.
completions' logits  repeated rows, but logits at the last C + 1 positions alone, as newer versions
                     of TRL make them.
TRL                  with --peer trl alone, the trainer itself: peer_trl.py says what of it is run.

All have a KV cache, SDPA attention, no dropout, sample at temperature 1 without top-k and top-p,
and write exactly C tokens. On CUDA the baselines' log_softmax is in bf16, as in the released code,
and ours in fp32: log-probs differ by that too.

Phases: the rollout; the reference's forward; the policy's forward, loss and backward. The step is
their sum, without optimizer or data. Times are medians of interleaved repetitions, after a small
warm-up. What two ways share is run once for both, and what released and repeated rows alone run, in
one of three repetitions: it takes minutes. Memory is a phase's highest peak above what was there
before it: allocated on CUDA; on CPU resident, where Linux resets the high-water mark and glibc
returns what is free.

Dimensions: B prompts, G completions of each, P prompt tokens, C completion tokens, D width,
V vocabulary.
"""

import argparse
import ctypes
import itertools
import json
import math
import os
import platform
import re
import statistics
import sys
import time
from collections import defaultdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import GenerationConfig, Qwen2VLConfig, Qwen2VLForConditionalGeneration

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import grpo_video as g

PHASES = ROLLOUT, REFERENCE, POLICY = "rollout", "reference forward", "policy forward + backward"
WAYS = OURS, RELEASED, REPEATED, KEPT = "ours", "released", "repeated rows", "completions' logits"
TRL = "TRL"
TRL_VERSION = "1.16.0"  # whose private methods peer_trl.py calls
SLOW = {RELEASED, REPEATED}  # what they alone run, is run in one of three repetitions


class Size(NamedTuple):
    D: int
    layers: int
    heads: int
    key_value_heads: int
    ffn: int
    V: int
    tied: bool
    tower: tuple  # the vision tower's depth, width and heads
    clip: tuple  # patches of a video (t, h, w), four of which make a token
    still: tuple  # and of an image
    shapes: list  # P:G:C


CLIP = (8, 18, 18)  # 16 frames of 252 x 252: 648 tokens
STILL = (1, 18, 18)  # an image of 252 x 252: 81 tokens
TRUE = ["933:8:96", "933:8:256"]
SIZES = {
    # The toy's, of 4 frames.
    "tiny": Size(64, 2, 4, 2, 192, 512, True, (2, 48, 4), (2, 4, 4), (1, 4, 4), ["100:8:24"]),
    # With the 2B's vocabulary.
    "mid": Size(256, 6, 4, 2, 704, 151936, True, (4, 224, 4), CLIP, STILL, ["933:8:96"]),
    # As many parameters in wider layers.
    "mid-32k": Size(512, 8, 8, 2, 1408, 32000, True, (4, 320, 4), CLIP, STILL, ["933:8:96"]),
    "2b": Size(1536, 28, 12, 2, 8960, 151936, True, (32, 1280, 16), CLIP, STILL, TRUE),
    "7b": Size(3584, 28, 28, 4, 18944, 152064, False, (32, 1280, 16), CLIP, STILL, TRUE),
}
SWEEP = {
    "G": [(933, G, 96) for G in (4, 8, 16, 32)],
    "C": [(933, 8, C) for C in (64, 128, 256, 512)],
    "P": [(P, 8, 96) for P in (300, 933, 2000, 4000)],
}
SWEEP_LIMIT = 8300  # tokens G * (P + C), up to which a sweep on CPU runs the baselines too


# ---- What all ways are given ----


def make_config(size):
    """A Size -> transformers' configuration of a Qwen2-VL."""
    E = size.D // size.heads
    depth, width, heads = size.tower

    return Qwen2VLConfig(
        vocab_size=size.V,
        hidden_size=size.D,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.key_value_heads,
        intermediate_size=size.ffn,
        tie_word_embeddings=size.tied,
        bos_token_id=None,
        eos_token_id=None,
        image_token_id=size.V - 1,
        video_token_id=size.V - 2,
        rope_theta=1e6,
        max_position_embeddings=32768,
        rope_scaling=dict(type="mrope", mrope_section=[E // 8, 3 * E // 16, 3 * E // 16]),
        initializer_range=size.D**-0.5,
        vision_config=dict(
            depth=depth,
            embed_dim=width,
            num_heads=heads,
            mlp_ratio=4,
            hidden_size=size.D,
            initializer_range=0.05,
        ),
    )


def checkpoint_name(name):
    return name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")


def make_models(size, device, dtype, checkpointing):
    """-> (ours, transformers'): one set of random weights, whose storage they share."""
    torch.manual_seed(0)
    config = make_config(size)
    with torch.device(device):
        hf = Qwen2VLForConditionalGeneration._from_config(
            config, dtype=dtype, attn_implementation="sdpa"
        )
    hf.eval()
    # Else all biases are 0 and all norms 1, and the differences would not see them.
    for p in hf.parameters():
        if p.dim() == 1:
            p.data += 0.1 * torch.randn_like(p)
    if checkpointing:
        hf.gradient_checkpointing_enable(dict(use_reentrant=False))

    with torch.device("meta"):
        ours = g.Qwen2VL(config)
    weights = {checkpoint_name(name): p for name, p in hf.state_dict().items()}
    ours.load_state_dict({name: weights[name] for name in ours.state_dict()}, assign=True)
    ours.gradient_checkpointing = checkpointing
    return ours, hf


def make_sample(config, P, clip, still, seed=0):
    """A sample as VideoDataset's, of P tokens: words, a video, words, an image, words.

    The video is left out if it does not fit.
    """
    rng = torch.Generator().manual_seed(seed)
    V = config.text_config.vocab_size
    sizes = {grid: math.prod(grid) // 4 for grid in (clip, still)}
    grids = [clip, still] if P >= sum(sizes.values()) + 5 else [still]
    words_in_all = P - sum(sizes[grid] for grid in grids)
    words = torch.randint(0, V - 2, (words_in_all,), generator=rng).tolist()

    ids = []
    for n, grid in enumerate(grids):
        placeholder = V - 2 if grid == clip else V - 1
        ids += words[2 * n : 2 * n + 2]
        ids += [placeholder] * sizes[grid]
    ids += words[2 * len(grids) :]

    patches = torch.randint(0, 256, (sum(map(math.prod, grids)), 1176), generator=rng).byte()
    return dict(
        sample_id=seed,
        ids=torch.tensor(ids),
        positions=g.mrope_positions(ids, grids, config),
        patches=patches,
        grids=grids,
    )


def make_case(config, samples, G, C, device, dtype):
    """What all ways are given: prompts, completions [B, G, C], advantages, noise [B, 2, G, C].

    A sample's own seed draws the last three. Completions are words alone: the released code would
    look for a placeholder's pixels (trap 12).
    """

    def draw(function, *size):
        rngs = [torch.Generator().manual_seed(sample["sample_id"]) for sample in samples]
        return torch.stack([function(*size, generator=rng) for rng in rngs]).to(device)

    V = config.text_config.vocab_size
    return SimpleNamespace(
        G=G,
        C=C,
        V=V,
        ids=samples[0]["ids"].to(device),
        prompts=g.Prompts.collate(samples, device, dtype),
        completions=draw(torch.randint, V - 2, (G, C)),
        advantages=g.group_advantages(draw(torch.rand, G), True),
        noise=0.3 * draw(torch.randn, 2, G, C),
    )


# ---- The ways ----


def backward(logp, case, prompts):
    """GRPO's loss of a case in a step of so many prompts, and its backward pass.

    logp [B, G, C] comes back detached. The noise stands for an older policy and another reference:
    at ratio 1 and KL 0 most of the loss has no gradient.
    """
    old_logp, ref_logp = logp.detach() + case.noise.transpose(0, 1)
    per_token, _ = g.policy_loss(logp, old_logp, case.advantages, 0.2, 0.2)
    per_token = per_token + 0.1 * g.k3_kl(logp, ref_logp)
    sequences = prompts * case.G
    mask = torch.ones_like(logp)
    weights = g.token_weights(mask, "grpo", sequences, sequences * case.C, case.C)
    (weights * per_token).sum().backward()
    return logp.detach()


def our_phases(model, cases):
    """The cases, one after the other -> {phase: function}.

    Those of the last two phases return log-probs [prompts, G, C]. If an attention could not take a
    flash kernel, it would end the run.
    """
    prompts = sum(len(case.completions) for case in cases)

    def rollout():
        for case in cases:
            seeds = range(len(case.completions))
            end_ids = [case.V]  # never sampled
            g.generate(model, case.prompts, case.G, case.C, end_ids, seeds)

    def reference():
        return torch.cat([model(case.prompts, case.completions) for case in cases])

    def update(case):
        logp, _ = model(case.prompts, case.completions, 1.0, statistic=g.entropy_of)
        return backward(logp, case, prompts)

    def policy():
        return torch.cat([update(case) for case in cases])

    flash = sdpa_kernel(SDPBackend.FLASH_ATTENTION)
    return {ROLLOUT: flash(rollout), REFERENCE: flash(reference), POLICY: flash(policy)}


def their_inputs(case, completions):
    """The arguments of transformers' model for the case's one prompt before completions [rows, ·].

    Each row has its own copy of the prompt's tokens and pixels.
    """
    rows = len(completions)
    ids = torch.cat((case.ids.expand(rows, -1), completions), dim=1)
    grids = case.prompts.grids
    pieces = case.prompts.patches.split([math.prod(grid) for grid in grids])

    media = {}
    # From the end, as the image is always there and a video before it perhaps.
    for kind, grid, pixels in zip(("image", "video"), grids[::-1], pieces[::-1]):
        name = "pixel_values" if kind == "image" else "pixel_values_videos"
        media[name] = pixels.repeat(rows, 1)
        media[f"{kind}_grid_thw"] = ids.new_tensor([grid] * rows)

    return dict(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=(ids == case.V - 1) + 2 * (ids == case.V - 2),
        **media,
    )


def check_positions(hf, case):
    """transformers' M-RoPE positions of the prompt must be ours."""
    given = their_inputs(case, case.completions.new_empty(1, 0))
    given = {key: value for key, value in given.items() if not key.startswith("pixel")}
    positions, delta = hf.model.get_rope_index(**given)
    last = int(delta) + len(case.ids) - 1
    same = torch.equal(positions[:, :, :-1], case.prompts.positions)
    assert same and last == int(case.prompts.last_position), "M-RoPE differs"


def their_phases(hf, case, rows_at_once, **keep):
    """transformers on the case's one prompt -> {phase: function}, as our_phases.

    So many rows are rolled out at once; `keep` goes to the forward.
    """
    G, C = case.G, case.C
    P = len(case.ids)
    check_positions(hf, case)
    # It names no end token.
    hf.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=C,
        pad_token_id=0,
        use_cache=True,
    )

    def rollout():
        hf.eval()
        for _ in range(G // rows_at_once):
            out = hf.generate(**their_inputs(case, case.completions.new_empty(rows_at_once, 0)))
            assert out.shape == (rows_at_once, P + C), (
                f"{tuple(out.shape)} is not {rows_at_once} rows of {P} + {C} tokens"
            )

    def reference():
        # It checkpoints in training mode alone; all its dropout rates are 0.
        hf.train(torch.is_grad_enabled())
        completions = case.completions[0]
        # The inputs have no name here: their pixels would stay, and count as memory.
        logits = hf(**their_inputs(case, completions), use_cache=False, **keep).logits[:, :-1]
        targets = torch.cat((case.ids.expand(G, -1), completions), dim=1)
        targets = targets[:, -logits.shape[1] :, None]
        rows = []
        for row, target in zip(logits, targets):
            rows.append(row.log_softmax(-1).gather(1, target)[:, 0])
        return torch.stack(rows)[None, :, -C:]

    def policy():
        return backward(reference(), case, 1)

    return {ROLLOUT: rollout, REFERENCE: reference, POLICY: policy}


def four_ways(ours, hf, case):
    """-> {way: (model, {phase: function})}. Repeated rows has no function of its own."""
    released = their_phases(hf, case, 1)
    kept = their_phases(hf, case, case.G, logits_to_keep=case.C + 1)
    return {
        OURS: (ours, our_phases(ours, [case])),
        RELEASED: (hf, released),
        REPEATED: (hf, released | {ROLLOUT: kept[ROLLOUT]}),
        KEPT: (hf, kept),
    }


def trl_way(hf, case, checkpointing):
    """-> (model, {phase: function}) of TRL's trainer."""
    from peer_trl import trl_phases

    return hf, dict(zip(PHASES, trl_phases(hf, case, checkpointing)))


# ---- Measuring ----


def memory(field):
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{field}:\s+(\d+)", status)[1])


def measure(run, device):
    """-> (what run() returns, seconds, peak bytes above those before).

    (None, inf, inf) where the device's memory is too small.
    """
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = memory("VmRSS")

    start = time.perf_counter()
    try:
        result = run()
    except torch.OutOfMemoryError:
        return None, math.inf, math.inf
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() if cuda else memory("VmHWM")
    return result, seconds, peak - before


def distances(model, phase, logp, standard):
    """-> the largest differences of a log-prob and of a gradient to the first way's.

    A gradient's is as a share of its norm. `standard` keeps the first way's log-probs, by phase,
    and its gradients.
    """
    logp_apart = float((logp - standard.setdefault(phase, logp)).abs().max())
    if phase != POLICY:
        return logp_apart, 0

    gradients = {checkpoint_name(name): p.grad for name, p in model.named_parameters()}
    first = standard.setdefault("gradients", gradients)
    shares = []
    for name, gradient in gradients.items():
        shares.append(float((gradient - first[name]).norm() / first[name].norm()))
    return logp_apart, max(shares)


def run_ways(ways, repetitions, device):
    """ways {name: (model, {phase: function})} -> rows, as summarize makes them.

    A function that several ways share is run once for all of them.
    """
    costs = defaultdict(list)  # (phase, way): (seconds, peak) of each run
    apart = {}  # (phase, way): the largest differences of a log-prob and of a gradient
    standard = {}
    for repetition, phase in itertools.product(range(repetitions), PHASES):
        names = defaultdict(list)  # {function: the ways that run it}
        for way, (_, phases) in ways.items():
            names[phases[phase]].append(way)

        for run, sharing in names.items():
            if repetition % 3 and SLOW.issuperset(sharing):
                continue
            for model, _ in ways.values():
                model.zero_grad()
            with torch.set_grad_enabled(phase == POLICY):
                result, seconds, peak = measure(run, device)
            for way in sharing:
                costs[phase, way].append((seconds, peak))

            if phase == ROLLOUT or result is None:
                continue
            model, _ = ways[sharing[0]]
            found = distances(model, phase, result, standard)
            for way in sharing:
                before = apart.get((phase, way), (0, 0))
                apart[phase, way] = tuple(map(max, before, found))
    return summarize(list(ways), costs, apart)


def summarize(ways, costs, apart):
    """-> rows: a dict for each phase, and for their sum, and each way.

    It has the median seconds, of how many runs, the peak bytes, and the largest differences to the
    first way.
    """
    rows = []
    for phase, way in itertools.product(PHASES, ways):
        seconds, peaks = zip(*costs[phase, way])
        logp_apart, gradient_apart = apart.get((phase, way), (None, None))
        rows.append(
            dict(
                phase=phase,
                way=way,
                seconds=statistics.median(seconds),
                runs=len(seconds),
                peak=max(peaks),
                logp_apart=logp_apart,
                gradient_apart=gradient_apart if phase == POLICY else None,
            )
        )

    for way in ways:
        parts = [row for row in rows if row["way"] == way]
        rows.append(
            dict(
                phase="step",
                way=way,
                seconds=sum(row["seconds"] for row in parts),
                runs=min(row["runs"] for row in parts),
                peak=max(row["peak"] for row in parts),
                logp_apart=max(row["logp_apart"] or 0 for row in parts),
                gradient_apart=parts[-1]["gradient_apart"],
            )
        )
    return rows


def seconds_of(rows, phase, way=None):
    """-> the seconds of a phase in a way, or in the first way."""
    return next(
        row["seconds"] for row in rows if row["phase"] == phase and way in (None, row["way"])
    )


# ---- What memory and arithmetic allow ----


def fastest(run, device):
    return min(measure(run, device)[1] for _ in range(5))


def copy_bandwidth(device):
    """-> bytes a second, read and written, of a copy of 1 GiB."""
    x, y = torch.ones(2, 2**28, device=device)
    return 2 * 2**30 / fastest(lambda: y.copy_(x), device)


def product_rate(n, device, dtype):
    """-> floating point operations a second of a product of n x n matrices."""
    a = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n**3 / fastest(lambda: a @ a, device)


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def decoding_numbers(model, case):
    """-> numbers that decoding the tokens from the third on must read.

    All text weights, and the keys and values, once for each token.
    """
    G, C, c = case.G, case.C, model.config.text_config
    P = len(case.ids)
    weights = parameters(model.model.layers) + c.vocab_size * c.hidden_size
    a_position = 2 * c.num_hidden_layers * c.num_key_value_heads * model.model.layers[0].E
    positions = sum(P + G * t for t in range(3, C + 1))
    return (C - 2) * weights + a_position * positions


def policy_products(model, case, shared=True):
    """-> multiplications of the policy's forward in matrix products.

    On unique tokens, where the prompt is shared, or on G whole rows; logits at the completions.
    """
    G, C, c = case.G, case.C, model.config.text_config
    P = len(case.ids)
    head = c.vocab_size * c.hidden_size * G * C
    prompts = 1 if shared else G
    rows = P - 1 + G * C if shared else G * (P + C)
    text = parameters(model.model.layers) * rows

    # Of a query and a key, times the width; a query meets half of its own text on average.
    pairs = c.num_hidden_layers * c.hidden_size * (prompts * P * P / 2 + G * C * (P + C / 2))
    slices = sum(t * (h * w) ** 2 for t, h, w in case.prompts.grids)
    vision = model.config.vision_config
    pairs += prompts * vision.depth * vision.embed_dim * slices

    # Four patches make a row of the merger's.
    tower = parameters(model.visual) - 0.75 * parameters(model.visual.merger)
    return text + head + 2 * pairs + prompts * tower * len(case.prompts.patches)


def print_bounds(model, case, rows, device, dtype):
    """What memory and arithmetic allow, from rates measured here, as shares of our times.

    Decoding: what must be read, over the bandwidth of a copy; a rollout of two tokens is taken off,
    in which CUDA records its graph. The policy: its matrix products, backward twice the forward,
    nothing recomputed, over the rate of one large product.
    """
    tokens = case.C - 2
    bandwidth = copy_bandwidth(device)
    bound = dtype.itemsize * decoding_numbers(model, case) / bandwidth
    start = fastest(lambda: g.generate(model, case.prompts, case.G, 2, [case.V], [0]), device)
    decoding = seconds_of(rows, ROLLOUT) - start
    print(
        f"\nDecoding: {1000 * decoding / tokens:.2f} ms a token behind {1000 * start:.0f} ms for "
        f"the prompt and two tokens; the bound is {1000 * bound / tokens:.2f} ms at "
        f"{bandwidth / 1e9:.0f} GB/s copied: {bound / decoding:.0%} of it reached."
    )

    n = 8192 if device.type == "cuda" else 2048
    rate = product_rate(n, device, dtype)
    operations = 6 * policy_products(model, case)
    share = operations / rate / seconds_of(rows, POLICY)
    print(
        f"Policy: {operations / 1e12:.2f} Tflop on unique tokens at {rate / 1e12:.2f} Tflop/s, "
        f"{n}³ in {dtype}: {share:.0%} of it reached."
    )
    times = policy_products(model, case, shared=False) / policy_products(model, case)
    print(f"G whole rows with the completions' logits have {times:.2f} times the products.")


# ---- Tables and the drawing ----

COLUMNS = (
    "phase",
    "way",
    "seconds",
    "runs",
    "tokens/s",
    "peak MiB",
    "× the seconds",
    "× the memory",
    "largest log-prob difference",
    "largest gradient difference",
)


def cell(value, form):
    if value is None:
        return ""
    if value == math.inf:
        return "out of memory"
    return format(value, form)


def print_line(cells):
    print(f"| {' | '.join(cells)} |")


def print_table(title, rows, tokens):
    """Markdown; `tokens` are the completions' in all, as in tokens/s."""
    print(f"\n{title}\n")
    print_line(COLUMNS)
    print("|---" * len(COLUMNS) + "|")

    standard = {row["phase"]: row for row in reversed(rows)}  # the first way's
    for row in rows:
        cells = [
            row["phase"],
            row["way"],
            cell(row["seconds"], ".3g"),
            str(row["runs"]),
            cell(tokens / row["seconds"], ".0f"),
            cell(row["peak"] / 2**20, ".0f"),
        ]

        first = standard[row["phase"]]
        if row is first:
            cells += [""] * 4
        else:
            cells += [
                cell(row["seconds"] / first["seconds"], ".2f"),
                cell(row["peak"] / max(1, first["peak"]), ".2f"),
                cell(row["logp_apart"], ".1e"),
                cell(row["gradient_apart"], ".1e"),
            ]
        print_line(cells)


def print_sweep(results):
    """results {(P, G, C): rows} -> a line each, and a straight line through the steps over G."""
    columns = [("ours", phase) for phase in PHASES] + [(way, "step") for way in WAYS]
    heads = [f"ours: {phase}" for phase in PHASES] + [f"step: {way}" for way in WAYS]
    print()
    print_line(["P:G:C", "unique tokens", *heads])
    print("|---" * (2 + len(heads)) + "|")

    steps = {way: {} for way in WAYS}  # {way: {G: seconds}}
    for (P, G, C), rows in results.items():
        seconds = {(row["way"], row["phase"]): row["seconds"] for row in rows}
        cells = [f"{seconds[key]:.3g}" if key in seconds else "not run" for key in columns]
        print_line([f"{P}:{G}:{C}", str(P - 1 + G * C), *cells])
        for way in WAYS:
            step = seconds.get((way, "step"), math.inf)
            if (P, G, C) in SWEEP["G"] and math.isfinite(step):
                steps[way][G] = step

    for way, points in steps.items():
        if len(points) > 1:
            slope, prompt = np.polyfit([*points], [*points.values()], 1)
            groups = ", ".join(map(str, points))
            line = f"{prompt:.2f} s a step + {slope:.3f} s a completion"
            print(f"\n{way}, P 933, C 96, G {groups}: {line}")


def write_svg(path, title, rows):
    """A bar per way, a colour per phase. The greys and colours read on white and on black."""
    ways = list(dict.fromkeys(row["way"] for row in rows))
    longest = max(row["seconds"] for row in rows)
    colours = dict(zip(PHASES, ("#2f81f7", "#d29922", "#2da44e")))
    bottom = 56 + 34 * len(ways)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 790 {bottom + 32}" '
        'font-family="sans-serif" font-size="13" fill="#808080">',
        f'<text x="10" y="20" font-weight="bold">{title}</text>',
    ]
    for i, way in enumerate(ways):
        x, y = 150.0, 40 + 34 * i
        out.append(f'<text x="140" y="{y + 16}" text-anchor="end">{way}</text>')
        for phase, colour in colours.items():
            seconds = seconds_of(rows, phase, way)
            width = 560 * seconds / longest
            out.append(
                f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="24" fill="{colour}">'
                f"<title>{phase}: {seconds:.2f} s</title></rect>"
            )
            x += width
        total = seconds_of(rows, "step", way)
        out.append(f'<text x="{x + 6:.1f}" y="{y + 16}">{total:.1f} s</text>')

    for phase, colour, x in zip(PHASES, colours.values(), (150, 240, 390)):
        out.append(
            f'<rect x="{x}" y="{bottom}" width="12" height="12" fill="{colour}"/>'
            f'<text x="{x + 18}" y="{bottom + 11}">{phase}</text>'
        )
    path.write_text("\n".join([*out, "</svg>\n"]))


def write_json(path, machine, args, results):
    rows = []
    for (P, G, C), measured in results.items():
        rows += [dict(P=P, G=G, C=C, **row) for row in measured]
    told = dict(machine=machine, **vars(args), results=rows)
    path.write_text(json.dumps(told, default=str, indent=1) + "\n")


# ---- The command ----


def shape(text):
    P, G, C = map(int, text.split(":"))
    return P, G, C


def parse_arguments():
    """-> (the flags, the shapes (P, G, C) that they ask for)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu", help="fp32 on cpu, bf16 on cuda")
    add("--size", choices=SIZES, default="mid", help="of the model; 2b and 7b have the true shapes")
    add("--shapes", nargs="+", type=shape, metavar="P:G:C", help="default: the size's own")
    add("--repetitions", type=int, default=3, help="times are medians; see above")
    add("--gradient_checkpointing", action="store_true", help="in all ways; default: in none")
    add("--sweep", action="store_true", help="other shapes: how the cost grows with P, G and C")
    add(
        "--prompts",
        type=int,
        default=1,
        help="ours only: B, of P, P-1 ... tokens, together and alone",
    )
    add("--peer", choices=("trl",), help=f"measure the package too: needs trl {TRL_VERSION}")
    add("--json", type=Path, help="write all numbers to this file")
    add("--plot", type=Path, help="write the first shape's step times to this SVG file")
    args = parser.parse_args()
    if args.peer:
        check_peer(args)

    if args.sweep:
        shapes = list(dict.fromkeys(itertools.chain(*SWEEP.values())))
    else:
        shapes = args.shapes or [shape(text) for text in SIZES[args.size].shapes]
    image = math.prod(SIZES[args.size].still) // 4
    for P, G, C in shapes:
        if P - args.prompts + 1 < image + 3 or G < 2 or C < 3:
            parser.error(
                f"P {P}: must hold an image of {image} tokens and 3 words; "
                "G must be at least 2, C 3"
            )
    return args, shapes


def check_peer(args):
    """Ends the program if TRL is not there, or not the version that peer_trl.py was written for."""
    if args.sweep or args.prompts > 1:
        g.fail("--peer trl: takes one prompt and one step; leave out --sweep and --prompts")
    try:
        found = version("trl")
    except PackageNotFoundError:
        found = "none"
    if found != TRL_VERSION:
        g.fail(
            f"--peer trl: needs trl {TRL_VERSION}, found {found}; "
            f"pip install trl=={TRL_VERSION} brings it"
        )


def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo").read_text() + f"model name: {platform.machine()}"
    return re.search(r"model name\s*: (.*)", info)[1]


def main():
    args, shapes = parse_arguments()
    # As grpo_video.py; for transformers' decoding it would plan anew for every token.
    torch.backends.cuda.enable_cudnn_sdp(False)
    device = torch.device(args.device)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    size = SIZES[args.size]
    name = device_name(device)
    machine = (
        f"{name}, torch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"load {os.getloadavg()[0]:.1f} at the start, {dtype}, "
        f"gradient checkpointing {'on' if args.gradient_checkpointing else 'off'}"
    )
    ours, hf = make_models(size, device, dtype, args.gradient_checkpointing)
    machine += f"; size {args.size}, {parameters(ours) / 1e6:.0f}M parameters"
    print(machine)

    def case_of(P, G, C, prompts):  # of P - b tokens each
        samples = [make_sample(ours.config, P - b, size.clip, size.still, b) for b in prompts]
        return make_case(ours.config, samples, G, C, device, dtype)

    def ways_of(case):
        ways = four_ways(ours, hf, case)
        if args.peer:
            ways[TRL] = trl_way(hf, case, args.gradient_checkpointing)
        return ways

    warm_up = case_of(math.prod(size.still) // 4 + 20, 2, 4, [0])
    run_ways(ways_of(warm_up), 1, device)

    results = {}
    for P, G, C in shapes:
        case = case_of(P, G, C, range(args.prompts))
        if args.prompts > 1:
            alone = [case_of(P, G, C, [b]) for b in range(args.prompts)]
            ways = {
                "together": (ours, our_phases(ours, [case])),
                "one after the other": (ours, our_phases(ours, alone)),
            }
        else:
            ways = ways_of(case)
        if args.sweep and args.device == "cpu" and G * (P + C) > SWEEP_LIMIT:
            ways = {OURS: ways[OURS]}

        rows = run_ways(ways, args.repetitions, device)
        results[P, G, C] = rows
        if not args.sweep:
            title = f"P {P}, G {G}, C {C}" + f", B {args.prompts}" * (args.prompts > 1)
            print_table(title, rows, args.prompts * G * C)
            if args.prompts == 1:
                print_bounds(ours, case, rows, device, dtype)

    if args.sweep:
        print_sweep(results)
    if args.plot:
        (P, G, C), rows = next(iter(results.items()))
        write_svg(args.plot, f"Seconds of a step: P {P}, G {G}, C {C}, {args.size}, {name}", rows)
    if args.json:
        write_json(args.json, machine, args, results)


if __name__ == "__main__":
    main()
