"""Time of judging with ShieldGemma: the conversation read once for four policies, beside four independent passes.

    python benchmarks/judge.py            # 700 pairs and 4 policies on a small Gemma 2: half an hour on one core
    python benchmarks/judge.py --model google/shieldgemma-2b --dtype bfloat16

Both arms take the same batches, sorted by length, in one process, one after the other for each batch; the table has
the sums and their ratio, the largest difference of scores, and the share of padding.
"""

from __future__ import annotations

import random
import tempfile
import time

import torch
from measuring import machine, options_of
from transformers import Gemma2Config, Gemma2ForCausalLM

from evals.judges import POLICIES, EncodedPolicies, ShieldGemma
from evals.judges.base import left_padded, positions
from offline.judge import offline_judge
from offline.language_model import corpus


@torch.inference_mode()
def independent_passes(judge: ShieldGemma, batch: list[EncodedPolicies]) -> list[list[float]]:
    """The same scores from four whole prompts for each conversation, as one would write it first."""
    columns = []
    for policy in range(len(POLICIES)):
        rows = [[*encoded.shared, *encoded.endings[policy]] for encoded in batch]
        ids, mask = (tensor.to(judge.model.device) for tensor in left_padded(rows))
        logits = judge.model(
            input_ids=ids, attention_mask=mask, position_ids=positions(mask), use_cache=False, logits_to_keep=1
        ).logits[:, -1, judge.answers]
        columns.append(logits.float().softmax(-1)[:, 0].tolist())
    return [list(row) for row in zip(*columns, strict=True)]


def small_judge(folder: str) -> ShieldGemma:
    """A Gemma 2 of 7 M parameters with random weights and the offline judge's tokenizer: time needs no training."""
    tokenizer = ShieldGemma(str(offline_judge())).tokenizer
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=1024, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, query_pre_attn_scalar=64,
        max_position_embeddings=8192, sliding_window=4096, pad_token_id=0, initializer_range=0.06,
    )  # fmt: skip
    Gemma2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return ShieldGemma(folder, "float32")


def conversations(judge: ShieldGemma, number: int, tokens: tuple[int, int]) -> list[EncodedPolicies]:
    """Pairs of corpus sentences whose shared part has a number of tokens in the range."""
    rng = random.Random(0)
    sentences = [example.response for example in corpus("train")]
    pairs: list[EncodedPolicies] = []
    while len(pairs) < number:
        words = " ".join(rng.choices(sentences, k=100)).split(" ")
        encoded = judge.encode("A question?", " ".join(words[: rng.randint(tokens[0] // 2, tokens[1])]))
        if tokens[0] <= len(encoded) <= tokens[1]:
            pairs.append(encoded)
    return sorted(pairs, key=len, reverse=True)


def padding(batches: list[list[EncodedPolicies]]) -> float:
    """The share of padding in all batches."""
    paid = sum(len(batch) * max(map(len, batch)) for batch in batches)
    return 1 - sum(len(encoded) for batch in batches for encoded in batch) / paid


def main() -> None:
    """Time both arms batch by batch and print the sums."""
    parser = options_of(__doc__)
    parser.add_argument("--model", help="a ShieldGemma; by default a small Gemma 2 with random weights")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--pairs", type=int, default=700)
    parser.add_argument("--tokens", type=int, nargs=2, default=[300, 600], help="of the conversation, from and to")
    parser.add_argument("--batch_size", type=int, default=8)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        judge = ShieldGemma(options.model, options.dtype) if options.model else small_judge(folder)
        judge.load()
    print(f"{machine('transformers')}, {judge.model.dtype}")
    pairs = conversations(judge, options.pairs, tuple(options.tokens))
    batches = [pairs[i : i + options.batch_size] for i in range(0, len(pairs), options.batch_size)]
    endings = [len(ending) for ending in pairs[0].endings]
    print(f"{len(pairs)} conversations of {len(pairs[-1])} to {len(pairs[0])} tokens, policies of {endings} tokens")
    arms = {"shared": judge.scores, "independent": lambda batch: independent_passes(judge, batch)}
    for run in arms.values():
        run(batches[-1])
    seconds, largest = dict.fromkeys(arms, 0.0), 0.0
    for batch in batches:
        scores = {}
        for name, run in arms.items():
            start = time.perf_counter()
            scores[name] = torch.tensor(run(batch))  # a list of numbers, so that the GPU is done
            seconds[name] += time.perf_counter() - start
        largest = max(largest, (scores["shared"] - scores["independent"]).abs().max().item())
    print(
        f"read once: {seconds['shared']:.1f} s, four passes: {seconds['independent']:.1f} s, "
        f"ratio {seconds['shared'] / seconds['independent']:.3f}; largest difference of scores {largest:.1e}; "
        f"padding {100 * padding(batches):.1f} %"
    )


if __name__ == "__main__":
    main()
