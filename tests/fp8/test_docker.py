"""The container's files agree with setup.py and with each other. The image itself is not built here."""

from __future__ import annotations

import ast
import fnmatch
import importlib.util
import re
import shlex
import shutil
import subprocess
from importlib.metadata import requires, version
from pathlib import Path, PurePosixPath
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"
OF_NVIDIA = {"torch", "torchvision", "triton", "pytorch-triton", "transformer-engine", "apex", "flash-attn"}


def instructions() -> list[tuple[str, str]]:
    """Name and rest of each instruction of the Dockerfile, continued lines joined."""
    lines = [line for line in (DOCKER / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    text = "\n".join(lines).replace("\\\n", " ")
    return [
        (word, rest.strip()) for word, _, rest in (line.partition(" ") for line in text.splitlines() if line.strip())
    ]


def all_of(name: str) -> list[str]:
    return [rest for word, rest in instructions() if word == name]


def asked_by_setup() -> dict[str, Requirement]:
    tree = ast.parse((ROOT / "setup.py").read_text())
    found = next(
        keyword.value for node in ast.walk(tree) if isinstance(node, ast.Call) for keyword in node.keywords
        if keyword.arg == "install_requires"
    )  # fmt: skip
    return {needed.name: needed for needed in map(Requirement, ast.literal_eval(found))}


def put_into_the_image() -> dict[str, Requirement]:
    lines = [line for line in (DOCKER / "requirements.txt").read_text().splitlines() if line and line[0] != "#"]
    return {needed.name: needed for needed in map(Requirement, lines)}


def let_through(path: str) -> bool:
    """Whether .dockerignore leaves the path in the build's context: the last pattern that fits decides."""
    kept = True
    parents = [str(parent) for parent in (PurePosixPath(path), *PurePosixPath(path).parents)][:-1]
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = line.removeprefix("!").removeprefix("**/")
        names = [PurePosixPath(parent).name for parent in parents] if "**/" in line else parents
        # A pattern without a slash fits at the top alone.
        if any(fnmatch.fnmatchcase(name, pattern) and ("/" in pattern or "/" not in name) for name in names):
            kept = line.startswith("!")
    return kept


def test_base_is_pinned() -> None:
    base = next(rest for rest in all_of("ARG") if rest.startswith("BASE="))
    assert re.fullmatch(r"BASE=nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3", base)
    assert all_of("FROM") == ["${BASE}"]


def test_copied_files_exist_and_are_in_the_context() -> None:
    for rest in all_of("COPY"):
        *sources, _ = rest.split()
        for source in sources:
            assert (ROOT / source).exists(), source
            assert let_through(source), f"{source} is kept out by .dockerignore"
    assert let_through("megatron_taopd/ops/triton_kernels.py")
    for path in (".git", "build/latest", "tests/conftest.py", ".venv/bin/python", "megatron_taopd/__pycache__/cli.pyc"):
        assert not let_through(path), f"{path} is copied into the image"


def test_requirements_cover_and_obey_setup() -> None:
    asked, put = asked_by_setup(), put_into_the_image()
    assert set(asked) - set(put) == {"torch"}  # NVIDIA's
    assert not set(put) & OF_NVIDIA
    for name, needed in asked.items():
        if name == "torch":
            continue
        pins = [clause.version for clause in put[name].specifier if clause.operator == "=="]
        if pins:
            assert needed.specifier.contains(pins[0]), f"{put[name]} is outside {needed}"
        else:
            assert put[name].specifier == needed.specifier, f"{put[name]} and {needed} differ"


def test_pins_are_not_ahead_of_what_the_tests_run_with() -> None:
    for needed in put_into_the_image().values():
        for clause in needed.specifier:
            if clause.operator == "==" and needed.name != "megatron-core":  # its newest depends on the Python
                assert Version(clause.version) <= Version(version(needed.name)), needed


def test_transformer_engine_fits_megatron_core() -> None:
    """Its range is in the metadata of the release that the tests run with, its version in the Dockerfile's head."""
    stated = re.search(r"Transformer Engine (\d\.\d+);", (DOCKER / "Dockerfile").read_text().replace("\n# ", " "))
    assert stated is not None
    (pin,) = put_into_the_image()["megatron-core"].specifier
    if version("megatron-core") != pin.version:
        pytest.skip(f"megatron-core {version('megatron-core')} is installed and the image has {pin.version}")
    (needed,) = {
        Requirement(line.partition(";")[0]).specifier
        for line in requires("megatron-core") or []
        if line.startswith("transformer-engine")
    }
    assert needed.contains(f"{stated[1]}.0")


def test_the_image_does_not_run_as_root() -> None:
    user = all_of("USER")[-1]
    assert user not in ("root", "0")
    assert any(f'useradd --create-home --uid "${{UID}}" {user}' in run for run in all_of("RUN"))
    last = [word for word, _ in instructions()]
    assert "RUN" not in last[last.index("USER") :]


def test_commands_are_sound_shell() -> None:
    for run in all_of("RUN"):
        subprocess.run(["bash", "-n", "-c", run], check=True)
        for script in re.findall(r"python (\S+\.py)", run):
            assert (ROOT / script).exists()
    if shutil.which("shellcheck"):
        text = '#!/bin/sh\n: "${UID:=1}"\n' + "\n".join(all_of("RUN")) + "\n"
        found = subprocess.run(["shellcheck", "--exclude=SC3028", "-"], input=text, text=True, capture_output=True)
        assert found.returncode == 0, found.stdout
    (start,) = all_of("CMD")
    assert ast.literal_eval(start) == shlex.split("taopd doctor")


@pytest.fixture()
def keep() -> ModuleType:
    spec = importlib.util.spec_from_file_location("keep", DOCKER / "keep.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_the_image_had_is_kept(keep: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "kept.txt"
    assert keep.main("record", str(file)) == 0
    recorded = file.read_text()
    assert f"torch=={version('torch')}\n" in recorded and f"numpy=={version('numpy')}\n" in recorded
    assert keep.main("check", str(file)) == 0
    file.write_text(recorded.replace(f"torch=={version('torch')}", "torch==2.10.0a0+nv26.1"))
    assert keep.main("check", str(file)) == 1
    assert "torch==2.10.0a0+nv26.1" in capsys.readouterr().err
    # A package that was not there must not appear either.
    file.write_text("".join(line for line in recorded.splitlines(True) if not line.startswith("numpy")))
    assert keep.main("check", str(file)) == 1


def test_keeps_all_that_nvidia_built(keep: ModuleType) -> None:
    assert set(keep.KEPT) >= OF_NVIDIA
