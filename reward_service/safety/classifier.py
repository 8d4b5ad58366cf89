"""A sequence classifier that says how probable a label is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cluster.contracts.config.safety import ClassifierRule
from cluster.contracts.errors import UserError
from cluster.machine.torch_state import prepare_torch

BATCH = 16
LONGEST = 100_000  # tokens; a tokenizer without a limit of its own names a larger number


class HarmClassifier:
    """Probability of ``rule.label``. A text that is longer than the model's positions is read in
    pieces, and the largest probability counts. Not thread-safe.

    Raises UserError for a directory that is no whole classifier, or does not know the label.
    """

    def __init__(self, rule: ClassifierRule, threads: int = 1) -> None:
        import transformers

        prepare_torch(threads)
        try:
            self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(rule.path)
            self._model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
                rule.path, output_loading_info=True
            )
        except (OSError, ValueError) as problem:
            raise UserError(
                f"cannot be loaded as a sequence classifier: {problem}",
                where=rule.path,
                fix="give the directory of a model that was saved with its classifier head",
            ) from None
        if info["missing_keys"]:
            raise UserError(
                f"lacks the weights {', '.join(sorted(info['missing_keys'])[:3])}: they would be "
                "random",
                where=rule.path,
                fix="give the directory of a model that was saved with its classifier head",
            )
        labels = {str(name): int(n) for n, name in self._model.config.id2label.items()}
        if rule.label not in labels:
            raise UserError(
                f"knows no label {rule.label!r}; its labels: {', '.join(labels)}",
                where=rule.path,
                fix="name one of them in safety.classifier.label",
            )
        self._model.eval()
        self._label = labels[rule.label]
        self._positions = self._longest()

    def probabilities(self, texts: Sequence[str]) -> list[float]:
        """One per text, in [0, 1]."""
        found = [0.0] * len(texts)
        for start in range(0, len(texts), BATCH):
            batch = list(texts[start : start + BATCH])
            for place, value in self._pieces(batch):
                found[start + place] = max(found[start + place], value)
        return found

    def _pieces(self, texts: list[str]) -> list[tuple[int, float]]:
        import torch

        # An empty text still has to be looked at as one piece.
        encoded = self._tokenizer(
            [text or " " for text in texts],
            truncation=True,
            max_length=self._positions,
            return_overflowing_tokens=True,
            padding=True,
            return_tensors="pt",
        )
        owners = encoded["overflow_to_sample_mapping"].tolist()
        with torch.inference_mode():
            logits = self._model(
                input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"]
            ).logits
        separate = logits.shape[1] == 1 or (
            self._model.config.problem_type == "multi_label_classification"
        )
        shares = logits.sigmoid() if separate else logits.softmax(dim=1)
        return list(zip(owners, shares[:, self._label].tolist(), strict=True))

    def _longest(self) -> int:
        limits = [
            self._tokenizer.model_max_length,
            getattr(self._model.config, "max_position_embeddings", None) or LONGEST,
        ]
        return int(min(LONGEST, *limits))
