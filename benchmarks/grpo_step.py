"""A GRPO step of grpo_video.py beside the two ways it is otherwise done: the same random weights, tokens and loss.

    python benchmarks/grpo_step.py                                    # 47M parameters, CPU: under 5 minutes on two cores
    python benchmarks/grpo_step.py --sweep --repetitions 1            # how the cost grows with P, G and C
    python benchmarks/grpo_step.py --size tiny --prompts 16           # 16 prompts together, and one after the other
    python benchmarks/grpo_step.py --device cuda --size 2b --gradient_checkpointing

ours            grpo_video.py: the prompt once for its group of G, logits at the completions alone, entropies too.
released        as the released code does it, with transformers: G calls of `generate`, one row each; then G rows of prompt and
                completion, the pixels G times, logits at every position, log_softmax row by row.
repeated rows   one `generate` over G equal rows; then the same forward, which is measured once for both. With --logits_to_keep its
                forward is its own and makes logits at the last C + 1 positions alone, as newer versions of TRL do.

All have a KV cache, SDPA attention, no dropout, sample at temperature 1 without top-k and top-p, and write exactly C tokens.
On CUDA the baselines' log_softmax is in bf16, as in the released code, and ours in fp32: log-probs differ by that too.
Phases: the rollout; the reference's forward; the policy's forward, loss and backward. The step is their sum, without optimizer or
data. Times are medians of interleaved repetitions, after a small warm-up. Memory is a phase's highest peak above what was there
before it: allocated on CUDA; on CPU resident, where Linux resets the high-water mark and glibc returns what is free.

Dimensions: B prompts, G completions of each, P prompt tokens, C completion tokens, D width, V vocabulary.
"""
import argparse, ctypes, itertools, json, math, os, platform, re, statistics, sys, time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import GenerationConfig, Qwen2VLConfig, Qwen2VLForConditionalGeneration

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import grpo_video as g  # noqa: E402

PHASES = ROLLOUT, REFERENCE, POLICY = "rollout", "reference forward", "policy forward + backward"
CLIP, STILL = (8, 18, 18), (1, 18, 18)  # patches of 16 frames and of an image, 252 x 252: 648 and 81 tokens
SIZES = {  # text: D, layers, heads, key-value heads, ffn, V, tied; vision: depth, width, heads; video, image; shapes P:G:C
    "tiny": (64, 2, 4, 2, 192, 512, True, 2, 48, 4, (2, 4, 4), (1, 4, 4), ["100:8:24"]),  # the toy's, of 4 frames
    "mid": (256, 6, 4, 2, 704, 151936, True, 4, 224, 4, CLIP, STILL, ["933:8:96"]),  # with the 2B's vocabulary
    "mid-32k": (512, 8, 8, 2, 1408, 32000, True, 4, 320, 4, CLIP, STILL, ["933:8:96"]),  # as many parameters in wider layers
    "2b": (1536, 28, 12, 2, 8960, 151936, True, 32, 1280, 16, CLIP, STILL, ["933:8:96", "933:8:256"]),
    "7b": (3584, 28, 28, 4, 18944, 152064, False, 32, 1280, 16, CLIP, STILL, ["933:8:96", "933:8:256"])}
SWEEP = {"G": [(933, G, 96) for G in (4, 8, 16, 32)], "C": [(933, 8, C) for C in (64, 128, 256, 512)],
         "P": [(P, 8, 96) for P in (300, 933, 2000, 4000)]}
SWEEP_LIMIT = 8300  # tokens G * (P + C), up to which a sweep on CPU runs the baselines too

