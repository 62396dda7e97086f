"""What each fine-tuning task needs: its Auto class, how rows become tensors, and how answers are scored."""

from collections.abc import Callable, Sequence
from typing import Any

from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    default_data_collator,
)

from .data import require_text, tokenize_and_pack


IGNORED = -100  # the label that losses and scores pass over


class CausalLMTask:
    """Next-token prediction on texts, or on conversations (a `messages` column), packed into rows."""

    auto_class: Any = AutoModelForCausalLM
    peft_task_type = "CAUSAL_LM"
    best_metric, greater_is_better = "loss", False
    text_columns: tuple[str, ...] = ("text", "messages")
    label_columns: tuple[str, ...] = ()
    compute_metrics: Callable | None = None
    labels: list[str] = []

    def __init__(self, tokenizer: Any, text_column: str, label_column: str, max_length: int | None, causal: bool):
        self.tokenizer, self.text_column, self.label_column = tokenizer, text_column, label_column
        self.max_length, self.causal = max_length, causal
        self.truncation = {"truncation": max_length is not None, "max_length": max_length}

    @property
    def collator(self) -> Any:
        return default_data_collator

    def learn_labels(self, dataset: Any) -> None:
        """Nothing to learn: tokens are the labels."""

    def encode(self, dataset: Any, name: str) -> Any:
        if dataset and isinstance(dataset[0][self.text_column], list):

            def render(row: dict[str, Any]) -> dict[str, str]:
                return {"text": self.tokenizer.apply_chat_template(row[self.text_column], tokenize=False)}

            return tokenize_and_pack(
                dataset.map(render, remove_columns=dataset.column_names), self.tokenizer, self.max_length or 512
            )
        return tokenize_and_pack(dataset, self.tokenizer, self.max_length or 512, self.text_column)


class SequenceClassificationTask(CausalLMTask):
    """One label for each text."""

    auto_class: Any = AutoModelForSequenceClassification
    peft_task_type = "SEQ_CLS"
    best_metric, greater_is_better = "accuracy", True
    text_columns: tuple[str, ...] = ("text", "sentence", "utterance")
    label_columns: tuple[str, ...] = ("label", "labels", "intent")

    @property
    def collator(self) -> Any:
        return DataCollatorWithPadding(self.tokenizer)

    def row_labels(self, dataset: Any) -> list[list[str]]:
        """The label of each row, as a list of one text."""
        return label_names(dataset, self.label_column)

    def learn_labels(self, dataset: Any) -> None:
        """Takes the labels from the training rows, in alphabetical order."""
        self.labels = sorted({name for row in self.row_labels(dataset) for name in row})
        if len(self.labels) < 2:
            raise ValueError(f"column ({self.label_column!r}) has only the label {self.labels}; give at least two")

    def check_labels(self, rows: list[list[str]], name: str) -> dict[str, int]:
        """Label ids, after checking that a split has no label that training never saw."""
        ids = {label: index for index, label in enumerate(self.labels)}
        unseen = sorted({label for row in rows for label in row} - set(ids))
        if unseen:
            raise ValueError(
                f"{name} has labels that are not in the training data ({', '.join(unseen[:5])}); "
                "remove those rows, or add such rows to the training data"
            )
        return ids

    def encode(self, dataset: Any, name: str) -> Any:
        labels = self.row_labels(dataset)
        ids = self.check_labels(labels, name)
        require_text(dataset, self.text_column)
        encoded = self.tokenizer(list(dataset[self.text_column]), **self.truncation)
        return make_dataset(encoded, [ids[row[0]] for row in labels], name)

    def compute_metrics(self, prediction: Any) -> dict[str, float]:
        return class_metrics(prediction.label_ids, prediction.predictions)


