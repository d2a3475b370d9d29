"""Tiered evaluation of Qwen2-VL on SEED-Bench-R1, in plain PyTorch: does what it learnt carry to unseen kitchens and tasks?

    torchrun --nproc_per_node=8 eval_video.py --model DIR --data_root DATA      # L1, L2 and L3, greedy
    python eval_video.py --toy --model runs/toy-grpo                            # the toy's three tiers
    python eval_video.py --model DIR --longvideobench ROOT                      # LongVideoBench beside them
    python eval_video.py --compare runs/eval-base runs/eval-grpo --paper        # evaluated folders as one table
    python eval_video.py --model DIR --splits training_6k --num_samples 8 --save_cot FILE     # right chains, for sft_video.py

A row is in predictions_<split>.jsonl as soon as it is answered, and a second run goes on behind the last whole line. A question
that fails (an unreadable video) is in `failed` and in no denominator. Batch size and ranks change responses by rounding alone.

Dimensions: B prompts, G samples of each, P and C their tokens, N rows, H heads, K key heads, E, D widths of a head, the model.
"""
import argparse, atexit, hashlib, itertools, json, math, multiprocessing, operator, os, random, re, signal, subprocess, sys, types
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Literal

import decord
import numpy as np
import torch, torch.distributed as dist, torch.nn as nn, torch.nn.functional as F
from huggingface_hub import errors, snapshot_download
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.attention.bias import causal_lower_right
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer, HfArgumentParser

# === shared: run — identical in grpo_video.py, sft_video.py, eval_video.py (checked by test_smoke.py) ===
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
HERE, barrier = Path(__file__).resolve().parent, dist.barrier if WORLD > 1 else lambda: None

def flag(default, help):
    """A config field. The limits in its help ("at least 2", "above 0", "at most 1") are the ones parse_config enforces."""
    given = dict(default_factory=lambda: default) if isinstance(default, list) else dict(default=default)
    return field(**given, metadata=dict(help=help))

def fail(*problems):
    """Ends the program with exit code 2 and one line per problem (20 at most, then the count) on stderr, once a machine."""
    more = [f"{len(problems)} problems in all; these were the first 20"] if len(problems) > 20 else []
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        print(*(f"{Path(sys.argv[0]).name}: error: {problem}" for problem in [*problems[:20], *more]), sep="\n", file=sys.stderr)
    sys.exit(2)

def parse_config(config_class, toy_presets, argv=None):
    """argv -> config_class; --toy makes its presets the defaults. An unknown flag or an impossible value ends the program."""
    parser = HfArgumentParser(config_class, allow_abbrev=False, description=sys.modules[config_class.__module__].__doc__,
                              formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.set_defaults(**toy_presets if "--toy" in (argv or sys.argv) else {})
    config, problems = config_class(**vars(parser.parse_args(argv))), []
    for f in fields(config):
        value, holds = getattr(config, f.name), {"above": operator.gt, "at least": operator.ge, "at most": operator.le}
        for word, limit in re.findall(r"(above|at least|at most) (-?\d+(?:\.\d+)?)", f.metadata["help"]):
            if value is not None and not (holds[word](value, float(limit)) and value < math.inf):
                problems.append(f"--{f.name} {value}: must be a number {word} {limit}")
    return fail(*problems) if problems else config

def set_up(toy):
    """-> this rank's device and the type to compute in. Makes the process group; with --toy, rank 0 builds a missing toy."""
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
    torch.cuda.set_device(device) if device.type == "cuda" else None
    torch.backends.cuda.enable_cudnn_sdp(False)  # it would plan anew for every length of a prompt; flash kernels need no plan
    store = dist.HashStore() if WORLD == 1 else next(dist.rendezvous("env://"))[0]  # torchrun's holds a dead try's addresses still
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", rank=RANK, world_size=WORLD,
                            store=dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store))
    torch.set_num_threads(1 if toy else torch.get_num_threads())  # the toy's matrices are too small to share
    if toy and RANK == 0 and not (HERE / "toy/model").exists() and subprocess.call([sys.executable, HERE / "toy/make_toy.py"]):
        fail(f"--toy: {HERE}/toy/make_toy.py, which stands beside this script in its repository, did not build the toy")
    barrier()
    return device, torch.bfloat16 if device.type == "cuda" else torch.float32

def find_model(name):
    """A folder, or a hub id, whose checkpoint is fetched into the hub's cache (it locks: ranks may ask at once) -> the folder."""
    try:
        name = name if Path(name).is_dir() else snapshot_download(name, ignore_patterns=["*.bin"])
    except (OSError, errors.HFValidationError) as error:
        fail(f"--model {name}: no such folder, and the hub gave nothing ({str(error).splitlines()[0]}); `hf download Qwen/"
             "Qwen2-VL-7B-Instruct --local-dir DIR` fetches the paper's model; `grpo_video.py --toy` needs no download")
    if absent := [file for file in ("config.json", "tokenizer_config.json") if not Path(name, file).is_file()]:
        fail(f"--model {name}: holds no {' and no '.join(absent)}, as a Qwen2-VL checkpoint does")
    return Path(name)
# === end shared: run ===

@dataclass
class Config:
    """All settings; each is a flag."""
    model: str = flag("Qwen/Qwen2-VL-7B-Instruct", "Qwen2-VL checkpoint: a folder, or a hub id that is fetched")
    data_root: str = flag("data/SEED-Bench-R1", "folder with annotations/, videos/ and images/")
    splits: list[str] = flag(["validation_L1", "validation_L2", "validation_L3"], "files of DATA_ROOT/annotations to answer")
    longvideobench: str = flag("", "folder with LongVideoBench's lvb_val.json and videos/, evaluated too")
    limit: int = flag(0, "questions of each split at most; 0: all, at least 0")
    toy: bool = flag(False, "evaluate on the toy's data (and its base model, if no --model is given), building a missing toy")
    validate: bool = flag(False, "check every record, video and image of the data root, print a report and stop")
    output_dir: str = flag("", "where predictions and summaries go; default: runs/eval-<the model folder's name>")
    do_sample: bool = flag(False, "sample by temperature, top_k and top_p instead of taking the most likely token")
    temperature: float = flag(1.0, "softmax temperature if do_sample, above 0")
    top_k: int = flag(0, "sample from the k most likely tokens only; 0: all, at least 0")
    top_p: float = flag(1.0, "sample from the likeliest tokens that reach p together, above 0, at most 1")
    seed: int = flag(42, "of the sampling and of drawn choices, at least 0")
    num_samples: int = flag(1, "K responses a question, sampled: mean accuracy, pass@K and majority vote, at least 1")
    save_cot: str = flag("", "file for the splits' right responses, shortest first, as training rows for sft_video.py")
    cot_per_question: int = flag(1, "responses of a question that save_cot keeps, at least 1")
    max_completion_length: int = flag(512, "tokens of a response at most, at least 1")
    batch_size: int = flag(8, "questions decoded together on a device, at least 1")
    ablate: Literal["none", "no_video", "no_image", "shuffle_frames", "text_only"] = flag("none", "what a question lacks")
    analyze: bool = flag(False, "measure attention on vision, and whether the thinking leads to the letter (tools/analyze.py)")
    reference: str = flag("", "folder of the model that judges the thinking for analyze; default: the model itself, blind")
    heatmaps: int = flag(0, "pictures of the attention that analyze draws of each split, at least 0")
    compare: list[str] = flag([], "evaluated folders to print as one table; evaluates nothing")
    paper: bool = flag(False, "show the paper's numbers beside")
    max_frames: int = flag(16, "frames of a video at most, at least 2")
    fps: float = flag(2.0, "frames per second of video; 4 to max_frames in all, above 0")
    frame_size: int = flag(256, "height and width of a frame, rounded to a multiple of 28, at least 1")
    dataloader_num_workers: int = flag(2, "processes that decode ahead; 0: none, at least 0")
    decode_timeout: float = flag(60.0, "seconds after which decoding a question's media is given up, above 0")

