"""Resuming, refusing to, and what a run leaves in its folder: runs in this process, on the toy."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from test_ranks import batch, difference, rows, rows_without_media

import grpo_video as g
import sft_video
from test_smoke import (
    CPU,
    ROOT,
    collate,
    random_completions,
    transformers_inputs,
)

SMALL = dict(
    max_frames=4,
    frame_size=56,
    dataloader_num_workers=0,
    gradient_checkpointing=False,
    per_device_train_batch_size=2,
    gradient_accumulation_steps=1,
)
OF_GRPO = dict(num_generations=2, max_completion_length=3)
AUTO = dict(resume_from_checkpoint="auto")


@pytest.fixture(scope="module")
def small(toy, tmp_path_factory):
    """-> {script: its flags} of a short run on the toy's first 12 records."""
    found = {}
    names = {g: "training_6k", sft_video: "training_with_cot_6k"}
    for script, name in names.items():
        lines = (toy / f"data/annotations/{name}.jsonl").read_text().splitlines(keepends=True)
        annotations = tmp_path_factory.mktemp("annotations") / f"{name}.jsonl"
        annotations.write_text("".join(lines[:12]))
        found[script] = SMALL | dict(
            model=toy / "init", data_root=toy / "data", annotations=annotations
        )
    found[g] |= OF_GRPO
    return found


@pytest.fixture
def train(small, tmp_path, monkeypatch, capsys):
    """train(script, **flags) -> (exit code, stdout, stderr) of its main() on the untrained toy.

    In tmp_path/run, if not told else.
    """
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def main(script, **flags):
        common = dict(output_dir=tmp_path / "run") | small[script]
        words = [f"--{name}={value}" for name, value in (common | flags).items()]
        monkeypatch.setattr(sys, "argv", [script.__file__, *words])
        capsys.readouterr()
        code = 0
        try:
            script.main()
        except SystemExit as end:
            code = end.code or 0
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return code, *capsys.readouterr()

    return main


@pytest.fixture
def trained(train):
    """trained(script, **flags) -> (stdout, stderr) of a run that must end well."""

    def main(script, **flags):
        code, out, err = train(script, **flags)
        assert code == 0, err
        return out, err

    return main


@pytest.fixture
def refused(train):
    """refused(script, **flags) -> the lines of stderr of a run that must end with exit code 2."""

    def main(script, **flags):
        code, _, err = train(script, **flags)
        assert code == 2, err
        return err.splitlines()

    return main


OF_WHOLE = dict(save_steps=2, save_total_limit=0, max_steps=5)


@pytest.fixture(scope="module")
def finished(small, tmp_path_factory, on_ranks):
    """The folder of a finished SFT run of 5 steps, with checkpoints 2, 4 and 5."""
    folder = tmp_path_factory.mktemp("finished") / "whole"
    flags = small[sft_video] | OF_WHOLE | dict(output_dir=folder)
    words = [f"--{name}={value}" for name, value in flags.items()]
    [(code, _, err)] = on_ranks(sft_video, words, 1)
    assert code == 0, err
    return folder


