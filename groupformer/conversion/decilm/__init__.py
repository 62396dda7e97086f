"""A Llama whose layers differ in their key-value heads, for engines that know that as `DeciLMForCausalLM`."""
