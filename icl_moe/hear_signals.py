"""The first import of a rank's program: from here on a signal is a request to stop, also while all
else is imported.

Importing this module does it: the Python half of launch_scripts/pretrain.sh is bare imports, which
a reader of shards runs too if it is started anew.
"""

from icl_moe.signals import hear, is_program

if is_program():
    hear()
