"""What the command line makes of its arguments, before any verb runs."""

import pytest

from icl_moe.cli import main


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
    said = capsys.readouterr().err
    assert "'image_size' must be a whole number, not 'x'" in said
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
