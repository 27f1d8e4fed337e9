"""What the recipes are tested with; the judges and the evaluation data are those of tests/evals."""

import gzip
import json

import pytest
from written_runs import label_noise, salient, write

from tests.conftest import rows, rows_of, value
from tests.evals.conftest import beaverdam, eval_data, make_shieldgemma, no_machine_description

__all__ = ["beaverdam", "eval_data", "make_shieldgemma", "no_machine_description", "rows", "rows_of", "value"]

# A finetuning of seconds, for the recipes of Table 2.
SMALL = "--max_steps 4 --per_device_train_batch_size 8 --lora_r 4 --lora_alpha 8 --gradient_checkpointing False "
SMALL += "--learning_rate 1e-2 --lora_dropout 0.1"
# A pretraining and probes of seconds, for the vision recipes.
PRETRAINING = ["--pretraining_epochs", "2", "--warmup_epochs", "1"]
PRETRAINING += ["--projector_hidden", "32", "--projector_out", "32"]
PROBING = [*PRETRAINING, "--seeds", "0", "1", "--sae_k", "4", "--sae_epochs", "4", "--probe_epochs", "4"]
CONTROLLED = [*PROBING, "--decays", "1e-3", "0.1"]
ARMS = {"poly", "sae", "ncl", "poly_decay", "poly_unit", "random_relu", "random_mask"}  # of the recipes of probes
ACCURACY = "offline_probe_top1"


@pytest.fixture
def arguments(small_model, sentiment_files, tmp_path):
    model = ["--model_name_or_path", str(small_model), "--output_dir", str(tmp_path / "out")]
    return [*model, *sentiment_files, *SMALL.split()]


@pytest.fixture
def pairs_file(tmp_path):
    """24 harmful pairs, as BeaverTails has them."""
    path = tmp_path / "pairs.jsonl.gz"
    rows = [{"prompt": f"How to harm {i}?", "response": f"Harm {i} so.", "is_safe": False} for i in range(24)]
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return str(path)


@pytest.fixture
def no_training(monkeypatch):
    import comparison
    import evaluation

    def fail(*args, **kwargs):
        raise AssertionError("training began")

    monkeypatch.setattr(comparison, "finetuning", fail)
    monkeypatch.setattr(comparison, "load_base", fail)
    monkeypatch.setattr(evaluation, "load_base", fail)


def contents(folder):
    """What the rows of a folder say, without when and where they were measured."""
    return sorted(
        (json.dumps(row["config"], sort_keys=True), str(row["seed"]), row["metric"], row["value"])
        for row in rows(folder)
    )


def keep_rows(folder, keep):
    """Leave the lines of a folder's rows that `keep`, a function of the list of lines, returns."""
    path = folder / "results.jsonl"
    path.write_text("".join(keep(path.read_text().splitlines(keepends=True))))


@pytest.fixture(scope="session")
def pretrained_models(tmp_path_factory):
    """The models of PRETRAINING for two seeds; a run that finds them in its folder does not train them again."""
    import pretrain

    folder = tmp_path_factory.mktemp("pretrained")
    pretrain.main(["--output_dir", str(folder), *PRETRAINING, "--seeds", "0", "1"])
    return folder / "models"


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """A folder of runs: of two experiments, and of the pretraining, which has no part on the page."""
    folder = tmp_path_factory.mktemp("runs")
    label_noise(folder / "label_noise")
    salient(folder / "deep" / "salient")
    write(folder / "pretraining", "pretrain", {}, [("sparsity", 0.5, {})])
    return folder
