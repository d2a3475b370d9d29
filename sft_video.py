"""SFT on video questions: Qwen2-VL learns SEED-Bench-R1's chains of thought, in plain PyTorch. The paper's rival of GRPO.

    torchrun --nproc_per_node=8 sft_video.py                         # the paper's recipe, Qwen2-VL-7B-Instruct
    python sft_video.py --toy                                        # the tiny model, on the toy's chains of thought
    python sft_video.py --annotations FILE --answer_only             # rows without chains: learns `<answer>X. text</answer>`

A step: prompts and responses -> log-probs of the responses' tokens, through <|im_end|> and nothing before the response -> their
mean over the supervised tokens of the whole global batch -> backward -> AdamW on fp32 master weights. It is the GRPO script with
one completion a prompt, which is given, and without rewards: `diff sft_video.py grpo_video.py` is the lesson.

Dimensions: B prompts, G = 1 response of each, P and C their tokens, N rows, H heads, K key heads, E, D widths of a head, the model.
"""
import argparse, atexit, hashlib, importlib.metadata, importlib.util, itertools, json, math, multiprocessing, operator, os, random
import re, resource, shutil, signal, subprocess, sys, time, types
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Literal

import decord
import numpy as np
import torch, torch.distributed as dist, torch.distributed.checkpoint as dcp, torch.nn as nn, torch.nn.functional as F
from huggingface_hub import errors, save_torch_state_dict, snapshot_download
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.attention.bias import causal_lower_right
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer, HfArgumentParser, get_scheduler

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
    """All settings; each is a flag. Names are transformers' TrainingArguments' where it has one; defaults are the paper's."""
    model: str = flag("Qwen/Qwen2-VL-7B-Instruct", "Qwen2-VL checkpoint: a folder, or a hub id that is fetched")
    data_root: str = flag("data/SEED-Bench-R1", "folder with annotations/, videos/ and images/")
    annotations: str = flag("", "training rows; default: DATA_ROOT/annotations/training_with_cot_6k.jsonl")
    answer_only: bool = flag(False, "take plain annotation rows and supervise `<answer>X. text</answer>` alone")
    toy: bool = flag(False, "train the tiny model in toy/ on its tiny videos, building them first if they are not there")
    validate: bool = flag(False, "check every record, video and image of the data root, print a report and stop")
    output_dir: str = flag("runs/sft", "where config.json, the logs, the checkpoints and the final model go")
    overwrite_output_dir: bool = flag(False, "start anew in an output_dir that holds a run already")
    resume_from_checkpoint: str = flag("", "a checkpoint folder to go on from, or 'auto': the output_dir's last one, if any")
    seed: int = flag(42, "of the data order and the drawn choices, at least 0")
    max_length: int = flag(8192, "a prompt and response with more tokens is an error before training, never cut, at least 1")
    learning_rate: float = flag(2e-5, "peak learning rate, above 0")
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = flag("cosine", "decay after the warm-up")
    warmup_ratio: float = flag(0.1, "share of the steps that warm up, at least 0, at most 1")
    weight_decay: float = flag(0.0, "AdamW's, at least 0")
    max_grad_norm: float = flag(1.0, "gradients are clipped to this norm, above 0")
    num_train_epochs: int = flag(1, "passes over the annotations, at least 1")
    max_steps: int = flag(-1, "steps in all; -1: as num_train_epochs says, at least -1")
    per_device_train_batch_size: int = flag(1, "rows per device and micro-batch, at least 1")
    gradient_accumulation_steps: int = flag(16, "micro-batches of a step; 16 on 8 GPUs are the paper's 128 rows, at least 1")
    gradient_checkpointing: bool = flag(True, "recompute each layer in the backward pass")
    offload_optimizer: bool = flag(False, "on a GPU: fp32 weights, gradients and moments in host memory, where the optimizer steps")
    freeze_vision: bool = flag(False, "do not train the vision tower")
    eval_every: int = flag(0, "steps between evaluations of the held-out rows' loss; 0: none, at least 0")
    eval_rows: int = flag(64, "rows at the file's end that eval_every holds out, at least 1")
    max_frames: int = flag(16, "frames of a video at most, at least 2")
    fps: float = flag(2.0, "frames per second of video; 4 to max_frames in all, above 0")
    frame_size: int = flag(256, "height and width of a frame, rounded to a multiple of 28, at least 1")
    dataloader_num_workers: int = flag(2, "processes that decode ahead; 0: none, at least 0")
    decode_timeout: float = flag(60.0, "seconds after which decoding a sample is given up, above 0")
    max_bad_samples: int = flag(-1, "unreadable samples that end the run when exceeded; -1: a hundredth of the run, at least -1")
    wandb: str = flag("", "project of wandb to send the rows of metrics.jsonl to; the package is needed only then")
    logging_steps: int = flag(10, "a line on stdout every so many steps (metrics.jsonl has every step), at least 1")
    save_steps: int = flag(100, "steps between checkpoints, at least 1")
    save_total_limit: int = flag(2, "newest checkpoints kept; 0: all, at least 0")

