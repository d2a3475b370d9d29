"""GRPO on video questions: Qwen2-VL learns SEED-Bench-R1 (arXiv 2503.24376) from a right-or-wrong reward, in plain PyTorch.

    python grpo_video.py --toy                          # a tiny model on tiny videos: two CPU cores, about a minute
    torchrun --nproc_per_node=8 grpo_video.py           # the paper's recipe, Qwen2-VL-7B-Instruct; --help lists all flags

A step, in the paper's order (`main` is this list):
    records   -> prompts: sampled frames, the observed image, the question and its choices
    rollout   -> G completions of each prompt from the policy
    reward    -> 1 if the answer's letter is right, else 0
    advantage -> (r - mean) / (std + 1e-4) inside each group of G
    reference -> log-probs of the completions under the frozen starting model
    update    -> clipped policy gradient with a k3 KL penalty, AdamW on fp32 master weights

Departures from the released run (why: README.md): the prompt is computed once per group; several letters or an unmarked one score
0; choices are shuffled by (seed, epoch, sample_id); unreadable videos are reported, never replaced; --kl_clamp is off by default.

Dimensions: B prompts, G completions of each, P prompt tokens, C completion tokens, N rows (tokens or patches), H heads, K key-value
heads, E head width, D model width, V vocabulary, T frames.
"""
import argparse, atexit, hashlib, importlib.metadata, importlib.util, itertools, json, math, multiprocessing, operator, os, random
import re, resource, shutil, signal, subprocess, sys, time, types
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Literal, Optional

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
    """All settings; each is a flag. Names are TRL's GRPOConfig's where it has one; defaults are the released run's."""
    model: str = flag("Qwen/Qwen2-VL-7B-Instruct", "Qwen2-VL checkpoint: a folder, or a hub id that is fetched")
    data_root: str = flag("data/SEED-Bench-R1", "folder with annotations/, videos/ and images/")
    annotations: str = flag("", "training annotations; default: DATA_ROOT/annotations/training_6k.jsonl")
    toy: bool = flag(False, "train the tiny model in toy/ on its tiny videos, building them first if they are not there")
    validate: bool = flag(False, "check every record, video and image of the data root, print a report and stop")
    output_dir: str = flag("runs/grpo", "where config.json, the logs, the checkpoints and the final model go")
    overwrite_output_dir: bool = flag(False, "start anew in an output_dir that holds a run already")
    resume_from_checkpoint: str = flag("", "a checkpoint folder to go on from, or 'auto': the output_dir's last one, if any")
    seed: int = flag(42, "of the data order, the drawn choices and the rollouts, at least 0")
    num_generations: int = flag(8, "G: completions of each prompt, at least 2")
    max_completion_length: int = flag(256, "tokens of a completion at most, at least 1")
    max_prompt_length: int = flag(16384, "a prompt with more tokens is an error before training, never cut, at least 1")
    temperature: float = flag(1.0, "softmax temperature of the rollouts and of the log-probs, above 0")
    beta: float = flag(0.1, "weight of the KL penalty; 0 needs no reference model, at least 0")
    kl_clamp: float = flag(0.0, "bound on the KL's exponent; the released run had 11, 0 is none, at least 0")
    num_iterations: int = flag(1, "optimizer steps on each batch of rollouts, at least 1")
    epsilon: float = flag(0.2, "lower clip of the ratio, above 0")
    epsilon_high: Optional[float] = flag(None, "upper clip of the ratio; default: epsilon, above 0")
    loss_type: Literal["grpo", "dapo", "dr_grpo"] = flag("grpo", "what the loss averages over; see token_weights")
    scale_rewards: bool = flag(True, "divide the advantages by their group's standard deviation")
    format_reward_weight: float = flag(0.0, "reward for the <think></think><answer></answer> form, at least 0")
    learning_rate: float = flag(1e-6, "peak learning rate, above 0")
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = flag("linear", "decay after the warm-up")
    warmup_ratio: float = flag(0.0, "share of the steps that warm up, at least 0, at most 1")
    weight_decay: float = flag(0.0, "AdamW's, at least 0")
    max_grad_norm: float = flag(1.0, "gradients are clipped to this norm, above 0")
    num_train_epochs: int = flag(1, "passes over the annotations, at least 1")
    max_steps: int = flag(-1, "steps in all; -1: as num_train_epochs says, at least -1")
    per_device_train_batch_size: int = flag(1, "prompts per device and micro-batch (TRL counts completions), at least 1")
    gradient_accumulation_steps: int = flag(1, "micro-batches of a step, at least 1")
    gradient_checkpointing: bool = flag(True, "recompute each layer in the backward pass; rollouts never do")
    offload_optimizer: bool = flag(False, "on a GPU: fp32 weights, gradients and moments in host memory, where the optimizer steps")
    freeze_vision: bool = flag(False, "do not train the vision tower")
    max_frames: int = flag(16, "frames of a video at most, at least 2")
    fps: float = flag(2.0, "frames per second of video; 4 to max_frames in all, above 0")
    frame_size: int = flag(256, "height and width of a frame, rounded to a multiple of 28, at least 1")
    dataloader_num_workers: int = flag(2, "processes that decode ahead; 0: none, at least 0")
    decode_timeout: float = flag(60.0, "seconds after which decoding a sample is given up, above 0")
    max_bad_samples: int = flag(-1, "unreadable samples that end the run when exceeded; -1: a hundredth of the run, at least -1")
    audit: int = flag(0, "steps of which audit.jsonl gets every quantity of the update, token by token, at least 0")
    wandb: str = flag("", "project of wandb to send the rows of metrics.jsonl to; the package is needed only then")
    logging_steps: int = flag(10, "a line on stdout every so many steps (metrics.jsonl has every step), at least 1")
    save_steps: int = flag(100, "steps between checkpoints, at least 1")
    save_total_limit: int = flag(2, "newest checkpoints kept; 0: all, at least 0")

