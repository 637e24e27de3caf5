"""lm-evaluation-harness, offline: a Hugging Face directory, tasks by name or from YAML, data from files."""

from __future__ import annotations

import difflib
import json
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from megatron_taopd.errors import ConfigError
from megatron_taopd.evaluation.config import HarnessConfig
from megatron_taopd.evaluation.options import json_object

logger = logging.getLogger(__name__)

_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE", "TRANSFORMERS_OFFLINE")


def go_offline() -> None:
    """From here on this process asks no server for models, data or metrics."""
    os.environ.update(dict.fromkeys(_OFFLINE, "1"))
    constants = sys.modules.get("huggingface_hub.constants")
    if constants is not None:  # it has read the environment already
        vars(constants)["HF_HUB_OFFLINE"] = True
    datasets = sys.modules.get("datasets.config")
    if datasets is not None:
        vars(datasets)["HF_HUB_OFFLINE"] = vars(datasets)["HF_DATASETS_OFFLINE"] = True


@contextmanager
def as_hf_directory(source: str, aside: Path) -> Iterator[Path]:
    """An HF directory of a model: its own, or one that is exported into ``aside`` and removed afterwards.

    Raises:
        CheckpointError, ModelError: a Megatron checkpoint that cannot be exported.
    """
    from megatron_taopd.convert.to_hf import convert_to_hf
    from megatron_taopd.models.source import is_megatron_checkpoint

    if not is_megatron_checkpoint(source):
        yield Path(source)
        return
    with tempfile.TemporaryDirectory(prefix=".hf-", dir=aside) as made:
        logger.info("%s is a Megatron checkpoint: exported to a temporary HF directory for the harness", source)
        yield convert_to_hf(source, Path(made) / "model")