@pytest.fixture
def whole(tmp_path, finished):
    """A copy of it in tmp_path/whole -> its folder and its flags."""
    shutil.copytree(finished, tmp_path / "whole")
    return SimpleNamespace(folder=tmp_path / "whole", flags=OF_WHOLE)


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def change_run(folder, **changes):
    """Changes the entry "run" of a folder's config.json."""
    config = json.loads((folder / "config.json").read_text())
    config["run"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


# ---- Moments -------------------------------------------------------------------------------------
def test_parameters_without_a_gradient_resume(tmp_path, trained):
    """A checkpoint lacks the moments of parameters that no gradient has come to.

    Here the vision tower is frozen; behind step 4 it is trained. Its step counts begin at 0: the
    first update is AdamW's first, the learning rate for each weight, whatever was trained before.
    """
    flags = dict(save_steps=2, lr_scheduler_type="constant", learning_rate=1e-3)
    frozen = flags | dict(freeze_vision=True, save_total_limit=0)
    whole = tmp_path / "whole"
    run = tmp_path / "run"
    trained(sft_video, max_steps=4, output_dir=whole, **frozen)
    shutil.copytree(whole, run)
    shutil.rmtree(run / "checkpoint-4")
    trained(sft_video, max_steps=4, **frozen, **AUTO)
    assert difference(whole, run) == 0

    _, err = trained(sft_video, max_steps=5, **flags, **AUTO)
    assert f"changed since {run}/checkpoint-4: freeze_vision was True, is False" in err
    name = "visual.merger.mlp.0.weight"
    before = load_file(whole / "model.safetensors")[name]
    moved = (load_file(run / "model.safetensors")[name] - before).abs()
    assert moved.max() == pytest.approx(1e-3, rel=1e-3)
    assert moved.median() == pytest.approx(1e-3, rel=1e-2)


def test_moments_are_torchs_own(toy):
    """Moments that exist from the start give other weights than torch's, which come later."""
    c = g.Config(learning_rate=1e-2, weight_decay=0.1)
    ours = g.load_model(toy / "init", CPU, torch.float32)
    theirs = g.load_model(toy / "init", CPU, torch.float32)
    optimizer = g.make_optimizer(c, ours)
    torchs = torch.optim.AdamW(theirs.parameters(), 1e-2, weight_decay=0.1)
    noise = torch.Generator().manual_seed(0)
    for step in range(3):
        for i, (p, q) in enumerate(zip(ours.parameters(), theirs.parameters())):
            if step >= i % 3:  # some begin later
                p.grad = torch.randn(p.shape, generator=noise)
                q.grad = p.grad.clone()
        optimizer.step()
        torchs.step()
    for p, q in zip(ours.parameters(), theirs.parameters()):
        assert torch.equal(p, q)


@pytest.mark.slow
def test_rows_of_text_alone_resume(toy, tmp_path, trained):
    """Rows without media, whose run ends and goes on as any other."""
    annotations = rows_without_media(toy, tmp_path / "rows.jsonl")
    lines = annotations.read_text().splitlines(keepends=True)
    annotations.write_text("".join(lines[4:]))  # text alone
    flags = dict(annotations=annotations, save_steps=2, max_steps=3)
    trained(sft_video, output_dir=tmp_path / "whole", **flags)
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoint-3")
    trained(sft_video, **flags, **AUTO)
    assert difference(tmp_path / "whole", tmp_path / "run") == 0


# ---- Which checkpoint ----------------------------------------------------------------------------
def cut_off(checkpoint):
    [shard] = (checkpoint / "resume").iterdir()
    os.truncate(shard, shard.stat().st_size // 2)


DAMAGES = {
    "no config.json": (lambda p: (p / "config.json").unlink(), "config.json"),
    "half a config.json": (lambda p: os.truncate(p / "config.json", 99), ""),
    "no resume/": (lambda p: shutil.rmtree(p / "resume"), "resume/ holds 0 of 1 shards"),
    "a shard too few": (lambda p: change_run(p, world_size=2), "resume/ holds 1 of 2 shards"),
    "a shard cut off": (cut_off, "incomplete metadata"),
}


@pytest.mark.parametrize("damage, word", DAMAGES.values(), ids=DAMAGES)
def test_an_incomplete_checkpoint(tmp_path, whole, trained, damage, word):
    """`auto` names what the newest checkpoint lacks, and goes on from the one before.

    Without a whole shard torch would load a part of each tensor, and say nothing.
    """
    run = tmp_path / "run"
    shutil.copytree(whole.folder, run)
    shutil.rmtree(run / "checkpoint-5")
    damage(run / "checkpoint-4")
    _, err = trained(sft_video, **whole.flags, **AUTO)

    [told] = [line for line in err.splitlines() if line.startswith("--resume_from_checkpoint")]
    assert told.startswith(f"--resume_from_checkpoint {run}/checkpoint-4: ")
    assert word in told
    assert f"{run}: 2 of 5 steps done" in err
    assert difference(whole.folder, run) == 0


def test_no_checkpoint_at_all(tmp_path, whole, trained, refused, monkeypatch):
    """A folder with a run and no whole checkpoint is not trained anew, unless it is asked for.

    torchrun, which restarts a run that had none yet, asks for it.
    """
    run = tmp_path / "run"
    shutil.copytree(whole.folder, run, ignore=shutil.ignore_patterns("checkpoint-*"))
    (run / "checkpoint-7.tmp").mkdir()
    before = contents(run)
    [told] = refused(sft_video, **whole.flags, **AUTO)
    assert f"--output_dir {run} holds a run and 0 checkpoints" in told
    assert "--overwrite_output_dir begins anew" in told
    assert contents(run) == before

    _, err = trained(sft_video, **whole.flags, **AUTO, overwrite_output_dir=True)
    assert f"{run}: 0 of 5 steps done" in err
    assert not (run / "checkpoint-7.tmp").exists()
    assert difference(whole.folder, run) == 0

    shutil.rmtree(run)
    shutil.copytree(whole.folder, run, ignore=shutil.ignore_patterns("checkpoint-*"))
    monkeypatch.setattr(sft_video, "RESTARTS", 1)
    _, err = trained(sft_video, **whole.flags)
    assert f"{run}: 0 of 5 steps done" in err

    # None that is there is whole: that is not to be trained over, either.
    for folder in run.glob("checkpoint-*"):
        shutil.rmtree(folder / "resume")
    before = contents(run)
    *_, told = refused(sft_video, **whole.flags)
    assert f"--output_dir {run} holds a run and 3 checkpoints" in told
    assert contents(run) == before


def test_a_restart_before_the_first_checkpoint(tmp_path, whole, trained, monkeypatch):
    """A run that went on from another's checkpoint is restarted from there, not from step 0."""
    monkeypatch.setattr(sft_video, "RESTARTS", 1)
    checkpoint = whole.folder / "checkpoint-4"
    _, err = trained(sft_video, **whole.flags, resume_from_checkpoint=checkpoint)
    assert f"{tmp_path}/run: 4 of 5 steps done" in err
    assert difference(whole.folder, tmp_path / "run") == 0


def test_a_finished_run_says_so(whole, trained):
    """`auto` in the folder of a finished run trains nothing more, and tells."""
    before = (whole.folder / "model.safetensors").read_bytes()
    flags = whole.flags | dict(output_dir=whole.folder)
    _, err = trained(sft_video, **flags, **AUTO)
    assert f"{whole.folder}: 5 of 5 steps done, finished" in err
    assert (whole.folder / "model.safetensors").read_bytes() == before
    assert len(rows(whole.folder / "metrics.jsonl")) == 5


def test_a_resume_that_fails_deletes_nothing(toy, tmp_path, whole, refused):
    """A checkpoint that cannot be loaded: what came after it stays, and the flag that differs is
    told."""
    other = tmp_path / "other"
    shutil.copytree(toy / "init", other)
    weights = load_file(other / "model.safetensors")
    for name, x in weights.items():
        if ".mlp.gate_proj." in name or ".mlp.up_proj." in name:
            weights[name] = x[:96].clone()
        if ".mlp.down_proj." in name and "visual" not in name:
            weights[name] = x[:, :96].clone()
    g.save_torch_state_dict(weights, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | dict(intermediate_size=96)))

    before = contents(whole.folder)
    flags = whole.flags | dict(output_dir=whole.folder, model=other)
    told = refused(sft_video, **flags, resume_from_checkpoint=whole.folder / "checkpoint-2")
    changed = f"model was {str(toy / 'init')!r}, is {str(other)!r}"
    assert f"changed since {whole.folder}/checkpoint-2: {changed}" in told
    assert "Size mismatch" in told[-1]
    assert contents(whole.folder) == before


@pytest.mark.parametrize("place", ["none", "notes"])
def test_a_folder_that_is_no_checkpoint(tmp_path, whole, refused, place):
    """One line, with the folder and what it lacks."""
    (tmp_path / "notes").mkdir()
    [told] = refused(sft_video, **whole.flags, resume_from_checkpoint=tmp_path / place)
    assert f"error: --resume_from_checkpoint {tmp_path / place}: " in told
    assert "config.json" in told
    assert not (tmp_path / "run").exists()


# ---- Changed flags -------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "flags, values",
    [
        (dict(per_device_train_batch_size=4), ["2 prompts a step", "4 prompts a step"]),
        (dict(gradient_accumulation_steps=2), ["2 prompts a step", "4 prompts a step"]),
        (dict(seed=1), ["seed 42", "seed 1"]),
        (dict(max_steps=6), ["5 steps", "6 steps"]),
        (dict(max_steps=6, lr_scheduler_type="constant"), ["5 steps", "any steps"]),
        (dict(eval_every=1, eval_rows=2), ["records "]),
    ],
    ids=str,
)
def test_what_would_change_the_order_is_refused(whole, refused, flags, values):
    """The data's order and the schedule are those that the run began with; both values are told."""
    before = contents(whole.folder)
    flags = dict(output_dir=whole.folder) | whole.flags | flags
    *_, told = refused(sft_video, **flags, **AUTO)
    assert f"changed since {whole.folder}/checkpoint-5: must_stay was " in told
    was, now = told.split(", is ")
    assert was != now
    assert values[0] in was
    assert values[-1] in now
    assert contents(whole.folder) == before