TOY = dict(model=str(HERE / "toy/model"), data_root=str(HERE / "toy/data"), output_dir="runs/toy-sft", learning_rate=2e-3,
           overwrite_output_dir=True, max_steps=100, per_device_train_batch_size=16, gradient_accumulation_steps=1,
           max_frames=8, frame_size=56, gradient_checkpointing=False, dataloader_num_workers=1)

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

# === shared: training — identical in grpo_video.py, sft_video.py (checked by test_smoke.py) ===
def rank_batches(total, steps, B, accumulation):
    """-> this rank's B positions, in a stream of `total` samples, for each micro-batch; a step's do not depend on its division."""
    starts = [((step * accumulation + a) * WORLD + RANK) * B for step in steps for a in range(accumulation)]
    return [[p for p in range(start, start + B) if p < total] for start in starts]

def shard(model, device, dtype, offload=False):
    """FSDP2 over the ranks (HSDP over nodes): fp32 shards, the master weights (at lr 1e-6 an update of bf16 rounds away), gathered
    as `dtype` to compute; fp32 gradients. `offload` keeps all that in host memory. One CPU process needs no wrapper."""
    if WORLD > 1 or device.type == "cuda":
        local = int(os.environ.get("LOCAL_WORLD_SIZE", WORLD))
        shape = (WORLD // local, local) if local < WORLD else (WORLD,)
        mesh = dist.init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard")[-len(shape):])
        place = CPUOffloadPolicy(pin_memory=False) if offload else OffloadPolicy()  # pinned, a tensor takes the next power of two
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for part in (*model.visual.blocks, *model.model.layers, model):  # a root left whole after its forward would go stale
            fully_shard(part, mesh=mesh, mp_policy=policy, offload_policy=place, reshard_after_forward=True)
    return model

def gathered(tensor, dtype):  # a sharded tensor whole, and on the device that computes, even if its shards are not
    tensor = tensor.detach().to(dtype)
    return tensor.to(tensor.device_mesh.device_type).full_tensor() if isinstance(tensor, DTensor) else tensor

def optimizer_step(model, optimizer, learning_rate, max_grad_norm, loss):
    """Clips and applies the gradients -> their norm before. If it or the loss is not finite, nothing is applied."""
    norm = float(gathered(nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm), torch.float32))
    if math.isfinite(norm + loss):
        optimizer.param_groups[0]["lr"] = learning_rate
        optimizer.step()
    optimizer.zero_grad()
    return norm

def blank_sample(config):
    """A vision token and a word: what a rank without a sample computes, with weight zero, so that no other waits for it."""
    vision, m, ids = config.vision_config, config.vision_config.spatial_merge_size, [config.image_token_id, 0]
    patches = torch.zeros(m * m, 3 * vision.temporal_patch_size * vision.patch_size ** 2, dtype=torch.uint8)
    return dict(ids=torch.tensor(ids), positions=mrope_positions(ids, [(1, m, m)], config), patches=patches, grids=[(1, m, m)])