TOY = dict(model=str(HERE / "toy/model"), data_root=str(HERE / "toy/data"), batch_size=32, max_completion_length=24,
           max_frames=8, frame_size=56, dataloader_num_workers=1)

# === shared: qwen2_vl — identical in grpo_video.py, sft_video.py, eval_video.py (checked by test_smoke.py) ===
class Prompts(types.SimpleNamespace):
    """B prompts less their last tokens, which open the completions, padded on the right to P tokens. ids [B, P], positions
    [3, B, P] (M-RoPE's t, h, w), last, last_position [B], lengths [B] (of the whole prompts), runs: (number, P) of neighbours
    of equal length, patches [N, 1176] of all videos and images, grids: their (t, h, w)."""
    @classmethod
    def collate(cls, samples, device, dtype):
        """Samples with ids [P+1] (the last is a word's), positions [3, P+1], patches [N, 1176] uint8 and grids -> one batch."""
        ids, positions = (nn.utils.rnn.pad_sequence([z[:-1] for z in zs], batch_first=True).to(device)
                          for zs in ([s["ids"] for s in samples], [s["positions"].T for s in samples]))
        ends = [(len(s["ids"]), s["ids"][-1], s["positions"].max()) for s in samples]
        lengths, last, last_position = torch.tensor(ends, device=device).T
        patches = torch.cat([s["patches"] for s in samples]).to(device).unflatten(1, (3, -1)) / 255
        mean, std = torch.tensor([[0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]], device=device)
        runs = [(len(list(same)), P) for P, same in itertools.groupby(len(s["ids"]) - 1 for s in samples)]
        return cls(ids=ids, positions=positions.permute(2, 0, 1), last=last, last_position=last_position, lengths=lengths,
                   runs=runs, grids=[grid for s in samples for grid in s["grids"]],
                   patches=((patches - mean[:, None]) / std[:, None]).flatten(1).to(dtype))