def test_another_script_or_another_record(small, tmp_path, whole, refused):
    """An SFT checkpoint in GRPO; a record less, one edited, two exchanged."""
    checkpoint = whole.folder / "checkpoint-2"
    *_, told = refused(g, max_steps=5, resume_from_checkpoint=checkpoint)
    assert "must_stay was 'sft_video.py, " in told
    assert "is 'grpo_video.py, " in told

    lines = small[sft_video]["annotations"].read_text().splitlines()
    edited = lines[3].replace("it moves", "it is moving")
    assert edited != lines[3]
    exchanged = [lines[1], lines[0], *lines[2:]]
    for changed in (lines[:-1], [*lines[:3], edited, *lines[4:]], exchanged):
        (tmp_path / "rows.jsonl").write_text("\n".join(changed))
        flags = whole.flags | dict(annotations=tmp_path / "rows.jsonl")
        *_, told = refused(sft_video, **flags, resume_from_checkpoint=checkpoint)
        assert len(set(re.findall(r"records (\w{64})", told))) == 2


def test_what_may_change_is_told(toy, tmp_path, trained):
    """Another loss, a longer run at a constant rate, data that has moved, another script's hash.

    The same command tells nothing.
    """
    flags = dict(lr_scheduler_type="constant", save_steps=2)
    trained(g, max_steps=2, **flags)
    run = tmp_path / "run"
    _, err = trained(g, max_steps=2, **flags, **AUTO)
    assert "changed since" not in err

    change_run(run / "checkpoint-2", script_sha256="0")
    (tmp_path / "moved").symlink_to(toy / "data")
    flags |= dict(loss_type="dapo", data_root=tmp_path / "moved")
    _, err = trained(g, max_steps=3, **flags, **AUTO)
    told = [line for line in err.splitlines() if line.startswith("changed since")]
    names = [line.split(": ")[1].split()[0] for line in told]
    assert names == ["data_root", "loss_type", "max_steps", "script_sha256"]
    assert f"changed since {run}/checkpoint-2: loss_type was 'grpo', is 'dapo'" in told
    assert rows(run / "metrics.jsonl")[-1]["step"] == 3


