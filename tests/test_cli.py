"""How the command line parses its arguments, before any verb runs."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from PIL import Image

from icl_moe.cli import main
from icl_moe.settings import find_recipe


@pytest.mark.parametrize(
    "arguments",
    [
        ["shards", "build", "demo", "shard_size=1", "--out", "{out}", "image_size=x"],
        ["shards", "build", "demo", "--out", "{out}", "shard_size=1", "image_size=x"],
        ["shards", "build", "--out", "{out}", "demo", "image_size=x"],
    ],
)
def test_settings_may_stand_before_and_after_options(arguments, tmp_path, capsys):
    assert main([argument.format(out=tmp_path / "shards") for argument in arguments]) == 2
    printed = capsys.readouterr().err
    assert "'image_size' must be a whole number, not 'x'" in printed
    assert not (tmp_path / "shards").exists()


@pytest.mark.parametrize(
    "arguments",
    [["train", "demo", "--epochs=3"], ["export", "runs/mine", "--out", "model", "steps=3"]],
)
def test_what_no_verb_knows_is_refused(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert f"unrecognized arguments: {arguments[-1]}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "missing"),
    [
        (["train"], "recipe"),
        (["shards", "build"], "DATA, --out"),
        (["tokenizer", "train", "--out", "x"], "recipe"),
    ],
)
def test_settings_are_not_among_what_is_missing(arguments, missing, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    printed = capsys.readouterr().err
    assert printed.endswith(f"the following arguments are required: {missing}\n")


@pytest.mark.parametrize(
    "command",
    [
        "shards build demo synthetic.images=12 --out {out}",
        "shards preview {out} --out {out}.html",
        "tokenizer train tokenizer_demo --out {out}",
        "tokenizer evaluate demo {out}",
        "export {out} --out {out}",
        "evaluate demo {out} --out {out}",
        "segment demo --example a.png b.png --query a.png --out {out}.png",
        "caption demo --example a.png b.json --query a.png",
    ],
)
def test_every_command_that_computes_says_that_a_device_is_not_there(command, tmp_path, capsys):
    arguments = command.format(out=tmp_path / "out").split()
    assert main([*arguments, "--device", "cuda:99"]) == 2
    assert "icl-moe: There is no device cuda:99 here" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        "evaluate demo shards --out out --limit 99999999999999999999",
        "evaluate demo shards --out out --batch 2147483648",
        "tokenizer features images --out out --seed 99999999999999999999",
        "tokenizer features images --out out --image-size 8193",
        "tokenizer masks instances.json --out out --cell 100000000",
        "shards build demo --out out --workers 99999999999999999999",
    ],
)
def test_a_number_that_nobody_means_is_refused(command, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(command.split())
    assert ended.value.code == 2
    assert "must be a whole number of at most" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["shards", "verify", ""], "shard folder is empty"),
        (["shards", "stats", ""], "shard folder is empty"),
        (["shards", "preview", "", "--out", "page.html"], "shard folder is empty"),
        (["evaluate", "demo", "", "--out", "out"], "shard folder is empty"),
        (["train", "demo", 'data.shards=""', "training.output=out"], "shard folder is empty"),
        (["tokenizer", "masks", "", "--out", "out"], "shard folder is empty"),
        (["tokenizer", "evaluate", "", "images"], "no tokenizer folder without a name"),
    ],
)
def test_an_empty_name_does_not_stand_for_the_current_folder(
    arguments, said, tmp_path, capsys, monkeypatch
):
    """An empty name is, for example, the value of a shell variable that was never set."""
    (tmp_path / "manifest.json").write_text("{}")
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert said in capsys.readouterr().err


def test_a_name_that_no_file_can_have_is_refused_before_the_work(tmp_path, capsys):
    name = str(tmp_path / ("a" * 250 + ".png"))
    command = ["segment", "no model", "--example", "a.png", "b.png", "--query", "a.png"]
    assert main([*command, "--out", name]) == 2
    assert f"{name}: the name of the file is too long" in capsys.readouterr().err


def test_what_may_not_be_read_is_named(tmp_path):
    """The commands do not run as root, who may read everything."""
    prefix: list[str] = []
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("root may read every file, and there is no setpriv")
        bounds = "--bounding-set=-dac_override,-dac_read_search"
        prefix = ["setpriv", bounds, "--inh-caps=-all"]
    recipe, images = tmp_path / "recipe.yaml", tmp_path / "images"
    shutil.copy(find_recipe("demo", "preprocessing"), recipe)
    images.mkdir()
    Image.new("RGB", (64, 64)).save(images / "1.png")
    content = {
        "images": [{"id": 1, "file_name": "1.png", "width": 64, "height": 64}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "segmentation": [[0, 0, 9, 0, 9, 9]]}
        ],
        "categories": [{"id": 1, "name": "dog"}],
    }
    instances = tmp_path / "instances.json"
    instances.write_text(json.dumps(content))
    settings = ["segmentation.source=coco", "captioning=null", "class_prompt=true", "examples=0"]
    settings += [f"segmentation.images={images}", f"segmentation.annotations={instances}"]
    build = ["shards", "build", str(recipe), *settings, "--out", str(tmp_path / "out")]
    script = (
        "import os, sys\n"
        "from icl_moe.cli import main\n"
        f"for path in {[str(recipe), str(instances), str(images)]!r}:\n"
        "    os.chmod(path, 0)\n"
        f"    assert main({build!r}) == 2, path\n"
        "    os.chmod(path, 0o700)\n"
    )
    ended = subprocess.run(
        [*prefix, sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    printed = [line for line in ended.stderr.splitlines() if line.startswith("icl-moe: ")]
    assert ended.returncode == 0, ended.stderr
    assert printed == [
        f"icl-moe: The recipe {recipe} cannot be read: Permission denied.",
        f"icl-moe: The file {instances} cannot be read: Permission denied.",
        f"icl-moe: {images / '1.png'} cannot be read: Permission denied.",
    ]


_ELSEWHERE = """
import os, signal, sys

os.__dict__.pop("sched_getaffinity", None)
for name in ("SIGHUP", "SIGTSTP", "SIGCONT", "SIGSTOP", "SIGKILL", "pthread_sigmask"):
    signal.__dict__.pop(name, None)
sys.modules["fcntl"] = None
from icl_moe.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("verb", ["segment", "caption", "label", "evaluate", "web", "shards build"])
def test_every_verb_parses_its_arguments_where_python_lacks_what_linux_alone_has(verb):
    words = [sys.executable, "-c", _ELSEWHERE, *verb.split(), "--help"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"usage: icl-moe {verb}" in done.stdout


def test_control_characters_in_names_do_not_reach_the_terminal(capsys):
    words = ["--example", "a", "b", "--query", "c", "--out", "d.png"]
    assert main(["segment", "a\x1b[31m\x9bmodel", *words]) == 2
    assert "\\x1b[31m\\x9bmodel" in (said := capsys.readouterr().err) and "\x1b" not in said


def test_two_outputs_are_two_files(tmp_path, capsys):
    out = str(tmp_path / "out.png")
    words = ["segment", "demo", "--example", "a.png", "b.png", "--query", "c.png", "--out", out]
    assert main([*words, "--confidence", out]) == 2
    assert "--out and --confidence are one file" in capsys.readouterr().err
