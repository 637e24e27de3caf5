"""Flags of checkpoints and of an early end. A field's docstring is its ``--help`` text."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_taopd.errors import ConfigError


@dataclass(kw_only=True)
class CheckpointConfig:
    """What is kept, and when a run ends before its last iteration."""

    save: str | None = None
    """Directory for Megatron checkpoints (torch_dist). With it, SIGTERM and SIGUSR1 stop the run after the current
    iteration with a checkpoint and exit status 75: the same command goes on."""
    save_interval: int | None = None
    """Checkpoint every so many iterations (default: at the end only)."""
    async_save: bool = False
    """A process a rank writes the checkpoints of --save-interval while training goes on; it holds this rank's state in
    host memory once more."""
    keep_last_checkpoints: int | None = None
    """Delete older checkpoints beyond so many (default: keep all). While one is written there is one more."""
    load: str | None = None
    """Resume from the newest whole checkpoint of this directory; with the same directory as --save, an empty one starts
    a new run."""
    exit_interval: int | None = None
    """Stop with a checkpoint and exit status 75 after an iteration that this number divides."""
    exit_duration_in_mins: float | None = None
    """Stop with a checkpoint and exit status 75 after the iteration that ends so many minutes after the start."""
    export_hf: str | None = None
    """Write the trained student as an HF directory at the end."""

    def __post_init__(self) -> None:
        needing_save = {
            "--save-interval": self.save_interval,
            "--keep-last-checkpoints": self.keep_last_checkpoints,
            "--exit-interval": self.exit_interval,
            "--exit-duration-in-mins": self.exit_duration_in_mins,
        }
        for flag, value in needing_save.items():
            if value is not None and self.save is None:
                raise ConfigError(f"{flag} {value} has no effect without --save; name a directory")
        for flag in ("--save-interval", "--keep-last-checkpoints", "--exit-interval"):
            value = needing_save[flag]
            if value is not None and value < 1:
                raise ConfigError(f"{flag} {value} must be at least 1")
        if self.exit_duration_in_mins is not None and not self.exit_duration_in_mins > 0:
            raise ConfigError(f"--exit-duration-in-mins {self.exit_duration_in_mins} must be positive")
        if self.async_save and self.save_interval is None:
            raise ConfigError(
                "--async-save has no effect without --save-interval: beside the checkpoint at the end nothing goes on; "
                "set that too or drop this"
            )
