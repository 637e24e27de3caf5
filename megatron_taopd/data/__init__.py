"""Prompts, tokenizers, recorded rollouts and the batches made of them. Nothing here imports Megatron."""
