"""Fine-tuning on CLINC150 intents and English Web Treebank tags, beside a bag-of-words logistic regression.

    python benchmarks/finetune_results.py --data PATH [--reference FOLDER] [--only NAME ...]

trains each row of `docs/results.md`, one after the other, writes `benchmarks/results/finetune.json` and prints the
tables; rows that are there already are not trained again.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

from datasets import load_dataset

from groupformer.training.finetuning import FinetuneRecipe, finetune


RESULTS = Path(__file__).parent / "results" / "finetune.json"
PAGE = Path(__file__).parent.parent / "docs" / "results.md"
BEGIN, END = "<!-- fine-tuning: begin -->", "<!-- fine-tuning: end -->"
TITLES = {
    "clinc150": "CLINC150: 150 intents, 4,500 test sentences",
    "ewt": "English Web Treebank: 17 tags, 25,094 test words",
}

# Small enough for a CPU: 2.6 M parameters, of which the embeddings are 2.1 M.
FRESH = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_dropout": 0.1,
    "embedding_dropout": 0.1,
}
TASKS = {
    "clinc150": {"task": "sequence-classification", "epochs": 8, "batch_size": 64},
    "ewt": {"task": "token-classification", "epochs": 4, "batch_size": 32},
}


def data_files(data: Path, folder: Path) -> dict[str, dict[str, list[str]]]:
    """The files of each task. Of CLINC150 the 150 intents only: rows that are out of scope are left out."""
    files = {}
    for name, source in {"clinc150": data / "clinc150", "ewt": data / "ewt_pos"}.items():
        files[name] = {}
        for split in ("train", "validation", "test"):
            path = source / f"{split}.parquet"
            if name == "clinc150":
                rows = load_dataset("parquet", data_files=str(path), split="train")
                path = folder / f"clinc150-{split}.parquet"
                rows.filter(lambda row: row["label"] != "oos").to_parquet(str(path))
            files[name][f"{split}_files"] = [str(path)]
    return files


def bag_of_words_intents(files: dict[str, list[str]]) -> dict[str, float]:
    """Logistic regression on TF-IDF of words and pairs of words."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import accuracy_score, f1_score
    from sklearn.pipeline import make_pipeline

    train, test = (
        load_dataset("parquet", data_files=files[name], split="train") for name in ("train_files", "test_files")
    )
    model = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(C=30, max_iter=300)
    )
    answers = model.fit(list(train["text"]), list(train["label"])).predict(list(test["text"]))
    return {
        "test_accuracy": float(accuracy_score(test["label"], answers)),
        "test_macro_f1": float(f1_score(test["label"], answers, average="macro")),
    }


