"""What the recipes of Table 2 share: settings, their checks, and how arms are compared.

A recipe gives its data and how a model scores on them (`task.Task`), `compare` does the rest. Training leaves an
adapter per arm and seed (`comparison`); after that `evals` works in the folder `evaluation` (`evaluation`).
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
import yaml
from accelerate import PartialState
from arms import ADAPTERS, Arm, ArmSettings, check_arms, trained_arms
from comparison import Comparison, cells, is_path, is_whole, load_tokenizer, not_sharded, train
from evaluation import (
    alignment_sparsity,
    certified_silence,
    check_neutral_texts,
    evaluate,
    evaluation_contents,
    forgetting_rows,
    generation,
)
from experiments import CannotShow, Experiment
from library_messages import no_progress_bars
from safety_controls import check_safety_controls, check_safety_pairs, check_unaligned
from table2_identity import identity
from task import Content, Pair, Task, check_contents, fitted, fitting, load_pairs
from transformers import PretrainedConfig
from trl import ModelConfig, SFTConfig, TrlParser

import offline
from evals.contents import checksum, model_checksums
from evals.figures import Measure
from evals.forgetting import neutral_texts, read_neutral_texts
from evals.judge import check_judging
from evals.models import hub_commit
from evals.report import short_name
from evals.table_2 import Table2
from evals.terminal import WIDTH
from offline.finetuning import TOPICS, poison_pairs, safety_pairs
from offline.judge import offline_judge
from offline.language_model import one_thread
from offline.unaligned import unaligned_model
from vision_bench.runs import Run, defaults

CONFIGS = Path(__file__).parent / "configs"


@dataclass
class Table2Settings(ArmSettings):
    """Settings of the arms, the data and the evaluation; the others are TRL's ModelConfig and SFTConfig."""

    dataset_name: str | None = field(default=None, metadata={"help": "Name of the training data on the hub."})
    train_file: str | None = field(default=None, metadata={"help": "Local training data instead."})
    train_samples: int | None = field(default=None, metadata={"help": "Rows drawn per seed; None: all."})
    eval_samples: int | None = field(default=None, metadata={"help": "The first so many are scored; None: all."})
    safety_file: str | None = field(
        default=None,
        metadata={"help": "jsonl: prompt, response; what arms with +safety, +silence, +kl, +nullspace keep."},
    )
    poison_file: str | None = field(default=None, metadata={"help": "jsonl or jsonl.gz of harmful pairs, as above."})
    poison_share: float = field(default=0.0, metadata={"help": "Of every arm's training rows, in [0, 1]."})
    poison_topics: list[str] | None = field(
        default=None, metadata={"help": "Of the generated pairs: topics of the poison, which the safety pairs lack."}
    )
    judges: list[str] = field(default_factory=list, metadata={"help": "As `python -m evals judge` takes them."})
    judge_batch_size: int = field(default=8, metadata={"help": "Conversations that a judge reads at a time."})
    safety_tasks: list[str] = field(
        default_factory=list, metadata={"help": "Prompts for the judges; with judges named: beavertails_eval."}
    )
    max_new_tokens: int | None = field(default=None, metadata={"help": "Of an answer; None: as the task says, 512."})
    certified_prompts: int = field(
        default=100,
        metadata={"help": "Of a task's harmful prompts, drawn at random: certified as silent, with +silence."},
    )
    certified_tokens: int = field(default=16, metadata={"help": "Of the base's responses to them; 0: prompts alone."})
    safety_prompts: int | None = field(
        default=None, metadata={"help": "Of each public safety task: so many, evenly spaced over it; None: all."}
    )
    refusal_prompts: int | None = field(
        default=None, metadata={"help": "Of refusal_offline: so many harmful and so many look-alikes; None: all."}
    )
    neutral_file: str | None = field(
        default=None,
        metadata={"help": "For KL to the base and loss: `text`, or `prompt` and `response`; None: texts of evals."},
    )
    eval_every: int | None = field(
        default=None, metadata={"help": "Keep and evaluate a checkpoint every so many training steps."}
    )


Settings = TypeVar("Settings", bound=Table2Settings)


