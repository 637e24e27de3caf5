"""transformers holds the experts of a layer in one tensor, its files hold them one by one."""

from __future__ import annotations

import torch


def per_expert(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Named parameters, or their gradients, by the names of the files."""
    found = {}
    for name, value in tensors.items():
        prefix, _, matrix = name.rpartition(".experts.")
        for number, expert in enumerate(value if prefix else ()):
            if matrix == "gate_up_proj":
                gate, up = expert.chunk(2)
                found[f"{prefix}.experts.{number}.gate_proj.weight"] = gate
                found[f"{prefix}.experts.{number}.up_proj.weight"] = up
            else:
                found[f"{prefix}.experts.{number}.{matrix}.weight"] = expert
        if not prefix:
            found[name] = value
    return found
