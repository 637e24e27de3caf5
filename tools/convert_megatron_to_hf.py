"""Megatron checkpoint to Hugging Face directory: ``taopd convert megatron-to-hf``, all flags as there."""

import sys

from megatron_taopd.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", "megatron-to-hf", *sys.argv[1:]]))