class TokenClassificationTask(SequenceClassificationTask):
    """One tag for each word.

    In training, all tokens of a word learn its tag. A word is scored at its last token in a causal model, the only one
    that has seen the whole word, and at its first in a bidirectional one.
    """

    auto_class = AutoModelForTokenClassification
    peft_task_type = "TOKEN_CLS"
    text_columns = ("tokens", "words")
    label_columns = ("tags", "ner_tags", "pos_tags", "labels")

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.metrics: Callable = tag_metrics

    @property
    def collator(self) -> Any:
        return DataCollatorForTokenClassification(self.tokenizer)

    def row_labels(self, dataset: Any) -> list[list[str]]:
        return label_names(dataset, self.label_column)

    def learn_labels(self, dataset: Any) -> None:
        super().learn_labels(dataset)
        if any(label.startswith("B-") for label in self.labels):
            self.metrics, self.best_metric = entity_metrics, "entity_f1"

    def encode(self, dataset: Any, name: str) -> Any:
        labels = self.row_labels(dataset)
        ids = self.check_labels(labels, name)
        require_words(dataset, self.text_column)
        words = [spaced(self.tokenizer, row) for row in dataset[self.text_column]]
        for index, (row, tags) in enumerate(zip(words, labels)):
            if len(row) != len(tags):
                raise ValueError(
                    f"{name}, row {index}, has {len(row)} words but {len(tags)} tags; give each word one tag"
                )
        encoded = self.tokenizer(words, is_split_into_words=True, **self.truncation)
        token_labels = []
        for index, tags in enumerate(labels):
            word_ids = encoded.word_ids(index)
            scored = [True] * len(word_ids) if name == "train" else self.scored(word_ids)
            token_labels.append(
                [ids[tags[word]] if word is not None and counts else IGNORED for word, counts in zip(word_ids, scored)]
            )
        return make_dataset(encoded, token_labels, name)

    def scored(self, word_ids: list[int | None]) -> list[bool]:
        """Which tokens stand for their words when tags are scored."""
        neighbours = [*word_ids[1:], None] if self.causal else [None, *word_ids[:-1]]
        return [word != neighbour for word, neighbour in zip(word_ids, neighbours)]

    def compute_metrics(self, prediction: Any) -> dict[str, float]:
        names, truth, answers = self.labels, [], []
        for predicted, labels in zip(prediction.predictions, prediction.label_ids):
            counts = labels != IGNORED
            truth.append([names[label] for label in labels[counts]])
            answers.append([names[label] for label in predicted[counts]])
        return self.metrics(truth, answers)


def class_metrics(truth: Sequence, answers: Sequence) -> dict[str, float]:
    """Accuracy, and F1 averaged over the labels."""
    from sklearn.metrics import accuracy_score, f1_score

    return {
        "accuracy": float(accuracy_score(truth, answers)),
        "macro_f1": float(f1_score(truth, answers, average="macro", zero_division=0)),
    }


def tag_metrics(truth: list[list[str]], answers: list[list[str]]) -> dict[str, float]:
    """Accuracy over words, and F1 averaged over the tags."""
    return class_metrics([tag for row in truth for tag in row], [tag for row in answers for tag in row])


def entity_metrics(truth: list[list[str]], answers: list[list[str]]) -> dict[str, float]:
    """Precision, recall and F1 over whole entities of BIO tags (seqeval), and accuracy over words."""
    from seqeval.metrics import accuracy_score, f1_score, precision_score, recall_score

    return {
        "entity_f1": float(f1_score(truth, answers, zero_division=0)),
        "entity_precision": float(precision_score(truth, answers, zero_division=0)),
        "entity_recall": float(recall_score(truth, answers, zero_division=0)),
        "accuracy": float(accuracy_score(truth, answers)),
    }


def spaced(tokenizer: Any, words: list[str]) -> list[str]:
    """Words as they stand in running text: a tokenizer that keeps spaces wants one before each word but the first."""
    if tokenizer.decode(tokenizer(" a", add_special_tokens=False)["input_ids"]) != " a":
        return list(words)
    return [word if index == 0 else " " + word for index, word in enumerate(words)]


def label_names(dataset: Any, column: str) -> list[list[str]]:
    """The labels of each row as lists of text: words as they are, class ids by their names, numbers as digits."""
    feature = dataset.features[column]
    classes = getattr(getattr(feature, "feature", feature), "names", None)
    rows = [label if isinstance(label, list) else [label] for label in dataset[column]]
    if any(label is None for row in rows for label in row):
        raise ValueError(f"column ({column!r}) has rows without a label; remove them")
    return [[classes[label] if classes else str(label) for label in row] for row in rows]


def require_words(dataset: Any, column: str) -> None:
    """Raises ValueError if a column does not hold lists of words."""
    for index, row in enumerate(dataset[column]):
        if not isinstance(row, list) or not all(isinstance(word, str) for word in row):
            raise ValueError(
                f"column ({column!r}), row {index}, is not a list of words; choose a column of such lists"
            )


def make_dataset(encoded: Any, labels: list, name: str) -> Any:
    """Token ids, attention mask and labels as a dataset.

    Raises:
        ValueError: a row without any token.
    """
    from datasets import Dataset

    for index, input_ids in enumerate(encoded["input_ids"]):
        if not input_ids:
            raise ValueError(f"{name}, row {index}, is empty; remove such rows")
    columns = {column: encoded[column] for column in ("input_ids", "attention_mask")}
    return Dataset.from_dict({**columns, "labels": labels})


TASKS = {
    "causal-lm": CausalLMTask,
    "sequence-classification": SequenceClassificationTask,
    "token-classification": TokenClassificationTask,
}