TOY = dict(model=str(HERE / "toy/model"), data_root=str(HERE / "toy/data"), output_dir="runs/toy-grpo",
           overwrite_output_dir=True, max_steps=150, per_device_train_batch_size=16, max_completion_length=24, learning_rate=5e-4,
           lr_scheduler_type="constant", beta=0.01, max_frames=8, frame_size=56, gradient_checkpointing=False,
           dataloader_num_workers=1)

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

def reward_of(text, gold, format_reward_weight):
    """-> (reward, answer): 1 for the gold letter, else 0; plus the weight if the text is <think>, then <answer>, and no more."""
    answer = extract_answer(text)
    once = all(text.count(tag) == 1 for tag in ("<think>", "</think>", "<answer>", "</answer>"))
    formatted = once and re.fullmatch(r"\s*<think>.*</think>\s*<answer>.*</answer>\s*", text, re.S) is not None
    return float(answer == gold) + format_reward_weight * formatted, answer

def group_advantages(rewards, scale_rewards):
    """rewards [B, G] -> Â_g = (r_g - mean r) / (std r + 1e-4) inside each group, std unbiased; only centred if not scaled."""
    centred = rewards - rewards.mean(1, keepdim=True)
    return centred / (rewards.std(1, keepdim=True) + 1e-4) if scale_rewards else centred

def k3_kl(logp, ref_logp, clamp=0.0):
    """D_KL[π_θ ‖ π_ref] ≈ e^d - d - 1 with d = log π_ref - log π_θ, per token (the k3 estimator). `clamp` bounds d, as the
    released run did with 11; outside it the KL has no gradient (trap 9)."""
    d = ref_logp - logp
    d = d.clamp(-clamp, clamp) if clamp else d
    return torch.exp(d) - d - 1

def policy_loss(logp, old_logp, advantages, epsilon, epsilon_high):
    """-min(ρ Â, clip(ρ, 1 - ε, 1 + ε_high) Â), ρ = π_θ / π_old, per token. logp, old_logp [B, G, C], advantages [B, G] ->
    (loss, clipped), [B, G, C] each; clipped marks the tokens whose gradient the clip takes away."""
    ratio, A = torch.exp(logp - old_logp), advantages[..., None]
    clipped = ((ratio < 1 - epsilon) & (A < 0)) | ((ratio > 1 + epsilon_high) & (A > 0))
    return -torch.min(ratio * A, ratio.clamp(1 - epsilon, 1 + epsilon_high) * A), clipped

def token_weights(mask, loss_type, sequences, tokens, max_completion_length):
    """mask [B, G, C] -> weights [B, G, C]; the loss is the per-token losses' weighted sum. `sequences` and `tokens` are the
    whole step's, over all micro-batches and ranks, so that it does not depend on how the step is cut (trap 15).
    grpo: each sequence's mean, averaged; dapo: mean over tokens; dr_grpo: each sequence's sum / max length, averaged."""
    mask = mask.float()
    if loss_type == "grpo":
        return mask / mask.sum(-1, keepdim=True).clamp(min=1) / max(1, sequences)
    return mask / max(1, tokens if loss_type == "dapo" else sequences * max_completion_length)

