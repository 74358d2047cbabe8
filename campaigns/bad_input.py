"""Bad input of every kind: each is answered with exit code 0 or 2 and a message, and harms no run.

Within 10 seconds.

    python -m campaigns.bad_input                 # 10,000 cases
    python -m campaigns.bad_input --cases 500     # as many as the test suite draws

Hypothesis draws flags, YAML files, study files, data files, model folders, and the files of runs; a
case that fails is shrunk and printed.
"""

import argparse
import contextlib
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as drawing
from hypothesis import strategies as st
from ruamel.yaml import YAML

from campaigns.tiny import make_tiny
from iterbatch.bench.train_arm import SavePoints
from iterbatch.checks import settings
from iterbatch.cli.main import main as iterbatch_main
from iterbatch.plain_yaml import parse_yaml

LIMIT_S, PATIENCE_S = 10, 60  # of the process's own time; by the clock, however busy the machine is
SHARES = {
    "study": 0.1,
    "report": 0.05,
    "flags": 0.25,
    "yaml": 0.25,
    "data": 0.15,
    "rows": 0.05,
    "model": 0.11,
    "run": 0.04,
}  # of the cases

odd_text = st.one_of(
    st.text(max_size=30),
    st.sampled_from(
        [
            "",
            " ",
            "-1",
            "0",
            "1e400",
            "nan",
            "inf",
            "None",
            "true",
            "[]",
            "{}",
            "../..",
            "/dev/null",
            "\x1b[31m",
            "<b>",
            "a" * 5000,
            "٣",
            "--lr",
        ]
    ),
)
odd_value = st.one_of(odd_text, st.integers(-(10**20), 10**20).map(str), st.floats().map(str))
plain_yaml = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.dates()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)
plain_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
said = st.one_of(
    st.text(max_size=40), st.sampled_from(["fine words", "</s>", "<s>", "\U00100000"]), plain_json
)
turn = st.dictionaries(
    st.sampled_from(["role", "content", "from", "value", "speaker", "text", "tool_calls", "x"]),
    st.one_of(said, st.sampled_from(["user", "assistant", "system", "human", "gpt"])),
    max_size=4,
)
good_turns = st.lists(st.text(max_size=20), min_size=1, max_size=3).map(
    lambda words: [{"role": role, "content": word} for word in words for role in ("user", "assistant")]
)
turns = st.one_of(st.lists(turn, max_size=3), good_turns, plain_json)
rows = st.one_of(
    st.fixed_dictionaries({"text": said}),
    st.fixed_dictionaries({"turns": turns}),
    st.fixed_dictionaries({"messages": turns}, optional={"tools": plain_json}),
    st.fixed_dictionaries({"conversations": turns}),
    st.fixed_dictionaries({"dialogue": st.lists(said, max_size=3), "speakers": st.lists(said, max_size=3)}),
    st.fixed_dictionaries({"instruction": said, "output": said}, optional={"input": said, "system": said}),
    st.fixed_dictionaries(
        {"prompt": st.one_of(said, turns)}, optional={"completion": said, "response": said}
    ),
    st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3),
    plain_json,
)
json_lines = st.lists(rows, max_size=30).map(
    lambda found: "\n".join(json.dumps(row) for row in found).encode("utf-8", "surrogatepass")
)
json_array = st.lists(rows, max_size=30).map(lambda found: json.dumps(found).encode("utf-8", "surrogatepass"))
contents = st.one_of(
    st.binary(max_size=400),
    st.text(max_size=2000).map(lambda text: text.encode("utf-8", "surrogatepass")),
    json_lines,
    json_array,
    json_lines.map(gzip.compress),
    json_lines.map(lambda content: gzip.compress(content)[:-5]),
    json_lines.map(lambda content: content.decode("utf-8", "replace").encode("utf-16")),
    st.sampled_from(
        [
            b"",
            b"\xef\xbb\xbf",
            b"\xff\xfe\x00\x00",
            b"\x00" * 3000,
            b"word " * 400_000,
            b"a" * 2_000_000,
            b"\r\n" * 1000,
            b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n",
            b'{"text": "' + b"x" * 2_000_000 + b'"}\n',
            b'{"text": "fine"}\n{"text": 3}\n{"text": ["mixed"]}\n' * 20,
            b"text,text\r\n1,2\r\n3\r\n",
            b'text\n"open quote\n' * 50,
            b"PAR1" + b"\x00" * 100 + b"PAR1",
            "caf\u00e9 \u4e2d\u6587\n".encode("utf-16"),
            b" = Title = \n\n text \n" * 50,
        ]
    ),
)


