"""Alignment and task evaluation: prompts, the offline world, tasks and judges."""