def entropy_of(logits, log_z, targets):  # -Σ p log p of softmax(logits); logits [N, V], log_z [N] -> [N]
    return log_z - (torch.exp(logits - log_z[:, None]) * logits).sum(-1)

def rollout_model(model, dtype):
    """The policy to roll out: itself, or where FSDP2 shards it a plain copy of the gathered weights, made once a step."""
    if not isinstance(model.model.norm.weight, DTensor):
        return model
    with torch.device("meta"):
        plain = Qwen2VL(model.config)
    plain.load_state_dict({name: gathered(p, dtype) for name, p in model.state_dict().items()}, assign=True)
    return plain

def rollout(policy, samples, c, tokenizer, end_ids, step, device, dtype):
    """One micro-batch -> its readable samples' prompts, completions [B, G, C], mask, advantages [B, G], rows for rollouts.jsonl. If
    none is readable, a blank prompt with nothing under the mask keeps this rank in step with the others."""
    samples, rows = [s for s in samples if "error" not in s], []
    prompts = Prompts.collate(samples or [blank_sample(policy.config)], device, dtype)
    seeds = [random.Random(repr((c.seed, step, s["sample_id"]))).getrandbits(63) for s in samples] or [0]
    completions = generate(policy, prompts, c.num_generations, c.max_completion_length, end_ids, seeds, c.temperature)
    mask = completion_mask(completions, end_ids) & bool(samples)
    for s, group, lengths in zip(samples, completions.tolist(), mask.sum(-1).tolist()):
        group = [dict(ids=ids[:n], length=n, truncated=ids[n - 1] not in end_ids) for ids, n in zip(group, lengths)]
        for x in group:
            x["text"] = tokenizer.decode(x["ids"], skip_special_tokens=True)
            x["reward"], x["answer"] = reward_of(x["text"], s["gold"], c.format_reward_weight)
        rows.append(dict(step=step + 1, sample_id=s["sample_id"], prompt=s["text"], prompt_ids_len=len(s["ids"]),
                         gold=s["gold"], completions=group))
    rewards = [[x["reward"] for x in row["completions"]] for row in rows] or [[0.0] * c.num_generations]
    advantages = group_advantages(torch.tensor(rewards, device=device), c.scale_rewards)
    return dict(prompts=prompts, completions=completions, mask=mask, advantages=advantages, rows=rows)

def update(model, optimizer, groups, c, totals, learning_rate):
    """num_iterations passes over the groups, each an optimizer step -> the last one's loss and gradient norm; g gets the log's."""
    for _ in range(c.num_iterations):
        loss = 0.0
        for i, g in enumerate(groups):
            weights = token_weights(g["mask"], c.loss_type, totals["sequences"], totals["tokens"], c.max_completion_length)
            learns = c.beta > 0 or totals[f"signal {i}"] > 0  # else no rank has a gradient, and the backward pass is left out
            with torch.set_grad_enabled(learns):
                logp, entropy = model(g["prompts"], g["completions"], c.temperature, statistic=entropy_of)
                old_logp = g.setdefault("old_logp", logp.detach())  # the first pass is π_old: its ratio is exactly 1
                per_token, clipped = policy_loss(logp, old_logp, g["advantages"], c.epsilon, c.epsilon_high or c.epsilon)
                kl = k3_kl(logp, g["ref_logp"], c.kl_clamp) if c.beta else torch.zeros_like(logp)
                part = (weights * (per_token + c.beta * kl)).sum()
            if learns:
                (part * WORLD).backward()  # FSDP2 averages over the ranks, which the denominators count already
            loss += float(part.detach())
            g |= dict(logp=logp.detach(), ratio=torch.exp(logp - old_logp).detach(), kl=kl.detach(), loss=per_token.detach())
            g |= dict(entropy=entropy, clip_ratio=clipped, weight=weights)
        loss = global_sums(g["mask"].device, loss=loss)["loss"]
        grad_norm = optimizer_step(model, optimizer, learning_rate, c.max_grad_norm, loss)
    return loss, grad_norm