# ---- The folder ----------------------------------------------------------------------------------
def test_the_base_model_is_not_written_over(toy, tmp_path, refused):
    """--output_dir that is --model, by a link too, or that holds it: refused at once."""
    base = tmp_path / "run"
    shutil.copytree(toy / "init", base / "checkpoint-3")
    (tmp_path / "link").symlink_to(base / "checkpoint-3")
    before = contents(base)
    for output_dir in (base, base / "checkpoint-3", tmp_path / "link"):
        for model in (base / "checkpoint-3", tmp_path / "link"):
            [told] = refused(sft_video, model=model, output_dir=output_dir)
            assert f"--output_dir {output_dir} holds --model {model}" in told
    assert contents(base) == before


def hold(path, locked):
    """In another process: what a run does until it ends."""
    path.parent.mkdir(exist_ok=True)
    file = open(path, "a")
    sft_video.fcntl.lockf(file, sft_video.fcntl.LOCK_EX)
    locked.set()
    time.sleep(100)


@pytest.fixture
def holder():
    """holder(folder): a process that writes there, as a run does, until it is killed."""
    context = get_context("fork")
    processes = []

    def start(folder):
        locked = context.Event()
        processes.append(context.Process(target=hold, args=(folder / ".lock", locked)))
        processes[-1].start()
        assert locked.wait(10)
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.join()


def test_two_runs_in_one_folder(toy, tmp_path, train, on_ranks, holder):
    """The second is told so, on each of its ranks, and changes nothing.

    Not even --overwrite_output_dir helps. When the first one is killed its lock is gone.
    """
    run = tmp_path / "run"
    first = holder(run)
    words = ["--model", toy / "init", "--data_root", toy / "data", "--output_dir", run]
    words += ["--overwrite_output_dir", "true", "--max_steps", 1, *batch(1, 1)]
    ends = on_ranks(sft_video, words)
    assert [code for code, _, _ in ends] == [2, 2]
    told = "".join(err for _, _, err in ends)
    assert f"error: --output_dir {run}: another run is writing there" in told
    assert "Traceback" not in told
    assert list(run.iterdir()) == [run / ".lock"]

    first.kill()
    first.join()
    assert train(sft_video, max_steps=1)[0] == 0


