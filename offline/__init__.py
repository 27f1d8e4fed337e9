"""The offline world: a small language model, its generated corpus, and its judge, built in minutes without a hub."""