def finished_rows(g):
    """The group's rows with what the update computed: per completion the mean of kl, entropy, clip_ratio over its tokens."""
    lengths = g["mask"].sum(-1)
    values = {key: ((g[key] * g["mask"]).sum(-1) / lengths).flatten().tolist() for key in ("kl", "entropy", "clip_ratio")}
    values |= dict(advantage=g["advantages"].flatten().tolist(), logprob_sum=(g["old_logp"] * g["mask"]).sum(-1).flatten().tolist())
    ratios = (g["old_logp"] - g["ref_logp"]).flatten(0, 1).tolist() if "ref_logp" in g else None
    for i, x in enumerate(x for row in g["rows"] for x in row["completions"]):
        x |= {key: value[i] for key, value in values.items()}
        x |= dict(log_ratio=[round(z, 4) for z in ratios[i][:x["length"]]]) if ratios else {}
    return g["rows"]

def audit_rows(g):
    """The group's audit.jsonl, an object a completion: lists over its C tokens, those behind its end too, where mask is false."""
    keys = [key for key in ("mask", "logp", "old_logp", "ref_logp", "ratio", "clip_ratio", "kl", "loss", "weight") if key in g]
    columns = zip(g["completions"].flatten(0, 1).tolist(), *(g[key].flatten(0, 1).tolist() for key in keys))
    heads = [dict(step=row["step"], sample_id=row["sample_id"], completion=i, advantage=x["advantage"])
             for row in g["rows"] for i, x in enumerate(row["completions"])]
    return [head | dict(zip(["ids", *keys], lists)) for head, lists in zip(heads, columns)]

def rollout_metrics(rows):
    """A step's rows, of all ranks -> their means over prompts, completions or completion tokens, for metrics.jsonl."""
    xs = [x for row in rows for x in row["completions"]]
    stds = [np.std([x["reward"] for x in row["completions"]], ddof=1) for row in rows]
    columns = dict(reward=[x["reward"] for x in xs], reward_std=stds, frac_reward_zero_std=np.equal(stds, 0),
                   advantage_abs_mean=[abs(x["advantage"]) for x in xs], completion_length=[x["length"] for x in xs],
                   frac_truncated=[x["truncated"] for x in xs], frac_no_answer=[x["answer"] is None for x in xs],
                   **{key: [x[key] for x in xs for _ in range(x["length"])] for key in ("kl", "entropy", "clip_ratio")})
    return {key: float(np.mean(values)) if rows else math.nan for key, values in columns.items()} | dict(
        tokens=sum(x["length"] for x in xs) + sum(row["prompt_ids_len"] for row in rows))

