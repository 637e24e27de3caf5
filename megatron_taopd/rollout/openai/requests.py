"""Requests of one process, in threads: as many at once as allowed, each until its response can be used."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Generic, NamedTuple, TypeVar

from megatron_taopd.errors import RolloutError
from megatron_taopd.rollout.openai.api import MalformedAnswerError, Sampling, ServerAnswer, ServerApi
from megatron_taopd.rollout.openai.client import HttpClient, pause_before

Result = TypeVar("Result")


class Question(NamedTuple):
    """A prompt that is to be answered once."""

    place: int
    """In the batch of this process."""
    prompt: Sequence[int]
    server: int
    """Which one is asked first."""
    seeds: Sequence[int]
    """Of the first request, and of each that is made because a response could not be used."""


@dataclass(kw_only=True)
class Counts:
    """What a batch cost beside its answers."""

    repeated: int = 0
    """Requests made again after a lost connection, a time-out or a busy server."""
    dropped: int = 0
    """Responses that could not be used."""


class Batch(Generic[Result]):
    """Work under way in other threads; one thread waits for it."""

    def __init__(self, size: int) -> None:
        self.results: dict[int, Result] = {}
        self.counts = Counts()
        self.given_up = threading.Event()
        self._missing = size
        self._done: queue.SimpleQueue[tuple[int, Result | Exception, Counts]] = queue.SimpleQueue()

    def wait(self, seconds: float) -> bool:
        """Wait for results; whether all are there.

        Raises:
            Exception: what a piece of work has raised. No further pieces are begun.
        """
        until = time.monotonic() + seconds
        while self._missing:
            try:
                place, result, counts = self._done.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                return False
            if isinstance(result, Exception):
                self.given_up.set()
                raise result
            self.results[place] = result
            self.counts.repeated += counts.repeated
            self.counts.dropped += counts.dropped
            self._missing -= 1
        return True

    def do(self, place: int, work: Callable[[Counts], Result]) -> None:
        """In any thread: a piece of work, whose failure is for the thread that waits."""
        counts = Counts()
        try:
            self._done.put((place, work(counts), counts))
        except Exception as error:
            self._done.put((place, error, counts))


def in_threads(works: Sequence[Callable[[Counts], Result]]) -> Batch[Result]:
    """All at once, each in a thread that ends with the process."""
    batch: Batch[Result] = Batch(len(works))
    for place, work in enumerate(works):
        threading.Thread(target=batch.do, args=(place, work), daemon=True).start()
    return batch


class Requests:
    """Threads that ask servers. They end with the process, also where one waits for an answer."""

    def __init__(
        self,
        client: HttpClient,
        api: ServerApi,
        sampling: Sampling,
        *,
        at_once: int,
        why_unusable: Callable[[ServerAnswer], str | None],
    ) -> None:
        """Start no thread yet.

        Args:
            at_once: most requests that wait for an answer.
            why_unusable: says what is wrong with a response that another one might not have; called in any thread.
        """
        self.client = client
        self.api = api
        self.sampling = sampling
        self.why_unusable = why_unusable
        self.at_once = at_once
        self._threads: list[threading.Thread] = []
        self._work: queue.SimpleQueue[tuple[Question, Batch[ServerAnswer]]] = queue.SimpleQueue()

    def begin(self, questions: Sequence[Question]) -> Batch[ServerAnswer]:
        """Ask them all, in order."""
        batch: Batch[ServerAnswer] = Batch(len(questions))
        for question in questions:
            self._work.put((question, batch))
        while len(self._threads) < min(self.at_once, len(questions)):
            thread = threading.Thread(target=self._serve, name="rollout-request", daemon=True)
            thread.start()
            self._threads.append(thread)
        return batch

    def _serve(self) -> None:
        while True:
            question, batch = self._work.get()
            if batch.given_up.is_set():
                continue
            batch.do(question.place, partial(self._ask, question, batch))

    def _ask(self, question: Question, batch: Batch[ServerAnswer], counts: Counts) -> ServerAnswer:
        why = ""
        for attempt, seed in enumerate(question.seeds):
            if attempt:
                counts.dropped += 1
                batch.given_up.wait(pause_before(attempt))
            server = question.server + attempt  # another one, where there are several
            call = self.api.generate(question.prompt, self.sampling, seed)
            body, repeated = self.client.post(server, call)
            counts.repeated += repeated
            url = self.client.urls[server % len(self.client.urls)] + call.path
            try:
                answer = self.api.read_answer(body, question.prompt)
            except MalformedAnswerError as error:
                raise RolloutError(
                    f"{url} answers what cannot be read: {error}. Is --rollout-api right, and the server's version one "
                    "that docs/rollout_servers.md names?"
                ) from None
            unusable = self.why_unusable(answer)
            if unusable is None:
                return answer
            why = f"{url}: {unusable}"
        raise RolloutError(f"{why} ({len(question.seeds)} responses thrown away, the last for this)")
