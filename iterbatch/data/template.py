"""A chat template, rendered in a process of its own: it is a program, of people one may not know.

The process is small, has a limit to its memory, and is ended where one conversation takes too long.
"""

from __future__ import annotations

import contextlib
import json
import queue
import re
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from typing import IO, Any

import psutil

from iterbatch.data.documents import Span
from iterbatch.errors import DataError, first_line
from iterbatch.language import _

SECONDS = 3.0  # of its process's own time, for one conversation
PATIENCE = 60.0  # seconds by the clock, however busy the machine is
MEGABYTES = 300  # beyond what the process has before it renders
CHARACTERS = 1 << 24  # of one conversation


class Template:
    """Renders conversations.

    Args:
        source: The template, in Jinja's language.
        special: The tokenizer's special tokens by name, which templates write.
    """

    def __init__(self, source: str, special: Mapping[str, Any]) -> None:
        command = [sys.executable, "-m", __name__]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        self._answers: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        threading.Thread(target=_forward, args=(self._process.stdout, self._answers), daemon=True).start()
        weakref.finalize(self, _end, self._process)
        self.marks = re.search(r"\{%-?\s*generation\s*-?%\}", source) is not None
        self._send({"source": source, "special": dict(special)})
        self._receive(PATIENCE)  # it has started

    def render(
        self, messages: Sequence[Any], tools: Any = None, *, answer: bool = False, mark: bool = False
    ) -> tuple[str, list[Span]]:
        """One conversation as a text, and where the template itself says that the assistant speaks.

        Args:
            messages: As :mod:`iterbatch.data.forms` has them.
            tools: That the assistant may call, as JSON schemas.
            answer: Whether the header of an answer follows.
            mark: Whether to ask for what the assistant says.

        Raises:
            DataError: in the template's own words where it refuses them; or where it takes too long or too
                much memory.
        """
        self._send({"messages": list(messages), "tools": tools, "answer": answer, "mark": mark})
        found = self._receive(SECONDS)
        if "refused" in found:
            raise DataError(_("the chat template refuses it: {refused}").format(refused=found["refused"]))
        return found["text"], [(int(start), int(stop)) for start, stop in found["spans"]]

    def _send(self, content: Any) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(content).encode() + b"\n")
            self._process.stdin.flush()
        except OSError as problem:
            raise DataError(_("the chat template's process is gone; was it short of memory?")) from problem

    def _receive(self, seconds: float) -> Any:
        end = time.monotonic() + PATIENCE
        before = self._spent()
        while True:
            try:
                line = self._answers.get(timeout=0.25)
            except queue.Empty:
                spent = self._spent() - before
                if spent < seconds and time.monotonic() < end and self._process.poll() is None:
                    continue  # it was the machine that had no time
                _end(self._process)
                raise DataError(
                    _(
                        "the chat template takes more than {seconds:.0f} s for one conversation; give a "
                        "model with another template"
                    ).format(seconds=seconds)
                ) from None
            if not line:
                raise DataError(
                    _("the chat template takes more than {megabytes} MB of memory, and was ended").format(
                        megabytes=MEGABYTES
                    )
                )
            return json.loads(line)

    def _spent(self) -> float:
        """Seconds of its process's own time."""
        try:
            times = psutil.Process(self._process.pid).cpu_times()
        except psutil.Error:
            return 0.0
        return times.user + times.system


def _forward(stream: IO[bytes], answers: queue.SimpleQueue[bytes]) -> None:
    with stream:
        for line in stream:
            answers.put(line)
    answers.put(b"")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    if process.stdin is not None and not process.stdin.closed:
        with contextlib.suppress(OSError):
            process.stdin.close()


# ------------------------------------------------------------------------------------------------------------
# Its process


def _limit_memory() -> None:
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    limit = psutil.Process().memory_info().vms + MEGABYTES * 1_000_000
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def serve(requests: IO[bytes], answers: IO[bytes]) -> None:
    """Answer requests, a line each, until there are no more."""
    from transformers.utils.chat_template_utils import render_jinja_template

    def answer(content: Any) -> None:
        answers.write(json.dumps(content).encode() + b"\n")
        answers.flush()

    first = json.loads(requests.readline())
    _limit_memory()
    answer({})
    for line in requests:
        asked = json.loads(line)
        try:
            (text,), spans = render_jinja_template(
                [asked["messages"]],
                tools=asked["tools"],
                chat_template=first["source"],
                return_assistant_tokens_mask=asked["mark"],
                add_generation_prompt=asked["answer"],
                **first["special"],
            )
            if len(text) > CHARACTERS:
                raise ValueError(
                    _("it makes {count:,} characters of it; {characters:,} are allowed").format(
                        count=len(text), characters=CHARACTERS
                    )
                )
            found: Any = spans[0] if asked["mark"] else []
            answer({"text": text, "spans": [list(span) for span in found]})
        except MemoryError:
            answer({"refused": _("it takes more than {megabytes} MB of memory").format(megabytes=MEGABYTES)})
        except Exception as problem:  # whatever a template raises, by itself or by what it lacks
            answer({"refused": first_line(problem)})


if __name__ == "__main__":
    serve(sys.stdin.buffer, sys.stdout.buffer)
