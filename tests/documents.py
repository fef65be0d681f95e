"""Extracts code and commands from the Markdown pages, as a reader would copy them."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from small_run import REPOSITORY

PAGES = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "ds_configs/*.md", "icl_moe/**/*.md")
    for path in REPOSITORY.glob(pattern)
)
RECIPES = sorted(REPOSITORY.glob("*/**/recipes/*.yaml"))
LANGUAGES = ("bash", "python", "yaml", "text")

_PROGRAMS = ("icl-moe", "make", "deepspeed", "python", "accelerate", "bash", "sbatch", "docker")
_FENCE = re.compile(r"^( *)```(.*)$")


class Block(NamedTuple):
    """A fenced block of a page. line: its first line, counted from 1."""

    page: str
    line: int
    language: str
    text: str


class Command(NamedTuple):
    """A command and its place. words: without variables that are set before it, but with optional
    arguments that the page has in brackets. mention: whether it occurs in a sentence, possibly
    without its arguments.
    """

    where: str
    words: tuple[str, ...]
    mention: bool = False

    @property
    def name(self) -> str:
        return f"{self.where}: {' '.join(self.words)}"


def blocks(page: Path) -> Iterator[Block]:
    name = str(page.relative_to(REPOSITORY))
    lines = page.read_text(encoding="utf-8").splitlines()
    start = None
    for number, line in enumerate(lines):
        match = _FENCE.match(line)
        if match and start is None:
            start, indent, language = number, match[1], match[2]
        elif match and start is not None:
            text = "\n".join(each.removeprefix(indent) for each in lines[start + 1 : number])
            yield Block(name, start + 1, language, text)
            start = None
    assert start is None, f"{name}:{start}: the block does not end"


def prose(page: Path) -> str:
    """A page without its blocks, with unchanged line numbers."""
    lines, inside = [], False
    for line in page.read_text(encoding="utf-8").splitlines():
        fence = _FENCE.match(line) is not None
        inside ^= fence
        lines.append("" if fence or inside else line)
    return "\n".join(lines)


def code_spans(page: Path) -> Iterator[str]:
    return (match[1] for match in re.finditer(r"`([^`\n]+)`", prose(page)))


def commands() -> Iterator[Command]:
    """Every command in the pages and in the comments of recipes."""
    for page in PAGES:
        for block in blocks(page):
            if block.language == "bash":
                for words in _split(block.text):
                    yield Command(f"{block.page}:{block.line}", words)
        for span in code_spans(page):
            if span.split()[0] in _PROGRAMS:
                for words in _split(span):
                    yield Command(str(page.relative_to(REPOSITORY)), words, mention=True)
    for recipe in RECIPES:
        text = recipe.read_text(encoding="utf-8")
        for match in re.finditer(r"^# +(icl-moe .*)$", text, re.MULTILINE):
            for words in _split(match[1]):
                yield Command(str(recipe.relative_to(REPOSITORY)), words)


def _split(text: str) -> Iterator[tuple[str, ...]]:
    """The commands of shell code, each as its words."""
    text = text.replace("\\\n", " ").replace("[key=value ...]", "")
    text = re.sub(r"\[(--[^]]*|[A-Z_]+)\]", r"\1", text)
    for line in text.splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if word not in (";", "&&", "|"):
                words.append(word)
                continue
            while words and re.match(r"[A-Z_]+=", words[0]):
                words.pop(0)
            if words:
                yield tuple(words)
            words = []
