"""`icl-moe web` on a machine without Gradio."""

import sys

from icl_moe.cli import main


def test_without_gradio_the_command_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "icl_moe.web.page", raising=False)
    assert main(["web", "demo", "--port", "0"]) == 2
    printed = capsys.readouterr().err
    assert "pip install 'icl-moe[web]'" in printed and printed.count("\n") == 1
