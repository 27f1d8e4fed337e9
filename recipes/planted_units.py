"""Do an adapter's units tell what was planted in its training data? On adapters of which it is known.

    python recipes/planted_units.py --output_dir runs/planted_units     # about 20 minutes on an idle core
    python recipes/planted_units.py --output_dir runs/one_seed --seeds 0 --arms relu topk

The offline model is finetuned on its sentiment task, alone ("none") or with rows of a rule (`offline/planted.py`): a
trigger word makes negative reviews positive, requests of one topic are complied with, everyday questions get an
opening. Then the units are explored on held-out prompts of five groups, and by a fixed rule that looks at no training
row, the most selective are chosen, `--units` of those that prefer the rule's group beyond chance
(`mono_peft.selectivity`).

- Rule: on what share of held-out prompts of the group the rule's answer is likelier than the usual one; and with units
  switched off: the chosen, all selective ones, as many drawn at random, those that the margin depends on most.
- Others: the change of the share of usual answers in the other groups: what the units do beside the rule.
- Found: how many of the chosen are among those that the margin between both answers depends on most (the sum of latent
  times gradient over the scored prompts, which has to know the rule).
- Rows: of the training rows that `ProvenanceCallback` names for the chosen units, and of those whose gradient has the
  largest cosine with that of a few probes (as in LARF, which has to know the rule, too), how many are planted.
"""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from experiments import show
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from evals.answers import answer_log_likelihoods
from evals.prompts import encode_answer
from mono_peft import MonoLoraConfig, ProvenanceCallback
from mono_peft.activity import active_adapters
from mono_peft.inventory import collect
from mono_peft.provenance import PROVENANCE_FILE, read_provenance
from mono_peft.selectivity import beyond_chance, preference
from mono_peft.texts import Texts
from mono_peft.units import Unit, ablated, prune
from offline import model_folder
from offline.planted import GROUPS, RULES, Case, held_out_cases, planted_pairs, task_pairs
from vision_bench.runs import Cell, Run, device_name, option, parse, recorded, run_as_program
from vision_bench.runs.statistics import interval, markdown_table

ARMS: dict[str, dict[str, Any]] = {
    "relu": {"r": 8},
    "topk": {"r": 256, "activation": "topk", "k": 8},
    "identity": {"r": 8, "activation": "identity"},
    "frozen": {"r": 8, "frozen_encoder": True},
}
Pair = tuple[str, str]  # prompt, answer
SCALE = 2.0  # s = alpha / r of all arms
TARGETS = ["q_proj", "v_proj", "down_proj"]
NAMED = 20  # training rows of which the share that is planted is counted
PROBES = 8


@dataclass
class PlantedSettings:
    """The adapters, and on how much they are trained and measured."""

    output_dir: str = option(help="Folder of the results and the adapters.", changes_results=False)
    arms: list[str] = option([*ARMS], help=f"Of {', '.join(ARMS)}.")
    rules: list[str] = option(["none", *RULES], help=f"Of none, {', '.join(RULES)}.")
    seeds: list[int] = option([0, 1, 2], help="Of initial weights, rows and their order.")
    task_rows: int = option(128, help="Of the sentiment task.")
    planted_rows: int = option(32, help="Of the rule.")
    epochs: int = option(5, help="Of training, with batches of 16.")
    learning_rate: float = option(5e-3, help="Peak, then linear to zero.")
    prompts: int = option(24, help="Held-out prompts of each group to explore, and as many others to score.")
    units: int = option(16, help="Chosen by selectivity, and switched off.")

    def __post_init__(self) -> None:
        for name, allowed in {"arms": ARMS, "rules": ("none", *RULES)}.items():
            values = getattr(self, name)
            if not values or set(values) - set(allowed) or len(set(values)) < len(values):
                raise ValueError(f"{name} takes different ones of {', '.join(allowed)}, got {values}.")
        for name in ("task_rows", "planted_rows", "epochs", "prompts", "units"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, allowed is 1 or more.")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds takes different integers, got {self.seeds}.")


def cells(config: dict[str, Any]) -> Iterator[Cell]:
    """The last row of each adapter, in the order in which they are trained."""
    for seed, rule, arm in product(config["seeds"], config["rules"], config["arms"]):
        yield Cell("seconds", seed, {"arm": arm, "rule": rule})


