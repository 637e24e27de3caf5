"""Flags of the servers that answer prompts for ``--rollout-engine openai``."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field, fields
from typing import Annotated, Literal
from urllib.parse import urlsplit

import tyro

from megatron_taopd.errors import ConfigError
from megatron_taopd.rollout.config import RolloutConfig

DEFAULT_MAX_IN_FLIGHT = 256
DEFAULT_TIMEOUT = 600.0
DEFAULT_RETRIES = 6


@dataclass(kw_only=True)
class RolloutServerConfig:
    """Servers that answer prompts (--rollout-engine openai), and how they get the student's weights."""

    rollout_url: Annotated[list[str], tyro.conf.UseAppendAction] = field(default_factory=list)
    """Root of a server, such as http://node7:30000. Several: the flag again for each; the requests are dealt round."""
    rollout_api: Literal["vllm", "sglang"] | None = None
    """What the servers are, as each has endpoints of its own for token ids and for new weights."""
    rollout_api_key_env: str | None = None
    """Environment variable with the key that requests carry as a bearer token (default: none). The key itself is
    never logged."""
    rollout_weights_every: int | None = None
    """Every so many steps the servers load the student's weights; 1 keeps the responses on-policy, 0: they keep what
    they were started with. Needed with --rollout-engine openai."""
    rollout_weights_dir: str | None = None
    """Directory that the servers see under the same path: there the student is written as an HF directory for them,
    and removed when they have loaded the next one."""
    max_staleness: int | None = None
    """Responses of weights that are older than so many steps are thrown away and asked for again (default:
    --rollout-weights-every - 1, which an undisturbed run keeps; with 0 there is no bound)."""
    rollout_max_in_flight: int | None = None
    """Requests that wait for an answer at once, from all data-parallel replicas together (default: 256)."""
    rollout_timeout: float | None = None
    """Seconds that a request may wait for its answer, or for weights to be loaded (default: 600)."""
    rollout_retries: int | None = None
    """A request is made so many times again after a lost connection, a time-out or the status 429, 502, 503 or 504,
    and a response that cannot be used is asked for as often again (default: 6)."""

    def __post_init__(self) -> None:
        self.rollout_url = [_root_of(url) for url in self.rollout_url]
        for url in self.rollout_url:
            if self.rollout_url.count(url) > 1:
                raise ConfigError(f"--rollout-url {url} is given {self.rollout_url.count(url)} times; once is enough")
        for name, least in (("rollout_weights_every", 0), ("max_staleness", 0), ("rollout_retries", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{_flag(name)} {value} must not be negative")
        if self.rollout_max_in_flight is not None and self.rollout_max_in_flight < 1:
            raise ConfigError(f"--rollout-max-in-flight {self.rollout_max_in_flight} must be at least 1")
        if self.rollout_timeout is not None and not self.rollout_timeout > 0:
            raise ConfigError(f"--rollout-timeout {self.rollout_timeout} must be positive")

    @property
    def updates(self) -> bool:
        """Whether the servers get the student's weights."""
        return bool(self.rollout_weights_every)

    @property
    def staleness_bound(self) -> int | None:
        """Steps by which the weights behind a response may be older than the student; None: any number."""
        if self.max_staleness is not None:
            return self.max_staleness
        return self.rollout_weights_every - 1 if self.rollout_weights_every else None

    def api_key(self) -> str | None:
        """The key that requests carry.

        Raises:
            ConfigError: the environment variable is not set.
        """
        if self.rollout_api_key_env is None:
            return None
        key = os.environ.get(self.rollout_api_key_env, "")
        if not key:
            raise ConfigError(
                f"--rollout-api-key-env {self.rollout_api_key_env} names an environment variable that is not set on "
                "this rank; export it where the ranks start"
            )
        return key

    def check_against(self, rollout: RolloutConfig, *, train_iters: int) -> None:
        """Refuse what does not go with the engine, or with itself.

        Raises:
            ConfigError: a flag is missing, contradicts another or has no effect.
        """
        if rollout.rollout_engine != "openai":
            for given in fields(self):
                value = getattr(self, given.name)
                if value not in (None, []):
                    raise ConfigError(
                        f"{_flag(given.name)} {value} has no effect with --rollout-engine {rollout.rollout_engine}, "
                        "which asks no server; drop it or use --rollout-engine openai"
                    )
            return
        if not self.rollout_url:
            raise ConfigError(
                "--rollout-engine openai asks a server; say where it is with --rollout-url http://HOST:PORT"
            )
        if self.rollout_api is None:
            raise ConfigError("--rollout-engine openai needs --rollout-api: vllm or sglang")
        if self.rollout_weights_every is None:
            raise ConfigError(
                "--rollout-engine openai needs --rollout-weights-every: 1 keeps the server's responses on-policy, 0 "
                "leaves it with the weights that it was started with"
            )
        self._check_weights(train_iters)

    def _check_weights(self, train_iters: int) -> None:
        every, bound = self.rollout_weights_every, self.staleness_bound
        assert every is not None
        if every and self.rollout_weights_dir is None:
            raise ConfigError(
                f"--rollout-weights-every {every} writes the student for the servers to load; name a directory that "
                "they see under the same path with --rollout-weights-dir"
            )
        if not every and self.rollout_weights_dir is not None:
            raise ConfigError(
                f"--rollout-weights-dir {self.rollout_weights_dir} has no effect with --rollout-weights-every 0"
            )
        oldest = every - 1 if every else train_iters - 1
        if bound is not None and bound < oldest:
            raise ConfigError(
                f"--max-staleness {bound} cannot be kept: with --rollout-weights-every {every} responses come from "
                f"weights that are up to {oldest} steps old; raise it, or update the weights every {bound + 1} steps"
            )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _root_of(url: str) -> str:
    """The URL without a trailing slash or ``/v1``.

    Raises:
        ConfigError: it is not the root of an HTTP server, or carries a user's name or password.
    """
    parts = urlsplit(url)
    if "@" in parts.netloc:
        raise ConfigError(
            f"--rollout-url for {parts.hostname} carries a name or password, which would be logged; give a key through "
            "--rollout-api-key-env"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ConfigError(f"--rollout-url {url} must be the root of a server, such as http://node7:30000")
    return re.sub(r"(/v1)?/*$", "", url)
