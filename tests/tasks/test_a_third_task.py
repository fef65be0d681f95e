"""A new task is one class: a third task, outside the package, goes from pictures to a report
without a change to any other file.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import toy_tokenizer
from PIL import Image

PROGRAM = Path(__file__).with_name("inversion.py")


def test_a_task_from_outside_the_package_goes_from_build_to_evaluate(tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    rng = np.random.default_rng(0)
    for number in range(12):
        levels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        picture = Image.fromarray(levels).resize((80, 64))
        picture.save(pictures / f"{'red' if number % 2 else 'blue'}_{number}.png")
    tokenizer = toy_tokenizer.save_toy_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "data.yaml").write_text(
        f"tokenizer: {tokenizer}\nimage_size: 64\nexamples: 2\n"
        f"vocabulary: {{text_merges: 100, image_codes: {toy_tokenizer.CODES}}}\n"
        f"tasks:\n  inversion: {{images: {pictures}}}\n"
    )
    training = (
        "vocabulary.text_merges=100 vocabulary.image_codes=64 model.layers=2 model.width=32 "
        "model.heads=2 model.layers_with_experts=[1] model.positions=400 training.steps=2 "
        "training.global_batch=2 training.micro_batch=2 training.log_every=1 data.workers=0 "
        "optimizer.warmup_steps=1"
    )
    commands = [
        "shards build data.yaml --out shards --workers 0",
        "shards verify shards",
        "shards preview shards --out preview.html",
        f"train demo data.shards=shards training.output=run {training}",
        "export run --out model",
        "evaluate model shards --shots 1,2 --control shuffled --limit 4 --out result",
        "compare result result shards --out compared.json",
    ]
    done = subprocess.run(
        [sys.executable, PROGRAM],
        input="\n".join(commands) + "\n",
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (task,) = json.loads((tmp_path / "result/metrics.json").read_text())["tasks"].items()
    name, result = task
    assert name == "inversion"
    rows = {row["name"]: row["difference"] for row in result["rows"]}
    assert len(rows) == 6  # Two numbers of examples and their controls, the copy, and the ceiling.
    ceiling = rows["the truth through the tokenizer (ceiling)"]
    assert all(0 <= difference <= 255 for difference in rows.values())
    assert ceiling >= 0
    assert result["held_out"]["targets"] == 4 * 3 * toy_tokenizer.CODES
    assert "Differences are in levels of 255." in (tmp_path / "result/report.html").read_text()
    assert (tmp_path / "preview.html").read_text().count("<article>") == 12
    (compared,) = json.loads((tmp_path / "compared.json").read_text())
    assert compared["measure"] == "mean exact matches" and compared["queries"] == 4