def global_sums(device, **values):  # {name: number} -> {name: its sum over the ranks}
    total = torch.tensor([float(v) for v in values.values()], dtype=torch.float64, device=device)
    if WORLD > 1:
        dist.all_reduce(total)
    return dict(zip(values, total.tolist()))

def lap(log, name, device):
    """Logs the seconds since the last lap (CUDA's queue is emptied first) and the peak memory, allocated or, on CPU, resident."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    log[name], log["clock"] = time.perf_counter() - log["clock"], time.perf_counter()
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    log["peak_memory_gb"] = (torch.cuda.max_memory_allocated() if device.type == "cuda" else host) / 2 ** 30

def catch_signals():
    """-> a list that receives SIGTERM or SIGINT: the loop ends its step, saves and leaves. A second one kills at once."""
    caught = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: (caught.append(number), signal.signal(number, signal.SIG_DFL)))
    return caught

def append_rows(path, rows):  # JSON lines; a number that is not finite stands as NaN or Infinity, as Python's json reads it
    with open(path, "a") as f:
        f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

def log_step(c, log):
    """Appends a step's row to metrics.jsonl, and sends it to wandb if --wandb says so."""
    row = {key: value for key, value in log.items() if key != "clock"}
    append_rows(Path(c.output_dir, "metrics.jsonl"), [row])
    if c.wandb:
        import wandb
        wandb.log(row, step=row["step"])

def save_model(model, folder, source, dtype):
    """Writes a folder that transformers loads: safetensors (sharded above 5 GB), config.json with the run's settings in it, and the
    tokenizer's and processor's files of `source`, where the model came from. Rank 0 writes what all ranks gather."""
    whole = ((name, gathered(p, dtype)) for name, p in model.state_dict().items())
    state = {name: tensor.cpu() for name, tensor in whole if RANK == 0}
    if RANK == 0:
        folder.mkdir(parents=True, exist_ok=True)
        save_torch_state_dict(state, folder, max_shard_size="5GB")
        for file in source.iterdir():
            if file.suffix in (".json", ".txt", ".jinja") and not file.name.endswith(".index.json"):
                shutil.copyfile(file, folder / file.name)
        model.config.save_pretrained(folder)
    barrier()

def checkpoints(output_dir):  # a run's complete ones, oldest first
    return sorted((p for p in output_dir.glob("checkpoint-*") if p.name[11:].isdigit()), key=lambda p: int(p.name[11:]))

def open_run(c, config, dtype):
    """Makes output_dir and its config.json: the model's, and an entry "run" with all settings, versions and the script's sha256 ->
    the checkpoint to go on from (a restart by torchrun finds it by itself) or None; its step or 0: what came later is removed."""
    output_dir = Path(c.output_dir)
    wish = "auto" if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) else c.resume_from_checkpoint
    checkpoint = (checkpoints(output_dir) or [None])[-1] if wish == "auto" else Path(wish) if wish else None
    if checkpoint and not (checkpoint in checkpoints(checkpoint.parent) and (checkpoint / "resume").is_dir()):
        fail(f"--resume_from_checkpoint {checkpoint}: no checkpoint-<step> folder of a run; 'auto' finds the last one")
    if output_dir.is_file() or (output_dir / "metrics.jsonl").exists() and not wish and not c.overwrite_output_dir:
        fail(f"--output_dir {output_dir} is taken: --resume_from_checkpoint auto goes on, --overwrite_output_dir begins anew")
    if c.wandb and not getattr(importlib.util.find_spec("wandb"), "origin", None):  # wandb's own folder of runs has none
        fail(f"--wandb {c.wandb}: the package is not there; `pip install wandb`")
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "decord", "numpy", "pillow")}
    script, start = hashlib.sha256(Path(__file__).read_bytes()).hexdigest(), int(checkpoint.name[11:]) if checkpoint else 0
    config.run = asdict(c) | dict(versions=versions, script_sha256=script, world_size=WORLD)
    config.dtype = config.text_config.dtype = dtype  # else transformers would round fp32 weights
    barrier()  # rank 0 changes nothing before all have looked
    if RANK == 0:
        output_dir.mkdir(parents=True, exist_ok=True)
        for later in (p for p in checkpoints(output_dir) if int(p.name[11:]) > start):
            shutil.rmtree(later)
        for log in filter(Path.exists, (output_dir / f"{name}.jsonl" for name in ("metrics", "rollouts", "audit"))):
            os.truncate(log, sum(len(line) for line in log.read_bytes().splitlines(keepends=True)
                                 if line.endswith(b"\n") and json.loads(line)["step"] <= start))
        config.save_pretrained(output_dir)
        if c.wandb:
            import wandb
            wandb.init(project=c.wandb, name=c.output_dir, config=config.run)
    barrier()
    return checkpoint, start

