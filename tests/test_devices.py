"""The scripts' hot paths on a device that is not the CPU, without one: nothing mixes the two.

On CPU a tensor on the wrong device is invisible. Here tensors are fake: they have shapes, no
numbers, and lie on the card that benchmarks/memory.py pretends. torch refuses an operation on
tensors of two devices as it would with CUDA; one on two floating-point types is refused here, as
fake products take any.

    python tests/test_devices.py grpo sft     # some of RUNS, as the tests start them

They have a process of their own: the card would stay, and an error in a backward pass ends it.
"""

import subprocess
import sys
import traceback
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import memory  # noqa: E402

import eval_video as e  # noqa: E402
import grpo_video as g  # noqa: E402
import sft_video as s  # noqa: E402

BF16 = torch.bfloat16
SIZE = memory.grpo_step.SIZES["tiny"]._replace(tower=(1, 48, 4))
CONFIG = memory.grpo_step.make_config(SIZE)
ENDS = [1, 2]
CARD = None
if __name__ == "__main__":
    CARD = memory.pretend_card()

# The operations that may mix floating-point types: fp32 statistics of a forward, and FSDP2's casts.
aten = torch.ops.aten
MIXED = (
    aten._foreach_copy_,
    aten._fused_rms_norm_backward,
    aten.native_layer_norm_backward,
    aten._scaled_dot_product_flash_attention_backward,
)


class Watch(memory.LiveBytes):
    """Refuses operations on several floating-point types."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is aten.index.Tensor and args[1][0].dtype == torch.bool:
            return args[0]  # how many rows a mask takes is a number: here all

        try:
            tensors = [z for z in memory.tree_leaves(args) if isinstance(z, torch.Tensor)]
            found = {z.dtype for z in tensors if z.is_floating_point()}
            if len(found) > 1 and func.overloadpacket not in MIXED:
                raise TypeError(f"{func} of {found}")
            return super().__torch_dispatch__(func, types, args, kwargs)
        except Exception:
            traceback.print_exc()  # in a backward pass the process ends without a word
            raise


class Tokenizer:
    """What the hot paths ask of a tokenizer."""

    def __call__(self, text, add_special_tokens):
        return SimpleNamespace(input_ids=[5, 6, 7])

    def convert_tokens_to_ids(self, tokens):
        return ENDS if isinstance(tokens, list) else ENDS[0]

    def decode(self, ids, skip_special_tokens):
        return "A"

    def batch_decode(self, rows, skip_special_tokens):
        return ["A" for _ in rows]


def make_samples():
    """Two of different lengths, with a video and an image each."""
    samples = []
    for seed, P in enumerate((40, 33)):
        sample = memory.grpo_step.make_sample(CONFIG, P, (2, 4, 4), (1, 4, 4), seed)
        samples.append(sample | dict(text="", domain="all", gold="A", choices=list("wxyz")))
    return samples


def grpo(gpus=1, batches=1, **changes):
    """A step of grpo_video.py, as its main has it; of the second batch nothing could be read."""
    c = g.Config(num_generations=3, max_completion_length=5, temperature=0.9, **changes)
    micro_batches = [make_samples(), []][:batches]

    with memory.pretended(g, gpus, 1, Watch()):
        model, reference, optimizer = memory.load(g, c, CONFIG, CARD, BF16)
        sampler = g.rollout_model(model, BF16)
        groups = []
        for samples in micro_batches:
            group = g.rollout(sampler, samples, c, ENDS, 0, CARD, BF16)
            with torch.no_grad():
                group.ref_logp = reference(group.prompts, group.completions, c.temperature)
            g.judge(group, c, Tokenizer(), ENDS, 0)
            groups.append(group)

        totals = g.global_sums(
            sequences=sum(group.mask.any(-1).sum() for group in groups),
            tokens=sum(group.mask.sum() for group in groups),
        )
        g.update(model, optimizer, groups, c, totals, 1e-6)
        for group in groups:
            g.finished_rows(group)
            g.audit_rows(group)


def sft(gpus=1, batches=1, **changes):
    """A step of sft_video.py, and its evaluation of held-out rows."""
    c = s.Config(**changes)
    micro_batches = [make_samples(), []][:batches]

    with memory.pretended(s, gpus, 1, Watch()):
        model, _, optimizer = memory.load(s, c, CONFIG, CARD, BF16)
        prepared = []
        for samples in micro_batches:
            prepared.append(s.supervise(samples, Tokenizer(), CARD, BF16))

        for prompts, responses, mask in prepared:
            loss, right = s.cross_entropy(model, prompts, responses, mask, 7)
            loss.backward()
        s.global_sums(loss=loss.detach(), right=right)
        s.optimizer_step(model, optimizer, 1e-6, c.max_grad_norm, float(loss.detach()))
        s.evaluate(model, prepared)


def evaluation(**changes):
    """A batch of eval_video.py, in which one sample could not be read."""
    c = e.Config(max_completion_length=5, **changes)
    samples = make_samples()
    samples.append(samples[0] | dict(error="unreadable"))
    with memory.pretended(e, 1, 1, Watch()):
        model = memory.make_model(e, CONFIG, None, CARD, BF16)
        assert len(e.predict(model, Tokenizer(), samples, c)) == 3


def mistaken(change, words):
    """The evaluation of prompts that `change` has spoilt fails, in these words."""
    collate = e.Prompts.collate

    def collate_wrongly(*args):
        prompts = collate(*args)
        change(prompts)
        return prompts

    with patch.object(e.Prompts, "collate", collate_wrongly):
        with pytest.raises(Exception, match=words):
            evaluation()


def last_on_the_cpu(prompts):
    prompts.last = prompts.last.cpu()


def pixels_in_fp32(prompts):
    prompts.patches = prompts.patches.float()


RUNS = dict(
    grpo=partial(grpo, gpus=8),
    grpo_alone=partial(grpo, batches=2, num_iterations=2, kl_clamp=11.0, loss_type="dapo"),
    grpo_offloaded=partial(grpo, offload_optimizer=True, gradient_checkpointing=False),
    sft=sft,
    sft_sharded=partial(sft, gpus=8, batches=2),
    sft_offloaded=partial(sft, offload_optimizer=True, gradient_checkpointing=False),
    evaluation=partial(evaluation, num_samples=2, do_sample=True),
    evaluation_greedy=evaluation,
    two_devices=partial(mistaken, last_on_the_cpu, "two devices"),
    two_types=partial(mistaken, pixels_in_fp32, "aten.mm.default of"),
)
QUICK = (("grpo",), ("sft", "evaluation", "two_devices", "two_types"))


def run(*processes):
    """Runs the named RUNS, each tuple's in a process of its own, all at once."""
    started = []
    for names in processes:
        line = [sys.executable, __file__, *names]
        process = subprocess.Popen(line, stdout=-1, stderr=-1, text=True)
        started.append(process)
    for process, names in zip(started, processes):
        output, error = process.communicate()
        assert process.returncode == 0, error[-5000:]
        assert output.split() == list(names)


def test_nothing_mixes_devices_or_types():
    """A tensor is left on the host, or a product has bf16 on one side and fp32 on the other.

    A step of each script; and both mistakes, made on purpose, are found.
    """
    run(*QUICK)


@pytest.mark.slow
def test_nothing_mixes_devices_or_types_in_other_settings():
    """Nor on one GPU, with offloaded weights, without checkpointing, where nothing was readable."""
    run([name for name in RUNS if name not in (*QUICK[0], *QUICK[1])])


if __name__ == "__main__":
    for name in sys.argv[1:]:
        RUNS[name]()
        print(name, flush=True)
