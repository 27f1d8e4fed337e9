"""Small base models with random weights, of each kind that an adapter goes into."""

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.below, self.above, self.head = nn.Linear(10, 20), nn.Linear(20, 20), nn.Linear(20, 3)

    def forward(self, x):
        return self.head(torch.relu(self.above(torch.relu(self.below(x)))))


class ConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(8, 8, (2, 1), dilation=2, groups=4, bias=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.grouped(torch.relu(self.stem(x)))).mean((2, 3)))


class Signals(nn.Module):
    def __init__(self):
        super().__init__()
        self.signal, self.volume = nn.Conv1d(3, 8, 3, padding=2, dilation=2), nn.Conv3d(8, 4, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.volume(torch.relu(self.signal(x))[..., None, None]).mean((2, 3, 4)))


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(50, 10), nn.Linear(10, 3)

    def forward(self, x):
        return self.head(self.table(x))


def llama(**options):
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, **options
        )
    )  # fmt: skip


def tied_llama():
    return llama(tie_word_embeddings=True)


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32))


def bert():
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=50,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_labels=3,
        )
    )


def t5():
    return T5ForConditionalGeneration(
        T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0)
    )


EXPERTS = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
EXPERTS |= {"vocab_size": 50, "num_hidden_layers": 2, "num_local_experts": 4, "num_experts_per_tok": 2}


def mixtral():
    return MixtralForCausalLM(MixtralConfig(**EXPERTS))


def gpt_oss():
    return GptOssForCausalLM(GptOssConfig(**EXPERTS, head_dim=8))