def training_state(model, optimizer):
    """{name: tensor}: weights, moments, step counts, all that training goes on from; zero moments before the first step."""
    weights, moments = get_state_dict(model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True))
    return {name: z if z.dim() else z.view(1) for name, z in (weights | moments).items() if isinstance(z, torch.Tensor)}

def save_checkpoint(c, step, model, optimizer, source, dtype):
    """output_dir/checkpoint-<step>: a model folder, and in resume/ the shards of training_state. Written beside, synced, then
    renamed: a kill at any moment leaves the last complete one. The newest save_total_limit are kept."""
    final, beside = (Path(c.output_dir, f"checkpoint-{step}{suffix}") for suffix in ("", ".tmp"))
    if RANK == 0:
        shutil.rmtree(beside, ignore_errors=True)  # a kill's leftover, if there is one
    barrier()
    save_model(model, beside, source, dtype)
    writer = dcp.HuggingFaceStorageWriter(str(beside / "resume"), save_distributed=True)
    dcp.save(training_state(model, optimizer), storage_writer=writer)
    os.sync()
    barrier()
    if RANK == 0:
        shutil.rmtree(final, ignore_errors=True)  # of the run's first try, if this one was resumed from before it
        beside.rename(final)
        for old in checkpoints(final.parent)[:-c.save_total_limit] if c.save_total_limit else []:
            shutil.rmtree(old)
    barrier()
# === end shared: training ===

def parse_chat(raw, root):
    """A row with its own messages (`prompt`) and `response` -> record: sample_id, domain, media, messages, response."""
    messages, media = raw.get("prompt"), []
    if not isinstance(messages, list) or not all(isinstance(m, dict) and m.get("content") for m in messages):
        raise ValueError("field 'prompt' must be a list of chat messages with content; --answer_only takes plain annotation rows")
    for m in (m for m in messages if isinstance(m["content"], list)):
        if not all(isinstance(x, dict) and x.get("type") in ("video", "image", "text") for x in m["content"]):
            raise ValueError("each entry of a message's content must be an object whose type is video, image or text")
        m["content"] = [{k: v for k, v in x.items() if v is not None} for x in m["content"]]  # released rows hold null keys
        media += [(x["type"], text_field(x, x["type"])) for x in m["content"] if x["type"] != "text"]
    return dict(sample_id=raw["sample_id"], domain=str(raw.get("domain") or "all"), messages=messages,
                response=text_field(raw, "response"), media=[(kind, inside(root, path)) for kind, path in media])

