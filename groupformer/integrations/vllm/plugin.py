"""Makes vLLM know GroupFormer: the entry point `vllm.general_plugins`, which vLLM calls in each of its processes.

The models run on vLLM's transformers backend (their own code with vLLM's attention, linear layers and KV cache), as a
Llama does under `--model-impl transformers`, but without that flag and without `trust_remote_code`. Nothing here
imports vLLM before it calls.
"""

from typing import Any


MODELS = (
    "GroupFormerForCausalLM",
    "GroupFormerForSequenceClassification",
    "GroupFormerForTokenClassification",
)


def register() -> None:
    """Registers our architectures with transformers' Auto classes and with vLLM; again changes nothing."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

    import groupformer  # noqa: F401  the Auto classes

    class GroupFormerVllmConfig(VerifyAndUpdateConfig):
        """vLLM calls these two when its configuration is made, before any weight is loaded."""

        @staticmethod
        def verify_and_update_model_config(model_config: Any) -> None:
            choose_pooling(model_config)

        @staticmethod
        def verify_and_update_config(vllm_config: Any) -> None:
            check_vllm_can_serve(vllm_config)

    known = ModelRegistry.get_supported_archs()
    for name in MODELS:
        if name not in known:  # named, not imported: vLLM inspects its models in a process of their own
            ModelRegistry.register_model(name, f"groupformer.integrations.vllm.models:{name}")
        MODELS_CONFIG_MAP[name] = GroupFormerVllmConfig


def choose_pooling(model_config: Any) -> None:
    """Sequences are read as our head reads them: at the last token, or as the mean if the model is bidirectional."""
    pooler_config = model_config.pooler_config
    if pooler_config is not None and not model_config.hf_config.is_causal:
        pooler_config.seq_pooling_type = "MEAN"


def check_vllm_can_serve(vllm_config: Any) -> None:
    """Raises where vLLM would compute something else than the model, or fail without saying why.

    Raises:
        ValueError: names the field, its value and the remedy.
    """
    config = vllm_config.model_config.hf_config
    for check in CHECKS:
        check(config, vllm_config.model_config, vllm_config.parallel_config)


def check_generation(config: Any, model_config: Any, parallel_config: Any) -> None:
    if not config.is_causal and model_config.runner_type == "generate":
        raise ValueError(
            "is_causal (False) makes this model bidirectional: it cannot generate; set is_causal=True, or serve it "
            "with a classification head"
        )


def check_bidirectional(config: Any, model_config: Any, parallel_config: Any) -> None:
    if config.is_causal:
        return
    if "sliding_attention" in config.layer_types:
        raise ValueError(
            "layer_types has 'sliding_attention' and is_causal is False: vLLM's bidirectional attention has no window "
            "to both sides; serve it with transformers"
        )


def check_tensor_parallel(config: Any, model_config: Any, parallel_config: Any) -> None:
    ranks = parallel_config.tensor_parallel_size
    if config.qk_norm == "projection" and ranks > 1:
        raise ValueError(
            f"qk_norm ({config.qk_norm!r}) needs all heads on one rank, but tensor_parallel_size is {ranks}, and "
            "vLLM's transformers backend splits heads; set it to 1, or serve it with transformers"
        )
    config.check_tensor_parallel(ranks)


def check_pipeline_parallel(config: Any, model_config: Any, parallel_config: Any) -> None:
    if parallel_config.pipeline_parallel_size > 1:
        config.check_pipeline_parallel()


CHECKS = (
    check_generation,
    check_bidirectional,
    check_tensor_parallel,
    check_pipeline_parallel,
)