def to_yaml(value: Any) -> str:
    """Any document, odd ones included."""
    buffer = io.StringIO()
    YAML(typ="safe", pure=True).dump(value, buffer)
    return buffer.getvalue()


class Alarm(BaseException):
    """Its time is over."""


def _ring(signum: int, frame: FrameType | None) -> None:
    raise Alarm


def attempt(arguments: list[str]) -> tuple[int, str]:
    """Run the command line; returns its exit code and what it said on both streams.

    Raises:
        AssertionError: for a traceback, another exit code, silence, or more than ten seconds.
    """
    said = io.StringIO()
    before = {signum: signal.signal(signum, _ring) for signum in (signal.SIGALRM, signal.SIGPROF)}
    signal.alarm(PATIENCE_S)
    signal.setitimer(signal.ITIMER_PROF, LIMIT_S)
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = iterbatch_main(arguments)
    except SystemExit as ended:
        code = int(ended.code or 0)
    except Alarm:
        raise AssertionError(f"more than {LIMIT_S} s: {arguments}") from None
    finally:
        signal.alarm(0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        for signum, handler in before.items():
            signal.signal(signum, handler)
    text = said.getvalue()
    assert code in (0, 2), f"exit code {code}: {arguments}\n{text[-2000:]}"
    assert "Traceback" not in text, f"{arguments}\n{text[-2000:]}"
    assert text.strip(), f"silent: {arguments}"
    return code, text


def digest(folder: Path) -> str:
    """Of every file in a folder."""
    content = hashlib.sha256()
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        content.update(str(file.relative_to(folder)).encode() + file.read_bytes())
    return content.hexdigest()


class Ground:
    """A tiny model, a good text, a finished run and one that was cut off, for cases to be tried on.

    Args:
        folder: Empty.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.model, self.runs = folder, folder / "model", folder / "runs"
        make_tiny(self.model)
        self.text = folder / "good.jsonl"
        self.text.write_text(
            "".join(f'{{"text": "A good document, number {n}."}}\n' for n in range(40)), encoding="utf-8"
        )
        self.base = [
            "--model_name",
            str(self.model),
            "--dtype",
            "float32",
            "--max_length",
            "16",
            "--max_eval_tokens",
            "60",
            "--log_with",
            "none",
        ]
        small = [
            *self.base,
            "--data_dir",
            str(self.text),
            "--max_train_tokens",
            "64",
            "--strategies",
            "baseline",
            "--batch_size",
            "1",
            "--evals",
            "1",
        ]
        small += ["--save_dir", str(self.runs), "--checkpoint_every", "1u"]
        assert attempt(["train", *small, "--run_name", "done"])[0] == 0
        self.cut_off(small)
        self.before = digest(self.runs)

    def plan(self, text: Path) -> list[str]:
        """A command that reads a text and trains nothing."""
        where = ["--data_dir", str(text), "--save_dir", str(self.runs)]
        return ["train", *self.base, *where, "--max_train_tokens", "4000", "--dry_run"]

    def cut_off(self, flags: list[str]) -> None:
        """Leave a run with two checkpoints."""
        real, places = SavePoints.here, [0]

        def stopping(points: SavePoints) -> None:
            places[0] += 1
            if places[0] == 6:
                points.shared.interrupts.requested = signal.SIGTERM
            real(points)

        SavePoints.here = stopping
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                assert iterbatch_main(["train", *flags, "--run_name", "cut"]) == 143
        finally:
            SavePoints.here = real

    def unharmed(self) -> None:
        """Whether both runs are as they were.

        Raises:
            AssertionError: where they are not.
        """
        assert digest(self.runs) == self.before, "an existing run was changed"

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """A folder for one case."""
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            yield Path(folder)


# ----------------------------------------------------------------------------------------------------
# ----------------------------------
# The kinds of input


def flags_case(ground: Ground) -> Callable[[], None]:
    """Flags with values of any kind, for a run that is only planned, or that cannot begin."""
    names = st.one_of(
        st.sampled_from([*sorted(settings()), "unknown", "help"]), st.text("abcdefg_-", max_size=6)
    )
    drawn = st.lists(st.tuples(names, st.lists(odd_value, max_size=2)), max_size=4)

    @given(
        drawn, st.sampled_from([[], ["--run_name", "done"], ["--resume"], ["--resume", "--run_name", "cut"]])
    )
    def case(flags: list[tuple[str, list[str]]], run: list[str]) -> None:
        words = [
            word
            for name, values in flags
            if name not in ("overwrite", "no_dry_run")
            for word in (f"--{name}", *values)
        ]
        attempt(["train", *ground.base, "--save_dir", str(ground.runs), *run, *words, "--dry_run"])
        ground.unharmed()

    return case


def yaml_case(ground: Ground) -> Callable[[], None]:
    """Files of settings: known names with odd values, other documents, anything at all."""
    known = st.dictionaries(st.sampled_from(sorted(settings())), plain_yaml, max_size=5).map(
        lambda found: to_yaml(found).encode()
    )
    laughs = b"a: &a [x, x, x, x, x, x, x, x, x]\n" + b"".join(
        b"%c: &%c [%s]\n" % (n, n, b", ".join([b"*%c" % (n - 1)] * 9)) for n in range(ord("b"), ord("l"))
    )
    special = [
        b"\x00",
        b"- a\n- b",
        b"lr: !!python/object/apply:os.system [id]",
        b"lr: &x [*x]",
        b"[" * 5000,
        laughs,
        b"seeds: " + laughs[3:40],
        b"lr: 1" * 10**5,
    ]

    @given(
        st.one_of(
            known,
            plain_yaml.map(lambda found: to_yaml(found).encode()),
            st.binary(max_size=200),
            st.sampled_from(special),
        )
    )
    def case(content: bytes) -> None:
        with ground.scratch() as folder:
            (folder / "config.yaml").write_bytes(content)
            attempt(
                [
                    "train",
                    "--config",
                    str(folder / "config.yaml"),
                    *ground.base,
                    "--save_dir",
                    str(ground.runs),
                    "--dry_run",
                ]
            )
        ground.unharmed()

    return case


def data_case(ground: Ground) -> Callable[[], None]:
    """Files of text in every format, whole and broken, alone and as splits."""
    endings = ["txt", "md", "tokens", "jsonl", "json", "csv", "tsv", "parquet", "gz", "jsonl.gz", "json.zst"]
    names = st.lists(
        st.tuples(
            st.sampled_from(["train", "valid", "test", "x", "TEST", ".hidden", "heldout", "README"]),
            st.sampled_from([*endings, "JSONL"]),
        ),
        max_size=3,
    )
    flags = st.dictionaries(
        st.sampled_from(["text_field", "encoding", "loss_on", "special_tokens_in_text"]),
        st.one_of(
            odd_text.filter(lambda text: "\0" not in text),
            st.sampled_from(["text", "content", "gbk", "utf-16", "all", "assistant", "completion", "keep"]),
        ),
        max_size=2,
    )

    @given(names, st.lists(contents, min_size=3, max_size=3), st.booleans(), flags)
    def case(files: list[tuple[str, str]], found: list[bytes], alone: bool, given: dict[str, str]) -> None:
        with ground.scratch() as folder:
            paths = [folder / f"{name}.{ending}" for name, ending in files]
            for path, content in zip(paths, found, strict=False):
                path.write_bytes(content)
            target = paths[0] if alone and paths else folder
            attempt([*ground.plan(target), *(f"--{name}={value}" for name, value in given.items())])

    return case


def rows_case(ground: Ground) -> Callable[[], None]:
    """Rows among good ones: each becomes a document, is counted among those left out, or is refused."""

    @given(st.lists(rows.filter(lambda row: isinstance(row, dict)), max_size=8), st.booleans())
    def case(found: list[dict[str, Any]], array: bool) -> None:
        table = [*found, *({"text": f"A good document, number {n}."} for n in range(30))]
        content = json.dumps(table) if array else "\n".join(map(json.dumps, table))
        with ground.scratch() as folder:
            file = folder / ("rows.json" if array else "rows.jsonl")
            file.write_text(content, encoding="utf-8")
            code, text = attempt(ground.plan(file))
            if code == 0:
                words = " ".join(text.split())
                held_out = sum(int(part) for part in re.findall(r"split: (\d+) of", words))
                kept = int(re.findall(r"training text . (\d+) documents", words)[0]) + held_out
                left = sum(int(part) for part in re.findall(r"(\d+) of \d+ rows have no text", words))
                assert kept + left == len(table), f"{kept} kept and {left} left out of {len(table)}"

    return case


@st.composite
def damages(draw: st.DrawFn) -> tuple[str, int, bytes]:
    """What is done to a file: deleted, cut short, flipped, overwritten or replaced."""
    kind = draw(st.sampled_from(["delete", "cut", "flip", "insert", "replace", "append", "folder"]))
    return (
        kind,
        draw(st.integers(0, 10**6)),
        draw(
            st.one_of(
                st.binary(max_size=30), st.sampled_from([b"{}", b"[]", b"null", b"\xff\xfe", b"[" * 9999])
            )
        ),
    )


def damage(file: Path, how: tuple[str, int, bytes]) -> None:
    """Do it."""
    kind, at, content = how
    whole = file.read_bytes()
    at %= len(whole) + 1
    if kind in ("delete", "folder"):
        file.unlink()
        if kind == "folder":
            file.mkdir()
        return
    flipped = whole[:at] + bytes([whole[at] ^ 0x5A]) + whole[at + 1 :] if at < len(whole) else b""
    changed = {
        "cut": whole[:at],
        "flip": flipped,
        "insert": whole[:at] + content + whole[at:],
        "replace": content,
        "append": whole + content,
    }
    file.write_bytes(changed[kind])


def model_case(ground: Ground) -> Callable[[], None]:
    """Model folders with a file damaged or a setting of config.json changed, for a run of one batch."""
    config = json.loads((ground.model / "config.json").read_text(encoding="utf-8"))
    values = st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-5, 200),
        st.just(10**9),
        st.floats(),
        st.text(max_size=8),
        st.lists(st.integers(), max_size=2),
    )
    changes = st.dictionaries(
        st.sampled_from([*sorted(config), "auto_map", "quantization_config"]), values, min_size=1, max_size=2
    )
    files = sorted(file.name for file in ground.model.iterdir())

    @given(st.one_of(changes, st.tuples(st.sampled_from(files), damages())))
    def case(change: Any) -> None:
        with ground.scratch() as folder:
            model = folder / "model"
            shutil.copytree(ground.model, model)
            if isinstance(change, dict):
                (model / "config.json").write_text(json.dumps(config | change), encoding="utf-8")
            else:
                damage(model / change[0], change[1])
            flags = [
                *ground.base,
                "--model_name",
                str(model),
                "--data_dir",
                str(ground.text),
                "--max_train_tokens",
                "16",
                "--batch_size",
                "1",
            ]
            attempt(
                [
                    "train",
                    *flags,
                    "--strategies",
                    "baseline",
                    "--evals",
                    "1",
                    "--save_dir",
                    str(folder / "runs"),
                    "--run_name",
                    "new",
                ]
            )

    return case


def run_case(ground: Ground) -> Callable[[], None]:
    """Runs with a damaged file: a record, a checkpoint, a result, a configuration, an adapter.

    Gone on with, or generated from.
    """
    files = sorted(str(file.relative_to(ground.runs)) for file in ground.runs.rglob("*") if file.is_file())

    @given(st.sampled_from(files), damages(), st.booleans())
    def case(name: str, how: tuple[str, int, bytes], generating: bool) -> None:
        with ground.scratch() as folder:
            runs = folder / "runs"
            shutil.copytree(ground.runs, runs)
            damage(runs / name, how)
            run, other = name.split("/")[0], "cut" if name.startswith("done") else "done"
            before = digest(runs / other)
            if generating:
                attempt(["generate", str(runs / run), "--prompt", "The", "--new_tokens", "2"])
            attempt(["train", "--resume", str(runs / run)])
            assert digest(runs / other) == before, "another run was changed"

    return case


STUDY = """\
settings: {data_dir: TEXT, max_train_tokens: 64, match: flops, seeds: [0, 1]}
arms:
  baseline:
  abr: {loss_threshold: 1.5, lr: 1e-3}
  twice: {strategy: fixed, max_repeats: 2}
  permuted: {source: abr}
tune: {trials: 2, low: 1e-4, high: 1e-2, arms: [baseline]}
cells:
  small: {batch_size: 1}
  large: {batch_size: 2, arms: {abr: {lr: 2e-3}}}
"""


def study_case(ground: Ground) -> Callable[[], None]:
    """Study files with a part of a good one replaced, anything at all, and damaged bytes; only planned."""
    good = parse_yaml(STUDY.replace("TEXT", str(ground.text)))
    places = [(section,) for section in good] + [
        (section, entry) for section in good for entry in good[section]
    ]

    @given(
        st.one_of(
            st.tuples(st.sampled_from(places), st.one_of(plain_yaml, odd_text), st.booleans()),
            plain_yaml,
            damages(),
        )
    )
    def case(change: Any) -> None:
        content = to_yaml(good).encode()
        with ground.scratch() as folder:
            file = folder / "study.yaml"
            if isinstance(change, tuple) and isinstance(change[0], tuple):
                (*outer, last), value, renamed = change
                changed = json.loads(json.dumps(good))
                inner = changed[outer[0]] if outer else changed
                if renamed:
                    inner[str(value)] = inner.pop(last)
                else:
                    inner[last] = value
                content = to_yaml(changed).encode("utf-8", "surrogatepass")
            elif not isinstance(change, tuple):
                content = to_yaml(change).encode("utf-8", "surrogatepass")
            file.write_bytes(content)
            if isinstance(change, tuple) and isinstance(change[0], str):
                damage(file, change)
            attempt(["compare", str(file), *ground.base, "--save_dir", str(ground.runs), "--dry_run"])
        ground.unharmed()

    return case


def report_case(ground: Ground) -> Callable[[], None]:
    """A finished run with a damaged file, told from its records.

    Now and then with its figures, which take seconds.
    """
    done = ground.runs / "done"
    files = sorted(str(file.relative_to(done)) for file in done.rglob("*") if file.is_file())

    @given(st.sampled_from(files), damages(), st.integers(0, 9))
    def case(name: str, how: tuple[str, int, bytes], figures: int) -> None:
        with ground.scratch() as folder:
            run = folder / "run"
            shutil.copytree(done, run)
            damage(run / name, how)
            attempt(["power", str(run)])
            if figures == 0:
                attempt(["report", str(run)])
        ground.unharmed()

    return case


KINDS = {
    "study": study_case,
    "report": report_case,
    "flags": flags_case,
    "yaml": yaml_case,
    "data": data_case,
    "rows": rows_case,
    "model": model_case,
    "run": run_case,
}


def campaign(ground: Ground, kind: str, cases: int, *, seed: int | None = None) -> None:
    """Draw so many cases of a kind.

    Raises:
        AssertionError: for the first that is not answered as it should be, shrunk.
    """
    case = KINDS[kind](ground)
    # Where a case takes seconds none is shrunk.
    phases = [Phase.generate] if kind in ("model", "run") else [Phase.generate, Phase.shrink]
    options: dict[str, Any] = {
        "deadline": None,
        "database": None,
        "suppress_health_check": list(HealthCheck),
        "phases": phases,
    }
    settled = drawing(max_examples=cases, derandomize=seed is None, **options)
    with contextlib.chdir(ground.folder):  # whatever a drawn word makes stays there
        settled(case)()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["ITERBATCH_CACHE"] = str(Path(scratch) / "cache")
        os.environ["HF_DATASETS_CACHE"] = str(Path(scratch) / "datasets")
        os.environ["HF_HUB_OFFLINE"] = "1"
        torch.set_num_threads(1)  # a tiny model gains nothing from more
        ground = Ground(Path(scratch))
        for kind in arguments.kinds:
            begun, cases = time.monotonic(), max(1, round(arguments.cases * SHARES[kind]))
            campaign(ground, kind, cases)
            print(f"{kind}: {cases} cases in {time.monotonic() - begun:.0f} s, all answered", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
