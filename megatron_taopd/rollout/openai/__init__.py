"""Responses from vLLM and SGLang servers over HTTP. Nothing here imports Megatron."""
