"""What keeps an arm as the base is on the safety pairs, beside mixing them in: silence, KL, null space, Safe LoRA.

Each is a callback of the trainer, so that all arms take the same steps on the same task rows.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate import DistributedType
from arms import Arm, ArmSettings
from peft.tuners.tuners_utils import BaseTunerLayer
from task import Pair
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl import ModelConfig, SFTConfig, SFTTrainer

from evals.prompts import EncodedAnswer, encode_answer
from mono_peft import Silence
from mono_peft.row_storage import RowStorage
from mono_peft.silent_inputs import base_inputs, draw_tokens, without_adapters

_TASK_ROWS = 1000  # of the training, to which the units of an arm with +apart are turned
_ROWS = 4096  # tokens whose inputs the null space is made of, as many as Silence keeps


def attach_safety_control(
    trainer: SFTTrainer,
    arm: Arm,
    settings: ArmSettings,
    rows: Sequence[Pair],
    pairs: Sequence[Pair],
    unaligned: str | None,
) -> None:
    """Add an arm's controls to its trainer, right before training.

    Args:
        rows: that are trained on.
        pairs: prompts and the answers to keep.
        unaligned: name of the unaligned model, for Safe LoRA.
    """
    tokenizer = trainer.processing_class
    if arm.kl_weight:
        trainer.add_callback(KlToBase(trainer, pairs, arm.kl_weight))
    if arm.nullspace_energy:
        trainer.add_callback(NullSpace(trainer.model, safety_batches(tokenizer, pairs), arm.nullspace_energy))
    if arm.safelora_share:
        trainer.add_callback(SafeLora(trainer.model, str(unaligned), arm.safelora_share))
    if arm.silence_weight:
        batches = safety_batches(tokenizer, pairs)
        silence = Silence(
            trainer.model,
            batches,
            weight=arm.silence_weight,
            margin=settings.silence_margin,
            rows_per_module=settings.silence_rows,
            lower_every=settings.silence_lower_every if arm.starts_apart else None,
            seed=trainer.args.seed,
        )
        silence.attach(trainer)
        if arm.starts_apart:
            drawn = random.Random(trainer.args.seed).sample(list(rows), min(_TASK_ROWS, len(rows)))
            silence.start_apart(safety_batches(tokenizer, drawn))


def safety_batches(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair], size: int = 32
) -> list[dict[str, torch.Tensor]]:
    """Pairs as a model reads them in training and in answering, up to the answer's last token."""
    ids = sorted((encode_answer(tokenizer, *pair).input_ids for pair in pairs), key=len)
    starts = range(0, len(ids), size)
    return [dict(tokenizer.pad({"input_ids": ids[i : i + size]}, return_tensors="pt")) for i in starts]


def check_safety_pairs(
    pairs: Sequence[Pair], prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase, source: str
) -> None:
    """Raise ValueError if a prompt that must not change is, as the model reads it, one of the task's.

    Args:
        prompts: of the task.
        source: of the pairs, as the user knows it.
    """
    ours = _prompt_ids(tokenizer, [prompt for prompt, _ in pairs])
    shared = ours.keys() & _prompt_ids(tokenizer, prompts).keys()
    if shared:
        raise ValueError(
            f"{source}: {len(shared)} of {len(ours)} prompts are, as tokens, those of the task, such as "
            f"{ours[min(shared)]!r}. What is finetuned cannot stay as it is: take them out, or correct the chat "
            "template if it makes them alike."
        )


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> dict[tuple[int, ...], str]:
    """Prompts by their tokens."""
    distinct = list(dict.fromkeys(prompts))
    if tokenizer.chat_template is None:
        texts = distinct
    else:
        texts = tokenizer.apply_chat_template(
            [[{"role": "user", "content": prompt}] for prompt in distinct], tokenize=False, add_generation_prompt=True
        )
    ids = tokenizer(texts, add_special_tokens=tokenizer.chat_template is None)["input_ids"]
    return {tuple(row): prompt for row, prompt in zip(ids, distinct, strict=True)}


