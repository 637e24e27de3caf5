"""How ranks say that they stopped as asked where torchrun is between them and who started them.

To torchrun every status but 0 is a failure. It then ends its other ranks, and torchrun of other nodes, whose rendezvous
is gone, ends theirs in the middle of their own exit, with a status of its own. So the ranks end with 0, for which all
nodes wait, and leave a file.
"""

from __future__ import annotations

import os
from pathlib import Path

from megatron_taopd.exit_status import FINISHED, RUN_AGAIN

VARIABLE = "TAOPD_RUN_AGAIN_FILE"
"""The file, in the environment of the ranks; each node's first rank makes it."""


def as_torchrun_is_told(status: int) -> int:
    """The status that a rank ends with, in place of its own."""
    path = os.environ.get(VARIABLE)
    if status != RUN_AGAIN or path is None:
        return status
    if os.environ.get("LOCAL_RANK", "0") == "0":
        Path(path).touch()
    return FINISHED