def test_a_file_system_without_locks(trained, monkeypatch):
    """No lock is to be had there, and training goes on."""

    def none(*args):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(sft_video.fcntl, "lockf", none)
    monkeypatch.setattr(sft_video, "catch_signals", sys.exit)  # before the first step
    trained(sft_video, max_steps=1)


@pytest.mark.parametrize(
    "flags, count, size",
    [
        ({}, 3, 16),  # two are kept, and a third is written before the first goes
        (dict(save_steps=4), 2, 16),
        (dict(save_total_limit=0), 5, 16),
        (dict(save_only_model=True), 3, 4),
    ],
    ids=str,
)
def test_space(toy, tmp_path, trained, monkeypatch, flags, count, size):
    """What the run keeps at once does not fit: a warning before the first step, with both numbers.

    `size` is the bytes of a parameter: its weight, and in resume/ its master weight and moments.
    """
    weights = load_file(toy / "init/model.safetensors").values()
    needed = count * size * sum(x.numel() for x in weights)
    usage = SimpleNamespace(free=needed)
    monkeypatch.setattr(sft_video.shutil, "disk_usage", lambda folder: usage)
    monkeypatch.setattr(sft_video, "catch_signals", sys.exit)  # before the first step
    flags = dict(max_steps=4, save_steps=1) | flags
    _, err = trained(sft_video, **flags)
    assert "warning" not in err

    usage.free = needed - 1
    _, err = trained(sft_video, **flags)
    gib = f"{needed / 2**30:.1f} GiB"
    assert (
        f"warning: {count} checkpoints at once take up to {gib}, and --output_dir {tmp_path}" in err
    )
    assert f"has {gib} free" in err


def test_only_the_model_is_saved(tmp_path, trained, refused):
    """--save_only_model leaves the moments out; who would go on from there is told why he can't."""
    flags = dict(max_steps=2, save_steps=1, save_only_model=True)
    trained(sft_video, **flags)
    run = tmp_path / "run"
    assert not list(run.glob("checkpoint-*/resume"))
    saved = load_file(run / "checkpoint-2/model.safetensors")
    final = load_file(run / "model.safetensors")
    assert all(torch.equal(x, final[name]) for name, x in saved.items())

    [told] = refused(sft_video, **flags, resume_from_checkpoint=run / "checkpoint-1")
    assert "resume/ holds 0 of 1 shards (--save_only_model: none)" in told
    told = refused(sft_video, **flags, **AUTO)
    assert sum("--save_only_model" in line for line in told) == 2


def test_the_papers_runs_save_a_handful():
    """GRPO's 750 steps and SFT's 47 leave a handful of checkpoints behind by default."""
    for script, steps in ((g, 750), (sft_video, 47)):
        assert 4 <= steps // script.Config().save_steps <= 8


# ---- What is told on the way ---------------------------------------------------------------------
def test_progress(trained):
    """A line on stdout each logging_steps, and no bar where stderr is no terminal."""
    out, err = trained(g, max_steps=5, logging_steps=2, save_steps=9)
    number = r"-?\d+\.\d{3}"
    numbers = f"reward {number}, kl {number}, completion_length {number}"
    for step, line in zip((2, 4), out.splitlines(), strict=False):
        assert re.fullmatch(
            rf"step {step} of 5: {numbers}, \d+\.\d\d s a step, \d\d:\d\d left", line
        )
    assert len(out.splitlines()) == 2 + 2
    assert "\r" not in err
    assert "%" not in err


def test_the_epoch_ends_at_1(small, tmp_path, trained):
    """An uneven last step counts no more records than there are."""
    lines = small[sft_video]["annotations"].read_text().splitlines()
    (tmp_path / "rows.jsonl").write_text("\n".join(lines[:5]))
    trained(sft_video, annotations=tmp_path / "rows.jsonl", num_train_epochs=2)
    epochs = [row["epoch"] for row in rows(tmp_path / "run/metrics.jsonl")]
    assert epochs == [0.4, 0.8, 1.2, 1.6, 2.0]


def test_one_rank_says_that_it_stops(monkeypatch, capsys):
    """The line, and not a line a rank; all leave with the signal's exit code."""
    for rank, count in ((0, 1), (1, 0)):
        monkeypatch.setattr(g, "RANK", rank)
        with pytest.raises(SystemExit) as end:
            g.leave(7, [signal.SIGINT])
        assert end.value.code == 130
        assert capsys.readouterr().err.count("stopped after step 7") == count


