"""The commands and their options. Heavy modules are imported by the command that needs them."""

import io
import json
import logging
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand

from ..report.terminal import Terminal
from ..report.text import printable

app = typer.Typer(
    help="Token log-probabilities of an RL model and its base: train one, measure a pair, sample from it, plot it all.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class _Command(TyperCommand):
    """A command whose arguments are Unicode, and whose options are given once, but for those that are lists."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        for text in args:
            # So Python hands over bytes that are no UTF-8, which neither JSON nor safetensors take in a name.
            if any("\ud800" <= character <= "\udfff" for character in text):
                ctx.fail(f"{printable(text)} is not UTF-8, expected text that is.")
        _, _, given = self.make_parser(ctx).parse_args(args=list(args))
        for option, count in Counter(given).items():
            if count > 1 and not option.multiple:
                ctx.fail(f"{option.opts[0]} is given {count} times, expected once.")
        return super().parse_args(ctx, args)


_console = Terminal()
_errors = Terminal(stderr=True)


class Dtype(StrEnum):
    """Of the weights in memory."""

    AUTO = "auto"
    BF16 = "bf16"
    FP16 = "fp16"
    FP32 = "fp32"


_MaxLineSize = Annotated[str, typer.Option(help="Longest line of JSONL in --data; a longer one can not be used.")]
_Dtype = Annotated[
    Dtype, typer.Option(help="Of the weights in memory; auto: of each model's files, so that none is rounded.")
]


class Draft(StrEnum):
    """Who drafts."""

    BASE = "base"
    RL = "rl"


class OnError(StrEnum):
    """What to do with a line of the data that can not be used."""

    RAISE = "raise"
    SKIP = "skip"


@app.command(cls=_Command)
def metrics(
    rl: Annotated[str, typer.Option(help="The RL model: a directory, or a name on the Hub.", show_default=False)],
    base: Annotated[str, typer.Option(help="Its base model, likewise.", show_default=False)],
    data: Annotated[
        Path,
        typer.Option(
            help="JSONL or Parquet with prompt and response, or messages, or prompt_ids and response_ids; optionally "
            "id and source (rl, base: who wrote the response).",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(help="Directory for the data set; a run of the same arguments there goes on.", show_default=False),
    ],
    memory_limit: Annotated[
        str | None, typer.Option(help="Memory beyond the models, such as 4GiB.", show_default="none")
    ] = None,
    batch_tokens: Annotated[int, typer.Option(help="Tokens at once, padding included.")] = 8192,
    dtype: _Dtype = Dtype.AUTO,
    device: Annotated[
        str | None, typer.Option(help="Such as cpu or cuda:1.", show_default="cuda if there is one")
    ] = None,
    sequential: Annotated[
        bool, typer.Option("--sequential", help="One model in memory at a time; the base's hidden states go to disk.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Fail unless --out holds a run to go on with (one goes on without, too).")
    ] = False,
    on_error: Annotated[OnError, typer.Option(help="For a line that can not be used.")] = OnError.RAISE,
    temperature: Annotated[float, typer.Option(help="Divides the logits of both models.")] = 1.0,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the models.")
    ] = False,
    max_line_size: _MaxLineSize = "16MiB",
) -> None:
    """Measure Δlog p, entropies and KLs of a pair of models at every response token.

    Killed and started again with the same arguments, it goes on where it was.
    """
    from ..jobs.metrics import run_metrics
    from .tables import print_metrics

    summary = run_metrics(
        rl,
        base,
        data,
        out,
        memory_limit=memory_limit,
        batch_tokens=batch_tokens,
        dtype=dtype.value,
        device=device,
        sequential=sequential,
        resume=resume,
        on_error=on_error.value,
        temperature=temperature,
        trust_remote_code=trust_remote_code,
        max_line_size=max_line_size,
    )
    print_metrics(_console, summary, out)


_Rl = Annotated[str, typer.Option("--rl", help="The RL model: a directory, or a name on the Hub.", show_default=False)]
_Base = Annotated[str, typer.Option("--base", help="Its base model, likewise.", show_default=False)]
_Problems = Annotated[
    Path,
    typer.Option(
        "--data",
        help="JSONL with prompt (or prompt_ids, or messages), answer, and optionally id.",
        show_default=False,
    ),
]
_Out = Annotated[
    Path,
    typer.Option(
        "--out", help="Directory for the responses; a run of the same arguments there goes on.", show_default=False
    ),
]
_Draft = Annotated[Draft, typer.Option(help="Who draws the token that may be replaced.")]
_GraderName = Annotated[
    str,
    typer.Option(
        "--grader",
        help="exact (final answers: after the last #, or in \\boxed{}), math-verify, or module:function of your own, "
        "called with the response's text and the problem.",
    ),
]
_Temperature = Annotated[float, typer.Option(help="Of the draws; 0 takes the most likely token.")]
_TopK = Annotated[int, typer.Option(help="Draw from so many tokens at most; 0: from all.")]
_TopP = Annotated[float, typer.Option(help="Draw from the most likely tokens of this mass, in (0, 1].")]
_MinP = Annotated[float, typer.Option(help="Least probability, as a share of the largest one, in [0, 1].")]
_Samples = Annotated[int, typer.Option(help="Responses to each problem, under each setting and seed.")]
_MaxNewTokens = Annotated[int, typer.Option(help="Tokens after which a response ends unfinished.")]
_StopTokenId = Annotated[
    list[int] | None,
    typer.Option(help="A token that ends a response; may be repeated.", show_default="those of both models"),
]
_BatchSize = Annotated[int, typer.Option(help="Responses decoded together at most.")]
_ChunkSize = Annotated[
    int | None,
    typer.Option(help="Responses between two writes to the disk.", show_default="4 × --batch-size"),
]
_GraderTimeout = Annotated[
    float, typer.Option(help="Seconds for a response, after which a grader but exact is stopped, and counted.")
]
_Device = Annotated[str | None, typer.Option(help="Such as cpu or cuda:1.", show_default="cuda if there is one")]
_Resume = Annotated[
    bool, typer.Option("--resume", help="Fail unless --out holds a run to go on with (one goes on without, too).")
]
_TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the models.")]


@app.command(cls=_Command)
def generate(
    rl: _Rl,
    base: _Base,
    data: _Problems,
    out: _Out,
    criterion: Annotated[
        str,
        typer.Option(
            help="When a drafted token is replaced: delta_logp (below the threshold); kl, reverse_kl, avg_kl, entropy, "
            "rl_entropy (above it); random, all, none."
        ),
    ] = "delta_logp",
    threshold: Annotated[
        float | None,
        typer.Option(help="τ of the criterion, in nats; of random, a probability.", show_default="none"),
    ] = None,
    gamma: Annotated[float, typer.Option(help="γ ≥ 0: how far to go beyond the RL model; 0 replaces only.")] = 0.0,
    draft: _Draft = Draft.BASE,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    grader: _GraderName = "exact",
    temperature: _Temperature = 1.0,
    top_k: _TopK = 0,
    top_p: _TopP = 1.0,
    min_p: _MinP = 0.0,
    samples: _Samples = 1,
    max_new_tokens: _MaxNewTokens = 1024,
    stop_token_id: _StopTokenId = None,
    batch_size: _BatchSize = 64,
    chunk_size: _ChunkSize = None,
    dtype: _Dtype = Dtype.AUTO,
    device: _Device = None,
    resume: _Resume = False,
    trust_remote_code: _TrustRemoteCode = False,
    grader_timeout: _GraderTimeout = 60.0,
    max_line_size: _MaxLineSize = "16MiB",
) -> None:
    """Draw and grade responses to problems, with tokens replaced by the RL model or by extrapolation beyond it.

    Killed and started again with the same arguments, it goes on where it was.
    """
    from ..jobs.generate import run_generate
    from ..jobs.inputs.records import line_limit
    from ..jobs.settings import Decoding, Setting
    from .tables import print_results

    decoding = Decoding(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        samples=samples,
        max_new_tokens=max_new_tokens,
        stop_token_ids=stop_token_id,
        batch_size=batch_size,
        chunk_size=chunk_size,
        dtype=dtype.value,
        device=device,
        trust_remote_code=trust_remote_code,
        grader_timeout=grader_timeout,
        max_line_size=line_limit(max_line_size),
    )
    setting = Setting(criterion, threshold, gamma, draft.value)
    summary = run_generate(
        rl, base, data, out, setting=setting, seed=seed, decoding=decoding, grader=grader, resume=resume
    )
    print_results(_console, summary, out)


@app.command(cls=_Command)
def sweep(
    rl: _Rl,
    base: _Base,
    data: _Problems,
    out: _Out,
    criterion: Annotated[
        list[str],
        typer.Option(
            help="A criterion with its thresholds, such as delta_logp:-2,-1,-0.5 or kl:0.1 (in nats), random:0.05 (a "
            "probability), all; may be repeated.",
            show_default=False,
        ),
    ],
    gamma: Annotated[str, typer.Option(help="Values of γ ≥ 0, such as 0,0.05,0.1; 0 replaces only.")] = "0",
    draft: _Draft = Draft.BASE,
    seed: Annotated[str, typer.Option(help="Seeds, such as 0,1,2: responses of all are averaged.")] = "0",
    baselines: Annotated[bool, typer.Option(help="Draw from both models alone, too.")] = True,
    grader: _GraderName = "exact",
    temperature: _Temperature = 1.0,
    top_k: _TopK = 0,
    top_p: _TopP = 1.0,
    min_p: _MinP = 0.0,
    samples: _Samples = 1,
    max_new_tokens: _MaxNewTokens = 1024,
    stop_token_id: _StopTokenId = None,
    batch_size: _BatchSize = 64,
    chunk_size: _ChunkSize = None,
    dtype: _Dtype = Dtype.AUTO,
    device: _Device = None,
    resume: _Resume = False,
    trust_remote_code: _TrustRemoteCode = False,
    grader_timeout: _GraderTimeout = 60.0,
    max_line_size: _MaxLineSize = "16MiB",
) -> None:
    """Draw and grade responses under every criterion, threshold, γ and seed; `dlogp plot` draws the curves.

    Killed and started again with the same arguments, it goes on where it was.
    """
    from ..jobs.inputs.records import line_limit
    from ..jobs.settings import Decoding, grid, parse_criteria, parse_numbers
    from ..jobs.sweep import run_sweep
    from .tables import print_results

    decoding = Decoding(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        samples=samples,
        max_new_tokens=max_new_tokens,
        stop_token_ids=stop_token_id,
        batch_size=batch_size,
        chunk_size=chunk_size,
        dtype=dtype.value,
        device=device,
        trust_remote_code=trust_remote_code,
        grader_timeout=grader_timeout,
        max_line_size=line_limit(max_line_size),
    )
    settings = grid(
        parse_criteria(criterion), parse_numbers("--gamma", gamma, float), draft=draft.value, baselines=baselines
    )
    seeds = parse_numbers("--seed", seed, int)
    summary = run_sweep(
        rl, base, data, out, settings=settings, seeds=seeds, decoding=decoding, grader=grader, resume=resume
    )
    print_results(_console, summary, out)


class Reweight(StrEnum):
    """The factor on a token's advantage."""

    LOW_PROB = "low_prob"
    DOMINATE = "dominate"
    PPL = "ppl"
    NONE = "none"


class Sign(StrEnum):
    """Which advantages are reweighted."""

    BOTH = "both"
    POSITIVE = "positive"
    NEGATIVE = "negative"


class TrainingDtype(StrEnum):
    """Of the trained weights."""

    FP32 = "fp32"
    BF16 = "bf16"


@app.command(cls=_Command)
def train(
    base: Annotated[
        str, typer.Option(help="The model to begin with: a directory, or a name on the Hub.", show_default=False)
    ],
    data: _Problems,
    out: Annotated[
        Path, typer.Option(help="Directory for the run; one of the same arguments there goes on.", show_default=False)
    ],
    eval_data: Annotated[
        Path | None, typer.Option(help="Held-out problems, likewise JSONL.", show_default="none")
    ] = None,
    grader: _GraderName = "exact",
    steps: Annotated[int, typer.Option(help="Steps of the optimiser.")] = 100,
    prompts: Annotated[int, typer.Option(help="Problems in a batch of responses.")] = 16,
    samples: Annotated[int, typer.Option(help="Responses to each of them.")] = 16,
    minibatches: Annotated[int, typer.Option(help="Steps in which a batch of responses is spent.")] = 2,
    micro_batch_size: Annotated[
        int | None, typer.Option(help="Responses in memory at once while learning.", show_default="those of a step")
    ] = None,
    max_new_tokens: _MaxNewTokens = 1024,
    learning_rate: Annotated[float, typer.Option(help="After the warm-up; constant.")] = 1e-6,
    warmup_steps: Annotated[int, typer.Option(help="Steps in which the learning rate grows.")] = 10,
    reweight: Annotated[
        Reweight,
        typer.Option(
            help="low_prob: 1 + α (1 − p); dominate: α p + 1 − α; ppl: 1 − α · the response's log-perplexity within "
            "its group; none."
        ),
    ] = Reweight.LOW_PROB,
    alpha: Annotated[float, typer.Option(help="α of the reweighting.")] = 0.1,
    reweight_sign: Annotated[Sign, typer.Option(help="Which advantages are reweighted.")] = Sign.BOTH,
    clip_low: Annotated[float, typer.Option(help="The ratio is clipped at 1 − this,")] = 0.2,
    clip_high: Annotated[float, typer.Option(help="and at 1 + this.")] = 0.28,
    dual_clip: Annotated[float, typer.Option(help="Bound of the ratio where the advantage is negative.")] = 10.0,
    kl_beta: Annotated[float, typer.Option(help="Of the divergence to the base model; 0 for none.")] = 0.0,
    dynamic_sampling: Annotated[
        bool, typer.Option(help="Drop problems whose responses are all worth the same, and draw others.")
    ] = True,
    overlong_buffer: Annotated[
        int, typer.Option(help="Tokens before --max-new-tokens in which a penalty grows to 1; 0 for none.")
    ] = 0,
    temperature: Annotated[float, typer.Option(help="Of the draws and of the policy.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the order of problems and of the draws.")] = 0,
    eval_every: Annotated[int, typer.Option(help="Steps between measurements on --eval-data.")] = 10,
    eval_samples: Annotated[int, typer.Option(help="Responses to each held-out problem.")] = 1,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints, which a kill can cost.")] = 10,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, more time.")
    ] = False,
    dtype: Annotated[TrainingDtype, typer.Option(help="Of the weights in memory.")] = TrainingDtype.FP32,
    device: _Device = None,
    resume: _Resume = False,
    trust_remote_code: _TrustRemoteCode = False,
    grader_timeout: _GraderTimeout = 60.0,
    max_line_size: _MaxLineSize = "16MiB",
) -> None:
    """Train a model on graded problems: DAPO with reweighted advantages; writes a checkpoint and a log.

    Killed and started again with the same arguments, it goes on from its last checkpoint.
    """
    from ..jobs.inputs.records import line_limit
    from ..jobs.train import MODEL_DIRECTORY, run_train
    from ..jobs.training import Training
    from .tables import print_training

    training = Training(
        steps=steps,
        prompts=prompts,
        samples=samples,
        minibatches=minibatches,
        micro_batch_size=micro_batch_size,
        max_new_tokens=max_new_tokens,
        learning_rate=learning_rate,
        warmup_steps=warmup_steps,
        reweight=reweight.value,
        alpha=alpha,
        reweight_sign=reweight_sign.value,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        kl_beta=kl_beta,
        dynamic_sampling=dynamic_sampling,
        overlong_buffer=overlong_buffer,
        temperature=temperature,
        seed=seed,
        eval_every=eval_every,
        eval_samples=eval_samples,
        save_every=save_every,
        gradient_checkpointing=gradient_checkpointing,
        dtype=dtype.value,
        device=device,
        trust_remote_code=trust_remote_code,
        grader_timeout=grader_timeout,
        max_line_size=line_limit(max_line_size),
    )
    summary = run_train(base, data, out, training=training, grader=grader, eval_data=eval_data, resume=resume)
    print_training(_console, summary, out / MODEL_DIRECTORY)