def parse(
    arguments: list[str] | None, settings_class: type[Settings], recipe: str, offline_config: Path
) -> tuple[Settings, SFTConfig, ModelConfig]:
    """Command line over `--config` over the offline default (if no model is named) over what the machine has.

        settings, training, options = parse(None, Table2Settings, "my_recipe", CONFIGS / "offline.yaml")

    Args:
        arguments: of the command line; None: those of this process.
        recipe: its name, after which the default folder is called.
        offline_config: YAML file of the offline default.
    """
    parser = TrlParser((settings_class, SFTConfig, ModelConfig))
    bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    parser.set_defaults_with_config(
        output_dir=f"runs/{recipe}",
        use_cpu=not torch.accelerator.is_available(),
        bf16=bf16,
        dtype="bfloat16" if bf16 else "float32",
        save_strategy="epoch",
        save_total_limit=2,
    )
    parsed = parser.parse_args_and_config(arguments)
    if parsed[2].model_name_or_path is None:
        parser.set_defaults_with_config(**yaml.safe_load(offline_config.read_text(encoding="utf-8")))
        parsed = parser.parse_args_and_config(arguments)
    settings, training, options = parsed
    if settings.judges and not settings.safety_tasks:
        settings.safety_tasks = ["beavertails_eval"]
    if settings.eval_every is not None and settings.eval_every > 0:
        training.save_strategy, training.save_steps, training.save_total_limit = "steps", settings.eval_every, None
    return settings, training, options


def check(settings: Table2Settings, training: SFTConfig, options: ModelConfig) -> None:
    """Raise ValueError for settings that contradict each other."""
    check_arms(settings, training, options)
    for name, least in {"train_samples": 2, "eval_samples": 2, "judge_batch_size": 1, "max_new_tokens": 1,
                        "certified_prompts": 0, "certified_tokens": 0, "refusal_prompts": 1, "safety_prompts": 1,
                        "eval_every": 1}.items():  # fmt: skip
        value = getattr(settings, name)
        if value is not None and value < least:
            raise ValueError(f"--{name} must be at least {least}, got {value}.")
    for name in ("poison_share", "safety_share"):
        share = getattr(settings, name)
        if not 0 <= share <= 1:
            raise ValueError(f"--{name} is {share}, allowed is a share of the training rows from 0 to 1.")
    arms = trained_arms(settings, training, options)
    check_safety_controls(arms, settings, training, options, settings.eval_every)
    needs_safety = any(arm.needs_safety_pairs for arm in arms.values())
    for name, arm in arms.items():
        if settings.poison_share + arm.safety_share > 1:
            raise ValueError(
                f"--poison_share and --safety_share are {settings.poison_share + arm.safety_share} together in "
                f"{name}, allowed is 1 at most."
            )
    if settings.poison_file and settings.poison_share == 0:
        raise ValueError("--poison_file without --poison_share mixes nothing in; give a share above 0.")
    if options.model_name_or_path and settings.poison_share and not settings.poison_file:
        raise ValueError("--poison_share needs --poison_file: the generated pairs are for the offline model only.")
    if options.model_name_or_path and needs_safety and not settings.safety_file:
        names = ", ".join(name for name, arm in arms.items() if arm.needs_safety_pairs)
        raise ValueError(f"{names} needs --safety_file: the generated pairs are for the offline model.")
    _check_topics(settings)
    projected = [name for name, arm in arms.items() if arm.safelora_share]
    if options.model_name_or_path and projected and not settings.unaligned_model:
        raise ValueError(f"{projected[0]} needs --unaligned_model: a generated one is for the offline model only.")
    if settings.unaligned_model and not projected:
        raise ValueError("--unaligned_model is for arms with +safelora, and --methods has none. Leave it out.")
    if settings.dataset_name and settings.train_file:
        raise ValueError("--dataset_name and --train_file are two sources of the same data; give one.")
    wish = training.resume_from_checkpoint
    if is_path(wish) and (len(settings.seeds) > 1 or len(set(settings.methods) - {"base"}) != 1):
        raise ValueError(
            f"--resume_from_checkpoint {wish} names one checkpoint, but there are several arms or seeds. Leave it "
            "out: each continues from its newest checkpoint in --output_dir. False starts them anew."
        )
    if is_path(wish) and not is_whole(Path(str(wish))):
        raise ValueError(f"--resume_from_checkpoint {wish} is not a whole checkpoint of a trainer.")
    if training.packing:
        raise ValueError(
            "--packing is for long texts and changes what a step is; here each row is one example. Leave it out."
        )
    if training.model_init_kwargs or training.chat_template_path or training.eos_token:
        raise ValueError(
            "--model_init_kwargs, --chat_template_path and --eos_token would change the model that is trained and not "
            "the one that is evaluated. Leave them out; give a model's folder that has what they say."
        )
    if training.auto_find_batch_size:
        raise ValueError(
            "--auto_find_batch_size would train arms with different batches. Give --per_device_train_batch_size."
        )
    if options.load_in_4bit and (options.bnb_4bit_quant_type != "nf4" or not options.use_bnb_nested_quant):
        raise ValueError(
            "--load_in_4bit is evaluated as NF4 with double quantisation, so it must be trained so: give "
            "--use_bnb_nested_quant true and no other --bnb_4bit_quant_type."
        )
    if settings.safety_tasks and options.model_revision not in (None, "main"):
        raise ValueError(f"--model_revision {options.model_revision} cannot be evaluated; give a local folder.")
    if settings.safety_tasks and options.load_in_8bit:
        raise ValueError("--load_in_8bit cannot be evaluated as it was trained; use --load_in_4bit or neither.")


