"""Which native tensors become which of ours: a plan of small groups, made from the tables before any data is read.

The names and shapes of both sides come from the models themselves, built without storage on torch's `meta` device. A
plan covers both sides completely, or there is no plan: no weight is forgotten or invented.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..families.family import Family, Weights
from ..families.operations import RENAME, Context, Operation
from ..model import modeling_groupformer as ours_module
from ..model.configuration_groupformer import GroupFormerConfig


Shapes = dict[str, tuple[int, ...]]

# The kinds of model: our class, and transformers' table of native classes.
KINDS: dict[str, tuple[type[PreTrainedModel], str]] = {
    "ForCausalLM": (ours_module.GroupFormerForCausalLM, "MODEL_FOR_CAUSAL_LM_MAPPING"),
    "ForSequenceClassification": (
        ours_module.GroupFormerForSequenceClassification,
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    ),
    "ForTokenClassification": (
        ours_module.GroupFormerForTokenClassification,
        "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",
    ),
    "ForQuestionAnswering": (ours_module.GroupFormerForQuestionAnswering, "MODEL_FOR_QUESTION_ANSWERING_MAPPING"),
    "Model": (ours_module.GroupFormerModel, "MODEL_MAPPING"),
}

# Heads beside the base model, native stem to ours.
HEADS = {"lm_head": "lm_head", "score": "score", "classifier": "score", "qa_outputs": "qa_outputs"}


@dataclass(frozen=True)
class Group:
    """The smallest piece that is converted by itself: these native tensors are these of ours."""

    native: tuple[str, ...]
    ours: tuple[str, ...]
    operation: Operation
    context: Context

    def to_ours(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        return self.operation.to_ours(tensors, self.context)

    def to_native(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        return self.operation.to_native(tensors, self.context)


@dataclass(frozen=True)
class Plan:
    """All groups of a model, and the names and shapes of both sides (without tied copies)."""

    groups: list[Group]
    native_shapes: Shapes
    our_shapes: Shapes
    native_prefix: str


def native_class(family: Family, kind: str) -> type[PreTrainedModel]:
    """The native model class of a kind, e.g. `LlamaForCausalLM`.

    Raises:
        ValueError: transformers has no such class for the family.
    """
    mapping = getattr(modeling_auto, KINDS[kind][1])
    config_class = CONFIG_MAPPING[family.model_type]
    if config_class in mapping:
        return mapping[config_class]
    raise ValueError(f"transformers has no {kind} of {family.model_type}; convert another kind of model")


def kind_of(class_name: str | None) -> str:
    """The kind of model of a class name; without one, a causal language model.

    Raises:
        ValueError: a kind of model that GroupFormer does not have.
    """
    if class_name is None or class_name.endswith("LMHeadModel"):
        return "ForCausalLM"
    for kind in KINDS:
        if class_name.endswith(kind) and "DoubleHeads" not in class_name:
            return kind
    raise ValueError(f"architectures ({class_name!r}) has no counterpart here; choose one of {', '.join(KINDS)}")


def shapes_of(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> Shapes:
    """Names and shapes of a model's tensors as a file holds them: a tied head is not stored."""
    with torch.device("meta"):
        model = model_class(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    return shapes


def rotary_dim_of(config: GroupFormerConfig) -> int:
    """Leading features of a head that RoPE rotates; 0 without RoPE."""
    if not config.rope_parameters:
        return 0
    return int((config.head_dim or 0) * float(config.rope_parameters.get("partial_rotary_factor") or 1.0))


def make_group(
    native: tuple[str, ...], ours: tuple[str, ...], operation: Operation, config: GroupFormerConfig, our_shapes: Shapes
) -> Group:
    rows = tuple(our_shapes[name][0] for name in ours)
    return Group(native, ours, operation, Context(config.head_dim or 0, rotary_dim_of(config), rows))


def build_plan(family: Family, kind: str, native_config: PreTrainedConfig, our_config: GroupFormerConfig) -> Plan:
    """The plan for one model.

    Raises:
        RuntimeError: the tables do not cover a tensor of either side (an error in the tables).
    """
    native_model, our_model = native_class(family, kind), KINDS[kind][0]
    native_shapes, our_shapes = shapes_of(native_model, native_config), shapes_of(our_model, our_config)
    bare = kind == "Model"
    prefix = "" if bare else f"{native_model.base_model_prefix}."
    our_prefix = "" if bare else "model."
    stems = [
        (prefix + native, [our_prefix + stem for stem in weights.stems], weights.operation)
        for native, weights in expand(family.weights, our_config.num_hidden_layers)
    ]
    stems += [(native, [ours], RENAME) for native, ours in HEADS.items()]
    groups = []
    for native_stem, our_stems, operation in stems:
        for suffix in (".weight", ".bias"):
            ours = tuple(stem + suffix for stem in our_stems)
            if native_stem + suffix in native_shapes and all(name in our_shapes for name in ours):
                groups.append(make_group((native_stem + suffix,), ours, operation, our_config, our_shapes))
    check_all_covered(native_shapes, (name for group in groups for name in group.native), family.model_type)
    check_all_covered(our_shapes, (name for group in groups for name in group.ours), "groupformer")
    return Plan(groups, native_shapes, our_shapes, prefix)


def plan_of_same_names(kind: str, our_config: GroupFormerConfig) -> Plan:
    """The plan for a checkpoint whose tensors have the names and shapes of ours."""
    shapes = shapes_of(KINDS[kind][0], our_config)
    groups = [make_group((name,), (name,), RENAME, our_config, shapes) for name in shapes]
    return Plan(groups, shapes, shapes, "model.")


def expand(table: Mapping[str, str | Weights], num_layers: int) -> Iterable[tuple[str, Weights]]:
    """A weight table with layer numbers for `*`, in the model's order: embeddings, layers, the rest."""
    rows = [(name, row if isinstance(row, Weights) else Weights(row)) for name, row in table.items()]
    layered = [row for row in rows if "*" in row[0]]
    first = rows.index(layered[0])
    yield from rows[:first]
    for layer in range(num_layers):
        for name, row in layered:
            stems = tuple(stem.replace("*", str(layer)) for stem in row.stems)
            yield name.replace("*", str(layer)), Weights(stems, row.operation)
    yield from (row for row in rows[first:] if "*" not in row[0])


def check_all_covered(shapes: Shapes, covered: Iterable[str], side: str) -> None:
    counted = list(covered)
    missing = sorted(set(shapes) - set(counted))
    if missing or len(counted) != len(set(counted)):
        raise RuntimeError(f"the weight table of {side} does not cover each tensor once: {', '.join(missing[:5])}")


# Names as files hold them --------------------------------------------------------------------------------------------


# What older files hold beside weights, of any dtype: causal masks and what fills them, RoPE's frequencies and tables,
# ALiBi's biases, positions.
BUFFERS = re.compile(
    r"(^|\.)(inv_freq|original_inv_freq|cos_cached|sin_cached|position_ids|alibi|attn_bias|causal_mask)$"
    r"|\.(attn|attention|self_attn|self_attention)\.(bias|masked_bias)$"
)


def is_buffer(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor that no module has was a buffer; a vector named `attention.bias` would be a weight."""
    is_mask = len(shape) < 1 or shape == (1,) or (len(shape) > 1 and shape[-1] == shape[-2])
    return BUFFERS.search(name) is not None and (is_mask or not name.endswith(".bias"))


def native_name(name: str, shape: tuple[int, ...], plan: Plan, family: Family) -> str | None:
    """Today's name of a native file's tensor; None for what was never a weight.

    Older files lack or add the base model's prefix, or use older names. Unknown names stay as they are.
    """
    known = name
    for pattern, replacement in family.legacy_names.items():
        known = re.sub(pattern, replacement, known)
    candidates = (known, plan.native_prefix + known, re.sub(r"^(model|transformer|gpt_neox)\.", "", known))
    for candidate in candidates:
        if candidate in plan.native_shapes:
            return candidate
    return None if is_buffer(name, shape) else known


def check_tensors(found: Shapes, expected: Shapes, where: str) -> None:
    """Refuses a checkpoint whose tensors are not the expected ones.

    Raises:
        ValueError: a missing, unexpected or wrongly shaped tensor, by name.
    """
    for problem, names in (
        ("lacks", sorted(set(expected) - set(found))),
        ("has the unknown", sorted(set(found) - set(expected))),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(f"{where} {problem} {', '.join(names[:3])}{more}: it does not fit its config.json")
    for name, shape in expected.items():
        if found[name] != shape:
            raise ValueError(f"{where}: {name} has shape {found[name]}, but its config.json gives {shape}")
