"""What the demo's report has beside an evaluation's."""

from icl_moe import demo


def test_the_curve_of_a_resumed_run_has_each_step_once(tmp_path, monkeypatch):
    """It was killed while it wrote a line, and took two steps again."""
    (tmp_path / "csv_monitor").mkdir()
    text = "step,train_loss\n8,3.0\n16,2.5\n24,2.0\n32,1.9\n4\n\nstep,train_loss\n24,2.25\n32,1.5\n"
    for name in ("image_loss", "text_loss"):
        (tmp_path / f"csv_monitor/train_{name}.csv").write_text(text)
    drawn = {}
    monkeypatch.setattr(demo, "line_chart", lambda series, *labels: drawn.update(series))
    demo._loss_curve(tmp_path)
    assert drawn["image loss"] == drawn["text loss"] == ([8, 16, 24, 32], [3.0, 2.5, 2.25, 1.5])