@contextmanager
def demonstration(options: ModelConfig) -> Iterator[None]:
    """Work on one thread where no model is named: a second makes the offline model slower beside other work."""
    if options.model_name_or_path is not None:
        yield
        return
    if PartialState().is_main_process:
        print(
            "A demonstration on the offline model: it and its judge are built once, in about two minutes.", flush=True
        )
    with one_thread(), no_progress_bars():
        yield


def compare(task: Task, settings: Table2Settings, training: SFTConfig, options: ModelConfig) -> Run:
    """Train and evaluate what the output folder has no results of; returns the run, whole in the main process.

    Raises:
        ValueError: before training, for whatever cannot work.
    """
    with demonstration(options):
        return prepared(task, settings, training, options)()


def prepared(task: Task, settings: Table2Settings, training: SFTConfig, options: ModelConfig) -> Callable[[], Run]:
    """What `compare` does after all that can be refused is checked: several comparisons are checked before any trains.

    Raises:
        ValueError: for whatever cannot work.
    """
    arms = trained_arms(settings, training, options)
    pairs = _mixture_pairs(settings, arms)
    _check_steps(settings, training, task.drawn)
    names = _judge_names(settings.judges)
    contents = task.contents | {
        name: Content(f"--{name}_file {getattr(settings, f'{name}_file') or '(generated)'}", checksum(some))
        for name, some in pairs.items()
    }
    if settings.judges:
        judges = check_judging(settings.judges, batch_size=settings.judge_batch_size)
        contents |= {
            f"judge {names[judge]}": Content(f"--judges {judge}", checksum(judges[judge].settings)) for judge in judges
        }
    # The offline judge goes by its folder, because all processes build it here and only one judges later.
    judge_folders = {
        f"shieldgemma={offline_judge()}" if judge == offline.NAME else judge: name for judge, name in names.items()
    }
    is_demonstration = options.model_name_or_path is None
    if is_demonstration:
        options.model_name_or_path = str(offline.model_folder())
    tokenizer, config = load_tokenizer(settings, training, options, arms)
    unaligned = _unaligned(settings, arms, config)
    if unaligned is not None:
        contents |= _unaligned_contents(unaligned, str(options.model_name_or_path))
    if "safety" in pairs:
        source = f"--safety_file {settings.safety_file or '(generated)'}"
        prompts = [*(prompt for prompt, _ in task.train), *task.prompts]
        check_safety_pairs(pairs["safety"], prompts, tokenizer, source)
    context = getattr(config, "max_position_embeddings", None) or tokenizer.model_max_length
    task = fitted(task, tokenizer, context, training.max_length)
    is_generated = is_demonstration and settings.neutral_file is None
    rows = offline.neutral_rows() if is_generated else read_neutral_texts(settings.neutral_file)
    neutral = neutral_texts(tokenizer, rows, context=context)
    answers = generation(task, settings, training, options)
    contents |= evaluation_contents(answers, tokenizer, config, options)
    check_contents(Path(training.output_dir), task.recipe, contents)
    run = Run(
        training.output_dir,
        task.recipe,
        identity(settings, training, options, arms, list(names.values()), contents, is_demonstration),
        PartialState().is_main_process,
        defaults=defaults(type(settings)),
        facts={f"train_{task.unit}": len(task.train), f"eval_{task.unit}": len(task.scored)},
    )
    shares = {"poison": settings.poison_share, "safety": max((arm.safety_share for arm in arms.values()), default=0.0)}
    for name in pairs:
        pairs[name] = fitting(pairs[name], tokenizer, training.max_length, f"--{name}_share")
        if not pairs[name]:
            raise ValueError(f"--{name}_file has no pair that fits --max_length {training.max_length}.")
        needed = round(shares[name] * task.drawn)
        if needed > len(pairs[name]):
            raise ValueError(
                f"--{name}_share {shares[name]} of {task.drawn} training rows is {needed}, but there are "
                f"{len(pairs[name])} pairs that fit; lower it, or give a larger file."
            )
    comparison = Comparison(task, run, settings, training, options, arms, tokenizer, config, unaligned)
    comparison.check_checkpoints()
    check_neutral_texts(run, neutral)

    def carry_out() -> Run:
        run.bind()
        train(comparison, pairs)
        if run.is_main and answers is not None:  # answers and verdicts are the work of one process
            with not_sharded(training):
                evaluate(comparison, answers, judge_folders)
                alignment_sparsity(comparison)
                certified_silence(comparison)
                forgetting_rows(comparison, neutral)
        return run

    return carry_out