def supervise(samples, tokenizer, config, device, dtype):
    """B samples -> prompts, responses [B, 1, C] ids and mask [B, 1, C]: the response's own tokens and the <|im_end|> behind it are
    supervised, nothing else. Unreadable samples are left out; if none is left, a blank prompt with no supervised token."""
    end, samples = tokenizer.convert_tokens_to_ids("<|im_end|>"), [s for s in samples if "error" not in s]
    texts = [s["response"] or f"<answer>{s['gold']}. {s['choices']['ABCD'.index(s['gold'])]}</answer>" for s in samples]
    rows = [torch.tensor(tokenizer(text, add_special_tokens=False).input_ids + [end]) for text in texts]
    ids = nn.utils.rnn.pad_sequence(rows or [torch.tensor([end])], batch_first=True, padding_value=end)[:, None]  # [B, 1, C]
    mask = torch.arange(ids.shape[2]) < torch.tensor([len(row) for row in rows] or [0])[:, None, None]
    return Prompts.collate(samples or [blank_sample(config)], device, dtype), ids.to(device), mask.to(device)

def cross_entropy(model, prompts, responses, mask, tokens):
    """-> -Σ log π(token) / `tokens`, the whole step's supervised tokens (trap 15), and how many of them are the likeliest."""
    logp, greedy = model(prompts, responses, statistic=lambda logits, log_z, targets: logits.argmax(-1) == targets)
    return -(logp * mask).sum() / tokens, (greedy & mask).sum()

@torch.no_grad()
def evaluate(model, batches, device):
    """-> mean loss per supervised token over the held-out rows."""
    losses, tokens = zip(*((cross_entropy(model, *batch, 1)[0], batch[2].sum()) for batch in batches))
    sums = global_sums(device, loss=sum(losses), tokens=sum(tokens))
    return sums["loss"] / sums["tokens"]