def main():
    c = parse_config(Config, TOY)
    device, dtype = set_up(c.toy)
    if c.validate:
        sys.exit(RANK == 0 and subprocess.call([sys.executable, HERE / "tools/validate.py", c.data_root, c.annotations]))
    root, output_dir = Path(c.data_root), Path(c.output_dir)
    records = load_records(Path(c.annotations or root / "annotations/training_6k.jsonl"), root)
    tokenizer = AutoTokenizer.from_pretrained(source := find_model(c.model))
    end_ids = [tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>")]
    home, wrap = torch.device("cpu") if c.offload_optimizer else device, partial(shard, device=device, dtype=dtype)
    model = load_model(source, home, torch.float32, partial(wrap, offload=c.offload_optimizer))
    reference = load_model(source, device, dtype, wrap).requires_grad_(False) if c.beta else None
    model.gradient_checkpointing = c.gradient_checkpointing
    model.visual.requires_grad_(not c.freeze_vision)
    dataset = VideoDataset(records, tokenizer, model.config, c)
    dataset.check_lengths(c.max_prompt_length)
    per_step = c.per_device_train_batch_size * c.gradient_accumulation_steps * WORLD
    total = c.max_steps * per_step if c.max_steps > 0 else len(records) * c.num_train_epochs
    steps, max_bad = math.ceil(total / per_step), total // 100 if c.max_bad_samples < 0 else c.max_bad_samples
    checkpoint, start = open_run(c, model.config, dtype)
    optimizer = torch.optim.AdamW(model.parameters(), c.learning_rate, weight_decay=c.weight_decay, fused=device.type == "cuda")
    schedule = get_scheduler(c.lr_scheduler_type, optimizer, math.ceil(steps * c.warmup_ratio), steps).lr_lambdas[0]
    if checkpoint:
        dcp.load(training_state(model, optimizer), storage_reader=dcp.HuggingFaceStorageReader(str(checkpoint / "resume")))
    batches = rank_batches(total, range(start, steps), c.per_device_train_batch_size, c.gradient_accumulation_steps)
    loader, caught, bad_samples, bad_steps = iter(load_batches(dataset, batches, c.dataloader_num_workers)), catch_signals(), 0, 0
    bar = tqdm(range(start, steps), initial=start, total=steps, disable=RANK > 0, desc="GRPO")
    for step in bar:
        # Records: the prompts were decoded ahead. What could not be read is reported, and its place stays empty.
        log = dict(step=step + 1, epoch=(step + 1) * per_step / len(records), clock=time.perf_counter())
        micro_batches = [next(loader) for _ in range(c.gradient_accumulation_steps)]
        failed = [s for samples in micro_batches for s in samples if "error" in s]
        lap(log, "time_data", device)
        # Rollout, reward, advantage: G completions of each prompt at temperature T.
        groups = [rollout(policy, samples, c, tokenizer, end_ids, step, device, dtype)
                  for policy in [rollout_model(model, dtype)] for samples in micro_batches]
        lap(log, "time_rollout", device)
        # Reference: log π_ref of the completions.
        for g in groups if c.beta else []:
            with torch.no_grad():
                g["ref_logp"] = reference(g["prompts"], g["completions"], c.temperature)
        lap(log, "time_ref", device)
        # Update: ratio, clip, KL, loss, backward, optimizer step.
        totals = global_sums(device, sequences=sum(g["mask"].any(-1).sum() for g in groups), bad=len(failed), stop=len(caught),
                             tokens=sum(g["mask"].sum() for g in groups),
                             **{f"signal {i}": g["advantages"].abs().sum() for i, g in enumerate(groups)})
        log["learning_rate"] = c.learning_rate * schedule(step)
        log["loss"], log["grad_norm"] = update(model, optimizer, groups, c, totals, log["learning_rate"])
        lap(log, "time_update", device)
        # Log, and stop where going on makes no sense.
        rows = gather_rows([row for g in groups for row in finished_rows(g)])
        audit = gather_rows([row for g in groups for row in audit_rows(g)]) if step < c.audit else []
        for s in failed:
            tqdm.write(f"step {step + 1}: sample_id {s['sample_id']} left out: {s['error']}", file=sys.stderr)
        bad_samples += int(totals["bad"])
        bad_steps = 0 if math.isfinite(log["loss"] + log["grad_norm"]) else bad_steps + 1
        if bad_steps and RANK == 0:
            tqdm.write(f"step {step + 1} not applied: loss {log['loss']}, gradient norm {log['grad_norm']}", file=sys.stderr)
        if RANK == 0:
            log |= rollout_metrics(rows) | dict(bad_samples=int(totals["bad"]))
            append_rows(output_dir / "rollouts.jsonl", rows)
            append_rows(output_dir / "audit.jsonl", audit) if audit else None
            log_step(c, log)
            if (step + 1) % c.logging_steps == 0:
                bar.set_postfix({key: f"{log[key]:.3f}" for key in ("reward", "kl", "completion_length")})
        if bad_samples > max_bad or bad_steps == 3:
            fail(f"{bad_samples} samples could not be read (--max_bad_samples {max_bad}), {bad_steps} steps in a row (at most 2) "
                 f"had no finite loss and gradient: see the lines above and {output_dir}/rollouts.jsonl")
        if (step + 1) % c.save_steps == 0 or totals["stop"]:
            save_checkpoint(c, step + 1, model, optimizer, source, dtype)
        if totals["stop"]:
            tqdm.write(f"stopped after step {step + 1}; --resume_from_checkpoint auto goes on", file=sys.stderr)
            sys.exit(128 + (caught or [signal.SIGTERM])[0])

    save_model(model, output_dir, source, dtype)
    if RANK == 0:
        rewards = [json.loads(line)["reward"] for line in open(output_dir / "metrics.jsonl")]  # NaN without a readable sample
        print(f"mean reward of the first 10 steps {np.nanmean(rewards[:10]):.3f}, of the last 10 {np.nanmean(rewards[-10:]):.3f}\n"
              f"{output_dir}/ holds the trained model, config.json, metrics.jsonl and rollouts.jsonl")
    dist.destroy_process_group()

if __name__ == "__main__":
    try:
        main()
    except (OSError, SafetensorError, dcp.CheckpointException) as error:  # a full disk, for one; the last checkpoint is whole
        sys.exit(f"rank {RANK}: {type(error).__name__}: {str(error).rstrip().rpartition(chr(10))[2]}")
