"""A GroupFormer written a second time, from the papers' equations, in float64 and with plain loops.

It shares no code with the model: heads are visited one by one, masks are decided pair by pair, and every norm,
position and MLP is spelled out. It is slow, and meant to be read.
"""

import math

import torch


def reference_hidden_states(state: dict, config, input_ids: torch.Tensor, real: torch.Tensor | None = None):
    """Hidden states (batch, seq, hidden) after the last norm, of a state dict of `GroupFormerModel`.

    `real` (batch, seq) is 1 for real tokens and 0 for padding. Positions count real tokens.
    """
    weights = {name.removeprefix("model."): tensor.double() for name, tensor in state.items()}
    real = torch.ones_like(input_ids) if real is None else real
    rows = []
    for tokens, is_real in zip(input_ids, real):
        positions = (is_real.cumsum(0) - 1).clamp(min=0).tolist()
        hidden = weights["embed_tokens.weight"][tokens] * config.embedding_multiplier
        hidden = hidden + absolute_positions(weights, config, positions)
        if config.embedding_norm:
            hidden = norm(weights, config, "embed_norm", hidden)
        for layer_idx in range(config.num_hidden_layers):
            hidden = layer(weights, config, layer_idx, hidden, positions, is_real.tolist())
        rows.append(norm(weights, config, "norm", hidden))
    return torch.stack(rows)


def absolute_positions(weights, config, positions):
    """Learned vectors, or Vaswani et al. 2017, section 3.5: PE(p, 2i) = sin(p / 10000^(2i/d)), PE(p, 2i+1) = cos."""
    if config.position_embedding_type == "learned":
        return weights["embed_positions.weight"][positions]
    if config.position_embedding_type != "sinusoidal":
        return 0.0
    table = torch.zeros(len(positions), config.hidden_size, dtype=torch.float64)
    for row, position in enumerate(positions):
        for column in range(0, config.hidden_size, 2):
            angle = position / 10000 ** (column / config.hidden_size)
            table[row, column], table[row, column + 1] = math.sin(angle), math.cos(angle)
    return table


def norm(weights, config, name, x):
    """RMSNorm (Zhang and Sennrich 2019, eq. 4) or LayerNorm (Ba et al. 2016, eq. 4) over the last dimension."""
    weight, bias = weights[f"{name}.weight"], weights.get(f"{name}.bias")
    if config.norm_type != "layer_norm":
        weight = weight + (config.norm_type == "rms_norm_1p")
        return x / torch.sqrt((x**2).mean(-1, keepdim=True) + config.norm_eps) * weight
    centred = x - x.mean(-1, keepdim=True)
    normed = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + config.norm_eps) * weight
    return normed if bias is None else normed + bias


def linear(weights, name, x):
    y = x @ weights[f"{name}.weight"].T
    return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y


def mlp(weights, config, prefix, x):
    act = {
        "silu": lambda t: t / (1 + torch.exp(-t)),
        "gelu": lambda t: t * 0.5 * (1 + torch.erf(t / math.sqrt(2))),
        "relu": lambda t: t.clamp(min=0),
    }[config.hidden_act]
    if config.mlp_type == "gated":
        inner = act(linear(weights, f"{prefix}.gate_proj", x)) * linear(weights, f"{prefix}.up_proj", x)
    else:
        inner = act(linear(weights, f"{prefix}.up_proj", x))
    return linear(weights, f"{prefix}.down_proj", inner)


def layer(weights, config, layer_idx, hidden, positions, is_real):
    prefix = f"layers.{layer_idx}"
    scale = config.residual_multiplier

    def attend(x):
        return attention(weights, config, layer_idx, x, positions, is_real)

    def think(x):
        return mlp(weights, config, f"{prefix}.mlp", x)

    def normed(name, x):
        return norm(weights, config, f"{prefix}.{name}", x)

    if config.parallel_residual:
        first = normed("input_layernorm", hidden)
        second = first if config.shared_parallel_norm else normed("post_attention_layernorm", hidden)
        return hidden + scale * attend(first) + scale * think(second)
    if config.norm_position == "both":
        hidden = hidden + scale * normed("post_attention_layernorm", attend(normed("input_layernorm", hidden)))
        thought = think(normed("pre_feedforward_layernorm", hidden))
        return hidden + scale * normed("post_feedforward_layernorm", thought)
    if config.norm_position == "after":
        hidden = hidden + scale * normed("post_attention_layernorm", attend(hidden))
        return hidden + scale * normed("post_feedforward_layernorm", think(hidden))
    hidden = hidden + scale * attend(normed("input_layernorm", hidden))
    return hidden + scale * think(normed("post_attention_layernorm", hidden))


