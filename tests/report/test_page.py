"""What a report says first, what it says of its set-up, and several runs side by side."""

import json
import re
import shutil

import markdown as to_html
import pytest
from support.studies import study_file

from iterbatch.cli.main import main
from iterbatch.report.answers import cautions, conclusion, over_all
from iterbatch.report.comparison import Comparison, read_cells
from iterbatch.report.setup import setup_of
from iterbatch.report.stats import Interval
from iterbatch.report.tables import tex
from iterbatch.report.wording import markdown, p_words

ARMS = {
    "baseline": {"lr": 0.01},
    "abr": {"loss_threshold": 9.0},
    "fixed2": {"strategy": "fixed", "max_repeats": 2},
}

NAMES = ("[a](http://x.y)", "![i](x)", "[a]: http://x.y", "<b>x</b>", "&lt;b&gt;", "**x**", "_x_", "`x`")
NAMES += ("# x", "- x", "1. x", "> x", "a | b", "===", "https://x.y", "<http://x.y>")


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_folder):
    """A comparison at equal compute, and one at equal epochs with another length."""
    folder = tmp_path_factory.mktemp("page")
    for name, more in {"flops": {"match": "flops"}, "epochs": {"match": "epochs", "max_length": 16}}.items():
        file = study_file(folder / "files" / name, tiny_folder, ARMS, seeds=[0, 1, 2], **more)
        words = ["compare", str(file), "--workers", "1", "--save_dir", str(folder), "--run_name", name]
        assert main(words) == 0
    return folder


@pytest.fixture
def copies(made, tmp_path):
    """The two comparisons, to be changed."""
    for name in ("flops", "epochs"):
        shutil.copytree(made / name, tmp_path / name)
    return tmp_path


def _text(folder, name):
    return (folder / name).read_text(encoding="utf-8")


def test_the_answer_comes_first(made):
    page, text = _text(made / "flops", "report.html"), _text(made / "flops", "report.md")
    body = page[page.index("<body>") :]
    order = [
        "<h1>flops</h1>",
        "For the same compute, ",
        "Final test perplexity",
        "Does ABR beat",
        "Set-up</h3>",
    ]
    places = [body.index(words) for words in order]
    assert places == sorted(places)
    first = text.splitlines()
    assert first[0] == "# flops"
    assert first[2].startswith("**For the same compute, ")


def test_arms_that_cost_more_are_said_to(made):
    said = _text(made / "epochs", "report.md").splitlines()[2]
    assert re.match(r"\*\*For the same epochs but up to [12]\.\d\d times the compute, ", said), said
    assert "no proof that repeating pays" in _text(made / "epochs", "report.md")


def test_the_set_up_is_what_the_records_say(made):
    manifest = json.loads(_text(made / "flops", "manifest.json"))
    for shown in (_text(made / "flops", "report.html"), _text(made / "flops", "report.md")):
        for value in (
            f"{manifest['plan']['parameters']:,} parameters",
            manifest["origin"]["weights"][:16],
            manifest["origin"]["text"]["train"][:16],
            f"{manifest['plan']['documents']} documents",
            f"{manifest['plan']['scored']['test']['tokens']:,} tokens",
            f"torch {manifest['versions']['torch']}",
            manifest["hardware"]["cpu"],
            manifest["started"],
            "loss_threshold 9.0",
            "max_repeats 2",
            "LoRA of rank 8",
            "not tuned",
        ):
            assert value in shown, value


def test_the_set_up_counts_the_text_once_and_a_budget_that_was_given(copies):
    run = copies / "flops"
    settings = _text(run, "config.yaml")
    for before, after in (("epochs: 1", "epochs: 4"), ("budget: null", "budget: 2.5e+12")):
        assert settings.count(before) == 1
        settings = settings.replace(before, after)
    (run / "config.yaml").write_text(settings, encoding="utf-8")
    plan = json.loads(_text(run, "manifest.json"))["plan"]
    (cell,) = read_cells(run)
    told = setup_of(cell)
    assert f" documents, {plan['tokens'] / 4:,.0f} tokens" in told["Training text"]
    assert told["Batch"].endswith(f", {plan['batches'] / 4:,.0f} batches in the text")
    assert told["Budget"] == "the same FLOPs for every arm: 2,500,000,000,000"


