"""benchmarks/grpo_step.py: four ways of the same step, and how often each is measured."""

import importlib
import json
import sys
from collections import Counter
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import grpo_step  # noqa: E402

FORWARDS = (grpo_step.REFERENCE, grpo_step.POLICY)


def run_main(monkeypatch, *flags):
    """The command, in this process, on the smallest prompt. Rates of the machine are invented."""
    for rate in ("copy_bandwidth", "product_rate"):
        monkeypatch.setattr(grpo_step, rate, lambda *_: 1e9)
    shape = ["--size", "tiny", "--shapes", "20:2:4", "--repetitions", "1"]
    monkeypatch.setattr(sys, "argv", ["grpo_step.py", *shape, *flags])
    grpo_step.main()


def test_the_four_ways(monkeypatch, capsys, tmp_path):
    """All compute the same log-probs and gradients; table, JSON and drawing have each way."""
    table, plot = tmp_path / "all.json", tmp_path / "step.svg"
    run_main(monkeypatch, "--json", str(table), "--plot", str(plot))

    rows = json.loads(table.read_text())["results"]
    phases = [*grpo_step.PHASES, "step"]
    found = [(row["phase"], row["way"]) for row in rows]
    assert found == [(phase, way) for phase in phases for way in grpo_step.WAYS]
    assert all(row["logp_apart"] < 1e-5 for row in rows if row["phase"] in FORWARDS)
    assert all(row["gradient_apart"] < 1e-5 for row in rows if row["phase"] == grpo_step.POLICY)

    printed = capsys.readouterr().out
    assert printed.count("| completions' logits |") == 4
    assert "% of it reached" in printed
    assert all(f">{way}</text>" in plot.read_text() for way in grpo_step.WAYS)


def test_positions_of_logits(monkeypatch):
    """The released way makes logits at all P + C positions, completions' logits at C + 1."""
    P, G, C = 20, 2, 4
    size = grpo_step.SIZES["tiny"]
    cpu = torch.device("cpu")
    ours, hf = grpo_step.make_models(size, cpu, torch.float32, False)
    sample = grpo_step.make_sample(ours.config, P, size.clip, size.still)
    case = grpo_step.make_case(ours.config, [sample], G, C, cpu, torch.float32)
    ways = grpo_step.four_ways(ours, hf, case)

    seen = []
    hf.lm_head.register_forward_pre_hook(lambda head, given: seen.append(tuple(given[0].shape[:2])))
    with torch.no_grad():
        for way in (grpo_step.RELEASED, grpo_step.KEPT):
            ways[way][1][grpo_step.REFERENCE]()
    assert seen == [(G, P + C), (G, C + 1)]


@pytest.mark.parametrize("repetitions, slow", [(1, 1), (3, 1), (4, 2)])
def test_how_often_a_way_runs(repetitions, slow):
    """What released and repeated rows alone run, once in three times; what is shared, once for all.

    The rollout of repeated rows is that of completions' logits too.
    """
    calls = Counter()
    model = torch.nn.Linear(1, 1, bias=False)

    def way(name):
        def phase(key):
            def run():
                calls[name, key] += 1
                logp = model(torch.ones(1, 1))
                if logp.requires_grad:
                    logp.sum().backward()
                return logp.detach()

            return run

        return {key: phase(key) for key in grpo_step.PHASES}

    ours, released, kept = way("ours"), way("released"), way("kept")
    repeated = released | {grpo_step.ROLLOUT: kept[grpo_step.ROLLOUT]}
    ways = dict(zip(grpo_step.WAYS, ((model, w) for w in (ours, released, repeated, kept))))
    rows = grpo_step.run_ways(ways, repetitions, torch.device("cpu"))

    wanted = dict(ours=repetitions, released=slow, kept=repetitions)
    assert calls == {(n, p): k for n, k in wanted.items() for p in grpo_step.PHASES}
    runs = {(row["phase"], row["way"]): row["runs"] for row in rows}
    assert runs[grpo_step.ROLLOUT, grpo_step.REPEATED] == repetitions
    assert runs[grpo_step.POLICY, grpo_step.REPEATED] == slow
    assert runs["step", grpo_step.REPEATED] == runs["step", grpo_step.RELEASED] == slow
    assert runs["step", grpo_step.KEPT] == runs["step", grpo_step.OURS] == repetitions