@app.command(cls=_Command)
def plot(
    directories: Annotated[
        list[Path],
        typer.Argument(
            metavar="DIR…",
            help="What `dlogp metrics`, `generate`, `sweep` or `train` wrote; several of `train` are overlaid.",
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="Directory for the files.", show_default="figures in the first DIR")
    ] = None,
    min_count: Annotated[
        int | None,
        typer.Option(help="Leave rarer tokens out of the table.", show_default="10, of replaced tokens 1"),
    ] = None,
) -> None:
    """Draw what a run found.

    Of `dlogp metrics`: histograms of entropy, KL and Δlog p, and the tokens that RL raised most. Of `dlogp sweep`:
    accuracy over the replaced share, extrapolation against replacement, a map over τ and γ, and the tokens replaced
    most often, also as a page of HTML. Of `dlogp train`: accuracy, entropy and response length over steps; runs that
    differ in their seed alone are one line, their mean with a band of one standard error.
    """
    from .plotting import plot_any

    plot_any(_console, directories, out, min_count)


@app.command(cls=_Command)
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show versions, devices, and which backend serves each op here, and why not another."""
    from ..jobs.doctor import examine
    from .tables import print_report

    report = examine()
    if as_json:
        typer.echo(json.dumps(report.to_json(), indent=2))
    else:
        print_report(_console, report)


@app.command(cls=_Command)
def demo(
    out: Annotated[Path, typer.Option(help="Directory for responses, data set and figures.")] = Path("demo_output"),
    problems: Annotated[int | None, typer.Option(help="Held-out problems for each model.", show_default="1000")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer problems and tokens: half a minute.")] = False,
    retrain: Annotated[
        bool, typer.Option("--retrain", help="Train the pair anew into OUT/pair first (minutes) and use that.")
    ] = False,
    curves: Annotated[
        bool,
        typer.Option(
            "--curves", help="Instead, draw accuracy over the replaced share, and extrapolation: minutes, resumable."
        ),
    ] = False,
) -> None:
    """Show the method on a tiny trained pair that comes with the package, and the memory it takes at full size."""
    if curves:
        from ..demo.curves import run_curves

        run_curves(out, num_problems=problems, quick=quick, retrain=retrain, console=_console)
        return
    from ..demo.run import run_demo

    run_demo(out, num_problems=problems, quick=quick, retrain=retrain, console=_console)


@contextmanager
def _readable() -> Iterator[None]:
    """Within this context warnings and logs go through `_errors`' eyes, and no character is too much for the terminal.

    A warning for users is one line, without the place in the code.
    """
    record = logging.getLogRecordFactory()
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning  # type: ignore[assignment]
        logging.setLogRecordFactory(_PrintableRecord)
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        try:
            yield
        finally:
            logging.setLogRecordFactory(record)


def _show_warning(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any) -> None:
    shown = f"warning: {message}"
    if category is not UserWarning:
        shown = warnings.formatwarning(message, category, filename, lineno).rstrip()
    _errors.print(shown, style="yellow")


class _PrintableRecord(logging.LogRecord):
    """Of libraries, which quote what files say."""

    def getMessage(self) -> str:
        return printable(super().getMessage())


def _show_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    _errors.print("".join(traceback.format_exception(kind, error, trace)).rstrip())


def run() -> None:
    """Run the command of `sys.argv`; errors that a user can do something about are one message and status 1."""
    from ..jobs.errors import JobError
    from ..report.errors import DatasetError

    with _readable():
        try:
            app()
        except (JobError, DatasetError) as error:
            _fail(str(error))
        except OSError as error:
            _fail(": ".join(str(part) for part in (error.filename, error.strerror or error) if part))
        except MemoryError:
            _fail("the memory is full: give a smaller --batch-tokens or --batch-size")
        except Exception:
            # A fault of ours: Python shows where, by the hook, which typer has set to another one.
            sys.excepthook = _show_traceback
            raise


def _fail(message: str) -> NoReturn:
    _errors.print(f"error: {message}", style="red")
    sys.exit(1)