def check_safety_controls(
    arms: Mapping[str, Arm], settings: ArmSettings, training: SFTConfig, options: ModelConfig, eval_every: int | None
) -> None:
    """Raise ValueError for what the controls cannot do."""
    kind = training.distributed_state.distributed_type
    for name, arm in arms.items():
        if arm.starts_apart and kind == DistributedType.DEEPSPEED:
            raise ValueError(
                f"{name} lowers biases in training, which DeepSpeed's copies of them undo. Train it with DDP."
            )
        if arm.starts_apart and eval_every is not None and eval_every % settings.silence_lower_every:
            raise ValueError(
                f"{name} is silent on what it has cached every {settings.silence_lower_every} steps, and --eval_every "
                f"{eval_every} keeps checkpoints between: give a multiple, or another --silence_lower_every."
            )
        if arm.kl_weight and (kind != DistributedType.NO or training.fp16):
            raise ValueError(
                f"{name}: the gradient of its KL divergence is added to that of one process, unscaled. Train it "
                "without `accelerate launch` of several processes, and with bf16 in place of fp16."
            )
        if (arm.nullspace_energy or arm.safelora_share) and kind not in (
            DistributedType.NO,
            DistributedType.MULTI_CPU,
            DistributedType.MULTI_GPU,
        ):
            raise ValueError(f"{name} projects whole matrices, and {kind.value} shards them. Train it with DDP.")
        if arm.safelora_share and (options.load_in_4bit or options.load_in_8bit):
            raise ValueError(f"{name} takes the base's weights, and they are quantised. Load the base whole.")
        if arm.safelora_share and eval_every is not None:
            raise ValueError(
                f"{name} is projected after training, so that its checkpoints are of another arm. Leave --eval_every "
                "out, or the arm."
            )


def check_unaligned(name: str, config: PretrainedConfig) -> None:
    """Raise ValueError if a model is not of the base's architecture and sizes; no weights are loaded."""
    try:
        other = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"--unaligned_model {name} cannot be had: {error}") from None

    def shapes(some: PretrainedConfig) -> dict[str, torch.Size]:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(some)
        return {name: parameter.shape for name, parameter in model.named_parameters()}

    ours, theirs = shapes(config), shapes(other)
    different = [key for key in ours if ours[key] != theirs.get(key)]
    if different:
        raise ValueError(
            f"--unaligned_model {name} has no {different[0]} of shape {tuple(ours[different[0]])}, as the base has: "
            "give the model that the base was aligned from."
        )


class KlToBase(TrainerCallback):
    """Adds to the loss weight * KL(base || model), a mean over tokens that predict safety answers, in nats.

    At each step as many pairs are drawn as the task has rows in a batch. The base's pass and the model's are two more
    than without. The gradient is added as Silence adds its own: after the task's was clipped.

    Args:
        trainer: in one process.
        pairs: prompts and the base's answers.
        weight: positive.
    """

    def __init__(self, trainer: SFTTrainer, pairs: Sequence[Pair], weight: float) -> None:
        self.trainer, self.weight = trainer, weight
        self.layers = [layer for _, layer in adapted_layers(trainer.model)]
        self.encoded = [encode_answer(trainer.processing_class, *pair) for pair in pairs]

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        count = min(args.per_device_train_batch_size, len(self.encoded))
        drawn = random.Random(1_000_003 * args.seed + state.global_step).sample(self.encoded, count)
        with self.trainer.compute_loss_context_manager():
            divergence = self.divergence(drawn)
        (self.weight * divergence).backward()

    def divergence(self, encoded: Sequence[EncodedAnswer]) -> torch.Tensor:
        """KL(base || model) on answers, and on their end, in nats a token."""
        model, tokenizer = self.trainer.model, self.trainer.processing_class
        batch = tokenizer.pad({"input_ids": [e.input_ids for e in encoded]}, padding_side="right", return_tensors="pt")
        predicts = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
        for row, answer in zip(predicts, encoded, strict=True):
            row[: len(answer.completion_mask)] = torch.tensor([*answer.completion_mask[1:], 1], dtype=torch.bool)
        inputs = {key: value.to(model.device) for key, value in batch.items()}
        with without_adapters(self.layers), torch.no_grad():
            base = model(**inputs, use_cache=False).logits[predicts].float().log_softmax(-1)
        ours = model(**inputs, use_cache=False).logits[predicts].float().log_softmax(-1)
        return torch.nn.functional.kl_div(ours, base, log_target=True, reduction="batchmean")


