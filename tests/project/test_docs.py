"""Pages and READMEs: what they say can be typed, links lead somewhere, both languages say the same."""

import re
import shlex
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

import pytest
from conftest import ROOT

from iterbatch.cli.main import COMMANDS, main
from iterbatch.strategy import REGISTERED, STRATEGIES

DOCS = ROOT / "docs"
ONLY_ENGLISH = {"log", "architecture"}  # for who works on the project
IN_BOTH = [
    file.relative_to(DOCS).with_suffix("").as_posix()
    for file in sorted(DOCS.rglob("*.md"))
    if not file.name.endswith(".zh.md") and file.stem not in ONLY_ENGLISH
]
# What a block is run with besides, so that it takes seconds.
SMALL = [
    "--max_train_tokens",
    "2048",
    "--max_length",
    "128",
    "--max_eval_tokens",
    "200",
    "--prompts",
    "1",
    "--evals",
    "1",
    "--log_with",
    "none",
]
NOT_RUN = ("pip install", "conda ", "mkdocs ")  # .ci/run does, in a fresh environment
ORIGINAL = "python train.py --model llama --model_name huggyllama/llama-7b"  # tests/bench/test_runs.py


def _blocks(file, *languages):
    text = file.read_text(encoding="utf-8")
    found = re.findall(r"^( *)```(\w+)\n(.*?)^ *```", text, flags=re.DOTALL | re.MULTILINE)
    return [
        re.sub(f"^{indent}", "", block, flags=re.MULTILINE)
        for indent, kind, block in found
        if kind in languages
    ]


def _commands(file):
    lines = "".join(_blocks(file, "bash")).splitlines()
    return [part.strip() for line in lines for part in line.split("&&")]


@pytest.mark.slow
def test_every_block_of_the_readme_runs_as_written(tmp_path, monkeypatch, capsys):
    """In its order, from the files of a fresh clone. The Chinese one has the same blocks: test_packaging."""
    name = "README.md"
    for part in ("docs", "studies"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("records"))
    monkeypatch.chdir(tmp_path)
    mine = next(block for block in _blocks(ROOT / name, "python") if "TwiceWhenHard" in block)
    (tmp_path / "mine.py").write_text(mine, encoding="utf-8")
    ran = []
    try:
        for command in _commands(ROOT / name):
            if command.startswith((*NOT_RUN, ORIGINAL, "pytest")):
                continue
            words = shlex.split(command.replace("python train.py", "iterbatch train"))
            assert words[0] == "iterbatch", command
            assert main(_quick(words[1:])) == 0, f"{command}: {capsys.readouterr().err}"
            ran.append(words[1])
    finally:
        for strategy in list(REGISTERED):
            del STRATEGIES[strategy]
            REGISTERED.discard(strategy)
    assert set(ran) == {"train", "report", "generate", "list", "price", "cache", "compare", "power"}
    assert (tmp_path / "results/first+mine/report.html").is_file()


def _quick(words):
    """The command with a short text, or a short measurement."""
    more = {
        "train": SMALL,
        "compare": [*SMALL, "--seeds", "0", "1"],
        "price": ["--seconds", "1", "--batch_size", "1", "--max_length", "16"],
    }
    more |= {"generate": ["--new_tokens", "5"]}
    return words + more.get(words[0], [])


PAGES = [
    ROOT / "README.md",
    ROOT / "README.zh-CN.md",
    *sorted(DOCS.glob("*.md")),
    *sorted((DOCS / "strategies").glob("*.md")),
]


