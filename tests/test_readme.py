"""README.md and docs/ say what the code does: links, commands, defaults, fields and numbers.

python -m pytest -q tests/test_readme.py
python tests/test_readme.py --fix     # rewrite the line numbers of links to code
"""

import ast
import json
import re
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("grpo_video.py", "sft_video.py", "eval_video.py")

# {path of a page: its text}, README.md first; what a check looks for may stand on any of them.
PAGES = {page: page.read_text() for page in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))}
README = PAGES[ROOT / "README.md"]
TEXT = "\n".join(PAGES.values())

# A link to lines: its text is the name of what is defined there.
LINK = re.compile(r"\[`([\w.]+)`\]\(((?:\.\./)?[\w/]+\.py)#L(\d+)-L(\d+)\)")

# Flags of programs other than the scripts: this repository's, torchrun (before the script), hf.
OTHERS = {
    "validate.py": {
        "decode_timeout",
        "workers",
        "fps",
        "max_frames",
        "frame_size",
        "video_reader",
    },
    "report.py": {"output", "data_root"},
    "frames.py": {"samples"},
    "findings.py": {"seeds", "all", "write", "output_dir"},
    "select_records.py": {"pass_rate", "annotations", "output"},
    "select_chains.py": {"per_question", "annotations", "output"},
    "evaluation_ranks.py": {"before", "repetitions"},
    "kill_and_resume.py": {"kills", "seed"},
    "same_numbers.py": {"keep"},
    "grpo_step.py": {
        "device",
        "size",
        "gradient_checkpointing",
        "plot",
        "sweep",
        "repetitions",
        "peer",
        "prompts",
    },
    "input_pipeline.py": {"train", "readers"},
    "test_smoke.py": {"sync"},
    "test_readme.py": {"fix"},
    "torchrun": {"nproc_per_node", "nnodes", "rdzv_backend", "rdzv_endpoint", "max_restarts"},
    "hf": {"repo-type", "local-dir"},
}

# Programs whose Config adds settings to a script's.
SUBCLASSED = {"analyze.py": "eval_video.py", "memory.py": "grpo_video.py"}


# ---- What the code says -------------------------------------------------------------------------


def parsed(file):
    return ast.parse((ROOT / file).read_text())


@cache
def definitions(file):
    """{dotted name of each function and class of a file: (first line, last line)}.

    The first line is the def's own, below its decorators.
    """
    found = {}

    def walk(node, prefix):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                found[prefix + child.name] = child.lineno, child.end_lineno
                walk(child, f"{prefix}{child.name}.")

    walk(parsed(file), "")
    return found


def assigned(file, name):
    """The expression that a module-level `name = …` assigns."""
    for node in parsed(file).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == name:
            return node.value
    raise KeyError(f"{file} assigns no {name}")


@cache
def settings(script):
    """{field of the script's Config: its default}."""
    [config] = [n for n in parsed(script).body if getattr(n, "name", "") == "Config"]
    fields = [n for n in config.body if isinstance(n, ast.AnnAssign)]
    return {n.target.id: default_of(script, n.value) for n in fields}


def default_of(script, value):
    """A field's default. A list's is field(default_factory=…) of `list` or of a named list."""
    if not isinstance(value, ast.Call):
        return ast.literal_eval(value)
    factory = value.keywords[0].value
    if isinstance(factory, ast.Lambda):
        return ast.literal_eval(assigned(script, factory.body.id))
    assert factory.id == "list"
    return []


def flags(program):
    """A program's flags. A script's are its Config's fields, and no_<field> for what is on."""
    if program in SUBCLASSED:
        [path] = ROOT.glob(f"*/{program}")
        return flags(SUBCLASSED[program]) | set(settings(path.relative_to(ROOT)))
    if program not in SCRIPTS:
        return OTHERS[program]
    on = {f"no_{name}" for name, default in settings(program).items() if default is True}
    return on | set(settings(program))


