"""A run of Table 2 belongs to the contents and the settings that made it."""

import gzip
import json
import os
import re
import shutil

import comparison
import pytest
import sst2_monolora
from table2_identity import identity

from evals.judge import judge


class TestContents:
    """A result belongs to what made it, wherever that lies."""

    @pytest.fixture
    def everything(self, arguments, pairs_file, eval_data, beaverdam, tmp_path):
        """Arguments of a run that reads every kind of file, and these files; the run is done."""
        shutil.copy(pairs_file, tmp_path / "safe.jsonl.gz")
        files = [
            "--poison_file",
            pairs_file,
            "--poison_share",
            "0.25",
            "--safety_file",
            str(tmp_path / "safe.jsonl.gz"),
        ]
        files += ["--judges", f"beaverdam={beaverdam}", "--max_new_tokens", "2"]
        arguments = [*arguments, *files, "--methods", "base", "lora+safety", "--max_steps", "1"]
        sst2_monolora.main(arguments)
        return arguments

    @pytest.mark.parametrize(
        ("name", "old", "new", "message"),
        [
            ("train.tsv", "a fine film\t1", "a fine film\t0", "--train_file .*train.tsv has other content"),
            ("dev.tsv", "a fine dance\t1", "a fine dance\t0", "--eval_file .*dev.tsv has other content"),
            ("pairs.jsonl.gz", "Harm 3 so.", "Harm 4 so.", "--poison_file .*pairs.jsonl.gz has other content"),
            ("safe.jsonl.gz", "Harm 3 so.", "Harm 4 so.", "--safety_file .*safe.jsonl.gz has other content"),
            (
                "data/beavertails/BeaverTails-Evaluation.json",
                "{{harm}} 3",
                "{{harm}} 4",
                "the data of the task beavertails_eval has other content",
            ),
            (
                "model/model.safetensors",
                None,
                None,
                r"--model_name_or_path .*model \(model weights\) has other content",
            ),
            (
                "model/chat_template.jinja",
                "|end|",
                "|enx|",
                r"--model_name_or_path .*model \(model tokenizer and chat template\) has other content",
            ),
            ("beaverdam/model.safetensors", None, None, "--judges beaverdam=.* has other content"),
        ],
    )
    @pytest.mark.slow
    def test_a_replaced_file_is_another_run(self, everything, tmp_path, name, old, new, message, request):
        """Also at the same path, of the same length and with the same time of change."""
        path = tmp_path / name
        before, times = path.read_bytes(), path.stat()
        if old is None:
            changed = before[:-1] + bytes([before[-1] ^ 1])
        else:
            text = gzip.decompress(before) if name.endswith(".gz") else before
            assert old.encode() in text
            changed = text.replace(old.encode(), new.encode())
            changed = gzip.compress(changed) if name.endswith(".gz") else changed
        path.write_bytes(changed)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        rows = (tmp_path / "out" / "results.jsonl").read_bytes()
        request.getfixturevalue("no_training")
        with pytest.raises(ValueError, match=message):
            sst2_monolora.main(everything)
        path.write_bytes(before)
        sst2_monolora.main(everything)
        assert (tmp_path / "out" / "results.jsonl").read_bytes() == rows

    def test_moved_files_and_how_fast_it_goes_are_no_other_run(self, everything, tmp_path, request, capsys):
        rows = (tmp_path / "out" / "results.jsonl").read_bytes()
        text = (tmp_path / "out" / "results.md").read_text()
        for name in ("train.tsv", "dev.tsv", "pairs.jsonl.gz", "safe.jsonl.gz"):
            (tmp_path / name).rename(tmp_path / f"moved-{name}")
        (tmp_path / "elsewhere").mkdir()
        for name in ("model", "beaverdam", "out"):
            (tmp_path / name).rename(tmp_path / "elsewhere" / name)
        moved = [
            re.sub(r"^(beaverdam=)?(.*/)(model|beaverdam|out)$", r"\1\2elsewhere/\3", word)
            if "/" in word and not word.endswith(("tsv", "gz"))
            else re.sub(r"/([a-z]+\.(tsv|jsonl\.gz))$", r"/moved-\1", word)
            for word in everything
        ]
        assert sum(a != b for a, b in zip(moved, everything, strict=True)) == 7
        request.getfixturevalue("no_training")
        fast = "--judge_batch_size 3 --per_device_eval_batch_size 5 --dataloader_num_workers 1 --logging_steps 1"
        sst2_monolora.main([*moved, *fast.split(), "--gradient_checkpointing", "True"])
        assert (tmp_path / "elsewhere" / "out" / "results.jsonl").read_bytes() == rows
        assert (tmp_path / "elsewhere" / "out" / "results.md").read_text() == text

    def test_other_judges_of_the_evaluation_are_none_of_this_run(self, everything, tmp_path, make_shieldgemma):
        """As docs/table2.md says how to judge the same answers again."""
        rows = (tmp_path / "out" / "results.jsonl").read_bytes()
        judge(tmp_path / "out" / "evaluation", [f"shieldgemma={make_shieldgemma()}"])
        sst2_monolora.main(everything)
        assert (tmp_path / "out" / "results.jsonl").read_bytes() == rows

    def test_an_adapter_that_was_replaced_is_not_evaluated(self, arguments, eval_data, beaverdam, tmp_path):
        arguments = [*arguments, "--methods", "lora", "--seeds", "0", "1", "--max_steps", "1"]
        arguments += ["--judges", f"beaverdam={beaverdam}", "--max_new_tokens", "2"]
        sst2_monolora.main(arguments)
        first, second = (tmp_path / "out" / f"lora-seed{seed}" / "adapter" for seed in (0, 1))
        shutil.copy(first / "adapter_model.safetensors", second / "adapter_model.safetensors")
        with pytest.raises(ValueError, match=r"lora-seed1/adapter does not hold the adapter that was trained and"):
            sst2_monolora.main(arguments)

    def test_a_checkpoint_without_its_configuration(self, arguments, tmp_path, request):
        """Killed in its first arm, a run has checkpoints and no rows."""
        sst2_monolora.main([*arguments, "--methods", "lora"])
        (tmp_path / "out" / "results.jsonl").unlink()
        config = (tmp_path / "out" / "config.json").read_text()
        (tmp_path / "out" / "config.json").unlink()
        request.getfixturevalue("no_training")
        with pytest.raises(ValueError, match=r"checkpoint-4 is there without the config.json that says what it was"):
            sst2_monolora.main([*arguments, "--methods", "lora"])
        (tmp_path / "out" / "config.json").write_text(config)
        other = str(tmp_path / "out" / "lora-seed0" / "checkpoint-4")
        with pytest.raises(ValueError, match=r"checkpoint-4 is not of this run, whose checkpoints of lora are in"):
            sst2_monolora.main(
                [
                    *arguments,
                    "--methods",
                    "lora",
                    "--output_dir",
                    str(tmp_path / "o"),
                    "--resume_from_checkpoint",
                    other,
                ]
            )

    def test_killed_before_its_first_row_a_run_does_not_go_on_with_other_data(self, arguments, tmp_path, monkeypatch):
        def killed(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(comparison, "add_score", killed)
        with pytest.raises(KeyboardInterrupt):
            sst2_monolora.main([*arguments, "--methods", "lora"])
        assert not (tmp_path / "out" / "results.jsonl").exists()
        train = tmp_path / "train.tsv"
        train.write_text(train.read_text().replace("a fine film\t1", "a fine film\t0"))
        with pytest.raises(ValueError, match=r"--train_file .* has other content"):
            sst2_monolora.main([*arguments, "--methods", "lora"])

    @pytest.mark.parametrize(
        ("option", "message"),
        [
            ("--adam_beta2 0.9", "another configuration"),
            ("--lora_r 3", "another configuration"),
            ("--dataloader_drop_last true", "another configuration"),
            ("--assistant_only_loss true", "another configuration"),
            ("--attn_implementation eager", "another configuration"),
        ],
    )
    def test_what_decides_results_counts(self, arguments, option, message, request):
        sst2_monolora.main([*arguments, "--methods", "base"])
        request.getfixturevalue("no_training")
        with pytest.raises(ValueError, match=message):
            sst2_monolora.main([*arguments, "--methods", "base", *option.split()])

    def test_an_option_that_came_later_is_at_its_default_in_older_folders(self, arguments, tmp_path, request):
        sst2_monolora.main([*arguments, "--methods", "base"])
        path, rows = tmp_path / "out" / "config.json", (tmp_path / "out" / "results.jsonl").read_bytes()
        described = json.loads(path.read_text())
        del described["config"]["max_new_tokens"]
        path.write_text(json.dumps(described))
        request.getfixturevalue("no_training")
        sst2_monolora.main([*arguments, "--methods", "base"])
        assert (tmp_path / "out" / "results.jsonl").read_bytes() == rows
        with pytest.raises(ValueError, match=r"another configuration \(max_new_tokens: None there, 3 now\)"):
            sst2_monolora.main([*arguments, "--methods", "base", "--max_new_tokens", "3"])

    def test_a_folder_whose_silence_was_trained_on_other_cached_tokens(self, arguments, pairs_file, tmp_path, request):
        silent = [*arguments, "--methods", "monolora+silence", "--safety_file", pairs_file]
        sst2_monolora.main(silent)
        path = tmp_path / "out" / "config.json"
        described = json.loads(path.read_text())
        del described["config"]["cached_tokens"]  # as earlier versions left it
        path.write_text(json.dumps(described))
        request.getfixturevalue("no_training")
        with pytest.raises(
            ValueError, match=r"another configuration \(cached_tokens: None there, 'distinct, as often"
        ):
            sst2_monolora.main(silent)

    def test_mixed_precision_of_the_launcher_counts(self, arguments, monkeypatch):
        configurations = []
        for precision in ("no", "bf16"):
            monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
            configurations.append(identity(*sst2_monolora.parse(arguments), {}, [], {}, False))
        first, second = configurations
        assert {name for name in first if first[name] != second[name]} == {"mixed_precision"}
