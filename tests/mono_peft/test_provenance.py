"""ProvenanceCallback equals hooks that look at every latent and its gradient, and changes nothing of the training."""

import copy
import json

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import get_peft_model
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from mono_peft import MonoLoraConfig
from mono_peft.layer import MonoLoraLayer
from mono_peft.provenance import ProvenanceCallback, read_provenance
from mono_peft.units import Unit

ROWS, TOP = 10, 3


@pytest.fixture
def token_rows():
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 100, (4 + i % 3,), generator=generator).tolist() for i in range(ROWS)]


def collator(features):
    """Padding on the left or the right, in turn of the first token, which must not matter."""
    longest = max(len(f["input_ids"]) for f in features)
    left = features[0]["input_ids"][0] % 2
    batch = {"input_ids": [], "attention_mask": [], "labels": []}
    for feature in features:
        ids, padding = feature["input_ids"], [0] * (longest - len(feature["input_ids"]))
        ones = [1] * len(ids)
        batch["input_ids"].append(padding + ids if left else ids + padding)
        batch["attention_mask"].append(padding + ones if left else ones + padding)
        ignored = [-100] * len(padding)
        batch["labels"].append(ignored + ids if left else ids + ignored)
    return {name: torch.tensor(values) for name, values in batch.items()}


def trainer_of(base, folder, rows, adapter=None, **options):
    torch.manual_seed(1)
    # B is not zero, so that every gradient counts.
    adapter = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "init_weights": False} | (
        adapter or {}
    )
    model = get_peft_model(copy.deepcopy(base), MonoLoraConfig(**adapter))
    options = {"num_train_epochs": 2, "per_device_train_batch_size": 3, "learning_rate": 1e-2} | options
    arguments = TrainingArguments(
        str(folder), report_to=[], disable_tqdm=True, save_strategy="no", use_cpu=True, logging_steps=100, **options
    )
    if not isinstance(rows, IterableDataset):
        rows = Dataset.from_dict({"input_ids": rows, "text": ["x"] * len(rows)})
    return Trainer(model, arguments, data_collator=collator, train_dataset=rows)


def reference(trainer, rows):
    """The largest score of each pair of a unit and a row, by hooks that switch the fused step off."""
    scores = {}
    present = []

    def note_pass(model, args, kwargs):
        present[:] = [
            rows.index([i for i, seen in zip(ids, mask, strict=True) if seen])
            for ids, mask in zip(kwargs["input_ids"].tolist(), kwargs["attention_mask"].tolist(), strict=True)
        ]

    def watch(name):
        def hook(activation, args, latents):
            if not latents.requires_grad:
                return

            def note(gradient):
                for row, z, g in zip(present, latents.detach(), gradient, strict=True):
                    for unit, score in enumerate((z * g).abs().sum(0).tolist()):
                        key = Unit(name, unit)
                        best = scores.setdefault(key, {})
                        best[row] = max(best.get(row, 0), score)

            latents.register_hook(note)

        return hook

    trainer.model.register_forward_pre_hook(note_pass, with_kwargs=True)
    for name, layer in trainer.model.named_modules():
        if isinstance(layer, MonoLoraLayer):
            layer.monolora_activation["default"].register_forward_hook(watch(name))
    trainer.train()
    return scores


def check_equal(saved, scores, top=TOP):
    assert saved.keys() == scores.keys()
    assert any(len(pairs) == top for pairs in saved.values())
    for unit, pairs in saved.items():
        largest = sorted(scores[unit].values(), reverse=True)[:top]
        found = [score for _, score in pairs]
        assert found + [0] * (len(largest) - len(pairs)) == pytest.approx(largest, rel=1e-3, abs=1e-9)
        for row, score in pairs:
            assert scores[unit][row] == pytest.approx(score, rel=1e-3, abs=1e-9)
        assert len({row for row, _ in pairs}) == len(pairs)


