"""Exit statuses of ``taopd``: what a launcher needs to know of a run that has ended."""

FINISHED = 0
"""All that was asked for is done."""

FAILED = 1
"""An error that has no better explanation; Python's own."""

USER_ERROR = 2
"""Refused, or stopped by an error with an explanation: the same command will end in the same way."""

RUN_AGAIN = 75
"""``EX_TEMPFAIL``: stopped early on request, with a checkpoint: the same command goes on from there."""

HUNG = 124
"""A rank made no progress within ``--distributed-timeout-minutes``; as of ``timeout(1)``."""