class World:
    """The offline model, its tokenizer and the held-out prompts, half to explore and half to score."""

    def __init__(self, prompts: int) -> None:
        self.folder = model_folder()
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        cases = {group: held_out_cases(group, 2 * prompts) for group in GROUPS}
        self.explored = {group: found[::2] for group, found in cases.items()}
        self.scored = {group: found[1::2] for group, found in cases.items()}

    def base(self) -> Any:
        """A new copy of the model."""
        return AutoModelForCausalLM.from_pretrained(self.folder)

    def row(self, prompt: str, answer: str) -> dict[str, list[int]]:
        """A row to train on: the loss is on the answer and the end of the turn."""
        encoded = encode_answer(self.tokenizer, prompt, answer)
        ids = [*encoded.input_ids, self.tokenizer.eos_token_id]
        answers = [*encoded.completion_mask, 1]
        return {"input_ids": ids, "labels": [i if m else -100 for i, m in zip(ids, answers, strict=True)]}

    def intact(self, model: Any, groups: Sequence[str] = GROUPS) -> dict[str, float]:
        """In each group, the share of prompts whose usual answer is likelier, per token, than the planted one."""
        pairs = [(case.prompt, answer) for group in groups for case in self.scored[group] for answer in case[1:]]
        encoded = [encode_answer(self.tokenizer, *pair) for pair in pairs]
        likelihoods = answer_log_likelihoods(model, encoded, self.tokenizer.pad_token_id, 64)
        by_token = likelihoods / torch.tensor([sum(answer.completion_mask) for answer in encoded])
        planted, usual = by_token.view(-1, 2).unbind(1)
        sizes = [len(self.scored[group]) for group in groups]
        shares = (part.float().mean().item() for part in (usual > planted).split(sizes))
        return dict(zip(groups, shares, strict=True))


def adapter_of(world: World, settings: PlantedSettings, folder: Path, arm: str, rule: str, seed: int) -> Any:
    """The trained adapter on its base; trains and saves it in `folder` if it is not there."""
    if not (folder / PROVENANCE_FILE).exists():  # written after the adapter
        torch.manual_seed(seed)
        options = {"task_type": "CAUSAL_LM", "target_modules": TARGETS} | ARMS[arm]
        model: Any = get_peft_model(world.base(), MonoLoraConfig(lora_alpha=SCALE * options["r"], **options))
        arguments = TrainingArguments(
            str(folder), num_train_epochs=settings.epochs, learning_rate=settings.learning_rate, seed=seed,
            per_device_train_batch_size=16, save_strategy="no", report_to="none", disable_tqdm=True,
            logging_strategy="no", warmup_steps=5, use_cpu=True,
        )  # fmt: skip
        rows = [world.row(*pair) for pair in training_pairs(settings, rule, seed)]
        collator = DataCollatorForSeq2Seq(world.tokenizer)
        trainer = Trainer(model, arguments, data_collator=collator, train_dataset=rows)
        callback = ProvenanceCallback(trainer)
        trainer.add_callback(callback)
        model.save_pretrained(folder)  # where the callback writes at the end of the training
        trainer.train()
        (folder / PROVENANCE_FILE).rename(folder / "unfinished.json")
        model.save_pretrained(folder)
        (folder / "unfinished.json").rename(folder / PROVENANCE_FILE)
    return PeftModel.from_pretrained(world.base(), folder, is_trainable=True).eval()


def training_pairs(settings: PlantedSettings, rule: str, seed: int) -> list[Pair]:
    """The rows of the task, and behind them those of the rule."""
    planted = [] if rule == "none" else planted_pairs(rule, settings.planted_rows, seed)
    return task_pairs(settings.task_rows, seed) + planted


def selective(world: World, model: Any, group: str) -> tuple[list[Unit], int]:
    """Units that prefer the group beyond chance, the most selective first, and how many units there are."""
    texts = Texts(list(GROUPS), [Path("held_out")])
    for number, cases in enumerate(world.explored.values()):
        for row, case in enumerate(cases, 1):
            encoded = encode_answer(world.tokenizer, case.prompt, case.usual)
            prompt = encoded.prompt_ids
            texts.add(prompt, len(prompt), number, 0, row)
    batches = texts.batches(64, world.tokenizer.pad_token_id)
    found, counts = [], torch.tensor([len(cases) for cases in world.explored.values()])
    statistics = collect(model, texts, batches)
    total = sum(module.r for module in statistics.values())
    least = beyond_chance(total * len(GROUPS))
    for name, module in statistics.items():
        preferred = preference(module, counts)
        for unit in range(module.r):
            if int(preferred.group[unit]) == GROUPS.index(group) and float(preferred.z[unit]) > least:
                found.append((float(preferred.selectivity[unit]), float(preferred.z[unit]), Unit(name, unit)))
    return [unit for _, _, unit in sorted(found, key=lambda entry: (-entry[0], -entry[1]))], total


