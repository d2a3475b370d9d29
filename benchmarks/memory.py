"""The memory of a GRPO run on any number of GPUs, forecast without one.

    python benchmarks/memory.py                             # the table of docs/performance.md
    python benchmarks/memory.py --size 2b --gpus 4 --num_generations 16
    python benchmarks/memory.py --gpus 1 --gib 80           # does it fit; which flags make it fit
    python benchmarks/memory.py --size mid --gpus 1 --measure   # and what it takes on this machine

All flags of grpo_video.py that change memory are taken, and a few of this file's own.

A forecast is a rehearsal: grpo_video.py's own functions load, shard, roll out, score, update and
step at the true shapes, on tensors that have shapes but no numbers (torch's FakeTensorMode), in a
process group that talks to nobody (its `fake` backend). What is counted are the bytes of storages
that are alive, each the size that was asked for. Attention is counted as flash kernels keep it: its
output and a number a row. A decoded token is as large as any other, so only one is decoded.

What a card needs beyond that is not in the table: CUDA's context, NCCL's buffers, the kernels'
workspaces, and what the allocator cannot use of what it holds. --gib and the smallest card leave
2 GiB for these: a guess, until a card has been measured (`bash benchmarks/gpu.sh`).

The step is a run's second: from then on AdamW's moments are there during the rollout.
"""

import ctypes
import gc
import os
import subprocess
import sys
import weakref
from collections import Counter
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Literal
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import grpo_step

import grpo_video as g

CARDS = (8, 12, 16, 20, 24, 32, 40, 48, 80, 96, 141)  # GB of memory that a card can have
BEYOND = 2.0  # GiB of a card that a forecast leaves free


@dataclass
class Config(g.Config):
    """grpo_video.py's settings, and what else its memory depends on."""

    size: Literal["tiny", "mid", "mid-32k", "2b", "7b"] = "7b"  # of the model, as in grpo_step.py
    gpus: int = 8  # in all, at least 1
    nodes: int = 1  # machines that they are in, at least 1
    words: int = 171  # tokens of a prompt beside its video and image, at least 10
    gib: float = 0.0  # of memory on a card: which flags make it fit? 0: no question, at least 0
    measure: bool = False  # run it too, on this machine's GPUs or its CPU, with made-up weights


ROWS = [
    dict(gpus=1, offload_optimizer=True),
    dict(gpus=4),
    dict(gpus=8),
    dict(gpus=16, nodes=2),
    dict(size="2b", gpus=1),
    dict(size="2b", gpus=8),
    dict(max_completion_length=1024),
    dict(num_generations=16),
]


# ---- The rehearsal ----


def rehearse(c, device, dtype, meter):
    """A run's second step in grpo_video.py's functions, on tensors of whatever kind is made here.

    meter(phase) is called at the end of each phase.
    """
    config = grpo_step.make_config(grpo_step.SIZES[c.size])
    samples = make_samples(c, config)
    G, C = c.num_generations, c.max_completion_length
    end_ids = [config.text_config.vocab_size]  # never sampled

    model, reference, optimizer = load(g, c, config, device, dtype)
    make_moments(model, optimizer)
    meter("at rest")

    sampler = g.rollout_model(model, dtype)
    groups = []
    for _ in range(min(2, c.gradient_accumulation_steps)):  # a third adds only its pixels
        prompts = g.Prompts.collate(samples, device, dtype)
        g.generate(sampler, prompts, G, C, end_ids, range(len(samples)))
        shape = (len(samples), G, C)
        ids = torch.zeros(shape, dtype=torch.long, device=device)  # the longest there can be
        group = g.Group(prompts, ids, ids == 0, ids == 0, samples)
        group.advantages = torch.ones(shape[:2], device=device)
        groups.append(group)
    del sampler
    meter("rollout")

    if c.beta > 0:
        for group in groups:
            with torch.no_grad():
                group.ref_logp = reference(group.prompts, group.completions, c.temperature)
    meter("reference")

    rows = len(groups) * len(samples) * G * c.gpus
    totals = dict(sequences=rows, tokens=rows * C)
    g.update(model, optimizer, groups, c, totals, c.learning_rate)
    meter("update")


