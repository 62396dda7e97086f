"""Recipes: training the tokenizer, pre-training, fine-tuning."""
