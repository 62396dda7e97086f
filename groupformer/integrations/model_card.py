"""Fills a model card: metadata that the Hub understands, and the figures of the model itself."""

from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..measuring.cache import cache_bytes_per_token


ATTRIBUTION = (
    "Contains text from OpenStax books, by their respective authors, © Rice University, OpenStax, licensed under "
    "[CC BY 4.0](https://creativecommons.org/licenses/by/4.0/). The text was extracted from the source files and "
    "changed: images, tables, most formulas, references and teaching boilerplate were removed, and repeated "
    "paragraphs dropped. Access the books for free at https://openstax.org."
)

REGROUPED_HEADING = "## Key-value heads"


def sharing(config: Any) -> str:
    """The attention sharing in words."""
    counts = {layer.num_key_value_heads for layer in config.per_layer_config}
    if counts == {config.num_attention_heads}:
        return "multi-head attention: nothing is shared"
    if counts == {1}:
        return "multi-query attention: all query heads share one"
    if len(counts) > 1:
        return "grouped-query attention, differing by layer"
    return f"grouped-query attention: {config.num_attention_heads // counts.pop()} query heads share one"


def regrouping_lines(config: Any) -> list[str]:
    """What was done to the key-value heads, a line for each time, e.g. "9 -> 3 KV heads: svd, similar, ..."."""
    lines = []
    for entry in getattr(config, "regrouping", None) or []:
        facts = [entry[name] for name in ("method", "grouping") if name in entry]
        if entry.get("calibration_tokens"):
            facts.append(f"calibrated on {entry['calibration_tokens']:,} tokens")
        if entry.get("healing"):
            facts.append(f"healed on {entry['healing']['tokens']:,} tokens")
        line = ", ".join(facts)
        if "from" in entry:  # an entry without counts records healing alone
            ends = (entry["from"], entry["to"])
            counts = " -> ".join(str(end) if isinstance(end, int) else "by layer" for end in ends)
            line = f"{counts} KV heads: {line}; GroupFormer {entry['version']}"
        lines.append(line)
    return lines


def regrouped_card(original: str | None, config: Any) -> str:
    """The card of a regrouped checkpoint: the original's, and a section that says what was done.

    Args:
        original: Text of the original's README.md, if it has one. A section of ours in it gives way to the new one.
        config: Of the result.
    """
    text = original or "---\nlibrary_name: transformers\n---\n"
    before, _, rest = text.partition(REGROUPED_HEADING)
    _, heading, after = rest.partition("\n#")  # what others wrote behind our section stays
    lines = "\n".join(f"- {line}" for line in regrouping_lines(config))
    sentence = "The attention of this checkpoint was changed; all else is the original."
    return f"{before.rstrip()}\n\n{REGROUPED_HEADING}\n\n{sentence}\n\n{lines}\n{heading}{after}"


def card_data(model_name: str, results: dict[str, Any]) -> ModelCardData:
    """The YAML metadata of a card."""
    evaluation = EvalResult(
        task_type="text-generation",
        dataset_type="text",
        dataset_name="OpenStax textbooks, validation",
        metric_type="bits_per_byte",
        metric_name="bits per byte",
        metric_value=round(results["validation_bits_per_byte"], 4),
    )
    return ModelCardData(
        language="en",
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["groupformer", "custom_code", "grouped-query-attention"],
        model_name=model_name,
        eval_results=[evaluation],
    )


def render_card(template: str | Path, model: Any, results: dict[str, Any], recipe: Any, rows: int) -> ModelCard:
    """The card of a pre-trained model.

    Args:
        template: A Jinja template, as `hub_card/card_template.md`.
        model: The model as it is shipped.
        results: What `groupformer.training.pretraining.pretrain` returned.
        recipe: The `PretrainRecipe` of the run.
        rows: How many packed rows the training text has, to count epochs.
    """
    config, dtype = model.config, model.dtype
    names = ("num_attention_heads", "num_hidden_layers", "hidden_size", "head_dim", "max_position_embeddings")
    model_name = "groupformer-reference"
    return ModelCard.from_template(
        card_data(model_name, results),
        template_path=str(template),
        model_name=model_name,
        parameters=f"{model.num_parameters() / 1e6:.1f} million",
        num_key_value_heads=config.num_key_value_heads,
        sharing=sharing(config),
        cache_bytes_per_token=f"{cache_bytes_per_token(config, dtype):,}",
        dtype=str(dtype).removeprefix("torch."),
        vocab_size=f"{config.vocab_size:,}",
        row_length=recipe.row_length,
        steps=f"{results['steps']:,}",
        tokens_per_step=f"{results['tokens'] // results['steps']:,}",
        tokens=f"{results['tokens'] / 1e6:.1f} million",
        epochs=f"{results['tokens'] / (rows * recipe.row_length):.2f} epochs",
        attribution=ATTRIBUTION,
        validation_loss=f"{results['validation_loss']:.3f}",
        validation_bits_per_byte=f"{results['validation_bits_per_byte']:.3f}",
        **{name: getattr(config, name) for name in names},
    )
