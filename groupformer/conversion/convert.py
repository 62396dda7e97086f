"""The conversion itself, the same for models in memory and for folders: a direction, a plan, group by group."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..families.family import Family
from ..families.registry import FAMILIES, family_named
from ..model.configuration_groupformer import GroupFormerConfig
from .checkpoint import Entry, Source
from .configs import read_config, write_config
from .decilm.configs import read_decilm_config
from .decilm.configuration_decilm import DeciLMConfig
from .weights import (
    KINDS,
    Group,
    Plan,
    Shapes,
    build_plan,
    check_tensors,
    kind_of,
    native_class,
    native_name,
    plan_of_same_names,
)


@dataclass(frozen=True)
class Conversion:
    """The conversion of a model, native to ours or back: the result's config and class, and the groups of tensors."""

    family: Family
    kind: str
    to_ours: bool
    native_config: PreTrainedConfig
    our_config: GroupFormerConfig
    plan: Plan

    @property
    def config(self) -> PreTrainedConfig:
        """The result's config."""
        return self.our_config if self.to_ours else self.native_config

    @property
    def model_class(self) -> type[PreTrainedModel]:
        """The result's class."""
        return KINDS[self.kind][0] if self.to_ours else native_class(self.family, self.kind)

    @property
    def source_shapes(self) -> Shapes:
        return self.plan.native_shapes if self.to_ours else self.plan.our_shapes

    @property
    def target_shapes(self) -> Shapes:
        return self.plan.our_shapes if self.to_ours else self.plan.native_shapes

    def sides(self, group: Group) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """A group's names: those read, and those written."""
        return (group.native, group.ours) if self.to_ours else (group.ours, group.native)

    def convert(self, group: Group, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        return group.to_ours(tensors) if self.to_ours else group.to_native(tensors)


def plan_import(native_config: PreTrainedConfig, class_name: str | None) -> Conversion:
    """Plan the conversion of a native config and model class name to ours.

    Raises:
        ValueError: an unknown or refused family, kind of model, or field.
    """
    if isinstance(native_config, DeciLMConfig):
        our_config = read_decilm_config(native_config)
        plan = plan_of_same_names("ForCausalLM", our_config)
        return Conversion(FAMILIES["llama"], "ForCausalLM", True, native_config, our_config, plan)
    family, kind = family_named(native_config.model_type), kind_of(class_name)
    our_config = read_config(native_config, family)
    plan = build_plan(family, kind, native_config, our_config)
    return Conversion(family, kind, True, native_config, our_config, plan)


def plan_export(our_config: GroupFormerConfig, class_name: str | None, family_name: str | None) -> Conversion:
    """Plan the conversion of ours to a native family, by default the one it came from.

    Raises:
        ValueError: no family is known for this model, or the family cannot express one of its fields.
    """
    if family_name is None and our_config.family is None:
        able = ", ".join(families_for(our_config)) or "none"
        raise ValueError(f"this model was not imported, so family (None) is needed; those that can express it: {able}")
    family, kind = family_named(family_name or our_config.family), kind_of(class_name)
    native_config = write_config(our_config, family)
    plan = build_plan(family, kind, native_config, our_config)
    return Conversion(family, kind, False, native_config, our_config, plan)


def families_for(config: GroupFormerConfig, among: Iterable[str] = FAMILIES) -> list[str]:
    """The families that express a config exactly."""
    able = []
    for name in among:
        try:
            write_config(config, FAMILIES[name])
        except ValueError:
            continue
        able.append(name)
    return able


def source_names(conversion: Conversion, source: Source) -> dict[str, str]:
    """The plan's names of a source's tensors, mapped to the source's own names.

    Raises:
        ValueError: the source does not hold what its config says, or holds a weight that is no float.
    """
    names: dict[str, str] = {}
    for name, entry in source.entries.items():
        known = native_name(name, entry.shape, conversion.plan, conversion.family) if conversion.to_ours else name
        if known is not None:
            names[known] = name
            if known in conversion.source_shapes and not entry.dtype.is_floating_point:
                dtype = str(entry.dtype).removeprefix("torch.")
                raise ValueError(
                    f"{source.where}: {name} has dtype {dtype}, but weights are floats; "
                    "use the checkpoint from before it was quantized"
                )
    drop_tied_head(conversion, source, names)
    found = {known: source.entries[name].shape for known, name in names.items()}
    check_tensors(found, conversion.source_shapes, source.where)
    return names


def file_name(conversion: Conversion, name: str) -> str:
    """The name under which a file of the result holds a tensor."""
    if not conversion.to_ours:
        for pattern, replacement in conversion.family.file_names.items():
            name = re.sub(pattern, replacement, name)
    return name


def drop_tied_head(conversion: Conversion, source: Source, names: dict[str, str]) -> None:
    """Drop the second copy of a tied head, which some files hold, after checking that it is one."""
    if "lm_head.weight" not in names or "lm_head.weight" in conversion.source_shapes:
        return
    embeddings = next(
        conversion.sides(group)[0][0]
        for group in conversion.plan.groups
        if group.ours[0].endswith("embed_tokens.weight")
    )
    if embeddings not in names:
        return
    head = names.pop("lm_head.weight")
    if not torch.equal(source.read(head), source.read(names[embeddings])):
        raise ValueError(
            f"{source.where}: tie_word_embeddings (True) contradicts {head}, which is not the embeddings; "
            "set it to false in config.json to keep both"
        )


def target_entries(
    conversion: Conversion, source: Source, names: dict[str, str]
) -> Iterator[tuple[Group, dict[str, Entry]]]:
    """Each group with what it writes: names, shapes, and the dtype that it reads.

    Raises:
        ValueError: tensors of one group have different dtypes, which one fused tensor cannot keep.
    """
    for group in conversion.plan.groups:
        read, written = conversion.sides(group)
        dtypes = {source.entries[names[name]].dtype for name in read}
        if len(dtypes) > 1:
            raise ValueError(
                f"{source.where}: {', '.join(read)} have different dtypes ({', '.join(sorted(map(str, dtypes)))}), "
                f"but become one tensor in {conversion.family.model_type}; convert them to one dtype first"
            )
        dtype = dtypes.pop()
        yield group, {name: Entry(dtype, conversion.target_shapes[name]) for name in written}


def build_model(conversion: Conversion, source: Source) -> PreTrainedModel:
    """The converted model, in memory, sharing no storage with the source."""
    from transformers.initialization import no_init_weights

    names = source_names(conversion, source)
    state_dict: dict[str, torch.Tensor] = {}
    for group, entries in list(target_entries(conversion, source, names)):
        read, _ = conversion.sides(group)
        tensors = conversion.convert(group, [source.read(names[name]) for name in read])
        # Cloned: parts of one tensor are views of it, and a model's parameters must not share storage.
        state_dict.update(zip(entries, (tensor.clone(memory_format=torch.contiguous_format) for tensor in tensors)))
    with no_init_weights():
        model = conversion.model_class(conversion.config)
    missing, unexpected = model.load_state_dict(state_dict, strict=False, assign=True)
    tied = {"lm_head.weight"} if conversion.config.tie_word_embeddings else set()
    if unexpected or set(missing) - tied:
        raise RuntimeError(f"{conversion.family.model_type}: the plan missed {sorted(set(missing) - tied)}")
    model.tie_weights()
    devices = {tensor.device for tensor in state_dict.values()}
    if len(devices) == 1:
        model.to(devices.pop())  # type: ignore[arg-type]  # RoPE's frequencies were made on the CPU
    return model.eval()
