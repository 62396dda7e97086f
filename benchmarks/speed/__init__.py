"""Speed of GroupFormer beside its peers: see `python -m benchmarks.speed --help`."""
