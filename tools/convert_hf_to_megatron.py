"""Hugging Face directory to Megatron checkpoint: ``taopd convert hf-to-megatron``, all flags as there."""

import sys

from megatron_taopd.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", "hf-to-megatron", *sys.argv[1:]]))
