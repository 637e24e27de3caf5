"""Host memory for what the device need not hold between two phases of a step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch


class HeldRows:
    """Rows [R, H] held until they are read, on their device or in host memory.

    From a CUDA device they go to pinned memory and come back without blocking: copies and what follows them are
    ordered on the current stream.
    """

    def __init__(self, rows_RH: torch.Tensor, *, on_host: bool = False) -> None:
        self.device = rows_RH.device
        self.on_host = on_host
        self._copied: torch.cuda.Event | None = None
        self._rows = self._to_host(rows_RH) if on_host else rows_RH

    def read(self) -> torch.Tensor:
        """The rows, on their device."""
        return self._rows.to(self.device, non_blocking=True)

    def keep(self, keep_R: torch.Tensor) -> None:
        """Let the other rows go."""
        if self._copied is not None:
            self._copied.synchronize()
        chosen = self._rows[keep_R.to(self._rows.device)]
        self._rows = self._pinned(chosen) if self.on_host else chosen

    def _to_host(self, rows_RH: torch.Tensor) -> torch.Tensor:
        rows = torch.empty(rows_RH.shape, dtype=rows_RH.dtype, pin_memory=rows_RH.is_cuda)
        rows.copy_(rows_RH, non_blocking=True)
        if rows_RH.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record()
        return rows

    def _pinned(self, rows_RH: torch.Tensor) -> torch.Tensor:
        return rows_RH.pin_memory() if self.device.type == "cuda" else rows_RH


class OffloadedWeights:
    """Frozen weights of a module that live in host memory and come to their device for a while.

    Parameters stay the same objects, and so do views of them: their storages are emptied and filled again. Storages
    that several parameters share are moved once. Nothing is copied back: frozen weights do not change.
    """

    def __init__(self, module: torch.nn.Module, *, device: torch.device, stay: Sequence[torch.Tensor] = ()) -> None:
        """Move the weights to host memory.

        Args:
            device: where the parameters are; others are not touched. (It may be the CPU, which only tests use.)
            stay: tensors whose storage remains on the device, such as an LM head that the loss needs.
        """
        staying = {t.untyped_storage().data_ptr() for t in stay}
        storages: dict[int, torch.UntypedStorage] = {}
        for name, parameter in module.named_parameters():
            assert not parameter.requires_grad, f"{name} is trained: only frozen weights can be offloaded"
            storage = parameter.untyped_storage()
            if parameter.device == device and storage.nbytes() and storage.data_ptr() not in staying:
                storages[storage.data_ptr()] = storage
        self.storages = list(storages.values())
        self.sizes = [storage.nbytes() for storage in self.storages]
        self.host = [
            torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda").copy_(_bytes(storage))
            for storage, size in zip(self.storages, self.sizes, strict=True)
        ]
        self._release()

    @property
    def num_bytes(self) -> int:
        """Device memory that is free while the weights are away."""
        return sum(self.sizes)

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """The weights are there inside the block."""
        for storage, size, host in zip(self.storages, self.sizes, self.host, strict=True):
            storage.resize_(size)
            _bytes(storage).copy_(host, non_blocking=True)
        try:
            yield
        finally:
            self._release()

    def _release(self) -> None:
        for storage in self.storages:
            storage.resize_(0)


def _bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
