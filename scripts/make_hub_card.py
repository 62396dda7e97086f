"""Makes `hub_card/` from a finished pre-training run: weights in bfloat16, tokenizer and card.

    python scripts/make_hub_card.py RUN recipes/reference.yaml --rows N

RUN is the output folder of `groupformer pretrain`; N is the number of packed rows of its training text.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import groupformer  # noqa: F401  registers the architecture
from groupformer.integrations.model_card import render_card
from groupformer.training.pretraining import PretrainRecipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent.parent / "hub_card")
    arguments = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(arguments.run, dtype=torch.bfloat16)
    model.config.use_cache = True  # off while training
    model.save_pretrained(arguments.output)
    AutoTokenizer.from_pretrained(arguments.run).save_pretrained(arguments.output)
    for code in arguments.output.glob("*_groupformer.py"):
        code.unlink()  # pushing and saving write it; no file of the package is in git twice
    results = json.loads((arguments.run / "results.json").read_text())
    recipe = PretrainRecipe.from_file(arguments.recipe)
    template = arguments.output / "card_template.md"
    render_card(template, model, results, recipe, arguments.rows).save(arguments.output / "README.md")
    print(f"wrote {arguments.output}: {model.num_parameters():,} parameters")


if __name__ == "__main__":
    main()
