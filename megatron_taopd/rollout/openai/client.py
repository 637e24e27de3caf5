"""HTTP requests that are made again when a server is away or busy."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from megatron_taopd.errors import ConfigError, RolloutError
from megatron_taopd.rollout.openai.api import Call, Json

if TYPE_CHECKING:
    import urllib3

FIRST_PAUSE, LONGEST_PAUSE = 0.25, 30.0
"""Seconds ahead of the first request that is made again; of any."""
CONNECT_TIMEOUT = 10.0
BUSY = (429, 502, 503, 504)
"""Statuses that pass."""
_MOVED = "redirections are not followed: give the server's own address"
_HINTS = {
    **dict.fromkeys((301, 302, 303, 307, 308), _MOVED),
    400: "it refuses the request: is its context long enough for prompt and response, and --rollout-api right?",
    401: "the key of --rollout-api-key-env is missing or wrong",
    403: "the key of --rollout-api-key-env is missing or wrong",
    404: "it has no such endpoint: is --rollout-api right? vLLM loads weights only with VLLM_SERVER_DEV_MODE=1 in its "
    "environment",
    422: "it does not know these fields: is --rollout-api right, and the server's version one that "
    "docs/rollout_servers.md names?",
}
_BUSY_HINT = "it is overloaded or still starting: lower --rollout-max-in-flight, or raise --rollout-retries"


def pause_before(attempt: int) -> float:
    """Seconds to wait ahead of the ``attempt``-th repetition (from 1): doubled each time, and a random half less."""
    return min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** (attempt - 1)) * random.uniform(0.5, 1.0)


class HttpClient:
    """Posts JSON to servers and reads JSON; threads may share it. Nothing but these servers is contacted."""

    def __init__(
        self, urls: Sequence[str], *, api_key: str | None, timeout: float, retries: int, connections: int
    ) -> None:
        """Nothing is sent yet.

        Args:
            urls: roots of the servers.
            timeout: seconds without a byte of an answer.
            retries: times that a request is made again.
            connections: kept to each server; further requests wait for one.

        Raises:
            ConfigError: urllib3 is not installed.
        """
        try:
            import urllib3
        except ImportError:
            raise ConfigError(
                '--rollout-engine openai needs urllib3, which is not installed: pip install -e ".[server]"'
            ) from None
        self.urls = list(urls)
        self.timeout = timeout
        self.retries = retries
        self._key = api_key
        self._pools = urllib3.PoolManager(num_pools=len(self.urls), maxsize=connections, block=True)
        self._again = _retry_class()(
            total=retries,
            allowed_methods=None,
            status_forcelist=BUSY,
            raise_on_status=False,
            redirect=False,
        )

    def post(self, server: int, call: Call) -> tuple[Json, int]:
        """The JSON object that a server answers, and how often the request was made again.

        Args:
            server: index of its URL, modulo their number.

        Raises:
            RolloutError: no answer, an error status, or an answer that is no JSON object; names the URL.
        """
        import urllib3

        url = self.urls[server % len(self.urls)] + call.path
        headers = {"Content-Type": "application/json"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        try:
            response = self._pools.request(
                "POST",
                url,
                body=json.dumps(call.body).encode(),
                headers=headers,
                timeout=urllib3.Timeout(connect=CONNECT_TIMEOUT, read=self.timeout),
                retries=self._again,
                redirect=False,
            )
        except urllib3.exceptions.HTTPError as error:
            raise RolloutError(self._why_no_answer(url, error)) from None
        repeated = 0 if response.retries is None else len(response.retries.history)
        if response.status != 200:
            hint = _BUSY_HINT if response.status in BUSY else _HINTS.get(response.status, "its log may say why")
            raise RolloutError(f"{url} answers {response.status} ({self._excerpt(response.data)}); {hint}")
        return self._json(url, response), repeated

    def _json(self, url: str, response: urllib3.BaseHTTPResponse) -> Json:
        if not response.data.strip():
            return {}  # of endpoints that have nothing to say
        try:
            body = json.loads(response.data)
        except ValueError:
            body = None
        if not isinstance(body, dict):
            raise RolloutError(
                f"{url} answers what is no JSON object ({self._excerpt(response.data)}); is that the server's root, "
                "and --rollout-api right?"
            )
        return body

    def _why_no_answer(self, url: str, error: Exception) -> str:
        import urllib3

        reason: Any = getattr(error, "reason", None) or error
        times = f"{self.retries + 1} times" if self.retries else "once"
        if isinstance(reason, urllib3.exceptions.ReadTimeoutError):
            return (
                f"{url} did not answer within {self.timeout:g} s, asked {times}; raise --rollout-timeout, lower "
                "--rollout-max-in-flight, or look at the server's log"
            )
        return (
            f"{url} cannot be reached, tried {times} ({self._excerpt(str(reason).encode())}); is the server running, "
            "and is this address open to this machine?"
        )

    def _excerpt(self, text: bytes) -> str:
        shown = " ".join(text[:400].decode("utf-8", "replace").split())
        return shown if self._key is None else shown.replace(self._key, "***")


def _retry_class() -> type[urllib3.Retry]:
    import urllib3

    class Again(urllib3.Retry):
        """urllib3's, but with a pause ahead of the first repetition as well, and no longer one than ours."""

        def get_backoff_time(self) -> float:
            return pause_before(len(self.history))

        def get_retry_after(self, response: urllib3.BaseHTTPResponse) -> float | None:
            asked = super().get_retry_after(response)
            return None if asked is None else min(asked, LONGEST_PAUSE)

    return Again
