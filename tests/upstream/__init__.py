"""Transformers' own common tests, run on GroupFormer: see scripts/upstream_tests.py."""
