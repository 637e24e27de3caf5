"""How ranks say how they ended where torchrun and srun are between them and who started them.

To torchrun every status but 0 is a failure. It then ends its other ranks, and torchrun of other nodes, whose rendezvous
is gone, ends theirs in the middle of their own exit, with a status of its own. So ranks that stopped as asked end with
0, for which all nodes wait, and leave a file. Ranks that refuse leave another: srun's status may be that of a node that
it ended because of them, and would look like a failure that is worth another try.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from megatron_taopd.exit_status import FINISHED, RUN_AGAIN, USER_ERROR

VARIABLE = "TAOPD_RUN_AGAIN_FILE"
"""The file, in the environment of the ranks; each node's first rank makes it."""

REFUSED = ".refused"
"""What the other file's name has at its end; any rank makes it."""


def as_torchrun_is_told(status: int) -> int:
    """The status that a rank ends with, in place of its own."""
    path = os.environ.get(VARIABLE)
    if path is None:
        return status
    if status == USER_ERROR:
        with contextlib.suppress(OSError):  # it may be a full disk that is the error
            Path(path + REFUSED).touch()
    if status != RUN_AGAIN:
        return status
    if os.environ.get("LOCAL_RANK", "0") == "0":
        Path(path).touch()
    return FINISHED
