"""Chinese as a first language: the catalogue is whole, and help, messages and reports speak it."""

import html
import re
import shutil
import string

import pytest
from support import messages
from support.studies import study_file

from iterbatch import language
from iterbatch.cli.main import COMMANDS, main
from iterbatch.language import _

CHINESE = re.compile(r"[\u4e00-\u9fff]")


@pytest.fixture(autouse=True)
def english_again(monkeypatch):
    """Whatever a test speaks, the next one begins in English."""
    monkeypatch.setenv("ITERBATCH_LANG", "en")
    yield
    language.use("en")


@pytest.fixture(scope="module")
def catalogue():
    """The translations, by message."""
    return messages.translated()


def test_every_message_is_translated_and_no_translation_is_left_over(catalogue):
    found = messages.extracted()
    assert found - catalogue.keys() == set()
    assert catalogue.keys() - found == set()
    assert [message for message, said in catalogue.items() if not said] == []
    assert len(found) > 800


def _fields(message):
    return sorted(
        f"{name}!{how}:{form}" for _text, name, form, how in string.Formatter().parse(message) if name
    )


def test_a_translation_fills_in_what_its_message_does(catalogue):
    for message, said in catalogue.items():
        if "{" in message and "{% " not in message:
            assert _fields(message) == _fields(said), message


def test_translations_are_chinese(catalogue):
    bare = {message: re.sub(r"\{[^}]*\}|--\w+", "", message) for message in catalogue}
    worded = [message for message, said in bare.items() if len(re.findall(r"[a-z]{3,}", said)) > 1]
    assert len(worded) > 500
    assert [message for message in worded if not CHINESE.search(catalogue[message])] == []


def test_the_compiled_catalogue_is_the_written_one():
    assert messages.PO.with_suffix(".mo").read_bytes() == messages.compiled()


def test_the_language_is_asked_for_by_flag_variable_or_locale(monkeypatch, capsys):
    for words, variable in ((["--lang", "zh"], ""), (["--lang=zh"], "en"), ([], "zh"), ([], "zh_CN.UTF-8")):
        monkeypatch.setenv("ITERBATCH_LANG", variable)
        assert main([*words, "train", "--epochs", "0"]) == 2
        assert capsys.readouterr().err == "错误：--epochs 为 0；它必须不小于 1\n", (words, variable)
    monkeypatch.setenv("ITERBATCH_LANG", "")
    monkeypatch.setattr("locale.getlocale", lambda: ("Chinese (Simplified)_China", "936"))
    assert language.of_the_system() == "zh"
    monkeypatch.setattr("locale.getlocale", lambda: (None, None))
    assert language.of_the_system() == "en"
    monkeypatch.setenv("ITERBATCH_LANG", "zh")
    assert main(["train", "--epochs", "0", "--lang", "en"]) == 2
    assert "--epochs is 0; it must be at least 1" in capsys.readouterr().err


def test_a_language_that_is_not_there_is_refused(capsys):
    assert main(["--lang", "fr", "list"]) == 2
    assert "--lang is 'fr'; choose from en, zh" in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_help_speaks_chinese_and_english_again(name, capsys):
    with pytest.raises(SystemExit):
        main(["--lang", "zh", name, "--help"])
    spoken = capsys.readouterr().out
    assert CHINESE.search(spoken)
    flags = re.findall(r"^│ (--\w+)", spoken, flags=re.MULTILINE)
    for block in re.split(r"^│ (?=-)", spoken, flags=re.MULTILINE)[1:]:
        said = re.sub(r"\(default.*|\(required.*", "", block.replace("│", " "), flags=re.DOTALL)
        assert CHINESE.search(said) or "show this help" in said, block
    with pytest.raises(SystemExit):
        main(["--lang", "en", name, "--help"])
    english = capsys.readouterr().out
    assert not CHINESE.search(english)
    assert flags == re.findall(r"^│ (--\w+)", english, flags=re.MULTILINE)


@pytest.mark.slow
def test_a_comparison_and_its_report_speak_chinese(tmp_path, tiny_folder, capsys):
    arms = {"baseline": {"lr": 0.01}, "abr": {"loss_threshold": 9.0}, "fixed2": {"strategy": "fixed"}}
    file = study_file(tmp_path, tiny_folder, arms, match="flops")
    words = ["compare", str(file), "--workers", "2", "--save_dir", str(tmp_path)]
    assert main(["--lang", "zh", *words]) == 0
    run_dir = tmp_path / "study"
    out = capsys.readouterr().out
    assert "在相同的计算量下，" in out
    page, text = ((run_dir / name).read_text(encoding="utf-8") for name in ("report.html", "report.md"))
    assert '<html lang="zh">' in page
    for shown in (page, text):
        assert "在相同的计算量下，" in shown
        assert "实验臂" in shown
    left = _english(re.sub(r"<(svg|style|code|head)\b.*?</\1>", "", page, flags=re.DOTALL))
    assert left == []
    english = tmp_path / "english"
    shutil.copytree(run_dir, english)
    assert main(["--lang", "en", "report", str(english)]) == 0
    assert not CHINESE.search((english / "report.html").read_text(encoding="utf-8"))
    kept = ("summary.json", "metrics.csv", "study.json")  # for programs: as they were
    assert all((english / name).read_bytes() == (run_dir / name).read_bytes() for name in kept)


def _english(page):
    """Texts of a page that are English, what the data and files say left out."""
    data = ("Document number", "more words", "metrics.csv", "table.tex")
    parts = [html.unescape(part).strip() for part in re.split(r"<[^>]+>", page)]
    known = [part for part in parts if part and not any(word in part for word in data)]
    sentences = [part for part in known if len(re.findall(r"\b[a-z]{3,}\b", part)) > 2]
    return [
        part for part in sentences if not CHINESE.search(part) and re.search(r"\b(the|of|is|and|are)\b", part)
    ]


def test_an_error_in_python_speaks_the_language_in_use():
    import iterbatch

    language.use("zh")
    with pytest.raises(iterbatch.UserError, match="未知"):
        iterbatch.make_config(epoch=3)
    assert _("Yes") == "是"