def make_models(size, device, dtype, checkpointing):
    """-> (ours, transformers'): one set of random weights, biases and norms among them, whose storage they share."""
    D, layers, H, K, ffn, V, tied, depth, width, heads, *_ = SIZES[size]
    E = D // H
    torch.manual_seed(0)
    config = Qwen2VLConfig(
        vocab_size=V, hidden_size=D, num_hidden_layers=layers, num_attention_heads=H, num_key_value_heads=K, intermediate_size=ffn,
        tie_word_embeddings=tied, bos_token_id=None, eos_token_id=None, image_token_id=V - 1, video_token_id=V - 2, rope_theta=1e6,
        max_position_embeddings=32768, rope_scaling=dict(type="mrope", mrope_section=[E // 8, 3 * E // 16, 3 * E // 16]),
        initializer_range=D ** -0.5, vision_config=dict(depth=depth, embed_dim=width, num_heads=heads, mlp_ratio=4, hidden_size=D,
                                                        initializer_range=0.05))
    with torch.device(device):
        hf = Qwen2VLForConditionalGeneration._from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
    for p in hf.parameters():
        if p.dim() == 1:  # else all biases are 0 and all norms 1, and the differences would not see them
            p.data += 0.1 * torch.randn_like(p)
    if checkpointing:
        hf.gradient_checkpointing_enable(dict(use_reentrant=False))
    with torch.device("meta"):
        ours = g.Qwen2VL(config)
    weights = {checkpoint_name(name): p for name, p in hf.state_dict().items()}
    ours.load_state_dict({name: weights[name] for name in ours.state_dict()}, assign=True)
    ours.gradient_checkpointing = checkpointing
    return ours, hf

def checkpoint_name(name):
    return name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")

def make_sample(config, P, clip, still, seed=0):
    """A sample as VideoDataset's, of P tokens: words, a video, words, an image, words; without the video if it does not fit."""
    rng, V = torch.Generator().manual_seed(seed), config.text_config.vocab_size
    sizes = {z: math.prod(z) // 4 for z in (clip, still)}
    grids = [clip, still] if P >= sum(sizes.values()) + 5 else [still]
    words = torch.randint(0, V - 2, (P - sum(sizes[z] for z in grids),), generator=rng).tolist()
    ids = [i for n, z in enumerate(grids) for i in words[2 * n:2 * n + 2] + [V - 2 if z == clip else V - 1] * sizes[z]]
    ids += words[2 * len(grids):]
    patches = torch.randint(0, 256, (sum(map(math.prod, grids)), 1176), generator=rng).byte()
    positions = g.mrope_positions(ids, grids, config)
    return dict(sample_id=seed, ids=torch.tensor(ids), positions=positions, patches=patches, grids=grids)

def make_case(config, samples, G, C, device, dtype):
    """What all ways are given. A sample's completions, advantages and noise [2, G, C] come from its own seed. Completions are
    words alone: the released code would look for a placeholder's pixels (trap 12)."""
    def draw(function, *size):
        rngs = [torch.Generator().manual_seed(s["sample_id"]) for s in samples]
        return torch.stack([function(*size, generator=rng) for rng in rngs]).to(device)

    V = config.text_config.vocab_size
    return SimpleNamespace(
        G=G, C=C, V=V, ids=samples[0]["ids"].to(device), prompts=g.Prompts.collate(samples, device, dtype), completions=draw(torch.randint, V - 2, (G, C)),
        advantages=g.group_advantages(draw(torch.rand, G), True), noise=0.3 * draw(torch.randn, 2, G, C))

def backward(logp, case, prompts):
    """GRPO's loss of a case in a step of so many prompts, and its backward pass -> logp [B, G, C]. The noise stands for an older
    policy and another reference: at ratio 1 and KL 0 most of the loss has no gradient."""
    old_logp, ref_logp = logp.detach() + case.noise.transpose(0, 1)
    per_token, _ = g.policy_loss(logp, old_logp, case.advantages, 0.2, 0.2)
    weights = g.token_weights(torch.ones_like(logp), "grpo", prompts * case.G, prompts * case.G * case.C, case.C)
    (weights * (per_token + 0.1 * g.k3_kl(logp, ref_logp))).sum().backward()
    return logp.detach()

def our_phases(model, cases):
    """The cases, one after the other -> {phase: function}; those of the last two phases return log-probs [prompts, G, C]. If an
    attention could not take a flash kernel, it would end the run."""
    prompts = sum(len(case.completions) for case in cases)

    def policy(case):
        logp, entropy = model(case.prompts, case.completions, 1.0, statistic=g.entropy_of)
        return backward(logp, case, prompts)

    phases = {ROLLOUT: lambda: [g.generate(model, case.prompts, case.G, case.C, [case.V], range(len(case.completions)))
                                for case in cases],  # the end token V is never sampled
              REFERENCE: lambda: torch.cat([model(case.prompts, case.completions) for case in cases]),
              POLICY: lambda: torch.cat([policy(case) for case in cases])}
    return {phase: sdpa_kernel(SDPBackend.FLASH_ATTENTION)(run) for phase, run in phases.items()}

def their_phases(hf, case, rows_at_once, **keep):
    """transformers on the case's one prompt, rolled out so many rows at once -> {phase: function}, as our_phases."""
    G, C, P = case.G, case.C, len(case.ids)
    hf.generation_config = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=C,
                                            pad_token_id=0, use_cache=True)  # it names no end token

    def inputs(rows, completions):
        ids = torch.cat((case.ids.expand(rows, -1), completions), dim=1)
        kinds = (ids == case.V - 1) + 2 * (ids == case.V - 2)
        pieces = case.prompts.patches.split([math.prod(grid) for grid in case.prompts.grids])
        media = {}
        for name, prefix, grid, pixels in zip(("", "_videos"), ("image", "video"), case.prompts.grids[::-1], pieces[::-1]):
            media |= {f"pixel_values{name}": pixels.repeat(rows, 1), f"{prefix}_grid_thw": ids.new_tensor([grid] * rows)}
        return dict(input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=kinds, **media)

    def rollout():
        hf.eval()
        for _ in range(G // rows_at_once):
            out = hf.generate(**inputs(rows_at_once, case.completions.new_empty(rows_at_once, 0)))
            assert out.shape == (rows_at_once, P + C), f"{tuple(out.shape)} is not {rows_at_once} rows of {P} + {C} tokens"

    def reference():
        hf.train(torch.is_grad_enabled())  # the mode in which it checkpoints; all its dropout rates are 0
        logits = hf(**inputs(G, case.completions[0]), use_cache=False, **keep).logits[:, :-1]
        targets = torch.cat((case.ids.expand(G, -1), case.completions[0]), dim=1)[:, -logits.shape[1]:, None]
        return torch.stack([row.log_softmax(-1).gather(1, y)[:, 0] for row, y in zip(logits, targets)])[None, :, -C:]

    given = {key: z for key, z in inputs(1, case.completions.new_empty(1, 0)).items() if not key.startswith("pixel")}
    positions, delta = hf.model.get_rope_index(**given)
    assert torch.equal(positions[:, :, :-1], case.prompts.positions) and int(delta) + P - 1 == int(case.prompts.last_position), "M-RoPE differs"
    return {ROLLOUT: rollout, REFERENCE: reference, POLICY: lambda: backward(reference(), case, 1)}

def three_ways(ours, hf, case, keep):
    released, repeated = their_phases(hf, case, 1), their_phases(hf, case, case.G, **dict(logits_to_keep=case.C + 1) if keep else {})
    return {"ours": (ours, our_phases(ours, [case])), "released": (hf, released),
            "repeated rows": (hf, repeated if keep else released | {ROLLOUT: repeated[ROLLOUT]})}

def memory(field):
    return 1024 * int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1])

def measure(run, device):
    """-> (what run() returns, seconds, peak bytes above those before); (None, inf, inf) where the device's memory is too small."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    else:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    before, start = torch.cuda.memory_allocated() if cuda else memory("VmRSS"), time.perf_counter()
    try:
        result = run()
    except torch.OutOfMemoryError:
        return None, math.inf, math.inf
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return result, seconds, (torch.cuda.max_memory_allocated() if cuda else memory("VmHWM")) - before

def run_ways(ways, repetitions, device):
    """ways {name: (model, {phase: function})} -> rows: dicts of a phase (or their sum) and a way, with the median seconds, the peak
    bytes, and for all ways but the first the largest differences to it: of a log-prob, and of a parameter's gradient as a share
    of the gradient's norm."""
    costs, logps, gradients, apart, first = {}, {}, {}, {}, {}
    for repetition, phase, (way, (model, phases)) in itertools.product(range(repetitions), PHASES, ways.items()):
        if first.setdefault((repetition, phases[phase]), way) != way:  # another way's function too
            same = first[repetition, phases[phase]]
            costs.setdefault((phase, way), []).append(costs[phase, same][-1])
            apart[phase, way] = apart.get((phase, same), (None, None))
            continue
        for other, _ in ways.values():
            other.zero_grad()
        with torch.set_grad_enabled(phase == POLICY):
            result, *cost = measure(phases[phase], device)
        costs.setdefault((phase, way), []).append(cost)
        if phase == ROLLOUT or result is None:
            continue
        logps.setdefault(phase, result)  # the first way's
        key, logp_apart = (phase, way), float((result - logps[phase]).abs().max())
        grads = {checkpoint_name(name): p.grad for name, p in model.named_parameters()} if phase == POLICY else {}
        gradients = gradients or grads
        shares = [float((grad - gradients[name]).norm() / gradients[name].norm()) for name, grad in grads.items()]
        del grads
        apart[key] = tuple(map(max, apart.get(key, (0, 0)), (logp_apart, max(shares, default=0))))
    rows = []
    for phase, way in itertools.product(PHASES, ways):
        seconds, peak = (f(z) for f, z in zip((statistics.median, max), zip(*costs[phase, way])))
        logp, grad = apart.get((phase, way), (None, None))
        rows.append(dict(phase=phase, way=way, seconds=seconds, peak=peak, logp_apart=logp,
                         gradient_apart=grad if phase == POLICY else None))
    for way in ways:
        parts = [row for row in rows if row["way"] == way]
        rows.append(dict(phase="step", way=way, seconds=sum(row["seconds"] for row in parts),
                         peak=max(row["peak"] for row in parts), logp_apart=max(row["logp_apart"] or 0 for row in parts),
                         gradient_apart=parts[-1]["gradient_apart"]))
    return rows

def print_table(title, rows, tokens):
    """Markdown; `tokens` are the completions' in all, as in tokens/s."""
    standard = {row["phase"]: row for row in reversed(rows)}  # the first way's

    def cell(value, form):
        return "" if value is None else "out of memory" if value == math.inf else format(value, form)

    print(f"\n{title}\n\n| phase | way | seconds | tokens/s | peak MiB | × the seconds | × the memory | largest log-prob difference"
          " | largest gradient difference |\n" + "|---" * 9 + "|")
    for row in rows:
        cells = [cell(row["seconds"], ".3g"), cell(tokens / row["seconds"], ".0f"), cell(row["peak"] / 2 ** 20, ".0f")]
        if row is not (first := standard[row["phase"]]):
            cells += [cell(row["seconds"] / first["seconds"], ".2f"), cell(row["peak"] / max(1, first["peak"]), ".2f"),
                      cell(row["logp_apart"], ".1e"), cell(row["gradient_apart"], ".1e")]
        print("|", " | ".join([row["phase"], row["way"], *cells, *[""] * (7 - len(cells))]), "|")

def fastest(run, device):
    return min(measure(run, device)[1] for _ in range(5))

def print_bounds(model, case, rows, device, dtype):
    """What memory and arithmetic allow, from rates measured here, as shares of our times. Decoding: all text weights and the keys
    and values once per token, over the bandwidth of a copy; a rollout of two tokens is taken off, in which CUDA records its graph.
    The policy: matrix products counted on unique tokens, backward twice the forward, nothing recomputed, over the rate of one
    large product."""
    G, C, P, c = case.G, case.C, len(case.ids), model.config.text_config
    n = 8192 if device.type == "cuda" else 2048
    (x, y), a = torch.ones(2, 2 ** 28, device=device), torch.randn(n, n, device=device, dtype=dtype)
    bandwidth, rate = 2 * 2 ** 30 / fastest(lambda: y.copy_(x), device), 2 * n ** 3 / fastest(lambda: a @ a, device)
    D, E, layers, head = c.hidden_size, model.model.layers[0].E, c.num_hidden_layers, c.vocab_size * c.hidden_size
    text, tower, merger = (sum(p.numel() for p in z.parameters()) for z in (model.model.layers, model.visual, model.visual.merger))
    keys = sum(2 * layers * c.num_key_value_heads * E * (P + G * t) for t in range(3, C + 1))
    bound = dtype.itemsize * ((C - 2) * (text + head) + keys) / bandwidth
    start = fastest(lambda: g.generate(model, case.prompts, G, 2, [case.V], [0]), device)
    decoding = next(row["seconds"] for row in rows if row["phase"] == ROLLOUT) - start
    pairs = layers * D * (P * P / 2 + G * C * (P + C / 2))  # of a query and a key, times the width
    slices = model.visual.c.depth * model.visual.c.embed_dim * sum(t * (h * w) ** 2 for t, h, w in case.prompts.grids)
    products = text * (P - 1 + G * C) + head * G * C + 2 * (pairs + slices)
    products += (tower - 0.75 * merger) * len(case.prompts.patches)  # four patches make a row of the merger's
    ours = next(row["seconds"] for row in rows if row["phase"] == POLICY)
    print(f"\nDecoding: {1000 * decoding / (C - 2):.2f} ms a token behind {1000 * start:.0f} ms for the prompt and two tokens; the bound "
          f"is {1000 * bound / (C - 2):.2f} ms at {bandwidth / 1e9:.0f} GB/s copied: {bound / decoding:.0%} of it reached.\n"
          f"Policy: {6 * products / 1e12:.2f} Tflop on unique tokens at {rate / 1e12:.2f} Tflop/s, {n}³ in {dtype}: "
          f"{6 * products / rate / ours:.0%} of it reached.")

def print_sweep(results):
    """results {(P, G, C): rows} -> a line each, and a straight line through our steps over G."""
    ways = ("ours", "released", "repeated rows")
    print("\n| P:G:C | unique tokens | " + " | ".join(f"ours: {phase}" for phase in PHASES) + " | step: " + " | step: ".join(ways)
          + " |\n" + "|---" * 8 + "|")
    steps = {way: {} for way in ways}
    for (P, G, C), rows in results.items():
        seconds = {(row["phase"], row["way"]): row["seconds"] for row in rows}
        cells = [seconds.get(key) for key in itertools.product([*PHASES, "step"], ways) if key[0] == "step" or key[1] == "ours"]
        print(f"| {P}:{G}:{C} | {P - 1 + G * C} |", " | ".join("not run" if z is None else f"{z:.3g}" for z in cells), "|")
        for way in ways:
            if (P, G, C) in SWEEP["G"] and math.isfinite(z := seconds.get(("step", way), math.inf)):
                steps[way][G] = z
    for way, points in steps.items():
        if len(points) > 1:
            slope, prompt = np.polyfit([*points], [*points.values()], 1)
            print(f"\n{way}, P 933, C 96, G {', '.join(map(str, points))}: {prompt:.2f} s a step + {slope:.3f} s a completion")

def write_svg(path, title, rows):
    """A bar per way, a colour per phase. The greys and colours read on white and on black."""
    ways, longest = list(dict.fromkeys(row["way"] for row in rows)), max(row["seconds"] for row in rows)
    out = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 190" font-family="sans-serif" font-size="13" fill="#808080">',
           f'<text x="10" y="20" font-weight="bold">{title}</text>']
    colours = dict(zip(PHASES, ("#2f81f7", "#d29922", "#2da44e")))
    for i, way in enumerate(ways):
        x, y = 120.0, 40 + 34 * i
        out.append(f'<text x="110" y="{y + 16}" text-anchor="end">{way}</text>')
        for row in (row for row in rows if row["way"] == way and row["phase"] in PHASES):
            width = 560 * row["seconds"] / longest
            out.append(f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="24" fill="{colours[row["phase"]]}">'
                       f'<title>{row["phase"]}: {row["seconds"]:.2f} s</title></rect>')
            x += width
        total = next(row["seconds"] for row in rows if row["way"] == way and row["phase"] == "step")
        out.append(f'<text x="{x + 6:.1f}" y="{y + 16}">{total:.1f} s</text>')
    for phase, colour, x in zip(PHASES, colours.values(), (120, 210, 360)):
        out.append(f'<rect x="{x}" y="158" width="12" height="12" fill="{colour}"/><text x="{x + 18}" y="169">{phase}</text>')
    path.write_text("\n".join([*out, "</svg>\n"]))

