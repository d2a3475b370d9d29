"""README.md says what the code does: its links, commands, defaults, fields, numbers and names are looked up here.

python -m pytest -q tests/test_readme.py
python tests/test_readme.py --fix     # rewrite the line numbers of links such as [`update`](grpo_video.py#L1-L2)
"""

import ast
import re
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
SCRIPTS = ("grpo_video.py", "sft_video.py", "eval_video.py")
LINK = re.compile(r"\[`([\w.]+)`\]\(([\w/]+\.py)#L(\d+)-L(\d+)\)")
# What other programs' commands may say: torchrun before the script's name, hf, pytest, and the tools of this repository.
OTHERS = {
    "kill_and_resume.py": {"kills", "seed"},
    "grpo_step.py": {
        "device",
        "size",
        "gradient_checkpointing",
        "plot",
        "sweep",
        "repetitions",
        "logits_to_keep",
        "prompts",
    },
    "input_pipeline.py": {"train"},
    "report.py": {"output", "data_root"},
    "frames.py": {"samples"},
    "torchrun": {"nproc_per_node", "nnodes", "rdzv_backend", "rdzv_endpoint", "max_restarts"},
    "hf": {"repo-type", "local-dir"},
    "test_smoke.py": {"sync"},
    "test_readme.py": {"fix"},
}


@cache
def definitions(file):
    """{dotted name of each function and class: (first line, last line)}; the first is the def's own, below its decorators."""
    found = {}

    def walk(node, prefix):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                found[prefix + child.name] = child.lineno, child.end_lineno
                walk(child, f"{prefix}{child.name}.")

    walk(ast.parse((ROOT / file).read_text()), "")
    return found


@cache
def settings(script):
    """{field of the script's Config: its default}."""
    [config] = [
        n
        for n in ast.parse((ROOT / script).read_text()).body
        if isinstance(n, ast.ClassDef) and n.name == "Config"
    ]
    return {
        n.target.id: ast.literal_eval(n.value.args[0])
        for n in config.body
        if isinstance(n, ast.AnnAssign)
    }


def flags(script):
    """The flags of a script: its Config's fields, and no_<field> for what is on by default."""
    return {*settings(script)} | {
        f"no_{name}" for name, default in settings(script).items() if default is True
    }


def table(header):
    """Cells of the rows of the table whose header line contains `header`."""
    lines = README.splitlines()
    [start] = [i for i, line in enumerate(lines) if line.startswith("|") and header in line]
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            return rows
        rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return rows


def names(text):
    """Names in backticks."""
    return set(re.findall(r"`(\w+)`", text))


def commands():
    """Command lines of the README: those in code blocks, and those in backticks."""
    parts = README.split("```")  # text, block, text, block, …, text
    lines = [line for block in parts[1::2] if block.startswith("\n") for line in block.splitlines()]
    lines += re.findall(r"`([^`\n]+)`", " ".join(parts[0::2]))
    return [
        part
        for line in lines
        for part in line.split(" && ")
        if re.match(r"(python|torchrun|hf|pip) ", part)
    ]


def written(script, *functions):
    """Keys that these functions write: names in dict(…) calls, and "key" of x["key"] = …"""
    nodes = [
        n
        for f in ast.parse((ROOT / script).read_text()).body
        if getattr(f, "name", "") in functions
        for n in ast.walk(f)
    ]
    found = {
        k.arg
        for n in nodes
        if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "dict"
        for k in n.keywords
        if k.arg
    }
    return found | {
        n.slice.value
        for n in nodes
        if isinstance(n, ast.Subscript)
        and isinstance(n.ctx, ast.Store)
        and isinstance(n.slice, ast.Constant)
        and isinstance(n.slice.value, str)
    }


# ---- Links and names ------------------------------------------------------------------------------------------------
def fixed(text):
    """The README with every link's line numbers as they are; KeyError names what is defined no more."""

    def place(link):
        name, file = link[1], link[2]
        if name not in definitions(file):
            raise KeyError(f"{file} defines no {name}")
        return f"[`{name}`]({file}#L{definitions(file)[name][0]}-L{definitions(file)[name][1]})"

    return LINK.sub(place, text)


def test_links_to_lines():
    """A link's text is the function or class that starts and ends at its lines; `python tests/test_readme.py --fix` helps."""
    found = [m[0] for m in LINK.finditer(README)]
    assert len(found) >= 20 and found == [m[0] for m in LINK.finditer(fixed(README))]
    assert len(found) == README.count(".py#L")  # none is written otherwise


def test_named_files_exist():
    """Every linked file and every Python file the README names is there; what it says the scripts write, they write."""
    for target in re.findall(r"\]\((?!http)([^)#]+)", README) + re.findall(r"[\w/]+\.py\b", README):
        assert (ROOT / target).exists() or list(ROOT.glob(f"*/{target}")), target
    sources = "".join((ROOT / script).read_text() for script in SCRIPTS)
    for name in (
        "config.json metrics.jsonl rollouts.jsonl summary.json summary.md predictions_ generation_config.json training_6k "
        "training_with_cot_6k validation_L1 checkpoint-"
    ).split():
        assert name in README and name in sources, name


