"""Imported once by the process that ranks are forked from: what all would import, out of the collector's sight.

megatron-core, torch and transformers are some million objects. Looking through them at every change of layout was most
of the time of a tiny run.
"""

import gc
import importlib

for _name in (
    "megatron_taopd.commands.score",
    "megatron_taopd.commands.train",
    "megatron_taopd.convert",
    "megatron_taopd.models",
    "megatron_taopd.training.hooks.checkpoint",
    "megatron_taopd.training.loop",
    "megatron_taopd.training.optimizer",
    "megatron_taopd.training.pair",
    "megatron_taopd.training.resume",
    "megatron_taopd.training.score_table",
    "megatron_taopd.training.watchdog",
    "transformers",
):
    importlib.import_module(_name)

gc.collect()
gc.freeze()