def test_a_report_without_a_manifest_is_made(copies):
    (copies / "flops/manifest.json").unlink()
    assert main(["report", str(copies / "flops")]) == 0
    assert "LoRA of rank 8" in _text(copies / "flops", "report.md")


def test_every_claim_leads_to_its_records(made):
    page = _text(made / "flops", "report.html")
    table = page[page.index('<table class="cards words">') : page.index("</table>")]
    for arm in re.findall(r'href="#([^"]+)"', table):
        row = page[page.index(f'id="{arm}"') :].split("</tr>")[0]
        links = re.findall(r'href="([^"]+)"', row)
        assert {link.rsplit("/", 1)[1] for link in links} == {
            "",
            "result.json",
            "batches.jsonl",
            "evals.jsonl",
            "documents.json",
        }
        assert all((made / "flops" / link).exists() for link in links)


def test_several_runs_side_by_side(copies, capsys):
    assert main(["report", str(copies / "flops"), str(copies / "epochs")]) == 0
    out = copies / "flops+epochs"
    assert f"Report: {out}/report.html" in capsys.readouterr().out.replace("\n", "")
    page, text = _text(out, "report.html"), _text(out, "report.md")
    differing = page[page.index("Settings in which they differ") :].split("</table>")[0]
    assert re.findall(r'<th scope="row">(\w+)</th>', differing) == ["data_dir", "match", "max_length"]
    assert "## flops" in text
    assert "## epochs" in text
    pictures = re.findall(r"!\[.*?\]\((.+?)\)", text)
    assert {link.rsplit("/", 1)[0] for link in pictures} == {"figures/c1", "figures/c2"}
    for link in pictures + re.findall(r'href="([^"#]+)"', page):
        assert (out / link).exists(), link
    assert len(set(re.findall(r'id="([^"]+)"', page))) == len(re.findall(r'id="([^"]+)"', page))
    rows = _text(out, "metrics.csv").splitlines()
    assert [sum(row.startswith(f"{name},") for row in rows) for name in ("flops", "epochs")] == [9, 9]
    assert main(["report", str(copies / "flops"), str(copies / "epochs")]) == 0  # again, over the same


def test_runs_of_one_name_are_told_apart_and_stay_as_they_are(copies, tmp_path):
    (tmp_path / "old").mkdir()
    shutil.copytree(copies / "flops", tmp_path / "old/flops")
    for run in (copies / "flops", tmp_path / "old/flops"):
        shutil.rmtree(run / "figures")
    assert (
        main(["report", str(copies / "flops"), str(tmp_path / "old/flops"), "--out", str(tmp_path / "both")])
        == 0
    )
    text = _text(tmp_path / "both", "report.md")
    assert "## flops (1)" in text
    assert "## flops (2)" in text
    assert not (copies / "flops/figures").exists()
    for link in re.findall(r"!\[.*?\]\((.+?)\)", text):
        assert (tmp_path / "both" / link).is_file(), link


def test_a_significant_arm_is_not_hidden_by_a_lower_one_of_chance(made):
    (cell,) = read_cells(made / "flops")
    found = [
        Comparison(arm, "baseline", [0, 1], Interval(at, low, high, p, "t"), at, at, 0.1, 0.6, p_adjusted=p)
        for arm, at, low, high, p in (
            ("noisy", -0.02, -0.06, 0.02, 0.3),
            ("sure", -0.015, -0.02, -0.01, 0.001),
            ("same", 0.0, 0.0, 0.0, 1.0),
        )
    ]
    cell.__dict__["against_baseline"] = found
    assert "sure ended with 1.5% lower test perplexity" in conclusion(cell)
    cell.__dict__["against_baseline"] = found[:1]
    assert "no arm beat the baseline beyond chance: the nearest, noisy" in conclusion(cell)
    cell.__dict__["against_baseline"] = found[2:]
    assert conclusion(cell).endswith("same trained as the baseline did, to the last digit.")