def bag_of_words_tags(files: dict[str, list[str]], neighbours: int) -> dict[str, float]:
    """Logistic regression on the word itself and on so many words to each side of it."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import SGDClassifier
    from sklearn.metrics import accuracy_score, f1_score
    from sklearn.pipeline import make_pipeline

    def features(row: dict) -> list[list[str]]:
        words = ["<start>"] * neighbours + [word.lower() for word in row["tokens"]] + ["<end>"] * neighbours
        offsets = range(2 * neighbours + 1)
        return [[f"{offset}:{words[index + offset]}" for offset in offsets] for index in range(len(row["tokens"]))]

    splits = {}
    for name in ("train_files", "test_files"):
        rows = load_dataset("parquet", data_files=files[name], split="train")
        splits[name] = [item for row in rows for item in features(row)], [tag for row in rows for tag in row["tags"]]
    model = make_pipeline(
        CountVectorizer(analyzer=lambda words: words, binary=True),
        SGDClassifier(loss="log_loss", alpha=1e-6, max_iter=20, random_state=0),
    )
    answers = model.fit(*splits["train_files"]).predict(splits["test_files"][0])
    truth = splits["test_files"][1]
    return {
        "test_accuracy": float(accuracy_score(truth, answers)),
        "test_macro_f1": float(f1_score(truth, answers, average="macro")),
    }


def runs(reference: str | None) -> dict[str, tuple[str, dict]]:
    """The runs by name: the task, and what differs from it."""
    table = {}
    for task in TASKS:
        for direction in ("causal", "bidirectional"):
            for tuning in ("full", "lora"):
                lora = tuning == "lora"
                options = {"bidirectional": direction == "bidirectional", "lora": lora}
                table[f"{task}, fresh, {direction}, {tuning}"] = task, {"config": FRESH, "merge": lora, **options}
                if reference:
                    # Trained weights need fewer passes, and this model takes ten times the work of the fresh one.
                    epochs = TASKS[task]["epochs"] / 2
                    options = {"model": reference, "epochs": epochs, **options}
                    table[f"{task}, reference, {direction}, {tuning}"] = task, options
    regular = {**FRESH, "hidden_dropout": 0.3, "embedding_dropout": 0.3}
    options = {"config": regular, "bidirectional": True, "lora": False, "epochs": 12}
    table["ewt, fresh, bidirectional, full, dropout 0.3, 12 epochs"] = "ewt", options
    return table


def learning_rate(options: dict) -> float:
    """Fresh weights take larger steps than trained ones, and adapters larger ones than whole weights."""
    if options["lora"]:
        return 4e-3
    return 5e-4 if "model" in options else 2e-3


def render(results: dict[str, dict]) -> str:
    """The rows as Markdown tables, one for each task."""
    tables = []
    for task in TASKS:
        lines = ["| model | trained parameters | test accuracy | test macro F1 |", "| --- | --- | --- | --- |"]
        for name, row in sorted(results.items()):
            if name.startswith(f"{task}, "):
                trained = f"{row['trained_parameters']:,}" if "trained_parameters" in row else ""
                title = name.removeprefix(f"{task}, ")
                lines.append(f"| {title} | {trained} | {row['test_accuracy']:.3f} | {row['test_macro_f1']:.3f} |")
        tables.append(f"### {TITLES[task]}\n\n" + "\n".join(lines))
    return "\n\n".join(tables)


def write_page(results: dict[str, dict]) -> None:
    """Puts the tables into `docs/results.md`, between its two marks; the text around them is written by hand."""
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n{render(results)}\n{END}{after}", encoding="utf-8")


def read(path: Path) -> dict[str, dict]:
    """The rows that are there already."""
    return json.loads(path.read_text()) if path.exists() else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--data", type=Path, help="folder with clinc150/ and ewt_pos/; without it, write the page only"
    )
    parser.add_argument("--reference", help="a checkpoint to fine-tune as well")
    parser.add_argument("--only", nargs="*", help="names of runs, in this order")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of the rows")
    arguments = parser.parse_args()
    if arguments.data is not None:
        with tempfile.TemporaryDirectory() as folder:
            train_rows(arguments, Path(folder))
    write_page(read(arguments.results))


def train_rows(arguments: argparse.Namespace, folder: Path) -> None:
    """Trains what is asked for and not there yet, and adds each row to the file when it is done."""
    files = data_files(arguments.data, folder)
    jobs = {
        "clinc150, bag of words": lambda: bag_of_words_intents(files["clinc150"]),
        "ewt, bag of words (the word alone)": lambda: bag_of_words_tags(files["ewt"], 0),
        "ewt, bag of words (the word and two to each side)": lambda: bag_of_words_tags(files["ewt"], 2),
    }
    for name, (task, options) in runs(arguments.reference).items():
        recipe = {**TASKS[task], **files[task], **options, "learning_rate": learning_rate(options)}
        output = folder / name.replace(", ", "-")
        jobs[name] = lambda recipe=recipe, output=output: finetune(FinetuneRecipe(**recipe), output)
    for name in arguments.only or jobs:
        if name in read(arguments.results):
            continue
        started = time.time()
        row = jobs[name]() | {"seconds": round(time.time() - started, 1)}
        print(name, row, flush=True)
        rows = read(arguments.results) | {name: row}  # read again: another process may have added rows meanwhile
        arguments.results.parent.mkdir(parents=True, exist_ok=True)
        arguments.results.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
