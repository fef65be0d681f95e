"""The first import of a rank's program: from here on a signal is a request to stop, even while the
other modules are still being imported.

Importing this module has that effect: the Python half of launch_scripts/pretrain.sh consists of
imports only. A reader of shards also runs it if multiprocessing starts it as a new program.
"""

from icl_moe.signals import hear, is_program

if is_program():
    hear()
