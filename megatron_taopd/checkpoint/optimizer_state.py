"""What megatron-core's optimizers need around a save and a load.

megatron-core 0.16 to 0.19 assumes Apex or Transformer Engine here. With torch's own optimizers:

- a fresh optimizer has no state to describe before loading (SGD has no ``init_state_fn`` at all, Adam's
  leaves out ``step``), so it is created first;
- the distributed optimizer takes ``step`` out of the loaded tensors, as it is kept with the parameter groups,
  and then asks for it (KeyError), so it is put back;
- it also sets one ``step`` tensor for all parameters, which each of them would advance, so each gets its own.

0.19 recognises a group of parameters by its learning rates and weight decays too, so that a run could
not be resumed with others; those are hidden while it loads.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

# One canonical tensor per parameter, as without the distributed optimizer: loads at any TP, PP and DP.
METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    # Gathers on the CPU of the first data-parallel rank instead of on every GPU.
    "distrib_optim_fully_reshardable_mem_efficient": True,
    "chained_optim_avoid_prefix": True,
}

# Knobs of a parameter group that another run may set otherwise.
_SCHEDULED = ("max_lr", "min_lr", "start_wd", "end_wd")


def parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """The optimizers inside, without stand-ins for ranks that have no parameters."""
    chained = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    return [part for part in chained if not getattr(part, "is_stub_optimizer", False)]


def describe(optimizer: MegatronOptimizer) -> str:
    """Kind of optimizer, as far as its state depends on it."""
    kinds = []
    for part in parts(optimizer):
        rule = "sgd" if "momentum" in part.optimizer.defaults else "adam"
        kinds.append(f"{rule} in {type(part).__name__}")
    return ", ".join(dict.fromkeys(kinds)) or "none"


def create_missing_state(optimizer: MegatronOptimizer) -> None:
    """Give a torch optimizer the state it would have before its first step."""
    for part in parts(optimizer):
        _fill(part.optimizer)
        if part.init_state_fn is None:
            part.init_state_fn = lambda inner, config=None: _fill(inner)


def _fill(inner: torch.optim.Optimizer) -> None:
    for group in inner.param_groups:
        for parameter in group["params"]:
            if isinstance(inner, torch.optim.Adam):  # AdamW is one
                state = inner.state[parameter]
                state.setdefault("step", torch.zeros((), dtype=torch.float32))
                for name in ("exp_avg", "exp_avg_sq"):
                    if name not in state:
                        state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            elif isinstance(inner, torch.optim.SGD) and group["momentum"]:
                state = inner.state[parameter]
                if state.get("momentum_buffer") is None:
                    state["momentum_buffer"] = torch.zeros_like(parameter)


def sharded_state(optimizer: MegatronOptimizer, model_state: dict[str, Any], *, is_loading: bool) -> dict[str, Any]:
    """megatron-core's sharded description of the optimizer. Collective."""
    create_missing_state(optimizer)
    state = optimizer.sharded_state_dict(model_state, is_loading=is_loading, metadata=dict(METADATA))
    if not is_loading:
        _drop_empty_param_state(state)
    return state


def _drop_empty_param_state(state: Any) -> None:
    """Ranks that have nothing to write say None, which would differ from the common state of rank 0."""
    for inner in (state, *(value for value in state.values() if isinstance(value, dict))):
        if "param_state" in inner and inner["param_state"] is None:
            del inner["param_state"]


def load_state(optimizer: MegatronOptimizer, state: dict[str, Any]) -> None:
    """Load what :func:`sharded_state` described. Learning rate and other knobs stay those of this run."""
    groups = [group for part in parts(optimizer) for group in part.optimizer.param_groups]
    own_knobs = [dict(group) for group in groups]
    for group in (*groups, *_saved_groups(state)):
        for name in _SCHEDULED:
            group.pop(name, None)
    with _steps_put_back(optimizer):
        optimizer.load_state_dict(state)
    create_missing_state(optimizer)
    groups = [group for part in parts(optimizer) for group in part.optimizer.param_groups]
    for group, own in zip(groups, own_knobs, strict=True):
        group.update({name: value for name, value in own.items() if name not in ("params", "step")})
    for part in parts(optimizer):
        for entry in part.optimizer.state.values():
            if isinstance(entry.get("step"), torch.Tensor):
                entry["step"] = entry["step"].clone()


def _saved_groups(state: Any) -> Iterator[dict[str, Any]]:
    """Every parameter group in a loaded state, however deep the optimizers are nested."""
    if not isinstance(state, dict):
        return
    for name, value in state.items():
        if name == "param_groups":
            yield from value
        else:
            yield from _saved_groups(value)


@contextlib.contextmanager
def _steps_put_back(optimizer: MegatronOptimizer) -> Iterator[None]:
    distributed = [part for part in parts(optimizer) if isinstance(part, DistributedOptimizer)]
    for part in distributed:
        part._set_main_param_and_optimizer_states = _setter_with_step(part)
    try:
        yield
    finally:
        for part in distributed:
            del part._set_main_param_and_optimizer_states


def _setter_with_step(part: DistributedOptimizer) -> Any:
    plain = part._set_main_param_and_optimizer_states

    def set_states(model_param: torch.nn.Parameter, tensors: dict[str, torch.Tensor]) -> None:
        group, order = part.model_param_group_index_map[model_param]
        own = part.optimizer.state[part.optimizer.param_groups[group]["params"][order]]
        if "step" in own and "step" not in tensors:
            tensors = {**tensors, "step": own["step"]}
        plain(model_param, tensors)

    return set_states
