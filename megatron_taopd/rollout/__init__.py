"""Engines that answer prompts, behind one protocol. ``megatron`` runs on the live student."""
