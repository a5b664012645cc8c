"""Reinforcement learning from a file of problems and a grader; resumable, with a log to plot."""

import importlib.util
import math
import os
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tqdm import tqdm
from transformers.integrations import TensorBoardCallback
from transformers.trainer_utils import get_last_checkpoint

from ..report.files import sync, sync_tree, temporary_path, write_atomically
from ..report.ledger import Ledger
from ..report.responses import Setting, collect
from ..report.training import CSV_FILE, LOG_FILE, read_log, to_csv, to_entry, to_line
from ..trl import ReweightedGRPOConfig, ReweightedGRPOTrainer, report_to
from .drawing import Chunk, Drawing
from .errors import JobError
from .graders import EXACT, Grader, load_grader
from .inputs.models import ModelPlace, check_device, find_model, read_pair, warn_of_rounded_start
from .inputs.problems import Problem, check_problems, read_problems
from .options import Decoding, Training, check_training
from .progress import bar, say
from .resume.fingerprint import Fingerprints, versions
from .resume.response_file import PieceFile
from .resume.run_directory import RunDirectory

MODEL_DIRECTORY = "model"
_TRAINER_DIRECTORY, _TENSORBOARD_DIRECTORY = "trainer", "tensorboard"
_KEPT_CHECKPOINTS = 2
_ADAM_BETA2 = 0.95