def written(script, *functions):
    """Keys that these functions write: names in dict(…) calls, and "key" of x["key"] = …"""
    found = set()
    for function in parsed(script).body:
        if getattr(function, "name", "") not in functions:
            continue

        for n in ast.walk(function):
            if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "dict":
                found |= {keyword.arg for keyword in n.keywords if keyword.arg}
            if isinstance(n, ast.Subscript) and isinstance(n.ctx, ast.Store):
                key = getattr(n.slice, "value", None)  # a constant's
                if isinstance(key, str):
                    found.add(key)
    return found


def docstrings():
    """{name of each test of the repository: its docstring}."""
    found = {}
    for file in (ROOT / "test_smoke.py", *(ROOT / "tests").glob("test_*.py")):
        tests = [n for n in parsed(file).body if isinstance(n, ast.FunctionDef)]
        found |= {n.name: ast.get_docstring(n) or "" for n in tests}
    return found


# ---- What the pages say -------------------------------------------------------------------------


def table(header):
    """Cells of the rows of the table whose header line contains `header`, on whatever page."""
    lines = TEXT.splitlines()
    heads = [i for i, line in enumerate(lines) if line.startswith("|") and header in line]
    assert len(heads) == 1, f"{len(heads)} tables have {header!r} in their header line"

    rows = []
    for line in lines[heads[0] + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return rows


def names(text):
    """Names in backticks."""
    return set(re.findall(r"`(\w+)`", text))


def named_fields(header):
    """Names in backticks in the first column of a table."""
    return set().union(*(names(row[0]) for row in table(header)))


def python_blocks():
    return re.findall(r"```python\n(.*?)```", TEXT, re.S)


def commands():
    """Command lines of the pages: those in code blocks, and those in backticks."""
    parts = TEXT.split("```")  # text, block, text, block, …, text
    lines = []
    for block in parts[1::2]:
        if block.startswith("\n"):  # a block without a language
            lines += block.splitlines()
    lines += re.findall(r"`([^`\n]+)`", " ".join(parts[0::2]))

    found = []
    for line in lines:
        found += line.split(" && ")
    return [command for command in found if re.match(r"(python|torchrun|hf|pip) ", command)]


# ---- Pages, links and names ---------------------------------------------------------------------


def fixed(page):
    """The page's text with every link's line numbers as they are.

    KeyError names what is defined no more.
    """

    def place(link):
        name, target = link[1], link[2]
        found = definitions((page.parent / target).resolve())
        if name not in found:
            raise KeyError(f"{page.name}: {target} defines no {name}")
        first, last = found[name]
        return f"[`{name}`]({target}#L{first}-L{last})"

    return LINK.sub(place, PAGES[page])


def test_the_readme_is_short():
    """At most 220 lines; what a newcomer does not need is in docs/, and each page is linked."""
    assert len(README.splitlines()) <= 220
    for page in PAGES:
        if page.parent.name == "docs":
            assert f"](docs/{page.name})" in README, f"README.md does not link docs/{page.name}"


def test_links_to_lines():
    """A link's text is the function or class at its lines; tests/test_readme.py --fix helps."""
    found = [m[0] for m in LINK.finditer(TEXT)]
    right = []
    for page in PAGES:
        right += [m[0] for m in LINK.finditer(fixed(page))]
    assert len(found) >= 20 and found == right
    assert len(found) == TEXT.count(".py#L")  # none is written otherwise


def anchors(page):
    """What GitHub makes of a page's headings: small letters, hyphens for spaces, no signs."""
    headings = re.findall(r"^#+ (.*)", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_resolve(page):
    """Every linked file is there, seen from its page, and so is a linked heading of a page."""
    for target in re.findall(r"\]\((?!http)([^)]+)\)", PAGES[page]):
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file), target


def test_named_files_exist():
    """Every Python file that a page names is there; what the scripts are said to write, they do."""
    for name in re.findall(r"[\w/]+\.py\b", TEXT):
        name = name.lstrip("/")  # of ../
        assert (ROOT / name).exists() or list(ROOT.glob(f"*/{name}")), name

    sources = "".join((ROOT / script).read_text() for script in SCRIPTS)
    for name in (
        "config.json metrics.jsonl rollouts.jsonl summary.json summary.md predictions_ "
        "generation_config.json training_6k training_with_cot_6k validation_L1 checkpoint-"
    ).split():
        assert name in TEXT and name in sources, name


def test_named_tests_exist():
    """Every test that a page names is defined somewhere."""
    named = set(re.findall(r"`(test_\w+)`", TEXT))
    assert len(named) > 20 and not named - set(docstrings())


def test_traps():
    """The traps, in order, each with a test whose docstring names the trap."""
    rows = table("| # | trap |")
    assert [int(row[0]) for row in rows] == list(range(1, 23))

    docs = docstrings()
    without = []
    for number, *_, tests in rows:
        says_so = re.compile(rf"[Tt]raps? (\d+(,| and) )*{number}\b")
        if not any(says_so.search(docs.get(name, "")) for name in names(tests)):
            without.append(number)
    assert not without, f"traps without a test that says so: {without}"


# ---- Commands and flags -------------------------------------------------------------------------


def test_commands():
    """Each command names a program's own flags; the quick start's stand there word for word."""
    assert "pip install -r requirements.txt && python grpo_video.py --toy\n" in README
    assert "pip install -r requirements.txt && python -m pytest -q\n" in README

    found = commands()
    assert len(found) > 20
    for command in found:
        program = command.split()[0]
        allowed = OTHERS.get(program, set())
        for word in command.split():
            if Path(word).name in (*SCRIPTS, *OTHERS, *SUBCLASSED):
                program = Path(word).name
                allowed = flags(program)
            elif word.startswith("--"):
                name = word[2:].partition("=")[0]
                assert name in allowed, f"{word}: no flag of {program} in: {command}"


def test_slow_tests():
    """The line that runs the slow tests names a marker that pytest knows."""
    assert "\npython -m pytest -q -m slow\n" in README
    assert '"slow: ' in (ROOT / "pyproject.toml").read_text()


def test_every_flag_exists():
    """Every --flag of the running text belongs to a program that the commands use."""
    known = set().union(*(flags(program) for program in (*SCRIPTS, *OTHERS, *SUBCLASSED)))
    assert set(re.findall(r"(?<![\w-])--([a-z][\w-]*)", TEXT)) <= known


@pytest.mark.parametrize(
    "header, script",
    [("GRPO, the released run", "grpo_video.py"), ("SFT, the paper's run", "sft_video.py")],
)
def test_defaults(header, script):
    """The recipe's tables give the Config's defaults."""
    for row in table(header):
        named = re.findall(r"`--(\w+)`", row[2])
        given = re.findall(r"`([^`]*)`", row[3])
        given = [str(float(x)) if "e-" in x else x for x in given]
        assert named and [str(settings(script)[name]) for name in named] == given, row


def test_defaults_in_the_text():
    """Defaults that the text relies on."""
    grpo = settings("grpo_video.py")
    assert grpo["data_root"] == "data/SEED-Bench-R1"
    assert grpo["output_dir"] == "runs/grpo"
    assert grpo["model"] == "Qwen/Qwen2-VL-7B-Instruct"
    assert settings("sft_video.py")["output_dir"] == "runs/sft"
    assert grpo["save_total_limit"] == 2 and grpo["max_bad_samples"] == -1 and grpo["kl_clamp"] == 0

    for script in ("grpo_video.py", "sft_video.py"):
        toy = {k.arg: ast.unparse(k.value) for k in assigned(script, "TOY").keywords}
        assert toy["output_dir"] == repr(f"runs/toy-{script.removesuffix('_video.py')}")
        # The code of docs/auditing.md takes these for granted.
        assert "loss_type" not in toy
        assert toy.get("gradient_accumulation_steps", "1") == "1"


def test_what_it_is():
    """No script imports another; the packages are those of requirements.txt; what is absent is."""
    imports = re.compile(
        r"^\s*(import|from) (grpo_video|sft_video|eval_video|toy|test_smoke)\b", re.M
    )
    absent = re.compile(
        r"deepspeed|vllm|flash_attn|peft|bitsandbytes|torch\.compile|Trainer\b", re.I
    )
    for script in SCRIPTS:
        source = (ROOT / script).read_text()
        assert not imports.search(source), script
        assert not absent.search(source), absent.search(source)

    lines = (ROOT / "requirements.txt").read_text().splitlines()
    packages = {line.partition("==")[0].lower() for line in lines}
    listed = re.search(r"^- Packages: (.*?)\. Linux", README, re.M)[1].lower()
    assert all(re.search(rf"\b{package}\b", listed) for package in packages)


# ---- Numbers ------------------------------------------------------------------------------------


def test_paper_numbers():
    """The published accuracies on L1 to L3 are those that eval_video.py prints beside."""
    paper = ast.literal_eval(assigned("eval_video.py", "PAPER"))
    printed = [values.split() for values in paper.values()]
    printed = [values for values in printed if len(values) == 7]  # the others are LongVideoBench's
    rows = table("| accuracy in %, [arXiv")

    given = [[cell or "-" for cell in row[1:8]] for row in rows]
    assert given == printed and len(printed) == 6
    assert all(row[8] == "not measured" for row in rows)


def test_memory():
    """The README's number is the forecast of 8 x 7B at the defaults; sums of bytes are right.

    That the table is the command's output, test_memory.py checks.
    """
    rows = {(model, gpus, flags): cells for model, gpus, flags, *cells in table("| model | GPUs |")}
    at_rest, rollout, reference, update, peak, host, card = rows["7b", "8", ""]
    assert f"takes **{peak} GiB** of each GPU" in README
    offloaded = rows["7b", "1", "`--offload_optimizer`"][4]
    assert f"**{offloaded} GiB** with `--offload_optimizer`, as on one GPU" in README
    params = 8_291_375_616
    assert at_rest == f"{(4 + 8 + 2) * params / 8 / 2**30:.2f}"

    for expression, given in re.findall(r"`([^`]+)` bytes = ([\d.]+) GiB", TEXT):
        assert f"{eval(expression) / 2**30:.1f}" == given, expression

    assert f"899 + 8 × 256 = {899 + 8 * 256:,} text rows" in TEXT
    assert f"8 × 1,155 = {8 * (900 + 255):,}" in TEXT


def test_the_readmes_speed():
    """How many times faster a step is, README.md has from the table of docs/performance.md."""
    rows = {row[0].strip("*"): row[1:] for row in table("| | ours | released |")}
    ours, released, repeated, kept, trl = (x.strip("*") for x in rows["whole step, ÷ ours"])
    assert f"a step is {released} times as fast as in the released way" in README
    assert f"and {trl} times as fast as TRL's" in README
    assert f"| mid: released ÷ ours, repeated rows ÷ ours | {released}, {repeated} |" in TEXT
    memory = rows["peak memory, ÷ ours"][3]
    assert f"time, and memory of the update | {kept}, {memory} |" in TEXT


def test_the_findings():
    """README.md's table of the toy has the means of docs/findings.md's."""
    means = []
    for row in table("| model | accuracy L1 |")[:4]:
        means.append([re.sub(r" \(.*", "", cell) for cell in row])
    shown = [
        [name, ", ".join(cells[:3]), ", ".join(cells[3:6]), cells[6], ", ".join(cells[-2:])]
        for name, *cells in means
    ]
    for row in shown:
        assert f"| {' | '.join(row)} |" in README
    assert "](findings.svg)" in PAGES[ROOT / "docs/findings.md"]


# ---- Fields -------------------------------------------------------------------------------------


def test_metrics_glossary():
    """The glossary has every key of metrics.jsonl: what test_smoke.py expects, and eval_loss."""
    wanted = dict(SFT={"token_accuracy", "eval_loss"})
    asked_for = {"bonus", "p_answer_ref"}
    for script, name in (("both", "COMMON"), ("GRPO", "OF_GRPO")):
        wanted[script] = eval(ast.unparse(assigned("test_smoke.py", name)))
    wanted["GRPO"] |= asked_for

    given = {script: set() for script in wanted}
    for keys, script, _ in table("| key | script |"):
        given[script] |= names(keys)
    assert given == wanted


def test_rollout_fields():
    """The fields of rollouts.jsonl are those that judge, read and finished_rows write."""
    named = named_fields("| field of a prompt |") | named_fields("| field of a completion |")
    logged = written("grpo_video.py", "judge", "read", "finished_rows")
    assert named == logged | set(ast.literal_eval(assigned("grpo_video.py", "TOKEN_MEANS")))


def test_evaluation_fields():
    """The fields of a prediction are prediction's and graded's, those of summary.json tally's."""
    predictions = written("eval_video.py", "prediction", "graded")
    assert named_fields("| field of a prediction |") == predictions

    fields = written("eval_video.py", "tally") | {"by_domain", "by_category", "missing"}
    intervals = {name for name in fields if name.endswith("_ci95")}
    assert named_fields("| field of a split |") == fields - intervals
    [sentence] = re.findall(r"^(.*) come with an interval each, `…_ci95`\.$", TEXT, re.M)
    assert {f"{name}_ci95" for name in names(sentence)} == intervals
    assert 'tally(answers[split], "domain", "category")' in (ROOT / "eval_video.py").read_text()


def test_the_evaluations_defaults():
    """What is said to be the released evaluation's is the default: the length, and greedy."""
    defaults = settings("eval_video.py")
    [length] = re.findall(
        r"at most (\d+) tokens \| the same: `--max_completion_length` is \1 ", TEXT
    )
    assert defaults["max_completion_length"] == int(length) == 256
    assert "| greedy. `--do_sample` samples" in TEXT
    assert not defaults["do_sample"]
    assert defaults["num_samples"] == 1


def test_record_fields():
    """The table of record fields names every field that parse_record reads, and no other."""
    start, end = definitions("grpo_video.py")["parse_record"]
    lines = (ROOT / "grpo_video.py").read_text().splitlines()[start - 1 : end]
    read = re.findall(r"""raw(?:\.get\(|\[|, )["'](\w+)["']""", "\n".join(lines))
    assert named_fields("| field | needed |") == {*read, "choice_a", "choice_d"}


# ---- Code and marks -----------------------------------------------------------------------------


def test_code_blocks_are_python():
    """Every Python block parses, and what it takes from grpo_video is there."""
    blocks = python_blocks()
    assert len(blocks) == 3
    for block in blocks:
        ast.parse(block)

    nodes = ast.walk(parsed("grpo_video.py"))
    known = {n.id for n in nodes if isinstance(n, ast.Name)} | set(definitions("grpo_video.py"))
    [audit] = [block for block in blocks if "import grpo_video as g" in block]
    assert set(re.findall(r"\bg\.(\w+)", audit)) <= known
    assert set(re.findall(r"\bc\.(\w+)", audit)) <= set(settings("grpo_video.py"))


def test_the_wandb_snippet(tmp_path, monkeypatch):
    """It sends a run's settings, and each row of metrics.jsonl under its step."""
    rows = [dict(step=1, loss=0.0), dict(step=2, loss=0.5)]
    folder = tmp_path / "runs/grpo"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(dict(run=dict(beta=0.1))))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    sent = []
    wandb = SimpleNamespace(
        init=lambda **given: sent.append(given),
        log=lambda row, step: sent.append((step, row)),
        finish=lambda: sent.append("finished"),
    )
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.chdir(tmp_path)
    [snippet] = [block for block in python_blocks() if "import wandb" in block]
    exec(snippet, {})

    run = dict(project="seed-bench-r1", name="grpo", config=dict(beta=0.1))
    assert sent == [run, (1, rows[0]), (2, rows[1]), "finished"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_dollars_and_fences(page):
    """Each fence is closed, and GitHub's math knows no \\operatorname."""
    text = PAGES[page]
    assert text.count("```") % 2 == 0
    assert text.count("$`") == text.count("`$")
    assert "\\operatorname" not in text


def test_no_placeholder_is_left():
    """Numbers and tests that were still to come have come."""
    assert not re.findall(r"\b(?:TOY|TEST):\w+", TEXT)


if __name__ == "__main__":
    if sys.argv[1:] != ["--fix"]:
        sys.exit(__doc__)
    for page in PAGES:
        page.write_text(fixed(page))
