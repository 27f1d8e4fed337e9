"""sst2_monolora.py in this process, on a small local model and files."""

import json
import re

import comparison
import pytest
import sst2_monolora
from arms import adapter_config, trained_arms
from peft import PeftConfig
from transformers import AutoTokenizer

from mono_peft import MonoLoraConfig
from vision_bench.runs import read_rows


@pytest.fixture
def arguments(small_model, sentiment_files, tmp_path):
    options = "--max_steps 3 --per_device_train_batch_size 8 --lora_r 4 --lora_alpha 8 --gradient_checkpointing False"
    model = ["--model_name_or_path", str(small_model), "--output_dir", str(tmp_path / "out")]
    return [*model, *sentiment_files, *options.split()]


def test_three_arms_two_seeds(arguments, tmp_path, capsys):
    sst2_monolora.main([*arguments, "--seeds", "0", "1"])
    rows = read_rows(tmp_path / "out" / "results.jsonl")
    cells = [(r["metric"], r["config"]["method"], r["seed"]) for r in rows]
    assert cells == [
        ("accuracy", "base", None),
        *[
            cell
            for seed in (0, 1)
            for cell in (
                ("accuracy", "lora", seed),
                ("task_sparsity", "monolora", seed),
                ("dead_units", "monolora", seed),
                ("accuracy", "monolora", seed),
            )
        ],
    ]
    assert all(0 <= r["value"] <= 1 for r in rows)
    assert all(r["n"] == 16 for r in rows)
    assert all(0 < r["value"] < 1 for r in rows if r["metric"] == "task_sparsity")
    table = (tmp_path / "out" / "results.md").read_text()
    assert "| monolora |" in table
    assert "94.84" in table
    assert "MonoLoRA - LoRA, paired by seed" in table
    assert "demonstration" not in table
    shown = capsys.readouterr().out
    assert "Training and scoring monolora-seed1 (5 of 5, about" in shown
    _, shown = shown.split("\nTable 2, SST-2\n")
    assert max(map(len, shown.splitlines()[:-1])) <= 100
    assert re.search(r"In accuracy the base has [\d.]+ %, lora has [\d.]+ %, monolora has [\d.]+ %;", shown)
    assert "No prompts were asked that tell of harm." in shown
    assert shown.endswith(f"{tmp_path / 'out' / 'results.md'}\n")

    first, second = (tmp_path / "out" / f"monolora-seed{seed}" / "adapter" for seed in (0, 1))
    config = PeftConfig.from_pretrained(first)
    assert isinstance(config, MonoLoraConfig)
    assert (config.r, config.monolora_alpha) == (4, 8)
    assert (first / "adapter_model.safetensors").read_bytes() != (second / "adapter_model.safetensors").read_bytes()
    logged = json.loads((tmp_path / "out" / "monolora-seed0" / "checkpoint-3" / "trainer_state.json").read_text())
    assert logged["max_steps"] == 3


def test_the_same_configuration_reprints_and_another_is_refused(arguments, tmp_path, monkeypatch, capsys, request):
    sst2_monolora.main([*arguments, "--methods", "monolora"])
    before = (tmp_path / "out" / "results.jsonl").read_bytes()
    table = (tmp_path / "out" / "results.md").read_text()
    capsys.readouterr()
    request.getfixturevalue("no_training")
    sst2_monolora.main([*arguments, "--methods", "monolora"])
    assert (tmp_path / "out" / "results.jsonl").read_bytes() == before
    assert (tmp_path / "out" / "results.md").read_text() == table
    assert "In accuracy monolora has " in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"another configuration \(training: .*'learning_rate': 0\.1"):
        sst2_monolora.main([*arguments, "--methods", "monolora", "--learning_rate", "0.1"])
    assert (tmp_path / "out" / "results.jsonl").read_bytes() == before