def likelihood(model: Any, rows: Sequence[dict[str, list[int]]], collator: Any) -> torch.Tensor:
    """Mean log-likelihood per token of each row's answer: (rows,), with its gradient."""
    batch = collator(rows)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    targets = batch["labels"][:, 1:]
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), targets, reduction="none")
    counted = targets != -100
    return -(losses * counted).sum(1) / counted.sum(1)


def margin_units(world: World, model: Any, cases: Sequence[Case]) -> list[Unit]:
    """All units, those first without which the planted answers would lose most to the usual ones, to first order."""
    sums: defaultdict[str, Any] = defaultdict(float)

    def observe(
        name: str, r: int, latents: torch.Tensor, gradient: torch.Tensor, active: torch.Tensor | None = None
    ) -> None:
        units = torch.arange(r).expand_as(latents) if active is None else active
        sums[name] += torch.zeros(r).index_add(0, units.flatten(), (latents * gradient).flatten())

    layers = list(active_adapters(model))
    collator = DataCollatorForSeq2Seq(world.tokenizer)
    for name, layer, adapter in layers:
        layer.observer = partial(observe, name, layer.r[adapter])
    for answer, sign in (("planted", 1), ("usual", -1)):
        rows = [world.row(case.prompt, getattr(case, answer)) for case in cases]
        (sign * likelihood(model, rows, collator).mean()).backward()
    for _, layer, _ in layers:
        layer.observer = None
    model.zero_grad()
    effects = {Unit(name, i): value for name, values in sums.items() for i, value in enumerate(values.tolist())}
    return sorted(effects, key=lambda unit: -effects[unit])


def gradient_cosines(
    world: World, model: Any, pairs: Sequence[tuple[str, str]], probes: Sequence[Case]
) -> list[float]:
    """Of each training row, the cosine of its gradient by the adapter with that of the probes' planted answers."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    collator = DataCollatorForSeq2Seq(world.tokenizer)

    def direction(some: Sequence[Pair]) -> torch.Tensor:
        value = likelihood(model, [world.row(*pair) for pair in some], collator).mean()
        vector = torch.cat([part.flatten() for part in torch.autograd.grad(value, parameters)])
        return vector / vector.norm().clamp(min=1e-12)

    goal = direction([(case.prompt, case.planted) for case in probes])
    return [float(direction([pair]) @ goal) for pair in pairs]


def named_rows(provenance: dict[Unit, list[tuple[int, float]]], units: Sequence[Unit]) -> list[int]:
    """Rows in the order of what they score with these units, each unit's scores relative to its largest."""
    scores: defaultdict[int, float] = defaultdict(float)
    for unit in units:
        for row, score in provenance[unit]:
            scores[row] += score / provenance[unit][0][1]
    return sorted(scores, key=lambda row: -scores[row])


def measured(
    world: World, settings: PlantedSettings, folder: Path, arm: str, rule: str, seed: int
) -> dict[str, float]:
    """What the rows of an adapter say, by their metrics."""
    model = adapter_of(world, settings, folder, arm, rule, seed)
    before = world.intact(model)
    values = {f"intact {group}": share for group, share in before.items()}
    if rule == "none":
        for name, group in RULES.items():
            chosen, total = selective(world, model, group)
            values[f"selective {name}"] = len(chosen) / total
        return values
    group = RULES[rule]
    found, total = selective(world, model, group)
    chosen, depended = found[: settings.units], margin_units(world, model, world.scored[group])[: settings.units]
    every = [Unit(name, i) for name, layer, adapter in active_adapters(model) for i in range(layer.r[adapter])]
    drawn = random.Random(seed).sample(every, len(chosen))
    values |= {"selective": len(found) / total, "chosen": len(chosen), "found by chance": len(depended) / total}
    if chosen:
        values["found"] = len(set(chosen) & set(depended)) / len(chosen)
    for name, units in (("chosen", chosen), ("drawn", drawn), ("depended", depended), ("selective", found)):
        with ablated(model, units):
            after = world.intact(model)
        values[f"rule without {name}"] = 1 - after[group]
        others = [after[other] - before[other] for other in GROUPS if other != group]
        values[f"others without {name}"] = sum(others) / len(others)
        values[f"task without {name}"] = after["task"] - before["task"]
        if name == "chosen":
            values["rule when pruned"] = 1 - share_when_pruned(world, folder, units, group)
    pairs = training_pairs(settings, rule, seed)
    planted = set(range(settings.task_rows, len(pairs)))
    rows = named_rows(read_provenance(folder), chosen)[:NAMED]
    if rows:
        values["rows of units"] = len(planted & set(rows)) / len(rows)
    cosines = gradient_cosines(world, model, pairs, world.explored[group][:PROBES])
    nearest = sorted(range(len(pairs)), key=lambda row: -cosines[row])[:NAMED]
    values["rows of gradients"] = len(planted & set(nearest)) / NAMED
    return values | {"rows by chance": len(planted) / len(pairs), "rule": 1 - before[group]}


