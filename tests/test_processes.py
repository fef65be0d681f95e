"""Processes that share the work of a stage wait for each other as long as it takes."""

import pytest


@pytest.mark.slow
def test_a_process_waits_for_a_much_slower_one(run_command, tmp_path):
    """The timeout is one second instead of torch's half hour."""
    script = tmp_path / "script.py"
    script.write_text(
        "import time\n"
        "from datetime import timedelta\n"
        "from torch.distributed import distributed_c10d\n"
        "distributed_c10d.default_pg_timeout = timedelta(seconds=1)\n"
        "from icl_moe.processes import join_processes\n"
        "process = join_processes('cpu')\n"
        "time.sleep(4 * process.process_index)\n"
        "process.wait_for_everyone()\n"
        "print('met', flush=True)\n"
        "process.destroy_process_group()\n"
    )
    command = ["torchrun", "--standalone", "--nproc_per_node", "2", script]
    result = run_command(command, PYTHONPATH=".")
    assert result.returncode == 0, result.stdout
    assert result.stdout.count("met") == 2