def test_an_unfinished_study_of_several_cells_has_no_verdict(made):
    (cell,) = read_cells(made / "flops")
    assert over_all({"a": cell, "b": cell}).startswith("In none of 2") or "beyond chance" in over_all(
        {"a": cell}
    )
    cell.open = [("abr", 5)]
    assert over_all({"a": cell, "b": cell}) == ""


def test_side_by_side_writes_into_no_folder_of_something_else(copies, capsys):
    first, second = str(copies / "flops"), str(copies / "epochs")
    (copies / "mine").mkdir()
    (copies / "mine/notes.txt").write_text("mine", encoding="utf-8")
    for words, message in (
        (["--out", str(copies / "mine")], "holds no report"),
        (["--out", first], "is the folder of a run"),
        (["--mauve", first], "--mauve is for one run at a time"),
    ):
        assert main(["report", first, second, *words]) == 2
        assert message in " ".join(capsys.readouterr().err.split())
    assert main(["report", first, first]) == 2
    assert "named twice" in capsys.readouterr().err
    assert main(["report"]) == 2


def test_a_p_value_is_never_zero(made):
    assert [p_words(p) for p in (0.0, 0.00099, 0.001, 0.5, float("nan"))] == [
        "< 0.001",
        "< 0.001",
        "0.001",
        "0.500",
        "-",
    ]
    for name in ("report.html", "report.md", "table.tex"):
        first = _text(made / "flops", name).partition("Set-up</h3>")[0].partition("### Set-up")[0]
        assert "0.000" not in re.sub(r"<svg.*?</svg>|0\.000\d", "", first, flags=re.DOTALL)


def test_markdown_can_be_read(made):
    text = _text(made / "flops", "report.md")
    assert "&#" not in text
    assert "\\+" not in text
    assert "\\-0" not in text
    assert len(re.findall(r"\\", text)) < 5


@pytest.mark.parametrize("name", NAMES)
def test_markdown_shows_a_name_and_nothing_else(name):
    for page in (f"{markdown(name)}\n", f"| a |\n| --- |\n| {markdown(name)} |\n", f"- {markdown(name)}\n"):
        made = to_html.markdown(page, extensions=["tables"])
        assert not re.search(r"<(?!/?(p|table|thead|tbody|tr|th|td|ul|li)\b)", made), made
        assert made.count("<li>") <= 1
        assert made.count("<td>") <= 1


def test_the_table_for_latex(made):
    table = _text(made / "flops", "table.tex")
    assert table.count(r"\begin{tabular}") == table.count(r"\end{tabular}") == 1
    rows = [line for line in table.splitlines() if line.endswith(r"\\")]
    assert len({row.count("&") for row in rows}) == 1
    assert [row.split(" & ")[0] for row in rows] == ["arm", "baseline", "abr", "fixed2"]
    assert tex("a_b & 5% < $x$ \\input{y}") == r"a\_b \& 5\% $<$ \$x\$ \textbackslash{}input\{y\}"


@pytest.mark.parametrize(
    ("received", "said"),
    [(2, "gave every batch 2 passes alike"), (1, "meant to give every batch 2 passes, and made no repeat")],
)
def test_repeats_that_were_meant_and_not_made_are_told_from_those_made(made, received, said):
    arm = read_cells(made / "flops")[0].arm("abr")
    for each in arm.finished:
        each.batches.planned[:] = 2
        each.batches.received[:] = received
    assert said in arm.alike


def test_compute_that_differs_at_equal_flops_is_said_with_how_much(made, monkeypatch):
    cell = read_cells(made / "flops")[0]
    monkeypatch.setattr(type(cell), "compute_ratio", lambda self, name: 1.07 if name == "abr" else 1.0)
    assert any("up to 1.07 times the baseline's" in each for each in cautions(cell))