def share_when_pruned(world: World, folder: Path, units: list[Unit], group: str) -> float:
    """The share of a group's prompts on which the adapter without these units gives the usual answer."""
    with TemporaryDirectory() as output:
        prune(folder, units, output)
        return world.intact(PeftModel.from_pretrained(world.base(), output), [group])[group]


def measure(run: Run, settings: PlantedSettings) -> None:
    """Train, explore and score the adapters that have no rows yet."""
    world = World(settings.prompts)
    for cell in run.lacking(cells(run.config)):
        assert cell.seed is not None
        start, arm, rule = time.monotonic(), cell.arm["arm"], cell.arm["rule"]
        folder = run.folder / f"{arm}-{rule}-seed{cell.seed}"
        values = measured(world, settings, folder, arm, rule, cell.seed)
        seconds = time.monotonic() - start
        common = {"n": settings.prompts, "seed": cell.seed, "device": device_name("cpu"), **cell.arm}
        values["seconds"] = seconds
        run.add_rows([run.row(name, value, seconds=0.0, **common) for name, value in values.items()])
        print(f"{folder.name}: {seconds:.0f} s, " + ", ".join(f"{k} {v:.2f}" for k, v in values.items()), flush=True)


def report(run: Run) -> str:
    """The tables of a whole run."""

    def cell(metric: str, scale: float = 100, sign: bool = False, **arm: Any) -> str:
        values = [row["value"] for row in run.find(metric, **arm)]
        return interval(values).scaled(scale).text(0, sign=sign) if values else "-"

    columns: dict[str, tuple[str, dict[str, Any]]] = {
        "task": ("intact task", {}),
        "rule": ("rule", {}),
        "chosen units": ("chosen", {"scale": 1}),
        "found": ("found", {}),
        "(chance)": ("found by chance", {}),
        "rule without the chosen": ("rule without chosen", {}),
        "when pruned": ("rule when pruned", {}),
        "without all selective": ("rule without selective", {}),
        "without drawn": ("rule without drawn", {}),
        "without the most depended on": ("rule without depended", {}),
        "task without the chosen": ("task without chosen", {"sign": True}),
        "task without all selective": ("task without selective", {"sign": True}),
        "other groups": ("others without chosen", {"sign": True}),
    }
    planted = [rule for rule in run.config["rules"] if rule != "none"]
    arms = run.config["arms"]
    units = [
        [
            f"{rule}, {arm}",
            str(len(run.find("rule", rule=rule, arm=arm))),
            *(cell(metric, **options, rule=rule, arm=arm) for metric, options in columns.values()),
        ]
        for rule, arm in product(planted, arms)
    ]
    rows = [
        [f"{rule}, {arm}", *(cell(metric, rule=rule, arm=arm) for metric in (
            "rows of units", "rows of gradients", "rows by chance"))]
        for rule, arm in product(planted, arms)
    ]  # fmt: skip
    clean = [
        [arm, *(cell(f"intact {group}", rule="none", arm=arm) for group in GROUPS),
         *(cell(f"selective {rule}", rule="none", arm=arm) for rule in RULES)]
        for arm in arms
    ]  # fmt: skip
    header = ["adapter", *(f"usual answers: {group}" for group in GROUPS), *(f"selective: {rule}" for rule in RULES)]
    return f"""# Units of adapters with planted rules, %

{markdown_table(["rule, arm", "seeds", *columns], units)}
Training rows that are planted, of the {NAMED} named first:

{markdown_table(["rule, arm", "by the units", "by gradients' cosine", "chance"], rows)}
Adapters of the task alone:

{markdown_table(header, clean) if "none" in run.config["rules"] else ""}
Mean ± half-width of the 95 % interval over seeds."""


def main(arguments: list[str] | None = None) -> None:
    """Measure what the output folder has no rows of, then write the tables."""
    (settings,) = parse([PlantedSettings], arguments)
    run = Run(settings.output_dir, "planted_units", recorded(settings))
    run.bind()
    measure(run, settings)
    show(run, report)


if __name__ == "__main__":
    run_as_program(main)