# ---- --peer trl ----


@pytest.mark.parametrize(
    "installed, flags, problem",
    [
        (None, [], "needs trl 1.16.0, found none; pip install trl==1.16.0 brings it"),
        ("1.15.0", [], "needs trl 1.16.0, found 1.15.0; pip install trl==1.16.0 brings it"),
        ("1.16.0", ["--sweep"], "takes one prompt and one step; leave out --sweep and --prompts"),
        ("1.16.0", ["--prompts", "2"], "takes one prompt and one step; leave out --sweep and"),
    ],
)
def test_trl_cannot_be_run(monkeypatch, capsys, installed, flags, problem):
    """One line and exit code 2 before any work."""

    def version(package):
        if installed is None:
            raise grpo_step.PackageNotFoundError(package)
        return installed

    monkeypatch.setattr(grpo_step, "version", version)
    monkeypatch.setattr(grpo_step, "make_models", None)
    with pytest.raises(SystemExit) as ended:
        run_main(monkeypatch, "--peer", "trl", *flags)
    assert ended.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("grpo_step.py: error: --peer trl: ") and problem in line


@pytest.fixture
def peer_trl():
    found = pytest.importorskip("trl", reason="trl is not among the requirements").__version__
    if found != grpo_step.TRL_VERSION:
        pytest.skip(f"trl is {found}, not {grpo_step.TRL_VERSION}")
    return importlib.import_module("peer_trl")


def test_trl(peer_trl, monkeypatch, tmp_path):
    """TRL's reference, log-probs and gradients are ours, on the completions' positions alone."""
    scored = []
    apply = peer_trl.utils._ChunkedLogProbFunction.apply

    def noted(hidden, *rest):
        scored.append(len(hidden))
        return apply(hidden, *rest)

    monkeypatch.setattr(peer_trl.utils._ChunkedLogProbFunction, "apply", noted)
    table = tmp_path / "all.json"
    run_main(monkeypatch, "--peer", "trl", "--json", str(table))
    assert scored[-2:] == [8, 8]  # 2 completions of 4 tokens

    rows = json.loads(table.read_text())["results"]
    rows = {row["phase"]: row for row in rows if row["way"] == "TRL"}
    assert list(rows) == [*grpo_step.PHASES, "step"]
    assert all(rows[phase]["logp_apart"] < 1e-5 for phase in FORWARDS)
    assert rows[grpo_step.POLICY]["gradient_apart"] < 1e-5


def test_trl_trains(peer_trl, tmp_path):
    """A step of its own train() calls what the phases call, so often; its prompt has a video."""
    size = grpo_step.SIZES["tiny"]
    cpu = torch.device("cpu")
    ours, hf = grpo_step.make_models(size, cpu, torch.float32, False)
    sample = grpo_step.make_sample(ours.config, 40, size.clip, size.still)
    case = grpo_step.make_case(ours.config, [sample], 2, 4, cpu, torch.float32)
    trainer = peer_trl.make_trainer(hf, case, False)

    calls = {
        "_generate": 1,
        "_generate_and_score_completions": 1,
        "_get_per_token_logps_and_entropies": 2,  # the reference's and the policy's
        "compute_loss": 1,
    }
    for name in calls:
        setattr(trainer, name, Mock(wraps=getattr(trainer, name)))
    trainer.args.output_dir = str(tmp_path)
    trainer.args.max_steps = 1
    trainer.train()
    assert len(case.prompts.grids) == 2
    assert {name: getattr(trainer, name).call_count for name in calls} == calls