def docstrings():
    """{name of each test of the repository: its docstring}."""
    trees = [
        ast.parse(file.read_text())
        for file in (ROOT / "test_smoke.py", *(ROOT / "tests").glob("test_*.py"))
    ]
    return {
        n.name: ast.get_docstring(n) or ""
        for tree in trees
        for n in tree.body
        if isinstance(n, ast.FunctionDef)
    }


def test_named_tests_exist():
    """Every test that the README names is defined somewhere."""
    named = {*re.findall(r"`(test_\w+)`", README)}
    assert len(named) > 20 and not named - {*docstrings()}


def test_traps():
    """20 traps, in order, each with a test whose docstring names the trap."""
    rows, docs = table("| # | trap |"), docstrings()
    assert [int(row[0]) for row in rows] == list(range(1, 21))
    without = [
        number
        for number, *_, named in rows
        if not any(
            re.search(rf"[Tt]raps? (\d+(,| and) )*{number}\b", docs.get(name, ""))
            for name in names(named)
        )
    ]
    assert not without, f"traps without a test that says so: {without}"


# ---- Commands and flags ---------------------------------------------------------------------------------------------
def test_commands():
    """Each command names a program's own flags, and the two commands of the quick start are there word for word."""
    assert "pip install -r requirements.txt && python grpo_video.py --toy\n" in README
    assert "pip install -r requirements.txt && python -m pytest -q\n" in README
    found = commands()
    assert len(found) > 20
    for command in found:
        program, allowed = command.split()[0], OTHERS.get(command.split()[0], set())
        for word in command.split():
            if Path(word).name in (*SCRIPTS, *OTHERS):
                program = Path(word).name
                allowed = flags(program) if program in SCRIPTS else OTHERS[program]
            elif word.startswith("--"):
                assert word[2:].partition("=")[0] in allowed, (
                    f"{word}: no flag of {program} in: {command}"
                )


def test_every_flag_exists():
    """Every --flag of the running text belongs to a script or to one of the programs that the commands use."""
    known = set().union(*(flags(script) for script in SCRIPTS), *OTHERS.values())
    assert set(re.findall(r"(?<![\w-])--([a-z][\w-]*)", README)) <= known


@pytest.mark.parametrize(
    "header, script",
    [("GRPO, the released run", "grpo_video.py"), ("SFT, the paper's run", "sft_video.py")],
)
def test_defaults(header, script):
    """The recipe's tables give the Config's defaults."""
    for row in table(header):
        named, given = re.findall(r"`--(\w+)`", row[2]), re.findall(r"`([^`]*)`", row[3])
        assert named and [str(settings(script)[name]) for name in named] == [
            str(float(x)) if "e-" in x else x for x in given
        ], row


def test_defaults_in_the_text():
    """Defaults that the text relies on."""
    grpo = settings("grpo_video.py")
    assert (grpo["data_root"], grpo["output_dir"]) == ("data/SEED-Bench-R1", "runs/grpo")
    assert (
        settings("sft_video.py")["output_dir"] == "runs/sft"
        and grpo["model"] == "Qwen/Qwen2-VL-7B-Instruct"
    )
    assert grpo["save_total_limit"] == 2 and grpo["max_bad_samples"] == -1 and grpo["kl_clamp"] == 0
    for script in ("grpo_video.py", "sft_video.py"):
        toy = re.search(r"^TOY = dict\((.*?)\)$", (ROOT / script).read_text(), re.M | re.S)[1]
        assert f'output_dir="runs/toy-{script.removesuffix("_video.py")}"' in toy
        assert "loss_type" not in toy and not re.search(
            "accumulation_steps=(?!1,)", toy
        )  # so the audit's code takes it


def test_what_it_is():
    """No script imports another but the toy's maker; the packages are those of requirements.txt; what is said to be absent is."""
    absent = re.compile(
        r"deepspeed|vllm|flash_attn|peft|bitsandbytes|torch\.compile|Trainer\b", re.I
    )
    for script in SCRIPTS:
        source = (ROOT / script).read_text()
        assert not re.search(
            r"^\s*(import|from) (grpo_video|sft_video|eval_video|toy|test_smoke)\b", source, re.M
        ), script
        assert not absent.search(source), absent.search(source)
    packages = {
        line.partition("==")[0].lower()
        for line in (ROOT / "requirements.txt").read_text().splitlines()
    }
    listed = re.search(r"^- Packages: (.*?)\. Linux", README, re.M)[1].lower()
    assert all(re.search(rf"\b{package}\b", listed) for package in packages)