def run_train(
    base: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    training: Training | None = None,
    grader: str = EXACT,
    eval_data: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Train a model to solve the problems of `data` and write it to the directory `out`.

    Args:
        base: directory of the model to begin with, or its name on the Hub; safetensors only.
        data: a JSONL file; its columns are described in `jobs.inputs.problems`.
        out: receives `model/` (the RL checkpoint with its tokenizer), `log.jsonl` and `log.csv` (`report.training`),
            `tensorboard/` where that package is installed, `manifest.json` and `summary.json`. Where it holds a run of
            the same arguments, data and model, that run goes on from its last checkpoint, or nothing is done if it is
            complete; a run of others is an error, and stays as it is. With `training.lora` `model/` is an adapter,
            which commands take as a model while `base` stays where it is; it is there from the start, and at each
            checkpoint its weights are replaced at once by the newest.
        training: steps, batches, learning rate, loss, lengths, device.
        grader: `exact`, `math-verify` or `module:function`, see `jobs.graders`; its score is the reward. Responses at
            which it raises, ends its process or takes longer than `training.grader_timeout` teach nothing, and are
            counted; the first reason is told as a UserWarning.
        eval_data: held-out problems, whose accuracy is measured before the first step, every so many steps and at the
            end; None for none.
        resume: insist that `out` holds a run to go on with; without it a new run may begin.
        progress: show progress on stderr.

    Returns:
        What `summary.json` holds.

    Raises:
        JobError: an argument, the data, a model or the directory can not be used, or the disk is full.
    """
    training = training or Training()
    check_training(training)
    device = check_device(training.device)
    training = replace(training, device=device)
    loaded_grader = load_grader(grader, timeout=training.grader_timeout)
    place = find_model("--base", base, trust_remote_code=training.trust_remote_code)
    if place.base is not None:
        raise JobError(f"{place}: it is an adapter, expected a whole model: merge it into its own first")
    files = {"--data": Path(data)} if eval_data is None else {"--data": Path(data), "--eval-data": Path(eval_data)}
    for option, file in files.items():
        check_problems(option, file)
    fingerprints = Fingerprints(out, progress=progress)
    identity: dict[str, Any] = {
        "command": "train",
        "training": asdict(training),
        "grader": dict(loaded_grader.identity),
        "data": fingerprints.file(files["--data"]),
        "eval_data": None if eval_data is None else fingerprints.file(files["--eval-data"]),
        "base": fingerprints.model(place),
        "versions": versions(device, "policy_loss_fwd") | {"trl": version("trl")},
    }
    directory = RunDirectory(out, identity, fingerprints.stamps)
    with directory.claimed(resume=resume, mends=False) as finished:
        if finished is not None:
            return finished
        reading = read_pair(place, place)
        problems = [
            read_problems(
                file,
                reading,
                max_new_tokens=training.max_new_tokens,
                needs_answer=loaded_grader.needs_answer,
                max_line_bytes=training.max_line_size,
                option=option,
            )
            for option, file in files.items()
        ]
        if len(problems[0]) < training.prompts:
            raise JobError(
                f"--prompts is {training.prompts}, expected at most {len(problems[0])}, the problems there are"
            )
        warn_of_rounded_start(place, training.dtype)
        model = fingerprints.load(place, training.dtype, torch.device(device))
        run = _Run(directory, training, loaded_grader, reading.tokenizer, problems, place, model, progress)
        with directory.writing():
            run.train()
        names = {"base": str(base), "data": str(data), "eval_data": eval_data and str(eval_data), "grader": grader}
        return directory.finish(run.summary(), {**names, **identity["training"]})


@dataclass
class _Run:
    """The training of a run whose problems, those to learn from and held-out ones, are read."""

    directory: RunDirectory
    training: Training
    grader: Grader
    tokenizer: Any
    problems: Sequence[Sequence[Problem]]
    place: ModelPlace
    model: Any
    progress: bool

    def __post_init__(self) -> None:
        self._trainer_directory = self.directory.work / _TRAINER_DIRECTORY
        self._log = _Log(self.directory.out, self.directory.ledger)
        self._grader_errors = 0
        self._told = False

    def train(self) -> None:
        """Take the steps that are missing, and write the model."""
        self.directory.begin()
        checkpoints = self._whole_checkpoints()
        first = max(checkpoints, default=0)
        self._log.restart(checkpoints.get(first))
        trainer = self._trainer()
        events = self.directory.out / _TENSORBOARD_DIRECTORY
        self.directory.start_lap()
        if first == 0:
            self._log.add({"step": 0} | self._evaluate())
        if self.training.lora is not None:
            self._write_adapter(trainer.model)
        with bar(total=self.training.steps, initial=first, unit=" steps", enabled=self.progress) as shown:
            show = partial(_show, shown, {})
            report_to(trainer, lambda step, metrics: self._on_step(step, metrics, show), lambda: self._on_save(trainer))
            if first < self.training.steps:
                if importlib.util.find_spec("tensorboard") is not None:
                    from torch.utils.tensorboard import SummaryWriter

                    trainer.add_callback(TensorBoardCallback(SummaryWriter(events)))
                trainer.train(resume_from_checkpoint=str(checkpoints[first]) if first else None)
            else:
                # From the checkpoint of the last step the trainer would take one step more.
                trainer._load_from_checkpoint(str(checkpoints[first]))
        self.directory.save_lap()
        self._log.write_csv()
        if self.training.lora is None:
            self._write_model(self.directory.out / MODEL_DIRECTORY)
        else:
            self._write_adapter(trainer.model)
        # What TensorBoard's writer did in this process and in those before it.
        self.directory.ledger.record_files(_files_below(events))

    def _trainer(self) -> ReweightedGRPOTrainer:
        examples = [{"prompt": problem.prompt_ids, "number": problem.number} for problem in self.problems[0]]
        arguments = (self.model, self.grade, self._config(), Dataset.from_list(examples))
        if self.training.lora is None:
            return ReweightedGRPOTrainer(*arguments, processing_class=self.tokenizer)
        from peft import LoraConfig

        rank, targets = self.training.lora, self.training.lora_targets
        layers = "all-linear" if targets is None else [name.strip() for name in targets.split(",")]
        lora = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=layers, task_type="CAUSAL_LM")
        try:
            trainer = ReweightedGRPOTrainer(*arguments, processing_class=self.tokenizer, peft_config=lora)
        except (TypeError, ValueError) as error:
            raise JobError(f"--lora-targets is {targets!r}, which can not be trained: {error}") from error
        # By this the adapter finds its model.
        local = Path(self.place.name).exists()
        name = str(self.place.directory.resolve()) if local else self.place.name
        trainer.model.peft_config["default"].base_model_name_or_path = name
        return trainer

    def _whole_checkpoints(self) -> dict[int, Path]:
        """By step, those that are as they were written; others, which a kill may have left, are removed."""
        found = {}
        for path in filter(Path.is_dir, self._trainer_directory.glob("*")):
            if self.directory.ledger.holds_tree(path):
                found[int(path.name.rpartition("-")[2])] = path
                continue
            if self.directory.ledger.known_below(path):
                warnings.warn(f"{path} is damaged: its steps are taken again", stacklevel=2)
            shutil.rmtree(path)
        return found

    def _write_model(self, target: Path) -> None:
        self.model.config.use_cache = True
        temporary = temporary_path(target)
        self.model.save_pretrained(temporary)
        self.tokenizer.save_pretrained(temporary)
        sync_tree(temporary)
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
        sync(target.parent)
        self.directory.ledger.record_files(_files_below(target))

    def _write_adapter(self, model: Any) -> None:
        """Each file takes the place of its predecessor at once; all but the weights are the same every time."""
        target = self.directory.out / MODEL_DIRECTORY
        temporary = temporary_path(target)
        model.save_pretrained(temporary)
        self.tokenizer.save_pretrained(temporary)
        # A form that nobody filled in.
        (temporary / "README.md").unlink(missing_ok=True)
        sync_tree(temporary)
        if not target.exists():
            temporary.rename(target)
        else:
            for path in temporary.iterdir():
                os.replace(path, target / path.name)
            temporary.rmdir()
            sync(target)
        sync(target.parent)
        self.directory.ledger.record_files(_files_below(target))

    def summary(self) -> dict[str, Any]:
        """What the log says of the first and the last measurements."""
        entries = self._log.entries
        result: dict[str, Any] = {"steps": self.training.steps}
        for name in ("accuracy", "eval_accuracy", "eval_accuracy_standard_error", "entropy", "length"):
            values = [entry[name] for entry in entries if name in entry]
            if values:
                result[f"first_{name}"], result[f"last_{name}"] = values[0], values[-1]
        return result | {"grader_errors": sum(entry.get("grader_errors", 0) for entry in entries)}

    def _config(self) -> ReweightedGRPOConfig:
        training = self.training
        return ReweightedGRPOConfig(
            output_dir=str(self._trainer_directory),
            max_steps=training.steps,
            per_device_train_batch_size=training.rows,
            gradient_accumulation_steps=training.responses_per_step // training.rows,
            generation_batch_size=training.responses,
            num_generations=training.samples,
            max_completion_length=training.max_new_tokens,
            temperature=training.temperature,
            learning_rate=training.learning_rate,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=training.warmup_steps,
            adam_beta2=_ADAM_BETA2,
            weight_decay=0.0,
            max_grad_norm=1.0,
            loss_type="dapo",
            epsilon=training.clip_low,
            epsilon_high=training.clip_high,
            dual_clip=training.dual_clip,
            beta=training.kl_beta,
            reweight=training.reweight,
            reweight_alpha=training.alpha,
            reweight_sign=training.reweight_sign,
            dynamic_sampling=training.dynamic_sampling,
            overlong_buffer=training.overlong_buffer,
            rollout_seed=training.seed,
            seed=training.seed,
            gradient_checkpointing=training.gradient_checkpointing,
            bf16=False,
            use_cpu=self.model.device.type == "cpu",
            dataloader_pin_memory=self.model.device.type != "cpu",
            save_strategy="steps",
            save_steps=training.save_every,
            save_total_limit=_KEPT_CHECKPOINTS,
            logging_strategy="steps",
            logging_steps=1,
            report_to=[],
            disable_tqdm=True,
        )

    def grade(self, completion_ids: Sequence[list[int]], number: Sequence[int], **_: Any) -> list[float | None]:
        """The reward, as the trainer asks for it and names it in its log."""
        scores = []
        for ids, place in zip(completion_ids, number, strict=True):
            problem = self.problems[0][place]
            result = self.grader(self.tokenizer.decode(ids, skip_special_tokens=True), problem.columns)
            self._grader_errors += result.error is not None
            self._tell_once(problem.problem_id, result.error)
            scores.append(result.score)
        return scores

    def _tell_once(self, problem_id: str, error: str | None) -> None:
        if error is not None and not self._told:
            self._told = True
            warnings.warn(
                f"the grader gave no score to a response to the problem {problem_id}: {error}; such responses teach "
                "nothing, and are counted in the log",
                stacklevel=2,
            )

    def _on_step(self, step: int, metrics: Mapping[str, Any], show: Callable[[Mapping[str, Any]], None]) -> None:
        entry = to_entry(step, metrics)
        for name, value in entry.items():
            if not math.isfinite(value):
                raise JobError(
                    f"step {step}: {name} is {value}, expected a finite number: the training has diverged; give a "
                    "smaller --learning-rate, with another --out"
                )
        if self._grader_errors:
            entry["grader_errors"], self._grader_errors = self._grader_errors, 0
        if step == self.training.steps or step % self.training.eval_every == 0:
            entry |= self._evaluate()
        self._log.add(entry)
        show(entry)

    def _on_save(self, trainer: ReweightedGRPOTrainer) -> None:
        self.directory.save_lap()
        self._log.write_csv()
        newest = Path(get_last_checkpoint(self._trainer_directory))
        self._log.copy_into(newest)
        sync_tree(newest)
        self.directory.ledger.record_files(_files_below(newest))
        if self.training.lora is not None:
            self._write_adapter(trainer.model)

    def _evaluate(self) -> dict[str, Any]:
        """What the model makes of the held-out problems, if there are any; always with the same noise."""
        held_out = self.problems[1] if len(self.problems) > 1 else []
        if not held_out:
            return {}
        decoding = Decoding(
            samples=self.training.eval_samples,
            max_new_tokens=self.training.max_new_tokens,
            batch_size=self.training.responses,
        )
        draw, alone = Drawing(self.grader, self.tokenizer, decoding, self.model.device), Setting("none", draft="rl")
        responses = draw((self.model, self.model), Chunk(alone, self.training.seed, held_out))
        for response in responses:
            self._tell_once(response.problem_id, response.error)
        found = collect(responses).result(alone).to_json()
        entry = {"eval_length": found["mean_length"]}
        entry |= {f"eval_{name}": found[name] for name in ("accuracy", "accuracy_standard_error")}
        return {name: value for name, value in entry.items() if value is not None}


def _files_below(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


class _Log:
    """The files of the log, and what is in them."""

    def __init__(self, out: Path, ledger: Ledger) -> None:
        self.entries: list[dict[str, Any]] = []
        self._csv_path = out / CSV_FILE
        self._file = PieceFile(out / LOG_FILE, ledger)
        self._ledger = ledger

    def restart(self, checkpoint: Path | None) -> None:
        """Go on with the log of the checkpoint from which the training goes on; from nothing if there is none."""
        self.entries = [] if checkpoint is None else list(read_log(checkpoint / LOG_FILE))
        self._file.restart(self._lines())

    def copy_into(self, checkpoint: Path) -> None:
        """Keep with a checkpoint what was logged up to it."""
        (checkpoint / LOG_FILE).write_bytes(self._lines())

    def _lines(self) -> bytes:
        return b"".join(map(to_line, self.entries))

    def add(self, entry: dict[str, Any]) -> None:
        self.entries.append(entry)
        self._file.add(to_line(entry))

    def write_csv(self) -> None:
        """Write the same as CSV."""
        write_atomically(self._csv_path, to_csv(self.entries))
        self._ledger.record_files([self._csv_path])


#: What is behind the bar, by the name in the log.
_SHOWN = {"loss": "loss", "accuracy": "accuracy", "eval_accuracy": "held out", "length": "length"}


def _show(shown: tqdm, last: dict[str, str], entry: Mapping[str, Any]) -> None:
    """A step was taken; `last` is what was behind the bar before."""
    for name, title in _SHOWN.items():
        if name in entry:
            last[title] = f"{entry[name]:.3g}" if name == "loss" else f"{entry[name]:.3f}".rstrip("0").rstrip(".")
    say(shown, ", ".join(f"{title} {text}" for title, text in last.items()), 1)
