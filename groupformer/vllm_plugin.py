"""Makes vLLM know GroupFormer: the entry point `vllm.general_plugins`, which vLLM calls in each of its processes.

The models run on vLLM's transformers backend (their own code with vLLM's attention, linear layers and KV cache), as a
Llama does under `--model-impl transformers`, but without that flag and without `trust_remote_code`.
"""

# Our classes, and the classes of vLLM's transformers backend that serve them.
BACKENDS = {
    "GroupFormerForCausalLM": "TransformersForCausalLM",
    "GroupFormerForSequenceClassification": "TransformersForSequenceClassification",
    "GroupFormerModel": "TransformersEmbeddingModel",
}


def register() -> None:
    """Registers our architectures with transformers' Auto classes and with vLLM; again changes nothing."""
    from vllm import ModelRegistry

    import groupformer  # noqa: F401  the Auto classes

    known = ModelRegistry.get_supported_archs()
    for ours, backend in BACKENDS.items():
        if ours not in known:
            ModelRegistry.register_model(ours, f"vllm.model_executor.models.transformers:{backend}")