class TestScores:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"gradient_accumulation_steps": 2},
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
            {"dataloader_num_workers": 1},
        ],
        ids=str,
    )
    def test_trainings_equal_the_slow_reference(self, llama, token_rows, tmp_path, options):
        scores = reference(trainer_of(llama, tmp_path / "slow", token_rows, **options), token_rows)
        trainer = trainer_of(llama, tmp_path / "run", token_rows, **options)
        trainer.add_callback(ProvenanceCallback(trainer, TOP))
        trainer.train()
        check_equal(read_provenance(tmp_path / "run"), scores)

    @pytest.mark.parametrize(
        "adapter",
        [
            {"activation": "identity"},
            {"activation": "softplus", "lora_alpha": 3},
            {"activation": "topk", "k": 2, "r": 32, "encoder_bias": True},
            {"activation": "topk", "k": 2},
            {"target_modules": ["embed_tokens", "q_proj", "lm_head"]},
            {"rank_pattern": {"v_proj": 2}, "use_rslora": True},
        ],
        ids=str,
    )
    def test_adapters_equal_the_slow_reference(self, llama, token_rows, tmp_path, adapter):
        scores = reference(trainer_of(llama, tmp_path / "slow", token_rows, adapter), token_rows)
        trainer = trainer_of(llama, tmp_path / "run", token_rows, adapter)
        trainer.add_callback(ProvenanceCallback(trainer, TOP))
        trainer.train()
        check_equal(read_provenance(tmp_path / "run"), scores)

    def test_dropout_in_the_fused_step_equals_that_of_the_modules(self, llama, token_rows, tmp_path):
        # Both draw other masks: compared is the mean over units, for which one of 1 - p too much would show.
        totals = []
        for plain in (False, True):
            adapter = {"lora_dropout": 0.5, "r": 16}
            trainer = trainer_of(llama, tmp_path / str(plain), token_rows, adapter, learning_rate=0.0)
            trainer.args.num_train_epochs = 8
            if plain:
                for layer in trainer.model.modules():
                    if isinstance(layer, MonoLoraLayer):
                        layer.monolora_activation["default"].register_forward_hook(lambda *_: None)
            trainer.add_callback(ProvenanceCallback(trainer, TOP))
            trainer.train()
            saved = read_provenance(tmp_path / str(plain))
            totals.append(sum(score for pairs in saved.values() for _, score in pairs))
        assert totals[0] == pytest.approx(totals[1], rel=0.1)

    def test_a_frozen_encoder(self, llama, token_rows, tmp_path):
        found = []
        for frozen in (False, True):
            trainer = trainer_of(llama, tmp_path / str(frozen), token_rows, learning_rate=0.0)
            for name, parameter in trainer.model.named_parameters():
                if frozen and "monolora_encoder" in name:
                    parameter.requires_grad_(False)
            trainer.add_callback(ProvenanceCallback(trainer, TOP))
            trainer.train()
            found.append(read_provenance(tmp_path / str(frozen)))
        assert found[0].keys() == found[1].keys()
        for unit, pairs in found[0].items():
            assert [p[1] for p in pairs] == pytest.approx([p[1] for p in found[1][unit]], rel=1e-4)

    def test_rows_with_the_same_tokens_are_one(self, llama, token_rows, tmp_path):
        rows = [token_rows[0], token_rows[1], token_rows[0], token_rows[0]]
        trainer = trainer_of(llama, tmp_path, rows, per_device_train_batch_size=4)
        trainer.add_callback(ProvenanceCallback(trainer))
        trainer.train()
        saved = read_provenance(tmp_path)
        assert {row for pairs in saved.values() for row, _ in pairs} == {0, 1}
        assert max(len(pairs) for pairs in saved.values()) == 2


