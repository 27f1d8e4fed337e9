"""Tasks of lm-eval on the offline corpus: YAML files, their data and metric."""