def shape(text):
    P, G, C = map(int, text.split(":"))
    return P, G, C

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="fp32 on cpu, bf16 on cuda")
    parser.add_argument("--size", choices=SIZES, default="mid", help="of the model; 2b and 7b have the true shapes")
    parser.add_argument("--shapes", nargs="+", type=shape, metavar="P:G:C", help="default: the size's own")
    parser.add_argument("--repetitions", type=int, default=3, help="of everything; times are medians")
    parser.add_argument("--gradient_checkpointing", action="store_true", help="in all ways; default: in none")
    parser.add_argument("--logits_to_keep", action="store_true", help="for repeated rows: logits at the completions alone")
    parser.add_argument("--sweep", action="store_true", help="other shapes: how the cost grows with P, G and C")
    parser.add_argument("--prompts", type=int, default=1, help="ours only: B, of P, P-1 ... tokens, together and alone")
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    parser.add_argument("--plot", type=Path, help="write the first shape's step times to this SVG file")
    args = parser.parse_args()
    torch.backends.cuda.enable_cudnn_sdp(False)  # as grpo_video.py; for transformers' decoding it would plan anew for every token
    device, dtype = torch.device(args.device), torch.bfloat16 if args.device == "cuda" else torch.float32
    clip, still, default = SIZES[args.size][-3:]
    shapes = list(dict.fromkeys(itertools.chain(*SWEEP.values()))) if args.sweep else args.shapes or list(map(shape, default))
    if short := [P for P, G, C in shapes if P - args.prompts + 1 < math.prod(still) // 4 + 3 or G < 2 or C < 3]:
        parser.error(f"P {short[0]}: must hold an image of {math.prod(still) // 4} tokens and 3 words; G must be at least 2, C 3")
    name = torch.cuda.get_device_name() if args.device == "cuda" else re.search(
        r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text() + f"model name: {platform.machine()}")[1]
    machine = (f"{name}, torch {torch.__version__}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f} at the start, "
               f"{dtype}, gradient checkpointing {'on' if args.gradient_checkpointing else 'off'}")
    ours, hf = make_models(args.size, device, dtype, args.gradient_checkpointing)
    machine += f"; size {args.size}, {sum(p.numel() for p in ours.parameters()) / 1e6:.0f}M parameters"
    print(machine)

    def case_of(P, G, C, prompts=range(1)):
        return make_case(ours.config, [make_sample(ours.config, P - b, clip, still, b) for b in prompts], G, C, device, dtype)

    run_ways(three_ways(ours, hf, case_of(math.prod(still) // 4 + 20, 2, 4), True), 1, device)  # the warm-up
    results = {}
    for P, G, C in shapes:
        case = case_of(P, G, C, range(args.prompts))
        if args.prompts > 1:
            alone = [case_of(P, G, C, [b]) for b in range(args.prompts)]
            ways = {"together": (ours, our_phases(ours, [case])), "one after the other": (ours, our_phases(ours, alone))}
        else:
            ways = three_ways(ours, hf, case, args.logits_to_keep)
        if args.sweep and args.device == "cpu" and G * (P + C) > SWEEP_LIMIT:
            ways = {"ours": ways["ours"]}
        rows = results[P, G, C] = run_ways(ways, args.repetitions, device)
        if not args.sweep:
            print_table(f"P {P}, G {G}, C {C}" + f", B {args.prompts}" * (args.prompts > 1), rows, args.prompts * G * C)
            if args.prompts == 1:
                print_bounds(ours, case, rows, device, dtype)
    if args.sweep:
        print_sweep(results)
    if args.plot:
        (P, G, C), rows = next(iter(results.items()))
        write_svg(args.plot, f"Seconds of a step: P {P}, G {G}, C {C}, {args.size}, {name}", rows)
    if args.json:
        args.json.write_text(json.dumps(dict(machine=machine, **vars(args), results=[
            dict(P=P, G=G, C=C, **row) for (P, G, C), rows in results.items() for row in rows]), default=str, indent=1) + "\n")

if __name__ == "__main__":
    main()