def test_arms_share_everything_but_the_adapter(arguments):
    settings, training, options = sst2_monolora.parse(
        [*arguments, "--lora_dropout", "0.3", "--use_rslora", "true", "--lora_target_modules", "q_proj"]
    )
    arms = trained_arms(settings, training, options)
    lora, mono = (adapter_config(arms[method], settings, options) for method in ("lora", "monolora"))
    assert (lora.r, lora.lora_alpha, lora.lora_dropout, lora.use_rslora) == (4, 8, 0.3, True)
    assert (mono.r, mono.monolora_alpha, mono.monolora_dropout, mono.use_rslora) == (4, 8, 0.3, True)
    assert lora.target_modules == mono.target_modules == {"q_proj"}


def test_a_model_that_can_think_is_trained_and_scored_without_thoughts(arguments, small_model, monkeypatch):
    (small_model / "chat_template.jinja").write_text(
        "{% for m in messages %}<|{{ m['role'] }}|>{% if m['role'] == 'assistant' %}<think></think>{{ m['content'] }}"
        "<|end|>{% else %}{{ m['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>"
        "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}"
    )
    trained = []
    real = comparison.finetuning

    def finetuning(*args):
        trainer = real(*args)
        trained.append(trainer.train_dataset[0])
        return trainer

    monkeypatch.setattr(comparison, "finetuning", finetuning)
    sst2_monolora.main([*arguments, "--methods", "lora"])
    tokenizer = AutoTokenizer.from_pretrained(small_model)
    labels = [i for i, label in zip(trained[0]["input_ids"], trained[0]["labels"], strict=True) if label != -100]
    assert "think" in tokenizer.decode(trained[0]["input_ids"])
    assert "think" not in tokenizer.decode(labels)


def test_the_paper_configuration():
    settings, training, options = sst2_monolora.parse(["--config", "recipes/configs/paper_sst2.yaml"])
    assert options.model_name_or_path == "meta-llama/Llama-2-7b-chat-hf"
    assert settings.dataset_name == "stanfordnlp/sst2"
    assert (options.lora_r, options.lora_alpha, options.lora_dropout) == (8, 4, 0.1)
    assert options.lora_target_modules == ["q_proj", "v_proj"]
    assert (settings.train_samples, settings.eval_samples) == (5000, 1000)
    assert training.num_train_epochs == 20
    assert training.per_device_train_batch_size == 16
    assert training.learning_rate == 1e-4
    overridden = sst2_monolora.parse(["--config", "recipes/configs/paper_sst2.yaml", "--learning_rate", "0.5"])
    assert overridden[1].learning_rate == 0.5


def test_the_command_line_overrides_the_offline_default():
    settings, training, options = sst2_monolora.parse(["--lora_r", "3"])
    assert options.model_name_or_path is None
    assert options.lora_r == 3
    assert settings.train_samples
    assert not training.gradient_checkpointing