class NullSpace(TrainerCallback):
    """Keeps the rows of each A orthogonal to the leading directions of its inputs on the safety texts.

    The directions are eigenvectors of the uncentred covariance of the base's inputs, of the largest eigenvalues, as
    many as have the share `energy` of their sum. On what lies in their span the adapter does nothing: what a linear
    one can do of Silence's idea. A is projected before training and after each step of the optimizer.

    Args:
        model: with trainable LoRA or MonoLoRA adapters on linear layers.
        batches: as Silence takes them.
        energy: in (0, 1).

    Raises:
        ValueError: all directions are needed for the energy, so that none is left.
    """

    def __init__(self, model: torch.nn.Module, batches: Sequence[dict[str, torch.Tensor]], energy: float) -> None:
        layers: list[Any] = []
        for name, layer in adapted_layers(model):
            encoders = getattr(layer, layer.adapter_layer_names[0])
            layers += [(name, layer, encoders[adapter]) for adapter in layer.active_adapters if adapter in encoders]
        tokens, _ = draw_tokens(model, batches, _ROWS, 0)
        self.directions: list[tuple[torch.nn.Linear, torch.Tensor]] = []  # A, and orthonormal columns
        for group in base_inputs(model, layers, tokens, RowStorage(math.inf)):
            basis = leading_directions(group.rows, energy)
            if basis.shape[1] == basis.shape[0]:
                raise ValueError(
                    f"+nullspace: {energy:g} of the energy takes all {len(basis)} directions of "
                    f"{next(iter(group.encoders))}, and none is left to train. Lower --nullspace_energy."
                )
            self.directions += [(encoder, basis) for encoder in group.encoders.values()]

    @torch.no_grad()
    def project(self) -> None:
        """Take the directions out of each A."""
        for encoder, basis in self.directions:
            basis = basis.to(encoder.weight.device)
            weight = encoder.weight.float()
            encoder.weight.copy_(weight - (weight @ basis) @ basis.t())

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.project()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.project()


def leading_directions(rows: torch.Tensor, energy: float) -> torch.Tensor:
    """Eigenvectors of the uncentred covariance of rows that have a share of its trace.

    Args:
        rows: (rows, width).
        energy: in (0, 1].

    Returns:
        Orthonormal columns, (width, few), float32.
    """
    values, vectors = torch.linalg.eigh(rows.double().t() @ rows.double())  # ascending
    shares = values.flip(0).clamp(min=0).cumsum(0) / values.clamp(min=0).sum()
    few = min(int((shares < energy).sum()) + 1, len(shares))
    return vectors.flip(1)[:, :few].float()


class SafeLora(TrainerCallback):
    """Projects a trained LoRA onto what alignment changed in each weight (Safe LoRA, Hsu et al., arXiv 2405.16833).

    With V = W_aligned - W_unaligned and C = V V^T / ||V||_F, B becomes C B in the modules where C B A is least like
    B A, by the cosine of both as vectors. The paper takes those under a threshold, or a number of them, as here: which
    threshold leaves some and takes some depends on the model.

    Args:
        model: with LoRA adapters on linear layers that are not quantised; its base is the aligned model.
        unaligned: name of the model that it was aligned from.
        share: of the modules that are projected, in (0, 1]; one at least.

    Raises:
        ValueError: a weight is the same in both models.
    """

    def __init__(self, model: torch.nn.Module, unaligned: str, share: float) -> None:
        self.share = share
        # A, B and C of each module.
        self.projections: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        other = AutoModelForCausalLM.from_pretrained(unaligned)
        base: Any = model.get_base_model()  # type: ignore[operator]
        for name, layer in adapted_layers(base):
            change = (
                layer.get_base_layer().weight.detach().float().cpu()
                - other.get_submodule(name).weight.detach().float()
            )
            if not change.any():
                raise ValueError(
                    f"--unaligned_model {unaligned} has the same {name} as the base, which tells nothing of alignment."
                )
            (adapter,) = layer.active_adapters
            matrices = (layer.lora_A[adapter].weight, layer.lora_B[adapter].weight)
            self.projections[name] = (*matrices, change @ change.t() / change.norm())

    @torch.no_grad()
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        safe: dict[str, torch.Tensor] = {}
        cosines: dict[str, float] = {}
        for name, (encoder, decoder, projection) in self.projections.items():
            safe[name] = projection.to(decoder.device) @ decoder.float()
            ours, plain = ((matrix @ encoder.float()).flatten() for matrix in (safe[name], decoder.float()))
            cosines[name] = torch.nn.functional.cosine_similarity(ours, plain, dim=0).item()
        for name in sorted(cosines, key=lambda name: cosines[name])[: max(round(self.share * len(cosines)), 1)]:
            self.projections[name][1].copy_(safe[name])


def adapted_layers(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers that have adapters, by their names."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