# ---- Numbers and fields ---------------------------------------------------------------------------------------------
def test_paper_numbers():
    """The paper's accuracies are those that eval_video.py prints beside."""
    [paper] = [
        n
        for n in ast.parse((ROOT / "eval_video.py").read_text()).body
        if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == "PAPER"
    ]
    rows, printed = (
        table("| accuracy in %, [arXiv"),
        re.findall(r"\d+\.\d+", str([*ast.literal_eval(paper.value).values()])),
    )
    assert [float(x) for row in rows for x in row[1:8]] == [*map(float, printed)] and len(
        printed
    ) == 21
    assert all(row[8] == "not measured" for row in rows)


def test_memory():
    """The table of device memory is its own expressions' values, and its sums are right."""
    shapes = {}
    exec(re.search(r"```python\n(ranks, .*?)```", README, re.S)[1], shapes)
    totals = dict(always=0.0, rollout=0.0, update=0.0)
    for when, _, expression, given in table("| when | what | bytes |"):
        value = eval(expression.strip("`"), shapes) / 2**30
        totals[when] += value
        assert f"{value:.2f}" == given, expression
    always = totals["always"]
    assert (
        f"The sums: {always:.2f} always, **{always + totals['rollout']:.2f} in the rollout, "
        f"{always + totals['update']:.2f} in the update**"
    ) in README
    for expression, given in re.findall(r"`([^`]+)` bytes = ([\d.]+) GiB", README):
        assert f"{eval(expression, shapes) / 2**30:.1f}" == given, expression
    assert (
        f"899 + 8 × 256 = {shapes['rows']:,} text rows" in README
        and f"8 × 1,155 = {8 * (900 + 255):,}" in README
    )


def test_metrics_glossary():
    """The glossary explains every key of metrics.jsonl: what test_smoke.py expects of both scripts, and eval_loss."""
    expected = {
        n.targets[0].id: n.value
        for n in ast.parse((ROOT / "test_smoke.py").read_text()).body
        if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") in ("COMMON", "OF_GRPO")
    }
    expected = {
        name: set(value.args[0].func.value.value.split()) for name, value in expected.items()
    }  # of set("…".split())
    wanted = dict(
        both=expected["COMMON"], GRPO=expected["OF_GRPO"], SFT={"token_accuracy", "eval_loss"}
    )
    given = {script: set() for script in wanted}
    for keys, script, _ in table("| key | script |"):
        given[script] |= names(keys)
    assert given == wanted


def test_rollout_fields():
    """The fields of rollouts.jsonl are those that rollout and finished_rows write."""
    text = re.search(r"^`rollouts\.jsonl`.*", README, re.M)[0]
    not_logged = {"prompts", "mask", "advantages", "rows"}  # what rollout leaves for update
    assert (
        names(text)
        == (
            written("grpo_video.py", "rollout", "judged", "finished_rows")
            | {"kl", "entropy", "clip_ratio"}
        )
        - not_logged
    )


def test_evaluation_fields():
    """The fields of predictions_<split>.jsonl and summary.json are those that predict and tally write."""
    row = re.search(r"^An evaluation folder.*?`responses` and `answers`", README, re.M)[0]
    summary = re.search(r"and `summary\.json`, by split:(.*?)is the majority's", README)[1]
    assert names(row) == written("eval_video.py", "prediction")
    # Each of three values has its interval beside it, as the text says in a word.
    fields = {name for name in written("eval_video.py", "tally") if not name.endswith("_ci95")}
    assert names(summary) == fields | {"by_domain", "by_category"}
    assert 'tally(rows, "domain", "category")' in (ROOT / "eval_video.py").read_text()


def test_record_fields():
    """The table of record fields names every field that parse_record reads, and no other."""
    source = (ROOT / "grpo_video.py").read_text().splitlines()
    start, end = definitions("grpo_video.py")["parse_record"]
    read = set(
        re.findall(r"""raw(?:\.get\(|\[|, )["'](\w+)["']""", "\n".join(source[start - 1 : end]))
    ) | {"choice_a", "choice_d"}
    assert set().union(*(names(row[0]) for row in table("| field | needed |"))) == read


def test_code_blocks_are_python():
    """Every Python block parses, and calls of grpo_video's name what it has."""
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(blocks) == 3
    for block in blocks:
        ast.parse("def f():\n" + block if block.startswith("    ") else block)
    known = {
        n.id
        for n in ast.walk(ast.parse((ROOT / "grpo_video.py").read_text()))
        if isinstance(n, ast.Name)
    }
    assert set(re.findall(r"\bg\.(\w+)", "".join(blocks))) <= known | {
        *definitions("grpo_video.py")
    }


def test_dollars_and_fences():
    """Each fence is closed, and GitHub's math knows no \\operatorname."""
    assert (
        README.count("```") % 2 == 0
        and README.count("$`") == README.count("`$")
        and "\\operatorname" not in README
    )


def test_no_placeholder_is_left():
    """Numbers and tests that were still to come have come."""
    assert not re.findall(r"\b(?:TOY|TEST):\w+", README)


if __name__ == "__main__":
    if sys.argv[1:] != ["--fix"]:
        sys.exit(__doc__)
    (ROOT / "README.md").write_text(fixed(README))