class TestTraining:
    def test_the_weights_are_those_without_it_and_nothing_stays(self, llama, token_rows, tmp_path):
        models = []
        for watched in (False, True):
            trainer = trainer_of(llama, tmp_path, token_rows, {"lora_dropout": 0.1})
            if watched:
                trainer.add_callback(ProvenanceCallback(trainer))
            trainer.train()
            models.append(trainer.model)
        plain, watched = (model.state_dict() for model in models)
        assert all(torch.equal(plain[name], watched[name]) for name in plain)
        assert not models[1]._forward_pre_hooks
        assert all(m.observer is None for m in models[1].modules() if isinstance(m, MonoLoraLayer))

    def test_it_lies_beside_every_saved_adapter(self, llama, token_rows, tmp_path):
        trainer = trainer_of(llama, tmp_path / "run", token_rows)
        trainer.args.save_strategy, trainer.args.save_steps = "steps", 3
        trainer.add_callback(ProvenanceCallback(trainer, TOP))
        trainer.train()
        trainer.save_model(str(tmp_path / "final"))
        contents = {path.parent.name: json.loads(path.read_text()) for path in tmp_path.rglob("provenance.json")}
        assert {name: content["step"] for name, content in contents.items()} == {
            "checkpoint-3": 3, "checkpoint-6": 6, "checkpoint-8": 8, "run": 8, "final": 8,
        }  # fmt: skip
        assert contents["final"] == contents["run"] == contents["checkpoint-8"]
        assert contents["run"]["rows"] == ROWS
        assert not [*tmp_path.rglob(".provenance*")]

    def test_a_resumed_run_equals_an_uninterrupted_one(self, llama, token_rows, tmp_path):
        whole = trainer_of(llama, tmp_path / "whole", token_rows)
        whole.args.save_strategy, whole.args.save_steps = "steps", 3
        whole.add_callback(ProvenanceCallback(whole, TOP))
        whole.train()
        resumed = trainer_of(llama, tmp_path / "whole", token_rows)
        resumed.add_callback(ProvenanceCallback(resumed, TOP))
        before = (tmp_path / "whole" / "provenance.json").read_text()
        (tmp_path / "whole" / "provenance.json").unlink()
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
        assert (tmp_path / "whole" / "provenance.json").read_text() == before

    def test_a_checkpoint_of_another_run_is_refused(self, llama, token_rows, tmp_path):
        first = trainer_of(llama, tmp_path, token_rows)
        first.args.save_strategy, first.args.save_steps = "steps", 3
        first.add_callback(ProvenanceCallback(first, TOP))
        first.train()
        checkpoint = tmp_path / "checkpoint-3"
        for top, rows, message in ((TOP + 1, token_rows, "top 3, now 4"), (TOP, token_rows[::-1], "digest '")):
            other = trainer_of(llama, tmp_path, rows)
            other.add_callback(ProvenanceCallback(other, top))
            with pytest.raises(ValueError, match=f"is of another run .*{message}"):
                other.train(resume_from_checkpoint=str(checkpoint))
        (checkpoint / "provenance.json").unlink()
        other = trainer_of(llama, tmp_path, token_rows)
        other.add_callback(ProvenanceCallback(other, TOP))
        with pytest.raises(ValueError, match=r"there is no .*checkpoint-3.provenance\.json"):
            other.train(resume_from_checkpoint=str(checkpoint))

    def test_sft_drops_columns_and_truncates(self, llama, make_tokenizer, tmp_path):
        llama.resize_token_embeddings(400)
        texts = [{"prompt": f"Sentiment: {'about ' * i}", "completion": f"positive {i}"} for i in range(6)]
        arguments = SFTConfig(
            str(tmp_path), max_length=24, max_steps=4, per_device_train_batch_size=3, report_to=[], use_cpu=True,
            save_strategy="no", bf16=False, gradient_checkpointing=False,
        )  # fmt: skip
        trainer = SFTTrainer(
            llama, arguments, train_dataset=Dataset.from_list(texts), processing_class=make_tokenizer(),
            peft_config=MonoLoraConfig(task_type="CAUSAL_LM", init_weights=False),
        )  # fmt: skip
        trainer.add_callback(ProvenanceCallback(trainer, 6))
        trainer.train()
        rows = {row for pairs in read_provenance(tmp_path).values() for row, _ in pairs}
        assert rows == set(range(6))