def main():
    c = parse_config(Config, TOY)
    device, dtype = set_up(c.toy)
    if c.validate:
        sys.exit(RANK == 0 and subprocess.call([sys.executable, HERE / "tools/validate.py", c.data_root, c.annotations]))
    root, name = Path(c.data_root), "training_6k" if c.answer_only else "training_with_cot_6k"
    parse = parse_record if c.answer_only else parse_chat
    records = load_records(Path(c.annotations or root / f"annotations/{name}.jsonl"), root, parse)
    tokenizer = AutoTokenizer.from_pretrained(source := find_model(c.model))
    model = load_model(source, torch.device("cpu") if c.offload_optimizer else device, torch.float32,
                       partial(shard, device=device, dtype=dtype, offload=c.offload_optimizer))
    model.gradient_checkpointing = c.gradient_checkpointing
    model.visual.requires_grad_(not c.freeze_vision)
    VideoDataset(records, tokenizer, model.config, c).check_lengths(c.max_length)
    held, B = c.eval_rows if c.eval_every else 0, c.per_device_train_batch_size
    rows, per_step = len(records) - held, B * c.gradient_accumulation_steps * WORLD
    if rows < 1:
        fail(f"--eval_rows {c.eval_rows}: must be below the {len(records)} rows of the annotations")
    dataset, eval_set = (VideoDataset(part, tokenizer, model.config, c) for part in (records[:rows], records[rows:]))
    eval_batches = list(load_batches(eval_set, rank_batches(held, range(math.ceil(held / B / WORLD)), B, 1), 0))
    if unreadable := [s for samples in eval_batches for s in samples if "error" in s]:
        fail(*(f"--eval_rows: sample_id {s['sample_id']}: {s['error']}" for s in unreadable))
    prepare = partial(supervise, tokenizer=tokenizer, config=model.config, device=device, dtype=dtype)
    total = c.max_steps * per_step if c.max_steps > 0 else rows * c.num_train_epochs
    steps, max_bad = math.ceil(total / per_step), total // 100 if c.max_bad_samples < 0 else c.max_bad_samples
    checkpoint, start = open_run(c, model.config, dtype)
    optimizer = torch.optim.AdamW(model.parameters(), c.learning_rate, weight_decay=c.weight_decay, fused=device.type == "cuda")
    schedule = get_scheduler(c.lr_scheduler_type, optimizer, math.ceil(steps * c.warmup_ratio), steps).lr_lambdas[0]
    if checkpoint:
        dcp.load(training_state(model, optimizer), storage_reader=dcp.HuggingFaceStorageReader(str(checkpoint / "resume")))
    batches = rank_batches(total, range(start, steps), B, c.gradient_accumulation_steps)
    loader, caught, bad_samples, bad_steps = iter(load_batches(dataset, batches, c.dataloader_num_workers)), catch_signals(), 0, 0
    bar = tqdm(range(start, steps), initial=start, total=steps, disable=RANK > 0, desc="SFT")
    for step in bar:
        # Records: prompts and responses were read ahead. What could not be read is reported, and its place stays empty.
        log = dict(step=step + 1, epoch=(step + 1) * per_step / rows, clock=time.perf_counter())
        micro_batches = [next(loader) for _ in range(c.gradient_accumulation_steps)]
        failed = [s for samples in micro_batches for s in samples if "error" in s]
        micro_batches = [prepare(samples) for samples in micro_batches]
        lap(log, "time_data", device)
        # Update: cross-entropy, backward, optimizer step.
        totals = global_sums(device, tokens=sum(mask.sum() for _, _, mask in micro_batches), bad=len(failed), stop=len(caught),
                             prompt_tokens=sum(prompts.lengths.sum() for prompts, _, _ in micro_batches))
        log["learning_rate"], loss, greedy = c.learning_rate * schedule(step), 0.0, 0.0
        for batch in micro_batches:
            part, right = cross_entropy(model, *batch, max(1, totals["tokens"]))
            (part * WORLD).backward()  # FSDP2 averages over the ranks, which the denominator counts already
            loss, greedy = loss + float(part.detach()), greedy + float(right)
        sums = global_sums(device, loss=loss, greedy=greedy)
        log |= dict(loss=sums["loss"], token_accuracy=sums["greedy"] / max(1, totals["tokens"]))
        log["grad_norm"] = optimizer_step(model, optimizer, log["learning_rate"], c.max_grad_norm, log["loss"])
        lap(log, "time_update", device)
        # Log, and stop where going on makes no sense.
        if c.eval_every and (step + 1) % c.eval_every == 0:
            log["eval_loss"] = evaluate(model, map(prepare, eval_batches), device)
        for s in failed:
            tqdm.write(f"step {step + 1}: sample_id {s['sample_id']} left out: {s['error']}", file=sys.stderr)
        bad_samples += int(totals["bad"])
        bad_steps = 0 if math.isfinite(log["loss"] + log["grad_norm"]) else bad_steps + 1
        if bad_steps and RANK == 0:
            tqdm.write(f"step {step + 1} not applied: loss {log['loss']}, gradient norm {log['grad_norm']}", file=sys.stderr)
        if RANK == 0:
            log |= dict(tokens=int(totals["tokens"] + totals["prompt_tokens"]), bad_samples=int(totals["bad"]))
            log_step(c, log)
            if (step + 1) % c.logging_steps == 0:
                bar.set_postfix({key: f"{log[key]:.3f}" for key in ("loss", "token_accuracy")})
        if bad_samples > max_bad or bad_steps == 3:
            fail(f"{bad_samples} samples could not be read (--max_bad_samples {max_bad}), {bad_steps} steps in a row (at most 2) "
                 "had no finite loss and gradient: see the lines above")
        if (step + 1) % c.save_steps == 0 or totals["stop"]:
            save_checkpoint(c, step + 1, model, optimizer, source, dtype)
        if totals["stop"]:
            tqdm.write(f"stopped after step {step + 1}; --resume_from_checkpoint auto goes on", file=sys.stderr)
            sys.exit(128 + (caught or [signal.SIGTERM])[0])

    save_model(model, Path(c.output_dir), source, dtype)
    if RANK == 0:
        print(f"{c.output_dir}/ holds the trained model, config.json and metrics.jsonl")
    dist.destroy_process_group()

if __name__ == "__main__":
    try:
        main()
    except (OSError, SafetensorError, dcp.CheckpointException) as error:  # a full disk, for one; the last checkpoint is whole
        sys.exit(f"rank {RANK}: {type(error).__name__}: {str(error).rstrip().rpartition(chr(10))[2]}")