def make_samples(c, config):
    """A micro-batch of samples, each with words, a video of max_frames frames and an image."""
    side = max(1, round(c.frame_size / (g.PATCH * g.MERGE))) * g.MERGE
    clip, still = (c.max_frames // g.PAIR, side, side), (1, side, side)
    tokens = c.words + (clip[0] + 1) * (side // g.MERGE) ** 2

    samples = []
    with unset_fake_temporarily():  # positions are computed from numbers
        for seed in range(c.per_device_train_batch_size):
            samples.append(grpo_step.make_sample(config, tokens, clip, still, seed))
    return samples


def load(script, c, config, device, dtype):
    """-> (model, reference, optimizer) as the script's main makes them; no file is read."""
    with patch.object(script, "load_model", partial(make_model, script, config)):
        folder = Path("no folder")
        model = script.load_sharded(c, folder, device, dtype)
        reference = None
        if getattr(c, "beta", 0) > 0:
            reference = script.load_sharded(c, folder, device, dtype, weights_dtype=dtype)
            reference.requires_grad_(False)

    # As where a GPU is, even if this one is only pretended.
    with patch("torch.cuda.is_available", lambda: device.type != "cpu"):
        return model, reference, script.make_optimizer(c, model)


def make_model(script, config, folder, device, dtype, wrap=lambda model: model):
    """As the script's load_model makes one, but no folder is read: all weights are one number."""
    with unset_fake_temporarily(), torch.device("meta"):
        model = script.Qwen2VL(config).to(dtype)
    with torch.device("meta"):
        model = wrap(model)
    model.to_empty(device=device)
    with torch.no_grad():
        for p in model.parameters():
            getattr(p, "_local_tensor", p).fill_(0.01)
    return model


def make_moments(model, optimizer):
    """AdamW's moments, as a first step leaves them."""
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad()


# ---- A card that is not there ----


def pretend_card():
    """Gives torch a kind of device named "card", for fake tensors alone.

    They tell a card's memory from the host's and find what mixes the two, as CUDA's would; but a
    build of torch without CUDA has no fake CUDA tensors that can be sliced or differentiated.
    """
    if not hasattr(torch, "card"):
        backend_registration._setup_privateuseone_for_python_backend("card", Card())
        dist.Backend.backend_capability["fake"].append("card")
        # On CUDA this norm is one kernel; elsewhere, if nobody claims it, several that keep more.
        FUSED.impl("_fused_rms_norm", no_kernel, "PrivateUse1")
    return torch.device("card", 0)


FUSED = torch.library.Library("aten", "IMPL")


def no_kernel(*args):
    raise NotImplementedError("a card that is not there computes nothing")


class Stream(torch.cpu.Stream):
    def record_event(self):
        return torch.cpu.Event()


class Card(backend_registration._DummyBackendModule):
    """torch.card, as torch.cuda: what FSDP2 and checkpointing ask of a device's module."""

    Event = torch.cpu.Event
    Stream = Stream
    current_stream = staticmethod(torch.cpu.current_stream)
    stream = staticmethod(torch.cpu.stream)

    def is_available(self):
        return False  # else torch.tensor would make its numbers there

    def get_amp_supported_dtype(self):
        return []


@contextmanager
def pretended(script, gpus, nodes, *modes):
    """Inside, tensors are fake, and this process is rank 0 of so many that are not there.

    The dispatch modes given see each operation, above the fake ones.
    """
    with ExitStack() as stack:
        dist.init_process_group("fake", rank=0, world_size=gpus, store=FakeStore())
        stack.callback(dist.destroy_process_group)
        numbers = dict(
            WORLD=gpus, LOCAL_WORLD=gpus // nodes, causal_lower_right=lambda *shape: shape
        )
        stack.enter_context(patch.multiple(script, **numbers))

        make_mesh = dist.init_device_mesh

        def mesh_of_numbers(*args, **options):
            with unset_fake_temporarily():
                return make_mesh(*args, **options)

        stack.enter_context(patch.object(dist, "init_device_mesh", mesh_of_numbers))
        stack.enter_context(patch.object(F, "scaled_dot_product_attention", flash_attention))
        for mode in (FakeTensorMode(allow_non_fake_inputs=True), *modes):
            stack.enter_context(mode)
        yield


def flash_attention(q, k, v, attn_mask=None, is_causal=False, enable_gqa=False):
    """F.scaled_dot_product_attention by the operator that a GPU's flash kernels stand behind."""
    causal = is_causal or attn_mask is not None  # a mask here is causal_lower_right
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, is_causal=causal)[0]


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations inside it make, until each is freed.

    It answers for fake tensors, which have no numbers: each is 1, and "have all rows ended" is yes.
    """

    def __init__(self):
        super().__init__()
        self.live = Counter()  # device type -> bytes
        self.peak = Counter()
        self.sizes = {}  # a storage's address -> (device type, bytes)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops._c10d_functional.wait_tensor.default:
            return args[0]  # the fake one would be a copy
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return 1

        out = func(*args, **kwargs or {})
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.see(getattr(tensor, "_local_tensor", tensor))
        return out

    def see(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self.sizes:
            self.sizes[storage._cdata] = (tensor.device.type, 0)
            self.resize(storage._cdata, storage.nbytes())
            weakref.finalize(storage, self.free, storage._cdata).atexit = False

    def resize(self, address, size):
        device, before = self.sizes[address]
        self.sizes[address] = (device, size)
        self.live[device] += size - before
        self.peak[device] = max(self.peak[device], self.live[device])

    def free(self, address):
        self.resize(address, 0)
        del self.sizes[address]

    def __enter__(self):
        """FSDP2 frees a gathered weight by giving its storage no bytes, which is no operation."""
        resize = torch.UntypedStorage.resize_

        def resize_and_note(storage, size):
            resize(storage, size)
            if storage._cdata in self.sizes:
                self.resize(storage._cdata, size)

        self.patched = patch.object(torch.UntypedStorage, "resize_", resize_and_note)
        self.patched.start()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.patched.stop()


# ---- Forecasts and measurements ----

PHASES = ("at rest", "rollout", "reference", "update")


def forecast(c):
    """-> {phase: bytes on a card}, the live ones at rest and each phase's peak, and "host"'s."""
    if c.measure:  # to compare with this CPU
        device, dtype = torch.device("cpu"), torch.float32
    else:
        device, dtype = pretend_card(), torch.bfloat16
    counter = LiveBytes()
    found = Counter()

    def meter(phase):
        peaks = counter.live if phase == "at rest" else counter.peak
        found[phase] = peaks[device.type]
        found["host"] = max(found["host"], peaks["cpu"])
        counter.peak = counter.live.copy()

    with pretended(g, c.gpus, c.nodes, counter):
        rehearse(c, device, dtype, meter)
    gc.collect()  # FSDP2's modules refer to each other
    return found


def measured(c, device, dtype):
    """-> {phase: bytes}, as forecast, of a real run on this rank's device."""
    now, peak, reset = gauges(device)
    found = Counter()

    def meter(phase):
        found[phase] = now() if phase == "at rest" else peak()
        reset()

    rehearse(c, device, dtype, meter)
    return found


def gauges(device):
    """-> functions: the bytes in use, their highest since the last reset, and the reset."""
    if device.type == "cuda":
        return (
            torch.cuda.memory_allocated,
            torch.cuda.max_memory_allocated,
            torch.cuda.reset_peak_memory_stats,
        )

    libc = ctypes.CDLL(None)
    libc.mallopt(-3, 2**16)  # a block from 64 KiB on goes back to the system when it is freed
    libc.malloc_trim(0)
    before = grpo_step.memory("VmRSS")
    return (
        lambda: grpo_step.memory("VmRSS") - before,
        lambda: grpo_step.memory("VmHWM") - before,
        lambda: Path("/proc/self/clear_refs").write_text("5"),
    )


# ---- The command ----

COLUMNS = ("model", "GPUs", "flags", *PHASES, "peak", "host", "a card of")
NO_MEASURE = ["--measure", "False"]


def print_line(cells):
    print(f"| {' | '.join(cells)} |", flush=True)


def print_row(c, found, last):
    """A line of the table: what was run, the GiB found, and a last cell."""
    flags = []
    for field in fields(g.Config):
        value = getattr(c, field.name)
        if value != field.default:
            word = f"--no_{field.name}" if value is False else f"--{field.name}"
            flags.append(f"`{word}`" if isinstance(value, bool) else f"`{word} {value}`")

    gpus = f"{c.gpus} in {c.nodes} nodes" if c.nodes > 1 else str(c.gpus)
    phases = [found[phase] for phase in PHASES]
    host = f"{found['host'] / 2**30:.1f}" if c.offload_optimizer else ""
    sizes = [f"{size / 2**30:.2f}" for size in (*phases, max(phases))]
    print_line([c.size, gpus, " ".join(flags), *sizes, host, last])


def needed(found):
    """GiB that a card must have."""
    return max(found[phase] for phase in PHASES) / 2**30 + BEYOND


def smallest_card(found):
    for size in CARDS:
        if size >= needed(found):
            return f"{size} GB"
    return f"over {size} GB"


def make_fit(c):
    """Forecasts the run, and as long as it does not fit, with a flag more. -> whether one fits.

    First come flags that change no number but time, then those that train something else.
    """
    micro_batches = c.per_device_train_batch_size * c.gradient_accumulation_steps
    for changes in (
        {},
        dict(gradient_checkpointing=True),
        dict(per_device_train_batch_size=1, gradient_accumulation_steps=micro_batches),
        dict(offload_optimizer=True),
        dict(freeze_vision=True),
        dict(beta=0.0),
    ):
        changed = replace(c, **changes)
        if changes and changed == c:
            continue
        c = changed
        found = forecast(c)
        fits = needed(found) <= c.gib
        print_row(c, found, "fits" if fits else "too small")
        if fits:
            return True
    return False


def print_forecasts(c):
    """The table: the run that was asked for, or ROWS."""
    if torch.cuda.is_available():
        # torch.tensor would make a forecast's constants on the GPU: no forecast may see one.
        without = os.environ | dict(CUDA_VISIBLE_DEVICES="")
        return subprocess.call([sys.executable, *sys.argv, *NO_MEASURE], env=without)

    print("GiB of each GPU, and of the host's memory for each GPU:\n")
    last = f"a card of {c.gib:g} GiB" if c.gib else COLUMNS[-1]
    print_line([*COLUMNS[:-1], last])
    print("|---" * len(COLUMNS) + "|", flush=True)
    if c.gib:
        return 0 if make_fit(c) else 1

    asked = sys.argv[1:] not in ([], NO_MEASURE)
    for changes in [{}] if asked else ROWS:
        row = replace(c, **changes)
        found = forecast(row)
        print_row(row, found, smallest_card(found))
    return 0


def print_beyond(found):
    """What the GPU holds more than its peak of allocated bytes: what BEYOND is a guess of."""
    free, total = torch.cuda.mem_get_info()
    held = torch.cuda.memory_reserved()
    more = held - max(found.values())
    print(
        f"\n{torch.cuda.get_device_name()}: the allocator holds {more / 2**30:.2f} GiB more than "
        f"the peak, and {(total - free - held) / 2**30:.2f} GiB are taken beside it; a forecast "
        f"leaves {BEYOND:g} GiB for both."
    )


def main():
    g.__doc__ = __doc__  # what --help describes
    c = g.parse_config(Config, {})
    if c.gpus % c.nodes:
        g.fail(f"--gpus {c.gpus}: must be a multiple of --nodes {c.nodes}")
    if c.measure and c.gpus != g.WORLD:
        g.fail(f"--measure: torchrun --nproc_per_node={c.gpus} starts as many ranks as --gpus")

    code = print_forecasts(c) if g.RANK == 0 else 0
    if c.measure:
        device, dtype = g.set_up(False)
        found = measured(c, device, dtype)
        if g.RANK == 0:
            print_row(c, found, "measured")
        if g.RANK == 0 and device.type == "cuda":
            print_beyond(found)
        dist.destroy_process_group()
    sys.exit(code)


if __name__ == "__main__":
    main()