def mrope_positions(ids, grids, config):
    """ids (P numbers, a placeholder per merged patch), grids -> M-RoPE positions [3, P]: a text token's t = h = w is the maximum
    before it plus 1, as the weights were trained (transformers leaves t out); a vision block starts there with its (t, h, w)."""
    m, placeholders = config.vision_config.spatial_merge_size, (config.image_token_id, config.video_token_id)
    blocks, start, grids = [], 0, iter(grids)
    for vision, run in itertools.groupby(i in placeholders for i in ids):
        n = len(list(run))
        while n > 0:  # two videos may follow each other without a token between them
            sides = [torch.arange(side // s) for side, s in zip(next(grids), (1, m, m))] if vision else None
            blocks.append(start + (torch.cartesian_prod(*sides).T if vision else torch.arange(n).expand(3, -1)))
            n, start = n - blocks[-1].shape[1], int(blocks[-1].max()) + 1
    return torch.cat(blocks, dim=1)

def rotate(x, cos, sin):  # rotary embedding of x [N, heads, E] by cos and sin [N, E]
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]

class VisionBlock(nn.Module):
    def __init__(self, c):
        super().__init__()
        D, hidden, self.heads = c.embed_dim, int(c.embed_dim * c.mlp_ratio), c.num_heads
        self.norm1, self.norm2 = nn.LayerNorm(D, eps=1e-6), nn.LayerNorm(D, eps=1e-6)
        self.attn = nn.ModuleDict(dict(qkv=nn.Linear(D, 3 * D), proj=nn.Linear(D, D)))
        self.mlp = nn.ModuleDict(dict(fc1=nn.Linear(D, hidden), fc2=nn.Linear(hidden, D)))
    def forward(self, x, cos, sin, slices):
        """x [N, D]; slices: (count, size) of runs of temporal slices, each of which attends to itself alone."""
        q, k, v = self.attn.qkv(self.norm1(x)).unflatten(1, (3, self.heads, -1)).unbind(1)  # [N, H, E] each
        q, k, out = rotate(q.float(), cos, sin).to(v.dtype), rotate(k.float(), cos, sin).to(v.dtype), []
        for shape, *qkv in zip(slices, *(z.split([n * size for n, size in slices]) for z in (q, k, v))):
            qkv = (z.unflatten(0, shape).transpose(1, 2) for z in qkv)  # [count, H, size, E]
            out.append(F.scaled_dot_product_attention(*qkv).transpose(1, 2).flatten(0, 1))
        x = x + self.attn.proj(torch.cat(out).flatten(1))
        h = self.mlp.fc1(self.norm2(x))
        return x + self.mlp.fc2(h * torch.sigmoid(1.702 * h))  # quick_gelu

class VisionTower(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c, merged, patch = c, c.embed_dim * c.spatial_merge_size ** 2, (c.temporal_patch_size, c.patch_size, c.patch_size)
        self.patch_embed = nn.ModuleDict(dict(proj=nn.Conv3d(c.in_channels, c.embed_dim, patch, patch, bias=False)))
        self.blocks = nn.ModuleList(VisionBlock(c) for _ in range(c.depth))
        mlp = nn.Sequential(nn.Linear(merged, merged), nn.GELU(), nn.Linear(merged, c.hidden_size))
        self.merger = nn.ModuleDict(dict(ln_q=nn.LayerNorm(c.embed_dim, eps=1e-6), mlp=mlp))
    def forward(self, patches, grids, run):
        """patches [N, 1176], N the sum of t*h*w over the grids -> features [N/4, D]; run(layer, ...) as Qwen2VL.run."""
        x = F.linear(patches, self.patch_embed.proj.weight.flatten(1))  # a convolution whose stride is its kernel
        places, m, half = [], self.c.spatial_merge_size, self.c.embed_dim // self.c.num_heads // 2
        for t, h, w in grids:
            place = torch.cartesian_prod(torch.arange(h), torch.arange(w)).view(h // m, m, w // m, m, 2)
            places.append(place.transpose(1, 2).reshape(-1, 2).repeat(t, 1))  # [t*h*w, 2] row, column, in 2x2 blocks
        angles = torch.cat(places)[..., None] * 10000.0 ** (-torch.arange(0, half, 2) / half)  # [N, 2, E/4]: row | column
        cos, sin = (z.flatten(1).repeat(1, 2).to(x.device) for z in (angles.cos(), angles.sin()))  # [N, E]
        slices = [(len(list(same)), n) for n, same in itertools.groupby(h * w for t, h, w in grids for _ in range(t))]
        for block in self.blocks:
            x = run(block, x, cos, sin, slices)
        return self.merger.mlp(self.merger.ln_q(x).view(len(x) // m ** 2, -1))

class DecoderLayer(nn.Module):
    def __init__(self, c):
        super().__init__()
        D, hidden, self.E = c.hidden_size, c.intermediate_size, c.hidden_size // c.num_attention_heads
        self.input_layernorm, self.post_attention_layernorm = (nn.RMSNorm(D, eps=c.rms_norm_eps) for _ in range(2))
        linear, bare, KE = nn.Linear, partial(nn.Linear, bias=False), c.num_key_value_heads * self.E
        self.self_attn = nn.ModuleDict(dict(q_proj=linear(D, D), k_proj=linear(D, KE), v_proj=linear(D, KE), o_proj=bare(D, D)))
        self.mlp = nn.ModuleDict(dict(gate_proj=bare(D, hidden), up_proj=bare(D, hidden), down_proj=bare(hidden, D)))
    def forward(self, x, cos, sin, attend):
        """x [N, D]; attend(q [N, H, E], k [N, K, E], v [N, K, E]) -> [n, H, E] decides who sees whom; the last n rows go on."""
        a, h = self.self_attn, self.input_layernorm(x)
        q, k, v = (proj(h).unflatten(1, (-1, self.E)) for proj in (a.q_proj, a.k_proj, a.v_proj))
        out = attend(rotate(q, cos, sin), rotate(k, cos, sin), v).flatten(1)
        x = x[len(x) - len(out):] + a.o_proj(out)
        h = self.post_attention_layernorm(x)
        return x + self.mlp.down_proj(F.silu(self.mlp.gate_proj(h)) * self.mlp.up_proj(h))

class PackedAttention:
    """Rows [B*P | B*G*C]: a prompt is causal over itself; a completion sees its prompt and, causally, itself. Behind the last
    layer, -1, only the completions' rows are needed: there a prompt is keys and values alone."""
    def __init__(self, prompts, G, C):
        (self.B, self.P), self.G, self.C, self.runs = prompts.ids.shape, G, C, prompts.runs
    def split(self, z):  # [B*P + B*G*C, heads, E] -> [B, heads, P, E] and [B*G, heads, C, E]
        prompt, own = z.split((self.B * self.P, self.B * self.G * self.C))
        return prompt.unflatten(0, (self.B, self.P)).transpose(1, 2), own.unflatten(0, (self.B * self.G, self.C)).transpose(1, 2)
    def __call__(self, layer, q, k, v):
        (q, q_own), (k, k_own), (v, v_own) = map(self.split, (q, k, v))
        out = [q[:, :, :0] if layer == -1 else F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)]
        counts, rows = [n for n, _ in self.runs], [n * self.G for n, _ in self.runs]
        parts = zip(self.runs, k.split(counts), v.split(counts), q_own.split(rows), k_own.split(rows), v_own.split(rows))
        for (_, P), k, v, q_own, k_own, v_own in parts if self.C else ():  # without padding: no kernel needs a dense mask
            k, v = (torch.cat((z[:, :, :P].repeat_interleave(self.G, 0), own), dim=2) for z, own in ((k, k_own), (v, v_own)))
            seen = causal_lower_right(self.C, P + self.C)
            out.append(F.scaled_dot_product_attention(q_own, k, v, attn_mask=seen, enable_gqa=True))  # [n*G, H, C, E]
        return torch.cat([z.transpose(1, 2).flatten(0, 1) for z in out])

class Qwen2VL(nn.Module):
    """Calling it scores completions; its parts serve decoding too. Module names are the checkpoint's."""
    def __init__(self, config):
        super().__init__()
        self.config, c, self.gradient_checkpointing = config, config.text_config, False
        self.visual = VisionTower(config.vision_config)
        layers = nn.ModuleList(DecoderLayer(c) for _ in range(c.num_hidden_layers))
        self.model = nn.ModuleDict(dict(embed_tokens=nn.Embedding(c.vocab_size, c.hidden_size), layers=layers,
                                        norm=nn.RMSNorm(c.hidden_size, eps=c.rms_norm_eps)))
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
    def run(self, function, *inputs):  # recomputed in the backward pass if gradient_checkpointing says so and there will be one
        again = self.gradient_checkpointing and torch.is_grad_enabled()
        return torch.utils.checkpoint.checkpoint(function, *inputs, use_reentrant=False) if again else function(*inputs)
    def embed_prompts(self, prompts):  # -> [B*P, D]; vision features only in the prompts' own placeholders (trap 12)
        x = self.model.embed_tokens(prompts.ids).flatten(0, 1)
        if prompts.grids:
            features = self.visual(prompts.patches, prompts.grids, self.run)
            vision = (prompts.ids == self.config.image_token_id) | (prompts.ids == self.config.video_token_id)
            x = x.masked_scatter(vision.view(-1, 1), features.to(x.dtype))
        return x
    def decoder(self, x, positions, attend):
        """Rows x [N, D] at positions [3, N] -> those that attend(layer, q, k, v) lets go on; the last layer is -1."""
        rope, E = self.config.text_config.rope_parameters, self.model.layers[0].E
        inv_freq = rope["rope_theta"] ** (-torch.arange(0, E, 2, device=x.device) / E)
        parts = (positions[..., None] * inv_freq).split(rope["mrope_section"], dim=-1)
        angles = torch.cat([part[axis] for axis, part in enumerate(parts)], dim=-1).repeat(1, 2)  # [N, E] from t | h | w
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for i, layer in enumerate(self.model.layers, -len(self.model.layers)):
            x = self.run(layer, x, cos, sin, partial(attend, i))
        return x
    def logits(self, x):
        """[N, D] -> [N, V] fp32: a log-softmax in bf16 would quantise the KL (trap 8)."""
        head, x = self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head, self.model.norm(x)
        return (F.linear(x, head.weight) if len(x) > 32 else (head.weight @ x.T).T).float()  # few rows: half the time on a CPU
    def completion_states(self, prompts, completions):
        """completions [B, G, C] ids -> [B*G*C, D], where row c predicts token c of its completion. The shift by one is here and
        nowhere else: the first row is the prompt's last token's, and the completion's own last token predicts nothing."""
        own = torch.cat((prompts.last[:, None, None].expand(-1, completions.shape[1], 1), completions[:, :, :-1]), dim=2)
        x = torch.cat((self.embed_prompts(prompts), self.model.embed_tokens(own).flatten(0, 2)))
        after = (prompts.last_position[:, None, None] + torch.arange(own.shape[2], device=own.device)).expand_as(own)
        positions = torch.cat((prompts.positions.flatten(1), after.reshape(1, -1).expand(3, -1)), dim=1)
        return self.decoder(x, positions, PackedAttention(prompts, *own.shape[1:]))
    def forward(self, prompts, completions, temperature=1.0, statistic=None):
        """-> log softmax(logits / temperature) of the completions' tokens, [B, G, C] fp32, and, if given, a statistic(logits,
        log_z, targets) -> [N]. Only their positions get logits, 2^26 (256 MB) at a time; of several pieces none is kept."""
        def score(states, targets):
            logits = self.logits(states) if temperature == 1 else self.logits(states) / temperature
            logp = -F.cross_entropy(logits, targets, reduction="none")
            with torch.no_grad():
                values = (statistic(logits, logits.gather(1, targets[:, None])[:, 0] - logp, targets),) if statistic else ()
            return logp, *values
        states, targets = self.completion_states(prompts, completions), completions.flatten()
        rows = max(1, 2 ** 26 // self.config.text_config.vocab_size)
        if len(targets) > rows and torch.is_grad_enabled():
            score = partial(torch.utils.checkpoint.checkpoint, score, use_reentrant=False)
        pieces = zip(*(score(x, y) for x, y in zip(states.split(rows), targets.split(rows))))
        scores = [torch.cat(piece).view(completions.shape).clone() for piece in pieces]  # FSDP2's hooks want no view
        return scores if statistic else scores[0]

def load_model(folder, device, dtype, wrap=lambda model: model):
    """A folder of the hub's shape, one file or shards with an index -> Qwen2VL. A missing, extra or misshapen tensor ends the
    program, by name. `wrap` may shard the empty model; each rank then keeps its part of every tensor it reads."""
    try:
        config, index = AutoConfig.from_pretrained(folder), folder / "model.safetensors.index.json"
        files = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
        where = {name: f for f in (safe_open(folder / file, "pt") for file in sorted(files)) for name in f.keys()}
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        fail(f"--model {folder}: no readable checkpoint: {str(error).splitlines()[0]}")
    if config.model_type != "qwen2_vl":
        fail(f"--model {folder}: its config.json says model_type {config.model_type!r}, must be 'qwen2_vl'")
    with torch.device("meta"):
        model = wrap(Qwen2VL(config))
    found, wanted = {name: list(f.get_slice(name).get_shape()) for name, f in where.items()}, model.state_dict()
    if wrong := {*found} ^ {*wanted} or {name for name in wanted if found[name] != list(wanted[name].shape)}:
        fail(*(f"--model {folder}: tensor {name} is {found.get(name, 'missing')}, must be "
               f"{list(wanted[name].shape) if name in wanted else 'absent'}" for name in sorted(wrong)))
    for name, empty in wanted.items():
        wanted[name] = where[name].get_tensor(name).to(device, dtype)
        if isinstance(empty, DTensor):  # its mesh may be on another device than the one where it stays
            wanted[name] = distribute_tensor(wanted[name], empty.device_mesh, empty.placements, src_data_rank=None).to(device)
    model.load_state_dict(wanted, assign=True)
    return model
# === end shared: qwen2_vl ===

# === shared: video_prompt — identical in grpo_video.py, sft_video.py, eval_video.py (checked by test_smoke.py) ===
INSTRUCTION = (" Output the thinking process in <think> </think> and final answer in <answer> </answer> tags, i.e., "
               "<think> reasoning process here </think><answer> answer here </answer>. ")

def inside(root, path):
    """A path relative to the data root -> Path; ValueError if it leaves the root or is no regular file."""
    full, root = (root / path).resolve(), root.resolve()
    if not (full.is_relative_to(root) and full.is_file()):
        raise ValueError(f"{path!r} {'is no file in' if full.is_relative_to(root) else 'leaves'} the data root {root}")
    return full

def text_field(raw, key):
    if not isinstance(raw.get(key), str) or not raw[key].strip():
        raise ValueError(f"field {key!r} must be a non-empty string, is {raw.get(key)!r:.60}")
    return raw[key]

def parse_record(raw, root):
    """A benchmark row -> record: sample_id, domain, media [(kind, Path)], question, and choices with the gold letter or, where
    golden_choice_idx is absent, the answer and the negatives to draw from. ValueError says what is wrong."""
    record = dict(sample_id=raw["sample_id"], domain=str(raw.get("domain") or "all"), question=text_field(raw, "question"))
    if raw.get("golden_choice_idx") is not None:
        record |= dict(choices=[text_field(raw, f"choice_{letter}") for letter in "abcd"], gold=raw["golden_choice_idx"])
        if record["gold"] not in ("A", "B", "C", "D"):
            raise ValueError(f"golden_choice_idx {record['gold']!r:.60} must be A, B, C or D")
    else:
        answer, given = text_field(raw, "answer"), raw.get("negative_answers")
        usable = isinstance(given, list) and all(isinstance(n, str) and n.strip() for n in given)
        record |= dict(answer=answer, negatives=[n for n in dict.fromkeys(given) if n != answer] if usable else [])
        if len(record["negatives"]) < 3:
            raise ValueError("without golden_choice_idx, negative_answers must be at least 3 different strings beside the answer")
    source, progress = text_field(raw, "video_source"), raw.get("task_progress_metadata")
    if not isinstance(progress, list):
        raise ValueError("field 'task_progress_metadata' must be a list (an empty one means: no video)")
    media = [("video", f"videos/{source}/{text_field(raw, 'video_basename')}")] if progress else []
    media += [("image", f"images/{source}/{text_field(raw, 'current_observation_basename')}")]
    return record | dict(media=[(kind, inside(root, path)) for kind, path in media])

def load_records(path, root, parse=parse_record, fail=fail):
    """Annotations, one JSON object a line -> records. All bad ones are reported, by file:line and sample_id; exit code 2."""
    if not path.is_file():
        fail(f"{path}: no such annotation file; for --data_root, `hf download TencentARC/SEED-Bench-R1 --repo-type dataset --local-"
             "dir DIR`; for --model, `hf download Qwen/Qwen2-VL-7B-Instruct --local-dir DIR`; `grpo_video.py --toy` needs neither")
    records, problems, lines = [], [], {}
    text = path.read_bytes().removeprefix(b"\xef\xbb\xbf")  # less a byte-order mark
    for number, line in ((number, line) for number, line in enumerate(text.split(b"\n"), 1) if line.strip()):
        name = "?"
        try:
            raw = json.loads(line.decode())
            name = raw.get("sample_id") if isinstance(raw, dict) else None
            if not isinstance(name, (int, str)):
                raise ValueError("must be an object with a sample_id, an integer or a string")
            if re.search(rb"<\|\w+\|>", json.dumps(raw, ensure_ascii=False).encode()):
                raise ValueError("holds a special token such as <|video_pad|>, which only the chat template may write")
            if lines.setdefault(str(name), number) != number:
                raise ValueError(f"its sample_id is line {lines[str(name)]}'s already")
            records.append(parse(raw, root))
        except (ValueError, OSError, RecursionError) as error:  # bad UTF-8 and bad JSON are ValueErrors
            problems.append(f"{path}:{number}: sample_id {name!s:.60}: {error}")
    if problems or not records:
        fail(*problems or [f"{path}: holds no records"])
    return records

def choose(record, seed, epoch):
    """-> (choices, gold letter); ([], None) for a chat row. What is drawn depends on (seed, epoch, sample_id) alone (trap 10)."""
    if "negatives" not in record:
        return record.get("choices", []), record.get("gold")
    rng = random.Random(repr((seed, epoch, record["sample_id"])))
    choices = rng.sample([record["answer"], *rng.sample(record["negatives"], 3)], 4)
    return choices, "ABCD"[choices.index(record["answer"])]

def build_messages(record, choices):
    """The benchmark's one user turn: video if there is progress, image, then question, choices and instruction."""
    options = "".join(f"{letter}. {choice}\n" for letter, choice in zip("ABCDE", choices))
    text = dict(type="text", text=f"{record['question']}\n{options}{INSTRUCTION}")
    return [dict(role="user", content=[dict(type=kind) for kind, _ in record["media"]] + [text])]

def frame_indices(total, video_fps, fps, max_frames):
    """-> frames to decode: fps x duration, clamped to [4, max_frames], floored to even, evenly spread; a short one repeats some."""
    count = int(min(max(total / video_fps * fps, 4), max_frames)) // 2 * 2
    return np.linspace(0, total - 1, count).round().astype(int)

def read_media(kind, path, size, fps, max_frames):
    """-> uint8 frames [T, size, size, 3]; an image is its frame twice. Raises what decord and Pillow raise."""
    if kind == "image":
        image = Image.open(path).convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
        return torch.from_numpy(np.array(image.resize((size, size), Image.Resampling.BICUBIC))).expand(2, -1, -1, -1)
    reader = decord.VideoReader(str(path), num_threads=1)
    indices = frame_indices(len(reader), reader.get_avg_fps(), fps, max_frames)
    frames = torch.from_numpy(reader.get_batch(indices).asnumpy()).permute(0, 3, 1, 2)
    resize = partial(F.interpolate, size=(size, size), mode="bicubic", antialias=True)
    frames = torch.cat([resize(frame.float()).round().clamp(0, 255).byte() for frame in frames.split(1)])  # one by one: less memory
    return frames.permute(0, 2, 3, 1)

def to_patches(frames, vision):
    """uint8 frames [T, height, width, 3] -> (patches [t*h*w, 1176] uint8, grid (t, h, w)); rows are ordered
    (t, h/2, w/2, 2, 2), columns (channel, 2 frames, 14, 14)."""
    tp, p, m = vision.temporal_patch_size, vision.patch_size, vision.spatial_merge_size
    t, h, w = frames.shape[0] // tp, frames.shape[1] // p, frames.shape[2] // p
    x = frames.reshape(t, tp, h // m, m, p, w // m, m, p, 3).permute(0, 2, 5, 3, 6, 8, 1, 4, 7)
    return x.reshape(t * h * w, 3 * tp * p * p), (t, h, w)

class Decoder:
    """decode(*inputs) in a child process, because decord can hang for ever holding the GIL (trap 14), or crash. A child serves
    many samples; a timer ends one that takes too long over a sample, and the next sample gets a new child."""
    def __init__(self, decode, seconds):
        self.decode, self.seconds, self.parent = decode, seconds, None
    def serve(self, pipe):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the system ends the process, whoever holds the GIL
        torch.set_num_threads(1)  # the parent's thread pool was not forked
        while True:
            inputs = pipe.recv()
            signal.setitimer(signal.ITIMER_REAL, self.seconds)
            try:
                result = self.decode(*inputs), None
            except Exception as error:  # whatever a decoder raises is this sample's failure, which the parent reports
                result = None, f"{type(error).__name__}: {error}".splitlines()[0]
            signal.setitimer(signal.ITIMER_REAL, 0)
            pipe.send(result)
    def __call__(self, *inputs):
        """-> (result, None), or (None, what went wrong)."""
        if self.parent != os.getpid():  # a fork of the parent has no child yet
            (self.pipe, theirs), self.parent = multiprocessing.Pipe(), os.getpid()
            self.child = os.fork()
            if self.child == 0:
                self.pipe.close()
                try:
                    self.serve(theirs)
                finally:
                    os._exit(0)  # the parent has left
            theirs.close()
        try:
            self.pipe.send(inputs)
            return self.pipe.recv()
        except (EOFError, OSError):
            end, self.parent = os.waitstatus_to_exitcode(os.waitpid(self.child, 0)[1]), None
            return None, {-signal.SIGALRM: f"decoding took over {self.seconds} s"}.get(end, f"decoder died with exit code {end}")

class VideoDataset:
    """Positions in the stream of epochs -> samples; epoch e is a permutation by (seed, e), or the records' own order. A sample
    whose media cannot be read becomes {sample_id, error}: it is reported, and no other takes its place (trap 13)."""
    def __init__(self, records, tokenizer, config, c, shuffle=True):
        self.records, self.tokenizer, self.config, self.vision = records, tokenizer, config, config.vision_config
        self.c, self.shuffle, unit = c, shuffle, self.vision.patch_size * self.vision.spatial_merge_size
        self.size = max(1, round(c.frame_size / unit)) * unit  # 252 for 256: the nearest multiple of 28
        self.decoder = Decoder(self.decode, c.decode_timeout)
    def encode(self, record, choices, grids):
        """-> (prompt text, ids with as many placeholders as each grid has merged patches)."""
        messages = record.get("messages") or build_messages(record, choices)
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        counts = iter(t * h * w // self.vision.spatial_merge_size ** 2 for t, h, w in grids)
        pads = (self.config.image_token_id, self.config.video_token_id)
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        return text, [i for token in ids for i in [token] * (next(counts) if token in pads else 1)]
    def check_lengths(self, limit):
        """A prompt (with its response) over `limit` tokens, its video at max_frames, ends the program: never cut (trap 5)."""
        side, problems = self.size // self.vision.patch_size, []
        for record in self.records:
            grids = [(self.c.max_frames // 2 if kind == "video" else 1, side, side) for kind, _ in record["media"]]
            longest = record.get("choices") or [record.get("answer"), *sorted(record.get("negatives", []), key=len)[-3:]]
            length = len(self.encode(record, longest, grids)[1])
            length += len(self.tokenizer(record.get("response", ""), add_special_tokens=False).input_ids)
            problems += [f"sample_id {record['sample_id']}: up to {length} tokens, over the limit of {limit}"] * (length > limit)
        fail(*problems) if problems else None
    def decode(self, record):  # the child's work: the record's media -> [(patches, grid)]
        media = (read_media(kind, path, self.size, self.c.fps, self.c.max_frames) for kind, path in record["media"])
        return [(patches.numpy(), grid) for patches, grid in (to_patches(frames, self.vision) for frames in media)]
    def __getitem__(self, position):
        epoch, place = divmod(position, len(self.records))
        if self.shuffle:
            place = random.Random(repr((self.c.seed, epoch))).sample(range(len(self.records)), len(self.records))[place]
        record, (choices, gold) = self.records[place], choose(self.records[place], self.c.seed, epoch)
        sample = {key: record.get(key) for key in ("sample_id", "domain", "response")} | dict(choices=choices, gold=gold)
        media, problem = self.decoder(record)
        if problem:
            return sample | dict(error=f"{', '.join(str(path) for _, path in record['media'])}: {problem}")
        grids, width = [grid for _, grid in media], 3 * self.vision.temporal_patch_size * self.vision.patch_size ** 2
        patches = np.concatenate([np.empty((0, width), np.uint8), *(patches for patches, _ in media)])
        text, ids = self.encode(record, choices, grids)
        return sample | dict(text=text, ids=torch.tensor(ids), positions=mrope_positions(ids, grids, self.config),
                             patches=torch.from_numpy(patches), grids=grids)

def load_batches(dataset, batches, workers):
    """Lists of positions -> lists of samples, decoded ahead in worker processes, which leave SIGTERM and Ctrl-C to the loop."""
    atexit.register(lambda: (signal.signal(signal.SIGCHLD, signal.SIG_DFL), [w.kill() for w in multiprocessing.active_children()]))
    return torch.utils.data.DataLoader(
        dataset, batch_sampler=batches, collate_fn=list, num_workers=workers, generator=torch.Generator(),
        worker_init_fn=lambda _: [signal.signal(n, signal.SIG_IGN) for n in (signal.SIGTERM, signal.SIGINT)])
# === end shared: video_prompt ===

# === shared: answer — identical in grpo_video.py, eval_video.py (checked by test_smoke.py) ===
def extract_answer(text, letters="ABCD"):
    """The one letter that a response gives inside <answer> tags (or behind the thinking), or None: alone, bracketed, boxed, bold;
    `B. text`, `B) text`, `B: text`; `answer is B`, `Answer: B`, `option B`. `A knife` and `A or B` give none (trap 11)."""
    if "<answer>" in text:
        answers = {extract_answer(part.partition("</answer>")[0], letters) for part in text.split("<answer>")[1:]}
        return answers.pop() if len(answers) == 1 else None
    text = text.rpartition("</think>")[2]
    if "<think>" in text:
        return None  # cut off while thinking
    text = re.sub(r"\\[a-z]+|[{}$*`]", " ", text).strip()  # \boxed{\text{B}}, **B**
    one, several = f"[{letters}]", rf"[{letters}](?!\w)(?:\W*(?:\bor\b|\band\b|[,/&])\W*[{letters}](?!\w))*"
    if re.fullmatch(rf"\W*{one}\W*", text, re.I):
        return re.search(one, text, re.I)[0].upper()
    if re.fullmatch(rf"\W*{one}(?:(?:\W|\bor\b|\band\b)+{one})+\W*", text):
        found = re.findall(one, text)  # nothing but letters
    else:
        found = re.findall(rf"(?:^\W*|[\s(])({one})(?:[):]|\.(?=\s+\S))", text)
        for group in re.findall(rf"(?i:answer|option|choice)(?i: is|:)*\W*({several})(?!'|\s+(?!or\b|and\b)[a-z])", text):
            found += re.findall(one, re.sub(r"\b(?:or|and)\b", "", group))
    return found[0] if len({*found}) == 1 else None

def gather_rows(rows):  # every rank's list of rows -> all, in rank order
    parts = [None] * WORLD
    dist.all_gather_object(parts, rows)
    return [row for part in parts for row in part]
# === end shared: answer ===

# === shared: sampling — identical in grpo_video.py, eval_video.py (checked by test_smoke.py) ===
class KVCache:
    """Each prompt's keys and values once for its group, and room for C tokens of each completion. Keys are fp32: scores rounded to
    bf16 are not the update's. column [1]: the token in hand; mask [B*G, 1, 1, P+C]: 0 where a row may look, else -inf."""
    def __init__(self, prompts, G, C):
        (self.B, self.P), self.G, self.C, self.prefill = prompts.ids.shape, G, C, PackedAttention(prompts, G, 0)
        seen = torch.arange(self.P + C, device=prompts.ids.device) < prompts.lengths[:, None] - 1  # [B, P+C]
        self.mask = torch.where(seen, 0.0, -math.inf).repeat_interleave(G, 0)[:, None, None]
        self.prompt, self.own, self.column = {}, {}, prompts.lengths.new_full((1,), -1)
    def __call__(self, layer, q, k, v):  # the prompts' rows [B*P, heads, E]; then a token of each completion, [B*G, heads, E]
        if layer not in self.prompt:
            self.prompt[layer] = [self.prefill.split(z)[0].contiguous() for z in (k.float(), v)]  # [B, K, P, E]
            self.own[layer] = [z.new_zeros(self.B * self.G, z.shape[1], self.C, z.shape[3]) for z in self.prompt[layer]]
            return self.prefill(layer, q, k, v)
        prompt_k, prompt_v = self.prompt[layer]
        own_k, own_v = (cache.index_copy_(2, self.column, z[:, :, None]) for cache, z in zip(self.own[layer], (k.float(), v)))
        q = q.float().unflatten(1, (k.shape[1], -1)) * q.shape[2] ** -0.5  # [B*G, K, R, E]: R query heads to a key head
        scores = self.by_prompt(q) @ prompt_k.transpose(2, 3)  # [B, K, G*R, P]: nothing is repeated G times
        scores = torch.cat((self.by_row(scores), q @ own_k.transpose(2, 3)), dim=-1) + self.mask  # [B*G, K, R, P+C]
        on_prompt, on_own = scores.softmax(-1).to(v.dtype).split((self.P, self.C), dim=-1)
        return (self.by_row(self.by_prompt(on_prompt) @ prompt_v) + on_own @ own_v).flatten(1, 2)  # [B*G, H, E]
    def compact(self, going):
        """going [B*G] bool -> the rows that stay: once half can leave, those of unfinished prompts, as many as the busiest has."""
        going = going.view(self.B, self.G)
        kept, most = going.any(1).nonzero()[:, 0], int(going.sum(1).max())  # [b]
        if 2 * len(kept) * most > going.numel():
            return None
        rows = (kept[:, None] * self.G + going[kept].long().argsort(descending=True, stable=True)[:, :most]).flatten()  # [b*g]
        self.prompt = {layer: [z[kept] for z in both] for layer, both in self.prompt.items()}
        self.own = {layer: [z[rows] for z in both] for layer, both in self.own.items()}
        self.mask, self.B, self.G = self.mask[rows], len(kept), most
        return rows
    def by_prompt(self, z):  # [B*G, K, R, X] -> [B, K, G*R, X]: a group's rows side by side meet their prompt in one product
        return z.unflatten(0, (self.B, self.G)).transpose(1, 2).flatten(2, 3)
    def by_row(self, z):  # [B, K, G*R, X] -> [B*G, K, R, X]
        return z.unflatten(2, (self.G, -1)).transpose(1, 2).flatten(0, 1)

def pick(logits, uniform, temperature, top_k, top_p):
    """logits [N, V] fp32, uniform [N] float64 in [0, 1) -> ids [N]. Greedy at temperature 0; else the cumulative
    distribution inverted at `uniform`, so that a row's tokens come from its own numbers, whatever shares its batch."""
    if temperature == 0:
        return logits.argmax(-1)
    probs = (logits / temperature).softmax(-1)
    if top_k > 0:
        probs = probs * (probs >= probs.topk(min(top_k, probs.shape[1])).values[:, -1:])
    if top_p < 1:  # the smallest set of tokens that reaches top_p: those with less than top_p before them
        ordered, order = (probs / probs.sum(-1, keepdim=True)).sort(-1, descending=True)
        probs = probs * torch.empty_like(probs).scatter(1, order, (ordered.cumsum(-1) - ordered < top_p).to(probs.dtype))
    cumulative = probs.cumsum(-1, dtype=torch.float64)
    return torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)[:, 0].clamp(max=probs.shape[1] - 1)

def completion_mask(ids, end_ids):
    """ids [..., C] -> bool, True through the first end token, inclusive; all True where none came (traps 3 and 4)."""
    ends = torch.isin(ids, torch.tensor(end_ids, device=ids.device)).long()
    return ends.cumsum(-1) - ends == 0

@torch.no_grad()
def generate(model, prompts, G, C, end_ids, seeds, temperature=1.0, top_k=0, top_p=1.0):
    """-> G completions of each prompt, ids [B, G, c], c <= C, filled up with end_ids[0]. Random numbers come from a prompt's seed
    (an int) and the place in the group; generation_config.json is never read (trap 1), the cache is always on (trap 17)."""
    B, device, cache = len(prompts.ids), prompts.ids.device, KVCache(prompts, G, C)
    uniform = torch.cat([torch.rand(G, C, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    uniform, ends = uniform.to(device), torch.tensor(end_ids, device=device)  # [B*G, C]
    model.decoder(model.embed_prompts(prompts), prompts.positions.flatten(1), cache)
    token, position = (z.repeat_interleave(G) for z in (prompts.last, prompts.last_position))  # [B*G]
    ended, rows = torch.zeros(B * G, dtype=torch.bool, device=device), torch.arange(B * G, device=device)
    def step():  # a token of each row; all that it changes keeps its place in memory, as a graph needs
        cache.mask.index_fill_(3, cache.column.add_(1) + cache.P, 0)
        x = model.decoder(model.model.embed_tokens(token), (position + cache.column).expand(3, -1), cache)
        token.copy_(pick(model.logits(x), uniform[rows, cache.column], temperature, top_k, top_p))
        out[rows, cache.column] = torch.where(ended, ends[0], token)
        ended.logical_or_(torch.isin(token, ends))
    out, run = torch.full((B * G, C), end_ids[0], device=device), step
    for t in range(C):
        run()
        going = ~ended.cpu()  # the host waits for the device here and nowhere else
        if not going.any():
            break
        if len(going) > 32 and (stay := cache.compact(going)) is not None:  # fewer cost what one does: the weights are read
            (rows, token, position, ended), run = (z[stay] for z in (rows, token, position, ended)), step
        elif token.is_cuda and run is step:  # which has loaded its kernels now: from here on they start all at once
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may go on, NCCL's for one
                step()
            run = graph.replay
    return out[:, :t + 1].view(B, G, -1)
# === end shared: sampling ===

COLUMNS = ("L1", "L2", "L3 Daily life", "L3 Hobbies", "L3 Recreation", "L3 Work", "L3")
PAPER = {  # accuracy in %, arXiv 2503.24376
    "paper: Qwen2-VL-7B": "34.79 34.02 31.21 32.30 33.33 30.69 31.57",
    "paper: + SFT": "43.79 44.10 38.27 41.02 32.24 38.61 38.15",
    "paper: + GRPO": "46.01 50.16 48.52 45.08 43.72 41.34 44.89"}
DECIDING = "do_sample temperature top_k top_p seed num_samples max_completion_length ablate max_frames fps frame_size".split()

class ShuffledFrames(VideoDataset):
    """--ablate shuffle_frames: the frames, in pairs as the model takes them in, in an order drawn by sample_id."""
    def decode(self, record):
        rng = random.Random(repr(record["sample_id"]))
        return [(np.concatenate(rng.sample(np.split(x, grid[0]), grid[0])), grid) for x, grid in super().decode(record)]

def load_longvideobench(root):
    """lvb_val.json -> records: 4 or 5 candidates, no image, no subtitles. A bad entry is reported by its place; exit code 2."""
    path, records, place = root / "lvb_val.json", {}, "none"
    try:
        for place, raw in enumerate(json.loads(path.read_text())):
            name, texts, right = text_field(raw, "id"), raw["candidates"], raw["correct_choice"]
            if name in records or texts != [*map(str, texts)] or len(texts) not in (4, 5) or right not in range(len(texts)):
                raise ValueError(f"{name} is there twice, or lacks 4 or 5 candidates, one of them correct: {texts}, {right!r}")
            records[name] = dict(sample_id=name, question=text_field(raw, "question"), choices=texts, gold="ABCDE"[right],
                                 media=[("video", inside(root, f"videos/{text_field(raw, 'video_path')}"))],
                                 domain=f"{raw['duration_group']} s", category=text_field(raw, "question_category"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        fail(f"{path}: entry {place}: {error!r}; `hf download --repo-type dataset longvideobench/LongVideoBench` fetches it")
    return list(records.values())

def read_rows(path):
    """A file of one JSON object a line -> the objects of its whole lines; a kill may have left half a line behind them."""
    try:
        return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]] if path.exists() else []
    except ValueError as error:
        fail(f"{path}: {error}")

def open_split(folder, split, settings):
    """-> (path, ids) of the rows that are there already. Another model's, or by other data or settings, are an error."""
    path, settings_path = folder / f"predictions_{split}.jsonl", folder / f"settings_{split}.json"
    done = {row["sample_id"] for row in read_rows(path)}
    before = json.loads(settings_path.read_text()) if done else settings
    if changed := [key for key in settings if before.get(key) != settings[key]]:
        fail(*(f"--output_dir {folder}: its {split} has {key} {before.get(key)!r}, not {settings[key]!r}" for key in changed))
    if RANK == 0 and done:  # the other ranks may still be reading, but not what changes here
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    elif RANK == 0:
        folder.mkdir(parents=True, exist_ok=True)
        settings_path.write_text(json.dumps(settings, indent=1))
        path.write_bytes(b"")
    return path, done

def predict(model, tokenizer, samples, c):
    """One batch of samples -> rows of predictions_<split>.jsonl; an unreadable sample's has its error and no response."""
    good, rows = [s for s in samples if "error" not in s], []
    if good:
        weight, end_ids = model.model.embed_tokens.weight, tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
        seeds = [random.Random(repr((c.seed, s["sample_id"]))).getrandbits(63) for s in good]
        ids = generate(model, Prompts.collate(good, weight.device, weight.dtype), c.num_samples, c.max_completion_length,
                       end_ids, seeds, c.temperature if c.do_sample else 0.0, c.top_k, c.top_p)  # [B, K, C]
        for s, group in zip(good, ids):
            s["texts"] = [tokenizer.decode(row, skip_special_tokens=True) for row in group]  # fills are end tokens
            s["first"] = group[0][completion_mask(group[0], end_ids)].tolist()
    for s in samples:
        texts = s.get("texts", [None])
        answers = [extract_answer(text or "", "ABCDE"[:len(s["choices"])]) for text in texts]
        predicted = max(filter(None, answers), key=answers.count, default=None)  # the majority's, the first sampled of equals
        rows.append(dict(sample_id=s["sample_id"], response=texts[0], ids=s.get("first"), predicted=predicted, gold=s["gold"],
                         correct=predicted == s["gold"], domain=s["domain"], error=s.get("error")))
        rows[-1] |= dict(responses=texts, answers=answers) if c.num_samples > 1 else {}
    return rows

def wilson(correct, total):
    """95 % Wilson score interval of a proportion -> (low, high); (0, 1) where there is nothing to count."""
    z2, variance = 1.959964 ** 2, correct * (total - correct) / max(1, total)
    return [(correct + z2 / 2 + sign * math.sqrt(z2 * (variance + z2 / 4))) / (total + z2) for sign in (-1, 1)]

def mcnemar(gained, lost):
    """Exact two-sided p-value of a split as uneven as this of the questions that just one of two equal models gets right."""
    return min(1.0, 2 * sum(math.comb(gained + lost, k) for k in range(min(gained, lost) + 1)) / 2 ** (gained + lost))

def tally(rows, *keys):
    """Prediction rows -> counts and accuracy, the same by each key. Failed ones are in accuracy_failed_wrong's total alone."""
    seen = [row for row in rows if not row["error"]]
    correct, total = sum(row["correct"] for row in seen), len(seen)
    counts = dict(accuracy=correct / max(1, total), correct=correct, total=total, failed=len(rows) - total,
                  no_answer=sum(row["predicted"] is None for row in seen), ci95=wilson(correct, total),
                  accuracy_failed_wrong=correct / max(1, len(rows)))
    if rights := [[answer == row["gold"] for answer in row["answers"]] for row in seen if "answers" in row]:
        counts |= dict(mean_accuracy=float(np.mean(rights)), pass_at_k=float(np.any(rights, axis=1).mean()))
    for key in filter(counts.__contains__, ("accuracy_failed_wrong", "mean_accuracy", "pass_at_k")):  # K samples count as one
        counts[f"{key}_ci95"] = wilson(counts[key] * (n := len(rows) if key.endswith("wrong") else total), n)
    return counts | {f"by_{key}": {name: tally([row for row in rows if row.get(key) == name])
                                   for name in sorted({row[key] for row in rows if key in row}, key=str)} for key in keys}

def score(rows, first):
    """Accuracy in % (95 % interval), what differs from it, and the paired difference to the first model's rows."""
    x, before = tally(rows), {row["sample_id"]: row["correct"] for row in first if not row["error"]}
    pairs = [(before[row["sample_id"]], row["correct"]) for row in rows if not row["error"] and row["sample_id"] in before]
    gained, lost = pairs.count((False, True)), pairs.count((True, False))
    more = [key for key in ("mean_accuracy", "pass_at_k", "accuracy_failed_wrong") if x.get(key, x["accuracy"]) != x["accuracy"]]
    text = ", ".join(f"{key} {100 * x[key]:.1f} ({100 * low:.0f}–{100 * high:.0f})" for key in ["accuracy", *more]
                     for low, high in [x.get(f"{key}_ci95", x["ci95"])]).removeprefix("accuracy ")
    return text + (f", {100 * (gained - lost) / len(pairs):+.1f} (p = {mcnemar(gained, lost):.2g})" if pairs else "")

def table(answers, paper):
    """{folder: {split: rows}} -> Markdown, a line of scores for each folder; all but the first are compared to the first."""
    lines, (first, *_) = {}, answers.values()
    for folder, splits in answers.items():
        lines[folder] = dict(failed=str(sum(row["error"] is not None for rows in splits.values() for row in rows)))
        for split, rows in splits.items():
            for name in {"all", *(row["domain"] for row in rows)}:
                column = f"{split.removeprefix('validation_')} {name}".removesuffix(" all")
                part = [row for row in rows if name in ("all", row["domain"])]
                lines[folder][column] = score(part, first.get(split, []) if splits is not first else [])
    lines |= {model: dict(zip(COLUMNS, values.split())) for model, values in PAPER.items() if paper}
    names = sorted({*itertools.chain(*lines.values())}, key=lambda name: re.sub(r"\d+ s", lambda x: x[0].zfill(6), name))
    rows = [[model, *(line.get(name, "") for name in names)] for model, line in lines.items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in [["model", *names], ["---"] * (len(names) + 1), *rows])

def cot_rows(split, rows, root, c):
    """Each question's right responses that show their thinking, the shortest cot_per_question -> rows for sft_video.py."""
    for row in rows:
        right = {text.strip() for text in row.get("responses", [row["response"]])
                 if text and "</think>" in text and extract_answer(text) == row["gold"]}
        [message] = build_messages(row, choose(row, c.seed, 0)[0])
        for part, (kind, path) in zip(message["content"], row["media"]):
            part[kind] = str(path.relative_to(root.resolve()))
        for i, text in enumerate(sorted(right, key=lambda text: (len(text), text))[:c.cot_per_question]):
            yield dict(sample_id=f"{split}_{row['sample_id']}_{i}", prompt=[message], response=text)

def main():
    c = parse_config(Config, TOY)
    if c.compare:
        answers = {folder: {p.stem.removeprefix("predictions_"): read_rows(p) for p in Path(folder).glob("predictions_*")}
                   or fail(f"--compare {folder}: no predictions there; must be an evaluated folder") for folder in c.compare}
        return print(table(answers, c.paper))
    c.do_sample = c.do_sample or c.num_samples > 1  # K greedy responses would be one
    (device, dtype), root = set_up(c.toy), Path(c.data_root)
    if c.validate:
        sys.exit(RANK == 0 and subprocess.call([sys.executable, HERE / "tools/validate.py", c.data_root]))
    splits = {split: load_records(root / f"annotations/{split}.jsonl", root) for split in c.splits}
    splits |= {"LVB": load_longvideobench(Path(c.longvideobench))} if c.longvideobench else {}
    tokenizer = AutoTokenizer.from_pretrained(source := find_model(c.model))
    folder = Path(c.output_dir or f"runs/eval-{Path(c.model).resolve().name}")
    model = load_model(source, device, dtype)
    answers, weights = {}, [hashlib.file_digest(open(f, "rb"), "sha256").digest() for f in sorted(source.glob("*.safetensors"))]
    settings = {key: getattr(c, key) for key in DECIDING} | dict(model_sha256=hashlib.sha256(b"".join(weights)).hexdigest())
    for split, records in splits.items():
        asked = json.dumps([(r["sample_id"], r["question"], choose(r, c.seed, 0)) for r in records]).encode()
        path, done = open_split(folder, split, settings | dict(data_sha256=hashlib.sha256(asked).hexdigest()))
        records = {r["sample_id"]: r | dict(media=[m for m in r["media"] if c.ablate not in ("text_only", f"no_{m[0]}")])
                   for r in records[:c.limit or None]}
        todo = [r for r in records.values() if r["sample_id"] not in done]
        dataset = (ShuffledFrames if c.ablate == "shuffle_frames" else VideoDataset)(todo, tokenizer, model.config, c, False)
        batches = [range(len(todo))[start + RANK * c.batch_size:][:c.batch_size]  # the last may be empty on some ranks
                   for start in range(0, len(todo), WORLD * c.batch_size)]
        with open(path if RANK == 0 else os.devnull, "a") as f:
            for samples in tqdm(load_batches(dataset, batches, c.dataloader_num_workers), desc=split, disable=RANK > 0):
                print(*map(json.dumps, gather_rows(predict(model, tokenizer, samples, c))), sep="\n", file=f, flush=True)
        answers[split] = [records[row["sample_id"]] | row for row in read_rows(path) if row["sample_id"] in records]
    if RANK == 0:
        summary = {split: tally(rows, "domain", "category") for split, rows in answers.items()}
        (folder / "summary.json").write_text(json.dumps(summary, indent=1))
        (folder / "summary.md").write_text((text := table({str(folder): answers}, c.paper)) + "\n")
        print(f"{text}\n{folder}/ holds predictions_<split>.jsonl, summary.json and summary.md")
    if c.analyze:
        from tools.analyze import analyze_all
        analyze_all(c, answers, model, tokenizer, folder)
    if RANK == 0 and c.save_cot:
        lines = "".join(json.dumps(row) + "\n" for split in c.splits for row in cot_rows(split, answers[split], root, c))
        Path(c.save_cot).write_text(lines or fail(f"--save_cot {c.save_cot}: no right response has a </think> to learn from"))
    dist.destroy_process_group()

if __name__ == "__main__":
    main()