def test_all_truncated(toy, tmp_path, trained):
    """Where no completion ends nothing is learnt: no gradient, and no division by zero."""
    flags = dict(mask_truncated_completions=True, max_steps=2, weight_decay=0.0, beta=0.5)
    trained(g, **flags)
    log = rows(tmp_path / "run/metrics.jsonl")
    for row in log:
        assert row["frac_truncated"] == 1
        assert row["loss"] == row["grad_norm"] == 0
        assert row["completion_length"] == 3
        assert row["entropy"] > 0
    before = load_file(toy / "init/model.safetensors")
    after = load_file(tmp_path / "run/model.safetensors")
    assert all(torch.equal(x, after[name]) for name, x in before.items())


def test_logs_are_json(tmp_path):
    """A number that is not finite stands as null, at any depth; all others stay to the last bit."""
    row = dict(
        step=1, loss=float("nan"), x=[0.1 + 0.2, float("inf"), [-float("inf")]], text="é\ud83d"
    )
    row["text"] = "é NaN"
    g.append_rows(tmp_path / "log.jsonl", [row, row])

    def refuse(name):
        raise ValueError(name)

    for line in (tmp_path / "log.jsonl").read_text().splitlines():
        found = json.loads(line, parse_constant=refuse)
        assert found == dict(step=1, loss=None, x=[0.1 + 0.2, None, [None]], text="é NaN")


# ---- By torchrun, and beside other people's packages ---------------------------------------------
IN_VERSION_4 = """
import sys
import torch
import transformers
from transformers import Qwen2VLForConditionalGeneration

folder, version, inputs, logits = sys.argv[1:]
assert transformers.__version__ == version
model = Qwen2VLForConditionalGeneration.from_pretrained(folder, torch_dtype="auto")
with torch.no_grad():
    found = model(**torch.load(inputs)).logits
torch.save(dict(dtype=model.dtype, logits=found), logits)
"""


@pytest.mark.slow
@pytest.mark.parametrize("version", ["4.49.0", "4.57.6"])
def test_what_is_saved_loads_in_transformers_4(small, tmp_path, finished, version):
    """vLLM, and most users, are at version 4, which can't read a config.json that 5 has written.

    Of a final model and of a checkpoint it must make the logits that we make. (The toy's tokenizer
    was made by version 5. What is saved of a tokenizer are the source's own files.)
    """
    python = tmp_path / "venv/bin/python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    install = [python, "-m", "pip", "install", "-q", f"transformers=={version}"]
    done = subprocess.run(install, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"no transformers {version} to be had: {done.stderr.splitlines()[-1]}")
    # torch, and what else the environment lacks, are this one's.
    [packages] = (tmp_path / "venv/lib").glob("python*/site-packages")
    (packages / "ours.pth").write_text(str(Path(torch.__file__).parents[1]))

    flags = small[g]
    record = g.load_records(flags["annotations"], flags["data_root"])[0]
    kinds = [kind for kind, _ in record["media"]]
    for folder in (finished, finished / "checkpoint-4"):
        model = g.load_model(folder, CPU, torch.float32)
        tokenizer = g.AutoTokenizer.from_pretrained(folder)
        c = g.Config(frame_size=56, max_frames=4)
        sample = g.VideoDataset([record], tokenizer, model.config, c).begin(0)() | dict(kinds=kinds)
        completions = random_completions(1, 1, 4)
        inputs = transformers_inputs(model.config, [sample], completions)
        inputs.pop("mm_token_type_ids")  # version 5's
        torch.save(inputs, tmp_path / "inputs.pt")
        paths = [folder, version, tmp_path / "inputs.pt", tmp_path / "logits.pt"]
        subprocess.run([python, "-c", IN_VERSION_4, *paths], check=True)

        found = torch.load(tmp_path / "logits.pt")
        with torch.no_grad():
            states = model.completion_states(collate(sample), completions)
            ours = model.logits(states)
        assert found["dtype"] == torch.float32
        assert ours.std() > 0.01
        assert (found["logits"][0, -5:-1] - ours).abs().max() <= 1e-5


@pytest.mark.slow
def test_twenty_kills():
    """20 kills at random moments, half of them while it saves: the unbroken run's bytes."""
    command = [sys.executable, ROOT / "benchmarks/kill_and_resume.py", "--kills", "20"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
