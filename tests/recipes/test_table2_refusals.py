"""What the recipes of Table 2 refuse before they train."""

import json
import re
import subprocess
import sys

import dolly_monolora
import pytest
import sst2_monolora
from transformers import AutoModelForCausalLM


@pytest.mark.usefixtures("no_training")
class TestBadInput:
    @pytest.mark.parametrize(
        ("extra", "message"),
        [
            ("--methods lora lora+x", r"--methods takes each of .*lora\+weight_decay.*got \['lora', 'lora\+x'\]"),
            ("--methods base+rank lora", r"--methods takes each of"),
            ("--methods lora lora+rank --control_rank 4", r"has lora and lora\+rank, which are the same arm"),
            ("--methods lora lora+dropout --control_dropout 0.1", r"has lora and lora\+dropout, which are the same"),
            ("--methods lora lora+weight_decay --control_weight_decay 0", r"which are the same arm"),
            ("--methods lora+rank+dropout lora+dropout+rank", r"which are the same arm"),
            ("--methods lora lora+safety --safety_file PAIRS --safety_share 0", r"which are the same arm"),
            ("--methods lora+weight_decay --control_weight_decay -1", r"--control_weight_decay is -1.0, allowed is 0"),
            ("--methods lora+dropout --control_dropout 1", r"`monolora_dropout` must lie in \[0, 1\), got 1.0"),
            ("--methods lora+rate0", r"--methods has rate0, allowed is more than 0"),
            ("--methods lora+rank --control_rank 0", r"`r` must be a positive integer, got 0"),
            ("--poison_share 1.2 --poison_file PAIRS", r"--poison_share is 1.2, allowed is a share .* from 0 to 1"),
            ("--poison_share -0.1 --poison_file PAIRS", r"--poison_share is -0.1, allowed"),
            ("--safety_share 2", r"--safety_share is 2.0, allowed"),
            (
                "--poison_share 0.9 --poison_file PAIRS",
                r"--poison_share 0.9 of 48 training rows is 43, but there are 24",
            ),
            ("--poison_share 0.1", r"--poison_share needs --poison_file"),
            ("--poison_file PAIRS", r"--poison_file without --poison_share"),
            ("--poison_share 0.1 --poison_file nowhere.jsonl", r"--poison_file nowhere.jsonl does not exist"),
            ("--methods lora+safety", r"\+safety needs --safety_file"),
            (
                "--methods lora+safety --safety_file PAIRS --safety_share 0.6 --poison_file PAIRS --poison_share 0.6",
                r"--poison_share and --safety_share are 1.2 together",
            ),
            (
                "--eval_every 5",
                r"--eval_every 5 matches no checkpoint: training takes 4 steps \(48 rows\). Give 1 to 4",
            ),
            ("--eval_every 0", r"--eval_every must be at least 1, got 0"),
            ("--judges wise", r"--judges has 'wise'; allowed are"),
            ("--safety_tasks xstest --model_revision v2", r"--model_revision v2 cannot be evaluated"),
            ("--max_new_tokens 0", r"--max_new_tokens must be at least 1, got 0"),
        ],
    )
    def test_settings(self, arguments, pairs_file, extra, message, tmp_path):
        extra = [pairs_file if word == "PAIRS" else word for word in extra.split()]
        with pytest.raises(ValueError, match=message):
            sst2_monolora.main([*arguments, *extra])
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            ([{"prompt": "a", "answer": "b"}], r"lacks the column\(s\) response; it has prompt, answer"),
            (
                [{"prompt": "a", "response": "b"}, {"prompt": "a", "response": " "}],
                r"row 2: the response is empty",
            ),
        ],
    )
    def test_a_wrong_poison_file(self, arguments, tmp_path, rows, message):
        (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        with pytest.raises(ValueError, match=message):
            sst2_monolora.main([*arguments, "--poison_file", str(tmp_path / "x.jsonl"), "--poison_share", "0.1"])

    def test_checkpoints_of_another_base(self, arguments, tmp_path, make_lora):
        folder = tmp_path / "out" / "lora-seed0" / "checkpoint-2"
        make_lora(folder, base_name="other/base")
        (folder / "trainer_state.json").write_text("{}")
        with pytest.raises(ValueError, match=r"checkpoint-2' was trained on 'other/base', not on"):
            sst2_monolora.main(arguments)

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ({"instruction": "a", "context": "", "response": "b"}, r"lacks the column\(s\) category"),
            (
                {"instruction": " ", "context": "", "response": "b", "category": "c"},
                r"row 1: the instruction is empty",
            ),
            ({"instruction": "a", "context": "", "response": "b", "category": "c"}, r"0 are held out by checksum"),
        ],
    )
    def test_wrong_dolly_files(self, small_model, tmp_path, row, message):
        (tmp_path / "x.jsonl").write_text(json.dumps(row) + "\n")
        with pytest.raises(ValueError, match=message):
            dolly_monolora.main(["--model_name_or_path", str(small_model), "--train_file", str(tmp_path / "x.jsonl")])