class TestRefused:
    @pytest.mark.parametrize("top", [0, -1, 1.5, True])
    def test_numbers_of_rows(self, top):
        with pytest.raises(ValueError, match="`top` must be a positive integer"):
            ProvenanceCallback(None, top)

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("fp16", "scales gradients by a factor that changes"),
            ("torch_compile", "compiled code skips"),
            ("packing", "a packed row is made of several"),
            ("padding_free", "one row of a batch"),
        ],
    )
    def test_options(self, llama, token_rows, tmp_path, name, message):
        trainer = trainer_of(llama, tmp_path, token_rows)
        trainer.add_callback(ProvenanceCallback(trainer))
        setattr(trainer.args, name, True)
        with pytest.raises(ValueError, match=f"does not work with {name}: .*{message}"):
            trainer.train()

    def test_a_compiled_model(self, llama, token_rows, tmp_path):
        trainer = trainer_of(llama, tmp_path, token_rows, remove_unused_columns=False)
        trainer.model = torch.compile(trainer.model, backend="eager")
        trainer.add_callback(ProvenanceCallback(trainer))
        with pytest.raises(ValueError, match=r"does not work with torch\.compile: compiled code skips"):
            trainer.train()

    def test_rows_that_the_collator_changes(self, llama, token_rows, make_tokenizer, tmp_path):
        trainer = trainer_of(llama, tmp_path, token_rows)

        def masked(features):
            batch = collator(features)
            batch["input_ids"][torch.rand(batch["input_ids"].shape) < 0.5] = 3
            return batch

        trainer.data_collator = masked
        trainer.add_callback(ProvenanceCallback(trainer))
        with pytest.raises(ValueError, match=r"rows that are none of `trainer\.train_dataset`"):
            trainer.train()

    def test_streamed_rows(self, llama, token_rows, tmp_path):
        rows = IterableDataset.from_generator(lambda: iter([{"input_ids": row} for row in token_rows]))
        trainer = trainer_of(llama, tmp_path, rows, max_steps=2)
        trainer.add_callback(ProvenanceCallback(trainer))
        with pytest.raises(ValueError, match="a streamed dataset has none"):
            trainer.train()

    def test_two_passes_before_a_backward_pass(self, llama, token_rows, tmp_path):
        trainer = trainer_of(llama, tmp_path, token_rows)

        def twice(model, inputs, return_outputs=False, num_items_in_batch=None):
            return model(**inputs).loss + model(**inputs).loss

        trainer.compute_loss = twice
        trainer.add_callback(ProvenanceCallback(trainer))
        with pytest.raises(RuntimeError, match="no backward pass between them"):
            trainer.train()

    def test_models_without_one_adapter(self, llama, token_rows, tmp_path):
        trainer = trainer_of(llama, tmp_path, token_rows)
        trainer.model.add_adapter("second", MonoLoraConfig(task_type="CAUSAL_LM"))
        trainer.model.base_model.set_adapter(["default", "second"])
        trainer.add_callback(ProvenanceCallback(trainer))
        with pytest.raises(ValueError, match="adapters default, second are active"):
            trainer.train()

    def test_files_that_are_none(self, tmp_path):
        with pytest.raises(ValueError, match="written by ProvenanceCallback in training"):
            read_provenance(tmp_path)
        (tmp_path / "provenance.json").write_text("{")
        with pytest.raises(ValueError, match="is not readable"):
            read_provenance(tmp_path)
        (tmp_path / "provenance.json").write_text("[]")
        with pytest.raises(ValueError, match="was not written by ProvenanceCallback"):
            read_provenance(tmp_path)
