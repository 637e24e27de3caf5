"""``taopd launch slurm``: a batch script from a template, checked before it is submitted."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_taopd import __version__
from megatron_taopd.errors import ConfigError
from megatron_taopd.exit_status import FINISHED
from megatron_taopd.launch import command as commands
from megatron_taopd.launch.command import Command
from megatron_taopd.launch.slurm_config import SlurmConfig

TEMPLATE = Path(__file__).with_name("slurm.sh.j2")


def launch(config: SlurmConfig, words: Sequence[str]) -> int:
    """Write the script and submit it; with ``--dry-run`` the script goes to standard output alone."""
    resources = config.resources
    command = commands.check(words, world_size=resources.world_size, starts_again=config.stopping.max_requeues > 0)
    script = render(config, command)
    name = _job_name(config, command)
    path = job_directory(config, command) / f"{name}.sh"
    submit = ["sbatch", "--parsable", str(path)]
    notes = [
        f"{resources.nodes} nodes x {resources.nproc_per_node} ranks",
        *command.notes,
        f"command: {command.shown()}",
        f"submitted with: {shlex.join(submit)}",
    ]
    for note in notes:
        print(f"> {note}", file=sys.stderr)
    if config.ranks.dry_run:
        print(script, end="", flush=True)
        return FINISHED
    if shutil.which("sbatch") is None:
        raise ConfigError(
            "sbatch is not on this machine's path; run this on a login node, or take the script from --dry-run there"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(script, encoding="utf-8")
    answer = subprocess.run(submit, capture_output=True, text=True)
    if answer.returncode:
        raise ConfigError(f"sbatch refused {path}: {answer.stderr.strip() or answer.stdout.strip()}")
    job = answer.stdout.strip().split(";")[0]
    print(f"> job {job}: what happens to it goes to {path.parent / job}.log, what it does to {job}.attempt-N.log there")
    print(job, flush=True)
    return FINISHED


def render(config: SlurmConfig, command: Command) -> str:
    """The batch script."""
    import jinja2

    engine = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    engine.filters["quote"] = _quoted
    resources = config.resources
    threads = max(1, (resources.cpus_per_task or 1) // resources.nproc_per_node)
    srun_words, container_words = _container(config, command)
    if resources.cpus_per_task is not None:
        srun_words.insert(0, f"--cpus-per-task={resources.cpus_per_task}")  # srun does not take it from sbatch
    return engine.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        version=__version__,
        command=command,
        command_lines=_lines(command.words),
        directives=_directives(config, command),
        job_dir=str(job_directory(config, command)),
        save=None if command.save is None else str(Path(command.save).absolute()),
        max_requeues=config.stopping.max_requeues,
        requeue_on_failure=config.requeue_on_failure,
        nodes=resources.nodes,
        nproc_per_node=resources.nproc_per_node,
        max_restarts=config.max_restarts,
        srun_words=[*srun_words, *config.srun_arg],
        container_words=container_words,
        environment=config.ranks.environment(threads=threads),
        python=config.python or ("python3" if config.container.container else sys.executable),
        setup_script=None if config.setup_script is None else str(Path(config.setup_script).absolute()),
    )


def job_directory(config: SlurmConfig, command: Command) -> Path:
    """Where script and logs go."""
    if config.job_dir is not None:
        return Path(config.job_dir).absolute()
    return Path(command.log_dir or ".").absolute() / "slurm"


def _job_name(config: SlurmConfig, command: Command) -> str:
    return config.resources.job_name or f"taopd-{command.name}"


def _directives(config: SlurmConfig, command: Command) -> list[str]:
    """Options of sbatch, one a line of the script."""
    resources, stopping = config.resources, config.stopping
    gpus = None if resources.gres is not None or not resources.num_gpus else resources.num_gpus
    signal = f"B:USR1@{stopping.signal_before_end}" if command.stops_on_request and stopping.signal_before_end else None
    directory = str(job_directory(config, command))
    options = {
        "job-name": _job_name(config, command),
        "nodes": resources.nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": gpus,
        "gres": resources.gres,
        "cpus-per-task": resources.cpus_per_task,
        "mem": resources.mem,
        "time": resources.time,
        "account": resources.account,
        "partition": resources.partition,
        "qos": resources.qos,
        "constraint": resources.constraint,
        "signal": signal,
        "chdir": str(Path.cwd()),
        "output": directory.replace("%", "%%") + "/%j.log",
    }
    directives = [f"--{name}={shlex.quote(str(value))}" for name, value in options.items() if value is not None]
    directives += ["--exclusive"] if resources.exclusive else []
    directives += ["--open-mode=append", "--requeue" if stopping.max_requeues else "--no-requeue"]
    return directives + [shlex.quote(word) for word in resources.sbatch_arg]


def _container(config: SlurmConfig, command: Command) -> tuple[list[str], list[str]]:
    """Options of srun, and words before the command of a rank."""
    container = config.container
    if container.container is None:
        return [], []
    here, logs = Path.cwd(), job_directory(config, command)
    own = [here] if logs.is_relative_to(here) else [here, logs]
    mounts = [*(f"{directory}:{directory}" for directory in own), *container.container_mounts]
    if container.container == "pyxis":
        return [
            f"--container-image={container.container_image}",
            f"--container-mounts={','.join(mounts)}",
            f"--container-workdir={here}",
            "--no-container-mount-home",
        ], []
    nvidia = ["--nv"] if config.resources.num_gpus or config.resources.gres else []
    binds = [word for mount in mounts for word in ("--bind", mount)]
    return [], ["apptainer", "exec", *nvidia, *binds, "--pwd", str(here), str(container.container_image)]


def _lines(words: Sequence[str]) -> list[str]:
    """Quoted words, a flag with its values on one line."""
    lines: list[str] = []
    for word in words:
        if lines and not word.startswith("--") and lines[-1].startswith("--"):
            lines[-1] += " " + _quoted(word)
        else:
            lines.append(_quoted(word))
    return lines


def _quoted(word: str) -> str:
    """One word of a shell; commas are quoted too, which shellcheck takes for separators in a list."""
    quoted = shlex.quote(word)
    return f"'{word}'" if quoted == word and "," in word else quoted
