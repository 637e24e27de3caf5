"""Compare a model with its Hugging Face original: ``taopd convert verify``, all flags as there."""

import sys

from megatron_taopd.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", "verify", *sys.argv[1:]]))
