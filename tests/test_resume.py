"""Resuming, refusing to, and what a run leaves in its folder: runs in this process, on the toy."""

import shutil
import signal
import sys

import pytest
import torch
from safetensors.torch import load_file
from test_ranks import difference, rows_without_media

import grpo_video as g
import sft_video

SMALL = dict(
    max_frames=4,
    frame_size=56,
    dataloader_num_workers=0,
    gradient_checkpointing=False,
    per_device_train_batch_size=2,
    gradient_accumulation_steps=1,
)
OF_GRPO = dict(num_generations=2, max_completion_length=3)


@pytest.fixture
def train(toy, tmp_path, monkeypatch, capsys):
    """train(script, **flags) -> (exit code, stdout, stderr) of its main() on the untrained toy.

    In tmp_path/run, if not told else.
    """
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    folders = dict(model=toy / "init", data_root=toy / "data", output_dir=tmp_path / "run")

    def main(script, **flags):
        common = folders | SMALL | (OF_GRPO if script is g else {})
        words = [f"--{name}={value}" for name, value in (common | flags).items()]
        monkeypatch.setattr(sys, "argv", [script.__file__, *words])
        capsys.readouterr()
        code = 0
        try:
            script.main()
        except SystemExit as end:
            code = end.code
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return code, *capsys.readouterr()

    return main


def trained(train, script, **flags):
    """A run that must end well -> (stdout, stderr)."""
    code, out, err = train(script, **flags)
    assert code == 0, err
    return out, err


# ---- Moments -------------------------------------------------------------------------------------
def test_parameters_without_a_gradient_resume(toy, tmp_path, train):
    """A checkpoint lacks the moments of parameters that no gradient has come to.

    Here the vision tower is frozen; from step 4 on it is trained. Its step counts begin at 0: the
    first update is AdamW's first, the learning rate for each weight, whatever was trained before.
    """
    flags = dict(save_steps=2, lr_scheduler_type="constant", learning_rate=1e-3)
    frozen = flags | dict(freeze_vision=True, save_total_limit=0)
    whole = tmp_path / "whole"
    run = tmp_path / "run"
    trained(train, sft_video, max_steps=4, output_dir=whole, **frozen)
    shutil.copytree(whole / "checkpoint-2", run / "checkpoint-2")
    shutil.copyfile(whole / "metrics.jsonl", run / "metrics.jsonl")

    trained(train, sft_video, max_steps=4, resume_from_checkpoint="auto", **frozen)
    assert difference(whole, run) == 0

    (run / "config.json").unlink()
    trained(train, sft_video, max_steps=5, resume_from_checkpoint="auto", **flags)
    before = load_file(whole / "model.safetensors")["visual.merger.mlp.0.weight"]
    after = load_file(run / "model.safetensors")["visual.merger.mlp.0.weight"]
    moved = (after - before).abs()
    assert moved.max() == pytest.approx(1e-3, rel=1e-3)
    assert moved.median() == pytest.approx(1e-3, rel=1e-2)


def test_rows_of_text_alone_resume(toy, tmp_path, train):
    """Rows without media, whose run ends and goes on as any other."""
    annotations = rows_without_media(toy, tmp_path / "rows.jsonl")
    lines = annotations.read_text().splitlines(keepends=True)
    annotations.write_text("".join(lines[4:]))  # text alone
    flags = dict(annotations=annotations, save_steps=2, max_steps=3)
    trained(train, sft_video, output_dir=tmp_path / "whole", **flags)
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    (tmp_path / "run/config.json").unlink()
    trained(train, sft_video, resume_from_checkpoint="auto", **flags)
    assert difference(tmp_path / "whole", tmp_path / "run") == 0