def may_see(config, window, query, key, is_real):
    """Whether position `query` attends to position `key`; both are indices in the row."""
    if not is_real[key]:
        return False
    if config.is_causal:
        return key <= query and (window is None or query - key < window)
    return window is None or abs(query - key) <= window


def attention(weights, config, layer_idx, x, positions, is_real):
    """Vaswani et al. 2017, eq. 1, head by head: each reads the key-value head of its group (Ainslie et al. 2023)."""
    name = f"layers.{layer_idx}.self_attn"
    layer_config = config.per_layer_config[layer_idx]
    heads, kv_heads, dim = config.num_attention_heads, layer_config.num_key_value_heads, config.head_dim
    window = layer_config.sliding_window if config.layer_types[layer_idx] == "sliding_attention" else None
    multiplier = layer_config.attention_multiplier
    scaling = dim**-0.5 if multiplier is None else multiplier
    q, k, v = (linear(weights, f"{name}.{which}_proj", x) for which in "qkv")
    if config.qk_norm == "projection":
        q, k = norm(weights, config, f"{name}.q_norm", q), norm(weights, config, f"{name}.k_norm", k)
    length, outputs = x.shape[0], []
    for head in range(heads):
        kv_head = head // (heads // kv_heads)
        query, key = q[:, head * dim : (head + 1) * dim], k[:, kv_head * dim : (kv_head + 1) * dim]
        value = v[:, kv_head * dim : (kv_head + 1) * dim]
        if config.qk_norm == "head":
            query, key = norm(weights, config, f"{name}.q_norm", query), norm(weights, config, f"{name}.k_norm", key)
        if config.position_embedding_type == "rope" and (config.no_rope_layers or [1] * 99)[layer_idx]:
            parameters = config.rope_parameters.get(config.layer_types[layer_idx], config.rope_parameters)
            query, key = (rotate(states, positions, parameters) for states in (query, key))
        output = torch.zeros(length, dim, dtype=torch.float64)
        for i in range(length):
            seen = [j for j in range(length) if may_see(config, window, i, j, is_real)]
            if not seen:
                continue  # a padding position that sees nothing: its output is not looked at
            scores = torch.stack([query[i] @ key[j] * scaling for j in seen])
            if config.position_embedding_type == "alibi":
                distances = torch.tensor([abs(positions[i] - positions[j]) for j in seen], dtype=torch.float64)
                scores = scores - slope(head, heads) * distances
            output[i] = torch.softmax(scores, 0) @ torch.stack([value[j] for j in seen])
        outputs.append(output)
    return linear(weights, f"{name}.o_proj", torch.cat(outputs, -1))


def rotate(x, positions, parameters):
    """Su et al. 2021, eq. 34: the pair (x_j, x_{j + d/2}) turned by p · theta^(-2j/d), on the first d features."""
    d = int(x.shape[-1] * parameters.get("partial_rotary_factor", 1.0))
    turned = x.clone()
    for row, position in enumerate(positions):
        for j in range(d // 2):
            angle = position * parameters["rope_theta"] ** (-2 * j / d)
            a, b = x[row, j], x[row, j + d // 2]
            turned[row, j] = a * math.cos(angle) - b * math.sin(angle)
            turned[row, j + d // 2] = b * math.cos(angle) + a * math.sin(angle)
    return turned


def slope(head, heads):
    """Press et al. 2022, section 3: a geometric sequence from 2^(-8/n), filled up from the next power of two."""
    power = 1
    while power * 2 <= heads:
        power *= 2
    if head < power:
        return 2 ** (-8 * (head + 1) / power)
    return 2 ** (-8 * (2 * (head - power) + 1) / (2 * power))