@pytest.fixture
def make_lora(small_model):
    """A function that saves an untrained LoRA adapter that names another base."""
    from peft import LoraConfig, get_peft_model

    def make(folder, base_name):
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(small_model), config)
        model.peft_config["default"].base_model_name_or_path = base_name
        model.save_pretrained(folder)

    return make


@pytest.mark.usefixtures("no_training")
class TestBeforeTraining:
    def test_data_of_safety_tasks(self, arguments, eval_data, tmp_path):
        (eval_data / "xstest" / "xstest_prompts.csv").unlink()
        with pytest.raises(ValueError, match=r"which has no xstest/xstest_prompts\.csv"):
            sst2_monolora.main([*arguments, "--safety_tasks", "xstest"])
        assert not (tmp_path / "out").exists()

    def test_answers_longer_than_the_context(self, arguments, eval_data):
        with pytest.raises(ValueError, match=r"asks for 4000 new tokens, but the context"):
            sst2_monolora.main([*arguments, "--safety_tasks", "xstest", "--max_new_tokens", "4000"])

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ("--eos_token a", "--model_init_kwargs, --chat_template_path and --eos_token would change the model"),
            ("--auto_find_batch_size true", "--auto_find_batch_size would train arms with different batches"),
            ("--load_in_4bit true", "--load_in_4bit is evaluated as NF4 with double quantisation"),
        ],
    )
    def test_options_that_change_one_side(self, arguments, options, message):
        with pytest.raises(ValueError, match=message):
            sst2_monolora.main([*arguments, *options.split()])

    def test_a_folder_that_another_process_holds(self, arguments, tmp_path):
        hold = "import sys, time, vision_bench.runs as runs\nrun = runs.Run(sys.argv[1], 'sst2_monolora', {})\n"
        hold += "with runs.locked(run.folder):\n    print('held', flush=True)\n    time.sleep(600)\n"
        command = [sys.executable, "-c", hold, str(tmp_path / "out")]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout.readline() == "held\n"
                with pytest.raises(ValueError, match=r"Another process is working in .*out; wait for it, or stop it"):
                    sst2_monolora.main(arguments)
            finally:
                process.kill()

    @pytest.mark.parametrize("recipe", ["sst2_monolora", "dolly_monolora"])
    def test_errors_end_in_one_line(self, recipe, small_model, tmp_path):
        """As a program; the folder cannot be created below a file."""
        (tmp_path / "file").write_text("")
        rows = [{"instruction": f"Say {i}", "context": "", "response": "so", "category": "qa"} for i in range(60)]
        (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / "x.csv").write_text("sentence,label\na,0\nb,1\n")
        data = ["--train_file", str(tmp_path / ("x.csv" if recipe == "sst2_monolora" else "x.jsonl"))]
        data += ["--eval_file", str(tmp_path / "x.csv")] if recipe == "sst2_monolora" else []
        command = [sys.executable, f"recipes/{recipe}.py", "--model_name_or_path", str(small_model), *data]
        command += ["--output_dir", str(tmp_path / "file" / "out"), "--max_steps", "1", "--max_new_tokens", "2"]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 1
        assert "Traceback" not in result.stderr
        assert re.search(r"Error: .*file.out", result.stderr.splitlines()[-1])