@pytest.mark.usefixtures("no_training")
class TestBadInput:
    @pytest.mark.parametrize(
        ("extra", "error", "message"),
        [
            ("--methods lora dora", ValueError, r"--methods takes each of base, lora, monolora at most once"),
            ("--methods lora lora", ValueError, r"--methods takes each of"),
            ("--seeds 1 1", ValueError, r"--seeds takes different integers, got \[1, 1\]"),
            ("--use_peft true", ValueError, r"--use_peft contradicts the arm `base`"),
            ("--use_dora true", ValueError, r"--use_dora cannot be honoured by MonoLoRA"),
            ("--lora_target_parameters a.b", ValueError, r"--lora_target_parameters cannot be honoured"),
            ("--activation gelu", ValueError, r"`activation` must be one of relu"),
            ("--lora_r 0", ValueError, r"`r` (must be a positive integer|should be a positive)"),
            ("--methods monolora --lora_r -2", ValueError, r"`r` must be a positive integer, got -2"),
            ("--methods monolora --lora_alpha 0", ValueError, r"`monolora_alpha` must be a positive"),
            ("--methods monolora --lora_dropout 1.5", ValueError, r"`monolora_dropout` must lie in \[0, 1\)"),
            ("--methods monolora --lora_target_modules query", ValueError, r"Target modules query not found.*q_proj"),
            ("--methods monolora --lora_target_modules norm", TypeError, r"'model\.norm'"),
            ("--lora_target_modules query", ValueError, r"Target modules query not found.*q_proj"),
            (
                "--methods lora --lora_alpha -3",
                ValueError,
                r"`monolora_alpha` must be a positive, finite number, got -3",
            ),
            ("--methods lora --lora_dropout 1.5", ValueError, r"`monolora_dropout` must lie in \[0, 1\), got 1.5"),
            ("--seed 5", ValueError, r"--seed 5: the seeds of the runs are --seeds"),
            ("--max_length 20", ValueError, r"--max_length 20 cuts off answers: the longest row has \d+ tokens"),
            ("--completion_only_loss false", ValueError, r"--completion_only_loss false: the loss is on the answers"),
            ("--train_samples 1", ValueError, r"--train_samples must be at least 2, got 1"),
            ("--train_samples 9999", ValueError, r"--train_samples 9999, but there are 48 training sentences"),
            ("--eval_samples 0", ValueError, r"--eval_samples must be at least 2, got 0"),
            ("--dataset_name glue", ValueError, r"--dataset_name and --train_file are two sources"),
            ("--packing true", ValueError, r"--packing is for long texts"),
            ("--model_name_or_path meta-llama/Llama-2-7b-chat-hf", ValueError, r"needs network access.*hf auth login"),
            ("--model_name_or_path /no/such/folder", ValueError, r"Cannot load the model '/no/such/folder'"),
            (
                "--resume_from_checkpoint x",
                ValueError,
                r"--resume_from_checkpoint x names one checkpoint, but there are",
            ),
            ("--methods lora --resume_from_checkpoint x", ValueError, r"x is not a whole checkpoint"),
        ],
    )
    def test_settings(self, arguments, extra, error, message, tmp_path):
        with pytest.raises(error, match=message):
            sst2_monolora.main([*arguments, *extra.split()])
        assert not (tmp_path / "out").exists()

    def test_a_folder_that_is_no_model(self, arguments, tmp_path):
        (tmp_path / "empty").mkdir()
        with pytest.raises(ValueError, match=r"Cannot load the model '.*empty'.*lacks a model's or tokenizer's files"):
            sst2_monolora.main([*arguments, "--model_name_or_path", str(tmp_path / "empty")])

    def test_a_model_that_always_thinks(self, arguments, small_model, tmp_path):
        template = small_model / "chat_template.jinja"
        template.write_text(template.read_text() + "<think>{# </think> #}")
        with pytest.raises(ValueError, match=r"opens a thought \(<think>\) in every prompt .* it cannot be finetuned"):
            sst2_monolora.main(arguments)
        assert not (tmp_path / "out").exists()

    def test_model_without_data(self, small_model):
        with pytest.raises(ValueError, match=r"--model_name_or_path needs data: --dataset_name"):
            sst2_monolora.main(["--model_name_or_path", str(small_model)])

    def test_one_file_alone(self, arguments):
        index = arguments.index("--eval_file")
        with pytest.raises(ValueError, match="--train_file and --eval_file belong together"):
            sst2_monolora.main(arguments[:index] + arguments[index + 2 :])

    def test_a_data_file_without_the_columns(self, arguments, tmp_path):
        (tmp_path / "dev.tsv").write_text("text\tlabel\na\t1\n")
        with pytest.raises(ValueError, match=r"dev\.tsv lacks the column\(s\) sentence"):
            sst2_monolora.main(arguments)


class TestCheckpoint:
    def make(self, folder, *steps, whole=True):
        for step in steps:
            (folder / f"checkpoint-{step}").mkdir(parents=True)
            if whole:
                (folder / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")

    def test_the_newest_whole_one(self, tmp_path):
        assert comparison.checkpoint(tmp_path, None) is None
        self.make(tmp_path, 9, 10)
        self.make(tmp_path, 11, whole=False)
        self.make(tmp_path, 12)
        (tmp_path / "checkpoint-12" / "trainer_state.json").write_text("")  # killed between opening and writing
        for wish in (None, True, "True", "true"):
            assert comparison.checkpoint(tmp_path, wish) == str(tmp_path / "checkpoint-10")

    def test_wishes(self, tmp_path):
        self.make(tmp_path, 9)
        assert comparison.checkpoint(tmp_path, "False") is None
        assert comparison.checkpoint(tmp_path, "some/checkpoint-3") == "some/checkpoint-3"