class Harness:
    """The tasks, loaded and checked before a model is."""

    def __init__(self, config: HarnessConfig) -> None:
        """Load the tasks and their data.

        Raises:
            ConfigError: lm-evaluation-harness is missing, or a task, its data or its code is not to be had.
        """
        go_offline()
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise ConfigError("--harness needs lm-eval, which is not installed: pip install -e '.[eval]'") from error
        self.config = config
        own = config.harness_tasks_dir
        if own is not None and not Path(own).is_dir():
            raise ConfigError(f"--harness-tasks-dir {own} is no directory")
        # Reading the thousands of tasks that come with it takes a while.
        self.manager = TaskManager(include_path=own, include_defaults=False)
        if not all(name in self.manager.all_tasks or Path(name).is_file() for name in config.harness):
            self.manager = TaskManager(include_path=own)
        with tempfile.TemporaryDirectory() as aside:
            self.tasks = [task for name in config.harness for task in self._load(name, Path(aside))]

    def run(self, directory: Path, *, bf16: bool, chat: bool, system_prompt: str | None, seed: int) -> dict[str, Any]:
        """Evaluate; what lm-evaluation-harness returns.

        Args:
            directory: HF directory of the model.
            bf16: weights and activations in bf16 instead of fp32.
            chat: problems go through the chat template.
            system_prompt: message before them.
            seed: of sampling and of the choice of examples.

        Raises:
            ConfigError: it fails on a setting or on the model.
        """
        import lm_eval

        from megatron_taopd.platform import has_cuda

        config = self.config
        model_args = {"pretrained": str(directory), "dtype": "bfloat16" if bf16 else "float32"}
        generation = json_object("harness_gen_kwargs", config.harness_gen_kwargs)
        try:
            results = lm_eval.simple_evaluate(
                model="hf",
                model_args=model_args | json_object("harness_model_args", config.harness_model_args),
                tasks=self.tasks,
                num_fewshot=config.harness_num_fewshot,
                batch_size=config.harness_batch_size or 1,
                device="cuda" if has_cuda() else "cpu",
                limit=config.harness_limit,
                gen_kwargs=generation or None,
                apply_chat_template=chat,
                system_instruction=system_prompt,
                task_manager=self.manager,
                confirm_run_unsafe_code=config.allow_code_execution,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
        except (ValueError, TypeError, KeyError, OSError) as error:
            raise ConfigError(
                f"--harness {' '.join(config.harness)} failed: {type(error).__name__}: {error}"
            ) from error
        assert results is not None, "one process is the first of all"
        return results

    def _load(self, name: str, aside: Path) -> list[Any]:
        """The tasks that a name stands for."""
        known = self.manager.all_tasks
        if name not in known and not Path(name).is_file():
            near = difflib.get_close_matches(name, known, n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise ConfigError(f"--harness {name!r} is no task of lm-evaluation-harness and no YAML file{hint}")
        file = self.config.data_files().get(name)
        spec = name if file is None else str(self._with_data(name, file, aside))
        try:
            tasks = list(self.manager.load([spec])["tasks"].values())
        except ImportError as error:
            raise ConfigError(f"--harness {name} needs more than lm-eval alone, install that too: {error}") from error
        except Exception as error:  # whatever data sets, YAML and a task's own code run into
            raise ConfigError(
                f"--harness {name} cannot be had: {type(error).__name__}: {error}. Nothing is downloaded; its problems "
                f"can come from a file, --harness-data {name}=FILE.jsonl (docs/evaluation.md)"
            ) from error
        for task in tasks:
            if getattr(task, "UNSAFE_CODE", False) and not self.config.allow_code_execution:
                raise ConfigError(
                    f"--harness {name} runs the code that the model writes; allow it with --allow-code-execution, in a "
                    "container without network and without your files"
                )
            shots = (
                task.config.num_fewshot if self.config.harness_num_fewshot is None else self.config.harness_num_fewshot
            )
            if file is not None and shots:
                raise ConfigError(
                    f"--harness {name} shows {shots} solved examples, and --harness-data has none apart from the "
                    "problems; write a YAML file with a fewshot_split, or give --harness-num-fewshot 0"
                )
        return tasks

    def _with_data(self, name: str, file: str, aside: Path) -> Path:
        """A YAML file in ``aside`` of a task that reads ``file`` in place of its data set."""
        if not Path(file).is_file():
            raise ConfigError(f"--harness-data {name}={file}: there is no such file")
        entry = self.manager.task_index.get(name)
        path = Path(name) if entry is None else entry.yaml_path
        if path is None or (entry is not None and entry.kind.name != "TASK"):
            raise ConfigError(f"--harness-data {name}={file}: {name} is no single task; give its tasks one by one")
        content = {
            "include": str(path.absolute()),
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": str(Path(file).absolute())},
            "test_split": "train",  # what a file without named splits is called
            "validation_split": None,
            "training_split": None,
            "fewshot_split": None,
        }
        made = aside / f"{len(list(aside.iterdir()))}.yaml"
        made.write_text(yaml.safe_dump(content), encoding="utf-8")
        return made


def metrics_of(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Task to metric to value; a metric's filter, where it has one, follows after a comma."""
    return {
        task: {
            metric.removesuffix(",none"): value
            for metric, value in metrics.items()
            if isinstance(value, int | float) and not isinstance(value, bool) and metric != "sample_len"
        }
        | {"problems": results["n-samples"][task]["effective"]}
        for task, metrics in results["results"].items()
        if task in results.get("n-samples", {})
    }


def write_samples(results: dict[str, Any], output: Path) -> None:
    """A file a task with every response and its verdict, as lm-evaluation-harness logs them."""
    for task, samples in results.get("samples", {}).items():
        lines = (json.dumps(sample, ensure_ascii=False, default=str) + "\n" for sample in samples)
        name = "".join(c if c.isalnum() or c in "._-" else "_" for c in task)
        (output / f"harness_{name}.jsonl").write_text("".join(lines), encoding="utf-8")
