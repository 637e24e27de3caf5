"""``python -m megatron_taopd`` is ``taopd``."""

import sys

from megatron_taopd.cli import main

if __name__ == "__main__":
    sys.exit(main())
