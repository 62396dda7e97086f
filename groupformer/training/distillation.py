"""Distillation: a trainer whose loss is KL(teacher ‖ student) and cross-entropy.

Of the teacher's logits one row at a time is in memory.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .pretraining import PackedTrainer


if TYPE_CHECKING:
    from .uptraining import UptrainRecipe


IGNORED = -100
# Logits at a time: 16 MiB in float32 on a CPU, which the next chunk gets again without a page fault. A GPU gets more
# work in each launch.
CHUNK_SIZE, GPU_CHUNK_SIZE = 2**22, 2**26


class DistillationTrainer(PackedTrainer):
    """Trainer with `kl_weight * KL(teacher ‖ student) + ce_weight * cross-entropy`; it evaluates cross-entropy alone,
    so that the curve can be compared with any other model's."""

    def __init__(self, *args, teacher: Any, recipe: "UptrainRecipe", **kwargs):
        super().__init__(*args, **kwargs)
        self.recipe = recipe
        self.teacher: Any = None
        if teacher is not None:
            self.teacher = shard(teacher).eval() if self.is_fsdp_enabled else teacher.to(self.args.device).eval()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        teacher = self.teacher
        if teacher is None:  # the model's own loss holds no logits
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            loss = loss * self.recipe.ce_weight
            return (loss, outputs) if return_outputs else loss
        labels = nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=IGNORED)  # the last token predicts none
        inputs = {name: value for name, value in inputs.items() if name != "labels"}
        outputs = model(**inputs, use_cache=False)
        count = (labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch

        def taught(row: int) -> torch.Tensor:
            only = {name: value[row : row + 1] for name, value in inputs.items()}
            return teacher(**only, use_cache=False).logits[0]

        loss = DistillationLoss.apply(outputs.logits, taught, labels, self.recipe) / count
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # each process counted the tokens of all
        return (loss, outputs) if return_outputs else loss


class DistillationLoss(torch.autograd.Function):
    """The sum over scored tokens of `kl_weight * T² * KL(teacher ‖ student) + ce_weight * cross-entropy`.

    Loss and gradient are computed together, a few tokens at a time, and the teacher reads one row after the other: of
    the size of the logits there are only these and the gradient. By a student's logit the KL at temperature T has the
    gradient (p - q) / T, with p the student's and q the teacher's probabilities; the cross-entropy has p (at T = 1),
    less 1 at the label.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        taught: Callable[[int], torch.Tensor],
        labels: torch.Tensor,
        recipe: "UptrainRecipe",
    ) -> torch.Tensor:
        """
        Args:
            logits: The student's, (rows, tokens, vocab), each for the label at its place.
            taught: Gives the teacher's logits of a row, (tokens, vocab).
            labels: (rows, tokens); -100 is not scored.
        """
        size = max(1, (CHUNK_SIZE if logits.device.type == "cpu" else GPU_CHUNK_SIZE) // logits.shape[-1])
        total, gradient = logits.new_zeros((), dtype=torch.float32), torch.empty_like(logits)
        for row in range(len(logits)):
            pieces = (tensor.split(size) for tensor in (logits[row], taught(row), labels[row], gradient[row]))
            for student, teacher, targets, grad in zip(*pieces):
                total += DistillationLoss.of_piece(student, teacher, targets, grad, recipe)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def of_piece(
        logits: torch.Tensor,
        taught: torch.Tensor,
        labels: torch.Tensor,
        gradient: torch.Tensor,
        recipe: "UptrainRecipe",
    ) -> torch.Tensor:
        """The loss of a few tokens; its gradient is written to `gradient`."""
        temperature, kl_weight, ce_weight = recipe.temperature, recipe.kl_weight, recipe.ce_weight
        scored, targets = (labels != IGNORED).float(), labels[:, None].clamp(min=0)
        student = logits.float()
        learned = torch.log_softmax(student if temperature == 1 else student / temperature, dim=-1)
        hard = learned if temperature == 1 else torch.log_softmax(student, dim=-1)
        known = torch.log_softmax(taught.float() / temperature, dim=-1)
        probabilities = known.exp()
        loss = known.sub_(learned).mul_(probabilities).sum(-1).mul_(kl_weight * temperature**2)
        loss -= ce_weight * hard.gather(1, targets).squeeze(1)
        grad = probabilities.mul_(-kl_weight * temperature)
        grad.scatter_add_(1, targets, targets.new_full(targets.shape, -ce_weight, dtype=grad.dtype))
        # Of the student's logarithms only the probabilities are needed now; at T = 1 both are the same.
        grad.add_(learned.exp_(), alpha=kl_weight * temperature)
        grad.add_(hard if hard is learned else hard.exp_(), alpha=ce_weight)
        gradient.copy_(grad.mul_(scored[:, None]))
        return (loss * scored).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return ctx.saved_tensors[0].mul_(grad_output), None, None, None


def shard(model: Any) -> Any:
    """The model with its weights split over all processes, layer by layer, as FSDP2 splits the student."""
    from torch.distributed.fsdp import fully_shard

    for module in list(model.modules()):
        if type(module).__name__ in (model._no_split_modules or ()):
            fully_shard(module)
    return fully_shard(model)