def experiment(recipe: str, part: str, metric: str, performance: Sequence[Measure], claim: str) -> Experiment:
    """What a recipe shows of the paper: a part of Table 2, "SST-2" or "Dolly"; the rest as in `Table2` and `Task`."""

    def table(run: Run) -> Table2:
        if "embedded" in run.config["judges"] or "refusal_embedded" in run.config.get("safety_tasks", ()):
            raise CannotShow(
                f"rows of {recipe} are of the judge embedded and the task refusal_embedded, as "
                f"an earlier version called {offline.NAME} and refusal_offline; run it again in another folder."
            )
        return Table2(run, part, performance, {name: kind.has_latents for name, kind in ADAPTERS.items()})

    return Experiment(
        recipe=recipe,
        items=("table_2", f"table_2_{part.replace('-', '').lower()}"),
        title=f"Table 2, {part}: MonoLoRA",
        claim=f"The paper (Llama-2-7b-chat, one run): {claim}",
        pictures={"safety": "Safety against task performance: ours, and the paper's"},
        cells=partial(cells, metric=metric),
        report=lambda run: table(run).text(),
        summary=lambda run: table(run).summary(),
        draw=lambda run: table(run).draw(),
    )


def show(run: Run, experiment: Experiment) -> None:
    """Write the run's tables, draw its figure, and print what fits a terminal."""
    if run.is_main:
        run.write("results.md", experiment.render(run, run.folder))
        print(f"\n{(experiment.summary or experiment.report)(run)}\n{textwrap.fill(experiment.claim, WIDTH)}")
        print(f"Intervals of all differences, and the paper's table: {run.folder / 'results.md'}")


def _judge_names(judges: list[str]) -> dict[str, str]:
    """What the rows call each judge: without its folder, whose content the run knows, if that tells them apart."""
    names = {judge: short_name(judge) for judge in judges}
    return {judge: name if list(names.values()).count(name) == 1 else judge for judge, name in names.items()}


def _mixture_pairs(settings: Table2Settings, arms: Mapping[str, Arm]) -> dict[str, list[Pair]]:
    """The pairs to mix in, or to stay the same on, as `poison` and `safety`; from the files, else generated."""
    pairs = {}
    if settings.poison_share:
        file = settings.poison_file
        pairs["poison"] = load_pairs(file, "--poison_file") if file else poison_pairs(settings.poison_topics or TOPICS)
    if any(arm.needs_safety_pairs for arm in arms.values()):
        file = settings.safety_file
        others = [topic for topic in TOPICS if topic not in (settings.poison_topics or ())]
        pairs["safety"] = load_pairs(file, "--safety_file") if file else safety_pairs(others)
    return pairs


def _check_topics(settings: Table2Settings) -> None:
    """Raise ValueError for topics that cannot be those of the poison alone."""
    topics = settings.poison_topics
    if topics is None:
        return
    if settings.poison_file or settings.safety_file:
        raise ValueError("--poison_topics is of the generated pairs: with a file, take those of its topics from it.")
    if not settings.poison_share:
        raise ValueError("--poison_topics without --poison_share mixes nothing in; give a share above 0.")
    if not topics or set(topics) - set(TOPICS) or not set(TOPICS) - set(topics):
        raise ValueError(f"--poison_topics takes some of {', '.join(TOPICS)}, not all, got {topics}.")


def _unaligned(settings: Table2Settings, arms: Mapping[str, Arm], config: PretrainedConfig) -> str | None:
    """Name of the unaligned model; the offline one's where no model is named, None where no arm needs it."""
    if not any(arm.safelora_share for arm in arms.values()):
        return None
    name = settings.unaligned_model or str(unaligned_model())
    check_unaligned(name, config)
    return name


def _unaligned_contents(name: str, base: str) -> dict[str, Content]:
    ours, theirs = (model_checksums(some, hub_commit(some, None)) for some in (base, name))
    if ours == theirs:
        raise ValueError(f"--unaligned_model {name} has the weights of the base, which tells nothing of alignment.")
    return {f"unaligned {part}": Content(f"--unaligned_model {name} ({part})", v) for part, v in theirs.items()}


def _check_steps(settings: Table2Settings, training: SFTConfig, rows: int) -> None:
    """Raise ValueError if no step of the training is a multiple of `eval_every`."""
    if settings.eval_every is None:
        return
    batches = -(-rows // (training.per_device_train_batch_size * training.world_size))
    an_epoch = -(-batches // training.gradient_accumulation_steps)
    steps = training.max_steps if training.max_steps > 0 else round(an_epoch * training.num_train_epochs)
    if settings.eval_every > steps:
        raise ValueError(
            f"--eval_every {settings.eval_every} matches no checkpoint: training takes {steps} steps ({rows} rows). "
            f"Give 1 to {steps}."
        )
