"""Robustness and monosemanticity of visual features."""