@pytest.mark.parametrize("file", PAGES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_every_command_of_a_page_has_such_flags(file, capsys):
    commands = _commands(file) + [
        line
        for block in _blocks(file, "text", "powershell")
        for line in block.splitlines()
        if line.startswith("python train.py")
    ]
    commands += re.findall(r"^python train\.py .*", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
    for command in commands:
        words = shlex.split(command.replace("python train.py", "iterbatch train"), comments=True)
        if words[0] != "iterbatch" or words[1].startswith("-"):
            continue
        assert words[1] in COMMANDS, command
        with pytest.raises(SystemExit):
            main([words[1], "--help"])
        known = set(re.findall(r"--([\w-]+)", capsys.readouterr().out))
        given = {word[2:] for word in words[2:] if word.startswith("--")}
        assert given <= known, command


@pytest.mark.slow
@pytest.mark.parametrize("name", ["python.md", "python.zh.md", "own-strategy.md", "own-strategy.zh.md"])
def test_the_python_of_a_page_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for block in _blocks(DOCS / name, "python"):
        quick = block.replace(
            "max_train_tokens=20_000", "max_train_tokens=2_000, max_eval_tokens=500, prompts=1"
        )
        exec(compile(quick, name, "exec"), {"__name__": "page"})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["integrations.md", "integrations.zh.md"])
def test_what_a_page_says_of_trainers_runs(name, tiny_folder, tmp_path):
    lightning = pytest.importorskip("lightning")
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, TrainingArguments

    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    lora = LoraConfig(layers_to_transform=[1], target_modules=["q_proj"], task_type="CAUSAL_LM")
    given = {
        "__name__": "page",
        "model": get_peft_model(base, lora),
        "args": TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", save_strategy="no"),
        "rows": [{"input_ids": list(range(9)), "labels": list(range(9))}] * 8,
        "Tuned": type("Tuned", (lightning.LightningModule,), {}),
    }
    blocks = _blocks(DOCS / name, "python")
    assert len(blocks) == 4
    for block in blocks:
        exec(compile(block, name, "exec"), given)


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(DOCS / "notebook.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # kept clean
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    first, table, mine, last = (
        [each for cell in [cell] for each in cell.outputs]
        for cell in notebook.cells
        if cell.cell_type == "code"
    )
    html = "".join(each.get("data", {}).get("text/html", "") for each in first)
    assert "For the same compute, " in html
    assert "abr" in "".join(each.get("data", {}).get("text/html", "") for each in table)
    assert "TwiceWhenHard" in "".join(each.get("data", {}).get("text/html", "") for each in mine)
    assert "report.html" in str(last)


# -- the site ----------------------------------------------------------------------------------------------


class _Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.links, self.ids, self.images = [], set(), []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.ids.add(given.get("id"))
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        if tag in ("img", "script", "link"):
            self.images.append(given.get("src") or given.get("href") or "")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built strictly: every warning is an error."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8", check=False)
    assert built.returncode == 0, built.stderr
    return folder


@pytest.mark.slow
def test_every_link_of_the_site_leads_somewhere(site):
    pages = {
        file: _Page(file.read_text(encoding="utf-8"))
        for file in site.rglob("*.html")
        if file.name != "404.html"
    }
    assert len(pages) > 50
    for file, page in pages.items():
        for link in page.links + page.images:
            parts = urlsplit(link)
            if parts.scheme or link.startswith("//"):
                assert parts.netloc in ("squidfunk.github.io",) or parts.scheme in ("data", "https"), link
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            assert target.exists(), f"{file.relative_to(site)}: {link}"
            if parts.fragment and target in pages and not parts.fragment.startswith("__"):
                assert unquote(parts.fragment) in pages[target].ids, f"{file.relative_to(site)}: {link}"


@pytest.mark.slow
def test_nothing_is_fetched_from_elsewhere(site):
    for file in site.rglob("*.html"):
        for source in _Page(file.read_text(encoding="utf-8")).images:
            assert not re.match(r"(https?:)?//", source), f"{file.relative_to(site)}: {source}"


def test_pages_in_both_languages_are_kept_in_step():
    def skeleton(text):
        return [
            re.match(r"#+|\|[- |]+\|$", line).group()[:3]
            for line in text.splitlines()
            if re.match(r"#+ |\| ---", line)
        ]

    def code(file):
        blocks = _blocks(file, "bash", "python", "powershell", "yaml")
        said = r'""".*?"""|"[^"]*[\u4e00-\u9fff][^"]*"|#[^\n]*'  # what is for people only
        return [re.sub(r" +$", "", re.sub(said, "", block, flags=re.DOTALL), flags=re.M) for block in blocks]

    for name in IN_BOTH:
        english, chinese = DOCS / f"{name}.md", DOCS / f"{name}.zh.md"
        if name != "api":  # made from the sources
            assert skeleton(english.read_text("utf-8")) == skeleton(chinese.read_text("utf-8")), name
        assert code(english) == code(chinese), name
        pages = (english.read_text("utf-8"), chinese.read_text("utf-8"))
        figures = [sorted(re.findall(r"\b\d+\.\d+\b(?! ?[MG亿万])", page)) for page in pages]
        assert figures[0] == figures[1], name
        assert re.search(r"[\u4e00-\u9fff]", chinese.read_text("utf-8"))


def test_the_package_page_has_no_link_that_leads_nowhere():
    text = (ROOT / "PACKAGE.md").read_text(encoding="utf-8")
    assert "docs/" not in re.sub(r"`[^`]*`", "", text)
    assert not re.findall(r"\]\((?!https://)[^)]*\)", text)
    assert 'readme = "PACKAGE.md"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
