"""Keep the image's own builds while pip installs: write them as constraints before, compare them afterwards.

python docker/keep.py record FILE
python docker/keep.py check FILE
"""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

# Built by NVIDIA against each other; a wheel from PyPI in the place of one breaks the others.
KEPT = (
    "torch",
    "torchvision",
    "triton",
    "pytorch-triton",
    "transformer-engine",
    "apex",
    "flash-attn",
    "numpy",
)


def installed() -> list[str]:
    """``name==version`` of those that are there."""
    lines = []
    for name in KEPT:
        try:
            lines.append(f"{name}=={version(name)}")
        except PackageNotFoundError:
            continue
    return lines


def main(action: str, path: str) -> int:
    """The exit status."""
    file = Path(path)
    if action == "record":
        file.write_text("\n".join(installed()) + "\n", encoding="utf-8")
        print(f"kept as they are: {', '.join(installed())}")
        return 0
    before, now = file.read_text(encoding="utf-8").split(), installed()
    # "apex" of PyPI is another project: none may appear that was not there.
    changed = sorted(set(before) ^ set(now))
    if changed:
        print(f"pip has changed what the image had: {', '.join(changed)}", file=sys.stderr)
    return 1 if changed else 0


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in ("record", "check"):
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
