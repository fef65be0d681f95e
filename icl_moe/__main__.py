"""`python -m icl_moe`: the same as `icl-moe`."""

import sys

from icl_moe.cli import main

if __name__ == "__main__":
    sys.exit(main())
